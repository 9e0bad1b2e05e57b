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

namespace detail {

/// The domains whose watts add up to those of the host's processors: its packages, or what contains them where those are not
/// measured. A meter's own word on what it measures is checked here, once.
class ProcessorMeters {
 public:
  explicit ProcessorMeters(std::span<AnyMeter> meters) : meters_(meters) {
    for (const bool packages : {true, false}) {
      for (std::size_t m = 0; m < meters.size(); ++m) {
        const auto infos = meters[m].domains();
        for (std::size_t d = 0; d < infos.size(); ++d) {
          const bool wanted = packages ? infos[d].kind == Domain::cpu_package && !inside_package(infos, d) : (infos[d].kind == Domain::psys || infos[d].kind == Domain::node) && infos[d].parent < 0;
          const bool twice = std::any_of(domains_.begin(), domains_.end(), [&](const Measured& other) { return other.info.key == infos[d].key; });
          if (wanted && !twice && (packages || domains_.empty())) domains_.push_back({m, d, infos[d]});
        }
      }
      if (!domains_.empty()) break;
    }
    if (domains_.empty()) throw Error(Errc::unsupported, "no meter measures this host's processors, so there is nothing to calibrate by");
    for (const Measured& domain : domains_) {
      if (domain.info.tick > std::chrono::seconds(1)) throw Error(Errc::unsupported, {"the meter '", domain.info.key, "' of ", domain.info.source, " moves only once in ", domain.info.tick.count(), " ns: too seldom to calibrate by"});
      tick_ = std::max(tick_, domain.info.tick);
      caveats_ |= domain.info.caveats;
    }
  }
  nanoseconds tick() const { return tick_; }
  Caveats caveats() const { return caveats_; }

  struct Edge {
    nanoseconds time{};
    Nanojoules total = 0;
  };
  /// Waits until each has moved, and tells when and where to.
  std::vector<Edge> next_edges(LoadGenerator& loads) {
    const std::vector<Edge> before = read();
    std::vector<Edge> edges(domains_.size());
    std::vector<bool> moved(domains_.size());
    std::size_t left = domains_.size();
    for (int look = 0; look < polls_per_tick * most_ticks && left > 0; ++look) {
      loads.rest(tick_ / polls_per_tick);
      const std::vector<Edge> now = read();
      for (std::size_t d = 0; d < domains_.size(); ++d)
        if (!moved[d] && now[d].total != before[d].total) edges[d] = now[d], moved[d] = true, --left;
    }
    for (std::size_t d = 0; d < domains_.size(); ++d)
      if (!moved[d]) fail(d, "did not move in sixteen times the time it should have");
    return edges;
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
  static bool inside_package(std::span<const DomainInfo> infos, std::size_t d) {
    const auto parent = static_cast<std::size_t>(infos[d].parent);
    return infos[d].parent >= 0 && parent < infos.size() && infos[parent].kind != Domain::psys;
  }
  std::vector<Edge> read() {
    std::vector<Edge> edges(domains_.size());
    std::vector<bool> has(domains_.size());
    for (std::size_t m = 0; m < meters_.size(); ++m) {
      std::vector<MeterSample> samples(meters_[m].domains().size());
      const std::size_t count = std::min(meters_[m].sample(samples).count, samples.size());
      for (std::size_t d = 0; d < domains_.size(); ++d)
        for (std::size_t s = 0; s < count; ++s) {
          if (domains_[d].meter != m || domains_[d].index != samples[s].domain) continue;
          constexpr Caveats lost = Caveat::counter_reset | Caveat::wrap_ambiguous | Caveat::permission_denied | Caveat::unreadable | Caveat::vanished;
          if (const Caveats why = samples[s].caveats & lost; why != 0) fail(d, concat({"cannot be used: ", meaning_of(static_cast<Caveat>(why & -why))}));
          caveats_ |= samples[s].caveats;
          edges[d] = {samples[s].time, samples[s].total};
          has[d] = true;
        }
    }
    for (std::size_t d = 0; d < domains_.size(); ++d)
      if (!has[d]) fail(d, "could not be read");
    return edges;
  }
  [[noreturn]] void fail(std::size_t d, std::string_view what) const {
    throw Error(Errc::protocol, {"the meter '", domains_[d].info.key, "' of ", domains_[d].info.source, " ", what, "; nothing was calibrated"});
  }

  static constexpr int polls_per_tick = 16, most_ticks = 16;
  std::span<AnyMeter> meters_;
  std::vector<Measured> domains_;
  nanoseconds tick_ = std::chrono::milliseconds(1);
  Caveats caveats_ = 0;
};

}  // namespace detail

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
inline Calibration calibrate(std::span<AnyMeter> meters, LoadGenerator& loads, const CalibrationOptions& options = {}) {
  detail::ProcessorMeters processors(meters);
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
    const auto begin = processors.next_edges(loads);
    const nanoseconds busy_before = loads.busy();
    loads.rest(length);
    const auto end = processors.next_edges(loads);
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
