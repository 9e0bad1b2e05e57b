// SPDX-License-Identifier: Apache-2.0
// The collectives on memory of devices, ordered on streams: the same arguments as tally::Communicator's, whose ranks they are, and a stream.
// What a device is, its driver says: see cuda.hpp.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ranges>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "communicator.hpp"
#include "device_group/engine.hpp"

namespace tally::inline v0 {

/// Elements in a device's memory. The host must not touch them.
template <Element T>
class DeviceSpan : public std::ranges::view_base {
 public:
  DeviceSpan() = default;
  DeviceSpan(T* data, std::size_t size) : data_(data), size_(size) {}
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  static constexpr bool on_device = true;
  /// Elements first..first+count-1; Errc::invalid_argument if there are none such.
  DeviceSpan subspan(std::size_t first, std::size_t count) const {
    if (first > size_ || count > size_ - first) throw Error(Errc::invalid_argument, {"subspan: elements ", first, " to ", first + count, " of ", size_});
    return {data_ + first, count};
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};
template <Element T>
DeviceSpan<T> device_span(T* data, std::size_t size) { return {data, size}; }
/// Only to be read.
template <Element T>
class DeviceInput : public std::ranges::view_base {
 public:
  DeviceInput(const T* data, std::size_t size) : data_(data), size_(size) {}
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  static constexpr bool on_device = true;

 private:
  const T* data_ = nullptr;
  std::size_t size_ = 0;
};
template <Element T>
DeviceInput<T> device_span(const T* data, std::size_t size) { return {data, size}; }

/// DeviceSpan, DeviceSymmetric, or any span of elements that says `static constexpr bool on_device = true`.
template <class R>
concept DeviceElements = Elements<R> && std::remove_cvref_t<R>::on_device;
template <class R>
concept WritableDeviceElements = WritableElements<R> && DeviceElements<R>;
template <class In, class Out>
concept SameDeviceElements = SameElements<In, Out> && DeviceElements<In> && DeviceElements<Out>;

namespace detail {

/// In place of an operator that only devices apply: what a call is made of does not depend on it.
template <bool commutes>
struct OnDevice {
  template <class T>
  constexpr T operator()(const T& a, const T&) const { return a; }
};

}  // namespace detail
template <>
inline constexpr bool is_commutative<detail::OnDevice<true>> = true;

/// Memory that all ranks' devices can get at: collectives on it copy nothing. It goes when all ranks have destroyed theirs, and with the
/// communicator.
template <Element T>
class DeviceSymmetric {
 public:
  static constexpr bool on_device = true;
  DeviceSymmetric() = default;
  DeviceSymmetric(std::shared_ptr<T> memory, std::size_t size) : memory_(std::move(memory)), size_(size) {}
  T* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }
  DeviceSpan<T> span() const { return {data(), size_}; }
  operator DeviceSpan<T>() const { return span(); }
  DeviceSpan<T> subspan(std::size_t first, std::size_t count) const { return span().subspan(first, count); }

 private:
  std::shared_ptr<T> memory_;
  std::size_t size_ = 0;
};

/// A group of ranks with a device each, or with parts of one: those of the communicator that it is made of. All call the same operations in
/// the same order, one thread at a time. A call returns once its kernel is launched; bad arguments throw before that. What fails later is
/// thrown by the operation's wait() and by all further calls. Kernels of one communicator run one after the other, whatever their streams;
/// of those that are captured into graphs the caller has to see to that.
/// `D`: a device::Driver. `timed`: kernels keep account of their time.
template <device::Driver D, bool timed = true>
class DeviceCommunicator {
 public:
  using Stream = typename D::Stream;

  /// Collective over the ranks of `host`, which may go afterwards. Errc::no_resources where the ranks' kernels could not run at the same time.
  /// `meters`: device_meters() of tally/energy.hpp; without, joules are unknown.
  explicit DeviceCommunicator(Communicator& host, D driver = D(), const DeviceSettings& settings = {}, const EnergySources& meters = {}) : engine_(std::make_shared<Engine>(host, std::move(driver), settings, meters)) {}
  DeviceCommunicator(DeviceCommunicator&&) noexcept = default;
  DeviceCommunicator& operator=(DeviceCommunicator&&) noexcept = default;

  Rank rank() const { return engine().rank(); }
  int size() const { return engine().size(); }
  /// Blocks that an operation has at most.
  int blocks() const { return engine().blocks(); }
  /// How this rank's device gets at rank r's memory.
  device::Link link_to(Rank r) const {
    if (r < 0 || r >= size()) throw Error(Errc::invalid_argument, {"link_to: ", r, " is not a rank; ranks are 0 to ", size() - 1});
    return engine().link_to(r);
  }

  // As Communicator's calls of these names; in and out may be the same memory where they may there.

  template <class A = Auto, WritableDeviceElements Data, Reduction<ValueOf<Data>> Op>
  DeviceOperation all_reduce(Data&& data, const Op& op, Stream stream, const CallOptions& options = {}) {
    return fold<A, Collective::all_reduce, ValueOf<Data>>(calls().template all_reduce<Auto>(data, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation all_reduce(In&& in, Out&& out, const Op& op, Stream stream, const CallOptions& options = {}) {
    return fold<A, Collective::all_reduce, ValueOf<In>>(calls().template all_reduce<Auto>(in, out, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation reduce(In&& in, Out&& out, const Op& op, Rank root, Stream stream, const CallOptions& options = {}) {
    return fold<A, Collective::reduce, ValueOf<In>>(calls().template reduce<Auto>(in, out, stand_in<Op>, root, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation reduce_scatter(In&& in, Out&& out, const Op& op, Stream stream, const CallOptions& options = {}) {
    return fold<A, Collective::reduce_scatter, ValueOf<In>>(calls().template reduce_scatter<Auto>(in, out, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation scan(In&& in, Out&& out, const Op& op, Stream stream, const CallOptions& options = {}) {
    static_assert(!std::same_as<Op, Mean>, "a scan has no mean: each rank folds another number of values");
    return fold<A, Collective::scan, ValueOf<In>>(calls().template scan<Auto, Collective::scan>(in, out, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation exclusive_scan(In&& in, Out&& out, const Op& op, Stream stream, const CallOptions& options = {}) {
    static_assert(!std::same_as<Op, Mean>, "a scan has no mean: each rank folds another number of values");
    return fold<A, Collective::exclusive_scan, ValueOf<In>>(calls().template scan<Auto, Collective::exclusive_scan>(in, out, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, WritableDeviceElements Data>
  DeviceOperation broadcast(Data&& data, Rank root, Stream stream, const CallOptions& options = {}) {
    return move<A, Collective::broadcast, ValueOf<Data>>(calls().template broadcast<Auto>(data, root, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation all_gather(In&& in, Out&& out, Stream stream, const CallOptions& options = {}) {
    return move<A, Collective::all_gather, ValueOf<In>>(calls().template all_gather<Auto>(in, out, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation gather(In&& in, Out&& out, Rank root, Stream stream, const CallOptions& options = {}) {
    return move<A, Collective::gather, ValueOf<In>>(calls().template gather<Auto>(in, out, root, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation scatter(In&& in, Out&& out, Rank root, Stream stream, const CallOptions& options = {}) {
    return move<A, Collective::scatter, ValueOf<In>>(calls().template scatter<Auto>(in, out, root, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation all_to_all(In&& in, Out&& out, Stream stream, const CallOptions& options = {}) {
    return move<A, Collective::all_to_all, ValueOf<In>>(calls().template all_to_all<Auto>(in, out, plain(options), foreground), stream, options);
  }
  /// What all ranks' streams did before is done before what any of them does after.
  DeviceOperation barrier(Stream stream, const CallOptions& options = {}) {
    return engine().template start<unsigned char>(calls().template barrier<Auto>(plain(options), foreground), device::Mover<unsigned char>{}, stream, {});
  }

  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation all_gather_v(In&& in, Out&& out, Counts counts, Counts displacements, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return move<A, Collective::all_gather_v, ValueOf<In>>(calls().template all_gather_v<Auto>(in, out, counts, displacements, extents, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out, Reduction<ValueOf<In>> Op>
    requires SameDeviceElements<In, Out>
  DeviceOperation reduce_scatter_v(In&& in, Out&& out, Counts counts, Counts displacements, const Op& op, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return fold<A, Collective::reduce_scatter_v, ValueOf<In>>(calls().template reduce_scatter_v<Auto>(in, out, counts, displacements, extents, stand_in<Op>, plain(options), foreground), op, stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation gather_v(In&& in, Out&& out, Counts counts, Counts displacements, Rank root, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return move<A, Collective::gather_v, ValueOf<In>>(calls().template gather_v<Auto>(in, out, counts, displacements, root, extents, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation scatter_v(In&& in, Out&& out, Counts counts, Counts displacements, Rank root, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return move<A, Collective::scatter_v, ValueOf<In>>(calls().template scatter_v<Auto>(in, out, counts, displacements, root, extents, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation all_to_all_v(In&& in, Counts in_counts, Counts in_displacements, Out&& out, Counts out_counts, Counts out_displacements, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return move<A, Collective::all_to_all_v, ValueOf<In>>(calls().template all_to_all_v<Auto>(in, in_counts, in_displacements, out, out_counts, out_displacements, extents, plain(options), foreground), stream, options);
  }
  template <class A = Auto, class In, class Out>
    requires SameDeviceElements<In, Out>
  DeviceOperation neighbour_exchange(In&& in, Out&& out, Ranks to, Ranks from, Stream stream, const CallOptions& options = {}) {
    Extents extents;
    return move<A, Collective::neighbour_exchange, ValueOf<In>>(calls().template neighbour_exchange<Auto>(in, out, to, from, extents, plain(options), foreground), stream, options);
  }

  /// Collective. `count` elements on every rank's device, zero, which all ranks' devices can get at: pass it, its span() or subspan() as the
  /// same argument on all ranks, and collectives on it are done by loads and stores alone. Waits for this communicator's operations.
  template <Element T>
  DeviceSymmetric<T> allocate(std::size_t count) {
    if (count > (std::size_t{1} << 46) / sizeof(T)) throw Error(Errc::invalid_argument, {"allocate: ", count, " elements are too many"});
    auto* const memory = reinterpret_cast<T*>(engine().allocate(count * sizeof(T)));
    return {std::shared_ptr<T>(memory, [group = std::weak_ptr<Engine>(engine_)](T* released) {
              if (const auto engine = group.lock()) engine->release(reinterpret_cast<const std::byte*>(released));
            }),
            count};
  }

  /// Operations of so many bytes go in packets.
  std::size_t packets_up_to() const { return engine().packets_up_to(); }
  /// Collective. Measures here up to which size packets are faster than loads and stores of memory from allocate(), in steps of a factor of two
  /// and at most up to DeviceSettings::packet_bytes, and chooses by that from here on. Between hosts there is nothing to choose.
  std::size_t tune(Stream stream) {
    static_assert(timed, "what is measured is the kernels' own account");
    if (!engine().within_reach()) return packets_up_to();
    constexpr std::size_t first = 1024;
    const std::size_t most = packets_up_to();
    const auto memory = allocate<float>(most / sizeof(float) + 1);
    std::size_t best = 0;
    for (std::size_t bytes = std::min(first, most); bytes > 0 && bytes <= most; bytes = bytes == most ? most + 1 : std::min(2 * bytes, most)) {
      nanoseconds taken[2];
      for (const int way : {0, 1}) taken[way] = median_of(memory.subspan(0, std::max<std::size_t>(bytes / sizeof(float), 1)), way == 0 ? detail::packets_name : std::string_view("zero_copy"), stream);
      if (taken[0] > taken[1]) break;
      best = bytes;
    }
    engine().use_packets_up_to(best);
    return best;
  }

  /// What waits in a kernel gives up, on all ranks, and so do all further operations. From any thread; never waits.
  void abort() {
    if (engine_) engine_->abort();
  }
  /// Waits for all operations that were launched, but for captured ones. Throws what the first that failed failed with.
  void wait() {
    engine().results().finish_all();
    engine().results().refuse_if_over();
  }
  nanoseconds timeout() const { return engine().link().timeout(); }
  void set_timeout(nanoseconds timeout) { engine().link().set_timeout(timeout); }

  /// Of all operations that are done, those of graphs included.
  const Ledger& ledger() const { return engine().results().ledger(); }
  Account account(std::string_view name = "devices", std::string_view job = {}) const { return ledger().account(name, job); }

 private:
  using Engine = detail::DeviceEngine<D, timed>;
  static constexpr CallMaker::Way foreground = CallMaker::Way::foreground;
  template <class Op>
  static constexpr detail::OnDevice<is_commutative<Op>> stand_in{};

  /// Of an all_reduce on the slowest rank, as all ranks know it.
  nanoseconds median_of(DeviceSpan<float> data, std::string_view algorithm, Stream stream) {
    std::vector<DeviceOperation> operations;
    for (int k = 0; k < 25; ++k) operations.push_back(all_reduce(data, max, stream, {.algorithm = algorithm}));
    std::vector<std::int64_t> times;
    for (std::size_t k = 4; k < operations.size(); ++k) times.push_back(operations[k].wait().elapsed.count());
    std::ranges::nth_element(times, times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2));
    std::int64_t median = times[times.size() / 2];
    engine().link().all_reduce(std::span(&median, 1), max);
    return nanoseconds(median);
  }
  Engine& engine() const {
    if (!engine_) throw Error(Errc::invalid_argument, "this device communicator was moved from");
    return *engine_;
  }
  CallMaker& calls() const { return engine().calls(); }
  /// Which algorithm does it is not the host's choice.
  static CallOptions plain(CallOptions options) {
    options.algorithm = {};
    return options;
  }
  template <class A, Collective O>
  static AlgorithmRef wish(const CallOptions& options) {
    if constexpr (!std::same_as<A, Auto>) {
      static_assert(Algorithm<A, O>, "this algorithm does not offer this operation");
      static constexpr AlgorithmRef algorithm = algorithm_ref<A, O>();
      return algorithm.share && !algorithm.is(Reach::direct) ? Engine::find(O, algorithm.name) : algorithm;
    } else {
      return options.algorithm.empty() ? AlgorithmRef() : Engine::find(O, options.algorithm);
    }
  }
  template <class A, Collective O, class T, class Op>
  DeviceOperation fold(Call call, const Op& op, Stream stream, const CallOptions& options) {
    static_assert(std::is_trivially_copyable_v<Op>, "an operator travels to the device as its bytes");
    call.operator_code = detail::operator_code<Op>();
    return engine().template start<T>(call, device::Folder<T, Op>{op, size()}, stream, wish<A, O>(options));
  }
  template <class A, Collective O, class T>
  DeviceOperation move(const Call& call, Stream stream, const CallOptions& options) {
    return engine().template start<T>(call, device::Mover<T>{}, stream, wish<A, O>(options));
  }

  std::shared_ptr<Engine> engine_;
};

}  // namespace tally::inline v0

template <class T>
inline constexpr bool std::ranges::enable_borrowed_range<tally::DeviceSpan<T>> = true;
template <class T>
inline constexpr bool std::ranges::enable_borrowed_range<tally::DeviceInput<T>> = true;
