// SPDX-License-Identifier: Apache-2.0
// Every algorithm, and the rules of the account, under thousands of random schedules on a simulated network. A failure
// names its seed: TALLY_TEST_SEED=N runs that one alone. TALLY_TEST_LONG=1 runs 25 times as many.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "simulated.hpp"
#include "transport_conformance.hpp"

using namespace simulated;

namespace {

/// one(seed) for so many seeds, or for the one that the environment names.
template <class F>
void for_seeds(std::uint64_t how_many, F&& one) {
  const char* only = std::getenv("TALLY_TEST_SEED");
  const std::uint64_t first = only ? std::strtoull(only, nullptr, 10) : 1;
  const std::uint64_t last = only ? first : std::getenv("TALLY_TEST_LONG") ? 25 * how_many : how_many;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    try {
      one(seed);
    } catch (const std::exception& error) {
      FAIL("seed " << seed << ": " << error.what());
    }
  }
  SUCCEED();
}

/// Some operations one after another on a random network, ranks late at random. Returns a hash of all reports.
std::uint64_t random_schedule(std::uint64_t seed) {
  Random random(seed);
  const int n = static_cast<int>(2 + random.below(8));
  SimulatedNetwork network(n, random_options(random, seed));
  std::vector<Work> calls(3);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const Choice& choice = all_choices()[(seed * calls.size() + i) % all_choices().size()];
    Work& w = calls[i];
    w.operation = choice.operation;
    w.algorithm = choice.algorithm;
    w.n = n;
    w.group = static_cast<int>(1 + random.below(static_cast<std::uint64_t>(n)));
    w.root = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    w.count = random.below(random.once_in(4) ? 400 : 40);
    w.in_place = w.operation == Collective::barrier || ((w.operation == Collective::all_reduce || w.operation == Collective::all_gather || w.operation == Collective::reduce_scatter) && random.once_in(2));
    w.salt = random.below(1u << 30);
  }
  const std::uint64_t most_late = random.once_in(2) ? 1 : 200'000;
  std::uint64_t hash = 0;
  run(network, [&](auto& engine) {
    Random mine(seed * 64 + static_cast<std::uint64_t>(engine.rank()) + 1);
    for (Work w : calls) {
      w.me = engine.rank();
      network.sleep(nanoseconds(mine.below(most_late)));
      const Report report = engine.run(w.call());
      w.expect_result();
      hash ^= mix(expect_exact(report, w.me) + static_cast<std::uint64_t>(w.me));
    }
  });
  return hash;
}

}  // namespace

TEST_CASE("the simulated transport conforms") {
  conformance::conformance<SimulatedTransport>([](int n, const SlotOptions& slots, const conformance::BodyOf<SimulatedTransport>& body) {
    SimulatedOptions options;
    options.slots = slots.slots;
    options.slot_bytes = slots.slot_bytes;
    options.lanes = slots.lanes;
    options.jitter = 5us;
    options.loss = 0.01;
    SimulatedNetwork network(n, options);
    network.run([&](Rank r) {
      SimulatedTransport transport(network, r);
      body(transport);
    });
  });
}

TEST_CASE("all algorithms are exact under random schedules") { for_seeds(2000, random_schedule); }

TEST_CASE("the same seed gives the same reports") {
  for_seeds(50, [](std::uint64_t seed) { expect(random_schedule(seed) == random_schedule(seed), "the same hash"); });
}
