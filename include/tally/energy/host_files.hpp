// SPDX-License-Identifier: Apache-2.0
// Reads the small files in which the kernel describes a host, below a root that tests and containers may set. Nothing there
// is trusted: what is read is bounded, a FIFO does not block, a number is a number or an error, and each failure keeps its errno.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../file.hpp"
#include "../text.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {
namespace detail {

/// `path`, which begins without a slash, below `root`; "" and "/" are the host itself.
inline std::string below(std::string_view root, std::string_view path) {
  while (!root.empty() && root.back() == '/') root.remove_suffix(1);
  return concat({root, "/", path});
}

/// A whole file of at most `most` bytes, without the white space at its end.
inline FileText read_file(const std::string& path, std::size_t most = 4096) {
  FileText read = read_start(path, most + 1);
  if (read.text.size() > most) return {{}, EFBIG};
  read.text.erase(read.text.find_last_not_of(" \t\r\n") + 1);
  return read;
}

/// Digits and nothing else, no more than 2^64 - 1.
inline std::optional<std::uint64_t> parse_natural(std::string_view text, int base = 10) {
  std::uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value, base);
  if (parsed.ec != std::errc{} || parsed.ptr != end) return std::nullopt;
  return value;
}

/// The whole number in a file, or why there is none: errno, EBADMSG where the file holds something else.
struct Reading {
  std::uint64_t value = 0;
  int error = 0;
};
inline Reading read_natural(const std::string& path) {
  const FileText read = read_file(path, 64);
  if (read.error != 0) return {0, read.error};
  const auto value = parse_natural(read.text);
  return value ? Reading{*value, 0} : Reading{0, EBADMSG};
}

/// Why a reading failed, in words that follow a colon.
inline std::string why(int error) {
  switch (error) {
    case EBADMSG: return "it holds no whole number";
    case EFBIG: return "it is longer than such a file can be";
    case EISDIR: return "it is a directory";
    case ENOTSUP: return "it is no regular file";
    default: return std::generic_category().message(error);
  }
}
/// A file's text as it may be shown: short, printable, in quotes.
inline std::string quoted(std::string_view text) {
  std::string shown = "'";
  for (const char c : text.substr(0, 40)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + (text.size() > 40 ? "...'" : "'");
}

/// The names in a directory, without those that begin with a dot; of a huge one, the first `most`. None if it cannot be read.
inline std::vector<std::string> names_in(const std::string& directory, std::size_t most = 4096) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(directory.c_str()), [](DIR* d) { return ::closedir(d); });
  if (!open) return names;
  while (names.size() < most) {
    const dirent* const entry = ::readdir(open.get());
    if (!entry) break;
    if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
  }
  return names;
}

/// Whether the first processor of a /proc/cpuinfo has the flag.
inline bool has_cpu_flag(std::string_view cpuinfo, std::string_view flag) {
  while (!cpuinfo.empty()) {
    std::string_view flags = cpuinfo.substr(0, cpuinfo.find('\n'));
    cpuinfo.remove_prefix(std::min(flags.size() + 1, cpuinfo.size()));
    if (!flags.starts_with("flags")) continue;
    flags.remove_prefix(std::min(flags.find(':'), flags.size() - 1) + 1);
    while (!flags.empty()) {
      const std::string_view word = flags.substr(0, flags.find(' '));
      if (word == flag) return true;
      flags.remove_prefix(std::min(word.size() + 1, flags.size()));
    }
    return false;
  }
  return false;
}

/// What holds for every energy counter of this host's processors: `virtualised`, if the processor says that it is a guest's; `filtered`,
/// if it adds noise to them against PLATYPUS (CVE-2020-8694): bit 0 of IA32_MISC_PACKAGE_CTLS (0xBC, Intel SDM volume 4) where
/// that may be read, else taken to be so where SGX is on, which turns the filter on.
inline Caveats host_caveats(std::string_view root) {
  const std::string cpuinfo = read_start(below(root, "proc/cpuinfo"), 64 << 10).text;
  Caveats caveats = 0;
  if (has_cpu_flag(cpuinfo, "hypervisor")) caveats |= Caveat::virtualised;
  bool filtered = has_cpu_flag(cpuinfo, "sgx");
  const FileDescriptor registers(::open(below(root, "dev/cpu/0/msr").c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  std::uint64_t controls = 0;
  if (registers && ::pread(registers.get(), &controls, sizeof controls, 0xbc) == sizeof controls) filtered = (controls & 1) != 0;
  if (filtered) caveats |= Caveat::filtered;
  return caveats;
}

}  // namespace detail
}  // namespace tally::inline v0
