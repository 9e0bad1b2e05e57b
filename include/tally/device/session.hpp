// SPDX-License-Identifier: Apache-2.0
// One operation of one block: meeting the same blocks of the other ranks, packets to and from them, and what it all took. Every wait looks
// at the clock and for who has given up, so no kernel outlives its deadline: the first rank that gives up tells all others, and for whom.
#pragma once

#include <cstddef>
#include <cstdint>

#include "seam.hpp"
#include "window.hpp"

namespace tally::inline v0::device {

enum class Failure : std::uint32_t { none, aborted, timed_out, broken };  // by this rank's host; by waiting; another rank gave up, or this one before

/// One block's account of one operation; times by the device's clock, in nanoseconds.
struct Record {
  std::uint64_t entered = 0, ended = 0;
  std::uint64_t waited = 0;    // until the last of those that it had to wait for was here: had come, and had its input ready
  std::uint64_t settled = 0;   // at the end, until all were done with each other's memory
  std::int32_t last = -1;      // who that was; -1: all others were here
  std::int32_t missing = -1;   // who had not come when it gave up, if anybody knows
  Failure failure = Failure::none;
  std::uint32_t polls = 0;     // looks in vain, of the wait that was told of last
};

/// What a rank's kernels are told.
struct RankView {
  int me = 0, n = 1;
  std::byte* const* windows = nullptr;      // of all ranks, as this device sees them
  WindowLayout layout;
  const std::uint32_t* abort = nullptr;     // the host's word: not 0 ends everything
  Record* records = nullptr;                // the host's, one per block
  std::uint64_t* seen = nullptr;            // by the first block: when each rank was found to be here, n of them; 0: it was here before
  std::uint64_t timeout = 0;                // nanoseconds
};

template <Block B, bool timed = true>
class Session {
 public:
  TALLY_DEVICE Session(B& block, const RankView& view) : block_(block), view_(view), entered_(B::now()) {
    const Epochs& mine = *at<Epochs>(view.me, view.layout.epochs(block.index()));
    meets_ = mine.meets;
    packets_ = mine.packets;
    BlockShared& s = block.shared();
    const std::uint32_t broken = block.thread() == 0 ? B::load(at<std::uint32_t>(view.me, view.layout.broken())) : 0;
    if (block.thread() == 0) {
      s.failure = static_cast<std::uint32_t>(broken != 0 ? Failure::broken : Failure::none);
      s.missing = static_cast<std::int32_t>(broken) - 2;
      s.polls = 0;
    }
    for (int r = block.thread(); r < view.n; r += block.threads()) s.seen[r] = 0;
    is_over_ = block.any(broken != 0);
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
  /// Tells the others where this rank's buffers are; they know it after the next meeting.
  TALLY_DEVICE void publish(const Pad& pad) {
    for (int r = block_.thread(); r < view_.n; r += block_.threads()) *at<Pad>(r, view_.layout.pad(block_.index(), view_.me)) = pad;
  }
  TALLY_DEVICE const Pad& pad_of(int r) const { return *at<Pad>(view_.me, view_.layout.pad(block_.index(), r)); }

  // Packets. Each operation that has any sends one at least to every other rank, and gets one from each: see WindowLayout::slot().

  TALLY_DEVICE void begin_packets() { ++packets_; }
  TALLY_DEVICE void put(int to, std::size_t i, std::uint64_t data) { B::store_packet(at<Packet>(to, view_.layout.slot(block_.index(), packets_, view_.me)) + i, Packet::of(data, packets_)); }
  /// False if it does not come.
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

  template <class T>
  TALLY_DEVICE T* at(int rank, std::size_t offset) const { return reinterpret_cast<T*>(view_.windows[rank] + offset); }
  /// It has looked once more in vain for something from that rank. False if it has to give up.
  TALLY_DEVICE bool goes_on(int peer, std::uint32_t polls) {
    B::pause(polls);
    return polls % look_around != 0 || !gives_up(peer);
  }
  /// It waited, and then something came from there.
  TALLY_DEVICE void came(int peer, std::uint32_t polls) {
    if constexpr (timed)
      if (polls > 0 && block_.shared().seen[peer] == 0) note(peer, polls);
  }

  /// By all threads of the block, when its part is done or it has failed.
  TALLY_DEVICE void end() {
    block_.sync();
    if (block_.thread() != 0) return;
    BlockShared& s = block_.shared();
    *at<Epochs>(view_.me, view_.layout.epochs(block_.index())) = {meets_, packets_};
    Record& record = view_.records[block_.index()];
    Record r;
    r.failure = static_cast<Failure>(s.failure);
    r.missing = s.missing;
    if constexpr (timed) {
      std::uint64_t last = 0;
      for (int peer = 0; peer < view_.n; ++peer)
        if (s.seen[peer] > last) last = s.seen[peer], r.last = peer;
      r.entered = entered_;
      r.waited = last > entered_ ? last - entered_ : 0;
      r.polls = s.polls;
      if (block_.index() == 0 && view_.seen)
        for (int peer = 0; peer < view_.n; ++peer) view_.seen[peer] = s.seen[peer];
      r.ended = B::now();
      if (closing_ != 0) r.settled = r.ended - closing_;
    }
    record = r;
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
  /// Of several threads that waited for the same rank one's word is kept: they came within a packet of each other.
  TALLY_DEVICE void note(int peer, std::uint32_t polls) {
    BlockShared& s = block_.shared();
    if (!is_open_) B::note(s.seen[peer], B::now());
    B::note(s.polls, polls);
  }
  TALLY_DEVICE bool gives_up(int peer) {
    if (B::load(&block_.shared().failure) != 0) return true;
    const std::uint32_t broken = B::load(at<std::uint32_t>(view_.me, view_.layout.broken()));
    Failure why = Failure::none;
    std::int32_t missing = peer;
    if (view_.abort && B::load(view_.abort) != 0) why = Failure::aborted;  // which may be why another block broke off
    else if (broken != 0) why = Failure::broken, missing = static_cast<std::int32_t>(broken) - 2;
    else if (B::now() - entered_ > view_.timeout) why = Failure::timed_out;
    if (why == Failure::none) return false;
    if (why != Failure::broken)
      for (int r = 0; r < view_.n; ++r) B::store(at<std::uint32_t>(r, view_.layout.broken()), static_cast<std::uint32_t>(missing) + 2);
    B::store(reinterpret_cast<std::uint32_t*>(&block_.shared().missing), static_cast<std::uint32_t>(missing));
    B::store(&block_.shared().failure, static_cast<std::uint32_t>(why));
    return true;
  }

  B& block_;
  const RankView& view_;
  std::uint64_t entered_;
  std::uint32_t meets_ = 0, packets_ = 0;
  std::uint64_t closing_ = 0;  // when the last meeting began, if it was not the first
  bool is_over_ = false, is_open_ = false;  // it has met all
};

}  // namespace tally::inline v0::device
