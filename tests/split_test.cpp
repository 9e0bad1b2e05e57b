// SPDX-License-Identifier: Apache-2.0
// Communicators of some of the ranks: split, subset and Mesh. Who is in which group and as what rank, that groups work on
// their own and at the same time, what becomes of them when a member dies, what they leave behind, and every misuse.

#include <sys/resource.h>

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>

#include "processes.hpp"

namespace {

using namespace test;
using tally::Collective, tally::Communicator, tally::Errc, tally::Mesh, tally::Options, tally::Rank, tally::RankKind;

/// What split has to give this rank, found in another way: how many of the same colour come before it, and how many there are.
struct Place {
  int rank = 0, size = 0;
};
template <class Colour, class Key>
Place expected(int n, int me, Colour colour, Key key) {
  Place place;
  for (int r = 0; r < n; ++r) {
    if (colour(r) != colour(me)) continue;
    ++place.size;
    place.rank += key(r) < key(me) || (key(r) == key(me) && r < me);
  }
  return place;
}

/// Every collective, exactly. `origin[i]` is what rank i of the group is known by.
template <class Group>
void use(Group&& group, const std::vector<int>& origin, std::size_t count = 700) {
  const int n = group.size(), me = group.rank();
  const std::size_t m = static_cast<std::size_t>(n);
  const auto at = [](int who, std::size_t i) { return static_cast<std::int64_t>(who) * 1000 + static_cast<std::int64_t>(i); };
  const auto mine = [&](std::size_t length) {
    std::vector<std::int64_t> data(length);
    for (std::size_t i = 0; i < length; ++i) data[i] = at(origin[static_cast<std::size_t>(me)], i);
    return data;
  };
  const auto total = [&](std::size_t i) {
    std::int64_t sum = 0;
    for (const int who : origin) sum += at(who, i);
    return sum;
  };
  std::vector<std::int64_t> data = mine(count), all(count * m), out(count);
  group.all_reduce(data, tally::sum);
  for (std::size_t i = 0; i < count; ++i) expect(data[i] == total(i), "all_reduce");
  for (Rank root = 0; root < n; ++root) {
    data = mine(count);
    group.broadcast(data, root);
    for (std::size_t i = 0; i < count; ++i) expect(data[i] == at(origin[static_cast<std::size_t>(root)], i), "broadcast");
    group.reduce(mine(count), out, tally::max, root);
    const int largest = *std::ranges::max_element(origin);
    if (me == root) for (std::size_t i = 0; i < count; ++i) expect(out[i] == at(largest, i), "reduce");
  }
  group.all_gather(mine(count), all);
  for (std::size_t r = 0; r < m; ++r)
    for (std::size_t i = 0; i < count; ++i) expect(all[r * count + i] == at(origin[r], i), "all_gather");
  group.reduce_scatter(mine(count * m), out, tally::sum);
  for (std::size_t i = 0; i < count; ++i) expect(out[i] == total(static_cast<std::size_t>(me) * count + i), "reduce_scatter");
  group.barrier();
}
/// The job's ranks in the group, as its members name themselves.
std::vector<int> members_of(Communicator& group, int me) {
  std::vector<int> all(static_cast<std::size_t>(group.size()));
  group.all_gather(std::span<const int>(&me, 1), all);
  return all;
}

Options with_timeout(std::chrono::nanoseconds timeout) {
  Options options;
  options.timeout = timeout;
  return options;
}

void expect_ok(const Outcome& outcome) {
  CAPTURE(outcome);
  for (const Caught& rank : outcome.ranks) CHECK((rank.ran && !rank.error && !rank.foreign));
  CHECK_FALSE((outcome.launch.error || outcome.launch.foreign));
}

// ---- Who is in which group.

void all_splits(RankKind kind) {
  for (int n = 1; n <= 6; ++n)
    expect_ok(outcome_of(n, kind, [n](Communicator& comm) {
      const int me = comm.rank();
      for (int k = 1; k <= n; ++k)
        for (const int way : {1, -1, 0}) {
          const auto colour = [k](int r) { return r % k; };
          const auto key = [way](int r) { return way * r; };
          std::optional<Communicator> group = comm.split(colour(me), key(me));
          const Place place = expected(n, me, colour, key);
          expect(group && group->rank() == place.rank && group->size() == place.size, "split " + std::to_string(k) + " " + std::to_string(way));
          const std::vector<int> members = members_of(*group, me);
          for (std::size_t i = 0; i < members.size(); ++i) expect(expected(n, members[i], colour, key).rank == static_cast<int>(i) && colour(members[i]) == colour(me), "member");
          use(*group, members, 70);
        }
      use(comm, members_of(comm, me), 30);
    }, with_timeout(30s)));
}
TALLY_TEST_BOTH("every split of up to 6 ranks", "[split]", all_splits)

void odd_colours(RankKind kind) {
  expect_ok(outcome_of(4, kind, [](Communicator& comm) {
    const int least = std::numeric_limits<int>::min(), most = std::numeric_limits<int>::max(), me = comm.rank();
    std::optional<Communicator> some = comm.split(me < 2 ? most : tally::no_colour, me == 0 ? most : least);
    expect(some.has_value() == (me < 2), "no colour, no communicator");
    if (some) expect(some->rank() == 1 - me && some->size() == 2, "extreme keys");
    expect(!comm.split(me == 3 ? least : tally::no_colour), "nobody has a colour");
    std::optional<Communicator> alone = comm.split(me);
    expect(alone && alone->size() == 1 && alone->rank() == 0, "groups of one");
    use(*alone, {me});
    expect(alone->split(tally::no_colour) == std::nullopt && alone->split(7)->size() == 1 && alone->duplicate().size() == 1, "of one");
  }, with_timeout(20s)));
}
TALLY_TEST_BOTH("extreme colours and keys, and groups of one", "[split]", odd_colours)

void subsets(RankKind kind) {
  expect_ok(outcome_of(4, kind, [](Communicator& comm) {
    const int me = comm.rank();
    std::vector<int> order{0, 1, 2, 3};
    do {
      for (std::size_t length = 1; length <= 4; ++length) {
        const std::span<const int> listed(order.data(), length);
        const auto place = std::ranges::find(listed, me);
        std::optional<Communicator> group = comm.subset(listed);
        expect(group.has_value() == (place != listed.end()), "who is listed is in");
        if (!group) continue;
        expect(group->rank() == place - listed.begin() && group->size() == static_cast<int>(length), "in the order of the list");
        use(*group, {listed.begin(), listed.end()}, 9);
      }
    } while (std::ranges::next_permutation(order).found);
    std::optional<Communicator> two = comm.subset({3, 1});
    expect(two.has_value() == (me % 2 == 1), "an initializer list");
  }, with_timeout(30s)));
}
TALLY_TEST_BOTH("every subset of 4 ranks in every order", "[split]", subsets)

void inherits(RankKind kind) {
  Options options = with_timeout(19s);
  options.group = 2;
  options.algorithms = tally::AlgorithmOverrides("all_reduce=tree");
  options.slots.slots = 2;
  options.slots.slot_bytes = 256;
  tally::launch(
      8,
      [](Communicator& comm) {
        const auto group_of = [&](std::initializer_list<Rank> ranks) {
          std::optional<Communicator> some = comm.subset(ranks);
          const int group = some ? some->group().largest(some->size()) : -1;
          int largest = 0;
          comm.all_reduce(std::span(&group, 1), std::span(&largest, 1), tally::max);
          expect(!some || group == largest, "all members know the same");
          return largest;
        };
        expect(group_of({0, 1, 2, 3}) == 2 && group_of({2, 3, 6, 7}) == 2 && group_of({5, 4, 1, 0}) == 2, "whole groups");
        expect(group_of({0, 1, 2}) == 2, "the last one may be smaller");
        expect(group_of({0, 1}) == 1 && group_of({0, 2, 4, 6}) == 1 && group_of({1, 2, 3, 4}) == 1 && group_of({0, 2, 1, 3}) == 1, "no groups in it");
        comm.set_timeout(17s);
        std::optional<Communicator> half = comm.split(comm.rank() / 4);
        expect(half->timeout() == 17s, "the deadline");
        std::vector<int> data(10'000, 1);
        expect(half->all_reduce(data, tally::sum).algorithm_name() == "tree" && data[9'999] == 4, "the algorithm asked for");
        expect(half->counters().frames_sent >= 10'000 * 4 / 256, "slots as small as the parent's");
        expect(half->group() == 2 && comm.duplicate().group() == comm.group(), "the group");
      },
      kind, options);
}
TALLY_TEST_BOTH("groups inherit deadline, algorithms, slots and the ranks that are close", "[split]", inherits)

TEST_CASE("what the members choose algorithms by") {
  tally::CostModel model;
  model.group = 4;
  model.cores = 4;
  const auto within = [&](std::vector<Rank> members) { return tally::detail::model_within(model, 16, members); };
  CHECK(within({0, 1, 2, 3, 4, 5, 6, 7}).group == 4);
  CHECK(within({2, 3, 4, 5, 6, 7}).group == 1);  // two, then four
  CHECK(within({2, 3, 4, 5, 8, 9}).group == 2);
  CHECK(within({0, 4, 1, 5}).group == 1);
  CHECK(within({0, 1, 4, 5, 2, 3}).group == 1);  // the first group comes twice
  CHECK(within({0, 1, 2, 3, 4, 5, 6, 7}).cores == 2);
  CHECK(within({9}).cores == 1);
  model.cores = 16;
  CHECK(within({9, 3}).cores == 16);
}

// ---- Groups on their own.

void siblings(RankKind kind) {
  expect_ok(outcome_of(6, kind, [](Communicator& comm) {
    const int me = comm.rank();
    std::optional<Communicator> row = comm.split(me / 3), column = comm.split(me % 3);
    // Each group at its own pace: the second makes three times as many calls.
    std::vector<int> data(3000);
    for (int i = 0; i < (me < 3 ? 40 : 120); ++i) {
      std::ranges::fill(data, me + i);
      row->all_reduce(data, tally::sum);
      expect(std::ranges::count(data, (me < 3 ? 3 : 12) + 3 * i) == 3000, "its own data");
    }
    for (int i = 0; i < 20; ++i) {
      std::ranges::fill(data, me);
      column->all_reduce(data, tally::sum);
      expect(data[2999] == 2 * (me % 3) + 3, "the other way");
    }
    comm.barrier();  // an abort ends calls that others are still in
    if (me < 3) row->abort("enough");
    const Caught c = caught([&] { row->barrier(); });
    expect(me < 3 ? c.is(Errc::aborted) : !c.error, c.text);
    column->barrier();
    comm.barrier();
  }, with_timeout(30s)));
}
TALLY_TEST_BOTH("siblings work at the same time and apart", "[split]", siblings)

void nested(RankKind kind) {
  expect_ok(outcome_of(6, kind, [](Communicator& comm) {
    const int me = comm.rank();
    std::optional<Communicator> half = comm.subset({5, 4, 3, 2});  // then 5 and 3, 4 and 2
    if (!half) return;
    std::optional<Communicator> pair = half->split(half->rank() % 2, -half->rank());
    expect(members_of(*pair, me) == (me % 2 ? std::vector<int>{3, 5} : std::vector<int>{2, 4}), "a split of a subset");
    Communicator again = pair->duplicate();
    std::optional<Communicator> turned = again.subset({1, 0});
    half.reset();
    pair.reset();
    use(again, me % 2 ? std::vector<int>{3, 5} : std::vector<int>{2, 4});
    use(*turned, me % 2 ? std::vector<int>{5, 3} : std::vector<int>{4, 2});
    auto memory = turned->allocate<std::int32_t>(5000);
    std::ranges::fill(memory, me);
    turned->all_reduce<tally::ZeroCopy>(memory, tally::sum);
    expect(memory[0] == (me % 2 ? 8 : 6) && memory[4999] == memory[0] && memory.of(1 - turned->rank())[17] == memory[0], "symmetric memory");
    std::vector<double> data(100'000, me);
    turned->all_reduce<tally::SingleCopy>(data, tally::sum);
    expect(data[99'999] == memory[0], "copied by the kernel or staged");
  }, with_timeout(30s)));
}
TALLY_TEST_BOTH("splits of subsets, duplicates of splits", "[split]", nested)

void outlives(RankKind kind) {
  tally::launch(4, [](Communicator& comm) {
    std::optional<Communicator> pair = comm.split(comm.rank() / 2);
    Communicator gone = std::move(comm);
    { Communicator moved = std::move(gone); }
    use(*pair, comm.rank() < 2 ? std::vector<int>{0, 1} : std::vector<int>{2, 3});
    Communicator more = pair->duplicate();  // its own regions, though the first communicator is gone
    use(more, comm.rank() < 2 ? std::vector<int>{0, 1} : std::vector<int>{2, 3});
  }, kind, with_timeout(20s));
}
TALLY_TEST_BOTH("a group outlives what it was made from", "[split]", outlives)

TEST_CASE("a member's death is noticed in its group and nowhere else", "[split][processes]") {
  const Shared<std::atomic<int>> noticed;
  const Outcome outcome = outcome_of(5, tally::processes, [&](Communicator& comm) {
    const int me = comm.rank();
    std::optional<Communicator> group = comm.subset({4, 2, 0}), others = comm.subset({1, 3});
    std::optional<Communicator> nested;
    if (group) nested = group->subset({2, 1});  // 0 and 2 of the job
    if (me == 2) ::raise(SIGKILL);
    if (nested) {
      const Caught c = caught([&] { for (;;) nested->barrier(); });
      expect(c.is(Errc::peer_lost) && has(c.text, "rank 1 died") && has(c.text, "rank 1 (2 of the job)"), c.text);
    }
    if (group) {
      const Caught c = caught([&] { for (;;) group->barrier(); });
      ++*noticed;
      expect(c.is(Errc::peer_lost) && has(c.text, "rank 1 died") && has(c.text, "rank 1 (2 of the job)") && c.peer == 1, c.text);  // rank 1 of the group
    } else {
      for (int i = 0; i < 200; ++i) others->barrier();
      expect(eventually(10s, [&] { return *noticed == 2; }), "the group noticed");
      for (int i = 0; i < 200; ++i) others->barrier();
      use(*others, {1, 3});
      expect(others->split(0)->size() == 2, "and can be split");
    }
  }, with_timeout(20s));
  CAPTURE(outcome);
  for (const int r : {0, 1, 3, 4}) CHECK((outcome.ranks[static_cast<std::size_t>(r)].ran && !outcome.ranks[static_cast<std::size_t>(r)].foreign && !outcome.ranks[static_cast<std::size_t>(r)].error));
  CHECK_FALSE(outcome.ranks[2].ran);
}

TEST_CASE("a rank that dies while groups are made is no hang", "[split][processes]") {
  for (int trial = 0; trial < 12; ++trial) {
    const Outcome outcome = outcome_of(3, tally::processes, [&](Communicator& comm) {
      if (comm.rank() == 1) std::thread([trial] { std::this_thread::sleep_for(std::chrono::microseconds(300 + 977 * trial)); ::kill(::getpid(), SIGKILL); }).detach();
      for (;;) {
        std::optional<Communicator> pair = comm.subset({trial % 2, 2}), all = comm.split(0, -comm.rank());
        if (pair) pair->barrier();
        all->barrier();
      }
    }, with_timeout(20s));
    CAPTURE(trial, outcome);
    for (const std::size_t r : {0u, 2u}) CHECK((outcome.ranks[r].is(Errc::peer_lost) || outcome.ranks[r].is(Errc::peer_left)));
    CHECK(outcome.launch.rank == 1);
  }
}

// ---- What is left behind.

long maps() {
  long lines = 0;
  FILE* file = std::fopen("/proc/self/maps", "re");
  for (int c = 0; file && (c = std::fgetc(file)) != EOF;) lines += c == '\n';
  if (file) std::fclose(file);
  return lines;
}

TEST_CASE("a thousand splits give back what they used", "[split][processes]") {
  tally::launch(4, [](Communicator& comm) {
    std::vector<float> data(2'000, 1);
    const auto use_one = [&](int i) {
      std::optional<Communicator> group = comm.split(i % 3 == 0 ? comm.rank() / 2 : i % 3 == 1 ? comm.rank() % 2 : comm.rank() == 0 ? tally::no_colour : 0, i % 2 ? comm.rank() : -comm.rank());
      if (group) group->all_reduce(data, tally::max);
    };
    for (int i = 0; i < 6; ++i) use_one(i);
    comm.barrier();
    const int descriptors = open_descriptors();
    const long mappings = maps();
    const std::int64_t resident = resident_shared();
    expect(resident > 0, "the job's file is seen");
    comm.barrier();
    for (int i = 0; i < 1000; ++i) use_one(i);
    comm.barrier();
    // The last one to leave gives memory back: that may be another rank, soon. Each split touches 100 KiB and more.
    expect(eventually(5s, [&] { return resident_shared() < resident + 512 * 1024; }), "1000 splits left " + std::to_string(resident_shared() - resident) + " bytes in memory");
    expect(open_descriptors() == descriptors, "no descriptors are left");
    expect(maps() < mappings + 100, "no mappings are left: " + std::to_string(maps()) + " of " + std::to_string(mappings));
    comm.barrier();
  });
}

TEST_CASE("splits of threads give back what they used", "[split]") {
  tally::launch(4, [&](Communicator& comm) {
    const auto use = [&](int times) {
      for (int i = 0; i < times; ++i) comm.split(i % 2 ? comm.rank() / 2 : comm.rank() % 2, -comm.rank())->barrier();
      comm.barrier();
    };
    use(20);
    const long before = test::resident_bytes();
    use(1000);
    if (!sanitized) expect(test::resident_bytes() < before + (20 << 20), std::to_string((test::resident_bytes() - before) >> 20) + " MiB kept");
  }, tally::threads);
}

TEST_CASE("regions appended by several processes at once do not overlap", "[split][processes]") {
  // By hand, without any communicator in between: as fast as they can, regions of all sizes.
  constexpr int n = 4, each = 4000;
  struct Region {
    std::uint64_t begin, end;
  };
  const Shared<std::array<Region, n * each>> regions;
  const Shared<std::atomic<int>> ready;
  const auto file = std::make_shared<tally::ShmFile>();
  const tally::SlotLayout layout(n, {});
  const tally::ShmMemory onlooker(file, layout, 0, -1);
  {
    std::vector<Process> processes;
    for (int p = 0; p < n; ++p)
      processes.emplace_back([&, p] {
        for (++*ready; *ready < n;) std::this_thread::yield();
        for (int i = 0; i < each; ++i) {
          const auto bytes = static_cast<std::size_t>(1 + (i * 37 + p * 1001) % 20'000);
          const std::uint64_t begin = file->append(bytes);
          (*regions)[static_cast<std::size_t>(p * each + i)] = {begin, begin + bytes};
          if (i % 16 == p) std::this_thread::yield();
        }
      });
    for (Process& process : processes) CHECK(exited_well(process.wait(20s)));
  }
  std::vector<Region> sorted(regions->begin(), regions->end());
  std::ranges::sort(sorted, {}, &Region::begin);
  CHECK(sorted.front().begin >= layout.bytes());
  int overlaps = 0;
  for (std::size_t i = 1; i < sorted.size(); ++i) overlaps += sorted[i].begin < sorted[i - 1].end || sorted[i].begin % 4096 != 0;
  CHECK(overlaps == 0);
  struct stat info {};
  REQUIRE(::fstat(file->get(), &info) == 0);
  CHECK(static_cast<std::uint64_t>(info.st_size) >= sorted.back().end);
}

void make_at_once(RankKind kind) {
  // Groups that make communicators and memory at the same time, without hearing of each other.
  expect_ok(outcome_of(6, kind, [](Communicator& comm) {
    const int me = comm.rank();
    std::optional<Communicator> pair = comm.split(me / 2);
    const std::vector<int> both{me / 2 * 2, me / 2 * 2 + 1};
    std::vector<Communicator> kept;
    std::vector<tally::Symmetric<int>> memories;
    for (int i = 0; i < 60; ++i) {
      if (i % 3 == 0) kept.push_back(pair->duplicate());
      else if (i % 3 == 1) kept.push_back(*pair->split(3, me));
      else memories.push_back(pair->allocate<int>(static_cast<std::size_t>(100 + 997 * i)));
      if (i % 3 == 2) std::ranges::fill(memories.back(), 1000 * me + i);
      else use(kept.back(), both, 3);
    }
    for (Communicator& each : kept) use(each, both, 3);
    for (std::size_t k = 0; k < memories.size(); ++k)
      for (const int r : {0, 1})
        expect(std::ranges::count(memories[k].of(r), 1000 * both[static_cast<std::size_t>(r)] + 3 * static_cast<int>(k) + 2) == std::ssize(memories[k].of(r)), "nobody else writes there");
    pair->barrier();
  }, with_timeout(30s)));
}
TALLY_TEST_BOTH("groups make communicators and memory at the same time", "[split]", make_at_once)

// ---- Misuse. The communicator goes on after each.

void check_all(const Outcome& outcome, Errc code, const std::string& words) {
  CAPTURE(outcome);
  for (const Caught& rank : outcome.ranks) {
    CHECK(rank.is(code));
    CHECK_THAT(rank.text, Catch::Contains(words));
  }
}

/// f fails on all ranks in the same way, and afterwards all can be split.
template <class F>
Outcome misused(RankKind kind, F f) {
  return outcome_of(3, kind, [f](Communicator& comm) {
    const Caught c = caught([&] { f(comm); });
    use(*comm.split(0), {0, 1, 2}, 5);
    if (c.error) throw tally::Error(c.code, std::string_view(c.text), {c.rank, c.peer, 0, {}});
  }, with_timeout(20s));
}

void misuse(RankKind kind) {
  check_all(misused(kind, [](Communicator& comm) { comm.subset({0, 3}); }), Errc::invalid_argument, "subset: 3 is not a rank; ranks are 0 to 2: rank 0 passes {0, 3}");
  check_all(misused(kind, [](Communicator& comm) { comm.subset({-1}); }), Errc::invalid_argument, "subset: -1 is not a rank");
  check_all(misused(kind, [](Communicator& comm) { comm.subset({2, 1, 2}); }), Errc::invalid_argument, "subset: rank 2 is in the list twice: rank 0 passes {2, 1, 2}");
  check_all(misused(kind, [](Communicator& comm) { comm.subset({}); }), Errc::invalid_argument, "subset: the list of ranks is empty: rank 0 passes {}");
  check_all(misused(kind, [](Communicator& comm) { comm.subset(std::vector<Rank>(1000, 1)); }), Errc::invalid_argument, "rank 1 is in the list twice");
  // One rank alone is wrong: all hear of it.
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 2 ? comm.subset({1, 7}) : comm.subset({1, 2}); }), Errc::invalid_argument, "7 is not a rank; ranks are 0 to 2: rank 2 passes {1, 7}");
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 1 ? comm.subset({}) : comm.subset({1, 2}); }), Errc::invalid_argument, "rank 1 passes {}");
  // All lists are fine, but not the same.
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 2 ? comm.subset({2, 1}) : comm.subset({1, 2}); }), Errc::mismatch, "subset: rank 0 passes {1, 2}, rank 2 passes {2, 1}");
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 0 ? comm.subset({2, 1, 0}) : comm.subset({1, 2}); }), Errc::mismatch, "subset: rank 0 passes {2, 1, 0}, rank 1 passes {1, 2}");
  // Different things.
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 1 ? (void)comm.duplicate() : (void)comm.split(0); }), Errc::mismatch, "rank 0 called split, rank 1 called duplicate");
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 2 ? (void)comm.allocate<int>(3) : (void)comm.subset({0}); }), Errc::mismatch, "rank 0 called subset, rank 2 called allocate");
  check_all(misused(kind, [](Communicator& comm) { comm.rank() == 0 ? (void)comm.split(0) : (void)comm.subset({0}); }), Errc::mismatch, "rank 0 called split, rank 1 called subset");
}
TALLY_TEST_BOTH("misuse is an error on all ranks, and names them", "[split]", misuse)

void mixed(RankKind kind) {
  const std::pair<std::string, std::function<void(Communicator&)>> all[] = {{"split", [](Communicator& comm) { comm.split(0); }},
                                                                            {"subset", [](Communicator& comm) { comm.subset({0, 1}); }},
                                                                            {"duplicate", [](Communicator& comm) { comm.duplicate(); }},
                                                                            {"allocate", [](Communicator& comm) { comm.allocate<int>(3); }}};
  for (const auto& [name, make] : all) {
    const Outcome outcome = outcome_of(3, kind, [&make = make](Communicator& comm) {
      std::vector<int> data(100);
      if (comm.rank() == 1) make(comm);
      else comm.all_reduce(data, tally::sum);
      comm.barrier();
    }, with_timeout(20s));
    CAPTURE(outcome);
    for (const Caught& rank : outcome.ranks) {
      CHECK(rank.is(Errc::mismatch));
      CHECK_THAT(rank.text, Catch::Contains("called all_reduce(int32 x 100, sum") && Catch::Contains("rank 1 called split, subset, duplicate or allocate") && !Catch::Contains("all_gather"));
    }
    CHECK_THAT(outcome.ranks[1].text, Catch::Contains(name + ": "));
  }
  const Outcome absent = outcome_of(3, kind, [](Communicator& comm) {
    if (comm.rank() == 1) std::this_thread::sleep_for(400ms);
    else comm.split(0);
  }, with_timeout(100ms));
  CAPTURE(absent);
  CHECK((absent.ranks[0].is(Errc::timeout) && has(absent.ranks[0].text, "split: ") && has(absent.ranks[0].text, "rank 1 has not called it")));
  CHECK((absent.ranks[2].is(Errc::timeout) && has(absent.ranks[2].text, "split: ")));
}
TALLY_TEST_BOTH("one rank splits while others do something else", "[split]", mixed)

TEST_CASE("a group that cannot be opened leaves no other group and nothing behind", "[split][processes]") {
  for (const int victim : {0, 3}) {  // who leads a group, and who does not
    const Outcome outcome = outcome_of(4, tally::processes, [victim](Communicator& comm) {
      comm.split(comm.rank() / 2)->barrier();
      comm.barrier();
      const std::int64_t resident = resident_shared();
      comm.barrier();
      rlimit limit{};
      ::getrlimit(RLIMIT_FSIZE, &limit);
      const rlim_t whole = limit.rlim_cur;
      if (comm.rank() == victim) {  // its files may not be long
        limit.rlim_cur = 1 << 20;
        ::setrlimit(RLIMIT_FSIZE, &limit);
      }
      for (int i = 0; i < 400; ++i) {
        const Caught c = caught([&] { (void)comm.split(comm.rank() / 2, i % 2 ? 0 : -comm.rank()); });
        expect(c.is(Errc::no_resources) && has(c.text, "split: "), c.text);
        if (comm.rank() == victim) expect(has(c.text, "file size limit"), c.text);
      }
      limit.rlim_cur = whole;
      ::setrlimit(RLIMIT_FSIZE, &limit);
      comm.barrier();
      expect(resident_shared() < resident + 512 * 1024, "given back, not " + std::to_string(resident_shared() - resident) + " bytes kept");
      comm.barrier();
      use(*comm.split(comm.rank() / 2), comm.rank() < 2 ? std::vector<int>{0, 1} : std::vector<int>{2, 3});
    }, with_timeout(20s));
    expect_ok(outcome);
  }
}

TEST_CASE("a failed reservation gives its place back", "[split][processes]") {
  const Caught c = caught_apart(20s, [] {
    tally::ShmFile file;
    file.begin_with(5000);
    const std::uint64_t first = file.append(4096);
    expect(first == 8192, "behind the first region");
    rlimit limit{};
    ::getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = 1 << 20;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    expect(caught([&] { file.append(std::size_t{1} << 30); }).is(Errc::no_resources), "too large");
    expect(file.append(1) == first + 4096 && file.append(1) == first + 8192, "what fits still does");
  });
  CAPTURE(c);
  CHECK((c.ran && !c.error && !c.foreign));
}

// ---- Meshes.

void mesh_of(RankKind kind) {
  expect_ok(outcome_of(6, kind, [](Communicator& comm) {
    Mesh mesh(comm, {{"data", 3}, {"tensor", 1}, {"pipeline", 2}});
    const int me = comm.rank();
    expect(mesh.coordinate("data") == me / 2 && mesh.coordinate("tensor") == 0 && mesh.coordinate("pipeline") == me % 2, "the last axis varies fastest");
    expect(mesh.rank_at({me / 2, 0, me % 2}) == me && mesh.rank_at({2, 0, 0}) == 4 && mesh.rank_at({0, 0, 1}) == 1, "and back");
    expect(mesh.axis("data").rank() == me / 2 && mesh.axis("tensor").size() == 1 && mesh.axis("pipeline").rank() == me % 2, "rank is coordinate");
    use(mesh.axis("data"), {me % 2, me % 2 + 2, me % 2 + 4}, 50);
    use(mesh.axis("pipeline"), {me / 2 * 2, me / 2 * 2 + 1}, 50);
    expect(mesh.axes().size() == 3 && mesh.axes()[2].name == "pipeline" && mesh.axes()[2].extent == 2, "axes");
    const Caught unknown = caught([&] { mesh.axis("model"); });
    expect(unknown.is(Errc::invalid_argument) && has(unknown.text, "no axis is called 'model'; there are data, tensor, pipeline"), unknown.text);
    expect(has(caught([&] { (void)mesh.rank_at({0, 1, 0}); }).text, "1 is not a place on axis tensor, which has 0 to 0"), "out of the mesh");
    expect(has(caught([&] { (void)mesh.rank_at({0, 0}); }).text, "2 coordinates"), "too few");
    Mesh moved = std::move(mesh);
    moved.axis("data").barrier();
  }, with_timeout(20s)));
}
TALLY_TEST_BOTH("a mesh", "[split]", mesh_of)

void bad_mesh(RankKind kind) {
  const auto refused = [kind](std::vector<tally::MeshAxis> axes, Errc code, const std::string& words) {
    const Outcome outcome = misused(kind, [axes](Communicator& comm) { Mesh mesh(comm, axes); });
    check_all(outcome, code, words);
  };
  refused({{"a", 2}, {"b", 2}}, Errc::invalid_argument, "mesh: a 2 x b 2 are 4 ranks, the communicator has 3");
  refused({{"a", 3}, {"a", 1}}, Errc::invalid_argument, "mesh: two axes are called 'a'");
  refused({{"a", 3}, {"", 1}}, Errc::invalid_argument, "mesh: axis 1 has no name");
  refused({{"a", 3}, {"b", 0}}, Errc::invalid_argument, "mesh: axis b has extent 0");
  refused({{"a", -1}, {"b", -3}}, Errc::invalid_argument, "mesh: axis a has extent -1");
  refused({}, Errc::invalid_argument, "mesh: it has no axes");
  refused({{"a", 1 << 30}, {"b", 1 << 30}, {"c", 16}}, Errc::invalid_argument, "the communicator has 3");
  const Outcome outcome = misused(kind, [](Communicator& comm) { Mesh mesh(comm, {{comm.rank() == 2 ? "b" : "a", 3}}); });
  check_all(outcome, Errc::mismatch, "mesh: rank 2 has other axes than rank 0");
}
TALLY_TEST_BOTH("meshes that are none", "[split]", bad_mesh)

void mesh_totals(RankKind kind) {
  tally::launch(4, [](Communicator& comm) {
    Mesh mesh(comm, {{"data", 2}, {"tensor", 2}});
    tally::AxisTotals none = mesh.totals("data");
    expect(none.calls == 0 && none.bytes == 0 && none.time == 0ns && none.idle == 0ns && none.joules.known() && none.joules.value == 0, "nothing yet");
    std::vector<float> data(1000, 1), other(500, 1);
    const bool last = mesh.coordinate("tensor") == 1;
    for (int i = 0; i < 3; ++i) mesh.axis("data").all_reduce(data, tally::sum);
    if (last) std::this_thread::sleep_for(30ms);
    mesh.axis("tensor").broadcast(other, 1);
    mesh.axis("tensor").all_reduce(data, tally::sum);
    const tally::AxisTotals along = mesh.totals("data"), across = mesh.totals("tensor");
    expect(along.calls == 3 && along.bytes == 12'000, "three calls of 4000 bytes");
    expect(across.calls == 2 && across.bytes == 6'000, "of both operations");
    // What the ledger of the axis says, row by row.
    tally::nanoseconds time{}, busy{}, idle{};
    double joules = 0, idle_joules = 0;
    const tally::Ledger& ledger = mesh.axis("tensor").ledger();
    for (const tally::LedgerRow& row : ledger.rows()) {
      time += row.elapsed, busy += row.busy(), idle += row.idle();
      joules += ledger.energy(row).value, idle_joules += ledger.idle_energy(row).value;
    }
    expect(across.time == time && across.busy == busy && across.idle == idle, "times");
    expect(across.joules.value == joules && across.idle_joules.value == idle_joules && across.joules.provenance == tally::Provenance::modelled, "joules");
    std::ostringstream out;
    out << mesh;
    expect(has(out.str(), "mesh of 4 ranks: data 2 x tensor 2; rank " + std::to_string(comm.rank())) && has(out.str(), "modelled"), out.str());
    comm.barrier();
  }, kind);
  Options options;
  options.meter.enabled = false;
  tally::launch(2, [](Communicator& comm) {
    Mesh mesh(comm, {{"all", 2}});
    mesh.axis("all").barrier();
    const tally::AxisTotals totals = mesh.totals("all");
    expect(totals.calls == 1 && !totals.joules.known() && std::isnan(totals.joules.value) && std::isnan(totals.idle_joules.value), "unknown is not 0");
    std::ostringstream out;
    out << mesh;
    expect(has(out.str(), "unknown"), out.str());
  }, kind, options);
}
TALLY_TEST_BOTH("what the axes of a mesh cost", "[split]", mesh_totals)

void mesh_waits(RankKind kind) {
  tally::launch(4, [](Communicator& comm) {
    Mesh mesh(comm, {{"data", 2}, {"tensor", 2}});
    std::vector<float> data(1000, 1), other(500, 1);
    const bool last = mesh.coordinate("tensor") == 1;
    for (int i = 0; i < 3; ++i) mesh.axis("data").all_reduce(data, tally::sum);
    if (last) std::this_thread::sleep_for(30ms);
    mesh.axis("tensor").broadcast(other, 1);
    mesh.axis("tensor").all_reduce(data, tally::sum);
    const tally::AxisTotals along = mesh.totals("data"), across = mesh.totals("tensor");
    if (!last) expect(across.idle >= 25ms && along.idle < across.idle, "it waited for the last one");
    comm.barrier();
  }, kind);
}
TALLY_TEST_BOTH("who waits for the last one waits on the axis that it is on", "[split][timing]", mesh_waits)

}  // namespace
