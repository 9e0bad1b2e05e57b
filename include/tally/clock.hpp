// SPDX-License-Identifier: Apache-2.0
// One host-wide clock in ticks: the time stamp counter where it is invariant and the kernel trusts it (about
// 10 ns a read), else CLOCK_MONOTONIC in nanoseconds. Both are the same on all cores and in all processes of a
// host, so ticks of different ranks compare directly; only durations are converted to nanoseconds. Simulations bring
// a time of their own.
#pragma once

#include <time.h>

#include <chrono>
#include <cstdint>
#include <fstream>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "types.hpp"

namespace tally::inline v0 {

using Ticks = std::uint64_t;

/// Where a clock gets its time from in simulations, in nanoseconds.
struct TimeSource {
  virtual ~TimeSource() = default;
  virtual Ticks now() const = 0;
};

class Clock {
 public:
  /// This host's clock, calibrated once per process (2 ms) and inherited through fork.
  static const Clock& host() {
    static const Clock clock(tsc_is_trustworthy());
    return clock;
  }
  explicit Clock(bool use_tsc) : tsc_(use_tsc) {
    if (tsc_) calibrate();
  }
  explicit Clock(const TimeSource& source) : tsc_(false), source_(&source) {}

  Ticks now() const {
#if defined(__x86_64__)
    if (tsc_) return __builtin_ia32_rdtsc();
#endif
    return source_ ? source_->now() : monotonic();
  }
  nanoseconds to_ns(Ticks duration) const {
    return nanoseconds(static_cast<std::int64_t>((static_cast<Wide>(duration) * factor_) >> 32));
  }
  Ticks to_ticks(nanoseconds duration) const {
    return static_cast<Ticks>((static_cast<Wide>(duration.count() > 0 ? duration.count() : 0) * inverse_) >> 32);
  }
  bool is_tsc() const { return tsc_; }

  static Ticks monotonic() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<Ticks>(t.tv_sec) * 1'000'000'000u + static_cast<Ticks>(t.tv_nsec);
  }

 private:
  __extension__ typedef unsigned __int128 Wide;

  static bool tsc_is_trustworthy() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(0x80000007, &a, &b, &c, &d) || !(d & (1u << 8))) return false;
    std::ifstream file("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    std::string source;
    // A kernel that found the counter unstable has moved to another clock source.
    return !(file >> source) || source == "tsc" || source == "kvm-clock" || source == "hyperv_clocksource_tsc_page";
#else
    return false;
#endif
  }

  struct Sample {
    Ticks tsc = 0, ns = 0;
  };
  /// The closest pair out of several: a reading that was interrupted is wide and loses.
  Sample sample() const {
    Sample best;
    Ticks narrowest = ~Ticks{0};
    for (int i = 0; i < 16; ++i) {
      const Ticks before = now(), ns = monotonic(), after = now();
      if (after - before >= narrowest) continue;
      narrowest = after - before;
      best = {before + (after - before) / 2, ns};
    }
    return best;
  }
  void calibrate() {
    const Sample begin = sample();
    while (monotonic() - begin.ns < 2'000'000) {
    }
    const Sample end = sample();
    factor_ = static_cast<std::uint64_t>((static_cast<Wide>(end.ns - begin.ns) << 32) / (end.tsc - begin.tsc));
    inverse_ = static_cast<std::uint64_t>((static_cast<Wide>(end.tsc - begin.tsc) << 32) / (end.ns - begin.ns));
  }

  bool tsc_;
  const TimeSource* source_ = nullptr;
  std::uint64_t factor_ = std::uint64_t{1} << 32, inverse_ = factor_;  // nanoseconds per tick, ticks per nanosecond, 32.32
};

}  // namespace tally::inline v0
