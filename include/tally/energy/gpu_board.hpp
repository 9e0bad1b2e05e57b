// SPDX-License-Identifier: Apache-2.0
// What the meters of GPUs share: the names a board goes by, texts and numbers from a vendor's library that are not to be
// trusted, and the sign that a counter does not work.
#pragma once

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../text.hpp"
#include "../types.hpp"
#include "meter.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {
namespace detail {

inline constexpr std::uint32_t most_gpus = 1024;  // more on one host are not believed
inline constexpr nanoseconds gpu_tick{100'000'000};

/// The text in a buffer that a library filled, which may lack its end; empty if it is no plain name.
inline std::string plain_name(const char* buffer, std::size_t size) {
  const std::string_view text(buffer, static_cast<std::size_t>(std::find(buffer, buffer + size, '\0') - buffer));
  const auto plain = [](unsigned char c) { return c < 128 && (std::isalnum(c) || c == '-' || c == ':' || c == '.' || c == '_'); };
  return text.size() < size && std::all_of(text.begin(), text.end(), plain) ? std::string(text) : std::string();
}
inline std::string lower_case(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
  return result;
}

/// Where a device is plugged in. The function is left out: GPUs number the partitions of one board by it.
struct PciSlot {
  std::uint64_t domain = 0, bus = 0, device = 0;

  friend bool operator==(const PciSlot&, const PciSlot&) = default;
  /// Of "0000:3b:00.0", with a domain of any length or none, the function or not.
  static std::optional<PciSlot> parse(std::string_view text) {
    if (const std::size_t dot = text.rfind('.'); dot != text.npos) {
      if (dot + 2 != text.size() || text[dot + 1] < '0' || text[dot + 1] > '7') return {};
      text = text.substr(0, dot);
    }
    PciSlot slot;
    std::uint64_t* const parts[] = {&slot.device, &slot.bus, &slot.domain};
    std::size_t i = 0;
    for (bool more = true; more; ++i) {
      if (i == 3) return {};
      const std::size_t colon = text.rfind(':');
      more = colon != text.npos;
      const std::string_view part = more ? text.substr(colon + 1) : text;
      const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), *parts[i], 16);
      if (part.empty() || error != std::errc{} || end != part.data() + part.size()) return {};
      text = text.substr(0, more ? colon : 0);
    }
    if (i < 2) return {};
    return slot;
  }
  std::string text() const {
    const auto hex = [](std::uint64_t value, std::size_t width) {
      char digits[16];
      const auto end = std::to_chars(digits, digits + sizeof digits, value, 16).ptr;
      std::string result(digits, end);
      if (result.size() < width) result.insert(0, width - result.size(), '0');
      return result;
    };
    return concat({hex(domain, 4), ":", hex(bus, 2), ":", hex(device, 2), ".0"});
  }
};

/// Finds the key of a board's domain by what a program knows it as.
class GpuNames {
 public:
  struct Entry {
    std::uint32_t index = 0;  // in the library's order
    std::string key, uuid;    // uuid empty if unknown
    std::optional<PciSlot> slot;
  };
  void add(Entry entry) { entries_.push_back(std::move(entry)); }

  /// `name`: a key; the board's number; its PCI address; or its UUID, of which a beginning will do if no other board's
  /// begins so. Empty if there is no such board.
  std::string key_of(std::string_view name) const {
    const std::string wanted = lower_case(name);
    if (wanted.empty()) return {};
    const bool number = std::all_of(wanted.begin(), wanted.end(), [](char c) { return c >= '0' && c <= '9'; });
    const std::optional<PciSlot> slot = PciSlot::parse(wanted);
    for (const Entry& entry : entries_) {
      if (lower_case(entry.key) == wanted || (number && std::to_string(entry.index) == wanted) || (slot && entry.slot == slot)) return entry.key;
    }
    if (number || slot) return {};
    std::string found;
    for (const Entry& entry : entries_) {
      if (lower_case(entry.uuid).compare(0, wanted.size(), wanted) != 0 || entry.key == found) continue;
      if (!found.empty()) return {};
      found = entry.key;
    }
    return found;
  }

 private:
  std::vector<Entry> entries_;
};

/// Whether an energy counter stands still. That of a board that works moves every tick, for even an idle board draws watts.
class Standstill {
 public:
  static constexpr nanoseconds longest{2'000'000'000};
  bool add(std::uint64_t raw, nanoseconds now) {
    if (!std::exchange(begun_, true) || raw != std::exchange(last_, raw)) last_ = raw, moved_ = now;
    return now - moved_ >= longest;
  }

 private:
  std::uint64_t last_ = 0;
  nanoseconds moved_{};
  bool begun_ = false;
};

/// What SampleResult says of a reading that failed.
inline std::errc error_of(Caveats caveats) {
  if (has(caveats, Caveat::permission_denied)) return std::errc::permission_denied;
  if (has(caveats, Caveat::vanished)) return std::errc::no_such_device;
  if (has(caveats, Caveat::unreadable)) return std::errc::io_error;
  return {};
}

/// The readings of all boards, as many as there is room for: `read(board, sample)` fills one. What it throws is a failure of that board.
template <class Boards, class F>
SampleResult sample_boards(Boards& boards, std::span<MeterSample> out, F&& read) noexcept {
  SampleResult result;
  for (std::size_t i = 0; i < boards.size() && i < out.size(); ++i) {
    MeterSample sample{static_cast<std::uint16_t>(i)};
    std::errc error = std::errc::not_enough_memory;
    try {
      read(boards[i], sample);
      out[result.count++] = sample;
      error = error_of(sample.caveats);
    } catch (...) {  // memory for a warning, or the clock that was given
    }
    if (result.error == std::errc{}) result.error = error;
  }
  return result;
}

/// Throws Errc::invalid_argument for options of a meter of GPUs that make no sense; `type` is their name.
inline void check_gpu_options(std::string_view type, const MeterClock& clock, double max_watts) {
  if (!clock) throw Error(Errc::invalid_argument, {type, "::clock is empty"});
  if (!(max_watts > 0 && std::isfinite(max_watts))) throw Error(Errc::invalid_argument, {type, "::max_watts is no positive number of watts"});
}

}  // namespace detail
}  // namespace tally::inline v0
