// SPDX-License-Identifier: Apache-2.0
// Which rank slows a job, and what does it cost? One rank is late to each all_reduce, on purpose; the others wait for it, and
// draw power meanwhile. At the end all ranks' accounts are brought together, and the report names the rank: on the terminal,
// and as a page. Each rank keeps its account as JSON lines, too, which tally_report reads.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/account/html.hpp>
#include <tally/account/summary.hpp>
#include <tally/energy.hpp>
#include <tally/energy/carbon_rate.hpp>
#include <tally/energy/carbon_settings.hpp>
#include <tally/file.hpp>
#include <tally/job_account.hpp>
#include <tally/tally.hpp>

#include "account_file.hpp"
#include "command_line.hpp"
#include "ledger_json.hpp"

struct Settings {
  int ranks = 8, late = 5;
  std::uint64_t steps = 200;
  double by = 5;  // milliseconds
  std::size_t elements = std::size_t{1} << 14;
  bool threads = false;
  std::string out = "energy-report", json;
};

[[noreturn]] void refuse(const std::string& text) { throw tally::Error(tally::Errc::invalid_argument, text); }

/// What every rank does all the time.
void work(tally::Communicator& comm, const Settings& settings) {
  std::vector<float> gradient(settings.elements);
  const std::chrono::duration<double, std::milli> late(comm.rank() == settings.late ? settings.by : 0);
  comm.barrier();
  for (std::uint64_t step = 0; step < settings.steps; ++step) {
    std::fill(gradient.begin(), gradient.end(), 1.0f);
    std::this_thread::sleep_for(late);  // it computes longer, say
    comm.all_reduce(gradient, tally::sum);
    if (gradient.back() != static_cast<float>(comm.size())) throw std::runtime_error("the sum is wrong");
  }
}

nlohmann::json to_json(const tally::JobAccount& job, const tally::Verdict& verdict, const std::string& page) {
  nlohmann::json stragglers = nlohmann::json::array();
  for (const tally::Straggler& each : job.stragglers)
    stragglers.push_back({{"rank", each.rank}, {"caused_seconds", in_seconds(each.caused)}, {"passed_on_seconds", in_seconds(each.passed_on)}, {"share", each.share}, {"joules", to_json(each.energy)}});
  return {{"finding", std::string(name_of(verdict.finding))},
          {"ranks", verdict.ranks},
          {"headline", verdict.headline},
          {"detail", verdict.detail},
          {"seconds", in_seconds(job.elapsed)},
          {"energy", to_json(job.energy.gross)},
          {"stragglers", stragglers},
          {"page", page}};
}

/// What every rank does, and what comes of it.
void run(tally::Communicator& comm, const Settings& settings) {
  if (settings.late >= comm.size()) refuse("--late " + std::to_string(settings.late) + ": there are " + std::to_string(comm.size()) + " ranks, from 0 on");
  work(comm, settings);
  comm.ledger().wait_for_energy();  // until the meters' last window is closed; without meters at once
  const tally::Account mine = comm.account("world", "energy");
  write_account_file(settings.out, mine);
  const std::vector<tally::Account> all = tally::gather_accounts(comm, mine);
  if (comm.rank() != 0) return;

  const tally::JobAccount job = tally::job_of(all);
  const std::string page = settings.out + "/report.html";
  std::ostringstream html;
  tally::write_html(html, job, all);
  tally::write_file_atomically(page, html.str());
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  tally::write_summary(out, job, all);
  out << "\nThe page: " << page << "\nOther forms of it, e.g. a trace: tally_report --format perfetto -o trace.json " << settings.out << "/accounts-rank*.jsonl" << std::endl;
  if (!settings.json.empty()) write_json(to_json(job, tally::verdict_of(job, all), page), settings.json);
}

/// One line on stderr, whatever happened.
int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Makes one rank late, and lets the job's account find out which, and what it cost.", "energy");
  app.add_option("--ranks", settings.ranks, "ranks to start; under a launcher such as mpirun, that decides")->check(CLI::Range(2, 1024))->capture_default_str();
  app.add_option("--steps", settings.steps, "all_reduce calls")->check(CLI::Range(1, 100000000))->capture_default_str();
  app.add_option("--late", settings.late, "the rank that is late to each")->check(CLI::Range(0, 1023))->capture_default_str();
  app.add_option("--by", settings.by, "by so many milliseconds")->check(CLI::Range(0.0, 10000.0))->capture_default_str();
  app.add_option("--elements", settings.elements, "floats that each adds up")->check(CLI::Range(1, 1 << 28))->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_option("--out", settings.out, "folder for the page and the ranks' accounts")->capture_default_str();
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  return run_program(app, argc, argv, [&] {
    if (tally::job_info().launcher.empty() && settings.late >= settings.ranks) refuse("--late " + std::to_string(settings.late) + ": there are " + std::to_string(settings.ranks) + " ranks, from 0 on");
    if (!(settings.by >= 0)) refuse("--by is no number of milliseconds");
    expect_account_folder(settings.out);
    if (!settings.json.empty()) expect_writable(settings.json);
    tally::Options options;
    options.meters = tally::host_meters();
    options.carbon = tally::carbon_rate(tally::carbon_settings_of_environment());
    on_all_ranks(settings.ranks, settings.threads, [&](tally::Communicator& comm) { run(comm, settings); }, options);
  });
}
