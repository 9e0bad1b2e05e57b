// SPDX-License-Identifier: Apache-2.0
// The vocabulary shared by all layers: operations, element types, and how an operation's arguments lie in memory.
#pragma once

#include <algorithm>
#include <chrono>
#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
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

/// What a rank can be in. The place in this list is its code on the wire: append only.
enum class Collective : std::uint8_t {
  none, all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan, exclusive_scan,
  all_gather_v, reduce_scatter_v, all_to_all_v, gather_v, scatter_v, neighbour_exchange, send, receive, send_receive,
  push, pull, push_pull, leave, serve
};
inline constexpr Collective last_operation = Collective::serve;
/// What one rank calls by itself: messages, and what a table's workers and servers do.
constexpr bool is_one_sided(Collective operation) { return operation >= Collective::send; }
/// Those that are done by algorithms: each but none and messages.
inline constexpr Collective all_operations[] = {
    Collective::all_reduce, Collective::reduce, Collective::broadcast, Collective::all_gather, Collective::reduce_scatter, Collective::barrier,
    Collective::gather, Collective::scatter, Collective::all_to_all, Collective::scan, Collective::exclusive_scan,
    Collective::all_gather_v, Collective::reduce_scatter_v, Collective::all_to_all_v, Collective::gather_v, Collective::scatter_v, Collective::neighbour_exchange};

constexpr std::string_view name_of(Collective operation) {
  constexpr std::string_view names[] = {"nothing", "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "barrier", "gather", "scatter", "all_to_all", "scan", "exclusive_scan",
                                        "all_gather_v", "reduce_scatter_v", "all_to_all_v", "gather_v", "scatter_v", "neighbour_exchange", "send", "receive", "send_receive", "push", "pull", "push_pull", "leave", "serve"};
  return static_cast<std::size_t>(operation) < std::size(names) ? names[static_cast<std::size_t>(operation)] : "unknown operation";
}
/// The operation with blocks of one size that a v-variant is like; others are like themselves.
constexpr Collective uniform(Collective operation) {
  switch (operation) {
    case Collective::all_gather_v: return Collective::all_gather;
    case Collective::reduce_scatter_v: return Collective::reduce_scatter;
    case Collective::all_to_all_v: return Collective::all_to_all;
    case Collective::gather_v: return Collective::gather;
    case Collective::scatter_v: return Collective::scatter;
    default: return operation;
  }
}
/// Every rank need not know how much the others move: only the two ends of a message agree on its length.
constexpr bool sizes_differ(Collective operation) { return uniform(operation) != operation || operation == Collective::neighbour_exchange; }
constexpr bool reduces(Collective operation) {
  const Collective like = uniform(operation);
  return like == Collective::all_reduce || like == Collective::reduce || like == Collective::reduce_scatter || like == Collective::scan || like == Collective::exclusive_scan;
}
constexpr bool has_root(Collective operation) {
  const Collective like = uniform(operation);
  return like == Collective::reduce || like == Collective::broadcast || like == Collective::gather || like == Collective::scatter;
}

/// Elements as they are named to peers: kind and size, so `long` and `long long` are the same type. 6 bits; append only,
/// and stay below the 24 where users' types begin. `membership` is what ranks tell each other to make communicators or memory.
enum class ElementType : std::uint8_t { none, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64, f80, byte, bfloat16, float16, e4m3, e5m2, boolean, c64, c128, membership };
inline constexpr int first_user_type = 24, user_types = 40;

[[gnu::cold]] inline std::string name_of(ElementType type) {
  constexpr std::string_view names[] = {"none",    "int8",    "int16",       "int32", "int64",    "uint8",   "uint16",   "uint32",   "uint64", "float32",
                                        "float64", "long double", "byte", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "bool", "complex64", "complex128", "membership"};
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

/// Blocks of unequal sizes, or with gaps between them, and the ranks they are for: what v-variants and neighbour exchanges
/// are given beside their buffers. In elements.
struct Extents {
  std::span<const std::size_t> in_counts, in_firsts, out_counts, out_firsts;  // without firsts one after another
  std::span<const Rank> to, from;  // neighbour exchange: block i of the input goes to to[i], block i of the output comes from from[i]

  friend bool operator==(const Extents& a, const Extents& b) {
    return std::ranges::equal(a.in_counts, b.in_counts) && std::ranges::equal(a.in_firsts, b.in_firsts) && std::ranges::equal(a.out_counts, b.out_counts) &&
           std::ranges::equal(a.out_firsts, b.out_firsts) && std::ranges::equal(a.to, b.to) && std::ranges::equal(a.from, b.from);
  }
};

/// One rank's arguments of one operation, as far as they matter for what moves where.
/// `count` is a block where each rank has its own (all_gather and gather: of the input, reduce_scatter and scatter: of the
/// output, all_to_all: of both; likewise in v-variants, and neighbour exchanges have blocks of that size), else all elements.
struct Layout {
  Collective operation{};
  Rank me = 0;
  int n = 1;
  Rank root = 0;
  std::size_t count = 0;
  bool in_place = false;
  Grouping group = {};
  const Extents* extents = nullptr;  // v-variants and neighbour exchanges; whoever keeps a layout keeps them, too

  std::size_t input_count() const {
    switch (operation) {
      case Collective::broadcast: return 0;
      case Collective::scatter: return me == root ? count * ranks() : 0;
      case Collective::reduce_scatter:
      case Collective::all_to_all: return count * ranks();
      case Collective::scatter_v: return me == root ? ins().count() : 0;
      case Collective::reduce_scatter_v:
      case Collective::all_to_all_v: return ins().count();
      case Collective::neighbour_exchange: return count * extents->to.size();
      default: return count;
    }
  }
  std::size_t output_count() const {
    switch (operation) {
      case Collective::reduce: return me == root ? count : 0;
      case Collective::gather: return me == root ? count * ranks() : 0;
      case Collective::exclusive_scan: return me == 0 ? 0 : count;
      case Collective::all_gather:
      case Collective::all_to_all: return count * ranks();
      case Collective::gather_v: return me == root ? outs().count() : 0;
      case Collective::all_gather_v:
      case Collective::all_to_all_v: return outs().count();
      case Collective::neighbour_exchange: return count * extents->from.size();
      default: return count;
    }
  }
  /// Elements of the larger side, on the root where there is one: the size that algorithms are chosen and accounts kept by. Of
  /// gather_v, scatter_v, all_to_all_v and neighbour exchanges not every rank can know it, so it is what this rank has.
  std::size_t items() const {
    switch (operation) {
      case Collective::all_gather:
      case Collective::reduce_scatter:
      case Collective::gather:
      case Collective::scatter:
      case Collective::all_to_all: return count * ranks();
      default: return sizes_differ(operation) ? std::max(input_count(), output_count()) : count;
    }
  }
  /// In place, the smaller of input and output is this rank's block of the larger one.
  Placement placement() const {
    if (!in_place) return {};
    const auto mine = static_cast<std::size_t>(me);
    switch (operation) {
      case Collective::all_gather:
      case Collective::gather: return {true, mine * count, 0};
      case Collective::reduce_scatter:
      case Collective::scatter: return {true, 0, mine * count};
      case Collective::all_gather_v:
      case Collective::gather_v: return {true, outs()[me].first, 0};
      case Collective::reduce_scatter_v:
      case Collective::scatter_v: return {true, 0, ins()[me].first};
      default: return {true, 0, 0};
    }
  }
  Shape shape() const {
    if (!extents) return {me, n, root, Chunks(Buffer::input, input_count(), n), Chunks(Buffer::output, output_count(), n), group};
    return {me, n, root, ins(), outs(), group};
  }
  friend bool operator==(const Layout& a, const Layout& b) {
    return a.operation == b.operation && a.me == b.me && a.n == b.n && a.root == b.root && a.count == b.count && a.in_place == b.in_place && a.group == b.group &&
           (a.extents == b.extents || (a.extents && b.extents && *a.extents == *b.extents));
  }

 private:
  std::size_t ranks() const { return static_cast<std::size_t>(n); }
  Chunks ins() const {
    if (operation == Collective::neighbour_exchange) return {Buffer::input, count, extents->to};
    return extents->in_counts.empty() ? Chunks(Buffer::input, count, n) : Chunks(Buffer::input, extents->in_counts, extents->in_firsts);
  }
  Chunks outs() const {
    if (operation == Collective::neighbour_exchange) return {Buffer::output, count, extents->from};
    return extents->out_counts.empty() ? Chunks(Buffer::output, count, n) : Chunks(Buffer::output, extents->out_counts, extents->out_firsts);
  }
};

}  // namespace tally::inline v0
