// SPDX-License-Identifier: Apache-2.0
// The kept account of one communicator on one rank: sums per operation, size class and algorithm, who was waited
// for, and the details of the last 256 calls; and the joules that meters charge for them, window by window. Its memory
// does not grow with the number of operations.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../host.hpp"
#include "amounts.hpp"
#include "report.hpp"
#include "row_energy.hpp"
#include "settings.hpp"
#include "slack.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

/// Sums over all calls of one operation, size class and algorithm.
struct LedgerRow {
  Collective operation = Collective::none;
  std::uint8_t size_class = 0;  // sizes up to 2^size_class bytes, and above 2^(size_class - 1)
  std::uint8_t algorithm = 0;
  std::uint64_t calls = 0, failed = 0;
  std::uint64_t bytes = 0;  // of the caller's data
  std::uint64_t bytes_sent = 0, bytes_received = 0, bytes_wire = 0;
  nanoseconds elapsed{}, copy{}, reduce{}, codec{}, protocol{};
  nanoseconds wait_arrival{}, wait_transfer{}, wait_credit{}, wait_local{}, undriven{};
  nanoseconds exposed{};          // the caller was blocked; the rest of elapsed was overlapped
  nanoseconds slept{};            // part of the waits
  nanoseconds queued{};           // part of the waits: other operations were served, and pay for it
  std::vector<Blame> waited_for;  // indexed by rank
  std::vector<ExpectedWait> late;  // likewise: arrival waits of calls that waited for that rank
  ExpectedWait wait;               // arrival waits of calls, whoever was late
  ElapsedHistogram histogram{};
  EnergyAmounts charged;      // by meters, for windows that are closed
  Quantity grams = no_grams;  // for that
  ActivityTimes charged_for;  // what had been done by then

  nanoseconds busy() const { return copy + reduce + codec + protocol; }
  nanoseconds idle() const { return wait_arrival + wait_transfer + wait_credit + wait_local; }
  /// The rank waited for most, -1 if none.
  Rank worst() const {
    const auto it = std::max_element(waited_for.begin(), waited_for.end(), [](const Blame& a, const Blame& b) { return a.total() < b.total(); });
    return it == waited_for.end() || it->total() == nanoseconds{0} ? -1 : it->rank;
  }
  AccountTimes times() const { return {elapsed, exposed, copy, reduce, codec, protocol, wait_arrival, wait_transfer, wait_credit, wait_local, undriven, slept, queued}; }
  ActivityTimes activities() const { return times().activities(); }
  /// By meters, nothing is known of it yet, which is not 0.
  bool awaits_energy() const { return charged_for.total() <= nanoseconds{0} && activities().total() > nanoseconds{0}; }
};

class Ledger final : public detail::ReportSource {
 public:
  [[gnu::cold, gnu::noinline]] Ledger(int n, Rank me, std::string_view transport, const Clock& clock, AccountSettings settings)
      : n_(n), me_(me), transport_(transport), settings_(std::move(settings)), energy_(settings_.sources ? settings_.sources() : nullptr), host_at_begin_(energy_.host()), windows_at_begin_(energy_.windows()), clock_(clock), began_(Moment::now(clock)), recent_(recent_count), by_peer_(nobody()) {
    energy_.publish({});
    handle_ = detail::ReportSources::all().add(this);
  }
  [[gnu::cold, gnu::noinline]] ~Ledger() override { detail::ReportSources::all().remove(handle_); }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  int size() const { return n_; }
  Rank rank() const { return me_; }
  /// As of now: calls made later are in what the next call of this returns.
  const std::deque<LedgerRow>& rows() const {
    settle();
    const_cast<Ledger*>(this)->settle_energy();
    return rows_;
  }
  /// What each rank made this one wait, all operations together; indexed by rank.
  const std::vector<Blame>& by_peer() const {
    settle();
    return by_peer_;
  }

  Quantity energy(const LedgerRow& row) const { return energies(row).gross; }
  Quantity idle_energy(const LedgerRow& row) const { return energies(row).idle; }
  /// By meters where there are any: of the windows closed so far. Else by the model.
  AccountEnergy energies(const LedgerRow& row) const {
    const_cast<Ledger*>(this)->settle_energy();
    if (!energy_.metered()) return modelled(row.activities());
    if (row.awaits_energy()) return {};
    return metered(row.charged, row.grams);
  }
  /// Waits until the joules of all calls so far are known, for so long at most: some 200 ms. False if they are not, or there is no meter.
  bool wait_for_energy(nanoseconds at_most = std::chrono::seconds(5)) const {
    settle();
    if (!energy_.metered()) return false;
    const std::uint64_t enough = energy_.windows() + 2;  // the one that may be closing now does not know all
    const auto end = std::chrono::steady_clock::now() + at_most;
    while (energy_.windows() < enough) {
      if (std::chrono::steady_clock::now() >= end) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    const_cast<Ledger*>(this)->settle_energy();
    return true;
  }
  /// There are calls of whose kind no joules are known yet, since the first window in which there were any is still open.
  bool awaits_energy() const {
    const std::deque<LedgerRow>& all = rows();
    return energy_.metered() && std::any_of(all.begin(), all.end(), [](const LedgerRow& row) { return row.awaits_energy(); });
  }
  /// All of it as plain data. `communicator` names it in the job; `job` may be empty. Power and domains are the host's, since this ledger began.
  Account account(std::string_view communicator, std::string_view job = {}) const;

  const ModelMeter& model() const { return settings_.model; }
  const AccountSettings& settings() const { return settings_; }
  std::string_view transport_name() const override { return transport_; }
  std::string_view algorithm_name(std::uint8_t index) const override { return index < algorithms_.size() ? std::string_view(algorithms_[index]) : "unknown"; }

  // For engines.
  const detail::Watched& watched() const { return settings_.watched; }
  [[gnu::cold]] std::uint64_t begun(const LedgerRow& row, std::uint64_t bytes, std::uint32_t sequence) const { return watched().begun({row.operation, bytes, algorithms_[row.algorithm], sequence}); }
  std::uint64_t handle() const { return handle_; }
  static std::uint8_t size_class(std::uint64_t bytes) { return static_cast<std::uint8_t>(bytes <= 1 ? 0 : std::bit_width(bytes - 1)); }
  LedgerRow& row(Collective operation, std::uint64_t bytes, std::string_view algorithm) {
    const std::uint8_t size = size_class(bytes), index = algorithm_index(algorithm);
    for (LedgerRow& row : rows_)
      if (row.operation == operation && row.size_class == size && row.algorithm == index) return row;
    std::vector<Blame> waited_for = nobody();
    decltype(LedgerRow::late) late(waited_for.size());
    LedgerRow& row = rows_.emplace_back();
    row.operation = operation;
    row.size_class = size;
    row.algorithm = index;
    row.waited_for = std::move(waited_for);
    row.late = std::move(late);
    return row;
  }
  /// How long a call of this row that has begun to wait is going to: nine of ten did longer. Tells who wants to know.
  [[gnu::cold]] nanoseconds expect_wait(const LedgerRow* row) {
    if (!row) return {};
    const nanoseconds tenth = row->wait.tenth_percentile();
    if (tenth >= std::chrono::microseconds(500) && settings_.on_slack) {
      try {
        settings_.on_slack({row->operation, std::uint64_t{1} << row->size_class, row->wait.mean(), tenth});
      } catch (...) {  // a hint is not worth an operation
      }
    }
    return tenth;
  }
  /// What the engine knows of a call beside its report and its stopwatch.
  struct Booking {
    LedgerRow* row = nullptr;
    std::uint64_t bytes = 0;
    std::uint64_t number = 0;  // of the operation, the same on all ranks; 0 for messages
    Ticks begin = 0;
    const Stopwatch* watch = nullptr;
  };
  /// Books a finished operation, at the next moment at which there is nothing better to do: when settle() or this
  /// is called again, or the ledger is read. Its stopwatch, which knows whom it waited for, is left alone until then.
  void book(const Booking& booking, const Report& report, const Clock& clock) {
    settle();
    pending_ = {booking, report.bytes_sent, report.bytes_received, report.bytes_wire, report.sequence, report.last_arrival, report.elapsed - report.exposed, &clock};
  }
  /// A call goes on for long: what it has done so far is charged to it, too. `now`: up to when its stopwatch's state lasts.
  [[gnu::cold]] void publish_unfinished(const Stopwatch& watch, Ticks now, const Clock& clock) {
    if (!energy_.has_source()) return;
    settle();
    settle_energy();  // what was charged was for what had been published
    auto known = find_unfinished(watch);
    if (known == unfinished_.end()) known = unfinished_.emplace(known, &watch);
    known->times = activities(watch, now, clock);
    publish();
  }
  void settle() const {
    if (!pending_.call.row) return;
    const_cast<Ledger*>(this)->enter();
    pending_.call.row = nullptr;
  }

  bool find(std::uint32_t sequence, Extra& extra) const override {
    settle();
    const_cast<Ledger*>(this)->settle_energy();
    const Recent& recent = recent_[sequence % recent_count];
    if (sequence == 0 || recent.sequence != sequence) return false;
    extra.energy = energies(recent);
    extra.energy_final = is_final(recent);
    extra.blame = recent.worst_first();
    return true;
  }

 private:
  struct Pending {
    Booking call;
    std::uint64_t bytes_sent = 0, bytes_received = 0, bytes_wire = 0;
    std::uint32_t sequence = 0;
    std::int16_t last_arrival = -1;
    nanoseconds overlapped{};
    const Clock* clock = nullptr;
  };
  /// A call that goes on for long, or did when the last window closed.
  struct Unfinished {
    explicit Unfinished(const Stopwatch* w) : watch(w) {}
    const Stopwatch* watch;
    std::uint32_t ended_as = 0;  // its sequence
    ActivityTimes times, charged_for;  // when it was published last; and of these, what it was charged for
    EnergyAmounts charged;
    Quantity grams = no_grams;
  };
  static constexpr std::size_t recent_count = 256;
  struct Recent {
    std::uint32_t sequence = 0;
    std::int16_t last_arrival = -1;
    bool stalled = false;
    std::uint8_t blamed = 0;
    std::uint64_t number = 0, bytes = 0;
    Ticks begin = 0;
    const LedgerRow* row = nullptr;
    nanoseconds elapsed{}, exposed{};
    // Where it was not all protocol:
    AccountTimes times;
    std::array<Blame, 8> blame{};
    EnergyAmounts charged;
    Quantity grams = no_grams;

    AccountTimes all_times() const {
      if (stalled) return times;
      AccountTimes plain;
      plain.elapsed = plain.protocol = elapsed;
      plain.exposed = exposed;
      return plain;
    }
    ActivityTimes activities() const {
      if (stalled) return times.activities();
      ActivityTimes plain;
      plain[Activity::protocol] = elapsed;
      return plain;
    }
    std::vector<Blame> worst_first() const {
      if (!stalled) return {};
      std::vector<Blame> all(blame.begin(), blame.begin() + blamed);
      for (std::size_t i = 1; i < all.size(); ++i)
        for (std::size_t k = i; k > 0 && all[k - 1].total() < all[k].total(); --k) std::swap(all[k - 1], all[k]);
      return all;
    }
  };
  void enter() {
    settle_energy();  // what was charged was for what had been published
    LedgerRow& row = *pending_.call.row;
    const Stopwatch& watch = *pending_.call.watch;
    const Clock& clock = *pending_.clock;
    ++row.calls;
    row.bytes += pending_.call.bytes;
    row.bytes_sent += pending_.bytes_sent;
    row.bytes_received += pending_.bytes_received;
    row.bytes_wire += pending_.bytes_wire;
    const Report report = detail::report_of(watch, clock, -1);  // its times once more
    row.elapsed += report.elapsed;
    row.exposed += report.elapsed - pending_.overlapped;
    row.protocol += report.protocol;
    ++row.histogram[elapsed_bucket(report.elapsed)];
    if (row.wait.seen() > 0 || report.wait_arrival > nanoseconds{0}) row.wait.learn(report.wait_arrival);
    done_[Activity::protocol] += report.protocol;
    Recent& recent = recent_[pending_.sequence % recent_count];
    recent.sequence = last_ = pending_.sequence;
    recent.last_arrival = pending_.last_arrival;
    recent.number = pending_.call.number;
    recent.begin = pending_.call.begin;
    recent.row = &row;
    recent.bytes = pending_.call.bytes;
    recent.elapsed = report.elapsed;
    recent.exposed = report.elapsed - pending_.overlapped;
    recent.stalled = !watch.plain();
    if (recent.stalled) enter_stalled(row, recent, report, watch, clock);
    if (!unfinished_.empty()) return end_unfinished(watch, row, recent);
    energy_.publish(done_);
  }
  [[gnu::always_inline]] std::list<Unfinished>::iterator find_unfinished(const Stopwatch& watch) {
    auto each = unfinished_.begin();
    while (each != unfinished_.end() && (each->watch != &watch || each->ended_as != 0)) ++each;
    return each;
  }
  [[gnu::always_inline]] void publish() {
    ActivityTimes all = done_;
    for (const Unfinished& each : unfinished_)
      if (each.ended_as == 0) add(all, each.times);
    energy_.publish(all);
  }
  void enter_stalled(LedgerRow& row, Recent& recent, const Report& report, const Stopwatch& watch, const Clock& clock) {
    row.copy += report.copy;
    row.reduce += report.reduce;
    row.codec += report.codec;
    row.wait_arrival += report.wait_arrival;
    row.wait_transfer += report.wait_transfer;
    row.wait_credit += report.wait_credit;
    row.wait_local += report.wait_local;
    row.undriven += report.undriven;
    const nanoseconds slept = clock.to_ns(watch.slept()), queued = clock.to_ns(watch.queued());
    row.slept += slept;
    row.queued += queued;
    recent.times = {report.elapsed, recent.exposed, report.copy, report.reduce, report.codec, report.protocol, report.wait_arrival, report.wait_transfer, report.wait_credit, report.wait_local, report.undriven, slept, queued};
    ActivityTimes rest = recent.activities();
    rest[Activity::protocol] = {};  // is booked already
    add(done_, rest);
    recent.blamed = 0;
    for (const Rank r : watch.blamed()) {
      const Blame blame = watch.blame_of(r, clock);
      add(row.waited_for[static_cast<std::size_t>(r)], blame);
      if (blame.arrival > nanoseconds{0}) row.late[static_cast<std::size_t>(r)].learn(blame.arrival);
      add(by_peer_[static_cast<std::size_t>(r)], blame);
      remember(recent, blame);
    }
  }

  // Joules. Windows close some ten times a second; then what they charged is divided among what was done since.

  void settle_energy() {
    if (energy_.due()) charge();
  }
  [[gnu::cold, gnu::noinline]] void charge() {
    sinks_.clear();
    for (LedgerRow& row : rows_) {
      const ActivityTimes all = row.activities(), since = difference(all, row.charged_for);
      if (since.total() > nanoseconds{0}) sinks_.push_back({since, &row.charged, &row.grams});
      row.charged_for = all;
    }
    for (Unfinished& each : unfinished_) {
      if (each.ended_as != 0) continue;
      const ActivityTimes since = difference(each.times, each.charged_for);
      if (since.total() > nanoseconds{0}) sinks_.push_back({since, &each.charged, &each.grams});
      add(each.charged_for, since);
    }
    const nanoseconds from = std::max(energy_.reading().time, began_.time);
    for (LedgerEnergy::Sink& sink : sinks_) sink.before = sink.amounts->total();
    const LedgerEnergy::Rates rates = energy_.settle(sinks_);
    CarbonFigure carbon;
    if (settings_.carbon) {
      carbon = carbon_of(from, std::max(from, energy_.reading().time));
      for (const LedgerEnergy::Sink& sink : sinks_) *sink.grams = *sink.grams + carbon.grams_per_joule * (static_cast<double>(sink.amounts->total() - sink.before) * 1e-9);
      carbon_ = carbon;
    }
    for (std::uint32_t sequence = last_ - charged_to_ < recent_count ? charged_to_ + 1 : last_ - static_cast<std::uint32_t>(recent_count) + 1; sequence != last_ + 1; ++sequence) {
      Recent& recent = recent_[sequence % recent_count];
      if (recent.sequence != sequence) continue;
      ActivityTimes times = recent.activities();
      bool has_some = false;
      for (const Unfinished& each : unfinished_)
        if (each.ended_as == sequence) has_some = true, times = difference(times, each.charged_for);
      if (!has_some) recent.charged = {}, recent.grams = no_grams;
      const Nanojoules before = recent.charged.total();
      rates.apply(times, recent.charged);
      recent.grams = recent.grams + carbon.grams_per_joule * (static_cast<double>(recent.charged.total() - before) * 1e-9);
    }
    charged_to_ = last_;
    for (auto each = unfinished_.begin(); each != unfinished_.end();) each = each->ended_as != 0 ? unfinished_.erase(each) : std::next(each);
    if (!watched()) return;
    EnergyAmounts so_far;
    for (const LedgerRow& row : rows_) so_far.add(row.charged);
    for (const Unfinished& each : unfinished_) so_far.add(each.charged);
    watched().charged(energy_.reading().time, energy_.energy(so_far));
  }
  /// If this call was published while it went on, what it was charged meanwhile is its own.
  [[gnu::cold, gnu::noinline]] void end_unfinished(const Stopwatch& watch, LedgerRow& row, Recent& recent) {
    const auto known = find_unfinished(watch);
    if (known == unfinished_.end()) return publish();
    // A little less may have been done than it seemed: parts of a time are rounded each for itself. No other call is to make up for that.
    const ActivityTimes all = recent.activities();
    for (std::size_t a = 0; a < activity_count; ++a) known->charged_for.in[a] = std::min(known->charged_for.in[a], all.in[a]);
    row.charged.add(known->charged);
    add(row.charged_for, known->charged_for);
    row.grams = row.grams + known->grams;
    recent.charged = known->charged;
    recent.grams = known->grams;
    known->ended_as = recent.sequence;
    publish();
  }

  AccountEnergy energies(const Recent& recent) const {
    if (!energy_.metered()) return modelled(recent.activities());
    return is_final(recent) ? metered(recent.charged, recent.grams) : AccountEnergy{};
  }
  /// What a user's function throws makes grams unknown, and is told.
  CarbonFigure carbon_of(nanoseconds begin, nanoseconds end) const {
    try {
      return settings_.carbon(begin, end);
    } catch (const std::exception& error) {
      CarbonFigure unknown;
      unknown.source = error.what();
      return unknown;
    } catch (...) {
      return {};
    }
  }
  AccountEnergy metered(const EnergyAmounts& charged, const Quantity& grams) const {
    AccountEnergy energy = energy_.energy(charged);
    if (settings_.carbon) energy.carbon = grams_of(grams, energy.gross);
    return energy;
  }
  /// In carbon as if power had been the same since the ledger began.
  AccountEnergy modelled(const ActivityTimes& times) const {
    AccountEnergy energy = settings_.model.energies(times);
    if (settings_.carbon) energy.carbon = grams_of(carbon_of(began_.time, Moment::now(clock_).time).grams_per_joule * energy.gross.value, energy.gross);
    return energy;
  }
  bool is_final(const Recent& recent) const { return !energy_.metered() || static_cast<std::int32_t>(charged_to_ - recent.sequence) >= 0; }
  /// Keeps the seven worst; the others are lumped together as rank -1.
  static void remember(Recent& recent, Blame blame) {
    if (recent.blamed + 1u < recent.blame.size()) {
      recent.blame[recent.blamed++] = blame;
      return;
    }
    Blame& rest = recent.blame.back();
    if (recent.blamed < recent.blame.size()) rest = {}, ++recent.blamed;
    Blame& least = *std::min_element(recent.blame.begin(), recent.blame.end() - 1, [](const Blame& a, const Blame& b) { return a.total() < b.total(); });
    if (least.total() < blame.total()) std::swap(least, blame);
    add(rest, blame);
    rest.rank = -1;
  }
  static void add(Blame& to, const Blame& more) {
    to.arrival += more.arrival;
    to.transfer += more.transfer;
    to.credit += more.credit;
  }
  static void add(ActivityTimes& to, const ActivityTimes& more) {
    for (std::size_t a = 0; a < activity_count; ++a) to.in[a] += more.in[a];
  }
  /// None is negative.
  static ActivityTimes difference(const ActivityTimes& later, const ActivityTimes& earlier) {
    ActivityTimes result;
    for (std::size_t a = 0; a < activity_count; ++a) result.in[a] = std::max(later.in[a] - earlier.in[a], nanoseconds{0});
    return result;
  }
  /// Of a call that goes on.
  static ActivityTimes activities(const Stopwatch& watch, Ticks now, const Clock& clock) {
    const auto part = [&](State state) { return clock.to_ns(watch.ticks()[static_cast<std::size_t>(state)] + (watch.state() == state && now > watch.mark() ? now - watch.mark() : 0)); };
    nanoseconds idle = part(State::wait_local);
    for (const Rank r : watch.blamed()) idle += watch.blame_of(r, clock).total();
    ActivityTimes times;
    times[Activity::copy] = part(State::copy);
    times[Activity::reduce] = part(State::reduce);
    times[Activity::codec] = part(State::codec);
    times[Activity::protocol] = part(State::protocol);
    times[Activity::sleep] = std::min(clock.to_ns(watch.slept()), idle);
    times[Activity::spin] = std::max(idle - times[Activity::sleep] - clock.to_ns(watch.queued()), nanoseconds{0});
    return times;
  }
  std::vector<Blame> nobody() const {
    std::vector<Blame> peers(static_cast<std::size_t>(n_));
    for (Rank r = 0; r < n_; ++r) peers[static_cast<std::size_t>(r)].rank = r;
    return peers;
  }
  /// The same moment in ticks and of CLOCK_MONOTONIC, so that calls of a whole ledger can be placed between two of them.
  struct Moment {
    Ticks ticks = 0;
    nanoseconds time{};
    static Moment now(const Clock& clock) {
      if (!clock.is_tsc()) return {clock.now(), nanoseconds(static_cast<std::int64_t>(clock.now()))};
      Moment best;
      Ticks narrowest = ~Ticks{0};
      for (int i = 0; i < 4; ++i) {  // whoever was interrupted in between loses
        const Ticks before = clock.now();
        const nanoseconds time = monotonic_time();
        if (const Ticks wide = clock.now() - before; wide < narrowest) narrowest = wide, best = {before + wide / 2, time};
      }
      return best;
    }
    static nanoseconds between(const Moment& a, const Moment& b, Ticks ticks) {
      if (b.ticks == a.ticks) return a.time;
      const auto since = static_cast<double>(static_cast<std::int64_t>(ticks - a.ticks));
      return a.time + nanoseconds(std::llround(since * (static_cast<double>((b.time - a.time).count()) / static_cast<double>(b.ticks - a.ticks))));
    }
  };
  std::uint8_t algorithm_index(std::string_view name) {
    std::size_t i = 0;
    while (i < algorithms_.size() && algorithms_[i] != name) ++i;
    if (i == algorithms_.size()) algorithms_.emplace_back(name);
    return static_cast<std::uint8_t>(i);
  }

  int n_;
  Rank me_;
  std::string transport_;
  AccountSettings settings_;
  LedgerEnergy energy_;
  HostEnergy host_at_begin_;
  std::uint64_t windows_at_begin_;
  Clock clock_;
  Moment began_;
  std::deque<LedgerRow> rows_;  // addresses stay: plans point at their row
  std::vector<std::string> algorithms_;
  std::vector<Recent> recent_;
  std::vector<Blame> by_peer_;
  std::uint64_t handle_ = 0;
  mutable Pending pending_;
  ActivityTimes done_;  // by calls that are booked
  std::list<Unfinished> unfinished_;  // and those that ended since the last window closed
  CarbonFigure carbon_;  // the latest
  std::uint32_t last_ = 0, charged_to_ = 0;  // sequences
  std::vector<LedgerEnergy::Sink> sinks_;
};

inline Account Ledger::account(std::string_view communicator, std::string_view job) const {
  const std::deque<LedgerRow>& all = rows();
  const Moment now = Moment::now(clock_);
  Account account;
  account.job = job;
  account.communicator = communicator;
  account.host = detail::host_name();
  account.boot_id = detail::boot_id();
  account.transport = transport_;
  account.rank = me_;
  account.size = n_;
  account.begin = began_.time;
  account.end = now.time;
  const auto who = [](std::vector<Blame> blame) {
    std::erase_if(blame, [](const Blame& each) { return each.total() == nanoseconds{0}; });
    return blame;
  };
  for (const LedgerRow& row : all)
    account.rows.push_back({row.operation, row.size_class, std::string(algorithm_name(row.algorithm)), row.calls, row.failed, row.bytes, row.bytes_sent, row.bytes_received, row.bytes_wire, row.times(), row.histogram, who(row.waited_for), energies(row)});
  std::sort(account.rows.begin(), account.rows.end(), [](const AccountRow& a, const AccountRow& b) { return std::tie(a.operation, a.size_class, a.algorithm) < std::tie(b.operation, b.size_class, b.algorithm); });
  account.by_peer = who(by_peer_);
  std::map<std::pair<Collective, Rank>, const ExpectedWait*> slack;  // of several sizes and algorithms, the one that knows most
  for (const LedgerRow& row : all)
    for (Rank r = 0; r < n_; ++r)
      if (const ExpectedWait& late = row.late[static_cast<std::size_t>(r)]; late.seen() > 0)
        if (const ExpectedWait*& best = slack[{row.operation, r}]; !best || best->seen() < late.seen()) best = &late;
  for (const auto& [key, late] : slack) account.slack.push_back({key.first, key.second, late->seen(), late->mean(), late->tenth_percentile()});
  for (std::uint32_t sequence = last_ - std::min(last_, static_cast<std::uint32_t>(recent_count)) + 1; sequence != last_ + 1; ++sequence) {
    const Recent& recent = recent_[sequence % recent_count];
    if (recent.sequence != sequence) continue;
    account.recent.push_back({recent.number, sequence, recent.row->operation, std::string(algorithm_name(recent.row->algorithm)), recent.bytes, Moment::between(began_, now, recent.begin), recent.all_times(), recent.last_arrival, recent.worst_first(), energies(recent), is_final(recent)});
  }
  HostEnergy host = energy_.host();
  for (DomainAccount& domain : host.domains)
    for (const DomainAccount& before : host_at_begin_.domains)
      if (before.key == domain.key) {
        domain.operations -= std::min(domain.operations, before.operations);
        domain.application -= std::min(domain.application, before.application);
        domain.unattributed -= std::min(domain.unattributed, before.unattributed);
        domain.total = domain.operations + domain.application + domain.unattributed;
        if (energy_.windows() == windows_at_begin_) domain.provenance = Provenance::none;  // nothing is known of this time
      }
  std::erase_if(host.power, [&](const PowerSample& sample) { return sample.end <= began_.time; });
  account.domains = std::move(host.domains);
  account.power = std::move(host.power);
  account.host_coverage = host.coverage;
  account.residual = host.residual;
  account.warnings = std::move(host.warnings);
  for (const EnergyKind& kind : energy_.reading().kinds)
    if (kind.provenance != Provenance::none) account.caveats |= kind.caveats;
  if (settings_.carbon) {
    const CarbonFigure carbon = energy_.metered() ? carbon_ : carbon_of(began_.time, now.time);
    account.carbon_intensity = carbon.grams_per_kwh;
    account.carbon_source = carbon.source;
    account.pue = carbon.pue;
    account.caveats |= carbon.caveats;
  }
  return account;
}

/// A table, one line per operation, size class and algorithm, as seen by this rank.
inline std::ostream& operator<<(std::ostream& out, const Ledger& ledger) {
  using detail::concat, detail::time_text;
  const auto line = [&](const std::array<std::string, 11>& cells) {
    static constexpr int widths[] = {18, 10, 18, 9, 10, 10, 10, 10, 11, 10, 0};
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (i < 3) out << std::left << std::setw(widths[i]) << cells[i] << ' ';
      else out << std::right << std::setw(widths[i]) << cells[i] << (i + 2 < cells.size() ? " " : i + 1 < cells.size() ? "  " : "");
    }
    out << '\n';
  };
  std::vector<const LedgerRow*> rows;
  for (const LedgerRow& row : ledger.rows()) rows.push_back(&row);
  std::sort(rows.begin(), rows.end(), [](const LedgerRow* a, const LedgerRow* b) {
    return std::tie(a->operation, a->size_class, a->algorithm) < std::tie(b->operation, b->size_class, b->algorithm);
  });
  out << "ledger of rank " << ledger.rank() << " of " << ledger.size() << " over " << ledger.transport_name() << '\n';
  line({"operation", "size up to", "algorithm", "calls", "bytes", "time", "busy", "arrival", "rest", "waited for", "joules (of which idle), source"});
  for (const LedgerRow* row : rows) {
    const AccountEnergy energies = ledger.energies(*row);
    const Quantity& energy = energies.gross;
    std::string joules = detail::joules_text(energy);
    const bool timed = row->elapsed > nanoseconds{0};
    const auto time = [&](nanoseconds t) { return timed ? time_text(t) : std::string("-"); };
    if (energy.known()) joules += concat({" (", detail::joules_text(energies.idle), "), ", name_of(energy.provenance)});
    const Rank worst = row->worst();
    line({std::string(name_of(row->operation)), detail::bytes_text(std::uint64_t{1} << row->size_class), std::string(ledger.algorithm_name(row->algorithm)),
          row->failed ? concat({row->calls, " (", row->failed, " failed)"}) : concat({row->calls}), detail::bytes_text(row->bytes), time(row->elapsed), time(row->busy()),
          time(row->wait_arrival), time(row->elapsed - row->busy() - row->wait_arrival), worst < 0 ? "-" : concat({"rank ", worst}), joules});
  }
  return out;
}

}  // namespace tally::inline v0
