// SPDX-License-Identifier: Apache-2.0
// Any transport behind one virtual call each, for clients that move few and large things and would rather not be compiled for
// each transport: the parameter server. It is a Transport itself, so that Progress can drive it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "concept.hpp"

namespace tally::inline v0 {

class AnyTransport {
 public:
  /// A probe, likewise.
  struct AnyProbe {
    virtual ~AnyProbe() = default;
    virtual void arrived(Transfer& t, const FrameInfo& frame) = 0;
    virtual Transfer* unexpected(Rank peer, const FrameInfo& frame) = 0;
    virtual void credited(Transfer& t, const FrameTimes& times) = 0;
    virtual void fetched(Transfer& t, const FrameTimes& times) = 0;
    virtual void continued(Transfer& t, const FrameTimes& times) = 0;
    virtual void drained(Transfer& t, bool by_copying = false) = 0;
    virtual void copying(Transfer& t) = 0;
    virtual void trying(Transfer& t) = 0;
    virtual void reducing(Transfer& t) = 0;
    virtual void moved(Transfer& t) = 0;
    virtual FrameTimes stamp(Transfer& t) = 0;
    virtual FrameTimes credit_stamp(const Transfer& t) = 0;
  };

  virtual ~AnyTransport() = default;
  virtual Rank rank() const = 0;
  virtual int size() const = 0;
  virtual int lanes() const = 0;
  virtual Rank origin(Rank r) const = 0;
  virtual std::size_t frame_bytes() const = 0;
  virtual std::string_view name() const = 0;
  virtual TransportCounters counters() const = 0;
  virtual void cancel(Transfer& t) = 0;
  virtual void enter(const RankStatus& status) = 0;
  virtual void exit() = 0;
  virtual RankStatus status(Rank r) const = 0;
  virtual Liveness liveness(Rank r) = 0;
  virtual void abort(const AbortNotice& notice) = 0;
  virtual bool aborted() const = 0;
  virtual AbortNotice abort_notice() const = 0;
  virtual void flush() = 0;
  virtual void interrupt() = 0;
  virtual bool crowded() = 0;
  virtual void leave() = 0;
  virtual bool has_rest() const = 0;
  virtual void settle() = 0;
  virtual Ticks to_local(Rank peer, Ticks theirs) const = 0;
  virtual const void* awaited() const = 0;
  /// Of a simulated time: it passes. False where time passes by itself.
  virtual bool pass_time(nanoseconds limit) = 0;
  /// Whether another thread may poll while one sleeps in park(), after its recheck.
  virtual bool sleeps_apart() const = 0;
  /// To count: bytes stored to and loaded from other ranks' memory.
  virtual void shared(std::uint64_t sent, std::uint64_t received) = 0;

  template <class P>
  void post(Transfer& t, P& probe) {
    Erased<P> erased(probe);
    post_any(t, erased);
  }
  template <class P>
  bool poll(P& probe) {
    Erased<P> erased(probe);
    return poll_any(erased);
  }
  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    using F = std::remove_reference_t<Recheck>;
    if (before_park) before_park(context);
    park_any(limit, [](void* f) { return static_cast<bool>((*static_cast<F*>(f))()); }, &recheck);
  }

  void (*before_park)(void* context) = nullptr;  // called with that before anybody sleeps
  void* context = nullptr;

  // It makes no others.
  std::uint64_t reserve(std::span<const Rank>) { throw Error(Errc::unsupported, "this transport makes no groups"); }
  std::unique_ptr<AnyTransport> open(std::uint64_t, std::span<const Rank>) { return nullptr; }
  void release(std::uint64_t) {}
  void discard(std::uint64_t, std::span<const Rank>) {}

 protected:
  virtual void post_any(Transfer& t, AnyProbe& probe) = 0;
  virtual bool poll_any(AnyProbe& probe) = 0;
  virtual void park_any(nanoseconds limit, bool (*recheck)(void*), void* with) = 0;

 private:
  template <class P>
  struct Erased final : AnyProbe {
    explicit Erased(P& p) : probe(p) {}
    P& probe;
    void arrived(Transfer& t, const FrameInfo& frame) override { probe.arrived(t, frame); }
    Transfer* unexpected(Rank peer, const FrameInfo& frame) override { return probe.unexpected(peer, frame); }
    void credited(Transfer& t, const FrameTimes& times) override { probe.credited(t, times); }
    void fetched(Transfer& t, const FrameTimes& times) override { probe.fetched(t, times); }
    void continued(Transfer& t, const FrameTimes& times) override { probe.continued(t, times); }
    void drained(Transfer& t, bool by_copying) override { by_copying ? probe.drained(t, true) : probe.drained(t); }
    void copying(Transfer& t) override { probe.copying(t); }
    void trying(Transfer& t) override { probe.trying(t); }
    void reducing(Transfer& t) override { probe.reducing(t); }
    void moved(Transfer& t) override { probe.moved(t); }
    FrameTimes stamp(Transfer& t) override { return probe.stamp(t); }
    FrameTimes credit_stamp(const Transfer& t) override { return probe.credit_stamp(t); }
  };
};
static_assert(Transport<AnyTransport>);

namespace detail {

template <Transport T>
class ErasedTransport final : public AnyTransport {
 public:
  explicit ErasedTransport(std::unique_ptr<T> transport) : t_(std::move(transport)) {}

  Rank rank() const override { return t_->rank(); }
  int size() const override { return t_->size(); }
  int lanes() const override { return t_->lanes(); }
  Rank origin(Rank r) const override { return t_->origin(r); }
  std::size_t frame_bytes() const override { return t_->frame_bytes(); }
  std::string_view name() const override { return t_->name(); }
  TransportCounters counters() const override { return t_->counters(); }
  void cancel(Transfer& t) override { t_->cancel(t); }
  void enter(const RankStatus& status) override { t_->enter(status); }
  void exit() override { t_->exit(); }
  RankStatus status(Rank r) const override { return t_->status(r); }
  Liveness liveness(Rank r) override { return t_->liveness(r); }
  void abort(const AbortNotice& notice) override { t_->abort(notice); }
  bool aborted() const override { return t_->aborted(); }
  AbortNotice abort_notice() const override { return t_->abort_notice(); }
  void flush() override { t_->flush(); }
  void interrupt() override { t_->interrupt(); }
  bool crowded() override { return t_->crowded(); }
  void leave() override { t_->leave(); }
  bool has_rest() const override { return detail::has_rest(*t_); }
  void settle() override { detail::settle(*t_); }
  Ticks to_local(Rank peer, Ticks theirs) const override {
    if constexpr (requires { t_->to_local(peer, theirs); }) return t_->to_local(peer, theirs);
    else return theirs;
  }
  const void* awaited() const override {
    if constexpr (requires { t_->awaited(); }) return t_->awaited();
    else return nullptr;
  }
  bool pass_time([[maybe_unused]] nanoseconds limit) override {
    if constexpr (requires { t_->pass_time(limit); }) return t_->pass_time(limit), true;
    else return false;
  }
  bool sleeps_apart() const override {
    if constexpr (requires { T::sleeps_apart; }) return T::sleeps_apart;
    else return false;
  }

  void shared([[maybe_unused]] std::uint64_t sent, [[maybe_unused]] std::uint64_t received) override {
    if constexpr (requires { t_->shared(sent, received); }) t_->shared(sent, received);
  }

 protected:
  void post_any(Transfer& t, AnyProbe& probe) override { t_->post(t, probe); }
  bool poll_any(AnyProbe& probe) override { return t_->poll(probe); }
  void park_any(nanoseconds limit, bool (*recheck)(void*), void* with) override {
    t_->park(limit, [&] { return recheck(with); });
  }

 private:
  std::unique_ptr<T> t_;
};

/// What makes such a one, once somebody has asked for it: programs that do not are spared its code.
template <Transport T>
struct Erasure {
  using Function = std::unique_ptr<AnyTransport> (*)(std::unique_ptr<T>);
  static std::atomic<Function>& function() {  // a member would be incomplete to nvcc 13
    static constinit std::atomic<Function> function{nullptr};
    return function;
  }
  static void enable() {
    function().store([](std::unique_ptr<T> transport) -> std::unique_ptr<AnyTransport> { return std::make_unique<ErasedTransport<T>>(std::move(transport)); }, std::memory_order_relaxed);
  }
};

/// Null if nobody has.
template <Transport T>
std::unique_ptr<AnyTransport> erase(std::unique_ptr<T> transport) {
  const auto function = Erasure<T>::function().load(std::memory_order_relaxed);
  return function ? function(std::move(transport)) : nullptr;
}

}  // namespace detail

}  // namespace tally::inline v0
