// SPDX-License-Identifier: Apache-2.0
// Payloads of long messages that go over several TCP connections at once: what arrives is what was sent, whichever of them is fast,
// slow, late, missing or cut; and what waits for them says so.
#include <catch2/catch.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "fault_proxy.hpp"
#include "network_suite.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::all, test::Caught, test::caught, test::expect, test::FaultProxy, test::Faults, test::Job, test::knock, test::on_ranks, test::say;

namespace {

TcpOptions stripes(int sockets) {
  TcpOptions tcp;
  tcp.sockets = sockets;
  return tcp;
}
/// Frames so short that nearly everything is a long message.
TcpOptions short_frames(int sockets, bool checksum = false) {
  TcpOptions tcp = stripes(sockets);
  tcp.frame_bytes = 1000;
  tcp.window = 5000;
  tcp.checksum = checksum;
  return tcp;
}

void all_well(const std::vector<Caught>& outcomes) {
  for (const Caught& c : outcomes) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}
/// Rank 1 of that job opens a channel to rank 0, whose node this is; stripe 0: the channel's own connection.
detail::FileDescriptor call(const detail::NetworkNode& rank_0, unsigned stripe, std::uint64_t communicator = TcpTransport::world) {
  auto fd = knock(rank_0.address(0));
  detail::ChannelHello hello;
  hello.lane = 1 | stripe << 16;
  hello.communicator = communicator;
  hello.from = 1;
  hello.to = 0;
  hello.key = rank_0.key();
  say(fd, detail::ControlStream::as_bytes(hello));
  return fd;
}
/// Rank 0 sends rank 1 numbers.
Report numbers(Communicator& comm, std::size_t count) {
  std::vector<std::uint32_t> data(count);
  const auto value = [](std::size_t i) { return static_cast<std::uint32_t>(i * 2654435761u); };
  if (comm.rank() == 0) {
    for (std::size_t i = 0; i < count; ++i) data[i] = value(i);
    return comm.send(std::span<const std::uint32_t>(data), 1, 5);
  }
  const Report report = comm.receive(std::span(data), 0, 5).report;
  for (std::size_t i = 0; i < count; ++i) expect(data[i] == value(i), "what was sent, at " + std::to_string(i));
  return report;
}

}  // namespace

TEST_CASE("who dies while payloads come by stripes is missed", "[processes]") { test::who_is_killed_is_missed(detail::tcp_kind(stripes(3))); }

TEST_CASE("without a descriptor for more connections one does", "[processes]") {
  if (test::sanitized) return void(std::puts("skipped: UBSan needs descriptors of its own"));
  test::Process child([] {
    const Job job(2);
    const test::Happened ready, full;
    on_ranks(2, [&](Rank r) {
      Communicator comm = test::over_tcp(job.join(r), {}, stripes(4));
      int x = 1;
      comm.all_reduce(std::span(&x, 1), sum);
      comm.send_receive(std::span<const int>(&r, 1), 1 - r, std::span(&x, 1), 1 - r, 5);  // the connections that both need
      comm.barrier();  // the other one has them, too: what it was sent may still lie in the kernel
      if (r == 0) {
        int last = 0;
        for (int fd = 0; fd < 1000; ++fd)
          if (::fcntl(fd, F_GETFD) >= 0) last = fd;
        const rlimit files{static_cast<rlim_t>(last) + 1, static_cast<rlim_t>(last) + 1};
        ::setrlimit(RLIMIT_NOFILE, &files);
        while (::open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0) {
        }
        full.now();
      }
      full.await();
      numbers(comm, 1'000'000);
    });
  });
  CHECK(child.wait(20s) == 0);
}

TEST_CASE("a stripe that comes where descriptors are scarce is refused, and its sender hears of it", "[processes]") {
  test::Process child([] {
    const Job job(2);
    std::shared_ptr<detail::NetworkNode> nodes[2];
    on_ranks(2, [&](Rank r) { nodes[r] = job.join(r); });
    const auto answer = [&] {
      const auto fd = call(*nodes[0], 2);
      char taken = 0;
      ssize_t got = -1;
      expect(test::eventually(5s, [&] {
        nodes[0]->attend();
        got = ::recv(fd.get(), &taken, 1, MSG_DONTWAIT);
        return got >= 0 || errno == ECONNRESET;
      }), "an answer");
      return got == 1 && taken == '+';
    };
    const int last = knock(nodes[0]->address(0)).get();
    rlimit files{static_cast<rlim_t>(last) * 4, static_cast<rlim_t>(last) * 4};
    ::setrlimit(RLIMIT_NOFILE, &files);
    expect(answer(), "it is taken");
    files.rlim_cur = static_cast<rlim_t>(last) * 3 / 2;
    ::setrlimit(RLIMIT_NOFILE, &files);
    expect(!answer(), "it is refused");
  });
  CHECK(child.wait(20s) == 0);
}

TEST_CASE("with no descriptor left, a stripe is refused, one connection that is needed is let in, and the next is a named error", "[processes]") {
  if (test::sanitized) return void(std::puts("skipped: UBSan needs descriptors of its own"));
  test::Process child([] {
    const Job job(2);
    std::shared_ptr<detail::NetworkNode> nodes[2];
    on_ranks(2, [&](Rank r) { nodes[r] = job.join(r); });
    const auto fill = [] {
      const rlimit files{256, 256};
      ::setrlimit(RLIMIT_NOFILE, &files);
      while (::open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0) {
      }
    };
    const auto is_open = [](const detail::FileDescriptor& fd) {
      char byte = 0;
      return ::recv(fd.get(), &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN;
    };
    const auto stripe = call(*nodes[0], 2);
    fill();
    nodes[0]->attend();
    expect(test::eventually(5s, [&] { return nodes[0]->attend(), !is_open(stripe); }), "the stripe is refused");
    ::close(::dup2(stripe.get(), 255));  // two descriptors for what calls
    ::close(254);
    const auto needed = call(*nodes[0], 0), more = call(*nodes[0], 0, TcpTransport::world + 1);
    fill();
    expect(test::eventually(5s, [&] {
      try {
        nodes[0]->attend();
      } catch (const TransportError& e) {
        return e.code() == Errc::no_resources && std::string(e.what()).find("no descriptor for a rank that connects") != std::string::npos;
      }
      return false;
    }), "the second one cannot be had");
    expect(is_open(needed) && is_open(more), "the first one is kept");
  });
  CHECK(child.wait(20s) == 0);
}

TEST_CASE("TCP with stripes conforms") {
  for (const int sockets : {2, 15})
    conformance::conformance<TcpTransport>([sockets](int n, const SlotOptions& options, const auto& body) {
      const Job job(n);
      TcpOptions tcp = stripes(sockets);
      tcp.lanes = options.lanes;
      tcp.frame_bytes = options.slot_bytes;
      tcp.window = static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost);
      on_ranks(n, [&](Rank r) {
        TcpTransport transport(job.join(r), TcpTransport::world, all(n), tcp);
        body(transport);
        transport.leave();
      });
    });
}
TEST_CASE("every algorithm is right with stripes, whatever the sizes") {
  for (const TcpOptions& tcp : {short_frames(2), short_frames(5, true)}) test::every_algorithm_is_right(detail::tcp_kind(tcp));
}
TEST_CASE("groups and operations in the background have stripes, too") { test::groups_are_right(detail::tcp_kind(short_frames(3))); }
TEST_CASE("what was sent by stripes is there, however soon its sender goes") { test::what_was_sent_is_there(detail::tcp_kind(short_frames(3))); }
TEST_CASE("faults are named with stripes") { test::faults_are_named(detail::tcp_kind(short_frames(3))); }
TEST_CASE("who left is missed with stripes") { test::who_left_is_missed(detail::tcp_kind(stripes(3))); }
TEST_CASE("whatever is under way by stripes, an abort, a deadline and a call that does not match end it") { test::faults_end_what_is_under_way(detail::tcp_kind(stripes(3))); }

TEST_CASE("long messages of all sizes and elements, copied and combined, in and out of order with short ones") {
  for (const TcpOptions& tcp : {stripes(3), short_frames(4)})
    all_well(test::outcomes({0, 0, 0}, test::Way::network, [](Communicator& comm) {
      const Rank me = comm.rank();
      const auto next = (me + 1) % 3, before = (me + 2) % 3;
      for (const std::size_t count : {700u, 2999u, 100'001u, 1'000'000u, 130'000u}) {
        std::vector<std::complex<double>> sums(count / 8);
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = {static_cast<double>(i), static_cast<double>(me)};
        comm.all_reduce(std::span(sums), sum);
        for (std::size_t i = 0; i < sums.size(); ++i) expect(sums[i] == std::complex<double>(3.0 * static_cast<double>(i), 3.0), "a sum of pairs");
        std::vector<int> out(count), in(count);
        std::iota(out.begin(), out.end(), me);
        int small = me, theirs = -1;
        // Received in another order than they were sent in.
        Operation long_one = comm.async_send(std::span<const int>(out), next, 1), short_one = comm.async_send(std::span<const int>(&small, 1), next, 2);
        comm.receive(std::span(&theirs, 1), before, 2);
        comm.receive(std::span(in), before, 1);
        long_one.wait();
        short_one.wait();
        expect(theirs == before, "the short one");
        for (std::size_t i = 0; i < count; ++i) expect(in[i] == static_cast<int>(i) + before, "the long one");
      }
    }, {}, tcp));
}

TEST_CASE("stripes may come late") {
  const Job job(2);
  FaultProxy proxy(job.address, {.delay = 20ms});
  all_well(test::through(job, proxy, stripes(4), [&](Communicator& comm) {
    comm.barrier();
    for (const std::size_t count : {200'000u, 200'000u, 3'000'000u, 200'000u}) numbers(comm, count);
  }));
  const std::vector<std::size_t> carried = proxy.carried();
  REQUIRE(carried.size() == 6);
  CHECK(std::count_if(carried.begin() + 2, carried.end(), [](std::size_t bytes) { return bytes > 1'000'000; }) >= 2);
}

TEST_CASE("what waits for room on stripes keeps no other operation from its deadline, an abort, or a look at who is there") {
  for (const bool aborts : {false, true}) {
    const test::Happened over;
    const auto results = test::outcomes({0, 0}, test::Way::network, [&](Communicator& comm) {
      std::vector<int> much(2'000'000);
      int x = 0;
      Operation sending;
      comm.barrier();
      if (comm.rank() == 1) {
        std::this_thread::sleep_for(100ms);
        if (aborts) comm.abort("enough");
        return over.await();
      }
      over.after([&] {
        sending = comm.async_send(std::span<const int>(much), 1, 1);
        expect(!sending.wait_for(10ms), "nobody receives it");
        comm.receive(std::span(&x, 1), 1, 9, aborts ? CallOptions{} : CallOptions{.timeout = 200ms});
      });
    }, {}, short_frames(4));
    INFO(results[0]);
    CHECK(results[0].is(aborts ? Errc::aborted : Errc::timeout));
  }
}

TEST_CASE("stripes carry as much as each can", "[timing]") {
  const Job job(2);
  // Of the barriers; of the messages' own connection; and its stripes.
  FaultProxy proxy(job.address, {.of_connections = {0, 0, 10e6, 10e6, 15e6, 2e6}});
  std::vector<nanoseconds> took(2);
  all_well(test::through(job, proxy, stripes(4), [&](Communicator& comm) {
    comm.barrier();
    numbers(comm, 10);
    took[static_cast<std::size_t>(comm.rank())] = numbers(comm, 6'000'000).elapsed;
  }));
  const std::vector<std::size_t> carried = proxy.carried();
  REQUIRE(carried.size() == 6);
  std::size_t of_stripes = 0;
  for (std::size_t i = 2; i < 6; ++i) of_stripes += carried[i];
  std::printf("24 MB by 10, 10, 15 and 2 MB/s took %.0f ms: %zu, %zu, %zu and %zu bytes\n", static_cast<double>(took[1].count()) * 1e-6, carried[2], carried[3], carried[4], carried[5]);
  CHECK(of_stripes > 18'000'000);  // the first went before they were there
  for (std::size_t i = 2; i < 6; ++i) CHECK(carried[i] > 0);
  CHECK(carried[4] > carried[2]);
  CHECK(carried[4] > carried[3]);
  CHECK(carried[5] < of_stripes / 6);
  CHECK(took[1] < 1500ms);  // by one of 15 MB/s it would take 1600; by all of them, evenly, 3000
}

TEST_CASE("a stripe that breaks ends what goes by it, and says between whom; one that never came about is not missed") {
  for (const std::size_t at : {std::size_t{0}, std::size_t{300'000}}) {
    const Job job(2);
    FaultProxy proxy(job.address, {.breaks = 3, .breaks_at = at});
    const auto results = test::through(job, proxy, stripes(3), [](Communicator& comm) {
      comm.barrier();
      for (int i = 0; i < 20; ++i) numbers(comm, test::sanitized ? 500'000 : 2'000'000);
    });
    if (at == 0) all_well(results);
    for (const Caught& c : results) {
      if (at == 0) continue;
      INFO(c);
      CHECK((c.is(Errc::peer_lost) || c.is(Errc::aborted)));
      CHECK_THAT(c.text, Catch::Contains("between rank") || Catch::Contains("from rank 0 to rank 1"));
    }
  }
}

TEST_CASE("what is damaged on a stripe is found by its checksum") {
  const Job job(2);
  FaultProxy proxy(job.address, {.damaged = 20'000'000});
  TcpOptions tcp = stripes(3);
  tcp.checksum = true;
  const auto results = test::through(job, proxy, tcp, [](Communicator& comm) {
    comm.barrier();
    for (int i = 0; i < 20; ++i) numbers(comm, 2'000'000);
  });
  INFO(results[1]);
  CHECK(results[1].is(Errc::protocol));
  CHECK_THAT(results[1].text, Catch::Contains("damaged"));
}

TEST_CASE("jobs with stripes give back all that they used") {
  const auto round = [] {
    all_well(test::outcomes({0, 0, 0}, test::Way::network, [](Communicator& comm) {
      std::vector<int> data(1'000'000);
      comm.all_reduce(std::span(data), sum);
    }, {}, stripes(4)));
  };
  round();
  const int before = test::open_descriptors();
  for (int i = 0; i < 5; ++i) round();
  CHECK(test::open_descriptors() == before);
}

// What is told of the time that bytes are on their way.

TEST_CASE("who waits for a slow network says so, and does not call it copying", "[timing]") {
  for (const int sockets : {1, 4})
    for (const std::size_t window : {std::size_t{4} << 20, std::size_t{64} << 20}) {
      const Job job(2);
      const FaultProxy proxy(job.address, {.bytes_per_second = 50e6});
      TcpOptions tcp = stripes(sockets);
      tcp.window = window;
      all_well(test::through(job, proxy, tcp, [&](Communicator& comm) {
        comm.barrier();
        const auto looks_right = [&](auto&& call, const std::string& what) {
          const std::int64_t before = test::queued_ns();
          const Report r = call();
          const nanoseconds without_core(test::queued_ns() - before);
          const auto ms = [](nanoseconds time) { return std::to_string(test::ms(time.count())) + " ms"; };
          const std::string figures = what + " of rank " + std::to_string(comm.rank()) + ": " + ms(r.elapsed) + ", busy " + ms(r.busy()) + ", network " + ms(r.wait_transfer) + ", credit " + ms(r.wait_credit) + ", local " + ms(r.wait_local);
          expect(r.busy() + r.idle() == r.elapsed, "the parts are the whole: " + figures);
          expect(r.busy() <= r.elapsed / 3 + without_core, "it hardly works: " + figures + ", without a core " + ms(without_core));
          expect(r.wait_transfer + r.wait_credit >= r.elapsed / 2 - without_core, "it waits for what is on its way: " + figures);
          expect(r.wait_local <= r.elapsed / 10, "and not for itself: " + figures);
          if (comm.rank() == 1) expect(r.wait_transfer >= r.elapsed / 2 - without_core && r.blame().at(0).rank == 0, "who receives waits for the network: " + figures);
        };
        looks_right([&] { return numbers(comm, 4'000'000); }, "numbers");  // 320 ms
        comm.barrier();
        std::vector<float> data(4'000'000, 1);
        looks_right([&] { return comm.all_reduce(std::span(data), sum); }, "a sum");
        expect(data == std::vector<float>(data.size(), 2), "it is right");
      }));
    }
}

TEST_CASE("a number of sockets that makes no sense is refused") {
  for (const char* wrong : {"0", "16", "four"}) {
    const test::Environment set("TALLY_SOCKETS", wrong);
    const Caught c = caught([] { (void)TcpOptions::from_environment({}); });
    INFO(c);
    CHECK(c.is(Errc::invalid_argument));
    CHECK_THAT(c.text, Catch::Contains("TALLY_SOCKETS") && Catch::Contains(wrong));
  }
  const test::Environment set("TALLY_SOCKETS", "7");
  CHECK(TcpOptions::from_environment({}).sockets == 7);
}
