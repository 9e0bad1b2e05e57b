// SPDX-License-Identifier: Apache-2.0
// Long operations where every rank can load and store every rank's buffers: the ranks meet, each does its share (steps.hpp), and they meet
// again ("two-shot"). A block does its part of the share, and meets the same blocks of the others only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../steps.hpp"
#include "fold.hpp"
#include "session.hpp"

namespace tally::inline v0::device {

/// Elements side by side: one, or as many as sixteen bytes hold.
template <class T, int width>
struct alignas(width > 1 ? 16 : alignof(T)) Row {
  T values[width];
};
template <class T>
inline constexpr int row_width = sizeof(T) < 16 && 16 % sizeof(T) == 0 ? static_cast<int>(16 / sizeof(T)) : 1;

struct ShareWork {
  Share share;  // this rank's
  Place input, output;
};

/// A rank's share, as far as one block does it.
template <class T, int most, class F, Block B, class Source, class Target, class Factor>
struct SharePart {
  B& block;
  const Share& share;
  int n, me;
  const F& folder;
  const Source& source;  // (rank): its first element
  const Target& target;
  const Factor& factor;  // (rank): what its elements are multiplied by

  /// Sixteen bytes at a time where all buffers lie alike.
  TALLY_DEVICE void run(std::uint64_t begin, std::uint64_t end) const {
    constexpr int width = row_width<T>;
    const auto thread = static_cast<std::uint64_t>(block.thread()), threads = static_cast<std::uint64_t>(block.threads());
    const auto one_by_one = [&](std::uint64_t lo, std::uint64_t hi) {
      for (std::uint64_t i = lo + thread; i < hi; i += threads) row<1>(i);
    };
    if (width == 1 || !lie_alike()) return one_by_one(begin, end);
    std::uint64_t first = begin;
    while (first < end && first < begin + width && reinterpret_cast<std::uintptr_t>(source(first_source()) + first) % 16 != 0) ++first;
    if (first == begin + width) return one_by_one(begin, end);  // elements never lie on a row's begin
    const std::uint64_t last = first + (end - first) / width * width;
    one_by_one(begin, first);
    for (std::uint64_t i = first + thread * width; i < last; i += threads * width) row<width>(i);
    one_by_one(last, end);
  }

 private:
  /// Loaded from all sources before it is stored where any of them may lie.
  template <int width>
  TALLY_DEVICE void row(std::uint64_t at) const {
    using R = Row<T, width>;
    const auto load = [&](int r) { return *reinterpret_cast<const R*>(source(r) + at); };
    const auto put = [&](int r, const R& values) { *reinterpret_cast<R*>(target(r) + at) = values; };
    if (share.way == Share::Way::exchange) {
      for (int k = 0; k < n; ++k) put((me + k) % n, load((me + k) % n));
      return;
    }
    R folded;
    if constexpr (most <= few_ranks)
      if (share.way == Share::Way::fold && share.source < 0) {
        T values[most][width] = {};
        TALLY_UNROLL
        for (int r = 0; r < most; ++r)
          if (r < n) {
            const R row = load(r);
            TALLY_UNROLL
            for (int k = 0; k < width; ++k) values[r][k] = row.values[k];
          }
        if constexpr (F::scales)
          TALLY_UNROLL
          for (int r = 0; r < most; ++r)
            if (r < n)
              for (T& each : values[r]) each = folder.scale(each, factor(r));
        fold_all(folder, values, n, folded.values);
        return put_all(folded, put);
      }
    Stack<F, width, most> stack(folder);
    for (int r = 0; r < n; ++r) {
      const bool exclusive = share.way == Share::Way::exclusive_scan;
      if (exclusive && r > 0) stack.fold(folded.values);
      if (share.reads(r, n)) push(stack, load(r), r);
      if (exclusive && r > 0) put(r, folded);
      if (share.way == Share::Way::scan) stack.fold(folded.values), put(r, folded);
    }
    if (share.scans()) return;
    stack.fold(folded.values);
    put_all(folded, put);
  }
  template <class R, class Put>
  TALLY_DEVICE void put_all(const R& folded, const Put& put) const {
    for (int k = 0; k < n; ++k)  // each rank begins with another one
      if (share.writes((me + k) % n)) put((me + k) % n, folded);
  }
  template <class S, class R>
  TALLY_DEVICE void push(S& stack, R values, int r) const {
    if constexpr (F::scales)
      for (auto& each : values.values) each = folder.scale(each, factor(r));
    stack.push(values.values);
  }
  TALLY_DEVICE int first_source() const { return share.source < 0 ? 0 : share.source; }
  TALLY_DEVICE bool lie_alike() const {
    const auto one = reinterpret_cast<std::uintptr_t>(source(first_source()));
    std::uintptr_t different = 0;
    for (int r = 0; r < n; ++r) {
      if (share.reads(r, n)) different |= one ^ reinterpret_cast<std::uintptr_t>(source(r));
      if (share.way == Share::Way::exchange || share.writes(r)) different |= one ^ reinterpret_cast<std::uintptr_t>(target(r));
    }
    return different % 16 == 0;
  }
};

/// The whole operation of one block. `most`: of ranks.
template <class T, int most, bool timed, class F, Block B>
TALLY_DEVICE void run_share(B& block, const RankView& view, const ShareWork& work, const F& folder) {
  Session<B, timed> session(block, view);
  if (session.is_over()) return session.end();
  if (!session.meet(work.input, work.output, folder.factor())) return session.end();
  const Share& share = work.share;
  const auto address = [&](int r, Buffer which, std::size_t first) {
    const Pad& pad = session.pad_of(r);
    return reinterpret_cast<T*>(session.address(r, which == Buffer::output ? pad.output : pad.input)) + first;
  };
  const auto source = [&](int r) -> const T* { return address(r, share.from.buffer, share.from.first); };
  const auto target = [&](int r) -> T* { return share.way == Share::Way::exchange ? address(view.me, share.to.buffer, share.to_of(r).first) : address(r, share.to.buffer, share.to.first); };
  const auto factor = [&](int r) {
    typename F::Factor theirs;
    memcpy(&theirs, session.pad_of(r).factor, sizeof theirs);
    return theirs;
  };
  // In whole rows, so that all parts but the last lie as the first does.
  constexpr auto width = static_cast<std::uint64_t>(row_width<T>);
  const auto blocks = static_cast<std::uint64_t>(block.blocks());
  const std::uint64_t count = share.from.count, part = ((count + blocks - 1) / blocks + width - 1) / width * width;
  const std::uint64_t begin = static_cast<std::uint64_t>(block.index()) * part, end = begin + part;
  if (begin < count) SharePart<T, most, F, B, decltype(source), decltype(target), decltype(factor)>{block, share, view.n, view.me, folder, source, target, factor}.run(begin, end < count ? end : count);
  session.meet();
  session.end();
}

/// Nothing but a meeting.
template <bool timed, Block B>
TALLY_DEVICE void run_barrier(B& block, const RankView& view) {
  Session<B, timed> session(block, view);
  if (!session.is_over()) session.meet({}, {}, 0);
  session.end();
}

}  // namespace tally::inline v0::device
