// SPDX-License-Identifier: Apache-2.0
// The channels of a transport over a network: one for each direction of each lane to each peer, with the transfers that were posted to
// it, and which of them have something to do.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "concept.hpp"
#include "queue.hpp"

namespace tally::inline v0::detail {

/// Out: peer, lane, sends, and `next`, the first send that is not wholly handed on. In: peer, lane, receives.
template <class Out, class In>
class Channels {
 public:
  Channels(int lanes, int size) : size_(size), outs_(static_cast<std::size_t>(lanes * size)), ins_(outs_.size()) {
    sending_.reserve(outs_.size());
    receiving_.reserve(ins_.size());
    for (int lane = 0; lane < lanes; ++lane)
      for (Rank r = 0; r < size; ++r) {
        out(lane, r).peer = in(lane, r).peer = r;
        out(lane, r).lane = in(lane, r).lane = lane;
      }
  }
  Out& out(int lane, Rank r) { return outs_[index(lane, r)]; }
  In& in(int lane, Rank r) { return ins_[index(lane, r)]; }
  Out& out(const Transfer& t) { return out(t.lane, t.peer); }
  In& in(const Transfer& t) { return in(t.lane, t.peer); }
  std::span<Out> outs() { return outs_; }
  std::span<In> ins() { return ins_; }
  bool idle() const { return sending_.empty() && receiving_.empty(); }

  /// Queues it; the first send of a channel is begun at once, by advance_send(out).
  template <class F>
  void post(Transfer& t, F&& advance_send) {
    if (!t.is_send) {
      if (in(t).receives.push(t)) receiving_.push_back(&in(t));
      return;
    }
    Out& out = this->out(t);
    const bool is_first = out.sends.push(t);
    if (!out.next) out.next = &t;
    if (!is_first) return;
    sending_.push_back(&out);
    advance_send(out);
    if (!out.sends.head) std::erase(sending_, &out);
  }
  /// Of one that is cancelled.
  void remove(Transfer& t) {
    if (t.is_send) {
      Out& out = this->out(t);
      if (out.next == &t) out.next = t.next;
      out.sends.remove(t);
      if (!out.sends.head) std::erase(sending_, &out);
    } else {
      In& in = this->in(t);
      in.receives.remove(t);
      if (!in.receives.head) std::erase(receiving_, &in);
    }
  }
  /// Drives those with something to do: advance(channel) says whether anything moved. True if anything did.
  template <class F, class G>
  bool poll(F&& advance_send, G&& advance_receive) {
    bool moved = false;
    for (std::size_t i = 0; i < sending_.size();) {
      Out& out = *sending_[i];
      if (advance_send(out)) moved = true;
      if (!out.sends.head) drop(sending_, i);
      else ++i;
    }
    for (std::size_t i = 0; i < receiving_.size();) {
      In& in = *receiving_[i];
      if (advance_receive(in)) moved = true;
      if (!in.receives.head) drop(receiving_, i);
      else ++i;
    }
    return moved;
  }

 private:
  std::size_t index(int lane, Rank r) const { return static_cast<std::size_t>(lane * size_ + r); }
  template <class E>
  static void drop(std::vector<E*>& list, std::size_t i) {
    list[i] = list.back();
    list.pop_back();
  }

  int size_;
  std::vector<Out> outs_;
  std::vector<In> ins_;
  std::vector<Out*> sending_;
  std::vector<In*> receiving_;
};

}  // namespace tally::inline v0::detail
