// SPDX-License-Identifier: Apache-2.0
// Arithmetic of accounts: what two of the same rank are together, and what came between two of the same communicator.
// Whole numbers add up exactly, whatever the order; joules do up to rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../text.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

namespace detail {

inline constexpr nanoseconds AccountTimes::*all_times[] = {
    &AccountTimes::elapsed,      &AccountTimes::exposed,       &AccountTimes::copy,        &AccountTimes::reduce,     &AccountTimes::codec,    &AccountTimes::protocol,
    &AccountTimes::wait_arrival, &AccountTimes::wait_transfer, &AccountTimes::wait_credit, &AccountTimes::wait_local, &AccountTimes::undriven, &AccountTimes::slept,
    &AccountTimes::queued};
inline constexpr Quantity AccountEnergy::*all_energies[] = {
    &AccountEnergy::gross, &AccountEnergy::net,  &AccountEnergy::idle, &AccountEnergy::idle_avoidable,
    &AccountEnergy::cpu,   &AccountEnergy::dram, &AccountEnergy::gpu,  &AccountEnergy::carbon};
inline constexpr std::uint64_t AccountRow::*all_counts[] = {&AccountRow::calls, &AccountRow::failed, &AccountRow::bytes, &AccountRow::bytes_sent, &AccountRow::bytes_received, &AccountRow::bytes_wire};
inline constexpr Nanojoules DomainAccount::*all_joules[] = {&DomainAccount::total, &DomainAccount::operations, &DomainAccount::application, &DomainAccount::unattributed};

inline void add(AccountTimes& to, const AccountTimes& more) {
  for (const auto part : all_times) to.*part += more.*part;
}
inline void add(AccountEnergy& to, const AccountEnergy& more) {
  for (const auto part : all_energies) to.*part = to.*part + more.*part;
}
inline void add(std::vector<Blame>& to, const std::vector<Blame>& more) {
  for (const Blame& blame : more) {
    const auto at = std::lower_bound(to.begin(), to.end(), blame.rank, [](const Blame& each, Rank r) { return each.rank < r; });
    if (at == to.end() || at->rank != blame.rank) {
      to.insert(at, blame);
    } else {
      at->arrival += blame.arrival;
      at->transfer += blame.transfer;
      at->credit += blame.credit;
    }
  }
}
inline auto key_of(const AccountRow& row) { return std::tie(row.operation, row.size_class, row.algorithm); }
inline void add(AccountRow& to, const AccountRow& more) {
  for (const auto count : all_counts) to.*count += more.*count;
  add(to.time, more.time);
  for (std::size_t i = 0; i < elapsed_buckets; ++i) to.histogram[i] += more.histogram[i];
  add(to.waited_for, more.waited_for);
  add(to.energy, more.energy);
}
/// Into its place among rows sorted by operation, size class and algorithm.
inline void add(std::vector<AccountRow>& to, const AccountRow& more) {
  const auto at = std::lower_bound(to.begin(), to.end(), more, [](const AccountRow& a, const AccountRow& b) { return key_of(a) < key_of(b); });
  if (at == to.end() || key_of(*at) != key_of(more)) to.insert(at, more);
  else add(*at, more);
}
inline void add(std::vector<std::string>& to, const std::vector<std::string>& more) {
  for (const std::string& text : more)
    if (std::find(to.begin(), to.end(), text) == to.end()) to.push_back(text);
}
/// Their errors came from the same meter, so what is common to both goes.
inline Quantity difference(const Quantity& later, const Quantity& earlier) {
  if (!later.known() || !earlier.known()) return {};
  const auto less = [](double a, double b) { return std::max(0.0, a - b); };
  return {less(later.value, earlier.value), less(later.sigma, earlier.sigma), less(later.lower, earlier.lower), less(later.upper, earlier.upper), std::min(later.provenance, earlier.provenance), std::max(later.split, earlier.split)};
}

/// Whether grams of both may be added up: of average intensities or of marginal ones (see describe(CarbonIntensity)), which answer
/// different questions.
inline bool same_carbon(const Account& a, const Account& b) {
  const auto is_marginal = [](const Account& account) { return account.carbon_source.starts_with("marginal") || account.carbon_source.find(", marginal") != std::string::npos; };
  return a.carbon_source.empty() || b.carbon_source.empty() || is_marginal(a) == is_marginal(b);
}
inline constexpr const char* mixed_carbon = "some grams are of average and some of marginal intensities: they answer different questions and are not added up.";

/// Ranks as the job numbers them.
inline std::vector<Blame> in_job(const Account& account, std::vector<Blame> blame) {
  for (Blame& each : blame)
    if (each.rank >= 0) each.rank = account.in_job(each.rank);
  std::sort(blame.begin(), blame.end(), [](const Blame& a, const Blame& b) { return a.rank < b.rank; });
  return blame;
}
inline Account in_job(const Account& account) {
  Account result = account;
  result.rank = account.in_job(account.rank);
  result.size = std::max(account.size, account.members.empty() ? 0 : *std::max_element(account.members.begin(), account.members.end()) + 1);
  result.members.clear();
  for (AccountRow& row : result.rows) row.waited_for = in_job(account, row.waited_for);
  for (AccountEvent& event : result.recent) {
    for (Blame& each : event.waited_for)
      if (each.rank >= 0) each.rank = account.in_job(each.rank);
    if (event.last_arrival >= 0) event.last_arrival = account.in_job(event.last_arrival);
  }
  for (SlackRow& row : result.slack) row.peer = row.peer < 0 ? row.peer : account.in_job(row.peer);
  result.by_peer = in_job(account, account.by_peer);
  return result;
}

/// Throws Errc::invalid_argument if the account names ranks that its communicator does not have, or times that cannot be: with those
/// that are left, what few of them add up to is a time, too.
inline void check(const Account& account) {
  const auto wrong = [&](auto&&... what) { throw Error(Errc::invalid_argument, {"account of rank ", account.rank, " of '", account.communicator, "': ", what...}); };
  constexpr int most_ranks = 1 << 20;
  if (account.size > most_ranks) wrong("it is one of ", account.size);
  if (account.size < 1 || account.rank < 0 || account.rank >= account.size) wrong("there is no such rank among ", account.size);
  if (!account.members.empty() && static_cast<int>(account.members.size()) != account.size) wrong(account.members.size(), " members are named of ", account.size);
  for (const Rank r : account.members)
    if (r < 0 || r >= most_ranks) wrong("rank ", r, " is named as a member");
  const auto plausible = [&](std::string_view what, nanoseconds time) {
    constexpr std::int64_t most = std::int64_t{1} << 60;  // 36 years
    if (time.count() > most || time.count() < -most) wrong(what, " is ", time.count(), " ns, more than 36 years");
  };
  plausible("its begin", account.begin);
  plausible("its end", account.end);
  plausible("its clock's offset", account.clock_offset);
  if (account.end < account.begin) wrong("it ends before it begins");
  const auto parts = [&](std::string_view what, const AccountTimes& time) {
    for (const auto part : all_times) plausible(what, time.*part);
    for (const auto part : all_times)
      if (time.*part < nanoseconds{0}) wrong(what, " is negative");
  };
  const auto known = [&](const std::vector<Blame>& blame, Rank least) {
    for (const Blame& each : blame)
      if (each.rank < least || each.rank >= account.size) wrong("it waited for rank ", each.rank, " of ", account.size);
    for (const Blame& each : blame)
      for (const nanoseconds part : {each.arrival, each.transfer, each.credit}) {
        plausible("a wait", part);
        if (part < nanoseconds{0}) wrong("a wait is negative");
      }
  };
  for (const AccountRow& row : account.rows) {
    known(row.waited_for, 0);
    parts("a sum of times", row.time);
  }
  for (const SlackRow& row : account.slack)
    if (row.peer >= account.size) wrong("it expects to wait for rank ", row.peer, " of ", account.size);
  for (const AccountEvent& event : account.recent) {
    known(event.waited_for, -1);
    plausible("the begin of a call", event.begin);
    parts("the time of a call", event.time);
    if (event.last_arrival >= account.size) wrong("rank ", event.last_arrival, " of ", account.size, " called last");
  }
  known(account.by_peer, 0);
}

}  // namespace detail

/// What rank `a.rank` kept of two communicators, or in two stretches of time: sums, with ranks as the job numbers them. The order
/// of merging does not matter. Domains are those of the account that saw more of them. Throws if they are of different ranks.
inline Account merge(const Account& a, const Account& b) {
  detail::check(a);
  detail::check(b);
  Account result = detail::in_job(a);
  const Account more = detail::in_job(b);
  if (result.rank != more.rank) throw Error(Errc::invalid_argument, {"accounts of rank ", result.rank, " and of rank ", more.rank, " cannot be merged: use job_of()"});
  const auto joined = [](const std::string& x, const std::string& y) {
    if (x == y || y.empty()) return x;
    return x.empty() ? y : std::min(x, y) + "+" + std::max(x, y);
  };
  result.communicator = joined(a.communicator, b.communicator);
  result.transport = joined(a.transport, b.transport);
  result.size = std::max(result.size, more.size);
  result.begin = std::min(a.begin, b.begin);
  result.end = std::max(a.end, b.end);
  std::vector<AccountRow> rows;
  for (const Account* each : {&std::as_const(result), &more})
    for (const AccountRow& row : each->rows) detail::add(rows, row);
  result.rows = std::move(rows);
  detail::add(result.by_peer, more.by_peer);
  result.recent.insert(result.recent.end(), more.recent.begin(), more.recent.end());
  std::sort(result.recent.begin(), result.recent.end(), [](const AccountEvent& x, const AccountEvent& y) { return std::tie(x.begin, x.sequence) < std::tie(y.begin, y.sequence); });
  for (AccountEvent& event : result.recent) event.operation_number = 0;  // of which communicator is not known any longer
  // Of what is of the host as a whole, the account that saw more of it counts; of two that saw the same, the same one in any order.
  const auto seen = [](const Account& each) { return std::tuple(each.end - each.begin, each.begin, std::string_view(each.communicator)); };
  if (seen(more) > seen(a)) {
    result.domains = more.domains, result.power = more.power;
    result.host_coverage = more.host_coverage, result.residual = more.residual;
    result.carbon_intensity = more.carbon_intensity, result.pue = more.pue;
    result.clock_offset = more.clock_offset;
    result.host = more.host, result.boot_id = more.boot_id;
  }
  result.job = joined(a.job, b.job);
  result.carbon_source = joined(a.carbon_source, b.carbon_source);
  result.slack.insert(result.slack.end(), more.slack.begin(), more.slack.end());
  result.caveats |= more.caveats;
  detail::add(result.warnings, more.warnings);
  if (!detail::same_carbon(a, b)) {
    for (AccountRow& row : result.rows) row.energy.carbon = {};
    detail::add(result.warnings, {detail::mixed_carbon});
  }
  return result;
}

/// What `later` has over `earlier`, an older account of the same communicator and rank: throws if it is not that.
inline Account diff(const Account& later, const Account& earlier) {
  using detail::all_times, detail::all_energies, detail::all_counts, detail::all_joules, detail::difference;
  if (later.communicator != earlier.communicator || later.rank != earlier.rank || later.size != earlier.size)
    throw Error(Errc::invalid_argument, {"the accounts of rank ", later.rank, " of '", later.communicator, "' and of rank ", earlier.rank, " of '", earlier.communicator, "' have no difference"});
  const auto not_older = [&] { return Error(Errc::invalid_argument, {"'", earlier.communicator, "': the second account is not older than the first"}); };
  const auto without = [&](std::vector<Blame> blame, const std::vector<Blame>& before) {
    for (const Blame& each : before) {
      const auto at = std::find_if(blame.begin(), blame.end(), [&](const Blame& b) { return b.rank == each.rank; });
      if (at == blame.end() || at->arrival < each.arrival || at->transfer < each.transfer || at->credit < each.credit) throw not_older();
      at->arrival -= each.arrival;
      at->transfer -= each.transfer;
      at->credit -= each.credit;
    }
    std::erase_if(blame, [](const Blame& b) { return b.total().count() == 0; });
    return blame;
  };
  Account result = later;
  result.begin = earlier.end;
  for (const AccountRow& before : earlier.rows) {
    const auto row = std::find_if(result.rows.begin(), result.rows.end(), [&](const AccountRow& each) { return detail::key_of(each) == detail::key_of(before); });
    if (row == result.rows.end()) throw not_older();
    for (const auto count : all_counts) {
      if ((*row).*count < before.*count) throw not_older();
      (*row).*count -= before.*count;
    }
    for (const auto part : all_times) row->time.*part -= before.time.*part;
    for (std::size_t i = 0; i < elapsed_buckets; ++i) row->histogram[i] -= before.histogram[i];
    for (const auto part : all_energies) row->energy.*part = difference(row->energy.*part, before.energy.*part);
    row->waited_for = without(row->waited_for, before.waited_for);
  }
  std::erase_if(result.rows, [](const AccountRow& row) { return row.calls == 0 && row.failed == 0; });
  result.by_peer = without(result.by_peer, earlier.by_peer);
  for (const DomainAccount& before : earlier.domains)
    for (DomainAccount& domain : result.domains)
      if (domain.key == before.key)
        for (const auto part : all_joules) {
          if (domain.*part < before.*part) throw not_older();
          domain.*part -= before.*part;
        }
  std::erase_if(result.recent, [&](const AccountEvent& event) { return event.begin < earlier.end; });
  std::erase_if(result.power, [&](const PowerSample& sample) { return sample.end <= earlier.end; });
  return result;
}

}  // namespace tally::inline v0
