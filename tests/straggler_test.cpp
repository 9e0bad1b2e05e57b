// SPDX-License-Identifier: Apache-2.0
// One rank of eight is late to every call: it has to be ranked first, and what the others wait has to be charged to it, with
// every algorithm, and through chains of calls. (In virtual time: invariants_test.cpp.) TALLY_TEST_LONG=1 makes 1,000 calls with real ranks,
// too (three minutes: not under ctest, which would end it).
#include <catch2/catch.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <tally/account/job.hpp>
#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::expect, test::now_ns;

namespace {

constexpr int ranks = 8;
constexpr Rank late_rank = 5;
constexpr nanoseconds lateness = 5ms;

int real_calls() {
  const char* is_long = std::getenv("TALLY_TEST_LONG");
  return is_long && *is_long == '1' ? 1000 : 50;
}

/// What processes leave of an account and of the host's clock.
struct Kept {
  struct Call {
    std::uint64_t number = 0;
    nanoseconds begin{};
    AccountTimes time;
    std::array<Blame, 8> waited_for{};
    std::size_t blamed = 0;
  };
  AccountTimes time;
  std::array<Blame, ranks> waited_for{};
  std::array<Call, 256> recent{};
  std::size_t calls = 0;
  std::array<std::int64_t, 1000> posted{};  // when each operation began, by the test's clock

  void take(const Account& account) {
    for (const AccountRow& row : account.rows) {
      if (row.operation != Collective::all_reduce) continue;
      detail::add(time, row.time);
      for (const Blame& blame : row.waited_for) {
        Blame& to = waited_for[static_cast<std::size_t>(blame.rank)];
        to = {blame.rank, to.arrival + blame.arrival, to.transfer + blame.transfer, to.credit + blame.credit};
      }
    }
    for (const AccountEvent& event : account.recent) {
      if (event.operation != Collective::all_reduce) continue;
      Call& call = recent[calls++];
      call = {event.operation_number, event.begin, event.time, {}, event.waited_for.size()};
      std::copy(event.waited_for.begin(), event.waited_for.end(), call.waited_for.begin());
    }
  }
  Account account(Rank rank) const {
    Account all;
    all.communicator = "world";
    all.rank = rank;
    all.size = ranks;
    AccountRow row;
    row.operation = Collective::all_reduce;
    row.time = time;
    for (const Blame& blame : waited_for)
      if (blame.total() > 0ns) row.waited_for.push_back(blame);
    all.rows.push_back(row);
    for (std::size_t i = 0; i < calls; ++i) {
      AccountEvent event;
      event.operation_number = recent[i].number;
      event.begin = recent[i].begin;
      event.time = recent[i].time;
      event.waited_for.assign(recent[i].waited_for.begin(), recent[i].waited_for.begin() + static_cast<std::ptrdiff_t>(recent[i].blamed));
      all.recent.push_back(event);
    }
    return all;
  }
};
using KeptOfAll = std::array<Kept, ranks>;

JobAccount job_of_all(const KeptOfAll& kept) {
  std::vector<Account> accounts;
  for (Rank r = 0; r < ranks; ++r) accounts.push_back(kept[static_cast<std::size_t>(r)].account(r));
  return job_of(accounts);
}

/// What the others waited, as the host's clock saw them come.
struct Truth {
  double all = 0;   // for the last one
  double sure = 0;  // of that, when nobody else was missing: the late rank alone can be to blame
  /// Where the machine has no core for them others are late as well, and rightly blamed, for no more than the host's clock saw
  /// of that; calls read the clock somewhat later than the test does.
  double least_share() const { return std::min(0.95, 0.98 * sure / all); }
};
Truth truth_of(const KeptOfAll& kept, int operations) {
  Truth truth;
  for (std::size_t i = 0; i < static_cast<std::size_t>(operations); ++i) {
    std::int64_t others = 0;  // when the last of them came
    for (std::size_t r = 0; r < ranks; ++r)
      if (r != late_rank) others = std::max(others, kept[r].posted[i]);
    const std::int64_t late = kept[late_rank].posted[i], last = std::max(others, late);
    for (std::size_t r = 0; r < ranks; ++r) {
      truth.all += static_cast<double>(last - kept[r].posted[i]);
      if (r != late_rank) truth.sure += static_cast<double>(std::max<std::int64_t>(late - others, 0));
    }
  }
  return truth;
}

KeptOfAll straggler_of(RankKind kind, std::string_view algorithm, int calls) {
  const test::Shared<KeptOfAll> kept;
  launch(
      ranks,
      [&](Communicator& comm) {
        Kept& mine = (*kept)[static_cast<std::size_t>(comm.rank())];
        Communicator counted = comm.duplicate();
        const auto data = counted.allocate<float>(16);  // where all algorithms can reach it
        comm.barrier();
        for (int i = 0; i < calls; ++i) {
          if (comm.rank() == late_rank) std::this_thread::sleep_for(lateness);
          mine.posted[static_cast<std::size_t>(i)] = now_ns();
          counted.all_reduce(data, max, {.algorithm = algorithm});
        }
        mine.take(counted.ledger().account("world"));
      },
      kind);
  return *kept;
}

/// Up to three times: a machine that takes cores away while ranks are on their way into a call is not seen by the test, but what is
/// wrong is so every time.
template <class F>
void check_straggler(const char* what, std::string_view algorithm, int operations, F&& measure) {
  JobAccount job;
  Truth truth;
  for (int tries = 3; tries > 0; --tries) {
    const auto kept = std::make_unique<KeptOfAll>(measure());
    job = job_of_all(*kept);
    truth = truth_of(*kept, operations);
    if (job.stragglers[0].rank == late_rank && job.stragglers[0].share >= truth.least_share()) break;
  }
  const double arrival = static_cast<double>(job.time.wait_arrival.count()), caused = static_cast<double>(job.stragglers[0].caused.count());
  std::printf("%s, %s: %.2f %% of %.1f ms charged to rank %d; by the host's clock it alone was missing in %.2f %% of %.1f ms\n", what, std::string(algorithm).c_str(), 100 * job.stragglers[0].share, arrival / 1e6, job.stragglers[0].rank,
              100 * truth.sure / truth.all, truth.all / 1e6);
  CAPTURE(what, algorithm, caused, arrival, truth.sure, truth.all);
  CHECK(job.stragglers[0].rank == late_rank);
  CHECK(job.stragglers[0].share >= truth.least_share());
  CHECK(arrival >= 0.75 * truth.sure);  // who is given no core before he begins to wait, waits less
}

void real_straggler(RankKind kind) {
  const int calls = real_calls();
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) check_straggler(kind == threads ? "threads" : "processes", name, calls, [&] { return straggler_of(kind, name, calls); });
}

}  // namespace

TALLY_TEST_BOTH("a straggler is ranked first and 95 % of the waits for arrival are charged to it", "[timing]", real_straggler)

namespace {

KeptOfAll buckets_of(const char* algorithm, int steps) {
  const auto kept = std::make_unique<KeptOfAll>();
  launch(
      ranks,
      [&](Communicator& comm) {
        Kept& mine = (*kept)[static_cast<std::size_t>(comm.rank())];
        Communicator counted = comm.duplicate();
        std::vector<std::vector<float>> gradients(4, std::vector<float>(2000, 1.0f));
        for (int i = 0; i < steps; ++i) {
          comm.barrier();
          if (comm.rank() == late_rank) std::this_thread::sleep_for(lateness);
          mine.posted[static_cast<std::size_t>(i)] = now_ns();
          std::vector<Operation> operations;
          for (auto& bucket : gradients) operations.push_back(counted.async_all_reduce(bucket, max, {.algorithm = algorithm}));
          for (Operation& operation : operations) operation.wait();
        }
        mine.take(counted.ledger().account("world"));
      },
      threads);
  return *kept;
}

}  // namespace

TEST_CASE("of buckets back to back the rank is blamed that came late before the first", "[timing]") {
  for (const char* name : {"ring", "recursive_doubling", "double_tree"}) check_straggler("buckets", name, 40, [&] { return buckets_of(name, 40); });
}

TEST_CASE("a rank that is late in one communicator is blamed in the next, where only who waited for it was late", "[quiet]") {
  constexpr int steps = 40;
  std::array<std::array<std::int64_t, steps>, 3> row_posted{}, column_posted{};
  std::array<Account, 3> rows, columns;
  launch(
      3,
      [&](Communicator& comm) {
        const auto me = static_cast<std::size_t>(comm.rank());
        std::optional<Communicator> row = comm.subset({0, 1}), column = comm.subset({1, 2});
        std::vector<float> data(16, 1.0f);
        for (std::size_t i = 0; i < steps; ++i) {
          comm.barrier();
          if (comm.rank() == 0) std::this_thread::sleep_for(lateness);
          row_posted[me][i] = now_ns();
          if (row) row->all_reduce(data, max);
          column_posted[me][i] = now_ns();
          if (column) column->all_reduce(data, max);
        }
        if (row) rows[me] = row->ledger().account("row"), rows[me].members = {0, 1};
        if (column) columns[me] = column->ledger().account("column"), columns[me].members = {1, 2};
      },
      threads);
  const JobAccount job = job_of(std::vector{rows[0], rows[1], columns[1], columns[2]});
  double sure = 0, own = 0;  // rank 2 waits for rank 1, and that for rank 0; or rank 1 has no core and keeps others waiting itself
  const auto late_by = [](std::int64_t who, std::int64_t waiting) { return static_cast<double>(std::max<std::int64_t>(who - waiting, 0)); };
  for (std::size_t i = 0; i < steps; ++i) {
    const double of_zero = late_by(row_posted[0][i], std::max(row_posted[1][i], column_posted[2][i]));
    sure += of_zero;
    own += late_by(column_posted[1][i], column_posted[2][i]) - of_zero + late_by(row_posted[1][i], row_posted[0][i]);
  }
  const auto blamed = [&](Rank waiting, Rank culprit) { return static_cast<double>(job.resolved_wait(waiting, culprit).arrival.count()); };
  std::printf("two communicators: rank 2 waited %.1f ms for rank 1, of which %.1f for rank 0; by the host's clock %.1f, and %.1f for rank 1 itself\n", static_cast<double>(job.wait(2, 1).arrival.count()) / 1e6, blamed(2, 0) / 1e6, sure / 1e6, own / 1e6);
  CAPTURE(sure, own, blamed(2, 0), blamed(2, 1), job.followed);
  CHECK(job.wait(2, 0).arrival == 0ns);  // which is not in that communicator
  CHECK(blamed(2, 0) >= 0.5 * sure);
  CHECK(blamed(2, 0) <= 1.1 * sure + 2e6);
  // Rank 0 keeps two ranks waiting: it is first unless the machine kept rank 1 from its core for longer than that.
  if (own < sure) CHECK(job.stragglers[0].rank == 0);
  CHECK(job.stragglers[1].caused < job.stragglers[0].caused);
}
