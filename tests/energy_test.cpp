// SPDX-License-Identifier: Apache-2.0
// Joules in ledgers and reports: closed forms with a source that the test scripts, and ranks with a hub and a meter of 100 W.
#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include <tally/account/job.hpp>
#include <tally/energy/carbon_rate.hpp>
#include <tally/energy/member.hpp>
#include <tally/tally.hpp>

#include "fake_meter.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

/// A ledger of two ranks whose calls the test makes up; ticks are nanoseconds.
struct Kept {
  std::shared_ptr<Script> script = std::make_shared<Script>();
  Clock clock{false};
  std::unique_ptr<Ledger> ledger;
  std::uint32_t sequence = 0;

  explicit Kept(Provenance provenance = Provenance::prorated, CarbonRate carbon = {}) {
    script->reading.kinds[0].provenance = provenance;
    script->reading.kinds[0].split = Split::equal_time;
    ledger = std::make_unique<Ledger>(2, 0, "none", clock, AccountSettings({}, [this] { return std::make_unique<ScriptedSource>(script); }, std::move(carbon)));
  }
  /// 1 us of protocol, then so much copying and waiting for rank 1.
  std::uint32_t call(LedgerRow& row, Ticks copying, Ticks waiting) {
    Stopwatch watch(2);
    run(watch, copying, waiting);
    return end(row, watch);
  }
  static void begin(Stopwatch& watch, Ticks copying) {
    watch.start(1000);
    watch.enter(State::copy, 2000);
    watch.enter(State::wait_local, 2000 + copying);
  }
  static void run(Stopwatch& watch, Ticks copying, Ticks waiting) {
    begin(watch, copying);
    watch.blame(1, State::wait_arrival, waiting);
    watch.resume(State::protocol, 2000 + copying + waiting);
  }
  std::uint32_t end(LedgerRow& row, const Stopwatch& watch) {
    Report report = detail::report_of(watch, clock, -1);
    report.sequence = ++sequence;
    ledger->book({&row, 8, sequence, 1000, &watch}, report, clock);
    ledger->settle();
    return sequence;
  }
  void window(Nanojoules copy, Nanojoules spin, Nanojoules protocol = 0, Nanojoules floor = 0) {
    Charge& charge = script->reading.charges[0];
    charge.net[static_cast<std::size_t>(Activity::copy)] += copy;
    charge.net[static_cast<std::size_t>(Activity::spin)] += spin;
    charge.net[static_cast<std::size_t>(Activity::protocol)] += protocol;
    charge.floor += floor;
    script->reading.kinds[0].total += copy + spin + protocol + floor;
    script->reading.kinds[0].window_joules = 1;
    ++script->reading.windows;
    script->reading.time += 100ms;
  }
  AccountEvent event(std::uint32_t number) const {
    for (const AccountEvent& e : ledger->account("w").recent)
      if (e.sequence == number) return e;
    FAIL("no such call");
    return {};
  }
};
Nanojoules nano(const Quantity& joules) { return static_cast<Nanojoules>(std::llround(joules.value * 1e9)); }

}  // namespace

TEST_CASE("rows and calls are charged by the time they spent in each activity, once the window is closed") {
  Kept kept;
  LedgerRow& small = kept.ledger->row(Collective::all_reduce, 8, "ring");
  LedgerRow& large = kept.ledger->row(Collective::all_reduce, 1 << 20, "ring");
  const std::uint32_t a = kept.call(small, 1000, 3000), b = kept.call(large, 3000, 1000);
  CHECK(kept.script->published[Activity::copy] == 4000ns);
  CHECK(kept.script->published[Activity::spin] == 4000ns);
  CHECK(kept.script->published[Activity::protocol] == 2000ns);
  CHECK_FALSE(kept.event(a).energy_final);
  CHECK(std::isnan(kept.event(a).energy.gross.value));
  CHECK_FALSE(kept.ledger->energy(small).known());  // the window in which it was is open: that is not 0
  for (const AccountRow& row : kept.ledger->account("w").rows) CHECK_FALSE(row.energy.gross.known());

  kept.window(4000, 800, 200, 1000);  // floor: 5 us each
  CHECK(nano(kept.ledger->energies(small).net) == 1000 + 600 + 100);
  CHECK(nano(kept.ledger->energies(small).gross) == 1000 + 600 + 100 + 500);
  CHECK(nano(kept.ledger->energies(small).idle) == 600 + 300);
  CHECK(nano(kept.ledger->energies(small).idle_avoidable) == 600);
  CHECK(nano(kept.ledger->energies(large).gross) == 3000 + 200 + 100 + 500);
  const AccountEvent event = kept.event(b);
  CHECK(event.energy_final);
  CHECK(nano(event.energy.gross) == 3000 + 200 + 100 + 500);
  CHECK(event.energy.gross.provenance == Provenance::prorated);
  CHECK(event.energy.gross.split == Split::equal_time);
  CHECK(nano(event.energy.idle) == 200 + 100);
  CHECK(event.waited_for.at(0).arrival == 1000ns);
  CHECK(event.operation_number == b);

  // The next window is that of the calls that come in it.
  const std::uint32_t c = kept.call(small, 500, 500);
  kept.window(500, 500);
  CHECK(nano(kept.event(c).energy.gross) == 1000);
  CHECK(nano(kept.event(b).energy.gross) == 3800);
  CHECK(nano(kept.ledger->energies(small).gross) == 2200 + 1000);
  CHECK(nano(kept.ledger->energies(large).gross) == 3800);
}

TEST_CASE("I7: what a ledger was charged is its rows' joules, to the nanojoule") {
  Kept kept;
  std::vector<LedgerRow*> rows;
  for (const std::uint64_t bytes : {8u, 100u, 5000u}) rows.push_back(&kept.ledger->row(Collective::all_reduce, bytes, "ring"));
  std::uint64_t seed = 12345;
  const auto number = [&](std::uint64_t most) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 33) % most;
  };
  for (int window = 0; window < 200; ++window) {
    for (std::uint64_t i = number(4); i-- > 0;) kept.call(*rows[i % 3], number(100000), number(100000));
    kept.window(number(1000003), number(1000003), number(1003), number(1000003));
    kept.ledger->rows();
  }
  kept.call(*rows[0], 1, 1);
  kept.call(*rows[1], 7, 7);
  kept.window(0, 0);  // what could not be divided evenly, or came when nothing had been done, is divided now but for less than a nanojoule each
  Nanojoules all = 0;
  for (const LedgerRow& row : kept.ledger->rows()) all += row.charged.kinds[0].total();
  const Nanojoules charged = kept.script->reading.charges[0].total();
  CHECK(all <= charged);
  CHECK(charged - all < 16);
}

TEST_CASE("a call that goes on over several windows is charged for each, and keeps it when it ends") {
  Kept kept;
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  Stopwatch watch(2);
  Kept::begin(watch, 1000);
  kept.ledger->publish_unfinished(watch, 103000, kept.clock);
  CHECK(kept.script->published[Activity::spin] == 100us);
  CHECK(kept.script->published[Activity::copy] == 1us);
  kept.window(50, 1000);
  kept.ledger->publish_unfinished(watch, 203000, kept.clock);
  kept.window(0, 2000);
  kept.ledger->publish_unfinished(watch, 203000, kept.clock);
  CHECK(nano(kept.ledger->energy(row)) == 0);  // it has not ended
  watch.blame(1, State::wait_arrival, 250000);
  watch.resume(State::protocol, 253000);
  const std::uint32_t a = kept.end(row, watch);
  CHECK(kept.script->published[Activity::spin] == 250us);
  const std::uint32_t b = kept.call(row, 1000, 50000);
  kept.window(10, 4000);  // 50 us of each
  CHECK(nano(kept.event(a).energy.gross) == 50 + 1000 + 2000 + 2000);
  CHECK(nano(kept.event(b).energy.gross) == 10 + 2000);
  CHECK(nano(kept.ledger->energy(row)) == 50 + 10 + 7000);
  CHECK(nano(kept.ledger->idle_energy(row)) == 7000);
}

TEST_CASE("what a call was charged too much for before it ended is not made up for by others") {
  Kept kept;
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  Stopwatch watch(2);
  Kept::begin(watch, 1000);
  kept.ledger->publish_unfinished(watch, 103000, kept.clock);
  kept.window(50, 1000);
  kept.ledger->publish_unfinished(watch, 103000, kept.clock);
  watch.blame(1, State::wait_arrival, 99000);
  watch.resume(State::protocol, 102000);
  const std::uint32_t a = kept.end(row, watch), b = kept.call(row, 1000, 50000);
  kept.window(0, 50000);
  CHECK(nano(kept.event(a).energy.gross) == 50 + 1000);
  CHECK(nano(kept.event(b).energy.gross) == 50000);
  CHECK(nano(kept.ledger->energy(row)) == 50 + 1000 + 50000);
}

TEST_CASE("calls that go on at the same time have their own joules, and one that comes between them has its own") {
  Kept kept;
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  const auto waiting = [](Stopwatch& watch) {
    watch.start(1000);
    watch.enter(State::wait_local, 2000);
  };
  const auto ended = [&](Stopwatch& watch, Ticks waited) {
    watch.blame(1, State::wait_arrival, waited);
    watch.resume(State::protocol, 2000 + waited);
    return kept.end(row, watch);
  };
  Stopwatch first(2), second(2);
  waiting(first);
  kept.ledger->publish_unfinished(first, 32000, kept.clock);  // 30 us
  const std::uint32_t between = kept.call(row, 1000, 10000);
  CHECK(kept.script->published[Activity::spin] == 40us);
  kept.window(7, 4000);
  CHECK(nano(kept.event(between).energy.gross) == 7 + 1000);
  CHECK(nano(kept.ledger->energy(row)) == 7 + 1000);
  waiting(second);
  kept.ledger->publish_unfinished(second, 12000, kept.clock);  // 10 us
  CHECK(kept.script->published[Activity::spin] == 50us);  // what the other one did is not taken back
  kept.window(0, 200);
  kept.ledger->publish_unfinished(first, 32000, kept.clock);
  const std::uint32_t b = ended(second, 20000), a = ended(first, 40000);
  CHECK(kept.script->published[Activity::spin] == 70us);
  kept.window(0, 600);  // 10 us more of each
  CHECK(nano(kept.event(a).energy.gross) == 3000 + 300);
  CHECK(nano(kept.event(b).energy.gross) == 200 + 300);
  CHECK(nano(kept.event(between).energy.gross) == 7 + 1000);
  CHECK(nano(kept.ledger->energy(row)) == 7 + 4000 + 200 + 600);
}

TEST_CASE("I15: grams are each window's joules at its own intensity, in rows and calls; unknown stays unknown") {
  double intensity = 0.1;  // g/J
  bool known = true;
  Kept kept(Provenance::prorated, [&](nanoseconds, nanoseconds) {
    CarbonFigure figure;
    if (known) figure.grams_per_joule = {intensity, 0, 0, 1, Provenance::modelled};
    figure.grams_per_kwh = {intensity * 3.6e6, 0, 0, 1e9, Provenance::modelled};
    figure.source = "test";
    figure.caveats = static_cast<Caveats>(Caveat::carbon_estimated);
    return figure;
  });
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  const std::uint32_t a = kept.call(row, 1000, 3000);
  kept.window(4'000'000'000, 2'000'000'000);
  CHECK(kept.event(a).energy.carbon.value == Approx(0.6));
  intensity = 0.5;
  const std::uint32_t b = kept.call(row, 1000, 3000);
  kept.window(1'000'000'000, 1'000'000'000);
  CHECK(kept.event(a).energy.carbon.value == Approx(0.6));
  CHECK(kept.event(b).energy.carbon.value == Approx(1.0));
  CHECK(kept.event(b).energy.carbon.provenance == Provenance::modelled);
  CHECK(kept.ledger->energies(row).carbon.value == Approx(1.6));
  const Account account = kept.ledger->account("w");
  CHECK(account.carbon_source == "test");
  CHECK(has(account.caveats, Caveat::carbon_estimated));
  known = false;
  kept.call(row, 1000, 3000);
  kept.window(1'000'000'000, 1'000'000'000);
  CHECK_FALSE(kept.ledger->energies(row).carbon.known());
  CHECK(kept.ledger->energy(row).known());
}

TEST_CASE("the model's joules have grams, too, and a source that fails makes them unknown and says why") {
  const CarbonRate rate = carbon_rate({StaticIntensity(360), 1.5, {}});
  Kept kept(Provenance::none, rate);
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  kept.call(row, 1000, 3000);
  const AccountEnergy energy = kept.ledger->energies(row);
  CHECK(energy.carbon.value == Approx(energy.gross.value * 360 / 3.6e6 * 1.5));
  CHECK(energy.carbon.provenance == Provenance::modelled);
  CHECK(kept.ledger->account("w").pue == 1.5);
  const CarbonFigure failed = carbon_rate({CallbackIntensity([](CarbonTime) -> CarbonIntensity { throw std::runtime_error("the feed is down"); }), 1, {}})(0s, 1s);
  CHECK_FALSE(failed.grams_per_joule.known());
  CHECK(failed.source.find("the feed is down") != std::string::npos);
  CHECK_FALSE(carbon_rate({}));
}

TEST_CASE("a carbon function that throws makes grams unknown and says why, with a meter and without, and no call fails") {
  for (const Provenance meter : {Provenance::prorated, Provenance::none}) {
    Kept kept(meter, [](nanoseconds, nanoseconds) -> CarbonFigure { throw std::runtime_error("grid service unreachable"); });
    LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
    kept.call(row, 1000, 3000);
    kept.window(1000, 1000);
    kept.call(row, 1000, 3000);
    CHECK(kept.ledger->energy(row).known());
    CHECK_FALSE(kept.ledger->energies(row).carbon.known());
    CHECK(kept.ledger->account("w").carbon_source == "grid service unreachable");
  }
}

TEST_CASE("what a board takes back, which anybody of this user can write to, makes no joules") {
  Kept kept;
  LedgerRow& row = kept.ledger->row(Collective::all_reduce, 8, "ring");
  kept.call(row, 1000, 3000);
  kept.window(1000, 3000);
  CHECK(nano(kept.ledger->energy(row)) == 4000);
  kept.script->reading.charges = {};
  kept.call(row, 1000, 3000);
  ++kept.script->reading.windows;
  CHECK(nano(kept.ledger->energy(row)) == 4000);
}

TEST_CASE("I13: idle_avoidable <= idle <= gross and net <= gross, of rows and calls, by meters and by the model") {
  std::uint64_t seed = 1;
  const auto number = [&](std::uint64_t most) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 33) % most;
  };
  std::size_t checked = 0, idle = 0;
  const auto check = [&](const AccountEnergy& energy) {
    REQUIRE(energy.gross.known());
    CHECK(0 <= energy.idle_avoidable.value);
    CHECK(energy.idle_avoidable.value <= energy.idle.value * (1 + 1e-12));
    CHECK(energy.idle.value <= energy.gross.value * (1 + 1e-12));
    CHECK(energy.net.value <= energy.gross.value * (1 + 1e-12));
    ++checked;
    idle += energy.idle_avoidable.value > 0 && energy.idle_avoidable.value < energy.idle.value && energy.idle.value < energy.gross.value && energy.net.value < energy.gross.value;
  };
  for (const Provenance provenance : {Provenance::prorated, Provenance::none}) {
    Kept kept(provenance);
    LedgerRow& small = kept.ledger->row(Collective::all_reduce, 8, "ring");
    LedgerRow& large = kept.ledger->row(Collective::all_reduce, 1 << 20, "ring");
    for (int window = 0; window < 100; ++window) {
      const std::uint32_t a = kept.call(small, number(2) * number(100'000), number(2) * number(100'000)), b = kept.call(large, number(100'000), number(100'000));
      kept.window(number(1'000'003), number(1'000'003), number(1003), number(1'000'003));
      for (const std::uint32_t call : {a, b}) check(kept.event(call).energy);
      for (const LedgerRow* row : {&small, &large}) check(kept.ledger->energies(*row));
    }
  }
  CHECK(checked == 800);
  CHECK(idle > 500);
}

TEST_CASE("I12: without any meter, figures are the model's; without a model, they are unknown, and no zero") {
  Kept none(Provenance::none);
  LedgerRow& row = none.ledger->row(Collective::all_reduce, 8, "ring");
  const std::uint32_t a = none.call(row, 1000, 3000);
  CHECK(none.event(a).energy.gross.provenance == Provenance::modelled);
  CHECK(none.event(a).energy_final);
  CHECK(none.event(a).energy.gross.value == Approx(5 * 5e-6));

  ModelMeter off;
  off.enabled = false;
  Ledger ledger(2, 0, "none", none.clock, AccountSettings(off));
  CHECK_FALSE(ledger.energy(ledger.row(Collective::barrier, 0, "tree")).known());
  CHECK(std::isnan(ledger.energies(ledger.rows()[0]).idle_avoidable.value));
  CHECK_FALSE(ledger.wait_for_energy(1s));
}

TEST_CASE("error bars: a call shorter than a window has its part of the window's error, all windows together have it once") {
  EnergyReading reading;
  reading.kinds[0] = {Provenance::prorated, Split::equal_time, 0, 0.1, 0.5, 10, 0};
  EnergyAmounts amounts;
  amounts.kinds[0].net_busy = 2'000'000'000;
  AccountEnergy energy = energy_of(amounts, reading, {10'000'000'000, 0, 0});
  CHECK(energy.gross.sigma == Approx(std::hypot(0.2, 0.1)));
  CHECK(energy.gross.upper == Approx(10));
  CHECK(energy.gross.lower == 0);
  amounts.kinds[0].net_busy = 1000'000'000'000;
  energy = energy_of(amounts, reading, {});
  CHECK(energy.gross.sigma == Approx(std::hypot(100, 0.5)));
  CHECK(energy.gross.upper == Approx(1000));  // never below the value
}

TEST_CASE("ranks with a hub: joules in reports, ledgers and the job's account, and the domain's figures add up") {
  // 100 W; CPU times are the system's, of the whole process, which is the hub's only client.
  MemberOptions options;
  options.name = detail::concat({"test/", ::getpid(), "/energy_test"});
  options.find = [] {
    FoundMeters found;
    found.meters.emplace_back(TimedMeter{});
    return found;
  };
  options.hub.period = 10ms;
  options.hub.system.host_time = [] { return nanoseconds{-1}; };
  auto member = std::make_shared<EnergyMember>(std::move(options));
  Options with;
  with.meters = [member] { return std::make_unique<HubSeat>(member); };
  constexpr int n = 4;
  std::vector<Account> accounts(n);
  std::vector<char> ok(n);
  launch(
      n,
      [&](Communicator& comm) {
        std::vector<float> data(1000, 1);
        Report report;
        for (int i = 0; i < 20; ++i) {
          if (comm.rank() == 2) std::this_thread::sleep_for(3ms);
          report = comm.all_reduce(std::span(data), max);
        }
        const bool known = comm.ledger().wait_for_energy(30s);
        const AccountEnergy energy = report.energies();
        const auto r = static_cast<std::size_t>(comm.rank());
        accounts[r] = comm.ledger().account("world", "test");
        ok[r] = known && report.energy_final() && energy.gross.provenance == Provenance::prorated && energy.gross.value >= 0;
        comm.barrier();
      },
      threads, with);
  member.reset();
  double rows = 0;
  for (int r = 0; r < n; ++r) {
    CHECK(ok[static_cast<std::size_t>(r)]);
    const Account& account = accounts[static_cast<std::size_t>(r)];
    REQUIRE(account.domains.size() == 1);
    const DomainAccount& domain = account.domains[0];
    CHECK(domain.operations + domain.application + domain.unattributed == domain.total);
    CHECK_FALSE(account.power.empty());
    for (const PowerSample& sample : account.power) CHECK(sample.watts > 0);
    for (const AccountRow& row : account.rows) {
      rows += row.energy.gross.value;
      CHECK(row.energy.idle_avoidable.value <= row.energy.idle.value + 1e-12);
      CHECK(row.energy.idle.value <= row.energy.gross.value + 1e-12);
      CHECK(row.energy.net.value <= row.energy.gross.value + 1e-12);
      CHECK(row.energy.gross.value <= row.energy.gross.upper + 1e-12);
    }
    double recent = 0;
    for (const AccountEvent& event : account.recent) recent += event.energy_final ? event.energy.gross.value : 0;
    for (const AccountRow& row : account.rows) recent -= row.energy.gross.value;
    CHECK(std::abs(recent) < 1e-6);  // calls are rounded to nanojoules
  }
  const JobAccount job = job_of(accounts);
  REQUIRE(job.domains.size() == 1);
  CHECK(rows <= static_cast<double>(job.domains[0].account.total) * 1e-9);
  CHECK(job.energy.gross.value == Approx(rows));
}
