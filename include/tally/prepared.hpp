// SPDX-License-Identifier: Apache-2.0
// Plans made ready to run, and kept: with a transfer per step, and where each of them may begin. A call whose layout
// was seen before plans nothing and allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "account/ledger.hpp"
#include "call.hpp"
#include "plan.hpp"
#include "topology.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

/// Whether a call's results will have left the caches before anybody looks at them, as the ranks that share a cache move
/// more than it holds.
inline bool exceeds_caches(const Layout& layout, std::size_t grain) {
  static const std::size_t cache = last_level_cache_bytes();
  const auto sharing = static_cast<std::size_t>(layout.group > 1 ? layout.group : layout.n);
  return (layout.input_count() + layout.output_count()) * grain >= cache / 4 * 3 / sharing;
}

/// Everything about a call that does not change from one call with this layout to the next.
struct Prepared : std::enable_shared_from_this<Prepared> {
  /// Transfers that combine will use `fold`.
  Prepared(Plan&& planned, const Fold* fold) : plan(std::move(planned)), past_caches(exceeds_caches(plan.layout(), plan.grain())), transfers(plan.steps().size()), queued(plan.steps().size()) {
    for (std::uint32_t i = 0; i < plan.steps().size(); ++i) {
      const PlannedStep& step = plan.steps()[i];
      Transfer& t = transfers[i];
      t.bytes = step.count();
      t.step = i;
      t.peer = step.peer;
      t.grain = static_cast<std::uint16_t>(plan.grain());
      t.side = step.side;
      t.is_send = step.verb == Verb::send;
      t.fold = step.verb == Verb::receive_combine || step.verb == Verb::combine ? fold : nullptr;
      // What was not read before and will not be read on is only written. (For folds it did not pay.)
      t.past_caches = past_caches && !t.is_send && !t.fold && step.to.buffer == Buffer::output && step.dependencies == 0 && step.dependents == 0;
      ready.push_back(plan.ready(i, [](std::size_t) { return std::size_t{0}; }));
    }
  }
  std::size_t bytes_held() const { return plan.bytes_held() + transfers.size() * sizeof(Transfer); }

  Plan plan;
  bool past_caches;                 // see exceeds_caches
  std::vector<Transfer> transfers;  // one per step; local steps use the watermarks too
  std::vector<std::size_t> ready;   // at the start
  std::vector<char> queued;         // local steps: waiting to be run
  LedgerRow* row = nullptr;
};

/// What plans are told apart by.
struct PlanKey {
  PlanKey() = default;
  explicit PlanKey(const Call& call) : layout(call.layout), grain(call.grain), generate(call.algorithm.generate), share(call.algorithm.share), name(call.algorithm.name.data()) {}
  PlanKey(const Layout& planned, Steps (*by)(Shape)) : layout(planned), grain(1), generate(by) {}

  Layout layout;
  std::size_t grain = 0;
  Steps (*generate)(Shape) = nullptr;
  Share (*share)(Shape) = nullptr;
  const char* name = nullptr;  // two algorithms may share a generator
  friend bool operator==(const PlanKey&, const PlanKey&) = default;
};

class PlanCache {
 public:
  explicit PlanCache(const Fold* fold) : fold_(fold) {}

  /// Never dropped while somebody holds it.
  std::shared_ptr<Prepared> find(const PlanKey& key) {
    if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
    if (bytes_ > limit) {
      plans_.clear();
      bytes_ = 0;
    }
    auto prepared = make(key);
    bytes_ += prepared->bytes_held();
    return plans_.emplace(key, std::move(prepared)).first->second;
  }
  /// One that is not kept. Shares have no steps.
  std::shared_ptr<Prepared> make(const PlanKey& key) const {
    return std::make_shared<Prepared>(Plan(key.generate ? key.generate(key.layout.shape()) : no_steps(), key.layout, key.grain), fold_);
  }

 private:
  static constexpr std::size_t limit = std::size_t{16} << 20;  // bytes
  struct Hash {
    std::size_t operator()(const PlanKey& key) const {
      std::uint64_t h = static_cast<std::uint64_t>(key.layout.operation) + 31 * static_cast<std::uint64_t>(key.layout.root) + (key.layout.in_place ? 17 : 0);
      h = h * 0x9e3779b97f4a7c15u + key.layout.count;
      h = h * 0x9e3779b97f4a7c15u + key.grain;
      return static_cast<std::size_t>(h * 0x9e3779b97f4a7c15u + reinterpret_cast<std::uintptr_t>(key.generate));
    }
  };
  static Steps no_steps() { co_return; }

  std::unordered_map<PlanKey, std::shared_ptr<Prepared>, Hash> plans_;
  std::size_t bytes_ = 0;
  const Fold* fold_;
};

}  // namespace tally::inline v0
