// SPDX-License-Identifier: Apache-2.0
// Tables under random schedules in virtual time: what every pull must see, under any order of events, with messages lost, doubled
// and overtaken, and with ranks that die. TALLY_TEST_LONG=1 tries 100,000 of them.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <iostream>
#include <string>

#include "sanitized.hpp"
#include "table_schedule.hpp"

namespace {

std::uint64_t how_many(std::uint64_t usually) { return std::getenv("TALLY_TEST_LONG") ? 34'000 : test::sanitized ? usually / 8 : usually; }

template <class F>
void try_all(std::uint64_t count, F&& schedule) {
  table::Truth all;
  // One schedule again: TALLY_SEED=n.
  const char* only = std::getenv("TALLY_SEED");
  for (std::uint64_t seed = only ? std::strtoull(only, nullptr, 10) : 1, end = only ? seed + 1 : count + 1; seed < end; ++seed) {
    const table::Schedule s = schedule(seed);
    try {
      const table::Truth truth = table::run(s);
      all.pulls += truth.pulls, all.parked += truth.parked, all.finals += truth.finals;
    } catch (const std::exception& error) {
      FAIL("schedule " << seed << ", " << s.n << " ranks, " << tally::text_of(s.options.consistency) << ", " << s.options.fold.text() << ", " << s.options.servers.size() << (s.options.dedicated ? " dedicated" : "") << " servers, " << s.options.replicas << " replicas, killed " << s.killed << ": " << error.what());
    }
  }
  CHECK((all.pulls > 0 && all.finals > 0));
  if (!only) CHECK(all.parked > 0);  // the gate was at work
}

}  // namespace

TEST_CASE("I1 I6 I7: no pull returns before its bound, own writes are read, reads are monotonic, whatever the schedule") {
  try_all(how_many(2000), [](std::uint64_t seed) { return table::random_schedule(seed, false, false); });
}
TEST_CASE("I3: with messages lost, doubled and overtaken every push counts once") {
  try_all(how_many(2000), [](std::uint64_t seed) { return table::random_schedule(seed, true, false); });
}
TEST_CASE("I3 I4: the same where somebody dies") {
  try_all(how_many(1000), [](std::uint64_t seed) { return table::random_schedule(seed, true, true); });
}
TEST_CASE("I1 I4: whoever dies, whenever: no acknowledged push is lost, none counts twice or in part") {
  try_all(how_many(2000), [](std::uint64_t seed) { return table::random_schedule(seed, false, true); });
}

TEST_CASE("of pulls that wait for the same worker the most urgent is answered first") {
  tally::SimulatedOptions network;
  network.slot_bytes = 4096;
  tally::SimulatedNetwork simulated(2, network);
  simulated.run([&](tally::Rank me) {
    using namespace std::chrono_literals;
    tally::detail::TableSettings settings;
    settings.clock = simulated.clock(me);
    settings.threaded = false;
    constexpr std::size_t count = 20'000;
    const tally::Ticks begin = settings.clock.now();
    tally::ParameterServer<float, tally::Add> ps(std::make_unique<tally::detail::ErasedTransport<tally::SimulatedTransport>>(std::make_unique<tally::SimulatedTransport>(simulated, me)), {{"a", count}, {"b", count}, {"c", count}}, {.servers = {1}}, tally::Add{}, settings);
    if (me == 1) {
      for (float one = 0; simulated.clock(me).now() < begin + 5'000'000; simulated.sleep(100us)) ps["a"].range(0, 1).pull(std::span(&one, 1));  // and looks after others
      ps.tick();
    } else {
      ps.tick();
      std::vector<std::vector<float>> values(3, std::vector<float>(count));
      auto last = ps["a"].async_pull(values[0], {.priority = -1});
      auto middle = ps["b"].async_pull(values[1]);
      auto first = ps["c"].async_pull(values[2], {.priority = 7});
      const auto c = first.wait().report.elapsed, b = middle.wait().report.elapsed, a = last.wait().report.elapsed;
      simulated::expect(c >= 5ms && c < b && b < a, "in the order of their priorities: " + std::to_string(c.count()) + " " + std::to_string(b.count()) + " " + std::to_string(a.count()));
    }
    ps.close();
  });
}
