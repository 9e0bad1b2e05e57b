// SPDX-License-Identifier: Apache-2.0
// Slots in ordinary memory, for ranks that are threads of one process.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "slots.hpp"

namespace tally::inline v0 {

class ThreadMemory final : public SlotMemory {
 public:
  explicit ThreadMemory(const SlotLayout& layout, std::vector<Rank> origins = {}) : SlotMemory(layout, std::move(origins)) {
    slots_ = zeroed(layout.bytes(), "slots");
    base_ = slots_.get();
  }

  std::string_view name() const override { return "thread"; }
  bool runs(Rank) override { return true; }  // a thread ends only by leaving

  std::uint64_t reserve(std::span<const Rank> members) override {
    std::shared_ptr<SlotMemory> memory = std::make_shared<ThreadMemory>(layout_of(members), origins_of(members));  // as what it is taken out again
    const std::lock_guard lock(mutex_);
    reserved_.emplace(++last_token_, std::move(memory));
    return last_token_;
  }
  std::shared_ptr<SlotMemory> open(std::uint64_t token, std::span<const Rank>, Rank) override {
    const std::lock_guard lock(mutex_);
    return std::static_pointer_cast<SlotMemory>(reserved_.at(token));
  }
  void release(std::uint64_t token) override {
    const std::lock_guard lock(mutex_);
    reserved_.erase(token);
  }

  std::uint64_t reserve(std::size_t bytes) override {
    auto block = zeroed(bytes, "symmetric memory");
    const std::lock_guard lock(mutex_);
    reserved_.emplace(++last_token_, std::move(block));
    return last_token_;
  }
  std::shared_ptr<std::byte> map(std::uint64_t token, std::size_t) override {
    const std::lock_guard lock(mutex_);
    return std::static_pointer_cast<std::byte>(reserved_.at(token));
  }
  void discard(std::uint64_t, std::size_t) override {}  // it goes with its owners
  bool one_address_space() const override { return true; }

 private:
  /// Pages come zeroed, when they are first touched, and go with the last owner.
  static std::shared_ptr<std::byte> zeroed(std::size_t bytes, const char* what) {
    void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw Error(Errc::no_resources, {"no memory for ", bytes, " bytes of ", what, ": ", std::generic_category().message(errno)});
    ::madvise(base, bytes, MADV_HUGEPAGE);  // where it cannot be had, nothing is lost
    return {static_cast<std::byte*>(base), [bytes](std::byte* memory) { ::munmap(memory, bytes); }};
  }

  std::shared_ptr<std::byte> slots_;
  // Owned here, so that a duplicate() that fails half-way leaks nothing and frees nothing under another's feet.
  std::mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<void>> reserved_;  // slots and blocks
  std::uint64_t last_token_ = 0;
};

}  // namespace tally::inline v0
