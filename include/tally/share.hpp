// SPDX-License-Identifier: Apache-2.0
// The work of one share (see Share in steps.hpp): one pass over the memory of all sources, in pieces that stay in
// the core's first cache, so that partial results of more than two ranks and copies for further targets cost
// nothing that shows. Folds in the fixed bracketing.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <vector>

#include "copy.hpp"
#include "reduce.hpp"
#include "steps.hpp"

namespace tally::inline v0 {

/// Shares begin and end with a meeting. Up to so many ranks tell each other directly: one latency; more of them in
/// rounds: few messages.
inline constexpr int direct_meeting_ranks = 8;

struct ShareBytes {
  std::size_t length = 0, loaded = 0, stored = 0;  // of the share; from and to other ranks' memory
};
/// Calls source(r) for each rank that rank `me` of n reads from, in rank order, and target(r) for each that it writes to:
/// itself first, then each rank begins with another one.
template <class Source, class Target>
ShareBytes for_each_rank_of(const Share& share, Rank me, int n, std::size_t grain, Source&& source, Target&& target) {
  ShareBytes bytes{share.from.count * grain, 0, 0};
  if (bytes.length == 0) return bytes;
  for (Rank r = 0; r < n; ++r) {
    if (share.source >= 0 && share.source != r) continue;
    source(r);
    if (r != me) bytes.loaded += bytes.length;
  }
  for (int k = 0; k < n; ++k) {
    const Rank r = wrap(me + k, n);
    if ((share.target >= 0 && share.target != r) || share.has_already(r)) continue;
    target(r);
    if (r != me) bytes.stored += bytes.length;
  }
  return bytes;
}

class SharePass {
 public:
  /// In rank order; the first target is written first. Kept from call to call so that nothing is allocated.
  std::vector<const std::byte*> sources;
  std::vector<std::byte*> targets;

  /// Every target's `bytes` bytes become the fold of the sources', whole elements of `grain` bytes. A target may be
  /// a source, no other overlap is allowed. Without a fold there is one source. `past_caches`: nobody looks at the targets soon.
  void run(std::size_t bytes, std::size_t grain, const Fold* fold, bool past_caches = false) {
    if (targets.empty()) return;
    const bool one_copy = sources.size() == 1 && targets.size() == 1;
    const std::size_t piece = one_copy ? bytes : std::max(grain, piece_bytes - piece_bytes % grain);
    stride_ = piece;
    if (sources.size() > 2) partial_.resize(std::max(partial_.size(), piece * static_cast<std::size_t>(std::bit_width(sources.size()))));
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      const std::byte* result = targets[0] + at;
      if (sources.size() == 1) result = sources[0] + at;
      else fold_all(targets[0] + at, at, now, *fold);
      for (std::byte* target : targets) {
        if (target + at == result) continue;
        if (past_caches) copy_past_caches(target + at, result, now);
        else std::memcpy(target + at, result, now);
      }
    }
  }

 private:
  static constexpr std::size_t piece_bytes = 8 << 10;

  /// The last fold alone writes to `to`, which may be a source that the others still read.
  void fold_all(std::byte* to, std::size_t at, std::size_t bytes, const Fold& fold) {
    const std::size_t n = sources.size(), middle = half(n);
    const std::byte* left = fold_range(0, middle, 0, at, bytes, fold);
    const std::byte* right = fold_range(middle, n, 1, at, bytes, fold);
    fold(to, left, right, bytes);
  }
  /// The fold of sources lo..hi-1, in the partial result of that level or, where it is only one, where it lies.
  const std::byte* fold_range(std::size_t lo, std::size_t hi, std::size_t level, std::size_t at, std::size_t bytes, const Fold& fold) {
    if (hi - lo == 1) return sources[lo] + at;
    const std::size_t middle = lo + half(hi - lo);
    const std::byte* left = fold_range(lo, middle, level, at, bytes, fold);
    const std::byte* right = fold_range(middle, hi, level + 1, at, bytes, fold);
    std::byte* to = partial_.data() + level * stride_;
    fold(to, left, right, bytes);
    return to;
  }
  static std::size_t half(std::size_t n) {
    std::size_t size = 1;
    while (size * 2 < n) size *= 2;
    return size;
  }

  std::vector<std::byte> partial_;  // a piece per level of the bracketing
  std::size_t stride_ = 0;
};

}  // namespace tally::inline v0
