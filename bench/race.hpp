// SPDX-License-Identifier: Apache-2.0
// The race: starts contestants, gives each its turns, and keeps what they took. In a round every contestant has one
// block of calls, in an order that rotates from round to round; whoever is too slow or hangs is left out.
#pragma once

#include <cstdlib>
#include <signal.h>

#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "jobs.hpp"
#include "turns.hpp"

namespace bench {

/// Set by SIGINT and its like; waits end then.
inline volatile sig_atomic_t interrupted = 0;
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

enum class Kind { reference, own, peer, limit };  // own: tally in another way

/// What may race.
struct Entry {
  std::string name, title;
  Kind kind;
  std::string program;                 // in compare's own directory
  std::vector<std::string> launchers;  // any of these programs; none: it starts its ranks itself
  std::string missing;                 // what to do if the program is not there
};

struct Limits {
  double block_s = 1.5e-3, seconds = 3;
  int rounds = 0;  // 0: as many as fit into `seconds`
  int least_rounds = 11;
};
inline constexpr double too_slow_s = 2, hung_s = 20, start_s = 60;

/// One contestant for one operation and size.
struct Times {
  std::vector<double> us;  // per round; NaN where it did not take part
  std::uint64_t calls = 0, wrong = 0;
  double idle_s = 0, total_s = 0;
  bool offered = false;
  std::string note;  // why there are no times

  double median_us() const { return median(known()); }
  double least_us() const { return quantile(known(), 0); }
  double idle() const { return total_s > 0 ? idle_s / total_s : std::numeric_limits<double>::quiet_NaN(); }
  /// Median over rounds in which both took part.
  double ratio_to(const Times& reference) const {
    std::vector<double> ratios;
    if (!note.empty() || !reference.note.empty()) return median(ratios);
    for (std::size_t i = 0; i < std::min(us.size(), reference.us.size()); ++i)
      if (const double ratio = us[i] / reference.us[i]; std::isfinite(ratio)) ratios.push_back(ratio);
    return median(ratios);
  }

 private:
  std::vector<double> known() const {
    std::vector<double> values;
    if (!note.empty()) return values;
    for (const double value : us)
      if (std::isfinite(value)) values.push_back(value);
    return values;
  }
};

struct Row {
  Op op{};
  std::size_t bytes = 0;
  int rounds = 0;
  std::vector<Times> times;  // as the race's contestants
};

/// A contestant that runs.
class Contender {
 public:
  Contender(const Entry& entry, std::vector<std::string> command, Desk& desk, int ranks, const std::string& log)
      : entry_(entry), desk_(desk), ranks_(ranks), job_(std::make_unique<Job>(command, log)) {
    if (!wait(start_s)) return;
    version_ = desk_.answers[0].words;
    for (int r = 0; r < ranks_; ++r) job_->add_rank(static_cast<pid_t>(desk_.answers[r].pid.load()));
  }
  ~Contender() {
    if (!job_) return;
    send({Verb::end});
    job_->ends_within(3);
  }
  const Entry& entry() const { return entry_; }
  const std::string& version() const { return version_; }
  /// Why it takes no further part; empty while it does.
  const std::string& out() const { return out_; }
  bool pinned() const {
    for (int r = 0; r < ranks_; ++r)
      if (!desk_.answers[r].pinned) return false;
    return true;
  }

  /// False if it is out now.
  bool obeys(const Order& order) {
    if (!job_) return false;
    send(order);
    return wait(hung_s);
  }
  bool offers() const { return desk_.answers[0].offered != 0; }
  std::uint64_t wrong() const {
    std::uint64_t sum = 0;
    for (int r = 0; r < ranks_; ++r) sum += desk_.answers[r].wrong;
    return sum;
  }
  /// Of the slowest rank.
  double seconds() const {
    double most = 0;
    for (int r = 0; r < ranks_; ++r) most = std::max(most, desk_.answers[r].seconds);
    return most;
  }
  /// Sums over ranks: waiting by its own account, and all.
  void add_idle(Times& times) const {
    for (int r = 0; r < ranks_; ++r) times.idle_s += desk_.answers[r].idle_seconds, times.total_s += desk_.answers[r].seconds;
  }

 private:
  void send(const Order& order) {
    desk_.order = order;
    desk_.number.value.store(++number_, std::memory_order_release);
    tally::futex_wake(desk_.number.value);
  }
  bool wait(double at_most_s) {
    const double begin = seconds_now();
    for (;;) {
      const std::uint32_t done = desk_.done.value.load(std::memory_order_acquire);
      for (int r = 0; r < ranks_; ++r)
        if (desk_.answers[r].failed.load()) return leave("failed: rank " + std::to_string(r) + ": " + desk_.answers[r].words);
      if (done == (number_ + 1) * static_cast<std::uint32_t>(ranks_)) return true;
      if (interrupted) throw Interrupted();
      if (!job_->running()) return leave("ended: " + job_->last_words());
      if (seconds_now() - begin > at_most_s) return leave("hung");
      tally::futex_wait(desk_.done.value, done, std::chrono::milliseconds(100));
    }
  }
  bool leave(const std::string& why) {
    out_ = why;
    job_.reset();
    return false;
  }
  const Entry& entry_;
  Desk& desk_;
  int ranks_;
  std::uint32_t number_ = 0;
  std::string version_, out_;
  std::unique_ptr<Job> job_;
};

class Race {
 public:
  Race(int ranks, std::size_t most_bytes, const Limits& limits) : limits_(limits), hall_(SharedHall::Way::make, place_.path() + "/hall") {
    hall_->ranks = ranks;
    hall_->compare = ::getpid();
    hall_->pinned = static_cast<std::size_t>(ranks) <= allowed_cores().size();
    hall_->most_bytes = most_bytes;
  }

  /// Starts a contestant. Why it does not race, or nothing.
  std::string admit(const Entry& entry) {
    const std::string program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / entry.program;
    if (::access(program.c_str(), X_OK) != 0) return entry.program + " was not built; " + entry.missing;
    std::vector<std::string> command;
    if (!entry.launchers.empty()) {
      std::string launcher;
      for (const std::string& name : entry.launchers)
        if (launcher.empty()) launcher = find_program(name);
      if (launcher.empty()) return "there is no " + entry.launchers.front() + "; " + entry.missing;
      command = launched_by(launcher, entry.name);
    }
    const std::size_t desk = contenders_.size();
    if (desk == most_desks) return "there are too many contestants";
    command.insert(command.end(), {program, place_.path() + "/hall", std::to_string(desk), "--contestant", entry.name});
    contenders_.emplace_back(entry, command, hall_->desks[desk], hall_->ranks, place_.path() + "/" + entry.name + ".log");
    return contenders_.back().out();
  }
  const std::deque<Contender>& contenders() const { return contenders_; }
  bool pinned() const {
    for (const Contender& c : contenders_)
      if (c.out().empty() && !c.pinned()) return false;
    return true;
  }

  Row run(Op op, std::size_t bytes) {
    const auto n = static_cast<std::size_t>(hall_->ranks);
    std::size_t count = bytes / sizeof(float);
    if (in_blocks(op)) count = std::max<std::size_t>(count / n, 1) * n;
    if (op == Op::barrier) count = 0;
    Row row{op, count * sizeof(float), 0, std::vector<Times>(contenders_.size())};
    if (op != last_op_) slow_.assign(contenders_.size(), 0);
    last_op_ = op;
    for (std::size_t i = 0; i < contenders_.size(); ++i) {
      Times& times = row.times[i];
      if (!contenders_[i].out().empty()) times.note = "out";
      else if (slow_[i]) times.note = "too slow";
      else {
        times.offered = prepare(contenders_[i], op, count, times);
        if (times.offered) plan(i, times);
      }
    }
    const double began = seconds_now();
    while (!enough(row, seconds_now() - began)) {
      for (std::size_t turn = 0; turn < contenders_.size(); ++turn) block((turn + static_cast<std::size_t>(row.rounds)) % contenders_.size(), row);
      ++row.rounds;
    }
    for (std::size_t i = 0; i < contenders_.size(); ++i)
      if (row.times[i].offered && row.times[i].note.empty()) check(contenders_[i], 2, row.times[i]);
    return row;
  }

 private:
  std::vector<std::string> launched_by(const std::string& launcher, const std::string& mpi) const {
    const std::string n = std::to_string(hall_->ranks);
    if (mpi == "mpich") return {launcher, "-launcher", "fork", "-bind-to", "none", "-n", n};
    // What it would leave behind if it were killed lies in our directory.
    const char* const btl = std::getenv("OMPI_MCA_btl");  // compare --over tcp
    std::vector<std::string> command{launcher, "--mca", "btl", btl ? btl : "self,vader", "--mca", "orte_tmpdir_base", place_.path(), "--mca", "btl_vader_backing_directory", place_.path(), "--bind-to", "none", "-n", n};
    if (!hall_->pinned) command.push_back("--oversubscribe");
    if (::geteuid() == 0) command.push_back("--allow-run-as-root");
    return command;
  }

  bool obeyed(Contender& c, const Order& order, Times& times) {
    if (c.obeys(order)) return true;
    times.note = c.out() == "hung" ? "hung" : "failed";
    return false;
  }
  bool prepare(Contender& c, Op op, std::size_t count, Times& times) {
    return obeyed(c, {Verb::open, op, count}, times) && c.offers() && check(c, 0, times);
  }
  bool check(Contender& c, int turn, Times& times) {
    for (int again = 0; again < 2; ++again) {
      if (!obeyed(c, {.verb = Verb::check, .turn = turn + again}, times)) return false;
      times.wrong += c.wrong();
    }
    return true;
  }
  /// Seconds of a block, or nothing if the contestant is out or too slow.
  std::optional<double> timed(std::size_t i, std::uint64_t warm_up, std::uint64_t calls, Times& times) {
    const double begin = seconds_now();
    if (!obeyed(contenders_[i], {.verb = Verb::time, .warm_up = warm_up, .calls = calls}, times)) return std::nullopt;
    if (seconds_now() - begin > too_slow_s) {
      times.note = "too slow";
      slow_[i] = 1;  // larger ones are not tried
      return std::nullopt;
    }
    return contenders_[i].seconds();
  }
  /// How many calls fill a block. Also the first warm-up.
  void plan(std::size_t i, Times& times) {
    for (times.calls = 1; times.calls < std::uint64_t{1} << 24; times.calls *= 2) {
      const auto seconds = timed(i, 1, times.calls, times);
      if (!seconds) return;
      if (*seconds < limits_.block_s / 2) continue;
      times.calls = fitting(*seconds / static_cast<double>(times.calls));
      return;
    }
  }
  std::uint64_t fitting(double seconds_per_call) const { return static_cast<std::uint64_t>(std::clamp(limits_.block_s / seconds_per_call, 1.0, 1e7)); }

  void block(std::size_t i, Row& row) {
    Times& times = row.times[i];
    times.us.push_back(std::numeric_limits<double>::quiet_NaN());
    if (!times.offered || !times.note.empty()) return;
    const auto seconds = timed(i, std::max<std::uint64_t>(times.calls / 8, 1), times.calls, times);
    if (!seconds) return;
    times.us.back() = *seconds / static_cast<double>(times.calls) * 1e6;
    contenders_[i].add_idle(times);
    // Towards what the last blocks needed, so that one interrupted block does not decide.
    times.calls = (3 * times.calls + fitting(times.us.back() * 1e-6) + 3) / 4;
  }
  bool enough(const Row& row, double seconds) const {
    bool any = false;
    for (const Times& times : row.times) any = any || (times.offered && times.note.empty());
    if (!any) return true;
    if (limits_.rounds > 0) return row.rounds >= limits_.rounds;
    return (seconds > limits_.seconds && row.rounds >= limits_.least_rounds) || (seconds > 10 * limits_.seconds && row.rounds >= 3) || row.rounds >= 1001;
  }

  Limits limits_;
  Workplace place_;
  SharedHall hall_;
  std::deque<Contender> contenders_;
  std::vector<char> slow_;
  std::optional<Op> last_op_;
};

}  // namespace bench
