// SPDX-License-Identifier: Apache-2.0
// The element types and operators that tests of collectives go through, with values whose results are exact: small
// integers, and references in a wider type.
#pragma once

#include "cases.hpp"

namespace test {

/// -5 to 5; 0 to 10 for what has no sign; -1 to 1 where 8 bits have to hold the sum of ten.
template <class T>
T small(Rank r, std::size_t i) {
  const int value = static_cast<int>((static_cast<std::size_t>(r) * 7 + i * 3 + i / 11) % 11);
  if constexpr (tally::Small<T> && sizeof(T) == 1) return static_cast<T>(static_cast<float>(value % 3 - 1));
  else if constexpr (tally::Complex<T>) return T(static_cast<typename T::value_type>(value - 5), static_cast<typename T::value_type>(value % 4));
  else if constexpr (tally::Integer<T>) return static_cast<T>(std::is_signed_v<T> ? value - 5 : value);
  else return static_cast<T>(static_cast<float>(value - 5));
}
template <class T>
struct Widened {
  using type = std::conditional_t<tally::Integer<T>, std::int64_t, long double>;
};
template <class T>
  requires tally::Small<T>
struct Widened<T> {
  using type = float;
};
template <class F>
struct Widened<std::complex<F>> {
  using type = std::complex<double>;
};

template <class T>
struct Sums {
  using Wide = typename Widened<T>::type;
  static auto op(Rank) { return tally::sum; }
  static T value(Rank r, std::size_t i) { return small<T>(r, i); }
  static Wide fold(Wide a, Wide b) { return a + b; }
};
template <class T>
struct SumsInEveryForm : Sums<T> {
  static constexpr bool forms = true;
};
/// Of powers of two, or of powers of i: exact, and integers wrap.
template <class T>
struct Products {
  using Wide = typename Widened<T>::type;
  static auto op(Rank) { return tally::prod; }
  static T value(Rank r, std::size_t i) {
    const std::size_t k = (static_cast<std::size_t>(r) * 5 + i) % 4;
    if constexpr (tally::Complex<T>) return k == 0 ? T(1, 0) : k == 1 ? T(0, 1) : k == 2 ? T(-1, 0) : T(0, -1);
    else return static_cast<T>(1 + k % 2);
  }
  static Wide fold(Wide a, Wide b) { return a * b; }
};
template <class T>
struct Minima : Sums<T> {
  using Wide = typename Sums<T>::Wide;
  static auto op(Rank) { return tally::min; }
  static Wide fold(Wide a, Wide b) { return std::min(a, b); }
};
template <class T>
struct Maxima : Sums<T> {
  using Wide = typename Sums<T>::Wide;
  static auto op(Rank) { return tally::max; }
  static Wide fold(Wide a, Wide b) { return std::max(a, b); }
};
/// Multiples of what 1 to 9 divide.
template <class T>
struct Means : SumsInEveryForm<T> {
  static constexpr bool mean = true;
  static auto op(Rank) { return tally::mean; }
  static T value(Rank r, std::size_t i) { return small<T>(r, i) * T(2520); }
};
template <class T>
struct Premultiplied : SumsInEveryForm<T> {
  static auto op(Rank r) { return tally::premultiplied_sum(static_cast<float>(r + 1)); }
  static auto scaled(Rank r, std::size_t i) { return static_cast<typename Sums<T>::Wide>(Sums<T>::value(r, i)) * static_cast<typename Sums<T>::Wide>(static_cast<float>(r + 1)); }
};
/// One bit of eight differs, another one from rank to rank.
template <class T, class Op, bool one>
struct Bits {
  using Wide = std::uint64_t;
  static auto op(Rank) { return Op{}; }
  static T value(Rank r, std::size_t i) {
    const std::uint64_t bit = std::uint64_t{1} << (static_cast<std::size_t>(r) * 3 + i) % 8;
    return static_cast<T>(one ? bit : ~bit);
  }
  static Wide fold(Wide a, Wide b) { return std::is_same_v<Op, tally::BitAnd> ? a & b : std::is_same_v<Op, tally::BitOr> ? a | b : a ^ b; }
};
/// Of 0, 1 and 2, few of which are 0 for `and`, most for the others.
template <class T, class Op>
struct Logic {
  using Wide = int;
  static auto op(Rank) { return Op{}; }
  static T value(Rank r, std::size_t i) {
    const std::size_t k = (static_cast<std::size_t>(r) * 3 + i) % 7;
    return static_cast<T>(std::is_same_v<Op, tally::LogicalAnd> ? (k + 1) % 3 + (k == 1) : k < 5 ? 0 : k - 4);
  }
  static Wide fold(Wide a, Wide b) { return std::is_same_v<Op, tally::LogicalAnd> ? a && b : std::is_same_v<Op, tally::LogicalOr> ? a || b : !a != !b; }
};
template <class T, class Op>
struct Places {
  using Wide = tally::Located<T>;
  static auto op(Rank) { return Op{}; }
  static Wide value(Rank r, std::size_t i) { return {small<T>(r, i / 4), 100 - r}; }  // equal values: the last rank has the lower location
  static Wide fold(Wide a, Wide b) {
    const bool before = std::is_same_v<Op, tally::MinLocation> ? b.value < a.value : b.value > a.value;
    return before || (a.value == b.value && b.location < a.location) ? b : a;
  }
};

/// x to slope * x + offset. One after the other is another such map, and which comes first matters.
struct Affine {
  std::uint32_t slope, offset;
  friend bool operator==(const Affine&, const Affine&) = default;
};
struct Then {
  Affine operator()(Affine f, Affine g) const { return {f.slope * g.slope, f.offset * g.slope + g.offset}; }
};
struct Maps {
  using Wide = Affine;
  static constexpr bool forms = true;
  static auto op(Rank) { return Then{}; }
  static Affine value(Rank r, std::size_t i) { return {static_cast<std::uint32_t>(r) * 2 + 3, static_cast<std::uint32_t>(i) * 7 + static_cast<std::uint32_t>(r)}; }
  static Affine fold(Affine f, Affine g) { return Then{}(f, g); }
};
/// 2x2 matrices, as a lambda without a mark.
struct Matrix {
  std::int64_t a, b, c, d;
  friend bool operator==(const Matrix&, const Matrix&) = default;
};
struct MatrixProducts {
  using Wide = Matrix;
  static auto op(Rank) {
    return [](const Matrix& x, const Matrix& y) { return Matrix{x.a * y.a + x.b * y.c, x.a * y.b + x.b * y.d, x.c * y.a + x.d * y.c, x.c * y.b + x.d * y.d}; };
  }
  static Matrix value(Rank r, std::size_t i) { return {1, r + 1, static_cast<std::int64_t>(i % 3), 2}; }
  static Matrix fold(const Matrix& x, const Matrix& y) { return op(0)(x, y); }
};
/// A type of one's own with an operator that is said to be commutative.
struct Span3 {
  float least, most;
  std::int32_t count;
  friend bool operator==(const Span3&, const Span3&) = default;
};
struct Hulls {
  using Wide = Span3;
  static auto op(Rank) {
    return tally::commutative([](Span3 x, Span3 y) { return Span3{std::min(x.least, y.least), std::max(x.most, y.most), x.count + y.count}; });
  }
  static Span3 value(Rank r, std::size_t i) { return {small<float>(r, i), small<float>(r + 1, i), 1 + r}; }
  static Span3 fold(const Span3& x, const Span3& y) { return op(0)(x, y); }
};
struct Large {
  std::uint32_t words[10'000];
  friend bool operator==(const Large&, const Large&) = default;
};
struct LargeOnes {
  static Large value(Rank r, std::size_t i) {
    Large x;
    for (std::uint32_t k = 0; k < std::size(x.words); ++k) x.words[k] = static_cast<std::uint32_t>(r) * 1'000'003u + static_cast<std::uint32_t>(i) * 20'011u + k;
    return x;
  }
};

}  // namespace test
