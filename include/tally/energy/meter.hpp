// SPDX-License-Identifier: Apache-2.0
// What a meter is: it tells which parts of the machine it measures, and, when asked, the total of each in nanojoules, which
// never falls. The headers beside this one read the hardware's counters; what they share, unwrapping a counter and
// integrating watts, is here.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "../types.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// A part of a machine that has a meter of its own.
enum class Domain : std::uint8_t { cpu_package, cpu_core, dram, psys, gpu_board, gpu_module, node, network_model };

constexpr std::string_view name_of(Domain domain) {
  constexpr std::string_view names[] = {"cpu_package", "cpu_core", "dram", "psys", "gpu_board", "gpu_module", "node", "network_model"};
  return names[static_cast<std::size_t>(domain)];
}

/// Such a domain contains others that have no parent: where both are known, its joules are not to be added to theirs.
constexpr bool whole_machine(Domain kind) { return kind == Domain::psys || kind == Domain::node; }


/// One domain of a meter.
struct DomainInfo {
  Domain kind = Domain::node;
  int parent = -1;          // index of the domain of the same meter that this one is a part of, -1 if none: only those without a parent are added up
  std::string key;          // which one, unique on its host whoever measures it: "package-0", "package-0/dram", "gpu-GPU-8a1f..."
  std::string source;       // who measures it: "perf", "powercap", "nvml"
  nanoseconds tick{};       // how often the counter moves
  double unit_joules = 0;   // its least step
  double wrap_joules = 0;   // it starts anew after that many; 0: never
  double max_watts = 0;     // nothing plausible is above
  double accuracy = 0.05;   // relative standard error of the meter itself
  Caveats caveats = 0;      // that hold for all it tells
};

/// One reading: the joules since the meter was made, without wraps.
struct MeterSample {
  std::uint16_t domain = 0;  // index into domains()
  nanoseconds time{};        // when it was read, of CLOCK_MONOTONIC
  Nanojoules total = 0;      // never less than in the reading before
  Caveats caveats = 0;       // of what came since the reading before
};

/// `count` readings were written. A domain that could not be read has none, or one with its old total and the caveat that says why.
struct SampleResult {
  std::size_t count = 0;
  std::errc error{};  // of the first that could not be read
};

/// May be slow and is asked by one thread at a time, never by one that communicates. A meter may also have `warnings()`: the
/// texts of what is wrong with what it reads, each once.
template <class M>
concept EnergyMeter = requires(M& meter, std::span<MeterSample> out) {
  { meter.domains() } -> std::convertible_to<std::span<const DomainInfo>>;
  { meter.sample(out) } noexcept -> std::same_as<SampleResult>;  // out has room for all domains
};

/// Any meter, e.g. one that a user or a vendor supplies.
class AnyMeter {
 public:
  template <class M>
    requires(!std::same_as<std::remove_cvref_t<M>, AnyMeter> && EnergyMeter<std::remove_cvref_t<M>>)
  AnyMeter(M&& meter) : meter_(std::make_unique<Holder<std::remove_cvref_t<M>>>(std::forward<M>(meter))) {}

  std::span<const DomainInfo> domains() const { return meter_->domains(); }
  SampleResult sample(std::span<MeterSample> out) noexcept { return meter_->sample(out); }
  std::vector<std::string> warnings() const { return meter_->warnings(); }

 private:
  struct Base {
    virtual ~Base() = default;
    virtual std::span<const DomainInfo> domains() = 0;
    virtual SampleResult sample(std::span<MeterSample> out) noexcept = 0;
    virtual std::vector<std::string> warnings() = 0;
  };
  template <class M>
  struct Holder final : Base {
    explicit Holder(M m) : meter(std::move(m)) {}
    std::span<const DomainInfo> domains() override { return meter.domains(); }
    SampleResult sample(std::span<MeterSample> out) noexcept override { return meter.sample(out); }
    std::vector<std::string> warnings() override {
      if constexpr (requires { { meter.warnings() } -> std::convertible_to<std::vector<std::string>>; }) return meter.warnings();
      else return {};
    }
    M meter;
  };
  std::unique_ptr<Base> meter_;
};

// For those who write meters.

/// Where a meter gets the time from.
using MeterClock = std::function<nanoseconds()>;

inline nanoseconds monotonic_time() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return nanoseconds(static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec);
}

namespace detail {

/// The type ends at 18 GJ: three weeks of a node of 10 kW. A total stays there.
inline Nanojoules in_nanojoules(long double value) { return value < 0x1p64L ? static_cast<Nanojoules>(value) : ~Nanojoules{0}; }

}  // namespace detail

/// What is wrong with what a meter reads: each text once, and not without end.
class MeterWarnings {
 public:
  void add(std::string text) {
    if (texts_.size() < most && std::find(texts_.begin(), texts_.end(), text) == texts_.end()) texts_.push_back(std::move(text));
  }
  const std::vector<std::string>& all() const { return texts_; }
  static constexpr std::size_t most = 32;

 private:
  std::vector<std::string> texts_;
};

/// The total of a counter that wraps, is reset, or lies. The modulus is that of the hardware, not the highest value it shows: for
/// powercap max_energy_range_uj plus one unit.
class Unwrapped {
 public:
  /// `modulus` in units, 0 for a counter that never wraps; `nanojoules` of a unit; more than `max_watts` is taken for a reset.
  Unwrapped(std::uint64_t modulus, double nanojoules, double max_watts) : modulus_(modulus), unit_(nanojoules), max_watts_(max_watts) {}

  /// A reading. The first one only marks where counting begins. Returns what is to be said of the interval that ends with it.
  Caveats add(std::uint64_t raw, nanoseconds now) {
    const std::uint64_t last = std::exchange(last_, raw);
    const nanoseconds since = std::exchange(time_, now);
    if (!std::exchange(begun_, true)) return 0;
    Caveats caveats = 0;
    std::uint64_t delta = raw - last;
    if (raw < last) {
      if (modulus_ == 0 || last >= modulus_) return static_cast<Caveats>(Caveat::counter_reset);
      delta = modulus_ - last + raw;
      caveats |= Caveat::wrap;
    }
    const double seconds = std::chrono::duration<double>(std::max(now - since, nanoseconds{1})).count();
    const double most = max_watts_ * 1e9 / unit_ * (seconds + slack_seconds);  // units
    if (max_watts_ > 0 && static_cast<double>(delta) > most) return static_cast<Caveats>(Caveat::counter_reset);
    // Two wraps cannot be told from one by the value, only by the time that has passed.
    if (modulus_ != 0 && max_watts_ > 0 && most > 0.5 * static_cast<double>(modulus_)) caveats |= Caveat::wrap_ambiguous;
    units_ += std::min(delta, ~std::uint64_t{0} - units_);
    return caveats;
  }
  Nanojoules total() const { return detail::in_nanojoules(static_cast<long double>(units_) * static_cast<long double>(unit_)); }

 private:
  static constexpr double slack_seconds = 0.1;  // a counter may show late, in one step, what was drawn before the last reading
  std::uint64_t modulus_;
  double unit_, max_watts_;
  std::uint64_t last_ = 0, units_ = 0;
  nanoseconds time_{};
  bool begun_ = false;
};

/// The energy below a curve of watts, by the trapezoid rule. What is not plausible is left out, and so is a gap too long to be bridged.
class IntegratedPower {
 public:
  IntegratedPower(double max_watts, nanoseconds longest_gap) : max_watts_(max_watts), longest_gap_(longest_gap) {}

  Caveats add(double watts, nanoseconds now) {
    if (!(watts >= 0 && watts <= max_watts_)) {
      begun_ = false;
      return static_cast<Caveats>(Caveat::counter_reset);
    }
    if (begun_ && now < time_) return 0;  // else this time would be counted twice
    Caveats caveats = 0;
    if (begun_) {
      if (now - time_ <= longest_gap_) nanojoules_ += 0.5 * (watts_ + watts) * static_cast<double>((now - time_).count());
      else caveats |= Caveat::stale;
    }
    begun_ = true;
    watts_ = watts;
    time_ = now;
    return caveats;
  }
  Nanojoules total() const { return detail::in_nanojoules(static_cast<long double>(nanojoules_)); }

 private:
  double max_watts_, watts_ = 0;
  nanoseconds longest_gap_, time_{};
  double nanojoules_ = 0;
  bool begun_ = false;
};

}  // namespace tally::inline v0
