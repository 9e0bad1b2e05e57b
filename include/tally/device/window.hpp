// SPDX-License-Identifier: Apache-2.0
// A rank's window: the memory on its device that all ranks can store to, and how it is laid out. Every word in it has one writer (but that which
// says that it is over), and what an operation leaves behind nobody has to clear: flags and packets are told from earlier ones by numbers that only grow, and wrap.
// Part of it are boxes, one for what each rank sends in frames. A rank that cannot store here has its box elsewhere (relay.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "seam.hpp"

namespace tally::inline v0::device {

/// A place in memory, as it is named to other ranks: where all share one address space (segment 0), its address; else where it is in
/// one of the segments that every rank has one of.
struct Place {
  std::uint64_t offset = 0;
  std::uint32_t segment = 0;
};
/// What one rank tells the others of its operation.
struct Pad {
  Place input, output;
  std::uint64_t fingerprint = 0;  // of the call
  std::uint64_t factor[2] = {};   // what its elements are multiplied by, as the operator has it
};
/// What a block has done so far; its own.
struct Epochs {
  std::uint32_t meets = 0, packets = 0, calls = 0;
};
/// Which call a rank is in: the number is written last, and the same words again four calls later.
struct CallWord {
  std::uint64_t fingerprint = 0;
  std::uint32_t number = 0;
};

/// What a block has sent to another rank's, and taken from it, in frames; its own.
struct Pair {
  std::uint32_t sent = 0, taken = 0;
  std::uint64_t used = 0;                           // elements of the next frame to be taken
  std::uint32_t began = 0;                          // sent before this operation
  std::uint32_t looked_to_send = 0, looked_to_receive = 0;  // in this look at all steps: only the first message of a pair may move
};

struct FrameHeader {
  std::uint64_t count = 0;        // elements
  std::uint64_t fingerprint = 0;  // of the call
  std::uint64_t waited = 0;       // nanoseconds that the sender has waited for late ranks in it
  std::int32_t origin = -1;       // the one that it waited for last
  std::uint32_t bytes = 0;
};

/// In bytes from a window's begin. `blocks`: the most that an operation uses; `packets`: those that one sender may send to one block at once;
/// `frames`: likewise, of `frame_bytes` each.
struct WindowLayout {
  int ranks = 0, blocks = 0;
  std::size_t packets = 0, frames = 0, frame_bytes = 0;

  TALLY_DEVICE constexpr std::size_t broken() const { return 0; }
  TALLY_DEVICE constexpr std::size_t epochs(int block) const { return 128 + at(block) * sizeof(Epochs); }
  TALLY_DEVICE constexpr std::size_t flag(int block, int peer) const { return line(epochs(blocks)) + index(block, peer) * sizeof(std::uint32_t); }
  /// Twice, in turns by meetings: who comes to the next one has read this one's, if there is none between.
  TALLY_DEVICE constexpr std::size_t pad(int block, std::uint32_t meeting, int peer) const { return line(flag(blocks, 0)) + (index(block, peer) * 2 + meeting % 2) * sizeof(Pad); }
  /// Twice, in turns: who sends the next operation's has got this one's, so the one before that is read.
  TALLY_DEVICE constexpr std::size_t slot(int block, std::uint32_t epoch, int peer) const { return line(pad(blocks, 0, 0)) + (index(block, peer) * 2 + epoch % 2) * packets * sizeof(Packet); }
  TALLY_DEVICE constexpr std::size_t pair(int block, int peer) const { return line(slot(blocks, 0, 0)) + index(block, peer) * sizeof(Pair); }
  /// What a peer sends.
  TALLY_DEVICE constexpr std::size_t box(int peer) const { return line(pair(blocks, 0)) + at(peer) * box_bytes(); }
  TALLY_DEVICE constexpr std::size_t bytes() const { return box(ranks); }

  // From a box's begin.

  TALLY_DEVICE static constexpr std::size_t call(std::uint32_t number) { return number % 4 * sizeof(CallWord); }
  /// Frames that it has sent; and that it has taken.
  TALLY_DEVICE constexpr std::size_t arrived(int block) const { return 128 + at(block) * sizeof(std::uint32_t); }
  TALLY_DEVICE constexpr std::size_t consumed(int block) const { return line(arrived(blocks)) + at(block) * sizeof(std::uint32_t); }
  /// A frame: its header, and its elements.
  TALLY_DEVICE constexpr std::size_t frame(int block, std::uint32_t number) const { return line(consumed(blocks)) + (at(block) * frames + (frames > 0 ? number % frames : 0)) * (frame_bytes + sizeof(FrameHeader)); }
  TALLY_DEVICE constexpr std::size_t box_bytes() const { return line(frame(blocks, 0)); }

 private:
  TALLY_DEVICE static constexpr std::size_t at(int i) { return static_cast<std::size_t>(i); }
  TALLY_DEVICE static constexpr std::size_t line(std::size_t bytes) { return (bytes + 127) / 128 * 128; }
  TALLY_DEVICE constexpr std::size_t index(int block, int peer) const { return at(block) * at(ranks) + at(peer); }
};

}  // namespace tally::inline v0::device
