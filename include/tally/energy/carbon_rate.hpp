// SPDX-License-Identifier: Apache-2.0
// Grams in ledgers and reports: options.carbon = tally::carbon_rate(tally::carbon_settings_of_environment()). Ledgers know a clock
// that begins with the host; carbon sources know the calendar.
#pragma once

#include <chrono>
#include <exception>
#include <utility>

#include "carbon.hpp"
#include "meter.hpp"
#include "source.hpp"

namespace tally::inline v0 {

/// For Options::carbon; empty without a source. Whatever is wrong with the source makes grams unknown, and is told as their source.
inline CarbonRate carbon_rate(CarbonSettings settings) {
  if (!settings.source) return {};
  return [account = CarbonAccount(std::move(settings))](nanoseconds begin, nanoseconds end) {
    CarbonFigure figure;
    figure.pue = account.settings().pue;
    try {
      const CarbonTime now = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
      const nanoseconds age = monotonic_time();
      const CarbonTime from = now - (age - begin), to = now - (age - std::max(begin, end));
      const Carbon carbon = account.of({1, 0, 1, 1, Provenance::measured}, from, to);
      const CarbonIntensity latest = account.intensity_at(to);
      figure.grams_per_joule = carbon.grams;
      figure.caveats = carbon.caveats;
      figure.grams_per_kwh = latest.per_kwh();
      figure.source = describe(latest, to);
    } catch (const std::exception& error) {
      figure.source = error.what();
    }
    return figure;
  };
}

}  // namespace tally::inline v0
