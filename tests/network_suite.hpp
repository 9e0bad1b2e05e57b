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
void every_algorithm_is_right(const detail::NetworkKind<Net>& kind, const std::vector<int>& sizes = sanitized ? std::vector{1, 2, 5} : std::vector{1, 2, 3, 5, 8}) {
  for (const int n : sizes)
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
    CHECK(has(left[static_cast<std::size_t>(r)].text, "rank 2 left after #1"));
  }
}

/// The registry goes with rank 0, where that one leaves.
template <Network Net>
void who_left_is_missed(const detail::NetworkKind<Net>& kind) {
  for (const Rank leaver : {0, 1}) {
    detail::Join like;
    like.size = 3;
    SocketAddress address;
    const auto listener = [&] {
      auto fd = detail::listen_at(loopback(4));
      address = detail::own_address(fd);
      return fd;
    };
    detail::NetworkSettings settings(20s);
    settings.encrypt = Job::encrypt;
    auto registry = std::make_unique<detail::Registry>(listener(), like, settings);
    std::vector<Caught> results(3);
    const Happened left;
    on_ranks(3, [&](Rank r) {
      results[static_cast<std::size_t>(r)].record([&] {
        detail::Join me = like;
        me.rank = r;
        auto node = std::make_shared<detail::NetworkNode>(at(address), me, settings);
        std::optional<Communicator> comm = over(kind, std::move(node));
        int x = 1;
        if (r == leaver) {
          comm.reset();
          if (r == 0) registry.reset();  // which goes with rank 0
          left.now();
        } else if (r == 2) {
          left.await();
          comm->receive(std::span(&x, 1), leaver);
        } else {
          left.await();
          std::vector<int> much(10'000'000);
          comm->send(std::span<const int>(much), leaver);
        }
      });
    });
    for (Rank r = 0; r < 3; ++r) {
      if (r == leaver) continue;
      INFO(leaver << " left; " << results[static_cast<std::size_t>(r)]);
      CHECK((results[static_cast<std::size_t>(r)].is(Errc::peer_left) || results[static_cast<std::size_t>(r)].is(Errc::aborted)));
      CHECK(has(results[static_cast<std::size_t>(r)].text, "rank " + std::to_string(leaver) + " left the communicator"));
    }
  }
}

/// Long messages that are on their way, and have to be given up.
template <Network Net>
void faults_end_what_is_under_way(const detail::NetworkKind<Net>& kind) {
  constexpr std::size_t many = 3'000'000;
  const auto in_time = [began = std::chrono::steady_clock::now()] { return std::chrono::steady_clock::now() - began < 60s; };
  for (const Caught& c : outcomes(kind, 3, [](Communicator& comm) {
         std::vector<int> data(comm.rank() == 2 ? many - 1 : many);
         comm.all_reduce(std::span(data), sum);
       })) {
    INFO(c);
    CHECK(c.is(Errc::mismatch));
  }
  for (const Caught& c : outcomes(kind, 3, [](Communicator& comm) {
         std::vector<int> data(many);
         if (comm.rank() == 1) comm.abort("enough");
         comm.all_reduce(std::span(data), sum);
       })) {
    INFO(c);
    CHECK(c.is(Errc::aborted));
    CHECK_THAT(c.text, Catch::Contains("enough"));
  }
  const Happened over;
  const auto late = outcomes(kind, 2, [&](Communicator& comm) {
    std::vector<int> data(many);
    comm.all_reduce(std::span(data), sum);  // they know each other
    if (comm.rank() == 0) return over.await();
    over.after([&] { comm.all_reduce(std::span(data), sum, {.timeout = 200ms}); });
  });
  INFO(late[1]);
  CHECK(late[1].is(Errc::timeout));
  CHECK(in_time());
}

/// One that a rank has sent goes though the receiver looks elsewhere first.
template <Network Net>
void short_messages_need_nobody(const detail::NetworkKind<Net>& kind) {
  everyone(kind, 2, [](Communicator& comm) {
    auto other = comm.duplicate();
    std::vector<int> data(comm.rank() == 0 ? std::vector{1, 2, 3} : std::vector{0, 0, 0});
    if (comm.rank() == 0) {
      comm.send(std::span<const int>(data), 1);
      other.send(std::span<const int>(data), 1);
    } else {
      other.receive(std::span(data), 0);
      comm.receive(std::span(data), 0);
    }
    expect(data == std::vector{1, 2, 3}, "what was sent");
  });
}

/// Nor, once it is sent, that its sender looks after that communicator any longer.
template <Network Net>
void short_messages_need_no_sender(const detail::NetworkKind<Net>& kind) {
  for (const bool is_async : {false, true}) everyone(kind, 2, [is_async](Communicator& comm) {
    auto other = comm.duplicate();
    int out = comm.rank() + 1, in = 0;
    if (comm.rank() == 0) {
      if (is_async) other.async_send(std::span<const int>(&out, 1), 1).wait();
      else other.send(std::span<const int>(&out, 1), 1);
      comm.receive(std::span(&in, 1), 1);
    } else {
      other.receive(std::span(&in, 1), 0);
      comm.send(std::span<const int>(&out, 1), 0);
    }
    expect(in == 2 - comm.rank(), "what was sent");
  });
}

/// For a [processes] test.
template <Network Net>
void who_is_killed_is_missed(const detail::NetworkKind<Net>& kind) {
  const Job job(4);  // its registry is the test's own
  const Shared<std::array<Caught, 4>> results;
  const Happened forked, ready;
  std::vector<Process> ranks;
  for (Rank r = 0; r < 4; ++r)
    ranks.emplace_back([&, r] {
      (*results)[static_cast<std::size_t>(r)].record([&] {
        forked.await();  // from when on the registry's thread does what a fork would leave half done
        Communicator comm = over(kind, job.join(r));
        comm.barrier();
        std::vector<int> data(3'000'000);
        if (r == 3) ready.now(), std::this_thread::sleep_for(100s);
        if (r == 2) comm.send(std::span<const int>(data), 3);
        else if (r == 1) comm.receive(std::span(data), 3);
        else comm.all_reduce(std::span(data), sum);
      });
    });
  forked.now();
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
