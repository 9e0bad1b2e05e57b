// SPDX-License-Identifier: Apache-2.0
// Sensors of energy and power below sys/class/hwmon: AMD's amd_energy, and ACPI power meters, which most servers have one of
// and NVIDIA's Grace several. It hides how they are labelled and that power has to be integrated.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
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

/// The number at the end of a label, "Esocket0" after "Esocket"; none if the label is another one.
inline std::optional<int> parse_labelled(std::string_view label, std::string_view prefix) {
  if (!label.starts_with(prefix)) return std::nullopt;
  const auto number = parse_natural(label.substr(prefix.size()));
  return number && *number <= 99'999 ? std::optional(static_cast<int>(*number)) : std::nullopt;
}

/// What an ACPI power meter measures, by its OEM information. Grace's "Module Power Socket" holds the GPU, whose own meter counts it,
/// and "SysIO Power Socket" is a part of "Grace Power Socket": no key, they are left out.
struct PowerMeaning {
  Domain kind = Domain::node;
  std::string key;
};
inline PowerMeaning parse_power_label(std::string_view label) {
  if (const auto socket = parse_labelled(label, "Grace Power Socket ")) return {Domain::cpu_package, concat({"package-", *socket})};
  if (const auto socket = parse_labelled(label, "CPU Power Socket ")) return {Domain::cpu_core, concat({"package-", *socket, "/core"})};
  if (parse_labelled(label, "Module Power Socket ") || parse_labelled(label, "SysIO Power Socket ")) return {};
  return {Domain::node, "node"};
}

}  // namespace detail

/// Meter of hwmon's amd_energy (microjoules of sockets and cores, 64 bits, accumulated by the driver) and power_meter (microwatts, an
/// average over the time before, integrated by the trapezoid rule between samples). An ACPI meter that does not tell what it measures
/// is the whole machine (see whole_machine()). What cannot be read when the meter is made is left out, and warnings() says why.
class Hwmon {
 public:
  struct Settings {
    std::string root = {};                // below it is sys/class/hwmon; "" and "/": the host itself
    MeterClock clock = monotonic_time;
    bool cores = false;                   // also each core of amd_energy. Each reading wakes that core
    std::vector<std::string> taken = {};  // keys of domains that others measure: left out, with their parts
  };

  Hwmon() : Hwmon(Settings{}) {}
  explicit Hwmon(const Settings& settings)
      : counters_("hwmon", "let an administrator make it readable (chmod a+r) or give the program CAP_DAC_READ_SEARCH",
                  detail::host_caveats(settings.root) & ~static_cast<Caveats>(Caveat::filtered), settings.clock) {  // only Intel filters, and only RAPL
    const std::string top = detail::below(settings.root, "sys/class/hwmon/");
    std::vector<std::pair<int, std::string>> sensors;
    for (const std::string& name : detail::names_in(top))
      if (const auto number = detail::parse_labelled(name, "hwmon")) sensors.emplace_back(*number, top + name);
    std::sort(sensors.begin(), sensors.end());
    std::vector<Power> powers;
    for (const auto& sensor : sensors)
      for (const std::string& directory : {sensor.second, sensor.second + "/device"}) {  // power_meter's are there up to Linux 6.18 or so
        const std::string name = detail::read_file(directory + "/name").text;
        if (name == "amd_energy") add_energy(settings, directory);
        if (name == "power_meter") powers.push_back({detail::parse_power_label(detail::read_file(directory + "/power1_oem_info").text), directory});
        if (!name.empty()) break;
      }
    // Packages before their parts, in whatever order the sensors are numbered.
    std::stable_sort(powers.begin(), powers.end(), [](const Power& a, const Power& b) { return a.meaning.kind < b.meaning.kind; });
    for (const Power& power : powers) add_power(settings, power);
  }

  std::span<const DomainInfo> domains() const { return counters_.domains(); }
  SampleResult sample(std::span<MeterSample> out) noexcept { return counters_.sample(out); }
  const std::vector<std::string>& warnings() const { return counters_.warnings(); }

 private:
  struct Power {
    detail::PowerMeaning meaning;
    std::string directory;
  };
  static constexpr int most_inputs = 4096;

  static bool is_taken(const Settings& settings, const std::string& key) { return std::find(settings.taken.begin(), settings.taken.end(), key) != settings.taken.end(); }

  /// The sockets come after the cores, so they are found first.
  void add_energy(const Settings& settings, const std::string& directory) {
    std::vector<std::pair<int, std::string>> cores;
    for (int i = 1; i <= most_inputs; ++i) {
      const std::string path = detail::concat({directory, "/energy", i, "_"});
      const detail::FileText label = detail::read_file(path + "label");
      if (label.error == ENOENT) break;
      const std::string input = path + "input";
      if (const auto core = detail::parse_labelled(label.text, "Ecore")) {
        cores.emplace_back(*core, input);
      } else if (const auto socket = detail::parse_labelled(label.text, "Esocket")) {
        add_count(settings, Domain::cpu_package, detail::concat({"package-", *socket}), -1, input, detail::plausible_watts(Domain::cpu_package));
      } else {
        counters_.warn({path, "label is ", detail::quoted(label.text), ", neither a socket nor a core; it is left out."});
      }
    }
    if (!settings.cores) return;
    for (const auto& [core, input] : cores) {  // the driver numbers cores as the kernel numbers their first threads
      const detail::Reading package = detail::read_natural(detail::below(settings.root, detail::concat({"sys/devices/system/cpu/cpu", core, "/topology/physical_package_id"})));
      const std::string key = detail::concat({"package-", package.value});
      const int parent = package.error == 0 ? counters_.find(key) : -1;
      if (parent >= 0) add_count(settings, Domain::cpu_core, detail::concat({key, "/core-", core}), parent, input, detail::plausible_core_watts);
    }
  }
  void add_count(const Settings& settings, Domain kind, std::string key, int parent, const std::string& input, double watts) {
    if (is_taken(settings, key)) return;
    if (counters_.find(key) >= 0) return counters_.warn({input, " would be ", key, " once more; it is left out."});
    DomainInfo info;
    info.kind = kind;
    info.parent = parent;
    info.key = std::move(key);
    info.tick = std::chrono::milliseconds(1);
    info.unit_joules = std::ldexp(1, -16);
    info.max_watts = watts;
    counters_.add(std::move(info), input, [input] { return detail::read_natural(input); }, 0, 1000);
  }

  void add_power(const Settings& settings, const Power& power) {
    const detail::PowerMeaning& meaning = power.meaning;
    const std::string package = meaning.key.substr(0, meaning.key.find('/')), input = power.directory + "/power1_average";
    if (meaning.key.empty() || is_taken(settings, meaning.key) || is_taken(settings, package)) return;
    if (counters_.find(meaning.key) >= 0) return counters_.warn({input, " would be ", meaning.key, " once more; it is left out, because nobody can tell whether it is a part of the first or beside it."});
    const detail::Reading interval = detail::read_natural(power.directory + "/power1_average_interval");  // ms
    const std::chrono::milliseconds tick(interval.error == 0 && interval.value >= 1 && interval.value <= 3'600'000 ? static_cast<std::int64_t>(interval.value) : 1000);
    DomainInfo info;
    info.kind = meaning.kind;
    info.parent = meaning.kind == Domain::cpu_core ? counters_.find(package) : -1;
    info.key = meaning.key;
    info.tick = tick;
    info.unit_joules = 1e-9 * static_cast<double>(std::chrono::nanoseconds(tick).count());  // a watt for one tick
    info.max_watts = detail::plausible_watts(meaning.kind);
    counters_.add(std::move(info), input, [input] { return detail::read_natural(input); }, std::max<nanoseconds>(std::chrono::seconds(10), 3 * tick));
  }

  detail::Counters counters_;
};

}  // namespace tally::inline v0
