// SPDX-License-Identifier: Apache-2.0
// What is launched: one kernel of each kind, of an element type, an operator and the most ranks that it folds. A kernel carries all that it
// needs, also the plan of a short operation, so a launch copies nothing to the device and a graph can be replayed at any time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "interpreter.hpp"
#include "packets.hpp"
#include "share.hpp"

namespace tally::inline v0::device {

/// Sends and folds of packets that travel with the kernel.
inline constexpr int kept_packets = 16;

template <class T, class F, int most, bool timed>
struct PacketsKernel {
  RankView view;
  F folder;
  PacketWork work;  // without lists, those below are meant
  PacketSend sends[kept_packets];
  PacketFold folds[kept_packets];
  template <Block B>
  TALLY_DEVICE void operator()(B& block) const {
    PacketWork mine = work;
    if (!mine.sends) mine.sends = sends;
    if (!mine.folds) mine.folds = folds;
    run_packets<T, most, timed>(block, view, mine, folder);
  }
};

template <class T, class F, int most, bool timed>
struct ShareKernel {
  RankView view;
  F folder;
  ShareWork work;
  template <Block B>
  TALLY_DEVICE void operator()(B& block) const {
    run_share<T, most, timed>(block, view, work, folder);
  }
};

template <class T, class F, bool timed>
struct StepsKernel {
  RankView view;
  F folder;
  const StepsWork* channels;  // on the device, without buffers
  const std::byte* input;
  std::byte* output;
  template <Block B>
  TALLY_DEVICE void operator()(B& block) const {
    StepsWork work = channels[block.index()];
    work.input = input, work.output = output;
    run_steps<T, timed>(block, view, work, folder);
  }
};

template <bool timed>
struct BarrierKernel {
  RankView view;
  template <Block B>
  TALLY_DEVICE void operator()(B& block) const {
    run_barrier<timed>(block, view);
  }
};

/// to[i] = factor * from[i]: for algorithms of steps, which fold what they find.
template <class T, class F>
struct ScaleKernel {
  F folder;
  const T* from;
  T* to;
  std::uint64_t count;
  template <Block B>
  TALLY_DEVICE void operator()(B& block) const {
    const auto threads = static_cast<std::uint64_t>(block.threads()), all = threads * static_cast<std::uint64_t>(block.blocks());
    for (std::uint64_t i = static_cast<std::uint64_t>(block.index()) * threads + static_cast<std::uint64_t>(block.thread()); i < count; i += all) to[i] = folder.scale(from[i], folder.factor());
  }
};

}  // namespace tally::inline v0::device
