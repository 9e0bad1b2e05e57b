// SPDX-License-Identifier: Apache-2.0
// A small explorer: runs threads of a few steps each in all their interleavings on a memory that reorders as
// hardware does, and finds every way to break an expectation or to wait for ever.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace model {

/// tso: stores queue in a buffer per thread, leave it in order and at any time, and are seen by their own thread at
/// once. weak: stores to different locations leave in any order, except that a release store waits for all earlier
/// ones; and a thread may go on reading the value that a location had before others changed it, as if it had loaded
/// early, until it loads with acquire or fences. Not modelled: a load that takes effect after a later store of its
/// thread (a release store never lets that happen), and processors that disagree about the order of stores.
enum class Memory { tso, weak };
enum class Order { relaxed, acquire, release };  // plain accesses are relaxed

using Value = std::int8_t;
inline constexpr std::size_t most_threads = 3, most_locations = 16, most_registers = 8, most_buffered = 16;
using Registers = std::array<Value, most_registers>;

struct Step {
  enum class Kind { load, await, store, exchange, compare_exchange, add, fence, interrupt, sleep, wake, branch, set, expect };
  Kind kind;
  int location = 0, reg = -1;  // reg: branch always if there is none
  Value value = 0, expected = 0;
  Order order = Order::relaxed;
  std::size_t target = 0;  // branch: where to; interrupt: whom
  bool inverted = false;   // branch: if not equal; await: at least instead of equal; sleep: without comparing
  std::function<bool(const Registers&)> holds;
  std::string_view text;
};

/// One thread's steps. Values are constants: write loops over them in C++, and only waiting loops as branches.
class Program {
 public:
  void load(int location, Order order, int reg) { add(Step::Kind::load, location, 0, order, reg); }
  /// A loop that loads until it finds the value (or one as large).
  void await(int location, Value value, Order order) { add(Step::Kind::await, location, value, order); }
  void await_at_least(int location, Value value, Order order) { add(Step::Kind::await, location, value, order).inverted = true; }
  void store(int location, Value value, Order order = Order::relaxed) { add(Step::Kind::store, location, value, order); }
  /// reg = what was there.
  void exchange(int location, Value value, int reg) { add(Step::Kind::exchange, location, value, Order::acquire, reg); }
  /// reg = 1 if it was `expected` and is now `value`, else 0.
  void compare_exchange(int location, Value expected, Value value, int reg) { add(Step::Kind::compare_exchange, location, value, Order::acquire, reg).expected = expected; }
  void add_one(int location) { add(Step::Kind::add, location); }
  void fence() { add(Step::Kind::fence); }
  /// Not all threads fence at the same moment: each does at some moment of the call.
  void membarrier(std::size_t me, std::size_t threads) {
    fence();
    for (std::size_t t = 0; t < threads; ++t)
      if (t != me) add(Step::Kind::interrupt).target = t;
    fence();
  }
  /// The system calls of the futex: both fence, and the first compares and falls asleep in one.
  void futex_wait(int location, Value while_equal) { add(Step::Kind::sleep, location, while_equal); }
  void futex_wait_as_loaded(int location, int reg) { add(Step::Kind::sleep, location, 0, Order::relaxed, reg); }
  void futex_wait_without_compare(int location) { add(Step::Kind::sleep, location).inverted = true; }
  /// `threads`: a bit for each thread that it wakes.
  void futex_wake(int location, Value threads = 127) { add(Step::Kind::wake, location, threads); }
  void expect(std::string_view text, std::function<bool(const Registers&)> holds) {
    Step& step = add(Step::Kind::expect);
    step.holds = std::move(holds);
    step.text = text;
  }
  void set(int reg, Value value) { add(Step::Kind::set, 0, value, Order::relaxed, reg); }
  template <class Body>
  void when(int reg, Value value, Body&& body) { skip(reg, value, true, body); }
  template <class Body>
  void unless(int reg, Value value, Body&& body) { skip(reg, value, false, body); }
  std::size_t here() const { return steps_.size(); }
  void go_to(std::size_t target) { add(Step::Kind::branch).target = target; }

  const std::vector<Step>& steps() const { return steps_; }

 private:
  Step& add(Step::Kind kind, int location = 0, Value value = 0, Order order = Order::relaxed, int reg = -1) {
    return steps_.emplace_back(Step{kind, location, reg, value, 0, order, 0, false, {}, {}});
  }
  template <class Body>
  void skip(int reg, Value value, bool inverted, Body&& body) {
    const std::size_t branch = here();
    add(Step::Kind::branch, 0, value, Order::relaxed, reg).inverted = inverted;
    body();
    steps_[branch].target = here();
  }
  std::vector<Step> steps_;
};

/// Everything that a run's future depends on; compared byte by byte.
struct State {
  struct Store {
    std::int8_t location = 0;
    Value value = 0;
    std::int8_t release = 0;
  };
  struct Thread {
    std::uint8_t pc = 0, buffered = 0;
    std::int8_t asleep_on = -1;
    Registers registers{};
    std::array<Store, most_buffered> buffer{};
    std::array<Value, most_locations> early{};  // what it may still read, where `stale` has a bit
    std::uint16_t stale = 0;
  };
  std::array<Value, most_locations> memory{};
  std::array<Thread, most_threads> threads{};

  std::string key(std::size_t thread_count) const {
    std::string bytes(reinterpret_cast<const char*>(memory.data()), memory.size());
    for (std::size_t i = 0; i < thread_count; ++i) {
      const Thread& t = threads[i];
      for (const int byte : {int{t.pc}, int{t.buffered}, int{t.asleep_on}, t.stale & 0xff, t.stale >> 8}) bytes += static_cast<char>(byte);
      for (const Value value : t.registers) bytes += static_cast<char>(value);
      for (std::size_t b = 0; b < t.buffered; ++b)
        for (const int byte : {int{t.buffer[b].location}, int{t.buffer[b].value}, int{t.buffer[b].release}}) bytes += static_cast<char>(byte);
      for (std::size_t l = 0; l < most_locations; ++l)
        if (t.stale >> l & 1) bytes += static_cast<char>(t.early[l]);
    }
    return bytes;
  }
};

struct Model {
  std::vector<std::string_view> locations;
  std::vector<Program> programs;
  std::string_view at_end_text = {};
  std::function<bool(const State&)> at_end = {};  // of every end of all threads
};

struct Result {
  std::size_t states = 0;
  std::string violation;  // what went wrong, and how it came to that; empty: nothing can
};

class Explorer {
 public:
  Explorer(const Model& model, Memory memory) : model_(model), weak_(memory == Memory::weak) {
    if (model.programs.size() > most_threads || model.locations.size() > most_locations) throw std::invalid_argument("the model is too large");
    for (const Program& program : model.programs)
      if (program.steps().size() > 255) throw std::invalid_argument("the program is too long");
  }
  Result run() {
    State state;
    for (std::size_t t = 0; t < model_.programs.size(); ++t) settle(state, t);
    visit(state);
    return {seen_.size(), violation_};
  }

 private:
  using Kind = Step::Kind;

  void visit(const State& state) {
    if (!violation_.empty() || !seen_.insert(state.key(model_.programs.size())).second) return;
    bool stuck = true;
    for (std::size_t t = 0; t < model_.programs.size(); ++t) {
      for (std::size_t b = 0; b < state.threads[t].buffered; ++b) {
        if (!may_leave(state.threads[t], b)) continue;
        State next = state;
        const State::Store store = leave(next, t, b);
        stuck = false;
        descend(next, "its store of " + std::to_string(store.value) + " to " + name(store.location) + " reaches memory", t);
      }
      if (state.threads[t].pc >= steps(t).size() || state.threads[t].asleep_on >= 0) continue;
      for (const bool early : {false, true}) {
        State next = state;
        std::string what;
        if (!step(next, t, early, what)) continue;
        stuck = false;
        settle(next, t);
        descend(next, what, t);
      }
    }
    if (!stuck) return;
    for (std::size_t t = 0; t < model_.programs.size(); ++t) {
      if (state.threads[t].asleep_on >= 0) return fail("thread " + std::to_string(t) + " sleeps for ever");
      if (state.threads[t].pc < steps(t).size()) return fail("thread " + std::to_string(t) + " waits for ever");
    }
    if (model_.at_end && !model_.at_end(state)) fail("not so at the end: " + std::string(model_.at_end_text));
  }
  void descend(const State& next, const std::string& what, std::size_t t) {
    trace_.push_back("thread " + std::to_string(t) + ": " + what);
    if (!broken_.empty()) fail(broken_);
    else visit(next);
    trace_.pop_back();
  }
  void fail(const std::string& what) {
    if (!violation_.empty()) return;
    violation_ = what + ", after";
    for (const std::string& line : trace_) violation_ += "\n  " + line;
  }

  bool may_leave(const State::Thread& thread, std::size_t b) const {
    if (b == 0) return true;
    if (!weak_ || thread.buffer[b].release) return false;
    return std::none_of(thread.buffer.begin(), thread.buffer.begin() + static_cast<std::ptrdiff_t>(b), [&](const State::Store& s) { return s.location == thread.buffer[b].location; });
  }
  State::Store leave(State& state, std::size_t t, std::size_t b) const {
    State::Thread& thread = state.threads[t];
    const State::Store store = thread.buffer[b];
    std::copy(thread.buffer.begin() + static_cast<std::ptrdiff_t>(b) + 1, thread.buffer.begin() + thread.buffered, thread.buffer.begin() + static_cast<std::ptrdiff_t>(b));
    --thread.buffered;
    write(state, t, store.location, store.value);
    return store;
  }
  /// Memory changes. Its writer cannot see an older value any more; the others may have loaded early.
  void write(State& state, std::size_t t, int location, Value value) const {
    const auto l = static_cast<std::size_t>(location);
    const auto bit = static_cast<std::uint16_t>(1u << l);
    for (std::size_t u = 0; u < model_.programs.size() && weak_; ++u) {
      State::Thread& other = state.threads[u];
      if (u == t) other.stale = static_cast<std::uint16_t>(other.stale & ~bit);
      else if (!(other.stale & bit)) {
        other.stale |= bit;
        other.early[l] = state.memory[l];
      }
    }
    state.memory[l] = value;
  }
  /// False if there is no early value to read.
  bool read(State& state, std::size_t t, const Step& s, bool early, Value& value) const {
    State::Thread& thread = state.threads[t];
    const auto l = static_cast<std::size_t>(s.location);
    const auto bit = static_cast<std::uint16_t>(1u << l);
    std::size_t b = thread.buffered;
    while (b > 0 && thread.buffer[b - 1].location != s.location) --b;
    if (early && (b > 0 || !(thread.stale & bit))) return false;
    if (b > 0) value = thread.buffer[b - 1].value;
    else value = early ? thread.early[l] : state.memory[l];
    if (s.order == Order::acquire) thread.stale = 0;
    else if (!early) thread.stale = static_cast<std::uint16_t>(thread.stale & ~bit);
    return true;
  }

  /// False if it cannot be taken now.
  bool step(State& state, std::size_t t, bool early, std::string& what) const {
    State::Thread& thread = state.threads[t];
    const Step& s = steps(t)[thread.pc];
    Value& reg = thread.registers[static_cast<std::size_t>(std::max(s.reg, 0))];
    const auto l = static_cast<std::size_t>(s.location);
    if (s.kind == Kind::load || s.kind == Kind::await) {
      Value value = 0;
      if (!read(state, t, s, early, value)) return false;
      if (s.kind == Kind::await && (s.inverted ? value < s.value : value != s.value)) return false;
      if (s.reg >= 0) reg = value;
      what = "loads " + std::to_string(value) + " from " + name(s.location) + (early ? ", early" : "");
      ++thread.pc;
      return true;
    }
    if (early) return false;
    if (s.kind == Kind::store) {
      if (thread.buffered == most_buffered) throw std::invalid_argument("the model's store buffer is too small");
      thread.buffer[thread.buffered++] = {static_cast<std::int8_t>(s.location), s.value, s.order == Order::release};
      what = "stores " + std::to_string(s.value) + " to " + name(s.location);
      ++thread.pc;
      return true;
    }
    // All others fence: whoever is fenced waits until its own stores have left, which they can at any time.
    State::Thread& fenced = s.kind == Kind::interrupt ? state.threads[s.target] : thread;
    if (fenced.buffered > 0) return false;
    fenced.stale = 0;
    ++thread.pc;
    if (s.kind == Kind::interrupt) what = "makes thread " + std::to_string(s.target) + " fence";
    else if (s.kind == Kind::fence) what = "fences";
    else if (s.kind == Kind::exchange) {
      reg = state.memory[l];
      write(state, t, s.location, s.value);
      what = "exchanges " + name(s.location) + ", was " + std::to_string(reg) + ", is " + std::to_string(s.value);
    } else if (s.kind == Kind::compare_exchange) {
      reg = state.memory[l] == s.expected;
      if (reg) write(state, t, s.location, s.value);
      what = "compares and exchanges " + name(s.location) + (reg ? " with" : " without") + " success";
    } else if (s.kind == Kind::add) {
      write(state, t, s.location, static_cast<Value>(state.memory[l] + 1));
      what = "adds 1 to " + name(s.location);
    } else if (s.kind == Kind::sleep) {
      const bool sleeps = s.inverted || state.memory[l] == (s.reg >= 0 ? reg : s.value);
      if (sleeps) thread.asleep_on = static_cast<std::int8_t>(s.location);
      what = sleeps ? "falls asleep" : "does not fall asleep, " + name(s.location) + " has changed";
    } else {
      what = "wakes who sleeps on " + name(s.location);
      for (std::size_t u = 0; u < model_.programs.size(); ++u)
        if (state.threads[u].asleep_on == s.location && (s.value >> u & 1)) state.threads[u].asleep_on = -1;
    }
    return true;
  }
  /// Steps that no other thread can see are taken at once.
  void settle(State& state, std::size_t t) {
    State::Thread& thread = state.threads[t];
    broken_.clear();
    while (thread.pc < steps(t).size()) {
      const Step& s = steps(t)[thread.pc];
      if (s.kind != Kind::branch && s.kind != Kind::set && s.kind != Kind::expect) return;
      ++thread.pc;
      if (s.kind == Kind::set) {
        thread.registers[static_cast<std::size_t>(s.reg)] = s.value;
      } else if (s.kind == Kind::expect) {
        if (!s.holds(thread.registers)) broken_ = "thread " + std::to_string(t) + " finds it untrue that " + std::string(s.text);
      } else if (s.reg < 0 || (thread.registers[static_cast<std::size_t>(s.reg)] == s.value) != s.inverted) {
        thread.pc = static_cast<std::uint8_t>(s.target);
      }
    }
  }

  const std::vector<Step>& steps(std::size_t t) const { return model_.programs[t].steps(); }
  std::string name(int location) const { return std::string(model_.locations[static_cast<std::size_t>(location)]); }

  const Model& model_;
  bool weak_;
  std::unordered_set<std::string> seen_;
  std::vector<std::string> trace_;
  std::string broken_, violation_;
};

inline Result explore(const Model& model, Memory memory) { return Explorer(model, memory).run(); }

}  // namespace model
