// SPDX-License-Identifier: Apache-2.0
// Two binary trees, each for one half of the data; a rank with children in one is a leaf in the other, so that
// every rank sends and receives with its whole bandwidth, after log2(n) hops (Sanders, Speck, Traeff, "Two-tree
// algorithms for full bandwidth broadcast, reduction and scan", 2009). Both are in-order trees: a subtree is a run
// of consecutive ranks, left child . own . right child, so both fold in the same order of ranks.
#pragma once

#include <bit>

#include "../steps.hpp"

namespace tally::inline v0 {

struct DoubleTree {
  static constexpr std::string_view name = "double_tree";
  static constexpr Folding folding = Folding::cyclic;  // from rank 0 or the root on

  /// Up to rank 0 and down again. Both trees go up before either goes down: two ranks may be parent and child in
  /// one tree and child and parent in the other, and have to agree which message comes first.
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps rising = up(me, n, 0, in.count(), Buffer::output), falling = down(me, n, 0, out.count());
    while (const Step* step = rising.next()) co_yield *step;
    while (const Step* step = falling.next()) co_yield *step;
  }

  /// Interior ranks accumulate in scratch: their input is the caller's, and they have no output.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps rising = up(me, n, root, in.count(), me == root ? Buffer::output : Buffer::scratch);
    while (const Step* step = rising.next()) co_yield *step;
  }

  static Steps broadcast(Shape shape) { return down(shape.me, shape.n, shape.root, shape.out.count()); }

 private:
  struct Node {
    Rank parent = -1, left = -1, right = -1;  // -1: none
  };

  static Steps up(Rank me, int n, Rank root, std::size_t count, Buffer to) {
    const Chunks in(Buffer::input, count, 2), folded(to, count, 2);
    for (int tree = 0; tree < 2; ++tree) {
      const Node node = place(tree, me, n, root);
      if (node.left >= 0) co_yield receive_combine(node.left, in[tree], folded[tree], Side::left);
      if (node.right >= 0) co_yield receive_combine(node.right, node.left >= 0 ? folded[tree] : in[tree], folded[tree]);
      if (node.parent >= 0) co_yield send(node.parent, node.left >= 0 || node.right >= 0 ? folded[tree] : in[tree]);
    }
  }

  static Steps down(Rank me, int n, Rank root, std::size_t count) {
    const Chunks out(Buffer::output, count, 2);
    for (int tree = 0; tree < 2; ++tree) {
      const Node node = place(tree, me, n, root);
      if (node.parent >= 0) co_yield receive(node.parent, out[tree]);
      if (node.left >= 0) co_yield send(node.left, out[tree]);
      if (node.right >= 0) co_yield send(node.right, out[tree]);
    }
  }

  /// Ranks are numbered from the root on: v = 0, 1, .... Tree 0 has v = 0 on top of an in-order tree of all others.
  /// Tree 1 has v = 0 on top of v = 1, and that on top of an in-order tree of all others. In such a tree of
  /// q = 1..size the odd q are the leaves, and q = v - 1 in the one is q = v - 2 in the other.
  static Node place(int tree, Rank me, int n, Rank root) {
    const int v = wrap(me - root, n), size = n - 1 - tree, q = v - tree;
    const int top = size > 0 ? static_cast<int>(std::bit_floor(static_cast<unsigned>(size))) : 0;
    const auto rank = [&](int number) { return wrap(root + number, n); };
    Node node;
    if (v > 0) node.parent = rank(q <= 0 ? v - 1 : tree + above(q, size, top));
    if (q < 0) {
      if (n > 1) node.right = rank(v + 1);
      return node;
    }
    if (q == 0) {
      if (size > 0) node.right = rank(tree + top);
      return node;
    }
    // Children are at half of q's lowest bit to both sides. Where the right one is beyond the end, the first of its
    // left descendants that is not takes its place.
    int half = (q & -q) / 2;
    if (half > 0) node.left = rank(tree + q - half);
    while (half > 0 && q + half > size) half /= 2;
    if (half > 0) node.right = rank(tree + q + half);
    return node;
  }
  /// The parent of q, which is 0 for the topmost: skips those beyond the end.
  static int above(int q, int size, int top) {
    if (q == top) return 0;
    do {
      const int low = q & -q;
      q = (q ^ low) | 2 * low;
    } while (q > size);
    return q;
  }
};

}  // namespace tally::inline v0
