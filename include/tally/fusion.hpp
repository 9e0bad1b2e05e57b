// SPDX-License-Identifier: Apache-2.0
// Makes few operations of many: those of a group that fit together (the same operation, type, operator and root) become one.
// If that is large, its parts are staged from where they lie; else they are packed into a buffer, done there, and unpacked.
// All others run in the background meanwhile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "calls.hpp"
#include "operation.hpp"
#include "run.hpp"

namespace tally::inline v0 {

class Fusion {
 public:
  /// This thread is: a call-back of another one is not part of the group.
  bool recording() const { return recording_ && thread_ == std::this_thread::get_id(); }
  void begin() {
    recording_ = true;
    thread_ = std::this_thread::get_id();
  }

  /// An operation of the group. `kept`: its operator. Others than those that can be packed are started.
  void add(const std::shared_ptr<AnyEngine>& engine, CallMaker& make, const Call& call, const std::shared_ptr<const void>& kept) {
    const Collective what = call.layout.operation;
    const bool packs = (what == Collective::all_reduce || what == Collective::reduce || what == Collective::broadcast) && call.size <= most_bytes;
    // An algorithm in symmetric memory, insisted on, cannot work on a buffer that they are packed into.
    if (!packs || (call.named && call.algorithm.is(Reach::direct) && !make.one_address_space())) {
      note(Buffers(call), what, call.layout.count);
      return started_.push_back({engine, engine->start(make.in_background(call), kept)});
    }
    Pack* pack = latest_ < packs_.size() && fits(packs_[latest_], call) ? &packs_[latest_] : find(call, kept);
    pack->parts.push_back({call.input, call.output, pack->elements, call.layout.count});
    pack->elements += call.layout.count;
    pack->call.timeout = std::min(pack->call.timeout, call.timeout);
    look_at(Buffers(call));
  }
  /// A message of it.
  void add(const std::shared_ptr<AnyEngine>& engine, const Message& message) {
    note(Buffers(message), message.is_send ? Collective::send : Collective::receive, message.bytes / std::max<std::size_t>(message.grain, 1));
    started_.push_back({engine, engine->start(message)});
  }

  /// Runs them all, in the order in which the first of each kind was called. The report is the sum of theirs; where there were
  /// several, it knows no joules, no blame and no last rank.
  Report run(AnyEngine& engine, CallMaker& make) {
    const Ending ending{*this};
    if (doubtful_) refuse_overlaps();
    Report all;
    for (std::size_t i = 0; i < packs_.size(); ++i) run(packs_[i], engine, make, all);
    for (Operation& operation : started_) add(all, operation.wait());
    return all;
  }
  /// The group failed before it ran.
  void give_up() { const Ending ending{*this}; }

 private:
  static constexpr std::size_t most_bytes = std::size_t{64} << 10;     // of an operation: larger ones gain nothing
  static constexpr std::size_t bucket_bytes = std::size_t{512} << 10;  // stays in a core's cache

  struct Pack {
    Call call;  // of the first
    std::shared_ptr<const void> kept;
    std::vector<Part> parts;
    std::size_t elements = 0;
  };
  struct Ending {
    Fusion& fusion;
    explicit Ending(Fusion& group) : fusion(group) { fusion.recording_ = false; }
    ~Ending() {
      for (Pack& pack : fusion.packs_) {
        pack.parts.clear();
        fusion.spare_.push_back(std::move(pack.parts));
      }
      fusion.packs_.clear();
      fusion.started_.clear();  // waits, if something went wrong
      fusion.others_.clear();
      fusion.doubtful_ = false;
      fusion.all_ = {};
      fusion.latest_ = 0;
    }
  };

  static bool fits(const Pack& pack, const Call& call) {
    const Call& first = pack.call;
    return first.layout.operation == call.layout.operation && first.type == call.type && first.grain == call.grain && first.operator_code == call.operator_code && first.fold.function == call.fold.function &&
           first.fold.op == call.fold.op && first.layout.root == call.layout.root && first.named == call.named && first.need / 4 == call.need / 4 && (!call.named || first.algorithm.name == call.algorithm.name);
  }
  Pack* find(const Call& call, const std::shared_ptr<const void>& kept) {
    for (latest_ = 0; latest_ < packs_.size(); ++latest_)
      if (fits(packs_[latest_], call)) return &packs_[latest_];
    packs_.push_back({call, kept, {}, 0});
    if (!spare_.empty()) {
      packs_.back().parts = std::move(spare_.back());
      spare_.pop_back();
    }
    return &packs_.back();
  }

  /// The buffers of an operation that is not packed.
  void note(const Buffers& buffers, Collective what, std::size_t count) {
    look_at(buffers);
    others_.push_back({buffers, what, count});
  }
  void look_at(const Buffers& buffers) {
    doubtful_ = doubtful_ || buffers.clashes(all_);
    all_.widen(buffers);
  }
  /// The operations are done at once: none may write what another one reads or writes.
  [[gnu::noinline]] void refuse_overlaps() const {
    struct Use {
      std::span<const std::byte> bytes;
      bool writes;
      Collective what;
      std::size_t count;
    };
    std::vector<Use> uses;
    const auto add = [&](const Buffers& buffers, Collective what, std::size_t count) {
      const auto &in = buffers.in, &out = buffers.out;
      const auto use = [&](const std::byte* begin, const std::byte* end, bool writes) {
        if (std::less<>()(begin, end)) uses.push_back({{begin, end}, writes, what, count});
      };
      use(out.data(), out.data() + out.size(), true);
      if (!buffers.overlap_themselves()) return use(in.data(), in.data() + in.size(), false);
      use(in.data(), out.data(), false);  // in place: what of it is read alone
      use(out.data() + out.size(), in.data() + in.size(), false);
    };
    for (const Pack& pack : packs_)
      for (const Part& part : pack.parts) add(Buffers(part, pack.call.grain), pack.call.layout.operation, part.count);
    for (const Other& other : others_) add(other.buffers, other.what, other.count);
    std::ranges::sort(uses, [](const Use& a, const Use& b) { return std::less<>()(a.bytes.data(), b.bytes.data()); });
    const Use *written = nullptr, *used = nullptr;  // which of those before reach furthest
    const auto reaches = [](const Use* before, const Use& use) { return before && std::less<>()(use.bytes.data(), before->bytes.data() + before->bytes.size()); };
    const auto further = [](const Use* a, const Use& b) { return !a || std::less<>()(a->bytes.data() + a->bytes.size(), b.bytes.data() + b.bytes.size()) ? &b : a; };
    for (const Use& use : uses) {
      if (const Use* other = use.writes ? used : written; reaches(other, use))
        throw Error(Errc::invalid_argument, {name_of(use.what), " of ", use.count, " elements overlaps in memory with ", name_of(other->what), " of ", other->count,
                                             " elements of the same group: they are done at once and must not depend on each other"});
      used = further(used, use);
      if (use.writes) written = further(written, use);
    }
  }
  /// All ranks must cut the group in the same way: a hash of the parts' sizes tells.
  static std::uint16_t hash_of(std::span<const Part> parts) {
    std::uint64_t hash = 0;
    for (const Part& part : parts) hash = (hash ^ part.count) * 0x9e3779b97f4a7c15u;
    return static_cast<std::uint16_t>(hash >> 48 | 1);
  }
  void run(Pack& pack, AnyEngine& engine, CallMaker& make, Report& all) {
    const Call& call = pack.call;
    const bool reads = call.layout.operation != Collective::broadcast, is_root = call.layout.root == make.rank(), reduce = call.layout.operation == Collective::reduce;
    if (!reads && is_root)  // its data is what others get, and stays
      for (Part& part : pack.parts) part.in = std::exchange(part.out, nullptr);
    const std::span<const Part> parts = pack.parts;
    if (pack.elements * call.grain > bucket_bytes) {
      Call whole = make.regrouped(call, pack.elements, nullptr, nullptr, hash_of(parts));
      whole.scattered = parts;
      if (whole.is_scattered()) return add(all, engine.run(whole));
    }
    for (std::size_t first = 0; first < parts.size();) {
      std::size_t last = first, elements = 0;
      while (last < parts.size() && (last == first || (elements + parts[last].count) * call.grain <= bucket_bytes)) elements += parts[last++].count;
      const auto bucket = parts.subspan(first, last - first);
      buffer_.grow(std::max<std::size_t>(elements * call.grain, 1));
      Call packed = make.regrouped(call, elements, reads ? buffer_.data() : nullptr, !reduce || is_root ? buffer_.data() : nullptr, hash_of(bucket));
      packed.scattered = bucket;
      add(all, engine.run(packed));
      first = last;
    }
  }
  static void add(Report& all, const Report& one) {
    for (const auto part : {&Report::elapsed, &Report::exposed, &Report::copy, &Report::reduce, &Report::codec, &Report::protocol, &Report::wait_arrival, &Report::wait_transfer, &Report::wait_credit, &Report::wait_local, &Report::undriven}) all.*part += one.*part;
    for (const auto part : {&Report::bytes_sent, &Report::bytes_received, &Report::bytes_wire}) all.*part += one.*part;
    const bool only = all.ledger == 0;
    all.ledger = one.ledger;
    all.sequence = only ? one.sequence : 0;
    all.last_arrival = only ? one.last_arrival : std::int16_t{-1};
    all.algorithm = one.algorithm;
  }

  std::thread::id thread_;  // who records
  bool recording_ = false, doubtful_ = false;  // doubtful: some of their buffers may overlap
  Buffers all_;                                 // their hull
  std::vector<Pack> packs_;
  struct Other {
    Buffers buffers;
    Collective what;
    std::size_t count;
  };
  std::vector<Other> others_;  // that are not packed
  std::vector<std::vector<Part>> spare_;  // whose memory is there
  std::size_t latest_ = 0;
  std::vector<Operation> started_;
  Scratch buffer_;
};

}  // namespace tally::inline v0
