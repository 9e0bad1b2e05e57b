// SPDX-License-Identifier: Apache-2.0
// A table on the simulated network, used at random, and what must come of it. Each worker adds 1 in digits of its own, so that
// every value says how many pushes of whom are in it, and a pull can be held against what it must have and what it cannot have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <tally/algorithms/direct.hpp>
#include <tally/algorithms/ring.hpp>
#include <tally/algorithms/tree.hpp>
#include <tally/parameter_server.hpp>
#include <tally/transport/simulated.hpp>

#include "simulated.hpp"

namespace table {

using namespace tally;
using namespace std::chrono_literals;
using simulated::Random;
using simulated::expect;

struct Schedule {
  std::uint64_t seed = 1;
  int n = 2;
  SimulatedOptions network;
  TableOptions options;
  int steps = 12;
  std::size_t count = 5;  // of the vector
  bool survives = true;   // whoever dies: no shard is lost
  Rank killed = -1;
};

/// What all ranks know of each other: only tests can.
struct Truth {
  struct Push {
    std::uint64_t clock;
    std::size_t first, count;
    bool acknowledged = false;
  };
  struct Worker {
    std::vector<Push> pushes;
    std::uint64_t clock = 0;  // told
    std::map<std::uint64_t, int> rows;  // pushes by key
    bool left = false;
  };
  std::vector<Worker> workers;
  std::uint64_t pulls = 0, parked = 0, violated = 0, finals = 0;
};

inline constexpr int digits = 12;  // bits of a worker's own; at most five workers
inline std::int64_t one_of(Rank worker) { return std::int64_t{1} << (digits * worker); }
inline int times(std::int64_t value, Rank worker) { return static_cast<int>(value >> (digits * worker) & ((1 << digits) - 1)); }

inline Schedule random_schedule(std::uint64_t seed, bool lossy, bool deadly) {
  Random random(seed);
  Schedule s;
  s.seed = seed;
  s.n = static_cast<int>(2 + random.below(4));
  s.network = simulated::random_options(random, seed);
  s.network.slot_bytes = random.one_of(std::vector<std::size_t>{4096, 8192});
  s.network.loss = 0;
  s.network.end = 100s;
  if (lossy) {
    s.network.drop = random.once_in(2) ? 0 : 0.2 * random.uniform();
    s.network.duplicate = 0.3 * random.uniform();
    s.network.overtake = 0.5 * random.uniform();
    s.options.retry_after = 30ms;
  }
  const auto kind = random.below(4);
  s.options.consistency = kind == 0 ? bsp : kind == 1 ? asp : ssp(random.below(4));
  const auto order = random.below(5);
  s.options.fold = order < 2 ? FoldOrder::arrival() : order == 2 ? FoldOrder::by_rank() : order == 3 ? FoldOrder::as<Ring>() : FoldOrder::as<Tree>();
  if (random.once_in(3)) {  // some ranks serve
    for (Rank r = 0; r < s.n; ++r)
      if (random.once_in(2)) s.options.servers.push_back(r);
    if (s.options.servers.empty()) s.options.servers.push_back(static_cast<Rank>(random.below(static_cast<std::uint64_t>(s.n))));
    s.options.dedicated = random.once_in(2) && static_cast<int>(s.options.servers.size()) < s.n;
  }
  const std::size_t servers = s.options.servers.empty() ? static_cast<std::size_t>(s.n) : s.options.servers.size();
  if (servers > 1 && random.once_in(2)) s.options.replicas = 1;
  s.options.block_bytes = random.one_of(std::vector<std::size_t>{8, 16, 64});
  s.count = random.one_of(std::vector<std::size_t>{1, 2, 5, 17, 40});
  if (!lossy && random.once_in(30)) s.count = 900, s.steps = 6;  // payloads that do not travel with their envelopes
  if (s.count < 900) s.steps = static_cast<int>(4 + random.below(16));
  const std::size_t largest = std::max<std::size_t>(8 * s.count, 6 * 24);  // of its pushes, the rows' with their keys
  if (random.once_in(3)) s.options.credits = s.options.fold.waits() ? static_cast<std::size_t>(s.steps) * largest : largest;
  if (deadly && servers > 1) {
    s.killed = static_cast<Rank>(random.below(static_cast<std::uint64_t>(s.n)));
    const bool serves = s.options.servers.empty() || std::find(s.options.servers.begin(), s.options.servers.end(), s.killed) != s.options.servers.end();
    if (serves) s.options.replicas = 1;
    s.network.killed = s.killed;
    s.network.killed_at = nanoseconds(random.below(std::uint64_t(20ms / 1ns)));
  }
  return s;
}

/// Every element that a pull of this worker's must have, and none that it cannot have.
inline void expect_pulled(const Schedule& s, const Truth& truth, Rank me, std::uint64_t clock, std::uint64_t version, std::size_t first, const std::vector<std::int64_t>& values, const std::vector<std::int64_t>& before) {
  const Consistency& c = s.options.consistency;
  const std::uint64_t below = c.bounded ? clock - std::min(clock, c.staleness) : 0;
  expect(!c.bounded || version >= below, "the version is within the bound");
  for (Rank w = 0; w < s.n; ++w)
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t e = first + i;
      int least = 0, most = 0;
      for (const Truth::Push& p : truth.workers[static_cast<std::size_t>(w)].pushes) {
        if (e < p.first || e >= p.first + p.count) continue;
        ++most;
        least += w == me || (w != s.killed && p.clock < std::max(below, version));
      }
      const int is = times(values[i], w);
      expect(is >= least && is <= most, "element " + std::to_string(e) + " has " + std::to_string(is) + " pushes of rank " + std::to_string(w) + ", at least " + std::to_string(least) + " and at most " + std::to_string(most) + " expected (version " + std::to_string(version) + ", clock " + std::to_string(clock) + ")");
      expect(is >= times(before[e], w), "reads are monotonic");
    }
}

/// Runs it; throws what is wrong.
inline Truth run(const Schedule& s) {
  SimulatedNetwork network(s.n, s.network);
  Truth truth;
  truth.workers.resize(static_cast<std::size_t>(s.n));
  std::vector<std::int64_t> final_values;
  std::vector<TensorSpec> tensors{{"v", s.count}, {"rows", 0, 2, 100, 131}};
  std::string first_problem;
  const auto body = [&](Rank me) {
    detail::TableSettings settings;
    settings.clock = network.clock(me);
    settings.timeout = 30s;
    settings.threaded = false;
    settings.account.model.enabled = true;
    ParameterServer<std::int64_t, Add> ps(std::make_unique<detail::ErasedTransport<SimulatedTransport>>(std::make_unique<SimulatedTransport>(network, me)), tensors, s.options, Add{}, settings);
    Random random(s.seed * 977 + static_cast<std::uint64_t>(me));
    Truth::Worker& mine = truth.workers[static_cast<std::size_t>(me)];
    const auto v = ps.dense("v");
    const auto rows = ps.sparse("rows");
    const std::vector<std::int64_t> all_ones(s.count, one_of(me));
    struct UnderWay {
      TableOperation operation;
      std::size_t push;
    };
    std::vector<UnderWay> under_way;
    const auto wait_for_one = [&] {
      const std::size_t which = random.below(under_way.size());
      UnderWay one = std::move(under_way[which]);
      under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
      one.operation.wait();
      mine.pushes[one.push].acknowledged = true;
    };
    std::vector<std::int64_t> seen(s.count);
    const auto pull = [&](std::size_t first, std::size_t count) {
      std::vector<std::int64_t> values(count, -1);
      const Pulled got = v.range(first, count).pull(values);
      ++truth.pulls;
      simulated::expect_exact(got.report, me);
      expect_pulled(s, truth, me, ps.clock(), got.version, first, values, seen);
      std::copy(values.begin(), values.end(), seen.begin() + static_cast<std::ptrdiff_t>(first));
      return values;
    };
    if (ps.is_worker()) {
      for (int step = 0; step < s.steps; ++step) {
        const std::size_t first = random.below(s.count), count = 1 + random.below(s.count - first);
        switch (random.below(9)) {
          case 0:
          case 1: {
            const std::size_t at = mine.pushes.size();
            mine.pushes.push_back({ps.clock(), first, count, false});
            const std::vector<std::int64_t> ones(count, one_of(me));
            const Report report = v.range(first, count).push(ones);
            mine.pushes[at].acknowledged = true;
            simulated::expect_exact(report, me);
            break;
          }
          case 2: pull(first, count); break;
          case 3: {
            std::vector<std::uint64_t> keys;
            for (std::size_t i = 0; i < 1 + random.below(6); ++i) keys.push_back(100 + random.below(32));
            std::vector<std::int64_t> values(keys.size() * 2, one_of(me));
            for (const std::uint64_t key : keys) ++mine.rows[key];
            rows.rows(keys).push(values);
            rows.rows(keys).pull(values);
            for (std::size_t i = 0; i < keys.size(); ++i)
              for (std::size_t k = 0; k < 2; ++k) expect(times(values[2 * i + k], me) == mine.rows[keys[i]], "own rows are read");
            break;
          }
          case 5:
          case 6:
            mine.pushes.push_back({ps.clock(), first, count, false});
            under_way.push_back({v.range(first, count).async_push(std::span(all_ones).first(count), {.priority = static_cast<int>(random.below(3))}), mine.pushes.size() - 1});
            if (random.once_in(2)) wait_for_one();
            break;
          case 4: network.sleep(nanoseconds(random.below(2'000'000))); break;
          default:
            ps.tick();
            ++mine.clock;
            break;
        }
      }
      while (!under_way.empty()) wait_for_one();
      // All meet: then everything is in.
      const std::uint64_t last = static_cast<std::uint64_t>(s.steps) + 1;
      ps.tick_to(last);
      mine.clock = last;
    }
    if (ps.is_worker()) {
      if (!s.options.consistency.bounded) {  // nobody waits for the others: ask until all is there
        for (;;) {
          std::vector<std::int64_t> values(s.count);
          if (v.pull(values).version >= static_cast<std::uint64_t>(s.steps) + 1) break;
          network.sleep(1ms);
        }
      } else {
        ps.tick_to(ps.clock() + s.options.consistency.staleness);
      }
      const std::vector<std::int64_t> values = pull(0, s.count);
      for (Rank w = 0; w < s.n; ++w)
        for (std::size_t e = 0; e < s.count; ++e) {
          int all = 0, certain = 0;
          for (const Truth::Push& p : truth.workers[static_cast<std::size_t>(w)].pushes)
            if (e >= p.first && e < p.first + p.count) ++all, certain += p.acknowledged && (!s.options.fold.waits());
          const int is = times(values[e], w);
          if (w != s.killed) expect(is == all, "in the end element " + std::to_string(e) + " has all " + std::to_string(all) + " pushes of rank " + std::to_string(w) + ", not " + std::to_string(is));
          else expect(is <= all && is >= certain, "of who died all that was acknowledged is there: " + std::to_string(is) + " of " + std::to_string(certain));
        }
      if (final_values.empty()) final_values = values;
      expect(values == final_values, "all see the same in the end");
      ++truth.finals;
    }
    ps.close();
    const auto monitor = ps.monitor();
    truth.parked += monitor.parked;
    truth.violated += monitor.violated;
  };
  try {
    network.run([&](Rank me) {
      try {
        body(me);
      } catch (const std::exception& error) {
        if (me == s.killed) network.sleep(1ns);  // what kills a simulated rank is an exception, which the table may have taken for one of its rule: it is thrown again
        if (first_problem.empty()) first_problem = "rank " + std::to_string(me) + ": " + error.what();
        throw;
      }
    });
  } catch (const std::exception&) {
    throw std::runtime_error(first_problem);
  }
  expect(truth.violated == 0, "the staleness monitor saw nothing");
  return truth;
}

}  // namespace table
