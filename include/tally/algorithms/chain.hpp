// SPDX-License-Identifier: Apache-2.0
// Chains: every rank talks to its two neighbours only, and the data streams through all of them, once each way.
// Few bytes in few messages, after n-1 hops of latency: for large data on few ranks. There are no segments in the
// text: a rank passes on an element as soon as it has it.
#pragma once

#include "../steps.hpp"

namespace tally::inline v0 {

struct Chain {
  static constexpr std::string_view name = "chain";
  static constexpr Folding folding = Folding::cyclic;  // from rank 0 or the root on, bracketed from the far end

  /// Down the chain to rank 0 and back up; the way up follows a few elements behind the way down.
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const bool last = me == n - 1;
    if (n == 1) co_yield copy(in.all(), out.all());
    if (!last) co_yield receive_combine(me + 1, in.all(), out.all());
    if (me > 0) {
      co_yield send(me - 1, last ? in.all() : out.all());
      co_yield receive(me - 1, out.all());
    }
    if (!last) co_yield send(me + 1, out.all());
  }

  /// Interior ranks accumulate in scratch: their input is the caller's, and they have no output.
  static Steps reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const bool last = wrap(me + 1, n) == root;
    const Range folded = me == root ? out.all() : Range{Buffer::scratch, 0, in.count()};
    if (n == 1) co_yield copy(in.all(), out.all());
    if (!last) co_yield receive_combine(wrap(me + 1, n), in.all(), folded);
    if (me != root) co_yield send(wrap(me - 1, n), last ? in.all() : folded);
  }

  static Steps broadcast(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != root) co_yield receive(wrap(me - 1, n), out.all());
    if (wrap(me + 1, n) != root) co_yield send(wrap(me + 1, n), out.all());
  }

  static constexpr Folding scan_folding = Folding::ordered;
  /// Each rank adds its own to what the ones before it have, and passes that on.
  static Steps scan(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me == 0) co_yield copy(in.all(), out.all());
    else co_yield receive_combine(me - 1, in.all(), out.all(), Side::left);
    if (me + 1 < n) co_yield send(me + 1, me == 0 ? in.all() : out.all());
  }
  static Steps exclusive_scan(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Range folded{Buffer::scratch, 0, in.count()};
    const bool passes_on = me + 1 < n;
    if (me > 0 && passes_on) co_yield copy(in.all(), folded);
    if (me > 0) co_yield receive(me - 1, out.all());
    if (me > 0 && passes_on) co_yield combine(out.all(), folded, Side::left);
    if (passes_on) co_yield send(me + 1, me == 0 ? in.all() : folded);
  }
};

}  // namespace tally::inline v0
