// SPDX-License-Identifier: Apache-2.0
// Collectives of ranks that share one GPU, beside what limits them there, measured in the same run: a kernel that copies as many bytes, the
// launch of a kernel that does nothing, and a flag that goes there and back. One device has no link: none of these figures is NVLink's.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/cuda.hpp>
#include <tally/tally.hpp>

namespace {

using Json = nlohmann::ordered_json;
using tally::Communicator, tally::CudaDriver, tally::device::cuda::check;
template <bool timed>
using Devices = tally::DeviceCommunicator<CudaDriver, timed>;

struct Settings {
  std::vector<int> ranks{2, 4, 8};
  std::size_t least = 8, most = std::size_t{1} << 30, packets = std::size_t{64} << 10;
  int repeats = 11, in_graph = 20, gpu = 0;
  std::string json;
};

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), {"a stream"}); }
  ~Stream() { (void)cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  cudaStream_t stream = nullptr;
};
struct Event {
  Event() { check(cudaEventCreate(&event), {"an event"}); }
  ~Event() { (void)cudaEventDestroy(event); }
  Event(const Event&) = delete;
  cudaEvent_t event = nullptr;
};
double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

/// Microseconds of one of `operations` that enqueue() puts into a graph, by events around its replay.
template <class F>
double replayed(const Stream& s, int operations, int repeats, std::barrier<>* together, F&& enqueue) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal), {"capture"});
  for (int i = 0; i < operations; ++i) enqueue();
  check(cudaStreamEndCapture(s.stream, &graph), {"capture"});
  check(cudaGraphInstantiate(&executable, graph, 0), {"a graph"});
  check(cudaGraphUpload(executable, s.stream), {"a graph"});
  check(cudaStreamSynchronize(s.stream), {"a graph"});
  Event begin, end;
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    if (together) together->arrive_and_wait();
    check(cudaEventRecord(begin.event, s.stream), {"an event"});
    check(cudaGraphLaunch(executable, s.stream), {"a replay"});
    check(cudaEventRecord(end.event, s.stream), {"an event"});
    check(cudaStreamSynchronize(s.stream), {"a replay"});
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin.event, end.event), {"an event"});
    times.push_back(static_cast<double>(milliseconds) * 1e3 / operations);
  }
  (void)cudaGraphExecDestroy(executable), (void)cudaGraphDestroy(graph);
  return median(times);
}

__global__ void copy(const uint4* from, uint4* to, std::size_t rows) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < rows; i += std::size_t{gridDim.x} * blockDim.x) to[i] = from[i];
}
__global__ void nothing() {}
/// Two blocks tell each other numbers; flags lie a line apart.
__global__ void bounce(std::uint32_t* flags, std::uint32_t times) {
  using Block = tally::device::CudaBlock;
  const unsigned me = blockIdx.x;
  const std::uint32_t before = Block::load(flags + 32 * me);
  for (std::uint32_t i = 1; i <= times; ++i) {
    if (me == 0) Block::store(flags + 32, before + i);
    while (Block::load(flags + 32 * me) - before < i) {
    }
    if (me == 1) Block::store(flags, before + i);
  }
}

struct Limits {
  double launch_us = 0, round_trip_us = 0;
};
Limits limits(const Settings& settings) {
  Stream s;
  void* memory = nullptr;
  check(cudaMalloc(&memory, 4096), {"flags"});
  check(cudaMemset(memory, 0, 4096), {"flags"});
  auto* const flags = static_cast<std::uint32_t*>(memory);
  Limits found;
  found.launch_us = replayed(s, settings.in_graph, settings.repeats, nullptr, [&] { nothing<<<1, 32, 0, s.stream>>>(); });
  const double once = replayed(s, 1, settings.repeats, nullptr, [&] { bounce<<<2, 1, 0, s.stream>>>(flags, 1000); });
  found.round_trip_us = (once - found.launch_us) / 1000;
  (void)cudaFree(memory);
  return found;
}
/// Gigabytes per second that a copy moves: what it reads and what it writes.
double copy_gigabytes(const Settings& settings, std::size_t bytes, int processors) {
  Stream s;
  void *from = nullptr, *to = nullptr;
  check(cudaMalloc(&from, bytes), {bytes, " bytes"});
  check(cudaMalloc(&to, bytes), {bytes, " bytes"});
  const double us = replayed(s, settings.in_graph, settings.repeats, nullptr, [&] { copy<<<static_cast<unsigned>(4 * processors), 512, 0, s.stream>>>(static_cast<const uint4*>(from), static_cast<uint4*>(to), bytes / 16); });
  (void)cudaFree(from), (void)cudaFree(to);
  return 2 * static_cast<double>(bytes) / us * 1e-3;
}

/// One size: what ranks that share the GPU take, with the account and without.
struct Row {
  std::size_t bytes = 0;
  std::string algorithm;
  double us = 0, us_untimed = 0;
};
template <bool timed>
void measure(Communicator& comm, const Settings& settings, int blocks, std::barrier<>& together, std::vector<Row>& rows) {
  Stream s;
  Devices<timed> gpu(comm, CudaDriver(settings.gpu), {.blocks = blocks, .packet_bytes = settings.packets});
  auto memory = gpu.template allocate<float>(settings.most / sizeof(float));
  std::size_t row = 0;
  for (std::size_t bytes = settings.least; bytes <= settings.most; bytes *= 4, ++row) {
    const auto data = memory.subspan(0, std::max<std::size_t>(bytes / sizeof(float), 1));
    gpu.all_reduce(data, tally::max, s.stream).wait();
    const int operations = bytes >= std::size_t{64} << 20 ? 3 : settings.in_graph;
    const double us = replayed(s, operations, settings.repeats, &together, [&] { (void)gpu.all_reduce(data, tally::max, s.stream); });
    std::vector<double> all(static_cast<std::size_t>(comm.size()));
    comm.all_gather(std::span(&us, 1), all);
    if (comm.rank() != 0) continue;
    if (rows.size() <= row) rows.emplace_back();
    rows[row].bytes = bytes;
    rows[row].algorithm = bytes <= settings.packets ? "packets" : "zero_copy";
    (timed ? rows[row].us : rows[row].us_untimed) = *std::ranges::max_element(all);
  }
}

void run(const Settings& settings) {
  check(cudaSetDevice(settings.gpu), {"GPU ", settings.gpu});
  CudaDriver driver(settings.gpu);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, settings.gpu), {"GPU ", settings.gpu});
  const Limits least = limits(settings);
  std::printf("%s, ranks that share it: not NVLink\na kernel of a graph takes %.2f us, a flag there and back %.2f us\n\n", properties.name, least.launch_us, least.round_trip_us);
  Json json{{"gpu", properties.name}, {"launch_us", least.launch_us}, {"round_trip_us", least.round_trip_us}, {"rows", Json::array()}};
  for (const int n : settings.ranks) {
    std::vector<Row> rows;
    std::barrier<> together(n);
    const int blocks = driver.most_blocks() / n;
    tally::launch(n, [&](Communicator& comm) { measure<true>(comm, settings, blocks, together, rows); }, tally::threads);
    tally::launch(n, [&](Communicator& comm) { measure<false>(comm, settings, blocks, together, rows); }, tally::threads);
    std::printf("%d ranks, %d blocks each\n%12s %10s %12s %12s %8s %14s %8s\n", n, blocks, "bytes", "", "us", "no account", "", "copy", "");
    for (const Row& row : rows) {
      // All ranks read and write all that they have.
      const double moved = 2 * static_cast<double>(row.bytes) * n, rate = moved / row.us * 1e-3;
      const double copied = row.bytes >= std::size_t{1} << 20 ? copy_gigabytes(settings, row.bytes * static_cast<std::size_t>(n), driver.most_blocks()) : 0;
      std::printf("%12zu %10s %12.2f %12.2f %+7.1f%%", row.bytes, row.algorithm.c_str(), row.us, row.us_untimed, 100 * (row.us / row.us_untimed - 1));
      if (copied > 0) std::printf(" %9.0f GB/s %7.1f%%", rate, 100 * rate / copied);
      else std::printf(" %11.2f us, the least", least.launch_us + least.round_trip_us / 2);
      std::printf("\n");
      json["rows"].push_back({{"ranks", n}, {"bytes", row.bytes}, {"algorithm", row.algorithm}, {"us", row.us}, {"us_without_account", row.us_untimed}, {"gigabytes_per_second", rate}, {"copy_gigabytes_per_second", copied > 0 ? Json(copied) : Json()}});
    }
    std::printf("\n");
  }
  if (!settings.json.empty()) std::ofstream(settings.json) << json.dump(2) << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // many ranks' streams; CUDA reads it when it begins
  Settings settings;
  CLI::App app("Measures all_reduce of ranks that share one GPU, beside a copy of as many bytes and the least that a kernel takes.", "cuda");
  app.add_option("--ranks", settings.ranks, "how many ranks share it; several are measured one after the other")->capture_default_str();
  app.add_option("--gpu", settings.gpu, "as CUDA numbers them")->capture_default_str();
  app.add_option("--least", settings.least, "bytes of each rank")->check(CLI::Range(std::size_t{4}, std::size_t{1} << 40))->capture_default_str();
  app.add_option("--most", settings.most, "likewise")->check(CLI::Range(std::size_t{4}, std::size_t{1} << 40))->capture_default_str();
  app.add_option("--packets", settings.packets, "bytes up to which operations go in packets")->capture_default_str();
  app.add_option("--repeats", settings.repeats, "replays of each graph; the median counts")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--json", settings.json, "write the result there, too")->option_text("FILE");
  CLI11_PARSE(app, argc, argv);
  try {
    run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda: %s\n", error.what());
    return 1;
  }
}
