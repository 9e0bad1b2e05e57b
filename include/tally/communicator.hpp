// SPDX-License-Identifier: Apache-2.0
// The collectives as the user sees them: spans, operators and reports. Everything here checks arguments, turns
// them into one untyped call and hands it to the engine.
#pragma once

#include <chrono>
#include <cstring>
#include <cstdio>
#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "calls.hpp"
#include "cost.hpp"
#include "engine.hpp"
#include "fusion.hpp"
#include "operation.hpp"
#include "group.hpp"

namespace tally::inline v0 {

/// A group of ranks that call the same operations in the same order. One thread uses a communicator at a time;
/// abort() may be called from any. Every operation throws tally::Error on bad arguments (before anything is sent),
/// on mismatched calls, on a peer's death and at its deadline (a bad argument on one rank leaves the others waiting
/// until theirs, unless that rank ends or calls again); after such a failure in the middle of an operation
/// the communicator refuses further use with the same error. Destruction is local and never waits.
class Communicator {
 public:
  Communicator(std::shared_ptr<AnyEngine> engine, nanoseconds timeout, const CostModel& model = {}, AlgorithmOverrides overrides = {}, Order order = Order::any)
      : engine_(std::move(engine)), make_(std::make_unique<CallMaker>(*engine_, timeout, model, std::move(overrides), order)), rank_(engine_->rank()), size_(engine_->size()) {
    engine_->be_known_as(engine_);
  }

  Communicator(Communicator&&) noexcept = default;
  Communicator& operator=(Communicator&& other) noexcept {
    if (engine_) engine_->leave();
    engine_ = std::move(other.engine_);
    make_ = std::move(other.make_);
    fusion_ = std::move(other.fusion_);
    in_job_ = std::move(other.in_job_);
    rank_ = other.rank_;
    size_ = other.size_;
    return *this;
  }
  ~Communicator() {
    if (engine_) engine_->leave();
  }

  Rank rank() const { return rank_; }
  int size() const { return size_; }
  /// Which ranks share a host, or else a cache or a socket, as far as it is known.
  const Grouping& group() const { return make().group(); }

  // Each operation is there three times: as a call; as async_, which starts it and returns at once; and most as persistent_,
  // decided and planned once, to be run many times on the same memory. Making a persistent one is not collective, running it is.

  /// data = fold of all ranks' data, on every rank. Same count everywhere.
  template <class A = Auto, WritableElements Data, Reduction<ValueOf<Data>> Op>
  Report all_reduce(Data&& data, const Op& op, const CallOptions& options = {}) {
    return perform<Data>(make().all_reduce<A>(data, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, WritableElements Data, Reduction<ValueOf<Data>> Op>
  Operation async_all_reduce(Data&& data, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<Data>(make().all_reduce<A>(data, *kept, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, WritableElements Data, Reduction<ValueOf<Data>> Op>
  Persistent persistent_all_reduce(Data&& data, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<Data>(make().all_reduce<A>(data, *kept, options, CallMaker::Way::foreground), kept);
  }

  /// out = fold of all ranks' in. in and out have the same count and do not overlap (or are the same span).
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report all_reduce(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return perform<In, Out>(make().all_reduce<A>(in, out, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_all_reduce(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<In, Out>(make().all_reduce<A>(in, out, *kept, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_all_reduce(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<In, Out>(make().all_reduce<A>(in, out, *kept, options, CallMaker::Way::foreground), kept);
  }

  /// out on `root` = fold of all ranks' in; other ranks' out is not touched and may be empty.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report reduce(In&& in, Out&& out, const Op& op, Rank root, const CallOptions& options = {}) {
    return perform<In, Out>(make().reduce<A>(in, out, op, root, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_reduce(In&& in, Out&& out, const Op& op, Rank root, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<In, Out>(make().reduce<A>(in, out, *kept, root, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_reduce(In&& in, Out&& out, const Op& op, Rank root, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<In, Out>(make().reduce<A>(in, out, *kept, root, options, CallMaker::Way::foreground), kept);
  }

  /// data = root's data, on every rank.
  template <class A = Auto, WritableElements Data>
  Report broadcast(Data&& data, Rank root, const CallOptions& options = {}) {
    return perform<Data>(make().broadcast<A>(data, root, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, WritableElements Data>
  Operation async_broadcast(Data&& data, Rank root, const CallOptions& options = {}) {
    return start<Data>(make().broadcast<A>(data, root, options, CallMaker::Way::background));
  }
  template <class A = Auto, WritableElements Data>
  Persistent persistent_broadcast(Data&& data, Rank root, const CallOptions& options = {}) {
    return persist<Data>(make().broadcast<A>(data, root, options, CallMaker::Way::foreground));
  }

  /// out = every rank's in, in rank order: out is size() times as long. In place: in is this rank's block of out.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report all_gather(In&& in, Out&& out, const CallOptions& options = {}) {
    return perform<In, Out>(make().all_gather<A>(in, out, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_all_gather(In&& in, Out&& out, const CallOptions& options = {}) {
    return start<In, Out>(make().all_gather<A>(in, out, options, CallMaker::Way::background));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Persistent persistent_all_gather(In&& in, Out&& out, const CallOptions& options = {}) {
    return persist<In, Out>(make().all_gather<A>(in, out, options, CallMaker::Way::foreground));
  }

  /// out = this rank's block of the fold of all ranks' in: in is size() times as long. In place: out is this rank's block of in.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report reduce_scatter(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return perform<In, Out>(make().reduce_scatter<A>(in, out, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_reduce_scatter(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<In, Out>(make().reduce_scatter<A>(in, out, *kept, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_reduce_scatter(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<In, Out>(make().reduce_scatter<A>(in, out, *kept, options, CallMaker::Way::foreground), kept);
  }

  /// out on `root` = every rank's in, in rank order; other ranks' out is not touched and may be empty. In place: in is root's block of out.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report gather(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return perform<In, Out>(make().gather<A>(in, out, root, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_gather(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return start<In, Out>(make().gather<A>(in, out, root, options, CallMaker::Way::background));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Persistent persistent_gather(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return persist<In, Out>(make().gather<A>(in, out, root, options, CallMaker::Way::foreground));
  }

  /// out = this rank's block of root's in, which is size() times as long; other ranks' in is not looked at and may be empty.
  /// In place: out is root's block of in.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report scatter(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return perform<In, Out>(make().scatter<A>(in, out, root, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_scatter(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return start<In, Out>(make().scatter<A>(in, out, root, options, CallMaker::Way::background));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Persistent persistent_scatter(In&& in, Out&& out, Rank root, const CallOptions& options = {}) {
    return persist<In, Out>(make().scatter<A>(in, out, root, options, CallMaker::Way::foreground));
  }

  /// Block r of out = this rank's block of rank r's in. Both have size() equal blocks and may be the same span.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report all_to_all(In&& in, Out&& out, const CallOptions& options = {}) {
    return perform<In, Out>(make().all_to_all<A>(in, out, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_all_to_all(In&& in, Out&& out, const CallOptions& options = {}) {
    return start<In, Out>(make().all_to_all<A>(in, out, options, CallMaker::Way::background));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Persistent persistent_all_to_all(In&& in, Out&& out, const CallOptions& options = {}) {
    return persist<In, Out>(make().all_to_all<A>(in, out, options, CallMaker::Way::foreground));
  }

  /// out = fold of the in of ranks 0 to this one. May be the same span.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return perform<In, Out>(make().scan<A, Collective::scan>(in, out, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<In, Out>(make().scan<A, Collective::scan>(in, out, *kept, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<In, Out>(make().scan<A, Collective::scan>(in, out, *kept, options, CallMaker::Way::foreground), kept);
  }

  /// out = fold of the in of the ranks before this one; rank 0's out is not touched. May be the same span.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report exclusive_scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return perform<In, Out>(make().scan<A, Collective::exclusive_scan>(in, out, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_exclusive_scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return start<In, Out>(make().scan<A, Collective::exclusive_scan>(in, out, *kept, options, CallMaker::Way::background), kept);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_exclusive_scan(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = keep(op);
    return persist<In, Out>(make().scan<A, Collective::exclusive_scan>(in, out, *kept, options, CallMaker::Way::foreground), kept);
  }

  /// The same with blocks of their own sizes: rank r's in has counts[r] elements and comes to lie at displacements[r] of out, or
  /// one after another. All ranks pass the same counts. Blocks of out must not overlap.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report all_gather_v(In&& in, Out&& out, Counts counts, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().all_gather_v<A>(in, out, counts, displacements, extents, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_all_gather_v(In&& in, Out&& out, Counts counts, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return start<In, Out>(make().all_gather_v<A>(in, out, counts, displacements, extents, options, CallMaker::Way::background));
  }

  /// Rank r's out, of counts[r] elements, = the fold of what lies at displacements[r] of all ranks' in.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report reduce_scatter_v(In&& in, Out&& out, Counts counts, const Op& op, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().reduce_scatter_v<A>(in, out, counts, displacements, extents, op, options, CallMaker::Way::foreground), &op);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Operation async_reduce_scatter_v(In&& in, Out&& out, Counts counts, const Op& op, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    const auto kept = keep(op);
    return start<In, Out>(make().reduce_scatter_v<A>(in, out, counts, displacements, extents, *kept, options, CallMaker::Way::background), kept);
  }

  /// As all_gather_v, on the root; counts and displacements are looked at there alone.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report gather_v(In&& in, Out&& out, Counts counts, Rank root, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().gather_v<A>(in, out, counts, displacements, root, extents, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_gather_v(In&& in, Out&& out, Counts counts, Rank root, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return start<In, Out>(make().gather_v<A>(in, out, counts, displacements, root, extents, options, CallMaker::Way::background));
  }

  /// Rank r's out, of counts[r] elements, = what lies at displacements[r] of root's in. Counts and displacements are looked at there alone.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report scatter_v(In&& in, Out&& out, Counts counts, Rank root, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().scatter_v<A>(in, out, counts, displacements, root, extents, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_scatter_v(In&& in, Out&& out, Counts counts, Rank root, Counts displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return start<In, Out>(make().scatter_v<A>(in, out, counts, displacements, root, extents, options, CallMaker::Way::background));
  }

  /// in_counts[r] elements of in go to rank r, out_counts[r] of out come from it, which must be what it sends.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report all_to_all_v(In&& in, Counts in_counts, Out&& out, Counts out_counts, Counts in_displacements = {}, Counts out_displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().all_to_all_v<A>(in, in_counts, in_displacements, out, out_counts, out_displacements, extents, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_all_to_all_v(In&& in, Counts in_counts, Out&& out, Counts out_counts, Counts in_displacements = {}, Counts out_displacements = {}, const CallOptions& options = {}) {
    Extents extents;
    return start<In, Out>(make().all_to_all_v<A>(in, in_counts, in_displacements, out, out_counts, out_displacements, extents, options, CallMaker::Way::background));
  }

  /// Block i of in goes to rank to[i], block i of out comes from rank from[i]. All blocks between two ranks, and all of one rank,
  /// have the same size. Where there are several between two ranks, the first sent is the first received.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report neighbour_exchange(In&& in, Out&& out, Ranks to, Ranks from, const CallOptions& options = {}) {
    Extents extents;
    return perform<In, Out>(make().neighbour_exchange<A>(in, out, to, from, extents, options, CallMaker::Way::foreground));
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Operation async_neighbour_exchange(In&& in, Out&& out, Ranks to, Ranks from, const CallOptions& options = {}) {
    Extents extents;
    return start<In, Out>(make().neighbour_exchange<A>(in, out, to, from, extents, options, CallMaker::Way::background));
  }

  /// Returns when every rank has called it.
  template <class A = Auto>
  Report barrier(const CallOptions& options = {}) {
    return perform(make().barrier<A>(options, CallMaker::Way::foreground));
  }
  template <class A = Auto>
  Operation async_barrier(const CallOptions& options = {}) {
    return start(make().barrier<A>(options, CallMaker::Way::background));
  }
  template <class A = Auto>
  Persistent persistent_barrier(const CallOptions& options = {}) {
    return persist(make().barrier<A>(options, CallMaker::Way::foreground));
  }

  /// Sends data to rank `to`; a receive there with the same tag gets it. Messages of one tag arrive in the order of their sends.
  /// Short ones (see the README) are on their way when this returns, long ones have been received.
  template <Elements Data>
  Report send(Data&& data, Rank to, int tag = 0, const CallOptions& options = {}) {
    if (fusion_ && fusion_->recording()) return refuse_temporaries<Data>(Collective::send), fusion_->add(engine_, make().send(data, to, tag, options)), Report{};
    return engine().run(make().send(data, to, tag, options), nullptr);
  }
  template <Elements Data>
  Operation async_send(Data&& data, Rank to, int tag = 0, const CallOptions& options = {}) {
    return start<Data>(make().send(data, to, tag, options));
  }
  /// Receives the next message with this tag (any_tag: with any) from rank `from`. It may be shorter than data, not longer.
  template <WritableElements Data>
  Received receive(Data&& data, Rank from, int tag = 0, const CallOptions& options = {}) {
    if (fusion_ && fusion_->recording()) return refuse_temporaries<Data>(Collective::receive), fusion_->add(engine_, make().receive(data, from, tag, options)), Received{};
    Message got;
    const Report report = engine().run(make().receive(data, from, tag, options), &got);
    return {report, got.bytes / sizeof(ValueOf<Data>), got.peer, got.tag};
  }
  template <WritableElements Data>
  Operation async_receive(Data&& data, Rank from, int tag = 0, const CallOptions& options = {}) {
    return start<Data>(make().receive(data, from, tag, options));
  }
  /// Both at once, so that ranks can send to each other in a ring.
  template <class Out, class In>
    requires Elements<Out> && WritableElements<In>
  Received send_receive(Out&& out, Rank to, In&& in, Rank from, int tag = 0, const CallOptions& options = {}) {
    const Message message = make().send(out, to, tag, options), place = make().receive(in, from, tag, options);
    if (fusion_ && fusion_->recording()) return refuse_temporaries<Out, In>(Collective::send_receive), fusion_->add(engine_, place), fusion_->add(engine_, message), Received{};
    if (to == rank() || from == rank()) {  // two of their own: to oneself goes another way
      Operation receiving = async_receive(in, from, tag, options);
      send(out, to, tag, options);
      return receiving.template received<ValueOf<In>>();
    }
    Message got;
    const Report report = engine().run(message, place, &got);
    return {report, got.bytes / sizeof(ValueOf<In>), got.peer, got.tag};
  }

  /// The operations that `f()` calls on this communicator, as few: small all_reduces, reduces and broadcasts are packed
  /// together, all others run at the same time. Their results are there when this returns, and not before; what they return
  /// inside is empty, this is their account. All ranks pass the same operations in the same order; packed ones and others
  /// must not depend on each other. A call that `f` makes on another communicator is not part of it.
  template <std::invocable F>
  Report group(F&& f) {
    if (!fusion_) fusion_ = std::make_unique<Fusion>();
    if (fusion_->recording()) throw Error(Errc::invalid_argument, "a group cannot be part of a group");
    fusion_->begin();
    try {
      std::forward<F>(f)();
    } catch (...) {
      fusion_->give_up();
      throw;
    }
    return fusion_->run(engine(), make());
  }

  /// Collective. A communicator of the same ranks whose operations are independent of this one's.
  Communicator duplicate() {
    std::vector<detail::Wish> all = agree({.what = detail::Making::duplicate});
    return *make_group(all, detail::all_of(size()));
  }

  /// Collective. A communicator of the ranks that pass the same colour, ordered by key and then by their rank here; none
  /// for a rank that passes no_colour. Several groups may work at the same time, each on its own.
  std::optional<Communicator> split(int colour, int key = 0) {
    std::vector<detail::Wish> all = agree({.what = detail::Making::split, .colour = colour, .key = key});
    return make_group(all, colour < 0 ? std::vector<Rank>() : detail::of_colour(all, colour));
  }

  /// Collective over all ranks of this communicator, which pass the same list. A communicator of these ranks: rank i of it
  /// is ranks[i] here. None for ranks that are not listed.
  std::optional<Communicator> subset(std::span<const Rank> ranks) {
    const bool wrong = !detail::problem_with(ranks, size()).empty();
    std::vector<detail::Wish> all = agree({.what = detail::Making::subset, .wrong = wrong, .count = ranks.size(), .hash = detail::hash_of(ranks)});
    for (Rank r = 0; r < size(); ++r)
      if (const detail::Wish& theirs = all[static_cast<std::size_t>(r)]; theirs.wrong || !theirs.fits(all[0])) refuse_list(all, r, ranks);
    return make_group(all, std::ranges::count(ranks, rank()) > 0 ? ranks : std::span<const Rank>());
  }
  std::optional<Communicator> subset(std::initializer_list<Rank> ranks) { return subset(std::span(ranks.begin(), ranks.size())); }

  /// Collective. `count` elements for every rank, zero, which all collectives can work on without copying: pass it, its
  /// span() or subspan() as the same argument on all ranks, also where a rank has no such buffer (as `out` of a reduce whose
  /// root is another: subspan(0, 0) will do). Errc::no_resources if it is more than the host has, or can map.
  template <Element T>
  Symmetric<T> allocate(std::size_t count) {
    constexpr std::size_t page = 4096;
    if (count > (SymmetricMemory::most_bytes - page) / sizeof(T)) throw Error(Errc::invalid_argument, {"allocate: ", count, " elements are too many"});
    const std::size_t stride = std::max((count * sizeof(T) + page - 1) / page * page, page);
    std::unique_ptr<SymmetricMemory> memory;
    std::vector<detail::Wish> all = agree({.what = detail::Making::allocate, .type = element_type<T>(), .count = count, .hash = sizeof(T)});
    for (Rank r = 0; r < size(); ++r)
      if (!all[static_cast<std::size_t>(r)].fits(all[0])) refuse_amount(all, r);
    open_together(
        all, 0, [&] { return engine().reserve_memory(stride); },
        [&](std::uint64_t token) {
          memory = engine_->map_memory(token, stride);
          std::memset(memory->of(rank()), 0, stride);  // its own pages by its own hand: they come to lie close to it
        },
        [&] { memory.reset(); }, [&](std::uint64_t token) { engine_->discard_memory(token, stride); });
    return {std::move(memory), count, rank()};
  }

  /// Collective, for primitives that are no collectives: a transport of their own between these ranks, if all describe what it is for alike;
  /// and, where `stride` is not 0 and they can share it, so much memory for each of them, zero and untouched.
  std::unique_ptr<AnyTransport> open_transport(const std::string& description, std::size_t stride, std::unique_ptr<SymmetricMemory>& memory) {
    std::vector<detail::Wish> all = agree({.what = detail::Making::table, .count = description.size(), .hash = detail::hash_text(description)});
    for (Rank r = 0; r < size(); ++r)
      if (!all[static_cast<std::size_t>(r)].fits(all[0])) refuse_description(all, r, description);
    const std::vector<Rank> members = detail::all_of(size());
    std::unique_ptr<AnyTransport> opened;
    open_together(
        all, 0, [&] { return engine().reserve(members); }, [&](std::uint64_t token) { if (!(opened = engine().open_transport(token, members))) throw Error(Errc::unsupported, "this transport can be used by collectives alone"); },
        [&] { opened.reset(); }, [&](std::uint64_t token) { engine_->discard(token, members); });
    if (stride == 0) return opened;
    try {
      open_together(
          all, 0, [&] { return engine().reserve_memory(stride); }, [&](std::uint64_t token) { memory = engine_->map_memory(token, stride); },
          [&] { memory.reset(); }, [&](std::uint64_t token) { engine_->discard_memory(token, stride); });
    } catch (const Error& error) {
      if (error.errc() != Errc::no_resources) throw;
    }
    return opened;
  }
  AnyEngine::Settings settings() const { return engine().settings(); }
  /// For the same collectives on other memory: what checks arguments and makes calls of them, which this communicator does not run.
  CallMaker& calls() { return make(); }

  /// Ends the current and all further operations of this communicator on every rank. From any thread; never waits.
  void abort(const std::string& why = {}) {
    if (engine_) engine_->abort(why);
  }

  /// The deadline of calls that name none.
  nanoseconds timeout() const { return make().timeout(); }
  void set_timeout(nanoseconds timeout) { make().set_timeout(timeout); }

  /// Which algorithm a call of so many bytes would take (of the larger side, see Layout::items) and why: what each was
  /// measured or is estimated to take. `symmetric`: the buffers come from allocate(). Local; the same on all ranks.
  [[gnu::cold]] std::string explain(Collective operation, std::size_t bytes, bool symmetric = false) { return make().explain(operation, bytes, symmetric, engine()); }

  const Ledger& ledger() const { return engine().ledger(); }
  /// This rank's account of this communicator as plain data. Of a communicator that was made of another one it names ranks as the
  /// first one numbers them, so that accounts of both can be put together (job_of). `name`: this communicator's in the job, another one for
  /// each; `job`: the same for all. Where a meter's first window is still open it waits for that (at most 300 ms), since joules would be unknown.
  Account account(std::string_view name = "world", std::string_view job = {}) const {
    if (ledger().awaits_energy()) ledger().wait_for_energy(std::chrono::milliseconds(300));
    Account account = ledger().account(name, job);
    account.members = in_job_;
    return account;
  }
  std::string_view transport_name() const { return ledger().transport_name(); }
  /// What the transport has moved since the communicator was made.
  TransportCounters counters() const { return engine().counters(); }

 private:
  // Making communicators and memory together. Whatever goes wrong there goes wrong on all ranks, and this communicator goes on.

  void tell_all(detail::Wish mine, std::vector<detail::Wish>& all) {
    if (fusion_ && fusion_->recording()) throw Error(Errc::invalid_argument, {name_of(mine.what), " cannot be part of a group: its result is needed at once"});
    all.resize(static_cast<std::size_t>(size()));
    try {
      const auto in = std::as_bytes(std::span(&mine, 1));
      const auto out = std::as_writable_bytes(std::span(all));
      Call call = make().all_gather<Auto>(in, out, {}, CallMaker::Way::foreground);
      call.type = ElementType::membership;  // so that other ranks' errors say what this is
      call.fingerprint = 0;
      perform(call);
    } catch (const Error& error) {
      throw Error(error.errc(), {name_of(mine.what), ": ", error.text()}, error.context());
    }
  }
  /// What all ranks ask for; an error on all of them, unless that is the same thing.
  std::vector<detail::Wish> agree(const detail::Wish& mine) {
    std::vector<detail::Wish> all;
    tell_all(mine, all);
    for (Rank r = 1; r < size(); ++r)
      if (const detail::Making theirs = all[static_cast<std::size_t>(r)].what; theirs != all[0].what)
        throw Error(Errc::mismatch, {"rank 0 called ", name_of(all[0].what), ", rank ", r, " called ", name_of(theirs)}, blaming(r));
    return all;
  }
  /// Of an error because rank r differs from rank 0.
  ErrorContext blaming(Rank r) const { return {rank(), r == rank() ? 0 : r, 0, {}}; }

  /// `leader`, the same on all ranks of a group and -1 on those that are in none, reserves, and all of its group open what
  /// it reserved; an error on all ranks of all groups if one of them could not. Then all close what they opened, and the
  /// leaders discard it.
  template <class Reserve, class Open, class Close, class Discard>
  void open_together(std::vector<detail::Wish>& all, Rank leader, Reserve&& reserve, Open&& open, Close&& close, Discard&& discard) {
    detail::Wish mine{.what = all[0].what};
    std::string problem;
    const auto attempt = [&](auto&& what) {
      try {
        what();
        return true;
      } catch (const std::exception& error) {
        problem = error.what();
        return false;
      }
    };
    if (leader == rank()) mine.wrong = !attempt([&] { mine.token = reserve(); });
    tell_all(mine, all);
    const auto failed = std::ranges::find_if(all, [](const detail::Wish& each) { return each.wrong != 0; });
    int opened = failed == all.end();
    if (opened) {
      if (leader >= 0) opened = attempt([&] { open(all[static_cast<std::size_t>(leader)].token); });
      all_reduce(std::span(&opened, 1), min);
      if (!opened) {
        close();
        barrier();
      }
    }
    if (mine.token != 0) {
      if (!opened) discard(mine.token);
      engine_->release(mine.token);
    }
    if (opened) return;
    if (problem.empty()) problem = failed == all.end() ? "another rank could not open it" : detail::concat({"rank ", failed - all.begin(), " could not reserve it"});
    throw Error(Errc::no_resources, {name_of(mine.what), ": ", problem}, {rank(), -1, 0, {}});
  }
  std::optional<Communicator> make_group(std::vector<detail::Wish>& all, std::span<const Rank> members) {
    std::unique_ptr<AnyEngine> opened;
    open_together(
        all, members.empty() ? -1 : members[0], [&] { return engine().reserve(members); }, [&](std::uint64_t token) { opened = engine().open(token, members); },
        [&] { opened.reset(); }, [&](std::uint64_t token) { engine_->discard(token, members); });
    if (!opened) return {};
    Communicator made(std::move(opened), timeout(), detail::model_within(make().chooser().model(), size(), members), make().overrides(), make().order());
    for (const Rank r : members) made.in_job_.push_back(in_job_.empty() ? r : in_job_[static_cast<std::size_t>(r)]);
    return made;
  }
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_amount(const std::vector<detail::Wish>& all, Rank r) {
    const auto text = [](const detail::Wish& wish) { return detail::concat({wish.count, " elements of ", wish.hash, " bytes (", name_of(wish.type), ")"}); };
    throw Error(Errc::mismatch, {"allocate: rank 0 asks for ", text(all[0]), ", rank ", r, " for ", text(all[static_cast<std::size_t>(r)])}, blaming(r));
  }
  /// Rank r's list is none, or differs from rank 0's: they show them to the others.
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_list(const std::vector<detail::Wish>& all, Rank r, std::span<const Rank> mine) {
    const auto shown = [&](Rank from) {
      std::vector<Rank> list(std::min<std::size_t>(all[static_cast<std::size_t>(from)].count, static_cast<std::size_t>(size()) + 1));
      if (rank() == from) std::copy_n(mine.begin(), list.size(), list.begin());
      if (!list.empty()) broadcast(list, from);
      return list;
    };
    const std::vector<Rank> theirs = shown(r);
    if (all[static_cast<std::size_t>(r)].wrong) throw Error(Errc::invalid_argument, {"subset: ", detail::problem_with(theirs, size()), ": rank ", r, " passes ", detail::list_text(theirs)}, {rank(), r, 0, {}});
    throw Error(Errc::mismatch, {"subset: rank 0 passes ", detail::list_text(shown(0)), ", rank ", r, " passes ", detail::list_text(theirs)}, blaming(r));
  }

  /// Likewise, of a description: the first line that differs tells.
  [[noreturn, gnu::cold, gnu::noinline]] void refuse_description(const std::vector<detail::Wish>& all, Rank r, const std::string& mine) {
    const auto shown = [&](Rank from) {
      std::string text = rank() == from ? mine : std::string(all[static_cast<std::size_t>(from)].count, ' ');
      if (!text.empty()) broadcast(std::span(text.data(), text.size()), from);
      return text;
    };
    const std::string theirs = shown(r);
    throw Error(Errc::mismatch, {"a table: ", detail::difference(shown(0), theirs, r)}, blaming(r));
  }

  template <class Op>
  static std::shared_ptr<const Op> keep(const Op& op) {
    if constexpr (detail::is_stateless<Op>) return {std::shared_ptr<void>(), &detail::lasting(op)};  // nothing to own
    else return std::make_shared<const Op>(op);
  }
  /// Ranges: what the caller passed.
  template <class... Ranges, class Op = Sum>
  Report perform(const Call& call, const Op* op = nullptr) {
    if (!fusion_ || !fusion_->recording()) [[likely]] return engine().run(call);
    refuse_temporaries<Ranges...>(call.layout.operation);
    if constexpr (!detail::is_stateless<Op>) {
      const auto kept = keep(*op);
      Call later = call;
      later.fold.op = kept.get();
      fusion_->add(engine_, make(), later, kept);
    } else {
      fusion_->add(engine_, make(), call, nullptr);
    }
    return {};
  }
  template <class... Ranges>
  static void refuse_temporaries(Collective operation) {
    if constexpr (!(std::ranges::borrowed_range<Ranges> && ...)) throw Error(Errc::invalid_argument, {name_of(operation), ": in a group, buffers must outlive the call: pass a variable or a span, not a temporary container"});
  }
  template <class... Ranges>
  static void must_outlive() {
    static_assert((std::ranges::borrowed_range<Ranges> && ...), "the buffers of an operation in the background, or of a persistent one, must outlive the call: pass a variable or a span, not a temporary container");
  }
  template <class... Ranges>
  Operation start(const Call& call, std::shared_ptr<const void> kept = nullptr) {
    must_outlive<Ranges...>();
    return {engine_, engine().start(call, std::move(kept))};
  }
  template <class... Ranges>
  Operation start(const Message& message) {
    must_outlive<Ranges...>();
    return {engine_, engine().start(message)};
  }
  template <class... Ranges>
  Persistent persist(const Call& call, std::shared_ptr<const void> kept = nullptr) {
    must_outlive<Ranges...>();
    return {engine_, call, std::move(kept)};
  }
  AnyEngine& engine() const {
    if (!engine_) refuse_moved();
    return *engine_;
  }
  CallMaker& make() const {
    if (!make_) refuse_moved();
    return *make_;
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_moved() { throw Error(Errc::invalid_argument, "this communicator was moved from"); }

  std::shared_ptr<AnyEngine> engine_;  // shared with persistent operations and those in flight
  std::unique_ptr<CallMaker> make_;
  std::unique_ptr<Fusion> fusion_;  // once there was a group
  std::vector<Rank> in_job_;        // of its ranks; empty: the same
  Rank rank_;
  int size_;
};

}  // namespace tally::inline v0
