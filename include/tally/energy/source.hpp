// SPDX-License-Identifier: Apache-2.0
// Where a ledger gets its joules from: it tells what its thread did, and is told later, window by window, what that was charged.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../types.hpp"
#include "activity.hpp"
#include "meter.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// One physical domain of this rank's host as its meter saw it while the account was kept. Ranks of one host tell the same, so
/// domains are told apart by (host, key) and counted once. total == operations + application + unattributed, exactly.
struct DomainAccount {
  Domain kind = Domain::node;
  std::string key, source;
  int parent = -1;  // index into the same list: part of that domain, so not to be added to it
  Nanojoules total = 0;
  Nanojoules operations = 0;    // of all ranks, communicators and jobs on this host that use the hub
  Nanojoules application = 0;   // of the same processes, outside of operations
  Nanojoules unattributed = 0;  // the rest: other processes, and the machine's floor that is nobody's
  double watts_floor = 0;       // 0: not calibrated
  Provenance provenance = Provenance::none;
  Caveats caveats = 0;
};

/// The average power of a domain over one of the hub's windows.
struct PowerSample {
  std::uint16_t domain = 0;  // index into Account::domains
  nanoseconds begin{}, end{};
  double watts = 0;
};

/// What the figures of one kind are worth.
struct EnergyKind {
  Provenance provenance = Provenance::none;
  Split split = Split::direct;
  Caveats caveats = 0;
  double relative_sigma = 0;  // of the meters and of the division
  double quantisation = 0;    // standard error of a window's joules; it does not accumulate over windows
  double window_joules = 0;   // of the last window
  Nanojoules total = 0;       // of the host, since the hub began
};

/// All that was charged up to the last window that is closed.
struct EnergyReading {
  std::uint64_t windows = 0;
  nanoseconds time{};  // of that window's end, of CLOCK_MONOTONIC
  Charges charges{};
  std::array<EnergyKind, power_kinds> kinds{};
  bool device_alone = false;  // what is charged is a device's, and there is nothing else
};

/// What is told of the host as a whole.
struct HostEnergy {
  std::vector<DomainAccount> domains;
  std::vector<PowerSample> power;
  double coverage = std::numeric_limits<double>::quiet_NaN();  // our CPU time / the host's CPU time
  double residual = std::numeric_limits<double>::quiet_NaN();  // 1 - predicted/measured joules of the last window
  std::vector<std::string> warnings;
};

class EnergySource {
 public:
  virtual ~EnergySource() = default;
  /// What the thread has done since it began. Stores to memory, no more.
  virtual void publish(const ActivityTimes& so_far) noexcept = 0;
  /// Windows closed so far: a look at memory.
  virtual std::uint64_t windows() const noexcept = 0;
  /// False where there is no meter, or none yet.
  virtual bool read(EnergyReading& reading) const = 0;
  virtual HostEnergy host() const = 0;
};

/// Makes one for each ledger. Empty: there is no meter, and joules come from the model.
using EnergySources = std::function<std::unique_ptr<EnergySource>()>;

/// What a joule of some time is in carbon.
struct CarbonFigure {
  Quantity grams_per_joule;  // CO2-equivalent, with all that the building adds; unknown where the intensity is
  Quantity grams_per_kwh;    // the grid's, the latest of that time
  std::string source;        // zone, signal, factor and where it comes from
  double pue = 1;
  Caveats caveats = 0;
};
/// For joules drawn in [begin, end) of CLOCK_MONOTONIC. Throws nothing. Empty: grams are unknown.
using CarbonRate = std::function<CarbonFigure(nanoseconds begin, nanoseconds end)>;

}  // namespace tally::inline v0
