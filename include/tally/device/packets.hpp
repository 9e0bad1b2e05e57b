// SPDX-License-Identifier: Apache-2.0
// Short operations: each rank sends what others need of its input in packets, straight into their windows, and folds what it gets by
// itself. One trip, no flag, no meeting ("one-shot"). Which packets, for any operation that has a share (steps.hpp), is worked out ahead.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "../steps.hpp"
#include "fold.hpp"
#include "session.hpp"

namespace tally::inline v0::device {

/// What travels together: elements that fill a packet, or one element in several.
TALLY_DEVICE constexpr std::size_t unit_elements(std::size_t grain) { return grain < 8 && 8 % grain == 0 ? 8 / grain : 1; }
TALLY_DEVICE constexpr std::size_t unit_packets(std::size_t grain) { return (unit_elements(grain) * grain + 7) / 8; }
template <class T>
struct Unit {
  static constexpr int elements = static_cast<int>(unit_elements(sizeof(T))), packets = static_cast<int>(unit_packets(sizeof(T)));
};
template <class T>
struct Words {
  std::uint64_t words[Unit<T>::packets] = {};
  TALLY_DEVICE void set(int k, const T& value) { memcpy(reinterpret_cast<char*>(words) + static_cast<std::size_t>(k) * sizeof(T), &value, sizeof(T)); }
  TALLY_DEVICE T get(int k) const {
    Raw raw;
    memcpy(&raw, reinterpret_cast<const char*>(words) + static_cast<std::size_t>(k) * sizeof(T), sizeof(T));
    return __builtin_bit_cast(T, raw);
  }

 private:
  struct Raw {
    char bytes[sizeof(T)];
  };
};

/// Of `count` elements from `from` on, in bytes from the begin of the rank's input or output.
struct PacketSend {
  int to = -1;  // -1: all others
  bool of_output = false;
  std::uint64_t from = 0, count = 0;
  std::uint64_t first = 0;  // packet of the slot
};
/// The fold of those that ranks lo..hi-1 have sent, and of this rank's own if it is one of them.
struct PacketFold {
  int lo = 0, hi = 0;
  bool of_output = false;
  std::uint64_t own = 0, to = 0, count = 0;
  std::uint64_t first = 0;
};
/// What one rank does; the arrays lie on the device.
struct PacketWork {
  const PacketSend* sends = nullptr;
  int send_count = 0;
  const PacketFold* folds = nullptr;
  int fold_count = 0;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
};

/// Made on the host; the same from the same shares, so that who sends and who receives agree on each packet's place.
struct PacketPlan {
  std::vector<PacketSend> sends;
  std::vector<PacketFold> folds;
  std::size_t packets = 1;  // that a slot has to hold, with the first one, which says what call it is

  /// `shares`: of all ranks, in rank order; none for a barrier.
  PacketPlan(std::span<const Share> shares, Rank me, int n, std::size_t grain, int blocks) {
    std::vector<std::size_t> next(static_cast<std::size_t>(n), 1);  // free packet in the slots of each receiver
    for (std::size_t i = 0; i < shares.size();) {
      Share all = shares[i];
      for (++i; i < shares.size() && continues(all, shares[i]); ++i) all.from.count += shares[i].from.count, all.to.count += shares[i].from.count;
      const std::uint64_t count = all.from.count;
      if (count == 0) continue;
      const std::size_t part = (count + static_cast<std::size_t>(blocks) - 1) / static_cast<std::size_t>(blocks);
      const std::size_t needed = (part + unit_elements(grain) - 1) / unit_elements(grain) * unit_packets(grain);
      const std::size_t begin = sends.size();
      for (Rank t = 0; t < n; ++t) {
        const auto [lo, hi] = sources(all, t, n);
        if (lo == hi) continue;
        const std::size_t first = next[static_cast<std::size_t>(t)];
        next[static_cast<std::size_t>(t)] += needed;
        if (t != me && lo <= me && me < hi) sends.push_back({t, all.from.buffer == Buffer::output, all.from.first * grain, count, first});
        if (t != me) continue;
        const bool apart = all.way == Share::Way::exchange;
        for (Rank q = lo; q < (apart ? hi : lo + 1); ++q) folds.push_back({q, apart ? q + 1 : hi, all.from.buffer == Buffer::output, all.from.first * grain, all.to_of(q).first * grain, count, first});
      }
      const bool same_for_all = sends.size() - begin == static_cast<std::size_t>(n - 1) && std::all_of(sends.begin() + static_cast<std::ptrdiff_t>(begin), sends.end(), [&](const PacketSend& each) { return each.first == sends[begin].first; });
      if (same_for_all && n > 2) sends.resize(begin + 1), sends.back().to = -1;
    }
    for (const std::size_t each : next) packets = std::max(packets, each);
  }

 private:
  static bool continues(const Share& a, const Share& b) {
    return a.way == b.way && a.way != Share::Way::exchange && a.source == b.source && a.target == b.target && a.from.buffer == b.from.buffer && a.to.buffer == b.to.buffer && a.from.first + a.from.count == b.from.first && a.to.first + a.from.count == b.to.first;
  }
  /// Whose values rank t gets by this share.
  static std::pair<Rank, Rank> sources(const Share& share, Rank t, int n) {
    if (!share.writes(t)) return {0, 0};
    if (share.source >= 0) return {share.source, share.source + 1};
    return {0, share.way == Share::Way::scan ? t + 1 : share.way == Share::Way::exclusive_scan ? t : n};
  }
};

/// One unit of every other rank.
template <class T, int most, class S>
TALLY_DEVICE void gather_units(S& session, const RankView& view, std::uint64_t packet, T (&values)[most][Unit<T>::elements], bool& came) {
  Packet looked[most][Unit<T>::packets];
  TALLY_UNROLL
  for (int q = 0; q < most; ++q)
    if (q < view.n && q != view.me) {
      TALLY_UNROLL
      for (int p = 0; p < Unit<T>::packets; ++p) looked[q][p] = session.look(q, packet + static_cast<std::uint64_t>(p));
    }
  TALLY_UNROLL
  for (int q = 0; q < most; ++q)
    if (q < view.n && q != view.me) {
      Words<T> unit;
      TALLY_UNROLL
      for (int p = 0; p < Unit<T>::packets; ++p) came = session.get(q, packet + static_cast<std::uint64_t>(p), looked[q][p], unit.words[p]) && came;
      TALLY_UNROLL
      for (int k = 0; k < Unit<T>::elements; ++k) values[q][k] = unit.get(k);
    }
}

/// Of a buffer that this rank may not have.
template <class Byte>
TALLY_DEVICE Byte* begin_of(Byte* buffer, std::uint64_t offset) { return buffer ? buffer + offset : nullptr; }

/// The whole operation of one block. `most`: of ranks.
template <class T, int most, bool timed, class F, Block B>
TALLY_DEVICE void run_packets(B& block, const RankView& view, const PacketWork& work, const F& folder) {
  constexpr int width = Unit<T>::elements;
  Session<B, timed> session(block, view);
  if (session.is_over()) return session.end();
  if (!session.begin_packets()) return session.end();
  const auto b = static_cast<std::uint64_t>(block.index()), blocks = static_cast<std::uint64_t>(block.blocks());
  const auto step = static_cast<std::uint64_t>(block.threads()) * width, begin = static_cast<std::uint64_t>(block.thread()) * width;
  bool came = true;
  /// f(element of the part, packet) for each unit of this thread's in this block's part of `count` elements; its first one, and its end.
  const auto each_unit = [&](std::uint64_t count, std::uint64_t packet, auto&& f) {
    const std::uint64_t part = (count + blocks - 1) / blocks, first = b * part < count ? b * part : count, end = first + part < count ? first + part : count;
    for (std::uint64_t at = begin; first + at < end && came; at += step) f(first + at, static_cast<int>(end - first - at < width ? end - first - at : width), packet + at / width * Unit<T>::packets);
  };
  for (int i = 0; i < work.send_count; ++i) {
    const PacketSend& s = work.sends[i];
    const T* const from = reinterpret_cast<const T*>(begin_of<const std::byte>(s.of_output ? work.output : work.input, s.from));
    const int lo = s.to < 0 ? 0 : s.to, hi = s.to < 0 ? view.n : s.to + 1;
    each_unit(s.count, s.first, [&](std::uint64_t at, int valid, std::uint64_t packet) {
      Words<T> unit;
      for (int k = 0; k < valid; ++k) unit.set(k, folder.scale(from[at + static_cast<std::uint64_t>(k)], folder.factor()));
      for (int p = 0; p < Unit<T>::packets; ++p)
        for (int t = lo; t < hi; ++t)
          if (t != view.me) session.put(t, packet + static_cast<std::uint64_t>(p), unit.words[p]);
    });
  }
  block.sync();  // in place: all is sent that will be written over
  came = session.expect_packets();
  for (int i = 0; i < work.fold_count; ++i) {
    const PacketFold& f = work.folds[i];
    const T* const own = reinterpret_cast<const T*>(begin_of<const std::byte>(f.of_output ? work.output : work.input, f.own));
    T* const to = reinterpret_cast<T*>(begin_of(work.output, f.to));
    if constexpr (most <= few_ranks)
      if (f.lo == 0 && f.hi == view.n && view.n > 1) {  // all are looked at together: they need not wait for each other
        each_unit(f.count, f.first, [&](std::uint64_t at, int valid, std::uint64_t packet) {
          T values[most][width] = {}, result[width];
          gather_units<T, most>(session, view, packet, values, came);
          TALLY_UNROLL
          for (int q = 0; q < most; ++q)
            if (q == view.me)
              for (int k = 0; k < width; ++k)
                if (k < valid) values[q][k] = folder.scale(own[at + static_cast<std::uint64_t>(k)], folder.factor());
          fold_all(folder, values, view.n, result);
          if (came)
            for (int k = 0; k < width; ++k)
              if (k < valid) to[at + static_cast<std::uint64_t>(k)] = result[k];
        });
        continue;
      }
    each_unit(f.count, f.first, [&](std::uint64_t at, int valid, std::uint64_t packet) {
      Stack<F, width, most> stack(folder);
      for (int q = f.lo; q < f.hi; ++q) {
        T values[width] = {};
        if (q == view.me) {
          for (int k = 0; k < valid; ++k) values[k] = folder.scale(own[at + static_cast<std::uint64_t>(k)], folder.factor());
        } else {
          Words<T> unit;
          for (int p = 0; p < Unit<T>::packets; ++p) came = session.get(q, packet + static_cast<std::uint64_t>(p), unit.words[p]) && came;
          for (int k = 0; k < width; ++k) values[k] = unit.get(k);
        }
        stack.push(values);
      }
      T result[width];
      stack.fold(result);
      if (came)
        for (int k = 0; k < valid; ++k) to[at + static_cast<std::uint64_t>(k)] = result[k];
    });
  }
  block.any(!came);
  session.end();
}

}  // namespace tally::inline v0::device
