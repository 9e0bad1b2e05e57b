// SPDX-License-Identifier: Apache-2.0
// The operators: what each does with one pair of elements and with GNU vectors of them, which types it takes, and how
// it is named to peers. What applies them to memory is in reduce.hpp.
#pragma once

#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// A value and where it was found, for min_location and max_location.
template <Number T>
struct Located {
  T value{};
  std::int64_t location = 0;
  friend bool operator==(const Located&, const Located&) = default;
};

namespace detail {

/// What T is computed as. Integers are added and multiplied as unsigned, so that overflow wraps and is defined.
template <class T>
constexpr auto wide(T x) {
  if constexpr (Small<T>) return static_cast<float>(x);
  else if constexpr (!Integer<T>) return x;
  else if constexpr (sizeof(T) < sizeof(unsigned)) return static_cast<unsigned>(x);
  else return static_cast<std::make_unsigned_t<T>>(x);
}
template <class T>
constexpr bool is_nan(T x) {
  if constexpr (Floating<T>) return wide(x) != wide(x);
  else return false;
}

/// Small floats have one NaN after every fold, also where it is only chosen.
template <class T>
constexpr T one_nan(T x) {
  if constexpr (Small<T>) return static_cast<T>(wide(x));
  else return x;
}
/// nvcc drops the sizes of vectors that depend on a template's arguments: they are then numbers.
template <class V>
constexpr auto lane_of(const V& x) {
  if constexpr (std::is_arithmetic_v<V>) return x;
  else return x[0];
}
/// a = b where that is NaN. As integers: GCC 12 takes vectors of AVX-512 apart to compare floats with !=.
template <class V>
[[gnu::always_inline]] inline void take_nan(V& a, const V& b) {
  using T = decltype(lane_of(b));
  if constexpr (std::floating_point<T>) {
    using I = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    typedef I Bits __attribute__((vector_size(sizeof(V))));
    constexpr I infinity = sizeof(T) == 4 ? I{0x7f800000} : static_cast<I>(0x7ff0000000000000);
    const Bits x = __builtin_bit_cast(Bits, b), magnitude = x & std::numeric_limits<I>::max();
    a = __builtin_bit_cast(V, magnitude > Bits{} + infinity ? x : __builtin_bit_cast(Bits, a));
  }
}

template <class T>
concept Fractional = Floating<T> || Complex<T>;
template <class T>
concept Summable = Number<T> || Complex<T>;
template <class T>
concept Bitwise = Integer<T> || std::same_as<T, std::byte>;
template <class T>
concept Logical = Integer<T> || std::same_as<T, bool>;

}  // namespace detail

// The built-in operators. Each has a form for one pair of elements and one for GNU vectors of them, a = a . b, which
// selects rather than combines comparisons: GCC 12 takes masks of AVX-512 apart. `takes` are the element types. All are commutative. Floats of 8 and 16 bits are computed as float and rounded once per fold.
struct Sum {
  using Builtin = Sum;
  static constexpr std::string_view name = "sum";
  template <class T>
  static constexpr bool takes = detail::Summable<T>;
  template <detail::Summable T>
  constexpr T operator()(T a, T b) const {
    return static_cast<T>(detail::wide(a) + detail::wide(b));
  }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a += b; }
};
/// Of complex numbers: (ac - bd, ad + bc), also where that makes NaN of an infinity.
struct Prod {
  using Builtin = Prod;
  static constexpr std::string_view name = "prod";
  template <class T>
  static constexpr bool takes = detail::Summable<T>;
  template <detail::Summable T>
  constexpr T operator()(T a, T b) const {
    if constexpr (Complex<T>) return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
    else return static_cast<T>(detail::wide(a) * detail::wide(b));
  }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a *= b; }
};
/// The smaller value; of two equal ones the left (so of -0.0 and 0.0). If one is NaN, it is NaN: a NaN on any rank makes
/// the result NaN, whatever the order.
struct Min {
  using Builtin = Min;
  static constexpr std::string_view name = "min";
  template <class T>
  static constexpr bool takes = Number<T>;
  template <Number T>
  constexpr T operator()(T a, T b) const { return detail::one_nan(b < a || detail::is_nan(b) ? b : a); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) {
    a = b < a ? b : a;
    detail::take_nan(a, b);
  }
};
/// The larger value, by the same rules.
struct Max {
  using Builtin = Max;
  static constexpr std::string_view name = "max";
  template <class T>
  static constexpr bool takes = Number<T>;
  template <Number T>
  constexpr T operator()(T a, T b) const { return detail::one_nan(a < b || detail::is_nan(b) ? b : a); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) {
    a = a < b ? b : a;
    detail::take_nan(a, b);
  }
};
/// The sum, divided by the number of ranks at the end. Not of integers.
struct Mean : Sum {
  using Builtin = Mean;
  static constexpr std::string_view name = "mean";
  template <class T>
  static constexpr bool takes = detail::Fractional<T>;
};
struct BitAnd {
  using Builtin = BitAnd;
  static constexpr std::string_view name = "band";
  template <class T>
  static constexpr bool takes = detail::Bitwise<T>;
  template <detail::Bitwise T>
  constexpr T operator()(T a, T b) const { return static_cast<T>(a & b); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a &= b; }
};
struct BitOr {
  using Builtin = BitOr;
  static constexpr std::string_view name = "bor";
  template <class T>
  static constexpr bool takes = detail::Bitwise<T>;
  template <detail::Bitwise T>
  constexpr T operator()(T a, T b) const { return static_cast<T>(a | b); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a |= b; }
};
struct BitXor {
  using Builtin = BitXor;
  static constexpr std::string_view name = "bxor";
  template <class T>
  static constexpr bool takes = detail::Bitwise<T>;
  template <detail::Bitwise T>
  constexpr T operator()(T a, T b) const { return static_cast<T>(a ^ b); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a ^= b; }
};
// The logical ones: what is not 0 is true, the result is 0 or 1. Of one rank alone, the result is its input as it is.
struct LogicalAnd {
  using Builtin = LogicalAnd;
  static constexpr std::string_view name = "land";
  template <class T>
  static constexpr bool takes = detail::Logical<T>;
  template <detail::Logical T>
  constexpr T operator()(T a, T b) const { return static_cast<T>((a != T{}) & (b != T{})); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a = (a != V{} ? b : V{}) != V{} ? V{} + 1 : V{}; }
};
struct LogicalOr {
  using Builtin = LogicalOr;
  static constexpr std::string_view name = "lor";
  template <class T>
  static constexpr bool takes = detail::Logical<T>;
  template <detail::Logical T>
  constexpr T operator()(T a, T b) const { return static_cast<T>((a != T{}) | (b != T{})); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a = (a | b) != V{} ? V{} + 1 : V{}; }
};
struct LogicalXor {
  using Builtin = LogicalXor;
  static constexpr std::string_view name = "lxor";
  template <class T>
  static constexpr bool takes = detail::Logical<T>;
  template <detail::Logical T>
  constexpr T operator()(T a, T b) const { return static_cast<T>((a != T{}) != (b != T{})); }
  template <class V>
  [[gnu::always_inline]] static void vector(V& a, const V& b) { a = (a != V{} ? V{} + 1 : V{}) ^ (b != V{} ? V{} + 1 : V{}); }
};
/// The sum of factor * x, where each rank has its own factor. As an operator on two elements it is their sum: what is
/// folded is multiplied before, by scale_of().
template <class F>
struct PremultipliedSum : Sum {
  using Builtin = PremultipliedSum;
  static constexpr std::string_view name = "premultiplied_sum";
  template <class T>
  static constexpr bool takes = detail::Fractional<T> && (std::floating_point<F> || std::same_as<F, T>);
  F factor;
  constexpr explicit PremultipliedSum(F by) : factor(by) {}
};

namespace detail {

/// Of two NaNs and of two equal values, the one at the lower location; a NaN comes before every value.
template <class Order, class T>
constexpr Located<T> first_of(const Located<T>& a, const Located<T>& b) {
  const bool a_nan = is_nan(a.value), b_nan = is_nan(b.value), tie = a_nan ? b_nan : a.value == b.value;
  const bool b_first = tie ? b.location < a.location : b_nan || (!a_nan && Order{}(a.value, b.value) != a.value);
  return b_first ? b : a;
}

}  // namespace detail

/// The smallest value and where it is: the lower location of equal ones. A NaN wins against all values, the NaN with the
/// lower location among several.
struct MinLocation {
  using Builtin = MinLocation;
  static constexpr std::string_view name = "min_location";
  template <class T>
  static constexpr bool takes = std::is_invocable_v<MinLocation, T, T>;
  template <Number T>
  constexpr Located<T> operator()(const Located<T>& a, const Located<T>& b) const { return detail::first_of<Min>(a, b); }
};
/// The largest value and where it is, by the same rules.
struct MaxLocation {
  using Builtin = MaxLocation;
  static constexpr std::string_view name = "max_location";
  template <class T>
  static constexpr bool takes = std::is_invocable_v<MaxLocation, T, T>;
  template <Number T>
  constexpr Located<T> operator()(const Located<T>& a, const Located<T>& b) const { return detail::first_of<Max>(a, b); }
};

inline constexpr Sum sum{};
inline constexpr Prod prod{};
inline constexpr Min min{};
inline constexpr Max max{};
inline constexpr Mean mean{};
inline constexpr BitAnd band{};
inline constexpr BitOr bor{};
inline constexpr BitXor bxor{};
inline constexpr LogicalAnd land{};
inline constexpr LogicalOr lor{};
inline constexpr LogicalXor lxor{};
inline constexpr MinLocation min_location{};
inline constexpr MaxLocation max_location{};
/// `factor` is float, double or the element type. Elements of 8 and 16 bits are multiplied as float and rounded.
template <class F>
constexpr PremultipliedSum<F> premultiplied_sum(F factor) { return PremultipliedSum<F>(factor); }

/// Marks a callable `T(T, T)` as commutative and associative. A callable that is not marked is taken to be associative
/// only, and is applied in rank order.
template <class F>
struct Commutative {
  F function;
  template <class T>
    requires std::is_invocable_r_v<T, const F&, T, T>
  constexpr T operator()(T a, T b) const { return static_cast<T>(function(a, b)); }
};
template <class F>
constexpr Commutative<F> commutative(F function) { return {std::move(function)}; }

/// Exactly the operators above: what is derived from one of them is a callable like any other.
template <class Op>
inline constexpr bool is_builtin = requires { requires std::same_as<typename Op::Builtin, Op>; };

/// Whether ranks may be folded in any order. For an operator type of your own, use commutative(), or specialise:
/// `template <> inline constexpr bool tally::is_commutative<MyOperator> = true;`
template <class Op>
inline constexpr bool is_commutative = is_builtin<Op>;
template <class F>
inline constexpr bool is_commutative<Commutative<F>> = true;

/// What all_reduce and its relatives take: a built-in operator that takes T, or a callable that takes two T and returns one.
template <class Op, class T>
concept BuiltinReduction = is_builtin<Op> && Op::template takes<T>;
template <class Op, class T>
concept UserReduction = !is_builtin<Op> && std::is_invocable_r_v<T, const Op&, T, T>;
template <class Op, class T>
concept Reduction = Element<T> && (BuiltinReduction<Op, T> || UserReduction<Op, T>);

namespace detail {

/// An operator's place is its code on the wire: append only, and stay below the 16 where users' operators begin.
inline constexpr std::string_view operator_names[] = {"", "sum", "prod", "min", "max", "mean", "band", "bor", "bxor", "land", "lor", "lxor", "premultiplied_sum", "min_location", "max_location"};
static_assert(std::size(operator_names) <= 16);

/// 12 bits that name an operator to peers: built-in ones by table, callables by a hash of their type.
template <class Op>
std::uint16_t operator_code() {
  if constexpr (is_builtin<Op>) {
    constexpr std::uint16_t code = [] {
      std::uint16_t i = 1;
      while (operator_names[i] != Op::name) ++i;
      return i;
    }();
    return code;
  } else {
    return static_cast<std::uint16_t>(16 + hash_type<Op>() % 4080);
  }
}
[[gnu::cold]] inline std::string operator_text(std::uint16_t code) {
  return code < std::size(operator_names) ? std::string(operator_names[code]) : concat({"user operator #", code});
}

}  // namespace detail

}  // namespace tally::inline v0
