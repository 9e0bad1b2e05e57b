// SPDX-License-Identifier: Apache-2.0
// How this host's clock and the one of rank 0's host go together: compared by questions and answers over the network, again and
// again (Cristian, "Probabilistic clock synchronization", 1989). Each answer bounds what the other clock shows; what all bounds
// have in common is what is known (Marzullo, "Maintaining the time in a distributed system", 1983), so that slow answers do no harm.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../clock.hpp"
#include "../transport/concept.hpp"

namespace tally::inline v0::detail {

class ClockMap {
 public:
  /// Asked at `asked` and answered at `answered` by the clock here; in between it was `there` there. `rate`: ticks there for one here,
  /// as the two clocks say of themselves; `microsecond`: in ticks there.
  void learn(Ticks asked, Ticks there, Ticks answered, double rate, Ticks microsecond) {
    microsecond_ = microsecond;
    if (++answers_ == 1) rate_ = rate;
    const Known fresh{answered, there, static_cast<Ticks>(static_cast<double>(answered - asked) * rate_)};
    if (answers_ == 1) {
      first_ = known_ = fresh;
      return;
    }
    const double passed = static_cast<double>(answered - known_.here);
    const Ticks elapsed = static_cast<Ticks>(passed * rate_), drifted = static_cast<Ticks>(passed * drift_) + 1;
    const Ticks low = std::max(fresh.there, known_.there + elapsed - drifted);
    const Ticks high = std::min(fresh.there + fresh.width, known_.there + elapsed + known_.width + drifted);
    const bool agree = static_cast<std::int64_t>(high - low) >= 0;
    known_ = agree ? Known{answered, low, high - low} : fresh;
    // A clock that was set or stood still, or one that is worse than any should be.
    if (!agree) first_ = fresh, drift_ = worst_drift;
    learn_rate();
  }
  /// The first answers are compared with each other; more of them where all were slow.
  bool is_settled() const { return answers_ >= burst && (known_.width < 200 * microsecond_ || answers_ >= 8 * burst); }
  /// In ticks there, at the last answer: to_common() is wrong by half of it at most, if the clocks' rates are what they say to within
  /// worst_drift. With clocks that differ by more it may be wrong by more until an answer contradicts what was known.
  Ticks width() const { return known_.width; }

  /// As it was here where nothing was learnt.
  Ticks to_common(Ticks here) const { return answers_ == 0 ? here : known_.middle() + static_cast<Ticks>(static_cast<std::int64_t>(static_cast<double>(static_cast<std::int64_t>(here - known_.here)) * rate_)); }
  Ticks to_here(Ticks common) const { return answers_ == 0 ? common : known_.here + static_cast<Ticks>(static_cast<std::int64_t>(static_cast<double>(static_cast<std::int64_t>(common - known_.middle())) / rate_)); }
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
  /// When it was `here`, it was `there` to `there + width` there.
  struct Known {
    Ticks here = 0, there = 0, width = 0;
    Ticks middle() const { return there + width / 2; }
  };
  static constexpr int burst = 8;
  static constexpr double worst_drift = 1e-4, steady_drift = 2e-6;  // of two quartzes against each other; of that, within seconds

  /// Over a long time the answers tell the rate better than two calibrations do.
  void learn_rate() {
    if (known_.width < first_.width / 2 && drift_ >= worst_drift) first_ = known_;
    const double passed = static_cast<double>(known_.here - first_.here), unsure = static_cast<double>(first_.width + known_.width) / 2;
    if (passed <= 0 || unsure > 1e-5 * passed) return;
    rate_ = static_cast<double>(static_cast<std::int64_t>(known_.middle() - first_.middle())) / passed;
    drift_ = unsure / passed + steady_drift;
  }
  static std::uint32_t scaled(std::uint32_t age, double rate) {
    constexpr std::uint32_t most = std::numeric_limits<std::uint32_t>::max();
    const double value = static_cast<double>(age) * rate;
    return age == most || value >= static_cast<double>(most) ? most : static_cast<std::uint32_t>(value);
  }

  double rate_ = 1, drift_ = worst_drift;
  int answers_ = 0;
  Ticks microsecond_ = 1000;
  Known first_, known_;
};

}  // namespace tally::inline v0::detail
