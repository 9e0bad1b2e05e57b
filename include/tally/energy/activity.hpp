// SPDX-License-Identifier: Apache-2.0
// What a core can be doing for an operation as far as its power is concerned, and how many watts each of that is worth. The
// joules that a meter saw in a window of time are divided by it.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "../types.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// Waits are told apart by how they are waited.
enum class Activity : std::uint8_t { copy, reduce, codec, protocol, spin, doze, sleep };
inline constexpr std::size_t activity_count = 7;

constexpr std::string_view name_of(Activity activity) {
  constexpr std::string_view names[] = {"copy", "reduce", "codec", "protocol", "spin", "doze", "sleep"};
  return names[static_cast<std::size_t>(activity)];
}
constexpr bool is_wait(Activity activity) { return activity >= Activity::spin; }

/// Time of one thread in each.
struct ActivityTimes {
  std::array<nanoseconds, activity_count> in{};

  nanoseconds& operator[](Activity a) { return in[static_cast<std::size_t>(a)]; }
  nanoseconds operator[](Activity a) const { return in[static_cast<std::size_t>(a)]; }
  nanoseconds total() const {
    nanoseconds all{};
    for (const nanoseconds t : in) all += t;
    return all;
  }
  nanoseconds awake() const { return total() - (*this)[Activity::sleep]; }
};

/// Watts of one core in each, above the floor, which the machine draws whatever it does. Joules are divided by the ratios of these;
/// their sizes only count for what is predicted (see residual).
struct Weights {
  std::array<double, activity_count> watts{1, 1, 1, 1, 1, 1, 0};
  double application = 1;     // outside of operations, and other processes
  double floor_watts = 0;     // of all of the host's packages together
  double floor_sigma = 0;
  double relative_sigma = 0;  // standard error of a share that these weights make
  Split split = Split::equal_time;

  double of(Activity a) const { return watts[static_cast<std::size_t>(a)]; }
  /// Joules by time alone: a core that is awake draws the same whatever it does. That can be badly biased, hence an error of a third.
  static Weights equal_time() {
    Weights weights;
    weights.relative_sigma = 1.0 / 3;
    return weights;
  }
};

/// What is charged apart: the processors, memory, and devices.
enum class PowerKind : std::uint8_t { cpu, dram, gpu };
inline constexpr std::size_t power_kinds = 3;

/// What an activity of one participant was charged in a window. Its share of the floor goes by the time it took.
struct Charge {
  std::array<Nanojoules, activity_count> net{};
  Nanojoules floor = 0;

  Nanojoules total() const {
    Nanojoules all = floor;
    for (const Nanojoules part : net) all += part;
    return all;
  }
};
using Charges = std::array<Charge, power_kinds>;

}  // namespace tally::inline v0
