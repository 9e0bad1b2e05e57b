// SPDX-License-Identifier: Apache-2.0
// What transports over networks have in common, whatever moves their bytes: a rank's place among others of several hosts, what each
// says about itself by way of the registry, clocks of other hosts, and calls to give up.
#pragma once

#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../network/node.hpp"
#include "../topology.hpp"
#include "concept.hpp"

namespace tally::inline v0 {

class NetworkedTransport {
 public:
  static constexpr std::uint64_t world = 1;

  /// `members`: the job's ranks that these are, this one among them.
  NetworkedTransport(std::shared_ptr<detail::NetworkNode> node, std::uint64_t communicator, std::vector<Rank> members)
      : node_(std::move(node)), group_(node_->join(communicator, std::move(members))), me_(static_cast<Rank>(std::find(group_->members.begin(), group_->members.end(), node_->rank()) - group_->members.begin())) {
    int here = 0;
    broken_since_.resize(group_->members.size());
    for (const Rank r : group_->members) {
      elsewhere_ = elsewhere_ || node_->is_elsewhere(r);
      here += std::equal(node_->address(r).ip, node_->address(r).ip + 16, node_->address(node_->rank()).ip);
    }
    const cpu_set_t cores = own_cores();
    crowded_ = here > std::max(CPU_COUNT(&cores), 1);
  }
  NetworkedTransport(const NetworkedTransport&) = delete;
  NetworkedTransport& operator=(const NetworkedTransport&) = delete;

  Rank rank() const { return me_; }
  int size() const { return static_cast<int>(group_->members.size()); }
  Rank origin(Rank r) const { return group_->members[static_cast<std::size_t>(r)]; }
  const TransportCounters& counters() const { return counters_; }
  bool crowded() const { return crowded_; }

  void enter(const RankStatus& status) { status_ = status; }
  void exit() {
    status_.inside = RankStatus::outside;
    if (published_.inside != RankStatus::outside) publish();  // others were told that this rank is inside
  }
  RankStatus status(Rank r) const {
    if (r == me_) return status_;
    const_cast<NetworkedTransport&>(*this).inquire();
    const detail::Told told = node_->told(*group_, r);
    return {told.status.sequence, told.status.fingerprint, told.status.count, static_cast<RankStatus::Place>(std::min<std::uint32_t>(told.status.inside, RankStatus::inside_message)), told.left != 0};
  }
  /// The same once r says that it has come that far, which it does while it waits or fails itself; for an error's text.
  RankStatus status_at(Rank r, std::uint64_t sequence) const {
    for (int tries = 0; tries < 100 && status(r).sequence < sequence; ++tries) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return status(r);
  }
  /// Hears what the others say about themselves.
  void hear() {
    node_->hear();
    if (elsewhere_) map_ = node_->clock_map();
  }
  /// Says what this rank is in and asks for the others, not too often: who waits for long does.
  void inquire() {
    hear();
    const auto now = std::chrono::steady_clock::now();
    if (now - inquired_ < std::chrono::milliseconds(1) + std::chrono::microseconds(100) * size()) return;
    inquired_ = now;
    if (published_.sequence != status_.sequence || published_.fingerprint != status_.fingerprint || published_.inside != status_.inside) publish();
    node_->ask(*group_);
  }
  bool aborted() const {
    if (group_->aborted.load(std::memory_order_relaxed)) return true;
    if (++looks_ % 256 != 0) return false;  // who sleeps is woken by it, and who looks after others hears it, too
    node_->hear();
    return group_->aborted.load(std::memory_order_relaxed);
  }
  AbortNotice abort_notice() const { return node_->notice(*group_); }

  std::uint64_t reserve(std::span<const Rank>) { return node_->new_communicator(); }
  void release(std::uint64_t) {}
  void discard(std::uint64_t, std::span<const Rank>) {}

 protected:
  ~NetworkedTransport() = default;

  void say_goodbye(const std::vector<detail::Opened>& opened) {
    publish();  // how far it came, for others' errors
    node_->leave(*group_, opened);
  }
  std::vector<Rank> origins_of(std::span<const Rank> members) const {
    std::vector<Rank> origins;
    for (const Rank r : members) origins.push_back(origin(r));
    return origins;
  }
  std::string address_of(Rank r) const { return node_->address(origin(r)).text(); }
  [[noreturn, gnu::cold]] void malformed(Rank peer, const std::string& what) const {
    throw TransportError(Errc::protocol, {"rank ", peer, " (", address_of(peer), ") sent ", what}, {me_, peer, status_.sequence, {}});
  }
  /// Until `own` or `other` is readable, somebody rings or comes to the node's door, which is everybody's, or the limit. True if `own` is.
  bool sleep_on(int own, int other, nanoseconds limit) {
    const timespec time{static_cast<time_t>(limit.count() / 1'000'000'000), static_cast<long>(limit.count() % 1'000'000'000)};  // epoll's own limits are milliseconds
    std::array<pollfd, 4> all{{{own, POLLIN, 0}, {group_->bell(), POLLIN, 0}, {node_->door(), POLLIN, 0}, {other, POLLIN, 0}}};
    const bool ready = ::ppoll(all.data(), all.size(), &time, nullptr) > 0;
    if (ready && all[1].revents) group_->answer();
    if (ready && all[2].revents) node_->attend();
    hear();
    return ready && all[0].revents;
  }
  /// What to make of `what` to r having broken: whether that rank left or died the registry hears at the same time.
  Liveness broken(Rank r, std::string_view what, std::string_view why) {
    const auto now = std::chrono::steady_clock::now();
    auto& since = broken_since_[static_cast<std::size_t>(r)];
    if (since == std::chrono::steady_clock::time_point{}) since = now;
    if (node_->registry_is_gone()) return Liveness::dead;
    if (now - since > std::chrono::seconds(1))
      throw TransportError(Errc::peer_lost, {what, " between rank ", me_, " and rank ", r, " (", address_of(r), ") broke, though that rank is still there: ", why}, {me_, r, status_.sequence, {}});
    return Liveness::alive;
  }
  /// Between hosts times go by the clock of rank 0's host, within one by its own.
  FrameTimes to_wire(bool elsewhere, const FrameTimes& times) const { return elsewhere ? map_.to_common(times) : times; }
  FrameTimes from_wire(bool elsewhere, const FrameTimes& times) const { return elsewhere ? map_.to_here(times) : times; }

  std::shared_ptr<detail::NetworkNode> node_;
  std::shared_ptr<detail::NetworkGroup> group_;
  Rank me_;
  RankStatus status_;
  TransportCounters counters_;
  bool elsewhere_ = false;  // some are on other hosts
  pid_t process_ = ::getpid();

 private:
  void publish() {
    published_ = status_;
    node_->publish(*group_, status_);
  }
  RankStatus published_;
  std::chrono::steady_clock::time_point inquired_{};
  std::vector<std::chrono::steady_clock::time_point> broken_since_;  // by rank
  mutable std::uint32_t looks_ = 0;
  bool crowded_ = false;
  detail::ClockMap map_ = node_->clock_map();
};

}  // namespace tally::inline v0
