// SPDX-License-Identifier: Apache-2.0
// How joules become grams, as the environment says it. Who wants files in JSON as well hands over their reader
// (tally/carbon_files.hpp), so that nothing here depends on a library that parses them.
#pragma once

#include <charconv>
#include <functional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "../environment.hpp"
#include "../error.hpp"
#include "carbon.hpp"
#include "carbon_csv.hpp"

namespace tally::inline v0 {

/// What turns a file into intensities: read_intensity_csv, or read_intensity_file of tally/carbon_files.hpp.
using IntensityReader = std::function<IntensitySeries(const std::string& path, const IntensityChoice& choice)>;

/// TALLY_CARBON is a number (g CO2e per kWh, average; it counts as an estimate) or `file:PATH`; without it grams are unknown. TALLY_CARBON_ZONE is the zone of the number, or
/// the one to take out of the file. TALLY_PUE is from 1 to 10, 1 if not set. Throws errors that name the variable and what it holds.
inline CarbonSettings carbon_settings_of_environment(const IntensityReader& read = [](const std::string& path, const IntensityChoice& choice) { return read_intensity_csv(path, choice); }) {
  CarbonSettings settings;
  if (const auto pue = detail::environment_number<double>("TALLY_PUE", 1, 10)) settings.pue = *pue;
  const auto text = detail::environment("TALLY_CARBON");
  if (!text) return settings;
  const std::string zone(detail::environment("TALLY_CARBON_ZONE").value_or(""));
  static constexpr std::string_view file = "file:";
  if (text->starts_with(file)) {
    try {
      settings.source = read(std::string(text->substr(file.size())), {zone, {}});
    } catch (const Error& error) {
      throw Error(error.errc(), {"TALLY_CARBON='", *text, "': ", error.text()});
    }
    return settings;
  }
  double grams = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), grams);
  if (error != std::errc{} || end != text->data() + text->size() || !(grams >= 0 && grams <= highest_intensity))
    throw Error(Errc::invalid_argument, {"TALLY_CARBON='", *text, "' is neither a number of g/kWh from 0 to 10000 nor file:PATH"});
  settings.source = StaticIntensity(grams, CarbonSignal::average, CarbonFactor::unknown, zone, "TALLY_CARBON");
  return settings;
}

}  // namespace tally::inline v0
