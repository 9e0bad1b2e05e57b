// SPDX-License-Identifier: Apache-2.0
// Finds the meters of this host: each thing measured once, by the best meter that may read it, and, where there is none, why.
#pragma once

#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "../text.hpp"
#include "amdsmi.hpp"
#include "host_files.hpp"
#include "hwmon.hpp"
#include "meter.hpp"
#include "nvml.hpp"
#include "perf.hpp"
#include "powercap.hpp"

namespace tally::inline v0 {

struct FindMeters {
  std::string root = {};  // below it are sys, proc and dev; "" and "/": the host itself
  MeterClock clock = monotonic_time;
  PerfOpen open_fn = open_perf_event;
  bool cores = false;  // also the counter of each core, where there is one. Each reading wakes that core
  NvmlOptions nvml = {};      // used where the driver's device is there
  AmdSmiOptions amdsmi = {};  // likewise
};

struct FoundMeters {
  std::vector<AnyMeter> meters;       // each has at least one domain; no key is there twice
  std::vector<std::string> warnings;  // of when they were made; what goes wrong later is in each meter's own

  /// Keeps the meter if it measures anything. Returns the keys of what it does.
  template <EnergyMeter M>
  std::vector<std::string> add(M meter) {
    for (const std::string& text : meter.warnings()) warnings.push_back(text);
    std::vector<std::string> keys;
    for (const DomainInfo& domain : meter.domains()) keys.push_back(domain.key);
    if (!keys.empty()) meters.emplace_back(std::move(meter));
    return keys;
  }
};

/// All meters that work on this host. perf goes before powercap, because the kernel unwraps its counters, and both before hwmon. In
/// a virtual machine a counter may be there and never move: it has no readings until it does.
inline FoundMeters find_meters(const FindMeters& how = {}) {
  FoundMeters found;
  std::vector<std::string> taken;
  const auto add = [&](auto meter) {
    for (std::string& key : found.add(std::move(meter))) taken.push_back(std::move(key));
  };
  add(PerfEnergy({how.root, how.open_fn, how.clock, how.cores, taken}));
  add(Powercap({how.root, how.clock, taken}));
  add(Hwmon({how.root, how.clock, how.cores, taken}));
  const bool guest = has(detail::host_caveats(how.root), Caveat::virtualised);
  if (found.meters.empty()) {
    const std::string reason = !found.warnings.empty() ? "none of those that this host has may be used (see the other warnings)"
                               : detail::concat({"this ", guest ? "virtual machine" : "host", " has no event of PMU power, no zone in /sys/class/powercap and no sensor of energy or power in /sys/class/hwmon"});
    found.warnings.insert(found.warnings.begin(), detail::concat({"no energy counter can be read: ", reason, ", so joules will come from the model."}));
  } else if (guest) {
    found.warnings.push_back("this is a virtual machine: its energy counters are its host's model of its share. One that never moves is no meter; joules then come from watts that are assumed (TALLY_MODEL_BUSY_WATTS, TALLY_MODEL_IDLE_WATTS). To measure, run where RAPL can be read.");
  }
  // Their keys ("gpu-...") are never those of processors.
  if (::access((how.root + "/dev/nvidiactl").c_str(), F_OK) == 0) found.add(Nvml(how.nvml));
  if (::access((how.root + "/dev/kfd").c_str(), F_OK) == 0) found.add(AmdSmi(how.amdsmi));
  return found;
}

}  // namespace tally::inline v0
