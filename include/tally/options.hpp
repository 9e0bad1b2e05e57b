// SPDX-License-Identifier: Apache-2.0
// Everything that can be set about a communicator, from arguments or, once at init, from the environment.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "account/observer.hpp"
#include "account/settings.hpp"
#include "choose.hpp"
#include "energy/activity.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "objective.hpp"
#include "transport/slots.hpp"

namespace tally::inline v0 {

struct Options {
  nanoseconds timeout = std::chrono::seconds(60);  // deadline of every call that names none
  bool accounting = true;
  std::optional<WaitPolicy> wait = {};  // none: balanced, or energy where that is the objective
  Objective objective = Objective::time;  // by which algorithms are chosen; rank 0's counts
  Weights weights = Weights::equal_time();  // by which joules are predicted for that: host_weights() of tally/energy.hpp
  ModelMeter meter;         // joules where there is no other meter
  EnergySources meters;     // host_meters() of tally/energy.hpp; empty: none
  CarbonRate carbon;        // carbon_rate() of tally/energy/carbon_rate.hpp; empty: grams are unknown
  OnSlack on_slack;         // called before a wait that is going to be long
  std::shared_ptr<Observer> observer;  // hears of each operation; see account/observer.hpp
  SlotOptions slots;
  AlgorithmOverrides algorithms;
  std::string model;      // measurements to choose algorithms by, written by tally_perf --tune; rank 0's counts
  Order order = Order::any;  // of calls that name none
  int group = 0;          // ranks that follow each other and share a cache or a socket; 0: look; rank 0's counts
  std::string transport;  // empty: whatever fits

  /// `defaults`, changed by what the environment says: TALLY_TIMEOUT (seconds), TALLY_ACCOUNTING (on, off),
  /// TALLY_METER (auto: meters, else the model; model; none), TALLY_MODEL_BUSY_WATTS, TALLY_MODEL_IDLE_WATTS (per core), TALLY_ALGORITHM, TALLY_ORDER (any, fixed), TALLY_WAIT (latency, balanced, energy), TALLY_OBJECTIVE (time, energy, energy_delay), TALLY_MODEL (a file),
  /// TALLY_GROUP (ranks), TALLY_TRANSPORT (shm, thread, tcp), TALLY_SLOTS, TALLY_SLOT_BYTES, TALLY_SLOT_BUDGET (bytes).
  static Options from_environment(Options defaults) {
    using detail::environment, detail::environment_number;
    Options o = std::move(defaults);
    if (const auto s = environment_number<double>("TALLY_TIMEOUT", 1e-6, 1e9)) o.timeout = nanoseconds(static_cast<std::int64_t>(*s * 1e9));
    if (const auto v = environment("TALLY_ACCOUNTING")) o.accounting = one_of("TALLY_ACCOUNTING", *v, "off", "on");
    if (const auto v = environment("TALLY_METER")) {
      if (*v != "auto" && *v != "model" && *v != "none") throw Error(Errc::invalid_argument, {"TALLY_METER='", *v, "' is unknown; it may be auto, model or none"});
      o.meter.enabled = *v != "none";
      if (*v != "auto") o.meters = nullptr;
    }
    if (const auto w = environment_number<double>("TALLY_MODEL_BUSY_WATTS", 0, 1e6)) o.meter.busy_watts = *w;
    if (const auto w = environment_number<double>("TALLY_MODEL_IDLE_WATTS", 0, 1e6)) o.meter.idle_watts = *w;
    if (const auto v = environment("TALLY_WAIT")) {
      if (*v == "latency") o.wait = WaitPolicy::latency;
      else if (*v == "balanced") o.wait = WaitPolicy::balanced;
      else if (*v == "energy") o.wait = WaitPolicy::energy;
      else throw Error(Errc::invalid_argument, {"TALLY_WAIT='", *v, "' is unknown; it may be latency, balanced or energy"});
    }
    if (const auto v = environment("TALLY_OBJECTIVE")) {
      if (*v == "time") o.objective = Objective::time;
      else if (*v == "energy") o.objective = Objective::energy;
      else if (*v == "energy_delay") o.objective = Objective::energy_delay;
      else throw Error(Errc::invalid_argument, {"TALLY_OBJECTIVE='", *v, "' is unknown; it may be time, energy or energy_delay"});
    }
    if (const auto v = environment("TALLY_ALGORITHM")) o.algorithms = AlgorithmOverrides(*v);
    if (const auto v = environment("TALLY_ORDER")) o.order = one_of("TALLY_ORDER", *v, "any", "fixed") ? Order::fixed : Order::any;
    if (const auto v = environment("TALLY_MODEL")) o.model = *v;
    if (const auto n = environment_number<int>("TALLY_GROUP", 0, 1 << 15)) o.group = *n;
    if (const auto v = environment("TALLY_TRANSPORT")) {
      if (*v != "shm" && *v != "thread" && *v != "tcp") throw Error(Errc::invalid_argument, {"TALLY_TRANSPORT='", *v, "' is unknown; it may be shm, thread or tcp"});
      o.transport = *v;
    }
    if (const auto n = environment_number<int>("TALLY_SLOTS", 1, 4096)) o.slots.slots = *n;
    if (const auto n = environment_number<std::size_t>("TALLY_SLOT_BYTES", 128, std::size_t{1} << 30)) o.slots.slot_bytes = *n;
    if (const auto n = environment_number<std::size_t>("TALLY_SLOT_BUDGET", 4096, std::size_t{1} << 40)) o.slots.budget = *n;
    if (o.timeout <= nanoseconds{0}) throw Error(Errc::invalid_argument, {"a timeout must be longer than 0, not ", o.timeout.count(), " ns"});
    o.timeout = std::min(o.timeout, longest_timeout);
    if (!(o.meter.busy_watts >= 0) || !(o.meter.idle_watts >= 0)) throw Error(Errc::invalid_argument, "watts must not be negative");
    return o;
  }
  static Options from_environment() { return from_environment(Options{}); }

  WaitPolicy wait_policy() const { return wait.value_or(objective == Objective::energy ? WaitPolicy::energy : WaitPolicy::balanced); }

  /// The transport that connects these ranks, or an error if another one was asked for.
  void expect_transport(std::string_view possible, std::string_view ranks) const {
    if (transport.empty() || transport == possible) return;
    throw Error(Errc::invalid_argument, {"transport '", transport, "' does not connect ranks that are ", ranks, "; '", possible, "' does"});
  }

 private:
  static bool one_of(const char* name, std::string_view value, std::string_view no, std::string_view yes) {
    if (value == yes) return true;
    if (value == no) return false;
    throw Error(Errc::invalid_argument, {name, "='", value, "' is unknown; it may be ", no, " or ", yes});
  }
};

}  // namespace tally::inline v0
