// SPDX-License-Identifier: Apache-2.0
// Says when memory is gone for which somebody keeps something, such as a registration with a device: unmapped, moved, or its pages given
// back. The kernel tells by userfaultfd, and lets who unmaps wait until that was read; so one thread of the process reads, which
// sleeps otherwise. Nothing here is allocated or freed while the lock is held: who frees may be who unmaps.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "../file.hpp"
#include "../quiet_thread.hpp"

namespace tally::inline v0::detail {

class MemoryWatch {
 public:
  struct Range {
    std::uintptr_t begin = 0, end = 0;
  };
  /// Who keeps something. More ranges than there is room for become everything.
  class Listener {
   public:
    explicit Listener(MemoryWatch* watch) : watch_(watch) {
      if (!watch_) return;
      const std::lock_guard lock(watch_->mutex_);
      next_ = std::exchange(watch_->listeners_, this);
    }
    ~Listener() {
      if (!watch_) return;
      const std::lock_guard lock(watch_->mutex_);
      Listener** at = &watch_->listeners_;
      while (*at != this) at = &(*at)->next_;
      *at = next_;
    }
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

   private:
    friend MemoryWatch;
    MemoryWatch* watch_;
    Listener* next_ = nullptr;
    std::array<Range, 32> gone_;
    std::size_t count_ = 0;
  };

  /// The process's own; null where the kernel has none, or this process may not use it.
  static MemoryWatch* get() {
    static std::mutex mutex;
    static MemoryWatch* watch = nullptr;
    static pid_t process = 0;
    const std::lock_guard lock(mutex);
    if (process == ::getpid()) return watch;  // a parent's looks after the parent
    process = ::getpid();
    watch = nullptr;
    FileDescriptor events(static_cast<int>(::syscall(SYS_userfaultfd, user_mode_only | O_CLOEXEC | O_NONBLOCK)));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    if (!events || ::ioctl(events.get(), UFFDIO_API, &api) != 0) return nullptr;
    void* const own = ::mmap(nullptr, page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED) return nullptr;
    auto made = std::unique_ptr<MemoryWatch>(new MemoryWatch(std::move(events), own));
    if (made->watch(pages_of(own, page())) && made->start()) watch = made.release();  // for as long as the process is there
    return watch;
  }

  /// From now on, whole pages. False: this memory cannot be watched.
  bool watch(Range pages) {
    uffdio_register what{};
    what.range = {pages.begin, pages.end - pages.begin};
    what.mode = UFFDIO_REGISTER_MODE_WP;  // no page of it is ever protected, so that nothing faults
    return ::ioctl(events_.get(), UFFDIO_REGISTER, &what) == 0;
  }
  /// f(range) for what is gone since the last call. (What no event tells of: pages that a file, or memory that is shared, loses to
  /// truncation, or to another process.)
  template <class F>
  void take(Listener& listener, F&& f) {
    // Fails while somebody unmaps anything and nobody has read of it. It is about a page of this class's own, since kernels before
    // 5.19 give whoever writes to a page next a copy of it.
    uffdio_writeprotect probe{};
    probe.range = {reinterpret_cast<std::uintptr_t>(own_page_), page()};
    while (::ioctl(events_.get(), UFFDIO_WRITEPROTECT, &probe) != 0 && errno == EAGAIN) {
      {
        const std::lock_guard lock(mutex_);
        read();
      }
      std::this_thread::yield();
    }
    std::array<Range, 32> gone;
    std::size_t count = 0;
    {
      const std::lock_guard lock(mutex_);
      gone = listener.gone_;
      count = std::exchange(listener.count_, 0);
    }
    for (std::size_t i = 0; i < count; ++i) f(gone[i]);
  }
  static std::size_t page() {
    static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    return bytes;
  }
  static Range pages_of(const void* at, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(at);
    return {begin / page() * page(), (begin + bytes + page() - 1) / page() * page()};
  }

 private:
  static constexpr int user_mode_only = 1;  // UFFD_USER_MODE_ONLY, which headers older than Linux 5.11 lack
  MemoryWatch(FileDescriptor events, void* own_page) : events_(std::move(events)), own_page_(own_page) {}
  bool start() try {
    quiet_thread([this] {
      for (;;) {
        pollfd event{events_.get(), POLLIN, 0};
        (void)::poll(&event, 1, -1);
        const std::lock_guard lock(mutex_);
        read();
      }
    }).detach();
    return true;
  } catch (const std::system_error&) {
    return false;
  }
  /// Who unmapped goes on as soon as its event is read: what that says has to be known to all before the lock is given back.
  void read() {
    uffd_msg event;
    while (::read(events_.get(), &event, sizeof event) == static_cast<ssize_t>(sizeof event)) {
      if (event.event == UFFD_EVENT_UNMAP || event.event == UFFD_EVENT_REMOVE) tell({event.arg.remove.start, event.arg.remove.end});
      else if (event.event == UFFD_EVENT_REMAP) tell({event.arg.remap.from, event.arg.remap.from + event.arg.remap.len});
    }
  }
  void tell(Range gone) {
    for (Listener* each = listeners_; each; each = each->next_) {
      if (each->count_ == each->gone_.size()) each->gone_[0] = {0, UINTPTR_MAX}, each->count_ = 1;
      each->gone_[each->count_++] = gone;
    }
  }

  FileDescriptor events_;
  void* own_page_;
  std::mutex mutex_;
  Listener* listeners_ = nullptr;
};

}  // namespace tally::inline v0::detail
