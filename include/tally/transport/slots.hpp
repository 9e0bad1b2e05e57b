// SPDX-License-Identifier: Apache-2.0
// Moves bytes through memory that all ranks can load and store: per ordered pair of ranks a ring of slots,
// written by one and read by the other, with sequence numbers that only grow, so there are no locks and no
// resets. A slot is two adjacent cache lines: a short payload travels with its header (16 bytes in the first
// line, 80 in both), longer ones lie elsewhere in the ring. Where the memory comes from and how a dead rank is noticed
// is the business of SlotMemory: transport/thread.hpp and transport/shm.hpp.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../copy.hpp"
#include "../topology.hpp"
#include "../wait.hpp"
#include "concept.hpp"
#include "queue.hpp"
#include "slot_layout.hpp"

namespace tally::inline v0 {

/// Zeroed memory that all ranks can load and store, laid out by `layout`.
class SlotMemory {
 public:
  /// `origins`: which of the job's ranks these are; empty if all, in order.
  explicit SlotMemory(const SlotLayout& layout, std::vector<Rank> origins = {}) : layout_(layout), origins_(std::move(origins)) {}
  virtual ~SlotMemory() = default;
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;

  const SlotLayout& layout() const { return layout_; }
  /// The job's rank that rank r is.
  Rank origin(Rank r) const { return origins_.empty() ? r : origins_[static_cast<std::size_t>(r)]; }
  std::byte* base() const { return base_; }
  detail::SlotHeader& header() const { return *reinterpret_cast<detail::SlotHeader*>(base_); }
  detail::RankLine& rank_line(Rank r) const { return *reinterpret_cast<detail::RankLine*>(base_ + layout_.rank_line(r)); }

  /// A plain object in the note; see SlotLayout::note.
  template <class T>
  void write_note(const T& what) const {
    static_assert(sizeof(T) + detail::line <= SlotLayout::note_bytes && std::is_trivially_copyable_v<T>);
    const std::uint64_t size = sizeof what;
    std::memcpy(base_ + layout_.note(), &size, sizeof size);
    std::memcpy(base_ + layout_.note() + detail::line, &what, sizeof what);
  }
  template <class T>
  void read_note(T& what) const {
    std::uint64_t size = 0;
    std::memcpy(&size, base_ + layout_.note(), sizeof size);
    if (size != sizeof what) throw Error(Errc::protocol, {"the note in shared memory has ", size, " bytes, expected ", sizeof what, ": were the ranks built with the same tally?"});
    std::memcpy(&what, base_ + layout_.note() + detail::line, sizeof what);
  }

  virtual std::string_view name() const = 0;
  /// Whether the rank's process (or thread) still runs; whether it said goodbye is in its line.
  virtual bool runs(Rank) = 0;
  /// A memory like this one for some of its ranks: rank i of it is members[i]. members[0] reserves it and tells the
  /// others the token, each of them opens it, and when all have, members[0] releases the token.
  virtual std::uint64_t reserve(std::span<const Rank> members) = 0;
  virtual std::shared_ptr<SlotMemory> open(std::uint64_t token, std::span<const Rank> members, Rank me) = 0;  // me: in it
  virtual void release(std::uint64_t token) = 0;
  /// Zeroed memory for other purposes, likewise; it goes when all have let go of it.
  virtual std::uint64_t reserve(std::size_t bytes) = 0;
  virtual std::shared_ptr<std::byte> map(std::uint64_t token, std::size_t bytes) = 0;
  /// Not all could open or map it: nobody uses it any more.
  virtual void discard(std::uint64_t token, std::size_t bytes) = 0;
  /// Whether an address of one rank means the same to the others.
  virtual bool one_address_space() const = 0;

  /// Tells all ranks to give up. The first notice wins. From any thread.
  void abort(const AbortNotice& notice) {
    detail::SlotHeader& h = header();
    std::uint32_t none = 0;
    if (h.abort.compare_exchange_strong(none, 1)) {
      h.abort_code = static_cast<int>(notice.code);
      h.abort_rank = notice.rank;
      h.abort_peer = notice.peer;
      const std::size_t length = std::min(notice.text.size(), sizeof h.abort_text - 1);
      std::memcpy(h.abort_text, notice.text.data(), length);
      h.abort_text[length] = 0;
      h.abort.store(2);
    }
    wake_all();
  }
  void wake_all() {
    full_fence();
    for (Rank r = 0; r < layout_.size(); ++r) rank_line(r).parked.store(0);
    header().bell.fetch_add(1);
    futex_wake_those(~0u, header().bell);
  }

  /// Rings that hold frames nobody read: after all ranks have left, a sign of mismatched calls.
  struct Unread {
    Rank from = -1, to = -1;
    std::uint32_t operation = 0;
    std::uint64_t fingerprint = 0;
  };
  Unread unread() const {
    for (int lane = 0; lane < layout_.lanes(); ++lane)
      for (Rank from = 0; from < layout_.size(); ++from)
        for (Rank to = 0; to < layout_.size(); ++to) {
          if (from == to) continue;
          std::byte* ring = base_ + layout_.ring(lane, from, to);
          const std::uint64_t consumed = reinterpret_cast<std::atomic<std::uint64_t>*>(ring + layout_.consumed())->load();
          const auto& slot = reinterpret_cast<detail::Slot*>(ring)[consumed & (layout_.slots() - 1)];
          if (slot.sequence.load() == consumed + 1) return {from, to, slot.operation, slot.fingerprint};
        }
    return {};
  }

 protected:
  SlotLayout layout_of(std::span<const Rank> members) const { return layout_.of(static_cast<int>(members.size())); }
  std::vector<Rank> origins_of(std::span<const Rank> members) const {
    std::vector<Rank> origins;
    for (const Rank r : members) origins.push_back(origin(r));
    return origins;
  }
  std::byte* base_ = nullptr;

 private:
  SlotLayout layout_;
  std::vector<Rank> origins_;
};

/// Wakes a rank that sleeps on a descriptor; see transport/doorbell.hpp.
class Doorbell {
 public:
  virtual ~Doorbell() = default;
  /// Readable once somebody rang.
  virtual int fd() const = 0;
  virtual void ring(Rank) const = 0;
  virtual void ring_all() const = 0;
  /// Forgets who rang.
  virtual void answer() const = 0;
  /// For `size` of these ranks, whose rank `me` this one is; no two of theirs have the same key.
  virtual std::unique_ptr<Doorbell> another(std::uint64_t key, Rank me, int size) const = 0;
};

class SlotTransport {
 public:
  /// `crowded`: other ranks want the same cores, however many these are. `numbers`: what transfers call these ranks, where that is
  /// not what they are here, because they are but some of a communicator's.
  SlotTransport(std::shared_ptr<SlotMemory> memory, Rank me, bool crowded = false, std::vector<Rank> numbers = {})
      : memory_(std::move(memory)), layout_(memory_->layout()), me_(me), mask_(layout_.slots() - 1), always_crowded_(crowded), numbers_(std::move(numbers)),
        width_(numbers_.empty() ? layout_.size() : *std::max_element(numbers_.begin(), numbers_.end()) + 1), endpoints_(static_cast<std::size_t>(layout_.lanes() * width_)), line_(&memory_->rank_line(me)), header_(&memory_->header()) {
    sending_.reserve(endpoints_.size());
    receiving_.reserve(endpoints_.size());
    for (int lane = 0; lane < lanes(); ++lane)
      for (Rank peer = 0; peer < size(); ++peer) {
        if (peer == me) continue;
        Endpoint& e = endpoint(lane, numbers_.empty() ? peer : numbers_[static_cast<std::size_t>(peer)]);
        e.out = ring(lane, me, peer);
        e.in = ring(lane, peer, me);
        e.peer = peer;
        e.peer_parked = &memory_->rank_line(peer).parked;
        e.peer_bit = bell_bit(peer);
      }
    fences_ = !AsymmetricBarrier::register_process();
    if (fences_) header_->fences.store(1);
    publish_cores();
  }
  SlotTransport(const SlotTransport&) = delete;
  SlotTransport& operator=(const SlotTransport&) = delete;

  static constexpr bool sleeps_apart = true;  // see AnyTransport
  Rank rank() const { return me_; }
  int size() const { return layout_.size(); }
  int lanes() const { return layout_.lanes(); }
  Rank origin(Rank r) const { return memory_->origin(r); }
  std::size_t frame_bytes() const { return layout_.slot_bytes(); }
  std::string_view name() const { return memory_->name(); }
  const TransportCounters& counters() const { return counters_; }
  /// Whether ranks outnumber the cores they may run on, all ranks' cores together. Known for good once all are here.
  bool crowded() {
    if (!cores_known_) count_cores();
    return crowded_;
  }

  /// A send that is first in its queue goes out at once, as far as it can in one frame.
  template <Probe P>
  void post(Transfer& t, P& probe) {
    Endpoint& e = endpoint(t.lane, t.peer);
    if (!(t.is_send ? e.sends : e.receives).push(t)) return;
    if (!t.is_send) receiving_.push_back(&e);
    else if (!advance_send(e, probe) || e.sends.head) sending_.push_back(&e);
  }

  void cancel(Transfer& t) {
    if (!t.pending) return;
    Endpoint& e = endpoint(t.lane, t.peer);
    TransferQueue& queue = t.is_send ? e.sends : e.receives;
    queue.remove(t);
    if (!queue.head) std::erase(t.is_send ? sending_ : receiving_, &e);
  }

  /// At most one frame per peer and direction, so that no peer starves another.
  template <Probe P>
  bool poll(P& probe) {
    bool moved = false;
    for (std::size_t i = 0; i < sending_.size();) {
      Endpoint& e = *sending_[i];
      if (advance_send(e, probe)) {
        moved = true;
        if (!e.sends.head) {
          drop(sending_, i);
          continue;
        }
      }
      ++i;
    }
    for (std::size_t i = 0; i < receiving_.size();) {
      Endpoint& e = *receiving_[i];
      if (advance_receive(e, probe)) {
        moved = true;
        if (!e.receives.head) {
          drop(receiving_, i);
          continue;
        }
      }
      ++i;
    }
    flush();
    return moved;
  }
  /// Wakes all who sleep and whom something was moved to or from since the last time, in one call.
  void flush() {
    if (to_wake_ == 0) return;
    header_->bell.fetch_add(1);
    futex_wake_those(std::exchange(to_wake_, 0), header_->bell);
  }

  /// Readers must never combine one operation's sequence number with another's fingerprint: the number is
  /// withdrawn first and written last, and what is read between two equal numbers belongs together.
  void enter(const RankStatus& status) {
    line_->sequence.store(changing, std::memory_order_relaxed);
    line_->fingerprint.store(status.fingerprint, std::memory_order_release);
    line_->count.store(status.count, std::memory_order_release);
    line_->inside.store(status.inside, std::memory_order_release);
    line_->sequence.store(status.sequence, std::memory_order_release);
  }
  void exit() { line_->inside.store(0, std::memory_order_release); }
  RankStatus status(Rank r) const {
    const detail::RankLine& l = memory_->rank_line(r);
    RankStatus status;
    status.left = l.left.load(std::memory_order_relaxed) != 0;
    for (int tries = 0; tries < 100; ++tries) {  // its writer may have died over it
      const std::uint64_t before = l.sequence.load(std::memory_order_acquire);
      status.fingerprint = l.fingerprint.load(std::memory_order_acquire);
      status.count = l.count.load(std::memory_order_acquire);
      status.inside = static_cast<RankStatus::Place>(l.inside.load(std::memory_order_acquire));
      status.sequence = l.sequence.load(std::memory_order_relaxed);
      if (before == status.sequence && before != changing) return status;
      cpu_pause();
    }
    return {0, 0, 0, RankStatus::outside, status.left};
  }
  Liveness liveness(Rank r) {
    if (memory_->rank_line(r).left.load(std::memory_order_acquire)) return Liveness::left;
    return memory_->runs(r) ? Liveness::alive : Liveness::dead;
  }

  void abort(const AbortNotice& notice) {
    memory_->abort(notice);
    if (doorbell_) doorbell_->ring_all();
  }
  bool aborted() const { return header_->abort.load(std::memory_order_relaxed) != 0; }
  AbortNotice abort_notice() const {
    // Who writes a notice may die over it: do not wait for ever.
    for (int i = 0; header_->abort.load(std::memory_order_acquire) == 1 && i < 1000; ++i) std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (header_->abort.load(std::memory_order_acquire) != 2) return {Errc::aborted, -1, -1, "a rank died while it was aborting the communicator"};
    const std::size_t length = ::strnlen(header_->abort_text, sizeof header_->abort_text);
    return {static_cast<Errc>(header_->abort_code), header_->abort_rank, header_->abort_peer, std::string(header_->abort_text, length)};
  }

  /// Sleeps until a peer moved something for or by this rank, an abort, or the limit. `recheck` runs once between
  /// the announcement and the sleep; true from it cancels the sleep.
  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    announce(by_bell, recheck, [&](std::uint32_t bell) { futex_wait_as(bell_bit(me_), header_->bell, bell, limit); });
  }
  /// The same, with a sleep of the caller's own, which ends when doorbell() rings.
  template <class Recheck, class Sleep>
  void park_at_doorbell(Recheck&& recheck, Sleep&& sleep) {
    announce(by_doorbell, recheck, [&](std::uint32_t) { sleep(); });
    doorbell_->answer();
  }
  void hang(std::unique_ptr<Doorbell> doorbell) { doorbell_ = std::move(doorbell); }
  const Doorbell& doorbell() const { return *doorbell_; }

  void interrupt() {
    full_fence();
    const std::uint32_t how = line_->parked.exchange(0);
    if (how == 0) return;
    if (how == by_doorbell) return doorbell_->ring(me_);
    header_->bell.fetch_add(1);
    futex_wake_those(bell_bit(me_), header_->bell);
  }

  /// Whether nothing is to be moved.
  bool idle() const { return sending_.empty() && receiving_.empty(); }

  /// The line whose change this rank waits for, if there is but one.
  const void* awaited() const {
    if (sending_.size() + receiving_.size() != 1) return nullptr;
    if (sending_.empty()) return &receiving_[0]->in.slots[receiving_[0]->received & mask_];
    return sending_[0]->out.consumed;
  }

  // Memory that all ranks can load and store (see DirectAccess).
  std::uint64_t reserve(std::size_t bytes) { return memory_->reserve(bytes); }
  std::shared_ptr<std::byte> map(std::uint64_t token, std::size_t bytes) { return memory_->map(token, bytes); }
  void discard(std::uint64_t token, std::size_t bytes) { memory_->discard(token, bytes); }
  bool one_address_space() const { return memory_->one_address_space(); }
  std::byte* staging(Rank r) const { return memory_->base() + layout_.staging(r); }
  std::size_t staging_bytes() const { return layout_.staging_bytes(); }
  void sharing(bool now) { line_->sharing.store(now, now ? std::memory_order_relaxed : std::memory_order_release), now ? full_fence() : void(); }
  void shared(std::uint64_t sent, std::uint64_t received) { counters_.bytes_sent += sent, counters_.bytes_received += received; }
  bool is_sharing(Rank r) const { return memory_->rank_line(r).sharing.load(std::memory_order_acquire) != 0; }

  std::uint64_t reserve(std::span<const Rank> members) { return memory_->reserve(members); }
  std::unique_ptr<SlotTransport> open(std::uint64_t token, std::span<const Rank> members) {
    const auto me = static_cast<Rank>(std::find(members.begin(), members.end(), me_) - members.begin());
    return std::make_unique<SlotTransport>(memory_->open(token, members, me), me, crowded());
  }
  void release(std::uint64_t token) { memory_->release(token); }
  /// The same without messages: all of `members` call it with the same `key`, which no two of their calls share. The first of them
  /// reserves and says in its line what; the others wait for that until is_over() says that it will not.
  template <class F>
  std::unique_ptr<SlotTransport> open_by_key(std::uint64_t key, std::span<const Rank> members, std::vector<Rank> numbers, F&& is_over) {
    if (opened_by_key_ != 0) memory_->release(std::exchange(opened_by_key_, 0));  // all have opened it, or there would be no next one
    detail::RankLine& first = memory_->rank_line(members[0]);
    std::uint64_t token = 0;
    if (members[0] == me_) {
      try {
        token = memory_->reserve(members);
      } catch (const Error&) {
        first.opening.store(~std::uint64_t{0});
        first.opening_key.store(key, std::memory_order_release);
        throw;
      }
      opened_by_key_ = token;
      first.opening.store(token);
      first.opening_key.store(key, std::memory_order_release);
    } else {
      while (first.opening_key.load(std::memory_order_acquire) != key) {
        if (liveness(members[0]) != Liveness::alive || is_over()) throw TransportError(Errc::peer_lost, {"a rank of this host did not open its part of the communicator"}, {me_, members[0], 0, {}});
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      token = first.opening.load();
      if (token == ~std::uint64_t{0}) throw Error(Errc::no_resources, {"a rank of this host could not reserve memory for the communicator"}, {me_, members[0], 0, {}});
    }
    const auto me = static_cast<Rank>(std::find(members.begin(), members.end(), me_) - members.begin());
    auto opened = std::make_unique<SlotTransport>(memory_->open(token, members, me), me, crowded(), std::move(numbers));
    if (doorbell_) opened->hang(doorbell_->another(key, me, static_cast<int>(members.size())));
    return opened;
  }
  void discard(std::uint64_t token, std::span<const Rank> members) { memory_->discard(token, layout_.of(static_cast<int>(members.size())).bytes()); }

  /// Goodbye: peers that still need something of this rank get an error instead of waiting.
  void leave() {
    if (::getpid() != process_) return;  // a child that this rank forked: it never was a rank
    line_->left.store(1);
    memory_->wake_all();
    if (doorbell_) doorbell_->ring_all();
  }

 private:
  static constexpr std::uint64_t changing = ~std::uint64_t{0};
  static constexpr std::uint32_t by_bell = 1, by_doorbell = 2;  // how who is parked is to be woken
  struct Ring {
    detail::Slot* slots = nullptr;
    std::byte* payloads = nullptr;
    std::atomic<std::uint64_t>* consumed = nullptr;
    detail::Credit* credits = nullptr;
  };
  struct Endpoint {
    Ring out, in;
    std::atomic<std::uint32_t>* peer_parked = nullptr;
    std::uint32_t peer_bit = 0;
    Rank peer = -1;
    TransferQueue sends, receives;
    std::uint64_t sent = 0, credit = 0;  // frames sent, and known to be consumed
    std::uint64_t received = 0;
    std::size_t out_at = 0, in_at = 0;  // where the next payload of either direction may begin
    std::size_t frame = 0, taken = 0;   // bytes of the frame at the head, and how many of them are consumed
    std::uint32_t operation = 0;  // of the last frame sent
    bool starved = false;         // the head of sends found no room
    bool seen = false;            // the frame at the head has been announced
  };

  /// Ranks 32 apart share a bit: one of them may wake up for nothing.
  static std::uint32_t bell_bit(Rank r) { return 1u << (static_cast<unsigned>(r) % 32); }
  Endpoint& endpoint(int lane, Rank peer) { return endpoints_[static_cast<std::size_t>(lane * width_ + peer)]; }
  Ring ring(int lane, Rank from, Rank to) const {
    std::byte* base = memory_->base() + layout_.ring(lane, from, to);
    return {reinterpret_cast<detail::Slot*>(base), base + layout_.payloads(), reinterpret_cast<std::atomic<std::uint64_t>*>(base + layout_.consumed()),
            reinterpret_cast<detail::Credit*>(base + layout_.credits())};
  }
  static void drop(std::vector<Endpoint*>& list, std::size_t i) {
    list[i] = list.back();
    list.pop_back();
  }
  void wake(const Endpoint& e) {
    std::atomic_signal_fence(std::memory_order_seq_cst);  // not to be looked up before the frame is written
    if (fences_ || header_->fences.load(std::memory_order_relaxed) != 0) full_fence();
    if (e.peer_parked->load(std::memory_order_relaxed) != 0) wake_parked(e);
  }
  [[gnu::cold, gnu::noinline]] void wake_parked(const Endpoint& e) {
    const std::uint32_t how = e.peer_parked->exchange(0);
    if (how == by_bell) to_wake_ |= e.peer_bit;
    else if (how == by_doorbell && doorbell_) doorbell_->ring(e.peer);
  }
  template <class Recheck, class Sleep>
  [[gnu::always_inline]] void announce(std::uint32_t how, Recheck&& recheck, Sleep&& sleep) {
    struct Announcement {
      std::atomic<std::uint32_t>& parked;
      ~Announcement() { parked.store(0, std::memory_order_relaxed); }
    } announcement{line_->parked};
    line_->parked.store(how, std::memory_order_relaxed);
    const std::uint32_t bell = header_->bell.load(std::memory_order_acquire);
    if (fences_) full_fence();  // and all senders fence, too
    else AsymmetricBarrier::heavy();
    // A peer may have taken the announcement, meaning an earlier one, before the bell was looked at: it will not ring again.
    if (!recheck() && line_->parked.load(std::memory_order_relaxed) != 0) sleep(bell);
  }
  void publish_cores() {
    cpu_set_t set = own_cores();
    if (CPU_COUNT(&set) == 0) CPU_SET(0, &set);
    for (std::size_t core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &set)) line_->cores[core / 64].fetch_or(std::uint64_t{1} << (core % 64));
    line_->cores_known.store(1, std::memory_order_release);
    crowded_ = always_crowded_ || size() > ::sysconf(_SC_NPROCESSORS_ONLN);
  }
  void count_cores() {
    for (Rank r = 0; r < size(); ++r)
      if (!memory_->rank_line(r).cores_known.load(std::memory_order_acquire)) return;
    int cores = 0;
    for (std::size_t word = 0; word < CPU_SETSIZE / 64; ++word) {
      std::uint64_t any = 0;
      for (Rank r = 0; r < size(); ++r) any |= memory_->rank_line(r).cores[word].load(std::memory_order_relaxed);
      cores += std::popcount(any);
    }
    crowded_ = always_crowded_ || size() > cores;
    cores_known_ = true;
  }
  template <Probe P>
  bool advance_send(Endpoint& e, P& probe) {
    Transfer& t = *e.sends.head;
    if (t.done == t.ready && t.bytes != 0) return false;
    if (e.sent - e.credit > mask_) {
      e.credit = e.out.consumed->load(std::memory_order_acquire);
      if (e.sent - e.credit > mask_) {
        // More than all slots in use is nonsense from a broken peer; it is never room.
        e.starved = true;
        return false;
      }
      if (e.starved) {
        const detail::Credit& c = e.out.credits[e.sent & mask_];
        probe.credited(t, FrameTimes{c.sent_at, c.arrive_age, c.late_age, c.culprit, c.called});
        e.starved = false;
      }
    }
    const std::uint64_t index = e.sent & mask_;
    detail::Slot& slot = e.out.slots[index];
    const std::size_t remaining = t.ready - t.done;
    std::size_t bytes = remaining;
    if (bytes > layout_.slot_bytes()) bytes = layout_.slot_bytes() - layout_.slot_bytes() % t.grain;
    const std::byte* from = t.from + t.done;
    if (bytes <= 8) copy_small(slot.payload, from, bytes);
    else if (bytes <= detail::Slot::inline_bytes) std::memcpy(slot.payload, from, bytes);
    else {
      if (bytes > short_bytes) probe.copying(t);
      std::memcpy(e.out.payloads + layout_.payload_place(index, e.out_at, bytes), from, bytes);
      e.out_at = layout_.after_payload(e.out_at, bytes);
    }
    std::uint8_t flags = t.done == 0 ? detail::flag_first : 0;
    t.done += bytes;
    if (t.done == t.bytes) flags |= detail::flag_last;
    if (e.operation != t.operation || e.sent == 0 || t.matching != Matching::order) {
      e.operation = t.operation;
      slot.fingerprint = t.fingerprint;
      flags |= detail::flag_fingerprint;
    }
    const FrameTimes times = probe.stamp(t);
    slot.sent_at = times.sent_at;
    slot.arrive_age = times.arrive_age;
    slot.late_age = times.late_age;
    slot.culprit = times.culprit;
    slot.operation = t.operation;
    slot.bytes = static_cast<std::uint32_t>(bytes);
    slot.flags = flags;
    slot.total_high = static_cast<std::uint8_t>(t.bytes >> 32);
    slot.total_low = static_cast<std::uint32_t>(t.bytes);
    slot.sequence.store(++e.sent, std::memory_order_release);
    wake(e);

    counters_.bytes_sent += bytes;
    counters_.messages_sent += flags & detail::flag_first;
    ++counters_.frames_sent;
    counters_.overhead_sent += bytes <= detail::Slot::inline_bytes ? sizeof(detail::Slot) - bytes : sizeof(detail::Slot);
    if (t.done == t.bytes) e.sends.pop();
    probe.moved(t);
    return true;
  }

  template <Probe P>
  bool advance_receive(Endpoint& e, P& probe) {
    if (const Transfer& t = *e.receives.head; t.done == t.ready && t.bytes != 0) return false;
    const std::uint64_t index = e.received & mask_;
    const detail::Slot& slot = e.in.slots[index];
    if (slot.sequence.load(std::memory_order_acquire) != e.received + 1) return false;
    if (!e.seen) {
      e.frame = slot.bytes;
      if (e.frame > layout_.slot_bytes()) broken(*e.receives.head, e.frame);
      const FrameInfo info{slot.operation, slot.fingerprint, (slot.flags & detail::flag_fingerprint) != 0, (slot.flags & detail::flag_first) != 0,
                           (slot.flags & detail::flag_last) != 0, e.frame, std::size_t{slot.total_high} << 32 | slot.total_low, FrameTimes{slot.sent_at, slot.arrive_age, slot.late_age, slot.culprit, 0}};
      if (e.receives.head->matching != Matching::order && info.first && !e.receives.match(info, probe)) return false;
      probe.arrived(*e.receives.head, info);
      e.seen = true;
      counters_.messages_received += slot.flags & detail::flag_first;
    }
    Transfer& t = *e.receives.head;
    const std::size_t bytes = e.frame;
    const std::size_t take = std::min(bytes - e.taken, t.ready - t.done);
    if (take > 0) {
      const bool in_slot = bytes <= detail::Slot::inline_bytes;
      const std::byte* in = (in_slot ? slot.payload : e.in.payloads + layout_.payload_place(index, e.in_at, bytes)) + e.taken;
      std::byte* to = t.to + t.done;
      if (!t.fold) {
        if (bytes > short_bytes) probe.copying(t);
        if (t.past_caches) copy_past_caches(to, in, take);
        else std::memcpy(to, in, take);
      } else {
        if (bytes > short_bytes || e.taken > 0) probe.reducing(t);  // the rest of a frame is not announced again
        const std::byte* acc = t.from + t.done;
        if (t.side == Side::right) (*t.fold)(to, acc, in, take);
        else (*t.fold)(to, in, acc, take);
      }
      t.done += take;
      e.taken += take;
      counters_.bytes_received += take;
    }
    if (e.taken == bytes) {
      if (bytes > detail::Slot::inline_bytes) e.in_at = layout_.after_payload(e.in_at, bytes);
      const FrameTimes times = probe.credit_stamp(t);
      detail::Credit& credit = e.in.credits[index];
      credit.sent_at = times.sent_at;
      credit.arrive_age = times.arrive_age;
      credit.late_age = times.late_age;
      credit.culprit = times.culprit;
      credit.called = times.called;
      e.taken = 0;
      e.seen = false;
      e.in.consumed->store(++e.received, std::memory_order_release);
      __builtin_prefetch(&e.in.slots[e.received & mask_]);  // a writer who is ahead has filled the next one
      wake(e);
      if (t.done == t.bytes) e.receives.pop();
    }
    probe.moved(t);
    return true;
  }

  /// memcpy of a length the compiler cannot see is a call; the shortest messages are worth a branch.
  static void copy_small(std::byte* to, const std::byte* from, std::size_t bytes) {
    if (bytes == 8) std::memcpy(to, from, 8);
    else if (bytes == 4) std::memcpy(to, from, 4);
    else if (bytes > 0) std::memcpy(to, from, bytes);
  }
  [[noreturn]] void broken(const Transfer& t, std::size_t bytes) const {
    throw TransportError(Errc::protocol, {"rank ", t.peer, " announced a frame of ", bytes, " bytes, slots hold ", layout_.slot_bytes()},
                {me_, t.peer, t.operation, {}});
  }

  std::shared_ptr<SlotMemory> memory_;
  SlotLayout layout_;
  Rank me_;
  std::uint64_t mask_;
  bool always_crowded_;
  std::vector<Rank> numbers_;
  int width_;  // more than any number
  std::vector<Endpoint> endpoints_;
  std::vector<Endpoint*> sending_, receiving_;  // those with transfers pending
  detail::RankLine* line_;
  detail::SlotHeader* header_;
  TransportCounters counters_;
  std::uint32_t to_wake_ = 0;
  std::unique_ptr<Doorbell> doorbell_;
  std::uint64_t opened_by_key_ = 0;
  pid_t process_ = ::getpid();
  bool fences_ = false, crowded_ = false, cores_known_ = false;
};

}  // namespace tally::inline v0
