// SPDX-License-Identifier: Apache-2.0
// Where a job's ranks meet, as users and launchers say it: an address of rank 0's host, a file that all see and rank 0 writes its
// addresses to, or the first host of Slurm's list. Names are resolved again and again, since hosts may still be starting.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../environment.hpp"
#include "../file.hpp"
#include "../types.hpp"
#include "interfaces.hpp"
#include "socket.hpp"

namespace tally::inline v0::detail {

/// Of a list as Slurm writes it, "a,gpu[03-05,9]-ib,b": the first. Empty where it is none.
inline std::string first_host(std::string_view list) {
  const std::size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string_view::npos || comma < bracket) return std::string(list.substr(0, comma));
  const std::size_t close = list.find(']', bracket);
  if (close == std::string_view::npos) return {};
  const std::string_view inside = list.substr(bracket + 1, close - bracket - 1), rest = list.substr(close + 1);
  return concat({list.substr(0, bracket), inside.substr(0, inside.find_first_of(",-")), first_host(rest)});
}

class Meeting {
 public:
  /// HOST:PORT, or file:PATH.
  explicit Meeting(std::string where) : where_(std::move(where)) {
    if (where_.starts_with("file:")) path_ = where_.substr(5);
    if (is_file() && path_.empty()) throw Error(Errc::invalid_argument, {"'", where_, "' names no file: it should be file:PATH"});
    if (!is_file()) (void)split_address(where_);
  }
  /// Where this rank, which is rank 0, listens already.
  explicit Meeting(FileDescriptor listener) : where_(own_address(listener).text()), listener_(std::move(listener)) {}
  /// TALLY_ADDRESS, or beside the port that torchrun names, or at Slurm's first host.
  static Meeting from_environment() {
    if (const auto where = environment("TALLY_ADDRESS")) return Meeting(std::string(*where));
    const auto host = environment("MASTER_ADDR");
    const auto port = environment_number<int>("MASTER_PORT", 1, 65534);
    if (host && port) return Meeting(concat({*host, ":", *port + 1}));  // that port itself is the framework's
    for (const char* list : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}) {
      const auto hosts = environment(list);
      if (!hosts) continue;
      std::string job;
      for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID"}) job += concat({environment(name).value_or(""), "."});
      if (const std::string first = first_host(*hosts); !first.empty()) return Meeting(concat({first, ":", 20'000 + hash_text(job) % 12'000}));  // below those that systems give away
    }
    throw Error(Errc::invalid_argument, "ranks on several hosts need a place to meet: set TALLY_ADDRESS, the same for all, to HOST:PORT of rank 0's host or to file:PATH of a folder that all hosts share");
  }

  /// Rank 0: listens there, and says so to those that look into the file. `interface`: see choose_addresses().
  FileDescriptor listen(std::string_view interface) {
    if (listener_) return std::move(listener_);
    std::vector<SocketAddress> mine;
    if (!interface.empty() || is_file()) mine = choose_addresses(interface, own_interfaces());
    if (!interface.empty()) mine.resize(1);
    if (!is_file()) {
      const auto [host, port] = split_address(where_);
      if (!mine.empty()) {
        mine[0].port = static_cast<std::uint16_t>(port);
        return listen_at(mine[0]);
      }
      // A host's own name is often one of loopback to itself.
      SocketAddress ip;
      int bits = 0;
      const bool literal = host == "localhost" || (host.find('/') == std::string_view::npos && parse_range(host, ip, bits));
      return literal ? listen_at(resolve(where_).front()) : listen_anywhere(static_cast<std::uint16_t>(port));
    }
    FileDescriptor fd = interface.empty() ? listen_anywhere(0) : listen_at(mine[0]);
    const bool both = own_address(fd).family == 6;
    nonce_ = static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count()) ^ static_cast<std::uint64_t>(::getpid()) << 40;
    std::string text = concat({"tally ", nonce_, "\n"});
    for (SocketAddress& each : mine) {
      each.port = own_address(fd).port;
      if (both || !interface.empty() || each.family == 4) text += each.text() + "\n";
    }
    write_file_atomically(path_, text);
    wrote_ = true;
    return fd;
  }
  /// The others: where to try now. Empty where nobody knows yet.
  std::vector<SocketAddress> addresses() {
    if (!is_file()) return resolve(where_);
    const FileText file = read_start(path_, 64 << 10);
    if (file.error == ENOENT) return {};
    if (file.error != 0) throw Error(Errc::invalid_argument, {"cannot read '", path_, "', where rank 0 says how to reach it: ", errno_text(file.error)});
    std::istringstream lines(file.text);
    std::string word, address;
    if (!(lines >> word >> nonce_) || word != "tally") throw Error(Errc::invalid_argument, {"'", path_, "' is not a file in which ranks meet: name one that is not there yet"});
    std::vector<SocketAddress> found;
    while (lines >> address && found.size() < 256) {
      const auto resolved = resolve(address);
      found.insert(found.end(), resolved.begin(), resolved.end());
    }
    return found;
  }
  /// Once all have met: the next job may meet there.
  void close() {
    if (std::exchange(wrote_, false)) ::unlink(path_.c_str());
  }
  ~Meeting() { close(); }
  Meeting(Meeting&& other) noexcept : where_(std::move(other.where_)), path_(std::move(other.path_)), listener_(std::move(other.listener_)), nonce_(other.nonce_), wrote_(std::exchange(other.wrote_, false)) {}

  /// Whether nobody of another host can be meant.
  bool is_here_only() const {
    if (is_file()) return false;
    const std::string_view host = split_address(where_).first;
    return host == "localhost" || host == "::1" || host.starts_with("127.");
  }
  bool is_file() const { return where_.starts_with("file:"); }
  /// Tells this job from an earlier one that met in the same file.
  std::uint64_t nonce() const { return nonce_; }
  const std::string& text() const { return where_; }

 private:
  std::string where_, path_;
  FileDescriptor listener_;
  std::uint64_t nonce_ = 0;
  bool wrote_ = false;
};

}  // namespace tally::inline v0::detail
