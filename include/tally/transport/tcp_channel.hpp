// SPDX-License-Identifier: Apache-2.0
// One direction of one lane between two ranks over TCP, as its sender and as its receiver see it: what is on its way, and what was said
// of it. How it moves is the business of transport/tcp.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../environment.hpp"
#include "../network/frame.hpp"
#include "../network/socket.hpp"
#include "../network/stream.hpp"
#include "concept.hpp"
#include "queue.hpp"
#include "tcp_stripes.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct TcpOptions {
  int lanes = 2;  // one for collectives, one for messages
  std::size_t window = std::size_t{4} << 20;  // bytes that a receiver has not read yet, at most
  std::size_t frame_bytes = std::size_t{256} << 10;  // of a frame's payload, at most
  bool checksum = false;  // a CRC-32C with each frame; TCP's own has but 16 bits
  int sockets = 1;  // over which payloads of long messages go at once, at most 15; 1: over none but the channel's own

  /// `defaults`, changed by TALLY_CHECKSUM (on, off) and TALLY_SOCKETS (1 to 15).
  [[gnu::cold]] static TcpOptions from_environment(TcpOptions defaults) {
    if (const auto word = detail::environment("TALLY_CHECKSUM")) {
      if (*word != "on" && *word != "off") throw Error(Errc::invalid_argument, {"TALLY_CHECKSUM='", *word, "' is unknown; it may be on or off"});
      defaults.checksum = *word == "on";
    }
    if (const auto sockets = detail::environment_number("TALLY_SOCKETS", 1, detail::FrameHeader::most_stripes)) defaults.sockets = *sockets;
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
  TcpStripes stripes;
  Transfer* striped = nullptr;       // which they carry
  std::size_t begun = 0;             // of `next`: so many bytes are in frames that were begun
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
    direct = striped = nullptr;
    stage.take(stage.size());
    fd = Stream();
    stripes = {};
  }
};
/// A connection to receive from, and what was read of it, but is not consumed.
struct TcpSource {
  Stream fd;
  StreamBuffer buffer;
};
/// A frame that was announced.
struct TcpPart {
  std::size_t begin = 0, bytes = 0, taken = 0;  // the message's bytes before it, its own, and those of them that are consumed
  std::uint32_t expected = 0, checksum = 0;     // so far
  int stripe = 0;
  bool asks = false, dry = false;  // dry: there was nothing more of it
  FrameTimes times;

  bool is_whole() const { return taken == bytes; }
  /// Up to here it can be told of.
  std::size_t reached(std::size_t grain) const { return begin + (is_whole() ? taken : taken - taken % grain); }
};
/// What this rank receives from a peer on a lane.
struct TcpIn {
  TcpSource own;
  std::vector<TcpSource> stripes;
  Rank peer = -1;
  int lane = 0;
  TransferQueue receives;
  FrameHeader header;
  TcpPart part;                  // the frame whose payload follows its header
  std::vector<TcpPart> striped;  // those whose payloads come by other connections, in their order; all of one message
  std::size_t announced = 0;     // of that message, or the one of `part`
  std::uint64_t consumed = 0;
  bool elsewhere = false;  // on another host
  bool framed = false, seen = false, goodbye = false, ended = false;
};

}  // namespace detail
}  // namespace tally::inline v0
