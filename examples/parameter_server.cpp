// SPDX-License-Identifier: Apache-2.0
// Workers that push gradients to a parameter server and pull parameters from it, one of them slow if asked to be. Servers are the
// workers themselves, or ranks of their own: those that were started with --serve, or the last --servers of those that this program
// starts. Prints what each consistency costs in waiting: who waited, for whom, and how stale the values were.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/parameter_server.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "command_line.hpp"
#include "consistency.hpp"

struct Settings {
  int ranks = 4, servers = 0, steps = 50, replicas = 0;
  bool serve = false;
  std::size_t kib = 1024;
  double compute = 2, straggler = 0;
  std::string consistency = "bsp", json;
};

void pass(double milliseconds) { std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(milliseconds)); }

/// What a worker tells of itself.
struct Line {
  int rank = -1;
  double seconds = 0, wait = 0, late = 0, stale = 0, joules = 0, idle_joules = 0;
  int waited_for = -1;
};

Line work(tally::ParameterServer<float, tally::Sgd>& ps, tally::Communicator& comm, const Settings& settings, bool is_slow) {
  // Each worker descends towards a point of its own; the mean of them all is where the parameters go.
  const auto parameters = ps["parameters"];
  std::vector<float> x(parameters.size()), gradient(x.size());
  Line line;
  line.rank = comm.rank();
  tally::nanoseconds waited{}, late{};
  const auto begin = std::chrono::steady_clock::now();
  for (int step = 0; step < settings.steps; ++step) {
    const tally::Pulled pulled = parameters.pull(x);
    waited += pulled.report.idle();
    late += pulled.report.wait_arrival;
    line.stale += static_cast<double>(pulled.staleness());
    pass(settings.compute + (is_slow ? settings.straggler : 0));
    for (std::size_t i = 0; i < x.size(); ++i) gradient[i] = x[i] - static_cast<float>(comm.rank());
    waited += parameters.push(gradient).idle();
    ps.tick();
  }
  line.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  line.wait = std::chrono::duration<double>(waited).count() / line.seconds;
  line.late = std::chrono::duration<double>(late).count() / line.seconds;
  line.stale /= settings.steps;
  for (const tally::LedgerRow& row : ps.ledger().rows())
    if (row.operation == tally::Collective::pull || row.operation == tally::Collective::push) {
      line.joules += ps.ledger().energy(row).value;
      line.idle_joules += ps.ledger().idle_energy(row).value;
    }
  const auto& peers = ps.ledger().by_peer();
  const auto worst = std::max_element(peers.begin(), peers.end(), [](const tally::Blame& a, const tally::Blame& b) { return a.arrival < b.arrival; });
  if (worst->arrival > tally::nanoseconds{0}) line.waited_for = worst->rank;
  return line;
}

void run(tally::Communicator& comm, const Settings& settings) {
  // Who serves, all ranks have to know.
  const int serves = settings.serve || comm.rank() >= comm.size() - settings.servers;
  std::vector<int> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(std::span(&serves, 1), all);
  tally::TableOptions options{.consistency = consistency_of("--consistency", settings.consistency)};
  for (int r = 0; r < comm.size(); ++r)
    if (all[static_cast<std::size_t>(r)]) options.servers.push_back(r);
  options.dedicated = !options.servers.empty();
  options.replicas = settings.replicas;
  tally::ParameterServer<float, tally::Sgd> ps(comm, {{"parameters", settings.kib * 1024 / sizeof(float)}}, options, tally::Sgd{0.1f / static_cast<float>(comm.size())});

  Line line;
  if (ps.is_worker()) line = work(ps, comm, settings, std::find(all.begin(), all.end(), 0) - all.begin() == comm.rank());
  else ps.serve();
  ps.close();

  std::vector<Line> lines(all.size());
  comm.gather(std::as_bytes(std::span(&line, 1)), std::as_writable_bytes(std::span(lines)), 0);
  if (comm.rank() != 0) return;
  nlohmann::json json = {{"consistency", settings.consistency}, {"servers", options.servers}, {"workers", nlohmann::json::array()}};
  std::printf("%s, %zu KiB, %d steps, %s\n", settings.consistency.c_str(), settings.kib, settings.steps, options.dedicated ? "servers are ranks of their own" : "every rank serves and works");
  std::printf("%6s %10s %8s %8s %12s %8s %12s %12s\n", "worker", "steps/s", "idle", "late", "waited for", "stale", "joules", "idle joules");
  for (const Line& l : lines) {
    if (l.rank < 0) continue;
    std::printf("%6d %10.1f %7.1f%% %7.1f%% %12s %8.2f %12.4f %12.4f\n", l.rank, settings.steps / l.seconds, 100 * l.wait, 100 * l.late, l.waited_for < 0 ? "-" : ("rank " + std::to_string(l.waited_for)).c_str(), l.stale, l.joules, l.idle_joules);
    const auto known = [](double value) { return std::isnan(value) ? nlohmann::json() : nlohmann::json(value); };
    json["workers"].push_back({{"rank", l.rank}, {"steps_per_second", settings.steps / l.seconds}, {"idle_share", l.wait}, {"late_share", l.late}, {"waited_for", l.waited_for < 0 ? nlohmann::json() : nlohmann::json(l.waited_for)}, {"staleness", l.stale}, {"joules", known(l.joules)}, {"idle_joules", known(l.idle_joules)}});
  }
  if (settings.json.empty()) return;
  tally::write_file_atomically(settings.json, json.dump(2) + "\n");
}

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Workers and a parameter server: what bsp, ssp and asp cost in waiting, with one worker that is slow", "parameter_server");
  app.add_option("-n,--ranks", settings.ranks, "ranks, without a launcher")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--servers", settings.servers, "so many of the last ranks serve and do not work; 0: all ranks do both")->check(CLI::Range(0, 63))->capture_default_str();
  app.add_flag("--serve", settings.serve, "this process serves and does not work (under a launcher, which starts others without it)");
  app.add_option("--consistency", settings.consistency, "bsp, ssp:CLOCKS or asp")->capture_default_str();
  app.add_option("--replicas", settings.replicas, "1: every shard is kept twice")->check(CLI::Range(0, 1))->capture_default_str();
  app.add_option("--kib", settings.kib, "KiB of parameters")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--steps", settings.steps, "of each worker")->check(CLI::Range(1, 1'000'000))->capture_default_str();
  app.add_option("--compute", settings.compute, "ms that a step takes")->check(CLI::Range(0.0, 10'000.0))->capture_default_str();
  app.add_option("--straggler", settings.straggler, "ms that the first worker's take longer")->check(CLI::Range(0.0, 10'000.0))->capture_default_str();
  app.add_option("--json", settings.json, "write the same there");
  return run_program(app, argc, argv, [&] {
    consistency_of("--consistency", settings.consistency);
    if (settings.servers >= settings.ranks) throw CLI::ValidationError("--servers", "nobody is left to work");
    on_all_ranks(settings.ranks, false, [&](tally::Communicator& comm) { run(comm, settings); });
  });
}
