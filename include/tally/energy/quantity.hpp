// SPDX-License-Identifier: Apache-2.0
// What a figure in joules or grams is worth. A quantity carries its error, its hard bounds and where it comes from, and one
// that is unknown is NaN, never 0; caveats say in plain words what else to know about it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

namespace tally::inline v0 {

/// Ordered: a sum is worth as much as its least part.
enum class Provenance : std::uint8_t { none, modelled, prorated, measured };

constexpr std::string_view name_of(Provenance provenance) {
  constexpr std::string_view names[] = {"unknown", "modelled", "prorated", "measured"};
  return names[static_cast<std::size_t>(provenance)];
}

/// How a window's joules were divided among what happened in it. Ordered from the best to the worst: a sum has the worst of its parts.
enum class Split : std::uint8_t { direct, regressed_weights, calibrated_weights, equal_time };

constexpr std::string_view name_of(Split split) {
  constexpr std::string_view names[] = {"direct", "regressed weights", "calibrated weights", "equal time"};
  return names[static_cast<std::size_t>(split)];
}

/// A value with its standard error and the bounds it cannot leave. Unknown: NaN, Provenance::none.
struct Quantity {
  double value = std::numeric_limits<double>::quiet_NaN();
  double sigma = std::numeric_limits<double>::quiet_NaN();
  double lower = 0, upper = std::numeric_limits<double>::infinity();
  Provenance provenance = Provenance::none;
  Split split = Split::direct;

  bool known() const { return provenance != Provenance::none; }
  /// Errors of parts from one model or meter are fully correlated, so they add up. Unknown and anything is unknown.
  friend Quantity operator+(const Quantity& a, const Quantity& b) {
    if (!a.known() || !b.known()) return {};
    return {a.value + b.value, a.sigma + b.sigma, a.lower + b.lower, a.upper + b.upper, std::min(a.provenance, b.provenance), std::max(a.split, b.split)};
  }
  /// So much of it; `factor` is exact and not negative.
  friend Quantity operator*(const Quantity& q, double factor) {
    if (!q.known()) return {};
    return {q.value * factor, q.sigma * factor, q.lower * factor, q.upper * factor, q.provenance, q.split};
  }
};

/// What makes a figure worth less than it looks, as bits of a mask.
enum class Caveat : std::uint32_t {
  wrap = 1u << 0,               // the counter wrapped and was unwrapped
  wrap_ambiguous = 1u << 1,     // it was not read for so long that it may have wrapped more than once
  counter_reset = 1u << 2,      // it fell, or rose by more than the hardware can draw: that interval is not counted
  stale = 1u << 3,              // it did not move in a whole window
  virtualised = 1u << 4,        // a guest's counter: a model of its host
  filtered = 1u << 5,           // the processor distorts it on purpose
  shared_device = 1u << 6,      // others use the device as well
  opaque_wait = 1u << 7,        // the device waited where the host cannot see
  permission_denied = 1u << 8,  // it must not be read
  unreadable = 1u << 9,         // it could not be read, or held no number: that interval is not counted, or late
  vanished = 1u << 10,          // it is gone
  implausible = 1u << 11,       // two ways to measure the same thing disagree
  floor_clamped = 1u << 12,     // less was drawn than the machine's floor is said to be
  carbon_stale = 1u << 13,      // the grid's figure was old
  carbon_estimated = 1u << 14,  // the grid's figure was an estimate
};
inline constexpr std::size_t caveat_count = 15;
using Caveats = std::uint32_t;  // of Caveat

constexpr Caveats operator|(Caveat a, Caveat b) { return static_cast<Caveats>(a) | static_cast<Caveats>(b); }
constexpr Caveats operator|(Caveats a, Caveat b) { return a | static_cast<Caveats>(b); }
constexpr Caveats& operator|=(Caveats& a, Caveat b) { return a |= static_cast<Caveats>(b); }
constexpr bool has(Caveats all, Caveat one) { return (all & static_cast<Caveats>(one)) != 0; }

/// The name in exports and, for people, what it means for the figure.
constexpr std::string_view name_of(Caveat caveat) {
  constexpr std::string_view names[] = {"wrap", "wrap_ambiguous", "counter_reset", "stale", "virtualised", "filtered", "shared_device", "opaque_wait",
                                        "permission_denied", "unreadable", "vanished", "implausible", "floor_clamped", "carbon_stale", "carbon_estimated"};
  return names[std::countr_zero(static_cast<Caveats>(caveat))];
}
constexpr std::string_view meaning_of(Caveat caveat) {
  constexpr std::string_view meanings[] = {
      "the counter wrapped around and was unwrapped",
      "the counter was not read for so long that it may have wrapped more than once: joules may be missing",
      "the counter was reset, or jumped by more than the hardware can draw: that interval is not counted",
      "the counter stood still for a whole window",
      "a virtual machine's counter, which is a model of its host's",
      "the processor filters its energy counter on purpose: it may be off by half",
      "others use the device as well",
      "the device waited where the host cannot see it",
      "the counter must not be read by this user",
      "the counter could not be read or held no number: that interval is not counted, or counted late",
      "the counter disappeared while it was in use",
      "two ways to measure the same device disagree",
      "less was drawn than the machine's floor is said to be",
      "the grid's carbon intensity was old",
      "the grid's carbon intensity was an estimate",
  };
  return meanings[std::countr_zero(static_cast<Caveats>(caveat))];
}

/// What was spent, in joules and in grams of CO2-equivalent. Each is unknown (NaN) where there is nothing to tell it from.
struct AccountEnergy {
  Quantity gross;           // all: net + the share of the floor that the machine draws anyway
  Quantity net;             // above the floor
  Quantity idle;            // of gross, while waiting
  Quantity idle_avoidable;  // of idle, what sleeping would have saved
  Quantity cpu, dram, gpu;  // gross by where it was drawn
  Quantity carbon;          // grams of CO2-equivalent for gross
};

using Nanojoules = std::uint64_t;

}  // namespace tally::inline v0
