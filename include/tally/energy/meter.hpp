// SPDX-License-Identifier: Apache-2.0
// What a figure in joules is worth. A quantity carries its error, its hard bounds and where it comes from, and
// one that is unknown is NaN, never 0. Meters that read hardware counters will plug in here; the model beside
// this header is what there is without one.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>

#include "../types.hpp"

namespace tally::inline v0 {

/// Ordered: a sum is worth as much as its least part.
enum class Provenance : std::uint8_t { none, modelled, prorated, measured };

constexpr std::string_view name_of(Provenance provenance) {
  constexpr std::string_view names[] = {"unknown", "modelled", "prorated", "measured"};
  return names[static_cast<std::size_t>(provenance)];
}

/// A value with its standard error and the bounds it cannot leave. Unknown: NaN, Provenance::none.
struct Quantity {
  double value = std::numeric_limits<double>::quiet_NaN();
  double sigma = std::numeric_limits<double>::quiet_NaN();
  double lower = 0, upper = std::numeric_limits<double>::infinity();
  Provenance provenance = Provenance::none;

  bool known() const { return provenance != Provenance::none; }
  /// Errors of parts from one model or meter are fully correlated, so they add up.
  friend Quantity operator+(const Quantity& a, const Quantity& b) {
    if (!a.known() || !b.known()) return {};
    return {a.value + b.value, a.sigma + b.sigma, a.lower + b.lower, a.upper + b.upper, a.provenance < b.provenance ? a.provenance : b.provenance};
  }
};

}  // namespace tally::inline v0
