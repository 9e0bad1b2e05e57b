// SPDX-License-Identifier: Apache-2.0
// One thread at a time: thread_rule.hpp transcribed step by step and run in all interleavings on two memories that
// reorder (model.hpp), also broken in every way that should matter; and the rule itself under threads that hammer it.
#include <catch2/catch.hpp>

#include <algorithm>
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
void holds(const std::string& what, const Model& m, Memory memory) {
  CAPTURE(what);
  CHECK(explored(what, m, memory).violation == "");
}
void holds(const std::string& what, const Model& m) {
  for (const Memory memory : memories) holds(what, m, memory);
}
void fails(const std::string& what, const Model& m, Memory memory, const std::string& why) {
  const Result result = explored(what, m, memory);
  CAPTURE(what, result.violation);
  CHECK(result.violation.find(why) != std::string::npos);
}
void fails(const std::string& what, const Model& m, const std::string& why) {
  for (const Memory memory : memories) fails(what, m, memory, why);
}

// ThreadRule::enter, take_over, exit, try_look and end_look.

struct RuleBreaks {
  bool one_mark = false;         // all threads mark themselves in one word, as a first version did
  bool own_fence_only = false;   // who takes over does not make the others fence
  bool no_second_look = false;   // the user marks itself and does not look whether it still is the user
  bool looks_first = false;      // who takes over looks for marks before it says so
  bool not_given_back = false;   // who is refused stays the user
  bool given_to_marked = false;  // who is refused hands back to whom it found, instead of whom it took from
  bool no_mutex = false, exit_relaxed = false;
  bool look_not_said = false;      // who looks does not say that it only looks
  bool look_said_late = false;     // or says so after it has marked itself
  bool mark_relaxed = false;       // or the mark may be seen before that
  bool look_ends_first = false;    // or says that it is over before it takes the mark away
  bool look_ends_relaxed = false;  // or that may be seen before
  bool look_not_ended = false;     // or does not say so where it could not come in
  bool let_in = false;             // who takes over does not mind who looks
  bool gone_refused = false;       // or does not see that who looked is gone
  bool waiting_kept = false;       // or stays the user while it waits
};

/// What a thread does, one after the other. c: it calls, and may be refused. l: it looks, if it is the user.
using Uses = std::string;

/// Threads that use a communicator; nobody may find another one inside. `in_turn`: all first calls come one after the other,
/// then all second ones, so that a call meets none but those who look, and must not be refused.
Model thread_rule(const std::vector<Uses>& uses, const RuleBreaks& breaks = {}, bool in_turn = false) {
  enum : int { user, mutex, inside, turn, mark, looks = mark + 3 };  // of these two one for each thread
  const int n = static_cast<int>(uses.size());
  const auto calls_of = [&](int t) { return static_cast<int>(std::ranges::count(uses[static_cast<std::size_t>(t)], 'c')); };
  Model m{{"user", "mutex", "inside", "turn", "mark 0", "mark 1", "mark 2", "looks 0", "looks 1", "looks 2"}, std::vector<Program>(uses.size())};
  for (int t = 0; t < n; ++t) {
    Program& p = m.programs[static_cast<std::size_t>(t)];
    const auto me = static_cast<Value>(t + 1);
    const bool looker = uses[static_cast<std::size_t>(t)].find('l') != Uses::npos;
    const auto mark_of = [&](int thread) { return breaks.one_mark ? mark : mark + thread; };
    std::vector<int> others;
    for (int o = 0; o < n; ++o)
      if (breaks.one_mark ? o == t : o != t) others.push_back(o);
    const auto exit = [&] { p.store(mark_of(t), 0, breaks.exit_relaxed ? relaxed : release); };
    const auto forget = [&] {  // for fewer states
      for (const int reg : {0, 1, 2, 3, 4, 5}) p.set(reg, 0);
    };
    const auto is_inside = [&] {
      forget();
      p.load(inside, relaxed, 4);
      p.expect("nobody is inside yet", [](const Registers& r) { return r[4] == 0; });
      p.store(inside, me);
      p.load(inside, relaxed, 4);
      p.expect("nobody else has come in", [=](const Registers& r) { return r[4] == me; });
      p.store(inside, 0);
      forget();
    };
    // Register 0: is_outside() and come_in() are true if it is `me`.
    const auto come_in = [&] {
      p.store(mark_of(t), me, breaks.mark_relaxed ? relaxed : release);
      if (!breaks.no_second_look) p.load(user, relaxed, 0);
      p.unless(0, me, [&] { p.store(mark_of(t), 0, release); });
    };
    const auto look = [&] {
      const auto say = [&](bool it_looks) {
        if (!breaks.look_not_said) p.store(looks + t, it_looks, it_looks || breaks.look_ends_relaxed ? relaxed : release);
      };
      p.load(user, relaxed, 0);
      p.when(0, me, [&] {
        if (!breaks.look_said_late) say(true);
        come_in();
        if (breaks.look_said_late) say(true);
        if (!breaks.look_not_ended) p.unless(0, me, [&] { say(false); });
        p.when(0, me, [&] {
          is_inside();
          if (breaks.look_ends_first) say(false);
          exit();
          if (!breaks.look_ends_first) say(false);
        });
      });
    };
    // Register 1: the mark that it finds, if any. 5: whether who has it looks. 2: whether it is still there. 3: the user before.
    const auto take_over = [&] {
      const std::size_t try_take_over = p.here();  // and again as long as it finds nobody but who looks
      if (!breaks.no_mutex) {
        p.compare_exchange(mutex, 0, 1, 5);
        p.when(5, 0, [&] { p.go_to(try_take_over); });
      }
      const auto find = [&] {
        for (const int other : others)
          p.when(1, 0, [&] {
            p.load(mark_of(other), acquire, 1);
            p.unless(1, 0, [&] {
              p.load(looks + other, acquire, 5);
              if (!breaks.gone_refused) p.when(5, 0, [&] { p.load(mark_of(other), acquire, 2); });
            });
          });
      };
      p.set(1, 0);
      p.load(user, relaxed, 3);
      if (breaks.looks_first) find();
      p.store(user, me);
      if (breaks.own_fence_only) p.fence();
      else p.membarrier(static_cast<std::size_t>(t), uses.size());
      if (!breaks.looks_first) find();
      if (breaks.let_in) p.unless(5, 0, [&] { p.set(1, 0); });
      const auto give_back = [&] {
        const int whom = breaks.given_to_marked ? 1 : 3;
        for (Value before = 0; before <= n && !breaks.not_given_back && !breaks.one_mark; ++before) p.when(whom, before, [&] { p.store(user, before); });
      };
      p.unless(1, 0, [&] {
        if (breaks.waiting_kept) p.when(5, 0, [&] { p.unless(2, 0, give_back); });
        else give_back();
      });
      p.when(1, 0, [&] { p.store(mark_of(t), me), p.fence(); });
      if (!breaks.no_mutex) p.store(mutex, 0, release);
      p.unless(1, 0, [&] {
        p.unless(5, 0, [&] { p.go_to(try_take_over); });
        if (!breaks.gone_refused) p.when(2, 0, [&] { p.go_to(try_take_over); });
        if (in_turn) p.expect("whom it found only looked", [](const Registers&) { return false; });
      });
    };
    const auto call = [&](int nth) {
      int before = 0;  // as many calls
      for (int o = 0; o < n; ++o) before += std::min(calls_of(o), nth + (o < t));
      if (in_turn) p.await(turn, static_cast<Value>(before), acquire);
      p.load(user, relaxed, 0);
      if (breaks.one_mark) p.load(mark, relaxed, 5), p.unless(5, 0, [&] { p.set(0, 0); });
      p.when(0, me, come_in);
      p.unless(0, me, take_over);
      p.when(1, 0, [&] {
        is_inside();
        if (looker) p.load(looks + t, relaxed, 4), p.expect("who calls is not taken for one who looks", [](const Registers& r) { return r[4] == 0; });
        exit();
      });
      if (in_turn) p.store(turn, static_cast<Value>(before + 1), release);
    };
    int calls = 0;
    for (const char use : uses[static_cast<std::size_t>(t)]) {
      if (use == 'c') call(calls++);
      else look();
      forget();
    }
  }
  return m;
}

}  // namespace

TEST_CASE("two threads are never inside at once", "[proof]") {
  holds("thread rule, two threads, 2 and 1 calls", thread_rule({"cc", "c"}));
  holds("thread rule, two threads, 2 calls each", thread_rule({"cc", "cc"}));
  holds("thread rule, two threads, 3 and 2 calls", thread_rule({"ccc", "cc"}));
  holds("thread rule, three threads", thread_rule({"c", "c", "c"}));

  const std::string in = "finds it untrue that nobody";
  fails("one mark for all", thread_rule({"cc", "c"}, {.one_mark = true}), in);
  fails("only its own fence", thread_rule({"cc", "c"}, {.own_fence_only = true}), in);
  fails("no second look", thread_rule({"cc", "c"}, {.no_second_look = true}), in);
  fails("looks before it says so", thread_rule({"cc", "c"}, {.looks_first = true}), in);
  fails("not given back", thread_rule({"cc", "cc"}, {.not_given_back = true}), in);
  fails("no mutex", thread_rule({"c", "c"}, {.no_mutex = true}), in);
  fails("exit relaxed", thread_rule({"cc", "c"}, {.exit_relaxed = true}), Memory::weak, in);
}

TEST_CASE("three threads are never inside at once, a longer look", "[proof]") {
  holds("thread rule, three threads, 2, 1 and 1 calls", thread_rule({"cc", "c", "c"}));
  fails("given to whom it found", thread_rule({"cc", "c", "c"}, {.given_to_marked = true}), Memory::tso, "finds it untrue that nobody");
}

TEST_CASE("who looks is never inside with anybody else", "[proof]") {
  holds("one looks, one calls", thread_rule({"cl", "c"}));
  holds("both call and look", thread_rule({"clc", "cl"}));
  holds("one looks, two call", thread_rule({"cl", "c", "cc"}), Memory::tso);

  const std::string in = "finds it untrue that nobody";
  fails("let in where one looks", thread_rule({"cl", "c"}, {.let_in = true}), in);
  fails("does not say that its look has failed", thread_rule({"clc", "c"}, {.look_not_ended = true}), "finds it untrue that who calls is not taken");
  fails("stays the user while it waits", thread_rule({"cl", "c", "cc"}, {.waiting_kept = true}), Memory::tso, in);
  fails("no second look, one looks", thread_rule({"cl", "c"}, {.no_second_look = true}), in);
  fails("exit relaxed, one looks", thread_rule({"cl", "c"}, {.exit_relaxed = true}), Memory::weak, in);
}

TEST_CASE("who calls is not refused because of those who look", "[proof]") {
  holds("one looks, one calls, in turn", thread_rule({"cl", "c"}, {}, true));
  holds("both call and look, in turn", thread_rule({"clc", "cl"}, {}, true));
  holds("one looks, two call, in turn", thread_rule({"cl", "c", "c"}, {}, true));
  holds("two look, three call, in turn", thread_rule({"cl", "cl", "c"}, {}, true), Memory::tso);

  const std::string refused = "finds it untrue that whom it found only looked";
  fails("does not say that it looks", thread_rule({"cl", "c"}, {.look_not_said = true}, true), refused);
  fails("says it too late", thread_rule({"cl", "c"}, {.look_said_late = true}, true), refused);
  fails("mark relaxed", thread_rule({"cl", "c"}, {.mark_relaxed = true}, true), Memory::weak, refused);
  fails("says too early that it is over", thread_rule({"cl", "c"}, {.look_ends_first = true}, true), refused);
  fails("end of the look relaxed", thread_rule({"cl", "c"}, {.look_ends_relaxed = true}, true), Memory::weak, refused);
  fails("who is gone still counts", thread_rule({"cl", "c"}, {.gone_refused = true}, true), refused);
}

namespace {

/// Why a call is refused; empty if it is not.
std::string refusal(tally::ThreadRule& rule) {
  try {
    rule.enter();
  } catch (const tally::Error& error) {
    return error.errc() == tally::Errc::invalid_argument ? std::string(error.text()) : error.what();
  }
  rule.exit();
  return {};
}

/// A place for one at a time.
struct Room {
  std::size_t uses = 0;  // plain: a race if the rule does not hold
  std::atomic<int> inside{0}, worst{0};
  void use(int pauses = 0) {
    if (inside.fetch_add(1, std::memory_order_relaxed) != 0) worst = 2;
    ++uses;
    while (pauses-- > 0) tally::cpu_pause();
    inside.fetch_sub(1, std::memory_order_relaxed);
  }
};

}  // namespace

TEST_CASE("the rule refuses the second thread, itself inside, and nobody else") {
  tally::ThreadRule rule;
  const auto refused = [&] { return refusal(rule); };
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

TEST_CASE("only the last user may look, and not from inside") {
  tally::ThreadRule rule;
  const auto elsewhere = [](auto&& f) { std::thread(f).join(); };
  const auto looks = [&] {
    const bool can = rule.try_look();
    if (can) rule.end_look();
    return can;
  };
  CHECK_FALSE(looks());  // nobody was inside yet
  rule.enter();
  CHECK_FALSE(looks());
  elsewhere([&] { CHECK_FALSE(looks()); });
  rule.exit();
  elsewhere([&] { CHECK_FALSE(looks()); });
  CHECK((looks() && looks()));
  REQUIRE(rule.try_look());
  CHECK(rule.is_inside());
  CHECK_FALSE(looks());
  CHECK(refusal(rule) == "this communicator is called from inside one of its own operations");
  rule.end_look();
  CHECK_FALSE(rule.is_inside());
  rule.enter();  // not taken for a look, which the other one would wait for
  elsewhere([&] { CHECK(refusal(rule) == "this communicator is in use by another thread: one at a time, or a duplicate() for each"); });
  rule.exit();
  CHECK(looks());  // who is refused was not inside
  elsewhere([&] { CHECK((refusal(rule) == "" && looks())); });
  CHECK_FALSE(looks());
  CHECK((refusal(rule) == "" && looks()));
}

TEST_CASE("who calls while another thread looks waits for it") {
  tally::ThreadRule rule;
  for (int i = 0; i < 8; ++i) {
    CHECK(refusal(rule) == "");
    REQUIRE(rule.try_look());
    std::string text;
    std::atomic<bool> back{false};
    std::thread other([&] {
      text = refusal(rule);
      back = true;
    });
    for (int turn = 0; turn < 10'000 && rule.is_user() && !back; ++turn) std::this_thread::yield();  // until it is seen to try: most times it is
    const bool waited = !back;
    rule.end_look();
    other.join();
    CHECK(text == "");
    CHECK(waited);
    CHECK_FALSE(rule.is_user());
  }
}

TEST_CASE("threads that call in turn and look meanwhile are inside one at a time and never refused") {
  tally::ThreadRule rule;
  constexpr int threads = 3, calls = 3000;
  std::atomic<int> turn{0};
  Room room;
  std::vector<std::size_t> looked(threads);
  std::vector<std::string> refused(threads);
  {
    std::vector<std::jthread> all;
    for (std::size_t t = 0; t < threads; ++t)
      all.emplace_back([&, t] {
        for (int call = 0; call < calls; ++call) {
          while (turn % threads != static_cast<int>(t)) {
            if (rule.try_look()) {
              room.use(static_cast<int>(looked[t]++ * 7 % 61));
              rule.end_look();
            }
            std::this_thread::yield();  // else it is always in there, where threads outnumber cores, and keeps the others out
          }
          try {
            rule.enter();
            room.use();
            rule.exit();
          } catch (const tally::Error& error) {
            refused[t] = error.text();
          }
          ++turn;
        }
      });
  }
  std::size_t uses = static_cast<std::size_t>(threads) * calls;
  for (const std::size_t each : looked) uses += each;
  CHECK(refused == std::vector<std::string>(threads));
  CHECK(room.worst == 0);
  CHECK(room.uses == uses);
}

TEST_CASE("threads that hammer the rule are inside one at a time") {
  tally::ThreadRule rule;
  constexpr int threads = 3;
  std::atomic<int> ready{0};
  std::atomic<bool> ended{false};
  Room room;
  std::vector<std::size_t> entered(threads), refused(threads);
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
          room.use();
          ++entered[t];
          rule.exit();
        }
        ended = true;
      });
  }
  std::size_t sum = 0;
  for (const std::size_t each : entered) sum += each;
  CHECK(room.worst == 0);
  CHECK(room.uses == sum);
  CHECK(sum > 0);
}
