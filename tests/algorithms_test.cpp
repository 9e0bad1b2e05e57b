// SPDX-License-Identifier: Apache-2.0
// Proves every algorithm with the step checker, for all rank and element counts that matter, and proves the
// checker: algorithms and plans that were damaged on purpose must be found out.
#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <tally/check.hpp>
#include <tally/choose.hpp>

#include "sanitized.hpp"

using namespace tally;

namespace {

constexpr int most_ranks = test::sanitized ? 13 : 64;  // the checker's own memory use is the same for more

std::set<std::size_t> counts(int n) {
  const auto m = static_cast<std::size_t>(n);
  std::set<std::size_t> result{0, 1, m - 1, m, m + 1, 3 * m + 1};
  if (n <= 12)
    for (std::size_t c = 0; c <= 3 * m + 1; ++c) result.insert(c);
  return result;
}

template <class A, Collective O>
void prove(Folding folding, int most = most_ranks) {
  const bool all = std::getenv("TALLY_TEST_LONG") != nullptr;
  for (int n = 1; n <= std::min(most, most_ranks); ++n) {
    if (!all && n > 32 && n != 33 && n != 47 && n < 63) continue;  // above, few of each kind
    for (const std::size_t count : counts(n)) {
      const std::set<Rank> roots = has_root(O) ? std::set<Rank>{0, n / 2, n - 1} : std::set<Rank>{0};
      for (const Rank root : roots) {
        const std::string problem = check({{O, 0, n, root, count}, folding}, algorithm_ref<A, O>().generate);
        if (!problem.empty()) FAIL(A::name << " " << name_of(O) << ", " << n << " ranks, " << count << " elements, root " << root << ": " << problem);
      }
    }
  }
  SUCCEED();
}

/// Random blocks for all ranks of a v-variant or a neighbour exchange: some empty, in any order, with gaps.
struct Irregular {
  std::vector<std::vector<std::size_t>> in_counts, in_firsts, out_counts, out_firsts;
  std::vector<std::vector<Rank>> to, from;
  std::vector<Extents> extents;
  std::vector<Layout> layouts;

  Irregular(Collective operation, int n, Rank root, bool in_place, bool packed, std::mt19937& random) {
    const auto ranks = static_cast<std::size_t>(n);
    for (auto* lists : {&in_counts, &in_firsts, &out_counts, &out_firsts}) lists->resize(ranks);
    to.resize(ranks), from.resize(ranks), extents.resize(ranks), layouts.resize(ranks);
    const auto some = [&](std::size_t most) { return std::uniform_int_distribution<std::size_t>(0, most)(random); };
    const auto counts = [&] {
      std::vector<std::size_t> list(ranks);
      for (std::size_t& count : list) count = some(3) == 0 ? 0 : some(7);
      return list;
    };
    const auto places = [&](const std::vector<std::size_t>& sizes) {
      std::vector<std::size_t> order(sizes.size()), firsts(sizes.size());
      if (packed) return std::vector<std::size_t>{};
      std::iota(order.begin(), order.end(), std::size_t{0});
      std::shuffle(order.begin(), order.end(), random);
      std::size_t at = some(3);
      for (const std::size_t block : order) firsts[block] = at, at += sizes[block] + some(2);
      return firsts;
    };
    const std::vector<std::size_t> all = counts(), firsts = places(all);  // what all ranks know
    if (operation == Collective::neighbour_exchange)
      for (std::size_t a = 0; a < ranks; ++a)
        for (std::size_t b = 0; b < ranks; ++b)
          for (std::size_t edges = some(4) < 2 ? some(2) : 0; edges > 0; --edges) to[a].push_back(static_cast<Rank>(b)), from[b].push_back(static_cast<Rank>(a));
    if (operation == Collective::all_to_all_v)
      for (std::size_t a = 0; a < ranks; ++a) in_counts[a] = counts();
    for (std::size_t r = 0; r < ranks; ++r) {
      const bool is_root = static_cast<Rank>(r) == root;
      if (operation == Collective::all_gather_v || (operation == Collective::gather_v && is_root)) out_counts[r] = all, out_firsts[r] = firsts;
      if (operation == Collective::reduce_scatter_v || (operation == Collective::scatter_v && is_root)) in_counts[r] = all, in_firsts[r] = firsts;
      if (operation == Collective::all_to_all_v) {
        for (std::size_t s = 0; s < ranks; ++s) out_counts[r].push_back(in_counts[s][r]);
        in_firsts[r] = places(in_counts[r]), out_firsts[r] = places(out_counts[r]);
      }
      std::shuffle(to[r].begin(), to[r].end(), random), std::shuffle(from[r].begin(), from[r].end(), random);
      extents[r] = {in_counts[r], in_firsts[r], out_counts[r], out_firsts[r], to[r], from[r]};
      const bool own = operation != Collective::all_to_all_v && operation != Collective::neighbour_exchange;
      layouts[r] = {operation, static_cast<Rank>(r), n, root, own ? all[r] : operation == Collective::neighbour_exchange ? 3u : 0u, in_place, 1, &extents[r]};
    }
  }
};

template <class A, Collective O>
void prove_irregular() {
  std::mt19937 random(1);
  for (int n = 1; n <= 12; ++n)
    for (int i = 0; i < 40; ++i)
      for (const bool in_place : {false, true}) {
        if (in_place && (O == Collective::all_to_all_v || O == Collective::neighbour_exchange)) continue;
        const Irregular blocks(O, n, i % n, in_place, i % 3 == 0, random);
        const std::string problem = check({blocks.layouts[0], algorithm_ref<A, O>().folding, all_conflicts, blocks.layouts}, algorithm_ref<A, O>().generate);
        if (!problem.empty()) FAIL(A::name << " " << name_of(O) << ", " << n << " ranks, blocks #" << i << (in_place ? ", in place: " : ": ") << problem);
      }
  SUCCEED();
}

template <Collective O>
void prove_shares() {
  INFO(name_of(O));
  for (int n = 1; n <= most_ranks; ++n) {
    const auto m = static_cast<std::size_t>(n);
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, m - 1, m, m + 1, 3 * m + 1})
      for (const Rank root : {0, n / 2, n - 1})
        for (const bool in_place : {false, true}) {
          if (O == Collective::broadcast && !in_place) continue;
          if (!has_root(O) && root != 0) continue;
          const std::string problem = check({{O, 0, n, root, count, in_place}, ZeroCopy::folding}, algorithm_ref<ZeroCopy, O>().share);
          if (!problem.empty()) FAIL("n " << n << " count " << count << " root " << root << (in_place ? " in place: " : ": ") << problem);
        }
  }
  CHECK(true);
}

}  // namespace

TEST_CASE("blocks of any size are proven") {
  prove_irregular<OneShot, Collective::all_gather_v>();
  prove_irregular<Ring, Collective::all_gather_v>();
  prove_irregular<OneShot, Collective::reduce_scatter_v>();
  prove_irregular<Ring, Collective::reduce_scatter_v>();
  prove_irregular<OneShot, Collective::gather_v>();
  prove_irregular<OneShot, Collective::scatter_v>();
  prove_irregular<Pairwise, Collective::all_to_all_v>();
  prove_irregular<Pairwise, Collective::neighbour_exchange>();
}
TEST_CASE("all-to-all is proven") {
  // Their work grows with the fourth power of the ranks.
  prove<Pairwise, Collective::all_to_all>(Folding::cyclic, 24);
  prove<Bruck, Collective::all_to_all>(Folding::cyclic, 24);
  prove<Bruck, Collective::all_gather>(Folding::cyclic, 40);
}
TEST_CASE("gather and scatter are proven") {
  prove<OneShot, Collective::gather>(OneShot::folding);
  prove<OneShot, Collective::scatter>(OneShot::folding);
  prove<Tree, Collective::gather>(Tree::folding);
  prove<Tree, Collective::scatter>(Tree::folding);
}
TEST_CASE("scans are proven") {
  prove<Chain, Collective::scan>(Folding::ordered);
  prove<Chain, Collective::exclusive_scan>(Folding::ordered);
  prove<RecursiveDoubling, Collective::scan>(Folding::fixed);
  prove<RecursiveDoubling, Collective::exclusive_scan>(Folding::fixed);
}
TEST_CASE("ring is proven") {
  prove<Ring, Collective::all_reduce>(Ring::folding);
  prove<Ring, Collective::all_gather>(Ring::folding);
  prove<Ring, Collective::reduce_scatter>(Ring::folding);
}
TEST_CASE("tree is proven") {
  prove<Tree, Collective::all_reduce>(Tree::folding);
  prove<Tree, Collective::reduce>(Tree::reduce_folding);
  prove<Tree, Collective::broadcast>(Tree::folding);
}
TEST_CASE("recursive doubling is proven") {
  prove<RecursiveDoubling, Collective::all_reduce>(RecursiveDoubling::folding);
  prove<RecursiveDoubling, Collective::all_gather>(RecursiveDoubling::folding);
}
TEST_CASE("one-shot is proven") {
  prove<OneShot, Collective::all_reduce>(OneShot::folding);
  prove<OneShot, Collective::reduce>(OneShot::folding);
  prove<OneShot, Collective::broadcast>(OneShot::folding);
  prove<OneShot, Collective::all_gather>(OneShot::folding);
  prove<OneShot, Collective::reduce_scatter>(OneShot::folding);
}
TEST_CASE("recursive halving is proven") {
  prove<RecursiveHalving, Collective::all_reduce>(RecursiveHalving::folding);
  prove<RecursiveHalving, Collective::reduce_scatter>(RecursiveHalving::folding);
}
TEST_CASE("two-shot is proven") {
  prove<TwoShot, Collective::all_reduce>(TwoShot::folding);
  prove<TwoShot, Collective::reduce>(TwoShot::folding);
  prove<TwoShot, Collective::broadcast>(TwoShot::folding);
}
TEST_CASE("chain is proven") {
  prove<Chain, Collective::all_reduce>(Chain::folding);
  prove<Chain, Collective::reduce>(Chain::folding);
  prove<Chain, Collective::broadcast>(Chain::folding);
}
TEST_CASE("double tree is proven") {
  prove<DoubleTree, Collective::all_reduce>(DoubleTree::folding);
  prove<DoubleTree, Collective::reduce>(DoubleTree::folding);
  prove<DoubleTree, Collective::broadcast>(DoubleTree::folding);
}
TEST_CASE("zero-copy shares are proven for every rank count and element count") {
  prove_shares<Collective::all_reduce>();
  prove_shares<Collective::reduce>();
  prove_shares<Collective::reduce_scatter>();
  prove_shares<Collective::all_gather>();
  prove_shares<Collective::broadcast>();
  prove_shares<Collective::gather>();
  prove_shares<Collective::scatter>();
  prove_shares<Collective::all_to_all>();
  prove_shares<Collective::scan>();
  prove_shares<Collective::exclusive_scan>();
}
namespace {
/// What is wrong with a two-level algorithm for any operation of n ranks at these places, if anything.
std::string check_hierarchical(int n, const Grouping& group, std::size_t count, Rank root, Folding folding) {
  std::string problem;
  if (root == 0) {
    problem += check({{Collective::all_reduce, 0, n, 0, count, false, group}, folding}, Hierarchical::all_reduce);
    problem += check({{Collective::all_reduce, 0, n, 0, count, false, group}, folding}, HierarchicalHalving::all_reduce);
    problem += check({{Collective::all_gather, 0, n, 0, count, false, group}}, Hierarchical::all_gather);
    problem += check({{Collective::reduce_scatter, 0, n, 0, count, false, group}, folding}, Hierarchical::reduce_scatter);
  }
  problem += check({{Collective::reduce, 0, n, root, count, false, group}, folding == Folding::fixed && root != 0 ? Folding::cyclic : folding}, Hierarchical::reduce);
  return problem + check({{Collective::broadcast, 0, n, root, count, true, group}}, Hierarchical::broadcast);
}
}  // namespace

TEST_CASE("hierarchical is proven for every way to lie at places") {
  // All partitions of few ranks: each rank is where an earlier one is, or at a place of its own.
  int partitions = 0;
  for (std::size_t n = 1; n <= 6; ++n) {
    std::vector<std::uint64_t> places(n);
    const auto next = [&] {
      for (std::size_t r = n; r-- > 1;) {
        if (places[r] <= *std::max_element(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(r))) return ++places[r], true;
        places[r] = 0;
      }
      return false;
    };
    do {
      const Partition partition(places);
      ++partitions;
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, n + 1, 3 * n + 1})
        for (std::size_t root = 0; root < n; ++root)
          if (const std::string problem = check_hierarchical(static_cast<int>(n), Grouping(partition), count, static_cast<Rank>(root), Folding::any); !problem.empty())
            FAIL(n << " ranks at " << Catch::Detail::stringify(places) << ", " << count << " elements, root " << root << ": " << problem);
    } while (next());
  }
  CHECK(partitions == 1 + 2 + 5 + 15 + 52 + 203);  // Bell numbers
  std::mt19937 random(7);
  for (int i = 0; i < 60; ++i) {
    std::vector<std::uint64_t> places(7 + random() % 26);
    const std::size_t hosts = 1 + random() % 9;
    for (auto& place : places) place = random() % hosts * 1000;
    const Partition partition(places);
    const auto n = static_cast<int>(places.size());
    if (const std::string problem = check_hierarchical(n, Grouping(partition), random() % 100, static_cast<Rank>(random() % places.size()), Folding::any); !problem.empty())
      FAIL(Catch::Detail::stringify(places) << ": " << problem);
  }
}
TEST_CASE("a partition numbers groups by their first ranks, and a width is the same as a list of it") {
  const std::vector<std::uint64_t> places{9, 4, 9, 9, 1, 4};
  const Partition partition(places);
  const Grouping group(partition);
  CHECK(group.count(6) == 3);
  CHECK(group.largest(6) == 3);
  CHECK((group.of(0) == 0 && group.of(1) == 1 && group.of(3) == 0 && group.of(4) == 2 && group.of(5) == 1));
  CHECK((group.number(3) == 2 && group.number(4) == 0 && group.number(5) == 1));
  CHECK((group.member(0, 1) == 2 && group.member(1, 1) == 5 && group.member(2, 0) == 4));
  CHECK((group.size(0, 6) == 3 && group.size(1, 6) == 2 && group.size(2, 6) == 1));
  CHECK(group.matters(6));
  CHECK_FALSE(Grouping(Partition(std::vector<std::uint64_t>{5, 5, 5})).matters(3));
  for (int n = 1; n <= 20; ++n)
    for (int width = 1; width <= n + 1; ++width) {
      std::vector<std::uint64_t> even;
      for (int r = 0; r < n; ++r) even.push_back(static_cast<std::uint64_t>(r / width));
      const Partition same(even);
      const Grouping list(same), wide(width);
      CHECK((list.count(n) == wide.count(n) && list.largest(n) == wide.largest(n) && list.matters(n) == wide.matters(n)));
      for (int r = 0; r < n; ++r) CHECK((list.of(r) == wide.of(r) && list.number(r) == wide.number(r) && wide.member(wide.of(r), wide.number(r)) == r && list.member(list.of(r), list.number(r)) == r));
      for (int g = 0; g < wide.count(n); ++g) CHECK(list.size(g, n) == wide.size(g, n));
    }
}
TEST_CASE("hierarchical is proven for every group") {
  for (int n = 1; n <= most_ranks; n += n < 12 ? 1 : 13)
    for (int group = 1; group <= n + 1; group += n < 12 || group < 4 ? 1 : n / 4)
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, static_cast<std::size_t>(n), static_cast<std::size_t>(3 * n + 1)})
        for (const Rank root : std::set<Rank>{0, n / 2, n - 1}) {
          // With groups of a power of two the brackets are the fixed ones.
          const Folding folding = (group & (group - 1)) == 0 ? Folding::fixed : Folding::cyclic;
          const std::string problem = check_hierarchical(n, group, count, root, folding);
          if (!problem.empty()) FAIL(n << " ranks in groups of " << group << ", " << count << " elements, root " << root << ": " << problem);
        }
  SUCCEED();
}
TEST_CASE("what has to go far goes once") {
  // Elements that cross between groups, all ranks together: each block once in each exchange of doubling, or along each edge of a tree.
  const auto crossing = [](Collective operation, Steps (*generate)(Shape), int n, int group, std::size_t count) {
    std::size_t units = 0;
    const auto texts = read_steps(generate, {operation, 0, n, 0, count, true, group});
    for (std::size_t r = 0; r < texts.size(); ++r)
      for (const Step& step : texts[r])
        if (step.verb == Verb::send && static_cast<Rank>(r) / group != step.peer / group) units += step.count();
    return units;
  };
  constexpr std::size_t count = 8 * 100;
  CHECK(crossing(Collective::all_reduce, Hierarchical::all_reduce, 64, 8, count) == 8 * 3 * count);  // 8 groups, log2(8) exchanges
  CHECK(crossing(Collective::all_reduce, HierarchicalHalving::all_reduce, 64, 8, count) == 2 * 7 * count);
  CHECK(crossing(Collective::reduce, Hierarchical::reduce, 64, 8, count) == 7 * count);
  CHECK(crossing(Collective::broadcast, Hierarchical::broadcast, 64, 8, count) == 7 * count);
  CHECK(crossing(Collective::all_gather, Hierarchical::all_gather, 64, 8, 10) == 64 * 7 * 10);        // each rank's block to each other group
  CHECK(crossing(Collective::reduce_scatter, Hierarchical::reduce_scatter, 64, 8, 10) == 64 * 7 * 10);  // each group's sum of each block
  CHECK(crossing(Collective::all_reduce, RecursiveHalving::all_reduce, 64, 8, count) == 2 * 7 * count);  // neighbours first: the least there is
  CHECK(crossing(Collective::all_reduce, RecursiveDoubling::all_reduce, 64, 8, count) == 64 * 3 * count);
  CHECK(crossing(Collective::all_reduce, OneShot::all_reduce, 64, 8, count) == 64 * 56 * count);
}
TEST_CASE("every built-in algorithm has a code of its own and is found by name") {
  const auto code = []<class A>(std::type_identity<A>) {
    CHECK(find_algorithm(Collective::all_reduce, A::name).generate == A::all_reduce);
    return find_algorithm(Collective::all_reduce, A::name).code;
  };
  const std::vector<int> codes{code(std::type_identity<Ring>{}),    code(std::type_identity<Tree>{}),  code(std::type_identity<RecursiveDoubling>{}), code(std::type_identity<OneShot>{}), code(std::type_identity<RecursiveHalving>{}),
                               code(std::type_identity<TwoShot>{}), code(std::type_identity<Chain>{}), code(std::type_identity<DoubleTree>{})};
  CHECK(codes == std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8});
}
TEST_CASE("tree reduces to root 0 in the fixed order") {
  for (int n = 1; n <= most_ranks; ++n) CHECK(check({{Collective::reduce, 0, n, 0, 3}, Folding::fixed}, Tree::reduce) == "");
}

TEST_CASE("the checker knows the declared order") {
  // Ring folds in cyclic order, which is not the fixed one as soon as a chunk starts elsewhere than at rank 0.
  CHECK(check({{Collective::all_reduce, 0, 2, 0, 4}, Folding::fixed}, Ring::all_reduce) != "");
  CHECK(check({{Collective::all_reduce, 0, 5, 0, 10}, Folding::fixed}, Ring::all_reduce) != "");
  CHECK(check({{Collective::reduce, 0, 4, 1, 1}, Folding::fixed}, Tree::reduce) != "");
}

namespace {

struct Subject {
  std::string name;
  Collective operation;
  Folding folding;
  Steps (*generate)(Shape);
  int group = 1;
};
const std::vector<Subject> subjects = {
    {"ring all_reduce", Collective::all_reduce, Folding::cyclic, Ring::all_reduce},
    {"ring all_gather", Collective::all_gather, Folding::cyclic, Ring::all_gather},
    {"ring reduce_scatter", Collective::reduce_scatter, Folding::cyclic, Ring::reduce_scatter},
    {"tree all_reduce", Collective::all_reduce, Folding::fixed, Tree::all_reduce},
    {"tree reduce", Collective::reduce, Folding::fixed, Tree::reduce},
    {"tree broadcast", Collective::broadcast, Folding::fixed, Tree::broadcast},
    {"doubling all_reduce", Collective::all_reduce, Folding::fixed, RecursiveDoubling::all_reduce},
    {"doubling all_gather", Collective::all_gather, Folding::fixed, RecursiveDoubling::all_gather},
    {"one-shot all_reduce", Collective::all_reduce, Folding::fixed, OneShot::all_reduce},
    {"one-shot reduce_scatter", Collective::reduce_scatter, Folding::fixed, OneShot::reduce_scatter},
    {"one-shot all_gather", Collective::all_gather, Folding::fixed, OneShot::all_gather},
    {"halving all_reduce", Collective::all_reduce, Folding::fixed, RecursiveHalving::all_reduce},
    {"halving reduce_scatter", Collective::reduce_scatter, Folding::fixed, RecursiveHalving::reduce_scatter},
    {"two-shot all_reduce", Collective::all_reduce, Folding::fixed, TwoShot::all_reduce},
    {"two-shot reduce", Collective::reduce, Folding::fixed, TwoShot::reduce},
    {"two-shot broadcast", Collective::broadcast, Folding::fixed, TwoShot::broadcast},
    {"chain all_reduce", Collective::all_reduce, Folding::cyclic, Chain::all_reduce},
    {"chain reduce", Collective::reduce, Folding::cyclic, Chain::reduce},
    {"chain broadcast", Collective::broadcast, Folding::cyclic, Chain::broadcast},
    {"double tree all_reduce", Collective::all_reduce, Folding::cyclic, DoubleTree::all_reduce},
    {"double tree reduce", Collective::reduce, Folding::cyclic, DoubleTree::reduce},
    {"double tree broadcast", Collective::broadcast, Folding::cyclic, DoubleTree::broadcast},
    {"hierarchical all_reduce", Collective::all_reduce, Folding::fixed, Hierarchical::all_reduce, 4},
    {"hierarchical halving all_reduce", Collective::all_reduce, Folding::fixed, HierarchicalHalving::all_reduce, 2},
    {"hierarchical reduce", Collective::reduce, Folding::fixed, Hierarchical::reduce, 2},
    {"hierarchical broadcast", Collective::broadcast, Folding::fixed, Hierarchical::broadcast, 4},
    {"hierarchical all_gather", Collective::all_gather, Folding::fixed, Hierarchical::all_gather, 2},
    {"hierarchical reduce_scatter", Collective::reduce_scatter, Folding::fixed, Hierarchical::reduce_scatter, 2},
};

bool touches(const Step& a, const Step& b, const Layout& layout) {
  struct Use {
    int space;
    std::size_t first, end;
    bool write;
  };
  const Placement placement = layout.placement();
  const auto uses = [&](const Step& s) {
    std::vector<Use> result;
    const auto add = [&](const Range& r, bool write) {
      if (r.count == 0) return;
      const std::size_t shift = r.buffer == Buffer::input ? placement.input_first : r.buffer == Buffer::output ? placement.output_first : 0;
      const int space = r.buffer == Buffer::input || (r.buffer == Buffer::output && placement.shared) ? 0 : r.buffer == Buffer::output ? 1 : 2;
      result.push_back({space, r.first + shift, r.first + shift + r.count, write});
    };
    if (s.verb != Verb::receive) add(s.from, false);
    if (s.verb != Verb::send) add(s.to, true);
    if (s.verb == Verb::copy && result.size() == 2 && result[0].space == result[1].space && result[0].first == result[1].first) result.clear();  // onto itself
    return result;
  };
  for (const Use& x : uses(a))
    for (const Use& y : uses(b))
      if (x.space == y.space && x.first < y.end && y.first < x.end && (x.write || y.write)) return true;
  return false;
}
/// Folds one value from each side, in place, in an order that may be bracketed either way: x . (acc . y) is (x . acc) . y.
bool reassociates(const Subject& subject, const Step& a, const Step& b) {
  return subject.folding == Folding::cyclic && a.verb == Verb::receive_combine && b.verb == Verb::receive_combine && a.side != b.side;
}
/// The fold that completes the sum is cyclic either way: x . (rest) and (rest) . x. In a ring it is each rank's
/// last, in trees and chains the root's.
bool completes(const Subject& subject, const std::vector<Step>& text, std::size_t i, std::size_t rank) {
  const auto is_fold = [](const Step& s) { return s.verb == Verb::receive_combine; };
  if (!subject.name.starts_with("ring")) return rank == 0;
  return std::none_of(text.begin() + static_cast<std::ptrdiff_t>(i) + 1, text.end(), is_fold);
}
/// The same queue of messages: their order is what matching goes by.
bool same_queue(const Step& a, const Step& b) { return a.peer >= 0 && a.peer == b.peer && (a.verb == Verb::send) == (b.verb == Verb::send); }
bool same_range(const Range& a, const Range& b) { return a.buffer == b.buffer && a.first == b.first && a.count == b.count; }

}  // namespace

// The element count makes all chunks non-empty and unequal, so that no mutation is harmless by accident.
TEST_CASE("swapping two neighbouring steps is caught unless they are independent") {
  int caught = 0;
  for (const Subject& subject : subjects)
    for (int n = 2; n <= 9; ++n)
      for (const bool in_place : {false, true}) {
        const CheckRequest request{{subject.operation, 0, n, 0, static_cast<std::size_t>(2 * n + 1), in_place, subject.group}, subject.folding};
        const auto texts = read_steps(subject.generate, request.layout);
        for (std::size_t r = 0; r < texts.size(); ++r)
          for (std::size_t i = 0; i + 1 < texts[r].size(); ++i) {
            const Step &a = texts[r][i], &b = texts[r][i + 1];
            Layout layout = request.layout;
            layout.me = static_cast<Rank>(r);
            const bool twins = same_queue(a, b) && same_range(a.from, b.from) && same_range(a.to, b.to);
            if (twins || (!same_queue(a, b) && !touches(a, b, layout)) || (in_place && reassociates(subject, a, b))) continue;
            auto mutated = texts;
            std::swap(mutated[r][i], mutated[r][i + 1]);
            INFO(subject.name << ", " << n << " ranks, rank " << r << ", steps " << i << " and " << i + 1 << (in_place ? ", in place" : ""));
            CHECK(check(request, mutated) != "");
            ++caught;
          }
      }
  CHECK(caught > 1000);
}

TEST_CASE("folding on the wrong side is caught") {
  int caught = 0;
  for (const Subject& subject : subjects)
    for (int n = 2; n <= 9; ++n) {
      const CheckRequest request{{subject.operation, 0, n, 0, static_cast<std::size_t>(2 * n + 1), true, subject.group}, subject.folding};
      const auto texts = read_steps(subject.generate, request.layout);
      for (std::size_t r = 0; r < texts.size(); ++r)
        for (std::size_t i = 0; i < texts[r].size(); ++i) {
          if (texts[r][i].verb != Verb::receive_combine && texts[r][i].verb != Verb::combine) continue;
          if (subject.folding == Folding::cyclic && completes(subject, texts[r], i, r)) continue;
          auto mutated = texts;
          mutated[r][i].side = mutated[r][i].side == Side::left ? Side::right : Side::left;
          INFO(subject.name << ", " << n << " ranks, rank " << r << ", step " << i);
          CHECK(check(request, mutated) != "");
          ++caught;
        }
    }
  CHECK(caught > 300);
}

TEST_CASE("a lost step, a wrong peer and a wrong range are caught") {
  for (const Subject& subject : subjects)
    for (int n = 3; n <= 6; ++n) {
      const CheckRequest request{{subject.operation, 0, n, 0, static_cast<std::size_t>(2 * n + 1), true, subject.group}, subject.folding};
      const auto texts = read_steps(subject.generate, request.layout);
      for (std::size_t r = 0; r < texts.size(); ++r)
        for (std::size_t i = 0; i < texts[r].size(); ++i) {
          INFO(subject.name << ", " << n << " ranks, rank " << r << ", step " << i);
          const Step& step = texts[r][i];
          if (step.verb == Verb::copy && same_range(step.from, step.to)) continue;
          if (step.verb == Verb::copy && step.from.buffer == Buffer::input) continue;  // in place: onto itself
          auto mutated = texts;
          mutated[r].erase(mutated[r].begin() + static_cast<std::ptrdiff_t>(i));
          CHECK(check(request, mutated) != "");
          if (step.peer >= 0) {
            mutated = texts;
            do mutated[r][i].peer = wrap(mutated[r][i].peer + 1, n);
            while (mutated[r][i].peer == static_cast<Rank>(r));
            CHECK(check(request, mutated) != "");
          }
          if (step.count() > 1 && step.verb == Verb::send) {
            mutated = texts;
            mutated[r][i].from.first += 1;
            mutated[r][i].from.count -= 1;
            CHECK(check(request, mutated) != "");
          }
        }
    }
}

TEST_CASE("dropping a class of conflicts is caught") {
  // Which classes an algorithm has at all, found by hand; each must be missed when it is dropped.
  const auto problem = [](Collective operation, Folding folding, Steps (*generate)(Shape), unsigned dropped, int n, bool in_place, int group = 1) {
    return check({{operation, 0, n, 0, static_cast<std::size_t>(2 * n + 1), in_place, group}, folding, all_conflicts & ~dropped}, generate);
  };
  for (int n = 4; n <= 9; ++n) {
    CAPTURE(n);
    for (const Subject& subject : subjects) {
      CAPTURE(subject.name);
      CHECK(problem(subject.operation, subject.folding, subject.generate, 0, n, true, subject.group) == "");
      const bool gathers_directly = subject.name == "one-shot all_gather";  // sends its input, receives elsewhere: no conflicts
      if (!gathers_directly) CHECK(problem(subject.operation, subject.folding, subject.generate, read_after_write, n, true, subject.group) != "");
    }
    CHECK(problem(Collective::all_reduce, Folding::cyclic, Ring::all_reduce, write_after_read, n, true) != "");
    CHECK(problem(Collective::all_reduce, Folding::fixed, RecursiveDoubling::all_reduce, write_after_read, n, true) != "");
    CHECK(problem(Collective::all_reduce, Folding::fixed, OneShot::all_reduce, write_after_read, n, true) != "");
    CHECK(problem(Collective::all_reduce, Folding::fixed, Tree::all_reduce, write_after_read, n, true) != "");
    CHECK(problem(Collective::all_reduce, Folding::cyclic, Ring::all_reduce, write_after_write, n, true) != "");
  }
}

TEST_CASE("illegal steps are refused with their place") {
  const auto problem = [](auto text) { return check({{Collective::all_reduce, 0, 2, 0, 4}, Folding::fixed}, std::vector<std::vector<Step>>{{text}, {}}); };
  const Range data{Buffer::output, 0, 4};
  CHECK(problem(send(2, data)).find("peer 2 is not another rank") != std::string::npos);
  CHECK(problem(send(0, data)).find("peer 0 is not another rank") != std::string::npos);
  CHECK(problem(send(-1, data)).find("not another rank") != std::string::npos);
  CHECK(problem(send(1, Range{Buffer::output, 2, 3})).find("outside of a buffer of 4") != std::string::npos);
  CHECK(problem(send(1, Range{Buffer::output, static_cast<std::size_t>(-1), 3})).find("outside") != std::string::npos);
  CHECK(problem(receive(1, Range{Buffer::input, 0, 4})).find("must not be written") != std::string::npos);
  CHECK(problem(copy(data, Range{Buffer::scratch, 0, 3})).find("differ in length") != std::string::npos);
  CHECK(problem(combine(Range{Buffer::scratch, 0, 3}, Range{Buffer::scratch, 1, 3})).find("overlap") != std::string::npos);
}

TEST_CASE("rings move the least data possible") {
  for (int n = 2; n <= 16; ++n) {
    const std::size_t count = 12 * static_cast<std::size_t>(n);
    const Layout layout{Collective::all_reduce, 1, n, 0, count, true};
    const Plan plan(Ring::all_reduce(layout.shape()), layout, sizeof(float));
    CHECK(plan.units_sent() == 2 * (count / static_cast<std::size_t>(n)) * static_cast<std::size_t>(n - 1) * sizeof(float));
    CHECK(plan.units_received() == plan.units_sent());
    CHECK(plan.messages_sent() == 2 * static_cast<std::size_t>(n - 1));
  }
}

TEST_CASE("recursive halving and two-shot move the least data possible") {
  for (int n = 2; n <= 16; ++n) {
    CAPTURE(n);
    const auto m = static_cast<std::size_t>(n);
    const std::size_t count = 12 * m, least = 2 * (count / m) * (m - 1);
    const auto plan = [&](Collective operation, Steps (*generate)(Shape), Rank me, std::size_t items) {
      const Layout layout{operation, me, n, 0, items, true};
      return Plan(generate(layout.shape()), layout, 1);
    };
    for (Rank me = 0; me < n; ++me) {
      CAPTURE(me);
      const Plan direct = plan(Collective::all_reduce, TwoShot::all_reduce, me, count);
      CHECK(direct.units_sent() == least);
      CHECK(direct.units_received() == least);
      CHECK(direct.messages_sent() == 2 * (m - 1));
      // The root sends each element once: whoever gets it first sends it to the others.
      const Plan cast = plan(Collective::broadcast, TwoShot::broadcast, me, 12 * (m - 1));
      CHECK(cast.units_sent() == (me == 0 ? 12 * (m - 1) : 12 * (m - 2)));
      const Plan halving = plan(Collective::all_reduce, RecursiveHalving::all_reduce, me, 16 * m);
      if ((n & (n - 1)) == 0) {
        CHECK(halving.units_sent() == 2 * 16 * (m - 1));
        CHECK(halving.units_received() == 2 * 16 * (m - 1));
        CHECK(1 << (halving.messages_sent() / 2) == n);
      } else {
        CHECK(halving.units_sent() <= 2 * 16 * m);
        CHECK(halving.units_received() <= 2 * 16 * m);
      }
    }
  }
}

TEST_CASE("the two trees share the work") {
  const std::size_t half = 100;
  for (int n = 3; n <= most_ranks; ++n) {
    std::vector<int> hops[2] = {std::vector<int>(static_cast<std::size_t>(n), -1), std::vector<int>(static_cast<std::size_t>(n), -1)};
    const auto texts = read_steps(DoubleTree::broadcast, {Collective::broadcast, 0, n, 0, 2 * half});
    hops[0][0] = hops[1][0] = 0;
    for (int round = 0; round < n; ++round)
      for (std::size_t r = 0; r < texts.size(); ++r)
        for (const Step& step : texts[r])
          if (const auto& from = hops[step.from.first / half]; step.verb == Verb::send && from[r] >= 0) hops[step.from.first / half][static_cast<std::size_t>(step.peer)] = from[r] + 1;
    int log2 = 0;
    while (2 << log2 <= n) ++log2;
    for (std::size_t r = 0; r < texts.size(); ++r) {
      INFO(n << " ranks, rank " << r);
      const auto sends_in = [&](std::size_t tree) { return std::count_if(texts[r].begin(), texts[r].end(), [&](const Step& s) { return s.verb == Verb::send && s.from.first == tree * half; }); };
      CHECK(sends_in(0) <= 2);
      CHECK(sends_in(1) <= 2);
      CHECK((r == 0 ? sends_in(0) == 1 && sends_in(1) == 1 : sends_in(0) == 0 || sends_in(1) == 0));
      for (const auto& tree : hops) CHECK((tree[r] >= 0 && tree[r] <= log2 + 2));
    }
  }
}
