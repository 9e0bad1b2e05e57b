// SPDX-License-Identifier: Apache-2.0
// What the tests of failures share: ranks whose errors are collected instead of thrown, and real processes that
// are ended by pid whatever happens to the test.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <catch2/catch.hpp>

#include <tally/tally.hpp>

#include "sanitized.hpp"

/// The same check for ranks that are threads and, tagged so that TSan runs can leave it out, for processes.
#define TALLY_TEST_BOTH(name, tag, check)                                      \
  TEST_CASE(name " (threads)", tag) { check(tally::threads); }                 \
  TEST_CASE(name " (processes)", tag "[processes]") { check(tally::processes); }

namespace test {

using namespace std::chrono_literals;

inline void expect(bool ok, const std::string& text) {
  if (!ok) throw std::runtime_error(text);
}
inline bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

inline std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
inline double ms(std::int64_t ns) { return static_cast<double>(ns) / 1e6; }

/// Polls until `done()` or the limit; what done() said last.
template <class F>
bool eventually(std::chrono::nanoseconds limit, F&& done) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return done();
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

/// A value that processes forked later share.
template <class T>
class Shared {
 public:
  Shared() {
    static_assert(std::is_trivially_destructible_v<T>);
    void* memory = ::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    value_ = new (memory) T{};
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  ~Shared() { ::munmap(value_, sizeof(T)); }
  T& operator*() const { return *value_; }
  T* operator->() const { return value_; }

 private:
  T* value_;
};

/// That something has happened, as all ranks see it: to be waited for instead of for some time, which a slow machine exceeds.
class Happened {
 public:
  void now() const { flag_->store(true); }
  void await() const {
    for (int tries = 0; !flag_->load() && tries < 20'000; ++tries) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (!flag_->load()) throw std::runtime_error("what a rank waits for does not happen");
  }
  /// f(), and that it is over, however it ends.
  template <class F>
  void after(F&& f) const {
    struct Guard {
      const Happened& happened;
      ~Guard() { happened.now(); }
    } guard{*this};
    f();
  }

 private:
  Shared<std::atomic<bool>> flag_;
};

/// What the kernel says this thread has spent waiting for a core; 0 where it does not say.
inline std::int64_t queued_ns() {
  std::ifstream file("/proc/thread-self/schedstat");
  std::int64_t ran = 0, queued = 0;
  file >> ran >> queued;
  return queued;
}

/// A variable of the environment, set for a while; null removes it.
class Environment {
 public:
  Environment(std::string name, const char* value) : name_(std::move(name)) {
    if (const char* before = std::getenv(name_.c_str())) before_ = before;
    put(value);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() { put(before_ ? before_->c_str() : nullptr); }

 private:
  void put(const char* value) {
    if (value) ::setenv(name_.c_str(), value, 1);
    else ::unsetenv(name_.c_str());
  }
  std::string name_;
  std::optional<std::string> before_;
};

/// How a piece of code ended, in a form that processes can share.
struct Caught {
  bool ran = false, error = false, foreign = false;  // foreign: an exception that is no tally::Error
  tally::Errc code{};
  int rank = -1, peer = -1;
  std::int64_t began = 0, ended = 0;
  char text[3200] = {};

  template <class F>
  void record(F&& f) {
    began = now_ns();
    try {
      f();
    } catch (const tally::Error& e) {
      error = true;
      code = e.errc();
      rank = e.rank();
      peer = e.peer();
      write(e.what());
    } catch (const std::exception& e) {
      foreign = true;
      write(e.what());
    }
    ended = now_ns();
    ran = true;
  }
  void write(std::string_view what) { text[what.copy(text, sizeof text - 1)] = 0; }
  bool is(tally::Errc expected) const { return ran && error && code == expected; }
};
inline std::ostream& operator<<(std::ostream& out, const Caught& c) {
  return out << (!c.ran ? "did not finish" : c.error ? "Error: " : c.foreign ? "exception: " : "no error") << c.text << " after " << ms(c.ended - c.began) << " ms";
}

template <class F>
Caught caught(F&& f) {
  Caught c;
  c.record(f);
  return c;
}

inline constexpr int most_ranks = 16;
struct Outcome {
  std::vector<Caught> ranks;
  Caught launch;
};
inline std::ostream& operator<<(std::ostream& out, const Outcome& o) {
  for (std::size_t r = 0; r < o.ranks.size(); ++r) out << "\n  rank " << r << ": " << o.ranks[r];
  return out << "\n  launch: " << o.launch;
}

/// Runs f on n ranks that keep their errors, and returns these. A rank's own failure is no failure of launch.
template <class F>
Outcome outcome_of(int n, tally::RankKind kind, F f, const tally::Options& options = {}) {
  const Shared<std::array<Caught, most_ranks>> slots;
  Caught* const each = slots->data();
  Outcome outcome;
  outcome.launch = caught([&] {
    tally::launch(
        n, [&](tally::Communicator& comm) { each[comm.rank()].record([&] { f(comm); }); }, kind, options);
  });
  outcome.ranks.assign(each, each + n);
  return outcome;
}

inline int open_descriptors(std::string_view naming = "") {
  int count = 0;
  DIR* directory = ::opendir("/proc/self/fd");
  while (const dirent* entry = ::readdir(directory)) {
    char target[256] = {};
    if (entry->d_name[0] == '.' || ::readlinkat(::dirfd(directory), entry->d_name, target, sizeof target - 1) < 0) continue;
    count += has(target, naming);
  }
  ::closedir(directory);
  return count;
}

/// Of this process.
inline long resident_bytes() {
  long pages = 0, ignored = 0;
  if (FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%ld %ld", &ignored, &pages) != 2) pages = 0;
    std::fclose(file);
  }
  return pages * ::sysconf(_SC_PAGESIZE);
}
/// Bytes of the job's file that are in memory.
inline std::int64_t resident_shared() {
  std::int64_t bytes = 0;
  DIR* directory = ::opendir("/proc/self/fd");
  while (const dirent* entry = ::readdir(directory)) {
    char target[256] = {};
    struct stat info {};
    if (entry->d_name[0] == '.' || ::readlinkat(::dirfd(directory), entry->d_name, target, sizeof target - 1) < 0 || !has(target, "memfd:tally")) continue;
    if (::fstat(std::atoi(entry->d_name), &info) == 0) bytes += info.st_blocks * 512;
  }
  ::closedir(directory);
  return bytes;
}

inline bool lives(pid_t pid) {
  // A zombie is dead: someone else has to reap it.
  char path[64], line[256] = {};
  std::snprintf(path, sizeof path, "/proc/%d/stat", static_cast<int>(pid));
  FILE* file = std::fopen(path, "re");
  if (!file) return false;
  const char* got = std::fgets(line, sizeof line, file);
  std::fclose(file);
  const char* end_of_name = got ? std::strrchr(line, ')') : nullptr;
  return end_of_name && end_of_name[1] && end_of_name[2] != 'Z' && end_of_name[2] != 'X';
}

/// No child of this process is left, dead or alive.
inline bool no_children() { return ::waitpid(-1, nullptr, WNOHANG) < 0 && errno == ECHILD; }

/// f() in a process of its own. It ends with this object, or with the process that made it, at the latest.
class Process {
 public:
  template <class F>
  explicit Process(F&& f) {
    std::fflush(nullptr);
    std::cout.flush();
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ > 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(99);
    int status = 0;
    try {
      f();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "process of a test: %s\n", e.what());
      status = 98;
    }
    std::fflush(nullptr);
    std::cout.flush();
    ::_exit(status);
  }
  Process(Process&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  Process& operator=(Process&& other) noexcept {
    std::swap(pid_, other.pid_);
    return *this;
  }
  ~Process() { end(); }

  pid_t pid() const { return pid_; }
  void kill(int signal) const { ::kill(pid_, signal); }
  /// The status of wait(2); empty if it had to be killed at the limit.
  std::optional<int> wait(std::chrono::nanoseconds limit) {
    int status = 0;
    const bool ended = eventually(limit, [&] { return ::waitpid(pid_, &status, WNOHANG) == pid_; });
    if (!ended) {
      end();
      return {};
    }
    pid_ = -1;
    return status;
  }
  void end() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
};

inline bool exited_well(const std::optional<int>& status) { return status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0; }
inline bool killed_by(const std::optional<int>& status, int signal) { return status && WIFSIGNALED(*status) && WTERMSIG(*status) == signal; }

/// f() in a process of its own, so that what it changes (limits, signals) or where it hangs stays there.
template <class F>
Caught caught_apart(std::chrono::nanoseconds limit, F&& f) {
  const Shared<Caught> result;
  Process process([&] { result->record(f); });
  const std::optional<int> status = process.wait(limit);
  if (!status) result->write("hung and was killed");
  else if (WIFSIGNALED(*status)) result->write("killed by signal " + std::to_string(WTERMSIG(*status)));
  return *result;
}

/// Names that this library could have left in /dev/shm; others use it too.
inline int shm_entries() {
  int count = 0;
  DIR* directory = ::opendir("/dev/shm");
  if (!directory) return 0;
  while (const dirent* entry = ::readdir(directory)) count += has(entry->d_name, "tally");
  ::closedir(directory);
  return count;
}

}  // namespace test
