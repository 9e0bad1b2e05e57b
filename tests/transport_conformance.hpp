// SPDX-License-Identifier: Apache-2.0
// What every transport must do, whatever moves its bytes. A transport's test file includes this and calls
// conformance(run), where run(n, options, body) gives each of n ranks a transport and runs body(transport) on it.
#pragma once

#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <tally/transport/concept.hpp>
#include <tally/transport/slots.hpp>

namespace conformance {

using namespace tally;

/// What a rank does between two polls that find nothing: lets others run, or time pass, where it is simulated.
template <class T>
void rest(T& transport) {
  if constexpr (requires { transport.pass_time(nanoseconds{}); }) transport.pass_time(std::chrono::milliseconds(1));
  else std::this_thread::yield();
}

/// Inside ranks nothing of Catch2 may be used: they may be other processes.
inline void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

/// Drives transfers to their end and checks what the transport says about them on the way.
struct Driver {
  explicit Driver(Rank rank) : me(rank) {}
  const Rank me;
  std::vector<Transfer*> pending;
  std::size_t frames = 0, credits = 0, moves = 0;
  std::function<void(Transfer&)> on_moved;

  void arrived(Transfer& t, const FrameInfo& frame) {
    ++frames;
    expect(frame.operation == t.operation, "frames of this operation only");
    expect(frame.first == (frame.begin_in(t) == 0), "first marks a message's begin");
    expect(frame.bytes % t.grain == 0, "whole elements");
    expect(frame.times.culprit == t.peer, "the sender's stamp");
  }
  void credited(Transfer& t, const FrameTimes& times) {
    ++credits;
    expect(times.culprit == 100 + t.peer, "the receiver's credit stamp");
  }
  void fetched(Transfer& t, const FrameTimes& times) { credited(t, times); }
  void drained(Transfer&, bool = false) {}
  void continued(Transfer&, const FrameTimes&) {}
  void trying(Transfer&) {}
  void copying(Transfer&) {}
  void reducing(Transfer&) {}
  Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  void moved(Transfer& t) {
    ++moves;
    expect(t.done <= t.ready && t.ready <= t.bytes, "done <= ready <= bytes");
    if (on_moved) on_moved(t);
  }
  FrameTimes stamp(const Transfer&) const { return {1, 2, 3, static_cast<std::uint16_t>(me)}; }
  FrameTimes credit_stamp(const Transfer&) const { return {1, 2, 3, static_cast<std::uint16_t>(100 + me)}; }

  template <class T>
  void finish(T& transport) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::any_of(pending.begin(), pending.end(), [](Transfer* t) { return t->pending; })) {
      if (!transport.poll(*this)) {
        rest(transport);
        expect(std::chrono::steady_clock::now() < deadline, "no hang");
      }
    }
    pending.clear();
  }
  template <class T>
  void post(T& transport, Transfer& t) {
    transport.post(t, *this);
    pending.push_back(&t);
  }
};

inline Transfer sending(Rank to, const std::vector<std::byte>& data, std::size_t offset, std::size_t bytes, std::uint16_t grain = 1, int lane = 0) {
  Transfer t;
  t.peer = to;
  t.from = data.data() + offset;
  t.bytes = t.ready = bytes;
  t.grain = grain;
  t.lane = static_cast<std::uint16_t>(lane);
  t.operation = 1;
  t.is_send = true;
  return t;
}
inline Transfer receiving(Rank from, std::vector<std::byte>& data, std::size_t offset, std::size_t bytes, std::uint16_t grain = 1, int lane = 0) {
  Transfer t = sending(from, data, offset, bytes, grain, lane);
  t.to = data.data() + offset;
  t.from = nullptr;
  t.is_send = false;
  return t;
}
inline std::byte pattern(std::size_t i, std::uint32_t seed) { return static_cast<std::byte>((i * 2654435761u + seed * 40503u) >> 7); }
inline void fill(std::vector<std::byte>& data, std::size_t offset, std::size_t bytes, std::uint32_t seed) {
  for (std::size_t i = 0; i < bytes; ++i) data[offset + i] = pattern(i, seed);
}
inline void expect_pattern(const std::vector<std::byte>& data, std::size_t offset, std::size_t bytes, std::uint32_t seed, const std::string& what) {
  for (std::size_t i = 0; i < bytes; ++i)
    if (data[offset + i] != pattern(i, seed)) throw std::runtime_error(what + ": byte " + std::to_string(i) + " of " + std::to_string(bytes) + " is wrong");
}

template <class T>
using BodyOf = std::function<void(T&)>;
using Body = BodyOf<SlotTransport>;

template <class T>
using Run = std::function<void(int n, const SlotOptions& options, const BodyOf<T>& body)>;

template <class T = SlotTransport>
void conformance(const std::type_identity_t<Run<T>>& run) {
  SlotOptions small;
  small.slots = 4;
  small.slot_bytes = 1024;
  SlotOptions one = small;
  one.slots = 1;

  SECTION("every size, aligned or not, in both directions at once") {
    for (const SlotOptions& options : {SlotOptions{}, small, one})
      run(2, options, [](auto& transport) {
        const Rank peer = 1 - transport.rank();
        for (const std::size_t bytes : {0u, 1u, 7u, 8u, 15u, 16u, 17u, 79u, 80u, 81u, 127u, 128u, 1000u, 1024u, 1025u, 4096u, 65536u, 100'001u, 1u << 20})
          for (const std::size_t offset : {0u, 1u, 13u}) {
            std::vector<std::byte> out(bytes + 64), in(bytes + 64);
            fill(out, offset, bytes, static_cast<std::uint32_t>(transport.rank()));
            Driver driver{transport.rank()};
            Transfer send = sending(peer, out, offset, bytes), receive = receiving(peer, in, offset, bytes);
            driver.post(transport, send);
            driver.post(transport, receive);
            driver.finish(transport);
            expect_pattern(in, offset, bytes, static_cast<std::uint32_t>(peer), std::to_string(bytes) + " bytes");
            for (std::size_t i = 0; i < in.size(); ++i)
              expect((i >= offset && i < offset + bytes) || in[i] == std::byte{0}, "nothing written beside the destination");
          }
      });
  }
  SECTION("64 MiB") {
    run(2, SlotOptions{}, [](auto& transport) {
      constexpr std::size_t bytes = std::size_t{64} << 20;
      std::vector<std::byte> data(bytes);
      Driver driver{transport.rank()};
      Transfer t = transport.rank() == 0 ? sending(1, data, 0, bytes) : receiving(0, data, 0, bytes);
      if (transport.rank() == 0) fill(data, 0, bytes, 5);
      driver.post(transport, t);
      driver.finish(transport);
      expect_pattern(data, 0, bytes, 5, "64 MiB");
    });
  }
  SECTION("messages to one peer stay in order, messages of different peers are independent") {
    for (const SlotOptions& options : {small, one})
      run(4, options, [](auto& transport) {
        const int n = transport.size();
        constexpr int messages = 200;
        std::vector<std::vector<std::byte>> out, in;
        std::vector<Transfer> transfers;
        std::mt19937 random(7);
        std::vector<std::size_t> sizes;
        for (int m = 0; m < messages; ++m) sizes.push_back(random() % 3 == 0 ? random() % 5000 : random() % 90);
        transfers.reserve(static_cast<std::size_t>(2 * n * messages));
        out.reserve(transfers.capacity());
        in.reserve(transfers.capacity());
        Driver driver{transport.rank()};
        for (int m = 0; m < messages; ++m)
          for (int i = 1; i < n; ++i) {
            const Rank to = (transport.rank() + i) % n;
            out.emplace_back(sizes[static_cast<std::size_t>(m)] + 1);
            fill(out.back(), 0, sizes[static_cast<std::size_t>(m)], static_cast<std::uint32_t>(m * 100 + transport.rank()));
            driver.post(transport, transfers.emplace_back(sending(to, out.back(), 0, sizes[static_cast<std::size_t>(m)])));
          }
        for (int i = n - 1; i >= 1; --i)
          for (int m = 0; m < messages; ++m) {
            const Rank from = (transport.rank() + i) % n;
            in.emplace_back(sizes[static_cast<std::size_t>(m)] + 1);
            driver.post(transport, transfers.emplace_back(receiving(from, in.back(), 0, sizes[static_cast<std::size_t>(m)])));
          }
        driver.finish(transport);
        std::size_t k = 0;
        for (int i = n - 1; i >= 1; --i)
          for (int m = 0; m < messages; ++m, ++k)
            expect_pattern(in[k], 0, sizes[static_cast<std::size_t>(m)], static_cast<std::uint32_t>(m * 100 + (transport.rank() + i) % n), "message " + std::to_string(m));
        std::size_t bytes = 0;
        for (const std::size_t size : sizes) bytes += size;
        expect(transport.counters().bytes_sent == bytes * static_cast<std::size_t>(n - 1), "bytes sent are counted");
        expect(transport.counters().bytes_received == bytes * static_cast<std::size_t>(n - 1), "bytes received are counted");
        expect(transport.counters().messages_sent == static_cast<std::size_t>(messages * (n - 1)), "messages sent are counted");
        expect(transport.counters().messages_received == static_cast<std::size_t>(messages * (n - 1)), "messages received are counted");
      });
  }
  SECTION("back-pressure: a sender without room waits, a receiver that comes late gets everything") {
    for (const SlotOptions& options : {small, one})
      run(2, options, [](auto& transport) {
        constexpr std::size_t bytes = 200'000;
        std::vector<std::byte> data(bytes);
        Driver driver{transport.rank()};
        if (transport.rank() == 0) {
          fill(data, 0, bytes, 3);
          Transfer t = sending(1, data, 0, bytes);
          driver.post(transport, t);
          for (int i = 0; i < 1000; ++i) transport.poll(driver);
          expect(t.pending && t.done < bytes, "slots are bounded");
          driver.finish(transport);
          expect(driver.credits > 0, "the sender is told when room came");
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
          Transfer t = receiving(0, data, 0, bytes);
          driver.post(transport, t);
          driver.finish(transport);
          expect_pattern(data, 0, bytes, 3, "late receiver");
        }
      });
  }
  SECTION("watermarks: nothing beyond ready is read or written, whatever the peer sends") {
    run(2, small, [](auto& transport) {
      constexpr std::size_t bytes = 9'000;
      std::vector<std::byte> data(bytes);
      Driver driver{transport.rank()};
      Transfer t = transport.rank() == 0 ? sending(1, data, 0, bytes, 4) : receiving(0, data, 0, bytes, 4);
      t.ready = 0;
      driver.post(transport, t);
      std::mt19937 random(static_cast<unsigned>(transport.rank()) + 1);
      if (transport.rank() == 0) fill(data, 0, 0, 1);
      while (t.pending) {
        for (int i = 0; i < 3; ++i) transport.poll(driver);
        expect(t.done <= t.ready, "done <= ready");
        if (transport.rank() == 1)
          for (std::size_t i = t.ready; i < bytes; ++i) expect(data[i] == std::byte{0}, "untouched beyond ready");
        const std::size_t more = std::min(bytes - t.ready, std::size_t{4} * (random() % 300));
        if (transport.rank() == 0)
          for (std::size_t i = t.ready; i < t.ready + more; ++i) data[i] = pattern(i, 1);
        t.ready += more;
        rest(transport);
      }
      expect_pattern(data, 0, bytes, 1, "watermarks");
    });
  }
  SECTION("folds combine from the left or the right, three operands, never splitting an element") {
    run(2, small, [](auto& transport) {
      // An operator that is neither commutative nor blind to splitting: 3-byte elements, (a, b) -> 2a + b.
      struct Three {
        static void fold(const void*, std::byte* to, const std::byte* left, const std::byte* right, std::size_t n) {
          expect(n % 3 == 0, "whole elements");
          for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<std::byte>(2 * static_cast<unsigned>(left[i]) + static_cast<unsigned>(right[i]));
        }
      };
      const Fold fold{&Three::fold, nullptr};
      constexpr std::size_t bytes = 3 * 1111;
      for (const Side side : {Side::right, Side::left}) {
        std::vector<std::byte> out(bytes), acc(bytes), to(bytes);
        const Rank peer = 1 - transport.rank();
        fill(out, 0, bytes, static_cast<std::uint32_t>(transport.rank()));
        fill(acc, 0, bytes, 9);
        Driver driver{transport.rank()};
        Transfer s = sending(peer, out, 0, bytes, 3), r = receiving(peer, to, 0, bytes, 3);
        r.from = acc.data();
        r.fold = &fold;
        r.side = side;
        driver.post(transport, s);
        driver.post(transport, r);
        driver.finish(transport);
        for (std::size_t i = 0; i < bytes; ++i) {
          const auto a = static_cast<unsigned>(pattern(i, 9)), x = static_cast<unsigned>(pattern(i, static_cast<std::uint32_t>(peer)));
          expect(to[i] == static_cast<std::byte>(side == Side::right ? 2 * a + x : 2 * x + a), "the fold's side");
          expect(acc[i] == pattern(i, 9), "the accumulator of a three-operand fold is not written");
        }
      }
    });
  }
  SECTION("lanes are independent") {
    SlotOptions lanes = small;
    lanes.lanes = 5;
    run(3, lanes, [](auto& transport) {
      expect(transport.lanes() == 5, "five lanes");
      const Rank next = (transport.rank() + 1) % 3, previous = (transport.rank() + 2) % 3;
      std::vector<std::byte> out(50'000), in(5 * 10'000);
      fill(out, 0, out.size(), static_cast<std::uint32_t>(transport.rank()));
      std::vector<Transfer> transfers;
      transfers.reserve(10);
      Driver driver{transport.rank()};
      for (int lane = 0; lane < 5; ++lane) driver.post(transport, transfers.emplace_back(sending(next, out, static_cast<std::size_t>(lane) * 10'000, 10'000, 1, lane)));
      for (int lane = 4; lane >= 0; --lane) driver.post(transport, transfers.emplace_back(receiving(previous, in, static_cast<std::size_t>(lane) * 10'000, 10'000, 1, lane)));
      driver.finish(transport);
      expect_pattern(in, 0, in.size(), static_cast<std::uint32_t>(previous), "lanes");
    });
  }
  SECTION("a cancelled transfer's memory is not touched again") {
    run(2, small, [](auto& transport) {
      std::vector<std::byte> data(20'000);
      Driver driver{transport.rank()};
      Transfer t = transport.rank() == 0 ? sending(1, data, 0, data.size()) : receiving(0, data, 0, data.size());
      driver.post(transport, t);
      for (int i = 0; i < 100; ++i) transport.poll(driver);
      transport.cancel(t);
      expect(!t.pending, "cancelled");
      const std::vector<std::byte> before = data;
      for (int i = 0; i < 10'000; ++i) transport.poll(driver);
      expect(data == before, "untouched after cancel");
      transport.cancel(t);  // again: nothing
    });
  }
  SECTION("status, goodbye and abort reach every rank") {
    run(3, small, [](auto& transport) {
      const Rank me = transport.rank();
      expect(transport.liveness((me + 1) % 3) == Liveness::alive, "alive");  // it waits for this rank's status
      transport.enter({7, 100u + static_cast<unsigned>(me), 55, RankStatus::inside_operation, false});
      const auto eventually = [&](auto&& condition, const char* what) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
        while (!condition()) {
          expect(std::chrono::steady_clock::now() < deadline, what);
          (void)transport.liveness((me + 1) % 3);  // who waits looks after the others, and is heard of by them
          rest(transport);
        }
      };
      for (Rank r = 0; r < 3; ++r) {
        eventually([&] { return transport.status(r).inside; }, "status is seen");
        const RankStatus status = transport.status(r);
        expect(status.sequence == 7 && status.fingerprint == 100u + static_cast<unsigned>(r) && status.count == 55, "the status published");
      }
      if (me == 1) transport.abort({Errc::mismatch, 1, 2, "first"});
      eventually([&] { return transport.aborted(); }, "the abort is seen");
      transport.abort({Errc::timeout, me, -1, "second"});
      const AbortNotice notice = transport.abort_notice();
      expect(notice.code == Errc::mismatch && notice.rank == 1 && notice.peer == 2 && notice.text == "first", "the first notice wins");
      if (me == 2) transport.leave();
      else eventually([&] { return transport.liveness(2) == Liveness::left; }, "goodbye is seen");
    });
  }
  SECTION("no wake-up is lost: ping-pong in which every wait sleeps") {
    run(2, small, [](auto& transport) {
      std::vector<std::byte> out(8), in(8);
      const Rank peer = 1 - transport.rank();
      std::mt19937 random(static_cast<unsigned>(transport.rank()) + 11);
      constexpr auto limit = std::chrono::seconds(5);
      auto longest = std::chrono::steady_clock::duration::zero();
      constexpr int rounds = 5'000;
      for (int i = 0; i < rounds; ++i) {
        Driver driver{transport.rank()};
        Transfer s = sending(peer, out, 0, 8), r = receiving(peer, in, 0, 8);
        const auto wait = [&](Transfer& t) {
          while (t.pending) {
            const auto begin = std::chrono::steady_clock::now();
            transport.park(limit, [&] { return transport.poll(driver); });
            longest = std::max(longest, std::chrono::steady_clock::now() - begin);
          }
        };
        // Different delays before each step move the race between announcement, recheck and send.
        for (auto k = random() % 400; k > 0; --k) cpu_pause();
        if (transport.rank() == 0) {
          transport.post(s, driver);
          wait(s);
          transport.post(r, driver);
          wait(r);
        } else {
          transport.post(r, driver);
          wait(r);
          transport.post(s, driver);
          wait(s);
        }
        transport.flush();  // the last send of all is followed by no poll
      }
      expect(longest < limit, "no sleep ran into its limit");  // as it does after a lost wake-up
    });
  }
  SECTION("everyone to everyone, more ranks than cores") {
    run(8, small, [](auto& transport) {
      const int n = transport.size();
      for (int round = 0; round < 20; ++round) {
        std::vector<std::vector<std::byte>> in(static_cast<std::size_t>(n), std::vector<std::byte>(3'000));
        std::vector<std::byte> out(3'000);
        fill(out, 0, out.size(), static_cast<std::uint32_t>(transport.rank() * 100 + round));
        std::vector<Transfer> transfers;
        transfers.reserve(static_cast<std::size_t>(2 * n));
        Driver driver{transport.rank()};
        for (int i = 1; i < n; ++i) {
          const Rank peer = (transport.rank() + i) % n;
          driver.post(transport, transfers.emplace_back(sending(peer, out, 0, out.size())));
          driver.post(transport, transfers.emplace_back(receiving(peer, in[static_cast<std::size_t>(peer)], 0, 3'000)));
        }
        driver.finish(transport);
        for (int i = 1; i < n; ++i) {
          const Rank peer = (transport.rank() + i) % n;
          expect_pattern(in[static_cast<std::size_t>(peer)], 0, 3'000, static_cast<std::uint32_t>(peer * 100 + round), "round " + std::to_string(round));
        }
      }
    });
  }
}

}  // namespace conformance
