/* SPDX-License-Identifier: Apache-2.0
   Stands in for NVTX 3: what tally/nvtx.hpp uses of it, and a list of what was called. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

struct FakeNvtx {
  struct Range {
    std::string message;
    std::uint64_t payload = 0;
    bool ended = false;
  };
  std::mutex mutex;  // ranks are threads
  std::vector<Range> ranges;
  std::vector<std::string> domains;
  int destroyed = 0, wrong = 0;
  bool listening = true;
};
inline FakeNvtx fake_nvtx;

typedef FakeNvtx* nvtxDomainHandle_t;
typedef std::uint64_t nvtxRangeId_t;
struct nvtxEventAttributes_t {
  std::uint16_t version, size;
  std::uint32_t category;
  std::int32_t colorType;
  std::uint32_t color;
  std::int32_t payloadType, reserved0;
  union {
    std::uint64_t ullValue;
  } payload;
  std::int32_t messageType;
  union {
    const char* ascii;
  } message;
};
#define NVTX_VERSION 3
#define NVTX_EVENT_ATTRIB_STRUCT_SIZE (static_cast<std::uint16_t>(sizeof(nvtxEventAttributes_t)))
enum { NVTX_PAYLOAD_TYPE_UNSIGNED_INT64 = 1, NVTX_MESSAGE_TYPE_ASCII = 1 };

inline nvtxDomainHandle_t nvtxDomainCreateA(const char* name) {
  const std::lock_guard lock(fake_nvtx.mutex);
  fake_nvtx.domains.emplace_back(name);
  return fake_nvtx.listening ? &fake_nvtx : nullptr;
}
inline void nvtxDomainDestroy(nvtxDomainHandle_t) { ++fake_nvtx.destroyed; }
inline nvtxRangeId_t nvtxDomainRangeStartEx(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const std::lock_guard lock(domain->mutex);
  if (event->version != NVTX_VERSION || event->size != sizeof *event || event->messageType != NVTX_MESSAGE_TYPE_ASCII || event->payloadType != NVTX_PAYLOAD_TYPE_UNSIGNED_INT64) ++domain->wrong;
  domain->ranges.push_back({event->message.ascii, event->payload.ullValue, false});
  return domain->ranges.size();
}
inline void nvtxDomainRangeEnd(nvtxDomainHandle_t domain, nvtxRangeId_t range) {
  const std::lock_guard lock(domain->mutex);
  if (range == 0 || range > domain->ranges.size() || domain->ranges[range - 1].ended) return void(++domain->wrong);
  domain->ranges[range - 1].ended = true;
}
