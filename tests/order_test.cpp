// SPDX-License-Identifier: Apache-2.0
// In which order ranks are folded: operators that are not commutative, Order::fixed and its bits, and how far sums of small
// floats may be off.
#include <catch2/catch.hpp>

#include <cmath>
#include <functional>
#include <random>

#include "kinds.hpp"

using namespace test;
using tally::Errc;

namespace {

template <class F>
void refused(Errc code, std::initializer_list<std::string_view> parts, F&& f) {
  const Caught c = caught(f);
  expect(c.is(code), std::string("to be refused as ") + std::string(*parts.begin()) + ", but: " + c.text);
  for (const std::string_view part : parts) expect(has(c.text, part), "'" + std::string(part) + "' in: " + c.text);
}
tally::Options slots(int count, std::size_t bytes) {
  tally::Options options;
  options.slots.slots = count;
  options.slots.slot_bytes = bytes;
  return options;
}

/// Digits, written one after the other: the result says in which order ranks came.
struct Digits {
  std::uint64_t value, scale;
  friend bool operator==(const Digits&, const Digits&) = default;
};
struct Append {
  Digits operator()(Digits a, Digits b) const { return {a.value * b.scale + b.value, a.scale * b.scale}; }
};
Digits digits(int ranks) {
  Digits all{1, 10};
  for (int r = 1; r < ranks; ++r) all = Append{}(all, Digits{static_cast<std::uint64_t>(r) + 1, 10});
  return all;
}

void rank_order(tally::RankKind ranks) {
  const auto body = [](Communicator& comm) {
    const int n = comm.size();
    const Rank me = comm.rank();
    const Digits mine{static_cast<std::uint64_t>(me) + 1, 10};
    for (const std::size_t count : {1u, 40u, 5'000u, 100'000u}) {
      if (count > 5'000 && n != 4) continue;
      const auto all_are = [&](const std::vector<Digits>& data, int of) { return std::ranges::count(data, digits(of)) == static_cast<std::ptrdiff_t>(data.size()); };
      const std::vector<Digits> in(count, mine);
      std::vector<Digits> out(count);
      comm.all_reduce(in, out, Append{});
      expect(all_are(out, n), "all_reduce in rank order");
      for (Rank root = 0; root < n; ++root) {
        comm.reduce(in, out, Append{}, root);
        expect(me != root || all_are(out, n), "reduce in rank order, whatever the root");
      }
      comm.scan(in, out, Append{});
      expect(all_are(out, me + 1), "scan in rank order");
      comm.exclusive_scan(in, out, Append{});
      expect(me == 0 || all_are(out, me), "exclusive_scan in rank order");
      const std::vector<Digits> blocks(count * static_cast<std::size_t>(n), mine);
      comm.reduce_scatter(blocks, out, Append{});
      expect(all_are(out, n), "reduce_scatter in rank order");
      const std::vector<std::size_t> counts(static_cast<std::size_t>(n), count);
      std::ranges::fill(out, Digits{});
      comm.reduce_scatter_v(blocks, out, counts, Append{});
      expect(all_are(out, n), "reduce_scatter_v in rank order");
    }
    // Every algorithm that can, by name.
    int done = 0;
    for (const Collective o : {Collective::all_reduce, Collective::reduce, Collective::scan, Collective::exclusive_scan})
      for (const std::string_view name : tally::algorithms_for(o)) {
        const tally::AlgorithmRef known = tally::find_algorithm(o, name);
        if (known.folding < tally::Folding::ordered || (known.is(tally::Reach::direct) && comm.transport_name() != "thread")) continue;
        const std::vector<Digits> in(3, mine);
        std::vector<Digits> out(3);
        const Rank root = n / 2;
        if (o == Collective::all_reduce) comm.all_reduce(in, out, Append{}, {.algorithm = name});
        else if (o == Collective::reduce) comm.reduce(in, out, Append{}, root, {.algorithm = name});
        else if (o == Collective::scan) comm.scan(in, out, Append{}, {.algorithm = name});
        else comm.exclusive_scan(in, out, Append{}, {.algorithm = name});
        const int of = o == Collective::scan ? me + 1 : o == Collective::exclusive_scan ? me : n;
        if (of > 0 && (o != Collective::reduce || me == root)) expect(out[0] == digits(of) && out[2] == digits(of), std::string(name_of(o)) + " by " + std::string(name) + " in rank order");
        ++done;
      }
    expect(done >= 9, "several algorithms keep the order");
    std::vector<Digits> data(10, mine), all(10 * static_cast<std::size_t>(n), mine);
    // What the environment asks for is taken where it can be.
    expect(comm.all_reduce(data, Append{}).algorithm_name() != "ring" && data[3] == digits(n), "not by ring");
    std::vector<int> numbers(10, 1);
    expect(comm.all_reduce(numbers, tally::sum).algorithm_name() == "ring" && numbers[3] == n, "by ring");
    for (const char* name : {"ring", "chain", "double_tree", "hierarchical"})
      refused(Errc::invalid_argument, {std::string(name) + " cannot do this all_reduce: it does not keep the order of ranks", "not marked as commutative"}, [&] { comm.all_reduce(data, Append{}, {.algorithm = name}); });
    refused(Errc::invalid_argument, {"tree cannot do this reduce: it does not keep the order"}, [&] { comm.reduce(data, data, Append{}, 0, {.algorithm = "tree"}); });
    refused(Errc::invalid_argument, {"ring cannot do this reduce_scatter"}, [&] { comm.reduce_scatter(all, data, Append{}, {.algorithm = "ring"}); });
    refused(Errc::invalid_argument, {"no algorithm 'bruck' offers all_reduce; these do:", "two_shot"}, [&] { comm.all_reduce(data, Append{}, {.algorithm = "bruck"}); });
  };
  tally::Options options;
  options.algorithms = tally::AlgorithmOverrides("all_reduce=ring");
  for (int n = 1; n <= 9; ++n) tally::launch(n, body, ranks, options);
}

/// Over many binary orders of magnitude: any other order or bracketing shows.
template <class T>
std::vector<T> spread(Rank r, std::size_t count) {
  std::mt19937 random(static_cast<unsigned>(r) + 7);
  std::vector<T> values(count);
  for (T& v : values) {
    const double mantissa = static_cast<double>(random()) / 4294967296.0 - 0.5;
    v = static_cast<T>(static_cast<float>(std::ldexp(mantissa, static_cast<int>(random() % 12))));
  }
  return values;
}
/// The definition: fold(lo, hi) = fold(lo, mid) + fold(mid, hi), mid the largest power of two from lo on.
template <class T>
T bracketed(const std::vector<std::vector<T>>& values, int lo, int hi, std::size_t i) {
  if (hi - lo == 1) return values[static_cast<std::size_t>(lo)][i];
  int half = 1;
  while (half * 2 < hi - lo) half *= 2;
  return tally::sum(bracketed(values, lo, lo + half, i), bracketed(values, lo + half, hi, i));
}
template <class T>
bool same_bits(std::span<const T> a, std::span<const T> b) { return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0); }

template <class T>
void fixed_bits(Communicator& comm, std::size_t count, const char* environment) {
  const int n = comm.size();
  const Rank me = comm.rank();
  const auto ranks = static_cast<std::size_t>(n);
  const std::size_t all = count * ranks;
  std::vector<std::vector<T>> values;
  for (Rank r = 0; r < n; ++r) values.push_back(spread<T>(r, all));
  const auto folded = [&](int of, std::size_t first, std::size_t length) {
    std::vector<T> result(length);
    for (std::size_t i = 0; i < length; ++i) result[i] = bracketed(values, 0, of, first + i);
    return result;
  };
  const std::vector<T> total = folded(n, 0, count), block = folded(n, count * static_cast<std::size_t>(me), count), here = folded(me + 1, 0, count), before = me > 0 ? folded(me, 0, count) : std::vector<T>(count);
  const std::vector<T>& mine = values[static_cast<std::size_t>(me)];
  const std::span<const T> in(mine.data(), count), long_in(mine);
  const bool threads = comm.transport_name() == "thread";
  using Body = std::function<Report(std::span<T>, const tally::CallOptions&)>;
  const auto each = [&](Collective o, Rank root, const std::vector<T>& want, bool here_too, const Body& now, const Body& later, const Body& kept) {
    std::vector<std::string_view> names = tally::algorithms_for(o);
    names.push_back("");
    int accepted = 0;
    for (const std::string_view name : names) {
      const std::string what = std::string(name_of(o)) + " by " + std::string(name) + ", root " + std::to_string(root) + ", " + environment + ", n " + std::to_string(n);
      const tally::AlgorithmRef known = name.empty() ? tally::AlgorithmRef{} : tally::find_algorithm(o, name);
      std::vector<T> out(count);
      const tally::CallOptions options{.algorithm = name, .order = Order::fixed};
      if (!name.empty() && known.folding != tally::Folding::fixed) {
        refused(Errc::invalid_argument, {std::string(name) + " cannot do this " + std::string(name_of(o)), "it does not fold in the one bracketing that Order::fixed asks for"}, [&] { now(out, options); });
        continue;
      }
      if (known.is(tally::Reach::direct) && !threads) continue;
      ++accepted;
      for (int repeat = 0; repeat < 2; ++repeat)
        for (const Body* body : {&now, &later, &kept}) {
          if (known.share && body == &later) continue;
          std::ranges::fill(out, T{});
          (*body)(out, options);
          expect(!here_too || same_bits<T>(out, want), what + ": the declared bits");
        }
    }
    expect(accepted >= 2, std::string("several algorithms for ") + std::string(name_of(o)));
  };
  using O = const tally::CallOptions&;
  using Out = std::span<T>;
  each(Collective::all_reduce, 0, total, true, [&](Out out, O o) { return comm.all_reduce(in, out, tally::sum, o); }, [&](Out out, O o) { return comm.async_all_reduce(in, out, tally::sum, o).wait(); },
       [&](Out out, O o) { return comm.persistent_all_reduce(in, out, tally::sum, o).run(); });
  for (const Rank root : {0, n - 1})
    each(Collective::reduce, root, total, me == root, [&](Out out, O o) { return comm.reduce(in, out, tally::sum, root, o); }, [&](Out out, O o) { return comm.async_reduce(in, out, tally::sum, root, o).wait(); },
         [&](Out out, O o) { return comm.persistent_reduce(in, out, tally::sum, root, o).run(); });
  each(Collective::reduce_scatter, 0, block, true, [&](Out out, O o) { return comm.reduce_scatter(long_in, out, tally::sum, o); }, [&](Out out, O o) { return comm.async_reduce_scatter(long_in, out, tally::sum, o).wait(); },
       [&](Out out, O o) { return comm.persistent_reduce_scatter(long_in, out, tally::sum, o).run(); });
  each(Collective::scan, 0, here, true, [&](Out out, O o) { return comm.scan(in, out, tally::sum, o); }, [&](Out out, O o) { return comm.async_scan(in, out, tally::sum, o).wait(); },
       [&](Out out, O o) { return comm.persistent_scan(in, out, tally::sum, o).run(); });
  each(Collective::exclusive_scan, 0, before, me > 0, [&](Out out, O o) { return comm.exclusive_scan(in, out, tally::sum, o); }, [&](Out out, O o) { return comm.async_exclusive_scan(in, out, tally::sum, o).wait(); },
       [&](Out out, O o) { return comm.persistent_exclusive_scan(in, out, tally::sum, o).run(); });
}
void fixed_order(tally::RankKind ranks) {
  const auto run = [&](int n, const tally::Options& options, const char* name) {
    tally::launch(
        n,
        [&](Communicator& comm) {
          for (const std::size_t count : {1u, 7u, 300u}) fixed_bits<float>(comm, count, name);
          fixed_bits<tally::bf16>(comm, 65, name);
          if (n == 7 && options.slots.slots > 1 && !sanitized) fixed_bits<float>(comm, 9'000, name);
        },
        ranks, options);
  };
  for (int n = 1; n <= 9; ++n) run(n, {}, "usual slots");
  run(7, slots(1, 128), "one slot of 128 bytes");
  run(6, slots(2, 4096), "2 slots of 4 KiB");
  const Environment small_slots("TALLY_SLOT_BYTES", "200");
  run(5, {}, "TALLY_SLOT_BYTES=200");
}

void same_everywhere(tally::RankKind ranks) {
  const auto body = [](Communicator& comm) {
    const auto n = static_cast<std::size_t>(comm.size());
    for (const std::size_t count : {std::size_t{1}, std::size_t{33}, std::size_t{4'000}}) {
      std::vector<std::string_view> names = tally::algorithms_for(Collective::all_reduce);
      names.push_back("");
      for (const std::string_view name : names) {
        if (name == "zero_copy" && comm.transport_name() != "thread") continue;
        std::vector<float> data = spread<float>(comm.rank(), count), all(count * n);
        comm.all_reduce(data, tally::sum, {.algorithm = name});
        comm.all_gather(data, all);
        for (std::size_t r = 0; r < n; ++r) expect(same_bits<float>(std::span(all).subspan(r * count, count), data), "all ranks have the same bits by " + std::string(name));
      }
    }
  };
  for (const int n : {2, 3, 5, 8}) tally::launch(n, body, ranks);
}

/// |error| <= (n - 1) u sum|x|, each sum rounded to within u of itself.
template <class T>
void within_bounds(Communicator& comm, double u) {
  const int n = comm.size();
  constexpr std::size_t count = 3'000;
  std::vector<double> exact(count), magnitude(count);
  std::vector<T> mine;
  for (Rank r = 0; r < n; ++r) {
    const std::vector<T> values = spread<T>(r, count);
    for (std::size_t i = 0; i < count; ++i) exact[i] += static_cast<double>(static_cast<float>(values[i])), magnitude[i] += std::abs(static_cast<double>(static_cast<float>(values[i])));
    if (r == comm.rank()) mine = values;
  }
  std::size_t inexact = 0;
  for (const std::string_view name : tally::algorithms_for(Collective::all_reduce)) {
    if (name == "zero_copy" && comm.transport_name() != "thread") continue;
    std::vector<T> data = mine;
    comm.all_reduce(data, tally::sum, {.algorithm = name});
    for (std::size_t i = 0; i < count; ++i) {
      const double error = std::abs(static_cast<double>(static_cast<float>(data[i])) - exact[i]);
      inexact += error > 0;
      expect(error <= (n - 1) * u * magnitude[i], "a sum of 16-bit numbers within its bound by " + std::string(name));
    }
  }
  expect(inexact > count, "most are not exact, so there was something to bound");
}
void bounds(tally::RankKind ranks) {
  for (const int n : {2, 3, 5, 9})
    tally::launch(
        n,
        [](Communicator& comm) {
          within_bounds<tally::bf16>(comm, std::ldexp(1, -8));
          within_bounds<tally::f16>(comm, std::ldexp(1, -11));
        },
        ranks);
}

}  // namespace

TALLY_TEST_BOTH("operators that are not commutative meet the ranks in their order", "", rank_order)
TALLY_TEST_BOTH("Order::fixed gives one result, whatever does it", "", fixed_order)
TALLY_TEST_BOTH("without it, all ranks have the same bits", "", same_everywhere)
TALLY_TEST_BOTH("sums of 16-bit numbers keep their bound", "", bounds)
