// SPDX-License-Identifier: Apache-2.0
// Folding the ranks' elements on a device, in the fixed bracketing of rank order, so that all ranks get the same bits, and those of the
// host where elements are not rounded in between: floats of 8 and 16 bits are added up as float here, and rounded once.
#pragma once

#include <complex>
#include <concepts>
#include <cstddef>
#include <type_traits>

#include "../reduce.hpp"
#include "../types.hpp"
#include "seam.hpp"

namespace tally::inline v0::device {

/// What elements are multiplied by first; of operators that do not, nothing.
template <class Op>
struct FactorType {
  struct None {};
  using Type = None;
};
template <class F>
struct FactorType<PremultipliedSum<F>> {
  using Type = F;
};
template <class Op>
using FactorOf = typename FactorType<Op>::Type;

template <class T, class Op>
struct Folder {
  using Wide = std::conditional_t<Small<T> && is_builtin<Op>, float, T>;
  static constexpr bool finishes = std::same_as<Op, Mean>, scales = detail::is_premultiplied<Op>;
  Op op;
  int ranks;  // whose mean it is

  TALLY_DEVICE Wide take(const T& x) const { return static_cast<Wide>(x); }
  /// Where each rank's elements are multiplied by a factor of its own, before they are folded.
  using Factor = FactorOf<Op>;
  TALLY_DEVICE Factor factor() const {
    if constexpr (scales) return op.factor;
    else return {};
  }
  TALLY_DEVICE T scale(const T& x, const Factor& by) const {
    const Wide wide = static_cast<Wide>(x);
    if constexpr (!scales) return x;
    else if constexpr (Complex<Wide> && !Complex<Factor>) return static_cast<T>(wide * static_cast<typename Wide::value_type>(by));
    else return static_cast<T>(wide * static_cast<Wide>(by));
  }
  TALLY_DEVICE Wide fold(const Wide& a, const Wide& b) const { return op(a, b); }
  TALLY_DEVICE T give(const Wide& x) const {
    if constexpr (!finishes) return static_cast<T>(x);
    else if constexpr (Complex<Wide>) return x / static_cast<typename Wide::value_type>(ranks);
    else return static_cast<T>(x / static_cast<Wide>(ranks));
  }
  /// Two elements, rounded: for algorithms that fold step by step, and finish() at the end.
  TALLY_DEVICE T combine(const T& a, const T& b) const { return static_cast<T>(op(static_cast<Wide>(a), static_cast<Wide>(b))); }
  TALLY_DEVICE T finish(const T& x) const { return give(static_cast<Wide>(x)); }
};

/// Of operations that move and fold nothing.
template <class T>
struct Mover {
  using Wide = T;
  struct Factor {};
  TALLY_DEVICE Factor factor() const { return {}; }
  TALLY_DEVICE T scale(const T& x, const Factor&) const { return x; }
  TALLY_DEVICE T take(const T& x) const { return x; }
  TALLY_DEVICE T fold(const T& a, const T&) const { return a; }
  TALLY_DEVICE T give(const T& x) const { return x; }
  TALLY_DEVICE T combine(const T& a, const T&) const { return a; }
  static constexpr bool finishes = false, scales = false;
};

/// Values that come in the order of ranks, `width` side by side. Folds of 2^k of them each are kept apart, as in a binary counter: the fold
/// of all is fold(lo, hi) = fold(lo, mid) . fold(mid, hi), mid = lo + the largest power of two below hi - lo. `most`: of ranks.
template <class F, int width, int most>
class Stack {
 public:
  using Wide = typename F::Wide;
  TALLY_DEVICE explicit Stack(const F& folder) : folder_(folder) {}
  template <class T>
  TALLY_DEVICE void push(const T (&values)[width]) {
    for (int k = 0; k < width; ++k) level_[depth_][k] = folder_.take(values[k]);
    ++depth_;
    for (int size = 1; count_ & size; size *= 2, --depth_)
      for (int k = 0; k < width; ++k) level_[depth_ - 2][k] = folder_.fold(level_[depth_ - 2][k], level_[depth_ - 1][k]);
    ++count_;
  }
  template <class T>
  TALLY_DEVICE void fold(T (&out)[width]) const {
    for (int k = 0; k < width; ++k) {
      Wide all = level_[depth_ > 0 ? depth_ - 1 : 0][k];
      for (int d = depth_ - 1; d > 0; --d) all = folder_.fold(level_[d - 1][k], all);
      out[k] = folder_.give(all);
    }
  }

 private:
  static constexpr int levels() {
    int n = 1;
    for (int size = 1; size < most; size *= 2) ++n;
    return n + 1;
  }
  const F& folder_;
  int depth_ = 0, count_ = 0;
  Wide level_[levels()][width] = {};
};

/// Ranks for which kernels are made apart: what is worked out for few is in registers.
inline constexpr int few_ranks = 8;

/// The same of all ranks' values at once, of few ranks: with the loop unrolled it is known where each lies, so all are registers.
template <class T, class F, int width, int most>
TALLY_DEVICE void fold_all(const F& folder, const T (&values)[most][width], int n, T (&out)[width]) {
  using Wide = typename F::Wide;
  Wide level[5][width] = {};
  static_assert(most <= few_ranks && few_ranks <= 8);
  TALLY_UNROLL
  for (int r = 0; r < most; ++r) {
    int depth = (r & 1) + (r >> 1 & 1) + (r >> 2 & 1);  // one level for each power of two in r
    TALLY_UNROLL
    for (int k = 0; k < width; ++k) level[depth][k] = folder.take(values[r][k]);
    TALLY_UNROLL
    for (int bit = 0; bit < 3; ++bit) {
      if ((r + 1) % (2 << bit) != 0) break;
      TALLY_UNROLL
      for (int k = 0; k < width; ++k) level[depth - 1][k] = folder.fold(level[depth - 1][k], level[depth][k]);
      --depth;
    }
    if (r + 1 < n) continue;
    TALLY_UNROLL
    for (int k = 0; k < width; ++k) {
      Wide all = level[depth][k];
      TALLY_UNROLL
      for (int d = 2; d >= 0; --d)
        if (d < depth) all = folder.fold(level[d][k], all);
      out[k] = folder.give(all);
    }
    return;
  }
}

}  // namespace tally::inline v0::device
