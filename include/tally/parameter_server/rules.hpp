// SPDX-License-Identifier: Apache-2.0
// Server rules: what a pushed value does to the one that is kept, where that lies. A rule is a function of single elements; it is
// inlined into one loop per element type, which is all that depends on types here. Its state (momentum and the like) is kept beside
// the values, on the server.
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "../operators.hpp"
#include "../reduce.hpp"
#include "../types.hpp"

namespace tally::inline v0 {

/// What a rule is told beside the two values.
struct Update {
  std::uint64_t step = 1;     // how often the values beside it have been updated, this time included
  double weight = 1;          // of what was pushed; of several workers' together, the sum
  int contributions = 1;      // of so many workers; by_rank and as(Algorithm) fold them before the rule sees them
};

/// What is computed with: float for the small floats.
template <class T>
struct WorkingOf {
  using type = T;
};
template <Small T>
struct WorkingOf<T> {
  using type = float;
};
template <class T>
using Working = typename WorkingOf<T>::type;

namespace detail {

template <class R>
constexpr int states_of() {
  if constexpr (requires { R::states; }) return R::states;
  else return 0;
}
template <class R, class W, std::size_t... i>
constexpr bool takes_states(std::index_sequence<i...>) {
  return requires(const R& rule, W value, const Update& update, W& state) { { rule(value, value, update, (static_cast<void>(i), state)...) } -> std::convertible_to<W>; };
}
template <class R>
constexpr bool needs_whole_clocks() {
  if constexpr (requires { R::whole_clocks; }) return R::whole_clocks;
  else return false;
}

/// The right one of two: of several assignments the last one stays.
struct Last {
  template <class T>
  constexpr T operator()(const T&, const T& b) const { return b; }
};

}  // namespace detail

/// rule(value, pushed, update, state...) is the new value; as many states, all 0 at first, as the rule has as `R::states` (none
/// if it says nothing). What is the same for all elements of an update need be computed once: `rule.for_update<W>(update)`, if there is one,
/// returns what is called for them instead. `R::whole_clocks`: it wants what all workers push in one clock together. `R::Combine`: how that is folded, else a sum.
template <class R, class T>
concept ServerRule = Element<T> && std::is_trivially_copyable_v<R> && detail::takes_states<R, Working<T>>(std::make_index_sequence<static_cast<std::size_t>(detail::states_of<R>())>{});

/// value + pushed
struct Add {
  template <detail::Summable W>
  constexpr W operator()(W value, W pushed, const Update&) const {
    if constexpr (Integer<W>) return static_cast<W>(static_cast<std::make_unsigned_t<W>>(value) + static_cast<std::make_unsigned_t<W>>(pushed));
    else return value + pushed;
  }
};
/// The last one pushed.
struct Assign {
  using Combine = detail::Last;
  template <class W>
  constexpr W operator()(W, W pushed, const Update&) const { return pushed; }
};
/// The larger of both; NaN if either is.
struct KeepMax {
  using Combine = Max;
  template <Number W>
  constexpr W operator()(W value, W pushed, const Update&) const { return pushed > value || pushed != pushed ? pushed : value; }
};
/// Gradient descent: value - rate * gradient.
struct Sgd {
  float rate = 0.01f;
  template <detail::Fractional W>
  constexpr W operator()(W value, W gradient, const Update&) const { return value - static_cast<W>(rate) * gradient; }
};
/// Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), as frameworks have it: v = decay * v + gradient.
struct Momentum {
  static constexpr int states = 1;
  float rate = 0.01f, decay = 0.9f;
  template <detail::Fractional W>
  constexpr W operator()(W value, W gradient, const Update&, W& velocity) const {
    velocity = static_cast<W>(decay) * velocity + gradient;
    return value - static_cast<W>(rate) * velocity;
  }
};
/// Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1.
struct Adam {
  static constexpr int states = 2;
  float rate = 0.001f, first_decay = 0.9f, second_decay = 0.999f, epsilon = 1e-8f;
  template <std::floating_point W>
  struct Step {
    W rate, b1, b2, first_scale, second_scale, epsilon;
    W operator()(W value, W gradient, const Update&, W& first, W& second) const {
      first = b1 * first + (1 - b1) * gradient;
      second = b2 * second + (1 - b2) * gradient * gradient;
      return value - rate * (first / first_scale) / (std::sqrt(second / second_scale) + epsilon);
    }
  };
  template <std::floating_point W>
  Step<W> for_update(const Update& update) const {
    const W b1 = static_cast<W>(first_decay), b2 = static_cast<W>(second_decay), step = static_cast<W>(update.step);
    return {static_cast<W>(rate), b1, b2, 1 - std::pow(b1, step), 1 - std::pow(b2, step), static_cast<W>(epsilon)};
  }
  template <std::floating_point W>
  W operator()(W value, W gradient, const Update& update, W& first, W& second) const { return for_update<W>(update)(value, gradient, update, first, second); }
};
/// Duchi, Hazan and Singer, "Adaptive subgradient methods" (2011), with a diagonal matrix.
struct Adagrad {
  static constexpr int states = 1;
  float rate = 0.01f, epsilon = 1e-10f;
  template <std::floating_point W>
  W operator()(W value, W gradient, const Update&, W& squares) const {
    squares += gradient * gradient;
    return value - static_cast<W>(rate) * gradient / (std::sqrt(squares) + static_cast<W>(epsilon));
  }
};
/// The mean of the values pushed in a clock, each with its weight: federated averaging (McMahan et al., 2017) with numbers of samples.
/// Pushed values are multiplied by their weights on arrival.
struct WeightedAverage {
  static constexpr bool whole_clocks = true, weighs = true;
  template <detail::Fractional W>
  constexpr W operator()(W, W pushed, const Update& update) const { return pushed / static_cast<W>(update.weight); }
};
/// The outer optimiser of DiLoCo (Douillard et al., 2023): Nesterov's momentum on the mean of what workers moved the values by, which
/// each pushes as (value at the start of its local steps - value now).
struct NesterovOuter {
  static constexpr int states = 1;
  static constexpr bool whole_clocks = true;
  float rate = 0.7f, decay = 0.9f;
  template <detail::Fractional W>
  constexpr W operator()(W value, W pushed, const Update& update, W& velocity) const {
    const W gradient = pushed / static_cast<W>(update.contributions), mu = static_cast<W>(decay);
    velocity = mu * velocity + gradient;
    return value - static_cast<W>(rate) * (gradient + mu * velocity);
  }
};

namespace detail {

/// A rule without its type.
struct RuleOps {
  /// to = rule(from, pushed) for n elements; `to` may be `from`. `states`: where each one's begin for these elements.
  void (*apply)(const void* rule, std::byte* to, const std::byte* from, const std::byte* pushed, std::byte* const* states, std::size_t n, const Update& update) = nullptr;
  ScaleFunction weigh = nullptr;  // by a double; null: weights are only summed up
  Fold combine;                   // folds what several workers pushed
  int states = 0;
  std::size_t grain = 1, state_grain = 1;
  ElementType type = ElementType::none;
  bool whole_clocks = false;
  std::uint64_t hash = 0;  // of the rule's type and settings
};

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"  // a rule may be one that cannot be vectorised
#endif
template <class T, std::size_t width, class R, std::size_t... i>
[[gnu::always_inline]] inline void apply_with(const R& rule, std::byte* to, const std::byte* from, const std::byte* pushed, std::byte* const* states, std::size_t n, const Update& update, std::index_sequence<i...>) {
  using W = Working<T>;
  [[maybe_unused]] W* const all[] = {reinterpret_cast<W*>(states ? states[i] : nullptr)..., nullptr};
  std::size_t at = 0;
  // Of fixed length and said to be apart, or one on the other, so that compilers make vectors of it at -O2, too.
  if constexpr (std::is_arithmetic_v<T>) {
    typedef T Value [[gnu::aligned(1), gnu::may_alias]];
    for (; at + width <= n; at += width) {
      Value* const x = reinterpret_cast<Value*>(to + at * sizeof(T));
      const Value *const a = reinterpret_cast<const Value*>(from + at * sizeof(T)), *const b = reinterpret_cast<const Value*>(pushed + at * sizeof(T));
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
      for (std::size_t k = 0; k < width; ++k) x[k] = rule(static_cast<T>(a[k]), static_cast<T>(b[k]), update, all[i][at + k]...);
    }
  } else if constexpr (Small<T>) {
    for (; at + width <= n; at += width) {
      T a[width], b[width];
      std::memcpy(a, from + at * sizeof(T), sizeof a), std::memcpy(b, pushed + at * sizeof(T), sizeof b);
      for (std::size_t k = 0; k < width; ++k) a[k] = static_cast<T>(rule(static_cast<W>(a[k]), static_cast<W>(b[k]), update, all[i][at + k]...));
      std::memcpy(to + at * sizeof(T), a, sizeof a);
    }
  }
  for (; at < n; ++at) store(to + at * sizeof(T), static_cast<T>(rule(static_cast<W>(load<T>(from + at * sizeof(T))), static_cast<W>(load<T>(pushed + at * sizeof(T))), update, all[i][at]...)));
}
template <class T, class R, std::size_t width>
[[gnu::always_inline]] inline void apply_in(const R& rule, std::byte* to, const std::byte* from, const std::byte* pushed, std::byte* const* states, std::size_t n, const Update& update) {
  constexpr auto numbers = std::make_index_sequence<static_cast<std::size_t>(states_of<R>())>{};
  if constexpr (requires { rule.template for_update<Working<T>>(update); }) apply_with<T, width>(rule.template for_update<Working<T>>(update), to, from, pushed, states, n, update, numbers);
  else apply_with<T, width>(rule, to, from, pushed, states, n, update, numbers);
}
#if defined(__x86_64__)
template <class T, class R>
[[gnu::target("avx2")]] void apply_avx2(const R& rule, std::byte* to, const std::byte* from, const std::byte* pushed, std::byte* const* states, std::size_t n, const Update& update) {
  apply_in<T, R, 32>(rule, to, from, pushed, states, n, update);
}
#endif
template <class T, class R>
void apply_rule(const void* rule, std::byte* to, const std::byte* from, const std::byte* pushed, std::byte* const* states, std::size_t n, const Update& update) {
#if defined(__x86_64__)
  static const bool wide = has_avx2();
  if (wide) return apply_avx2<T>(*static_cast<const R*>(rule), to, from, pushed, states, n, update);
#endif
  apply_in<T, R, 16>(*static_cast<const R*>(rule), to, from, pushed, states, n, update);
}
#if defined(__clang__)
#pragma clang diagnostic pop
#endif
template <class T>
void weigh(const void* weight, std::byte* to, const std::byte* from, std::size_t bytes) {
  const auto factor = static_cast<Working<T>>(*static_cast<const double*>(weight));
  for (std::size_t at = 0; at < bytes; at += sizeof(T)) store(to + at, static_cast<T>(static_cast<Working<T>>(load<T>(from + at)) * factor));
}

template <class R>
struct CombineOf {
  using type = Sum;
};
template <class R>
  requires requires { typename R::Combine; }
struct CombineOf<R> {
  using type = typename R::Combine;
};

template <Element T, class R>
  requires ServerRule<R, T>
RuleOps rule_ops([[maybe_unused]] const R& rule) {
  using Op = typename CombineOf<R>::type;
  static constexpr Op combine{};
  RuleOps ops;
  ops.apply = &apply_rule<T, R>;
  if constexpr (requires { R::weighs; }) ops.weigh = &weigh<T>;
  if constexpr (std::invocable<const Op&, T, T> || is_builtin<Op>) ops.combine = fold_of<T>(combine);
  static_assert(states_of<R>() <= 8, "a rule has at most eight states");
  ops.states = states_of<R>();
  ops.grain = sizeof(T);
  ops.state_grain = sizeof(Working<T>);
  ops.type = element_type<T>();
  ops.whole_clocks = needs_whole_clocks<R>();
  ops.hash = hash_type<R>();
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)  // else settings that differ are not noticed
  if constexpr (!std::is_empty_v<R>) {
    R settings = rule;
    __builtin_clear_padding(&settings);
    ops.hash ^= hash_text({reinterpret_cast<const char*>(&settings), sizeof settings});
  }
#endif
#endif
  return ops;
}

}  // namespace detail

}  // namespace tally::inline v0
