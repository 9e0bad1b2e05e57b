// SPDX-License-Identifier: Apache-2.0
// A network that does not exist, in a time of its own: links with latency, jitter, bandwidth and loss, ranks with clocks
// that are wrong and work that takes time, and one that dies. All follows from a seed, so that thousands of schedules can be
// tried and each can be had again. Ranks are fibers of one thread: the one whose time is earliest runs. Frames and credits
// travel; what ranks say of themselves (status, goodbye, abort) is seen at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../clock.hpp"
#include "../error.hpp"
#include "concept.hpp"
#include "fiber.hpp"
#include "queue.hpp"

namespace tally::inline v0 {

/// Times are true ones: what a perfect clock would show, in nanoseconds from 0 on.
struct SimulatedOptions {
  std::uint64_t seed = 1;
  int lanes = 2, slots = 16;  // frames of a lane between two ranks that are on their way or not yet read
  std::size_t slot_bytes = std::size_t{16} << 10;
  nanoseconds latency_least{1'000}, latency_most{20'000};  // of each link, drawn once; the two directions differ
  nanoseconds jitter{0};                                   // of each frame, up to
  double byte_time_least = 0.1, byte_time_most = 0.1;      // ns per byte of each link, drawn once
  double loss = 0;                                         // of each attempt to send a frame
  nanoseconds retry{200'000};
  // Of messages of one frame on lane 1, as a network would that promises nothing:
  double drop = 0, duplicate = 0, overtake = 0;            // lost for good; there twice; there before the one that was sent before
  nanoseconds frame_cost{300};                             // of a rank's own time, to send or to read a frame
  double byte_cost = 0.1;                                  // ns
  nanoseconds clock_offset{0};                             // up to, either way
  double clock_drift = 0;                                  // in 10^-6, likewise
  nanoseconds clock_refresh = std::chrono::seconds(1);
  Rank killed = -1;
  nanoseconds killed_at{0};
  nanoseconds end = std::chrono::hours(24);                // nobody should need longer
};

class SimulatedNetwork {
 public:
  static constexpr Ticks never = std::numeric_limits<Ticks>::max();
  struct Link {
    Ticks latency = 0;
    double byte_time = 0;
    Ticks free_at = 0;
  };

  SimulatedNetwork(int n, const SimulatedOptions& options) : options_(options), n_(n), random_(options.seed), links_(squared(n)), channels_(squared(n) * static_cast<std::size_t>(options.lanes)) {
    const auto between = [&](double least, double most) { return least + (most - least) * uniform(); };
    for (Link& link : links_) {
      link.latency = static_cast<Ticks>(between(static_cast<double>(options.latency_least.count()), static_cast<double>(options.latency_most.count())));
      link.byte_time = between(options.byte_time_least, options.byte_time_most);
    }
    for (Rank r = 0; r < n; ++r) {
      auto& node = *nodes_.emplace_back(std::make_unique<Node>());
      node.clock.network = this;
      const double offset = static_cast<double>(options.clock_offset.count());
      node.clock.offset = static_cast<std::int64_t>(between(-offset, offset));
      node.clock.drift = static_cast<std::int64_t>(between(-options.clock_drift, options.clock_drift) * 1000);
    }
  }
  SimulatedNetwork(const SimulatedNetwork&) = delete;
  SimulatedNetwork& operator=(const SimulatedNetwork&) = delete;

  /// Runs every rank's program to its end. Throws what the first of them threw; being killed does not count.
  void run(const std::function<void(Rank)>& body) {
    for (Rank r = 0; r < n_; ++r) {
      Node& node = *nodes_[at(r)];
      node.wake = now_;
      node.done = false;
      node.fiber = std::make_unique<Fiber>([this, &body, &node, r] { live(body, node, r); }, [this]() -> Fiber& { return earliest(); });
    }
    main_.switch_to(earliest());
    for (const auto& node : nodes_)
      if (node->error) std::rethrow_exception(std::exchange(node->error, nullptr));
  }

  int size() const { return n_; }
  const SimulatedOptions& options() const { return options_; }
  Ticks now() const { return now_; }
  /// A rank's own, which is wrong.
  Clock clock(Rank r) const { return Clock(nodes_[at(r)]->clock); }
  Ticks local(Rank r, Ticks when) const { return nodes_[at(r)]->clock.at(when); }
  Link& link(Rank from, Rank to) { return links_[pair(from, to)]; }
  /// The rank that runs does something else meanwhile.
  void sleep(nanoseconds duration) { pass(static_cast<Ticks>(std::max<std::int64_t>(duration.count(), 0)), false); }

  // For transports.

  struct Frame {
    Ticks visible = 0;
    FrameInfo info;
    std::vector<std::byte> payload;
    bool again = false;  // a duplicate, for which nobody waits to be given room
  };
  struct Credit {
    Ticks visible = 0;
    FrameTimes times;
  };
  struct Channel {
    std::deque<Frame> frames;
    std::deque<Credit> credits;  // for them, on their way back
    Ticks last_frame = 0, last_credit = 0;
  };
  Channel& channel(int lane, Rank from, Rank to) { return channels_[static_cast<std::size_t>(lane) * squared(n_) + pair(from, to)]; }

  void send(int lane, Rank from, Rank to, Frame frame) {
    Channel& c = channel(lane, from, to);
    Link& l = links_[pair(from, to)];
    const auto wire = static_cast<Ticks>(static_cast<double>(frame.info.bytes) * l.byte_time);
    l.free_at = std::max(l.free_at, now_) + wire;
    frame.visible = c.last_frame = std::max(c.last_frame, travel(from, l, l.free_at));
    const bool whole = lane == 1 && frame.info.first && frame.info.last;
    if (whole && options_.drop > 0 && uniform() < options_.drop) {
      c.last_credit = std::max(c.last_credit, frame.visible);
      c.credits.push_back({c.last_credit, frame.info.times});
      return notify(from, c.last_credit);
    }
    notify(to, frame.visible);
    if (whole && options_.duplicate > 0 && uniform() < options_.duplicate) {
      Frame twin = frame;
      twin.again = true;
      twin.visible += random_.below(static_cast<std::uint64_t>(options_.retry.count()) + 1);
      c.last_frame = twin.visible;
      notify(to, twin.visible);
      put(c, std::move(frame));
      return put(c, std::move(twin));
    }
    put(c, std::move(frame));
  }
  void send_credit(int lane, Rank from, Rank to, const FrameTimes& times) {  // for a frame that came the other way
    Channel& c = channel(lane, to, from);
    c.last_credit = std::max(c.last_credit, travel(from, links_[pair(from, to)], now_));
    c.credits.push_back({c.last_credit, times});
    notify(to, c.last_credit);
  }
  /// The rank that runs works for so long.
  void spend(std::size_t bytes) { pass(static_cast<Ticks>(static_cast<double>(options_.frame_cost.count()) + static_cast<double>(bytes) * options_.byte_cost), false); }
  /// It waits until something may have come for it, at most for so long.
  void wait(nanoseconds limit) { pass(static_cast<Ticks>(std::max<std::int64_t>(limit.count(), 1)), true); }
  void wake(Rank r) {
    if (nodes_[at(r)]->listening) nodes_[at(r)]->wake = now_;
  }

  RankStatus& status(Rank r) { return nodes_[at(r)]->status; }
  /// Also after it left: what is lost of what it sent is not sent again.
  bool dead(Rank r) const { return nodes_[at(r)]->dead || (r == options_.killed && now_ >= static_cast<Ticks>(options_.killed_at.count())); }
  /// Whether `r` is gone and everything that it sent to `to` before is there.
  bool is_gone(Rank r, Rank to) const {
    for (int lane = 0; lane < options_.lanes; ++lane) {
      const auto& frames = channels_[static_cast<std::size_t>(lane) * squared(n_) + pair(r, to)].frames;
      if (std::any_of(frames.begin(), frames.end(), [&](const Frame& f) { return f.visible > now_ && f.visible != never; })) return false;
    }
    return dead(r) || nodes_[at(r)]->status.left;
  }
  bool aborted() const { return aborted_; }
  const AbortNotice& abort_notice() const { return notice_; }
  void abort(const AbortNotice& notice) {
    if (!std::exchange(aborted_, true)) notice_ = notice;
    for (Rank r = 0; r < n_; ++r) wake(r);
  }

  /// What the ranks find out about each other's clocks from messages to and fro, as any network would have to: the round
  /// trip that was fastest puts the peer's reading in the middle between its own two, or off by half of it at most.
  struct Exchange {
    std::int64_t ahead = 0;  // the peer's clock, of mine
    Ticks round_trip = never;
  };
  Exchange compare(Rank me, Rank peer, Ticks begin) const {
    Exchange best;
    Ticks now = begin;
    for (std::uint64_t i = 0; i < 8; ++i) {
      Random random(options_.seed ^ (begin + i) * 0x9e3779b97f4a7c15u ^ pair(me, peer) << 48);
      const auto way = [&](Rank from, Rank to) { return links_[pair(from, to)].latency + random.below(static_cast<std::uint64_t>(options_.jitter.count()) + 1); };
      const Ticks sent = local(me, now), there = local(peer, now += way(me, peer)), back = local(me, now += way(peer, me));
      if (back - sent < best.round_trip) best = {static_cast<std::int64_t>(there - (sent + (back - sent) / 2)), back - sent};
    }
    return best;
  }

 private:
  struct Random {
    std::uint64_t state;
    explicit Random(std::uint64_t seed) : state(seed) {}
    std::uint64_t next() {  // splitmix64
      std::uint64_t x = state += 0x9e3779b97f4a7c15u;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      return x ^ (x >> 31);
    }
    std::uint64_t below(std::uint64_t limit) { return next() % limit; }
  };
  struct LocalClock final : TimeSource {
    const SimulatedNetwork* network = nullptr;
    std::int64_t offset = 0, drift = 0;  // drift in 10^-9
    Ticks now() const override { return at(network->now_); }
    Ticks at(Ticks when) const {
      constexpr std::int64_t base = 10'000'000'000'000;  // no clock began after the simulation
      const auto t = static_cast<std::int64_t>(when);
      return static_cast<Ticks>(base + offset + t + t / 1'000'000'000 * drift + t % 1'000'000'000 * drift / 1'000'000'000);
    }
  };
  struct Node {
    LocalClock clock;
    std::unique_ptr<Fiber> fiber;
    Ticks wake = 0;          // when it goes on, at the latest if it listens
    bool listening = false, done = true, dead = false;
    std::priority_queue<Ticks, std::vector<Ticks>, std::greater<>> due;  // when something comes
    RankStatus status;
    std::exception_ptr error;
  };
  struct Killed {};

  static std::size_t at(Rank r) { return static_cast<std::size_t>(r); }
  static std::size_t squared(int n) { return at(n) * at(n); }
  std::size_t pair(Rank from, Rank to) const { return at(from) * at(n_) + at(to); }
  double uniform() { return static_cast<double>(random_.next() >> 11) * 0x1p-53; }

  void live(const std::function<void(Rank)>& body, Node& node, Rank r) {
    try {
      check(node, r);
      body(r);
    } catch (const Killed&) {
    } catch (...) {
      if (!node.dead) node.error = std::current_exception();
    }
    node.done = true;
  }
  /// Who runs next; its time becomes the time.
  Fiber& earliest() {
    running_ = -1;
    Ticks first = never;
    for (Rank r = 0; r < n_; ++r)
      if (const Node& node = *nodes_[at(r)]; !node.done && (running_ < 0 || wakes(r, node) < first)) running_ = r, first = wakes(r, node);
    if (running_ < 0) return main_;
    now_ = std::max(now_, first);
    return *nodes_[at(running_)]->fiber;
  }
  Ticks wakes(Rank r, const Node& node) const { return r == options_.killed && !node.dead ? std::min(node.wake, static_cast<Ticks>(options_.killed_at.count())) : node.wake; }
  void pass(Ticks duration, bool listening) {
    const Rank r = running_;
    Node& node = *nodes_[at(r)];
    check(node, r);
    while (!node.due.empty() && node.due.top() <= now_) node.due.pop();
    node.wake = now_ + duration;
    if (listening && !node.due.empty()) node.wake = std::min(node.wake, node.due.top());
    node.listening = listening;
    Fiber& next = earliest();
    if (running_ != r) node.fiber->switch_to(next);
    node.listening = false;
    check(node, r);
  }
  void check(Node& node, Rank r) {
    if (r == options_.killed && now_ >= static_cast<Ticks>(options_.killed_at.count())) node.dead = true;
    if (node.dead) throw Killed{};
    if (now_ > static_cast<Ticks>(options_.end.count())) throw Error(Errc::timeout, {"simulated rank ", r, " has no end (seed ", options_.seed, ")"});
  }
  void put(Channel& c, Frame frame) {
    const auto is_whole = [](const Frame& f) { return f.info.first && f.info.last; };
    const bool overtakes = options_.overtake > 0 && !c.frames.empty() && c.frames.back().visible > now_ && is_whole(frame) && is_whole(c.frames.back()) && uniform() < options_.overtake;
    c.frames.push_back(std::move(frame));
    if (!overtakes) return;
    Frame &before = c.frames[c.frames.size() - 2], &after = c.frames.back();
    std::swap(before, after), std::swap(before.visible, after.visible);
  }
  void notify(Rank to, Ticks visible) {
    if (visible == never) return;
    Node& node = *nodes_[at(to)];
    node.due.push(visible);
    if (node.listening) node.wake = std::min(node.wake, visible);
  }
  /// When something that leaves at `when` is there. A dead rank does not try again.
  Ticks travel(Rank from, const Link& l, Ticks when) {
    while (options_.loss > 0 && uniform() < options_.loss) when += static_cast<Ticks>(options_.retry.count());
    if (from == options_.killed && when >= static_cast<Ticks>(options_.killed_at.count())) return never;
    return when + l.latency + (options_.jitter.count() > 0 ? random_.below(static_cast<std::uint64_t>(options_.jitter.count()) + 1) : 0);
  }

  SimulatedOptions options_;
  int n_;
  Ticks now_ = 0;
  Rank running_ = -1;
  Random random_;
  std::vector<Link> links_;
  std::vector<Channel> channels_;
  std::vector<std::unique_ptr<Node>> nodes_;
  Fiber main_;
  bool aborted_ = false;
  AbortNotice notice_;
};

class SimulatedTransport {
 public:
  SimulatedTransport(SimulatedNetwork& network, Rank me) : network_(network), me_(me), endpoints_(static_cast<std::size_t>(network.options().lanes * network.size())), clocks_(static_cast<std::size_t>(network.size())) {}
  SimulatedTransport(const SimulatedTransport&) = delete;
  SimulatedTransport& operator=(const SimulatedTransport&) = delete;

  Rank rank() const { return me_; }
  int size() const { return network_.size(); }
  int lanes() const { return network_.options().lanes; }
  Rank origin(Rank r) const { return r; }
  std::string_view name() const { return "simulated"; }
  std::size_t frame_bytes() const { return network_.options().slot_bytes; }
  const TransportCounters& counters() const { return counters_; }
  bool crowded() { return false; }

  template <Probe P>
  void post(Transfer& t, P& probe) {
    Endpoint& e = endpoint(t.lane, t.peer);
    if ((t.is_send ? e.sends : e.receives).push(t) && t.is_send) advance_send(e, t.lane, t.peer, probe);
  }
  void cancel(Transfer& t) {
    if (!t.pending) return;
    Endpoint& e = endpoint(t.lane, t.peer);
    (t.is_send ? e.sends : e.receives).remove(t);
  }
  template <Probe P>
  bool poll(P& probe) {
    bool moved = false;
    for (int lane = 0; lane < lanes(); ++lane)
      for (Rank peer = 0; peer < size(); ++peer) {
        Endpoint& e = endpoint(lane, peer);
        if (e.sends.head && advance_send(e, lane, peer, probe)) moved = true;
        if (e.receives.head && advance_receive(e, lane, peer, probe)) moved = true;
      }
    return moved;
  }
  void flush() {}

  void enter(const RankStatus& status) {
    if (!gone()) network_.status(me_) = status;
  }
  void exit() {
    if (!gone()) network_.status(me_).inside = RankStatus::outside;
  }
  RankStatus status(Rank r) const {
    RankStatus status = network_.status(r);
    status.left = status.left && network_.is_gone(r, me_);
    return status;
  }
  Liveness liveness(Rank r) { return !network_.is_gone(r, me_) ? Liveness::alive : network_.dead(r) ? Liveness::dead : Liveness::left; }
  void abort(const AbortNotice& notice) {
    if (!gone()) network_.abort(notice);
  }
  bool aborted() const { return network_.aborted(); }
  AbortNotice abort_notice() const { return network_.abort_notice(); }
  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    if (!recheck()) network_.wait(limit);
  }
  void interrupt() { network_.wake(me_); }
  void leave() {
    if (!gone()) network_.status(me_).left = true;
  }

  /// Waits pass their time here: see Progress.
  void pass_time(nanoseconds limit) { network_.wait(limit); }

  /// A time that the peer's clock showed, in this rank's. The clocks were compared at the start and are again once a second;
  /// how they drift is known from the last two times.
  Ticks to_local(Rank peer, Ticks theirs) const { return theirs - static_cast<Ticks>(skew(peer)); }
  /// How wrong that may be: by half the round trip of the comparison.
  nanoseconds skew_sigma(Rank peer) const {
    skew(peer);
    return nanoseconds(static_cast<std::int64_t>(clocks_[static_cast<std::size_t>(peer)].last.round_trip / 2));
  }

  std::uint64_t reserve(std::span<const Rank>) { throw Error(Errc::unsupported, "simulated ranks make no groups"); }
  std::unique_ptr<SimulatedTransport> open(std::uint64_t, std::span<const Rank>) { return nullptr; }
  void release(std::uint64_t) {}
  void discard(std::uint64_t, std::span<const Rank>) {}

 private:
  struct Endpoint {
    TransferQueue sends, receives;
    int unacknowledged = 0;       // frames sent for which no credit is back
    std::size_t taken = 0;        // bytes of the frame at the head that are consumed
    std::uint32_t operation = 0;  // of the last frame sent
    bool any_sent = false, starved = false, seen = false;
  };
  struct Compared {
    Ticks at = SimulatedNetwork::never;
    SimulatedNetwork::Exchange last;
    double drift = 0;
  };

  Endpoint& endpoint(int lane, Rank peer) { return endpoints_[static_cast<std::size_t>(lane * size() + peer)]; }
  bool gone() const { return network_.dead(me_) || network_.status(me_).left; }

  std::int64_t skew(Rank peer) const {
    Compared& c = clocks_[static_cast<std::size_t>(peer)];
    const auto period = static_cast<Ticks>(network_.options().clock_refresh.count());
    const Ticks now = network_.now(), begin = now / period * period;
    if (c.at == SimulatedNetwork::never || begin > c.at) {
      const SimulatedNetwork::Exchange before = network_.compare(me_, peer, begin >= period ? begin - period : begin), last = network_.compare(me_, peer, begin);
      if (c.at != SimulatedNetwork::never && begin + 8 * last.round_trip > now) return ahead(c, now);  // it is not over yet
      c = {begin, last, begin >= period ? static_cast<double>(last.ahead - before.ahead) / static_cast<double>(period) : 0.0};
    }
    return ahead(c, now);
  }
  static std::int64_t ahead(const Compared& c, Ticks now) { return c.last.ahead + static_cast<std::int64_t>(c.drift * static_cast<double>(now - c.at)); }

  template <Probe P>
  bool advance_send(Endpoint& e, int lane, Rank peer, P& probe) {
    Transfer& t = *e.sends.head;
    if (t.done == t.ready && t.bytes != 0) return false;
    if (e.unacknowledged == network_.options().slots) {
      auto& credits = network_.channel(lane, me_, peer).credits;
      if (credits.empty() || credits.front().visible > network_.now()) {
        e.starved = true;
        return false;
      }
      const FrameTimes times = credits.front().times;
      credits.pop_front();
      --e.unacknowledged;
      if (std::exchange(e.starved, false)) probe.credited(t, times);
    }
    std::size_t bytes = t.ready - t.done;
    if (bytes > network_.options().slot_bytes) bytes = network_.options().slot_bytes - network_.options().slot_bytes % t.grain;
    if (bytes > short_bytes) probe.copying(t);
    SimulatedNetwork::Frame frame;
    if (bytes > 0) frame.payload.assign(t.from + t.done, t.from + t.done + bytes);
    network_.spend(bytes);
    const bool fingerprinted = !e.any_sent || e.operation != t.operation || t.matching != Matching::order;
    e.operation = t.operation;
    e.any_sent = true;
    frame.info = {t.operation, fingerprinted ? t.fingerprint : 0, fingerprinted, t.done == 0, t.done + bytes == t.bytes, bytes, t.bytes, probe.stamp(t)};
    counters_.bytes_sent += bytes;
    counters_.messages_sent += t.done == 0;
    ++counters_.frames_sent;
    counters_.overhead_sent += sizeof(FrameInfo);
    t.done += bytes;
    ++e.unacknowledged;
    network_.send(lane, me_, peer, std::move(frame));
    if (t.done == t.bytes) e.sends.pop();
    probe.moved(t);
    return true;
  }

  template <Probe P>
  bool advance_receive(Endpoint& e, int lane, Rank peer, P& probe) {
    if (const Transfer& t = *e.receives.head; t.done == t.ready && t.bytes != 0) return false;
    auto& frames = network_.channel(lane, peer, me_).frames;
    if (frames.empty() || frames.front().visible > network_.now()) return false;
    const SimulatedNetwork::Frame& frame = frames.front();
    if (!e.seen) {
      if (e.receives.head->matching != Matching::order && frame.info.first && !e.receives.match(frame.info, probe)) return false;
      probe.arrived(*e.receives.head, frame.info);
      e.seen = true;
      counters_.messages_received += frame.info.first;
    }
    Transfer& t = *e.receives.head;
    const std::size_t take = std::min(frame.info.bytes - e.taken, t.ready - t.done);
    if (take > 0) {
      const std::byte* in = frame.payload.data() + e.taken;
      std::byte* to = t.to + t.done;
      if (frame.info.bytes > short_bytes) t.fold ? probe.reducing(t) : probe.copying(t);
      if (!t.fold) std::memcpy(to, in, take);
      else if (t.side == Side::right) (*t.fold)(to, t.from + t.done, in, take);
      else (*t.fold)(to, in, t.from + t.done, take);
    }
    network_.spend(take);
    t.done += take;
    e.taken += take;
    counters_.bytes_received += take;
    if (e.taken == frame.info.bytes) {
      if (!frame.again) network_.send_credit(lane, me_, peer, probe.credit_stamp(t));
      frames.pop_front();
      e.taken = 0;
      e.seen = false;
      if (t.done == t.bytes) e.receives.pop();
    }
    probe.moved(t);
    return true;
  }

  SimulatedNetwork& network_;
  Rank me_;
  std::vector<Endpoint> endpoints_;
  mutable std::vector<Compared> clocks_;
  TransportCounters counters_;
};
static_assert(Transport<SimulatedTransport>);

}  // namespace tally::inline v0
