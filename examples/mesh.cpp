// SPDX-License-Identifier: Apache-2.0
// A step of training that is parallel in three ways at once, on a mesh of ranks: tensor (all ranks of a layer add up its
// activations), pipeline (the layers' stages hand on one micro-batch after another) and data (at the end all add up their
// gradients). The computing is pretended: time passes, as with an accelerator. A stage that has nothing to do yet waits, and
// how long is what the ledger of the pipeline axis says: the bubble, beside what it is by arithmetic.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iomanip>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

#include "command_line.hpp"
#include "ledger_json.hpp"

struct Settings {
  int data = 2, tensor = 2, micro_batches = 8, steps = 5;
  double milliseconds = 2;
  std::size_t activations = 4096;
  bool threads = false;
  std::string json;
};
constexpr int stages = 2;

using Clock = std::chrono::steady_clock;
void compute(const Settings& settings) { std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(settings.milliseconds)); }

/// All micro-batches forward and then backward. What a stage makes of its input is that plus one on every tensor rank, so
/// that the result is known.
void step(tally::Mesh& mesh, const Settings& settings) {
  tally::Communicator &data = mesh.axis("data"), &tensor = mesh.axis("tensor"), &pipeline = mesh.axis("pipeline");
  const int stage = mesh.coordinate("pipeline");
  std::vector<float> activations(settings.activations), handed(settings.activations), gradients(4 * settings.activations, 0.0f);
  const auto compute_layer = [&] {
    compute(settings);
    std::fill(activations.begin(), activations.end(), 1.0f);
    tensor.all_reduce(activations, tally::sum);
    for (std::size_t i = 0; i < handed.size(); ++i) handed[i] += activations[i];
  };
  // What a stage sends goes on its way without the receiver, so that the stage can begin with the next micro-batch.
  const auto hand_over = [&](int from) {
    if (stage == from) pipeline.send(handed, 1 - from);
    else pipeline.receive(handed, from);
  };
  for (int i = 0; i < settings.micro_batches; ++i) {
    if (stage == 0) std::fill(handed.begin(), handed.end(), static_cast<float>(i)), compute_layer();
    hand_over(0);
    if (stage == 1) compute_layer();
  }
  for (int i = 0; i < settings.micro_batches; ++i) {
    if (stage == 1) std::fill(handed.begin(), handed.end(), static_cast<float>(i)), compute_layer();
    hand_over(1);
    if (stage == 0) compute_layer();
    for (float& gradient : gradients) gradient += handed[0];
  }
  // All stages take their step by one common norm, so the first to be done waits here.
  data.all_reduce(gradients, tally::sum);
  float norm = gradients[0];
  pipeline.all_reduce(std::span(&norm, 1), tally::max);

  const auto m = static_cast<float>(settings.micro_batches), width = static_cast<float>(settings.tensor);
  const float expected = static_cast<float>(settings.data) * (m * (m - 1) / 2 + 2 * m * width);
  if (norm != expected) throw std::runtime_error("the gradients add up to " + std::to_string(norm) + ", expected " + std::to_string(expected));
}

nlohmann::json to_json(const tally::Mesh& mesh) {
  nlohmann::json axes = nlohmann::json::array();
  for (const tally::MeshAxis& axis : mesh.axes()) {
    const tally::AxisTotals totals = mesh.totals(axis.name);
    axes.push_back({{"axis", axis.name},
                    {"extent", axis.extent},
                    {"calls", totals.calls},
                    {"bytes", totals.bytes},
                    {"seconds", in_seconds(totals.time)},
                    {"busy", in_seconds(totals.busy)},
                    {"idle", in_seconds(totals.idle)},
                    {"energy", to_json(totals.joules)},
                    {"idle_energy", to_json(totals.idle_joules)}});
  }
  return axes;
}

/// What every rank does.
void run(tally::Communicator& comm, const Settings& settings) {
  tally::Mesh mesh(comm, {{"data", settings.data}, {"tensor", settings.tensor}, {"pipeline", stages}});
  comm.barrier();
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < settings.steps; ++i) step(mesh, settings);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();

  // The mean of all ranks: at the beginning of a step the last stage waits, in its middle and at its end the first one.
  double idle = in_seconds(mesh.totals("pipeline").idle) / seconds;
  comm.all_reduce(std::span(&idle, 1), tally::mean);
  const double ideal = static_cast<double>(stages - 1) / (settings.micro_batches + stages - 1);
  if (comm.rank() != 0) return;
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  out << mesh << '\n' << std::fixed << std::setprecision(1) << settings.steps << " steps of " << settings.micro_batches << " micro-batches, " << 1e3 * seconds / settings.steps << " ms each\n";
  out << "pipeline bubble: " << 100 * idle << " % of the step measured, mean of all ranks; " << 100 * ideal << " % by arithmetic, (p-1)/(m+p-1)\n" << std::flush;
  if (settings.json.empty()) return;
  write_json({{"ranks", comm.size()},
              {"steps", settings.steps},
              {"micro_batches", settings.micro_batches},
              {"seconds", seconds},
              {"bubble_measured", idle},
              {"bubble_ideal", ideal},
              {"axes", to_json(mesh)}},
             settings.json);
}

/// One line on stderr, whatever happened.
int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Pretends steps of training parallel in data, tensor and pipeline (2 stages), and shows what each axis cost.", "mesh");
  app.add_option("--data", settings.data, "ranks along the data axis")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--tensor", settings.tensor, "ranks along the tensor axis")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--micro-batches", settings.micro_batches, "micro-batches per step: the more, the smaller the bubble")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--steps", settings.steps, "steps")->check(CLI::Range(1, 100000))->capture_default_str();
  app.add_option("--milliseconds", settings.milliseconds, "that a stage computes on a micro-batch, each way")->check(CLI::Range(0.0, 10000.0))->capture_default_str();
  app.add_option("--activations", settings.activations, "floats that stages hand on")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  return run_program(app, argc, argv, [&] {
    if (!settings.json.empty()) expect_writable(settings.json);
    on_all_ranks(settings.data * settings.tensor * stages, settings.threads, [&](tally::Communicator& comm) { run(comm, settings); });
  });
}
