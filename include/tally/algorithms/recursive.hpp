// SPDX-License-Identifier: Apache-2.0
// Recursive doubling: log2(n) exchanges with ranks at distance 1, 2, 4, ... After the exchange at distance
// `bit`, every rank of an aligned block of 2*bit ranks holds the block's result. Where n is no power of two the
// last block's upper half is short (`upper` ranks), and each of these serves several ranks of the lower half.
// That keeps rank order and one bracketing for every n, without the usual extra rounds.
#pragma once

#include <algorithm>

#include "../steps.hpp"

namespace tally::inline v0 {

struct RecursiveDoubling {
  static constexpr std::string_view name = "recursive_doubling";
  static constexpr Folding folding = Folding::fixed;

  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out] = shape;
    Range have = in.all();
    if (n == 1) co_yield copy(in.all(), out.all());
    for (int bit = 1; bit < n; bit *= 2) {
      const int low = me & ~(2 * bit - 1), high = low + bit;
      const int upper = std::min(bit, n - high);
      if (upper <= 0) continue;
      if (me < high) {
        if (me - low < upper) co_yield send(me + bit, have);
        co_yield receive_combine(high + (me - low) % upper, have, out.all());
      } else {
        for (int peer = me - bit; peer < high; peer += upper) co_yield send(peer, have);
        co_yield receive_combine(me - bit, have, out.all(), Side::left);
      }
      have = out.all();
    }
  }

  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out] = shape;
    co_yield copy(in.all(), out[me]);
    for (int bit = 1; bit < n; bit *= 2) {
      const int low = me & ~(2 * bit - 1), high = low + bit;
      const int upper = std::min(bit, n - high);
      if (upper <= 0) continue;
      const Range lower_half = out.blocks(low, high), upper_half = out.blocks(high, high + upper);
      if (me < high) {
        if (me - low < upper) co_yield send(me + bit, lower_half);
        co_yield receive(high + (me - low) % upper, upper_half);
      } else {
        for (int peer = me - bit; peer < high; peer += upper) co_yield send(peer, upper_half);
        co_yield receive(me - bit, lower_half);
      }
    }
  }
};

}  // namespace tally::inline v0
