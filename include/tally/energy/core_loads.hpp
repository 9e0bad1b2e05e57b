// SPDX-License-Identifier: Apache-2.0
// Keeps cores busy with what the library does when it communicates and waits, a thread bound to each core, so that its watts can be measured.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../error.hpp"
#include "../reduce.hpp"
#include "../topology.hpp"
#include "../wait.hpp"
#include "calibration.hpp"

namespace tally::inline v0 {

class CoreLoads final : public LoadGenerator {
 public:
  /// One thread of each core that this process may run on, as sysfs tells them.
  explicit CoreLoads(const std::string& sysfs = "/sys/devices/system/cpu") {
    const cpu_set_t allowed = own_cores();
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (!CPU_ISSET(core, &allowed)) continue;
      cpu_set_t siblings = detail::parse_cores(detail::first_line(detail::concat({sysfs, "/cpu", core, "/topology/thread_siblings_list"})));
      CPU_AND(&siblings, &siblings, &allowed);
      const int first = detail::first_core(siblings);
      if (first < 0 || first == core) cores_.push_back(core);
    }
    if (cores_.empty()) throw Error(Errc::unsupported, "the system does not say which cores this process may run on");
  }
  CoreLoads(const CoreLoads&) = delete;
  CoreLoads& operator=(const CoreLoads&) = delete;
  ~CoreLoads() override { stop(); }

  int cores() const override { return static_cast<int>(cores_.size()); }
  bool can(Load load) const override { return load != Load::doze || LineWait::available(); }
  void start(Load load, int cores) override {
    stop();
    stop_.store(false, std::memory_order_relaxed);
    try {
      for (int i = 0; load != Load::idle && i < std::min(cores, this->cores()); ++i) threads_.emplace_back([this, load, core = cores_[static_cast<std::size_t>(i)]] { work(load, core); });
    } catch (const std::system_error& error) {
      stop();
      throw Error(Errc::no_resources, {"no thread to keep a core busy: ", error.what()});
    }
  }
  void stop() override {
    stop_.store(true, std::memory_order_relaxed);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  nanoseconds busy() override {
    nanoseconds all{};
    for (std::thread& thread : threads_) {
      clockid_t clock{};
      timespec t{};
      if (::pthread_getcpuclockid(thread.native_handle(), &clock) == 0 && ::clock_gettime(clock, &t) == 0) all += nanoseconds(static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec);
    }
    return all;
  }
  void rest(nanoseconds time) override {
    timespec left{static_cast<time_t>(time.count() / 1'000'000'000), static_cast<long>(time.count() % 1'000'000'000)};
    while (::nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
  }

 private:
  void work(Load load, int core) {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    ::pthread_setaffinity_np(::pthread_self(), sizeof only, &only);  // where that is refused the scheduler spreads busy threads by itself
    const auto on = [&] { return !stop_.load(std::memory_order_relaxed); };
    if (load == Load::spin) {
      while (on()) {
      }
    } else if (load == Load::pause) {
      while (on()) cpu_pause();
    } else if (load == Load::doze) {
      while (on()) {
        LineWait::arm(&stop_);
        if (on()) LineWait::doze(doze_ticks);
      }
    } else {
      std::vector<std::byte> to(block), from(block);
      const Fold fold = fold_of<float>(sum);
      while (on()) {
        if (load == Load::copy) std::memcpy(to.data(), from.data(), block);
        else fold(to.data(), to.data(), from.data(), block);
        asm volatile("" : : "r"(to.data()) : "memory");  // or it need not be done
      }
    }
  }

  static constexpr std::size_t block = 256 << 10;      // of each operand: what fits into the caches next to a core, as the library's slots do
  static constexpr std::uint32_t doze_ticks = 50'000;  // the kernel ends it after 100'000 in any case
  std::vector<int> cores_;
  std::vector<std::thread> threads_;
  std::atomic<bool> stop_{true};
};

}  // namespace tally::inline v0
