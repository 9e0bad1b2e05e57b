// SPDX-License-Identifier: Apache-2.0
// Learns while a program runs how many watts each activity is worth: from windows of time of which both the joules and the
// mix of activities are known. It needs windows that differ; where they do not, it says so rather than guess.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "../types.hpp"
#include "activity.hpp"
#include "least_squares.hpp"
#include "meter.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// What windows so far tell. A core asleep is the zero of the scale: the floor is what the machine draws while all cores sleep.
/// (It could not be told anyway: threads that always compute, communicate or sleep make a constant sum, as the floor does.)
struct WeightFit {
  static constexpr std::size_t columns = activity_count + 1;  // the floor, the activities but sleep, the application
  static_assert(static_cast<std::size_t>(Activity::sleep) == activity_count - 1);
  using LeastSquares = detail::LeastSquares<columns>;

  Weights weights;            // of an activity that was not seen: the mean of those that were, weighted by time
  LeastSquares::Fit fit;      // floor, copy, reduce, codec, protocol, spin, doze, application: watts and their covariance
  bool usable = false;        // see WeightRegression::weights()

  /// Standard error of the share that `part` has of a typical window's joules above the floor, relative to the share:
  /// g' C g with g = part / (w' part) - mean / (w' mean), the derivative of the share's logarithm by the weights. At most 1: nothing is known.
  double relative_sigma(const ActivityTimes& part, nanoseconds application = {}) const {
    LeastSquares::Values times{};
    for (std::size_t i = 1; i < activity_count; ++i) times[i] = static_cast<double>(part.in[i - 1].count());
    times[columns - 1] = static_cast<double>(application.count());
    return sigma_of_share(times);
  }
  double sigma_of_share(const LeastSquares::Values& part) const {
    if (!fit.solved) return 1;
    const double joules = dynamic(part), all = dynamic(fit.mean);
    if (!(joules > 0 && all > 0)) return 1;
    LeastSquares::Values slope{};
    for (std::size_t i = 1; i < columns; ++i) slope[i] = part[i] / joules - fit.mean[i] / all;
    return std::min(fit.sigma(slope), 1.0);
  }
  /// Above the floor.
  double dynamic(const LeastSquares::Values& times) const {
    double joules = weights.application * times[columns - 1];
    for (std::size_t i = 1; i < activity_count; ++i) joules += weights.watts[i - 1] * times[i];
    return joules;
  }
};

/// Recursive least squares of windows' power on what cores did in them, with exponential forgetting: a window's weight is its length
/// (a meter's noise averages out) and halves every half-life of measured time, because chips warm up and clocks change.
class WeightRegression {
 public:
  static constexpr double windows_per_column = 5, worst_condition = 30, worst_sigma = 1.0 / 3;

  explicit WeightRegression(nanoseconds half_life = std::chrono::minutes(10)) : half_life_(half_life) {}

  /// A window: its length, the joules of all of the host's packages, what all ranks did together, and CPU time of the application and of
  /// other processes. False if that cannot be and was left out: no length or longer than a day, negative times, more than 65536
  /// cores' worth, or above a megawatt.
  bool add(nanoseconds duration, Nanojoules joules, const ActivityTimes& ranks, nanoseconds application) {
    LeastSquares::Values cores{1};
    const double length = static_cast<double>(duration.count());
    const auto set = [&](std::size_t i, nanoseconds time) {
      cores[i] = static_cast<double>(time.count()) / length;
      return cores[i] >= 0 && cores[i] <= 65536;
    };
    const double watts = static_cast<double>(joules) / length;
    bool sound = duration > nanoseconds{0} && duration <= std::chrono::hours(24) && watts <= 1e6;
    for (std::size_t i = 1; i < activity_count && sound; ++i) sound = set(i, ranks.in[i - 1]);
    sound = sound && set(WeightFit::columns - 1, application);
    if (!sound) return ++refused_, false;
    squares_.add(cores, watts, length * 1e-9, half_life_ > nanoseconds{0} ? std::exp2(-length / static_cast<double>(half_life_.count())) : 1);
    return true;
  }
  std::uint64_t refused() const { return refused_; }

  /// All that is known so far, good enough or not.
  WeightFit fit() const {
    WeightFit result;
    result.fit = squares_.fit();
    LeastSquares::Fit& fit = result.fit;
    const auto weight_of = [&](std::size_t i) -> double& { return i + 1 == WeightFit::columns ? result.weights.application : result.weights.watts[i - 1]; };
    double watts = 0, cores = 0;
    for (std::size_t i = 1; i < WeightFit::columns; ++i) {
      if (!fit.seen[i]) continue;
      watts += fit.value[i] * fit.mean[i];
      cores += fit.mean[i];
    }
    const double average = cores > 0 ? watts / cores : 0;
    for (std::size_t i = 1; i < WeightFit::columns; ++i) {
      weight_of(i) = fit.seen[i] ? fit.value[i] : average;
      if (!fit.seen[i]) fit.covariance[i][i] = std::pow(average * Weights::equal_time().relative_sigma, 2);
    }
    result.weights.floor_watts = fit.value[0];
    result.weights.floor_sigma = fit.sigma(std::size_t{0});
    result.weights.split = Split::regressed_weights;
    result.weights.relative_sigma = typical_sigma(result);
    result.usable = fit.solved && fit.observations >= windows_per_column * static_cast<double>(fit.columns) && fit.condition <= worst_condition && watts > 0 &&
                    result.weights.relative_sigma <= worst_sigma;
    return result;
  }
  /// The weights if they are worth using: at least five windows (those half forgotten count half) per column that was seen; a
  /// condition number of at most 30, above which columns cannot be told apart (Belsley, Kuh and Welsch, "Regression diagnostics", 1980);
  /// and shares with a smaller error than those by time alone have. relative_sigma is that of shares of single activities in a
  /// typical window, the root of their mean square by joules; WeightFit tells it for any share.
  std::optional<Weights> weights() const {
    const WeightFit now = fit();
    return now.usable ? std::optional(now.weights) : std::nullopt;
  }

 private:
  using LeastSquares = WeightFit::LeastSquares;

  static double typical_sigma(const WeightFit& fit) {
    double squares = 0, joules = 0;
    for (std::size_t i = 1; i < WeightFit::columns; ++i) {
      LeastSquares::Values alone{};
      alone[i] = fit.fit.mean[i];
      const double part = fit.dynamic(alone), sigma = fit.sigma_of_share(alone);
      joules += part;
      squares += part * sigma * sigma;
    }
    return joules > 0 ? std::sqrt(squares / joules) : 1;
  }

  LeastSquares squares_;
  nanoseconds half_life_;  // 0: nothing is forgotten
  std::uint64_t refused_ = 0;
};

}  // namespace tally::inline v0
