// SPDX-License-Identifier: Apache-2.0
// Which machine this is, for accounts that are put together with those of others.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace tally::inline v0::detail {

inline std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "";
}
/// Different after each boot; empty where it cannot be read.
inline std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  file >> id;
  return id.substr(0, 64);
}
/// Different where processes cannot share memory by way of local sockets, or cannot watch each other: on other hosts, of other
/// users, in other name spaces of networks or processes.
inline std::string sharing_id() {
  std::string id = boot_id();
  for (const char* space : {"/proc/self/ns/net", "/proc/self/ns/pid"}) {
    struct stat info {};
    id += ' ';
    id += ::stat(space, &info) == 0 ? std::to_string(info.st_ino) : "unknown";
  }
  return id + ' ' + std::to_string(::getuid());
}

}  // namespace tally::inline v0::detail
