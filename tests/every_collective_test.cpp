// SPDX-License-Identifier: Apache-2.0
// Every operation with every algorithm for it, element types, operators, counts, numbers of ranks, forms of the call, in
// place and not, on both transports: all pairs of these by a seeded choice, and with TALLY_TEST_LONG=1 the whole product.
#include <catch2/catch.hpp>

#include <map>
#include <random>
#include <set>
#include <utility>

#include "kinds.hpp"

using namespace test;

namespace {

template <class T, class Spec>
std::unique_ptr<const Kind> kind(const char* name) { return std::make_unique<KindOf<T, Spec>>(name); }

const std::vector<std::unique_ptr<const Kind>>& kinds() {
  static const std::vector<std::unique_ptr<const Kind>> all = [] {
    using namespace tally;
    std::vector<std::unique_ptr<const Kind>> k;
    k.push_back(kind<std::int8_t, Sums<std::int8_t>>("int8 sum"));
    k.push_back(kind<std::int8_t, Products<std::int8_t>>("int8 prod"));
    k.push_back(kind<std::int16_t, Minima<std::int16_t>>("int16 min"));
    k.push_back(kind<std::int32_t, SumsInEveryForm<std::int32_t>>("int32 sum"));
    k.push_back(kind<std::int32_t, Bits<std::int32_t, BitAnd, false>>("int32 band"));
    k.push_back(kind<std::int64_t, Maxima<std::int64_t>>("int64 max"));
    k.push_back(kind<std::int64_t, Bits<std::int64_t, BitXor, true>>("int64 bxor"));
    k.push_back(kind<std::uint8_t, Sums<std::uint8_t>>("uint8 sum"));
    k.push_back(kind<std::uint8_t, Bits<std::uint8_t, BitOr, true>>("uint8 bor"));
    k.push_back(kind<std::uint16_t, Logic<std::uint16_t, LogicalAnd>>("uint16 land"));
    k.push_back(kind<std::uint16_t, Products<std::uint16_t>>("uint16 prod"));
    k.push_back(kind<std::uint32_t, Logic<std::uint32_t, LogicalOr>>("uint32 lor"));
    k.push_back(kind<std::uint64_t, Logic<std::uint64_t, LogicalXor>>("uint64 lxor"));
    k.push_back(kind<std::uint64_t, Sums<std::uint64_t>>("uint64 sum"));
    k.push_back(kind<float, SumsInEveryForm<float>>("float sum"));
    k.push_back(kind<float, Means<float>>("float mean"));
    k.push_back(kind<float, Premultiplied<float>>("float premultiplied_sum"));
    k.push_back(kind<double, Minima<double>>("double min"));
    k.push_back(kind<double, Means<double>>("double mean"));
    k.push_back(kind<long double, Sums<long double>>("long double sum"));
    k.push_back(kind<bf16, SumsInEveryForm<bf16>>("bf16 sum"));
    k.push_back(kind<bf16, Premultiplied<bf16>>("bf16 premultiplied_sum"));
    k.push_back(kind<f16, Sums<f16>>("f16 sum"));
    k.push_back(kind<f16, Maxima<f16>>("f16 max"));
    k.push_back(kind<fp8_e4m3, Sums<fp8_e4m3>>("e4m3 sum"));
    k.push_back(kind<fp8_e5m2, Minima<fp8_e5m2>>("e5m2 min"));
    k.push_back(kind<std::complex<float>, Sums<std::complex<float>>>("complex<float> sum"));
    k.push_back(kind<std::complex<double>, Products<std::complex<double>>>("complex<double> prod"));
    k.push_back(kind<bool, Logic<bool, LogicalAnd>>("bool land"));
    k.push_back(kind<bool, Logic<bool, LogicalXor>>("bool lxor"));
    k.push_back(kind<std::byte, Bits<std::byte, BitXor, true>>("byte bxor"));
    k.push_back(kind<Located<double>, Places<double, MinLocation>>("double min_location"));
    k.push_back(kind<Located<std::int64_t>, Places<std::int64_t, MaxLocation>>("int64 max_location"));
    k.push_back(kind<Affine, Maps>("affine map"));
    k.push_back(kind<Matrix, MatrixProducts>("matrix product"));
    k.push_back(kind<Span3, Hulls>("hull"));
    k.push_back(kind<Large, LargeOnes>("of 40000 bytes"));
    return k;
  }();
  return all;
}

struct Way {
  Collective operation;
  std::string_view algorithm;
};
const std::vector<Way>& ways() {
  static const std::vector<Way> all = [] {
    std::vector<Way> result;
    for (const Collective o : tally::all_operations) {
      if (tally::sizes_differ(o)) continue;  // blocks_test.cpp
      result.push_back({o, ""});
      for (const std::string_view name : tally::algorithms_for(o)) result.push_back({o, name});
    }
    return result;
  }();
  return all;
}

constexpr int count_classes = 7;
std::size_t count_of(int which, int n) {
  const auto ranks = static_cast<std::size_t>(n);
  const std::size_t counts[count_classes] = {0, 1, ranks - 1, ranks, ranks + 1, 3 * ranks + 1, 1000};
  return counts[which];
}
bool sensible(const Way& way, const Kind& kind, std::size_t count) {
  if (tally::reduces(way.operation) && (!kind.folds || (!kind.scans && (way.operation == Collective::scan || way.operation == Collective::exclusive_scan)))) return false;
  return kind.size < 1000 || count <= 10;
}
Form form_of(const Way& way, const Kind& kind, int wish) { return !tally::reduces(way.operation) || kind.every_form ? static_cast<Form>(wish) : Form::blocking; }

/// Each rank count's share of the cases: all ways, counts and in place or not, with a deck of kinds, forms and roots that is dealt out.
std::vector<Case> chosen(int n, unsigned seed) {
  std::vector<Case> cases;
  for (const Way& way : ways()) {
    // From rank count to rank count a way's deck goes on, so it is dealt from the beginning each time.
    std::mt19937 random(seed * 1000 + static_cast<unsigned>(&way - ways().data()));
    std::vector<const Kind*> deck;
    std::size_t next = 0;
    for (int ranks = 1; ranks <= n; ++ranks)
      for (int c = 0; c < count_classes; ++c)
        for (const bool in_place : {false, true}) {
          const Kind* taken = nullptr;
          for (int attempt = 0; attempt < 100 && !taken; ++attempt) {
            if (next == deck.size()) {
              deck.clear();
              for (const auto& k : kinds()) deck.push_back(k.get());
              std::shuffle(deck.begin(), deck.end(), random);
              next = 0;
            }
            if (const Kind* k = deck[next++]; sensible(way, *k, count_of(c, ranks))) taken = k;
          }
          const int form = static_cast<int>(random() % 3), root = static_cast<int>(random() % 9);
          Case each{way.operation, way.algorithm, taken, count_of(c, ranks), in_place, form_of(way, *taken, form), root};
          const auto chance = random() % 16;
          if (tally::reduces(way.operation) && chance < 4) each.order = Order::fixed;
          if (chance > 0 && each.refusal(true)) each.order = Order::any;  // few are to be refused for what can be had
          if (chance > 0 && each.refusal(true) && each.form == Form::background) each.form = Form::persistent;
          if (ranks == n) cases.push_back(each);
        }
  }
  return cases;
}
/// The whole product but for forms and orders, which go around.
std::vector<Case> whole(int n, const Kind& kind) {
  std::vector<Case> cases;
  int turn = 0;
  for (const Way& way : ways())
    for (int c = 0; c < count_classes; ++c)
      for (const bool in_place : {false, true}) {
        if (!sensible(way, kind, count_of(c, n))) continue;
        ++turn;
        cases.push_back({way.operation, way.algorithm, &kind, count_of(c, n), in_place, form_of(way, kind, turn % 3), turn, tally::reduces(way.operation) && turn % 5 == 0 ? Order::fixed : Order::any});
      }
  return cases;
}
bool long_run() { return std::getenv("TALLY_TEST_LONG") != nullptr; }

/// All cases on n ranks.
void run_all(int n, const std::vector<Case>& cases, tally::RankKind ranks, const tally::Options& options = {}) {
  tally::launch(
      n,
      [&](Communicator& comm) {
        for (const Case& each : cases) Trial(comm, each).run(comm);
      },
      ranks, options);
}
tally::Options cramped() {
  tally::Options options;
  options.slots.slots = 1;
  options.slots.slot_bytes = 128;
  return options;
}
tally::Options grouped(int group) {
  tally::Options options;
  options.group = group;
  return options;
}

void pairs(tally::RankKind ranks) {
  for (int n = 1; n <= 9; ++n)
    if (!sanitized || n % 3 == 2) run_all(n, chosen(n, 6), ranks);
  run_all(5, chosen(5, 2), ranks, cramped());
  run_all(7, chosen(7, 3), ranks, grouped(3));
  if (!sanitized) run_all(8, chosen(8, 4), ranks, grouped(4));
}
void everything(tally::RankKind ranks) {
  for (int n = 1; n <= 9; ++n)
    for (const auto& each : kinds())
      if (long_run() || (!sanitized && n == (ranks == tally::threads ? 3 : 4))) run_all(n, whole(n, *each), ranks);
}

/// Several of them in the background at once, waited for in another order than they were started in.
void at_once(tally::RankKind ranks) {
  for (const int n : {2, 3, 5, 8}) {
    std::vector<Case> cases = chosen(n, 5);
    std::erase_if(cases, [](Case& each) {
      each.form = Form::background;
      return (tally::reduces(each.operation) && !each.kind->every_form) || each.refusal(true);
    });
    REQUIRE(cases.size() > 250);
    const auto body = [&](Communicator& comm) {
      std::mt19937 random(static_cast<unsigned>(n)), own(static_cast<unsigned>(comm.rank()));
      std::vector<Case> mixed = cases;
      std::shuffle(mixed.begin(), mixed.end(), random);
      for (std::size_t i = 0; i < mixed.size();) {
        std::vector<std::unique_ptr<Trial>> trials;
        std::vector<std::pair<std::size_t, tally::Operation>> flying;
        for (std::size_t batch = 1 + random() % 10; batch > 0 && i < mixed.size(); --batch, ++i) {
          trials.push_back(std::make_unique<Trial>(comm, mixed[i]));
          flying.emplace_back(trials.size() - 1, trials.back()->start(comm));
        }
        std::shuffle(flying.begin(), flying.end(), own);
        for (auto& [which, operation] : flying) trials[which]->check(operation.wait());
      }
    };
    tally::launch(n, body, ranks);
    tally::launch(n, body, ranks, cramped());
  }
}

}  // namespace

TEST_CASE("the choice of cases meets every pair") {
  // Kinds with ways, counts, ranks, in place, forms; ways with all of those. What is refused does not count.
  std::set<std::pair<std::string, std::string>> met, wanted;
  const auto name = [](const Way& w) { return std::string(name_of(w.operation)) + "/" + std::string(w.algorithm); };
  for (int n = 1; n <= 9; ++n)
    for (const Case& each : chosen(n, 6)) {
      if (each.refusal(true)) continue;
      int c = 0;
      while (count_of(c, n) != each.count) ++c;
      std::vector<std::string> sides = {name({each.operation, each.algorithm}), each.kind->name, "n" + std::to_string(n), each.in_place ? "in" : "out", "form" + std::to_string(static_cast<int>(each.form))};
      for (int d = c; d < count_classes; ++d)  // with few ranks some counts are the same
        if (count_of(d, n) == each.count) sides.push_back("count" + std::to_string(d));
      for (const std::string& a : sides)
        for (const std::string& b : sides)
          if (a < b) met.insert({a, b});
    }
  std::vector<std::string> others;
  for (int n = 1; n <= 9; ++n) others.push_back("n" + std::to_string(n));
  for (int c = 0; c < count_classes; ++c) others.push_back("count" + std::to_string(c));
  others.insert(others.end(), {"in", "out"});
  const auto want = [&](const std::string& a, const std::string& b) { wanted.insert(std::minmax(a, b)); };
  for (const Way& way : ways()) {
    for (const std::string& other : others) want(name(way), other);
    const tally::AlgorithmRef known = way.algorithm.empty() ? tally::AlgorithmRef{} : tally::find_algorithm(way.operation, way.algorithm);
    for (int form = 0; form < 3; ++form)
      if (form != 1 || !known.share) want(name(way), "form" + std::to_string(form));
    for (const auto& k : kinds()) {
      if (!sensible(way, *k, 1)) continue;
      if (Case{way.operation, way.algorithm, k.get()}.refusal(true)) continue;
      want(name(way), k->name);
    }
  }
  for (const auto& k : kinds()) {
    for (const std::string& other : others)
      if (k->size < 1000 || (other != "count5" && other != "count6")) want(k->name, other);
    for (int form = 0; form < 3; ++form) want(k->name, "form" + std::to_string(form));
  }
  std::string missing;
  for (const auto& each : wanted)
    if (!met.contains(each)) missing += each.first + " with " + each.second + "; ";
  INFO("a new algorithm may need another seed");
  CHECK(missing == "");
  CHECK(wanted.size() > 2500);
}

TALLY_TEST_BOTH("every operation with every algorithm, type, operator and count", "", pairs)
TALLY_TEST_BOTH("the whole product, for few numbers of ranks", "", everything)
TALLY_TEST_BOTH("several in the background at once", "", at_once)
