// SPDX-License-Identifier: Apache-2.0
// TCP as a transport: everything that all transports must do, and what can go wrong between hosts.
#include <catch2/catch.hpp>

#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>

#include <cstdlib>
#include <exception>
#include <numeric>
#include <random>
#include <thread>

#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "network_suite.hpp"
#include "sanitized.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::all, test::Caught, test::caught, test::expect, test::Happened, test::has, test::Job, test::late_ranks_are_blamed, test::knock, test::loopback, test::most_descriptors, test::on_ranks, test::say;

namespace {

void run(int n, const SlotOptions& options, const conformance::BodyOf<TcpTransport>& body, int family = 4) {
  const Job job(n, family);
  TcpOptions tcp;
  tcp.lanes = options.lanes;
  tcp.checksum = family == 6;
  tcp.frame_bytes = options.slot_bytes;
  tcp.window = static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost);
  on_ranks(n, [&](Rank r) {
    TcpTransport transport(job.join(r), TcpTransport::world, all(n), tcp);
    body(transport);
    transport.leave();
  });
}

template <class F>
std::vector<Caught> outcomes(int n, F&& f, const TcpOptions& tcp = {}) {
  return test::outcomes(std::vector<std::uint64_t>(static_cast<std::size_t>(n)), test::Way::network, f, {}, tcp);
}
template <class F>
void everyone(int n, F&& f, const TcpOptions& tcp = {}) {
  for (const Caught& c : outcomes(n, f, tcp)) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}

}  // namespace

TEST_CASE("TCP over IPv4 conforms") {
  conformance::conformance<TcpTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, body); });
}
TEST_CASE("TCP over IPv6, with checksums, conforms") {
  try {
    (void)detail::listen_at(loopback(6));
  } catch (const Error& error) {
    std::printf("skipped: no IPv6 here: %s\n", error.what());
    return;
  }
  conformance::conformance<TcpTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, body, 6); });
}

TEST_CASE("every algorithm is right over TCP, whatever the sizes, in a wide window and a narrow one") {
  TcpOptions narrow;
  narrow.window = 3000;
  narrow.frame_bytes = 1000;
  narrow.checksum = true;
  for (const TcpOptions& tcp : {TcpOptions{}, narrow}) test::every_algorithm_is_right(detail::tcp_kind(tcp));
}
TEST_CASE("groups, duplicates and operations in the background go over TCP, too") { test::groups_are_right(detail::tcp_kind({})); }
TEST_CASE("who comes late is blamed over TCP, and a report adds up to the nanosecond", "[quiet]") { everyone(3, late_ranks_are_blamed); }
TEST_CASE("what was sent over TCP is there, however soon its sender goes") { test::what_was_sent_is_there(detail::tcp_kind({})); }
TEST_CASE("calls that do not match, an abort, a deadline and a rank that leaves are named over TCP") { test::faults_are_named(detail::tcp_kind({})); }
TEST_CASE("a rank that is killed is missed, by who receives and by who sends over TCP", "[processes]") { test::who_is_killed_is_missed(detail::tcp_kind({})); }

TEST_CASE("ranks of several hosts, whose clocks differ by hours and by 50 ppm, know who waited for whom", "[quiet]") {
  const Job job(4);
  const test::OtherClock fast(1, 50), slow(-1, -50);
  on_ranks(4, [&](Rank r) {
    // Ranks 0 and 3 are on one host, 1 and 2 on one each.
    const Clock clock = r == 1 ? Clock(fast) : r == 2 ? Clock(slow) : Clock::host();
    Communicator comm = test::over_tcp(job.join(r, static_cast<std::uint64_t>(r % 3), clock), {}, {}, test::Way::network, clock);
    late_ranks_are_blamed(comm);
  });
}

TEST_CASE("who does not receive for longer than any deadline loses nothing and is not given up") {
  Job job(2);
  job.limit = 1s;  // by which peers are given up
  on_ranks(2, [&](Rank r) {
    Communicator comm = test::over_tcp(job.join(r));
    std::vector<int> data(900'000);  // more than the kernel holds, less than the window
    if (r == 0) {
      std::iota(data.begin(), data.end(), 0);
      comm.send(std::span<const int>(data), 1);
    } else {
      std::this_thread::sleep_for(3s);
      comm.receive(std::span(data), 0);
      for (std::size_t i = 0; i < data.size(); ++i) expect(data[i] == static_cast<int>(i), "all of it");
    }
    comm.barrier();
  });
}

TEST_CASE("a rank that joined and went before it had a communicator has left it") {
  const Job job(3);
  std::vector<Caught> results(3);
  on_ranks(3, [&](Rank r) {
    results[static_cast<std::size_t>(r)].record([&] {
      auto node = job.join(r);
      if (r == 2) return;  // something else failed
      Communicator comm = test::over_tcp(std::move(node));
      comm.barrier();
    });
  });
  for (const Rank r : {0, 1}) {
    const Caught& c = results[static_cast<std::size_t>(r)];
    INFO(c);
    CHECK((c.is(Errc::peer_left) || c.is(Errc::aborted)));
    CHECK(has(c.text, "rank 2 left the communicator"));
  }
}

TEST_CASE("there may be many communicators") {
  const int many = test::sanitized ? 60 : most_descriptors() < 8192 ? 100 : 600;
  everyone(2, [&](Communicator& comm) {
    std::vector<Communicator> all;
    for (int i = 0; i < many; ++i) all.push_back(comm.duplicate());
    for (Communicator& each : {std::ref(all.front()), std::ref(all.back())}) {
      int x = 1;
      each.all_reduce(std::span(&x, 1), sum);
      expect(x == 2, "a sum");
    }
  });
}

TEST_CASE("a rank that has left over TCP, and its process with it, is missed by who never had to do with it") { test::who_left_is_missed(detail::tcp_kind({})); }
TEST_CASE("whatever is under way over TCP, an abort, a deadline and a call that does not match end it") { test::faults_end_what_is_under_way(detail::tcp_kind({})); }
TEST_CASE("a short message over TCP needs nobody to look at it") { test::short_messages_need_nobody(detail::tcp_kind({})); }
TEST_CASE("a short message over TCP needs its sender no longer") { test::short_messages_need_no_sender(detail::tcp_kind({})); }

TEST_CASE("two hosts: a cut cable is noticed by the deadline, and nobody is accused of what nobody knows", "[processes]") {
  const test::TwoHosts hosts;
  if (!hosts.problem().empty()) return void(std::printf("skipped: %s\n", hosts.problem().c_str()));
  const test::Shared<std::array<Caught, 2>> results;
  const Happened ready;
  std::vector<test::Process> ranks;
  for (Rank r = 0; r < 2; ++r)
    ranks.emplace_back([&, r] {
      (*results)[static_cast<std::size_t>(r)].record([&] {
        hosts.enter(r);
        Options options;
        options.timeout = 5s;
        JobInfo job;
        job.rank = r;
        job.size = 2;
        Communicator comm = detail::tcp_communicator(job, detail::Meeting("10.213.0.1:29555"), options, {});
        std::vector<float> data(100'000, 1);
        comm.all_reduce(std::span(data), sum);
        expect(data.back() == 2, "a sum between hosts");
        comm.set_timeout(1s);
        ready.now();
        for (;;) comm.all_reduce(std::span(data).first(1), max);
      });
    });
  const Caught met = caught([&] { ready.await(); });
  INFO((*results)[0]);
  INFO((*results)[1]);
  REQUIRE(!met.foreign);
  std::this_thread::sleep_for(100ms);
  const auto began = std::chrono::steady_clock::now();
  hosts.cut();
  for (auto& rank : ranks) CHECK(rank.wait(20s));
  CHECK(std::chrono::steady_clock::now() - began < 10s);
  for (const Caught& c : *results) {
    INFO(c);
    CHECK(c.is(Errc::timeout));
    CHECK_THAT(c.text, !Catch::Contains("has not called it"));
  }
}

TEST_CASE("strangers neither join nor stall nor crash a job, wherever they knock") {
  const Job job(3);
  const auto http = knock(job.address), silent = knock(job.address), half = knock(job.address), huge = knock(job.address);
  say(http, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
  say(half, std::string_view("\x40\0\0", 3));
  say(huge, std::string(8, '\xff'));
  std::vector<detail::FileDescriptor> crowd;
  for (int i = 0; i < 200; ++i) crowd.push_back(knock(job.address));
  on_ranks(3, [&](Rank r) {
    const auto node = job.join(r);
    Communicator comm = test::over_tcp(node);
    std::vector<detail::FileDescriptor> visitors;
    for (int i = 0; i < 20; ++i)
      for (Rank other = 0; other < 3; ++other) {
        int error = 0;
        visitors.push_back(detail::begin_connect(node->address(other), error));
        (void)detail::wait_for_events(visitors.back().get(), POLLOUT, std::chrono::steady_clock::now() + 5s);
        detail::ChannelHello hello;  // without the key
        hello.communicator = TcpTransport::world;
        hello.from = 0;
        hello.to = other;
        if (i % 4 == 0) say(visitors.back(), "GET / HTTP/1.1\r\n\r\n                                                     ");
        if (i % 4 == 1) say(visitors.back(), {reinterpret_cast<const char*>(&hello), sizeof hello});
        if (i % 4 == 2) say(visitors.back(), {reinterpret_cast<const char*>(&hello), 20});
      }
    for (int i = 0; i < 50; ++i) {
      int x = 1;
      comm.all_reduce(std::span(&x, 1), sum);
      expect(x == 3, "sum");
    }
  });
}

TEST_CASE("frames that no rank would send are refused by name, and make nobody allocate") {
  const auto frame = [](auto&& change) {
    detail::FrameHeader h;
    h.kind = detail::FrameHeader::data;
    h.flags = detail::FrameHeader::first | detail::FrameHeader::last | detail::FrameHeader::fingerprinted;
    h.total = h.bytes = 16;
    h.operation = 1;
    change(h);
    return std::string(detail::ControlStream::as_bytes(h)) + std::string(16, 'x');
  };
  // Eight of sixteen bytes, or so; which come by a stripe, or not.
  const auto part = [](unsigned flags, std::uint32_t bytes) {
    detail::FrameHeader h;
    h.kind = detail::FrameHeader::data;
    h.flags = static_cast<std::uint8_t>(flags | detail::FrameHeader::fingerprinted);
    h.total = 16;
    h.bytes = bytes;
    h.operation = 1;
    h.culprit = 1;
    return std::string(detail::ControlStream::as_bytes(h));
  };
  constexpr unsigned first = detail::FrameHeader::first, stripe = detail::FrameHeader::stripe_unit;
  const std::pair<std::string, const char*> cases[] = {
      {std::string(100, 'A'), "no frame"},
      {frame([](auto& h) { h.kind = 9; }), "kind 9"},
      {frame([](auto& h) { h.kind = detail::FrameHeader::credit; h.bytes = 0; }), "has no place here"},
      {frame([](auto& h) { h.bytes = 0xffffffff; h.total = 0xffffffff; }), "4294967295 bytes, where"},
      {frame([](auto& h) { h.total = ~0ull; }), "of a message of"},
      {frame([](auto& h) { h.total = 8; }), "of a message of 8"},
      {frame([](auto& h) { h.kind = detail::FrameHeader::goodbye; }), "without data that announces 16"},
      {part(first | stripe, 8) + part(0, 8), "in the middle of what comes by other connections"},
      {part(first | stripe, 8) + part(15 * stripe, 12), "more than was announced"},
  };
  for (const auto& [bytes, problem] : cases) {
    const Job job(2);
    std::shared_ptr<detail::NetworkNode> liar;
    Caught c;
    std::thread rank_0([&] {
      c.record([&] {
        TcpTransport transport(job.join(0), TcpTransport::world, all(2));
        conformance::Driver driver{0};
        std::vector<std::byte> data(16);
        Transfer t = conformance::receiving(1, data, 0, 16);
        driver.post(transport, t);
        driver.finish(transport);
      });
    });
    liar = job.join(1);
    const auto channel = knock(liar->address(0));
    detail::ChannelHello hello;
    hello.communicator = TcpTransport::world;
    hello.from = 1;
    hello.to = 0;
    hello.window = TcpOptions{}.window;
    hello.key = liar->key();
    say(channel, std::string(detail::ControlStream::as_bytes(hello)) + bytes);
    rank_0.join();
    INFO(c);
    CHECK(c.is(Errc::protocol));
    CHECK_THAT(c.text, Catch::Contains("rank 1 (127.0.0.1:") && Catch::Contains(problem));
  }
}

TEST_CASE("jobs over TCP give back all that they used") {
  const auto round = [] {
    everyone(3, [](Communicator& comm) {
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

TEST_CASE("64 ranks on few cores, over TCP, round after round") {
  const int n = test::sanitized ? 12 : most_descriptors() < 12'000 ? 16 : 64;  // where all send to all, each pair has four of them
  const int rounds = test::sanitized ? 3 : std::getenv("TALLY_TEST_LONG") ? 1000 : 12;
  const long alone = test::resident_bytes();
  everyone(n, [&](Communicator& comm) {
    std::vector<int> data(1 << 18);
    int descriptors = 0;
    long resident = 0;
    for (int i = 0; i < rounds; ++i) {
      std::fill(data.begin(), data.end(), comm.rank());
      comm.all_reduce<Ring>(std::span(data), sum);
      expect(data.front() == n * (n - 1) / 2 && data.back() == data.front(), "sum");
      comm.barrier();
      if (comm.rank() == 0 && i == 1) descriptors = test::open_descriptors(), resident = test::resident_bytes();
      if (comm.rank() == 0 && i > 1) expect(test::open_descriptors() == descriptors, "no more descriptors than before");
      if (comm.rank() == 0 && i > 1 && !test::sanitized) expect(test::resident_bytes() < resident + (4 << 20), "round " + std::to_string(i) + " has " + std::to_string((test::resident_bytes() - resident) >> 10) + " KiB more than the second");
      comm.barrier();
    }
    if (comm.rank() == 0) std::printf("%d ranks, %d rounds: %ld KiB each, with the megabyte that is reduced\n", n, rounds, ((test::resident_bytes() - alone) / n) >> 10);
  });
}
