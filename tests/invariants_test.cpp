// SPDX-License-Identifier: Apache-2.0
// The rules of the account of time, in virtual time, where everything is exact: what the test planned is what ranks have to
// tell, to the nanosecond. TALLY_TEST_VERBOSE=1 prints how far off they are.
#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <tally/account/job.hpp>

#include "simulated.hpp"

using namespace simulated;

namespace {

bool verbose() { return std::getenv("TALLY_TEST_VERBOSE") != nullptr; }

/// Time and blame of one operation on one rank.
struct Told {
  Report report;
  std::vector<Blame> blame;
  nanoseconds took{};  // by the rank's own clock, from the call to its return

  nanoseconds waits() const { return report.wait_transfer + report.wait_credit; }
  Blame on(Rank rank) const {
    for (const Blame& b : blame)
      if (b.rank == rank) return b;
    return {rank, {}, {}, {}};
  }
};

/// One time in which nothing is written back: a sender's age is told in units of 32 ns, rounded down, at every hop.
constexpr nanoseconds rounding(int ranks) { return nanoseconds(32 * ranks); }

Work work_of(const Choice& choice, int n, Rank me, std::size_t count) {
  Work w;
  w.operation = choice.operation;
  w.algorithm = choice.algorithm;
  w.n = n;
  w.me = me;
  w.count = count;
  w.group = 2;
  w.in_place = choice.operation == Collective::barrier || choice.operation == Collective::all_reduce;
  return w;
}
const Choice& choice_of(Collective operation, std::string_view algorithm) {
  for (const Choice& choice : all_choices())
    if (choice.operation == operation && choice.algorithm.name == algorithm) return choice;
  throw std::runtime_error("there is no " + std::string(name_of(operation)) + " by " + std::string(algorithm));
}
std::string text_of(const Choice& choice) { return std::string(name_of(choice.operation)) + "/" + std::string(choice.algorithm.name); }

/// Calls the operation on all ranks at the same true time, some of them late, after another call of it.
std::vector<Told> called(const Choice& choice, std::size_t count, const SimulatedOptions& options, const std::vector<nanoseconds>& late, const std::function<void(SimulatedNetwork&)>& shape = {}) {
  const int n = static_cast<int>(late.size());
  SimulatedNetwork network(n, options);
  if (shape) shape(network);
  std::vector<Told> told(late.size());
  run(network, [&](Engine<SimulatedTransport>& engine) {
    const auto me = static_cast<std::size_t>(engine.rank());
    const Clock clock = network.clock(engine.rank());
    Work first = work_of(choice, n, engine.rank(), count), work = first;
    engine.run(first.call());
    const Call call = work.call();
    network.sleep(5300ms - nanoseconds(network.now()) + late[me]);
    const Ticks begin = clock.now();
    told[me].report = engine.run(call);
    told[me].took = clock.to_ns(clock.now() - begin);
    work.expect_result();
    told[me].blame = told[me].report.blame();
  });
  return told;
}

/// I1 and I3 of a ledger's row, in which operations that failed count, too.
void expect_exact(const LedgerRow& row, Rank me) {
  expect(row.elapsed == row.busy() + row.idle() + row.undriven, "a row's parts add up to its time");
  for (const nanoseconds part : {row.copy, row.reduce, row.codec, row.protocol, row.wait_arrival, row.wait_transfer, row.wait_credit, row.wait_local, row.undriven, row.slept, row.queued, row.exposed})
    expect(part >= 0ns, "none is negative");
  expect(row.exposed <= row.elapsed && row.slept <= row.idle() && row.queued <= row.idle(), "parts of it");
  Blame total;
  for (const Blame& b : row.waited_for) total.arrival += b.arrival, total.transfer += b.transfer, total.credit += b.credit;
  expect(total.arrival == row.wait_arrival && total.transfer == row.wait_transfer && total.credit == row.wait_credit, "a row's blame adds up to its waits");
  expect(row.waited_for[static_cast<std::size_t>(me)].total() == 0ns, "nobody blames himself");
}

/// A network without anything random but what the seed says.
SimulatedOptions plain_options(std::uint64_t seed = 1) {
  SimulatedOptions o;
  o.seed = seed;
  o.slots = 4;
  o.slot_bytes = 1024;
  o.latency_least = o.latency_most = 5us;
  o.byte_time_least = o.byte_time_most = 0.5;
  o.frame_cost = 300ns;
  o.byte_cost = 0.1;
  return o;
}

/// The operations whose result depends on every rank.
std::vector<Choice> choices_that_need_all() {
  std::vector<Choice> list;
  for (const Choice& choice : all_choices())
    for (const Collective operation : {Collective::all_reduce, Collective::barrier, Collective::all_gather, Collective::reduce_scatter, Collective::all_to_all})
      if (choice.operation == operation) list.push_back(choice);
  return list;
}

constexpr int ranks = 8;
constexpr std::size_t one_frame = 8;
/// Integers: one frame between each two ranks, or six at least, with four slots.
std::size_t count_of(const Choice& choice, bool large) { return !large ? one_frame : choice.operation == Collective::all_reduce ? ranks * 256 * 6 : 256 * 6; }

}  // namespace

TEST_CASE("I1: the parts are the whole, and the whole is the time from call to return, for every operation and algorithm") {
  std::size_t reports = 0;
  for (const Choice& choice : all_choices())
    for (const std::size_t count : {std::size_t{3}, std::size_t{700}})
      for (std::uint64_t seed = 1; seed <= 2; ++seed) {
        Random random(seed + reports);
        std::vector<nanoseconds> late;
        for (int r = 0; r < 5; ++r) late.emplace_back(random.once_in(2) ? random.below(3'000'000) : 0);
        const std::vector<Told> told = called(choice, count, random_options(random, seed), late);
        for (std::size_t r = 0; r < told.size(); ++r) {
          const Report& report = told[r].report;
          CAPTURE(text_of(choice), count, seed, r, report.elapsed.count(), told[r].took.count());
          const nanoseconds parts = report.copy + report.reduce + report.codec + report.protocol + report.wait_arrival + report.wait_transfer + report.wait_credit + report.wait_local + report.undriven;
          REQUIRE(parts == report.elapsed);
          REQUIRE(report.elapsed == told[r].took);
          ++reports;
        }
      }
  CHECK(reports > 500);
}

namespace {

/// How calls of three ranks end.
enum class End { timeout, killed, left, aborted, mismatch, thrown };

/// Ranks call all_reduce again and again, in the background or not, until something is wrong. Returns how many were told.
int calls_that_fail(End end, std::string_view algorithm, bool background, std::uint64_t seed) {
  Random random(seed);
  SimulatedOptions options = random_options(random, seed);
  if (end == End::killed) options.killed = 2, options.killed_at = nanoseconds(random.below(2'000'000));
  options.end = 30s;
  SimulatedNetwork network(3, options);
  int told = 0;
  run(network, [&](Engine<SimulatedTransport>& engine) {
    const Rank me = engine.rank();
    const Clock clock = network.clock(me);
    nanoseconds inside{};  // calls, as this test sees them
    const auto check = [&] {
      nanoseconds elapsed{};
      std::uint64_t failed = 0;
      for (const LedgerRow& row : engine.ledger().rows()) {
        expect_exact(row, me);
        elapsed += row.elapsed;
        failed += row.failed;
      }
      expect(elapsed == inside, "the calls of the ledger took " + std::to_string(elapsed.count()) + " ns, those of the test " + std::to_string(inside.count()));
      return failed;
    };
    for (int i = 0; i < 40; ++i) {
      Work work = work_of(choice_of(Collective::all_reduce, algorithm), 3, me, 30);
      work.timeout = 3s;
      Call call = work.call();
      if (me == (end == End::thrown ? 0 : 2) && i == 3) {  // rank 0 combines, whatever the algorithm
        if (end == End::timeout) network.sleep(10s);
        if (end == End::left) return engine.leave();
        if (end == End::aborted) return engine.abort("a test");
        if (end == End::mismatch) work.count = 29, call = work.call();
        if (end == End::thrown) call.fold.function = [](const void*, std::byte*, const std::byte*, const std::byte*, std::size_t) { throw std::runtime_error("the operator's"); };
      }
      network.sleep(nanoseconds(random.below(300'000)));
      const Ticks begin = clock.now();
      bool counted = false;
      const auto count = [&] {
        if (!std::exchange(counted, true)) inside += clock.to_ns(clock.now() - begin);
      };
      try {
        if (background) {
          Run* const started = engine.start(call, nullptr);
          network.sleep(100us);
          struct GiveBack {
            Engine<SimulatedTransport>& engine;
            Run& run;
            ~GiveBack() { engine.give_back(run); }
          } const give_back{engine, *started};
          engine.wait(*started, nullptr);
          count();
          engine.fetch(*started);
        } else {
          engine.run(call);
          count();
        }
      } catch (const std::exception&) {
        if (me == options.killed) return;
        count();
        ++told;
        expect(check() == 1, "one call failed");
        return;
      }
      check();
    }
    expect(me == options.killed || end == End::killed, "something is wrong sooner or later");
  });
  return told;
}

}  // namespace

TEST_CASE("I1: calls that fail are booked exactly, for as long as they took: deadline, death, goodbye, abort, mismatch, an operator that throws") {
  for (const End end : {End::timeout, End::killed, End::left, End::aborted, End::mismatch, End::thrown})
    for (const bool background : {false, true}) {
      int told = 0;
      for (const std::string_view algorithm : {"ring", "tree", "recursive_doubling", "one_shot"})
        for (std::uint64_t seed = 1; seed <= 8; ++seed) {
          CAPTURE(static_cast<int>(end), background, algorithm, seed);
          REQUIRE_NOTHROW(told += calls_that_fail(end, algorithm, background, seed));
        }
      CAPTURE(static_cast<int>(end), background);
      CHECK(told >= (end == End::killed ? 32 : 2 * 32));
    }
}

TEST_CASE("I2: 0 <= exposed <= elapsed: all of a blocking call, and of one in the background the time in calls of the library") {
  for (const Choice& choice : all_choices())
    for (const std::size_t count : {std::size_t{3}, std::size_t{700}}) {
      Random random(count);
      SimulatedNetwork network(4, random_options(random, 7));
      run(network, [&](Engine<SimulatedTransport>& engine) {
        const Clock clock = network.clock(engine.rank());
        Random mine(static_cast<std::uint64_t>(engine.rank()) + 1);
        Work work = work_of(choice, 4, engine.rank(), count), again = work;
        const Report blocking = engine.run(work.call());
        expect(blocking.exposed == blocking.elapsed && blocking.overlapped() == 0ns, "a blocking call is all exposed");
        const Call call = again.call();
        nanoseconds inside{}, away{};
        const auto in_engine = [&](auto&& f) {
          const Ticks begin = clock.now();
          const auto result = f();
          inside += clock.to_ns(clock.now() - begin);
          return result;
        };
        Run* const started = in_engine([&] { return engine.start(call, nullptr); });
        for (bool done = false; !done;) {
          const Ticks left = clock.now();
          const bool ended = started->done.load();
          network.sleep(nanoseconds(mine.below(200'000)));
          if (!ended) away += clock.to_ns(clock.now() - left);
          const nanoseconds a_while(mine.below(100'000));
          done = in_engine([&] { return engine.wait(*started, mine.once_in(3) ? nullptr : &a_while); });
        }
        const Report report = engine.fetch(*started);
        engine.give_back(*started);
        expect_exact(report, engine.rank());
        expect(report.exposed == inside && report.undriven == away && report.elapsed == inside + away,
               text_of(choice) + ": exposed " + std::to_string(report.exposed.count()) + " ns of " + std::to_string(inside.count()) + ", undriven " + std::to_string(report.undriven.count()) + " of " + std::to_string(away.count()));
      });
    }
}

TEST_CASE("I3: blame is the waits, cause by cause, in reports, rows and the ledger, and nobody blames himself") {
  nanoseconds arrival{}, transfer{}, credit{};
  for (const Choice& choice : all_choices())
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      Random random(seed * 1000);
      SimulatedOptions options = random_options(random, seed);
      options.slots = 2;
      options.slot_bytes = 128;
      SimulatedNetwork network(5, options);
      run(network, [&](Engine<SimulatedTransport>& engine) {
        const Rank me = engine.rank();
        Random mine(seed * 64 + static_cast<std::uint64_t>(me));
        std::vector<Blame> all(5);
        for (int i = 0; i < 4; ++i) {
          Work work = work_of(choice, 5, me, i % 2 ? 300 : 5);
          network.sleep(nanoseconds(mine.once_in(2) ? mine.below(1'000'000) : 0));
          const Report report = engine.run(work.call());
          expect_exact(report, me);
          for (const Blame& b : report.blame()) {
            Blame& sum_of = all.at(static_cast<std::size_t>(b.rank));
            sum_of.arrival += b.arrival, sum_of.transfer += b.transfer, sum_of.credit += b.credit;
          }
          arrival += report.wait_arrival, transfer += report.wait_transfer, credit += report.wait_credit;
        }
        for (const LedgerRow& row : engine.ledger().rows()) expect_exact(row, me);
        const std::vector<Blame>& kept = engine.ledger().by_peer();
        for (std::size_t r = 0; r < 5; ++r) expect(kept[r].arrival == all[r].arrival && kept[r].transfer == all[r].transfer && kept[r].credit == all[r].credit, "the ledger has what the reports have");
      });
    }
  CHECK(arrival > 0ns);
  CHECK(transfer > 0ns);
  CHECK(credit > 0ns);
}

TEST_CASE("I3: what a rank waits for because it came late itself is transfer, not arrival") {
  for (const std::string_view algorithm : {"tree", "recursive_doubling", "ring", "two_shot", "one_shot"}) {
    std::vector<nanoseconds> late(ranks, 0ms);
    late[5] = 50ms;
    const std::vector<Told> told = called(choice_of(Collective::all_reduce, algorithm), one_frame, plain_options(), late);
    CAPTURE(algorithm, told[5].report.wait_arrival.count(), told[5].report.wait_transfer.count());
    if (algorithm != "one_shot" && algorithm != "recursive_doubling") CHECK(told[5].report.wait_transfer > 5us);  // to others and back; in those two all that it needs is there
    CHECK(told[5].report.wait_arrival <= rounding(ranks));
  }
}

TEST_CASE("I4: injected lateness is what the others wait for arrival, all of it charged to who was late, whatever the operation, algorithm and size") {
  constexpr nanoseconds d = 50ms;
  for (const Choice& choice : choices_that_need_all())
    for (const bool large : {false, true})
      for (const Rank j : {0, 5}) {
        const std::size_t count = count_of(choice, large);
        std::vector<nanoseconds> late(ranks, 0ms);
        const std::vector<Told> control = called(choice, count, plain_options(), late);
        late[static_cast<std::size_t>(j)] = d;
        const std::vector<Told> told = called(choice, count, plain_options(), late);
        nanoseconds least = 1h, most{}, on_the_way{}, to_others{}, alone{};
        for (const Told& without : control) alone = std::max(alone, without.took);
        for (Rank r = 0; r < ranks; ++r) {
          const Told &with = told[static_cast<std::size_t>(r)], &without = control[static_cast<std::size_t>(r)];
          CAPTURE(text_of(choice), count, j, r, with.report.wait_arrival.count(), with.waits().count(), without.waits().count(), without.took.count());
          CHECK(without.report.wait_arrival <= rounding(ranks) * 8);
          if (r == j) {
            CHECK(with.report.wait_arrival <= rounding(ranks));
            continue;
          }
          least = std::min(least, with.report.wait_arrival);
          most = std::max(most, with.report.wait_arrival);
          on_the_way = std::max(on_the_way, with.waits());
          to_others = std::max(to_others, with.report.wait_arrival - with.on(j).arrival);
          CHECK(with.report.last_arrival == j);
        }
        CAPTURE(text_of(choice), count, j);
        if (verbose()) std::printf("%s, %zu, rank %d late: least %lld most %lld on the way %lld others %lld; alone %lld\n", text_of(choice).c_str(), count, j, static_cast<long long>((least - d + alone).count()), static_cast<long long>((most - d).count()), static_cast<long long>(on_the_way.count()), static_cast<long long>(to_others.count()), static_cast<long long>(alone.count()));
        CHECK(least >= d - alone);  // it may have been at work meanwhile
        CHECK(most <= d + rounding(ranks));
        CHECK(on_the_way <= 2 * alone);  // what could be done without that rank, and the rest: no lateness
        CHECK(to_others <= rounding(ranks));
      }
}

namespace {

/// One is late, or all are: the same schedule, told by clocks that are wrong by so much.
std::vector<Told> by_clocks(const Choice& choice, std::size_t count, std::uint64_t seed, nanoseconds offset, double drift) {
  Random random(seed);
  SimulatedOptions options = plain_options(seed);
  options.clock_offset = offset;
  options.clock_drift = drift;
  std::vector<nanoseconds> late(ranks, 0ms);
  if (seed % 2) late[random.below(ranks)] = 20ms;
  else
    for (nanoseconds& each : late) each = nanoseconds(random.below(20'000'000));
  return called(choice, count, options, late, [&](SimulatedNetwork& network) {
    for (Rank a = 0; a < ranks; ++a)
      for (Rank b = 0; b < a; ++b) network.link(a, b).latency = network.link(b, a).latency = 1000 + 2 * random.below(20'000);  // as long there as back, so that clocks can be compared exactly
  });
}

}  // namespace

TEST_CASE("I4: clocks that are an hour apart change nothing, and those that drift change times by as much as they drift") {
  std::size_t compared = 0;
  for (const Choice& choice : choices_that_need_all())
    for (const bool large : {false, true})
      for (std::uint64_t seed = 1; seed <= 2; ++seed) {
        const std::size_t count = count_of(choice, large);
        const std::vector<Told> right = by_clocks(choice, count, seed, 0h, 0), apart = by_clocks(choice, count, seed, 1h, 0), drifting = by_clocks(choice, count, seed, 1h, 50);
        for (std::size_t r = 0; r < ranks; ++r) {
          CAPTURE(text_of(choice), count, seed, r);
          const auto same = [&](const Blame& a, const Blame& b, auto&& near) { return near(a.arrival, b.arrival) && near(a.transfer, b.transfer) && near(a.credit, b.credit); };
          const auto equal = [](nanoseconds a, nanoseconds b) { return a == b; };
          // Two clocks differ by 100 ppm of what they measure; how they differ otherwise is known to some nanoseconds.
          const auto close = [&](nanoseconds a, nanoseconds b) { return std::abs((a - b).count()) <= 100 + right[r].report.elapsed.count() / 10'000; };
          bool exact = right[r].blame.size() == apart[r].blame.size(), all_close = true;
          for (Rank peer = 0; peer < ranks; ++peer) {
            exact = exact && same(right[r].on(peer), apart[r].on(peer), equal);
            all_close = all_close && same(right[r].on(peer), drifting[r].on(peer), close);
            compared += right[r].on(peer).arrival > 1ms;
          }
          CHECK(exact);
          CHECK(all_close);
          CHECK(right[r].report.elapsed == apart[r].report.elapsed);
          CHECK(right[r].report.protocol == apart[r].report.protocol);
          CHECK(right[r].report.last_arrival == apart[r].report.last_arrival);
          CHECK(right[r].report.last_arrival == drifting[r].report.last_arrival);
        }
      }
  CHECK(compared > 500);
}

namespace {

/// Looks how many frames are on their way to this rank.
class Watched : public SimulatedTransport {
 public:
  Watched(SimulatedNetwork& network, Rank me, std::size_t& most) : SimulatedTransport(network, me), network_(network), most_(most) {}
  template <Probe P>
  bool poll(P& probe) {
    if (rank() == 1) most_ = std::max(most_, network_.channel(0, 0, 1).frames.size());
    return SimulatedTransport::poll(probe);
  }
  std::unique_ptr<Watched> open(std::uint64_t, std::span<const Rank>) { return nullptr; }

 private:
  SimulatedNetwork& network_;
  std::size_t& most_;
};

}  // namespace

TEST_CASE("I5b: a queue on a slow link is transfer, and the sender's wait for room is credit; lateness comes on top, to the nanosecond") {
  constexpr std::size_t frames = 40, frame_ints = 256;
  constexpr nanoseconds per_frame = 512us;
  for (const nanoseconds late : {0ms, 7ms}) {
    SimulatedOptions options = plain_options();
    options.slots = 16;
    SimulatedNetwork network(2, options);
    network.link(0, 1).byte_time = 500;
    std::vector<Told> told(2);
    std::size_t queued = 0;
    run<Watched>(network, [&](Engine<Watched>& engine) {
      Work work = work_of(choice_of(Collective::broadcast, "tree"), 2, engine.rank(), frames * frame_ints);
      const Call call = work.call();
      network.sleep(engine.rank() == 0 ? 1ms + late : 1ms);
      Told& mine = told[static_cast<std::size_t>(engine.rank())];
      mine.report = engine.run(call);
      mine.blame = mine.report.blame();
    }, queued);
    const Report &sender = told[0].report, &receiver = told[1].report;
    CAPTURE(late.count(), queued, receiver.elapsed.count(), receiver.wait_arrival.count(), receiver.wait_transfer.count(), receiver.wait_credit.count(), sender.wait_credit.count(), sender.wait_arrival.count());
    CHECK(queued >= 10);
    CHECK(receiver.wait_arrival >= late);
    CHECK(receiver.wait_arrival <= late + 32ns);
    CHECK(receiver.wait_transfer > static_cast<int>(frames) * per_frame - 100us);
    CHECK(receiver.wait_transfer < static_cast<int>(frames) * per_frame + 100us);
    CHECK(told[1].on(0).transfer == receiver.wait_transfer);
    CHECK(sender.wait_arrival <= 32ns);
    CHECK(sender.wait_credit > static_cast<int>(frames - 16 - 1) * per_frame);
    CHECK(told[0].on(1).credit == sender.wait_credit);
  }
}

TEST_CASE("I5b: who waits for room that an earlier operation holds waits for its receiver to call, until that has") {
  SimulatedOptions options = plain_options();
  options.slots = 16;
  SimulatedNetwork network(2, options);
  network.link(0, 1).byte_time = 5000;  // 5.12 ms a frame
  std::vector<Told> told(2);
  run<SimulatedTransport>(network, [&](Engine<SimulatedTransport>& engine) {
    Work first = work_of(choice_of(Collective::broadcast, "tree"), 2, engine.rank(), 16 * 256), second = work_of(choice_of(Collective::broadcast, "tree"), 2, engine.rank(), 256);
    network.sleep(1ms);  // rank 0 sends into all slots, and goes on
    engine.run(first.call());
    if (engine.rank() == 1) network.sleep(10ms);
    Told& mine = told[static_cast<std::size_t>(engine.rank())];
    mine.report = engine.run(second.call());
    mine.blame = mine.report.blame();
  });
  // Its frame needs room only: that is there when the first frame of the first operation has come, in which rank 1 still is.
  const Report& sender = told[0].report;
  CAPTURE(sender.wait_arrival.count(), sender.wait_credit.count(), sender.wait_transfer.count());
  CHECK(sender.wait_arrival > 5000us);
  CHECK(sender.wait_arrival < 5200us);
  CHECK(told[0].on(1).arrival == sender.wait_arrival);
  CHECK(sender.wait_credit < 100us);
}

TEST_CASE("I6: blame is transitive: in a ring only rank 0 is late, and rank 3, which hears of it from rank 2 alone, blames rank 0") {
  for (const Collective operation : {Collective::all_reduce, Collective::all_gather, Collective::reduce_scatter})
    for (const std::size_t count : {std::size_t{4}, std::size_t{40'000}}) {
      const std::vector<Told> told = called(choice_of(operation, "ring"), count, plain_options(), {50ms, 0ms, 0ms, 0ms});
      for (Rank r = 1; r < 4; ++r) {
        const Told& mine = told[static_cast<std::size_t>(r)];
        CAPTURE(name_of(operation), count, r, mine.report.wait_arrival.count());
        for (Rank other = 1; other < 4; ++other) CHECK(mine.on(other).arrival <= rounding(4));
        CHECK(mine.on(0).arrival > 45ms);
        CHECK(mine.on(0).arrival <= 50ms);
        CHECK(mine.report.last_arrival == 0);
      }
    }
}

namespace {

struct CountingClock final : TimeSource {
  explicit CountingClock(const Clock& other) : inner(other) {}
  Ticks now() const override {
    ++readings;
    return inner.now();
  }
  const Clock inner;
  mutable std::size_t readings = 0;
};

/// Polls that found nothing, changes between copying and combining, and when the first poll found nothing.
struct CallCounts {
  std::size_t empty = 0, changes = 0, before_first_empty = 0;
  char at = 0;
};
class Counted : public SimulatedTransport {
 public:
  Counted(SimulatedNetwork& network, Rank me, CallCounts& counts, const CountingClock& clock) : SimulatedTransport(network, me), counts_(counts), clock_(clock) {}
  template <Probe P>
  void post(Transfer& t, P& probe) {
    Counter<P> counter{probe, counts_};
    SimulatedTransport::post(t, counter);
  }
  template <Probe P>
  bool poll(P& probe) {
    Counter<P> counter{probe, counts_};
    const bool moved = SimulatedTransport::poll(counter);
    if (moved) return true;
    if (counts_.empty++ == 0) counts_.before_first_empty = clock_.readings;
    counts_.at = 0;
    return false;
  }
  std::unique_ptr<Counted> open(std::uint64_t, std::span<const Rank>) { return nullptr; }

 private:
  template <class P>
  struct Counter {
    P& probe;
    CallCounts& counts;
    void turn(char to) {
      if (std::exchange(counts.at, to) != to) ++counts.changes;
    }
    void arrived(Transfer& t, const FrameInfo& frame) { probe.arrived(t, frame); }
    Transfer* unexpected(Rank peer, const FrameInfo& frame) { return probe.unexpected(peer, frame); }
    void credited(Transfer& t, const FrameTimes& times) { probe.credited(t, times); }
    void fetched(Transfer& t, const FrameTimes& times) { probe.fetched(t, times); }
    void drained(Transfer& t, bool by_copying = false) { probe.drained(t, by_copying); }
    void continued(Transfer& t, const FrameTimes& times) { probe.continued(t, times); }
    void trying(Transfer& t) { probe.trying(t); }
    void copying(Transfer& t) {
      turn('c');
      probe.copying(t);
    }
    void reducing(Transfer& t) {
      turn('r');
      probe.reducing(t);
    }
    void moved(Transfer& t) { probe.moved(t); }
    FrameTimes stamp(Transfer& t) { return probe.stamp(t); }
    FrameTimes credit_stamp(const Transfer& t) { return probe.credit_stamp(t); }
  };
  CallCounts& counts_;
  const CountingClock& clock_;
};

/// Calls of every algorithm whose steps all move something between ranks: f(name, clock readings, counts) of each.
template <class F>
void counted_calls(bool accounting, F&& f) {
  for (const Choice& choice : all_choices())
    for (const std::size_t count : {std::size_t{3}, std::size_t{700}})
      for (std::uint64_t seed = 1; seed <= 2; ++seed) {
        Random random(seed);
        SimulatedOptions options = random_options(random, seed);
        SimulatedNetwork network(4, options);
        network.run([&](Rank me) {
          const CountingClock clock(network.clock(me));
          CallCounts counts;
          Engine<Counted> engine(std::make_unique<Counted>(network, me, counts, clock), Clock(clock), ModelMeter{}, WaitPolicy::balanced, accounting);
          Random mine(seed * 64 + static_cast<std::uint64_t>(me));
          for (int i = 0; i < 3; ++i) {
            Work work = work_of(choice, 4, me, count);
            const Call call = work.call();
            const Plan plan(choice.algorithm.generate(call.layout.shape()), call.layout, sizeof(std::int32_t));
            const bool local = std::any_of(plan.steps().begin(), plan.steps().end(), [](const PlannedStep& step) { return step.peer < 0; });
            network.sleep(nanoseconds(mine.below(i == 1 ? 2'000'000 : 2'000)));
            counts = {};
            const std::size_t before = clock.readings;
            engine.run(call);
            counts.before_first_empty -= counts.empty > 0 ? before : 0;
            if (!local) f(text_of(choice), clock.readings - before, counts);
          }
        });
      }
}

}  // namespace

TEST_CASE("I17: without accounting no clock is read before the first poll that finds nothing, whatever the algorithm") {
  std::size_t stalled = 0, not_stalled = 0, wrong = 0;
  counted_calls(false, [&](const std::string&, std::size_t readings, const CallCounts& counts) {
    ++(counts.empty > 0 ? stalled : not_stalled);
    wrong += counts.empty > 0 ? counts.before_first_empty > 0 || readings == 0 : readings > 0;
  });
  CHECK(stalled > 100);
  CHECK(not_stalled > 50);
  CHECK(wrong == 0);
}

TEST_CASE("I18: the clock is read no more than once when the state changes and once for each poll that finds nothing, whatever the algorithm") {
  std::size_t calls = 0, changes = 0;
  counted_calls(true, [&](const std::string& name, std::size_t readings, const CallCounts& counts) {
    ++calls;
    changes += counts.changes;
    const std::size_t allowed = 2 + counts.changes + counts.empty;
    expect(readings <= allowed, name + ": " + std::to_string(readings) + " readings, " + std::to_string(allowed) + " allowed");
  });
  CHECK(calls > 500);
  CHECK(changes > 500);
}

namespace {

constexpr Rank late_rank = 5;
constexpr nanoseconds lateness = 5ms;

}  // namespace

TEST_CASE("a straggler is ranked first and 95 % of the waits for arrival are charged to it, in virtual time with clocks an hour apart that drift") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    SimulatedOptions options;
    options.jitter = 5us;
    options.clock_offset = 1h;
    options.clock_drift = 50;
    SimulatedNetwork network(ranks, options);
    std::vector<Account> accounts(ranks);
    run(network, [&](Engine<SimulatedTransport>& engine) {
      const auto me = static_cast<std::size_t>(engine.rank());
      Random random(me + 1);
      Work work;
      work.operation = Collective::all_reduce;
      work.algorithm = algorithm;
      work.n = ranks;
      work.me = engine.rank();
      work.count = 16;
      work.in_place = true;
      for (int i = 0; i < 1000; ++i) {
        const Call call = work.call();
        network.sleep(nanoseconds(random.below(20'000)));
        if (engine.rank() == late_rank) network.sleep(lateness);
        engine.run(call);
      }
      accounts[me] = engine.ledger().account("world");
    });
    const JobAccount job = job_of(accounts);
    CAPTURE(name, job.stragglers[0].share, job.time.wait_arrival.count());
    CHECK(job.stragglers[0].rank == late_rank);
    CHECK(job.stragglers[0].share >= 0.95);
    const auto others = static_cast<double>(ranks - 1) * 1000 * static_cast<double>(lateness.count());
    CHECK(static_cast<double>(job.stragglers[0].caused.count()) >= 0.95 * others);
    CHECK(static_cast<double>(job.time.wait_arrival.count()) <= 1.02 * others);
  }
}

TEST_CASE("of buckets back to back the rank is blamed that came late before the first") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    SimulatedOptions options;
    options.clock_offset = 1h;
    options.clock_drift = 50;
    SimulatedNetwork network(ranks, options);
    std::vector<Account> accounts(ranks);
    run(network, [&](Engine<SimulatedTransport>& engine) {
      const auto me = static_cast<std::size_t>(engine.rank());
      Random random(me + 1);
      for (int step = 0; step < 50; ++step) {
        std::vector<Work> work(4);
        std::vector<Run*> runs;
        if (engine.rank() == late_rank) network.sleep(lateness);
        for (Work& bucket : work) {
          bucket.operation = Collective::all_reduce;
          bucket.algorithm = algorithm;
          bucket.n = ranks;
          bucket.me = engine.rank();
          bucket.count = 2000;
          bucket.in_place = true;
          network.sleep(nanoseconds(20'000 + random.below(5'000)));  // the backward pass goes on
          runs.push_back(engine.start(bucket.call(), nullptr));
        }
        for (Run* one : runs) {
          engine.wait(*one, nullptr);
          engine.fetch(*one);
          engine.give_back(*one);
        }
        for (const Work& bucket : work) bucket.expect_result();
      }
      accounts[me] = engine.ledger().account("world");
      accounts[me].clock_offset = nanoseconds(static_cast<std::int64_t>(network.now() - network.local(engine.rank(), network.now())));
    });
    const JobAccount job = job_of(accounts);
    CAPTURE(name, job.stragglers[0].share, job.stragglers[1].rank, job.stragglers[1].share, job.followed);
    CHECK(job.stragglers[0].rank == late_rank);
    CHECK(job.stragglers[0].share >= 0.95);
    CHECK(job.followed >= 0.95);
  }
}
