// SPDX-License-Identifier: Apache-2.0
// One shard of a table: a state machine that is told of pushes, clocks and workers who go, in one order, and does the same on
// every replica that is told of them in that order. It sends nothing and waits for nothing; what came of an entry it leaves in
// `events`. Each push is taken once, those of a worker in the order of their numbers, whatever order or how often they come.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "association.hpp"
#include "rules.hpp"
#include "store.hpp"
#include "table.hpp"

namespace tally::inline v0::detail {

class Shard {
 public:
  /// A worker may have so many pushes under way; and, since some may overtake others, a shard takes those that are so far ahead.
  static constexpr std::size_t most_pushes = 1024, window = 4 * most_pushes;

  /// `rule`: the object that the table's rule functions are called with; outlives this.
  Shard(const Table& table, int index, Pool& pool, const void* rule) : table_(table), index_(index), pool_(pool), members_(table.workers.size()) {
    for (std::size_t w = table.regulars(); w < members_.size(); ++w) members_[w].live = false;
    for (std::size_t t = 0; t < table.tensors.size(); ++t) {
      const TensorSpec& spec = table.tensors[t];
      parts_.emplace_back(table.part(t, index).first);
      Part& part = parts_.back();
      if (spec.is_sparse()) part.rows = std::make_unique<SparsePart>(table.rule, spec.row), part.rows->use(rule);
      else part.values = std::make_unique<DensePart>(pool, table.rule, table.part(t, index).count, table.block_elements()), part.values->use(rule);
    }
  }

  /// What the last entries did, to be taken by whoever told of them.
  struct Events {
    struct Acknowledge {
      std::int32_t worker;
      std::uint64_t sequence, request;
    };
    std::vector<Acknowledge> acknowledge;  // pushes that are kept now, or were already
    std::string refused;                   // why the entry was not
    bool readable = false;                 // some pulls may be ready that were not
    bool freed = false;                    // some workers have more credit
    void clear() { acknowledge.clear(), refused.clear(), readable = freed = false; }
  } events;

  // Entries.

  void push(const Envelope& e, Payload&& payload) {
    Member* const m = member(e.worker);
    if (!m || !m->live) return void(events.refused = "this worker has left");
    if (e.sequence > m->accepted + window || e.sequence == 0) return void(events.refused = concat({"push number ", e.sequence, " where number ", m->accepted + 1, " is next"}));
    if (e.sequence > m->accepted) {
      const std::size_t at = e.sequence - m->accepted - 1;
      if (m->staged.size() <= at) m->staged.resize(at + 1);
      Staged& s = m->staged[at];
      if (!s.here) {
        m->held += in_lines(payload.size());
        s.e = e;
        s.payload = std::move(payload);
        s.here = true;
        accept(*m);
      }
    }
    events.acknowledge.push_back({e.worker, e.sequence, e.request});
  }
  void advance(const Envelope& e) {
    Member* const m = member(e.worker);
    if (!m || !m->live) return;
    if (e.number > m->committed) {
      m->committed = e.number;
      std::erase_if(m->complete, [&](std::uint64_t number) { return number <= e.number; });
    }
    if (e.first > m->committed && std::find(m->complete.begin(), m->complete.end(), e.first) == m->complete.end() && m->complete.size() < window) m->complete.push_back(e.first);
    accept(*m);
    if (e.clock > m->announced) m->announced = e.clock, m->announced_after = e.sequence;
    settle(*m);
  }
  /// A worker comes, for which there was a place. Its clock is what all others have reached, until it tells another one.
  void join(const Envelope& e) {
    make_all();
    Member& m = *member(e.worker);
    m = Member();
    m.incarnation = e.sequence;
    m.clock = m.announced = least_;
  }
  /// A worker goes. Of what it pushed all is in that was at all its shards: up to `number`, and what `complete` lists (eight bytes each); nothing else.
  void remove(const Envelope& e, std::span<const std::byte> complete) {
    Member* const m = member(e.worker);
    if (!m || !m->live) return;
    const auto counts = [&](const Envelope& push) {
      if (push.parts == 1 || push.number <= e.number) return true;
      for (std::size_t at = 0; at + sizeof(std::uint64_t) <= complete.size(); at += sizeof(std::uint64_t))
        if (load<std::uint64_t>(complete.data() + at) == push.number) return true;
      return false;
    };
    std::erase_if(m->contributions, [&](const Contribution& c) { return !counts(c.e); });
    std::erase_if(m->staged, [&](const Staged& s) { return !s.here || !counts(s.e); });
    m->committed = ~std::uint64_t{0};
    accept(*m);
    m->live = false;
    m->clock = std::max(m->clock, e.clock);
    events.readable = events.freed = true;
    update_least();
  }
  /// Pushes of a worker's to several shards that are not known to be at all of them: number and shards of each; and those that are, with
  /// 0 shards. For remove().
  std::vector<std::uint64_t> undecided(std::int32_t worker) const {
    std::vector<std::uint64_t> list;
    const Member* const m = member(worker);
    const auto look = [&](const Envelope& e) {
      if (e.parts > 1 && e.number > m->committed) list.insert(list.end(), {e.number, e.parts});
    };
    for (const Contribution& c : m->contributions) look(c.e);
    for (const Staged& s : m->staged)
      if (s.here) look(s.e);
    for (const std::uint64_t number : m->complete) list.insert(list.end(), {number, 0});
    return list;
  }

  /// Keeps what every push with a clock below this makes, and no other: from now on if that is not over. The last few are kept.
  void cut(const Envelope& e) {
    const auto known = std::find_if(cuts_.begin(), cuts_.end(), [&](const Cut& c) { return c.clock == e.clock; });
    if (e.flags & Envelope::drops) {
      if (known != cuts_.end()) cuts_.erase(known);
      return;
    }
    if (known != cuts_.end()) return;
    if (newest_ > e.clock) return void(events.refused = concat({"the cut at clock ", e.clock, " is not kept any more: shard ", index_, " has a push of clock ", newest_ - 1, " already; ask for a clock that nobody has pushed at yet, such as a worker's next one in lockstep, or one some clocks ahead"}));
    if (cuts_.size() == most_cuts) cuts_.pop_front();
    cuts_.emplace_back().clock = e.clock;
    finish_cuts();
  }
  /// Values as they were, e.g. in a snapshot.
  void set(const Envelope& e, const std::byte* data) {
    make_all();
    Part& part = parts_[e.tensor];
    if (part.rows) {
      const std::size_t bytes = part.rows->row_bytes();
      for (std::size_t i = 0; i < e.count; ++i, data += sizeof(std::uint64_t) + bytes) std::memcpy(part.rows->find_or_add(load<std::uint64_t>(data)), data + sizeof(std::uint64_t), bytes);
    } else if (e.parts == Column::steps) {
      part.values->set_steps(e.first - part.first, e.count, load<std::uint64_t>(data));
    } else {
      part.values->set(e.parts, e.first - part.first, e.count, data);
    }
  }
  /// What was asked for of a cut, and of how much in all.
  Payload fetch(const Envelope& e, std::uint64_t& count, std::uint64_t& all) {
    const Cut& c = *std::find_if(cuts_.begin(), cuts_.end(), [&](const Cut& each) { return each.clock == e.clock; });
    const Part& part = c.parts[e.tensor];
    if (part.rows) {
      all = part.rows->rows();
      count = e.first < all ? std::min(e.count, all - e.first) : 0;
      const std::size_t bytes = part.rows->row_bytes();
      Payload out(pool_, count * (sizeof(std::uint64_t) + bytes));
      for (std::size_t i = 0; i < count; ++i) {
        std::byte* const to = out.data() + i * (sizeof(std::uint64_t) + bytes);
        store(to, part.rows->key(e.first + i));
        std::memcpy(to + sizeof(std::uint64_t), part.rows->row(e.first + i), bytes);
      }
      return out;
    }
    if (e.parts == Column::steps) {
      std::vector<std::uint64_t> numbers;
      part.values->each_step([&](std::size_t first, std::size_t n, std::uint64_t steps) { numbers.insert(numbers.end(), {part.first + first, n, steps}); });
      count = all = numbers.size() / 3;
      Payload out(pool_, numbers.size() * sizeof(std::uint64_t));
      if (!numbers.empty()) std::memcpy(out.data(), numbers.data(), out.size());
      return out;
    }
    count = e.count, all = part.values->count();
    Payload out(pool_, e.count * part.values->column_grain(e.parts));
    part.values->get(e.parts, e.first - part.first, e.count, out.data());
    return out;
  }

  /// What a worker pushed may be kept, but not where it is.
  void own_all(std::int32_t worker) {
    Member* const m = member(worker);
    if (!m) return;
    for (Staged& s : m->staged) s.payload.own(pool_, true);
    for (Contribution& c : m->contributions) c.payload.own(pool_, true);
    for (Postponed& p : postponed_)
      if (p.e.worker == worker) p.payload.own(pool_, true), p.update.pushed = p.payload.data();
  }
  /// Pushes that count, and that are made to the values block by block: when there is time, and before anybody sees them.
  bool has_postponed() const { return !postponed_.empty(); }
  void make_all() {
    while (!postponed_.empty()) make_some();
  }
  void make_some() {
    const Postponed& next = postponed_.front();
    const DensePart& values = *parts_[next.e.tensor].values;
    make(next.e.tensor, ((next.update.first + next.update.made) / values.block() + 1) * values.block());
    drop_made();
  }

  /// Whether it would change nothing: a push that is kept already, or what was said of a clock.
  bool knows(const Envelope& e) const {
    const Member* const m = member(e.worker);
    if (!m || !m->live) return false;
    if (e.kind == MessageKind::push) {
      const std::uint64_t at = e.sequence - m->accepted - 1;
      return e.sequence > 0 && (e.sequence <= m->accepted || (at < m->staged.size() && m->staged[at].here));
    }
    return e.kind == MessageKind::advance && e.clock <= m->announced && e.number <= m->committed && (e.first <= m->committed || std::find(m->complete.begin(), m->complete.end(), e.first) != m->complete.end());
  }

  // What it is.

  int index() const { return index_; }
  /// Every push of a live worker with a clock below this is in.
  std::uint64_t version() const { return least_; }
  bool is_live(std::int32_t worker) const { return member(worker) && member(worker)->live; }
  /// Something that it pushed to clocks that are not folded yet, though it may have left.
  bool has_contributions(std::int32_t worker) const { return !member(worker)->contributions.empty(); }
  std::uint64_t incarnation(std::int32_t worker) const { return member(worker)->incarnation; }
  bool any_live() const {
    return std::any_of(members_.begin(), members_.end(), [](const Member& m) { return m.live; });
  }
  /// Bytes of its pushes, counted as credits are. How soon they are freed is each replica's own business.
  std::size_t held(std::int32_t worker) const { return member(worker)->held; }
  std::uint64_t freed(std::int32_t worker) const { return member(worker)->freed; }
  std::uint64_t clock_of(std::int32_t worker) const { return member(worker)->clock; }
  std::uint64_t committed_of(std::int32_t worker) const { return member(worker)->committed; }
  /// The live worker whose clock is least, -1 if there is none.
  std::int32_t slowest() const {
    std::int32_t found = -1;
    for (std::size_t w = 0; w < members_.size(); ++w)
      if (members_[w].live && (found < 0 || members_[w].clock < members_[static_cast<std::size_t>(found)].clock)) found = static_cast<std::int32_t>(w);
    return found;
  }
  /// Whether a pull may be answered: all own pushes before it are here, and the staleness bound holds.
  bool ready(const Envelope& e) const {
    if (e.flags & Envelope::of_cut) return std::any_of(cuts_.begin(), cuts_.end(), [&](const Cut& c) { return c.clock == e.clock && c.complete; });
    const Member* const m = member(e.worker);
    if (!m) return true;  // a reader
    return m->accepted >= e.sequence && within_bound(e);
  }
  bool within_bound(const Envelope& e) const {
    const Consistency& c = table_.options.consistency;
    return !c.bounded || e.clock <= c.staleness || least_ >= e.clock - c.staleness;
  }

  struct Span {
    const std::byte* data;
    std::size_t bytes;
    Published* published;  // null: the data is in `copy`
  };
  /// f(span) for elements of a vector, block by block, each as soon as all that counts is made to it; whoever keeps it leases it. Where the
  /// puller has pushed what others do not see yet, the spans are of `copy`, and without a lease.
  template <class F>
  void read(const Envelope& e, Payload& copy, F&& f) {
    Part& part = parts_[e.tensor];
    const std::size_t first = e.first - part.first, grain = table_.rule.grain;
    if (const Member* m = member(e.worker); m && has_pending(*m, e.tensor)) {
      DensePart::View view = part.values->copy(first, e.count);
      std::uint64_t clocks = 0, last = ~std::uint64_t{0};  // each is one update
      for (const Contribution& c : m->contributions) {
        if (c.e.tensor != e.tensor) continue;
        clocks += std::exchange(last, c.e.clock) != c.e.clock;
        const std::size_t begin = std::max(c.e.first, e.first), end = std::min(c.e.first + c.e.count, e.first + e.count);
        if (begin < end) part.values->update(view, begin - part.first, end - begin, c.payload.data() + (begin - c.e.first) * grain, {1, c.e.weight, 1}, clocks);
      }
      copy = Payload(pool_, view.values.size());
      if (!view.values.empty()) std::memcpy(copy.data(), view.values.data(), view.values.size());
      std::size_t at = 0;  // cut as the blocks are: the puller expects that
      part.values->read(first, e.count, [&](const std::byte*, std::size_t n, Published*) { f(Span{copy.data() + at, n * grain, nullptr}), at += n * grain; });
      return;
    }
    const std::size_t block = part.values->block();
    for (std::size_t at = first, end = 0; at < first + e.count; at = end) {
      end = std::min((at / block + 1) * block, first + e.count);
      make(e.tensor, end);
      part.values->read(at, end - at, [&](const std::byte* data, std::size_t n, Published* p) { f(Span{data, n * grain, p}); });
    }
    drop_made();
  }
  static void lease(Published* p) { DensePart::lease(p); }
  void let_go(std::size_t tensor, Published* lease) { parts_[tensor].values->let_go(lease); }
  /// Rows by their keys, likewise.
  Payload read_rows(const Envelope& e, const std::byte* keys) {
    const SparsePart& rows = *parts_[e.tensor].rows;
    const std::size_t bytes = table_.tensors[e.tensor].row * table_.rule.grain;
    Payload out(pool_, e.count * bytes);
    rows.read(keys, e.count, out.data());
    if (const Member* m = member(e.worker); m && has_pending(*m, e.tensor)) {
      std::vector<std::byte> row(rows.row_bytes());
      for (std::size_t i = 0; i < e.count; ++i) {
        const auto key = load<std::uint64_t>(keys + i * sizeof(std::uint64_t));
        rows.copy_row(key, row.data());
        for (const Contribution& c : m->contributions)
          for (std::size_t k = 0; c.e.tensor == e.tensor && k < c.e.count; ++k)
            if (load<std::uint64_t>(c.payload.data() + k * sizeof(std::uint64_t)) == key) rows.apply(row.data(), c.payload.data() + c.e.count * sizeof(std::uint64_t) + k * bytes, {1, c.e.weight, 1});
        std::memcpy(out.data() + i * bytes, row.data(), bytes);
      }
    }
    return out;
  }
  /// What is wrong with a message of a peer's about this shard, empty if nothing: nothing of it is trusted.
  std::string problem_with(const Envelope& e) const {
    if (e.tensor >= table_.tensors.size()) return concat({"there is no tensor number ", e.tensor, "; there are ", table_.tensors.size()});
    const TensorSpec& t = table_.tensors[e.tensor];
    if (!(e.weight >= 0)) return "a weight is not a positive number";
    const std::size_t grain = table_.rule.grain;
    if (e.kind == MessageKind::push && (e.flags & (Envelope::of_cut | Envelope::is_cut | Envelope::drops)) != 0) return "a push of no kind that there is";
    if (e.flags & Envelope::of_cut || e.kind == MessageKind::set) return problem_past_the_rule(e, t);
    if (t.is_sparse()) {
      const std::size_t row = sizeof(std::uint64_t) + (e.kind == MessageKind::push ? t.row * grain : 0);
      if (e.count > e.bytes || e.bytes != e.count * row) return concat({"'", t.name, "': ", e.bytes, " bytes are not ", e.count, " keys", e.kind == MessageKind::push ? " with rows" : ""});
      if (e.kind == MessageKind::pull && e.count > most_pulled / (t.row * grain)) return concat({"'", t.name, "': ", e.count, " rows are more than ", most_pulled, " bytes: pull fewer at once"});
      return {};
    }
    const Range mine = table_.part(e.tensor, index_);
    if (e.first < mine.first || e.count > mine.count || e.first - mine.first > mine.count - e.count)
      return concat({"'", t.name, "': elements ", e.first, " to ", e.first + e.count, " are not within ", mine.first, " to ", mine.first + mine.count, ", which shard ", index_, " has"});
    if (e.bytes != (e.kind == MessageKind::push ? e.count * grain : 0)) return concat({"'", t.name, "': ", e.bytes, " bytes are not ", e.count, " elements of ", grain});
    return {};
  }
  /// Likewise, of keys.
  std::string problem_with_keys(const Envelope& e, const std::byte* keys, std::size_t stride = sizeof(std::uint64_t)) const {
    const TensorSpec& t = table_.tensors[e.tensor];
    for (std::size_t i = 0; i < e.count; ++i) {
      const auto key = load<std::uint64_t>(keys + i * stride);
      if (key < t.first_key || key > t.last_key || table_.shard_of(t, key) != index_) return concat({"'", t.name, "': key ", key, " is not one of shard ", index_, "; the tensor's are ", t.first_key, " to ", t.last_key});
    }
    return {};
  }

  std::size_t row_bytes(std::size_t tensor) const { return parts_[tensor].rows->row_bytes(); }

 private:
  static constexpr std::size_t most_cuts = 4;
  static constexpr std::size_t most_fetched = std::size_t{64} << 20;  // bytes at once
  static constexpr std::size_t most_pulled = std::size_t{1} << 30;   // of rows
  std::string problem_past_the_rule(const Envelope& e, const TensorSpec& t) const {
    const bool sets = e.kind == MessageKind::set;
    if (!sets && !std::any_of(cuts_.begin(), cuts_.end(), [&](const Cut& c) { return c.clock == e.clock; })) return concat({"there is no cut at clock ", e.clock, " any more"});
    if (t.is_sparse()) {
      const std::size_t row = sizeof(std::uint64_t) + parts_[e.tensor].rows->row_bytes();
      if (e.parts != Column::rows || e.count > most_fetched / row || e.bytes != (sets ? e.count * row : 0)) return concat({"'", t.name, "': ", e.count, " rows in ", e.bytes, " bytes"});
      return {};
    }
    const Range mine = table_.part(e.tensor, index_);
    if (e.parts == Column::steps && !sets) return {};
    if (e.first < mine.first || e.count > mine.count || e.first - mine.first > mine.count - e.count) return concat({"'", t.name, "': elements ", e.first, " to ", e.first + e.count, " are not shard ", index_, "'s"});
    if (e.parts == Column::steps) return e.bytes == sizeof(std::uint64_t) ? "" : "a number of updates has eight bytes";
    if (e.parts >= parts_[e.tensor].values->columns()) return concat({"'", t.name, "' has no state number ", e.parts});
    const std::size_t column = parts_[e.tensor].values->column_grain(e.parts);
    if (e.count > most_fetched / column || e.bytes != (sets ? e.count * column : 0)) return concat({"'", t.name, "': ", e.count, " elements in ", e.bytes, " bytes"});
    return {};
  }
  struct Staged {
    Envelope e;
    Payload payload;
    bool here = false;
  };
  struct Contribution {
    Envelope e;
    Payload payload;
  };
  struct Postponed {
    Envelope e;
    Payload payload;
    DensePart::Deferred update;
  };
  struct Member {
    bool live = true;
    std::uint64_t incarnation = 0;  // of those that have been this worker
    std::uint64_t clock = 0, announced = 0, announced_after = 0;
    std::uint64_t accepted = 0;   // pushes up to this number are in, or contributions
    std::uint64_t committed = 0;  // all its pushes up to this one, to whatever shards, are where they belong,
    std::vector<std::uint64_t> complete;  // and so are these behind it
    std::uint64_t freed = 0;      // of these, those whose payload is held no longer
    std::size_t held = 0;         // bytes of payloads that are
    std::deque<Staged> staged;    // those behind it, as far as they are here
    std::deque<Contribution> contributions;  // to clocks that are not folded yet
  };
  struct Part {
    explicit Part(std::size_t f) : first(f) {}
    std::size_t first;
    std::unique_ptr<DensePart> values;  // one of both
    std::unique_ptr<SparsePart> rows;
    std::map<int, Association> associations;  // by how many workers contribute
  };

  /// What the table is at a clock.
  struct Cut {
    std::uint64_t clock = 0;
    bool apart = false;     // it has parts of its own
    bool complete = false;
    std::vector<Part> parts;
  };
  void set_apart(Cut& c) {
    if (std::exchange(c.apart, true)) return;
    make_all();
    for (const Part& part : parts_) {
      Part& twin = c.parts.emplace_back(part.first);
      if (part.rows) twin.rows = part.rows->clone();
      else twin.values = part.values->clone();
    }
  }
  /// Those behind whose clock nothing is missing.
  void finish_cuts() {
    for (Cut& c : cuts_)
      if (!c.complete && c.clock <= least_) set_apart(c), c.complete = true, events.readable = true;
  }

  Member* member(std::int32_t worker) { return worker >= 0 && static_cast<std::size_t>(worker) < members_.size() ? &members_[static_cast<std::size_t>(worker)] : nullptr; }
  const Member* member(std::int32_t worker) const { return const_cast<Shard*>(this)->member(worker); }
  bool waits() const { return table_.options.fold.waits(); }

  /// Takes what has become possible to take. A push to several shards counts when it is at all of them, so that it is in everywhere or
  /// nowhere if its worker dies; one that waits for its clock's end is kept until then in any case.
  void accept(Member& m) {
    while (!m.staged.empty() && m.staged.front().here) {
      Staged& s = m.staged.front();
      if (!waits() && s.e.parts > 1 && s.e.number > m.committed && std::find(m.complete.begin(), m.complete.end(), s.e.number) == m.complete.end()) break;
      if (waits()) {
        if (const double weight = s.e.weight; table_.rule.weigh) {
          s.payload.own(pool_, true);
          const std::size_t keys = table_.tensors[s.e.tensor].is_sparse() ? s.e.count * sizeof(std::uint64_t) : 0;
          table_.rule.weigh(&weight, s.payload.data() + keys, s.payload.data() + keys, s.payload.size() - keys);
        }
        s.payload.own(pool_);
        s.e.clock = std::max(s.e.clock, m.contributions.empty() ? m.clock : m.contributions.back().e.clock);
        m.contributions.push_back({s.e, std::move(s.payload)});
      } else {
        ++updates_;
        if (!postpone(s)) {
          apply(s.e, s.payload.data(), {1, s.e.weight, 1});
          free(m, s.e, s.payload);
        }
      }
      m.staged.pop_front();
      ++m.accepted;
      events.readable = true;
    }
    for (Staged& s : m.staged) s.payload.own(pool_);  // it stays
    settle(m);
  }
  void free(Member& m, const Envelope& e, const Payload& payload) {
    m.freed = e.sequence;
    m.held -= in_lines(payload.size());
    events.freed = true;
  }
  void settle(Member& m) {
    if (m.clock >= m.announced || m.accepted < m.announced_after) return;
    m.clock = m.announced;
    events.readable = true;
    update_least();
  }
  void update_least() {
    const std::int32_t slowest_live = slowest();
    std::uint64_t least = least_;
    if (slowest_live >= 0) least = member(slowest_live)->clock;
    else for (const Member& m : members_) least = std::max(least, m.clock);  // nothing more comes
    if (least <= least_) return;
    if (waits()) fold_below(least);
    least_ = least;
    finish_cuts();
  }
  /// Long ones that may be kept. What several workers push at about the same time then passes through the caches once.
  bool postpone(Staged& s) {
    const bool is_long = !parts_[s.e.tensor].rows && s.payload.size() >= table_.options.block_bytes;
    if (!is_long || !cuts_.empty()) return make_all(), false;
    s.payload.own(pool_);
    newest_ = std::max(newest_, s.e.clock + 1);
    Part& part = parts_[s.e.tensor];
    DensePart::Deferred update = part.values->defer(s.e.first - part.first, s.e.count, s.payload.data(), {1, s.e.weight, 1}, updates_);
    postponed_.push_back({s.e, std::move(s.payload), std::move(update)});
    return true;
  }
  /// All of them to the elements of a tensor before `end`, in their order, where those before that are made.
  void make(std::size_t tensor, std::size_t end) {
    for (Postponed& p : postponed_)
      while (p.e.tensor == tensor && !p.update.is_made() && p.update.first + p.update.made < end) parts_[tensor].values->make_some(p.update, end);
  }
  void drop_made() {
    for (; !postponed_.empty() && postponed_.front().update.is_made(); postponed_.pop_front()) free(*member(postponed_.front().e.worker), postponed_.front().e, postponed_.front().payload);
  }
  void apply(const Envelope& e, const std::byte* data, const Update& how) {
    newest_ = std::max(newest_, e.clock + 1);
    for (Cut& c : cuts_) {
      if (c.complete) continue;
      if (e.clock >= c.clock) set_apart(c);
      else if (c.apart) apply_to(c.parts[e.tensor], e, data, how);
    }
    apply_to(parts_[e.tensor], e, data, how);
  }
  void apply_to(Part& part, const Envelope& e, const std::byte* data, const Update& how) {
    if (part.rows) part.rows->update(data, e.count, data + e.count * sizeof(std::uint64_t), how);
    else part.values->update(e.first - part.first, e.count, data, how, updates_);
  }
  static bool has_pending(const Member& m, std::size_t tensor) {
    return std::any_of(m.contributions.begin(), m.contributions.end(), [&](const Contribution& c) { return c.e.tensor == tensor; });
  }

  // Folding whole clocks.

  void fold_below(std::uint64_t clock) {
    for (;;) {
      std::uint64_t next = clock;
      for (const Member& m : members_)
        if (!m.contributions.empty()) next = std::min(next, m.contributions.front().e.clock);
      if (next >= clock) return;
      newest_ = next + 1;
      for (Cut& c : cuts_)
        if (!c.complete && next >= c.clock) set_apart(c);
      ++updates_;
      for (std::size_t t = 0; t < parts_.size(); ++t) parts_[t].rows ? fold_rows(t, next) : fold_values(t, next);
      for (Member& m : members_)
        while (!m.contributions.empty() && m.contributions.front().e.clock == next) {
          free(m, m.contributions.front().e, m.contributions.front().payload);
          m.contributions.pop_front();
        }
    }
  }
  /// f(worker, contribution) for those to a tensor in this clock, in the order of workers and then of pushes.
  template <class F>
  void each_of(std::size_t tensor, std::uint64_t clock, F&& f) {
    for (std::size_t w = 0; w < members_.size(); ++w)
      for (const Contribution& c : members_[w].contributions) {
        if (c.e.clock != clock) break;
        if (c.e.tensor == tensor) f(w, c);
      }
  }
  void fold_values(std::size_t tensor, std::uint64_t clock) {
    const std::size_t grain = table_.rule.grain;
    Part& part = parts_[tensor];
    // Between two of these, all elements are pushed by the same workers.
    bounds_.clear();
    each_of(tensor, clock, [&](std::size_t, const Contribution& c) { bounds_.push_back(c.e.first), bounds_.push_back(c.e.first + c.e.count); });
    std::sort(bounds_.begin(), bounds_.end());
    for (std::size_t i = 1; i < bounds_.size(); ++i) {
      const std::size_t first = bounds_[i - 1], count = bounds_[i] - first;
      if (count == 0) continue;
      sources_.clear();
      double weight = 0;
      std::size_t last = members_.size();
      own_sums_.clear();
      each_of(tensor, clock, [&](std::size_t w, const Contribution& c) {
        if (c.e.first > first || c.e.first + c.e.count < first + count) return;
        const std::byte* const data = c.payload.data() + (first - c.e.first) * grain;
        weight += static_cast<double>(c.e.weight);
        if (w != std::exchange(last, w)) return void(sources_.push_back(data));
        Payload sum(pool_, count * grain);  // several of one worker are one
        table_.rule.combine(sum.data(), sources_.back(), data, count * grain);
        sources_.back() = sum.data();
        own_sums_.push_back(std::move(sum));
      });
      if (sources_.empty()) continue;
      const int n = static_cast<int>(sources_.size());
      const Update how{1, weight, n};
      auto known = part.associations.find(n);
      if (known == part.associations.end()) known = part.associations.try_emplace(n, table_.options.fold.algorithm(), n, table_.tensors[tensor].count, table_.group).first;
      for (const Association::Stretch& s : known->second.stretches()) {
        const std::size_t begin = std::max(s.first, first), end = std::min(s.first + s.count, first + count);
        for (std::size_t at = begin; at < end;) {
          const std::size_t now = std::min(std::max<std::size_t>(slice_bytes / grain, 1), end - at);
          at_.clear();
          for (const std::byte* source : sources_) at_.push_back(source + (at - first) * grain);
          const std::byte* folded = at_[0];
          if (n > 1) {
            folded_.resize(std::max(folded_.size(), now * grain));
            known->second.fold(s, folded_.data(), at_.data(), now * grain, grain, table_.rule.combine, scratch_);
            folded = folded_.data();
          }
          part.values->update(at - part.first, now, folded, how, updates_);
          at += now;
        }
      }
    }
  }
  void fold_rows(std::size_t tensor, std::uint64_t clock) {
    const std::size_t row = table_.tensors[tensor].row * table_.rule.grain;
    merged_.clear();
    merged_rows_.clear();
    merged_by_.clear();
    each_of(tensor, clock, [&](std::size_t w, const Contribution& c) {
      const std::byte* const keys = c.payload.data();
      const std::byte* const values = keys + c.e.count * sizeof(std::uint64_t);
      for (std::size_t i = 0; i < c.e.count; ++i) {
        const auto [at, fresh] = merged_.add(load<std::uint64_t>(keys + i * sizeof(std::uint64_t)));
        if (fresh) {
          merged_rows_.resize(merged_rows_.size() + row);
          std::memcpy(merged_rows_.data() + at * row, values + i * row, row);
          merged_by_.push_back({1, static_cast<double>(c.e.weight), w});
          continue;
        }
        table_.rule.combine(merged_rows_.data() + at * row, merged_rows_.data() + at * row, values + i * row, row);
        Merged& by = merged_by_[at];
        by.weight += static_cast<double>(c.e.weight);
        by.workers += by.last != w;
        by.last = w;
      }
    });
    SparsePart& rows = *parts_[tensor].rows;
    for (std::size_t i = 0; i < merged_.size(); ++i) rows.apply(rows.find_or_add(merged_.key(i)), merged_rows_.data() + i * row, {1, merged_by_[i].weight, merged_by_[i].workers});
  }

  static constexpr std::size_t slice_bytes = 64 << 10;
  const Table& table_;
  int index_;
  Pool& pool_;
  std::vector<Part> parts_;
  std::vector<Member> members_;
  std::deque<Postponed> postponed_;
  std::deque<Cut> cuts_;
  std::uint64_t least_ = 0;
  std::uint64_t newest_ = 0;   // the clock beyond that of the newest push that was applied
  std::uint64_t updates_ = 0;  // pushes or clocks that were applied
  // Kept so that nothing is allocated.
  std::vector<std::size_t> bounds_;
  std::vector<const std::byte*> sources_, at_;
  std::vector<Payload> own_sums_;
  std::vector<std::byte> folded_, scratch_, merged_rows_;
  KeyIndex merged_;
  struct Merged {
    int workers;
    double weight;
    std::size_t last;
  };
  std::vector<Merged> merged_by_;
};

}  // namespace tally::inline v0::detail
