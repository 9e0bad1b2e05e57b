// SPDX-License-Identifier: Apache-2.0
// The energy counters of Intel and AMD processors (RAPL) as the kernel's powercap framework shows them. It hides that zones are
// numbered at will, nested or flat, sometimes there twice, readable by few, and that each wraps at a place of its own.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../text.hpp"
#include "counters.hpp"
#include "host_files.hpp"
#include "meter.hpp"

namespace tally::inline v0 {
namespace detail {

/// Where a zone is: "intel-rapl:0:1" is the second of the first one of intel-rapl. It says nothing about what the zone measures.
struct ZonePlace {
  std::string control;
  std::vector<std::uint32_t> numbers;

  bool inside(const ZonePlace& outer) const {
    return control == outer.control && numbers.size() == outer.numbers.size() + 1 && std::equal(outer.numbers.begin(), outer.numbers.end(), numbers.begin());
  }
  friend auto operator<=>(const ZonePlace&, const ZonePlace&) = default;
};

inline constexpr std::string_view rapl_control = "intel-rapl";  // AMD's too; "intel-rapl-mmio" shows the same counters again

/// The place that a directory's name tells, at most three deep; none if it is no RAPL zone.
inline std::optional<ZonePlace> parse_zone_place(std::string_view name) {
  if (!name.starts_with(rapl_control) || name.size() > 64) return std::nullopt;
  const std::size_t colon = name.find(':');
  if (colon == name.npos) return std::nullopt;
  ZonePlace place{std::string(name.substr(0, colon)), {}};
  name.remove_prefix(colon);
  while (!name.empty()) {
    name.remove_prefix(1);
    const std::string_view digits = name.substr(0, name.find(':'));
    const auto number = parse_natural(digits);
    if (!number || *number > 99'999 || place.numbers.size() == 3) return std::nullopt;
    place.numbers.push_back(static_cast<std::uint32_t>(*number));
    name.remove_prefix(digits.size());
  }
  return place;
}

/// Two numbers in a name such as "package-0-die-1": "package-", "-die-". The second may be missing: -1. None if the name is another one.
inline std::optional<std::pair<int, int>> parse_numbered(std::string_view name, std::string_view first, std::string_view second) {
  if (!name.starts_with(first)) return std::nullopt;
  name.remove_prefix(first.size());
  const std::size_t split = second.empty() ? name.npos : name.find(second);
  const auto a = parse_natural(name.substr(0, split));
  const auto b = split == name.npos ? std::optional<std::uint64_t>(0) : parse_natural(name.substr(split + second.size()));
  if (!a || !b || *a > 99'999 || *b > 99'999) return std::nullopt;
  return std::pair(static_cast<int>(*a), split == name.npos ? -1 : static_cast<int>(*b));
}

/// What a zone measures, by its name and the key of the zone around it, if any. No key: nothing that is known.
struct ZoneMeaning {
  Domain kind = Domain::node;
  std::string key;
};
inline ZoneMeaning parse_zone_name(std::string_view name, std::string_view around) {
  if (const auto package = parse_numbered(name, "package-", "-die-")) {
    if (package->second < 0) return {Domain::cpu_package, concat({"package-", package->first})};
    return {Domain::cpu_package, concat({"package-", package->first, "-die-", package->second})};
  }
  if (name == "psys") return {Domain::psys, "psys"};
  if (const auto psys = parse_numbered(name, "psys-", {})) return {Domain::psys, concat({"psys-", psys->first})};
  if (!around.starts_with("package-")) return {};
  if (name == "core") return {Domain::cpu_core, concat({around, "/core"})};
  if (name == "dram") return {Domain::dram, concat({around, "/dram"})};
  return {};
}

}  // namespace detail

/// Meter of the RAPL zones below sys/class/powercap. The energy of a package includes its cores, but not its memory ("dram"), so
/// only `core` has the package as parent; the graphics unit of a desktop processor ("uncore") is a part of it that is left out.
/// psys is the whole machine (see whole_machine()): packages have it as parent only where their zones lie in its zone.
/// A zone that cannot be read when the meter is made is left out, and warnings() says why; one that fails later has caveats.
class Powercap {
 public:
  struct Settings {
    std::string root = {};                // below it is sys/class/powercap; "" and "/": the host itself
    MeterClock clock = monotonic_time;
    std::vector<std::string> taken = {};  // keys of domains that others measure: left out, with their parts
  };

  Powercap() : Powercap(Settings{}) {}
  explicit Powercap(const Settings& settings)
      : counters_("powercap",
                  "let an administrator make it readable (chmod a+r: since Linux 5.10 only root may read it) or give the program CAP_DAC_READ_SEARCH; "
                  "or let perf read the counters, with sysctl kernel.perf_event_paranoid=0 or CAP_PERFMON",
                  detail::host_caveats(settings.root), settings.clock) {
    const std::string top = detail::below(settings.root, "sys/class/powercap");
    Zones zones;
    find_zones(top, zones);
    for (const std::string& name : detail::names_in(top))
      if (name.starts_with(detail::rapl_control) && name.size() < 64 && name.find(':') == name.npos) find_zones(detail::concat({top, "/", name}), zones);
    Known known;
    for (const auto& [place, directory] : zones) add(place, directory, settings.taken, known);
  }

  std::span<const DomainInfo> domains() const { return counters_.domains(); }
  SampleResult sample(std::span<MeterSample> out) noexcept { return counters_.sample(out); }
  const std::vector<std::string>& warnings() const { return counters_.warnings(); }

 private:
  using Place = detail::ZonePlace;
  using Zones = std::map<Place, std::string>;  // and their directories; the ones outside before those in them
  using Known = std::map<Place, detail::ZoneMeaning>;
  static constexpr std::size_t most_zones = 512;
  static constexpr double counts = 4294967295.0;       // the register has 32 bits
  static constexpr double least_wrap_joules = 65'532;  // of the processors known: 2^32 units of 15.258 uJ

  /// The class lists all zones side by side, as links; containers and older kernels show a tree. A zone's place is in its name, so
  /// it does not matter where it is found, and a link that leads back leads nowhere new.
  static void find_zones(const std::string& directory, Zones& zones, const Place* outer = nullptr) {
    for (const std::string& name : detail::names_in(directory)) {
      const auto place = detail::parse_zone_place(name);
      if (!place || zones.size() >= most_zones || (outer && !place->inside(*outer))) continue;
      const std::string path = detail::concat({directory, "/", name});
      if (zones.emplace(*place, path).second) find_zones(path, zones, &*place);
    }
  }

  void add(const Place& place, const std::string& directory, const std::vector<std::string>& taken, Known& known) {
    const detail::FileText name = detail::read_file(directory + "/name");
    if (name.error != 0) return counters_.warn_unreadable(directory + "/name", name.error, "the zone is left out");
    if (name.text == "uncore") return;
    const auto outer = known.find({place.control, {place.numbers.begin(), place.numbers.end() - 1}});
    const std::string around = outer == known.end() ? "" : outer->second.key;
    const detail::ZoneMeaning meaning = detail::parse_zone_name(name.text, around);
    if (meaning.key.empty()) return counters_.warn({directory, "/name is ", detail::quoted(name.text), ", which is no domain of energy that is known here; the zone is left out."});
    const auto is_taken = [&](const std::string& key) { return std::find(taken.begin(), taken.end(), key) != taken.end(); };
    const bool twice = std::any_of(known.begin(), known.end(), [&](const auto& other) { return other.second.key == meaning.key && other.first.control == place.control; });
    known.emplace(place, meaning);
    if (is_taken(meaning.key) || (meaning.kind == Domain::cpu_core && is_taken(around))) return;
    if (twice) return counters_.warn({directory, " is called ", detail::quoted(name.text), ", as another zone of ", place.control, " is; it is left out, because nobody can tell them apart."});
    if (counters_.find(meaning.key) >= 0) return;  // intel-rapl-mmio beside intel-rapl

    const std::string path = directory + "/energy_uj";
    DomainInfo info;
    info.kind = meaning.kind;
    info.key = meaning.key;
    info.parent = meaning.kind == Domain::dram || around.empty() ? -1 : counters_.find(around);
    info.tick = std::chrono::milliseconds(1);
    info.max_watts = detail::plausible_watts(meaning.kind);
    // The counter wraps after 2^32 units, and the highest value shown is that of one unit less (intel_rapl_common.c).
    const detail::Reading range = detail::read_natural(directory + "/max_energy_range_uj");
    const detail::Reading now = detail::read_natural(path);
    const bool plausible = range.error == 0 && range.value >= 1'000'000 && static_cast<double>(range.value) <= 1.01e6 * counts && (now.error != 0 || now.value <= range.value + range.value / 1'000'000);
    const double microjoules = plausible ? static_cast<double>(range.value) / counts : 0;
    const std::uint64_t modulus = plausible ? range.value + static_cast<std::uint64_t>(std::llround(microjoules)) : 0;
    info.unit_joules = plausible ? 1e-6 * microjoules : std::ldexp(1, -14);
    info.wrap_joules = plausible ? 1e-6 * static_cast<double>(modulus) : least_wrap_joules;
    if (!counters_.add(std::move(info), path, [path] { return detail::read_natural(path); }, modulus, 1000)) return;
    if (!plausible)
      counters_.warn({directory, "/max_energy_range_uj ", range.error != 0 ? detail::concat({"cannot be read: ", detail::why(range.error)}) : detail::concat({"is ", range.value, ", which cannot be"}),
                      "; nobody knows where the counter wraps, so an interval in which it does is not counted."});
  }

  detail::Counters counters_;
};

}  // namespace tally::inline v0
