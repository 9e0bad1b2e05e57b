// SPDX-License-Identifier: Apache-2.0
// The collectives on memory of NVIDIA GPUs, ordered on CUDA streams. Link tally::cuda, and compile what calls them with nvcc:
// kernels are made for the types and operators that are used.
#pragma once

#include "device/cuda_driver.hpp"
#include "device_communicator.hpp"

#if defined(__CUDACC__)
namespace tally::inline v0 {

/// For `CudaCommunicator(comm, CudaDriver(gpu))`.
using device::CudaDriver;
using CudaCommunicator = DeviceCommunicator<CudaDriver>;

}  // namespace tally::inline v0
#endif
