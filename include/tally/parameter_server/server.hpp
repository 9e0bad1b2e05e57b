// SPDX-License-Identifier: Apache-2.0
// The serving side of a rank: the shards that it keeps, as their primary or as the replica that takes over. What changes a shard goes
// through a log: where there is a replica, it is done when that has it, too, so that nothing anybody has seen can be lost. Pulls that
// may not be answered yet are parked, and all that have become ready are answered, however far the clock moved.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "post.hpp"
#include "shard.hpp"

namespace tally::inline v0::detail {

/// What both sides of a table ask of the rank they are on.
struct TableHost {
  virtual ~TableHost() = default;
  virtual Rank rank() const = 0;
  virtual Post::Parcel& parcel(Rank to) = 0;
  virtual void send(Post::Parcel& p, const Envelope& e, std::span<const std::span<const std::byte>> pieces, const Lateness* late) = 0;
  virtual void send(Rank to, const Envelope& e, std::span<const std::byte> payload = {}, const Lateness* late = nullptr) = 0;
  /// What this thread does from here on is work for others, of this kind.
  virtual void at_work(State state) = 0;
  virtual Ticks now() const = 0;
  /// What that rank shares with this one, a stride of Table::shared_bytes(); empty if nothing.
  virtual std::span<std::byte> shared_of(Rank r) const = 0;
  /// Whether memory of this operation's is being sent or received into.
  virtual bool uses(std::uint64_t request, const void* op) const = 0;
  /// What this worker has pushed and waits for no longer may not be looked at where it is.
  virtual void disown() = 0;
  /// Whether the rank is gone for good, and nothing of it is under way.
  virtual bool is_gone(Rank r) const = 0;
  /// Who has come by the door as `guest` is rank `r` from now on. False if it has gone again.
  virtual bool rename(Rank guest, Rank r) = 0;
  /// Whether it has taken enough of what it was answered that more may be kept for it.
  virtual bool may_answer(Rank r) const = 0;
  /// Why a server cannot be reached, for errors; empty if there is nothing to say.
  virtual std::string why_gone(Rank) const { return {}; }
  /// Where the values of this reply to a pull of this rank's own go, before they are sent without any; what held it up. Null if nobody waits for it.
  virtual std::byte* place_here(const Envelope& e, const Lateness* late) = 0;
  virtual void copy_here(const Envelope& e, std::byte* to, const std::byte* from, std::size_t bytes) = 0;
};

class TableServer {
 public:
  TableServer(TableHost& host, const Table& table, Pool& pool, const void* rule) : host_(host), table_(table), pool_(pool) {
    for (int s = 0; s < table.shards(); ++s) {
      const int replica = table.replica_of(s);
      const Rank primary = table.servers[static_cast<std::size_t>(s)], second = replica < 0 ? -1 : table.servers[static_cast<std::size_t>(replica)];
      if (primary != host.rank() && second != host.rank()) continue;
      served_.push_back(std::make_unique<Served>(table, s, pool, rule));
      served_.back()->primary = primary;
      served_.back()->replica = second;
      served_.back()->told.resize(table.workers.size());
    }
    views_.resize(table.workers.size());
  }

  bool keeps_any() const { return !served_.empty(); }
  /// Some worker may still want something of a shard that this rank keeps.
  bool is_needed() const {
    return std::any_of(served_.begin(), served_.end(), [](const auto& s) { return s->shard.any_live() || !s->log.empty(); });
  }

  /// Of any kind that is for servers. `sent_at`: when it left, by this rank's clock.
  void received(Rank peer, const Envelope& e, Payload&& payload, Ticks sent_at) {
    Served* const s = find(e.shard);
    if (e.kind == MessageKind::gone) return hear(peer, e, payload);
    if (!s) return refuse(peer, e, Errc::invalid_argument, concat({"rank ", host_.rank(), " does not keep shard ", e.shard}));
    if (e.kind == MessageKind::release) {
      std::erase_if(grants_, [&](Grant& g) { return g.peer == peer && g.request == e.request && g.shard == e.shard && (take_back(g), true); });
      return;
    }
    if (e.kind == MessageKind::replicated) {
      if (peer == s->replica)
        while (!s->log.empty() && s->log.front().e.index <= e.index) execute_next(*s);
      return;
    }
    if (e.flags & Envelope::is_replica) {
      if (peer == s->primary) replicate(*s, {e, std::move(payload), sent_at, peer});
      return;
    }
    if (e.kind == MessageKind::join) return join(*s, peer, e);
    const std::int32_t worker = table_.worker_at(peer);
    if (e.worker != worker) return refuse(peer, e, Errc::protocol, concat({"rank ", peer, " speaks for worker ", e.worker, ", which it is not"}));
    if (worker < 0 && e.kind != MessageKind::pull) return refuse(peer, e, Errc::invalid_argument, concat({"rank ", peer, " is no worker of this table: it may only pull"}));
    if (s->primary != host_.rank()) return keep_early(*s, {e, std::move(payload), sent_at, peer});
    if (e.kind == MessageKind::push && (e.flags & Envelope::is_direct) != 0) {
      const std::span<std::byte> shared = host_.shared_of(host_.rank());
      const std::size_t window = table_.window_bytes(), begin = table_.arena_bytes() + static_cast<std::size_t>(worker) * window;
      if (shared.empty() || static_cast<std::size_t>(worker) >= table_.regulars() || e.bytes > window || e.index > window - e.bytes) return refuse(peer, e, Errc::protocol, concat({e.bytes, " bytes at ", e.index, " are not within its window of ", window}));
      payload = Payload::borrowed(shared.data() + begin + e.index, e.bytes, true);
    }
    switch (e.kind) {
      case MessageKind::push:
      case MessageKind::pull: {
        std::string problem = s->shard.problem_with(e);
        if (problem.empty() && table_.tensors[e.tensor].is_sparse() && !(e.flags & Envelope::of_cut)) problem = s->shard.problem_with_keys(e, payload.data());
        if (!problem.empty()) return refuse(peer, e, Errc::invalid_argument, problem);
        if (e.kind == MessageKind::push && s->shard.knows(e)) return acknowledge(*s, e.worker, e.sequence, e.request);
        if (e.kind == MessageKind::push && is_logged(*s, e)) return;  // it is on its way to the replica
        if (e.kind == MessageKind::push && !has_credit(*s, e)) return refuse(peer, e, Errc::protocol, concat({e.bytes, " bytes more than its credits, ", table_.credits()}));
        if (e.kind == MessageKind::push) return submit(*s, {e, std::move(payload), sent_at, peer});
        if (std::any_of(s->parked.begin(), s->parked.end(), [&](const Parked& p) { return p.peer == peer && p.e.request == e.request && p.e.first == e.first; })) return;  // said again
        Parked pull{e, peer, std::move(payload), false};
        if (s->shard.ready(e) && host_.may_answer(peer)) return answer(*s, pull);
        pull.payload.own(pool_);
        pull.bounded = !s->shard.within_bound(e);
        s->parked.push_back(std::move(pull));
        return;
      }
      case MessageKind::set:
        if (std::string problem = s->shard.problem_with(e); !problem.empty()) return refuse(peer, e, Errc::invalid_argument, problem);
        if (payload.size() != e.bytes) return refuse(peer, e, Errc::protocol, "its values are missing");
        if (std::string problem = table_.tensors[e.tensor].is_sparse() ? s->shard.problem_with_keys(e, payload.data(), sizeof(std::uint64_t) + s->shard.row_bytes(e.tensor)) : ""; !problem.empty()) return refuse(peer, e, Errc::invalid_argument, problem);
        return submit(*s, {e, std::move(payload), sent_at, peer});
      case MessageKind::advance:
        if (s->shard.knows(e)) {
          if (table_.options.retry_after > nanoseconds{0}) acknowledge(*s, e.worker, 0, 0);  // what was said of credit may have been lost
          return;
        }
        if (is_logged(*s, e)) return;
        return submit(*s, {e, std::move(payload), sent_at, peer});
      case MessageKind::cut:
      case MessageKind::leave: return submit(*s, {e, std::move(payload), sent_at, peer});
      default: return refuse(peer, e, Errc::protocol, concat({"a server has no use for a ", name_of(e.kind)}));
    }
  }

  /// There is time to do some of what was put off. False if there is nothing.
  bool work_ahead() {
    for (const auto& s : served_) {
      if (!s->shard.has_postponed()) continue;
      host_.at_work(State::reduce);
      s->shard.make_some();
      host_.at_work(State::protocol);
      if (std::exchange(s->shard.events.freed, false) && s->primary == host_.rank()) tell_freed(*s);
      return true;
    }
    return false;
  }
  bool has_work() const {
    return std::any_of(served_.begin(), served_.end(), [](const auto& s) { return s->shard.has_postponed(); });
  }

  /// A rank is gone for good, and nothing of it is under way any more.
  void lost(Rank r) {
    for (const auto& each : served_) {
      Served& s = *each;
      if (s.replica == r) {  // from here on this one is alone
        s.replica = -1;
        while (!s.log.empty()) execute_next(s);
      }
      if (s.primary == r && s.replica == host_.rank()) {
        s.primary = host_.rank();
        s.replica = -1;
        for (std::size_t w = 0; w < table_.workers.size(); ++w) {
          const auto worker = static_cast<std::int32_t>(w);
          if (!s.shard.is_live(worker)) continue;
          if (host_.is_gone(table_.workers[w])) views_[w].wanted = true, ask_for_ = true;  // the primary knew, and perhaps the others, too
          else acknowledge(s, worker, 0, 0);  // it may have been about to
        }
        for (Entry& early : std::exchange(s.early, {})) received(early.from, early.e, std::move(early.payload), early.sent_at);
      }
      std::erase_if(s.parked, [&](const Parked& p) { return p.peer == r; });
      std::erase_if(s.early, [&](const Entry& early) { return r >= table_.size && early.from == r; });
    }
    std::erase_if(grants_, [&](Grant& g) { return g.peer == r && (take_back(g), true); });
    if (const std::int32_t worker = table_.worker_at(r); worker >= 0) views_[static_cast<std::size_t>(worker)].wanted = true;
    settle();
    if (std::exchange(ask_for_, false))
      for (std::size_t w = 0; w < views_.size(); ++w)
        if (views_[w].wanted) show(static_cast<std::int32_t>(w), Envelope::asks);
  }
  /// What waits for others: who is gone, or for their replicas.
  void settle() {
    for (std::size_t w = 0; w < views_.size(); ++w)
      if (views_[w].wanted) settle(static_cast<std::int32_t>(w));
  }
  /// What was not confirmed for so long may be lost.
  void retry(Ticks now, Ticks after) {
    for (const auto& s : served_)
      for (std::size_t i = 0; i < std::min<std::size_t>(s->log.size(), 8); ++i)  // those behind them wait for them in any case
        if (now - s->log[i].forwarded_at > after) forward(*s, s->log[i]);
    if (now - told_at_ <= after) return;
    told_at_ = now;
    for (std::size_t w = 0; w < views_.size(); ++w)
      if (views_[w].wanted) show(static_cast<std::int32_t>(w), Envelope::asks);
  }
  void own_all(std::int32_t worker) {
    for (const auto& s : served_) {
      s->shard.own_all(worker);
      for (Entry& entry : s->log)
        if (entry.e.worker == worker) entry.payload.own(pool_, true);
    }
  }
  /// More may be answered to that guest.
  void resume(Rank guest) {
    for (const auto& s : served_)
      if (s->primary == host_.rank() && std::any_of(s->parked.begin(), s->parked.end(), [&](const Parked& p) { return p.peer == guest; })) release(*s);
  }
  void let_go(const Post::Parcel& p) {
    for (Published* lease : p.leases) find(p.shard)->shard.let_go(p.tensor, lease);
  }
  /// For tests and errors.
  const Shard* shard(int index) const {
    const Served* const s = const_cast<TableServer*>(this)->find(static_cast<std::size_t>(index));
    return s ? &s->shard : nullptr;
  }
  /// How often a pull would have been answered against the bound, had it not been for the gate; and how often it was, which must not be.
  struct Monitor {
    std::uint64_t answered = 0, parked = 0, violated = 0;
    std::uint64_t stalest = 0;  // clocks that a pull's worker was ahead of what it got
  };
  const Monitor& monitor() const { return monitor_; }

 private:
  struct Entry {
    Envelope e;
    Payload payload;
    Ticks sent_at = 0;
    Rank from = -1;
    Ticks forwarded_at = 0;  // to the replica
  };
  struct Parked {
    Envelope e;
    Rank peer;
    Payload payload;
    bool bounded;  // it is the staleness bound that it waits for
  };
  /// What a rank may load until it says that it has.
  struct Grant {
    Rank peer = -1;
    std::uint64_t request = 0;
    std::size_t shard = 0, tensor = 0;
    std::vector<Published*> leases;
    Payload payload;
  };
  struct Served {
    Served(const Table& table, int s, Pool& pool, const void* rule) : shard(table, s, pool, rule) {}
    Shard shard;
    Rank primary = -1, replica = -1;
    std::uint64_t last_index = 0;  // of the last entry: for a replica, that it has done
    std::deque<Entry> log;      // what the replica has not confirmed yet
    std::vector<Entry> ahead;   // for a replica: what came before its turn
    std::vector<Entry> early;   // for a replica, that is not the primary yet
    std::vector<Parked> parked;
    std::vector<std::uint64_t> told;  // bytes freed, by worker
    Lateness gate;              // who held the version below what it is now, and until when
  };
  /// What the shards know of a worker that is gone.
  struct Views {
    explicit Views(std::uint64_t of_whom = 0) : incarnation(of_whom) {}
    std::uint64_t incarnation;
    bool wanted = false;
    struct View {
      std::uint64_t clock = 0, committed = 0;
      std::vector<std::uint64_t> undecided;
    };
    std::vector<std::optional<View>> of;  // by shard
  };

  static constexpr std::size_t most_early = 2 * Shard::most_pushes;
  static constexpr std::uint64_t most_skipped = 1 << 16;  // of a place's workers, that came to other shards only

  Served* find(std::size_t shard) {
    for (const auto& s : served_)
      if (static_cast<std::size_t>(s->shard.index()) == shard) return s.get();
    return nullptr;
  }

  /// Who sent it knows earlier than this rank that the primary is gone.
  void keep_early(Served& s, Entry&& entry) {
    std::size_t bytes = entry.payload.size(), count = 0;
    for (const Entry& known : s.early) {
      if (known.from != entry.from) continue;
      if (table_.options.retry_after > nanoseconds{0} && is_same(known.e, entry.e)) return;
      bytes += known.payload.size(), ++count;
    }
    if (count >= most_early || bytes > 2 * table_.credits()) return refuse(entry.from, entry.e, Errc::protocol, concat({"too much for shard ", s.shard.index(), ", of which rank ", host_.rank(), " is but the replica"}));
    entry.payload.own(pool_);
    s.early.push_back(std::move(entry));
  }
  bool has_credit(Served& s, const Envelope& e) {
    std::size_t logged = in_lines(e.bytes);
    for (const Entry& entry : s.log)
      if (entry.e.kind == MessageKind::push && entry.e.worker == e.worker) logged += in_lines(entry.e.bytes);
    if (s.shard.held(e.worker) + logged > table_.credits()) s.shard.make_all();
    return s.shard.held(e.worker) + logged <= table_.credits();
  }
  void submit(Served& s, Entry&& entry) {
    if (entry.e.kind == MessageKind::push) entry.e.flags = static_cast<std::uint8_t>((entry.e.flags & (Envelope::is_direct | Envelope::stays)) | (table_.tensors[entry.e.tensor].is_sparse() ? Envelope::is_rows : 0));  // whatever it says
    if (s.replica < 0) return execute(s, std::move(entry));
    entry.payload.own(pool_);
    entry.e.index = ++s.last_index;
    s.log.push_back(std::move(entry));
    forward(s, s.log.back());
  }
  void forward(Served& s, Entry& kept) {
    kept.forwarded_at = host_.now();
    Envelope e = kept.e;
    e.flags = static_cast<std::uint8_t>((e.flags | Envelope::is_replica) & ~Envelope::is_direct);
    const std::span<const std::byte> all(kept.payload.data(), kept.payload.size());
    const std::size_t keys = (e.flags & Envelope::is_rows) != 0 && e.bytes > Post::most_inline ? e.count * sizeof(std::uint64_t) : 0;
    const std::span<const std::byte> pieces[] = {all.first(keys), all.subspan(keys)};
    host_.send(host_.parcel(s.replica), e, pieces, nullptr);
  }
  /// What a primary has in its log: in that order, once.
  void replicate(Served& s, Entry&& entry) {
    const MessageKind kind = entry.e.kind;
    const bool values = kind == MessageKind::push || kind == MessageKind::set;
    std::string problem = values ? s.shard.problem_with(entry.e) : "";
    if (problem.empty() && values && (entry.payload.size() != entry.e.bytes || (kind == MessageKind::push && table_.tensors[entry.e.tensor].is_sparse()))) problem = entry.payload.size() != entry.e.bytes ? "its payload is missing" : s.shard.problem_with_keys(entry.e, entry.payload.data());
    if (!problem.empty() || (!values && kind != MessageKind::advance && kind != MessageKind::leave && kind != MessageKind::cut && kind != MessageKind::join) || (kind == MessageKind::join && !is_guest(entry.e.worker)))
      throw Error(Errc::protocol, {"rank ", s.primary, " sent its replica an entry that cannot be done: ", problem.empty() ? std::string(name_of(kind)) : problem}, {host_.rank(), s.primary, 0, {}});
    const auto is_next = [&](const Entry& each) { return each.e.index == s.last_index + 1; };
    if (entry.e.index > s.last_index && std::none_of(s.ahead.begin(), s.ahead.end(), [&](const Entry& known) { return known.e.index == entry.e.index; })) {
      entry.payload.own(pool_);
      s.ahead.push_back(std::move(entry));
    }
    for (auto next = s.ahead.begin(); (next = std::find_if(s.ahead.begin(), s.ahead.end(), is_next)) != s.ahead.end();) {
      Entry now = std::move(*next);
      s.ahead.erase(next);
      ++s.last_index;
      execute(s, std::move(now));
    }
    Envelope done;
    done.kind = MessageKind::replicated;
    done.shard = static_cast<std::uint16_t>(s.shard.index());
    done.index = s.last_index;
    host_.send(s.primary, done);
  }
  void execute_next(Served& s) {
    Entry next = std::move(s.log.front());
    s.log.pop_front();
    execute(s, std::move(next));
  }
  void execute(Served& s, Entry&& entry) {
    const Envelope e = entry.e;
    const std::uint64_t before = s.shard.version();
    host_.at_work(State::reduce);
    switch (e.kind) {
      case MessageKind::push: s.shard.push(e, std::move(entry.payload)); break;
      case MessageKind::advance: s.shard.advance(e); break;
      case MessageKind::leave: s.shard.remove(e, {entry.payload.data(), entry.payload.size()}); break;
      case MessageKind::cut: s.shard.cut(e); break;
      case MessageKind::set: s.shard.set(e, entry.payload.data()); break;
      case MessageKind::join:
        s.shard.join(e);
        if (Views& v = views_[static_cast<std::size_t>(e.worker)]; v.incarnation < e.sequence) v = Views(e.sequence);
        break;
      default: break;
    }
    if (s.shard.version() > before && e.worker >= 0) s.gate = {entry.sent_at, table_.workers[static_cast<std::size_t>(e.worker)]};
    host_.at_work(State::protocol);
    if (s.primary == host_.rank() && e.kind == MessageKind::join) welcome(s, e, entry.from);
    else if (s.primary == host_.rank()) tell(s, e);
    s.shard.events.clear();
  }
  void tell(Served& s, const Envelope& e) {
    const auto send = [&](std::int32_t worker, std::uint64_t sequence, std::uint64_t request, const Lateness* late = nullptr) { acknowledge(s, worker, sequence, request, late); };
    // Of a copy: who is told may be on this rank, and go on at once.
    std::vector<Shard::Events::Acknowledge> acknowledged = std::exchange(acknowledged_, {});  // memory that is used again
    acknowledged.swap(s.shard.events.acknowledge);
    const bool freed = std::exchange(s.shard.events.freed, false), readable = std::exchange(s.shard.events.readable, false);
    for (const auto& [worker, sequence, request] : acknowledged) send(worker, sequence, request);
    acknowledged.clear();
    acknowledged_ = std::move(acknowledged);
    const std::string why = std::exchange(s.shard.events.refused, {});
    if (!why.empty()) refuse(table_.workers[static_cast<std::size_t>(e.worker)], e, Errc::invalid_argument, why);
    else if (e.request != 0 && e.kind != MessageKind::push) send(e.worker, 0, e.request);
    if (freed) tell_freed(s);
    if (readable) release(s);
    if (std::exchange(s.shard.events.freed, false)) tell_freed(s);  // by who looked
  }
  void tell_freed(Served& s) {
    for (std::size_t w = 0; w < s.told.size(); ++w)
      if (s.told[w] != s.shard.freed(static_cast<std::int32_t>(w)) && s.shard.is_live(static_cast<std::int32_t>(w))) acknowledge(s, static_cast<std::int32_t>(w), 0, 0, s.gate.until > 0 ? &s.gate : nullptr);
  }
  /// To a worker: a push is kept (or, without a sequence, something else is done), and what is held of its pushes no longer.
  void acknowledge(Served& s, std::int32_t worker, std::uint64_t sequence, std::uint64_t request, const Lateness* late = nullptr) {
    const Rank to = table_.workers[static_cast<std::size_t>(worker)];
    if (host_.is_gone(to)) return;
    Envelope e;
    e.kind = MessageKind::acknowledge;
    e.shard = static_cast<std::uint16_t>(s.shard.index());
    e.worker = worker;
    e.sequence = sequence;
    e.request = request;
    e.number = s.told[static_cast<std::size_t>(worker)] = s.shard.freed(worker);
    host_.send(to, e, {}, late);
  }
  static bool is_logged(const Served& s, const Envelope& e) {
    return std::any_of(s.log.begin(), s.log.end(), [&](const Entry& known) { return is_same(known.e, e); });
  }
  /// Said twice.
  static bool is_same(const Envelope& a, const Envelope& b) {
    return a.kind == b.kind && a.worker == b.worker && a.request == b.request && a.sequence == b.sequence && a.clock == b.clock && a.number == b.number && a.first == b.first;
  }
  void release(Served& s) {
    for (;;) {  // the most urgent first, then this rank's own, which passes the values through the caches; each may let others go on
      auto next = s.parked.end();
      for (auto p = s.parked.begin(); p != s.parked.end(); ++p)
        if (s.shard.ready(p->e) && host_.may_answer(p->peer) && (next == s.parked.end() || std::pair(p->e.parts, p->peer == host_.rank()) > std::pair(next->e.parts, next->peer == host_.rank()))) next = p;
      if (next == s.parked.end()) return;
      Parked pull = std::move(*next);
      s.parked.erase(next);
      ++monitor_.parked;
      answer(s, pull);
    }
  }
  void answer(Served& s, const Parked& pull) {
    watch(s, pull.e);
    Envelope e = pull.e;
    e.kind = MessageKind::reply;
    e.flags = 0;
    e.clock = s.shard.version();
    const Lateness* const late = pull.bounded ? &s.gate : nullptr;
    Post::Parcel& parcel = host_.parcel(pull.peer);
    host_.at_work(State::copy);
    pieces_.clear();
    if (pull.e.flags & Envelope::of_cut) {
      e.clock = pull.e.clock;
      parcel.payload = s.shard.fetch(pull.e, e.count, e.number);
      e.bytes = parcel.payload.size();
      if (e.bytes > 0) pieces_.emplace_back(parcel.payload.data(), parcel.payload.size());
    } else if (table_.tensors[e.tensor].is_sparse()) {
      parcel.payload = s.shard.read_rows(e, pull.payload.data());
      e.bytes = parcel.payload.size();
      pieces_.emplace_back(parcel.payload.data(), parcel.payload.size());
    } else {
      e.flags = Envelope::is_cut;
      e.number = table_.part(e.tensor, s.shard.index()).first;
      e.bytes = e.count * table_.rule.grain;
      parcel.tensor = e.tensor;
      parcel.shard = static_cast<std::size_t>(s.shard.index());
      // This rank's own are copied while they are in the caches.
      std::byte* here = pull.peer == host_.rank() ? host_.place_here(e, late) : nullptr;
      host_.at_work(State::reduce);
      s.shard.read(e, parcel.payload, [&](const Shard::Span& span) {
        if (here) {
          host_.copy_here(e, here, span.data, span.bytes);
          here += span.bytes;
          host_.at_work(State::reduce);
          return;
        }
        pieces_.emplace_back(span.data, span.bytes);
        if (span.published) Shard::lease(span.published), parcel.leases.push_back(span.published);
      });
    }
    host_.at_work(State::protocol);
    if (!(pull.e.flags & Envelope::of_cut)) grant(parcel, e);
    host_.send(parcel, e, pieces_, late);
    if (std::exchange(s.shard.events.freed, false)) tell_freed(s);
  }
  /// A long answer to a rank that can load it where it is: it is told where, and has it until it says that it is done.
  void grant(Post::Parcel& parcel, Envelope& e) {
    if (parcel.to == host_.rank() || e.bytes <= Post::most_inline || host_.shared_of(parcel.to).empty()) return;
    for (const auto& piece : pieces_)
      if (!pool_.is_shared(piece.data())) return;
    Grant& g = grants_.emplace_back();
    g.peer = parcel.to;
    g.request = e.request;
    g.shard = e.shard;
    g.tensor = e.tensor;
    g.leases.swap(parcel.leases);
    g.payload = std::move(parcel.payload);
    e.flags |= Envelope::is_direct;
    parcel.payload = Payload(pool_, pieces_.size() * sizeof(std::uint64_t));
    for (std::size_t i = 0; i < pieces_.size(); ++i) store(parcel.payload.data() + i * sizeof(std::uint64_t), std::uint64_t{pool_.place_of(pieces_[i].data())});
    pieces_.assign(1, {parcel.payload.data(), parcel.payload.size()});
  }
  void take_back(Grant& g) {
    for (Published* lease : g.leases) find(g.shard)->shard.let_go(g.tensor, lease);
  }
  /// The staleness monitor: looks at every answer for itself.
  void watch(const Served& s, const Envelope& e) {
    if (e.flags & Envelope::of_cut) return;
    ++monitor_.answered;
    if (e.worker < 0) return;
    std::uint64_t least = ~std::uint64_t{0};
    for (std::size_t w = 0; w < table_.workers.size(); ++w)
      if (s.shard.is_live(static_cast<std::int32_t>(w))) least = std::min(least, s.shard.clock_of(static_cast<std::int32_t>(w)));
    const std::uint64_t behind = e.clock > least ? e.clock - least : 0;
    monitor_.stalest = std::max(monitor_.stalest, behind);
    const Consistency& c = table_.options.consistency;
    if (c.bounded && behind > c.staleness) ++monitor_.violated;
  }
  void refuse(Rank peer, const Envelope& e, Errc code, const std::string& why) {
    if (e.request == 0) return;
    Envelope answer = e;
    answer.kind = MessageKind::refusal;
    answer.flags = 0;
    answer.count = static_cast<std::uint64_t>(code);
    const std::size_t length = std::min<std::size_t>(why.size(), 1024);
    answer.bytes = length;
    Post::Parcel& parcel = host_.parcel(peer);
    parcel.payload = Payload(pool_, length);
    std::memcpy(parcel.payload.data(), why.data(), length);
    const std::span<const std::byte> piece(parcel.payload.data(), length);
    host_.send(parcel, answer, std::span(&piece, 1), nullptr);
  }

  // A worker comes by the door. The first shard says which one it is, then it joins the others.

  bool is_guest(std::int32_t worker) const { return worker >= static_cast<std::int32_t>(table_.regulars()) && worker < static_cast<std::int32_t>(table_.workers.size()); }
  void join(Served& s, Rank peer, Envelope e) {
    if (peer < table_.size) return refuse(peer, e, Errc::protocol, concat({"rank ", peer, " is here already"}));
    if (const std::int32_t known = table_.worker_at(peer); known >= 0 && e.worker != known) return refuse(peer, e, Errc::protocol, concat({"it is worker ", known, " already"}));
    if (s.primary != host_.rank()) return keep_early(s, {e, {}, 0, peer});
    if (table_.options.guests == 0) return refuse(peer, e, Errc::unsupported, "this table takes no workers that come later (TableOptions::guests)");
    const auto is_free = [&](std::int32_t worker) {
      const Rank r = table_.workers[static_cast<std::size_t>(worker)];
      return !s.shard.is_live(worker) && !s.shard.has_contributions(worker) && !views_[static_cast<std::size_t>(worker)].wanted && (peer == r || host_.is_gone(r)) && std::none_of(s.log.begin(), s.log.end(), [&](const Entry& entry) { return entry.e.kind == MessageKind::join && entry.e.worker == worker; });
    };
    if (e.worker < 0) {
      if (s.shard.index() != 0) return refuse(peer, e, Errc::protocol, "the first shard is asked for a place, and no other");
      e.worker = static_cast<std::int32_t>(table_.regulars());
      while (is_guest(e.worker) && !is_free(e.worker)) ++e.worker;
      if (!is_guest(e.worker)) return refuse(peer, e, Errc::no_resources, concat({"all ", table_.options.guests, " places for workers that come later are taken, or what their last ones pushed is not folded yet (TableOptions::guests)"}));
      e.sequence = s.shard.incarnation(e.worker) + 1;
    } else if (!is_guest(e.worker) || e.sequence <= s.shard.incarnation(e.worker) || e.sequence - s.shard.incarnation(e.worker) > most_skipped) {
      return refuse(peer, e, Errc::protocol, concat({"there is no place for worker ", e.worker}));
    } else if (!is_free(e.worker)) {
      return refuse(peer, e, Errc::no_resources, concat({"the place of worker ", e.worker, " is still taken at shard ", s.shard.index()}));
    }
    submit(s, {e, {}, host_.now(), peer});
  }
  void welcome(Served& s, const Envelope& e, Rank guest) {
    const Rank r = table_.workers[static_cast<std::size_t>(e.worker)];
    if (guest != r && !host_.rename(guest, r)) {  // it came and went
      views_[static_cast<std::size_t>(e.worker)].wanted = true;
      return settle(e.worker);
    }
    Envelope answer = e;
    answer.kind = MessageKind::reply;
    answer.clock = s.shard.version();
    host_.send(r, answer);
  }

  // A worker is gone: the shards tell each other what they know of it, and do the same with what it left.

  Views& views(std::int32_t worker) {
    Views& v = views_[static_cast<std::size_t>(worker)];
    v.of.resize(static_cast<std::size_t>(table_.shards()));
    return v;
  }
  void hear(Rank peer, const Envelope& e, const Payload& payload) {
    if (e.worker < 0 || static_cast<std::size_t>(e.worker) >= views_.size() || e.shard >= table_.shards() || payload.size() % (2 * sizeof(std::uint64_t)) != 0) return;
    const int replica = table_.replica_of(e.shard);
    if (peer != table_.servers[e.shard] && (replica < 0 || peer != table_.servers[static_cast<std::size_t>(replica)])) return;
    if (const Served* const own = find(e.shard); own && own->primary == host_.rank()) return;
    if (e.sequence < views(e.worker).incarnation || (e.sequence > views(e.worker).incarnation && !is_guest(e.worker))) return;  // of one that was it before
    if (e.sequence > views(e.worker).incarnation) {  // it has not come as far as here
      views_[static_cast<std::size_t>(e.worker)] = Views(e.sequence);
      views_[static_cast<std::size_t>(e.worker)].wanted = true;
    }
    // Where it has not come, or is not known to be it, nobody finds out by himself.
    if (is_guest(e.worker) && host_.is_gone(table_.workers[static_cast<std::size_t>(e.worker)])) views_[static_cast<std::size_t>(e.worker)].wanted = true;
    Views::View view{e.clock, e.number, std::vector<std::uint64_t>(payload.size() / sizeof(std::uint64_t))};
    if (payload.size() > 0) std::memcpy(view.undecided.data(), payload.data(), payload.size());
    views(e.worker).of[e.shard] = std::move(view);
    settle(e.worker);
    if (e.flags & Envelope::asks) show(e.worker, 0);
  }
  /// To all other servers, what the shards of this one know of a worker that is gone.
  void show(std::int32_t worker, std::uint8_t flags) {
    const Views& v = views(worker);
    for (const auto& each : served_) {
      const auto index = static_cast<std::size_t>(each->shard.index());
      if (each->primary != host_.rank() || !v.of[index]) continue;
      Envelope e;
      e.kind = MessageKind::gone;
      e.flags = flags;
      e.worker = worker;
      e.sequence = v.incarnation;
      e.shard = static_cast<std::uint16_t>(index);
      e.clock = v.of[index]->clock;
      e.number = v.of[index]->committed;
      for (const Rank to : table_.servers)
        if (to != host_.rank() && !host_.is_gone(to)) send_list(to, e, v.of[index]->undecided);
    }
  }
  void send_list(Rank to, Envelope& e, const std::vector<std::uint64_t>& list) {
    Post::Parcel& parcel = host_.parcel(to);
    parcel.payload = Payload(pool_, e.bytes = list.size() * sizeof(std::uint64_t));
    if (!list.empty()) std::memcpy(parcel.payload.data(), list.data(), e.bytes);
    const std::span<const std::byte> piece(parcel.payload.data(), e.bytes);
    host_.send(parcel, e, std::span(&piece, list.empty() ? 0 : 1), nullptr);
  }
  void settle(std::int32_t worker) {
    Views& v = views(worker);
    if (!v.wanted) return;  // it will be found to be gone here, too
    bool news = false;
    for (const auto& each : served_) {
      Served& s = *each;
      auto& mine = v.of[static_cast<std::size_t>(s.shard.index())];
      if (s.primary != host_.rank() || mine || !s.log.empty()) continue;
      mine = s.shard.incarnation(worker) == v.incarnation ? Views::View{s.shard.clock_of(worker), s.shard.committed_of(worker), s.shard.undecided(worker)} : Views::View{};
      news = true;
    }
    if (news) show(worker, 0);
    Views::View all;
    std::map<std::uint64_t, std::uint64_t> at;  // number of a push: shards that have it, of as many as it goes to
    std::vector<std::uint64_t> complete;
    for (std::size_t s = 0; s < v.of.size(); ++s) {
      if (!v.of[s] && !is_lost(static_cast<int>(s))) return;
      if (!v.of[s]) continue;
      all.clock = std::max(all.clock, v.of[s]->clock), all.committed = std::max(all.committed, v.of[s]->committed);
      const auto& list = v.of[s]->undecided;
      for (std::size_t i = 0; i + 1 < list.size(); i += 2)
        if (list[i + 1] == 0 || ++at[list[i]] == list[i + 1]) complete.push_back(list[i]);
    }
    v.wanted = false;
    for (const auto& each : served_) {
      if (each->primary != host_.rank() || !each->shard.is_live(worker) || each->shard.incarnation(worker) != v.incarnation) continue;
      Entry entry;
      entry.e.kind = MessageKind::leave;
      entry.e.shard = static_cast<std::uint16_t>(each->shard.index());
      entry.e.worker = worker;
      entry.e.clock = all.clock;
      entry.e.number = all.committed;
      entry.e.bytes = complete.size() * sizeof(std::uint64_t);
      entry.payload = Payload(pool_, entry.e.bytes);
      if (!complete.empty()) std::memcpy(entry.payload.data(), complete.data(), entry.e.bytes);
      entry.sent_at = host_.now();
      submit(*each, std::move(entry));
    }
  }
  /// Nobody keeps that shard any more.
  bool is_lost(int shard) const {
    const int replica = table_.replica_of(shard);
    return host_.is_gone(table_.servers[static_cast<std::size_t>(shard)]) && (replica < 0 || host_.is_gone(table_.servers[static_cast<std::size_t>(replica)]));
  }

  TableHost& host_;
  const Table& table_;
  Pool& pool_;
  std::vector<std::unique_ptr<Served>> served_;
  std::vector<Views> views_;  // by worker
  std::vector<Grant> grants_;
  Monitor monitor_;
  Ticks told_at_ = 0;
  bool ask_for_ = false;  // what the others know of workers that are gone
  std::vector<Shard::Events::Acknowledge> acknowledged_;
  std::vector<std::span<const std::byte>> pieces_;
};

}  // namespace tally::inline v0::detail
