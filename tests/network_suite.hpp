// SPDX-License-Identifier: Apache-2.0
// What ranks that talk over a network must get, whichever it is. Each function takes a network between hosts (detail::NetworkKind) and
// checks within a test case of Catch2.
#pragma once

#include <catch2/catch.hpp>

#include <signal.h>

#include <array>
#include <chrono>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "network.hpp"
#include "sanitized.hpp"

namespace test {

template <Network Net, class F>
std::vector<Caught> outcomes(const detail::NetworkKind<Net>& kind, int n, F&& f) {
  return outcomes(kind, std::vector<std::uint64_t>(static_cast<std::size_t>(n)), Way::network, f);
}
template <Network Net, class F>
void everyone(const detail::NetworkKind<Net>& kind, int n, F&& f) {
  for (const Caught& c : outcomes(kind, n, f)) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}

template <Network Net>
void every_algorithm_is_right(const detail::NetworkKind<Net>& kind) {
  for (const int n : sanitized ? std::vector{1, 2, 5} : std::vector{1, 2, 3, 5, 8})
    everyone(kind, n, [&](Communicator& comm) {
      const int me = comm.rank();
      for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
        if (!find_algorithm(Collective::all_reduce, name).generate) continue;  // these need memory that all reach
        for (const std::size_t count : {0u, 1u, 7u, 1000u, 70'001u}) {
          std::vector<int> data(count);
          std::iota(data.begin(), data.end(), me);
          comm.all_reduce(std::span(data), sum, {.algorithm = name});
          for (std::size_t i = 0; i < count; ++i) expect(data[i] == n * static_cast<int>(i) + n * (n - 1) / 2, std::string(name) + " of " + std::to_string(count));
        }
      }
      std::vector<int> mine(500, me), theirs(500 * static_cast<std::size_t>(n));
      comm.all_gather(std::span<const int>(mine), std::span(theirs));
      for (std::size_t i = 0; i < theirs.size(); ++i) expect(theirs[i] == static_cast<int>(i / 500), "all_gather");
      std::vector<int> out(theirs.size());
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = me * 1000 + static_cast<int>(i / 500);
      comm.all_to_all(std::span<const int>(out), std::span(theirs));
      for (std::size_t i = 0; i < theirs.size(); ++i) expect(theirs[i] == static_cast<int>(i / 500) * 1000 + me, "all_to_all");
      std::vector<int> root(20'000, me == n - 1 ? 7 : 0);
      comm.broadcast(std::span(root), n - 1);
      expect(root == std::vector<int>(20'000, 7), "broadcast");
      if (n > 1) {
        comm.send_receive(std::span<const int>(mine), wrap(me + 1, n), std::span(theirs).first(500), wrap(me - 1, n), 3);
        expect(theirs[499] == wrap(me - 1, n), "send_receive");
      }
      comm.barrier();
    });
}

template <Network Net>
void groups_are_right(const detail::NetworkKind<Net>& kind) {
  everyone(kind, 5, [](Communicator& comm) {
    auto half = comm.split(comm.rank() % 2, comm.rank());
    auto again = comm.duplicate();
    std::vector<int> a(3000, 1), b(100, 2), c(10, 3);
    auto first = comm.async_all_reduce(std::span(a), sum);
    auto second = again.async_all_reduce(std::span(b), sum);
    half->all_reduce(std::span(c), sum);
    second.wait();
    first.wait();
    expect(a == std::vector<int>(3000, 5) && b == std::vector<int>(100, 10) && c == std::vector<int>(10, comm.rank() % 2 ? 6 : 9), "sums");
  });
}

template <Network Net>
void what_was_sent_is_there(const detail::NetworkKind<Net>& kind) {
  const Job job(2);
  on_ranks(2, [&](Rank r) {
    std::vector<int> data(50'000, 0);
    std::optional<Communicator> comm = over(kind, job.join(r));
    if (r == 0) {
      std::iota(data.begin(), data.end(), 0);
      comm->send(std::span<const int>(data), 1);
      comm.reset();
    } else {
      std::this_thread::sleep_for(100ms);
      comm->receive(std::span(data), 0);
      for (std::size_t i = 0; i < data.size(); ++i) expect(data[i] == static_cast<int>(i), "all of it");
      expect(caught([&] { comm->receive(std::span(data), 0); }).is(Errc::peer_left), "and no more");
    }
  });
}

template <Network Net>
void faults_are_named(const detail::NetworkKind<Net>& kind) {
  for (const Caught& c : outcomes(kind, 3, [](Communicator& comm) {
         std::vector<int> data(comm.rank() == 2 ? 7 : 8);
         comm.all_reduce(std::span(data), sum);
         comm.barrier();
       })) {
    INFO(c);
    CHECK(c.is(Errc::mismatch));
    CHECK_THAT(c.text, Catch::Contains("int32 x 7") && Catch::Contains("int32 x 8"));
  }
  for (const Caught& c : outcomes(kind, 3, [](Communicator& comm) {
         if (comm.rank() == 1) comm.abort("enough");
         comm.barrier();
       })) {
    INFO(c);
    CHECK(c.is(Errc::aborted));
    CHECK_THAT(c.text, Catch::Contains("rank 1 aborted the communicator: enough"));
  }
  const Happened over;
  const auto late = outcomes(kind, 2, [&](Communicator& comm) {
    if (comm.rank() == 0) return over.await();
    over.after([&] { comm.barrier({.timeout = 200ms}); });
  });
  INFO(late[1]);
  CHECK(late[1].is(Errc::timeout));
  // Some networks send nothing before the other side has helped to connect.
  CHECK_THAT(late[1].text, Catch::Contains("waits for data from rank 0") || Catch::Contains("waits for room at rank 0"));
  const auto left = outcomes(kind, 3, [&](Communicator& comm) {
    comm.barrier();
    if (comm.rank() != 2) comm.barrier();
  });
  for (const Rank r : {0, 1}) {
    INFO(left[static_cast<std::size_t>(r)]);
    CHECK((left[static_cast<std::size_t>(r)].is(Errc::peer_left) || left[static_cast<std::size_t>(r)].is(Errc::aborted)));
    CHECK(has(left[static_cast<std::size_t>(r)].text, "rank 2 left the communicator"));
  }
}

/// For a [processes] test.
template <Network Net>
void who_is_killed_is_missed(const detail::NetworkKind<Net>& kind) {
  const Job job(4);  // its registry is the test's own
  const Shared<std::array<Caught, 4>> results;
  const Happened ready;
  std::vector<Process> ranks;
  for (Rank r = 0; r < 4; ++r)
    ranks.emplace_back([&, r] {
      (*results)[static_cast<std::size_t>(r)].record([&] {
        Communicator comm = over(kind, job.join(r));
        comm.barrier();
        std::vector<int> data(3'000'000);
        if (r == 3) ready.now(), std::this_thread::sleep_for(100s);
        if (r == 2) comm.send(std::span<const int>(data), 3);
        else if (r == 1) comm.receive(std::span(data), 3);
        else comm.all_reduce(std::span(data), sum);
      });
    });
  ready.await();
  std::this_thread::sleep_for(50ms);
  const auto began = std::chrono::steady_clock::now();
  ::kill(ranks[3].pid(), SIGKILL);
  for (std::size_t r = 0; r < 3; ++r) CHECK(ranks[r].wait(20s));
  CHECK(std::chrono::steady_clock::now() - began < 10s);
  for (std::size_t r = 0; r < 3; ++r) {
    INFO((*results)[r]);
    CHECK(((*results)[r].is(Errc::peer_lost) || (*results)[r].is(Errc::aborted)));
    CHECK(has((*results)[r].text, "rank 3 died"));
  }
}

}  // namespace test
