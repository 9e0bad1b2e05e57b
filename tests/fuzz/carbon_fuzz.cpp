// SPDX-License-Identifier: Apache-2.0
// For libFuzzer: any bytes as an intensity file. They give a tally::Error, or a series out of which no window makes a negative
// or infinite gram: tests/fuzz/run.sh
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <utility>

#include <tally/carbon_files.hpp>

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void check(const tally::IntensitySeries& series) {
  const tally::CarbonAccount account({series, 1.5});
  const tally::Quantity joules{3.6e6, 1e5, 1e6, 1e7, tally::Provenance::measured};
  const tally::CarbonTime first = series.entries().front().from, last = series.entries().back().from;
  for (const auto& [begin, end] : {std::pair{first, first}, std::pair{first, last}, std::pair{last, last + std::chrono::hours(24)}}) {
    const tally::Carbon carbon = account.of(joules, begin, end);
    require(carbon.grams.known() && carbon.grams.value >= 0 && carbon.grams.value <= 1.5 * tally::highest_intensity * (1 + 1e-9) && std::isfinite(carbon.grams.sigma));
  }
  if (first > tally::CarbonTime{}) require(!account.of(joules, first - tally::nanoseconds{1}, last).grams.known());
}

void parse(std::string_view text, const tally::IntensityChoice& choice) {
  try {
    check(tally::parse_intensity_file(text, "fuzz", choice));
  } catch (const tally::Error& error) {
    require(error.errc() == tally::Errc::protocol && error.text().starts_with("intensity file 'fuzz'") && error.text().size() < 1000);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  parse(text, {});
  parse(text, {"DE", tally::CarbonSignal::average});
  return 0;
}
