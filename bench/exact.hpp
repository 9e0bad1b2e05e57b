// SPDX-License-Identifier: Apache-2.0
// Inputs whose results are exactly known in every type, for every order of folding, so that a check counts wrong
// elements without a tolerance. Values are small integers that depend on rank, place and turn, so that a missing,
// doubled (except under min and max), stale or misplaced contribution shows. Results are worked out here in
// integers, not by the library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace bench {

enum class Reduce : std::uint8_t { none, sum, prod, min, max, mean };

constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// What `rank` of `n` puts at place i. Turns tell repetitions apart.
constexpr int input_at(Reduce reduce, int n, int rank, std::size_t i, int turn) {
  const std::uint64_t place = mix(i * 1024 + static_cast<std::uint64_t>(turn) + 1);
  const std::uint64_t own = mix(place + static_cast<std::uint64_t>(rank));
  switch (reduce) {
    case Reduce::none: return static_cast<int>(own % 127);
    case Reduce::min:
    case Reduce::max: return static_cast<int>(own % 101);
    case Reduce::prod: {
      // At most 6 ranks have a 2 at any place, so the product fits into every type.
      const auto stride = static_cast<std::uint64_t>(std::max(2, (n + 5) / 6));
      return (place + static_cast<std::uint64_t>(rank)) % stride == 0 && own % 3 != 0 ? 2 : 1;
    }
    default: return static_cast<int>(own % 13);  // sums of a million ranks are still exact in float
  }
}

/// The fold of all ranks' inputs at place i. Integer sums wrap, as the library's do.
template <class T>
T result_at(Reduce reduce, int n, std::size_t i, int turn) {
  std::int64_t result = input_at(reduce, n, 0, i, turn);
  for (int rank = 1; rank < n; ++rank) {
    const int value = input_at(reduce, n, rank, i, turn);
    if (reduce == Reduce::prod) result *= value;
    else if (reduce == Reduce::min) result = std::min<std::int64_t>(result, value);
    else if (reduce == Reduce::max) result = std::max<std::int64_t>(result, value);
    else result += value;
  }
  if (reduce == Reduce::mean) return static_cast<T>(static_cast<T>(result) / static_cast<T>(n));
  return static_cast<T>(result);
}

/// Values that repeat with a period that is prime to every chunk, so they are worked out only once.
template <class T>
class Pattern {
 public:
  static Pattern input(Reduce reduce, int n, int rank, int turn) {
    Pattern p;
    for (std::size_t i = 0; i < period; ++i) p.values_[i] = static_cast<T>(input_at(reduce, n, rank, i, turn));
    return p;
  }
  static Pattern result(Reduce reduce, int n, int turn) {
    Pattern p;
    for (std::size_t i = 0; i < period; ++i) p.values_[i] = result_at<T>(reduce, n, i, turn);
    return p;
  }

  /// `first` is the place of the span's first element.
  void fill(std::span<T> to, std::size_t first = 0) const {
    for (std::size_t done = 0; done < to.size();) {
      const std::size_t from = (first + done) % period, many = std::min(period - from, to.size() - done);
      std::copy_n(values_.begin() + static_cast<std::ptrdiff_t>(from), many, to.begin() + static_cast<std::ptrdiff_t>(done));
      done += many;
    }
  }
  std::uint64_t count_wrong(std::span<const T> got, std::size_t first = 0) const {
    std::uint64_t wrong = 0;
    for (std::size_t done = 0; done < got.size();) {
      const std::size_t from = (first + done) % period, many = std::min(period - from, got.size() - done);
      for (std::size_t i = 0; i < many; ++i) wrong += got[done + i] != values_[from + i];
      done += many;
    }
    return wrong;
  }

 private:
  static constexpr std::size_t period = 4099;
  Pattern() : values_(period) {}
  std::vector<T> values_;
};

}  // namespace bench
