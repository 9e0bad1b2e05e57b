// SPDX-License-Identifier: Apache-2.0
// What a thread was charged, divided among the rows of its ledger and the calls in flight: by the time that each spent in each
// activity since the window before. Whole nanojoules; what cannot be divided evenly is kept for later, so nothing is lost.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../energy/attribution.hpp"
#include "../energy/source.hpp"
#include "amounts.hpp"

namespace tally::inline v0 {

/// Joules of a row or a call by kind: above the floor and of the floor, at work and waiting.
struct EnergyAmounts {
  struct Part {
    Nanojoules net_busy = 0, net_idle = 0, floor_busy = 0, floor_idle = 0;
    Nanojoules net() const { return net_busy + net_idle; }
    Nanojoules idle() const { return net_idle + floor_idle; }
    Nanojoules total() const { return net() + floor_busy + floor_idle; }
  };
  std::array<Part, power_kinds> kinds{};
  Nanojoules avoidable = 0;  // of the processors' net_idle, while awake

  Nanojoules total() const { return kinds[0].total() + kinds[1].total() + kinds[2].total(); }

  void add(PowerKind kind, Activity activity, Nanojoules net) {
    Part& part = kinds[static_cast<std::size_t>(kind)];
    (is_wait(activity) ? part.net_idle : part.net_busy) += net;
    if (kind == PowerKind::cpu && (activity == Activity::spin || activity == Activity::doze)) avoidable += net;
  }
  void add_floor(PowerKind kind, Nanojoules floor, bool waiting) {
    Part& part = kinds[static_cast<std::size_t>(kind)];
    (waiting ? part.floor_idle : part.floor_busy) += floor;
  }
  void add(const EnergyAmounts& more) {
    for (std::size_t k = 0; k < power_kinds; ++k) {
      kinds[k].net_busy += more.kinds[k].net_busy;
      kinds[k].net_idle += more.kinds[k].net_idle;
      kinds[k].floor_busy += more.kinds[k].floor_busy;
      kinds[k].floor_idle += more.kinds[k].floor_idle;
    }
    avoidable += more.avoidable;
  }
};

/// The figures that amounts are, given what the meters and the division are worth. `upper`: joules that the host drew altogether, by kind.
[[gnu::cold]] inline AccountEnergy energy_of(const EnergyAmounts& amounts, const EnergyReading& reading, const std::array<Nanojoules, power_kinds>& upper) {
  const auto figure = [&](PowerKind kind, Nanojoules nanojoules) -> Quantity {
    const auto k = static_cast<std::size_t>(kind);
    const EnergyKind& worth = reading.kinds[k];
    if (worth.provenance == Provenance::none) return {};
    const double value = static_cast<double>(nanojoules) * 1e-9;
    // A window's error is that of its edges: who has a part of the window has that part of the error, and who has many of them not more than one.
    const double edges = worth.window_joules > 0 ? worth.quantisation * std::min(1.0, value / worth.window_joules) : 0;
    return {value, std::hypot(worth.relative_sigma * value, edges), 0, std::max(static_cast<double>(upper[k]) * 1e-9, value), worth.provenance, worth.split};
  };
  const auto all = [&](auto&& member) {
    if (reading.device_alone) return figure(PowerKind::gpu, member(amounts.kinds[2]));
    Quantity whole = figure(PowerKind::cpu, member(amounts.kinds[0]));
    for (const PowerKind kind : {PowerKind::dram, PowerKind::gpu})
      if (const Quantity part = figure(kind, member(amounts.kinds[static_cast<std::size_t>(kind)])); part.known() && (kind != PowerKind::gpu || part.value > 0)) whole = whole + part;
    return whole;
  };
  using Each = EnergyAmounts::Part;
  AccountEnergy energy;
  energy.gross = all([](const Each& part) { return part.total(); });
  energy.net = all([](const Each& part) { return part.net(); });
  energy.idle = all([](const Each& part) { return part.idle(); });
  if (!reading.device_alone) {
    energy.idle_avoidable = figure(PowerKind::cpu, amounts.avoidable);
    energy.cpu = figure(PowerKind::cpu, amounts.kinds[0].total());
    energy.dram = figure(PowerKind::dram, amounts.kinds[1].total());
  }
  if (reading.device_alone || amounts.kinds[2].total() > 0) energy.gpu = figure(PowerKind::gpu, amounts.kinds[2].total());
  return energy;
}

/// Grams for `joules`: a sum, over windows, of joules at the rate of their time, whose own error is in it already.
inline Quantity grams_of(const Quantity& at_rates, const Quantity& joules) {
  if (!at_rates.known() || !joules.known()) return {};
  const double rate = joules.value > 0 ? at_rates.value / joules.value : 0;
  return {at_rates.value, std::hypot(at_rates.sigma, joules.sigma * rate), joules.lower * rate, joules.upper * rate, std::min(at_rates.provenance, joules.provenance), joules.split};
}
/// Nothing, known for sure: what a sum begins with.
inline constexpr Quantity no_grams{0, 0, 0, 0, Provenance::measured, Split::direct};

/// One ledger's joules.
class LedgerEnergy {
 public:
  explicit LedgerEnergy(std::unique_ptr<EnergySource> source) : source_(std::move(source)) {
    if (source_ && source_->read(reading_))
      for (std::size_t k = 0; k < power_kinds; ++k) at_begin_[k] = reading_.kinds[k].total;
  }
  /// There is a meter: figures come from it and not from the model.
  bool metered() const { return reading_.kinds[static_cast<std::size_t>(reading_.device_alone ? PowerKind::gpu : PowerKind::cpu)].provenance != Provenance::none; }
  bool has_source() const { return source_ != nullptr; }
  void publish(const ActivityTimes& so_far) const noexcept {
    if (source_) source_->publish(so_far);
  }
  bool due() const noexcept { return source_ && source_->windows() != seen_; }
  std::uint64_t windows() const noexcept { return source_ ? source_->windows() : 0; }
  HostEnergy host() const { return source_ ? source_->host() : HostEnergy{}; }
  const EnergyReading& reading() const { return reading_; }
  AccountEnergy energy(const EnergyAmounts& amounts) const {
    std::array<Nanojoules, power_kinds> upper{};
    for (std::size_t k = 0; k < power_kinds; ++k) upper[k] = reading_.kinds[k].total - std::min(reading_.kinds[k].total, at_begin_[k]);
    return energy_of(amounts, reading_, upper);
  }

  /// Who takes part in what was charged since the last time.
  struct Sink {
    ActivityTimes times;  // since then
    EnergyAmounts* amounts;
    Quantity* grams;
    Nanojoules before = 0;
  };
  /// Nanojoules per nanosecond of each, as they were divided: for shares of shares.
  struct Rates {
    std::array<std::array<double, activity_count + 1>, power_kinds> watts{};
    void apply(const ActivityTimes& times, EnergyAmounts& amounts) const {
      for (std::size_t k = 0; k < power_kinds; ++k)
        for (std::size_t a = 0; a < activity_count; ++a) {
          const auto time = static_cast<double>(times.in[a].count());
          amounts.add(static_cast<PowerKind>(k), static_cast<Activity>(a), static_cast<Nanojoules>(watts[k][a] * time));
          amounts.add_floor(static_cast<PowerKind>(k), static_cast<Nanojoules>(watts[k][activity_count] * time), is_wait(static_cast<Activity>(a)));
        }
    }
  };
  /// The windows that have closed since the last time.
  [[gnu::cold]] Rates settle(const std::vector<Sink>& sinks) {
    Rates rates;
    seen_ = source_->windows();
    if (!source_->read(reading_)) return rates;
    ActivityTimes all;
    for (const Sink& sink : sinks)
      for (std::size_t a = 0; a < activity_count; ++a) all.in[a] += sink.times.in[a];
    const auto part = [](nanoseconds time) { return static_cast<detail::Wide>(time.count()); };
    const auto watts = [](Nanojoules joules, nanoseconds time) { return time > nanoseconds{0} ? static_cast<double>(joules) / static_cast<double>(time.count()) : 0; };
    for (std::size_t k = 0; k < power_kinds; ++k) {
      const auto kind = static_cast<PowerKind>(k);
      const Nanojoules floor = since(reading_.charges[k].floor, taken_[k].floor);
      rates.watts[k][activity_count] = watts(floor, all.total());
      for (std::size_t a = 0; a < activity_count; ++a) {
        const auto activity = static_cast<Activity>(a);
        const Nanojoules net = since(reading_.charges[k].net[a], taken_[k].net[a]);
        rates.watts[k][a] = watts(net, all.in[a]);
        for (const Sink& sink : sinks) {
          const Nanojoules mine = detail::share_of(net, part(sink.times.in[a]), part(all.in[a])), of_floor = detail::share_of(floor, part(sink.times.in[a]), part(all.total()));
          sink.amounts->add(kind, activity, mine);
          sink.amounts->add_floor(kind, of_floor, is_wait(activity));
          taken_[k].net[a] += mine;
          taken_[k].floor += of_floor;
        }
      }
    }
    return rates;
  }

 private:
  /// The board lies in memory that others can write.
  static Nanojoules since(Nanojoules now, Nanojoules taken) { return now - std::min(now, taken); }
  std::unique_ptr<EnergySource> source_;
  EnergyReading reading_;
  Charges taken_{};  // of what was charged, what rows have
  std::array<Nanojoules, power_kinds> at_begin_{};
  std::uint64_t seen_ = 0;
};

}  // namespace tally::inline v0
