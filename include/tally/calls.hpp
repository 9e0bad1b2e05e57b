// SPDX-License-Identifier: Apache-2.0
// What each operation's arguments mean: checked, and turned into one untyped call with the algorithm that is to do it.
// Nothing is sent here, so a bad argument is an error on the rank that made it, before others are involved.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "call.hpp"
#include "cost.hpp"
#include "memory.hpp"
#include "run.hpp"

namespace tally::inline v0 {

/// Per call, e.g. `comm.all_reduce(data, tally::sum, {.timeout = 2s})`.
struct CallOptions {
  std::optional<nanoseconds> timeout = {};  // default: the communicator's
  std::string_view algorithm = {};          // by name, the same on all ranks; default: chosen by size
  std::optional<Order> order = {};          // the same on all ranks; default: the communicator's
};

/// Chosen by size, unless TALLY_ALGORITHM says otherwise.
struct Auto {};

template <class R>
using ValueOf = std::ranges::range_value_t<R>;

/// Contiguous memory of elements: std::span, std::vector, std::array, ...
template <class R>
concept Elements = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> && Element<ValueOf<R>>;
template <class R>
concept WritableElements = Elements<R> && !std::is_const_v<std::remove_reference_t<std::ranges::range_reference_t<R>>>;
template <class In, class Out>
concept SameElements = Elements<In> && WritableElements<Out> && std::same_as<ValueOf<In>, ValueOf<Out>>;

/// Elements of each rank's block, and where each begins.
using Counts = std::span<const std::size_t>;
using Ranks = std::span<const Rank>;

/// Receive: whichever tag comes first.
inline constexpr int any_tag = -1;

namespace detail {

/// Operators without state are all the same one, which lives for ever.
template <class Op>
inline constexpr bool is_stateless = std::is_empty_v<Op> && std::is_default_constructible_v<Op>;
template <class Op>
const Op& lasting(const Op& op) {
  if constexpr (is_stateless<Op>) {
    static const Op one{};
    return one;
  } else {
    return op;
  }
}

}  // namespace detail

class CallMaker {
 public:
  CallMaker(const AnyEngine& engine, nanoseconds timeout, const CostModel& model, AlgorithmOverrides overrides, Order order)
      : rank_(engine.rank()), size_(engine.size()), timeout_(timeout), frame_bytes_(engine.frame_bytes()), one_address_space_(engine.one_address_space()), stages_(engine.stages()), order_(order), chooser_(size_, model, stages_, engine.partition()), overrides_(std::move(overrides)) {}

  Rank rank() const { return rank_; }
  int size() const { return size_; }
  const Grouping& group() const { return chooser_.group(); }
  nanoseconds timeout() const { return timeout_; }
  void set_timeout(nanoseconds timeout) { timeout_ = positive(timeout); }
  Order order() const { return order_; }
  const AlgorithmOverrides& overrides() const { return overrides_; }
  Chooser& chooser() { return chooser_; }
  /// See Communicator::explain.
  [[gnu::cold]] std::string explain(Collective operation, std::size_t bytes, bool symmetric, AnyEngine& engine) {
    const Need need{operation != Collective::barrier && (symmetric || one_address_space_), order_ == Order::fixed ? Folding::fixed : Folding::any};
    const AlgorithmRef& asked = overrides_.of(operation);
    const bool follows = asked && reaches(asked, need.direct) && need.met_by(asked, operation);
    const AlgorithmRef chosen = follows ? asked : chooser_.choose(operation, bytes, need);
    const Objective objective = chooser_.model().objective;
    std::string text = detail::concat({name_of(operation), " of ", bytes, " bytes, ", size_, " ranks: ", chosen.name,
                                       follows ? ", because TALLY_ALGORITHM says so" : detail::concat({", the least ", name_of(objective), " for its size class"}), "\n"});
    std::vector<Chooser::Candidate> candidates = chooser_.candidates(operation, bytes, need);
    if (std::ranges::none_of(candidates, [&](const Chooser::Candidate& each) { return each.algorithm.name == chosen.name; })) candidates.push_back({chosen, chooser_.estimate(chosen, operation, bytes)});
    for (const Chooser::Candidate& candidate : candidates) {
      char row[160];
      std::snprintf(row, sizeof row, "  %-20s %12.3f us  %s", std::string(candidate.algorithm.name).c_str(), candidate.estimate.microseconds, candidate.estimate.measured ? "measured" : "estimated");
      text += row;
      if (objective != Objective::time) std::snprintf(row, sizeof row, "  energy %12.3f, relative", candidate.estimate.energy), text += row;
      text += '\n';
    }
    const std::string ways = engine.ways();
    if (group().matters(size_)) text += detail::concat({"  ", group().count(size_), " groups of ranks share ", ways.empty() ? "a cache or a socket" : "a host", ", at most ", group().largest(size_), " in each\n"});
    else if (find_algorithm(operation, Hierarchical::name)) text += "  hierarchical needs ranks that share a host, or else a cache or a socket, and others that do not: here are none, as far as is known (TALLY_GROUP)\n";
    if (!ways.empty()) text += detail::concat({"  rank ", rank_, " goes by ", ways, "\n"});
    if (const AlgorithmRef kernel = find_algorithm(operation, SingleCopy::name)) {
      if (const std::string problem = engine.kernel_problem(); !problem.empty()) text += detail::concat({"  single_copy is done as staged: ", problem, "\n"});
      else if (engine.stages() && !chooser_.has_measured(kernel, operation, bytes)) text += "  single_copy is not measured: the kernel's copies are chosen by measurement alone (tally_perf --tune)\n";
      if (!need.direct) text += "  zero_copy needs memory from allocate(): these ranks cannot reach each other's private memory\n";
    }
    return text;
  }
  bool one_address_space() const { return one_address_space_; }
  bool reaches(const AlgorithmRef& algorithm, bool direct) const { return !algorithm.share || (algorithm.is(Reach::direct) ? direct : stages_); }

  /// Calls that run in the background do so by steps alone.
  enum class Way : std::uint8_t { foreground, background };

  template <class A, class Data, class Op>
  Call all_reduce(Data& data, const Op& op, const CallOptions& options, Way way) {
    const Output memory = memory_of("data", data);
    return folding<A, Collective::all_reduce, ValueOf<Data>>(memory, memory, std::ranges::size(data), op, 0, options, way);
  }
  template <class A, class In, class Out, class Op>
  Call all_reduce(In& in, Out& out, const Op& op, const CallOptions& options, Way way) {
    expect_count("all_reduce: out", std::ranges::size(out), std::ranges::size(in));
    return folding<A, Collective::all_reduce, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), op, 0, options, way);
  }
  template <class A, class In, class Out, class Op>
  Call reduce(In& in, Out& out, const Op& op, Rank root, const CallOptions& options, Way way) {
    expect_root("reduce", root);
    if (rank_ == root) expect_count("reduce: out", std::ranges::size(out), std::ranges::size(in));
    const Output result = rank_ == root ? memory_of("out", out) : nowhere(out);
    return folding<A, Collective::reduce, ValueOf<In>>(memory_of("in", in), result, std::ranges::size(in), op, root, options, way);
  }
  template <class A, class Data>
  Call broadcast(Data& data, Rank root, const CallOptions& options, Way way) {
    expect_root("broadcast", root);
    return moving<A, Collective::broadcast, ValueOf<Data>>(Input{}, memory_of("data", data), std::ranges::size(data), root, options, way);
  }
  template <class A, class In, class Out>
  Call all_gather(In& in, Out& out, const CallOptions& options, Way way) {
    expect_count("all_gather: out", std::ranges::size(out), product(std::ranges::size(in)));
    return moving<A, Collective::all_gather, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), 0, options, way);
  }
  template <class A, class In, class Out, class Op>
  Call reduce_scatter(In& in, Out& out, const Op& op, const CallOptions& options, Way way) {
    expect_count("reduce_scatter: in", std::ranges::size(in), product(std::ranges::size(out)));
    return folding<A, Collective::reduce_scatter, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(out), op, 0, options, way);
  }
  template <class A, class In, class Out>
  Call gather(In& in, Out& out, Rank root, const CallOptions& options, Way way) {
    expect_root("gather", root);
    if (rank_ == root) expect_count("gather: out", std::ranges::size(out), product(std::ranges::size(in)));
    return moving<A, Collective::gather, ValueOf<In>>(memory_of("in", in), rank_ == root ? memory_of("out", out) : nowhere(out), std::ranges::size(in), root, options, way);
  }
  template <class A, class In, class Out>
  Call scatter(In& in, Out& out, Rank root, const CallOptions& options, Way way) {
    expect_root("scatter", root);
    if (rank_ == root) expect_count("scatter: in", std::ranges::size(in), product(std::ranges::size(out)));
    return moving<A, Collective::scatter, ValueOf<In>>(rank_ == root ? Input(memory_of("in", in)) : Input(nowhere(in)), memory_of("out", out), std::ranges::size(out), root, options, way);
  }
  template <class A, class In, class Out>
  Call all_to_all(In& in, Out& out, const CallOptions& options, Way way) {
    expect_count("all_to_all: out", std::ranges::size(out), std::ranges::size(in));
    if (std::ranges::size(in) % static_cast<std::size_t>(size_) != 0) refuse_blocks("all_to_all", std::ranges::size(in));
    return moving<A, Collective::all_to_all, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in) / static_cast<std::size_t>(size_), 0, options, way);
  }
  template <class A, Collective O, class In, class Out, class Op>
  Call scan(In& in, Out& out, const Op& op, const CallOptions& options, Way way) {
    expect_count("scan: out", std::ranges::size(out), std::ranges::size(in));
    return folding<A, O, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), op, 0, options, way);
  }
  template <class A>
  Call barrier(const CallOptions& options, Way way) {
    const Output memory{&token_, 1};
    return settle<A, Collective::barrier, unsigned char>(memory, memory, {Collective::barrier, rank_, size_, 0, 1, false, group()}, {fold_of<unsigned char>(max), 0, nullptr, nullptr, Folding::any}, options, way);
  }

  // Blocks of their own sizes. `extents` must outlive the call's post.

  template <class A, class In, class Out>
  Call all_gather_v(In& in, Out& out, Counts counts, Counts displacements, Extents& extents, const CallOptions& options, Way way) {
    extents.out_counts = counts, extents.out_firsts = displacements;
    expect_blocks("all_gather_v: out", counts, displacements, std::ranges::size(out), true);
    expect_own("all_gather_v: in", std::ranges::size(in), counts);
    return moving<A, Collective::all_gather_v, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), 0, options, way, &extents);
  }
  template <class A, class In, class Out, class Op>
  Call reduce_scatter_v(In& in, Out& out, Counts counts, Counts displacements, Extents& extents, const Op& op, const CallOptions& options, Way way) {
    extents.in_counts = counts, extents.in_firsts = displacements;
    expect_blocks("reduce_scatter_v: in", counts, displacements, std::ranges::size(in), false);
    expect_own("reduce_scatter_v: out", std::ranges::size(out), counts);
    return folding<A, Collective::reduce_scatter_v, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(out), op, 0, options, way, &extents);
  }
  template <class A, class In, class Out>
  Call gather_v(In& in, Out& out, Counts counts, Counts displacements, Rank root, Extents& extents, const CallOptions& options, Way way) {
    expect_root("gather_v", root);
    if (rank_ == root) {
      extents.out_counts = counts, extents.out_firsts = displacements;
      expect_blocks("gather_v: out", counts, displacements, std::ranges::size(out), true);
      expect_own("gather_v: in", std::ranges::size(in), counts);
    }
    return moving<A, Collective::gather_v, ValueOf<In>>(memory_of("in", in), rank_ == root ? memory_of("out", out) : Output{}, std::ranges::size(in), root, options, way, &extents);
  }
  template <class A, class In, class Out>
  Call scatter_v(In& in, Out& out, Counts counts, Counts displacements, Rank root, Extents& extents, const CallOptions& options, Way way) {
    expect_root("scatter_v", root);
    if (rank_ == root) {
      extents.in_counts = counts, extents.in_firsts = displacements;
      expect_blocks("scatter_v: in", counts, displacements, std::ranges::size(in), false);
      expect_own("scatter_v: out", std::ranges::size(out), counts);
    }
    return moving<A, Collective::scatter_v, ValueOf<In>>(rank_ == root ? Input(memory_of("in", in)) : Input{}, memory_of("out", out), std::ranges::size(out), root, options, way, &extents);
  }
  template <class A, class In, class Out>
  Call all_to_all_v(In& in, Counts in_counts, Counts in_displacements, Out& out, Counts out_counts, Counts out_displacements, Extents& extents, const CallOptions& options, Way way) {
    extents = {in_counts, in_displacements, out_counts, out_displacements, {}, {}};
    expect_blocks("all_to_all_v: in", in_counts, in_displacements, std::ranges::size(in), false);
    expect_blocks("all_to_all_v: out", out_counts, out_displacements, std::ranges::size(out), true);
    const auto mine = static_cast<std::size_t>(rank_);
    if (in_counts[mine] != out_counts[mine]) throw Error(Errc::invalid_argument, {"all_to_all_v: rank ", rank_, " sends itself ", in_counts[mine], " elements but receives ", out_counts[mine]});
    return moving<A, Collective::all_to_all_v, ValueOf<In>>(memory_of("in", in), memory_of("out", out), 0, 0, options, way, &extents);
  }
  template <class A, class In, class Out>
  Call neighbour_exchange(In& in, Out& out, Ranks to, Ranks from, Extents& extents, const CallOptions& options, Way way) {
    extents.to = to, extents.from = from;
    for (const Ranks& list : {to, from})
      for (const Rank r : list)
        if (r < 0 || r >= size_) throw Error(Errc::invalid_argument, {"neighbour_exchange: neighbour ", r, " is not a rank; ranks are 0 to ", size_ - 1});
    if (std::ranges::count(to, rank_) != std::ranges::count(from, rank_)) throw Error(Errc::invalid_argument, {"neighbour_exchange: rank ", rank_, " sends itself ", std::ranges::count(to, rank_), " blocks but receives ", std::ranges::count(from, rank_)});
    const std::size_t block = !to.empty() ? std::ranges::size(in) / to.size() : !from.empty() ? std::ranges::size(out) / from.size() : 0;
    expect_neighbours("in", std::ranges::size(in), to.size(), block);
    expect_neighbours("out", std::ranges::size(out), from.size(), block);
    return moving<A, Collective::neighbour_exchange, ValueOf<In>>(memory_of("in", in), memory_of("out", out), block, 0, options, way, &extents);
  }

  /// The same call by steps alone.
  Call in_background(Call call) {
    Need need = Need::of(call.need);
    need.steps = true;
    if (call.named && !need.met_by(call.algorithm, call.layout.operation)) refuse_algorithm(call.layout.operation, call.algorithm, need);
    if (!call.named) call.algorithm = asked_for(call.layout.operation, {}, call.size, need);
    call.fingerprint = 0;
    return call;
  }
  /// The same call on other memory, of another size: what a group makes of its parts.
  Call regrouped(Call call, std::size_t count, const std::byte* in, std::byte* out, std::uint16_t parts) {
    call.layout.count = count;
    call.size = count * call.grain;
    call.layout.in_place = in == out;
    call.input = in;
    call.output = out;
    call.input_memory = call.output_memory = nullptr;
    call.parts = parts;
    Need need = Need::of(call.need);
    need.direct = false;  // it lies in many places
    if (!call.named) call.algorithm = asked_for(call.layout.operation, {}, call.size, need);
    call.fingerprint = 0;
    return call;
  }

  template <class Data>
  Message send(Data& data, Rank to, int tag, const CallOptions& options) const {
    const Input memory = memory_of("data", data);
    expect_peer("send: to", to);
    expect_tag("send", tag, 0);
    return {true, to, tag, const_cast<std::byte*>(memory.data), memory.bytes, element_type<ValueOf<Data>>(), sizeof(ValueOf<Data>), timeout_of(options)};
  }
  template <class Data>
  Message receive(Data& data, Rank from, int tag, const CallOptions& options) const {
    const Output memory = memory_of("data", data);
    expect_peer("receive: from", from);
    expect_tag("receive", tag, any_tag);
    return {false, from, tag, memory.data, memory.bytes, element_type<ValueOf<Data>>(), sizeof(ValueOf<Data>), timeout_of(options)};
  }

 private:
  struct Input {
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    const SymmetricMemory* memory = nullptr;
    bool symmetric = false;  // also on ranks that have no such buffer in this call
  };
  struct Output {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    const SymmetricMemory* memory = nullptr;
    bool symmetric = false;
    operator Input() const { return {data, bytes, memory, symmetric}; }
  };
  /// How a call combines, if it does.
  struct Combining {
    Fold fold;
    std::uint16_t code = 0;
    void (*finish)(void*, std::size_t, int) = nullptr;
    ScaleFunction scale = nullptr;
    Folding least = Folding::any;
  };
  template <class R>
  static auto memory_of(const char* name, R& range) {
    using Memory = std::conditional_t<WritableElements<R&>, Output, Input>;
    using Byte = std::remove_pointer_t<decltype(Memory::data)>;
    const std::size_t bytes = std::ranges::size(range) * sizeof(ValueOf<R>);
    auto* data = reinterpret_cast<Byte*>(std::ranges::data(range));
    if (!data && bytes > 0) refuse_null(name, std::ranges::size(range));
    if constexpr (SymmetricElements<R>) return Memory{data, bytes, range.symmetric_memory(), true};
    else return Memory{data, bytes};
  }
  /// The output of a rank that has none: it still says in which memory the others' lies.
  template <class R>
  static Output nowhere(R& range) {
    if constexpr (SymmetricElements<R>) return {nullptr, 0, range.symmetric_memory(), true};
    else return {};
  }

  /// Operations that combine.
  template <class A, Collective O, class T, class Op>
  [[gnu::always_inline]] Call folding(const Input& in, const Output& out, std::size_t count, const Op& op, Rank root, const CallOptions& options, Way way, const Extents* extents = nullptr) {
    void (*finish)(void*, std::size_t, int) = nullptr;
    if constexpr (std::same_as<Op, Mean>) finish = detail::divide<T>;
    constexpr bool commutes = is_commutative<Op>;
    static_assert(!std::same_as<Op, Mean> || (O != Collective::scan && O != Collective::exclusive_scan), "a scan has no mean: each rank folds another number of values");
    if constexpr (!std::same_as<A, Auto>)
      static_assert(commutes || detail::folding_of<A, O>() >= Folding::ordered, "this algorithm does not keep the order of ranks, which this operator needs: it is not marked as commutative");
    const Folding least = options.order.value_or(order_) == Order::fixed ? Folding::fixed : commutes ? Folding::any : Folding::ordered;
    return settle<A, O, T>(in, out, {O, rank_, size_, root, count, false, group(), extents}, {fold_of<T>(detail::lasting(op)), detail::operator_code<Op>(), finish, scale_of<T, Op>(), least}, options, way);
  }
  /// Operations that only move.
  template <class A, Collective O, class T>
  [[gnu::always_inline]] Call moving(const Input& in, const Output& out, std::size_t count, Rank root, const CallOptions& options, Way way, const Extents* extents = nullptr) {
    return settle<A, O, T>(in, out, {O, rank_, size_, root, count, false, group(), extents}, {}, options, way);
  }
  template <class A, Collective O, class T>
  [[gnu::always_inline]] Call settle(const Input& in, const Output& out, Layout layout, const Combining& how, const CallOptions& options, Way way) {
    layout.in_place = in_place(layout, in, out, sizeof(T));
    // A scaled input lies elsewhere, and blocks of shared memory hold but elements of some bytes for each rank.
    const bool moved = how.scale && !(O == Collective::all_reduce && layout.in_place), copied = O == Collective::all_to_all && layout.in_place;
    if (moved) layout.in_place = false;
    const Need need{O != Collective::barrier && reachable(O, moved || copied ? Input{} : in, out), how.least, way == Way::background || sizeof(T) > most_shared};
    if (how.fold.function && sizeof(T) > frame_bytes_) refuse_elements(sizeof(T));
    const std::size_t bytes = layout.items() * sizeof(T);
    const nanoseconds timeout = timeout_of(options);
    // Made in one go and where it stays: what is copied right after it was written in parts costs ten times as much.
    const bool named = !std::same_as<A, Auto> || !options.algorithm.empty();
    const auto made = [&](const AlgorithmRef& algorithm) {
      const detail::Fingerprint fingerprint{O, element_type<T>(), how.code, static_cast<std::uint16_t>(layout.root), algorithm.code, false, detail::Fingerprint::hash_count(layout.extents ? 0 : layout.count)};
      return Call{layout, bytes, fingerprint.pack(), algorithm, in.data, out.data, element_type<T>(), sizeof(T), how.code, named, static_cast<std::uint8_t>(need.index()), 0, how.fold, how.finish, how.scale, timeout, in.memory, out.memory};
    };
    if constexpr (std::same_as<A, Auto>) {
      if (!options.algorithm.empty() || overrides_.of(O)) return made(asked_for(O, options.algorithm, bytes, need));
      return made(chooser_.choose(O, bytes, need));
    } else {
      static_assert(Algorithm<A, O>, "this algorithm does not offer this operation");
      static constexpr AlgorithmRef algorithm = algorithm_ref<A, O>();
      if (!reaches(algorithm, need.direct) || !need.met_by(algorithm, O)) refuse_algorithm(O, algorithm, need);
      return made(algorithm);
    }
  }
  /// The algorithm that the call names, or the environment if it can do this one, or the best.
  [[gnu::noinline]] AlgorithmRef asked_for(Collective operation, std::string_view name, std::size_t bytes, const Need& need) {
    if (name.empty()) {
      const AlgorithmRef& wished = overrides_.of(operation);
      return wished && reaches(wished, need.direct) && need.met_by(wished, operation) ? wished : chooser_.choose(operation, bytes, need);
    }
    const AlgorithmRef algorithm = find_algorithm(operation, name);
    if (!algorithm) refuse_name(operation, name);
    if (!reaches(algorithm, need.direct) || !need.met_by(algorithm, operation)) refuse_algorithm(operation, algorithm, need);
    return algorithm;
  }
  /// Whether all ranks can reach what a share needs of the others' buffers. The same on all ranks.
  bool reachable(Collective operation, const Input& in, const Output& out) const {
    if (one_address_space_) return true;
    const bool reads = operation != Collective::all_gather && operation != Collective::gather && operation != Collective::broadcast;
    const bool writes = operation != Collective::reduce_scatter && operation != Collective::scatter && operation != Collective::all_to_all;
    return (in.symmetric || !reads) && (out.symmetric || !writes);
  }
  /// In place is: the same span, or this rank's block of the larger one. Any other overlap is an error.
  static bool in_place(Layout layout, const Input& in, const Output& out, std::size_t grain) {
    if (in.bytes == 0 || out.bytes == 0) return false;
    const std::less<> before;
    if (!before(in.data, out.data + out.bytes) || !before(out.data, in.data + in.bytes)) return false;
    layout.in_place = true;
    const Placement placement = layout.placement();
    const bool possible = layout.operation != Collective::neighbour_exchange &&
                          (layout.operation != Collective::all_to_all_v || (std::ranges::equal(layout.extents->in_counts, layout.extents->out_counts) && std::ranges::equal(layout.extents->in_firsts, layout.extents->out_firsts)));
    if (possible && in.data + placement.output_first * grain == out.data + placement.input_first * grain) return true;
    refuse_overlap(layout.operation);
  }

  nanoseconds timeout_of(const CallOptions& options) const { return options.timeout ? positive(*options.timeout) : timeout_; }
  static nanoseconds positive(nanoseconds timeout) {
    if (timeout <= nanoseconds{0}) throw Error(Errc::invalid_argument, {"a timeout must be longer than 0, not ", timeout.count(), " ns"});
    return std::min(timeout, longest_timeout);
  }
  std::size_t product(std::size_t count) const {
    std::size_t total = 0;
    if (__builtin_mul_overflow(count, static_cast<std::size_t>(size_), &total)) throw Error(Errc::invalid_argument, {count, " elements times ", size_, " ranks overflow"});
    return total;
  }
  void expect_count(const char* name, std::size_t count, std::size_t expected) const {
    if (count != expected) throw Error(Errc::invalid_argument, {name, " has ", count, " elements, expected ", expected});
  }
  void expect_own(const char* name, std::size_t count, Counts counts) const { expect_count(name, count, counts[static_cast<std::size_t>(rank_)]); }
  void expect_root(const char* operation, Rank root) const {
    if (root < 0 || root >= size_) throw Error(Errc::invalid_argument, {operation, ": root ", root, " is not a rank; ranks are 0 to ", size_ - 1});
  }
  void expect_peer(const char* what, Rank peer) const {
    if (peer < 0 || peer >= size_) throw Error(Errc::invalid_argument, {what, " ", peer, " is not a rank; ranks are 0 to ", size_ - 1});
  }
  static void expect_tag(const char* operation, int tag, int least) {
    if (tag < least) throw Error(Errc::invalid_argument, {operation, ": tag ", tag, " is out of range: tags are 0 to 2147483647", least < 0 ? ", or any_tag" : ""});
  }
  static void expect_neighbours(const char* name, std::size_t elements, std::size_t neighbours, std::size_t block) {
    if (elements != neighbours * block) throw Error(Errc::invalid_argument, {"neighbour_exchange: ", name, " has ", elements, " elements, expected ", neighbours, " blocks of ", block});
  }
  /// Blocks lie within the buffer and, where they are written, apart from each other; without displacements they fill it.
  void expect_blocks(const char* name, Counts counts, Counts firsts, std::size_t size, bool written) const {
    const auto n = static_cast<std::size_t>(size_);
    if (counts.size() != n) throw Error(Errc::invalid_argument, {name, ": there are ", counts.size(), " counts for ", size_, " ranks"});
    if (!firsts.empty() && firsts.size() != n) throw Error(Errc::invalid_argument, {name, ": there are ", firsts.size(), " displacements for ", size_, " ranks"});
    std::size_t end = 0;
    bool ascending = true;
    for (std::size_t r = 0; r < n; ++r) {
      const std::size_t first = firsts.empty() ? end : firsts[r];
      std::size_t last = 0;
      // What was a negative number is a huge one here: print it as what it was.
      if (__builtin_add_overflow(first, counts[r], &last) || last > size)
        throw Error(Errc::invalid_argument, {name, ": the block of rank ", r, ", ", static_cast<std::int64_t>(counts[r]), " elements from ", static_cast<std::int64_t>(first), " on, is not within its ", size, " elements"});
      ascending = ascending && first >= end;
      if (counts[r] > 0) end = last;
    }
    if (firsts.empty() && end != size) throw Error(Errc::invalid_argument, {name, " has ", size, " elements, the counts add up to ", end});
    if (written && !ascending) expect_apart(name, counts, firsts);
  }
  [[gnu::noinline]] static void expect_apart(const char* name, Counts counts, Counts firsts) {
    std::vector<std::size_t> order;
    for (std::size_t r = 0; r < counts.size(); ++r)
      if (counts[r] > 0) order.push_back(r);
    std::ranges::sort(order, {}, [&](std::size_t r) { return firsts[r]; });
    for (std::size_t i = 1; i < order.size(); ++i)
      if (firsts[order[i - 1]] + counts[order[i - 1]] > firsts[order[i]]) throw Error(Errc::invalid_argument, {name, ": the blocks of ranks ", std::min(order[i - 1], order[i]), " and ", std::max(order[i - 1], order[i]), " overlap"});
  }

  // Out of line, so that the checks can be inlined.
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_null(const char* name, std::size_t count) {
    throw Error(Errc::invalid_argument, {name, " is null but has ", count, " elements"});
  }
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_blocks(const char* operation, std::size_t count) const {
    throw Error(Errc::invalid_argument, {operation, ": ", count, " elements cannot be cut into ", size_, " equal blocks"});
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_overlap(Collective operation) {
    throw Error(Errc::invalid_argument, {name_of(operation), ": in and out overlap without being in place"});
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_name(Collective operation, std::string_view name) {
    std::string known;
    for (const std::string_view each : algorithms_for(operation)) known.append(" ").append(each);
    throw Error(Errc::invalid_argument, {"no algorithm '", name, "' offers ", name_of(operation), "; these do:", known});
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_algorithm(Collective operation, const AlgorithmRef& algorithm, const Need& need) {
    if (reduces(operation) && algorithm.folding < need.folding)
      throw Error(Errc::invalid_argument, {algorithm.name, " cannot do this ", name_of(operation), ": ", need.folding == Folding::fixed ? "it does not fold in the one bracketing that Order::fixed asks for" : "it does not keep the order of ranks, which this operator needs: it is not marked as commutative"});
    if (algorithm.share && need.steps) throw Error(Errc::unsupported, {algorithm.name, " moves elements of at most ", most_shared, " bytes, and nothing in the background or in a group: its ranks work in each other's memory"});
    if (!algorithm.is(Reach::direct)) throw Error(Errc::unsupported, {algorithm.name, " needs blocks of shared memory, for which TALLY_SLOT_BUDGET is too small with so many ranks"});
    throw Error(Errc::unsupported, {algorithm.name, " needs memory from allocate(), or ranks that are threads: other ranks cannot reach these buffers", operation == Collective::all_to_all ? " (in place they are copies)" : ""});
  }

  [[noreturn, gnu::cold, gnu::noinline]] void refuse_elements(std::size_t bytes) const {
    throw Error(Errc::unsupported, {"elements of ", bytes, " bytes cannot be combined: a message's part holds ", frame_bytes_, ", see TALLY_SLOT_BYTES"});
  }
  static constexpr std::size_t most_shared = 128;

  Rank rank_;
  int size_;
  nanoseconds timeout_;
  std::size_t frame_bytes_;
  bool one_address_space_, stages_;
  Order order_;
  std::byte token_{};  // of barriers
  Chooser chooser_;
  AlgorithmOverrides overrides_;
};

}  // namespace tally::inline v0
