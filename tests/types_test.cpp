// SPDX-License-Identifier: Apache-2.0
// Element types and operators: conversions of small floats against their definition, and every kernel that this
// processor can run against the operator's definition, which is written here once more.
#include <catch2/catch.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <complex>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <tally/tally.hpp>

using namespace tally;

namespace {

std::mt19937_64 random_bits(1);

struct Kernel {
  std::string name;
  detail::FoldFunction function;
};
/// All that could be chosen here, not only the best.
template <class T, class Op>
std::vector<Kernel> kernels() {
  using K = detail::KernelType<T, Op>;
  using O = detail::KernelOp<Op>;
  std::vector<Kernel> result{{"baseline", detail::fold_elements<K, O>}, {"chosen", fold_of<T>(Op{}).function}};
#if defined(__x86_64__)
  if (detail::has_avx2()) result.push_back({"avx2", detail::fold_elements_avx2<K, O>});
  if (detail::has_avx512()) result.push_back({"avx512", detail::fold_elements_avx512<K, O>});
  if constexpr (std::same_as<K, f16>) {
    if (detail::has_f16c()) result.push_back({"f16c", detail::fold_halves_f16c<O>});
    if (detail::has_avx512()) result.push_back({"f16 avx512", detail::fold_halves_avx512<O>});
  }
#endif
  return result;
}

template <class T>
bool same(const T& a, const T& b) {
  if constexpr (std::floating_point<T>) return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
  else if constexpr (Complex<T>) return same(a.real(), b.real()) && same(a.imag(), b.imag());
  else if constexpr (Small<T>) return a.bits() == b.bits();
  else if constexpr (requires { a.location; }) return same(a.value, b.value) && a.location == b.location;
  else return a == b;
}

/// Elements anywhere in memory: `shift` bytes behind where they would be aligned.
template <class T>
class Unaligned {
 public:
  Unaligned(const std::vector<T>& values, std::size_t shift) : shift_(shift), guard_(static_cast<std::byte>(guards_ += 2)), memory_(values.size() * sizeof(T) + 64 + shift, guard_) {
    if (!values.empty()) std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }
  std::byte* data() { return memory_.data() + shift_; }
  T operator[](std::size_t i) const {
    T value;
    std::memcpy(&value, memory_.data() + shift_ + i * sizeof(T), sizeof value);
    return value;
  }
  bool beyond(std::size_t count) const { return std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(shift_ + count * sizeof(T)), memory_.end(), [this](std::byte b) { return b == guard_; }); }

 private:
  inline static unsigned guards_ = 0;  // one of its own, so that folding what is behind changes it
  std::size_t shift_;
  std::byte guard_;
  std::vector<std::byte> memory_;
};

template <class T>
T any_value() {
  const std::uint64_t bits = random_bits();
  if constexpr (Small<T>) return T::from_bits(static_cast<typename T::Bits>(bits));
  else if constexpr (Complex<T>) return T(static_cast<typename T::value_type>(static_cast<int>(bits % 19) - 9), static_cast<typename T::value_type>(static_cast<int>(bits >> 32 & 15) - 7) / 4);
  else if constexpr (std::floating_point<T>) {
    constexpr T special[] = {T(0), -T(0), std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::max(), T(1)};
    if (bits % 4 == 0) return special[bits / 4 % 8];
    return static_cast<T>(static_cast<std::int64_t>(bits)) / T(3e17);
  } else if constexpr (std::same_as<T, bool>) return bits % 2 != 0;
  else if constexpr (std::same_as<T, std::byte>) return static_cast<T>(bits & 0xff);
  else return bits % 5 == 0 ? T{} : static_cast<T>(bits >> 8);
}

/// std::vector<bool> has no data().
template <class T>
struct Box {
  T value;
};
template <class T>
std::vector<Box<T>> boxes(std::size_t count) {
  std::vector<Box<T>> values(count);
  for (Box<T>& each : values) each.value = any_value<T>();
  return values;
}

/// In how many elements left . right is not as defined, to memory of its own, onto left and onto right; and what is written behind.
template <class T, class Define>
std::size_t wrong(const void* op, detail::FoldFunction fold, const std::vector<Box<T>>& left, const std::vector<Box<T>>& right, std::size_t shift, const Define& define) {
  const std::size_t count = left.size();
  std::size_t errors = 0;
  for (int way = 0; way < 3; ++way) {
    Unaligned<Box<T>> a(left, shift), b(right, 2 * shift), apart(std::vector<Box<T>>(count), 3 * shift);
    Unaligned<Box<T>>& to = way == 0 ? apart : way == 1 ? a : b;
    fold(op, to.data(), a.data(), b.data(), count * sizeof(T));
    for (std::size_t i = 0; i < count; ++i) errors += !same<T>(to[i].value, define(left[i].value, right[i].value));
    errors += !to.beyond(count);
  }
  return errors;
}
template <class T, class Op, class Define>
void check_kernels(const Define& define) {
  static_assert(Reduction<Op, T> && is_commutative<Op>);
  for (const Kernel& kernel : kernels<T, Op>()) {
    std::size_t errors = 0;
    for (const std::size_t count : {0u, 1u, 15u, 67u, 259u, 700u})
      for (const std::size_t shift : {0u, 1u}) errors += wrong<T>(nullptr, kernel.function, boxes<T>(count), boxes<T>(count), shift, define);
    INFO(Op::name << " of " << name_of(element_type<T>()) << ", " << kernel.name);
    CHECK(errors == 0);
  }
  const T a = any_value<T>(), b = any_value<T>();
  CHECK(same<T>(Op{}(a, b), define(a, b)));
}

// What the operators mean.
template <class T>
T add(T a, T b) {
  if constexpr (Small<T>) return T(static_cast<float>(a) + static_cast<float>(b));
  else if constexpr (Integer<T>) return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  else return a + b;
}
template <class T>
T multiply(T a, T b) {
  if constexpr (Small<T>) return T(static_cast<float>(a) * static_cast<float>(b));
  else if constexpr (Integer<T>) return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  else return a * b;
}
template <class T>
bool nan(T a) {
  if constexpr (Integer<T>) return false;
  else if constexpr (Small<T>) return std::isnan(static_cast<float>(a));
  else return std::isnan(a);
}
template <class T>
T lesser(T a, T b) {
  if (nan(a) || nan(b)) return std::numeric_limits<T>::quiet_NaN();
  return b < a ? b : a;
}
template <class T>
T greater(T a, T b) {
  if (nan(a) || nan(b)) return std::numeric_limits<T>::quiet_NaN();
  return b > a ? b : a;
}

template <class T>
void check_number() {
  check_kernels<T, Sum>(add<T>);
  check_kernels<T, Prod>(multiply<T>);
  check_kernels<T, Min>(lesser<T>);
  check_kernels<T, Max>(greater<T>);
  if constexpr (!Integer<T>) check_kernels<T, Mean>(add<T>);
}
template <class T>
void check_logical() {
  check_kernels<T, LogicalAnd>([](T a, T b) { return static_cast<T>(a && b); });
  check_kernels<T, LogicalOr>([](T a, T b) { return static_cast<T>(a || b); });
  check_kernels<T, LogicalXor>([](T a, T b) { return static_cast<T>(!a != !b); });
}
template <class T>
void check_bitwise() {
  check_kernels<T, BitAnd>([](T a, T b) { return static_cast<T>(a & b); });
  check_kernels<T, BitOr>([](T a, T b) { return static_cast<T>(a | b); });
  check_kernels<T, BitXor>([](T a, T b) { return static_cast<T>(a ^ b); });
}
template <class... T>
void check_integers() {
  (check_number<T>(), ...), (check_logical<T>(), ...), (check_bitwise<T>(), ...);
}

/// The value of each code of a format, from its definition.
template <class T>
long double defined(std::uint32_t code) {
  constexpr int mantissa_bits = std::numeric_limits<T>::digits - 1, bits = 8 * sizeof(T), exponent_bits = bits - 1 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  constexpr bool ieee = std::numeric_limits<T>::has_infinity;
  const int exponent = static_cast<int>(code >> mantissa_bits & ((1u << exponent_bits) - 1)), all = (1 << exponent_bits) - 1;
  const long double mantissa = static_cast<long double>(code & ((1u << mantissa_bits) - 1));
  const long double sign = code >> (bits - 1) ? -1 : 1, one = static_cast<long double>(1u << mantissa_bits);
  if (ieee && exponent == all) return mantissa == 0 ? sign * std::numeric_limits<long double>::infinity() : std::numeric_limits<long double>::quiet_NaN();
  if (!ieee && exponent == all && mantissa == one - 1) return std::numeric_limits<long double>::quiet_NaN();
  return sign * (exponent == 0 ? std::ldexp(mantissa / one, 1 - bias) : std::ldexp(1 + mantissa / one, exponent - bias));
}
template <class T>
constexpr std::uint32_t codes = 1u << (8 * sizeof(T));

template <class T>
class Nearest {
 public:
  Nearest() {
    for (std::uint32_t code = 0; std::isfinite(defined<T>(code)); ++code) values_.push_back(defined<T>(code));
    const std::size_t last = values_.size() - 1;
    values_.push_back(2 * values_[last] - values_[last - 1]);  // where the next value would be
  }
  /// The code of the nearest value, of two the even one.
  std::uint32_t operator()(float x) const {
    constexpr std::uint32_t sign_bit = codes<T> / 2;
    if (std::isnan(x)) return std::numeric_limits<T>::quiet_NaN().bits();
    const long double magnitude = std::fabs(static_cast<long double>(x));
    const std::size_t beyond = values_.size() - 1;
    std::size_t code = beyond;
    if (magnitude < values_[beyond]) {
      code = static_cast<std::size_t>(std::upper_bound(values_.begin(), values_.end(), magnitude) - values_.begin()) - 1;
      const long double below = magnitude - values_[code], above = values_[code + 1] - magnitude;
      if (above < below || (above == below && code % 2 != 0)) ++code;
    }
    if (code == beyond && !std::numeric_limits<T>::has_infinity) return std::numeric_limits<T>::quiet_NaN().bits();
    return static_cast<std::uint32_t>(code) | (std::signbit(x) ? sign_bit : 0);
  }

 private:
  std::vector<long double> values_;
};

template <class T>
void check_conversions() {
  INFO(name_of(element_type<T>()));
  std::size_t errors = 0, nans = 0;
  for (std::uint32_t code = 0; code < codes<T>; ++code) {
    const T value = T::from_bits(static_cast<typename T::Bits>(code));
    const long double want = defined<T>(code);
    nans += std::isnan(want);
    errors += value.bits() != code;
    if (std::isnan(want)) errors += !std::isnan(static_cast<float>(value)) || T(static_cast<float>(value)).bits() != std::numeric_limits<T>::quiet_NaN().bits();
    else errors += !same<long double>(static_cast<float>(value), want) || T(static_cast<float>(value)).bits() != code;
  }
  CHECK(errors == 0);
  CHECK(nans == (std::numeric_limits<T>::has_infinity ? 2 * ((1u << (std::numeric_limits<T>::digits - 1)) - 1) : 2));

  const Nearest<T> nearest;
  const auto check = [&](float x) { errors += T(x).bits() != nearest(x); };
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (std::uint32_t code = 0; code + 1 < codes<T> / 2; ++code) {
    const auto value = static_cast<float>(defined<T>(code)), middle = static_cast<float>((defined<T>(code) + defined<T>(code + 1)) / 2);
    for (const float x : {value, middle})
      for (const float y : {x, std::nextafter(x, infinity), std::nextafter(x, -infinity)}) check(y), check(-y);
  }
  for (int i = 0; i < 1'000'000; ++i) check(std::bit_cast<float>(static_cast<std::uint32_t>(random_bits())));
  using Limits = std::numeric_limits<T>;
  const auto largest = static_cast<float>(Limits::max()), step = largest - static_cast<float>(T::from_bits(static_cast<typename T::Bits>(Limits::max().bits() - 1)));
  for (const float x : {largest + step / 2, std::nextafter(largest + step / 2, 0.0f), std::nextafter(largest + step / 2, infinity), largest + step, std::numeric_limits<float>::max(), infinity, std::numeric_limits<float>::denorm_min(),
                        std::numeric_limits<float>::min(), std::bit_cast<float>(0x7f800001u), std::bit_cast<float>(0x7fffffffu), std::bit_cast<float>(0xff800001u)})
    check(x), check(-x);
  CHECK(errors == 0);

  CHECK(T{}.bits() == 0);
  CHECK(static_cast<float>(Limits::epsilon()) == static_cast<float>(T::from_bits(static_cast<typename T::Bits>(T(1.0f).bits() + 1))) - 1.0f);
  CHECK(static_cast<long double>(Limits::min()) == std::ldexp(1.0L, Limits::min_exponent - 1));
  CHECK(static_cast<long double>(Limits::denorm_min()) == defined<T>(1));
  CHECK(static_cast<long double>(Limits::max()) < std::ldexp(1.0L, Limits::max_exponent));
  CHECK(static_cast<long double>(Limits::max()) >= std::ldexp(1.0L, Limits::max_exponent - 1));
  CHECK((Limits::lowest() == -Limits::max() && !(Limits::quiet_NaN() == Limits::quiet_NaN()) && T(1.0f) < T(2.0f) && T(0.0f) == T(-0.0f)));
  CHECK((!Limits::has_infinity || static_cast<float>(Limits::infinity()) == infinity));
}

/// Every code on the left, with many on the right.
template <class T, class Op, class Define>
void check_all_codes(std::size_t others, const Define& define) {
  std::vector<Box<T>> left(codes<T>), right(codes<T>);
  for (std::uint32_t code = 0; code < codes<T>; ++code) left[code].value = T::from_bits(static_cast<typename T::Bits>(code));
  const std::vector<Kernel> all = kernels<T, Op>();
  std::vector<std::size_t> errors(all.size());
  for (std::size_t i = 0; i < others; ++i) {
    using Bits = typename T::Bits;
    const std::uint32_t special[] = {0, codes<T> / 2, 1, T(1.0f).bits(), std::numeric_limits<T>::max().bits(), std::numeric_limits<T>::quiet_NaN().bits(), std::numeric_limits<T>::quiet_NaN().bits() | codes<T> / 2, std::numeric_limits<T>::min().bits(), std::numeric_limits<T>::infinity().bits(), std::numeric_limits<T>::infinity().bits() | codes<T> / 2, std::numeric_limits<T>::infinity().bits() + 1u};
    const std::uint32_t code = others == codes<T> ? static_cast<std::uint32_t>(i) : i < std::size(special) ? special[i] : static_cast<std::uint32_t>(random_bits() % codes<T>);
    std::vector<Box<T>> want(codes<T>), got(codes<T>);
    for (std::size_t k = 0; k < codes<T>; ++k) right[k].value = T::from_bits(static_cast<Bits>(code)), want[k].value = define(left[k].value, right[k].value);
    for (std::size_t k = 0; k < all.size(); ++k) {
      all[k].function(nullptr, reinterpret_cast<std::byte*>(got.data()), reinterpret_cast<const std::byte*>(left.data()), reinterpret_cast<const std::byte*>(right.data()), codes<T> * sizeof(T));
      errors[k] += std::memcmp(got.data(), want.data(), codes<T> * sizeof(T)) != 0;
    }
  }
  for (std::size_t k = 0; k < all.size(); ++k) {
    INFO(Op::name << " of " << name_of(element_type<T>()) << ", " << all[k].name);
    CHECK(errors[k] == 0);
  }
}
template <class T>
void check_small() {
  constexpr std::size_t others = sizeof(T) == 1 ? codes<T> : 40;
  check_conversions<T>();
  check_number<T>();
  check_all_codes<T, Sum>(others, add<T>);
  check_all_codes<T, Prod>(others, multiply<T>);
  check_all_codes<T, Min>(others, lesser<T>);
  check_all_codes<T, Max>(others, greater<T>);
}

template <class T>
Box<T> folded(detail::FoldFunction fold, const void* op, T a, T b) {
  Box<T> left{a}, right{b}, result{};
  fold(op, reinterpret_cast<std::byte*>(&result), reinterpret_cast<const std::byte*>(&left), reinterpret_cast<const std::byte*>(&right), sizeof(T));
  return result;
}

struct Pair {
  std::int32_t first = 0;
  float second = 0;
  friend bool operator==(const Pair&, const Pair&) = default;
};
struct NoDefault {
  explicit NoDefault(int v) : value(v) {}
  int value;
};
enum class Colour : std::uint16_t { red, green };

}  // namespace

TEST_CASE("bf16") { check_small<bf16>(); }
TEST_CASE("f16") { check_small<f16>(); }
TEST_CASE("fp8_e4m3") { check_small<fp8_e4m3>(); }
TEST_CASE("fp8_e5m2") { check_small<fp8_e5m2>(); }

TEST_CASE("small floats are what they are elsewhere") {
  // From the definitions, by hand.
  CHECK((bf16(1.0f).bits() == 0x3f80 && f16(1.0f).bits() == 0x3c00 && fp8_e4m3(1.0f).bits() == 0x38 && fp8_e5m2(1.0f).bits() == 0x3c));
  CHECK((static_cast<float>(fp8_e4m3::from_bits(0x7e)) == 448 && std::isnan(static_cast<float>(fp8_e4m3::from_bits(0x7f))) && fp8_e4m3(464.0f).bits() == 0x7e && std::isnan(static_cast<float>(fp8_e4m3(464.1f)))));
  CHECK((static_cast<float>(fp8_e5m2::from_bits(0x7b)) == 57344 && fp8_e5m2(61440.0f).bits() == 0x7c && static_cast<float>(f16::from_bits(0x7bff)) == 65504 && f16(65520.0f).bits() == 0x7c00));
  CHECK((static_cast<float>(f16::from_bits(1)) == 0x1p-24f && static_cast<float>(fp8_e4m3::from_bits(1)) == 0x1p-9f && static_cast<float>(fp8_e5m2::from_bits(1)) == 0x1p-16f && static_cast<float>(bf16::from_bits(1)) == 0x1p-133f));
  static_assert(std::is_trivially_copyable_v<bf16> && std::is_standard_layout_v<f16> && sizeof(bf16) == 2 && sizeof(f16) == 2 && sizeof(fp8_e4m3) == 1 && sizeof(fp8_e5m2) == 1);
  static_assert(!std::is_convertible_v<float, bf16> && std::is_convertible_v<bf16, float> && static_cast<float>(f16(0.1f)) == 0x1.998p-4f);
}

TEST_CASE("numbers: every operator, every kernel") {
  check_integers<signed char, unsigned char, char, short, unsigned short, int, unsigned, long, unsigned long, long long, unsigned long long>();
  check_number<float>();
  check_number<double>();
  check_number<long double>();
}
TEST_CASE("bytes, bools and complex numbers") {
  check_bitwise<std::byte>();
  check_logical<bool>();
  const auto product = []<class C>(const C& a, const C& b) { return C(a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()); };
  check_kernels<std::complex<float>, Sum>([](std::complex<float> a, std::complex<float> b) { return a + b; });
  check_kernels<std::complex<double>, Mean>([](std::complex<double> a, std::complex<double> b) { return a + b; });
  check_kernels<std::complex<float>, Prod>(product);
  check_kernels<std::complex<double>, Prod>(product);
  // A byte of another program's bool may hold more than 1.
  for (const Kernel& kernel : kernels<bool, LogicalXor>()) CHECK(folded<unsigned char>(kernel.function, nullptr, 2, 4).value == 0);
  for (const Kernel& kernel : kernels<bool, LogicalAnd>()) CHECK(folded<unsigned char>(kernel.function, nullptr, 2, 4).value == 1);
  // Integers wrap.
  CHECK(sum(std::numeric_limits<int>::max(), 1) == std::numeric_limits<int>::min());
  CHECK(prod(std::uint16_t{0xffff}, std::uint16_t{0xffff}) == 1);
  CHECK(sum(std::int8_t{-128}, std::int8_t{-1}) == 127);
}

TEST_CASE("a NaN anywhere makes min and max NaN, of equal values the left one stays") {
  const auto check = []<class T>(T one) {
    const T nan_value = std::numeric_limits<T>::quiet_NaN();
    const auto negative_zero = static_cast<T>(-0.0f), zero = static_cast<T>(0.0f), infinity = std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::max();
    std::array<T, 5> values{one, nan_value, infinity, negative_zero, static_cast<T>(-1.0f)};
    for (const auto& all : {kernels<T, Min>(), kernels<T, Max>()})
      for (const Kernel& kernel : all) {
        INFO(name_of(element_type<T>()) << ", " << kernel.name);
        // All orders and bracketings of folds one by one; the tail loop and, 64 times, the vectors.
        std::array<int, 5> order{0, 1, 2, 3, 4};
        std::size_t errors = 0;
        do {
          for (const bool to_left : {false, true}) {
            std::vector<T> result(64, values[static_cast<std::size_t>(order[0])]);
            for (std::size_t i = 1; i < order.size(); ++i) {
              const std::vector<T> next(64, values[static_cast<std::size_t>(order[i])]);
              auto* const to = reinterpret_cast<std::byte*>(result.data());
              const auto* const other = reinterpret_cast<const std::byte*>(next.data());
              kernel.function(nullptr, to, to_left ? other : to, to_left ? to : other, 63 * sizeof(T));
            }
            for (std::size_t i = 0; i < 63; ++i) errors += !std::isnan(static_cast<double>(result[i]));
          }
        } while (std::next_permutation(order.begin(), order.end()));
        CHECK(errors == 0);
        CHECK(same(folded<T>(kernel.function, nullptr, negative_zero, zero).value, negative_zero));
        CHECK(same(folded<T>(kernel.function, nullptr, zero, negative_zero).value, zero));
      }
  };
  check(1.0f), check(1.0), check(bf16(1.0f)), check(f16(1.0f)), check(fp8_e4m3(1.0f)), check(fp8_e5m2(1.0f));
}

TEST_CASE("min_location and max_location do not depend on the order") {
  const auto check = []<class T, class Op>(T, const Op& op) {
    static_assert(Reduction<Op, Located<T>> && !Reduction<Op, T> && !Reduction<Sum, Located<T>> && std::is_trivially_copyable_v<Located<T>>);
    constexpr bool smallest = std::same_as<Op, MinLocation>;
    const Fold fold = fold_of<Located<T>>(op);
    for (int round = 0; round < 2000; ++round) {
      std::vector<Located<T>> values;
      for (int i = 0; i < 6; ++i) {
        const std::uint64_t bits = random_bits();
        if (!Integer<T> && bits % 8 == 0) values.push_back({std::numeric_limits<T>::quiet_NaN(), i});
        else values.push_back({static_cast<T>(static_cast<float>(bits / 8 % 4)), i});
      }
      Located<T> want = values[0];  // in the order of locations: only what is strictly better replaces
      for (const Located<T>& each : values)
        if (!nan(want.value) && (nan(each.value) || (smallest ? each.value < want.value : each.value > want.value))) want = each;
      std::shuffle(values.begin(), values.end(), random_bits);
      Located<T> got = values[0];
      for (std::size_t i = 1; i < values.size(); ++i) got = i % 2 ? folded(fold.function, fold.op, got, values[i]).value : folded(fold.function, fold.op, values[i], got).value;
      REQUIRE(same(got, want));
    }
  };
  check(1.0f, min_location), check(1.0f, max_location), check(1.0, min_location), check(1, min_location), check(1, max_location), check(bf16(1.0f), max_location), check(1.0L, min_location);
  CHECK(min_location(Located<float>{2, 5}, Located<float>{2, 3}) == Located<float>{2, 3});
  CHECK(max_location(Located<int>{2, -5}, Located<int>{2, 3}) == Located<int>{2, -5});
  CHECK(max_location(Located<float>{-0.0f, 1}, Located<float>{0.0f, 0}).location == 0);
}

TEST_CASE("premultiplied sums scale before they fold, means divide after") {
  const auto check = []<class T, class F>(T, F factor, const auto& multiply_by) {
    const auto op = premultiplied_sum(factor);
    static_assert(Reduction<decltype(op), T> && is_commutative<std::remove_cv_t<decltype(op)>> && std::same_as<std::remove_cv_t<decltype(op)>, PremultipliedSum<F>>);
    const ScaleFunction scale = scale_of<T, PremultipliedSum<F>>();
    REQUIRE(scale);
    for (const std::size_t count : {0u, 1u, 37u, 500u}) {
      const std::vector<Box<T>> values = boxes<T>(count);
      Unaligned<Box<T>> from(values, 1), to(std::vector<Box<T>>(count), 2);
      std::size_t errors = 0;
      for (Unaligned<Box<T>>* const target : {&to, &from}) {
        scale(&op, target->data(), from.data(), count * sizeof(T));
        for (std::size_t i = 0; i < count; ++i) errors += !same<T>((*target)[i].value, multiply_by(values[i].value));
        errors += !target->beyond(count);
      }
      CHECK(errors == 0);
      CHECK(fold_of<T>(op).function == fold_of<T>(sum).function);
    }
    std::vector<T> data;
    for (const Box<T>& each : boxes<T>(301)) data.push_back(each.value);
    const std::vector<T> before = data;
    detail::divide<T>(data.data(), 300, 3);
    std::size_t errors = !same<T>(data[300], before[300]);
    for (std::size_t i = 0; i < 300; ++i) {
      if constexpr (Small<T>) errors += !same<T>(data[i], T(static_cast<float>(before[i]) / 3));
      else if constexpr (Complex<T>) errors += !same<T>(data[i], T(before[i].real() / 3, before[i].imag() / 3));
      else errors += !same<T>(data[i], before[i] / 3);
    }
    CHECK(errors == 0);
  };
  check(1.0f, 0.3f, [](float x) { return x * 0.3f; });
  check(1.0f, 0.3, [](float x) { return x * 0.3f; });
  check(1.0, 0.3, [](double x) { return x * 0.3; });
  check(1.0, 0.3f, [](double x) { return x * static_cast<double>(0.3f); });
  check(1.0L, 0.3, [](long double x) { return x * 0.3; });
  check(bf16{}, 0.3f, [](bf16 x) { return bf16(static_cast<float>(x) * 0.3f); });
  check(f16{}, 0.3, [](f16 x) { return f16(static_cast<float>(x) * 0.3f); });
  check(f16{}, f16(0.3f), [](f16 x) { return f16(static_cast<float>(x) * static_cast<float>(f16(0.3f))); });
  check(fp8_e4m3{}, 0.3f, [](fp8_e4m3 x) { return fp8_e4m3(static_cast<float>(x) * 0.3f); });
  check(fp8_e5m2{}, 1.7f, [](fp8_e5m2 x) { return fp8_e5m2(static_cast<float>(x) * 1.7f); });
  using C = std::complex<float>;
  check(C{}, 0.5f, [](C x) { return C(x.real() * 0.5f, x.imag() * 0.5f); });
  check(C{}, C(2, -1), [](C x) { return C(2 * x.real() + x.imag(), 2 * x.imag() - x.real()); });
  check(std::complex<double>{}, 0.5f, [](std::complex<double> x) { return x * 0.5; });
  CHECK(!scale_of<float, Sum>());
  CHECK(!scale_of<float, Mean>());
  static_assert(!Reduction<PremultipliedSum<float>, int> && !Reduction<PremultipliedSum<bf16>, float>);
}

TEST_CASE("the error of 16-bit sums keeps its bound") {
  // n values of p bits, in any order: |error| <= (n - 1) 2^-p sum|x|. A float has more than 2p + 1 bits, so folding in
  // float and rounding once is rounding the exact sum of two.
  const auto check = []<class T>(T) {
    const double u = std::ldexp(1.0, -std::numeric_limits<T>::digits);
    const Fold fold = fold_of<T>(sum);
    for (const std::size_t n : {2u, 9u, 64u, 500u}) {
      constexpr std::size_t width = 97;
      std::vector<T> result(width), next(width);
      std::vector<double> exact(width), magnitude(width);
      for (std::size_t r = 0; r < n; ++r) {
        for (std::size_t i = 0; i < width; ++i) {
          next[i] = T(static_cast<float>(static_cast<std::int64_t>(random_bits() % 2001) - (i % 2 ? 1000 : 0)) / 1000.0f);
          exact[i] += static_cast<double>(next[i]), magnitude[i] += std::fabs(static_cast<double>(next[i]));
        }
        if (r == 0) result = next;
        else fold(reinterpret_cast<std::byte*>(result.data()), reinterpret_cast<const std::byte*>(result.data()), reinterpret_cast<const std::byte*>(next.data()), width * sizeof(T));
      }
      for (std::size_t i = 0; i < width; ++i) REQUIRE(std::fabs(static_cast<double>(result[i]) - exact[i]) <= static_cast<double>(n - 1) * u * magnitude[i]);
    }
    // And it is nearly reached: 1 and many values of half its last bit.
    T result(1.0f);
    for (int i = 0; i < 8; ++i) result = folded(fold.function, fold.op, result, T(static_cast<float>(u))).value;
    CHECK(static_cast<float>(result) == 1.0f);
    const double error = 8 * u, bound = 8 * u * (1 + 8 * u);
    CHECK((error <= bound && error > 0.96 * bound));
  };
  check(bf16{}), check(f16{});
  CHECK((std::numeric_limits<bf16>::digits == 8 && std::numeric_limits<f16>::digits == 11));
}

TEST_CASE("what can be moved and what can be folded") {
  const auto product = [](float a, float b) { return a * b; };
  using Product = decltype(product);
  static_assert(Element<float> && Element<bool> && Element<std::byte> && Element<std::complex<double>> && Element<bf16> && Element<long double> && Element<Pair> && Element<NoDefault> && Element<Colour> && Element<std::array<int, 3>>);
  static_assert(!Element<int*> && !Element<const int> && !Element<const Pair> && !Element<std::string> && !Element<std::array<char, 65536>> && Element<std::array<char, 65535>> && !Element<int[3]> && !Element<void (*)()>);
  static_assert(!Reduction<Sum, bool> && !Reduction<Min, bool> && Reduction<LogicalXor, bool> && !Reduction<BitAnd, bool> && !Reduction<BitAnd, float> && !Reduction<LogicalAnd, float> && !Reduction<LogicalAnd, std::byte> && Reduction<BitAnd, std::byte> && !Reduction<Sum, std::byte>);
  static_assert(!Reduction<Mean, int> && Reduction<Mean, f16> && Reduction<Mean, std::complex<float>> && !Reduction<Min, std::complex<float>> && !Reduction<Sum, Pair> && !Reduction<Sum, Colour>);
  static_assert(Reduction<Product, float> && !Reduction<Product, Pair> && Reduction<Commutative<Product>, float> && Reduction<std::plus<>, double>);
  static_assert(!is_commutative<Product> && is_commutative<Commutative<Product>> && !is_commutative<std::plus<>> && is_commutative<Sum> && is_commutative<Mean> && is_commutative<MinLocation> && is_commutative<PremultipliedSum<float>>);
  static_assert(!is_builtin<Product> && is_builtin<Sum> && is_builtin<Mean>);

  CHECK((element_type<long>() == ElementType::i64 && element_type<long long>() == ElementType::i64 && element_type<char>() == element_type<signed char>() && element_type<unsigned short>() == ElementType::u16));
  CHECK((element_type<bool>() == ElementType::boolean && element_type<std::byte>() == ElementType::byte && element_type<std::complex<float>>() == ElementType::c64 && element_type<std::complex<double>>() == ElementType::c128));
  CHECK((element_type<bf16>() == ElementType::bfloat16 && element_type<f16>() == ElementType::float16 && element_type<fp8_e4m3>() == ElementType::e4m3 && element_type<fp8_e5m2>() == ElementType::e5m2 && element_type<long double>() == ElementType::f80));
  const auto code = static_cast<int>(element_type<Pair>());
  CHECK((code >= 24 && code < 64 && element_type<Colour>() != element_type<Pair>()));
  CHECK(name_of(element_type<Pair>()) == "user type #" + std::to_string(code - 24));
  CHECK((name_of(ElementType::c128) == "complex128" && name_of(ElementType::bfloat16) == "bfloat16" && name_of(ElementType::f32) == "float32" && name_of(ElementType::byte) == "byte" && name_of(static_cast<ElementType>(21)) == "unknown type"));
  CHECK((name_of(static_cast<ElementType>(63)) == "user type #39" && name_of(ElementType::e5m2) == "fp8_e5m2" && name_of(ElementType::boolean) == "bool"));

  CHECK((detail::operator_code<Sum>() == 1 && detail::operator_code<Mean>() == 5 && detail::operator_code<MaxLocation>() == 14 && detail::operator_code<PremultipliedSum<double>>() == 12 && detail::operator_code<Product>() >= 16));
  CHECK((detail::operator_text(11) == "lxor" && detail::operator_text(12) == "premultiplied_sum" && detail::operator_text(16) == "user operator #16"));

  const auto later = [](NoDefault, NoDefault b) { return b; };
  const Fold fold = fold_of<NoDefault>(later);
  const NoDefault a(1), b(2);
  NoDefault result(0);
  fold(reinterpret_cast<std::byte*>(&result), reinterpret_cast<const std::byte*>(&a), reinterpret_cast<const std::byte*>(&b), sizeof a);
  CHECK(result.value == 2);
}

TEST_CASE("collectives take all of them") {
  launch(
      3,
      [](Communicator& comm) {
        const int me = comm.rank();
        const auto expect = [](bool ok, const char* what) {
          if (!ok) throw std::runtime_error(what);
        };
        std::vector<bf16> halves(5000, bf16(static_cast<float>(me + 1)));
        comm.all_reduce(halves, sum);
        expect(halves[0] == 6 && halves[4999] == 6, "sum of bf16");
        std::vector<f16> f16s(100, f16(static_cast<float>(me)));
        comm.all_reduce(f16s, mean);
        expect(f16s[0] == 1 && f16s[99] == 1, "mean of f16");
        std::array<bool, 3> flags{me == 1, true, me > 0};
        comm.all_reduce(flags, land);
        expect(!flags[0] && flags[1] && !flags[2], "land of bools");
        std::vector<std::complex<float>> numbers(10, {1, static_cast<float>(me)});
        comm.all_reduce(numbers, prod);
        expect(numbers[9] == std::complex<float>(-1, 3), "prod of complex");  // 1 (1 + i) (1 + 2i)
        std::array<Located<float>, 2> places{Located<float>{static_cast<float>(-me), me}, {7, 10 - me}};
        comm.all_reduce(places, min_location);
        expect(places[0] == Located<float>{-2, 2} && places[1] == Located<float>{7, 8}, "min_location");
        std::vector<Pair> pairs(50, {me, 1.0f});
        comm.all_reduce(pairs, commutative([](const Pair& a, const Pair& b) { return Pair{a.first + b.first, a.second * 2 * b.second}; }));
        expect(pairs[49] == Pair{3, 4.0f}, "a user's type");
        std::array<Colour, 1> colour{me == 2 ? Colour::green : Colour::red};
        comm.broadcast(colour, 2);
        expect(colour[0] == Colour::green, "broadcast of an enum");
      },
      threads);
}
