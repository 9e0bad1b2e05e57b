// SPDX-License-Identifier: Apache-2.0
// What a choice between ways to do the same thing is to minimise, and what a way is expected to draw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "energy/activity.hpp"

namespace tally::inline v0 {

enum class Objective : std::uint8_t { time, energy, energy_delay };

constexpr std::string_view name_of(Objective objective) {
  constexpr std::string_view names[] = {"time", "energy", "energy_delay"};
  return names[static_cast<std::size_t>(objective)];
}

/// Less is better; only scores by one objective compare. Joules that are unknown (NaN) make one that is unknown, but for `time`.
constexpr double score(Objective objective, double seconds, double joules) {
  return objective == Objective::time ? seconds : objective == Objective::energy ? joules : joules * seconds;
}

/// Joules above the floor of so much time of cores: the floor is drawn whatever is chosen.
constexpr double predicted_joules(const ActivityTimes& cores, const Weights& weights) {
  double joules = 0;
  for (std::size_t i = 0; i < activity_count; ++i) joules += weights.watts[i] * static_cast<double>(cores.in[i].count()) * 1e-9;
  return joules;
}

}  // namespace tally::inline v0
