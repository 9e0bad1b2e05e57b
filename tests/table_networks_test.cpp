// SPDX-License-Identifier: Apache-2.0
// Tables over TCP, and over shared memory within hosts and TCP between them.
#include <catch2/catch.hpp>

#include <string>
#include <vector>

#include "network.hpp"
#include "table_suite.hpp"

using namespace test;

namespace {

/// Ranks on these hosts, by TCP alone or by whatever is closest.
template <class F>
void everyone(const std::vector<std::uint64_t>& places, F&& f) {
  for (const Way way : {Way::network, Way::route})
    for (const Caught& c : outcomes(places, way, f)) {
      INFO(c);
      CHECK((c.ran && !c.error && !c.foreign));
    }
}

}  // namespace

TEST_CASE("tables over networks: every pull of bsp is known") {
  for (const std::vector<std::uint64_t>& places : {std::vector<std::uint64_t>{1, 2}, {1, 1, 2}, {1, 2, 1, 2}})
    everyone(places, [](Communicator& comm) {
      for (const std::size_t count : {1u, 1000u, 70'001u}) steps_are_exact(comm, count, {.consistency = bsp, .block_bytes = 4096}, 3);
      steps_are_exact(comm, 300'000, {.consistency = bsp, .fold = FoldOrder::as<Ring>(), .replicas = 1}, 3);
    });
}
TEST_CASE("tables over networks: rows, background, errors") {
  everyone({1, 2, 1}, [](Communicator& comm) {
    rows_are_exact(comm, {.consistency = bsp, .replicas = 1});
    background_is_exact(comm, {.consistency = bsp});
    equals_all_reduce<Ring, float>(comm, 20'001, Momentum{});
    errors_are_named(comm);
  });
}
