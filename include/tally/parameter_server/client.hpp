// SPDX-License-Identifier: Apache-2.0
// The working side of a rank: its pushes and pulls, cut into one part per shard, from the call to the last answer. A part is sent
// when the shard has credit for it, and again to whoever takes over if the server is lost before it has answered. The worker's
// clock is told when all that was pushed before is where it belongs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../copy.hpp"
#include "../topology.hpp"
#include "operation.hpp"
#include "server.hpp"

namespace tally::inline v0::detail {

class TableClient {
 public:
  struct Events {
    virtual ~Events() = default;
    virtual void finished(TableOp& op) = 0;
    /// An answer came from this rank itself; what held it up.
    virtual void heard_here(TableOp& op, const Lateness* late) = 0;
    /// From here on this thread copies for the operation, until done; that it has stored and loaded so many bytes of others' memory.
    virtual void copying(TableOp& op) = 0;
    virtual void copied(TableOp& op, std::uint64_t stored, std::uint64_t loaded) = 0;
    virtual bool is_gone(Rank r) const = 0;
  };

  TableClient(TableHost& host, Events& events, const Table& table) : host_(host), events_(events), table_(table), me_(table.worker_at(host.rank())), past_caches_(past_caches(table)), links_(static_cast<std::size_t>(table.shards())) {
    for (int s = 0; s < table.shards(); ++s) {
      Link& l = link(s);
      l.server = table.servers[static_cast<std::size_t>(s)];
      if (const auto shared = host.shared_of(l.server); me_ >= 0 && l.server != host.rank() && !shared.empty()) l.window = shared.data() + table.arena_bytes() + static_cast<std::size_t>(me_) * table.window_bytes();
    }
  }

  bool is_worker() const { return me_ >= 0; }
  /// It has become a worker, whose clock is that.
  void join(std::int32_t worker, std::uint64_t clock) {
    me_ = worker;
    clock_ = told_.clock = clock;
    for (int s = 0; s < table_.shards(); ++s)
      if (!link(s).lost) tell(s, 0);
  }
  std::uint64_t clock() const { return clock_; }

  void start(TableOp& op) {
    op.request = ++requests_ << slot_bits | take_slot(op);
    op.parts.clear();
    op.keys.clear();
    op.order.clear();
    op.version = ~std::uint64_t{0};
    op.number = 0;
    const TableCall& c = op.call;
    const TensorSpec& t = table_.tensors[c.tensor];
    if (t.is_sparse()) sort_keys(op, t);
    const auto each_part = [&](bool is_push) {
      if (!t.is_sparse()) {
        for (int s = 0; s < table_.shards(); ++s) {
          const Range mine = table_.part(c.tensor, s);
          const std::size_t begin = std::max(mine.first, c.first), end = std::min(mine.first + mine.count, c.first + c.count);
          if (begin < end) add(op, s, is_push, begin, end - begin);
        }
      } else {
        for (std::size_t begin = 0; begin < op.keys.size();) {
          const int s = table_.shard_of(t, op.keys[begin]);
          std::size_t end = begin + 1;
          while (end < op.keys.size() && table_.shard_of(t, op.keys[end]) == s) ++end;
          add(op, s, is_push, begin, end - begin);
          begin = end;
        }
      }
    };
    if (c.in) each_part(true);
    const std::size_t pushes = op.parts.size();
    if (c.in) expect_credit(op);
    for (const TablePart& p : op.parts)
      if (link(p.shard).lost) return fail(op, std::make_exception_ptr(lost_error(p.shard, op)));
    op.call_number = ++calls_;
    if (c.out) each_part(false);
    op.remaining = op.parts.size();
    op.clock = clock_ + (c.tick ? 1 : 0);
    for (TablePart& p : op.parts) {
      p.op = &op;
      p.clock = p.is_push ? clock_ : op.clock;
    }
    for (std::size_t i = 0; i < pushes; ++i) enqueue(op.parts[i]);
    if (c.tick) tick();
    if (op.remaining == 0) return end(op);
    for (std::size_t i = pushes; i < op.parts.size(); ++i) {
      auto& pulls = link(op.parts[i].shard).pulls;
      pulls.insert(std::upper_bound(pulls.begin(), pulls.end(), &op.parts[i], [](const TablePart* a, const TablePart* b) { return a->op->call.priority > b->op->call.priority; }), &op.parts[i]);
    }
    for (Link& l : links_) pump(l);
  }
  void tick() { tick_to(clock_ + 1); }
  /// A later clock. It is told to the servers when everything pushed so far is where it belongs.
  void tick_to(std::uint64_t clock) {
    clock_ = clock;
    ticks_.push_back(clock_);
    for (Link& l : links_) l.since_tick = 0;
    settle();
  }
  /// Errc::aborted after a push that was not finished.
  void expect_pushing() const {
    if (pushing_failed_) throw *pushing_failed_;
  }
  /// Everything that was pushed and ticked is told.
  bool is_settled() const {
    return pushing_failed_ || (ticks_.empty() && unsettled_.empty() && std::all_of(links_.begin(), links_.end(), [](const Link& l) { return l.queue.empty(); }));
  }
  /// Asks a shard for something else; what goes with it is in rows_in.
  void ask(TableOp& op, int shard, Envelope e) {
    op.request = ++requests_ << slot_bits | take_slot(op);
    op.parts.clear();
    op.order.clear();
    op.number = 0;
    add(op, shard, false, e.first, e.count);
    op.remaining = 1;
    op.parts[0].op = &op;
    e.shard = static_cast<std::uint16_t>(shard);
    if (e.kind != MessageKind::join) e.worker = me_;
    e.request = op.request;
    e.bytes = op.rows_in.size();
    op.asked = e;
    if (link(shard).lost) return fail(op, std::make_exception_ptr(lost_error(shard, op)));
    send_again(op.parts[0]);
  }
  /// This worker pushes no more. Done when `op` is.
  void leave(TableOp& op) {
    op.request = ++requests_ << slot_bits | take_slot(op);
    op.parts.clear();
    op.order.clear();
    for (int s = 0; s < table_.shards(); ++s)
      if (!link(s).lost) add(op, s, false, 0, 0);
    op.remaining = op.parts.size();
    for (TablePart& p : op.parts) p.op = &op, p.clock = clock_;
    if (op.remaining == 0) return end(op);
    for (std::size_t i = 0; i < op.parts.size() && !op.done; ++i) send_again(op.parts[i]);
  }

  void received(Rank peer, const Envelope& e, Payload&& payload) {
    if (e.shard >= links_.size()) return;
    Link& l = links_[e.shard];
    if (TableOp* const op = op_of(e.request); op && op->failing) end_if_unused(*op);
    if (e.kind == MessageKind::acknowledge) {
      for (; !l.held.empty() && l.held.front().sequence <= e.number; l.held.pop_front()) l.used -= l.held.front().bytes;
      if (e.request != 0) acknowledged(l, e);
      return pump(l);
    }
    TablePart* const p = find(e);
    if (!p || p->done || peer != l.server) {  // a second answer, or one that comes too late
      if (e.kind == MessageKind::reply && (e.flags & Envelope::is_direct) != 0) release(peer, e);
      return;
    }
    if (e.kind == MessageKind::refusal) {
      const std::string why(reinterpret_cast<const char*>(payload.data()), payload.size());
      return fail(*p->op, std::make_exception_ptr(Error(static_cast<Errc>(e.count), {text_of(*p->op), ": ", why}, {host_.rank(), peer, p->op->sequence, {}})));
    }
    if (e.kind != MessageKind::reply || p->is_push) return;
    TableOp& op = *p->op;
    if (asks(op)) {
      if (!p->receiving && (payload.size() != e.bytes || e.bytes > op.capacity)) return;
      if (!p->receiving && payload.size() > 0) std::memcpy(op.call.out, payload.data(), payload.size());
      op.answer = e;
      return finish(*p);
    }
    if ((e.flags & Envelope::is_direct) != 0) {
      load(*p, peer, e, payload);
    } else if (e.bytes != p->count * unit(op)) {
      return;
    } else if (!p->receiving) {  // it came with its envelope, or twice
      if (payload.size() != p->count * unit(op)) return;
      std::memcpy(place(*p), payload.data(), payload.size());
    } else if (payload.size() > 0) {
      return;
    }
    op.version = std::min(op.version, e.clock);
    finish(*p);
  }
  /// A reply of this rank's own.
  void take(const Envelope& e, std::span<const std::span<const std::byte>> pieces, const Lateness* late) {
    TablePart* const p = find(e);
    if (!p || p->done) return;
    events_.heard_here(*p->op, late);
    events_.copying(*p->op);
    if (asks(*p->op)) {
      if (e.bytes <= p->op->capacity && !pieces.empty()) std::memcpy(p->op->call.out, pieces[0].data(), e.bytes);
      p->op->answer = e;
      events_.copied(*p->op, 0, 0);
      return finish(*p);
    }
    if (!p->receiving) {  // else it is there
      std::byte* to = place(*p);
      for (const auto& piece : pieces) copy(to, piece.data(), piece.size()), to += piece.size();
    }
    events_.copied(*p->op, 0, 0);
    p->op->version = std::min(p->op->version, e.clock);
    finish(*p);
  }
  /// Of a reply of this rank's own: a piece of the values, where place() says that it goes.
  void copy_here(const Envelope& e, std::byte* to, const std::byte* from, std::size_t bytes) {
    if (TableOp* const op = op_of(e.request)) events_.copying(*op);
    copy(to, from, bytes);
  }
  /// Where a reply goes; null if nobody waits for it.
  std::byte* place(const Envelope& e) {
    TablePart* const p = find(e);
    if (!p || p->receiving || e.kind != MessageKind::reply || (asks(*p->op) ? e.bytes > p->op->capacity : e.bytes != p->count * unit(*p->op))) return nullptr;
    p->receiving = true;
    if (asks(*p->op)) return p->op->call.out;
    return place(*p);
  }
  TableOp* op_of(std::uint64_t request) const {
    const std::size_t slot = request & ((1u << slot_bits) - 1);
    return request != 0 && slot < slots_.size() && slots_[slot] && slots_[slot]->request == request ? slots_[slot] : nullptr;
  }
  /// The next operation that waits for this server's credit.
  TableOp* starved_of(Rank server) const {
    for (const Link& l : links_)
      if (l.server == server && !l.queue.empty()) return l.queue.front()->op;
    return nullptr;
  }
  const TablePart* missing(const TableOp& op) const {
    for (const TablePart& p : op.parts)
      if (!p.done) return &p;
    return nullptr;
  }
  Rank server_of(int shard) const { return links_[static_cast<std::size_t>(shard)].server; }
  std::string text_of(const TableOp& op) const {
    const TableCall& c = op.call;
    if (c.what == Collective::leave) return op.asked.kind == MessageKind{} ? "leaving the table" : op.asked.kind == MessageKind::join ? "joining the table" : concat({"part of the snapshot for clock ", op.asked.clock, ", asked for"});
    const TensorSpec& t = table_.tensors[c.tensor];
    return t.is_sparse() ? concat({name_of(c.what), "('", t.name, "', ", op.keys.size(), " rows)"}) : concat({name_of(c.what), "('", t.name, "', elements ", c.first, " to ", c.first + c.count, ")"});
  }
  /// Without its parts: whatever still comes for it is nobody's. It ends when nothing of its memory is being sent or received into.
  void fail(TableOp& op, std::exception_ptr why) {
    if (op.done || op.failing) return;
    op.error = std::move(why);
    op.failing = true;
    if (op.number > 0 && std::any_of(op.parts.begin(), op.parts.end(), [](const TablePart& p) { return p.is_push && !p.done; })) {
      if (!pushing_failed_) pushing_failed_.emplace(Errc::aborted, concat({"a push of this worker's was not finished, so it can neither push nor tick any more: ", text_of(op)}));
      for (const TablePart& p : op.parts)  // where it was sent to it never counts, nor does what was sent after it
        if (p.is_push && p.sent) link(p.shard).last_to_count = std::min(link(p.shard).last_to_count, p.sequence - 1);
    }
    for (Link& l : links_) {
      const auto is_its = [&](const TablePart* p) { return p->op == &op; };
      for (const TablePart* p : l.under_way)
        if (is_its(p)) l.under_way_bytes -= payload_of(*p, op);
      std::erase_if(l.queue, is_its), std::erase_if(l.pulls, is_its), std::erase_if(l.under_way, is_its);
    }
    if (op.call.in && op.call.out) host_.disown();
    end_if_unused(op);
    if (!pushing_failed_) return;
    for (TableOp* other : std::vector<TableOp*>(slots_))  // no other push can be finished either
      if (other && !other->failing && std::any_of(other->parts.begin(), other->parts.end(), [](const TablePart& p) { return p.is_push && !p.done; })) fail(*other, std::make_exception_ptr(*pushing_failed_));
  }
  /// Of one that has failed.
  void end_if_unused(TableOp& op) {
    if (op.failing && !op.done && !host_.uses(op.request, &op)) end(op);
  }

  /// A server is gone for good: what it has not answered goes to its replica, or fails.
  void lost(Rank r) {
    for (std::size_t s = 0; s < links_.size(); ++s) {
      Link& l = links_[s];
      if (l.server != r) continue;
      const int replica = table_.replica_of(static_cast<int>(s));
      const Rank next = replica < 0 ? -1 : table_.servers[static_cast<std::size_t>(replica)];
      if (next >= 0 && next != l.server && !events_.is_gone(next)) {
        l.server = next;
        l.window = nullptr;  // that was with the other
        send_all_again(static_cast<int>(s));
        continue;
      }
      l.lost = true;
      for (TableOp* op : std::vector<TableOp*>(slots_))
        if (op && !op->done && std::any_of(op->parts.begin(), op->parts.end(), [&](const TablePart& p) { return !p.done && p.shard == static_cast<int>(s); })) {
          if (op->call.what == Collective::leave && !asks(*op)) {  // who leaves need not tell who is gone
            for (TablePart& p : op->parts)
              if (p.shard == static_cast<int>(s) && !p.done) finish(p);
            continue;
          }
          fail(*op, std::make_exception_ptr(lost_error(static_cast<int>(s), *op)));
        }
    }
    settle();
  }
  /// What has not been answered for so long may be lost.
  void retry(Ticks now, Ticks after) {
    for (TableOp* op : std::vector<TableOp*>(slots_))
      for (std::size_t i = 0; op && !op->done && i < op->parts.size(); ++i)
        if (TablePart& p = op->parts[i]; p.sent && !p.done && !p.receiving && now - p.sent_at > after && !host_.uses(op->request, op)) send_again(p);
    const bool is_starved = std::any_of(links_.begin(), links_.end(), [](const Link& l) { return !l.queue.empty(); });
    if ((told_at_ == 0 && !is_starved) || now - told_at_ <= after) return;  // nothing was told yet, or just now
    told_at_ = now;
    for (int s = 0; s < table_.shards(); ++s)
      if (!link(s).lost) tell_all(s);
  }

 private:
  static constexpr int slot_bits = 16;
  static constexpr std::size_t most_under_way = std::size_t{4} << 20;  // bytes that are sent before anything of them is acknowledged; what is more urgent goes before the rest
  struct Link {
    Rank server = -1;
    std::uint64_t sequence = 0;        // of the last push
    std::uint64_t last_to_count = ~std::uint64_t{0};  // likewise, of those that ever will
    std::size_t used = 0;              // bytes of pushes that the shard may still hold
    struct Held {
      std::uint64_t sequence;
      std::size_t bytes;
      std::ptrdiff_t place;  // in the window; -1: it was sent
    };
    std::deque<Held> held;             // those
    std::byte* window = nullptr;       // where they are stored for it; null: they are sent
    std::size_t at = 0;                // where the next one goes there
    std::uint64_t since_tick = 0;      // bytes of pushes of this clock
    std::uint64_t told_after = 0;      // pushes to it before the last tick that it was told of
    std::vector<TablePart*> queue;     // pushes that wait to be sent, by clock, then the most urgent first
    std::deque<TablePart*> pulls;      // that wait until the own pushes before them have been sent
    std::deque<TablePart*> under_way;  // pushes that are not acknowledged
    std::size_t under_way_bytes = 0;
    bool lost = false, pumping = false;
  };
  /// A push that has begun to be sent, and of which not all shards have said that they keep it, or one before it.
  struct Unsettled {
    std::uint64_t number, clock;
    std::size_t missing;
    bool several;
  };
  struct Told {
    std::uint64_t clock = 0, number = 0;
  };

  static bool asks(const TableOp& op) { return op.asked.kind != MessageKind{}; }
  Link& link(int shard) { return links_[static_cast<std::size_t>(shard)]; }
  std::size_t unit(const TableOp& op) const {
    const TensorSpec& t = table_.tensors[op.call.tensor];
    return t.is_sparse() ? t.row * table_.rule.grain : table_.rule.grain;
  }
  std::uint64_t take_slot(TableOp& op) {
    const auto slot = static_cast<std::size_t>(std::find(slots_.begin(), slots_.end(), nullptr) - slots_.begin());
    if (slot >> slot_bits) throw Error(Errc::no_resources, {"more than ", 1 << slot_bits, " operations of a table are under way"});
    if (slot == slots_.size()) slots_.push_back(nullptr);
    slots_[slot] = &op;
    return slot;
  }
  static void add(TableOp& op, int shard, bool is_push, std::size_t first, std::size_t count) {
    TablePart& p = op.parts.emplace_back();
    p.shard = shard;
    p.is_push = is_push;
    p.first = first;
    p.count = count;
  }
  /// A worker that would wait for what only its own tick sets free is told so.
  void expect_credit(const TableOp& op) {
    expect_pushing();
    for (const TablePart& p : op.parts) {
      Link& l = link(p.shard);
      const std::size_t bytes = in_lines(payload_of(p, op)), held = table_.options.fold.waits() ? l.since_tick : 0;
      if (held + bytes > table_.credits() && held > 0)
        throw Error(Errc::invalid_argument, {text_of(op), ": with it this clock's pushes to shard ", p.shard, " are ", held + bytes, " bytes, more than its credits, ", table_.credits(), " bytes, and they are kept until the clock ends: tick, push less, or give the table more (TableOptions::credits)"});
      if (bytes > table_.credits())
        throw Error(Errc::invalid_argument, {text_of(op), ": ", bytes, " bytes to shard ", p.shard, " are more than its credits, ", table_.credits(), " bytes: push less at once, or give the table more (TableOptions::credits)"});
    }
  }
  std::size_t payload_of(const TablePart& p, const TableOp& op) const { return p.count * (unit(op) + (table_.tensors[op.call.tensor].is_sparse() ? sizeof(std::uint64_t) : 0)); }

  void sort_keys(TableOp& op, const TensorSpec& t) {
    const TableCall& c = op.call;
    op.keys.assign(c.keys.begin(), c.keys.end());
    if (std::is_sorted(op.keys.begin(), op.keys.end())) return;
    op.order.resize(op.keys.size());
    std::iota(op.order.begin(), op.order.end(), 0u);
    std::stable_sort(op.order.begin(), op.order.end(), [&](std::uint32_t a, std::uint32_t b) { return c.keys[a] < c.keys[b]; });
    const std::size_t row = t.row * table_.rule.grain;
    for (std::size_t i = 0; i < op.order.size(); ++i) op.keys[i] = c.keys[op.order[i]];
    if (c.in) {
      op.rows_in.resize(op.keys.size() * row);
      for (std::size_t i = 0; i < op.order.size(); ++i) std::memcpy(op.rows_in.data() + i * row, c.in + op.order[i] * row, row);
    }
    if (c.out) op.rows_out.resize(op.keys.size() * row);
  }
  /// Elements or rows of a part, where they are sent from and go to.
  const std::byte* source(const TablePart& p) const {
    const TableOp& op = *p.op;
    const std::byte* const in = op.order.empty() ? op.call.in : op.rows_in.data();
    return in + (p.first - (is_sparse(op) ? 0 : op.call.first)) * unit(op);
  }
  std::byte* place(const TablePart& p) const {
    TableOp& op = *p.op;
    std::byte* const out = op.order.empty() ? op.call.out : op.rows_out.data();
    return out + (p.first - (is_sparse(op) ? 0 : op.call.first)) * unit(op);
  }
  bool is_sparse(const TableOp& op) const { return table_.tensors[op.call.tensor].is_sparse(); }
  std::span<const std::byte> keys_of(const TablePart& p) const { return std::as_bytes(std::span(p.op->keys).subspan(p.first, p.count)); }

  Envelope envelope(const TablePart& p, MessageKind kind) const {
    const TableOp& op = *p.op;
    Envelope e;
    e.kind = kind;
    e.tensor = static_cast<std::uint16_t>(op.call.tensor);
    e.shard = static_cast<std::uint16_t>(p.shard);
    e.worker = me_;
    e.weight = static_cast<float>(op.call.weight);
    e.sequence = p.sequence;
    e.number = op.number;
    e.clock = p.clock;
    e.first = p.first;
    e.count = p.count;
    e.request = op.request;
    return e;
  }
  /// In the order in which they are to be sent: by clock, then those of which a part has been sent already, as they were, so that no two
  /// pushes wait for each other's room on two shards; then the most urgent.
  static bool goes_before(const TablePart* a, const TablePart* b) {
    const TableOp &x = *a->op, &y = *b->op;
    if (a->clock != b->clock) return a->clock < b->clock;
    if ((x.number > 0) != (y.number > 0)) return x.number > 0;
    if (x.number != y.number) return x.number < y.number;
    return x.call.priority > y.call.priority;
  }
  void enqueue(TablePart& p) {
    Link& l = link(p.shard);
    l.since_tick += in_lines(payload_of(p, *p.op));
    l.queue.insert(std::upper_bound(l.queue.begin(), l.queue.end(), &p, goes_before), &p);
  }
  /// The first part of a push is being sent.
  void begin(TableOp& op) {
    op.number = ++pushed_;
    std::size_t pushes = 0;
    for (const TablePart& p : op.parts) {
      if (!p.is_push) continue;
      ++pushes;
      auto& queue = link(p.shard).queue;
      if (const auto found = std::find(queue.begin(), queue.end(), &p); found != queue.end()) {  // it comes before what has not begun
        queue.erase(found);
        queue.insert(std::upper_bound(queue.begin(), queue.end(), &p, goes_before), const_cast<TablePart*>(&p));
      }
    }
    unsettled_.push_back({op.number, op.parts[0].clock, pushes, pushes > 1});
  }
  /// Sends what there is credit for.
  void pump(Link& l) {
    if (std::exchange(l.pumping, true)) return;  // what is sent to this rank itself comes back here at once
    while (!l.queue.empty() && !l.lost) {
      TablePart& p = *l.queue.front();
      const std::size_t bytes = payload_of(p, *p.op), room = in_lines(bytes);
      if (l.used + room > table_.credits() || l.under_way_bytes >= most_under_way || (p.op->number == 0 && pushed_ - committed_ >= Shard::most_pushes)) break;
      if (p.op->number == 0) begin(*p.op);
      l.queue.erase(std::find(l.queue.begin(), l.queue.end(), &p));
      l.used += room;
      l.under_way_bytes += bytes;
      l.under_way.push_back(&p);
      p.sequence = ++l.sequence;
      p.sent = true;
      l.held.push_back({p.sequence, room, -1});
      send_push(p);
    }
    while (!l.pulls.empty()) {
      TablePart& p = *l.pulls.front();
      if (!l.lost && std::any_of(l.queue.begin(), l.queue.end(), [&](const TablePart* push) { return push->op->call_number < p.op->call_number; })) break;
      l.pulls.pop_front();
      p.sequence = std::min(l.sequence, l.last_to_count);
      send_pull(p);
    }
    l.pumping = false;
  }
  /// Where `bytes` may be stored in the window, which is used from its begin to its end and again from its begin; -1: nowhere just now.
  std::ptrdiff_t place_in(const Link& l, std::size_t bytes) const {
    const auto oldest = std::find_if(l.held.begin(), l.held.end(), [](const auto& h) { return h.place >= 0; });
    if (!l.window) return -1;
    if (oldest == l.held.end()) return 0;
    const std::size_t at = l.at, from = static_cast<std::size_t>(oldest->place);
    if (from < at && at + bytes <= table_.window_bytes()) return static_cast<std::ptrdiff_t>(at);
    if (from < at) return bytes <= from ? 0 : -1;
    return at + bytes <= from ? static_cast<std::ptrdiff_t>(at) : -1;
  }
  /// Where the server finds it.
  void store_push(Link& l, const TablePart& p, Envelope& e, std::span<const std::span<const std::byte>> pieces, std::size_t place) {
    e.flags |= Envelope::is_direct;
    e.index = place;
    events_.copying(*p.op);
    std::byte* to = l.window + place;
    for (const auto& piece : pieces) copy(to, piece.data(), piece.size()), to += piece.size();
    events_.copied(*p.op, e.bytes, 0);
    l.at = place + in_lines(e.bytes);
  }
  /// Where all that is touched in a step, what each worker pushes and pulls, windows and values, is more than the caches hold (measured with 2 workers).
  static std::size_t past_caches(const Table& table) {
    std::size_t touched = 0;
    for (const TensorSpec& t : table.tensors)
      if (!t.is_sparse()) touched += t.count * table.rule.grain * (2 * table.regulars() + 3);
    return touched > last_level_cache_bytes() / 4 ? std::size_t{128} << 10 : ~std::size_t{0};
  }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) const {
    if (bytes >= past_caches_) copy_past_caches(to, from, bytes);
    else if (bytes > 0) std::memcpy(to, from, bytes);
  }
  /// Of a reply that says where the pieces lie.
  void load(TablePart& p, Rank peer, const Envelope& e, const Payload& places) {
    const auto shared = host_.shared_of(peer);
    events_.copying(*p.op);
    std::byte* const to = place(p);
    std::size_t i = 0;
    bool whole = e.bytes == p.count * unit(*p.op);
    whole = whole && each_piece(e, table_.options.block_bytes, [&](std::size_t begin, std::size_t bytes) {
      if (!whole || (++i) * sizeof(std::uint64_t) > places.size()) return void(whole = false);
      const auto at = detail::load<std::uint64_t>(places.data() + (i - 1) * sizeof(std::uint64_t));
      if (at > shared.size() || bytes > shared.size() - at) return void(whole = false);
      copy(to + begin, shared.data() + at, bytes);
    }) && whole;
    events_.copied(*p.op, 0, e.bytes);
    if (!whole) throw Error(Errc::protocol, {"rank ", peer, " says that values lie where it shares none"}, {host_.rank(), peer, 0, {}});
    release(peer, e);
  }
  void release(Rank peer, const Envelope& e) {
    Envelope done;
    done.kind = MessageKind::release;
    done.shard = e.shard;
    done.request = e.request;
    host_.send(peer, done);
  }
  void send_push(const TablePart& p) {
    const_cast<TablePart&>(p).sent_at = host_.now();
    const TableOp& op = *p.op;
    Envelope e = envelope(p, MessageKind::push);
    e.parts = static_cast<std::uint16_t>(std::count_if(op.parts.begin(), op.parts.end(), [](const TablePart& each) { return each.is_push; }));
    e.bytes = payload_of(p, op);
    const bool rows = is_sparse(op);
    if (rows) e.flags |= Envelope::is_rows;
    if (op.call.in && op.call.out) e.flags |= Envelope::stays;
    const std::span<const std::byte> both[] = {rows ? keys_of(p) : std::span<const std::byte>{}, {source(p), p.count * unit(op)}};
    const std::span<const std::span<const std::byte>> pieces = std::span(both).subspan(rows ? 0 : 1);
    Link& l = link(p.shard);
    Post::Parcel& parcel = host_.parcel(l.server);
    parcel.op = p.op;
    const bool again = l.held.empty() || l.held.back().sequence != p.sequence;
    const std::ptrdiff_t place = again ? -1 : place_in(l, in_lines(e.bytes));
    if (place < 0) return host_.send(parcel, e, pieces, nullptr);
    l.held.back().place = place;
    store_push(l, p, e, pieces, static_cast<std::size_t>(place));
    host_.send(parcel, e, {}, nullptr);
  }
  void send_pull(TablePart& p) {
    if (link(p.shard).lost) return fail(*p.op, std::make_exception_ptr(lost_error(p.shard, *p.op)));
    p.sent = true;
    p.sent_at = host_.now();
    Envelope e = envelope(p, MessageKind::pull);
    e.parts = static_cast<std::uint16_t>(std::clamp(p.op->call.priority, -32768, 32767) + 32768);
    Post::Parcel& parcel = host_.parcel(link(p.shard).server);
    parcel.op = p.op;
    if (!is_sparse(*p.op)) return host_.send(parcel, e, {}, nullptr);
    const std::span<const std::byte> keys = keys_of(p);
    e.bytes = keys.size();
    host_.send(parcel, e, std::span(&keys, 1), nullptr);
  }
  void send_again(TablePart& p) {
    if (asks(*p.op)) {
      p.sent = true;
      p.sent_at = host_.now();
      return host_.send(link(p.shard).server, p.op->asked, std::as_bytes(std::span(p.op->rows_in)));
    }
    if (p.op->call.what == Collective::leave) {
      p.sent = true;
      p.sent_at = host_.now();
      Envelope e = envelope(p, MessageKind::leave);
      e.number = committed_;
      return host_.send(link(p.shard).server, e);
    }
    if (p.is_push) send_push(p);
    else send_pull(p);
  }
  void send_all_again(int shard) {
    tell_all(shard);
    for (TableOp* op : std::vector<TableOp*>(slots_))
      for (std::size_t i = 0; op && !op->done && i < op->parts.size(); ++i)
        if (TablePart& p = op->parts[i]; p.shard == shard && p.sent && !p.done) p.receiving = false, send_again(p);
  }

  void acknowledged(Link& l, const Envelope& e) {
    if (e.sequence == 0) {  // a goodbye
      TablePart* const p = find(e);
      if (p && !p->done && p->op->call.what == Collective::leave) finish(*p);
      return;
    }
    const auto found = std::find_if(l.under_way.begin(), l.under_way.end(), [&](const TablePart* p) { return p->sequence == e.sequence; });
    if (found == l.under_way.end()) return;  // said twice
    TablePart& p = **found;
    l.under_way.erase(found);
    l.under_way_bytes -= payload_of(p, *p.op);
    for (Unsettled& u : unsettled_)
      if (u.number == p.op->number && --u.missing == 0 && u.several && unsettled_.front().number != u.number) newly_complete_ = u.number;
    if (host_.rank() == l.server) events_.heard_here(*p.op, nullptr);
    finish(p);
    settle();
  }
  /// Tells of pushes that are at all their shards, and of clocks behind which nothing is missing.
  void settle() {
    std::uint64_t complete = std::exchange(newly_complete_, 0);  // though one before it is not
    bool several = complete > 0;
    while (!unsettled_.empty() && unsettled_.front().missing == 0) {
      committed_ = unsettled_.front().number;
      several = several || unsettled_.front().several;
      unsettled_.pop_front();
    }
    bool ticked = false;
    for (; !ticks_.empty() && !misses_before(ticks_.front()); ticks_.pop_front(), ticked = true) {
      told_.clock = ticks_.front();
      for (Link& l : links_) l.told_after = l.sequence;  // all before it, and perhaps some that were sent since
    }
    if (ticked || (several && !table_.options.fold.waits())) {
      told_.number = committed_;
      told_at_ = host_.now();
      for (int s = 0; s < table_.shards(); ++s)
        if (!link(s).lost) tell(s, complete > committed_ ? complete : 0);
    }
    for (Link& l : links_) pump(l);
  }
  /// A push of a clock below this is not at all its shards.
  bool misses_before(std::uint64_t clock) const {
    return std::any_of(unsettled_.begin(), unsettled_.end(), [&](const Unsettled& u) { return u.clock < clock && u.missing > 0; }) ||
           std::any_of(links_.begin(), links_.end(), [&](const Link& l) { return !l.queue.empty() && l.queue.front()->clock < clock; });
  }
  /// Of a server that may know nothing of it yet.
  void tell_all(int shard) {
    tell(shard, 0);
    for (const Unsettled& u : unsettled_)
      if (u.several && u.missing == 0) tell(shard, u.number);
  }
  void tell(int shard, std::uint64_t complete) {
    Envelope e;
    e.first = complete;
    e.kind = MessageKind::advance;
    e.shard = static_cast<std::uint16_t>(shard);
    e.worker = me_;
    e.clock = told_.clock;  // what a server knows already it ignores
    e.number = told_.number;
    e.sequence = link(shard).told_after;
    host_.send(link(shard).server, e);
  }
  TablePart* find(const Envelope& e) const {
    TableOp* const op = op_of(e.request);
    if (!op || op->failing) return nullptr;
    for (TablePart& p : op->parts)
      if (p.shard == e.shard && !p.done && (e.kind == MessageKind::refusal || p.is_push == (e.kind == MessageKind::acknowledge && e.sequence != 0)) && (e.kind != MessageKind::reply || p.first == e.first)) return &p;
    return nullptr;
  }
  void finish(TablePart& p) {
    p.done = true;
    if (--p.op->remaining == 0) end(*p.op);
  }
  void end(TableOp& op) {
    if (op.done) return;
    if (op.version == ~std::uint64_t{0}) op.version = 0;  // nothing was pulled
    if (!op.error && !op.order.empty() && op.call.out) {
      const std::size_t row = unit(op);
      for (std::size_t i = 0; i < op.order.size(); ++i) std::memcpy(op.call.out + op.order[i] * row, op.rows_out.data() + i * row, row);
    }
    for (TableOp*& slot : slots_)
      if (slot == &op) slot = nullptr;
    op.done = true;
    events_.finished(op);
  }
  Error lost_error(int shard, const TableOp& op) {
    const Rank server = table_.servers[static_cast<std::size_t>(shard)];
    const std::string why = host_.why_gone(server);
    return Error(Errc::peer_lost, {text_of(op), ": shard ", shard, " is lost: its server, rank ", server, why.empty() ? ", is gone or has ended its table without close()" : concat({": ", why}), table_.options.replicas > 0 ? ", and so is its replica" : ", and it had no replica (TableOptions::replicas)"}, {host_.rank(), server, op.sequence, {}});
  }

  TableHost& host_;
  Events& events_;
  const Table& table_;
  std::int32_t me_;
  const std::size_t past_caches_;  // copies of so much are not looked at before they have left the caches
  std::vector<Link> links_;
  std::vector<TableOp*> slots_;
  std::uint64_t requests_ = 0, calls_ = 0, pushed_ = 0, committed_ = 0, clock_ = 0;
  std::deque<Unsettled> unsettled_;
  std::deque<std::uint64_t> ticks_;  // clocks that are not told yet
  std::uint64_t newly_complete_ = 0;
  Told told_;
  Ticks told_at_ = 0;
  std::optional<Error> pushing_failed_;
};

}  // namespace tally::inline v0::detail
