// SPDX-License-Identifier: Apache-2.0
// The accounts of a job as 8 ranks on two hosts would have kept them: what exporters and reports are tested with, and what
// their pictures are drawn from. All is computed from a schedule of arrivals, so every sum holds exactly.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <tally/account/snapshot.hpp>

namespace sample {

using namespace tally;

inline constexpr int ranks = 8, per_host = 4, steps = 60;
inline constexpr Rank straggler = 5;
inline constexpr std::size_t recent_count = 48;
inline constexpr double grams_per_kwh = 380, pue = 1.2;

inline Quantity prorated(double value) { return {value, 0.06 * value, 0.5 * value, 1.5 * value, Provenance::prorated, Split::calibrated_weights}; }

/// What a core of these hosts draws: 14 W at work, 11 W spinning, 3 W asleep, of which 2.5 W are its share of the floor.
inline AccountEnergy energy_of(const AccountTimes& t) {
  const double busy = 1e-9 * static_cast<double>(t.busy().count()), slept = 1e-9 * static_cast<double>(t.slept.count());
  const double spun = 1e-9 * static_cast<double>((t.idle() - t.slept - t.queued).count());
  AccountEnergy e;
  e.gross = prorated(14 * busy + 11 * spun + 3 * slept);
  e.net = prorated(11.5 * busy + 8.5 * spun + 0.5 * slept);
  e.idle = prorated(11 * spun + 3 * slept);
  e.idle_avoidable = prorated(8 * spun);
  e.cpu = e.gross * 0.85;
  e.dram = e.gross * 0.15;
  e.carbon = e.gross * (grams_per_kwh * pue / 3.6e6);
  return e;
}

inline AccountEnergy operator+(const AccountEnergy& a, const AccountEnergy& b) {
  return {a.gross + b.gross, a.net + b.net, a.idle + b.idle, a.idle_avoidable + b.idle_avoidable, a.cpu + b.cpu, a.dram + b.dram, a.gpu + b.gpu, a.carbon + b.carbon};
}

/// Runs the job. Times here are of rank 0's clock; the second host's is an hour ahead.
class Job {
 public:
  Job() {
    for (Rank r = 0; r < ranks; ++r) {
      now_[static_cast<std::size_t>(r)] = nanoseconds(5'000'000'000'000 + 1'000 * r);
      accounts_.push_back(account("world", r, r, ranks, {}));
    }
    for (Rank r = 0; r < ranks; ++r) {
      const Rank first = r / per_host * per_host;
      accounts_.push_back(account(r < per_host ? "node 0" : "node 1", r, r - first, per_host, {first, first + 1, first + 2, first + 3}));
    }
  }

  /// First those of "world" by rank, then those of "node 0" and "node 1" by rank in the job.
  std::vector<Account> run() {
    for (int step = 0; step < steps; ++step) {
      for (Rank r = 0; r < ranks; ++r) compute(r, 9'000'000 + random(400'000) + (r == straggler ? 3'000'000 : 0));
      for (Rank first = 0; first < ranks; first += per_host) collective(first, per_host, Collective::all_reduce, "zero_copy", 65'536, 30'000);
      // What rank 4 does before it joins the others comes on top of what the straggler made it wait.
      for (Rank r = 0; r < ranks; ++r) compute(r, 20'000 + (r == 4 ? 60'000 : 0));
      collective(0, ranks, Collective::all_reduce, "ring", 4'194'304, 2'400'000);
      collective(0, ranks, Collective::all_reduce, "recursive_doubling", 8, 9'000);
      if (step % 4 == 3) collective(0, ranks, Collective::all_gather, "ring", 1'048'576, 700'000, true);
      if (step % 10 == 0) collective(0, ranks, Collective::broadcast, "binomial_tree", 262'144, 150'000);
      if (step % 10 == 5) message(2, 3, 4'096);
      if (step % 20 == 19) collective(0, ranks, Collective::barrier, "dissemination", 0, 6'000);
    }
    for (Account& a : accounts_) finish(a);
    return std::move(accounts_);
  }

 private:
  static Account account(std::string communicator, Rank in_job, Rank rank, int size, std::vector<Rank> members) {
    Account a;
    a.job = "train-1871";
    a.communicator = std::move(communicator);
    a.host = in_job < per_host ? "node-a" : "node-b";
    a.boot_id = in_job < per_host ? "0b6f1c1e-52a0-4f0e-9d53-6a1f6f9f2a11" : "77d3aa2c-9f1b-4a0c-8d10-c0ffee00b007";
    a.transport = size == ranks ? "tcp" : "shm";
    a.rank = rank;
    a.size = size;
    a.members = std::move(members);
    a.clock_offset = in_job < per_host ? nanoseconds{0} : nanoseconds{-3'600'000'012'345};
    a.begin = nanoseconds(5'000'000'000'000) - a.clock_offset;
    for (Rank r = 0; r < size; ++r) a.by_peer.push_back({r, {}, {}, {}});
    return a;
  }
  Account& account_of(Rank in_job, int size) { return accounts_[static_cast<std::size_t>(size == ranks ? in_job : ranks + in_job)]; }
  nanoseconds& now(Rank in_job) { return now_[static_cast<std::size_t>(in_job)]; }
  std::int64_t random(std::int64_t below) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::int64_t>((state_ >> 33) % static_cast<std::uint64_t>(below));
  }
  void compute(Rank r, std::int64_t ns) {
    now(r) += nanoseconds(ns);
    computed_[static_cast<std::size_t>(r)] += nanoseconds(ns);
  }

  void collective(Rank first, int n, Collective operation, std::string_view algorithm, std::uint64_t bytes, std::int64_t duration, bool overlapped = false) {
    Rank culprit = 0;
    for (Rank k = 1; k < n; ++k)
      if (now(first + k) > now(first + culprit)) culprit = k;
    const nanoseconds last = now(first + culprit);
    const std::uint64_t number = ++numbers_[n == ranks ? 0 : first == 0 ? 1 : 2];
    for (Rank k = 0; k < n; ++k) {
      const std::int64_t rest = duration + random(duration / 10 + 1);
      AccountTimes t;
      t.wait_arrival = last - now(first + k);
      t.slept = t.wait_arrival > nanoseconds{100'000} ? t.wait_arrival - nanoseconds{50'000} : nanoseconds{0};
      t.copy = nanoseconds(bytes > 64 ? rest * 3 / 10 : 0);
      t.reduce = nanoseconds(bytes > 64 && reduces(operation) ? rest / 4 : 0);
      t.wait_transfer = nanoseconds(rest / 5);
      t.wait_credit = nanoseconds(bytes > 1'000'000 ? rest / 20 : 0);
      t.wait_local = nanoseconds(overlapped ? rest / 20 : 0);
      t.queued = t.wait_local;
      t.undriven = nanoseconds(overlapped ? rest / 8 : 0);
      t.protocol = nanoseconds(rest) - t.copy - t.reduce - t.wait_transfer - t.wait_credit - t.wait_local - t.undriven;
      t.elapsed = t.busy() + t.idle() + t.undriven;
      t.exposed = overlapped ? t.elapsed - t.undriven : t.elapsed;
      std::vector<Blame> blame(static_cast<std::size_t>(n));
      for (Rank r = 0; r < n; ++r) blame[static_cast<std::size_t>(r)].rank = r;
      blame[static_cast<std::size_t>(culprit)].arrival += t.wait_arrival;
      blame[static_cast<std::size_t>((k + n - 1) % n)].transfer += t.wait_transfer;
      blame[static_cast<std::size_t>((k + 1) % n)].credit += t.wait_credit;
      book(account_of(first + k, n), number, operation, algorithm, bytes, now(first + k), t, culprit, std::move(blame));
    }
  }
  void message(Rank from, Rank to, std::uint64_t bytes) {
    const nanoseconds sent = now(from) + nanoseconds(1'500);
    AccountTimes t;
    t.copy = nanoseconds(600);
    t.protocol = nanoseconds(900);
    t.elapsed = t.exposed = t.busy();
    book(account_of(from, ranks), 0, Collective::send, "eager", bytes, now(from), t, -1, {});
    AccountTimes u;
    u.copy = nanoseconds(500);
    u.protocol = nanoseconds(700);
    const nanoseconds waited = std::max(nanoseconds{0}, sent - now(to));
    u.wait_arrival = waited;
    u.elapsed = u.exposed = u.busy() + u.idle();
    book(account_of(to, ranks), 0, Collective::receive, "eager", bytes, now(to), u, waited > nanoseconds{0} ? from : -1, {{from, waited, {}, {}}});
  }

  /// `begin` is of rank 0's clock.
  void book(Account& a, std::uint64_t number, Collective operation, std::string_view algorithm, std::uint64_t bytes, nanoseconds begin, const AccountTimes& t, Rank last_arrival,
            std::vector<Blame> blame) {
    now(a.in_job(a.rank)) = begin + t.exposed;
    const auto size_class = static_cast<std::uint8_t>(bytes <= 1 ? 0 : std::bit_width(bytes - 1));
    auto row = std::find_if(a.rows.begin(), a.rows.end(), [&](const AccountRow& r) { return r.operation == operation && r.size_class == size_class && r.algorithm == algorithm; });
    if (row == a.rows.end()) {
      row = a.rows.insert(a.rows.end(), AccountRow{});
      row->operation = operation;
      row->size_class = size_class;
      row->algorithm = algorithm;
      for (Rank r = 0; r < a.size; ++r) row->waited_for.push_back({r, {}, {}, {}});
    }
    const AccountEnergy energy = energy_of(t);
    row->energy = row->calls == 0 ? energy : row->energy + energy;
    ++row->calls;
    row->bytes += bytes;
    row->bytes_sent += operation == Collective::receive ? 0 : bytes;
    row->bytes_received += operation == Collective::send ? 0 : bytes;
    row->bytes_wire += operation == Collective::receive ? 0 : bytes + 64;
    ++row->histogram[std::bit_width(static_cast<std::uint64_t>(t.elapsed.count()))];
    add(row->time, t);
    for (const Blame& b : blame) {
      add(row->waited_for[static_cast<std::size_t>(b.rank)], b);
      add(a.by_peer[static_cast<std::size_t>(b.rank)], b);
    }
    std::erase_if(blame, [](const Blame& b) { return b.total() == nanoseconds{0}; });
    std::stable_sort(blame.begin(), blame.end(), [](const Blame& x, const Blame& y) { return x.total() > y.total(); });
    ++sequences_[static_cast<std::size_t>(&a - accounts_.data())];
    AccountEvent event;
    event.operation_number = number;
    event.sequence = sequences_[static_cast<std::size_t>(&a - accounts_.data())];
    event.operation = operation;
    event.algorithm = algorithm;
    event.bytes = bytes;
    event.begin = begin - a.clock_offset;
    event.time = t;
    event.last_arrival = last_arrival;
    event.waited_for = std::move(blame);
    event.energy = energy;
    event.energy_final = true;
    if (a.recent.size() == recent_count) a.recent.erase(a.recent.begin());
    a.recent.push_back(std::move(event));
  }
  static void add(Blame& to, const Blame& b) {
    to.arrival += b.arrival;
    to.transfer += b.transfer;
    to.credit += b.credit;
  }
  static void add(AccountTimes& to, const AccountTimes& t) {
    to.elapsed += t.elapsed, to.exposed += t.exposed;
    to.copy += t.copy, to.reduce += t.reduce, to.codec += t.codec, to.protocol += t.protocol;
    to.wait_arrival += t.wait_arrival, to.wait_transfer += t.wait_transfer, to.wait_credit += t.wait_credit, to.wait_local += t.wait_local, to.undriven += t.undriven;
    to.slept += t.slept, to.queued += t.queued;
  }

  /// Windows of 100 ms, and the hosts' joules. On the second host a GPU's counter must not be read.
  void finish(Account& a) {
    const bool second = a.host == "node-b";
    a.end = *std::max_element(now_.begin(), now_.end()) - a.clock_offset;
    double in_operations = 0, computed = 0;
    for (Account& other : accounts_) {
      if (other.host != a.host) continue;
      for (const AccountRow& row : other.rows) in_operations += row.energy.gross.value;
    }
    for (Rank r = second ? per_host : 0; r < (second ? ranks : per_host); ++r) computed += 1e-9 * static_cast<double>(computed_[static_cast<std::size_t>(r)].count());
    const double seconds = 1e-9 * static_cast<double>((a.end - a.begin).count());
    const auto domain = [&](Domain kind, const char* key, int parent, double share, double floor) {
      DomainAccount d;
      d.kind = kind;
      d.key = key;
      d.source = "perf";
      d.parent = parent;
      d.operations = static_cast<Nanojoules>(1e9 * in_operations * share);
      d.application = static_cast<Nanojoules>(1e9 * 15 * computed * share);
      d.unattributed = static_cast<Nanojoules>(1e9 * floor * seconds);
      d.total = d.operations + d.application + d.unattributed;
      d.watts_floor = floor;
      d.provenance = Provenance::prorated;
      return d;
    };
    a.domains = {domain(Domain::cpu_package, "package-0", -1, 0.85, 42), domain(Domain::cpu_core, "package-0/core", 0, 0.6, 12), domain(Domain::dram, "package-0/dram", -1, 0.15, 9)};
    if (second) {
      a.domains[0].caveats = static_cast<Caveats>(Caveat::wrap);
      DomainAccount gpu;
      gpu.kind = Domain::gpu_board;
      gpu.key = "gpu-GPU-8a1f27c4";
      gpu.source = "nvml";
      gpu.caveats = static_cast<Caveats>(Caveat::permission_denied);
      a.domains.push_back(gpu);
      a.warnings.push_back("the energy counter of gpu-GPU-8a1f27c4 must not be read by this user: its joules are unknown");
    }
    for (nanoseconds begin = a.begin; begin + nanoseconds{100'000'000} <= a.end; begin += nanoseconds{100'000'000}) {
      const double phase = 1e-9 * static_cast<double>((begin - a.begin).count());
      for (const std::uint16_t d : {std::uint16_t{0}, std::uint16_t{2}}) {
        const double mean = 1e-9 * static_cast<double>(a.domains[d].total) / seconds;
        a.power.push_back({d, begin, begin + nanoseconds{100'000'000}, mean * (1 + 0.08 * std::sin(20 * phase + (second ? 1 : 0)))});
      }
    }
    for (const Blame& b : a.by_peer)
      if (b.rank != a.rank && b.arrival > nanoseconds{1'000'000}) a.slack.push_back({Collective::all_reduce, b.rank, steps, b.arrival / steps, b.arrival / (2 * steps)});
    a.host_coverage = second ? 0.93 : 0.98;
    a.residual = second ? -0.04 : 0.02;
    a.carbon_intensity = {grams_per_kwh, 19, 0, 1000, Provenance::modelled, Split::direct};
    a.carbon_source = "DE, average, lifecycle";
    a.pue = pue;
    a.caveats = static_cast<Caveats>(Caveat::carbon_estimated);
    for (const DomainAccount& d : a.domains) a.caveats |= d.caveats;
    a.warnings.push_back("the carbon intensity of DE is an estimate");
  }

  std::vector<Account> accounts_;
  std::array<nanoseconds, ranks> now_{}, computed_{};
  std::array<std::uint64_t, 3> numbers_{};
  std::array<std::uint32_t, 2 * ranks> sequences_{};
  std::uint64_t state_ = 1871;
};

inline std::vector<Account> accounts() { return Job().run(); }

/// The same where there is no meter: all joules are unknown.
inline std::vector<Account> accounts_without_energy() {
  std::vector<Account> all = accounts();
  for (Account& a : all) {
    for (AccountRow& row : a.rows) row.energy = {};
    for (AccountEvent& event : a.recent) event.energy = {}, event.energy_final = false;
    a.domains.clear();
    a.power.clear();
    a.host_coverage = a.residual = std::numeric_limits<double>::quiet_NaN();
    a.carbon_intensity = {};
    a.carbon_source.clear();
    a.caveats = 0;
    a.warnings = {"no energy counter can be read on this host: joules are unknown"};
  }
  return all;
}

}  // namespace sample
