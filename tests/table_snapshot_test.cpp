// SPDX-License-Identifier: Apache-2.0
// Snapshots: I10, that one at clock c is a replay of the pushes with clocks below c; that they come back whole into tables of other
// servers; and that no damaged, cut or foreign file is taken.
#include <catch2/catch.hpp>

#include <unistd.h>

#include <cstdlib>
#include <cmath>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "sanitized.hpp"
#include "table_suite.hpp"

using namespace test;

namespace {

struct Folder {
  Folder() {
    char name[] = "/tmp/tally_snapshot_XXXXXX";
    if (!::mkdtemp(name)) throw std::runtime_error("no folder");
    path = name;
  }
  ~Folder() {
    for (const char* file : {"/a", "/b", "/c"}) ::unlink((path + file).c_str());
    ::rmdir(path.c_str());
  }
  std::string path;
};
std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void put(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::vector<TensorSpec> tensors(std::size_t count) { return {{"w", count}, {"rows", 0, 3, 100, 1'000'000}}; }
std::vector<std::uint64_t> some_keys(Rank r) {
  std::vector<std::uint64_t> keys;
  for (std::uint64_t i = 0; i < 200; ++i) keys.push_back(100 + (i * 7919 + static_cast<std::uint64_t>(r) * 31) % 999'900);
  return keys;
}

/// What workers push at a clock, a step of a program that anybody can run again.
void push_step(ParameterServer<float, Adam>& ps, Rank r, std::size_t count) {
  const auto clock = static_cast<float>(ps.clock());
  std::vector<float> g(count), rows(600);
  for (std::size_t i = 0; i < count; ++i) g[i] = std::sin(static_cast<float>(i) + clock + static_cast<float>(r));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = std::cos(static_cast<float>(i) * clock + static_cast<float>(r));
  ps["w"].push(g);
  ps.sparse("rows").rows(some_keys(r)).push(rows);
}
void pull_all(ParameterServer<float, Adam>& ps, std::vector<float>& w, std::vector<float>& rows) {
  ps["w"].pull(w);
  ps.sparse("rows").rows(some_keys(0)).pull(rows);
}

}  // namespace

TEST_CASE("I10: a snapshot at clock c is a replay of the pushes with clocks below c, however far others are") {
  const Folder folder;
  const std::string file = folder.path + "/a";
  constexpr std::size_t count = 5003;
  for (const bool ordered : {true, false}) {
    // With pushes folded in one order the bits are the same; by arrival, one worker's are.
    const int n = ordered ? 3 : 1;
    std::vector<float> expected_w(count), expected_rows(600);
    launch(n, [&](Communicator& comm) {
      ParameterServer<float, Adam> ps(comm, tensors(count), {.consistency = ssp(5), .fold = ordered ? FoldOrder::by_rank() : FoldOrder::arrival(), .block_bytes = 1000});
      for (int step = 0; step < 4; ++step) push_step(ps, comm.rank(), count), ps.tick();
      ps.tick_to(9);  // what it must see is that of all
      comm.barrier();
      if (comm.rank() == 0) pull_all(ps, expected_w, expected_rows);
      comm.barrier();
      ps.close();
    }, threads);
    launch(n, [&](Communicator& comm) {
      ParameterServer<float, Adam> ps(comm, tensors(count), {.consistency = asp, .fold = ordered ? FoldOrder::by_rank() : FoldOrder::arrival(), .block_bytes = 1000});
      std::optional<Snapshot> cut;
      if (comm.rank() == 0) cut = ps.snapshot_at(4);
      comm.barrier();
      for (int step = 0; step < 4 + 3 * comm.rank(); ++step) push_step(ps, comm.rank(), count), ps.tick();  // some are ahead
      if (comm.rank() == 0) {
        for (int step = 0; step < 3; ++step) push_step(ps, 0, count), ps.tick();
        expect(cut->write(file) > count * 4, "it has the values");
      }
      comm.barrier();
      ps.close();
    }, threads);
    // Into tables of other servers and other blocks, and of threads and processes.
    for (const int m : {1, 2}) {
      launch(m, [&](Communicator& comm) {
        ParameterServer<float, Adam> ps(comm, tensors(count), {.consistency = asp, .servers = {m - 1}, .block_bytes = 1000});
        if (comm.rank() == 0) {
          expect(ps.restore(file) == 4, "its clock is 4");
          std::vector<float> w(count), rows(600);
          pull_all(ps, w, rows);
          expect(w == expected_w, "values are those of a replay");
          expect(rows == expected_rows, "rows are those of a replay");
        }
        comm.barrier();
        ps.close();
      }, sanitized ? threads : processes);  // launch() does not fork under TSan
    }
  }
}

TEST_CASE("what is restored goes on as if nothing had been: the rule's state is in it") {
  const Folder folder;
  constexpr std::size_t count = 777;
  std::vector<float> w(count), rows(600), expected_w(count), expected_rows(600);
  const auto table = [&](Communicator& comm) { return ParameterServer<float, Adam>(comm, tensors(count), {.consistency = bsp, .block_bytes = 512}); };
  launch(1, [&](Communicator& comm) {
    auto ps = table(comm);
    for (int step = 0; step < 3; ++step) push_step(ps, 0, count), ps.tick();
    ps.snapshot_at(3).write(folder.path + "/a");
    for (int step = 0; step < 3; ++step) push_step(ps, 0, count), ps.tick();
    pull_all(ps, expected_w, expected_rows);
    ps.close();
    auto again = table(comm);
    again.tick_to(again.restore(folder.path + "/a"));
    for (int step = 0; step < 3; ++step) push_step(again, 0, count), again.tick();
    pull_all(again, w, rows);
    again.close();
  }, threads);
  CHECK(w == expected_w);
  CHECK(rows == expected_rows);
}

TEST_CASE("a cut that is over cannot be had, and says why") {
  const Outcome outcome = outcome_of(1, threads, [](Communicator& comm) {
    ParameterServer<float> ps(comm, {{"w", 10}}, {.consistency = asp});
    ps["w"].push(std::vector<float>(10, 1));
    ps.tick();
    ps["w"].push(std::vector<float>(10, 1));
    const Caught late = caught([&] { ps.snapshot_at(1); });
    expect(late.is(Errc::invalid_argument) && has(late.text, "the cut at clock 1 is not kept any more: shard 0 has a push of clock 1 already"), late.text);
    ps.tick();
    std::size_t bytes = 0;
    const Snapshot now = ps.snapshot_at(2);
    now.stream([&](std::span<const std::byte> data) { bytes += data.size(); });
    expect(bytes > 40, "the table goes on");
    now.drop();
    const Caught gone = caught([&] { now.stream([](std::span<const std::byte>) {}); });
    expect(has(gone.text, "there is no cut at clock 2 any more"), gone.text);
    ps.close();
  });
  INFO(outcome);
  CHECK((!outcome.ranks[0].error && !outcome.ranks[0].foreign));
}

TEST_CASE("no damaged, cut or foreign snapshot is restored, and nothing is changed by one") {
  const Folder folder;
  const std::string good = folder.path + "/a", bad = folder.path + "/b";
  constexpr std::size_t count = 100;
  launch(1, [&](Communicator& comm) {
    ParameterServer<float, Adam> ps(comm, tensors(count), {.consistency = bsp});
    push_step(ps, 0, count);
    ps.tick();
    ps.snapshot_at(1).write(good);
    std::vector<float> before(count), rows(600), after(count);
    pull_all(ps, before, rows);
    const std::string whole = content(good);
    const auto refused = [&](const std::string& file, const std::string& part) {
      const Caught c = caught([&] { ps.restore(file); });
      expect(c.is(Errc::invalid_argument) && has(c.text, part), "'" + std::string(c.text) + "' says '" + part + "'");
      ps["w"].pull(after);
      expect(after == before, "nothing has changed");
    };
    refused(folder.path + "/c", "No such file");
    refused("/tmp", "not a plain file");
    for (std::size_t at = 0; at < whole.size(); at += 1 + whole.size() / 211) {  // any byte
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
      put(bad, damaged);
      refused(bad, "cannot be restored");
    }
    for (std::size_t length = 0; length < whole.size(); length += 1 + whole.size() / 97) {
      put(bad, whole.substr(0, length));
      refused(bad, "in the midst of it");
    }
    ps.close();
    ParameterServer<float, Adam> other(comm, {{"w", count + 1}, {"rows", 0, 3, 100, 1'000'000}});
    expect(has(caught([&] { other.restore(good); }).text, "'w' has 100 elements in rows of 0, keys 0 to 18446744073709551615; in the table 101"), "another count");
    other.close();
    ParameterServer<float, Sgd> plain(comm, tensors(count));
    expect(has(caught([&] { plain.restore(good); }).text, "its rule has 2 states, the table's has 0"), "another rule");
    plain.close();
    ParameterServer<double, Adam> wide(comm, tensors(count));
    expect(has(caught([&] { wide.restore(good); }).text, "its elements are float32 of 4 bytes, the table's are float64 of 8"), "another type");
    wide.close();
  }, threads);
  CHECK(content(good).size() > 400);
}
