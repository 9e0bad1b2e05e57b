// SPDX-License-Identifier: Apache-2.0
// Programs that take turns on one thread, each with a stack of its own: what the simulated transport's ranks are. Hides
// how stacks are changed, and what exceptions and the address sanitizer must be told about that. For tests: Linux with glibc, and not
// under the thread sanitizer, for which there is but one thread anyway.
#pragma once

#include <cxxabi.h>
#include <ucontext.h>

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <utility>

// Of the address sanitizer's run-time library, where the program has it.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
}

namespace tally::inline v0 {

class Fiber {
 public:
  /// The program that makes it.
  Fiber() = default;
  /// Runs `body`, which must not throw, when it is first switched to; then `next()` says which other one goes on.
  Fiber(std::function<void()> body, std::function<Fiber&()> next)
      : body_(std::move(body)), next_(std::move(next)), stack_(std::make_unique_for_overwrite<std::byte[]>(stack_bytes)), bottom_(stack_.get()), size_(stack_bytes) {
    ::getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    ::makecontext(&context_, &Fiber::enter, 0);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// From this one, which is running, to another; returns when somebody switches back.
  void switch_to(Fiber& to) { leave_for(to, false); }

 private:
  static constexpr std::size_t stack_bytes = std::size_t{256} << 10;
  struct Exceptions {  // what the run-time library keeps per thread, and each of these programs has its own of
    void* caught = nullptr;
    unsigned int uncaught = 0;
  };

  void leave_for(Fiber& to, bool for_good) {
    auto& exceptions = *reinterpret_cast<Exceptions*>(abi::__cxa_get_globals());
    exceptions_ = std::exchange(exceptions, to.exceptions_);
    from_ = this;
    to_ = &to;
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, to.bottom_, to.size_);
    ::swapcontext(&context_, &to.context_);
    arrive();
  }
  void arrive() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack_, &from_->bottom_, &from_->size_);
  }
  static void enter() {
    Fiber& self = *to_;
    self.arrive();
    self.body_();
    self.leave_for(self.next_(), true);
    std::terminate();  // nobody comes back here
  }

  static inline thread_local Fiber *from_ = nullptr, *to_ = nullptr;  // of the last switch
  std::function<void()> body_;
  std::function<Fiber&()> next_;
  std::unique_ptr<std::byte[]> stack_;
  const void* bottom_ = nullptr;
  std::size_t size_ = 0;
  void* fake_stack_ = nullptr;
  Exceptions exceptions_;
  ucontext_t context_{};
};

}  // namespace tally::inline v0
