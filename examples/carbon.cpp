// SPDX-License-Identifier: Apache-2.0
// What a job emitted: some ranks add up vectors, the ledgers say how many joules that took, and an intensity file how many grams
// of CO2 the grid emitted for each kWh meanwhile. Prints grams for the whole job and per operation, GB moved or job, which
// is its Software Carbon Intensity, and with each figure what it is worth.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <tally/carbon_files.hpp>
#include <tally/energy/carbon_settings.hpp>
#include <tally/tally.hpp>

#include "command_line.hpp"

struct Settings {
  int ranks = 2;
  std::uint64_t calls = 200;
  std::size_t elements = std::size_t{1} << 18;
  bool threads = false;
  std::string intensity, zone, at, per = "op";
  std::optional<double> pue;
};

using Seconds = std::chrono::duration<double>;

[[noreturn]] void refuse(const std::string& text) { throw tally::Error(tally::Errc::invalid_argument, text); }

/// The sample: where the build says it is, or beside this source file.
std::string sample_file() {
#ifdef TALLY_EXAMPLE_CARBON_SAMPLE
  return TALLY_EXAMPLE_CARBON_SAMPLE;
#else
  return (std::filesystem::path(__FILE__).parent_path() / "carbon_sample.json").string();
#endif
}

/// --intensity, or what TALLY_CARBON says, or the sample.
tally::CarbonAccount carbon_account(const Settings& settings) {
  tally::CarbonSettings carbon = tally::carbon_settings_of_environment(tally::read_intensity_file);
  if (!settings.intensity.empty()) carbon.source = tally::read_intensity_file(settings.intensity, {settings.zone, {}});
  else if (!carbon.source) carbon.source = tally::read_intensity_file(sample_file(), {settings.zone, {}});
  if (settings.pue) carbon.pue = *settings.pue;
  return tally::CarbonAccount(carbon);
}

/// This rank's joules, and those of all ranks. One model tells them all, so their errors add up.
tally::Quantity joules_of_job(tally::Communicator& comm) {
  tally::Quantity mine{0, 0, 0, 0, tally::Provenance::measured};
  for (const tally::LedgerRow& row : comm.ledger().rows()) mine = mine + comm.ledger().energy(row);
  std::array<double, 4> sums{mine.value, mine.sigma, mine.lower, mine.upper};
  std::array<int, 1> least{static_cast<int>(mine.provenance)}, worst{static_cast<int>(mine.split)};
  comm.all_reduce(sums, tally::sum);
  comm.all_reduce(least, tally::min);
  comm.all_reduce(worst, tally::max);
  const auto provenance = static_cast<tally::Provenance>(least[0]);
  if (provenance == tally::Provenance::none) return {};
  return {sums[0], sums[1], sums[2], sums[3], provenance, static_cast<tally::Split>(worst[0])};
}

void print_caveats(tally::Caveats caveats) {
  for (std::size_t bit = 0; bit < tally::caveat_count; ++bit)
    if (const tally::Caveat caveat{1u << bit}; has(caveats, caveat)) std::cout << "  " << name_of(caveat) << ": " << meaning_of(caveat) << '\n';
}

/// What every rank does.
void run(tally::Communicator& comm, const Settings& settings, const tally::CarbonAccount& account, const std::optional<tally::CarbonTime>& at) {
  std::vector<float> data(settings.elements);
  comm.barrier();
  const auto start = std::chrono::steady_clock::now();
  for (std::uint64_t i = 0; i < settings.calls; ++i) {
    std::fill(data.begin(), data.end(), 1.0f);
    comm.all_reduce(data, tally::sum);
    if (data.back() != static_cast<float>(comm.size())) throw std::runtime_error("the sum is wrong");
  }
  const tally::nanoseconds elapsed = std::chrono::steady_clock::now() - start;

  std::uint64_t operations = 0;
  std::array<std::uint64_t, 1> bytes{};
  for (const tally::LedgerRow& row : comm.ledger().rows()) operations += row.calls, bytes[0] += row.bytes_sent;
  const tally::Quantity joules = joules_of_job(comm);
  comm.all_reduce(bytes, tally::sum);
  if (comm.rank() != 0) return;

  const tally::CarbonTime begin = at ? *at : std::chrono::time_point_cast<tally::nanoseconds>(std::chrono::system_clock::now()) - elapsed;
  const tally::Carbon carbon = account.of(joules, begin, begin + elapsed);
  const double gigabytes = static_cast<double>(bytes[0]) / 1e9;
  const auto [unit, units] = settings.per == "op"   ? std::pair(tally::FunctionalUnit::operation, static_cast<double>(operations))
                             : settings.per == "gb" ? std::pair(tally::FunctionalUnit::gigabyte_moved, gigabytes)
                                                    : std::pair(tally::FunctionalUnit::job, 1.0);
  std::cout << std::setprecision(3) << operations << " operations of " << comm.size() << " ranks moved " << gigabytes << " GB (counted) in " << Seconds(elapsed).count() << " s (measured)\n";
  if (joules.known()) std::cout << "energy: " << joules.value << " +- " << joules.sigma << " J (" << name_of(joules.provenance) << ")\n";
  else std::cout << "energy: unknown (there is no meter)\n";
  const tally::CarbonIntensity intensity = account.intensity_at(begin);
  if (intensity.known()) std::cout << "grid: " << std::setprecision(4) << intensity.grams_per_kwh << " +- " << intensity.per_kwh().sigma << " g/kWh (" << name_of(intensity.per_kwh().provenance) << "; " << describe(intensity, begin) << ")\n";
  else std::cout << "grid: unknown (the figures begin later)\n";
  std::cout << "job: " << carbon << " at a PUE of " << account.settings().pue << " (as set)\n" << sci_of(carbon, unit, units) << '\n';
  print_caveats(carbon.caveats);
  if (intensity.source == sample_file()) std::cout << "  sample: the grid's figures are made up; name your own with --intensity or TALLY_CARBON\n";
  std::cout << std::flush;
}

/// One line on stderr, whatever happened.
int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Adds up vectors on some ranks and prints the joules and the grams of CO2 that took.", "carbon");
  app.add_option("--ranks", settings.ranks, "ranks to start; under a launcher such as mpirun, that decides")->check(CLI::Range(1, 32768))->capture_default_str();
  app.add_option("--calls", settings.calls, "all_reduce calls")->check(CLI::Range(1, 100000000))->capture_default_str();
  app.add_option("--elements", settings.elements, "floats that each adds up")->check(CLI::Range(1, 1 << 28))->capture_default_str();
  app.add_flag("--threads", settings.threads, "make the ranks threads instead of processes");
  app.add_option("--intensity", settings.intensity, "g/kWh of the grid: JSON of Electricity Maps or WattTime, or CSV; without it, what TALLY_CARBON says, or a sample whose figures are made up")->option_text("FILE");
  app.add_option("--zone", settings.zone, "the zone to take out of the file, if it has several")->needs("--intensity");
  app.add_option("--pue", settings.pue, "power of the building over that of its computers, 1 to 10; without it, TALLY_PUE or 1");
  app.add_option("--per", settings.per, "unit of the software carbon intensity: op, gb (moved), job")->check(CLI::IsMember({"op", "gb", "job"}))->capture_default_str();
  app.add_option("--at", settings.at, "account as if the job had run then, e.g. 2024-01-15T13:00:00Z; without it, now")->option_text("TIME");
  return run_program(app, argc, argv, [&] {
    const tally::CarbonAccount account = carbon_account(settings);
    std::optional<tally::CarbonTime> at;
    if (!settings.at.empty() && !(at = tally::parse_timestamp(settings.at))) refuse("--at '" + settings.at + "' is no time such as 2024-01-15T13:00:00Z, with Z or an offset such as +01:00");
    on_all_ranks(settings.ranks, settings.threads, [&](tally::Communicator& comm) { run(comm, settings, account, at); });
  });
}
