// SPDX-License-Identifier: Apache-2.0
// Federated averaging (McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, the
// algorithm FedAvg): each client has a part of the text, no two as much of it. In each round some clients drop out; the others pull the
// model, take some steps on their own text, and push what they got, weighted by how much text they have. The mean of that is the next
// model. A client may die for good: its shard of the table is kept twice, and the others go on.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/parameter_server.hpp>
#include <tally/tally.hpp>

#include "byte_model.hpp"
#include "command_line.hpp"
#include "ledger_json.hpp"
#include "text.hpp"

struct Settings {
  int ranks = 4, rounds = 20, steps = 20, batch = 32;
  double dropout = 0.25;
  float rate = 0.5f;
  std::uint64_t seed = 1;
  bool threads = false;
  std::vector<std::string> text_files;
  std::string kill, json;
  int killed = -1, killed_in = -1;
};

/// Of every 16 KiB of the text the last one is held out. Positions of the others are numbered, and so are those held out.
class Division {
 public:
  explicit Division(std::size_t text_size) : periods_((text_size - context) / (16 * kib)) {
    if (periods_ == 0) refuse("the text has " + std::to_string(text_size) + " bytes, of which nothing could be held out; it must have at least " + std::to_string(16 * kib + context));
  }
  std::size_t samples() const { return periods_ * 15 * kib; }
  std::size_t held_out() const { return periods_ * kib; }
  std::size_t position(std::size_t sample) const { return context + sample / (15 * kib) * 16 * kib + sample % (15 * kib); }
  std::size_t held_out_position(std::size_t sample) const { return context + sample / kib * 16 * kib + 15 * kib + sample % kib; }
  /// The first sample of a client's: each has as much more than the one before it as the first one has.
  std::size_t first(int client, int clients) const {
    const auto k = static_cast<std::size_t>(client), n = static_cast<std::size_t>(clients);
    return samples() * (k * (k + 1)) / (n * (n + 1));
  }

 private:
  static constexpr std::size_t kib = 1024;
  std::size_t periods_;
};

/// What a client tells of a round, through the table: a communicator would fail with the first client that dies. All of it the library's
/// reports of push and pull; `seconds` is from the round's begin to the next model being there.
struct Facts {
  float round = 0;  // from 1 on
  float took_part = 0, loss_sum = 0, loss_samples = 0, seconds = 0, idle = 0, late = 0, bytes = 0, joules = 0, idle_joules = 0, source = 0;
  static constexpr std::size_t count = 11;
  void add(const tally::Report& report) {
    idle += std::chrono::duration<float>(report.idle()).count();
    late += std::chrono::duration<float>(report.wait_arrival).count();
    bytes += static_cast<float>(report.bytes_sent + report.bytes_received);
    const tally::AccountEnergy energy = report.energies();
    joules += static_cast<float>(energy.gross.value);
    idle_joules += static_cast<float>(energy.idle.value);
    source = static_cast<float>(energy.gross.provenance);
  }
};
using FactValues = std::array<float, Facts::count>;
static_assert(sizeof(Facts) == sizeof(FactValues));

class Client {
 public:
  Client(const Settings& settings, const std::string& text, int rank, int size) : settings_(settings), text_(text), division_(text.size()), rank_(rank), size_(size), first_(division_.first(rank, size)), samples_(division_.first(rank + 1, size) - first_) {
    const std::size_t exam = std::min<std::size_t>(4096, division_.held_out()), stride = division_.held_out() / exam;
    const auto r = static_cast<std::size_t>(rank), n = static_cast<std::size_t>(size);
    for (std::size_t i = exam * r / n; i < exam * (r + 1) / n; ++i) examination_.push_back(division_.held_out_position(i * stride));
  }
  std::size_t samples() const { return samples_; }
  /// So many that each client sees as much of its text as any other: a pass takes who has twice the text twice as many.
  int steps() const { return std::max(1, static_cast<int>(std::lround(settings_.steps * static_cast<double>(samples_) * size_ / static_cast<double>(division_.samples())))); }
  bool takes_part(int round) const {
    const std::uint64_t lot = drawn(static_cast<std::uint64_t>(round) * static_cast<std::uint64_t>(size_) + static_cast<std::uint64_t>(rank_), settings_.seed + 0x5eed);
    return static_cast<double>(lot >> 11) * 0x1p-53 >= settings_.dropout;
  }
  /// Plain gradient descent on this client's text.
  void train(Parameters& model) {
    for (int step = 0; step < steps(); ++step) {
      std::fill(gradient_.all.begin(), gradient_.all.end(), 0.0f);
      learner_.use(model);
      for (int i = 0; i < settings_.batch;) {
        for (positions_.clear(); i < settings_.batch && positions_.size() < chunk; ++i) positions_.push_back(division_.position(first_ + drawn(drawn_++, settings_.seed + static_cast<std::uint64_t>(rank_)) % samples_));
        learner_.add(model, text_, positions_, 1 / static_cast<float>(settings_.batch), gradient_, [] {});
      }
      for (std::size_t i = 0; i < Parameters::count; ++i) model.all[i] -= settings_.rate * gradient_.all[i];
    }
  }
  /// On this client's share of what is held out.
  void examine(const Parameters& model, Facts& facts) {
    facts.loss_samples = static_cast<float>(examination_.size());
    if (!examination_.empty()) facts.loss_sum = static_cast<float>(mean_loss(learner_, model, text_, examination_, gradient_)) * facts.loss_samples;
  }

 private:
  const Settings& settings_;
  const std::string& text_;
  Division division_;
  const int rank_, size_;
  std::size_t first_, samples_;
  std::uint64_t drawn_ = 0;
  Learner learner_;
  Parameters gradient_;
  std::vector<std::size_t> positions_, examination_;
};

/// What rank 0 makes of a round's facts.
class Rounds {
 public:
  Rounds(std::FILE* out, int clients) : out_(out), clients_(clients) {
    std::fprintf(out_, "%5s %11s %8s %9s %9s %8s %8s %8s %12s\n", "round", "bits/byte", "on", "clients", "moved", "idle", "late", "joules", "idle joules");
  }
  void add(int round, const std::vector<float>& values) {
    Facts sum;
    std::string who;
    nlohmann::json clients = nlohmann::json::array();
    for (int k = 0; k < clients_; ++k) {
      FactValues own;
      std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(k) * own.size()), own.size(), own.begin());
      const Facts f = std::bit_cast<Facts>(own);
      const bool is_gone = f.round != static_cast<float>(round + 1);
      who += is_gone ? 'x' : f.took_part > 0 ? static_cast<char>('0' + k % 10) : '.';
      if (is_gone) {
        clients.push_back({{"rank", k}, {"gone", true}});
        continue;
      }
      sum.loss_sum += f.loss_sum, sum.loss_samples += f.loss_samples, sum.seconds += f.seconds, sum.idle += f.idle, sum.late += f.late, sum.bytes += f.bytes, sum.joules += f.joules, sum.idle_joules += f.idle_joules;
      sum.source = f.source;
      clients.push_back({{"rank", k}, {"gone", false}, {"took_part", f.took_part > 0}, {"seconds", f.seconds}, {"idle_share", number_or_null(f.idle / f.seconds)}, {"late_share", number_or_null(f.late / f.seconds)},
                         {"bytes", f.bytes}, {"joules", number_or_null(f.joules)}, {"idle_joules", number_or_null(f.idle_joules)}});
    }
    const float loss = sum.loss_sum / sum.loss_samples;
    const std::string source(name_of(static_cast<tally::Provenance>(static_cast<int>(sum.source))));
    std::fprintf(out_, "%5d %11.3f %8.0f %9s %5.1f MiB %7.1f%% %7.1f%% %8.4f %12.4f (%s)\n", round, static_cast<double>(loss), static_cast<double>(sum.loss_samples), who.c_str(), static_cast<double>(sum.bytes) / (1 << 20),
                 100 * static_cast<double>(sum.idle / sum.seconds), 100 * static_cast<double>(sum.late / sum.seconds), static_cast<double>(sum.joules), static_cast<double>(sum.idle_joules), source.c_str());
    std::fflush(out_);
    rounds_.push_back({{"round", round}, {"loss", number_or_null(loss)}, {"loss_samples", sum.loss_samples}, {"idle_share", number_or_null(sum.idle / sum.seconds)}, {"late_share", number_or_null(sum.late / sum.seconds)},
                       {"bytes", sum.bytes}, {"joules", number_or_null(sum.joules)}, {"idle_joules", number_or_null(sum.idle_joules)}, {"joules_source", source}, {"clients", clients}});
  }
  const nlohmann::json& json() const { return rounds_; }

 private:
  std::FILE* out_;
  int clients_;
  nlohmann::json rounds_ = nlohmann::json::array();
};

void run(tally::Communicator& comm, const Settings& settings, const std::string& text) {
  using Clock = std::chrono::steady_clock;
  const int me = comm.rank(), n = comm.size();
  Client client(settings, text, me, n);
  tally::ParameterServer<float, tally::WeightedAverage> ps(comm, {{"model", Parameters::count}, {"facts", static_cast<std::size_t>(n) * Facts::count}}, {.consistency = tally::bsp, .fold = tally::FoldOrder::by_rank(), .replicas = n > 1 ? 1 : 0});
  const auto table = ps["model"], all_facts = ps["facts"], own_facts = all_facts.range(static_cast<std::size_t>(me) * Facts::count, Facts::count);
  Parameters model;
  const std::span<float> values = std::span(model.all).first(Parameters::count);
  std::vector<float> told(all_facts.size());

  std::FILE* const out = settings.json == "-" ? stderr : stdout;
  std::vector<std::uint64_t> sizes(static_cast<std::size_t>(n));
  const std::uint64_t samples = client.samples();
  comm.gather(std::span(&samples, 1), sizes, 0);
  std::optional<Rounds> rounds;
  if (me == 0) {
    std::fprintf(out, "%d clients with", n);
    for (int k = 0; k < n; ++k) std::fprintf(out, "%s %llu", k > 0 ? "," : "", static_cast<unsigned long long>(sizes[static_cast<std::size_t>(k)]));
    std::fprintf(out, " samples\n");
    rounds.emplace(out, n);
    initialize(model, settings.seed);
  }

  for (int round = 0; round <= settings.rounds; ++round) {  // in round 0, rank 0 says what all begin with
    Facts facts;
    facts.round = static_cast<float>(round + 1);
    const bool takes_part = round == 0 ? me == 0 : client.takes_part(round);
    const Clock::time_point begin = Clock::now();
    if (round > 0 && takes_part) client.train(model);
    if (me == settings.killed && round == settings.killed_in) ::_exit(0);  // without a goodbye, as if it had been killed; but launch() ends all ranks when one has failed
    if (takes_part) facts.add(table.push(values, {.weight = round == 0 ? 1 : static_cast<double>(samples)}));
    ps.tick();
    facts.add(table.pull(values).report);
    facts.seconds = std::chrono::duration<float>(Clock::now() - begin).count();
    facts.took_part = takes_part;
    client.examine(model, facts);
    own_facts.push(std::bit_cast<FactValues>(facts));  // the mean of what one client alone pushes is that
    ps.tick();
    if (me != 0) continue;
    all_facts.pull(told);
    rounds->add(round, told);
  }
  ps.close();
  if (me != 0) return;
  std::fprintf(out, "clients: the last digit of who took part; '.' dropped out, 'x' is gone. idle, and late (the part of it that was for later clients): of the rounds' time, by the library's reports\n");
  if (settings.json.empty()) return;
  write_json({{"clients", n}, {"samples", sizes}, {"dropout", settings.dropout}, {"local_steps", settings.steps}, {"batch", settings.batch}, {"rate", settings.rate}, {"seed", settings.seed}, {"rounds", rounds->json()}}, settings.json);
}

/// Sets who is killed and when.
void parse_kill(Settings& settings) {
  if (settings.kill.empty()) return;
  int end = 0;
  const bool is_right = std::sscanf(settings.kill.c_str(), "%d:%d%n", &settings.killed, &settings.killed_in, &end) == 2 && static_cast<std::size_t>(end) == settings.kill.size();
  if (!is_right) refuse("--kill: '" + settings.kill + "' is not RANK:ROUND, such as 2:5");
  if (settings.killed < 1 || settings.killed >= settings.ranks) refuse("--kill: rank " + std::to_string(settings.killed) + " cannot be killed; of " + std::to_string(settings.ranks) + " ranks those from 1 on can (rank 0 prints)");
  if (settings.killed_in < 1 || settings.killed_in > settings.rounds) refuse("--kill: there are rounds 1 to " + std::to_string(settings.rounds) + ", not " + std::to_string(settings.killed_in));
  if (settings.threads || !tally::job_info().launcher.empty()) refuse("--kill needs ranks that are processes which this program starts: without --threads, and without a launcher");
}

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Federated averaging of a byte-level language model: clients with uneven parts of a text, of which some drop out", "federated");
  app.add_option("-n,--ranks", settings.ranks, "clients to start; under a launcher such as mpirun, that decides")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--rounds", settings.rounds, "rounds")->check(CLI::Range(1, 100000))->capture_default_str();
  app.add_option("--steps", settings.steps, "steps of a client in a round, on average: who has more text takes more")->check(CLI::Range(1, 100000))->capture_default_str();
  app.add_option("--batch", settings.batch, "samples of a step")->check(CLI::Range(1, 100000))->capture_default_str();
  app.add_option("--rate", settings.rate, "of gradient descent")->check(CLI::Range(1e-6, 100.0))->capture_default_str();
  app.add_option("--dropout", settings.dropout, "probability that a client does not take part in a round")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  app.add_option("--kill", settings.kill, "this client dies in this round, and does not come back")->option_text("RANK:ROUND");
  app.add_option("--seed", settings.seed, "of the first model, the samples and the dropouts")->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_option("--text", settings.text_files, "what to learn; without it, the library's own headers")->option_text("FILE...");
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  return run_program(app, argc, argv, [&] {
    parse_kill(settings);
    const std::string text = read_text(settings.text_files);
    if (!settings.json.empty()) expect_writable(settings.json);
    on_all_ranks(settings.ranks, settings.threads, [&](tally::Communicator& comm) { run(comm, settings, text); });
  });
}
