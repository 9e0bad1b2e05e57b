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
  const auto sharing = static_cast<std::size_t>(layout.group.matters(layout.n) ? layout.group.size(layout.group.of(layout.me), layout.n) : layout.n);
  return (layout.input_count() + layout.output_count()) * grain >= cache / 4 * 3 / sharing;
}

/// Everything about a call that does not change from one call with this layout to the next, and the transfers of one that
/// is in flight.
struct Prepared : std::enable_shared_from_this<Prepared> {
  explicit Prepared(std::shared_ptr<const Plan> planned) : plan(std::move(planned)), past_caches(exceeds_caches(plan->layout(), plan->grain())), transfers(plan->steps().size()), queued(plan->steps().size()) {
    const bool folds = reduces(plan->layout().operation);  // else elements may be cut anywhere
    for (std::uint32_t i = 0; i < plan->steps().size(); ++i) {
      const PlannedStep& step = plan->steps()[i];
      Transfer& t = transfers[i];
      t.bytes = step.count();
      t.step = i;
      t.peer = step.peer;
      t.grain = static_cast<std::uint16_t>(folds || plan->layout().operation == Collective::barrier ? plan->grain() : 1);
      t.side = step.side;
      t.is_send = step.verb == Verb::send;
      t.fold = step.verb == Verb::receive_combine || step.verb == Verb::combine ? &fold : nullptr;
      // What was not read before and will not be read on is only written. (For folds it did not pay.)
      t.past_caches = past_caches && !t.is_send && !t.fold && step.to.buffer == Buffer::output && step.dependencies == 0 && step.dependents == 0;
      ready.push_back(plan->ready(i, [](std::size_t) { return std::size_t{0}; }));
    }
  }
  /// The transfers begin anew, for a call with these buffers.
  void aim(const std::byte* input, std::byte* output, const std::byte* scratch, std::uint64_t sequence, std::uint64_t fingerprint, Lateness arrival, void* owner) {
    const auto address = [&](const Range& range) -> const std::byte* {
      const std::byte* base = range.buffer == Buffer::input ? input : range.buffer == Buffer::output ? output : scratch;
      return base ? base + range.first : nullptr;
    };
    for (std::uint32_t i = 0; i < transfers.size(); ++i) {
      const PlannedStep& step = plan->steps()[i];
      Transfer& t = transfers[i];
      t.from = address(step.from);
      t.to = const_cast<std::byte*>(address(step.to));  // plans never write the input
      t.ready = ready[i];
      t.done = 0;
      t.operation = static_cast<std::uint32_t>(sequence);
      t.fingerprint = fingerprint;
      t.inherited = t.late = arrival;
      t.owner = owner;
      queued[i] = 0;
    }
  }
  std::size_t bytes_held() const { return plan->bytes_held() + transfers.size() * sizeof(Transfer); }

  std::shared_ptr<const Plan> plan;
  bool past_caches;                 // see exceeds_caches
  bool busy = false;                // in flight
  Fold fold;                        // of the call; the transfers point at it
  std::vector<Transfer> transfers;  // one per step; local steps use the watermarks too
  std::vector<std::size_t> ready;   // at the start
  std::vector<char> queued;         // local steps: waiting to be run
  LedgerRow* row = nullptr;
  std::shared_ptr<Prepared> original;             // while in flight: another one of the same plan, which keeps the spare ones
  std::vector<std::shared_ptr<Prepared>> spares;  // not in flight
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

struct PlanKeyHash {
  std::size_t operator()(const PlanKey& key) const {
    std::uint64_t h = static_cast<std::uint64_t>(key.layout.operation) + 31 * static_cast<std::uint64_t>(key.layout.root) + (key.layout.in_place ? 17 : 0);
    h = h * 0x9e3779b97f4a7c15u + key.layout.count;
    h = h * 0x9e3779b97f4a7c15u + key.grain;
    if (const Extents* e = key.layout.extents) {
      for (const auto& list : {e->in_counts, e->in_firsts, e->out_counts, e->out_firsts})
        for (const std::size_t x : list) h = (h ^ x) * 0x9e3779b97f4a7c15u;
      for (const auto& list : {e->to, e->from})
        for (const Rank r : list) h = (h ^ static_cast<std::uint64_t>(r)) * 0x9e3779b97f4a7c15u;
    }
    return static_cast<std::size_t>(h * 0x9e3779b97f4a7c15u + reinterpret_cast<std::uintptr_t>(key.generate));
  }
};

class PlanCache {
 public:
  /// May be in flight; see free(). Never dropped while somebody holds it.
  std::shared_ptr<Prepared> find(const PlanKey& key) {
    auto found = plans_.find(key);
    if (found == plans_.end()) {
      if (bytes_ > limit) {
        plans_.clear();
        bytes_ = 0;
      }
      auto prepared = make(key);
      bytes_ += prepared->bytes_held();
      PlanKey kept = key;
      kept.layout = prepared->plan->layout();  // whose extents are its own
      found = plans_.emplace(kept, std::move(prepared)).first;
    }
    return found->second;
  }
  /// One of the same plan that is not in flight.
  static std::shared_ptr<Prepared> free(const std::shared_ptr<Prepared>& original) {
    if (!original->busy) return original;
    std::shared_ptr<Prepared> spare;
    if (original->spares.empty()) {
      spare = std::make_shared<Prepared>(original->plan);
      spare->row = original->row;
    } else {
      spare = std::move(original->spares.back());
      original->spares.pop_back();
    }
    spare->original = original;
    return spare;
  }
  /// It is in flight no longer.
  static void give_back(std::shared_ptr<Prepared>&& held) {
    const std::shared_ptr<Prepared> prepared = std::move(held);
    prepared->busy = false;
    const auto original = std::exchange(prepared->original, nullptr);  // else the two would keep each other for ever
    if (original) original->spares.push_back(prepared);
  }
  /// One that is not kept. Shares have no steps.
  static std::shared_ptr<Prepared> make(const PlanKey& key) {
    return std::make_shared<Prepared>(std::make_shared<const Plan>(key.generate ? key.generate(key.layout.shape()) : no_steps(), key.layout, key.grain));
  }

 private:
  static constexpr std::size_t limit = std::size_t{16} << 20;  // bytes
  static Steps no_steps() { co_return; }

  std::unordered_map<PlanKey, std::shared_ptr<Prepared>, PlanKeyHash> plans_;
  std::size_t bytes_ = 0;
};

/// Plans for calls: most are like the one before.
class Planner {
 public:
  std::shared_ptr<Prepared> pin(const Call& call) { return plans_.find(PlanKey(call)); }
  /// One that is not in flight. `holds` keeps it, if it must outlive the next call (`keep`) or the last one's is in flight.
  Prepared* find(const Call& call, std::uint64_t fingerprint, bool keep, std::shared_ptr<Prepared>& holds) {
    if (call.pinned) {
      if (last_.get() != call.pinned) {
        last_ = static_cast<Prepared*>(call.pinned)->shared_from_this();
        key_ = PlanKey(call);
      }
    } else if (!last_ || fingerprint != fingerprint_ || call.layout.count != key_.layout.count || call.layout.in_place != key_.layout.in_place || call.algorithm.generate != key_.generate ||
               call.algorithm.share != key_.share || call.algorithm.name.data() != key_.name || call.layout.extents) {  // the fingerprint tells the rest
      key_ = PlanKey(call);
      last_ = nullptr;
      last_ = plans_.find(key_);
    }
    fingerprint_ = fingerprint;
    if (!keep && !last_->busy) return last_.get();
    holds = PlanCache::free(last_);
    return holds.get();
  }

 private:
  PlanCache plans_;
  PlanKey key_;                     // of the last call,
  std::uint64_t fingerprint_ = 0;   // and what else tells it from others
  std::shared_ptr<Prepared> last_;  // its plan; the cache may let go of it
};

}  // namespace tally::inline v0
