// SPDX-License-Identifier: Apache-2.0
// One direction of one lane between two ranks over TCP, as its sender and as its receiver see it: what is on its way, and what was said
// of it. How it moves is the business of transport/tcp.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../environment.hpp"
#include "../network/frame.hpp"
#include "../network/socket.hpp"
#include "../network/stream.hpp"
#include "concept.hpp"
#include "queue.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct TcpOptions {
  int lanes = 2;  // one for collectives, one for messages
  std::size_t window = std::size_t{4} << 20;  // bytes that a receiver has not read yet, at most
  std::size_t frame_bytes = std::size_t{256} << 10;  // of a frame's payload, at most
  bool checksum = false;  // a CRC-32C with each frame; TCP's own has but 16 bits

  /// `defaults`, changed by TALLY_CHECKSUM (on, off).
  [[gnu::cold]] static TcpOptions from_environment(TcpOptions defaults) {
    if (const auto word = detail::environment("TALLY_CHECKSUM")) {
      if (*word != "on" && *word != "off") throw Error(Errc::invalid_argument, {"TALLY_CHECKSUM='", *word, "' is unknown; it may be on or off"});
      defaults.checksum = *word == "on";
    }
    return defaults;
  }
};

namespace detail {

/// What this rank sends to a peer on a lane.
struct TcpOut {
  Stream fd;
  Rank peer = -1;
  int lane = 0;
  TransferQueue sends;
  Transfer* next = nullptr;          // the first that is not wholly in the stage: those before it are done when that is empty
  StreamBuffer stage;                // headers and short payloads on their way to the kernel
  Transfer* direct = nullptr;        // whose payload follows the stage, from its own memory
  std::size_t direct_from = 0, direct_left = 0;  // of it: where, and how much is still to go
  std::uint64_t sent = 0, consumed = 0;          // in bytes of window, since the beginning
  std::uint64_t asked = 0;                       // up to where the peer was asked to say that it is consumed
  FrameTimes credit;                             // of the last credit
  std::uint32_t operation = 0;                   // of the last frame sent
  bool elsewhere = false;                        // on another host
  bool greeted = false;                          // its first bytes, which say whose it is, are on their way
  bool any = false, starved = false, full = false;  // no room at the peer; none in the network
  int error = 0;
  StreamBuffer back{256};  // credits

  void give_up(int why) {
    error = why;
    direct = nullptr;
    stage.take(stage.size());
    fd = Stream();
  }
};
/// What this rank receives from a peer on a lane.
struct TcpIn {
  Stream fd;
  Rank peer = -1;
  int lane = 0;
  TransferQueue receives;
  StreamBuffer buffer;
  FrameHeader header;
  std::size_t begin = 0, taken = 0;  // of the frame: the message's bytes before it, and its own that are consumed
  std::uint64_t consumed = 0;
  std::uint64_t window = 0;
  std::uint32_t checksum = 0;  // of the frame, so far
  bool elsewhere = false;  // on another host
  bool framed = false, seen = false, goodbye = false, ended = false;
};

}  // namespace detail
}  // namespace tally::inline v0
