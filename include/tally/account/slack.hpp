// SPDX-License-Identifier: Apache-2.0
// How long waits are going to be, learned from those before: so that a wait that will be long can be slept through, and a
// runtime can lower clocks meanwhile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "../types.hpp"

namespace tally::inline v0 {

/// Mean and tenth percentile of a series of waits, in two numbers. The mean forgets: the last eight weigh most. The percentile is
/// pushed down by what is below it and up, a ninth as far, by what is above, so that it comes to rest where a tenth is below
/// (frugal streaming: Ma, Muthukrishnan and Sandler, "Frugal streaming for estimating quantiles", 2013).
class ExpectedWait {
 public:
  void learn(nanoseconds waited) {
    const auto x = static_cast<float>(waited.count());
    if (++seen_ == 1) mean_ = tenth_ = x;
    mean_ += (x - mean_) / 8;
    const float step = std::max(std::abs(mean_), 1.0f) / 16;
    if (x < tenth_) tenth_ = std::max(x, tenth_ - step);
    else tenth_ = std::min(x, tenth_ + step / 9);
  }
  std::uint32_t seen() const { return seen_; }
  nanoseconds mean() const { return nanoseconds(static_cast<std::int64_t>(mean_)); }
  /// 0 before there were ten.
  nanoseconds tenth_percentile() const { return seen_ < 10 ? nanoseconds{0} : nanoseconds(static_cast<std::int64_t>(tenth_)); }

 private:
  float mean_ = 0, tenth_ = 0;  // nanoseconds
  std::uint32_t seen_ = 0;
};

/// A wait has begun that is going to be long.
struct SlackHint {
  Collective operation = Collective::none;
  std::uint64_t bytes = 0;   // of the largest calls of its size class
  nanoseconds expected{};    // the mean of such waits
  nanoseconds at_least{};    // nine of ten were longer
};
/// Called by the thread that waits, before it goes to sleep for at least half a millisecond: e.g. to lower its core's or its device's
/// clock. What it throws is swallowed.
using OnSlack = std::function<void(const SlackHint&)>;

}  // namespace tally::inline v0
