// SPDX-License-Identifier: Apache-2.0
// Where a shard's values lie. Vectors are kept in blocks; a block that somebody still reads is never written: an update then goes to
// a new one, and the old one is given back with its last lease. Rows are found by key in a hash table that only grows. Memory that
// is given back is used again.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "rules.hpp"

namespace tally::inline v0::detail {

/// Memory in sizes of powers of two, aligned to lines: of an arena that other ranks can load, as long as there is any left.
class Pool {
 public:
  explicit Pool(std::span<std::byte> arena = {}) : arena_(arena) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (auto& list : free_)
      for (std::byte* memory : list)
        if (!is_shared(memory)) ::operator delete(memory, std::align_val_t{64});
  }
  bool is_shared(const std::byte* memory) const { return memory >= arena_.data() && memory < arena_.data() + arena_.size(); }
  std::size_t place_of(const std::byte* memory) const { return static_cast<std::size_t>(memory - arena_.data()); }
  std::byte* take(std::size_t bytes) {
    auto& list = free_[size_class(bytes)];
    if (!list.empty()) {
      std::byte* const memory = list.back();
      list.pop_back();
      return memory;
    }
    const std::size_t size = std::size_t{1} << size_class(bytes);
    if (size <= arena_.size() - taken_) return arena_.data() + std::exchange(taken_, taken_ + size);
    void* const memory = ::operator new(size, std::align_val_t{64}, std::nothrow);
    if (!memory) throw Error(Errc::no_resources, {"a parameter server has no memory for ", bytes, " bytes"});
    return static_cast<std::byte*>(memory);
  }
  void give_back(std::byte* memory, std::size_t bytes) {
    free_[size_class(bytes)].push_back(memory);
  }

 private:
  static std::size_t size_class(std::size_t bytes) { return bytes <= 64 ? 6 : static_cast<std::size_t>(std::bit_width(bytes - 1)); }
  std::span<std::byte> arena_;
  std::size_t taken_ = 0;  // of it
  std::vector<std::byte*> free_[65];
};

/// Some of it, or somebody else's.
class Payload {
 public:
  Payload() = default;
  Payload(Pool& pool, std::size_t bytes) : pool_(&pool), data_(bytes > 0 ? pool.take(bytes) : nullptr), bytes_(bytes) {}
  /// For as long as the call that it is passed to lasts; or, if it `stays`, until whoever keeps it says that it is done with it.
  static Payload borrowed(const std::byte* data, std::size_t bytes, bool stays = false) {
    Payload p;
    p.data_ = const_cast<std::byte*>(data);
    p.bytes_ = bytes;
    p.stays_ = stays;
    return p;
  }
  Payload(Payload&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), stays_(std::exchange(other.stays_, false)) {}
  Payload& operator=(Payload&& other) noexcept {
    std::swap(pool_, other.pool_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_), std::swap(stays_, other.stays_);
    return *this;
  }
  ~Payload() {
    if (pool_ && data_) pool_->give_back(data_, bytes_);
  }
  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  bool owned() const { return pool_ || bytes_ == 0; }
  /// It may be kept: else the same bytes in memory of the pool's. `even_if_it_stays`: no more.
  void own(Pool& pool, bool even_if_it_stays = false) {
    if (owned() || (stays_ && !even_if_it_stays)) return;
    Payload copy(pool, bytes_);
    std::memcpy(copy.data_, data_, bytes_);
    *this = std::move(copy);
  }

 private:
  Pool* pool_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  bool stays_ = false;
};

/// A block's values as they were published; whoever reads them later holds a lease.
struct Published {
  std::byte* data = nullptr;
  int leases = 0;
  bool current = true;
};

/// A shard's part of a vector.
class DensePart {
 public:
  DensePart(Pool& pool, const RuleOps& rule, std::size_t count, std::size_t block) : pool_(pool), rule_(rule), count_(count), block_(std::min(block, std::max<std::size_t>(count, 1))), states_(static_cast<std::size_t>(rule.states)) {
    for (std::size_t at = 0; at < count; at += block_) {
      blocks_.push_back(fresh());
      std::memset(blocks_.back()->data, 0, block_ * rule_.grain);
    }
    if (count > 0) runs_.push_back({0, count, 0, 0});
    for (auto& state : states_) state.assign(count * rule.state_grain, std::byte{});
  }
  DensePart(const DensePart&) = delete;
  ~DensePart() {
    for (const auto& p : all_)  // those whose readers never said that they are done, too
      if (p->data) pool_.give_back(p->data, block_ * rule_.grain);
  }
  std::size_t count() const { return count_; }

  /// f(values, elements, published) for each block's share of elements first..first+count-1.
  template <class F>
  void read(std::size_t first, std::size_t count, F&& f) {
    each(first, count, [&](std::size_t b, std::size_t at, std::size_t n, std::size_t) { f(blocks_[b]->data + at * rule_.grain, n, blocks_[b]); });
  }
  static void lease(Published* p) { ++p->leases; }
  void let_go(Published* p) {
    if (--p->leases > 0 || p->current) return;
    pool_.give_back(std::exchange(p->data, nullptr), block_ * rule_.grain);
    spare_.push_back(p);
  }
  /// `number`: the same for all parts of one update.
  void update(std::size_t first, std::size_t count, const std::byte* pushed, const Update& how, std::uint64_t number) {
    count_updates(first, count, number);
    each_run(first, count, [&](std::size_t begin, std::size_t length, std::uint64_t steps) { apply(begin, length, pushed + (begin - first) * rule_.grain, how, steps); });
  }
  /// An update that is made block by block, when there is time for it or somebody wants to see it.
  struct Deferred {
    std::size_t first = 0, count = 0, made = 0;  // elements from the first on
    const std::byte* pushed = nullptr;
    Update how;
    struct Stretch {
      std::size_t end;
      std::uint64_t steps;  // which update this is for the elements up to there
    };
    std::vector<Stretch> stretches;
    bool is_made() const { return made == count; }
  };
  Deferred defer(std::size_t first, std::size_t count, const std::byte* pushed, const Update& how, std::uint64_t number) {
    count_updates(first, count, number);
    Deferred d{first, count, 0, pushed, how, {}};
    each_run(first, count, [&](std::size_t begin, std::size_t length, std::uint64_t steps) { d.stretches.push_back({begin + length, steps}); });
    return d;
  }
  /// The next of its elements, up to `end` at most, or to the end of the block that it is at.
  void make_some(Deferred& d, std::size_t end) {
    const std::size_t begin = d.first + d.made;
    end = std::min({end, d.first + d.count, (begin / block_ + 1) * block_});
    const auto stretch = std::find_if(d.stretches.begin(), d.stretches.end(), [&](const auto& each) { return each.end > begin; });
    end = std::min(end, stretch->end);
    apply(begin, end - begin, d.pushed + d.made * rule_.grain, d.how, stretch->steps);
    d.made = end - d.first;
  }
  std::size_t block() const { return block_; }
  /// The same on a copy: of values, states and steps of elements first..first+count-1, which is `values`.
  struct View {
    std::vector<std::byte> values;
    std::vector<std::vector<std::byte>> states;
    std::size_t first = 0, count = 0;
  };
  View copy(std::size_t first, std::size_t count) {
    View v{std::vector<std::byte>(count * rule_.grain), {}, first, count};
    for (const auto& s : states_) v.states.emplace_back(s.begin() + static_cast<std::ptrdiff_t>(first * rule_.state_grain), s.begin() + static_cast<std::ptrdiff_t>((first + count) * rule_.state_grain));
    std::size_t at = 0;
    read(first, count, [&](const std::byte* data, std::size_t n, Published*) { std::memcpy(v.values.data() + at, data, n * rule_.grain), at += n * rule_.grain; });
    return v;
  }
  /// `more`: updates that it has already had beside the part's own, this one included.
  void update(View& v, std::size_t first, std::size_t count, const std::byte* pushed, Update how, std::uint64_t more) const {
    each_run(first, count, [&](std::size_t begin, std::size_t length, std::uint64_t steps) {
      const std::size_t place = begin - v.first;
      std::byte* states[8] = {};
      for (std::size_t s = 0; s < v.states.size(); ++s) states[s] = v.states[s].data() + place * rule_.state_grain;
      how.step = steps + more;
      rule_.apply(rule_now_, v.values.data() + place * rule_.grain, v.values.data() + place * rule_.grain, pushed + (begin - first) * rule_.grain, states, length, how);
    });
  }
  void use(const void* rule) { rule_now_ = rule; }
  std::unique_ptr<DensePart> clone() {
    auto twin = std::make_unique<DensePart>(pool_, rule_, count_, block_);
    twin->rule_now_ = rule_now_;
    twin->states_ = states_;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      std::memcpy(twin->blocks_[b]->data, blocks_[b]->data, block_ * rule_.grain);
    }
    twin->runs_ = runs_;
    return twin;
  }
  // Past the rule. Columns: the values, then the states.
  std::size_t column_grain(std::size_t column) const { return column == 0 ? rule_.grain : rule_.state_grain; }
  std::size_t columns() const { return 1 + states_.size(); }
  void get(std::size_t column, std::size_t first, std::size_t count, std::byte* to) {
    if (column > 0) return void(std::memcpy(to, states_[column - 1].data() + first * rule_.state_grain, count * rule_.state_grain));
    read(first, count, [&](const std::byte* data, std::size_t n, Published*) { std::memcpy(to, data, n * rule_.grain), to += n * rule_.grain; });
  }
  void set(std::size_t column, std::size_t first, std::size_t count, const std::byte* from) {
    if (column > 0) return void(std::memcpy(states_[column - 1].data() + first * rule_.state_grain, from, count * rule_.state_grain));
    each(first, count, [&](std::size_t b, std::size_t at, std::size_t n, std::size_t done) { std::memcpy(writable(blocks_[b], at, n) + at * rule_.grain, from + done * rule_.grain, n * rule_.grain); });
  }
  /// f(first, count, steps) for each run of elements that have been updated equally often.
  template <class F>
  void each_step(F&& f) const {
    for (const Run& r : runs_) f(r.first, r.count, r.steps);
  }
  void set_steps(std::size_t first, std::size_t count, std::uint64_t steps) {
    cut(first), cut(first + count);
    for (Run& r : runs_)
      if (r.first >= first && r.first < first + count) r.steps = steps;
    join();
  }

 private:
  /// Elements that have been updated equally often. A few where whole tensors are pushed; at most one per place where a push began or ended.
  struct Run {
    std::size_t first, count;
    std::uint64_t steps, last;  // updates, and which the last one was
  };
  std::size_t run_at(std::size_t element) const {
    return static_cast<std::size_t>(std::upper_bound(runs_.begin(), runs_.end(), element, [](std::size_t e, const Run& r) { return e < r.first; }) - runs_.begin()) - 1;
  }
  void cut(std::size_t at) {
    if (at == 0 || at >= count_) return;
    const std::size_t i = run_at(at);
    if (runs_[i].first == at) return;
    Run right = runs_[i];
    right.count -= at - right.first;
    right.first = at;
    runs_[i].count = at - runs_[i].first;
    runs_.insert(runs_.begin() + static_cast<std::ptrdiff_t>(i) + 1, right);
  }
  void join(std::uint64_t number = 0) {
    std::size_t kept = 0;
    for (Run& r : runs_)
      if (r.last != number) r.last = 0;  // which earlier one it was does not matter any more
    for (std::size_t i = 1; i < runs_.size(); ++i)
      if (runs_[i].steps == runs_[kept].steps && runs_[i].last == runs_[kept].last) runs_[kept].count += runs_[i].count;
      else runs_[++kept] = runs_[i];
    if (!runs_.empty()) runs_.resize(kept + 1);
  }
  void count_updates(std::size_t first, std::size_t count, std::uint64_t number) {
    if (count == 0) return;
    cut(first), cut(first + count);
    bool changed = false;
    for (std::size_t i = run_at(first); i < runs_.size() && runs_[i].first < first + count; ++i)
      if (std::exchange(runs_[i].last, number) != number) ++runs_[i].steps, changed = true;
    if (changed && runs_.size() > 1) join(number);
  }
  /// f(first, count, steps) within these elements.
  template <class F>
  void each_run(std::size_t first, std::size_t count, F&& f) const {
    if (count == 0) return;
    for (std::size_t i = run_at(first); i < runs_.size() && runs_[i].first < first + count; ++i) {
      const std::size_t begin = std::max(first, runs_[i].first), end = std::min(first + count, runs_[i].first + runs_[i].count);
      f(begin, end - begin, runs_[i].steps);
    }
  }
  template <class F>
  void each(std::size_t first, std::size_t count, F&& f) const {
    for (std::size_t done = 0; done < count;) {
      const std::size_t b = (first + done) / block_, at = (first + done) % block_, n = std::min(block_ - at, count - done);
      f(b, at, n, done);
      done += n;
    }
  }
  void apply(std::size_t begin, std::size_t length, const std::byte* pushed, Update how, std::uint64_t steps) {
    how.step = steps;
    each(begin, length, [&](std::size_t b, std::size_t at, std::size_t n, std::size_t done) {
      std::byte* states[8] = {};
      for (std::size_t s = 0; s < states_.size(); ++s) states[s] = states_[s].data() + (begin + done) * rule_.state_grain;
      const std::byte* const from = blocks_[b]->data;
      std::byte* const to = writable(blocks_[b], at, n);
      rule_.apply(rule_now_, to + at * rule_.grain, from + at * rule_.grain, pushed + done * rule_.grain, states, n, how);
    });
  }
  Published* fresh() {
    if (spare_.empty()) {
      all_.push_back(std::make_unique<Published>());
      spare_.push_back(all_.back().get());
    }
    Published* const p = spare_.back();
    spare_.pop_back();
    *p = {pool_.take(block_ * rule_.grain), 0, true};
    return p;
  }
  /// Where elements at..at+n-1 of the block may be written; the others are as they were.
  std::byte* writable(Published*& block, std::size_t at, std::size_t n) {
    Published* const before = block;
    if (before->leases == 0) return before->data;
    block = fresh();
    before->current = false;
    std::memcpy(block->data, before->data, at * rule_.grain);
    std::memcpy(block->data + (at + n) * rule_.grain, before->data + (at + n) * rule_.grain, (block_ - at - n) * rule_.grain);
    return block->data;
  }

  Pool& pool_;
  const RuleOps& rule_;
  const void* rule_now_ = nullptr;
  std::size_t count_, block_;
  std::vector<Published*> blocks_;
  std::vector<Run> runs_;  // in order, together all elements
  std::vector<std::vector<std::byte>> states_;
  std::vector<std::unique_ptr<Published>> all_;
  std::vector<Published*> spare_;
};

/// Keys to numbers 0, 1, ... in the order in which they came. Linear probing; never more than half full.
class KeyIndex {
 public:
  static constexpr std::uint32_t none = ~std::uint32_t{0};
  KeyIndex() : slots_(64, none) {}
  std::size_t size() const { return keys_.size(); }
  std::uint64_t key(std::size_t i) const { return keys_[i]; }
  void prefetch(std::uint64_t key) const { __builtin_prefetch(&slots_[home(key)]); }
  std::uint32_t find(std::uint64_t key) const {
    for (std::size_t at = home(key);; at = (at + 1) & (slots_.size() - 1)) {
      const std::uint32_t i = slots_[at];
      if (i == none || keys_[i] == key) return i;
    }
  }
  /// With whether it is new.
  std::pair<std::uint32_t, bool> add(std::uint64_t key) {
    for (std::size_t at = home(key);; at = (at + 1) & (slots_.size() - 1)) {
      const std::uint32_t i = slots_[at];
      if (i != none && keys_[i] == key) return {i, false};
      if (i != none) continue;
      slots_[at] = static_cast<std::uint32_t>(keys_.size());
      keys_.push_back(key);
      if (2 * keys_.size() > slots_.size()) grow();
      return {static_cast<std::uint32_t>(keys_.size() - 1), true};
    }
  }
  void clear() {
    for (const std::uint64_t key : keys_) {
      std::size_t at = home(key);
      while (slots_[at] != none) slots_[at] = none, at = (at + 1) & (slots_.size() - 1);
    }
    keys_.clear();
  }

 private:
  std::size_t home(std::uint64_t key) const { return static_cast<std::size_t>((key * 0x9e3779b97f4a7c15u) >> shift_); }
  [[gnu::noinline]] void grow() {
    slots_.assign(slots_.size() * 2, none);
    --shift_;
    for (std::uint32_t i = 0; i < keys_.size(); ++i) {
      std::size_t at = home(keys_[i]);
      while (slots_[at] != none) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = i;
    }
  }
  std::vector<std::uint32_t> slots_;
  std::vector<std::uint64_t> keys_;
  int shift_ = 58;
};

/// A shard's part of the rows.
class SparsePart {
 public:
  SparsePart(const RuleOps& rule, std::size_t row) : rule_(rule), row_(row), values_(round(row * rule.grain)), states_(round(row * rule.state_grain)), bytes_(values_ + static_cast<std::size_t>(rule.states) * states_ + sizeof(std::uint64_t)) {}
  std::size_t rows() const { return index_.size(); }
  std::uint64_t key(std::size_t i) const { return index_.key(i); }
  void use(const void* rule) { rule_now_ = rule; }
  std::unique_ptr<SparsePart> clone() const {
    auto twin = std::make_unique<SparsePart>(rule_, row_);
    twin->rule_now_ = rule_now_;
    for (std::size_t i = 0; i < rows(); ++i) std::memcpy(twin->find_or_add(key(i)), at(i), bytes_);
    return twin;
  }
  const std::byte* row(std::size_t i) const { return at(i); }

  void update(const std::byte* keys, std::size_t count, const std::byte* pushed, Update how) {
    for (std::size_t i = 0; i < count; ++i) {
      if (i + ahead < count) index_.prefetch(load<std::uint64_t>(keys + (i + ahead) * sizeof(std::uint64_t)));
      std::byte* const memory = find_or_add(load<std::uint64_t>(keys + i * sizeof(std::uint64_t)));
      apply(memory, pushed + i * row_ * rule_.grain, how);
    }
  }
  /// Rows that nobody has pushed are 0.
  void read(const std::byte* keys, std::size_t count, std::byte* to) const {
    const std::size_t bytes = row_ * rule_.grain;
    for (std::size_t i = 0; i < count; ++i, to += bytes) {
      if (i + ahead < count) index_.prefetch(load<std::uint64_t>(keys + (i + ahead) * sizeof(std::uint64_t)));
      const std::uint32_t known = index_.find(load<std::uint64_t>(keys + i * sizeof(std::uint64_t)));
      if (known == KeyIndex::none) std::memset(to, 0, bytes);
      else std::memcpy(to, at(known), bytes);
    }
  }
  /// A row with its states and step as it would be after more updates: values are at its begin.
  std::size_t row_bytes() const { return bytes_; }
  void copy_row(std::uint64_t key, std::byte* to) const {
    if (const std::uint32_t known = index_.find(key); known == KeyIndex::none) std::memset(to, 0, bytes_);
    else std::memcpy(to, at(known), bytes_);
  }
  void apply(std::byte* memory, const std::byte* pushed, Update how) const {
    std::byte* states[8] = {};
    for (int s = 0; s < rule_.states; ++s) states[s] = memory + values_ + static_cast<std::size_t>(s) * states_;
    how.step = load<std::uint64_t>(memory + bytes_ - sizeof(std::uint64_t)) + 1;
    store(memory + bytes_ - sizeof(std::uint64_t), how.step);
    rule_.apply(rule_now_, memory, memory, pushed, states, row_, how);
  }
  std::byte* find_or_add(std::uint64_t key) {
    const auto [i, fresh] = index_.add(key);
    if (fresh && i % per_slab == 0) {
      slabs_.emplace_back(static_cast<std::byte*>(::operator new(per_slab * bytes_, std::align_val_t{64})));
      std::memset(slabs_.back().get(), 0, per_slab * bytes_);
    }
    return at(i);
  }

 private:
  static constexpr std::size_t per_slab = 1024, ahead = 12;
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  static std::size_t round(std::size_t bytes) { return (bytes + 7) / 8 * 8; }
  std::byte* at(std::size_t i) const { return slabs_[i / per_slab].get() + i % per_slab * bytes_; }

  const RuleOps& rule_;
  const void* rule_now_ = nullptr;
  std::size_t row_, values_, states_, bytes_;
  KeyIndex index_;
  std::vector<std::unique_ptr<std::byte, Delete>> slabs_;
};

}  // namespace tally::inline v0::detail
