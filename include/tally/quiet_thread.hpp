// SPDX-License-Identifier: Apache-2.0
// Threads of the library's own, which get none of the program's signals.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace tally::inline v0::detail {

/// Throws std::system_error where there can be no thread.
template <class F>
std::thread quiet_thread(F&& f) {
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread made(std::forward<F>(f));
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return made;
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
}

}  // namespace tally::inline v0::detail
