// SPDX-License-Identifier: Apache-2.0
// What goes over a connection between two ranks: first who opens it, then frames, each a header and its payload. Bytes from a peer
// are read here and nowhere else; nothing in them is trusted.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "../text.hpp"
#include "../transport/concept.hpp"
#include "crc32c.hpp"

namespace tally::inline v0::detail {

static_assert(std::endian::native == std::endian::little, "numbers go over the network as they lie in memory");

inline constexpr std::uint32_t network_protocol = 3;  // raise when anything below changes its meaning

/// What only ranks of a job know: drawn by rank 0, told to who joins.
using JobKey = std::array<std::uint8_t, 16>;

/// The first bytes on a connection: one direction of one lane of one communicator, from who opened it. What carries only payloads of
/// such a channel, as its stripe 1, 2, ..., adds that to the lane, times 2^16; who takes it answers with a byte.
struct ChannelHello {
  std::uint64_t magic = 0x6e616863796c6c61ull;  // "allychan"
  std::uint32_t protocol = network_protocol;
  std::uint32_t lane = 0;
  std::uint64_t communicator = 0;
  std::int32_t from = -1, to = -1;  // ranks of the communicator
  std::uint64_t window = 0;
  JobKey key{};
};
static_assert(sizeof(ChannelHello) == 56);

struct FrameHeader {
  enum Kind : std::uint8_t { data = 1, ask, credit, goodbye };
  enum Flag : std::uint8_t { first = 1, last = 2, fingerprinted = 4, asks = 8, stripe_unit = 16 };  // asks: a credit is to be sent when it is consumed
  static constexpr int most_stripes = 15;
  std::uint32_t magic = 0x6c6c6174;  // "tall"
  std::uint8_t kind = 0, flags = 0;  // the upper half of flags: by which stripe the payload comes; 0: it follows
  std::uint16_t culprit = 0;
  std::uint64_t total = 0;  // data: the message's bytes; credit: how much was consumed up to here
  std::uint64_t fingerprint = 0;
  std::uint64_t sent_at = 0;
  std::uint32_t operation = 0, bytes = 0;  // bytes: of the payload that follows
  std::uint32_t arrive_age = 0, late_age = 0;
  std::uint16_t called = 0;
  std::uint16_t seal = 0;      // of all of the header but this
  std::uint32_t checksum = 0;  // CRC-32C of the payload

  std::uint16_t own_seal() const {
    FrameHeader open = *this;
    open.seal = 0;
    const std::uint32_t all = crc32c(0, &open, sizeof open);
    return static_cast<std::uint16_t>(all ^ all >> 16);
  }
  int stripe() const { return flags / stripe_unit; }
  FrameTimes times() const { return {sent_at, arrive_age, late_age, culprit, called}; }
  void stamp(const FrameTimes& times) {
    sent_at = times.sent_at;
    arrive_age = times.arrive_age;
    late_age = times.late_age;
    culprit = times.culprit;
    called = times.called;
  }
  FrameInfo info() const {
    return {operation, fingerprint, (flags & fingerprinted) != 0, (flags & first) != 0, (flags & last) != 0, bytes, total, times()};
  }
};
static_assert(sizeof(FrameHeader) == 56);

/// Longer messages are nonsense.
inline constexpr std::uint64_t longest_message = std::uint64_t{1} << 48;
/// What a frame counts against the window besides its payload.
inline constexpr std::size_t frame_cost = 64;

/// What is wrong with a header that a sender of data sent, or that came back to one; empty if nothing. `most`: bytes of a payload.
inline std::string fault_of(const FrameHeader& h, bool from_sender, std::size_t most) {
  if (h.magic != FrameHeader{}.magic) return "bytes that are no frame";
  const bool fits = from_sender ? h.kind == FrameHeader::data || h.kind == FrameHeader::ask || h.kind == FrameHeader::goodbye : h.kind == FrameHeader::credit;
  if (!fits) return concat({"a frame of kind ", h.kind, ", which has no place here"});
  if (h.kind != FrameHeader::data) return h.bytes == 0 ? "" : concat({"a frame without data that announces ", h.bytes, " bytes"});
  if (h.bytes > most) return concat({"a frame of ", h.bytes, " bytes, where ", most, " are the most"});
  if (h.total > longest_message || h.bytes > h.total) return concat({"a frame of ", h.bytes, " bytes of a message of ", h.total});
  return {};
}

}  // namespace tally::inline v0::detail
