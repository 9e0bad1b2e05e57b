// SPDX-License-Identifier: Apache-2.0
// What accounting costs where calls pass, counted: clock readings, allocations, locks and calls of the system; and that without
// accounting there is nothing of it. Mostly two ranks in one thread, so that none has to wait.
#include <catch2/catch.hpp>

#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::expect;

// Counts this program's allocations, to show that operations make none. Sanitizers bring their own allocator.
static std::atomic<std::size_t> allocations{0};
#ifndef TALLY_TEST_SANITIZED
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t align) {
  ++allocations;
  if (void* memory = std::aligned_alloc(static_cast<std::size_t>(align), (bytes + static_cast<std::size_t>(align) - 1) / static_cast<std::size_t>(align) * static_cast<std::size_t>(align))) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t align, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::aligned_alloc(static_cast<std::size_t>(align), (bytes + static_cast<std::size_t>(align) - 1) / static_cast<std::size_t>(align) * static_cast<std::size_t>(align));
}
#endif

// Its locks, too.
static std::atomic<std::size_t> locks{0};
#ifndef TALLY_TEST_SANITIZED
extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  static const auto real = reinterpret_cast<int (*)(pthread_mutex_t*)>(::dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  ++locks;
  return real(mutex);
}
#endif

namespace {

/// The host's time, in nanoseconds, and how often somebody asked.
struct CountingClock final : TimeSource {
  Ticks now() const override {
    ++readings;
    return Clock::monotonic();
  }
  mutable std::size_t readings = 0;
};

/// Two ranks of one thread. Where both take part, rank 0 starts and rank 1 finds all that it needs.
struct Pair {
  explicit Pair(bool accounting) : memory(std::make_shared<ThreadMemory>(SlotLayout(2, SlotOptions{}))) {
    for (Rank r = 0; r < 2; ++r)
      ranks.emplace_back(std::make_unique<Engine<SlotTransport>>(std::make_unique<SlotTransport>(memory, r), Clock(clock), ModelMeter{}, WaitPolicy::balanced, accounting), 60s);
  }
  /// Clock readings of f().
  template <class F>
  std::size_t readings(F&& f) const {
    const std::size_t before = clock.readings;
    f();
    return clock.readings - before;
  }

  CountingClock clock;
  std::shared_ptr<ThreadMemory> memory;
  std::vector<Communicator> ranks;  // they go before what they use
};

/// Frames as the peer sends them.
struct Listener {
  std::vector<FrameTimes> heard;
  void arrived(Transfer&, const FrameInfo& frame) { heard.push_back(frame.times); }
  Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  void credited(Transfer&, const FrameTimes&) {}
  void fetched(Transfer&, const FrameTimes&) {}
  void drained(Transfer&, bool = false) {}
  void continued(Transfer&, const FrameTimes&) {}
  void trying(Transfer&) {}
  void copying(Transfer&) {}
  void reducing(Transfer&) {}
  void moved(Transfer&) {}
  FrameTimes stamp(Transfer&) const { return {}; }
  FrameTimes credit_stamp(const Transfer&) const { return {}; }
};

}  // namespace

TEST_CASE("I17: without accounting no clock is read by calls that find what they need") {
  Pair pair(false);
  Communicator &a = pair.ranks[0], &b = pair.ranks[1];
  for (const std::size_t count : {std::size_t{1}, std::size_t{4000}, std::size_t{20000}}) {
    std::vector<float> x(count, 1.0f), y(count, 2.0f);
    const auto all = [&] {
      a.broadcast<Tree>(x, 0);
      b.broadcast<Tree>(y, 0);
      a.send(x, 1, 5);
      b.receive(y, 0, 5);
    };
    all();
    CAPTURE(count);
    CHECK(pair.readings(all) == 0);
    CHECK(y == x);
    if (count > 4000) continue;  // of more than a frame rank 0 does not send all at once
    Operation started = a.async_all_reduce<RecursiveDoubling>(x, sum);
    CHECK(pair.readings([&] { b.all_reduce<RecursiveDoubling>(y, sum); }) == 0);
    CHECK(pair.readings([&] { started.wait(); }) == 0);
    CHECK(x[count - 1] == 2.0f);
  }
  // Who has to wait needs to know for how long.
  std::vector<float> never(1);
  CHECK(pair.readings([&] { CHECK_THROWS_AS(b.receive(never, 0, 6, {.timeout = 2ms}), Error); }) > 0);
}

TEST_CASE("I17: without accounting no times are sent, and with it they are") {
  for (const bool accounting : {false, true})
    for (const std::size_t bytes : {std::size_t{8}, std::size_t{100'000}}) {
      const auto memory = std::make_shared<ThreadMemory>(SlotLayout(2, SlotOptions{}));
      Communicator comm(std::make_unique<Engine<SlotTransport>>(std::make_unique<SlotTransport>(memory, 0), Clock::host(), ModelMeter{}, WaitPolicy::balanced, accounting), 60s);
      SlotTransport peer(memory, 1);
      std::vector<std::byte> data(bytes), received(bytes);
      comm.broadcast<Tree>(data, 0);
      Transfer transfer;
      transfer.to = received.data();
      transfer.bytes = transfer.ready = bytes;
      transfer.peer = 0;
      Listener listener;
      peer.post(transfer, listener);
      while (peer.poll(listener)) {
      }
      CAPTURE(accounting, bytes);
      CHECK_FALSE(transfer.pending);
      REQUIRE(!listener.heard.empty());
      for (const FrameTimes& times : listener.heard) {
        CHECK((times.sent_at != 0) == accounting);
        if (!accounting) CHECK((times.arrive_age == 0 && times.late_age == 0 && times.culprit == 0));
      }
    }
}

TEST_CASE("I18: a call reads the clock when it begins, when it ends, and when it turns from headers to copying or combining") {
  Pair pair(true);
  Communicator &a = pair.ranks[0], &b = pair.ranks[1];
  const struct {
    std::size_t count, send, receive, reduce;
  } cases[] = {{1, 2, 2, 2}, {60, 2, 2, 2}, {1000, 3, 3, 4}, {4000, 3, 3, 4}, {20'000, 3, 3, 0}};  // of floats; the last in five frames
  for (const auto& c : cases) {
    std::vector<float> x(c.count, 1.0f), y(c.count, 2.0f);
    for (int round = 0; round < 2; ++round) {
      CAPTURE(c.count, round);
      CHECK(pair.readings([&] { a.broadcast<Tree>(x, 0); }) == c.send);
      CHECK(pair.readings([&] { b.broadcast<Tree>(y, 0); }) == c.receive);
      CHECK(pair.readings([&] { a.send(x, 1, 5); }) == c.send);
      CHECK(pair.readings([&] { b.receive(y, 0, 5); }) == c.receive);
      if (c.reduce == 0) continue;  // rank 0 would not send all at once
      Operation started = a.async_all_reduce<RecursiveDoubling>(x, sum);
      CHECK(pair.readings([&] { b.all_reduce<RecursiveDoubling>(y, sum); }) == c.reduce);
      started.wait();
    }
  }
}

namespace {

/// From here on any call of the system ends the process, but for writing why and going.
bool forbid_system_calls() {
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{static_cast<unsigned short>(std::size(rules)), rules};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace

TEST_CASE("I18: calls that find what they need allocate nothing, lock nothing and do not call the system", "[processes]") {
#ifdef TALLY_TEST_SANITIZED
  WARN("skipped: allocations, locks and calls of the system are the sanitizer's");
  return;
#endif
  test::Process trial([] {
    if (!forbid_system_calls()) ::_exit(2);
    ::syscall(SYS_getppid);
  });
  const auto ended = trial.wait(10s);
  if (!test::killed_by(ended, SIGSYS)) {
    WARN("skipped: this system does not let a process give up calls of the system");
    return;
  }
  for (const bool accounting : {true, false}) {
    CAPTURE(accounting);
    test::Process child([accounting] {
      std::mutex mutex;
      { const std::lock_guard lock(mutex); }
      expect(locks > 0 && allocations > 0, "both are counted");
      const auto memory = std::make_shared<ThreadMemory>(SlotLayout(2, SlotOptions{}));
      std::vector<Communicator> ranks;
      for (Rank r = 0; r < 2; ++r) ranks.emplace_back(std::make_unique<Engine<SlotTransport>>(std::make_unique<SlotTransport>(memory, r), Clock::host(), ModelMeter{}, WaitPolicy::balanced, accounting), 60s);
      Communicator &a = ranks[0], &b = ranks[1];
      std::vector<float> small_x(2, 1.0f), small_y(2, 1.0f), large_x(20'000, 1.0f), large_y(20'000, 1.0f);
      const auto work = [&] {
        for (int i = 0; i < 300; ++i)
          for (const bool large : {false, true}) {
            std::vector<float>&x = large ? large_x : small_x, &y = large ? large_y : small_y;
            a.broadcast<Tree>(x, 0);
            b.broadcast<Tree>(y, 0);
            a.send(x, 1, 5);
            b.receive(y, 0, 5);
            Operation started = a.async_all_reduce<RecursiveDoubling>(x, max);
            b.all_reduce<RecursiveDoubling>(y, max);
            started.wait();
            Operation barrier = a.async_barrier();
            b.barrier();
            barrier.wait();
          }
      };
      work();
      const std::size_t allocated = allocations, locked = locks;
      expect(forbid_system_calls(), "forbidden");
      work();
      const bool none = allocations == allocated && locks == locked;
      if (!none) std::fprintf(stderr, "%zu allocations, %zu locks\n", allocations - allocated, locks - locked);
      ::_exit(none ? 0 : 3);
    });
    const auto status = child.wait(30s);
    CAPTURE(status.value_or(-1));
    CHECK(test::exited_well(status));
  }
}

TEST_CASE("I18: the steady state allocates nothing", "[processes]") {
#ifdef TALLY_TEST_SANITIZED
  WARN("skipped: allocations are the sanitizer's");
  return;
#endif
  launch(2, [](Communicator& comm) {
    std::vector<float> small(2, 1.0f), large(100'000, 1.0f), out(100'000);
    const auto work = [&] {
      for (int i = 0; i < 50; ++i) {
        comm.all_reduce(small, max);
        comm.all_reduce(large, max);
        comm.all_reduce<OneShot>(std::span<const float>(large), std::span(out), max);
        comm.broadcast(large, 1);
        comm.barrier();
      }
    };
    work();
    const std::size_t before = allocations;
    work();
    const std::size_t made = allocations - before;
    expect(made == 0, "no allocation in 250 operations");
  });
}

TEST_CASE("I18: the steady state in the background allocates nothing", "[processes]") {
#ifdef TALLY_TEST_SANITIZED
  WARN("skipped: allocations are the sanitizer's");
  return;
#endif
  for (const bool progress : {false, true}) {
    CAPTURE(progress);
    launch(2, [progress](Communicator& comm) {
      std::optional<ProgressThread> thread;
      if (progress) thread = progress_thread();
      std::vector<float> small(2, 1.0f), large(100'000, 1.0f), sent(50, 1.0f), received(50);
      const Rank peer = 1 - comm.rank();
      const auto one = [&] {
        for (int i = 0; i < 1000; ++i) comm.async_all_reduce(small, max).wait();
      };
      const auto several = [&] {
        for (int i = 0; i < 200; ++i) {
          Operation first = comm.async_all_reduce(small, max), second = comm.async_all_reduce(large, max), receiving = comm.async_receive(received, peer, 1), sending = comm.async_send(sent, peer, 1), third = comm.async_broadcast(std::span(small).first(0), 1);
          comm.barrier();
          sending.wait(), third.wait(), first.wait(), second.wait(), receiving.wait();
        }
      };
      // How many are in flight at most depends on how the threads take turns: what is kept for them grows until it is enough.
      const auto made_by = [](const auto& work) {
        work();
        std::size_t least = ~std::size_t{0};
        for (int tries = 0; tries < 4; ++tries) {
          const std::size_t before = allocations;
          work();
          least = std::min<std::size_t>(least, allocations - before);
        }
        return least;
      };
      const std::size_t by_one = made_by(one), by_several = made_by(several);
      expect(by_one == 0, std::to_string(by_one) + " allocations in 1000 operations in the background");
      expect(by_several == 0, std::to_string(by_several) + " allocations in 1200 operations, five at a time in the background");
    });
  }
}
