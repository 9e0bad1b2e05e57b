// SPDX-License-Identifier: Apache-2.0
// Recursive algorithms: log2(n) exchanges with ranks at distance 1, 2, 4 and so on. After that at distance
// `bit`, an aligned group of 2*bit ranks holds its result: with doubling each of them all of it, with halving each
// a share. Where n is no power of two the last group's upper half is short (`upper` ranks), and each of these
// serves several ranks of the lower half. That keeps rank order and one bracketing for every n, without the usual
// extra rounds.
#pragma once

#include <algorithm>
#include <bit>

#include "../steps.hpp"

namespace tally::inline v0 {

struct RecursiveDoubling {
  static constexpr std::string_view name = "recursive_doubling";
  static constexpr Folding folding = Folding::fixed;

  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
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
    const auto [me, n, root, in, out, group] = shape;
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

  static Steps scan(Shape shape) { return prefix(shape, true); }
  static Steps exclusive_scan(Shape shape) { return prefix(shape, false); }

 private:
  /// Upper halves put the lower half's total before what they have; totals are made for those who will be above.
  static Steps prefix(Shape shape, bool inclusive) {
    const auto [me, n, root, in, out, group] = shape;
    const Range folded{Buffer::scratch, 0, in.count()}, other{Buffer::scratch, in.count(), in.count()};
    Range total = in.all(), have = in.all();
    bool begun = inclusive;  // there is something to put the next total before
    for (int bit = 1; bit < n; bit *= 2) {
      const int low = me & ~(2 * bit - 1), high = low + bit;
      const int upper = std::min(bit, n - high);
      const bool further = low + 2 * bit < n;  // there are ranks above both halves
      if (upper <= 0) continue;
      if (me < high) {
        if (me - low < upper) co_yield send(me + bit, total);
        if (further) co_yield receive_combine(me + bit, total, folded);
      } else if (further) {
        co_yield send(me - bit, total);
        co_yield receive(me - bit, other);
        co_yield copy(total, folded);
        co_yield combine(other, folded, Side::left);
        co_yield copy(begun ? have : other, out.all());
        if (begun) co_yield combine(other, out.all(), Side::left);
      } else {
        co_yield begun ? receive_combine(me - bit, have, out.all(), Side::left) : receive(me - bit, out.all());
      }
      if (further) total = folded;
      if (me >= high) have = out.all(), begun = true;
    }
    if (inclusive && have.buffer == Buffer::input) co_yield copy(in.all(), out.all());
  }
};

/// Half of the bytes go in the first exchange, a quarter in the next and so on; then the finished shares come back
/// by doubling (Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005;
/// there the farthest rank comes first, which is not rank order). A short upper half gives all it has to the lower
/// half, so the first power of two of a group's ranks share its result.
struct RecursiveHalving {
  static constexpr std::string_view name = "recursive_halving";
  static constexpr Folding folding = Folding::fixed;

  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const int holders = power_of_two(n);
    const Chunks folded(Buffer::output, out.count(), holders);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps halving = halve(me, n, holders, Chunks(Buffer::input, in.count(), holders), folded);
    while (const Step* step = halving.next()) co_yield *step;
    // The same exchanges backwards, of finished shares.
    for (int bit = holders; bit >= 1; bit /= 2) {
      const int low = me & ~(2 * bit - 1), high = low + bit;
      const int upper = std::min(bit, n - high);
      if (upper <= 0) continue;
      const int givers = power_of_two(upper);
      if (upper == bit) {
        co_yield send(me ^ bit, share(folded, holders, me, 2 * bit));
        co_yield receive(me ^ bit, share(folded, holders, me ^ bit, 2 * bit));
      } else if (me < high) {
        co_yield send(high + (me & (givers - 1)), share(folded, holders, me, bit));
      } else if (me < high + givers) {
        for (Rank peer = me - bit; peer < high; peer += givers) co_yield receive(peer, share(folded, holders, peer, bit));
      }
    }
  }

  /// Which blocks a rank ends with goes by its bits reversed: they take one hop more to where they belong.
  static Steps reduce_scatter(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Chunks folded(Buffer::scratch, in.count(), n);
    if (n == 1) co_yield copy(in.all(), out.all());
    Steps halving = halve(me, n, n, in, folded);
    while (const Step* step = halving.next()) co_yield *step;
    for (Rank to = 0; to < n; ++to)
      if (to != me && holder(to, n) == me) co_yield send(to, folded[to]);
    if (const Rank from = holder(me, n); from != me) co_yield receive(from, out.all());
    else if (n > 1) co_yield copy(folded[me], out.all());
  }

 private:
  static int power_of_two(int n) { return static_cast<int>(std::bit_floor(static_cast<unsigned>(n))); }

  /// Each of the first power_of_two(n) ranks ends with its share of the sum.
  static Steps halve(Rank me, int n, int blocks, Chunks have, Chunks folded) {
    for (int bit = 1; bit < n; bit *= 2) {
      const int low = me & ~(2 * bit - 1), high = low + bit;
      const int upper = std::min(bit, n - high);
      if (upper <= 0) continue;
      const int givers = power_of_two(upper);
      if (upper == bit) {
        co_yield send(me ^ bit, share(have, blocks, me ^ bit, 2 * bit));
        co_yield receive_combine(me ^ bit, share(have, blocks, me, 2 * bit), share(folded, blocks, me, 2 * bit), me < high ? Side::right : Side::left);
      } else if (me < high) {
        co_yield receive_combine(high + (me & (givers - 1)), share(have, blocks, me, bit), share(folded, blocks, me, bit));
      } else if (me < high + givers) {
        for (Rank peer = me - bit; peer < high; peer += givers) co_yield send(peer, share(have, blocks, peer, bit));
      }
      have = folded;
    }
  }

  /// What a rank holds where `ranks`, a power of two, share all blocks: its bit 0 says which half, bit 1 which half
  /// of that and so on. So it is one range, and within that of any rank of fewer with the same low bits.
  static Range share(const Chunks& chunks, int blocks, Rank rank, int ranks) {
    int first = 0, last = blocks;
    for (int bit = 1; bit < ranks; bit *= 2) (rank & bit ? first : last) = (first + last) / 2;
    return chunks.blocks(first, last);
  }
  /// Whose share block `block` of n is, after halving.
  static Rank holder(int block, int n) {
    int first = 0, last = n;
    Rank rank = 0;
    for (int bit = 1; bit < power_of_two(n); bit *= 2) {
      const int middle = (first + last) / 2;
      (block < middle ? last : first) = middle;
      if (block >= middle) rank += bit;
    }
    return rank;
  }
};

}  // namespace tally::inline v0
