// SPDX-License-Identifier: Apache-2.0
// A block of a CUDA kernel as the protocol sees it: which instructions give the order that it relies on, in PTX's memory model, at the
// scope of the whole system, since the other ranks may be on other devices. Empty for other compilers.
#pragma once

#include <cstdint>

#include "seam.hpp"

#if defined(__CUDACC__)
namespace tally::inline v0::device {

class CudaBlock {
 public:
  /// The rank's blocks are `first` to `first + blocks - 1` of the grid.
  __device__ CudaBlock(BlockShared& shared, int first, int blocks) : shared_(shared), first_(first), blocks_(blocks) {}
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int index() const { return static_cast<int>(blockIdx.x) - first_; }
  __device__ int blocks() const { return blocks_; }
  __device__ BlockShared& shared() { return shared_; }
  __device__ void sync() { __syncthreads(); }
  __device__ bool any(bool one) { return __syncthreads_or(one) != 0; }
  __device__ static std::uint32_t load(const std::uint32_t* word) {
    std::uint32_t value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
  }
  __device__ static void store(std::uint32_t* word, std::uint32_t value) { asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory"); }
  template <class T>
  __device__ static void note(T& word, T value) {
    *static_cast<volatile T*>(&word) = value;
  }
  template <class T>
  __device__ static T noted(const T& word) {
    return *static_cast<const volatile T*>(&word);
  }
  /// As two words of eight bytes: of vectors each element is loaded and stored at once, not the whole.
  __device__ static Packet load_packet(const Packet* from) {
    std::uint64_t low, high;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(__cvta_generic_to_global(from)) : "memory");
    return {static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32), static_cast<std::uint32_t>(high), static_cast<std::uint32_t>(high >> 32)};
  }
  __device__ static void store_packet(Packet* to, const Packet& p) {
    const std::uint64_t low = std::uint64_t{p.low_epoch} << 32 | p.low, high = std::uint64_t{p.high_epoch} << 32 | p.high;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "l"(low), "l"(high) : "memory");
  }
  __device__ static std::uint64_t now() {
    std::uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
  }
  /// Who has waited for long leaves the processor to others, and saves power.
  __device__ static void pause(std::uint32_t polls) {
    if (polls > 1024) __nanosleep(polls < 16384 ? 100 : 1000);
  }

 private:
  BlockShared& shared_;
  int first_, blocks_;
};
static_assert(Block<CudaBlock>);

}  // namespace tally::inline v0::device
#endif
