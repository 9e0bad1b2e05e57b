// SPDX-License-Identifier: Apache-2.0
// A device that is not there: the threads of its blocks are threads of the host, so that ThreadSanitizer sees what the protocol forgets.
#pragma once

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include <tally/device/interpreter.hpp>
#include <tally/device/packets.hpp>
#include <tally/device/session.hpp>
#include <tally/device/share.hpp>

namespace test {

namespace device = tally::device;

/// What the threads of one block share besides what the protocol does.
struct EmulatedBlock {
  EmulatedBlock(int threads, bool may_falter, std::atomic<std::uint32_t>& looks_in_vain) : all(threads), falters(may_falter), pauses(looks_in_vain) {}
  device::BlockShared shared{};
  std::barrier<> all;
  std::atomic<int> said{0};
  const bool falters;
  std::atomic<std::uint32_t>& pauses;
};

class HostBlock {
 public:
  HostBlock(EmulatedBlock& state, int thread, int threads, int index, int blocks) : state_(state), thread_(thread), threads_(threads), index_(index), blocks_(blocks) { pauses() = &state.pauses; }
  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int index() const { return index_; }
  int blocks() const { return blocks_; }
  device::BlockShared& shared() { return state_.shared; }
  void sync() { state_.all.arrive_and_wait(), falter(); }
  bool any(bool one) {
    if (one) state_.said.fetch_add(1);
    state_.all.arrive_and_wait();
    const bool result = state_.said.load() > 0;
    state_.all.arrive_and_wait();
    if (thread_ == 0) state_.said.store(0);
    sync();
    return result;
  }
  static std::uint32_t load(const std::uint32_t* word) { return std::atomic_ref(*const_cast<std::uint32_t*>(word)).load(std::memory_order_acquire); }
  static void store(std::uint32_t* word, std::uint32_t value) { std::atomic_ref(*word).store(value, std::memory_order_release); }
  template <class T>
  static void note(T& word, T value) { std::atomic_ref(word).store(value, std::memory_order_relaxed); }
  template <class T>
  static T noted(const T& word) { return std::atomic_ref(const_cast<T&>(word)).load(std::memory_order_relaxed); }
  static device::Packet load_packet(const device::Packet* from) {
    const std::uint64_t low = std::atomic_ref(halves(from)[0]).load(std::memory_order_relaxed), high = std::atomic_ref(halves(from)[1]).load(std::memory_order_relaxed);
    device::Packet p;
    std::memcpy(&p.low, &low, 8), std::memcpy(&p.high, &high, 8);
    return p;
  }
  static void store_packet(device::Packet* to, const device::Packet& p) {
    std::uint64_t low = 0, high = 0;
    std::memcpy(&low, &p.low, 8), std::memcpy(&high, &p.high, 8);
    // In either order, and not at once.
    thread_local std::uint32_t stored = 0;
    const bool high_first = ++stored % 2 == 0;
    std::atomic_ref(halves(to)[high_first ? 1 : 0]).store(high_first ? high : low, std::memory_order_relaxed);
    if (stored % 5 < 2) std::this_thread::yield();
    std::atomic_ref(halves(to)[high_first ? 0 : 1]).store(high_first ? low : high, std::memory_order_relaxed);
  }
  static std::uint64_t now() { return static_cast<std::uint64_t>((std::chrono::steady_clock::now().time_since_epoch() + std::chrono::seconds(ahead().load())).count()); }
  /// All blocks' clocks; what was awaited for that long is overdue.
  static void advance_clock(int seconds) { ahead().fetch_add(seconds); }
  /// As on a device: who has waited for long leaves the processor to others, of which there may be many.
  static void pause(std::uint32_t polls) {
    pauses()->fetch_add(1);
    if (polls < 100) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

 private:
  /// Some threads of a block are now and then much slower than the others.
  void falter() {
    static std::atomic<std::uint32_t> times{0};
    if (state_.falters && times.fetch_add(1, std::memory_order_relaxed) * 2654435761u >> 27 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  static std::atomic<int>& ahead() {
    static std::atomic<int> seconds{0};
    return seconds;
  }
  static std::atomic<std::uint32_t>*& pauses() {
    thread_local std::atomic<std::uint32_t>* of_this_block = nullptr;
    return of_this_block;
  }
  static std::uint64_t* halves(const device::Packet* p) { return reinterpret_cast<std::uint64_t*>(const_cast<device::Packet*>(p)); }
  EmulatedBlock& state_;
  int thread_, threads_, index_, blocks_;
};
static_assert(device::Block<HostBlock>);

/// Ranks that share a device.
class EmulatedDevice {
 public:
  EmulatedDevice(int n, int blocks, int threads, std::size_t packets = 512, std::size_t frames = 2, std::size_t frame_bytes = 64)
      : n_(n), blocks_(blocks), threads_(threads), layout_{n, blocks, packets, frames, frame_bytes}, abort_(static_cast<std::size_t>(n), 0), pauses_(static_cast<std::size_t>(n * blocks)) {
    for (int r = 0; r < n; ++r) {
      memory_.emplace_back(layout_.bytes() / 128 + 1);
      windows_.push_back(memory_.back().data()->bytes);
      told_.emplace_back(static_cast<std::size_t>(blocks));
      kept_.emplace_back(static_cast<std::size_t>(blocks));
      late_.emplace_back(static_cast<std::size_t>(n) * 6);
    }
    for (int r = 0; r < n; ++r) {
      std::vector<std::byte*>& tables = tables_.emplace_back(windows_);
      for (int peer = 0; peer < n; ++peer) tables.push_back(windows_[at(peer)] + layout_.box(r));
      for (int peer = 0; peer < n; ++peer) tables.push_back(windows_[at(r)] + layout_.box(peer));
    }
  }
  int size() const { return n_; }
  int blocks() const { return blocks_; }
  const device::WindowLayout& layout() const { return layout_; }
  device::Epochs& epochs(int rank, int block) { return *reinterpret_cast<device::Epochs*>(windows_[at(rank)] + layout_.epochs(block)); }
  /// Of each block.
  std::vector<device::Record> records(int rank) const {
    std::vector<device::Record> all;
    for (const device::Told& each : told_[at(rank)]) all.push_back(each.records[each.runs % 2]);
    return all;
  }
  std::uint32_t runs(int rank) const { return told_[at(rank)][0].runs; }
  /// Nanoseconds that each rank was waited for, in all operations: until it came, and, n further on, after that.
  const std::uint64_t* late(int rank) const { return &late_[at(rank)][at(2 * n_) * (1 + runs(rank) % 2)]; }
  /// Returns when the blocks of all these ranks, of one thread each, wait for a rank that has not come, and for no other.
  void until_they_wait(const std::vector<int>& ranks) const {
    const auto until = [&](std::uint32_t more, const std::vector<std::uint32_t>& before) {
      for (const int r : ranks)
        for (std::size_t i = at(r * blocks_); i < at((r + 1) * blocks_); ++i)
          while (pauses_[i].load() - before[i] < more) std::this_thread::yield();
    };
    until(1, std::vector<std::uint32_t>(pauses_.size(), 0));  // who waits has said before that it is here
    std::vector<std::uint32_t> now;
    for (const auto& each : pauses_) now.push_back(each.load());
    until(2, now);  // between these two it has looked for all others, who were here by then
  }
  /// As if all had said so before.
  void set_flags(int rank, std::uint32_t number) {
    for (int b = 0; b < blocks_; ++b)
      for (int r = 0; r < n_; ++r) *reinterpret_cast<std::uint32_t*>(windows_[at(rank)] + layout_.flag(b, r)) = number;
  }
  void abort(int rank) { std::atomic_ref(abort_[at(rank)]).store(1, std::memory_order_release); }
  std::chrono::nanoseconds timeout = std::chrono::seconds(60);
  bool falters = false;
  std::function<std::uint64_t(int rank, int operation)> fingerprint;  // of what it calls

  /// kernel(block, view) by all threads of all blocks of these ranks; as `operations` launches on a stream of each rank's.
  template <class Kernel>
  void run(const Kernel& kernel, int operations = 1, std::function<void(int rank, int operation)> before = {}, std::vector<int> ranks = {}) {
    if (ranks.empty())
      for (int r = 0; r < n_; ++r) ranks.push_back(r);
    std::vector<std::thread> streams;
    for (const int rank : ranks)
      streams.emplace_back([&, rank] {
        for (int k = 0; k < operations; ++k) {
          if (before) before(rank, k);
          launch(rank, k, kernel);
        }
      });
    for (std::thread& s : streams) s.join();
  }

 private:
  struct alignas(128) Line {
    std::byte bytes[128]{};
  };
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  template <class Kernel>
  void launch(int rank, int operation, const Kernel& kernel) {
    device::RankView view{rank, n_, tables_[at(rank)].data(), layout_, &abort_[at(rank)], static_cast<std::uint64_t>(timeout.count())};
    view.kept = kept_[at(rank)].data(), view.told = told_[at(rank)].data();
    view.late = late_[at(rank)].data(), view.told_late = view.late + 2 * n_;
    if (fingerprint) view.fingerprint = fingerprint(rank, operation);
    std::vector<std::unique_ptr<EmulatedBlock>> states;
    for (int b = 0; b < blocks_; ++b) states.push_back(std::make_unique<EmulatedBlock>(threads_, falters, pauses_[at(rank * blocks_ + b)]));
    std::vector<std::thread> all;
    for (int b = 0; b < blocks_; ++b)
      for (int t = 0; t < threads_; ++t)
        all.emplace_back([&, b, t] {
          HostBlock block(*states[at(b)], t, threads_, b, blocks_);
          kernel(block, view, operation);
        });
    for (std::thread& t : all) t.join();
  }

  int n_, blocks_, threads_;
  device::WindowLayout layout_;
  std::vector<std::vector<Line>> memory_;
  std::vector<std::byte*> windows_;
  std::vector<std::vector<std::byte*>> tables_;  // of each rank: all windows, and boxes
  std::vector<std::vector<device::Told>> told_;
  std::vector<std::vector<device::Kept>> kept_;
  std::vector<std::vector<std::uint64_t>> late_;
  std::vector<std::uint32_t> abort_;
  std::vector<std::atomic<std::uint32_t>> pauses_;
};

}  // namespace test
