// SPDX-License-Identifier: Apache-2.0
// Shows operations to NVIDIA's tools (Nsight Systems) as ranges of the domain "tally". Needs NVTX 3, which is headers only:
// the CMake target tally::nvtx finds it, or name the folder that has nvtx3/ to the compiler.
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <cstdint>
#include <cstdio>
#include <memory>

#include "account/observer.hpp"

namespace tally::inline v0 {

/// For Options::observer. A range is an operation from its call to its end, also in the background: "all_reduce ring 4194304 B #7";
/// its payload is bytes. Without a tool that listens a range costs some nanoseconds.
class NvtxRanges final : public Observer {
 public:
  NvtxRanges() : domain_(nvtxDomainCreateA("tally")) {}
  ~NvtxRanges() override { nvtxDomainDestroy(domain_); }
  NvtxRanges(const NvtxRanges&) = delete;
  NvtxRanges& operator=(const NvtxRanges&) = delete;

  std::uint64_t begun(const OperationBegin& operation) override {
    if (!domain_) return 0;  // nobody listens
    char text[128];
    const auto name = name_of(operation.operation);
    std::snprintf(text, sizeof text, "%.*s %.*s %llu B #%u", static_cast<int>(name.size()), name.data(), static_cast<int>(operation.algorithm.size()), operation.algorithm.data(), static_cast<unsigned long long>(operation.bytes), operation.sequence);
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.category = static_cast<std::uint32_t>(operation.operation);
    event.payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
    event.payload.ullValue = operation.bytes;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = text;
    return nvtxDomainRangeStartEx(domain_, &event);
  }
  void ended(std::uint64_t range, const Report&, bool) override {
    if (domain_) nvtxDomainRangeEnd(domain_, range);
  }

 private:
  nvtxDomainHandle_t domain_;
};

}  // namespace tally::inline v0
