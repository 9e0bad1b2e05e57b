// SPDX-License-Identifier: Apache-2.0
// Who may be at work in an engine: one thread of the caller's at a time (see thread_rule.hpp) and, once there is one, the
// progress thread, which steps back when the caller's wants to go on. Until then nothing is locked.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "error.hpp"
#include "thread_rule.hpp"

namespace tally::inline v0 {

class Gate {
 public:
  /// The caller's thread comes in; `interrupt()` wakes the progress thread if that is asleep in here. Not `ruled`: another
  /// thread may be in here, with an operation that is done, too.
  template <class Interrupt>
  void enter(Interrupt&& interrupt, bool ruled = true) {
    if (ruled) rule_.enter();
    if (shared_) enter_shared(interrupt, ruled);
  }
  /// The same for who looks in from elsewhere, unless somebody is in here or another thread was since.
  bool try_look() {
    if (shared_ && !mutex_.try_lock()) return false;
    if (rule_.try_look()) return true;
    unlock();
    return false;
  }
  void end_look() {
    leave_and_call(&ThreadRule::end_look);
  }
  bool is_user() const { return rule_.is_user(); }
  /// And goes, and calls what has become due meanwhile.
  void leave(bool ruled = true) {
    if (!due_.empty()) return leave_and_call(ruled ? &ThreadRule::exit : nullptr);
    unlock();
    if (ruled) rule_.exit();
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
  void share() {
    if (!shared_) shared_ = true;  // not written again: the progress thread may read it
  }
  bool shared() const { return shared_; }
  /// The progress thread comes in; without the lock it must not.
  std::unique_lock<std::mutex> try_lock() { return std::unique_lock(mutex_, std::try_to_lock); }
  /// While it has the lock: it is this thread.
  void begin_driving() { driver_.store(std::this_thread::get_id(), std::memory_order_relaxed); }
  void end_driving() {
    driver_.store(std::thread::id(), std::memory_order_relaxed);
    back_.store(false, std::memory_order_relaxed);
  }
  /// Whether this thread is the progress thread, wherever it is at work.
  static bool& on_progress_thread() {
    static thread_local bool is = false;
    return is;
  }
  bool is_driver() const { return driver_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }
  /// Whether this thread is at work in here, and so in an operator of the user's.
  bool is_inside() const { return is_driver() || rule_.is_inside(); }
  /// It has something else to do.
  void call_back() { back_.store(true, std::memory_order_relaxed); }
  /// Somebody else wants to go on: the progress thread should leave.
  bool wanted() const { return wanted_.load(std::memory_order_relaxed) != 0 || (back_.load(std::memory_order_relaxed) && is_driver()); }

  /// To be called by whoever leaves next.
  void call_later(std::function<void()> f) { due_.push_back(std::move(f)); }
  std::vector<std::function<void()>> take_due() { return std::exchange(due_, {}); }

 private:
  template <class Interrupt>
  [[gnu::noinline]] void enter_shared(Interrupt& interrupt, bool ruled) {
    if (is_driver() || (!ruled && rule_.is_inside())) refuse_own(ruled);
    lock(interrupt);
  }
  /// `leave_rule`: how, if at all.
  [[gnu::noinline]] void leave_and_call(void (ThreadRule::*leave_rule)()) {
    const auto due = take_due();
    unlock();
    if (leave_rule) (rule_.*leave_rule)();
    for (const auto& f : due) f();
  }
  /// An operator calls, where the rule does not know of it: it would wait for itself.
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_own(bool ruled) {
    if (ruled) rule_.exit();
    throw Error(Errc::invalid_argument, "this communicator is called from inside one of its own operations");
  }

  ThreadRule rule_;
  std::mutex mutex_;
  std::atomic<int> wanted_{0};
  std::atomic<bool> back_{false};
  std::atomic<std::thread::id> driver_{};  // the progress thread, while it is at work in here
  bool shared_ = false;
  std::vector<std::function<void()>> due_;
};

}  // namespace tally::inline v0
