// SPDX-License-Identifier: Apache-2.0
// An operation from its post to its report, and the engine as communicators see it: without transport, accounting or
// element types.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "account/ledger.hpp"
#include "call.hpp"
#include "memory.hpp"
#include "prepared.hpp"
#include "progress.hpp"
#include "transport/any.hpp"

namespace tally::inline v0 {

/// Memory that only grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  std::byte* data() const { return data_; }
  /// What it held is lost.
  void grow(std::size_t needed) {
    if (needed <= bytes_) return;
    std::byte* larger = static_cast<std::byte*>(::operator new(needed, std::align_val_t{64}, std::nothrow));
    if (!larger) throw Error(Errc::no_resources, {"no memory for ", needed, " bytes of scratch"});
    ::operator delete(data_, std::align_val_t{64});
    data_ = larger;
    bytes_ = needed;
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Owned by the engine, lent to whoever started it.
struct Run {
  explicit Run(int n) : account(n) {}

  std::uint64_t sequence = 0;  // of the collectives; frames carry its low half
  std::uint64_t fingerprint = 0, count = 0;
  std::uint32_t number = 0;    // of this rank's operations, messages included
  bool background = false;     // started to be waited for later: somebody holds it
  bool in_flight = false, booked = false;
  std::atomic<bool> done{false};

  const Call* call = nullptr;
  Call own_call;               // of those in the background
  std::shared_ptr<const void> kept;  // what it points at, the operator
  Prepared* prepared = nullptr;
  std::shared_ptr<Prepared> holds;  // it, where the engine may let go of it meanwhile
  Prepared* active = nullptr;  // whose transfers are under way: prepared, or a meeting
  LedgerRow* row = nullptr;
  std::uint64_t observed = 0;  // what the observer made of its beginning
  Message message;             // where call is null
  Transfer transfer;           // of a message
  Message other;               // the send of a send_receive,
  Transfer other_transfer;     // and its transfer
  bool both = false;           // it is one
  std::vector<std::byte> buffer;  // of a message that nobody waited for
  Run* receiver = nullptr;        // who does now
  std::size_t remaining = 0;   // transfers not done
  Scratch scratch;
  std::uint64_t bytes = 0;     // of the caller's data
  std::uint64_t sent = 0, received = 0, overhead = 0;  // bytes

  OperationAccount account;
  nanoseconds timeout{};
  Ticks posted = 0, deadline = 0, exposed = 0;  // of those in the background
  Report report;
  std::exception_ptr error;
  std::function<void()> continuation;
  Run *before = nullptr, *after = nullptr;  // in flight, in the order in which they were posted
  Run* next = nullptr;                      // of the finished, or of the free

  Ledger::Booking booking() const { return {row, bytes, call ? sequence : 0, account.arrival, &account.watch}; }
};

/// What an operation reads and writes of the caller's memory.
struct Buffers {
  Buffers() = default;
  explicit Buffers(const Call& call) : in(call.input_bytes()), out(call.output_bytes()) {}
  explicit Buffers(const Message& message) { add(message); }
  Buffers(const Part& part, std::size_t grain) : in(part.in, part.in ? part.count * grain : 0), out(part.out, part.out ? part.count * grain : 0) {}
  Buffers(const Message& one, const Message& other) : Buffers(one) { add(other); }
  /// Of one in flight.
  explicit Buffers(const Run& run) {
    if (run.call) *this = Buffers(*run.call);
    else if (run.both) *this = Buffers(run.message, run.other);
    else add(run.message);
  }
  /// From here on it is the hull of both.
  void widen(const Buffers& by) {
    widen(in, by.in);
    widen(out, by.out);
  }
  /// What one writes the other must neither read nor write.
  bool clashes(const Buffers& other) const { return overlap(out, other.out) || overlap(out, other.in) || overlap(in, other.out); }
  bool overlap_themselves() const { return overlap(in, out); }

  std::span<const std::byte> in, out;

 private:
  void add(const Message& m) { (m.is_send ? in : out) = {m.data, m.bytes}; }
  static void widen(std::span<const std::byte>& hull, std::span<const std::byte> by) {
    if (by.empty()) return;
    if (hull.empty()) return void(hull = by);
    const std::less<> before;
    const std::byte* const first = std::min(hull.data(), by.data(), before);
    hull = {first, std::max(hull.data() + hull.size(), by.data() + by.size(), before)};
  }
  static bool overlap(std::span<const std::byte> a, std::span<const std::byte> b) {
    const std::less<> before;
    return !a.empty() && !b.empty() && before(a.data(), b.data() + b.size()) && before(b.data(), a.data() + a.size());
  }
};

/// All runs of an engine: those in flight, in the order in which they were posted, and those that are free.
class Runs {
 public:
  /// Two at least are there, so that the ledger can read the last one's stopwatch at leisure.
  explicit Runs(int n) : n_(n) {
    for (int i = 0; i < 2; ++i) free(*all_.emplace_back(std::make_unique<Run>(n)));
  }
  /// One of which nothing is known yet.
  Run& take() {
    if (free_first_ == free_last_) [[unlikely]] add();
    Run& run = *free_first_;
    free_first_ = run.next;
    return run;
  }
  void free(Run& run) {
    run.next = nullptr;
    (free_first_ ? free_last_->next : free_first_) = &run;
    free_last_ = &run;
  }
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
  /// The oldest in flight; null if none is.
  Run* first() const { return first_; }
  bool several() const { return first_ != last_; }

  /// What those in the background read and write lies in here: what does not clash with it need not be compared with each.
  const Buffers& hull() const { return hull_; }
  /// No deadline of those in the background comes before this. They end all the time, and which is next is not looked for each time.
  Ticks soonest() const { return soonest_; }
  /// The last one goes on in the background, as do all others.
  void leave_last_in_background() {
    if (!several()) hull_ = Buffers(), soonest_ = last_->deadline;
    const Buffers buffers(*last_);
    hull_.widen(buffers);
    soonest_ = std::min(soonest_, last_->deadline);
  }
  /// When that has come: whose deadline is next. There is one in flight.
  Run& find_soonest() {
    Run* found = first_;
    for (Run* run = first_; run; run = run->after)
      if (run->deadline < found->deadline) found = run;
    soonest_ = found->deadline;
    return *found;
  }

 private:
  [[gnu::cold, gnu::noinline]] void add() { free(*all_.emplace_back(std::make_unique<Run>(n_))); }

  int n_;
  std::vector<std::unique_ptr<Run>> all_;
  Run *free_first_ = nullptr, *free_last_ = nullptr, *first_ = nullptr, *last_ = nullptr;
  std::uint32_t number_ = 0;
  Ticks soonest_ = 0;
  Buffers hull_;
};

/// Runs that nobody holds any longer, given by any thread and taken by one. (A stack after Treiber; taken whole, so nothing comes back meanwhile.)
class ReturnedRuns {
 public:
  bool any() const { return first_.load(std::memory_order_relaxed) != nullptr; }
  void push(Run& run) {
    run.next = first_.load(std::memory_order_relaxed);
    while (!first_.compare_exchange_weak(run.next, &run, std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  template <class F>
  void take_all(F&& f) {
    for (Run* run = first_.exchange(nullptr, std::memory_order_acquire); run;) f(*std::exchange(run, run->next));
  }

 private:
  std::atomic<Run*> first_{nullptr};
};

/// What communicators see: one virtual call per operation hides which transport and accounting are at work.
class AnyEngine {
 public:
  virtual ~AnyEngine() = default;
  virtual Report run(const Call& call) = 0;
  /// Plans the call for good: as long as the result is kept, run() need not look for it.
  virtual std::shared_ptr<void> pin(const Call& call) = 0;

  // Messages. `received`, where it is asked for, is told which one came.
  virtual Report run(const Message& message, Message* received) = 0;
  virtual Report run(const Message& send, const Message& receive, Message* received) = 0;  // both at once, to and from other ranks

  // In the background. What `kept` points at lives as long as the operation does; who started one gives it back.
  virtual Run* start(const Call& call, std::shared_ptr<const void> kept) = 0;
  virtual Run* start(const Message& message) = 0;
  /// Drives until it is done, or for so long; zero: once. True: it is done. An error that ends it is left for fetch().
  virtual bool wait(Run& run, const nanoseconds* at_most) = 0;
  virtual Report fetch(Run& run) = 0;  // of one that is done; throws what it failed with
  virtual void give_back(Run& run) = 0;  // waits until it is done
  virtual bool is_inside() const = 0;    // this thread is at work in here: it is in an operator that this engine calls
  virtual void then(Run& run, std::function<void()> f) = 0;
  /// For a progress thread: drives what is in flight until the oldest is done, or nothing has moved for so long, or somebody
  /// wants it back; `looks`: by turns with so many communicators; `moved` becomes true if anything moved.
  enum class Driven : std::uint8_t { nothing_left, more, by_caller };  // by_caller: its thread is in here
  virtual Driven drive(nanoseconds patience, std::size_t looks, bool& moved) = 0;
  /// For a thread that waits elsewhere: does what can be done without waiting. False if nothing is in flight; `moved` becomes true if anything moved.
  virtual bool look_in(bool& moved) = 0;
  virtual void be_known_as(const std::shared_ptr<AnyEngine>&) {}  // who it is to such threads
  virtual void step_back() = 0;  // ends a drive(), from any thread
  virtual bool pending() = 0;  // something is in flight, as far as can be told without waiting
  virtual void be_driven_by_others() = 0;  // from the caller's thread, before the first drive()

  struct Settings {
    Clock clock;
    WaitPolicy wait;
    bool accounting;
  };
  virtual Settings settings() const = 0;

  virtual void leave() = 0;  // says goodbye; run() throws from then on
  virtual void abort(const std::string& why) = 0;  // from any thread
  virtual Rank rank() const = 0;
  virtual int size() const = 0;
  virtual const Ledger& ledger() const = 0;
  virtual TransportCounters counters() const = 0;
  virtual std::string ways() const = 0;  // of a transport that has several: which goes to whom
  virtual const Partition* partition() const { return nullptr; }  // of one that knows who is close to whom
  // For some of the ranks, in this order: members[0] reserves, all members open the token, members[0] releases it.
  virtual std::uint64_t reserve(std::span<const Rank> members) = 0;
  virtual std::unique_ptr<AnyEngine> open(std::uint64_t token, std::span<const Rank> members) = 0;
  virtual std::unique_ptr<AnyTransport> open_transport(std::uint64_t token, std::span<const Rank> members) = 0;  // without an engine
  virtual void release(std::uint64_t token) = 0;
  virtual void discard(std::uint64_t token, std::span<const Rank> members) = 0;  // before that, if not all could open it
  // Symmetric memory, likewise, of all ranks: `stride` bytes per rank.
  virtual std::uint64_t reserve_memory(std::size_t stride) = 0;
  virtual std::unique_ptr<SymmetricMemory> map_memory(std::uint64_t token, std::size_t stride) = 0;
  virtual void discard_memory(std::uint64_t token, std::size_t stride) = 0;  // some could not map it: nobody keeps it
  /// Whether ranks can load and store each other's private memory, and whether they have blocks of shared memory.
  virtual bool one_address_space() const = 0;
  virtual bool stages() const = 0;
  virtual std::size_t frame_bytes() const = 0;  // of a message part: no element that is combined may be larger
  /// Why the kernel does not copy between the ranks; empty if it does or nobody has tried yet.
  virtual std::string kernel_problem() const = 0;
};

}  // namespace tally::inline v0
