// SPDX-License-Identifier: Apache-2.0
// What became of operations on devices. Kernels write their accounts where the host can see them; whoever asks for a result, or needs the
// place for another operation, finds it there, and it is booked. No events, no calls of the driver.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../account/ledger.hpp"
#include "../call.hpp"
#include "../device/driver.hpp"
#include "../device/session.hpp"
#include "../error.hpp"
#include "../wait.hpp"

namespace tally::inline v0 {

namespace detail {

/// Of operations in flight, as those that wait for them see it.
class AnyDeviceResults {
 public:
  virtual ~AnyDeviceResults() = default;
  /// False if it is not done after so long. Throws what it failed with.
  virtual bool finish(std::uint64_t sequence, const nanoseconds* at_most) = 0;
  virtual Report report(std::uint64_t sequence) = 0;
};

}  // namespace detail

/// Returned by a device communicator's calls. Such an operation is ordered on its stream as a kernel is, and this only tells of it: destroying
/// it waits for nothing. Reports of the last 256 operations are kept. One that was captured runs whenever its graph does and has none: its
/// runs are in the communicator's account.
class [[nodiscard]] DeviceOperation {
 public:
  DeviceOperation() = default;
  DeviceOperation(std::shared_ptr<detail::AnyDeviceResults> results, std::uint64_t sequence) : results_(std::move(results)), sequence_(sequence) {}
  /// Whether it is done. Throws what it failed with.
  bool test() { return wait_for(nanoseconds{0}); }
  bool wait_for(nanoseconds at_most) { return results().finish(sequence_, &at_most); }
  Report wait() {
    results().finish(sequence_, nullptr);
    return results_->report(sequence_);
  }

 private:
  detail::AnyDeviceResults& results() const {
    if (!results_) throw Error(Errc::invalid_argument, "this operation was never started");
    return *results_;
  }
  std::shared_ptr<detail::AnyDeviceResults> results_;
  std::uint64_t sequence_ = 0;
};

namespace detail {

/// An operation as far as its account needs it.
struct DeviceCall {
  Collective operation{};
  std::string_view algorithm;
  std::uint64_t fingerprint = 0, count = 0, bytes = 0;
  std::uint64_t sent = 0, received = 0;  // bytes
  int blocks = 0;
  State work{};  // what its time is, but for waiting
  bool captured = false;
};

template <device::Driver D>
class DeviceResults final : public AnyDeviceResults {
 public:
  /// close() comes before the driver goes.
  DeviceResults(D& driver, int n, Rank me, int blocks, const AccountSettings& settings) : driver_(&driver), n_(n), me_(me), blocks_(blocks), ledger_(n, me, D::name, Clock::host(), settings), watch_(n) {
    try {
      abort_memory_ = require(driver.allocate_host(64), 64);
      add_slots();
    } catch (...) {
      release();
      throw;
    }
  }
  ~DeviceResults() override { close(); }

  const Ledger& ledger() {
    harvest();
    return ledger_;
  }
  /// What a kernel is told of where its account goes. Waits where as many operations are in flight as there are places.
  void begin(const DeviceCall& call, typename D::Stream stream, device::RankView& view) {
    refuse_if_over();
    Slot& slot = free_slot(call.captured);
    slot.call = call;
    slot.sequence = ++sequence_;
    slot.asked = {};
    slot.stream = stream;
    slot.posted = Clock::host().now();
    slot.exposed = {};
    view.abort = reinterpret_cast<const std::uint32_t*>(abort_memory_);
    view.fingerprint = call.fingerprint;
    view.told = slot.told, view.told_late = slot.told_late, view.kept = slot.kept, view.late = slot.late;
  }
  std::uint64_t last() const { return sequence_; }
  /// What tells why a rank is gone, if anybody knows; until close().
  void set_reason(std::function<std::string()> reason) { reason_ = std::move(reason); }
  /// It was not launched after all.
  void withdraw() {
    if (Slot* const slot = find(sequence_)) slot->sequence = 0;
  }
  /// From any thread.
  void abort() {
    is_aborted_.store(true, std::memory_order_release);
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(abort_memory_)).store(1, std::memory_order_release);
  }
  /// Nothing of this rank's runs any more, but what was captured. What failed has ended, too: refuse_if_over() tells.
  void finish_all() {
    for (Slot& each : slots_)
      if (each.sequence != 0 && !each.call.captured) settle(each, nullptr);
  }
  /// All that is done is booked.
  void harvest() {
    for (Slot& each : slots_)
      if (each.sequence != 0 && (each.call.captured || is_done(each))) book(each);
  }
  void refuse_if_over() const {
    if (error_) throw *error_;
    if (is_aborted_.load(std::memory_order_acquire)) throw Error(Errc::aborted, {"rank ", me_, ": this device communicator was aborted here"}, {me_, me_, sequence_, {}});
    if (!driver_) throw Error(Errc::invalid_argument, "this device communicator is gone");
  }
  void close() {
    if (!driver_) return;
    finish_all();
    harvest();
    release();
    driver_ = nullptr;
    reason_ = nullptr;
  }

  bool finish(std::uint64_t sequence, const nanoseconds* at_most) override {
    if (Slot* const slot = sequence != 0 ? find(sequence) : nullptr) {
      if (slot->call.captured) throw Error(Errc::invalid_argument, {name_of(slot->call.operation), " was captured: it runs whenever its graph does. Wait for the stream that the graph was launched on"});
      return wait(*slot, at_most);
    }
    if (error_ && failed_ <= sequence) throw *error_;
    return true;
  }
  Report report(std::uint64_t sequence) override {
    const Report& kept = reports_[sequence % reports_.size()];
    if (kept.sequence != static_cast<std::uint32_t>(sequence)) throw Error(Errc::invalid_argument, {"the report of operation #", sequence, " is not kept any more: ", reports_.size(), " others were started after it"});
    return kept;
  }

 private:
  static constexpr std::size_t slots_at_once = 256;  // more of them are only needed by who captures more
  struct Slot {
    device::Told* told = nullptr;  // the host's and the device's
    std::uint64_t* told_late = nullptr;
    device::Kept* kept = nullptr;  // the device's
    std::uint64_t* late = nullptr;
    std::vector<device::Kept> known;  // of each block: what was booked
    std::vector<std::uint64_t> known_late;
    std::uint64_t sequence = 0;  // 0: not in use
    DeviceCall call;
    typename D::Stream stream{};
    Ticks posted = 0;
    nanoseconds exposed{};
    std::chrono::steady_clock::time_point asked{};  // when the driver was asked last what became of the stream
  };
  void release() {
    for (const auto& [host, device] : memory_) driver_->release_host(host), driver_->release_private(device);
    driver_->release_host(abort_memory_);
    memory_.clear(), slots_.clear();
    abort_memory_ = nullptr;
  }

  std::byte* require(std::byte* memory, std::size_t bytes) const {
    if (!memory) throw Error(Errc::no_resources, {"device communicator: rank ", me_, " cannot have ", bytes, " bytes more for accounts"});
    return memory;
  }
  void add_slots() {
    const auto blocks = static_cast<std::size_t>(blocks_), lates = 2 * static_cast<std::size_t>(n_);
    const std::size_t host_bytes = blocks * sizeof(device::Told) + 2 * lates * 8, device_bytes = blocks * sizeof(device::Kept) + lates * 8;
    std::byte* host = require(driver_->allocate_host(slots_at_once * host_bytes), slots_at_once * host_bytes);
    memory_.emplace_back(host, nullptr);
    std::byte* device = memory_.back().second = require(driver_->allocate_private(slots_at_once * device_bytes), slots_at_once * device_bytes);
    for (std::size_t i = 0; i < slots_at_once; ++i, host += host_bytes, device += device_bytes) {
      Slot& slot = slots_.emplace_back();
      slot.told = reinterpret_cast<device::Told*>(host);
      slot.told_late = reinterpret_cast<std::uint64_t*>(host + blocks * sizeof(device::Told));
      slot.kept = reinterpret_cast<device::Kept*>(device);
      slot.late = reinterpret_cast<std::uint64_t*>(device + blocks * sizeof(device::Kept));
      slot.known.resize(blocks);
      slot.known_late.resize(lates);
    }
  }
  /// In turns, so that the last ones can be told of for long. Those that were captured are for their graphs alone.
  Slot& free_slot(bool captured) {
    for (std::size_t looked = 0;; ++looked) {
      if (looked == slots_.size()) add_slots(), next_ = slots_.size() - slots_at_once;
      Slot& slot = slots_[next_++ % slots_.size()];
      if (slot.sequence != 0 && slot.call.captured) continue;
      if (slot.sequence != 0 && captured && !is_done(slot)) continue;  // who captures must not wait: what it waits for may be captured, too
      if (slot.sequence != 0) settle(slot, nullptr), refuse_if_over();
      return slot;
    }
  }
  Slot* find(std::uint64_t sequence) {
    for (Slot& each : slots_)
      if (each.sequence == sequence) return &each;
    return nullptr;
  }
  static std::uint32_t runs(const Slot& slot, int block) { return std::atomic_ref(slot.told[block].runs).load(std::memory_order_acquire); }
  static bool is_done(const Slot& slot) {
    for (int b = 0; b < slot.call.blocks; ++b)
      if (runs(slot, b) == slot.known[static_cast<std::size_t>(b)].runs) return false;
    return true;
  }
  bool wait(Slot& slot, const nanoseconds* at_most) {
    const std::uint64_t sequence = slot.sequence;
    if (!settle(slot, at_most)) return false;
    if (error_ && failed_ <= sequence) throw *error_;
    return true;
  }
  /// Until it is done and booked, or has failed; false if it is not after so long.
  bool settle(Slot& slot, const nanoseconds* at_most) {
    using Now = std::chrono::steady_clock;
    const auto begin = Now::now();
    for (std::uint64_t looks = 0; !is_done(slot); ++looks) {
      if (looks < 4096 && (!at_most || looks == 0)) {
        cpu_pause();
        if (!at_most) continue;
      }
      const auto now = Now::now();
      if (slot.asked == Now::time_point{}) slot.asked = now;
      if (now - slot.asked > std::chrono::milliseconds(20)) {
        slot.asked = now;
        if (const std::string problem = driver_->problem(slot.stream); !problem.empty() && !is_done(slot)) {
          const std::uint64_t sequence = std::exchange(slot.sequence, 0);
          remember({Errc::aborted, {"rank ", me_, " in ", describe(slot.call.fingerprint, slot.call.count), " #", sequence, ": ", problem}, {me_, me_, sequence, {}}}, sequence);
          return true;
        }
      }
      if (at_most && now - begin >= *at_most) return false;
      if (looks >= 4096) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    slot.exposed += Now::now() - begin;
    book(slot);
    return true;
  }
  /// The first failure ends all: no operation after it has a result.
  void remember(const Error& error, std::uint64_t sequence) {
    if (!error_ || sequence < failed_) error_.emplace(error), failed_ = sequence;
  }

  /// Since it was booked last: the runs that all blocks have ended.
  void book(Slot& slot) {
    std::uint32_t more = ~std::uint32_t{0};
    for (int b = 0; b < slot.call.blocks; ++b) more = std::min(more, runs(slot, b) - slot.known[static_cast<std::size_t>(b)].runs);
    if (more == 0) return;
    std::uint64_t longest = 0;
    for (int b = 0; b < slot.call.blocks; ++b) {
      device::Kept& known = slot.known[static_cast<std::size_t>(b)];
      const auto [record, now_runs] = read(slot, b);
      if (record.failure != device::Failure::none) judge(slot, record);
      longest = std::max(longest, record.totals.elapsed - known.totals.elapsed);
      known = {record.totals, slot.call.captured ? known.runs + more : now_runs};
    }
    account(slot, longest, more);
    if (!slot.call.captured) slot.sequence = 0;
  }
  /// A block's latest record, whole: a graph's next run may be writing the other one, and the one after that this one.
  std::pair<device::Record, std::uint32_t> read(const Slot& slot, int block) const {
    for (;;) {
      const std::uint32_t before = runs(slot, block);
      const device::Record record = copy_of(slot.told[block].records[before % 2]);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (runs(slot, block) == before) return {record, before};
    }
  }
  static device::Record copy_of(device::Record& shared) {
    std::uint64_t words[sizeof shared / sizeof(std::uint64_t)];
    for (std::size_t i = 0; i < std::size(words); ++i) words[i] = std::atomic_ref(reinterpret_cast<std::uint64_t*>(&shared)[i]).load(std::memory_order_relaxed);
    device::Record record;
    std::memcpy(static_cast<void*>(&record), words, sizeof record);
    return record;
  }
  /// Nanoseconds that each rank was waited for, likewise.
  std::vector<std::uint64_t> read_late(const Slot& slot) const {
    std::vector<std::uint64_t> late(slot.known_late.size());
    for (;;) {
      const std::uint32_t before = runs(slot, 0);
      for (std::size_t i = 0; i < late.size(); ++i) late[i] = std::atomic_ref(slot.told_late[before % 2 * late.size() + i]).load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
      if (runs(slot, 0) == before) return late;
    }
  }
  void account(Slot& slot, std::uint64_t elapsed, std::uint32_t more) {
    const Clock& clock = Clock::host();
    const auto ticks = [&](std::uint64_t ns) { return clock.to_ticks(nanoseconds(static_cast<std::int64_t>(ns))); };
    watch_.start(0);
    std::uint64_t idle = 0;
    const std::vector<std::uint64_t> late = read_late(slot);
    for (std::size_t i = 0; i < late.size(); ++i) {
      const std::uint64_t part = std::min(late[i] - slot.known_late[i], elapsed - idle);
      slot.known_late[i] = late[i];
      idle += part;
      const auto r = static_cast<Rank>(i);
      watch_.blame(r < n_ ? r : r - n_, r < n_ ? State::wait_arrival : State::wait_transfer, ticks(part));
    }
    watch_.book(slot.call.work, ticks(elapsed - idle));
    Report report = report_of(watch_, clock, read(slot, 0).first.last);
    report.exposed = std::min(slot.exposed, report.elapsed);
    report.bytes_sent = slot.call.sent * more, report.bytes_received = slot.call.received * more, report.bytes_wire = report.bytes_sent;
    report.ledger = ledger_.handle();
    report.sequence = static_cast<std::uint32_t>(slot.sequence);
    LedgerRow& row = ledger_.row(slot.call.operation, slot.call.bytes, slot.call.algorithm);
    ledger_.book({&row, slot.call.bytes * more, slot.sequence, slot.posted, &watch_}, report, clock);
    ledger_.settle();  // the stopwatch is used again
    row.calls += more - 1;
    report.algorithm = row.algorithm;
    if (!slot.call.captured) reports_[slot.sequence % reports_.size()] = report;
  }
  /// A kernel says that its operation failed, and why.
  void judge(const Slot& slot, const device::Record& record) {
    const device::Failure why = record.failure == device::Failure::broken ? record.cause : record.failure;
    const bool own = record.failure != device::Failure::broken;
    const std::string call = concat({"rank ", me_, " in ", describe(slot.call.fingerprint, slot.call.count), " #", slot.sequence});
    const std::string who = record.missing >= 0 ? concat({"rank ", record.missing}) : std::string("another rank");
    const ErrorContext context{me_, record.missing, slot.sequence, nanoseconds(static_cast<std::int64_t>(record.ended - record.entered))};
    if (why == device::Failure::mismatch && own) return remember({Errc::mismatch, {"operation #", slot.sequence, ": rank ", me_, " called ", describe(slot.call.fingerprint, slot.call.count), ", ", who, " called ", describe(record.theirs, slot.call.count)}, context}, slot.sequence);
    if (why == device::Failure::mismatch) return remember({Errc::mismatch, {call, ": ", who, " called something else, another rank says"}, context}, slot.sequence);
    if (why == device::Failure::aborted) return remember({Errc::aborted, {call, " was aborted ", own ? "here" : "by ", own ? "" : who}, context}, slot.sequence);
    if (why == device::Failure::lost) {
      const std::string reason = reason_ ? reason_() : "";
      return remember({Errc::peer_lost, {call, ": ", who, " is gone", reason.empty() ? "" : ": ", reason}, context}, slot.sequence);
    }
    remember({Errc::timeout, {call, own ? " waits for " : " ended: another rank waited in vain for ", who, own ? concat({" after ", time_text(context.elapsed)}) : std::string()}, context}, slot.sequence);
  }

  D* driver_;
  int n_;
  Rank me_;
  int blocks_;
  Ledger ledger_;
  Stopwatch watch_;
  std::byte* abort_memory_ = nullptr;
  std::vector<std::pair<std::byte*, std::byte*>> memory_;  // the host's and the device's
  std::deque<Slot> slots_;
  std::size_t next_ = 0;
  std::uint64_t sequence_ = 0, failed_ = 0;
  std::optional<Error> error_;
  std::function<std::string()> reason_;
  std::atomic<bool> is_aborted_{false};
  std::array<Report, 256> reports_{};
};

}  // namespace detail

}  // namespace tally::inline v0
