// SPDX-License-Identifier: Apache-2.0
// An operation in flight, as the user holds it: asked, waited for, or left to call back. And operations whose arguments
// are settled once, to be run many times.
#pragma once

#include <chrono>
#include <coroutine>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "call.hpp"
#include "neighbours.hpp"
#include "progress_thread.hpp"
#include "run.hpp"

namespace tally::inline v0 {

/// What a receive was given.
struct Received {
  Report report;
  std::size_t count = 0;  // elements
  Rank from = -1;
  int tag = 0;
};

/// Returned by the async_ calls. It goes on in calls of its communicator (also of other operations of it) and in the
/// progress thread, if there is one (see progress_thread()). Until it is done its buffers belong to it: they must neither go
/// nor change, and inputs may only be read. Destroying it waits until it is done, or its deadline; in an operator that the same
/// communicator calls nobody can, and the process ends (std::terminate).
class [[nodiscard]] Operation {
 public:
  Operation() = default;
  Operation(std::shared_ptr<AnyEngine> engine, Run* run) : engine_(std::move(engine)), run_(run) {
    if (!run_->done.load(std::memory_order_acquire)) Neighbours::of_this_thread().add(engine_);
    auto& the = detail::TheProgressWorker::get();
    if (!the.exists.load(std::memory_order_acquire) || run_->done.load(std::memory_order_acquire)) return;
    std::shared_ptr<detail::ProgressWorker> worker;
    {
      const std::lock_guard lock(the.mutex);
      worker = the.worker.lock();
    }
    if (!worker) return;
    engine_->be_driven_by_others();
    worker->notify(engine_);
  }
  Operation(Operation&& other) noexcept : engine_(std::move(other.engine_)), run_(std::exchange(other.run_, nullptr)) {}
  Operation& operator=(Operation&& other) noexcept {
    if (this == &other) return *this;
    give_back();
    engine_ = std::move(other.engine_);
    run_ = std::exchange(other.run_, nullptr);
    return *this;
  }
  ~Operation() { give_back(); }

  /// Does what can be done without waiting. True if it is done, with success or not: wait() tells.
  bool test() { return wait_for(nanoseconds{0}); }
  /// The same for so long at most. That it takes longer is no failure.
  bool wait_for(nanoseconds at_most) { return engine().wait(*run_, &at_most); }
  /// Its report, once it is done; throws what it failed with. Its deadline counts from here on. May be called again.
  Report wait() {
    engine().wait(*run_, nullptr);
    return engine_->fetch(*run_);
  }
  /// The same for a receive.
  template <Element T>
  Received received() {
    const Report report = wait();
    return {report, run_->message.bytes / sizeof(T), run_->message.peer, run_->message.tag};
  }
  /// `f()` is called when it is done: by the thread whose call made it so (at once, if it is already), when that is done with
  /// the communicator. It must not throw.
  Operation& then(std::function<void()> f) {
    engine().then(*run_, std::move(f));
    return *this;
  }

  // co_await: the coroutine goes on in the thread that then() names.
  bool await_ready() { return test(); }
  void await_suspend(std::coroutine_handle<> waiting) { then([waiting] { waiting.resume(); }); }
  Report await_resume() { return wait(); }

 private:
  AnyEngine& engine() {
    if (!run_) throw Error(Errc::invalid_argument, "this operation was moved from, or never started");
    return *engine_;
  }
  void give_back() noexcept {
    // A second thread may be inside: an error anywhere else, but here somebody has to wait.
    while (run_) {
      try {
        engine_->give_back(*run_);
        run_ = nullptr;
      } catch (...) {
        if (engine_->is_inside()) refuse_operator();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
    engine_ = nullptr;
  }

  /// The operation would wait for the operator, and the operator for the operation. As std::thread does it.
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_operator() {
    std::fputs("tally: an operator destroys an Operation in flight of the communicator that calls it; nobody can wait for it there\n", stderr);
    std::terminate();
  }

  std::shared_ptr<AnyEngine> engine_;
  Run* run_ = nullptr;
};

/// An operation of a communicator whose arguments are settled. It works on the same memory each time.
class Persistent {
 public:
  Persistent(std::shared_ptr<AnyEngine> engine, const Call& call, std::shared_ptr<const void> op) : engine_(std::move(engine)), op_(std::move(op)), plan_(engine_->pin(call)), call_(call) { call_.pinned = plan_.get(); }
  /// As the operation itself; Errc::invalid_argument once the communicator is gone.
  Report run() {
    if (!engine_) throw Error(Errc::invalid_argument, "this operation was moved from");
    return engine_->run(call_);
  }

 private:
  std::shared_ptr<AnyEngine> engine_;
  std::shared_ptr<const void> op_;  // call_ points at it
  std::shared_ptr<void> plan_;
  Call call_;
};

}  // namespace tally::inline v0
