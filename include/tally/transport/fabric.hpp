// SPDX-License-Identifier: Apache-2.0
// A transport over what carries messages (a fabric: UCX, RDMA verbs, MPI): frames have numbers, and each direction of each lane between
// two ranks has a window. Short payloads go with their header. Long ones stay where they are until the receiver has a place for them,
// and are fetched straight into it; where that place is not free yet, into a buffer, so that two ranks that exchange what they
// overwrite do not wait for each other.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "concept.hpp"
#include "networked.hpp"
#include "queue.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct FabricOptions {
  int lanes = 2;                                     // one for collectives, one for messages
  std::size_t window = std::size_t{8} << 20;         // bytes that a receiver has not taken yet, at most
  std::size_t frame_bytes = std::size_t{2} << 20;    // of a frame's payload, at most
  std::size_t at_once = std::size_t{64} << 10;       // a payload of so much goes with its header, at most; a fabric may have less

  std::string text() const { return detail::concat({lanes, " ", window, " ", frame_bytes, " ", at_once}); }
};

/// Whom a fabric connects: the job's ranks that its ranks are, and whether they are on other hosts than this one.
struct FabricMembers {
  Rank me = 0;  // the place of this one
  std::vector<Rank> ranks;
  std::vector<bool> elsewhere;
};

namespace detail {

/// What goes before each payload, and alone where that is fetched.
struct FabricHeader {
  FrameHeader frame;
  std::uint64_t key = 0;     // of the communicator in its job; what says another one is a stranger's
  std::uint64_t number = 0;  // of the channel's frames, from 0 on; credits have none
  std::int32_t from = -1;
  std::uint16_t lane = 0;
  std::uint16_t fetched = 0;  // the payload is not here
};
static_assert(sizeof(FabricHeader) == 80);

/// What moves messages. Nothing of it blocks, and but for calls that name a limit nothing waits. Errors of a way to a peer are told by
/// error(); a message that had no room is not sent.
template <class F>
concept Fabric = requires(F& f, const F& c, Rank peer, typename F::Flight& flight, typename F::Held& held, const FabricHeader& header, const std::byte* from, std::byte* to, std::size_t bytes, std::string_view address, nanoseconds limit) {
  { F::name } -> std::convertible_to<std::string_view>;
  { c.address() } -> std::same_as<std::string>;       // empty: ranks know where the others are
  { c.knows(peer) } -> std::same_as<bool>;
  f.meet(peer, address);
  { f.reaches(peer) } -> std::same_as<bool>;          // the way stands, which may need the peer to look after it once
  { c.most_at_once() } -> std::same_as<std::size_t>;  // bytes of a payload that goes with its header
  { f.send(peer, header, from, bytes, flight) } -> std::same_as<bool>;  // payload and header stay until the flight is over; false: no room
  { f.is_over(flight) } -> std::same_as<bool>;        // what failed is never over
  { f.touches(flight) } -> std::same_as<bool>;        // it may still read or write memory
  f.drop(flight);                                     // nobody asks after it any more
  f.give_up(peer);                                    // the way to it: what is under way fails soon
  f.fetch(peer, held, to, bytes, flight);
  f.give_back(held);                                  // payload that was not fetched, or is no longer read
  f.progress();
  { f.inbox() } -> std::same_as<std::deque<typename F::Message>&>;  // what came: {header, held, data (null if it is to be fetched), bytes}
  { c.error(peer) } -> std::same_as<const char*>;     // null: none
  { c.event() } -> std::same_as<int>;                 // a descriptor that is readable when there may be progress, once arm() was true
  { f.arm() } -> std::same_as<bool>;                  // false: there is something to do
  f.flush(limit);                                     // what was sent is on its way
};

}  // namespace detail

template <detail::Fabric F>
class FabricTransport : public NetworkedTransport {
 public:
  /// A communicator's fabric.
  using Make = std::function<std::unique_ptr<F>(const FabricMembers& members)>;

  FabricTransport(std::shared_ptr<detail::NetworkNode> node, std::uint64_t communicator, std::vector<Rank> members, const FabricOptions& options, Make make)
      : NetworkedTransport(std::move(node), communicator, std::move(members)), options_(options), make_(std::move(make)), fabric_(make_(who())), frame_bytes_(std::max<std::size_t>(options.frame_bytes, 64)),
        window_(std::max(options.window, frame_bytes_ + detail::frame_cost)), at_once_(std::min({options.at_once, fabric_->most_at_once(), frame_bytes_})), outs_(static_cast<std::size_t>(options.lanes * size())), ins_(outs_.size()), peers_(static_cast<std::size_t>(size())) {
    std::memcpy(&key_, node_->key().data(), sizeof key_);
    key_ ^= communicator * 0x9e3779b97f4a7c15u;
    sending_.reserve(outs_.size());
    receiving_.reserve(ins_.size());
    for (int lane = 0; lane < lanes(); ++lane)
      for (Rank r = 0; r < size(); ++r) {
        const auto i = index(lane, r);
        outs_[i].peer = ins_[i].peer = r;
        outs_[i].lane = ins_[i].lane = lane;
        outs_[i].elsewhere = ins_[i].elsewhere = node_->is_elsewhere(origin(r));
      }
    if (const std::string address = fabric_->address(); !address.empty() && size() > 1) node_->offer(*group_, address);
  }
  ~FabricTransport() {
    if (::getpid() != process_) {  // a child that this rank forked: it never was a rank
      (void)fabric_.release();
      return;
    }
    fabric_->flush(std::chrono::seconds(1));
    for (Out& out : outs_)
      for (; out.ended != out.begun; ++out.ended) fabric_->drop(flight(out, out.ended).flight);
    for (In& in : ins_) {
      if (in.fetching) fabric_->drop(in.flight);
      if (in.crediting) fabric_->drop(in.credit.flight);
      for (Message& frame : in.frames) fabric_->give_back(frame.held);
      for (auto& [number, frame] : in.early) fabric_->give_back(frame.held);
    }
  }

  int lanes() const { return options_.lanes; }
  std::size_t frame_bytes() const { return frame_bytes_; }
  std::string_view name() const { return F::name; }

  template <Probe P>
  void post(Transfer& t, P& probe) {
    if (!t.is_send) {
      In& in = ins_[index(t.lane, t.peer)];
      if (in.receives.push(t)) receiving_.push_back(&in);
      return;
    }
    Out& out = outs_[index(t.lane, t.peer)];
    const bool is_first = out.sends.push(t);
    if (!out.next) out.next = &t, out.next_from = 0;
    if (!is_first) return;
    sending_.push_back(&out);
    advance_send(out, probe);
    if (!out.sends.head) std::erase(sending_, &out);
  }
  void cancel(Transfer& t) {
    if (!t.pending) return;
    if (t.is_send) {
      Out& out = outs_[index(t.lane, t.peer)];
      if (reads(out, t)) abandon(t.peer);  // what was announced cannot be taken back but with the way to the peer
      if (out.next == &t) out.next = t.next, out.next_from = 0;
      out.sends.remove(t);
      if (!out.sends.head) std::erase(sending_, &out);
    } else {
      In& in = ins_[index(t.lane, t.peer)];
      if (in.receives.head == &t && in.seen) {
        if (in.fetching && in.in_place) abandon(t.peer);
        in.ended = true;  // the rest of its frame would be taken for another one's
      }
      in.receives.remove(t);
      if (!in.receives.head) std::erase(receiving_, &in);
    }
  }

  template <Probe P>
  bool poll(P& probe) {
    look();
    bool moved = false;
    for (std::size_t i = 0; i < sending_.size();) {
      Out& out = *sending_[i];
      if (advance_send(out, probe)) moved = true;
      if (!out.sends.head) drop(sending_, i);
      else ++i;
    }
    for (std::size_t i = 0; i < receiving_.size();) {
      In& in = *receiving_[i];
      if (advance_receive(in, probe)) moved = true;
      if (!in.receives.head) drop(receiving_, i);
      else ++i;
    }
    return moved;
  }
  void flush() {}
  bool idle() const { return sending_.empty() && receiving_.empty(); }

  Liveness liveness(Rank r) {
    if (r == me_) return Liveness::alive;
    inquire();
    look();
    const detail::Told told = node_->told(*group_, r);
    Peer& peer = peers_[static_cast<std::size_t>(r)];
    const bool broken = fabric_->error(r) != nullptr;
    if (told.left && (told.opened == peer.came || broken)) return Liveness::left;  // else what it sent is still on its way
    if (node_->is_dead(origin(r))) return Liveness::dead;
    if (!broken) return Liveness::alive;
    const auto now = std::chrono::steady_clock::now();
    if (peer.broken_since == std::chrono::steady_clock::time_point{}) peer.broken_since = now;
    if (node_->registry_is_gone()) return Liveness::dead;
    if (now - peer.broken_since > std::chrono::seconds(1))
      throw TransportError(Errc::peer_lost, {"the way between rank ", me_, " and rank ", r, " (", address_of(r), ") broke, though that rank is still there: ", F::name, " says: ", fabric_->error(r)}, {me_, r, status_.sequence, {}});
    return Liveness::alive;
  }

  void abort(const AbortNotice& notice) {
    node_->abort(*group_, notice);
    interrupt();
  }
  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    // Armed first: what came before that is found by the recheck, what comes later ends the sleep.
    if (!fabric_->arm()) return (void)recheck();
    if (!recheck()) sleep_armed(limit, -1);
  }
  void sleep(nanoseconds limit, int other = -1) {
    if (fabric_->arm()) sleep_armed(limit, other);
  }
  void interrupt() { group_->ring(); }

  std::unique_ptr<FabricTransport> open(std::uint64_t token, std::span<const Rank> members) { return std::make_unique<FabricTransport>(node_, token, origins_of(members), options_, make_); }

  void leave() {
    if (::getpid() != process_) return;
    std::vector<detail::Opened> sent;
    for (Rank r = 0; r < size(); ++r)
      if (const Peer& peer = peers_[static_cast<std::size_t>(r)]; peer.went > 0) sent.push_back({origin(r), peer.went});
    node_->leave(*group_, sent);
  }

 private:
  using Message = typename F::Message;
  using Flight = typename F::Flight;
  static constexpr std::size_t most_flights = 32, most_early = 4096;

  /// A frame that the fabric still reads, or that its receiver has not fetched yet.
  struct Sent {
    Flight flight;
    detail::FabricHeader header;
    Transfer* transfer = nullptr;
    std::size_t bytes = 0;
    std::uint64_t fetched_at = 0;  // of a payload that is fetched: what its receiver will say then that it has consumed; else 0
    bool over = false;
  };
  /// What this rank sends to a peer on a lane.
  struct Out {
    Rank peer = -1;
    int lane = 0;
    TransferQueue sends;
    Transfer* next = nullptr;   // the first that is not wholly on its way
    std::size_t next_from = 0;  // of it: so much is
    std::unique_ptr<std::array<Sent, most_flights>> flights;
    std::uint64_t begun = 0, ended = 0;    // flights
    std::uint64_t sent = 0, consumed = 0;  // in bytes of window, since the beginning
    std::uint64_t asked = 0;               // up to where the peer was asked to say that it is consumed
    FrameTimes credit;                     // of the last credit
    std::uint64_t number = 0;
    std::uint32_t operation = 0;  // of the last frame sent
    bool elsewhere = false, any = false;
    bool starved = false, full = false, unfetched = false;  // why it waits: no room at the peer; none in the fabric; the peer is to fetch
  };
  /// What this rank receives from a peer on a lane.
  struct In {
    Rank peer = -1;
    int lane = 0;
    TransferQueue receives;
    std::deque<Message> frames;
    std::map<std::uint64_t, Message> early;  // came before those that come before them
    std::uint64_t number = 0;                // of the next to come
    std::uint64_t held = 0, consumed = 0;    // in bytes of window, since the beginning
    std::size_t begin = 0, taken = 0;        // of the frame: the message's bytes before it, and its own that are consumed
    std::vector<std::byte> buffer;           // of a frame that has no place yet, or is folded
    Flight flight;
    Sent credit;
    bool fetching = false, in_place = false, fetched = false, seen = false, ended = false, elsewhere = false;
    bool owes = false, crediting = false;  // a credit; one is on its way
  };
  struct Peer {
    bool wanted = false;
    std::uint32_t went = 0, came = 0;  // data frames
    std::chrono::steady_clock::time_point broken_since{};
  };

  std::size_t index(int lane, Rank r) const { return static_cast<std::size_t>(lane * size() + r); }
  template <class E>
  static void drop(std::vector<E*>& list, std::size_t i) {
    list[i] = list.back();
    list.pop_back();
  }
  void sleep_armed(nanoseconds limit, int other) {
    const timespec time{static_cast<time_t>(limit.count() / 1'000'000'000), static_cast<long>(limit.count() % 1'000'000'000)};
    std::array<pollfd, 4> all{{{fabric_->event(), POLLIN, 0}, {group_->bell(), POLLIN, 0}, {node_->door(), POLLIN, 0}, {other, POLLIN, 0}}};
    if (::ppoll(all.data(), all.size(), &time, nullptr) > 0) {
      if (all[1].revents) group_->answer();
      if (all[2].revents) node_->attend();
    }
    hear();
  }
  FabricMembers who() const {
    FabricMembers members{me_, group_->members, {}};
    for (const Rank r : members.ranks) members.elsewhere.push_back(node_->is_elsewhere(r));
    return members;
  }
  static Sent& flight(Out& out, std::uint64_t i) { return (*out.flights)[i % most_flights]; }
  static bool reads(Out& out, const Transfer& t) {
    for (std::uint64_t i = out.ended; i < out.begun; ++i)
      if (flight(out, i).transfer == &t) return true;
    return false;
  }
  /// Nothing goes to this peer any more, or comes from it.
  void abandon(Rank r) {
    fabric_->give_up(r);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    const auto settle = [&](Flight& flight) {
      while (fabric_->touches(flight)) {
        fabric_->progress();
        if (std::chrono::steady_clock::now() > deadline) throw TransportError(Errc::peer_lost, {F::name, " does not let go of memory that was being sent to rank ", r, " or received from it"}, {me_, r, status_.sequence, {}});
      }
    };
    for (int lane = 0; lane < lanes(); ++lane) {
      Out& out = outs_[index(lane, r)];
      In& in = ins_[index(lane, r)];
      for (; out.ended != out.begun; ++out.ended) settle(flight(out, out.ended).flight);
      if (std::exchange(in.fetching, false)) settle(in.flight);
      in.ended = true;
    }
  }

  /// Takes what came: credits at once, frames into their channel, in their order.
  void look() {
    fabric_->progress();
    auto& inbox = fabric_->inbox();
    for (; !inbox.empty(); inbox.pop_front()) {
      Message& message = inbox.front();
      if (!take(message)) fabric_->give_back(message.held);
    }
  }
  /// False if its payload is not needed.
  bool take(Message& message) {
    const detail::FabricHeader& h = message.header;
    if (h.key != key_ || h.from < 0 || h.from >= size() || h.from == me_ || h.lane >= lanes()) return false;  // a stranger's, or for another one that was here before
    if (std::string fault = detail::fault_of(h.frame, h.frame.kind != detail::FrameHeader::credit, frame_bytes_); !fault.empty()) malformed(h.from, fault);
    if (h.frame.kind == detail::FrameHeader::credit) {
      Out& out = outs_[index(h.lane, h.from)];
      if (h.frame.total > out.sent) malformed(h.from, detail::concat({"a credit for ", h.frame.total, " bytes, of ", out.sent, " that were sent"}));
      if (h.frame.total < out.consumed) return false;  // a later one came first
      out.consumed = h.frame.total;
      out.asked = std::max(out.asked, out.consumed);
      out.credit = from_wire(out.elsewhere, h.frame.times());
      return false;
    }
    In& in = ins_[index(h.lane, h.from)];
    Peer& peer = peers_[static_cast<std::size_t>(h.from)];
    const bool is_data = h.frame.kind == detail::FrameHeader::data;
    if (is_data && (h.fetched ? message.data != nullptr : message.bytes != h.frame.bytes)) malformed(h.from, detail::concat({message.bytes, " bytes where it announced ", h.frame.bytes}));
    in.held += is_data ? detail::frame_cost + h.frame.bytes : 0;
    if (in.held - in.consumed > window_ || h.number - in.number > most_early) malformed(h.from, "more than there is room for");
    peer.came += is_data;
    if (in.ended) return false;
    if (h.number != in.number) return in.early.emplace(h.number, message).second;
    in.frames.push_back(message);
    ++in.number;
    for (auto next = in.early.begin(); next != in.early.end() && next->first == in.number; next = in.early.erase(next), ++in.number) in.frames.push_back(next->second);
    return true;
  }

  /// Whether there is a way to the peer, once it is known where that is.
  bool reaches(Rank r) {
    if (fabric_->error(r)) return false;
    if (fabric_->knows(r)) return fabric_->reaches(r);
    Peer& peer = peers_[static_cast<std::size_t>(r)];
    if (!std::exchange(peer.wanted, true)) node_->want(*group_, r);
    const std::string address = node_->offered(*group_, r);
    if (!address.empty()) {
      fabric_->meet(r, address);
      return fabric_->reaches(r);
    }
    if (node_->registry_is_gone()) throw TransportError(Errc::peer_lost, {"rank ", me_, " cannot reach rank ", r, ": rank 0, which knew where it is, is gone"}, {me_, 0, status_.sequence, {}});
    return false;
  }
  detail::FabricHeader header(detail::FrameHeader::Kind kind, int lane) const {
    detail::FabricHeader h;
    h.frame.kind = kind;
    h.key = key_;
    h.from = me_;
    h.lane = static_cast<std::uint16_t>(lane);
    return h;
  }

  // Sending.

  template <Probe P>
  bool advance_send(Out& out, P& probe) {
    bool moved = false;
    if (out.begun != out.ended) moved = complete(out, probe);
    for (int frames = 0; frames < 16 && out.next; ++frames)
      if (!begin_frame(out, probe, moved)) break;
    return moved;
  }
  /// In order, those that are over and fetched.
  template <Probe P>
  bool complete(Out& out, P& probe) {
    bool any = false;
    while (out.ended != out.begun) {
      Sent& first = flight(out, out.ended);
      if (!first.over && !(first.over = fabric_->is_over(first.flight))) {
        out.full = true;
        break;
      }
      if (first.fetched_at > out.consumed) {
        out.unfetched = true;
        break;
      }
      ++out.ended;
      Transfer* const t = first.transfer;
      if (!t) continue;
      if (std::exchange(out.unfetched, false)) probe.fetched(*t, out.credit);
      else if (std::exchange(out.full, false)) probe.drained(*t);
      t->done += first.bytes;
      counters_.bytes_sent += first.bytes;
      if (t->done == t->bytes) out.sends.pop();
      probe.moved(*t);
      any = true;
    }
    return any;
  }
  /// Puts the next frame on its way. False if there is none, or no room for it.
  template <Probe P>
  bool begin_frame(Out& out, P& probe, bool& moved) {
    Transfer& t = *out.next;
    if (out.next_from == t.ready && t.bytes != 0) return false;
    if (!reaches(out.peer)) return out.full = true, false;
    if (!out.flights) out.flights = std::make_unique<std::array<Sent, most_flights>>();
    if (out.begun - out.ended == most_flights) return out.full = true, false;
    const std::uint64_t room = window_ - std::min<std::uint64_t>(out.sent - out.consumed, window_);
    const std::size_t wanted = std::min<std::size_t>(t.ready - out.next_from, frame_bytes_), least = t.bytes == 0 ? 0 : t.grain;
    if (room < detail::frame_cost + least || (out.starved && room < detail::frame_cost + wanted)) {
      if (out.asked == out.consumed) ask(out);
      out.starved = true;
      return false;
    }
    if (std::exchange(out.starved, false)) probe.credited(t, out.credit);
    const std::size_t most = static_cast<std::size_t>(std::min<std::uint64_t>(wanted, room - detail::frame_cost)), bytes = most - most % t.grain;
    Sent& sent = flight(out, out.begun);
    detail::FabricHeader& h = sent.header = header(detail::FrameHeader::data, out.lane);
    h.number = out.number;
    h.fetched = bytes > at_once_;
    h.frame.bytes = static_cast<std::uint32_t>(bytes);
    h.frame.total = t.bytes;
    h.frame.operation = t.operation;
    if (out.next_from == 0) h.frame.flags |= detail::FrameHeader::first;
    if (out.next_from + bytes == t.bytes) h.frame.flags |= detail::FrameHeader::last;
    if (out.operation != t.operation || !out.any || t.matching != Matching::order) {
      h.frame.fingerprint = t.fingerprint;
      h.frame.flags |= detail::FrameHeader::fingerprinted;
    }
    const std::uint64_t end = out.sent + detail::frame_cost + bytes, said = std::max(out.asked, out.consumed);
    const std::uint64_t rest = t.bytes - out.next_from - bytes, granted = window_ - (end - said);
    if (h.fetched || (rest > granted && end - said >= window_ / 4)) h.frame.flags |= detail::FrameHeader::asks;
    h.frame.stamp(to_wire(out.elsewhere, probe.stamp(t)));
    if (bytes > short_bytes && !h.fetched) probe.copying(t);
    sent.flight = {};
    if (!fabric_->send(out.peer, h, t.from + out.next_from, bytes, sent.flight)) return out.full = true, false;
    if (std::exchange(out.full, false)) probe.drained(t);
    out.any = true;
    out.operation = t.operation;
    out.sent = end;
    ++out.number;
    if (h.frame.flags & detail::FrameHeader::asks) out.asked = end;
    sent.transfer = &t;
    sent.bytes = bytes;
    sent.fetched_at = h.fetched ? end : 0;
    sent.over = false;
    ++out.begun;
    ++peers_[static_cast<std::size_t>(out.peer)].went;
    ++counters_.frames_sent;
    counters_.messages_sent += out.next_from == 0;
    counters_.overhead_sent += sizeof h;
    out.next_from += bytes;
    if (out.next_from == t.bytes) out.next = t.next, out.next_from = 0;
    moved = complete(out, probe) || moved;
    return true;
  }
  void ask(Out& out) {
    if (out.begun - out.ended == most_flights) return;
    Sent& sent = flight(out, out.begun);
    sent.header = header(detail::FrameHeader::ask, out.lane);
    sent.header.number = out.number;
    sent.flight = {};
    if (!fabric_->send(out.peer, sent.header, nullptr, 0, sent.flight)) return;
    out.asked = out.sent;
    ++out.number;
    sent.transfer = nullptr;
    sent.bytes = sent.fetched_at = 0;
    sent.over = false;
    ++out.begun;
  }

  // Receiving.

  template <Probe P>
  bool advance_receive(In& in, P& probe) {
    Transfer* t = in.receives.head;
    if (in.ended) return false;
    send_credit(in, probe);
    while (!in.frames.empty() && in.frames.front().header.frame.kind != detail::FrameHeader::data) {
      in.owes = in.owes || in.frames.front().header.frame.kind == detail::FrameHeader::ask;
      send_credit(in, probe);
      next_frame(in);
    }
    if (in.frames.empty()) return false;
    Message& frame = in.frames.front();
    const detail::FrameHeader& h = frame.header.frame;
    if (!in.seen) {
      FrameInfo info = h.info();
      info.times = from_wire(in.elsewhere, info.times);
      if (t->matching != Matching::order && info.first && !in.receives.match(info, probe)) return false;
      t = in.receives.head;
      probe.arrived(*t, info);
      in.seen = true;
      in.fetched = in.in_place = false;
      in.begin = t->done;
      in.taken = 0;
      counters_.messages_received += info.first;
      if (h.bytes > t->bytes - t->done) malformed(in.peer, "more than was announced");
    }
    if (frame.header.fetched && !fetch(in, frame, *t)) return false;
    if (in.fetched) {  // its sender has to know before this rank can be done, and look after it no longer
      send_credit(in, probe);
      if (in.owes || in.crediting) return false;
    }
    const std::size_t before = t->done;
    if (in.in_place) {
      in.taken = h.bytes;
      t->done = in.begin + h.bytes;
    } else {
      take_some(in, frame.header.fetched ? in.buffer.data() : frame.data, h.bytes, *t, probe);
    }
    const bool ended = in.taken == h.bytes;
    if (t->done == before && !ended) return false;
    counters_.bytes_received += t->done - before;
    if (ended) {
      if (!in.fetched) {
        in.consumed += detail::frame_cost + h.bytes;
        in.owes = in.owes || (h.flags & detail::FrameHeader::asks) != 0;
        send_credit(in, probe);
      }
      next_frame(in);
      if (t->done == t->bytes) in.receives.pop();
    }
    probe.moved(*t);
    return true;
  }
  void next_frame(In& in) {
    fabric_->give_back(in.frames.front().held);
    in.frames.pop_front();
    in.seen = false;
  }
  /// True once the frame's payload is here.
  bool fetch(In& in, Message& frame, const Transfer& t) {
    if (in.fetched) return true;
    const std::size_t bytes = frame.header.frame.bytes;
    if (!in.fetching) {
      in.in_place = !t.fold && t.ready - in.begin >= bytes;
      if (!in.in_place) in.buffer.resize(frame_bytes_);
      in.flight = {};
      fabric_->fetch(in.peer, frame.held, in.in_place ? t.to + in.begin : in.buffer.data(), bytes, in.flight);
      in.fetching = true;
    }
    if (!fabric_->is_over(in.flight)) return false;
    in.fetching = false;
    in.consumed += detail::frame_cost + bytes;
    return in.fetched = in.owes = true;
  }
  /// Whole elements, as far as there is a place for them.
  template <Probe P>
  void take_some(In& in, const std::byte* payload, std::size_t bytes, Transfer& t, P& probe) {
    std::size_t most = std::min(bytes - in.taken, t.ready - t.done);
    if (most < bytes - in.taken) most -= most % t.grain;
    if (most == 0) return;
    std::byte* const to = t.to + t.done;
    const std::byte* const from = payload + in.taken;
    if (!t.fold) {
      if (bytes > short_bytes) probe.copying(t);
      std::memcpy(to, from, most);
    } else {
      if (bytes > short_bytes) probe.reducing(t);
      const std::byte* const acc = t.from + t.done;
      if (t.side == Side::right) (*t.fold)(to, acc, from, most);
      else (*t.fold)(to, from, acc, most);
    }
    in.taken += most;
    t.done += most;
  }
  template <Probe P>
  void send_credit(In& in, P& probe) {
    if (in.crediting) in.crediting = !fabric_->is_over(in.credit.flight);
    if (!in.owes || in.crediting || !reaches(in.peer)) return;
    in.credit.header = header(detail::FrameHeader::credit, in.lane);
    in.credit.header.frame.total = in.consumed;
    in.credit.header.frame.stamp(to_wire(in.elsewhere, probe.credit_stamp(*in.receives.head)));
    in.credit.flight = {};
    if (!fabric_->send(in.peer, in.credit.header, nullptr, 0, in.credit.flight)) return;
    in.owes = false;
    in.crediting = !fabric_->is_over(in.credit.flight);
  }

  FabricOptions options_;
  Make make_;
  std::unique_ptr<F> fabric_;
  std::size_t frame_bytes_;
  std::uint64_t window_;
  std::size_t at_once_;
  std::uint64_t key_ = 0;
  std::vector<Out> outs_;
  std::vector<In> ins_;
  std::vector<Peer> peers_;
  std::vector<Out*> sending_;  // those with something to do
  std::vector<In*> receiving_;
};

}  // namespace tally::inline v0
