// SPDX-License-Identifier: Apache-2.0
// Operations in flight: started, driven by later calls or by the progress thread, waited for in any order, called back,
// awaited, destroyed; what they report; what happens to them when something fails.
#include <catch2/catch.hpp>

#include <sched.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::Caught, test::caught, test::expect, test::now_ns;

namespace {

/// f on n ranks; their first error fails the test.
template <class F>
void on_ranks(int n, RankKind kind, F f, Options options = {}) {
  options.timeout = std::chrono::seconds(20);
  const test::Outcome outcome = test::outcome_of(n, kind, f, options);
  CAPTURE(n, outcome);
  for (const Caught& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
}
/// The all_reduces that its ledger knows.
std::uint64_t booked(const Communicator& comm) {
  std::uint64_t calls = 0;
  for (const LedgerRow& row : comm.ledger().rows())
    if (row.operation == Collective::all_reduce) calls += row.calls;
  return calls;
}
/// The same, with the progress thread and without; f may ask which.
template <class F>
void either_way(int n, RankKind kind, F f) {
  const auto run = [&](Communicator& comm, bool progress) {
    if constexpr (std::invocable<F, Communicator&, bool>) f(comm, progress);
    else f(comm);
  };
  on_ranks(n, kind, [&](Communicator& comm) { run(comm, false); });
  on_ranks(n, kind, [&](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    run(comm, true);
  });
}
std::vector<int> filled(std::size_t count, int value) { return std::vector<int>(count, value); }
bool all_are(std::span<const int> data, int value) {
  return std::ranges::all_of(data, [=](int x) { return x == value; });
}
nanoseconds process_time() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + nanoseconds(t.tv_nsec);
}
void expect_exact(const Report& r) {
  expect(r.elapsed == r.busy() + r.idle() + r.undriven, "the parts add up to elapsed, to the nanosecond");
  for (const nanoseconds part : {r.copy, r.reduce, r.codec, r.protocol, r.wait_arrival, r.wait_transfer, r.wait_credit, r.wait_local, r.undriven}) expect(part >= 0ns, "no part is negative");
  expect(0ns <= r.exposed && r.exposed <= r.elapsed && r.overlapped() == r.elapsed - r.exposed, "0 <= exposed <= elapsed");
}

/// A coroutine that runs by itself.
struct Task {
  struct promise_type {
    Task get_return_object() { return {}; }
    std::suspend_never initial_suspend() noexcept { return {}; }
    std::suspend_never final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { std::terminate(); }
  };
};

}  // namespace

// Results.

static void many_in_flight(RankKind kind) {
  for (const int n : {1, 2, 3, 5})
    either_way(n, kind, [n](Communicator& comm, bool progress) {
      Communicator other = comm.duplicate();
      const auto me = static_cast<std::size_t>(comm.rank()), ranks = static_cast<std::size_t>(n);
      std::mt19937 random(static_cast<unsigned>(comm.rank()));  // each rank waits in an order of its own
      for (int round = 0; round < 8; ++round) {
        std::vector<std::vector<int>> sums, gathered, copied;
        std::vector<Operation> operations;
        for (std::size_t i = 0; i < 12; ++i) {
          Communicator& on = i % 3 == 2 ? other : comm;
          const std::size_t count = i % 4 == 3 ? 3000 : 1 + i;
          const int value = static_cast<int>(1000 * i);
          operations.push_back(on.async_all_reduce(sums.emplace_back(filled(count, value + comm.rank())), sum));
          copied.push_back(filled(count, comm.rank() == static_cast<int>(i) % n ? value : -1));
          operations.push_back(on.async_broadcast(copied.back(), static_cast<int>(i) % n));
          gathered.push_back(filled(ranks * count, -1));
          const std::vector<int> mine = filled(count, value + comm.rank());
          std::ranges::copy(mine, gathered.back().begin() + static_cast<std::ptrdiff_t>(me * count));
          operations.push_back(on.async_all_gather(std::span(gathered.back()).subspan(me * count, count), gathered.back()));
          if (i == 5) comm.barrier();
        }
        // Who waits in one communicator drives that one alone: without the progress thread, ranks that began with different ones would wait for each other.
        if (!progress) std::stable_partition(operations.begin(), operations.end(), [&, i = std::size_t{0}](const Operation&) mutable { return i++ / 3 % 3 != 2; });
        const auto middle = operations.begin() + (progress ? 0 : 24);
        std::shuffle(operations.begin(), middle, random);
        std::shuffle(middle, operations.end(), random);
        for (Operation& operation : operations) {
          if (random() % 3 == 0) operation = Operation();  // destroying it waits for it
          else expect_exact(operation.wait());
        }
        for (std::size_t i = 0; i < 12; ++i) {
          const int value = static_cast<int>(1000 * i);
          expect(all_are(sums[i], n * value + n * (n - 1) / 2), "sums");
          expect(all_are(copied[i], value), "broadcasts");
          for (std::size_t r = 0; r < ranks; ++r)
            expect(all_are(std::span(gathered[i]).subspan(r * sums[i].size(), sums[i].size()), value + static_cast<int>(r)), "gathered blocks");
        }
      }
    });
}
TALLY_TEST_BOTH("many operations in flight have exact results, in whatever order they end", "", many_in_flight)

static void slots_of_one(RankKind kind) {
  Options options;
  options.slots = SlotOptions{.slots = 1, .slot_bytes = 128};
  on_ranks(
      3, kind,
      [](Communicator& comm) {
        std::optional<ProgressThread> thread;
        for (int round = 0; round < 4; ++round) {
          if (round == 2) thread = progress_thread();
          std::vector<std::vector<int>> data;
          std::vector<Operation> operations;
          for (std::size_t i = 0; i < 10; ++i) operations.push_back(comm.async_all_reduce(data.emplace_back(filled(1 + 97 * i, comm.rank())), sum));
          int block = comm.rank();
          comm.all_reduce(std::span(&block, 1), sum);
          expect(block == 3, "a blocking call behind them");
          for (std::size_t i = 10; i-- > 0;) operations[i].wait();
          for (const auto& each : data) expect(all_are(each, 3), "sums");
        }
      },
      options);
}
TALLY_TEST_BOTH("operations in flight through rings of one small slot", "", slots_of_one)

TEST_CASE("plans in flight are not shared") {
  on_ranks(2, threads, [](Communicator& comm) {
    std::vector<std::vector<int>> a(3), b(1);
    const auto start = [&](std::vector<int>& data, std::size_t count, int value) { return comm.async_all_reduce(data = filled(count, value + comm.rank()), sum); };
    for (int round = 0; round < 3; ++round) {
      {
        const Operation first = start(a[0], 4, 10), between = start(b[0], 7, 20), second = start(a[1], 4, 30);
      }
      expect(a[0][0] == 21 && b[0][0] == 41 && a[1][0] == 61, "two of a layout, another one between them");
      {
        const Operation first = start(a[0], 4, 10), between = start(b[0], 7, 20), second = start(a[1], 4, 30), third = start(a[2], 4, 40);
      }
      expect(a[0][0] == 21 && b[0][0] == 41 && a[1][0] == 61 && a[2][0] == 81, "three of a layout");
    }
  });
}

TEST_CASE("messages to oneself in flight") {
  for (const int n : {1, 2})
    either_way(n, threads, [](Communicator& comm) {
      int out = 7, in = 0, late = 0;
      Operation receiving = comm.async_receive(std::span(&in, 1), comm.rank(), 3);
      Operation sending = comm.async_send(std::span(&out, 1), comm.rank(), 3);
      expect(sending.wait_for(5s) && receiving.wait_for(5s) && in == 7, "receive first");
      Operation first = comm.async_send(std::span(&out, 1), comm.rank(), 4), second = comm.async_receive(std::span(&late, 1), comm.rank(), 4);
      expect(first.wait_for(5s) && second.wait_for(5s) && late == 7, "send first");
      in = 0;
      receiving = comm.async_receive(std::span(&in, 1), comm.rank(), 3);
      comm.send(std::span(&out, 1), comm.rank(), 3);
      Operation barrier = comm.async_barrier();
      expect(barrier.wait_for(5s) && receiving.wait_for(5s) && in == 7, "a blocking send");
    });
}

static void driven_by_other_calls(RankKind kind) {
  on_ranks(2, kind, [](Communicator& comm) {
    std::vector<int> data = filled(100, 1), more = filled(5000, 2);
    Operation first = comm.async_all_reduce(data, sum), second = comm.async_all_reduce(more, sum);
    bool called = false;
    first.then([&] { called = true; });
    comm.barrier();
    comm.barrier();  // between two ranks nothing overtakes: all was moved before the barrier was
    expect(first.test() && second.test() && called, "barriers drove them to their end");
    expect(all_are(data, 2) && all_are(more, 4), "sums");
    const Report report = first.wait(), again = first.wait();
    expect(report.elapsed == again.elapsed && report.sequence == again.sequence, "waiting again gives the same report");
    called = false;
    first.then([&] { called = true; });
    expect(called, "called at once when it is done already");
  });
}
TALLY_TEST_BOTH("operations go on in other calls of their communicator", "", driven_by_other_calls)

static void waiting_for_a_while(RankKind kind) {
  const test::Shared<std::atomic<int>> rounds;  // in which rank 0 has asked
  either_way(2, kind, [&](Communicator& comm, bool progress) {
    comm.barrier();
    if (comm.rank() == 1) expect(test::eventually(10s, [&] { return *rounds == (progress ? 2 : 1); }), "rank 0 has asked");
    int x = comm.rank();
    const std::int64_t begin = now_ns();
    Operation operation = comm.async_all_reduce(std::span(&x, 1), sum);
    if (comm.rank() == 0) {
      expect(!operation.test(), "not done while the other one is not there");
      expect(!operation.wait_for(5ms), "not done after 5 ms");
      expect(now_ns() - begin >= 5'000'000, "it took the 5 ms");
      ++*rounds;
    }
    expect(operation.wait_for(nanoseconds::max()) && operation.test(), "done");
    expect(x == 1, "the sum");
    expect_exact(operation.wait());
  });
}
TALLY_TEST_BOTH("wait_for is no deadline", "", waiting_for_a_while)

static void test_goes_on(RankKind kind) {
  const test::Shared<std::atomic<bool>> sent;
  Options options;
  options.slots = SlotOptions{.slots = 32, .slot_bytes = 128};
  on_ranks(
      2, kind,
      [&](Communicator& comm) {
        std::vector<int> data = filled(400, comm.rank());  // 13 frames at least
        if (comm.rank() == 1) {
          comm.send(data, 0, 3);
          *sent = true;
        } else {
          expect(test::eventually(10s, [&] { return sent->load(); }), "all frames are there");
          Operation operation = comm.async_receive(data, 1, 3);
          expect(operation.test() && all_are(data, 1), "one test() takes them");
        }
      },
      options);
}
TALLY_TEST_BOTH("test() goes on as long as something moves", "", test_goes_on)

TEST_CASE("the progress thread alone ends operations, calls back and resumes coroutines") {
  on_ranks(3, threads, [](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    std::vector<int> data = filled(1000, 1), more = filled(1000, 1);
    std::atomic<int> called{0}, resumed{0};
    Operation operation = comm.async_all_reduce(data, sum);
    operation.then([&] { ++called; });
    const auto wait = [&]() -> Task {
      const Report report = co_await comm.async_all_reduce(more, sum);
      if (report.elapsed == report.busy() + report.idle() + report.undriven) ++resumed;
    };
    wait();
    expect(test::eventually(10s, [&] { return called == 1 && resumed == 1; }), "both were called back");
    expect(all_are(data, 3) && all_are(more, 3), "sums");
    // The caller's thread inside at the same time: neither disturbs the other.
    for (int i = 0; i < 200; ++i) {
      wait();
      comm.barrier();
    }
    expect(test::eventually(10s, [&] { return resumed == 201; }), "all were resumed");
  });
}

TEST_CASE("the progress thread runs wherever the process may, or on one core, and not where its starter is pinned") {
  const cpu_set_t all = own_cores();
  std::vector<std::size_t> cores;
  for (std::size_t core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &all)) cores.push_back(core);
  REQUIRE(!cores.empty());
  const auto only = [](std::size_t core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return set;
  };
  for (const bool anywhere : {true, false}) {
    std::atomic<bool> waiting{false};
    on_ranks(2, threads, [&](Communicator& comm) {
      const cpu_set_t mine = only(cores.front()), wanted = anywhere ? all : only(cores.back());
      expect(sched_setaffinity(0, sizeof mine, &mine) == 0, "pinned");
      const ProgressThread thread = progress_thread(anywhere ? -1 : static_cast<int>(cores.back()));
      if (comm.rank() == 1) expect(test::eventually(10s, [&] { return waiting.load(); }), "rank 0 is there");
      int x = 1;
      std::atomic<bool> called{false};
      cpu_set_t seen{};
      int policy = -1;
      Operation operation = comm.async_all_reduce(std::span(&x, 1), sum);
      operation.then([&] {
        seen = own_cores();
        policy = sched_getscheduler(0);
        called = true;
      });
      waiting = true;
      expect(test::eventually(10s, [&] { return called.load(); }), "called");
      if (comm.rank() == 1) return;
      expect(CPU_EQUAL(&seen, &wanted), "its cores");
      expect(policy == (sched_getscheduler(0) == SCHED_OTHER ? SCHED_BATCH : sched_getscheduler(0)), "it takes the core from nobody whom it shares it with");
    });
  }
}

// Life and death of what holds them.

TEST_CASE("operations are destroyed while an exception passes") {
  on_ranks(2, threads, [](Communicator& comm) {
    std::vector<int> a = filled(3000, 1), b = filled(3, 1);
    try {
      const Operation first = comm.async_all_reduce(a, sum), second = comm.async_all_reduce(b, sum);
      throw std::runtime_error("mine");
    } catch (const std::runtime_error&) {
    }
    expect(all_are(a, 2) && all_are(b, 2), "both were waited for");
  });
}

TEST_CASE("misuse of operations in flight is refused") {
  on_ranks(2, threads, [](Communicator& comm) {
    const auto refused = [&](auto&& f, std::initializer_list<std::string_view> parts) {
      const Caught c = caught(f);
      expect(c.is(Errc::invalid_argument), std::string("refused: ") + c.text);
      for (const std::string_view part : parts) expect(test::has(c.text, part), std::string(c.text) + " names " + std::string(part));
    };
    std::vector<int> a = filled(100, 1), b = filled(100, 1);
    Operation first = comm.async_all_reduce(a, sum), second = comm.async_reduce(b, b, sum, 0);
    refused([&] { comm.broadcast(std::span(a).subspan(99), 0); }, {"broadcast", "all_reduce(int32 x 100", "#1", "still in flight"});
    refused([&] { const Operation o = comm.async_all_gather(std::span(a).first(2), std::span(b).first(4)); }, {"all_gather", "still in flight"});
    refused([&] { const Operation o = comm.async_all_reduce(std::span(std::as_const(a)).first(2), std::span(b).first(2), sum); }, {"all_reduce", "still in flight"});
    refused([&] { comm.all_gather(std::span(a).first(2), std::span(b).first(4)); }, {"all_gather", "still in flight"});
    // Messages, too.
    const Rank peer = 1 - comm.rank();
    std::vector<int> in = filled(10, 0), out = filled(10, 1);
    refused([&] { const Operation o = comm.async_send(std::span(a).last(1), peer); }, {"send of 4 bytes", "all_reduce(int32 x 100", "still in flight"});
    refused([&] { const Operation o = comm.async_receive(std::span(a).first(1), peer); }, {"receive of 4 bytes", "still in flight"});
    refused([&] { comm.send(std::span(a).last(1), peer); }, {"send"});
    refused([&] { comm.receive(std::span(a).last(1), peer); }, {"receive"});
    refused([&] { comm.send_receive(std::span(a).last(1), peer, in, peer); }, {"send_receive"});
    refused([&] { comm.send_receive(out, peer, std::span(a).last(1), peer); }, {"send_receive"});
    Operation receiving = comm.async_receive(in, peer, 1), large = comm.async_receive(std::span(b).first(0), peer, 2);
    refused([&] { const Operation o = comm.async_receive(std::span(in).last(1), peer, 3); }, {"receive(int32 x 10 from rank", "tag 1", "still in flight"});
    refused([&] { const Operation o = comm.async_send(std::span(in).first(1), peer, 3); }, {"receive(int32 x 10 from rank"});
    refused([&] { comm.all_reduce(in, sum); }, {"all_reduce", "receive(int32 x 10 from rank"});
    comm.send(out, peer, 1);
    comm.send(std::span(out).first(0), peer, 2);
    // Between others in memory, and what is only read: both are fine.
    std::vector<int> around(30);
    {
      const std::span all(around);
      Operation low = comm.async_receive(all.first(10), peer, 4), high = comm.async_receive(all.last(10), peer, 4), middle = comm.async_receive(all.subspan(10, 10), peer, 4);
      const Operation one = comm.async_send(out, peer, 4), two = comm.async_send(out, peer, 4), three = comm.async_send(out, peer, 4);
      low.wait(), high.wait(), middle.wait();
    }
    expect(all_are(around, 1), "three messages");
    first.wait();
    second.wait();
    receiving.wait();
    comm.broadcast(std::span(a).subspan(99), 0);  // no longer in flight
    comm.all_reduce(in, sum);
    Operation moved = std::move(first);
    refused([&] { first.wait(); }, {"moved from"});
    refused([&] { Operation().test(); }, {"never started"});
    expect(moved.test(), "it went to the other one");
  });
}

static void communicator_first(RankKind kind) {
  either_way(2, kind, [](Communicator& comm) {
    Communicator gone = comm.duplicate();
    std::vector<int> data = filled(100, 1);
    std::optional<Operation> operation;
    bool called = false;
    if (comm.rank() == 0) {
      operation = gone.async_all_reduce(data, sum);
      operation->then([&] { called = true; });
    }
    {
      Communicator last = std::move(gone);
      expect(caught([&] { gone.barrier(); }).is(Errc::invalid_argument), "a communicator that was moved from is refused");
      if (comm.rank() == 1) comm.barrier();
    }
    if (comm.rank() == 0) {
      expect(called && operation->test(), "it ended with its communicator");
      const std::vector<int> before = data;
      comm.barrier();
      expect(caught([&] { operation->wait(); }).is(Errc::invalid_argument), "with an error");
      expect(data == before, "and nothing touches its memory");
    }
  });
}
TALLY_TEST_BOTH("a communicator goes before its operations", "", communicator_first)

TEST_CASE("the progress thread goes before the operations that it drives") {
  on_ranks(2, threads, [](Communicator& comm) {
    for (int round = 0; round < 20; ++round) {
      std::optional<ProgressThread> thread = progress_thread();
      std::vector<int> data = filled(20'000, 1), more = filled(10, 1);
      Operation first = comm.async_all_reduce(data, sum), second = comm.async_all_reduce(more, sum);
      if (round % 2) std::this_thread::sleep_for(200us);
      thread.reset();
      second.wait();
      first.wait();
      expect(all_are(data, 2) && all_are(more, 2), "sums");
    }
  });
}

TEST_CASE("the last to hold the progress thread is what it calls back") {
  on_ranks(2, threads, [](Communicator& comm) {
    int x = 1;
    std::atomic<int> state{0};
    std::optional<ProgressThread> thread = progress_thread();
    Operation operation = comm.async_all_reduce(std::span(&x, 1), sum);
    operation.then([&] {
      const ProgressThread mine = progress_thread();
      state = 1;
      test::eventually(5s, [&] { return state == 2; });
      std::this_thread::sleep_for(5ms);
      state = 3;
    });
    expect(test::eventually(5s, [&] { return state == 1; }), "called back");
    thread.reset();
    state = 2;
    expect(test::eventually(5s, [&] { return state == 3; }), "called to the end");
    operation.wait();
    comm.barrier();
  });
}

// Threads.

TEST_CASE("a second thread is refused, with operations in flight and with the progress thread") {
  either_way(2, threads, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    int x = 1, y = 1, z = 1;
    Operation pending = comm.async_all_reduce(std::span(&x, 1), sum);
    std::atomic<bool> inside{false}, tried{false};
    const auto stays_inside = commutative([&](int a, int b) {
      inside = true;
      return test::eventually(10s, [&] { return comm.rank() == 1 || tried; }) ? a + b : -1;
    });
    if (comm.rank() == 0) {
      Caught second;
      std::thread thread([&] {
        while (!inside) std::this_thread::yield();
        second = caught([&] { comm.barrier(); });
        tried = true;
        other.all_reduce(std::span(&y, 1), sum);  // another communicator is nobody else's
      });
      comm.all_reduce(std::span(&z, 1), stays_inside);
      thread.join();
      expect(second.is(Errc::invalid_argument) && test::has(second.text, "in use by another thread"), second.text);
    } else {
      comm.all_reduce(std::span(&z, 1), stays_inside);
      other.all_reduce(std::span(&y, 1), sum);
    }
    pending.wait();
    expect(x == 2 && y == 2 && z == 2, "nothing else came of it");
  });
}

TEST_CASE("what the progress thread calls back may wait for its operation while the caller's thread is inside") {
  std::atomic<int> state{0};
  on_ranks(2, threads, [&](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    int x = 1;
    Caught waited;
    if (comm.rank() == 1) std::this_thread::sleep_for(5ms);
    std::optional<Operation> operation = comm.async_all_reduce(std::span(&x, 1), sum);
    if (comm.rank() == 1) {  // comes to the barrier, in which rank 0's thread is, only when rank 0's call-back has ended
      operation->wait();
      expect(test::eventually(5s, [&] { return state == 2; }), "called to the end");
      comm.barrier();
      return void(comm.barrier());
    }
    operation->then([&] {
      state = 1;
      std::this_thread::sleep_for(15ms);
      waited = caught([&] { operation->wait(); });
      operation.reset();
      state = 2;
    });
    expect(test::eventually(5s, [&] { return state > 0; }), "called back");
    comm.barrier();
    expect(waited.ran && !waited.error, waited.text);
    comm.barrier();  // books what the call-back gave back
    const std::uint64_t calls = booked(comm);
    expect(calls == 1, "booked once");
  });
}

TEST_CASE("an operator that calls its own communicator gets an error, in whichever thread") {
  either_way(2, threads, [](Communicator& comm) {
    int x = 1;
    std::atomic<int> refused{0}, other{0};
    const auto calls = [&](int a, int b) {
      const Caught c = caught([&] { comm.barrier(); });
      ++(c.is(Errc::invalid_argument) ? refused : other);
      return a + b;
    };
    Operation operation = comm.async_all_reduce(std::span(&x, 1), commutative(calls));
    std::this_thread::sleep_for(20ms);
    operation.wait();
    expect(x == 2 && refused > 0 && other == 0, "refused each time");
    comm.barrier();
  });
}

TEST_CASE("an operator that destroys an operation in flight of its communicator ends the process and says why", "[processes]") {
  for (const bool progress : {false, true}) {
    CAPTURE(progress);
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    test::Process child([&] {
      ::signal(SIGABRT, SIG_DFL);
      const rlimit none{0, 0};
      ::setrlimit(RLIMIT_CORE, &none);
      ::dup2(ends[1], 2);
      launch(2, [&](Communicator& comm) {
        std::optional<ProgressThread> thread;
        if (progress) thread = progress_thread();
        int x = 1, never = 0;
        std::optional<Operation> victim = comm.async_receive(std::span(&never, 1), 1 - comm.rank(), 5);  // nobody sends
        Operation operation = comm.async_all_reduce(std::span(&x, 1), commutative([&](int a, int b) {
          victim.reset();
          return a + b;
        }));
        if (progress) std::this_thread::sleep_for(10s);
        operation.wait();
      }, threads);
    });
    ::close(ends[1]);
    CHECK(test::killed_by(child.wait(8s), SIGABRT));
    char text[1000] = {};
    CHECK(::read(ends[0], text, sizeof text - 1) > 0);
    CHECK_THAT(text, Catch::StartsWith("tally: an operator destroys an Operation in flight of the communicator that calls it"));
    ::close(ends[0]);
  }
}

TEST_CASE("an operator may destroy operations that are done, and those of other communicators") {
  either_way(2, threads, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    int x = 1, y = 1, z = 1, w = 1;
    std::optional<Operation> done = comm.async_all_reduce(std::span(&y, 1), sum), again = comm.async_all_reduce(std::span(&w, 1), sum), elsewhere;
    done->wait();
    again->wait();
    elsewhere = other.async_all_reduce(std::span(&z, 1), sum);
    std::uint64_t sent = 0;
    Operation operation = comm.async_all_reduce(std::span(&x, 1), commutative([&](int a, int b) {
      if (again) caught([&] { again->wait(); });  // refused, except in the progress thread
      sent = comm.counters().frames_sent;
      again.reset();
      done.reset();
      elsewhere.reset();
      return a + b;
    }));
    operation.wait();
    expect(x == 2 && y == 2 && z == 2 && w == 2 && !done && !again && !elsewhere && sent > 0, "all went on");
    operation = Operation();
    comm.barrier();
    const std::uint64_t calls = booked(comm);
    expect(calls == 4, "all are booked once, as is the one in duplicate(): " + std::to_string(calls));
  });
}

TEST_CASE("another thread may destroy what is done while the communicator is in use") {
  either_way(2, threads, [](Communicator& comm) {
    for (int round = 0; round < 3; ++round) {
      int x = 1;
      std::optional<Operation> done = comm.async_all_reduce(std::span(&x, 1), sum);
      done->wait();
      comm.barrier();
      if (comm.rank() == 1) std::this_thread::sleep_for(20ms);
      std::atomic<bool> inside{false};
      std::thread thread([&] {
        while (!inside) std::this_thread::yield();
        std::this_thread::sleep_for(5ms);
        done.reset();
      });
      inside = true;
      comm.barrier();
      thread.join();
      for (int i = 0; i < 5; ++i) comm.async_all_reduce(std::span(&x, 1), sum).wait();
    }
    comm.barrier();
    const std::uint64_t calls = booked(comm);
    expect(calls == 18, "each is booked once: " + std::to_string(calls));
  });
}

// What they report.

TEST_CASE("operations account for their time exactly, and the thread's only once") {
  for (const bool progress : {false, true})
    on_ranks(3, threads, [progress](Communicator& comm) {
      std::optional<ProgressThread> thread;
      if (progress) thread = progress_thread();
      comm.barrier();
      std::vector<std::vector<int>> data(12);
      std::vector<Operation> operations;
      const std::int64_t begin = now_ns();
      for (std::size_t i = 0; i < data.size(); ++i) {
        operations.push_back(comm.async_all_reduce(data[i] = filled(i % 2 ? 20'000 : 5, 1), sum));
        if (i % 5 == static_cast<std::size_t>(comm.rank())) std::this_thread::sleep_for(1ms);
      }
      nanoseconds worked{}, elapsed{};
      std::uint64_t sent = 0;
      for (Operation& operation : operations) {
        const Report r = operation.wait();
        expect_exact(r);
        nanoseconds blamed{};
        for (const Blame& b : r.blame()) blamed += b.total();
        expect(blamed == r.wait_arrival + r.wait_transfer + r.wait_credit, "blame adds up to the waits");
        worked += r.busy() + r.idle();
        elapsed += r.elapsed;
        sent += r.bytes_sent;
      }
      const nanoseconds wall(now_ns() - begin);
      for (Operation& operation : operations) expect(operation.wait().elapsed <= wall + wall / 1000 + 1us, "no longer than the time between post and wait");
      operations.clear();
      nanoseconds in_rows{}, queued{};
      std::uint64_t calls = 0, sent_in_rows = 0;
      for (const LedgerRow& row : comm.ledger().rows())
        if (row.operation == Collective::all_reduce) in_rows += row.elapsed, queued += row.queued, calls += row.calls, sent_in_rows += row.bytes_sent;
      expect(calls == 12 && in_rows == elapsed && sent_in_rows == sent, "the ledger has what the reports have: " + std::to_string((in_rows - elapsed).count()) + " ns more");
      expect(worked - queued <= wall + wall / 1000 + 1us, "what they pay for together is at most the time of one thread: " + std::to_string((worked - queued).count()) + " of " + std::to_string(wall.count()));
      expect(queued > 0ns, "some queued");
    });
}

/// Rank `late` starts an operation and then leaves it alone; `held` depend on what it has to pass on.
struct Neglect {
  const char* algorithm;
  int n;
  Rank late;
  std::vector<Rank> held;
};
/// Two ranks that wait for two communicators in crossing order: each has to drive what it does not wait for.
static void waits_that_cross(RankKind kind) {
  on_ranks(2, kind, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    for (int round = 0; round < 30; ++round) {
      std::vector<int> a = filled(300'000, 1), b = filled(200'000, 2);  // more than the slots hold
      Operation first = comm.async_all_reduce(a, sum), second = other.async_all_reduce(b, sum);
      Operation& mine = comm.rank() == 0 ? first : second;
      Operation& later = comm.rank() == 0 ? second : first;
      expect_exact(mine.wait());
      expect_exact(later.wait());
      expect(all_are(a, 2) && all_are(b, 4), "both sums");
      // And a blocking call of one while the other's operation is pending.
      Operation pending = (comm.rank() == 0 ? other : comm).async_all_reduce(comm.rank() == 0 ? b : a, sum);
      Operation its = (comm.rank() == 0 ? comm : other).async_all_reduce(comm.rank() == 0 ? a : b, sum);
      expect_exact(pending.wait());
      expect_exact(its.wait());
    }
    const auto total = [](const Communicator& c) {
      nanoseconds charged{};
      for (const LedgerRow& row : c.ledger().rows()) charged += row.busy() + row.idle() - row.queued;
      return charged;
    };
    expect(total(comm) > 0ns && total(other) > 0ns, "both are accounted");
  });
}
TALLY_TEST_BOTH("waits that cross between communicators", "", waits_that_cross)

static void blamed_for_not_driving(RankKind kind) {
  for (const Neglect& c : {Neglect{"ring", 3, 1, {0, 2}}, {"recursive_doubling", 4, 1, {3}}, {"tree", 3, 0, {1, 2}}, {"bruck", 5, 1, {3}}}) {
    CAPTURE(c.algorithm);
    on_ranks(c.n, kind, [&c](Communicator& comm) {
      const auto n = static_cast<std::size_t>(c.n);
      std::vector<int> data = filled(n, 1), out = data;
      const auto start = [&] { return c.algorithm == std::string_view("bruck") ? comm.async_all_to_all(data, out, {.algorithm = c.algorithm}) : comm.async_all_reduce(data, sum, {.algorithm = c.algorithm}); };
      start().wait();
      comm.barrier();
      Operation operation = start();
      if (comm.rank() == c.late) std::this_thread::sleep_for(30ms);
      const Report r = operation.wait();
      expect_exact(r);
      nanoseconds on_late{}, others{};
      for (const Blame& b : r.blame()) (b.rank == c.late ? on_late : others) += b.arrival;
      const std::string blame = std::string(c.algorithm) + ": rank " + std::to_string(comm.rank()) + " blames rank " + std::to_string(c.late) + " for " + std::to_string(test::ms(on_late.count())) + " ms, others for " +
                                std::to_string(test::ms(others.count())) + " ms";
      if (comm.rank() == c.late) {
        expect(r.undriven >= 25ms && r.undriven <= 200ms, "nobody drove it for 30 ms: " + std::to_string(test::ms(r.undriven.count())));
        expect(r.exposed <= 20ms, "but the caller did not wait");
      } else if (std::ranges::count(c.held, comm.rank())) {
        // Where the machine has no core for this rank, nobody drives here either.
        expect(on_late + r.undriven >= 15ms && on_late <= 200ms, blame);
        expect(r.exposed + r.undriven >= 15ms, "the caller waited");
        std::printf("%s\n", blame.c_str());
        std::fflush(stdout);
      }
    });
  }
}
TALLY_TEST_BOTH("I6b: who starts an operation and leaves it alone is blamed for it", "[timing]", blamed_for_not_driving)

TEST_CASE("who is late to a blocking call is blamed by it, whatever else is in flight", "[timing]") {
  on_ranks(3, threads, [](Communicator& comm) {
    int x = 1, y = 1;
    comm.barrier();
    Operation older = comm.rank() == 0 ? comm.async_receive(std::span(&x, 1), 2, 9) : Operation();
    if (comm.rank() == 1) std::this_thread::sleep_for(30ms);
    const Report r = comm.broadcast(std::span(&y, 1), 1);
    if (comm.rank() == 0) {
      expect_exact(r);
      const auto blame = r.blame();
      expect(r.wait_arrival >= 15ms && r.wait_local < 10ms && !blame.empty() && blame[0].rank == 1, "rank 1 was late, and nobody else: arrival " + std::to_string(test::ms(r.wait_arrival.count())) + " ms, local " + std::to_string(test::ms(r.wait_local.count())) + " ms");
    }
    if (comm.rank() == 2) comm.send(std::span(&x, 1), 0, 9);
    if (comm.rank() == 0) {
      const Report late = older.wait();
      expect_exact(late);
      expect(late.wait_arrival < 15ms && late.wait_local >= 15ms, "the other one was in the background meanwhile");
    }
    comm.barrier();
  });
}

TEST_CASE("who asks again and again waits while he asks", "[quiet]") {
  std::atomic<int> asked{0};  // by rank 0
  on_ranks(2, threads, [&](Communicator& comm) {
    comm.barrier();
    for (const bool tests : {true, false}) {
      int x = 1;
      if (comm.rank() == 1) {
        std::this_thread::sleep_for(50ms);
        expect(test::eventually(10s, [&] { return asked >= 100; }), "rank 0 asks");
      }
      Operation operation = comm.async_all_reduce(std::span(&x, 1), sum);
      while (tests ? !operation.test() : !operation.wait_for(1us)) asked += comm.rank() == 0;
      const Report r = operation.wait();
      expect_exact(r);
      expect(r.exposed + r.undriven <= r.elapsed, "no time is both the caller's and nobody's");
      expect(r.wait_arrival + r.wait_transfer + r.undriven + r.protocol + r.wait_local == r.elapsed && r.wait_local <= r.elapsed / 4, "nothing else was served");
      if (comm.rank() == 0) expect(r.wait_arrival > 0ns && r.blame().at(0).rank == 1, "and rank 1 is who it waited for");
      asked = 0;
      comm.barrier();
    }
  });
}

TEST_CASE("one thread that waits for many communicators pays once", "[quiet]") {
  on_ranks(2, threads, [](Communicator& comm) {
    std::vector<Communicator> many;
    for (int i = 0; i < 8; ++i) many.push_back(comm.duplicate());
    std::vector<int> x(many.size(), 1);
    const ProgressThread thread = progress_thread();
    comm.barrier();
    if (comm.rank() == 1) std::this_thread::sleep_for(100ms);
    const std::int64_t begin = test::now_ns();
    std::vector<Operation> operations;
    for (std::size_t i = 0; i < many.size(); ++i) operations.push_back(many[i].async_all_reduce(std::span(&x[i], 1), sum));
    std::this_thread::sleep_for(120ms);
    double joules = 0;
    for (Operation& operation : operations) {
      const Report r = operation.wait();
      expect_exact(r);
      joules += r.energy().value;
    }
    // Two ranks share the progress thread: awake all the time it takes 5 watts.
    const double most = 5.0 * static_cast<double>(test::now_ns() - begin) * 1e-9;
    expect(joules > 0 && joules <= most, std::to_string(joules) + " J, of at most " + std::to_string(most));
  });
}

TEST_CASE("a thread that looks after what it started elsewhere does not keep the next user out") {
  on_ranks(2, threads, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    int x = 1, y = 1, z = 0;
    Operation started = other.async_receive(std::span(&z, 1), 1 - comm.rank(), 99);
    std::atomic<bool> refused = false;
    std::thread user([&] {  // has `other` for itself from here on
      const Caught c = caught([&] {
        for (int i = 0; i < 2000; ++i) other.send_receive(std::span(&x, 1), 1 - comm.rank(), std::span(&y, 1), 1 - comm.rank(), 3);
        other.send(std::span(&x, 1), 1 - comm.rank(), 99);
        started.wait();
      });
      refused = c.error || c.foreign;
    });
    for (int i = 0; i < 200; ++i) {
      int w = 1;
      comm.all_reduce(std::span(&w, 1), sum);
      if (comm.rank() == 1) std::this_thread::sleep_for(100us);
    }
    user.join();
    expect(!refused, "never two threads called it");
    comm.barrier();
  });
}

TEST_CASE("what nobody drives before its communicator goes is undriven", "[timing]") {
  on_ranks(2, threads, [](Communicator& comm) {
    if (comm.rank() == 1) return;
    int x = 1;
    Communicator mine = std::move(comm);
    const Ledger& ledger = mine.ledger();
    Operation operation = mine.async_all_reduce(std::span(&x, 1), sum);
    std::this_thread::sleep_for(30ms);
    { const Communicator gone = std::move(mine); }
    expect(caught([&] { operation.wait(); }).error, "it ended with an error");
    const LedgerRow& row = ledger.rows().front();
    expect(row.undriven >= 25ms && row.queued < 5ms, "undriven, not queued: " + std::to_string(test::ms(row.undriven.count())) + " ms");
  });
}

TEST_CASE("the progress thread sleeps while nothing is pending, and while the caller's thread drives", "[timing]") {
  on_ranks(2, threads, [](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    int x = 1;
    comm.async_all_reduce(std::span(&x, 1), sum).wait();
    comm.barrier();
    const nanoseconds idle_from = process_time();
    std::this_thread::sleep_for(200ms);
    const nanoseconds idle = process_time() - idle_from;
    comm.barrier();
    Operation pending = comm.async_all_reduce(std::span(&x, 1), sum);
    const nanoseconds blocked_from = process_time();
    if (comm.rank() == 1) std::this_thread::sleep_for(200ms);
    comm.barrier();  // rank 0 is in it for 200 ms, with something pending
    const nanoseconds blocked = process_time() - blocked_from;
    pending.wait();
    if (comm.rank() == 0) std::printf("processor time in 200 ms: %.2f ms idle, %.2f ms with a caller who waits\n", test::ms(idle.count()), test::ms(blocked.count()));
    expect(idle < 20ms, "idle: " + std::to_string(test::ms(idle.count())) + " ms of processor time");
    expect(blocked < 40ms, "the caller waits: " + std::to_string(test::ms(blocked.count())) + " ms of processor time");
  });
}

TEST_CASE("the progress thread naps while several communicators wait for other ranks", "[timing]") {
  on_ranks(2, threads, [](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    Communicator other = comm.duplicate(), third = comm.duplicate();
    int x = 1, y = 1, z = 1;
    comm.barrier();
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(500ms);
      comm.all_reduce(std::span(&x, 1), sum);
      return other.all_reduce(std::span(&y, 1), sum), third.all_reduce(std::span(&z, 1), sum), void();
    }
    Operation first = comm.async_all_reduce(std::span(&x, 1), sum), second = other.async_all_reduce(std::span(&y, 1), sum);
    const auto naps = [] {
      rusage usage{};
      ::getrusage(RUSAGE_SELF, &usage);
      return usage.ru_nvcsw;
    };
    const nanoseconds from = process_time();
    const long naps_before = naps();
    std::this_thread::sleep_for(300ms);
    const nanoseconds used = process_time() - from;
    expect(naps() - naps_before >= 50, "it naps: " + std::to_string(naps() - naps_before) + " times");
    std::atomic<bool> done{false};
    Operation last = third.async_all_reduce(std::span(&z, 1), sum);
    last.then([&] { done = true; });
    expect(test::eventually(5s, [&] { return done.load(); }), "it goes on with all of them");
    std::printf("processor time in 300 ms: %.2f ms with two communicators that wait\n", test::ms(used.count()));
    expect(used < 150ms, "it took " + std::to_string(test::ms(used.count())) + " ms of processor time");
  });
}

TEST_CASE("the progress thread turns to another communicator although it sleeps in one", "[timing]") {
  on_ranks(2, threads, [](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    Communicator stalled = comm.duplicate(), other = comm.duplicate();
    int x = 1, y = 1;
    std::vector<nanoseconds> took;
    std::optional<Operation> never;
    if (comm.rank() == 0) never = stalled.async_all_reduce(std::span(&x, 1), sum);  // rank 1 does not come for long
    for (int i = 0; i < 10; ++i) {
      std::this_thread::sleep_for(7ms);
      comm.barrier();
      const std::int64_t begin = now_ns();
      std::atomic<bool> done{false};
      Operation operation = other.async_all_reduce(std::span(&y, 1), sum);
      operation.then([&] { done = true; });
      while (!done && now_ns() - begin < 2'000'000'000) std::this_thread::sleep_for(100us);
      took.emplace_back(now_ns() - begin);
      expect(done, "done without the caller");
    }
    std::ranges::sort(took);
    expect(took[5] < 8ms, "it took " + std::to_string(test::ms(took[5].count())) + " ms");
    if (comm.rank() == 1) stalled.all_reduce(std::span(&x, 1), sum);
    if (never) never->wait();
  });
}

TEST_CASE("ten thousand operations in flight", "[timing]") {
  on_ranks(2, threads, [](Communicator& comm) {
    constexpr std::size_t many = 10'000;
    std::vector<int> data(many * 4), out(many * 4);
    for (const char* algorithm : {"one_shot", "ring"})
      for (int round = 0; round < 2; ++round) {
        std::ranges::fill(data, comm.rank());
        std::vector<Operation> operations;
        const std::int64_t begin = now_ns();
        for (std::size_t i = 0; i < many; ++i) operations.push_back(comm.async_all_reduce(std::span(data).subspan(4 * i, 4), std::span(out).subspan(4 * i, 4), sum, {.algorithm = algorithm}));
        const std::int64_t started = now_ns();
        for (Operation& operation : operations) operation.wait();
        const std::int64_t waited = now_ns();
        operations.clear();
        expect(all_are(out, 1), "sums");
        if (comm.rank() == 0) std::printf("%zu %s: started in %.1f ms, waited for in %.1f ms, given back in %.1f ms\n", many, algorithm, test::ms(started - begin), test::ms(waited - started), test::ms(now_ns() - waited));
        expect(started - begin < 700'000'000, "starting one does not look at all others");
        expect(now_ns() - begin < 15'000'000'000, "within 15 s");
      }
  });
}
