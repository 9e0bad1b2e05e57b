// SPDX-License-Identifier: Apache-2.0
// Memory that is registered with an RDMA device, and stays so for the next time, since registering costs more than sending: until it is
// gone, or others need the room. What cannot be watched is registered anew each time.
#pragma once

#include <infiniband/verbs.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <utility>

#include "memory_watch.hpp"

namespace tally::inline v0::detail {

/// Of one protection domain; for one thread.
class Registrations {
 public:
  struct Region {
    ibv_mr* mr = nullptr;
    MemoryWatch::Range pages;
    bool is_writable = false;
    std::uint64_t used = 0;

    ~Region() {
      if (mr) ::ibv_dereg_mr(mr);
    }
  };
  using Handle = std::shared_ptr<Region>;

  /// `most_bytes`: that stay registered without being used.
  explicit Registrations(ibv_pd* domain, std::size_t most_bytes = std::size_t{1} << 30) : domain_(domain), most_bytes_(most_bytes) {}

  /// It is registered for as long as somebody keeps the handle, at least. Null: it cannot be (errno).
  Handle get(const void* at, std::size_t bytes, bool is_written) {
    const MemoryWatch::Range pages = MemoryWatch::pages_of(at, bytes);
    if (!watch_) return made(pages, is_written);
    auto found = find(pages, is_written);
    if (found != known_.end()) {
      watch_->take(listener_, [this](MemoryWatch::Range gone) { forget(gone); });
      found = find(pages, is_written);
    }
    if (found != known_.end()) {
      ++found_;
      found->second->used = ++clock_;
      return found->second;
    }
    // Watched first: what goes while it is being registered is told.
    const bool is_watched = watch_->watch(pages);
    Handle region = made(pages, is_written);
    if (!region && !known_.empty()) {
      forget({0, UINTPTR_MAX});
      region = made(pages, is_written);
    }
    if (!region || !is_watched) return region;
    region->used = ++clock_;
    bytes_ += pages.end - pages.begin;
    while (bytes_ > most_bytes_ && !known_.empty()) erase(std::ranges::min_element(known_, {}, [](const auto& each) { return each.second->used; }));
    const auto same = known_.find(pages.begin);
    if (same != known_.end()) erase(same);
    known_.emplace(pages.begin, region);
    return region;
  }
  /// Registered by get(), and found there.
  std::uint64_t made() const { return made_; }
  std::uint64_t found() const { return found_; }

 private:
  using Known = std::map<std::uintptr_t, Handle>;  // by their first page

  Known::iterator find(MemoryWatch::Range pages, bool is_written) {
    auto after = known_.upper_bound(pages.begin);
    if (after == known_.begin()) return known_.end();
    const auto found = std::prev(after);
    return found->second->pages.end >= pages.end && (found->second->is_writable || !is_written) ? found : known_.end();
  }
  void erase(Known::iterator at) {
    bytes_ -= at->second->pages.end - at->second->pages.begin;
    known_.erase(at);
  }
  void forget(MemoryWatch::Range gone) {
    for (auto at = known_.begin(); at != known_.end();) {
      const auto next = std::next(at);
      if (at->second->pages.begin < gone.end && gone.begin < at->second->pages.end) erase(at);
      at = next;
    }
  }
  Handle made(MemoryWatch::Range pages, bool is_written) {
    auto region = std::make_shared<Region>();
    region->pages = pages;
    void* const at = reinterpret_cast<void*>(pages.begin);
    const std::size_t bytes = pages.end - pages.begin;
    region->mr = ::ibv_reg_mr(domain_, at, bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    region->is_writable = region->mr != nullptr;
    if (!region->mr && !is_written) region->mr = ::ibv_reg_mr(domain_, at, bytes, 0);  // a constant
    if (!region->mr) return nullptr;
    ++made_;
    return region;
  }

  ibv_pd* domain_;
  std::size_t most_bytes_, bytes_ = 0;
  MemoryWatch* watch_ = MemoryWatch::get();
  MemoryWatch::Listener listener_{watch_};
  Known known_;
  std::uint64_t clock_ = 0, made_ = 0, found_ = 0;
};

}  // namespace tally::inline v0::detail
