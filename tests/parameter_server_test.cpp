// SPDX-License-Identifier: Apache-2.0
// Tables between threads and processes of one host; over networks: table_networks_test.
#include <catch2/catch.hpp>

#include <chrono>
#include <string>
#include <vector>

#include "table_suite.hpp"

using namespace test;

namespace {

// Each with payloads that are stored and loaded in place, and with those that are sent.
constexpr bool both_ways[] = {true, false};

void all_sizes(RankKind kind) {
  for (const int n : {1, 2, 3, 5})
    launch(n, [](Communicator& comm) {
      for (const bool one_sided : both_ways) {
        for (const std::size_t count : {1u, 2u, 7u, 1000u, 100'003u}) steps_are_exact(comm, count, {.consistency = bsp, .block_bytes = 4096, .one_sided = one_sided}, 3);
        steps_are_exact(comm, 50'000, {.consistency = bsp, .fold = FoldOrder::by_rank(), .block_bytes = 10'000, .one_sided = one_sided}, 3);
        steps_are_exact(comm, 50'000, {.consistency = bsp, .fold = FoldOrder::as<Ring>(), .servers = {comm.size() - 1}, .one_sided = one_sided}, 3);
        if (comm.size() > 1) steps_are_exact(comm, 50'000, {.consistency = bsp, .replicas = 1, .credits = 600'000, .one_sided = one_sided}, 3);
      }
    }, kind);
}
void rows(RankKind kind) {
  for (const int n : {1, 3})
    launch(n, [](Communicator& comm) {
      for (const bool one_sided : both_ways) {
        rows_are_exact(comm, {.consistency = bsp, .one_sided = one_sided});
        rows_are_exact(comm, {.consistency = bsp, .fold = FoldOrder::by_rank(), .one_sided = one_sided});
        if (comm.size() > 1) rows_are_exact(comm, {.consistency = bsp, .servers = {1, 0}, .replicas = 1, .one_sided = one_sided});
      }
    }, kind);
}
template <class A, class T>
void equals(Communicator& comm) {
  for (const std::size_t count : {1u, 5u, 1023u, 40'001u}) {
    equals_all_reduce<A, T>(comm, count, Replace<Working<T>>{});
    equals_all_reduce<A, T>(comm, count, Momentum{0.1f, 0.9f});
  }
}
void background(RankKind kind) {
  for (const int n : {1, 2, 4})
    launch(n, [](Communicator& comm) {
      for (const bool one_sided : both_ways) {
        background_is_exact(comm, {.consistency = bsp, .one_sided = one_sided});
        background_is_exact(comm, {.consistency = bsp, .fold = FoldOrder::by_rank(), .one_sided = one_sided});
        background_is_exact(comm, {.consistency = bsp, .credits = 400'000, .one_sided = one_sided});
      }
    }, kind);
}
void errors(RankKind kind) {
  for (const int n : {1, 3}) launch(n, errors_are_named, kind);
}

}  // namespace

TALLY_TEST_BOTH("every pull of bsp is known: sizes, servers, folds, replicas", "", all_sizes)
TALLY_TEST_BOTH("rows by keys, in any order", "", rows)
TALLY_TEST_BOTH("in the background, by layers", "", background)
TALLY_TEST_BOTH("what a table does not take is refused by name, and it goes on", "", errors)

TEST_CASE("I2: with bsp and as(Algorithm) the bits are those of all_reduce and the rule") {
  for (int n = 1; n <= 8; ++n)
    launch(n, [](Communicator& comm) {
      equals<Ring, float>(comm);
      equals<Ring, bf16>(comm);
      equals<Tree, float>(comm);
      equals<OneShot, float>(comm);
      equals<OneShot, bf16>(comm);
    }, threads);
}

TEST_CASE("dedicated servers serve until all workers have left") {
  launch(4, [](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, {{"w", 1000}}, {.consistency = bsp, .servers = {1, 3}, .dedicated = true});
    if (!ps.is_worker()) {
      ps.serve();
      expect(ps.monitor().answered > 0 && ps.monitor().violated == 0, "it has served");
    } else {
      std::vector<std::int64_t> in(1000, comm.rank() + 1), out(1000);
      for (int step = 1; step <= 10; ++step) {
        ps["w"].push_pull(in, out);
        expect(out == std::vector<std::int64_t>(1000, step * 4), "ranks 0 and 2 add 1 and 3");
      }
    }
    ps.close();
  }, threads);
}
