// SPDX-License-Identifier: Apache-2.0
// What kernels need to know of a call, worked out once and kept: lists of packets, a rank's share, or recorded plans in the device's memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../device/driver.hpp"
#include "../device/kernels.hpp"
#include "../error.hpp"
#include "../prepared.hpp"

namespace tally::inline v0::detail {

/// Of one rank, for calls of one layout and one algorithm.
struct DevicePlan {
  std::byte* memory = nullptr;  // the device's, where it needs any
  std::size_t memory_bytes = 0;
  bool captured = false;  // graphs may point at it: it stays
  std::uint64_t sent = 0, received = 0;  // bytes
  // Packets: on the host if they are few, else in that memory.
  std::vector<device::PacketSend> sends;
  std::vector<device::PacketFold> folds;
  const device::PacketSend* far_sends = nullptr;
  const device::PacketFold* far_folds = nullptr;
  std::size_t packets = 0;
  Share share{};
  // Steps, a channel per block:
  std::vector<std::unique_ptr<const Plan>> recorded;
  const device::StepsWork* channels = nullptr;
  std::byte* scaled = nullptr;  // room for the input, multiplied
};

template <device::Driver D>
class DevicePlans {
 public:
  explicit DevicePlans(D& driver) : driver_(driver) {}
  DevicePlans(const DevicePlans&) = delete;
  ~DevicePlans() {
    for (const auto& [key, plan] : plans_) driver_.release_private(plan->memory);
  }

  /// The one for this call, whose input is multiplied first or not: make(plan) works it out the first time. `idle()` returns when no kernel
  /// uses any.
  template <class Make, class Idle>
  DevicePlan& find(const Call& call, bool scales, Make&& make, Idle&& idle) {
    if (const auto found = plans_.find({PlanKey(call), scales}); found != plans_.end()) return *found->second;
    if (bytes_ > most_bytes || plans_.size() > most_plans) {
      idle();
      std::erase_if(plans_, [&](const auto& entry) {
        if (entry.second->captured) return false;
        driver_.release_private(entry.second->memory);
        bytes_ -= entry.second->memory_bytes;
        return true;
      });
    }
    auto plan = std::make_unique<DevicePlan>();
    make(*plan);
    bytes_ += plan->memory_bytes;
    Key key{PlanKey(call), scales};
    if (call.layout.extents) key.call.layout = plan->recorded.at(0)->layout();  // the caller's extents may go after the call
    return *plans_.emplace(key, std::move(plan)).first->second;
  }

  /// `blocks`: that take part.
  void plan_packets(DevicePlan& plan, const Call& call, const std::vector<Share>& shares, int blocks) {
    const Layout& l = call.layout;
    device::PacketPlan packets(shares, l.me, l.n, call.grain, blocks);
    plan.packets = packets.packets;
    for (const device::PacketSend& s : packets.sends) plan.sent += s.count * call.grain * static_cast<std::uint64_t>(s.to < 0 ? l.n - 1 : 1);
    for (const device::PacketFold& f : packets.folds) plan.received += f.count * call.grain * static_cast<std::uint64_t>(f.hi - f.lo - (f.lo <= l.me && l.me < f.hi ? 1 : 0));
    plan.sends = std::move(packets.sends), plan.folds = std::move(packets.folds);
    constexpr auto kept = static_cast<std::size_t>(device::kept_packets);
    if (plan.sends.size() <= kept && plan.folds.size() <= kept) return;
    const std::size_t sends = plan.sends.size() * sizeof plan.sends[0], folds = plan.folds.size() * sizeof plan.folds[0];
    allocate(plan, sends + folds);
    driver_.upload(plan.memory, plan.sends.data(), sends);
    driver_.upload(plan.memory + sends, plan.folds.data(), folds);
    plan.far_sends = reinterpret_cast<const device::PacketSend*>(plan.memory);
    plan.far_folds = reinterpret_cast<const device::PacketFold*>(plan.memory + sends);
  }
  /// `shares`: of all ranks.
  static void plan_share(DevicePlan& plan, const Call& call, const std::vector<Share>& shares) {
    const Layout& l = call.layout;
    for (Rank doer = 0; doer < l.n; ++doer) {  // whatever moves between two ranks' memory
      const Share& share = shares[static_cast<std::size_t>(doer)];
      const std::uint64_t bytes = share.from.count * call.grain;
      for (Rank r = 0; r < l.n; ++r) {
        if (r == doer) continue;
        const bool writes = share.way != Share::Way::exchange && share.writes(r);
        if (share.reads(r, l.n)) (doer == l.me ? plan.received : plan.sent) += doer == l.me || r == l.me ? bytes : 0;
        if (writes) (doer == l.me ? plan.sent : plan.received) += doer == l.me || r == l.me ? bytes : 0;
      }
    }
    plan.share = shares[static_cast<std::size_t>(l.me)];
  }
  void plan_steps(DevicePlan& plan, const Call& call, int blocks, bool scales) {
    std::vector<device::StepsWork> works;
    std::size_t bytes = static_cast<std::size_t>(blocks) * sizeof(device::StepsWork);
    const auto room = [&](std::size_t wanted) {
      const std::size_t begin = (bytes + 127) / 128 * 128;
      bytes = begin + wanted;
      return begin;
    };
    struct Places {
      std::size_t steps, dependencies, done, scratch;
    };
    std::vector<Places> places;
    for (int b = 0; b < blocks; ++b) {
      const device::Cut cut = call.layout.extents ? device::Cut::whole() : device::Cut::of(call.layout.count, b, blocks);
      Layout part = call.layout;
      if (!part.extents) part.count = cut.part;
      const auto& recorded = plan.recorded.emplace_back(std::make_unique<const Plan>(call.algorithm.generate(part.shape()), part, 1));
      device::StepsWork work;
      work.count = static_cast<std::uint32_t>(recorded->steps().size());
      work.results = part.output_count();
      work.cut = cut;
      works.push_back(work);
      places.push_back({room(work.count * sizeof(PlannedStep)), room(recorded->dependencies().size() * sizeof(Dependency)), room(work.count * sizeof(std::uint64_t)), room(recorded->scratch() * call.grain)});
      plan.sent += recorded->units_sent() * call.grain, plan.received += recorded->units_received() * call.grain;
    }
    const std::size_t scaled = scales ? room(call.layout.input_count() * call.grain) : 0;
    allocate(plan, bytes);
    for (int b = 0; b < blocks; ++b) {
      const auto i = static_cast<std::size_t>(b);
      const Plan& recorded = *plan.recorded[i];
      works[i].steps = reinterpret_cast<const PlannedStep*>(plan.memory + places[i].steps);
      works[i].dependencies = reinterpret_cast<const Dependency*>(plan.memory + places[i].dependencies);
      works[i].done = reinterpret_cast<std::uint64_t*>(plan.memory + places[i].done);
      works[i].scratch = plan.memory + places[i].scratch;
      driver_.upload(plan.memory + places[i].steps, recorded.steps().data(), recorded.steps().size() * sizeof(PlannedStep));
      driver_.upload(plan.memory + places[i].dependencies, recorded.dependencies().data(), recorded.dependencies().size() * sizeof(Dependency));
    }
    driver_.upload(plan.memory, works.data(), works.size() * sizeof(device::StepsWork));
    plan.channels = reinterpret_cast<const device::StepsWork*>(plan.memory);
    if (scales) plan.scaled = plan.memory + scaled;
  }

 private:
  struct Key {
    PlanKey call;
    bool scales = false;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct Hash {
    std::size_t operator()(const Key& key) const { return PlanKeyHash{}(key.call) + (key.scales ? 1 : 0); }
  };
  static constexpr std::size_t most_bytes = std::size_t{256} << 20, most_plans = 4096;
  void allocate(DevicePlan& plan, std::size_t bytes) {
    plan.memory = driver_.allocate_private(bytes);
    if (!plan.memory) throw Error(Errc::no_resources, {"the device has no ", bytes, " bytes left for the plan of an operation"});
    plan.memory_bytes = bytes;
  }
  D& driver_;
  std::unordered_map<Key, std::unique_ptr<DevicePlan>, Hash> plans_;
  std::size_t bytes_ = 0;
};

}  // namespace tally::inline v0::detail
