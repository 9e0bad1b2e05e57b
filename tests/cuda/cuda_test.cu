// SPDX-License-Identifier: Apache-2.0
// Device communicators on a GPU. Ranks share it: as parts of one grid, which certainly run at the same time; as kernels of threads' streams;
// or as processes. Without a GPU it says so and exits with 77.
// usage: cuda_test groups|threads|processes [RANKS]
#include <barrier>
#include <chrono>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <tally/cuda.hpp>
#include <tally/tally.hpp>

#include "../device_suite.hpp"

using namespace std::chrono_literals;
using tally::Communicator, tally::DeviceOperation, tally::Errc, tally::Error, tally::Rank, tally::Report;
using test::Affine, test::at, test::check, test::Compose, test::expect_error;

namespace {

template <class K>
__global__ void __launch_bounds__(512, 1) run_group(const K* kernels, int blocks) {
  __shared__ tally::device::BlockShared shared;
  const int rank = static_cast<int>(blockIdx.x) / blocks;
  tally::device::CudaBlock block(shared, rank * blocks, blocks);
  kernels[rank](block);
}

/// The threads of all ranks, whose kernels become one.
struct Group {
  explicit Group(int n) : ranks(n), all(n) {}
  const int ranks;
  std::barrier<> all;
  std::vector<std::byte> kernels;
  std::byte* on_device = nullptr;
};
class TestDriver : public tally::device::CudaDriver {
 public:
  explicit TestDriver(std::shared_ptr<Group> group = nullptr, Rank rank = 0) : group_(std::move(group)), rank_(rank) {}
  template <tally::device::Kernel<Block> K>
  void launch(const K& kernel, int blocks, int threads, cudaStream_t stream) {
    if (!group_) return CudaDriver::launch(kernel, blocks, threads, stream);
    using namespace tally::device::cuda;
    Group& g = *group_;
    if (rank_ == 0) g.kernels.resize(sizeof(K) * at(g.ranks));
    g.all.arrive_and_wait();
    std::memcpy(g.kernels.data() + sizeof(K) * at(rank_), &kernel, sizeof(K));
    g.all.arrive_and_wait();
    if (rank_ == 0) {
      if (!g.on_device) check(cudaMalloc(&g.on_device, at(g.ranks) * 4096), {"kernels"});
      check(cudaMemcpyAsync(g.on_device, g.kernels.data(), g.kernels.size(), cudaMemcpyHostToDevice, stream), {"kernels"});
      const K* kernels = reinterpret_cast<const K*>(g.on_device);
      void* arguments[] = {&kernels, &blocks};
      check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&run_group<K>), dim3(static_cast<unsigned>(blocks * g.ranks)), dim3(static_cast<unsigned>(threads)), arguments, 0, stream), {"a group of kernels"});
      check(cudaStreamSynchronize(stream), {"a group of kernels"});
    }
    g.all.arrive_and_wait();
  }

 private:
  std::shared_ptr<Group> group_;
  Rank rank_;
};
using Devices = tally::DeviceCommunicator<TestDriver>;

struct Stream {
  Stream() { tally::device::cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), {"a stream"}); }
  ~Stream() { (void)cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  cudaStream_t stream = nullptr;
};

/// Symmetric, or this rank's own.
template <class T>
class Buffer {
 public:
  Buffer(Devices& gpu, bool symmetric, const std::vector<T>& values, const Stream& stream) : stream_(stream.stream) {
    if (symmetric) symmetric_ = gpu.allocate<T>(values.size());
    else own_.reset(allocate(std::max<std::size_t>(values.size() * sizeof(T), 1)), [](T* memory) { (void)cudaFreeAsync(memory, nullptr); });
    count_ = values.size();
    tally::device::cuda::check(cudaMemcpyAsync(span().data(), values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice, stream_), {"a buffer"});
    tally::device::cuda::check(cudaStreamSynchronize(stream_), {"a buffer"});
  }
  tally::DeviceSpan<T> span() const { return {own_ ? own_.get() : symmetric_.data(), count_}; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    tally::device::cuda::check(cudaMemcpyAsync(values.data(), span().data(), count_ * sizeof(T), cudaMemcpyDeviceToHost, stream_), {"a buffer"});
    tally::device::cuda::check(cudaStreamSynchronize(stream_), {"a buffer"});
    return values;
  }

 private:
  T* allocate(std::size_t bytes) {
    void* memory = nullptr;
    tally::device::cuda::check(cudaMallocAsync(&memory, bytes, stream_), {"a buffer"});
    return static_cast<T*>(memory);
  }
  cudaStream_t stream_;
  std::shared_ptr<T> own_;
  tally::DeviceSymmetric<T> symmetric_;
  std::size_t count_ = 0;
};

template <class T>
void one_type(Devices& gpu, const Stream& s, bool in_one_process) {
  const Rank n = gpu.size();
  const auto mine = static_cast<float>(gpu.rank() + 1);
  const auto all = static_cast<float>(n * (n + 1) / 2);
  for (const std::size_t count : {std::size_t{5}, std::size_t{100'000}}) {
    const std::vector<T> values(count, static_cast<T>(mine));
    const Buffer<T> in(gpu, false, values, s), out(gpu, false, values, s);
    for (const char* name : {"", "packets", "zero_copy", "ring"}) {
      if (std::string_view(name) == "packets" && count > 1000) continue;
      if (std::string_view(name) == "zero_copy" && !in_one_process) continue;
      const tally::CallOptions options{.algorithm = name};
      gpu.all_reduce(in.span(), out.span(), tally::sum, s.stream, options).wait();
      check(out.values() == std::vector<T>(count, static_cast<T>(all)), name);
    }
    gpu.all_reduce(in.span(), out.span(), tally::premultiplied_sum(2.0f), s.stream).wait();
    check(out.values() == std::vector<T>(count, static_cast<T>(2 * all)), "premultiplied_sum");
    gpu.all_reduce(in.span(), out.span(), tally::mean, s.stream).wait();
    check(out.values() == std::vector<T>(count, static_cast<T>(all / static_cast<float>(n))), "mean");
    if constexpr (!tally::Complex<T>) {
      gpu.all_reduce(in.span(), out.span(), tally::max, s.stream).wait();
      check(out.values() == std::vector<T>(count, static_cast<T>(static_cast<float>(n))), "max");
    }
  }
}

/// A graph of one operation by packets and one by shares or steps, replayed.
void graphs(Devices& gpu, const Stream& s) {
  const std::uint32_t n = static_cast<std::uint32_t>(gpu.size());
  const Buffer<std::uint32_t> small(gpu, false, std::vector<std::uint32_t>(7, 1), s), large(gpu, true, std::vector<std::uint32_t>(100'000, 1), s);
  gpu.barrier(s.stream).wait();
  using tally::device::cuda::check;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal), {"capture"});
  DeviceOperation captured = gpu.all_reduce(small.span(), tally::sum, s.stream);
  (void)gpu.all_reduce(large.span(), tally::sum, s.stream);
  check(cudaStreamEndCapture(s.stream, &graph), {"capture"});
  check(cudaGraphInstantiate(&executable, graph, 0), {"graph"});
  check(cudaGraphUpload(executable, s.stream), {"graph"});
  check(cudaStreamSynchronize(s.stream), {"graph"});
  std::uint32_t expected = 1;
  for (int k = 0; k < 10; ++k) check(cudaGraphLaunch(executable, s.stream), {"replay"}), expected *= n;
  check(cudaStreamSynchronize(s.stream), {"replay"});
  test::check(small.values() == std::vector<std::uint32_t>(7, expected), "replayed packets");
  test::check(large.values() == std::vector<std::uint32_t>(100'000, expected), "replayed shares");
  expect_error(Errc::invalid_argument, "was captured", [&] { captured.wait(); });
  std::uint64_t calls = 0;
  for (const tally::LedgerRow& row : gpu.ledger().rows())
    if (row.operation == tally::Collective::all_reduce && row.bytes == row.calls * 28) calls += row.calls;
  test::check(calls == 10, "replays are in the account: " + std::to_string(calls));
  (void)cudaGraphExecDestroy(executable), (void)cudaGraphDestroy(graph);
}

/// A rank that comes 2 ms late is so much waited for by the others, to a tenth of a millisecond, as the host sees both.
void lateness(Devices& gpu, Communicator& comm, const Stream& s) {
  const Buffer<float> x(gpu, false, std::vector<float>(1000, 1), s);
  gpu.all_reduce(x.span(), tally::sum, s.stream).wait();
  std::vector<double> differences;
  for (int k = 0; k < 21; ++k) {
    comm.barrier();
    const auto begin = std::chrono::steady_clock::now();
    while (gpu.rank() == 0 && std::chrono::steady_clock::now() - begin < 2ms) {
    }
    const double late = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    const Report report = gpu.all_reduce(x.span(), tally::sum, s.stream).wait();
    std::vector<double> lates(at(gpu.size()));
    comm.all_gather(std::span(&late, 1), lates);
    differences.push_back(std::chrono::duration<double, std::milli>(report.wait_arrival).count() - lates[0]);
  }
  std::ranges::sort(differences);
  if (gpu.rank() == 1) std::printf("waiting for a rank 2 ms late, less its lateness: %.3f, median %.3f, %.3f ms\n", differences.front(), differences[10], differences.back());
}

void errors(Devices& gpu, const Stream& s) {
  const Buffer<float> x(gpu, false, std::vector<float>(100, 1), s);
  std::vector<float> here(100);
  expect_error(Errc::invalid_argument, "is memory of the host's", [&] { (void)gpu.all_reduce(tally::device_span(here.data(), 100), tally::sum, s.stream); });
  expect_error(Errc::invalid_argument, "no multiple of 4", [&] { (void)gpu.all_reduce(tally::device_span(reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(x.span().data()) + 1), 10), tally::sum, s.stream); });
  expect_error(Errc::no_resources, "bytes left", [&] { (void)gpu.allocate<char>(std::size_t{1} << 45); });
  expect_error(Errc::invalid_argument, "there is no GPU 99", [] { tally::CudaDriver(99); });
  gpu.barrier(s.stream).wait();
}

void ranks(Communicator& comm, const std::shared_ptr<Group>& group, bool in_one_process) {
  TestDriver driver(group, comm.rank());
  Stream s;
  {
    Devices gpu(comm, driver, {.blocks = 4, .threads = 128});
    for (const bool symmetric : {false, true}) {
      const auto make = [&](const std::vector<Affine>& values) { return Buffer<Affine>(gpu, symmetric, values, s); };
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{1000}, std::size_t{30'000}}) {
        test::every_operation(gpu, s.stream, make, count, "", false);
        test::every_operation(gpu, s.stream, make, count, "", true);
        if (symmetric || in_one_process) test::every_operation(gpu, s.stream, make, count, "zero_copy", false);
      }
    }
    one_type<tally::bf16>(gpu, s, in_one_process);
#if !defined(ONLY_COMPILED)
    one_type<float>(gpu, s, in_one_process), one_type<double>(gpu, s, in_one_process);
    one_type<tally::f16>(gpu, s, in_one_process), one_type<std::complex<float>>(gpu, s, in_one_process);
#endif
    errors(gpu, s);
    if (!group) graphs(gpu, s), lateness(gpu, comm, s);
    if (comm.rank() == 0) std::printf("%d ranks, %s, link to rank %d: %s\n", gpu.size(), group ? "one grid" : in_one_process ? "threads" : "processes", gpu.size() - 1, std::string(tally::device::name_of(gpu.link_to(gpu.size() - 1))).c_str());
  }
  if (!group) {  // who does not come is named, at the deadline
    Devices gpu(comm, driver, {.blocks = 1});
    const Buffer<float> x(gpu, false, std::vector<float>(100, 1), s);
    if (comm.rank() > 0) expect_error(Errc::timeout, "rank", [&] { gpu.all_reduce(x.span(), tally::sum, s.stream, {.timeout = 300ms}).wait(); });
  }
  comm.barrier();
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // many ranks' streams; CUDA reads it when it begins
  const std::string way = argc > 1 ? argv[1] : "";
  const int n = argc > 2 ? std::atoi(argv[2]) : 3;
  if ((way != "groups" && way != "threads" && way != "processes") || n < 2) return std::fputs("usage: cuda_test groups|threads|processes [RANKS, at least 2]\n", stderr), 2;
  try {
    if (way == "processes") {  // whose parent must not have used CUDA
      tally::launch(n, [](Communicator& comm) { ranks(comm, nullptr, false); }, tally::processes);
      return 0;
    }
    tally::CudaDriver();
    const auto group = way == "groups" ? std::make_shared<Group>(n) : nullptr;
    tally::launch(n, [&](Communicator& comm) { ranks(comm, group, true); }, tally::threads);
  } catch (const Error& error) {
    const std::string text = error.what();
    std::printf("%s\n", text.c_str());
    return text.find("no NVIDIA driver") != std::string::npos || text.find("finds no GPU") != std::string::npos ? 77 : 1;
  }
}
