// SPDX-License-Identifier: Apache-2.0
// One rank of a group whose buffers lie on devices: which kernel does a call, in which order kernels run, and what a call may be given.
// The host waits for nothing unless somebody asks for a result, or more operations are in flight than there are places for their accounts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../communicator.hpp"
#include "../device/driver.hpp"
#include "../device/kernels.hpp"
#include "plans.hpp"
#include "results.hpp"
#include "shared_memory.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct DeviceSettings {
  int blocks = 0;   // of each rank; 0: up to 32 (8 where ranks are on several hosts), as many as the ranks of a device can have at once
  int threads = 0;  // of a block; 0: as many as the device likes
  std::size_t packet_bytes = std::size_t{64} << 10;  // longest operation that is sent in packets
  std::size_t frame_bytes = std::size_t{32} << 10;   // what algorithms of steps send at a time
};

namespace detail {

inline constexpr std::string_view packets_name = "packets";

template <device::Driver D, bool timed>
class DeviceEngine {
 public:
  using Stream = typename D::Stream;

  /// Collective over the ranks of `host`.
  DeviceEngine(Communicator& host, D driver, const DeviceSettings& settings, const EnergySources& meters) : driver_(std::move(driver)), link_(host.duplicate()), memory_(link_, driver_), plans_(driver_) {
    meet(settings);
    const AccountSettings& theirs = host.ledger().settings();
    memory_.attempt_together("its accounts", [&] { results_ = std::make_shared<DeviceResults<D>>(driver_, size(), rank(), layout_.blocks, AccountSettings(no_model(), meters, theirs.carbon)); });
    results_->set_reason([this] { return memory_.problem(); });
    link_.barrier();
  }
  DeviceEngine(const DeviceEngine&) = delete;
  ~DeviceEngine() {
    results_->finish_all();
    memory_.close();
    results_->close();  // frees memory of the host's, for which kernels may be waited for: after the others have ended theirs
  }

  int size() const { return link_.size(); }
  Rank rank() const { return link_.rank(); }
  int blocks() const { return layout_.blocks; }
  /// Operations that are longer do not go in packets; at most DeviceSettings::packet_bytes.
  std::size_t packets_up_to() const { return packets_up_to_; }
  void use_packets_up_to(std::size_t bytes) { packets_up_to_ = std::min(bytes, packet_bytes_); }
  bool within_reach() const { return memory_.within_reach(); }
  device::Link link_to(Rank r) const { return links_[static_cast<std::size_t>(r)]; }
  Communicator& link() { return link_; }
  CallMaker& calls() { return link_.calls(); }
  DeviceResults<D>& results() { return *results_; }
  /// From any thread; waits for nothing.
  void abort() {
    results_->abort();
    memory_.tell_all(device::Broken{device::Failure::aborted, rank()}.pack());
  }

  std::byte* allocate(std::size_t bytes) {
    results_->refuse_if_over();
    return memory_.allocate(bytes, [&] { results_->finish_all(); });
  }
  void release(const std::byte* memory) { memory_.release(memory); }

  /// Launches the call, whose arguments have been checked but for where they lie. `wish`: what is to do it, if the caller says so.
  template <class T, class F>
  DeviceOperation start(Call call, const F& folder, Stream stream, const AlgorithmRef& wish) {
    results_->refuse_if_over();
    const bool captured = driver_.captures(stream);
    expect_here<T>(call, "in", call.input, call.layout.input_count());
    expect_here<T>(call, "out", call.output, call.layout.output_count());
    call.grain = sizeof(T);
    if (call.layout.operation == Collective::barrier) call.input = call.output = memory_.token();
    const Way way = choose(call, wish);
    call.fingerprint = Fingerprint::of(call).pack();
    if (way == Way::barrier) {
      DevicePlan nothing;
      return launch(call, nothing, 1, stream, captured, State::protocol, [&](const device::RankView& view) { driver_.launch(device::BarrierKernel<timed>{view}, 1, threads_for(0), stream); });
    }
    if constexpr (!F::scales)
      if (way == Way::steps) return start_steps<T>(call, folder, stream, captured, call.input);
    if constexpr (F::scales)
      if (way == Way::steps) return start_scaled<T>(call, folder, stream, captured);
    if (size() <= device::few_ranks) return way == Way::packets ? start_packets<T, device::few_ranks>(call, folder, stream, captured) : start_share<T, device::few_ranks>(call, folder, stream, captured);
    return way == Way::packets ? start_packets<T, device::most_ranks>(call, folder, stream, captured) : start_share<T, device::most_ranks>(call, folder, stream, captured);
  }
  /// By name; `packets` is one that only devices have.
  static AlgorithmRef find(Collective operation, std::string_view name) {
    if (name == packets_name) return packets();
    if (const AlgorithmRef found = find_algorithm(operation, name); found && (found.generate || found.is(Reach::direct))) return found;
    std::string known = concat({" ", packets_name});
    for (const std::string_view each : algorithms_for(operation))
      if (const AlgorithmRef one = find_algorithm(operation, each); one.generate || one.is(Reach::direct)) known += concat({" ", each});
    throw Error(Errc::invalid_argument, {"no algorithm '", name, "' offers ", name_of(operation), " on devices; these do:", known});
  }

 private:
  enum class Way : std::uint8_t { barrier, packets, shares, steps };
  static constexpr std::size_t most_setting = std::size_t{1} << 28;
  static constexpr std::size_t channel_bytes = std::size_t{64} << 10;  // of steps: what is worth a block

  static ModelMeter no_model() {
    ModelMeter none;
    none.enabled = false;
    return none;
  }
  static AlgorithmRef packets() {
    AlgorithmRef ref;
    ref.name = packets_name, ref.code = algorithm_code(packets_name), ref.folding = Folding::fixed;
    return ref;
  }

  struct Hello {
    device::DeviceId device{};
    std::uint64_t process = 0, host = 0;
    std::int32_t blocks = 0, threads = 0;
    DeviceSettings settings;
  };
  void meet(const DeviceSettings& settings) {
    const int n = size();
    if (n > device::most_ranks) throw Error(Errc::unsupported, {"a device communicator has at most ", device::most_ranks, " ranks, not ", n});
    const Hello mine{driver_.id(), driver_.process(), driver_.host(), driver_.most_blocks(), driver_.most_threads(), settings};
    std::vector<Hello> all(static_cast<std::size_t>(n));
    link_.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    const bool several_hosts = std::ranges::any_of(all, [&](const Hello& each) { return each.host != all[0].host; });
    int blocks = several_hosts ? 8 : 32, threads = mine.threads;
    std::vector<Rank> far;
    for (Rank r = 0; r < n; ++r) {
      const Hello& each = all[static_cast<std::size_t>(r)];
      expect_settings(r, each.settings, all[0].settings);
      const auto sharing = std::ranges::count_if(all, [&](const Hello& other) { return other.device == each.device && other.host == each.host; });
      const auto possible = static_cast<int>(each.blocks / sharing);
      if (const int least = std::max(1, settings.blocks); possible < least)
        throw Error(Errc::no_resources, {"device communicator: ", sharing, " ranks share rank ", r, "'s device, which runs ", each.blocks, " blocks at the same time, and each is to have ", least, ": kernels would wait for others that cannot run"}, {rank(), r, 0, {}});
      blocks = std::min(blocks, possible), threads = std::min(threads, each.threads);
      if (each.host != mine.host) far.push_back(r);
      links_.push_back(each.host != mine.host ? device::Link::network : driver_.link_to(each.device));
    }
    const auto here = std::ranges::count_if(all, [&](const Hello& other) { return other.device == mine.device && other.process == mine.process && other.host == mine.host; });
    memory_.attempt_together("ranks that share a device", [&] { driver_.expect_neighbours(static_cast<int>(here) - 1); });
    if (settings.blocks < 0 || settings.blocks > 1024) throw Error(Errc::invalid_argument, {"device communicator: ", settings.blocks, " blocks; 1 to 1024 are possible, or 0"});
    if (settings.threads < 0 || settings.threads > threads) throw Error(Errc::invalid_argument, {"device communicator: ", settings.threads, " threads in a block; 1 to ", threads, " are possible, or 0"});
    if (settings.blocks > 0) blocks = settings.blocks;
    threads_ = settings.threads > 0 ? settings.threads : threads;
    packet_bytes_ = packets_up_to_ = settings.packet_bytes;
    if (settings.packet_bytes > most_setting || settings.frame_bytes > most_setting) throw Error(Errc::invalid_argument, {"device communicator: packets up to ", settings.packet_bytes, " bytes, frames of ", settings.frame_bytes, "; ", most_setting, " are possible"});
    const auto many = static_cast<std::size_t>(blocks);
    const std::size_t packets = settings.packet_bytes / 8 / many + static_cast<std::size_t>(threads_) + static_cast<std::size_t>(n) + 1;
    layout_ = {n, blocks, packets, 2, std::max<std::size_t>(settings.frame_bytes / 16 * 16, 16)};
    memory_.open_window(layout_, std::move(far));
  }
  void expect_settings(Rank r, const DeviceSettings& theirs, const DeviceSettings& first) const {
    const auto text = [](const DeviceSettings& s) { return concat({s.blocks, " blocks of ", s.threads, " threads, packets up to ", s.packet_bytes, " bytes, frames of ", s.frame_bytes}); };
    if (theirs.blocks != first.blocks || theirs.threads != first.threads || theirs.packet_bytes != first.packet_bytes || theirs.frame_bytes != first.frame_bytes)
      throw Error(Errc::mismatch, {"device communicator: rank 0 was given ", text(first), ", rank ", r, " ", text(theirs)}, {rank(), r, 0, {}});
  }

  template <class T>
  void expect_here(const Call& call, const char* name, const std::byte* data, std::size_t count) const {
    if (call.layout.operation == Collective::barrier || count == 0 || !data) return;
    const auto refuse = [&](std::initializer_list<Piece> what) { throw Error(Errc::invalid_argument, {name_of(call.layout.operation), ": ", name, " ", concat(what)}); };
    if (reinterpret_cast<std::uintptr_t>(data) % alignof(T) != 0) refuse({"begins at an address that is no multiple of ", alignof(T), ", as its elements' must be"});
    switch (driver_.memory_at(data)) {
      case device::Memory::device: return;
      case device::Memory::other_device: return refuse({"lies on another device than this communicator's"});
      default: return refuse({"is memory of the host's, not of the device's; for that there is tally::Communicator"});
    }
  }

  /// Sets the call's algorithm, the same on all ranks.
  Way choose(Call& call, const AlgorithmRef& wish) {
    const Collective operation = call.layout.operation;
    const bool wishes = !wish.name.empty(), wishes_packets = wish.name == packets_name, near = memory_.within_reach();
    if (!near && (wishes_packets || wish.share)) throw Error(Errc::unsupported, {wish.name, ": ranks are on several hosts, between which there are algorithms of steps only"});
    if (operation == Collective::barrier && near) return call.algorithm = find_algorithm(Collective::all_reduce, ZeroCopy::name), Way::barrier;
    const AlgorithmRef direct = !near || sizes_differ(operation) ? AlgorithmRef() : find_algorithm(operation, ZeroCopy::name);
    const bool in_pairs = operation == Collective::all_to_all && call.layout.in_place;  // ranks would read what others have overwritten
    if (direct && (wishes ? wishes_packets : call.size <= packets_up_to_)) {
      call.algorithm = packets();
      if (packets_of(call).packets <= layout_.packets) return Way::packets;
      if (wishes) throw Error(Errc::unsupported, {name_of(operation), ": there is no room for so many packets; DeviceSettings::packet_bytes is ", packet_bytes_});
    } else if (wishes_packets) {
      throw Error(Errc::unsupported, {name_of(operation), " cannot be done by packets: only its ends know how much they send"});
    }
    device::Place in, out;
    const bool reachable = direct && !in_pairs && memory_.name(call.input, call.input_bytes().size(), in) && memory_.name(call.output, call.output_bytes().size(), out);
    // Between processes the others do not know whether a root's own buffer can be reached.
    const bool known_to_all = memory_.one_address_space() || (operation != Collective::reduce && operation != Collective::gather && operation != Collective::scatter);
    if (wishes ? wish.share != nullptr : reachable && known_to_all) {
      if (!reachable) throw Error(Errc::unsupported, {wish.name, ": other ranks cannot reach these buffers: use memory from allocate()", in_pairs ? ", and not in place" : ""});
      call.algorithm = direct;
      return Way::shares;
    }
    if (call.grain > layout_.frame_bytes) throw Error(Errc::unsupported, {"elements of ", call.grain, " bytes are longer than DeviceSettings::frame_bytes, ", layout_.frame_bytes});
    if (wishes) {
      if (!Need::of(call.need).met_by(wish, operation)) throw Error(Errc::invalid_argument, {wish.name, " does not fold in the order that this ", name_of(operation), " needs"});
      call.algorithm = wish;
    } else {
      call.named = false;
      call = calls().in_background(call);
    }
    return Way::steps;
  }
  std::vector<Share> shares_of(const Call& call) const {
    std::vector<Share> shares;
    const auto share = find_algorithm(call.layout.operation, ZeroCopy::name).share;
    for (Rank r = 0; r < size(); ++r) {
      Layout theirs = call.layout;
      theirs.me = r;
      shares.push_back(share(theirs.shape()));
    }
    return shares;
  }
  template <class Make>
  DevicePlan& plan_of(const Call& call, Make&& make, bool scales = false) {
    return plans_.find(call, scales, make, [&] { results_->finish_all(); });
  }
  DevicePlan& packets_of(const Call& call) {
    return plan_of(call, [&](DevicePlan& plan) { plans_.plan_packets(plan, call, shares_of(call), packet_blocks(call)); });
  }
  int blocks_for(std::size_t bytes, std::size_t each) const { return static_cast<int>(std::clamp<std::size_t>((bytes + each - 1) / each, 1, static_cast<std::size_t>(layout_.blocks))); }
  int packet_blocks(const Call& call) const { return blocks_for(call.size, static_cast<std::size_t>(threads_) * 8); }
  /// What a block is to have where each thread does so many units; whole warps.
  int threads_for(std::size_t units) const { return std::min(threads_, static_cast<int>(std::min<std::size_t>((std::max<std::size_t>(units, static_cast<std::size_t>(size())) + 31) / 32 * 32, 1 << 20))); }

  /// run(view) launches it.
  template <class Run>
  DeviceOperation launch(const Call& call, DevicePlan& plan, int blocks, Stream stream, bool captured, State work, Run&& run) {
    device::RankView view;
    view.me = rank(), view.n = size();
    view.windows = memory_.windows();
    view.layout = layout_;
    view.timeout = static_cast<std::uint64_t>(call.timeout.count());
    view.segments = memory_.segments(), view.segment_count = memory_.segment_count();
    results_->begin({call.layout.operation, call.algorithm.name, call.fingerprint, Fingerprint::agreed_count(call), call.size, plan.sent, plan.received, blocks, work, captured}, stream, view);
    try {
      if (!captured) {  // kernels of one communicator run one after the other
        if (has_run_ && driver_.identity(stream) != last_stream_) driver_.order_after(stream, ran_);
      } else {
        plan.captured = true;
      }
      run(std::as_const(view));
    } catch (...) {
      results_->withdraw();
      throw;
    }
    if (!captured) {
      memory_.launched();
      driver_.record(ran_, stream);
      has_run_ = true, last_stream_ = driver_.identity(stream);
    }
    return {results_, results_->last()};
  }
  template <class T, int most, class F>
  DeviceOperation start_packets(const Call& call, const F& folder, Stream stream, bool captured) {
    DevicePlan& plan = packets_of(call);
    const int blocks = packet_blocks(call);
    return launch(call, plan, blocks, stream, captured, State::protocol, [&](const device::RankView& view) {
      device::PacketsKernel<T, F, most, timed> kernel{view, folder, {plan.far_sends, static_cast<int>(plan.sends.size()), plan.far_folds, static_cast<int>(plan.folds.size()), call.input, call.output}, {}, {}};
      if (!plan.far_sends) std::ranges::copy(plan.sends, kernel.sends), std::ranges::copy(plan.folds, kernel.folds);
      driver_.launch(kernel, blocks, threads_for(call.size / 8 / static_cast<std::size_t>(blocks) + 1), stream);
    });
  }
  template <class T, int most, class F>
  DeviceOperation start_share(const Call& call, const F& folder, Stream stream, bool captured) {
    DevicePlan& plan = plan_of(call, [&](DevicePlan& made) { plans_.plan_share(made, call, shares_of(call)); });
    device::ShareWork work{plan.share, {}, {}};
    memory_.name(call.input, call.input_bytes().size(), work.input), memory_.name(call.output, call.output_bytes().size(), work.output);
    const int blocks = blocks_for(call.size / static_cast<std::size_t>(size()), static_cast<std::size_t>(threads_) * 64);
    return launch(call, plan, blocks, stream, captured, work_of(call), [&](const device::RankView& view) { driver_.launch(device::ShareKernel<T, F, most, timed>{view, folder, work}, blocks, threads_, stream); });
  }
  DevicePlan& steps_of(const Call& call, bool scales) {
    return plan_of(call, [&](DevicePlan& plan) { plans_.plan_steps(plan, call, step_blocks(call), scales); }, scales);
  }
  int step_blocks(const Call& call) const { return call.layout.extents ? 1 : blocks_for(call.size, channel_bytes); }
  template <class T, class F>
  DeviceOperation start_steps(const Call& call, const F& folder, Stream stream, bool captured, const std::byte* input) {
    DevicePlan& plan = steps_of(call, false);
    const int blocks = step_blocks(call);
    return launch(call, plan, blocks, stream, captured, work_of(call), [&](const device::RankView& view) { driver_.launch(device::StepsKernel<T, F, timed>{view, folder, plan.channels, input, call.output}, blocks, threads_, stream); });
  }
  /// Steps fold what they find, so the input is multiplied first, to lie elsewhere.
  template <class T, class F>
  DeviceOperation start_scaled(Call call, const F& folder, Stream stream, bool captured) {
    call.layout.in_place = false;
    DevicePlan& plan = steps_of(call, true);
    const int blocks = step_blocks(call);
    auto* const scaled = reinterpret_cast<T*>(plan.scaled);
    using Plain = device::Folder<T, Sum>;
    return launch(call, plan, blocks, stream, captured, work_of(call), [&](const device::RankView& view) {
      driver_.launch(device::ScaleKernel<T, F>{folder, reinterpret_cast<const T*>(call.input), scaled, call.layout.input_count()}, blocks, threads_, stream);
      driver_.launch(device::StepsKernel<T, Plain, timed>{view, Plain{sum, size()}, plan.channels, plan.scaled, call.output}, blocks, threads_, stream);
    });
  }
  static State work_of(const Call& call) { return reduces(call.layout.operation) ? State::reduce : State::copy; }

  D driver_;
  Communicator link_;  // between the hosts, for this alone
  SharedMemory<D> memory_;
  DevicePlans<D> plans_;
  std::shared_ptr<DeviceResults<D>> results_;
  device::WindowLayout layout_;
  std::vector<device::Link> links_;
  int threads_ = 0;
  std::size_t packet_bytes_ = 0, packets_up_to_ = 0;
  typename D::Event ran_{};
  std::uint64_t last_stream_ = 0;
  bool has_run_ = false;
};

}  // namespace detail

}  // namespace tally::inline v0
