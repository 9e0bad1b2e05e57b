// SPDX-License-Identifier: Apache-2.0
// The arithmetic of staged shares: into which pieces a call is cut, and what each rank puts into its block of shared
// memory, combines, and takes out of it. A piece is the same call with fewer elements, so the shares of its ranks are
// known to all. An element has one place in a piece's block, for input and output alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "call.hpp"
#include "copy.hpp"
#include "share.hpp"
#include "steps.hpp"

namespace tally::inline v0 {

class Staging {
 public:
  /// No piece takes more than `limit` bytes of a block. `past_caches`: nobody looks at the results soon.
  Staging(const Call& call, std::size_t limit, bool past_caches = false) : call_(call), past_caches_(past_caches), width_(call.layout.items() / std::max<std::size_t>(call.layout.count, 1) * call.grain), most_(std::max<std::size_t>(limit / std::max<std::size_t>(width_, 1), 1)) {}

  std::size_t pieces() const { return (call_.layout.count + most_ - 1) / most_; }
  /// Bytes of a block that piece i takes.
  std::size_t bytes(std::size_t i) const { return count(i) * width_; }

  /// Puts what the other ranks will read of this one's input into its block. `moving(bytes)` comes before each copy.
  template <class Moving>
  void put(std::size_t i, std::byte* block, Moving&& moving) const {
    for (Rank r = 0; r < call_.layout.n; ++r) {
      const Share share = share_of(r, i);
      if (r != me() && share.reads(me(), call_.layout.n)) put(block + share.from.first * call_.grain, share.from, i, moving);
    }
  }
  /// Does this rank's share: `block(r)` is rank r's block of the piece. What it shares with itself stays where it is.
  template <class Block, class Working>
  ShareBytes run(std::size_t i, SharePass& pass, Block&& block, Working&& working) const {
    const Share share = share_of(me(), i);
    const auto at = [&](Rank r, const Range& range) { return r != me() ? block(r) + range.first * call_.grain : call_.is_scattered() ? nullptr : place(range, i); };
    pass.sources.clear();
    pass.targets.clear();
    const ShareBytes bytes = for_each_rank_of(share, me(), call_.layout.n, call_.grain, [&](Rank r, const Range& from) { pass.sources.push_back(at(r, from)); }, [&](Rank r, const Range& to) { pass.targets.push_back(at(r, to)); });
    working(bytes.length);
    if (call_.is_scattered()) run_parts(share, i, pass);
    else pass.run(bytes.length, call_.grain, &call_.fold, false, share.way);
    return bytes;
  }
  /// Takes what other ranks have written for this one out of its block. Likewise.
  template <class Moving>
  void take(std::size_t i, const std::byte* block, Moving&& moving) const {
    for (Rank r = 0; r < call_.layout.n; ++r) {
      const Share share = share_of(r, i);
      if (r != me() && share.writes(me())) take(share.to, block + share.to.first * call_.grain, i, moving);
    }
  }

 private:
  Rank me() const { return call_.layout.me; }
  std::size_t count(std::size_t i) const { return std::min(most_, call_.layout.count - i * most_); }
  Share share_of(Rank r, std::size_t i) const {
    Layout layout = call_.layout;
    layout.me = r;
    layout.count = count(i);
    return call_.algorithm.share(layout.shape());
  }
  /// Where a range of piece i lies in this rank's own memory. Where a buffer is made of n blocks, so is each piece, and
  /// no range is of two of them.
  std::byte* place(const Range& range, std::size_t i) const {
    const bool input = range.buffer == Buffer::input;
    const Collective o = call_.layout.operation;
    const bool blocks = o == Collective::all_to_all || (input ? o == Collective::reduce_scatter || o == Collective::scatter : o == Collective::all_gather || o == Collective::gather);
    const std::size_t first = i * most_ + (blocks ? range.first / count(i) * call_.layout.count + range.first % count(i) : range.first);
    return (input ? const_cast<std::byte*>(call_.input) : call_.output) + first * call_.grain;  // inputs are never written
  }
  /// Part by part: its own source and target, not known before, are there.
  void run_parts(const Share& share, std::size_t i, SharePass& pass) const {
    const auto own_source = std::ranges::find(pass.sources, nullptr);
    const auto own_target = std::ranges::find(pass.targets, nullptr);
    each_part(share.from, i, [&](const Part& part, std::size_t first, std::size_t, std::size_t bytes) {
      if (own_source != pass.sources.end()) *own_source = part.in + first;
      if (own_target != pass.targets.end()) *own_target = part.out + first;
      pass.run(bytes, call_.grain, &call_.fold);
      for (const std::byte*& source : pass.sources) source += bytes;
      for (std::byte*& target : pass.targets) target += bytes;
    });
  }
  template <class Moving>
  void put(std::byte* to, const Range& from, std::size_t i, Moving&& moving) const {
    if (from.count == 0) return;
    moving(from.count * call_.grain);
    if (!call_.is_scattered()) std::memcpy(to, place(from, i), from.count * call_.grain);
    else each_part(from, i, [&](const Part& part, std::size_t first, std::size_t at, std::size_t bytes) { std::memcpy(to + at, part.in + first, bytes); });
  }
  template <class Moving>
  void take(const Range& to, const std::byte* from, std::size_t i, Moving&& moving) const {
    if (to.count == 0) return;
    moving(to.count * call_.grain);
    if (call_.is_scattered()) each_part(to, i, [&](const Part& part, std::size_t first, std::size_t at, std::size_t bytes) { std::memcpy(part.out + first, from + at, bytes); });
    else if (past_caches_) copy_past_caches(place(to, i), from, to.count * call_.grain);
    else std::memcpy(place(to, i), from, to.count * call_.grain);
  }
  /// f(part, byte of the part, byte of the range, bytes) for all that lie in a range of piece i.
  template <class F>
  void each_part(const Range& range, std::size_t i, F&& f) const {
    const std::size_t begin = call_.scattered[0].first + i * most_ + range.first, end = begin + range.count;
    auto part = std::upper_bound(call_.scattered.begin(), call_.scattered.end(), begin, [](std::size_t element, const Part& p) { return element < p.first + p.count; });
    for (std::size_t at = begin; at < end; ++part) {
      const std::size_t now = std::min(end, part->first + part->count) - at;
      if (now > 0) f(*part, (at - part->first) * call_.grain, (at - begin) * call_.grain, now * call_.grain);
      at += now;
    }
  }

  const Call& call_;
  bool past_caches_;
  std::size_t width_;  // bytes of a block per element of the call
  std::size_t most_;   // elements of a piece
};

}  // namespace tally::inline v0
