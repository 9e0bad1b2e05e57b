// SPDX-License-Identifier: Apache-2.0
// What every call hands back: 128 bytes of time and traffic. Energy and blame are looked up in the ledger by
// sequence number, because they do not fit and, for meters, are not known yet when the call returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <ostream>
#include <string>
#include <type_traits>
#include <vector>

#include "../energy/quantity.hpp"
#include "../figures.hpp"
#include "../text.hpp"
#include "amounts.hpp"
#include "states.hpp"

namespace tally::inline v0 {

struct Report;

namespace detail {

/// What a ledger can tell about one recent operation.
struct ReportSource {
  virtual ~ReportSource() = default;
  struct Extra {
    AccountEnergy energy;
    bool energy_final = false;
    std::vector<Blame> blame;
  };
  /// False if the operation is no longer among the recent ones.
  virtual bool find(std::uint32_t sequence, Extra& extra) const = 0;
  virtual std::string_view algorithm_name(std::uint8_t index) const = 0;
  virtual std::string_view transport_name() const = 0;
};

/// Reports outlive communicators, so they hold a number instead of a pointer.
class ReportSources {
 public:
  static ReportSources& all() {
    static ReportSources& instance = *new ReportSources;  // never destroyed: reports may be read during exit
    return instance;
  }
  std::uint64_t add(const ReportSource* source) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < entries_.size(); ++i)
      if (!entries_[i].source) return entries_[i].source = source, handle(i);
    entries_.push_back({source, 1});
    return handle(entries_.size() - 1);
  }
  void remove(std::uint64_t handle) {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[static_cast<std::uint32_t>(handle)];
    entry.source = nullptr;
    ++entry.generation;
  }
  /// f(source) under the lock, or nothing if the source is gone.
  template <class F>
  void with(std::uint64_t handle, F&& f) {
    const std::lock_guard lock(mutex_);
    const std::size_t i = static_cast<std::uint32_t>(handle);
    if (i < entries_.size() && entries_[i].source && entries_[i].generation == handle >> 32) f(*entries_[i].source);
  }

 private:
  struct Entry {
    const ReportSource* source;
    std::uint32_t generation;
  };
  std::uint64_t handle(std::size_t i) const { return (static_cast<std::uint64_t>(entries_[i].generation) << 32) | i; }
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace detail

/// The account of one call on one rank. elapsed is exactly the sum of the nine parts. energy(), idle_energy()
/// and blame() know the communicator's last 256 operations; call them from the thread that uses it.
struct Report {
  nanoseconds elapsed{};  // from the call to its result being usable here
  nanoseconds exposed{};  // of it, time the caller was blocked
  nanoseconds copy{}, reduce{}, codec{}, protocol{};
  nanoseconds wait_arrival{}, wait_transfer{}, wait_credit{}, wait_local{}, undriven{};
  std::uint64_t bytes_sent = 0, bytes_received = 0;  // payload
  std::uint64_t bytes_wire = 0;                      // moved for the payload sent, headers and padding included
  std::uint64_t ledger = 0;                          // handle for the functions below
  std::uint32_t sequence = 0;                        // of the operation on its communicator, from 1 on; low 32 bits
  std::int16_t last_arrival = -1;                    // the rank that came last, -1 where the operation cannot know
  std::uint8_t algorithm = 0, flags = 0;

  nanoseconds busy() const { return copy + reduce + codec + protocol; }
  nanoseconds idle() const { return wait_arrival + wait_transfer + wait_credit + wait_local; }

  nanoseconds overlapped() const { return elapsed - exposed; }

  /// Joules of this operation on this rank, by meters where there are any, else by the model; NaN where nothing can be said, or not yet.
  /// Time in which the thread served other operations, or nobody drove this one, is not its own.
  Quantity energy() const { return energies().gross; }
  /// Of them, joules while waiting.
  Quantity idle_energy() const { return energies().idle; }
  /// All that is known of what was spent.
  AccountEnergy energies() const { return extra().energy; }
  /// Meters are read in windows: energy() is not known before the one is closed in which the operation ended.
  bool energy_final() const { return extra().energy_final; }
  /// The ranks waited for, worst first. Sums per cause equal wait_arrival, wait_transfer and wait_credit.
  std::vector<Blame> blame() const { return extra().blame; }
  std::string algorithm_name() const {
    std::string name;
    detail::ReportSources::all().with(ledger, [&](const detail::ReportSource& source) { name = source.algorithm_name(algorithm); });
    return name;
  }
  std::string transport_name() const {
    std::string name;
    detail::ReportSources::all().with(ledger, [&](const detail::ReportSource& source) { name = source.transport_name(); });
    return name;
  }

 private:
  detail::ReportSource::Extra extra() const {
    detail::ReportSource::Extra extra;
    detail::ReportSources::all().with(ledger, [&](const detail::ReportSource& source) { source.find(sequence, extra); });
    return extra;
  }
};
static_assert(sizeof(Report) == 128 && std::is_trivially_copyable_v<Report>);

namespace detail {

/// The times of an operation; what was moved is for the engine to fill in.
inline Report report_of(const Stopwatch& watch, const Clock& clock, Rank last_arrival) {
  const auto& ticks = watch.ticks();
  const auto part = [&](State state) { return clock.to_ns(ticks[static_cast<std::size_t>(state)]); };
  const nanoseconds none{};
  // Returned in one go: what is copied right after it was written in parts costs ten times as much.
  if (const nanoseconds all = part(State::protocol); watch.plain()) return {all, all, none, none, none, all, none, none, none, none, none, 0, 0, 0, 0, 0, static_cast<std::int16_t>(last_arrival), 0, 0};
  const nanoseconds copy = part(State::copy), reduce = part(State::reduce), protocol = part(State::protocol), local = part(State::wait_local), undriven = part(State::undriven);
  Blame waits;
  for (const Rank rank : watch.blamed()) {
    const Blame blame = watch.blame_of(rank, clock);
    waits.arrival += blame.arrival;
    waits.transfer += blame.transfer;
    waits.credit += blame.credit;
  }
  const nanoseconds elapsed = copy + reduce + protocol + waits.total() + local + undriven;
  return {elapsed, elapsed, copy, reduce, none, protocol, waits.arrival, waits.transfer, waits.credit, local, undriven, 0, 0, 0, 0, 0, static_cast<std::int16_t>(last_arrival), 0, 0};
}

}  // namespace detail

/// One line: time, busy and idle, who was late, joules with error and source.
inline std::ostream& operator<<(std::ostream& out, const Report& r) {
  using detail::time_text;
  out << '#' << r.sequence << ' ' << r.algorithm_name() << '/' << r.transport_name() << ": ";
  if (r.elapsed == nanoseconds{0}) return out << "not timed, sent " << detail::bytes_text(r.bytes_sent);
  out << time_text(r.elapsed) << " (busy " << time_text(r.busy()) << ", idle " << time_text(r.idle());
  if (r.idle() > nanoseconds{0}) {
    out << ": arrival " << time_text(r.wait_arrival) << ", transfer " << time_text(r.wait_transfer);
    if (r.wait_credit > nanoseconds{0}) out << ", credit " << time_text(r.wait_credit);
    if (r.wait_local > nanoseconds{0}) out << ", local " << time_text(r.wait_local);
  }
  if (r.undriven > nanoseconds{0}) out << "; undriven " << time_text(r.undriven);
  out << "), ";
  if (r.exposed < r.elapsed) out << "of it exposed " << time_text(r.exposed) << ", ";
  if (r.last_arrival >= 0) out << "last to call was rank " << r.last_arrival << ", ";
  out << "sent " << detail::bytes_text(r.bytes_sent);
  const AccountEnergy energy = r.energies();
  out << ", " << detail::joules_text(energy.gross);
  if (energy.gross.known()) out << " (" << name_of(energy.gross.provenance) << "), of which idle " << detail::joules_text(energy.idle);
  if (energy.carbon.known()) out << ", " << detail::grams_text(energy.carbon) << " CO2e";
  return out;
}

}  // namespace tally::inline v0
