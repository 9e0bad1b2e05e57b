// SPDX-License-Identifier: Apache-2.0
// One thread at a time, enforced: a second one that comes while the first is inside gets an error, and so does an operator
// that calls the communicator that is calling it. Costs a store and a load as long as it is always the same thread; another
// one makes itself known by a barrier on all cores (see AsymmetricBarrier in wait.hpp).
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <mutex>

#include "error.hpp"
#include "wait.hpp"

namespace tally::inline v0 {

class ThreadRule {
 public:
  ThreadRule() : fences_(!AsymmetricBarrier::register_process()) {}

  /// Errc::invalid_argument if another thread is inside, or this one already is.
  void enter() {
    const std::uintptr_t me = self();
    if (user_.load(std::memory_order_relaxed) != me || inside_.load(std::memory_order_relaxed) != 0) return take_over(me);
    inside_.store(me, std::memory_order_relaxed);
    if (fences_) full_fence();
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (user_.load(std::memory_order_relaxed) == me) return;
    inside_.store(0, std::memory_order_release);
    take_over(me);
  }
  void exit() { inside_.store(0, std::memory_order_release); }

 private:
  static std::uintptr_t self() { return static_cast<std::uintptr_t>(pthread_self()); }

  /// Either the thread before sees in enter() that it is no longer the user, or this one sees it inside.
  [[gnu::cold, gnu::noinline]] void take_over(std::uintptr_t me) {
    const std::lock_guard lock(taking_over_);
    if (user_.load(std::memory_order_relaxed) != me) {
      user_.store(me, std::memory_order_seq_cst);
      AsymmetricBarrier::heavy();
    }
    if (const std::uintptr_t other = inside_.load(std::memory_order_acquire); other != 0)
      throw Error(Errc::invalid_argument, other == me ? "this communicator is called from inside one of its own operations" :
                                                        "this communicator is in use by another thread: one at a time, or a duplicate() for each");
    inside_.store(me, std::memory_order_seq_cst);
  }

  std::atomic<std::uintptr_t> user_{0}, inside_{0};
  std::mutex taking_over_;
  bool fences_;
};

}  // namespace tally::inline v0
