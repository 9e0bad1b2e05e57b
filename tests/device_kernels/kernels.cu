// SPDX-License-Identifier: Apache-2.0
// The device protocol in CUDA kernels, of each kind of element and operator: it compiles. Where nothing runs it, nothing is proven of
// what the processor makes of it.
#include <complex>

#include <tally/device/cuda_block.hpp>
#include <tally/device/interpreter.hpp>
#include <tally/device/packets.hpp>
#include <tally/device/share.hpp>

using namespace tally;

namespace {

struct Affine {
  unsigned a, b;
};
struct Compose {
  __device__ Affine operator()(Affine f, Affine g) const { return {f.a * g.a, g.a * f.b + g.b}; }
};

template <class T, class F>
__global__ void packets(device::RankView view, device::PacketWork work, F folder) {
  __shared__ device::BlockShared shared;
  device::CudaBlock block(shared, 0, static_cast<int>(gridDim.x));
  device::run_packets<T, 8, true>(block, view, work, folder);
}
template <class T, class F>
__global__ void share(device::RankView view, device::ShareWork work, F folder) {
  __shared__ device::BlockShared shared;
  device::CudaBlock block(shared, 0, static_cast<int>(gridDim.x));
  device::run_share<T, 8, false>(block, view, work, folder);
}
template <class T, class F>
__global__ void steps(device::RankView view, const device::StepsWork* works, F folder) {
  __shared__ device::BlockShared shared;
  device::CudaBlock block(shared, 0, static_cast<int>(gridDim.x));
  device::run_steps<T, true>(block, view, works[blockIdx.x], folder);
}

template <class T, class Op>
void both(const device::RankView& view, Op op) {
  const device::Folder<T, Op> folder{op, view.n};
  packets<T><<<1, 128>>>(view, device::PacketWork{}, folder);
  share<T><<<1, 128>>>(view, device::ShareWork{}, folder);
}

}  // namespace

void launch_all(const device::RankView& view) {
  both<float>(view, sum);
  both<bf16>(view, mean);
  both<f16>(view, tally::max);
  both<fp8_e4m3>(view, premultiplied_sum(0.5f));
  both<std::complex<float>>(view, prod);
  both<std::int8_t>(view, bxor);
  both<Affine>(view, Compose{});
  steps<float><<<1, 128>>>(view, nullptr, device::Folder<float, Sum>{sum, view.n});
  steps<bf16><<<1, 128>>>(view, nullptr, device::Folder<bf16, Mean>{mean, view.n});
  share<double><<<1, 128>>>(view, device::ShareWork{}, device::Mover<double>{});
}
