// SPDX-License-Identifier: Apache-2.0
// Who uses a table without being a rank of its communicator: a reader, or a worker that comes later. It has a connection to the door
// of every server, talks as ranks do, and does its work in its calls: no thread, no memory that it shares.
#pragma once

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../account/ledger.hpp"
#include "client.hpp"
#include "door.hpp"

namespace tally::inline v0::detail {

/// One connection of a guest's, from the door's first word on. Never waits beyond its deadline.
class DoorStream {
 public:
  using Deadline = std::chrono::steady_clock::time_point;
  DoorStream() = default;
  /// Errc::peer_lost if nobody is there; Errc::protocol, Errc::invalid_argument if whoever is says no.
  DoorStream(const SocketAddress& address, const NetworkSettings& settings, Deadline deadline, std::string& description, std::size_t& shard) : text_(address.text()) {
    int error = 0;
    FileDescriptor fd = begin_connect(address, error);
    if (error == 0 && !wait_for_events(fd.get(), POLLOUT, deadline)) error = ETIMEDOUT;
    if (error == 0) error = error_of(fd);
    if (error != 0) throw Error(Errc::peer_lost, {"no table at ", text_, ": ", errno_text(error)});
    tune(fd, std::chrono::duration_cast<std::chrono::milliseconds>(settings.timeout));
    stream_ = settings.opened(std::move(fd));
    DoorChallenge challenge;
    take(&challenge, sizeof challenge, deadline);
    if (challenge.magic != DoorChallenge{}.magic) throw Error(Errc::protocol, {text_, " is no table's door"});
    if (challenge.protocol != door_protocol) throw Error(Errc::protocol, {"the table's door at ", text_, " speaks version ", challenge.protocol, ", and this program ", door_protocol});
    if (challenge.secured == settings.secret.empty()) throw Error(Errc::invalid_argument, {"the table at ", text_, settings.secret.empty() ? " asks for a secret, and this process has none" : " has no secret, and this process has one", ": TALLY_SECRET must be the same"});
    DoorHello hello;
    hello.nonce = random_nonce();
    hello.proof = door_proof(settings.secret, "guest", challenge.nonce);
    put(&hello, sizeof hello, deadline);
    DoorWelcome welcome;
    take(&welcome, sizeof welcome, deadline);
    if (welcome.bytes > longest_notice) throw Error(Errc::protocol, {"the table's door at ", text_, " announces ", welcome.bytes, " bytes"});
    description.resize(welcome.bytes);
    take(description.data(), description.size(), deadline);
    if (welcome.refused) throw Error(Errc::invalid_argument, {"the table at ", text_, " lets nobody in with ", description});
    if (!same(welcome.proof, door_proof(settings.secret, "door", hello.nonce))) throw Error(Errc::invalid_argument, {"whoever is at ", text_, " does not know the secret"});
    shard = welcome.shard;
  }
  Stream& stream() { return stream_; }
  const std::string& text() const { return text_; }

 private:
  void take(void* to, std::size_t bytes, Deadline deadline) {
    for (std::size_t have = 0; have < bytes;) {
      const ssize_t got = stream_.read(static_cast<char*>(to) + have, bytes - have);
      if (got > 0) have += static_cast<std::size_t>(got);
      else again(got, POLLIN, deadline);
    }
  }
  void put(const void* from, std::size_t bytes, Deadline deadline) {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t sent = stream_.write(static_cast<const char*>(from) + done, bytes - done);
      if (sent > 0) done += static_cast<std::size_t>(sent);
      else again(sent, stream_.waits_to_read() ? POLLIN : POLLOUT, deadline);
    }
  }
  void again(ssize_t result, short events, Deadline deadline) {
    if (result < 0 && errno == EINTR) return;
    if (result == 0) throw Error(Errc::peer_lost, {"the door at ", text_, " was closed: the table is no more, or has a secret or TLS where this process has none, or the other way round"});
    if (errno != EAGAIN && errno != EWOULDBLOCK) throw Error(Errc::peer_lost, {"the door at ", text_, ": ", errno == EPROTO ? stream_.problem() : errno_text(errno)});
    if (!wait_for_events(stream_.get(), events, deadline)) throw Error(Errc::timeout, {"nobody answers at ", text_, " like a table does"});
  }
  Stream stream_;
  std::string text_;
};

struct GuestSettings {
  Clock clock = Clock::host();
  nanoseconds timeout = std::chrono::seconds(60);
  bool accounting = true;
  AccountSettings account = {};
};

class TableGuest final : public TableUser, private TableHost, private TableClient::Events {
 public:
  /// `where`: of any of its doors. Errc::invalid_argument if the table's elements are others.
  static std::unique_ptr<TableGuest> enter(const std::string& where, ElementType type, std::size_t grain, const GuestSettings& settings) {
    const auto deadline = std::chrono::steady_clock::now() + settings.timeout;
    const NetworkSettings network = NetworkSettings::from_environment(settings.timeout, settings.clock);
    std::exception_ptr why;
    for (const SocketAddress& address : resolve(where)) {
      try {
        std::string description;
        std::size_t shard = 0;
        DoorStream first(address, network, deadline, description, shard);
        TableNotice notice = TableNotice::of(description);
        if (notice.table.rule.type != type || notice.table.rule.grain != grain)
          throw Error(Errc::invalid_argument, {"the table at ", where, " has elements ", name_of(notice.table.rule.type), " of ", notice.table.rule.grain, " bytes, and this process asks for ", name_of(type), " of ", grain});
        if (shard >= notice.doors.size()) throw Error(Errc::protocol, {"the door at ", where, " is of a shard that there is not"});
        notice.doors[shard] = address;
        return std::unique_ptr<TableGuest>(new TableGuest(std::move(notice), shard, std::move(first), network, settings));
      } catch (const Error& error) {
        if (error.errc() != Errc::peer_lost) throw;
        why = std::current_exception();
      }
    }
    std::rethrow_exception(why);
  }
  ~TableGuest() override {
    connections_.clear();
    ledger_->settle();
  }
  TableGuest(const TableGuest&) = delete;

  const Table& table() const override { return table_; }
  Rank rank() const override { return rank_; }
  bool is_worker() const override { return client_.is_worker(); }
  std::uint64_t clock() const { return client_.clock(); }
  const Ledger& ledger() const { return *ledger_; }

  /// Becomes a worker whose clock is what all others have reached.
  void join() {
    Envelope e;
    e.kind = MessageKind::join;
    std::uint64_t clock = 0;
    for (int s = 0; s < table_.shards(); ++s) {
      const Envelope answer = ask_to_join(s, e);
      clock = std::max(clock, answer.clock);
      e.worker = answer.worker;
      e.sequence = answer.sequence;
      if (e.worker < static_cast<std::int32_t>(table_.regulars()) || e.worker >= static_cast<std::int32_t>(table_.workers.size())) throw Error(Errc::protocol, {"a server gives away the place of worker ", e.worker});
    }
    rank_ = table_.workers[static_cast<std::size_t>(e.worker)];
    until_ = clock_.now() + clock_.to_ticks(timeout_);
    ledger_ = make_ledger();  // of that rank, from here on
    client_.join(e.worker, clock);
  }
  void tick_to(std::uint64_t clock) {
    expect_usable();
    client_.expect_pushing();
    until_ = clock_.now() + clock_.to_ticks(timeout_);
    client_.tick_to(clock);
    read_all();
  }
  /// A worker leaves; all that it has pushed is in.
  void close() {
    if (std::exchange(closed_, true) || !client_.is_worker()) return;
    TableOp& op = take();
    op.call = {};
    op.call.what = Collective::leave;
    complete(op, [&] {
      while (!client_.is_settled()) turn(op);
      client_.leave(op);
    });
    for (Connection& c : connections_) c.open = false, c.door = DoorStream();  // so that its place is free
  }

  TableOp& take() override {
    if (free_.empty()) free_.push_back(all_.emplace_back(std::make_unique<TableOp>(ranks())).get());
    TableOp* const op = free_.back();
    free_.pop_back();
    op->reset();
    op->background = false;
    return *op;
  }
  Report run(TableOp& op) override {
    expect_usable();
    return complete(op, [&] { start(op); });
  }
  void start_in_background(TableOp& op) override {
    expect_usable();
    while (under_way_ >= most_under_way) turn_for_any();
    op.background = true;
    begin(op);
    ++under_way_;
    attempt(op, [&] { start(op); });
    if (!op.done) op.account.watch.enter(State::undriven, now());
  }
  bool is_done(TableOp& op) override {
    if (!op.done) driven(op, [&] { read_all(); });
    return op.done;
  }
  Report wait(TableOp& op) override {
    if (!op.done) driven(op, [&] {
      while (!op.done) turn(op);
    });
    book(op);
    if (op.error && is_over_) raise_over();
    if (op.error) std::rethrow_exception(op.error);
    return op.report;
  }
  void abandon(TableOp& op) override {
    try {
      (void)wait(op);
    } catch (const Error&) {  // who waited for it would have heard
    }
    free_.push_back(&op);
  }

 private:
  /// To one server.
  struct Connection {
    Rank server = -1;
    DoorStream door;
    DoorMessage message;
    std::array<std::byte, sizeof(DoorMessage)> head;
    std::size_t have = 0;      // of the next message, with its payload
    std::byte* to = nullptr;   // where the payload goes; null: to `payload`
    std::vector<std::byte> payload;
    bool open = false;
    std::string problem;
  };
  struct Wait {
    Ticks begin, end;
  };

  TableGuest(TableNotice&& notice, std::size_t shard, DoorStream&& first, const NetworkSettings& network, const GuestSettings& settings)
      : table_(std::move(notice.table)), clock_(settings.clock), timeout_(settings.timeout), accounting_(settings.accounting), rank_(table_.size + table_.options.guests),
        way_(network.encrypt ? "door+tls" : "door"), account_(settings.account), ledger_(make_ledger()), client_(*this, *this, table_), name_(text_of(table_.options.consistency)) {
    const auto deadline = std::chrono::steady_clock::now() + timeout_;
    connections_.resize(table_.servers.size());
    for (std::size_t s = 0; s < connections_.size(); ++s) {
      Connection& c = connections_[s];
      c.server = table_.servers[s];
      try {
        std::string description;
        std::size_t at = shard;
        c.door = s == shard ? std::move(first) : DoorStream(notice.doors[s], network, deadline, description, at);
        if (at != s) throw Error(Errc::peer_lost, {"the door at ", notice.doors[s].text(), " is another server's"});
        c.open = true;
      } catch (const Error& error) {
        if (error.errc() != Errc::peer_lost || table_.options.replicas == 0) throw;
        c.problem = error.what();
      }
    }
    for (const Connection& c : connections_)
      if (!c.open) client_.lost(c.server);
  }

  std::unique_ptr<Ledger> make_ledger() const { return std::make_unique<Ledger>(ranks(), rank_, way_, clock_, account_); }
  int ranks() const { return table_.size + table_.options.guests + 1; }
  Envelope ask_to_join(int shard, const Envelope& e) {
    for (const Ticks end = clock_.now() + clock_.to_ticks(std::min<nanoseconds>(timeout_, std::chrono::seconds(5)));;) {
      TableOp& op = take();
      op.call = {};
      op.call.what = Collective::leave;
      op.asked = e;
      try {
        Envelope answer;
        complete(op, [&] { client_.ask(op, shard, e); }, &answer);
        return answer;
      } catch (const Error& error) {
        if (error.errc() != Errc::no_resources || clock_.now() > end) throw;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));  // who had the place is going
    }
  }
  void expect_usable() const {
    if (is_over_) raise_over();
    if (closed_) throw Error(Errc::invalid_argument, "this worker has left the table");
  }
  [[noreturn]] void raise_over() const { throw Error(Errc::peer_lost, "the table is closed: all its workers have left", {rank_, -1, number_, {}}); }
  void begin(TableOp& op) {
    if (op.call.timeout <= nanoseconds{0}) op.call.timeout = timeout_;
    op.sequence = ++number_;
    op.account.arrival = clock_.now();
    op.account.watch.start(op.account.arrival);
    op.deadline = until_ = op.account.arrival + clock_.to_ticks(op.call.timeout);
    op.row = &row_of(*ledger_, table_, op, name_);
  }
  void start(TableOp& op) {
    try {
      client_.start(op);
    } catch (const Error& error) {
      if (error.errc() != Errc::invalid_argument && error.errc() != Errc::aborted) throw;
      client_.fail(op, std::current_exception());  // it is refused, and nothing of it was sent
    }
  }
  template <class F>
  Report complete(TableOp& op, F&& f, Envelope* answer = nullptr) {
    begin(op);
    attempt(op, [&] {
      f();
      while (!op.done) turn(op);
    });
    book(op);
    const Report report = op.report;
    const auto error = op.error;
    if (answer) *answer = op.answer;
    free_.push_back(&op);
    if (error && is_over_) raise_over();
    if (error) std::rethrow_exception(error);
    return report;
  }
  /// From here until f() returns the caller drives it.
  template <class F>
  void driven(TableOp& op, F&& f) {
    op.account.watch.enter(State::protocol, clock_.now());
    until_ = op.deadline;
    attempt(op, f);
    if (!op.done) op.account.watch.enter(State::undriven, clock_.now());
  }
  template <class F>
  void attempt(TableOp& op, F&& f) {
    driven_ = &op;
    try {
      f();
    } catch (const Error& error) {
      if (!op.done) fail(op);
    }
    driven_ = nullptr;
    if (!waits_.empty()) blame_rest(op);
  }
  /// With the exception that is being handled.
  void fail(TableOp& op) {
    const std::exception_ptr why = std::current_exception();
    for (Connection& c : connections_)
      if (c.open && c.to && c.message.e.request == op.request) close(c, "it was left in the middle of an answer");
    client_.fail(op, why);
    client_.end_if_unused(op);
  }

  /// Something of what is under way in the background gets done, or misses its deadline.
  void turn_for_any() {
    if (read_all()) return;
    polled_.clear();
    for (Connection& c : connections_)
      if (c.open) polled_.push_back({c.door.stream().get(), POLLIN, 0});
    (void)::poll(polled_.data(), polled_.size(), 100);
    if (clock_.now() > until_) throw Error(Errc::timeout, {"none of ", under_way_, " operations in the background gets done"}, {rank_, -1, number_, timeout_});
  }
  /// Takes in what has come, or waits until something does.
  void turn(TableOp& op) {
    if (read_all() || op.done) return;
    const Ticks now = clock_.now();
    if (now > op.deadline) expired(op);
    std::vector<pollfd>& what = polled_;
    what.clear();
    for (Connection& c : connections_)
      if (c.open) what.push_back({c.door.stream().get(), POLLIN, 0});
    wait_for(op, what);
  }
  void wait_for(TableOp& op, std::vector<pollfd>& what) {
    const Ticks begin = clock_.now();
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(clock_.to_ns(op.deadline - std::min(op.deadline, begin))).count() + 1;
    op.account.watch.enter(State::protocol, begin);
    (void)::poll(what.data(), what.size(), static_cast<int>(std::clamp<std::int64_t>(ms, 0, 1000)));
    const Ticks end = clock_.now();
    op.account.watch.slept(end - begin);
    op.account.watch.resume(State::protocol, end);  // what it was for is told by what comes
    waits_.push_back({begin, end});
    if (waits_.size() > 64) blame_rest(op);
  }
  /// A message ended the waits so far, if it is one that was waited for.
  void heard(const Connection& c, const DoorMessage& m) {
    if (!driven_ || waits_.empty()) return;
    const TablePart* const missing = client_.missing(*driven_);
    const bool is_credit = m.e.request == 0 && missing && missing->is_push && !missing->sent;
    if (m.e.request != driven_->request && !is_credit) return;
    const Ticks now = clock_.now(), age = clock_.to_ticks(nanoseconds(static_cast<std::int64_t>(std::min<std::uint64_t>(m.late_age, 1ull << 60)))), until = now - std::min(now, age);
    const bool late = m.culprit >= 0 && m.culprit < ranks() - 1 && m.culprit != rank_;
    for (const Wait& w : waits_) {
      const Ticks came = late ? std::clamp(until, w.begin, w.end) : w.begin;
      if (late) driven_->account.watch.blame(m.culprit, State::wait_arrival, came - w.begin);
      driven_->account.watch.blame(c.server, is_credit ? State::wait_credit : State::wait_transfer, w.end - came);
    }
    if (late) driven_->account.latest.raise({until, m.culprit}), driven_->account.heard = true;
    waits_.clear();
  }
  /// Nothing that came said what they were for.
  void blame_rest(TableOp& op) {
    const TablePart* const missing = client_.missing(op);
    const Rank server = missing ? client_.server_of(missing->shard) : connections_.front().server;
    for (const Wait& w : waits_) op.account.watch.blame(server, State::wait_transfer, w.end - w.begin);
    waits_.clear();
  }
  [[noreturn]] void expired(const TableOp& op) {
    std::string what = concat({client_.text_of(op), " at clock ", client_.clock(), " is not done after ", time_text(clock_.to_ns(clock_.now() - op.account.arrival))});
    Rank peer = -1;
    if (const TablePart* const missing = client_.missing(op)) {
      peer = client_.server_of(missing->shard);
      what += concat({"; shard ", missing->shard, " at rank ", peer, missing->sent ? missing->is_push ? " has not confirmed it" : " has not answered" : " has no credit for it"});
    }
    throw Error(Errc::timeout, what, {rank_, peer, op.sequence, clock_.to_ns(clock_.now() - op.account.arrival)});
  }

  bool read_all() {
    bool any = false;
    for (; !broken_.empty(); any = true) {
      const Rank server = broken_.back();
      broken_.pop_back();
      client_.lost(server);
    }
    for (Connection& c : connections_)
      while (c.open && read(c)) any = true;
    return any;
  }
  /// True if a message came, or an end.
  bool read(Connection& c) {
    for (;;) {
      constexpr std::size_t head = sizeof(DoorMessage);
      const std::size_t all = c.have < head ? head : head + c.message.e.bytes, into = c.have < head ? 0 : c.have - head;
      const std::size_t at = c.to ? into : into % discarded;
      std::byte* const to = c.have < head ? c.head.data() + c.have : (c.to ? c.to : c.payload.data()) + at;
      if (c.have < all) {
        if (c.have > head && driven_) driven_->account.watch.enter(State::copy, clock_.now());
        const ssize_t got = c.door.stream().read(to, c.have < head || c.to ? all - c.have : std::min(all - c.have, discarded - at));
        if (driven_ && driven_->account.watch.state() == State::copy) driven_->account.watch.enter(State::protocol, clock_.now());
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
        if (got <= 0) return close(c, got == 0 ? "its server is gone, or the table is closed" : errno == EPROTO ? c.door.stream().problem() : errno_text(errno)), true;
        c.have += static_cast<std::size_t>(got);
      }
      if (c.have < head) continue;
      if (c.have == head && all == head) {
        std::memcpy(&c.message, c.head.data(), sizeof c.message);
        const Envelope& e = c.message.e;
        if (e.kind == MessageKind::leave) return is_over_ = true, close(c, "the table is closed"), true;
        const bool fits = e.kind == MessageKind::acknowledge || e.kind == MessageKind::reply || e.kind == MessageKind::refusal;
        if (!fits || e.shard >= table_.servers.size() || e.bytes > most_bytes || (e.flags & Envelope::is_direct) != 0 || (e.kind == MessageKind::refusal && e.bytes > 4096)) return close(c, "what it says makes no sense"), true;
        heard(c, c.message);
        c.to = e.bytes > 0 && e.kind == MessageKind::reply ? client_.place(e) : nullptr;
        if (!c.to) c.payload.resize(std::min<std::size_t>(e.bytes, discarded));
      }
      if (c.have < head + c.message.e.bytes) continue;
      c.have = 0;
      const Envelope e = c.message.e;
      std::byte* const placed = std::exchange(c.to, nullptr);
      if (TableOp* const op = client_.op_of(e.request)) op->moved.received += e.bytes;
      client_.received(c.server, e, placed || e.bytes > discarded ? Payload() : Payload::borrowed(c.payload.data(), e.bytes));
      return true;
    }
  }
  void close(Connection& c, const std::string& why) {
    c.open = false;
    c.problem = why;
    c.to = nullptr;
    c.door = DoorStream();
    client_.lost(c.server);
  }
  Connection& connection_to(Rank server) {
    return *std::find_if(connections_.begin(), connections_.end(), [&](const Connection& c) { return c.server == server; });
  }

  // TableHost
  Post::Parcel& parcel(Rank to) override {
    if (spare_.empty()) spare_.push_back(parcels_.emplace_back(std::make_unique<Post::Parcel>()).get());
    Post::Parcel* const p = spare_.back();
    spare_.pop_back();
    p->to = to;
    p->op = nullptr;
    return *p;
  }
  void send(Post::Parcel& p, const Envelope& e, std::span<const std::span<const std::byte>> pieces, const Lateness*) override {
    DoorMessage m;
    m.e = e;
    m.e.flags &= static_cast<std::uint8_t>(~Envelope::stays);  // nothing of this process's does
    std::array<iovec, 4> parts;
    std::size_t n = 0;
    parts[n++] = {&m, sizeof m};
    for (const auto& piece : pieces)
      if (!piece.empty()) parts[n++] = {const_cast<std::byte*>(piece.data()), piece.size()};
    if (auto* const op = static_cast<TableOp*>(p.op)) op->moved.sent += e.bytes, op->moved.overhead += sizeof m;
    const Rank to = p.to;
    p.payload = {};
    spare_.push_back(&p);
    write(connection_to(to), std::span(parts).first(n));
  }
  void send(Rank to, const Envelope& e, std::span<const std::byte> payload, const Lateness* late) override { send(parcel(to), e, std::span(&payload, payload.empty() ? 0 : 1), late); }
  /// All of it; what the server has no room for yet is waited for.
  void write(Connection& c, std::span<iovec> parts) {
    while (c.open && !parts.empty()) {
      if (driven_) driven_->account.watch.enter(State::copy, clock_.now());
      const ssize_t sent = c.door.stream().write(parts);
      if (driven_) driven_->account.watch.enter(State::protocol, clock_.now());
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
        broken_.push_back(c.server);  // not here: the client is at work
        c.open = false;
        c.problem = errno_text(errno);
        break;
      }
      if (sent < 0) {
        const Ticks begin = clock_.now();
        if (begin > until_) {  // half of a message cannot be taken back
          broken_.push_back(c.server);
          c.open = false;
          c.problem = concat({"it took nothing more of what was sent to it, within ", time_text(timeout_)});
          break;
        }
        pollfd one{c.door.stream().get(), static_cast<short>(c.door.stream().waits_to_read() ? POLLIN : POLLOUT), 0};
        (void)::poll(&one, 1, 100);
        if (!driven_) continue;
        const Ticks end = clock_.now();
        driven_->account.watch.blame(c.server, State::wait_credit, end - begin);
        driven_->account.watch.slept(end - begin);
        driven_->account.watch.resume(State::protocol, end);
        continue;
      }
      std::size_t left = static_cast<std::size_t>(sent);
      while (!parts.empty() && left >= parts.front().iov_len) left -= parts.front().iov_len, parts = parts.subspan(1);
      if (left > 0) parts.front() = {static_cast<std::byte*>(parts.front().iov_base) + left, parts.front().iov_len - left};
    }
  }
  void at_work(State) override {}
  Ticks now() const override { return clock_.now(); }
  std::span<std::byte> shared_of(Rank) const override { return {}; }
  bool uses(std::uint64_t request, const void*) const override {
    return std::any_of(connections_.begin(), connections_.end(), [&](const Connection& c) { return c.to && c.message.e.request == request; });
  }
  void disown() override {}
  bool is_gone(Rank r) const override {
    return std::none_of(connections_.begin(), connections_.end(), [&](const Connection& c) { return c.server == r && c.open; });
  }
  bool rename(Rank, Rank) override { return false; }
  bool may_answer(Rank) const override { return true; }
  std::string why_gone(Rank r) const override {
    const auto found = std::find_if(connections_.begin(), connections_.end(), [&](const Connection& c) { return c.server == r; });
    return found == connections_.end() ? "" : found->problem;
  }
  std::byte* place_here(const Envelope&, const Lateness*) override { return nullptr; }
  void copy_here(const Envelope&, std::byte*, const std::byte*, std::size_t) override {}

  // TableClient::Events
  void finished(TableOp& op) override {
    if (op.background) --under_way_;
    if (&op == driven_ && !waits_.empty()) blame_rest(op);
    op.account.watch.enter(State::protocol, clock_.now());
    op.report = accounting_ ? report_of(op.account.watch, clock_, op.account.heard ? op.account.latest.culprit : -1) : Report{};
    if (op.error && op.row) ++op.row->failed;
    op.account.heard = false;
    op.account.latest = {};
    fill(op.report, op.moved);
    op.report.ledger = ledger_->handle();
    op.report.sequence = op.sequence;
    if (op.row) op.report.algorithm = op.row->algorithm;
  }
  void copying(TableOp&) override {}
  void copied(TableOp&, std::uint64_t, std::uint64_t) override {}
  void heard_here(TableOp&, const Lateness*) override {}
  void book(TableOp& op) {
    if (op.booked || !op.row || !accounting_) return;
    op.booked = true;
    ledger_->book({op.row, bytes_of(table_, op), 0, op.account.arrival, &op.account.watch}, op.report, clock_);
    ledger_->settle();
  }

  static constexpr int most_under_way = 1000;  // a door hears no more of one guest at a time
  static constexpr std::uint64_t most_bytes = std::uint64_t{1} << 40;
  static constexpr std::size_t discarded = std::size_t{64} << 10;  // of what nobody waits for any more, at a time
  const Table table_;
  Clock clock_;
  nanoseconds timeout_;
  bool accounting_;
  Rank rank_;  // readers: one beyond all
  std::string way_;
  AccountSettings account_;
  std::unique_ptr<Ledger> ledger_;
  std::vector<Connection> connections_;  // by shard
  TableClient client_;
  std::string name_;
  std::vector<std::unique_ptr<Post::Parcel>> parcels_;
  std::vector<Post::Parcel*> spare_;
  std::vector<std::unique_ptr<TableOp>> all_;
  std::vector<TableOp*> free_;
  std::vector<Rank> broken_;
  std::vector<pollfd> polled_;
  std::vector<Wait> waits_;  // of what is driven, that nothing has ended yet
  TableOp* driven_ = nullptr;
  Ticks until_ = 0;
  int under_way_ = 0;  // in the background
  std::uint32_t number_ = 0;
  bool closed_ = false, is_over_ = false;
};

}  // namespace tally::inline v0::detail
