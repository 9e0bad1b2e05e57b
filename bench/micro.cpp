// SPDX-License-Identifier: Apache-2.0
// The parts of a call by themselves, measured by Google Benchmark: what the engine costs before any byte moves,
// planning, folding, and what accounting adds. For finding out which part became slower, not for comparing libraries.
#include <benchmark/benchmark.h>

#include <memory>
#include <sstream>
#include <tally/tally.hpp>
#include <vector>

#include "measure.hpp"

namespace {

tally::Communicator alone(bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  const auto memory = std::make_shared<tally::ThreadMemory>(tally::SlotLayout(1, options.slots));
  tally::detail::write_model(*memory, options);
  return tally::detail::make_communicator(memory, 0, options);
}

/// One turn of the engine: there is nobody to talk to.
void engine_turn(benchmark::State& state, bool accounting) {
  tally::Communicator comm = alone(accounting);
  float value = 1;
  for (auto _ : state) {
    comm.all_reduce(std::span(&value, 1), tally::sum);
    benchmark::DoNotOptimize(value);
  }
}
BENCHMARK_CAPTURE(engine_turn, timed, true);
BENCHMARK_CAPTURE(engine_turn, unaccounted, false);

/// The same turn where the transport is known when compiling, and where it is found behind a virtual call as communicators do.
void engine_alone(benchmark::State& state, bool known) {
  const auto memory = std::make_shared<tally::ThreadMemory>(tally::SlotLayout(1, tally::SlotOptions{}));
  tally::Engine<tally::SlotTransport> engine(std::make_unique<tally::SlotTransport>(memory, 0), tally::Clock::host(), tally::ModelMeter{});
  tally::AnyEngine* any = &engine;
  benchmark::DoNotOptimize(any);  // or the compiler sees through it
  float value = 1;
  tally::Call call;
  call.layout = {tally::Collective::all_reduce, 0, 1, 0, 1, true};
  call.algorithm = tally::algorithm_ref<tally::OneShot, tally::Collective::all_reduce>();
  call.input = call.output = reinterpret_cast<std::byte*>(&value);
  call.grain = sizeof value;
  call.fold = tally::fold_of<float>(tally::sum);
  call.timeout = std::chrono::seconds(1);
  for (auto _ : state) benchmark::DoNotOptimize(known ? engine.run(call) : any->run(call));
}
BENCHMARK_CAPTURE(engine_alone, transport_known, true);
BENCHMARK_CAPTURE(engine_alone, transport_behind_a_virtual_call, false);

/// Both threads call until the benchmark has enough; whether to go on travels in the data, so neither waits for more.
void two_threads(benchmark::State& state, bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  tally::launch(
      2,
      [&](tally::Communicator& comm) {
        const std::vector<int> cores = bench::allowed_cores();
        if (cores.size() >= 2) bench::pin_to(cores[static_cast<std::size_t>(comm.rank())]);
        float data[2] = {0, 0};  // the first is 1 when rank 0 ends, and its sum tells both
        const auto call = [&](float last) {
          data[0] = last;
          comm.all_reduce(std::span(data), tally::sum);
          return data[0] != 0;
        };
        if (comm.rank() == 0) {
          for (auto _ : state) call(0);
          call(1);
        } else {
          while (!call(0)) {
          }
        }
      },
      tally::threads, options);
}
BENCHMARK_CAPTURE(two_threads, timed, true)->UseRealTime();
BENCHMARK_CAPTURE(two_threads, unaccounted, false)->UseRealTime();

void plan_ring(benchmark::State& state) {
  const tally::Layout layout{tally::Collective::all_reduce, 3, 8, 0, 1024, true};
  for (auto _ : state) {
    const tally::Plan plan(tally::Ring::all_reduce(layout.shape()), layout, sizeof(float));
    benchmark::DoNotOptimize(plan.steps().data());
  }
}
BENCHMARK(plan_ring);

/// to = to + from in float, as an incoming frame is folded.
void fold(benchmark::State& state) {
  const auto bytes = static_cast<std::size_t>(state.range(0));
  std::vector<float> to(bytes / sizeof(float), 1.0f), from(bytes / sizeof(float), 0.0f);
  auto* const out = reinterpret_cast<std::byte*>(to.data());
  const auto* const in = reinterpret_cast<const std::byte*>(from.data());
  for (auto _ : state) {
    tally::detail::fold_elements<float, tally::Sum>(&tally::sum, out, out, in, bytes);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(fold)->Arg(4096)->Arg(65536);

void print_report(benchmark::State& state) {
  tally::Communicator comm = alone(true);
  float value = 1;
  const tally::Report report = comm.all_reduce(std::span(&value, 1), tally::sum);
  for (auto _ : state) {
    std::ostringstream text;
    text << report;
    benchmark::DoNotOptimize(text.str().data());
  }
}
BENCHMARK(print_report);

/// A call that waited for `range` ranks, which is more to book than one that did not wait.
void book(benchmark::State& state) {
  constexpr int ranks = 8;
  const tally::Clock& clock = tally::Clock::host();
  tally::Ledger ledger(ranks, 0, "none", tally::Clock::host(), {});
  tally::LedgerRow& row = ledger.row(tally::Collective::all_reduce, 4096, "ring");
  tally::Stopwatch watch(ranks);
  watch.start(1000);
  watch.enter(tally::State::wait_transfer, 2000);
  for (int r = 1; r <= state.range(0); ++r) watch.blame(r, tally::State::wait_transfer, 2000 + 1000 * static_cast<tally::Ticks>(r));
  tally::Report report;
  report.elapsed = tally::nanoseconds(3000);
  report.protocol = state.range(0) == 0 ? report.elapsed : tally::nanoseconds(1000);
  for (auto _ : state) {
    ++report.sequence;
    ledger.book({&row, 4096, report.sequence, 1000, &watch}, report, clock);
    benchmark::ClobberMemory();
  }
}
BENCHMARK(book)->Arg(0)->Arg(1)->Arg(7);

}  // namespace

BENCHMARK_MAIN();
