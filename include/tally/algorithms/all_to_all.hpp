// SPDX-License-Identifier: Apache-2.0
// Everyone has something else for everyone. Pairwise sends each block to its place: one latency, the least bytes, n-1
// messages. Bruck passes blocks on in log2(n) rounds of half of the data: for small blocks on many ranks.
#pragma once

#include "../steps.hpp"

namespace tally::inline v0 {

struct Pairwise {
  static constexpr std::string_view name = "pairwise";

  /// All sends come first: in place, a block is sent before the one that takes its place is received.
  static Steps all_to_all(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in[me + i]);
    co_yield copy(in[me], out[me]);
    for (int i = 1; i < n; ++i) co_yield receive(wrap(me - i, n), out[me - i]);
  }
  static Steps all_to_all_v(Shape shape) { return all_to_all(shape); }

  /// Blocks go to and come from the ranks of a graph. Where there are several between two ranks, or to oneself, the first meets the first.
  static Steps neighbour_exchange(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 0, mine = 0; i < in.size(); ++i) {
      if (in.peer(i) != me) {
        co_yield send(in.peer(i), in[i]);
        continue;
      }
      while (out.peer(mine) != me) ++mine;
      co_yield copy(in[i], out[mine++]);
    }
    for (int i = 0; i < out.size(); ++i)
      if (out.peer(i) != me) co_yield receive(out.peer(i), out[i]);
  }
};

/// Bruck, Ho, Kipnis, Upfal, Weathersby, "Efficient algorithms for all-to-all communications in multiport message-passing
/// systems", 1997.
struct Bruck {
  static constexpr std::string_view name = "bruck";

  /// Block i of scratch is for rank me + i; a block goes as far as its number says, a power of two at a time.
  static Steps all_to_all(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const std::size_t block = in[0].count;
    const auto scratch = [block](int area, int width, int first, int count) {  // areas of `width` blocks
      return Range{Buffer::scratch, static_cast<std::size_t>(area * width + first) * block, static_cast<std::size_t>(count) * block};
    };
    co_yield copy(in.blocks(me, n), scratch(0, n, 0, n - me));
    co_yield copy(in.blocks(0, me), scratch(0, n, n - me, me));
    for (int bit = 1; bit < n; bit *= 2) {
      int packed = 0;
      for (int first = bit; first < n; first += 2 * bit) {
        const int run = first + bit < n ? bit : n - first;
        co_yield copy(scratch(0, n, first, run), scratch(1, n, packed, run));
        packed += run;
      }
      co_yield send(wrap(me + bit, n), scratch(1, n, 0, packed));
      co_yield receive(wrap(me - bit, n), scratch(2, n, 0, packed));
      packed = 0;
      for (int first = bit; first < n; first += 2 * bit) {
        const int run = first + bit < n ? bit : n - first;
        co_yield copy(scratch(2, n, packed, run), scratch(0, n, first, run));
        packed += run;
      }
    }
    for (int i = 0; i < n; ++i) co_yield copy(scratch(0, n, i, 1), out[me - i]);
  }

  /// Block i of scratch is rank me + i's.
  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Chunks have(Buffer::scratch, out.count(), n);
    co_yield copy(in.all(), have[0]);
    for (int bit = 1; bit < n; bit *= 2) {
      const int count = bit < n - bit ? bit : n - bit;
      co_yield send(wrap(me - bit, n), have.blocks(0, count));
      co_yield receive(wrap(me + bit, n), have.blocks(bit, bit + count));
    }
    co_yield copy(have.blocks(0, n - me), out.blocks(me, n));
    co_yield copy(have.blocks(n - me, n), out.blocks(0, me));
  }
};

}  // namespace tally::inline v0
