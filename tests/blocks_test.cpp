// SPDX-License-Identifier: Apache-2.0
// Blocks of their own sizes, neighbour exchanges, and counts beyond 32 bits: what lies where, what stays untouched, and
// ranks that do not agree.
#include <catch2/catch.hpp>

#include <limits>
#include <numeric>
#include <random>

#include "kinds.hpp"

using namespace test;
using namespace std::chrono_literals;
using tally::Errc;

namespace {

using Counts = std::vector<std::size_t>;
using Ranks = std::vector<Rank>;

std::size_t at(Rank r) { return static_cast<std::size_t>(r); }

/// Element i of what rank `from` has for rank `to`.
template <class T>
T mark(Rank from, Rank to, std::size_t i) {
  const std::size_t value = at(from) * 131 + at(to) * 17 + i * 3 + 1;
  if constexpr (std::is_same_v<T, Large>) return LargeOnes::value(from * 16 + to, i);
  else return static_cast<T>(value % 100);
}
template <class T>
T nothing() {
  if constexpr (std::is_same_v<T, Large>) return Large{{7}};
  else return static_cast<T>(111);
}

/// Places for blocks of these counts in a random order, with gaps, in a buffer of the length that is returned.
std::size_t scatter_about(const Counts& counts, Counts& firsts, std::mt19937& random) {
  std::vector<std::size_t> order(counts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  firsts.assign(counts.size(), 0);
  std::size_t next = 0;
  for (const std::size_t r : order) {
    next += random() % 3;
    firsts[r] = next;
    next += counts[r];
  }
  return next + random() % 3;
}
Counts random_counts(int n, std::mt19937& random) {
  Counts counts(at(n));
  for (std::size_t& c : counts) c = random() % 4 == 0 ? 0 : random() % 8 == 0 ? 300 + random() % 700 : random() % 12;
  return counts;
}
Counts one_after_another(const Counts& counts) {
  Counts firsts(counts.size());
  std::exclusive_scan(counts.begin(), counts.end(), firsts.begin(), std::size_t{0});
  return firsts;
}
std::vector<std::string_view> names(Collective o) {
  std::vector<std::string_view> all = tally::algorithms_for(o);
  all.push_back("");
  return all;
}

template <class T>
void all_variants(Communicator& comm, unsigned seed, std::size_t most) {
  const int n = comm.size();
  const Rank me = comm.rank();
  std::mt19937 random(seed);  // the same on all ranks
  Counts counts = random_counts(n, random), firsts;
  for (std::size_t& c : counts) c = std::min(c, most);
  std::size_t length = scatter_about(counts, firsts, random);
  const bool packed = seed % 3 == 0;
  if (packed) firsts = one_after_another(counts), length = std::accumulate(counts.begin(), counts.end(), std::size_t{0});
  const Counts passed = packed ? Counts() : firsts;
  const Rank root = static_cast<Rank>(seed) % n;
  const std::size_t mine = counts[at(me)];
  const std::string label = "n " + std::to_string(n) + ", seed " + std::to_string(seed) + ", ";
  const auto filled = [&](std::size_t size) { return std::vector<T>(size, nothing<T>()); };
  const auto block = [&](Rank from, Rank to, std::size_t count) {
    std::vector<T> b(count);
    for (std::size_t i = 0; i < count; ++i) b[i] = mark<T>(from, to, i);
    return b;
  };
  const auto put = [](std::vector<T>& where, std::size_t first, const std::vector<T>& what) { std::ranges::copy(what, where.begin() + static_cast<std::ptrdiff_t>(first)); };

  std::vector<T> gathered = filled(length);
  for (Rank r = 0; r < n; ++r) put(gathered, firsts[at(r)], block(r, 0, counts[at(r)]));
  for (const bool background : {false, true})
    for (const std::string_view name : names(Collective::all_gather_v)) {
      const std::vector<T> in = block(me, 0, mine);
      std::vector<T> out = filled(length);
      if (background) comm.async_all_gather_v(in, out, counts, passed, {.algorithm = name}).wait();
      else comm.all_gather_v(in, out, counts, passed, {.algorithm = name});
      expect(out == gathered && in == block(me, 0, mine), label + "all_gather_v by " + std::string(name));
      out = filled(length);
      put(out, firsts[at(me)], in);
      comm.all_gather_v(std::span(out).subspan(firsts[at(me)], mine), out, counts, passed, {.algorithm = name});
      expect(out == gathered, label + "all_gather_v in place by " + std::string(name));
    }
  for (const std::string_view name : names(Collective::gather_v))
    for (const bool background : {false, true}) {
      // Counts are looked at on the root alone.
      const Counts c = me == root ? counts : Counts(), d = me == root ? passed : Counts(77);
      std::vector<T> in = block(me, 0, mine), out = filled(length);
      if (background) comm.async_gather_v(in, out, c, root, d, {.algorithm = name}).wait();
      else comm.gather_v(in, out, c, root, d, {.algorithm = name});
      expect(out == (me == root ? gathered : filled(length)), label + "gather_v");
      out = filled(length);
      put(out, firsts[at(me)], in);
      comm.gather_v(me == root ? std::span(out).subspan(firsts[at(me)], mine) : std::span(in), out, c, root, d, {.algorithm = name});
      expect(me != root || out == gathered, label + "gather_v in place");
    }
  std::vector<T> spread = filled(length);
  for (Rank r = 0; r < n; ++r) put(spread, firsts[at(r)], block(root, r, counts[at(r)]));
  for (const std::string_view name : names(Collective::scatter_v))
    for (const bool background : {false, true}) {
      const Counts c = me == root ? counts : Counts(), d = me == root ? passed : Counts();
      std::vector<T> in = me == root ? spread : std::vector<T>(), out = filled(mine);
      if (background) comm.async_scatter_v(in, out, c, root, d, {.algorithm = name}).wait();
      else comm.scatter_v(in, out, c, root, d, {.algorithm = name});
      expect(out == block(root, me, mine) && (me != root || in == spread), label + "scatter_v");
      out = filled(mine);
      comm.scatter_v(in, me == root ? std::span(in).subspan(firsts[at(me)], mine) : std::span(out), c, root, d, {.algorithm = name});
      expect(me == root ? in == spread : out == block(root, me, mine), label + "scatter_v in place");
    }
  if constexpr (!std::is_same_v<T, Large>) {
    std::vector<T> in = filled(length), folded(mine);
    for (Rank r = 0; r < n; ++r) put(in, firsts[at(r)], block(me, r, counts[at(r)]));
    for (std::size_t i = 0; i < mine; ++i) {
      std::int64_t total = 0;
      for (Rank r = 0; r < n; ++r) total += static_cast<std::int64_t>(mark<T>(r, me, i));
      folded[i] = static_cast<T>(total);
    }
    const std::vector<T> before = in;
    for (const std::string_view name : names(Collective::reduce_scatter_v)) {
      std::vector<T> out = filled(mine);
      comm.reduce_scatter_v(in, out, counts, tally::sum, passed, {.algorithm = name});
      expect(out == folded && in == before, label + "reduce_scatter_v by " + std::string(name));
      out = filled(mine);
      comm.async_reduce_scatter_v(in, out, counts, tally::sum, passed, {.algorithm = name}).wait();
      expect(out == folded, label + "reduce_scatter_v in the background by " + std::string(name));
      std::vector<T> both = in, want = in;
      put(want, firsts[at(me)], folded);
      comm.reduce_scatter_v(both, std::span(both).subspan(firsts[at(me)], mine), counts, tally::sum, passed, {.algorithm = name});
      expect(both == want, label + "reduce_scatter_v in place by " + std::string(name));
    }
  }
  // What rank a has for rank b, for all a and b.
  std::vector<Counts> table;
  for (Rank r = 0; r < n; ++r) {
    table.push_back(random_counts(n, random));
    for (std::size_t& c : table.back()) c = std::min(c, most);
  }
  Counts to = table[at(me)], from(at(n)), to_firsts, from_firsts;
  for (Rank r = 0; r < n; ++r) from[at(r)] = table[at(r)][at(me)];
  std::mt19937 own(seed * 100 + static_cast<unsigned>(me));
  const std::size_t sent = scatter_about(to, to_firsts, own), got = scatter_about(from, from_firsts, own);
  std::vector<T> in = filled(sent), want = filled(got);
  for (Rank r = 0; r < n; ++r) put(in, to_firsts[at(r)], block(me, r, to[at(r)])), put(want, from_firsts[at(r)], block(r, me, from[at(r)]));
  const std::vector<T> before = in;
  for (const std::string_view name : names(Collective::all_to_all_v)) {
    std::vector<T> out = filled(got);
    comm.all_to_all_v(in, to, out, from, to_firsts, from_firsts, {.algorithm = name});
    expect(out == want && in == before, label + "all_to_all_v by " + std::string(name));
    out = filled(got);
    {
      // Counts may go, or change, once it has been started.
      Counts a = to, b = from, c = to_firsts, d = from_firsts;
      tally::Operation started = comm.async_all_to_all_v(in, a, out, b, c, d, {.algorithm = name});
      for (Counts* each : {&a, &b, &c, &d}) std::ranges::fill(*each, 1'000'000);
      started.wait();
    }
    expect(out == want, label + "all_to_all_v in the background by " + std::string(name));
    // In place both sides have the same blocks, so all pairs send each other as much.
    Counts even(at(n)), places;
    for (Rank r = 0; r < n; ++r) even[at(r)] = std::min(most, at(r + me) % 7 * (1 + seed % 5));
    std::vector<T> both = filled(scatter_about(even, places, own)), result = both;
    for (Rank r = 0; r < n; ++r) put(both, places[at(r)], block(me, r, even[at(r)])), put(result, places[at(r)], block(r, me, even[at(r)]));
    comm.all_to_all_v(both, even, both, even, places, places, {.algorithm = name});
    expect(both == result, label + "all_to_all_v in place by " + std::string(name));
  }
}
void variants(tally::RankKind ranks) {
  const auto body = [](Communicator& comm) {
    for (unsigned seed = 0; seed < (sanitized ? 3 : 6); ++seed) {
      all_variants<std::int64_t>(comm, seed, 1000);
      all_variants<float>(comm, seed + 20, 1000);
      all_variants<std::uint8_t>(comm, seed + 40, 1000);
    }
    all_variants<Large>(comm, 60, 3);
    all_variants<Large>(comm, 61, 3);
  };
  for (int n = 1; n <= 9; ++n)
    if (!sanitized || n % 3 == 2) tally::launch(n, body, ranks);
  tally::Options cramped;
  cramped.slots.slots = 1;
  cramped.slots.slot_bytes = 128;
  tally::launch(5, body, ranks, cramped);
}

/// Each rank's error is this one, and its text has these parts.
void expect_all(const Outcome& outcome, Errc code, std::initializer_list<std::string_view> parts, std::chrono::nanoseconds limit = 5s) {
  INFO(outcome);
  for (const Caught& c : outcome.ranks) {
    CHECK(c.is(code));
    CHECK(c.ended - c.began < limit.count());
    for (const std::string_view part : parts) CHECK_THAT(std::string(c.text), Catch::Contains(std::string(part)));
  }
}

void disagreement(tally::RankKind ranks) {
  // Rank 2 believes that rank 1 has 7 elements, which has 5.
  expect_all(outcome_of(3, ranks,
                        [](Communicator& comm) {
                          Counts counts{4, 5, 6};
                          if (comm.rank() == 2) counts[1] = 7;
                          std::vector<int> in(counts[at(comm.rank())]), out(std::accumulate(counts.begin(), counts.end(), std::size_t{0}));
                          comm.all_gather_v(in, out, counts, {}, {.algorithm = "one_shot"});
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 1 sends 20 bytes where rank 2 expects 28", "all_gather_v(int32, one_shot)"});
  expect_all(outcome_of(3, ranks,
                        [](Communicator& comm) {
                          Counts counts{4, 5, 6};
                          if (comm.rank() == 0) counts[0] = 3;
                          std::vector<double> in(std::accumulate(counts.begin(), counts.end(), std::size_t{0})), out(counts[at(comm.rank())]);
                          comm.reduce_scatter_v(in, out, counts, tally::sum, {}, {.algorithm = "one_shot"});
                          comm.barrier();
                        }),
             Errc::mismatch, {"sends 32 bytes where rank 0 expects 24", "reduce_scatter_v(float64, sum, one_shot)"});
  expect_all(outcome_of(3, ranks,
                        [](Communicator& comm) {
                          std::vector<int> in(comm.rank() == 2 ? 9 : 4), out(12);
                          comm.gather_v(in, out, Counts{4, 4, 4}, 1);
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 2 sends 36 bytes where rank 1 expects 16", "gather_v(int32, root 1"});
  expect_all(outcome_of(3, ranks,
                        [](Communicator& comm) {
                          std::vector<int> in(12), out(comm.rank() == 2 ? 3 : 4);
                          comm.scatter_v(in, out, Counts{4, 4, 4}, 0);
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 0 sends 16 bytes where rank 2 expects 12", "scatter_v(int32, root 0"});
  expect_all(outcome_of(4, ranks,
                        [](Communicator& comm) {
                          Counts to(4, 2), from(4, 2);
                          if (comm.rank() == 3) to[0] = 0;
                          std::vector<short> in(std::accumulate(to.begin(), to.end(), std::size_t{0})), out(8);
                          comm.all_to_all_v(in, to, out, from);
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 3 sends 0 bytes where rank 0 expects 4", "all_to_all_v(int16, pairwise)"});
  // Another root, another type, another operation.
  expect_all(outcome_of(3, ranks,
                        [](Communicator& comm) {
                          std::vector<int> in(4), out(12);
                          comm.gather_v(in, out, Counts{4, 4, 4}, comm.rank() == 2 ? 2 : 1);
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 2", "gather_v(int32, root 2"});
  expect_all(outcome_of(2, ranks,
                        [](Communicator& comm) {
                          std::vector<int> in(4), out(8);
                          const Counts four{4, 4};
                          if (comm.rank() == 0) comm.all_gather_v(in, out, four, {}, {.algorithm = "one_shot"});
                          else comm.all_gather(in, out, {.algorithm = "one_shot"});
                          comm.barrier();
                        }),
             Errc::mismatch, {"all_gather_v(int32, one_shot)", "all_gather(int32 x 4, one_shot)"});
}

void refused(const std::string& part, const std::function<void()>& f) {
  const Caught c = caught(f);
  expect(c.is(Errc::invalid_argument) && has(c.text, part), "'" + part + "' as error, not: " + (c.error || c.foreign ? c.text : "none"));
}
void bad_arguments(Communicator& comm) {
  constexpr std::size_t minus = std::numeric_limits<std::size_t>::max();
  std::vector<int> in(4), out(12);
  const Counts four{4, 4, 4}, places{0, 4, 8};
  // Beyond the end, by one and by so much that the sum overflows; negative; overlapping where blocks are written.
  refused("all_gather_v: out: the block of rank 2, 4 elements from 9 on, is not within its 12 elements", [&] { comm.all_gather_v(in, out, four, Counts{0, 4, 9}); });
  refused("the block of rank 1, 4 elements from -2 on, is not within", [&] { comm.all_gather_v(in, out, four, Counts{0, minus - 1, 8}); });
  refused("the block of rank 1, -1 elements from 4 on, is not within", [&] { comm.all_gather_v(in, out, Counts{4, minus, 4}, places); });
  refused("is not within", [&] { comm.all_gather_v(in, out, Counts{4, minus / 2, minus / 2}); });
  refused("all_gather_v: out: the blocks of ranks 0 and 2 overlap", [&] { comm.all_gather_v(in, out, four, Counts{0, 8, 3}); });
  refused("the blocks of ranks 1 and 2 overlap", [&] { comm.all_gather_v(in, out, four, Counts{0, 4, 4}); });
  refused("there are 2 counts for 3 ranks", [&] { comm.all_gather_v(in, out, Counts{4, 4}); });
  refused("there are 4 counts for 3 ranks", [&] { comm.all_gather_v(in, out, Counts{4, 4, 4, 0}); });
  refused("there are 0 counts for 3 ranks", [&] { comm.all_gather_v(in, out, Counts{}); });
  refused("there are 2 displacements for 3 ranks", [&] { comm.all_gather_v(in, out, four, Counts{0, 4}); });
  refused("all_gather_v: out has 12 elements, the counts add up to 11", [&] { comm.all_gather_v(in, out, Counts{4, 4, 3}); });
  refused("all_gather_v: in has 4 elements, expected " + std::to_string(comm.rank() + 1), [&] { comm.all_gather_v(in, std::span(out).first(6), Counts{1, 2, 3}); });
  refused("overlap without being in place", [&] { comm.all_gather_v(std::span(out).subspan(at((comm.rank() + 1) % 3) * 4, 4), out, four); });
  refused("reduce_scatter_v: in: the block of rank 2, 4 elements from 9 on", [&] { comm.reduce_scatter_v(out, in, four, tally::sum, Counts{0, 4, 9}); });
  refused("reduce_scatter_v: out has 4 elements, expected 3", [&] { comm.reduce_scatter_v(std::span(out).first(9), in, Counts{3, 3, 3}, tally::sum); });
  refused("gather_v: root 3 is not a rank; ranks are 0 to 2", [&] { comm.gather_v(in, out, four, 3); });
  refused("scatter_v: root -1 is not a rank", [&] { comm.scatter_v(out, in, four, -1); });
  if (comm.rank() == 1) {
    refused("gather_v: out: the blocks of ranks 0 and 1 overlap", [&] { comm.gather_v(in, out, four, 1, Counts{2, 0, 8}); });
    refused("scatter_v: in: there are 1 counts for 3 ranks", [&] { comm.scatter_v(out, in, Counts{12}, 1); });
  }
  const Rank me = comm.rank();
  Counts uneven = four;
  uneven[at(me)] = 3;
  refused("all_to_all_v: rank " + std::to_string(me) + " sends itself 3 elements but receives 4", [&] { comm.all_to_all_v(std::span(out).first(11), uneven, std::vector<int>(12), four); });
  refused("all_to_all_v: in: the block of rank 0, 4 elements from -1 on", [&] { comm.all_to_all_v(out, four, std::vector<int>(12), four, Counts{minus, 4, 8}); });
  refused("all_to_all_v: out: the blocks of ranks 0 and 1 overlap", [&] { comm.all_to_all_v(out, four, std::vector<int>(12), four, {}, Counts{0, 3, 8}); });
  refused("all_to_all: 11 elements cannot be cut into 3 equal blocks", [&] { comm.all_to_all(std::vector<int>(11), std::vector<int>(11)); });
  // Neighbours.
  refused("neighbour_exchange: neighbour 3 is not a rank; ranks are 0 to 2", [&] { comm.neighbour_exchange(in, in, Ranks{3}, Ranks{0}); });
  refused("neighbour -1 is not a rank", [&] { comm.neighbour_exchange(in, in, Ranks{0}, Ranks{-1}); });
  refused("rank " + std::to_string(me) + " sends itself 1 blocks but receives 0", [&] { comm.neighbour_exchange(in, std::vector<int>(4), Ranks{me}, Ranks{(me + 1) % 3}); });
  refused("neighbour_exchange: in has 4 elements, expected 3 blocks of 1", [&] { comm.neighbour_exchange(in, std::vector<int>(3), Ranks{0, 1, 2}, Ranks{0, 1, 2}); });
  refused("neighbour_exchange: out has 5 elements, expected 2 blocks of 2", [&] { comm.neighbour_exchange(in, std::vector<int>(5), Ranks{(me + 1) % 3, (me + 2) % 3}, Ranks{(me + 1) % 3, (me + 2) % 3}); });
  refused("neighbour_exchange: out has 5 elements, expected 0 blocks", [&] { comm.neighbour_exchange(in, std::vector<int>(5), Ranks{(me + 1) % 3}, Ranks{}); });
  refused("overlap without being in place", [&] { comm.neighbour_exchange(in, in, Ranks{(me + 1) % 3}, Ranks{(me + 2) % 3}); });
  // Where blocks are only read they may overlap. None of all that was sent.
  std::vector<int> sums(4);
  std::ranges::fill(out, 1);
  comm.reduce_scatter_v(out, sums, four, tally::sum, Counts{0, 0, 8});
  expect(sums == std::vector<int>(4, 3), "overlapping blocks to read");
}

/// An exchange on the graph: edges[i] = {from, to}, the same list on all ranks.
void exchange(Communicator& comm, const std::vector<std::pair<Rank, Rank>>& edges, std::size_t block, const std::string& label, unsigned seed = 0) {
  const Rank me = comm.rank();
  Ranks to, from;
  // Each rank has its own order of peers; only those of one pair come as they go.
  std::vector<std::pair<Rank, Rank>> mine = edges;
  if (seed > 0) {
    std::mt19937 random(seed + static_cast<unsigned>(me));
    std::vector<int> key(at(comm.size()));
    std::iota(key.begin(), key.end(), 0);
    std::shuffle(key.begin(), key.end(), random);
    std::ranges::stable_sort(mine, {}, [&](const auto& e) { return key[at(e.first)] * comm.size() + key[at(e.second)]; });
  }
  for (const auto& [source, target] : mine) {
    if (source == me) to.push_back(target);
    if (target == me) from.push_back(source);
  }
  const auto number = [](Rank source, Rank target, int k, std::size_t i) { return source * 100'000 + target * 10'000 + k * 1'000 + static_cast<int>(i % 1000); };
  std::vector<int> in, want, seen(at(comm.size()));
  for (const Rank r : to) {
    const int k = seen[at(r)]++;
    for (std::size_t i = 0; i < block; ++i) in.push_back(number(me, r, k, i));
  }
  std::ranges::fill(seen, 0);
  for (const Rank r : from) {
    const int k = seen[at(r)]++;
    for (std::size_t i = 0; i < block; ++i) want.push_back(number(r, me, k, i));
  }
  std::vector<int> out(want.size(), -1);
  comm.neighbour_exchange(in, out, to, from);
  expect(out == want, label);
  std::ranges::fill(out, -1);
  {
    Ranks a = to, b = from;
    tally::Operation started = comm.async_neighbour_exchange(in, out, a, b);
    std::ranges::fill(a, 1000);
    std::ranges::fill(b, 1000);
    started.wait();
  }
  expect(out == want, label + " in the background");
}
void graphs(tally::RankKind ranks) {
  const auto body = [](Communicator& comm) {
    const int n = comm.size();
    using Edges = std::vector<std::pair<Rank, Rank>>;
    for (const std::size_t block : {0u, 1u, 5u, 4000u}) {
      Edges ring, both, out_star, in_star, complete, selves, twice;
      for (Rank r = 0; r < n; ++r) {
        ring.push_back({r, (r + 1) % n});
        both.push_back({r, (r + 1) % n}), both.push_back({(r + 1) % n, r});
        if (r > 0) out_star.push_back({0, r}), in_star.push_back({r, 0});
        for (Rank s = 0; s < n; ++s) complete.push_back({r, s});
        selves.insert(selves.end(), at(r % 3), {r, r});
        for (int k = 0; k < 3; ++k) twice.push_back({r, (r + 2) % n}), twice.push_back({r, r});
      }
      exchange(comm, ring, block, "ring");
      exchange(comm, both, block, "ring both ways");
      exchange(comm, out_star, block, "star out");
      exchange(comm, in_star, block, "star in");
      exchange(comm, complete, block, "complete", 5);
      exchange(comm, selves, block, "selves");
      exchange(comm, twice, block, "several edges", 6);
      exchange(comm, {}, block, "no edges");
      if (n > 1) exchange(comm, {{n - 1, 0}}, block, "one edge");
      std::mt19937 random(static_cast<unsigned>(block) + 1);
      for (unsigned turn = 1; turn <= 10; ++turn) {
        Edges edges;
        for (std::size_t e = random() % 30; e > 0; --e) {
          const int pick = static_cast<int>(random());
          edges.push_back({std::abs(pick % n), static_cast<int>(random() % static_cast<unsigned>(n))});
        }
        exchange(comm, edges, block, "random graph", turn);
      }
    }
  };
  for (int n = 1; n <= 9; ++n) tally::launch(n, body, ranks);
}
void one_sided_edges(tally::RankKind ranks) {
  // Rank 2 waits for rank 0, which does not know of it.
  const Outcome waits = outcome_of(3, ranks, [](Communicator& comm) {
    std::vector<int> in(2), out(2);
    const Ranks to = comm.rank() == 0 ? Ranks{1} : Ranks{}, from = comm.rank() == 0 ? Ranks{} : Ranks{0};
    comm.neighbour_exchange(std::span(in).first(to.size() * 2), std::span(out).first(from.size() * 2), to, from, {.timeout = 300ms});
    comm.barrier({.timeout = 3s});
  });
  INFO(waits);
  CHECK((waits.ranks[2].is(Errc::timeout) || waits.ranks[2].is(Errc::mismatch)));
  CHECK_THAT(waits.ranks[2].text, Catch::Contains("neighbour_exchange(int32, pairwise)") && Catch::Contains("rank 0"));
  for (const Caught& c : waits.ranks) CHECK((c.ran && c.error && c.ended - c.began < 4'000'000'000));
  // The same where nobody calls anything else.
  const Outcome alone = outcome_of(3, ranks, [](Communicator& comm) {
    std::vector<int> out(2);
    if (comm.rank() == 2) comm.neighbour_exchange(std::vector<int>(), out, Ranks{}, Ranks{0}, {.timeout = 100ms});
    else std::this_thread::sleep_for(500ms);
  });
  INFO(alone);
  CHECK(alone.ranks[2].is(Errc::timeout));
  CHECK(alone.ranks[2].peer == 0);
  CHECK_THAT(alone.ranks[2].text, Catch::Contains("rank 2 in neighbour_exchange(int32, pairwise) #1 waits for data from rank 0 after"));
  // Rank 0 sends to rank 2, which expects nothing: the next call of rank 2 finds it.
  const Outcome unread = outcome_of(3, ranks, [](Communicator& comm) {
    std::vector<int> in(4), out(4);
    const Ranks to = comm.rank() == 0 ? Ranks{1, 2} : Ranks{}, from = comm.rank() == 1 ? Ranks{0} : Ranks{};
    comm.neighbour_exchange(std::span(in).first(to.size() * 2), std::span(out).first(from.size() * 2), to, from, {.timeout = 300ms});
    std::vector<int> data(3);
    comm.all_reduce(data, tally::sum, {.timeout = 3s, .algorithm = "one_shot"});
    comm.barrier({.timeout = 3s});  // rank 1 may have had all it needed
  });
  expect_all(unread, Errc::mismatch, {"rank 0", "rank 2", "neighbour_exchange(int32, pairwise) #1"}, 4s);
  // The two ends disagree about the size of the block.
  expect_all(outcome_of(2, ranks,
                        [](Communicator& comm) {
                          std::vector<int> in(2), out(3);
                          if (comm.rank() == 0) comm.neighbour_exchange(in, std::span(out).first(0), Ranks{1}, Ranks{});
                          else comm.neighbour_exchange(std::span(in).first(0), out, Ranks{}, Ranks{0});
                          comm.barrier();
                        }),
             Errc::mismatch, {"rank 0 sends 8 bytes where rank 1 expects 12"});
}

}  // namespace

TALLY_TEST_BOTH("blocks of their own sizes and places", "", variants)
TALLY_TEST_BOTH("ranks that disagree about the blocks", "", disagreement)
TALLY_TEST_BOTH("neighbours of all kinds of graphs", "", graphs)
TALLY_TEST_BOTH("edges that only one side knows", "", one_sided_edges)
TEST_CASE("bad blocks and neighbours are refused before anything is sent") {
  tally::launch(3, bad_arguments, tally::threads);
}

TEST_CASE("counts beyond 32 bits are planned and checked as others") {
  constexpr std::size_t many = (std::size_t{1} << 33) + 5;
  for (const Collective o : tally::all_operations) {
    if (tally::sizes_differ(o) || o == Collective::barrier) continue;
    for (const std::string_view name : tally::algorithms_for(o)) {
      const tally::AlgorithmRef algorithm = tally::find_algorithm(o, name);
      if (!algorithm.generate) continue;
      for (const int n : {2, 3, 5}) {
        INFO(name_of(o) << " by " << name << " on " << n << " ranks");
        std::size_t sent = 0, received = 0, small_sent = 0;
        for (Rank r = 0; r < n; ++r) {
          const tally::Layout layout{o, r, n, n - 1, many, false}, little{o, r, n, n - 1, 60, false};
          const tally::Plan plan(algorithm.generate(layout.shape()), layout, 1), small_plan(algorithm.generate(little.shape()), little, 1);
          sent += plan.units_sent(), received += plan.units_received(), small_sent += small_plan.units_sent();
          CHECK(plan.messages_sent() == small_plan.messages_sent());
          CHECK(plan.dependencies().size() == small_plan.dependencies().size());
          for (const tally::PlannedStep& step : plan.steps()) REQUIRE(step.count() <= many * at(n));
        }
        CHECK(sent == received);
        // In proportion, but for blocks that do not come out even.
        const double ratio = static_cast<double>(sent) / static_cast<double>(small_sent), expected = static_cast<double>(many) / 60.0;
        CHECK(ratio == Approx(expected).epsilon(0.001));
      }
    }
  }
  tally::launch(1, [](Communicator& comm) {
    // Of one rank: what a call claims to have is checked and nothing of it touched. (1 << 33 elements of memory that is not there.)
    int somewhere = 0;
    const std::span<int> huge(&somewhere, std::size_t{1} << 33), other(reinterpret_cast<int*>(std::uintptr_t{1} << 45), (std::size_t{1} << 33) - 1);
    refused("all_reduce: out has 8589934591 elements, expected 8589934592", [&] { comm.all_reduce(huge, other, tally::sum); });
    refused("all_gather: out has 8589934591 elements, expected 8589934592", [&] { comm.all_gather(huge, other); });
    refused("all_gather_v: out: the block of rank 0, 8589934592 elements from 0 on, is not within its 8589934591 elements", [&] { comm.all_gather_v(huge, other, Counts{huge.size()}); });
  }, tally::threads);
}

TEST_CASE("an all_reduce of more than 2^31 elements, with TALLY_TEST_LONG=1") {
  if (!std::getenv("TALLY_TEST_LONG")) return;
  tally::launch(2, [](Communicator& comm) {
    const std::size_t count = (std::size_t{1} << 31) + 17;
    std::vector<std::int8_t> data(count, static_cast<std::int8_t>(comm.rank() + 1));
    data.back() = 40, data[count - 18] = 50;
    for (const char* name : {"ring", "staged"}) {
      comm.all_reduce(data, tally::sum, {.algorithm = name});
      const bool first = std::string_view(name) == "ring";
      expect(data.back() == (first ? 80 : -96) && data[count - 18] == (first ? 100 : -56) && data[0] == (first ? 3 : 6), "the last and the first elements");
      expect(static_cast<std::size_t>(std::ranges::count(data, static_cast<std::int8_t>(first ? 3 : 6))) == count - 2, "all others");
    }
  }, tally::threads);
}
