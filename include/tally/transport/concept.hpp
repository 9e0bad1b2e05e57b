// SPDX-License-Identifier: Apache-2.0
// What a transport is: something that moves bytes of posted transfers between ranks and never blocks. A transfer
// is owned by whoever posts it and linked into the transport's queues, so posting allocates nothing.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "../clock.hpp"
#include "../error.hpp"
#include "../reduce.hpp"
#include "../types.hpp"

namespace tally::inline v0 {

/// Who is to blame for something not happening earlier, and until when: the rank that came last, and its arrival.
struct Lateness {
  Ticks until = 0;
  Rank culprit = 0;
  void raise(const Lateness& other) {
    if (other.until > until) *this = other;
  }
};

/// What every frame and every credit says about its sender (how it is used: Progress::heard). Ages are in units of 32 ticks and saturate.
struct FrameTimes {
  Ticks sent_at = 0;
  std::uint32_t arrive_age = 0, late_age = 0;
  std::uint16_t culprit = 0;
  std::uint16_t called = 0;  // of credits: low bits of the last collective operation that its sender has called
};

/// Moving this much takes no longer than reading the clock: it is not timed apart from headers.
inline constexpr std::size_t short_bytes = 256;

/// Whether a receive takes whatever comes next, or the next message that was sent for it. On a lane all do the same.
enum class Matching : std::uint8_t {
  order,        // the next one
  fingerprint,  // the next one with the same fingerprint
  any,          // the next one that no receive before this one takes
};

/// One side of one message. `ready` and `done` are watermarks in bytes: the owner raises ready, the transport done.
struct Transfer {
  const std::byte* from = nullptr;  // send: the source. receive: the accumulator if there is a fold
  std::byte* to = nullptr;          // receive: the destination
  std::size_t bytes = 0, ready = 0, done = 0;
  const Fold* fold = nullptr;  // receive: how to combine, null to copy
  std::uint64_t fingerprint = 0;
  std::uint32_t operation = 0;  // sequence number, low bits
  std::uint32_t step = 0;       // for the owner
  Rank peer = 0;
  std::uint16_t lane = 0;
  std::uint16_t grain = 1;  // bytes that are never split
  Side side = Side::right;
  bool is_send = false;
  bool past_caches = false;  // receive without a fold: nobody has looked at the destination lately, or will soon
  bool pending = false;  // posted, and not yet complete or cancelled
  bool prompt = false;   // send: it leaves as soon as what it answers is there, whoever drives that
  Matching matching = Matching::order;
  Lateness inherited;    // what this transfer's dependencies were late by
  Lateness late;         // the same and what its own frames or credits were late by
  Transfer* next = nullptr;
  void* owner = nullptr;  // for the owner, too
};
static_assert(sizeof(Transfer) == 128);

/// What a frame's header claims, already checked against the transport's own limits.
struct FrameInfo {
  std::uint32_t operation = 0;
  std::uint64_t fingerprint = 0;  // only where has_fingerprint
  bool has_fingerprint = false, first = false, last = false;  // first, last of its message
  std::size_t bytes = 0, total = 0;  // of the frame, of its message
  FrameTimes times;
  std::size_t begin = in_order;  // in its message; in_order: behind what is done
  static constexpr std::size_t in_order = ~std::size_t{0};

  std::size_t begin_in(const Transfer& t) const { return begin == in_order ? t.done : begin; }
  /// Whether it is a part of t, in whole elements, and says rightly whether it is the first and the last.
  bool fits(const Transfer& t) const {
    const std::size_t at = begin_in(t);
    return first == (at == 0) && bytes <= t.bytes - at && last == (bytes == t.bytes - at) && bytes % t.grain == 0;
  }
};

/// What a rank says about itself, for other ranks' errors.
struct RankStatus {
  std::uint64_t sequence = 0, fingerprint = 0, count = 0;
  enum Place : std::uint32_t { outside, inside_operation, inside_message } inside = outside;
  bool left = false;
};

enum class Liveness : std::uint8_t { alive, left, dead };

struct AbortNotice {
  Errc code = Errc::aborted;
  Rank rank = -1, peer = -1;
  std::string text;
};

/// Cumulative since creation; payload only.
struct TransportCounters {
  std::uint64_t bytes_sent = 0, bytes_received = 0, messages_sent = 0, messages_received = 0, frames_sent = 0, overhead_sent = 0;
};

/// A probe is told what happens inside poll(), so that time is booked rightly and dependents move on at once.
template <class P>
concept Probe = requires(P& probe, Transfer& transfer, const FrameInfo& frame, const FrameTimes& times) {
  probe.arrived(transfer, frame);                                // a frame of this transfer is here; may throw
  // probe.unexpected(peer, frame): a message that no receive waits for. Where to put it, or null: it stays where it is
  { probe.unexpected(Rank{}, frame) } -> std::same_as<Transfer*>;
  probe.credited(transfer, times);                               // a send that had no room has room again
  probe.fetched(transfer, times);                                // the peer has taken what was kept for it
  probe.continued(transfer, times);                              // more of a frame that has arrived is here, which had to be waited for
  probe.drained(transfer);                                       // a send that the network was too slow for goes on; (transfer, true): by being copied
  probe.copying(transfer);                                       // from here on, until told otherwise, bytes are copied
  probe.trying(transfer);                                        // the same where there were none the last time: continued() or drained() if there are now
  probe.reducing(transfer);                                      // ... or combined
  probe.moved(transfer);                                         // done was raised; !pending if that was all
  { probe.stamp(transfer) } -> std::same_as<FrameTimes>;         // for a frame
  { probe.credit_stamp(transfer) } -> std::same_as<FrameTimes>;  // for a credit
};

/// Transports. Within a (lane, peer, direction) transfers complete in the order they were posted, and the k-th send
/// meets the peer's k-th receive, which must have the same size; but see Matching.
template <class T>
concept Transport = requires(T& t, const T& c, Transfer& transfer, RankStatus status, AbortNotice notice, nanoseconds limit, std::span<const Rank> members, Rank rank) {
  { c.rank() } -> std::same_as<Rank>;
  { c.size() } -> std::same_as<int>;
  { c.lanes() } -> std::same_as<int>;
  { c.origin(rank) } -> std::same_as<Rank>;  // which of the job's ranks that is
  { c.frame_bytes() } -> std::same_as<std::size_t>;  // no grain may be larger
  { c.name() } -> std::convertible_to<std::string_view>;
  { c.counters() } -> std::convertible_to<TransportCounters>;
  // post(transfer, probe): queues it, and may begin with it
  t.cancel(transfer);  // on return the transport will not touch its memory again
  // poll(probe): moves what can move; true if anything did
  t.enter(status);  // what this rank is in, for other ranks to see
  t.exit();
  { c.status(rank) } -> std::same_as<RankStatus>;
  { t.liveness(rank) } -> std::same_as<Liveness>;
  t.abort(notice);
  { c.aborted() } -> std::same_as<bool>;
  { c.abort_notice() } -> std::same_as<AbortNotice>;
  t.flush();  // nobody goes on sleeping for whom something was moved; poll() does the same at its end
  // park(limit, recheck): sleeps until a peer may have moved, an abort, or the limit
  t.interrupt();  // ends a park() of this rank's that another thread is in, or about to be in after its recheck
  { t.crowded() } -> std::same_as<bool>;  // more ranks than cores to run them
  t.leave();
  // Another transport between some of the ranks, whose rank i is members[i]: members[0] reserves it, all members open
  // the token, then members[0] releases it.
  { t.reserve(members) } -> std::same_as<std::uint64_t>;
  { t.open(std::uint64_t{}, members) } -> std::same_as<std::unique_ptr<T>>;
  t.release(std::uint64_t{});
  t.discard(std::uint64_t{}, members);  // before that: not all could open it, and nobody has it open any more
};

namespace detail {

/// A transport may have something left of what is done for its rank, which goes on its way while it is looked after: settle() does.
template <class T>
bool has_rest(const T& transport) {
  if constexpr (requires { transport.has_rest(); }) return transport.has_rest();
  else return false;
}
template <class T>
void settle(T& transport) {
  if constexpr (requires { transport.settle(); }) transport.settle();
}

}  // namespace detail

/// Transports whose ranks can have memory that all can load and store. An engine that is about to touch other ranks'
/// memory says so and looks for an abort afterwards; one that aborts waits until nobody touches its memory.
template <class T>
concept DirectAccess = Transport<T> && requires(T& t, const T& c, Rank rank) {
  { t.reserve(std::size_t{}) } -> std::same_as<std::uint64_t>;
  { t.map(std::uint64_t{}, std::size_t{}) } -> std::same_as<std::shared_ptr<std::byte>>;
  t.discard(std::uint64_t{}, std::size_t{});  // not all could map it, and nobody has it mapped any more
  { c.one_address_space() } -> std::same_as<bool>;
  { c.staging(rank) } -> std::same_as<std::byte*>;  // a block of each rank's that all can load and store
  { c.staging_bytes() } -> std::same_as<std::size_t>;
  t.sharing(true);
  t.shared(std::uint64_t{}, std::uint64_t{});  // to count: bytes stored to and loaded from others
  { c.is_sharing(rank) } -> std::same_as<bool>;
};

}  // namespace tally::inline v0
