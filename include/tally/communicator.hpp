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
#include <numeric>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "cost.hpp"
#include "engine.hpp"
#include "group.hpp"

namespace tally::inline v0 {

/// Per call, e.g. `comm.all_reduce(data, tally::sum, {.timeout = 2s})`.
struct CallOptions {
  std::optional<nanoseconds> timeout = {};  // default: the communicator's
  std::string_view algorithm = {};          // by name, the same on all ranks; default: chosen by size
};

/// Chosen by size, unless TALLY_ALGORITHM says otherwise.
struct Auto {};

template <class R>
using ValueOf = std::ranges::range_value_t<R>;

/// Contiguous memory of elements: std::span, std::vector, std::array, ...
template <class R>
concept Elements = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> && Element<ValueOf<R>>;
template <class R>
concept WritableElements = Elements<R> && !std::is_const_v<std::remove_reference_t<std::ranges::range_reference_t<R>>>;
template <class In, class Out>
concept SameElements = Elements<In> && WritableElements<Out> && std::same_as<ValueOf<In>, ValueOf<Out>>;

/// An operation of a communicator whose arguments are settled. It works on the same memory each time.
class Persistent {
 public:
  Persistent(std::shared_ptr<AnyEngine> engine, const Call& call, std::shared_ptr<const void> op) : engine_(std::move(engine)), op_(std::move(op)), plan_(engine_->pin(call)), call_(call) { call_.pinned = plan_.get(); }
  /// As the operation itself; Errc::invalid_argument once the communicator is gone.
  Report run() {
    if (!engine_) throw Error(Errc::invalid_argument, "this operation was moved from");
    return engine_->run(call_);
  }

 private:
  std::shared_ptr<AnyEngine> engine_;
  std::shared_ptr<const void> op_;  // call_ points at it
  std::shared_ptr<void> plan_;
  Call call_;
};

/// A group of ranks that call the same operations in the same order. One thread uses a communicator at a time;
/// abort() may be called from any. Every operation throws tally::Error on bad arguments (before anything is sent),
/// on mismatched calls, on a peer's death and at its deadline (a bad argument on one rank leaves the others waiting
/// until theirs, unless that rank ends or calls again); after such a failure in the middle of an operation
/// the communicator refuses further use with the same error. Destruction is local and never waits.
class Communicator {
 public:
  Communicator(std::shared_ptr<AnyEngine> engine, nanoseconds timeout, const CostModel& model = {}, AlgorithmOverrides overrides = {})
      : engine_(std::move(engine)), rank_(engine_->rank()), size_(engine_->size()), timeout_(timeout), one_address_space_(engine_->one_address_space()), group_(model.group), chooser_(std::make_unique<Chooser>(size_, model, engine_->stages())), overrides_(std::move(overrides)) {}

  Communicator(Communicator&&) noexcept = default;
  Communicator& operator=(Communicator&& other) noexcept {
    if (engine_) engine_->leave();
    engine_ = std::move(other.engine_);
    rank_ = other.rank_;
    size_ = other.size_;
    timeout_ = other.timeout_;
    one_address_space_ = other.one_address_space_;
    group_ = other.group_;
    chooser_ = std::move(other.chooser_);
    overrides_ = std::move(other.overrides_);
    return *this;
  }
  ~Communicator() {
    if (engine_) engine_->leave();
  }

  Rank rank() const { return rank_; }
  int size() const { return size_; }
  /// So many ranks that follow each other, from rank 0 on, share a cache or a socket; 1 where they do not, or it is not known.
  int group() const { return group_; }

  /// data = fold of all ranks' data, on every rank. Same count everywhere.
  template <class A = Auto, WritableElements Data, Reduction<ValueOf<Data>> Op>
  Report all_reduce(Data&& data, const Op& op, const CallOptions& options = {}) {
    return engine().run(all_reduce_call<A>(data, op, options));
  }
  /// out = fold of all ranks' in. in and out have the same count and do not overlap (or are the same span).
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report all_reduce(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return engine().run(all_reduce_call<A>(in, out, op, options));
  }

  /// out on `root` = fold of all ranks' in; other ranks' out is not touched and may be empty.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report reduce(In&& in, Out&& out, const Op& op, Rank root, const CallOptions& options = {}) {
    return engine().run(reduce_call<A>(in, out, op, root, options));
  }

  /// data = root's data, on every rank.
  template <class A = Auto, WritableElements Data>
  Report broadcast(Data&& data, Rank root, const CallOptions& options = {}) {
    return engine().run(broadcast_call<A>(data, root, options));
  }

  /// out = every rank's in, in rank order: out is size() times as long. In place: in is this rank's block of out.
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Report all_gather(In&& in, Out&& out, const CallOptions& options = {}) {
    return engine().run(all_gather_call<A>(in, out, options));
  }

  /// out = this rank's block of the fold of all ranks' in: in is size() times as long. In place: out is this rank's block of in.
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Report reduce_scatter(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    return engine().run(reduce_scatter_call<A>(in, out, op, options));
  }

  /// The same operations, decided and planned once, to be run many times on the same memory. Making one is not
  /// collective, running it is: run() stands for the call of the same name.
  template <class A = Auto, WritableElements Data, Reduction<ValueOf<Data>> Op>
  Persistent persistent_all_reduce(Data&& data, const Op& op, const CallOptions& options = {}) {
    const auto kept = std::make_shared<const Op>(op);
    return {engine_, all_reduce_call<A>(data, *kept, options), kept};
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_all_reduce(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = std::make_shared<const Op>(op);
    return {engine_, all_reduce_call<A>(in, out, *kept, options), kept};
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_reduce(In&& in, Out&& out, const Op& op, Rank root, const CallOptions& options = {}) {
    const auto kept = std::make_shared<const Op>(op);
    return {engine_, reduce_call<A>(in, out, *kept, root, options), kept};
  }
  template <class A = Auto, WritableElements Data>
  Persistent persistent_broadcast(Data&& data, Rank root, const CallOptions& options = {}) {
    return {engine_, broadcast_call<A>(data, root, options), nullptr};
  }
  template <class A = Auto, class In, class Out>
    requires SameElements<In, Out>
  Persistent persistent_all_gather(In&& in, Out&& out, const CallOptions& options = {}) {
    return {engine_, all_gather_call<A>(in, out, options), nullptr};
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameElements<In, Out>
  Persistent persistent_reduce_scatter(In&& in, Out&& out, const Op& op, const CallOptions& options = {}) {
    const auto kept = std::make_shared<const Op>(op);
    return {engine_, reduce_scatter_call<A>(in, out, *kept, options), kept};
  }

  /// Returns when every rank has called it.
  template <class A = Auto>
  Report barrier(const CallOptions& options = {}) {
    std::byte token{};
    const Output memory{&token, 1};
    return engine().run(call<A, Collective::barrier, unsigned char>(memory, memory, 1, fold_of<unsigned char>(max), 0, nullptr, 0, options));
  }

  /// Collective. A communicator of the same ranks whose operations are independent of this one's.
  Communicator duplicate() {
    std::vector<detail::Wish> all = agree({.what = detail::Making::duplicate});
    std::vector<Rank> members(static_cast<std::size_t>(size()));
    std::iota(members.begin(), members.end(), 0);
    return *make_group(all, members);
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

  /// Ends the current and all further operations of this communicator on every rank. From any thread; never waits.
  void abort(const std::string& why = {}) {
    if (engine_) engine_->abort(why);
  }

  /// The deadline of calls that name none.
  nanoseconds timeout() const { return timeout_; }
  void set_timeout(nanoseconds timeout) { timeout_ = positive(timeout); }

  /// Which algorithm a call of so many bytes would take (of the larger side, see Layout::items) and why: what each was
  /// measured or is estimated to take. `symmetric`: the buffers come from allocate(). Local; the same on all ranks.
  [[gnu::cold]] std::string explain(Collective operation, std::size_t bytes, bool symmetric = false) {
    if (!chooser_) refuse_moved();
    const bool direct = operation != Collective::barrier && (symmetric || one_address_space_);
    const AlgorithmRef& asked = overrides_.of(operation);
    const bool follows = asked && reaches(asked, direct);
    const AlgorithmRef chosen = follows ? asked : chooser_->choose(operation, bytes, {direct});
    std::string text = detail::concat({name_of(operation), " of ", bytes, " bytes, ", size(), " ranks: ", chosen.name,
                                       follows ? ", because TALLY_ALGORITHM says so" : ", the least time for its size class", "\n"});
    for (const Chooser::Candidate& candidate : chooser_->candidates(operation, bytes, {direct})) {
      char line[128];
      std::snprintf(line, sizeof line, "  %-20s %12.3f us  %s\n", std::string(candidate.algorithm.name).c_str(), candidate.estimate.microseconds, candidate.estimate.measured ? "measured" : "estimated");
      text += line;
    }
    if (group_ > 1 && group_ < size()) text += detail::concat({"  ranks that follow each other share a cache or a socket in groups of ", group_, "\n"});
    if (const std::string problem = engine_->kernel_problem(); !problem.empty()) text += detail::concat({"  single_copy is done as staged: ", problem, "\n"});
    else if (operation != Collective::barrier && engine_->stages() && !chooser_->has_measured(find_algorithm(operation, SingleCopy::name), operation, bytes)) text += "  single_copy is not measured: the kernel's copies are chosen by measurement alone (tally_perf --tune)\n";
    if (!direct && operation != Collective::barrier) text += "  zero_copy needs memory from allocate(): these ranks cannot reach each other's private memory\n";
    return text;
  }

  const Ledger& ledger() const { return engine().ledger(); }
  std::string_view transport_name() const { return engine().transport_name(); }
  /// What the transport has moved since the communicator was made.
  TransportCounters counters() const { return engine().counters(); }

 private:
  // Making communicators and memory together. Whatever goes wrong there goes wrong on all ranks, and this communicator goes on.

  void tell_all(detail::Wish mine, std::vector<detail::Wish>& all) {
    all.resize(static_cast<std::size_t>(size()));
    try {
      all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
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
    return Communicator(std::move(opened), timeout_, detail::model_within(chooser_->model(), size_, members), overrides_);
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

  struct Input {
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
    const SymmetricMemory* memory = nullptr;
    bool symmetric = false;  // also on ranks that have no such buffer in this call
  };
  struct Output {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    const SymmetricMemory* memory = nullptr;
    bool symmetric = false;
    operator Input() const { return {data, bytes, memory, symmetric}; }
  };
  template <class R>
  static auto memory_of(const char* name, R& range) {
    using Memory = std::conditional_t<WritableElements<R&>, Output, Input>;
    using Byte = std::remove_pointer_t<decltype(Memory::data)>;
    const std::size_t bytes = std::ranges::size(range) * sizeof(ValueOf<R>);
    auto* data = reinterpret_cast<Byte*>(std::ranges::data(range));
    if (!data && bytes > 0) refuse_null(name, std::ranges::size(range));
    if constexpr (SymmetricElements<R>) return Memory{data, bytes, range.symmetric_memory(), true};
    else return Memory{data, bytes};
  }
  /// The output of a rank that has none: it still says in which memory the others' lies.
  template <class R>
  static Output nowhere(R& range) {
    if constexpr (SymmetricElements<R>) return {nullptr, 0, range.symmetric_memory(), true};
    else return {};
  }
  /// Whether all ranks can reach what a share needs of the others' buffers. The same on all ranks.
  bool reachable(Collective operation, const Input& in, const Output& out) const {
    if (one_address_space_) return true;
    const bool reads = operation != Collective::all_gather && operation != Collective::broadcast, writes = operation != Collective::reduce_scatter;
    return (in.symmetric || !reads) && (out.symmetric || !writes);
  }
  bool reaches(const AlgorithmRef& algorithm, bool direct) const { return !algorithm.share || (algorithm.is(Reach::direct) ? direct : engine_->stages()); }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_algorithm(Collective operation, std::string_view name) {
    std::string known;
    for (const std::string_view each : algorithms_for(operation)) known.append(" ").append(each);
    throw Error(Errc::invalid_argument, {name_of(operation), ": no algorithm is called '", name, "'; there are", known});
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_unreachable(const AlgorithmRef& algorithm) {
    if (!algorithm.is(Reach::direct)) throw Error(Errc::unsupported, {algorithm.name, " needs blocks of shared memory, for which TALLY_SLOT_BUDGET is too small with so many ranks"});
    throw Error(Errc::unsupported, {algorithm.name, " needs memory from allocate(), or ranks that are threads: other ranks cannot reach these buffers"});
  }
  AnyEngine& engine() const {
    if (!engine_) refuse_moved();
    return *engine_;
  }
  // Out of line, so that the checks can be inlined.
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_null(const char* name, std::size_t count) {
    throw Error(Errc::invalid_argument, {name, " is null but has ", count, " elements"});
  }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_moved() { throw Error(Errc::invalid_argument, "this communicator was moved from"); }
  [[noreturn, gnu::cold, gnu::noinline]] static void refuse_overlap(Collective operation) {
    throw Error(Errc::invalid_argument, {name_of(operation), ": in and out overlap without being in place"});
  }

  // What each operation's arguments mean, checked.
  template <class A, class Data, class Op>
  Call all_reduce_call(Data& data, const Op& op, const CallOptions& options) {
    const Output memory = memory_of("data", data);
    return folding<A, Collective::all_reduce, ValueOf<Data>>(memory, memory, std::ranges::size(data), op, 0, options);
  }
  template <class A, class In, class Out, class Op>
  Call all_reduce_call(In& in, Out& out, const Op& op, const CallOptions& options) {
    expect_count("all_reduce: out", std::ranges::size(out), std::ranges::size(in));
    return folding<A, Collective::all_reduce, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), op, 0, options);
  }
  template <class A, class In, class Out, class Op>
  Call reduce_call(In& in, Out& out, const Op& op, Rank root, const CallOptions& options) {
    expect_root("reduce", root);
    if (rank() == root) expect_count("reduce: out", std::ranges::size(out), std::ranges::size(in));
    const Output result = rank() == root ? memory_of("out", out) : nowhere(out);
    return folding<A, Collective::reduce, ValueOf<In>>(memory_of("in", in), result, std::ranges::size(in), op, root, options);
  }
  template <class A, class Data>
  Call broadcast_call(Data& data, Rank root, const CallOptions& options) {
    expect_root("broadcast", root);
    return moving<A, Collective::broadcast, ValueOf<Data>>(Input{}, memory_of("data", data), std::ranges::size(data), root, options);
  }
  template <class A, class In, class Out>
  Call all_gather_call(In& in, Out& out, const CallOptions& options) {
    expect_count("all_gather: out", std::ranges::size(out), product(std::ranges::size(in)));
    return moving<A, Collective::all_gather, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(in), 0, options);
  }
  template <class A, class In, class Out, class Op>
  Call reduce_scatter_call(In& in, Out& out, const Op& op, const CallOptions& options) {
    expect_count("reduce_scatter: in", std::ranges::size(in), product(std::ranges::size(out)));
    return folding<A, Collective::reduce_scatter, ValueOf<In>>(memory_of("in", in), memory_of("out", out), std::ranges::size(out), op, 0, options);
  }

  /// Operations that combine.
  template <class A, Collective O, class T, class Op>
  [[gnu::always_inline]] Call folding(const Input& in, const Output& out, std::size_t count, const Op& op, Rank root, const CallOptions& options) {
    void (*finish)(void*, std::size_t, int) = nullptr;
    if constexpr (std::same_as<Op, Mean>) finish = detail::divide<T>;
    return call<A, O, T>(in, out, count, fold_of<T>(op), detail::operator_code<Op>(), finish, root, options);
  }
  /// Operations that only move.
  template <class A, Collective O, class T>
  [[gnu::always_inline]] Call moving(const Input& in, const Output& out, std::size_t count, Rank root, const CallOptions& options) {
    return call<A, O, T>(in, out, count, {}, 0, nullptr, root, options);
  }
  template <class A, Collective O, class T>
  [[gnu::always_inline]] Call call(const Input& in, const Output& out, std::size_t count, Fold fold, std::uint16_t op, void (*finish)(void*, std::size_t, int), Rank root, const CallOptions& options) {
    if (!engine_) refuse_moved();  // nothing below it is there, either
    const bool shared = in_place(O, in, out), direct = O != Collective::barrier && reachable(O, in, out);
    const std::size_t bytes = Layout{O, rank_, size_, root, count}.items() * sizeof(T);
    // Everything below is made in one go and where it stays: what is copied right after it was written in parts costs ten times as much.
    const nanoseconds timeout = options.timeout ? positive(*options.timeout) : timeout_;
    const auto made = [&](const AlgorithmRef& algorithm) {
      return Call{{O, rank_, size_, root, count, shared, group_, nullptr}, algorithm, in.data, out.data, element_type<T>(), sizeof(T), op, fold, finish, timeout, in.memory, out.memory};
    };
    if constexpr (std::same_as<A, Auto>) {
      if (!options.algorithm.empty() || overrides_.of(O)) return made(asked_for(O, options.algorithm, bytes, direct));
      return made(chooser_->choose(O, bytes, {direct}));
    } else {
      static_assert(Algorithm<A, O>, "this algorithm does not offer this operation");
      static constexpr AlgorithmRef algorithm = algorithm_ref<A, O>();
      if (!reaches(algorithm, direct)) refuse_unreachable(algorithm);
      return made(algorithm);
    }
  }
  /// The algorithm that the call names, or the environment if it can do this one, or the best.
  [[gnu::noinline]] AlgorithmRef asked_for(Collective operation, std::string_view name, std::size_t bytes, bool direct) {
    if (name.empty()) return reaches(overrides_.of(operation), direct) ? overrides_.of(operation) : chooser_->choose(operation, bytes, {direct});
    const AlgorithmRef algorithm = find_algorithm(operation, name);
    if (!algorithm) refuse_algorithm(operation, name);
    if (!reaches(algorithm, direct)) refuse_unreachable(algorithm);
    return algorithm;
  }

  /// In place is: the same span, or this rank's block of the larger one. Any other overlap is an error.
  bool in_place(Collective operation, const Input& in, const Output& out) const {
    if (in.bytes == 0 || out.bytes == 0) return false;
    const std::less<> before;
    if (!before(in.data, out.data + out.bytes) || !before(out.data, in.data + in.bytes)) return false;
    const std::size_t mine = static_cast<std::size_t>(rank()) * std::min(in.bytes, out.bytes);
    const std::byte* const expected_in = out.data + (operation == Collective::all_gather ? mine : 0);
    const std::byte* const expected_out = in.data + (operation == Collective::reduce_scatter ? mine : 0);
    if (operation == Collective::reduce_scatter ? out.data == expected_out : in.data == expected_in) return true;
    refuse_overlap(operation);
  }
  std::size_t product(std::size_t count) const {
    std::size_t total = 0;
    if (__builtin_mul_overflow(count, static_cast<std::size_t>(size()), &total)) throw Error(Errc::invalid_argument, {count, " elements times ", size(), " ranks overflow"});
    return total;
  }
  void expect_count(const char* name, std::size_t count, std::size_t expected) const {
    if (count != expected) throw Error(Errc::invalid_argument, {name, " has ", count, " elements, expected ", expected});
  }
  void expect_root(const char* operation, Rank root) const {
    if (root < 0 || root >= size())
      throw Error(Errc::invalid_argument, {operation, ": root ", root, " is not a rank; ranks are 0 to ", size() - 1});
  }
  static nanoseconds positive(nanoseconds timeout) {
    if (timeout <= nanoseconds{0}) throw Error(Errc::invalid_argument, {"a timeout must be longer than 0, not ", timeout.count(), " ns"});
    return std::min(timeout, longest_timeout);
  }

  std::shared_ptr<AnyEngine> engine_;  // shared with persistent operations
  Rank rank_;
  int size_;
  nanoseconds timeout_;
  bool one_address_space_;
  int group_;  // see Shape
  std::unique_ptr<Chooser> chooser_;
  AlgorithmOverrides overrides_;
};

}  // namespace tally::inline v0
