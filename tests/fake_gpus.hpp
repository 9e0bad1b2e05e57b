// SPDX-License-Identifier: Apache-2.0
// What the libraries that stand in for NVML and AMD SMI are told to do. They keep it in one object that they export, together with the
// time: nothing in them looks at a clock.
#pragma once

#include <cstdint>

/// Power is watts + slope * t with t in seconds of the fake's time.
struct FakeGpu {
  int handle_error = 0, uuid_error = 0, slot_error = 0, energy_error = 0, power_error = 0, field_error = 0, mig_error = 3;
  char uuid[128] = {};           // written as it is, with no end if it has none
  unsigned domain = 0, bus = 0, device = 0, function = 0;
  double watts = 100, slope = 0;
  double joules_before = 1000;   // on the counter at t = 0
  double counter_factor = 1;     // 0.57: a board whose counter is wrong
  std::int64_t step = 100'000'000;
  std::uint64_t raw_counter = 0;  // not 0: shown instead
  int value_type = 1;             // of NVML's fields
  double raw_power = 0;           // of type 0, in milliwatts
  double module_watts = 0;        // 0: no superchip
  unsigned mig = 0;
  float resolution = 15.3f;       // AMD: microjoules of a step
  int type = 1;                   // AMD: of processor

  double joules(std::int64_t now) const {
    const double t = static_cast<double>(now - now % step) * 1e-9;
    return joules_before + counter_factor * (watts * t + 0.5 * slope * t * t);
  }
};

struct FakeGpus {
  std::int64_t now = 0, latency = 0;  // a reading of the counter takes that long
  int init_error = 0, count_error = 0;
  int initialised = 0;                // inits less shutdowns
  unsigned count = 1;                 // NVML: boards, AMD: sockets
  unsigned claimed = 0;               // not 0: told instead
  unsigned per_socket = 1;            // AMD
  FakeGpu gpus[4];
};
