// SPDX-License-Identifier: Apache-2.0
// The algorithms there are, by type and by name, and which of them the environment asks for. Who is chosen where
// nobody asks is the business of cost.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "algorithms/all_to_all.hpp"
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

/// Which bits a call that combines gives. All ranks always get the same.
enum class Order : std::uint8_t {
  any,    // those of the algorithm chosen
  fixed,  // one bracketing in rank order (Folding::fixed): whatever the algorithm, its pieces, the transport, the timing
};

template <class R>
concept StepsOrShare = std::same_as<R, Steps> || std::same_as<R, Share>;

namespace detail {

/// The member of an algorithm that does operation O.
template <Collective O>
struct TextOf;
template <>
struct TextOf<Collective::all_reduce> {
  template <class A>
    requires requires(Shape s) { { A::all_reduce(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::all_reduce; }
};
template <>
struct TextOf<Collective::reduce> {
  template <class A>
    requires requires(Shape s) { { A::reduce(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::reduce; }
};
template <>
struct TextOf<Collective::broadcast> {
  template <class A>
    requires requires(Shape s) { { A::broadcast(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::broadcast; }
};
template <>
struct TextOf<Collective::all_gather> {
  template <class A>
    requires requires(Shape s) { { A::all_gather(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::all_gather; }
};
template <>
struct TextOf<Collective::reduce_scatter> {
  template <class A>
    requires requires(Shape s) { { A::reduce_scatter(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::reduce_scatter; }
};
template <>
struct TextOf<Collective::gather> {
  template <class A>
    requires requires(Shape s) { { A::gather(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::gather; }
};
template <>
struct TextOf<Collective::scatter> {
  template <class A>
    requires requires(Shape s) { { A::scatter(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::scatter; }
};
template <>
struct TextOf<Collective::all_to_all> {
  template <class A>
    requires requires(Shape s) { { A::all_to_all(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::all_to_all; }
};
template <>
struct TextOf<Collective::scan> {
  template <class A>
    requires requires(Shape s) { { A::scan(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::scan; }
};
template <>
struct TextOf<Collective::exclusive_scan> {
  template <class A>
    requires requires(Shape s) { { A::exclusive_scan(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::exclusive_scan; }
};
template <>
struct TextOf<Collective::all_gather_v> {
  template <class A>
    requires requires(Shape s) { { A::all_gather_v(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::all_gather_v; }
};
template <>
struct TextOf<Collective::reduce_scatter_v> {
  template <class A>
    requires requires(Shape s) { { A::reduce_scatter_v(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::reduce_scatter_v; }
};
template <>
struct TextOf<Collective::all_to_all_v> {
  template <class A>
    requires requires(Shape s) { { A::all_to_all_v(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::all_to_all_v; }
};
template <>
struct TextOf<Collective::gather_v> {
  template <class A>
    requires requires(Shape s) { { A::gather_v(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::gather_v; }
};
template <>
struct TextOf<Collective::scatter_v> {
  template <class A>
    requires requires(Shape s) { { A::scatter_v(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::scatter_v; }
};
template <>
struct TextOf<Collective::neighbour_exchange> {
  template <class A>
    requires requires(Shape s) { { A::neighbour_exchange(s) } -> StepsOrShare; }
  static constexpr auto of() { return &A::neighbour_exchange; }
};
/// A barrier is an all_reduce of one byte.
template <>
struct TextOf<Collective::barrier> {
  template <class A>
    requires requires(Shape s) { { A::all_reduce(s) } -> std::same_as<Steps>; }
  static constexpr auto of() { return &A::all_reduce; }
};

/// The order in which A folds for O: what it says about that operation, or about all, or the least there is.
template <class A, Collective O>
constexpr Folding folding_of() {
  if constexpr (O == Collective::reduce && requires { A::reduce_folding; }) return A::reduce_folding;
  else if constexpr ((O == Collective::scan || O == Collective::exclusive_scan) && requires { A::scan_folding; }) return A::scan_folding;
  else if constexpr (requires { A::folding; }) return A::folding;
  else return Folding::any;
}

}  // namespace detail

/// Algorithm A can do operation O.
template <class A, Collective O>
inline constexpr bool offers = requires { detail::TextOf<O>::template of<A>(); };

/// A type with a `name` and a static generator for the operation; users' own types count.
template <class A, Collective O>
concept Algorithm = offers<A, O> && requires { { A::name } -> std::convertible_to<std::string_view>; };

template <class A, Collective O>
  requires Algorithm<A, O>
constexpr AlgorithmRef algorithm_ref() {
  constexpr auto text = detail::TextOf<O>::template of<A>();
  AlgorithmRef ref{A::name, nullptr, nullptr, detail::algorithm_code(A::name), reach_of<A>, detail::folding_of<A, O>()};
  if constexpr (std::same_as<decltype(text(std::declval<Shape>())), Steps>) ref.generate = text;
  else ref.share = text;
  return ref;
}

namespace detail {

/// Those of the algorithms that can do O.
template <Collective O, class... As>
constexpr auto make_table() {
  std::array<AlgorithmRef, (std::size_t{0} + ... + std::size_t{Algorithm<As, O>})> table;
  std::size_t i = 0;
  const auto add = [&]<class A>(std::type_identity<A>) {
    if constexpr (Algorithm<A, O>) table[i++] = algorithm_ref<A, O>();
  };
  (add(std::type_identity<As>()), ...);
  return table;
}
template <Collective O>
inline constexpr auto table_of =
    make_table<O, Ring, Tree, RecursiveDoubling, OneShot, RecursiveHalving, TwoShot, Chain, DoubleTree, ZeroCopy, Staged, SingleCopy, Hierarchical, HierarchicalHalving, Pairwise, Bruck>();
template <Collective O>
constexpr const AlgorithmRef* find_builtin(std::string_view name) {
  for (const AlgorithmRef& algorithm : table_of<O>)
    if (algorithm.name == name) return &algorithm;
  return nullptr;
}
constexpr const AlgorithmRef* builtin(Collective operation, std::string_view name) {
  switch (operation) {
    case Collective::all_reduce: return find_builtin<Collective::all_reduce>(name);
    case Collective::reduce: return find_builtin<Collective::reduce>(name);
    case Collective::broadcast: return find_builtin<Collective::broadcast>(name);
    case Collective::all_gather: return find_builtin<Collective::all_gather>(name);
    case Collective::reduce_scatter: return find_builtin<Collective::reduce_scatter>(name);
    case Collective::barrier: return find_builtin<Collective::barrier>(name);
    case Collective::gather: return find_builtin<Collective::gather>(name);
    case Collective::scatter: return find_builtin<Collective::scatter>(name);
    case Collective::all_to_all: return find_builtin<Collective::all_to_all>(name);
    case Collective::scan: return find_builtin<Collective::scan>(name);
    case Collective::exclusive_scan: return find_builtin<Collective::exclusive_scan>(name);
    case Collective::all_gather_v: return find_builtin<Collective::all_gather_v>(name);
    case Collective::reduce_scatter_v: return find_builtin<Collective::reduce_scatter_v>(name);
    case Collective::all_to_all_v: return find_builtin<Collective::all_to_all_v>(name);
    case Collective::gather_v: return find_builtin<Collective::gather_v>(name);
    case Collective::scatter_v: return find_builtin<Collective::scatter_v>(name);
    case Collective::neighbour_exchange: return find_builtin<Collective::neighbour_exchange>(name);
    default: return nullptr;
  }
}

}  // namespace detail

/// The built-in algorithm of that name for the operation; without a generator if there is none.
constexpr AlgorithmRef find_algorithm(Collective operation, std::string_view name) {
  const AlgorithmRef* found = detail::builtin(operation, name);
  return found ? *found : AlgorithmRef{};
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
    std::vector<std::string_view> known{"auto"};
    bool operation_known = only.empty();
    for (const Collective operation : all_operations) {
      if (!only.empty() && name_of(operation) != only) continue;
      operation_known = true;
      for (const std::string_view each : algorithms_for(operation)) {
        bool is_new = true;
        for (const std::string_view other : known) is_new = is_new && other != each;
        if (is_new) known.push_back(each);
      }
    }
    if (!operation_known) throw Error(Errc::invalid_argument, {"TALLY_ALGORITHM has '", item, "', but no operation is called '", only, "'"});
    std::string names;
    for (const std::string_view each : known) names.append(names.empty() ? "" : ", ").append(each);
    throw Error(Errc::invalid_argument, {"TALLY_ALGORITHM has '", item, "', which names no algorithm", only.empty() ? "" : " of that operation", ": it may be ", names});
  }
  AlgorithmRef chosen_[static_cast<std::size_t>(Collective::neighbour_exchange) + 1];
};

}  // namespace tally::inline v0
