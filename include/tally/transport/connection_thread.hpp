// SPDX-License-Identifier: Apache-2.0
// The process's thread that looks after connections, so that who is let in does not wait for a rank that is busy elsewhere.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../file.hpp"
#include "../quiet_thread.hpp"

namespace tally::inline v0::detail {

/// Fabric: hear_of_connections(), which is called from this thread, and connection_event(), a descriptor that is readable when it has to be.
template <class Fabric>
class ConnectionThread {
 public:
  static ConnectionThread& get() {
    static std::mutex mutex;
    static ConnectionThread* known = nullptr;
    static pid_t process = 0;
    const std::lock_guard lock(mutex);
    if (process != ::getpid()) {  // a parent's thread is not here
      known = new ConnectionThread;  // for as long as the process is
      process = ::getpid();
    }
    return *known;
  }
  void add(Fabric& fabric) {
    {
      const std::lock_guard lock(mutex_);
      all_.push_back(&fabric);
    }
    ring();
  }
  /// It is not looked at any more, either.
  void remove(Fabric& fabric) {
    {
      const std::lock_guard lock(mutex_);
      std::erase(all_, &fabric);
    }
    ring();
  }

 private:
  ConnectionThread() : bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!bell_) throw Error(Errc::no_resources, {"no descriptor to look after connections with: ", errno_text(errno)});
    quiet_thread([this] { run(); }).detach();
  }
  void ring() { (void)::eventfd_write(bell_.get(), 1); }
  void run() {
    std::vector<pollfd> what;
    for (;;) {
      what.assign(1, {bell_.get(), POLLIN, 0});
      {
        const std::lock_guard lock(mutex_);
        for (Fabric* each : all_) each->hear_of_connections(), what.push_back({each->connection_event(), POLLIN, 0});
      }
      (void)::poll(what.data(), what.size(), -1);
      eventfd_t rung = 0;
      (void)::eventfd_read(bell_.get(), &rung);
    }
  }

  FileDescriptor bell_;
  std::mutex mutex_;
  std::vector<Fabric*> all_;
};

}  // namespace tally::inline v0::detail
