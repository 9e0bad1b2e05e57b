// SPDX-License-Identifier: Apache-2.0
// Training through a parameter server: workers push gradients, the table takes Adam's steps, and workers pull the parameters.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include <tally/algorithms/ring.hpp>
#include <tally/parameter_server.hpp>
#include <tally/tally.hpp>

#include "consistency.hpp"
#include "training.hpp"

/// The model's Adam where the parameters lie.
struct ServerAdam {
  static constexpr int states = 2;
  float rate;

  template <class W>
  auto for_update(const tally::Update& update) const {
    return [step = AdamStep(rate, static_cast<float>(update.step))](W value, W gradient, const tally::Update&, W& mean, W& square) { return step(value, gradient, mean, square); };
  }
  float operator()(float value, float gradient, const tally::Update& update, float& mean, float& square) const { return for_update<float>(update)(value, gradient, update, mean, square); }
};

/// With "bsp" all workers' gradients of a clock are folded into one step, as an all_reduce by a ring folds them. Otherwise each gradient is a
/// step of its own when it comes; as Adam's steps are as long for one worker's gradient as for the sum of all, they are shorter then. So "ssp:0"
/// differs from "bsp" by the steps alone, and from "asp" by staleness alone.
template <class F>
void train_by_table(tally::Communicator& comm, const std::string& way, Worker& worker, Parameters& parameters, F&& show) {
  const tally::Consistency consistency = consistency_of("--parameter-server", way);
  const bool whole = way == "bsp";
  const float rate = whole ? worker.training().rate : worker.training().rate / static_cast<float>(comm.size());
  tally::ParameterServer<float, ServerAdam> ps(comm, {{"parameters", parameters.all.size()}}, {.consistency = consistency, .fold = whole ? tally::FoldOrder::as<tally::Ring>() : tally::FoldOrder::arrival()}, ServerAdam(rate));
  const auto table = ps["parameters"];
  const auto pull_all = [&] {
    while (table.pull(parameters.all).version < ps.clock()) std::this_thread::yield();  // asp would not wait for the others' pushes
  };
  if (comm.rank() == 0) {
    initialize(parameters, worker.training().seed);
    ps.set("parameters", parameters.all);
  }
  comm.barrier();
  table.pull(parameters.all);
  Parameters gradient;
  comm.barrier();
  worker.begin();
  while (!worker.is_done()) {
    worker.compute(parameters, gradient, [] {});
    const tally::Pulled pulled = table.push_pull(gradient.all, parameters.all);
    worker.end_step(pulled.staleness());
    show();
  }
  worker.end(ps.ledger());

  // Others may still be at work, and wait for this one's clock.
  for (tally::Operation all_are_done = comm.async_barrier(); !all_are_done.test(); std::this_thread::sleep_for(std::chrono::milliseconds(1)))
    if (consistency.bounded) ps.tick();
  std::uint64_t clock = ps.clock();
  comm.all_reduce(std::span(&clock, 1), tally::max);
  ps.tick_to(clock);
  pull_all();
  ps.close();
}
