// SPDX-License-Identifier: Apache-2.0
// All ranks' accounts together: who made whom wait and what that cost, which rank slows the job, and what the hosts drew,
// each domain counted once. Waiting that was handed on, because a rank came late to one operation as it had waited in
// another, is followed back to the rank that came late.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../energy/quantity.hpp"
#include "merge.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

/// What one rank made another one wait.
struct WaitCell {
  nanoseconds arrival{}, transfer{}, credit{};
  Quantity energy;  // joules the waiting rank drew meanwhile; unknown where its row's energy is
  nanoseconds total() const { return arrival + transfer + credit; }
};

/// What one rank cost the others.
struct Straggler {
  Rank rank = -1;
  nanoseconds caused{};     // arrival waits of all other ranks that lead back to it
  nanoseconds passed_on{};  // arrival waits charged to it that were not its own doing: it had been kept waiting itself
  double share = 0;         // of all arrival waits
  Quantity energy, carbon;  // drawn by the others in that time
};

/// A domain of one of the hosts.
struct HostDomain {
  std::string host;
  DomainAccount account;
  std::string boot_id;

  const std::string& machine() const { return boot_id.empty() ? host : boot_id; }  // see Account::machine
};

/// A job: all ranks' accounts of one communicator or of several, by rank in the job.
struct JobAccount {
  std::string job;
  int size = 0;
  std::vector<Rank> missing;     // of these no account is there: what they waited and drew is in no sum
  nanoseconds elapsed{};         // the longest time that any rank's account tells of
  std::vector<AccountRow> rows;  // sums over all ranks, sorted by operation, size class and algorithm; without waited_for
  AccountTimes time;             // sums over all ranks and rows
  AccountEnergy energy;
  std::vector<WaitCell> waits;     // [waiting * size + culprit], as the calls charged it
  std::vector<WaitCell> resolved;  // the same after following chains back across operations
  double followed = 0;             // part of the arrival waits whose calls are among the recent ones, so that chains could be followed
  std::vector<Straggler> stragglers;  // worst first
  std::vector<HostDomain> domains;    // each once; `parent` is an index into this list
  Caveats caveats = 0;
  std::vector<std::string> warnings;  // each once

  /// Ranks whose accounts these are the sums of.
  int there() const { return size - static_cast<int>(missing.size()); }
  const WaitCell& wait(Rank waiting, Rank culprit) const { return waits[cell(waiting, culprit)]; }
  const WaitCell& resolved_wait(Rank waiting, Rank culprit) const { return resolved[cell(waiting, culprit)]; }
  std::size_t cell(Rank waiting, Rank culprit) const { return static_cast<std::size_t>(waiting) * static_cast<std::size_t>(size) + static_cast<std::size_t>(culprit); }
};

namespace detail {

/// Arrival waits with their place in time, to follow chains through: rank p came late to an operation, so others waited for it
/// up to its arrival there; if p itself was waiting for q just then, in another operation, q is to blame for that part.
class WaitChains {
 public:
  explicit WaitChains(int size) : waits_(static_cast<std::size_t>(size)), disjoint_(waits_.size()) {}

  struct Wait {
    nanoseconds begin{}, end{};
    Rank culprit = -1;
  };
  void add(Rank waiting, Wait wait) { waits_[static_cast<std::size_t>(waiting)].push_back(wait); }
  /// After all were added. Of waits that overlap, as those of operations in the background may, the one that ends last counts.
  void sort() {
    for (std::size_t r = 0; r < waits_.size(); ++r) {
      auto& own = waits_[r];
      std::sort(own.begin(), own.end(), [](const Wait& a, const Wait& b) { return std::tie(a.end, a.begin, a.culprit) < std::tie(b.end, b.begin, b.culprit); });
      nanoseconds end = nanoseconds::max();
      for (auto wait = own.rbegin(); wait != own.rend(); ++wait) {
        const nanoseconds to = std::min(wait->end, end);
        if (wait->begin >= to) continue;
        disjoint_[r].push_back({wait->begin, to, wait->culprit});
        end = wait->begin;
      }
      std::reverse(disjoint_[r].begin(), disjoint_[r].end());
    }
  }
  const std::vector<Wait>& of(Rank waiting) const { return waits_[static_cast<std::size_t>(waiting)]; }

  /// charge(rank, time) for each part of [begin, end), during which others waited for `late`.
  template <class F>
  void follow(Rank late, nanoseconds begin, nanoseconds end, F&& charge) const {
    int steps = most_steps;
    follow(late, begin, end, charge, 0, steps);
  }

 private:
  template <class F>
  void follow(Rank late, nanoseconds begin, nanoseconds end, F&& charge, int depth, int& steps) const {
    const std::vector<Wait>& own = disjoint_[static_cast<std::size_t>(late)];
    nanoseconds busy = end - begin;
    for (auto wait = std::partition_point(own.begin(), own.end(), [&](const Wait& each) { return each.end <= begin; }); wait != own.end() && wait->begin < end; ++wait) {
      const nanoseconds from = std::max(wait->begin, begin), to = std::min(wait->end, end);
      busy -= to - from;
      if (depth < deepest && --steps > 0 && wait->culprit != late) follow(wait->culprit, from, to, charge, depth + 1, steps);
      else charge(wait->culprit, to - from);
    }
    if (busy > nanoseconds{0}) charge(late, busy);
  }

  // Accounts of ranks that wait for each other in a circle are not to be followed for ever.
  static constexpr int deepest = 64, most_steps = 1024;
  std::vector<std::vector<Wait>> waits_, disjoint_;  // by rank
};

}  // namespace detail

/// The accounts may be of several communicators of a job and come in any order; the order changes nothing. Throws
/// Errc::invalid_argument where an account names ranks that it does not have or times more than 36 years from their epoch, or two
/// are of the same rank and communicator.
inline JobAccount job_of(std::span<const Account> accounts) {
  using detail::add;
  std::vector<const Account*> all;
  for (const Account& account : accounts) {
    detail::check(account);
    all.push_back(&account);
  }
  const auto job_rank = [](const Account* account) { return account->in_job(account->rank); };
  std::sort(all.begin(), all.end(), [&](const Account* a, const Account* b) { return std::pair(std::string_view(a->communicator), job_rank(a)) < std::pair(std::string_view(b->communicator), job_rank(b)); });
  JobAccount job;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Account& account = *all[i];
    if (i > 0 && account.communicator == all[i - 1]->communicator && job_rank(&account) == job_rank(all[i - 1]))
      throw Error(Errc::invalid_argument, {"there are two accounts of rank ", job_rank(&account), " of '", account.communicator, "'"});
    job.size = std::max({job.size, account.size, job_rank(&account) + 1});
    for (const Rank member : account.members) job.size = std::max(job.size, member + 1);
    if (job.job.empty()) job.job = account.job;
    job.elapsed = std::max(job.elapsed, account.end - account.begin);
    job.caveats |= account.caveats;
    add(job.warnings, account.warnings);
  }
  constexpr int most_ranks = 4096;  // the matrices have a cell for any two of them: some gigabytes
  if (job.size > most_ranks) throw Error(Errc::invalid_argument, {"a job of ", job.size, " ranks: who waited for whom can be told of up to ", most_ranks});
  const auto n = static_cast<std::size_t>(job.size);
  std::vector<bool> is_there(n);
  for (const Account* account : all) is_there[static_cast<std::size_t>(job_rank(account))] = true;
  for (Rank r = 0; r < job.size; ++r)
    if (!is_there[static_cast<std::size_t>(r)]) job.missing.push_back(r);
  const Quantity nothing{0, 0, 0, 0, Provenance::measured, Split::direct};
  job.waits.assign(n * n, {{}, {}, {}, nothing});

  std::vector<Quantity> carbon_per_joule(n);  // of each rank
  nanoseconds arrival{}, followed{};
  bool first = true;
  for (const Account* account : all)
    for (const AccountRow& row : account->rows) {
      AccountRow nameless = row;
      nameless.waited_for.clear();
      add(job.rows, nameless);
      add(job.time, row.time);
      if (std::exchange(first, false)) job.energy = row.energy;
      else add(job.energy, row.energy);
      const double idle = static_cast<double>(row.time.idle().count());
      for (const Blame& blame : row.waited_for) {
        WaitCell& cell = job.waits[job.cell(job_rank(account), account->in_job(blame.rank))];
        cell.arrival += blame.arrival;
        cell.transfer += blame.transfer;
        cell.credit += blame.credit;
        arrival += blame.arrival;
        if (blame.total() > nanoseconds{0} && idle > 0) cell.energy = cell.energy + row.energy.idle * (static_cast<double>(blame.total().count()) / idle);
      }
      Quantity& carbon = carbon_per_joule[static_cast<std::size_t>(job_rank(account))];
      if (!carbon.known() && row.energy.carbon.known() && row.energy.gross.value > 0) carbon = row.energy.carbon * (1 / row.energy.gross.value);
    }

  if (std::any_of(all.begin(), all.end(), [&](const Account* account) { return !detail::same_carbon(*account, *all.front()); })) {
    for (AccountRow& row : job.rows) row.energy.carbon = {};
    job.energy.carbon = {};
    std::fill(carbon_per_joule.begin(), carbon_per_joule.end(), Quantity{});
    add(job.warnings, {detail::mixed_carbon});
  }

  // Who waits for a rank's arrival waits until then, so the sums per call tell where in time they lie.
  detail::WaitChains chains(job.size);
  for (auto begin = all.begin(), end = begin; begin != all.end(); begin = end) {
    end = std::find_if(begin, all.end(), [&](const Account* account) { return account->communicator != (*begin)->communicator; });
    std::vector<std::vector<std::pair<std::uint64_t, nanoseconds>>> calls(n);  // of each rank: the operation's number, and when it came by rank 0's clock
    for (const Account* account : std::span(begin, end)) {
      auto& own = calls[static_cast<std::size_t>(job_rank(account))];
      for (const AccountEvent& event : account->recent)
        if (event.operation_number != 0) own.emplace_back(event.operation_number, event.begin + account->clock_offset);
      std::sort(own.begin(), own.end());
    }
    for (const Account* account : std::span(begin, end))
      for (const AccountEvent& event : account->recent)
        for (const Blame& blame : event.waited_for) {
          if (blame.rank < 0 || blame.arrival <= nanoseconds{0}) continue;
          const Rank culprit = account->in_job(blame.rank);
          if (is_one_sided(event.operation) && event.waited_for.size() == 1) {  // which call of the other it was is not kept; who waits begins to at once
            const nanoseconds called = event.begin + account->clock_offset;
            chains.add(job_rank(account), {called, called + blame.arrival, culprit});
            continue;
          }
          const auto& theirs = calls[static_cast<std::size_t>(culprit)];
          const auto call = std::lower_bound(theirs.begin(), theirs.end(), std::pair(event.operation_number, nanoseconds::min()));
          if (call == theirs.end() || call->first != event.operation_number) continue;
          const nanoseconds called = event.begin + account->clock_offset, came = call->second;
          const nanoseconds slack = std::chrono::microseconds(10);  // how far a call's begin, read before its first clock reading, may be off
          if (came - blame.arrival < called - slack || came > called + event.time.elapsed + slack) continue;  // it had called already, and came back to it late
          chains.add(job_rank(account), {came - blame.arrival, came, culprit});
        }
  }
  chains.sort();

  job.resolved = job.waits;
  std::vector<nanoseconds> passed_on(n);
  for (Rank waiting = 0; waiting < job.size; ++waiting)
    for (const auto& wait : chains.of(waiting)) {
      followed += wait.end - wait.begin;
      const std::size_t charged = job.cell(waiting, wait.culprit);
      const Quantity per_ns = job.waits[charged].total() > nanoseconds{0} ? job.waits[charged].energy * (1.0 / static_cast<double>(job.waits[charged].total().count())) : Quantity{};
      chains.follow(wait.culprit, wait.begin, wait.end, [&](Rank rank, nanoseconds time) {
        if (rank == wait.culprit || rank == waiting) return;  // nobody waits for himself
        const Quantity moved = per_ns * static_cast<double>(time.count());
        WaitCell &from = job.resolved[charged], &to = job.resolved[job.cell(waiting, rank)];
        from.arrival -= time;
        to.arrival += time;
        from.energy = detail::difference(from.energy, moved);
        to.energy = to.energy + moved;
        passed_on[static_cast<std::size_t>(wait.culprit)] += time;
      });
    }
  job.followed = arrival > nanoseconds{0} ? std::min(1.0, static_cast<double>(followed.count()) / static_cast<double>(arrival.count())) : 1.0;

  for (Rank r = 0; r < job.size; ++r) job.stragglers.push_back({r, {}, passed_on[static_cast<std::size_t>(r)], 0, nothing, nothing});
  for (Rank waiting = 0; waiting < job.size; ++waiting)
    for (Straggler& straggler : job.stragglers) {
      const WaitCell& cell = job.resolved_wait(waiting, straggler.rank);
      if (cell.arrival <= nanoseconds{0}) continue;
      straggler.caused += cell.arrival;
      const Quantity joules = cell.energy * (static_cast<double>(cell.arrival.count()) / static_cast<double>(cell.total().count()));
      straggler.energy = straggler.energy + joules;
      const Quantity& carbon = carbon_per_joule[static_cast<std::size_t>(waiting)];
      straggler.carbon = straggler.carbon + (carbon.known() && joules.known() ? carbon * joules.value : Quantity{});
    }
  if (arrival > nanoseconds{0})
    for (Straggler& straggler : job.stragglers) straggler.share = static_cast<double>(straggler.caused.count()) / static_cast<double>(arrival.count());
  std::sort(job.stragglers.begin(), job.stragglers.end(), [](const Straggler& a, const Straggler& b) { return std::pair(-a.caused.count(), a.rank) < std::pair(-b.caused.count(), b.rank); });

  // A host's ranks tell of the same domains: the account that saw most of one counts.
  for (const Account* account : all)
    for (std::size_t i = 0; i < account->domains.size(); ++i) {
      const DomainAccount& domain = account->domains[i];
      const auto place = [&](const std::string& key) {
        const auto at = std::find_if(job.domains.begin(), job.domains.end(), [&](const HostDomain& each) { return each.machine() == account->machine() && each.account.key == key; });
        return static_cast<std::size_t>(at - job.domains.begin());
      };
      const std::size_t at = place(domain.key);
      if (at == job.domains.size()) job.domains.push_back({account->host, domain, account->boot_id});
      else if (job.domains[at].account.total < domain.total) job.domains[at].account = domain;
      else continue;
      job.domains[at].account.parent = -1;
      if (domain.parent < 0 || domain.parent >= static_cast<int>(account->domains.size())) continue;
      const std::size_t parent = place(account->domains[static_cast<std::size_t>(domain.parent)].key);
      if (parent < job.domains.size()) job.domains[at].account.parent = static_cast<int>(parent);
    }
  for (const HostDomain& domain : job.domains)
    if (domain.account.provenance != Provenance::none) job.caveats |= domain.account.caveats;  // else it has no figures that they could be of
  return job;
}

}  // namespace tally::inline v0
