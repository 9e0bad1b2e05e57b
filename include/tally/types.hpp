// SPDX-License-Identifier: Apache-2.0
// The vocabulary shared by all layers: operations, element types, and how an operation's arguments lie in memory.
#pragma once

#include <chrono>
#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>

#include "floats.hpp"
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

/// Elements as they are named to peers: kind and size, so `long` and `long long` are the same type. 6 bits; append only,
/// and stay below the 24 where users' types begin.
enum class ElementType : std::uint8_t { none, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64, f80, byte, bfloat16, float16, e4m3, e5m2, boolean, c64, c128 };
inline constexpr int first_user_type = 24, user_types = 40;

[[gnu::cold]] inline std::string name_of(ElementType type) {
  constexpr std::string_view names[] = {"none",    "int8",    "int16",       "int32", "int64",    "uint8",   "uint16",   "uint32",   "uint64", "float32",
                                        "float64", "long double", "byte", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "bool", "complex64", "complex128"};
  const int code = static_cast<int>(type);
  if (code >= first_user_type && code < first_user_type + user_types) return "user type #" + std::to_string(code - first_user_type);
  return std::string(code < std::ssize(names) ? names[code] : "unknown type");
}

template <class T>
concept Integer = std::is_integral_v<T> && !std::same_as<T, bool> && std::same_as<T, std::remove_cv_t<T>> && sizeof(T) <= 8;
template <class T>
concept Floating = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, long double> || Small<T>;
template <class T>
concept Complex = std::same_as<T, std::complex<float>> || std::same_as<T, std::complex<double>>;
/// Numbers that have an order.
template <class T>
concept Number = Integer<T> || Floating<T>;
/// What can be moved: numbers, std::byte, bool, and types of your own that are nothing but their bytes. Not pointers:
/// what they point at is not where they arrive.
template <class T>
concept Element = std::is_trivially_copyable_v<T> && !std::is_pointer_v<T> && std::same_as<T, std::remove_cv_t<T>> &&
                  (Number<T> || std::same_as<T, bool> || ((std::is_class_v<T> || std::is_enum_v<T>) && sizeof(T) <= 65535));

namespace detail {

/// FNV-1a: the same on every rank of a job.
constexpr std::uint64_t hash_text(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}
/// The mangled name tells lambdas of one function apart, which the readable one does not.
template <class T>
std::uint64_t hash_type() {
#if defined(__cpp_rtti)
  static const std::uint64_t hash = hash_text(typeid(T).name());
#else
  static constexpr std::uint64_t hash = hash_text(__PRETTY_FUNCTION__);
#endif
  return hash;
}

}  // namespace detail

template <Element T>
constexpr ElementType element_type() {
  constexpr int log2 = sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3;
  if constexpr (std::same_as<T, std::byte>) return ElementType::byte;
  else if constexpr (std::same_as<T, bool>) return ElementType::boolean;
  else if constexpr (std::same_as<T, float>) return ElementType::f32;
  else if constexpr (std::same_as<T, double>) return ElementType::f64;
  else if constexpr (std::same_as<T, long double>) return ElementType::f80;
  else if constexpr (std::same_as<T, std::complex<float>>) return ElementType::c64;
  else if constexpr (std::same_as<T, std::complex<double>>) return ElementType::c128;
  else if constexpr (Integer<T>) return static_cast<ElementType>(static_cast<int>(std::is_signed_v<T> ? ElementType::i8 : ElementType::u8) + log2);
  else if constexpr (Small<T>) {
    using Stored = typename detail::SmallTraits<T>::Stored;
    if constexpr (std::same_as<Stored, bf16>) return ElementType::bfloat16;
    else if constexpr (std::same_as<Stored, f16>) return ElementType::float16;
    else if constexpr (std::same_as<Stored, fp8_e4m3>) return ElementType::e4m3;
    else return ElementType::e5m2;
  } else return static_cast<ElementType>(first_user_type + static_cast<int>(detail::hash_type<T>() % user_types));
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
