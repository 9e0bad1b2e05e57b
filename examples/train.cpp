// SPDX-License-Identifier: Apache-2.0
// Trains a byte-level language model (byte_model.hpp) by data parallelism: every rank holds the same parameters and
// computes the gradient of its slice of each batch, one all_reduce adds the slices up, and every rank takes the
// same step. All ranks draw from the same sequence of samples, so the number of ranks changes the losses by
// rounding only. At the end the ledger says what the synchronising cost. With --overlap the gradient is reduced in two
// parts, each as soon as back-propagation is done with it, and the parameters whose gradient is there take their step
// while the other part is under way.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
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
#include "ledger_json.hpp"

struct Settings {
  int ranks = 2;
  std::uint64_t steps = 3000, batch = 512, seed = 1;
  bool threads = false, overlap = false;
  std::optional<int> progress_core;
  std::vector<std::string> text_files;
  std::string json, account;
};

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// On stderr: a bar on a terminal, ten lines elsewhere.
class Progress {
 public:
  explicit Progress(const Settings& settings) : settings_(settings) {}

  void show(std::uint64_t done, float loss) {
    const std::uint64_t steps = settings_.steps;
    if (terminal_ && done < steps && seconds_since(shown_) < 0.1) return;
    if (!terminal_ && done * 10 / steps == (done - 1) * 10 / steps) return;
    shown_ = Clock::now();
    const std::size_t width = 30, full = done * width / steps;
    std::cerr << (terminal_ ? "\r[" : "[") << std::string(full, '#') << std::string(width - full, '.') << "] step " << done << '/' << steps;
    std::cerr << std::fixed << std::setprecision(3) << "  loss " << loss << " bits/byte  " << std::setprecision(0);
    std::cerr << static_cast<double>(done * settings_.batch) / seconds_since(start_) << " samples/s" << (terminal_ ? "\x1b[K" : "\n");
    if (terminal_ && done == steps) std::cerr << '\n';
  }

 private:
  const Settings& settings_;
  const bool terminal_ = ::isatty(STDERR_FILENO) == 1;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
};

/// The mean loss of each tenth of the training, as a picture.
void print_curve(std::ostream& out, const std::vector<float>& losses) {
  const std::size_t rows = std::min<std::size_t>(10, losses.size());
  out << "loss in bits per byte, mean of the steps up to\n" << std::fixed << std::setprecision(3);
  for (std::size_t row = 0, first = 0; row < rows; ++row) {
    const std::size_t end = losses.size() * (row + 1) / rows;
    double sum = 0;
    for (std::size_t i = first; i < end; ++i) sum += losses[i];
    const double mean = sum / static_cast<double>(end - first);
    out << std::setw(8) << end << std::setw(9) << mean << "  " << std::string(mean > 0 ? static_cast<std::size_t>(std::min(mean, 10.0) * 6) : 0, '#') << '\n';
    first = end;
  }
}

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

void report(const Settings& settings, const tally::Communicator& comm, const std::vector<float>& losses, double seconds, const std::optional<Overlap>& overlap) {
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  if (losses.empty()) {
    out << "no steps, so no loss\n";
  } else {
    print_curve(out, losses);
    const double samples = static_cast<double>(losses.size() * settings.batch);
    out << "first " << losses.front() << ", last " << losses.back() << "; " << losses.size() * settings.batch << std::setprecision(1);
    out << " samples in " << seconds << " s, " << std::setprecision(0) << samples / seconds << " per second; ranks: " << comm.size() << '\n';
  }
  if (overlap) {
    out << std::setprecision(1) << "communication: " << overlap->alone * 1e3 << " ms by itself, of which " << std::setprecision(0) << overlap->least_hidden();
    if (overlap->most_hidden() - overlap->least_hidden() >= 1) out << " to " << overlap->most_hidden();
    out << " % hidden: the caller was blocked for " << std::setprecision(1) << overlap->blocked * 1e3 << " ms, up to " << overlap->late * 1e3 << " ms of it because other ranks computed longer\n";
  }
  out << '\n' << comm.ledger() << std::flush;

  if (settings.json.empty()) return;
  nlohmann::json json{{"loss_first", nullptr}, {"loss_last", nullptr}, {"steps", settings.steps}, {"ranks", comm.size()}, {"seconds", seconds}};
  json["ledger"] = to_json(comm.ledger());
  if (overlap) json["overlap"] = {{"alone_seconds", overlap->alone}, {"blocked_seconds", overlap->blocked}, {"late_seconds", overlap->late}, {"least_hidden_percent", overlap->least_hidden()}, {"most_hidden_percent", overlap->most_hidden()}};
  if (!losses.empty()) {
    json["loss_first"] = number_or_null(losses.front());
    json["loss_last"] = number_or_null(losses.back());
  }
  write_json(json, settings.json);
}

/// Where sample number i of the whole training lies: a hash, so that any rank can compute any sample.
std::size_t position_of(std::uint64_t i, std::uint64_t seed, std::size_t text_size) {
  std::uint64_t x = seed * 0xd1342543de82ef95u + i * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return context + (x ^ (x >> 31)) % (text_size - context);
}

/// What every rank does.
void train(tally::Communicator& comm, const Settings& settings, const std::string& text) {
  std::optional<tally::ProgressThread> progress_thread;
  if (settings.progress_core) progress_thread = tally::progress_thread(*settings.progress_core);
  Parameters parameters, gradient;
  if (comm.rank() == 0) initialize(parameters, settings.seed);
  comm.broadcast(parameters.all, 0);

  const auto rank = static_cast<std::uint64_t>(comm.rank()), size = static_cast<std::uint64_t>(comm.size());
  const std::uint64_t first = settings.batch * rank / size, end = settings.batch * (rank + 1) / size;  // this rank's slice of a batch
  const float weight = 1 / static_cast<float>(settings.batch);
  Learner learner;
  Optimizer optimizer;
  std::vector<std::size_t> positions;
  std::vector<float> losses;
  Progress progress(settings);
  const Clock::time_point start = Clock::now();

  for (std::uint64_t step = 0; step < settings.steps; ++step) {
    std::fill(gradient.all.begin(), gradient.all.end(), 0.0f);
    learner.use(parameters);
    tally::Operation output_part;
    const auto reduce_output_part = [&] { output_part = comm.async_all_reduce(gradient.output_part(), tally::sum); };  // the loss is its last element
    if (settings.overlap && first == end) reduce_output_part();
    for (std::uint64_t i = first; i < end;) {
      for (positions.clear(); i < end && positions.size() < chunk; ++i) positions.push_back(position_of(step * settings.batch + i, settings.seed, text.size()));
      learner.add(parameters, text, positions, weight, gradient, [&] {
        if (settings.overlap && i == end) reduce_output_part();
      });
    }
    optimizer.begin_step();
    if (settings.overlap) {
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
    if (comm.rank() == 0) progress.show(step + 1, losses.back());
  }
  const double seconds = seconds_since(start);
  std::optional<Overlap> overlap;
  if (settings.overlap && !losses.empty()) overlap = overlap_in(comm.ledger(), seconds_alone(comm, gradient, settings.steps));
  if (!settings.account.empty()) write_account_file(settings.account, comm.account("world", "train"));
  if (comm.rank() == 0) report(settings, comm, losses, seconds, overlap);
}

[[noreturn]] void refuse(const std::string& text) { throw tally::Error(tally::Errc::invalid_argument, text); }

/// The library's own headers: where the build says they are, or beside this source file.
std::vector<std::string> default_text() {
  namespace fs = std::filesystem;
#ifdef TALLY_EXAMPLE_TEXT_DIR
  const fs::path folder = TALLY_EXAMPLE_TEXT_DIR;
#else
  const fs::path folder = fs::path(__FILE__).parent_path() / ".." / "include" / "tally";
#endif
  std::vector<std::string> files;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (it->path().extension() == ".hpp") files.push_back(it->path().string());
  if (files.empty()) refuse("the library's headers are not in '" + folder.string() + "'; name a text with --text FILE");
  std::sort(files.begin(), files.end());  // a folder lists in any order, and runs are to be repeatable
  return files;
}

std::string read_text(const std::vector<std::string>& files) {
  std::string text;
  for (const std::string& file : files) {
    std::ifstream in(file, std::ios::binary);
    char block[65536];
    while (in.read(block, sizeof block), in.gcount() > 0) text.append(block, static_cast<std::size_t>(in.gcount()));
    if (!in.is_open() || in.bad()) refuse("cannot read the text '" + file + "': " + std::strerror(errno));
  }
  if (text.size() <= context) refuse("the text has " + std::to_string(text.size()) + " bytes and must have more than " + std::to_string(context));
  return text;
}

/// One line on stderr, whatever happened.
int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Trains a byte-level language model by data parallelism and shows what the synchronising cost.", "train");
  app.add_option("--ranks", settings.ranks, "ranks to start; under a launcher such as mpirun, that decides")->check(CLI::Range(1, 32768))->capture_default_str();
  app.add_option("--steps", settings.steps, "steps of the optimizer")->check(CLI::Range(0, 100000000))->capture_default_str();
  app.add_option("--batch", settings.batch, "samples per step, all ranks together")->check(CLI::Range(1, 100000000))->capture_default_str();
  app.add_option("--seed", settings.seed, "of the first parameters and the samples")->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_flag("--overlap", settings.overlap, "reduce the gradient in two parts while back-propagation goes on");
  app.add_option("--progress-core", settings.progress_core, "with a progress thread on this core; -1: on any")->option_text("CORE")->needs("--overlap");
  app.add_option("--text", settings.text_files, "what to learn; without it, the library's own headers")->option_text("FILE...");
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  app.add_option("--account", settings.account, "each rank writes its account there, for tally_report")->option_text("DIR");
  return run_program(app, argc, argv, [&] {
    const std::string text = read_text(settings.text_files.empty() ? default_text() : settings.text_files);
    if (!settings.json.empty()) expect_writable(settings.json);
    if (!settings.account.empty()) expect_account_folder(settings.account);
    on_all_ranks(settings.ranks, settings.threads, [&](tally::Communicator& comm) { train(comm, settings, text); });
  });
}
