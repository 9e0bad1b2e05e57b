// SPDX-License-Identifier: Apache-2.0
// Accounts on their way to other ranks, and the job's account made together.
#include <catch2/catch.hpp>

#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include <tally/job_account.hpp>
#include <tally/tally.hpp>

#include "sample_accounts.hpp"

using namespace tally;
using namespace std::chrono_literals;

TEST_CASE("an account that was sent is the account that was handed in, in every field") {
  for (const Account& account : sample::accounts()) {
    const std::vector<std::byte> bytes = to_bytes(account);
    const Account back = account_from_bytes(bytes);
    CHECK(to_bytes(back) == bytes);
    CHECK(back.host == account.host);
    REQUIRE(back.rows.size() == account.rows.size());
    CHECK(back.rows[0].algorithm == account.rows[0].algorithm);
    CHECK(back.rows[0].energy.gross.value == account.rows[0].energy.gross.value);
    CHECK(back.recent.size() == account.recent.size());
    CHECK(back.domains.size() == account.domains.size());
    CHECK(back.warnings == account.warnings);
  }
}

TEST_CASE("bytes that are no account are refused, however they differ from one") {
  const std::vector<std::byte> good = to_bytes(sample::accounts()[0]);
  for (std::size_t length = 0; length < good.size(); length += 1 + length / 50) CHECK_THROWS_AS(account_from_bytes(std::span(good).first(length)), Error);
  std::vector<std::byte> longer = good;
  longer.push_back({});
  CHECK_THROWS_WITH(account_from_bytes(longer), Catch::Contains("behind its end"));
  std::mt19937 random(11);
  int refused = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<std::byte> bytes = good;
    for (int i = 0; i < 3; ++i) bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    if (trial % 3 == 0) {  // a length of 4 G somewhere
      const std::size_t at = random() % (bytes.size() - 4);
      std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), 4, std::byte{0xff});
    }
    try {
      account_from_bytes(bytes);
    } catch (const Error& error) {
      refused += error.errc() == Errc::protocol;
    }
  }
  CHECK(refused > 300);  // most bytes are of figures, which may be any
}

namespace {

constexpr int n = 4;
/// What each rank gets, where rank 3 comes late to what it does with rank 1.
std::vector<JobAccount> jobs_of_split() {
  std::vector<JobAccount> jobs(n);
  launch(
      n,
      [&](Communicator& world) {
        std::vector<float> data(100, 1);
        auto odd = world.split(world.rank() % 2, -world.rank());  // ranks in reverse
        for (int i = 0; i < 5; ++i) {
          if (world.rank() == 3) std::this_thread::sleep_for(10ms);
          odd->all_reduce(std::span(data), max);
        }
        world.all_reduce(std::span(data), max);
        const std::vector<Account> mine{world.account("world", "test"), odd->account(world.rank() % 2 ? "odd" : "even", "test")};
        jobs[static_cast<std::size_t>(world.rank())] = job_account(world, mine);
      },
      threads);
  return jobs;
}

}  // namespace

TEST_CASE("I9: all ranks get the same job, of all communicators") {
  const std::vector<JobAccount> jobs = jobs_of_split();
  for (const JobAccount& job : jobs) {
    REQUIRE(job.size == n);
    CHECK(job.job == "test");
    CHECK(job.time.elapsed == jobs[0].time.elapsed);
    CHECK(job.energy.gross.provenance == Provenance::modelled);
    CHECK(job.energy.gross.value == jobs[0].energy.gross.value);
    std::uint64_t reduced = 0;
    for (const AccountRow& row : job.rows)
      if (row.operation == Collective::all_reduce && row.bytes == row.calls * 400) reduced += row.calls;
    CHECK(reduced == n * 6);
  }
}

TEST_CASE("ranks of all communicators are those of the first one", "[timing]") {
  for (const JobAccount& job : jobs_of_split()) {
    CHECK(job.wait(1, 3).arrival > job.wait(0, 2).arrival);  // in "odd", where they are ranks 1 and 0
    CHECK(job.stragglers[0].rank == 3);
  }
}
