// SPDX-License-Identifier: Apache-2.0
// NVIDIA GPUs as drivers of devices, by the CUDA runtime. Several ranks may share a GPU, so nothing here waits for kernels of others, which
// may be waiting for this rank: memory is had from pools, kernels are loaded before any of them runs.
#pragma once

#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../host.hpp"
#include "../types.hpp"
#include "cuda_block.hpp"
#include "driver.hpp"

#if CUDART_VERSION < 12000
#error "tally::cuda needs CUDA 12 or newer"
#endif

namespace tally::inline v0::device {

namespace cuda {

/// `what`: what was asked for.
inline void check(cudaError_t result, std::initializer_list<tally::detail::Piece> what) {
  if (result == cudaSuccess) return;
  (void)cudaGetLastError();  // the next call is not to find it
  const Errc code = result == cudaErrorMemoryAllocation ? Errc::no_resources : result == cudaErrorInvalidValue || result == cudaErrorInvalidResourceHandle || result == cudaErrorInvalidDevice ? Errc::invalid_argument : Errc::unsupported;
  throw Error(code, {tally::detail::concat(what), ": CUDA says ", cudaGetErrorName(result), ", ", cudaGetErrorString(result)});
}
inline std::string version_text(int version) { return tally::detail::concat({version / 1000, ".", version % 1000 / 10}); }

/// The calling thread's current device, for as long as this lives.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), {"the current GPU"});
    if (before_ != device) check(cudaSetDevice(device), {"GPU ", device});
    changed_ = before_ != device;
  }
  Current(const Current&) = delete;
  ~Current() {
    if (changed_) (void)cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};
/// What this thread does meanwhile does not disturb streams that are being captured.
class BesideCapture {
 public:
  BesideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  ~BesideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// All kernels that the program may launch: loading one later may wait for those that run.
class Kernels {
 public:
  static Kernels& all() {
    static Kernels instance;
    return instance;
  }
  bool add(const void* kernel) {
    const std::lock_guard lock(mutex_);
    kernels_.push_back(kernel);
    return true;
  }
  /// On the current device.
  void load() {
    const std::lock_guard lock(mutex_);
    for (const void* kernel : kernels_) {
      cudaFuncAttributes attributes;
      check(cudaFuncGetAttributes(&attributes, kernel), {"loading a kernel (was the program compiled for this GPU's architecture? See nvcc's -arch)"});
    }
  }

 private:
  std::mutex mutex_;
  std::vector<const void*> kernels_;
};

#if defined(__CUDACC__)
inline constexpr int most_threads = 512;
template <class K>
__global__ void __launch_bounds__(most_threads, 1) run(const __grid_constant__ K kernel) {
  __shared__ BlockShared shared;
  CudaBlock block(shared, 0, static_cast<int>(gridDim.x));
  kernel(block);
}
template <class K>
inline const bool is_known = Kernels::all().add(reinterpret_cast<const void*>(&run<K>));
#endif

}  // namespace cuda

#if defined(__CUDACC__)
class CudaDriver {
 public:
  using Block = CudaBlock;
  using Stream = cudaStream_t;
  using Event = std::shared_ptr<CUevent_st>;
  static constexpr std::string_view name = "cuda";

  /// `device`: as CUDA numbers them; -1: the calling thread's current one. Errc::unsupported where there is none, or the driver is too old.
  explicit CudaDriver(int device = -1) : device_(device) {
    int count = 0, driver = 0;
    const cudaError_t found = cudaGetDeviceCount(&count);
    (void)cudaDriverGetVersion(&driver);
    if (driver == 0) throw Error(Errc::unsupported, "there is no NVIDIA driver here (libcuda.so.1), or this container does not see it");
    if (found == cudaErrorInsufficientDriver || driver / 1000 < CUDART_VERSION / 1000)
      throw Error(Errc::unsupported, {"the NVIDIA driver is for CUDA ", cuda::version_text(driver), " at most, this program was built with ", cuda::version_text(CUDART_VERSION), ": update the driver, or build with an older CUDA"});
    cuda::check(found, {"looking for GPUs"});
    if (count == 0) throw Error(Errc::unsupported, "CUDA finds no GPU: is CUDA_VISIBLE_DEVICES empty?");
    if (device_ < 0) cuda::check(cudaGetDevice(&device_), {"the current GPU"});
    if (device_ >= count) throw Error(Errc::invalid_argument, {"there is no GPU ", device_, "; CUDA finds ", count, ", from 0 on"});
    cudaDeviceProp properties;
    cuda::check(cudaGetDeviceProperties(&properties, device_), {"the properties of GPU ", device_});
    if (properties.major < 7) throw Error(Errc::unsupported, {"GPU ", device_, " (", properties.name, ") has compute capability ", properties.major, ".", properties.minor, "; 7.0 is the least that can be used"});
    std::memcpy(id_.data(), &properties.uuid, id_.size());
    processors_ = properties.multiProcessorCount;
    const cuda::Current current(device_);
    cuda::Kernels::all().load();
    const cuda::BesideCapture beside;
    cudaStream_t own = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), {"a stream of GPU ", device_});
    own_.reset(own, [](cudaStream_t stream) { ignore(cudaStreamDestroy(stream)); });
    make_pool();
    host_ = tally::detail::hash_text(tally::detail::sharing_id());
    process_ = tally::detail::hash_text(tally::detail::concat({tally::detail::sharing_id(), " ", static_cast<std::int64_t>(::getpid())}));
  }

  int device() const { return device_; }
  /// For device_meters() of tally/energy.hpp.
  std::string meter_key() const {
    std::string text = "gpu-GPU-";
    for (std::size_t i = 0; i < id_.size(); ++i) {
      for (const int half : {id_[i] >> 4, id_[i] & 15}) text += "0123456789abcdef"[half];
      if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
    }
    return text;
  }
  DeviceId id() const { return id_; }
  int most_blocks() const { return processors_; }
  int most_threads() const { return cuda::most_threads; }
  std::uint64_t process() const { return process_; }
  std::uint64_t host() const { return host_; }
  /// NVLink where there are atomic operations between the two, which PCIe has not.
  Link link_to(const DeviceId& other) const {
    if (other == id_) return Link::same_device;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) return Link::unknown;
    for (int d = 0; d < count; ++d) {
      cudaDeviceProp properties;
      if (d == device_ || cudaGetDeviceProperties(&properties, d) != cudaSuccess || std::memcmp(&properties.uuid, other.data(), other.size()) != 0) continue;
      int atomics = 0, possible = 0;
      (void)cudaDeviceCanAccessPeer(&possible, device_, d);
      (void)cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device_, d);
      return !possible ? Link::unknown : atomics ? Link::nvlink : Link::pcie;
    }
    return Link::unknown;
  }

  std::byte* allocate(std::size_t bytes) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    void* memory = nullptr;
    constexpr std::size_t own = std::size_t{2} << 20;  // what is shared is shared whole: smaller allocations lie together
    const std::size_t rounded = (bytes + own - 1) / own * own;
    const cudaError_t result = cudaMalloc(&memory, rounded);
    return zero(result, memory, rounded);
  }
  void release(std::byte* memory) {
    const cuda::BesideCapture beside;
    if (memory) ignore(cudaFree(memory));
  }
  std::byte* allocate_private(std::size_t bytes) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    void* memory = nullptr;
    const cudaError_t result = cudaMallocFromPoolAsync(&memory, bytes, pool_.get(), own_.get());
    return zero(result, memory, bytes);
  }
  void release_private(std::byte* memory) {
    const cuda::BesideCapture beside;
    if (memory) ignore(cudaFreeAsync(memory, own_.get()));
  }
  std::byte* allocate_host(std::size_t bytes) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    void* memory = nullptr;
    const cudaError_t result = cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
    if (result == cudaErrorMemoryAllocation) return (void)cudaGetLastError(), nullptr;
    cuda::check(result, {bytes, " bytes of the host's memory that GPU ", device_, " can write"});
    std::memset(memory, 0, bytes);
    return static_cast<std::byte*>(memory);
  }
  void release_host(std::byte* memory) {
    const cuda::BesideCapture beside;
    if (memory) ignore(cudaFreeHost(memory));
  }
  Handle handle_of(std::byte* memory, std::size_t bytes) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    Handle handle{process_, reinterpret_cast<std::uintptr_t>(memory), bytes, device_, 0, {}};
    cudaIpcMemHandle_t shared;
    static_assert(sizeof shared == sizeof handle.shared);
    if (cudaIpcGetMemHandle(&shared, memory) == cudaSuccess) {
      handle.is_shareable = 1;
      std::memcpy(handle.shared.data(), &shared, sizeof shared);
    } else {
      (void)cudaGetLastError();  // ranks of this process do not need it
    }
    return handle;
  }
  std::byte* open(const Handle& handle) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    if (handle.process == process_) {
      if (handle.device != device_) {
        int possible = 0;
        cuda::check(cudaDeviceCanAccessPeer(&possible, device_, handle.device), {"access of GPU ", device_, " to GPU ", handle.device});
        if (!possible) throw Error(Errc::unsupported, {"GPU ", device_, " cannot access the memory of GPU ", handle.device, ": they are not connected in a way that allows it"});
        const cudaError_t result = cudaDeviceEnablePeerAccess(handle.device, 0);
        if (result == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
        else cuda::check(result, {"access of GPU ", device_, " to GPU ", handle.device});
      }
      return reinterpret_cast<std::byte*>(handle.address);
    }
    if (!handle.is_shareable) throw Error(Errc::unsupported, "it cannot be shared between processes there (CUDA IPC)");
    cudaIpcMemHandle_t shared;
    std::memcpy(&shared, handle.shared.data(), sizeof shared);
    void* memory = nullptr;
    cuda::check(cudaIpcOpenMemHandle(&memory, shared, cudaIpcMemLazyEnablePeerAccess), {"opening another process's memory (CUDA IPC needs the same container, and its GPU to be visible here)"});
    return static_cast<std::byte*>(memory);
  }
  void close(const Handle& handle, std::byte* memory) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    if (handle.process != process_) ignore(cudaIpcCloseMemHandle(memory));
  }
  void upload(std::byte* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, own_.get()), {"copying ", bytes, " bytes to GPU ", device_});
    cuda::check(cudaStreamSynchronize(own_.get()), {"copying ", bytes, " bytes to GPU ", device_});
  }
  Memory memory_at(const void* data) const {
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, data) != cudaSuccess) return (void)cudaGetLastError(), Memory::unknown;
    switch (attributes.type) {
      case cudaMemoryTypeManaged: return Memory::device;
      case cudaMemoryTypeDevice: return attributes.device == device_ ? Memory::device : Memory::other_device;
      case cudaMemoryTypeHost: return Memory::host;
      default: return Memory::unknown;
    }
  }

  /// Streams beyond CUDA_DEVICE_MAX_CONNECTIONS share queues of the GPU, in which one kernel keeps back another that it waits for.
  void expect_neighbours(int ranks) {
    neighbours_ = ranks;
    constexpr int per_rank = 2;  // the caller's and own_
    if (const int queues = connections(); ranks > 0 && per_rank * (ranks + 1) > queues)
      throw Error(Errc::no_resources, {ranks + 1, " ranks of this process share GPU ", device_, ", with ", per_rank, " streams each, and CUDA has ", queues, " queues for them, in which kernels would be kept back that others wait for: set CUDA_DEVICE_MAX_CONNECTIONS to at least ", per_rank * (ranks + 1), " (32 at most) before the program starts, or let ranks be processes"});
  }
  bool captures(Stream stream) const {
    const cuda::Current current(device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream, &status), {"the stream"});
    if (status == cudaStreamCaptureStatusInvalidated) throw Error(Errc::invalid_argument, "the capture of this stream has failed before");
    if (status == cudaStreamCaptureStatusActive) return true;  // the graph may be launched on any stream
#if CUDART_VERSION >= 12080
    int where = device_;
    cuda::check(cudaStreamGetDevice(stream, &where), {"the stream"});
    if (where != device_) throw Error(Errc::invalid_argument, {"the stream is of GPU ", where, ", this communicator of GPU ", device_});
#endif
    unsigned flags = cudaStreamNonBlocking;
    if (neighbours_ > 0) cuda::check(cudaStreamGetFlags(stream, &flags), {"the stream"});
    if (!(flags & cudaStreamNonBlocking)) throw Error(Errc::invalid_argument, {"this stream and the default stream of CUDA let one kernel run after the other, and ", neighbours_ + 1, " ranks of this process share GPU ", device_, ", whose kernels wait for each other: use streams made with cudaStreamNonBlocking"});
    return false;
  }
  std::uint64_t identity(Stream stream) const {
    const cuda::Current current(device_);
    unsigned long long id = 0;
    cuda::check(cudaStreamGetId(stream, &id), {"the stream"});
    return id;
  }
  /// So that what is called from there leaves other devices alone: to go back to one would begin with it.
  void attach() { cuda::check(cudaSetDevice(device_), {"GPU ", device_}); }
  /// Copies out of ordinary memory have read it when they return.
  void post(std::byte* to, std::uint32_t word) {
    const cuda::Current current(device_);
    const cuda::BesideCapture beside;
    cuda::check(cudaMemcpyAsync(to, &word, sizeof word, cudaMemcpyHostToDevice, own_.get()), {"telling of an abort by GPU ", device_});
  }
  std::string problem(Stream stream) const {
    const cuda::Current current(device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t result = cudaStreamIsCapturing(stream, &status);
    if (result == cudaSuccess && status != cudaStreamCaptureStatusNone) return {};  // asking would end the capture
    const cuda::BesideCapture beside;
    if (result == cudaSuccess) result = cudaStreamQuery(stream);
    ignore(result);
    if (result == cudaSuccess || result == cudaErrorNotReady) return {};
    return tally::detail::concat({"CUDA says ", cudaGetErrorName(result), ", ", cudaGetErrorString(result)});
  }
  void record(Event& event, Stream stream) {
    const cuda::Current current(device_);
    if (!event) {
      cudaEvent_t made = nullptr;
      cuda::check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), {"an event of GPU ", device_});
      event.reset(made, [](cudaEvent_t each) { ignore(cudaEventDestroy(each)); });
    }
    cuda::check(cudaEventRecord(event.get(), stream), {"an event of GPU ", device_});
  }
  void order_after(Stream stream, Event& event) {
    const cuda::Current current(device_);
    cuda::check(cudaStreamWaitEvent(stream, event.get(), 0), {"the order of two streams of GPU ", device_});
  }
  template <Kernel<CudaBlock> K>
  void launch(const K& kernel, int blocks, int threads, Stream stream) {
    static_assert(sizeof(K) <= 4096, "what a kernel is told has to fit into its parameters: is the operator so large?");
    (void)cuda::is_known<K>;
    const cuda::Current current(device_);
    void* arguments[] = {const_cast<K*>(&kernel)};
    cuda::check(cudaLaunchKernel(reinterpret_cast<const void*>(&cuda::run<K>), dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments, 0, stream), {"launching ", blocks, " blocks of ", threads, " threads on GPU ", device_});
  }

 private:
  /// What CUDA says to this is of no use to anybody, nor is the next call to find it.
  static void ignore(cudaError_t result) {
    if (result != cudaSuccess) (void)cudaGetLastError();
  }
  static int connections() {
    int many = 8;
    if (const char* const text = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS")) (void)std::from_chars(text, text + std::strlen(text), many);
    return std::clamp(many, 1, 32);
  }
  /// It keeps what it has: giving memory back to the system would wait for kernels. What is free in it waits for none either.
  void make_pool() {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device_;
    cudaMemPool_t pool = nullptr;
    cuda::check(cudaMemPoolCreate(&pool, &properties), {"a pool of GPU ", device_, "'s memory"});
    pool_.reset(pool, [](cudaMemPool_t each) { ignore(cudaMemPoolDestroy(each)); });
    std::uint64_t all = ~std::uint64_t{0};
    int never = 0;
    cuda::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), {"a pool of GPU ", device_, "'s memory"});
    cuda::check(cudaMemPoolSetAttribute(pool, cudaMemPoolReuseAllowInternalDependencies, &never), {"a pool of GPU ", device_, "'s memory"});
  }
  std::byte* zero(cudaError_t result, void* memory, std::size_t bytes) const {
    if (result == cudaErrorMemoryAllocation) return (void)cudaGetLastError(), nullptr;
    cuda::check(result, {bytes, " bytes of GPU ", device_});
    cuda::check(cudaMemsetAsync(memory, 0, bytes, own_.get()), {bytes, " bytes of GPU ", device_});
    cuda::check(cudaStreamSynchronize(own_.get()), {bytes, " bytes of GPU ", device_});
    return static_cast<std::byte*>(memory);
  }
  int device_, processors_ = 0, neighbours_ = 0;
  DeviceId id_{};
  std::uint64_t process_ = 0, host_ = 0;
  std::shared_ptr<CUmemPoolHandle_st> pool_;
  std::shared_ptr<CUstream_st> own_;
};
static_assert(Driver<CudaDriver>);
#endif

}  // namespace tally::inline v0::device
