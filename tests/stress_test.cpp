// SPDX-License-Identifier: Apache-2.0
// Random sequences of calls, the same on all ranks, with random delays that are not: whatever order things happen
// in, every element of every result has to be what a formula says, and nothing else may be touched.
// TALLY_TEST_SEED=N chooses another sequence, TALLY_TEST_LONG=1 runs twenty times as long (7 minutes: not under ctest,
// which would end it).
#include <catch2/catch.hpp>

#include <sched.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;

namespace {

constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 32);
}
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(mix(seed)) {}
  std::uint64_t below(std::uint64_t limit) { return (mix(state_ += 0x9e3779b97f4a7c15u) >> 11) % limit; }
  bool once_in(std::uint64_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

enum class Kind { all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier };
enum class Type { i32, u64, f32, f64 };
enum class Operator { sum, min, max };
enum class Named { automatic, ring, tree, recursive_doubling, one_shot };

/// One call, the same on all ranks.
struct Plan {
  std::uint64_t number = 0, salt = 0;
  std::size_t communicator = 0, count = 0, offset = 0;
  Kind kind{};
  Type type{};
  Operator op{};
  Named algorithm{};
  Rank root = 0;
  bool in_place = false;

  static Plan draw(Random& random, std::uint64_t number, int n, std::size_t communicators) {
    Plan p;
    p.number = number;
    p.salt = random.below(std::uint64_t{1} << 40);
    p.communicator = random.below(communicators);
    const std::uint64_t how_large = random.below(100);
    p.count = random.below(how_large < 60 ? 16 : how_large < 88 ? 100 : how_large < 98 ? 1000 : 6000);
    p.offset = random.below(4);
    p.kind = static_cast<Kind>(random.below(6));
    p.type = static_cast<Type>(random.below(4));
    p.op = static_cast<Operator>(random.below(3));
    p.algorithm = static_cast<Named>(random.below(5));
    p.root = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    p.in_place = random.once_in(2);
    return p;
  }
  std::string text() const {
    constexpr std::string_view kinds[] = {"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "barrier"}, types[] = {"int32", "uint64", "float", "double"},
                               operators[] = {"sum", "min", "max"}, algorithms[] = {"automatic", "ring", "tree", "recursive_doubling", "one_shot"};
    const auto at = [](const auto& names, auto value) { return std::string(names[static_cast<std::size_t>(value)]); };
    return "call " + std::to_string(number) + ", " + at(kinds, kind) + (in_place ? " in place" : "") + " of " + std::to_string(count) + " " + at(types, type) + ", " + at(operators, op) + ", " +
           at(algorithms, algorithm) + " if it offers that, root " + std::to_string(root) + ", communicator " + std::to_string(communicator);
  }
};

/// Inputs and results of a call in closed form. Rank r has least + slope * ((r + i) % n) in place i: each rank has the
/// least value somewhere, and all are exact in every type, whatever the order of additions.
template <class T>
class Values {
 public:
  Values(const Plan& plan, int n) : salt_(plan.salt), n_(static_cast<std::uint64_t>(n)), op_(plan.op) {}
  T input(Rank r, std::size_t i) const {
    const auto [least, slope] = at(i);
    return scaled(least + slope * ((static_cast<std::uint64_t>(r) + i) % n_));
  }
  T folded(std::size_t i) const {
    const auto [least, slope] = at(i);
    if (op_ == Operator::sum) return scaled(n_ * least + slope * (n_ * (n_ - 1) / 2));
    return scaled(op_ == Operator::min ? least : least + slope * (n_ - 1));
  }

 private:
  struct Line {
    std::uint64_t least, slope;
  };
  Line at(std::size_t i) const {
    const std::uint64_t x = (salt_ + i) * 0x9e3779b97f4a7c15u;
    return {x >> 50, 1 + (x >> 46 & 15)};
  }
  /// So that all bytes of an element matter.
  static T scaled(std::uint64_t x) {
    if constexpr (std::is_same_v<T, std::int32_t>) return static_cast<T>(x * 4099);
    else if constexpr (std::is_same_v<T, std::uint64_t>) return x * 0x10000'0001'0001u;
    else if constexpr (std::is_same_v<T, float>) return static_cast<T>(x);
    else return static_cast<T>(x) * (1 + 0x1p-30);
  }
  std::uint64_t salt_, n_;
  Operator op_;
};

/// Elements with a few before and after that nobody may touch.
template <class T>
class Guarded {
 public:
  std::span<T> reset(std::size_t count, std::size_t offset) {
    first_ = guards + offset;
    count_ = count;
    memory_.assign(first_ + count + guards, guard);
    const std::span<T> all(memory_);
    return all.subspan(first_, count);
  }
  bool untouched_outside() const {
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if ((i < first_ || i >= first_ + count_) && memory_[i] != guard) return false;
    return true;
  }
  static constexpr T guard = static_cast<T>(123456789);  // no input and no result

 private:
  static constexpr std::size_t guards = 8;
  std::vector<T> memory_;
  std::size_t first_ = 0, count_ = 0;
};

/// f(algorithm) with the one that was drawn, or the automatic one where it does not offer the operation.
template <Collective O, class F>
void with_algorithm(Named named, F&& f) {
  const auto offered = [&]<class A>(A algorithm) {
    if constexpr (Algorithm<A, O>) f(algorithm);
    else f(Auto{});
  };
  switch (named) {
    case Named::automatic: return f(Auto{});
    case Named::ring: return offered(Ring{});
    case Named::tree: return offered(Tree{});
    case Named::recursive_doubling: return offered(RecursiveDoubling{});
    case Named::one_shot: return offered(OneShot{});
  }
}
template <class F>
void with_operator(Operator op, F&& f) {
  switch (op) {
    case Operator::sum: return f(sum);
    case Operator::min: return f(min);
    case Operator::max: return f(max);
  }
}

/// Makes calls with elements of one type and checks all that they wrote and all that they must not write.
template <class T>
class Caller {
 public:
  void run(Communicator& comm, const Plan& plan) {
    const Values<T> values(plan, comm.size());
    const Rank me = comm.rank();
    const auto n = static_cast<std::size_t>(comm.size()), count = plan.count, mine = static_cast<std::size_t>(me) * count;
    const auto own = [&](std::size_t i) { return values.input(me, i); };
    const auto folded = [&](std::size_t i) { return values.folded(i); };
    const auto unchanged = [](std::size_t) { return Guarded<T>::guard; };
    const auto both = [&]<Collective O>(std::integral_constant<Collective, O>, auto&& f) {
      with_algorithm<O>(plan.algorithm, [&]<class A>(A algorithm) { with_operator(plan.op, [&](const auto& op) { f(algorithm, op); }); });
    };
    switch (plan.kind) {
      case Kind::all_reduce: {
        const std::span<T> in = filled(in_.reset(count, plan.offset), own), out = plan.in_place ? in : out_.reset(count, plan.offset / 2);
        both(std::integral_constant<Collective, Collective::all_reduce>{}, [&]<class A>(A, const auto& op) { comm.all_reduce<A>(in, out, op); });
        expect(plan, "the result", out, folded);
        if (!plan.in_place) expect(plan, "the input", in, own);
        break;
      }
      case Kind::reduce: {
        const bool root = me == plan.root, shared = plan.in_place && root;
        const std::span<T> in = filled(in_.reset(count, plan.offset), own), out = shared ? in : out_.reset(root || plan.in_place ? count : 0, plan.offset / 2);
        both(std::integral_constant<Collective, Collective::reduce>{}, [&]<class A>(A, const auto& op) { comm.reduce<A>(in, out, op, plan.root); });
        if (root) expect(plan, "the result", out, folded);
        else expect(plan, "the unused result", out, unchanged);
        if (!shared) expect(plan, "the input", in, own);
        break;
      }
      case Kind::broadcast: {
        const std::span<T> data = in_.reset(count, plan.offset);
        if (me == plan.root) filled(data, own);
        with_algorithm<Collective::broadcast>(plan.algorithm, [&]<class A>(A) { comm.broadcast<A>(data, plan.root); });
        expect(plan, "the result", data, [&](std::size_t i) { return values.input(plan.root, i); });
        break;
      }
      case Kind::all_gather: {
        const std::span<T> out = out_.reset(n * count, plan.offset), in = filled(plan.in_place ? out.subspan(mine, count) : in_.reset(count, plan.offset / 2), own);
        with_algorithm<Collective::all_gather>(plan.algorithm, [&]<class A>(A) { comm.all_gather<A>(in, out); });
        for (std::size_t r = 0; r < n; ++r) expect(plan, "the block of rank " + std::to_string(r), out.subspan(r * count, count), [&](std::size_t i) { return values.input(static_cast<Rank>(r), i); });
        if (!plan.in_place) expect(plan, "the input", in, own);
        break;
      }
      case Kind::reduce_scatter: {
        const std::span<T> in = filled(in_.reset(n * count, plan.offset), own), out = plan.in_place ? in.subspan(mine, count) : out_.reset(count, plan.offset / 2);
        both(std::integral_constant<Collective, Collective::reduce_scatter>{}, [&]<class A>(A, const auto& op) { comm.reduce_scatter<A>(in, out, op); });
        expect(plan, "the result", out, [&](std::size_t i) { return values.folded(mine + i); });
        expect(plan, "the input before the result", in.first(mine), own);
        expect(plan, "the input after the result", in.subspan(mine + count), [&](std::size_t i) { return own(mine + count + i); });
        if (!plan.in_place) expect(plan, "the input", in, own);
        break;
      }
      case Kind::barrier: with_algorithm<Collective::barrier>(plan.algorithm, [&]<class A>(A) { comm.barrier<A>(); }); break;
    }
    if (!in_.untouched_outside() || !out_.untouched_outside()) throw std::runtime_error(plan.text() + ": wrote outside of its buffers");
  }

 private:
  template <class F>
  static std::span<T> filled(std::span<T> data, const F& value) {
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = value(i);
    return data;
  }
  template <class F>
  static void expect(const Plan& plan, std::string_view what, std::span<const T> found, const F& value) {
    for (std::size_t i = 0; i < found.size(); ++i)
      if (found[i] != value(i))
        throw std::runtime_error(plan.text() + ": element " + std::to_string(i) + " of " + std::string(what) + " is " + std::to_string(found[i]) + ", not " + std::to_string(value(i)));
  }
  Guarded<T> in_, out_;
};

/// What makes ranks meet in every order: a moment of work, of another thread's, or of sleep.
void dawdle(Random& random) {
  if (random.once_in(16))
    for (std::uint64_t i = random.below(2000); i > 0; --i) cpu_pause();
  if (random.once_in(32)) ::sched_yield();
  if (random.once_in(2000)) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

constexpr std::uint64_t batch = 256;  // after so many calls rank 0 decides whether there is time for more

struct Progressed {
  std::uint64_t calls = 0, renewed = 0;
};

void run_rank(Communicator& comm, std::uint64_t seed, std::chrono::nanoseconds budget, Progressed& progressed) {
  const auto end = std::chrono::steady_clock::now() + budget;
  const auto with_seed = [&](const std::string& what) {
    return std::runtime_error("seed " + std::to_string(seed) + ", rank " + std::to_string(comm.rank()) + " of " + std::to_string(comm.size()) + ", " + what);
  };
  Random common(seed), own(mix(seed) + static_cast<std::uint64_t>(comm.rank()) + 1);
  std::vector<std::optional<Communicator>> duplicates(2);
  for (auto& duplicate : duplicates) duplicate.emplace(comm.duplicate());
  Caller<std::int32_t> i32;
  Caller<std::uint64_t> u64;
  Caller<float> f32;
  Caller<double> f64;
  for (std::uint64_t number = 0, more = 1; more != 0;) {
    for (const std::uint64_t until = number + batch; number < until; ++number) {
      const Plan plan = Plan::draw(common, number, comm.size(), 1 + duplicates.size());
      Communicator& used = plan.communicator == 0 ? comm : *duplicates[plan.communicator - 1];
      dawdle(own);
      try {
        switch (plan.type) {
          case Type::i32: i32.run(used, plan); break;
          case Type::u64: u64.run(used, plan); break;
          case Type::f32: f32.run(used, plan); break;
          case Type::f64: f64.run(used, plan); break;
        }
      } catch (const Error& error) {
        throw with_seed(plan.text() + ": " + error.what());
      } catch (const std::exception& error) {
        throw with_seed(error.what());
      }
      // Whoever is done with a communicator leaves it, while others may still be in its last call.
      if (common.once_in(2000)) {
        std::optional<Communicator>& renewed = duplicates[common.below(duplicates.size())];
        renewed.reset();
        renewed.emplace(comm.duplicate());
        if (comm.rank() == 0) ++progressed.renewed;
      }
    }
    more = comm.rank() == 0 && std::chrono::steady_clock::now() < end;
    comm.broadcast(std::span(&more, 1), 0);
    if (comm.rank() == 0) progressed.calls = number;
  }
}

std::uint64_t chosen_seed() {
  const char* text = std::getenv("TALLY_TEST_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 1;
}

/// `share` of about ten seconds.
std::uint64_t stress(RankKind kind, int n, SlotOptions slots, bool accounting, double share) {
  Options options;
  options.slots = slots;
  options.accounting = accounting;
  options.timeout = std::chrono::seconds(30);
  const char* is_long = std::getenv("TALLY_TEST_LONG");
  const std::chrono::duration<double> budget(10 * share * (is_long && *is_long == '1' ? 20 : 1));
  const test::Shared<Progressed> progressed;
  const auto begin = std::chrono::steady_clock::now();
  try {
    launch(
        n, [&](Communicator& comm) { run_rank(comm, chosen_seed(), std::chrono::duration_cast<std::chrono::nanoseconds>(budget), *progressed); }, kind, options);
  } catch (const std::exception& error) {
    FAIL(error.what());
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::printf("%s, %d rank(s), %d slot(s) of %zu bytes%s: %llu calls right, %llu communicators renewed, %.1f s\n", kind == threads ? "threads" : "processes", n, slots.slots, slots.slot_bytes,
              accounting ? "" : ", without accounting", static_cast<unsigned long long>(progressed->calls), static_cast<unsigned long long>(progressed->renewed), took.count());
  CHECK(progressed->calls >= batch);
  return progressed->calls;
}

SlotOptions few(int slots, std::size_t bytes) {
  SlotOptions options;
  options.slots = slots;
  options.slot_bytes = bytes;
  return options;
}

void stress_all(RankKind kind) {
  const SlotOptions usual, one = few(1, 128), two = few(2, 256);
  std::uint64_t calls = 0;
  calls += stress(kind, 2, usual, true, 0.18);
  calls += stress(kind, 2, usual, false, 0.14);
  calls += stress(kind, 2, one, true, 0.14);
  calls += stress(kind, 2, two, true, 0.14);
  calls += stress(kind, 1, usual, true, 0.02);
  calls += stress(kind, 3, usual, true, 0.06);
  calls += stress(kind, 3, one, true, 0.06);
  calls += stress(kind, 4, usual, false, 0.06);
  calls += stress(kind, 4, two, true, 0.06);
  calls += stress(kind, 5, one, false, 0.07);
  calls += stress(kind, 8, two, true, 0.07);
  std::printf("%llu calls, seed %llu\n", static_cast<unsigned long long>(calls), static_cast<unsigned long long>(chosen_seed()));
}

}  // namespace

TEST_CASE("random calls with random delays (threads)") { stress_all(threads); }
TEST_CASE("random calls with random delays (processes)", "[processes]") { stress_all(processes); }
