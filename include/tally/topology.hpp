// SPDX-License-Identifier: Apache-2.0
// Which cores share a cache and a socket, as sysfs has it; and whether ranks that follow each other run on such cores.
// Nothing is known of ranks that are free to run anywhere.
#pragma once

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "text.hpp"

namespace tally::inline v0 {

/// The last-level cache and the socket that all cores a rank may run on belong to, each named by its first core; -1: not one.
struct Place {
  std::int32_t cache = -1, socket = -1;
};

namespace detail {

/// Cores in the kernel's notation, "0-3,8"; empty if that is not what the text is.
inline cpu_set_t parse_cores(std::string_view text) {
  cpu_set_t cores, none;
  CPU_ZERO(&cores);
  CPU_ZERO(&none);
  while (!text.empty()) {
    const std::string_view part = text.substr(0, text.find(','));
    text.remove_prefix(part.size() < text.size() ? part.size() + 1 : text.size());
    unsigned first = 0, last = 0;
    const char* const end = part.data() + part.size();
    auto parsed = std::from_chars(part.data(), end, first);
    last = first;
    if (parsed.ec == std::errc{} && parsed.ptr != end && *parsed.ptr == '-') parsed = std::from_chars(parsed.ptr + 1, end, last);
    if (parsed.ec != std::errc{} || parsed.ptr != end || last < first || last >= CPU_SETSIZE) return none;
    for (unsigned core = first; core <= last; ++core) CPU_SET(core, &cores);
  }
  return cores;
}
inline std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}
inline int first_core(const cpu_set_t& cores) {
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &cores)) return core;
  return -1;
}
/// The first of `siblings`, if all of `cores` are among them.
inline std::int32_t common(const cpu_set_t& cores, const cpu_set_t& siblings) {
  cpu_set_t both;
  CPU_AND(&both, &cores, &siblings);
  return CPU_EQUAL(&both, &cores) ? first_core(siblings) : -1;
}

}  // namespace detail

/// The cores that the calling thread may run on; empty where the kernel does not say.
inline cpu_set_t own_cores() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (::sched_getaffinity(0, sizeof cores, &cores) != 0) CPU_ZERO(&cores);
  return cores;
}

/// Where a rank is that may run on these cores.
inline Place place_of(const cpu_set_t& cores, const std::string& sysfs = "/sys/devices/system/cpu") {
  const int first = detail::first_core(cores);
  if (first < 0) return {};
  const std::string core = detail::concat({sysfs, "/cpu", first});
  std::string last_level;  // of the caches: they are listed from the nearest on
  for (int i = 0; i < 16; ++i) {
    const std::string cache = detail::concat({core, "/cache/index", i});
    if (detail::first_line(cache + "/type") == "Instruction") continue;
    const std::string shared = detail::first_line(cache + "/shared_cpu_list");
    if (shared.empty()) break;
    last_level = shared;
  }
  return {detail::common(cores, detail::parse_cores(last_level)), detail::common(cores, detail::parse_cores(detail::first_line(core + "/topology/core_siblings_list")))};
}

/// Bytes of the first core's last-level cache; 32 MiB where sysfs does not say.
inline std::size_t last_level_cache_bytes(const std::string& sysfs = "/sys/devices/system/cpu") {
  std::size_t bytes = 0;
  for (int i = 0; i < 16; ++i) {
    const std::string text = detail::first_line(detail::concat({sysfs, "/cpu0/cache/index", i, "/size"}));  // "32768K"
    std::size_t kilobytes = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), kilobytes);
    if (error != std::errc{} || end == text.data() + text.size() || *end != 'K' || kilobytes > std::size_t{1} << 40) break;
    bytes = std::max(bytes, kilobytes << 10);
  }
  return bytes > 0 ? bytes : std::size_t{32} << 20;
}

/// How many ranks that follow each other, from rank 0 on, share a cache, or else a socket, that no other rank uses; the
/// last group may have fewer. 1 where that is not so, or where all share one.
inline int group_of(const std::vector<Place>& ranks) {
  for (const auto level : {&Place::cache, &Place::socket}) {
    std::size_t width = 1;
    while (width < ranks.size() && ranks[width].*level == ranks[0].*level) ++width;
    bool even = width > 1 && width < ranks.size();
    for (std::size_t r = 0; r < ranks.size() && even; ++r) {
      even = ranks[r].*level >= 0 && ranks[r].*level == ranks[r / width * width].*level;
      for (std::size_t earlier = 0; earlier < r / width; ++earlier) even = even && ranks[earlier * width].*level != ranks[r].*level;
    }
    if (even) return static_cast<int>(width);
  }
  return 1;
}

}  // namespace tally::inline v0
