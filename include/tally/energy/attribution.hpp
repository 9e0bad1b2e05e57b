// SPDX-License-Identifier: Apache-2.0
// Divides the joules that a meter saw in a window of time among what happened in it, exactly: what operations, the
// application and nobody are charged adds up to the meter's figure to the nanojoule. Pure arithmetic on integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "activity.hpp"
#include "meter.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

namespace detail {

__extension__ typedef unsigned __int128 Wide;

/// part / whole of `all`, rounded down: parts of one whole never make more than all. 0 of nothing.
inline Nanojoules share_of(Nanojoules all, Wide part, Wide whole) {
  if (whole == 0) return 0;
  while (part >> 63 != 0 || whole >> 63 != 0) part >>= 1, whole = (whole >> 1) + 1;  // so that the product has room; never more than it should be
  return static_cast<Nanojoules>(static_cast<Wide>(all) * part / whole);
}
inline Wide weighed(nanoseconds time, double watts) {
  const double milliwatts = (watts > 0 ? std::min(watts, 1e9) : 0) * 1000;  // none for what is no number
  return static_cast<Wide>(std::max<std::int64_t>(time.count(), 0)) * static_cast<Wide>(std::llround(milliwatts));
}

}  // namespace detail

/// A window and who was there. Times are thread times within it.
struct EnergyWindow {
  nanoseconds duration{};
  Nanojoules energy = 0;
  std::span<const ActivityTimes> operations;  // of each participant: one driving thread
  nanoseconds application{};                  // CPU time of the participants' processes outside of operations
  nanoseconds presence{};                     // time that those processes were there, outside of operations
  nanoseconds foreign{};                      // CPU time of all other processes
  int cores = 1;
};

/// operations + application + unattributed == the window's energy.
struct DividedWindow {
  Nanojoules operations = 0, application = 0, unattributed = 0;
  double residual = std::numeric_limits<double>::quiet_NaN();  // 1 - what the weights predict / what was measured; NaN where they do not predict
  Caveats caveats = 0;
};

/// E = floor + dynamic. The floor goes by presence: a thread is there for its time in operations, an idle core is nobody's. The
/// rest goes by weighted CPU time, in which other processes take part: their share is unattributed.
inline DividedWindow divide(const EnergyWindow& window, const Weights& weights, std::span<Charge> charges) {
  using detail::share_of, detail::weighed, detail::Wide;
  DividedWindow result;
  const double seconds = std::chrono::duration<double>(window.duration).count();
  const double floor_joules = std::max(0.0, weights.floor_watts) * seconds;
  auto floor = static_cast<Nanojoules>(std::clamp(floor_joules * 1e9, 0.0, 1e18));
  if (floor > window.energy) {
    floor = window.energy;
    result.caveats |= Caveat::floor_clamped;
  }
  const Nanojoules dynamic = window.energy - floor;

  Wide present = 0, busy = 0;
  double predicted = floor_joules;
  for (const ActivityTimes& times : window.operations) {
    present += static_cast<Wide>(times.total().count());
    for (std::size_t a = 0; a < activity_count; ++a) {
      busy += weighed(times.in[a], weights.watts[a]);
      predicted += weights.watts[a] * std::chrono::duration<double>(times.in[a]).count();
    }
  }
  const Wide application = weighed(window.application, weights.application);
  busy += application + weighed(window.foreign, weights.application);
  predicted += weights.application * std::chrono::duration<double>(window.application + window.foreign).count();
  const auto there = static_cast<Wide>(std::max<std::int64_t>(window.presence.count(), 0));
  present = std::max(present + there, static_cast<Wide>(std::max<std::int64_t>(window.duration.count(), 0)) * static_cast<Wide>(std::max(window.cores, 1)));

  for (std::size_t i = 0; i < window.operations.size(); ++i) {
    const ActivityTimes& times = window.operations[i];
    charges[i].floor = share_of(floor, static_cast<Wide>(times.total().count()), present);
    for (std::size_t a = 0; a < activity_count; ++a) charges[i].net[a] = share_of(dynamic, weighed(times.in[a], weights.watts[a]), busy);
    result.operations += charges[i].total();
  }
  result.application = share_of(dynamic, application, busy) + share_of(floor, there, present);
  result.unattributed = window.energy - result.operations - result.application;
  if (weights.split != Split::equal_time && window.energy > 0) result.residual = 1 - predicted / (static_cast<double>(window.energy) * 1e-9);
  return result;
}

/// Standard error of a window's energy from a counter that moves every `tick`, at a constant power, with edges that fall anywhere:
/// both edges are off by up to a tick, evenly. It does not accumulate over windows that follow each other.
inline double quantisation_sigma(double watts, nanoseconds tick) { return watts * std::chrono::duration<double>(tick).count() / std::sqrt(6.0); }

/// Of a growing total, what is not accounted for otherwise: never less than nothing. What is accounted for before the total shows
/// it, as the two are read at different times, is made up for later.
class Remainder {
 public:
  nanoseconds take(nanoseconds total, nanoseconds accounted) {
    owed_ += total - accounted;
    const nanoseconds rest = std::max(owed_, nanoseconds{0});
    owed_ -= rest;
    return rest;
  }

 private:
  nanoseconds owed_{};
};

}  // namespace tally::inline v0
