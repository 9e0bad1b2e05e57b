// SPDX-License-Identifier: Apache-2.0
// In which order and brackets an algorithm of all_reduce folds its ranks' values, element by element: its text is run with
// expressions instead of numbers, a stretch of elements at a time. And folding by such an expression, which gives the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../call.hpp"
#include "../error.hpp"
#include "../reduce.hpp"
#include "../steps.hpp"

namespace tally::inline v0::detail {

class Association {
 public:
  /// Of n ranks with `count` elements each, rank r's being called r. Without an algorithm: in the order of ranks, from the left.
  Association(const AlgorithmRef& algorithm, int n, std::size_t count, Grouping group = {}) {
    for (Rank r = 0; r < n; ++r) nodes_.push_back({r, -1});
    if (algorithm.generate && n > 1 && count > 0) {
      derive(algorithm, n, count, group);
      return;
    }
    int all = 0;
    if (algorithm.share && n > 1) all = fixed(0, n);
    else
      for (Rank r = 1; r < n; ++r) all = join(all, r);
    stretches_.push_back({0, count, all});
  }

  struct Stretch {
    std::size_t first = 0, count = 0;
    int root = 0;  // of its expression
  };
  /// In order, together all elements.
  const std::vector<Stretch>& stretches() const { return stretches_; }

  /// to = the expression over `from` (rank r's elements at from[r]), `bytes` of whole elements. `scratch` only grows.
  void fold(const Stretch& stretch, std::byte* to, const std::byte* const* from, std::size_t bytes, std::size_t grain, const Fold& f, std::vector<std::byte>& scratch) const {
    const Node& root = nodes_[static_cast<std::size_t>(stretch.root)];
    if (root.right < 0) return void(std::memmove(to, from[root.left], bytes));
    const std::size_t piece = std::max(grain, piece_bytes - piece_bytes % grain);
    if (const std::size_t needed = piece * nodes_.size(); scratch.size() < needed) scratch.resize(needed);
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      std::byte* free = scratch.data();
      f(to + at, evaluate(root.left, from, at, now, piece, f, free), evaluate(root.right, from, at, now, piece, f, free), now);
    }
  }

 private:
  static constexpr std::size_t piece_bytes = 8 << 10;
  struct Node {
    int left, right;  // right < 0: rank `left` itself
  };
  /// A stretch of elements that have the same expression: those of the tensor from `first` on, `count` of them.
  struct Held {
    std::size_t count, first;
    int node;
  };
  /// By where they lie.
  using Memory = std::map<std::size_t, Held>;

  int join(int left, int right) {
    const auto [known, fresh] = joined_.try_emplace({left, right}, static_cast<int>(nodes_.size()));
    if (fresh) nodes_.push_back({left, right});
    return known->second;
  }
  int fixed(int lo, int hi) {
    if (hi - lo == 1) return lo;
    int half = 1;
    while (half * 2 < hi - lo) half *= 2;
    const int left = fixed(lo, lo + half), right = fixed(lo + half, hi);
    return join(left, right);
  }
  const std::byte* evaluate(int node, const std::byte* const* from, std::size_t at, std::size_t now, std::size_t piece, const Fold& f, std::byte*& free) const {
    const Node& n = nodes_[static_cast<std::size_t>(node)];
    if (n.right < 0) return from[n.left] + at;
    std::byte* const mine = free;
    free += piece;
    const std::byte* left = evaluate(n.left, from, at, now, piece, f, free);
    const std::byte* right = evaluate(n.right, from, at, now, piece, f, free);
    f(mine, left, right, now);
    free = mine + piece;
    return mine;
  }

  // What lies where. A stretch is cut where a step begins or ends in it.
  static void cut(Memory& memory, std::size_t at) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return;
    auto& [begin, held] = *std::prev(next);
    if (begin == at || begin + held.count <= at) return;
    const std::size_t left = at - begin;
    memory.emplace(at, Held{held.count - left, held.first + left, held.node});
    held.count = left;
  }
  static std::vector<Held> take(Memory& memory, std::size_t first, std::size_t count) {
    cut(memory, first), cut(memory, first + count);
    std::vector<Held> found;
    for (auto each = memory.lower_bound(first); each != memory.end() && each->first < first + count; ++each) found.push_back(each->second);
    return found;
  }
  static void put(Memory& memory, std::size_t first, std::size_t count, const std::vector<Held>& what) {
    cut(memory, first), cut(memory, first + count);
    memory.erase(memory.lower_bound(first), memory.lower_bound(first + count));
    for (const Held& held : what) memory.emplace(std::exchange(first, first + held.count), held);
  }
  std::vector<Held> join(const std::vector<Held>& left, const std::vector<Held>& right) {
    std::vector<Held> result;
    for (std::size_t i = 0, k = 0, used_left = 0, used_right = 0; i < left.size() && k < right.size();) {
      const std::size_t count = std::min(left[i].count - used_left, right[k].count - used_right);
      result.push_back({count, left[i].first + used_left, join(left[i].node, right[k].node)});
      if ((used_left += count) == left[i].count) used_left = 0, ++i;
      if ((used_right += count) == right[k].count) used_right = 0, ++k;
    }
    return result;
  }

  void derive(const AlgorithmRef& algorithm, int n, std::size_t count, Grouping group) {
    struct Player {
      Memory memory[2];  // data, in place; scratch
      Steps steps;
      const Step* step;
    };
    const auto of = [](Player& p, const Range& range) -> Memory& { return p.memory[range.buffer == Buffer::scratch]; };
    std::deque<Player> players;
    for (Rank r = 0; r < n; ++r) {
      const Chunks in(Buffer::input, count, n), out(Buffer::output, count, n);
      Player& p = players.emplace_back(Player{{}, algorithm.generate({r, n, 0, in, out, group}), nullptr});
      p.memory[0].emplace(0, Held{count, 0, r});
      p.step = p.steps.next();
    }
    std::map<std::pair<Rank, Rank>, std::deque<std::vector<Held>>> under_way;
    for (bool moved = true; moved;) {
      moved = false;
      for (Rank r = 0; r < n; ++r) {
        Player& p = players[static_cast<std::size_t>(r)];
        for (; p.step; p.step = p.steps.next(), moved = true) {
          const Step& s = *p.step;
          std::vector<Held> came;
          if (s.verb == Verb::receive || s.verb == Verb::receive_combine) {
            auto& queue = under_way[{s.peer, r}];
            if (queue.empty()) break;
            came = std::move(queue.front());
            queue.pop_front();
          }
          const auto fold = [&](const Range& acc, const std::vector<Held>& other) {
            const std::vector<Held> mine = take(of(p, acc), acc.first, acc.count);
            return s.side == Side::right ? join(mine, other) : join(other, mine);
          };
          switch (s.verb) {
            case Verb::send: under_way[{r, s.peer}].push_back(take(of(p, s.from), s.from.first, s.from.count)); break;
            case Verb::receive: put(of(p, s.to), s.to.first, s.to.count, came); break;
            case Verb::receive_combine: put(of(p, s.to), s.to.first, s.to.count, fold(s.from, came)); break;
            case Verb::copy: put(of(p, s.to), s.to.first, s.to.count, take(of(p, s.from), s.from.first, s.from.count)); break;
            case Verb::combine: put(of(p, s.to), s.to.first, s.to.count, fold(s.to, take(of(p, s.from), s.from.first, s.from.count))); break;
          }
        }
      }
    }
    for (const auto& [at, held] : players[0].memory[0]) {
      if (players[0].step || held.first != at) throw Error(Errc::unsupported, {"fold as(", algorithm.name, "): it does not end with every element where it belongs"});
      if (!stretches_.empty() && stretches_.back().root == held.node) stretches_.back().count += held.count;
      else stretches_.push_back({at, held.count, held.node});
    }
  }

  std::vector<Node> nodes_;
  std::map<std::pair<int, int>, int> joined_;
  std::vector<Stretch> stretches_;
};

}  // namespace tally::inline v0::detail
