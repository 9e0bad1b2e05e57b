// SPDX-License-Identifier: Apache-2.0
// Persistent operations: the same results as the calls they stand for, whatever happens in between.
#include <catch2/catch.hpp>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <tally/tally.hpp>

using namespace tally;

namespace {

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

void all_of_them(RankKind kind) {
  for (const int n : {1, 2, 3, 4})
    launch(n, [](Communicator& comm) {
      const int me = comm.rank(), size = comm.size();
      const auto m = static_cast<std::size_t>(size);
      const int sum_of_ranks = size * (size - 1) / 2;
      std::vector<int> a(100), b(100), large(100 * m), summed(100);
      const int offset = size - 1;
      auto in_place = comm.persistent_all_reduce(a, sum);
      auto reduced = comm.persistent_all_reduce<Ring>(a, b, commutative([offset](int x, int y) { return x + y - offset; }));
      auto rooted = comm.persistent_reduce(a, b, max, size - 1);
      auto told = comm.persistent_broadcast(b, 0);
      auto gathered = comm.persistent_all_gather(a, large);
      auto scattered = comm.persistent_reduce_scatter(large, summed, sum);
      for (int round = 0; round < 50; ++round) {
        std::fill(a.begin(), a.end(), me + round);
        const Report report = reduced.run();
        expect(report.algorithm_name() == "ring" && b[99] == sum_of_ranks + size * round - offset * (size - 1), "all_reduce");
        std::fill(b.begin(), b.end(), -1);
        rooted.run();
        expect(b[50] == (me == size - 1 ? size - 1 + round : -1), "reduce");
        std::fill(b.begin(), b.end(), me == 0 ? round : -1);
        told.run();
        expect(b[7] == round, "broadcast");
        gathered.run();
        for (int r = 0; r < size; ++r) expect(large[static_cast<std::size_t>(r) * 100 + 42] == r + round, "all_gather");
        // Other plans in between.
        std::vector<std::uint8_t> other(static_cast<std::size_t>(round * 17 + 1), 1);
        comm.all_reduce<OneShot>(other, sum);
        expect(other.back() == size, "an ordinary call");
        scattered.run();
        expect(summed[5] == size * (me + round), "reduce_scatter");
        in_place.run();
        expect(a[0] == sum_of_ranks + size * round && a[99] == a[0], "all_reduce in place");
      }
      // Booked in the same rows as ordinary calls.
      std::uint64_t calls = 0;
      for (const LedgerRow& row : comm.ledger().rows()) calls += row.operation == Collective::all_reduce ? row.calls : 0;
      expect(calls == 150, "all_reduce calls in the ledger: " + std::to_string(calls));
    }, kind);
}

}  // namespace

TEST_CASE("persistent operations, threads") { all_of_them(threads); }
TEST_CASE("persistent operations, processes", "[processes]") { all_of_them(processes); }

TEST_CASE("plans in use stay when the engine's cache is emptied") {
  constexpr int n = 4;
  launch(n, [](Communicator& comm) {
    const auto held = [&](std::size_t count) {
      const Layout layout{Collective::all_reduce, 0, n, 0, count, true};  // the same sum on all ranks
      return Plan(Ring::all_reduce(layout.shape()), layout, 1).bytes_held();
    };
    std::vector<std::uint8_t> data(40'000);
    std::vector<int> a(100), b(100);
    auto first = comm.persistent_all_reduce<Ring>(a, sum);
    auto second = comm.persistent_broadcast(b, 1);
    const auto use = [&](int round) {
      std::fill(a.begin(), a.end(), round);
      first.run();
      first.run();
      expect(a[99] == n * n * round, "all_reduce");
      std::fill(b.begin(), b.end(), comm.rank() == 1 ? round : -1);
      second.run();
      expect(b[50] == round, "broadcast");
    };
    std::size_t bytes = 0, count = 1;
    int round = 0;
    // The limit is 16 MiB: it is passed between runs of the same operation.
    for (; bytes < std::size_t{18} << 20; ++count) {
      bytes += held(count);
      expect(count < data.size(), "enough sizes");
      std::fill_n(data.begin(), count, std::uint8_t{1});
      comm.all_reduce<Ring>(std::span(data.data(), count), sum);
      expect(data[0] == n && data[count - 1] == n, "ordinary calls in between");
      if (count % 16 == 0) use(++round);
    }
    use(++round);
    // The last ordinary call's plan stays while operations that are made and never run empty the cache.
    for (int i = 0; i < 2; ++i) {
      std::fill(data.begin(), data.end(), std::uint8_t{1});
      comm.all_reduce<Ring>(std::span(data), sum);
      expect(data[0] == n && data.back() == n, "an ordinary call");
      for (bytes = 0; i == 0 && bytes < std::size_t{18} << 20; bytes += held(count), ++count) (void)comm.persistent_all_reduce<Ring>(std::span(data.data(), count), sum);
      expect(count < data.size(), "enough sizes");
    }
  }, threads);
}

TEST_CASE("a persistent operation that outlives its communicator says so") {
  launch(2, [](Communicator& comm) {
    std::vector<float> data(10, 1.0f);
    std::optional<Persistent> op;
    {
      Communicator other = comm.duplicate();
      op = other.persistent_all_reduce(data, sum);
      op->run();
      Communicator moved = std::move(other);
      op->run();
      expect(data[9] == 4.0f, "two sums");
    }
    std::string text;
    try {
      op->run();
    } catch (const Error& error) {
      text = error.what();
    }
    expect(text.find("this communicator is gone") != std::string::npos, text);
  }, threads);
}

TEST_CASE("arguments of persistent operations are checked when they are made") {
  launch(1, [](Communicator& comm) {
    std::vector<float> a(3), b(4);
    std::string text;
    try {
      (void)comm.persistent_all_reduce(a, b, sum);
    } catch (const Error& error) {
      text = error.what();
    }
    expect(text.find("all_reduce: out has 4 elements, expected 3") != std::string::npos, text);
  }, threads);
}
