// SPDX-License-Identifier: Apache-2.0
// How a rank waits: spin, pause, doze where the processor can, then sleep in the kernel; where ranks outnumber cores it yields at once.
// And how it sleeps without missing a wake-up: the sleeper announces itself, then makes every core's stores
// visible (membarrier), so that senders need no fence of their own.
#pragma once

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

/// Processors that can rest until a line of memory changes: Intel's UMWAIT and AMD's MWAITX do so for less power than
/// pausing takes. arm(), look once more, doze(): a change in between is not missed, and the time is bounded.
class LineWait {
 public:
  static bool available() { return kind() != Kind::none; }
  static void arm([[maybe_unused]] const void* line) {
#if defined(__x86_64__)
    // In bytes, since assemblers know them only for processors that have them.
    if (kind() == Kind::umwait) asm volatile(".byte 0xf3, 0x0f, 0xae, 0xf7" : : "D"(line) : "memory");  // umonitor rdi
    else if (kind() == Kind::mwaitx) asm volatile(".byte 0x0f, 0x01, 0xfa" : : "a"(line), "c"(0), "d"(0) : "memory");  // monitorx
#endif
  }
  /// In the lightest state there is, which is left within some 100 ns.
  static void doze([[maybe_unused]] std::uint32_t ticks) {
#if defined(__x86_64__)
    if (kind() == Kind::umwait) {
      const std::uint64_t until = __builtin_ia32_rdtsc() + ticks;
      asm volatile(".byte 0xf2, 0x0f, 0xae, 0xf1" : : "c"(1), "d"(static_cast<std::uint32_t>(until >> 32)), "a"(static_cast<std::uint32_t>(until)) : "memory", "cc");  // umwait ecx
    } else if (kind() == Kind::mwaitx) {
      asm volatile(".byte 0x0f, 0x01, 0xfb" : : "a"(0xf0), "c"(2), "b"(ticks) : "memory");  // mwaitx, with the time limit
    }
#endif
  }

 private:
  enum class Kind : std::uint8_t { none, umwait, mwaitx };
  static Kind kind() {
    static const Kind found = [] {
#if defined(__x86_64__)
      unsigned a = 0, b = 0, c = 0, d = 0;
      if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & (1u << 5))) return Kind::umwait;
      if (__get_cpuid(0x80000001, &a, &b, &c, &d) && (c & (1u << 29))) return Kind::mwaitx;
#endif
      return Kind::none;
    }();
    return found;
  }
};

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
  Ladder(const Clock& clock, WaitPolicy policy, bool dozes = LineWait::available())
      : policy_(policy), dozes_(dozes), pause_after_(clock.to_ticks(std::chrono::microseconds(2))), early_(clock.to_ticks(std::chrono::microseconds(5))),
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
  /// This wait is going to be so long, as far as can be told: there is no use in spinning through it, but perhaps at its end.
  /// Returns when to be awake again, 0 for when woken.
  Ticks expect(Ticks wait) {
    if (crowded_ || policy_ == WaitPolicy::latency || wait <= 4 * even_) return 0;
    park_after_ = early_;
    return policy_ == WaitPolicy::balanced ? wait : 0;
  }
  /// It has lasted as long as that: its end is near.
  void spin_on(Ticks waited) { park_after_ = waited + even_; }
  /// From when on it is worth asking how long a wait will be.
  bool worth_asking(Ticks waited) const { return waited > early_; }
  /// A wait has ended. Only those that a decision could have changed count.
  void learn(Ticks waited) {
    if (waited > early_) long_waits_ += ((waited > 4 * even_ ? 256 : 0) - long_waits_) / 4;
  }
  /// What the caller should do before it looks again; pauses and yields are done here.
  enum class Rest : std::uint8_t { none, doze, park };
  Rest climb(Ticks waited) {
    ++turns_;
    if (crowded_) {
      if (turns_ <= spins) return Rest::none;
      if (turns_ > spins + max_yields) return Rest::park;
      sched_yield();
      return Rest::none;
    }
    if (waited > park_after_) return Rest::park;
    if (waited <= pause_after_) return Rest::none;
    if (dozes_) return Rest::doze;
    cpu_pause();
    return Rest::none;
  }

 private:
  static constexpr int spins = 10;  // where ranks outnumber cores: one on another core may be just about to send
  static constexpr int max_yields = 64;
  WaitPolicy policy_;
  bool dozes_;  // or pauses
  Ticks pause_after_, early_, even_, late_, park_after_ = 0;
  int long_waits_ = 0;  // of 256, the last ones weigh most: after four in a row it is above 160
  bool crowded_ = false;
  int turns_ = 0;
};

}  // namespace tally::inline v0
