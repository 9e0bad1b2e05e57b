// SPDX-License-Identifier: Apache-2.0
// Whatever the kernel's files about meters and cores hold, or a container shows instead: what is taken out of them is in its range,
// reads back as what it was read from, and nothing reads past the text's end, which has no zero behind it.
// libFuzzer: tests/fuzz/run.sh
#include <sched.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include <tally/energy/host_files.hpp>
#include <tally/energy/hwmon.hpp>
#include <tally/energy/perf.hpp>
#include <tally/energy/powercap.hpp>
#include <tally/topology.hpp>

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void check_numbers(std::string_view text) {
  if (const auto n = tally::detail::parse_natural(text)) {
    const std::string again = std::to_string(*n);
    require(text.ends_with(again) && text.find_first_not_of("0123456789") == text.npos);  // zeros may lead
  }
  if (const auto n = tally::detail::parse_natural(text, 16)) require(!text.empty() && text.find_first_not_of("0123456789abcdefABCDEF") == text.npos && (*n != 0 || text.find_first_not_of('0') == text.npos));
  if (const auto event = tally::detail::parse_perf_event(text)) require(*event <= 255 && text.starts_with("event=0x"));
  if (const auto scale = tally::detail::parse_perf_scale(text)) require(std::isfinite(*scale) && *scale >= 1e-15 && *scale <= 1e3);
  if (const auto n = tally::detail::parse_labelled(text, "Esocket")) require(*n >= 0 && text.starts_with("Esocket"));
}

void check_names(std::string_view text) {
  if (const auto place = tally::detail::parse_zone_place(text)) {
    require(text.starts_with(place->control) && !place->numbers.empty() && place->numbers.size() <= 3);
    std::string again = place->control;
    for (const auto n : place->numbers) again += ':' + std::to_string(n);
    require(again.size() <= text.size());
  }
  for (const auto second : {std::string_view("-die-"), std::string_view{}})
    if (const auto numbers = tally::detail::parse_numbered(text, "package-", second)) require(numbers->first >= 0 && numbers->first <= 99'999 && numbers->second >= -1 && numbers->second <= 99'999);
  for (const auto around : {std::string_view{}, std::string_view("package-1")}) {
    const auto zone = tally::detail::parse_zone_name(text, around);
    require(zone.key.size() < 64 && (zone.key.empty() || zone.kind != tally::Domain::node));
  }
  require(tally::detail::parse_power_label(text).key.size() <= text.size() + 64);
  const std::string shown = tally::detail::quoted(text);
  require(shown.size() <= 45 && shown.find_first_of("\n\x1b") == shown.npos);
}

void check_cores(std::string_view text) {
  const cpu_set_t cores = tally::detail::parse_cores(text);
  const int count = CPU_COUNT(&cores);
  require(count >= 0 && count <= CPU_SETSIZE && (count == 0 || text.find_first_not_of("0123456789-, \n") == text.npos));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  check_numbers(text);
  check_names(text);
  check_cores(text);
  const bool guest = tally::detail::has_cpu_flag(text, "hypervisor");
  require(!guest || text.find("hypervisor") != text.npos);
  // As the parsers that want a prefix would see it.
  check_numbers("event=0x" + std::string(text));
  check_numbers("Esocket" + std::string(text));
  check_names("intel-rapl:" + std::string(text));
  check_names("package-" + std::string(text));
  require(tally::detail::has_cpu_flag("flags\t\t: fpu hypervisor " + std::string(text), "hypervisor"));
  return 0;
}
