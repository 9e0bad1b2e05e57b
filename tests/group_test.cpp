// SPDX-License-Identifier: Apache-2.0
// Groups: many small operations done as few, with the results and the account of many.
#include <catch2/catch.hpp>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <tally/tally.hpp>

#include "processes.hpp"

using namespace tally;

namespace {

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

void many_small_ones(Communicator& comm) {
  const int n = comm.size(), me = comm.rank();
  std::vector<std::vector<std::int32_t>> tensors;
  for (std::size_t i = 0; i < 3000; ++i) tensors.emplace_back(i % 97, static_cast<std::int32_t>(i) + me);
  const std::uint64_t messages = comm.counters().messages_sent;
  const Report report = comm.group([&] {
    for (auto& tensor : tensors) {
      const Report inside = comm.all_reduce(tensor, sum);
      expect(inside.sequence == 0 && inside.elapsed == nanoseconds{0}, "no account inside a group");
    }
  });
  for (std::size_t i = 0; i < tensors.size(); ++i)
    for (const std::int32_t x : tensors[i]) expect(x == n * static_cast<std::int32_t>(i) + n * (n - 1) / 2, "the sum of tensor " + std::to_string(i));
  expect(n == 1 || comm.counters().messages_sent - messages < 1000, "few messages instead of thousands");
  expect(report.elapsed == report.busy() + report.idle() + report.undriven && report.elapsed > nanoseconds{0}, "the sum of exact accounts");
  if (n > 1) expect(report.bytes_sent > 0, "traffic is accounted");
}

/// Operations of many kinds in any order: each gets its own result.
void all_kinds(Communicator& comm) {
  const int n = comm.size(), me = comm.rank(), root = n - 1;
  std::vector<double> a(3, me), b(5, me + 1), c(4, me);
  std::vector<float> d(7, static_cast<float>(me)), large(100'000, 1.0f);
  std::vector<std::int64_t> r(2, me), r_out(2, -1), s(3, me == root ? 42 : 0), g(static_cast<std::size_t>(n)), mine(1, me), t(static_cast<std::size_t>(n), me), t_out(static_cast<std::size_t>(n)), p(2, me), got(2, -1), scanned(1);
  std::vector<std::int64_t> bare(4, me + 1), wide(6000, me), wide_out(me == root ? 6000 : 0);  // in and out are more than what is packed
  int factor = 3;  // an operator with a state
  comm.group([&] {
    comm.all_reduce(a, sum);
    comm.all_reduce(b, max);
    comm.all_reduce(c, premultiplied_sum(2.0));
    comm.all_reduce(d, mean);
    comm.all_reduce(large, sum);
    comm.reduce(r, r_out, sum, root);
    comm.reduce(wide, wide_out, sum, root);
    comm.broadcast(s, root);
    comm.all_gather(mine, g);
    comm.all_to_all(t, t_out);
    comm.scan(mine, scanned, sum);
    comm.all_reduce(bare, [factor](std::int64_t x, std::int64_t y) { return x + y + 0 * factor; });
    if (n > 1) {
      comm.receive(got, wrap(me - 1, n), 5);
      comm.send(p, wrap(me + 1, n), 5);
    }
    comm.barrier();
  });
  const int total = n * (n - 1) / 2;
  expect(a == std::vector<double>(3, total), "all_reduce");
  expect(b == std::vector<double>(5, n), "all_reduce max");
  expect(c == std::vector<double>(4, 2.0 * total), "premultiplied sum");
  expect(d == std::vector<float>(7, static_cast<float>(total) / static_cast<float>(n)), "mean");
  expect(large == std::vector<float>(100'000, static_cast<float>(n)), "a large one");
  expect(r_out == std::vector<std::int64_t>(2, me == root ? total : -1) && r == std::vector<std::int64_t>(2, me), "reduce");
  expect(s == std::vector<std::int64_t>(3, 42), "broadcast");
  expect(wide_out == std::vector<std::int64_t>(me == root ? 6000 : 0, total), "a reduce of which the root holds more");
  expect(scanned[0] == me * (me + 1) / 2, "scan");
  expect(bare == std::vector<std::int64_t>(4, total + n), "an operator of one's own");
  if (n > 1) expect(got == std::vector<std::int64_t>(2, wrap(me - 1, n)), "a message");
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) expect(g[i] == static_cast<std::int64_t>(i) && t_out[i] == static_cast<std::int64_t>(i), "all_gather and all_to_all");
}

/// More than a bucket: staged from where the parts lie, which is in no order, of all sizes, in place and not.
void large_ones(Communicator& comm) {
  const int n = comm.size(), me = comm.rank(), root = n - 1;
  const std::size_t count = 3000;
  std::vector<float> in(count * count / 10), out(in.size(), -1.0f), means(in.size()), scaled(in.size(), 1.0f), reduced(in.size(), -1.0f), sent(in.size());
  const auto value = [](int rank, std::size_t i) { return static_cast<float>((i * 7 + static_cast<std::size_t>(rank) * 11) % 1000); };
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = means[i] = value(me, i), sent[i] = me == root ? value(5, i) : 0;
  std::vector<std::span<float>> pieces;  // of `out`: all but those between them
  std::vector<std::size_t> firsts;
  for (std::size_t i = 0, first = 0; first + i % 601 <= in.size(); first += i % 601 + 3, ++i) pieces.push_back(std::span(out).subspan(first, i % 601)), firsts.push_back(first);
  const auto piece = [&](std::vector<float>& of, std::size_t k) { return std::span(of).subspan(firsts[k], pieces[k].size()); };
  const auto each = [&](auto&& f) {
    for (std::size_t k = pieces.size(); k > 0; --k) f(k - 1);
  };
  Report report = comm.group([&] { each([&](std::size_t k) { comm.all_reduce(piece(in, k), pieces[k], sum); }); });
  expect(n == 1 || report.algorithm_name() == "staged", "staged, not " + std::string(report.algorithm_name()));
  expect(report.elapsed == report.busy() + report.idle() + report.undriven, "an exact account");
  comm.group([&] { each([&](std::size_t k) { comm.all_reduce(piece(means, k), mean); }); });
  comm.group([&] { each([&](std::size_t k) { comm.all_reduce(piece(scaled, k), premultiplied_sum(2.0f)); }); });
  comm.group([&] { each([&](std::size_t k) { comm.reduce(piece(in, k), piece(reduced, k), max, root); }); });
  comm.group([&] { each([&](std::size_t k) { comm.broadcast(piece(sent, k), root); }); });
  std::vector<char> within(in.size());
  for (std::size_t k = 0; k < pieces.size(); ++k) std::fill_n(within.begin() + static_cast<std::ptrdiff_t>(firsts[k]), pieces[k].size(), 1);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    float total = 0, most = 0;
    for (int r = 0; r < n; ++r) total += value(r, i), most = std::max(most, value(r, i));
    wrong += in[i] != value(me, i);
    wrong += out[i] != (within[i] ? total : -1.0f);
    wrong += means[i] != (within[i] ? total / static_cast<float>(n) : value(me, i));
    wrong += scaled[i] != (within[i] ? 2.0f * static_cast<float>(n) : 1.0f);
    wrong += reduced[i] != (within[i] && me == root ? most : -1.0f);
    wrong += sent[i] != (within[i] || me == root ? value(5, i) : 0);
  }
  expect(wrong == 0, std::to_string(wrong) + " wrong values");
}

void large_different_sizes(Communicator& comm) {
  std::vector<float> data(1'000'000), rest(1);
  std::string what;
  try {
    comm.group([&] {
      for (std::size_t i = 0; i < 1000; ++i) comm.all_reduce(std::span(data).subspan(i * 1000, comm.rank() == 0 || i != 500 ? 1000 : 999), sum);
      comm.all_reduce(std::span(rest).first(comm.rank() == 0 ? 0 : 1), sum);
    });
  } catch (const Error& error) {
    what = error.what();
    expect(error.errc() == Errc::mismatch, what);
  }
  expect(what.find("a group of sizes") != std::string::npos, "the error names the calls, not: " + what);
}

/// What a group is told that is refused as the caller's mistake; empty if it is not.
template <class F>
std::string refusal(Communicator& comm, F&& f) {
  const test::Caught c = test::caught([&] { comm.group(f); });
  return c.is(Errc::invalid_argument) ? c.text : "";
}

/// Packed operations are done at once, so that none sees what another one has done.
void dependent_ones(Communicator& comm) {
  const float n = static_cast<float>(comm.size());
  std::vector<float> a(40, 1.0f), b(40, 7.0f), c(40), d(40);
  const auto refused = [&](auto&& f) {
    const std::string what = refusal(comm, f);
    expect(what.find("40 elements overlaps in memory with") != std::string::npos && what.find("must not depend on each other") != std::string::npos, "refused, not: " + what);
    expect(a == std::vector<float>(40, 1.0f) && b == std::vector<float>(40, 7.0f), "and nothing is done");
  };
  refused([&] { comm.all_reduce(a, sum), comm.all_reduce(a, sum); });
  refused([&] { comm.all_reduce(a, b, sum), comm.all_reduce(b, c, sum); });
  refused([&] { comm.all_reduce(b, c, sum), comm.all_reduce(a, b, sum); });
  refused([&] { comm.all_reduce(a, c, sum), comm.all_reduce(b, c, sum); });
  refused([&] { comm.all_reduce(a, c, sum), comm.all_reduce(b, d, sum), comm.all_reduce(a, max); });
  comm.group([&] { comm.all_reduce(a, c, sum), comm.all_reduce(a, d, max), comm.all_reduce(b, min); });  // two read the same
  expect(c == std::vector<float>(40, n) && d == a && b == std::vector<float>(40, 7.0f), "inputs may be read twice");
  // Operations that are not packed are at work at once: the others must not touch what they use, whichever comes first.
  const auto mixed = [&](auto&& f) {
    const std::string what = refusal(comm, f);
    expect(what.find("overlaps in memory with") != std::string::npos, "refused, not: " + what);
    expect(a == std::vector<float>(40, 1.0f), "and what is packed is not done");
    comm.barrier();
  };
  const Rank next = (comm.rank() + 1) % comm.size(), before = (comm.rank() + comm.size() - 1) % comm.size();
  mixed([&] { comm.all_reduce(a, sum), comm.send_receive(a, next, c, before, 4); });
  mixed([&] { comm.send_receive(b, next, d, before, 4), comm.all_reduce(d, sum); });
  mixed([&] { comm.all_reduce(a, sum), comm.scan(a, c, sum); });
  mixed([&] { comm.scan(b, c, sum), comm.all_reduce(c, d, sum); });
  const std::string temporary = refusal(comm, [&] { comm.all_reduce(std::vector<float>(40, 1.0f), c, sum); });
  expect(temporary.find("all_reduce: in a group, buffers must outlive the call") != std::string::npos, temporary);
  std::vector<float> whole(4000, 2.0f);
  comm.group([&] {
    for (std::size_t i = 0; i < 100; ++i) comm.all_reduce(std::span(whole).subspan(i * 37 % 100 * 40, 40), sum);
  });
  expect(whole == std::vector<float>(4000, 2 * n), "neighbours in memory, in any order");
}

void order_and_again(Communicator& comm) {
  std::vector<std::uint32_t> x(6, 1), y(1, 2);
  for (int i = 0; i < 50; ++i)
    comm.group([&] {
      comm.all_reduce(x, max);
      comm.all_reduce(y, max);
    });
  expect(x == std::vector<std::uint32_t>(6, 1) && y[0] == 2, "groups one after another");
  comm.group([] {});
  bool refused = false;
  try {
    comm.group([&] { comm.group([] {}); });
  } catch (const Error& error) {
    refused = error.errc() == Errc::invalid_argument;
  }
  expect(refused, "a group in a group");
  refused = false;
  try {
    comm.group([&] {
      comm.all_reduce(x, sum);
      throw std::runtime_error("mine");
    });
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()) == "mine";
  }
  for (int what = 0; what < 4; ++what) {
    bool said = false;
    try {
      comm.group([&] {
        if (what == 0) comm.split(0);
        if (what == 1) comm.subset({0});
        if (what == 2) comm.duplicate();
        if (what == 3) comm.allocate<int>(5);
      });
    } catch (const Error& error) {
      said = error.errc() == Errc::invalid_argument && std::string(error.what()).find("cannot be part of a group") != std::string::npos;
    }
    expect(said, "what is needed at once cannot wait for the end of the group");
  }
  const Report one = comm.group([&] { comm.all_reduce(x, max); });
  expect(one.sequence > 0 && one.energy().known(), "a group of one is that one");
  const Report two = comm.group([&] { comm.all_reduce(x, max), comm.all_reduce(y, min); });
  expect(two.sequence == 0 && !two.energy().known() && two.blame().empty() && two.last_arrival == -1, "of several, what cannot be added is unknown");
  expect(refused && x == std::vector<std::uint32_t>(6, 1), "what is thrown inside ends it, and nothing is done");
  comm.all_reduce(y, sum);
  expect(y[0] == 2u * static_cast<std::uint32_t>(comm.size()), "the communicator goes on");
}

void different_sizes(Communicator& comm) {
  // As many elements, but not in the same tensors: without a check one would be added to another.
  std::vector<float> three(3), five(5);
  std::string what;
  try {
    comm.group([&] {
      comm.all_reduce(comm.rank() == 0 ? three : five, sum);
      comm.all_reduce(comm.rank() == 0 ? five : three, sum);
    });
  } catch (const Error& error) {
    what = error.what();
    expect(error.errc() == Errc::mismatch, what);
  }
  expect(what.find("rank 0 called all_reduce(float32 x a group of sizes") != std::string::npos || what.find("rank 1 called all_reduce(float32 x a group of sizes") != std::string::npos, "the error names the calls, not: " + what);
}

}  // namespace

TEST_CASE("thousands of small operations are few", "[processes]") {
  for (const int n : {1, 2, 3}) launch(n, many_small_ones);
}
TEST_CASE("thousands of small operations are few: threads") { launch(3, many_small_ones, threads); }
TEST_CASE("many small operations are staged from where they lie", "[processes]") {
  for (const int n : {1, 2, 3, 5}) launch(n, large_ones);
}
TEST_CASE("many small operations are staged from where they lie: threads") {
  for (const int n : {2, 4}) launch(n, large_ones, threads);
}
TEST_CASE("large groups of other sizes are told apart", "[processes]") { launch(2, large_different_sizes); }
TEST_CASE("a group of all kinds of operations", "[processes]") {
  for (const int n : {1, 2, 4}) launch(n, all_kinds);
}
TEST_CASE("a group of all kinds of operations: threads") {
  for (const int n : {1, 2, 5}) launch(n, all_kinds, threads);
}
TEST_CASE("groups follow each other, and fail alone") {
  for (const int n : {1, 3}) launch(n, order_and_again, threads);
}
TEST_CASE("operations of a group must not depend on each other") {
  for (const int n : {1, 3}) launch(n, dependent_ones, threads);
}
TEST_CASE("groups of other sizes are told apart", "[processes]") { launch(2, different_sizes); }
