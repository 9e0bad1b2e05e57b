// SPDX-License-Identifier: Apache-2.0
// Who watches operations as they go: a profiler, a tracer, a log. Observers are called beside the data path, and cost a
// predicted branch where there is none.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

#include "../types.hpp"
#include "report.hpp"

namespace tally::inline v0 {

/// An operation that begins.
struct OperationBegin {
  Collective operation = Collective::none;
  std::uint64_t bytes = 0;  // of the caller's data
  std::string_view algorithm;
  std::uint32_t sequence = 0;  // of this rank's operations on its communicator: Report::sequence
};

/// Derive from it what you want to know, and give it to Options::observer. It is called by whichever thread is at work for the
/// communicator, which may be the progress thread, in the middle of its calls: be quick, and use no communicator. What it throws is swallowed.
/// It hears of all communicators made with those options, and of what is derived from them.
class Observer {
 public:
  virtual ~Observer() = default;
  /// What this returns is what ended() is told.
  virtual std::uint64_t begun(const OperationBegin&) { return 0; }
  /// The times of `report` are known, joules not yet: see Report::energy(). `failed`: with an error.
  virtual void ended(std::uint64_t /*begun*/, const Report& /*report*/, bool /*failed*/) {}
  /// Joules became known: what meters charged this communicator's operations so far, up to that time (of CLOCK_MONOTONIC). Some ten times a
  /// second while it is in use; never without a meter.
  virtual void charged(nanoseconds /*until*/, const AccountEnergy& /*so_far*/) {}
};

namespace detail {

/// Somebody or nobody.
class Watched {
 public:
  Watched(std::shared_ptr<Observer> observer = nullptr) : observer_(std::move(observer)) {}
  explicit operator bool() const { return observer_ != nullptr; }
  [[gnu::cold, gnu::noinline]] std::uint64_t begun(const OperationBegin& operation) const noexcept {
    std::uint64_t number = 0;
    tell([&](Observer& observer) { number = observer.begun(operation); });
    return number;
  }
  [[gnu::cold, gnu::noinline]] void ended(std::uint64_t begun, const Report& report, bool failed) const noexcept {
    tell([&](Observer& observer) { observer.ended(begun, report, failed); });
  }
  [[gnu::cold, gnu::noinline]] void charged(nanoseconds until, const AccountEnergy& so_far) const noexcept {
    tell([&](Observer& observer) { observer.charged(until, so_far); });
  }

 private:
  template <class F>
  void tell(F&& f) const noexcept {
    try {
      f(*observer_);
    } catch (...) {  // whoever watches must not disturb
    }
  }
  std::shared_ptr<Observer> observer_;
};

}  // namespace detail
}  // namespace tally::inline v0
