// SPDX-License-Identifier: Apache-2.0
// Reads a whole generator once and works out which steps must wait for which: for every element, a step waits
// for earlier steps of the same rank that conflict on it. Conflicts come from the ranges and the text's order
// (last writer and readers per interval), never from the author. The result is what engines run and replay.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "error.hpp"
#include "steps.hpp"
#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// Units begin..end-1 of a step may be touched once `step` is done with unit + shift.
struct Dependency {
  std::uint32_t step;
  std::size_t begin, end;
  std::ptrdiff_t shift;
};

/// Conflict classes. Only the checker's own tests ask for less than all of them.
enum Conflict : unsigned { read_after_write = 1, write_after_read = 2, write_after_write = 4, all_conflicts = 7 };

/// A step with its dependencies: entries first_dependency..+dependencies of Plan::dependencies, and likewise the
/// steps that wait for it in Plan::dependents.
struct PlannedStep : Step {
  std::uint32_t first_dependency = 0, dependencies = 0, first_dependent = 0, dependents = 0;
};

/// Units of a step that may be touched, given how many units each step has done.
template <class Done>
constexpr std::size_t ready_units(const PlannedStep& step, const Dependency* dependencies, const Done& done) {
  std::size_t limit = step.count();
  for (std::uint32_t d = step.first_dependency; d < step.first_dependency + step.dependencies; ++d) {
    const Dependency& need = dependencies[d];
    if (need.begin >= limit) continue;
    // Unit u is free when done > u + shift: the first one that is not is done - shift.
    const std::ptrdiff_t free = static_cast<std::ptrdiff_t>(done(need.step)) - need.shift;
    if (free < static_cast<std::ptrdiff_t>(need.end)) limit = std::min(limit, std::max(need.begin, static_cast<std::size_t>(std::max<std::ptrdiff_t>(free, 0))));
  }
  return limit;
}

class Plan {
 public:
  /// All counts are in units of 1/grain element: grain 1 plans in elements, grain sizeof(T) in bytes.
  Plan(Steps steps, const Layout& layout, std::size_t grain, unsigned conflicts = all_conflicts) : layout_(layout), grain_(grain) {
    if (layout.extents) keep_extents();
    Spaces spaces;
    while (const Step* next = steps.next()) {
      check(*next);
      if (does_nothing(*next)) continue;
      add(spaces, *next, conflicts);
    }
    link();
  }

  Plan(Plan&&) = default;  // what layout() points at does not move
  Plan(const Plan&) = delete;

  const Layout& layout() const { return layout_; }
  std::size_t grain() const { return grain_; }
  const std::vector<PlannedStep>& steps() const { return steps_; }
  const std::vector<Dependency>& dependencies() const { return dependencies_; }
  const std::vector<std::uint32_t>& dependents() const { return dependents_; }
  /// Scratch that the steps need, in units.
  std::size_t scratch() const { return scratch_; }
  /// What will be sent and received: predictions that transports' counters must meet.
  std::size_t units_sent() const { return units_sent_; }
  std::size_t units_received() const { return units_received_; }
  std::size_t messages_sent() const { return messages_sent_; }
  std::size_t bytes_held() const {
    return sizeof *this + steps_.capacity() * sizeof steps_[0] + dependencies_.capacity() * sizeof dependencies_[0] +
           dependents_.capacity() * sizeof dependents_[0];
  }

  /// Of step j.
  template <class Done>
  std::size_t ready(std::size_t j, const Done& done) const { return ready_units(steps_[j], dependencies_.data(), done); }

 private:
  /// The layout's extents are the caller's, who may change them after the call.
  void keep_extents() {
    struct Kept {
      std::vector<std::size_t> lists[4];
      std::vector<Rank> to, from;
      Extents extents;
    };
    const Extents& theirs = *layout_.extents;
    const auto kept = std::make_shared<Kept>();
    const std::span<const std::size_t> lists[] = {theirs.in_counts, theirs.in_firsts, theirs.out_counts, theirs.out_firsts};
    for (int i = 0; i < 4; ++i) kept->lists[i].assign(lists[i].begin(), lists[i].end());
    kept->to.assign(theirs.to.begin(), theirs.to.end());
    kept->from.assign(theirs.from.begin(), theirs.from.end());
    kept->extents = {kept->lists[0], kept->lists[1], kept->lists[2], kept->lists[3], kept->to, kept->from};
    layout_.extents = &kept->extents;
    extents_ = kept;
  }

  // Memory as conflicts see it: 0 is input and, where shared, output; 1 is a separate output; 2 is scratch.
  struct Place {
    int space;
    std::size_t first, count;
  };
  struct Access {
    std::uint32_t step;
    std::size_t first;  // where the step's range begins, to translate units
  };
  struct Interval {
    std::size_t end;
    std::vector<Access> writer, readers;  // at most one writer
  };
  using Spaces = std::map<std::size_t, Interval>[3];  // keyed by the interval's begin

  Place place(const Range& range) const {
    const Placement placement = layout_.placement();
    switch (range.buffer) {
      case Buffer::input: return {0, range.first + placement.input_first, range.count};
      case Buffer::output: return {placement.shared ? 0 : 1, range.first + placement.output_first, range.count};
      default: return {2, range.first, range.count};
    }
  }
  /// Local steps without elements, and copies of a range onto itself, as in-place calls have them.
  bool does_nothing(const Step& step) const {
    if (step.verb != Verb::copy && step.verb != Verb::combine) return false;
    const Place from = place(step.from), to = place(step.to);
    return from.count == 0 || (step.verb == Verb::copy && from.space == to.space && from.first == to.first);
  }

  void check(const Step& step) const {
    const auto fail = [&](std::initializer_list<detail::Piece> why) {
      throw Error(Errc::invalid_argument, {name_of(layout_.operation), " algorithm, rank ", layout_.me, " of ", layout_.n, ", step ", steps_.size(), ": ", detail::concat(why)});
    };
    const bool network = step.verb == Verb::send || step.verb == Verb::receive || step.verb == Verb::receive_combine;
    if (network && (step.peer < 0 || step.peer >= layout_.n || step.peer == layout_.me))
      fail({"peer ", step.peer, " is not another rank"});
    const auto inside = [&](const Range& range) {
      const std::size_t size = range.buffer == Buffer::input ? layout_.input_count() : layout_.output_count();
      if (range.buffer != Buffer::scratch && (range.first > size || range.count > size - range.first))
        fail({"elements ", range.first, "+", range.count, " are outside of a buffer of ", size});
    };
    const bool reads = step.verb != Verb::receive, writes = step.verb != Verb::send;
    if (reads) inside(step.from);
    if (writes) inside(step.to);
    if (writes && step.to.buffer == Buffer::input) fail({"the input is the caller's and must not be written"});
    if (!reads || !writes) return;
    if (step.from.count != step.to.count) fail({"its two ranges differ in length"});
    const Place from = place(step.from), to = place(step.to);
    if (from.space == to.space && from.first != to.first && from.first < to.first + to.count && to.first < from.first + from.count)
      fail({"its two ranges overlap without being the same"});
  }

  void add(Spaces& spaces, const Step& step, unsigned conflicts) {
    const auto index = static_cast<std::uint32_t>(steps_.size());
    PlannedStep planned{step};
    planned.first_dependency = static_cast<std::uint32_t>(dependencies_.size());
    const auto scaled = [&](Range range) { return Range{range.buffer, range.first * grain_, range.count * grain_}; };

    if (step.verb == Verb::receive) planned.from = {};
    if (step.verb == Verb::send) planned.to = {};
    for (const Range& range : {planned.from, planned.to})
      if (range.buffer == Buffer::scratch && range.count > 0) scratch_ = std::max(scratch_, (range.first + range.count) * grain_);

    const std::size_t first_new = dependencies_.size();
    const auto wait_for = [&](const std::vector<Access>& accesses, const Place& mine, std::size_t begin, std::size_t end) {
      for (const Access& access : accesses)
        if (access.step != index) depend(first_new, access, mine, begin, end);
    };
    if (step.verb != Verb::receive && step.from.count > 0) {
      const Place from = place(step.from);
      visit(spaces[from.space], from, [&](std::size_t begin, Interval& interval) {
        if (conflicts & read_after_write) wait_for(interval.writer, from, begin, interval.end);
        interval.readers.push_back({index, from.first});
      });
    }
    if (step.verb != Verb::send && step.to.count > 0) {
      const Place to = place(step.to);
      const bool reads_too = step.verb == Verb::combine;  // to = to . from
      visit(spaces[to.space], to, [&](std::size_t begin, Interval& interval) {
        if (conflicts & (reads_too ? read_after_write | write_after_write : write_after_write)) wait_for(interval.writer, to, begin, interval.end);
        if (conflicts & write_after_read) wait_for(interval.readers, to, begin, interval.end);
        interval.writer.assign(1, {index, to.first});
        interval.readers.clear();
      });
    }
    planned.dependencies = static_cast<std::uint32_t>(dependencies_.size() - first_new);
    planned.from = scaled(planned.from);
    planned.to = scaled(planned.to);
    if (step.verb == Verb::send) {
      ++messages_sent_;
      units_sent_ += planned.count();
    } else if (step.peer >= 0) {
      units_received_ += planned.count();
    }
    steps_.push_back(planned);
  }

  /// Calls f for each interval of the place, splitting and creating intervals so that they cover it exactly.
  template <class F>
  static void visit(std::map<std::size_t, Interval>& space, const Place& place, F&& f) {
    const std::size_t end = place.first + place.count;
    split(space, place.first);
    split(space, end);
    std::size_t at = place.first;
    for (auto it = space.lower_bound(at); at < end; ++it) {
      if (it == space.end() || it->first > at) {
        const std::size_t until = it == space.end() ? end : std::min(end, it->first);
        it = space.emplace_hint(it, at, Interval{until, {}, {}});
      }
      f(it->first, it->second);
      at = it->second.end;
    }
  }
  static void split(std::map<std::size_t, Interval>& space, std::size_t at) {
    auto it = space.upper_bound(at);
    if (it == space.begin()) return;
    --it;
    if (it->first == at || it->second.end <= at) return;
    Interval rest = it->second;
    it->second.end = at;
    space.emplace(at, std::move(rest));
  }

  void depend(std::size_t first_new, const Access& on, const Place& mine, std::size_t begin, std::size_t end) {
    const auto shift = static_cast<std::ptrdiff_t>(mine.first) - static_cast<std::ptrdiff_t>(on.first);
    const Dependency need{on.step, (begin - mine.first) * grain_, (end - mine.first) * grain_, shift * static_cast<std::ptrdiff_t>(grain_)};
    for (std::size_t d = first_new; d < dependencies_.size(); ++d) {
      Dependency& known = dependencies_[d];
      if (known.step != need.step || known.shift != need.shift || need.begin > known.end || need.end < known.begin) continue;
      known.begin = std::min(known.begin, need.begin);
      known.end = std::max(known.end, need.end);
      return;
    }
    dependencies_.push_back(need);
  }

  /// The reverse edges: who has to look again when a step moved.
  void link() {
    for (std::size_t j = 0; j < steps_.size(); ++j)
      for (std::uint32_t d = 0; d < steps_[j].dependencies; ++d) ++steps_[dependencies_[steps_[j].first_dependency + d].step].dependents;
    std::uint32_t total = 0;
    for (PlannedStep& step : steps_) {
      step.first_dependent = total;
      total += step.dependents;
      step.dependents = 0;
    }
    dependents_.resize(total);
    for (std::size_t j = 0; j < steps_.size(); ++j)
      for (std::uint32_t d = 0; d < steps_[j].dependencies; ++d) {
        PlannedStep& on = steps_[dependencies_[steps_[j].first_dependency + d].step];
        dependents_[on.first_dependent + on.dependents++] = static_cast<std::uint32_t>(j);
      }
  }

  Layout layout_;
  std::shared_ptr<const void> extents_;  // layout_ points into it
  std::size_t grain_;
  std::vector<PlannedStep> steps_;
  std::vector<Dependency> dependencies_;
  std::vector<std::uint32_t> dependents_;
  std::size_t scratch_ = 0, units_sent_ = 0, units_received_ = 0, messages_sent_ = 0;
};

}  // namespace tally::inline v0
