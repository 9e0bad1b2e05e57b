// SPDX-License-Identifier: Apache-2.0
#include <iostream>
#include <tally/carbon_files.hpp>

int main() {
  const tally::CarbonAccount account({tally::parse_intensity_file(R"({"zone": "DE", "carbonIntensity": 400, "datetime": "2024-01-01T00:00:00.000Z"})", "de.json")});
  const tally::CarbonTime hour = account.settings().source.over({}, tally::CarbonTime::max()).front().begin;
  std::cout << account.of({3.6e6, 0, 3.6e6, 3.6e6, tally::Provenance::measured}, hour, hour).grams.value << " g" << std::endl;
}
