// SPDX-License-Identifier: Apache-2.0
// Trains a byte-level language model (byte_model.hpp) by data parallelism: every rank holds the same parameters and
// computes the gradient of its slice of each batch, one all_reduce adds the slices up, and every rank takes the
// same step. All ranks draw from the same sequence of samples, so the number of ranks changes the losses by
// rounding only. At the end the ledger says what the synchronising cost. With --overlap the gradient is reduced in two
// parts, each as soon as back-propagation is done with it, and the parameters whose gradient is there take their step
// while the other part is under way. With --parameter-server gradients go to a table instead (table_training.hpp), and --compare shows
// what each way to synchronise costs and learns in the same time, while --straggler makes a worker late.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

#include "account_file.hpp"
#include "byte_model.hpp"
#include "command_line.hpp"
#include "comparison.hpp"
#include "consistency.hpp"
#include "ledger_json.hpp"
#include "progress.hpp"
#include "table_training.hpp"
#include "training.hpp"

struct Settings {
  int ranks = 2;
  Training training;
  std::string parameter_server;  // a consistency; empty: all_reduce
  bool threads = false, overlap = false, compare = false;
  std::optional<int> progress_core;
  std::vector<std::string> text_files;
  std::string json, account;
};

/// How long the caller was blocked by the reductions, how much of that for ranks that computed longer, and what the reductions
/// take when nothing is computed meanwhile. (For how long they were in flight says nothing: they are while nobody drives them.)
struct Overlap {
  double alone = 0, blocked = 0, late = 0;
  /// Of the reductions' time: what did not block the caller, who may have waited for late ranks instead.
  double least_hidden() const { return hidden(blocked); }
  double most_hidden() const { return hidden(blocked - late); }

 private:
  double hidden(double seconds) const { return alone > 0 ? 100 * std::clamp(1 - seconds / alone, 0.0, 1.0) : 0; }
};
Overlap overlap_in(const tally::Ledger& ledger, double alone) {
  Overlap overlap;
  overlap.alone = alone;
  for (const tally::LedgerRow& row : ledger.rows()) {
    if (row.operation != tally::Collective::all_reduce) continue;
    overlap.blocked += std::chrono::duration<double>(row.exposed).count();
    overlap.late += std::chrono::duration<double>(row.wait_arrival).count();
  }
  return overlap;
}
/// What the reductions of so many steps take, if nothing is computed meanwhile and all ranks come at once.
double seconds_alone(tally::Communicator& comm, Parameters& gradient, std::uint64_t steps) {
  tally::Communicator other = comm.duplicate();  // with a ledger of its own
  std::fill(gradient.all.begin(), gradient.all.end(), 0.0f);
  std::vector<double> times;
  for (int i = 0; i < 51; ++i) {
    other.barrier();
    const Clock::time_point start = Clock::now();
    tally::Operation output_part = other.async_all_reduce(gradient.output_part(), tally::sum), input_part = other.async_all_reduce(gradient.input_part(), tally::sum);
    output_part.wait();
    input_part.wait();
    times.push_back(seconds_since(start));
  }
  std::nth_element(times.begin(), times.begin() + 25, times.end());
  return times[25] * static_cast<double>(steps);
}

/// Of one training. `losses`: of all samples of each step, where all ranks took it together.
void report(const Settings& settings, const Way& way, const std::string& ledger, const std::vector<float>& losses, const std::optional<Overlap>& overlap) {
  const Training& training = settings.training;
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  if (way.courses[0].steps == 0) {
    out << "no steps, so no loss\n";
  } else if (!losses.empty()) {
    print_curve(out, losses);
    const double samples = static_cast<double>(losses.size() * training.batch);
    out << "first " << losses.front() << ", last " << losses.back() << "; " << losses.size() * training.batch << std::setprecision(1);
    out << " samples in " << way.seconds() << " s, " << std::setprecision(0) << samples / way.seconds() << " per second; ranks: " << way.courses.size() << '\n';
  }
  // Operations that are in flight together wait for the same ranks at the same time, so their waits are not to be added up.
  if (!settings.overlap && way.courses[0].steps > 0 && (losses.empty() || training.straggler > 0)) print_ways(out, training, {way});
  if (overlap) {
    out << std::setprecision(1) << "communication: " << overlap->alone * 1e3 << " ms by itself, of which " << std::setprecision(0) << overlap->least_hidden();
    if (overlap->most_hidden() - overlap->least_hidden() >= 1) out << " to " << overlap->most_hidden();
    out << " % hidden: the caller was blocked for " << std::setprecision(1) << overlap->blocked * 1e3 << " ms, up to " << overlap->late * 1e3 << " ms of it because other ranks computed longer\n";
  }
  out << '\n' << ledger << std::flush;

  if (settings.json.empty()) return;
  nlohmann::json json{{"loss_first", nullptr}, {"loss_last", nullptr}, {"steps", way.courses[0].steps}, {"ranks", way.courses.size()}, {"seconds", way.seconds()}};
  json["ledger"] = way.ledger;
  if (!settings.overlap) json["ways"] = to_json({way});
  if (overlap) json["overlap"] = {{"alone_seconds", overlap->alone}, {"blocked_seconds", overlap->blocked}, {"late_seconds", overlap->late}, {"least_hidden_percent", overlap->least_hidden()}, {"most_hidden_percent", overlap->most_hidden()}};
  if (!losses.empty()) {
    json["loss_first"] = number_or_null(losses.front());
    json["loss_last"] = number_or_null(losses.back());
  }
  write_json(json, settings.json);
}

/// Of each step, the loss of all samples.
template <class F>
std::vector<float> train_by_all_reduce(tally::Communicator& comm, bool overlap, Worker& worker, Parameters& parameters, F&& show) {
  Parameters gradient;
  if (comm.rank() == 0) initialize(parameters, worker.training().seed);
  comm.broadcast(parameters.all, 0);
  Optimizer optimizer(worker.training().rate);
  std::vector<float> losses;
  worker.begin();
  // When the time is up is for rank 0 to say, with its gradient.
  while (worker.training().seconds > 0 ? *gradient.stop == 0 : !worker.is_done()) {
    tally::Operation output_part;
    worker.compute(parameters, gradient, [&] {
      if (comm.rank() == 0 && worker.is_out_of_time()) *gradient.stop = 1;
      if (overlap) output_part = comm.async_all_reduce(gradient.output_part(), tally::sum);  // loss and stop are its last elements
    });
    optimizer.begin_step();
    if (overlap) {
      tally::Operation input_part = comm.async_all_reduce(gradient.input_part(), tally::sum);
      output_part.wait();
      optimizer.step(parameters, gradient, gradient.output_part());
      input_part.wait();
      optimizer.step(parameters, gradient, gradient.input_part());
    } else {
      comm.all_reduce(gradient.all, tally::sum);
      optimizer.step(parameters, gradient, gradient.all);
    }
    losses.push_back(*gradient.loss);
    worker.end_step();
    show();
  }
  worker.end(comm.ledger());
  return losses;
}

/// What every rank does.
void train(tally::Communicator& comm, const Settings& settings, const std::string& text) {
  std::optional<tally::ProgressThread> progress_thread;
  if (settings.progress_core) progress_thread = tally::progress_thread(*settings.progress_core);
  const bool by_table = !settings.parameter_server.empty();
  Worker worker(settings.training, text, comm.rank(), comm.size());
  Parameters parameters;
  Progress progress(settings.training);
  const auto show = [&] {
    if (comm.rank() == 0) progress.show(worker.points().size(), worker.loss());
  };
  std::vector<float> losses;
  if (by_table) train_by_table(comm, settings.parameter_server, worker, parameters, show);
  else losses = train_by_all_reduce(comm, settings.overlap, worker, parameters, show);
  std::optional<Overlap> overlap;
  if (Parameters scratch; settings.overlap && !losses.empty()) overlap = overlap_in(comm.ledger(), seconds_alone(comm, scratch, losses.size()));
  if (!settings.account.empty()) write_account_file(settings.account, by_table ? worker.account() : comm.account("world", "train"));
  const Way way = gather_way(comm, by_table ? settings.parameter_server : "all_reduce", worker, parameters);
  if (comm.rank() == 0) report(settings, way, worker.ledger_text(), losses, overlap);
}

/// Trains the same model in all ways, one after another.
void compare(tally::Communicator& comm, const Settings& settings, const std::string& text) {
  std::vector<Way> ways;
  for (const std::string name : {"all_reduce", "bsp", "ssp:0", "ssp:4", "asp"}) {
    tally::Communicator other = comm.duplicate();  // with a ledger of its own
    Worker worker(settings.training, text, comm.rank(), comm.size());
    Parameters parameters;
    if (name == "all_reduce") train_by_all_reduce(other, false, worker, parameters, [] {});
    else train_by_table(other, name, worker, parameters, [] {});
    ways.push_back(gather_way(comm, name, worker, parameters));
    if (comm.rank() == 0) std::cerr << name << ": " << worker.course().steps << " steps of rank 0 in " << std::fixed << std::setprecision(1) << worker.course().seconds << " s\n";
  }
  if (comm.rank() != 0) return;
  const Training& training = settings.training;
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  print_ways(out, training, ways);
  out << std::flush;
  if (settings.json.empty()) return;
  nlohmann::json json{{"ranks", comm.size()}, {"batch", training.batch}, {"seed", training.seed}, {"rate", training.rate}, {"straggler_milliseconds", training.straggler}, {"straggler_rank", training.straggler_rank}, {"ways", to_json(ways)}};
  write_json(json, settings.json);
}

/// One line on stderr, whatever happened.
int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Trains a byte-level language model by data parallelism and shows what the synchronising cost.", "train");
  app.add_option("--ranks", settings.ranks, "ranks to start; under a launcher such as mpirun, that decides")->check(CLI::Range(1, 32768))->capture_default_str();
  Training& training = settings.training;
  const auto* const steps = app.add_option("--steps", training.steps, "steps of the optimizer; of each worker, with a parameter server")->check(CLI::Range(0, 100000000))->capture_default_str();
  const auto* const seconds = app.add_option("--seconds", training.seconds, "train for so long, instead of --steps")->check(CLI::Range(0.001, 1e6))->excludes("--steps");
  app.add_option("--batch", training.batch, "samples per step, all ranks together")->check(CLI::Range(1, 100000000))->capture_default_str();
  app.add_option("--rate", training.rate, "of the optimizer")->check(CLI::Range(1e-6, 10.0))->capture_default_str();
  app.add_option("--seed", training.seed, "of the first parameters and the samples")->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_flag("--overlap", settings.overlap, "reduce the gradient in two parts while back-propagation goes on");
  app.add_option("--progress-core", settings.progress_core, "with a progress thread on this core; -1: on any")->option_text("CORE")->needs("--overlap");
  app.add_option("--parameter-server", settings.parameter_server, "gradients go to a table with this consistency: bsp, ssp:CLOCKS or asp")->option_text("CONSISTENCY")->excludes("--overlap");
  app.add_flag("--compare", settings.compare, "train by all_reduce, bsp, ssp:0 (which differs from bsp in that each gradient is a step of its own), ssp:4 and asp, one after another: for 10 s each, if neither --seconds nor --steps says otherwise")->excludes("--overlap")->excludes("--parameter-server");
  app.add_option("--straggler", training.straggler, "ms by which a worker is late in each step")->check(CLI::Range(0.0, 10'000.0));
  app.add_option("--straggler-rank", training.straggler_rank, "which one: a rank, last, or rotating: in each step another")->capture_default_str()->needs("--straggler");
  app.add_option("--text", settings.text_files, "what to learn; without it, the library's own headers")->option_text("FILE...");
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  app.add_option("--account", settings.account, "each rank writes its account there, for tally_report")->option_text("DIR")->excludes("--compare");
  return run_program(app, argc, argv, [&] {
    const tally::JobInfo job = tally::job_info();
    if (!settings.parameter_server.empty()) consistency_of("--parameter-server", settings.parameter_server);
    training.expect_straggler(job.launcher.empty() ? settings.ranks : job.size);
    if (settings.compare && steps->count() + seconds->count() == 0) training.seconds = 10;
    const std::string text = read_text(settings.text_files);
    if (!settings.json.empty()) expect_writable(settings.json);
    if (!settings.account.empty()) expect_account_folder(settings.account);
    on_all_ranks(settings.ranks, settings.threads, [&](tally::Communicator& comm) { settings.compare ? compare(comm, settings, text) : train(comm, settings, text); });
  });
}
