// SPDX-License-Identifier: Apache-2.0
// Memory on the ranks' devices that all of them can get at: how each rank learns where the others' is, whether they live in its process or
// not, and when it may go; and in its place a relay, for ranks on other hosts. What goes wrong on one rank goes wrong on all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../communicator.hpp"
#include "../device/driver.hpp"
#include "../device/window.hpp"
#include "../transport/slots.hpp"
#include "relay.hpp"

namespace tally::inline v0::detail {

/// As much on each rank's device; where each rank's is, as this one sees it. Null: it is on another host.
struct SharedBlock {
  std::vector<std::byte*> memory;
  std::vector<device::Handle> handles;
  std::size_t bytes = 0;
  bool released = false;  // by this rank
};

template <device::Driver D>
class SharedMemory {
 public:
  static constexpr std::size_t most_segments = 64;

  /// `link`: between the hosts of these ranks, and nobody else's.
  SharedMemory(Communicator& link, D& driver) : link_(link), driver_(driver) {}
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { close(); }

  /// All ranks live in one process and share a device, so any memory of theirs is known by its address, and within reach.
  bool one_address_space() const { return one_address_space_; }
  /// All are on one host.
  bool within_reach() const { return far_.empty(); }
  /// All kernels are to give up (device::Broken). By any thread.
  void tell_all(std::uint32_t broken) {
    for (const Rank r : far_) relay_->tell(r, broken);
    tell_near(broken);
  }
  /// What the relay failed with, if it did.
  std::string problem() const {
    const std::lock_guard lock(problem_mutex_);
    return problem_;
  }
  /// A kernel of this rank's was launched.
  void launched() {
    if (relay_) relay_->wake();
  }
  /// A byte of this rank's device.
  std::byte* token() const { return tables_; }
  /// For kernels.
  std::byte* const* windows() const { return reinterpret_cast<std::byte* const*>(tables_ + token_bytes); }
  const std::uint64_t* segments() const { return reinterpret_cast<const std::uint64_t*>(tables_ + segments_at()); }
  std::uint32_t segment_count() const { return static_cast<std::uint32_t>(segments_.size()); }

  /// Collective, first of all. `far`: the ranks that are on other hosts.
  void open_window(const device::WindowLayout& layout, std::vector<Rank> far) {
    far_ = std::move(far);
    window_ = exchange(layout.bytes(), "its window");
    const std::size_t table = segments_at() + most_segments * ranks() * sizeof(std::uint64_t), boxes = far_.size() * DeviceRelay::bytes_each(layout);
    attempt_together("its tables", [&] {
      tables_ = need(driver_.allocate_private(table), table);
      if (boxes > 0 && !(boxes_ = driver_.allocate_host(boxes))) throw Error(Errc::no_resources, {"rank ", link_.rank(), "'s host has no ", boxes, " bytes that its device can reach"});
    });
    if (!within_reach()) {  // which nobody is, then
      Erasure<SlotTransport>::enable();
      std::unique_ptr<SymmetricMemory> none;
      auto transport = link_.open_transport("device relay", 0, none);
      relay_ = std::make_unique<DeviceRelay>(std::move(transport), layout, far_, boxes_, [this](std::uint32_t broken, const std::string& why) {
        {
          const std::lock_guard lock(problem_mutex_);
          problem_ = why;
        }
        tell_near(broken);
      });
    }
    std::vector<std::byte*> to, from, all;
    for (Rank r = 0; r < link_.size(); ++r) {
      std::byte* const theirs = window_.memory[static_cast<std::size_t>(r)];
      all.push_back(theirs ? theirs : relay_->window(r));
      to.push_back(theirs ? theirs + layout.box(link_.rank()) : relay_->box_to(r));
      from.push_back(theirs ? window_.memory[mine()] + layout.box(r) : relay_->box_from(r));
    }
    all.insert(all.end(), to.begin(), to.end());
    all.insert(all.end(), from.begin(), from.end());
    attempt_together("its tables", [&] {
      driver_.upload(tables_ + token_bytes, all.data(), all.size() * sizeof(std::byte*));
      if (relay_) relay_->start([this] { driver_.attach(); });
    });
    link_.barrier();
  }
  /// Collective. `idle()` returns when nothing of this rank's runs.
  template <class Idle>
  std::byte* allocate(std::size_t bytes, Idle&& idle) {
    reclaim(idle);
    auto free = std::ranges::find_if(segments_, [](const SharedBlock& each) { return each.memory.empty(); });
    if (free == segments_.end() && segments_.size() == most_segments) throw Error(Errc::no_resources, {"allocate: a device communicator has at most ", most_segments, " allocations at a time"});
    SharedBlock made = exchange(std::max<std::size_t>((bytes + 255) / 256 * 256, 256), "allocate");
    if (free == segments_.end()) free = segments_.emplace(free);
    *free = std::move(made);
    std::vector<std::uint64_t> addresses;
    for (const std::byte* each : free->memory) addresses.push_back(reinterpret_cast<std::uintptr_t>(each));
    const auto index = static_cast<std::size_t>(free - segments_.begin());
    driver_.upload(tables_ + segments_at() + index * ranks() * sizeof(std::uint64_t), addresses.data(), addresses.size() * sizeof(std::uint64_t));
    link_.barrier();
    return free->memory[mine()];
  }
  /// It goes when all ranks have released theirs: with the next allocation, or with the communicator.
  void release(const std::byte* memory) {
    for (SharedBlock& each : segments_)
      if (!each.memory.empty() && each.memory[mine()] == memory) each.released = true;
  }
  /// How a place of this rank's is named to the others; false if they cannot get at it.
  bool name(const void* data, std::size_t bytes, device::Place& place) const {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    place = {};
    if (bytes == 0) return true;
    if (one_address_space_) return place.offset = address, true;
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      if (segments_[i].memory.empty()) continue;
      const auto begin = reinterpret_cast<std::uintptr_t>(segments_[i].memory[mine()]);
      if (address < begin || address - begin > segments_[i].bytes || bytes > segments_[i].bytes - (address - begin)) continue;
      place = {address - begin, static_cast<std::uint32_t>(i + 1)};
      return true;
    }
    return false;
  }
  /// When nothing of this rank's runs. Waits for the others, for ten seconds at most: their kernels may be at work in this rank's memory. If
  /// they do not come it stays until the process ends.
  void close() noexcept {
    if (std::exchange(is_closed_, true)) return;
    try {
      if (relay_) relay_->expect_to_close();
      link_.set_timeout(std::chrono::seconds(10));
      link_.barrier();
      relay_.reset();
      if (tables_) driver_.release_private(tables_);
      for (const SharedBlock& each : segments_) close(each);
      close(window_);
      link_.barrier();
      for (const SharedBlock& each : segments_)
        if (!each.memory.empty()) driver_.release(each.memory[mine()]);
      if (!window_.memory.empty()) driver_.release(window_.memory[mine()]);
      driver_.release_host(std::exchange(boxes_, nullptr));
    } catch (...) {
      relay_.reset();
    }
  }

 private:
  static constexpr std::size_t token_bytes = 128;
  std::size_t ranks() const { return static_cast<std::size_t>(link_.size()); }
  std::size_t segments_at() const { return token_bytes + 3 * ranks() * sizeof(std::byte*); }
  bool is_far(std::size_t r) const { return std::ranges::count(far_, static_cast<Rank>(r)) > 0; }
  void tell_near(std::uint32_t broken) {
    for (std::byte* const window : window_.memory) {
      if (!window) continue;
      try {
        driver_.post(window, broken);
      } catch (const Error&) {  // that device is beyond being told, which its own rank finds out
      }
    }
  }
  std::size_t mine() const { return static_cast<std::size_t>(link_.rank()); }
  void close(const SharedBlock& block) {
    for (std::size_t r = 0; r < block.memory.size(); ++r)
      if (r != mine() && block.memory[r]) driver_.close(block.handles[r], block.memory[r]);
  }
  std::byte* need(std::byte* memory, std::size_t bytes) const {
    if (!memory) throw Error(Errc::no_resources, {"rank ", link_.rank(), "'s device has no ", bytes, " bytes left"});
    return memory;
  }

 public:
  /// Collective: f() on each rank, and an error on all ranks if it throws on one.
  template <class F>
  void attempt_together(const char* what, F&& f) {
    std::string problem;
    try {
      f();
    } catch (const Error& error) {
      problem = error.text();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    std::vector<char> fine(ranks());
    const char mine = problem.empty() ? 1 : 0;
    link_.all_gather(std::span(&mine, 1), fine);
    const auto first = std::ranges::find(fine, 0);
    if (first == fine.end()) return;
    const auto rank = static_cast<Rank>(first - fine.begin());
    if (problem.empty()) problem = concat({"rank ", rank, " could not"});
    throw Error(Errc::no_resources, {"device communicator, ", what, ": ", problem}, {link_.rank(), rank, 0, {}});
  }

 private:
  SharedBlock exchange(std::size_t bytes, const char* what) {
    SharedBlock block;
    block.bytes = bytes;
    block.memory.resize(ranks());
    block.handles.resize(ranks());
    std::vector<std::size_t> sizes(ranks());
    link_.all_gather(std::span(&bytes, 1), sizes);
    for (std::size_t r = 0; r < ranks(); ++r)
      if (sizes[r] != sizes[0]) throw Error(Errc::mismatch, {"device communicator, ", what, ": rank 0 asks for ", sizes[0], " bytes, rank ", r, " for ", sizes[r]}, {link_.rank(), static_cast<Rank>(r), 0, {}});
    std::byte* own = nullptr;
    try {
      device::Handle handle;
      attempt_together(what, [&] {
        own = need(driver_.allocate(bytes), bytes);
        handle = driver_.handle_of(own, bytes);
      });
      link_.all_gather(std::as_bytes(std::span(&handle, 1)), std::as_writable_bytes(std::span(block.handles)));
      attempt_together(what, [&] {
        for (std::size_t r = 0; r < ranks(); ++r) block.memory[r] = r == mine() ? own : is_far(r) ? nullptr : driver_.open(block.handles[r]);
      });
    } catch (...) {
      close(block);
      link_.barrier();
      if (own) driver_.release(own);
      throw;
    }
    const device::Handle& first = block.handles[0];
    one_address_space_ = within_reach() && std::ranges::all_of(block.handles, [&](const device::Handle& each) { return each.process == first.process && each.device == first.device; });
    return block;
  }
  /// Collective: what all ranks have let go of.
  template <class Idle>
  void reclaim(Idle&& idle) {
    std::uint64_t released = 0;
    for (std::size_t i = 0; i < segments_.size(); ++i)
      if (segments_[i].released) released |= std::uint64_t{1} << i;
    link_.all_reduce(std::span(&released, 1), band);
    if (released == 0) return;
    idle();
    link_.barrier();
    const auto each_released = [&](auto&& f) {
      for (std::size_t i = 0; i < segments_.size(); ++i)
        if (released >> i & 1) f(segments_[i]);
    };
    each_released([&](SharedBlock& block) { close(block); });
    link_.barrier();
    each_released([&](SharedBlock& block) {
      driver_.release(block.memory[mine()]);
      block = {};
    });
  }

  Communicator& link_;
  D& driver_;
  SharedBlock window_;
  std::byte* tables_ = nullptr;  // on the device: a token, all windows and boxes, then all segments
  std::byte* boxes_ = nullptr;   // the host's
  std::vector<Rank> far_;
  mutable std::mutex problem_mutex_;
  std::string problem_;
  std::unique_ptr<DeviceRelay> relay_;
  std::vector<SharedBlock> segments_;
  bool one_address_space_ = false, is_closed_ = false;
};

}  // namespace tally::inline v0::detail
