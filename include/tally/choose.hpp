// SPDX-License-Identifier: Apache-2.0
// The algorithms there are, by type and by name, and which of them the environment asks for. Who is chosen where
// nobody asks is the business of cost.hpp.
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <vector>

#include "algorithms/chain.hpp"
#include "algorithms/direct.hpp"
#include "algorithms/double_tree.hpp"
#include "algorithms/hierarchical.hpp"
#include "algorithms/recursive.hpp"
#include "algorithms/ring.hpp"
#include "algorithms/tree.hpp"
#include "algorithms/zero_copy.hpp"
#include "call.hpp"
#include "error.hpp"

namespace tally::inline v0 {

template <class R>
concept StepsOrShare = std::same_as<R, Steps> || std::same_as<R, Share>;

/// Algorithm A can do operation O. A barrier is an all_reduce of one byte.
template <class A, Collective O>
inline constexpr bool offers = false;
template <class A>
  requires requires(Shape s) { { A::all_reduce(s) } -> StepsOrShare; }
inline constexpr bool offers<A, Collective::all_reduce> = true;
template <class A>
  requires requires(Shape s) { { A::all_reduce(s) } -> std::same_as<Steps>; }
inline constexpr bool offers<A, Collective::barrier> = true;
template <class A>
  requires requires(Shape s) { { A::reduce(s) } -> StepsOrShare; }
inline constexpr bool offers<A, Collective::reduce> = true;
template <class A>
  requires requires(Shape s) { { A::broadcast(s) } -> StepsOrShare; }
inline constexpr bool offers<A, Collective::broadcast> = true;
template <class A>
  requires requires(Shape s) { { A::all_gather(s) } -> StepsOrShare; }
inline constexpr bool offers<A, Collective::all_gather> = true;
template <class A>
  requires requires(Shape s) { { A::reduce_scatter(s) } -> StepsOrShare; }
inline constexpr bool offers<A, Collective::reduce_scatter> = true;

/// A type with a `name` and a static generator for the operation; users' own types count.
template <class A, Collective O>
concept Algorithm = offers<A, O> && requires { { A::name } -> std::convertible_to<std::string_view>; };

template <class A, Collective O>
  requires Algorithm<A, O>
constexpr AlgorithmRef algorithm_ref() {
  AlgorithmRef ref{A::name, nullptr, nullptr, detail::algorithm_code(A::name), reach_of<A>};
  const auto set = [&ref]<class R>(R (*text)(Shape)) {
    if constexpr (std::same_as<R, Steps>) ref.generate = text;
    else ref.share = text;
  };
  if constexpr (O == Collective::all_reduce || O == Collective::barrier) set(&A::all_reduce);
  else if constexpr (O == Collective::reduce) set(&A::reduce);
  else if constexpr (O == Collective::broadcast) set(&A::broadcast);
  else if constexpr (O == Collective::all_gather) set(&A::all_gather);
  else set(&A::reduce_scatter);
  return ref;
}

namespace detail {

template <Collective O, class A>
constexpr AlgorithmRef ref_or_none() {
  if constexpr (Algorithm<A, O>) return algorithm_ref<A, O>();
  else return {};
}
template <Collective O, class... As>
inline constexpr AlgorithmRef table_of[] = {ref_or_none<O, As>()...};
template <Collective O>
constexpr AlgorithmRef find_builtin(std::string_view name) {
  for (const AlgorithmRef& algorithm : table_of<O, Ring, Tree, RecursiveDoubling, OneShot, RecursiveHalving, TwoShot, Chain, DoubleTree, ZeroCopy, Staged, SingleCopy, Hierarchical>)
    if (algorithm && algorithm.name == name) return algorithm;
  return {};
}

}  // namespace detail

/// The built-in algorithm of that name for the operation; without a generator if there is none.
constexpr AlgorithmRef find_algorithm(Collective operation, std::string_view name) {
  switch (operation) {
    case Collective::all_reduce: return detail::find_builtin<Collective::all_reduce>(name);
    case Collective::barrier: return detail::find_builtin<Collective::barrier>(name);
    case Collective::reduce: return detail::find_builtin<Collective::reduce>(name);
    case Collective::broadcast: return detail::find_builtin<Collective::broadcast>(name);
    case Collective::all_gather: return detail::find_builtin<Collective::all_gather>(name);
    case Collective::reduce_scatter: return detail::find_builtin<Collective::reduce_scatter>(name);
    case Collective::none: break;
  }
  return {};
}
/// Names of the built-in algorithms that can do the operation.
inline std::vector<std::string_view> algorithms_for(Collective operation) {
  std::vector<std::string_view> names;
  for (const std::string_view name : detail::algorithm_names)
    if (find_algorithm(operation, name)) names.push_back(name);
  return names;
}

/// TALLY_ALGORITHM: a name for every operation that offers it, or "all_reduce=ring,broadcast=tree".
class AlgorithmOverrides {
 public:
  AlgorithmOverrides() = default;
  explicit AlgorithmOverrides(std::string_view text) {
    while (!text.empty()) {
      const std::string_view item = text.substr(0, text.find(','));
      text.remove_prefix(std::min(text.size(), item.size() + 1));
      parse(item);
    }
  }
  const AlgorithmRef& of(Collective operation) const { return chosen_[static_cast<std::size_t>(operation)]; }

 private:
  [[gnu::cold]] void parse(std::string_view item) {
    const std::size_t equals = item.find('=');
    const std::string_view name = equals == item.npos ? item : item.substr(equals + 1);
    const std::string_view only = equals == item.npos ? "" : item.substr(0, equals);
    bool found = name == "auto";
    for (const Collective operation : all_operations) {
      if (!only.empty() && name_of(operation) != only) continue;
      const AlgorithmRef algorithm = find_algorithm(operation, name);
      if (!algorithm) continue;
      chosen_[static_cast<std::size_t>(operation)] = algorithm;
      found = true;
    }
    if (found) return;
    std::string known;
    for (const Collective operation : all_operations) {
      known.append(known.empty() ? " " : "; ").append(name_of(operation)).append(":");
      for (const std::string_view each : algorithms_for(operation)) known.append(" ").append(each);
    }
    throw Error(Errc::invalid_argument, {"TALLY_ALGORITHM has '", item, "', which names no algorithm (known are", known, ", or auto)"});
  }
  AlgorithmRef chosen_[std::size(all_operations) + 1];
};

}  // namespace tally::inline v0
