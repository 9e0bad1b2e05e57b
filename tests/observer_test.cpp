// SPDX-License-Identifier: Apache-2.0
// Who watches hears of each operation when it begins and when it ends, and of joules when they are known; NVTX ranges follow.
#include <catch2/catch.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/nvtx.hpp>
#include <tally/tally.hpp>

#include "fake_meter.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

/// Of all ranks, which are threads.
struct Recorder final : Observer {
  struct Seen {
    Collective operation;
    std::uint64_t bytes;
    std::string algorithm;
    std::uint32_t sequence;
    Report report;
    int ended = 0;
    bool failed = false;
  };
  std::mutex mutex;
  std::vector<Seen> seen;
  bool throws = false;

  std::uint64_t begun(const OperationBegin& operation) override {
    const std::lock_guard lock(mutex);
    seen.push_back({operation.operation, operation.bytes, std::string(operation.algorithm), operation.sequence, {}});
    if (throws) throw std::runtime_error("not interested");
    return seen.size();
  }
  void ended(std::uint64_t begun, const Report& report, bool failed) override {
    const std::lock_guard lock(mutex);
    if (throws) throw std::runtime_error("not interested");
    Seen& which = seen.at(begun - 1);
    which.report = report;
    ++which.ended;
    which.failed = failed;
  }
  std::ptrdiff_t count(Collective operation) const {
    return std::count_if(seen.begin(), seen.end(), [&](const Seen& each) { return each.operation == operation; });
  }
};
Options watched_by(std::shared_ptr<Observer> observer) {
  Options options;
  options.observer = std::move(observer);
  return options;
}

}  // namespace

TEST_CASE("an observer hears of each operation once when it begins and once when it ends, with the caller's report") {
  const auto recorder = std::make_shared<Recorder>();
  std::mutex mutex;
  std::vector<Report> returned;
  launch(
      3,
      [&](Communicator& comm) {
        std::vector<float> data(1000, 1), more(1000, 1);
        std::vector<Report> mine;
        mine.push_back(comm.all_reduce<Ring>(data, max));
        mine.push_back(comm.broadcast(data, 1));
        Operation first = comm.async_all_reduce(data, max), second = comm.async_all_reduce(more, max);
        mine.push_back(first.wait());
        mine.push_back(second.wait());
        if (comm.rank() == 0) comm.send(data, 1, 7);
        if (comm.rank() == 1) comm.receive(data, 0, 7);
        const std::lock_guard lock(mutex);
        returned.insert(returned.end(), mine.begin(), mine.end());
      },
      threads, watched_by(recorder));
  CHECK(recorder->count(Collective::all_reduce) == 9);
  CHECK(recorder->count(Collective::broadcast) == 3);
  CHECK(recorder->count(Collective::send) == 1);
  CHECK(recorder->count(Collective::receive) == 1);
  for (const Recorder::Seen& each : recorder->seen) {
    CAPTURE(name_of(each.operation), each.algorithm, each.sequence);
    CHECK(each.bytes == 4000);
    CHECK(each.ended == 1);
    CHECK_FALSE(each.failed);
    CHECK(each.sequence == each.report.sequence);
    CHECK(each.report.elapsed > 0ns);
    CHECK(each.report.busy() + each.report.idle() + each.report.undriven == each.report.elapsed);
  }
  for (const Report& report : returned)
    CHECK(std::any_of(recorder->seen.begin(), recorder->seen.end(), [&](const Recorder::Seen& each) { return each.report.ledger == report.ledger && each.report.sequence == report.sequence && each.report.elapsed == report.elapsed; }));
  CHECK(std::count_if(recorder->seen.begin(), recorder->seen.end(), [](const Recorder::Seen& each) { return each.algorithm == "ring" && each.operation == Collective::all_reduce; }) >= 3);
}

TEST_CASE("an observer is told that an operation failed, hears of communicators that are derived, and of operations that are not timed") {
  const auto recorder = std::make_shared<Recorder>();
  Options options = watched_by(recorder);
  options.accounting = false;
  CHECK_THROWS_AS(launch(
                      2,
                      [&](Communicator& comm) {
                        Communicator derived = comm.duplicate();
                        std::vector<float> data(10, 1);
                        derived.all_reduce(data, max);
                        if (derived.rank() == 0) derived.all_reduce(data, max, {.timeout = 100ms});
                        else std::this_thread::sleep_for(300ms);
                      },
                      threads, options),
                  Error);
  std::map<bool, int> by_failure;
  for (const Recorder::Seen& each : recorder->seen)
    if (each.operation == Collective::all_reduce && each.bytes == 40) {
      CHECK(each.ended == 1);
      CHECK(each.report.elapsed == 0ns);
      ++by_failure[each.failed];
    }
  CHECK(by_failure[false] == 2);
  CHECK(by_failure[true] == 1);
}

TEST_CASE("what an observer throws disturbs nobody") {
  const auto recorder = std::make_shared<Recorder>();
  recorder->throws = true;
  int right = 0;
  std::mutex mutex;
  launch(
      2,
      [&](Communicator& comm) {
        std::vector<int> data(10, comm.rank() + 1);
        comm.all_reduce(data, sum);
        comm.async_all_reduce(data, sum).wait();
        const std::lock_guard lock(mutex);
        right += data == std::vector<int>(10, 6);
      },
      threads, watched_by(recorder));
  CHECK(right == 2);
  CHECK(recorder->count(Collective::all_reduce) == 4);
}

TEST_CASE("an observer is told what meters charged when windows close") {
  struct Joules final : Observer {
    nanoseconds until{};
    std::vector<double> gross;
    void charged(nanoseconds time, const AccountEnergy& so_far) override {
      until = time;
      gross.push_back(so_far.gross.value);
    }
  };
  const auto joules = std::make_shared<Joules>();
  const auto script = std::make_shared<Script>();
  script->reading.kinds[0].provenance = Provenance::prorated;
  const Clock clock(false);
  Ledger ledger(1, 0, "none", clock, AccountSettings({}, [&] { return std::make_unique<ScriptedSource>(script); }, {}, {}, joules));
  LedgerRow& row = ledger.row(Collective::barrier, 0, "none");
  for (int window = 1; window <= 3; ++window) {
    Stopwatch watch(1);
    watch.start(1000);
    watch.enter(State::protocol, 3000);
    ledger.book({&row, 0, static_cast<std::uint64_t>(window), 1000, &watch}, detail::report_of(watch, clock, -1), clock);
    ledger.settle();
    script->reading.charges[0].net[static_cast<std::size_t>(Activity::protocol)] += 500'000'000;  // half a joule
    script->reading.kinds[0].total += 500'000'000;
    script->reading.windows = static_cast<std::uint64_t>(window);
    script->reading.time = window * 100ms;
    CHECK(std::abs(ledger.energy(row).value - 0.5 * window) < 1e-12);
    REQUIRE(joules->gross.size() == static_cast<std::size_t>(window));
    CHECK(std::abs(joules->gross.back() - 0.5 * window) < 1e-12);
    CHECK(joules->until == window * 100ms);
  }
}

TEST_CASE("operations are NVTX ranges of the domain tally") {
  fake_nvtx.ranges.clear();
  fake_nvtx.domains.clear();
  launch(
      2,
      [&](Communicator& comm) {
        std::vector<float> data(1000, 1);
        comm.all_reduce<Ring>(data, max);
        comm.barrier();
      },
      threads, watched_by(std::make_shared<NvtxRanges>()));
  CHECK(fake_nvtx.domains == std::vector<std::string>{"tally"});
  CHECK(fake_nvtx.destroyed == 1);
  CHECK(fake_nvtx.wrong == 0);
  int rings = 0;
  for (const FakeNvtx::Range& range : fake_nvtx.ranges) {
    CAPTURE(range.message);
    CHECK(range.ended);
    if (range.message != "all_reduce ring 4000 B #1") continue;
    ++rings;
    CHECK(range.payload == 4000);
  }
  CHECK(rings == 2);

  fake_nvtx.listening = false;
  fake_nvtx.ranges.clear();
  launch(2, [](Communicator& comm) { comm.barrier(); }, threads, watched_by(std::make_shared<NvtxRanges>()));
  CHECK(fake_nvtx.ranges.empty());
  CHECK(fake_nvtx.wrong == 0);
  fake_nvtx.listening = true;
}
