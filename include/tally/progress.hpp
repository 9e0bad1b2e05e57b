// SPDX-License-Identifier: Apache-2.0
// The one loop that waits. It polls the transport; where something moved, it books the time; where nothing did,
// it works out who is late, climbs the waiting ladder, and gives up at the deadline, on an abort, or when a peer
// that is needed is gone. All idle time, blame, deadlines and liveness of all transports are measured here.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <limits>

#include "account/report.hpp"
#include "account/states.hpp"
#include "clock.hpp"
#include "transport/concept.hpp"
#include "wait.hpp"

namespace tally::inline v0 {

/// What drives operations through Progress: it knows what is pending and how to describe it.
template <class C>
concept ProgressClient = requires(C& client, Transfer& transfer, const FrameInfo& frame, Rank rank, Liveness liveness, nanoseconds waited) {
  client.check(transfer, frame);         // throws if the frame is not what the transfer expects
  client.moved(transfer);                // see Probe
  client.check_peers();                  // throws if other ranks are seen in a call that does not match
  { client.first_lost() } -> std::same_as<Rank>;  // a rank that is gone and still needed, or -1
  client.raise_lost(rank);               // these three throw
  client.raise_timeout(waited);
  client.raise_abort();
};

template <Transport T>
class Progress {
 public:
  /// Without `timed` it reads no clock before the first stalled poll, and sends no times.
  Progress(T& transport, const Clock& clock, WaitPolicy wait, bool timed)
      : transport_(transport), clock_(clock), timed_(timed), watches_{Stopwatch(transport.size()), Stopwatch(transport.size())}, ladder_(clock, wait), check_interval_(clock.to_ticks(std::chrono::milliseconds(20))), off_core_(clock.to_ticks(std::chrono::microseconds(10))), doze_(static_cast<std::uint32_t>(clock.to_ticks(std::chrono::microseconds(2)))) {}

  /// An operation begins: the clock's first reading.
  void start(nanoseconds timeout) {
    timeout_ = timeout;
    waiting_ = heard_ = false;
    deadline_ = first_stall_ = 0;
    if (timed_) {
      arrival_ = now_ = clock_.now();
      watch_ = watch_ == &watches_[0] ? &watches_[1] : &watches_[0];
      watch_->start(now_);
    } else {
      arrival_ = now_ = 0;
    }
    latest_ = {arrival_, transport_.rank()};
  }

  /// One poll; if nothing moved, one step of waiting.
  template <ProgressClient C>
  void turn(C& client) {
    if (poll(client)) return;
    if (!waiting_) begin_wait();
    else wait(client);
  }
  /// Hands a transfer to the transport, which may do it at once.
  template <ProgressClient C>
  void post(Transfer& transfer, C& client) {
    ProbeOf<C> probe{*this, client};
    transport_.post(transfer, probe);
  }
  template <ProgressClient C>
  bool poll(C& client) {
    ProbeOf<C> probe{*this, client};
    if (!transport_.poll(probe)) return false;
    if (waiting_) end_wait();  // nothing from outside ended it: it was this rank's own doing
    return true;
  }

  /// Local work of more than a header's payload is booked as what it is.
  void enter(State state) {
    if (timed_)
      if (watch_->state() != state) watch_->enter(state, now_ = clock_.now());
  }
  Lateness arrival() const { return {arrival_, transport_.rank()}; }

  /// An operation ends, by success or, with the rank to blame for an unfinished wait, by failure. The report has
  /// everything that is known here: times and the rank that came last.
  Report finish() {
    if (!timed_) return {};
    if (waiting_) end_wait();
    watch_->enter(State::protocol, clock_.now());
    return report();
  }
  Report finish_failed(Rank missing, State cause) {
    if (!timed_) return {};
    const Ticks now = clock_.now();
    if (waiting_ && missing >= 0 && missing != transport_.rank()) {
      watch_->blame(missing, cause, now);
      watch_->resume(State::protocol);
    }
    watch_->enter(State::protocol, now);
    waiting_ = false;
    return report();
  }
  const Stopwatch& watch() const { return *watch_; }
  /// Since start(); for error texts.
  nanoseconds waited() const {
    const Ticks begin = timed_ ? arrival_ : first_stall_;
    return begin == 0 ? nanoseconds{} : clock_.to_ns(clock_.now() - begin);
  }

 private:
  template <class C>
  struct ProbeOf {
    Progress& progress;
    C& client;
    void arrived(Transfer& t, const FrameInfo& frame) {
      client.check(t, frame);
      progress.heard(t, frame.times, State::wait_transfer);
    }
    void credited(Transfer& t, const FrameTimes& times) { progress.heard(t, times, State::wait_credit); }
    void copying() { progress.enter(State::copy); }
    void reducing() { progress.enter(State::reduce); }
    void moved(Transfer& t) { client.moved(t); }
    FrameTimes stamp(const Transfer& t) const { return progress.stamp(t.late); }
    FrameTimes credit_stamp(const Transfer& t) const { return progress.stamp(t.inherited); }
  };

  static constexpr Ticks age_unit = 32;
  static constexpr std::uint32_t age_limit = std::numeric_limits<std::uint32_t>::max();

  FrameTimes stamp(const Lateness& late) const {
    if (!timed_) return {};
    const Ticks sent_at = std::max(now_, late.until);
    return {sent_at, age(sent_at - arrival_), age(sent_at - late.until), static_cast<std::uint16_t>(late.culprit)};
  }
  static std::uint32_t age(Ticks ticks) { return static_cast<std::uint32_t>(std::min<Ticks>(ticks / age_unit, age_limit)); }

  /// A frame or a credit of t's peer is here. If it ended a wait, the wait is split: until the peer arrived; until
  /// whoever the peer depended on arrived; and the rest, in which bytes or room were on their way.
  void heard(Transfer& t, const FrameTimes& times, State rest) {
    if (waiting_) ladder_.learn(now_ - wait_began_);
    if (!timed_) {
      waiting_ = false;
      return;
    }
    heard_ = true;
    const Ticks arrived = times.sent_at - std::min<Ticks>(times.sent_at, Ticks{times.arrive_age} * age_unit);
    const Ticks late_by = times.late_age == age_limit ? 0 : Ticks{times.late_age} * age_unit;
    const Ticks late_until = std::max(arrived, times.sent_at - std::min(times.sent_at, late_by));
    const Rank culprit = times.culprit < transport_.size() ? times.culprit : t.peer;  // never trust a peer's index
    if (waiting_) {
      const Rank me = transport_.rank();
      watch_->blame(t.peer, State::wait_arrival, std::min(arrived, now_));
      if (culprit != me) watch_->blame(culprit, State::wait_arrival, std::min(late_until, now_));
      else watch_->blame(t.peer, State::wait_transfer, std::min(late_until, now_));
      watch_->blame(t.peer, rest, now_);
      watch_->resume(State::protocol);
      waiting_ = false;
    }
    const Lateness late{late_until, culprit};
    t.late.raise(late);
    latest_.raise(late);
  }

  void begin_wait() {
    waiting_ = true;
    now_ = clock_.now();
    if (timed_) watch_->enter(State::wait_local, now_);
    wait_began_ = now_;
    ladder_.restart(transport_.crowded());
    if (deadline_ == 0) {
      first_stall_ = now_;
      deadline_ = (timed_ ? arrival_ : now_) + clock_.to_ticks(timeout_);
      next_check_ = now_ + check_interval_;
    }
  }
  void end_wait() {
    if (timed_) watch_->enter(State::protocol, now_);
    waiting_ = false;
  }

  /// `now_` is always the end of the last poll that found nothing: a wait ends there, and the poll that finds
  /// something is work.
  template <ProgressClient C>
  void wait(C& client) {
    const Ticks before = now_;
    const Ladder::Rest rest = ladder_.climb(now_ - wait_began_);
    if (rest == Ladder::Rest::doze && doze(client)) return;
    if (transport_.aborted()) client.raise_abort();
    now_ = clock_.now();
    // A pause is short: if this took long, the core was given to someone else, and perhaps it should have it more often.
    if (now_ - before > off_core_) {
      ladder_.give_way();
      if (timed_) watch_->slept(now_ - before);
    }
    if (rest == Ladder::Rest::park && now_ < deadline_) {
      sleep(client);
      if (!waiting_) return;
    }
    if (now_ < next_check_ && now_ < deadline_) return;
    next_check_ = now_ + check_interval_;
    client.check_peers();
    if (const Rank lost = client.first_lost(); lost >= 0) {
      if (poll(client)) return;  // it may have sent everything before it went
      client.raise_lost(lost);
    }
    if (now_ >= deadline_) client.raise_timeout(clock_.to_ns(now_ - deadline_) + timeout_);
  }

  /// Rests until the line that is waited for changes, for 2 us at most; a pause if the transport has no such line, or more
  /// than one. True if something moved before it came to that.
  template <ProgressClient C>
  bool doze(C& client) {
    if constexpr (requires { { transport_.awaited() } -> std::same_as<const void*>; })
      if (const void* line = transport_.awaited()) {
        LineWait::arm(line);
        if (poll(client)) return true;
        LineWait::doze(doze_);
        return false;
      }
    cpu_pause();
    return false;
  }

  template <ProgressClient C>
  void sleep(C& client) {
    const nanoseconds limit = std::min<nanoseconds>(std::chrono::milliseconds(25), clock_.to_ns(deadline_ - now_));
    const Ticks before = now_;
    transport_.park(limit, [&] { return poll(client) || transport_.aborted(); });
    if (!waiting_) return;
    now_ = clock_.now();
    if (timed_) watch_->slept(now_ - before);
  }

  Report report() const { return detail::report_of(*watch_, clock_, heard_ || transport_.size() == 1 ? latest_.culprit : -1); }

  T& transport_;
  Clock clock_;
  bool timed_;
  Stopwatch watches_[2];  // the last operation's stays readable until the next one ends
  Stopwatch* watch_ = &watches_[0];
  Ladder ladder_;
  Ticks check_interval_, off_core_;
  std::uint32_t doze_;
  nanoseconds timeout_{};
  Ticks arrival_ = 0, now_ = 0, deadline_ = 0, next_check_ = 0, wait_began_ = 0, first_stall_ = 0;
  Lateness latest_;
  bool waiting_ = false, heard_ = false;
};

}  // namespace tally::inline v0
