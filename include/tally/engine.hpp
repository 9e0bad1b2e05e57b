// SPDX-License-Identifier: Apache-2.0
// Runs calls: plans their algorithms (once per layout, then from a cache), posts all their network steps, and keeps
// the watermarks of each step: up to `ready` bytes it may go, `done` bytes it has gone. Streaming, overlap of steps
// and hazards all follow from the plan; several operations in flight follow from the order in which they were posted, which
// is the same on all ranks. In the steady state nothing is allocated or locked.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "account/ledger.hpp"
#include "call.hpp"
#include "diagnosis.hpp"
#include "gate.hpp"
#include "local_steps.hpp"
#include "mailbox.hpp"
#include "neighbours.hpp"
#include "prepared.hpp"
#include "progress.hpp"
#include "run.hpp"
#include "share_work.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

template <Transport T>
class Engine final : public AnyEngine {
 public:
  Engine(std::unique_ptr<T> transport, const Clock& clock, AccountSettings energy = {}, WaitPolicy wait = WaitPolicy::balanced, bool accounting = true)
      : transport_(std::move(transport)), clock_(clock), wait_(wait), accounting_(accounting), ledger_(transport_->size(), transport_->rank(), transport_->name(), clock, std::move(energy)), progress_(*transport_, clock, wait, accounting), runs_(transport_->size()) {}
  ~Engine() override {
    leave();
    ledger_.settle();  // while the stopwatches it reads are there
  }

  Report run(const Call& call) override {
    const Use use(*this);
    if (runs_.first()) diagnosis_.refuse_overlaps(call);
    Run& run = runs_.take();
    run.call = &call;
    return to_end(run, call.timeout, [&] {
      if (call.packs()) wrap([&] { call.pack(); });
      post(run);
      if (call.algorithm.share) shares_.run(run);
      else drive(run);
      if (call.finish) finish(call, call.layout);
      if (call.packs()) wrap([&] { call.unpack(); });
    });
  }
  std::shared_ptr<void> pin(const Call& call) override { return planner_.pin(call); }

  Report run(const Message& message, Message* received) override {
    const Use use(*this);
    if (message.peer == rank() && !message.is_send) mailbox_.expect_known(message);
    if (runs_.first()) diagnosis_.refuse_overlaps(message);
    Run& run = runs_.take();
    return to_end(run, message.timeout, [&] {
      post(run, message);
      drive(run);
      if (received) *received = run.message;
    });
  }

  Report run(const Message& send, const Message& receive, Message* received) override {
    const Use use(*this);
    const Buffers buffers(send, receive);
    if (buffers.overlap_themselves()) throw Error(Errc::invalid_argument, "send_receive: what is sent and where it is received overlap");
    if (runs_.first()) diagnosis_.refuse_overlaps(buffers, "send_receive");
    Run& run = runs_.take();
    return to_end(run, receive.timeout, [&] {
      post(run, receive, &send);
      drive(run);
      *received = run.message;
    });
  }

  Run* start(const Call& call, std::shared_ptr<const void> kept) override {
    const Use use(*this);
    diagnosis_.refuse_overlaps(call);
    Run& run = runs_.take();
    run.own_call = call;
    run.call = &run.own_call;
    run.kept = std::move(kept);
    return in_background(run, call.timeout, [&] { post(run); });
  }
  Run* start(const Message& message) override {
    const Use use(*this);
    diagnosis_.refuse_overlaps(message);
    Run& run = runs_.take();
    return in_background(run, message.timeout, [&] { post(run, message); });
  }
  bool wait(Run& run, const nanoseconds* at_most) override {
    if (run.done.load(std::memory_order_acquire)) return true;
    const Ticks begin = accounting_ ? clock_.now() : 0;  // before the progress thread has stepped back, which may take it a while
    const Use use(*this, true);
    if (run.done.load(std::memory_order_relaxed)) {
      if (accounting_) run.exposed += clock_.now() - begin;
      return true;
    }
    progress_.drive(at_most ? *at_most : run.timeout, begin);
    limit_is_error_ = !at_most, out_of_time_ = false;
    diagnosis_.waited = &run;
    attempt([&] {
      if (at_most && *at_most <= nanoseconds{0}) a_while();
      else
        while (!run.done.load(std::memory_order_relaxed) && !out_of_time_) turn();
    });
    diagnosis_.waited = nullptr;
    if (const Ticks end = progress_.rest(); accounting_) run.exposed += end - begin;
    return run.done.load(std::memory_order_relaxed);
  }
  Report fetch(Run& run) override {
    if (!Gate::on_progress_thread()) {  // which would wait for the caller's thread here, and leaves the ledger to it
      const Use use(*this, true, !gate_.shared());
      book(run);
    }
    if (run.error) std::rethrow_exception(run.error);
    Report report = run.report;
    report.exposed = exposed(run);
    return report;
  }
  void give_back(Run& run) override {
    wait(run, nullptr);
    run.kept = nullptr;
    run.continuation = nullptr;
    returned_.push(run);
    if (Gate::on_progress_thread()) return;
    try {
      const Use use(*this, true, !gate_.shared());  // it takes what was returned
    } catch (const Error&) {  // somebody is inside: whoever comes next does
    }
  }
  bool is_inside() const override { return gate_.is_inside(); }
  void then(Run& run, std::function<void()> f) override {
    {
      const Use use(*this, true);
      if (!run.done.load(std::memory_order_relaxed)) {
        if (run.continuation) throw Error(Errc::invalid_argument, "this operation has something to call already");
        return void(run.continuation = std::move(f));
      }
    }
    f();
  }
  Driven drive(nanoseconds patience, std::size_t looks, bool& moved) override {
    std::vector<std::function<void()>> due;
    bool more = false;
    {
      const auto lock = gate_.try_lock();
      if (!lock) return Driven::by_caller;
      if (!runs_.first() || failed_) return Driven::nothing_left;
      gate_.begin_driving();
      const Ticks limit = clock_.to_ticks(patience);
      Ticks since = clock_.now();
      const std::uint64_t before = moves_;
      const Run* const oldest = runs_.first();
      progress_.drive_until(runs_.soonest(), looks);
      limit_is_error_ = true, out_of_time_ = false;
      attempt([&] {
        for (std::uint64_t seen = moves_; runs_.first() == oldest && !gate_.wanted() && !out_of_time_;) {
          turn();
          if (seen == moves_ && clock_.now() - since > limit) break;
          if (seen != moves_) since = clock_.now(), seen = moves_;
        }
      });
      moved = moved || moves_ != before || !locals_.empty() || runs_.first() != oldest;
      diagnosis_.waited = nullptr;
      progress_.rest();
      gate_.end_driving();
      more = runs_.first() != nullptr;
      due = gate_.take_due();
    }
    for (const auto& f : due) f();
    return more ? Driven::more : Driven::nothing_left;
  }
  void be_known_as(const std::shared_ptr<AnyEngine>& me) override { left_behind_.know(me); }
  bool look_in(bool& moved) override {
    if (!gate_.try_look()) return gate_.is_user();  // another thread drives it, now or for good
    const std::uint64_t before = moves_;
    if (runs_.first() && !failed_) {
      progress_.drive(runs_.first()->timeout);
      attempt([&] { a_while(); });
      progress_.rest();
    }
    if (detail::has_rest(*transport_) && !failed_) attempt([&] { detail::settle(*transport_); });
    moved = moved || moves_ != before;
    const bool left = runs_.first() != nullptr || (!failed_ && detail::has_rest(*transport_));
    gate_.end_look();
    return left;
  }
  void step_back() override {
    gate_.call_back();
    transport_->interrupt();
  }
  bool pending() override {
    const auto lock = gate_.try_lock();
    return !lock || (runs_.first() && !failed_);
  }
  void be_driven_by_others() override { gate_.share(); }

  void leave() override {
    gate_.lock([this] { transport_->interrupt(); });
    if (!failed_) failed_.emplace(Errc::invalid_argument, "this communicator is gone");
    progress_.drive(nanoseconds{});  // nobody did up to here
    give_up();
    progress_.stop();
    transport_->leave();
    gate_.leave(false);
  }
  [[gnu::cold]] void abort(const std::string& why) override {
    transport_->abort({Errc::aborted, rank(), -1, detail::concat({"rank ", rank(), " aborted the communicator", why.empty() ? "" : ": ", why})});
  }

  Settings settings() const override { return {clock_, wait_, accounting_}; }
  Rank rank() const override { return transport_->rank(); }
  int size() const override { return transport_->size(); }
  const Ledger& ledger() const override { return ledger_; }
  TransportCounters counters() const override {
    if (!gate_.shared() || gate_.is_inside()) return transport_->counters();
    const Held held(const_cast<Engine&>(*this));
    return transport_->counters();
  }
  const Partition* partition() const override { if constexpr (requires { transport_->partition(); }) return transport_->partition(); else return nullptr; }
  std::string ways() const override { if constexpr (requires { transport_->ways(); }) return transport_->ways(); else return {}; }
  std::uint64_t reserve(std::span<const Rank> members) override { return transport_->reserve(members); }
  std::unique_ptr<AnyEngine> open(std::uint64_t token, std::span<const Rank> members) override { return std::make_unique<Engine>(transport_->open(token, members), clock_, ledger_.settings(), wait_, accounting_); }
  std::unique_ptr<AnyTransport> open_transport(std::uint64_t token, std::span<const Rank> members) override { return detail::erase(transport_->open(token, members)); }
  void release(std::uint64_t token) override { transport_->release(token); }
  void discard(std::uint64_t token, std::span<const Rank> members) override { transport_->discard(token, members); }
  std::uint64_t reserve_memory(std::size_t stride) override { return shares_.reserve(stride); }
  std::unique_ptr<SymmetricMemory> map_memory(std::uint64_t token, std::size_t stride) override { return shares_.map(token, stride); }
  void discard_memory(std::uint64_t token, std::size_t stride) override { shares_.discard(token, stride); }
  bool one_address_space() const override { return shares_.one_address_space(); }
  bool stages() const override { return shares_.stages(); }
  std::size_t frame_bytes() const override { return transport_->frame_bytes(); }
  std::string kernel_problem() const override { return shares_.kernel_problem(); }

  // For Progress (see ProgressClient).
  OperationAccount& account_of(const Transfer& t) { return (diagnosis_.serving = static_cast<Run*>(t.owner))->account; }
  OperationAccount& waiting() { return diagnosis_.awaited().account; }
  std::uint16_t called() const { return static_cast<std::uint16_t>(sequence_); }
  [[gnu::cold]] Ticks expected_wait() { return clock_.to_ticks(ledger_.expect_wait(diagnosis_.awaited().row)); }
  bool interrupted() const { return gate_.wanted(); }
  bool has_neighbours() const { return Neighbours::of_this_thread().any_but(this); }
  bool look_elsewhere() { return Neighbours::of_this_thread().look(this); }

  void check(const Transfer& t, const FrameInfo& frame) {
    const Run& run = *static_cast<const Run*>(t.owner);
    if (!run.call && !run.in_flight && runs_.first()) count(*runs_.first());  // what follows is not its own
    if (!run.call) return mailbox_.check(run, frame);
    const auto ahead = static_cast<std::int32_t>(frame.operation - t.operation);
    if (ahead != 0) raise(Errc::mismatch, run, t.peer, {diagnosis_.out_of_step(run, t.peer, frame, ahead)});
    if (frame.has_fingerprint && frame.fingerprint != run.fingerprint) raise_mismatch(run, t.peer, frame.fingerprint);
    if (frame.total != t.bytes)
      raise(Errc::mismatch, run, t.peer, {"rank ", t.peer, " sends ", frame.total, " bytes where rank ", rank(), " expects ", t.bytes, " in ", diagnosis_.describe_step(run, t.step)});
    if (!frame.fits(t))
      raise(Errc::protocol, run, t.peer, {"rank ", t.peer, " cuts a message in another way than ", diagnosis_.describe_step(run, t.step), " can read"});
  }

  void moved(Transfer& t) {
    Run& run = *static_cast<Run*>(t.owner);
    if (runs_.several() || !run.in_flight) count(run);
    ++moves_;
    if (!t.pending) end_transfer(run);
    if (run.active) locals_.propagate(*this, run, t.step);
  }
  Transfer* unexpected(Rank peer, const FrameInfo& frame) { return mailbox_.take_in(peer, frame); }

  [[gnu::cold]] void check_peers() {
    if (accounting_) ledger_.publish_unfinished(waiting().watch, progress_.now(), clock_);
    diagnosis_.for_each_other_call([&](const Run& run, Rank r, std::uint64_t theirs) { raise_mismatch(run, r, theirs); });
  }
  [[gnu::cold]] Rank first_lost() { return diagnosis_.first_lost(); }
  [[noreturn, gnu::cold]] void raise_lost(Rank peer) {
    // Who aborts may be gone right after: why it went is in its notice.
    if (transport_->aborted()) raise_abort();
    const bool left = transport_->liveness(peer) == Liveness::left;
    raise(left ? Errc::peer_left : Errc::peer_lost, diagnosis_.stuck(), peer,
          {"rank ", peer, left ? " left the communicator" : " died", " while ", diagnosis_.missing(), "; ", diagnosis_.last_seen()});
  }
  [[gnu::cold]] void expired() {
    if (!limit_is_error_) {
      out_of_time_ = true;
      return;
    }
    nanoseconds waited = progress_.waited();
    if (gate_.is_driver()) {  // the first of their deadlines, unless its operation has ended meanwhile
      Run& next = runs_.find_soonest();
      const Ticks now = clock_.now();
      if (now < next.deadline) return void(out_of_time_ = true);
      diagnosis_.waited = &next;
      waited = clock_.to_ns(now - next.posted);
    }
    const Rank late = diagnosis_.late_rank();
    raise(Errc::timeout, diagnosis_.stuck(), late >= 0 ? late : diagnosis_.first_missing(),
          {diagnosis_.missing(), " after ", detail::time_text(waited), late >= 0 ? detail::concat({"; rank ", late, detail::Piece(diagnosis_.by_hearsay ? " has not said that it called it; " : " has not called it; ")}) : "; ", diagnosis_.last_seen()});
  }
  [[noreturn, gnu::cold]] void raise_abort() {
    const AbortNotice notice = transport_->abort_notice();
    detected_ = true;
    throw Error(notice.code, notice.text, {rank(), blamed(notice), diagnosis_.stuck().sequence, progress_.waited()});
  }

  /// For ShareWork: what the transport has moved since it was asked last was for this operation. (Asked whenever that could be another one's.)
  void count(Run& run) {
    const TransportCounters& now = transport_->counters();
    run.sent += now.bytes_sent - counted_.sent;
    run.received += now.bytes_received - counted_.received;
    run.overhead += now.overhead_sent - counted_.overhead;
    counted_ = {now.bytes_sent, now.bytes_received, now.overhead_sent};
  }
  void enter(Run& run, State state) {
    diagnosis_.serving = &run;
    progress_.serve(run.account);
    progress_.enter(state);
  }
  /// A local step of this one is next: its operator may throw.
  void at_work_for(Run& run) { diagnosis_.serving = &run; }
  Lateness resumed() const { return progress_.resumed(); }
  /// Another algorithm did it than the one that was asked for.
  void done_as(Run& run, std::string_view algorithm) { run.row = &ledger_.row(run.call->layout.operation, run.call->size, algorithm); }
  /// Posts all steps and drives them to their end.
  void run_steps(Run& run, Prepared& prepared, const std::byte* input, std::byte* output) {
    prepared.busy = true;
    post_steps(run, prepared, input, output);
    drive(run);
    at_work_for(run);
    prepared.busy = false;
  }
  [[noreturn, gnu::cold]] void raise(Errc code, const Run& run, Rank peer, std::initializer_list<detail::Piece> text) {
    detected_ = true;
    throw Error(code, text, {rank(), peer, run.sequence, progress_.waited()});
  }
  [[noreturn, gnu::cold]] void raise_mismatch(const Run& run, Rank peer, std::uint64_t theirs) {
    raise(Errc::mismatch, run, peer, {diagnosis_.mismatch(run, peer, theirs)});
  }
  std::string describe(const Run& run) const { return diagnosis_.describe(run); }
  static constexpr std::uint16_t message_lane = 1;  // collectives use lane 0
  Runs& runs() { return runs_; }
  /// One less of its transfers is under way. Those in the background are completed when the thread is out of the transport.
  void end_transfer(Run& run) {
    if (--run.remaining > 0 || (run.in_flight && !run.background)) return;
    run.next = finished_;
    finished_ = &run;
  }
  void withdraw(Run& run) {
    if (run.active)
      for (Transfer& t : run.active->transfers) transport_->cancel(t);
    if (run.call) return;
    transport_->cancel(run.transfer);
    if (run.both) transport_->cancel(run.other_transfer);
  }

 private:
  /// For who may come at any time and does not stay.
  struct Held {
    explicit Held(Engine& e) : gate(e.gate_) { gate.lock([&] { e.transport_->interrupt(); }); }
    ~Held() { gate.unlock(); }
    Held(const Held&) = delete;
    Gate& gate;
  };
  struct Use {
    /// `even_failed`: of operations that were started before. For `ruled` see Gate.
    [[gnu::always_inline]] explicit Use(Engine& e, bool even_failed = false, bool ruled = true) : engine(e), under_rule(ruled) {
      engine.gate_.enter([&e] { e.transport_->interrupt(); }, ruled);  // nothing of this object's, which so stays in registers
      if (engine.returned_.any()) engine.take_returned();
      if (engine.failed_ && !even_failed) {
        engine.gate_.leave(under_rule);
        throw *engine.failed_;
      }
    }
    ~Use() { engine.gate_.leave(under_rule); }
    Use(const Use&) = delete;
    Engine& engine;
    bool under_rule;
  };

  template <class F>
  Report to_end(Run& run, nanoseconds timeout, F&& f) {
    run.background = false;
    run.timeout = timeout;
    limit_is_error_ = true;
    progress_.begin(run.account, timeout);
    diagnosis_.waited = &run;
    try {
      f();
    } catch (...) {
      fail();
      progress_.stop();
      runs_.free(run);
      if (detected_ || diagnosis_.serving != &run) throw *failed_;  // what the operator of another one threw is that one's
      throw;  // a user's exception, as it was
    }
    Report report = close(run);
    diagnosis_.waited = nullptr;
    progress_.stop();
    if (run.row) ledger_.book(run.booking(), report, clock_);
    runs_.free(run);
    left_behind_.look_after(*transport_);
    return report;
  }
  template <class F>
  Run* in_background(Run& run, nanoseconds timeout, F&& f) {
    run.background = true, run.booked = false;
    run.done.store(false, std::memory_order_relaxed);
    run.timeout = timeout;
    run.exposed = 0;
    progress_.begin(run.account, timeout);
    run.posted = accounting_ ? run.account.arrival : clock_.now();
    run.deadline = run.posted + clock_.to_ticks(timeout);
    try {
      f();
      runs_.leave_last_in_background();
      complete_finished();  // among them perhaps itself
      if (run.remaining == 0 && run.in_flight) complete(run);
      transport_->flush();
      ledger_.settle();
    } catch (...) {
      fail();
      if (run.done.load(std::memory_order_relaxed)) run.exposed = progress_.now() - run.account.arrival, book(run);  // nobody will fetch it
      progress_.stop();
      runs_.free(run);
      if (detected_ || diagnosis_.serving != &run) throw *failed_;
      throw;
    }
    run.exposed = progress_.rest() - run.account.arrival;
    left_behind_.look_after(*transport_);
    return &run;
  }

  // What every call passes is inlined: the frames of these functions were a tenth of a small one's time.
  [[gnu::always_inline]] void post(Run& run) {
    const Call& call = *run.call;
    run.sequence = ++sequence_;
    run.count = detail::Fingerprint::agreed_count(call);
    run.active = nullptr;
    run.receiver = nullptr;
    run.remaining = 0;
    const std::uint64_t fingerprint = run.fingerprint = call.fingerprint ? call.fingerprint : detail::Fingerprint::of(call).pack();
    if (runs_.first()) count(*runs_.first());
    runs_.enlist(run);
    diagnosis_.serving = &run;
    Prepared& prepared = *(run.prepared = planner_.find(call, run.fingerprint, run.background, run.holds));
    prepared.busy = true;
    if (!prepared.row) prepared.row = &ledger_.row(call.layout.operation, call.size, call.algorithm.name);
    run.row = prepared.row;
    run.bytes = call.size;
    if (watched()) [[unlikely]] run.observed = ledger_.begun(*run.row, run.bytes, run.number);
    diagnosis_.remember(sequence_, fingerprint, run.count);  // from registers: what was just stored is slow to load
    if (transport_->aborted()) raise_abort();
    transport_->enter({sequence_, run.fingerprint, run.count, RankStatus::inside_operation, false});
    run.scratch.grow(prepared.plan->scratch());
    prepared.fold = call.fold;
    if (run.background) run.own_call.layout = prepared.plan->layout();  // the caller's extents may go
    if (call.scale) scale(run, prepared);
    if (!run.call->algorithm.share) post_steps(run, prepared, run.call->input, run.call->output);
  }
  /// In place where that is all there is of the input, else behind the plan's scratch.
  [[gnu::noinline]] void scale(Run& run, const Prepared& prepared) {
    const Call& call = *run.call;
    const bool in_place = call.layout.in_place && call.layout.operation == Collective::all_reduce;
    const std::size_t scratch = (prepared.plan->scratch() + 63) / 64 * 64, bytes = prepared.plan->layout().input_count() * call.grain;
    if (!in_place) run.scratch.grow(scratch + bytes);
    std::byte* const to = in_place ? call.output : run.scratch.data() + scratch;
    progress_.enter(State::reduce);
    call.scale(call.fold.op, to, call.input, bytes);
    progress_.enter(State::protocol);
    if (in_place) return;
    if (!run.background) run.own_call = call;
    run.own_call.input = to;
    run.own_call.input_memory = nullptr;
    run.call = &run.own_call;
  }
  /// Posts all steps of a plan; moved() tells how far they are.
  void post_steps(Run& run, Prepared& prepared, const std::byte* input, std::byte* output) {
    run.active = &prepared;
    run.remaining = prepared.transfers.size();
    prepared.aim(input, output, run.scratch.data(), run.sequence, run.fingerprint, progress_.arrival(run.account), &run);
    // Some are done as soon as they are posted, and move others.
    for (std::uint32_t i = 0; i < prepared.transfers.size(); ++i) {
      Transfer& t = prepared.transfers[i];
      if (t.peer >= 0) progress_.post(t, *this);
      else if (t.ready > 0) locals_.go(*this, run, i);
    }
  }

  /// `other`: to be sent at the same time.
  void post(Run& run, const Message& message, const Message* other = nullptr) {
    run.call = nullptr;
    run.active = nullptr;
    run.receiver = nullptr;
    run.message = message;
    run.both = other != nullptr;
    run.sequence = sequence_;
    run.fingerprint = detail::Fingerprint::of_tag(message.tag);
    run.count = message.bytes;
    run.bytes = message.bytes + (other ? other->bytes : 0);
    run.row = &mailbox_.row(ledger_, other ? Collective::send_receive : message.is_send ? Collective::send : Collective::receive, run.bytes);
    run.remaining = other ? 2 : 1;
    if (runs_.first()) count(*runs_.first());
    runs_.enlist(run);
    if (watched()) [[unlikely]] run.observed = ledger_.begun(*run.row, run.bytes, run.number);
    diagnosis_.serving = &run;
    if (transport_->aborted()) raise_abort();
    transport_->enter({sequence_, message.is_send || other ? run.fingerprint : detail::Fingerprint::of_tag(message.tag, Collective::receive), message.bytes, RankStatus::inside_message, false});
    const Lateness arrival = progress_.arrival(run.account);
    if (other) {
      run.other = *other;
      mailbox_.aim_other(run, arrival);
      progress_.post(run.other_transfer, *this);
    }
    if (mailbox_.post(run, arrival)) progress_.post(run.transfer, *this);
  }
  void finish(const Call& call, const Layout& layout) {
    if (layout.output_count() == 0) return;
    progress_.enter(State::reduce);
    if (!call.is_scattered()) return call.finish(call.output, layout.output_count(), size());
    for (const Part& part : call.scattered) call.finish(part.out, part.count, size());
  }
  template <class F>
  void wrap(F&& f) {
    progress_.enter(State::copy);
    f();
    progress_.enter(State::protocol);
  }
  [[gnu::always_inline]] void drive(Run& run) {
    ledger_.settle();  // what was sent takes longer to arrive than this
    while (run.remaining > 0) turn();
    transport_->flush();
  }
  /// What was started before goes on: if that fails, its wait() says so.
  template <class F>
  void attempt(F&& f) try {
    f();
    transport_->flush();
  } catch (...) {
    fail();
  }
  void turn() {
    if (locals_.empty()) progress_.turn(*this);
    else once();
    if (finished_) complete_finished();
  }
  /// What can be done without waiting: a frame, or a slice of each local step. True if there was any.
  bool once() {
    const bool local = !locals_.empty();
    if (local) locals_.run(*this);
    const bool moved = progress_.poll(*this);
    if (finished_) complete_finished();
    return local || moved;
  }
  /// The same as long as there is more, within bounds: who asked has something else to do.
  void a_while() {
    if (!once()) return progress_.look_around(*this);
    for (int rounds = 31; rounds > 0 && once();) --rounds;
  }
  void complete_finished() {
    while (finished_) {
      Run& run = *std::exchange(finished_, finished_->next);
      if (run.in_flight) complete(run);
      else mailbox_.arrived(run);
    }
  }
  /// An operation in the background is done.
  void complete(Run& run) {
    progress_.serve(run.account);
    if (run.call && run.call->finish) finish(*run.call, run.prepared->plan->layout());
    run.report = close(run);
    end(run);
  }
  void end(Run& run) {
    if (run.continuation) gate_.call_later(std::exchange(run.continuation, nullptr));
    run.done.store(true, std::memory_order_release);
  }
  /// The operation is in flight no longer.
  [[gnu::always_inline]] Report close(Run& run) {
    count(run);
    runs_.delist(run);
    if (!runs_.first()) transport_->exit();
    let_go(run);
    Report report = progress_.finish(run.account);
    fill(report, run);
    if (watched()) [[unlikely]] ledger_.watched().ended(run.observed, report, false);
    return report;
  }
  void let_go(Run& run) {
    run.active = nullptr;
    if (run.holds) PlanCache::give_back(std::move(run.holds));
    else if (run.prepared) run.prepared->busy = false;
    run.prepared = nullptr;
  }
  void fill(Report& report, const Run& run) {
    report.bytes_sent = run.sent;
    report.bytes_received = run.received;
    report.bytes_wire = run.sent + run.overhead;
    report.ledger = ledger_.handle();
    report.sequence = run.number;
    if (run.row) report.algorithm = run.row->algorithm;
    if (run.call && !run.call->hears_all()) report.last_arrival = -1;
  }
  /// Operations that nobody holds any longer.
  [[gnu::noinline]] void take_returned() {
    returned_.take_all([this](Run& run) {
      book(run);
      run.error = nullptr;
      runs_.free(run);
    });
  }
  bool watched() const { return static_cast<bool>(ledger_.watched()); }
  nanoseconds exposed(const Run& run) const { return std::min(run.report.elapsed - run.report.undriven, clock_.to_ns(run.exposed)); }
  /// In the background: by the caller's thread, when its report is fetched.
  void book(Run& run) {
    if (run.booked) return;
    run.booked = true;
    run.report.exposed = exposed(run);
    if (!run.row) return;
    ledger_.book(run.booking(), run.report, clock_);
    ledger_.settle();
    if (run.error) ++run.row->failed;
  }
  /// In a handler of what was thrown: what is in flight ends with it, the other ranks are told, and this communicator refuses further use.
  [[gnu::cold]] void fail() {
    Rank peer = diagnosis_.late_rank();
    const State cause = peer >= 0 ? State::wait_arrival : State::wait_transfer;
    if (peer < 0) peer = diagnosis_.first_missing();
    const Run& run = *diagnosis_.serving;
    std::exception_ptr thrown = std::current_exception();
    failed_.emplace(diagnosis_.error_of(run, detected_));
    for (Run* r = runs_.first(); r; r = r->after) withdraw(*r);
    transport_->abort({failed_->errc(), rank(), failed_->peer(), std::string(failed_->text())});
    if (detected_) {  // several ranks may find the same failure at once: the first notice wins, so all raise the same
      const AbortNotice notice = transport_->abort_notice();
      failed_.emplace(notice.code, notice.text, ErrorContext{rank(), notice.rank == rank() ? failed_->peer() : blamed(notice), run.sequence, failed_->elapsed()});
    }
    shares_.wait_for_others();
    give_up(detected_ ? nullptr : thrown, peer, cause);
    diagnosis_.waited = nullptr;
  }
  /// All in flight have failed: the one that was served with what it threw, the others with what the communicator says from now on.
  [[gnu::cold]] void give_up(std::exception_ptr thrown = nullptr, Rank missing = -1, State cause = State::wait_transfer) {
    locals_.clear();
    finished_ = nullptr;
    mailbox_.clear();
    while (Run* first = runs_.first()) {
      Run& run = *first;
      withdraw(run);
      runs_.delist(run);
      let_go(run);
      run.report = progress_.finish_failed(run.account, missing, cause);
      fill(run.report, run);
      if (watched() && run.row) ledger_.watched().ended(run.observed, run.report, true);
      if (run.background) {
        run.error = thrown && &run == diagnosis_.serving ? thrown : std::make_exception_ptr(*failed_);
        end(run);
      } else if (run.row) {
        ledger_.book(run.booking(), run.report, clock_);
        ledger_.settle();
        ++run.row->failed;
      }
    }
    transport_->exit();
  }

  Rank blamed(const AbortNotice& notice) const { return notice.peer < 0 || (notice.code == Errc::mismatch && notice.peer == rank()) ? notice.rank : notice.peer; }  // the other one, of two that disagree
  std::unique_ptr<T> transport_;
  [[no_unique_address]] LeftBehind<T> left_behind_;
  Clock clock_;
  WaitPolicy wait_;
  bool accounting_;
  Ledger ledger_;
  Progress<T> progress_;
  ShareWork<Engine, T> shares_{*this, *transport_};
  Planner planner_;
  Runs runs_;
  Mailbox<Engine> mailbox_{*this};
  Diagnosis<T> diagnosis_{*transport_, runs_};
  Run* finished_ = nullptr;                // of the background, not yet completed
  ReturnedRuns returned_;                  // of the background, to be booked and freed by the caller's thread
  LocalSteps locals_;
  struct {
    std::uint64_t sent = 0, received = 0, overhead = 0;
  } counted_;                               // the transport's counters when they were last looked at
  std::uint64_t sequence_ = 0, moves_ = 0;
  bool limit_is_error_ = true, out_of_time_ = false;
  std::optional<Error> failed_;
  bool detected_ = false;  // failed_ was found here, by the transport or told by another rank, not thrown by a user's operator
  Gate gate_;
};

}  // namespace tally::inline v0
