// SPDX-License-Identifier: Apache-2.0
// Windows of energy divided among what happened in them: exact sums, closed forms, and error bars that hold what they say.
#include <catch2/catch.hpp>

#include <cmath>
#include <random>
#include <vector>

#include <tally/energy/attribution.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

ActivityTimes times(nanoseconds copy, nanoseconds reduce, nanoseconds protocol, nanoseconds spin, nanoseconds sleep) {
  ActivityTimes t;
  t[Activity::copy] = copy;
  t[Activity::reduce] = reduce;
  t[Activity::protocol] = protocol;
  t[Activity::spin] = spin;
  t[Activity::sleep] = sleep;
  return t;
}
Nanojoules of(const Charge& charge, Activity a) { return charge.net[static_cast<std::size_t>(a)]; }

}  // namespace

TEST_CASE("I7: operations, application and the rest are the meter's figure, to the nanojoule") {
  std::mt19937_64 random(1);
  const auto number = [&](std::uint64_t most) { return static_cast<std::int64_t>(random() % most); };
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<ActivityTimes> all(random() % 9);
    for (ActivityTimes& each : all)
      for (nanoseconds& t : each.in) t = nanoseconds(trial % 5 == 0 ? 0 : number(trial % 7 == 0 ? std::uint64_t{1} << 62 >> 4 : 100'000'000));
    std::vector<Charge> charges(all.size());
    Weights weights = Weights::equal_time();
    for (double& w : weights.watts) w = static_cast<double>(number(100)) / 7;
    weights.application = static_cast<double>(number(100)) / 7;
    weights.floor_watts = static_cast<double>(number(50));
    const EnergyWindow window{100ms, random() >> (random() % 40 + 3), all, nanoseconds(number(200'000'000)), nanoseconds(number(200'000'000)), nanoseconds(number(200'000'000)), 2};
    const DividedWindow divided = divide(window, weights, charges);
    Nanojoules charged = 0;
    for (const Charge& charge : charges) charged += charge.total();
    REQUIRE(charged == divided.operations);
    REQUIRE(divided.operations <= window.energy);
    REQUIRE(divided.application <= window.energy);
    REQUIRE(divided.operations + divided.application + divided.unattributed == window.energy);
    REQUIRE(divided.unattributed <= window.energy);
  }
}

TEST_CASE("by equal time, joules go by CPU time, and sleep is free") {
  const std::vector<ActivityTimes> all{times(10ms, 20ms, 5ms, 15ms, 50ms), times(0ms, 0ms, 0ms, 100ms, 0ms)};
  std::vector<Charge> charges(2);
  // 150 ms of operations, 25 ms of application, 25 ms of others: 200 ms for 4 J
  const DividedWindow divided = divide({100ms, 4'000'000'000, all, 25ms, 0ms, 25ms, 2}, Weights::equal_time(), charges);
  CHECK(of(charges[0], Activity::copy) == 200'000'000);
  CHECK(of(charges[0], Activity::reduce) == 400'000'000);
  CHECK(of(charges[0], Activity::protocol) == 100'000'000);
  CHECK(of(charges[0], Activity::spin) == 300'000'000);
  CHECK(of(charges[0], Activity::sleep) == 0);
  CHECK(of(charges[1], Activity::spin) == 2'000'000'000);
  CHECK(divided.operations == 3'000'000'000);
  CHECK(divided.application == 500'000'000);
  CHECK(divided.unattributed == 500'000'000);
  CHECK(std::isnan(divided.residual));
}

TEST_CASE("the floor goes by who was there; idle cores are nobody's") {
  Weights weights = Weights::equal_time();
  weights.floor_watts = 10;
  weights.watts = {8, 8, 8, 8, 4, 4, 1};
  weights.application = 6;
  weights.split = Split::calibrated_weights;
  const std::vector<ActivityTimes> all{times(0ms, 50ms, 0ms, 0ms, 50ms)};
  std::vector<Charge> charges(1);
  // 1 J floor over 4 cores for 100 ms: 100 of 400 core-ms are the operation's, 100 the application's. Above: 0.4 J reducing, 0.05 asleep, 0.6 application.
  const Nanojoules energy = 1'000'000'000 + 400'000'000 + 50'000'000 + 600'000'000;
  const DividedWindow divided = divide({100ms, energy, all, 100ms, 100ms, 0ms, 4}, weights, charges);
  CHECK(charges[0].floor == 250'000'000);
  CHECK(of(charges[0], Activity::reduce) == 400'000'000);
  CHECK(of(charges[0], Activity::sleep) == 50'000'000);
  CHECK(divided.application == 600'000'000 + 250'000'000);
  CHECK(divided.unattributed == 500'000'000);
  CHECK(divided.residual == Approx(0).margin(1e-9));

  // A machine that draws twice what the weights say: the shares stay, and the residual tells.
  const DividedWindow twice = divide({100ms, 2 * energy, all, 100ms, 100ms, 0ms, 4}, weights, charges);
  CHECK(twice.residual == Approx(0.5));
}

TEST_CASE("less than the floor is all floor, and says so") {
  Weights weights = Weights::equal_time();
  weights.floor_watts = 100;
  const std::vector<ActivityTimes> all{times(0ms, 0ms, 0ms, 100ms, 0ms)};
  std::vector<Charge> charges(1);
  const DividedWindow divided = divide({100ms, 5'000'000'000, all, 0ms, 0ms, 0ms, 2}, weights, charges);
  CHECK(has(divided.caveats, Caveat::floor_clamped));
  CHECK(charges[0].floor == 2'500'000'000);
  CHECK(of(charges[0], Activity::spin) == 0);
  CHECK(divided.unattributed == 2'500'000'000);
}

TEST_CASE("a window in which nobody did anything is nobody's") {
  const DividedWindow divided = divide({100ms, 123, {}, 0ms, 0ms, 0ms, 2}, Weights::equal_time(), {});
  CHECK(divided.unattributed == 123);
  CHECK(divided.operations + divided.application == 0);
}

TEST_CASE("what is accounted for too early is made up for") {
  Remainder rest;
  CHECK(rest.take(10ms, 4ms) == 6ms);
  CHECK(rest.take(0ms, 5ms) == 0ms);   // published before the system shows it
  CHECK(rest.take(10ms, 2ms) == 3ms);
  CHECK(rest.take(10ms, 10ms) == 0ms);
}

TEST_CASE("I14: error bars hold what they say: at constant power an operation's joules are within two sigma in 95 % of trials") {
  // A counter that moves every millisecond, read at any time: windows are off by up to a tick at each end.
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> phase(0, 1);
  const double watts = 200;
  const nanoseconds tick = 1ms;
  int within_one = 0, within_two = 0, bounded = 0;
  const int trials = 1000;
  for (int i = 0; i < trials; ++i) {
    const double begin = 1 + phase(random), length = 0.05 + 0.2 * phase(random);
    const auto shown = [&](double t) { return std::floor(t * 1000) / 1000 * watts; };  // joules, at the last tick
    const double energy = shown(begin + length) - shown(begin);
    const std::vector<ActivityTimes> all{times(0ms, 0ms, 0ms, nanoseconds(std::llround(length * 0.25e9)), 0ms)};
    std::vector<Charge> charges(1);
    divide({nanoseconds(std::llround(length * 1e9)), static_cast<Nanojoules>(std::llround(energy * 1e9)), all, nanoseconds(std::llround(length * 0.75e9)), 0ms, 0ms, 1}, Weights::equal_time(), charges);
    const double error = std::abs(static_cast<double>(charges[0].total()) * 1e-9 - watts * length * 0.25), sigma = quantisation_sigma(watts, tick) * 0.25;
    within_one += error <= sigma;
    within_two += error <= 2 * sigma;
    bounded += error <= watts * 1e-3 * 0.25 + 1e-9;
  }
  CHECK(within_two >= 950);
  CHECK(within_one <= 850);  // no wider than they have to be: a triangle has 65 % within one sigma
  CHECK(within_one >= 550);
  CHECK(bounded == trials);
}
