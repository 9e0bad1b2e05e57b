// SPDX-License-Identifier: Apache-2.0
// The exact partition of an operation's time. The driving thread is always in one state; leaving it books the
// ticks since the last switch, so the parts add up to the whole by construction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "../clock.hpp"
#include "../types.hpp"

namespace tally::inline v0 {

enum class State : std::uint8_t {
  copy,           // bytes moved by this thread
  reduce,         // bytes combined by this thread
  codec,          // compressed and decompressed
  protocol,       // headers, matching, bookkeeping, and frames short enough to travel with their header
  wait_arrival,   // a rank came late to the operation
  wait_transfer,  // data was on its way
  wait_credit,    // the receiver had no room
  wait_local,     // something of this rank itself was not ready
  undriven,       // nobody drove the operation
};
inline constexpr std::size_t state_count = 9;

constexpr std::string_view name_of(State state) {
  constexpr std::string_view names[] = {"copy", "reduce", "codec", "protocol", "wait_arrival", "wait_transfer", "wait_credit", "wait_local", "undriven"};
  return names[static_cast<std::size_t>(state)];
}

/// What one rank made this one wait.
struct Blame {
  Rank rank = -1;
  nanoseconds arrival{}, transfer{}, credit{};
  nanoseconds total() const { return arrival + transfer + credit; }
};

/// Collects one operation's ticks. Waits are kept per rank and cause, so that blame adds up to the waits exactly.
class Stopwatch {
 public:
  explicit Stopwatch(int n) : waits_(static_cast<std::size_t>(n)), is_blamed_(static_cast<std::size_t>(n)) { blamed_.reserve(waits_.size()); }

  void start(Ticks now) {
    mark_ = now;
    state_ = State::protocol;
    ticks_[static_cast<std::size_t>(State::protocol)] = 0;
    if (plain_) return;
    plain_ = true;
    ticks_.fill(0);
    slept_ = queued_ = 0;
    for (const Rank r : blamed_) {
      waits_[static_cast<std::size_t>(r)] = {};
      is_blamed_[static_cast<std::size_t>(r)] = false;
    }
    blamed_.clear();
  }
  /// Ranks that may be waited for.
  int size() const { return static_cast<int>(waits_.size()); }
  State state() const { return state_; }
  Ticks mark() const { return mark_; }
  void enter(State state, Ticks now) {
    ticks_[static_cast<std::size_t>(state_)] += now - mark_;
    mark_ = now;
    state_ = state;
    plain_ = plain_ && state == State::protocol;
  }
  /// Nothing but protocol so far, as in most short calls.
  bool plain() const { return plain_; }
  /// Books part of a wait on `rank`; whoever calls this moves the mark beyond it.
  void blame(Rank rank, State cause, Ticks ticks) {
    if (ticks == 0) return;
    plain_ = false;
    const auto r = static_cast<std::size_t>(rank);
    if (!is_blamed_[r]) {
      is_blamed_[r] = true;
      blamed_.push_back(rank);
    }
    (cause == State::wait_arrival ? waits_[r].arrival : cause == State::wait_transfer ? waits_[r].transfer : waits_[r].credit) += ticks;
  }
  /// Goes on in `state`, from `now` on: the time up to there is booked otherwise.
  void resume(State state, Ticks now) {
    state_ = state;
    mark_ = now;
  }
  /// Goes on after a time in which others were served, for all of it but `undriven`, in which nobody was.
  void resume(State state, Ticks now, Ticks undriven) {
    const Ticks queued = now - mark_ - undriven;
    plain_ = false;
    ticks_[static_cast<std::size_t>(State::undriven)] += undriven;
    ticks_[static_cast<std::size_t>(State::wait_local)] += queued;
    queued_ += queued;
    resume(state, now);
  }
  void book(State state, Ticks ticks) {
    ticks_[static_cast<std::size_t>(state)] += ticks;
    plain_ = false;
  }
  /// Of a wait: the thread was at work, or asleep, for others.
  void unpaid(Ticks ticks) {
    queued_ += ticks;
    plain_ = false;
  }
  void slept(Ticks ticks) {
    slept_ += ticks;
    plain_ = false;
  }

  Ticks slept() const { return slept_; }
  /// The part of the waits in which the thread served other operations: it is they who pay for its core.
  Ticks queued() const { return queued_; }
  /// Ticks of the states that have no one to blame.
  const std::array<Ticks, state_count>& ticks() const { return ticks_; }
  const std::vector<Rank>& blamed() const { return blamed_; }
  Blame blame_of(Rank rank, const Clock& clock) const {
    const Waits& w = waits_[static_cast<std::size_t>(rank)];
    return {rank, clock.to_ns(w.arrival), clock.to_ns(w.transfer), clock.to_ns(w.credit)};
  }

 private:
  struct Waits {
    Ticks arrival = 0, transfer = 0, credit = 0;
  };
  Ticks mark_ = 0, slept_ = 0, queued_ = 0;
  State state_ = State::protocol;
  bool plain_ = true;
  std::array<Ticks, state_count> ticks_{};
  std::vector<Waits> waits_;
  std::vector<char> is_blamed_;
  std::vector<Rank> blamed_;
};

}  // namespace tally::inline v0
