// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>

#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <tally/device_communicator.hpp>
#include <tally/energy.hpp>
#include <tally/tally.hpp>

#include "device_suite.hpp"
#include "emulated_driver.hpp"
#include "fake_meter.hpp"
#include "sanitized.hpp"

using namespace std::chrono_literals;
using tally::Communicator, tally::DeviceOperation, tally::Errc, tally::Error, tally::Rank, tally::Report;
using test::Affine, test::at, test::check, test::Compose, test::expect, test::expect_error, test::folded, test::input_of, test::value;
using test::EmulatedArray, test::EmulatedDevices, test::EmulatedDriver, test::EmulatedStream;
using Devices = tally::DeviceCommunicator<EmulatedDriver>;

namespace {

/// TimedMeter's, of two domains.
struct TwoTimedMeters {
  TimedMeter one;
  std::span<const tally::DomainInfo> domains() const { return one.infos; }
  tally::SampleResult sample(std::span<tally::MeterSample> out) noexcept {
    one.sample(out.first(1));
    out[1] = out[0], out[1].domain = 1;
    return {2, {}};
  }
};

/// Where a test's buffers are, and so by which way ranks get at them.
enum class Where { one_process, segments, elsewhere };
/// On this rank's device: symmetric or not.
class Buffer {
 public:
  Buffer(Devices& gpu, EmulatedDriver& driver, Where where, const std::vector<Affine>& values) {
    if (where == Where::segments) symmetric_ = gpu.allocate<Affine>(values.size());
    else array_.emplace(driver, values.size());
    if (!values.empty()) std::memcpy(span().data(), values.data(), values.size() * sizeof(Affine));
  }
  tally::DeviceSpan<Affine> span() const { return array_ ? array_->span() : symmetric_.span(); }
  std::vector<Affine> values() const { return {span().begin(), span().end()}; }

 private:
  std::optional<EmulatedArray<Affine>> array_;
  tally::DeviceSymmetric<Affine> symmetric_;
};

Errc code_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.errc();
  }
  return {};
}

}  // namespace

TEST_CASE("every operation, each way, wherever the buffers are") {
  for (const int n : {1, 2, 3, 5})
    for (const Where where : {Where::one_process, Where::segments, Where::elsewhere})
      tally::launch(n, [&](Communicator& comm) {
        EmulatedDriver driver(0, where == Where::one_process ? 0 : comm.rank() + 1);
        EmulatedStream stream;
        {
          Devices gpu(comm, driver, {.blocks = 2, .threads = 1, .packet_bytes = 1024, .frame_bytes = 256});
          const auto make = [&](const std::vector<Affine>& values) { return Buffer(gpu, driver, where, values); };
          for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{23}, std::size_t{1000}}) {
            if (test::sanitized && count == 1000) continue;
            test::every_operation(gpu, &stream, make, count, "", false);
            if (where == Where::elsewhere) test::every_operation(gpu, &stream, make, count, "", true);
            else test::every_operation(gpu, &stream, make, count, "zero_copy", false);
            if (count <= 23) test::every_operation(gpu, &stream, make, count, "packets", false);
          }
        }
        comm.barrier();
      }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("blocks of sizes of their own, and neighbours") {
  for (const int n : {1, 2, 5})
    tally::launch(n, [&](Communicator& comm) {
      EmulatedDriver driver(0, comm.rank());
      EmulatedStream stream;
      Devices gpu(comm, driver, {.blocks = 2, .frame_bytes = 64});
      const Rank me = gpu.rank();
      std::vector<std::size_t> counts, firsts;
      std::size_t sum = 0;
      for (Rank r = 0; r < n; ++r) counts.push_back(at(r * 3 % 4)), firsts.push_back(sum + 1), sum += counts.back() + 1;
      const std::size_t width = sum + 1, own = counts[at(me)];
      const EmulatedArray<Affine> in(driver, input_of(me, own)), out(driver, std::vector<Affine>(width));
      gpu.all_gather_v(in.span(), out.span(), counts, firsts, &stream).wait();
      std::vector<Affine> expected(width);
      for (Rank r = 0; r < n; ++r)
        for (std::size_t i = 0; i < counts[at(r)]; ++i) expected[firsts[at(r)] + i] = value(r, i);
      check(out.values() == expected);

      const EmulatedArray<Affine> all(driver, input_of(me, width)), part(driver, std::vector<Affine>(own));
      gpu.reduce_scatter_v(all.span(), part.span(), counts, firsts, Compose{}, &stream).wait();
      expect(part.values(), [&](std::size_t i) { return folded(0, n, firsts[at(me)] + i); }, "reduce_scatter_v");
      gpu.scatter_v(all.span(), part.span(), counts, firsts, n - 1, &stream).wait();
      expect(part.values(), [&](std::size_t i) { return value(n - 1, firsts[at(me)] + i); }, "scatter_v");
      const EmulatedArray<Affine> gathered(driver, std::vector<Affine>(width));
      gpu.gather_v(in.span(), gathered.span(), counts, firsts, 0, &stream).wait();
      if (me == 0) check(gathered.values() == expected);

      const std::vector<std::size_t> to_each(at(n), own);  // rank r sends counts[r] to everyone
      const EmulatedArray<Affine> sent(driver, input_of(me, own * at(n))), received(driver, std::vector<Affine>(std::accumulate(counts.begin(), counts.end(), std::size_t{0})));
      gpu.all_to_all_v(sent.span(), to_each, {}, received.span(), counts, {}, &stream).wait();
      std::vector<Affine> crossed;
      for (Rank r = 0; r < n; ++r)
        for (std::size_t i = 0; i < counts[at(r)]; ++i) crossed.push_back(value(r, at(me) * counts[at(r)] + i));
      check(received.values() == crossed);

      const std::vector<Rank> right{(me + 1) % n}, left{(me + n - 1) % n};
      const EmulatedArray<Affine> mine(driver, input_of(me, 9)), theirs(driver, std::vector<Affine>(9));
      gpu.neighbour_exchange(mine.span(), theirs.span(), right, left, &stream).wait();
      expect(theirs.values(), [&](std::size_t i) { return value(left[0], i); }, "neighbour_exchange");
    }, tally::threads);
}

TEST_CASE("floats, means, factors: as sums of small integers they are exact") {
  tally::launch(4, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 2, .packet_bytes = 256, .frame_bytes = 64});
    const auto mine = static_cast<float>(gpu.rank() + 1);
    const auto of_type = [&]<class T>(T) {
      for (const std::size_t count : {std::size_t{5}, std::size_t{700}}) {  // by packets, and by steps
        const std::vector<T> values(count, static_cast<T>(mine));
        EmulatedArray<T> x(driver, values), out(driver, values);
        gpu.all_reduce(x.span(), out.span(), tally::mean, &stream).wait();
        check(out.values() == std::vector<T>(count, static_cast<T>(2.5f)), std::to_string(count) + " of " + std::to_string(sizeof(T)) + ": " + std::to_string(static_cast<float>(out.values()[0])));
        gpu.all_reduce(x.span(), out.span(), tally::premultiplied_sum(mine), &stream).wait();
        check(out.values() == std::vector<T>(count, static_cast<T>(30.0f)), std::to_string(count) + " of " + std::to_string(sizeof(T)) + ": " + std::to_string(static_cast<float>(out.values()[0])));
        check(x.values() == values);
        gpu.all_reduce(x.span(), tally::premultiplied_sum(2.0f), &stream).wait();
        check(x.values() == std::vector<T>(count, static_cast<T>(20.0f)));
        gpu.all_reduce(x.span(), tally::max, &stream).wait();
        check(x.values() == std::vector<T>(count, static_cast<T>(20.0f)));
      }
    };
    of_type(float{}), of_type(double{}), of_type(tally::f16{}), of_type(tally::bf16{});
  }, tally::threads);
}

TEST_CASE("what is chosen follows what was measured, on all ranks alike") {
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 1, .packet_bytes = 6000});
    check(gpu.packets_up_to() == 6000);
    std::array<std::size_t, 3> limits{};
    const std::size_t mine = gpu.tune(&stream);
    comm.all_gather(std::span(&mine, 1), limits);
    check(limits[0] == mine && limits[1] == mine && limits[2] == mine);
    check(mine == 0 || mine == 1024 || mine == 2048 || mine == 4096 || mine == 6000, std::to_string(mine));
    const auto x = gpu.allocate<float>(1500);
    for (const std::size_t count : {std::size_t{1}, std::size_t{256}, std::size_t{512}, std::size_t{1024}, std::size_t{1500}})
      check(gpu.all_reduce(x.subspan(0, count), tally::sum, &stream).wait().algorithm_name() == (count * 4 <= mine ? "packets" : "zero_copy"));
  }, tally::threads);
}

TEST_CASE("streams, many operations in flight, several communicators") {
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver;
    EmulatedStream one, other;
    Devices gpu(comm, driver, {.blocks = 2, .packet_bytes = 512}), second(comm, driver, {.blocks = 1});
    EmulatedArray<std::uint32_t> x(driver, std::vector<std::uint32_t>(300, 1)), y(driver, std::vector<std::uint32_t>(5, 1));
    std::uint32_t expected = 1;
    std::vector<DeviceOperation> operations;
    for (int k = 0; k < 150; ++k) {  // on one stream or the other: they follow each other all the same
      operations.push_back(gpu.all_reduce(x.span(), tally::sum, k % 3 == 0 ? &one : &other));
      if (k % 10 == 0) operations.push_back(second.all_reduce(y.span(), tally::max, &one));
      expected *= 3;
    }
    for (DeviceOperation& each : operations) each.wait();
    check(operations[0].test());
    check(x.values() == std::vector<std::uint32_t>(300, expected));
    check(y.values() == std::vector<std::uint32_t>(5, 1));
    check(operations.back().wait().sequence == 150);
    for (int k = 0; k < 300; ++k) (void)gpu.barrier(&one);
    gpu.wait();
    expect_error(Errc::invalid_argument, "is not kept any more", [&] { operations[0].wait(); });
    std::uint64_t calls = 0;
    for (const tally::LedgerRow& row : gpu.ledger().rows()) calls += row.calls;
    check(calls == 450);
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("what is captured runs with its graph, as often as that does, and is in the account") {
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    {
      Devices gpu(comm, driver, {.blocks = 2, .packet_bytes = 512, .frame_bytes = 128});
      auto symmetric = gpu.allocate<std::uint32_t>(500);
      EmulatedArray<std::uint32_t> small(driver, std::vector<std::uint32_t>(7, 1)), large(driver, std::vector<std::uint32_t>(500, 1));
      std::fill_n(symmetric.data(), 500, 1u);
      stream.capturing = true;
      DeviceOperation captured = gpu.all_reduce(small.span(), tally::sum, &stream);  // packets
      (void)gpu.all_reduce(symmetric, tally::sum, &stream);                         // shares
      (void)gpu.all_reduce(large.span(), tally::sum, &stream);                      // steps
      const auto graph = stream.end_capture();
      expect_error(Errc::invalid_argument, "was captured", [&] { captured.wait(); });
      std::uint32_t expected = 1;
      for (int k = 0; k < 5; ++k) stream.replay(graph), expected *= 3;
      gpu.all_reduce(small.span(), tally::max, &stream).wait();
      stream.synchronise();
      check(small.values() == std::vector<std::uint32_t>(7, expected));
      check(large.values() == std::vector<std::uint32_t>(500, expected));
      check(std::vector<std::uint32_t>(symmetric.begin(), symmetric.end()) == std::vector<std::uint32_t>(500, expected));
      std::map<std::string, std::uint64_t> calls, bytes;
      for (const tally::LedgerRow& row : gpu.ledger().rows()) {
        calls[std::string(gpu.ledger().algorithm_name(row.algorithm))] += row.calls, bytes[std::string(gpu.ledger().algorithm_name(row.algorithm))] += row.bytes;
        check(row.elapsed == row.busy() + row.idle() + row.undriven);
      }
      check(calls["packets"] == 6);
      check(bytes["packets"] == 6 * 28);
      check(calls["zero_copy"] == 5);
      check(bytes["zero_copy"] == 5 * 2000);
      check(calls.size() == 3);
    }
    comm.barrier();
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("a rank that comes late is in the others' reports") {
  for (const char* const name : {"packets", "zero_copy"})
    tally::launch(3, [&](Communicator& comm) {
      EmulatedDriver driver;
      EmulatedStream stream;
      Devices gpu(comm, driver, {.blocks = 2});
      EmulatedArray<float> x(driver, std::vector<float>(100, 1));
      const auto call = [&] { return gpu.all_reduce(x.span(), tally::sum, &stream, {.algorithm = name}); };
      call().wait();
      comm.barrier();
      constexpr auto late = 30ms;
      DeviceOperation operation;
      const auto begin = std::chrono::steady_clock::now();
      if (comm.rank() != 1) operation = call();
      else std::this_thread::sleep_for(late), operation = call();
      const Report report = operation.wait();
      check(report.elapsed == report.busy() + report.idle());
      check(report.elapsed <= std::chrono::steady_clock::now() - begin);
      std::chrono::nanoseconds blamed{};
      for (const tally::Blame& each : report.blame()) {
        blamed += each.arrival;
        check(each.rank != comm.rank());
      }
      check(blamed == report.wait_arrival);
      check(report.algorithm_name() == name);
      check(report.transport_name() == "emulated");
      check(!(report.energy().known()));  // nobody measured it
    }, tally::threads);
}

TEST_CASE("joules are the device's, by its meter and the kernels' time; those of waiting apart; unknown where it has none") {
  tally::MemberOptions options;
  options.name = tally::detail::concat({"test/", ::getpid(), "/device_communicator_test"});
  options.find = [] {
    TimedMeter meter;  // 100 W each
    meter.infos.push_back(meter.infos[0]);
    meter.infos[1].kind = tally::Domain::gpu_board, meter.infos[1].key = "gpu-0";
    tally::FoundMeters found;
    found.meters.emplace_back(TwoTimedMeters{meter});
    return found;
  };
  options.hub.period = 10ms;
  auto member = std::make_shared<tally::EnergyMember>(std::move(options));
  for (const bool has_meter : {true, false})
    tally::launch(2, [&](Communicator& comm) {
      EmulatedDriver driver(comm.rank());
      EmulatedStream stream(comm.rank());
      const tally::EnergySources meters = [&] { return std::make_unique<tally::HubSeat>(member, has_meter ? "gpu-0" : "gpu-9", true); };
      Devices gpu(comm, driver, {.blocks = 1}, meters);
      EmulatedArray<float> x(driver, std::vector<float>(100, 1));
      Report report;
      for (int k = 0; k < 10; ++k) {
        if (comm.rank() == 1) std::this_thread::sleep_for(3ms);
        report = gpu.all_reduce(x.span(), tally::sum, &stream).wait();
      }
      const bool known = gpu.ledger().wait_for_energy(10s);
      check(known == has_meter, "known");
      double gross = 0, idle = 0;
      for (const tally::LedgerRow& row : gpu.ledger().rows()) {
        const tally::AccountEnergy energy = gpu.ledger().energies(row);
        check(energy.gross.known() == has_meter, "gross");
        check(!energy.cpu.known() && !energy.dram.known(), "processors");
        gross += energy.gross.value, idle += energy.idle.value;
        if (has_meter) check(energy.gross.provenance == tally::Provenance::prorated && energy.gpu.value == energy.gross.value, "kind");
      }
      if (has_meter) check(gross > 0 && idle <= gross && (comm.rank() == 1 || idle > 0), "amounts");
      check(report.energy().known() == has_meter, "report");
      comm.barrier();
    }, tally::threads);
}

TEST_CASE("bad arguments are refused before anything is launched") {
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver, other(1);
    EmulatedStream stream, foreign(1);
    Devices gpu(comm, driver, {.blocks = 2, .packet_bytes = 256, .frame_bytes = 64});
    EmulatedArray<float> x(driver, std::vector<float>(100, 1)), far(other, std::vector<float>(100, 1));
    std::vector<float> here(100);
    std::vector<char> bytes(512);
    const auto refused = [&](Errc code, const std::string& part, auto span) { expect_error(code, part, [&] { (void)gpu.all_reduce(span, tally::sum, &stream); }); };
    refused(Errc::invalid_argument, "is memory of the host's", tally::device_span(here.data(), 100));
    refused(Errc::invalid_argument, "lies on another device", far.span());
    refused(Errc::invalid_argument, "no multiple of 4", tally::device_span(reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(x.data()) + 1), 10));
    refused(Errc::invalid_argument, "is null", tally::device_span(static_cast<float*>(nullptr), 10));
    expect_error(Errc::invalid_argument, "none of this device's", [&] { (void)gpu.all_reduce(x.span(), tally::sum, &foreign); });
    expect_error(Errc::invalid_argument, "none of this device's", [&] { (void)gpu.barrier(nullptr); });
    expect_error(Errc::invalid_argument, "is not a rank", [&] { (void)gpu.broadcast(x.span(), 2, &stream); });
    expect_error(Errc::invalid_argument, "no algorithm 'magic'", [&] { (void)gpu.all_reduce(x.span(), tally::sum, &stream, {.algorithm = "magic"}); });
    expect_error(Errc::invalid_argument, "no algorithm 'staged'", [&] { (void)gpu.all_reduce(x.span(), tally::sum, &stream, {.algorithm = "staged"}); });
    expect_error(Errc::invalid_argument, "does not fold in the order", [&] { (void)gpu.all_reduce(tally::device_span(reinterpret_cast<Affine*>(x.data()), 20), Compose{}, &stream, {.algorithm = "ring"}); });
    expect_error(Errc::invalid_argument, "overlap", [&] { (void)gpu.all_reduce(x.span().subspan(0, 50), x.span().subspan(1, 50), tally::sum, &stream); });
    expect_error(Errc::invalid_argument, "expected", [&] { (void)gpu.all_gather(x.span().subspan(0, 50), x.span().subspan(50, 50), &stream); });
    expect_error(Errc::invalid_argument, "subspan", [&] { (void)x.span().subspan(90, 11); });
    expect_error(Errc::invalid_argument, "too many", [&] { (void)gpu.allocate<double>(~std::size_t{0} / 8); });
    expect_error(Errc::unsupported, "room for so many packets", [&] {
      EmulatedArray<float> long_one(driver, 100'000);
      (void)gpu.all_reduce(long_one.span(), tally::sum, &stream, {.algorithm = "packets"});
    });
    expect_error(Errc::invalid_argument, "a timeout must be longer", [&] { (void)gpu.all_reduce(x.span(), tally::sum, &stream, {.timeout = 0s}); });
    expect_error(Errc::invalid_argument, "never started", [&] { (void)DeviceOperation().wait(); });
    // Nothing of this was half begun.
    gpu.all_reduce(x.span(), tally::sum, &stream).wait();
    check(x.values() == std::vector<float>(100, 2));
    Devices moved = std::move(gpu);
    expect_error(Errc::invalid_argument, "moved from", [&] { (void)gpu.barrier(&stream); });
    moved.barrier(&stream).wait();
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("ranks that cannot run at the same time, settings that differ, memory that is not there: an error on all ranks") {
  tally::launch(3, [&](Communicator& comm) {
    const auto refused = [&](Errc code, const std::string& part, EmulatedDriver driver, tally::DeviceSettings settings) {
      expect_error(code, part, [&] { Devices(comm, driver, settings); });
    };
    refused(Errc::no_resources, "3 ranks share rank 0's device, which runs 2 blocks at the same time", EmulatedDriver(0, 0, 2), {});
    refused(Errc::no_resources, "each is to have 22", EmulatedDriver(), {.blocks = 22});
    refused(Errc::mismatch, "rank 0 was given 1 blocks", EmulatedDriver(), {.blocks = comm.rank() == 1 ? 2 : 1});
    refused(Errc::invalid_argument, "threads in a block", EmulatedDriver(), {.threads = 3});
    refused(Errc::no_resources, "bytes left", EmulatedDriver(), {.packet_bytes = std::size_t{1} << 28});
    refused(Errc::invalid_argument, "are possible", EmulatedDriver(), {.packet_bytes = ~std::size_t{0}});
    for (const bool host : {true, false}) {  // of one rank
      EmulatedDriver poor;
      if (comm.rank() == 1) (host ? poor.has_host_memory : poor.works) = false;
      refused(Errc::no_resources, comm.rank() != 1 ? "rank 1 could not" : host ? "for accounts" : "nothing works here", poor, {});
    }
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    {
      Devices gpu(comm, driver, {.blocks = 21});
      expect_error(Errc::no_resources, "bytes left", [&] { (void)gpu.allocate<char>(std::size_t{1} << 31); });
      expect_error(Errc::mismatch, "rank 0 asks for 256 bytes, rank 2 for 512", [&] { (void)gpu.allocate<char>(comm.rank() == 2 ? 300 : 1); });
      // And it goes on.
      const auto x = gpu.allocate<int>(10);
      std::fill_n(x.data(), 10, 1);
      gpu.all_reduce(x, tally::sum, &stream, {.algorithm = "zero_copy"}).wait();
      check(x.data()[9] == 3);
    }
    comm.barrier();
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("symmetric memory goes when all ranks have let go of it, and its place is used again") {
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 1});
    const auto count = [&] {
      comm.barrier();
      const std::size_t all = EmulatedDevices::all().count();
      comm.barrier();
      return all;
    };
    auto first = gpu.allocate<int>(100);
    const std::size_t before = count();
    for (int k = 0; k < 100; ++k) {
      auto next = gpu.allocate<int>(100);
      std::fill_n(next.data(), 100, 1);
      gpu.all_reduce(next, tally::sum, &stream, {.algorithm = "zero_copy"}).wait();
      check(next.data()[99] == 2);
    }
    auto last = gpu.allocate<int>(100);
    check(count() == before + 4);  // two ranks' memory, as two ranks see it
    if (comm.rank() == 0) first = {};  // the other one keeps it
    auto more = gpu.allocate<int>(100);
    check(count() == before + 8);
    std::vector<tally::DeviceSymmetric<int>> all;
    expect_error(Errc::no_resources, "at most 64 allocations", [&] {
      for (int k = 0; k < 100; ++k) all.push_back(gpu.allocate<int>(1));
    });
    check(all.size() == 61);
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("ranks that call different things, that do not come, that abort: every rank is told, and of whom") {
  enum class Trouble { other_call, other_size, absent, abort };
  for (const Trouble trouble : {Trouble::other_call, Trouble::other_size, Trouble::absent, Trouble::abort})
    for (const char* const name : {"packets", "zero_copy", "ring"}) {
      tally::launch(3, [&](Communicator& comm) {
        EmulatedDriver driver;
        EmulatedStream stream;
        Devices gpu(comm, driver, {.blocks = 2, .frame_bytes = 64});
        gpu.set_timeout(trouble == Trouble::absent ? 200ms : 60s);
        EmulatedArray<float> x(driver, std::vector<float>(100, 1));
        const bool culprit = comm.rank() == 1;
        const std::string text = std::string(name) + ", rank " + std::to_string(comm.rank()) + ", trouble " + std::to_string(static_cast<int>(trouble));
        DeviceOperation operation;
        std::thread aborts;
        if (trouble == Trouble::abort && culprit) aborts = std::thread([&] { gpu.abort(); });
        else if (trouble == Trouble::absent && culprit) ;
        else if (trouble == Trouble::abort) operation = gpu.all_reduce(x.span(), tally::sum, &stream, {.algorithm = name});
        else if (trouble == Trouble::other_call && culprit) operation = gpu.all_reduce(x.span(), tally::max, &stream, {.algorithm = name});
        else operation = gpu.all_reduce(x.span().subspan(0, trouble == Trouble::other_size && culprit ? 99 : 100), tally::sum, &stream, {.algorithm = name});
        if (aborts.joinable()) {
          aborts.join();
          check(code_of([&] { (void)gpu.barrier(&stream); }) == Errc::aborted, text);
        }
        if ((trouble != Trouble::absent && trouble != Trouble::abort) || !culprit) {
          std::string got = "nothing";
          Errc code{};
          try {
            operation.wait();
          } catch (const Error& error) {
            got = error.what(), code = error.errc();
            check(error.rank() == comm.rank(), got);
          }
          check(trouble == Trouble::absent ? code == Errc::timeout : trouble == Trouble::abort ? code == Errc::aborted : code == Errc::mismatch, text + ": " + got);
          // It is over for good, and says so again.
          check(code == code_of([&] { (void)gpu.barrier(&stream); }), text);
          check(code == code_of([&] { gpu.wait(); }), text);
        }
        comm.barrier();
      }, tally::threads);
      CHECK(EmulatedDevices::all().count() == 0);
    }
}

TEST_CASE("calls of different ways are told apart at once, an abort reaches who waits for a rank that launches nothing") {
  for (const bool by_abort : {false, true}) {
    tally::launch(2, [&](Communicator& comm) {
      EmulatedDriver driver(0, comm.rank());
      EmulatedStream stream;
      Devices gpu(comm, driver, {.blocks = 1, .packet_bytes = 64});
      EmulatedArray<float> x(driver, std::vector<float>(1000, 1));
      const auto begin = std::chrono::steady_clock::now();
      if (!by_abort) {
        const std::size_t count = comm.rank() == 0 ? 10 : 1000;  // packets, and steps
        expect_error(Errc::mismatch, "called ", [&] { gpu.all_reduce(x.span().subspan(0, count), tally::sum, &stream, {.timeout = 60s}).wait(); });
      } else if (comm.rank() == 0) {
        expect_error(Errc::aborted, "", [&] { gpu.all_reduce(x.span(), tally::sum, &stream, {.timeout = 60s}).wait(); });
      } else {
        std::this_thread::sleep_for(5ms);
        gpu.abort();
      }
      check(std::chrono::steady_clock::now() - begin < 30s);
    }, tally::threads);
    CHECK(EmulatedDevices::all().count() == 0);
  }
}

TEST_CASE("a root's own buffer, which others cannot reach, is no trouble") {
  tally::launch(3, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 1, .packet_bytes = 64});
    auto shared = gpu.allocate<std::uint32_t>(3000);
    EmulatedArray<std::uint32_t> own(driver, std::vector<std::uint32_t>(3000, 7));
    std::fill_n(shared.data(), 3000, 1u);
    comm.barrier();
    gpu.reduce(shared.subspan(0, 1000), own.span().subspan(0, 1000), tally::sum, 1, &stream).wait();
    check(own.values()[999] == (comm.rank() == 1 ? 3 : 7));
    gpu.gather(shared.subspan(0, 1000), own.span(), 2, &stream).wait();
    check(own.values()[2999] == (comm.rank() == 2 ? 1 : 7));
    gpu.scatter(own.span(), shared.subspan(0, 1000), 0, &stream).wait();
    check(shared.data()[999] == 7);
  }, tally::threads);
}

TEST_CASE("a communicator that failed is destroyed after all that it launched has ended") {
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver;
    EmulatedStream stream;
    EmulatedArray<float> x(driver, std::vector<float>(100, 1));
    {
      Devices gpu(comm, driver, {.blocks = 1});
      if (comm.rank() == 0) {
        for (int k = 0; k < 100; ++k) (void)gpu.all_reduce(x.span(), tally::sum, &stream, {.timeout = 50ms});
        expect_error(Errc::timeout, "waits for rank 1", [&] { gpu.wait(); });
      }
    }
    comm.barrier();
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}

TEST_CASE("a graph's account may be read while it runs") {
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver(0, comm.rank());
    EmulatedStream stream;
    Devices gpu(comm, driver, {.blocks = 3, .packet_bytes = 4096});
    EmulatedArray<std::uint32_t> x(driver, std::vector<std::uint32_t>(1000, 1));
    gpu.all_reduce(x.span(), tally::max, &stream).wait();
    stream.capturing = true;
    (void)gpu.all_reduce(x.span(), tally::max, &stream);
    const auto graph = stream.end_capture();
    constexpr std::uint64_t replays = 100;
    for (std::uint64_t k = 0; k < replays; ++k) stream.replay(graph);
    const auto of_ledger = [&](auto&& member) {
      std::uint64_t all = 0;
      for (const tally::LedgerRow& row : gpu.ledger().rows()) all += static_cast<std::uint64_t>(member(row));
      return all;
    };
    while (of_ledger([](const tally::LedgerRow& row) { return row.calls; }) < replays / 2) {
      for (const tally::LedgerRow& row : gpu.ledger().rows()) check(row.elapsed == row.busy() + row.idle());
      std::this_thread::sleep_for(50us);  // the kernels need the processor, too
    }
    stream.synchronise();
    check(of_ledger([](const tally::LedgerRow& row) { return row.calls; }) == replays + 1);
    check(of_ledger([](const tally::LedgerRow& row) { return row.bytes; }) == (replays + 1) * 4000);
  }, tally::threads);
}

TEST_CASE("what goes wrong on a stream ends the wait") {
  tally::launch(2, [&](Communicator& comm) {
    EmulatedDriver driver;
    EmulatedStream stream;
    {
      Devices gpu(comm, driver, {.blocks = 1});
      EmulatedArray<float> x(driver, std::vector<float>(10, 1));
      if (comm.rank() == 0) {
        stream.problem = "an illegal memory access was encountered";  // nothing runs on it any more
        DeviceOperation operation = gpu.all_reduce(x.span(), tally::sum, &stream);
        expect_error(Errc::aborted, "illegal memory access", [&] {  // also of who only asks
          while (!operation.test()) {
          }
        });
      } else {
        expect_error(Errc::timeout, "rank 1 in all_reduce(float32 x 10, sum, packets) #1 waits for rank 0 after", [&] { gpu.all_reduce(x.span(), tally::sum, &stream, {.timeout = 200ms}).wait(); });
      }
    }
    comm.barrier();
  }, tally::threads);
}
