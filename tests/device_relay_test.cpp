// SPDX-License-Identifier: Apache-2.0
// Device communicators whose ranks are on several hosts.
#include <catch2/catch.hpp>

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <tally/device_communicator.hpp>
#include <tally/tally.hpp>

#include "device_suite.hpp"
#include "emulated_driver.hpp"
#include "network.hpp"
#include "processes.hpp"
#include "sanitized.hpp"

using namespace std::chrono_literals;
using tally::Communicator, tally::DeviceOperation, tally::Errc, tally::Error, tally::Rank, tally::Report;
using test::Affine, test::at, test::check, test::Compose, test::expect, test::expect_error, test::folded, test::input_of, test::value;
using test::EmulatedArray, test::EmulatedDevices, test::EmulatedDriver, test::EmulatedStream;
using Devices = tally::DeviceCommunicator<EmulatedDriver>;

namespace {

EmulatedDriver on_host(int host, int process = 0) { return EmulatedDriver(0, process, 64, host); }

/// All operations on a communicator's ranks, whose devices are on these hosts.
void all_is_right(Communicator& comm, const std::vector<int>& hosts, const std::string& one_more = {}) {
  EmulatedDriver driver = on_host(hosts[at(comm.rank())], comm.rank());
  EmulatedStream stream;
  {
    Devices gpu(comm, driver, {.blocks = 2, .threads = 1, .packet_bytes = 1024, .frame_bytes = 256});
    for (Rank r = 0; r < comm.size(); ++r) check(gpu.link_to(r) == (hosts[at(r)] == hosts[at(comm.rank())] ? tally::device::Link::same_device : tally::device::Link::network));
    struct Buffer {
      EmulatedArray<Affine> array;
      tally::DeviceSpan<Affine> span() const { return array.span(); }
      std::vector<Affine> values() const { return array.values(); }
    };
    const auto make = [&](const std::vector<Affine>& values) { return Buffer{{driver, values}}; };
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{23}, std::size_t{1000}}) {
      if (test::sanitized && count == 1000) continue;
      test::every_operation(gpu, &stream, make, count, "", false);
      test::every_operation(gpu, &stream, make, count, "", true);
    }
    auto symmetric = gpu.allocate<std::uint32_t>(100);
    std::fill_n(symmetric.data(), 100, 1u);
    gpu.all_reduce(symmetric, tally::sum, &stream).wait();
    check(symmetric.data()[99] == hosts.size());
    if (!one_more.empty()) {
      const Report report = gpu.all_reduce(symmetric, tally::max, &stream, {.algorithm = one_more}).wait();
      check(report.algorithm_name() == one_more);
      check(symmetric.data()[99] == hosts.size());
    }
    for (const char* const name : {"packets", "zero_copy"}) expect_error(Errc::unsupported, "on several hosts", [&] { (void)gpu.all_reduce(symmetric, tally::sum, &stream, {.algorithm = name}); });
  }
  comm.barrier();
}

}  // namespace

TEST_CASE("ranks on several hosts: every operation, by what is chosen and by steps by name") {
  const std::vector<std::vector<int>> placements{{0, 1}, {0, 0, 1}, {0, 1, 0, 1}, {0, 1, 2}, {0, 0, 1, 1, 1}};
  for (const std::vector<int>& hosts : placements)
    tally::launch(static_cast<int>(hosts.size()), [&](Communicator& comm) { all_is_right(comm, hosts); }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("the same over TCP between hosts, also in two levels") {
  for (const std::vector<int>& hosts : {std::vector<int>{0, 1}, std::vector<int>{0, 0, 1, 1}}) {
    std::vector<std::uint64_t> places;
    for (const int host : hosts) places.push_back(static_cast<std::uint64_t>(host + 1));
    for (const test::Caught& each : test::outcomes(places, test::Way::route, [&](Communicator& comm) { all_is_right(comm, hosts, hosts.size() > 2 ? "hierarchical" : "ring"); })) {
      INFO(each);
      CHECK(each.ran);
      CHECK_FALSE((each.error || each.foreign));
    }
  }
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("between hosts: many frames at once, graphs, blocks of sizes of their own, factors") {
  constexpr std::size_t count = 20'000;
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver = on_host(comm.rank(), comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 3, .frame_bytes = 512});
    EmulatedArray<std::uint32_t> x(driver, std::vector<std::uint32_t>(count, 1));
    std::vector<DeviceOperation> operations;
    std::uint32_t expected = 1;
    for (int k = 0; k < 5; ++k, expected *= 3) operations.push_back(gpu.all_reduce(x.span(), tally::sum, &stream));
    std::uint64_t sent = 0;
    for (DeviceOperation& each : operations) {
      const Report report = each.wait();
      check(report.elapsed == report.busy() + report.idle());
      sent += report.bytes_sent;
    }
    check(sent > 0);
    check(x.values() == std::vector<std::uint32_t>(count, expected));
    stream.capturing = true;
    (void)gpu.all_reduce(x.span(), tally::sum, &stream);
    (void)gpu.barrier(&stream);
    const auto graph = stream.end_capture();
    for (int k = 0; k < 3; ++k) stream.replay(graph), expected *= 3;
    stream.synchronise();
    check(x.values() == std::vector<std::uint32_t>(count, expected));

    const EmulatedArray<float> y(driver, std::vector<float>(100, 1));
    gpu.all_reduce(y.span(), tally::premultiplied_sum(static_cast<float>(comm.rank())), &stream).wait();
    check(y.values() == std::vector<float>(100, 3));
    gpu.all_reduce(y.span(), tally::mean, &stream).wait();
    check(y.values() == std::vector<float>(100, 3));

    const std::vector<std::size_t> counts{2, 0, 500}, firsts{1, 4, 5};
    const EmulatedArray<Affine> in(driver, input_of(comm.rank(), counts[at(comm.rank())])), out(driver, std::vector<Affine>(505));
    gpu.all_gather_v(in.span(), out.span(), counts, firsts, &stream).wait();
    std::vector<Affine> gathered(505);
    for (Rank r = 0; r < 3; ++r)
      for (std::size_t i = 0; i < counts[at(r)]; ++i) gathered[firsts[at(r)] + i] = value(r, i);
    check(out.values() == gathered);
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("waiting for a rank on another host is blamed on it") {
  std::array<EmulatedDriver, 3> drivers{on_host(0, 0), on_host(0, 1), on_host(1, 2)};
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver = drivers[at(comm.rank())];
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 1});
    EmulatedArray<float> x(driver, std::vector<float>(100, 1));
    gpu.barrier(&stream).wait();
    const std::array<std::uint32_t, 2> before{drivers[0].looks_in_vain->load(), drivers[1].looks_in_vain->load()};
    comm.barrier();  // none of their kernels looks before that
    constexpr auto late = 20ms;
    if (comm.rank() == 2) {
      for (std::size_t r = 0; r < before.size(); ++r)
        while (drivers[r].looks_in_vain->load() - before[r] < 2) std::this_thread::yield();
      std::this_thread::sleep_for(late);
    }
    const Report report = gpu.all_reduce(x.span(), tally::sum, &stream).wait();
    if (comm.rank() == 2) return;
    std::chrono::nanoseconds blamed{};
    for (const tally::Blame& each : report.blame())
      if (each.rank == 2) blamed += each.arrival;
    check(blamed >= late / 2, std::to_string(blamed.count()));
    check(report.elapsed == report.busy() + report.idle());
  }, tally::threads);
}

TEST_CASE("between hosts, ranks that call different things, that do not come, that abort: every rank is told, and of whom") {
  enum class Trouble { other_call, other_root, absent, abort };
  for (const Trouble trouble : {Trouble::other_call, Trouble::other_root, Trouble::absent, Trouble::abort}) {
    tally::launch(4, [&](Communicator& comm) {
      EmulatedDriver driver = on_host(comm.rank() / 2, comm.rank());
      EmulatedStream stream;
      Devices gpu(comm, driver, {.blocks = 2, .frame_bytes = 64});
      EmulatedArray<float> x(driver, std::vector<float>(100, 1));
      gpu.barrier(&stream).wait();
      comm.barrier();  // it is through everywhere
      gpu.set_timeout(trouble == Trouble::absent ? 300ms : 60s);
      const bool culprit = comm.rank() == 3;
      const auto begin = std::chrono::steady_clock::now();
      if (culprit && trouble == Trouble::abort) {
        gpu.abort();
      } else if (trouble == Trouble::other_root) {  // each waits for the other: no frame tells them
        expect_error(Errc::mismatch, "rank", [&] { gpu.broadcast(x.span(), comm.rank() < 2 ? 2 : 0, &stream).wait(); });
      } else if (!culprit || trouble != Trouble::absent) {
        const Errc expected = trouble == Trouble::absent ? Errc::timeout : trouble == Trouble::abort ? Errc::aborted : Errc::mismatch;
        expect_error(expected, trouble == Trouble::abort ? "was aborted by rank 3" : "rank", [&] { gpu.all_reduce(x.span().subspan(0, culprit ? 99 : 100), tally::sum, &stream, {.algorithm = "ring"}).wait(); });
        expect_error(expected, "rank", [&] { (void)gpu.barrier(&stream); });
      }
      comm.barrier();
      check(std::chrono::steady_clock::now() - begin < 30s);
    }, tally::threads);
    CHECK(EmulatedDevices::all().count() == 0);
  }
}

TEST_CASE("a rank that leaves early has sent what others need of it") {
  if (test::sanitized) return;  // it takes 11 s, and another time tells nothing
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver = on_host(comm.rank(), comm.rank());
    EmulatedStream stream;
    EmulatedArray<float> x(driver, std::vector<float>(10, static_cast<float>(comm.rank() + 1)));
    {
      Devices gpu(comm, driver, {.blocks = 1});
      if (comm.rank() == 1) stream.push([] { std::this_thread::sleep_for(11s); });  // for longer than the other one waits for it
      (void)gpu.broadcast(x.span(), 0, &stream);
      if (comm.rank() == 1) gpu.wait();
    }
    check(x.values() == std::vector<float>(10, 1));
    comm.barrier();
  }, tally::threads);
}

TEST_CASE("ranks as processes on several hosts; one that dies is named by all", "[processes]") {
  const test::Outcome outcome = test::outcome_of(4, tally::processes, [&](Communicator& comm) {
    // What is not far is another process's here, which emulated devices cannot reach: so all are.
    EmulatedDriver driver = on_host(comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 2});
    EmulatedArray<std::uint32_t> x(driver, std::vector<std::uint32_t>(10'000, 1));
    std::uint32_t expected = 1;
    for (int k = 0; k < 3; ++k) {
      gpu.all_reduce(x.span(), tally::sum, &stream).wait();
      expected *= 4;
      check(x.values() == std::vector<std::uint32_t>(10'000, expected));
    }
    comm.barrier();
    if (comm.rank() == 2) ::raise(SIGKILL);
    gpu.all_reduce(x.span(), tally::sum, &stream).wait();
  });
  INFO(outcome);
  for (const Rank r : {0, 1, 3}) {
    CHECK(outcome.ranks[at(r)].is(Errc::peer_lost));
    CHECK(outcome.ranks[at(r)].peer == 2);
    CHECK_THAT(outcome.ranks[at(r)].text, Catch::Contains("rank 2 is gone"));
  }
}

TEST_CASE("a device that cannot be told of an abort does not keep it from others, nor ends the program") {
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver = on_host(comm.rank(), comm.rank());
    driver.posts = comm.rank() == 2;
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 1});
    EmulatedArray<float> x(driver, std::vector<float>(10, 1));
    gpu.barrier(&stream).wait();
    comm.barrier();
    if (comm.rank() == 0) gpu.abort();
    else expect_error(comm.rank() == 1 ? Errc::timeout : Errc::aborted, comm.rank() == 1 ? "" : "by rank 0", [&] { gpu.all_reduce(x.span(), tally::sum, &stream, {.timeout = comm.rank() == 1 ? 500ms : 60s}).wait(); });
  }, tally::threads);
}

TEST_CASE("a relay believes nothing that cannot be") {
  using tally::detail::DeviceRelay;
  tally::detail::Erasure<tally::SlotTransport>::enable();
  const tally::device::WindowLayout layout{2, 2, 16, 2, 64};
  // As the relay's, which is its own.
  struct Message {
    std::uint32_t kind = 0, block = 0, number = 0, unused = 0;
    tally::device::FrameHeader frame;
  };
  const auto frame_of = [](std::uint32_t bytes) { return tally::device::FrameHeader{bytes, 0, 0, -1, bytes}; };
  struct Case {
    std::string what;
    Message message;
  };
  const std::vector<Case> cases{
      {"a block that is none", {0, 2, 0, 0, frame_of(8)}}, {"a frame out of turn", {0, 0, 1, 0, frame_of(8)}}, {"a frame that is too long", {0, 1, 0, 0, frame_of(65)}},
      {"credit for nothing", {1, 0, 1, 0, {}}},            {"credit that goes back", {1, 0, ~0u, 0, {}}},      {"no kind", {4, 0, 0, 0, {}}},
      {"over for no reason", {2, 0, 0, 0, {}}},            {"over for a rank that is none", {2, 0, 0x2'0003, 0, {}}}, {"a frame of nothing", {0, 0, 0, 0, {}}},
      {"elements that are cut", {0, 0, 0, 0, {3, 0, 0, -1, 8}}},
  };
  for (const Case& c : cases) {
    tally::launch(2, [&](Communicator& comm) {
      std::unique_ptr<tally::SymmetricMemory> none;
      auto transport = comm.open_transport("device relay", 0, none);
      if (comm.rank() == 0) {
        std::vector<std::byte> memory(DeviceRelay::bytes_each(layout) + 128);
        void* aligned = memory.data();
        std::size_t space = memory.size();
        std::align(128, DeviceRelay::bytes_each(layout), aligned, space);
        std::atomic<std::uint32_t> told{0};
        const std::vector<Rank> far{1};
        std::string reason;
        DeviceRelay relay(std::move(transport), layout, far, static_cast<std::byte*>(aligned), [&](std::uint32_t word, const std::string& why) { reason = why, told.store(word); });
        relay.start([] {});
        while (told.load() == 0) std::this_thread::yield();
        const auto broken = tally::device::Broken::unpack(told.load());
        check(broken.why == tally::device::Failure::lost && broken.missing == 1, c.what);
        check(reason.find("rank 1 sent ") != std::string::npos, c.what + ": " + reason);
      } else {
        struct Probe {
          void arrived(tally::Transfer&, const tally::FrameInfo&) {}
          tally::Transfer* unexpected(Rank, const tally::FrameInfo&) { return nullptr; }
          void credited(tally::Transfer&, const tally::FrameTimes&) {}
          void fetched(tally::Transfer&, const tally::FrameTimes&) {}
          void continued(tally::Transfer&, const tally::FrameTimes&) {}
          void drained(tally::Transfer&, bool = false) {}
          void copying(tally::Transfer&) {}
          void trying(tally::Transfer&) {}
          void reducing(tally::Transfer&) {}
          void moved(tally::Transfer&) {}
          tally::FrameTimes stamp(tally::Transfer&) { return {}; }
          tally::FrameTimes credit_stamp(const tally::Transfer&) { return {}; }
        } probe;
        tally::Transfer t;
        t.peer = 0, t.is_send = true;
        t.from = reinterpret_cast<const std::byte*>(&c.message);
        t.bytes = t.ready = sizeof c.message;
        transport->post(t, probe);
        while (t.pending) transport->poll(probe), std::this_thread::yield();
        transport->flush();
      }
      comm.barrier();
    }, tally::threads);
  }
}
