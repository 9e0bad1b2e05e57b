// SPDX-License-Identifier: Apache-2.0
// The job's account, collectively: all ranks hand in what they kept, and each gets all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

#include "account/job.hpp"
#include "account/wire.hpp"
#include "communicator.hpp"

namespace tally::inline v0 {

/// Every rank's accounts, in the order of ranks: each hands in any number, e.g. of all its communicators. Collective over `comm`,
/// whose own account does not know of this call yet if it was taken before. Some 100 KB a rank.
inline std::vector<Account> gather_accounts(Communicator& comm, std::span<const Account> mine) {
  std::vector<std::byte> bytes;
  for (const Account& account : mine) {
    const std::vector<std::byte> one = to_bytes(account);
    const std::uint64_t length = one.size();
    const auto head = std::as_bytes(std::span(&length, 1));
    bytes.insert(bytes.end(), head.begin(), head.end());
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  const std::size_t own = bytes.size();
  std::vector<std::size_t> counts(static_cast<std::size_t>(comm.size()));
  comm.all_gather(std::span(&own, 1), counts);
  std::vector<std::byte> all(std::accumulate(counts.begin(), counts.end(), std::size_t{0}));
  comm.all_gather_v(std::span<const std::byte>(bytes), std::span(all), counts);
  std::vector<Account> accounts;
  for (std::span<const std::byte> rest = all; !rest.empty();) {
    std::uint64_t length = 0;
    if (rest.size() < sizeof length) throw Error(Errc::protocol, "an account that was received is cut short");
    std::memcpy(&length, rest.data(), sizeof length);
    rest = rest.subspan(sizeof length);
    if (length > rest.size()) throw Error(Errc::protocol, "an account that was received is cut short");
    accounts.push_back(account_from_bytes(rest.first(length)));
    rest = rest.subspan(length);
  }
  return accounts;
}
inline std::vector<Account> gather_accounts(Communicator& comm, const Account& mine) { return gather_accounts(comm, std::span(&mine, 1)); }

/// job_of() all ranks' accounts: who made whom wait, which rank slows the job, what the hosts drew. Collective over `comm`.
inline JobAccount job_account(Communicator& comm, const Account& mine) { return job_of(gather_accounts(comm, mine)); }
inline JobAccount job_account(Communicator& comm, std::span<const Account> mine) { return job_of(gather_accounts(comm, mine)); }

}  // namespace tally::inline v0
