// SPDX-License-Identifier: Apache-2.0
// What tables must do over every network, alone and with shared memory within hosts.
#pragma once

#include <cstdint>
#include <vector>

#include "network.hpp"
#include "table_suite.hpp"

namespace test {

/// Ranks on these hosts, by the network alone or by whatever is closest.
template <class Net, class F>
void by_every_way(const detail::NetworkKind<Net>& kind, const std::vector<std::uint64_t>& places, F&& f) {
  for (const Way way : {Way::network, Way::route})
    for (const Caught& c : outcomes(kind, places, way, f)) {
      INFO(c);
      CHECK((c.ran && !c.error && !c.foreign));
    }
}
template <class Net>
void pulls_over_are_known(const detail::NetworkKind<Net>& kind, const std::vector<std::vector<std::uint64_t>>& hosts = {{1, 2}, {1, 1, 2}, {1, 2, 1, 2}}) {
  for (const std::vector<std::uint64_t>& places : hosts)
    by_every_way(kind, places, [](Communicator& comm) {
      for (const std::size_t count : {1u, 1000u, 70'001u}) steps_are_exact(comm, count, {.consistency = bsp, .block_bytes = 4096}, 3);
      steps_are_exact(comm, 300'000, {.consistency = bsp, .fold = FoldOrder::as<Ring>(), .replicas = 1}, 3);
    });
}
template <class Net>
void all_else_over_is_right(const detail::NetworkKind<Net>& kind) {
  by_every_way(kind, {1, 2, 1}, [](Communicator& comm) {
    rows_are_exact(comm, {.consistency = bsp, .replicas = 1});
    background_is_exact(comm, {.consistency = bsp});
    equals_all_reduce<Ring, float>(comm, 20'001, Momentum{});
    errors_are_named(comm);
  });
}

}  // namespace test
