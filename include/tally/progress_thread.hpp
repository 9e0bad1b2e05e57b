// SPDX-License-Identifier: Apache-2.0
// One thread of the process that drives what runs in the background, for all its communicators. It sleeps while nothing is
// pending, and steps back whenever the caller's thread calls the communicator that it is driving.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "gate.hpp"
#include "run.hpp"
#include "topology.hpp"

namespace tally::inline v0 {

namespace detail {

/// Before anybody pins a thread.
inline const cpu_set_t cores_at_start = own_cores();

class ProgressWorker {
 public:
  /// `core`: where to run; -1: anywhere the process may, since who starts it may be pinned to a core that it needs itself.
  explicit ProgressWorker(int core) : thread_([state = state_] { state->work(); }) {
    cpu_set_t set = cores_at_start;
    if (core >= 0) CPU_ZERO(&set);
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(static_cast<std::size_t>(core), &set);
    const int error = ::pthread_setaffinity_np(thread_.native_handle(), sizeof set, &set);
    if (error == 0 || core < 0) return;
    stop();
    throw Error(Errc::invalid_argument, {"the progress thread cannot run on core ", core, ": ", std::generic_category().message(error)});
  }
  ~ProgressWorker() { stop(); }
  ProgressWorker(const ProgressWorker&) = delete;

  /// Something is pending there.
  void notify(const std::shared_ptr<AnyEngine>& engine) {
    {
      const std::lock_guard lock(state_->mutex);
      auto& pending = state_->pending;
      const bool known = std::ranges::find(pending, engine) != pending.end();
      if (known && !std::exchange(state_->stalled, false)) return;
      if (!known) {
        for (const auto& other : pending) other->step_back();  // it may be asleep in there
        pending.push_back(engine);
      }
    }
    state_->changed.notify_one();
  }

 private:
  /// Also the thread's own: what it calls back may hold the last ProgressThread.
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<AnyEngine>> pending;
    bool stopping = false, stalled = false;  // stalled: it naps because nothing moves

    void work() {
      Gate::on_progress_thread() = true;
      // Where both share a core, waking it must not take that from who starts an operation and has yet to start a device, or go on.
      const sched_param none{};
      if (::sched_getscheduler(0) == SCHED_OTHER) ::sched_setscheduler(0, SCHED_BATCH, &none);
      using std::chrono::microseconds, std::chrono::steady_clock;
      static constexpr nanoseconds least_nap = microseconds(20), patience = microseconds(50);
      std::vector<std::shared_ptr<AnyEngine>> engines;
      nanoseconds nap = least_nap;
      steady_clock::time_point last_move{};
      for (;;) {
        {
          std::unique_lock lock(mutex);
          if (pending.empty()) {
            changed.wait(lock, [&] { return stopping || !pending.empty(); });
            last_move = steady_clock::now();
          }
          if (stopping) return;
          engines = pending;
        }
        // With one communicator it waits in there, asleep if that takes long; with several each gets a short look.
        bool driven = false, moved = false;
        for (const auto& engine : engines) {
          const AnyEngine::Driven how = engine->drive(engines.size() == 1 ? std::chrono::milliseconds(5) : microseconds(5), engines.size(), moved);
          driven = driven || how != AnyEngine::Driven::by_caller;
          if (how != AnyEngine::Driven::nothing_left) continue;
          const std::lock_guard lock(mutex);
          if (!engine->pending()) std::erase(pending, engine);
        }
        const auto now = steady_clock::now();
        if (moved || (driven && engines.size() == 1)) {
          nap = least_nap;
          last_move = now;
        } else if (!driven || now - last_move > patience) {  // the callers' threads drive all of them, or all wait for other ranks
          const nanoseconds most_nap = driven ? microseconds(200) : microseconds(1000);
          std::unique_lock lock(mutex);
          stalled = driven;
          changed.wait_for(lock, std::min(nap, most_nap), [&] { return stopping || stalled != driven || pending.size() != engines.size(); });
          stalled = false;
          nap = std::min(2 * nap, most_nap);
        }
        engines.clear();
      }
    }
  };
  void stop() {
    {
      const std::lock_guard lock(state_->mutex);
      state_->stopping = true;
      for (const auto& engine : state_->pending) engine->step_back();
    }
    state_->changed.notify_one();
    if (thread_.get_id() == std::this_thread::get_id()) thread_.detach();
    else if (thread_.joinable()) thread_.join();
  }

  std::shared_ptr<State> state_ = std::make_shared<State>();
  std::thread thread_;
};

/// The process's, while somebody holds it.
struct TheProgressWorker {
  std::mutex mutex;
  std::weak_ptr<ProgressWorker> worker;
  std::atomic<bool> exists{false};  // so that nobody has to ask
  static TheProgressWorker& get() {
    static TheProgressWorker& the = *new TheProgressWorker;  // never destroyed: operations may end during exit
    return the;
  }
};

}  // namespace detail

/// Holds the process's progress thread: it ends with the last of these.
class ProgressThread {
 public:
  explicit ProgressThread(std::shared_ptr<detail::ProgressWorker> worker) : worker_(std::move(worker)) {}

 private:
  std::shared_ptr<detail::ProgressWorker> worker_;
};

/// Starts the progress thread, or shares the one there is (then `core` is ignored). From then on it drives operations that
/// are started; without it, they go on in calls of their communicator alone. It runs on `core`, or Errc::invalid_argument if it
/// cannot; -1: on any that the process had when it started (`taskset`, a launcher), even if the caller is pinned to one of them.
[[nodiscard]] inline ProgressThread progress_thread(int core = -1) {
  auto& the = detail::TheProgressWorker::get();
  const std::lock_guard lock(the.mutex);
  auto worker = the.worker.lock();
  if (!worker) {
    worker = std::make_shared<detail::ProgressWorker>(core);
    the.worker = worker;
    the.exists.store(true, std::memory_order_release);
  }
  return ProgressThread(std::move(worker));
}

}  // namespace tally::inline v0
