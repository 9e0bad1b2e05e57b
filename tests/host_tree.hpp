// SPDX-License-Identifier: Apache-2.0
// A host that a test makes up: the files of its sysfs and procfs in a directory of their own, which goes with the object.
#pragma once

#include <linux/capability.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace test {

class HostTree {
 public:
  HostTree() {
    std::string name = (std::filesystem::temp_directory_path() / "tally-host-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary directory");
    root_ = name;
  }
  HostTree(const HostTree&) = delete;
  HostTree& operator=(const HostTree&) = delete;
  ~HostTree() {
    std::error_code ignored;
    std::filesystem::remove_all(root_, ignored);
  }

  std::string root() const { return root_.string(); }
  std::string path(const std::string& name) const { return (root_ / name).string(); }
  /// Text as the kernel has it, with a line's end.
  void write(const std::string& name, const std::string& text) { write_raw(name, text + "\n"); }
  void write(const std::string& name, std::uint64_t number) { write(name, std::to_string(number)); }
  void write_raw(const std::string& name, const std::string& bytes) {
    std::filesystem::create_directories((root_ / name).parent_path());
    std::ofstream file(root_ / name, std::ios::binary | std::ios::trunc);
    file << bytes;
    if (!file.flush()) throw std::runtime_error("cannot write " + name);
  }
  void directory(const std::string& name) { std::filesystem::create_directories(root_ / name); }
  void link(const std::string& name, const std::string& target) {
    std::filesystem::create_directories((root_ / name).parent_path());
    std::filesystem::create_symlink(target, root_ / name);
  }
  void fifo(const std::string& name) {
    std::filesystem::create_directories((root_ / name).parent_path());
    if (::mkfifo(path(name).c_str(), 0600) != 0) throw std::runtime_error("cannot make a FIFO");
  }
  void mode(const std::string& name, ::mode_t mode) {
    if (::chmod(path(name).c_str(), mode) != 0) throw std::runtime_error("cannot change " + name);
  }
  void remove(const std::string& name) { std::filesystem::remove_all(root_ / name); }
  /// Reading it fails with EIO: at its beginning, a process has no memory.
  void broken(const std::string& name) {
    remove(name);
    link(name, "/proc/self/mem");
  }

  /// A zone of powercap.
  void zone(const std::string& place, const std::string& name, std::uint64_t microjoules, std::uint64_t range) {
    const std::string directory = "sys/class/powercap/" + place;
    write(directory + "/name", name);
    write(directory + "/energy_uj", microjoules);
    write(directory + "/max_energy_range_uj", range);
    write(directory + "/enabled", 1);
  }
  void cpu(int number, int package, int die, int core) {
    const std::string topology = "sys/devices/system/cpu/cpu" + std::to_string(number) + "/topology/";
    write(topology + "physical_package_id", std::to_string(package));
    write(topology + "die_id", std::to_string(die));
    write(topology + "core_id", std::to_string(core));
  }
  void cpuinfo(const std::string& flags) { write("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: " + flags + "\nbugs\t\t: sgx hypervisor\n"); }

 private:
  std::filesystem::path root_;
};

/// While it lives, this thread may read only what a file's mode lets its owner read, even if it is root's.
class Unprivileged {
 public:
  Unprivileged() {
    if (::syscall(SYS_capget, &header_, before_) != 0) throw std::runtime_error("capget");
    __user_cap_data_struct less[2] = {before_[0], before_[1]};
    less[0].effective &= ~((1u << CAP_DAC_OVERRIDE) | (1u << CAP_DAC_READ_SEARCH));
    if (::syscall(SYS_capset, &header_, less) != 0) throw std::runtime_error("capset");
  }
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;
  ~Unprivileged() { ::syscall(SYS_capset, &header_, before_); }

 private:
  __user_cap_header_struct header_{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct before_[2] = {};
};

inline std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

}  // namespace test
