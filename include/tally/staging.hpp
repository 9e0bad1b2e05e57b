// SPDX-License-Identifier: Apache-2.0
// The arithmetic of staged shares: into which pieces a call is cut, and what each rank puts into its block of shared
// memory, combines, and takes out of it. A piece is the same call with fewer elements, so the shares of its ranks are
// known to all. An element has one place in a piece's block, for input and output alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "call.hpp"
#include "share.hpp"
#include "steps.hpp"

namespace tally::inline v0 {

class Staging {
 public:
  /// No piece takes more than `limit` bytes of a block.
  Staging(const Call& call, std::size_t limit) : call_(call), width_(call.layout.items() / std::max<std::size_t>(call.layout.count, 1) * call.grain), most_(std::max<std::size_t>(limit / std::max<std::size_t>(width_, 1), 1)) {}

  std::size_t pieces() const { return (call_.layout.count + most_ - 1) / most_; }
  /// Bytes of a block that piece i takes.
  std::size_t bytes(std::size_t i) const { return count(i) * width_; }

  /// Puts what the other ranks will read of this one's input into its block. Returns the bytes; without a block, only that.
  std::size_t put(std::size_t i, std::byte* block) const {
    std::size_t moved = 0;
    for (Rank r = 0; r < call_.layout.n; ++r) {
      const Share share = share_of(r, i);
      if (r == me() || (share.source >= 0 && share.source != me())) continue;
      if (block) copy(block + share.from.first * call_.grain, place(share.from, i), share.from.count);
      moved += share.from.count * call_.grain;
    }
    return moved;
  }
  struct Bytes {
    std::size_t length = 0, loaded = 0, stored = 0;  // of the share; from and to other ranks' blocks
  };
  /// Where this rank's share is: `block(r)` is rank r's block of the piece.
  template <class Block>
  Bytes find(std::size_t i, SharePass& pass, Block&& block) const {
    const Share share = share_of(me(), i);
    Bytes bytes{share.from.count * call_.grain, 0, 0};
    pass.sources.clear();
    pass.targets.clear();
    if (bytes.length == 0) return bytes;
    for (Rank r = 0; r < call_.layout.n; ++r) {
      if (share.source >= 0 && share.source != r) continue;
      pass.sources.push_back(r == me() ? place(share.from, i) : block(r) + share.from.first * call_.grain);
      if (r != me()) bytes.loaded += bytes.length;
    }
    for (int k = 0; k < call_.layout.n; ++k) {
      const Rank r = wrap(me() + k, call_.layout.n);
      if ((share.target >= 0 && share.target != r) || has_already(share, r)) continue;
      pass.targets.push_back(r == me() ? place(share.to, i) : block(r) + share.to.first * call_.grain);
      if (r != me()) bytes.stored += bytes.length;
    }
    return bytes;
  }
  /// Takes what other ranks have written for this one out of its block. Likewise.
  std::size_t take(std::size_t i, const std::byte* block) const {
    std::size_t moved = 0;
    for (Rank r = 0; r < call_.layout.n; ++r) {
      const Share share = share_of(r, i);
      if (r == me() || (share.target >= 0 && share.target != me()) || has_already(share, me())) continue;
      if (block) copy(place(share.to, i), block + share.to.first * call_.grain, share.to.count);
      moved += share.to.count * call_.grain;
    }
    return moved;
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
  /// Rank r is where the data comes from, and it is to go where it came from: a broadcast's root.
  static bool has_already(const Share& share, Rank r) { return share.source == r && share.from.buffer == share.to.buffer; }
  /// Where a range of piece i lies in this rank's own memory. Where a buffer is made of n blocks, so is each piece, and
  /// no range is of two of them.
  std::byte* place(const Range& range, std::size_t i) const {
    const bool input = range.buffer == Buffer::input;
    const bool blocks = call_.layout.operation == (input ? Operation::reduce_scatter : Operation::all_gather);
    const std::size_t first = i * most_ + (blocks ? range.first / count(i) * call_.layout.count + range.first % count(i) : range.first);
    return (input ? const_cast<std::byte*>(call_.input) : call_.output) + first * call_.grain;  // inputs are never written
  }
  void copy(std::byte* to, const std::byte* from, std::size_t count) const {
    if (count > 0) std::memcpy(to, from, count * call_.grain);
  }

  const Call& call_;
  std::size_t width_;  // bytes of a block per element of the call
  std::size_t most_;   // elements of a piece
};

}  // namespace tally::inline v0
