// SPDX-License-Identifier: Apache-2.0
// What all meters of a host's counters do alike: ask each counter, unwrap what it says, and turn failures into caveats and
// sentences. A counter that fails keeps its total: a failed read is never taken for a 0.
#pragma once

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include "../text.hpp"
#include "host_files.hpp"
#include "meter.hpp"

namespace tally::inline v0 {
namespace detail {

/// Watts that nothing of the kind draws: at least twice what the largest draws at its limit (processors of 2025: 500 W a package;
/// 24 DIMMs of 15 W a socket; eight accelerators of 1.2 kW and their host, 14 kW a node). `cpu_core` is all cores of a package.
constexpr double plausible_watts(Domain kind) {
  switch (kind) {
    case Domain::cpu_package:
    case Domain::cpu_core: return 1000;
    case Domain::dram: return 750;
    case Domain::psys: return 5000;
    case Domain::gpu_board: return 3000;
    case Domain::gpu_module: return 6000;
    case Domain::node:
    case Domain::network_model: return 30000;
  }
  return 30000;
}
/// One core of many.
inline constexpr double plausible_core_watts = 100;

/// The counters of one meter.
class Counters {
 public:
  /// What a counter shows now. May throw.
  using Read = std::function<Reading()>;

  /// `caveats` hold for all of them; `permission` is what to do where one must not be read.
  Counters(std::string source, std::string permission, Caveats caveats, MeterClock clock)
      : source_(std::move(source)), permission_(std::move(permission)), caveats_(caveats), clock_(std::move(clock)), made_(clock_()) {}

  /// Counts units of so many nanojoules from now on. `modulus` as for Unwrapped; 0 with info.wrap_joules set: it wraps, but nobody
  /// knows where, at the earliest there. `what` names the counter in warnings. False, and a warning, if it cannot be read.
  bool add(DomainInfo info, std::string what, Read read, std::uint64_t modulus, double nanojoules) {
    const Unwrapped count(modulus, nanojoules, info.max_watts);
    const bool wraps_unseen = modulus == 0 && info.wrap_joules > 0;
    return add(std::move(info), {std::move(what), std::move(read), count, wraps_unseen});
  }
  /// Integrates microwatts from now on.
  bool add(DomainInfo info, std::string what, Read read, nanoseconds longest_gap) {
    const IntegratedPower integral(info.max_watts, longest_gap);
    return add(std::move(info), {std::move(what), std::move(read), integral, false});
  }

  /// The place of the domain with this key, or -1.
  int find(std::string_view key) const {
    for (std::size_t i = 0; i < domains_.size(); ++i)
      if (domains_[i].key == key) return static_cast<int>(i);
    return -1;
  }
  void warn(std::initializer_list<Piece> text) noexcept {
    try {
      warnings_.add(concat({source_, ": ", concat(text)}));
    } catch (...) {  // no memory for it
    }
  }
  /// That a file or event could not be read, and what to do about it.
  void warn_unreadable(std::string_view what, int error, std::string_view consequence) noexcept {
    try {
      if (error == EACCES || error == EPERM) warn({what, " cannot be read: ", why(error), "; ", consequence, ". To grant it, ", permission_, "."});
      else warn({what, " cannot be read: ", why(error), "; ", consequence, "."});
    } catch (...) {
    }
  }

  std::span<const DomainInfo> domains() const { return domains_; }
  const std::vector<std::string>& warnings() const { return warnings_.all(); }

  SampleResult sample(std::span<MeterSample> out) noexcept {
    SampleResult result;
    for (std::size_t i = 0; i < counters_.size() && result.count < out.size(); ++i) {
      Counter& counter = counters_[i];
      const Reading reading = ask(counter);
      const nanoseconds now = clock_();
      Caveats caveats = 0;
      if (reading.error == 0) {
        caveats = take(i, reading.value, now) | std::exchange(counter.failure, 0);
      } else {
        counter.failure = caveats = caveat_of(reading.error);
        if (result.error == std::errc{}) result.error = static_cast<std::errc>(reading.error);
        warn_unreadable(counter.what, reading.error, "the energy of this time is not known unless it can be read again");
      }
      const Nanojoules total = counter.total();
      // Hypervisors may show counters that are always 0. That is no energy of 0 J, so such a counter says nothing until it moves.
      if (total == 0 && has(domains_[i].caveats, Caveat::virtualised)) {
        if (reading.error == 0 && now - made_ >= std::chrono::seconds(2)) warn({counter.what, " stands still in this virtual machine, so it measures nothing; its energy is unknown until it moves."});
        continue;
      }
      out[result.count++] = {static_cast<std::uint16_t>(i), now, total, caveats};
    }
    return result;
  }

 private:
  using Progress = std::variant<Unwrapped, IntegratedPower>;
  struct Counter {
    std::string what;
    Read read;
    Progress progress;
    bool wraps_unseen;      // it wraps, but nobody knows where
    nanoseconds read_at{};  // the last time it could be read
    Caveats failure = 0;    // why it could not be read since
    Nanojoules total() const {
      return std::visit([](const auto& p) { return p.total(); }, progress);
    }
  };

  bool add(DomainInfo info, Counter counter) {
    const Reading first = ask(counter);
    if (first.error != 0) return warn_unreadable(counter.what, first.error, "its energy is not known"), false;
    info.source = source_;
    info.caveats |= caveats_;
    if (has(caveats_, Caveat::filtered)) info.accuracy = 0.29;  // off by up to a half: the standard error of an even spread over +-50 %
    domains_.push_back(std::move(info));
    counters_.push_back(std::move(counter));
    counters_.back().read_at = clock_();
    take(counters_.size() - 1, first.value, counters_.back().read_at);
    return true;
  }
  Caveats take(std::size_t i, std::uint64_t value, nanoseconds now) {
    Counter& counter = counters_[i];
    const nanoseconds since = now - std::exchange(counter.read_at, now);
    if (auto* const power = std::get_if<IntegratedPower>(&counter.progress)) return power->add(1e-6 * static_cast<double>(value), now);
    Caveats caveats = std::get<Unwrapped>(counter.progress).add(value, now);
    const DomainInfo& info = domains_[i];
    if (counter.wraps_unseen && info.max_watts * 1e-9 * static_cast<double>(since.count()) > 0.5 * info.wrap_joules) caveats |= Caveat::wrap_ambiguous;
    return caveats;
  }
  static Reading ask(Counter& counter) noexcept {
    try {
      return counter.read();
    } catch (...) {
      return {0, ENOMEM};
    }
  }
  static Caveats caveat_of(int error) {
    if (error == EACCES || error == EPERM) return static_cast<Caveats>(Caveat::permission_denied);
    if (error == ENOENT || error == ENOTDIR || error == ENODEV) return static_cast<Caveats>(Caveat::vanished);
    return static_cast<Caveats>(Caveat::unreadable);
  }

  std::string source_, permission_;
  Caveats caveats_;
  MeterClock clock_;
  nanoseconds made_;
  std::vector<DomainInfo> domains_;
  std::vector<Counter> counters_;
  MeterWarnings warnings_;
};

}  // namespace detail
}  // namespace tally::inline v0
