// SPDX-License-Identifier: Apache-2.0
// The account: exact partition, arrival told apart from transfer, blame, ledger, joules. Lateness is injected and
// compared with what the test itself measured on the host's monotonic clock.
#include <catch2/catch.hpp>

#include <time.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/account/merge.hpp>
#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::expect;

namespace {

std::int64_t now_ns() { return static_cast<std::int64_t>(Clock::monotonic()); }

/// I1, I2, I3 of one report.
void expect_exact(const Report& r, Rank me) {
  const nanoseconds parts = r.copy + r.reduce + r.codec + r.protocol + r.wait_arrival + r.wait_transfer + r.wait_credit + r.wait_local + r.undriven;
  expect(parts == r.elapsed, "the parts add up to elapsed, to the nanosecond");
  for (const nanoseconds part : {r.copy, r.reduce, r.codec, r.protocol, r.wait_arrival, r.wait_transfer, r.wait_credit, r.wait_local, r.undriven}) expect(part >= 0ns, "no part is negative");
  expect(r.exposed >= 0ns && r.exposed <= r.elapsed, "0 <= exposed <= elapsed");
  Blame total;
  for (const Blame& b : r.blame()) {
    expect(b.rank != me, "nobody blames himself");
    total.arrival += b.arrival;
    total.transfer += b.transfer;
    total.credit += b.credit;
  }
  expect(total.arrival == r.wait_arrival && total.transfer == r.wait_transfer && total.credit == r.wait_credit, "blame adds up to the waits");
}

/// When a rank called, as far as its own thread can tell from outside: between these two. It may be without a core in between.
struct Post {
  std::int64_t earliest = 0, latest = 0;  // ns
};
/// Time in which this thread was awake, as its account says, but on no core, as the kernel says: another thread had the core, or,
/// under a virtual machine, another machine had it, of which /proc/thread-self/schedstat knows nothing.
class Absence {
 public:
  explicit Absence(Communicator& comm) : comm_(comm), begin_(awake_without_core()) {}
  nanoseconds so_far() const { return std::max(awake_without_core() - begin_, 0ns); }

 private:
  nanoseconds awake_without_core() const {
    nanoseconds slept{};
    for (const LedgerRow& row : comm_.ledger().rows()) slept += row.slept;
    timespec ran{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ran);
    return nanoseconds(now_ns()) - std::chrono::seconds(ran.tv_sec) - nanoseconds(ran.tv_nsec) - slept;
  }
  Communicator& comm_;
  nanoseconds begin_;
};
struct Repetition {
  Report report;
  nanoseconds absent{};     // during its call
  std::vector<Post> posts;  // of all ranks

  const Post& of(Rank r) const { return posts[static_cast<std::size_t>(r)]; }
  /// The latest that any rank but this one can have called.
  std::int64_t latest_but(Rank rank) const {
    std::int64_t latest = 0;
    for (Rank r = 0; r < static_cast<Rank>(posts.size()); ++r)
      if (r != rank) latest = std::max(latest, of(r).latest);
    return latest;
  }
  /// A machine that takes cores away makes others late, too: who is last for sure is last in the report.
  bool surely_last(Rank rank) const { return of(rank).earliest > latest_but(rank); }
  nanoseconds least_lateness(Rank of_rank, Rank to) const { return std::max(nanoseconds(of(of_rank).earliest - of(to).latest), 0ns); }
  /// For how long this rank alone was missing.
  nanoseconds alone(Rank rank) const { return std::max(nanoseconds(of(rank).earliest - latest_but(rank)), 0ns); }
  nanoseconds most_lateness(Rank of_rank, Rank to) const { return std::max(nanoseconds(of(of_rank).latest - of(to).earliest), 0ns); }
};

/// One all_reduce in which `late` sleeps first.
template <class A>
Repetition late_once(Communicator& comm, Rank late, nanoseconds sleep, std::vector<float>& data) {
  comm.barrier();
  if (comm.rank() == late) std::this_thread::sleep_for(sleep);
  Repetition r;
  const Absence absence(comm);
  Post mine{now_ns(), 0};
  r.report = comm.all_reduce<A>(data, max);
  const std::int64_t ended = now_ns();
  expect(r.report.elapsed <= nanoseconds(ended - mine.earliest), "elapsed is within what the caller measured");
  mine.latest = ended - r.report.elapsed.count();
  r.absent = absence.so_far();
  r.posts.resize(static_cast<std::size_t>(comm.size()));
  comm.all_gather(std::span(&mine, 1), r.posts);
  return r;
}

nanoseconds blamed_arrival(const Report& r, Rank rank) {
  for (const Blame& b : r.blame())
    if (b.rank == rank) return b.arrival;
  return 0ns;
}

template <class A>
void two_ranks_idle_truth(Communicator& comm, std::size_t count) {
  constexpr int repetitions = 10;
  constexpr nanoseconds tolerance = 500us;
  const Rank me = comm.rank(), other = 1 - me;
  for (const Rank late : {0, 1}) {
    std::vector<float> data(count, 1.0f);
    int sure = 0, good = 0;
    std::string seen;
    late_once<A>(comm, late, 1ms, data);  // first touch of data and slots
    for (int i = 0; i < repetitions; ++i) {
      const Repetition r = late_once<A>(comm, late, 12ms + i * 2ms, data);
      expect_exact(r.report, me);
      for (const Rank rank : {0, 1})
        if (r.surely_last(rank)) expect(r.report.last_arrival == rank, "last_arrival is the late rank, on every rank");
      sure += r.surely_last(late);
      const nanoseconds least = r.least_lateness(other, me), most = r.most_lateness(other, me), waited = r.report.wait_arrival;
      const std::string figures = detail::concat({A::name, ", ", count, " floats: waited ", waited.count(), " ns for a rank that was late by ", least.count(), " to ", most.count(), ", busy ", r.report.busy().count(), ", transfer ", r.report.wait_transfer.count(), ", credit ", r.report.wait_credit.count()});
      expect(waited <= most + tolerance, "wait_arrival is at most the lateness; " + figures);
      expect(waited + r.report.busy() >= least - tolerance, "wait_arrival and what was done meanwhile are at least the lateness; " + figures);
      expect(blamed_arrival(r.report, other) == waited, "the other rank is blamed for all of it");
      const nanoseconds error = waited - least;
      good += std::abs(error.count()) < (tolerance + r.absent).count();
      seen += detail::concat({" ", error.count(), "(", r.absent.count(), ")"});
    }
    // Who is not given a core before he begins to wait, waits less; on a quiet machine nobody is without one.
    expect(good >= repetitions - 1, detail::concat({A::name, ", ", count, " floats: wait_arrival within 0.5 ms of the lateness in 9 of 10; errors in ns (and time without a core):", seen}));
    expect(sure >= repetitions - 1, "the rank that sleeps is the last one in 9 of 10");
  }
}

void idle_truth(Communicator& comm) {
  for (const std::size_t count : {std::size_t{1}, std::size_t{1} << 20}) {
    two_ranks_idle_truth<Ring>(comm, count);
    two_ranks_idle_truth<Tree>(comm, count);
    two_ranks_idle_truth<RecursiveDoubling>(comm, count);
    two_ranks_idle_truth<OneShot>(comm, count);
  }
}

/// More ranks than cores: others' time on the cores counts too, so arrival and transfer are asserted together.
template <class A>
void crowded_idle_truth(Communicator& comm, std::size_t count, bool print) {
  constexpr int repetitions = 4;
  for (Rank late = 0; late < comm.size(); late += comm.size() - 1) {
    std::vector<float> data(count, 1.0f);
    late_once<A>(comm, late, 1ms, data);
    nanoseconds arrival{}, transfer{}, lateness_sum{};
    int sure = 0;
    for (int i = 0; i < repetitions; ++i) {
      const Repetition r = late_once<A>(comm, late, 30ms, data);
      expect_exact(r.report, comm.rank());
      sure += r.surely_last(late);
      for (Rank rank = 0; rank < comm.size(); ++rank)
        if (r.surely_last(rank)) expect(r.report.last_arrival == rank, "last_arrival is the late rank, on every rank, with " + std::string(A::name));
      arrival += r.report.wait_arrival;
      transfer += r.report.wait_transfer + r.report.wait_credit;
      lateness_sum += nanoseconds(r.of(late).earliest - r.of(comm.rank()).earliest);
      if (comm.rank() == late) continue;
      // Who has no core does not wait meanwhile; and others may be late for want of one.
      const nanoseconds lateness = r.least_lateness(late, comm.rank());
      expect(r.report.idle() + r.report.busy() >= lateness, "the call lasted at least as long as the rank was late");
      expect(r.report.wait_arrival + r.report.wait_transfer + r.report.wait_credit + r.absent >= lateness - 20ms, "most of the lateness was waited");
      const nanoseconds blamed = blamed_arrival(r.report, late);
      std::string figures = detail::concat({A::name, ", ", count, " floats: blamed ", blamed.count(), " ns of ", r.alone(late).count(), ", without a core ", r.absent.count(), "; blame:"});
      for (const Blame& b : r.report.blame()) figures += detail::concat({" rank ", b.rank, " ", b.arrival.count(), "/", b.transfer.count(), "/", b.credit.count()});
      expect(blamed + r.absent >= r.alone(late) / 2, "blame goes to the late rank, not to a neighbour; " + figures);
    }
    expect(sure >= repetitions / 2, "the rank that sleeps is the last one");
    if (print && comm.rank() == (late == 0 ? 1 : 0))
      std::cout << A::name << ", " << comm.size() << " ranks, " << count << " floats, rank " << late << " late by " << lateness_sum.count() / repetitions / 1000 << " us: arrival "
                << arrival.count() / repetitions / 1000 << " us, transfer " << transfer.count() / repetitions / 1000 << " us\n";
  }
}
void crowded(Communicator& comm) {
  for (const std::size_t count : {std::size_t{1}, std::size_t{300'000}}) {
    crowded_idle_truth<Ring>(comm, count, true);
    crowded_idle_truth<Tree>(comm, count, true);
    crowded_idle_truth<RecursiveDoubling>(comm, count, true);
    crowded_idle_truth<OneShot>(comm, count, true);
  }
}

}  // namespace

TEST_CASE("I4: idle truth: two processes", "[processes][timing]") { launch(2, idle_truth); }
TEST_CASE("I4: idle truth: two threads", "[timing]") { launch(2, idle_truth, threads); }
TEST_CASE("I4: idle truth: more processes than cores", "[processes][timing]") { launch(static_cast<int>(std::thread::hardware_concurrency()) + 2, crowded); }
TEST_CASE("I4: idle truth: more threads than cores", "[timing]") { launch(static_cast<int>(std::thread::hardware_concurrency()) + 3, crowded, threads); }

TEST_CASE("I6: in a ring of threads, rank 3 waits for rank 2 but blames rank 0", "[quiet]") {
  launch(4, [](Communicator& comm) {
    std::vector<float> data(4, 1.0f);
    for (int i = 0; i < 5; ++i) {
      const Repetition r = late_once<Ring>(comm, 0, 40ms, data);
      if (comm.rank() == 0) continue;
      expect(blamed_arrival(r.report, 0) + r.absent >= r.alone(0) / 2, "rank 0 is blamed by everyone, for at least half of its 40 ms if all others are there");
      const nanoseconds others_late = std::max(nanoseconds(r.latest_but(0) - r.of(comm.rank()).earliest), 0ns);
      for (Rank other = 1; other < 4; ++other) expect(blamed_arrival(r.report, other) < 20ms + others_late, "and nobody else is");
    }
  }, threads);
}

TEST_CASE("blame keeps the worst and lumps the rest", "[quiet]") {
  launch(12, [](Communicator& comm) {
    std::vector<float> data(1, 1.0f);
    bool sure = false;
    for (int tries = 0; tries < 5 && !sure; ++tries) {  // where the machine takes the core of a rank, that one may be late by far
      const Repetition r = late_once<OneShot>(comm, comm.rank(), comm.rank() * 4ms + (comm.rank() == 11 ? 100ms : 0ms), data);
      expect_exact(r.report, comm.rank());
      sure = r.alone(11) > 80ms;
      if (sure && comm.rank() < 6) expect(r.report.blame().front().rank == 11, "the rank that was latest by far comes first");
    }
    expect(sure, "rank 11 is the latest by far in one of five");
  }, threads);
}

namespace {

/// A transport whose rank 1 looks at its slots only every so often: a slow link, as its peers and itself see it.
class SlowLink {
 public:
  SlowLink(std::unique_ptr<SlotTransport> inner, nanoseconds period) : inner_(std::move(inner)), period_(period) {}
  Rank rank() const { return inner_->rank(); }
  int size() const { return inner_->size(); }
  int lanes() const { return inner_->lanes(); }
  std::string_view name() const { return "slow"; }
  const TransportCounters& counters() const { return inner_->counters(); }
  bool crowded() { return false; }
  void interrupt() {}
  std::size_t frame_bytes() const { return 1 << 20; }
  template <Probe P>
  void post(Transfer& t, P& probe) { inner_->post(t, probe); }
  void cancel(Transfer& t) { inner_->cancel(t); }
  template <Probe P>
  bool poll(P& probe) {
    if (rank() == 1 && period_ > 0ns) {
      const std::int64_t now = now_ns();
      if (now < next_) return false;
      next_ = now + period_.count();
    }
    return inner_->poll(probe);
  }
  void flush() { inner_->flush(); }
  void enter(const RankStatus& status) { inner_->enter(status); }
  void exit() { inner_->exit(); }
  RankStatus status(Rank r) const { return inner_->status(r); }
  Liveness liveness(Rank r) { return inner_->liveness(r); }
  void abort(const AbortNotice& notice) { inner_->abort(notice); }
  bool aborted() const { return inner_->aborted(); }
  AbortNotice abort_notice() const { return inner_->abort_notice(); }
  template <class F>
  void park(nanoseconds, F&& recheck) { recheck(); }
  void leave() { inner_->leave(); }
  Rank origin(Rank r) const { return r; }
  std::uint64_t reserve(std::span<const Rank>) { return 0; }
  std::unique_ptr<SlowLink> open(std::uint64_t, std::span<const Rank>) { return nullptr; }
  void release(std::uint64_t) {}
  void discard(std::uint64_t, std::span<const Rank>) {}

 private:
  std::unique_ptr<SlotTransport> inner_;
  nanoseconds period_;
  std::int64_t next_ = 0;
};

Report slow_broadcast(nanoseconds period, int slots) {
  SlotOptions options;
  options.slots = slots;
  options.slot_bytes = 1024;
  const auto memory = std::make_shared<ThreadMemory>(SlotLayout(2, options));
  std::vector<Report> reports(2);
  {
    std::vector<std::jthread> ranks;
    for (Rank r = 0; r < 2; ++r)
      ranks.emplace_back([&, r] {
        auto engine = std::make_unique<Engine<SlowLink>>(std::make_unique<SlowLink>(std::make_unique<SlotTransport>(memory, r), period), Clock::host(), ModelMeter{});
        Communicator comm(std::move(engine), 60s);
        std::vector<char> data(20 * 1024);
        comm.barrier();
        comm.barrier();
        reports[static_cast<std::size_t>(r)] = comm.broadcast<Tree>(data, 0);
        expect_exact(reports[static_cast<std::size_t>(r)], r);
        comm.barrier();
      });
  }
  return reports[1];
}

}  // namespace

TEST_CASE("I5: a slow link is transfer, not arrival, with a queue on it and without") {
  for (const int slots : {2, 16}) {  // with 16, more than 10 frames queue on the link
    const Report slow = slow_broadcast(2ms, slots);
    CAPTURE(slots, slow.wait_transfer.count(), slow.wait_arrival.count());
    CHECK(slow.wait_transfer + slow.wait_credit > 20ms);  // 20 frames, 2 ms each
    CHECK(slow.wait_arrival < slow.wait_transfer / 4);
  }
}

TEST_CASE("I1: failed operations are booked, exactly too") {
  launch(2, [](Communicator& comm) {
    std::vector<int> data(10, 1);
    comm.all_reduce<Ring>(data, sum);
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(300ms);
      return;
    }
    try {
      comm.all_reduce<Ring>(data, sum, {.timeout = 50ms});
      expect(false, "a timeout");
    } catch (const Error& error) {
      expect(error.errc() == Errc::timeout, "a timeout");
    }
    const LedgerRow& row = comm.ledger().rows().front();
    expect(row.calls == 2 && row.failed == 1, "two calls, one failed");
    expect(row.elapsed == row.busy() + row.idle() + row.undriven, "exact with a failure in it");
    expect(row.wait_arrival >= 40ms && row.worst() == 1, "waiting for rank 1, which never arrived");
  }, threads);
}

TEST_CASE("the ledger sums what the reports say, in constant memory") {
  launch(3, [](Communicator& comm) {
    std::vector<float> data(5000, 1.0f);
    nanoseconds elapsed{}, arrival{}, busy{};
    std::vector<Blame> peers(3);
    std::uint64_t sent = 0;
    for (int i = 0; i < 500; ++i) {
      const Report r = comm.all_reduce(data, max);
      elapsed += r.elapsed;
      busy += r.busy();
      arrival += r.wait_arrival;
      sent += r.bytes_sent;
      for (const Blame& b : r.blame()) {
        Blame& total = peers[static_cast<std::size_t>(b.rank)];
        total.arrival += b.arrival, total.transfer += b.transfer, total.credit += b.credit;
      }
    }
    const Ledger& ledger = comm.ledger();
    expect(ledger.rows().size() == 1, "one operation, one size, one algorithm");
    const LedgerRow& row = ledger.rows().front();
    expect(row.calls == 500 && row.elapsed == elapsed && row.busy() == busy && row.wait_arrival == arrival && row.bytes_sent == sent, "sums");
    expect(row.bytes == 500 * 20'000 && row.size_class == 15, "size class up to 32 KiB");
    for (std::size_t p = 0; p < 3; ++p) {
      expect(ledger.by_peer()[p].total() == peers[p].total() && row.waited_for[p].total() == peers[p].total(), "blame per peer");
    }
    std::ostringstream text;
    text << ledger << comm.all_reduce(data, max);
    expect(text.str().find("all_reduce") != std::string::npos && text.str().find("32 KiB") != std::string::npos && text.str().find("modelled") != std::string::npos, "a table");
  }, threads);
}

TEST_CASE("I9: accounts of a communicator and of its groups are together what all calls were, whatever the order of merging") {
  launch(4, [](Communicator& comm) {
    std::optional<Communicator> pair = comm.split(comm.rank() / 2), single = pair->split(comm.rank());
    std::vector<float> data(500, 1.0f);
    const auto accounts = [&] { return std::vector{comm.ledger().account("world"), pair->ledger().account("pair"), single->ledger().account("single")}; };
    std::vector<Account> before = accounts();
    nanoseconds elapsed{}, arrival{}, waits{};
    std::uint64_t calls = 0;
    const auto count = [&](const Report& r) {
      elapsed += r.elapsed;
      arrival += r.wait_arrival;
      waits += r.wait_arrival + r.wait_transfer + r.wait_credit;
      ++calls;
    };
    for (int i = 0; i < 30; ++i) {
      if (i % 10 == comm.rank()) std::this_thread::sleep_for(1ms);
      count(comm.all_reduce(data, max));
      for (int k = 0; k < 3; ++k) count(pair->all_reduce(data, max));
      count(single->all_reduce(data, max));
      count(pair->barrier());
    }
    std::vector<Account> parts = accounts();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      parts[i] = diff(parts[i], before[i]);
      const Rank first = comm.rank() / 2 * 2;
      if (i == 1) parts[i].members = {first, first + 1};
      if (i == 2) parts[i].members = {comm.rank()};
    }
    for (const auto& order : {std::array{0, 1, 2}, std::array{2, 0, 1}, std::array{1, 2, 0}}) {
      Account all = parts[static_cast<std::size_t>(order[0])];
      for (std::size_t i = 1; i < 3; ++i) all = merge(all, parts[static_cast<std::size_t>(order[i])]);
      Account sums;
      for (const AccountRow& row : all.rows) sums.rows.resize(1), sums.rows[0].calls += row.calls, detail::add(sums.rows[0].time, row.time);
      Blame blamed;
      for (const Blame& b : all.by_peer) blamed.arrival += b.arrival, blamed.transfer += b.transfer, blamed.credit += b.credit;
      expect(sums.rows[0].calls == calls, "all calls");
      expect(sums.rows[0].time.elapsed == elapsed && sums.rows[0].time.wait_arrival == arrival, "their time");
      expect(blamed.total() == waits && blamed.arrival == arrival, "and whom they waited for, as the job numbers them");
      for (const Blame& b : all.by_peer) expect(b.rank != comm.rank() && b.rank < 4, "of whom this rank is none");
    }
  }, threads);
}

TEST_CASE("joules are modelled, bounded, and unknown where there is no model", "[processes]") {
  Options options;
  options.meter.busy_watts = 10;
  options.meter.idle_watts = 2;
  launch(2, [](Communicator& comm) {
    std::vector<float> data(1000, 1.0f);
    comm.barrier();
    if (comm.rank() == 1) std::this_thread::sleep_for(60ms);
    const Report r = comm.all_reduce(data, max);
    const Quantity energy = r.energy(), idle = r.idle_energy();
    expect(energy.provenance == Provenance::modelled && idle.provenance == Provenance::modelled, "always marked modelled");
    const double seconds = std::chrono::duration<double>(r.elapsed).count();
    expect(energy.value <= 10 * seconds * 1.0001 && energy.value >= 2 * seconds * 0.9999, "between idle and busy watts");
    expect(energy.lower < energy.value && energy.value < energy.upper && energy.sigma > 0, "an error and bounds");
    expect(idle.value <= energy.value, "idle is part of the whole");
    // Rank 0 waits 60 ms, nearly all of it asleep: at most half of what spinning would have cost.
    if (comm.rank() == 0) expect(idle.value < 0.5 * 10 * seconds && idle.value > 0, "sleeping costs idle watts");
    const Quantity both = energy + idle;
    expect(both.known() && !(energy + Quantity{}).known(), "a sum is worth its least part");
  }, processes, options);
  options.meter.enabled = false;
  launch(2, [](Communicator& comm) {
    std::vector<float> data(10, 1.0f);
    const Report r = comm.all_reduce(data, max);
    expect(std::isnan(r.energy().value) && std::isnan(r.idle_energy().value) && r.energy().provenance == Provenance::none, "unknown is NaN");
    std::ostringstream text;
    text << r << comm.ledger();
    expect(text.str().find("unknown J") != std::string::npos && text.str().find("nan") == std::string::npos, "unknown in print");
  }, processes, options);
}

TEST_CASE("reports outlive their communicator") {
  Report kept;
  launch(1, [&](Communicator& comm) {
    std::vector<int> data{1};
    for (int i = 0; i < 300; ++i) {
      const Report r = comm.all_reduce(data, sum);
      if (i == 0) kept = r;
    }
    expect(!kept.energy().known(), "only the last 256 operations are known");
    kept = comm.all_reduce(data, sum);
    expect(kept.energy().known(), "a recent one is");
  }, threads);
  CHECK(std::isnan(kept.energy().value));
  CHECK(kept.blame().empty());
  CHECK(kept.elapsed > 0ns);
  std::ostringstream text;
  text << kept;
  CHECK(text.str().find("unknown J") != std::string::npos);
}

TEST_CASE("I17: without accounting there are no times") {
  Options options;
  options.accounting = false;
  launch(2, [](Communicator& comm) {
    std::vector<float> data(100'000, 1.0f);
    const Report r = comm.all_reduce(data, sum);
    expect(data[7] == 2.0f, "the sum");
    expect(r.elapsed == 0ns && r.idle() == 0ns && r.bytes_sent > 0 && !r.energy().known(), "no times, but bytes");
  }, threads, options);
}
