// SPDX-License-Identifier: Apache-2.0
// Symmetric memory: an allocation of which every rank has a block that every rank of the host can load and store.
// Collectives on it copy nothing: each rank combines its share straight from all blocks and writes the result to
// where it belongs. Communicator::allocate makes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>

#include "error.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// One allocation as this rank sees it. The memory goes when the last rank has let go of it, in any order.
class SymmetricMemory {
 public:
  /// `memory` holds the ranks' blocks one after another, `stride` bytes apart. `id` is the same on all ranks; with 0 it
  /// cannot be named.
  SymmetricMemory(std::shared_ptr<std::byte> memory, std::size_t stride, int n, Rank me, std::uint64_t id) : memory_(std::move(memory)), stride_(stride), n_(n), me_(me), id_(id) {}

  int size() const { return n_; }
  std::byte* of(Rank r) const { return memory_.get() + static_cast<std::size_t>(r) * stride_; }

  /// How this rank names a place in its own block to the others. 0 names nothing.
  std::uint64_t name_of(const std::byte* place) const { return id_ << offset_bits | static_cast<std::uint64_t>(place - of(me_)); }
  /// The place that rank r named, if it names `bytes` bytes of its block of this allocation; else null.
  std::byte* find(Rank r, std::uint64_t name, std::size_t bytes) const {
    const std::size_t offset = name & ((std::uint64_t{1} << offset_bits) - 1);
    return id_ != 0 && name >> offset_bits == id_ && r >= 0 && r < n_ && offset <= stride_ && bytes <= stride_ - offset ? of(r) + offset : nullptr;
  }

  static constexpr int offset_bits = 40;
  static constexpr std::size_t most_bytes = std::size_t{1} << offset_bits;  // per rank

 private:
  std::shared_ptr<std::byte> memory_;
  std::size_t stride_;
  int n_;
  Rank me_;
  std::uint64_t id_;
};

/// A part of this rank's block, to be passed to collectives. Valid as long as its Symmetric.
template <Element T>
class SymmetricSpan : public std::ranges::view_base {
 public:
  SymmetricSpan() = default;
  SymmetricSpan(T* data, std::size_t size, const SymmetricMemory* memory) : data_(data), size_(size), memory_(memory) {}
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  const SymmetricMemory* symmetric_memory() const { return memory_; }
  /// Elements first..first+count-1; Errc::invalid_argument if there are none such.
  SymmetricSpan subspan(std::size_t first, std::size_t count) const {
    if (first > size_ || count > size_ - first)
      throw Error(Errc::invalid_argument, {"subspan: elements ", first, " to ", first + count, " of ", size_});
    return {data_ + first, count, memory_};
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
  const SymmetricMemory* memory_ = nullptr;
};

/// Owns this rank's part of an allocation. Movable; freed when all ranks have destroyed theirs, in any order.
template <Element T>
class Symmetric {
 public:
  Symmetric() = default;
  Symmetric(std::unique_ptr<SymmetricMemory> memory, std::size_t size, Rank me) : memory_(std::move(memory)), size_(size), me_(me) {}

  T* data() const { return memory_ ? reinterpret_cast<T*>(memory_->of(me_)) : nullptr; }
  std::size_t size() const { return memory_ ? size_ : 0; }
  T* begin() const { return data(); }
  T* end() const { return data() + size(); }
  T& operator[](std::size_t i) const { return data()[i]; }
  SymmetricSpan<T> span() const { return {data(), size(), memory_.get()}; }
  operator SymmetricSpan<T>() const { return span(); }
  SymmetricSpan<T> subspan(std::size_t first, std::size_t count) const { return span().subspan(first, count); }
  const SymmetricMemory* symmetric_memory() const { return memory_.get(); }
  /// Rank r's block. What it holds is the ranks' own business outside of collectives: a barrier orders accesses.
  std::span<T> of(Rank r) const {
    if (!memory_ || r < 0 || r >= memory_->size()) throw Error(Errc::invalid_argument, {"of: ", r, " is not a rank of this allocation"});
    return {reinterpret_cast<T*>(memory_->of(r)), size_};
  }

 private:
  std::unique_ptr<SymmetricMemory> memory_;
  std::size_t size_ = 0;
  Rank me_ = 0;
};

template <class R>
concept SymmetricElements = requires(const std::remove_cvref_t<R>& range) { { range.symmetric_memory() } -> std::same_as<const SymmetricMemory*>; };

}  // namespace tally::inline v0

template <class T>
inline constexpr bool std::ranges::enable_borrowed_range<tally::SymmetricSpan<T>> = true;
