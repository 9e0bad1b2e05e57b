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
#include <thread>

#include "error.hpp"
#include "wait.hpp"

namespace tally::inline v0 {

class ThreadRule {
 public:
  ThreadRule() : fences_(!AsymmetricBarrier::register_process()) {}

  /// Errc::invalid_argument if another thread is inside, or this one already is.
  void enter() {
    Mark* const mine = user_.load(std::memory_order_acquire);
    if (!is_outside(*mine) || !come_in(*mine)) take_over();
  }
  void exit() { inside_->inside.store(false, std::memory_order_release); }
  /// For a thread that only looks whether there is something to do: comes in if it was the last one in here. Who comes
  /// meanwhile waits until end_look().
  bool try_look() {
    Mark* const mine = user_.load(std::memory_order_acquire);
    if (!is_outside(*mine)) return false;
    mine->looks.store(true, std::memory_order_relaxed);
    if (come_in(*mine)) return true;
    mine->looks.store(false, std::memory_order_release);  // not before its mark is gone
    return false;
  }
  void end_look() {
    Mark* const mine = inside_;
    mine->inside.store(false, std::memory_order_release);
    mine->looks.store(false, std::memory_order_release);  // likewise
  }
  /// Whether no other thread has been inside since this one was.
  bool is_user() const { return user_.load(std::memory_order_acquire)->thread.load(std::memory_order_relaxed) == self(); }
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
    std::atomic<bool> looks{false};  // and will be gone in a moment
    std::unique_ptr<Mark> next;
  };
  static std::uintptr_t self() { return static_cast<std::uintptr_t>(pthread_self()); }

  /// Of the last user, which is this thread.
  static bool is_outside(const Mark& mark) { return mark.thread.load(std::memory_order_relaxed) == self() && !mark.inside.load(std::memory_order_relaxed); }
  /// False if another thread takes over.
  bool come_in(Mark& mine) {
    mine.inside.store(true, std::memory_order_release);
    if (fences_) full_fence();
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (user_.load(std::memory_order_relaxed) == &mine) {
      inside_ = &mine;
      return true;
    }
    mine.inside.store(false, std::memory_order_release);
    return false;
  }
  [[gnu::cold, gnu::noinline]] void take_over() {
    while (!try_take_over()) std::this_thread::yield();  // not with the lock: whom it waits for may need that
  }
  /// Either the thread before sees in come_in() that it is no longer the user, or this one sees it inside.
  bool try_take_over() {
    const std::lock_guard lock(taking_over_);
    Mark& mine = mark_of(self());
    if (mine.inside.load(std::memory_order_relaxed)) throw Error(Errc::invalid_argument, "this communicator is called from inside one of its own operations");
    Mark* const before = user_.load(std::memory_order_relaxed);
    user_.store(&mine, std::memory_order_seq_cst);
    AsymmetricBarrier::heavy();
    for (const Mark* other = &first_; other; other = other->next.get()) {
      if (other == &mine || !other->inside.load(std::memory_order_acquire)) continue;
      const bool looks = other->looks.load(std::memory_order_acquire) || !other->inside.load(std::memory_order_acquire);  // or did up to now
      user_.store(before, std::memory_order_release);  // as if nothing had been: else it could come in the fast way next time
      if (looks) return false;
      throw Error(Errc::invalid_argument, "this communicator is in use by another thread: one at a time, or a duplicate() for each");
    }
    mine.inside.store(true, std::memory_order_seq_cst);
    inside_ = &mine;
    return true;
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
