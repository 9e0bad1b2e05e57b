// SPDX-License-Identifier: Apache-2.0
// What accounting costs: the same all_reduce without it, with times, and with times and joules from an energy hub, by turns so
// that what else the machine does troubles all alike; and the hub's own processor time. The meter is a made-up one of 100 W.
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <tally/energy/member.hpp>
#include <tally/tally.hpp>
#include <vector>

#include "arguments.hpp"
#include "measure.hpp"

namespace {

struct HundredWatts {
  std::vector<tally::DomainInfo> infos{{tally::Domain::cpu_package, -1, "package-0", "made up", std::chrono::milliseconds(1), 1e-9, 0, 1000, 0, 0}};
  std::span<const tally::DomainInfo> domains() const { return infos; }
  tally::SampleResult sample(std::span<tally::MeterSample> out) noexcept {
    const tally::nanoseconds now = tally::monotonic_time();
    out[0] = {0, now, static_cast<tally::Nanojoules>(now.count()) * 100, 0};
    return {1, {}};
  }
};
std::shared_ptr<tally::EnergyMember> member_of(const std::string& name) {
  tally::MemberOptions options;
  options.name = name;
  options.find = [] {
    tally::FoundMeters found;
    found.meters.emplace_back(HundredWatts{});
    return found;
  };
  return std::make_shared<tally::EnergyMember>(std::move(options));
}

double seconds_of(clockid_t clock) {
  timespec t{};
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

constexpr std::size_t most_blocks = 1 << 20;
enum Way : std::size_t { off, timed, metered };
constexpr std::array<const char*, 3> way_names{"off", "times", "times and hub"};
/// In memory that all processes share.
struct Shared {
  std::array<std::size_t, 3> blocks{};
  std::array<std::array<double, most_blocks>, 3> ns;  // per call
  bool was_metered = false;
  std::atomic<bool> stop{false}, ready{false};
  double hub_cpu = 0, hub_wall = 0;
};

/// A process that is the hub and nothing else; ranks' processes join it.
class Hub {
 public:
  Hub(const std::string& name, Shared& shared) : shared_(shared) {
    std::fflush(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("cannot start the hub's process");
    if (pid_ > 0) {
      while (!shared.ready && ::waitpid(pid_, nullptr, WNOHANG) == 0) ::usleep(1000);
      return;
    }
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    const auto member = member_of(name);
    if (!member->is_hub()) ::_exit(1);
    const double cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), wall = seconds_of(CLOCK_MONOTONIC);
    shared.ready = true;
    while (!shared.stop) ::usleep(200'000);
    shared.hub_cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    shared.hub_wall = seconds_of(CLOCK_MONOTONIC) - wall;
    ::_exit(0);
  }
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;
  ~Hub() { end(); }
  void end() {
    if (pid_ <= 0) return;
    shared_.stop = true;
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  Shared& shared_;
  pid_t pid_ = -1;
};

void measure(tally::Communicator& comm, std::size_t bytes, int blocks, int calls, Way way, Shared& shared) {
  const std::vector<int> cores = bench::allowed_cores();
  if (cores.size() > 1) bench::pin_to(cores[static_cast<std::size_t>(comm.rank())]);
  const bench::Memory memory(bytes);
  const std::span<float> data = memory.as<float>(bytes / sizeof(float));
  const auto block = [&] {
    for (int i = 0; i < calls; ++i) comm.all_reduce(data, tally::max);
  };
  block();
  for (int i = 0; i < blocks; ++i) {
    comm.barrier();
    const double begin = bench::seconds_now();
    block();
    const double end = bench::seconds_now();
    if (comm.rank() == 0 && shared.blocks[way] < most_blocks) shared.ns[way][shared.blocks[way]++] = (end - begin) / calls * 1e9;
  }
  if (way == metered && comm.rank() == 0 && !shared.was_metered) {
    comm.ledger().wait_for_energy();
    for (const tally::LedgerRow& row : comm.ledger().rows()) shared.was_metered = shared.was_metered || comm.ledger().energy(row).provenance == tally::Provenance::prorated;
  }
  comm.barrier();
}

/// The least that accounting can cost a call is two of these.
double clock_reading_ns() {
  const tally::Clock& clock = tally::Clock::host();
  std::vector<double> blocks;
  for (int i = 0; i < 100; ++i) {
    constexpr int readings = 10'000;
    const double begin = bench::seconds_now();
    for (int k = 0; k < readings; ++k) {
      const tally::Ticks now = clock.now();
      asm volatile("" : : "r"(now));
    }
    blocks.push_back((bench::seconds_now() - begin) / readings * 1e9);
  }
  return bench::median(blocks);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures what accounting adds to an all_reduce of two processes, without and with an energy hub, and the hub's own processor time."};
  std::vector<std::string> sizes{"8", "64K"};
  int turns = 40, blocks = 20;
  double block_us = 500;
  std::string json;
  app.add_option("--bytes", sizes, "of the all_reduces")->capture_default_str();
  app.add_option("--turns", turns, "in which the three ways are measured, by turns")->capture_default_str()->check(CLI::Range(1, 10'000));
  app.add_option("--blocks", blocks, "per turn")->capture_default_str()->check(CLI::Range(1, 10'000));
  app.add_option("--block-us", block_us, "about how long each lasts")->capture_default_str()->check(CLI::Range(10.0, 1e6));
  app.add_option("--json", json, "also JSON lines to this file");
  if (const auto status = bench::parse("overhead", app, argc, argv)) return *status;
  for (const std::string& size : sizes)
    if (const auto bytes = bench::parse_size(size); !bytes || *bytes < sizeof(float) || *bytes > std::size_t{1} << 30) {
      std::cerr << "overhead: '" << size << "' is no number of bytes from 4 to 1G\n";
      return 2;
    }
  std::ofstream file;
  if (!json.empty()) {
    file.open(json);
    if (!file) {
      std::cerr << "overhead: cannot write '" << json << "'\n";
      return 2;
    }
  }
  const auto loads = [] {
    double load[3] = {};
    return ::getloadavg(load, 3) > 0 ? load[0] : -1;
  };
  std::cout << "# machine  " << bench::machine_line() << "\n# two processes; medians of " << turns * blocks << " blocks in " << turns << " turns, and the quickest tenth's limit; more: than without accounting, turn by turn\n";
  const bench::Progress progress(true);
  const double load_before = loads(), reading = clock_reading_ns();
  std::printf("# a clock reading takes %.1f ns, and a call makes two\n", reading);
  std::printf("#  bytes  accounting       ns/call  quickest   more(ns)  more(%%)\n");
  if (file) file << nlohmann::ordered_json{{"clock_reading_ns", reading}}.dump() << std::endl;
  try {
    for (const std::string& size : sizes) {
      const std::size_t bytes = *bench::parse_size(size);
      void* const mapped = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      Shared& shared = *new (mapped) Shared;
      const std::string name = "bench/overhead/" + std::to_string(::getpid());
      Hub hub(name, shared);
      if (!shared.ready) throw std::runtime_error("there is no hub");
      std::array<std::vector<double>, 3> of_turns;  // medians
      const int calls = std::max(1, static_cast<int>(block_us / (0.15 + static_cast<double>(bytes) / 4000)));
      for (int turn = 0; turn < turns; ++turn) {
        progress.show(size + " bytes, turn " + std::to_string(turn + 1) + " of " + std::to_string(turns) + " ...");
        for (std::size_t k = 0; k < 3; ++k) {
          const Way way = static_cast<Way>((k + static_cast<std::size_t>(turn)) % 3);
          tally::Options options;
          options.accounting = way != off;
          if (way == metered)
            options.meters = [name] {
              static const auto member = member_of(name);  // of each rank's process
              return std::make_unique<tally::HubSeat>(member);
            };
          const std::size_t before = shared.blocks[way];
          tally::launch(2, [&](tally::Communicator& comm) { measure(comm, bytes, blocks, calls, way, shared); }, tally::processes, options);
          of_turns[way].push_back(bench::median({&shared.ns[way][before], &shared.ns[way][shared.blocks[way]]}));
        }
      }
      hub.end();
      progress.clear();
      if (!shared.was_metered) throw std::runtime_error("no joules came from the hub");
      for (const Way way : {off, timed, metered}) {
        const std::vector<double> all(&shared.ns[way][0], &shared.ns[way][shared.blocks[way]]);
        std::vector<double> more;
        for (std::size_t i = 0; i < of_turns[way].size(); ++i) more.push_back(of_turns[way][i] - of_turns[off][i]);
        const double median = bench::median(all), fastest = bench::quantile(all, 0.1), extra = bench::median(more), part = extra / bench::median(of_turns[off]);
        std::printf("%8s  %-14s %9.1f %8.1f %11.1f %8.2f\n", size.c_str(), way_names[way], median, fastest, extra, 100 * part);
        std::fflush(stdout);
        if (file) file << nlohmann::ordered_json{{"bytes", bytes}, {"accounting", way_names[way]}, {"blocks", all.size()}, {"ns", median}, {"quickest_tenth_ns", fastest}, {"more_ns", extra}, {"more", part}}.dump() << std::endl;
      }
      const double core = shared.hub_cpu / shared.hub_wall;
      std::printf("# the hub took %.3f %% of a core (%.1f ms in %.1f s)\n", 100 * core, shared.hub_cpu * 1e3, shared.hub_wall);
      if (file) file << nlohmann::ordered_json{{"bytes", bytes}, {"hub_core", core}, {"hub_cpu_s", shared.hub_cpu}, {"hub_wall_s", shared.hub_wall}}.dump() << std::endl;
      ::munmap(mapped, sizeof(Shared));
    }
  } catch (const std::exception& error) {
    progress.clear();
    std::cerr << "overhead: " << error.what() << '\n';
    return 1;
  }
  std::printf("# load of the machine: %.1f before, %.1f after\n", load_before, loads());
}
