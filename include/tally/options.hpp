// SPDX-License-Identifier: Apache-2.0
// Everything that can be set about a communicator, from arguments or, once at init, from the environment.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <initializer_list>
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
  std::string transport;  // empty: whatever fits; a network's name: that one, also between ranks that share memory
  std::string network;    // between hosts: "tcp", "ucx", "mpi", "verbs"; empty: tcp

  /// `defaults`, changed by what the environment says: TALLY_TIMEOUT (seconds), TALLY_ACCOUNTING (on, off),
  /// TALLY_METER (auto: meters, else the model; model; none), TALLY_MODEL_BUSY_WATTS, TALLY_MODEL_IDLE_WATTS (per core), TALLY_ALGORITHM, TALLY_ORDER (any, fixed), TALLY_WAIT (latency, balanced, energy), TALLY_OBJECTIVE (time, energy, energy_delay), TALLY_MODEL (a file),
  /// TALLY_GROUP (ranks), TALLY_TRANSPORT (shm, thread, tcp, ucx, mpi, verbs), TALLY_NETWORK (tcp, ucx, mpi, verbs), TALLY_SLOTS, TALLY_SLOT_BYTES, TALLY_SLOT_BUDGET (bytes).
  [[gnu::cold]] static Options from_environment(Options defaults) {
    using detail::environment, detail::environment_number;
    Options o = std::move(defaults);
    if (const auto s = environment_number<double>("TALLY_TIMEOUT", 1e-6, 1e9)) o.timeout = nanoseconds(static_cast<std::int64_t>(*s * 1e9));
    if (const auto i = one_of("TALLY_ACCOUNTING", {"off", "on"})) o.accounting = *i == 1;
    if (const auto i = one_of("TALLY_METER", {"auto", "model", "none"})) {
      o.meter.enabled = *i != 2;
      if (*i != 0) o.meters = nullptr;
    }
    if (const auto w = environment_number<double>("TALLY_MODEL_BUSY_WATTS", 0, 1e6)) o.meter.busy_watts = *w;
    if (const auto w = environment_number<double>("TALLY_MODEL_IDLE_WATTS", 0, 1e6)) o.meter.idle_watts = *w;
    if (const auto i = one_of("TALLY_WAIT", {"latency", "balanced", "energy"})) o.wait = std::array{WaitPolicy::latency, WaitPolicy::balanced, WaitPolicy::energy}[*i];
    if (const auto i = one_of("TALLY_OBJECTIVE", {"time", "energy", "energy_delay"})) o.objective = std::array{Objective::time, Objective::energy, Objective::energy_delay}[*i];
    if (const auto v = environment("TALLY_ALGORITHM")) o.algorithms = AlgorithmOverrides(*v);
    if (const auto i = one_of("TALLY_ORDER", {"any", "fixed"})) o.order = *i == 1 ? Order::fixed : Order::any;
    if (const auto v = environment("TALLY_MODEL")) o.model = *v;
    if (const auto n = environment_number<int>("TALLY_GROUP", 0, 1 << 15)) o.group = *n;
    if (one_of("TALLY_TRANSPORT", {"shm", "thread", "tcp", "ucx", "mpi", "verbs"})) o.transport = *environment("TALLY_TRANSPORT");
    if (one_of("TALLY_NETWORK", {"tcp", "ucx", "mpi", "verbs"})) o.network = *environment("TALLY_NETWORK");
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

  bool is_flat() const { return !transport.empty() && transport != "shm" && transport != "thread"; }
  /// What moves bytes between hosts.
  std::string_view network_name() const { return is_flat() ? transport : network.empty() ? std::string_view("tcp") : network; }
  /// The transport that connects these ranks, or an error if another one was asked for.
  void expect_transport(std::string_view possible, std::string_view ranks) const {
    if (transport.empty() || transport == possible) return;
    throw Error(Errc::invalid_argument, {"transport '", transport, "' does not connect ranks that are ", ranks, "; '", possible, "' does"});
  }

 private:
  /// Which of `words` the variable holds, if it is set.
  [[gnu::noinline]] static std::optional<std::size_t> one_of(const char* name, std::initializer_list<std::string_view> words) {
    const auto value = detail::environment(name);
    if (!value) return std::nullopt;
    const auto found = std::find(words.begin(), words.end(), *value);
    if (found != words.end()) return static_cast<std::size_t>(found - words.begin());
    std::string all;
    for (auto word = words.begin(); word != words.end(); ++word) all += detail::concat({word == words.begin() ? "" : word + 1 == words.end() ? " or " : ", ", *word});
    throw Error(Errc::invalid_argument, {name, "='", *value, "' is unknown; it may be ", all});
  }
};

}  // namespace tally::inline v0
