// SPDX-License-Identifier: Apache-2.0
// launch(): what it refuses, how it reports a rank that fails in whatever way, that it ends the others, and that
// nothing is left behind: no process, no descriptor, no memory, no file, no output twice.
#include <catch2/catch.hpp>

#include <sys/resource.h>

#include <fstream>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>

#include "processes.hpp"

using namespace test;
using tally::Communicator;
using tally::Errc;
using tally::Options;
using tally::RankKind;

namespace {

void nothing(Communicator&) {}
void one_barrier(Communicator& comm) { comm.barrier(); }

#define CHECK_ERROR(c, errc, part)                 \
  do {                                             \
    const Caught checked = (c);                    \
    CAPTURE(checked);                              \
    CHECK(checked.is(errc));                       \
    CHECK_THAT(checked.text, Catch::Contains(part)); \
  } while (false)

// ---- What it refuses.

void bad_counts(RankKind kind) {
  for (const int n : {0, -1, 32769, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()})
    CHECK_ERROR(caught([&] { tally::launch(n, nothing, kind); }), Errc::invalid_argument, "cannot launch " + std::to_string(n) + " ranks");
  // Allowed, but not within the budget for slots; nothing is started.
  CHECK_ERROR(caught([&] { tally::launch(32768, nothing, kind); }), Errc::no_resources, "32768 ranks need");
}
TALLY_TEST_BOTH("launch refuses impossible rank counts", "[launch]", bad_counts)

void bad_options(RankKind kind) {
  for (const auto timeout : {0ns, -1ns}) {
    Options options;
    options.timeout = timeout;
    CHECK_ERROR(caught([&] { tally::launch(2, nothing, kind, options); }), Errc::invalid_argument, "timeout");
  }
  for (const int lanes : {0, -1, 1025}) {
    Options options;
    options.slots.lanes = lanes;
    CHECK_ERROR(caught([&] { tally::launch(2, nothing, kind, options); }), Errc::invalid_argument, "lanes");
  }
  Options small;
  small.slots.budget = 100;
  CHECK_ERROR(caught([&] { tally::launch(2, nothing, kind, small); }), Errc::no_resources, "the budget is 100");
}
TALLY_TEST_BOTH("launch refuses impossible options", "[launch]", bad_options)

void bad_environment(RankKind kind) {
  const std::pair<const char*, std::vector<const char*>> garbage[] = {
      {"TALLY_TIMEOUT", {"soon", "0", "-1", "1s", " 1", "1 ", "nan", "inf", "1e10", "0x10", "1,5", "--1", "1e999", "."}},
      {"TALLY_ACCOUNTING", {"yes", "ON", "1", "onoff", " on"}},
      {"TALLY_METER", {"rapl", "Model", "0"}},
      {"TALLY_OBJECTIVE", {"joules", "Time", "0"}},
      {"TALLY_MODEL_BUSY_WATTS", {"hot", "-1", "nan", "1e7", "5W"}},
      {"TALLY_MODEL_IDLE_WATTS", {"cold", "-0.5", "nan", "1e7", "5 "}},
      {"TALLY_ALGORITHM", {"rings", "Ring", "all_reduce=", "all_reduce=rings", "allreduce=ring", "ring,trees", "broadcast=recursive_doubling", "=", " ring", "ring;tree", "ring, tree"}},
      {"TALLY_TRANSPORT", {"udp", "SHM", "shm,thread", "threads"}},
      {"TALLY_SLOTS", {"many", "0", "-16", "4097", "16.0", "99999999999999999999", "0x10", "16k"}},
      {"TALLY_SLOT_BYTES", {"big", "0", "127", "-1", "1e4", "99999999999999999999999"}},
      {"TALLY_SLOT_BUDGET", {"rich", "0", "4095", "-1", "64M", "99999999999999999999999"}},
  };
  for (const auto& [name, values] : garbage)
    for (const char* value : values) {
      const Environment set(name, value);
      bool ran = false;  // for processes it could not be seen here, but for threads it could
      const Caught c = caught([&] { tally::launch(1, [&](Communicator&) { ran = true; }, kind); });
      CAPTURE(name, value, c, ran);
      CHECK(c.is(Errc::invalid_argument));
      CHECK_FALSE(ran);
      CHECK_THAT(c.text, Catch::Contains(name));
    }
  {
    const Environment set("TALLY_ALGORITHM", "zigzag");
    CHECK_ERROR(caught([&] { tally::launch(1, nothing, kind); }), Errc::invalid_argument, "recursive_doubling");  // it says what is known
  }
  const Environment transport("TALLY_TRANSPORT", kind == tally::threads ? "shm" : "thread");
  CHECK_ERROR(caught([&] { tally::launch(2, nothing, kind); }), Errc::invalid_argument, "transport '" + std::string(kind == tally::threads ? "shm" : "thread") + "'");
}
TALLY_TEST_BOTH("launch refuses garbage in the environment by name", "[launch]", bad_environment)

void good_environment(RankKind kind) {
  const std::pair<const char*, std::vector<const char*>> fine[] = {
      {"TALLY_TIMEOUT", {"", "10", "0.5e2", "1e9"}},  // empty counts as unset
      {"TALLY_ACCOUNTING", {"on", "off"}},
      {"TALLY_METER", {"auto", "model", "none"}},
      {"TALLY_OBJECTIVE", {"time", "energy", "energy_delay"}},
      {"TALLY_MODEL_BUSY_WATTS", {"0", "4.5"}},
      {"TALLY_ALGORITHM", {"auto", "ring", "tree", "recursive_doubling", "one_shot", "recursive_halving", "two_shot", "chain", "double_tree", "hierarchical", "all_reduce=ring,barrier=tree"}},
      {"TALLY_TRANSPORT", {kind == tally::threads ? "thread" : "shm"}},
      {"TALLY_SLOTS", {"1", "3", "4096"}},
      {"TALLY_SLOT_BYTES", {"128", "1000", "1073741824"}},
      {"TALLY_SLOT_BUDGET", {"1000000", "1000000000"}},
  };
  for (const auto& [name, values] : fine)
    for (const char* value : values) {
      const Environment set(name, value);
      CAPTURE(name, value);
      CHECK_NOTHROW(tally::launch(
          3,
          [](Communicator& comm) {
            std::vector<double> data(3000, comm.rank());
            comm.all_reduce(data, tally::sum);
            expect(std::ranges::count(data, 3.0) == 3000, "the sum");
            comm.barrier();
          },
          kind));
    }
}
TALLY_TEST_BOTH("launch takes every documented setting", "[launch]", good_environment)

TEST_CASE("threads that were joined do not hinder a launch of processes", "[processes]") {
  for (int i = 0; i < 50; ++i) {
    std::thread([] {}).join();  // the kernel may still be taking it down
    CHECK_NOTHROW(tally::launch(1, [](tally::Communicator& comm) { comm.barrier(); }));
  }
}

TEST_CASE("processes are not forked while other threads run", "[launch][processes]") {
  std::atomic<bool> stop{false};
  {
    std::jthread other([&] {
      while (!stop) std::this_thread::sleep_for(1ms);
    });
    CHECK_ERROR(caught([] { tally::launch(2, nothing); }), Errc::unsupported, "1 other threads run");
    CHECK_NOTHROW(tally::launch(2, one_barrier, tally::threads));
    stop = true;
  }
  // Threads that have been joined count no longer, not even for a moment.
  for (int i = 0; i < 100; ++i) {
    { std::jthread brief([] {}); }
    CHECK_NOTHROW(tally::launch(1, nothing));
  }
}

// ---- Ranks that work.

void every_rank_runs(RankKind kind) {
  for (const int n : {1, 2, 3, 8}) {
    const Shared<std::array<std::atomic<int>, 8>> calls;
    tally::launch(
        n,
        [&](Communicator& comm) {
          expect(comm.size() == n, "size");
          ++(*calls)[static_cast<std::size_t>(comm.rank())];
          int one = 1;
          comm.all_reduce(std::span(&one, 1), tally::sum);
          expect(one == n, "all ranks take part");
        },
        kind);
    for (int r = 0; r < 8; ++r) CHECK((*calls)[static_cast<std::size_t>(r)] == (r < n ? 1 : 0));
  }
}
TALLY_TEST_BOTH("launch runs every rank once", "[launch]", every_rank_runs)

TEST_CASE("processes share nothing of the launcher's", "[launch][processes]") {
  int here = 1;
  const Shared<std::array<std::atomic<int>, 4>> pids;
  tally::launch(4, [&](Communicator& comm) {
    here = 2;
    (*pids)[static_cast<std::size_t>(comm.rank())] = ::getpid();
  });
  CHECK(here == 1);
  std::set<int> different{::getpid()};
  for (const auto& pid : *pids) different.insert(pid);
  CHECK(different.size() == 5);
}

TEST_CASE("a rank may launch ranks", "[launch][processes]") {
  const Caught c = caught_apart(10s, [] {
    tally::launch(2, [](Communicator& comm) {
      tally::launch(2, [&](Communicator& inner) { inner.barrier(); });
      comm.barrier();
      const Caught failure = caught([] { tally::launch(2, [](Communicator& inner) { if (inner.rank() == 1) throw std::runtime_error("deep down"); }); });
      expect(failure.is(Errc::rank_failed) && has(failure.text, "rank 1: deep down"), failure.text);
      comm.barrier();
    });
  });
  CAPTURE(c);
  CHECK((c.ran && !c.error && !c.foreign));
}

// ---- Ranks that fail.

struct Unusual {
  int code;
};

void failing_ranks(RankKind kind) {
  for (int failing = 0; failing < 3; ++failing) {
    const auto failure = [&](auto how) {
      return caught([&] {
        tally::launch(
            3,
            [&](Communicator& comm) {
              comm.barrier();
              if (comm.rank() == failing) how();
              for (;;) comm.barrier();  // the others would go on for ever
            },
            kind);
      });
    };
    const std::string me = "rank " + std::to_string(failing) + ": ";
    const Caught plain = failure([] { throw std::runtime_error("out of coffee"); });
    CHECK_ERROR(plain, Errc::rank_failed, me + "out of coffee");
    CHECK(plain.rank == failing);
    CHECK(ms(plain.ended - plain.began) < 5'000);
    CHECK_ERROR(failure([] { throw Unusual{3}; }), Errc::rank_failed, me);
    CHECK_ERROR(failure([] { throw std::bad_alloc(); }), Errc::rank_failed, me + "std::bad_alloc");
    // A tally::Error keeps its code.
    const Caught own = failure([] { throw tally::Error(Errc::unsupported, "not on a Sunday", {17, 2, 5, 7ns}); });
    CHECK_ERROR(own, Errc::unsupported, me + "not on a Sunday");
    CHECK(own.rank == failing);
    // Long texts are cut, and the beginning survives.
    CHECK_ERROR(failure([] { throw std::runtime_error("begin " + std::string(100'000, 'y')); }), Errc::rank_failed, me + "begin yyyyyyyy");
    CHECK_ERROR(failure([] { throw std::runtime_error(""); }), Errc::rank_failed, me);
  }
}
TALLY_TEST_BOTH("launch rethrows a rank's failure with its rank", "[launch]", failing_ranks)

void others_learn_why(RankKind kind) {
  const Shared<std::array<Caught, 3>> heard;
  const Caught launched = caught([&] {
    tally::launch(
        3,
        [&](Communicator& comm) {
          if (comm.rank() == 1) {
            std::this_thread::sleep_for(40ms);
            throw std::runtime_error("the disk is full");
          }
          (*heard)[static_cast<std::size_t>(comm.rank())].record([&] { comm.barrier(); });
        },
        kind);
  });
  CAPTURE(launched, (*heard)[0], (*heard)[2]);
  CHECK(launched.is(Errc::rank_failed));
  for (const std::size_t r : {0u, 2u}) {
    CHECK((*heard)[r].is(Errc::aborted));
    CHECK_THAT((*heard)[r].text, Catch::Contains("rank 1") && Catch::Contains("the disk is full"));
  }
}
TALLY_TEST_BOTH("the other ranks learn why one failed", "[launch]", others_learn_why)

void first_failure(RankKind kind) {
  // The cause is reported, not what followed from it, whichever was seen first.
  for (int i = 0; i < 10; ++i) {
    const Caught c = caught([&] {
      tally::launch(
          4,
          [](Communicator& comm) {
            if (comm.rank() == 3) throw std::logic_error("the cause");
            comm.barrier();
          },
          kind);
    });
    CHECK_ERROR(c, Errc::rank_failed, "rank 3: the cause");
  }
}
TALLY_TEST_BOTH("launch reports the cause", "[launch]", first_failure)

TEST_CASE("a failing rank ends those that do not listen", "[launch][processes]") {
  const Shared<std::array<std::atomic<int>, 4>> pids;
  const Caught c = caught([&] {
    tally::launch(4, [&](Communicator& comm) {
      (*pids)[static_cast<std::size_t>(comm.rank())] = ::getpid();
      comm.barrier();
      switch (comm.rank()) {
        case 0: std::this_thread::sleep_for(1h); break;
        case 1:
          for (;;) tally::cpu_pause();
        case 2: {
          ::signal(SIGTERM, SIG_IGN);
          ::pause();
          break;
        }
        default: throw std::runtime_error("I give up");
      }
    });
  });
  CAPTURE(c);
  CHECK(c.is(Errc::rank_failed));
  CHECK_THAT(c.text, Catch::Contains("rank 3: I give up"));
  CHECK(ms(c.ended - c.began) < 10'000);
  CHECK(no_children());
  for (const auto& pid : *pids) {
    CHECK(pid > 0);
    CHECK_FALSE(lives(pid));
  }
}

TEST_CASE("exit codes and signals are named", "[launch][processes]") {
  const auto failure = [](auto how) {
    return caught([&] {
      tally::launch(2, [&](Communicator& comm) {
        if (comm.rank() == 1) how();
        comm.barrier();
      });
    });
  };
  CHECK_ERROR(failure([] { ::_exit(3); }), Errc::rank_failed, "rank 1: exited with status 3");
  CHECK_ERROR(failure([] { ::_exit(255); }), Errc::rank_failed, "rank 1: exited with status 255");
  for (const int signal : {SIGKILL, SIGTERM, SIGUSR1, SIGSEGV, SIGABRT}) {
    const Caught c = failure([&] {
      ::signal(signal, SIG_DFL);  // Catch has handlers of its own
      ::raise(signal);
    });
    CHECK_ERROR(c, Errc::rank_failed, "rank 1: killed by signal " + std::to_string(signal) + " (" + ::strsignal(signal) + ")");
  }
  // It exits as if all were well while it is needed.
  const Caught well = failure([] { ::_exit(0); });
  CHECK_ERROR(well, Errc::peer_lost, "rank 1 died");
}

TEST_CASE("a rank that was killed is the cause, not those that noticed", "[launch][processes]") {
  for (int i = 0; i < 5; ++i) {
    const Caught c = caught([&] {
      tally::launch(3, [&](Communicator& comm) {
        if (comm.rank() == i % 3) ::raise(SIGKILL);
        comm.barrier();
      });
    });
    CHECK_ERROR(c, Errc::rank_failed, "killed by signal 9");
    CHECK(c.rank == i % 3);
  }
}

// ---- What is left.

std::size_t status_kib(const char* field) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(field)) return std::stoul(line.substr(line.find(':') + 1));
  return 0;
}

void leaves_nothing(RankKind kind) {
  const auto some = [&](int i) {
    const Caught c = caught([&] {
      tally::launch(
          2 + i % 3,
          [&](Communicator& comm) {
            Communicator second = comm.duplicate();
            std::vector<float> data(20'000, 1);
            second.all_reduce(data, tally::sum);
            comm.barrier();
            if (i % 5 == 1 && comm.rank() == 1) throw std::runtime_error("on purpose");
            if (i % 5 == 2) comm.abort("on purpose");
            if (i % 5 == 3 && comm.rank() == 0) second.broadcast(data, 1, {.timeout = 1ms});
          },
          kind);
    });
    if (i % 5 == 1) CHECK(c.is(Errc::rank_failed));
    if (i % 5 == 0) CHECK_FALSE(c.error);
  };
  for (int i = 0; i < 10; ++i) some(i);  // what is allocated once is allocated now
  const int descriptors = open_descriptors();
  const std::size_t resident = status_kib("VmRSS"), mapped = status_kib("VmSize");
  for (int i = 0; i < 50; ++i) some(i);
  CHECK(open_descriptors() == descriptors);
  CHECK(open_descriptors("memfd:tally") == 0);
  CHECK(no_children());
  CHECK(shm_entries() == 0);
  std::ifstream maps("/proc/self/maps");
  const std::string text(std::istreambuf_iterator<char>(maps), {});
  CHECK_FALSE(has(text, "memfd:tally"));
  // 50 launches use some 150 MiB of slots: a tenth of them lost would show. Sanitizers keep freed memory for a while.
  if (!sanitized) {
    CHECK(status_kib("VmRSS") < resident + 16 * 1024);
    if (kind == tally::processes) CHECK(status_kib("VmSize") < mapped + 16 * 1024);
  }
}
TALLY_TEST_BOTH("launch leaves nothing behind", "[launch]", leaves_nothing)

TEST_CASE("buffered output appears once", "[launch][processes]") {
  for (const bool synced : {true, false}) {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    Process writer([&] {
      ::dup2(ends[1], 1);
      ::close(ends[0]);
      std::ios::sync_with_stdio(synced);
      std::printf("before ");  // stays in the buffer: a pipe is no terminal
      std::cout << "launch ";
      tally::launch(3, [](Communicator& comm) {
        if (comm.rank() != 0) comm.barrier();  // one after the other, so that lines do not mix
        std::printf("printed%d ", comm.rank());
        std::cout << "streamed" << comm.rank() << ' ';
        if (comm.rank() == 0) comm.barrier();
      });
      const Caught c = caught([] {
        tally::launch(2, [](Communicator& comm) {
          if (comm.rank() == 1) {
            std::printf("failing ");
            throw std::runtime_error("with text in the buffer");
          }
        });
      });
      expect(c.is(Errc::rank_failed), c.text);
      std::printf("after ");
    });
    ::close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t got = 0; (got = ::read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(got));
    ::close(ends[0]);
    CHECK(exited_well(writer.wait(20s)));
    std::istringstream words(text);
    std::vector<std::string> said{std::istream_iterator<std::string>(words), {}};
    CAPTURE(synced, text);
    for (const char* word : {"before", "launch", "printed0", "printed1", "printed2", "streamed0", "streamed1", "streamed2", "failing", "after"})
      CHECK(std::ranges::count(said, word) == 1);
    CHECK(said.size() == 10);
  }
}

TEST_CASE("launch works where the signal of ended children is ignored", "[launch][processes]") {
  // Then the kernel reaps children itself, and waitpid() has nothing to say.
  const Caught c = caught_apart(5s, [] {
    ::signal(SIGCHLD, SIG_IGN);
    tally::launch(2, one_barrier);
    const Caught failure = caught([] {
      tally::launch(2, [](Communicator& comm) {
        if (comm.rank() == 1) throw std::runtime_error("still reported");
        comm.barrier();
      });
    });
    expect(failure.is(Errc::rank_failed) && has(failure.text, "rank 1: still reported"), failure.text);
  });
  CAPTURE(c);
  CHECK((c.ran && !c.error && !c.foreign));
}

TEST_CASE("launch leaves other children alone", "[launch][processes]") {
  const Shared<std::atomic<int>> seen;
  Process other([&] { expect(eventually(20s, [&] { return seen->load() != 0; }), "seen alive"); });
  Process ended([] {});
  tally::launch(2, one_barrier);
  CHECK(lives(other.pid()));
  seen->store(1);
  CHECK(exited_well(ended.wait(5s)));
  CHECK(exited_well(other.wait(5s)));
}

// ---- Too little of everything. Each in a process of its own, because limits cannot be raised again.

void limit(int resource, rlim_t value) {
  const rlimit both{value, value};
  expect(::setrlimit(static_cast<__rlimit_resource_t>(resource), &both) == 0, "setrlimit");
}
rlim_t lowest_unused_descriptor() {
  const int fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  ::close(fd);
  return static_cast<rlim_t>(fd);
}

TEST_CASE("too few descriptors", "[launch][processes]") {
  if (sanitized) return;  // UBSan looks at objects through a pipe, and without one believes that all are broken
  bool refused = false, enough = false;
  for (rlim_t spare = 0; spare <= 14; ++spare) {
    const Caught c = caught_apart(10s, [&] {
      limit(RLIMIT_NOFILE, lowest_unused_descriptor() + spare);
      const Caught launched = caught([] { tally::launch(3, one_barrier); });
      expect(no_children(), "no process is left");
      if (launched.error) throw tally::Error(launched.code, launched.text);
      expect(!launched.foreign, launched.text);
    });
    CAPTURE(spare, c);
    CHECK((c.ran && !c.foreign));
    if (c.error) {
      refused = true;
      CHECK(c.code == Errc::no_resources);
      CHECK_THAT(c.text, Catch::Contains("descriptor"));
    } else {
      enough = true;
    }
    if (spare == 0) CHECK(c.error);
  }
  CHECK((refused && enough));
}

TEST_CASE("files may not be as long as the segment", "[launch][processes]") {
  for (const rlim_t bytes : {rlim_t{0}, rlim_t{4096}, rlim_t{100'000}}) {
    const Caught c = caught_apart(10s, [&] {
      limit(RLIMIT_FSIZE, bytes);
      tally::launch(2, one_barrier);
    });
    CHECK_ERROR(c, Errc::no_resources, "file size limit");
  }
  // Enough for one communicator, not for its duplicate: all ranks hear of it, and the first one goes on.
  const Caught c = caught_apart(10s, [] {
    limit(RLIMIT_FSIZE, tally::SlotLayout(2, {}).bytes() + 8192);
    tally::launch(2, [](Communicator& comm) {
      const Caught duplicated = caught([&] { comm.duplicate(); });
      expect(duplicated.is(Errc::no_resources), duplicated.text);
      comm.barrier();
    });
  });
  CAPTURE(c);
  CHECK((c.ran && !c.error && !c.foreign));
}

TEST_CASE("too little address space for the segment", "[launch][processes]") {
  if (sanitized) return;  // their shadow memory needs more than any limit
  for (const RankKind kind : {tally::processes, tally::threads}) {
    const Caught c = caught_apart(10s, [&] {
      Options options;
      options.slots.slots = 512;  // 8 ranks: 470 MiB
      options.slots.budget = std::size_t{1} << 30;
      limit(RLIMIT_AS, status_kib("VmSize") * 1024 + (rlim_t{150} << 20));
      tally::launch(8, one_barrier, kind, options);
    });
    CHECK_ERROR(c, Errc::no_resources, "bytes of");
  }
}

TEST_CASE("too little address space for threads", "[launch][processes]") {
  // The slots fit; the stacks of the first, the second or the third thread do not. No rank may be missing unnoticed.
  if (sanitized) return;
  for (const rlim_t mebibytes : {rlim_t{6}, rlim_t{12}, rlim_t{20}}) {
    const Caught c = caught_apart(10s, [&] {
      std::jthread([] {}).join();
      limit(RLIMIT_STACK, 8 << 20);
      limit(RLIMIT_AS, status_kib("VmSize") * 1024 + (mebibytes << 20));
      std::atomic<int> ran{0};
      Options options;
      options.slots.slots = 2;
      options.slots.slot_bytes = 1024;
      options.slots.budget = 1 << 20;  // and so no blocks
      tally::launch(8, [&](Communicator&) { ++ran; }, tally::threads, options);
      expect(ran == 8, std::to_string(ran) + " of 8 ranks ran, and nobody complained");
    });
    CAPTURE(mebibytes);
    CHECK_ERROR(c, Errc::no_resources, "could not be started");
  }
}

TEST_CASE("too few processes", "[launch][processes]") {
  for (const rlim_t processes : {rlim_t{1}, rlim_t{2}, rlim_t{3}}) {
    const Caught c = caught_apart(10s, [&] {
      // The limit does not bind root, and counts all processes of a user: become one who has no other.
      if (::geteuid() == 0) expect(::setresuid(48'151, 48'151, 48'151) == 0, "setresuid");
      else if (processes > 1) return limit(RLIMIT_NPROC, 1), tally::launch(2, one_barrier);
      limit(RLIMIT_NPROC, processes);
      const Caught launched = caught([] { tally::launch(4, one_barrier); });
      expect(no_children(), "no process is left");
      if (launched.error) throw tally::Error(launched.code, launched.text);
    });
    CAPTURE(processes);
    CHECK_ERROR(c, Errc::no_resources, "fork");
  }
}

}  // namespace
