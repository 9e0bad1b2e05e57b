// SPDX-License-Identifier: Apache-2.0
// Where a job's ranks meet, as users and launchers say it: an address of rank 0's host, a file that all see and rank 0 writes its
// addresses to, the first host of Slurm's list, or what rank 0 tells the process manager. Names are resolved again and again, since hosts may still be starting.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
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
#include "pmi.hpp"
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

/// What has all ranks hear a word of rank 0's; each calls once. Of others the word is not looked at.
struct Teller {
  Rank rank = -1;
  std::function<std::string(std::string_view word, nanoseconds limit)> from_rank_0;
};
/// Those that headers of other libraries bring; empty where there is none.
inline std::vector<std::optional<Teller> (*)()>& tellers() {
  static std::vector<std::optional<Teller> (*)()> all;
  return all;
}

class Meeting {
 public:
  /// HOST:PORT, or several with commas between, any of which may be right; or file:PATH.
  explicit Meeting(std::string where) : where_(std::move(where)) {
    if (where_.starts_with("file:")) path_ = where_.substr(5);
    if (is_file() && path_.empty()) throw Error(Errc::invalid_argument, {"'", where_, "' names no file: it should be file:PATH"});
    if (is_file()) return;
    for (std::size_t begin = 0, end = 0; end < where_.size(); begin = end + 1) {
      end = std::min(where_.find(',', begin), where_.size());
      places_.push_back(where_.substr(begin, end - begin));
    }
    if (places_.empty()) places_.emplace_back();
    for (const std::string& place : places_)
      if (split_address(place).second == 0) throw Error(Errc::invalid_argument, {"'", place, "' is no place to meet: port 0 is none that ranks can look for"});
  }
  /// Rank 0's own addresses, at which it listens. `interface`: see choose_addresses().
  static Meeting here(std::string_view interface) {
    std::vector<SocketAddress> mine = choose_addresses(interface, own_interfaces());
    if (!interface.empty()) mine.resize(1);
    FileDescriptor fd = interface.empty() ? listen_anywhere(0) : listen_at(mine[0]);
    std::string all;
    for (SocketAddress& each : mine) {
      each.port = own_address(fd).port;
      const std::string text = each.text();
      if ((own_address(fd).family == 6 || !interface.empty() || each.family == 4) && all.size() + text.size() < longest_list) all += (all.empty() ? "" : ",") + text;
    }
    Meeting meeting(std::move(all));
    meeting.listener_ = std::move(fd);
    return meeting;
  }
  /// Where this rank, which is rank 0, listens already.
  explicit Meeting(FileDescriptor listener) : Meeting(own_address(listener).text()) { listener_ = std::move(listener); }
  /// TALLY_ADDRESS, or beside the port that torchrun names, or where rank 0 is, as a teller has it, or at Slurm's first host, or as a
  /// process manager tells.
  /// `limit`: for who has to wait for others to learn it.
  static Meeting from_environment(nanoseconds limit = std::chrono::seconds(300)) {
    if (const auto where = environment("TALLY_ADDRESS")) return Meeting(std::string(*where));
    const auto host = environment("MASTER_ADDR");
    const auto port = environment_number<int>("MASTER_PORT", 1, 65534);
    if (host && port) return Meeting(concat({*host, ":", *port + 1}));  // that port itself is the framework's
    for (const auto find : tellers())
      if (const auto teller = find()) return as_told(*teller, limit);
    for (const char* list : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}) {
      const auto hosts = environment(list);
      if (!hosts) continue;
      std::string job;
      for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID"}) job += concat({environment(name).value_or(""), "."});
      if (const std::string first = first_host(*hosts); !first.empty()) return Meeting(concat({first, ":", 20'000 + hash_text(job) % 12'000}));  // below those that systems give away
    }
    if (auto manager = ProcessManager::from_environment()) return as_told({manager->rank(), [&](std::string_view word, nanoseconds most) { return manager->from_rank_0(word, most); }}, limit);
    if (const auto offered = environment("TALLY_MEETING")) return Meeting(std::string(*offered));
    throw Error(Errc::invalid_argument, "ranks that talk over a network need a place to meet, also on one host: set TALLY_ADDRESS, the same for all, to HOST:PORT of rank 0's host or to file:PATH of a folder that all hosts share");
  }

  /// Rank 0: listens there, and says so to those that look into the file. `interface`: see choose_addresses().
  FileDescriptor listen(std::string_view interface) {
    if (listener_) return std::move(listener_);
    std::vector<SocketAddress> mine;
    if (!interface.empty() || is_file()) mine = choose_addresses(interface, own_interfaces());
    if (!interface.empty()) mine.resize(1);
    if (!is_file()) {
      const auto [host, port] = split_address(places_.front());
      SocketAddress ip;
      int bits = 0;
      // Where all are told an address, it is that one; a host's own name is often one of loopback to itself.
      if (host == "localhost" || (host.find('/') == std::string_view::npos && parse_range(host, ip, bits))) return listen_at(resolve(places_.front()).front());
      if (mine.empty()) return listen_anywhere(static_cast<std::uint16_t>(port));
      mine[0].port = static_cast<std::uint16_t>(port);
      return listen_at(mine[0]);
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
    if (!is_file()) {
      std::vector<SocketAddress> found;
      for (const std::string& place : places_) {
        const auto resolved = resolve(place);
        found.insert(found.end(), resolved.begin(), resolved.end());
      }
      return found;
    }
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
  Meeting(Meeting&& other) noexcept : where_(std::move(other.where_)), places_(std::move(other.places_)), path_(std::move(other.path_)), listener_(std::move(other.listener_)), nonce_(other.nonce_), wrote_(std::exchange(other.wrote_, false)) {}

  /// Whether nobody of another host can be meant.
  bool is_here_only() const {
    if (is_file()) return false;
    return std::ranges::all_of(places_, [](const std::string& place) {
      const std::string_view host = split_address(place).first;
      return host == "localhost" || host == "::1" || host.starts_with("127.");
    });
  }
  bool is_file() const { return where_.starts_with("file:"); }
  /// Tells this job from an earlier one that met in the same file.
  std::uint64_t nonce() const { return nonce_; }
  const std::string& text() const { return where_; }

 private:
  static Meeting as_told(const Teller& teller, nanoseconds limit) {
    if (teller.rank != 0) {
      std::string where = teller.from_rank_0({}, limit);
      if (where == nowhere) throw Error(Errc::peer_lost, "rank 0 has no address at which others reach it", {teller.rank, 0, 0, {}});
      return Meeting(std::move(where));
    }
    std::optional<Meeting> meeting;
    try {
      meeting.emplace(here(environment("TALLY_INTERFACE").value_or("")));
    } catch (const Error&) {
      (void)teller.from_rank_0(nowhere, limit);  // the others wait for a word
      throw;
    }
    (void)teller.from_rank_0(meeting->text(), limit);
    return std::move(*meeting);
  }

  static constexpr std::string_view nowhere = "-";
  static constexpr std::size_t longest_list = 900;  // process managers take a thousand bytes

  std::string where_;
  std::vector<std::string> places_;  // HOST:PORT each
  std::string path_;
  FileDescriptor listener_;
  std::uint64_t nonce_ = 0;
  bool wrote_ = false;
};

}  // namespace tally::inline v0::detail
