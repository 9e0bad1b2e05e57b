// SPDX-License-Identifier: Apache-2.0
// One call of a collective with all that is to be known about it: what each rank puts in, what must come out, what must
// stay as it was. Element types and operators are behind one interface (Kind), so that a test of many combinations is
// compiled once for each type and not for each combination.
#pragma once

#include <algorithm>
#include <array>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "processes.hpp"

namespace test {

using tally::Collective;
using tally::Communicator;
using tally::Order;
using tally::Rank;
using tally::Report;

enum class Form : std::uint8_t { blocking, background, persistent };

/// The arguments of a call, untyped.
struct Arguments {
  Collective operation;
  Form form = Form::blocking;
  Rank root = 0;
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
  std::size_t in_count = 0, out_count = 0;
  bool twice = false;  // the same again, where that gives the same
  tally::CallOptions options = {};
};

/// An element type, what each rank puts in, and an operator unless it is only moved.
class Kind {
 public:
  Kind(std::string named, std::size_t bytes) : name(std::move(named)), size(bytes) {}
  virtual ~Kind() = default;
  /// Elements first..first+count-1 of what a rank has to give.
  virtual void inputs(std::byte* to, Rank rank, std::size_t first, std::size_t count) const = 0;
  /// Those elements of ranks 0..ranks-1, folded in their order; n is for the mean.
  virtual void folded(std::byte* to, int ranks, int n, std::size_t first, std::size_t count) const = 0;
  virtual bool equal(const std::byte* a, const std::byte* b, std::size_t count) const = 0;
  virtual Report call(Communicator& comm, const Arguments& a) const = 0;
  /// Started, not waited for.
  virtual tally::Operation start(Communicator& comm, const Arguments& a) const = 0;

  const std::string name;
  const std::size_t size;
  bool folds = false, commutes = false, every_form = false, scans = true;
};

namespace detail {

template <class Now, class Later, class Kept>
Report in_form(const Arguments& a, Now&& now, Later&& later, Kept&& kept) {
  if (a.form == Form::blocking) return now();
  if (a.form == Form::background) return later().wait();
  tally::Persistent operation = kept();
  if (a.twice) operation.run();
  return operation.run();
}

template <class T>
struct Spans {
  explicit Spans(const Arguments& a) : in(reinterpret_cast<const T*>(a.in), a.in_count), out(reinterpret_cast<T*>(a.out), a.out_count) {}
  std::span<const T> in;
  std::span<T> out;
};

template <class T>
Report move(Communicator& comm, const Arguments& a) {
  const Spans<T> spans(a);
  const auto in = spans.in;
  const auto out = spans.out;
  const auto& o = a.options;
  switch (a.operation) {
    case Collective::broadcast: return in_form(a, [&] { return comm.broadcast(out, a.root, o); }, [&] { return comm.async_broadcast(out, a.root, o); }, [&] { return comm.persistent_broadcast(out, a.root, o); });
    case Collective::all_gather: return in_form(a, [&] { return comm.all_gather(in, out, o); }, [&] { return comm.async_all_gather(in, out, o); }, [&] { return comm.persistent_all_gather(in, out, o); });
    case Collective::gather: return in_form(a, [&] { return comm.gather(in, out, a.root, o); }, [&] { return comm.async_gather(in, out, a.root, o); }, [&] { return comm.persistent_gather(in, out, a.root, o); });
    case Collective::scatter: return in_form(a, [&] { return comm.scatter(in, out, a.root, o); }, [&] { return comm.async_scatter(in, out, a.root, o); }, [&] { return comm.persistent_scatter(in, out, a.root, o); });
    case Collective::all_to_all: return in_form(a, [&] { return comm.all_to_all(in, out, o); }, [&] { return comm.async_all_to_all(in, out, o); }, [&] { return comm.persistent_all_to_all(in, out, o); });
    case Collective::barrier: return in_form(a, [&] { return comm.barrier(o); }, [&] { return comm.async_barrier(o); }, [&] { return comm.persistent_barrier(o); });
    default: throw std::logic_error("does not move");
  }
}
template <class T>
tally::Operation start_move(Communicator& comm, const Arguments& a) {
  const Spans<T> spans(a);
  const auto in = spans.in;
  const auto out = spans.out;
  switch (a.operation) {
    case Collective::broadcast: return comm.async_broadcast(out, a.root, a.options);
    case Collective::all_gather: return comm.async_all_gather(in, out, a.options);
    case Collective::gather: return comm.async_gather(in, out, a.root, a.options);
    case Collective::scatter: return comm.async_scatter(in, out, a.root, a.options);
    case Collective::all_to_all: return comm.async_all_to_all(in, out, a.options);
    case Collective::barrier: return comm.async_barrier(a.options);
    default: throw std::logic_error("does not move");
  }
}
template <class T, class Op>
Report fold(Communicator& comm, const Arguments& a, const Op& op) {
  const Spans<T> spans(a);
  const auto in = spans.in;
  const auto out = spans.out;
  if constexpr (!std::same_as<Op, tally::Mean>) {  // a scan has none
    if (a.operation == Collective::scan) return comm.scan(in, out, op, a.options);
    if (a.operation == Collective::exclusive_scan) return comm.exclusive_scan(in, out, op, a.options);
  }
  switch (a.operation) {
    // The form with one buffer is another function.
    case Collective::all_reduce: return a.in == a.out && a.root == 0 ? comm.all_reduce(out, op, a.options) : comm.all_reduce(in, out, op, a.options);
    case Collective::reduce: return comm.reduce(in, out, op, a.root, a.options);
    case Collective::reduce_scatter: return comm.reduce_scatter(in, out, op, a.options);
    default: throw std::logic_error("does not fold");
  }
}
template <class T, class Op>
tally::Operation start_fold(Communicator& comm, const Arguments& a, const Op& op) {
  const Spans<T> spans(a);
  const auto in = spans.in;
  const auto out = spans.out;
  if constexpr (!std::same_as<Op, tally::Mean>) {  // a scan has none
    if (a.operation == Collective::scan) return comm.async_scan(in, out, op, a.options);
    if (a.operation == Collective::exclusive_scan) return comm.async_exclusive_scan(in, out, op, a.options);
  }
  switch (a.operation) {
    case Collective::all_reduce: return a.in == a.out && a.root == 0 ? comm.async_all_reduce(out, op, a.options) : comm.async_all_reduce(in, out, op, a.options);
    case Collective::reduce: return comm.async_reduce(in, out, op, a.root, a.options);
    case Collective::reduce_scatter: return comm.async_reduce_scatter(in, out, op, a.options);
    default: throw std::logic_error("does not fold");
  }
}
template <class T, class Op>
tally::Persistent keep_fold(Communicator& comm, const Arguments& a, const Op& op) {
  const Spans<T> spans(a);
  const auto in = spans.in;
  const auto out = spans.out;
  if constexpr (!std::same_as<Op, tally::Mean>) {  // a scan has none
    if (a.operation == Collective::scan) return comm.persistent_scan(in, out, op, a.options);
    if (a.operation == Collective::exclusive_scan) return comm.persistent_exclusive_scan(in, out, op, a.options);
  }
  switch (a.operation) {
    case Collective::all_reduce: return a.in == a.out && a.root == 0 ? comm.persistent_all_reduce(out, op, a.options) : comm.persistent_all_reduce(in, out, op, a.options);
    case Collective::reduce: return comm.persistent_reduce(in, out, op, a.root, a.options);
    case Collective::reduce_scatter: return comm.persistent_reduce_scatter(in, out, op, a.options);
    default: throw std::logic_error("does not fold");
  }
}

}  // namespace detail

/// Spec: `value(rank, i)`, and for what folds `Wide`, `fold(Wide, Wide)` and `op(rank)`; `mean` divides at the end; `forms`
/// asks for background and persistent calls, too.
template <class T, class Spec>
class KindOf final : public Kind {
  static constexpr bool with_operator = requires { Spec::op(0); };
  static constexpr bool with_forms = requires { Spec::forms; };

 public:
  explicit KindOf(std::string named) : Kind(std::move(named), sizeof(T)) {
    folds = with_operator;
    if constexpr (with_operator) commutes = tally::is_commutative<decltype(Spec::op(0))>;
    every_form = with_forms;
    scans = !requires { Spec::mean; };
  }
  void inputs(std::byte* to, Rank rank, std::size_t first, std::size_t count) const override {
    T* const typed = reinterpret_cast<T*>(to);
    for (std::size_t i = 0; i < count; ++i) typed[i] = Spec::value(rank, first + i);
  }
  void folded(std::byte* to, int ranks, [[maybe_unused]] int n, std::size_t first, std::size_t count) const override {
    if constexpr (with_operator) {
      using Wide = typename Spec::Wide;
      const auto wide = [&](Rank r, std::size_t i) {
        if constexpr (requires { Spec::scaled(r, i); }) return static_cast<Wide>(Spec::scaled(r, i));
        else return static_cast<Wide>(Spec::value(r, i));
      };
      for (std::size_t i = 0; i < count; ++i) {
        Wide value = wide(0, first + i);
        for (Rank r = 1; r < ranks; ++r) value = Spec::fold(value, wide(r, first + i));
        if constexpr (requires { Spec::mean; }) value = value / static_cast<Wide>(n);
        reinterpret_cast<T*>(to)[i] = static_cast<T>(value);
      }
    }
  }
  bool equal(const std::byte* a, const std::byte* b, std::size_t count) const override {
    return std::equal(reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(a) + count, reinterpret_cast<const T*>(b));
  }
  Report call(Communicator& comm, const Arguments& a) const override {
    if constexpr (with_operator)
      if (tally::reduces(a.operation)) {
        const auto op = Spec::op(comm.rank());
        if constexpr (with_forms)
          return detail::in_form(a, [&] { return detail::fold<T>(comm, a, op); }, [&] { return detail::start_fold<T>(comm, a, op); }, [&] { return detail::keep_fold<T>(comm, a, op); });
        else return detail::fold<T>(comm, a, op);
      }
    return detail::move<T>(comm, a);
  }
  tally::Operation start(Communicator& comm, const Arguments& a) const override {
    if constexpr (with_operator && with_forms)
      if (tally::reduces(a.operation)) return detail::start_fold<T>(comm, a, Spec::op(comm.rank()));
    return detail::start_move<T>(comm, a);
  }
};

/// One combination. Ranks, transport and slots are its communicator's.
struct Case {
  Collective operation{};
  std::string_view algorithm;  // empty: the library's choice
  const Kind* kind = nullptr;
  std::size_t count = 0;
  bool in_place = false;
  Form form = Form::blocking;
  int root = 0;  // modulo n
  Order order = Order::any;

  std::string text(int n) const {
    return std::string(name_of(operation)) + " by " + std::string(algorithm.empty() ? "choice" : algorithm) + " of " + std::to_string(count) + " " + kind->name + " on " + std::to_string(n) + " ranks, root " +
           std::to_string(root % n) + (in_place ? ", in place" : "") + (form == Form::blocking ? "" : form == Form::background ? ", background" : ", persistent") + (order == Order::fixed ? ", fixed order" : "");
  }
  /// What the library must say of an algorithm that cannot do this; nothing if it can.
  std::optional<tally::Errc> refusal(bool one_address_space) const {
    if (algorithm.empty()) return {};
    const tally::AlgorithmRef known = tally::find_algorithm(operation, algorithm);
    const tally::Folding need = order == Order::fixed ? tally::Folding::fixed : kind->commutes ? tally::Folding::any : tally::Folding::ordered;
    if (tally::reduces(operation) && known.folding < need) return tally::Errc::invalid_argument;
    if (known.share && (form == Form::background || kind->size > 128)) return tally::Errc::unsupported;
    if (known.is(tally::Reach::direct) && !one_address_space) return tally::Errc::unsupported;
    return {};
  }
};

/// A case on this rank: its memory, what must come out, and nothing else touched.
class Trial {
 public:
  Trial(const Communicator& comm, const Case& what) : case_(what), kind_(*what.kind), n_(comm.size()), me_(comm.rank()) {
    const auto n = static_cast<std::size_t>(n_), me = static_cast<std::size_t>(me_);
    const std::size_t count = what.count, all = count * n;
    const Rank root = what.root % n_;
    const bool is_root = me_ == root;
    using enum Collective;
    const Collective o = what.operation;
    // How long each side is, where input and output begin in one buffer if in place, and what comes out.
    std::size_t in = count, out = count;
    if (o == reduce_scatter || o == all_to_all || (o == scatter && is_root)) in = all;
    if (o == scatter && !is_root) in = 0;
    if (o == broadcast) in = 0;
    if (o == all_gather || o == all_to_all || (o == gather && is_root)) out = all;
    if (o == barrier) in = out = 0;
    // Who has no result may have no buffer, or one that stays as it is.
    const bool has_result = !((o == reduce || o == gather) && !is_root) && !(o == exclusive_scan && me_ == 0);
    if ((o == reduce || o == gather) && !is_root) out = count % 2;
    const bool shared = what.in_place && (o != broadcast && o != barrier) && !((o == reduce || o == gather || o == scatter) && !is_root);
    const std::size_t in_first = shared && (o == all_gather || o == gather) ? me * count : 0, out_first = shared && (o == reduce_scatter || o == scatter) ? me * count : 0;
    make(first_, shared ? std::max(in, out) : out);
    if (!shared) make(second_, in);
    std::byte* const output = at(first_, out_first);
    std::byte* const input = at(shared ? first_ : second_, in_first);
    if (in > 0) kind_.inputs(input, me_, 0, in);
    if (o == broadcast && is_root) kind_.inputs(output, me_, 0, count);
    first_before_ = first_, second_before_ = second_;
    result_ = has_result ? out : 0;
    result_at_ = guard + out_first * kind_.size;
    make(expected_, result_);
    std::byte* const expected = at(expected_, 0);
    if (result_ == 0) {}
    else if (o == all_reduce || o == reduce) kind_.folded(expected, n_, n_, 0, count);
    else if (o == scan) kind_.folded(expected, me_ + 1, n_, 0, count);
    else if (o == exclusive_scan) kind_.folded(expected, me_, n_, 0, count);
    else if (o == reduce_scatter) kind_.folded(expected, n_, n_, me * count, count);
    else if (o == broadcast) kind_.inputs(expected, root, 0, count);
    else if (o == scatter) kind_.inputs(expected, root, me * count, count);
    else if (o == all_gather || o == gather)
      for (Rank r = 0; r < n_; ++r) kind_.inputs(at(expected_, static_cast<std::size_t>(r) * count), r, 0, count);
    else
      for (Rank r = 0; r < n_; ++r) kind_.inputs(at(expected_, static_cast<std::size_t>(r) * count), r, me * count, count);
    arguments_ = {o, what.form, o == all_reduce && !tally::has_root(o) ? static_cast<Rank>(what.root % 2) : root, input, output, in, out, !what.in_place, {.algorithm = what.algorithm}};
    if (what.order == Order::fixed) arguments_.options.order = Order::fixed;
  }

  void run(Communicator& comm) {
    const std::optional<tally::Errc> refused = case_.refusal(comm.transport_name() == "thread");
    Report report;
    const Caught c = caught([&] { report = kind_.call(comm, arguments_); });
    if (!refused) {
      expect(!c.error && !c.foreign, case_.text(n_) + ": " + c.text);
      check(report);
      return;
    }
    expect(c.is(*refused) && has(c.text, case_.algorithm), case_.text(n_) + ", which cannot be done: " + c.text);
    expect(first_ == first_before_ && second_ == second_before_, case_.text(n_) + ", which cannot be done: no memory is touched");
  }
  tally::Operation start(Communicator& comm) const { return kind_.start(comm, arguments_); }
  void check(const Report& report) const {
    const std::string what = case_.text(n_) + ", rank " + std::to_string(me_) + ": ";
    expect(kind_.equal(first_.data() + result_at_, expected_.data() + guard, result_), what + "the result");
    std::vector<std::byte> without = first_, before = first_before_;
    for (std::vector<std::byte>* each : {&without, &before}) std::memset(each->data() + result_at_, 0, result_ * kind_.size);
    expect(without == before, what + "nothing beside the result is written");
    expect(second_ == second_before_, what + "the input stays as it was");
    if (case_.algorithm.empty()) expect(std::ranges::count(tally::algorithms_for(case_.operation), report.algorithm_name()) == 1, what + "an algorithm of this operation is named");
    else if (case_.algorithm != "single_copy") expect(report.algorithm_name() == case_.algorithm, what + "the algorithm is named");
    expect(report.elapsed == report.busy() + report.idle() + report.undriven, what + "the report's times add up");
  }

 private:
  static constexpr std::size_t guard = 64;
  void make(std::vector<std::byte>& memory, std::size_t count) const { memory.assign(count * kind_.size + 2 * guard, std::byte{0xa5}); }
  std::byte* at(std::vector<std::byte>& memory, std::size_t element) const { return memory.data() + guard + element * kind_.size; }

  Case case_;
  const Kind& kind_;
  int n_;
  Rank me_;
  std::vector<std::byte> first_, second_, first_before_, second_before_, expected_;  // first_: the output, and the input where they are one
  std::size_t result_ = 0, result_at_ = 0;
  Arguments arguments_{};
};

}  // namespace test
