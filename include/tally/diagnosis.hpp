// SPDX-License-Identifier: Apache-2.0
// What holds up the operations in flight, in words: which peers they wait for, who is late, and what each rank was last
// seen doing. Only looked at when something is wrong.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "call.hpp"
#include "run.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

template <class T>
class Diagnosis {
 public:
  Diagnosis(T& transport, const Runs& runs) : transport_(transport), runs_(runs), seen_(2 * static_cast<std::size_t>(transport.size())) {}

  Run* waited = nullptr;  // what the caller waits for
  Run* serving = nullptr;       // what the thread works for, or did last

  /// What the caller waits for, or else the oldest operation that is not done.
  Run& awaited() const { return waited && waited->in_flight ? *waited : runs_.first() ? *runs_.first() : *serving; }
  /// Whose troubles an error is about: the one that is waited for, or the oldest.
  const Run& stuck() const { return waited ? *waited : runs_.first() ? *runs_.first() : *serving; }
  /// Transfers that only their peer holds up: the first of their queue, and free to go on.
  template <class F>
  void for_each_needed(F&& f) const {
    std::ranges::fill(seen_, 0);
    for (const Run* run = runs_.first(); run; run = run->after) {
      if (!run->call && run->transfer.pending) f(run->transfer);
      if (!run->call && run->both && run->other_transfer.pending) f(run->other_transfer);
      if (!run->active) continue;
      for (const Transfer& t : run->active->transfers) {
        char& queue = seen_[2 * static_cast<std::size_t>(std::max(t.peer, 0)) + (t.is_send ? 1 : 0)];
        if (!t.pending || queue) continue;
        queue = 1;
        if (t.bytes == 0 || t.ready > t.done) f(t);
      }
    }
  }
  Rank first_missing() const {
    Rank first = -1;
    for_each_needed([&](const Transfer& t) {
      if (first < 0) first = t.peer;
    });
    return first;
  }
  /// Ranks do not see each other's memory: what another one is in is known as far as it said so, and what it said arrived.
  static constexpr bool by_hearsay = requires(const T& t, Rank r) { t.status_at(r, std::uint64_t{}); };
  /// Who is needed and is gone; -1 if nobody. One that died comes before those that left, maybe for that reason.
  [[gnu::cold]] Rank first_lost() const {
    Rank left = -1, dead = -1;
    for_each_needed([&](const Transfer& t) {
      const Liveness state = transport_.liveness(t.peer);
      if (state == Liveness::dead && dead < 0) dead = t.peer;
      if (state == Liveness::left && left < 0) left = t.peer;
    });
    return dead >= 0 ? dead : left;
  }
  /// Who has not called the operation yet and is waited for, directly or through others; -1 if nobody.
  [[gnu::cold]] Rank late_rank() const {
    const Run& run = stuck();
    if (!run.call || !run.in_flight) return -1;
    const auto absent = [&](Rank r) {
      const RankStatus status = transport_.status(r);
      return !status.left && status.sequence < run.sequence;
    };
    const Rank direct = first_missing();
    if (direct < 0 || absent(direct)) return direct;
    if (has_root(run.call->layout.operation) || sizes_differ(run.call->layout.operation)) return -1;  // not everyone matters to everyone
    for (Rank r = 0; r < transport_.size(); ++r)
      if (r != transport_.rank() && absent(r)) return r;
    return -1;
  }
  [[gnu::cold]] std::string missing() const {
    std::string from, room;
    for_each_needed([&](const Transfer& t) {
      std::string& list = t.is_send ? room : from;
      list += detail::concat({list.empty() ? "rank " : ", rank ", t.peer});
    });
    return detail::concat({"rank ", transport_.rank(), " in ", describe(stuck()), from.empty() ? "" : " waits for data from ", from,
                           room.empty() ? "" : from.empty() ? " waits for room at " : " and for room at ", room});
  }
  [[gnu::cold]] std::string describe_step(const Run& run, std::uint32_t i) const { return detail::concat({"step ", i, " of ", describe(run)}); }
  [[gnu::cold]] std::string last_seen() const {
    std::string text = by_hearsay ? "last heard:" : "last seen:";
    for (Rank r = 0; r < transport_.size(); ++r) {
      const RankStatus s = transport_.status(r);
      text += detail::concat({r ? "; rank " : " rank ", r});
      if (const Rank origin = transport_.origin(r); origin != r) text += detail::concat({" (", origin, " of the job)"});
      const bool silent = by_hearsay && s.sequence == 0 && r != transport_.rank();  // it may have called what it had no reason to speak of
      if (s.left) text += silent ? std::string(" left") : detail::concat({" left after #", s.sequence});
      else if (s.inside == RankStatus::inside_message) text += detail::concat({" in ", detail::describe(s.fingerprint, s.count), s.sequence ? detail::concat({" after #", s.sequence}) : ""});
      else if (s.sequence == 0) text += silent ? " has said nothing" : " has called nothing";
      else text += detail::concat({s.inside ? " in " : " after ", detail::describe(s.fingerprint, s.count), " #", s.sequence});
    }
    return text;
  }

  [[gnu::cold]] std::string describe(const Run& run) const {
    if (run.call) return detail::concat({detail::describe(run.fingerprint, run.count), " #", run.sequence});
    const Message& m = run.message;
    return detail::concat({run.both ? "send_receive(" : m.is_send ? "send(" : "receive(", name_of(m.type), " x ", m.bytes / std::max<std::size_t>(m.grain, 1), m.is_send ? " to rank " : " from rank ", m.peer, ", tag ", m.tag < 0 ? detail::Piece("any") : detail::Piece(m.tag), ")"});
  }

  /// What one operation writes, no other one in flight may read or write.
  [[gnu::noinline]] void refuse_overlaps(const Call& call) const {
    refuse_overlaps(Buffers(call), name_of(call.layout.operation));
    for (const Part& part : call.scattered) refuse_overlaps(Buffers(part, call.grain), name_of(call.layout.operation));
  }
  [[gnu::noinline]] void refuse_overlaps(const Message& m) const { refuse_overlaps(Buffers(m), m.is_send ? "send" : "receive"); }
  [[gnu::noinline]] void refuse_overlaps(const Buffers& buffers, std::string_view what) const {
    if (!runs_.first() || !buffers.clashes(runs_.hull())) return;
    for (const Run* run = runs_.first(); run; run = run->after)
      if (buffers.clashes(Buffers(*run))) throw Error(Errc::invalid_argument, {what, " of ", std::max(buffers.in.size(), buffers.out.size()), " bytes overlaps in memory with ", describe(*run), ", which is still in flight: wait for that first"});
  }

  /// In a handler: what was thrown, as an error of this rank in that operation. `found`: by the engine or the transport, not by an operator.
  [[gnu::cold]] Error error_of(const Run& run, bool& found) const {
    std::string what;
    try {
      throw;
    } catch (const TransportError& error) {
      found = true;
      return error;
    } catch (const Error& error) {
      if (found) return error;
      what = detail::concat({": ", error.text()});
    } catch (const std::exception& error) {
      what = detail::concat({": ", error.what()});
    } catch (...) {
    }
    return {Errc::aborted, detail::concat({"rank ", transport_.rank(), ": exception during ", describe(run), what}), ErrorContext{transport_.rank(), transport_.rank(), run.sequence, {}}};
  }
  /// f(run, rank, fingerprint) for ranks that are seen in another call than this one under the same number.
  template <class F>
  void for_each_other_call(F&& f) const {
    for (Rank r = 0; r < transport_.size(); ++r) {
      const RankStatus status = transport_.status(r);
      for (const Run* run = runs_.first(); run && r != transport_.rank() && status.inside == RankStatus::inside_operation; run = run->after)
        if (run->call && status.sequence == run->sequence && status.fingerprint != run->fingerprint) f(*run, r, status.fingerprint);
    }
  }
  /// To tell later what this rank called.
  void remember(std::uint64_t sequence, std::uint64_t fingerprint, std::uint64_t count) { called_[sequence % std::size(called_)] = {sequence, fingerprint, count}; }
  [[gnu::cold]] std::string mismatch(const Run& run, Rank peer, std::uint64_t theirs) const {
    return detail::concat({"operation #", run.sequence, ": rank ", transport_.rank(), " called ", detail::describe(run.fingerprint, run.count), ", rank ", peer, " called ", detail::describe(theirs, count_of(peer, run.sequence))});
  }
  /// Rank `peer` sends for an operation that is `ahead` of the one that expects data.
  [[gnu::cold]] std::string out_of_step(const Run& run, Rank peer, const FrameInfo& frame, std::int32_t ahead) const {
    const std::string theirs = frame.has_fingerprint ? detail::concat({detail::describe(frame.fingerprint, count_of(peer, run.sequence)), " "}) : "operation ";
    const Called& ours = called_[frame.operation % std::size(called_)];
    const bool known = ours.fingerprint != 0 && static_cast<std::uint32_t>(ours.sequence) == frame.operation;
    return detail::concat({"rank ", transport_.rank(), " in ", describe(run), " expects data from rank ", peer, ", which ", ahead > 0 ? "has sent none for it and went on to " : "has sent some that was not read in ", theirs, "#", frame.operation,
                           known ? detail::concat({", where rank ", transport_.rank(), " called ", detail::describe(ours.fingerprint, ours.count)}) : ""});
  }

 private:
  /// How many elements the peer says it called with; where ranks do not see each other's memory it may take a moment to.
  [[gnu::cold]] std::uint64_t count_of(Rank peer, std::uint64_t sequence) const {
    if constexpr (by_hearsay) return transport_.status_at(peer, sequence).count;
    else return transport_.status(peer).count;
  }
  struct Called {
    std::uint64_t sequence = 0, fingerprint = 0, count = 0;
  };
  T& transport_;
  const Runs& runs_;
  mutable std::vector<char> seen_;  // queues of transfers; kept, as who is needed is asked time and again in a long wait
  Called called_[8];
};

}  // namespace tally::inline v0
