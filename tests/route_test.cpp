// SPDX-License-Identifier: Apache-2.0
// Shared memory to the ranks of one host and TCP to the others, at once. Ranks are threads; who is on which host is said, not so.
#include <catch2/catch.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "network.hpp"
#include "sanitized.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::Caught, test::caught, test::expect, test::Happened, test::has, test::Job, test::late_ranks_are_blamed, test::on_ranks, test::Way;

namespace {

using Route = RouteTransport<TcpTransport>;
using Places = std::vector<std::uint64_t>;

Places places_of(int n, int hosts_of) {
  Places places;
  for (int r = 0; r < n; ++r) places.push_back(static_cast<std::uint64_t>(hosts_of > 0 ? r / hosts_of : r % -hosts_of) + 1);
  return places;
}
/// `width`: ranks of a host that follow each other; negative: so many hosts, in turn.
void run(int n, int width, const SlotOptions& slots, const conformance::BodyOf<Route>& body) {
  const Job job(n);
  const Places places = places_of(n, width);
  Options options;
  options.slots = slots;
  TcpOptions tcp;
  tcp.lanes = slots.lanes;
  tcp.frame_bytes = slots.slot_bytes;
  tcp.window = static_cast<std::size_t>(slots.slots) * (slots.slot_bytes + detail::frame_cost);
  on_ranks(n, [&](Rank r) {
    const auto node = job.join(r, places[static_cast<std::size_t>(r)]);
    const detail::Neighbourhood here(*node);
    const auto transport = detail::network_route(node, here, options, detail::tcp_kind(tcp));
    body(*transport);
    transport->leave();
  });
}
template <class F>
void everyone(const Places& places, F&& f) {
  for (const Caught& c : test::outcomes(places, Way::route, f)) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}

}  // namespace

TEST_CASE("two ranks a host conform") {
  conformance::conformance<Route>([](int n, const SlotOptions& options, const auto& body) { run(n, 2, options, body); });
}
TEST_CASE("ranks dealt to two hosts in turn conform") {
  conformance::conformance<Route>([](int n, const SlotOptions& options, const auto& body) { run(n, -2, options, body); });
}

TEST_CASE("all algorithms are right, however ranks are spread over hosts") {
  for (const Places& places : {Places{1, 1, 2}, Places{1, 2, 1, 2}, Places{1, 1, 2, 2}, Places{1, 2, 2, 2, 1}, Places{3, 1, 2, 2, 1, 2, 2}, Places{1, 1, 1, 1}}) {
    const int n = static_cast<int>(places.size());
    everyone(places, [&](Communicator& comm) {
      const int me = comm.rank();
      for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
        if (!find_algorithm(Collective::all_reduce, name).generate) continue;  // these need memory that all reach
        for (const std::size_t count : {0u, 1u, 1000u, 70'001u}) {
          std::vector<int> data(count);
          std::iota(data.begin(), data.end(), me);
          const Report report = comm.all_reduce(std::span(data), sum, {.algorithm = name});
          for (std::size_t i = 0; i < count; ++i) expect(data[i] == n * static_cast<int>(i) + n * (n - 1) / 2, std::string(name) + " of " + std::to_string(count));
          expect(report.transport_name() == "shm+tcp" && comm.transport_name() == "shm+tcp", "both ways, not " + report.transport_name());
          expect(report.busy() + report.idle() == report.elapsed, "the parts are the whole");
        }
      }
      std::vector<int> mine(500, me), theirs(500 * static_cast<std::size_t>(n));
      for (const std::string_view name : algorithms_for(Collective::all_gather)) {
        if (!find_algorithm(Collective::all_gather, name).generate) continue;
        comm.all_gather(std::span<const int>(mine), std::span(theirs), {.algorithm = name});
        for (std::size_t i = 0; i < theirs.size(); ++i) expect(theirs[i] == static_cast<int>(i / 500), "all_gather by " + std::string(name));
      }
      for (const std::string_view name : algorithms_for(Collective::reduce_scatter)) {
        if (!find_algorithm(Collective::reduce_scatter, name).generate) continue;
        std::vector<int> whole(500 * static_cast<std::size_t>(n)), part(500);
        for (std::size_t i = 0; i < whole.size(); ++i) whole[i] = me + static_cast<int>(i);
        comm.reduce_scatter(std::span<const int>(whole), std::span(part), sum, {.algorithm = name});
        for (std::size_t i = 0; i < part.size(); ++i) expect(part[i] == n * (n - 1) / 2 + n * (500 * me + static_cast<int>(i)), "reduce_scatter by " + std::string(name));
      }
      comm.send_receive(std::span<const int>(mine), wrap(me + 1, n), std::span(theirs).first(500), wrap(me - 1, n), 3);
      expect(theirs[499] == wrap(me - 1, n), "send_receive");
      for (const std::string_view name : algorithms_for(Collective::broadcast)) {
        if (!find_algorithm(Collective::broadcast, name).generate) continue;
        std::vector<int> root(20'000, me == n - 1 ? 7 : 0);
        comm.broadcast(std::span(root), n - 1, {.algorithm = name});
        expect(root == std::vector<int>(20'000, 7), "broadcast by " + std::string(name));
      }
      for (const std::string_view name : algorithms_for(Collective::reduce)) {
        if (!find_algorithm(Collective::reduce, name).generate) continue;
        std::vector<int> ones(5000, me), total(5000);
        comm.reduce(std::span<const int>(ones), std::span(total), sum, n / 2, {.algorithm = name});
        expect(total == std::vector<int>(5000, me == n / 2 ? n * (n - 1) / 2 : 0), "reduce by " + std::string(name));
      }
      int from = -1;
      for (Rank r = 1; me == 0 && r < n; ++r) {
        comm.receive(std::span(&from, 1), r, 5);
        expect(from == r, "a message");
      }
      if (me > 0) comm.send(std::span<const int>(&me, 1), 0, 5);
    });
  }
}

TEST_CASE("explain says which way goes to whom") {
  std::vector<std::string> texts(5);
  everyone({1, 1, 2, 1, 2}, [&](Communicator& comm) { texts[static_cast<std::size_t>(comm.rank())] = comm.explain(Collective::all_reduce, 8); });
  CHECK_THAT(texts[0], Catch::Contains("rank 0 goes by shm to 1,3, tcp to 2,4"));
  CHECK_THAT(texts[1], Catch::Contains("rank 1 goes by shm to 0,3, tcp to 2,4"));
  CHECK_THAT(texts[2], Catch::Contains("rank 2 goes by shm to 4, tcp to 0-1,3"));
  everyone({1, 1, 2, 2, 3, 3}, [&](Communicator& comm) { if (comm.rank() == 2) texts[2] = comm.explain(Collective::all_reduce, 8); });
  CHECK_THAT(texts[2], Catch::Contains("3 groups of ranks share a host, at most 2 in each") && Catch::Contains("rank 2 goes by shm to 3, tcp to 0-1,4-5"));
  everyone({1, 2}, [&](Communicator& comm) { texts[static_cast<std::size_t>(comm.rank())] = comm.explain(Collective::all_reduce, 8); });
  CHECK_THAT(texts[1], Catch::Contains("rank 1 goes by tcp to 0"));
}

TEST_CASE("ranks of one host are close to each other, wherever they stand, and in communicators of some of them") {
  everyone({1, 2, 1, 2, 1, 3}, [](Communicator& comm) {
    const auto is = [](Communicator& c, std::vector<int> groups) {
      for (Rank r = 0; r < c.size(); ++r)
        if (c.group().of(r) != groups[static_cast<std::size_t>(r)]) return false;
      return c.group().count(c.size()) == *std::ranges::max_element(groups) + 1;
    };
    expect(is(comm, {0, 1, 0, 1, 0, 2}), "all");
    auto backwards = comm.split(0, -comm.rank());
    expect(is(*backwards, {0, 1, 2, 1, 2, 1}), "backwards");
    auto half = comm.split(comm.rank() / 3, 0);
    expect(is(*half, comm.rank() < 3 ? std::vector{0, 1, 0} : std::vector{0, 1, 2}), "halves");
    const auto offers = [](Communicator& c) { return c.explain(Collective::all_reduce, 1 << 20).find("\n  hierarchical   ") != std::string::npos; };
    expect(offers(comm) && offers(*backwards) && offers(*half) == (comm.rank() < 3), "what is made for it, where it fits");
    const auto before = comm.counters().frames_sent;
    comm.barrier({.algorithm = "hierarchical"});
    const auto frames = comm.counters().frames_sent - before;
    const auto messages = [&](const Grouping& group) {
      const Layout layout{Collective::barrier, comm.rank(), comm.size(), 0, 1, false, group};
      return Plan(Hierarchical::all_reduce(layout.shape()), layout, 1).messages_sent();
    };
    expect(frames == messages(comm.group()) && (comm.rank() > 0 || frames != messages({})), "a barrier in groups, too: " + std::to_string(frames));
    expect(comm.explain(Collective::all_reduce, 16 << 20).find("ranks: hierarchical") != std::string::npos, "and taken");
  });
  Options options;
  options.group = 1;
  for (const Caught& c : test::outcomes(detail::tcp_kind({}), {1, 1, 2, 2}, Way::route, [](Communicator& comm) { expect(!comm.group().matters(4) && !comm.duplicate().group().matters(4), "TALLY_GROUP=1: nobody"); }, options)) CHECK((c.ran && !c.error && !c.foreign));
}

TEST_CASE("communicators of some ranks share memory where these are on one host, and call ranks as they do") {
  everyone({1, 2, 1, 2, 1, 3}, [](Communicator& comm) {
    const int n = comm.size(), me = comm.rank();
    for (int round = 0; round < 3; ++round) {
      auto backwards = comm.split(0, -me);           // all, in another order
      auto pair = comm.split(me / 2, me);            // of two hosts, or of hosts 1 and 3
      auto odd = comm.split(me % 2, -me);            // of one host, but for rank 5
      auto deeper = backwards->split(backwards->rank() % 3, 0);
      std::vector<int> a(3000, me), b(100, 1 << me), c(70'000, 1), d(1, me);
      auto first = backwards->async_all_reduce(std::span(a), sum);
      pair->all_reduce(std::span(b), sum);
      odd->all_reduce(std::span(c), sum);
      deeper->all_reduce(std::span(d), sum);
      first.wait();
      expect(a == std::vector<int>(3000, n * (n - 1) / 2), "backwards");
      expect(b == std::vector<int>(100, 3 << (me / 2 * 2)), "pairs");
      expect(c == std::vector<int>(70'000, 3), "odd ones");
      expect(d[0] == (n - 1 - backwards->rank() % 3) * 2 - 3, "deeper");
      std::vector<int> order(static_cast<std::size_t>(n));
      backwards->all_gather(std::span<const int>(&me, 1), std::span(order));
      for (int i = 0; i < n; ++i) expect(order[static_cast<std::size_t>(i)] == n - 1 - i, "who is who");
    }
  });
}

TEST_CASE("communicators are made of communicators, ten deep") {
  everyone({1, 1, 2, 2}, [](Communicator& comm) {
    std::vector<Communicator> all;
    for (int i = 0; i < 10; ++i) all.push_back((i == 0 ? comm : all.back()).duplicate());
    for (Communicator& each : all) {
      int x = 1;
      each.all_reduce(std::span(&x, 1), sum);
      expect(x == 4, "a sum");
    }
  });
}

TEST_CASE("who comes late is blamed, on this host and on others", "[quiet]") {
  everyone({1, 1, 2, 2}, late_ranks_are_blamed);
}

TEST_CASE("who waits for both ways is woken by either, at once", "[quiet]") {
  // Rank 0 sleeps for one rank of its host and one of the other.
  everyone({1, 1, 2}, [](Communicator& comm) {
    nanoseconds longest{};
    for (int i = 0; i < 30; ++i) {
      int x = 1, y = 0;
      if (comm.rank() == 0) {
        auto one = comm.async_receive(std::span(&x, 1), 1);
        auto two = comm.async_receive(std::span(&y, 1), 2);
        one.wait();
        two.wait();
        expect(x == i && y == -i, "what was sent");
        comm.send(std::span<const int>(&x, 1), 1 + i % 2);
      } else {
        x = comm.rank() == 1 ? i : -i;
        if (i % 2 == comm.rank() % 2) std::this_thread::sleep_for(3ms);
        comm.send(std::span<const int>(&x, 1), 0);
        if (1 + i % 2 == comm.rank()) comm.receive(std::span(&y, 1), 0);
      }
      const std::int64_t queued = test::queued_ns();
      const auto began = std::chrono::steady_clock::now();
      comm.barrier();
      longest = std::max(longest, std::chrono::steady_clock::now() - began - nanoseconds(test::queued_ns() - queued));
    }
    expect(longest < 20ms, "no barrier waited for a look around, but " + std::to_string(longest.count()) + " ns");
  });
}

TEST_CASE("an abort, a mismatch and a rank that leaves reach everyone by both ways") {
  for (const Rank culprit : {0, 1, 2, 3}) {
    for (const Caught& c : test::outcomes({1, 1, 2, 2}, Way::route, [&](Communicator& comm) {
           if (comm.rank() == culprit) comm.abort("enough");
           comm.barrier();
         })) {
      INFO(c);
      CHECK(c.is(Errc::aborted));
      CHECK_THAT(c.text, Catch::Contains("rank " + std::to_string(culprit) + " aborted the communicator: enough"));
    }
    for (const Caught& c : test::outcomes({1, 1, 2, 2}, Way::route, [&](Communicator& comm) {
           std::vector<int> data(comm.rank() == culprit ? 7 : 8);
           comm.all_reduce(std::span(data), sum);
           comm.barrier();
         })) {
      INFO(c);
      CHECK(c.is(Errc::mismatch));
      CHECK_THAT(c.text, Catch::Contains("int32 x 7") && Catch::Contains("int32 x 8"));
    }
    const auto left = test::outcomes({1, 1, 2, 2}, Way::route, [&](Communicator& comm) {
      comm.barrier();
      if (comm.rank() != culprit) comm.barrier();
    });
    for (const Rank r : {0, 1, 2, 3}) {
      if (r == culprit) continue;
      const Caught& c = left[static_cast<std::size_t>(r)];
      INFO(c);
      CHECK((c.is(Errc::peer_left) || c.is(Errc::aborted)));
      CHECK(has(c.text, "rank " + std::to_string(culprit) + " left the communicator"));
    }
  }
}

TEST_CASE("a rank that is killed is missed by its neighbours and by other hosts", "[processes]") {
  for (const Rank victim : {1, 3}) {
    const Job job(4);  // its registry is the test's own
    const test::Shared<std::array<Caught, 4>> results;
    const Happened ready;
    std::vector<test::Process> ranks;
    for (Rank r = 0; r < 4; ++r)
      ranks.emplace_back([&, r] {
        (*results)[static_cast<std::size_t>(r)].record([&] {
          Communicator comm = test::over_tcp(job.join(r, static_cast<std::uint64_t>(r / 2 + 1)), {}, {}, Way::route);
          comm.barrier();
          if (r == victim) ready.now(), std::this_thread::sleep_for(100s);
          std::vector<int> data(300'000);
          comm.all_reduce(std::span(data), sum);
        });
      });
    ready.await();
    std::this_thread::sleep_for(50ms);
    const auto began = std::chrono::steady_clock::now();
    ::kill(ranks[static_cast<std::size_t>(victim)].pid(), SIGKILL);
    for (Rank r = 0; r < 4; ++r)
      if (r != victim) CHECK(ranks[static_cast<std::size_t>(r)].wait(20s));
    CHECK(std::chrono::steady_clock::now() - began < 10s);
    for (Rank r = 0; r < 4; ++r) {
      if (r == victim) continue;
      INFO((*results)[static_cast<std::size_t>(r)]);
      CHECK(has((*results)[static_cast<std::size_t>(r)].text, "rank " + std::to_string(victim) + " died"));
    }
  }
}

TEST_CASE("jobs by both ways give back all that they used") {
  const auto round = [] {
    everyone({1, 1, 2}, [](Communicator& comm) {
      auto other = comm.duplicate();
      std::vector<int> data(10'000);
      comm.all_reduce(std::span(data), sum);
      other.all_reduce(std::span(data), sum);
    });
  };
  round();
  const int before = test::open_descriptors();
  for (int i = 0; i < 10; ++i) round();
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("two hosts of two and of four ranks: memory within, a cable between, which is cut at last", "[processes][quiet]") {
  for (const int width : {2, 4}) {
    const test::TwoHosts hosts;
    if (!hosts.problem().empty()) return void(std::printf("skipped: %s\n", hosts.problem().c_str()));
    const int n = 2 * width;
    const test::Shared<std::array<Caught, 8>> results;
    const Happened ready;
    std::vector<test::Process> ranks;
    for (Rank r = 0; r < n; ++r)
      ranks.emplace_back([&, r] {
        (*results)[static_cast<std::size_t>(r)].record([&] {
          hosts.enter(r / width);
          Options options;
          options.timeout = 10s;
          JobInfo job;
          job.rank = r;
          job.size = n;
          Communicator comm = detail::tcp_communicator(job, detail::Meeting("10.213.0.1:29556"), options, {});
          expect(comm.transport_name() == "shm+tcp", "both ways");
          for (const std::size_t count : {1u, 1000u, 300'000u}) {
            std::vector<int> data(count, r);
            const Report report = comm.all_reduce(std::span(data), sum);
            expect(data.back() == n * (n - 1) / 2, "a sum between hosts");
            if (count == 300'000) expect(report.algorithm_name() == "hierarchical", "what is made for this, not " + std::string(report.algorithm_name()));
          }
          if (width == 2) late_ranks_are_blamed(comm);
          comm.set_timeout(1s);
          comm.barrier();
          if (r == 0) ready.now();
          for (int x = 1;;) comm.all_reduce(std::span(&x, 1), max);
        });
      });
    const Caught met = caught([&] { ready.await(); });
    for (Rank r = 0; r < n; ++r) UNSCOPED_INFO((*results)[static_cast<std::size_t>(r)]);
    REQUIRE(!met.foreign);
    std::this_thread::sleep_for(100ms);
    const auto began = std::chrono::steady_clock::now();
    hosts.cut();
    for (auto& rank : ranks) CHECK(rank.wait(20s));
    CHECK(std::chrono::steady_clock::now() - began < 10s);
    for (Rank r = 0; r < n; ++r) {
      const Caught& c = (*results)[static_cast<std::size_t>(r)];
      INFO(c);
      CHECK((c.is(Errc::timeout) || c.is(Errc::aborted)));
    }
  }
}
