// SPDX-License-Identifier: Apache-2.0
// Calibration on a machine that exists in virtual time, whose watts are therefore known, with meters that are as bad as meters are;
// and the threads that make the load on this one.
#include <catch2/catch.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <tally/energy/calibration.hpp>
#include <tally/energy/core_loads.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

/// A machine in virtual time: what it draws depends on what its cores are made to do, and its meters show it tick by tick.
struct Machine final : LoadGenerator {
  struct Package {
    double part = 1;         // of all watts
    nanoseconds tick = 1ms;  // between what shows
    nanoseconds phase{};
    DomainInfo info{Domain::cpu_package, -1, "package-0", "fake", 1ms, 61e-6, 0, 500, 0.05, 0};
    double unit = 1e-9;      // joules of what shows
    double joules = 0;
    Nanojoules shown = 0;
    Caveats caveats = 0;
    bool stuck = false, silent = false;
  };
  std::array<double, load_count> watts = {30, 3, 2, 1, 4, 6};  // idle: the floor
  std::vector<Package> packages{Package{}};
  nanoseconds now = 1h, started{};
  Load load = Load::idle;
  int busy_cores = 0, all_cores = 8, starts = 0, stops = 0;
  bool dozes = true;
  double got = 1;     // of each core that is asked for
  double drift = 0;   // watts more per hour
  std::function<void()> meanwhile;

  int cores() const override { return all_cores; }
  bool can(Load l) const override { return dozes || l != Load::doze; }
  void start(Load l, int cores) override { load = l, busy_cores = cores, started = now, ++starts; }
  void stop() override { load = Load::idle, busy_cores = 0, ++stops; }
  nanoseconds busy() override { return nanoseconds(std::llround(got * busy_cores * static_cast<double>((now - started).count()))); }
  double power() const { return watts[0] + (load == Load::idle ? 0 : got * busy_cores * watts[static_cast<std::size_t>(load)]) + drift * std::chrono::duration<double, std::ratio<3600>>(now - 1h).count(); }
  void rest(nanoseconds time) override {
    if (meanwhile) meanwhile();
    const double drawn = power();
    for (Package& p : packages) {
      // Steps of the counter at phase + k * tick, the last of which shows.
      const nanoseconds since = (now + time - p.phase) % p.tick;
      if (since < time && !p.stuck) p.shown = static_cast<Nanojoules>(std::floor((p.joules + p.part * drawn * static_cast<double>((time - since).count()) * 1e-9) / p.unit) * p.unit * 1e9);
      p.joules += p.part * drawn * static_cast<double>(time.count()) * 1e-9;
    }
    now += time;
  }
};

struct MachineMeter {
  Machine* machine;
  std::vector<DomainInfo> infos{};
  explicit MachineMeter(Machine& m) : machine(&m) {
    for (const auto& p : m.packages) infos.push_back(p.info);
  }
  std::span<const DomainInfo> domains() const { return infos; }
  SampleResult sample(std::span<MeterSample> out) noexcept {
    std::size_t count = 0;
    for (std::size_t i = 0; i < infos.size(); ++i) {
      const Machine::Package& p = machine->packages[i];
      if (!p.silent) out[count++] = {static_cast<std::uint16_t>(i), machine->now, p.shown, p.caveats};
    }
    return {count};
  }
};

/// What an Error says, or nothing if there is none.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}
Calibration calibrate(Machine& machine, const CalibrationOptions& options = {}) {
  std::vector<AnyMeter> meters;
  meters.emplace_back(MachineMeter(machine));
  ProcessorMeters processors(meters, machine);
  return tally::calibrate(processors, machine, options);
}
std::string failure_of(Machine machine) {
  const std::string error = error_of([&] { calibrate(machine); });
  CHECK(machine.stops == machine.starts);  // whatever happens, the cores are left alone
  return error;
}
void check_planted(const Calibration& c, const Machine& machine) {
  for (std::size_t i = 0; i < load_count; ++i)
    if (c.known[i]) CHECK(c.watts[i] == Approx(machine.watts[i]).epsilon(1e-7));
  CHECK(c.r2 == Approx(1));
  CHECK(c.weights.floor_watts == Approx(machine.watts[0]).epsilon(1e-7));
  CHECK(c.weights.floor_sigma < 1e-4);
  CHECK(machine.stops == machine.starts);
}

}  // namespace

TEST_CASE("calibration recovers planted watts exactly") {
  Machine machine;
  std::size_t told = 0;
  const Calibration c = calibrate(machine, {0ns, 0, [&](const CalibrationStep&, std::size_t done, std::size_t all) {
                                              CHECK(done == told++);
                                              CHECK(all == 43);
                                            }});
  check_planted(c, machine);
  CHECK(told == 43);  // twice idle and five loads on 1, 2, 4 and 8 cores, and idle
  CHECK(c.measurements.size() == 43);
  for (const auto& m : c.measurements) CHECK(m.seconds == Approx(0.251));  // 250 ticks, from one step of the counter to another
  const Weights& w = c.weights;
  CHECK(w.split == Split::calibrated_weights);
  CHECK(w.of(Activity::copy) == Approx(4));
  CHECK(w.of(Activity::reduce) == Approx(6));
  CHECK(w.of(Activity::codec) == Approx(6));
  CHECK(w.of(Activity::protocol) == Approx(3));
  CHECK(w.of(Activity::spin) == Approx(3));
  CHECK(w.of(Activity::doze) == Approx(1));
  CHECK(w.of(Activity::sleep) == 0);
  CHECK(w.application == Approx((3.0 + 4 + 6) / 3));
  CHECK(w.relative_sigma == Approx((6 - 2) / std::sqrt(12.0) / (13.0 / 3)));
}

TEST_CASE("calibration uses the cores and the time it may, and what the processor can") {
  Machine machine;
  machine.dozes = false;
  machine.all_cores = 6;
  const Calibration c = calibrate(machine, {2s, 3, {}});
  check_planted(c, machine);
  CHECK(c.measurements.size() == 2 * (1 + 4 * 3) + 1);  // 1, 2 and 3 cores
  CHECK(c.measurements[1].seconds == Approx(2.001));
  CHECK_FALSE(c.known[static_cast<std::size_t>(Load::doze)]);
  CHECK(c.weights.of(Activity::spin) == Approx(2));  // that is how it waits there
  CHECK(c.weights.of(Activity::doze) == Approx(2));
  CHECK(c.weights.of(Activity::protocol) == Approx(3));

  Machine one;
  one.all_cores = 1;
  check_planted(calibrate(one), one);
}

TEST_CASE("calibration adds up packages whose counters move out of step, and charges cores for what they got") {
  Machine machine;
  machine.got = 0.6;  // others want the cores, too
  machine.packages.resize(2);
  machine.packages[0].part = 0.6;
  machine.packages[1].part = 0.4;
  machine.packages[1].phase = 377us;
  machine.packages[1].tick = machine.packages[1].info.tick = 2ms;
  machine.packages[1].info.key = "package-1";
  const Calibration c = calibrate(machine);
  check_planted(c, machine);
  CHECK(c.measurements[1].busy_cores == Approx(0.6));
}

TEST_CASE("calibration measures each processor once") {
  const auto with = [](Domain kind, int parent, const char* key) {
    Machine::Package p;
    p.info.kind = kind, p.info.parent = parent, p.info.key = key;
    return p;
  };
  Machine nested;  // all of these show all watts
  nested.packages = {with(Domain::psys, -1, "psys"), with(Domain::cpu_package, 0, "package-0"), with(Domain::cpu_core, 1, "core"), with(Domain::dram, -1, "dram"), with(Domain::cpu_package, 1, "die"), with(Domain::gpu_board, -1, "gpu")};
  check_planted(calibrate(nested), nested);

  Machine whole;
  whole.packages = {with(Domain::node, -1, "node"), with(Domain::psys, -1, "psys")};
  check_planted(calibrate(whole), whole);

  Machine twice;
  std::vector<AnyMeter> meters;
  meters.emplace_back(MachineMeter(twice));
  meters.emplace_back(MachineMeter(twice));
  ProcessorMeters processors(meters, twice);
  check_planted(tally::calibrate(processors, twice), twice);

  Machine guest;  // packages that a hypervisor only pretends to have
  guest.packages = {with(Domain::cpu_package, -1, "package-0"), with(Domain::psys, -1, "psys")};
  guest.packages[0].stuck = true;
  check_planted(calibrate(guest), guest);
}

TEST_CASE("calibration waits for a counter whose least step is a joule") {
  Machine machine;  // which makes steps of 33 ms at 30 W, with ticks of 1 ms
  machine.packages[0].info.unit_joules = 1;
  machine.packages[0].unit = 1;
  const Calibration c = calibrate(machine, {4s, 0, {}});
  CHECK(c.weights.floor_watts == Approx(30).epsilon(1e-3));
  CHECK(c.weights.of(Activity::reduce) == Approx(6).epsilon(1e-2));
}

TEST_CASE("drift shows as error") {
  Machine machine;
  machine.drift = 3600;  // a watt a second
  const Calibration c = calibrate(machine);
  CHECK(c.weights.floor_sigma > 0.3);
  CHECK(c.sigma[static_cast<std::size_t>(Load::reduce)] > 0.05);
  CHECK(std::abs(c.watts[static_cast<std::size_t>(Load::reduce)] - 6) < 3 * c.sigma[static_cast<std::size_t>(Load::reduce)]);
}

TEST_CASE("calibration fails with a reason, and leaves the cores alone") {
  const std::string none = "unsupported: no meter measures this host's processors, so there is nothing to calibrate by";
  Machine machine;
  ProcessorMeters nothing({}, machine);
  CHECK(error_of([&] { tally::calibrate(nothing, machine); }) == none);
  Machine gpu;
  gpu.packages[0].info.kind = Domain::gpu_board;
  CHECK(failure_of(gpu) == none);
  Machine slow;
  slow.packages[0].info.tick = 1h;
  CHECK(failure_of(slow) == none);
  Machine stuck;
  stuck.packages[0].stuck = true;
  CHECK(failure_of(stuck) == none + ": 'package-0' of fake stands still");
  Machine silent;
  silent.packages[0].silent = true;
  CHECK(failure_of(silent) == none + ": 'package-0' of fake has no readings");
  Machine denied;
  denied.packages[0].caveats = Caveat::wrap | Caveat::permission_denied;
  CHECK(failure_of(denied) == none + ": 'package-0' of fake cannot be used (the counter must not be read by this user)");
  Machine half;  // what one of two packages draws is not what the host draws
  half.packages.resize(2);
  half.packages[1].info.key = "package-1";
  half.packages[1].stuck = true;
  CHECK(failure_of(half) == "malformed data: the meter 'package-1' of fake stands still; nothing was calibrated");

  for (const bool vanish : {true, false}) {
    Machine later;
    later.meanwhile = [&later, vanish] {
      if (later.load == Load::reduce) vanish ? void(later.packages[0].caveats = static_cast<Caveats>(Caveat::vanished)) : void(later.packages[0].silent = true);
    };
    CHECK(error_of([&] { calibrate(later); }) == std::string("malformed data: the meter 'package-0' of fake ") + (vanish ? "cannot be used (the counter disappeared while it was in use)" : "has no readings") + "; nothing was calibrated");
    CHECK(later.stops == later.starts);
  }
  Machine falling;
  falling.meanwhile = [&falling, n = 0]() mutable {
    if (++n % 64 == 0) falling.packages[0].joules = 0;
  };
  CHECK(error_of([&] { calibrate(falling); }).find("went back") != std::string::npos);
  CHECK(falling.stops == falling.starts);

  Machine flat;  // a hypervisor's counter that does not know what its guests do
  flat.watts = {30, 0, 0, 0, 0, 0};
  CHECK(failure_of(flat).find("the meters do not tell spin from idle: a core adds 0 +- 0 mW") != std::string::npos);
  Machine noisy;
  noisy.meanwhile = [&noisy, random = std::mt19937_64(1)]() mutable { noisy.watts[0] = static_cast<double>(random() % 300); };
  CHECK(error_of([&] { calibrate(noisy); }).find("Calibrate when it is idle") != std::string::npos);
}

TEST_CASE("a meter's lasting caveats are a calibration's") {
  Machine machine;
  machine.packages[0].info.caveats = static_cast<Caveats>(Caveat::virtualised);
  machine.packages[0].caveats = static_cast<Caveats>(Caveat::wrap);
  CHECK(calibrate(machine).caveats == (Caveat::virtualised | Caveat::wrap));
}

TEST_CASE("cores are kept busy with each load until they are told to stop") {
  CoreLoads loads;
  REQUIRE(loads.cores() >= 1);
  CHECK(loads.can(Load::doze) == LineWait::available());
  for (const Load load : {Load::spin, Load::pause, Load::doze, Load::copy, Load::reduce}) {
    if (!loads.can(load)) continue;
    loads.start(load, loads.cores() + 5);  // no more than there are
    const nanoseconds before = loads.busy();
    while (loads.busy() < before + 1ms) loads.rest(100us);
    loads.stop();
    CHECK(loads.busy() == 0ns);
  }
  loads.start(Load::idle, 1);
  CHECK(loads.busy() == 0ns);
  loads.start(Load::spin, 1);
  loads.start(Load::pause, 1);  // instead
}
