// SPDX-License-Identifier: Apache-2.0
// A transport over what carries messages (a fabric: UCX, RDMA verbs, MPI): frames have numbers, and each direction of each lane between
// two ranks has a window. Short payloads go with their header. Long ones stay where they are until the receiver has a place for them,
// and are fetched straight into it; where that place is not free yet, into a buffer, so that two ranks that exchange what they
// overwrite do not wait for each other.
#pragma once

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
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "channels.hpp"
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
  std::uint64_t communicator = 0;
  std::uint64_t key = 0;  // of the communicator in its job
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
  { F::lets_go } -> std::convertible_to<bool>;        // of memory that it writes to, once told to give up
  { c.address() } -> std::same_as<std::string>;       // empty: ranks know where the others are
  { c.knows(peer) } -> std::same_as<bool>;
  f.meet(peer, address);
  { f.reaches(peer) } -> std::same_as<bool>;          // messages may be sent; payloads that are fetched once
  { f.stands(peer) } -> std::same_as<bool>;           // the way stands, which may need the peer to look after it once
  { c.most_at_once() } -> std::same_as<std::size_t>;  // bytes of a payload that goes with its header
  // False: no room. The header, and a payload that goes with it, stay until the flight is over; one that is fetched until it was, too.
  { f.send(peer, header, from, bytes, flight) } -> std::same_as<bool>;
  { f.is_over(flight) } -> std::same_as<bool>;        // what failed is never over
  { f.touches(flight) } -> std::same_as<bool>;        // it may still read or write memory
  f.drop(flight, std::vector<std::byte>{});           // nobody asks after it any more; memory that it writes to, where that is the transport's
  f.give_up(peer);                                    // the way to it: what is under way fails soon
  f.halt();                                           // nothing moves any more
  f.fetch(peer, held, to, bytes, flight);
  f.give_back(held);                                  // payload that was not fetched, or is no longer read
  f.progress();
  { f.inbox() } -> std::same_as<std::deque<typename F::Message>&>;  // what came: {header, held, data (null if it is to be fetched), bytes}
  { c.error(peer) } -> std::same_as<const char*>;     // null: none
  { c.event() } -> std::same_as<int>;                 // a descriptor that is readable when there may be progress, once arm() was true
  { f.arm() } -> std::same_as<bool>;                  // false: there is something to do
  { c.longest_sleep() } -> std::same_as<nanoseconds>;  // it may have something to do then that the descriptor does not tell
  f.flush(limit, bool{});                             // what was sent is on its way; true: the communicator failed
  { c.has_rest() } -> std::same_as<bool>;             // of what is over something goes only while progress() is called
};

}  // namespace detail

template <detail::Fabric F>
class FabricTransport : public NetworkedTransport {
 public:
  /// A communicator's fabric.
  using Make = std::function<std::unique_ptr<F>(const FabricMembers& members)>;

  FabricTransport(std::shared_ptr<detail::NetworkNode> node, std::uint64_t communicator, std::vector<Rank> members, const FabricOptions& options, Make make)
      : NetworkedTransport(std::move(node), communicator, std::move(members)), options_(options), make_(std::move(make)), fabric_(make_(who())), frame_bytes_(std::max<std::size_t>(options.frame_bytes, 64)),
        window_(std::max(options.window, frame_bytes_ + detail::frame_cost)), at_once_(std::min({options.at_once, fabric_->most_at_once(), frame_bytes_})), channels_(options.lanes, size()), peers_(static_cast<std::size_t>(size())) {
    key_ = who().key;
    for (Out& out : channels_.outs()) out.elsewhere = node_->is_elsewhere(origin(out.peer));
    for (In& in : channels_.ins()) in.elsewhere = node_->is_elsewhere(origin(in.peer));
    if (const std::string address = fabric_->address(); !address.empty() && size() > 1) node_->offer(*group_, address);
  }
  ~FabricTransport() {
    if (::getpid() != process_) {  // a child that this rank forked: it never was a rank
      (void)fabric_.release();
      return;
    }
    // What is to be taken without this rank's help must be on its way; a peer may have to look for that.
    const bool failed = group_->aborted.load(std::memory_order_relaxed);
    fabric_->flush(failed ? std::chrono::seconds(1) : std::chrono::seconds(10), failed);
    for (Out& out : channels_.outs())
      for (; out.ended != out.begun; ++out.ended) fabric_->drop(flight(out, out.ended).flight, {});
    for (const auto& bye : byes_) fabric_->drop(bye->flight, {});
    for (In& in : channels_.ins()) {
      if (in.fetching) fabric_->drop(in.flight, std::move(in.buffer));
      if (in.crediting) fabric_->drop(in.credit.flight, {});
      for (Message& frame : in.frames) fabric_->give_back(frame.held);
      for (auto& [number, frame] : in.early) fabric_->give_back(frame.held);
    }
    fabric_.reset();  // before what it may still look at
  }

  int lanes() const { return options_.lanes; }
  std::size_t frame_bytes() const { return frame_bytes_; }
  std::string_view name() const { return F::name; }

  template <Probe P>
  void post(Transfer& t, P& probe) {
    channels_.post(t, [&](Out& out) { return advance_send(out, probe); });
  }
  void cancel(Transfer& t) {
    if (!t.pending) return;
    if (::getpid() != process_) return channels_.remove(t);  // a child that this rank forked: what is under way is its parent's
    if (t.is_send) {
      Out& out = channels_.out(t);
      if (reads(out, t)) abandon(t.peer);  // what was announced cannot be taken back but with the way to the peer
      if (out.next == &t) out.next_from = 0;
    } else if (In& in = channels_.in(t); in.receives.head == &t && in.seen) {
      if (in.fetching && in.in_place) abandon(t.peer);
      in.ended = true;  // the rest of its frame would be taken for another one's
    }
    channels_.remove(t);
  }

  template <Probe P>
  bool poll(P& probe) {
    look();
    return channels_.poll([&](Out& out) { return advance_send(out, probe); }, [&](In& in) { return advance_receive(in, probe); });
  }
  void flush() {}
  bool idle() const { return channels_.idle(); }
  bool has_rest() const { return fabric_->has_rest(); }
  void settle() { look(); }

  Liveness liveness(Rank r) {
    if (r == me_) return Liveness::alive;
    inquire();
    look();
    const detail::Told told = node_->told(*group_, r);
    Peer& from = peer(r);
    const char* const error = fabric_->error(r);
    if (told.left || from.bye) {
      const auto now = std::chrono::steady_clock::now();
      if (from.left_since == std::chrono::steady_clock::time_point{}) from.left_since = now;
      // What it sent may still be on its way. How much that is, says its own goodbye, or the registry, unless that went with it.
      const bool is_told = from.bye || told.left == detail::Told::said || now - from.left_since > std::chrono::seconds(1);
      if (error || (is_told && from.came >= std::max(told.opened, from.bye.value_or(0)))) return Liveness::left;
    }
    if (node_->is_dead(origin(r))) return Liveness::dead;
    return error ? broken(r, "the way", detail::concat({F::name, " says: ", error})) : Liveness::alive;
  }

  void abort(const AbortNotice& notice) {
    node_->abort(*group_, notice);
    interrupt();
  }
  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    // Armed first: what came before that is found by the recheck, what comes later ends the sleep.
    if (!fabric_->arm()) return (void)recheck();
    if (!recheck()) sleep_armed(-1, limit);
  }
  void sleep(nanoseconds limit, int other = -1) {
    if (fabric_->arm()) sleep_armed(other, limit);
  }
  void interrupt() { group_->ring(); }

  std::unique_ptr<FabricTransport> open(std::uint64_t token, std::span<const Rank> members) { return std::make_unique<FabricTransport>(node_, token, origins_of(members), options_, make_); }

  void leave() {
    if (::getpid() != process_) return;
    std::vector<detail::Opened> sent;
    for (Rank r = 0; r < size(); ++r)
      if (const std::uint32_t went = peer(r).went; went > 0) {
        sent.push_back({origin(r), went});
        if (fabric_->error(r)) continue;
        Sent& bye = *byes_.emplace_back(std::make_unique<Sent>());  // for who hears nothing of the registry any longer
        bye.header = header(detail::FrameHeader::goodbye, 0);
        bye.header.frame.total = went;
        (void)fabric_->send(r, bye.header, nullptr, 0, bye.flight);
      }
    say_goodbye(sent);
  }

 private:
  using Message = typename F::Message;
  using Flight = typename F::Flight;
  static constexpr std::size_t most_flights = 32, most_early = 64;  // early: of what the window does not count

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
    bool waits = false;                    // for what is being fetched
    bool owes = false, crediting = false;  // a credit; one is on its way
  };
  struct Peer {
    bool wanted = false;
    std::uint32_t went = 0, came = 0;  // data frames
    std::optional<std::uint32_t> bye;  // so many it has sent in all, as it said when it left
    std::chrono::steady_clock::time_point left_since{};
  };

  void sleep_armed(int other, nanoseconds limit) { (void)sleep_on(fabric_->event(), other, std::min(limit, fabric_->longest_sleep())); }
  Peer& peer(Rank r) { return peers_[static_cast<std::size_t>(r)]; }
  FabricMembers who() const {
    FabricMembers members{group_->communicator, 0, me_, group_->members, {}};
    std::memcpy(&members.key, node_->key().data(), sizeof members.key);
    members.key ^= members.communicator * 0x9e3779b97f4a7c15u;
    for (const Rank r : members.ranks) members.elsewhere.push_back(node_->is_elsewhere(r));
    return members;
  }
  static Sent& flight(Out& out, std::uint64_t i) { return (*out.flights)[i % most_flights]; }
  static bool reads(Out& out, const Transfer& t) {
    for (std::uint64_t i = out.ended; i < out.begun; ++i)
      if (flight(out, i).transfer == &t) return true;
    return false;
  }
  /// Nothing goes to this peer any more, or comes from it; and nobody touches what was to. Where it cannot be had so before long, nothing
  /// moves at all any more.
  void abandon(Rank r) {
    fabric_->give_up(r);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    const auto settle = [&](Flight& flight) {
      while (fabric_->touches(flight)) {
        give_back_all(r);  // whose sender waits for that, as this rank does
        if (std::chrono::steady_clock::now() > deadline) return fabric_->halt();
        fabric_->progress();
      }
    };
    for (int lane = 0; lane < lanes(); ++lane) {
      In& in = channels_.in(lane, r);
      in.ended = true;
      if (std::exchange(in.fetching, false)) {
        settle(in.flight);
        fabric_->drop(in.flight, std::move(in.buffer));
      }
    }
    for (int lane = 0; lane < lanes(); ++lane)
      for (Out& out = channels_.out(lane, r); out.ended != out.begun; ++out.ended) {
        settle(flight(out, out.ended).flight);
        fabric_->drop(flight(out, out.ended).flight, {});
      }
    give_back_all(r);
  }
  void give_back_all(Rank r) {
    for (int lane = 0; lane < lanes(); ++lane) {
      In& in = channels_.in(lane, r);
      for (Message& frame : in.frames) fabric_->give_back(frame.held);
      for (auto& [number, frame] : in.early) fabric_->give_back(frame.held);
      in.frames.clear();
      in.early.clear();
      in.seen = false;
    }
    std::erase_if(fabric_->inbox(), [&](Message& message) {
      if (message.header.key != key_ || message.header.from != r) return false;
      fabric_->give_back(message.held);
      return true;
    });
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
      Out& out = channels_.out(h.lane, h.from);
      if (h.frame.total > out.sent) malformed(h.from, detail::concat({"a credit for ", h.frame.total, " bytes, of ", out.sent, " that were sent"}));
      if (h.frame.total < out.consumed) return false;  // a later one came first
      out.consumed = h.frame.total;
      out.asked = std::max(out.asked, out.consumed);
      out.credit = from_wire(out.elsewhere, h.frame.times());
      return false;
    }
    In& in = channels_.in(h.lane, h.from);
    if (h.frame.kind == detail::FrameHeader::goodbye) {
      peer(h.from).bye = static_cast<std::uint32_t>(h.frame.total);
      return false;
    }
    const bool is_data = h.frame.kind == detail::FrameHeader::data;
    if (is_data && (h.fetched ? message.data != nullptr : message.bytes != h.frame.bytes)) malformed(h.from, detail::concat({message.bytes, " bytes where it announced ", h.frame.bytes}));
    in.held += is_data ? detail::frame_cost + h.frame.bytes : 0;
    if (in.held - in.consumed > window_ || h.number - in.number > most_early + window_ / detail::frame_cost) malformed(h.from, "more than there is room for");
    peer(h.from).came += is_data;
    if (in.ended) return false;
    if (h.number != in.number) return in.early.emplace(h.number, message).second;
    in.frames.push_back(message);
    ++in.number;
    for (auto next = in.early.begin(); next != in.early.end() && next->first == in.number; next = in.early.erase(next), ++in.number) in.frames.push_back(next->second);
    return true;
  }

  /// Whether there is a way to the peer, once it is known where that is.
  bool reaches(Rank r, bool is_owed = false) {
    if (fabric_->error(r)) return false;
    if (fabric_->knows(r)) return fabric_->reaches(r);
    if (!std::exchange(peer(r).wanted, true)) node_->want(*group_, r);
    const std::string address = node_->offered(*group_, r);
    if (!address.empty()) {
      fabric_->meet(r, address);
      return fabric_->reaches(r);
    }
    if (node_->told(*group_, r).left || node_->is_dead(origin(r))) return false;  // who looks after that one says so
    if (node_->registry_is_gone() && !is_owed) throw TransportError(Errc::peer_lost, {"rank ", me_, " cannot reach rank ", r, ": rank 0, which knew where it is, is gone"}, {me_, 0, status_.sequence, {}});
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
      if (!first.over) first.over = fabric_->is_over(first.flight);
      if (!first.over || first.fetched_at > out.consumed) {
        (first.fetched_at ? out.unfetched : out.full) = true;
        break;
      }
      ++out.ended;
      const bool was_unfetched = std::exchange(out.unfetched, false), was_full = std::exchange(out.full, false);
      Transfer* const t = first.transfer;
      if (!t) continue;
      if (was_unfetched) probe.fetched(*t, out.credit);
      else if (was_full) probe.drained(*t);
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
    if (bytes > at_once_ && !fabric_->stands(out.peer)) return out.full = true, false;
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
    ++peer(out.peer).went;
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
    if (frame.header.fetched && !fetch(in, frame, *t, probe)) return false;
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
  template <Probe P>
  bool fetch(In& in, Message& frame, Transfer& t, P& probe) {
    if (in.fetched) return true;
    const std::size_t bytes = frame.header.frame.bytes;
    if (!in.fetching) {
      if (!reaches(in.peer)) return false;
      in.in_place = F::lets_go && !t.fold && t.ready - in.begin >= bytes;
      if (!in.in_place) in.buffer.resize(frame_bytes_);
      in.flight = {};
      fabric_->fetch(in.peer, frame.held, in.in_place ? t.to + in.begin : in.buffer.data(), bytes, in.flight);
      in.fetching = true;
    }
    if (!fabric_->is_over(in.flight)) return in.waits = true, false;
    if (std::exchange(in.waits, false)) probe.drained(t);
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
    if (!in.owes || in.crediting || !reaches(in.peer, !in.fetched)) return;  // without a credit the sender may have room all the same
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
  detail::Channels<Out, In> channels_;
  std::vector<Peer> peers_;
  std::vector<std::unique_ptr<Sent>> byes_;
};

}  // namespace tally::inline v0
