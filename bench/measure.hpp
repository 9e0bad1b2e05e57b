// SPDX-License-Identifier: Apache-2.0
// What the benchmarks need: sizes with suffixes, medians, memory that is really there, cores to run on, and
// words for the machine.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

inline double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// "4K" is 4096; nothing if the text is no size.
inline std::optional<std::size_t> parse_size(std::string_view text) {
  std::size_t digits = 0, value = 0;
  for (; digits < text.size() && text[digits] >= '0' && text[digits] <= '9'; ++digits)
    if (__builtin_mul_overflow(value, std::size_t{10}, &value) || __builtin_add_overflow(value, static_cast<std::size_t>(text[digits] - '0'), &value)) return std::nullopt;
  if (digits == 0) return std::nullopt;
  std::string_view suffix = text.substr(digits);
  int shift = 0;
  if (!suffix.empty()) {
    const char unit = suffix.front();
    if (unit == 'k' || unit == 'K') shift = 10;
    else if (unit == 'm' || unit == 'M') shift = 20;
    else if (unit == 'g' || unit == 'G') shift = 30;
    if (shift > 0) suffix.remove_prefix(1);
    if (!(suffix.empty() || suffix == "B" || suffix == "b" || (shift > 0 && suffix == "iB"))) return std::nullopt;
  }
  if (value > std::numeric_limits<std::size_t>::max() >> shift) return std::nullopt;
  return value << shift;
}

/// The q-th quantile, interpolated as the spreadsheets do; NaN of nothing.
inline double quantile(std::vector<double> values, double q) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}
inline double median(std::vector<double> values) { return quantile(std::move(values), 0.5); }

/// Page-aligned memory, each page written, so that a timed call meets no page fault.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes) {
    const std::size_t whole = (std::max<std::size_t>(bytes, 1) + 4095) / 4096 * 4096;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, whole)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 1, whole);
  }
  template <class T>
  std::span<T> as(std::size_t count, std::size_t first = 0) const { return {reinterpret_cast<T*>(data_.get()) + first, count}; }
  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_;
};

inline std::vector<int> allowed_cores() {
  cpu_set_t set;
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  return cores;
}
/// Keeps the calling thread on one core; false if the system refuses.
inline bool pin_to(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
}
inline std::string core_list(const std::vector<int>& cores) {
  std::string text;
  for (const int core : cores) {
    if (!text.empty()) text += ',';
    text += std::to_string(core);
  }
  return text;
}

/// Processor, cores and system, as far as the system tells.
inline std::string machine_line() {
  std::string model = "unknown processor", line;
  std::ifstream info("/proc/cpuinfo");
  while (std::getline(info, line)) {
    const std::size_t colon = line.find(": ");
    if (colon != line.npos && (line.starts_with("model name") || line.starts_with("Model"))) {
      model = line.substr(colon + 2);
      break;
    }
  }
  std::string kernel = "unknown";
  std::ifstream release("/proc/sys/kernel/osrelease");
  std::getline(release, kernel);
  return model + ", " + std::to_string(::sysconf(_SC_NPROCESSORS_ONLN)) + " cores online, Linux " + kernel;
}

/// "8", "32K", "64M": exact powers of 1024 get their suffix.
inline std::string size_text(std::size_t bytes) {
  static constexpr const char* suffixes[] = {"", "K", "M", "G"};
  std::size_t i = 0;
  while (i < 3 && bytes >= 1024 && bytes % 1024 == 0) bytes /= 1024, ++i;
  return std::to_string(bytes) + suffixes[i];
}

/// A number in a table cell of fixed precision by magnitude; "-" if it is not known.
inline std::string cell(double value) {
  if (!std::isfinite(value)) return "-";
  char text[32];
  const double size = std::abs(value);
  std::snprintf(text, sizeof text, size >= 1000 ? "%.0f" : size >= 100 ? "%.1f" : size >= 10 ? "%.2f" : "%.3f", value);
  return text;
}

/// Progress on a terminal; silent elsewhere.
class Progress {
 public:
  explicit Progress(bool wanted) : shown_(wanted && ::isatty(STDERR_FILENO)) {}
  ~Progress() { clear(); }
  void show(const std::string& what) const {
    if (shown_) std::fprintf(stderr, "\r\033[K%s", what.c_str());
  }
  void clear() const {
    if (shown_) std::fputs("\r\033[K", stderr);
  }

 private:
  bool shown_;
};

}  // namespace bench
