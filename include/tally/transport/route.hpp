// SPDX-License-Identifier: Apache-2.0
// Two ways at once: shared memory to the ranks of this host, a network to all others. Which one goes to whom is settled when the
// communicator is made. A rank that waits for both sleeps on the network's descriptors and on a bell that its neighbours ring.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../grouping.hpp"
#include "concept.hpp"
#include "slots.hpp"

namespace tally::inline v0 {

/// What a network must have beside a transport's members, to be one of two ways.
template <class T>
concept Network = Transport<T> && requires(T& t, const T& c, nanoseconds limit) {
  { c.idle() } -> std::same_as<bool>;  // nothing is to be moved
  t.sleep(limit, int{});               // as park(), but without looking first, or until the descriptor is readable
  t.inquire();                         // tells others what this rank is in, and asks what they are
  t.hear();                            // what came of that, and whether somebody gave up
};

template <Network Net>
class RouteTransport {
 public:
  /// `local` moves what goes to ranks of this host, and calls them as they are called here; null if there are none. `places`: by
  /// rank, the same for ranks of one host.
  /// `slots`: of all ranks, for what all must agree on.
  RouteTransport(std::unique_ptr<Net> net, std::unique_ptr<SlotTransport> local, std::vector<std::uint64_t> places, const SlotOptions& slots)
      : net_(std::move(net)), local_(std::move(local)), slots_(slots), places_(std::move(places)), partition_(places_), near_(places_.size(), -1), name_(net_->name()), frame_bytes_(net_->frame_bytes()) {
    Rank count = 0;
    for (std::size_t r = 0; local_ && r < places_.size(); ++r)
      if (places_[r] == places_[static_cast<std::size_t>(rank())]) near_[r] = count++;
    const int most = partition_.largest();  // ranks of a host
    if (most <= 1) return;
    name_.insert(0, "shm+");  // the same for all, also for who is alone
    frame_bytes_ = std::min(frame_bytes_, SlotLayout(most, slots_).slot_bytes());
  }

  Rank rank() const { return net_->rank(); }
  int size() const { return net_->size(); }
  int lanes() const { return net_->lanes(); }
  Rank origin(Rank r) const { return net_->origin(r); }
  std::size_t frame_bytes() const { return frame_bytes_; }
  std::string_view name() const { return name_; }
  const Partition* partition() const { return &partition_; }
  /// Which way goes to whom: "shm to 1, tcp to 2-3".
  std::string ways() const {
    const auto list = [this](bool nearby) {
      std::string text;
      for (Rank r = 0, first = 0; r < size(); first = ++r) {
        if (r == rank() || is_near(r) != nearby) continue;
        while (r + 1 < size() && r + 1 != rank() && is_near(r + 1) == nearby) ++r;
        text += detail::concat({text.empty() ? "" : ",", first});
        if (r > first) text += detail::concat({"-", r});
      }
      return text;
    };
    const std::string here = list(true), there = list(false);
    return detail::concat({here.empty() ? "" : detail::concat({local_->name(), " to ", here, there.empty() ? "" : ", "}), there.empty() ? "" : detail::concat({net_->name(), " to ", there})});
  }
  TransportCounters counters() const {
    TransportCounters all = net_->counters();
    if (!local_) return all;
    const TransportCounters& more = local_->counters();
    all.bytes_sent += more.bytes_sent;
    all.bytes_received += more.bytes_received;
    all.messages_sent += more.messages_sent;
    all.messages_received += more.messages_received;
    all.frames_sent += more.frames_sent;
    all.overhead_sent += more.overhead_sent;
    return all;
  }
  bool crowded() { return (local_ && local_->crowded()) || net_->crowded(); }

  template <Probe P>
  void post(Transfer& t, P& probe) {
    if (is_near(t.peer)) local_->post(t, probe);
    else net_->post(t, probe);
  }
  void cancel(Transfer& t) {
    if (!t.pending) return;  // then it may name no peer
    if (is_near(t.peer)) local_->cancel(t);
    else net_->cancel(t);
  }
  template <Probe P>
  bool poll(P& probe) {
    const bool moved = local_ && local_->poll(probe);
    return net_->poll(probe) || moved;
  }
  void flush() {
    if (local_) local_->flush();
    net_->flush();
  }

  bool has_rest() const { return detail::has_rest(*net_); }
  void settle() { detail::settle(*net_); }

  void enter(const RankStatus& status) {
    if (local_) local_->enter(status);
    net_->enter(status);
  }
  void exit() {
    if (local_) local_->exit();
    net_->exit();
  }
  RankStatus status(Rank r) const { return is_near(r) ? local_->status(near(r)) : net_->status(r); }
  RankStatus status_at(Rank r, std::uint64_t sequence) const { return is_near(r) ? local_->status(near(r)) : net_->status_at(r, sequence); }
  Liveness liveness(Rank r) {
    if (!is_near(r)) return net_->liveness(r);
    net_->inquire();  // those on other hosts want to know what this rank is in, too
    return local_->liveness(near(r));
  }

  /// By both ways, so that who sleeps at one of them wakes up. A host says the notice that was its first: what its others say in answer
  /// must not come before that.
  void abort(const AbortNotice& notice) {
    if (local_) local_->abort(notice);
    net_->abort(local_ ? local_->abort_notice() : notice);
  }
  bool aborted() const { return (local_ && local_->aborted()) || net_->aborted(); }
  /// The network's is the first one of all hosts.
  AbortNotice abort_notice() const {
    const AbortNotice first = net_->abort_notice();
    return local_ && local_->aborted() && first.rank < 0 && first.text.empty() ? local_->abort_notice() : first;
  }

  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    if (!local_ || local_->idle()) return net_->park(limit, recheck);
    if (!net_->idle() || has_rest()) return local_->park_at_doorbell(recheck, [&] { net_->sleep(limit, local_->doorbell().fd()); });
    local_->park(limit, recheck);
    net_->hear();
  }
  void interrupt() {
    if (local_) local_->interrupt();
    net_->interrupt();
  }
  /// The line that this rank waits for, if that is all.
  const void* awaited() const { return local_ && net_->idle() ? local_->awaited() : nullptr; }

  std::uint64_t reserve(std::span<const Rank> members) { return net_->reserve(members); }
  std::unique_ptr<RouteTransport> open(std::uint64_t token, std::span<const Rank> members) {
    std::vector<Rank> locals, numbers;
    std::vector<std::uint64_t> places;
    for (std::size_t i = 0; i < members.size(); ++i) {
      places.push_back(places_[static_cast<std::size_t>(members[i])]);
      if (!is_near(members[i])) continue;
      locals.push_back(near(members[i]));
      numbers.push_back(static_cast<Rank>(i));
    }
    auto net = net_->open(token, members);  // first, since some networks need all ranks for it
    // All were told the number before any came here, so that one that does not come has died, or the communicator was given up.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    auto local = locals.size() > 1 ? local_->open_by_key(token, locals, std::move(numbers), [&] { return aborted() || std::chrono::steady_clock::now() > deadline; }) : nullptr;
    return std::make_unique<RouteTransport>(std::move(net), std::move(local), std::move(places), slots_);
  }
  void release(std::uint64_t token) { net_->release(token); }
  void discard(std::uint64_t token, std::span<const Rank> members) { net_->discard(token, members); }

  void leave() {
    if (local_) local_->leave();
    net_->leave();
  }

 private:
  Rank near(Rank r) const { return near_[static_cast<std::size_t>(r)]; }
  bool is_near(Rank r) const { return near(r) >= 0; }

  std::unique_ptr<Net> net_;
  std::unique_ptr<SlotTransport> local_;
  SlotOptions slots_;
  std::vector<std::uint64_t> places_;
  Partition partition_;     // by them
  std::vector<Rank> near_;  // by rank, what it is in the local memory; -1: on another host
  std::string name_;
  std::size_t frame_bytes_;
};

}  // namespace tally::inline v0
