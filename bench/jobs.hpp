// SPDX-License-Identifier: Apache-2.0
// Programs that compare starts, and the directory they share with it. Neither outlives compare, however it ends: a
// destructor ends a job; if compare is killed, the kernel signals the jobs and a helper process removes the directory.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "measure.hpp"

namespace bench {

[[noreturn]] inline void throw_errno(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

/// The program's path, by PATH; empty if there is none.
inline std::string find_program(const std::string& name) {
  const char* const path = std::getenv("PATH");
  for (std::string rest = path ? std::string(path) + ':' : ""; !rest.empty(); rest.erase(0, rest.find(':') + 1)) {
    const std::string candidate = rest.substr(0, rest.find(':')) + '/' + name;
    if (::access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return {};
}

/// A private directory in memory where there is such a file system.
class Workplace {
 public:
  Workplace() {
    const char* const wanted = std::getenv("TMPDIR");
    path_ = std::string(::access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : wanted ? wanted : "/tmp") + "/tally-compare-" + std::string(6, 'X');  // which mkdtemp replaces
    if (!::mkdtemp(path_.data())) throw_errno(path_);
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw_errno("pipe");
    remover_ = ::fork();
    if (remover_ < 0) throw_errno("fork");
    if (remover_ == 0) {
      ::close(ends[1]);
      remove_at_end(ends[0]);
    }
    ::close(ends[0]);
    alive_ = ends[1];
  }
  Workplace(const Workplace&) = delete;
  Workplace& operator=(const Workplace&) = delete;
  ~Workplace() {
    ::close(alive_);
    ::waitpid(remover_, nullptr, 0);
  }
  const std::string& path() const { return path_; }

 private:
  /// The helper's life: it sleeps until compare has closed the pipe, if only by dying.
  [[noreturn]] void remove_at_end(int pipe) const {
    ::setsid();  // not in reach of the terminal's Ctrl-C
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::signal(signal, SIG_IGN);
    char byte;
    while (::read(pipe, &byte, 1) != 0) {
    }
    std::error_code error;
    for (int tries = 0; tries < 20 && std::filesystem::exists(path_, error); ++tries) {
      if (tries > 0) ::usleep(100'000);  // someone who is just being ended may still have made a file
      std::filesystem::remove_all(path_, error);
    }
    ::_exit(0);
  }
  std::string path_;
  pid_t remover_ = -1;
  int alive_ = -1;
};

/// A program in a process group of its own, its output in a file.
class Job {
 public:
  Job(const std::vector<std::string>& command, std::string log) : log_(std::move(log)) {
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) throw_errno("fork");
    if (pid_ == 0) {
      ::setpgid(0, 0);
      ::prctl(PR_SET_PDEATHSIG, SIGTERM);  // launchers end their ranks then
      if (::getppid() != parent) ::_exit(1);
      const int in = ::open("/dev/null", O_RDONLY), out = ::open(log_.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      ::dup2(in, 0);
      ::dup2(out, 1);
      ::dup2(out, 2);
      ::execv(arguments[0], arguments.data());
      ::_exit(127);
    }
    ::setpgid(pid_, pid_);
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  ~Job() {
    if (!reaped_) {
      ::kill(-pid_, SIGTERM);
      if (!ends_within(2)) kill_all();
    }
    for (const int rank : ranks_) ::close(rank);
  }

  /// A process of this job that may be in another process group.
  void add_rank(pid_t pid) {
    if (const int fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)); fd >= 0) ranks_.push_back(fd);
  }
  bool running() const {
    siginfo_t info{};
    return !reaped_ && ::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
  }
  /// Waits for its end; false if it still runs.
  bool ends_within(double seconds) {
    for (const double until = seconds_now() + seconds; running();) {
      if (seconds_now() > until) return false;
      ::usleep(5000);
    }
    kill_all();  // whom its first process has left behind
    return true;
  }
  /// The last line it wrote.
  std::string last_words() const {
    std::ifstream file(log_);
    std::string line, last;
    while (std::getline(file, line))
      if (line.find_first_not_of("-= \t") != line.npos) last = line;
    return last;
  }

 private:
  void kill_all() {
    for (const int rank : ranks_) ::syscall(SYS_pidfd_send_signal, rank, SIGKILL, nullptr, 0);
    ::kill(-pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    reaped_ = true;
  }
  std::string log_;
  pid_t pid_ = -1;
  bool reaped_ = false;
  std::vector<int> ranks_;  // pidfds, so that no other process can be meant
};

}  // namespace bench
