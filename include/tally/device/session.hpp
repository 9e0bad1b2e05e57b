// SPDX-License-Identifier: Apache-2.0
// One operation of one block: meeting the same blocks of the other ranks, packets to and from them, and what it all took. Every wait looks
// at the clock and for who has given up, so no kernel outlives its deadline: the first rank that gives up tells all others, and for whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "seam.hpp"
#include "window.hpp"

namespace tally::inline v0::device {

/// By this rank's host; by waiting; another rank gave up, or this one before; another rank called something else; it is gone.
enum class Failure : std::uint32_t { none, aborted, timed_out, broken, mismatch, lost };
/// Why it is over, and for whom (-1: nobody knows) or, of an abort, by whom, in one word.
struct Broken {
  Failure why = Failure::none;
  std::int32_t missing = -1;
  TALLY_DEVICE constexpr std::uint32_t pack() const { return static_cast<std::uint32_t>(why) << 16 | static_cast<std::uint32_t>(missing + 1); }
  TALLY_DEVICE static constexpr Broken unpack(std::uint32_t word) { return {static_cast<Failure>(word >> 16), static_cast<std::int32_t>(word & 0xffff) - 1}; }
};

/// Sums over all operations that one block has told of in the same place: a graph may be replayed many times before anybody looks.
struct Totals {
  std::uint64_t elapsed = 0, waited = 0, settled = 0;
};

/// One block's account of its latest operation; times by the device's clock, in nanoseconds.
struct Record {
  std::uint64_t entered = 0, ended = 0;
  std::uint64_t waited = 0;    // until the last of those that it had to wait for was here: had come, and had its input ready
  std::uint64_t settled = 0;   // after that: until data came or could go, and at the end until all were done with each other's memory
  std::int32_t last = -1;      // who that was; -1: all others were here
  std::int32_t missing = -1;   // who had not come when it gave up, if anybody knows
  Failure failure = Failure::none, cause = Failure::none;  // of what another rank gave up for: what that was
  std::uint32_t polls = 0;     // looks in vain, of the wait that was told of last
  std::uint64_t theirs = 0;    // of a mismatch: what the other rank called
  Totals totals;               // with those before it
};
/// What a device keeps of that, and what it tells the host. `runs` wrap, and are told last, after everything else of an operation.
struct Kept {
  Totals totals;
  std::uint32_t runs = 0;
};
/// By parity of the run: who has read a record, and then finds that no two runs have ended since, has read it whole.
struct Told {
  Record records[2];
  std::uint32_t runs = 0;
};
static_assert(sizeof(Record) % sizeof(std::uint64_t) == 0);

/// What a rank's kernels are told.
struct RankView {
  int me = 0, n = 1;
  std::byte* const* windows = nullptr;      // of all ranks, as this device sees them; then this rank's boxes there, and theirs here
  WindowLayout layout;
  const std::uint32_t* abort = nullptr;     // the host's word: not 0 ends everything
  std::uint64_t timeout = 0;                // nanoseconds
  std::uint64_t fingerprint = 0;            // of the call: the same on all ranks that make the same one
  const std::uint64_t* segments = nullptr;  // where each rank's part of each segment is, as this device sees it; n of each, from segment 1 on
  std::uint32_t segment_count = 0;
  // The account, by the device for itself and for the host: of each block, and, by the first one, nanoseconds that each rank was waited
  // for, n of `waited` and n of `settled`; what the host is told, by parity of the run, too.
  Kept* kept = nullptr;
  Told* told = nullptr;
  std::uint64_t* late = nullptr;
  std::uint64_t* told_late = nullptr;
};

template <Block B, bool timed = true>
class Session {
 public:
  TALLY_DEVICE Session(B& block, const RankView& view) : block_(block), view_(view) {
    const Epochs& mine = *at<Epochs>(view.me, view.layout.epochs(block.index()));
    meets_ = mine.meets;
    packets_ = mine.packets;
    call_ = mine.calls + 1;
    BlockShared& s = block.shared();
    const std::uint32_t broken = block.thread() == 0 ? B::load(at<std::uint32_t>(view.me, view.layout.broken())) : 0;
    const bool aborted = block.thread() == 0 && view.abort && B::load(view.abort) != 0;
    if (block.thread() == 0) {
      s.failure = static_cast<std::uint32_t>(broken != 0 ? Failure::broken : Failure::none);
      s.broken = broken;
      if (broken == 0 && aborted) fail(Failure::aborted, view.me);
      s.polls = 0;
      s.theirs = 0;
      s.last = s.last_to_close = -1;
      s.entered = B::now();
    }
    for (int r = block.thread(); r < view.n; r += block.threads()) s.seen[r] = s.arrival[r] = s.transfer[r] = s.heard[r] = 0;
    is_over_ = block.any(broken != 0 || aborted);
    if (block.index() == 0 && !is_over_)
      for (int r = block.thread(); r < view.n; r += block.threads()) {
        CallWord& word = *in_box<CallWord>(to(r), view.layout.call(call_));
        B::note(word.fingerprint, view.fingerprint);
        B::store(&word.number, call_);
      }
  }
  Session(const Session&) = delete;

  TALLY_DEVICE int me() const { return view_.me; }
  TALLY_DEVICE int n() const { return view_.n; }
  /// Somebody has given up before: nothing more comes of anything.
  TALLY_DEVICE bool is_over() const { return is_over_; }

  /// All ranks' blocks have come this far, and see what all have written before. False if one gave up.
  TALLY_DEVICE bool meet() {
    const int b = block_.index();
    const std::uint32_t number = ++meets_;
    if (timed && is_open_) closing_ = B::now();
    block_.sync();
    for (int r = block_.thread(); r < view_.n; r += block_.threads())
      if (r != view_.me) B::store(at<std::uint32_t>(r, view_.layout.flag(b, view_.me)), number);
    bool came = true;
    for (int r = block_.thread(); r < view_.n; r += block_.threads()) {
      if (r == view_.me) continue;
      const std::uint32_t* const flag = at<std::uint32_t>(view_.me, view_.layout.flag(b, r));
      came = wait_for(r, [&] { return static_cast<std::int32_t>(B::load(flag) - number) >= 0; }) && came;
    }
    is_open_ = true;
    return !block_.any(!came);
  }
  /// The first meeting: all make the same call, and know where the others' buffers are.
  template <class Factor>
  TALLY_DEVICE bool meet(const Place& input, const Place& output, const Factor& factor) {
    static_assert(sizeof factor <= sizeof Pad::factor);
    Pad mine{input, output, view_.fingerprint, {}};
    memcpy(mine.factor, &factor, sizeof factor);
    for (int r = block_.thread(); r < view_.n; r += block_.threads()) *at<Pad>(r, view_.layout.pad(block_.index(), meets_ + 1, view_.me)) = mine;
    if (!meet()) return false;
    published_ = meets_;
    bool fits = true;
    for (int r = block_.thread(); r < view_.n; r += block_.threads()) {
      const Pad& pad = pad_of(r);
      fits = expect(r, pad.fingerprint) && fits;
      if (pad.input.segment > view_.segment_count || pad.output.segment > view_.segment_count) fits = differs(r, pad.fingerprint);
    }
    return !block_.any(!fits);
  }
  TALLY_DEVICE const Pad& pad_of(int r) const { return *at<Pad>(view_.me, view_.layout.pad(block_.index(), published_, r)); }

  /// A place that rank r told of.
  TALLY_DEVICE std::uint64_t address(int r, const Place& place) const { return place.segment == 0 ? place.offset : view_.segments[(place.segment - 1) * static_cast<std::uint32_t>(view_.n) + static_cast<std::uint32_t>(r)] + place.offset; }

  // Packets. The first one of a slot says which call it is of: each operation that has packets sends that to every other rank, and gets it from
  // each, which WindowLayout::slot() relies on.

  static constexpr std::size_t first_packet = 1;
  /// False if it is over.
  TALLY_DEVICE bool begin_packets() {
    if (++packets_ == 0 && !renew_packets()) return false;
    if (block_.index() != 0) return true;
    for (int r = block_.thread(); r < view_.n; r += block_.threads())
      if (r != view_.me) put(r, 0, view_.fingerprint);
    return true;
  }
  /// False if not all make the same call. By threads of the block's end, which have the least to do otherwise.
  TALLY_DEVICE bool expect_packets() {
    bool fits = true;
    if (block_.index() != 0) return fits;
    for (int r = block_.threads() - 1 - block_.thread(); r < view_.n; r += block_.threads()) {
      std::uint64_t theirs = 0;
      if (r != view_.me) fits = get(r, 0, theirs) && expect(r, theirs) && fits;
    }
    return fits;
  }
  TALLY_DEVICE void put(int to, std::size_t i, std::uint64_t data) { B::store_packet(at<Packet>(to, view_.layout.slot(block_.index(), packets_, view_.me)) + i, Packet::of(data, packets_)); }
  /// Whatever is there by now.
  TALLY_DEVICE Packet look(int from, std::size_t i) const { return B::load_packet(at<Packet>(view_.me, view_.layout.slot(block_.index(), packets_, from)) + i); }
  /// `p`: what was there at the last look. False if it does not come.
  TALLY_DEVICE bool get(int from, std::size_t i, const Packet& p, std::uint64_t& data) {
    if (!p.is_of(packets_)) return get(from, i, data);
    data = p.data();
    return true;
  }
  TALLY_DEVICE bool get(int from, std::size_t i, std::uint64_t& data) {
    const Packet* const where = at<Packet>(view_.me, view_.layout.slot(block_.index(), packets_, from)) + i;
    Packet p;
    const bool came = wait_for(from, [&] {
      p = B::load_packet(where);
      return p.is_of(packets_);
    });
    data = p.data();
    return came;
  }

  // Of one thread, for what it decides alone.

  /// False if that rank makes another call, which ends this one.
  TALLY_DEVICE bool expect(int r, std::uint64_t theirs) { return theirs == view_.fingerprint || differs(r, theirs); }

  template <class T>
  TALLY_DEVICE T* at(int rank, std::size_t offset) const { return reinterpret_cast<T*>(view_.windows[rank] + offset); }
  /// What this rank sends to another one, and gets from it: their boxes.
  TALLY_DEVICE std::byte* to(int rank) const { return view_.windows[view_.n + rank]; }
  TALLY_DEVICE std::byte* from(int rank) const { return view_.windows[2 * view_.n + rank]; }
  template <class T>
  TALLY_DEVICE static T* in_box(std::byte* box, std::size_t offset) { return reinterpret_cast<T*>(box + offset); }
  /// It has looked once more in vain for something from that rank. False if it has to give up.
  TALLY_DEVICE bool goes_on(int peer, std::uint32_t polls) {
    B::pause(polls);
    return polls % look_around != 0 || !gives_up(peer);
  }
  /// It has waited for so long, and something came from there, for the first time in this operation or not. As far as that rank has
  /// waited itself meanwhile, whom it waited for is who was late.
  TALLY_DEVICE void came(int peer, const FrameHeader& header, std::uint64_t waited, bool first) {
    BlockShared& s = block_.shared();
    const std::uint64_t since = header.waited - s.heard[peer], inherited = header.origin >= 0 && header.origin < view_.n && header.origin != view_.me ? (since < waited ? since : waited) : 0;
    s.heard[peer] = header.waited;
    if (inherited > 0) blame(header.origin, inherited);
    if (waited == inherited) return;
    if (first) blame(peer, waited - inherited);
    else s.transfer[peer] += waited - inherited;
  }
  /// There was no room there for so long; `first`: nothing had been heard of it.
  TALLY_DEVICE void made_room(int peer, std::uint64_t waited, bool first) {
    if (waited == 0) return;
    if (first) blame(peer, waited);
    else block_.shared().transfer[peer] += waited;
  }
  /// For who hears of this rank next.
  TALLY_DEVICE FrameHeader header(std::uint64_t count, std::uint32_t bytes) const { return {count, view_.fingerprint, blamed_, block_.shared().last, bytes}; }

  /// By all threads of the block, when its part is done or it has failed.
  TALLY_DEVICE void end() {
    block_.sync();
    BlockShared& s = block_.shared();
    if constexpr (timed) {
      // From when the one before it was here, or the operation began.
      for (int r = block_.thread(); r < view_.n; r += block_.threads())
        if (s.seen[r] != 0) s.arrival[r] = s.seen[r] - before(r);
      if (closing_ != 0 && block_.thread() == 0 && s.last_to_close >= 0) s.transfer[s.last_to_close] = B::now() - closing_;
      block_.sync();
      if (block_.index() == 0) {
        for (int r = block_.thread(); r < view_.n; r += block_.threads()) {
          std::uint64_t* const told = view_.told_late + ((view_.kept[0].runs + 1) % 2) * 2 * static_cast<std::uint32_t>(view_.n);
          B::note(told[r], view_.late[r] += s.arrival[r]);
          B::note(told[view_.n + r], view_.late[view_.n + r] += s.transfer[r]);
        }
        block_.sync();
      }
    }
    if (block_.thread() != 0) return;
    *at<Epochs>(view_.me, view_.layout.epochs(block_.index())) = {meets_, packets_, call_};
    Kept kept = view_.kept[block_.index()];
    Totals& totals = kept.totals;
    Record r;
    r.failure = static_cast<Failure>(s.failure);
    r.cause = Broken::unpack(s.broken).why;
    r.missing = s.broken != 0 ? Broken::unpack(s.broken).missing : -1;
    r.theirs = s.theirs;
    if constexpr (timed) {
      std::uint64_t last = s.entered;
      r.last = s.last;
      for (int peer = 0; peer < view_.n; ++peer) {
        if (s.seen[peer] > last) last = s.seen[peer], r.last = peer;
        r.waited += s.arrival[peer], r.settled += s.transfer[peer];
      }
      r.entered = s.entered;
      r.polls = s.polls;
      r.ended = B::now();
      totals.elapsed += r.ended - r.entered;
      totals.waited += r.waited;
      totals.settled += r.settled;
    }
    r.totals = totals;
    ++kept.runs;
    view_.kept[block_.index()] = kept;
    Told& told = view_.told[block_.index()];
    std::uint64_t words[sizeof r / sizeof(std::uint64_t)];
    memcpy(words, &r, sizeof r);
    auto* const to = reinterpret_cast<std::uint64_t*>(&told.records[kept.runs % 2]);
    for (std::size_t i = 0; i < sizeof r / sizeof(std::uint64_t); ++i) B::note(to[i], words[i]);
    B::store(&told.runs, kept.runs);
  }

 private:
  static constexpr std::uint32_t look_around = 256;  // polls between looks at the clock

  /// Of one thread. False if it gave up.
  template <class Ready>
  TALLY_DEVICE bool wait_for(int peer, Ready&& ready) {
    if (ready()) return true;
    for (std::uint32_t polls = 1;; ++polls) {
      B::pause(polls);
      if (ready()) {
        if constexpr (timed) note(peer, polls);
        return true;
      }
      if (polls % look_around == 0 && gives_up(peer)) return false;
    }
  }
  /// Numbers of packets begin anew: what lies in slots from the last time round must not be taken for what is to come. All ranks come here in
  /// the same operation.
  TALLY_DEVICE bool renew_packets() {
    packets_ = 1;
    if (!meet()) return false;
    for (std::uint32_t half = 0; half < 2; ++half)
      for (int r = 0; r < view_.n; ++r)
        for (auto i = static_cast<std::size_t>(block_.thread()); i < view_.layout.packets; i += static_cast<std::size_t>(block_.threads())) B::store_packet(at<Packet>(view_.me, view_.layout.slot(block_.index(), half, r)) + i, {});
    return meet();
  }
  /// Of several threads that waited for the same rank one's word is kept: they came within a packet of each other.
  TALLY_DEVICE void note(int peer, std::uint32_t polls) {
    BlockShared& s = block_.shared();
    if (!is_open_) B::note(s.seen[peer], B::now());
    else B::note(s.last_to_close, peer);
    B::note(s.polls, polls);
  }
  /// When the last one that was here before rank r came, or the operation began.
  TALLY_DEVICE std::uint64_t before(int r) const {
    const BlockShared& s = block_.shared();
    std::uint64_t latest = s.entered;
    for (int q = 0; q < view_.n; ++q)
      if (const std::uint64_t other = s.seen[q]; other > latest && (other < s.seen[r] || (other == s.seen[r] && q < r))) latest = other;
    return latest < s.seen[r] ? latest : s.seen[r];
  }
  TALLY_DEVICE bool differs(int r, std::uint64_t theirs) {
    fail(Failure::mismatch, r, theirs);
    return false;
  }
  TALLY_DEVICE bool gives_up(int peer) {
    if (B::load(&block_.shared().failure) != 0) return true;
    const std::uint32_t broken = B::load(at<std::uint32_t>(view_.me, view_.layout.broken()));
    if (view_.abort && B::load(view_.abort) != 0) fail(Failure::aborted, view_.me);  // which may be why another block broke off
    else if (broken != 0) give_up(Failure::broken, broken);
    else if (std::uint64_t theirs = 0; is_elsewhere(peer, theirs)) fail(Failure::mismatch, peer, theirs);
    else if (B::now() - block_.shared().entered > view_.timeout) fail(Failure::timed_out, peer);
    else return false;
    return true;
  }
  /// It has made another call instead of this one.
  TALLY_DEVICE bool is_elsewhere(int peer, std::uint64_t& theirs) const {
    if (peer < 0) return false;
    const CallWord& word = *in_box<CallWord>(from(peer), view_.layout.call(call_));
    if (B::load(&word.number) != call_) return false;
    theirs = B::noted(word.fingerprint);
    return theirs != 0 && theirs != view_.fingerprint && B::load(&word.number) == call_;
  }
  /// All ranks are to know.
  TALLY_DEVICE void fail(Failure why, std::int32_t missing, std::uint64_t theirs = 0) {
    const std::uint32_t broken = Broken{why, missing}.pack();
    for (int r = 0; r < view_.n; ++r) B::store(at<std::uint32_t>(r, view_.layout.broken()), broken);
    B::note(block_.shared().theirs, theirs);
    give_up(why, broken);
  }
  TALLY_DEVICE void give_up(Failure why, std::uint32_t broken) {
    B::store(&block_.shared().broken, broken);
    B::store(&block_.shared().failure, static_cast<std::uint32_t>(why));
  }

  TALLY_DEVICE void blame(int r, std::uint64_t waited) {
    block_.shared().arrival[r] += waited;
    block_.shared().last = r;
    blamed_ += waited;
  }

  B& block_;
  const RankView& view_;
  std::uint64_t blamed_ = 0;  // all of arrival
  std::uint32_t meets_ = 0, packets_ = 0, call_ = 0, published_ = 0;  // the meeting before which pads were written
  std::uint64_t closing_ = 0;  // when the last meeting began, if it was not the first
  bool is_over_ = false, is_open_ = false;  // it has met all
};

}  // namespace tally::inline v0::device
