// SPDX-License-Identifier: Apache-2.0
// What lies where in memory that ranks share: the header, a line for each rank, per ordered pair of ranks a ring of slots,
// and blocks. A slot is two adjacent cache lines: a short payload travels with its header (16 bytes in the first line, 80
// in both), longer ones lie elsewhere in the ring.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "../error.hpp"
#include "../reduce.hpp"
#include "../types.hpp"

namespace tally::inline v0 {

/// Sizes that all ranks must agree on.
struct SlotOptions {
  int lanes = 2;  // one for collectives, one for messages
  std::size_t budget = std::size_t{256} << 20;  // bytes of shared memory for one communicator; what is not used is never touched
  // Per ordered pair, fewer and smaller where the budget demands it.
  int slots = 32;
  std::size_t slot_bytes = 32 << 10;
};

namespace detail {

inline constexpr std::size_t line = 64;
inline constexpr std::uint32_t slot_protocol = 7;  // raise when anything below changes its meaning

struct alignas(2 * line) Slot {
  static constexpr std::size_t inline_bytes = 80;
  std::atomic<std::uint64_t> sequence;  // k + 1 once frame k is complete
  std::uint64_t fingerprint;
  std::uint64_t sent_at;
  std::uint32_t arrive_age, late_age;
  std::uint32_t operation, bytes;
  std::uint16_t culprit;
  std::uint8_t flags, total_high;  // the whole message's bytes: 8 bits of 40
  std::uint32_t total_low;
  std::byte payload[inline_bytes];
};
static_assert(sizeof(Slot) == 2 * line && offsetof(Slot, payload) == 48, "16 bytes of payload share the header's line");
enum SlotFlag : std::uint8_t { flag_first = 1, flag_last = 2, flag_fingerprint = 4 };

struct Credit {
  std::uint64_t sent_at;
  std::uint32_t arrive_age, late_age;
  std::uint16_t culprit, called, unused[6];
};
static_assert(sizeof(Credit) == 32);

struct alignas(line) RankLine {
  std::atomic<std::uint64_t> sequence, fingerprint, count;
  std::atomic<std::uint32_t> inside, left, pid, sharing;
  std::atomic<std::uint64_t> opening_key, opening;  // see SlotTransport::open_by_key
  alignas(line) std::atomic<std::uint32_t> parked;  // loaded by every sender: never shares a line with what changes per call
  std::atomic<std::uint32_t> cores_known;
  alignas(line) std::atomic<std::uint64_t> cores[CPU_SETSIZE / 64];  // that the rank may run on
};
static_assert(sizeof(RankLine) == 4 * line && offsetof(RankLine, parked) == line);

struct alignas(line) SlotHeader {
  std::atomic<std::uint32_t> ready, fences, departed;
  std::atomic<std::uint64_t> end;  // of a job's regions, in its first one: where the next begins
  alignas(line) std::atomic<std::uint32_t> bell;   // all who are parked sleep on it; rung by counting up
  alignas(line) std::atomic<std::uint32_t> abort;  // 0 none, 1 being written, 2 written
  std::int32_t abort_code, abort_rank, abort_peer;
  char abort_text[2048];
};

}  // namespace detail

/// Where everything lies. A pure function of the rank count and the options: nothing of it is read from shared memory.
class SlotLayout {
 public:
  SlotLayout(int n, SlotOptions options) : n_(n), lanes_(options.lanes), options_(options), slots_(std::bit_floor(static_cast<unsigned>(std::max(options.slots, 1)))), slot_bytes_(round(options.slot_bytes)) {
    // Blocks have to hold an element for each rank and more; an eighth of the budget is theirs.
    const std::size_t n_of = static_cast<std::size_t>(std::max(n, 1)), block = std::min(std::size_t{3} << 20, options.budget / (8 * n_of)) / 4096 * 4096;
    staging_bytes_ = block < std::max(std::size_t{64} << 10, 128 * n_of) ? 0 : block;
    if (options.slots < 1 || options.slots > 1 << 20) throw Error(Errc::invalid_argument, {"slots must be 1 to 1048576, not ", options.slots});
    if (options.slot_bytes < 128 || options.slot_bytes > std::size_t{1} << 30)
      throw Error(Errc::invalid_argument, {"slot_bytes must be 128 to 1 GiB, not ", options.slot_bytes});
    if (options.lanes < 1 || options.lanes > 1024) throw Error(Errc::invalid_argument, {"lanes must be 1 to 1024, not ", options.lanes});
    while (bytes() > options.budget && (slots_ > 1 || slot_bytes_ > 128)) {
      if (slots_ > 8 || slot_bytes_ <= 1024) slots_ = std::max(1u, slots_ / 2), slot_bytes_ = slots_ == 1 ? round(slot_bytes_ / 2) : slot_bytes_;
      else slot_bytes_ = round(slot_bytes_ / 2);
    }
    if (bytes() > options.budget)
      throw Error(Errc::no_resources, {n, " ranks need ", bytes(), " bytes for slots, the budget is ", options.budget, ": set TALLY_SLOT_BUDGET, or Options::slots.budget"});
  }
  /// The same for another number of ranks.
  SlotLayout of(int n) const { return {n, options_}; }
  int size() const { return n_; }
  int lanes() const { return lanes_; }
  unsigned slots() const { return slots_; }
  std::size_t slot_bytes() const { return slot_bytes_; }

  std::size_t rank_line(Rank r) const { return sizeof(detail::SlotHeader) + static_cast<std::size_t>(r) * sizeof(detail::RankLine); }
  /// Room for what is to be the same on all ranks; whoever makes the memory writes it before they begin.
  static constexpr std::size_t note_bytes = 32 << 10;
  std::size_t note() const { return (rank_line(n_) + 4095) / 4096 * 4096; }
  /// The ring that `from` writes and `to` reads.
  std::size_t ring(int lane, Rank from, Rank to) const {
    const auto n = static_cast<std::size_t>(n_);
    const std::size_t pair = static_cast<std::size_t>(from) * (n - 1) + static_cast<std::size_t>(to < from ? to : to - 1);
    return rings() + (static_cast<std::size_t>(lane) * n * (n - 1) + pair) * ring_bytes();
  }
  // Within a ring: slots, payload area, the reader's counter in a line of its own, the reader's credits.
  std::size_t payloads() const { return slots_ * sizeof(detail::Slot); }
  /// A payload that is not long has a place that goes with its slot: where many rings share the caches, little memory used
  /// again and again is there when it is needed. With one ring each way that pays for shorter ones only (measured).
  std::size_t near_bytes() const { return std::min<std::size_t>(n_ > 2 ? 2048 : 512, slot_bytes_); }
  /// Longer ones go round in an area, whatever their length. By default that is 2 MiB, more than a core's own cache holds:
  /// its lines have left that for the shared cache by the time they are used again, and are written and read there 2 to 4
  /// times faster than out of another core's cache. Twice what all slots can hold, so that room for a slot is room for
  /// its payload, wherever the area's end cuts.
  std::size_t payload_area() const { return slot_bytes_ > near_bytes() ? 2 * slots_ * (slot_bytes_ + payload_gap()) : 0; }
  /// Left free after each. What the reader's core fetches ahead, beyond a payload's end, would be taken from the writer's
  /// core just when it is about to be written.
  std::size_t payload_gap() const { return std::min<std::size_t>(2048, slot_bytes_ / 16 / (2 * detail::line) * (2 * detail::line)); }
  /// A payload lies in one piece: where it would not fit, the area begins anew. Writer and reader both count.
  std::size_t payload_place(std::uint64_t slot, std::size_t at, std::size_t bytes) const {
    return bytes <= near_bytes() ? payload_area() + slot * near_bytes() : at + bytes <= payload_area() ? at : 0;
  }
  std::size_t after_payload(std::size_t at, std::size_t bytes) const {
    return bytes <= near_bytes() ? at : payload_place(0, at, bytes) + (bytes + 2 * detail::line - 1) / (2 * detail::line) * (2 * detail::line) + payload_gap();
  }
  std::size_t consumed() const { return payloads() + payload_area() + slots_ * near_bytes(); }
  std::size_t credits() const { return consumed() + detail::line; }
  std::size_t ring_bytes() const { return (credits() + slots_ * sizeof(detail::Credit) + 2 * detail::line - 1) / (2 * detail::line) * (2 * detail::line); }
  /// A block for every rank, for shares of what others cannot reach. Memory that is not used is never touched.
  std::size_t staging(Rank r) const { return end_of_rings() + static_cast<std::size_t>(r) * staging_bytes(); }
  std::size_t staging_bytes() const { return staging_bytes_; }  // 0: they have none
  std::size_t bytes() const { return end_of_rings() + static_cast<std::size_t>(n_) * staging_bytes(); }
  /// What two processes must agree on before they use the same mapping.
  std::uint64_t hash() const {
    return detail::hash_text(detail::concat({"tally slots ", detail::slot_protocol, " ", n_, " ", lanes_, " ", slots_, " ", slot_bytes_, " ", bytes()}));
  }

 private:
  static std::size_t round(std::size_t bytes) { return std::max<std::size_t>(128, bytes / 128 * 128); }
  std::size_t rings() const { return note() + note_bytes; }
  std::size_t end_of_rings() const {
    const auto n = static_cast<std::size_t>(n_);
    return (rings() + static_cast<std::size_t>(lanes_) * n * (n - 1) * ring_bytes() + 4095) / 4096 * 4096;
  }

  int n_, lanes_;
  SlotOptions options_;
  unsigned slots_;
  std::size_t slot_bytes_, staging_bytes_ = 0;
};

}  // namespace tally::inline v0
