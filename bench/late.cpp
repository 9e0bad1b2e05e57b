// SPDX-License-Identifier: Apache-2.0
// What waiting costs: rank 1 comes late to every call, and this measures the processor time that rank 0 spends on waiting
// for it, and how much later than rank 1 it leaves the call. One row per waiting policy and lateness; policies take turns. Then
// what the one that saves most saves of what the one that spins costs.
#include <sys/mman.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>
#include <tally/tally.hpp>
#include <vector>

#include "arguments.hpp"
#include "measure.hpp"

namespace {

double thread_cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

constexpr std::size_t most_calls = 1 << 20;
/// Of each call, as rank 0 saw it.
struct Samples {
  std::size_t count = 0;
  double cpu_us[most_calls], added_us[most_calls];
};
/// In memory that the ranks' processes share with this one.
class SharedSamples {
 public:
  SharedSamples() : memory_(::mmap(nullptr, sizeof(Samples), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  SharedSamples(const SharedSamples&) = delete;
  SharedSamples& operator=(const SharedSamples&) = delete;
  ~SharedSamples() { ::munmap(memory_, sizeof(Samples)); }
  Samples& operator*() const { return *static_cast<Samples*>(memory_); }

 private:
  void* memory_;
};

/// Of rank 0, per call.
struct Row {
  std::size_t calls = 0;
  double cpu_us = 0, cpu_mean_us = 0, cpu_share = 0;  // of the lateness
  double added_us = 0, added_p99_us = 0;              // between the late rank's call and the end of the other's
};

void measure(tally::Communicator& comm, double late_ms, int times, Samples& samples) {
  for (int i = -3; i < times; ++i) {  // a few for the waiting ladder to learn from
    std::array<double, 2> posted{}, left{};  // each rank fills its own; the sums below tell both
    comm.barrier();
    if (comm.rank() == 1) {
      timespec nap{static_cast<time_t>(late_ms / 1000), static_cast<long>((late_ms - 1000 * static_cast<double>(static_cast<int>(late_ms / 1000))) * 1e6)};
      nanosleep(&nap, nullptr);
    }
    float value = 1;
    const double cpu_before = thread_cpu_seconds();
    posted[static_cast<std::size_t>(comm.rank())] = bench::seconds_now();
    comm.all_reduce(std::span(&value, 1), tally::sum);
    left[static_cast<std::size_t>(comm.rank())] = bench::seconds_now();
    const double spent = thread_cpu_seconds() - cpu_before;
    comm.all_reduce(posted, tally::sum);
    comm.all_reduce(left, tally::sum);
    if (i < 0 || comm.rank() != 0 || samples.count == most_calls) continue;
    samples.cpu_us[samples.count] = spent * 1e6;
    samples.added_us[samples.count++] = (left[0] - posted[1]) * 1e6;
  }
}
Row row_of(const Samples& samples, double late_ms) {
  const std::vector<double> cpu(samples.cpu_us, samples.cpu_us + samples.count), added(samples.added_us, samples.added_us + samples.count);
  Row row;
  row.calls = samples.count;
  row.cpu_us = bench::median(cpu);
  for (const double us : cpu) row.cpu_mean_us += us / static_cast<double>(cpu.size());
  row.cpu_share = row.cpu_us / (late_ms * 1000);
  row.added_us = bench::median(added);
  row.added_p99_us = bench::quantile(added, 0.99);
  return row;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures what it costs one rank of two to wait for the other, which comes late to every call."};
  int times = 200, turns = 4;
  std::vector<double> lates{1, 5, 10, 100};
  std::string json;
  app.add_option("--times", times, "calls per row; a tenth of them where they are 100 ms late or more")->capture_default_str()->check(CLI::Range(1, 1'000'000));
  app.add_option("--turns", turns, "in which the policies make them, by turns")->capture_default_str()->check(CLI::Range(1, 1000));
  app.add_option("--late", lates, "milliseconds that rank 1 is late by, each a row")->capture_default_str()->check(CLI::Range(0.01, 10'000.0));
  app.add_option("--json", json, "also JSON lines to this file");
  if (const auto status = bench::parse("late", app, argc, argv)) return *status;
  std::ofstream file;
  if (!json.empty()) {
    file.open(json);
    if (!file) {
      std::cerr << "late: cannot write '" << json << "'\n";
      return 2;
    }
  }
  std::cout << "# machine  " << bench::machine_line() << "\n# rank 1 comes late " << times << " times; cpu: time that rank 0's thread ran while it waited, median and mean; added: from rank 1's call to the end of rank 0's\n"
            << "# policy    late(ms)  cpu(us)  cpu(%)  mean(us)  added(us)  p99(us)\n";
  const bench::Progress progress(true);
  using tally::WaitPolicy;
  constexpr std::array policies{WaitPolicy::latency, WaitPolicy::balanced, WaitPolicy::energy};
  for (const double late : lates) {
    std::array<SharedSamples, policies.size()> samples;
    const int calls = std::max(1, late < 100 ? times : times / 10), each = (calls + turns - 1) / turns;
    for (int done = 0; done < calls; done += each)
      for (std::size_t i = 0; i < policies.size(); ++i) {
        progress.show(std::string(name_of(policies[i])) + ", " + bench::cell(late) + " ms ...");
        tally::Options options;
        options.wait = policies[i];
        const auto work = [&](tally::Communicator& comm) {
          const std::vector<int> cores = bench::allowed_cores();
          if (cores.size() > 1) bench::pin_to(cores[static_cast<std::size_t>(comm.rank())]);
          measure(comm, late, std::min(each, calls - done), *samples[i]);
        };
        try {
          tally::launch(2, work, tally::processes, options);
        } catch (const std::exception& error) {
          progress.clear();
          std::cerr << "late: " << error.what() << '\n';
          return 1;
        }
      }
    progress.clear();
    std::array<Row, policies.size()> rows;
    for (std::size_t i = 0; i < policies.size(); ++i) {
      const Row row = rows[i] = row_of(*samples[i], late);
      std::printf("%-11s %8g %8.1f %7.2f %9.1f %10.1f %8.1f\n", std::string(name_of(policies[i])).c_str(), late, row.cpu_us, 100 * row.cpu_share, row.cpu_mean_us, row.added_us, row.added_p99_us);
      if (file)
        file << nlohmann::ordered_json{{"policy", name_of(policies[i])}, {"late_ms", late}, {"calls", row.calls}, {"cpu_us", row.cpu_us}, {"cpu_mean_us", row.cpu_mean_us}, {"cpu_share", row.cpu_share}, {"added_us", row.added_us}, {"added_p99_us", row.added_p99_us}}.dump() << std::endl;
    }
    const double saved = 1 - rows[2].cpu_us / rows[0].cpu_us, saved_mean = 1 - rows[2].cpu_mean_us / rows[0].cpu_mean_us, added = rows[2].added_us - rows[0].added_us;
    std::printf("# energy against latency, late by %g ms: %.1f %% less time on the core by medians, %.1f %% by means; %.1f us later\n", late, 100 * saved, 100 * saved_mean, added);
    std::fflush(stdout);
    if (file) file << nlohmann::ordered_json{{"compared", "energy with latency"}, {"late_ms", late}, {"cpu_saved", saved}, {"cpu_saved_by_means", saved_mean}, {"added_us", added}}.dump() << std::endl;
  }
}
