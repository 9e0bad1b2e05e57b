// SPDX-License-Identifier: Apache-2.0
// What two ranks move over RDMA verbs, for rdma.sh to set beside ib_write_bw: messages one way, one after the other, and all_reduce.
// One line per size: bytes, MiB/s one way, MiB/s of all_reduce (bytes reduced per second). Medians, accounting on.
#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdio>
#include <iostream>
#include <span>
#include <string>
#include <tally/tally.hpp>
#include <tally/verbs.hpp>
#include <vector>

#include "arguments.hpp"
#include "measure.hpp"

namespace {

struct Settings {
  std::vector<std::string> sizes{"1M", "4M", "16M"};
  int rounds = 3, messages = 16;
};

void measure(tally::Communicator& comm, const Settings& s, std::size_t bytes) {
  std::vector<float> data(bytes / sizeof(float), 1.0f);
  std::vector<double> one_way, reduced;
  for (int round = -1; round < s.rounds; ++round) {
    comm.barrier();
    const double begin = bench::seconds_now();
    for (int i = 0; i < s.messages; ++i) {
      if (comm.rank() == 0) comm.send(std::span<const float>(data), 1);
      else comm.receive(std::span(data), 0);
    }
    comm.barrier();
    const double middle = bench::seconds_now();
    for (int i = 0; i < s.messages; ++i) comm.all_reduce(std::span(data), tally::max);
    const double end = bench::seconds_now();
    if (round < 0) continue;  // memory gets registered
    const double mib = static_cast<double>(bytes) * s.messages / (1 << 20);
    one_way.push_back(mib / (middle - begin));
    reduced.push_back(mib / (end - middle));
  }
  if (comm.rank() == 0) std::printf("%zu %.1f %.1f\n", bytes, bench::median(one_way), bench::median(reduced)), std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  CLI::App app{"What two ranks move over RDMA verbs."};
  app.add_option("sizes", s.sizes, "bytes, with K, M or G")->capture_default_str();
  app.add_option("--rounds", s.rounds, "of which the median is taken")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--messages", s.messages, "of a round")->capture_default_str()->check(CLI::PositiveNumber);
  if (const auto status = bench::parse("rdma", app, argc, argv)) return *status;
  std::vector<std::size_t> sizes;
  for (const std::string& text : s.sizes) {
    const auto size = bench::parse_size(text);
    if (!size || *size < sizeof(float) || *size % sizeof(float) != 0) {
      std::cerr << "rdma: '" << text << "' is no size of whole floats\n";
      return 2;
    }
    sizes.push_back(*size);
  }
  try {
    tally::launch_verbs(2, [&](tally::Communicator& comm) {
      for (const std::size_t bytes : sizes) measure(comm, s, bytes);
    });
  } catch (const tally::Error& error) {
    std::cerr << "rdma: " << error.what() << '\n';
    return 1;
  }
}
