// SPDX-License-Identifier: Apache-2.0
// Who may be at work in an engine: one thread of the caller's at a time (see thread_rule.hpp) and, once there is one, the
// progress thread, which steps back when the caller's wants to go on. Until then nothing is locked.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "error.hpp"
#include "thread_rule.hpp"

namespace tally::inline v0 {

class Gate {
 public:
  /// The caller's thread comes in; `interrupt()` wakes the progress thread if that is asleep in here.
  template <class Interrupt>
  void enter(Interrupt&& interrupt) {
    rule_.enter();
    lock(interrupt);
  }
  /// And goes, and calls what has become due meanwhile.
  void leave() {
    if (!due_.empty()) return leave_and_call();
    unlock();
    rule_.exit();
  }
  /// The same without the rule: for who may come at any time and does not stay.
  template <class Interrupt>
  void lock(Interrupt&& interrupt) {
    if (!shared_) return;
    wanted_.fetch_add(1, std::memory_order_seq_cst);
    interrupt();
    mutex_.lock();
    wanted_.fetch_sub(1, std::memory_order_relaxed);
  }
  void unlock() {
    if (shared_) mutex_.unlock();
  }

  /// There is a progress thread from now on; from the caller's thread, outside.
  void share() { shared_ = true; }
  /// The progress thread comes in; without the lock it must not.
  std::unique_lock<std::mutex> try_lock() { return std::unique_lock(mutex_, std::try_to_lock); }
  bool wanted() const { return wanted_.load(std::memory_order_relaxed) != 0; }

  /// To be called by whoever leaves next.
  void call_later(std::function<void()> f) { due_.push_back(std::move(f)); }
  std::vector<std::function<void()>> take_due() { return std::exchange(due_, {}); }

 private:
  [[gnu::noinline]] void leave_and_call() {
    const auto due = take_due();
    unlock();
    rule_.exit();
    for (const auto& f : due) f();
  }

  ThreadRule rule_;
  std::mutex mutex_;
  std::atomic<int> wanted_{0};
  bool shared_ = false;
  std::vector<std::function<void()>> due_;
};

}  // namespace tally::inline v0
