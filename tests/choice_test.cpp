// SPDX-License-Identifier: Apache-2.0
// How algorithms are chosen: what their texts are estimated to cost, what measurements say instead, who may overrule
// both, and what explain() tells of it. And that waiting policies can be asked for.
#include <catch2/catch.hpp>

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>

using namespace tally;

namespace {

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

class File {
 public:
  explicit File(const std::string& text) : path_("/tmp/tally_choice_" + std::to_string(::getpid())) { std::ofstream(path_) << text; }
  ~File() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string problem_with(const std::string& text) {
  const File file(text);
  CostModel model;
  try {
    read_model(file.path(), "shm", 2, model);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("profiles are what the texts say") {
  const auto profile = [](std::string_view name, Collective operation, int n) { return detail::profile_of(find_algorithm(operation, name), operation, n); };
  for (const int n : {2, 3, 4, 8}) {
    const double others = n - 1, share = others / n;
    const auto ring = profile("ring", Collective::all_reduce, n);
    CHECK(ring.chain == 2 * others);
    CHECK(ring.messages == 4 * others);
    CHECK(ring.sent == Approx(2 * share));
    CHECK(ring.received == Approx(2 * share));
    const auto one_shot = profile("one_shot", Collective::all_reduce, n);
    CHECK(one_shot.chain == 1);
    CHECK(one_shot.sent == Approx(others));
    const auto two_shot = profile("two_shot", Collective::all_reduce, n);
    CHECK(two_shot.chain == 2);
    CHECK(two_shot.sent == Approx(2 * share));
    CHECK(profile("chain", Collective::broadcast, n).chain == others);
    CHECK(profile("zero_copy", Collective::all_reduce, n).sent == Approx(share));
  }
  CHECK(profile("recursive_doubling", Collective::all_reduce, 8).chain == 3);
  CHECK(profile("tree", Collective::broadcast, 8).chain == 3);
  CHECK(profile("recursive_halving", Collective::all_reduce, 8).sent == Approx(2 * 7.0 / 8));
  CHECK(profile("one_shot", Collective::barrier, 4).chain == 1);
  // All profiles of all operations are found, also where ranks are no power of two.
  for (const Collective operation : all_operations)
    for (const std::string_view name : algorithms_for(operation))
      for (const int n : {1, 5, 7})
        if (operation != Collective::neighbour_exchange) CHECK(profile(name, operation, n).chain >= (n == 1 ? 0 : 1));
}

TEST_CASE("estimates prefer few messages for little data and few bytes for much") {
  CostModel model;
  model.cores = 64;
  Chooser chooser(16, model);
  const auto chosen = [&](Collective operation, std::size_t bytes) { return std::string(chooser.choose(operation, bytes, {}).name); };
  CHECK((chosen(Collective::all_reduce, 8) == "recursive_doubling" || chosen(Collective::all_reduce, 8) == "one_shot"));
  const auto sent = [&](const std::string& name) { return detail::profile_of(find_algorithm(Collective::all_reduce, name), Collective::all_reduce, 16).sent; };
  CHECK(sent(chosen(Collective::all_reduce, std::size_t{64} << 20)) < 2.0);
  CHECK(chooser.choose(Collective::all_reduce, std::size_t{1} << 20, {true}).share != nullptr);
  CHECK(chooser.choose(Collective::all_reduce, std::size_t{1} << 20, {}).share == nullptr);
}

TEST_CASE("measurements come before estimates, and are interpolated") {
  const File file("# a comment\n\nshm 2 all_reduce tree 8 5\nshm 2 all_reduce tree 32 20 # us\nshm 2 all_reduce ring 8 100\n  shm  2 all_reduce ring 32 1  \r\nthread 2 all_reduce one_shot 8 0.001\nshm 3 all_reduce one_shot 8 0.001\n");
  CostModel model;
  read_model(file.path(), "shm", 2, model);
  CHECK(model.ranks == 2);
  Chooser chooser(2, model);
  const auto estimate = [&](std::string_view name, std::size_t bytes) { return chooser.estimate(find_algorithm(Collective::all_reduce, name), Collective::all_reduce, bytes); };
  CHECK(estimate("tree", 8).measured);
  CHECK(estimate("tree", 8).microseconds == Approx(5));
  CHECK(estimate("tree", 16).microseconds == Approx(10));
  CHECK(estimate("tree", 32).microseconds == Approx(20));
  CHECK(estimate("tree", 1).microseconds == Approx(5));
  CHECK(estimate("tree", 64).microseconds == Approx(40));
  CHECK(estimate("ring", 32).microseconds == Approx(1));
  CHECK_FALSE(estimate("one_shot", 8).measured);
  Chooser three(3, model);
  CHECK_FALSE(three.estimate(find_algorithm(Collective::all_reduce, "tree"), Collective::all_reduce, 8).measured);
}

TEST_CASE("a model that cannot be read is refused with its line") {
  CHECK(problem_with("shm 2 all_reduce tree 8 5\n").empty());
  CHECK_THAT(problem_with("shm 2 all_reduce tree 8\n"), Catch::Contains("line 1: expected: transport ranks operation algorithm bytes microseconds"));
  CHECK_THAT(problem_with("\nshm two all_reduce tree 8 5\n"), Catch::Contains("line 2: 'two' is not a number"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 8 5x\n"), Catch::Contains("'5x' is not a number"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 8 nan\n"), Catch::Contains("'nan' is not a number"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 8 0\n"), Catch::Contains("above 0"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 12 5\n"), Catch::Contains("power of two"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 18446744073709551616 5\n"), Catch::Contains("is not a number"));
  CHECK_THAT(problem_with("shm 2 all_reduce tree 9223372036854775808 5\n"), Catch::Contains("power of two"));
  CHECK_THAT(problem_with("shm 2 all_to_some tree 8 5\n"), Catch::Contains("'all_to_some' is not an operation"));
  CHECK_THAT(problem_with("shm 2 broadcast ring 8 5\n"), Catch::Contains("'ring' is not an algorithm for broadcast"));
  CostModel model;
  CHECK_THROWS_WITH(read_model("/nonexistent/model", "shm", 2, model), Catch::Contains("cannot read '/nonexistent/model'"));
  CHECK_THROWS_WITH(read_model("/", "shm", 2, model), Catch::Contains("cannot read '/': Is a directory"));
  CHECK_THROWS_WITH(read_model("/dev/zero", "shm", 2, model), Catch::Contains("cannot read '/dev/zero': it is no plain file"));
}

namespace {
void model_decides(RankKind kind) {
  const std::string transport = kind == threads ? "thread" : "shm";
  // Nonsense that no estimate would say: so it is the file that decides, on all ranks.
  const File file(transport + " 3 all_reduce tree 8 0.01\n" + transport + " 3 all_reduce chain 65536 0.01\n");
  Options options;
  options.model = file.path();
  launch(3, [&](Communicator& comm) {
    std::vector<float> small(2, 1.0f), large(20'000, 1.0f);
    expect(comm.all_reduce(small, sum).algorithm_name() == "tree", "tree for little");
    Communicator other = comm.duplicate();
    expect(other.all_reduce(small, sum).algorithm_name() == "tree", "a duplicate has the same model");
    expect(comm.all_reduce(large, sum, {.algorithm = "two_shot"}).algorithm_name() == "two_shot", "by name");
    const std::string why = comm.explain(Collective::all_reduce, 8);
    expect(why.find("all_reduce of 8 bytes, 3 ranks: tree") == 0 && why.find("0.010 us  measured") != why.npos && why.find("estimated") != why.npos, why);
    if (comm.transport_name() == "shm") expect(why.find("zero_copy needs memory from allocate()") != why.npos, why);
    expect(comm.explain(Collective::all_reduce, 1 << 20, true).find("zero_copy") != std::string::npos, "symmetric");
    std::string text;
    try {
      comm.all_reduce(large, sum, {.algorithm = "rong"});
    } catch (const Error& error) {
      text = error.what();
    }
    expect(text.find("no algorithm 'rong' offers all_reduce; these do: ring tree") != text.npos, text);
  }, kind, options);
}
}  // namespace

TEST_CASE("rank 0's model decides, threads") { model_decides(threads); }
TEST_CASE("rank 0's model decides, processes", "[processes]") { model_decides(processes); }

TEST_CASE("a choice is explained where the environment made it") {
  Options options;
  options.algorithms = AlgorithmOverrides("all_reduce=ring");
  launch(2, [](Communicator& comm) { expect(comm.explain(Collective::all_reduce, 8).find("ring, because TALLY_ALGORITHM says so") != std::string::npos, "the reason"); }, threads, options);
}

TEST_CASE("what TALLY_ALGORITHM may be is said once each") {
  const auto refused = [](const char* text, const char* why) { CHECK_THROWS_WITH(AlgorithmOverrides(text), std::string("invalid argument: TALLY_ALGORITHM has '") + why); };
  refused("ring,rings", "rings', which names no algorithm: it may be auto, ring, tree, recursive_doubling, one_shot, recursive_halving, two_shot, chain, double_tree, zero_copy, staged, single_copy, hierarchical, hierarchical_halving, bruck, pairwise");
  refused("broadcast=ring", "broadcast=ring', which names no algorithm of that operation: it may be auto, tree, one_shot, two_shot, chain, double_tree, zero_copy, staged, single_copy, hierarchical");
  refused("neighbour_exchange=", "neighbour_exchange=', which names no algorithm of that operation: it may be auto, pairwise");
  refused("allreduce=ring", "allreduce=ring', but no operation is called 'allreduce'");
}

TEST_CASE("waiting policies") {
  CHECK(name_of(WaitPolicy::energy) == "energy");
  for (const WaitPolicy policy : {WaitPolicy::latency, WaitPolicy::balanced, WaitPolicy::energy}) {
    Options options;
    options.wait = policy;
    launch(2, [](Communicator& comm) {
      for (int i = 0; i < 20; ++i) {
        if (comm.rank() == 1) ::usleep(300);
        int x = 1;
        comm.all_reduce(std::span(&x, 1), sum);
        expect(x == 2, "the sum");
      }
    }, threads, options);
  }
}

TEST_CASE("the ladder learns when waits are long") {
  const Clock& clock = Clock::host();
  const Ticks us = clock.to_ticks(std::chrono::microseconds(1));
  const auto parks_after = [&](Ladder& ladder) {  // microseconds
    ladder.restart(false);
    for (Ticks t = 0; t < 100'000; ++t)
      if (ladder.climb(t * us) == Ladder::Rest::park) return t;
    return Ticks{100'000};
  };
  Ladder balanced(clock, WaitPolicy::balanced), energy(clock, WaitPolicy::energy), latency(clock, WaitPolicy::latency);
  CHECK(parks_after(balanced) == 51);
  CHECK(parks_after(energy) <= 6);
  CHECK(parks_after(latency) > 19'000);
  for (int i = 0; i < 8; ++i) balanced.learn(10'000 * us);
  CHECK(parks_after(balanced) <= 6);
  for (int i = 0; i < 100; ++i) balanced.learn(1 * us);  // too short to teach anything
  CHECK(parks_after(balanced) <= 6);
  for (int i = 0; i < 8; ++i) balanced.learn(20 * us);
  CHECK(parks_after(balanced) == 51);
  // What the processor can do between spinning and sleeping is used from 2 us on.
  for (const bool dozes : {false, true}) {
    Ladder ladder(clock, WaitPolicy::balanced, dozes);
    ladder.restart(false);
    CHECK(ladder.climb(1 * us) == Ladder::Rest::none);
    CHECK(ladder.climb(10 * us) == (dozes ? Ladder::Rest::doze : Ladder::Rest::none));
  }
  // Where ranks outnumber cores, every policy yields at once and soon sleeps.
  latency.restart(true);
  int turns = 0;
  while (latency.climb(0) != Ladder::Rest::park) ++turns;
  CHECK(turns <= 100);
}

TEST_CASE("a processor that can wait for a line does, and not for long") {
  if (!LineWait::available()) {
    WARN("skipped: this processor has neither UMWAIT nor MWAITX, or the virtual machine hides it");
    return;
  }
  alignas(64) std::atomic<std::uint64_t> line{0};
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) {
    LineWait::arm(&line);
    LineWait::doze(5'000);
  }
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(2));  // a change that never comes
  std::thread changer([&] {
    for (std::uint64_t i = 1; i <= 1000; ++i) {
      while (line.load() != 2 * i - 1) {
      }
      line.store(2 * i);
    }
  });
  for (std::uint64_t i = 1; i <= 1000; ++i) {
    line.store(2 * i - 1);
    while (line.load() != 2 * i) {
      LineWait::arm(&line);
      if (line.load() != 2 * i) LineWait::doze(5'000);
    }
  }
  changer.join();
  CHECK(line.load() == 2000);
}

namespace {
/// A directory as sysfs has it, of 2 sockets of 2 caches of 2 cores: cores 0,1 and 2,3 on socket 0.
class Sysfs {
 public:
  Sysfs() {
    for (int core = 0; core < 8; ++core) {
      const std::string dir = path() + "/cpu" + std::to_string(core);
      const auto list = [](int first, int width) { return std::to_string(first) + "-" + std::to_string(first + width - 1); };
      write(dir + "/topology/core_siblings_list", list(core / 4 * 4, 4));
      write(dir + "/cache/index0/type", "Data"), write(dir + "/cache/index0/shared_cpu_list", std::to_string(core));
      write(dir + "/cache/index1/type", "Instruction"), write(dir + "/cache/index1/shared_cpu_list", std::to_string(core));
      write(dir + "/cache/index2/type", "Unified"), write(dir + "/cache/index2/shared_cpu_list", list(core / 2 * 2, 2));
      write(dir + "/cache/index0/size", "32K"), write(dir + "/cache/index1/size", "32K"), write(dir + "/cache/index2/size", "512K");
    }
  }
  ~Sysfs() { std::filesystem::remove_all(path()); }
  std::string path() const { return "/tmp/tally_sysfs_" + std::to_string(::getpid()); }
  Place of(std::initializer_list<int> cores) const {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int core : cores) CPU_SET(static_cast<std::size_t>(core), &set);
    return place_of(set, path());
  }

 private:
  static void write(const std::string& file, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(file).parent_path());
    std::ofstream(file) << text << '\n';
  }
};
}  // namespace

TEST_CASE("the cache and the socket that cores share") {
  const Sysfs sysfs;
  const auto is = [](Place place, int cache, int socket) { return place.cache == cache && place.socket == socket; };
  CHECK(is(sysfs.of({0}), 0, 0));
  CHECK(is(sysfs.of({3}), 2, 0));
  CHECK(is(sysfs.of({6, 7}), 6, 4));
  CHECK(is(sysfs.of({4, 7}), -1, 4));
  CHECK(is(sysfs.of({0, 1, 2, 3, 4, 5, 6, 7}), -1, -1));
  CHECK(is(sysfs.of({}), -1, -1));
  CHECK(is(sysfs.of({9}), -1, -1));  // sysfs says nothing of it
  CHECK(last_level_cache_bytes(sysfs.path()) == std::size_t{512} << 10);
  CHECK(last_level_cache_bytes("/nowhere") == std::size_t{32} << 20);
  const auto parsed = [](const char* text) { const cpu_set_t set = detail::parse_cores(text); return CPU_COUNT(&set); };
  CHECK(parsed("0-3,8") == 5);
  CHECK(parsed("1023") == 1);
  for (const char* nonsense : {"", "x", "3-1", "0-", "-3", "1024", "0-99999999999", "1,,2", "1 2"}) CHECK(parsed(nonsense) == 0);
}

TEST_CASE("groups are ranks that follow each other and share something") {
  const Sysfs sysfs;
  const auto group = [&](std::initializer_list<int> cores) {  // one per rank
    std::vector<Place> places;
    for (const int core : cores) places.push_back(core < 0 ? Place{} : sysfs.of({core}));
    return group_of(places);
  };
  CHECK(group({0, 1, 2, 3, 4, 5, 6, 7}) == 2);  // by cache
  CHECK(group({0, 1, 2}) == 2);                 // the last one is short
  CHECK(group({0, 2, 4, 6}) == 2);              // one per cache, so by socket
  CHECK(group({0, 1}) == 1);                    // all share one
  CHECK(group({0, 1, 4, 2, 5, 6}) == 1);        // uneven
  CHECK(group({0, 4, 1, 5}) == 1);              // not in order
  CHECK(group({0, 1, 2, 3, 0, 1}) == 1);        // ranks 4 and 5 are where 0 and 1 are, not beyond them
  CHECK(group({0, 1, -1, -1}) == 1);
  CHECK(group({}) == 1);
}

TEST_CASE("what crosses between groups counts more, and is avoided") {
  CostModel model;
  model.cores = 64;
  model.group = 8;
  Chooser flat(64, {.cores = 64}), grouped(64, model);
  const auto time = [](Chooser& chooser, const char* name, std::size_t bytes) { return chooser.estimate(find_algorithm(Collective::all_reduce, name), Collective::all_reduce, bytes).microseconds; };
  for (const std::size_t bytes : {std::size_t{8}, std::size_t{1} << 20}) {
    CHECK(time(grouped, "recursive_doubling", bytes) > time(flat, "recursive_doubling", bytes));
    CHECK(time(grouped, "hierarchical", bytes) < time(grouped, "one_shot", bytes));
  }
  for (const int group : {31, 32, 64}) {  // and where a group has more ranks than an estimate looks at
    CostModel wide;
    wide.cores = 2 * group;
    wide.group = group;
    Chooser near(2 * group, {.cores = 2 * group}), far(2 * group, wide);
    CHECK(time(far, "staged", 1 << 20) > 1.5 * time(near, "staged", 1 << 20));
    CHECK(time(far, "hierarchical", 1 << 20) < 0.8 * time(far, "two_shot", 1 << 20));
  }
  // Eight hosts, each with another number of ranks: halving for what is long, doubling for what is short.
  std::vector<std::uint64_t> places;
  for (std::uint64_t host = 0; host < 8; ++host) places.insert(places.end(), host % 3 + 2, host * 7 % 8);
  const Partition partition(places);
  CostModel network;
  network.cores = 64;
  network.across = {70, 40, 13};
  Chooser hosts(static_cast<int>(places.size()), network, false, &partition);
  CHECK(time(hosts, "hierarchical_halving", 64 << 20) < 0.8 * time(hosts, "hierarchical", 64 << 20));
  CHECK(time(hosts, "hierarchical", 8) < time(hosts, "hierarchical_halving", 8));
  CHECK(hosts.choose(Collective::all_reduce, 64 << 20, {}).name == "hierarchical_halving");
  // One rank of each host: all of them are far from each other, and nobody can do anything for a group.
  const Partition each(std::vector<std::uint64_t>{4, 2, 9, 1});
  Chooser apart(4, network, false, &each), beside(4, network);
  CHECK(time(apart, "ring", 1 << 20) > 5 * time(beside, "ring", 1 << 20));
  const auto offered = [](Chooser& chooser) {
    for (const auto& candidate : chooser.candidates(Collective::all_reduce, 8, {}))
      if (candidate.algorithm.name == "hierarchical") return true;
    return false;
  };
  CHECK(offered(grouped));
  CHECK(offered(hosts));
  CHECK_FALSE(offered(flat));
  CHECK_FALSE(offered(apart));
  Options options;
  options.group = 2;
  launch(4, [](Communicator& comm) {
    expect(comm.group() == 2 && comm.duplicate().group() == 2, "the group asked for");
    expect(comm.explain(Collective::all_reduce, 8).find("2 groups of ranks share a cache or a socket, at most 2 in each") != std::string::npos, "explained");
  }, threads, options);
  options.group = 1 << 15;
  launch(2, [](Communicator& comm) { expect(comm.group() == 2, "no more than there are"); }, threads, options);
}

TEST_CASE("what is chosen minimises what was asked for: time, energy, or their product") {
  CostModel model;
  model.cores = 8;
  model.copy_watts = 3;
  model.protocol_watts = 2;
  model.spin_watts = 0.5;
  model.spins = 1e9f;
  constexpr int n = 8;
  const auto front = [&](Objective objective, std::size_t bytes) {
    model.objective = objective;
    Chooser chooser(n, model);
    const auto all = chooser.candidates(Collective::all_reduce, bytes, {});
    REQUIRE(all.size() > 3);
    for (const auto& each : all) {
      const auto value = [&](const Chooser::Estimate& e) { return objective == Objective::time ? e.microseconds : objective == Objective::energy ? e.energy : e.microseconds * e.energy; };
      CHECK(value(all.front().estimate) <= value(each.estimate));
    }
    return std::string(all.front().algorithm.name);
  };
  for (const std::size_t bytes : {8u, 1u << 13, 1u << 24}) {
    front(Objective::time, bytes);
    front(Objective::energy, bytes);
    front(Objective::energy_delay, bytes);
  }
  // Where messages are all that costs: the fewest, not the shortest chain.
  model.copy_watts = model.spin_watts = 0;
  CHECK(front(Objective::time, 8) != front(Objective::energy, 8));
  Chooser chooser(n, model);
  const double messages = 4.0 * (n - 1);  // up and down a tree, each sent and received
  CHECK(chooser.estimate(find_algorithm(Collective::all_reduce, "tree"), Collective::all_reduce, 8).energy == Approx(messages * static_cast<double>(model.message) * 2));
  // With equal weights and spinning, a rank draws as much at work as waiting: it is all time.
  model.copy_watts = model.protocol_watts = model.spin_watts = 1;
  Chooser equal(n, model);
  for (const auto& each : equal.candidates(Collective::all_reduce, 1 << 13, {})) CHECK(each.estimate.energy == Approx(n * each.estimate.microseconds).epsilon(0.3));
}

TEST_CASE("an objective of energy waits by the energy policy, unless another was asked for") {
  Options options;
  CHECK(options.wait_policy() == WaitPolicy::balanced);
  options.objective = Objective::energy;
  CHECK(options.wait_policy() == WaitPolicy::energy);
  options.wait = WaitPolicy::latency;
  CHECK(options.wait_policy() == WaitPolicy::latency);
}
