// SPDX-License-Identifier: Apache-2.0
// How a rank waits: spin, pause, then sleep in the kernel; where ranks outnumber cores it yields at once.
// And how it sleeps without missing a wake-up: the sleeper announces itself, then makes every core's stores
// visible (membarrier), so that senders need no fence of their own.
#pragma once

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <string_view>

#include "clock.hpp"
#include "types.hpp"

namespace tally::inline v0 {

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t while_equal, nanoseconds at_most) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(at_most);
  const timespec limit{seconds.count(), (at_most - seconds).count()};
  ::syscall(SYS_futex, &word, FUTEX_WAIT, while_equal, &limit, nullptr, 0);
}
inline void futex_wake(std::atomic<std::uint32_t>& word) { ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }
/// The same for sleepers that share a word: those whose `who` has a bit in common with the waker's are woken, in one call.
inline void futex_wait_as(std::uint32_t who, std::atomic<std::uint32_t>& word, std::uint32_t while_equal, nanoseconds at_most) {
  timespec until{};  // of this kind of wait the kernel wants to know the end
  clock_gettime(CLOCK_MONOTONIC, &until);
  const std::int64_t end = until.tv_nsec + at_most.count() % 1'000'000'000;
  until.tv_sec += static_cast<time_t>(at_most.count() / 1'000'000'000 + end / 1'000'000'000);
  until.tv_nsec = static_cast<long>(end % 1'000'000'000);
  ::syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, while_equal, &until, nullptr, who);
}
inline void futex_wake_those(std::uint32_t who, std::atomic<std::uint32_t>& word) { ::syscall(SYS_futex, &word, FUTEX_WAKE_BITSET, INT_MAX, nullptr, nullptr, who); }

/// A full fence. TSan does not model fences and says so; nothing here relies on one for what data is visible.
inline void full_fence() {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"
#endif
  std::atomic_thread_fence(std::memory_order_seq_cst);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
}

/// A heavy barrier on the sleeper's side that pairs with a plain load on the senders' side. Works between
/// processes when all of them have registered.
class AsymmetricBarrier {
 public:
  /// False where the kernel has none; then senders must fence.
  static bool register_process() {
    return ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
  }
  static void heavy() {
    full_fence();
    ::syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0);
  }
};

/// What a wait may cost. Where ranks outnumber cores all of them yield and park at once: the core is needed.
enum class WaitPolicy : std::uint8_t {
  latency,   // spins for 20 ms before it sleeps
  balanced,  // spins for as long as sleeping would cost, less where waits have lately been long
  energy,    // sleeps as soon as it is clear that this is a wait
};
constexpr std::string_view name_of(WaitPolicy policy) { return policy == WaitPolicy::latency ? "latency" : policy == WaitPolicy::balanced ? "balanced" : "energy"; }

/// Decides how to spend the next moment of a wait. Spinning costs the waiter's core, sleeping costs the wake-up (some
/// 10 us): to spin for about as long as that is never worse than twice the best choice (ski rental: Karlin et al.,
/// "Empirical studies of competitive spinning", 1991), and the waits seen tell when not to begin.
class Ladder {
 public:
  Ladder(const Clock& clock, WaitPolicy policy)
      : policy_(policy), pause_after_(clock.to_ticks(std::chrono::microseconds(2))), early_(clock.to_ticks(std::chrono::microseconds(5))),
        even_(clock.to_ticks(std::chrono::microseconds(50))), late_(clock.to_ticks(std::chrono::milliseconds(20))) {}
  void restart(bool crowded) {
    crowded_ = crowded;
    turns_ = 0;
    park_after_ = policy_ == WaitPolicy::latency ? late_ : policy_ == WaitPolicy::energy || long_waits_ > 160 ? early_ : even_;
  }
  /// Others want this core: for the rest of this wait it is treated as crowded.
  void give_way() {
    if (!crowded_) turns_ = 0;
    crowded_ = true;
  }
  /// A wait has ended. Only those that a decision could have changed count.
  void learn(Ticks waited) {
    if (waited > early_) long_waits_ += ((waited > 4 * even_ ? 256 : 0) - long_waits_) / 4;
  }
  /// Pauses for a moment; true if the caller should park instead.
  bool climb(Ticks waited) {
    ++turns_;
    if (crowded_) {
      if (turns_ <= spins) return false;
      if (turns_ > spins + max_yields) return true;
      sched_yield();
      return false;
    }
    if (waited > park_after_) return true;
    if (waited > pause_after_) cpu_pause();
    return false;
  }

 private:
  static constexpr int spins = 10;  // where ranks outnumber cores: one on another core may be just about to send
  static constexpr int max_yields = 64;
  WaitPolicy policy_;
  Ticks pause_after_, early_, even_, late_, park_after_ = 0;
  int long_waits_ = 0;  // of 256, the last ones weigh most: after four in a row it is above 160
  bool crowded_ = false;
  int turns_ = 0;
};

}  // namespace tally::inline v0
