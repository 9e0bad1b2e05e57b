// SPDX-License-Identifier: Apache-2.0
// The protocols of transport/slots.hpp and wait.hpp, transcribed step by step and run in all interleavings on two
// memories that reorder (model.hpp). Each is also run broken in every way that should matter, and must then fail:
// what the explorer does not find in those it could not find in the real ones either.
#include <catch2/catch.hpp>

#include <cstdio>
#include <string>
#include <vector>

#include "model.hpp"

using namespace model;

namespace {

constexpr Memory memories[] = {Memory::tso, Memory::weak};
constexpr const char* name_of(Memory memory) { return memory == Memory::tso ? "tso" : "weak"; }
constexpr Order acquire = Order::acquire, relaxed = Order::relaxed, release = Order::release;

Result explored(const std::string& what, const Model& m, Memory memory) {
  const Result result = explore(m, memory);
  std::printf("%-58s %-5s %8zu states%s\n", what.c_str(), name_of(memory), result.states, result.violation.empty() ? "" : ": fails");
  return result;
}
void holds(const std::string& what, const Model& m) {
  for (const Memory memory : memories) {
    const Result result = explored(what, m, memory);
    CAPTURE(what, name_of(memory));
    CHECK(result.violation == "");
  }
}
/// Must fail, and for the reason given: a trace that begins otherwise has found something else.
void fails(const std::string& what, const Model& m, Memory memory, const std::string& why) {
  const Result result = explored(what, m, memory);
  CAPTURE(what, name_of(memory), result.violation);
  CHECK(result.violation.find(why) != std::string::npos);
}
void fails(const std::string& what, const Model& m, const std::string& why) {
  for (const Memory memory : memories) fails(what, m, memory, why);
}

// Litmus tests: what these memories are known to do.

/// Each thread stores to its own location and then reads the other's.
Model store_buffering(bool first_fences, bool second_fences, bool first_membarrier = false) {
  Model m{{"x", "y"}, {{}, {}}, "one of the two saw the other's store", [](const State& s) { return s.threads[0].registers[0] + s.threads[1].registers[0] > 0; }};
  for (int t = 0; t < 2; ++t) {
    Program& p = m.programs[static_cast<std::size_t>(t)];
    p.store(t, 1);
    if (t == 0 ? first_fences : second_fences) p.fence();
    if (t == 0 && first_membarrier) p.membarrier(0, 2);
    p.load(1 - t, relaxed, 0);
  }
  return m;
}
Model message_passing(Order flag_stored, Order flag_loaded) {
  Model m{{"data", "flag"}, {{}, {}}};
  m.programs[0].store(0, 1);
  m.programs[0].store(1, 1, flag_stored);
  Program& p = m.programs[1];
  p.load(1, flag_loaded, 0);
  p.load(0, relaxed, 1);
  p.expect("who sees the flag sees the data", [](const Registers& r) { return r[0] == 0 || r[1] == 1; });
  return m;
}

}  // namespace

TEST_CASE("the explorer knows what memories do", "[proof]") {
  const std::string both_zero = "one of the two saw the other's store", no_data = "who sees the flag sees the data";
  fails("store buffering", store_buffering(false, false), both_zero);
  fails("store buffering, one fence", store_buffering(true, false), both_zero);
  holds("store buffering, two fences", store_buffering(true, true));
  holds("store buffering, membarrier on one side", store_buffering(false, false, true));

  holds("message passing", message_passing(release, acquire));
  CHECK(explored("message passing, relaxed", message_passing(relaxed, relaxed), Memory::tso).violation == "");
  fails("message passing, relaxed store", message_passing(relaxed, acquire), Memory::weak, no_data);
  fails("message passing, relaxed load", message_passing(release, relaxed), Memory::weak, no_data);

  // One location is never seen to go back, by whoever loads it.
  Model coherence{{"x"}, {{}, {}}};
  for (const Value v : {Value{1}, Value{2}, Value{3}}) coherence.programs[0].store(0, v);
  for (const int reg : {0, 1, 2}) coherence.programs[1].load(0, relaxed, reg);
  coherence.programs[1].expect("values do not go back", [](const Registers& r) { return r[0] <= r[1] && r[1] <= r[2]; });
  holds("coherence", coherence);

  // Everyone's own stores are seen at once, however long they stay in the buffer.
  Model forwarding{{"x"}, {{}}};
  forwarding.programs[0].store(0, 1);
  forwarding.programs[0].store(0, 2);
  forwarding.programs[0].load(0, relaxed, 0);
  forwarding.programs[0].expect("own stores are seen", [](const Registers& r) { return r[0] == 2; });
  holds("forwarding", forwarding);

  // Two that exchange cannot both be first, and a thread without a partner waits for ever.
  Model exchanging{{"x"}, {{}, {}}, "exactly one was first", [](const State& s) { return s.threads[0].registers[0] + s.threads[1].registers[0] == 1; }};
  for (Program& p : exchanging.programs) p.exchange(0, 1, 0);
  holds("exchange", exchanging);
  Model alone{{"x"}, {{}}};
  alone.programs[0].await(0, 1, acquire);
  fails("a wait for nothing", alone, "thread 0 waits for ever");
}

namespace {

// The slot ring: SlotTransport::advance_send and advance_receive, one frame after another.

struct RingBreaks {
  bool sequence_first = false, sequence_relaxed = false, sequence_load_relaxed = false, consumed_first = false, no_credit = false, credit_late = false, consumed_load_relaxed = false,
       one_too_many = false;
};
Model slot_ring(int slots, int frames, const RingBreaks& breaks = {}) {
  enum : int { consumed, sequence = 1, payload = 3, header = 5, credit = 7 };  // two of each but the first
  Model m{{"consumed", "sequence 0", "sequence 1", "payload 0", "payload 1", "header 0", "header 1", "credit 0", "credit 1"}, {{}, {}}};
  Program& sender = m.programs[0];
  Program& receiver = m.programs[1];
  for (int k = 0; k < frames; ++k) {
    const int index = k & (slots - 1);
    const auto number = static_cast<Value>(k + 1);
    const int in_use = breaks.one_too_many ? slots + 1 : slots;
    if (k >= in_use && !breaks.no_credit) {
      sender.await_at_least(consumed, static_cast<Value>(k - in_use + 1), breaks.consumed_load_relaxed ? relaxed : acquire);
      sender.load(credit + index, relaxed, 1);
      sender.expect("a credit is that of the slot's last frame", [=](const Registers& r) { return r[1] == k - slots + 1; });
    }
    if (breaks.sequence_first) sender.store(sequence + index, number, release);
    sender.store(payload + index, number);
    sender.store(header + index, number);
    if (!breaks.sequence_first) sender.store(sequence + index, number, breaks.sequence_relaxed ? relaxed : release);

    receiver.await(sequence + index, number, breaks.sequence_load_relaxed ? relaxed : acquire);
    const auto give_back = [&] {
      if (breaks.credit_late) receiver.store(consumed, number, release);
      receiver.store(credit + index, number);
      if (!breaks.credit_late) receiver.store(consumed, number, release);
    };
    if (breaks.consumed_first) give_back();
    receiver.load(header + index, relaxed, 0);
    receiver.load(payload + index, relaxed, 1);
    receiver.expect("a frame has its own header and payload", [=](const Registers& r) { return r[0] == number && r[1] == number; });
    if (!breaks.consumed_first) give_back();
  }
  return m;
}

}  // namespace

TEST_CASE("slots hand over every frame", "[proof]") {
  for (const int slots : {1, 2})
    for (const int frames : {3, 4}) holds("ring of " + std::to_string(slots) + ", " + std::to_string(frames) + " frames", slot_ring(slots, frames));

  const std::string own = "a frame has its own header and payload", credit = "a credit is that of the slot's last frame";
  for (const int slots : {1, 2}) {
    const std::string ring = "ring of " + std::to_string(slots) + ", ";
    fails(ring + "sequence before payload", slot_ring(slots, 3, {.sequence_first = true}), own);
    fails(ring + "sequence relaxed", slot_ring(slots, 3, {.sequence_relaxed = true}), Memory::weak, own);
    fails(ring + "sequence loaded relaxed", slot_ring(slots, 3, {.sequence_load_relaxed = true}), Memory::weak, own);
    fails(ring + "consumed before payload is read", slot_ring(slots, 3, {.consumed_first = true}), own);
    fails(ring + "slots reused without credit", slot_ring(slots, 3, {.no_credit = true}), "waits for ever");  // for a frame that was overwritten
    fails(ring + "credit written after consumed", slot_ring(slots, 3, {.credit_late = true}), credit);
    fails(ring + "consumed loaded relaxed", slot_ring(slots, 3, {.consumed_load_relaxed = true}), Memory::weak, credit);
    fails(ring + "a slot too many in use", slot_ring(slots, 4, {.one_too_many = true}), "waits for ever");
  }
}

namespace {

// Sleeping: SlotTransport::park as Progress::sleep calls it, SlotTransport::wake and flush, SlotMemory::wake_all. The limit of
// the sleep is left out: with it nothing is ever lost for good, and a lost wake-up would look like a slow machine.

enum class Fencing { membarrier, fences, sleeper_only, waker_only };
struct ParkBreaks {
  bool no_recheck = false, recheck_first = false, wake_before_publishing = false, no_compare = false, announce_late = false, exchange_only = false, bell_not_rung = false, no_second_look = false;
};
struct Wanted {
  int location;
  Value value;
  bool differs = false;  // anything but the value will do, as for aborted()
};

/// The body runs if nothing of what is wanted is there.
template <class Body>
void unless_any(Program& p, const std::vector<Wanted>& wanted, Body&& body, std::size_t from = 0) {
  if (from == wanted.size()) return body();
  const Wanted& w = wanted[from];
  p.load(w.location, w.differs ? relaxed : acquire, 7);
  const auto rest = [&] { unless_any(p, wanted, body, from + 1); };
  if (w.differs) p.when(7, w.value, rest);
  else p.unless(7, w.value, rest);
}

class Protocol {
 public:
  std::size_t threads;
  Fencing fencing;
  ParkBreaks breaks;
  int bell;  // the word that all sleep on; each rank has a word of its own that says so

  /// Progress::turn until something is there: poll, and where there is nothing, park.
  void wait(Program& p, std::size_t me, int parked, const std::vector<Wanted>& wanted, const std::vector<Wanted>& rechecked) const {
    const std::size_t top = p.here();
    unless_any(p, wanted, [&] {
      park(p, me, parked, rechecked);
      p.go_to(top);
    });
  }
  void wait(Program& p, std::size_t me, int parked, const std::vector<Wanted>& wanted) const { wait(p, me, parked, wanted, wanted); }
  /// A frame's or a credit's last store, and wake() and flush().
  void publish(Program& p, int location, Value value, std::size_t whom, int parked) const {
    if (breaks.wake_before_publishing) wake(p, whom, parked);
    p.store(location, value, release);
    if (!breaks.wake_before_publishing) wake(p, whom, parked);
  }
  void wake_all(Program& p, const std::vector<int>& all_parked) const {
    p.fence();
    for (const int parked : all_parked) p.store(parked, 0, release);
    p.add_one(bell);
    p.futex_wake(bell);
  }

 private:
  void park(Program& p, std::size_t me, int parked, const std::vector<Wanted>& rechecked) const {
    const auto sleep = [&] {
      if (breaks.announce_late) p.store(parked, 1);
      const auto fall_asleep = [&] {
        if (breaks.no_compare) p.futex_wait_without_compare(bell);
        else p.futex_wait_as_loaded(bell, 6);
      };
      if (breaks.no_second_look) return fall_asleep();
      p.load(parked, relaxed, 4);
      p.unless(4, 0, fall_asleep);
    };
    const auto announce = [&] {
      if (!breaks.announce_late) p.store(parked, 1);
      p.load(bell, acquire, 6);
      if (fencing == Fencing::membarrier) p.membarrier(me, threads);
      else if (fencing != Fencing::waker_only) p.fence();
    };
    if (breaks.recheck_first) unless_any(p, rechecked, [&] { announce(), sleep(); });
    else announce(), unless_any(p, breaks.no_recheck ? std::vector<Wanted>{} : rechecked, sleep);
    p.store(parked, 0);
  }
  void wake(Program& p, std::size_t whom, int parked) const {
    if (fencing == Fencing::fences || fencing == Fencing::waker_only) p.fence();
    p.load(parked, relaxed, 5);
    p.unless(5, 0, [&] {
      p.exchange(parked, 0, 5);
      if (!breaks.exchange_only) p.unless(5, 0, [&] {
        if (!breaks.bell_not_rung) p.add_one(bell);
        p.futex_wake(bell, static_cast<Value>(1 << whom));
      });
    });
  }
};

/// One rank waits for a frame of each peer in turn, several rounds, always on the same word.
Model sleeping(int wakers, int rounds, Fencing fencing, const ParkBreaks& breaks = {}) {
  const Protocol protocol{static_cast<std::size_t>(wakers) + 1, fencing, breaks, 1};
  Model m{{"parked", "bell"}, std::vector<Program>(protocol.threads)};
  for (int round = 0; round < rounds; ++round)
    for (int w = 1; w <= wakers; ++w) {
      const auto sequence = static_cast<int>(m.locations.size());
      m.locations.push_back(w == 1 ? "frame of 1" : "frame of 2");
      protocol.wait(m.programs[0], 0, 0, {{sequence, 1}});
      protocol.publish(m.programs[static_cast<std::size_t>(w)], sequence, 1, 0, 0);
    }
  return m;
}
/// A ring of one slot whose two sides both sleep: the receiver for frames, the sender for room.
Model sleeping_ring(int frames, Fencing fencing, const ParkBreaks& breaks = {}) {
  enum : int { parked_sender, parked_receiver, sequence, consumed, payload, bell };
  const Protocol protocol{2, fencing, breaks, bell};
  Model m{{"parked of sender", "parked of receiver", "sequence", "consumed", "payload", "bell"}, {{}, {}}};
  for (int k = 0; k < frames; ++k) {
    const auto number = static_cast<Value>(k + 1);
    Program& sender = m.programs[0];
    if (k > 0) protocol.wait(sender, 0, parked_sender, {{consumed, static_cast<Value>(k)}});
    sender.store(payload, number);
    protocol.publish(sender, sequence, number, 1, parked_receiver);
    Program& receiver = m.programs[1];
    protocol.wait(receiver, 1, parked_receiver, {{sequence, number}});
    receiver.load(payload, relaxed, 0);
    receiver.expect("a frame has its own payload", [=](const Registers& r) { return r[0] == number; });
    protocol.publish(receiver, consumed, number, 0, parked_sender);
  }
  return m;
}
/// Rank 0 waits for a frame of rank 1 that comes and for one that never does, until rank 2 aborts. Ranks that leave
/// do the same with a word that sleepers do not look at again.
Model sleeping_until_all_are_woken(Fencing fencing, bool recheck = true) {
  enum : int { parked, first, second, abort, bell };
  const Protocol protocol{3, fencing, {}, bell};
  Model m{{"parked", "first frame", "second frame", "abort", "bell"}, {{}, {}, {}}};
  const Wanted aborted{abort, 0, true};
  protocol.wait(m.programs[0], 0, parked, {{first, 1}});
  protocol.wait(m.programs[0], 0, parked, {{second, 1}, aborted}, recheck ? std::vector<Wanted>{{second, 1}, aborted} : std::vector<Wanted>{{second, 1}});
  protocol.publish(m.programs[1], first, 1, 0, parked);
  m.programs[2].compare_exchange(abort, 0, 1, 0);
  m.programs[2].store(abort, 2, release);
  protocol.wake_all(m.programs[2], {parked});
  return m;
}
/// Rank 0 found that it has no membarrier and says so; rank 1 looks that up for each frame.
Model fences_announced(bool before_any_frame) {
  enum : int { parked, frame, fences, bell };
  const Protocol protocol{2, Fencing::sleeper_only, {}, bell};
  Model m{{"parked", "frame", "fences", "bell"}, {{}, {}}};
  m.programs[0].store(fences, 1, release);
  protocol.wait(m.programs[0], 0, parked, {{frame, 1}});
  Program& p = m.programs[1];
  if (before_any_frame) p.await(fences, 1, acquire);
  p.store(frame, 1, release);
  p.load(fences, relaxed, 4);
  p.unless(4, 0, [&] { p.fence(); });
  p.load(parked, relaxed, 5);
  p.unless(5, 0, [&] {
    p.exchange(parked, 0, 5);
    p.unless(5, 0, [&] {
      p.add_one(bell);
      p.futex_wake(bell, 1);
    });
  });
  return m;
}

}  // namespace

TEST_CASE("no wake-up is lost", "[proof]") {
  for (const Fencing fencing : {Fencing::membarrier, Fencing::fences}) {
    const std::string with = fencing == Fencing::membarrier ? ", membarrier" : ", fences";
    holds("sleeping for a peer, 3 rounds" + with, sleeping(1, 3, fencing));
    holds("sleeping for two peers" + with, sleeping(2, 1, fencing));
    holds("both sides of a ring sleep, 3 frames" + with, sleeping_ring(3, fencing));
    holds("sleeping until an abort" + with, sleeping_until_all_are_woken(fencing));

    const std::string lost = "sleeps for ever";
    for (const int wakers : {1, 2}) {
      const std::string who = wakers == 1 ? "a peer" : "two peers";
      const int rounds = 3 - wakers;
      fails(who + with + ", no recheck", sleeping(wakers, rounds, fencing, {.no_recheck = true}), lost);
      fails(who + with + ", recheck before the announcement", sleeping(wakers, rounds, fencing, {.recheck_first = true}), lost);
      fails(who + with + ", announced after the recheck", sleeping(wakers, rounds, fencing, {.announce_late = true}), lost);
      fails(who + with + ", parked looked up before publishing", sleeping(wakers, rounds, fencing, {.wake_before_publishing = true}), lost);
      fails(who + with + ", sleep without compare", sleeping(wakers, rounds, fencing, {.no_compare = true}), lost);
      fails(who + with + ", bell not rung", sleeping(wakers, rounds, fencing, {.bell_not_rung = true}), lost);
      fails(who + with + ", exchange without wake", sleeping(wakers, rounds, fencing, {.exchange_only = true}), lost);
    }
    fails("a peer, 3 rounds" + with + ", no second look at the announcement", sleeping(1, 3, fencing, {.no_second_look = true}), lost);
    fails("a ring" + with + ", no recheck", sleeping_ring(2, fencing, {.no_recheck = true}), lost);
    fails("a ring" + with + ", parked looked up before publishing", sleeping_ring(2, fencing, {.wake_before_publishing = true}), lost);
  }
  for (const Fencing fencing : {Fencing::sleeper_only, Fencing::waker_only}) {
    const std::string with = fencing == Fencing::sleeper_only ? ", the sleeper alone fences" : ", the waker alone fences";
    fails("a peer" + with, sleeping(1, 1, fencing), "sleeps for ever");
    fails("two peers" + with, sleeping(2, 1, fencing), "sleeps for ever");
    fails("a ring" + with, sleeping_ring(2, fencing), "sleeps for ever");
  }
}

TEST_CASE("what only the limit of a sleep mends", "[proof]") {
  // Known, and not worth a store or a load more: these sleepers wake up when 25 ms are over.
  fails("a peer leaves and is not looked for again", sleeping_until_all_are_woken(Fencing::membarrier, false), "sleeps for ever");
  fails("the first sleeper without membarrier", fences_announced(false), "sleeps for ever");
  holds("without membarrier, announced before any frame", fences_announced(true));
}

namespace {

// The status record: SlotTransport::enter, exit and status.

struct StatusBreaks {
  bool not_withdrawn = false, withdrawn_late = false, fields_relaxed = false, loads_relaxed = false, sequence_early = false, no_second_look = false;
};
Model status_record(const StatusBreaks& breaks = {}) {
  enum : int { sequence, fingerprint, count, inside };
  constexpr Value changing = 99;
  Model m{{"sequence", "fingerprint", "count", "inside"}, {{}, {}}};
  Program& writer = m.programs[0];
  const Order stored = breaks.fields_relaxed ? relaxed : release, loaded = breaks.loads_relaxed ? relaxed : acquire;
  for (const Value k : {Value{1}, Value{2}}) {
    const auto number = [&](int tens) { return static_cast<Value>(10 * tens + k); };
    if (breaks.sequence_early) writer.store(sequence, k, release);
    else if (!breaks.not_withdrawn && !breaks.withdrawn_late) writer.store(sequence, changing);
    writer.store(fingerprint, number(1), stored);
    if (breaks.withdrawn_late) writer.store(sequence, changing);
    writer.store(count, number(2), stored);
    writer.store(inside, 1, stored);
    if (!breaks.sequence_early) writer.store(sequence, k, release);
    if (k == 1) writer.store(inside, 0, release);  // exit()
  }
  Program& reader = m.programs[1];
  reader.load(sequence, acquire, 0);
  reader.load(fingerprint, loaded, 1);
  reader.load(count, loaded, 2);
  reader.load(inside, loaded, 3);
  reader.load(sequence, relaxed, 4);
  reader.expect("what is read belongs together", [=](const Registers& reg) {
    if ((reg[0] != reg[4] && !breaks.no_second_look) || reg[0] == changing) return true;  // to be read again
    if (reg[0] == 0) return reg[1] == 0 && reg[2] == 0 && reg[3] == 0;
    return reg[1] == 10 + reg[0] && reg[2] == 20 + reg[0] && (reg[3] == 1 || reg[0] == 1);
  });
  return m;
}

// The abort notice: SlotMemory::abort, SlotTransport::abort_notice.

struct AbortBreaks {
  bool not_exclusive = false, announced_first = false, announced_relaxed = false, read_while_written = false, loaded_relaxed = false;
};
Model abort_notices(int onlookers, const AbortBreaks& breaks = {}) {
  enum : int { abort, code, text };
  constexpr int ranks = 2;
  Model m{{"abort", "code", "text"}, std::vector<Program>(static_cast<std::size_t>(ranks + onlookers))};
  m.at_end_text = "the notice is that of the one rank that was first, and all have read the same";
  m.at_end = [=](const State& s) {
    int first = 0, winners = 0;
    for (int r = 0; r < ranks; ++r)
      if (s.threads[static_cast<std::size_t>(r)].registers[0] == 1) first = r + 1, ++winners;
    if (winners != 1) return false;
    for (std::size_t t = 0; t < static_cast<std::size_t>(ranks + onlookers); ++t)
      if (s.threads[t].registers[1] != first || s.threads[t].registers[2] != first) return false;
    return true;
  };
  for (int t = 0; t < ranks + onlookers; ++t) {
    Program& p = m.programs[static_cast<std::size_t>(t)];
    if (t < ranks) {
      const auto mine = static_cast<Value>(t + 1);
      if (breaks.not_exclusive) p.load(abort, acquire, 0);
      else p.compare_exchange(abort, 0, 1, 0);
      p.when(0, breaks.not_exclusive ? 0 : 1, [&] {
        if (breaks.not_exclusive) p.exchange(abort, 1, 3);
        if (breaks.announced_first) p.store(abort, 2, release);
        p.store(code, mine);
        p.store(text, mine);
        if (!breaks.announced_first) p.store(abort, 2, breaks.announced_relaxed ? relaxed : release);
        if (breaks.not_exclusive) p.exchange(abort, 2, 0), p.compare_exchange(abort, 2, 2, 0);  // reg 0 = 1: it believes to be first
      });
      p.fence();  // wake_all
    }
    // Who waits for ever for a notice would give up; here its writer does not die.
    if (breaks.read_while_written) p.await_at_least(abort, 1, acquire);
    else p.await(abort, 2, breaks.loaded_relaxed ? relaxed : acquire);
    p.load(code, relaxed, 1);
    p.load(text, relaxed, 2);
  }
  return m;
}

}  // namespace

TEST_CASE("a status is never read as a mixture", "[proof]") {
  holds("status", status_record());
  const std::string mixed = "what is read belongs together";
  fails("status not withdrawn", status_record({.not_withdrawn = true}), mixed);
  fails("status withdrawn after the fingerprint", status_record({.withdrawn_late = true}), mixed);
  fails("status with the sequence first", status_record({.sequence_early = true}), mixed);
  fails("status without a second look", status_record({.no_second_look = true}), mixed);
  fails("status with relaxed stores", status_record({.fields_relaxed = true}), Memory::weak, mixed);
  fails("status with relaxed loads", status_record({.loads_relaxed = true}), Memory::weak, mixed);
}

TEST_CASE("an abort notice is whole, and the first one's", "[proof]") {
  holds("abort, two at once", abort_notices(0));
  holds("abort, two at once and an onlooker", abort_notices(1));
  const std::string whole = "not so at the end";
  for (const int onlookers : {0, 1}) {
    fails("abort, both believe to be first", abort_notices(onlookers, {.not_exclusive = true}), whole);
    fails("abort, announced before it is written", abort_notices(onlookers, {.announced_first = true}), whole);
    fails("abort, read while it is written", abort_notices(onlookers, {.read_while_written = true}), whole);
    fails("abort, announced relaxed", abort_notices(onlookers, {.announced_relaxed = true}), Memory::weak, whole);
  }
  fails("abort, loaded relaxed", abort_notices(1, {.loaded_relaxed = true}), Memory::weak, whole);
}
