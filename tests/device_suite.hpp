// SPDX-License-Identifier: Apache-2.0
// What device communicators must do on any device, emulated or real.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <tally/device_communicator.hpp>

namespace test {

using tally::Errc, tally::Error, tally::Rank;

/// Not commutative, so a fold out of order is seen.
struct Affine {
  std::uint32_t a = 1, b = 0;
  friend bool operator==(const Affine&, const Affine&) = default;
};
struct Compose {
  TALLY_DEVICE constexpr Affine operator()(Affine f, Affine g) const { return {f.a * g.a, g.a * f.b + g.b}; }
};
inline Affine value(Rank r, std::size_t i) { return {static_cast<std::uint32_t>(static_cast<std::size_t>(r) * 7919 + i * 104'729 + 3) | 1u, static_cast<std::uint32_t>(i * 31 + static_cast<std::size_t>(r))}; }
inline std::vector<Affine> input_of(Rank r, std::size_t count) {
  std::vector<Affine> values;
  for (std::size_t i = 0; i < count; ++i) values.push_back(value(r, i));
  return values;
}
/// Of element i of ranks lo..hi-1.
inline Affine folded(Rank lo, Rank hi, std::size_t i) {
  Affine all = value(lo, i);
  for (Rank r = lo + 1; r < hi; ++r) all = Compose{}(all, value(r, i));
  return all;
}
constexpr std::size_t at(Rank r) { return static_cast<std::size_t>(r); }

/// Of a rank, which is a thread: Catch's own checks are for one alone.
inline void check(bool fine, const std::string& what = {}, int line = __builtin_LINE()) {
  if (!fine) throw std::runtime_error("line " + std::to_string(line) + ": " + what);
}
inline void expect(const std::vector<Affine>& got, const std::function<Affine(std::size_t)>& expected, const std::string& what) {
  for (std::size_t i = 0; i < got.size(); ++i) check(got[i] == expected(i), what + ", element " + std::to_string(i));
}

/// Each operation once, out of place, and in place where that is another thing. make(values): a buffer of this rank's device, with span() and
/// values(). `steps`: by an algorithm of steps, whichever there is.
template <class Devices, class Make>
void every_operation(Devices& gpu, typename Devices::Stream stream, const Make& make, std::size_t count, const std::string& algorithm, bool steps) {
  const Rank me = gpu.rank(), n = gpu.size(), root = static_cast<Rank>(count) % n;
  const auto blocks = count * at(n);
  const tally::CallOptions options{.algorithm = algorithm};
  const Compose op;
  const std::string text = algorithm + " of " + std::to_string(count) + " by " + std::to_string(n) + ", rank " + std::to_string(me);
  const auto none = [](std::size_t) { return Affine{1, 0}; };
  const std::vector<Affine> mine = input_of(me, count), all = input_of(me, blocks), room(count), wide(blocks);
  // An algorithm of steps is asked for by name where it offers the operation.
  const auto by = [&](tally::Collective operation) -> tally::CallOptions {
    if (!steps) return options;
    for (const std::string_view name : tally::algorithms_for(operation))
      if (const auto found = tally::find_algorithm(operation, name); found.generate && (!tally::reduces(operation) || found.folding >= tally::Folding::ordered)) return {.algorithm = name};
    return {};
  };
  {
    const auto in = make(mine), out = make(room);
    gpu.all_reduce(in.span(), out.span(), op, stream, by(tally::Collective::all_reduce)).wait();
    expect(out.values(), [&](std::size_t i) { return folded(0, n, i); }, "all_reduce, " + text);
    expect(in.values(), [&](std::size_t i) { return mine[i]; }, "input of all_reduce, " + text);
    gpu.all_reduce(in.span(), op, stream, by(tally::Collective::all_reduce)).wait();
    expect(in.values(), [&](std::size_t i) { return folded(0, n, i); }, "all_reduce in place, " + text);
  }
  {
    const auto in = make(mine), out = make(room);
    gpu.reduce(in.span(), out.span(), op, root, stream, by(tally::Collective::reduce)).wait();
    expect(out.values(), [&](std::size_t i) { return me == root ? folded(0, n, i) : none(i); }, "reduce, " + text);
    gpu.broadcast(in.span(), root, stream, by(tally::Collective::broadcast)).wait();
    expect(in.values(), [&](std::size_t i) { return value(root, i); }, "broadcast, " + text);
  }
  {
    const auto in = make(all), out = make(room);
    gpu.reduce_scatter(in.span(), out.span(), op, stream, by(tally::Collective::reduce_scatter)).wait();
    expect(out.values(), [&](std::size_t i) { return folded(0, n, at(me) * count + i); }, "reduce_scatter, " + text);
    gpu.reduce_scatter(in.span(), in.span().subspan(at(me) * count, count), op, stream, by(tally::Collective::reduce_scatter)).wait();
    expect(in.values(), [&](std::size_t i) { return i / std::max<std::size_t>(count, 1) == at(me) ? folded(0, n, i) : all[i]; }, "reduce_scatter in place, " + text);
  }
  {
    const auto in = make(mine), out = make(wide);
    gpu.all_gather(in.span(), out.span(), stream, by(tally::Collective::all_gather)).wait();
    expect(out.values(), [&](std::size_t i) { return value(static_cast<Rank>(i / count), i % count); }, "all_gather, " + text);
    const auto gathered = make(wide);
    gpu.gather(in.span(), gathered.span(), root, stream, by(tally::Collective::gather)).wait();
    expect(gathered.values(), [&](std::size_t i) { return me == root ? value(static_cast<Rank>(i / count), i % count) : none(i); }, "gather, " + text);
  }
  {
    const auto in = make(all), out = make(room), crossed = make(wide);
    gpu.scatter(in.span(), out.span(), root, stream, by(tally::Collective::scatter)).wait();
    expect(out.values(), [&](std::size_t i) { return value(root, at(me) * count + i); }, "scatter, " + text);
    gpu.all_to_all(in.span(), crossed.span(), stream, by(tally::Collective::all_to_all)).wait();
    expect(crossed.values(), [&](std::size_t i) { return value(static_cast<Rank>(i / count), at(me) * count + i % count); }, "all_to_all, " + text);
    if (algorithm != "zero_copy") {
      gpu.all_to_all(in.span(), in.span(), stream, by(tally::Collective::all_to_all)).wait();
      expect(in.values(), [&](std::size_t i) { return value(static_cast<Rank>(i / count), at(me) * count + i % count); }, "all_to_all in place, " + text);
    }
  }
  {
    const auto in = make(mine), out = make(room);
    gpu.scan(in.span(), out.span(), op, stream, by(tally::Collective::scan)).wait();
    expect(out.values(), [&](std::size_t i) { return folded(0, me + 1, i); }, "scan, " + text);
    gpu.exclusive_scan(in.span(), in.span(), op, stream, by(tally::Collective::exclusive_scan)).wait();
    expect(in.values(), [&](std::size_t i) { return me == 0 ? mine[i] : folded(0, me, i); }, "exclusive_scan in place, " + text);
  }
  gpu.barrier(stream).wait();
}

inline void expect_error(Errc code, const std::string& part, const std::function<void()>& f, int line = __builtin_LINE()) {
  std::string got = "nothing";
  bool fine = false;
  try {
    f();
  } catch (const Error& error) {
    fine = error.errc() == code && std::string(error.what()).find(part) != std::string::npos;
    got = error.what();
  }
  check(fine, "expected '" + part + "', got '" + got + "'", line);
}
}  // namespace test
