// SPDX-License-Identifier: Apache-2.0
// Binomial trees: log2(n) rounds. In the tree of rank order (root 0) a rank's parent has its lowest set bit
// cleared; for another root all ranks are renumbered from it on.
#pragma once

#include "../steps.hpp"

namespace tally::inline v0 {

struct Tree {
  static constexpr std::string_view name = "tree";
  static constexpr Folding folding = Folding::fixed;         // all_reduce
  static constexpr Folding reduce_folding = Folding::cyclic;  // from the root on; fixed for root 0

  /// Up to rank 0 and down again.
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    Range have = in.all();
    int bit = 1;
    for (; bit < n && !(me & bit); bit *= 2) {
      if (me + bit >= n) continue;
      co_yield receive_combine(me + bit, have, out.all());
      have = out.all();
    }
    if (n == 1) co_yield copy(in.all(), out.all());
    if (me != 0) {
      co_yield send(me - bit, have);
      co_yield receive(me - bit, out.all());
    }
    for (int child = bit / 2; child >= 1; child /= 2)
      if (me + child < n) co_yield send(me + child, out.all());
  }

  /// Interior ranks accumulate in scratch: their input is the caller's, and they have no output.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const int v = wrap(me - root, n);
    const Range sum = v == 0 ? out.all() : Range{Buffer::scratch, 0, in.count()};
    Range have = in.all();
    if (n == 1) co_yield copy(in.all(), out.all());
    for (int bit = 1; bit < n; bit *= 2) {
      if (v & bit) {
        co_yield send(wrap(me - bit, n), have);
        co_return;
      }
      if (v + bit >= n) continue;
      co_yield receive_combine(wrap(me + bit, n), have, sum);
      have = sum;
    }
  }

  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const int v = wrap(me - root, n);
    int bit = 1;
    while (bit < n && !(v & bit)) bit *= 2;
    if (v != 0) co_yield receive(wrap(me - bit, n), out.all());
    for (int child = bit / 2; child >= 1; child /= 2)
      if (v + child < n) co_yield send(wrap(me + child, n), out.all());
  }
};

}  // namespace tally::inline v0
