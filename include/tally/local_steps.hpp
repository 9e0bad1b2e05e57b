// SPDX-License-Identifier: Apache-2.0
// The steps of a plan that move nothing between ranks, run in slices so that the network goes on meanwhile; and who may go
// further when any step has moved.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "copy.hpp"
#include "run.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

class LocalSteps {
 public:
  bool empty() const { return queue_.empty(); }
  void clear() { queue_.clear(); }
  /// Step i can go on: a short copy does so at once.
  template <class Engine>
  void go(Engine& engine, Run& run, std::uint32_t i) {
    Transfer& t = run.active->transfers[i];
    if (run.active->queued[i] || t.done == t.bytes) return;
    if (t.fold || t.bytes > short_bytes || t.ready < t.bytes) return queue(run, i);
    std::memmove(t.to + t.done, t.from + t.done, t.bytes - t.done);
    t.late.raise(engine.resumed());
    t.done = t.bytes;
    engine.end_transfer(run);
    propagate(engine, run, i);
  }
  /// One slice of each that can go on. `engine` is told of the time, and of those that are done.
  template <class Engine>
  void run(Engine& engine) {
    const std::size_t n = queue_.size();
    for (std::size_t k = 0; k < n; ++k) {
      const auto [run, i] = queue_[k];
      run->active->queued[i] = 0;
      Transfer& t = run->active->transfers[i];
      const std::size_t grain = run->active->plan->grain(), bytes = std::min(t.ready - t.done, slice - slice % grain);
      const std::byte* from = t.from + t.done;
      std::byte* to = t.to + t.done;
      engine.at_work_for(*run);
      if (bytes > short_bytes) engine.enter(*run, t.fold ? State::reduce : State::copy);
      if (t.past_caches) copy_past_caches(to, from, bytes);
      else if (!t.fold) std::memmove(to, from, bytes);
      else if (t.side == Side::right) (*t.fold)(to, to, from, bytes);
      else (*t.fold)(to, from, to, bytes);
      t.late.raise(engine.resumed());
      t.done += bytes;
      if (t.done == t.bytes) engine.end_transfer(*run);
      else if (t.done < t.ready) queue(*run, i);
      propagate(engine, *run, i);
    }
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(n));
  }
  /// Step i moved: whoever waits for it may go further, and inherits what it was late by.
  template <class Engine>
  void propagate(Engine& engine, Run& run, std::uint32_t i) {
    Prepared& active = *run.active;
    const PlannedStep& step = active.plan->steps()[i];
    const Transfer& moved = active.transfers[i];
    for (std::uint32_t d = step.first_dependent; d < step.first_dependent + step.dependents; ++d) {
      const std::uint32_t j = active.plan->dependents()[d];
      Transfer& t = active.transfers[j];
      t.inherited.raise(moved.late);
      t.late.raise(moved.late);
      t.ready = active.plan->ready(j, [&](std::size_t k) { return active.transfers[k].done; });
      if (t.peer < 0 && t.ready > t.done) go(engine, run, j);
    }
  }

 private:
  static constexpr std::size_t slice = std::size_t{64} << 10;
  void queue(Run& run, std::uint32_t i) {
    run.active->queued[i] = 1;
    queue_.push_back({&run, i});
  }
  struct Local {
    Run* run;
    std::uint32_t step;
  };
  std::vector<Local> queue_;
};

}  // namespace tally::inline v0
