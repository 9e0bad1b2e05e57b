// SPDX-License-Identifier: Apache-2.0
// How much of a reduction is hidden behind as much computing, by who drives it meanwhile and by what computes, and how much
// could be; what a group of small tensors costs beside one of the same bytes; and how many small floats are summed in the time
// of as many float32.
#include <sys/prctl.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <tally/tally.hpp>
#include <vector>

#include "arguments.hpp"
#include "measure.hpp"

namespace {

struct Settings {
  int ranks = 2, rounds = 21, progress_core = -1;
  std::size_t bytes = std::size_t{16} << 20, tensors = 10'000, tensor = 256;
  bool cpu = true, device = true, others = true;
  std::string json;
};

/// Work that touches no memory, in slices of about 20 us; or sleep, as the thread does whose GPU computes.
class Computing {
 public:
  Computing() {
    constexpr std::uint64_t steps = 200'000;
    double least = 1;  // others may have had the core meanwhile
    for (int i = 0; i < 20; ++i) {
      const double begin = bench::seconds_now();
      run(steps);
      least = std::min(least, bench::seconds_now() - begin);
    }
    slice_ = static_cast<std::uint64_t>(static_cast<double>(steps) * 20e-6 / least);
  }
  void work(double seconds, const auto& between) {
    for (int slices = static_cast<int>(std::ceil(seconds / 20e-6)); slices > 0; --slices) {
      run(slice_);
      between();
    }
  }
  /// `slice` at most at a time.
  static void sleep(double seconds, double slice, const auto& between) {
    const double begin = bench::seconds_now();
    for (double now = begin; now < begin + seconds; now = bench::seconds_now()) {
      sleep_until(std::min(begin + seconds, now + slice));
      between();
    }
  }
  static void sleep_until(double time) {
    const double whole = std::floor(time);
    const timespec until{static_cast<time_t>(whole), static_cast<long>((time - whole) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) != 0) {
    }
  }

 private:
  void run(std::uint64_t steps) {
    for (; steps > 0; --steps) state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    asm volatile("" : : "r"(state_));
  }
  std::uint64_t state_ = 1, slice_ = 1;
};

/// Who drives the reduction meanwhile.
enum class Driver { nobody, caller, thread };

class Measurement {
 public:
  Measurement(tally::Communicator& comm, const Settings& settings, std::ostream* json) : comm_(comm), control_(comm.duplicate()), s_(settings), json_(json) {}

  void run() {
    if (cores_.size() >= static_cast<std::size_t>(comm_.size())) bench::pin_to(cores_[static_cast<std::size_t>(comm_.rank())]);
    ::prctl(PR_SET_TIMERSLACK, 1000);  // else a sleep may last 50 us longer
    std::vector<float> data(s_.bytes / sizeof(float), 1.0f);
    for (int i = 0; i < 20; ++i) comm_.async_all_reduce(data, tally::sum).wait();  // memory and caches get used to it
    std::vector<double> work;
    alone_ = median([&] {
      const tally::Report report = comm_.async_all_reduce(data, tally::sum).wait();
      work.push_back(seconds(report.busy()));
    });
    work_ = bench::median(work);
    control_.all_reduce(std::span(&work_, 1), tally::max);
    work_ = std::min(work_, alone_);  // medians of different rounds
    say("alone", {{"seconds", alone_}, {"work_seconds", work_}, {"cores", cores_.size()}}, "reduction alone %.0f us, of which %.0f us are work for a core of each rank; cores: %zu\n", alone_ * 1e6, work_ * 1e6, cores_.size());
    if (s_.cpu) overlap(true, data);
    if (s_.device) overlap(false, data);
    if (!s_.others) return;
    groups();
    small_floats();
  }

 private:
  static double seconds(tally::nanoseconds time) { return std::chrono::duration<double>(time).count(); }
  /// Median over rounds of the slowest rank's seconds; of several they take turns, so that what disturbs one disturbs all.
  template <class... F>
  std::array<double, sizeof...(F)> medians(F&&... f) {
    std::array<std::vector<double>, sizeof...(F)> times;
    const auto take = [&](auto& timed, auto& of, bool counts) {
      control_.barrier();
      const double begin = bench::seconds_now();
      timed();
      double took = bench::seconds_now() - begin;
      control_.all_reduce(std::span(&took, 1), tally::max);
      if (counts) of.push_back(took);
    };
    for (int i = -2; i < s_.rounds; ++i) {
      std::size_t next = 0;
      (take(f, times[next++], i >= 0), ...);
    }
    std::array<double, sizeof...(F)> result;
    std::ranges::transform(times, result.begin(), [](const std::vector<double>& of) { return bench::median(of); });
    return result;
  }
  double median(const auto& f) { return medians(f)[0]; }
  void overlap(bool cpu, std::vector<float>& data) {
    const auto rank = static_cast<std::size_t>(comm_.rank()), ranks = static_cast<std::size_t>(comm_.size());
    const std::string kind = cpu ? "cpu" : "device";
    // At best all work, here of so many ranks per core, is shared out evenly, and nobody waits.
    const double crowd = static_cast<double>(ranks) / static_cast<double>(std::min(cores_.size(), 2 * ranks));
    const double computing_alone = alone_ * (cpu ? std::max(1.0, crowd) : 1), both_at_best = crowd * ((cpu ? alone_ : 0) + work_);
    const double limit = 100 * (1 - std::max(0.0, both_at_best - computing_alone) / alone_);
    say("limit", {{"compute", kind}, {"percent", limit}}, "as much computing, %s; limit on these cores: %.0f %% hidden\n", cpu ? "cpu: each rank's thread works" : "device: the host thread sleeps, as while a GPU computes", limit);
    for (const Driver driver : {Driver::nobody, Driver::caller, Driver::thread}) {
      std::optional<tally::ProgressThread> thread;  // on a core of its own where there are enough, else wherever it likes
      if (driver == Driver::thread) thread = tally::progress_thread(s_.progress_core >= 0 ? s_.progress_core + comm_.rank() : cores_.size() >= 2 * ranks ? cores_[ranks + rank] : -1);
      const bool tests = driver == Driver::caller;
      double length = alone_;  // of the computing: what the reduction alone took just before
      const auto compute = [&](const auto& between) { cpu ? computing_.work(length, between) : Computing::sleep(length, tests ? 20e-6 : length, between); };
      std::vector<double> blocked;
      const auto [alone, computing, both] = medians([&] {
                                                      const double begin = bench::seconds_now();
                                                      comm_.async_all_reduce(data, tally::sum).wait();
                                                      length = bench::seconds_now() - begin;
                                                    },
                                                    [&] { compute([] {}); },
                                                    [&] {
                                                      tally::Operation op = comm_.async_all_reduce(data, tally::sum);
                                                      compute([&] {
                                                        if (tests) op.test();
                                                      });
                                                      blocked.push_back(seconds(op.wait().exposed));
                                                    });
      double exposed = bench::median(blocked);
      control_.all_reduce(std::span(&exposed, 1), tally::max);
      const double hidden = 100 * (1 - (both - computing) / alone);
      const char* const who = driver == Driver::nobody ? "nobody drives it" : tests ? "test() every 20 us" : "progress thread";
      say(who, {{"compute", kind}, {"alone_seconds", alone}, {"computing_seconds", computing}, {"both_seconds", both}, {"exposed_seconds", exposed}, {"hidden_percent", hidden}},
          "  %-20s alone %7.0f us, computing %7.0f us, both %7.0f us: %4.0f %% hidden; caller blocked for %.0f us\n", who, alone * 1e6, computing * 1e6, both * 1e6, hidden, exposed * 1e6);
    }
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
  const std::vector<int> cores_ = bench::allowed_cores();  // before it is pinned to one
  double alone_ = 0, work_ = 0;                            // seconds of the reduction; and of a core, of each rank, in it
  Computing computing_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures overlap of reductions with computing, groups of small tensors, and small floats."};
  Settings s;
  app.add_option("-n,--ranks", s.ranks, "ranks, as processes")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--bytes", s.bytes, "of the reduction that is overlapped")->check(CLI::Range(std::size_t{4}, std::size_t{1} << 32))->capture_default_str();
  std::string compute = "both";
  app.add_option("--compute", compute, "by the rank's thread, by a device while that sleeps, or one after the other")->check(CLI::IsMember({"cpu", "device", "both"}))->capture_default_str();
  app.add_option("--rounds", s.rounds, "of each measurement")->check(CLI::Range(1, 100'000))->capture_default_str();
  app.add_option("--progress-core", s.progress_core, "rank r's progress thread on this core + r; -1: on a core of its own where there are enough, else on any")->capture_default_str();
  app.add_flag("!--overlap-only", s.others, "no groups and small floats");
  app.add_option("--json", s.json, "also JSON lines to this file");
  if (const auto status = bench::parse("overlap", app, argc, argv)) return *status;
  s.cpu = compute != "device";
  s.device = compute != "cpu";
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
