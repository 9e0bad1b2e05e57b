// SPDX-License-Identifier: Apache-2.0
// Communicators that are made from the environment by processes started one by one, as a launcher does, and
// duplicates. Ranks that disagree, are missing, there twice or die on the way, strangers at the door: each has an
// error that says so, within the deadline.
#include <catch2/catch.hpp>

#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <map>
#include <sstream>

#include "processes.hpp"

using namespace test;
using tally::Communicator;
using tally::Errc;
using tally::Options;
using tally::RankKind;

namespace {

using Variables = std::map<std::string, std::string>;

constexpr const char* launchers[] = {
    "TALLY_RANK",  "TALLY_SIZE",      "TALLY_JOB",      "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_MCA_ess_base_jobid",
    "PMIX_NAMESPACE", "PMI_RANK",     "PMI_SIZE",       "MPI_LOCALNRANKS",      "PMI_JOBID",            "RANK",                       "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_PROCID",   "SLURM_NTASKS",         "SLURM_JOB_ID",               "SLURM_STEP_ID",
};

std::string new_job() {
  static int count = 0;
  return "test" + std::to_string(::getpid()) + "." + std::to_string(++count);
}

/// Processes that each call init() and then f(comm), with the errors of both.
class Job {
 public:
  explicit Job(std::string name = new_job()) : name_(std::move(name)) {}

  const std::string& name() const { return name_; }
  /// Starts one more process; returns its index.
  template <class F>
  std::size_t start(const Variables& variables, F f) {
    const std::size_t i = processes_.size();
    processes_.emplace_back([&, i] {
      for (const char* variable : launchers) ::unsetenv(variable);
      ::setenv("TALLY_TIMEOUT", "10", 1);
      for (const auto& [variable, value] : variables) ::setenv(variable.c_str(), value.c_str(), 1);
      (*caught_)[i].record([&] {
        Communicator comm = tally::init();
        f(comm);
      });
    });
    return i;
  }
  template <class F>
  std::size_t start(int rank, int size, F f, Variables more = {}) {
    more.insert({{"TALLY_RANK", std::to_string(rank)}, {"TALLY_SIZE", std::to_string(size)}, {"TALLY_JOB", name_}});
    return start(more, f);
  }
  Process& process(std::size_t i) { return processes_[i]; }
  /// What became of every process; those that hang are ended.
  std::vector<Caught> wait(std::chrono::nanoseconds limit = 20s) {
    const auto end = std::chrono::steady_clock::now() + limit;
    for (std::size_t i = 0; i < processes_.size(); ++i)
      if (!processes_[i].wait(end - std::chrono::steady_clock::now())) (*caught_)[i].write("hung and was killed");
    return {caught_->begin(), caught_->begin() + static_cast<std::ptrdiff_t>(processes_.size())};
  }

 private:
  std::string name_;
  Shared<std::array<Caught, most_ranks>> caught_;
  std::vector<Process> processes_;
};

std::string all_of(const std::vector<Caught>& results) {
  std::ostringstream out;
  for (std::size_t i = 0; i < results.size(); ++i) out << "\n  process " << i << ": " << results[i];
  return out.str();
}
bool well(const Caught& c) { return c.ran && !c.error && !c.foreign; }

void add_up(Communicator& comm) {
  std::vector<int> data(3000, comm.rank() + 1);
  comm.all_reduce(data, tally::sum);
  const int expected = comm.size() * (comm.size() + 1) / 2;
  expect(std::ranges::count(data, expected) == 3000, "the sum of all ranks");
  comm.barrier();
}

void check_well(const std::vector<Caught>& results) {
  CAPTURE(all_of(results));
  for (const Caught& c : results) CHECK(well(c));
}

// ---- Jobs that work.

TEST_CASE("processes meet by TALLY_RANK, TALLY_SIZE and TALLY_JOB", "[bootstrap][processes]") {
  for (int n = 2; n <= 4; ++n) {
    Job job;
    for (int r = n - 1; r >= 0; --r)  // rank 0 comes last: the others wait for it
      job.start(r, n, [=](Communicator& comm) {
        expect(comm.rank() == r && comm.size() == n, "rank and size are what the environment says");
        add_up(comm);
      });
    check_well(job.wait());
  }
  CHECK(shm_entries() == 0);
}

TEST_CASE("ranks may come late", "[bootstrap][processes]") {
  for (const int late : {0, 1, 2}) {
    Job job;
    for (int r = 0; r < 3; ++r)
      if (r != late) job.start(r, 3, add_up);
    std::this_thread::sleep_for(150ms);
    job.start(late, 3, add_up);
    check_well(job.wait());
  }
}

TEST_CASE("one rank alone needs nothing", "[bootstrap][processes]") {
  Job alone;
  const auto single = [](Communicator& comm) {
    expect(comm.rank() == 0 && comm.size() == 1, "rank 0 of 1");
    add_up(comm);
    Communicator second = comm.duplicate();
    add_up(second);
  };
  alone.start(Variables{}, single);
  alone.start(0, 1, single);
  alone.start(0, 1, single);  // not the same job as the one before: nobody is met
  check_well(alone.wait());
}

TEST_CASE("other launchers' variables are understood", "[bootstrap][processes]") {
  const std::string job = new_job();
  const std::vector<std::vector<std::string>> known = {
      {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_ess_base_jobid"}, {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE"},
      {"PMI_RANK", "PMI_SIZE", "PMI_JOBID"},                                       {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"},
      {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID"},                            {"TALLY_RANK", "TALLY_SIZE", ""},  // without a job: the same parent
  };
  for (const auto& names : known) {
    CAPTURE(names);
    Job processes;
    for (int r = 0; r < 2; ++r) {
      Variables variables{{names[0], std::to_string(r)}, {names[1], "2"}};
      if (!names[2].empty()) variables[names[2]] = job + names[2];
      processes.start(variables, [=](Communicator& comm) {
        expect(comm.rank() == r && comm.size() == 2, "rank and size");
        add_up(comm);
      });
    }
    check_well(processes.wait());
  }
  // Ranks on several hosts are out of reach, and it says so.
  Job several;
  several.start(Variables{{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}, add_up);
  several.start(Variables{{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_WORLD_SIZE", "2"}}, add_up);
  for (const Caught& c : several.wait()) {
    CAPTURE(c);
    CHECK(c.is(Errc::unsupported));
    CHECK_THAT(c.text, Catch::Contains("some of the 4 ranks on other hosts"));
  }
}

TEST_CASE("jobs of different names do not meet", "[bootstrap][processes]") {
  Job a, b;
  // Longer than an address can be, and different only at the end.
  Job c(new_job() + std::string(300, 'x') + "1"), d(c.name().substr(0, c.name().size() - 1) + "2");
  Job* const jobs[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i)
    for (int r = 0; r < 2; ++r)
      jobs[i]->start(r, 2, [=](Communicator& comm) {
        int value = i;
        comm.broadcast(std::span(&value, 1), 0);
        expect(value == i, "the root is of this job");
      });
  for (Job* job : jobs) check_well(job->wait());
}

TEST_CASE("init may be called again", "[bootstrap][processes]") {
  Job job;
  for (int r = 0; r < 3; ++r)
    job.start(r, 3, [](Communicator& first) {
      Communicator second = tally::init();
      for (int i = 0; i < 20; ++i) {
        add_up(first);
        add_up(second);
      }
      { Communicator third = tally::init(); }
      const int before = open_descriptors();
      for (int i = 0; i < 5; ++i) {
        Communicator more = tally::init();
        add_up(more);
      }
      expect(open_descriptors() == before, "init leaves no descriptors behind");
      add_up(first);
    });
  check_well(job.wait());
}

// ---- Jobs that cannot work.

TEST_CASE("garbage in a rank's variables", "[bootstrap][processes]") {
  const Variables garbage[] = {
      {{"TALLY_RANK", "0"}},
      {{"TALLY_SIZE", "2"}},
      {{"TALLY_RANK", "2"}, {"TALLY_SIZE", "2"}},
      {{"TALLY_RANK", "-1"}, {"TALLY_SIZE", "2"}},
      {{"TALLY_RANK", "first"}, {"TALLY_SIZE", "2"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "0"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "-2"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "2x"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "40000"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "99999999999999999999"}},
      {{"TALLY_RANK", "1"}, {"TALLY_SIZE", "1"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "1"}, {"TALLY_TIMEOUT", "soon"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "1"}, {"TALLY_TRANSPORT", "shm"}},
      {{"TALLY_RANK", "0"}, {"TALLY_SIZE", "2"}, {"TALLY_TRANSPORT", "thread"}},
  };
  Job job;
  for (const Variables& variables : garbage) job.start(variables, add_up);
  const std::vector<Caught> results = job.wait();
  for (std::size_t i = 0; i < results.size(); ++i) {
    CAPTURE(garbage[i], results[i]);
    CHECK(results[i].is(Errc::invalid_argument));
    CHECK((has(results[i].text, "TALLY_") || has(results[i].text, "transport '")));
  }
}

TEST_CASE("ranks that disagree on size", "[bootstrap][processes]") {
  for (const auto& [zero, one] : {std::pair(2, 3), std::pair(3, 2), std::pair(2, 64)}) {
    Job job;
    job.start(0, zero, add_up);
    job.start(1, one, add_up);
    const std::vector<Caught> results = job.wait();
    CAPTURE(all_of(results));
    for (const Caught& c : results) {
      CHECK(c.is(Errc::mismatch));
      CHECK_THAT(c.text, Catch::Contains("disagree on size") && Catch::Contains("rank 0 says " + std::to_string(zero)) && Catch::Contains("rank 1 says " + std::to_string(one)));
      CHECK(ms(c.ended - c.began) < 5'000);
    }
  }
}

TEST_CASE("ranks that disagree on settings", "[bootstrap][processes]") {
  const std::pair<Variables, const char*> odd[] = {{{{"TALLY_ACCOUNTING", "off"}}, "accounting"}, {{{"TALLY_SLOT_BYTES", "1024"}}, "slot settings"}, {{{"TALLY_SLOTS", "2"}}, "slot settings"}};
  for (const auto& [variables, part] : odd)
    for (const int which : {0, 1}) {
      Job job;
      for (int r = 0; r < 2; ++r) job.start(r, 2, add_up, r == which ? variables : Variables{});
      const std::vector<Caught> results = job.wait();
      CAPTURE(all_of(results));
      for (const Caught& c : results) {
        CHECK(c.is(Errc::mismatch));
        CHECK_THAT(c.text, Catch::Contains(part) && Catch::Contains("rank 1"));
      }
    }
}

TEST_CASE("a rank that is there twice", "[bootstrap][processes]") {
  Job job;
  job.start(0, 3, add_up);
  job.start(1, 3, add_up);
  job.start(1, 3, add_up);
  const std::vector<Caught> results = job.wait();
  CAPTURE(all_of(results));
  for (const Caught& c : results) {
    CHECK(c.is(Errc::mismatch));
    CHECK_THAT(c.text, Catch::Contains("two processes say that they are rank 1"));
  }
}

TEST_CASE("rank 0 is there twice", "[bootstrap][processes]") {
  Job job;
  job.start(0, 2, add_up);
  job.start(0, 2, add_up);
  std::this_thread::sleep_for(100ms);
  job.start(1, 2, add_up);
  const std::vector<Caught> results = job.wait();
  CAPTURE(all_of(results));
  const std::size_t refused = results[0].error ? 0 : 1;  // whoever came second
  CHECK(results[refused].is(Errc::invalid_argument));
  CHECK_THAT(results[refused].text, Catch::Contains("another rank 0"));
  CHECK(well(results[1 - refused]));
  CHECK(well(results[2]));
}

TEST_CASE("missing ranks are named at the deadline", "[bootstrap][processes]") {
  const Variables soon{{"TALLY_TIMEOUT", "1"}};
  for (const bool zero_first : {true, false}) {
    Job job;
    job.start(zero_first ? 0 : 3, 5, add_up, soon);
    std::this_thread::sleep_for(200ms);  // so it is clear whose deadline passes first
    job.start(zero_first ? 3 : 0, 5, add_up, soon);
    const std::vector<Caught> results = job.wait();
    CAPTURE(zero_first, all_of(results));
    const Caught &zero = results[zero_first ? 0 : 1], &three = results[zero_first ? 1 : 0];
    CHECK(zero.is(Errc::timeout));
    CHECK_THAT(zero.text, Catch::Contains("but rank 1, 2, 4 did not appear"));
    CHECK(ms(zero.ended - zero.began) >= 999);
    // The rank that was there hears of it, or finds at its own deadline that the job is not complete.
    CHECK(three.is(Errc::timeout));
    for (const Caught& c : results) CHECK(ms(c.ended - c.began) < 5'000);
  }
  Job headless;
  headless.start(1, 2, add_up, soon);
  const std::vector<Caught> results = headless.wait();
  CAPTURE(all_of(results));
  CHECK(results[0].is(Errc::timeout));
  CHECK_THAT(results[0].text, Catch::Contains("rank 0") && Catch::Contains(headless.name()));
  CHECK(ms(results[0].ended - results[0].began) >= 999);
}

// ---- Strangers.

class Stranger {
 public:
  /// Knocks at the door of rank 0 of this job, as soon as it opens.
  explicit Stranger(const std::string& job) : socket_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    const std::string name = "tally/" + std::to_string(::getuid()) + "/" + job + "/0";
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    name.copy(address.sun_path + 1, sizeof address.sun_path - 1);
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    connected_ = eventually(5s, [&] { return ::connect(socket_, reinterpret_cast<const sockaddr*>(&address), length) == 0; });
  }
  Stranger(Stranger&& other) noexcept : socket_(std::exchange(other.socket_, -1)), connected_(other.connected_) {}
  Stranger& operator=(Stranger&&) = delete;
  ~Stranger() {
    if (socket_ >= 0) ::close(socket_);
  }
  bool connected() const { return connected_; }
  void say(const std::string& text) const { CHECK(::send(socket_, text.data(), text.size(), MSG_NOSIGNAL) >= 0); }

 private:
  int socket_;
  bool connected_ = false;
};

TEST_CASE("strangers that talk nonsense are ignored", "[bootstrap][processes]") {
  Job job;
  job.start(0, 2, add_up);
  {
    Stranger gone(job.name());  // and gone at once
    CHECK(gone.connected());
  }
  Stranger empty(job.name()), brief(job.name());
  empty.say("");
  brief.say("hello");
  CHECK((empty.connected() && brief.connected()));
  job.start(1, 2, add_up);
  check_well(job.wait());
}

TEST_CASE("a stranger that rambles is ignored", "[bootstrap][processes]") {
  Job job;
  job.start(0, 2, add_up);
  Stranger rambling(job.name());
  REQUIRE(rambling.connected());
  rambling.say(std::string(5000, 'z'));
  job.start(1, 2, add_up);
  const std::vector<Caught> results = job.wait();
  check_well(results);
}

TEST_CASE("a silent stranger does not use up the deadline", "[bootstrap][processes]") {
  Job job;
  job.start(0, 2, add_up, {{"TALLY_TIMEOUT", "1.5"}});
  Stranger silent(job.name());
  REQUIRE(silent.connected());
  job.start(1, 2, add_up, {{"TALLY_TIMEOUT", "1.5"}});
  check_well(job.wait());
}

TEST_CASE("silent strangers do not hold up a job one after another", "[bootstrap][processes]") {
  Job job;
  job.start(0, 3, add_up);
  std::vector<Stranger> silent;
  for (int i = 0; i < 3; ++i) silent.emplace_back(job.name());
  job.start(1, 3, add_up);
  job.start(2, 3, add_up);
  const std::vector<Caught> results = job.wait();
  check_well(results);
  CHECK(ms(results[0].ended - results[0].began) < 4'000);
}

// ---- Ranks that die, before they have met and after.

TEST_CASE("a rank dies while the others gather", "[bootstrap][processes]") {
  Job job;
  job.start(0, 3, add_up);
  const std::size_t victim = job.start(1, 3, add_up);
  std::this_thread::sleep_for(150ms);
  job.process(victim).kill(SIGKILL);
  std::this_thread::sleep_for(20ms);
  job.start(2, 3, add_up);
  const std::vector<Caught> results = job.wait();
  CAPTURE(all_of(results));
  for (const std::size_t r : {0u, 2u}) {
    CHECK(results[r].is(Errc::peer_lost));
    CHECK_THAT(results[r].text, Catch::Contains("rank 1"));
    CHECK(ms(results[r].ended - results[r].began) < 5'000);
  }
}

TEST_CASE("rank 0 dies while the others gather", "[bootstrap][processes]") {
  Job job;
  job.start(0, 3, add_up);
  job.start(1, 3, add_up);
  std::this_thread::sleep_for(150ms);
  job.process(0).kill(SIGKILL);
  const std::vector<Caught> results = job.wait();
  CAPTURE(all_of(results));
  CHECK(results[1].is(Errc::peer_lost));
  CHECK_THAT(results[1].text, Catch::Contains("rank 0"));
  CHECK(ms(results[1].ended - results[1].began) < 5'000);
}

TEST_CASE("a rank started by hand dies", "[bootstrap][processes]") {
  for (const int victim : {0, 2}) {
    Job job;
    for (int r = 0; r < 3; ++r)
      job.start(r, 3, [=](Communicator& comm) {
        add_up(comm);
        if (comm.rank() == victim) ::raise(SIGKILL);
        for (;;) comm.barrier();
      });
    const std::vector<Caught> results = job.wait();
    CAPTURE(victim, all_of(results));
    for (int r = 0; r < 3; ++r) {
      if (r == victim) continue;
      const Caught& c = results[static_cast<std::size_t>(r)];
      CHECK(c.is(Errc::peer_lost));
      CHECK_THAT(c.text, Catch::Contains("rank " + std::to_string(victim) + " died"));
      CHECK(ms(c.ended - c.began) < 5'000);
    }
  }
}

TEST_CASE("a rank started by hand leaves or calls something else", "[bootstrap][processes]") {
  Job leaving;
  for (int r = 0; r < 2; ++r)
    leaving.start(r, 2, [](Communicator& comm) {
      if (comm.rank() == 0) comm.barrier({.timeout = 5s});
    });
  const std::vector<Caught> left = leaving.wait();
  CAPTURE(all_of(left));
  CHECK(left[0].is(Errc::peer_left));
  CHECK(well(left[1]));

  Job roots;
  for (int r = 0; r < 2; ++r)
    roots.start(r, 2, [](Communicator& comm) {
      int value = 0;
      comm.broadcast(std::span(&value, 1), comm.rank());
      comm.barrier();
    });
  const std::vector<Caught> both = roots.wait();
  CAPTURE(all_of(both));
  for (const Caught& c : both) {
    CHECK(c.is(Errc::mismatch));
    CHECK_THAT(c.text, Catch::Contains("broadcast("));
  }
}

// ---- Too few descriptors.

void few_descriptors(int limited) {
  if (sanitized) return;  // UBSan looks at objects through a pipe, and without one believes that all are broken
  bool refused = false, enough = false;
  for (int spare = 0; spare <= 10; ++spare) {
    Job job;
    const std::string file = job.name();
    for (int r = 0; r < 2; ++r) {
      // init() of a rank under a limit that is set before; one that only wants to know who it is comes first.
      Variables variables{{"TALLY_RANK", std::to_string(r)}, {"TALLY_SIZE", "2"}, {"TALLY_JOB", file}, {"TALLY_TIMEOUT", "2"}};
      job.start(Variables{}, [=](Communicator&) {
        for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
        if (r == limited) {
          const int unused = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
          ::close(unused);
          const rlimit both{static_cast<rlim_t>(unused + spare), static_cast<rlim_t>(unused + spare)};
          expect(::setrlimit(RLIMIT_NOFILE, &both) == 0, "setrlimit");
        }
        Communicator comm = tally::init();
        add_up(comm);
      });
    }
    const std::vector<Caught> results = job.wait(6s);
    CAPTURE(limited, spare, all_of(results));
    const Caught& c = results[static_cast<std::size_t>(limited)];
    CHECK((c.ran && !c.foreign));
    CHECK((results[static_cast<std::size_t>(1 - limited)].ran));
    if (c.error) CHECK(c.code == Errc::no_resources);
    (c.error ? refused : enough) = true;
    if (enough && !c.error) break;
  }
  CHECK((refused && enough));
}
TEST_CASE("too few descriptors for rank 0", "[bootstrap][processes]") { few_descriptors(0); }
TEST_CASE("too few descriptors for rank 1", "[bootstrap][processes]") { few_descriptors(1); }

// ---- Duplicates.

void independent(RankKind kind) {
  const Shared<std::atomic<int>> through;
  tally::launch(
      3,
      [&](Communicator& comm) {
        Communicator second = comm.duplicate();
        Communicator third = second.duplicate();  // of a duplicate
        expect(second.rank() == comm.rank() && third.size() == 3, "the same ranks");
        std::vector<int> data(5000);
        Communicator* const all[] = {&comm, &second, &third};
        for (int i = 0; i < 30; ++i)
          for (int k = 0; k < 3; ++k) {
            std::ranges::fill(data, comm.rank() + i * k);
            all[k]->all_reduce(data, tally::sum);
            expect(std::ranges::count(data, 3 + 3 * i * k) == 5000, "each communicator has its own data");
          }
        // Not in the same order everywhere, as long as each communicator's own order is the same: rank 0 sends on
        // one what the others only receive after something on another.
        int a = comm.rank() == 0 ? 7 : 0, b = comm.rank() == 0 ? 8 : 0;
        if (comm.rank() == 0) {
          second.broadcast(std::span(&a, 1), 0);
          third.broadcast(std::span(&b, 1), 0);
        } else {
          third.broadcast(std::span(&b, 1), 0);
          second.broadcast(std::span(&a, 1), 0);
        }
        expect(a == 7 && b == 8, "crossing order of small broadcasts");
        // A timeout on one is no failure of another, and the deadline is inherited.
        second.set_timeout(19s);
        Communicator fourth = second.duplicate();
        expect(fourth.timeout() == 19s, "the deadline is inherited");
        fourth.set_timeout(30ms);
        if (comm.rank() == 1) expect(eventually(10s, [&] { return *through == 2; }), "the others came through");
        expect(caught([&] { fourth.barrier(); }).is(Errc::timeout), "the duplicate's deadline passed");
        ++*through;
        comm.barrier();
        add_up(third);
      },
      kind);
}
TALLY_TEST_BOTH("duplicates are independent", "[bootstrap]", independent)

void outlives(RankKind kind) {
  tally::launch(
      2,
      [](Communicator& comm) {
        std::optional<Communicator> second(comm.duplicate());
        Communicator third = second->duplicate();
        second.reset();
        add_up(third);
        add_up(comm);
        Communicator moved = std::move(third);
        add_up(moved);
      },
      kind);
}
TALLY_TEST_BOTH("a duplicate outlives what it was made from", "[bootstrap]", outlives)

void at_once(RankKind kind) {
  // Each thread of a rank has a communicator of its own.
  tally::launch(
      2,
      [](Communicator& comm) {
        std::vector<Communicator> mine;
        for (int i = 0; i < 3; ++i) mine.push_back(comm.duplicate());
        std::atomic<int> failed{0};
        {
          std::vector<std::jthread> threads;
          for (Communicator& each : mine)
            threads.emplace_back([&] {
              try {
                for (int i = 0; i < 50; ++i) add_up(each);
              } catch (const std::exception& error) {
                ++failed;
                each.abort(error.what());
              }
            });
        }
        expect(failed == 0, "all threads' operations worked");
        add_up(comm);
      },
      kind, [] {
        Options options;
        options.timeout = 20s;
        return options;
      }());
}
TALLY_TEST_BOTH("duplicates are used by several threads at once", "[bootstrap]", at_once)

TEST_CASE("duplicates give back what they used", "[bootstrap][processes]") {
  tally::launch(2, [](Communicator& comm) {
    std::vector<float> data(200'000, 1);
    const auto use_one = [&] {
      Communicator second = comm.duplicate();
      second.all_reduce(data, tally::max);
    };
    use_one();
    comm.barrier();
    const int before = open_descriptors();
    const std::int64_t resident = resident_shared();
    expect(resident > 0, "the job's file is seen");
    for (int i = 0; i < 200; ++i) use_one();
    // The last one to leave gives memory back: that may be the other rank, soon.
    comm.barrier();
    expect(eventually(5s, [&] { return resident_shared() < resident + 3 * 600 * 1024; }),
           "200 duplicates of 530 KiB each left " + std::to_string(resident_shared() - resident) + " bytes in memory");
    expect(open_descriptors() == before, "no descriptors are left");
    comm.barrier();
  });
}

TEST_CASE("duplicates of threads give back what they used", "[bootstrap]") {
  tally::launch(
      2,
      [&](Communicator& comm) {
        const auto use = [&](int times) {
          for (int i = 0; i < times; ++i) {
            Communicator second = comm.duplicate();
            second.barrier();
          }
          comm.barrier();
        };
        use(10);
        const long before = test::resident_bytes();
        use(200);  // 106 MB of slots
        if (!sanitized) expect(test::resident_bytes() < before + (20 << 20), "memory is given back, not " + std::to_string((test::resident_bytes() - before) >> 20) + " MiB kept");
      },
      tally::threads);
}

void failed_duplicate(RankKind kind) {
  // One rank duplicates, the other does something else: an error on both, as for any other operation.
  const Outcome outcome = outcome_of(2, kind, [](Communicator& comm) {
    if (comm.rank() == 0) comm.duplicate();
    else comm.barrier();
    comm.barrier();
  });
  CAPTURE(outcome);
  for (const Caught& rank : outcome.ranks) CHECK(rank.is(Errc::mismatch));
}
TALLY_TEST_BOTH("duplicate is collective", "[bootstrap]", failed_duplicate)

}  // namespace
