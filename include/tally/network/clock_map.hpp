// SPDX-License-Identifier: Apache-2.0
// How this host's clock and the one of rank 0's host go together: compared by questions and answers over the network, of which
// those count that took least (Cristian, "Probabilistic clock synchronization", 1989), again and again.
#pragma once

#include <cstdint>
#include <limits>

#include "../clock.hpp"
#include "../transport/concept.hpp"

namespace tally::inline v0::detail {

class ClockMap {
 public:
  /// Asked at `asked` and answered at `answered` by the clock here; in between it was `there` there. `rate`: ticks there for one here,
  /// as the two clocks say of themselves.
  void learn(Ticks asked, Ticks there, Ticks answered, double rate) {
    const Answer answer{asked + (answered - asked) / 2, there, answered - asked};
    if (++answers_ == 1) rate_ = rate;
    if (answers_ <= burst) {
      if (answers_ == 1 || answer.trip < first_.trip) first_ = last_ = answer;
      return;
    }
    // Clocks drift apart by some microseconds a second, so the longer ago the last answer was, the worse the next one may be.
    if (static_cast<double>(answer.trip) > 2 * static_cast<double>(first_.trip) + 1e-5 * static_cast<double>(answer.here - last_.here)) return;
    last_ = answer;
    // Over a long time the answers tell the rate better than two calibrations do.
    const double passed = static_cast<double>(last_.here - first_.here);
    if (static_cast<double>(first_.trip + last_.trip) < 1e-5 * passed) rate_ = static_cast<double>(last_.there - first_.there) / passed;
  }
  /// The first answers are compared with each other.
  bool is_settled() const { return answers_ >= burst; }

  Ticks to_common(Ticks here) const { return last_.there + static_cast<Ticks>(static_cast<std::int64_t>(static_cast<double>(static_cast<std::int64_t>(here - last_.here)) * rate_)); }
  Ticks to_here(Ticks common) const { return last_.here + static_cast<Ticks>(static_cast<std::int64_t>(static_cast<double>(static_cast<std::int64_t>(common - last_.there)) / rate_)); }
  FrameTimes to_common(FrameTimes times) const {
    times.sent_at = to_common(times.sent_at);
    times.arrive_age = scaled(times.arrive_age, rate_);
    times.late_age = scaled(times.late_age, rate_);
    return times;
  }
  FrameTimes to_here(FrameTimes times) const {
    times.sent_at = to_here(times.sent_at);
    times.arrive_age = scaled(times.arrive_age, 1 / rate_);
    times.late_age = scaled(times.late_age, 1 / rate_);
    return times;
  }

 private:
  struct Answer {
    Ticks here = 0, there = 0, trip = 0;
  };
  static constexpr int burst = 8;
  static std::uint32_t scaled(std::uint32_t age, double rate) {
    constexpr std::uint32_t most = std::numeric_limits<std::uint32_t>::max();
    const double value = static_cast<double>(age) * rate;
    return age == most || value >= static_cast<double>(most) ? most : static_cast<std::uint32_t>(value);
  }

  double rate_ = 1;
  int answers_ = 0;
  Answer first_, last_;
};

}  // namespace tally::inline v0::detail
