// SPDX-License-Identifier: Apache-2.0
// The life of a contestant: one program per library, which compare starts. A contestant is a name and a way to start
// its ranks; each rank then gives a table of functions (Library) to compete(), which takes orders from compare, fills
// and checks buffers and reads the clock, in the same way for every library.
#pragma once

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "exact.hpp"
#include "measure.hpp"
#include "turns.hpp"

namespace bench {

/// What one rank has for one operation and size: float32 sums, in place for all_reduce and broadcast.
struct Work {
  int rank = 0, size = 1;
  Op op{};
  std::size_t count = 0;  // of the larger side
  std::span<float> in, out;
  std::size_t block() const { return count / static_cast<std::size_t>(size); }
  bool apart() const { return op != Op::all_reduce && op != Op::broadcast && op != Op::barrier; }
  int next() const { return (rank + 1) % size; }
  int previous() const { return (rank + size - 1) % size; }
};

using Call = std::function<void()>;

inline std::shared_ptr<std::byte> pages(std::size_t bytes) {
  const auto memory = std::make_shared<Memory>(bytes);
  return {memory, memory->data()};
}

/// A library on one rank.
struct Library {
  std::string version;
  std::function<Call(const Work&)> prepare;                                   // a function that is one call; empty if the library has no such operation
  std::function<std::shared_ptr<std::byte>(std::size_t)> allocate = pages;    // on all ranks in the same order
  std::function<double()> idle_seconds;                                       // waited so far, by its own account; may be empty
  bool checked = true;                                                        // limits that are no collective are not
};

/// A contestant's place in the shared file.
class Seat {
 public:
  Seat(SharedHall& hall, int desk, std::string directory) : hall_(hall), desk_(hall->desks[desk]), directory_(std::move(directory)) {}

  int ranks() const { return hall_->ranks; }
  bool crowded() const { return !hall_->pinned; }
  std::size_t most_bytes() const { return hall_->most_bytes; }
  /// A directory of this run, gone after it.
  const std::string& directory() const { return directory_; }

  /// Keeps the calling thread on the rank's core, if there are as many as ranks. Early, so that memory is near.
  void pin(int rank) const {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const std::vector<int> cores = allowed_cores();
    if (hall_->pinned && cores.size() > static_cast<std::size_t>(rank)) answer(rank).pinned = pin_to(cores[static_cast<std::size_t>(rank)]);
  }

  /// Forks all ranks, each of which runs f(rank), and returns when all have ended. One that fails ends the others.
  template <class F>
  void fork_ranks(F f) const {
    std::vector<pid_t> pids;
    const pid_t parent = ::getpid();
    for (int rank = 0; rank < ranks(); ++rank) {
      const pid_t pid = ::fork();
      if (pid < 0) throw std::system_error(errno, std::generic_category(), "fork");
      if (pid > 0) {
        pids.push_back(pid);
        continue;
      }
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);
      int status = 1;
      try {
        f(rank);
        status = 0;
      } catch (const std::exception& error) {
        fail(rank, error.what());
      }
      std::fflush(nullptr);
      ::_exit(status);
    }
    for (std::size_t left = pids.size(), failed = 0; left > 0; --left) {
      int status = 0;
      const pid_t pid = ::wait(&status);
      std::erase(pids, pid);
      if (status == 0 || failed++ > 0) continue;
      for (const pid_t other : pids) ::kill(other, SIGKILL);
    }
  }

  /// Takes orders until the last. Failures are told to compare and go on.
  void compete(int rank, const Library& library) const {
    try {
      obey(rank, library);
    } catch (const std::exception& error) {
      fail(rank, error.what());
      throw;
    }
  }
  void fail(int rank, std::string_view why) const {
    Answer& mine = answer(rank);
    if (mine.failed.load() == 0) mine.say(why);
    mine.failed.store(1);
    desk_.done.value.fetch_add(1);  // so that a sleeper about to sleep does not
    tally::futex_wake(desk_.done.value);
  }

 private:
  Answer& answer(int rank) const { return desk_.answers[rank]; }

  void obey(int rank, const Library& library) const {
    Answer& mine = answer(rank);
    mine.say(library.version);
    mine.pid.store(static_cast<std::uint32_t>(::getpid()));
    Meeting meeting(desk_, ranks(), crowded());
    std::shared_ptr<std::byte> first, second;
    Work work;
    Call call;
    for (std::uint32_t number = 0;;) {
      if (desk_.done.value.fetch_add(1) + 1 == (number + 1) * static_cast<std::uint32_t>(ranks())) tally::futex_wake(desk_.done.value);
      while (desk_.number.value.load(std::memory_order_acquire) == number) {
        tally::futex_wait(desk_.number.value, number, std::chrono::seconds(1));
        if (::kill(hall_->compare, 0) != 0) throw std::runtime_error("compare went away");
      }
      ++number;
      const Order order = desk_.order;
      if (order.verb == Verb::end) return;
      if (order.verb == Verb::open) {
        call = nullptr;
        first.reset();  // before the next ones are made
        second.reset();
        work = {rank, ranks(), order.op, order.count, {}, {}};
        const std::size_t bytes = work.count * sizeof(float);
        if (bytes > 0) first = library.allocate(bytes);
        if (bytes > 0 && work.apart()) second = library.allocate(bytes);
        work.in = {reinterpret_cast<float*>(first.get()), work.count};
        work.out = work.apart() ? std::span<float>(reinterpret_cast<float*>(second.get()), work.count) : work.in;
        call = library.prepare(work);
        mine.offered = static_cast<bool>(call);
      } else if (order.verb == Verb::check) {
        mine.wrong = 0;
        if (library.checked) {
          fill(work, order.turn);
          meeting.meet();  // shared buffers are filled by all before any is combined
          call();
          mine.wrong = count_wrong(work, order.turn);
          meeting.meet();
        }
        // Values that stay what they are however often the call is repeated.
        std::fill(work.in.begin(), work.in.end(), 0.0f);
        std::fill(work.out.begin(), work.out.end(), 0.0f);
      } else {
        for (std::uint64_t i = 0; i < order.warm_up; ++i) call();
        const double idle_before = library.idle_seconds ? library.idle_seconds() : 0;
        meeting.meet();
        const double begin = seconds_now();
        for (std::uint64_t i = 0; i < order.calls; ++i) call();
        mine.seconds = seconds_now() - begin;
        mine.idle_seconds = library.idle_seconds ? library.idle_seconds() - idle_before : std::numeric_limits<double>::quiet_NaN();
      }
    }
  }

  static void fill(const Work& w, int turn) {
    if (w.apart()) std::fill(w.out.begin(), w.out.end(), -1.0f);
    Pattern<float>::input(Reduce::sum, w.size, w.rank, turn).fill(w.in);
  }
  static std::uint64_t count_wrong(const Work& w, int turn) {
    const auto input_of = [&](int rank) { return Pattern<float>::input(Reduce::sum, w.size, rank, turn); };
    const auto result = [&] { return Pattern<float>::result(Reduce::sum, w.size, turn); };
    switch (w.op) {
      case Op::all_reduce: return result().count_wrong(w.in);
      case Op::reduce: return w.rank == 0 ? result().count_wrong(w.out) : 0;
      case Op::broadcast: return input_of(0).count_wrong(w.in);
      case Op::all_gather: {
        std::uint64_t wrong = 0;
        for (int r = 0; r < w.size; ++r) wrong += input_of(r).count_wrong(w.out.subspan(static_cast<std::size_t>(r) * w.block(), w.block()));
        return wrong;
      }
      case Op::reduce_scatter: return result().count_wrong(w.out.first(w.block()), static_cast<std::size_t>(w.rank) * w.block());
      case Op::gather:
      case Op::all_to_all: {
        std::uint64_t wrong = 0;
        const std::size_t first = w.op == Op::all_to_all ? static_cast<std::size_t>(w.rank) * w.block() : 0;
        for (int r = 0; r < w.size && (w.op == Op::all_to_all || w.rank == 0); ++r) wrong += input_of(r).count_wrong(w.out.subspan(static_cast<std::size_t>(r) * w.block(), w.block()), first);
        return wrong;
      }
      case Op::scatter: return input_of(0).count_wrong(w.out.first(w.block()), static_cast<std::size_t>(w.rank) * w.block());
      case Op::scan: return Pattern<float>::result(Reduce::sum, w.rank + 1, turn).count_wrong(w.out);
      case Op::exclusive_scan: return w.rank == 0 ? 0 : Pattern<float>::result(Reduce::sum, w.rank, turn).count_wrong(w.out);
      case Op::send_receive: return input_of(w.previous()).count_wrong(w.out);
      case Op::barrier: return 0;
    }
    return 0;
  }

  SharedHall& hall_;
  Desk& desk_;
  std::string directory_;
};

struct Contestant {
  std::string_view name;
  void (*start)(const Seat&);  // all ranks, or the one that this process is; returns when they have ended
};

/// Started by compare as `program FILE DESK --contestant NAME`.
inline int run_contestant(int argc, char** argv, const std::vector<Contestant>& offered) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() != 4 || arguments[2] != "--contestant") {
    std::fprintf(stderr, "%s is started by bench/compare\n", argv[0]);
    return 2;
  }
  try {
    SharedHall hall(SharedHall::Way::open, arguments[0]);
    const Seat seat(hall, std::stoi(arguments[1]), arguments[0].substr(0, arguments[0].rfind('/')));
    for (const Contestant& contestant : offered)
      if (contestant.name == arguments[3]) {
        contestant.start(seat);
        return 0;
      }
    throw std::runtime_error("no contestant '" + arguments[3] + "'");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}

}  // namespace bench
