// SPDX-License-Identifier: Apache-2.0
// Messages with tags: how they become transfers, whether a receive can take one, and those that came before anybody waited
// for them: they are taken in, so that the ones behind them can be received.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.hpp"
#include "run.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

/// `Engine` posts transfers, completes runs and raises errors.
template <class Engine>
class Mailbox {
 public:
  explicit Mailbox(Engine& engine) : engine_(engine) {}

  /// A message is sent, or to be received. False: it is settled here, no transfer is needed.
  bool post(Run& run, const Lateness& arrival) {
    const Message& m = run.message;
    if (Run* known = m.is_send ? nullptr : find(m)) {
      known->receiver = &run;
      if (!known->transfer.pending) deliver(*known);
      return false;
    }
    aim(run, arrival);
    if (m.peer != engine_.rank()) return true;
    if (m.is_send) send_to_self(run);
    return false;  // a receive will be found by its send
  }
  /// A rank that is to wait for a message from itself must have sent it.
  void expect_known(const Message& receive) const {
    if (!find(receive)) throw Error(Errc::invalid_argument, {"rank ", engine_.rank(), " would wait for a message from itself for ever: send it first"});
  }
  /// The send of a send_receive, to another rank.
  void aim_other(Run& run, const Lateness& arrival) { aim(run.other_transfer, run.other, run, arrival); }

  /// Where to put a message that no receive waits for. Its account is nobody's.
  Transfer* take_in(Rank peer, const FrameInfo& frame) {
    Run& waiting = *engine_.runs().first();
    if (frame.total > most_unexpected - std::min(most_unexpected, bytes_))
      engine_.raise(Errc::no_resources, waiting, peer, {"rank ", peer, " has sent rank ", engine_.rank(), " more than ", most_unexpected, " bytes of messages that it does not receive; rank ", engine_.rank(), " is in ", engine_.describe(waiting)});
    Run& run = keep(frame.total);
    run.message = {false, peer, static_cast<std::int32_t>(frame.fingerprint), run.buffer.data(), frame.total, static_cast<ElementType>(frame.operation >> 16), static_cast<std::uint16_t>(frame.operation), {}};
    aim(run, {});
    run.account.watch.start(waiting.account.watch.mark());
    return &run.transfer;
  }
  /// A message that was taken in is all here.
  void arrived(Run& run) {
    if (run.receiver) deliver(run);
  }

  /// Where it is booked: as a rule with the last one.
  LedgerRow& row(Ledger& ledger, Collective what, std::uint64_t bytes) {
    LedgerRow*& known = rows_[static_cast<std::size_t>(what) - static_cast<std::size_t>(Collective::send)];
    if (!known || known->size_class != Ledger::size_class(bytes)) known = &ledger.row(what, bytes, "message");
    return *known;
  }

  void check(const Run& run, const FrameInfo& frame) {
    if (frame.first) check(const_cast<Run&>(run), static_cast<std::int32_t>(frame.fingerprint), frame.operation, frame.total);
  }
  void clear() {
    for (Run* run : unexpected_) {
      engine_.withdraw(*run);
      engine_.runs().free(*run);
    }
    unexpected_.clear();
    bytes_ = 0;
  }

 private:
  static constexpr std::size_t most_unexpected = std::size_t{1} << 30;

  /// One that nobody has received yet, and that this receive matches.
  Run* find(const Message& m) const {
    for (Run* const r : unexpected_)
      if (!r->receiver && r->message.peer == m.peer && (m.tag < 0 || r->message.tag == m.tag)) return r;
    return nullptr;
  }
  static std::uint32_t type_of(const Message& m) { return static_cast<std::uint32_t>(m.type) << 16 | m.grain; }
  /// The transfer of a message. Its type travels where collectives have the operation's number.
  void aim(Run& run, const Lateness& arrival) {
    aim(run.transfer, run.message, run, arrival);
    run.call = nullptr;
    run.active = nullptr;
    run.receiver = nullptr;
  }
  static void aim(Transfer& t, const Message& m, Run& run, const Lateness& arrival) {
    t = Transfer{};
    t.from = m.is_send ? m.data : nullptr;
    t.to = m.is_send ? nullptr : m.data;
    t.bytes = t.ready = m.bytes;
    t.fingerprint = detail::Fingerprint::of_tag(m.tag);
    t.operation = type_of(m);
    t.peer = m.peer;
    t.lane = Engine::message_lane;
    t.is_send = m.is_send;
    t.matching = m.tag < 0 ? Matching::any : Matching::fingerprint;
    t.inherited = t.late = arrival;
    t.owner = &run;
  }
  /// Whether a receive can take the message; it may be shorter.
  void check(Run& run, int tag, std::uint32_t type, std::size_t bytes) {
    Message& m = run.message;
    const std::size_t grain = std::max<std::size_t>(type & 0xffff, 1);
    if (type != type_of(m) || bytes > m.bytes)
      engine_.raise(Errc::mismatch, run, m.peer, {"rank ", m.peer, " sends rank ", engine_.rank(), " a message of ", name_of(static_cast<ElementType>(type >> 16)), " x ", bytes / grain, " with tag ", tag, ", which does not fit into ", engine_.describe(run)});
    m.bytes = bytes;
    m.tag = tag;
    run.transfer.bytes = run.transfer.ready = bytes;
  }
  Run& keep(std::size_t bytes) {
    Run& run = engine_.runs().take();
    run.background = run.both = false;
    run.remaining = 1;
    run.buffer.resize(bytes);
    bytes_ += bytes;
    unexpected_.push_back(&run);
    return run;
  }
  void send_to_self(Run& run) {
    const Message& m = run.message;
    Run* receive = nullptr;
    for (Run* r = engine_.runs().first(); r && !receive; r = r->after)
      if (!r->call && !r->message.is_send && r->message.peer == engine_.rank() && r->remaining > 0 && (r->message.tag < 0 || r->message.tag == m.tag)) receive = r;
    Run& copy = keep(m.bytes);
    if (m.bytes > 0) std::memcpy(copy.buffer.data(), m.data, m.bytes);
    copy.message = m;
    copy.message.is_send = false;
    copy.message.data = copy.buffer.data();
    aim(copy, {});
    copy.receiver = receive;
    engine_.end_transfer(run);
    if (receive) deliver(copy);
  }
  /// A message that was taken in is here, and so is its receiver.
  void deliver(Run& message) {
    Run& run = *message.receiver;
    const Message& m = message.message;
    check(run, m.tag, type_of(m), m.bytes);
    if (m.bytes > 0) std::memcpy(run.message.data, m.data, m.bytes);
    run.received += m.bytes;
    std::erase(unexpected_, &message);
    bytes_ -= m.bytes;
    message.buffer = {};
    message.receiver = nullptr;
    engine_.runs().free(message);
    engine_.end_transfer(run);
  }

  Engine& engine_;
  LedgerRow* rows_[3] = {};  // of send, receive and send_receive
  std::vector<Run*> unexpected_;
  std::size_t bytes_ = 0;
};

}  // namespace tally::inline v0
