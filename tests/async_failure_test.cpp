// SPDX-License-Identifier: Apache-2.0
// Failures while several operations are in flight: all of them end with an error, nothing hangs, nothing touches their
// memory afterwards, and their destructors are safe.
#include <catch2/catch.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <new>
#include <optional>
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

/// Operations of several kinds and sizes, over memory that is guarded against late writers.
class Flight {
 public:
  explicit Flight(Communicator& comm, std::size_t many = 6) : comm_(comm), data_(many) {
    for (std::size_t i = 0; i < many; ++i) data_[i].assign(i % 3 == 1 ? 30'000 : 3 + i, 1);
  }
  /// Another rank's failure may be known before all are started.
  void start() {
    starting_ = caught([&] {
      for (std::size_t i = 0; i < data_.size(); ++i) {
        if (i % 3 == 2) operations_.push_back(comm_.async_broadcast(data_[i], static_cast<int>(i) % comm_.size()));
        else operations_.push_back(comm_.async_all_reduce(data_[i], sum));
      }
      if (comm_.size() > 1) operations_.push_back(comm_.async_receive(message_, (comm_.rank() + 1) % comm_.size(), 77));
    });
  }
  std::vector<Operation>& operations() { return operations_; }
  /// How each of them ended, last ones first.
  std::vector<Caught> ends() {
    std::vector<Caught> all(operations_.size());
    for (std::size_t i = operations_.size(); i-- > 0;) all[i] = caught([&] { operations_[i].wait(); });
    if (starting_.error || starting_.foreign) all.push_back(starting_);
    return all;
  }
  /// At least the message, for which nobody has sent, has failed; so does whatever comes next, and nobody writes any more.
  void expect_over(std::initializer_list<Errc> codes) {
    const auto is_one = [&](const Caught& c) { return c.error && std::ranges::find(codes, c.code) != codes.end(); };
    const auto all = ends();
    std::size_t failed = 0;
    for (const Caught& c : all) {
      expect(c.ran && !c.foreign && (!c.error || is_one(c)), std::string("ended well, or as expected: ") + c.text);
      failed += c.error;
    }
    expect(failed > 0 && is_one(all.back()), std::string("the last one failed: ") + all.back().text);
    const auto before = data_;
    const std::vector<int> message = message_;
    std::this_thread::sleep_for(10ms);
    expect(before == data_ && message == message_, "nothing touches the memory afterwards");
    expect(caught([&] { comm_.barrier(); }).error, "the communicator refuses further calls");
    expect(caught([&] { const Operation o = comm_.async_barrier(); }).error, "also in the background");
    for (Operation& operation : operations_) expect(operation.test(), "all are done");
  }

 private:
  Communicator& comm_;
  Caught starting_;
  std::vector<std::vector<int>> data_;
  std::vector<int> message_ = std::vector<int>(5, -1);
  std::vector<Operation> operations_;
};

/// Each rank's f, with the progress thread and without; nothing may take longer than ten seconds.
template <class F>
void everywhere(int n, RankKind kind, F f, const std::vector<Rank>& but = {}) {
  for (const bool progress : {false, true}) {
    const std::int64_t begin = now_ns();
    const test::Outcome outcome = test::outcome_of(n, kind, [&](Communicator& comm) {
      std::optional<ProgressThread> thread;
      if (progress) thread = progress_thread();
      f(comm);
    });
    CAPTURE(n, progress, outcome);
    for (Rank r = 0; r < n; ++r)
      if (std::ranges::count(but, r) == 0) CHECK((outcome.ranks[static_cast<std::size_t>(r)].ran && !outcome.ranks[static_cast<std::size_t>(r)].error && !outcome.ranks[static_cast<std::size_t>(r)].foreign));
    CHECK(now_ns() - begin < 10'000'000'000);
  }
}

}  // namespace

static void peer_leaves(RankKind kind) {
  everywhere(3, kind, [](Communicator& comm) {
    if (comm.rank() == 1) {
      int x = 1;
      comm.all_reduce(std::span(&x, 1), sum);
      return;
    }
    int x = 1;
    comm.all_reduce(std::span(&x, 1), sum);
    Flight flight(comm);
    flight.start();
    flight.expect_over({Errc::peer_left});
  });
}
TALLY_TEST_BOTH("a peer leaves with operations in flight", "", peer_leaves)

static void peer_dies(RankKind kind) {
  everywhere(
      3, kind,
      [](Communicator& comm) {
        Flight flight(comm);
        flight.start();
        if (comm.rank() == 1) ::raise(SIGKILL);
        flight.expect_over({Errc::peer_lost});
      },
      {1});
}
TEST_CASE("a peer dies with operations in flight", "[processes]") { peer_dies(processes); }

static void peer_calls_something_else(RankKind kind) {
  everywhere(3, kind, [](Communicator& comm) {
    Flight flight(comm);
    std::vector<int> other(2, 1);
    if (comm.rank() == 1) caught([&] { flight.operations().push_back(comm.async_all_reduce(other, max)); });
    flight.start();
    flight.expect_over({Errc::mismatch});
  });
}
TALLY_TEST_BOTH("a peer starts something else", "", peer_calls_something_else)

static void aborted_from_another_thread(RankKind kind) {
  everywhere(3, kind, [](Communicator& comm) {
    Flight flight(comm);
    flight.start();
    std::optional<std::thread> thread;
    if (comm.rank() == 2) thread.emplace([&] {
      std::this_thread::sleep_for(10ms);
      comm.abort("enough");
    });
    const std::string text = flight.ends().back().text;
    expect(test::has(text, "enough"), text);
    flight.expect_over({Errc::aborted});
    if (thread) thread->join();
  });
}
TALLY_TEST_BOTH("abort() from another thread ends what is in flight", "", aborted_from_another_thread)

static void operator_throws(RankKind kind) {
  everywhere(2, kind, [](Communicator& comm) {
    std::vector<int> a(4000, 1), b(4000, 1), c(4000, 1), d(5, 1);
    const auto throws = [&](int x, int y) {
      if (comm.rank() == 0) throw std::out_of_range("mine");
      return x + y;
    };
    Operation first = comm.async_all_reduce(a, sum), second = comm.async_all_reduce(b, commutative(throws)), third, never;
    std::this_thread::sleep_for(comm.rank() * 3ms);  // the failure may be there before the others are started
    const Caught starting = caught([&] {
      third = comm.async_all_reduce(c, sum);
      never = comm.async_receive(d, 1 - comm.rank(), 5);
    });
    std::this_thread::sleep_for(5ms);
    const Caught caught_third = caught([&] { third.wait(); }), message = starting.error ? starting : caught([&] { never.wait(); }), caught_second = caught([&] { second.wait(); }), caught_first = caught([&] { first.wait(); });
    if (comm.rank() == 0) expect(caught_second.foreign && test::has(caught_second.text, "mine"), std::string("its own exception: ") + caught_second.text);
    else expect(!caught_second.foreign && (!caught_second.error || caught_second.code == Errc::aborted), caught_second.text);
    for (const Caught* other : {&caught_first, &caught_third, &message}) expect(!other->foreign && (!other->error || other->code == Errc::aborted || starting.error), std::string("nobody else's: ") + other->text);
    expect(message.error && test::has(message.text, "mine"), message.text);
    expect(caught([&] { comm.barrier(); }).is(Errc::aborted), "and no more calls");
  });
}
TALLY_TEST_BOTH("an operator throws with other operations in flight", "", operator_throws)

static void thrown_in_a_blocking_call(RankKind kind) {
  const test::Shared<std::atomic<int>> started;
  const test::Outcome outcome = test::outcome_of(2, kind, [&](Communicator& comm) {
    std::vector<int> a(5, 1), b(5, 1);
    const auto throws = [&](int x, int y) {
      if (comm.rank() == 0) throw std::out_of_range("mine");
      return x + y;
    };
    if (comm.rank() == 1) {
      test::eventually(10s, [&] { return *started == 1; });
      const Caught c = caught([&] { comm.all_reduce(a, b, commutative(throws), {.algorithm = "one_shot"}), comm.barrier(), comm.barrier(); });
      return expect(c.is(Errc::aborted) && test::has(c.text, "mine"), c.text);
    }
    Operation operation = comm.async_all_reduce(a, b, commutative(throws), {.algorithm = "one_shot"});
    *started = 1;
    const Caught blocking = caught([&] { comm.barrier(); }), own = caught([&] { operation.wait(); });
    expect(blocking.is(Errc::aborted) && test::has(blocking.text, "mine") && test::has(blocking.text, "all_reduce"), std::string("the barrier: ") + blocking.text);
    expect(own.foreign && std::string_view(own.text) == "mine", std::string("its own: ") + own.text);
  });
  CAPTURE(outcome);
  for (const Caught& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
}
TALLY_TEST_BOTH("a blocking call that drives an operation whose operator throws fails with an error of its own", "", thrown_in_a_blocking_call)

TEST_CASE("an operator of a share, or of a step without a peer, throws with other operations in flight") {
  everywhere(2, threads, [](Communicator& comm) {
    std::vector<int> a(40'000, 1), b(4000, 1), c(4000, 0);
    const auto throws = [](int, int) -> int { throw std::out_of_range("mine"); };
    std::optional<Operation> pending;
    if (comm.rank() == 0) pending = comm.async_receive(a, 1, 5);  // nobody sends
    else pending = comm.async_receive(a, 0, 5);
    expect(caught([&] { comm.all_reduce(b, c, commutative(throws), {.algorithm = "zero_copy"}); }).ran, "ended");
    const Caught other = caught([&] { pending->wait(); });
    expect(other.is(Errc::aborted), std::string("not the one that threw: ") + other.text);
  });
  // The rest of a frame that could be taken in part at first, and steps that this rank does by itself.
  for (const char* algorithm : {"one_shot", "tree", "ring", "recursive_halving", "two_shot", "double_tree", "chain", "hierarchical"})
    for (const int n : {2, 4}) {
      CAPTURE(algorithm);
      everywhere(n, threads, [algorithm](Communicator& comm) {
        std::vector<int> a(40'000, 1), b(40'000, 1), c(40'000, 1), d(5, 1);
        std::atomic<int> calls{0}, thrown{0};
        const auto throws = [&](int x, int y) -> int {
          if (++calls < 12'000) return x + y;
          ++thrown;
          throw std::out_of_range("mine");
        };
        Operation first, second, third, never;
        std::string others;
        const auto note = [&](const Caught& end) {
          if (end.foreign) others += end.text;
        };
        note(caught([&] { first = comm.async_all_reduce(a, sum, {.algorithm = algorithm}); }));
        const Caught start = caught([&] { second = comm.async_all_reduce(b, commutative(throws), {.algorithm = algorithm}); });
        if (!start.error && !start.foreign) {
          note(caught([&] { third = comm.async_all_reduce(c, sum, {.algorithm = algorithm}); }));
          note(caught([&] { never = comm.async_receive(d, (comm.rank() + 1) % comm.size(), 5); }));
        }
        for (Operation* other : {&never, &third, &first}) note(caught([&] { other->wait(); }));
        const Caught own = caught([&] { second.wait(); });
        expect(others.empty(), "given to another operation: " + others);
        if (thrown > 0) expect(own.foreign || start.foreign, std::string("its own: ") + own.text);
      });
    }
}

TEST_CASE("operations are destroyed while the failure of one of them passes") {
  everywhere(2, threads, [](Communicator& comm) {
    std::vector<int> a(4000, 1), b(4000, 1);
    const auto throws = [](int, int) -> int { throw std::out_of_range("mine"); };
    const Caught c = caught([&] {
      Operation first = comm.async_all_reduce(a, commutative(throws));
      const Operation second = comm.async_all_reduce(b, sum);
      first.wait();
    });
    expect(c.foreign || c.is(Errc::aborted), c.text);
  });
}

static void deadline(RankKind kind) {
  everywhere(2, kind, [](Communicator& comm) {
    comm.barrier();
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(200ms);
      return;
    }
    std::vector<int> a(5, 1), b(5, 1);
    Operation first = comm.async_all_reduce(a, sum, {.timeout = 60ms}), second = comm.async_all_reduce(b, sum, {.timeout = 10s});
    const Caught c = caught([&] { first.wait(); });
    expect(c.is(Errc::timeout) && c.ended - c.began >= 30'000'000 && c.ended - c.began < 190'000'000, c.text);
    expect(caught([&] { second.wait(); }).is(Errc::timeout), "the communicator's failure is the other one's, too");
  });
}
TALLY_TEST_BOTH("the deadline of one ends all", "[timing]", deadline)

/// With several communicators the progress thread looks at each for but a moment, again and again.
static void noticed_among_several(RankKind kind) {
  everywhere(2, kind, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    const ProgressThread thread = progress_thread();
    std::vector<float> a(1000), b(1000);
    std::atomic<int> ended{0};
    Operation first = comm.async_broadcast(a, 1 - comm.rank()), second = other.async_broadcast(b, 1 - comm.rank());
    for (Operation* each : {&first, &second}) each->then([&] { ++ended; });
    expect(test::eventually(20s, [&] { return ended == 2; }), "without any call");
    for (Operation* each : {&first, &second}) expect(caught([&] { each->wait(); }).is(Errc::mismatch), "different roots");
  });
}
TALLY_TEST_BOTH("the progress thread notices what is wrong among several communicators", "", noticed_among_several)

static void noticed_by_testing(RankKind kind) {
  everywhere(2, kind, [](Communicator& comm) {
    std::vector<float> a(1000);
    Operation operation = comm.async_broadcast(a, 1 - comm.rank());
    expect(test::eventually(20s, [&] { return operation.test(); }), "found without waiting");
    expect(caught([&] { operation.wait(); }).is(Errc::mismatch), "different roots");
  });
}
TALLY_TEST_BOTH("who only tests is told what is wrong, too", "", noticed_by_testing)

TEST_CASE("the late rank is blamed by operations that the progress thread looks at by turns", "[processes][timing]") {
  const test::Outcome outcome = test::outcome_of(2, processes, [](Communicator& comm) {
    Communicator other = comm.duplicate();
    const ProgressThread thread = progress_thread();
    std::vector<int> a(5, 1), b(5, 1);
    comm.barrier();
    if (comm.rank() == 1) std::this_thread::sleep_for(100ms);
    Operation first = comm.async_all_reduce(a, sum), second = other.async_all_reduce(b, sum);
    if (comm.rank() == 0) std::this_thread::sleep_for(200ms);
    for (Operation* each : {&first, &second}) {
      const Report r = each->wait();
      expect(r.elapsed == r.busy() + r.idle() + r.undriven, "exact");
      if (comm.rank() == 0) expect(r.wait_arrival >= 50ms && r.undriven <= 50ms && r.blame().at(0).rank == 1, "waited " + std::to_string(test::ms(r.wait_arrival.count())) + " ms, undriven " + std::to_string(test::ms(r.undriven.count())) + " ms");
    }
  });
  CAPTURE(outcome);
  for (const auto& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
}

TEST_CASE("deadlines of operations that only the progress thread drives", "[timing]") {
  for (const bool accounting : {true, false}) {
    CAPTURE(accounting);
    Options options;
    options.accounting = accounting;
    const test::Outcome outcome = test::outcome_of(
        2, threads,
        [](Communicator& comm) {
          const ProgressThread thread = progress_thread();
          comm.barrier();
          if (comm.rank() == 1) {
            std::this_thread::sleep_for(300ms);
            return;
          }
          std::vector<int> a(5, 1);
          std::atomic<std::int64_t> ended{0};
          const std::int64_t begin = now_ns();
          Operation operation = comm.async_all_reduce(a, sum, {.timeout = 60ms});
          operation.then([&] { ended = now_ns(); });
          std::this_thread::sleep_for(250ms);
          expect(ended > 0 && ended - begin >= 55'000'000, "it ended at its deadline: " + std::to_string(test::ms(ended - begin)));
          expect(caught([&] { operation.wait(); }).is(Errc::timeout), "with a timeout");
        },
        options);
    CAPTURE(outcome);
    CHECK((outcome.ranks[0].ran && !outcome.ranks[0].foreign));
  }
}

TEST_CASE("of several operations that only the progress thread drives the first deadline counts, and its operation is named", "[timing]") {
  const test::Outcome outcome = test::outcome_of(2, threads, [](Communicator& comm) {
    const ProgressThread thread = progress_thread();
    std::vector<int> a(5, 1), b(6, 1), c(7, 1), d(8, 1);
    comm.barrier();
    comm.async_all_reduce(d, sum, {.timeout = 40ms}).wait();
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(600ms);
      return;
    }
    std::atomic<std::int64_t> ended{0};
    const std::int64_t begin = now_ns();
    Operation first = comm.async_all_reduce(a, sum, {.timeout = 20s}), second = comm.async_all_reduce(b, sum, {.timeout = 150ms}), third = comm.async_all_reduce(c, sum, {.timeout = 10s});
    second.then([&] { ended = now_ns(); });
    std::this_thread::sleep_for(500ms);
    expect(ended - begin >= 145'000'000 && ended - begin < 400'000'000, "it ended at its deadline: " + std::to_string(test::ms(ended - begin)));
    for (Operation* operation : {&third, &second, &first}) {
      const Caught end = caught([&] { operation->wait(); });
      expect(end.is(Errc::timeout) && test::has(end.text, "rank 0 in all_reduce(int32 x 6, sum") && test::has(end.text, "#4 waits for") && test::has(end.text, "rank 1 has not called it"), end.text);
    }
  });
  CAPTURE(outcome);
  CHECK((outcome.ranks[0].ran && !outcome.ranks[0].error && !outcome.ranks[0].foreign));
}

TEST_CASE("an operation that is driven on does not inherit the deadline of the one before", "[timing]") {
  const test::Outcome outcome = test::outcome_of(2, threads, [](Communicator& comm) {
    std::optional<ProgressThread> thread = progress_thread();
    int x = 1;
    std::vector<char> large(std::size_t{4} << 20, 1);
    comm.barrier();
    // The second one is under way, and its sender slow, when the deadline of the first one passes.
    Operation first = comm.async_all_reduce(std::span(&x, 1), sum, {.timeout = 300ms});
    std::atomic<int> folds{0};
    const auto slow = [&](char a, char b) {
      if (++folds % 4096 == 0) std::this_thread::sleep_for(500us);
      return static_cast<char>(a + b);
    };
    Operation second = comm.async_all_reduce(large, commutative(slow), {.timeout = 20s, .algorithm = "ring"});
    std::this_thread::sleep_for(700ms);
    const Caught a = caught([&] { first.wait(); }), b = caught([&] { second.wait(); });
    expect(!a.error && !b.error, std::string(a.text) + b.text);
  });
  CAPTURE(outcome);
  for (const Caught& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
}

TEST_CASE("a rank that is stopped holds the others up until their deadline, and no longer", "[processes][timing]") {
  everywhere(
      3, processes,
      [](Communicator& comm) {
        comm.barrier();
        Flight flight(comm);
        if (comm.rank() == 1) {
          const pid_t me = ::getpid();
          test::Process waker([me] {
            std::this_thread::sleep_for(600ms);
            ::kill(me, SIGCONT);
          });
          ::raise(SIGSTOP);
          flight.start();
          const auto all = flight.ends();
          expect(all.back().error, "too late");
          waker.wait(5s);
          return;
        }
        comm.set_timeout(200ms);
        flight.start();
        const std::int64_t begin = now_ns();
        flight.expect_over({Errc::timeout});
        expect(now_ns() - begin < 500'000'000, "it did not wait for the stopped one");
      });
}

TEST_CASE("a rank that goes while others call on is noticed by who needs it", "[processes]") {
  for (const bool dies : {true, false}) {
    std::string text;
    try {
      launch(3, [dies](Communicator& comm) {
        comm.barrier();
        if (comm.rank() == 2 && dies) ::raise(SIGKILL);
        if (comm.rank() == 2) return;
        int x = 0, y = 0, z = 0;
        const std::int64_t begin = now_ns();
        const Caught c = caught([&] {
          Operation needed = comm.rank() == 0 ? comm.async_receive(std::span(&x, 1), 2, 5) : Operation();
          for (; now_ns() - begin < 5'000'000'000;) {
            if (comm.rank() == 0) (void)needed.test();
            comm.send_receive(std::span(&y, 1), 1 - comm.rank(), std::span(&z, 1), 1 - comm.rank(), 7);
          }
        });
        // Who needs it says so; the other one is told. A second is when launch would end them.
        expect(c.error && (c.code == Errc::peer_lost || c.code == Errc::peer_left), c.text);
        expect(now_ns() - begin < 900'000'000, "in time");
        if (!dies) throw std::runtime_error("noticed");
      });
    } catch (const std::exception& error) {
      text = error.what();
    }
    CHECK_THAT(text, dies ? Catch::Contains("rank 2: killed by signal 9") : Catch::Contains("noticed"));
  }
}

TEST_CASE("started on a communicator that has failed") {
  std::atomic<bool> aborted{false};
  everywhere(2, threads, [&](Communicator& comm) {
    if (comm.rank() == 0) comm.abort("over"), aborted = true;
    else
      while (!aborted.exchange(false)) std::this_thread::sleep_for(1ms);
    int x = 1;
    const Caught c = caught([&] { const Operation o = comm.async_all_reduce(std::span(&x, 1), sum); });
    expect(c.is(Errc::aborted) && test::has(c.text, "over"), c.text);
    expect(caught([&] { const Operation o = comm.async_send(std::span(&x, 1), 0); }).is(Errc::aborted), "messages, too");
  });
}
