// SPDX-License-Identifier: Apache-2.0
// Operators and the loops that apply them to memory. One kernel per (type, operator), called through a pointer,
// is all that depends on element types below the communicator; everything else moves bytes.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {

namespace detail {

/// Integers are added and multiplied as unsigned, so that overflow wraps and is defined.
template <Number T>
constexpr auto wide(T x) {
  if constexpr (std::is_floating_point_v<T>) return x;
  else if constexpr (sizeof(T) < sizeof(unsigned)) return static_cast<unsigned>(x);
  else return static_cast<std::make_unsigned_t<T>>(x);
}

}  // namespace detail

// The built-in operators. Each has a form for one pair of numbers and one for GNU vectors of them, a = a . b.
struct Sum {
  static constexpr std::string_view name = "sum";
  template <Number T>
  constexpr T operator()(T a, T b) const {
    return static_cast<T>(detail::wide(a) + detail::wide(b));
  }
  template <class V>
  static void vector(V& a, const V& b) { a += b; }
};
struct Prod {
  static constexpr std::string_view name = "prod";
  template <Number T>
  constexpr T operator()(T a, T b) const {
    return static_cast<T>(detail::wide(a) * detail::wide(b));
  }
  template <class V>
  static void vector(V& a, const V& b) { a *= b; }
};
/// The smaller value; of two equal ones the left. A NaN on the right is ignored, one on the left stays.
struct Min {
  static constexpr std::string_view name = "min";
  template <Number T>
  constexpr T operator()(T a, T b) const { return b < a ? b : a; }
  template <class V>
  static void vector(V& a, const V& b) { a = b < a ? b : a; }
};
struct Max {
  static constexpr std::string_view name = "max";
  template <Number T>
  constexpr T operator()(T a, T b) const { return a < b ? b : a; }
  template <class V>
  static void vector(V& a, const V& b) { a = a < b ? b : a; }
};
/// The sum, divided by the number of ranks at the end. Floating-point types only.
struct Mean : Sum {
  static constexpr std::string_view name = "mean";
};

inline constexpr Sum sum{};
inline constexpr Prod prod{};
inline constexpr Min min{};
inline constexpr Max max{};
inline constexpr Mean mean{};

/// Marks a callable `T(T, T)` as commutative and associative, which is what the algorithms here need.
template <class F>
struct Commutative {
  F function;
  template <class T>
    requires std::is_invocable_r_v<T, const F&, T, T>
  constexpr T operator()(T a, T b) const { return static_cast<T>(function(a, b)); }
};
template <class F>
constexpr Commutative<F> commutative(F function) { return {std::move(function)}; }

/// Specialise for operator types of your own, or use commutative().
template <class Op>
inline constexpr bool is_commutative = false;
template <class F>
inline constexpr bool is_commutative<Commutative<F>> = true;

template <class Op>
inline constexpr bool is_builtin = std::same_as<Op, Sum> || std::same_as<Op, Prod> || std::same_as<Op, Min> || std::same_as<Op, Max> || std::same_as<Op, Mean>;

/// What all_reduce and its relatives take: a built-in operator (mean: floating point only), or a callable that
/// takes and returns T and is marked commutative.
template <class Op, class T>
concept Reduction = Number<T> && ((is_builtin<Op> && (!std::same_as<Op, Mean> || std::floating_point<T>)) ||
                                  (is_commutative<Op> && std::is_invocable_r_v<T, const Op&, T, T>));

/// to = left . right over `bytes` bytes of whole elements. Memory may be unaligned; `to` may be `left` or `right`.
struct Fold {
  using Function = void (*)(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes);
  Function function = nullptr;
  const void* op = nullptr;
  void operator()(std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) const { function(op, to, left, right, bytes); }
};

namespace detail {

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

/// Unrolled by hand, because compilers at -O2 do not. All loads come before any store: `to` may be a source.
/// Vectors go by reference: by value they would need the wide registers that only the caller may use.
template <class Op, class V>
[[gnu::always_inline]] inline void fold_vectors(std::byte*& to, const std::byte*& left, const std::byte*& right, std::size_t& bytes) {
  constexpr std::size_t v = sizeof(V), step = 4 * v;
  for (; bytes >= step; bytes -= step, to += step, left += step, right += step) {
    V a, b, c, d, x, y, z, w;
    std::memcpy(&a, left, v), std::memcpy(&x, right, v);
    std::memcpy(&b, left + v, v), std::memcpy(&y, right + v, v);
    std::memcpy(&c, left + 2 * v, v), std::memcpy(&z, right + 2 * v, v);
    std::memcpy(&d, left + 3 * v, v), std::memcpy(&w, right + 3 * v, v);
    Op::vector(a, x), Op::vector(b, y), Op::vector(c, z), Op::vector(d, w);
    std::memcpy(to, &a, v), std::memcpy(to + v, &b, v), std::memcpy(to + 2 * v, &c, v), std::memcpy(to + 3 * v, &d, v);
  }
}

template <class T, class Op, std::size_t width>
[[gnu::always_inline]] inline void fold_with(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  if constexpr (is_builtin<Op> && !std::same_as<T, long double>) {
    // Sums and products wrap, so they are done on unsigned vectors, which have the same bits.
    using Unsigned = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::type_identity<T>>::type;
    using Lane = std::conditional_t<std::same_as<Op, Min> || std::same_as<Op, Max>, T, Unsigned>;
    typedef Lane V __attribute__((vector_size(width)));
    typedef Lane Short __attribute__((vector_size(16)));
    fold_vectors<Op, V>(to, left, right, bytes);
    if constexpr (width > 16) fold_vectors<Op, Short>(to, left, right, bytes);
  }
  const Op& f = *static_cast<const Op*>(op);
  for (std::size_t i = 0; i + sizeof(T) <= bytes; i += sizeof(T)) {
    const T r = f(load<T>(left + i), load<T>(right + i));
    std::memcpy(to + i, &r, sizeof r);
  }
}
template <class T, class Op>
void fold_elements(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  fold_with<T, Op, 16>(op, to, left, right, bytes);
}
#if defined(__x86_64__)
// Wider registers mean more lines on their way at once: what limits a fold is waiting for another core's data.
template <class T, class Op>
[[gnu::target("avx2")]] void fold_elements_avx2(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  fold_with<T, Op, 32>(op, to, left, right, bytes);
}
template <class T, class Op>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] void fold_elements_avx512(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  fold_with<T, Op, 64>(op, to, left, right, bytes);
}
#endif

using FoldFunction = void (*)(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes);
/// The kernel for the processor that this runs on, so that programs built for any x86-64 are fast, too.
template <class T, class Op>
FoldFunction best_fold() {
#if defined(__x86_64__)
  if constexpr (is_builtin<Op> && !std::same_as<T, long double>) {
    static const FoldFunction best = [] {
      __builtin_cpu_init();
      if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return &fold_elements_avx512<T, Op>;
      if (__builtin_cpu_supports("avx2")) return &fold_elements_avx2<T, Op>;
      return &fold_elements<T, Op>;
    }();
    return best;
  }
#endif
  return &fold_elements<T, Op>;
}

/// data /= n, for mean.
template <std::floating_point T>
void divide(void* data, std::size_t count, int n) {
  T* values = static_cast<T*>(data);
  for (std::size_t i = 0; i < count; ++i) values[i] /= static_cast<T>(n);
}

/// FNV-1a: the same on every rank of a job.
constexpr std::uint64_t hash_text(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

/// 12 bits that name an operator to peers: built-in ones by table, callables by a hash of their type. The mangled
/// name tells lambdas of one function apart, which the readable one does not.
template <class Op>
std::uint16_t operator_code() {
  if constexpr (std::same_as<Op, Sum>) return 1;
  else if constexpr (std::same_as<Op, Prod>) return 2;
  else if constexpr (std::same_as<Op, Min>) return 3;
  else if constexpr (std::same_as<Op, Max>) return 4;
  else if constexpr (std::same_as<Op, Mean>) return 5;
  else {
#if defined(__cpp_rtti)
    static const std::uint16_t code = static_cast<std::uint16_t>(16 + hash_text(typeid(Op).name()) % 4080);
#else
    static constexpr std::uint16_t code = static_cast<std::uint16_t>(16 + hash_text(__PRETTY_FUNCTION__) % 4080);
#endif
    return code;
  }
}
inline std::string operator_text(std::uint16_t code) {
  constexpr std::string_view names[] = {"", "sum", "prod", "min", "max", "mean"};
  return code < std::size(names) ? std::string(names[code]) : concat({"user operator #", code});
}

}  // namespace detail

template <Number T, class Op>
Fold fold_of(const Op& op) {
  return {detail::best_fold<T, Op>(), &op};
}

}  // namespace tally::inline v0
