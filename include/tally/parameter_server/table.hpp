// SPDX-License-Identifier: Apache-2.0
// What a table is, agreed on by all members before it is used: its tensors, how they are cut into shards, who serves them, what
// a pull may miss, and how what workers push is folded. And the header of every message about it.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../call.hpp"
#include "../choose.hpp"
#include "../error.hpp"
#include "../steps.hpp"
#include "../text.hpp"
#include "../types.hpp"
#include "rules.hpp"

namespace tally::inline v0 {

/// What a pull may miss. A worker's clock is the number of its ticks. A pull at clock c has every push that any live worker
/// stamped with a clock below c - staleness, and all of the puller's own. (Cipar et al., "Solving the straggler problem with bounded
/// staleness", 2013; the gate is at reads, as in Wei et al., "Managed communication and consistency", 2015.)
struct Consistency {
  bool bounded = true;
  std::uint64_t staleness = 0;
  friend bool operator==(const Consistency&, const Consistency&) = default;
};
/// Bulk synchronous: staleness 0.
inline constexpr Consistency bsp{true, 0};
/// Stale synchronous: a worker may be `staleness` clocks ahead of what it reads of the slowest.
constexpr Consistency ssp(std::integral auto staleness) {
  if (std::cmp_less(staleness, 0)) throw Error(Errc::invalid_argument, {"ssp(", static_cast<std::int64_t>(staleness), "): a bound cannot be negative"});
  return {true, static_cast<std::uint64_t>(staleness)};
}
/// Asynchronous: whatever is there, and the own pushes.
inline constexpr Consistency asp{false, 0};
[[gnu::cold]] inline std::string text_of(const Consistency& c) { return !c.bounded ? "asp" : c.staleness == 0 ? "bsp" : detail::concat({"ssp:", c.staleness}); }

/// In which order pushes are folded into the values.
class FoldOrder {
 public:
  /// Each by itself as it arrives: fast, other bits every time.
  static FoldOrder arrival() { return {}; }
  /// All of a clock together once every worker has ticked past it, in the order of ranks, bracketed from the left.
  static FoldOrder by_rank() { return FoldOrder(Kind::by_rank, {}); }
  /// Likewise, in the order and the brackets in which this algorithm of all_reduce folds them: the same bits.
  template <class Algorithm>
  static FoldOrder as() {
    constexpr AlgorithmRef algorithm = algorithm_ref<Algorithm, Collective::all_reduce>();
    return FoldOrder(Kind::as_algorithm, algorithm);
  }
  bool waits() const { return kind_ != Kind::arrival; }
  /// None: by rank.
  const AlgorithmRef& algorithm() const { return algorithm_; }
  std::string text() const { return kind_ == Kind::arrival ? "arrival" : kind_ == Kind::by_rank ? "by_rank" : detail::concat({"as(", algorithm_.name, ")"}); }

 private:
  enum class Kind : std::uint8_t { arrival, by_rank, as_algorithm };
  FoldOrder() = default;
  FoldOrder(Kind kind, const AlgorithmRef& algorithm) : kind_(kind), algorithm_(algorithm) {}
  Kind kind_ = Kind::arrival;
  AlgorithmRef algorithm_;
};

/// A part of a table that has a name: a vector of `count` elements, or rows of `row` elements that are found by 64-bit keys from
/// `first_key` to `last_key` and are 0 until somebody pushes them.
struct TensorSpec {
  std::string name;
  std::size_t count = 0;
  std::size_t row = 0;  // 0: a vector
  std::uint64_t first_key = 0, last_key = std::numeric_limits<std::uint64_t>::max();
  bool is_sparse() const { return row > 0; }
};

struct TableOptions {
  Consistency consistency = bsp;
  FoldOrder fold = FoldOrder::arrival();
  std::vector<Rank> servers = {};  // empty: every rank serves a shard
  bool dedicated = false;          // servers are not workers: they call serve()
  int replicas = 0;                // 1: each shard is kept by the next server, too
  std::size_t credits = 0;         // bytes of pushes of one worker that a shard holds, at most; 0: twice the largest tensor's part, at least 16 MiB
  std::size_t block_bytes = std::size_t{256} << 10;  // values are published in blocks of so much
  bool one_sided = true;           // where ranks share memory, workers store what they push where the server looks for it, and load what they pull
  nanoseconds retry_after{0};      // 0: transports lose nothing. Else what was not answered is sent again after so long
  std::string door = {};           // HOST:PORT where readers and workers that come later may connect, port 0: any; empty: nowhere
  int guests = 0;                  // workers that may come by it, at a time
};

namespace detail {

enum class MessageKind : std::uint8_t { push = 1, pull, advance, leave, acknowledge, reply, refusal, replicated, gone, release, cut, set, join, last = join };
constexpr std::string_view name_of(MessageKind kind) {
  constexpr std::string_view names[] = {"nothing", "push", "pull", "advance", "leave", "acknowledge", "reply", "refusal", "replicated", "gone", "release", "cut", "set", "join"};
  return static_cast<std::size_t>(kind) < std::size(names) ? names[static_cast<std::size_t>(kind)] : "unknown";
}

/// What every message begins with. What the fields mean depends on its kind.
struct Envelope {
  static constexpr std::uint8_t is_replica = 1;  // from a shard's primary to its replica: what it is to do, too
  static constexpr std::uint8_t is_cut = 2;      // a reply's payload comes in pieces that end where blocks do; `number`: where the first one begins
  static constexpr std::uint8_t is_rows = 4;     // a push's payload is keys, then their rows: two pieces
  static constexpr std::uint8_t asks = 8;        // gone: and wants to be told the same
  static constexpr std::uint8_t is_direct = 16;  // a push's payload lies at `index` in the worker's window; a reply's are the places in the server's memory where the pieces lie
  static constexpr std::uint8_t stays = 32;      // a push on one rank: its memory is there until it is done
  static constexpr std::uint8_t of_cut = 64;     // a pull: of the cut at `clock`, what `parts` says (see Column)
  static constexpr std::uint8_t drops = 128;     // a cut: it is not needed any more
  MessageKind kind{};
  std::uint8_t flags = 0;
  std::uint16_t tensor = 0, shard = 0;
  std::uint16_t parts = 1;     // push: shards it goes to. pull: its priority
  std::int32_t worker = -1;    // whom it is about; join: -1 for any that is free
  float weight = 1;
  std::uint64_t sequence = 0;  // push: its number among this worker's to this shard, from 1 on. advance: of the last one before it. acknowledge: whose. pull: of the last own push it must see. join, gone: which of those that were this worker, one after another
  std::uint64_t number = 0;    // push: among this worker's, whatever shards they go to. advance, leave, gone: all up to it are at all their shards (advance: and so is `first`). acknowledge: the last one that the shard holds no longer
  std::uint64_t clock = 0;     // the sender's. reply: below which all pushes are in it
  std::uint64_t first = 0, count = 0;  // elements of the tensor, or keys
  std::uint64_t bytes = 0;     // of the payload
  std::uint64_t request = 0;   // the operation of the sender's that it is for, which the answer names
  std::uint64_t index = 0;     // between replicas: of the entry
};
static_assert(sizeof(Envelope) == 80 && std::is_trivially_copyable_v<Envelope>);

/// Pushes are counted against credits in whole cache lines.
constexpr std::size_t in_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

/// What is kept of a tensor: 0 values, 1 to 8 states of its rule, or
struct Column {
  static constexpr std::uint16_t steps = 100;  // three numbers for a run of elements: first, count, and how often they were updated
  static constexpr std::uint16_t rows = 101;   // a key and the row with all that belongs to it, by their place in the shard's part
};

/// f(begin, bytes) for each piece that a payload is sent in. False if it makes no sense.
template <class F>
bool each_piece(const Envelope& e, std::size_t block_bytes, F&& f) {
  if ((e.flags & Envelope::is_cut) == 0) return f(std::size_t{0}, e.bytes), true;
  const std::size_t grain = e.count > 0 ? e.bytes / e.count : 0;
  if (grain == 0 || grain * e.count != e.bytes || e.number > e.first) return false;
  const std::size_t block = std::max<std::size_t>(block_bytes / grain, 1);
  for (std::size_t done = 0; done < e.count;) {
    const std::size_t n = std::min(block - (e.first - e.number + done) % block, e.count - done);
    f(done * grain, n * grain);
    done += n;
  }
  return true;
}

/// The table as its members see it.
struct Table {
  std::vector<TensorSpec> tensors;
  RuleOps rule;
  TableOptions options;
  std::vector<Rank> servers, workers;  // by shard; by worker, those that may come later are the last, with ranks from `size` on
  int size = 0;                        // ranks
  Grouping group = {};                 // of the workers, for algorithms that make use of it

  std::int32_t worker_at(Rank r) const {
    const auto found = std::find(workers.begin(), workers.end(), r);
    return found == workers.end() ? -1 : static_cast<std::int32_t>(found - workers.begin());
  }
  int shards() const { return static_cast<int>(servers.size()); }
  /// Of the workers, those that are there from the beginning.
  std::size_t regulars() const { return workers.size() - static_cast<std::size_t>(options.guests); }
  /// The elements of a tensor that a shard has.
  Range part(std::size_t tensor, int shard) const { return Chunks(Buffer::input, tensors[tensor].count, shards())[shard]; }
  /// The first key beyond those of a shard; keys are divided evenly.
  int shard_of(const TensorSpec& t, std::uint64_t key) const {
    __extension__ typedef unsigned __int128 Large;
    const Large all = Large{t.last_key - t.first_key} + 1;
    return static_cast<int>(Large{key - t.first_key} * static_cast<unsigned>(shards()) / all);
  }
  /// The server that keeps a shard if its own is lost; -1 if none does.
  int replica_of(int shard) const { return options.replicas > 0 && shards() > 1 ? (shard + 1) % shards() : -1; }
  std::size_t block_elements() const { return std::max<std::size_t>(options.block_bytes / rule.grain, 1); }
  std::size_t credits() const {
    if (options.credits > 0) return (options.credits + 63) / 64 * 64;
    std::size_t largest = 0;
    for (std::size_t t = 0; t < tensors.size(); ++t)
      if (!tensors[t].is_sparse()) largest = std::max(largest, part(t, 0).count * rule.grain);
    return (std::max<std::size_t>(2 * largest, std::size_t{16} << 20) + 127) / 64 * 64;
  }
  // Memory that ranks share: each server's is its values and what it works with, and then a window for each worker's pushes.
  std::size_t window_bytes() const { return credits(); }
  std::size_t arena_bytes() const {
    std::size_t bytes = std::size_t{64} << 20;
    for (std::size_t t = 0; t < tensors.size(); ++t)
      if (!tensors[t].is_sparse()) bytes += 3 * (part(t, 0).count * rule.grain + 2 * options.block_bytes);
    return (bytes + 4095) / 4096 * 4096;
  }
  std::size_t shared_bytes() const { return options.one_sided ? (arena_bytes() + regulars() * window_bytes() + 4095) / 4096 * 4096 : 0; }

  /// Everything that must be the same on all members, line by line.
  [[gnu::cold]] std::string description() const {
    std::string text = concat({"elements ", name_of(rule.type), " of ", rule.grain, " bytes\nthe rule's type and settings, as a hash: ", rule.hash, "\nconsistency ", text_of(options.consistency), "\nfold ", options.fold.text(), "\nreplicas ", options.replicas,
                               "\ncredits ", credits(), "\nblocks of ", options.block_bytes, "\n", options.one_sided ? "one-sided\n" : "two-sided\n", options.dedicated ? "dedicated " : "", "servers ", list_of(servers), "\nguests ", options.guests, options.door.empty() ? "\nno door\n" : "\na door\n"});
    for (const TensorSpec& t : tensors)
      text += t.is_sparse() ? concat({"tensor '", t.name, "': rows of ", t.row, " elements, keys ", t.first_key, " to ", t.last_key, "\n"}) : concat({"tensor '", t.name, "': ", t.count, " elements\n"});
    return text;
  }
  static std::string list_of(const std::vector<Rank>& ranks) {
    std::string text;
    for (const Rank r : ranks) text += concat({text.empty() ? "" : ",", r});
    return text;
  }
};

}  // namespace detail

}  // namespace tally::inline v0
