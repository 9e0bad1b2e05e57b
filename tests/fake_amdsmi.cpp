// SPDX-License-Identifier: Apache-2.0
// Stands in for libamd_smi.so.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fake_gpus.hpp"

namespace {

FakeGpus fake;
constexpr std::uint32_t success = 0, invalid = 1, not_init = 32;

FakeGpu* gpu_of(void* processor) {
  auto* const gpu = static_cast<FakeGpu*>(processor);
  return fake.initialised > 0 && gpu >= fake.gpus && gpu < fake.gpus + 4 ? gpu : nullptr;
}

}  // namespace

extern "C" {

FakeGpus* fake_gpus() { return &fake; }

std::uint32_t amdsmi_init(std::uint64_t flags) {
  if (flags != 2) return invalid;
  if (fake.init_error == 0) fake.initialised = 1;
  return static_cast<std::uint32_t>(fake.init_error);
}
std::uint32_t amdsmi_shut_down() { return fake.initialised = 0, success; }

std::uint32_t amdsmi_get_socket_handles(std::uint32_t* count, void** handles) {
  if (fake.initialised == 0) return not_init;
  if (!handles) *count = fake.claimed != 0 ? fake.claimed : fake.count;
  else
    for (std::uint32_t i = 0; i < *count; ++i) handles[i] = &fake.gpus[i * fake.per_socket];
  return static_cast<std::uint32_t>(fake.count_error);
}
std::uint32_t amdsmi_get_processor_handles(void* socket, std::uint32_t* count, void** handles) {
  FakeGpu* const first = gpu_of(socket);
  if (!first) return not_init;
  if (!handles) {
    *count = fake.per_socket;
    return success;
  }
  for (std::uint32_t i = 0; i < std::min(*count, fake.per_socket); ++i) handles[i] = first + i;
  *count = 4'000'000'000;  // a lie
  return success;
}
std::uint32_t amdsmi_get_processor_type(void* processor, std::uint32_t* type) {
  const FakeGpu* const gpu = gpu_of(processor);
  if (!gpu) return not_init;
  *type = static_cast<std::uint32_t>(gpu->type);
  return success;
}
std::uint32_t amdsmi_get_gpu_device_bdf(void* processor, std::uint64_t* address) {
  const FakeGpu* const gpu = gpu_of(processor);
  if (!gpu) return not_init;
  *address = static_cast<std::uint64_t>(gpu->domain) << 16 | gpu->bus << 8 | gpu->device << 3 | gpu->function;
  return static_cast<std::uint32_t>(gpu->slot_error);
}
std::uint32_t amdsmi_get_gpu_device_uuid(void* processor, unsigned* length, char* uuid) {
  const FakeGpu* const gpu = gpu_of(processor);
  if (!gpu || *length < 38) return invalid;
  std::memcpy(uuid, gpu->uuid, 38);
  *length = 38;
  return static_cast<std::uint32_t>(gpu->uuid_error);
}
std::uint32_t amdsmi_get_energy_count(void* processor, std::uint64_t* accumulator, float* resolution, std::uint64_t* timestamp) {
  const FakeGpu* const gpu = gpu_of(processor);
  if (!gpu) return not_init;
  *accumulator = gpu->raw_counter != 0 ? gpu->raw_counter : static_cast<std::uint64_t>(std::llround(gpu->joules(fake.now) * 1e6 / static_cast<double>(gpu->resolution)));
  *resolution = gpu->resolution;
  *timestamp = static_cast<std::uint64_t>(fake.now);
  fake.now += fake.latency;
  return static_cast<std::uint32_t>(gpu->energy_error);
}

}  // extern "C"
