// SPDX-License-Identifier: Apache-2.0
// The hub in virtual time: windows, who is charged what, and totals that agree with the meter to the nanojoule.
#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>

#include "fake_meter.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

constexpr Nanojoules joule = 1'000'000'000;

struct Bench {
  FakeMeter meter;
  FakeSystem system;
  std::unique_ptr<detail::Board> board = std::make_unique<detail::Board>();
  std::unique_ptr<EnergyHub> hub;
  HubOptions options;

  void begin(int cores, bool learn = false) {
    options.learn = learn;
    options.system = system.system(cores);
    std::vector<AnyMeter> meters;
    meters.emplace_back(meter);
    hub = std::make_unique<EnergyHub>(std::move(meters), options, *board);
  }
  detail::BoardSlot& take(std::size_t i, std::uint32_t client) {
    board->slots[i].client = client;
    return board->slots[i];
  }
  void pass(nanoseconds time) { system.world->now += time; }
  detail::BoardState state() const {
    detail::BoardState s;
    REQUIRE(board->state.read(s));
    return s;
  }
};
void spend(detail::BoardSlot& slot, Activity a, nanoseconds time) { slot.times[static_cast<std::size_t>(a)] += time.count(); }
Nanojoules charged(const detail::BoardSlot& slot, PowerKind kind) { return slot.read_charges()[static_cast<std::size_t>(kind)].total(); }
Nanojoules charged(const detail::BoardSlot& slot, PowerKind kind, Activity a) { return slot.read_charges()[static_cast<std::size_t>(kind)].net[static_cast<std::size_t>(a)]; }

}  // namespace

TEST_CASE("I8: eight ranks that share a package are charged what the meter saw, not eight times that") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(8);
  for (std::uint32_t client = 1; client <= 8; ++client) bench.hub->join(client, static_cast<pid_t>(client));
  for (std::size_t i = 0; i < 8; ++i) bench.take(i, static_cast<std::uint32_t>(i + 1));
  std::mt19937 random(5);
  for (int window = 0; window < 50; ++window) {
    bench.pass(100ms);
    for (std::size_t i = 0; i < 8; ++i) {
      const nanoseconds busy = std::chrono::microseconds(random() % 50'000), idle = std::chrono::microseconds(random() % 50'000);
      spend(bench.board->slots[i], Activity::reduce, busy);
      spend(bench.board->slots[i], Activity::spin, idle);
      bench.system.world->processes[static_cast<pid_t>(i + 1)] += 100ms;
      bench.system.world->host += 100ms;
    }
    bench.meter.world->totals[0] += 3 * joule + random() % joule;
    bench.hub->step();
    const detail::BoardState state = bench.state();
    Nanojoules all = 0;
    for (std::size_t i = 0; i < 8; ++i) all += charged(bench.board->slots[i], PowerKind::cpu);
    REQUIRE(state.domains == 1);
    REQUIRE(all == state.domain[0].operations);
    REQUIRE(state.domain[0].total == bench.meter.world->totals[0]);
    REQUIRE(state.domain[0].operations + state.domain[0].application + state.domain[0].unattributed == state.domain[0].total);
    REQUIRE(state.windows == static_cast<std::uint64_t>(window + 1));
  }
  CHECK(bench.state().coverage == Approx(1));
}

TEST_CASE("a process's time outside of operations is the application's, other processes' is nobody's") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(4);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  bench.pass(100ms);
  spend(slot, Activity::copy, 25ms);
  bench.system.world->processes[10] = 75ms;
  bench.system.world->host = 100ms;
  bench.meter.world->totals[0] = 4 * joule;
  bench.hub->step();
  const detail::BoardState state = bench.state();
  CHECK(charged(slot, PowerKind::cpu, Activity::copy) == joule);
  CHECK(state.domain[0].operations == joule);
  CHECK(state.domain[0].application == 2 * joule);
  CHECK(state.domain[0].unattributed == joule);
  CHECK(state.coverage == Approx(0.75));
  REQUIRE(state.powers == 1);
  CHECK(state.power[0].watts == Approx(40));
  CHECK(state.power[0].begin == 0);
  CHECK(state.power[0].end == 100'000'000);
  CHECK(state.kinds[0].provenance == Provenance::prorated);
  CHECK(state.kinds[0].split == Split::equal_time);
}

TEST_CASE("domains that contain each other are charged once: packages count, cores and psys are only told") {
  Bench bench;
  bench.meter.add(Domain::psys, "psys");
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.meter.add(Domain::cpu_core, "package-0/core", 1);
  bench.meter.add(Domain::dram, "package-0/dram", 1);
  bench.meter.add(Domain::cpu_package, "package-0");  // another meter's reading of the same
  bench.begin(1);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  bench.pass(100ms);
  spend(slot, Activity::spin, 100ms);
  bench.system.world->processes[10] = bench.system.world->host = 100ms;
  bench.meter.world->totals = {9 * joule, 5 * joule, 3 * joule, 2 * joule, 5 * joule};
  bench.hub->step();
  CHECK(charged(slot, PowerKind::cpu) == 5 * joule);
  CHECK(charged(slot, PowerKind::dram) == 2 * joule);
  CHECK(bench.state().domain[2].parent == 1);
  CHECK(detail::text_of(bench.state().warnings).find("counts once") != std::string_view::npos);
}

TEST_CASE("without packages the node's meter counts, and a guest's counter makes figures modelled") {
  Bench bench;
  bench.meter.add(Domain::node, "node", -1, static_cast<Caveats>(Caveat::virtualised));
  bench.begin(1);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  bench.pass(100ms);
  spend(slot, Activity::spin, 100ms);
  bench.system.world->processes[10] = bench.system.world->host = 100ms;
  bench.meter.world->totals = {7 * joule};
  bench.hub->step();
  CHECK(charged(slot, PowerKind::cpu) == 7 * joule);
  CHECK(bench.state().kinds[0].provenance == Provenance::modelled);
  CHECK(bench.state().kinds[1].provenance == Provenance::none);  // no memory meter
}

TEST_CASE("a device is divided by the time that its ranks are in operations, asleep or not, and outside of them") {
  Bench bench;
  bench.meter.add(Domain::gpu_board, "gpu-a");
  bench.meter.add(Domain::gpu_board, "gpu-b");
  bench.meter.world->infos[0].tick = bench.meter.world->infos[1].tick = 100ms;  // so windows of a second
  bench.begin(2);
  bench.hub->join(1, 10);
  detail::BoardSlot& first = bench.take(0, 1);
  detail::BoardSlot& second = bench.take(1, 1);
  detail::BoardSlot& none = bench.take(2, 1);
  first.device = 1;
  second.device = 1;
  for (int i = 0; i < 10; ++i) {
    bench.pass(100ms);
    spend(first, Activity::sleep, 50ms);
    spend(second, Activity::reduce, 25ms);
    spend(none, Activity::spin, 100ms);
    if (i == 8) CHECK(bench.state().domain[0].total == 0);
    if (i == 9) bench.meter.world->totals = {40 * joule, 3 * joule};
    bench.hub->step();
  }
  // 500 and 250 ms of operations, 500 and 750 outside of them
  CHECK(charged(first, PowerKind::gpu, Activity::sleep) == 10 * joule);
  CHECK(charged(second, PowerKind::gpu, Activity::reduce) == 5 * joule);
  CHECK(charged(none, PowerKind::gpu) == 0);
  const detail::BoardState state = bench.state();
  CHECK(state.domain[0].application == 25 * joule);
  CHECK(state.domain[0].unattributed == 0);
  CHECK(state.domain[1].unattributed == 3 * joule);
}

TEST_CASE("times that are a device's own are charged nothing of the processors'") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.meter.add(Domain::gpu_board, "gpu-a");
  bench.begin(1);
  bench.hub->join(1, 10);
  detail::BoardSlot& thread = bench.take(0, 1);
  detail::BoardSlot& kernels = bench.take(1, 1);
  kernels.device = 2;
  kernels.of_device = 1;
  bench.pass(100ms);
  spend(thread, Activity::copy, 100ms);
  spend(kernels, Activity::reduce, 40ms);
  spend(kernels, Activity::spin, 40ms);
  bench.system.world->processes[10] = bench.system.world->host = 100ms;
  bench.meter.world->totals = {6 * joule, 10 * joule};
  bench.hub->step();
  CHECK(charged(thread, PowerKind::cpu) == 6 * joule);
  CHECK(charged(kernels, PowerKind::cpu) == 0);
  CHECK(charged(kernels, PowerKind::gpu, Activity::reduce) == 4 * joule);
  CHECK(charged(kernels, PowerKind::gpu, Activity::spin) == 4 * joule);
  CHECK(bench.state().domain[1].application == 2 * joule);
}

TEST_CASE("no thread is charged for more time than has passed, whatever it publishes") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(2);
  bench.hub->join(1, 10);
  bench.hub->join(2, 20);
  detail::BoardSlot& honest = bench.take(0, 1);
  detail::BoardSlot& liar = bench.take(1, 2);
  bench.take(2, 77);  // of no client
  bench.board->slots[2].times[0] = -5;
  bench.pass(100ms);
  spend(honest, Activity::copy, 100ms);
  liar.times[0] = std::int64_t{1} << 62;
  bench.system.world->processes = {{10, 100ms}, {20, 100ms}};
  bench.system.world->host = 200ms;
  bench.meter.world->totals[0] = 2 * joule;
  bench.hub->step();
  CHECK(charged(honest, PowerKind::cpu) == joule);
  CHECK(charged(liar, PowerKind::cpu) <= joule);
  CHECK(charged(liar, PowerKind::cpu) >= joule - 10);
  // An operation longer than a window that was published late is charged in the windows that follow.
  bench.pass(100ms);
  bench.meter.world->totals[0] = 4 * joule;
  spend(honest, Activity::copy, 100ms);
  bench.hub->step();
  CHECK(charged(honest, PowerKind::cpu) == 2 * joule);
}

TEST_CASE("who leaves is charged for the last window and makes room; who dies, too") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(2);
  bench.hub->join(1, 10);
  bench.hub->join(2, 20);
  detail::BoardSlot& leaving = bench.take(0, 1);
  detail::BoardSlot& dying = bench.take(1, 2);
  bench.pass(100ms);
  spend(leaving, Activity::copy, 50ms);
  spend(dying, Activity::copy, 50ms);
  bench.system.world->processes = {{10, 50ms}, {20, 50ms}};
  bench.system.world->host = 100ms;
  leaving.leaving = 1;
  bench.hub->leave(2);
  bench.meter.world->totals[0] = 2 * joule;
  bench.hub->step();
  CHECK(bench.state().domain[0].operations == 2 * joule);
  CHECK(leaving.client == 0u);
  CHECK(dying.client == 0u);
  CHECK(leaving.times[0] == 0);
  // The next owner begins at nothing.
  detail::BoardSlot& next = bench.take(0, 1);
  bench.pass(100ms);
  spend(next, Activity::copy, 100ms);
  bench.meter.world->totals[0] = 3 * joule;
  bench.system.world->processes[10] += 100ms;
  bench.system.world->host += 100ms;
  bench.hub->step();
  CHECK(charged(next, PowerKind::cpu) == joule);
}

TEST_CASE("I11: a meter that stops being readable leaves totals as they are, and says so: they are modelled from then on") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.meter.world->warnings = {"cannot read x: permission denied"};
  bench.begin(2);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  for (int i = 0; i < 4; ++i) {
    bench.pass(100ms);
    spend(slot, Activity::copy, 100ms);
    bench.system.world->processes[10] += 100ms;
    bench.system.world->host += 100ms;
    if (i == 1) bench.meter.world->totals[0] = joule;
    if (i == 2) bench.meter.world->dead = true;
    if (i == 3) bench.meter.world->dead = false, bench.meter.world->totals[0] = 1;  // it falls
    bench.hub->step();
    CHECK(bench.state().domain[0].total == (i == 0 ? 0 : joule));
    CHECK(bench.state().kinds[0].provenance == (i < 2 ? Provenance::prorated : Provenance::modelled));
    CHECK(bench.state().domain[0].provenance == bench.state().kinds[0].provenance);
  }
  CHECK(charged(slot, PowerKind::cpu) == joule);
  CHECK(has(bench.state().kinds[0].caveats, Caveat::unreadable));
  CHECK(detail::text_of(bench.state().warnings) == "cannot read x: permission denied\n");
}

TEST_CASE("a meter that has not been read yet draws unknown power, not none") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.meter.world->dead = true;
  bench.begin(1);
  const auto window = [&] {
    bench.pass(100ms);
    bench.hub->step();
  };
  window();
  CHECK(bench.state().windows == 1);
  CHECK(bench.state().domain[0].provenance == Provenance::none);
  CHECK(bench.state().powers == 0);
  bench.meter.world->dead = false;
  window();
  bench.meter.world->totals[0] = joule;
  window();
  CHECK(bench.state().domain[0].provenance == Provenance::modelled);  // what it missed is unknown
  REQUIRE(bench.state().powers == 2);
  CHECK(bench.state().power[0].watts == 0);  // this was read
  CHECK(bench.state().power[1].watts == 10);
}

TEST_CASE("I11: a meter that may not be read any longer, or is gone, makes figures modelled, too") {
  for (const Caveat caveat : {Caveat::permission_denied, Caveat::vanished, Caveat::unreadable, Caveat::stale}) {
    Bench bench;
    bench.meter.add(Domain::cpu_package, "package-0");
    bench.begin(1);
    for (const bool lost : {false, true}) {
      if (lost) bench.meter.world->caveats[0] = static_cast<Caveats>(caveat);
      bench.pass(100ms);
      bench.meter.world->totals[0] += joule;
      bench.hub->step();
      CHECK(bench.state().kinds[0].provenance == (lost && caveat != Caveat::stale ? Provenance::modelled : Provenance::prorated));
    }
  }
}

TEST_CASE("windows close no sooner than ten ticks of the slowest meter, and steps in between do nothing") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.meter.world->infos[0].tick = 30ms;
  bench.begin(1);
  bench.pass(299ms);
  CHECK(bench.hub->next() == 300ms);
  bench.hub->step();
  CHECK(bench.state().windows == 0);
  bench.pass(1ms);
  bench.hub->step();
  CHECK(bench.state().windows == 1);
  CHECK(bench.hub->next() == 600ms);
}

TEST_CASE("weights are learned from windows that differ, and the residual tells how well they predict") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(1, true);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  std::mt19937 random(9);
  const double floor = 20, copying = 4, spinning = 9;  // watts
  for (int window = 0; window < 200; ++window) {
    bench.pass(100ms);
    const nanoseconds copy = std::chrono::microseconds(random() % 50'000), spin = std::chrono::microseconds(random() % 50'000);
    spend(slot, Activity::copy, copy);
    spend(slot, Activity::spin, spin);
    bench.system.world->processes[10] += copy + spin;
    bench.system.world->host += copy + spin;
    bench.meter.world->totals[0] += static_cast<Nanojoules>(floor * 1e8) + static_cast<Nanojoules>(copying * static_cast<double>(copy.count()) + spinning * static_cast<double>(spin.count()));
    bench.hub->step();
  }
  const detail::BoardState state = bench.state();
  CHECK(state.kinds[0].split == Split::regressed_weights);
  CHECK(state.domain[0].watts_floor == Approx(floor).epsilon(1e-3));
  CHECK(std::abs(state.residual) < 1e-3);
  const Charges before = slot.read_charges();
  bench.pass(100ms);
  spend(slot, Activity::copy, 40ms);
  spend(slot, Activity::spin, 20ms);
  bench.meter.world->totals[0] += static_cast<Nanojoules>(floor * 1e8 + copying * 4e7 + spinning * 2e7);
  bench.system.world->processes[10] += 60ms;
  bench.system.world->host += 60ms;
  bench.hub->step();
  const Charges after = slot.read_charges();
  const auto charged = [&](Activity a) { return static_cast<double>(after[0].net[static_cast<std::size_t>(a)] - before[0].net[static_cast<std::size_t>(a)]) * 1e-9; };
  CHECK(charged(Activity::copy) == Approx(0.16).epsilon(1e-3));
  CHECK(charged(Activity::spin) == Approx(0.18).epsilon(1e-3));
}

TEST_CASE("who reads what he is charged while windows close, finds it in the totals of the same windows") {
  Bench bench;
  bench.meter.add(Domain::cpu_package, "package-0");
  bench.begin(1);
  bench.hub->join(1, 10);
  detail::BoardSlot& slot = bench.take(0, 1);
  std::atomic<std::uint64_t> looked{0};
  std::atomic<bool> whole{true};
  std::jthread reader([&](std::stop_token stop) {
    detail::BoardState state;
    Charges charges;
    while (!stop.stop_requested()) {
      if (!bench.board->state.read(state, [&] { charges = slot.read_charges(); })) continue;
      // Nobody else was there, and it copied throughout: of each window it has all.
      if (charges[0].total() != state.kinds[0].total || charges[0].total() != state.windows * joule) whole = false;
      ++looked;
    }
  });
  for (int window = 0; window < 3000 || looked < 3000; ++window) {
    bench.pass(100ms);
    spend(slot, Activity::copy, 100ms);
    bench.system.world->processes[10] += 100ms;
    bench.system.world->host += 100ms;
    bench.meter.world->totals[0] += joule;
    bench.hub->step();
  }
  CHECK(whole);
}

TEST_CASE("a published value is read whole or not at all") {
  struct Pair {
    std::uint64_t a, b;
  };
  detail::Published<Pair> published;
  Pair seen{};
  CHECK_FALSE(published.read(seen));
  published.write({1, 2});
  REQUIRE(published.read(seen));
  CHECK(seen.b == 2);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (std::uint64_t i = 1; !stop; ++i) published.write({i, 2 * i});
  });
  for (int i = 0; i < 20000; ++i)
    if (published.read(seen)) REQUIRE(seen.b == 2 * seen.a);
  stop = true;
  writer.join();
}
