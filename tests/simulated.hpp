// SPDX-License-Identifier: Apache-2.0
// What tests of the simulated transport share: engines on a simulated network, calls made by hand, what their results
// have to be, and what every report has to keep.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <tally/choose.hpp>
#include <tally/engine.hpp>
#include <tally/transport/simulated.hpp>

namespace simulated {

using namespace tally;
using namespace std::chrono_literals;

constexpr std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 32);
}
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(mix(seed)) {}
  std::uint64_t below(std::uint64_t limit) { return (mix(state_ += 0x9e3779b97f4a7c15u) >> 11) % limit; }
  bool once_in(std::uint64_t n) { return below(n) == 0; }
  double uniform() { return static_cast<double>(below(std::uint64_t{1} << 32)) / 4294967296.0; }
  template <class T>
  const T& one_of(const std::vector<T>& list) { return list[below(list.size())]; }

 private:
  std::uint64_t state_;
};

inline void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

/// Each rank's program on an engine of its own.
template <class T = SimulatedTransport, class F, class... More>
void run(SimulatedNetwork& network, F&& body, More&... more) {
  network.run([&](Rank r) {
    Engine<T> engine(std::make_unique<T>(network, r, more...), network.clock(r), ModelMeter{});
    body(engine);
  });
}

/// Buffers and the call for one rank's part of an operation on 32-bit integers, and what must come of it.
struct Work {
  Collective operation{};
  AlgorithmRef algorithm;
  int n = 1, group = 1;
  Rank me = 0, root = 0;
  std::size_t count = 0;
  bool in_place = false;
  std::uint64_t salt = 0;
  nanoseconds timeout = 60s;
  std::vector<std::int32_t> in, out;

  std::int32_t value(Rank r, std::size_t i) const { return static_cast<std::int32_t>(mix(salt + static_cast<std::uint64_t>(r) * 0x10001 + i * 0x100000001u) % 2001) - 1000; }

  Call call() {
    Call c;
    c.layout = {operation, me, n, root, operation == Collective::barrier ? 4 : count, in_place, group, nullptr};
    in.resize(c.layout.input_count());
    out.resize(c.layout.output_count());
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = value(me, i);
    const Placement placement = c.layout.placement();
    if (operation == Collective::broadcast && me == root)
      for (std::size_t i = 0; i < count; ++i) out[i] = value(root, i);
    std::int32_t *from = in.data(), *to = out.data();
    if (in_place) {
      std::vector<std::int32_t>& memory = out.size() >= in.size() ? out : in;
      if (&memory == &out) std::copy(in.begin(), in.end(), out.begin() + static_cast<std::ptrdiff_t>(placement.input_first));
      from = memory.data() + placement.input_first;
      to = memory.data() + placement.output_first;
    }
    c.algorithm = algorithm;
    c.input = reinterpret_cast<const std::byte*>(from);
    c.output = reinterpret_cast<std::byte*>(to);
    c.type = element_type<std::int32_t>();
    c.grain = sizeof(std::int32_t);
    if (reduces(operation) || operation == Collective::barrier) {
      c.fold = fold_of<std::int32_t>(sum);
      c.operator_code = detail::operator_code<Sum>();
    }
    c.timeout = timeout;
    return c;
  }
  void expect_result() const {
    const Layout layout{operation, me, n, root, count, in_place, group, nullptr};
    if (operation == Collective::barrier) return;
    const std::vector<std::int32_t>& memory = in_place && in.size() > out.size() ? in : out;
    const std::size_t first = in_place ? layout.placement().output_first : 0;
    for (std::size_t i = 0; i < layout.output_count(); ++i) {
      const std::int32_t is = memory[first + i], should = expected(i);
      if (is != should) throw std::runtime_error(std::string(name_of(operation)) + "/" + std::string(algorithm.name) + ": element " + std::to_string(i) + " is " + std::to_string(is) + ", not " + std::to_string(should));
    }
  }

 private:
  std::int32_t fold(Rank ranks, std::size_t i) const {
    std::int32_t total = 0;
    for (Rank r = 0; r < ranks; ++r) total += value(r, i);
    return total;
  }
  std::int32_t expected(std::size_t i) const {
    const std::size_t mine = static_cast<std::size_t>(me) * count;
    const Rank block = count > 0 ? static_cast<Rank>(i / count) : 0;
    switch (operation) {
      case Collective::all_reduce:
      case Collective::reduce: return fold(n, i);
      case Collective::broadcast: return value(root, i);
      case Collective::all_gather:
      case Collective::gather: return value(block, i % count);
      case Collective::reduce_scatter: return fold(n, mine + i);
      case Collective::scatter: return value(root, mine + i);
      case Collective::all_to_all: return value(block, mine + i % count);
      case Collective::scan: return fold(me + 1, i);
      case Collective::exclusive_scan: return fold(me, i);
      default: return 0;
    }
  }
};

/// What has steps and blocks of one size.
struct Choice {
  Collective operation;
  AlgorithmRef algorithm;
};
inline const std::vector<Choice>& all_choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> list;
    for (const Collective operation : all_operations)
      for (const std::string_view name : algorithms_for(operation))
        if (const AlgorithmRef ref = find_algorithm(operation, name); ref.generate && !sizes_differ(operation)) list.push_back({operation, ref});
    return list;
  }();
  return all;
}

/// The invariants of one report; blame must still be known. Returns a hash of all of it.
inline std::uint64_t expect_exact(const Report& r, Rank me) {
  const nanoseconds parts[] = {r.copy, r.reduce, r.codec, r.protocol, r.wait_arrival, r.wait_transfer, r.wait_credit, r.wait_local, r.undriven};
  nanoseconds sum_of_parts{};
  std::uint64_t hash = mix(r.bytes_sent * 31 + r.bytes_received) + r.bytes_wire;
  for (const nanoseconds part : parts) {
    expect(part >= 0ns, "no part is negative");
    sum_of_parts += part;
    hash = mix(hash + static_cast<std::uint64_t>(part.count()));
  }
  expect(sum_of_parts == r.elapsed, "the parts add up to elapsed");
  expect(r.exposed >= 0ns && r.exposed <= r.elapsed, "0 <= exposed <= elapsed");
  Blame total;
  for (const Blame& b : r.blame()) {
    expect(b.rank != me, "nobody blames himself");
    total.arrival += b.arrival, total.transfer += b.transfer, total.credit += b.credit;
    hash = mix(hash + static_cast<std::uint64_t>(b.rank + 1));
    for (const nanoseconds part : {b.arrival, b.transfer, b.credit}) hash = mix(hash + static_cast<std::uint64_t>(part.count()));
  }
  expect(total.arrival == r.wait_arrival && total.transfer == r.wait_transfer && total.credit == r.wait_credit, "blame adds up to the waits");
  hash = mix(hash + static_cast<std::uint64_t>(r.exposed.count()));
  return mix(hash + static_cast<std::uint64_t>(r.last_arrival + 1) + r.sequence * 7u + (std::uint64_t{r.algorithm} << 48) + (std::uint64_t{r.flags} << 56));
}

/// A network of any kind.
inline SimulatedOptions random_options(Random& random, std::uint64_t seed) {
  SimulatedOptions o;
  o.seed = seed;
  o.slots = static_cast<int>(1 + random.below(random.once_in(3) ? 16 : 4));
  o.slot_bytes = random.one_of(std::vector<std::size_t>{16, 64, 128, 512, 4096});
  o.latency_least = nanoseconds(random.below(2'000));
  o.latency_most = o.latency_least + nanoseconds(random.below(100'000));
  o.jitter = nanoseconds(random.once_in(3) ? 0 : random.below(50'000));
  o.byte_time_most = o.byte_time_least + (random.once_in(3) ? 50.0 : 1.0) * random.uniform();
  o.loss = random.once_in(3) ? 0.2 * random.uniform() : 0;
  o.frame_cost = nanoseconds(random.below(2'000));
  o.byte_cost = random.uniform();
  o.clock_offset = 1h;
  o.clock_drift = 50;
  o.end = 1h;
  return o;
}

}  // namespace simulated
