// SPDX-License-Identifier: Apache-2.0
// How much of a reduction is hidden behind as much computing, by who drives it meanwhile; what a group of small tensors
// costs beside one of the same bytes; and how many small floats are summed in the time of as many float32.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <tally/tally.hpp>
#include <vector>

#include "measure.hpp"

namespace {

struct Settings {
  int ranks = 2, rounds = 21, progress_core = -1;
  std::size_t bytes = std::size_t{16} << 20, tensors = 10'000, tensor = 256;
  std::string json;
};

/// Work that touches no memory, in slices of about 20 us.
class Computing {
 public:
  Computing() {
    for (std::uint64_t steps = 1000;; steps *= 2) {
      const double begin = bench::seconds_now();
      run(steps);
      if (const double took = bench::seconds_now() - begin; took > 1e-3) {
        slice_ = static_cast<std::uint64_t>(static_cast<double>(steps) * 20e-6 / took);
        return;
      }
    }
  }
  template <class Between>
  void compute(double seconds, Between&& between) {
    for (int slices = static_cast<int>(std::ceil(seconds / 20e-6)); slices > 0; --slices) {
      run(slice_);
      between();
    }
  }

 private:
  void run(std::uint64_t steps) {
    for (; steps > 0; --steps) state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    asm volatile("" : : "r"(state_));
  }
  std::uint64_t state_ = 1, slice_ = 1;
};

class Measurement {
 public:
  Measurement(tally::Communicator& comm, const Settings& settings, std::ostream* json) : comm_(comm), control_(comm.duplicate()), s_(settings), json_(json) {}

  void run() {
    const std::vector<int> cores = bench::allowed_cores();
    if (cores.size() >= static_cast<std::size_t>(comm_.size())) bench::pin_to(cores[static_cast<std::size_t>(comm_.rank())]);
    std::vector<float> data(s_.bytes / sizeof(float), 1.0f);
    const double alone = median([&] { comm_.async_all_reduce(data, tally::sum).wait(); });
    say("alone", {{"seconds", alone}}, "reduction alone %.0f us; as much computing; time of both beyond the computing, of the slowest rank, median of %d\n", alone * 1e6, s_.rounds);
    overlapped("nobody drives it", data, alone, [](tally::Operation&) {});
    overlapped("test() every 20 us", data, alone, [](tally::Operation& op) { op.test(); });
    {
      std::optional<tally::ProgressThread> thread;
      try {
        thread = tally::progress_thread(s_.progress_core < 0 ? -1 : s_.progress_core + comm_.rank());
      } catch (const tally::Error& error) {
        if (comm_.rank() == 0) std::cerr << "overlap: " << error.what() << '\n';
      }
      if (thread) overlapped("progress thread", data, alone, [](tally::Operation&) {});
    }
    groups();
    small_floats();
  }

 private:
  /// Median over rounds of the slowest rank's seconds.
  template <class F>
  double median(F&& f) {
    std::vector<double> times;
    for (int i = -2; i < s_.rounds; ++i) {
      control_.barrier();
      const double begin = bench::seconds_now();
      f();
      double took = bench::seconds_now() - begin;
      control_.all_reduce(std::span(&took, 1), tally::max);
      if (i >= 0) times.push_back(took);
    }
    return bench::quantile(times, 0.5);
  }
  void overlapped(const char* who, std::vector<float>& data, double alone, void (*between)(tally::Operation&)) {
    const double computing = median([&] { computing_.compute(alone, [] {}); });
    const double both = median([&] {
      tally::Operation op = comm_.async_all_reduce(data, tally::sum);
      computing_.compute(alone, [&] { between(op); });
      op.wait();
    });
    const double hidden = 100 * (1 - (both - computing) / alone);
    say(who, {{"computing_seconds", computing}, {"both_seconds", both}, {"hidden_percent", hidden}}, "  %-20s computing %7.0f us, both %7.0f us: %4.0f %% hidden\n", who, computing * 1e6, both * 1e6, hidden);
  }
  void groups() {
    std::vector<std::vector<float>> tensors(s_.tensors, std::vector<float>(s_.tensor, 1.0f));
    std::vector<float> one(s_.tensors * s_.tensor, 1.0f);
    const double together = median([&] { comm_.all_reduce(one, tally::sum); });
    const double group = median([&] { comm_.group([&] { for (auto& t : tensors) comm_.all_reduce(t, tally::sum); }); });
    const double each = median([&] { for (auto& t : tensors) comm_.all_reduce(t, tally::sum); });
    say("group", {{"one_seconds", together}, {"group_seconds", group}, {"each_seconds", each}}, "%zu tensors of %zu floats: as one %.0f us, in a group %.0f us (%.2f times that), one by one %.0f us (%.2f)\n", s_.tensors, s_.tensor, together * 1e6, group * 1e6, group / together, each * 1e6,
        each / together);
  }
  void small_floats() {
    constexpr std::size_t count = std::size_t{32} << 20;
    const double wide = sum_of<float>(count);
    const double bf16 = sum_of<tally::bf16>(count), f16 = sum_of<tally::f16>(count), e4m3 = sum_of<tally::fp8_e4m3>(count), e5m2 = sum_of<tally::fp8_e5m2>(count);
    say("small floats", {{"float32_seconds", wide}, {"bf16_seconds", bf16}, {"f16_seconds", f16}, {"e4m3_seconds", e4m3}, {"e5m2_seconds", e5m2}},
        "all_reduce of %zu Mi elements: float32 %.1f ms; elements per second beside float32: bf16 %.2f, f16 %.2f, fp8_e4m3 %.2f, fp8_e5m2 %.2f\n", count >> 20, wide * 1e3, wide / bf16, wide / f16, wide / e4m3, wide / e5m2);
  }
  template <class T>
  double sum_of(std::size_t count) {
    std::vector<T> data(count);
    return median([&] { comm_.all_reduce(data, tally::sum); });
  }
  template <class... Args>
  void say(const char* what, nlohmann::ordered_json values, const char* format, Args... args) {
    if (comm_.rank() != 0) return;
    std::printf(format, args...);
    std::fflush(stdout);
    values["what"] = what;
    if (json_) *json_ << values.dump() << std::endl;
  }

  tally::Communicator& comm_;
  tally::Communicator control_;
  const Settings& s_;
  std::ostream* json_;
  Computing computing_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures overlap of reductions with computing, groups of small tensors, and small floats."};
  Settings s;
  app.add_option("-n,--ranks", s.ranks, "ranks, as processes")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--bytes", s.bytes, "of the reduction that is overlapped")->check(CLI::Range(std::size_t{4}, std::size_t{1} << 32))->capture_default_str();
  app.add_option("--rounds", s.rounds, "of each measurement")->check(CLI::Range(1, 100'000))->capture_default_str();
  app.add_option("--progress-core", s.progress_core, "rank r's progress thread on this core + r; -1: on any")->capture_default_str();
  app.add_option("--json", s.json, "also JSON lines to this file");
  CLI11_PARSE(app, argc, argv);
  std::ofstream file;
  if (!s.json.empty()) {
    file.open(s.json);
    if (!file) {
      std::cerr << "overlap: cannot write '" << s.json << "'\n";
      return 2;
    }
  }
  std::printf("# machine  %s\n# ranks    %d processes\n", bench::machine_line().c_str(), s.ranks);
  std::fflush(stdout);
  try {
    tally::launch(s.ranks, [&](tally::Communicator& comm) { Measurement(comm, s, file.is_open() ? &file : nullptr).run(); });
  } catch (const std::exception& error) {
    std::cerr << "overlap: " << error.what() << '\n';
    return 1;
  }
}
