// SPDX-License-Identifier: Apache-2.0
// Slots in ordinary memory, for ranks that are threads of one process.
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "slots.hpp"

namespace tally::inline v0 {

class ThreadMemory final : public SlotMemory {
 public:
  explicit ThreadMemory(const SlotLayout& layout) : SlotMemory(layout) {
    const std::size_t bytes = layout.bytes();
    base_ = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{4096}, std::nothrow));
    if (!base_) throw Error(Errc::no_resources, "no memory for " + std::to_string(bytes) + " bytes of slots");
    std::memset(base_, 0, bytes);
  }
  ~ThreadMemory() override { ::operator delete(base_, std::align_val_t{4096}); }

  std::string_view name() const override { return "thread"; }
  bool runs(Rank) override { return true; }  // a thread ends only by leaving

  std::uint64_t reserve() override {
    auto memory = std::make_unique<std::shared_ptr<SlotMemory>>(std::make_shared<ThreadMemory>(layout()));
    return reinterpret_cast<std::uint64_t>(memory.release());
  }
  std::shared_ptr<SlotMemory> open(std::uint64_t token, Rank) override { return *reinterpret_cast<std::shared_ptr<SlotMemory>*>(token); }
  void release(std::uint64_t token) override { delete reinterpret_cast<std::shared_ptr<SlotMemory>*>(token); }
};

}  // namespace tally::inline v0
