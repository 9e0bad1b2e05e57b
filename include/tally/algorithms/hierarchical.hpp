// SPDX-License-Identifier: Apache-2.0
// Two levels: ranks that are close to each other (Shape::group: they share a host, a socket or a cache) do among themselves
// what they can, and what has to go far goes once per group. The largest group's member c looks after block c of the data, and
// its like in each other group, so all members use the way between the groups at the same time (Karonis et al., "Exploiting
// hierarchy in parallel computer networks to optimize collective operation performance", 2000). In smaller groups members
// look after several blocks.
#pragma once

#include <bit>
#include <cstddef>

#include "../grouping.hpp"
#include "../steps.hpp"
#include "direct.hpp"
#include "recursive.hpp"
#include "tree.hpp"

namespace tally::inline v0 {

struct Hierarchical {
  static constexpr std::string_view name = "hierarchical";
  static constexpr Folding folding = Folding::any;  // brackets follow the groups

  /// Each group's members fold a block each, all groups' blocks are folded by doubling, members tell each other.
  static Steps all_reduce(Shape shape) { return all_reduce_by(shape, RecursiveDoubling::all_reduce); }

  /// The same, but blocks are folded in trees towards the root's group, whose members give them to the root.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(group, n, me);
    const int home = group.of(root);
    const Buffer buffer = me == root ? Buffer::output : Buffer::scratch;
    const Chunks folded(buffer, in.count(), all.blocks);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps summing = fold_group(all, in.count(), buffer);
    while (const Step* step = summing.next()) co_yield *step;
    for (int block = all.number; block < all.blocks; block += all.size) {
      Steps tree = Tree::reduce(all.across(home, folded[block].count));
      while (const Step* step = tree.next()) co_yield all.place(*step, block, folded[block]);
      if (all.mine == home && me != root) co_yield send(root, folded[block]);
    }
    for (int block = 0; me == root && block < all.blocks; ++block)
      if (const Rank from = all.keeper(home, block); from != root) co_yield receive(from, folded[block]);
  }

  /// Each rank's block goes once to each other group, to the member that has the same number there, and members tell each other.
  static Steps all_gather(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(group, n, me);
    for (int i = 1; i < all.count; ++i) co_yield send(all.keeper(wrap(all.mine + i, all.count), all.number), in.all());
    co_yield copy(in.all(), out[me]);
    for (int block = all.number; block < all.blocks; block += all.size)
      for (int i = 1; i < all.count; ++i)
        if (const Rank from = all.nth(wrap(all.mine - i, all.count), block); from >= 0) co_yield receive(from, out[from]);
    for (int i = 1; i < all.size; ++i)
      for (int block = all.number; block < all.blocks; block += all.size)
        for (int of = 0; of < all.count; ++of)
          if (const Rank from = all.nth(wrap(all.mine - of, all.count), block); from >= 0) co_yield send(all.beside(i), out[from]);
    for (int i = 1; i < all.size; ++i)
      for (int block = wrap(all.number - i, all.size); block < all.blocks; block += all.size)
        for (int of = 0; of < all.count; ++of)
          if (const Rank from = all.nth(wrap(all.mine - of, all.count), block); from >= 0) co_yield receive(all.beside(-i), out[from]);
  }

  /// The other way round: members fold what their group has for those of their number in each group, who fold that.
  static Steps reduce_scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(group, n, me);
    std::size_t widest = 0;
    for (int i = 0; i < n; ++i) widest = in[i].count > widest ? in[i].count : widest;
    // In scratch each fold has its result and its own stack behind it.
    const std::size_t apart = widest * (2 + static_cast<std::size_t>(std::bit_width(static_cast<unsigned>(n))));
    const auto partial = [&](int block, int to, std::size_t count) { return Range{Buffer::scratch, static_cast<std::size_t>(block / all.size * all.count + to) * apart, count}; };
    for (int i = 1; i < all.size; ++i)
      for (int block = wrap(all.number + i, all.size); block < all.blocks; block += all.size)
        for (int g = 0; g < all.count; ++g)
          if (const Rank to = all.nth(g, block); to >= 0) co_yield send(all.beside(i), in[to]);
    for (int block = all.number; block < all.blocks; block += all.size)
      for (int g = 0; g < all.count; ++g) {
        const Rank to = all.nth(g, block);
        if (to < 0) continue;
        const Range folded = partial(block, g, in[to].count);
        Steps fold = detail::fold_all(all.number, all.size, in[to], folded, folded.first + widest);
        while (const Step* step = fold.next()) co_yield all.inside(*step);
        if (g != all.mine) co_yield send(to, folded);
      }
    const Range own = partial(all.number, all.mine, in[me].count);
    Steps fold = detail::fold_all(all.mine, all.count, own, out.all(), own.first + widest);
    while (const Step* step = fold.next()) co_yield all.between(*step, all.number);
  }

  /// The root gives each member of its group a block, these give it to the members of the other groups that look after
  /// it, in trees, and all tell their group.
  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(group, n, me);
    const int home = group.of(root);
    const Chunks data(Buffer::output, out.count(), all.blocks);
    for (int block = 0; me == root && block < all.blocks; ++block)
      if (const Rank to = all.keeper(home, block); to != root) co_yield send(to, data[block]);
    for (int block = all.number; block < all.blocks; block += all.size) {
      if (all.mine == home && me != root) co_yield receive(root, data[block]);
      Steps tree = Tree::broadcast(all.across(home, data[block].count));
      while (const Step* step = tree.next()) co_yield all.place(*step, block, data[block]);
    }
    Steps telling = tell_group(all, out.count(), root);
    while (const Step* step = telling.next()) co_yield *step;
  }

 private:
  /// This rank's group among all, and which member of a group looks after which block.
  struct Groups {
    Grouping group;
    int n, count, blocks, mine, size, number;  // groups, blocks; this rank's group, that one's members, its number among them
    Groups(const Grouping& grouping, int ranks, Rank me)
        : group(grouping), n(ranks), count(group.count(n)), blocks(group.largest(n)), mine(group.of(me)), size(group.size(mine, n)), number(group.number(me)) {}

    Rank keeper(int g, int block) const { return group.member(g, block % group.size(g, n)); }
    /// The member of that number; -1: there are fewer.
    Rank nth(int g, int number_there) const { return number_there < group.size(g, n) ? group.member(g, number_there) : -1; }
    /// The i-th member of this rank's group after it, or before it.
    Rank beside(int i) const { return group.member(mine, wrap(number + i, size)); }

    /// A step of this group's members, by their numbers.
    Step inside(Step step) const {
      if (step.peer >= 0) step.peer = group.member(mine, step.peer);
      return step;
    }
    /// A step between groups, as it is between their members that look after a block,
    Step between(Step step, int block) const {
      if (step.peer >= 0) step.peer = keeper(step.peer, block);
      return step;
    }
    /// which lies at `where`.
    Step place(Step step, int block, const Range& where) const {
      for (Range* range : {&step.from, &step.to}) *range = {where.buffer, where.first + range->first, range->count};
      return between(step, block);
    }
    /// What a group is told of one block: groups are its ranks.
    Shape across(int home, std::size_t elements) const { return {mine, count, home, Chunks(Buffer::output, elements, 1), Chunks(Buffer::output, elements, 1)}; }
  };

  static Steps all_reduce_by(Shape shape, Steps (*between_groups)(Shape)) {
    const auto [me, n, root, in, out, group] = shape;
    const Groups all(group, n, me);
    const Chunks folded(Buffer::output, out.count(), all.blocks);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps summing = fold_group(all, in.count(), Buffer::output);
    while (const Step* step = summing.next()) co_yield *step;
    for (int block = all.number; block < all.blocks; block += all.size) {
      Steps folding_on = between_groups(all.across(0, folded[block].count));
      while (const Step* step = folding_on.next()) co_yield all.place(*step, block, folded[block]);
    }
    Steps telling = tell_group(all, out.count());
    while (const Step* step = telling.next()) co_yield *step;
  }

  /// Block b of `to` becomes the fold of this group's inputs, at the member that looks after it.
  static Steps fold_group(const Groups all, std::size_t count, Buffer to) {
    const Chunks in(Buffer::input, count, all.blocks), folded(to, count, all.blocks);
    for (int i = 1; i < all.size; ++i)
      for (int block = wrap(all.number + i, all.size); block < all.blocks; block += all.size) co_yield send(all.beside(i), in[block]);
    for (int block = all.number; block < all.blocks; block += all.size) {
      Steps fold = detail::fold_all(all.number, all.size, in[block], folded[block], to == Buffer::scratch ? count : 0);
      while (const Step* step = fold.next()) co_yield all.inside(*step);
    }
  }

  /// Members give each other the blocks that they look after; `knows` (a broadcast's root) needs none.
  static Steps tell_group(const Groups all, std::size_t count, Rank knows = -1) {
    const Chunks data(Buffer::output, count, all.blocks);
    for (int i = 1; i < all.size; ++i)
      for (int block = all.number; block < all.blocks; block += all.size)
        if (const Rank to = all.beside(i); to != knows) co_yield send(to, data[block]);
    for (int i = 1; i < all.size && all.beside(0) != knows; ++i)
      for (int block = wrap(all.number - i, all.size); block < all.blocks; block += all.size) co_yield receive(all.beside(-i), data[block]);
  }

  friend struct HierarchicalHalving;
};

/// The same for long messages between many groups: the blocks are folded by halving, which moves less than twice a block's bytes
/// where doubling moves log2(groups) times as many.
struct HierarchicalHalving {
  static constexpr std::string_view name = "hierarchical_halving";
  static constexpr Folding folding = Folding::any;
  static Steps all_reduce(Shape shape) { return Hierarchical::all_reduce_by(shape, RecursiveHalving::all_reduce); }
};

}  // namespace tally::inline v0
