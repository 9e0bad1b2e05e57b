// SPDX-License-Identifier: Apache-2.0
// How long waits are going to be: what is learned, who is told, and what the waiting ladder makes of it.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include <tally/tally.hpp>

using namespace tally;
using namespace std::chrono_literals;

TEST_CASE("the mean forgets, and a tenth of the waits are below the tenth percentile") {
  ExpectedWait constant;
  for (int i = 0; i < 9; ++i) constant.learn(5ms);
  CHECK(constant.tenth_percentile() == 0ns);  // too few to tell
  constant.learn(5ms);
  CHECK(constant.mean() == 5ms);
  CHECK(constant.tenth_percentile() == 5ms);

  ExpectedWait spread;
  std::mt19937 random(4);
  std::uniform_int_distribution<int> uniform(1'000'000, 11'000'000);
  std::vector<nanoseconds> waits;
  for (int i = 0; i < 5000; ++i) {
    waits.emplace_back(uniform(random));
    spread.learn(waits.back());
  }
  int below = 0;
  for (const nanoseconds wait : waits) below += wait < spread.tenth_percentile();
  CHECK(below > 100);
  CHECK(below < 1200);
  CHECK(spread.mean() > 3ms);
  CHECK(spread.mean() < 9ms);

  // Waits that end: it does not go on to promise long ones.
  for (int i = 0; i < 40; ++i) spread.learn(0ns);
  CHECK(spread.tenth_percentile() == 0ns);
  CHECK(spread.mean() < 100us);
}

TEST_CASE("a wait that will be long is slept through at once, by policy; a short one, or on crowded cores, is as ever") {
  const Clock clock(false);
  const auto ticks = [&](nanoseconds t) { return clock.to_ticks(t); };
  const auto parks_after = [&](Ladder& ladder) {
    for (Ticks t = 0; t < 100000; ++t)
      if (ladder.climb(ticks(std::chrono::microseconds(t))) == Ladder::Rest::park) return std::chrono::microseconds(t);
    return std::chrono::microseconds(0);
  };
  Ladder balanced(clock, WaitPolicy::balanced, false), energy(clock, WaitPolicy::energy, false), latency(clock, WaitPolicy::latency, false);
  balanced.restart(false);
  CHECK(balanced.expect(ticks(5ms)) == ticks(5ms));
  CHECK(parks_after(balanced) == 6us);
  balanced.spin_on(ticks(5ms));
  CHECK(balanced.climb(ticks(5040us)) != Ladder::Rest::park);
  CHECK(balanced.climb(ticks(5060us)) == Ladder::Rest::park);
  balanced.restart(false);
  CHECK(balanced.expect(ticks(150us)) == 0u);
  CHECK(parks_after(balanced) == 51us);
  energy.restart(false);
  CHECK(energy.expect(ticks(5ms)) == 0u);  // it never spins at the end
  CHECK(parks_after(energy) == 6us);
  latency.restart(false);
  CHECK(latency.expect(ticks(5ms)) == 0u);
  balanced.restart(true);
  CHECK(balanced.expect(ticks(5ms)) == 0u);
}

TEST_CASE("who wants to know is told of long waits before they are slept through; what he throws is swallowed", "[timing]") {
  std::atomic<int> told{0}, wrong{0};
  Options options;
  options.on_slack = [&](const SlackHint& hint) {
    ++told;
    wrong += hint.operation != Collective::all_reduce || hint.at_least < 500us || hint.expected < 500us;
    throw std::runtime_error("not interested");
  };
  std::vector<Account> accounts(2);
  launch(
      2,
      [&](Communicator& comm) {
        std::vector<float> data(10, 1);
        for (int i = 0; i < 30; ++i) {
          if (comm.rank() == 1) std::this_thread::sleep_for(4ms);
          comm.all_reduce(std::span(data), max);
        }
        accounts[static_cast<std::size_t>(comm.rank())] = comm.account();
      },
      threads, options);
  CHECK(told >= 10);  // the first ten calls are to learn from
  CHECK(wrong == 0);
  const auto& slack = accounts[0].slack;
  const auto row = std::find_if(slack.begin(), slack.end(), [](const SlackRow& each) { return each.operation == Collective::all_reduce && each.peer == 1; });
  REQUIRE(row != slack.end());
  CHECK(row->calls >= 25);
  CHECK(row->expected >= 3ms);
  CHECK(row->tenth_percentile >= 2ms);
}
