// SPDX-License-Identifier: Apache-2.0
// The energy of NVIDIA's GPUs, by its management library NVML, which is opened at run time. A reading may take milliseconds:
// only for a thread that does nothing else.
//
// Facts: return codes, field numbers and layouts are those of nvml.h (API version 13). The counter exists from Volta on, in mJ
// since the driver was loaded, moves every 20 to 100 ms, and a reading was seen to take 2.4 ms. Power may be read as an instant
// (field 186), or as nvmlDeviceGetPowerUsage, which from Ampere on, but for GA100, is the mean of the last second; A100 and
// H100 look at a quarter of the time only (arXiv:2312.02741).
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
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

struct NvmlOptions {
  std::string library = "libnvidia-ml.so.1";
  MeterClock clock = monotonic_time;
  bool counter = true;      // false: integrate power even where there is a counter
  double max_watts = 5000;  // more than any board or module draws
};

namespace detail {

// As in nvml.h.
inline constexpr int nvml_success = 0, nvml_uninitialized = 1, nvml_invalid_argument = 2, nvml_not_supported = 3, nvml_no_permission = 4, nvml_not_found = 6,
                     nvml_driver_not_loaded = 9, nvml_timeout = 10, nvml_library_not_found = 12, nvml_function_not_found = 13, nvml_gpu_is_lost = 15,
                     nvml_reset_required = 16, nvml_operating_system = 17, nvml_version_mismatch = 18, nvml_no_data = 21, nvml_unknown = 999;
using NvmlDevice = void*;
union NvmlValue {
  double real;
  int integer;
  unsigned natural;
  unsigned long long_natural;
  unsigned long long longest_natural;
  long long longest_integer;
  unsigned short short_natural;
};
struct NvmlFieldValue {
  unsigned field, scope;
  long long timestamp, latency;
  int type, code;
  NvmlValue value;
};
static_assert(sizeof(NvmlFieldValue) == 40);
struct NvmlPciInfo {
  char legacy_bus_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
};
static_assert(sizeof(NvmlPciInfo) == 68);
inline constexpr unsigned nvml_field_instant_power = 186, nvml_scope_gpu = 0, nvml_scope_module = 1;
inline constexpr std::size_t nvml_uuid_size = 96;

inline std::string nvml_text(int code) {
  const char* text = "an error that tally does not know";
  switch (code) {
    case nvml_uninitialized: text = "not initialised"; break;
    case nvml_invalid_argument: text = "invalid argument"; break;
    case nvml_not_supported: text = "not supported"; break;
    case nvml_no_permission: text = "no permission"; break;
    case nvml_not_found: text = "not found"; break;
    case nvml_driver_not_loaded: text = "the driver is not loaded"; break;
    case nvml_timeout: text = "timed out"; break;
    case nvml_library_not_found: text = "a library of the driver is missing"; break;
    case nvml_function_not_found: text = "the driver lacks this function"; break;
    case nvml_gpu_is_lost: text = "the GPU is lost"; break;
    case nvml_reset_required: text = "the GPU must be reset"; break;
    case nvml_operating_system: text = "blocked by the operating system, e.g. a device cgroup"; break;
    case nvml_version_mismatch: text = "driver and library are of different versions"; break;
    case nvml_no_data: text = "no data"; break;
    case nvml_unknown: text = "an internal error of the driver"; break;
    default: break;
  }
  return concat({text, " (NVML error ", code, ")"});
}
inline Caveat nvml_caveat(int code) {
  switch (code) {
    case nvml_no_permission:
    case nvml_operating_system: return Caveat::permission_denied;
    case nvml_not_found:
    case nvml_driver_not_loaded:
    case nvml_gpu_is_lost:
    case nvml_reset_required: return Caveat::vanished;
    default: return Caveat::unreadable;
  }
}

/// NVML, initialised, as long as it lives. It counts how often it was initialised, so others in the process keep theirs.
class NvmlLibrary {
 public:
  explicit NvmlLibrary(const std::string& name) : library_(name) {
    if (!library_ || !library_.need(init_, "nvmlInit_v2") || !library_.need(shutdown_, "nvmlShutdown") || !library_.need(count_, "nvmlDeviceGetCount_v2") ||
        !library_.need(device_, "nvmlDeviceGetHandleByIndex_v2")) {
      error_ = library_.error();
      return;
    }
    library_.find(uuid_, "nvmlDeviceGetUUID");
    library_.find(pci_, "nvmlDeviceGetPciInfo_v3");
    library_.find(energy_, "nvmlDeviceGetTotalEnergyConsumption");
    library_.find(power_, "nvmlDeviceGetPowerUsage");
    library_.find(fields_, "nvmlDeviceGetFieldValues");
    library_.find(mig_, "nvmlDeviceGetMigMode");
    if (const int code = init_(); code != nvml_success) error_ = concat({name, ": ", nvml_text(code)});
    else initialised_ = true;
  }
  NvmlLibrary(const NvmlLibrary&) = delete;
  NvmlLibrary& operator=(const NvmlLibrary&) = delete;
  ~NvmlLibrary() {
    if (initialised_) shutdown_();
  }

  /// Why it cannot be used; empty if it can.
  const std::string& error() const { return error_; }
  int count(unsigned& boards) const { return count_(&boards); }
  int device(unsigned index, NvmlDevice& device) const { return device_(index, &device); }
  /// Empty if unknown.
  std::string uuid(NvmlDevice device) const {
    char text[nvml_uuid_size + 1] = {};
    return uuid_ && uuid_(device, text, nvml_uuid_size) == nvml_success ? plain_name(text, nvml_uuid_size) : std::string();
  }
  std::optional<PciSlot> slot(NvmlDevice device) const {
    NvmlPciInfo info{};
    if (!pci_ || pci_(device, &info) != nvml_success || info.bus > 0xff || info.device > 0x1f) return {};
    return PciSlot{info.domain, info.bus, info.device};
  }
  bool divided(NvmlDevice device) const {
    unsigned current = 0, pending = 0;
    return mig_ && mig_(device, &current, &pending) == nvml_success && current != 0;
  }
  int energy(NvmlDevice device, unsigned long long& millijoules) const { return energy_ ? energy_(device, &millijoules) : nvml_function_not_found; }
  /// The mean of the last second on many boards.
  int average_power(NvmlDevice device, double& watts) const {
    unsigned milliwatts = 0;
    const int code = power_ ? power_(device, &milliwatts) : nvml_function_not_found;
    if (code == nvml_success) watts = milliwatts * 1e-3;
    return code;
  }
  /// Of the scopes asked for, read together: NaN where there is no number.
  int instant_power(NvmlDevice device, std::span<const unsigned> scopes, std::span<double> watts) const {
    if (!fields_) return nvml_function_not_found;
    NvmlFieldValue values[2] = {};
    for (std::size_t i = 0; i < scopes.size(); ++i) values[i].field = nvml_field_instant_power, values[i].scope = scopes[i];
    int code = fields_(device, static_cast<int>(scopes.size()), values);
    for (std::size_t i = 0; i < scopes.size() && code == nvml_success; ++i) watts[i] = values[i].code == nvml_success ? number(values[i]) * 1e-3 : std::nan("");
    if (code == nvml_success && scopes.size() == 1) code = values[0].code;
    return code;
  }

 private:
  static double number(const NvmlFieldValue& field) {
    switch (field.type) {
      case 0: return field.value.real;
      case 1: return field.value.natural;
      case 2: return static_cast<double>(field.value.long_natural);
      case 3: return static_cast<double>(field.value.longest_natural);
      case 4: return static_cast<double>(field.value.longest_integer);
      case 5: return field.value.integer;
      case 6: return field.value.short_natural;
      default: return std::nan("");
    }
  }

  DynamicLibrary library_;
  int (*init_)() = nullptr;
  int (*shutdown_)() = nullptr;
  int (*count_)(unsigned*) = nullptr;
  int (*device_)(unsigned, NvmlDevice*) = nullptr;
  int (*uuid_)(NvmlDevice, char*, unsigned) = nullptr;
  int (*pci_)(NvmlDevice, NvmlPciInfo*) = nullptr;
  int (*energy_)(NvmlDevice, unsigned long long*) = nullptr;
  int (*power_)(NvmlDevice, unsigned*) = nullptr;
  int (*fields_)(NvmlDevice, int, NvmlFieldValue*) = nullptr;
  int (*mig_)(NvmlDevice, unsigned*, unsigned*) = nullptr;
  bool initialised_ = false;
  std::string error_;
};

/// Whether a counter and the power integrated tell the same, over windows of at least 5 s and ten readings: they differ by more
/// than a fifth of the larger, beyond what readings cannot show: a tick of the counter, and when, between two of them, power changed.
class Agreement {
 public:
  static constexpr nanoseconds shortest{5'000'000'000};
  static constexpr int fewest = 10;
  static constexpr double tolerance = 0.2;

  struct Verdict {
    bool disagree = false;
    double counted = 0, integrated = 0, seconds = 0;  // joules, of the window
  };
  /// The window in progress is not to be judged.
  void restart() { readings_ = -1; }
  /// Both totals, in nanojoules, and the power at that moment. The verdict, if a window ends.
  std::optional<Verdict> add(Nanojoules counted, Nanojoules integrated, double watts, nanoseconds now) {
    if (readings_ >= 0) {
      unseen_ += 0.5 * std::abs(watts - watts_) * seconds(now - time_);
      most_ = std::max(most_, watts);
    }
    ++readings_;
    watts_ = watts;
    time_ = now;
    std::optional<Verdict> verdict;
    if (readings_ > 0) {
      if (readings_ < fewest || now - start_ < shortest) return {};
      const double c = static_cast<double>(counted - counted_) * 1e-9, i = static_cast<double>(integrated - integrated_) * 1e-9;
      verdict = {std::abs(c - i) > tolerance * std::max(c, i) + unseen_ + most_ * seconds(gpu_tick), c, i, seconds(now - start_)};
    }
    counted_ = counted;
    integrated_ = integrated;
    start_ = now;
    unseen_ = 0;
    most_ = watts;
    readings_ = 0;
    return verdict;
  }

 private:
  static double seconds(nanoseconds t) { return std::chrono::duration<double>(t).count(); }
  int readings_ = -1;  // since the window began, -1 before the first
  Nanojoules counted_ = 0, integrated_ = 0;
  nanoseconds start_{}, time_{};
  double watts_ = 0, most_ = 0, unseen_ = 0;
};

}  // namespace detail

/// One domain per board, key "gpu-" and its UUID (its PCI address where NVML does not tell it). Its joules are, the first that it has:
///  - those of its energy counter. They are compared with the integrated power all the time; where the two disagree by more than
///    20 % the counter is still what is told, as it is, because it watches the board more often than we do, but readings carry
///    Caveat::implausible and a warning names both figures: NvmlOptions::counter = false then takes the power instead;
///  - its power, read as an instant, integrated between readings, so they must be frequent: a gap of more than 5 s is left out;
///  - its power as a mean of the last second, integrated: edges of a window are off by a second of power.
/// On a superchip, i.e. where NVML tells more power for the module (CPU and GPU) than for the GPU, the counter is the module's: the power
/// of the GPU alone is integrated instead, so that nothing is counted twice beside a meter of the CPU. Where only the module's
/// is to be had the domain is a gpu_module: do not add it to a CPU's.
/// The relative errors it claims (5 %, 10 % and 20 %) are cautious, not NVIDIA's. What fails is in warnings(); it never throws
/// but for options that make no sense. A board that fails keeps its total and is asked again with every reading.
class Nvml {
 public:
  explicit Nvml(NvmlOptions options = {}) : options_(std::move(options)) {
    detail::check_gpu_options("NvmlOptions", options_.clock, options_.max_watts);
    library_ = std::make_unique<detail::NvmlLibrary>(options_.library);
    find_boards();
  }

  std::span<const DomainInfo> domains() const { return domains_; }
  const std::vector<std::string>& warnings() const { return warnings_.all(); }
  /// The key of the board that a program knows as its number (NVML's, the order of PCI addresses, which is CUDA's with
  /// CUDA_DEVICE_ORDER=PCI_BUS_ID only), its PCI address (cudaDeviceGetPCIBusId) or its UUID or a beginning of it. Empty if none is measured.
  std::string key_of(std::string_view uuid_or_pci_or_index) const { return names_.key_of(uuid_or_pci_or_index); }

  SampleResult sample(std::span<MeterSample> out) noexcept {
    return detail::sample_boards(boards_, out, [this](Board& board, MeterSample& sample) { read(board, sample); });
  }

 private:
  enum class Power : std::uint8_t { none, instant, average };
  static constexpr nanoseconds longest_gap{5'000'000'000};
  struct Board {
    detail::NvmlDevice device;
    std::string name;  // in warnings
    bool counter;
    Power power;
    unsigned scope;
    Unwrapped counted;
    IntegratedPower integrated;
    detail::Standstill standstill{};
    detail::Agreement agreement{};
    bool disagree = false, warned = false;

    Nanojoules total() const { return counter ? counted.total() : integrated.total(); }
  };

  void find_boards() {
    if (!library_->error().empty()) return warnings_.add(detail::concat({"NVIDIA GPUs are not measured: ", library_->error()}));
    unsigned count = 0;
    if (const int code = library_->count(count); code != detail::nvml_success)
      return warnings_.add(detail::concat({"NVIDIA GPUs are not measured: NVML does not tell how many there are: ", detail::nvml_text(code)}));
    if (count > detail::most_gpus) return warnings_.add(detail::concat({"NVIDIA GPUs are not measured: NVML claims to have ", count}));
    for (unsigned index = 0; index < count; ++index) add_board(index);
  }

  void add_board(unsigned index) {
    detail::NvmlDevice device = nullptr;
    const std::string number = detail::concat({"GPU ", index});
    if (const int code = library_->device(index, device); code != detail::nvml_success)
      return warnings_.add(detail::concat({number, " is not measured: ", detail::nvml_text(code)}));
    const std::string uuid = library_->uuid(device);
    const std::optional<detail::PciSlot> slot = library_->slot(device);
    if (uuid.empty() && !slot)
      return warnings_.add(detail::concat({number, " is not measured: NVML tells neither its UUID nor its PCI address, so ranks cannot agree on which one it is"}));
    const std::string identity = uuid.empty() ? slot->text() : uuid, key = "gpu-" + identity, name = detail::concat({number, " (", identity, ")"});
    if (std::any_of(domains_.begin(), domains_.end(), [&](const DomainInfo& other) { return other.key == key; }))
      return warnings_.add(detail::concat({name, " is not measured: another one has the same name"}));

    constexpr unsigned scopes[] = {detail::nvml_scope_gpu, detail::nvml_scope_module};
    double watts[2] = {std::nan(""), std::nan("")};
    const int instant_code = library_->instant_power(device, scopes, watts);
    const bool gpu_scope = is_power(watts[0]), module_only = !gpu_scope && is_power(watts[1]);
    // A driver that knew no scopes would tell the same for both.
    const bool superchip = module_only || (gpu_scope && is_power(watts[1]) && watts[1] > watts[0]);
    Power power = gpu_scope || module_only ? Power::instant : Power::none;
    double average = 0;
    int average_code = instant_code;
    if (power == Power::none) average_code = library_->average_power(device, average);
    if (power == Power::none && average_code == detail::nvml_success) power = Power::average;
    unsigned long long millijoules = 0;
    const int energy_code = library_->energy(device, millijoules);
    const bool counts = energy_code == detail::nvml_success;
    if (!counts && power == Power::none)
      return warnings_.add(detail::concat({name, " is not measured: neither its energy counter (", detail::nvml_text(energy_code), ") nor its power (",
                                           detail::nvml_text(average_code), ") can be read"}));

    const bool counter = counts && !(superchip && gpu_scope) && (options_.counter || power == Power::none);
    if (counter && !options_.counter) warnings_.add(detail::concat({name, " has no reading of power to integrate: its energy counter is used"}));
    if (!counts) warnings_.add(detail::concat({name, ": its power is integrated, because its energy counter cannot be read: ", detail::nvml_text(energy_code)}));
    if (counts && superchip && gpu_scope) warnings_.add(detail::concat({name, ": its power is integrated, because the energy counter of a superchip includes its CPU"}));
    if (module_only) warnings_.add(detail::concat({name, ": only the energy of its whole module can be read, which includes a CPU: do not add it to that of CPUs"}));

    DomainInfo info;
    info.kind = module_only ? Domain::gpu_module : Domain::gpu_board;
    info.key = key;
    info.source = "nvml";
    info.tick = !counter && power == Power::average ? nanoseconds(1'000'000'000) : detail::gpu_tick;
    info.unit_joules = counter ? 1e-3 : 1e-9;
    info.max_watts = options_.max_watts;
    info.accuracy = counter ? 0.05 : power == Power::instant ? 0.1 : 0.2;
    if (library_->divided(device)) {
      info.caveats |= Caveat::shared_device;
      warnings_.add(detail::concat({name, " is divided into instances (MIG): its joules are those of all of them"}));
    }
    domains_.push_back(std::move(info));
    names_.add({index, key, uuid, slot});
    boards_.push_back({device, name, counter, power, module_only ? detail::nvml_scope_module : detail::nvml_scope_gpu, Unwrapped(0, 1e6, options_.max_watts),
                       IntegratedPower(options_.max_watts, longest_gap)});
    MeterSample first;  // counting begins here
    read(boards_.back(), first);
  }

  static bool is_power(double watts) { return watts >= 0; }  // false for NaN

  void read(Board& board, MeterSample& sample) {
    if (board.counter) read_counter(board, sample);
    if (board.power != Power::none && !(board.counter && board.power == Power::average)) read_power(board, sample);
    sample.total = board.total();
  }

  void read_counter(Board& board, MeterSample& sample) {
    unsigned long long millijoules = 0;
    const nanoseconds before = options_.clock();
    const int code = library_->energy(board.device, millijoules);
    sample.time = before + (options_.clock() - before) / 2;
    if (code != detail::nvml_success) {
      board.agreement.restart();
      return fail(board, sample, code);
    }
    const Caveats caveats = board.counted.add(millijoules, sample.time);
    sample.caveats |= caveats;
    if (has(caveats, Caveat::counter_reset)) {
      board.agreement.restart();
      warnings_.add(detail::concat({board.name, ": its energy counter was reset or jumped by more than a board can draw: what it drew between those two readings is not counted"}));
    }
    if (board.standstill.add(millijoules, sample.time)) {
      sample.caveats |= Caveat::stale;
      warnings_.add(detail::concat({board.name, ": its energy counter stood still for 2 s, which even an idle board's does not"}));
    }
  }

  /// Where there is a counter this only serves to check it.
  void read_power(Board& board, MeterSample& sample) {
    double watts = std::nan("");
    const unsigned scopes[] = {board.scope};
    const int code = board.power == Power::instant ? library_->instant_power(board.device, scopes, {&watts, 1}) : library_->average_power(board.device, watts);
    const nanoseconds now = options_.clock();
    if (!board.counter) sample.time = now;
    if (code != detail::nvml_success || !is_power(watts)) {
      board.agreement.restart();
      if (!board.counter) fail(board, sample, code);
      return;
    }
    const Caveats caveats = board.integrated.add(watts, now);
    if (!board.counter) {
      sample.caveats |= caveats;
      if (has(caveats, Caveat::counter_reset)) warnings_.add(detail::concat({board.name, ": NVML told more power than a board can draw: it is not counted"}));
      if (has(caveats, Caveat::stale)) warnings_.add(detail::concat({board.name, ": its power was not read for more than 5 s: what it drew meanwhile is not counted"}));
      return;
    }
    if (caveats != 0) board.agreement.restart();
    else if (!has(sample.caveats, Caveat::counter_reset) && detail::error_of(sample.caveats) == std::errc{}) judge(board, watts, now);
    if (board.disagree) sample.caveats |= Caveat::implausible;
  }

  void judge(Board& board, double watts, nanoseconds now) {
    const auto verdict = board.agreement.add(board.counted.total(), board.integrated.total(), watts, now);
    if (!verdict) return;
    board.disagree = verdict->disagree;
    if (!board.disagree || board.warned) return;
    board.warned = true;
    const auto whole = [](double joules) { return std::llround(joules); };
    warnings_.add(detail::concat({board.name, ": in ", whole(verdict->seconds), " s its energy counter told ", whole(verdict->counted), " J, its power ", whole(verdict->integrated),
                                  " J: the counter is told as it is; NvmlOptions::counter = false takes the power instead"}));
  }

  void fail(Board& board, MeterSample& sample, int code) {
    sample.caveats |= detail::nvml_caveat(code);
    const std::string why = code == detail::nvml_success ? "NVML tells no number" : detail::nvml_text(code);
    warnings_.add(detail::concat({board.name, " could not be read: ", why, "; its joules meanwhile may be missing"}));
  }

  NvmlOptions options_;
  std::unique_ptr<detail::NvmlLibrary> library_;
  std::vector<Board> boards_;
  std::vector<DomainInfo> domains_;
  detail::GpuNames names_;
  MeterWarnings warnings_;
};
static_assert(EnergyMeter<Nvml>);

}  // namespace tally::inline v0
