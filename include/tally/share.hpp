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
/// Calls source(r, range) for each rank that rank `me` of n reads from, in rank order, and target(r, range) for each that it
/// writes to: itself first, then each rank begins with another one. Scans go up the ranks, exchanges have a target per source.
template <class Source, class Target>
ShareBytes for_each_rank_of(const Share& share, Rank me, int n, std::size_t grain, Source&& source, Target&& target) {
  ShareBytes bytes{share.from.count * grain, 0, 0};
  if (bytes.length == 0) return bytes;
  const bool exchange = share.way == Share::Way::exchange;
  for (int k = 0; k < n; ++k) {
    const Rank r = exchange ? wrap(me + k, n) : k;
    if (!share.reads(r, n)) continue;
    source(r, share.from);
    if (exchange) target(share.target, share.to_of(r));
    if (r != me) bytes.loaded += bytes.length;
  }
  for (int k = 0; k < n && !exchange; ++k) {
    const Rank r = share.scans() ? k : wrap(me + k, n);
    if (!share.writes(r)) continue;
    target(r, share.to);
    if (r != me) bytes.stored += bytes.length;
  }
  return bytes;
}

class SharePass {
 public:
  using Way = Share::Way;
  /// In rank order; the first target is written first. Kept from call to call so that nothing is allocated.
  std::vector<const std::byte*> sources;
  std::vector<std::byte*> targets;

  /// Every target's `bytes` bytes become the fold of the sources', whole elements of `grain` bytes. A target may be
  /// a source, no other overlap is allowed. Without a fold there is one source. `past_caches`: nobody looks at the targets soon.
  void run(std::size_t bytes, std::size_t grain, const Fold* fold, bool past_caches = false, Way way = Way::fold) {
    if (targets.empty()) return;
    if (way == Way::exchange) return exchange(bytes, past_caches);
    if (way != Way::fold) return scan(bytes, grain, *fold, way == Way::scan);
    const bool one_copy = sources.size() == 1 && targets.size() == 1;
    const std::size_t piece = one_copy ? bytes : std::max(grain, piece_bytes - piece_bytes % grain);
    stride_ = piece;
    if (sources.size() > 2) partial_.resize(std::max(partial_.size(), piece * static_cast<std::size_t>(std::bit_width(sources.size()))));
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      const std::byte* result = targets[0] + at;
      if (sources.size() == 1) result = sources[0] + at;
      else fold_all(targets[0] + at, at, now, *fold);
      for (std::byte* target : targets) copy(target + at, result, now, past_caches);
    }
  }

 private:
  static constexpr std::size_t piece_bytes = 8 << 10;

  static void copy(std::byte* to, const std::byte* from, std::size_t bytes, bool past_caches = false) {
    if (to == from) return;
    if (past_caches) copy_past_caches(to, from, bytes);
    else std::memcpy(to, from, bytes);
  }
  void exchange(std::size_t bytes, bool past_caches) {
    for (std::size_t i = 0; i < sources.size(); ++i) copy(targets[i], sources[i], bytes, past_caches);
  }
  /// The i-th target becomes the fold of the first i + 1 sources: a stack of folds of 2^k of them each, as in a binary counter,
  /// folded from its top. Each may lie where the i-th source does, or the next one (of an exclusive scan), which are read before.
  void scan(std::size_t bytes, std::size_t grain, const Fold& fold, bool inclusive) {
    const std::size_t piece = std::max(grain, piece_bytes - piece_bytes % grain), levels = static_cast<std::size_t>(std::bit_width(sources.size())) + 1;
    partial_.resize(std::max(partial_.size(), (levels + 1) * piece));
    const auto level = [&](std::size_t k) { return partial_.data() + k * piece; };
    std::byte* const result = level(levels);
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      std::size_t depth = 0;
      const std::byte* folded = nullptr;
      for (std::size_t i = 0; i < sources.size() + (inclusive ? 0 : 1); ++i) {
        const std::byte* const before = folded;  // in `result` or at the bottom of the stack, which only an odd i overwrites
        if (!inclusive && before && before != result) std::memcpy(result, before, now);
        if (i < sources.size()) {
          std::memcpy(level(depth++), sources[i] + at, now);
          for (std::size_t size = 1; i & size; size *= 2, --depth) fold(level(depth - 2), level(depth - 2), level(depth - 1), now);
        }
        if (!inclusive && i > 0) copy(targets[i - 1] + at, result, now);
        if (i == sources.size()) break;
        folded = level(depth - 1);
        for (std::size_t k = depth - 1; k > 0; --k, folded = result) fold(result, level(k - 1), folded, now);
        if (inclusive) copy(targets[i] + at, folded, now);
      }
    }
  }
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
