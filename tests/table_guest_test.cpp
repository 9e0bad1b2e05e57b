// SPDX-License-Identifier: Apache-2.0
// Who comes to a table by its door: readers and workers that come later, go, die, or talk nonsense.
#include <catch2/catch.hpp>

#include <dirent.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <tally/table_guest.hpp>

#include "table_suite.hpp"

using namespace test;

namespace {

constexpr const char* somewhere = "127.0.0.1:0";

std::size_t descriptors() {
  std::size_t n = 0;
  DIR* const all = ::opendir("/proc/self/fd");
  while (::readdir(all)) ++n;
  ::closedir(all);
  return n;
}

/// Ranks that are threads; rank 0 runs f(ps) while the others serve, and what f throws fails the test.
template <class F>
void with_table(int n, const TableOptions& options, F&& f, std::vector<TensorSpec> tensors = {{"w", 100'003}, {"rows", 0, 4, 0, 999}}) {
  std::atomic<bool> over{false};
  launch(n, [&](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, tensors, options);
    if (comm.rank() == 0) {
      struct Over {
        std::atomic<bool>& flag;
        ~Over() { flag = true; }
      } guard{over};
      f(ps, comm);
    } else if (ps.is_worker() && options.consistency.bounded) {
      // Others are at work all the time, and hold up nobody: their clocks are far ahead.
      ps.tick_to(1'000'000);
    }
    while (!over) std::this_thread::sleep_for(1ms);
    ps.close();
  }, tally::threads);
}

Caught caught_of(const auto& f) {
  Caught c;
  c.record(f);
  return c;
}
std::string said(const auto& f) {
  const Caught c = caught_of(f);
  return c.text;
}

}  // namespace

TEST_CASE("a reader pulls what is there, from all servers, vectors, ranges and rows") {
  for (const int n : {1, 2, 3})
    for (const bool one_sided : {true, false})
      with_table(n, {.consistency = ssp(2), .block_bytes = 4096, .one_sided = one_sided, .door = somewhere}, [&](auto& ps, Communicator&) {
        const std::size_t count = ps["w"].size();
        std::vector<std::int64_t> pushed(count), values(count);
        for (std::size_t i = 0; i < count; ++i) pushed[i] = static_cast<std::int64_t>(i) + 1;
        const std::vector<std::uint64_t> keys{998, 3, 501, 3};
        const std::vector<std::int64_t> rows{1, 2, 3, 4, 10, 20, 30, 40, 5, 6, 7, 8, 100, 200, 300, 400};
        for (int step = 0; step < 3; ++step) {
          ps["w"].push(pushed);
          ps.sparse("rows").rows(keys).push(rows);
          ps.tick();
        }
        for (bool all = false; !all;) {  // told to all servers, by all workers
          all = ps["w"].pull(values).version == 3;
          if (!all) std::this_thread::sleep_for(1ms);
        }
        for (const std::string& door : ps.doors()) {
          TableReader<std::int64_t> reader(door);
          const Pulled got = reader["w"].pull(values);
          for (std::size_t i = 0; i < count; ++i)
            if (values[i] != 3 * pushed[i]) FAIL("element " << i << " is " << values[i]);
          CHECK(got.version == 3);
          CHECK(got.report.elapsed > nanoseconds{0});
          CHECK(got.report.busy() + got.report.idle() == got.report.elapsed);
          CHECK(got.report.bytes_received == count * 8);
          const std::size_t first = count / 3, length = count / 2;
          reader["w"].range(first, length).pull(std::span(values).first(length));
          CHECK(values[0] == 3 * pushed[first]);
          CHECK(values[length - 1] == 3 * pushed[first + length - 1]);
          std::vector<std::int64_t> found(keys.size() * 4);
          reader.sparse("rows").rows(keys).pull(found);
          CHECK(found == std::vector<std::int64_t>{3, 6, 9, 12, 330, 660, 990, 1320, 15, 18, 21, 24, 330, 660, 990, 1320});
          auto background = reader["w"].async_pull(values);
          CHECK(background.wait().version == 3);
          CHECK(values[count - 1] == 3 * pushed[count - 1]);
          std::uint64_t calls = 0, bytes = 0;
          for (const LedgerRow& row : reader.ledger().rows()) calls += row.calls, bytes += row.bytes_received;
          CHECK(calls == 4);
          CHECK(bytes == 2 * count * 8 + length * 8 + keys.size() * 4 * 8);
        }
      });
}

TEST_CASE("readers come and go while workers push: nobody waits, nothing is left behind, versions only grow", "[processes]") {
  launch(2, [](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, {{"w", 50'000}}, {.consistency = ssp(1), .door = somewhere});
    const auto w = ps["w"];
    std::vector<std::int64_t> ones(w.size(), 1), values(w.size());
    std::atomic<bool> over{false};
    std::string problem;
    std::thread readers;
    const std::size_t before = descriptors();
    if (comm.rank() == 0)
      readers = std::thread([&, doors = ps.doors()] {
        try {
          std::vector<std::int64_t> seen(w.size());
          std::uint64_t version = 0;
          std::int64_t least = 0;
          for (int i = 0; i < 40; ++i) {
            TableReader<std::int64_t> reader(doors[static_cast<std::size_t>(i) % 2]);
            for (int k = 0; k < 3; ++k) {
              const Pulled got = reader["w"].pull(seen);
              expect(got.version >= version, "versions only grow");
              version = got.version;
              for (const std::int64_t value : seen) expect(value >= least && value >= static_cast<std::int64_t>(2 * version), "what is in the version is there");
              least = *std::min_element(seen.begin(), seen.end());
            }
          }
        } catch (const std::exception& error) {
          problem = error.what();
        }
        over = true;
      });
    std::int64_t pushes = 0;
    std::vector<std::int64_t> go(1);
    do {
      w.push(ones);
      ++pushes;
      ps.tick();
      w.pull(values);
      go[0] = comm.rank() == 0 && over;
      comm.all_reduce(std::span(go), tally::sum);
    } while (go[0] == 0);
    if (readers.joinable()) readers.join();
    expect(problem.empty(), problem);
    ps.tick();
    w.pull(values);
    for (const std::int64_t value : values) expect(value == 2 * pushes, "all pushes are in, once");
    if (comm.rank() == 0) expect(eventually(10s, [&] { return descriptors() <= before; }), "no descriptor is left: " + std::to_string(descriptors()) + " of " + std::to_string(before));
    comm.barrier();
    ps.close();
  }, tally::processes);
}

TEST_CASE("a worker that comes later counts from the clock that all have reached") {
  for (const FoldOrder& fold : {FoldOrder::arrival(), FoldOrder::by_rank()})
    for (const int replicas : {0, 1})
      launch(3, [&](Communicator& comm) {
        ParameterServer<std::int64_t> ps(comm, {{"w", 30'000}, {"rows", 0, 2, 0, 99}}, {.consistency = bsp, .fold = fold, .replicas = replicas, .door = somewhere, .guests = 1});
        const auto w = ps["w"];
        std::vector<std::int64_t> ones(w.size(), 1), values(w.size());
        constexpr int steps = 5, together = 6;
        const auto step = [&] {
          w.push(ones);
          ps.tick();
          w.pull(values);
        };
        for (int i = 0; i < steps; ++i) step();
        for (const std::int64_t value : values) expect(value == 3 * steps, "three workers");
        // Rank 0's process has the fourth one, too.
        std::string problem;
        std::thread guest;
        std::atomic<bool> joined{false};
        if (comm.rank() == 0)
          guest = std::thread([&, door = ps.doors()[2]] {
            try {
              TableWorker<std::int64_t> late(door);
              expect(late.clock() == steps, "its clock is theirs: " + std::to_string(late.clock()));
              expect(late.rank() == 3, "its rank");
              joined = true;
              const std::vector<std::int64_t> thousand(w.size(), 1000);
              std::vector<std::int64_t> seen(w.size());
              const std::vector<std::uint64_t> keys{7, 70};
              std::vector<std::int64_t> row{1, 2, 3, 4};
              for (int i = 1; i <= together; ++i) {
                const Report report = late["w"].push(thousand);
                expect(report.bytes_sent == w.size() * 8, "bytes");
                late.sparse("rows").rows(keys).push(row);
                late.tick();
                const Pulled got = late["w"].pull(seen);
                expect(got.version >= static_cast<std::uint64_t>(steps + i), "bsp: version " + std::to_string(got.version));
                for (const std::int64_t value : seen) expect(value == 3 * (steps + i) + 1000 * i || (i < together && value > 3 * (steps + i)), "all of this clock: " + std::to_string(value));
              }
              std::vector<std::int64_t> found(4);
              late.sparse("rows").rows(keys).pull(found);
              expect(found == std::vector<std::int64_t>{together, 2 * together, 3 * together, 4 * together}, "its own rows");
              late.close();
            } catch (const std::exception& error) {
              problem = error.what();
              joined = true;
            }
          });
        if (comm.rank() == 0) expect(eventually(20s, [&] { return joined.load(); }), "it joins");
        comm.barrier();
        for (int i = 0; i < together; ++i) step();
        if (guest.joinable()) guest.join();
        expect(problem.empty(), problem);
        comm.barrier();
        step();  // without it, which has left
        for (const std::int64_t value : values) expect(value == 3 * (steps + together + 1) + 1000 * together, "all pushes are in, once: " + std::to_string(value));
        ps.close();
      }, tally::threads);
}

TEST_CASE("a worker that came and died holds up nobody, and its place is another's") {
  launch(2, [](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, {{"w", 10'000}}, {.consistency = bsp, .replicas = 1, .door = somewhere, .guests = 1});
    std::vector<std::int64_t> ones(10'000, 1), values(10'000);
    for (int i = 0; i < 5; ++i) {
      if (comm.rank() == 0) {
        TableWorker<std::int64_t> late(ps.doors()[static_cast<std::size_t>(i) % 2]);
        expect(late.rank() == 2, "the same place");
        late["w"].push(std::vector<std::int64_t>(10'000, 1'000'000));
        // It goes without a word, having pushed, and not ticked.
      }
      comm.barrier();
      ps["w"].push(ones);
      ps.tick();
      ps["w"].pull(values);
      for (const std::int64_t value : values) expect(value == 2 * (i + 1) + 1'000'000 * (i + 1), "what it was told is kept is in: " + std::to_string(value));
      comm.barrier();
    }
    ps.close();
  }, tally::threads);
}

TEST_CASE("who may not come in is told why, and the table goes on") {
  with_table(2, {.consistency = asp, .door = somewhere, .guests = 1}, [](auto& ps, Communicator&) {
    const std::string door = ps.doors()[0];
    INFO(said([&] { TableReader<float> other(door); }));
    CHECK(has(said([&] { TableReader<float> other(door); }), "has elements int64 of 8 bytes, and this process asks for float32 of 4"));
    {
      const Environment secret("TALLY_SECRET", "abc");
      CHECK(has(said([&] { TableReader<std::int64_t> other(door); }), "has no secret, and this process has one"));
    }
    TableReader<std::int64_t> reader(door);
    std::vector<std::int64_t> values(reader["w"].size());
    CHECK(has(said([&] { reader["w"].push(values); }), "a reader is no worker of this table, and may only pull"));
    CHECK(has(said([&] { reader["q"]; }), "there is no tensor 'q'; there are 'w', 'rows'"));
    CHECK(has(said([&] { reader["w"].pull(std::span(values).first(3)); }), "the buffer has 3 elements, expected 100003"));
    const std::vector<std::uint64_t> keys{1000};
    CHECK(has(said([&] { reader.sparse("rows").rows(keys).pull(std::span(values).first(4)); }), "key 1000 is out of its range, 0 to 999"));
    TableWorker<std::int64_t> late(door);
    const Caught full = caught_of([&] { TableWorker<std::int64_t> another(door, {.timeout = 1s}); });
    CHECK(full.is(Errc::no_resources));
    CHECK(has(full.text, "all 1 places for workers that come later are taken"));
    late["w"].push(std::vector<std::int64_t>(values.size(), 5));
    late.close();
    CHECK(has(said([&] { late["w"].push(values); }), "this worker has left the table"));
    reader["w"].pull(values);
    CHECK(values[77] == 5);
  });
  with_table(1, {.consistency = asp, .door = somewhere}, [](auto& ps, Communicator&) {
    CHECK(caught_of([&] { TableWorker<std::int64_t> late(ps.doors()[0]); }).is(Errc::unsupported));
  });
  {
    const Environment secret("TALLY_SECRET", "the right one");
    with_table(2, {.consistency = asp, .door = somewhere}, [](auto& ps, Communicator&) {
      TableReader<std::int64_t> reader(ps.doors()[1]);
      std::vector<std::int64_t> values(reader["w"].size());
      CHECK(reader["w"].pull(values).version == 0);
      const Environment wrong("TALLY_SECRET", "a wrong one");
      CHECK(has(said([&] { TableReader<std::int64_t> other(ps.doors()[0]); }), "another secret than the table's"));
      const Environment none("TALLY_SECRET", nullptr);
      CHECK(has(said([&] { TableReader<std::int64_t> other(ps.doors()[0]); }), "asks for a secret, and this process has none"));
    });
  }
  std::string closed;
  with_table(2, {.consistency = asp, .door = somewhere}, [&](auto& ps, Communicator&) { closed = ps.doors()[0]; });
  CHECK(caught_of([&] { TableReader<std::int64_t> late(closed, {.timeout = 2s}); }).is(Errc::peer_lost));
  const auto refused = [](const TableOptions& options) {
    return said([&] { with_table(1, options, [](auto&, Communicator&) {}); });
  };
  CHECK(has(refused({.door = "nonsense"}), "is no address: it should be HOST:PORT"));
  CHECK(has(refused({.door = "203.0.113.7:0"}), "203.0.113.7:0 is no address of this host"));
  CHECK(has(refused({.guests = 1}), "need a door (TableOptions::door)"));
  CHECK(has(refused({.door = somewhere, .guests = -1}), "guests may be 0 to 1024, not -1"));
}

TEST_CASE("two tables at one door: all ranks hear of it") {
  with_table(2, {.consistency = asp, .door = somewhere}, [&](auto& ps, Communicator&) {
    const Caught c = caught_of([&] { with_table(2, {.consistency = asp, .door = ps.doors()[0]}, [](auto&, Communicator&) {}); });
    CHECK(has(c.text, "Address already in use"));
  });
}

TEST_CASE("a reader whose table closes is told so") {
  std::unique_ptr<TableReader<std::int64_t>> reader;
  std::vector<std::int64_t> values(100'003);
  with_table(2, {.consistency = asp, .door = somewhere}, [&](auto& ps, Communicator&) {
    reader = std::make_unique<TableReader<std::int64_t>>(ps.doors()[0], GuestOptions{.timeout = 10s});
    (*reader)["w"].pull(values);
  });
  const Caught c = caught_of([&] { (*reader)["w"].pull(values); });
  CHECK(c.is(Errc::peer_lost));
  CHECK(has(c.text, "the table is closed"));
}

TEST_CASE("I4: a server that dies: readers and workers that came later go on with its replica", "[processes]") {
  struct Common {
    std::atomic<int> ready{0};
    std::atomic<bool> killed{false}, done{false};
    char door[64] = {};
  };
  const Shared<Common> shared;
  static int count = 0;
  const std::string job = "guests" + std::to_string(::getpid()) + "." + std::to_string(++count);
  std::vector<Process> ranks;
  for (Rank r = 0; r < 3; ++r)
    ranks.emplace_back([&, r] {
      ::setenv("TALLY_RANK", std::to_string(r).c_str(), 1);
      ::setenv("TALLY_SIZE", "3", 1);
      ::setenv("TALLY_JOB", job.c_str(), 1);
      Communicator comm = tally::init();
      ParameterServer<std::int64_t> ps(comm, {{"w", 20'000}}, {.consistency = asp, .replicas = 1, .door = somewhere, .guests = 1});
      if (r == 0) ps.doors()[0].copy(shared->door, 63);
      ++shared->ready;
      while (!shared->done) std::this_thread::sleep_for(1ms);
      ps.close();
    });
  REQUIRE(eventually(20s, [&] { return shared->ready == 3; }));
  std::atomic<int> acknowledged{0};
  std::string problem;
  std::thread guests([&] {
    try {
      TableWorker<std::int64_t> late(shared->door, {.timeout = 20s});
      TableReader<std::int64_t> reader(shared->door, {.timeout = 20s});
      const std::vector<std::int64_t> ones(20'000, 1);
      std::vector<std::int64_t> values(20'000);
      for (int i = 1; i <= 400; ++i) {
        late["w"].push(ones);
        acknowledged = i;
        if (i % 10 == 0) late.tick();
        late["w"].pull(values);
        for (const std::int64_t value : values) expect(value == i, "what was acknowledged is there, once: " + std::to_string(value) + " of " + std::to_string(i));
        reader["w"].pull(values);  // the last one may not count for others yet
        for (const std::int64_t value : values) expect(value == i || value == i - 1, "a reader sees it, too: " + std::to_string(value) + " of " + std::to_string(i));
      }
      late.close();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    acknowledged = 1000;
  });
  CHECK(eventually(20s, [&] { return acknowledged > 100; }));
  ranks[1].kill(SIGKILL);
  guests.join();
  CHECK(problem == "");
  shared->done = true;
  CHECK(exited_well(ranks[0].wait(30s)));
  CHECK(exited_well(ranks[2].wait(30s)));
}

TEST_CASE("a worker that came later pushes and pulls in one, and waits for the wire alone") {
  with_table(2, {.consistency = asp, .door = somewhere, .guests = 1}, [](auto& ps, Communicator&) {
    TableWorker<std::int64_t> late(ps.doors()[0]);
    const std::vector<std::int64_t> ones(late["w"].size(), 1);
    std::vector<std::int64_t> values(ones.size());
    for (int i = 1; i <= 3; ++i) {
      const Pulled got = late["w"].push_pull(ones, values);
      CHECK(values == std::vector<std::int64_t>(ones.size(), i));
      CHECK(got.clock == static_cast<std::uint64_t>(i));
    }
    auto in_the_background = late["w"].async_push_pull(ones, values);
    in_the_background.wait();
    CHECK(values == std::vector<std::int64_t>(ones.size(), 4));
    late.close();
  });
}

TEST_CASE("what a worker that left has pushed stays, whoever takes its place, and when") {
  launch(2, [](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, {{"w", 5000}}, {.consistency = bsp, .fold = FoldOrder::by_rank(), .door = somewhere, .guests = 1});
    const std::vector<std::int64_t> ones(5000, 1);
    std::vector<std::int64_t> values(5000);
    if (comm.rank() == 0) {
      TableWorker<std::int64_t> first(ps.doors()[0]);
      first["w"].push(std::vector<std::int64_t>(5000, 100));
      first.tick();
      first.close();
      // Its clock is not folded, so its place is not free yet.
      std::thread second([&, door = ps.doors()[1]] {
        TableWorker<std::int64_t> late(door);
        late["w"].push(std::vector<std::int64_t>(5000, 10'000));
        late.close();
      });
      std::this_thread::sleep_for(20ms);
      ps["w"].push_pull(ones, values);
      second.join();
    } else {
      ps["w"].push_pull(ones, values);
    }
    comm.barrier();
    ps["w"].push_pull(ones, values);
    for (const std::int64_t value : values) expect(value == 10'104, "all that was acknowledged is in: " + std::to_string(value));
    ps.close();
  }, tally::threads);
}

TEST_CASE("a place is free once its worker has closed") {
  with_table(2, {.consistency = asp, .door = somewhere, .guests = 1}, [](auto& ps, Communicator&) {
    TableWorker<std::int64_t> first(ps.doors()[0]);
    first.close();
    TableWorker<std::int64_t> second(ps.doors()[0]);
    second.close();
  });
}

TEST_CASE("a guest that goes while it joins holds up nobody") {
  for (const int replicas : {0, 1})
    launch(2, [&](Communicator& comm) {
      ParameterServer<std::int64_t> ps(comm, {{"w", 5000}}, {.consistency = bsp, .replicas = replicas, .door = somewhere, .guests = 1});
      const std::vector<std::int64_t> ones(5000, 1);
      std::vector<std::int64_t> values(5000);
      if (comm.rank() == 0) {
        std::string description;
        std::size_t shard = 0;
        detail::DoorStream half(detail::resolve(ps.doors()[0]).front(), detail::NetworkSettings(5s), std::chrono::steady_clock::now() + 5s, description, shard);
        detail::DoorMessage m;
        m.e.kind = detail::MessageKind::join;
        m.e.request = 1;
        expect(half.stream().write(&m, sizeof m) == sizeof m, "it asks for a place");
        detail::wait_for_events(half.stream().get(), POLLIN, std::chrono::steady_clock::now() + 5s);
      }
      comm.barrier();
      for (int i = 1; i <= 3; ++i) ps["w"].push_pull(ones, values);
      for (const std::int64_t value : values) expect(value == 6, "the others go on");
      if (comm.rank() == 0) {
        TableWorker<std::int64_t> late(ps.doors()[1]);  // the place is free again
        late.close();
      }
      comm.barrier();
      ps.close();
    }, tally::threads);
}

TEST_CASE("any number of operations of a guest's in the background") {
  with_table(2, {.consistency = asp, .door = somewhere, .guests = 1}, [](auto& ps, Communicator&) {
    TableWorker<std::int64_t> late(ps.doors()[0]);
    const std::vector<std::int64_t> ones(late["w"].size(), 1);
    std::vector<std::vector<std::int64_t>> values(3000, std::vector<std::int64_t>(10));
    std::vector<TableOperation> all;
    all.push_back(late["w"].async_push(ones));
    for (auto& each : values) all.push_back(late["w"].range(50'000, 10).async_pull(each));
    for (TableOperation& each : all) each.wait();
    for (const auto& each : values) CHECK(each == std::vector<std::int64_t>(10, 1));
    late.close();
  });
}

TEST_CASE("what is kept for a reader that does not read is bounded") {
  with_table(1, {.consistency = asp, .door = somewhere}, [](auto& ps, Communicator&) {
    const std::vector<std::int64_t> ones(ps["w"].size(), 1);
    std::string description;
    std::size_t shard = 0;
    detail::DoorStream mute(detail::resolve(ps.doors()[0]).front(), detail::NetworkSettings(5s), std::chrono::steady_clock::now() + 5s, description, shard);
    const auto resident = [] {
      std::ifstream file("/proc/self/statm");
      std::size_t all = 0, pages = 0;
      file >> all >> pages;
      return pages * 4096;
    };
    for (int i = 0; i < 50; ++i) ps["w"].push(ones);
    const std::size_t before = resident();
    for (std::uint64_t i = 1; i <= 1000; ++i) {
      detail::DoorMessage m;
      m.e.kind = detail::MessageKind::pull;
      m.e.request = i << 16;
      m.e.count = ones.size();
      (void)!mute.stream().write(&m, sizeof m);
      ps["w"].push(ones);  // each answer would be of another version
    }
    if (!sanitized) CHECK(resident() - std::min(resident(), before) < 100 * (std::size_t{1} << 20));  // all would be 800 MB
    std::vector<std::int64_t> values(ones.size());
    ps["w"].pull(values);
    CHECK(values[3] == 1050);
  });
}

TEST_CASE("strangers at a table's door, and guests that talk nonsense, harm nobody") {
  with_table(2, {.consistency = asp, .door = somewhere, .guests = 2}, [](auto& ps, Communicator&) {
    std::vector<std::int64_t> values(ps["w"].size(), 1);
    ps["w"].push(values);
    const detail::NetworkSettings settings(2s);
    std::mt19937_64 random(7);
    const SocketAddress door = detail::resolve(ps.doors()[0]).front();
    // A worker that came by the rules pushes what looks like something else.
    for (const std::uint16_t column : std::initializer_list<std::uint16_t>{0, 1, 100, 101}) {
      TableWorker<std::int64_t> late(ps.doors()[0], {.timeout = 2s});
      std::string description;
      std::size_t shard = 0;
      detail::DoorStream stream(door, settings, std::chrono::steady_clock::now() + 5s, description, shard);
      detail::DoorMessage m;
      m.e.kind = detail::MessageKind::join;
      m.e.request = 1;
      (void)!stream.stream().write(&m, sizeof m);
      detail::wait_for_events(stream.stream().get(), POLLIN, std::chrono::steady_clock::now() + 5s);
      (void)stream.stream().read(&m, sizeof m);
      const std::int32_t worker = m.e.worker;
      m = {};
      m.e.kind = detail::MessageKind::cut, m.e.worker = worker, m.e.request = 2, m.e.clock = 50;
      (void)!stream.stream().write(&m, sizeof m);
      m.e.kind = detail::MessageKind::push, m.e.request = 3, m.e.flags = detail::Envelope::of_cut, m.e.parts = column, m.e.sequence = 1, m.e.number = 1, m.e.count = 10'000;
      (void)!stream.stream().write(&m, sizeof m);
      std::this_thread::sleep_for(5ms);
      late.close();
    }
    for (int round = 0; round < (sanitized ? 100 : 400); ++round) {
      const auto deadline = std::chrono::steady_clock::now() + 5s;
      if (round % 4 == 0) {  // a stranger
        int error = 0;
        detail::Stream stream(detail::begin_connect(door, error));
        detail::wait_for_events(stream.get(), POLLOUT, deadline);
        std::string bytes(random() % 200, '\0');
        for (char& c : bytes) c = static_cast<char>(random());
        (void)!stream.write(bytes.data(), bytes.size());
        continue;
      }
      std::string description;
      std::size_t shard = 0;
      detail::DoorStream stream(door, settings, deadline, description, shard);
      for (int k = 0; k < 3; ++k) {
        detail::DoorMessage m;
        m.e.kind = static_cast<detail::MessageKind>(random() % 16);
        m.e.flags = random() % 3 == 0 ? static_cast<std::uint8_t>(random()) : 0;
        m.e.tensor = static_cast<std::uint16_t>(random() % 3);
        m.e.shard = static_cast<std::uint16_t>(random() % 3);
        m.e.worker = static_cast<std::int32_t>(random() % 6) - 1;
        m.e.parts = static_cast<std::uint16_t>(random() % 4);
        for (std::uint64_t* number : {&m.e.sequence, &m.e.number, &m.e.clock, &m.e.first, &m.e.count, &m.e.bytes, &m.e.request, &m.e.index}) *number = random() % 4 == 0 ? random() : random() % 200;
        if (random() % 2 == 0) m.e.bytes = m.e.count * 8;
        (void)!stream.stream().write(&m, sizeof m);
        std::string bytes(std::min<std::uint64_t>(m.e.bytes, 4000), 'x');
        (void)!stream.stream().write(bytes.data(), bytes.size());
      }
      if (round % 8 == 1) std::this_thread::sleep_for(1ms);
    }
    // The table is as it was: none of them was a worker, or what they have pushed is theirs to push.
    TableReader<std::int64_t> reader(ps.doors()[1]);
    reader["w"].pull(values);
    ps["w"].pull(values);
    ps.tick();
  });
}

TEST_CASE("strangers that say nothing keep nobody out, however many") {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit before = limit;
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 4096);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
  if (limit.rlim_cur < 4096) WARN("not so many: this process may have " << limit.rlim_cur << " descriptors only");
  with_table(1, {.consistency = asp, .door = somewhere}, [&](auto& ps, Communicator&) {
    const SocketAddress door = detail::resolve(ps.doors()[0]).front();
    std::vector<detail::Stream> strangers;
    for (rlim_t i = 0; i < std::min<rlim_t>(1500, limit.rlim_cur / 2 - 200); ++i) {
      int error = 0;
      strangers.emplace_back(detail::begin_connect(door, error));
      REQUIRE(detail::wait_for_events(strangers.back().get(), POLLOUT, std::chrono::steady_clock::now() + 5s));
    }
    std::vector<std::int64_t> values(ps["w"].size(), 1);
    const auto begin = std::chrono::steady_clock::now();
    TableReader<std::int64_t> reader(ps.doors()[0]);
    reader["w"].pull(values);
    if (!sanitized) CHECK(std::chrono::steady_clock::now() - begin < 8s);  // those before it would be sent away after ten
    CHECK(values[0] == 0);
  });
  ::setrlimit(RLIMIT_NOFILE, &before);
}
