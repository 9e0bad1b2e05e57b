// SPDX-License-Identifier: Apache-2.0
// Collectives of ranks that share one GPU, beside what limits them there, measured in the same run: a kernel that copies as many bytes, the
// launch of a kernel that does nothing, and a flag that goes there and back. One device has no link: none of these figures is NVLink's.
// `tally_perf --device cuda` runs this program.
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
  std::size_t least = 8, most = std::size_t{1} << 30, packets = std::size_t{64} << 10, factor = 4;
  int repeats = 11, in_graph = 20, gpu = 0;
  std::string op = "all_reduce", algorithm, json;

  /// What has to be read and written, of all ranks, where each one's larger side has so many bytes.
  double moved(std::size_t bytes, int n) const {
    const double all = static_cast<double>(bytes), each = all * n;
    return op == "all_reduce" || op == "all_to_all" ? 2 * each : op == "broadcast" ? each : each + all;
  }
};
const std::vector<std::string> operations{"all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"};

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

/// The operation on a rank's buffer; in place, but for all_to_all.
template <class Devices>
tally::DeviceOperation call(Devices& gpu, const Settings& settings, tally::DeviceSpan<float> data, tally::DeviceSpan<float> other, cudaStream_t stream, bool sums) {
  const tally::CallOptions options{.algorithm = settings.algorithm};
  const std::size_t block = data.size() / static_cast<std::size_t>(gpu.size());
  const auto own = data.subspan(static_cast<std::size_t>(gpu.rank()) * block, block);
  if (settings.op == "reduce_scatter") return sums ? gpu.reduce_scatter(data, own, tally::sum, stream, options) : gpu.reduce_scatter(data, own, tally::max, stream, options);
  if (settings.op == "all_gather") return gpu.all_gather(own, data, stream, options);
  if (settings.op == "broadcast") return gpu.broadcast(data, 0, stream, options);
  if (settings.op == "all_to_all") return gpu.all_to_all(data, other, stream, options);
  return sums ? gpu.all_reduce(data, tally::sum, stream, options) : gpu.all_reduce(data, tally::max, stream, options);
}
/// Wrong elements of one call on this rank, of small integers.
template <class Devices>
std::size_t wrong(Devices& gpu, const Settings& settings, tally::DeviceSpan<float> data, tally::DeviceSpan<float> other, cudaStream_t stream) {
  const int n = gpu.size();
  const std::size_t count = data.size(), block = count / static_cast<std::size_t>(n);
  const auto value = [](int rank, std::size_t i) { return static_cast<float>(static_cast<std::size_t>(rank + 1) * (i % 7)); };
  std::vector<float> values(count);
  const auto copy = [&](void* to, const void* from) { check(cudaMemcpyAsync(to, from, count * sizeof(float), cudaMemcpyDefault, stream), {"values"}), check(cudaStreamSynchronize(stream), {"values"}); };
  for (std::size_t i = 0; i < count; ++i) values[i] = value(gpu.rank(), i);
  copy(data.data(), values.data());
  call(gpu, settings, data, other, stream, true).wait();
  copy(values.data(), settings.op == "all_to_all" ? other.data() : data.data());
  std::size_t found = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const int from = block > 0 ? static_cast<int>(i / block) : 0;
    const bool own = from == gpu.rank();
    const float sum = static_cast<float>(n * (n + 1) / 2) * static_cast<float>(i % 7);
    const float expected = settings.op == "all_reduce" ? sum : settings.op == "reduce_scatter" ? (own ? sum : value(gpu.rank(), i)) : settings.op == "broadcast" ? value(0, i) : settings.op == "all_gather" ? value(from, i) : value(from, static_cast<std::size_t>(gpu.rank()) * block + i % block);
    found += values[i] != expected;
  }
  for (std::size_t i = 0; i < count; ++i) values[i] = 0;
  copy(data.data(), values.data());
  return found;
}

/// One size: what ranks that share the GPU take, with the account and without.
struct Row {
  std::size_t bytes = 0, wrong = 0;
  std::string algorithm;
  double us = 0, us_untimed = 0;
};
template <bool timed>
void measure(Communicator& comm, const Settings& settings, int blocks, std::barrier<>& together, std::vector<Row>& rows, std::size_t& packets_up_to) {
  Stream s;
  Devices<timed> gpu(comm, CudaDriver(settings.gpu), {.blocks = blocks, .packet_bytes = settings.packets});
  const auto n = static_cast<std::size_t>(comm.size());
  auto memory = gpu.template allocate<float>(settings.most / sizeof(float) + n);
  auto other = gpu.template allocate<float>(settings.op == "all_to_all" ? settings.most / sizeof(float) + n : 0);
  std::size_t row = 0;
  for (std::size_t bytes = settings.least; bytes <= settings.most; bytes *= settings.factor, ++row) {
    std::size_t count = std::max<std::size_t>(bytes / sizeof(float), 1);
    if (settings.op != "all_reduce" && settings.op != "broadcast") count = (count + n - 1) / n * n;
    const auto data = memory.subspan(0, count), to = settings.op == "all_to_all" ? other.subspan(0, count) : data;
    std::size_t bad = wrong(gpu, settings, data, to, s.stream);
    comm.all_reduce(std::span(&bad, 1), tally::sum);
    const tally::Report report = call(gpu, settings, data, to, s.stream, false).wait();
    const int operations = bytes >= std::size_t{64} << 20 ? 3 : settings.in_graph;
    const double us = replayed(s, operations, settings.repeats, &together, [&] { (void)call(gpu, settings, data, to, s.stream, false); });
    std::vector<double> all(n);
    comm.all_gather(std::span(&us, 1), all);
    if (comm.rank() != 0) continue;
    if (rows.size() <= row) rows.emplace_back();
    rows[row].bytes = count * sizeof(float);
    rows[row].wrong += bad;
    rows[row].algorithm = report.algorithm_name();
    (timed ? rows[row].us : rows[row].us_untimed) = *std::ranges::max_element(all);
  }
  if constexpr (timed) {
    const std::size_t up_to = gpu.tune(s.stream);
    if (comm.rank() == 0) packets_up_to = up_to;
  }
}

/// False if a result was wrong.
bool run(const Settings& settings) {
  std::size_t wrong = 0;
  CudaDriver driver(settings.gpu);  // which says what is missing
  check(cudaSetDevice(settings.gpu), {"GPU ", settings.gpu});
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, settings.gpu), {"GPU ", settings.gpu});
  const Limits least = limits(settings);
  std::printf("%s, ranks that share it: not NVLink\na kernel of a graph takes %.2f us, a flag there and back %.2f us\n\n", properties.name, least.launch_us, least.round_trip_us);
  Json json{{"gpu", properties.name}, {"launch_us", least.launch_us}, {"round_trip_us", least.round_trip_us}, {"rows", Json::array()}};
  for (const int n : settings.ranks) {
    std::vector<Row> rows;
    std::size_t packets_up_to = 0;
    std::barrier<> together(n);
    const int blocks = driver.most_blocks() / n;
    tally::launch(n, [&](Communicator& comm) { measure<true>(comm, settings, blocks, together, rows, packets_up_to); }, tally::threads);
    tally::launch(n, [&](Communicator& comm) { measure<false>(comm, settings, blocks, together, rows, packets_up_to); }, tally::threads);
    std::printf("%s of %d ranks, %d blocks each\n%12s %18s %8s %12s %12s %8s %14s %8s\n", settings.op.c_str(), n, blocks, "bytes", "", "#wrong", "us", "no account", "", "moved", "of copy");
    for (const Row& row : rows) {
      const double moved = settings.moved(row.bytes, n), rate = moved / row.us * 1e-3;
      wrong += row.wrong;
      const double copied = row.bytes >= std::size_t{1} << 20 ? copy_gigabytes(settings, row.bytes * static_cast<std::size_t>(n), driver.most_blocks()) : 0;
      std::printf("%12zu %18s %8zu %12.2f %12.2f %+7.1f%%", row.bytes, row.algorithm.c_str(), row.wrong, row.us, row.us_untimed, 100 * (row.us / row.us_untimed - 1));
      if (copied > 0) std::printf(" %9.0f GB/s %7.1f%%", rate, 100 * rate / copied);
      else std::printf(" %11.2f us, the least", least.launch_us + least.round_trip_us / 2);
      std::printf("\n");
      json["rows"].push_back({{"operation", settings.op}, {"ranks", n}, {"bytes", row.bytes}, {"wrong", row.wrong}, {"algorithm", row.algorithm}, {"us", row.us}, {"us_without_account", row.us_untimed}, {"gigabytes_per_second", rate}, {"copy_gigabytes_per_second", copied > 0 ? Json(copied) : Json()}});
    }
    std::printf("packets are faster up to %zu bytes, by tune() among sizes up to --packets\n\n", packets_up_to);
    json["packets_up_to"].push_back({{"ranks", n}, {"bytes", packets_up_to}});
  }
  if (!settings.json.empty()) std::ofstream(settings.json) << json.dump(2) << '\n';
  return wrong == 0;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // many ranks' streams; CUDA reads it when it begins
  Settings settings;
  CLI::App app("Measures a collective of ranks that share one GPU, beside a copy of as many bytes and the least that a kernel takes.", "cuda");
  app.add_option("--op", settings.op, "what is measured")->check(CLI::IsMember(operations))->capture_default_str();
  app.add_option("--algorithm", settings.algorithm, "by name; default: what the library chooses");
  app.add_option("-n,--ranks", settings.ranks, "how many ranks share it; several are measured one after the other")->capture_default_str();
  app.add_option("--gpu", settings.gpu, "as CUDA numbers them")->capture_default_str();
  app.add_option("-b,--min", settings.least, "smallest size in bytes, of each rank's larger side")->transform(CLI::AsSizeValue(false))->check(CLI::Range(std::size_t{4}, std::size_t{1} << 40))->capture_default_str();
  app.add_option("-e,--max", settings.most, "largest size")->transform(CLI::AsSizeValue(false))->check(CLI::Range(std::size_t{4}, std::size_t{1} << 40))->capture_default_str();
  app.add_option("-f,--factor", settings.factor, "from size to size")->check(CLI::Range(2, 1024))->capture_default_str();
  app.add_option("--packets", settings.packets, "bytes up to which operations go in packets")->capture_default_str();
  app.add_option("--repeats", settings.repeats, "replays of each graph; the median counts")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--json", settings.json, "write the result there, too")->option_text("FILE");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(settings) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda: %s\n", error.what());
    return 1;
  }
}
