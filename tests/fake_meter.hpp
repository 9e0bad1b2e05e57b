// SPDX-License-Identifier: Apache-2.0
// A meter whose joules the test decides, and a system in virtual time for the hub to run in.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <tally/energy/hub.hpp>

/// Domains whose totals are functions of time; everything is shared with the test.
struct FakeMeter {
  struct World {
    std::vector<tally::DomainInfo> infos;
    std::vector<tally::Nanojoules> totals;
    std::vector<tally::Caveats> caveats;
    std::vector<std::string> warnings;
    bool dead = false;
  };
  std::shared_ptr<World> world = std::make_shared<World>();

  std::size_t add(tally::Domain kind, std::string key, int parent = -1, tally::Caveats caveats = 0) {
    tally::DomainInfo info;
    info.kind = kind;
    info.key = std::move(key);
    info.source = "fake";
    info.parent = parent;
    info.tick = std::chrono::milliseconds(1);
    info.accuracy = 0;
    info.caveats = caveats;
    world->infos.push_back(info);
    world->totals.push_back(0);
    world->caveats.push_back(0);
    return world->infos.size() - 1;
  }
  std::span<const tally::DomainInfo> domains() const { return world->infos; }
  tally::SampleResult sample(std::span<tally::MeterSample> out) noexcept {
    if (world->dead) return {0, std::errc::no_such_device};
    for (std::size_t i = 0; i < world->totals.size(); ++i) out[i] = {static_cast<std::uint16_t>(i), {}, world->totals[i], world->caveats[i]};
    return {world->totals.size(), {}};
  }
  std::vector<std::string> warnings() const { return world->warnings; }
};

/// 100 W, since it was made.
struct TimedMeter {
  std::vector<tally::DomainInfo> infos{{tally::Domain::cpu_package, -1, "package-0", "timed", std::chrono::milliseconds(1), 1e-9, 0, 1000, 0, 0}};
  tally::nanoseconds begin = tally::monotonic_time();
  std::span<const tally::DomainInfo> domains() const { return infos; }
  tally::SampleResult sample(std::span<tally::MeterSample> out) noexcept {
    const tally::nanoseconds now = tally::monotonic_time();
    out[0] = {0, now, static_cast<tally::Nanojoules>((now - begin).count()) * 100, 0};
    return {1, {}};
  }
};

/// A source of joules whose windows the test closes.
struct Script {
  tally::ActivityTimes published;
  tally::EnergyReading reading;
  bool there = true;
};
struct ScriptedSource final : tally::EnergySource {
  explicit ScriptedSource(std::shared_ptr<Script> s) : script(std::move(s)) {}
  void publish(const tally::ActivityTimes& so_far) noexcept override { script->published = so_far; }
  std::uint64_t windows() const noexcept override { return script->reading.windows; }
  bool read(tally::EnergyReading& reading) const override {
    if (script->there) reading = script->reading;
    return script->there;
  }
  tally::HostEnergy host() const override { return {}; }
  std::shared_ptr<Script> script;
};

/// What HubSystem asks, in the test's hands.
struct FakeSystem {
  struct World {
    tally::nanoseconds now{}, host{};
    std::map<pid_t, tally::nanoseconds> processes;
  };
  std::shared_ptr<World> world = std::make_shared<World>();

  tally::HubSystem system(int cores) const {
    tally::HubSystem system;
    system.now = [w = world] { return w->now; };
    system.process_time = [w = world](pid_t pid) { return w->processes[pid]; };
    system.host_time = [w = world] { return w->host; };
    system.cores = cores;
    return system;
  }
};
