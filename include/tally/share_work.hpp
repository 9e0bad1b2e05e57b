// SPDX-License-Identifier: Apache-2.0
// Runs the algorithms that are shares (see Share in steps.hpp): all ranks meet and say where their buffers lie, each does
// its share in everyone's, all meet again. Or piece by piece through blocks of shared memory, or by the kernel's copies.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "algorithms/direct.hpp"
#include "algorithms/recursive.hpp"
#include "call.hpp"
#include "kernel_copy.hpp"
#include "prepared.hpp"
#include "run.hpp"
#include "share.hpp"
#include "staging.hpp"
#include "transport/concept.hpp"

namespace tally::inline v0 {

/// `Engine` drives the meetings and raises errors.
template <class Engine, class T>
class ShareWork {
 public:
  ShareWork(Engine& engine, T& transport) : engine_(engine), transport_(transport) {}

  // Memory that all ranks can load and store: `stride` bytes for each.

  std::uint64_t reserve(std::size_t stride) {
    if constexpr (DirectAccess<T>) {
      std::size_t bytes = 0;
      const auto pages = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)), page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
      // Shared memory that is not there is noticed when it is first touched, by the kernel, who ends the process.
      if (__builtin_mul_overflow(stride, static_cast<std::size_t>(transport_.size()), &bytes) || bytes / page > pages)
        throw Error(Errc::no_resources, {transport_.size(), " times ", stride, " bytes are more than the ", pages * page, " bytes of memory that this host has"});
      return transport_.reserve(bytes);
    } else {
      throw Error(Errc::unsupported, {"the ranks of this communicator share no memory: ", transport_.name()});
    }
  }
  std::unique_ptr<SymmetricMemory> map(std::uint64_t token, std::size_t stride) {
    if constexpr (DirectAccess<T>)
      // Tokens of processes are places in the job's file, so their page numbers are distinct. Threads name addresses.
      return std::make_unique<SymmetricMemory>(transport_.map(token, stride * static_cast<std::size_t>(transport_.size())), stride, transport_.size(), transport_.rank(),
                                               transport_.one_address_space() ? 0 : 1 + (token >> 12) % ((std::uint64_t{1} << 24) - 1));
    else return nullptr;
  }
  void discard(std::uint64_t token, std::size_t stride) {
    if constexpr (DirectAccess<T>) transport_.discard(token, stride * static_cast<std::size_t>(transport_.size()));
  }
  bool one_address_space() const {
    if constexpr (DirectAccess<T>) return transport_.one_address_space();
    else return false;
  }
  bool stages() const {
    if constexpr (DirectAccess<T>) return transport_.staging_bytes() > 0;
    else return false;
  }

  void run(Run& run) {
    if constexpr (DirectAccess<T>) {
      if (run.call->algorithm.is(Reach::staged)) take_staged(run);
      else take(run);
    } else {
      throw Error(Errc::unsupported, {run.call->algorithm.name, " needs ranks that share memory"}, {transport_.rank(), -1, run.sequence, {}});
    }
  }
  /// Why the kernel does not copy between the ranks; empty if it does or nobody has tried yet.
  [[gnu::cold]] std::string kernel_problem() const {
    return kernel_error_ <= 0 ? "" : detail::concat({"the kernel does not copy between the ranks' processes: ", std::strerror(kernel_error_)});
  }
  /// After a failure: returns when no other rank is at work in this one's memory.
  void wait_for_others() {
    if constexpr (DirectAccess<T>)
      for (Rank r = 0; lent_ && r < transport_.size(); ++r)
        while (r != transport_.rank() && transport_.is_sharing(r) && transport_.liveness(r) == Liveness::alive) sched_yield();
    lent_ = false;
  }

 private:
  /// How ranks name their buffers to each other: an address, or a place in symmetric memory; 0 names nothing. And the
  /// whole size, since fingerprints hold but 16 bits of it and here no frame's length shows a difference.
  struct Names {
    std::uint64_t input = 0, output = 0, bytes = 0;
  };
  /// Types of users are told apart by 6 bits: two of different sizes may look alike.
  static std::uint64_t agreed_bytes(const Call& call) { return call.layout.count * call.grain; }

  void take(Run& run) {
    const Call& call = *run.call;
    const bool kernel = call.algorithm.is(Reach::kernel);
    if (kernel && !kernel_copies(run)) {
      engine_.done_as(run, "staged");
      return take_staged(run);
    }
    const Share share = call.algorithm.share(call.layout.shape());
    if (share.way == Share::Way::exchange && call.layout.in_place) return take_copied(run);
    lent_ = kernel || transport_.one_address_space();
    meet(run, {name_of(call.input, call.input_memory), name_of(call.output, call.output_memory), agreed_bytes(call)});
    {
      // Who aborts waits for this, since its memory may go as soon as its call has returned.
      struct Sharing {
        T& transport;
        explicit Sharing(T& shared) : transport(shared) { transport.sharing(true); }
        ~Sharing() { transport.sharing(false); }
      };
      std::optional<Sharing> sharing;
      if (lent_) sharing.emplace(transport_);
      if (transport_.aborted()) engine_.raise_abort();
      const std::size_t length = share.from.count * call.grain;
      const bool folds = call.fold.function != nullptr;
      const auto process = [&](Rank r) { return r == transport_.rank() ? 0 : processes_[static_cast<std::size_t>(r)]; };
      pass_.sources.clear();
      pass_.targets.clear();
      kernel_pass_.sources.clear();
      kernel_pass_.targets.clear();
      const ShareBytes bytes = for_each_rank_of(
          share, transport_.rank(), transport_.size(), call.grain,
          [&](Rank r, const Range& from) {
            std::byte* source = reach(run, r, from, length);
            if (kernel) kernel_pass_.sources.push_back({process(r), source});
            else pass_.sources.push_back(source);
          },
          [&](Rank r, const Range& to) {
            std::byte* target = reach(run, r, to, length);
            if (kernel) kernel_pass_.targets.push_back({process(r), target});
            else pass_.targets.push_back(target);
          });
      if (length > short_bytes) engine_.enter(run, folds ? State::reduce : State::copy);
      if (kernel) run_by_kernel(run, length, share.way);
      else pass_.run(length, call.grain, &call.fold, writes_past_caches(run) && !folds, share.way);
      count(run, bytes);
    }
    meet(run, {0, 0, agreed_bytes(call)});
    lent_ = false;
  }
  /// An exchange in place writes where others still read: they are given a copy.
  void take_copied(Run& run) {
    Call& copied = run.own_call = *run.call;
    run.call = &copied;
    const std::size_t bytes = copied.input_bytes().size();
    run.scratch.grow(bytes);
    if (bytes > short_bytes) engine_.enter(run, State::copy);
    if (bytes > 0) std::memcpy(run.scratch.data(), copied.input, bytes);
    copied.input = run.scratch.data();
    copied.layout.in_place = false;
    take(run);
  }
  /// Shares likewise (see Prepared): what was just read is not only written.
  bool writes_past_caches(const Run& run) const { return run.prepared->past_caches && !run.call->layout.in_place; }
  void count(Run& run, const ShareBytes& bytes) {
    transport_.shared(bytes.stored, bytes.loaded);
    engine_.count(run);
  }
  void run_by_kernel(Run& run, std::size_t bytes, Share::Way way) {
    pid_t failed = 0;
    const int error = kernel_pass_.run(bytes, run.call->grain, &run.call->fold, pass_, failed, way);
    if (error == 0) return;
    const Rank r = static_cast<Rank>(std::find(processes_.begin(), processes_.end(), failed) - processes_.begin());
    if (error == ESRCH || transport_.liveness(r) != Liveness::alive) engine_.raise_lost(r);
    engine_.raise(Errc::no_resources, run, r, {"the kernel cannot copy between rank ", transport_.rank(), " and rank ", r, " in ", engine_.describe(run), ": ", std::strerror(error)});
  }
  /// Whether it does; found out together, once.
  [[gnu::cold]] bool kernel_copies(Run& run) {
    if (kernel_error_ >= 0) return kernel_error_ == 0;
    admit_other_processes();
    const std::uint64_t count = agreed_bytes(*run.call);
    const auto mark = [](std::uint64_t address, std::uint64_t process) { return (address ^ process << 32) * 0x9e3779b97f4a7c15u; };
    std::uint64_t probe = 0;
    const std::uint64_t address = reinterpret_cast<std::uintptr_t>(&probe), me = static_cast<std::uint64_t>(::getpid());
    probe = mark(address, me);
    meet(run, {address, me, count});
    int error = 0;
    processes_.assign(static_cast<std::size_t>(transport_.size()), 0);
    for (Rank r = 0; r < transport_.size(); ++r) {
      const Names& names = names_[static_cast<std::size_t>(r)];
      const pid_t process = processes_[static_cast<std::size_t>(r)] = static_cast<pid_t>(names.output);
      std::uint64_t read = 0;
      if (r == transport_.rank() || error != 0) continue;
      error = copy_by_kernel(false, process, reinterpret_cast<std::byte*>(&read), reinterpret_cast<std::byte*>(names.input), sizeof read);
      if (error == 0 && read != mark(names.input, names.output)) error = ESRCH;  // another process by that number: they live in different namespaces
    }
    meet(run, {static_cast<std::uint64_t>(error), 0, count});
    kernel_error_ = 0;
    for (const Names& names : names_) kernel_error_ = std::max(kernel_error_, static_cast<int>(names.input));
    return kernel_error_ == 0;
  }
  /// The same in blocks of shared memory, piece by piece. Between two meetings each rank puts in one piece, combines its
  /// share of the one before and takes out the one before that, so three pieces are under way.
  void take_staged(Run& run) {
    const Call& call = *run.call;
    const std::size_t area = transport_.staging_bytes(), gap = area / 64;
    const Staging staging(call, area / 4 - gap, writes_past_caches(run));
    const std::size_t pieces = staging.pieces();
    std::size_t at[3] = {};
    const auto block = [&](Rank r, std::size_t i) { return transport_.staging(r) + at[i % 3]; };
    const auto moving = [&](std::size_t bytes, State state) { engine_.enter(run, bytes > short_bytes ? state : State::protocol); };
    const auto copying = [&](std::size_t bytes) { moving(bytes, State::copy); };
    for (std::size_t i = 0; i < pieces + 2; ++i) {
      if (i < pieces) {
        if (staged_at_ + staging.bytes(i) > area) staged_at_ = 0;
        at[i % 3] = staged_at_;
        staged_at_ += (staging.bytes(i) + gap + 127) / 128 * 128;
        staging.put(i, block(transport_.rank(), i), copying);
      }
      if (i >= 1 && i - 1 < pieces) {
        const ShareBytes bytes = staging.run(i - 1, pass_, [&](Rank r) { return block(r, i - 1); }, [&](std::size_t length) { moving(length, call.fold.function ? State::reduce : State::copy); });
        count(run, bytes);
      }
      if (i >= 2) staging.take(i - 2, block(transport_.rank(), i - 2), copying);
      if (i <= pieces) meet(run, {0, 0, agreed_bytes(call)});
    }
  }
  /// What is sent for it is booked with the work before it: a clock reading would take a fifth of that time, on everyone's way.
  void meet(Run& run, const Names& mine) {
    names_.resize(static_cast<std::size_t>(transport_.size()));
    names_[static_cast<std::size_t>(transport_.rank())] = mine;
    if (!meeting_) {
      const Layout layout{Collective::all_gather, transport_.rank(), transport_.size(), 0, sizeof(Names), true};
      meeting_ = PlanCache::make({layout, transport_.size() <= direct_meeting_ranks ? OneShot::all_gather : RecursiveDoubling::all_gather});
    }
    auto* names = reinterpret_cast<std::byte*>(names_.data());
    engine_.run_steps(run, *meeting_, names + sizeof(Names) * static_cast<std::size_t>(transport_.rank()), names);
    for (Rank r = 0; r < transport_.size(); ++r)
      if (names_[static_cast<std::size_t>(r)].bytes != mine.bytes) engine_.raise_mismatch(run, r, run.fingerprint);
  }
  std::uint64_t name_of(const std::byte* place, const SymmetricMemory* memory) const {
    if (!place) return 0;
    return lent_ || !memory ? reinterpret_cast<std::uintptr_t>(place) : memory->name_of(place);
  }
  /// Where the range of rank r's buffer is for this rank.
  std::byte* reach(Run& run, Rank r, const Range& range, std::size_t bytes) {
    const Call& call = *run.call;
    const bool input = range.buffer == Buffer::input;
    const std::size_t first = range.first * call.grain;
    if (r == transport_.rank()) return (input ? const_cast<std::byte*>(call.input) : call.output) + first;
    const Names& names = names_[static_cast<std::size_t>(r)];
    const std::uint64_t name = input ? names.input : names.output;
    if (lent_ && name != 0) return reinterpret_cast<std::byte*>(name) + first;
    const SymmetricMemory* memory = input || !call.output_memory ? call.input_memory : call.output_memory;
    if (std::byte* place = memory ? memory->find(r, name, first + bytes) : nullptr) return place + first;
    engine_.raise(Errc::mismatch, run, r, {"rank ", r, " does not pass the same symmetric memory as rank ", transport_.rank(), " to ", engine_.describe(run)});
  }

  Engine& engine_;
  T& transport_;
  std::shared_ptr<Prepared> meeting_;
  std::vector<Names> names_;               // of all ranks' buffers
  SharePass pass_;
  KernelPass kernel_pass_;
  std::vector<pid_t> processes_;           // of the ranks
  int kernel_error_ = -1;                  // of the kernel's copies: -1 not tried, 0 they work, else errno
  std::size_t staged_at_ = 0;              // where in all ranks' blocks the next piece begins
  bool lent_ = false;                      // other ranks may be at work in this rank's private memory
};

}  // namespace tally::inline v0
