// SPDX-License-Identifier: Apache-2.0
// The energy of AMD's GPUs, by its library AMD SMI, which is opened at run time. Only for a thread that does nothing else: asked by
// several at once the library has been seen to mix its readings up (ROCm/amdsmi#115).
//
// Facts: signatures, numbers and layouts are those of amdsmi.h. The accumulator counts steps of counter_resolution microjoules
// (15.3), not microjoules (#38). Virtual machines have none. It has been seen to stand still (#22, #38). The second die of
// a card of two (MI250X) shows 0: the first one's counter has both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../text.hpp"
#include "dynamic_library.hpp"
#include "gpu_board.hpp"
#include "meter.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

struct AmdSmiOptions {
  std::string library = "libamd_smi.so";  // often in /opt/rocm/lib
  MeterClock clock = monotonic_time;
  double max_watts = 5000;  // more than any board draws
};

namespace detail {

// As in amdsmi.h.
inline constexpr std::uint32_t amdsmi_success = 0, amdsmi_not_supported = 2, amdsmi_not_yet_implemented = 3, amdsmi_drm_error = 6, amdsmi_no_permission = 10, amdsmi_io = 12,
                               amdsmi_file_error = 14, amdsmi_busy = 30, amdsmi_not_found = 31, amdsmi_not_init = 32, amdsmi_driver_not_loaded = 34, amdsmi_no_data = 40;
inline constexpr std::uint64_t amdsmi_init_gpus = 1u << 1;
inline constexpr std::uint32_t amdsmi_processor_gpu = 1;
inline constexpr unsigned amdsmi_uuid_size = 38;
using AmdSmiHandle = void*;

inline std::string amdsmi_text(std::uint32_t code) {
  const char* text = "an error that tally does not know";
  switch (code) {
    case amdsmi_not_supported:
    case amdsmi_not_yet_implemented: text = "not supported, as in virtual machines"; break;
    case amdsmi_drm_error: text = "libdrm failed"; break;
    case amdsmi_no_permission: text = "no permission"; break;
    case amdsmi_io:
    case amdsmi_file_error: text = "a file of the driver cannot be read"; break;
    case amdsmi_busy: text = "the device is busy"; break;
    case amdsmi_not_found: text = "not found"; break;
    case amdsmi_not_init: text = "not initialised"; break;
    case amdsmi_driver_not_loaded: text = "the driver is not loaded"; break;
    case amdsmi_no_data: text = "no data"; break;
    default: break;
  }
  return concat({text, " (AMD SMI error ", code, ")"});
}
inline Caveat amdsmi_caveat(std::uint32_t code) {
  switch (code) {
    case amdsmi_no_permission: return Caveat::permission_denied;
    case amdsmi_not_found:
    case amdsmi_driver_not_loaded: return Caveat::vanished;
    default: return Caveat::unreadable;
  }
}

/// AMD SMI, initialised. It is never shut down: it does not count who initialised it, so that would take it from others in the process.
class AmdSmiLibrary {
 public:
  explicit AmdSmiLibrary(const std::string& name) : library_(name) {
    std::uint32_t (*init)(std::uint64_t) = nullptr;
    if (!library_ || !library_.need(init, "amdsmi_init") || !library_.need(sockets_, "amdsmi_get_socket_handles") || !library_.need(processors_, "amdsmi_get_processor_handles") ||
        !library_.need(energy_, "amdsmi_get_energy_count")) {
      error_ = library_.error();
      return;
    }
    library_.find(type_, "amdsmi_get_processor_type");
    library_.find(slot_, "amdsmi_get_gpu_device_bdf");
    library_.find(uuid_, "amdsmi_get_gpu_device_uuid");
    if (const std::uint32_t code = init(amdsmi_init_gpus); code != amdsmi_success) error_ = concat({name, ": ", amdsmi_text(code)});
  }

  /// Why it cannot be used; empty if it can.
  const std::string& error() const { return error_; }
  /// All GPUs of all sockets, or what went wrong.
  std::string gpus(std::vector<AmdSmiHandle>& found) const {
    std::vector<AmdSmiHandle> sockets, processors;
    if (std::string wrong = list(sockets, "sockets", sockets_); !wrong.empty()) return wrong;
    for (const AmdSmiHandle socket : sockets) {
      const auto of_socket = [this, socket](std::uint32_t* count, AmdSmiHandle* handles) { return processors_(socket, count, handles); };
      if (std::string wrong = list(processors, "GPUs", of_socket); !wrong.empty()) return wrong;
      for (const AmdSmiHandle processor : processors) {
        std::uint32_t type = amdsmi_processor_gpu;
        if (type_ && (type_(processor, &type) != amdsmi_success || type != amdsmi_processor_gpu)) continue;
        if (found.size() == most_gpus) return concat({"AMD SMI claims to have more than ", most_gpus, " GPUs"});
        found.push_back(processor);
      }
    }
    return {};
  }
  std::optional<PciSlot> slot(AmdSmiHandle gpu) const {
    std::uint64_t bits = 0;  // function 3, device 5, bus 8, domain 48
    if (!slot_ || slot_(gpu, &bits) != amdsmi_success) return {};
    return PciSlot{bits >> 16, (bits >> 8) & 0xff, (bits >> 3) & 0x1f};
  }
  /// Empty if unknown.
  std::string uuid(AmdSmiHandle gpu) const {
    char text[amdsmi_uuid_size + 2] = {};
    unsigned length = amdsmi_uuid_size;
    return uuid_ && uuid_(gpu, &length, text) == amdsmi_success ? plain_name(text, amdsmi_uuid_size + 1) : std::string();
  }
  struct Count {
    std::uint64_t steps = 0;
    float microjoules = 0;  // of a step
    bool is_number() const { return steps != ~std::uint64_t{0} && microjoules > 0 && microjoules <= 1e6f; }
  };
  std::uint32_t energy(AmdSmiHandle gpu, Count& count) const {
    std::uint64_t timestamp = 0;
    return energy_(gpu, &count.steps, &count.microjoules, &timestamp);
  }

 private:
  /// Asks how many there are, then for them.
  template <class F>
  static std::string list(std::vector<AmdSmiHandle>& handles, const char* what, F&& ask) {
    std::uint32_t count = 0;
    std::uint32_t code = ask(&count, nullptr);
    if (code == amdsmi_success && count > most_gpus) return concat({"AMD SMI claims to have ", count, " ", what});
    handles.assign(count, nullptr);
    if (code == amdsmi_success && count > 0) code = ask(&count, handles.data());
    if (code != amdsmi_success) return concat({"AMD SMI does not tell its ", what, ": ", amdsmi_text(code)});
    handles.resize(std::min<std::size_t>(handles.size(), count));  // some went meanwhile
    return {};
  }

  DynamicLibrary library_;
  std::uint32_t (*sockets_)(std::uint32_t*, AmdSmiHandle*) = nullptr;
  std::uint32_t (*processors_)(AmdSmiHandle, std::uint32_t*, AmdSmiHandle*) = nullptr;
  std::uint32_t (*energy_)(AmdSmiHandle, std::uint64_t*, float*, std::uint64_t*) = nullptr;
  std::uint32_t (*type_)(AmdSmiHandle, std::uint32_t*) = nullptr;
  std::uint32_t (*slot_)(AmdSmiHandle, std::uint64_t*) = nullptr;
  std::uint32_t (*uuid_)(AmdSmiHandle, unsigned*, char*) = nullptr;
  std::string error_;
};

}  // namespace detail

/// One domain per board, key "gpu-" and its PCI address (its UUID where the library does not tell it; AMD's are not unique on
/// all cards). Its joules are steps of its energy counter times their size. The partitions of one board are the same domain.
/// The counter's tick is not documented: 100 ms is a cautious assumption, as is the relative error of 5 %. What fails is in
/// warnings(); it never throws but for options that make no sense. A board that fails keeps its total and is asked
/// again with every reading.
class AmdSmi {
 public:
  explicit AmdSmi(AmdSmiOptions options = {}) : options_(std::move(options)) {
    detail::check_gpu_options("AmdSmiOptions", options_.clock, options_.max_watts);
    library_ = std::make_unique<detail::AmdSmiLibrary>(options_.library);
    std::string wrong = library_->error();
    std::vector<detail::AmdSmiHandle> gpus;
    if (wrong.empty()) wrong = library_->gpus(gpus);
    if (!wrong.empty()) warnings_.add(detail::concat({"AMD GPUs are not measured: ", wrong}));
    else
      for (std::uint32_t index = 0; index < gpus.size(); ++index) add_gpu(index, gpus[index]);
  }

  std::span<const DomainInfo> domains() const { return domains_; }
  const std::vector<std::string>& warnings() const { return warnings_.all(); }
  /// The key of the board that a program knows as its number (the library's), its PCI address (hipDeviceGetPCIBusId) or its UUID (the
  /// library's) or a beginning of it. Empty if none is measured.
  std::string key_of(std::string_view uuid_or_pci_or_index) const { return names_.key_of(uuid_or_pci_or_index); }

  SampleResult sample(std::span<MeterSample> out) noexcept {
    return detail::sample_boards(boards_, out, [this](Board& board, MeterSample& sample) { read(board, sample); });
  }

 private:
  struct Board {
    detail::AmdSmiHandle gpu;
    std::string name;  // in warnings
    float microjoules;
    Unwrapped counted;
    detail::Standstill standstill{};
  };

  void add_gpu(std::uint32_t index, detail::AmdSmiHandle gpu) {
    const std::optional<detail::PciSlot> slot = library_->slot(gpu);
    const std::string uuid = library_->uuid(gpu), number = detail::concat({"AMD GPU ", index});
    if (uuid.empty() && !slot)
      return warnings_.add(detail::concat({number, " is not measured: AMD SMI tells neither its PCI address nor its UUID, so ranks cannot agree on which one it is"}));
    const std::string identity = slot ? slot->text() : uuid, key = "gpu-" + identity, name = detail::concat({number, " (", identity, ")"});
    for (DomainInfo& other : domains_) {
      if (other.key != key) continue;
      if (!has(other.caveats, Caveat::shared_device)) warnings_.add(detail::concat({name, " is a partition of a board that is measured as a whole"}));
      other.caveats |= Caveat::shared_device;
      return names_.add({index, key, {}, {}});
    }
    detail::AmdSmiLibrary::Count count;
    if (const std::uint32_t code = library_->energy(gpu, count); code != detail::amdsmi_success)
      return warnings_.add(detail::concat({name, " is not measured: its energy counter cannot be read: ", detail::amdsmi_text(code)}));
    if (!count.is_number()) return warnings_.add(detail::concat({name, " is not measured: its energy counter holds no number"}));
    if (count.steps == 0)
      return warnings_.add(detail::concat({name, " is not measured: its energy counter is 0, like that of the second die of a card, whose first one's has both"}));
    DomainInfo info;
    info.kind = Domain::gpu_board;
    info.key = key;
    info.source = "amdsmi";
    info.tick = detail::gpu_tick;
    info.unit_joules = static_cast<double>(count.microjoules) * 1e-6;
    info.max_watts = options_.max_watts;
    domains_.push_back(std::move(info));
    names_.add({index, key, uuid, slot});
    boards_.push_back({gpu, name, count.microjoules, Unwrapped(0, static_cast<double>(count.microjoules) * 1e3, options_.max_watts)});
    MeterSample first;  // counting begins here
    read(boards_.back(), first);
  }

  void read(Board& board, MeterSample& sample) {
    detail::AmdSmiLibrary::Count count;
    const nanoseconds before = options_.clock();
    const std::uint32_t code = library_->energy(board.gpu, count);
    sample.time = before + (options_.clock() - before) / 2;
    if (code != detail::amdsmi_success) {
      sample.caveats |= detail::amdsmi_caveat(code);
      warnings_.add(detail::concat({board.name, " could not be read: ", detail::amdsmi_text(code), "; its joules meanwhile may be missing"}));
    } else if (!count.is_number() || count.microjoules != board.microjoules) {
      sample.caveats |= Caveat::unreadable;
      warnings_.add(detail::concat({board.name, " could not be read: its energy counter holds no number, or its resolution changed; its joules meanwhile may be missing"}));
    } else {
      sample.caveats |= board.counted.add(count.steps, sample.time);
      if (has(sample.caveats, Caveat::counter_reset))
        warnings_.add(detail::concat({board.name, ": its energy counter was reset or jumped by more than a board can draw: what it drew between those two readings is not counted"}));
      if (board.standstill.add(count.steps, sample.time)) {
        sample.caveats |= Caveat::stale;
        warnings_.add(detail::concat({board.name, ": its energy counter stood still for 2 s, which even an idle board's does not; ROCm 6.1 and later mend one cause"}));
      }
    }
    sample.total = board.counted.total();
  }

  AmdSmiOptions options_;
  std::unique_ptr<detail::AmdSmiLibrary> library_;
  std::vector<Board> boards_;
  std::vector<DomainInfo> domains_;
  detail::GpuNames names_;
  MeterWarnings warnings_;
};
static_assert(EnergyMeter<AmdSmi>);

}  // namespace tally::inline v0
