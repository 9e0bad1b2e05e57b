// SPDX-License-Identifier: Apache-2.0
// Two levels: ranks that are close to each other (Shape::group: they share a cache, or a socket) do among themselves
// what they can, and what has to go far goes once per group. Member c of each group looks after block c of the data, so
// all members use the way between the groups at the same time (Karonis et al., "Exploiting hierarchy in parallel computer
// networks to optimize collective operation performance", 2000). The last group may be short: its members look after several blocks.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "../steps.hpp"
#include "direct.hpp"
#include "recursive.hpp"
#include "tree.hpp"

namespace tally::inline v0 {

struct Hierarchical {
  static constexpr std::string_view name = "hierarchical";
  static constexpr Folding folding = Folding::cyclic;  // from rank 0 or the root's group on; brackets follow the groups

  /// Each group's members fold a block each, all groups' blocks are folded by doubling, members tell each other.
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(n, group);
    const int mine = all.of(me);
    const Chunks folded(Buffer::output, out.count(), all.width);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps summing = fold_group(all, me, in.count(), Buffer::output);
    while (const Step* step = summing.next()) co_yield *step;
    for (int block = me - all.first(mine); block < all.width; block += all.size(mine)) {
      Steps doubling = RecursiveDoubling::all_reduce(across(all, mine, 0, folded[block].count));
      while (const Step* step = doubling.next()) co_yield all.place(*step, block, folded[block]);
    }
    Steps telling = tell_group(all, me, out.count());
    while (const Step* step = telling.next()) co_yield *step;
  }

  /// The same, but blocks are folded in trees towards the root's group, whose members give them to the root.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(n, group);
    const int mine = all.of(me), home = all.of(root);
    const Buffer buffer = me == root ? Buffer::output : Buffer::scratch;
    const Chunks folded(buffer, in.count(), all.width);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps summing = fold_group(all, me, in.count(), buffer);
    while (const Step* step = summing.next()) co_yield *step;
    for (int block = me - all.first(mine); block < all.width; block += all.size(mine)) {
      Steps tree = Tree::reduce(across(all, mine, home, folded[block].count));
      while (const Step* step = tree.next()) co_yield all.place(*step, block, folded[block]);
      if (mine == home && me != root) co_yield send(root, folded[block]);
    }
    for (int block = 0; me == root && block < all.width; ++block)
      if (const Rank from = all.member(home, block); from != root) co_yield receive(from, folded[block]);
  }

  /// Each rank's block goes once to each other group, to the member that has the same number there, and members tell each other.
  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(n, group);
    const int mine = all.of(me), size = all.size(mine), number = me - all.first(mine);
    for (int i = 1; i < all.count(); ++i) co_yield send(all.member(wrap(mine + i, all.count()), number), in.all());
    co_yield copy(in.all(), out[me]);
    for (int block = number; block < all.width; block += size)
      for (int i = 1; i < all.count(); ++i)
        if (const int from = wrap(mine - i, all.count()); block < all.size(from)) co_yield receive(all.first(from) + block, out[all.first(from) + block]);
    const auto told = [&](int by, int i) { return all.first(wrap(mine - i, all.count())) + by; };  // the i-th that is told of a member's own number
    for (int other = 1; other < size; ++other)
      for (int block = number; block < all.width; block += size)
        for (int i = 0; i < all.count(); ++i)
          if (block < all.size(wrap(mine - i, all.count()))) co_yield send(all.first(mine) + wrap(number + other, size), out[told(block, i)]);
    for (int other = 1; other < size; ++other) {
      const int from = wrap(number - other, size);
      for (int block = from; block < all.width; block += size)
        for (int i = 0; i < all.count(); ++i)
          if (block < all.size(wrap(mine - i, all.count()))) co_yield receive(all.first(mine) + from, out[told(block, i)]);
    }
  }

  /// The other way round: members fold what their group has for those of their number in each group, who fold that.
  static Steps reduce_scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(n, group);
    const int mine = all.of(me), size = all.size(mine), number = me - all.first(mine);
    std::size_t widest = 0;
    for (int i = 0; i < n; ++i) widest = in[i].count > widest ? in[i].count : widest;
    // In scratch each fold has its result and its own stack behind it.
    const std::size_t apart = widest * (2 + static_cast<std::size_t>(std::bit_width(static_cast<unsigned>(n))));
    const auto partial = [&, &in = in](int block, int to) { return Range{Buffer::scratch, static_cast<std::size_t>(block / size * all.count() + to) * apart, in[all.first(to) + block].count}; };
    for (int other = 1; other < size; ++other)
      for (int block = wrap(number + other, size); block < all.width; block += size)
        for (int to = 0; to < all.count(); ++to)
          if (block < all.size(to)) co_yield send(all.first(mine) + wrap(number + other, size), in[all.first(to) + block]);
    for (int block = number; block < all.width; block += size)
      for (int to = 0; to < all.count(); ++to) {
        if (block >= all.size(to)) continue;
        const Range folded = partial(block, to);
        Steps fold = detail::fold_all(number, size, in[all.first(to) + block], folded, all.first(mine), folded.first + widest);
        while (const Step* step = fold.next()) co_yield *step;
        if (to != mine) co_yield send(all.first(to) + block, folded);
      }
    const Range own = partial(number, mine);
    Steps fold = detail::fold_all(mine, all.count(), own, out.all(), 0, own.first + widest);
    while (const Step* step = fold.next()) {
      Step placed = *step;
      if (placed.peer >= 0) placed.peer = all.member(placed.peer, number);
      co_yield placed;
    }
  }

  /// The root gives each member of its group a block, these give it to the members of the other groups that look after
  /// it, in trees, and all tell their group.
  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(n, group);
    const int mine = all.of(me), home = all.of(root);
    const Chunks data(Buffer::output, out.count(), all.width);
    for (int block = 0; me == root && block < all.width; ++block)
      if (const Rank to = all.member(home, block); to != root) co_yield send(to, data[block]);
    for (int block = me - all.first(mine); block < all.width; block += all.size(mine)) {
      if (mine == home && me != root) co_yield receive(root, data[block]);
      Steps tree = Tree::broadcast(across(all, mine, home, data[block].count));
      while (const Step* step = tree.next()) co_yield all.place(*step, block, data[block]);
    }
    Steps telling = tell_group(all, me, out.count(), root);
    while (const Step* step = telling.next()) co_yield *step;
  }

 private:
  /// Who is close to whom, and which member of a group looks after which of `width` blocks.
  struct Groups {
    int n, width;
    Groups(int ranks, int group) : n(ranks), width(std::clamp(group, 1, ranks)) {}
    int of(Rank r) const { return r / width; }
    int count() const { return (n + width - 1) / width; }
    Rank first(int group) const { return group * width; }
    int size(int group) const { return std::min(width, n - first(group)); }
    Rank member(int group, int block) const { return first(group) + block % size(group); }

    /// A step between groups, as it is between their members that look after a block, which lies at `where`.
    Step place(Step step, int block, const Range& where) const {
      if (step.peer >= 0) step.peer = member(step.peer, block);
      for (Range* range : {&step.from, &step.to}) *range = {where.buffer, where.first + range->first, range->count};
      return step;
    }
  };
  /// What a group is told of one block: groups are its ranks.
  static Shape across(const Groups& all, int mine, int home, std::size_t count) {
    return {mine, all.count(), home, Chunks(Buffer::output, count, 1), Chunks(Buffer::output, count, 1)};
  }

  /// Block b of `to` becomes the fold of this group's inputs, at the member that looks after it.
  static Steps fold_group(const Groups all, Rank me, std::size_t count, Buffer to) {
    const Chunks in(Buffer::input, count, all.width), folded(to, count, all.width);
    const int group = all.of(me), size = all.size(group), mine = me - all.first(group);
    for (int i = 1; i < size; ++i)
      for (int block = wrap(mine + i, size); block < all.width; block += size) co_yield send(all.member(group, block), in[block]);
    for (int block = mine; block < all.width; block += size) {
      Steps fold = detail::fold_all(mine, size, in[block], folded[block], all.first(group), to == Buffer::scratch ? count : 0);
      while (const Step* step = fold.next()) co_yield *step;
    }
  }

  /// Members give each other the blocks that they look after; `knows` (a broadcast's root) needs none.
  static Steps tell_group(const Groups all, Rank me, std::size_t count, Rank knows = -1) {
    const Chunks data(Buffer::output, count, all.width);
    const int group = all.of(me), size = all.size(group), mine = me - all.first(group);
    for (int i = 1; i < size; ++i)
      for (int block = mine; block < all.width; block += size)
        if (const Rank to = all.first(group) + wrap(mine + i, size); to != knows) co_yield send(to, data[block]);
    for (int i = 1; i < size && me != knows; ++i)
      for (int block = wrap(mine - i, size); block < all.width; block += size) co_yield receive(all.member(group, block), data[block]);
  }
};

}  // namespace tally::inline v0
