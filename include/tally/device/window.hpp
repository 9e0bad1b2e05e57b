// SPDX-License-Identifier: Apache-2.0
// A rank's window: the memory on its device that all ranks can store to, and how it is laid out. Every word in it has one writer (but that which
// says that it is over), and what an operation leaves behind nobody has to clear: flags and packets are told from earlier ones by numbers that only grow, and wrap.
#pragma once

#include <cstddef>
#include <cstdint>

#include "seam.hpp"

namespace tally::inline v0::device {

/// Where one rank's buffers of an operation are, for the others.
struct Pad {
  std::uint64_t input = 0, output = 0;
};
/// What a block has done so far; its own.
struct Epochs {
  std::uint32_t meets = 0, packets = 0;
};

/// In bytes from a window's begin. `blocks`: the most that an operation uses; `packets`: those that one sender may send to one block at once.
struct WindowLayout {
  int ranks = 0, blocks = 0;
  std::size_t packets = 0;

  TALLY_DEVICE constexpr std::size_t broken() const { return 0; }
  TALLY_DEVICE constexpr std::size_t epochs(int block) const { return 128 + at(block) * sizeof(Epochs); }
  TALLY_DEVICE constexpr std::size_t flag(int block, int peer) const { return line(epochs(blocks)) + pair(block, peer) * sizeof(std::uint32_t); }
  TALLY_DEVICE constexpr std::size_t pad(int block, int peer) const { return line(flag(blocks, 0)) + pair(block, peer) * sizeof(Pad); }
  /// Twice, in turns: who sends the next operation's has got this one's, so the one before that is read.
  TALLY_DEVICE constexpr std::size_t slot(int block, std::uint32_t epoch, int peer) const { return line(pad(blocks, 0)) + (pair(block, peer) * 2 + epoch % 2) * packets * sizeof(Packet); }
  TALLY_DEVICE constexpr std::size_t bytes() const { return line(slot(blocks, 0, 0)); }

 private:
  TALLY_DEVICE static constexpr std::size_t at(int i) { return static_cast<std::size_t>(i); }
  TALLY_DEVICE static constexpr std::size_t line(std::size_t bytes) { return (bytes + 127) / 128 * 128; }
  TALLY_DEVICE constexpr std::size_t pair(int block, int peer) const { return at(block) * at(ranks) + at(peer); }
};

}  // namespace tally::inline v0::device
