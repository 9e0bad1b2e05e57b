// SPDX-License-Identifier: Apache-2.0
// Accounts put together: sums, differences, and blame followed back through operations that follow each other.
#include <catch2/catch.hpp>

#include <algorithm>
#include <random>

#include <tally/account/job.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

AccountRow row_of(Collective operation, nanoseconds elapsed, std::vector<Blame> waited, double watts = 10) {
  AccountRow row;
  row.operation = operation;
  row.algorithm = "ring";
  row.calls = 1;
  row.bytes = 8;
  row.time.elapsed = row.time.exposed = elapsed;
  for (const Blame& blame : waited) {
    row.time.wait_arrival += blame.arrival;
    row.time.wait_transfer += blame.transfer;
    row.time.wait_credit += blame.credit;
  }
  row.time.protocol = elapsed - row.time.idle();
  row.histogram[3] = 1;
  row.waited_for = std::move(waited);
  const auto joules = [&](nanoseconds time) { return Quantity{watts * std::chrono::duration<double>(time).count(), 0, 0, 1, Provenance::modelled, Split::equal_time}; };
  row.energy.gross = joules(elapsed);
  row.energy.idle = joules(row.time.idle());
  return row;
}

/// A call of rank `rank`, which is both a row and a recent event of its account.
void call(Account& account, std::uint64_t number, nanoseconds begin, nanoseconds end, std::vector<Blame> waited) {
  AccountRow row = row_of(Collective::all_reduce, end - begin, waited);
  AccountEvent event;
  event.operation_number = number;
  event.sequence = static_cast<std::uint32_t>(account.recent.size() + 1);
  event.operation = row.operation;
  event.begin = begin;
  event.time = row.time;
  event.waited_for = std::move(waited);
  account.recent.push_back(event);
  detail::add(account.rows, row);
  detail::add(account.by_peer, row.waited_for);
  account.end = std::max(account.end, end);
}
Account account_of(Rank rank, int size, std::string communicator = "world") {
  Account account;
  account.communicator = std::move(communicator);
  account.host = "one";
  account.rank = rank;
  account.size = size;
  return account;
}

}  // namespace

TEST_CASE("what one rank makes the others wait is charged to it, in seconds and joules") {
  std::vector<Account> accounts;
  for (Rank r = 0; r < 4; ++r) accounts.push_back(account_of(r, 4));
  for (Rank r = 0; r < 4; ++r) {
    if (r == 2) call(accounts[2], 1, 5ms, 6ms, {});
    else call(accounts[static_cast<std::size_t>(r)], 1, 0ms, 6ms, {{2, 5ms, {}, {}}, {3, {}, 500us, {}}});
  }
  accounts[3].by_peer.clear();
  accounts[3].rows.clear();
  accounts[3].recent.clear();
  call(accounts[3], 1, 0ms, 6ms, {{2, 5ms, {}, {}}});
  const JobAccount job = job_of(accounts);
  REQUIRE(job.size == 4);
  CHECK(job.wait(0, 2).arrival == 5ms);
  CHECK(job.wait(0, 3).transfer == 500us);
  CHECK(job.wait(0, 2).energy.value == Approx(0.05));  // 10 W
  CHECK(job.wait(2, 0).total() == 0ns);
  CHECK(job.wait(2, 0).energy.value == 0);
  CHECK(job.followed == 1);
  CHECK(job.stragglers[0].rank == 2);
  CHECK(job.stragglers[0].caused == 15ms);
  CHECK(job.stragglers[0].share == 1);
  CHECK(job.stragglers[0].energy.value == Approx(0.15));
  CHECK(job.stragglers[0].energy.provenance == Provenance::modelled);
  CHECK(job.stragglers[1].caused == 0ns);
  CHECK(job.time.elapsed == 19ms);
  CHECK(job.rows.size() == 1);
  CHECK(job.rows[0].calls == 4);
  CHECK(job.energy.gross.value == Approx(0.19));
}

TEST_CASE("a wait handed on across operations is followed back to the rank that came late") {
  // Rank 0 comes 10 ms late to operation 1 of a chain of messages' like: 1 waits for 0, comes late to 2 because of that, 2 waits for 1, and so on.
  std::vector<Account> accounts;
  const int n = 4;
  for (Rank r = 0; r < n; ++r) accounts.push_back(account_of(r, n, "pairs"));
  const nanoseconds late = 10ms, own = 1ms;  // each also works for 1 ms between its two operations
  // Operation k is between ranks k - 1 and k. Rank r is in operation r at 0 and leaves it when rank r - 1 has come.
  nanoseconds came = late;
  call(accounts[0], 1, came, came + 10us, {});
  for (Rank r = 1; r < n; ++r) {
    call(accounts[static_cast<std::size_t>(r)], static_cast<std::uint64_t>(r), 0ms, came + 10us, {{r - 1, came, {}, {}}});
    came += own;
    if (r + 1 < n) call(accounts[static_cast<std::size_t>(r)], static_cast<std::uint64_t>(r) + 1, came, came + 10us, {});
  }
  const JobAccount job = job_of(accounts);
  CHECK(job.wait(3, 2).arrival == late + 2 * own);
  CHECK(job.wait(3, 0).arrival == 0ns);
  // Rank 3 waited 12 ms for rank 2: 10 of them for rank 0, one for rank 1's work, one for rank 2's.
  CHECK(job.resolved_wait(3, 0).arrival == late);
  CHECK(job.resolved_wait(3, 1).arrival == own);
  CHECK(job.resolved_wait(3, 2).arrival == own);
  CHECK(job.resolved_wait(2, 0).arrival == late);
  CHECK(job.resolved_wait(2, 1).arrival == own);
  CHECK(job.resolved_wait(1, 0).arrival == late);
  CHECK(job.resolved_wait(3, 0).energy.value == Approx(0.1));
  CHECK(job.resolved_wait(3, 2).energy.value == Approx(0.01));
  CHECK(job.stragglers[0].rank == 0);
  CHECK(job.stragglers[0].caused == 3 * late);
  CHECK(job.stragglers[1].rank == 1);
  CHECK(job.stragglers[1].caused == 2 * own);
  CHECK(job.stragglers[1].passed_on == late);
  CHECK(job.stragglers[2].passed_on == late + own);
  nanoseconds before{}, after{};
  for (std::size_t i = 0; i < job.waits.size(); ++i) before += job.waits[i].total(), after += job.resolved[i].total();
  CHECK(before == after);
}

TEST_CASE("chains are followed from one communicator to another, with ranks as the job numbers them") {
  Account a1 = account_of(0, 2, "row"), a0 = account_of(1, 2, "row"), b1 = account_of(1, 2, "column"), b2 = account_of(0, 2, "column");
  a1.members = a0.members = {1, 0};  // the row's rank 0 is the job's rank 1
  b1.members = b2.members = {2, 1};
  // Job rank 0 is 5 ms late in the row; rank 1 waits for it there and so is 5 ms late in the column, where rank 2 waits.
  call(a0, 1, 5ms, 5ms + 1us, {});
  call(a1, 1, 0ms, 5ms + 1us, {{1, 5ms, {}, {}}});
  call(b1, 1, 5ms + 1us, 5ms + 2us, {});
  call(b2, 1, 1ms, 5ms + 2us, {{1, 4ms + 1us, {}, {}}});
  const JobAccount job = job_of(std::vector{b2, a0, b1, a1});
  REQUIRE(job.size == 3);
  CHECK(job.wait(2, 1).arrival == 4ms + 1us);
  CHECK(job.resolved_wait(2, 0).arrival == 4ms);
  CHECK(job.resolved_wait(2, 1).arrival == 1us);
  CHECK(job.stragglers[0].rank == 0);
  CHECK(job.stragglers[0].caused == 9ms);
}

TEST_CASE("ranks that wait for each other in a circle do not make the search endless") {
  std::vector<Account> accounts{account_of(0, 2, "a"), account_of(1, 2, "a"), account_of(0, 2, "b"), account_of(1, 2, "b")};
  call(accounts[0], 1, 0ms, 5ms, {{1, 4ms, {}, {}}});
  call(accounts[1], 1, 4ms, 5ms, {});
  call(accounts[2], 1, 4ms, 5ms, {});
  call(accounts[3], 1, 0ms, 5ms, {{0, 4ms, {}, {}}});
  const JobAccount job = job_of(accounts);
  CHECK(job.resolved_wait(0, 1).arrival + job.resolved_wait(1, 0).arrival == 8ms);
}

TEST_CASE("a circle of waits through many calls is given up in time, and nothing is lost") {
  std::vector<Account> accounts;
  for (int c = 0; c < 8; ++c)
    for (Rank r = 0; r < 2; ++r) {
      Account account = account_of(r, 2, std::string(1, static_cast<char>('a' + c)));
      for (std::uint64_t i = 0; i < 256; ++i) {
        const nanoseconds at = static_cast<std::int64_t>(i) * 10us + c * 1us;
        if ((i + static_cast<std::uint64_t>(c)) % 2 == static_cast<std::uint64_t>(r)) call(account, i + 1, at, at + 5ms, {{1 - r, 4ms, {}, {}}});
        else call(account, i + 1, at + 4ms, at + 5ms, {});
      }
      accounts.push_back(account);
    }
  const JobAccount job = job_of(accounts);  // took minutes
  nanoseconds charged{}, resolved{};
  for (const WaitCell& cell : job.waits) charged += cell.arrival;
  for (const WaitCell& cell : job.resolved) resolved += cell.arrival;
  CHECK(charged == 8 * 256 * 4ms);
  CHECK(resolved == charged);
}

TEST_CASE("waits for messages are followed back, too: of a pipeline the rank is late that begins it late") {
  std::vector<Account> accounts;
  for (Rank r = 0; r < 4; ++r) accounts.push_back(account_of(r, 4));
  const auto message = [&](Rank r, Collective operation, nanoseconds begin, nanoseconds end, std::vector<Blame> waited) {
    call(accounts[static_cast<std::size_t>(r)], 0, begin, end, std::move(waited));
    accounts[static_cast<std::size_t>(r)].recent.back().operation = operation;
  };
  for (int i = 0; i < 100; ++i) {
    const nanoseconds at = i * 6ms;  // rank 0 computes for 5 ms
    message(0, Collective::send, at + 5ms, at + 5100us, {});
    for (Rank r = 1; r < 4; ++r) {
      const nanoseconds came = at + 5ms + (r - 1) * 100us;
      message(r, Collective::receive, at, came + 50us, {{r - 1, came - at, {}, {}}});
      if (r < 3) message(r, Collective::send, came + 100us, came + 150us, {});
    }
  }
  const JobAccount job = job_of(accounts);
  CHECK(job.followed == 1);
  CHECK(job.stragglers[0].rank == 0);
  CHECK(job.stragglers[0].share > 0.95);
}

TEST_CASE("ranks of which there is no account are named, and hosts are told apart by what they are") {
  std::vector<Account> accounts{account_of(0, 4), account_of(2, 4)};
  CHECK(job_of(accounts).missing == std::vector<Rank>{1, 3});
  CHECK(job_of(accounts).there() == 2);
  const auto domain = [](std::string key, Nanojoules total) {
    DomainAccount d;
    d.key = std::move(key);
    d.total = d.unattributed = total;
    return d;
  };
  for (Account& account : accounts) account.domains = {domain("package-0", 10 + static_cast<Nanojoules>(account.rank))};
  accounts[0].boot_id = accounts[1].boot_id = "x";
  accounts[1].host = "a container of it";
  REQUIRE(job_of(accounts).domains.size() == 1);
  CHECK(job_of(accounts).domains[0].account.total == 12);
  accounts[1].host = accounts[0].host;
  accounts[1].boot_id = "y";
  CHECK(job_of(accounts).domains.size() == 2);
}

TEST_CASE("grams of average and of marginal intensities never get into one sum") {
  std::vector<Account> accounts{account_of(0, 2), account_of(1, 2)};
  for (Account& account : accounts) {
    call(account, 1, 0ms, 5ms, {});
    account.rows[0].energy.carbon = {1, 0, 1, 1, Provenance::modelled, Split::equal_time};
    account.carbon_source = "zone DE, average, from 'x.csv'";
  }
  CHECK(job_of(accounts).energy.carbon.value == 2);
  accounts[1].carbon_source = "zone DE, marginal, from 'y.csv'";
  CHECK_FALSE(job_of(accounts).energy.carbon.known());
  CHECK_FALSE(job_of(accounts).rows[0].energy.carbon.known());
  CHECK(job_of(accounts).warnings.size() == 1);
  accounts[1].rank = 0;
  accounts[1].communicator = "other";
  CHECK_FALSE(merge(accounts[0], accounts[1]).rows[0].energy.carbon.known());
}

TEST_CASE("an operation in the background that its rank came back to late is not placed in time, and stays charged as it was") {
  std::vector<Account> accounts{account_of(0, 2), account_of(1, 2)};
  call(accounts[1], 1, 1ms, 20ms, {});
  call(accounts[0], 1, 2ms, 20ms, {{1, 15ms, {}, {}}});  // rank 1 had called at 1 ms
  const JobAccount job = job_of(accounts);
  CHECK(job.followed == 0);
  CHECK(job.resolved_wait(0, 1).arrival == 15ms);
}

TEST_CASE("I9: children and what is exclusive are together the inclusive account, whatever the order of merging") {
  std::mt19937 random(7);
  const auto number = [&](int most) { return static_cast<int>(random() % static_cast<unsigned>(most)); };
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<Account> accounts;
    for (int c = 0; c < 4; ++c) {
      Account account = account_of(1, 3, std::string(1, static_cast<char>('a' + c)));
      if (c > 1) account.members = {4, 2, 0}, account.rank = 1;
      else account.rank = 2;
      for (int i = 0; i < 5; ++i) {
        AccountRow row = row_of(i % 2 ? Collective::barrier : Collective::all_reduce, nanoseconds(1000 + number(1000)), {{0, nanoseconds(number(500)), nanoseconds(number(9)), {}}});
        row.size_class = static_cast<std::uint8_t>(number(3));
        detail::add(account.rows, row);
        detail::add(account.by_peer, row.waited_for);
      }
      accounts.push_back(account);
    }
    const auto all = [&](auto&& order) {
      Account whole = accounts[static_cast<std::size_t>(order[0])];
      for (std::size_t i = 1; i < 4; ++i) whole = merge(whole, accounts[static_cast<std::size_t>(order[i])]);
      return whole;
    };
    const Account one = all(std::array{0, 1, 2, 3}), other = all(std::array{3, 1, 0, 2}), nested = merge(merge(accounts[2], accounts[0]), merge(accounts[3], accounts[1]));
    for (const Account* each : {&other, &nested}) {
      REQUIRE(each->rows.size() == one.rows.size());
      for (std::size_t i = 0; i < one.rows.size(); ++i) {
        CHECK(detail::key_of(each->rows[i]) == detail::key_of(one.rows[i]));
        for (const auto part : detail::all_times) CHECK(each->rows[i].time.*part == one.rows[i].time.*part);
        for (const auto count : detail::all_counts) CHECK(each->rows[i].*count == one.rows[i].*count);
        CHECK(each->rows[i].energy.gross.value == Approx(one.rows[i].energy.gross.value).margin(1e-9));
      }
      REQUIRE(each->by_peer.size() == one.by_peer.size());
      for (std::size_t i = 0; i < one.by_peer.size(); ++i) CHECK(each->by_peer[i].arrival == one.by_peer[i].arrival);
    }
    nanoseconds inclusive{}, parts{};
    for (const AccountRow& row : one.rows) inclusive += row.time.elapsed;
    for (const Account& account : accounts)
      for (const AccountRow& row : account.rows) parts += row.time.elapsed;
    CHECK(inclusive == parts);
    CHECK(one.rank == 2);
  }
}

TEST_CASE("the difference of two accounts is what came between them") {
  Account before = account_of(0, 2);
  call(before, 1, 0ms, 2ms, {{1, 1ms, {}, {}}});
  before.domains.push_back({Domain::cpu_package, "package-0", "fake", -1, 100, 40, 50, 10, 0, Provenance::measured, 0});
  Account after = before;
  call(after, 2, 3ms, 7ms, {{1, 3ms, {}, {}}});
  after.domains[0].total = 250;
  after.domains[0].operations = 140;
  after.domains[0].application = 80;
  after.domains[0].unattributed = 30;
  const Account between = diff(after, before);
  REQUIRE(between.rows.size() == 1);
  CHECK(between.rows[0].calls == 1);
  CHECK(between.rows[0].time.elapsed == 4ms);
  CHECK(between.rows[0].waited_for[0].arrival == 3ms);
  CHECK(between.rows[0].energy.gross.value == Approx(0.04));
  CHECK(between.by_peer[0].arrival == 3ms);
  CHECK(between.recent.size() == 1);
  CHECK(between.domains[0].total == 150);
  CHECK(between.domains[0].operations + between.domains[0].application + between.domains[0].unattributed == 150);
  const Account nothing = diff(after, after);
  CHECK(nothing.rows.empty());
  CHECK(nothing.by_peer.empty());
  CHECK_THROWS_WITH(diff(before, after), Catch::Contains("not older"));
  CHECK_THROWS_WITH(diff(after, account_of(1, 2)), Catch::Contains("have no difference"));
}

TEST_CASE("a host's domains count once, however many of its ranks tell of them") {
  std::vector<Account> accounts;
  for (Rank r = 0; r < 4; ++r) {
    Account account = account_of(r, 4);
    account.host = r < 2 ? "one" : "two";
    const auto seen = static_cast<Nanojoules>(100 + r);
    account.domains.push_back({Domain::cpu_package, "package-0", "fake", -1, seen, seen, 0, 0, 0, Provenance::measured, static_cast<Caveats>(Caveat::wrap)});
    account.domains.push_back({Domain::dram, "package-0/dram", "fake", 0, 10, 10, 0, 0, 0, Provenance::measured, 0});
    accounts.push_back(account);
  }
  std::swap(accounts[0], accounts[3]);
  const JobAccount job = job_of(accounts);
  REQUIRE(job.domains.size() == 4);
  Nanojoules packages = 0;
  for (const HostDomain& domain : job.domains) {
    if (domain.account.kind == Domain::cpu_package) packages += domain.account.total;
    else CHECK(job.domains[static_cast<std::size_t>(domain.account.parent)].host == domain.host);
  }
  CHECK(packages == 101 + 103);
  CHECK(has(job.caveats, Caveat::wrap));
}

TEST_CASE("an energy that is not known makes no sum, and an account that is not possible is refused") {
  std::vector<Account> accounts{account_of(0, 2), account_of(1, 2)};
  call(accounts[0], 1, 0ms, 6ms, {{1, 5ms, {}, {}}});
  call(accounts[1], 1, 5ms, 6ms, {});
  accounts[0].rows[0].energy = {};
  const JobAccount job = job_of(accounts);
  CHECK_FALSE(job.energy.gross.known());
  CHECK_FALSE(job.wait(0, 1).energy.known());
  CHECK_FALSE(job.stragglers[0].energy.known());
  CHECK_FALSE(job.stragglers[0].carbon.known());
  CHECK(std::isnan(job.stragglers[0].energy.value));

  auto wrong = accounts;
  wrong[0].rows[0].waited_for[0].rank = 2;
  CHECK_THROWS_WITH(job_of(wrong), Catch::Contains("waited for rank 2 of 2"));
  wrong = accounts;
  wrong[1].rank = 2;
  CHECK_THROWS_WITH(job_of(wrong), Catch::Contains("no such rank"));
  wrong = accounts;
  wrong[1].members = {0};
  CHECK_THROWS_WITH(job_of(wrong), Catch::Contains("1 members"));
  wrong[1] = wrong[0];
  CHECK_THROWS_WITH(job_of(wrong), Catch::Contains("two accounts of rank 0"));
  CHECK(job_of({}).size == 0);
  const auto refuses = [&](auto&& change, const char* what) {
    auto odd = accounts;
    change(odd[1]);
    CHECK_THROWS_WITH(job_of(odd), Catch::Contains(what));
  };
  refuses([](Account& a) { a.members = {0, 2147483647}; }, "rank 2147483647 is named");
  refuses([](Account& a) { a.size = 2147483647; }, "one of 2147483647");
  refuses([](Account& a) { a.size = 100000; }, "of up to 4096");
  refuses([](Account& a) { a.recent[0].last_arrival = 2; }, "rank 2 of 2 called last");
  refuses([](Account& a) { a.slack.push_back({Collective::all_reduce, 2, 1, {}, {}}); }, "expects to wait for rank 2 of 2");
  refuses([](Account& a) { a.rows[0].time.copy = -1ns; }, "a sum of times is negative");
  refuses([](Account& a) { a.begin = a.end + 1ns; }, "ends before it begins");
}

TEST_CASE("times at the end of what can be are added up, and those beyond it refused by name") {
  const nanoseconds most{std::int64_t{1} << 60};
  for (const nanoseconds begin : {most, -most})
    for (const nanoseconds offset : {most, -most}) {
      std::vector<Account> accounts{account_of(0, 2), account_of(1, 2)};
      for (Account& account : accounts) account.begin = -most, account.end = most, account.clock_offset = offset;
      call(accounts[0], 1, begin, begin + most / 2, {{1, most / 2, {}, {}}});
      call(accounts[1], 1, begin, begin + most / 2, {{0, most / 2, {}, {}}});
      for (Account& account : accounts) account.end = most;
      const JobAccount job = job_of(accounts);
      CHECK(job.elapsed == 2 * most);
      CHECK(job.resolved_wait(0, 1).arrival == most / 2);
    }
  const auto refuses = [&](auto&& change, const char* what) {
    std::vector<Account> accounts{account_of(0, 2), account_of(1, 2)};
    call(accounts[1], 1, 0ms, 5ms, {{0, 1ms, {}, {}}});
    change(accounts[1]);
    CHECK_THROWS_WITH(job_of(accounts), Catch::Contains("account of rank 1 of 'world'") && Catch::Contains(what) && Catch::Contains("more than 36 years"));
  };
  for (const nanoseconds beyond : {most + 1ns, -most - 1ns, nanoseconds::max(), nanoseconds::min()}) {
    refuses([&](Account& a) { a.begin = beyond; }, "its begin");
    refuses([&](Account& a) { a.end = beyond; }, "its end");
    refuses([&](Account& a) { a.clock_offset = beyond; }, "its clock's offset");
    refuses([&](Account& a) { a.recent[0].begin = beyond; }, "the begin of a call");
    refuses([&](Account& a) { a.recent[0].time.elapsed = beyond; }, "the time of a call");
    refuses([&](Account& a) { a.recent[0].waited_for[0].arrival = beyond; }, "a wait");
  }
}
