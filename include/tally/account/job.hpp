// SPDX-License-Identifier: Apache-2.0
// All ranks' accounts together: who made whom wait and what that cost, which rank slows the job, and what the hosts drew,
// each domain counted once. Waiting that was handed on, because a rank came late to one operation as it had waited in
// another, is followed back to the rank that came late.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../energy/quantity.hpp"
#include "../text.hpp"
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
};

/// A job: all ranks' accounts of one communicator or of several, by rank in the job.
struct JobAccount {
  std::string job;
  int size = 0;
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

  const WaitCell& wait(Rank waiting, Rank culprit) const { return waits[cell(waiting, culprit)]; }
  const WaitCell& resolved_wait(Rank waiting, Rank culprit) const { return resolved[cell(waiting, culprit)]; }
  std::size_t cell(Rank waiting, Rank culprit) const { return static_cast<std::size_t>(waiting) * static_cast<std::size_t>(size) + static_cast<std::size_t>(culprit); }
};

/// The accounts may be of several communicators of a job and come in any order; the order changes nothing. Throws
/// Errc::invalid_argument where an account names ranks that it does not have.
JobAccount job_of(std::span<const Account> accounts);

}  // namespace tally::inline v0
