// SPDX-License-Identifier: Apache-2.0
// Fits y = x' v, v >= 0, to weighted observations that arrive one by one and may be forgotten, from sums alone: memory and
// time do not grow. It says what the fit is worth: standard errors, how far the columns can be told apart, what is explained.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

namespace tally::inline v0 {
namespace detail {

/// The first column has to be 1: the others' means, and how much is explained, come from it.
template <std::size_t n>
class LeastSquares {
 public:
  using Values = std::array<double, n>;
  using Matrix = std::array<Values, n>;

  struct Fit {
    Values value{};                // 0 of a column that was not seen
    Matrix covariance{};           // of the estimate without the bound, which is never less than with it; only if `solved`
    Values mean{};                 // of each column
    std::array<bool, n> seen{};    // not all but 0
    std::size_t columns = 0;       // that were seen
    bool solved = false;           // the columns are independent, and there are enough observations for errors to be told
    double observations = 0;       // as many equal ones are worth as much as those that are partly forgotten
    double condition = std::numeric_limits<double>::infinity();  // of the columns scaled to one length: an upper bound, at least sqrt(n)
    double r2 = std::numeric_limits<double>::quiet_NaN();        // the part of the variance that is explained

    /// The standard error of a' value.
    double sigma(const Values& a) const {
      double variance = 0;
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j) variance += a[i] * covariance[i][j] * a[j];
      return std::sqrt(std::max(variance, 0.0));
    }
    double sigma(std::size_t i) const { return std::sqrt(std::max(covariance[i][i], 0.0)); }
  };

  /// One observation. The variance of y's noise is taken to be proportional to 1/weight, and what came before now counts `keep` times as much.
  void add(const Values& x, double y, double weight, double keep) {
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        normal_[i][j] = keep * normal_[i][j] + weight * x[i] * x[j];
        noise_[i][j] = keep * keep * noise_[i][j] + weight * x[i] * x[j];
      }
      right_[i] = keep * right_[i] + weight * x[i] * y;
    }
    squares_ = keep * squares_ + weight * y * y;
    count_ = keep * count_ + 1;
    count_of_squares_ = keep * keep * count_of_squares_ + 1;
  }

  /// Least squares with v >= 0 by Lawson and Hanson ("Solving least squares problems", 1974, ch. 23), on the normal equations.
  ///
  /// With W the weights after forgetting and s2/weight the variance of an observation, the estimate's covariance is
  /// s2 (X'WX)^-1 (X'WVWX) (X'WX)^-1, V = diag(1/weight), which is s2 (X'WX)^-1 if nothing was forgotten; s2 is the weighted sum of squared
  /// residuals over its expectation for s2 = 1. That s2 is itself an estimate of f degrees of freedom widens it by f/(f - 2), Student's variance.
  Fit fit() const {
    Fit fit;
    fit.observations = count_of_squares_ > 0 ? count_ * count_ / count_of_squares_ : 0;
    Values scale;
    for (std::size_t i = 0; i < n; ++i) {
      fit.seen[i] = normal_[i][i] > least_ * normal_[0][0];
      fit.columns += fit.seen[i];
      scale[i] = fit.seen[i] ? std::sqrt(normal_[i][i]) : 1;
      if (normal_[0][0] > 0) fit.mean[i] = normal_[0][i] / normal_[0][0];
    }
    Matrix normal{}, noise{}, inverse{};
    Values right{};
    for (std::size_t i = 0; i < n; ++i) {
      normal[i][i] = 1;
      if (!fit.seen[i]) continue;
      right[i] = right_[i] / scale[i];
      for (std::size_t j = 0; j < n; ++j) {
        if (!fit.seen[j]) continue;
        if (i != j) normal[i][j] = normal_[i][j] / scale[i] / scale[j];
        noise[i][j] = noise_[i][j] / scale[i] / scale[j];
      }
    }
    std::array<bool, n> all;
    all.fill(true);
    for (std::size_t i = 0; i < n; ++i) {
      Values unit{};
      unit[i] = 1;
      if (!solve(normal, unit, all, inverse[i])) return fit;
    }
    fit.condition = std::sqrt(norm(normal) * norm(inverse));
    const Values value = not_negative(normal, right, fit.seen);

    double residual = squares_, trace = 0;
    Matrix spread{};  // inverse * noise * inverse
    for (std::size_t i = 0; i < n; ++i) {
      residual -= 2 * value[i] * right[i];
      for (std::size_t j = 0; j < n; ++j) {
        residual += value[i] * normal[i][j] * value[j];
        trace += inverse[i][j] * noise[j][i];
        for (std::size_t k = 0; k < n; ++k)
          for (std::size_t l = 0; l < n; ++l) spread[i][j] += inverse[i][k] * noise[k][l] * inverse[l][j];
      }
      fit.value[i] = value[i] / scale[i];
    }
    residual = std::max(residual, 0.0);
    const double variation = squares_ - (normal_[0][0] > 0 ? right_[0] * right_[0] / normal_[0][0] : 0);
    if (variation > 0) fit.r2 = 1 - residual / variation;
    const double freedom = fit.observations - static_cast<double>(fit.columns);
    if (!(freedom > 2) || !(count_ > trace)) return fit;
    const double variance = residual / (count_ - trace) * freedom / (freedom - 2);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) fit.covariance[i][j] = variance * spread[i][j] / scale[i] / scale[j];
    fit.solved = true;
    return fit;
  }

 private:
  /// a x = b for the rows and columns in `used`, 0 in the others, by Cholesky; false if a is singular.
  static bool solve(const Matrix& a, const Values& b, const std::array<bool, n>& used, Values& x) {
    Matrix root{};
    x = {};
    for (std::size_t i = 0; i < n; ++i) {
      if (!used[i]) continue;
      double right = b[i];
      for (std::size_t j = 0; j <= i; ++j) {
        if (!used[j]) continue;
        double rest = a[i][j];
        for (std::size_t k = 0; k < j; ++k) rest -= root[i][k] * root[j][k];
        if (j < i) {
          root[i][j] = rest / root[j][j];
          right -= root[i][j] * x[j];
        } else {
          if (!(rest > singular_)) return false;
          root[i][i] = std::sqrt(rest);
        }
      }
      x[i] = right / root[i][i];
    }
    for (std::size_t i = n; i-- > 0;) {
      if (!used[i]) continue;
      for (std::size_t k = i + 1; k < n; ++k) x[i] -= root[k][i] * x[k];
      x[i] /= root[i][i];
    }
    return true;
  }
  static Values not_negative(const Matrix& a, const Values& b, const std::array<bool, n>& seen) {
    std::array<bool, n> active{};
    Values x{};
    double largest = 0;
    for (const double v : b) largest = std::max(largest, std::abs(v));
    for (std::size_t turn = 0; turn < 3 * n; ++turn) {  // which is more than it needs but for rounding
      std::size_t best = n;
      double steepest = 1e-10 * largest;
      for (std::size_t i = 0; i < n; ++i) {
        if (!seen[i] || active[i]) continue;
        double slope = b[i];
        for (std::size_t j = 0; j < n; ++j) slope -= a[i][j] * x[j];
        if (slope > steepest) steepest = slope, best = i;
      }
      if (best == n) break;
      active[best] = true;
      for (Values next; solve(a, b, active, next);) {  // each turn but the last takes one out
        double step = 1;
        std::size_t out = n;
        for (std::size_t i = 0; i < n; ++i)
          if (active[i] && !(next[i] > 0) && x[i] / (x[i] - next[i]) < step) step = x[i] / (x[i] - next[i]), out = i;
        for (std::size_t i = 0; i < n; ++i) x[i] += step * (next[i] - x[i]);
        if (out == n) break;
        active[out] = false;
        x[out] = 0;
      }
    }
    for (double& v : x) v = std::max(v, 0.0);
    return x;
  }
  /// Frobenius', an upper bound of the largest eigenvalue of a symmetric matrix.
  static double norm(const Matrix& a) {
    double squares = 0;
    for (const Values& row : a)
      for (const double v : row) squares += v * v;
    return std::sqrt(squares);
  }

  static constexpr double least_ = 1e-8;      // of the first column's square: whatever is below changes nothing
  static constexpr double singular_ = 1e-12;  // of a column's square, what is left of it when the others are taken away
  Matrix normal_{}, noise_{};                 // X'WX, X'WVWX
  Values right_{};                            // X'Wy
  double squares_ = 0, count_ = 0, count_of_squares_ = 0;
};

}  // namespace detail
}  // namespace tally::inline v0
