// SPDX-License-Identifier: Apache-2.0
// Random mixtures of blocking calls, operations in flight, shares, messages and barriers on several communicators, the same
// on all ranks, with delays, waits, destructions and a progress thread that are not: every element of every result has to
// be what a formula says. And the same while ranks are killed or stopped in the middle.
// TALLY_TEST_SEED=N chooses another sequence, TALLY_TEST_LONG=1 runs thirty times as long.
#include <catch2/catch.hpp>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::Caught, test::expect, test::now_ns;

namespace {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint64_t below(std::uint64_t limit) {
    std::uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (x ^ (x >> 31)) % limit;
  }
  bool once_in(std::uint64_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};
std::uint64_t seed() {
  const char* text = std::getenv("TALLY_TEST_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 1;
}
int times_as_long() {
  const char* text = std::getenv("TALLY_TEST_LONG");
  return text && *text == '1' ? 30 : 1;
}

/// One operation in flight, its memory and what has to be in there at the end.
struct Flying {
  std::size_t communicator = 0;
  std::string what;
  std::vector<std::uint64_t> in, out, expected;
  Operation operation;
  void check() const { expect(out == expected, what); }
};

/// One rank's side of the mixture.
class Mixture {
 public:
  Mixture(Communicator& comm, std::uint64_t sequence, bool progress) : common_(sequence), own_(sequence * 64 + static_cast<std::uint64_t>(comm.rank()) + 1), me_(comm.rank()), n_(comm.size()), progress_(progress) {
    communicators_.push_back(comm.duplicate());
    communicators_.push_back(comm.duplicate());
  }
  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      one(step);
      if (own_.once_in(40)) std::this_thread::sleep_for(std::chrono::microseconds(own_.below(300)));
      if (progress_ && own_.once_in(20)) toggle();
      while (flying_.size() > 24) end_one();
      if (own_.once_in(4) && !flying_.empty()) flying_[own_.below(flying_.size())]->operation.test();
      if (common_.once_in(100)) communicators_[common_.below(communicators_.size())] = Communicator(fresh());
    }
    end_all();
  }

 private:
  void end_all() {
    while (!flying_.empty()) end_one();
  }
  /// What was started without the progress thread is not driven by it, and several communicators are driven by it alone.
  void toggle() {
    end_all();
    thread_ = thread_ ? std::nullopt : std::optional<ProgressThread>(progress_thread());
  }
  /// All ranks replace one of their communicators; what is in flight there has to end first.
  Communicator fresh() {
    end_all();
    return communicators_[0].duplicate();
  }
  /// The oldest, except that between two of one communicator the younger may be first; see async_test about several of them.
  void end_one() {
    std::size_t i = 0;
    for (std::size_t k = 1; k < flying_.size() && own_.once_in(2); ++k)
      if (flying_[k]->communicator == flying_[0]->communicator) i = k;
    const std::unique_ptr<Flying> f = std::move(flying_[i]);
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(i));
    if (own_.once_in(3)) {
      f->operation = Operation();
      if (f->out != f->expected) const Operation refused = communicators_[f->communicator].async_barrier();  // throws what it failed with, if it did
    } else {
      if (own_.once_in(3)) f->operation.wait_for(std::chrono::microseconds(own_.below(200)));
      const Report r = f->operation.wait();
      expect(r.elapsed == r.busy() + r.idle() + r.undriven && r.exposed <= r.elapsed, "exact account of " + f->what);
    }
    f->check();
  }
  void one(int step) {
    const std::size_t c = common_.below(communicators_.size());
    Communicator& comm = communicators_[c];
    // A call drives its own communicator alone: without the progress thread, a rank that waited there for one that waits here would wait for ever.
    if (!thread_ && !flying_.empty() && flying_[0]->communicator != c) end_all();
    const std::uint64_t kind = common_.below(10), size = common_.below(100), salt = common_.below(1u << 20);
    const std::size_t count = common_.below(size < 60 ? 20 : size < 95 ? 600 : 6000);
    const auto root = static_cast<Rank>(common_.below(static_cast<std::uint64_t>(n_)));
    const bool background = common_.once_in(2);
    const auto n = static_cast<std::uint64_t>(n_);
    const auto value = [&](Rank r, std::size_t i) { return salt * 1000 + static_cast<std::uint64_t>(r) * 7 + i; };
    const auto summed = [&](std::size_t i) { return n * (salt * 1000 + i) + 7 * n * (n - 1) / 2; };
    auto owned = std::make_unique<Flying>();
    Flying& f = *owned;
    f.communicator = c;
    f.what = "step " + std::to_string(step) + ", kind " + std::to_string(kind) + " of " + std::to_string(count) + ", communicator " + std::to_string(c) + (background ? ", background" : "");
    f.in.resize(count);
    f.out.assign(count, 99);
    for (std::size_t i = 0; i < count; ++i) f.in[i] = value(me_, i);
    const auto fill = [&](std::size_t many, auto&& what) {
      f.expected.resize(many);
      for (std::size_t i = 0; i < many; ++i) f.expected[i] = what(i);
    };
    const auto done = [&](auto&& blocking, auto&& async) {
      if (!background) {
        blocking();
        return f.check();
      }
      f.operation = async();
      flying_.push_back(std::move(owned));
    };
    const CallOptions named{.algorithm = background ? std::array{"", "ring", "tree", "one_shot"}[common_.below(4)] : std::array{"", "staged", comm.transport_name() == "thread" ? "zero_copy" : "staged", "two_shot"}[common_.below(4)]};
    switch (kind) {
      case 0:
      case 1:
      case 2:
        fill(count, summed);
        return done([&] { comm.all_reduce(f.in, f.out, sum, named); }, [&] { return comm.async_all_reduce(f.in, f.out, sum, named); });
      case 3:
        f.out = f.in;
        fill(count, [&](std::size_t i) { return value(root, i); });
        return done([&] { comm.broadcast(f.out, root); }, [&] { return comm.async_broadcast(f.out, root); });
      case 4:
        f.out.assign(count * n, 99);
        fill(count * n, [&](std::size_t i) { return value(static_cast<Rank>(i / count), i % count); });
        return done([&] { comm.all_gather(f.in, f.out); }, [&] { return comm.async_all_gather(f.in, f.out); });
      case 5:
        f.out.assign(me_ == root ? count : 0, 99);
        fill(f.out.size(), summed);
        return done([&] { comm.reduce(f.in, f.out, sum, root); }, [&] { return comm.async_reduce(f.in, f.out, sum, root); });
      case 6:
        f.in.resize(count * n);
        for (std::size_t i = 0; i < count * n; ++i) f.in[i] = value(me_, i);
        fill(count, [&](std::size_t i) { return summed(i + count * static_cast<std::size_t>(me_)); });
        return done([&] { comm.reduce_scatter(f.in, f.out, sum); }, [&] { return comm.async_reduce_scatter(f.in, f.out, sum); });
      case 7: {  // to the right neighbour, tags out of order
        const Rank to = (me_ + 1) % n_, from = (me_ + n_ - 1) % n_;
        fill(count, [&](std::size_t i) { return value(from, i); });
        const int tag = step % 1000;
        if (background) {
          auto sending = std::make_unique<Flying>();
          sending->communicator = c;
          sending->in = f.in;
          const bool first = own_.once_in(2);
          if (first) sending->operation = comm.async_send(sending->in, to, tag);
          f.operation = comm.async_receive(f.out, from, tag);
          if (!first) sending->operation = comm.async_send(sending->in, to, tag);
          flying_.push_back(std::move(sending));
          flying_.push_back(std::move(owned));
          return;
        }
        comm.send_receive(f.in, to, f.out, from, tag);
        return f.check();
      }
      case 8:
        f.out.clear();
        return done([&] { comm.barrier(); }, [&] { return comm.async_barrier(); });
      default: {
        f.in.resize(count * n);
        f.out.assign(count * n, 99);
        for (std::size_t i = 0; i < count * n; ++i) f.in[i] = value(me_, i);
        fill(count * n, [&](std::size_t i) { return value(static_cast<Rank>(i / count), i % count + count * static_cast<std::size_t>(me_)); });
        return done([&] { comm.all_to_all(f.in, f.out); }, [&] { return comm.async_all_to_all(f.in, f.out); });
      }
    }
  }

  Random common_, own_;
  Rank me_;
  int n_;
  bool progress_;
  std::vector<Communicator> communicators_;
  std::optional<ProgressThread> thread_;
  std::deque<std::unique_ptr<Flying>> flying_;  // their destructors come before those of the communicators
};

void mixture(RankKind kind) {
  const int rounds = 2 * times_as_long(), steps = test::sanitized ? 60 : 400;
  for (int round = 0; round < rounds; ++round)
    for (const bool small : {false, true})
      for (const bool progress : {false, true}) {
        const std::uint64_t sequence = seed() * 1000 + static_cast<std::uint64_t>(round * 4 + (small ? 2 : 0) + (progress ? 1 : 0));
        const int n = 2 + static_cast<int>(sequence % 5);
        Options options;
        options.timeout = 30s;
        if (small) options.slots = SlotOptions{.slots = 1, .slot_bytes = 128};
        const test::Outcome outcome = test::outcome_of(n, kind, [&](Communicator& comm) { Mixture(comm, sequence, progress).run(steps); }, options);
        CAPTURE(sequence, n, small, progress, outcome);
        for (const Caught& rank : outcome.ranks) REQUIRE((rank.ran && !rank.error && !rank.foreign));
        REQUIRE((!outcome.launch.error && !outcome.launch.foreign));
      }
}

}  // namespace

TALLY_TEST_BOTH("a mixture of everything has exact results", "", mixture)

TEST_CASE("a rank is killed in the middle of a mixture", "[processes]") {
  Random random(seed());
  for (int round = 0; round < 6 * times_as_long(); ++round) {
    const int n = 2 + static_cast<int>(random.below(4));
    const auto victim = static_cast<Rank>(random.below(static_cast<std::uint64_t>(n)));
    const auto after = std::chrono::microseconds(random.below(20'000));
    const bool progress = random.once_in(2);
    Options options;
    options.timeout = 20s;
    if (random.once_in(3)) options.slots = SlotOptions{.slots = 1, .slot_bytes = 128};
    const std::int64_t begin = now_ns();
    const test::Outcome outcome = test::outcome_of(
        n, processes,
        [&](Communicator& comm) {
          std::optional<std::thread> killer;
          if (comm.rank() == victim) killer.emplace([&] {
            std::this_thread::sleep_for(after);
            ::raise(SIGKILL);
          });
          Mixture(comm, seed() + static_cast<std::uint64_t>(round), progress).run(100'000'000);
        },
        options);
    CAPTURE(round, n, victim, progress, outcome);
    CHECK(now_ns() - begin < 15'000'000'000);
    for (Rank r = 0; r < n; ++r) {
      const Caught& rank = outcome.ranks[static_cast<std::size_t>(r)];
      if (r == victim) CHECK(!rank.ran);
      else CHECK((rank.ran && rank.error && (rank.code == Errc::peer_lost || rank.code == Errc::peer_left || rank.code == Errc::aborted || rank.code == Errc::no_resources)));
    }
  }
  CHECK(test::no_children());
}

TEST_CASE("a rank is stopped for a while in the middle of a mixture", "[processes]") {
  for (int round = 0; round < 2 * times_as_long(); ++round) {
    Options options;
    options.timeout = 30s;
    const test::Outcome outcome = test::outcome_of(
        3, processes,
        [&](Communicator& comm) {
          std::optional<test::Process> stopper;
          if (comm.rank() == 1)
            stopper.emplace([rank = ::getpid()] {
              for (int i = 0; i < 5; ++i) {
                std::this_thread::sleep_for(5ms);
                ::kill(rank, SIGSTOP);
                std::this_thread::sleep_for(20ms);
                ::kill(rank, SIGCONT);
              }
            });
          Mixture(comm, seed() * 77 + static_cast<std::uint64_t>(round), round % 2 == 0).run(test::sanitized ? 60 : 600);
          if (stopper) stopper->wait(5s);
        },
        options);
    CAPTURE(round, outcome);
    for (const Caught& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
  }
}
