// SPDX-License-Identifier: Apache-2.0
// Accounts of jobs of any size, for reports: calls at even distances, in which the ranks are late as one says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <tally/account/snapshot.hpp>

namespace report_accounts {

using namespace tally;

struct JobShape {
  int ranks = 4, calls = 10;
  std::function<std::int64_t(Rank, int)> late = {};  // ns that a rank is late to a call
  std::int64_t transfer = 0, credit = 0, local = 0;  // ns that each rank waits in each call: transfer and credit for the rank before it, the first one for the last
  std::int64_t work = 1'000'000, between = 10'000'000;
  double watts = 0;  // while in a call; 0: no meter
  int ranks_per_host = 16;
};

/// all_reduces of 1 MiB: each ends for all when the latest has come, plus the other waits, plus the work.
inline std::vector<Account> accounts(const JobShape& shape) {
  const auto n = static_cast<std::size_t>(shape.ranks);
  std::vector<Account> all(n);
  for (std::size_t r = 0; r < n; ++r) {
    Account& a = all[r];
    a.job = "job";
    a.communicator = "world";
    a.host = "node-" + std::to_string(static_cast<int>(r) / shape.ranks_per_host);
    a.boot_id = a.host;
    a.transport = "shm";
    a.rank = static_cast<Rank>(r);
    a.size = shape.ranks;
    a.end = nanoseconds(shape.calls * shape.between);
    AccountRow row;
    row.operation = Collective::all_reduce;
    row.size_class = 20;
    row.algorithm = "ring";
    std::vector<Blame> blame(n);
    for (std::size_t k = 0; k < n; ++k) blame[k].rank = static_cast<Rank>(k);
    for (int call = 0; call < shape.calls; ++call) {
      Rank last = 0;
      for (Rank k = 1; k < shape.ranks; ++k)
        if (shape.late && shape.late(k, call) > shape.late(last, call)) last = k;
      const std::int64_t mine = shape.late ? shape.late(a.rank, call) : 0, theirs = shape.late ? shape.late(last, call) : 0;
      AccountEvent event;
      event.operation_number = static_cast<std::uint64_t>(call) + 1;
      event.sequence = static_cast<std::uint32_t>(call) + 1;
      event.operation = row.operation;
      event.algorithm = row.algorithm;
      event.bytes = 1 << 20;
      event.begin = nanoseconds(call * shape.between + mine);
      event.last_arrival = last;
      AccountTimes& t = event.time;
      t.wait_arrival = nanoseconds(theirs - mine);
      t.wait_transfer = nanoseconds(shape.transfer);
      t.wait_credit = nanoseconds(shape.credit);
      t.wait_local = nanoseconds(shape.local);
      t.copy = nanoseconds(shape.work);
      t.elapsed = t.exposed = t.busy() + t.idle();
      const Rank before = (a.rank + shape.ranks - 1) % shape.ranks;
      if (t.wait_arrival > nanoseconds{0}) event.waited_for.push_back({last, t.wait_arrival, {}, {}});
      if (before != a.rank && shape.transfer + shape.credit > 0) event.waited_for.push_back({before, {}, t.wait_transfer, t.wait_credit});
      for (const Blame& each : event.waited_for) {
        Blame& sum = blame[static_cast<std::size_t>(each.rank)];
        sum.arrival += each.arrival, sum.transfer += each.transfer, sum.credit += each.credit;
      }
      row.calls += 1;
      row.bytes += event.bytes;
      row.time.elapsed += t.elapsed, row.time.exposed += t.exposed, row.time.copy += t.copy;
      row.time.wait_arrival += t.wait_arrival, row.time.wait_transfer += t.wait_transfer, row.time.wait_credit += t.wait_credit, row.time.wait_local += t.wait_local;
      std::size_t bucket = 0;
      for (std::int64_t ns = t.elapsed.count(); ns > 0; ns /= 2) ++bucket;
      ++row.histogram[bucket];
      a.recent.push_back(std::move(event));
    }
    if (shape.watts > 0) {
      const auto joules = [&](nanoseconds t) {
        const double value = shape.watts * 1e-9 * static_cast<double>(t.count());
        return Quantity{value, 0.4 * value, 0, 4 * value, Provenance::modelled, Split::direct};
      };
      row.energy.gross = row.energy.net = joules(row.time.elapsed);
      row.energy.idle = joules(row.time.idle());
      row.energy.idle_avoidable = joules(row.time.idle()) * 0.8;
    }
    for (const Blame& each : blame)
      if (each.total() > nanoseconds{0}) row.waited_for.push_back(each);
    a.by_peer = row.waited_for;
    a.rows.push_back(std::move(row));
  }
  return all;
}

}  // namespace report_accounts
