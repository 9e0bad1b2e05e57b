// SPDX-License-Identifier: Apache-2.0
// Every algorithm, and the rules of the account, under thousands of random schedules on a simulated network. A failure
// names its seed: TALLY_TEST_SEED=N runs that one alone. TALLY_TEST_LONG=1 runs 25 times as many.
#include <catch2/catch.hpp>

#include <cmath>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "ground_truth.hpp"
#include "simulated.hpp"
#include "transport_conformance.hpp"

using namespace simulated;

namespace {

/// one(seed) for so many seeds, or for the one that the environment names.
template <class F>
void for_seeds(std::uint64_t how_many, F&& one) {
  const char* only = std::getenv("TALLY_TEST_SEED");
  const std::uint64_t first = only ? std::strtoull(only, nullptr, 10) : 1;
  const std::uint64_t last = only ? first : std::getenv("TALLY_TEST_LONG") ? 25 * how_many : how_many;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    try {
      one(seed);
    } catch (const std::exception& error) {
      FAIL("seed " << seed << ": " << error.what());
    }
  }
  SUCCEED();
}

/// Some operations one after another on a random network, ranks late at random. Returns a hash of all reports.
std::uint64_t random_schedule(std::uint64_t seed) {
  Random random(seed);
  const int n = static_cast<int>(2 + random.below(8));
  SimulatedNetwork network(n, random_options(random, seed));
  std::vector<Work> calls(3);
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const Choice& choice = all_choices()[(seed * calls.size() + i) % all_choices().size()];
    Work& w = calls[i];
    w.operation = choice.operation;
    w.algorithm = choice.algorithm;
    w.n = n;
    w.group = static_cast<int>(1 + random.below(static_cast<std::uint64_t>(n)));
    w.root = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    w.count = random.below(random.once_in(4) ? 400 : 40);
    w.in_place = w.operation == Collective::barrier || ((w.operation == Collective::all_reduce || w.operation == Collective::all_gather || w.operation == Collective::reduce_scatter) && random.once_in(2));
    w.salt = random.below(1u << 30);
  }
  const std::uint64_t most_late = random.once_in(2) ? 1 : 200'000;
  std::uint64_t hash = 0;
  run(network, [&](auto& engine) {
    Random mine(seed * 64 + static_cast<std::uint64_t>(engine.rank()) + 1);
    for (Work w : calls) {
      w.me = engine.rank();
      network.sleep(nanoseconds(mine.below(most_late)));
      const Report report = engine.run(w.call());
      w.expect_result();
      hash ^= mix(expect_exact(report, w.me) + static_cast<std::uint64_t>(w.me));
    }
  });
  return hash;
}

/// How an all_reduce's reports compare with the truth, summed over ranks, in ns.
struct Compared {
  double truth = 0, told = 0, wrong = 0, wrong_rank = 0, worst = 0, waits = 0;
  void add(const Compared& c) {
    truth += c.truth, told += c.told, wrong += c.wrong, wrong_rank += c.wrong_rank, waits += c.waits;
    worst = std::max(worst, c.worst);
  }
};
Compared compare(SimulatedNetwork& network, AlgorithmRef algorithm, std::size_t count, const std::vector<nanoseconds>& late, nanoseconds begin = 5300ms) {
  const int n = network.size();
  Work work;
  work.operation = Collective::all_reduce;
  work.algorithm = algorithm;
  work.n = n;
  work.count = count;
  work.group = 3;
  work.in_place = true;
  std::vector<Plan> plans;
  for (Rank r = 0; r < n; ++r) {
    const Layout layout{Collective::all_reduce, r, n, 0, count, true, work.group, nullptr};
    plans.emplace_back(algorithm.generate(layout.shape()), layout, sizeof(std::int32_t));
  }
  Recording recording(network, std::move(plans));
  std::vector<Report> reports(late.size());
  std::vector<std::vector<Blame>> blame(late.size());
  run<RecordedTransport>(network, [&](Engine<RecordedTransport>& engine) {
    const auto me = static_cast<std::size_t>(engine.rank());
    Work mine = work, first = work;
    mine.me = first.me = engine.rank();
    const Call call = mine.call();
    engine.run(first.call());
    network.sleep(begin - nanoseconds(network.now()) + late[me]);
    recording.post(engine.rank());
    reports[me] = engine.run(call);
    mine.expect_result();
    expect_exact(reports[me], engine.rank());
    blame[me] = reports[me].blame();
  }, recording);
  Compared all;
  for (Rank r = 0; r < n; ++r) {
    const auto me = static_cast<std::size_t>(r);
    std::vector<double> truth = recording.arrival_waits(r);
    double sum_of_truth = 0;
    for (const double x : truth) sum_of_truth += x;
    for (const Blame& b : blame[me]) truth[static_cast<std::size_t>(b.rank)] -= static_cast<double>(b.arrival.count());
    const auto told = static_cast<double>(reports[me].wait_arrival.count());
    const double wrong = std::abs(told - sum_of_truth);
    double wrong_rank = 0;
    for (const double x : truth) wrong_rank += std::abs(x) / 2;
    all.add({sum_of_truth, told, wrong, wrong_rank, wrong, static_cast<double>(reports[me].idle().count())});
    expect(std::abs(recording.all_waits(r) - static_cast<double>((reports[me].idle() - reports[me].wait_local).count())) <= 1e-4 * recording.all_waits(r) + 100, "the waits are those that were recorded");
  }
  return all;
}
std::ostream& operator<<(std::ostream& out, const Compared& c) {
  const auto percent = [&](double part) { return std::to_string(c.truth > 0 ? 100 * part / c.truth : 0) + " %"; };
  return out << "arrival waits " << c.truth / 1e6 << " ms, told " << c.told / 1e6 << " ms of " << c.waits / 1e6 << "; wrong " << percent(c.wrong) << ", worst rank " << c.worst / 1e6 << " ms, wrong rank " << percent(c.wrong_rank);
}

bool verbose() { return std::getenv("TALLY_TEST_VERBOSE") != nullptr; }

constexpr int ranks = 8;
constexpr std::size_t chunk = ranks * 256;  // as many integers as make a frame for each rank
constexpr double slow = 50;                 // ns per byte

/// As the sketch that the rules were found with had them.
SimulatedOptions truth_options(Random& random, std::uint64_t seed) {
  SimulatedOptions o;
  o.seed = seed;
  o.slots = random.one_of(std::vector<int>{2, 8, 16});
  o.slot_bytes = 1024;
  o.latency_least = 5us;
  o.latency_most = 50us;
  o.byte_time_least = o.byte_time_most = 2;
  o.frame_cost = 1us;
  o.byte_cost = 0;
  o.clock_offset = 1h;
  o.clock_drift = 50;
  return o;
}

}  // namespace

TEST_CASE("arrival waits and blame are what really happened, with several late") {
  struct {
    std::string_view name;
    double wrong_rank;  // several late ranks upstream collapse onto the latest: most where a late rank speaks for many
  } const cases[] = {{"ring", 0.005}, {"tree", 0.15}, {"recursive_doubling", 0.03}, {"two_shot", 0.01}, {"one_shot", 0.005}};
  for (const auto& [name, wrong_rank] : cases) {
    Compared all;
    for (std::uint64_t seed = 1; seed <= 40; ++seed) {
      Random random(seed);
      SimulatedNetwork network(ranks, truth_options(random, seed));
      for (Rank a = 0; a < ranks; ++a)
        for (Rank b = 0; b < ranks; ++b)
          if (random.once_in(3)) network.link(a, b).byte_time = slow;
      std::vector<nanoseconds> late;
      for (int r = 0; r < ranks; ++r) late.emplace_back(static_cast<std::int64_t>(-5e6 * std::log(1 - random.uniform())));
      all.add(compare(network, find_algorithm(Collective::all_reduce, name), chunk * random.one_of(std::vector<std::size_t>{1, 8, 32}), late));
    }
    CAPTURE(name, all);
    CHECK(all.wrong <= 0.004 * all.truth);
    CHECK(all.worst <= 0.4e6);
    CHECK(all.wrong_rank <= wrong_rank * all.truth);
    if (verbose()) std::cout << name << ", several late: " << all << '\n';
  }
}

TEST_CASE("arrival waits and blame are what really happened, with one late") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    Compared all;
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      Random random(seed);
      SimulatedNetwork network(ranks, truth_options(random, seed));
      std::vector<nanoseconds> late(ranks, 0ms);
      late[random.below(ranks)] = 50ms;
      all.add(compare(network, algorithm, chunk * (random.once_in(2) ? 1 : 64), late));
    }
    CAPTURE(name, all);
    CHECK(all.truth > 6 * 7 * 40e6);
    CHECK(all.wrong <= 0.002 * all.truth);
    CHECK(all.wrong_rank <= 0.002 * all.truth);
    if (verbose()) std::cout << name << ", one late: " << all << '\n';
  }
}

TEST_CASE("I5: slow links make waits for transfer, not for arrival") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    Compared all;
    for (std::uint64_t seed = 1; seed <= 5; ++seed) {
      Random random(seed);
      SimulatedNetwork network(ranks, truth_options(random, seed));
      for (Rank r = 0; r < ranks; ++r) network.link(2, r).byte_time = 500;
      all.add(compare(network, algorithm, chunk * 32, std::vector<nanoseconds>(ranks, 0ms)));
    }
    CAPTURE(name, all);
    CHECK(all.waits > 1e9);
    CHECK(all.truth == 0);
    CHECK(all.told <= 0.002 * all.waits);  // by as much as the clocks are compared wrongly
    if (verbose()) std::cout << name << ", slow links: " << all << '\n';
  }
}

TEST_CASE("clocks that drift are compared again") {
  const auto once = [](nanoseconds refresh) {
    SimulatedOptions options;
    options.clock_offset = 1h;
    options.clock_drift = 50;
    options.clock_refresh = refresh;
    SimulatedNetwork network(ranks, options);
    std::vector<nanoseconds> late(ranks, 0ms);
    late[3] = 50ms;
    return compare(network, algorithm_ref<Tree, Collective::all_reduce>(), chunk, late, 10min + 700ms);
  };
  const Compared all = once(1s), never = once(1h);
  CAPTURE(all, never);
  CHECK(all.truth > 7 * 49e6);
  CHECK(all.wrong <= 0.001 * all.truth);
  CHECK(all.wrong_rank <= 0.001 * all.truth);
  CHECK(never.wrong_rank > 10e6);
}

TEST_CASE("I6b: who computes between start and wait arrives when it drives on, and is who the others wait for") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    for (const std::size_t count : {chunk, 64 * chunk})
      for (std::uint64_t seed = 1; seed <= 5; ++seed) {
        Random random(seed);
        SimulatedOptions options = truth_options(random, seed);
        SimulatedNetwork network(ranks, options);
        const auto busy = static_cast<Rank>(random.below(ranks));
        std::vector<Report> reports(ranks);
        std::vector<nanoseconds> blamed(ranks);
        run(network, [&](Engine<SimulatedTransport>& engine) {
          const auto me = static_cast<std::size_t>(engine.rank());
          Work work;
          work.operation = Collective::all_reduce;
          work.algorithm = algorithm;
          work.n = ranks;
          work.me = engine.rank();
          work.count = count;
          work.in_place = true;
          const Call call = work.call();
          network.sleep(10ms);
          if (work.me == busy) {
            Run* const started = engine.start(call, nullptr);
            network.sleep(100ms);
            expect(engine.wait(*started, nullptr), "it is done");
            reports[me] = engine.fetch(*started);
            engine.give_back(*started);
          } else {
            reports[me] = engine.run(call);
          }
          work.expect_result();
          expect_exact(reports[me], work.me);
          for (const Blame& b : reports[me].blame())
            if (b.rank == busy) blamed[me] = b.arrival;
        });
        for (std::size_t r = 0; r < ranks; ++r) {
          const Report& report = reports[r];
          CAPTURE(name, count, seed, options.slots, busy, r, report.elapsed.count(), report.wait_arrival.count(), report.wait_transfer.count(), report.wait_credit.count(), report.undriven.count(), blamed[r].count());
          if (static_cast<Rank>(r) == busy) {
            CHECK(std::abs((report.undriven - 100ms).count()) < 50'000);
            CHECK(report.wait_arrival < 1ms);
            CHECK(report.exposed <= report.elapsed - 99ms);
          } else if (report.elapsed > 100ms) {  // it needed what came after the computation
            CHECK(std::abs((report.wait_arrival - blamed[r]).count()) < 200'000);
            CHECK(report.wait_transfer + report.wait_credit < 90ms);
            CHECK(blamed[r] > 60ms);
          }
        }
      }
  }
}

TEST_CASE("who drives bit by bit is not late") {
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    const AlgorithmRef algorithm = find_algorithm(Collective::all_reduce, name);
    if (!algorithm.generate) continue;
    nanoseconds arrival{}, waits{};
    for (std::uint64_t seed = 1; seed <= 5; ++seed) {
      Random random(seed);
      SimulatedNetwork network(ranks, truth_options(random, seed));
      for (Rank r = 0; r < ranks; ++r) network.link(2, r).byte_time = 500;
      run(network, [&](Engine<SimulatedTransport>& engine) {
        Work work;
        work.operation = Collective::all_reduce;
        work.algorithm = algorithm;
        work.n = ranks;
        work.me = engine.rank();
        work.count = chunk * 8;
        work.in_place = true;
        const Call call = work.call();
        network.sleep(10ms);
        Run* const started = engine.start(call, nullptr);
        for (const nanoseconds limit = 20us; !engine.wait(*started, &limit);) {
        }
        const Report report = engine.fetch(*started);
        engine.give_back(*started);
        work.expect_result();
        expect_exact(report, work.me);
        arrival += report.wait_arrival;
        waits += report.idle();
      });
    }
    CAPTURE(name, arrival.count(), waits.count());
    CHECK(waits > 100ms);
    CHECK(arrival < waits / 200);
    if (verbose()) std::cout << name << ", bit by bit: arrival " << arrival.count() / 1000 << " us of " << waits.count() / 1000 << '\n';
  }
}

TEST_CASE("operations in flight: each account is exact, and no moment is paid twice") {
  for_seeds(1000, [](std::uint64_t seed) {
    Random random(seed);
    const int n = static_cast<int>(2 + random.below(6));
    SimulatedNetwork network(n, random_options(random, seed));
    std::vector<Work> calls(4);
    for (Work& w : calls) {
      const Choice& choice = random.one_of(all_choices());
      w.operation = choice.operation;
      w.algorithm = choice.algorithm;
      w.n = n;
      w.root = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
      w.count = random.below(100);
      w.in_place = w.operation == Collective::barrier;
      w.salt = random.below(1u << 30);
    }
    run(network, [&](Engine<SimulatedTransport>& engine) {
      Random mine(seed * 64 + static_cast<std::uint64_t>(engine.rank()) + 1);
      const Clock clock = network.clock(engine.rank());
      Ticks inside = 0;
      const auto in_engine = [&](auto&& f) {
        const Ticks begin = clock.now();
        const auto result = f();
        inside += clock.now() - begin;
        return result;
      };
      std::vector<Work> work = calls;
      std::vector<Run*> runs;
      const auto sleep = [&] { network.sleep(nanoseconds(mine.once_in(2) ? mine.below(300'000) : 0)); };
      nanoseconds paid{}, queued{};
      const auto check = [&](const Report& report) {
        expect_exact(report, engine.rank());
        paid += report.busy() + report.idle();
      };
      // The last one is run while the others are in flight.
      for (std::size_t i = 0; i < work.size(); ++i) {
        work[i].me = engine.rank();
        const Call call = work[i].call();
        sleep();
        if (i + 1 < work.size()) runs.push_back(in_engine([&] { return engine.start(call, nullptr); }));
        else check(in_engine([&] { return engine.run(call); }));
      }
      for (std::vector<std::size_t> left{0, 1, 2}; !left.empty();) {
        const std::size_t k = mine.below(left.size());
        Run& one = *runs[left[k]];
        sleep();
        nanoseconds limit = mine.once_in(2) ? nanoseconds(mine.below(100'000)) : nanoseconds(1h);
        if (!in_engine([&] { return engine.wait(one, &limit); })) continue;
        check(engine.fetch(one));
        engine.give_back(one);
        left.erase(left.begin() + static_cast<std::ptrdiff_t>(k));
      }
      for (const Work& w : work) w.expect_result();
      for (const LedgerRow& row : engine.ledger().rows()) queued += row.queued;
      expect(queued >= 0ns && paid - queued <= clock.to_ns(inside) + 100ns, "paid " + std::to_string((paid - queued).count()) + " ns of " + std::to_string(inside));
    });
  });
}

TEST_CASE("when a rank dies, who needs it is told, and nobody hangs") {
  std::uint64_t told = 0;
  for_seeds(3000, [&](std::uint64_t seed) {
    Random random(seed);
    const int n = static_cast<int>(2 + random.below(7));
    SimulatedOptions options = random_options(random, seed);
    options.killed = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    options.killed_at = nanoseconds(random.below(random.once_in(2) ? 2'000'000 : 200'000));
    options.end = 30s;
    SimulatedNetwork network(n, options);
    const Choice choice = random.one_of(all_choices());
    const std::size_t count = random.below(100);
    const bool background = random.once_in(3);
    run(network, [&](Engine<SimulatedTransport>& engine) {
      for (int i = 0; i < 3; ++i) {
        Work w;
        w.operation = choice.operation;
        w.algorithm = choice.algorithm;
        w.n = n;
        w.me = engine.rank();
        w.count = count;
        w.in_place = w.operation == Collective::barrier;
        const Call call = w.call();
        try {
          Report report;
          if (background) {
            Run* const started = engine.start(call, nullptr);
            network.sleep(100us);
            struct GiveBack {
              Engine<SimulatedTransport>& engine;
              Run& run;
              ~GiveBack() { engine.give_back(run); }
            } const give_back{engine, *started};
            engine.wait(*started, nullptr);
            report = engine.fetch(*started);
          } else {
            report = engine.run(call);
          }
          expect_exact(report, w.me);
        } catch (const Error& error) {
          if (w.me == options.killed) return;
          ++told;
          expect(error.errc() == Errc::peer_lost && error.peer() == options.killed, std::string("the dead rank is named: ") + error.what());
          expect(network.now() < 1'000'000'000, "at once");
          return;
        }
        if (w.me != options.killed) w.expect_result();
      }
    });
  });
  CHECK((told > 3000 || std::getenv("TALLY_TEST_SEED")));
}

TEST_CASE("a rank that does not call is named at the deadline") {
  for_seeds(300, [](std::uint64_t seed) {
    Random random(seed);
    const int n = static_cast<int>(2 + random.below(7));
    SimulatedNetwork network(n, random_options(random, seed));
    const auto names = algorithms_for(Collective::all_reduce);
    AlgorithmRef algorithm;
    while (!algorithm.generate) algorithm = find_algorithm(Collective::all_reduce, random.one_of(names));
    const auto absent = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    run(network, [&](Engine<SimulatedTransport>& engine) {
      Work w;
      w.operation = Collective::all_reduce;
      w.algorithm = algorithm;
      w.n = n;
      w.me = engine.rank();
      w.count = 10;
      w.timeout = 2s;
      if (w.me == absent) network.sleep(10s);
      const Ticks begin = network.clock(w.me).now();
      try {
        engine.run(w.call());
        expect(false, "an error");
      } catch (const Error& error) {
        expect(error.errc() == Errc::timeout && error.peer() == absent, std::string("a timeout that names the rank: ") + error.what());
        const Ticks after = network.clock(w.me).now() - begin;
        expect(w.me == absent ? after == 0 : after >= 1'999'000'000 && after <= 2'000'001'000, "at the deadline, not after " + std::to_string(after));
      }
    });
  });
}

TEST_CASE("messages find their receives, whatever comes first") {
  for_seeds(1000, [](std::uint64_t seed) {
    Random random(seed);
    const int n = static_cast<int>(2 + random.below(4));
    SimulatedNetwork network(n, random_options(random, seed));
    struct Sent {
      int tag;
      std::vector<std::byte> data;
    };
    std::vector<std::vector<Sent>> sent(static_cast<std::size_t>(n * n));  // by from and to, in order
    for (auto& list : sent)
      for (std::uint64_t m = random.below(8); m > 0; --m) {
        Sent& s = list.emplace_back(Sent{static_cast<int>(random.below(3)), std::vector<std::byte>(random.once_in(3) ? random.below(2000) : random.below(20))});
        for (std::byte& b : s.data) b = static_cast<std::byte>(random.below(256));
      }
    run(network, [&](Engine<SimulatedTransport>& engine) {
      const Rank me = engine.rank();
      Random mine(seed * 64 + static_cast<std::uint64_t>(me) + 1);
      struct Receive {
        std::vector<std::byte> data;
        const Sent* expected;
      };
      std::vector<std::unique_ptr<Receive>> receives;
      std::vector<Run*> runs;
      struct Lane {
        Rank peer;
        bool sends, any;  // any: in the order in which they were sent
        std::vector<const Sent*> left;
      };
      std::vector<Lane> lanes;
      for (Rank peer = 0; peer < n; ++peer)
        for (const bool sends : {false, true}) {
          Lane lane{peer, sends, mine.once_in(3), {}};
          for (const Sent& s : sent[static_cast<std::size_t>(sends ? me * n + peer : peer * n + me)]) lane.left.push_back(&s);
          if (!lane.left.empty()) lanes.push_back(std::move(lane));
        }
      while (!lanes.empty()) {
        const std::size_t k = mine.below(lanes.size());
        Lane& lane = lanes[k];
        auto next = lane.left.begin();
        if (!lane.sends && !lane.any) {  // the first of any tag
          const int tag = mine.one_of(lane.left)->tag;
          next = std::find_if(lane.left.begin(), lane.left.end(), [&](const Sent* s) { return s->tag == tag; });
        }
        const Sent& s = **next;
        lane.left.erase(next);
        Message m{lane.sends, lane.peer, !lane.sends && lane.any ? -1 : s.tag, const_cast<std::byte*>(s.data.data()), s.data.size(), ElementType::byte, 1, 10s};
        if (!lane.sends) {
          Receive& r = *receives.emplace_back(std::make_unique<Receive>(Receive{std::vector<std::byte>(s.data.size() + (lane.any ? 2000 : 0)), &s}));
          m.data = r.data.data();
          m.bytes = r.data.size();
        }
        if (lane.left.empty()) lanes.erase(lanes.begin() + static_cast<std::ptrdiff_t>(k));
        network.sleep(nanoseconds(mine.once_in(2) ? mine.below(200'000) : 0));
        runs.push_back(engine.start(m));
        const nanoseconds moment(mine.below(100'000));
        if (mine.once_in(2)) engine.wait(*mine.one_of(runs), &moment);  // so that messages come before their receives
      }
      while (!runs.empty()) {
        const std::size_t k = mine.below(runs.size());
        engine.wait(*runs[k], nullptr);
        expect_exact(engine.fetch(*runs[k]), me);
        engine.give_back(*runs[k]);
        runs.erase(runs.begin() + static_cast<std::ptrdiff_t>(k));
      }
      for (const auto& r : receives) {
        r->data.resize(r->expected->data.size());
        expect(r->data == r->expected->data, "every message is received by the receive that it was meant for");
      }
    });
  });
}

TEST_CASE("the simulated transport conforms") {
  conformance::conformance<SimulatedTransport>([](int n, const SlotOptions& slots, const conformance::BodyOf<SimulatedTransport>& body) {
    SimulatedOptions options;
    options.slots = slots.slots;
    options.slot_bytes = slots.slot_bytes;
    options.lanes = slots.lanes;
    options.jitter = 5us;
    options.loss = 0.01;
    SimulatedNetwork network(n, options);
    network.run([&](Rank r) {
      SimulatedTransport transport(network, r);
      body(transport);
    });
  });
}

TEST_CASE("all algorithms are exact under random schedules") { for_seeds(2000, random_schedule); }

TEST_CASE("I16: the same schedule in virtual time gives the same reports, to the bit") {
  for_seeds(50, [](std::uint64_t seed) { expect(random_schedule(seed) == random_schedule(seed), "the same hash"); });
}
