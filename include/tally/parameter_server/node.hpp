// SPDX-License-Identifier: Apache-2.0
// A rank of a table: its client, its server, and the one transport that both use. Whoever is in here drives all of it: a worker that
// waits serves others meanwhile. While the worker is elsewhere, a thread of the server's does; it sleeps where the transport wakes it,
// and lets a worker that comes go first. Who is gone is found out here, for both sides.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../account/ledger.hpp"
#include "../progress.hpp"
#include "../quiet_thread.hpp"
#include "client.hpp"
#include "door.hpp"
#include "seat.hpp"

namespace tally::inline v0::detail {

struct TableSettings {
  Clock clock = Clock::host();
  WaitPolicy wait = WaitPolicy::balanced;
  bool accounting = true;
  nanoseconds timeout = std::chrono::seconds(60);
  AccountSettings account = {};
  bool threaded = true;  // a thread serves while the worker is elsewhere
};

class TableNode final : public TableUser, private TableHost, private Post::Handler, private TableClient::Events {
 public:
  TableNode(std::unique_ptr<AnyTransport> transport, std::unique_ptr<SymmetricMemory> memory, Table table, std::shared_ptr<const void> rule, TableSettings settings)
      : transport_(std::move(transport)), memory_(std::move(memory)), table_(std::move(table)), rule_(std::move(rule)), clock_(settings.clock), timeout_(settings.timeout), accounting_(settings.accounting),
        pool_(shared_of(transport_->rank()).first(memory_ ? table_.arena_bytes() : 0)),
        ledger_(transport_->size() + table_.options.guests, transport_->rank(), transport_->name(), clock_, std::move(settings.account)), progress_(*transport_, clock_, settings.wait, settings.accounting),
        serving_(transport_->size() + table_.options.guests), gone_(static_cast<std::size_t>(transport_->size())), post_(*transport_, progress_, *this, pool_, table_.options.block_bytes),
        client_(*this, *this, table_), server_(*this, table_, pool_, rule_.get()), name_(text_of(table_.options.consistency)), retry_after_(clock_.to_ticks(table_.options.retry_after)), seat_(*transport_, clock_) {
    transport_->context = this;
    transport_->before_park = [](void* node) { static_cast<TableNode*>(node)->seat_.oust(); };
    post_.serving = &serving_;
    progress_.begin(serving_, timeout_);
    post_.open(*this);
    drain();
    progress_.rest();
    threaded_ = settings.threaded;  // also where nothing is served: what a worker has started goes on
    if (threaded_) thread_ = quiet_thread([this] { serve_others(); });
  }
  /// Says goodbye to nobody but the transport: close() does.
  ~TableNode() override {
    stop();
    visitors_.reset();
    post_.withdraw();
    book_serving(true);
    leave();
    ledger_.settle();
  }
  TableNode(const TableNode&) = delete;

  const Table& table() const override { return table_; }
  Rank rank() const override { return transport_->rank(); }
  std::uint64_t clock() const { return client_.clock(); }
  bool is_worker() const override { return client_.is_worker(); }
  const Ledger& ledger() const { return ledger_; }
  nanoseconds timeout() const { return timeout_; }

  TableOp& take() override {
    const std::lock_guard lock(ops_mutex_);
    if (free_.empty()) {
      all_.push_back(std::make_unique<TableOp>(transport_->size() + table_.options.guests));
      free_.push_back(all_.back().get());
    }
    TableOp* const op = free_.back();
    free_.pop_back();
    op->reset();
    return *op;
  }
  Report run(TableOp& op) override {
    return complete(op, [&] { start(op); });
  }
  /// A shard is asked for something that is no push or pull, with `payload`. Returns the answer, of which up to `capacity` bytes go to `out`.
  Envelope ask(int shard, const Envelope& e, std::vector<std::byte>&& payload, std::byte* out = nullptr, std::size_t capacity = 0) {
    TableOp& op = take();
    op.rows_in = std::move(payload);
    op.call = {};
    op.call.what = Collective::leave;  // of what is booked the least like it
    op.call.out = out;
    op.capacity = capacity;
    op.asked = e;
    Envelope answer;
    complete(op, [&] { client_.ask(op, shard, e); }, &answer);
    return answer;
  }
  void start_in_background(TableOp& op) override {
    const Ticks called = clock_.now();
    const Inside inside(*this);
    begin(op, true, called);
    attempt([&] {
      start(op);
      drain();
      transport_->flush();
    });
    if (failed_ && !op.done) fail(op);
    op.exposed = progress_.rest() - called;
  }
  bool is_done(TableOp& op) override {
    const Inside inside(*this);
    if (!op.done) wait_for([&] { return op.done; }, op, nanoseconds{0});
    return op.done;
  }
  Report wait(TableOp& op) override {
    const Ticks before = clock_.now();
    const Inside inside(*this);
    if (!op.done) {
      wait_for([&] { return op.done; }, op, timeout_of(op));
      op.exposed += clock_.now() - before;
    }
    if (!op.booked) book(op);
    Report report = op.report;
    report.exposed = std::min(report.elapsed - report.undriven, clock_.to_ns(op.exposed));
    if (op.error) std::rethrow_exception(op.error);
    return report;
  }
  void abandon(TableOp& op) override {
    const Inside inside(*this);
    try {
      if (!op.done) wait_for([&] { return op.done; }, op, timeout_of(op));
      if (!op.booked) book(op);
    } catch (const Error&) {  // who waited for it would have heard
    }
    give_back(op);
  }
  void tick_to(std::uint64_t clock) {
    const Inside inside(*this);
    expect_usable();
    client_.expect_pushing();
    progress_.drive(timeout_);
    attempt([&] {
      client_.tick_to(clock);
      drain();
      transport_->flush();
    });
    progress_.rest();
    if (failed_) throw *failed_;
  }
  /// This worker leaves; then this rank serves until nobody needs what it keeps.
  void close() {
    if (closed_) return;
    closed_ = true;
    if (client_.is_worker()) {
      TableOp& op = take();
      op.call = {};
      op.call.what = Collective::leave;
      op.call.timeout = timeout_;
      complete(op, [&] {
        while (!client_.is_settled()) turn();
        client_.leave(op);
      });
    }
    serve();
  }
  /// Until no worker needs what this rank keeps.
  void serve() {
    if (client_.is_worker() && !closed_) throw Error(Errc::invalid_argument, "serve: this rank is a worker, whose server serves anyway; close() when its work is done");
    const Inside inside(*this);
    if (failed_) throw *failed_;
    forever_ = true;
    progress_.drive_until(far());
    progress_.serve(serving_);
    attempt([&] {
      while (server_.is_needed() || !post_.idle()) turn();
      transport_->flush();
      if (visitors_) visitors_->say_goodbye();
      visitors_.reset();
      for (const Ticks end = clock_.now() + clock_.to_ticks(timeout_); transport_->has_rest() && clock_.now() < end;) transport_->settle(), std::this_thread::yield();
    });
    forever_ = false;
    progress_.rest();
    if (failed_) throw *failed_;
  }
  /// Guests may come in by this door.
  void let_in(std::unique_ptr<TableDoor> door) {
    const Inside inside(*this);
    visitors_ = std::make_unique<Visitors>(std::move(door), static_cast<Rank>(table_.size + table_.options.guests));
  }
  /// There is news for who drives this rank. By any thread.
  void wake() { transport_->interrupt(); }
  /// f(server) while nobody else is in here.
  template <class F>
  auto look(F&& f) {
    const Inside inside(*this);
    return f(server_);
  }
  TransportCounters counters() {
    const Inside inside(*this);
    return transport_->counters();
  }
  /// Bytes of all reports so far, what is still being served included; and what the transport has counted.
  std::pair<Moved, TransportCounters> traffic() {
    const Inside inside(*this);
    Moved all = serving_moved_;
    for (const LedgerRow& row : ledger_.rows()) all.sent += row.bytes_sent, all.received += row.bytes_received;
    return {all, transport_->counters()};
  }

  // For Progress (see ProgressClient).
  OperationAccount& account_of(const Transfer& t) { return post_.account_of(t); }
  static State rest_of(const Transfer& t) { return Post::rest_of(t); }
  OperationAccount& waiting() { return waited_ ? waited_->account : serving_; }
  void check(Transfer& t, const FrameInfo& frame) { post_.check(t, frame); }
  void moved(Transfer& t) {
    count(t);
    post_.moved(t);
  }
  static std::uint16_t called() { return 0; }
  static Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  void check_peers() { watch(); }
  static Rank first_lost() { return -1; }
  static void raise_lost(Rank) {}
  [[noreturn, gnu::cold]] void raise_abort() {
    const AbortNotice notice = transport_->abort_notice();
    throw Error(notice.code, notice.text, {rank(), notice.peer < 0 ? notice.rank : notice.peer, 0, {}});
  }
  [[gnu::cold]] void expired() {
    if (forever_ || !waited_) return void(out_of_time_ = true);
    if (!limit_is_error_) return void(out_of_time_ = true);
    TableOp& op = *waited_;
    const TablePart* const missing = client_.missing(op);
    std::string what = concat({client_.text_of(op), " at clock ", client_.clock(), " is not done after ", time_text(progress_.waited())});
    Rank peer = -1;
    if (missing) {
      peer = client_.server_of(missing->shard);
      what += concat({"; shard ", missing->shard, " at rank ", peer, missing->sent ? missing->is_push ? " has not confirmed it" : " has not answered" : " has no credit for it"});
      if (const Shard* shard = peer == rank() ? server_.shard(missing->shard) : nullptr; shard && shard->slowest() >= 0)
        what += concat({"; its slowest worker, rank ", table_.workers[static_cast<std::size_t>(shard->slowest())], ", is at clock ", shard->version()});
    }
    throw Error(Errc::timeout, what, {rank(), peer, op.sequence, progress_.waited()});
  }
  static Ticks expected_wait() { return 0; }
  bool interrupted() const { return visitors_ && visitors_->has_news(); }
  static bool has_neighbours() { return false; }
  static bool look_elsewhere() { return false; }

 private:
  /// A thread of the caller's is in here.
  struct Inside {
    explicit Inside(TableNode& n) : node(n) {
      if (node.thread_.joinable()) node.seat_.enter();
    }
    ~Inside() {
      if (node.thread_.joinable()) node.seat_.leave();
    }
    Inside(const Inside&) = delete;
    TableNode& node;
  };

  /// An operation that f() starts, to its end.
  template <class F>
  Report complete(TableOp& op, F&& f, Envelope* answer = nullptr) {
    const Ticks called = clock_.now();
    const Inside inside(*this);
    begin(op, false, called);
    attempt([&] {
      f();
      while (!op.done) turn();
      if (!threaded_) look_after_others();
      transport_->flush();
    });
    if (!op.done) fail(op);
    progress_.stop();
    const Report report = op.report;
    const auto error = op.error;
    if (answer) *answer = op.answer;
    give_back(op);
    if (error) std::rethrow_exception(error);
    return report;
  }

  // TableHost
  Post::Parcel& parcel(Rank to) override { return post_.parcel(to); }
  void send(Post::Parcel& p, const Envelope& e, std::span<const std::span<const std::byte>> pieces, const Lateness* late) override {
    if (p.to >= transport_->size()) return send_out(p, e, pieces, late);
    if (p.to != rank()) {
      if (is_gone(p.to)) return drop(p);
      TableOp* const op = static_cast<TableOp*>(p.op);
      return post_.send(*this, p, e, pieces, op ? op->account : serving_, late);
    }
    if (e.kind == MessageKind::reply) {
      client_.take(e, pieces, late);
    } else if (e.kind == MessageKind::acknowledge || e.kind == MessageKind::refusal) {
      client_.received(rank(), e, pieces.empty() ? Payload() : Payload::borrowed(pieces[0].data(), pieces[0].size()));
    } else if (pieces.size() > 1) {
      Payload joined(pool_, e.bytes);
      std::size_t at = 0;
      for (const auto& piece : pieces) {
        if (!piece.empty()) std::memcpy(joined.data() + at, piece.data(), piece.size()), at += piece.size();
      }
      server_.received(rank(), e, std::move(joined), clock_.now());
    } else {
      server_.received(rank(), e, pieces.empty() ? Payload() : Payload::borrowed(pieces[0].data(), pieces[0].size(), (e.flags & Envelope::stays) != 0), clock_.now());
    }
    drop(p);
  }
  void send(Rank to, const Envelope& e, std::span<const std::byte> payload, const Lateness* late) override {
    send(post_.parcel(to), e, std::span(&payload, payload.empty() ? 0 : 1), late);
  }
  void drop(Post::Parcel& p) {
    server_.let_go(p);
    post_.recycle(p);
  }
  void at_work(State state) override { progress_.serve(serving_), progress_.enter(state); }
  Ticks now() const override { return clock_.now(); }
  std::span<std::byte> shared_of(Rank r) const override { return memory_ && r < transport_->size() ? std::span(memory_->of(r), table_.shared_bytes()) : std::span<std::byte>{}; }
  bool uses(std::uint64_t request, const void* op) const override { return post_.uses(op) || post_.receives(request); }
  std::uint64_t bound(const Envelope& e) const override {
    std::size_t part = std::size_t{128} << 20;  // of snapshots
    if (e.tensor < table_.tensors.size()) part = std::max(part, table_.part(e.tensor, 0).count * table_.rule.grain);
    if (e.kind == MessageKind::reply)
      if (const TableOp* op = client_.op_of(e.request)) part = std::max<std::size_t>(part, op->call.count * table_.rule.grain * std::max<std::size_t>(table_.tensors[op->call.tensor].row, 1));
    return std::max(part, table_.credits());
  }
  void disown() override { server_.own_all(table_.worker_at(rank())); }
  bool is_gone(Rank r) const override { return r >= transport_->size() ? !visitors_ || !visitors_->is_here(r) : gone_[static_cast<std::size_t>(r)] == Gone::yes; }
  bool may_answer(Rank r) const override { return r < transport_->size() || (visitors_ && visitors_->may_answer(r)); }
  bool rename(Rank guest, Rank r) override { return visitors_ && visitors_->rename(guest, r); }
  std::byte* place_here(const Envelope& e, const Lateness* late) override {
    if (TableOp* const op = client_.op_of(e.request)) heard_here(*op, late);
    return client_.place(e);
  }
  void copy_here(const Envelope& e, std::byte* to, const std::byte* from, std::size_t bytes) override { client_.copy_here(e, to, from, bytes); }
  /// To a guest.
  void send_out(Post::Parcel& p, const Envelope& e, std::span<const std::span<const std::byte>> pieces, const Lateness* late) {
    DoorMessage message;
    message.e = e;
    if (late) message.late_age = static_cast<std::uint64_t>(clock_.to_ns(clock_.now() - std::min(late->until, clock_.now())).count()), message.culprit = late->culprit;
    if (!visitors_ || !visitors_->send(p, message, pieces)) return drop(p);
    serving_moved_.sent += e.bytes, serving_moved_.overhead += sizeof message;
  }
  /// What guests have said.
  bool hear_guests() {
    if (!visitors_) return false;
    return visitors_->hear(
        [&](Rank guest, const Envelope& e, std::span<const std::byte> bytes) {
          at_work(State::protocol);
          serving_moved_.received += bytes.size();
          server_.received(guest, e, Payload::borrowed(bytes.data(), bytes.size()), clock_.now());
        },
        [&](Rank guest) { server_.lost(guest); },
        [&](Post::Parcel& p) {
          const Rank guest = p.to;
          drop(p);
          server_.resume(guest);
        });
  }

  // Post::Handler
  std::byte* place(Rank, const Envelope& e) override { return client_.place(e); }
  void received(Rank peer, const Envelope& e, Payload&& payload, Ticks sent_at) override {
    if (e.kind == MessageKind::acknowledge || e.kind == MessageKind::reply || e.kind == MessageKind::refusal) client_.received(peer, e, std::move(payload));
    else server_.received(peer, e, std::move(payload), sent_at);
  }
  void sent(Post::Parcel& parcel) override {
    server_.let_go(parcel);
    if (TableOp* const op = static_cast<TableOp*>(parcel.op); op && op->failing && client_.op_of(op->request) == op) client_.end_if_unused(*op);
  }
  OperationAccount* account_of(Rank peer, std::uint64_t fingerprint) override {
    TableOp* const op = fingerprint == Post::credit ? client_.starved_of(peer) : client_.op_of(fingerprint);
    return op ? &op->account : nullptr;
  }

  // TableClient::Events
  void finished(TableOp& op) override {
    if (op.error) {
      op.report = progress_.finish_failed(op.account, -1, State::wait_transfer);
      if (op.row) ++op.row->failed;
    } else {
      op.report = progress_.finish(op.account);
    }
    fill(op.report, op.moved);
    op.report.ledger = ledger_.handle();
    op.report.sequence = op.sequence;
    if (op.row) op.report.algorithm = op.row->algorithm;
    if (!op.background) book(op);
  }
  void copying(TableOp& op) override { progress_.serve(op.account), progress_.enter(State::copy); }
  void copied(TableOp& op, std::uint64_t stored, std::uint64_t loaded) override {
    progress_.enter(State::protocol);
    transport_->shared(stored, loaded);
    op.moved.sent += stored, op.moved.received += loaded;
    counted_.bytes_sent += stored, counted_.bytes_received += loaded;
  }
  void heard_here(TableOp& op, const Lateness* late) override { progress_.released(op.account, late ? *late : Lateness{0, rank()}); }

  /// What the transport has moved since it was asked last was for this transfer.
  void count(const Transfer& t) {
    const TransportCounters now = transport_->counters();
    TableOp* op = t.is_send ? static_cast<TableOp*>(static_cast<Post::Parcel*>(t.owner)->op) : client_.op_of(t.fingerprint);
    Moved& whose = op ? op->moved : serving_moved_;
    whose.sent += now.bytes_sent - counted_.bytes_sent;
    whose.received += now.bytes_received - counted_.bytes_received;
    whose.overhead += now.overhead_sent - counted_.overhead_sent;
    counted_ = now;
  }
  void expect_usable() const {
    if (failed_) throw *failed_;
    if (closed_) throw Error(Errc::invalid_argument, "this table is closed");
  }
  void begin(TableOp& op, bool background, Ticks called) {
    if (failed_ || (closed_ && op.call.what != Collective::leave)) give_back(op);
    if (failed_) throw *failed_;
    if (closed_ && op.call.what != Collective::leave) throw Error(Errc::invalid_argument, "this table is closed");
    if (timeout_of(op) <= nanoseconds{0}) op.call.timeout = timeout_;
    book_serving(false);
    op.background = background;
    op.sequence = ++number_;
    progress_.begin(op.account, timeout_of(op));
    op.deadline = clock_.now() + clock_.to_ticks(timeout_of(op));
    if (accounting_ && called < op.account.arrival) {  // the server's thread had to go first
      const Ticks waited = op.account.arrival - called;
      op.account.arrival = called;
      op.account.watch.book(State::wait_local, waited);
    }
    op.row = &row_of(ledger_, table_, op, name_);
    waited_ = background ? nullptr : &op;
    limit_is_error_ = true;
  }
  static nanoseconds timeout_of(const TableOp& op) { return op.call.timeout; }
  void start(TableOp& op) {
    if (transport_->aborted()) raise_abort();
    try {
      client_.start(op);
    } catch (const Error& error) {
      if (error.errc() != Errc::invalid_argument && error.errc() != Errc::aborted) throw;
      client_.fail(op, std::current_exception());  // it is refused, and nothing of it was sent
    }
  }
  void book(TableOp& op) {
    if (op.booked) return;
    op.booked = true;
    if (!op.row || !accounting_) return;
    if (op.background) op.report.exposed = std::min(op.report.elapsed - op.report.undriven, clock_.to_ns(op.exposed));
    ledger_.book({op.row, bytes_of(table_, op), 0, op.account.arrival, &op.account.watch}, op.report, clock_);
    ledger_.settle();
  }
  /// What was done for others, now and then. By the caller's thread: the ledger is its.
  void book_serving(bool all) {
    if (!accounting_ || (!server_.keeps_any() && serving_moved_.sent + serving_moved_.received == 0)) return;
    const Ticks now = clock_.now();
    if (!all && now - serving_.arrival < clock_.to_ticks(std::chrono::milliseconds(100))) return;
    progress_.drive(timeout_);
    Report report = progress_.finish(serving_);
    report.ledger = ledger_.handle();
    report.sequence = ++number_;
    report.exposed = nanoseconds{0};
    fill(report, serving_moved_);
    LedgerRow& row = ledger_.row(Collective::serve, 0, name_);
    ledger_.book({&row, 0, 0, serving_.arrival, &serving_.watch}, report, clock_);
    ledger_.settle();
    progress_.begin(serving_, timeout_);
    progress_.rest();
  }
  void give_back(TableOp& op) {
    waited_ = nullptr;
    const std::lock_guard lock(ops_mutex_);
    free_.push_back(&op);
  }

  template <class F>
  void attempt(F&& f) try {
    f();
  } catch (...) {
    on_error();
  }
  /// In a handler. An operation that missed its deadline fails alone where nothing of its memory is under way; all else ends this rank's table.
  [[gnu::cold]] void on_error() {
    const std::exception_ptr thrown = std::current_exception();
    try {
      throw;
    } catch (const Error& error) {
      if (waited_ && !waited_->done && error.errc() == Errc::timeout && !uses(waited_->request, waited_)) return client_.fail(*waited_, thrown);
      give_up(error);
    } catch (const std::exception& error) {
      give_up(Error(Errc::aborted, {"a table's rule threw: ", error.what()}));
    } catch (...) {
      give_up(Error(Errc::aborted, "a table's rule threw"));
    }
  }
  [[gnu::cold]] void give_up(const Error& error) {
    if (!failed_) failed_.emplace(error);
    visitors_.reset();
    post_.withdraw();
    drain_quietly();
    leave();
    if (waited_ && !waited_->done) fail(*waited_);
  }
  /// With the table.
  void fail(TableOp& op) {
    client_.fail(op, std::make_exception_ptr(*failed_));
    client_.end_if_unused(op);
  }
  void leave() {
    if (!std::exchange(left_, true)) transport_->leave();
  }
  void drain_quietly() {
    try {
      post_.deliver(*this);
    } catch (const std::exception&) {  // the first reason is the one that counts
    }
  }

  void turn() {
    if (server_.has_work()) {
      step();
    } else {
      progress_.turn(*this);
      hear_guests();
      drain();
    }
    if (++turns_ % 32 != 0) return;
    // Where there is always something to do nobody waits, and Progress looks neither at peers nor at deadlines.
    const Ticks now = clock_.now();
    if (now - looked_ > clock_.to_ticks(std::chrono::milliseconds(20))) looked_ = now, watch();
    if (waited_ && !waited_->done && limit_is_error_ && now > waited_->deadline) expired();
  }
  bool step() {
    const bool moved = progress_.poll(*this), heard = hear_guests();
    return drain() || moved || heard || server_.work_ahead();
  }
  bool drain() { return post_.deliver(*this); }
  template <class Done>
  void wait_for(Done&& done, TableOp& op, nanoseconds limit) {
    const bool once = limit == nanoseconds{0};
    progress_.drive(once ? timeout_ : limit);
    waited_ = &op;
    limit_is_error_ = !once;
    out_of_time_ = false;
    attempt([&] {
      if (failed_) throw *failed_;
      if (!once) {
        while (!done() && !out_of_time_) turn();
      } else {
        step();
        const Ticks now = clock_.now();
        if (now - looked_ > clock_.to_ticks(std::chrono::milliseconds(20))) looked_ = now, watch();
        limit_is_error_ = true;
        if (!op.done && now > op.deadline) expired();
      }
      transport_->flush();
    });
    if (failed_ && !op.done) fail(op);
    waited_ = nullptr;
    progress_.rest();
  }

  /// Looks who is gone: found twice, with everything that it sent before taken in between.
  void watch() {
    const Ticks now = clock_.now();
    for (Rank r = 0; r < transport_->size(); ++r) {
      Gone& g = gone_[static_cast<std::size_t>(r)];
      if (r == rank() || g == Gone::yes || transport_->liveness(r) == Liveness::alive) continue;
      if (std::exchange(g, Gone::perhaps) != Gone::perhaps) continue;
      g = Gone::yes;
      post_.forget(r);
      drain();
      client_.lost(r);
      server_.lost(r);
    }
    server_.settle();
    if (retry_after_ > 0) client_.retry(now, retry_after_), server_.retry(now, retry_after_);
    drain();
  }

  /// Where there is no thread for it.
  void look_after_others() {
    if (const Ticks now = clock_.now(); now - looked_ > clock_.to_ticks(std::chrono::milliseconds(20))) looked_ = now, watch();
    step();
  }

  // The server's thread.

  void serve_others() {
    const Ticks spin = clock_.to_ticks(std::chrono::microseconds(20)), look = clock_.to_ticks(std::chrono::milliseconds(20));
    Seat::Lock lock = seat_.begin();
    while (!seat_.is_over()) {
      progress_.drive_until(far());
      waited_ = nullptr;
      attempt([&] {
        for (Ticks since = 0; !seat_.is_wanted();) {
          const Ticks now = clock_.now();
          if (now - looked_ > look) looked_ = now, watch();
          if (step()) since = clock_.now();
          else if (now - since > spin || transport_->crowded()) break;
          else cpu_pause();
        }
        transport_->flush();
      });
      progress_.rest();
      if (failed_) return;
      if (seat_.give_way(lock)) continue;
      attempt([&] {
        seat_.sleep(lock, std::chrono::milliseconds(25), [&] {
          progress_.drive_until(far());
          const bool moved = step();
          progress_.rest();
          return moved;
        });
      });
    }
  }
  Ticks far() const { return clock_.now() + clock_.to_ticks(longest_timeout); }
  void stop() {
    if (!thread_.joinable()) return;
    seat_.stop();
    thread_.join();
  }

  enum class Gone : std::uint8_t { no, perhaps, yes };

  std::unique_ptr<AnyTransport> transport_;
  std::unique_ptr<SymmetricMemory> memory_;  // that ranks share, where they do
  const Table table_;
  std::shared_ptr<const void> rule_;
  Clock clock_;
  nanoseconds timeout_;
  bool accounting_;
  Pool pool_;
  Ledger ledger_;
  Progress<AnyTransport> progress_;
  OperationAccount serving_;
  std::vector<Gone> gone_;
  Post post_;
  TableClient client_;
  TableServer server_;
  std::unique_ptr<Visitors> visitors_;
  std::string name_;
  Ticks retry_after_, looked_ = 0;
  TransportCounters counted_;
  Moved serving_moved_;
  std::uint32_t number_ = 0, turns_ = 0;
  TableOp* waited_ = nullptr;
  bool limit_is_error_ = true, out_of_time_ = false, forever_ = false, closed_ = false, left_ = false;
  std::optional<Error> failed_;
  std::mutex ops_mutex_;
  std::vector<std::unique_ptr<TableOp>> all_;
  std::vector<TableOp*> free_;

  Seat seat_;
  bool threaded_ = false;
  std::thread thread_;
};

}  // namespace tally::inline v0::detail
