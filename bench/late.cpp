// SPDX-License-Identifier: Apache-2.0
// What waiting costs: rank 1 comes late to every call, and this measures the processor time that rank 0 spends on waiting
// for it, and how much later than rank 1 it leaves the call. One row per waiting policy and lateness.
#include <sys/resource.h>
#include <time.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>
#include <fstream>
#include <iostream>
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

struct Row {
  double cpu_us = 0, cpu_share = 0;              // of the waiting rank, per call and of the lateness
  double added_us = 0, added_p99_us = 0;         // between the late rank's call and the end of the other's
};

/// As rank 0 of two sees it.
Row measure(tally::Communicator& comm, double late_ms, int times) {
  std::vector<double> cpu, added;
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
    if (i < 0) continue;
    cpu.push_back(spent * 1e6);
    added.push_back((left[0] - posted[1]) * 1e6);
  }
  double sum = 0;
  for (const double us : cpu) sum += us;
  Row row;
  row.cpu_us = sum / static_cast<double>(cpu.size());
  row.cpu_share = row.cpu_us / (late_ms * 1000);
  row.added_us = bench::quantile(added, 0.5);
  row.added_p99_us = bench::quantile(added, 0.99);
  return row;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures what it costs one rank of two to wait for the other, which comes late to every call."};
  int times = 200;
  std::string json;
  app.add_option("--times", times, "calls per row; a tenth of them where they are 100 ms late")->capture_default_str()->check(CLI::Range(1, 1'000'000));
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
  std::cout << "# machine  " << bench::machine_line() << "\n# rank 1 comes late " << times << " times; cpu: time that rank 0's thread ran while it waited; added: from rank 1's call to the end of rank 0's\n"
            << "# policy    late(ms)  cpu(us)  cpu(%)  added(us)  p99(us)\n";
  const bench::Progress progress(true);
  for (const tally::WaitPolicy policy : {tally::WaitPolicy::latency, tally::WaitPolicy::balanced, tally::WaitPolicy::energy})
    for (const double late : {1.0, 10.0, 100.0}) {
      tally::Options options;
      options.wait = policy;
      const int calls = late < 100 ? times : std::max(1, times / 10);
      progress.show(std::string(name_of(policy)) + ", " + std::to_string(static_cast<int>(late)) + " ms ...");
      const auto work = [&](tally::Communicator& comm) {
        const std::vector<int> cores = bench::allowed_cores();
        if (cores.size() > 1) bench::pin_to(cores[static_cast<std::size_t>(comm.rank())]);
        const Row row = measure(comm, late, calls);
        if (comm.rank() != 0) return;
        progress.clear();
        std::printf("%-11s %8.0f %8.1f %7.2f %10.1f %8.1f\n", std::string(name_of(policy)).c_str(), late, row.cpu_us, 100 * row.cpu_share, row.added_us, row.added_p99_us);
        std::fflush(stdout);
        if (file)
          file << nlohmann::ordered_json{{"policy", name_of(policy)}, {"late_ms", late}, {"calls", calls}, {"cpu_us", row.cpu_us}, {"cpu_share", row.cpu_share}, {"added_us", row.added_us}, {"added_p99_us", row.added_p99_us}}.dump() << std::endl;
      };
      try {
        tally::launch(2, work, tally::processes, options);
      } catch (const std::exception& error) {
        progress.clear();
        std::cerr << "late: " << error.what() << '\n';
        return 1;
      }
    }
}
