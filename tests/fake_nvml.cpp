// SPDX-License-Identifier: Apache-2.0
// Stands in for libnvidia-ml.so.1. With FAKE_OLD it is one of before Volta, which lacks functions.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "fake_gpus.hpp"

namespace {

FakeGpus fake;
constexpr int success = 0, uninitialized = 1, invalid_argument = 2;

FakeGpu* gpu_of(void* device) {
  auto* const gpu = static_cast<FakeGpu*>(device);
  return fake.initialised > 0 && gpu >= fake.gpus && gpu < fake.gpus + 4 ? gpu : nullptr;
}

}  // namespace

extern "C" {

FakeGpus* fake_gpus() { return &fake; }

int nvmlInit_v2() {
  if (fake.init_error == success) ++fake.initialised;
  return fake.init_error;
}
int nvmlShutdown() { return fake.initialised > 0 ? --fake.initialised, success : uninitialized; }
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = fake.claimed != 0 ? fake.claimed : fake.count;
  return fake.count_error;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (index >= fake.count) return invalid_argument;
  *device = &fake.gpus[index];
  return fake.gpus[index].handle_error;
}
int nvmlDeviceGetUUID(void* device, char* text, unsigned size) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu) return uninitialized;
  if (gpu->uuid_error == success) std::memcpy(text, gpu->uuid, std::min<std::size_t>(size, sizeof gpu->uuid));
  return gpu->uuid_error;
}
int nvmlDeviceGetPciInfo_v3(void* device, void* info) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu) return uninitialized;
  const unsigned numbers[] = {gpu->domain, gpu->bus, gpu->device};
  std::memcpy(static_cast<char*>(info) + 16, numbers, sizeof numbers);  // busIdLegacy is 16 characters
  std::memset(static_cast<char*>(info) + 36, 'x', 32);                 // busId without an end
  return gpu->slot_error;
}
int nvmlDeviceGetPowerUsage(void* device, unsigned* milliwatts) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu) return uninitialized;
  *milliwatts = static_cast<unsigned>(std::lround((gpu->watts + gpu->slope * static_cast<double>(fake.now) * 1e-9) * 1e3));
  return gpu->power_error;
}

#ifndef FAKE_OLD
int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* millijoules) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu) return uninitialized;
  *millijoules = gpu->raw_counter != 0 ? gpu->raw_counter : static_cast<unsigned long long>(std::llround(gpu->joules(fake.now) * 1e3));
  fake.now += fake.latency;
  return gpu->energy_error;
}
int nvmlDeviceGetMigMode(void* device, unsigned* current, unsigned* pending) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu) return uninitialized;
  *current = *pending = gpu->mig;
  return gpu->mig_error;
}

constexpr int not_supported = 3;

struct FieldValue {
  unsigned field, scope;
  long long timestamp, latency;
  int type, result;
  union {
    double real;
    int integer;
    unsigned natural;
    unsigned long long longest;
    unsigned short small;
  } value;
};
int nvmlDeviceGetFieldValues(void* device, int count, FieldValue* values) {
  const FakeGpu* const gpu = gpu_of(device);
  if (!gpu || count < 1) return invalid_argument;
  for (FieldValue* v = values; v != values + count; ++v) {
    v->result = v->field != 186 || v->scope > 1 || (v->scope == 1 && gpu->module_watts == 0) ? not_supported : v->scope == 0 ? gpu->field_error : success;
    if (v->result != success) continue;
    const double milliwatts = ((v->scope == 1 ? gpu->module_watts : gpu->watts) + gpu->slope * static_cast<double>(fake.now) * 1e-9) * 1e3;
    v->type = gpu->value_type;
    switch (v->type) {
      case 0: v->value.real = gpu->raw_power; break;
      case 3:
      case 4: v->value.longest = static_cast<unsigned long long>(std::llround(milliwatts)); break;
      case 5: v->value.integer = static_cast<int>(std::lround(milliwatts)); break;
      case 6: v->value.small = static_cast<unsigned short>(std::lround(milliwatts)); break;
      default: v->value.natural = static_cast<unsigned>(std::lround(milliwatts));
    }
  }
  return success;
}
#endif

}  // extern "C"
