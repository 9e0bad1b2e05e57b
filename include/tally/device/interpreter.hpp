// SPDX-License-Identifier: Apache-2.0
// Any algorithm that is written as steps, on a device: its recorded plan (plan.hpp), a channel of it per block. One thread of a block looks
// for a step that can go on, all do it, frame by frame through the windows, in whatever order the plan's dependencies allow.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../plan.hpp"
#include "fold.hpp"
#include "session.hpp"

namespace tally::inline v0::device {

/// Where a channel's elements are in the caller's buffer: of each block of `block` elements it has `part` of them, from `first` on.
/// whole(): all of them, where blocks have sizes of their own.
struct Cut {
  std::uint64_t part = 0, block = 0, first = 0;
  TALLY_DEVICE constexpr std::uint64_t operator()(std::uint64_t i) const { return part == 0 ? 0 : i / part * block + first + i % part; }
  static constexpr Cut whole() { return {~std::uint64_t{0}, 0, 0}; }
  /// The channel's part of blocks of so many elements.
  static constexpr Cut of(std::uint64_t block, int channel, int channels) {
    const auto c = static_cast<std::uint64_t>(channel), k = static_cast<std::uint64_t>(channels);
    const std::uint64_t begin = block * c / k;
    return {block * (c + 1) / k - begin, block, begin};
  }
};

/// What a block does: the plan of the same operation on its part, in elements.
struct StepsWork {
  const PlannedStep* steps = nullptr;
  const Dependency* dependencies = nullptr;
  std::uint32_t count = 0;
  std::uint64_t results = 0;      // elements of the output, as the plan counts them
  std::uint64_t* done = nullptr;  // of each step; this block's own memory, as is the scratch
  std::byte* scratch = nullptr;
  Cut cut;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
};

template <class T, bool timed, class F, Block B>
class Interpreter {
 public:
  TALLY_DEVICE Interpreter(B& block, const RankView& view, const StepsWork& work, const F& folder) : block_(block), view_(view), work_(work), folder_(folder), session_(block, view) {}

  TALLY_DEVICE void run() {
    if (session_.is_over()) return session_.end();
    for (auto i = static_cast<std::uint32_t>(block_.thread()); i < work_.count; i += static_cast<std::uint32_t>(block_.threads())) work_.done[i] = 0;
    for (int r = block_.thread(); r < view_.n; r += block_.threads()) {
      Pair& p = pair(r);
      p.looked_to_send = p.looked_to_receive = 0, p.began = p.sent;
    }
    block_.sync();
    std::uint64_t(&move)[3] = block_.shared().move;
    for (;;) {
      if (block_.thread() == 0) choose(move);
      block_.sync();
      const Move now{move[0], move[1], move[2]};
      if (now.step >= gave_up) break;
      perform(now);
      block_.sync();
      if (block_.thread() == 0) complete(now);
    }
    const bool whole = move[0] == over;
    if constexpr (F::finishes)
      if (whole)
        for (auto i = static_cast<std::uint64_t>(block_.thread()); i < work_.results; i += static_cast<std::uint64_t>(block_.threads())) {
          T& result = reinterpret_cast<T*>(work_.output)[work_.cut(i)];
          result = folder_.finish(result);
        }
    session_.end();
  }

 private:
  static constexpr std::uint64_t gave_up = ~std::uint64_t{0} - 1, over = ~std::uint64_t{0};
  static constexpr std::uint64_t longest = std::uint64_t{1} << 16;  // elements of a local step at once, so that others can begin
  struct Move {
    std::uint64_t step, begin, count;  // elements of the step
  };

  TALLY_DEVICE void hear(int peer) { heard_[peer / 64] |= std::uint64_t{1} << peer % 64; }
  TALLY_DEVICE bool has_heard(int peer) const { return (heard_[peer / 64] >> peer % 64 & 1) != 0; }
  TALLY_DEVICE const PlannedStep& step_of(const Move& m) const { return work_.steps[m.step]; }
  TALLY_DEVICE Pair& pair(int peer) const { return *session_.template at<Pair>(view_.me, view_.layout.pair(block_.index(), peer)); }
  TALLY_DEVICE std::uint64_t frame_elements() const { return view_.layout.frame_bytes / sizeof(T); }
  TALLY_DEVICE FrameHeader* frame(std::byte* box, std::uint32_t number) const { return session_.template in_box<FrameHeader>(box, view_.layout.frame(block_.index(), number)); }
  TALLY_DEVICE FrameHeader* next_from(int peer) const { return frame(session_.from(peer), pair(peer).taken); }

  /// The first step that can go on, and how far.
  TALLY_DEVICE void choose(std::uint64_t (&move)[3]) {
    std::uint64_t since = 0;  // it waits
    for (std::uint32_t polls = 0;; ++polls) {
      while (first_open_ < work_.count && work_.done[first_open_] == work_.steps[first_open_].count()) ++first_open_;
      if (first_open_ == work_.count) return void(move[0] = over);
      ++looks_;
      int awaited = -1;
      for (std::uint32_t i = first_open_; i < work_.count; ++i) {
        const PlannedStep& step = work_.steps[i];
        const std::uint64_t begin = work_.done[i];
        if (begin == step.count()) continue;
        std::uint64_t most = longest;
        if (step.peer >= 0) {
          Pair& p = pair(step.peer);
          std::uint32_t& looked = step.verb == Verb::send ? p.looked_to_send : p.looked_to_receive;
          if (looked == looks_) continue;  // a message before it is not through
          looked = looks_;
          if (step.verb == Verb::send) {
            const std::uint32_t consumed = B::load(session_.template in_box<std::uint32_t>(session_.from(step.peer), view_.layout.consumed(block_.index())));
            most = p.sent - consumed < view_.layout.frames ? frame_elements() : 0;
            if (polls == 0 && static_cast<std::int32_t>(consumed - p.began) > 0) hear(step.peer);
          } else {
            const std::uint32_t arrived = B::load(session_.template in_box<std::uint32_t>(session_.from(step.peer), view_.layout.arrived(block_.index())));
            const FrameHeader* const next = next_from(step.peer);
            if (arrived != p.taken && !session_.expect(step.peer, next->fingerprint)) return void(move[0] = gave_up);
            most = arrived != p.taken ? (next->count < frame_elements() ? next->count : frame_elements()) - p.used : 0;
          }
          if (most == 0 && awaited < 0) awaited = step.peer;
        }
        const std::uint64_t limit = ready_units(step, work_.dependencies, [&](std::uint32_t other) { return work_.done[other]; }), count = limit <= begin ? 0 : limit - begin < most ? limit - begin : most;
        if (count == 0) continue;
        if constexpr (timed)
          if (step.peer >= 0) {
            const std::uint64_t waited = polls > 0 ? B::now() - since : 0;
            const bool first = !has_heard(step.peer);
            if (step.verb == Verb::send) session_.made_room(step.peer, waited, first);
            else session_.came(step.peer, *next_from(step.peer), waited, first);
            if (step.verb != Verb::send || waited > 0) hear(step.peer);
          }
        move[0] = i, move[1] = begin, move[2] = count;
        return;
      }
      if constexpr (timed)
        if (polls == 0) since = B::now();
      if (!session_.goes_on(awaited, polls + 1)) return void(move[0] = gave_up);
    }
  }

  /// Element i of a range.
  TALLY_DEVICE T* element(const Range& range, std::uint64_t i) const {
    switch (range.buffer) {
      case Buffer::input: return const_cast<T*>(reinterpret_cast<const T*>(work_.input)) + work_.cut(range.first + i);
      case Buffer::output: return reinterpret_cast<T*>(work_.output) + work_.cut(range.first + i);
      default: return reinterpret_cast<T*>(work_.scratch) + range.first + i;
    }
  }
  TALLY_DEVICE T fold(const PlannedStep& step, const T& acc, const T& other) const { return step.side == Side::right ? folder_.combine(acc, other) : folder_.combine(other, acc); }
  TALLY_DEVICE void perform(const Move& m) {
    const PlannedStep& step = step_of(m);
    T* data = nullptr;  // in the frame
    if (step.verb == Verb::send) {
      FrameHeader* const to = frame(session_.to(step.peer), pair(step.peer).sent);
      if (block_.thread() == 0) *to = session_.header(m.count, static_cast<std::uint32_t>(m.count * sizeof(T)));
      data = reinterpret_cast<T*>(to + 1);
    } else if (step.peer >= 0) {
      data = reinterpret_cast<T*>(next_from(step.peer) + 1) + pair(step.peer).used;
    }
    for (auto i = static_cast<std::uint64_t>(block_.thread()); i < m.count; i += static_cast<std::uint64_t>(block_.threads())) {
      const std::uint64_t at = m.begin + i;
      switch (step.verb) {
        case Verb::send: data[i] = *element(step.from, at); break;
        case Verb::receive: *element(step.to, at) = data[i]; break;
        case Verb::receive_combine: *element(step.to, at) = fold(step, *element(step.from, at), data[i]); break;
        case Verb::copy: *element(step.to, at) = *element(step.from, at); break;
        default: *element(step.to, at) = fold(step, *element(step.to, at), *element(step.from, at)); break;
      }
    }
  }
  /// By one thread, after all have done their part of it.
  TALLY_DEVICE void complete(const Move& m) {
    const PlannedStep& step = step_of(m);
    work_.done[m.step] += m.count;
    if (step.peer < 0) return;
    Pair& p = pair(step.peer);
    if (step.verb == Verb::send) return B::store(session_.template in_box<std::uint32_t>(session_.to(step.peer), view_.layout.arrived(block_.index())), ++p.sent);
    p.used += m.count;
    if (p.used < next_from(step.peer)->count) return;
    p.used = 0;
    B::store(session_.template in_box<std::uint32_t>(session_.to(step.peer), view_.layout.consumed(block_.index())), ++p.taken);
  }

  B& block_;
  const RankView& view_;
  const StepsWork& work_;
  const F& folder_;
  Session<B, timed> session_;
  std::uint32_t first_open_ = 0, looks_ = 0;
  std::uint64_t heard_[most_ranks / 64] = {};  // of whom, in this operation
};

/// The whole operation of one block. Small floats are rounded at each step, as on the host. An operator that scales its input has no
/// algorithms of steps on devices.
template <class T, bool timed, class F, Block B>
TALLY_DEVICE void run_steps(B& block, const RankView& view, const StepsWork& work, const F& folder) {
  static_assert(!F::scales);
  Interpreter<T, timed, F, B>(block, view, work, folder).run();
}

}  // namespace tally::inline v0::device
