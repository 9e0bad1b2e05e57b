// SPDX-License-Identifier: Apache-2.0
// The vocabulary shared by all layers: operations, element types, and how an operation's arguments lie in memory.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "steps.hpp"

namespace tally::inline v0 {

using nanoseconds = std::chrono::nanoseconds;
/// Longer deadlines are cut to this (30 years), so that adding one to a point in time cannot overflow.
inline constexpr nanoseconds longest_timeout = std::chrono::seconds(1'000'000'000);

enum class Collective : std::uint8_t { none, all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier };
inline constexpr Collective all_operations[] = {Collective::all_reduce,     Collective::reduce, Collective::broadcast, Collective::all_gather,
                                               Collective::reduce_scatter, Collective::barrier};

constexpr std::string_view name_of(Collective operation) {
  switch (operation) {
    case Collective::none: return "nothing";
    case Collective::all_reduce: return "all_reduce";
    case Collective::reduce: return "reduce";
    case Collective::broadcast: return "broadcast";
    case Collective::all_gather: return "all_gather";
    case Collective::reduce_scatter: return "reduce_scatter";
    case Collective::barrier: return "barrier";
  }
  return "unknown operation";
}
constexpr bool reduces(Collective operation) {
  return operation == Collective::all_reduce || operation == Collective::reduce || operation == Collective::reduce_scatter;
}
constexpr bool has_root(Collective operation) { return operation == Collective::reduce || operation == Collective::broadcast; }

/// Elements as they are named to peers: kind and size, so `long` and `long long` are the same type.
enum class ElementType : std::uint8_t { none, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64, f80, byte };

constexpr std::string_view name_of(ElementType type) {
  constexpr std::string_view names[] = {"none",   "int8",   "int16",  "int32",   "int64",   "uint8",      "uint16",
                                        "uint32", "uint64", "float32", "float64", "long double", "byte"};
  return static_cast<std::size_t>(type) < std::size(names) ? names[static_cast<std::size_t>(type)] : "unknown type";
}

/// Numbers that can be reduced: all standard integers and floating-point types.
template <class T>
concept Number = std::is_arithmetic_v<T> && !std::same_as<T, bool> && std::same_as<T, std::remove_cv_t<T>> && sizeof(T) <= sizeof(long double) &&
                 (std::is_floating_point_v<T> ? std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, long double> : sizeof(T) <= 8);
/// What can be moved: numbers and bytes.
template <class T>
concept Element = Number<T> || std::same_as<T, std::byte>;

template <Element T>
constexpr ElementType element_type() {
  constexpr int log2 = sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;
  if constexpr (std::same_as<T, std::byte>) return ElementType::byte;
  else if constexpr (std::same_as<T, float>) return ElementType::f32;
  else if constexpr (std::same_as<T, double>) return ElementType::f64;
  else if constexpr (std::same_as<T, long double>) return ElementType::f80;
  else return static_cast<ElementType>(static_cast<int>(std::is_signed_v<T> ? ElementType::i8 : ElementType::u8) + log2);
}

/// Whether input and output are the same memory, and if so where each begins in it (in elements).
struct Placement {
  bool shared = false;
  std::size_t input_first = 0, output_first = 0;
  friend bool operator==(const Placement&, const Placement&) = default;
};

/// One rank's arguments of one operation, as far as they matter for what moves where.
/// `count` is the caller's block: elements per rank for all_gather and reduce_scatter, all elements elsewhere.
struct Layout {
  Collective operation{};
  Rank me = 0;
  int n = 1;
  Rank root = 0;
  std::size_t count = 0;
  bool in_place = false;
  int group = 1;  // see Shape

  std::size_t blocks(Collective many) const { return operation == many ? static_cast<std::size_t>(n) : 1; }
  std::size_t input_count() const { return operation == Collective::broadcast ? 0 : count * blocks(Collective::reduce_scatter); }
  std::size_t output_count() const {
    if (operation == Collective::reduce && me != root) return 0;
    return count * blocks(Collective::all_gather);
  }
  /// Elements of the larger of input and output: the size that algorithms are chosen and accounts kept by.
  std::size_t items() const { return items(operation, count, n); }
  static constexpr std::size_t items(Collective operation, std::size_t count, int n) { return count * (operation == Collective::all_gather || operation == Collective::reduce_scatter ? static_cast<std::size_t>(n) : 1); }
  /// In place, the smaller of input and output is this rank's block of the larger one.
  Placement placement() const {
    const std::size_t mine = static_cast<std::size_t>(me) * count;
    return {in_place, in_place && operation == Collective::all_gather ? mine : 0,
            in_place && operation == Collective::reduce_scatter ? mine : 0};
  }
  Shape shape() const { return {me, n, root, Chunks(Buffer::input, input_count(), n), Chunks(Buffer::output, output_count(), n), group}; }
  friend bool operator==(const Layout&, const Layout&) = default;
};

}  // namespace tally::inline v0
