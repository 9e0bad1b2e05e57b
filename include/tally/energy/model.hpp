// SPDX-License-Identifier: Apache-2.0
// Joules without a meter: the time one core was awake and asleep, times watts. Always marked modelled.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>

#include "../types.hpp"
#include "activity.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// Watts of one core. The defaults are no measurement: thermal design power over cores of server processors of
/// 2021 to 2024 is 3.5 to 7 W (package share included), and an idle core's share of an idle package about a
/// fifth of that. Hence one standard error of 40 %, bounds of a quarter and four times the value. A core that
/// spins is awake. Where ranks outnumber cores, each is charged its share of an idle core while it is off the core.
struct ModelMeter {
  bool enabled = true;
  double busy_watts = 5.0, idle_watts = 1.0;
  double cores_per_rank = 1.0;  // at most 1
  static constexpr double relative_sigma = 0.4, bound_factor = 4.0;

  Quantity joules(nanoseconds awake, nanoseconds asleep) const {
    if (!enabled) return {};
    using Seconds = std::chrono::duration<double>;
    const double value = busy_watts * Seconds(awake).count() + idle_watts * cores_per_rank * Seconds(asleep).count();
    return {value, relative_sigma * value, value / bound_factor, value * bound_factor, Provenance::modelled, Split::equal_time};
  }
  /// Of one thread. What it would have drawn asleep all the time is the floor.
  AccountEnergy energies(const ActivityTimes& times) const {
    if (!enabled) return {};
    const nanoseconds asleep = times[Activity::sleep], waiting = times[Activity::spin] + times[Activity::doze], none{};
    AccountEnergy energy;
    energy.gross = energy.cpu = joules(times.awake(), asleep);
    energy.idle = joules(waiting, asleep);
    ModelMeter above = *this;
    above.busy_watts = std::max(0.0, busy_watts - idle_watts * cores_per_rank);
    energy.net = above.joules(times.awake(), none);
    energy.idle_avoidable = above.joules(waiting, none);
    return energy;
  }
};

}  // namespace tally::inline v0
