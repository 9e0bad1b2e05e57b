// SPDX-License-Identifier: Apache-2.0
// Starts ranks on this machine and waits for them, so that a first program needs no launcher. Ranks are forked
// processes, or threads on request. The first rank that fails ends the others, and its error is thrown here.
#pragma once

#include <dirent.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <concepts>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "bootstrap.hpp"

namespace tally::inline v0 {

enum class RankKind : std::uint8_t { processes, threads };
inline constexpr RankKind processes = RankKind::processes;
inline constexpr RankKind threads = RankKind::threads;

namespace detail {

/// How a rank ended, in a form that fits through a pipe.
struct RankFailure {
  Errc code = Errc::rank_failed;
  ErrorContext context;
  bool done = false;  // no failure at all, which a rank says as its last word
  char text[3000] = {};
  void set_text(std::string_view what) { text[what.copy(text, sizeof text - 1)] = 0; }

  static RankFailure current(Rank rank) {
    RankFailure failure;
    failure.context.rank = rank;
    try {
      throw;
    } catch (const Error& error) {
      failure.code = error.errc();
      failure.context = error.context();
      failure.context.rank = rank;
      failure.set_text(error.text());
    } catch (const std::exception& error) {
      failure.set_text(error.what());
    } catch (...) {
      failure.set_text("an exception that is no std::exception");
    }
    return failure;
  }
  /// Consequences of another rank's failure: only reported if there is no cause.
  bool is_consequence() const { return code == Errc::aborted || code == Errc::peer_lost || code == Errc::peer_left; }
};

/// The cause of a failed job: the first failure that is not a mere consequence of another.
inline void rethrow_cause(const std::vector<RankFailure>& in_order) {
  if (in_order.empty()) return;
  const RankFailure* cause = &in_order.front();
  for (const RankFailure& failure : in_order)
    if (!failure.is_consequence()) {
      cause = &failure;
      break;
    }
  throw Error(cause->code, {"rank ", cause->context.rank, ": ", cause->text}, cause->context);
}

/// After all ranks succeeded: calls that only send cannot notice by themselves that nobody received.
inline void throw_if_unread(const SlotMemory& memory) {
  if (memory.header().abort.load() != 0) return;  // an operation failed, and its error was caught
  const SlotMemory::Unread unread = memory.unread();
  if (unread.from < 0) return;
  const bool message = Fingerprint::unpack(unread.fingerprint).operation == Collective::send;
  throw Error(Errc::mismatch,
              {"rank ", unread.from, " sent rank ", unread.to, " data in ", describe(unread.fingerprint, memory.rank_line(unread.from).count.load()), message ? Piece("") : Piece(" #"), message ? Piece("") : Piece(unread.operation),
               " that nobody received", message ? "" : ": the ranks called different operations"},
              {unread.from, unread.to, message ? 0 : unread.operation, {}});
}

/// What a rank is there for, apart from the code around it, which is run once and compiled for its size.
template <class F>
[[gnu::noinline, gnu::hot]] void work(F& f, Communicator& comm) {
  f(comm);
}
/// Runs f as one rank. A failure is told to the other ranks before it goes on.
template <class F>
void run_rank(const std::shared_ptr<SlotMemory>& memory, Rank me, const Options& options, F& f) {
  const auto abort = [&](const char* why) { memory->abort({Errc::aborted, me, -1, concat({"rank ", me, " aborted the communicator: ", why})}); };
  try {
    Communicator comm = make_communicator(memory, me, options);
    try {
      work(f, comm);
    } catch (const std::exception& error) {
      abort(error.what());  // before comm says goodbye, which would hide why
      throw;
    } catch (...) {
      abort("an exception");
      throw;
    }
  } catch (const std::bad_alloc& error) {
    abort(error.what());
    throw;
  }
}

template <class F>
void launch_threads(int n, F& f, const Options& options) {
  options.expect_transport("thread", "threads");
  const std::shared_ptr<SlotMemory> memory = std::make_shared<ThreadMemory>(SlotLayout(n, options.slots));
  write_model(*memory, options);
  std::vector<RankFailure> failures;
  std::mutex failing;
  {
    std::vector<std::jthread> ranks;
    try {
      for (Rank r = 0; r < n; ++r)
        ranks.emplace_back([&, r] {
          try {
            run_rank(memory, r, options, f);
          } catch (...) {
            const RankFailure failure = RankFailure::current(r);
            const std::lock_guard lock(failing);
            failures.push_back(failure);
          }
        });
    } catch (const std::system_error& error) {
      const auto started = static_cast<Rank>(ranks.size());
      RankFailure failure;
      failure.code = Errc::no_resources;
      failure.context.rank = started;
      failure.set_text(concat({"could not be started: ", error.what()}));
      SlotTransport(memory, started).abort({failure.code, started, -1, concat({"rank ", started, " ", failure.text})});
      const std::lock_guard lock(failing);
      failures.push_back(failure);
    }
  }
  rethrow_cause(failures);
  throw_if_unread(*memory);
}

inline int running_threads() {
  int count = 0;
  DIR* tasks = ::opendir("/proc/self/task");
  if (!tasks) return 1;
  while (const dirent* entry = ::readdir(tasks)) count += entry->d_name[0] != '.';
  ::closedir(tasks);
  return count;
}

/// The forked ranks. Whatever happens, none outlives this object.
class Children {
 public:
  struct Child {
    pid_t pid = -1;
    FileDescriptor process, pipe;
    bool ended = false;
  };
  ~Children() {
    for (Child& child : children_)
      if (!child.ended) {
        ::kill(child.pid, SIGKILL);
        ::waitpid(child.pid, nullptr, 0);
      }
  }
  void add(Child child) { children_.push_back(std::move(child)); }

  /// Waits for all; a while after the first failure it ends those that are left. Failures in order of their time.
  std::vector<RankFailure> wait() {
    using Clock = std::chrono::steady_clock;
    std::vector<RankFailure> failures;
    std::optional<Clock::time_point> patience;
    for (std::size_t left = children_.size(); left > 0;) {
      std::vector<pollfd> events;
      for (const Child& child : children_)
        if (!child.ended) events.push_back({child.process.get(), POLLIN, 0});
      int timeout = -1;
      if (patience) timeout = static_cast<int>(std::max<std::int64_t>(0, std::chrono::duration_cast<std::chrono::milliseconds>(*patience - Clock::now()).count()));
      if (::poll(events.data(), events.size(), timeout) == 0) {
        for (Child& child : children_)
          if (!child.ended) ::kill(child.pid, SIGKILL), child.ended = true, ::waitpid(child.pid, nullptr, 0);
        break;
      }
      for (std::size_t r = 0; r < children_.size(); ++r) {
        Child& child = children_[r];
        if (child.ended) continue;
        int status = 0;
        const pid_t waited = ::waitpid(child.pid, &status, WNOHANG);
        if (waited == 0 || (waited < 0 && errno != ECHILD)) continue;  // ECHILD: SIGCHLD is ignored, so its status is lost
        child.ended = true;
        --left;
        const std::optional<RankFailure> failure = why(static_cast<Rank>(r), child, waited > 0 ? std::optional(status) : std::nullopt);
        if (!failure) continue;
        failures.push_back(*failure);
        if (!patience) patience = Clock::now() + std::chrono::seconds(1);
      }
    }
    return failures;
  }

 private:
  /// Why it failed, in its own words if it left any; nothing if it did not.
  static std::optional<RankFailure> why(Rank rank, const Child& child, std::optional<int> status) {
    RankFailure failure;
    pollfd event{child.pipe.get(), POLLIN, 0};
    if (::poll(&event, 1, 0) > 0 && ::read(child.pipe.get(), &failure, sizeof failure) == static_cast<ssize_t>(sizeof failure)) {
      failure.text[sizeof failure.text - 1] = 0;
      return failure.done ? std::nullopt : std::optional(failure);
    }
    if (status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0) return std::nullopt;
    failure = {};
    failure.context.rank = rank;
    if (!status) failure.set_text("ended without a word, and its exit status is lost because SIGCHLD is ignored or reaped elsewhere");
    else if (WIFSIGNALED(*status)) failure.set_text(concat({"killed by signal ", WTERMSIG(*status), " (", ::strsignal(WTERMSIG(*status)), ")"}));
    else failure.set_text(concat({"exited with status ", WEXITSTATUS(*status)}));
    return failure;
  }
  std::vector<Child> children_;
};

/// The rest of a forked rank's life.
template <class F>
[[noreturn]] void live_as_rank(Rank me, int n, const std::shared_ptr<ShmFile>& file, const SlotLayout& layout, const FileDescriptor& pipe, pid_t parent, F& f, const Options& options) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(1);  // it died before that took effect
  int status = 1;
  try {
    const auto memory = std::make_shared<ShmMemory>(file, layout, 0, me);
    while (memory->header().ready.load() == 0) futex_wait(memory->header().ready, 0, std::chrono::milliseconds(50));
    std::vector<pid_t> pids;
    for (Rank r = 0; r < n; ++r) pids.push_back(static_cast<pid_t>(memory->rank_line(r).pid.load()));
    file->watch(pids);
    run_rank(memory, me, options, f);
    RankFailure none;
    none.done = true;
    [[maybe_unused]] const ssize_t written = ::write(pipe.get(), &none, sizeof none);
    status = 0;
  } catch (...) {
    const RankFailure failure = RankFailure::current(me);
    [[maybe_unused]] const ssize_t written = ::write(pipe.get(), &failure, sizeof failure);
  }
  std::fflush(nullptr);
  std::cout.flush();
  ::_exit(status);
}

template <class F>
[[gnu::cold]] void launch_processes(int n, F& f, const Options& options) {
  options.expect_transport("shm", "processes of one host");
  // A thread that was joined may still be on its way out of the kernel.
  int count = running_threads();
  for (int tries = 0; count > 1 && tries < 500; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    count = running_threads();
  }
  if (count > 1)
    throw Error(Errc::unsupported, {"launch() would fork while ", count - 1, " other threads run, which is not safe; launch before starting them, or use tally::threads"});
  const SlotLayout layout(n, options.slots);
  const auto file = std::make_shared<ShmFile>();
  const ShmMemory memory(file, layout, 0, -1);
  write_model(memory, options);
  Clock::host();  // calibrated once, for all
  std::cout.flush();
  std::cerr.flush();
  std::fflush(nullptr);

  Children children;
  const pid_t parent = ::getpid();
  for (Rank r = 0; r < n; ++r) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw Error(Errc::no_resources, {"no descriptors to start rank ", r, ": ", errno_text(errno)});
    FileDescriptor read_end(ends[0]), write_end(ends[1]);
    const pid_t pid = ::fork();
    if (pid < 0) throw Error(Errc::no_resources, {"cannot start rank ", r, " (fork): ", errno_text(errno)});
    if (pid == 0) live_as_rank(r, n, file, layout, write_end, parent, f, options);
    Children::Child child;
    child.pid = pid;
    child.process = FileDescriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    child.pipe = std::move(read_end);
    const bool watched = static_cast<bool>(child.process);
    children.add(std::move(child));
    if (!watched) throw Error(Errc::no_resources, {"no descriptor to watch rank ", r, " (pidfd_open): ", errno_text(errno)});
    memory.rank_line(r).pid.store(static_cast<std::uint32_t>(pid));
  }
  memory.header().ready.store(1);
  futex_wake(memory.header().ready);
  rethrow_cause(children.wait());
  throw_if_unread(memory);
}

}  // namespace detail

/// Runs f(comm) as n ranks on this machine and returns when all have ended. Ranks are forked processes (nothing
/// they change is seen here; refused while other threads run), or tally::threads. Throws the first failure of a
/// rank, with its rank; the others are ended. Options are defaults that the environment overrides.
template <std::invocable<Communicator&> F>
void launch(int n, F f, RankKind kind = processes, const Options& defaults = {}) {
  if (n < 1 || n > 1 << 15) throw Error(Errc::invalid_argument, {"cannot launch ", n, " ranks: there must be 1 to 32768"});
  const Options options = Options::from_environment(defaults);
  if (kind == RankKind::threads) detail::launch_threads(n, f, options);
  else detail::launch_processes(n, f, options);
}

}  // namespace tally::inline v0
