// SPDX-License-Identifier: Apache-2.0
// One thread at a time, enforced: a second one that comes while the first is inside gets an error, and so does an operator
// that calls the communicator that is calling it. Costs a store and a load as long as it is always the same thread; another
// one makes itself known by a barrier on all cores (see AsymmetricBarrier in wait.hpp). tests/thread_rule_test.cpp proves it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "error.hpp"
#include "wait.hpp"

namespace tally::inline v0 {

class ThreadRule {
 public:
  ThreadRule() : fences_(!AsymmetricBarrier::register_process()) {}

  /// Errc::invalid_argument if another thread is inside, or this one already is.
  void enter() {
    Mark* const mine = user_.load(std::memory_order_acquire);
    if (mine->thread.load(std::memory_order_relaxed) != self() || mine->inside.load(std::memory_order_relaxed)) return take_over();
    mine->inside.store(true, std::memory_order_relaxed);
    if (fences_) full_fence();
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (user_.load(std::memory_order_relaxed) == mine) {
      inside_ = mine;
      return;
    }
    mine->inside.store(false, std::memory_order_release);
    take_over();
  }
  void exit() { inside_->inside.store(false, std::memory_order_release); }
  /// Whether this very thread is.
  [[gnu::cold, gnu::noinline]] bool is_inside() const {
    const Mark* mark = user_.load(std::memory_order_acquire);
    if (mark->thread.load(std::memory_order_relaxed) != self()) {  // perhaps for a moment: another one is being refused
      const std::lock_guard lock(taking_over_);
      for (mark = &first_; mark && mark->thread.load(std::memory_order_relaxed) != self();) mark = mark->next.get();
    }
    return mark && mark->inside.load(std::memory_order_relaxed);
  }

 private:
  /// Each thread has one of its own: one that was the user may still be about to set its mark when another one is inside.
  struct Mark {
    std::atomic<std::uintptr_t> thread{0};  // set once, perhaps while others ask whether it is theirs
    std::atomic<bool> inside{false};
    std::unique_ptr<Mark> next;
  };
  static std::uintptr_t self() { return static_cast<std::uintptr_t>(pthread_self()); }

  /// Either the thread before sees in enter() that it is no longer the user, or this one sees it inside.
  [[gnu::cold, gnu::noinline]] void take_over() {
    const std::lock_guard lock(taking_over_);
    Mark& mine = mark_of(self());
    if (mine.inside.load(std::memory_order_relaxed)) throw Error(Errc::invalid_argument, "this communicator is called from inside one of its own operations");
    Mark* const before = user_.load(std::memory_order_relaxed);
    user_.store(&mine, std::memory_order_seq_cst);
    AsymmetricBarrier::heavy();
    for (const Mark* other = &first_; other; other = other->next.get()) {
      if (other == &mine || !other->inside.load(std::memory_order_acquire)) continue;
      user_.store(before, std::memory_order_release);  // as if nothing had been: else it could come in the fast way next time
      throw Error(Errc::invalid_argument, "this communicator is in use by another thread: one at a time, or a duplicate() for each");
    }
    mine.inside.store(true, std::memory_order_seq_cst);
    inside_ = &mine;
  }
  /// Under the lock.
  Mark& mark_of(std::uintptr_t thread) {
    Mark* mark = &first_;
    const auto has = [&](std::uintptr_t id) { return mark->thread.load(std::memory_order_relaxed) == id; };
    for (; !has(thread) && !has(0); mark = mark->next.get())
      if (!mark->next) mark->next = std::make_unique<Mark>();
    mark->thread.store(thread, std::memory_order_relaxed);
    return *mark;
  }

  Mark first_;
  std::atomic<Mark*> user_{&first_};
  Mark* inside_ = nullptr;  // of who is inside
  mutable std::mutex taking_over_;
  bool fences_;
};

}  // namespace tally::inline v0
