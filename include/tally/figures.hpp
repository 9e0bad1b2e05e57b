// SPDX-License-Identifier: Apache-2.0
// Figures as people read them: three significant digits, a unit that fits, and an error where there is one.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <iterator>
#include <locale>
#include <sstream>
#include <string>

#include "energy/quantity.hpp"
#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {
namespace detail {

/// Three significant digits, whatever the program's locale.
inline std::string digits(double value) {
  const double size = std::abs(value);
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << std::fixed << std::setprecision(value == std::floor(value) || size >= 100 ? 0 : size >= 10 ? 1 : 2) << value;
  return out.str();
}
/// e.g. "1.25 ms": the largest unit in which the value is at least 1.
template <std::size_t N>
std::string scaled(double value, const char* const (&units)[N], double base) {
  std::size_t i = 0;
  while (i + 1 < N && std::abs(value) >= base) value /= base, ++i;
  return concat({digits(value), " ", units[i]});
}
inline std::string time_text(nanoseconds t) {
  static constexpr const char* units[] = {"ns", "us", "ms", "s"};
  return scaled(static_cast<double>(t.count()), units, 1000);
}
inline std::string bytes_text(std::uint64_t bytes) {
  static constexpr const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  return scaled(static_cast<double>(bytes), units, 1024);
}
/// e.g. "93 %".
inline std::string percent_text(double share) {
  const double percent = 100 * share;
  if (!std::isfinite(percent)) return "unknown";
  if (percent > 0 && percent < 0.01) return "less than 0.01 %";
  return concat({digits(percent >= 10 ? std::round(percent) : percent >= 1 ? std::round(10 * percent) / 10 : percent), " %"});
}

// Joules and grams (of CO2-equivalent), e.g. "25.7 mJ", and, with the standard error, "25.7 +- 10.3 mJ" or "unknown J".
inline constexpr const char* joule_units[] = {"nJ", "uJ", "mJ", "J", "kJ", "MJ"};
inline constexpr const char* gram_units[] = {"ng", "ug", "mg", "g", "kg", "t"};
inline std::string joules_text(double value) { return scaled(value * 1e9, joule_units, 1000); }
inline std::string grams_text(double value) { return scaled(value * 1e9, gram_units, 1000); }

template <std::size_t N>
std::string quantity_text(const Quantity& q, const char* const (&units)[N], const char* unit) {
  if (!q.known() || !std::isfinite(q.value)) return concat({"unknown ", unit});
  if (!std::isfinite(q.sigma)) return concat({scaled(q.value * 1e9, units, 1000), ", error unknown"});
  std::size_t i = 0;
  double scale = 1e-9;
  while (i + 1 < N && std::abs(q.value) / scale >= 1000) scale *= 1000, ++i;
  return concat({digits(q.value / scale), " +- ", digits(q.sigma / scale), " ", units[i]});
}
inline std::string joules_text(const Quantity& q) { return quantity_text(q, joule_units, "J"); }
inline std::string grams_text(const Quantity& q) { return quantity_text(q, gram_units, "g"); }

}  // namespace detail
}  // namespace tally::inline v0
