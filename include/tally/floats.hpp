// SPDX-License-Identifier: Apache-2.0
// Floating-point numbers of 8 and 16 bits, as they are stored and sent: bf16, f16, fp8_e4m3 and fp8_e5m2. They are
// computed with as float. The conversions are integer arithmetic that is written once, for one number and for GNU
// vectors of them, so that both give the same bits; the processor's own are no matter of this header.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__STDCPP_BFLOAT16_T__) || defined(__STDCPP_FLOAT16_T__)
#include <stdfloat>
#endif

namespace tally::inline v0 {

namespace detail {

/// The same lanes as those of U (std::uint32_t or a GNU vector of it), as other types.
template <class U>
struct Lanes {
  typedef float Float __attribute__((vector_size(sizeof(U))));
  typedef std::int32_t Signed __attribute__((vector_size(sizeof(U))));
};
template <>
struct Lanes<std::uint32_t> {
  using Float = float;
  using Signed = std::int32_t;
};

/// One sign bit, then exponent, then mantissa. Without infinities, all ones are NaN and everything else is finite.
template <int exponent_bits, int mantissa_bits, bool infinities>
struct Format {
  static constexpr int bits = 1 + exponent_bits + mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  static constexpr std::uint32_t sign_bit = 1u << (bits - 1), infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  /// What NaN always becomes. Whose payload a sum of two gets depends on the order that a compiler put them in.
  static constexpr std::uint32_t nan = infinities ? infinity | 1u << (mantissa_bits - 1) : sign_bit - 1;
  static constexpr std::uint32_t largest = infinities ? infinity - 1 : nan - 1;

  /// Codes in the low bits become the bits of floats. Vectors go by reference: by value they would need wide registers.
  template <class U>
  [[gnu::always_inline]] static constexpr void widen(U& x) {
    if constexpr (exponent_bits == 8) {
      x = x << shift;
    } else {
      // Subnormal numbers are made as a difference of normal ones: exact, and not slow where subnormal floats are.
      using F = typename Lanes<U>::Float;
      using S = typename Lanes<U>::Signed;
      constexpr std::uint32_t least_bits = static_cast<std::uint32_t>(127 - bias + 1) << 23;
      const U sign = (x & sign_bit) << (32 - bits), magnitude = (x & (sign_bit - 1)) << shift, least = U{} + least_bits;
      const F difference = __builtin_bit_cast(F, magnitude + least) - __builtin_bit_cast(F, least);
      const U normal = magnitude + (least_bits - (1u << 23)), special = infinities ? magnitude | 0x7f800000u : U{} + 0x7fc00000u;
      x = (S)magnitude < (S)(U{} + (1u << 23)) ? __builtin_bit_cast(U, difference) : normal;
      x = sign | ((S)magnitude >= (S)(U{} + ((infinities ? infinity : nan) << shift)) ? special : x);
    }
  }
  /// The bits of floats become codes in the low bits: the nearest number, of two the even one.
  template <class U>
  [[gnu::always_inline]] static constexpr void narrow(U& x) {
    using F = typename Lanes<U>::Float;
    using S = typename Lanes<U>::Signed;
    const U magnitude = x & 0x7fffffffu, to_even = (x >> shift) & 1u;
    if constexpr (exponent_bits == 8) {
      const U rounded = x + to_even + ((1u << (shift - 1)) - 1);  // into the exponent if need be: up to infinity that is right
      x = ((S)magnitude > (S)(U{} + 0x7f800000u) ? U{} + (nan << shift) : rounded) >> shift;
    } else {
      constexpr std::uint32_t least_normal = static_cast<std::uint32_t>(127 - bias + 1) << 23;
      constexpr std::uint32_t too_large = infinities ? static_cast<std::uint32_t>(127 + bias + 1) << 23 : (nan << shift) + (static_cast<std::uint32_t>(127 - bias) << 23);
      const U sign = (x >> (32 - bits)) & sign_bit, unit = U{} + (static_cast<std::uint32_t>(127 - bias + shift + 1) << 23);
      const U normal = (magnitude + to_even + (((1u << (shift - 1)) - 1) - (static_cast<std::uint32_t>(127 - bias) << 23))) >> shift;
      // Next to `unit`, floats are as far apart as subnormal codes: adding it rounds.
      const F sum = __builtin_bit_cast(F, magnitude) + __builtin_bit_cast(F, unit);
      const U subnormal = __builtin_bit_cast(U, sum) - unit;
      x = (S)magnitude < (S)(U{} + least_normal) ? subnormal : normal;
      x = (S)magnitude >= (S)(U{} + too_large) ? U{} + (infinities ? infinity : nan) : x;
      if constexpr (infinities) x = (S)magnitude > (S)(U{} + 0x7f800000u) ? U{} + nan : x;
      if constexpr (infinities) x = x | ((S)magnitude > (S)(U{} + 0x7f800000u) ? U{} : sign);
      else x = x | (x == U{} + nan ? U{} : sign);
    }
  }

 private:
  static constexpr int shift = 23 - mantissa_bits;
};

}  // namespace detail

/// Rounds to the nearest number, of two the even one. Too large a value becomes infinity, or NaN where there is none;
/// NaN stays NaN, without its sign and payload. Compared and computed with as float.
template <int exponent_bits, int mantissa_bits, bool infinities>
class SmallFloat {
 public:
  using Format = detail::Format<exponent_bits, mantissa_bits, infinities>;
  using Bits = std::conditional_t<Format::bits == 8, std::uint8_t, std::uint16_t>;

  SmallFloat() = default;  // as with float: only SmallFloat{} is 0
  constexpr explicit SmallFloat(float value) {
    auto x = std::bit_cast<std::uint32_t>(value);
    Format::narrow(x);
    bits_ = static_cast<Bits>(x);
  }
  constexpr operator float() const {
    std::uint32_t x = bits_;
    Format::widen(x);
    return std::bit_cast<float>(x);
  }
  static constexpr SmallFloat from_bits(Bits bits) {
    SmallFloat value{};
    value.bits_ = bits;
    return value;
  }
  constexpr Bits bits() const { return bits_; }

 private:
  Bits bits_;
};

using bf16 = SmallFloat<8, 7, true>;
using f16 = SmallFloat<5, 10, true>;        // IEEE 754 binary16
using fp8_e4m3 = SmallFloat<4, 3, false>;   // OCP: no infinities, up to 448
using fp8_e5m2 = SmallFloat<5, 2, true>;    // OCP: as IEEE 754

namespace detail {

/// How T is stored: as one of the types above.
template <class T>
struct SmallTraits {};
template <int exponent_bits, int mantissa_bits, bool infinities>
struct SmallTraits<SmallFloat<exponent_bits, mantissa_bits, infinities>> {
  using Stored = SmallFloat<exponent_bits, mantissa_bits, infinities>;
};
#if defined(__STDCPP_BFLOAT16_T__)
template <>
struct SmallTraits<std::bfloat16_t> {
  using Stored = bf16;
};
#endif
#if defined(__STDCPP_FLOAT16_T__)
template <>
struct SmallTraits<std::float16_t> {
  using Stored = f16;
};
#endif

}  // namespace detail

/// Floating-point types of 8 and 16 bits, std::bfloat16_t and std::float16_t among them where there are such.
template <class T>
concept Small = requires { typename detail::SmallTraits<T>::Stored; };

}  // namespace tally::inline v0

template <int exponent_bits, int mantissa_bits, bool infinities>
class std::numeric_limits<tally::SmallFloat<exponent_bits, mantissa_bits, infinities>> {
  using T = tally::SmallFloat<exponent_bits, mantissa_bits, infinities>;
  using Format = typename T::Format;
  static constexpr T of(std::uint32_t bits) noexcept { return T::from_bits(static_cast<typename T::Bits>(bits)); }

 public:
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false, is_exact = false, is_bounded = true, is_modulo = false;
  static constexpr bool has_infinity = infinities, has_quiet_NaN = true, has_signaling_NaN = false, is_iec559 = false, traps = false;
  static constexpr std::float_round_style round_style = std::round_to_nearest;
  static constexpr int radix = 2, digits = mantissa_bits + 1, digits10 = mantissa_bits * 3 / 10, max_digits10 = 2 + digits * 3 / 10;
  static constexpr int min_exponent = 2 - Format::bias, max_exponent = static_cast<int>(Format::largest >> mantissa_bits) - Format::bias + 1;
  static constexpr T min() noexcept { return of(1u << mantissa_bits); }
  static constexpr T max() noexcept { return of(Format::largest); }
  static constexpr T lowest() noexcept { return of(Format::sign_bit | Format::largest); }
  static constexpr T epsilon() noexcept { return T(1.0f / (1 << mantissa_bits)); }
  static constexpr T round_error() noexcept { return T(0.5f); }
  static constexpr T infinity() noexcept { return of(infinities ? Format::infinity : 0); }
  static constexpr T quiet_NaN() noexcept { return of(Format::nan); }
  static constexpr T denorm_min() noexcept { return of(1); }
};
