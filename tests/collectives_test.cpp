// SPDX-License-Identifier: Apache-2.0
// Every operation, algorithm, element type and operator, in place and not, on every transport, against results
// computed here. All values are small integers, so results are exact in every type and for every order.
#include <catch2/catch.hpp>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <tally/tally.hpp>

#include "sanitized.hpp"

using namespace tally;

namespace {

const std::vector<int> rank_counts = test::sanitized ? std::vector{1, 2, 3, 5} : std::vector{1, 2, 3, 4, 5, 7, 8};

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

template <class T>
T input(Rank r, std::size_t i, bool for_product) {
  if (for_product) return static_cast<T>(1 + (static_cast<std::size_t>(r) + i) % 2);
  const int value = static_cast<int>((static_cast<std::size_t>(r) * 7 + i * 3) % 11);
  return static_cast<T>(std::is_signed_v<T> ? value - 5 : value);
}

/// Every rank's inputs folded in rank order.
template <class T, class Op>
std::vector<T> folded(int n, std::size_t count, const Op& op) {
  constexpr bool product = std::is_same_v<Op, Prod>;
  std::vector<T> result(count);
  for (std::size_t i = 0; i < count; ++i) {
    T value = input<T>(0, i, product);
    for (Rank r = 1; r < n; ++r) value = op(value, input<T>(r, i, product));
    if constexpr (std::is_same_v<Op, Mean>) value /= static_cast<T>(n);
    result[i] = value;
  }
  return result;
}
template <class T>
std::vector<T> inputs(Rank r, std::size_t count, bool product = false) {
  std::vector<T> result(count);
  for (std::size_t i = 0; i < count; ++i) result[i] = input<T>(r, i, product);
  return result;
}

/// Predictions of the plan, compared with what the transport counted.
struct Traffic {
  Communicator& comm;
  TransportCounters before = comm.counters();
  void check(const Report& report, Layout layout, AlgorithmRef algorithm, std::size_t grain, const std::string& what) const {
    layout.group = comm.group();
    const Plan plan(algorithm.generate(layout.shape()), layout, grain);
    const TransportCounters after = comm.counters();
    expect(report.bytes_sent == plan.units_sent(), what + ": bytes sent as predicted");
    expect(report.bytes_received == plan.units_received(), what + ": bytes received as predicted");
    expect(after.messages_sent - before.messages_sent == plan.messages_sent(), what + ": messages as predicted");
    expect(report.bytes_wire >= report.bytes_sent, what + ": the wire carries at least the payload");
    expect(report.elapsed == report.busy() + report.idle() + report.undriven && report.exposed == report.elapsed, what + ": exact partition");
    expect(report.algorithm_name() == algorithm.name, what + ": algorithm named");
  }
};

template <class A, class T, class Op>
void reducing_operations(Communicator& comm, std::size_t count, const Op& op, const std::string& label) {
  const int n = comm.size();
  const Rank me = comm.rank();
  constexpr bool product = std::is_same_v<Op, Prod>;
  const std::vector<T> mine = inputs<T>(me, count, product), want = folded<T>(n, count, op);
  if constexpr (Algorithm<A, Collective::all_reduce>) {
    const std::string what = label + " all_reduce " + std::string(A::name);
    std::vector<T> data = mine;
    Traffic traffic{comm};
    const Report report = comm.template all_reduce<A>(std::span(data), op);
    expect(data == want, what + " in place");
    traffic.check(report, {Collective::all_reduce, me, n, 0, count, count > 0}, algorithm_ref<A, Collective::all_reduce>(), sizeof(T), what);
    std::vector<T> out(count);
    const std::vector<T> in = mine;
    comm.template all_reduce<A>(std::span(in), std::span(out), op);
    expect(out == want && in == mine, what + " out of place");
  }
  if constexpr (Algorithm<A, Collective::reduce>) {
    for (const Rank root : {0, n - 1, n / 2}) {
      const std::string what = label + " reduce " + std::string(A::name) + " to " + std::to_string(root);
      std::vector<T> out(me == root ? count : 0), in = mine;
      Traffic traffic{comm};
      const Report report = comm.template reduce<A>(in, out, op, root);
      expect(in == mine && (me != root || out == want), what);
      traffic.check(report, {Collective::reduce, me, n, root, count, false}, algorithm_ref<A, Collective::reduce>(), sizeof(T), what);
      std::vector<T> untouched(count, T(99));
      comm.template reduce<A>(in, me == root ? std::span(in) : std::span(untouched), op, root);
      expect(me == root ? in == want : untouched == std::vector<T>(count, T(99)), what + " in place");
    }
  }
  if constexpr (Algorithm<A, Collective::reduce_scatter>) {
    const std::string what = label + " reduce_scatter " + std::string(A::name);
    const std::size_t all = count * static_cast<std::size_t>(n), first = count * static_cast<std::size_t>(me);
    const std::vector<T> whole = folded<T>(n, all, op), block(whole.begin() + static_cast<std::ptrdiff_t>(first), whole.begin() + static_cast<std::ptrdiff_t>(first + count));
    const std::vector<T> original = inputs<T>(me, all, product);
    std::vector<T> in = original, out(count);
    Traffic traffic{comm};
    const Report report = comm.template reduce_scatter<A>(in, out, op);
    expect(out == block && in == original, what);
    traffic.check(report, {Collective::reduce_scatter, me, n, 0, count, false}, algorithm_ref<A, Collective::reduce_scatter>(), sizeof(T), what);
    comm.template reduce_scatter<A>(std::span(in), std::span(in).subspan(first, count), op);
    expect(std::vector<T>(in.begin() + static_cast<std::ptrdiff_t>(first), in.begin() + static_cast<std::ptrdiff_t>(first + count)) == block, what + " in place");
    for (std::size_t i = 0; i < all; ++i)
      if (i < first || i >= first + count) expect(in[i] == original[i], what + " in place leaves the rest alone");
  }
}

template <class A, class T>
void moving_operations(Communicator& comm, std::size_t count, const std::string& label) {
  const int n = comm.size();
  const Rank me = comm.rank();
  if constexpr (Algorithm<A, Collective::broadcast>) {
    for (const Rank root : {0, n - 1, n / 2}) {
      const std::string what = label + " broadcast " + std::string(A::name) + " from " + std::to_string(root);
      std::vector<T> data = me == root ? inputs<T>(root, count) : std::vector<T>(count);
      Traffic traffic{comm};
      const Report report = comm.template broadcast<A>(data, root);
      expect(data == inputs<T>(root, count), what);
      traffic.check(report, {Collective::broadcast, me, n, root, count, false}, algorithm_ref<A, Collective::broadcast>(), sizeof(T), what);
    }
  }
  if constexpr (Algorithm<A, Collective::all_gather>) {
    const std::string what = label + " all_gather " + std::string(A::name);
    const std::vector<T> in = inputs<T>(me, count);
    std::vector<T> out(count * static_cast<std::size_t>(n)), want;
    for (Rank r = 0; r < n; ++r) {
      const std::vector<T> block = inputs<T>(r, count);
      want.insert(want.end(), block.begin(), block.end());
    }
    Traffic traffic{comm};
    const Report report = comm.template all_gather<A>(std::span(in), std::span(out));
    expect(out == want, what);
    traffic.check(report, {Collective::all_gather, me, n, 0, count, false}, algorithm_ref<A, Collective::all_gather>(), sizeof(T), what);
    std::fill(out.begin(), out.end(), T(0));
    const auto block = std::span(out).subspan(static_cast<std::size_t>(me) * count, count);
    std::copy(in.begin(), in.end(), block.begin());
    comm.template all_gather<A>(block, std::span(out));
    expect(out == want, what + " in place");
  }
}

/// Types and operators meet only in the fold, which does not know the algorithm: one that folds on the left and one
/// that folds on the right and locally are enough (all of them would take the compiler minutes).
template <class T, class Op>
void both_sides(Communicator& comm, std::size_t count, const Op& op, const std::string& label) {
  reducing_operations<Ring, T>(comm, count, op, label);
  reducing_operations<OneShot, T>(comm, count, op, label);
}
template <class T, class Op>
void all_algorithms(Communicator& comm, std::size_t count, const Op& op, const std::string& label) {
  reducing_operations<Ring, T>(comm, count, op, label);
  reducing_operations<Tree, T>(comm, count, op, label);
  reducing_operations<RecursiveDoubling, T>(comm, count, op, label);
  reducing_operations<OneShot, T>(comm, count, op, label);
  reducing_operations<RecursiveHalving, T>(comm, count, op, label);
  reducing_operations<TwoShot, T>(comm, count, op, label);
  reducing_operations<Chain, T>(comm, count, op, label);
  reducing_operations<DoubleTree, T>(comm, count, op, label);
  reducing_operations<Hierarchical, T>(comm, count, op, label);
}
template <class T>
void all_movers(Communicator& comm, std::size_t count, const std::string& label) {
  moving_operations<Ring, T>(comm, count, label);
  moving_operations<Tree, T>(comm, count, label);
  moving_operations<RecursiveDoubling, T>(comm, count, label);
  moving_operations<OneShot, T>(comm, count, label);
  moving_operations<TwoShot, T>(comm, count, label);
  moving_operations<Chain, T>(comm, count, label);
  moving_operations<DoubleTree, T>(comm, count, label);
  moving_operations<Hierarchical, T>(comm, count, label);
}

void every_count(Communicator& comm) {
  const auto n = static_cast<std::size_t>(comm.size());
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, n - 1, n, n + 1, 3 * n + 1, std::size_t{1000}, std::size_t{70'001}}) {
    if (test::sanitized && count > 70'000 && n != 3) continue;
    const std::string label = std::to_string(n) + " ranks, " + std::to_string(count) + " floats,";
    all_algorithms<float>(comm, count, sum, label);
    all_movers<float>(comm, count, label);
    comm.barrier();
    comm.barrier<Ring>();
    comm.barrier<Tree>();
  }
}

template <class T>
void every_operator(Communicator& comm) {
  const std::string label = std::to_string(comm.size()) + " ranks, type of " + std::to_string(sizeof(T)) + " bytes,";
  for (const std::size_t count : {std::size_t{5}, std::size_t{333}}) {
    both_sides<T>(comm, count, sum, label);
    both_sides<T>(comm, count, prod, label);
    both_sides<T>(comm, count, min, label);
    both_sides<T>(comm, count, max, label);
    if constexpr (std::floating_point<T>) both_sides<T>(comm, count, mean, label);
    both_sides<T>(comm, count, commutative([](T a, T b) { return a == b ? a : static_cast<T>(std::max(a, b) - 0); }), label);
    moving_operations<OneShot, T>(comm, count, label);
  }
}
void every_type(Communicator& comm) {
  every_operator<signed char>(comm);
  every_operator<short>(comm);
  every_operator<int>(comm);
  every_operator<long>(comm);
  every_operator<long long>(comm);
  every_operator<unsigned char>(comm);
  every_operator<unsigned short>(comm);
  every_operator<unsigned>(comm);
  every_operator<unsigned long long>(comm);
  every_operator<char>(comm);
  every_operator<float>(comm);
  every_operator<double>(comm);
  every_operator<long double>(comm);
}

/// The same slots, but so few and small that every message is cut and back-pressure is the rule.
Options cramped() {
  Options options;
  options.slots.slots = 1;
  options.slots.slot_bytes = 128;
  return options;
}
Options grouped(int group) {
  Options options;
  options.group = group;
  return options;
}

}  // namespace

TEST_CASE("every operation, algorithm and count, threads") {
  for (const int n : rank_counts) launch(n, every_count, threads);
  launch(5, every_count, threads, cramped());
  launch(7, every_count, threads, grouped(3));
}
TEST_CASE("every operation, algorithm and count, processes", "[processes]") {
  for (const int n : rank_counts) launch(n, every_count);
  launch(5, every_count, processes, cramped());
  launch(8, every_count, processes, grouped(4));
}
TEST_CASE("every element type and operator, threads") { launch(3, every_type, threads); }
TEST_CASE("every element type and operator, processes", "[processes]") { launch(4, every_type); }

TEST_CASE("integer overflow wraps") {
  launch(2, [](Communicator& comm) {
    std::array<int, 1> a{std::numeric_limits<int>::max()};
    comm.all_reduce(a, sum);
    expect(a[0] == -2, "int sum wraps");
    std::array<short, 1> b{20'000};
    comm.all_reduce(b, sum);
    expect(b[0] == static_cast<short>(40'000), "short sum wraps");
    std::array<unsigned short, 1> c{65'535};
    comm.all_reduce(c, prod);
    expect(c[0] == 1, "unsigned short product wraps");
    std::array<long, 2> d{std::numeric_limits<long>::min(), 1};
    comm.all_reduce(d, sum);
    expect(d[0] == 0 && d[1] == 2, "long sum wraps");
  }, threads);
}

TEST_CASE("the same bits on every rank, and for every algorithm that declares the fixed order") {
  // Values over 60 binary orders of magnitude: any other order or bracketing shows in the last bits.
  const auto random_values = [](Rank r, std::size_t count) {
    std::mt19937_64 random(static_cast<std::uint64_t>(r) + 1);
    std::uniform_real_distribution<double> mantissa(-1, 1);
    std::vector<double> values(count);
    for (double& v : values) v = std::ldexp(mantissa(random), static_cast<int>(random() % 60));
    return values;
  };
  const auto body = [&](Communicator& comm) {
    for (const std::size_t count : {std::size_t{1}, std::size_t{64}, std::size_t{5'000}}) {
      const std::vector<double> mine = random_values(comm.rank(), count);
      const auto run = [&]<class A>(std::type_identity<A>) {
        std::vector<double> data = mine, all(count * static_cast<std::size_t>(comm.size()));
        comm.all_reduce<A>(data, sum);
        comm.all_gather(data, all);
        for (int r = 0; r < comm.size(); ++r)
          expect(std::memcmp(all.data() + static_cast<std::size_t>(r) * count, data.data(), count * sizeof(double)) == 0, "the same bits on every rank, " + std::string(A::name));
        return data;
      };
      const std::vector<double> doubling = run(std::type_identity<RecursiveDoubling>{}), tree = run(std::type_identity<Tree>{}), direct = run(std::type_identity<OneShot>{});
      const std::vector<double> halving = run(std::type_identity<RecursiveHalving>{}), two_shot = run(std::type_identity<TwoShot>{});
      run(std::type_identity<Ring>{});
      run(std::type_identity<Chain>{});
      run(std::type_identity<DoubleTree>{});
      const std::vector<double> hierarchical = run(std::type_identity<Hierarchical>{});
      expect(std::memcmp(doubling.data(), tree.data(), count * sizeof(double)) == 0, "tree has doubling's bits");
      expect(std::memcmp(doubling.data(), direct.data(), count * sizeof(double)) == 0, "one-shot has doubling's bits");
      expect(std::memcmp(doubling.data(), halving.data(), count * sizeof(double)) == 0, "halving has doubling's bits");
      expect(std::memcmp(doubling.data(), two_shot.data(), count * sizeof(double)) == 0, "two-shot has doubling's bits");
      if (std::has_single_bit(static_cast<unsigned>(comm.group().largest(comm.size())))) expect(std::memcmp(doubling.data(), hierarchical.data(), count * sizeof(double)) == 0, "hierarchical in groups of a power of two has doubling's bits");
      // The definition itself: fold(lo, hi) = fold(lo, mid) + fold(mid, hi).
      std::vector<std::vector<double>> values;
      for (int r = 0; r < comm.size(); ++r) values.push_back(random_values(r, count));
      const auto fold = [&](auto& self, int lo, int hi, std::size_t i) -> double {
        if (hi - lo == 1) return values[static_cast<std::size_t>(lo)][i];
        int half = 1;
        while (half * 2 < hi - lo) half *= 2;
        return self(self, lo, lo + half, i) + self(self, lo + half, hi, i);
      };
      for (std::size_t i = 0; i < count; ++i) expect(fold(fold, 0, comm.size(), i) == tree[i], "the declared bracketing");
    }
  };
  for (const int n : {2, 3, 5, 6, 7, 8}) launch(n, body, threads);
  launch(7, body, threads, cramped());
  for (const int group : {2, 3, 4}) launch(7, body, threads, grouped(group));
}

TEST_CASE("results that the caches cannot hold", "[processes]") {
  // Ranks that share a cache fill it more than once: what is only written goes past it, however it comes.
  const auto body = [](Communicator& comm) {
    const auto n = static_cast<std::size_t>(comm.size()), me = static_cast<std::size_t>(comm.rank());
    const std::size_t count = (last_level_cache_bytes() / n + 1000) / sizeof(std::uint64_t) / (n + 1) + 13;
    expect(exceeds_caches({Collective::all_gather, comm.rank(), comm.size(), 0, count, false}, sizeof(std::uint64_t)), "more than the caches hold");
    std::vector<std::uint64_t> in(count), out(count * n);
    for (std::size_t i = 0; i < count; ++i) in[i] = me << 56 | i;
    const auto gathered = [&] {
      std::size_t wrong = 0;
      for (std::size_t r = 0; r < n; ++r)
        for (std::size_t i = 0; i < count; ++i) wrong += std::exchange(out[r * count + i], 0) != (r << 56 | i);
      return wrong == 0;
    };
    for (const char* algorithm : {"one_shot", "ring", "recursive_doubling", "staged"}) {
      comm.all_gather(in, out, {.algorithm = algorithm});
      expect(gathered(), std::string("all_gather by ") + algorithm);
      if (comm.rank() == 1)
        for (std::size_t i = 0; i < out.size(); ++i) out[i] = i;
      if (std::string_view(algorithm) == "ring" || std::string_view(algorithm) == "recursive_doubling") continue;
      comm.broadcast(out, 1, {.algorithm = algorithm});
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < out.size(); ++i) wrong += out[i] != i;
      expect(wrong == 0, std::string("broadcast by ") + algorithm);
    }
    const Symmetric<std::uint64_t> from = comm.allocate<std::uint64_t>(count), to = comm.allocate<std::uint64_t>(count * n);
    std::copy(in.begin(), in.end(), from.span().begin());
    comm.all_gather(from.span(), to.span());
    std::copy(to.span().begin(), to.span().end(), out.begin());
    expect(gathered(), "all_gather in symmetric memory");
  };
  launch(2, body);
  launch(3, body, threads);
}

TEST_CASE("algorithms can be chosen by name, and users can bring their own") {
  Options options;
  options.algorithms = AlgorithmOverrides("all_reduce=tree,broadcast=one_shot");
  launch(3, [](Communicator& comm) {
    std::vector<int> data{1};
    expect(comm.all_reduce(data, sum).algorithm_name() == "tree", "tree by option");
    expect(comm.broadcast(data, 0).algorithm_name() == "one_shot", "one_shot by option");
    expect(comm.all_reduce<Ring>(data, sum).algorithm_name() == "ring", "by type, before any option");
  }, threads, options);
  CHECK(AlgorithmOverrides("ring").of(Collective::all_gather).name == "ring");
  CHECK(AlgorithmOverrides("ring").of(Collective::broadcast).generate == nullptr);
  CHECK_THROWS_AS(AlgorithmOverrides("all_reduce=rign"), Error);
  CHECK_THROWS_AS(AlgorithmOverrides("broadcast=ring"), Error);
}

namespace {
/// Everyone hands everything to the next rank, n-1 times: wasteful, but a proper all_reduce in 6 lines.
struct PassAround {
  static constexpr std::string_view name = "pass_around";
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    const Range box[2] = {{Buffer::scratch, 0, in.count()}, {Buffer::scratch, in.count(), in.count()}};
    co_yield copy(in.all(), out.all());
    co_yield copy(in.all(), box[0]);
    for (int s = 0; s < n - 1; ++s) {
      co_yield send(wrap(me + 1, n), box[s % 2]);
      co_yield receive(wrap(me - 1, n), box[(s + 1) % 2]);
      co_yield combine(box[(s + 1) % 2], out.all());
    }
  }
};
/// Right out of place; in place the result of others overwrites what it has still to send.
struct ReceivesFirst {
  static Steps all_reduce(Shape shape) {
    const auto [me, n, root, in, out, group] = shape;
    if (me != 0) {
      co_yield receive(0, out.all());
      co_yield send(0, in.all());
      co_return;
    }
    co_yield copy(in.all(), out.all());
    for (Rank r = 1; r < n; ++r) co_yield receive_combine(r, out.all());
    for (Rank r = 1; r < n; ++r) co_yield send(r, out.all());
  }
};
}  // namespace

TEST_CASE("the checker tries in place, too, unless it is told how") {
  const std::string problem = check({{Collective::all_reduce, 0, 4, 0, 10}, Folding::cyclic}, ReceivesFirst::all_reduce);
  CHECK(problem.rfind("in place: deadlock", 0) == 0);
  CHECK(check({{Collective::all_reduce, 0, 4, 0, 10, true}, Folding::cyclic}, ReceivesFirst::all_reduce).rfind("deadlock", 0) == 0);
}
TEST_CASE("a user's algorithm runs and is checked") {
  // It folds from each rank's own value on, so ranks differ in their bits: the checker says so.
  CHECK(check({{Collective::all_reduce, 0, 4, 0, 10, true}, Folding::cyclic}, PassAround::all_reduce) != "");
  launch(4, [](Communicator& comm) {
    std::vector<int> data(1000, comm.rank() + 1);
    const Report report = comm.all_reduce<PassAround>(data, sum);
    expect(data == std::vector<int>(1000, 10), "sum of 1..4");
    expect(report.algorithm_name() == "pass_around", "named in the report");
  }, threads);
}

namespace {
struct Renamed : Ring {
  static constexpr std::string_view name = "renamed";
};
}  // namespace

TEST_CASE("algorithms that share a generator keep their names") {
  launch(2, [](Communicator& comm) {
    std::vector<int> data(10, 1);
    expect(comm.all_reduce<Ring>(data, max).algorithm_name() == "ring", "ring");
    expect(comm.all_reduce<Renamed>(data, max).algorithm_name() == "renamed", "renamed");
    expect(comm.all_reduce<Ring>(data, max).algorithm_name() == "ring", "ring again");
  }, threads);
}

TEST_CASE("duplicates are independent") {
  const auto body = [](Communicator& comm) {
    Communicator a = comm.duplicate();
    Communicator b = a.duplicate();
    std::vector<int> x(10'000, 1), y(10'000, 2), z(10'000, 3);
    // Crossing orders on different communicators are legal for operations that need no one to answer.
    if (comm.rank() == 0) a.broadcast(std::span(x).first(16), 0), b.broadcast(std::span(y).first(16), 0);
    else b.broadcast(std::span(y).first(16), 0), a.broadcast(std::span(x).first(16), 0);
    a.all_reduce(x, sum);
    comm.all_reduce(z, sum);
    b.all_reduce(y, sum);
    expect(x[5] == comm.size() && y[5] == 2 * comm.size() && z[5] == 3 * comm.size(), "own data each");
    expect(a.ledger().rows().size() == 4 && b.ledger().rows().size() == 2, "own ledgers");  // a: duplicate() used it too
  };
  launch(3, body, threads);
}
TEST_CASE("duplicates are independent, processes", "[processes]") {
  launch(3, [](Communicator& comm) {
    for (int i = 0; i < 20; ++i) {
      Communicator a = comm.duplicate();
      std::vector<int> x(5'000, comm.rank());
      a.all_reduce(x, sum);
      expect(x[77] == 3, "sum of ranks");
    }
  });
}
