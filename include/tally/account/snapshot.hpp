// SPDX-License-Identifier: Apache-2.0
// The account as plain data: what one rank kept of one communicator, and what all ranks' accounts are together. It is what
// exporters write, what ranks send each other and what a file holds; it knows no clock, meter or transport.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../energy/quantity.hpp"
#include "../energy/source.hpp"
#include "../types.hpp"
#include "amounts.hpp"
#include "states.hpp"

namespace tally::inline v0 {

/// Sums over all calls of one operation, size class and algorithm on one rank.
struct AccountRow {
  Collective operation = Collective::none;
  std::uint8_t size_class = 0;  // sizes up to 2^size_class bytes, and above 2^(size_class - 1)
  std::string algorithm;
  std::uint64_t calls = 0, failed = 0;
  std::uint64_t bytes = 0;  // of the caller's data
  std::uint64_t bytes_sent = 0, bytes_received = 0, bytes_wire = 0;
  AccountTimes time;
  ElapsedHistogram histogram{};
  std::vector<Blame> waited_for;  // those that were waited for, by rank
  AccountEnergy energy;
};

/// One recent call.
struct AccountEvent {
  std::uint64_t operation_number = 0;  // the same on all ranks that took part; 0 for messages
  std::uint32_t sequence = 0;          // of this rank's calls on its communicator
  Collective operation = Collective::none;
  std::string algorithm;
  std::uint64_t bytes = 0;  // of the caller's data
  nanoseconds begin{};      // since the epoch of the host's CLOCK_MONOTONIC; see Account::clock_offset
  AccountTimes time;
  Rank last_arrival = -1;
  std::vector<Blame> waited_for;  // worst first; rank -1: several others together
  AccountEnergy energy;
  bool energy_final = false;  // the window it lies in is closed
};

/// How long a peer makes this rank wait when it does, learned from the calls so far that waited for its arrival.
struct SlackRow {
  static constexpr std::uint64_t fewest_calls = 5;  // before anything is expected
  Collective operation = Collective::none;
  Rank peer = -1;
  std::uint64_t calls = 0;
  nanoseconds expected{}, tenth_percentile{};
};

/// What one rank kept of one communicator.
struct Account {
  std::string job;           // the same for all communicators and ranks of a job; may be empty
  std::string communicator;  // a name, unique in the job
  std::string host, boot_id;
  std::string transport;
  Rank rank = 0;
  int size = 1;
  std::vector<Rank> members;  // rank in the job of each rank of the communicator; empty: the same
  nanoseconds begin{}, end{};  // of the time it tells of, of the host's CLOCK_MONOTONIC
  nanoseconds clock_offset{};  // added to this rank's times it gives rank 0's, for aligning traces; 0 on one host
  std::vector<AccountRow> rows;
  std::vector<AccountEvent> recent;  // oldest first
  std::vector<Blame> by_peer;        // whom this rank waited for, by rank
  std::vector<DomainAccount> domains;
  std::vector<PowerSample> power;
  std::vector<SlackRow> slack;
  double host_coverage = std::numeric_limits<double>::quiet_NaN();  // our CPU time / the host's CPU time
  double residual = std::numeric_limits<double>::quiet_NaN();       // 1 - predicted/measured joules of the last window
  Quantity carbon_intensity;                                         // g/kWh, the latest
  std::string carbon_source;                                         // zone, signal and factor; empty: none
  double pue = 1.0;
  Caveats caveats = 0;
  std::vector<std::string> warnings;  // whole sentences

  /// Which machine it was: containers of one have several names, and machines may be called the same.
  const std::string& machine() const { return boot_id.empty() ? host : boot_id; }
  /// The rank in the job of a rank of this communicator.
  Rank in_job(Rank r) const { return members.empty() ? r : members[static_cast<std::size_t>(r)]; }
};

}  // namespace tally::inline v0
