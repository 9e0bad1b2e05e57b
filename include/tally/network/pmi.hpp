// SPDX-License-Identifier: Apache-2.0
// What ranks tell each other through the process manager that started them, where that speaks PMI version 1 on a descriptor of theirs
// (mpiexec of MPICH and its kin): lines of words KEY=VALUE, a question and its answer at a time.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <optional>
#include <string>
#include <string_view>

#include "../environment.hpp"
#include "../types.hpp"
#include "socket.hpp"

namespace tally::inline v0::detail {

class ProcessManager {
 public:
  /// The one that PMI_FD, PMI_RANK and PMI_SIZE name, if there is one.
  static std::optional<ProcessManager> from_environment() {
    const auto fd = environment_number<int>("PMI_FD", 0, 1 << 20), rank = environment_number<int>("PMI_RANK", 0, 1 << 30), size = environment_number<int>("PMI_SIZE", 1, 1 << 30);
    if (!fd || !rank || !size || *rank >= *size) return std::nullopt;
    return ProcessManager(*fd, *rank);
  }
  Rank rank() const { return rank_; }

  /// What rank 0 says, on all ranks, each of which calls once and is done with the process manager then; of others the word is not looked at. A word has no spaces.
  std::string from_rank_0(std::string_view word, nanoseconds limit) {
    static std::atomic<bool> was_asked{false};
    if (was_asked.exchange(true)) fail("was asked by this process before, and answers but once");
    until_ = std::chrono::steady_clock::now() + limit;
    (void)ask("cmd=init pmi_version=1 pmi_subversion=1", "response_to_init");
    const std::string table = value_of(ask("cmd=get_my_kvsname", "my_kvsname"), "kvsname");
    if (rank_ == 0) (void)ask(concat({"cmd=put kvsname=", table, " key=tally value=", word}), "put_result");
    (void)ask("cmd=barrier_in", "barrier_out");
    const std::string found = value_of(ask(concat({"cmd=get kvsname=", table, " key=tally"}), "get_result"), "value");
    (void)ask("cmd=finalize", "finalize_ack");  // who ends without it is taken for one that failed
    return found;
  }

 private:
  static constexpr std::size_t longest = 65536;
  ProcessManager(int fd, Rank rank) : fd_(fd), rank_(rank) {}

  [[noreturn]] void fail(const std::string& why) const { throw Error(Errc::protocol, {"the process manager that started this rank (PMI_FD=", fd_, ") ", why, "; name a place to meet by TALLY_ADDRESS"}, {rank_, -1, 0, {}}); }
  static std::string value_of(std::string_view words, std::string_view key) {
    const std::string what = concat({" ", key, "="});
    const std::string all = concat({" ", words});
    const std::size_t at = all.find(what);
    if (at == all.npos) return {};
    const std::size_t begin = at + what.size();
    return all.substr(begin, all.find(' ', begin) - begin);
  }
  /// The line that answers. Waits as long as others may need to come.
  std::string ask(std::string_view question, std::string_view answer) {
    std::string text = concat({question, "\n"});
    if (::send(fd_, text.data(), text.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(text.size())) fail(concat({"does not listen: ", errno_text(errno)}));  // short, and there is room
    text.clear();
    for (char c = 0;;) {
      if (!wait_for_events(fd_, POLLIN, until_)) throw Error(Errc::timeout, {"the process manager that started this rank did not say in time where rank 0 is: some ranks did not ask"}, {rank_, -1, 0, {}});
      const ssize_t got = ::read(fd_, &c, 1);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) fail("has gone");
      if (c == '\n') break;
      text += c;
      if (text.size() > longest) fail("says a line without an end");
    }
    if (value_of(text, "cmd") != answer) fail(concat({"answers '", text.substr(0, 200), "'"}));
    if (const std::string result = value_of(text, "rc"); !result.empty() && result != "0") fail(concat({"refuses: '", text.substr(0, 200), "'"}));
    return text;
  }

  int fd_;
  Rank rank_;
  std::chrono::steady_clock::time_point until_{};
};

}  // namespace tally::inline v0::detail
