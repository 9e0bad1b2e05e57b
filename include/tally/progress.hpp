// SPDX-License-Identifier: Apache-2.0
// The one loop that waits. It polls the transport; where something moved, it books the time to the operation that it
// moved for; where nothing did, it works out who is late, climbs the waiting ladder, and gives up at the deadline, on an
// abort, or when a peer that is needed is gone. All idle time, blame, deadlines and liveness are measured here.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "account/report.hpp"
#include "account/states.hpp"
#include "clock.hpp"
#include "transport/concept.hpp"
#include "wait.hpp"

namespace tally::inline v0 {

/// One operation's side of the account.
struct OperationAccount {
  explicit OperationAccount(int n) : watch(n) { open.reserve(most_open); }
  Stopwatch watch;
  Ticks arrival = 0;  // when it was called
  Ticks driven = 0;   // Progress::driven() when it was last served
  Lateness latest;
  bool heard = false;
  /// It was waiting when it was left alone.
  bool was_waiting() const { return !open.empty() && open.back().peer < 0 && open.back().end == watch.mark(); }
  /// A wait that ended otherwise than by a frame of its own: whose it is the next own one tells. `peer`: to whom the network took nothing,
  /// because it was slow or because that rank was not there to read: this its own next one tells.
  struct Open {
    Ticks begin = 0, end = 0;
    Rank peer = -1;
  };
  std::vector<Open> open;
  void leave_open(Ticks begin, Ticks end, Rank peer = -1) {
    if (open.size() == most_open) {  // each two become one that ends where the later one did: together as long as before
      for (std::size_t i = 0; i < most_open / 2; ++i) {
        const Open before = open[2 * i], after = open[2 * i + 1];
        open[i] = {after.begin - (before.end - before.begin), after.end, after.peer};
      }
      open.resize(most_open / 2);
    }
    open.push_back({begin, end, peer});
  }
  static constexpr std::size_t most_open = 16;
};

/// What drives operations through Progress: it knows what is pending and how to describe it.
template <class C>
concept ProgressClient = requires(C& client, Transfer& transfer, const FrameInfo& frame, Rank rank) {
  { client.account_of(transfer) } -> std::same_as<OperationAccount&>;
  { client.waiting() } -> std::same_as<OperationAccount&>;  // what the caller waits for, or else the oldest operation that is not done
  client.check(transfer, frame);         // throws if the frame is not what the transfer expects
  client.moved(transfer);                // see Probe
  { client.called() } -> std::same_as<std::uint16_t>;  // low bits of the last collective operation that this rank has called
  { client.unexpected(rank, frame) } -> std::same_as<Transfer*>;  // likewise
  client.check_peers();                  // throws if other ranks are seen in a call that does not match
  { client.first_lost() } -> std::same_as<Rank>;  // a rank that is gone and still needed, or -1
  client.raise_lost(rank);               // throws
  client.raise_abort();                  // throws
  client.expired();                      // the limit is reached: throws, or sees to it that nobody goes on waiting
  { client.expected_wait() } -> std::same_as<Ticks>;  // of what is waited for: hardly ever less
  { client.interrupted() } -> std::same_as<bool>;  // somebody else wants to go on: do not sleep
  { client.has_neighbours() } -> std::same_as<bool>;  // this thread has something in flight elsewhere
  { client.look_elsewhere() } -> std::same_as<bool>;  // drives that for a moment; true if anything moved
};

template <Transport T>
class Progress {
 public:
  /// Without `timed` it reads no clock before the first stalled poll, and sends no times.
  Progress(T& transport, const Clock& clock, WaitPolicy wait, bool timed)
      : transport_(transport), clock_(clock), timed_(timed), ladder_(clock, wait), check_interval_(clock.to_ticks(std::chrono::milliseconds(20))), off_core_(clock.to_ticks(std::chrono::microseconds(10))), doze_(static_cast<std::uint32_t>(clock.to_ticks(std::chrono::microseconds(2)))) {}

  /// An operation begins, and driving with it: the clock's first reading.
  void begin(OperationAccount& account, nanoseconds timeout) {
    drive(timeout);
    unserved_ = false;
    account.arrival = now_;
    account.heard = false;
    account.latest = {now_, transport_.rank()};
    if (timed_) account.watch.start(now_);
    current_ = &account;
  }
  /// Operations that were left alone are driven again, for at most `timeout` without success. `since`: when that was asked for.
  void drive(nanoseconds timeout, Ticks since = 0) {
    timeout_ = timeout;
    drive_until(0, 0, since);
  }
  /// Or until then. `looks`: it comes again and again to see whether anything moved, and waits in between, for so many communicators.
  void drive_until(Ticks deadline, std::size_t looks = 0, Ticks since = 0) {
    looks_ = looks;
    waiting_ = false;
    first_stall_ = 0;
    deadline_ = deadline;
    current_ = nullptr;
    unserved_ = true;
    began_ = now_ = !timed_ ? 0 : since == 0 ? clock_.now() : std::max(since, now_);  // until now_ somebody else may have driven
  }
  /// Nobody drives them from here on. Returns the time.
  Ticks rest() {
    if (timed_) now_ = clock_.now();
    leave();
    stop();
    return now_;
  }

  /// One poll; if nothing moved, one step of waiting.
  template <ProgressClient C>
  void turn(C& client) {
    if (poll(client)) return;
    if (!waiting_) begin_wait(client.waiting());
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

  /// Nothing moves, and who asked has something else to do: this look was a wait, and from time to time he is told what is wrong, too.
  template <ProgressClient C>
  void look_around(C& client) {
    if (transport_.aborted()) client.raise_abort();
    if (!waiting_) begin_wait(client.waiting());
    if (now_ >= next_check_) check(client);
  }

  /// From here on the thread works for this operation; the others queue.
  void serve(OperationAccount& account) {
    if (current_ != &account) change(account, true);
  }
  /// Local work of more than a header's payload is booked as what it is.
  void enter(State state) {
    if (timed_ && current_)
      if (current_->watch.state() != state) current_->watch.enter(state, now_ = clock_.now());
  }
  /// What this rank does itself it could have done before, had anybody driven it: until the first wait, which shows that nothing was left to do.
  Lateness resumed() const { return {first_stall_ == 0 ? began_ : 0, transport_.rank()}; }
  Lateness arrival(const OperationAccount& account) const { return {account.arrival, transport_.rank()}; }

  /// What an operation waited for has come about here: by what somebody else did, until `late` says, and by this rank's own doing since.
  void released(OperationAccount& account, const Lateness& late) {
    if (!timed_) return;
    serve(account);
    const auto split = [&](Ticks begin, Ticks end) {
      const Ticks came = late.culprit == transport_.rank() ? begin : std::clamp(late.until, begin, end);
      account.watch.blame(late.culprit, State::wait_arrival, came - begin);
      account.watch.book(State::wait_local, end - came);
    };
    for (const OperationAccount::Open& each : account.open) split(each.begin, each.end);
    account.open.clear();
    if (waiting_) {
      ladder_.learn(now_ - wait_began_);
      split(account.watch.mark(), now_);
      account.watch.resume(State::protocol, now_);
      waiting_ = false;
    }
    account.heard = true;
    account.latest.raise(late);
  }

  /// An operation ends, by success or, with the rank to blame for an unfinished wait, by failure. The report has
  /// everything that is known here: times and the rank that came last.
  Report finish(OperationAccount& account) {
    if (!timed_) return {};
    serve(account);
    if (waiting_) end_wait();
    account.watch.enter(State::protocol, now_ = clock_.now());
    return close(account);
  }
  Report finish_failed(OperationAccount& account, Rank missing, State cause) {
    if (!timed_) return {};
    const bool waited = waiting_ && current_ == &account && missing >= 0 && missing != transport_.rank();
    if (!waited) serve(account);
    now_ = clock_.now();
    if (waited) {
      account.watch.blame(missing, cause, now_ - account.watch.mark());
      account.watch.resume(State::protocol, now_);
    }
    account.watch.enter(State::protocol, now_);
    waiting_ = false;
    return close(account);
  }
  /// Driving ends with the operation that ended last.
  void stop() {
    driven_ += now_ - began_;
    current_ = nullptr;
  }
  /// Up to when the account of who is served goes.
  Ticks now() const { return now_; }
  /// Since driving began; for error texts.
  nanoseconds waited() const {
    const Ticks begin = timed_ ? began_ : first_stall_;
    return begin == 0 ? nanoseconds{} : clock_.to_ns(clock_.now() - begin);
  }

 private:
  template <class C>
  struct ProbeOf {
    Progress& progress;
    C& client;
    void arrived(Transfer& t, const FrameInfo& frame) {
      client.check(t, frame);
      State rest = State::wait_transfer;
      if constexpr (requires { client.rest_of(t); }) rest = client.rest_of(t);
      progress.heard(client.account_of(t), t, frame.times, rest);
    }
    Transfer* unexpected(Rank peer, const FrameInfo& frame) { return client.unexpected(peer, frame); }
    void credited(Transfer& t, const FrameTimes& times) {
      // What made room was an earlier operation, and its receiver had not called this one yet.
      const bool is_early = t.matching == Matching::order && static_cast<std::int16_t>(times.called - static_cast<std::uint16_t>(t.operation)) < 0;
      progress.heard(client.account_of(t), t, is_early ? FrameTimes{times.sent_at, 0, 0, static_cast<std::uint16_t>(t.peer), 0} : times, State::wait_credit);
    }
    void fetched(Transfer& t, const FrameTimes& times) { progress.heard(client.account_of(t), t, times, State::wait_transfer); }
    void continued(Transfer& t, const FrameTimes& times) {
      progress.heard(client.account_of(t), t, times, State::wait_transfer);
      progress.copied();
    }
    void drained(Transfer& t, bool by_copying = false) {
      progress.drained(client.account_of(t), t);
      if (by_copying) progress.copied();
    }
    void copying(Transfer& t) {
      progress.serve(client.account_of(t));
      progress.enter(State::copy);
    }
    void trying(Transfer& t) {
      if (!progress.waiting_) copying(t);
    }
    void reducing(Transfer& t) {
      progress.serve(client.account_of(t));
      progress.enter(State::reduce);
    }
    void moved(Transfer& t) { client.moved(t); }
    FrameTimes stamp(Transfer& t) const {
      if (progress.first_stall_ == 0 && !t.prompt) t.late.raise({progress.began_, progress.transport_.rank()});  // it could have left before, had anybody driven it
      FrameTimes times = progress.stamp(client.account_of(t), t.late);
      if (t.prompt && progress.timed_) times.arrive_age = age_limit;  // who sends it was there all the time
      return times;
    }
    FrameTimes credit_stamp(const Transfer& t) const {
      FrameTimes times = progress.stamp(client.account_of(t), t.inherited);
      times.called = client.called();
      return times;
    }
  };

  static constexpr Ticks age_unit = 32;
  static constexpr std::uint32_t age_limit = std::numeric_limits<std::uint32_t>::max();

  FrameTimes stamp(const OperationAccount& account, const Lateness& late) const {
    if (!timed_) return {};
    const Ticks sent_at = std::max(now_, late.until);
    return {sent_at, age(sent_at - account.arrival), age(sent_at - late.until), static_cast<std::uint16_t>(late.culprit), 0};
  }
  static std::uint32_t age(Ticks ticks) { return static_cast<std::uint32_t>(std::min<Ticks>(ticks / age_unit, age_limit)); }

  Ticks driven() const { return driven_ + (now_ - began_); }
  /// `moved`: something did, while it was left alone.
  [[gnu::noinline]] void change(OperationAccount& account, bool moved) {
    if (timed_) {
      if (!unserved_) now_ = clock_.now();  // else all the time since driving began is this one's
      unserved_ = false;
      leave();
      const Ticks away = now_ - account.watch.mark();
      if (!moved && looks_ > 0 && account.was_waiting()) {  // nothing came meanwhile: the same wait goes on, and the thread slept for all of them
        account.watch.slept(away / looks_);
        account.watch.unpaid(away - away / looks_);
        account.watch.resume(State::wait_local, account.open.back().begin);
        account.open.pop_back();
      } else {
        account.watch.resume(State::protocol, now_, away - std::min(away, driven() - account.driven));
      }
    }
    waiting_ = false;
    current_ = &account;
  }
  /// The current operation is left alone, at now_.
  void leave() {
    if (!timed_ || !current_) return;
    if (waiting_) {
      current_->leave_open(current_->watch.mark(), now_);
      current_->watch.resume(State::wait_local, now_);
    }
    current_->watch.enter(State::wait_local, now_);
    current_->driven = driven();
    waiting_ = false;
  }
  Report close(OperationAccount& account) {
    for (const auto& [begin, end, peer] : account.open) {
      if (peer < 0) account.watch.book(State::wait_local, end - begin);  // what it waited for was its own doing
      else account.watch.blame(peer, State::wait_transfer, end - begin);
    }
    account.open.clear();
    current_ = nullptr;  // what is driven next is not its time
    return detail::report_of(account.watch, clock_, account.heard || transport_.size() == 1 ? account.latest.culprit : -1);
  }

  /// A frame or a credit of t's peer is here. If it ended a wait, the wait is split: until the peer arrived; until
  /// whoever the peer depended on arrived; and the rest, in which bytes or room were on their way.
  void heard(OperationAccount& account, Transfer& t, const FrameTimes& times, State rest) {
    if (waiting_) ladder_.learn(now_ - wait_began_);
    if (!timed_) {
      waiting_ = false;
      current_ = &account;
      return;
    }
    serve(account);
    account.heard = true;
    const Ticks sent_at = to_local(t.peer, times.sent_at);
    const Ticks arrived = sent_at - std::min<Ticks>(sent_at, Ticks{times.arrive_age} * age_unit);
    const Ticks late_by = times.late_age == age_limit ? 0 : Ticks{times.late_age} * age_unit;
    const Ticks late_until = std::max(arrived, sent_at - std::min(sent_at, late_by));
    const Rank culprit = times.culprit < account.watch.size() ? times.culprit : t.peer;  // never trust a peer's index
    const auto split = [&](Ticks begin, Ticks end) {
      const Ticks came = std::clamp(arrived, begin, end), ready = std::clamp(late_until, came, end);
      account.watch.blame(t.peer, State::wait_arrival, came - begin);
      if (culprit != transport_.rank()) account.watch.blame(culprit, State::wait_arrival, ready - came);
      else account.watch.blame(t.peer, State::wait_transfer, ready - came);
      account.watch.blame(t.peer, rest, end - ready);
    };
    std::size_t left = 0;
    for (const OperationAccount::Open each : account.open) {
      if (each.peer < 0 || each.peer == t.peer) {
        split(each.begin, each.end);
      } else if (each.peer == culprit) {  // when that one came, another one tells
        const Ticks came = std::clamp(late_until, each.begin, each.end);
        account.watch.blame(culprit, State::wait_arrival, came - each.begin);
        account.watch.blame(culprit, State::wait_transfer, each.end - came);
      } else {
        account.open[left++] = each;
      }
    }
    account.open.resize(left);
    if (waiting_) {
      split(account.watch.mark(), now_);
      account.watch.resume(State::protocol, now_);
      waiting_ = false;
    }
    const Lateness late{late_until, culprit};
    t.late.raise(late);
    account.latest.raise(late);
    // It was here before anybody looked for it: what depends on it is late by that, and so is the room that it gives back.
    if (first_stall_ == 0 && sent_at < began_) {
      t.late.raise({began_, transport_.rank()});
      t.inherited.raise({began_, transport_.rank()});
    }
  }

  /// What ended a wait took the time since then.
  void copied() {
    if (timed_ && current_->watch.state() == State::protocol && current_->watch.mark() == now_) current_->watch.enter(State::copy, now_);
  }
  /// The network takes t's bytes again. Whether it was slow, or t's peer was not there to read, that one's next frame tells.
  void drained(OperationAccount& account, const Transfer& t) {
    if (waiting_) ladder_.learn(now_ - wait_began_);
    if (!timed_) {
      waiting_ = false;
      current_ = &account;
      return;
    }
    serve(account);
    if (!waiting_) return;
    account.leave_open(account.watch.mark(), now_, t.peer);
    account.watch.resume(State::protocol, now_);
    waiting_ = false;
  }

  /// A time of the peer's clock in this rank's: where ranks have clocks of their own, the transport compares them.
  Ticks to_local(Rank peer, Ticks theirs) const {
    if constexpr (requires(const T& t) { { t.to_local(peer, theirs) } -> std::same_as<Ticks>; }) return transport_.to_local(peer, theirs);
    else return theirs;
  }

  void begin_wait(OperationAccount& account) {
    const bool known = timed_ && current_ != &account;  // the time
    if (current_ != &account) change(account, false);
    if (!known) now_ = clock_.now();
    waiting_ = true;
    if (timed_ && account.watch.state() != State::wait_local) account.watch.enter(State::wait_local, now_);
    wait_began_ = now_;
    ladder_.restart(transport_.crowded());
    asked_ = false;
    awake_at_ = 0;
    if (first_stall_ != 0) return;
    first_stall_ = now_;
    if (next_check_ == 0) next_check_ = now_ + check_interval_;
    if (deadline_ == 0) deadline_ = (timed_ ? began_ : now_) + clock_.to_ticks(timeout_);
  }
  void end_wait() {
    if (timed_) current_->watch.enter(State::protocol, now_);
    waiting_ = false;
  }

  /// `now_` is always the end of the last poll that found nothing: a wait ends there, and the poll that finds
  /// something is work.
  template <ProgressClient C>
  void wait(C& client) {
    if (client.has_neighbours()) {
      const Ticks before = clock_.now();
      if (client.look_elsewhere()) {  // that time was theirs
        now_ = before;
        leave();
        current_ = nullptr;
        waiting_ = false;
        return;
      }
    }
    if (timed_ && !asked_ && ladder_.worth_asking(now_ - wait_began_)) {
      asked_ = true;
      if (const Ticks length = ladder_.expect(client.expected_wait())) awake_at_ = wait_began_ + length;
    }
    const Ticks before = now_;
    const Ladder::Rest rest = pass_time() ? Ladder::Rest::none : ladder_.climb(now_ - wait_began_);
    if (rest == Ladder::Rest::doze && doze(client)) return;
    if (transport_.aborted()) client.raise_abort();
    now_ = clock_.now();
    // A pause is short: if this took long, the core was given to someone else, and perhaps it should have it more often.
    if (now_ - before > off_core_) {
      ladder_.give_way();
      if (timed_) current_->watch.slept(now_ - before);
    }
    if (rest == Ladder::Rest::park && now_ < deadline_) {
      sleep(client);
      if (!waiting_) return;
    }
    if ((now_ < next_check_ && now_ < deadline_) || check(client)) return;
    if (now_ >= deadline_ && !poll(client)) client.expired();  // it may have come while nobody looked
  }
  /// Whether all who are needed are there and in matching calls; throws if not. True if something moved.
  template <ProgressClient C>
  bool check(C& client) {
    next_check_ = now_ + check_interval_;
    client.check_peers();
    const Rank lost = client.first_lost();
    if (std::exchange(lost_, lost) != lost || lost < 0) return false;  // what it sent before may still be on its way
    if (!poll(client)) client.raise_lost(lost);  // it may have sent everything before it went
    return true;
  }

  /// Of a simulated transport's time only waits take any: it passes here, until something may have moved or there is something to check.
  bool pass_time() {
    const auto until_next = [&] {
      const Ticks until = std::min(next_check_, deadline_);
      return clock_.to_ns(until - std::min(until, now_));
    };
    if constexpr (requires { { transport_.pass_time(nanoseconds{}) } -> std::same_as<bool>; }) {
      return transport_.pass_time(until_next());  // it may be one or not
    } else if constexpr (requires { transport_.pass_time(nanoseconds{}); }) {
      transport_.pass_time(until_next());
      return true;
    } else {
      return false;
    }
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
    const nanoseconds most = client.has_neighbours() ? nanoseconds(std::chrono::microseconds(200)) : std::chrono::milliseconds(25);
    const Ticks until = awake_at_ > now_ ? std::min(awake_at_, deadline_) : deadline_;
    const nanoseconds limit = std::min(most, clock_.to_ns(until - now_));
    const Ticks before = now_;
    transport_.park(limit, [&] { return poll(client) || transport_.aborted() || client.interrupted(); });
    if (!waiting_) return;
    now_ = clock_.now();
    if (timed_) current_->watch.slept(now_ - before);
    if (awake_at_ == 0 || now_ < awake_at_) return;
    awake_at_ = 0;
    ladder_.spin_on(now_ - wait_began_);
  }

  T& transport_;
  Clock clock_;
  bool timed_;
  OperationAccount* current_ = nullptr;  // who is served
  Ladder ladder_;
  Ticks check_interval_, off_core_;
  std::uint32_t doze_;
  nanoseconds timeout_{};
  Ticks began_ = 0, driven_ = 0;  // driving, this time; and the times before
  Ticks now_ = 0, deadline_ = 0, next_check_ = 0, wait_began_ = 0;
  Ticks first_stall_ = 0;  // since driving began: up to there, what moves may have been able to for long
  Ticks awake_at_ = 0;  // the wait is likely to end soon after; 0: nobody knows
  bool waiting_ = false, asked_ = false;  // asked: how long it will be
  bool unserved_ = false;  // driving has begun, and nothing was served yet
  std::size_t looks_ = 0;
  Rank lost_ = -1;  // who was found to be gone, but may have sent all
};

}  // namespace tally::inline v0
