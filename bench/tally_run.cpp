// SPDX-License-Identifier: Apache-2.0
// Starts a program as the ranks of a job, here or on other hosts over ssh: tells each who it is, marks whose output is whose, passes
// on signals, and ends them all once one has failed. Exit status: that of the first rank that failed, 128 and the number of a
// signal, 2 for bad arguments.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <tally/file.hpp>
#include <tally/text.hpp>
#include <utility>
#include <vector>

#include "arguments.hpp"

extern char** environ;

namespace {

using tally::detail::concat, tally::detail::FileDescriptor, tally::detail::errno_text;
using Steady = std::chrono::steady_clock;

struct Settings {
  int ranks = 1;
  std::string hosts_file, shell = "ssh -o BatchMode=yes", address;
  std::vector<std::string> pass, command;
  double grace = 5;
  bool plain = false;
};

constexpr const char* examples = R"(
Examples:
  tally_run -n 4 ./train --steps 100                   four ranks here
  tally_run -n 8 --hosts hosts ./train                 on the hosts of a file, which reach each other by name and share this folder
  TALLY_TRANSPORT=tcp tally_run -n 2 ./train           two ranks here, but over TCP

The file names a host per line, the first of which has rank 0: "node1" or "node1 slots=4"; # begins a comment. Variables of the
environment that begin with TALLY_ go along, others by -x. Each line that a rank writes is marked with its number.)";

struct Failure {
  std::string text;
};
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw Failure{concat({parts...})};
}

struct Host {
  std::string name;  // empty: here
  int slots = 0;     // 0: its share
};

std::vector<Host> read_hosts(const std::string& path) {
  const auto file = tally::detail::read_start(path, 1 << 20);
  if (file.error != 0) refuse("cannot read '", path, "': ", errno_text(file.error));
  std::istringstream lines(file.text);
  std::vector<Host> hosts;
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    std::istringstream words(line.substr(0, line.find('#')));
    Host host;
    if (!(words >> host.name)) continue;
    if (host.name.starts_with('-')) refuse(path, " line ", number, ": '", host.name, "' is no host");
    std::string word;
    while (words >> word) {
      const std::string_view digits = word.starts_with("slots=") ? std::string_view(word).substr(6) : std::string_view{};
      const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), host.slots);
      if (digits.empty() || error != std::errc{} || end != digits.data() + digits.size() || host.slots < 1) refuse(path, " line ", number, ": '", word, "' is not slots=N");
    }
    hosts.push_back(host);
  }
  if (hosts.empty()) refuse("'", path, "' names no host");
  return hosts;
}
/// Where each rank goes: hosts one after another, each with its slots or an even share.
std::vector<Host> place(const Settings& s) {
  std::vector<Host> of_rank;
  if (s.hosts_file.empty()) return std::vector<Host>(static_cast<std::size_t>(s.ranks));
  const std::vector<Host> hosts = read_hosts(s.hosts_file);
  const int share = (s.ranks + static_cast<int>(hosts.size()) - 1) / static_cast<int>(hosts.size());
  for (const Host& host : hosts)
    for (int i = 0; i < (host.slots > 0 ? host.slots : share) && static_cast<int>(of_rank.size()) < s.ranks; ++i) of_rank.push_back(host);
  if (static_cast<int>(of_rank.size()) < s.ranks) refuse("the hosts of '", s.hosts_file, "' have slots for ", of_rank.size(), " ranks, not for ", s.ranks);
  return of_rank;
}

std::string random_word() {
  std::array<unsigned char, 16> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) refuse("no random numbers: ", errno_text(errno));
  std::string word;
  for (const unsigned char byte : bytes) word += "0123456789abcdef"[byte >> 4u], word += "0123456789abcdef"[byte & 15u];
  return word;
}
std::string shell_quoted(std::string_view text) {
  std::string result = "'";
  for (const char c : text) c == '\'' ? result += "'\\''" : result += c;
  return result + "'";
}

/// What a shell on another host is to do. It comes by its standard input, where nobody else can read it, and which afterwards carries
/// signals; its end, because this program is gone, ends the rank.
std::string script(const Settings& s, const std::vector<std::pair<std::string, std::string>>& variables) {
  std::string text = "{\n";
  std::array<char, 4096> folder{};
  if (::getcwd(folder.data(), folder.size())) text += concat({"cd ", shell_quoted(folder.data()), " || exit 126\n"});
  for (const auto& [name, value] : variables) text += concat({"export ", name, "=", shell_quoted(value), "\n"});
  std::string command;
  for (const std::string& word : s.command) command += shell_quoted(word) + " ";
  text += concat({"setsid ", command, "</dev/null &\nrank=$!\nexec 3<&0\n"
                           "{ while read -r signal <&3; do kill -s \"$signal\" -- \"-$rank\"; done; kill -s TERM -- \"-$rank\"; sleep 2; kill -s KILL -- \"-$rank\"; } 2>/dev/null >/dev/null &\n"
                           "watch=$!\nexec 3<&- </dev/null\nwait $rank\nstatus=$?\nkill -s KILL $watch 2>/dev/null\nexit $status\n}\n"});
  return text;
}

/// Whole lines, each with the rank's number before it.
class Output {
 public:
  Output(FileDescriptor from, int to, std::string mark) : from_(std::move(from)), to_(to), mark_(std::move(mark)) {}
  int fd() const { return from_.get(); }
  bool open() const { return static_cast<bool>(from_); }
  void read() {
    std::array<char, 16384> buffer;
    const ssize_t got = ::read(from_.get(), buffer.data(), buffer.size());
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (got <= 0) return close();
    held_.append(buffer.data(), static_cast<std::size_t>(got));
    if (mark_.empty()) return flush(held_.size());
    const std::size_t end = held_.rfind('\n');
    if (end != std::string::npos) flush(end + 1);
    else if (held_.size() > 65536) held_ += '\n', flush(held_.size());
  }
  void close() {
    if (!held_.empty() && !mark_.empty()) held_ += '\n';
    flush(held_.size());
    from_ = FileDescriptor();
  }

 private:
  void flush(std::size_t bytes) {
    std::string text;
    if (mark_.empty()) text = held_.substr(0, bytes);
    for (std::size_t at = 0; !mark_.empty() && at < bytes;) {
      const std::size_t end = held_.find('\n', at) + 1;
      text.append(mark_).append(held_, at, end - at);
      at = end;
    }
    held_.erase(0, bytes);
    for (std::string_view rest = text; !rest.empty();) {
      const ssize_t wrote = ::write(to_, rest.data(), rest.size());
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote < 0) return;  // nobody reads it any more
      rest.remove_prefix(static_cast<std::size_t>(wrote));
    }
  }
  FileDescriptor from_;
  int to_;
  std::string mark_, held_;
};

struct RankProcess {
  int rank = 0;
  std::string host;
  pid_t pid = -1;
  bool ended = false;
  FileDescriptor orders;  // to a shell on another host
  std::vector<Output> outputs;

  std::string name() const { return host.empty() ? concat({"rank ", rank}) : concat({"rank ", rank, " on ", host}); }
  void signal(int number) const {
    if (ended) return;
    if (host.empty()) {
      ::kill(-pid, number);
      return;
    }
    const std::string order = concat({::sigabbrev_np(number), "\n"});
    if (::write(orders.get(), order.data(), order.size()) < 0 && number == SIGKILL) ::kill(-pid, SIGKILL);
  }
};

std::pair<FileDescriptor, FileDescriptor> pipe_pair() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) refuse("no descriptors for another rank: ", errno_text(errno), "; raise the limit (ulimit -n)");
  return {FileDescriptor(ends[0]), FileDescriptor(ends[1])};
}

class Job {
 public:
  explicit Job(const Settings& settings) : settings_(settings), hosts_(place(settings)) {}
  ~Job() {
    for (RankProcess& each : ranks_)
      if (!each.ended) ::kill(-each.pid, SIGKILL), ::waitpid(each.pid, nullptr, 0);
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  int run() {
    sigset_t watched;
    sigemptyset(&watched);
    for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCHLD}) sigaddset(&watched, number);
    ::sigprocmask(SIG_BLOCK, &watched, &before_);
    ::signal(SIGPIPE, SIG_IGN);
    const FileDescriptor signals(::signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!signals) refuse("no descriptor for signals: ", errno_text(errno));
    start();
    while (running() || any_output()) {
      std::vector<pollfd> events{{signals.get(), POLLIN, 0}};
      for (RankProcess& each : ranks_)
        for (const Output& output : each.outputs) events.push_back({output.fd(), POLLIN, 0});
      const int limit = end_ ? static_cast<int>(std::clamp<std::int64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(*end_ - Steady::now()).count() + 1, 0, 1 << 30)) : -1;
      if (::poll(events.data(), events.size(), limit) < 0 && errno != EINTR) refuse("cannot wait for the ranks: ", errno_text(errno));
      std::size_t next = 1;
      for (RankProcess& each : ranks_)
        for (Output& output : each.outputs)
          if (events[next++].revents && output.open()) output.read();
      signalfd_siginfo info{};
      while (::read(signals.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info))
        if (info.ssi_signo != SIGCHLD) pass_on(static_cast<int>(info.ssi_signo));
      reap();
      if (end_ && Steady::now() >= *end_) end();
    }
    return status_;
  }

 private:
  void start() {
    const std::string job = random_word(), secret = random_word();
    const char* const known = std::getenv("TALLY_ADDRESS");
    std::string address = !settings_.address.empty() ? settings_.address : known ? known : "";
    const auto port = 20'000 + static_cast<std::uint32_t>(std::stoul(job.substr(0, 7), nullptr, 16)) % 12'000;  // below those that systems give away
    if (address.empty() && !settings_.hosts_file.empty()) address = concat({hosts_[0].name, ":", port});
    const int width = static_cast<int>(std::to_string(settings_.ranks - 1).size());
    for (int rank = 0; rank < settings_.ranks; ++rank) {
      std::vector<std::pair<std::string, std::string>> variables{{"TALLY_RANK", std::to_string(rank)}, {"TALLY_SIZE", std::to_string(settings_.ranks)}, {"TALLY_JOB", job}};
      // To have an address asks for a network; ranks of one host are only told where they would meet, if something else does.
      if (address.empty()) variables.emplace_back("TALLY_MEETING", concat({"127.0.0.1:", port}));
      else variables.emplace_back("TALLY_ADDRESS", address);
      const char* const own = std::getenv("TALLY_SECRET");
      if (!(own && *own)) variables.emplace_back("TALLY_SECRET", secret);
      std::string number = std::to_string(rank);
      number.insert(0, static_cast<std::size_t>(width) - number.size(), ' ');
      start(rank, hosts_[static_cast<std::size_t>(rank)], variables, settings_.plain ? "" : concat({"[", number, "] "}));
    }
  }
  void start(int rank, const Host& host, std::vector<std::pair<std::string, std::string>> variables, const std::string& mark) {
    auto [out, to_out] = pipe_pair();
    auto [err, to_err] = pipe_pair();
    auto [in, to_in] = pipe_pair();
    auto [trouble, to_trouble] = pipe_pair();
    const pid_t parent = ::getpid(), pid = ::fork();
    if (pid < 0) refuse("cannot start rank ", rank, ": ", errno_text(errno));
    if (pid == 0) {
      ::setpgid(0, 0);
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);
      ::sigprocmask(SIG_SETMASK, &before_, nullptr);
      ::signal(SIGPIPE, SIG_DFL);
      ::dup2(to_out.get(), 1);
      ::dup2(to_err.get(), 2);
      std::vector<std::string> words = settings_.command;
      if (!host.name.empty()) {
        ::dup2(in.get(), 0);
        std::istringstream shell(settings_.shell);
        words.clear();
        for (std::string word; shell >> word;) words.push_back(word);
        words.push_back(host.name);
        words.push_back("exec sh -s");
      } else {
        for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
        if (rank > 0 || ::isatty(0)) ::dup2(FileDescriptor(::open("/dev/null", O_RDONLY)).get(), 0);
      }
      std::vector<char*> argv;
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      ::execvp(argv[0], argv.data());
      const int error = errno;
      (void)!::write(to_trouble.get(), &error, sizeof error);
      ::_exit(127);
    }
    ::setpgid(pid, pid);
    RankProcess each;
    each.rank = rank;
    each.host = host.name;
    each.pid = pid;
    each.outputs.emplace_back(std::move(out), 1, mark);
    each.outputs.emplace_back(std::move(err), 2, mark);
    if (!host.name.empty()) {
      for (char** variable = environ; *variable; ++variable) {
        const std::string_view whole = *variable, name = whole.substr(0, whole.find('='));
        const bool known = std::any_of(variables.begin(), variables.end(), [&](const auto& one) { return one.first == name; });
        if (!known && (name.starts_with("TALLY_") || std::find(settings_.pass.begin(), settings_.pass.end(), name) != settings_.pass.end())) variables.emplace_back(name, whole.substr(name.size() + 1));
      }
      const std::string orders = script(settings_, variables);
      (void)!::write(to_in.get(), orders.data(), orders.size());
      each.orders = std::move(to_in);
    }
    ranks_.push_back(std::move(each));
    to_trouble = FileDescriptor();
    int error = 0;
    if (::read(trouble.get(), &error, sizeof error) == static_cast<ssize_t>(sizeof error))
      refuse("cannot start '", host.name.empty() ? settings_.command[0] : settings_.shell, "': ", errno_text(error));
  }

  bool running() const {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const RankProcess& each) { return !each.ended; });
  }
  /// What ranks wrote before they ended is still read, but not what those write whom they left behind.
  bool any_output() {
    bool any = false;
    for (RankProcess& each : ranks_)
      for (Output& output : each.outputs) {
        if (!output.open()) continue;
        pollfd event{output.fd(), POLLIN, 0};
        if (::poll(&event, 1, 0) > 0) any = true;
        else output.close();
      }
    return any;
  }
  void reap() {
    for (RankProcess& each : ranks_) {
      int status = 0;
      if (each.ended || ::waitpid(each.pid, &status, WNOHANG) != each.pid) continue;
      each.ended = true;
      ::kill(-each.pid, SIGKILL);  // whom it started
      if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
      const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      if (status_ != 0) continue;
      status_ = code;
      if (WIFEXITED(status)) std::cerr << "tally_run: " << each.name() << " ended with status " << code << '\n';
      else std::cerr << "tally_run: " << each.name() << " was ended by signal " << WTERMSIG(status) << " (" << ::strsignal(WTERMSIG(status)) << ")\n";
      if (!end_) end_ = Steady::now() + std::chrono::microseconds(static_cast<std::int64_t>(settings_.grace * 1e6));  // the others learn of it themselves, and have something to say
    }
  }
  void pass_on(int number) {
    for (const RankProcess& each : ranks_) each.signal(number);
    if (number == SIGUSR1 || number == SIGUSR2) return;
    if (status_ == 0) status_ = 128 + number;
    if (std::exchange(asked_, true)) ending_ = SIGKILL, end_ = Steady::now();
    else if (!end_) end_ = Steady::now() + std::chrono::microseconds(static_cast<std::int64_t>(settings_.grace * 1e6)), ending_ = SIGKILL;
  }
  /// Once more, and harder.
  void end() {
    int left = 0;
    for (const RankProcess& each : ranks_) left += !each.ended;
    if (left > 0 && ending_ == SIGTERM) std::cerr << "tally_run: ending the " << left << " ranks that are left\n";
    for (const RankProcess& each : ranks_) {
      each.signal(ending_);
      if (ending_ == SIGKILL && !each.ended && given_up_) ::kill(-each.pid, SIGKILL);  // a shell that does not answer
    }
    given_up_ = ending_ == SIGKILL;
    ending_ = SIGKILL;
    end_ = Steady::now() + std::chrono::seconds(2);
  }

  const Settings& settings_;
  std::vector<Host> hosts_;
  std::vector<RankProcess> ranks_;
  sigset_t before_{};
  std::optional<Steady::time_point> end_;
  int status_ = 0, ending_ = SIGTERM;
  bool asked_ = false, given_up_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  CLI::App app("Starts a program as the ranks of a job, here or on several hosts, and ends them all once one has failed.");
  app.footer(examples);
  app.add_option("-n,--ranks", s.ranks, "How many")->required()->check(CLI::Range(1, 1 << 15));
  app.add_option("--hosts", s.hosts_file, "A file that names the hosts");
  app.add_option("--rsh", s.shell, "What runs a command on another host: called with the host and a command line")->capture_default_str();
  app.add_option("--address", s.address, "HOST:PORT where the ranks meet, if not at a port of the first host that is drawn by lot");
  app.add_option("-x,--export", s.pass, "A variable of the environment that goes along to other hosts")->allow_extra_args(false);
  app.add_option("--grace", s.grace, "Seconds in which the others may end by themselves once one rank has failed, or was told to")->capture_default_str()->check(CLI::Range(0.0, 1e6));
  app.add_flag("--plain", s.plain, "Leave lines as they are, without the rank's number");
  app.add_option("command", s.command, "The program and its arguments")->required();
  app.positionals_at_end();
  app.prefix_command(false);
  // What follows the program is its own business.
  std::vector<std::string> own;
  int first = 1;
  while (first < argc && std::string_view(argv[first]).starts_with('-')) {
    const std::string_view word = argv[first];
    const bool has_value = word != "--plain" && word != "-h" && word != "--help" && word.find('=') == std::string_view::npos && !(word.starts_with("-n") && word.size() > 2) && !(word.starts_with("-x") && word.size() > 2);
    if (word == "--") break;
    first += has_value ? 2 : 1;
  }
  first = std::min(first, argc);
  if (first < argc && std::string_view(argv[first]) == "--") s.command.assign(argv + first + 1, argv + argc);
  else s.command.assign(argv + first, argv + argc);
  app.remove_option(app.get_option("command"));
  if (const auto status = bench::parse("tally_run", app, first, argv)) return *status;
  if (s.command.empty()) {
    std::cerr << "tally_run: no program is named; see tally_run --help\n";
    return 2;
  }
  try {
    return Job(s).run();
  } catch (const Failure& failure) {
    std::cerr << "tally_run: " << failure.text << '\n';
    return 2;
  }
}
