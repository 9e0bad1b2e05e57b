// SPDX-License-Identifier: Apache-2.0
// The connections beside a channel's own, by which payloads of long messages go to a peer: which of them takes the next frame. Each
// gets one when it is free, so the faster ones carry more; their rates are measured, for a slow one is to hold up neither the end of
// a message nor the window. Only those that the peer has taken are used.
#pragma once

#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../clock.hpp"
#include "../network/stream.hpp"

namespace tally::inline v0::detail {

class TcpStripes {
 public:
  struct Stripe {
    Stream fd;
    StreamBuffer hello;                  // what is said first on it
    bool ready = false, failed = false;  // the peer has taken it; there is none
    const std::byte* from = nullptr;     // of the frame on its way: what is still to go, and where of its message that is
    std::size_t left = 0, at = 0, bytes = 0;
    std::size_t queued = 0;              // in the kernel when that was begun
    Ticks since = 0;
    double carried = 0, time = 0;        // bytes that arrived, and in how many nanoseconds: the later, the more they count

    double rate() const { return time > 0 ? carried / time : 0; }  // 0: unknown
    /// In so many nanoseconds so much more has arrived; 0: unknown.
    double finishes(double more) const { return rate() > 0 ? (static_cast<double>(queued) + more) / rate() : 0; }
  };

  bool empty() const { return all_.empty(); }
  void resize(std::size_t n) { all_.resize(n); }
  /// Whether what(fd) of any that is used.
  template <class F>
  bool any(F&& what) const {
    return std::any_of(all_.begin(), all_.end(), [&](const Stripe& each) { return each.ready && what(each.fd); });
  }

  /// One of them has something to send.
  bool busy() const {
    return std::any_of(all_.begin(), all_.end(), [](const Stripe& each) { return each.left > 0; });
  }

  /// Which is to take the next frame, from 1 on. 0: there is none yet. -1: at the rates that they had, those that are free would be done
  /// with it later than one that is not, when those have sent all else, or filled the window behind it. `rest`, `frame`, `window`: bytes of
  /// the message, of the frame at most, and on their way at most. open(stripe, number) opens one: fd and hello; or leaves fd empty.
  template <class F>
  [[gnu::noinline]] int choose(std::size_t rest, std::size_t frame, std::size_t window, F&& open) {
    now_ = Clock::monotonic();
    double rates = 0, left = static_cast<double>(std::min(rest, window));
    const auto bytes = static_cast<double>(std::min(rest, frame));
    Stripe* best = nullptr;
    bool is_any = false;
    for (Stripe& each : all_) {
      if (!each.fd && !each.failed) {
        open(each, static_cast<std::uint32_t>(&each - all_.data()) + 1);
        if (!each.fd) each.failed = true;
      }
      if (!each.ready && !greets(each)) continue;
      is_any = true;
      left += static_cast<double>(each.left);
      if (each.left == 0) {
        if (now_ - each.since > memory) each.carried = each.time = 0;
        each.queued = unacknowledged(each.fd);
        if (!best || std::pair(each.finishes(bytes), each.queued) < std::pair(best->finishes(bytes), best->queued)) best = &each;
      }
      rates += each.rate();
    }
    if (!is_any) return 0;
    if (!best) return -1;
    const double finishes = best->finishes(bytes);
    if (rates > best->rate() && finishes > left / (rates - best->rate()))
      for (const Stripe& other : all_)
        if (other.left > 0 && other.rate() > 0 && (static_cast<double>(other.left + unacknowledged(other.fd)) + bytes) / other.rate() < finishes) return -1;
    return static_cast<int>(best - all_.data()) + 1;
  }
  /// Of the message's bytes at `begin`, by the one that was chosen.
  void begin(int stripe, const std::byte* payload, std::size_t begin, std::size_t bytes) {
    Stripe& by = all_[static_cast<std::size_t>(stripe) - 1];
    by.from = payload;
    by.at = begin;
    by.left = by.bytes = bytes;
    by.since = now_;
  }

  struct Wrote {
    bool any = false, waits = false;  // something went; something did not
    std::size_t reached = 0;          // all before that is with the kernel, of `begun` bytes
    const Stripe* broken = nullptr;   // and errno
  };
  /// Hands the kernel what it takes.
  [[gnu::noinline]] Wrote write(std::size_t begun) {
    Wrote wrote;
    wrote.reached = begun;
    for (Stripe& each : all_) {
      while (each.left > 0) {
        const ssize_t sent = each.fd.write(each.from, each.left);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
        if (sent < 0) {
          wrote.broken = &each;
          return wrote;
        }
        wrote.any = true;
        each.from += sent;
        each.at += static_cast<std::size_t>(sent);
        each.left -= static_cast<std::size_t>(sent);
        if (each.left == 0) measure(each);
      }
      if (each.left > 0) wrote.waits = true, wrote.reached = std::min(wrote.reached, each.at);
    }
    return wrote;
  }

 private:
  static std::size_t unacknowledged(const Stream& fd) {
    int bytes = 0;
    return ::ioctl(fd.get(), SIOCOUTQ, &bytes) == 0 && bytes > 0 ? static_cast<std::size_t>(bytes) : 0;
  }
  /// What the kernel took says little, as it takes much at once; so what is no longer with it counts.
  static void measure(Stripe& of) {
    constexpr double past = 7.0 / 8;
    const std::size_t before = of.queued + of.bytes;
    of.carried = past * of.carried + static_cast<double>(before - std::min(before, unacknowledged(of.fd)));
    of.time = past * of.time + static_cast<double>(Clock::monotonic() - of.since);
  }
  /// Whether the peer has said that it takes it.
  static bool greets(Stripe& stripe) {
    while (!stripe.ready && !stripe.failed) {
      char taken = 0;
      const ssize_t moved = stripe.hello.empty() ? stripe.fd.read(&taken, 1) : stripe.fd.write(stripe.hello.data(), stripe.hello.size());
      if (moved < 0 && errno == EINTR) continue;
      if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
      stripe.failed = moved <= 0;
      stripe.ready = moved > 0 && stripe.hello.empty();
      if (!stripe.ready && !stripe.failed) stripe.hello.take(static_cast<std::size_t>(moved));
    }
    if (stripe.failed) stripe.fd = Stream();
    return stripe.ready;
  }

  static constexpr Ticks memory = 2'000'000'000;  // a rate is forgotten after so many nanoseconds, as who did not read looked slow, too
  Ticks now_ = 0;
  std::vector<Stripe> all_;
};

}  // namespace tally::inline v0::detail
