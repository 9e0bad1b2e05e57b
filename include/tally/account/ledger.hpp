// SPDX-License-Identifier: Apache-2.0
// The kept account of one communicator on one rank: sums per operation, size class and algorithm, who was waited
// for, and the details of the last 256 operations. Its memory does not grow with the number of operations.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <deque>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "report.hpp"

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
  std::vector<nanoseconds> waited_for;  // per rank: arrival + transfer + credit

  nanoseconds busy() const { return copy + reduce + codec + protocol; }
  nanoseconds idle() const { return wait_arrival + wait_transfer + wait_credit + wait_local; }
  /// The rank waited for most, -1 if none.
  Rank worst() const {
    const auto it = std::max_element(waited_for.begin(), waited_for.end());
    return it == waited_for.end() || it->count() == 0 ? -1 : static_cast<Rank>(it - waited_for.begin());
  }
};

class Ledger final : public detail::ReportSource {
 public:
  Ledger(int n, Rank me, std::string_view transport, ModelMeter model) : n_(n), me_(me), transport_(transport), model_(model), recent_(recent_count), by_peer_(static_cast<std::size_t>(n)) {
    for (Rank r = 0; r < n; ++r) by_peer_[static_cast<std::size_t>(r)].rank = r;
    handle_ = detail::ReportSources::all().add(this);
  }
  ~Ledger() override { detail::ReportSources::all().remove(handle_); }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  int size() const { return n_; }
  Rank rank() const { return me_; }
  /// As of now: calls made later are in what the next call of this returns.
  const std::deque<LedgerRow>& rows() const {
    settle();
    return rows_;
  }
  /// What each rank made this one wait, all operations together; indexed by rank.
  const std::vector<Blame>& by_peer() const {
    settle();
    return by_peer_;
  }

  Quantity energy(const LedgerRow& row) const { return model_.joules(row.busy() + row.idle() - row.slept - row.queued, row.slept); }
  Quantity idle_energy(const LedgerRow& row) const { return model_.joules(row.idle() - row.slept - row.queued, row.slept); }
  const ModelMeter& meter() const override { return model_; }
  std::string_view transport_name() const override { return transport_; }
  std::string_view algorithm_name(std::uint8_t index) const override { return index < algorithms_.size() ? std::string_view(algorithms_[index]) : "unknown"; }

  // For engines.
  std::uint64_t handle() const { return handle_; }
  static std::uint8_t size_class(std::uint64_t bytes) { return static_cast<std::uint8_t>(bytes <= 1 ? 0 : std::bit_width(bytes - 1)); }
  LedgerRow& row(Collective operation, std::uint64_t bytes, std::string_view algorithm) {
    const std::uint8_t size = size_class(bytes), index = algorithm_index(algorithm);
    for (LedgerRow& row : rows_)
      if (row.operation == operation && row.size_class == size && row.algorithm == index) return row;
    LedgerRow row;
    row.operation = operation;
    row.size_class = size;
    row.algorithm = index;
    row.waited_for.resize(static_cast<std::size_t>(n_));
    return rows_.emplace_back(std::move(row));
  }
  /// Books a finished operation, at the next moment at which there is nothing better to do: when settle() or this
  /// is called again, or the ledger is read. `watch` knows whom it waited for, and is left alone until then.
  void book(LedgerRow& row, const Report& report, std::uint64_t bytes, const Stopwatch& watch, const Clock& clock) {
    settle();
    pending_ = {&row, bytes, report.bytes_sent, report.bytes_received, report.bytes_wire, report.sequence, report.elapsed - report.exposed, &watch, &clock};
  }
  void settle() const {
    if (!pending_.row) return;
    const_cast<Ledger*>(this)->enter();
    pending_.row = nullptr;
  }

  bool find(std::uint32_t sequence, Extra& extra) const override {
    settle();
    const Recent& recent = recent_[sequence % recent_count];
    if (sequence == 0 || recent.sequence != sequence) return false;
    if (!recent.stalled) return true;
    extra.slept = recent.slept;
    extra.queued = recent.queued;
    for (std::size_t i = 0; i < recent.blamed; ++i)
      extra.blame.insert(std::upper_bound(extra.blame.begin(), extra.blame.end(), recent.blame[i], [](const Blame& a, const Blame& b) { return a.total() > b.total(); }), recent.blame[i]);
    return true;
  }

 private:
  struct Pending {
    LedgerRow* row = nullptr;
    std::uint64_t bytes = 0, bytes_sent = 0, bytes_received = 0, bytes_wire = 0;
    std::uint32_t sequence = 0;
    nanoseconds overlapped{};
    const Stopwatch* watch = nullptr;
    const Clock* clock = nullptr;
  };
  void enter() {
    LedgerRow& row = *pending_.row;
    const Stopwatch& watch = *pending_.watch;
    const Clock& clock = *pending_.clock;
    ++row.calls;
    row.bytes += pending_.bytes;
    row.bytes_sent += pending_.bytes_sent;
    row.bytes_received += pending_.bytes_received;
    row.bytes_wire += pending_.bytes_wire;
    const Report report = detail::report_of(watch, clock, -1);  // its times once more
    row.elapsed += report.elapsed;
    row.exposed += report.elapsed - pending_.overlapped;
    row.protocol += report.protocol;
    Recent& recent = recent_[pending_.sequence % recent_count];
    recent.sequence = pending_.sequence;
    recent.stalled = !watch.plain();
    if (!recent.stalled) return;
    row.copy += report.copy;
    row.reduce += report.reduce;
    row.codec += report.codec;
    row.wait_arrival += report.wait_arrival;
    row.wait_transfer += report.wait_transfer;
    row.wait_credit += report.wait_credit;
    row.wait_local += report.wait_local;
    row.undriven += report.undriven;
    recent.slept = clock.to_ns(watch.slept());
    row.slept += recent.slept;
    recent.queued = clock.to_ns(watch.queued());
    row.queued += recent.queued;
    recent.blamed = 0;
    for (const Rank r : watch.blamed()) {
      const Blame blame = watch.blame_of(r, clock);
      row.waited_for[static_cast<std::size_t>(r)] += blame.total();
      add(by_peer_[static_cast<std::size_t>(r)], blame);
      remember(recent, blame);
    }
  }

  static constexpr std::size_t recent_count = 256;
  struct Recent {
    std::uint32_t sequence = 0;
    bool stalled = false;
    std::uint8_t blamed = 0;
    nanoseconds slept{}, queued{};
    std::array<Blame, 8> blame{};
  };
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
  std::uint8_t algorithm_index(std::string_view name) {
    const auto it = std::find(algorithms_.begin(), algorithms_.end(), name);
    if (it == algorithms_.end()) algorithms_.emplace_back(name);
    return static_cast<std::uint8_t>(std::find(algorithms_.begin(), algorithms_.end(), name) - algorithms_.begin());
  }

  int n_;
  Rank me_;
  std::string transport_;
  ModelMeter model_;
  std::deque<LedgerRow> rows_;  // addresses stay: plans point at their row
  std::vector<std::string> algorithms_;
  std::vector<Recent> recent_;
  std::vector<Blame> by_peer_;
  std::uint64_t handle_ = 0;
  mutable Pending pending_;
};

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
    const Quantity energy = ledger.energy(*row);
    std::string joules = detail::joules_text(energy);
    const bool timed = row->elapsed > nanoseconds{0};
    const auto time = [&](nanoseconds t) { return timed ? time_text(t) : std::string("-"); };
    if (energy.known()) joules += concat({" (", detail::joules_text(ledger.idle_energy(*row)), "), ", name_of(energy.provenance)});
    const Rank worst = row->worst();
    line({std::string(name_of(row->operation)), detail::bytes_text(std::uint64_t{1} << row->size_class), std::string(ledger.algorithm_name(row->algorithm)),
          row->failed ? concat({row->calls, " (", row->failed, " failed)"}) : concat({row->calls}), detail::bytes_text(row->bytes), time(row->elapsed), time(row->busy()),
          time(row->wait_arrival), time(row->elapsed - row->busy() - row->wait_arrival), worst < 0 ? "-" : concat({"rank ", worst}), joules});
  }
  return out;
}

}  // namespace tally::inline v0
