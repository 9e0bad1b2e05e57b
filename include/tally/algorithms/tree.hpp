// SPDX-License-Identifier: Apache-2.0
// Binomial trees: log2(n) rounds. In the tree of rank order (root 0) a rank's parent has its lowest set bit
// cleared; for another root all ranks are renumbered from it on.
#pragma once

#include <algorithm>
#include <bit>

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
    const Range folded = v == 0 ? out.all() : Range{Buffer::scratch, 0, in.count()};
    Range have = in.all();
    if (n == 1) co_yield copy(in.all(), out.all());
    for (int bit = 1; bit < n; bit *= 2) {
      if (v & bit) {
        co_yield send(wrap(me - bit, n), have);
        co_return;
      }
      if (v + bit >= n) continue;
      co_yield receive_combine(wrap(me + bit, n), have, folded);
      have = folded;
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

  /// A rank collects the blocks of its subtree, which are those of the ranks from itself on, and sends them in one message;
  /// in two to the root where their places are at both ends of its buffer.
  static Steps gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const int v = wrap(me - root, n), below = subtree(v, n), end = n - root;  // rank 0 is number `end`
    const Chunks have(Buffer::scratch, static_cast<std::size_t>(below) * in.count(), below);
    if (v == 0) co_yield copy(in.all(), out[me]);
    else if (below > 1) co_yield copy(in.all(), have[0]);
    for (int child = 1; child < below; child *= 2) {
      const int last = std::min(2 * child, below), middle = std::clamp(end, child, last);
      const Rank from = wrap(me + child, n);
      if (v != 0) co_yield receive(from, have.blocks(child, last));
      if (v == 0 && child < middle) co_yield receive(from, out.blocks(root + child, root + middle));
      if (v == 0 && middle < last) co_yield receive(from, out.blocks(root + middle - n, root + last - n));
    }
    if (v == 0) co_return;
    const Rank parent = wrap(me - (v & -v), n);
    const int middle = parent == root ? std::clamp(end - v, 0, below) : 0;
    if (below == 1) co_yield send(parent, in.all());
    else if (middle > 0 && middle < below) {
      co_yield send(parent, have.blocks(0, middle));
      co_yield send(parent, have.blocks(middle, below));
    } else co_yield send(parent, have.all());
  }

  /// The same backwards: the farthest first.
  static Steps scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const int v = wrap(me - root, n), below = subtree(v, n), end = n - root;
    const Chunks have(Buffer::scratch, static_cast<std::size_t>(below) * out.count(), below);
    if (v != 0) {
      const Rank parent = wrap(me - (v & -v), n);
      const int middle = parent == root ? std::clamp(end - v, 0, below) : 0;
      if (below == 1) co_yield receive(parent, out.all());
      else if (middle > 0 && middle < below) {
        co_yield receive(parent, have.blocks(0, middle));
        co_yield receive(parent, have.blocks(middle, below));
      } else co_yield receive(parent, have.all());
    }
    for (int child = static_cast<int>(std::bit_ceil(static_cast<unsigned>(below))) / 2; child >= 1; child /= 2) {
      const int last = std::min(2 * child, below), middle = std::clamp(end, child, last);
      const Rank to = wrap(me + child, n);
      if (v != 0) co_yield send(to, have.blocks(child, last));
      if (v == 0 && child < middle) co_yield send(to, in.blocks(root + child, root + middle));
      if (v == 0 && middle < last) co_yield send(to, in.blocks(root + middle - n, root + last - n));
    }
    if (v == 0) co_yield copy(in[me], out.all());
    else if (below > 1) co_yield copy(have[0], out.all());
  }

 private:
  /// How many ranks there are at and below number v, which are v and those that follow it.
  static int subtree(int v, int n) { return v == 0 ? n : std::min(v & -v, n - v); }
};

}  // namespace tally::inline v0
