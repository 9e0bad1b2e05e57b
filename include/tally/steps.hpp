// SPDX-License-Identifier: Apache-2.0
// The language that algorithms are written in: a coroutine that yields steps over element ranges. It knows no
// element type, operator, transport or clock. Per rank, every element ends as if the steps had run one after
// another in the text's order; the plan (plan.hpp) finds out which of them may overlap.
#pragma once

#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <string_view>
#include <utility>

#include "grouping.hpp"

namespace tally::inline v0 {

using Rank = int;

/// `value` modulo n, also for negative values.
constexpr int wrap(int value, int n) { return ((value % n) + n) % n; }

enum class Buffer : std::uint8_t { input, output, scratch };

/// `count` elements of a buffer, from element `first` on.
struct Range {
  Buffer buffer = Buffer::output;
  std::size_t first = 0, count = 0;
};

enum class Verb : std::uint8_t { send, receive, receive_combine, copy, combine };
/// On which side of the accumulator the other value stands: right is acc . x, left is x . acc.
enum class Side : std::uint8_t { right, left };

struct Step {
  Verb verb;
  Side side;
  Rank peer;         // -1 for local steps
  Range from, to;    // receive_combine: `from` is the accumulator
  constexpr std::size_t count() const { return verb == Verb::receive ? to.count : from.count; }
};

inline Step send(Rank to, Range what) { return {Verb::send, {}, to, what, {}}; }
inline Step receive(Rank from, Range where) { return {Verb::receive, {}, from, {}, where}; }
/// to = acc . incoming, so that an interior rank need not copy its input first.
inline Step receive_combine(Rank from, Range acc, Range to, Side side = Side::right) {
  return {Verb::receive_combine, side, from, acc, to};
}
/// acc = acc . incoming
inline Step receive_combine(Rank from, Range acc, Side side = Side::right) {
  return receive_combine(from, acc, acc, side);
}
inline Step copy(Range from, Range to) { return {Verb::copy, {}, -1, from, to}; }
/// to = to . from
inline Step combine(Range from, Range to, Side side = Side::right) { return {Verb::combine, side, -1, from, to}; }

/// The generator. `while (const Step* step = steps.next())` reads it once.
class Steps {
 public:
  struct promise_type {
    Step now{};
    Steps get_return_object() { return Steps{std::coroutine_handle<promise_type>::from_promise(*this)}; }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    std::suspend_always yield_value(const Step& step) noexcept {
      now = step;
      return {};
    }
    void return_void() noexcept {}
    void unhandled_exception() { throw; }
  };

  explicit Steps(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  Steps(Steps&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Steps& operator=(Steps&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Steps() {
    if (handle_) handle_.destroy();
  }
  /// The next step, or null at the end. The pointer is good until the next call.
  const Step* next() {
    handle_.resume();
    return handle_.done() ? nullptr : &handle_.promise().now;
  }

 private:
  std::coroutine_handle<promise_type> handle_;
};

/// A buffer cut into n blocks: of sizes that differ by one at most, the larger ones first, or of given sizes at given
/// places. Indices wrap modulo n.
class Chunks {
 public:
  Chunks(Buffer buffer, std::size_t count, int n)
      : buffer_(buffer), n_(n), small_(n > 0 ? count / static_cast<std::size_t>(n) : 0), large_(n > 0 ? count % static_cast<std::size_t>(n) : 0) {}
  /// Without `firsts` one after another. Both are the caller's and must outlive this.
  Chunks(Buffer buffer, std::span<const std::size_t> counts, std::span<const std::size_t> firsts)
      : buffer_(buffer), n_(static_cast<int>(counts.size())), counts_(counts.data()), firsts_(firsts.empty() ? nullptr : firsts.data()) {}

  Range operator[](int i) const {
    const auto block = static_cast<std::size_t>(wrap(i, n_));
    return {buffer_, begin(block), counts_ ? counts_[block] : begin(block + 1) - begin(block)};
  }
  /// Blocks first..last-1; no wrapping, and not for blocks at given places.
  Range blocks(int first, int last) const {
    const auto lo = begin(static_cast<std::size_t>(first)), hi = begin(static_cast<std::size_t>(last));
    return {buffer_, lo, hi - lo};
  }
  Range all() const { return {buffer_, 0, count()}; }
  /// Up to the end of the last block.
  std::size_t count() const {
    std::size_t end = 0;
    if (!counts_) return begin(static_cast<std::size_t>(n_));
    for (std::size_t i = 0; i < static_cast<std::size_t>(n_); ++i) {
      const std::size_t last = firsts_ ? firsts_[i] + counts_[i] : end + counts_[i];
      end = end < last ? last : end;
    }
    return end;
  }
  int size() const { return n_; }
  /// Blocks of one size, for neighbours: block i goes to, or comes from, rank peer(i). Likewise.
  Chunks(Buffer buffer, std::size_t block, std::span<const Rank> peers)
      : buffer_(buffer), n_(static_cast<int>(peers.size())), small_(block), peers_(peers.data()) {}
  Rank peer(int i) const { return peers_[i]; }

 private:
  std::size_t begin(std::size_t block) const {
    if (firsts_) return firsts_[block];
    if (!counts_) return block * small_ + (block < large_ ? block : large_);
    std::size_t sum = 0;
    for (std::size_t i = 0; i < block; ++i) sum += counts_[i];
    return sum;
  }

  Buffer buffer_;
  int n_;
  std::size_t small_ = 0, large_ = 0;
  const std::size_t *counts_ = nullptr, *firsts_ = nullptr;
  const Rank* peers_ = nullptr;
};

/// The order in which an algorithm folds the ranks' values; the checker proves it.
enum class Folding : std::uint8_t {
  any,      // each rank's value once: needs a commutative operator, as the next does
  cyclic,   // consecutive ranks, wrapping around, from any rank on
  ordered,  // rank order from rank 0 on, with brackets of its own
  fixed,    // rank order, one bracketing for all algorithms that declare it:
            // fold(lo, hi) = fold(lo, mid) . fold(mid, hi), mid = lo + the largest power of two below hi - lo
};

/// What an algorithm is told. `in` and `out` are cut into n blocks; where both are the same memory the engine
/// resolves that, the text is the same.
struct Shape {
  Rank me;
  int n;
  Rank root;
  Chunks in, out;
  Grouping group = {};
};

/// What one rank does in an algorithm over memory that every rank can load and store. Once all ranks have said that
/// their input is there, it folds `from` of all sources in rank order (the fixed bracketing) and writes the result
/// to `to` of all targets; when all have said that they are done, so is the operation. -1 stands for all ranks.
struct Share {
  enum class Way : std::uint8_t {
    fold,
    exchange,        // nothing is folded: what comes from rank r goes to the r-th block of the target, the first of which is `to`
    scan,            // target r gets the fold of the sources up to r
    exclusive_scan,  // or of those before it
  };
  Range from, to;  // of the same count
  Rank source = -1, target = -1;
  Way way = Way::fold;
  constexpr bool reads(Rank r, int n) const { return (source < 0 || source == r) && (way != Way::exclusive_scan || r < n - 1); }
  /// Where the data comes from, and would go where it came from, nothing is written: a broadcast's root.
  constexpr bool writes(Rank r) const { return (target < 0 || target == r) && !(source == r && from.buffer == to.buffer && from.first == to.first) && (way != Way::exclusive_scan || r > 0); }
  constexpr bool scans() const { return way == Way::scan || way == Way::exclusive_scan; }
  /// Where what comes from rank r goes.
  constexpr Range to_of(Rank r) const { return way == Way::exchange ? Range{to.buffer, to.first + static_cast<std::size_t>(r) * to.count, to.count} : to; }
};

/// How a share gets at other ranks' memory.
enum class Reach : std::uint8_t {
  direct,  // loads and stores: it is within everyone's reach
  staged,  // through blocks of shared memory
  kernel,  // the kernel copies from process to process
};
/// Specialised by the library's own algorithms alone.
template <class Algorithm>
inline constexpr Reach reach_of = Reach::direct;

}  // namespace tally::inline v0
