// SPDX-License-Identifier: Apache-2.0
// Measures how many watts this machine draws anyway and how many a core adds that spins, dozes, copies or reduces, and keeps
// them for tally to divide joules by. Exit status: 0, 1 if it failed, 2 for bad arguments, 3 if there is no meter.
#include <time.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <tally/energy/calibration.hpp>
#include <tally/energy/core_loads.hpp>
#include <tally/energy/meters.hpp>
#include <tally/energy/model.hpp>
#include <tally/energy/weights_file.hpp>

#include "arguments.hpp"
#include "measure.hpp"

namespace {

using Json = nlohmann::ordered_json;

/// Joules of this process's CPU time by the model's watts: for trying the program where there is no meter.
class ModelPackage {
 public:
  explicit ModelPackage(int cores) : idle_watts_(model_.idle_watts * cores) {
    domain_.kind = tally::Domain::cpu_package;
    domain_.key = "package-0";
    domain_.source = "model";
    domain_.tick = std::chrono::milliseconds(1);
    domain_.unit_joules = 1e-9;
    domain_.accuracy = tally::ModelMeter::relative_sigma;
  }
  std::span<const tally::DomainInfo> domains() const { return {&domain_, 1}; }
  tally::SampleResult sample(std::span<tally::MeterSample> out) noexcept {
    const tally::nanoseconds now = tally::monotonic_time();
    timespec busy{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &busy);
    const double cpu = static_cast<double>(busy.tv_sec) * 1e9 + static_cast<double>(busy.tv_nsec);
    out[0] = {0, now, static_cast<tally::Nanojoules>(idle_watts_ * static_cast<double>((now - begin_).count()) + (model_.busy_watts - model_.idle_watts) * cpu), 0};
    return {1};
  }

 private:
  tally::ModelMeter model_;
  double idle_watts_;
  tally::nanoseconds begin_ = tally::monotonic_time();
  tally::DomainInfo domain_;
};

Json json_of(const tally::Calibration& c, const tally::MachineKey& machine, const std::string& meter, const std::string& file) {
  Json loads = Json::array(), steps = Json::array();
  for (std::size_t i = 1; i < tally::load_count; ++i)
    if (c.known[i]) loads.push_back({{"load", name_of(static_cast<tally::Load>(i))}, {"watts_per_core", c.watts[i]}, {"sigma", c.sigma[i]}});
  for (const auto& m : c.measurements) steps.push_back({{"load", name_of(m.step.load)}, {"cores", m.step.cores}, {"seconds", m.seconds}, {"busy_cores", m.busy_cores}, {"watts", m.watts}});
  Json weights = {{"floor_watts", c.weights.floor_watts}, {"floor_sigma", c.weights.floor_sigma}, {"relative_sigma", c.weights.relative_sigma}, {"application", c.weights.application}};
  for (std::size_t i = 0; i < tally::activity_count; ++i) weights[std::string(name_of(static_cast<tally::Activity>(i)))] = c.weights.watts[i];
  return {{"schema", "tally.calibration/1"}, {"cpu", machine.cpu}, {"governor", machine.governor}, {"idle_driver", machine.idle_driver}, {"cores", machine.cores}, {"meter", meter},
          {"written", file.empty() ? Json() : Json(file)}, {"r2", c.r2}, {"loads", loads}, {"weights", weights}, {"measurements", steps}};
}

std::string step_text(const tally::CalibrationStep& step) {
  return std::string(name_of(step.load)) + (step.cores > 0 ? " on " + std::to_string(step.cores) + (step.cores == 1 ? " core" : " cores") : std::string());
}

int run(const std::string& which, const tally::CalibrationOptions& wanted, std::string output, const std::string& json_file, bool dry) {
  tally::CoreLoads loads;
  const bool modelled = which == "model";
  tally::FoundMeters found;
  if (modelled) found.meters.emplace_back(ModelPackage(loads.cores()));
  else found = tally::find_meters();
  tally::ProcessorMeters meters(found.meters, loads);
  for (const std::string& warning : found.warnings) std::cerr << "tally_calibrate: " << warning << '\n';
  if (!meters.missing().empty()) {
    std::cerr << "tally_calibrate: " << meters.missing() << ". Nothing was measured or written.\n";
    return 3;
  }
  std::ofstream file;
  if (!json_file.empty() && json_file != "-") {
    file.open(json_file);
    if (!file) throw tally::Error(tally::Errc::invalid_argument, {"--json: cannot write '", json_file, "'"});
  }
  std::ostream& table = json_file == "-" ? std::cerr : std::cout;
  const tally::MachineKey machine = tally::machine_key();
  if (output.empty() && !modelled) output = tally::weights_path_of_environment();
  if (output.empty() && !modelled && !dry) throw tally::Error(tally::Errc::invalid_argument, "nobody says where to keep weights: give --output, or set TALLY_WEIGHTS or HOME");
  if (!output.empty()) tally::read_weights(output);  // a file that could not be added to is better known now

  const auto steps = tally::calibration_steps(loads, wanted.cores);
  const tally::nanoseconds window = tally::calibration_window(meters.tick(), wanted.at_least);
  table << "# machine  " << machine.cpu << ", " << machine.cores << " cores, governor " << machine.governor << ", idle driver " << machine.idle_driver << "\n# meters  ";
  for (const tally::AnyMeter& meter : found.meters)
    for (const tally::DomainInfo& domain : meter.domains()) table << ' ' << domain.key << " (" << domain.source << ')';
  table << "\n# " << steps.size() << " measurements of " << std::chrono::duration<double>(window).count() << " s and more; keep the machine idle meanwhile\n";
  if (dry) {
    for (const tally::CalibrationStep& step : steps) table << step_text(step) << '\n';
    table << "# would be kept in " << (output.empty() ? "no file" : output) << ", nothing was measured or written\n";
    return 0;
  }

  tally::CalibrationOptions options = wanted;
  const bench::Progress progress(true);
  options.progress = [&](const tally::CalibrationStep& step, std::size_t done, std::size_t all) { progress.show(std::to_string(done + 1) + "/" + std::to_string(all) + " " + step_text(step) + " ..."); };
  const tally::Calibration c = tally::calibrate(meters, loads, options);
  progress.clear();
  table << "# load     watts per core  +-\n";
  for (std::size_t i = 1; i < tally::load_count; ++i) {
    char line[64];
    if (c.known[i]) std::snprintf(line, sizeof line, "%-8s %16.3f  %.3f\n", std::string(name_of(static_cast<tally::Load>(i))).c_str(), c.watts[i], c.sigma[i]);
    else std::snprintf(line, sizeof line, "%-8s                -  this processor cannot\n", std::string(name_of(static_cast<tally::Load>(i))).c_str());
    table << line;
  }
  char line[128];
  std::snprintf(line, sizeof line, "# floor %.3f +- %.3f W, explained %.2f %%, error of a share %.0f %%\n", c.weights.floor_watts, c.weights.floor_sigma, 100 * c.r2, 100 * c.weights.relative_sigma);
  table << line;
  for (std::size_t bit = 0; bit < tally::caveat_count; ++bit)
    if (c.caveats >> bit & 1) table << "# caveat   " << meaning_of(static_cast<tally::Caveat>(1u << bit)) << '\n';
  if (output.empty()) {
    table << "# not kept: these are the model's own watts\n";
  } else {
    tally::save_weights(output, machine, c.weights);
    table << "# kept in " << output << '\n';
  }
  if (!json_file.empty()) (json_file == "-" ? std::cout : file) << json_of(c, machine, which, output).dump() << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures the watts of this machine's cores at rest, waiting, copying and reducing, and keeps them for tally to divide joules by. It takes some seconds, on a machine that should do nothing else."};
  std::string meter = "auto", output, json;
  double seconds = 0;
  tally::CalibrationOptions options;
  bool dry = false;
  app.add_option("--seconds", seconds, "of each measurement; at least 250 ticks of the meter, 0.25 s for most")->capture_default_str()->check(CLI::Range(0.0, 600.0));
  app.add_option("--cores", options.cores, "use at most so many at once; 0: all")->capture_default_str()->check(CLI::Range(0, 1 << 16));
  app.add_option("--output", output, "keep the weights in this file; otherwise in $TALLY_WEIGHTS, $XDG_CONFIG_HOME/tally/weights.json or ~/.config/tally/weights.json");
  app.add_option("--json", json, "also JSON to this file; '-': to stdout, and the table to stderr");
  app.add_option("--meter", meter, "auto: those that the machine has; model: none, to try this program. Nothing is then kept but in --output")->capture_default_str()->check(CLI::IsMember({"auto", "model"}));
  app.add_flag("--dry-run", dry, "say what would be measured and where it would be kept");
  if (const auto status = bench::parse("tally_calibrate", app, argc, argv)) return *status;
  try {
    if (!(seconds >= 0)) throw tally::Error(tally::Errc::invalid_argument, "--seconds is no number of seconds");
    options.at_least = tally::nanoseconds(static_cast<std::int64_t>(seconds * 1e9));
    return run(meter, options, output, json, dry);
  } catch (const std::exception& error) {
    std::cerr << "tally_calibrate: " << error.what() << '\n';
    return 1;
  }
}
