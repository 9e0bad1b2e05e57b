// SPDX-License-Identifier: Apache-2.0
// Which machine this is, for accounts that are put together with those of others.
#pragma once

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

}  // namespace tally::inline v0::detail
