// SPDX-License-Identifier: Apache-2.0
// Finds out how many watts a machine draws anyway and how many a core adds for each thing it can do: makes so many cores do one
// thing, reads the meters from one step of theirs to another, and fits a line. What makes the load is handed in.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../text.hpp"
#include "activity.hpp"
#include "least_squares.hpp"
#include "meter.hpp"

namespace tally::inline v0 {

/// What cores are made to do. idle: nothing at all.
enum class Load : std::uint8_t { idle, spin, pause, doze, copy, reduce };
inline constexpr std::size_t load_count = 6;

constexpr std::string_view name_of(Load load) {
  constexpr std::string_view names[] = {"idle", "spin", "pause", "doze", "copy", "reduce"};
  return names[static_cast<std::size_t>(load)];
}

/// Makes cores work. See CoreLoads for the one that does.
struct LoadGenerator {
  virtual ~LoadGenerator() = default;
  virtual int cores() const = 0;         // at least 1
  virtual bool can(Load load) const = 0;
  virtual void start(Load load, int cores) = 0;  // until stop()
  virtual void stop() = 0;
  virtual nanoseconds busy() = 0;           // CPU time since start(), of all cores together: others may want them, too
  virtual void rest(nanoseconds time) = 0;  // lets time pass, drawing next to nothing
};

struct CalibrationStep {
  Load load = Load::idle;
  int cores = 0;
};
struct CalibrationOptions {
  nanoseconds at_least{};  // of each measurement, which has 250 ticks of the slowest meter in any case
  int cores = 0;           // at most so many at once; 0: all
  std::function<void(const CalibrationStep&, std::size_t done, std::size_t all)> progress = {};
};

struct Calibration {
  static constexpr int ticks = 250, rounds = 2;

  struct Measurement {
    CalibrationStep step;
    double seconds = 0, busy_cores = 0, watts = 0;
  };
  Weights weights;
  std::array<double, load_count> watts{}, sigma{};  // per core above the floor, with standard errors; idle: the floor itself
  std::array<bool, load_count> known{};             // could be made on this machine
  double r2 = 0;
  Caveats caveats = 0;  // of the meters
  std::vector<Measurement> measurements;
};

/// The domains whose watts add up to those of the host's processors: its packages, or, where none of those moves, what contains
/// them. What a meter says is checked here, once.
class ProcessorMeters {
 public:
  struct Edge {
    nanoseconds time{};
    Nanojoules total = 0;
  };

  /// Looks which of them live: a counter may be there and stand still. `loads` is only asked to let time pass.
  ProcessorMeters(std::span<AnyMeter> meters, LoadGenerator& loads) : meters_(meters), loads_(&loads) {
    std::string dead;
    for (const bool packages : {true, false}) {
      choose(packages);
      if (domains_.empty()) continue;
      const Look look = look_for_edges();
      if (std::any_of(look.trouble.begin(), look.trouble.end(), [](const std::string& trouble) { return trouble.empty(); })) return;
      for (std::size_t d = 0; d < domains_.size(); ++d) dead += detail::concat({dead.empty() ? ": " : "; ", name(d), " ", look.trouble[d]});
    }
    domains_.clear();
    missing_ = detail::concat({"no meter measures this host's processors, so there is nothing to calibrate by", dead});
  }
  /// Why there is nothing to measure by; empty if there is.
  const std::string& missing() const { return missing_; }
  nanoseconds tick() const { return tick_; }
  Caveats caveats() const { return caveats_; }

  /// Waits until each has moved, and tells when and where to.
  std::vector<Edge> next_edges() {
    Look look = look_for_edges();
    for (std::size_t d = 0; d < domains_.size(); ++d)
      if (!look.trouble[d].empty()) fail(d, look.trouble[d]);
    return std::move(look.edges);
  }
  static nanoseconds last(const std::vector<Edge>& edges) {
    return std::max_element(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) { return a.time < b.time; })->time;
  }
  /// The power of all together, each over its own time.
  double watts(const std::vector<Edge>& begin, const std::vector<Edge>& end) const {
    double all = 0;
    for (std::size_t d = 0; d < domains_.size(); ++d) {
      if (end[d].time <= begin[d].time || end[d].total < begin[d].total) fail(d, "went back");
      all += static_cast<double>(end[d].total - begin[d].total) / static_cast<double>((end[d].time - begin[d].time).count());
    }
    return all;
  }

 private:
  struct Measured {
    std::size_t meter, index;
    DomainInfo info;
  };
  struct Look {
    std::vector<Edge> edges;
    std::vector<std::string> trouble;  // why there is no edge
  };

  void choose(bool packages) {
    domains_.clear();
    tick_ = std::chrono::milliseconds(1);
    patience_ = caveats_ = 0;
    for (std::size_t m = 0; m < meters_.size(); ++m) {
      const auto infos = meters_[m].domains();
      for (std::size_t d = 0; d < infos.size(); ++d) {
        const DomainInfo& info = infos[d];
        const auto parent = static_cast<std::size_t>(info.parent);
        const bool top = info.parent < 0 || parent >= infos.size(), below_psys = !top && infos[parent].kind == Domain::psys;
        const bool wanted = packages ? info.kind == Domain::cpu_package && (top || below_psys) : (info.kind == Domain::psys || info.kind == Domain::node) && top && domains_.empty();
        const bool twice = std::any_of(domains_.begin(), domains_.end(), [&](const Measured& other) { return other.info.key == info.key; });
        if (!wanted || twice || info.tick > std::chrono::seconds(1)) continue;  // or it would take minutes
        domains_.push_back({m, d, info});
        tick_ = std::max(tick_, info.tick);
        patience_ = std::max(patience_, std::clamp(info.unit_joules, 0.0, 10.0));
        caveats_ |= info.caveats;
      }
    }
  }
  /// Sixteen ticks, and as long as a watt needs for the least step: that of some counters is a whole joule.
  Look look_for_edges() {
    const std::size_t n = domains_.size();
    Look look{std::vector<Edge>(n), std::vector<std::string>(n, "has no readings")};
    std::vector<Edge> before(n);
    enum class Seen : std::uint8_t { nothing, reading, edge, lost };
    std::vector<Seen> seen(n);
    const nanoseconds pause = tick_ / polls_per_tick, limit = 16 * tick_ + nanoseconds(static_cast<std::int64_t>(patience_ * 1e9));
    for (nanoseconds waited{}; waited <= limit && std::any_of(seen.begin(), seen.end(), [](Seen s) { return s < Seen::edge; }); waited += pause) {
      if (waited > nanoseconds{0}) loads_->rest(pause);
      for (std::size_t m = 0; m < meters_.size(); ++m) {
        std::vector<MeterSample> samples(meters_[m].domains().size());
        samples.resize(std::min(meters_[m].sample(samples).count, samples.size()));
        for (std::size_t d = 0; d < n; ++d)
          for (const MeterSample& sample : samples) {
            if (domains_[d].meter != m || domains_[d].index != sample.domain) continue;
            const Edge now{sample.time, sample.total};
            caveats_ |= sample.caveats;
            constexpr Caveats useless = Caveat::counter_reset | Caveat::wrap_ambiguous | Caveat::permission_denied | Caveat::unreadable | Caveat::vanished;
            if (const Caveats why = sample.caveats & useless; why != 0) {
              seen[d] = Seen::lost;
              look.trouble[d] = detail::concat({"cannot be used (", meaning_of(static_cast<Caveat>(why & -why)), ")"});
            } else if (seen[d] == Seen::nothing) {
              seen[d] = Seen::reading;
              before[d] = now;
              look.trouble[d] = "stands still";
            } else if (seen[d] == Seen::reading && now.total != before[d].total) {
              seen[d] = Seen::edge;
              look.edges[d] = now;
              look.trouble[d].clear();
            }
          }
      }
    }
    return look;
  }
  std::string name(std::size_t d) const { return detail::concat({"'", domains_[d].info.key, "' of ", domains_[d].info.source}); }
  [[noreturn]] void fail(std::size_t d, std::string_view what) const { throw Error(Errc::protocol, {"the meter ", name(d), " ", what, "; nothing was calibrated"}); }

  static constexpr int polls_per_tick = 16;
  std::span<AnyMeter> meters_;
  LoadGenerator* loads_;
  std::vector<Measured> domains_;
  nanoseconds tick_ = std::chrono::milliseconds(1);
  double patience_ = 0;  // seconds
  Caveats caveats_ = 0;
  std::string missing_;
};

/// What is measured, in this order: every load on 1, 2, 4 ... and all cores, from idle to idle, twice, so that what warms up or
/// drifts shows as error rather than as a difference between loads.
inline std::vector<CalibrationStep> calibration_steps(const LoadGenerator& loads, int most_cores = 0) {
  const int all = most_cores > 0 ? std::min(most_cores, loads.cores()) : loads.cores();
  std::vector<CalibrationStep> steps;
  for (int round = 0; round < Calibration::rounds; ++round) {
    steps.push_back({});
    for (int cores = 1; cores <= all; cores = cores == all ? all + 1 : std::min(2 * cores, all))
      for (std::size_t load = 1; load < load_count; ++load)
        if (loads.can(static_cast<Load>(load))) steps.push_back({static_cast<Load>(load), cores});
  }
  steps.push_back({});
  return steps;
}

/// How long one measurement takes at least.
inline nanoseconds calibration_window(nanoseconds tick, nanoseconds at_least) { return std::max(at_least, Calibration::ticks * tick); }

/// Fits P = floor + cores * watts[load], nothing negative, to the power of all steps; cores as they were had, which may be less than a whole one.
///
/// What cannot be made to happen is set to what is nearest: codec to reduce, protocol to spin, doze to pause where there is none, and
/// waits that spin to pause where the processor does not doze, because that is how they wait there. The application may do anything: it gets the
/// mean of spin, copy and reduce. relative_sigma is the largest relative error of those three and pause, and, for what was not
/// measured, that of an even distribution between the least and the most of them: their range / sqrt(12) / their mean.
///
/// Throws Error if the meters cannot be read or stand still, or if the loads cannot be told from nothing. Seconds; see calibration_steps().
inline Calibration calibrate(ProcessorMeters& processors, LoadGenerator& loads, const CalibrationOptions& options = {}) {
  if (!processors.missing().empty()) throw Error(Errc::unsupported, processors.missing());
  const std::vector<CalibrationStep> steps = calibration_steps(loads, options.cores);
  const nanoseconds length = calibration_window(processors.tick(), options.at_least);
  struct Running {
    LoadGenerator& loads;
    ~Running() { loads.stop(); }
  };

  Calibration result;
  detail::LeastSquares<load_count> squares;
  for (const CalibrationStep& step : steps) {
    if (options.progress) options.progress(step, result.measurements.size(), steps.size());
    loads.start(step.load, step.cores);
    const Running running{loads};
    loads.rest(std::max<nanoseconds>(std::chrono::milliseconds(20), 10 * processors.tick()));  // clocks and voltages settle
    const auto begin = processors.next_edges();
    const nanoseconds busy_before = loads.busy();
    loads.rest(length);
    const auto end = processors.next_edges();
    const nanoseconds busy = loads.busy() - busy_before;
    const double watts = processors.watts(begin, end);  // throws if time went back
    const nanoseconds time = processors.last(end) - processors.last(begin);
    const double seconds = std::chrono::duration<double>(time).count(), cores = std::chrono::duration<double>(busy).count() / seconds;
    result.measurements.push_back({step, seconds, cores, watts});
    std::array<double, load_count> columns{1};
    if (step.load != Load::idle) columns[static_cast<std::size_t>(step.load)] = cores;
    squares.add(columns, watts, seconds, 1);
  }

  const auto fit = squares.fit();
  result.watts = fit.value;
  result.known = fit.seen;
  for (std::size_t i = 0; i < load_count; ++i) result.sigma[i] = fit.sigma(i);
  result.r2 = fit.r2;
  result.caveats = processors.caveats();
  double least = std::numeric_limits<double>::infinity(), most = 0, worst = 0;
  for (const Load load : {Load::spin, Load::pause, Load::copy, Load::reduce}) {
    const auto i = static_cast<std::size_t>(load);
    if (!fit.solved || !fit.seen[i] || !(3 * fit.sigma(i) <= fit.value[i]))
      throw Error(Errc::unsupported, {"the meters do not tell ", name_of(load), " from idle: a core adds ", std::llround(1000 * fit.value[i]), " +- ", std::llround(1000 * result.sigma[i]),
                                      " mW. Does the machine do other things meanwhile? Calibrate when it is idle, or longer"});
    worst = std::max(worst, fit.sigma(i) / fit.value[i]);
    least = std::min(least, fit.value[i]);
    most = std::max(most, fit.value[i]);
  }
  const auto of = [&](Load load) { return fit.value[static_cast<std::size_t>(load)]; };
  const bool dozes = result.known[static_cast<std::size_t>(Load::doze)];
  Weights& weights = result.weights;
  weights.application = (of(Load::spin) + of(Load::copy) + of(Load::reduce)) / 3;
  weights.watts = {of(Load::copy), of(Load::reduce), of(Load::reduce), of(Load::spin), of(dozes ? Load::spin : Load::pause), of(dozes ? Load::doze : Load::pause), 0};
  weights.floor_watts = of(Load::idle);
  weights.floor_sigma = fit.sigma(std::size_t{0});
  weights.relative_sigma = std::min(1.0, std::hypot(worst, (most - least) / std::sqrt(12.0) / weights.application));
  weights.split = Split::calibrated_weights;
  return result;
}

}  // namespace tally::inline v0
