// SPDX-License-Identifier: Apache-2.0
// One thread at a time: thread_rule.hpp transcribed step by step and run in all interleavings on two memories that
// reorder (model.hpp), also broken in every way that should matter; and the rule itself under threads that hammer it.
#include <catch2/catch.hpp>

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>

#include "model.hpp"

using namespace model;

namespace {

constexpr Memory memories[] = {Memory::tso, Memory::weak};
constexpr Order acquire = Order::acquire, relaxed = Order::relaxed, release = Order::release;

Result explored(const std::string& what, const Model& m, Memory memory) {
  const Result result = explore(m, memory);
  std::printf("%-58s %-5s %8zu states%s\n", what.c_str(), memory == Memory::tso ? "tso" : "weak", result.states, result.violation.empty() ? "" : ": fails");
  return result;
}
void holds(const std::string& what, const Model& m) {
  for (const Memory memory : memories) {
    CAPTURE(what);
    CHECK(explored(what, m, memory).violation == "");
  }
}
void fails(const std::string& what, const Model& m, Memory memory, const std::string& why) {
  const Result result = explored(what, m, memory);
  CAPTURE(what, result.violation);
  CHECK(result.violation.find(why) != std::string::npos);
}
void fails(const std::string& what, const Model& m, const std::string& why) {
  for (const Memory memory : memories) fails(what, m, memory, why);
}

// ThreadRule::enter, take_over and exit.

struct RuleBreaks {
  bool one_mark = false;         // all threads mark themselves in one word, as a first version did
  bool own_fence_only = false;   // who takes over does not make the others fence
  bool no_second_look = false;   // the user marks itself and does not look whether it still is the user
  bool looks_first = false;      // who takes over looks for marks before it says so
  bool not_given_back = false;   // who is refused stays the user
  bool given_to_marked = false;  // who is refused hands back to whom it found, instead of whom it took from
  bool no_mutex = false, exit_relaxed = false;
};

/// Threads that each use a communicator `rounds[t]` times, or are refused; nobody may find another one inside.
Model thread_rule(const std::vector<int>& rounds, const RuleBreaks& breaks = {}) {
  enum : int { user, mutex, inside, zero, mark };  // one mark for each thread from there on
  const int n = static_cast<int>(rounds.size());
  Model m{{"user", "mutex", "inside", "zero", "mark 0", "mark 1", "mark 2"}, std::vector<Program>(rounds.size())};
  for (int t = 0; t < n; ++t) {
    Program& p = m.programs[static_cast<std::size_t>(t)];
    const auto me = static_cast<Value>(t + 1);
    const auto mark_of = [&](int thread) { return breaks.one_mark ? mark : mark + thread; };
    std::vector<int> others;
    for (int o = 0; o < n; ++o)
      if (breaks.one_mark ? o == t : o != t) others.push_back(o);
    for (int round = 0; round < rounds[static_cast<std::size_t>(t)]; ++round) {
      for (const int reg : {1, 2}) p.load(zero, relaxed, reg);  // whom take_over() finds
      // enter()
      p.load(user, relaxed, 0);
      if (breaks.one_mark) p.load(mark, relaxed, 6);
      const auto fast = [&] {
        p.store(mark_of(t), me);
        if (!breaks.no_second_look) p.load(user, relaxed, 0);
        p.unless(0, me, [&] { p.store(mark_of(t), 0, release); });
      };
      if (breaks.one_mark) p.when(0, me, [&] { p.when(6, 0, fast); });
      else p.when(0, me, fast);
      // take_over()
      p.unless(0, me, [&] {
        if (!breaks.no_mutex) {
          const std::size_t again = p.here();
          p.compare_exchange(mutex, 0, 1, 5);
          p.when(5, 0, [&] { p.go_to(again); });
        }
        const auto look = [&] {
          for (std::size_t i = 0; i < others.size(); ++i) p.load(mark_of(others[i]), acquire, static_cast<int>(i) + 1);
        };
        p.load(user, relaxed, 3);
        if (breaks.looks_first) look();
        p.store(user, me);
        if (breaks.own_fence_only) p.fence();
        else p.membarrier(static_cast<std::size_t>(t), rounds.size());
        if (!breaks.looks_first) look();
        const auto refused = [&](std::size_t whom) {
          if (breaks.not_given_back || breaks.one_mark) return;
          if (breaks.given_to_marked) return p.store(user, static_cast<Value>(others[whom] + 1));
          for (int before = 0; before <= n; ++before) p.when(3, static_cast<Value>(before), [&] { p.store(user, static_cast<Value>(before)); });
        };
        p.unless(1, 0, [&] { refused(0); });
        p.when(1, 0, [&] {
          if (others.size() > 1) p.unless(2, 0, [&] { refused(1); });
          p.when(2, 0, [&] { p.store(mark_of(t), me), p.fence(); });
        });
        if (!breaks.no_mutex) p.store(mutex, 0, release);
      });
      p.when(1, 0, [&] {
        p.when(2, 0, [&] {
          p.load(inside, relaxed, 4);
          p.expect("nobody is inside yet", [](const Registers& r) { return r[4] == 0; });
          p.store(inside, me);
          p.load(inside, relaxed, 4);
          p.expect("nobody else has come in", [=](const Registers& r) { return r[4] == me; });
          p.store(inside, 0);
          p.store(mark_of(t), 0, breaks.exit_relaxed ? relaxed : release);  // exit()
        });
      });
    }
  }
  return m;
}

}  // namespace

TEST_CASE("two threads are never inside at once", "[proof]") {
  holds("thread rule, two threads, 2 and 1 calls", thread_rule({2, 1}));
  holds("thread rule, two threads, 2 calls each", thread_rule({2, 2}));
  holds("thread rule, two threads, 3 and 2 calls", thread_rule({3, 2}));
  holds("thread rule, three threads", thread_rule({1, 1, 1}));

  const std::string in = "finds it untrue that nobody";
  fails("one mark for all", thread_rule({2, 1}, {.one_mark = true}), in);
  fails("only its own fence", thread_rule({2, 1}, {.own_fence_only = true}), in);
  fails("no second look", thread_rule({2, 1}, {.no_second_look = true}), in);
  fails("looks before it says so", thread_rule({2, 1}, {.looks_first = true}), in);
  fails("not given back", thread_rule({2, 2}, {.not_given_back = true}), in);
  fails("no mutex", thread_rule({1, 1}, {.no_mutex = true}), in);
  fails("exit relaxed", thread_rule({2, 1}, {.exit_relaxed = true}), Memory::weak, in);
}

TEST_CASE("three threads are never inside at once, a longer look", "[proof]") {
  holds("thread rule, three threads, 2, 1 and 1 calls", thread_rule({2, 1, 1}));
  fails("given to whom it found", thread_rule({2, 1, 1}, {.given_to_marked = true}), Memory::tso, "finds it untrue that nobody");
}

TEST_CASE("the rule refuses the second thread, itself inside, and nobody else") {
  tally::ThreadRule rule;
  const auto refused = [&] {
    try {
      rule.enter();
    } catch (const tally::Error& error) {
      CHECK(error.errc() == tally::Errc::invalid_argument);
      return std::string(error.text());
    }
    rule.exit();
    return std::string();
  };
  const auto elsewhere = [&] {
    std::string text;
    std::thread([&] { text = refused(); }).join();
    return text;
  };
  CHECK(refused() == "");
  CHECK(elsewhere() == "");
  CHECK(refused() == "");
  rule.enter();
  for (int i = 0; i < 3; ++i) {  // who was refused once is refused again, and the one inside is not disturbed
    CHECK(elsewhere() == "this communicator is in use by another thread: one at a time, or a duplicate() for each");
    CHECK(refused() == "this communicator is called from inside one of its own operations");
  }
  rule.exit();
  CHECK(refused() == "");
  rule.enter();
  rule.exit();
  CHECK(elsewhere() == "");
}

TEST_CASE("threads that hammer the rule are inside one at a time") {
  tally::ThreadRule rule;
  constexpr int threads = 3;
  std::atomic<int> ready{0};
  std::atomic<bool> ended{false};
  std::size_t guarded = 0;  // plain: a race if the rule does not hold
  std::vector<std::size_t> entered(threads), refused(threads);
  std::atomic<int> inside{0}, worst{0};
  {
    std::vector<std::jthread> all;
    for (std::size_t t = 0; t < threads; ++t)
      all.emplace_back([&, t] {
        for (++ready; ready < threads;) std::this_thread::yield();
        for (int i = 0; !ended && i < 300'000; ++i) {
          try {
            rule.enter();
          } catch (const tally::Error&) {
            ++refused[t];
            if (refused[t] % 16 == 0) std::this_thread::yield();
            continue;
          }
          if (inside.fetch_add(1, std::memory_order_relaxed) != 0) worst = 2;
          ++guarded;
          ++entered[t];
          inside.fetch_sub(1, std::memory_order_relaxed);
          rule.exit();
        }
        ended = true;
      });
  }
  std::size_t sum = 0;
  for (const std::size_t each : entered) sum += each;
  CHECK(worst == 0);
  CHECK(guarded == sum);
  CHECK(sum > 0);
}
