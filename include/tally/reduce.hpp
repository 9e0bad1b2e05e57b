// SPDX-License-Identifier: Apache-2.0
// The loops that apply operators to memory. One kernel per (type, operator), called through a pointer, is all that
// depends on element types below the communicator; everything else moves bytes. Which kernel: that for the processor
// that the program runs on, so that programs built for any x86-64 are fast, too. All kernels give the same bits.
#pragma once

#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "operators.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// to = left . right over `bytes` bytes of whole elements. Memory may be unaligned; `to` may be `left` or `right`.
struct Fold {
  using Function = void (*)(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes);
  Function function = nullptr;
  const void* op = nullptr;
  void operator()(std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) const { function(op, to, left, right, bytes); }
};

/// to = factor * from, elementwise, for operators whose input is scaled before it is folded. `to` may be `from`.
using ScaleFunction = void (*)(const void* op, std::byte* to, const std::byte* from, std::size_t bytes);

namespace detail {

using FoldFunction = Fold::Function;

template <class T>
struct Bytes {
  std::byte bytes[sizeof(T)];
};
template <class T>
T load(const std::byte* from) {
  Bytes<T> bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_bit_cast(T, bytes);
}
template <class T>
void store(std::byte* to, const T& value) {
  if constexpr (Complex<T>) {  // by parts: GCC 12 would write both and wait to read them back as one
    const auto real = value.real(), imaginary = value.imag();
    std::memcpy(to, &real, sizeof real), std::memcpy(to + sizeof real, &imaginary, sizeof imaginary);
  } else {
    std::memcpy(to, &value, sizeof value);
  }
}

template <class Op>
inline constexpr bool orders = std::same_as<Op, Min> || std::same_as<Op, Max>;

/// What T's kernels are made for: types whose operators do the same to the bits share one.
template <class T, class Op>
constexpr auto kernel_type() {
  if constexpr (!is_builtin<Op>) return std::type_identity<T>{};
  else if constexpr (Small<T>) return std::type_identity<typename SmallTraits<T>::Stored>{};
  else if constexpr (Complex<T> && !std::same_as<Op, Prod>) return std::type_identity<typename T::value_type>{};
  else if constexpr (std::same_as<T, std::byte> || std::same_as<T, bool>) return std::type_identity<unsigned char>{};
  else if constexpr (Integer<T> && std::is_signed_v<T> && orders<Op>) return std::type_identity<std::make_signed_t<T>>{};
  else if constexpr (Integer<T>) return std::type_identity<std::make_unsigned_t<T>>{};
  else return std::type_identity<T>{};
}
template <class T, class Op>
using KernelType = typename decltype(kernel_type<T, Op>())::type;
template <class Op>
using KernelOp = std::conditional_t<is_builtin<Op> && std::derived_from<Op, Sum>, Sum, Op>;

#if defined(__CUDACC__)
inline constexpr bool small_vectors = false;  // nvcc drops their sizes, see lane_of(), and some of them crash it
#else
inline constexpr bool small_vectors = true;
#endif
template <class T, class Op>
inline constexpr bool has_vectors = is_builtin<Op> && (Integer<T> || (Small<T> && small_vectors) || std::same_as<T, float> || std::same_as<T, double>);

/// x = f(x, y) as float for all the small floats that lie side by side in each 32 bits of a and b: no lane moves.
template <class T, int at = 0, class V, class Function>
[[gnu::always_inline]] inline void packed(V& result, const V& a, const V& b, const Function& f) {
  using Format = typename T::Format;
  typedef float F __attribute__((vector_size(sizeof(V))));
  V x = a >> at & ((1u << Format::bits) - 1), y = b >> at & ((1u << Format::bits) - 1);
  Format::widen(x), Format::widen(y);
  F value = __builtin_bit_cast(F, x);
  f(value, __builtin_bit_cast(F, y));
  x = __builtin_bit_cast(V, value);
  Format::narrow(x);
  result |= x << at;
  if constexpr (at + Format::bits < 32) packed<T, at + Format::bits>(result, a, b, f);
}
template <class Op>
struct LaneByLane {
  template <class V>
  [[gnu::always_inline]] void operator()(V& a, const V& b) const { Op::vector(a, b); }
};
template <class T, class Op, class V>
[[gnu::always_inline]] inline void fold_packed(std::byte*& to, const std::byte*& left, const std::byte*& right, std::size_t& bytes) {
  for (; bytes >= sizeof(V); bytes -= sizeof(V), to += sizeof(V), left += sizeof(V), right += sizeof(V)) {
    V a, b, result{};
    std::memcpy(&a, left, sizeof a), std::memcpy(&b, right, sizeof b);
    packed<T>(result, a, b, LaneByLane<Op>{});
    std::memcpy(to, &result, sizeof result);
  }
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
  if constexpr (has_vectors<T, Op> && Small<T>) {
    typedef std::uint32_t V __attribute__((vector_size(width)));
    fold_packed<T, Op, V>(to, left, right, bytes);
  } else if constexpr (has_vectors<T, Op>) {
    typedef T V __attribute__((vector_size(width)));
    typedef T Short __attribute__((vector_size(16)));
    fold_vectors<Op, V>(to, left, right, bytes);
    if constexpr (width > 16) fold_vectors<Op, Short>(to, left, right, bytes);
  }
  for (std::size_t i = 0; i + sizeof(T) <= bytes; i += sizeof(T)) {
    const auto folded = [&](const T& a, const T& b) -> T {
      if constexpr (is_builtin<Op>) return Op{}(a, b);
      else return (*static_cast<const Op*>(op))(a, b);
    };
    store<T>(to + i, folded(load<T>(left + i), load<T>(right + i)));
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
inline bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}
#endif
#if defined(__x86_64__) && !defined(__CUDACC__)
// f16 by the processor's conversions. Those for bf16 (AVX-512 BF16) are not used: they take subnormal numbers for 0.
/// NaN becomes the one that the conversions of Format make.
template <class F>
[[gnu::always_inline]] inline void settle_nan(F& x) {
  typedef std::int32_t S __attribute__((vector_size(sizeof(F))));
  const S bits = __builtin_bit_cast(S, x);
  x = __builtin_bit_cast(F, (bits & 0x7fffffff) > (S{} + 0x7f800000) ? S{} + 0x7fc00000 : bits);
}
template <class Op>
[[gnu::target("avx2,f16c")]] void fold_halves_f16c(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  typedef short H __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(32)));
  for (; bytes >= sizeof(H); bytes -= sizeof(H), to += sizeof(H), left += sizeof(H), right += sizeof(H)) {
    H a, b;
    std::memcpy(&a, left, sizeof a), std::memcpy(&b, right, sizeof b);
    F x = __builtin_ia32_vcvtph2ps256(a), y = __builtin_ia32_vcvtph2ps256(b);
    if constexpr (orders<Op>) settle_nan(y);  // or Clang 14 would compare the halves themselves, one by one
    Op::vector(x, y);
    settle_nan(x);
    a = __builtin_ia32_vcvtps2ph256(x, 0);
    std::memcpy(to, &a, sizeof a);
  }
  fold_with<f16, Op, 16>(op, to, left, right, bytes);
}
template <class Op>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] void fold_halves_avx512(const void* op, std::byte* to, const std::byte* left, const std::byte* right, std::size_t bytes) {
  typedef short H __attribute__((vector_size(32)));
  typedef float F __attribute__((vector_size(64)));
  unsigned short all = 0xffff;  // a parameter that is signed for GCC, but not for Clang
  for (; bytes >= sizeof(H); bytes -= sizeof(H), to += sizeof(H), left += sizeof(H), right += sizeof(H)) {
    H a, b;
    std::memcpy(&a, left, sizeof a), std::memcpy(&b, right, sizeof b);
    F x = __builtin_ia32_vcvtph2ps512_mask(a, F{}, all, 4), y = __builtin_ia32_vcvtph2ps512_mask(b, F{}, all, 4);
    if constexpr (orders<Op>) settle_nan(y);  // or Clang 14 would compare the halves themselves, one by one
    Op::vector(x, y);
    settle_nan(x);
    a = __builtin_ia32_vcvtps2ph512_mask(x, 0, H{}, all);
    std::memcpy(to, &a, sizeof a);
  }
  fold_with<f16, Op, 16>(op, to, left, right, bytes);
}
/// Not every compiler's __builtin_cpu_supports() knows it.
inline bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

template <class T, class Op>
FoldFunction best_fold() {
#if defined(__x86_64__)
  if constexpr (has_vectors<T, Op>) {
    static const FoldFunction best = [] {
#if !defined(__CUDACC__)
      if constexpr (std::same_as<T, f16>) {
        if (has_avx512()) return &fold_halves_avx512<Op>;
        if (has_f16c()) return &fold_halves_f16c<Op>;
      }
#endif
      if (has_avx512()) return &fold_elements_avx512<T, Op>;
      if (has_avx2()) return &fold_elements_avx2<T, Op>;
      return &fold_elements<T, Op>;
    }();
    return best;
  }
#endif
  return &fold_elements<T, Op>;
}

// What is done to each element alone: x = x * factor and x = x / n. Small floats are rounded once.
template <class N>
struct Times {
  N factor;
  template <class X>
  [[gnu::always_inline]] constexpr void operator()(X& x, const X&) const {
    if constexpr (Complex<X>) x = Prod{}(x, factor);
    else x *= factor;
  }
};
template <class N>
struct Over {
  N divisor;
  template <class X>
  [[gnu::always_inline]] constexpr void operator()(X& x, const X&) const { x /= divisor; }
};

template <class T, std::size_t width, class Function>
[[gnu::always_inline]] inline void each_with(std::byte* to, const std::byte* from, std::size_t bytes, const Function& f) {
  if constexpr (Small<T> || std::same_as<T, float> || std::same_as<T, double>) {
    typedef std::conditional_t<Small<T>, std::uint32_t, T> V __attribute__((vector_size(width)));
    for (; bytes >= sizeof(V); bytes -= sizeof(V), to += sizeof(V), from += sizeof(V)) {
      V x, result{};
      std::memcpy(&x, from, sizeof x);
      if constexpr (Small<T>) packed<T>(result, x, x, f);
      else f(x, x), result = x;
      std::memcpy(to, &result, sizeof result);
    }
  }
  for (std::size_t i = 0; i + sizeof(T) <= bytes; i += sizeof(T)) {
    auto x = wide(load<T>(from + i));
    f(x, x);
    store(to + i, static_cast<T>(x));
  }
}
#if defined(__x86_64__)
template <class T, class Function>
[[gnu::target("avx2")]] void each_avx2(std::byte* to, const std::byte* from, std::size_t bytes, const Function& f) {
  each_with<T, 32>(to, from, bytes, f);
}
#endif
template <class T, class Function>
void each(std::byte* to, const std::byte* from, std::size_t bytes, const Function& f) {
#if defined(__x86_64__)
  if constexpr (Small<T>) {  // the others wait for memory in any case
    if (has_avx2()) return each_avx2<T>(to, from, bytes, f);
  }
#endif
  each_with<T, 16>(to, from, bytes, f);
}

/// data /= n, for mean.
template <Fractional T>
void divide(void* data, std::size_t count, int n) {
  using K = KernelType<T, Sum>;
  using N = decltype(wide(K{}));
  each<K>(static_cast<std::byte*>(data), static_cast<const std::byte*>(data), count * sizeof(T), Over<N>{static_cast<N>(n)});
}
template <Fractional T, class F>
void scale(const void* op, std::byte* to, const std::byte* from, std::size_t bytes) {
  const F factor = static_cast<const PremultipliedSum<F>*>(op)->factor;
  if constexpr (Complex<F>) {
    each<T>(to, from, bytes, Times<T>{factor});
  } else {
    using K = KernelType<T, Sum>;
    using N = decltype(wide(K{}));
    each<K>(to, from, bytes, Times<N>{static_cast<N>(factor)});
  }
}

template <class Op>
inline constexpr bool is_premultiplied = false;
template <class F>
inline constexpr bool is_premultiplied<PremultipliedSum<F>> = true;

}  // namespace detail

template <Element T, class Op>
Fold fold_of(const Op& op) {
  return {detail::best_fold<detail::KernelType<T, Op>, detail::KernelOp<Op>>(), &op};
}
/// What has to be done to a rank's input before `op` folds it; null if nothing.
template <Element T, class Op>
ScaleFunction scale_of() {
  if constexpr (detail::is_premultiplied<Op>) return &detail::scale<T, decltype(Op::factor)>;
  else return nullptr;
}

}  // namespace tally::inline v0
