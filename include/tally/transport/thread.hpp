// SPDX-License-Identifier: Apache-2.0
// Slots in ordinary memory, for ranks that are threads of one process.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>

#include "slots.hpp"

namespace tally::inline v0 {

class ThreadMemory final : public SlotMemory {
 public:
  explicit ThreadMemory(const SlotLayout& layout) : SlotMemory(layout) {
    // Pages come zeroed, when they are first touched, and go when this does.
    void* base = ::mmap(nullptr, layout.bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw Error(Errc::no_resources, "no memory for " + std::to_string(layout.bytes()) + " bytes of slots: " + std::generic_category().message(errno));
    base_ = static_cast<std::byte*>(base);
  }
  ~ThreadMemory() override { ::munmap(base_, layout().bytes()); }

  std::string_view name() const override { return "thread"; }
  bool runs(Rank) override { return true; }  // a thread ends only by leaving

  std::uint64_t reserve() override {
    auto memory = std::make_shared<ThreadMemory>(layout());
    const std::lock_guard lock(mutex_);
    reserved_[++last_token_] = std::move(memory);
    return last_token_;
  }
  std::shared_ptr<SlotMemory> open(std::uint64_t token, Rank) override {
    const std::lock_guard lock(mutex_);
    return reserved_.at(token);
  }
  void release(std::uint64_t token) override {
    const std::lock_guard lock(mutex_);
    reserved_.erase(token);
  }

 private:
  // Owned here, so that a duplicate() that fails half-way leaks nothing and frees nothing under another's feet.
  std::mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<SlotMemory>> reserved_;
  std::uint64_t last_token_ = 0;
};

}  // namespace tally::inline v0
