// SPDX-License-Identifier: Apache-2.0
// Runs calls: plans their algorithms (once per layout, then from a cache), posts all their network steps, and keeps
// the watermarks of each step: up to `ready` bytes it may go, `done` bytes it has gone. Streaming, overlap of steps
// and hazards all follow from the plan; several operations in flight follow from the order in which they were posted, which
// is the same on all ranks. In the steady state nothing is allocated or locked.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "account/ledger.hpp"
#include "call.hpp"
#include "prepared.hpp"
#include "progress.hpp"
#include "run.hpp"
#include "share_work.hpp"
#include "thread_rule.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

template <Transport T>
class Engine final : public AnyEngine {
 public:
  Engine(std::unique_ptr<T> transport, const Clock& clock, ModelMeter model, WaitPolicy wait = WaitPolicy::balanced, bool accounting = true)
      : transport_(std::move(transport)), clock_(clock), wait_(wait), accounting_(accounting), ledger_(transport_->size(), transport_->rank(), transport_->name(), model), progress_(*transport_, clock, wait, accounting) {
    for (int i = 0; i < 2; ++i) free(*runs_.emplace_back(std::make_unique<Run>(size())));
  }
  ~Engine() override {
    leave();
    ledger_.settle();  // while the stopwatches it reads are there
  }

  Report run(const Call& call) override {
    const Use use(*this);
    if (first_) refuse_overlaps(call);
    Run& run = take_run();
    run.call = &call;
    return to_end(run, call.timeout, [&] {
      post(run);
      if (call.algorithm.share) shares_.run(run);
      else drive(run);
      if (call.finish && call.layout.output_count() > 0) {
        progress_.enter(State::reduce);
        call.finish(call.output, call.layout.output_count(), size());
      }
    });
  }
  std::shared_ptr<void> pin(const Call& call) override { return plans_.find(PlanKey(call)); }

  Report run(const Message& message, Message* received) override {
    const Use use(*this);
    Run& run = take_run();
    return to_end(run, message.timeout, [&] {
      post(run, message);
      if (run.remaining > 0 && message.peer == rank() && !message.is_send) throw Error(Errc::invalid_argument, {"rank ", rank(), " would wait for a message from itself for ever: send it first"});
      drive(run);
      if (received) *received = run.message;
    });
  }

  Run* start(const Call& call, std::shared_ptr<const void> kept) override {
    const Use use(*this);
    refuse_overlaps(call);
    Run& run = take_run();
    run.own_call = call;
    run.call = &run.own_call;
    run.kept = std::move(kept);
    return in_background(run, call.timeout, [&] { post(run); });
  }
  Run* start(const Message& message) override {
    const Use use(*this);
    Run& run = take_run();
    return in_background(run, message.timeout, [&] { post(run, message); });
  }
  bool wait(Run& run, const nanoseconds* at_most) override {
    if (run.done.load(std::memory_order_acquire)) return true;
    const Use use(*this, true);
    if (run.done.load(std::memory_order_relaxed)) return true;
    const Ticks begin = accounting_ ? clock_.now() : 0;
    progress_.drive(at_most ? *at_most : run.timeout);
    limit_is_error_ = !at_most;
    out_of_time_ = false;
    waited_ = &run;
    try {
      if (at_most && *at_most <= nanoseconds{0}) once();
      else
        while (!run.done.load(std::memory_order_relaxed) && !out_of_time_) turn();
      transport_->flush();
    } catch (...) {
      fail();
    }
    waited_ = nullptr;
    progress_.rest();
    if (accounting_) run.exposed += clock_.now() - begin;
    return run.done.load(std::memory_order_relaxed);
  }
  Report fetch(Run& run) override {
    const Use use(*this, true);
    book(run);
    if (run.error) std::rethrow_exception(run.error);
    return run.report;
  }
  void give_back(Run& run) override {
    wait(run, nullptr);
    const Use use(*this, true);
    book(run);
    run.kept = nullptr;
    run.error = nullptr;
    run.continuation = nullptr;
    free(run);
  }
  void then(Run& run, std::function<void()> f) override {
    {
      const Use use(*this, true);
      if (!run.done.load(std::memory_order_relaxed)) {
        run.continuation = std::move(f);
        return;
      }
    }
    f();
  }
  bool drive(nanoseconds patience) override {
    std::vector<std::function<void()>> continuations;
    bool more = false;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock) return true;
      if (!first_ || failed_) return false;
      const Ticks limit = clock_.to_ticks(patience);
      Ticks moved = clock_.now();
      progress_.drive(first_->timeout, first_->account.arrival);
      limit_is_error_ = true;
      try {
        for (std::uint64_t seen = moves_; first_ && wanted_.load(std::memory_order_relaxed) == 0;) {
          turn();
          if (seen == moves_ && clock_.now() - moved > limit) break;
          if (seen != moves_) moved = clock_.now(), seen = moves_;
        }
        transport_->flush();
      } catch (...) {
        fail();
      }
      progress_.rest();
      more = first_ != nullptr;
      continuations.swap(continuations_);
    }
    for (const auto& f : continuations) f();
    return more;
  }
  void be_driven_by_others() override { driven_by_others_ = true; }

  void leave() override {
    if (driven_by_others_) lock();
    if (!failed_) failed_.emplace(Errc::invalid_argument, "this communicator is gone");
    give_up();
    transport_->leave();
    if (driven_by_others_) mutex_.unlock();
  }
  [[gnu::cold]] void abort(const std::string& why) override {
    transport_->abort({Errc::aborted, rank(), -1, detail::concat({"rank ", rank(), " aborted the communicator", why.empty() ? "" : ": ", why})});
  }

  Rank rank() const override { return transport_->rank(); }
  int size() const override { return transport_->size(); }
  const Ledger& ledger() const override { return ledger_; }
  TransportCounters counters() const override { return transport_->counters(); }
  std::string_view transport_name() const override { return transport_->name(); }
  std::uint64_t reserve(std::span<const Rank> members) override { return transport_->reserve(members); }
  std::unique_ptr<AnyEngine> open(std::uint64_t token, std::span<const Rank> members) override { return std::make_unique<Engine>(transport_->open(token, members), clock_, ledger_.meter(), wait_, accounting_); }
  void release(std::uint64_t token) override { transport_->release(token); }
  void discard(std::uint64_t token, std::span<const Rank> members) override { transport_->discard(token, members); }
  std::uint64_t reserve_memory(std::size_t stride) override {
    if constexpr (DirectAccess<T>) {
      std::size_t bytes = 0;
      const auto pages = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)), page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
      // Shared memory that is not there is noticed when it is first touched, by the kernel, who ends the process.
      if (__builtin_mul_overflow(stride, static_cast<std::size_t>(size()), &bytes) || bytes / page > pages)
        throw Error(Errc::no_resources, {size(), " times ", stride, " bytes are more than the ", pages * page, " bytes of memory that this host has"});
      return transport_->reserve(bytes);
    } else {
      throw Error(Errc::unsupported, {"the ranks of this communicator share no memory: ", transport_->name()});
    }
  }
  std::unique_ptr<SymmetricMemory> map_memory(std::uint64_t token, std::size_t stride) override {
    if constexpr (DirectAccess<T>)
      // Tokens of processes are places in the job's file, so their page numbers are distinct. Threads name addresses.
      return std::make_unique<SymmetricMemory>(transport_->map(token, stride * static_cast<std::size_t>(size())), stride, size(), rank(),
                                               transport_->one_address_space() ? 0 : 1 + (token >> 12) % ((std::uint64_t{1} << 24) - 1));
    else return nullptr;
  }
  void discard_memory(std::uint64_t token, std::size_t stride) override {
    if constexpr (DirectAccess<T>) transport_->discard(token, stride * static_cast<std::size_t>(size()));
  }
  bool one_address_space() const override {
    if constexpr (DirectAccess<T>) return transport_->one_address_space();
    else return false;
  }

  bool stages() const override {
    if constexpr (DirectAccess<T>) return transport_->staging_bytes() > 0;
    else return false;
  }
  std::string kernel_problem() const override { return shares_.kernel_problem(); }

  // For Progress (see ProgressClient).

  Account& account_of(const Transfer& t) {
    serving_ = static_cast<Run*>(t.owner);
    return serving_->account;
  }
  Account& oldest() { return first_ ? first_->account : serving_->account; }
  bool interrupted() const { return wanted_.load(std::memory_order_relaxed) != 0; }

  void check(const Transfer& t, const FrameInfo& frame) {
    const Run& run = *static_cast<const Run*>(t.owner);
    if (!run.call) return check_message(run, frame);
    const auto ahead = static_cast<std::int32_t>(frame.operation - t.operation);
    if (ahead != 0) raise_out_of_step(run, t.peer, frame, ahead);
    if (frame.has_fingerprint && frame.fingerprint != run.fingerprint) raise_mismatch(run, t.peer, frame.fingerprint);
    if (frame.total != t.bytes)
      raise(Errc::mismatch, run, t.peer, {"rank ", t.peer, " sends ", frame.total, " bytes where rank ", rank(), " expects ", t.bytes, " in ", describe_step(run, t.step)});
    if (frame.first != (t.done == 0) || frame.bytes > t.bytes - t.done || frame.last != (frame.bytes == t.bytes - t.done) || frame.bytes % t.grain != 0)
      raise(Errc::protocol, run, t.peer, {"rank ", t.peer, " cuts a message in another way than ", describe_step(run, t.step), " can read"});
  }

  void moved(Transfer& t) {
    Run& run = *static_cast<Run*>(t.owner);
    count(run);
    ++moves_;
    if (!t.pending && --run.remaining == 0 && (run.background || run.receiver || !run.in_flight)) {
      run.next = finished_;
      finished_ = &run;
    }
    if (run.active) propagate(run, t.step);
  }
  /// A message that no receive waits for: it is taken in, so that those behind it can be received.
  Transfer* unexpected(Rank peer, const FrameInfo& frame) {
    if (frame.total > most_unexpected - std::min(most_unexpected, unexpected_bytes_))
      raise(Errc::no_resources, *first_, peer, {"rank ", peer, " has sent rank ", rank(), " more than ", most_unexpected, " bytes of messages that it does not receive; rank ", rank(), " is in ", describe(*first_)});
    unexpected_bytes_ += frame.total;
    Run& run = take_run();
    run.message = {false, peer, static_cast<std::int32_t>(frame.fingerprint), nullptr, frame.total, static_cast<ElementType>(frame.operation >> 16), static_cast<std::uint16_t>(frame.operation), {}};
    run.buffer.resize(frame.total);
    run.message.data = run.buffer.data();
    aim(run);
    run.account.watch.start(first_->account.watch.mark());
    unexpected_.push_back(&run);
    return &run.transfer;
  }

  [[gnu::cold]] void check_peers() {
    for (Rank r = 0; r < size(); ++r) {
      const RankStatus status = transport_->status(r);
      for (const Run* run = first_; run && r != rank() && status.inside == RankStatus::inside_operation; run = run->after)
        if (run->call && status.sequence == run->sequence && status.fingerprint != run->fingerprint) raise_mismatch(*run, r, status.fingerprint);
    }
  }
  [[gnu::cold]] Rank first_lost() {
    Rank lost = -1;
    for_each_needed([&](const Transfer& t) {
      if (lost < 0 && transport_->liveness(t.peer) != Liveness::alive) lost = t.peer;
    });
    return lost;
  }
  [[noreturn, gnu::cold]] void raise_lost(Rank peer) {
    // Who aborts may be gone right after: why it went is in its notice.
    if (transport_->aborted()) raise_abort();
    const bool left = transport_->liveness(peer) == Liveness::left;
    raise(left ? Errc::peer_left : Errc::peer_lost, stuck(), peer,
          {"rank ", peer, left ? " left the communicator" : " died", " while ", missing(), "; ", last_seen()});
  }
  [[gnu::cold]] void expired() {
    if (!limit_is_error_) {
      out_of_time_ = true;
      return;
    }
    const Rank late = late_rank();
    raise(Errc::timeout, stuck(), late >= 0 ? late : first_missing(),
          {missing(), " after ", detail::time_text(progress_.waited()), late >= 0 ? detail::concat({"; rank ", late, " has not called it; "}) : "; ", last_seen()});
  }
  [[noreturn, gnu::cold]] void raise_abort() {
    const AbortNotice notice = transport_->abort_notice();
    detected_ = true;
    throw Error(notice.code, notice.text, {rank(), blamed(notice), stuck().sequence, progress_.waited()});
  }

  // For ShareWork.

  /// What the transport has moved since it was asked last was for this operation.
  void count(Run& run) {
    const TransportCounters& now = transport_->counters();
    run.sent += now.bytes_sent - counted_.sent;
    run.received += now.bytes_received - counted_.received;
    run.overhead += now.overhead_sent - counted_.overhead;
    counted_ = {now.bytes_sent, now.bytes_received, now.overhead_sent};
  }
  void enter(Run& run, State state) {
    progress_.serve(run.account);
    progress_.enter(state);
  }
  /// Another algorithm did it than the one that was asked for.
  void done_as(Run& run, std::string_view algorithm) { run.row = &ledger_.row(run.call->layout.operation, run.call->bytes(), algorithm); }
  /// Posts all steps and drives them to their end.
  void run_steps(Run& run, Prepared& prepared, const std::byte* input, std::byte* output) {
    prepared.busy = true;
    post_steps(run, prepared, input, output);
    drive(run);
    prepared.busy = false;
  }
  [[noreturn, gnu::cold]] void raise(Errc code, const Run& run, Rank peer, std::initializer_list<detail::Piece> text) {
    detected_ = true;
    throw Error(code, text, {rank(), peer, run.sequence, progress_.waited()});
  }
  [[noreturn, gnu::cold]] void raise_mismatch(const Run& run, Rank peer, std::uint64_t theirs) {
    const RankStatus status = transport_->status(peer);
    raise(Errc::mismatch, run, peer, {"operation #", run.sequence, ": rank ", rank(), " called ", detail::describe(run.fingerprint, run.count), ", rank ", peer,
                                      " called ", detail::describe(theirs, status.count)});
  }
  [[gnu::cold]] std::string describe(const Run& run) const {
    if (run.call) return detail::concat({detail::describe(run.fingerprint, run.count), " #", run.sequence});
    const Message& m = run.message;
    return detail::concat({m.is_send ? "send(" : "receive(", m.bytes / std::max<std::size_t>(m.grain, 1), " ", name_of(m.type), m.is_send ? " to rank " : " from rank ", m.peer, ", tag ", m.tag < 0 ? detail::Piece("any") : detail::Piece(m.tag), ")"});
  }

 private:
  static constexpr std::size_t local_slice = std::size_t{64} << 10;  // a local step lets the network go on after this
  static constexpr std::size_t most_unexpected = std::size_t{1} << 30;
  static constexpr std::uint16_t collective_lane = 0, message_lane = 1;

  // Who may be at work in here: one thread of the caller's, and, once there is one, the progress thread.

  void lock() {
    wanted_.fetch_add(1, std::memory_order_seq_cst);
    transport_->interrupt();
    mutex_.lock();
    wanted_.fetch_sub(1, std::memory_order_relaxed);
  }
  struct Use {
    /// `even_failed`: of operations that were started before.
    explicit Use(Engine& e, bool even_failed = false) : engine(e) {
      engine.rule_.enter();
      if (engine.driven_by_others_) engine.lock();
      if (engine.failed_ && !even_failed) {
        engine.unlock();
        throw *engine.failed_;
      }
    }
    ~Use() {
      if (engine.continuations_.empty()) engine.unlock();
      else engine.unlock_and_continue();
    }
    Use(const Use&) = delete;
    Engine& engine;
  };
  void unlock() {
    if (driven_by_others_) mutex_.unlock();
    rule_.exit();
  }
  [[gnu::noinline]] void unlock_and_continue() {
    const auto continuations = std::exchange(continuations_, {});
    unlock();
    for (const auto& f : continuations) f();
  }

  /// An operation of which nothing is known yet. At least two are there, so that the ledger can read the last one's
  /// stopwatch at leisure.
  Run& take_run() {
    if (free_first_ == free_last_) free(*runs_.emplace_back(std::make_unique<Run>(size())));
    Run& run = *free_first_;
    free_first_ = run.next;
    return run;
  }
  void free(Run& run) {
    run.next = nullptr;
    (free_first_ ? free_last_->next : free_first_) = &run;
    free_last_ = &run;
  }

  template <class F>
  Report to_end(Run& run, nanoseconds timeout, F&& f) {
    run.background = false;
    run.timeout = timeout;
    limit_is_error_ = true;
    progress_.begin(run.account, timeout);
    try {
      f();
    } catch (...) {
      fail();
      progress_.stop();
      free(run);
      if (detected_) throw *failed_;
      throw;  // a user's exception, as it was
    }
    Report report = close(run);
    progress_.stop();
    if (run.row) ledger_.book(*run.row, report, bytes_of(run), run.account.watch, clock_);
    free(run);
    return report;
  }
  template <class F>
  Run* in_background(Run& run, nanoseconds timeout, F&& f) {
    run.background = true;
    run.booked = false;
    run.done.store(false, std::memory_order_relaxed);
    run.timeout = timeout;
    run.exposed = 0;
    progress_.begin(run.account, timeout);
    try {
      f();
      complete_finished();
      if (run.remaining == 0 && run.in_flight) complete(run);  // as soon as it was posted
      transport_->flush();
      ledger_.settle();
    } catch (...) {
      fail();
      progress_.stop();
      free(run);
      if (detected_) throw *failed_;
      throw;
    }
    run.exposed = progress_.rest() - run.account.arrival;
    return &run;
  }

  /// From here on the operation is in flight.
  void enlist(Run& run) {
    run.number = ++number_;
    run.in_flight = true;
    run.sent = run.received = run.overhead = 0;
    run.before = last_;
    run.after = nullptr;
    (last_ ? last_->after : first_) = &run;
    last_ = &run;
  }
  void delist(Run& run) {
    (run.before ? run.before->after : first_) = run.after;
    (run.after ? run.after->before : last_) = run.before;
    run.in_flight = false;
  }

  void post(Run& run) {
    const Call& call = *run.call;
    run.sequence = ++sequence_;
    run.count = detail::Fingerprint::agreed_count(call);
    run.active = nullptr;
    run.receiver = nullptr;
    run.remaining = 0;
    const std::uint64_t last = fingerprint_;
    fingerprint_ = run.fingerprint = detail::Fingerprint::of(call).pack();
    enlist(run);
    serving_ = &run;
    if (call.pinned) {
      prepared_ = static_cast<Prepared*>(call.pinned)->shared_from_this();
      key_ = PlanKey(call);
    } else if (!prepared_ || fingerprint_ != last || call.layout.count != key_.layout.count || call.layout.in_place != key_.layout.in_place || call.algorithm.generate != key_.generate ||
               call.algorithm.share != key_.share || call.algorithm.name.data() != key_.name || call.layout.extents) {  // the fingerprint tells the rest
      key_ = PlanKey(call);
      prepared_ = nullptr;
      prepared_ = plans_.find(key_);
    }
    // What is in flight already has transfers of its own.
    run.prepared = prepared_.get();
    if (run.background || prepared_->busy) run.prepared = (run.holds = PlanCache::free(prepared_)).get();
    Prepared& prepared = *run.prepared;
    prepared.busy = true;
    if (!prepared.row) prepared.row = &ledger_.row(call.layout.operation, call.bytes(), call.algorithm.name);
    run.row = prepared.row;
    history_[sequence_ % std::size(history_)] = {sequence_, fingerprint_, run.count};
    if (transport_->aborted()) raise_abort();
    transport_->enter({sequence_, fingerprint_, run.count, RankStatus::inside_operation, false});
    run.scratch.grow(prepared.plan->scratch());
    prepared.fold = call.fold;
    if (!call.algorithm.share) post_steps(run, prepared, call.input, call.output);
  }
  /// Posts all steps of a plan; moved() tells how far they are.
  void post_steps(Run& run, Prepared& prepared, const std::byte* input, std::byte* output) {
    const std::byte* scratch = run.scratch.data();
    const auto address = [&](const Range& range) -> const std::byte* {
      const std::byte* base = range.buffer == Buffer::input ? input : range.buffer == Buffer::output ? output : scratch;
      return base ? base + range.first : nullptr;
    };
    run.active = &prepared;
    locals_.reserve(locals_.size() + prepared.transfers.size());
    const Lateness arrival = progress_.arrival(run.account);
    run.remaining = prepared.transfers.size();
    for (std::uint32_t i = 0; i < prepared.transfers.size(); ++i) {
      const PlannedStep& step = prepared.plan->steps()[i];
      Transfer& t = prepared.transfers[i];
      t.from = address(step.from);
      t.to = const_cast<std::byte*>(address(step.to));  // plans never write the input
      t.ready = prepared.ready[i];
      t.done = 0;
      t.operation = static_cast<std::uint32_t>(run.sequence);
      t.fingerprint = run.fingerprint;
      t.lane = collective_lane;
      t.inherited = t.late = arrival;
      t.owner = &run;
      prepared.queued[i] = 0;
    }
    // Some are done as soon as they are posted, and move others.
    for (std::uint32_t i = 0; i < prepared.transfers.size(); ++i) {
      Transfer& t = prepared.transfers[i];
      if (t.peer >= 0) progress_.post(t, *this);
      else if (t.ready > 0) queue_local(run, i);
    }
  }

  void post(Run& run, const Message& message) {
    run.call = nullptr;
    run.active = nullptr;
    run.receiver = nullptr;
    run.message = message;
    run.sequence = sequence_;
    run.fingerprint = detail::Fingerprint::of_tag(message.tag);
    run.count = message.bytes;
    run.row = &ledger_.row(message.is_send ? Collective::send : Collective::receive, message.bytes, "message");
    run.remaining = 1;
    enlist(run);
    serving_ = &run;
    if (transport_->aborted()) raise_abort();
    transport_->enter({sequence_, run.fingerprint, message.bytes, RankStatus::inside_message, false});
    if (!message.is_send) {
      const auto match = std::find_if(unexpected_.begin(), unexpected_.end(), [&](const Run* r) { return !r->receiver && r->message.peer == message.peer && (message.tag < 0 || r->message.tag == message.tag); });
      if (match != unexpected_.end()) {
        Run& known = **match;
        known.receiver = &run;
        if (!known.transfer.pending) deliver(known);
        return;
      }
    }
    if (message.peer == rank()) return post_to_self(run);
    aim(run);
    progress_.post(run.transfer, *this);
  }
  /// The transfer of a message.
  void aim(Run& run) {
    const Message& m = run.message;
    Transfer& t = run.transfer;
    t = Transfer{};
    t.from = m.is_send ? m.data : nullptr;
    t.to = m.is_send ? nullptr : m.data;
    t.bytes = t.ready = m.bytes;
    t.fingerprint = detail::Fingerprint::of_tag(m.tag);
    t.operation = static_cast<std::uint32_t>(m.type) << 16 | m.grain;
    t.peer = m.peer;
    t.lane = message_lane;
    t.grain = m.grain;
    t.is_send = m.is_send;
    t.matching = m.tag < 0 ? Matching::any : Matching::fingerprint;
    t.inherited = t.late = progress_.arrival(run.account);
    t.owner = &run;
    run.call = nullptr;
    run.active = nullptr;
    run.receiver = nullptr;
    run.remaining = 1;
  }
  void check_message(const Run& run, const FrameInfo& frame) {
    if (!frame.first) return;
    check_message(run, static_cast<std::int32_t>(frame.fingerprint), frame.operation, frame.total);
  }
  /// Whether a receive can take the message; it may be shorter.
  void check_message(const Run& run, int tag, std::uint32_t type, std::size_t bytes) {
    Run& receive = const_cast<Run&>(run);
    Message& m = receive.message;
    const auto theirs = static_cast<ElementType>(type >> 16);
    const std::size_t grain = std::max<std::size_t>(type & 0xffff, 1);
    if (theirs != m.type || grain != m.grain || bytes > m.bytes)
      raise(Errc::mismatch, run, m.peer, {"rank ", m.peer, " sends rank ", rank(), " a message of ", bytes / grain, " ", name_of(theirs), " with tag ", tag, ", which does not fit into ", describe(run)});
    m.bytes = bytes;
    m.tag = tag;
    receive.transfer.bytes = receive.transfer.ready = bytes;
  }
  void post_to_self(Run& run) {
    const Message& m = run.message;
    if (!m.is_send) return;  // a send will find it
    Run* receive = nullptr;
    for (Run* r = first_; r && !receive; r = r->after)
      if (!r->call && !r->message.is_send && r->message.peer == rank() && r->remaining > 0 && (r->message.tag < 0 || r->message.tag == m.tag)) receive = r;
    Run& copy = take_run();
    copy.buffer.assign(m.data, m.data + m.bytes);
    copy.message = m;
    copy.message.is_send = false;
    copy.message.data = copy.buffer.data();
    copy.transfer = Transfer{};
    copy.receiver = receive;
    unexpected_.push_back(&copy);
    unexpected_bytes_ += m.bytes;
    run.remaining = 0;
    if (receive) deliver(copy);
  }
  /// An unexpected message is here, and so is its receiver.
  void deliver(Run& message) {
    Run& run = *message.receiver;
    const Message& m = message.message;
    check_message(run, m.tag, static_cast<std::uint32_t>(m.type) << 16 | m.grain, m.bytes);
    if (m.bytes > 0) std::memcpy(run.message.data, m.data, m.bytes);
    run.received += m.bytes;
    std::erase(unexpected_, &message);
    unexpected_bytes_ -= m.bytes;
    message.buffer = {};
    message.receiver = nullptr;
    free(message);
    run.remaining = 0;
    if (!run.background) return;
    run.next = finished_;
    finished_ = &run;
  }

  void drive(Run& run) {
    ledger_.settle();  // what was sent takes longer to arrive than this
    while (run.remaining > 0) turn();
    transport_->flush();
  }
  void turn() {
    if (locals_.empty()) progress_.turn(*this);
    else once();
    if (finished_) complete_finished();
  }
  /// What can be done without waiting.
  void once() {
    if (!locals_.empty()) run_local();
    progress_.poll(*this);
    if (finished_) complete_finished();
  }
  void complete_finished() {
    while (finished_) {
      Run& run = *std::exchange(finished_, finished_->next);
      if (run.in_flight) complete(run);
      else if (run.receiver) deliver(run);  // an unexpected message that somebody waits for by now
    }
  }
  /// An operation in the background is done.
  void complete(Run& run) {
    progress_.serve(run.account);
    if (run.call && run.call->finish && run.call->layout.output_count() > 0) {
      progress_.enter(State::reduce);
      run.call->finish(run.call->output, run.prepared->plan->layout().output_count(), size());
    }
    run.report = close(run);
    end(run);
  }
  void end(Run& run) {
    if (run.continuation) continuations_.push_back(std::exchange(run.continuation, nullptr));
    run.done.store(true, std::memory_order_release);
  }
  /// The operation is in flight no longer.
  Report close(Run& run) {
    delist(run);
    if (!first_) transport_->exit();
    let_go(run);
    Report report = progress_.finish(run.account);
    fill(report, run);
    return report;
  }
  void let_go(Run& run) {
    run.active = nullptr;
    if (run.holds) PlanCache::give_back(std::move(run.holds));
    else if (run.prepared) run.prepared->busy = false;
    run.holds = nullptr;
    run.prepared = nullptr;
  }
  void fill(Report& report, const Run& run) {
    report.bytes_sent = run.sent;
    report.bytes_received = run.received;
    report.bytes_wire = run.sent + run.overhead;
    report.ledger = ledger_.handle();
    report.sequence = run.number;
    if (run.row) report.algorithm = run.row->algorithm;
  }
  static std::uint64_t bytes_of(const Run& run) { return run.call ? run.call->bytes() : run.message.bytes; }
  /// One in the background is booked by the caller's thread, when its report is fetched.
  void book(Run& run) {
    if (run.booked) return;
    run.booked = true;
    run.report.exposed = std::min(run.report.elapsed, clock_.to_ns(run.exposed));
    if (!run.row) return;
    ledger_.book(*run.row, run.report, bytes_of(run), run.account.watch, clock_);
    ledger_.settle();
    if (run.error) ++run.row->failed;
  }
  /// What one operation writes, no other one in flight may read or write.
  void refuse_overlaps(const Call& call) {
    const auto overlap = [](std::span<const std::byte> a, std::span<const std::byte> b) {
      const std::less<> before;
      return !a.empty() && !b.empty() && before(a.data(), b.data() + b.size()) && before(b.data(), a.data() + a.size());
    };
    for (const Run* run = first_; run; run = run->after) {
      if (!run->call) continue;
      const Call& other = *run->call;
      if (overlap(call.output_bytes(), other.output_bytes()) || overlap(call.output_bytes(), other.input_bytes()) || overlap(call.input_bytes(), other.output_bytes()))
        throw Error(Errc::invalid_argument, {name_of(call.layout.operation), " of ", call.layout.items(), " elements overlaps in memory with ", describe(*run), ", which is still in flight: wait for that first"});
    }
  }

  void queue_local(Run& run, std::uint32_t i) {
    if (run.active->queued[i]) return;
    run.active->queued[i] = 1;
    locals_.push_back({&run, i});
  }
  /// One slice of each local step that can go on.
  void run_local() {
    for (std::size_t n = locals_.size(); n > 0; --n) {
      const auto [run, i] = locals_.front();
      locals_.erase(locals_.begin());
      run->active->queued[i] = 0;
      Transfer& t = run->active->transfers[i];
      const std::size_t bytes = std::min(t.ready - t.done, local_slice - local_slice % t.grain);
      const std::byte* from = t.from + t.done;
      std::byte* to = t.to + t.done;
      if (bytes > short_bytes) enter(*run, t.fold ? State::reduce : State::copy);
      if (t.past_caches) copy_past_caches(to, from, bytes);
      else if (!t.fold) std::memmove(to, from, bytes);
      else if (t.side == Side::right) (*t.fold)(to, to, from, bytes);
      else (*t.fold)(to, from, to, bytes);
      t.done += bytes;
      if (t.done < t.bytes) {
        if (t.done < t.ready) queue_local(*run, i);
      } else if (--run->remaining == 0 && run->background) {
        run->next = finished_;
        finished_ = run;
      }
      propagate(*run, i);
    }
  }
  /// Step i moved: whoever waits for it may go further, and inherits what it was late by.
  void propagate(Run& run, std::uint32_t i) {
    Prepared& active = *run.active;
    const PlannedStep& step = active.plan->steps()[i];
    const Transfer& moved = active.transfers[i];
    for (std::uint32_t d = step.first_dependent; d < step.first_dependent + step.dependents; ++d) {
      const std::uint32_t j = active.plan->dependents()[d];
      Transfer& t = active.transfers[j];
      t.inherited.raise(moved.late);
      t.late.raise(moved.late);
      t.ready = active.plan->ready(j, [&](std::size_t k) { return active.transfers[k].done; });
      if (t.peer < 0 && t.ready > t.done) queue_local(run, j);
    }
  }

  // Failure: everything pending is withdrawn, the other ranks are told, and this communicator refuses further use.

  /// In a handler of what was thrown. What is in flight ends with it.
  [[gnu::cold]] void fail() {
    Rank peer = late_rank();
    const State cause = peer >= 0 ? State::wait_arrival : State::wait_transfer;
    if (peer < 0) peer = first_missing();
    const Run& run = *serving_;
    std::exception_ptr thrown = std::current_exception();
    try {
      throw;
    } catch (const Error& error) {
      failed_.emplace(error);
    } catch (const std::exception& error) {
      failed_.emplace(Errc::aborted, detail::concat({"rank ", rank(), ": exception during ", describe(run), ": ", error.what()}), ErrorContext{rank(), rank(), run.sequence, {}});
    } catch (...) {
      failed_.emplace(Errc::aborted, detail::concat({"rank ", rank(), ": exception during ", describe(run)}), ErrorContext{rank(), rank(), run.sequence, {}});
    }
    for (Run* r = first_; r; r = r->after) withdraw(*r);
    transport_->abort({failed_->errc(), rank(), failed_->peer(), std::string(failed_->text())});
    if (detected_) {  // several ranks may find the same failure at once: the first notice wins, so all raise the same
      const AbortNotice notice = transport_->abort_notice();
      failed_.emplace(notice.code, notice.text, ErrorContext{rank(), notice.rank == rank() ? failed_->peer() : blamed(notice), run.sequence, failed_->elapsed()});
    }
    shares_.wait_for_others();
    give_up(detected_ ? nullptr : thrown, peer, cause);
  }
  void withdraw(Run& run) {
    if (run.active)
      for (Transfer& t : run.active->transfers) transport_->cancel(t);
    if (!run.call) transport_->cancel(run.transfer);
  }
  /// All in flight have failed: the one that was served with what it threw, the others with what the communicator says from now on.
  [[gnu::cold]] void give_up(std::exception_ptr thrown = nullptr, Rank missing = -1, State cause = State::wait_transfer) {
    locals_.clear();
    finished_ = nullptr;
    for (Run* r : unexpected_) {
      transport_->cancel(r->transfer);
      free(*r);
    }
    unexpected_.clear();
    while (first_) {
      Run& run = *first_;
      withdraw(run);
      delist(run);
      let_go(run);
      run.report = progress_.finish_failed(run.account, missing, cause);
      fill(run.report, run);
      if (run.background) {
        run.error = thrown && &run == serving_ ? thrown : std::make_exception_ptr(*failed_);
        end(run);
      } else if (run.row) {
        ledger_.book(*run.row, run.report, bytes_of(run), run.account.watch, clock_);
        ledger_.settle();
        ++run.row->failed;
      }
    }
    transport_->exit();
  }

  /// Whose troubles an error is about: the one that is waited for, or the oldest.
  const Run& stuck() const { return waited_ ? *waited_ : first_ ? *first_ : *serving_; }
  /// Transfers that only their peer holds up: the first of their queue, and free to go on.
  template <class F>
  void for_each_needed(F&& f) const {
    std::vector<char> seen(2 * static_cast<std::size_t>(size()));
    for (const Run* run = first_; run; run = run->after) {
      if (!run->call && run->transfer.pending) f(run->transfer);
      if (!run->active) continue;
      for (const Transfer& t : run->active->transfers) {
        char& queue = seen[2 * static_cast<std::size_t>(std::max(t.peer, 0)) + (t.is_send ? 1 : 0)];
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
  /// Who has not called the operation yet and is waited for, directly or through others; -1 if nobody.
  [[gnu::cold]] Rank late_rank() const {
    const Run& run = stuck();
    if (!run.call || !run.in_flight) return -1;
    const auto absent = [&](Rank r) {
      const RankStatus status = transport_->status(r);
      return !status.left && status.sequence < run.sequence;
    };
    const Rank direct = first_missing();
    if (direct < 0 || absent(direct)) return direct;
    if (has_root(run.call->layout.operation) || sizes_differ(run.call->layout.operation)) return -1;  // not everyone matters to everyone
    for (Rank r = 0; r < size(); ++r)
      if (r != rank() && absent(r)) return r;
    return -1;
  }
  [[gnu::cold]] std::string missing() const {
    std::string from, room;
    for_each_needed([&](const Transfer& t) {
      std::string& list = t.is_send ? room : from;
      list += detail::concat({list.empty() ? "rank " : ", rank ", t.peer});
    });
    return detail::concat({"rank ", rank(), " in ", describe(stuck()), from.empty() ? "" : " waits for data from ", from,
                           room.empty() ? "" : from.empty() ? " waits for room at " : " and for room at ", room});
  }
  [[gnu::cold]] std::string describe_step(const Run& run, std::uint32_t i) const { return detail::concat({"step ", i, " of ", describe(run)}); }
  [[gnu::cold]] std::string last_seen() const {
    std::string text = "last seen:";
    for (Rank r = 0; r < size(); ++r) {
      const RankStatus s = transport_->status(r);
      text += detail::concat({r ? "; rank " : " rank ", r});
      if (const Rank origin = transport_->origin(r); origin != r) text += detail::concat({" (", origin, " of the job)"});
      if (s.left) text += detail::concat({" left after #", s.sequence});
      else if (s.inside == RankStatus::inside_message) text += detail::concat({" in ", detail::describe(s.fingerprint, s.count), s.sequence ? detail::concat({" after #", s.sequence}) : ""});
      else if (s.sequence == 0) text += " has called nothing";
      else text += detail::concat({s.inside ? " in " : " after ", detail::describe(s.fingerprint, s.count), " #", s.sequence});
    }
    return text;
  }

  static Rank blamed(const AbortNotice& notice) { return notice.peer >= 0 ? notice.peer : notice.rank; }
  [[noreturn, gnu::cold]] void raise_out_of_step(const Run& run, Rank peer, const FrameInfo& frame, std::int32_t ahead) {
    const RankStatus status = transport_->status(peer);
    const std::string theirs = frame.has_fingerprint ? detail::concat({detail::describe(frame.fingerprint, status.count), " "}) : "operation ";
    const Called& ours = history_[frame.operation % std::size(history_)];
    const bool known = ours.fingerprint != 0 && static_cast<std::uint32_t>(ours.sequence) == frame.operation;
    raise(Errc::mismatch, run, peer,
          {"rank ", rank(), " in ", describe(run), " expects data from rank ", peer, ", which ",
           ahead > 0 ? "has sent none for it and went on to " : "has sent some that was not read in ", theirs, "#", frame.operation,
           known ? detail::concat({", where rank ", rank(), " called ", detail::describe(ours.fingerprint, ours.count)}) : ""});
  }

  struct Called {
    std::uint64_t sequence = 0, fingerprint = 0, count = 0;
  };
  struct Local {
    Run* run;
    std::uint32_t step;
  };

  std::unique_ptr<T> transport_;
  Clock clock_;
  WaitPolicy wait_;
  bool accounting_;
  Ledger ledger_;
  Progress<T> progress_;
  ShareWork<Engine, T> shares_{*this, *transport_};
  PlanCache plans_;
  PlanKey key_;                            // of the last call,
  std::shared_ptr<Prepared> prepared_;     // and its plan; the cache may let go of it
  std::uint64_t fingerprint_ = 0;
  Called history_[8];                      // the last calls, for error texts
  std::vector<std::unique_ptr<Run>> runs_;
  Run *free_first_ = nullptr, *free_last_ = nullptr;
  Run *first_ = nullptr, *last_ = nullptr;  // in flight
  Run* finished_ = nullptr;                 // of the background, not yet completed
  Run* serving_ = nullptr;                  // what the thread works for, or did last
  const Run* waited_ = nullptr;             // what the caller waits for, of the background
  std::vector<Run*> unexpected_;            // messages that nobody waited for
  std::size_t unexpected_bytes_ = 0;
  std::vector<Local> locals_;
  std::vector<std::function<void()>> continuations_;  // to be called when nobody is in here
  struct {
    std::uint64_t sent = 0, received = 0, overhead = 0;
  } counted_;                               // the transport's counters when they were last looked at
  std::uint64_t sequence_ = 0, moves_ = 0;
  std::uint32_t number_ = 0;
  bool limit_is_error_ = true, out_of_time_ = false;
  std::optional<Error> failed_;
  bool detected_ = false;  // failed_ was found here or told by another rank, not thrown by a user's operator
  ThreadRule rule_;
  std::mutex mutex_;
  std::atomic<int> wanted_{0};
  bool driven_by_others_ = false;  // there is a progress thread; for good
};

}  // namespace tally::inline v0
