// SPDX-License-Identifier: Apache-2.0
// Messages about a table over any transport: an envelope, and behind it what it announces, straight from where it lies to where it
// belongs. Envelopes go their own way (lane 1), so that none waits behind a long payload (lane 0), and a receive for the next one is
// always there, from every rank. What came and what was sent is told after the transport has returned.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../call.hpp"
#include "../progress.hpp"
#include "../transport/any.hpp"
#include "store.hpp"
#include "table.hpp"

namespace tally::inline v0::detail {

class Post {
 public:
  /// A message on its way out.
  struct Parcel {
    Rank to = -1;
    std::vector<Published*> leases;   // of what it is sent from, to be given back
    std::size_t tensor = 0, shard = 0;  // whose they are
    Payload payload;                  // what it is sent from, if it is nobody else's
    void* op = nullptr;               // whose payload is being sent, if that is to hear of it
    // Post's own:
    OperationAccount* account = nullptr;
    Transfer head;
    std::array<std::byte, sizeof(Envelope) + 4096> buffer;
    std::vector<Transfer> bodies;
    std::size_t remaining = 0;
    Parcel* next = nullptr;
  };
  static constexpr std::size_t most_inline = 4096;  // payloads up to this travel with their envelope
  /// What tables do with messages.
  struct Handler {
    virtual ~Handler() = default;
    /// Where the payload of a message goes; null: into memory of the pool's.
    virtual std::byte* place(Rank peer, const Envelope& e) = 0;
    /// A message is here; of one that was placed elsewhere the payload is empty.
    virtual void received(Rank peer, const Envelope& e, Payload&& payload, Ticks sent_at) = 0;
    virtual void sent(Parcel& parcel) = 0;
    /// The account of the operation that a message from there is for, an answer or `credit`; null: it is the server's business.
    virtual OperationAccount* account_of(Rank peer, std::uint64_t fingerprint) = 0;
    /// More bytes than any message of this kind can announce.
    virtual std::uint64_t bound(const Envelope& e) const = 0;
  };
  static constexpr std::uint64_t credit = ~std::uint64_t{0};

  Post(AnyTransport& transport, Progress<AnyTransport>& progress, Handler& handler, Pool& pool, std::size_t block_bytes)
      : transport_(transport), progress_(progress), handler_(handler), pool_(pool), block_bytes_(block_bytes), inboxes_(static_cast<std::size_t>(transport.size())) {
    if (transport.lanes() < 2) throw Error(Errc::unsupported, "a table needs a transport with two lanes");
    for (Rank r = 0; r < transport.size(); ++r) inbox(r).peer = r;
  }

  /// The server's own account: of what is done for others.
  OperationAccount* serving = nullptr;

  template <class C>
  void open(C& client) {
    for (Inbox& i : inboxes_)
      if (i.peer != transport_.rank()) listen(i, client);
  }
  Parcel& parcel(Rank to) {
    Parcel* p = free_;
    if (p) free_ = p->next;
    else p = all_.emplace_back(std::make_unique<Parcel>()).get();
    p->to = to;
    p->bodies.clear();
    p->op = nullptr;
    return *p;
  }
  /// Sends it with these pieces of payload. `account`: whose. `late`: by whom it was held up.
  template <class C>
  void send(C& client, Parcel& p, const Envelope& e, std::span<const std::span<const std::byte>> pieces, OperationAccount& account, const Lateness* late = nullptr) {
    std::size_t length = sizeof e;
    std::memcpy(p.buffer.data(), &e, sizeof e);
    const bool direct = (e.flags & Envelope::is_direct) != 0;  // the payload is elsewhere: what is sent is where
    std::size_t all = 0;
    for (const auto& piece : pieces) all += piece.size();
    if (all > most_inline && direct) refuse(p.to, "too many places at once");
    const bool with_it = all <= most_inline;
    if (with_it)
      for (const auto& piece : pieces) {
        if (!piece.empty()) std::memcpy(p.buffer.data() + length, piece.data(), piece.size());
        length += piece.size();
      }
    // What the receiver's account needs to know before it has read the envelope: which of its operations this answers.
    const bool answers = e.kind == MessageKind::acknowledge || e.kind == MessageKind::reply || e.kind == MessageKind::refusal;
    const std::uint64_t fingerprint = !answers ? 0 : e.kind == MessageKind::acknowledge && e.request == 0 ? credit : e.request;
    const auto aim = [&](Transfer& t, std::uint16_t lane, const std::byte* from, std::size_t bytes) {
      t = Transfer{};
      t.from = from;
      t.bytes = t.ready = bytes;
      t.fingerprint = fingerprint;
      t.operation = static_cast<std::uint32_t>(e.kind);
      t.peer = p.to;
      t.lane = lane;
      t.is_send = true;
      t.matching = lane == 1 ? Matching::any : Matching::order;
      t.prompt = true;
      t.inherited = t.late = late ? *late : long_ago();
      t.owner = &p;
    };
    aim(p.head, 1, p.buffer.data(), length);
    p.head.step = 0;
    p.account = &account;
    p.remaining = 1;
    if (!with_it)
      for (const auto& piece : pieces) {
        if (piece.empty()) continue;
        aim(p.bodies.emplace_back(), 0, piece.data(), piece.size());
        ++p.remaining;
      }
    under_way_.push_back(&p);
    progress_.post(p.head, client);
    for (Transfer& body : p.bodies) progress_.post(body, client);
  }
  template <class C>
  void send(C& client, Rank to, const Envelope& e, OperationAccount& account, std::span<const std::byte> payload = {}, const Lateness* late = nullptr) {
    send(client, parcel(to), e, std::span(&payload, payload.empty() ? 0 : 1), account, late);
  }

  /// One that is not sent after all, or has been.
  void recycle(Parcel& p) {
    p.payload = {};
    p.leases.clear();
    p.next = std::exchange(free_, &p);
  }

  /// Tells of what came and went. True if there was any.
  template <class C>
  bool deliver(C& client) {
    bool any = false;
    while (!arrived_.empty() || !complete_.empty() || done_) {
      any = true;
      while (done_) {
        Parcel& p = *std::exchange(done_, done_->next);
        std::erase(under_way_, &p);
        handler_.sent(p);
        recycle(p);
      }
      if (!complete_.empty()) {
        Arrival& a = *complete_.front();
        complete_.pop_front();
        std::erase(expected_, &a);
        const Envelope e = a.e;
        const Rank peer = a.peer;
        const Ticks sent_at = a.sent_at;
        Payload payload = std::move(a.payload);
        spare_.push_back(&a);
        handler_.received(peer, e, std::move(payload), sent_at);
      } else if (!arrived_.empty()) {
        Inbox& i = inbox(arrived_.front());
        arrived_.pop_front();
        open_letter(i, client);
      }
    }
    return any;
  }
  /// Nothing more is sent to or expected of a rank that is gone.
  void forget(Rank r) {
    Inbox& i = inbox(r);
    transport_.cancel(i.head);
    i.closed = true;
    std::erase(arrived_, r);
    for (Arrival* a : std::vector<Arrival*>(expected_)) {
      if (a->peer != r) continue;
      for (Transfer& t : a->bodies) transport_.cancel(t);
      std::erase(expected_, a), std::erase(complete_, a);
      a->payload = {};
      spare_.push_back(a);
    }
    for (Parcel* p : std::vector<Parcel*>(under_way_)) {
      if (p->to != r || p->remaining == 0) continue;
      transport_.cancel(p->head);
      for (Transfer& t : p->bodies) transport_.cancel(t);
      p->remaining = 0;
      p->next = std::exchange(done_, p);
    }
  }
  void withdraw() {
    for (Rank r = 0; r < transport_.size(); ++r)
      if (r != transport_.rank()) forget(r);
  }
  /// Whether memory of this operation's is being sent or received into.
  bool uses(const void* op) const {
    return std::any_of(under_way_.begin(), under_way_.end(), [&](const Parcel* p) { return p->op == op && p->remaining > 0 && !p->bodies.empty(); });
  }
  bool receives(std::uint64_t request) const {
    return std::any_of(expected_.begin(), expected_.end(), [&](const Arrival* a) { return a->e.request == request && a->e.kind == MessageKind::reply; });
  }
  bool idle() const { return under_way_.empty(); }

  // For Progress's client.
  OperationAccount& account_of(const Transfer& t) {
    if (t.is_send) return *static_cast<Parcel*>(t.owner)->account;
    OperationAccount* const account = handler_.account_of(t.peer, t.fingerprint);
    return account ? *account : *serving;
  }
  static State rest_of(const Transfer& t) { return t.fingerprint == credit ? State::wait_credit : State::wait_transfer; }
  void check(Transfer& t, const FrameInfo& frame) {
    if (t.lane == 1) {
      Inbox& i = *static_cast<Inbox*>(t.owner);
      if (frame.first) {
        if (frame.total < sizeof(Envelope) || frame.total > i.buffer.size()) refuse(t.peer, concat({"a message of ", frame.total, " bytes"}));
        t.bytes = t.ready = frame.total;
        t.fingerprint = frame.fingerprint;
        i.sent_at = transport_.to_local(t.peer, frame.times.sent_at);
      }
    } else if (frame.total != t.bytes) {
      refuse(t.peer, concat({"a payload of ", frame.total, " bytes where ", t.bytes, " were announced"}));
    }
    if (!frame.fits(t)) refuse(t.peer, "a message that is cut wrongly");
  }
  void moved(Transfer& t) {
    if (t.pending) return;
    if (t.is_send) {
      Parcel& p = *static_cast<Parcel*>(t.owner);
      if (--p.remaining == 0) p.next = std::exchange(done_, &p);
    } else if (t.lane == 1) {
      arrived_.push_back(t.peer);
    } else if (Arrival& a = *static_cast<Arrival*>(t.owner); --a.remaining == 0) {
      complete_.push_back(&a);
    }
  }

 private:
  /// Where a rank's next envelope goes.
  struct Inbox {
    Rank peer = -1;
    Transfer head;
    std::array<std::byte, sizeof(Envelope) + most_inline> buffer;
    Ticks sent_at = 0;
    bool closed = false;
  };
  /// A payload that was announced.
  struct Arrival {
    Rank peer = -1;
    Envelope e;
    Payload payload;
    std::vector<Transfer> bodies;
    std::size_t remaining = 0;
    Ticks sent_at = 0;
  };

  Inbox& inbox(Rank r) { return inboxes_[static_cast<std::size_t>(r)]; }
  /// Nobody was late.
  Lateness long_ago() const {
    constexpr Ticks far = Ticks{1} << 36;  // as ages can say it
    const Ticks now = progress_.now();
    return {now > far ? now - far : 1, transport_.rank()};
  }
  template <class C>
  void listen(Inbox& i, C& client) {
    if (i.closed) return;
    i.head = Transfer{};
    i.head.to = i.buffer.data();
    i.head.bytes = i.head.ready = i.buffer.size();
    i.head.peer = i.peer;
    i.head.lane = 1;
    i.head.matching = Matching::any;
    i.head.owner = &i;
    progress_.post(i.head, client);
  }
  template <class C>
  void open_letter(Inbox& i, C& client) {
    Envelope e;
    std::memcpy(&e, i.buffer.data(), sizeof e);
    if (e.kind == MessageKind{} || e.kind > MessageKind::last) refuse(i.peer, concat({"a message of the unknown kind ", static_cast<int>(e.kind)}));
    const std::size_t with_it = i.head.bytes - sizeof e;
    const bool direct = (e.flags & Envelope::is_direct) != 0;
    if (direct || e.bytes <= most_inline) {
      if (!direct && with_it != e.bytes) refuse(i.peer, concat({"a message with ", with_it, " bytes that announces ", e.bytes}));
      Payload payload(pool_, with_it);
      if (with_it > 0) std::memcpy(payload.data(), i.buffer.data() + sizeof e, with_it);
      const Ticks sent_at = i.sent_at;
      listen(i, client);
      return handler_.received(i.peer, e, std::move(payload), sent_at);
    }
    if (with_it != 0 || e.bytes > handler_.bound(e)) refuse(i.peer, concat({"a message that announces ", e.bytes, " bytes"}));
    Arrival* a;
    if (spare_.empty()) a = arrivals_.emplace_back(std::make_unique<Arrival>()).get();
    else a = spare_.back(), spare_.pop_back();
    a->peer = i.peer;
    a->e = e;
    a->sent_at = i.sent_at;
    a->bodies.clear();
    std::byte* to = handler_.place(i.peer, e);
    if (!to) a->payload = Payload(pool_, e.bytes), to = a->payload.data();
    const auto piece = [&](std::size_t at, std::size_t bytes) {
      Transfer& t = a->bodies.emplace_back();
      t.to = to + at;
      t.bytes = t.ready = bytes;
      t.peer = i.peer;
      t.fingerprint = e.kind == MessageKind::reply ? e.request : 0;
      t.owner = a;
    };
    if (const std::uint64_t keys = e.count * sizeof(std::uint64_t); (e.flags & Envelope::is_rows) != 0 && e.count < e.bytes && keys < e.bytes) piece(0, keys), piece(keys, e.bytes - keys);
    else if (!each_piece(e, block_bytes_, piece)) refuse(i.peer, "a payload in pieces that do not make sense");
    a->remaining = a->bodies.size();
    expected_.push_back(a);
    listen(i, client);
    for (Transfer& t : a->bodies) progress_.post(t, client);
  }
  [[noreturn]] void refuse(Rank peer, const std::string& what) const { throw Error(Errc::protocol, {"rank ", peer, " sent ", what, " about a table"}, {transport_.rank(), peer, 0, {}}); }

  AnyTransport& transport_;
  Progress<AnyTransport>& progress_;
  Handler& handler_;
  Pool& pool_;
  std::size_t block_bytes_;
  std::vector<Inbox> inboxes_;
  std::deque<Rank> arrived_;
  std::vector<std::unique_ptr<Parcel>> all_;
  std::vector<std::unique_ptr<Arrival>> arrivals_;
  std::vector<Arrival*> spare_, expected_;
  std::deque<Arrival*> complete_;
  std::vector<Parcel*> under_way_;
  Parcel *free_ = nullptr, *done_ = nullptr;
};

}  // namespace tally::inline v0::detail
