// SPDX-License-Identifier: Apache-2.0
// Runs a call: plans its algorithm (once per layout, then from a cache), posts all its network steps, and keeps
// the watermarks of each step: up to `ready` bytes it may go, `done` bytes it has gone. Streaming, overlap of steps
// and hazards all follow from the plan. In the steady state nothing is allocated or locked.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "account/ledger.hpp"
#include "algorithms/direct.hpp"
#include "algorithms/recursive.hpp"
#include "call.hpp"
#include "kernel_copy.hpp"
#include "prepared.hpp"
#include "progress.hpp"
#include "share.hpp"
#include "staging.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

/// What communicators see: one virtual call per operation hides which transport and accounting are at work.
class AnyEngine {
 public:
  virtual ~AnyEngine() = default;
  virtual Report run(const Call& call) = 0;
  /// Plans the call for good: as long as the result is kept, run() need not look for it.
  virtual std::shared_ptr<void> pin(const Call& call) = 0;
  virtual void leave() = 0;  // says goodbye; run() throws from then on
  virtual void abort(const std::string& why) = 0;  // from any thread
  virtual Rank rank() const = 0;
  virtual int size() const = 0;
  virtual const Ledger& ledger() const = 0;
  virtual TransportCounters counters() const = 0;
  virtual std::string_view transport_name() const = 0;
  // For some of the ranks, in this order: members[0] reserves, all members open the token, members[0] releases it.
  virtual std::uint64_t reserve(std::span<const Rank> members) = 0;
  virtual std::unique_ptr<AnyEngine> open(std::uint64_t token, std::span<const Rank> members) = 0;
  virtual void release(std::uint64_t token) = 0;
  virtual void discard(std::uint64_t token, std::span<const Rank> members) = 0;  // before that, if not all could open it
  // Symmetric memory, likewise, of all ranks: `stride` bytes per rank.
  virtual std::uint64_t reserve_memory(std::size_t stride) = 0;
  virtual std::unique_ptr<SymmetricMemory> map_memory(std::uint64_t token, std::size_t stride) = 0;
  virtual void discard_memory(std::uint64_t token, std::size_t stride) = 0;  // some could not map it: nobody keeps it
  /// Whether ranks can load and store each other's private memory, and whether they have blocks of shared memory.
  virtual bool one_address_space() const = 0;
  virtual bool stages() const = 0;
  /// Why the kernel does not copy between the ranks; empty if it does or nobody has tried yet.
  virtual std::string kernel_problem() const = 0;
};

template <Transport T>
class Engine final : public AnyEngine {
 public:
  Engine(std::unique_ptr<T> transport, const Clock& clock, ModelMeter model, WaitPolicy wait = WaitPolicy::balanced, bool accounting = true)
      : transport_(std::move(transport)), clock_(clock), wait_(wait), accounting_(accounting), ledger_(transport_->size(), transport_->rank(), transport_->name(), model), progress_(*transport_, clock, wait, accounting) {}
  ~Engine() override {
    leave();
    ledger_.settle();  // while the stopwatches it reads are there
  }
  void leave() override {
    if (!failed_) failed_.emplace(Errc::invalid_argument, "this communicator is gone");
    transport_->leave();
  }
  std::shared_ptr<void> pin(const Call& call) override {
    return plans_.find(PlanKey(call));
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
  [[gnu::cold]] std::string kernel_problem() const override {
    return kernel_error_ <= 0 ? "" : detail::concat({"the kernel does not copy between the ranks' processes: ", std::strerror(kernel_error_)});
  }

  [[gnu::cold]] void abort(const std::string& why) override {
    transport_->abort({Errc::aborted, rank(), -1, detail::concat({"rank ", rank(), " aborted the communicator", why.empty() ? "" : ": ", why})});
  }

  Report run(const Call& call) override {
    if (failed_) throw *failed_;
    progress_.start(call.timeout);
    ++sequence_;
    try {
      prepare(call);
      if (transport_->aborted()) raise_abort();
      transport_->enter({sequence_, fingerprint_, call.layout.count, true, false});
      if (call.algorithm.is(Reach::staged)) take_staged_share(call);
      else if (call.algorithm.share) take_share(call);
      else run_plan(*prepared_, call.input, call.output, call.fold);
      if (call.finish && call.layout.output_count() > 0) {
        progress_.enter(State::reduce);
        call.finish(call.output, call.layout.output_count(), size());
      }
    } catch (...) {
      fail(call);
      if (detected_) throw *failed_;
      throw;  // a user's exception, as it was
    }
    transport_->exit();
    Report report = progress_.finish();
    account(report, call);
    return report;
  }

  // For Progress (see ProgressClient).

  void check(const Transfer& t, const FrameInfo& frame) {
    const auto ahead = static_cast<std::int32_t>(frame.operation - t.operation);
    if (ahead != 0) raise_out_of_step(t.peer, frame, ahead);
    if (frame.has_fingerprint && frame.fingerprint != fingerprint_) raise_mismatch(t.peer, frame.fingerprint);
    // Calls that agree send equal lengths, unless the algorithm itself is wrong.
    if (frame.first != (t.done == 0) || frame.bytes > t.bytes - t.done || frame.last != (frame.bytes == t.bytes - t.done) || frame.bytes % t.grain != 0)
      raise(Errc::mismatch, t.peer, {"rank ", t.peer, " sends a message of another length than ", describe_step(t.step), " expects (", t.bytes, " bytes)"});
  }

  void moved(Transfer& t) {
    if (!t.pending) --remaining_;
    propagate(t.step);
  }

  [[gnu::cold]] void check_peers() {
    for (Rank r = 0; r < size(); ++r) {
      const RankStatus status = transport_->status(r);
      if (r != rank() && status.inside && status.sequence == sequence_ && status.fingerprint != fingerprint_) raise_mismatch(r, status.fingerprint);
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
    raise(left ? Errc::peer_left : Errc::peer_lost, peer,
          {"rank ", peer, left ? " left the communicator" : " died", " while ", missing(), "; ", last_seen()});
  }
  [[noreturn, gnu::cold]] void raise_timeout(nanoseconds waited) {
    const Rank late = late_rank();
    raise(Errc::timeout, late >= 0 ? late : first_missing(),
          {missing(), " after ", detail::time_text(waited), late >= 0 ? detail::concat({"; rank ", late, " has not called it; "}) : "; ", last_seen()});
  }
  [[noreturn, gnu::cold]] void raise_abort() {
    const AbortNotice notice = transport_->abort_notice();
    detected_ = true;
    throw Error(notice.code, notice.text, {rank(), blamed(notice), sequence_, progress_.waited()});
  }

 private:
  struct Scratch {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
    void grow(std::size_t needed) {
      if (needed <= bytes) return;
      std::byte* larger = static_cast<std::byte*>(::operator new(needed, std::align_val_t{64}, std::nothrow));
      if (!larger) throw Error(Errc::no_resources, {"no memory for ", needed, " bytes of scratch"});
      ::operator delete(data, std::align_val_t{64});
      data = larger;
      bytes = needed;
    }
  };
  static constexpr std::size_t local_slice = std::size_t{64} << 10;  // a local step lets the network go on after this

  void prepare(const Call& call) {
    previous_ = {fingerprint_, key_.layout.count};
    const std::uint64_t last = fingerprint_;
    fingerprint_ = detail::Fingerprint::of(call).pack();
    active_ = nullptr;
    if (call.pinned) {
      if (prepared_.get() != call.pinned) {
        key_ = PlanKey(call);
        prepared_ = static_cast<Prepared*>(call.pinned)->shared_from_this();
        give_row(*prepared_, call);
      }
    } else if (!prepared_ || fingerprint_ != last || call.layout.count != key_.layout.count || call.layout.in_place != key_.layout.in_place || call.algorithm.generate != key_.generate ||
               call.algorithm.share != key_.share || call.algorithm.name.data() != key_.name) {  // the fingerprint tells the rest
      key_ = PlanKey(call);
      prepared_ = nullptr;
      prepared_ = plans_.find(key_);
      give_row(*prepared_, call);
    }
    scratch_.grow(prepared_->plan.scratch());
  }

  void give_row(Prepared& prepared, const Call& call) {
    if (!prepared.row) prepared.row = &ledger_.row(call.layout.operation, call.bytes(), call.algorithm.name);
  }

  /// Posts all steps and drives them to their end.
  void run_plan(Prepared& prepared, const std::byte* input, std::byte* output, const Fold& fold) {
    active_ = &prepared;
    fold_ = fold;
    local_.clear();
    local_.reserve(prepared.transfers.size());
    const auto address = [&](const Range& range) -> const std::byte* {
      const std::byte* base = range.buffer == Buffer::input ? input : range.buffer == Buffer::output ? output : scratch_.data;
      return base ? base + range.first : nullptr;
    };
    const Lateness arrival = progress_.arrival();
    const auto lane = static_cast<std::uint16_t>(sequence_ % static_cast<unsigned>(transport_->lanes()));
    remaining_ = prepared.transfers.size();
    for (std::uint32_t i = 0; i < prepared.transfers.size(); ++i) {
      const PlannedStep& step = prepared.plan.steps()[i];
      Transfer& t = prepared.transfers[i];
      t.from = address(step.from);
      t.to = const_cast<std::byte*>(address(step.to));  // plans never write the input
      t.ready = prepared.ready[i];
      t.done = 0;
      t.operation = static_cast<std::uint32_t>(sequence_);
      t.fingerprint = fingerprint_;
      t.lane = lane;
      t.inherited = t.late = arrival;
      prepared.queued[i] = 0;
    }
    // Some are done as soon as they are posted, and move others.
    for (std::uint32_t i = 0; i < prepared.transfers.size(); ++i) {
      Transfer& t = prepared.transfers[i];
      if (t.peer >= 0) progress_.post(t, *this);
      else if (t.ready > 0) queue_local(i);
    }
    ledger_.settle();  // what was sent takes longer to arrive than this
    while (remaining_ > 0) {
      if (local_.empty()) progress_.turn(*this);
      else {
        run_local();
        progress_.poll(*this);
      }
    }
    transport_->flush();
  }

  /// How ranks name their buffers to each other: an address, or a place in symmetric memory; 0 names nothing. And the
  /// whole count, since fingerprints hold but 16 bits of it and here no frame's length shows a difference.
  struct Names {
    std::uint64_t input = 0, output = 0, count = 0;
  };

  /// All meet and say where their buffers lie, each does its share in everyone's, all meet again.
  void take_share(const Call& call) {
    if constexpr (DirectAccess<T>) {
      const bool kernel = call.algorithm.is(Reach::kernel);
      if (kernel && !kernel_copies(call)) {
        prepared_->row = &ledger_.row(call.layout.operation, call.bytes(), "staged");
        return take_staged_share(call);
      }
      const Share share = call.algorithm.share(call.layout.shape());
      lent_ = kernel || transport_->one_address_space();
      meet({name_of(call.input, call.input_memory), name_of(call.output, call.output_memory), call.layout.count});
      {
        // Who aborts waits for this, since its memory may go as soon as its call has returned.
        struct Sharing {
          T& transport;
          explicit Sharing(T& shared) : transport(shared) { transport.sharing(true); }
          ~Sharing() { transport.sharing(false); }
        };
        std::optional<Sharing> sharing;
        if (lent_) sharing.emplace(*transport_);
        if (transport_->aborted()) raise_abort();
        const std::size_t length = share.from.count * call.grain;
        const auto process = [&](Rank r) { return r == rank() ? 0 : processes_[static_cast<std::size_t>(r)]; };
        pass_.sources.clear();
        pass_.targets.clear();
        kernel_pass_.sources.clear();
        kernel_pass_.targets.clear();
        const ShareBytes bytes = for_each_rank_of(
            share, rank(), size(), call.grain,
            [&](Rank r) {
              std::byte* source = reach(call, r, share.from, length);
              if (kernel) kernel_pass_.sources.push_back({process(r), source});
              else pass_.sources.push_back(source);
            },
            [&](Rank r) {
              std::byte* target = reach(call, r, share.to, length);
              if (kernel) kernel_pass_.targets.push_back({process(r), target});
              else pass_.targets.push_back(target);
            });
        if (length > short_bytes) progress_.enter(call.fold.function ? State::reduce : State::copy);
        if (kernel) run_by_kernel(call, length);
        else pass_.run(length, call.grain, &call.fold, writes_past_caches(call) && !call.fold.function);
        transport_->shared(bytes.stored, bytes.loaded);
      }
      meet({0, 0, call.layout.count});
      lent_ = false;
    } else {
      refuse_share(call);
    }
  }
  /// Shares likewise (see Prepared): what was just read is not only written.
  bool writes_past_caches(const Call& call) const { return prepared_->past_caches && !call.layout.in_place; }
  void run_by_kernel(const Call& call, std::size_t bytes) {
    pid_t failed = 0;
    const int error = kernel_pass_.run(bytes, call.grain, &call.fold, pass_, failed);
    if (error == 0) return;
    const Rank r = static_cast<Rank>(std::find(processes_.begin(), processes_.end(), failed) - processes_.begin());
    if (error == ESRCH || transport_->liveness(r) != Liveness::alive) raise_lost(r);
    raise(Errc::no_resources, r, {"the kernel cannot copy between rank ", rank(), " and rank ", r, " in ", describe_call(), ": ", std::strerror(error)});
  }
  /// Whether it does; found out together, once.
  [[gnu::cold]] bool kernel_copies(const Call& call) {
    if (kernel_error_ >= 0) return kernel_error_ == 0;
    admit_other_processes();
    const auto mark = [](std::uint64_t address, std::uint64_t process) { return (address ^ process << 32) * 0x9e3779b97f4a7c15u; };
    std::uint64_t probe = 0;
    const std::uint64_t address = reinterpret_cast<std::uintptr_t>(&probe), me = static_cast<std::uint64_t>(::getpid());
    probe = mark(address, me);
    meet({address, me, call.layout.count});
    int error = 0;
    processes_.assign(static_cast<std::size_t>(size()), 0);
    for (Rank r = 0; r < size(); ++r) {
      const Names& names = names_[static_cast<std::size_t>(r)];
      const pid_t process = processes_[static_cast<std::size_t>(r)] = static_cast<pid_t>(names.output);
      std::uint64_t read = 0;
      if (r == rank() || error != 0) continue;
      error = copy_by_kernel(false, process, reinterpret_cast<std::byte*>(&read), reinterpret_cast<std::byte*>(names.input), sizeof read);
      if (error == 0 && read != mark(names.input, names.output)) error = ESRCH;  // another process by that number: they live in different namespaces
    }
    meet({static_cast<std::uint64_t>(error), 0, call.layout.count});
    kernel_error_ = 0;
    for (const Names& names : names_) kernel_error_ = std::max(kernel_error_, static_cast<int>(names.input));
    return kernel_error_ == 0;
  }
  /// The same in blocks of shared memory, piece by piece. Between two meetings each rank puts in one piece, combines its
  /// share of the one before and takes out the one before that, so three pieces are under way.
  void take_staged_share(const Call& call) {
    if constexpr (DirectAccess<T>) {
      const std::size_t area = transport_->staging_bytes(), gap = area / 64;
      const Staging staging(call, area / 4 - gap, writes_past_caches(call));
      const std::size_t pieces = staging.pieces();
      std::size_t at[3] = {};
      const auto block = [&](Rank r, std::size_t i) { return transport_->staging(r) + at[i % 3]; };
      const auto moving = [&](std::size_t bytes, State state) { progress_.enter(bytes > short_bytes ? state : State::protocol); };
      const auto copying = [&](std::size_t bytes) { moving(bytes, State::copy); };
      for (std::size_t i = 0; i < pieces + 2; ++i) {
        if (i < pieces) {
          if (staged_at_ + staging.bytes(i) > area) staged_at_ = 0;
          at[i % 3] = staged_at_;
          staged_at_ += (staging.bytes(i) + gap + 127) / 128 * 128;
          staging.put(i, block(rank(), i), copying);
        }
        if (i >= 1 && i - 1 < pieces) {
          const ShareBytes bytes = staging.find(i - 1, pass_, [&](Rank r) { return block(r, i - 1); });
          moving(bytes.length, call.fold.function ? State::reduce : State::copy);
          pass_.run(bytes.length, call.grain, &call.fold);
          transport_->shared(bytes.stored, bytes.loaded);
        }
        if (i >= 2) staging.take(i - 2, block(rank(), i - 2), copying);
        if (i <= pieces) meet({0, 0, call.layout.count});
      }
    } else {
      refuse_share(call);
    }
  }
  [[noreturn, gnu::cold]] void refuse_share(const Call& call) {
    throw Error(Errc::unsupported, {call.algorithm.name, " needs ranks that share memory"}, {rank(), -1, sequence_, {}});
  }
  void meet(const Names& mine) {
    progress_.enter(State::protocol);
    names_.resize(static_cast<std::size_t>(size()));
    names_[static_cast<std::size_t>(rank())] = mine;
    if (!meeting_) {
      const Layout layout{Collective::all_gather, rank(), size(), 0, sizeof(Names), true};
      meeting_ = plans_.make({layout, size() <= direct_meeting_ranks ? OneShot::all_gather : RecursiveDoubling::all_gather});
    }
    auto* names = reinterpret_cast<std::byte*>(names_.data());
    run_plan(*meeting_, names + sizeof(Names) * static_cast<std::size_t>(rank()), names, Fold{});
    for (Rank r = 0; r < size(); ++r)
      if (names_[static_cast<std::size_t>(r)].count != mine.count) raise_mismatch(r, fingerprint_);
  }
  std::uint64_t name_of(const std::byte* place, const SymmetricMemory* memory) const {
    if (!place) return 0;
    return lent_ || !memory ? reinterpret_cast<std::uintptr_t>(place) : memory->name_of(place);
  }
  /// Where the range of rank r's buffer is for this rank.
  std::byte* reach(const Call& call, Rank r, const Range& range, std::size_t bytes) {
    const bool input = range.buffer == Buffer::input;
    const std::size_t first = range.first * call.grain;
    if (r == rank()) return (input ? const_cast<std::byte*>(call.input) : call.output) + first;
    const Names& names = names_[static_cast<std::size_t>(r)];
    const std::uint64_t name = input ? names.input : names.output;
    if (lent_ && name != 0) return reinterpret_cast<std::byte*>(name) + first;
    const SymmetricMemory* memory = input || !call.output_memory ? call.input_memory : call.output_memory;
    if (std::byte* place = memory ? memory->find(r, name, first + bytes) : nullptr) return place + first;
    raise(Errc::mismatch, r, {"rank ", r, " does not pass the same symmetric memory as rank ", rank(), " to ", describe_call()});
  }

  void queue_local(std::uint32_t i) {
    if (active_->queued[i]) return;
    active_->queued[i] = 1;
    local_.push_back(i);
  }
  /// One slice of each local step that can go on.
  void run_local() {
    for (std::size_t n = local_.size(); n > 0; --n) {
      const std::uint32_t i = local_.front();
      local_.erase(local_.begin());
      active_->queued[i] = 0;
      Transfer& t = active_->transfers[i];
      const std::size_t bytes = std::min(t.ready - t.done, local_slice - local_slice % t.grain);
      const std::byte* from = t.from + t.done;
      std::byte* to = t.to + t.done;
      if (bytes > short_bytes) progress_.enter(t.fold ? State::reduce : State::copy);
      if (t.past_caches) copy_past_caches(to, from, bytes);
      else if (!t.fold) std::memmove(to, from, bytes);
      else if (t.side == Side::right) (*t.fold)(to, to, from, bytes);
      else (*t.fold)(to, from, to, bytes);
      t.done += bytes;
      if (t.done == t.bytes) --remaining_;
      else if (t.done < t.ready) queue_local(i);
      propagate(i);
    }
  }

  /// Step i moved: whoever waits for it may go further, and inherits what it was late by.
  void propagate(std::uint32_t i) {
    const PlannedStep& step = active_->plan.steps()[i];
    const Transfer& moved = active_->transfers[i];
    for (std::uint32_t d = step.first_dependent; d < step.first_dependent + step.dependents; ++d) {
      const std::uint32_t j = active_->plan.dependents()[d];
      Transfer& t = active_->transfers[j];
      t.inherited.raise(moved.late);
      t.late.raise(moved.late);
      t.ready = active_->plan.ready(j, [&](std::size_t k) { return active_->transfers[k].done; });
      if (t.peer < 0 && t.ready > t.done) queue_local(j);
    }
  }

  void account(Report& report, const Call& call) {
    const TransportCounters& now = transport_->counters();
    report.bytes_sent = now.bytes_sent - sent_before_;
    report.bytes_received = now.bytes_received - received_before_;
    report.bytes_wire = report.bytes_sent + now.overhead_sent - overhead_before_;
    sent_before_ = now.bytes_sent;
    received_before_ = now.bytes_received;
    overhead_before_ = now.overhead_sent;
    report.ledger = ledger_.handle();
    report.sequence = static_cast<std::uint32_t>(sequence_);
    if (!prepared_ || !prepared_->row) return;
    report.algorithm = prepared_->row->algorithm;
    ledger_.book(*prepared_->row, report, call.bytes(), progress_.watch(), clock_);
  }

  // Failure: everything pending is withdrawn, the other ranks are told, and this communicator refuses further use.

  [[gnu::cold]] void fail(const Call& call) {
    Rank peer = -1;
    State cause = State::wait_transfer;
    if (active_) {
      peer = late_rank();
      if (peer >= 0) cause = State::wait_arrival;
      else peer = first_missing();
      for (Transfer& t : active_->transfers) transport_->cancel(t);
    }
    try {
      throw;
    } catch (const Error& error) {
      failed_.emplace(error);
    } catch (const std::exception& error) {
      failed_.emplace(Errc::aborted, detail::concat({"rank ", rank(), ": exception during ", describe_call(), ": ", error.what()}), ErrorContext{rank(), rank(), sequence_, {}});
    } catch (...) {
      failed_.emplace(Errc::aborted, detail::concat({"rank ", rank(), ": exception during ", describe_call()}), ErrorContext{rank(), rank(), sequence_, {}});
    }
    transport_->abort({failed_->errc(), rank(), failed_->peer(), std::string(failed_->text())});
    if (detected_) {  // several ranks may find the same failure at once: the first notice wins, so all raise the same
      const AbortNotice notice = transport_->abort_notice();
      failed_.emplace(notice.code, notice.text, ErrorContext{rank(), notice.rank == rank() ? failed_->peer() : blamed(notice), sequence_, failed_->elapsed()});
    }
    if constexpr (DirectAccess<T>)
      for (Rank r = 0; lent_ && r < size(); ++r)
        while (r != rank() && transport_->is_sharing(r) && transport_->liveness(r) == Liveness::alive) sched_yield();
    transport_->exit();
    Report report = progress_.finish_failed(peer, cause);
    account(report, call);
    if (prepared_ && prepared_->row) ++prepared_->row->failed;
  }

  /// Transfers that only their peer holds up: the first of their queue, and free to go on.
  template <class F>
  void for_each_needed(F&& f) const {
    if (!active_) return;
    std::vector<char> seen(2 * static_cast<std::size_t>(size()));
    for (const Transfer& t : active_->transfers) {
      char& queue = seen[2 * static_cast<std::size_t>(std::max(t.peer, 0)) + (t.is_send ? 1 : 0)];
      if (!t.pending || queue) continue;
      queue = 1;
      if (t.bytes == 0 || t.ready > t.done) f(t);
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
    const auto absent = [&](Rank r) {
      const RankStatus status = transport_->status(r);
      return !status.left && status.sequence < sequence_;
    };
    const Rank direct = first_missing();
    if (direct < 0 || absent(direct)) return direct;
    if (has_root(key_.layout.operation)) return -1;  // not everyone matters to everyone
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
    return detail::concat({"rank ", rank(), " in ", describe_call(), from.empty() ? "" : " waits for data from ", from,
                           room.empty() ? "" : from.empty() ? " waits for room at " : " and for room at ", room});
  }
  [[gnu::cold]] std::string describe_call() const { return detail::concat({detail::describe(fingerprint_, key_.layout.count), " #", sequence_}); }
  [[gnu::cold]] std::string describe_step(std::uint32_t i) const { return detail::concat({"step ", i, " of ", describe_call()}); }
  [[gnu::cold]] std::string last_seen() const {
    std::string text = "last seen:";
    for (Rank r = 0; r < size(); ++r) {
      const RankStatus s = transport_->status(r);
      text += detail::concat({r ? "; rank " : " rank ", r});
      if (const Rank origin = transport_->origin(r); origin != r) text += detail::concat({" (", origin, " of the job)"});
      if (s.left) text += detail::concat({" left after #", s.sequence});
      else if (s.sequence == 0) text += " has called nothing";
      else text += detail::concat({s.inside ? " in " : " after ", detail::describe(s.fingerprint, s.count), " #", s.sequence});
    }
    return text;
  }

  static Rank blamed(const AbortNotice& notice) { return notice.peer >= 0 ? notice.peer : notice.rank; }
  [[noreturn, gnu::cold]] void raise(Errc code, Rank peer, std::initializer_list<detail::Piece> text) {
    detected_ = true;
    throw Error(code, text, {rank(), peer, sequence_, progress_.waited()});
  }
  [[noreturn, gnu::cold]] void raise_mismatch(Rank peer, std::uint64_t theirs) {
    const RankStatus status = transport_->status(peer);
    raise(Errc::mismatch, peer, {"operation #", sequence_, ": rank ", rank(), " called ", detail::describe(fingerprint_, key_.layout.count), ", rank ", peer,
                                  " called ", detail::describe(theirs, status.count)});
  }
  [[noreturn, gnu::cold]] void raise_out_of_step(Rank peer, const FrameInfo& frame, std::int32_t ahead) {
    const RankStatus status = transport_->status(peer);
    const std::string theirs = frame.has_fingerprint ? detail::concat({detail::describe(frame.fingerprint, status.count), " "}) : "operation ";
    raise(Errc::mismatch, peer,
          {"rank ", rank(), " in ", describe_call(), " expects data from rank ", peer, ", which ",
           ahead > 0 ? "has sent none for it and went on to " : "has sent some that was not read in ", theirs, "#", frame.operation,
           ahead == -1 ? detail::concat({", where rank ", rank(), " called ", detail::describe(previous_.fingerprint, previous_.count)}) : ""});
  }

  std::unique_ptr<T> transport_;
  Clock clock_;
  WaitPolicy wait_;
  bool accounting_;
  Ledger ledger_;
  Progress<T> progress_;
  Fold fold_;                              // of the call; plans point at it
  PlanCache plans_{&fold_};
  std::shared_ptr<Prepared> prepared_;     // of the call; the cache may let go of it
  Prepared* active_ = nullptr;             // whose transfers are under way: the call's, or a meeting
  std::shared_ptr<Prepared> meeting_;
  std::vector<Names> names_;               // of all ranks' buffers, for shares
  SharePass pass_;
  KernelPass kernel_pass_;
  std::vector<pid_t> processes_;           // of the ranks
  int kernel_error_ = -1;                  // of the kernel's copies: -1 not tried, 0 they work, else errno
  std::size_t staged_at_ = 0;              // where in all ranks' blocks the next piece begins
  bool lent_ = false;                      // other ranks may be at work in this rank's private memory
  PlanKey key_;
  Scratch scratch_;
  std::vector<std::uint32_t> local_;
  std::size_t remaining_ = 0;
  std::uint64_t sent_before_ = 0, received_before_ = 0, overhead_before_ = 0;  // the transport's counters when the last operation ended
  std::uint64_t fingerprint_ = 0;
  struct {
    std::uint64_t fingerprint = 0, count = 0;
  } previous_;  // call, for error texts
  std::uint64_t sequence_ = 0;  // of the current operation; frames carry its low half
  std::optional<Error> failed_;
  bool detected_ = false;  // failed_ was found here or told by another rank, not thrown by a user's operator
};

}  // namespace tally::inline v0
