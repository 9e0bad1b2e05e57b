// SPDX-License-Identifier: Apache-2.0
// What a table must do for ranks that are really there, whatever connects them. Each function is one rank's part; results are
// closed forms, or what a collective and the rule give on the spot.
#pragma once

#include <algorithm>
#include <complex>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <tally/parameter_server.hpp>
#include <tally/tally.hpp>

#include "processes.hpp"

namespace test {

using namespace tally;

template <class T>
struct Replace {  // what was folded, as it is
  T operator()(T, T pushed, const Update&) const { return pushed; }
};

/// Everybody pushes its share of many steps; with bsp every pull is known.
inline void steps_are_exact(Communicator& comm, std::size_t count, const TableOptions& options, int steps) {
  ParameterServer<std::int64_t> ps(comm, {{"a", count}, {"b", 3}}, options);
  const auto a = ps["a"], b = ps["b"];
  const int n = comm.size();
  std::vector<std::int64_t> in(count), out(count), small(3);
  for (int step = 1; step <= steps; ++step) {
    for (std::size_t i = 0; i < count; ++i) in[i] = comm.rank() + static_cast<std::int64_t>(i % 7);
    const Pulled got = a.push_pull(in, out);
    expect(got.version >= static_cast<std::uint64_t>(step) && got.clock == static_cast<std::uint64_t>(step), "push_pull is a clock");
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t should = step * (n * (n - 1) / 2 + n * static_cast<std::int64_t>(i % 7));
      if (out[i] != should) expect(false, "step " + std::to_string(step) + ": element " + std::to_string(i) + " of " + std::to_string(count) + " is " + std::to_string(out[i]) + ", not " + std::to_string(should));
    }
    b.range(1, 1).push(std::vector<std::int64_t>{5});
    b.pull(small);
    expect(small[0] == 0 && small[2] == 0 && small[1] % 5 == 0 && small[1] >= 5 * ((step - 1) * n + 1) && small[1] <= 5 * step * n, "own writes are read");
  }
  ps.close();
}

inline void rows_are_exact(Communicator& comm, const TableOptions& options) {
  ParameterServer<float> ps(comm, {{"embedding", 0, 16, 1000, 4'000'000'000}}, options);
  const auto embedding = ps.sparse("embedding");
  const int n = comm.size();
  std::vector<std::uint64_t> keys;
  for (std::uint64_t i = 0; i < 3000; ++i) keys.push_back(1000 + (i * 2'654'435'761u) % 3'999'999'000u);  // in no order
  std::vector<float> rows(keys.size() * 16);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(comm.rank() + static_cast<int>(i % 16));
  for (int step = 1; step <= 3; ++step) {
    embedding.rows(keys).push(rows);
    ps.tick();
    std::vector<float> got(rows.size(), -1);
    embedding.rows(keys).pull(got);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const float least = static_cast<float>(step * (n * (n - 1) / 2 + n * static_cast<int>(i % 16)));
      if (got[i] < least) expect(false, "row element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", at least " + std::to_string(least));
    }
    comm.barrier();
    const std::vector<std::uint64_t> absent{999'999'999 + 1'000'000};
    std::vector<float> zero(16, 1);
    embedding.rows(absent).pull(zero);
    expect(zero == std::vector<float>(16), "a row that nobody pushed is 0");
  }
  ps.close();
}

/// I2: with bsp and as(A), the result is that of all_reduce<A> and the rule, bit for bit.
template <class A, class T, class Rule>
void equals_all_reduce(Communicator& comm, std::size_t count, const Rule& rule) {
  ParameterServer<T, Rule> ps(comm, {{"w", count}}, {.consistency = bsp, .fold = FoldOrder::as<A>(), .block_bytes = 4096}, rule);
  const auto w = ps["w"];
  std::vector<T> in(count), out(count), reduced(count), mine(count, T(0));
  std::vector<Working<T>> state(count);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    for (std::size_t i = 0; i < count; ++i) in[i] = static_cast<T>(1.0f / static_cast<float>(1 + (i * 31 + static_cast<std::size_t>(comm.rank()) * 17 + step * 7) % 101) - 0.37f * static_cast<float>(comm.rank()));
    w.push_pull(in, out);
    comm.all_reduce<A>(std::span<const T>(in), std::span(reduced), sum);
    const Update how{step, static_cast<double>(comm.size()), comm.size()};
    for (std::size_t i = 0; i < count; ++i) {
      if constexpr (detail::states_of<Rule>() == 1) mine[i] = static_cast<T>(rule(static_cast<Working<T>>(mine[i]), static_cast<Working<T>>(reduced[i]), how, state[i]));
      else mine[i] = static_cast<T>(rule(static_cast<Working<T>>(mine[i]), static_cast<Working<T>>(reduced[i]), how));
    }
    expect(std::memcmp(mine.data(), out.data(), count * sizeof(T)) == 0, "as(" + std::string(A::name) + ") of " + std::to_string(count) + " elements differs from all_reduce and the rule");
  }
  ps.close();
}

/// Operations in the background, of which several are under way, and ranges of one tensor.
inline void background_is_exact(Communicator& comm, const TableOptions& options) {
  constexpr std::size_t layers = 12, size = 30'011;
  ParameterServer<std::int64_t> ps(comm, {{"model", layers * size}}, options);
  const auto model = ps["model"];
  const int n = comm.size();
  std::vector<std::int64_t> gradient(layers * size), parameters(layers * size);
  for (int step = 1; step <= 4; ++step) {
    std::vector<TableOperation> pushes;
    for (std::size_t l = layers; l-- > 0;) {  // as back-propagation has them
      std::fill_n(gradient.begin() + static_cast<std::ptrdiff_t>(l * size), size, comm.rank() + 1 + static_cast<std::int64_t>(l));
      pushes.push_back(model.range(l * size, size).async_push(std::span(gradient).subspan(l * size, size), {.priority = static_cast<int>(layers - l)}));
    }
    ps.tick();
    std::vector<TableOperation> pulls;
    for (std::size_t l = 0; l < layers; ++l) pulls.push_back(model.range(l * size, size).async_pull(std::span(parameters).subspan(l * size, size)));
    for (auto& pull : pulls) expect(pull.wait().version >= static_cast<std::uint64_t>(step), "a pull has its clock");
    for (auto& push : pushes) push.wait();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const std::int64_t should = step * (n * (n + 1) / 2 + n * static_cast<std::int64_t>(i / size));
      if (parameters[i] < should) expect(false, "layer " + std::to_string(i / size) + " has " + std::to_string(parameters[i]) + ", at least " + std::to_string(should));
    }
    comm.barrier();
  }
  ps.close();
}

/// Whatever a table does not take is refused by name, and it goes on.
inline void errors_are_named(Communicator& comm) {
  const auto refused = [](const std::string& part, auto&& f) {
    try {
      f();
    } catch (const Error& error) {
      expect(has(error.what(), part), "'" + std::string(error.what()) + "' does not say '" + part + "'");
      return;
    }
    expect(false, "nothing was refused that should say '" + part + "'");
  };
  ParameterServer<float> ps(comm, {{"w", 100}, {"rows", 0, 4, 10, 19}}, {.consistency = bsp, .fold = FoldOrder::by_rank(), .credits = 4096});
  std::vector<float> values(100), rows(8);
  const std::vector<std::uint64_t> keys{10, 20};
  refused("there is no tensor 'v'; there are 'w', 'rows'", [&] { ps["v"]; });
  refused("'rows' has rows", [&] { ps["rows"]; });
  refused("'w' is a vector", [&] { ps.sparse("w"); });
  refused("the buffer has 99 elements, expected 100", [&] { ps["w"].push(std::span(values).first(99)); });
  refused("elements 90 to 101 of 'w', which has 100", [&] { ps["w"].range(90, 11); });
  refused("key 20 is out of its range, 10 to 19", [&] { ps.sparse("rows").rows(keys).push(rows); });
  refused("a weight must be a positive number", [&] { ps["w"].push(values, {.weight = -1}); });
  ps.tick_to(3);
  refused("it cannot go back to 2", [&] { ps.tick_to(2); });
  for (int i = 0; i < 10 * comm.size() + 10; ++i) {  // of one clock, until a shard has no room
    try {
      ps["w"].push(values);
    } catch (const Error& error) {
      expect(has(error.what(), "more than its credits, 4096 bytes"), error.what());
      break;
    }
    expect(i < 10 * comm.size() + 9, "credits have no end");
  }
  ps.tick();
  ps["w"].pull(values);
  ps.close();
  refused("this table is closed", [&] { ps.tick(); });

  refused("there are two tensors 'w'", [&] { ParameterServer<float>(comm, {{"w", 1}, {"w", 2}}); });
  refused("'w' needs a count of elements", [&] { ParameterServer<float>(comm, {{"w"}}); });
  refused("fold by_rank", [&] { ParameterServer<float, WeightedAverage>(comm, {{"w", 1}}); });
  if (comm.size() > 1) {
    const auto mine = static_cast<std::size_t>(comm.rank() == 1 ? 7 : 8);
    refused("rank 0 has tensor 'w': 8 elements, rank 1 has tensor 'w': 7 elements", [&] { ParameterServer<float>(comm, {{"v", 1}, {"w", mine}}); });
  }
}

}  // namespace test
