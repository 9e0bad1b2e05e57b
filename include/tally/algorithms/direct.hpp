// SPDX-License-Identifier: Apache-2.0
// Direct algorithms: everyone sends to everyone who needs it, at once. One-shot sends whole buffers: one latency,
// n-1 times the bytes, best for small data. Two-shot sends blocks, and then the finished blocks: two latencies, the
// least bytes. Folding starts at rank 0 on every rank, never at one's own, so all ranks get the same bits.
#pragma once

#include <bit>

#include "../steps.hpp"

namespace tally::inline v0 {

namespace detail {

/// result = x0 . x1 . ... . x(n-1) of n ranks, of which this is number `me`. Bracketed like a binary
/// counter: level k of the stack, which lies in scratch from `stack` on, holds the fold of 2^j consecutive ranks, two of
/// the same size are folded into one as soon as they meet.
inline Steps fold_all(int me, int n, Range mine, Range result, std::size_t stack = 0) {
  const auto level = [&](int k) {
    return k == 0 && me <= 1 ? result : Range{Buffer::scratch, stack + static_cast<std::size_t>(k) * mine.count, mine.count};
  };
  if (n == 1) {
    co_yield copy(mine, result);
    co_return;
  }
  int p = 0;
  if (me <= 1) {  // the first two fold their own value straight into the result
    co_yield receive_combine(1 - me, mine, result, me == 0 ? Side::right : Side::left);
    p = 2;
  }
  for (; p < n; ++p) {
    int depth = std::popcount(static_cast<unsigned>(p));  // values on the stack
    if (p & 1) {
      --depth;
      co_yield p == me ? combine(mine, level(depth)) : receive_combine(p, level(depth));
      for (int size = 2; p & size; size *= 2, --depth) co_yield combine(level(depth), level(depth - 1));
    } else {
      co_yield p == me ? copy(mine, level(depth)) : receive(p, level(depth));
    }
  }
  for (int depth = std::popcount(static_cast<unsigned>(n)) - 1; depth > 0; --depth)
    co_yield combine(level(depth), level(depth - 1));
  if (me > 1) co_yield copy(level(0), result);
}

}  // namespace detail

struct OneShot {
  static constexpr std::string_view name = "one_shot";
  static constexpr Folding folding = Folding::fixed;

  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in.all());
    Steps fold = detail::fold_all(me, n, in.all(), out.all());
    while (const Step* step = fold.next()) co_yield *step;
  }

  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != root) {
      co_yield send(root, in.all());
      co_return;
    }
    Steps fold = detail::fold_all(me, n, in.all(), out.all());
    while (const Step* step = fold.next()) co_yield *step;
  }

  static Steps reduce_scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in[me + i]);
    Steps fold = detail::fold_all(me, n, in[me], out.all());
    while (const Step* step = fold.next()) co_yield *step;
  }

  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in.all());
    co_yield copy(in.all(), out[me]);
    for (int i = 1; i < n; ++i) co_yield receive(wrap(me - i, n), out[me - i]);
  }

  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != root) co_yield receive(root, out.all());
    else
      for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), out.all());
  }

  static Steps gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != root) {
      co_yield send(root, in.all());
      co_return;
    }
    co_yield copy(in.all(), out[me]);
    for (int i = 1; i < n; ++i) co_yield receive(wrap(me + i, n), out[me + i]);
  }

  static Steps scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != root) {
      co_yield receive(root, out.all());
      co_return;
    }
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in[me + i]);
    co_yield copy(in[me], out.all());
  }

  // Blocks of any size go the same way.
  static Steps all_gather_v(Shape shape) { return all_gather(shape); }
  static Steps reduce_scatter_v(Shape shape) { return reduce_scatter(shape); }
  static Steps gather_v(Shape shape) { return gather(shape); }
  static Steps scatter_v(Shape shape) { return scatter(shape); }
};

struct TwoShot {
  static constexpr std::string_view name = "two_shot";
  static constexpr Folding folding = Folding::fixed;

  /// Rank i folds block i of everyone and sends it to everyone.
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in[me + i]);
    Steps fold = detail::fold_all(me, n, in[me], out[me]);
    while (const Step* step = fold.next()) co_yield *step;
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), out[me]);
    for (int i = 1; i < n; ++i) co_yield receive(wrap(me - i, n), out[me - i]);
  }

  /// Rank i folds block i of everyone and sends it to the root.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Range folded = me == root ? out[me] : Range{Buffer::scratch, 0, in[me].count};
    for (int i = 1; i < n; ++i) co_yield send(wrap(me + i, n), in[me + i]);
    Steps fold = detail::fold_all(me, n, in[me], folded);
    while (const Step* step = fold.next()) co_yield *step;
    if (me != root) co_yield send(root, folded);
    else
      for (int i = 1; i < n; ++i) co_yield receive(wrap(me - i, n), out[me - i]);
  }

  /// The root sends each other rank one of n-1 blocks, and these send them to each other (van de Geijn).
  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (n == 1) co_return;
    const Chunks block(Buffer::output, out.count(), n - 1);
    const int mine = wrap(me - root, n) - 1;  // the root's is -1: none
    if (me != root) co_yield receive(root, block[mine]);
    for (int i = 1; i < n; ++i) {
      const Rank to = wrap(me + i, n);
      if (to != root) co_yield send(to, block[me == root ? i - 1 : mine]);
    }
    for (int i = 1; i < n && me != root; ++i) {
      const Rank from = wrap(me - i, n);
      if (from != root) co_yield receive(from, block[wrap(from - root, n) - 1]);
    }
  }
};

}  // namespace tally::inline v0
