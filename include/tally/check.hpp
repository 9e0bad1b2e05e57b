// SPDX-License-Identifier: Apache-2.0
// Proves an algorithm for given ranks and counts, without transport, types or time. It runs all ranks' plans
// with one slot of one element per pair, which is the least any transport offers: if that finishes, no schedule
// deadlocks. It checks on its own that the plan orders every pair of conflicting accesses: then every schedule
// gives the same result. And it folds symbols instead of numbers: each input once, in the declared order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "plan.hpp"
#include "steps.hpp"
#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// What check() is asked about. `layout.me` is ignored: all ranks are checked together.
struct CheckRequest {
  Layout layout;
  Folding folding = Folding::cyclic;  // the order the algorithm declares; only for operations that reduce
  unsigned conflicts = all_conflicts;
  std::vector<Layout> layouts = {};   // one per rank where they differ in more than `me`: v-variants and neighbour exchanges
};

namespace detail {

class Checker {
 public:
  Checker(const CheckRequest& request, const std::vector<std::vector<Step>>& texts)
      : request_(request), n_(request.layout.n), ranks_(static_cast<std::size_t>(n_)), pairs_(ranks_.size() * ranks_.size()) {
    for (Rank r = 0; r < n_; ++r) at(r).plan.emplace_back(replay(texts[static_cast<std::size_t>(r)]), layout(r), 1, request.conflicts);
  }

  /// Empty if all is well, otherwise what is wrong and where.
  std::string run() {
    for (Rank r = 0; r < n_; ++r)
      if (std::string problem = unordered(r); !problem.empty()) return problem;
    for (Rank r = 0; r < n_; ++r) prepare(r);
    for (Rank r = 0; r < n_; ++r)
      for (std::size_t i = 0; i < at(r).done.size(); ++i) work_.push_back({r, i});
    while (!work_.empty()) {
      const auto [r, i] = work_.back();
      work_.pop_back();
      advance(r, i);
      if (!problem_.empty()) return problem_;
    }
    for (Rank r = 0; r < n_; ++r)
      for (std::size_t i = 0; i < at(r).done.size(); ++i)
        if (at(r).done[i] < events(r, i)) return concat({"deadlock: ", where(r, i), " stops after ", at(r).done[i], " elements"});
    for (const Pair& pair : pairs_)
      if (pair.full || pair.sent != pair.sends.size()) return "a message was never received";
    for (Rank r = 0; r < n_; ++r)
      if (std::string problem = wrong_result(r); !problem.empty()) return problem;
    return {};
  }

  /// Runs all ranks' shares in one order. No other order gives another result: no rank writes what another one
  /// touches, but the element itself that it folds into its own place.
  std::string run(Share (*share)(Shape)) {
    if (share(layout(0).shape()).way == Share::Way::exchange) request_.layout.in_place = false;  // it is given a copy of its input
    for (Rank r = 0; r < n_; ++r) prepare(r);
    struct Touch {
      Rank writer = -1, reader = -1;
      bool many_readers = false;
    };
    std::vector<std::vector<Touch>> touched[3];
    for (int space = 0; space < 3; ++space)
      for (Rank r = 0; r < n_; ++r) touched[space].emplace_back(at(r).memory[space].size());
    const auto touch = [&](Rank whose, const Range& range, std::size_t u) -> Touch* {
      const Cell c = cell(whose, range);
      auto& cells = touched[c.space][static_cast<std::size_t>(whose)];
      return c.first + u < cells.size() ? &cells[c.first + u] : nullptr;
    };
    for (Rank me = 0; me < n_; ++me) {
      const Share mine = share(layout(me).shape());
      const auto name = [&](Rank whose, std::size_t u) { return concat({"rank ", me, "'s share of rank ", whose, ", element ", u}); };
      if (mine.from.count != mine.to.count) return concat({"rank ", me, "'s share reads ", mine.from.count, " elements and writes ", mine.to.count});
      for (std::size_t u = 0; u < mine.from.count; ++u) {
        for (Rank r = 0; r < n_; ++r) {
          if (!mine.reads(r, n_)) continue;
          Touch* t = touch(r, mine.from, u);
          if (!t) return name(r, u) + " is read beyond its end";
          if (t->writer >= 0 && t->writer != me) return concat({name(r, u), " is read, and written by rank ", t->writer});
          t->many_readers = t->many_readers || (t->reader >= 0 && t->reader != me);
          t->reader = me;
        }
        const auto write = [&](Rank r, const Range& to, const Value& result) -> std::string {
          Touch* t = touch(r, to, u);
          if (!t) return name(r, u) + " is written beyond its end";
          if (t->writer >= 0) return name(r, u) + " is written twice";
          if (t->many_readers || (t->reader >= 0 && t->reader != me)) return name(r, u) + " is written, and read by another rank";
          t->writer = me;
          value(r, to, u) = result;
          return {};
        };
        std::vector<std::pair<Range, Value>> results;  // by target; of an exchange by source. All before any is written.
        for (Rank r = 0; r < n_; ++r) {
          const int last = mine.way == Share::Way::scan ? r + 1 : mine.way == Share::Way::exclusive_scan ? r : n_;
          if (mine.way == Share::Way::exchange) results.emplace_back(mine.to_of(r), value(r, mine.from, u));
          else if (!mine.writes(r)) results.emplace_back();
          else results.emplace_back(mine.to, mine.source < 0 ? folded(0, last, mine.from, u) : value(mine.source, mine.from, u));
        }
        for (Rank r = 0; r < n_; ++r) {
          if (!mine.writes(mine.way == Share::Way::exchange ? mine.target : r)) continue;
          const auto& [to, result] = results[static_cast<std::size_t>(r)];
          if (std::string problem = write(mine.way == Share::Way::exchange ? mine.target : r, to, result); !problem.empty()) return problem;
        }
      }
    }
    for (Rank r = 0; r < n_; ++r)
      if (std::string problem = wrong_result(r); !problem.empty()) return problem;
    return {};
  }

 private:
  // A value is what was folded into it: a hash of the bracketed expression, and a sum of the leaves' random keys,
  // which tells each-once from lost or doubled; and the ranks first..first+length-1 (cyclic) if in order.
  struct Value {
    std::uint64_t bracket = 0, sum = 0;
    int first = 0, length = 0;  // length 0: out of order, or never written
  };
  struct Pair {
    std::vector<std::size_t> sends, receives;  // step indices, in order
    std::size_t sent = 0, received = 0;
    bool full = false;
    Value slot;
    std::size_t slot_count = 0;
  };
  struct RankState {
    std::vector<Plan> plan;  // exactly one
    std::vector<std::size_t> done, ready;
    std::vector<Value> memory[3];
  };

  RankState& at(Rank r) { return ranks_[static_cast<std::size_t>(r)]; }
  Pair& pair(Rank from, Rank to) { return pairs_[static_cast<std::size_t>(from) * ranks_.size() + static_cast<std::size_t>(to)]; }
  const PlannedStep& step(Rank r, std::size_t i) { return at(r).plan[0].steps()[i]; }
  Layout layout(Rank r) const {
    Layout mine = request_.layouts.empty() ? request_.layout : request_.layouts[static_cast<std::size_t>(r)];
    mine.me = r;
    return mine;
  }
  static Steps replay(const std::vector<Step>& text) {
    for (const Step& step : text) co_yield step;
  }
  /// A step of no elements still sends one header.
  std::size_t events(Rank r, std::size_t i) {
    const PlannedStep& s = step(r, i);
    return s.peer >= 0 && s.count() == 0 ? 1 : s.count();
  }
  std::string where(Rank r, std::size_t i) {
    static constexpr const char* verbs[] = {"send to rank ", "receive from rank ", "receive_combine from rank ", "copy", "combine"};
    const PlannedStep& s = step(r, i);
    return concat({"rank ", r, " step ", i, " (", verbs[static_cast<std::size_t>(s.verb)], s.peer >= 0 ? Piece(s.peer) : "", ")"});
  }

  static std::uint64_t mix(std::uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  static Value leaf(Rank r, std::size_t element) {
    const std::uint64_t key = mix(mix(static_cast<std::uint64_t>(r) + 1) ^ (element + 1));
    return {key, key, r, 1};
  }
  Value fold(const Value& left, const Value& right) const {
    const bool in_order = left.length > 0 && right.length > 0 && wrap(left.first + left.length, n_) == right.first && left.length + right.length <= n_;
    return {mix(left.bracket * 3 + mix(right.bracket)), left.sum + right.sum, left.first, in_order ? left.length + right.length : 0};
  }
  /// The one bracketing of Folding::fixed over ranks lo..hi-1.
  Value fixed(int lo, int hi, std::size_t element) const {
    if (hi - lo == 1) return leaf(lo, element);
    int half = 1;
    while (half * 2 < hi - lo) half *= 2;
    return fold(fixed(lo, lo + half, element), fixed(lo + half, hi, element));
  }

  // Spaces as in Plan: 0 input (and output where shared), 1 output, 2 scratch.
  struct Cell {
    int space;
    std::size_t first;
  };
  Cell cell(Rank r, const Range& range) const {
    const Placement placement = layout(r).placement();
    if (range.buffer == Buffer::input) return {0, range.first + placement.input_first};
    if (range.buffer == Buffer::output) return {placement.shared ? 0 : 1, range.first + placement.output_first};
    return {2, range.first};
  }

  /// Looks for two conflicting accesses that the plan leaves unordered, element by element, without intervals.
  std::string unordered(Rank r) {
    struct Element {
      std::int64_t writer = -1;
      std::size_t writer_unit = 0;
      std::vector<std::pair<std::size_t, std::size_t>> readers;
    };
    std::vector<Element> memory[3];
    const Plan& plan = at(r).plan[0];
    std::string problem;
    const auto need = [&](std::size_t j, std::size_t unit, std::size_t i, std::size_t earlier_unit) {
      if (i == j) return;
      const PlannedStep& s = plan.steps()[j];
      for (std::uint32_t d = s.first_dependency; d < s.first_dependency + s.dependencies; ++d) {
        const Dependency& known = plan.dependencies()[d];
        if (known.step == i && known.begin <= unit && unit < known.end &&
            static_cast<std::ptrdiff_t>(unit) + known.shift >= static_cast<std::ptrdiff_t>(earlier_unit))
          return;
      }
      problem = concat({where(r, j), " element ", unit, " is not ordered after step ", i});
    };
    for (std::size_t j = 0; j < plan.steps().size() && problem.empty(); ++j) {
      const PlannedStep& s = plan.steps()[j];
      for (std::size_t u = 0; u < s.count(); ++u) {
        const auto touch = [&](const Range& range) -> Element& {
          const Cell c = cell(r, range);
          if (memory[c.space].size() <= c.first + u) memory[c.space].resize(c.first + u + 1);
          return memory[c.space][c.first + u];
        };
        if (s.verb != Verb::receive) {
          Element& e = touch(s.from);
          if (e.writer >= 0) need(j, u, static_cast<std::size_t>(e.writer), e.writer_unit);
          e.readers.push_back({j, u});
        }
        if (s.verb != Verb::send) {
          Element& e = touch(s.to);
          if (e.writer >= 0) need(j, u, static_cast<std::size_t>(e.writer), e.writer_unit);
          for (const auto& [reader, unit] : e.readers) need(j, u, reader, unit);
          e.readers.clear();
          e.writer = static_cast<std::int64_t>(j);
          e.writer_unit = u;
        }
      }
    }
    return problem;
  }

  void prepare(Rank r) {
    RankState& state = at(r);
    const Layout mine = layout(r);
    const Plan& plan = state.plan[0];
    const Placement placement = mine.placement();
    state.done.assign(plan.steps().size(), 0);
    state.ready.assign(plan.steps().size(), 0);
    const std::size_t in = mine.input_count(), out = mine.output_count();
    state.memory[0].resize(placement.shared ? std::max(in + placement.input_first, out + placement.output_first) : in);
    state.memory[1].resize(placement.shared ? 0 : out);
    state.memory[2].resize(plan.scratch());
    for (std::size_t x = 0; x < in; ++x) state.memory[0][placement.input_first + x] = leaf(r, x);
    if (mine.operation == Collective::broadcast && r == mine.root)
      for (std::size_t x = 0; x < out; ++x) state.memory[placement.shared ? 0 : 1][x] = leaf(r, x);
    for (std::size_t i = 0; i < plan.steps().size(); ++i) {
      const PlannedStep& s = plan.steps()[i];
      if (s.verb == Verb::send) pair(r, s.peer).sends.push_back(i);
      else if (s.peer >= 0) pair(s.peer, r).receives.push_back(i);
    }
  }

  /// Moves step i of rank r as far as it can go and queues whoever that may have helped.
  void advance(Rank r, std::size_t i) {
    RankState& state = at(r);
    const Plan& plan = state.plan[0];
    const PlannedStep& s = plan.steps()[i];
    bool moved = false;
    while (state.done[i] < events(r, i)) {
      const std::size_t u = state.done[i];
      if (s.count() > 0 && u >= state.ready[i]) {
        state.ready[i] = plan.ready(i, [&](std::size_t j) { return state.done[j]; });
        if (u >= state.ready[i]) break;
      }
      if (s.verb == Verb::send ? !send_one(r, i, u) : s.peer >= 0 ? !receive_one(r, i, u) : !local_one(r, i, u)) break;
      ++state.done[i];
      moved = true;
      if (s.verb == Verb::send && state.done[i] == events(r, i)) next_in(pair(r, s.peer).sends, pair(r, s.peer).sent, r);
      if (s.verb != Verb::send && s.peer >= 0 && state.done[i] == events(r, i)) next_in(pair(s.peer, r).receives, pair(s.peer, r).received, r);
    }
    if (!moved) return;
    for (std::uint32_t d = 0; d < s.dependents; ++d) work_.push_back({r, plan.dependents()[s.first_dependent + d]});
  }
  void next_in(const std::vector<std::size_t>& queue, std::size_t& head, Rank r) {
    if (++head < queue.size()) work_.push_back({r, queue[head]});
  }

  bool send_one(Rank r, std::size_t i, std::size_t u) {
    const PlannedStep& s = step(r, i);
    Pair& p = pair(r, s.peer);
    if (p.full || p.sends[p.sent] != i) return false;
    p.full = true;
    p.slot_count = s.count();
    if (s.count() > 0) p.slot = value(r, s.from, u);
    if (p.received < p.receives.size()) work_.push_back({s.peer, p.receives[p.received]});
    return true;
  }
  bool receive_one(Rank r, std::size_t i, std::size_t u) {
    const PlannedStep& s = step(r, i);
    Pair& p = pair(s.peer, r);
    if (!p.full || p.receives[p.received] != i) return false;
    if (p.slot_count != s.count()) {
      problem_ = concat({where(r, i), " expects ", s.count(), " elements, rank ", s.peer, " sends ", p.slot_count});
      return false;
    }
    if (s.count() > 0) {
      if (s.verb == Verb::receive) value(r, s.to, u) = p.slot;
      else {
        const Value& acc = value(r, s.from, u);
        value(r, s.to, u) = s.side == Side::right ? fold(acc, p.slot) : fold(p.slot, acc);
      }
    }
    p.full = false;
    if (p.sent < p.sends.size()) work_.push_back({s.peer, p.sends[p.sent]});
    return true;
  }
  bool local_one(Rank r, std::size_t i, std::size_t u) {
    const PlannedStep& s = step(r, i);
    const Value x = value(r, s.from, u);
    Value& to = value(r, s.to, u);
    to = s.verb == Verb::copy ? x : s.side == Side::right ? fold(to, x) : fold(x, to);
    return true;
  }
  Value& value(Rank r, const Range& range, std::size_t u) {
    const Cell c = cell(r, range);
    return at(r).memory[c.space][c.first + u];
  }

  Value folded(int lo, int hi, const Range& range, std::size_t u) {
    if (hi - lo == 1) return value(lo, range, u);
    int half = 1;
    while (half * 2 < hi - lo) half *= 2;
    return fold(folded(lo, lo + half, range, u), folded(lo + half, hi, range, u));
  }
  std::string wrong_result(Rank r) {
    const Layout mine = layout(r);
    const auto fail = [&](std::size_t x, const char* why) { return concat({"rank ", r, " output ", x, ": ", why}); };
    const auto result = [&](Rank rank, std::size_t x) -> const Value& { return value(rank, {Buffer::output, 0, 0}, x); };
    if (!reduces(mine.operation)) {
      std::vector<char> expected(mine.output_count());
      for (const auto& [to, from, source] : moves(r))
        for (std::size_t x = 0; x < to.count; ++x) {
          expected[to.first + x] = 1;
          if (result(r, to.first + x).bracket != leaf(source, from + x).bracket) return fail(to.first + x, "not the element that belongs here");
        }
      for (std::size_t x = 0; x < expected.size() && !mine.in_place; ++x)
        if (!expected[x] && result(r, x).sum != 0) return fail(x, "nothing belongs here");
      return {};
    }
    const Collective like = uniform(mine.operation);
    const int ranks = like == Collective::scan ? r + 1 : like == Collective::exclusive_scan ? r : n_;
    for (std::size_t x = 0; x < mine.output_count(); ++x) {
      const Value& got = result(r, x);
      const std::size_t element = like == Collective::reduce_scatter ? mine.shape().in[r].first + x : x;
      std::uint64_t sum = 0;
      for (Rank p = 0; p < ranks; ++p) sum += leaf(p, element).sum;
      if (got.sum != sum) return fail(x, "not every input folded exactly once");
      const bool any = request_.folding == Folding::any, cyclic = request_.folding == Folding::cyclic && ranks == n_;
      if (!any && (got.length != ranks || (got.first != 0 && !cyclic))) return fail(x, "not folded in rank order");
      if (request_.folding == Folding::fixed && got.bracket != fixed(0, ranks, element).bracket) return fail(x, "not the declared bracketing");
      if (mine.operation == Collective::all_reduce && got.bracket != result(0, x).bracket) return fail(x, "other bits than rank 0");
    }
    return {};
  }
  /// What belongs where in rank r's output: the elements from `first` on of another rank's input.
  struct Move {
    Range to;
    std::size_t first;
    Rank source;
  };
  std::vector<Move> moves(Rank r) const {
    const Layout mine = layout(r);
    const Shape shape = mine.shape();
    const Collective like = uniform(mine.operation);
    if (mine.output_count() == 0) return {};
    if (like == Collective::broadcast) return {{shape.out.all(), 0, mine.root}};
    if (like == Collective::scatter) return {{{Buffer::output, 0, mine.output_count()}, layout(mine.root).shape().in[r].first, mine.root}};
    std::vector<Move> all;
    for (int b = 0; b < shape.out.size(); ++b) {
      if (mine.operation != Collective::neighbour_exchange) {
        all.push_back({shape.out[b], like == Collective::all_to_all ? layout(b).shape().in[r].first : 0, b});
        continue;
      }
      const Rank source = shape.out.peer(b);
      const Layout theirs = layout(source);
      const Shape other = theirs.shape();
      int before = 0, at = -1;  // the k-th block from there is the k-th that it has for r
      for (int i = 0; i < b; ++i) before += shape.out.peer(i) == source;
      while (before >= 0)
        if (other.in.peer(++at) == r) --before;
      all.push_back({shape.out[b], other.in[at].first, source});
    }
    return all;
  }

  CheckRequest request_;
  int n_;
  std::vector<RankState> ranks_;
  std::vector<Pair> pairs_;
  std::vector<std::pair<Rank, std::size_t>> work_;  // steps that may be able to move
  std::string problem_;
};

}  // namespace detail

/// The text of every rank, for check() and for tests that change it before checking.
template <class Generator>
std::vector<std::vector<Step>> read_steps(Generator&& generate, Layout layout, const std::vector<Layout>& layouts = {}) {
  std::vector<std::vector<Step>> texts(static_cast<std::size_t>(layout.n));
  const int n = layout.n;
  for (Rank r = 0; r < n; ++r) {
    if (!layouts.empty()) layout = layouts[static_cast<std::size_t>(r)];
    layout.me = r;
    Steps steps = generate(layout.shape());
    while (const Step* step = steps.next()) texts[static_cast<std::size_t>(r)].push_back(*step);
  }
  return texts;
}

/// Proves texts[rank]. Returns what is wrong and where; empty if nothing is.
inline std::string check(const CheckRequest& request, const std::vector<std::vector<Step>>& texts) {
  try {
    return detail::Checker(request, texts).run();
  } catch (const Error& error) {
    return error.what();
  }
}
/// Proves the shares that ranks take of memory that all can reach.
inline std::string check(const CheckRequest& request, Share (*share)(Shape)) {
  return detail::Checker(request, std::vector<std::vector<Step>>(static_cast<std::size_t>(request.layout.n))).run(share);
}
/// Proves a generator, e.g. `check({{Collective::all_reduce, 0, 5, 0, 16}, Ring::folding}, Ring::all_reduce)`, out of place
/// and in place; a layout that is in place (or those of all ranks) only as it is.
template <class Generator>
  requires std::is_invocable_r_v<Steps, Generator, Shape>
std::string check(const CheckRequest& request, Generator&& generate) {
  std::string problem = check(request, read_steps(generate, request.layout, request.layouts));
  if (!problem.empty() || request.layout.in_place || !request.layouts.empty()) return problem;
  CheckRequest in_place = request;
  in_place.layout.in_place = true;
  problem = check(in_place, read_steps(generate, in_place.layout));
  return problem.empty() ? problem : "in place: " + problem;
}

}  // namespace tally::inline v0
