// SPDX-License-Identifier: Apache-2.0
// Who really held up whom in one operation on a simulated network: everything that happens is recorded in true time, and
// for each wait the chain of causes is followed back, through other ranks, to those that had not arrived yet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <tally/plan.hpp>

#include "simulated.hpp"

namespace simulated {

class Recording {
 public:
  Recording(SimulatedNetwork& network, std::vector<Plan> plans) : network_(network), n_(network.size()), plans_(std::move(plans)), ranks_(plans_.size()), frames_(plans_.size() * plans_.size()) {
    for (std::size_t r = 0; r < plans_.size(); ++r) ranks_[r].steps.resize(plans_[r].steps().size());
  }
  /// The operation is called: what was recorded before does not belong to it.
  void post(Rank r) { ranks_[at(r)].posted = network_.now(), ranks_[at(r)].is_posted = true; }
  Ticks posted(Rank r) const { return ranks_[at(r)].posted; }

  /// What each rank made `me` wait for by coming late, in ns.
  std::vector<double> arrival_waits(Rank me) const {
    std::vector<double> caused(at(n_));
    for (const Wait& wait : ranks_[at(me)].waits) {
      const Frame& f = wait.is_frame ? frames_[pair(wait.peer, me)][wait.frame] : frames_[pair(me, wait.peer)][wait.frame];
      if (wait.is_frame) walk(me, f.receive_step, f.end, wait.begin, wait.end, caused);
      else walk(me, f.send_step, f.end, wait.begin, wait.end, caused);
    }
    return caused;
  }
  /// Of the waits.
  double all_waits(Rank me) const {
    double sum_of_all = 0;
    for (const Wait& wait : ranks_[at(me)].waits) sum_of_all += static_cast<double>(wait.end - wait.begin);
    return sum_of_all;
  }

  // For the transport that records.

  void sending(Rank me, const Transfer& t) {
    if (ranks_[at(me)].is_posted) frames_[pair(me, t.peer)].push_back({t.step, 0, t.done, t.done, 0, 0});
  }
  void moved(Rank me, const Transfer& t) {
    if (!ranks_[at(me)].is_posted) return;
    ranks_[at(me)].steps[t.step].emplace_back(t.done, network_.now());
    if (!t.is_send) return;
    Frame& f = frames_[pair(me, t.peer)].back();
    f.end = t.done;
    f.sent = network_.now();
  }
  void arrived(Rank me, const Transfer& t) {
    Node& node = ranks_[at(me)];
    if (!node.is_posted) return;
    const std::size_t k = node.arrived.at(at(t.peer))++;
    frames_[pair(t.peer, me)].at(k).receive_step = t.step;
    ended(me, true, t.peer, k);
  }
  void consumed(Rank me, const Transfer& t) {
    Node& node = ranks_[at(me)];
    if (node.is_posted) frames_[pair(t.peer, me)].at(node.consumed.at(at(t.peer))++).consumed = network_.now();
  }
  void credited(Rank me, const Transfer& t) {
    if (ranks_[at(me)].is_posted) ended(me, false, t.peer, frames_[pair(me, t.peer)].size());  // it is the next one that had no room
  }
  void poll_begins(Rank me) { ranks_[at(me)].poll_began = network_.now(); }
  void poll_ends(Rank me, bool moved_any) {
    Node& node = ranks_[at(me)];
    if (!moved_any && !node.waiting) node.wait_began = network_.now();
    node.waiting = node.is_posted && !moved_any;
  }

 private:
  using Progress = std::vector<std::pair<std::size_t, Ticks>>;  // bytes done, since when
  struct Frame {
    std::uint32_t send_step, receive_step;
    std::size_t begin, end;  // of the message
    Ticks sent, consumed;
  };
  struct Wait {
    Ticks begin, end;
    bool is_frame;
    Rank peer;
    std::size_t frame;  // the one that ended it, or the one that then had room
  };
  struct Node {
    Ticks posted = 0, poll_began = 0, wait_began = 0;
    bool is_posted = false, waiting = false;
    std::vector<Progress> steps;
    std::vector<Wait> waits;
    std::vector<std::size_t> arrived = std::vector<std::size_t>(64), consumed = arrived;  // frames of each peer
  };

  static std::size_t at(Rank r) { return static_cast<std::size_t>(r); }
  std::size_t pair(Rank from, Rank to) const { return at(from) * at(n_) + at(to); }
  void ended(Rank me, bool is_frame, Rank peer, std::size_t frame) {
    Node& node = ranks_[at(me)];
    if (std::exchange(node.waiting, false) && node.poll_began > node.wait_began) node.waits.push_back({node.wait_began, node.poll_began, is_frame, peer, frame});
  }

  const PlannedStep& step(Rank r, std::uint32_t i) const { return plans_[at(r)].steps()[i]; }
  /// The bytes of other steps that the first `bytes` of step i need: f(step, bytes of it).
  template <class F>
  void for_each_need(Rank r, std::uint32_t i, std::size_t bytes, F&& f) const {
    const PlannedStep& s = step(r, i);
    for (std::uint32_t d = s.first_dependency; d < s.first_dependency + s.dependencies; ++d) {
      const Dependency& need = plans_[at(r)].dependencies()[d];
      if (need.begin < bytes) f(need.step, static_cast<std::size_t>(static_cast<std::ptrdiff_t>(std::min(bytes, need.end)) + need.shift));
    }
  }
  Ticks done_at(Rank r, std::uint32_t i, std::size_t bytes) const {
    if (step(r, i).peer < 0) {  // local steps take no time
      Ticks last = ranks_[at(r)].posted;
      for_each_need(r, i, bytes, [&](std::uint32_t j, std::size_t needed) { last = std::max(last, done_at(r, j, needed)); });
      return last;
    }
    const Progress& progress = ranks_[at(r)].steps[i];
    const auto found = std::lower_bound(progress.begin(), progress.end(), std::pair<std::size_t, Ticks>(bytes, 0));
    return found == progress.end() ? SimulatedNetwork::never : found->second;
  }

  /// Why rank r was not through with the first `bytes` of step i from `a` until `b`: the time in which somebody was missing.
  void walk(Rank r, std::uint32_t i, std::size_t bytes, Ticks a, Ticks b, std::vector<double>& caused) const {
    while (a < b) {
      if (const Ticks posted = ranks_[at(r)].posted; a < posted) {
        caused[at(r)] += static_cast<double>(std::min(b, posted) - a);
        a = posted;
        continue;
      }
      // The latest of what had to happen before on the same rank.
      Ticks last = a;
      std::uint32_t before = 0;
      std::size_t before_bytes = 0;
      const auto consider = [&](std::uint32_t j, std::size_t needed, Ticks when) {
        if (when > last && when <= done_at(r, i, bytes)) last = when, before = j, before_bytes = needed;
      };
      for_each_need(r, i, bytes, [&](std::uint32_t j, std::size_t needed) { consider(j, needed, done_at(r, j, needed)); });
      const PlannedStep& s = step(r, i);
      const bool sends = s.verb == Verb::send;
      const auto* frames = s.peer < 0 ? nullptr : &frames_[sends ? pair(r, s.peer) : pair(s.peer, r)];
      std::size_t k = 0;
      if (frames) {
        const auto place = [&](const Frame& f) { return std::pair(sends ? f.send_step : f.receive_step, f.end); };
        k = static_cast<std::size_t>(std::lower_bound(frames->begin(), frames->end(), std::pair(i, bytes), [&](const Frame& f, const auto& sought) { return place(f) < sought; }) - frames->begin());
        if (k > 0) {
          const Frame& f = (*frames)[k - 1];
          if (sends) consider(f.send_step, f.end, f.sent);
          else consider(f.receive_step, f.end, f.consumed);
        }
      }
      if (last > a) {
        walk(r, before, before_bytes, a, std::min(b, last), caused);
        a = last;
        continue;
      }
      if (!frames) return;
      const auto slots = static_cast<std::size_t>(network_.options().slots);
      if (sends && k >= slots && (*frames)[k - slots].consumed > a) {
        const Frame& f = (*frames)[k - slots];
        walk(s.peer, f.receive_step, f.end, a, std::min(b, f.consumed), caused);
        a = f.consumed;
      } else if (!sends && (*frames)[k].sent > a) {
        walk(s.peer, (*frames)[k].send_step, (*frames)[k].end, a, std::min(b, (*frames)[k].sent), caused);
        a = (*frames)[k].sent;
      } else {
        return;  // on its way, or somebody was at work
      }
    }
  }

  SimulatedNetwork& network_;
  int n_;
  std::vector<Plan> plans_;
  std::vector<Node> ranks_;
  std::vector<std::vector<Frame>> frames_;
};

/// The simulated transport, with its ranks' moves recorded.
class RecordedTransport : public SimulatedTransport {
 public:
  RecordedTransport(SimulatedNetwork& network, Rank me, Recording& recording) : SimulatedTransport(network, me), recording_(recording) {}
  template <Probe P>
  void post(Transfer& t, P& probe) {
    Recorder<P> recorder{probe, recording_, rank()};
    SimulatedTransport::post(t, recorder);
  }
  template <Probe P>
  bool poll(P& probe) {
    Recorder<P> recorder{probe, recording_, rank()};
    recording_.poll_begins(rank());
    const bool moved = SimulatedTransport::poll(recorder);
    recording_.poll_ends(rank(), moved);
    return moved;
  }
  std::unique_ptr<RecordedTransport> open(std::uint64_t, std::span<const Rank>) { return nullptr; }

 private:
  template <class P>
  struct Recorder {
    P& probe;
    Recording& recording;
    Rank me;
    void arrived(Transfer& t, const FrameInfo& frame) {
      recording.arrived(me, t);
      probe.arrived(t, frame);
    }
    Transfer* unexpected(Rank peer, const FrameInfo& frame) { return probe.unexpected(peer, frame); }
    void credited(Transfer& t, const FrameTimes& times) {
      recording.credited(me, t);
      probe.credited(t, times);
    }
    void fetched(Transfer& t, const FrameTimes& times) {
      recording.credited(me, t);
      probe.fetched(t, times);
    }
    void drained(Transfer& t, bool by_copying = false) { probe.drained(t, by_copying); }
    void continued(Transfer& t, const FrameTimes& times) { probe.continued(t, times); }
    void trying(Transfer& t) { probe.trying(t); }
    void copying(Transfer& t) { probe.copying(t); }
    void reducing(Transfer& t) { probe.reducing(t); }
    void moved(Transfer& t) {
      recording.moved(me, t);
      probe.moved(t);
    }
    FrameTimes stamp(Transfer& t) {
      recording.sending(me, t);
      return probe.stamp(t);
    }
    FrameTimes credit_stamp(const Transfer& t) {
      recording.consumed(me, t);
      return probe.credit_stamp(t);
    }
  };
  Recording& recording_;
};

}  // namespace simulated
