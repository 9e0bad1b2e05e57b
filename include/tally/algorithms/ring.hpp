// SPDX-License-Identifier: Apache-2.0
// Ring algorithms: best for large data, because every rank moves the least bytes possible and all links work
// at once. Pipelining is not written here: a step starts on the elements that the step before it is done with.
#pragma once

#include "../steps.hpp"

namespace tally::inline v0 {

struct Ring {
  static constexpr std::string_view name = "ring";
  static constexpr Folding folding = Folding::cyclic;

  /// in[i] and out[i] are block i modulo n; Side::left folds incoming . ours. Nothing copies in to out: the first
  /// fold into a block of out reads that block of in. Each rank moves 2(n-1)/n of the data (Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms", 2009).
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Rank next = wrap(me + 1, n), previous = wrap(me - 1, n);
    if (n == 1) co_yield copy(in.all(), out.all());
    // Reduce-scatter: each chunk travels once around, gaining every rank's contribution on the way.
    for (int s = 0; s < n - 1; ++s) {
      co_yield send(next, s == 0 ? in[me] : out[me - s]);
      co_yield receive_combine(previous, in[me - s - 1], out[me - s - 1], Side::left);
    }
    // All-gather: each finished chunk travels once around.
    for (int s = 0; s < n - 1; ++s) {
      co_yield send(next, out[me + 1 - s]);
      co_yield receive(previous, out[me - s]);
    }
  }

  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Rank next = wrap(me + 1, n), previous = wrap(me - 1, n);
    for (int s = 0; s < n - 1; ++s) {
      co_yield send(next, s == 0 ? in.all() : out[me - s]);
      co_yield receive(previous, out[me - s - 1]);
    }
    co_yield copy(in.all(), out[me]);
  }

  /// Partial sums pass through two scratch blocks, so that one can be sent while the other fills.
  static Steps reduce_scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Rank next = wrap(me + 1, n), previous = wrap(me - 1, n);
    std::size_t widest = 0;
    for (int i = 0; i < n; ++i) widest = in[i].count > widest ? in[i].count : widest;
    const auto partial = [&, me = me, &in = in](int s) { return Range{Buffer::scratch, static_cast<std::size_t>(s & 1) * widest, in[me - s - 2].count}; };
    if (n == 1) co_yield copy(in[0], out.all());
    for (int s = 0; s < n - 1; ++s) {
      co_yield send(next, s == 0 ? in[me - 1] : partial(s - 1));
      co_yield receive_combine(previous, in[me - s - 2], s == n - 2 ? out.all() : partial(s), Side::left);
    }
  }

  // Blocks of any size go the same way.
  static Steps all_gather_v(Shape shape) { return all_gather(shape); }
  static Steps reduce_scatter_v(Shape shape) { return reduce_scatter(shape); }
};

}  // namespace tally::inline v0
