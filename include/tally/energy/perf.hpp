// SPDX-License-Identifier: Apache-2.0
// The energy counters of Intel and AMD processors (RAPL) as events of perf, where the kernel unwraps them: the best way to read
// them. It hides the event files of sysfs, which processor stands for which package, and what perf_event_open refuses.
#pragma once

#include <linux/perf_event.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../text.hpp"
#include "../topology.hpp"
#include "counters.hpp"
#include "host_files.hpp"
#include "meter.hpp"

namespace tally::inline v0 {

/// perf_event_open: a descriptor, or -1 and errno.
using PerfOpen = std::function<int(const perf_event_attr& attributes, pid_t process, int cpu, int group, unsigned long flags)>;

inline int open_perf_event(const perf_event_attr& attributes, pid_t process, int cpu, int group, unsigned long flags) {
  return static_cast<int>(::syscall(SYS_perf_event_open, &attributes, process, cpu, group, flags));
}

namespace detail {

/// The number in an event's description, "event=0x02"; none if it is anything else, or does not fit the 8 bits that RAPL's have.
inline std::optional<std::uint64_t> parse_perf_event(std::string_view text) {
  constexpr std::string_view prefix = "event=0x";
  if (!text.starts_with(prefix)) return std::nullopt;
  const auto event = parse_natural(text.substr(prefix.size()), 16);
  return event && *event <= 0xff ? event : std::nullopt;
}

/// The joules of one count, "2.3283064365386962890625e-10"; none unless between 1e-15 and 1e3.
inline std::optional<double> parse_perf_scale(std::string_view text) {
  double scale = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), scale);
  if (parsed.ec != std::errc{} || parsed.ptr != text.data() + text.size() || !(scale >= 1e-15 && scale <= 1e3)) return std::nullopt;
  return scale;
}

}  // namespace detail

/// Meter of the PMU `power` of perf: packages, the cores of each and its memory, and psys, which is the whole machine (see
/// whole_machine()). Keys are those of Powercap. The kernel counts in 2^-32 J whatever the hardware's unit, without wraps.
/// Needs kernel.perf_event_paranoid <= 0 or CAP_PERFMON. What cannot be opened is left out, and warnings() says why.
class PerfEnergy {
 public:
  struct Settings {
    std::string root = {};                // below it are sys and proc; "" and "/": the host itself
    PerfOpen open_fn = open_perf_event;
    MeterClock clock = monotonic_time;
    bool cores = false;                   // also the counter of each core, where there is one (AMD's power_core). Each reading wakes that core
    std::vector<std::string> taken = {};  // keys of domains that others measure: left out, with their parts
  };

  PerfEnergy() : PerfEnergy(Settings{}) {}
  explicit PerfEnergy(const Settings& settings)
      : counters_("perf", permission(settings.root), detail::host_caveats(settings.root), settings.clock) {
    const std::string devices = detail::below(settings.root, "sys/bus/event_source/devices/");
    if (const auto pmu = find_pmu(devices + "power")) {
      const std::vector<Cpu> cpus = places(*pmu, settings.root);
      const bool dies = std::any_of(cpus.begin(), cpus.end(), [&](const Cpu& a) { return std::any_of(cpus.begin(), cpus.end(), [&](const Cpu& b) { return a.package == b.package && a.die != b.die; }); });
      constexpr Event events[] = {{"energy-pkg", Domain::cpu_package, "", -14}, {"energy-cores", Domain::cpu_core, "/core", -14}, {"energy-ram", Domain::dram, "/dram", -16}, {"energy-psys", Domain::psys, "", 0}};
      for (const Event& event : events)
        for (const Cpu& cpu : cpus) {
          const std::string package = package_key(cpu, dies), psys = cpu.package == 0 ? "psys" : detail::concat({"psys-", cpu.package});
          if (event.kind != Domain::psys) add(settings, *pmu, event, cpu, package + event.suffix, package);
          else if (counters_.find(psys) < 0) add(settings, *pmu, event, cpu, psys, "");  // one of a package, whatever its dies
        }
      if (settings.cores) add_cores(settings, devices + "power_core", dies);
    }
  }

  std::span<const DomainInfo> domains() const { return counters_.domains(); }
  SampleResult sample(std::span<MeterSample> out) noexcept { return counters_.sample(out); }
  const std::vector<std::string>& warnings() const { return counters_.warnings(); }

 private:
  struct Pmu {
    std::string directory;
    std::uint32_t type = 0;
    std::vector<int> cpus;  // one for each package, die or core
  };
  struct Cpu {
    int number = 0, package = 0, die = 0;
  };
  struct Event {
    const char* name;
    Domain kind;
    const char* suffix;
    int unit;  // of the hardware, as commonly found (perf shows multiples of it): 2^unit joules
  };

  static std::string permission(const std::string& root) {
    const detail::FileText paranoid = detail::read_file(detail::below(root, "proc/sys/kernel/perf_event_paranoid"), 16);
    return detail::concat({"set sysctl kernel.perf_event_paranoid to 0 (it is ", paranoid.error == 0 ? detail::quoted(paranoid.text) : std::string("not known"),
                           ") or give the program CAP_PERFMON; a container must allow perf_event_open as well"});
  }

  /// None if the kernel has no such PMU, or if what it tells makes no sense: then there is a warning.
  std::optional<Pmu> find_pmu(const std::string& directory) {
    const detail::Reading type = detail::read_natural(directory + "/type");
    if (type.error == ENOENT || type.error == ENOTDIR) return std::nullopt;
    if (type.error != 0) return counters_.warn_unreadable(directory + "/type", type.error, "its events are left out"), std::nullopt;
    const detail::FileText mask = detail::read_file(directory + "/cpumask");
    if (mask.error != 0) return counters_.warn_unreadable(directory + "/cpumask", mask.error, "its events are left out"), std::nullopt;
    Pmu pmu{directory, static_cast<std::uint32_t>(type.value), {}};
    const cpu_set_t cpus = detail::parse_cores(mask.text);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &cpus)) pmu.cpus.push_back(cpu);
    const detail::FileText format = detail::read_file(directory + "/format/event");
    if (type.value > UINT32_MAX || pmu.cpus.empty() || (format.error == 0 && format.text != "config:0-7")) {
      counters_.warn({directory, " makes no sense (type ", type.value, ", cpumask ", detail::quoted(mask.text), ", format/event ", detail::quoted(format.text), "); its events are left out."});
      return std::nullopt;
    }
    return pmu;
  }

  std::vector<Cpu> places(const Pmu& pmu, const std::string& root) {
    std::vector<Cpu> places;
    for (const int cpu : pmu.cpus) {
      const std::string topology = detail::below(root, detail::concat({"sys/devices/system/cpu/cpu", cpu, "/topology/"}));
      const detail::Reading package = detail::read_natural(topology + "physical_package_id"), die = detail::read_natural(topology + "die_id");
      const bool known = package.error == 0 && package.value <= 99'999;
      if (!known && pmu.cpus.size() > 1) {
        counters_.warn({topology, "physical_package_id does not tell which package the processor belongs to; its counters are left out."});
        continue;
      }
      places.push_back({cpu, known ? static_cast<int>(package.value) : 0, die.error == 0 && die.value <= 99'999 ? static_cast<int>(die.value) : 0});
    }
    return places;
  }
  /// As powercap calls it: with the die only where a package has several.
  static std::string package_key(const Cpu& cpu, bool dies) {
    return dies ? detail::concat({"package-", cpu.package, "-die-", cpu.die}) : detail::concat({"package-", cpu.package});
  }

  void add_cores(const Settings& settings, const std::string& directory, bool dies) {
    const auto pmu = find_pmu(directory);
    if (!pmu) return;
    for (const Cpu& cpu : places(*pmu, settings.root)) {
      const std::string package = package_key(cpu, dies);
      const detail::Reading core = detail::read_natural(detail::below(settings.root, detail::concat({"sys/devices/system/cpu/cpu", cpu.number, "/topology/core_id"})));
      if (core.error == 0 && counters_.find(package) >= 0) add(settings, *pmu, {"energy-core", Domain::cpu_core, "", -14}, cpu, detail::concat({package, "/core-", core.value}), package);
    }
  }

  void add(const Settings& settings, const Pmu& pmu, const Event& event, const Cpu& cpu, std::string key, const std::string& package) {
    const auto is_taken = [&](const std::string& k) { return std::find(settings.taken.begin(), settings.taken.end(), k) != settings.taken.end(); };
    if (refused_ || is_taken(key) || (event.kind == Domain::cpu_core && is_taken(package))) return;
    const std::string file = detail::concat({pmu.directory, "/events/", event.name});
    const detail::FileText text = detail::read_file(file);
    if (text.error == ENOENT) return;
    const detail::FileText scale_text = detail::read_file(file + ".scale"), unit = detail::read_file(file + ".unit");
    const auto config = detail::parse_perf_event(text.text);
    const auto scale = detail::parse_perf_scale(scale_text.text);
    if (!config || !scale || (unit.error == 0 && unit.text != "Joules")) {
      return counters_.warn({file, " makes no sense (event ", detail::quoted(text.text), ", scale ", detail::quoted(scale_text.text), ", unit ", detail::quoted(unit.text), "); it is left out."});
    }
    if (counters_.find(key) >= 0) return counters_.warn({file, " of cpu ", cpu.number, " would be ", key, " once more; it is left out."});

    perf_event_attr attributes{};
    attributes.size = sizeof attributes;
    attributes.type = pmu.type;
    attributes.config = *config;
    detail::FileDescriptor event_file(settings.open_fn(attributes, -1, cpu.number, -1, PERF_FLAG_FD_CLOEXEC));
    if (!event_file) {
      const int error = errno;
      refused_ = error == EACCES || error == EPERM;  // then so are all others
      return counters_.warn_unreadable(file, error, refused_ ? "no energy can be read by perf" : detail::concat({"that of cpu ", cpu.number, " is not known"}));
    }
    DomainInfo info;
    info.kind = event.kind;
    info.parent = event.kind == Domain::cpu_core ? counters_.find(package) : -1;
    info.key = std::move(key);
    info.tick = std::chrono::milliseconds(1);
    info.unit_joules = std::max(*scale, std::ldexp(1, event.unit));
    info.max_watts = event.name == std::string_view("energy-core") ? detail::plausible_core_watts : detail::plausible_watts(event.kind);
    if (counters_.add(std::move(info), detail::concat({file, " of cpu ", cpu.number}), [fd = event_file.get()] { return read_count(fd); }, 0, *scale * 1e9)) files_.push_back(std::move(event_file));
  }

  static detail::Reading read_count(int fd) {
    std::uint64_t count = 0;
    ssize_t got = ::pread(fd, &count, sizeof count, 0);
    if (got < 0 && errno == ESPIPE) got = ::read(fd, &count, sizeof count);  // perf's own files cannot be read at a place
    if (got < 0) return {0, errno};
    return got == sizeof count ? detail::Reading{count, 0} : detail::Reading{0, EBADMSG};
  }

  detail::Counters counters_;
  std::vector<detail::FileDescriptor> files_;
  bool refused_ = false;  // perf is not for us
};

}  // namespace tally::inline v0
