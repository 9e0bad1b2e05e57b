// SPDX-License-Identifier: Apache-2.0
// The driver's seat of a rank of a table: a thread of the caller's goes first, the server's own has the time in between. That one
// sleeps where messages wake it; but while the caller comes back at once every time, and serves others meanwhile, it naps instead: to be
// woken costs both sides more than a short message (to announce the sleep, a barrier in all processes; a system call; two switches).
#pragma once

#include <sys/prctl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>

#include "../clock.hpp"
#include "../transport/any.hpp"

namespace tally::inline v0::detail {

class Seat {
 public:
  using Lock = std::unique_lock<std::mutex>;
  Seat(AnyTransport& transport, const Clock& clock) : transport_(transport), clock_(clock), soon_(clock.to_ticks(std::chrono::microseconds(50))) {}

  // A thread of the caller's. The server's may be asleep meanwhile, without the lock where the transport allows that.

  void enter() {
    wanted_.fetch_add(1, std::memory_order_seq_cst);
    if (!transport_.sleeps_apart() && asleep_.load(std::memory_order_seq_cst)) transport_.interrupt();
    mutex_.lock();
    wanted_.fetch_sub(1, std::memory_order_relaxed);
    came_back_soon_.store(clock_.now() - left_at_ < soon_, std::memory_order_relaxed);
    ++visits_;
  }
  void leave() {
    left_at_ = clock_.now();
    mutex_.unlock();
  }
  /// Before a caller's thread sleeps in here: two cannot be woken for one rank.
  void oust() {
    if (std::this_thread::get_id() == server_.load()) return;
    while (asleep_.load(std::memory_order_seq_cst)) {
      transport_.interrupt();
      std::this_thread::yield();
    }
  }
  /// The server's thread is to end.
  void stop() {
    stopping_.store(true);
    oust();
  }

  // The server's thread.

  Lock begin() {
    server_.store(std::this_thread::get_id());
    ::prctl(PR_SET_TIMERSLACK, 1000UL);  // naps are short
    return Lock(mutex_);
  }
  bool is_over() const { return stopping_.load(std::memory_order_relaxed); }
  /// A caller wants to come in, or it is over.
  bool is_wanted() const { return wanted_.load(std::memory_order_seq_cst) > 0 || is_over(); }
  /// Lets a caller in who wants to come, or is about to come back. False if there is none.
  bool give_way(Lock& lock) {
    const bool was_here = std::exchange(visits_seen_, visits_) != visits_;
    if (!is_wanted() && !(was_here && came_back_soon_.load(std::memory_order_relaxed))) return false;
    lock.unlock();
    take(lock);
    return true;
  }
  /// Sleeps, until a message comes or for so long. `looks`: whether there is something to do after all.
  template <class Looks>
  void sleep(Lock& lock, nanoseconds limit, Looks&& looks) {
    struct Asleep {
      std::atomic<bool>& flag;
      explicit Asleep(std::atomic<bool>& f) : flag(f) { flag.store(true, std::memory_order_seq_cst); }
      ~Asleep() { flag.store(false, std::memory_order_seq_cst); }
    };
    {
      const Asleep asleep(asleep_);
      transport_.park(limit, [&] {
        if (looks() || is_wanted()) return true;
        if (transport_.sleeps_apart()) lock.unlock();
        return false;
      });
    }
    if (!lock.owns_lock() && !lock.try_lock()) take(lock);
  }

 private:
  static constexpr std::chrono::microseconds shortest_nap{50}, longest_nap{400};

  /// After a caller. To wait at the lock would cost that one a system call.
  void take(Lock& lock) {
    for (auto nap = shortest_nap; nap <= longest_nap && came_back_soon_.load(std::memory_order_relaxed); nap *= 2) {
      std::this_thread::sleep_for(nap);
      if (lock.try_lock()) return;
    }
    while (wanted_.load(std::memory_order_relaxed) > 0) std::this_thread::yield();  // it has not come in yet
    lock.lock();
  }

  AnyTransport& transport_;
  const Clock& clock_;
  const Ticks soon_;
  std::mutex mutex_;
  std::atomic<int> wanted_{0};
  std::atomic<bool> stopping_{false}, asleep_{false}, came_back_soon_{false};
  std::atomic<std::thread::id> server_{};
  // With the lock only:
  std::uint64_t visits_ = 0, visits_seen_ = 0;
  Ticks left_at_ = 0;
};

}  // namespace tally::inline v0::detail
