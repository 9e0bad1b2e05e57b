// SPDX-License-Identifier: Apache-2.0
// tally against MPI in the same processes: blocks of calls of one and the other alternate, so that whatever else
// the machine does hits both. Beside them, from the same rounds, what the machine itself needs: a cache line's
// round trip between two ranks and a copy of as many bytes. Start with mpirun; compare.sh does.
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <array>
#include <atomic>
#include <fstream>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

#include "exact.hpp"
#include "measure.hpp"

namespace {

using Json = nlohmann::ordered_json;

constexpr int least_rounds = 11;

struct Settings {
  std::vector<std::string> ops{"all_reduce"};
  std::size_t least = 8, most = std::size_t{64} << 20, factor = 4;
  int rounds = 0;  // 0: as many as fit into `seconds`
  double seconds = 3, block_ms = 1;
  std::string json;
  bool only_arguments = false;
};

constexpr std::array known_ops{"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "barrier"};

// ---- the machine's limits ----

/// Lines of memory shared by the ranks of this host: a meeting point that belongs to neither library.
class SharedLines {
 public:
  SharedLines(int rank, int size) : rank_(rank), size_(size) {
    void* mine = nullptr;
    MPI_Win_allocate_shared(rank == 0 ? sizeof(Lines) : 0, 1, MPI_INFO_NULL, MPI_COMM_WORLD, &mine, &window_);
    MPI_Aint bytes = 0;
    int unit = 0;
    void* base = nullptr;
    MPI_Win_shared_query(window_, 0, &bytes, &unit, &base);
    const auto address = (reinterpret_cast<std::uintptr_t>(base) + 127) / 128 * 128;
    lines_ = reinterpret_cast<Line*>(address);
    if (rank == 0)
      for (int i = 0; i < line_count; ++i) new (&lines_[i]) Line;
    MPI_Barrier(MPI_COMM_WORLD);
  }
  void free() { MPI_Win_free(&window_); }

  /// All ranks leave at nearly the same time.
  void meet() {
    ++turn_;
    if (lines_[arrivals].value.fetch_add(1) + 1 == turn_ * static_cast<std::uint32_t>(size_)) lines_[release].value.store(turn_);
    while (lines_[release].value.load(std::memory_order_acquire) != turn_) rest();
  }
  /// Rank 0's word, the same on all ranks.
  bool ask_first(bool word) {
    if (rank_ == 0) lines_[verdict].value.store(word);
    meet();
    return lines_[verdict].value.load() != 0;  // not written again before the next meeting
  }
  /// Microseconds per round trip of one line from rank 0 to rank 1 and back; NaN on other ranks or alone.
  double round_trip(int trips) {
    if (size_ < 2 || rank_ > 1) return std::numeric_limits<double>::quiet_NaN();
    std::atomic<std::uint32_t>& there = lines_[ping].value;
    std::atomic<std::uint32_t>& back = lines_[pong].value;
    constexpr int warm_up = 100;
    double begin = 0;
    for (int i = -warm_up; i < trips; ++i) {
      if (i == 0) begin = bench::seconds_now();
      ++trip_;
      if (rank_ == 0) {
        there.store(trip_, std::memory_order_release);
        while (back.load(std::memory_order_acquire) != trip_) rest();
      } else {
        while (there.load(std::memory_order_acquire) != trip_) rest();
        back.store(trip_, std::memory_order_release);
      }
    }
    return (bench::seconds_now() - begin) / trips * 1e6;
  }
  void crowd(bool crowded) { crowded_ = crowded; }

 private:
  struct alignas(128) Line {
    std::atomic<std::uint32_t> value{0};
  };
  enum : std::size_t { arrivals, release, ping, pong, verdict };
  static constexpr int line_count = 5;
  struct Lines {
    Line line[line_count + 1];
  };
  void rest() const {
    if (crowded_) sched_yield();
  }
  int rank_, size_;
  MPI_Win window_ = MPI_WIN_NULL;
  Line* lines_ = nullptr;
  std::uint32_t turn_ = 0, trip_ = 0;
  bool crowded_ = false;
};

// ---- the operations, in both libraries ----

/// What one rank has for one operation and size.
struct Work {
  int rank, size;
  std::size_t count;  // of the larger side
  std::span<float> in, out;
  std::size_t block() const { return count / static_cast<std::size_t>(size); }
};

struct Contender {
  std::function<tally::Report()> tally;
  std::function<void()> mpi;
  std::function<void(int turn)> fill;
  std::function<std::uint64_t(int turn)> wrong;
  std::function<void()> settle;  // values that stay what they are however often the call is repeated
};

Contender contender(const std::string& op, tally::Communicator& comm, const Work& w) {
  using Pattern = bench::Pattern<float>;
  const auto input_of = [w](int rank, int turn) { return Pattern::input(bench::Reduce::sum, w.size, rank, turn); };
  const auto result = [w](int turn) { return Pattern::result(bench::Reduce::sum, w.size, turn); };
  const int count = static_cast<int>(w.count), block = static_cast<int>(w.block());
  Contender c;
  c.fill = [w, input_of](int turn) {
    if (w.out.data() != w.in.data()) std::fill(w.out.begin(), w.out.end(), -1.0f);
    input_of(w.rank, turn).fill(w.in);
  };
  c.settle = [w] {
    std::fill(w.in.begin(), w.in.end(), 0.0f);
    std::fill(w.out.begin(), w.out.end(), 0.0f);
  };
  if (op == "all_reduce") {  // in place
    c.tally = [&comm, w] { return comm.all_reduce(w.in, tally::sum); };
    c.mpi = [w, count] { MPI_Allreduce(MPI_IN_PLACE, w.in.data(), count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
    c.wrong = [w, result](int turn) { return result(turn).count_wrong(w.in); };
  } else if (op == "reduce") {
    c.tally = [&comm, w] { return comm.reduce(w.in, w.out, tally::sum, 0); };
    c.mpi = [w, count] { MPI_Reduce(w.in.data(), w.out.data(), count, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD); };
    c.wrong = [w, result](int turn) { return w.rank == 0 ? result(turn).count_wrong(w.out) : 0; };
  } else if (op == "broadcast") {
    c.tally = [&comm, w] { return comm.broadcast(w.in, 0); };
    c.mpi = [w, count] { MPI_Bcast(w.in.data(), count, MPI_FLOAT, 0, MPI_COMM_WORLD); };
    c.wrong = [w, input_of](int turn) { return input_of(0, turn).count_wrong(w.in); };
  } else if (op == "all_gather") {
    const std::span<float> mine = w.in.first(w.block());
    c.tally = [&comm, w, mine] { return comm.all_gather(mine, w.out); };
    c.mpi = [w, block] { MPI_Allgather(w.in.data(), block, MPI_FLOAT, w.out.data(), block, MPI_FLOAT, MPI_COMM_WORLD); };
    c.wrong = [w, input_of](int turn) {
      std::uint64_t wrong = 0;
      for (int r = 0; r < w.size; ++r) wrong += input_of(r, turn).count_wrong(w.out.subspan(static_cast<std::size_t>(r) * w.block(), w.block()));
      return wrong;
    };
  } else if (op == "reduce_scatter") {
    const std::span<float> mine = w.out.first(w.block());
    c.tally = [&comm, w, mine] { return comm.reduce_scatter(w.in, mine, tally::sum); };
    c.mpi = [w, block] { MPI_Reduce_scatter_block(w.in.data(), w.out.data(), block, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
    c.wrong = [w, mine, result](int turn) { return result(turn).count_wrong(mine, static_cast<std::size_t>(w.rank) * w.block()); };
  } else {
    c.tally = [&comm] { return comm.barrier(); };
    c.mpi = [] { MPI_Barrier(MPI_COMM_WORLD); };
    c.wrong = [](int) { return std::uint64_t{0}; };
  }
  return c;
}

// ---- measuring ----

struct Row {
  std::string op;
  std::size_t bytes = 0;
  int calls = 0;
  int rounds = 0;
  double tally_us = 0, mpi_us = 0, tally_min_us = 0, mpi_min_us = 0, ratio = 0, idle = 0, round_trip_us = 0, copy_us = 0, copy_gbs = 0;
  std::uint64_t wrong = 0, tally_wrong = 0, mpi_wrong = 0;
};

class Comparison {
 public:
  Comparison(tally::Communicator& comm, SharedLines& lines, const Settings& settings) : comm_(comm), lines_(lines), settings_(settings) {}

  Row run(const std::string& op, std::size_t bytes) {
    const std::size_t n = static_cast<std::size_t>(comm_.size());
    std::size_t count = bytes / sizeof(float);
    if (op == "all_gather" || op == "reduce_scatter") count = std::max<std::size_t>(count / n, 1) * n;
    if (op == "barrier") count = 0;
    const bool apart = op == "reduce" || op == "all_gather" || op == "reduce_scatter";
    const bench::Memory first(count * sizeof(float)), second(apart ? count * sizeof(float) : 0);
    const std::span<float> in = first.as<float>(count);
    const Contender c = contender(op, comm_, {comm_.rank(), comm_.size(), count, in, apart ? second.as<float>(count) : in});

    Row row;
    row.op = op;
    row.bytes = count * sizeof(float);
    check(c, row);
    c.settle();
    plan_blocks(c, row);

    std::vector<double> tally_us, mpi_us, trip_us, copy_us;
    double idle = 0, elapsed = 0;
    const double began = bench::seconds_now();
    for (int round = 0; round < row.rounds; ++round) {
      // Who goes first alternates too.
      for (int turn = 0; turn < 2; ++turn) {
        if ((round + turn) % 2 == 0)
          tally_us.push_back(block(row.calls, [&] {
            const tally::Report report = c.tally();
            idle += static_cast<double>(report.idle().count());
            elapsed += static_cast<double>(report.elapsed.count());
          }));
        else mpi_us.push_back(block(row.calls, c.mpi));
      }
      lines_.meet();
      trip_us.push_back(lines_.round_trip(200));
      copy_us.push_back(copy_block(row.bytes));
      // The machine may have become busier than the plan was made for.
      const bool late = settings_.rounds == 0 && bench::seconds_now() - began > settings_.seconds;
      if (lines_.ask_first(late) && round + 1 >= least_rounds) row.rounds = round + 1;
    }
    slowest(tally_us);
    slowest(mpi_us);
    slowest(copy_us);
    std::vector<double> ratios;
    for (std::size_t i = 0; i < tally_us.size(); ++i) ratios.push_back(mpi_us[i] / tally_us[i]);
    row.tally_us = bench::median(tally_us);
    row.mpi_us = bench::median(mpi_us);
    row.tally_min_us = bench::quantile(tally_us, 0);
    row.mpi_min_us = bench::quantile(mpi_us, 0);
    row.ratio = bench::median(ratios);
    row.round_trip_us = bench::median(trip_us);
    row.copy_us = row.bytes > 0 ? bench::median(copy_us) : std::numeric_limits<double>::quiet_NaN();
    row.copy_gbs = static_cast<double>(row.bytes) / row.copy_us * 1e-3;
    double sums[2] = {idle, elapsed};
    MPI_Allreduce(MPI_IN_PLACE, sums, 2, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    row.idle = sums[0] / sums[1];
    check(c, row);
    return row;
  }

 private:
  void check(const Contender& c, Row& row) {
    for (int turn = 0; turn < 2; ++turn) {
      std::uint64_t wrong[2] = {};
      c.fill(turn);
      c.tally();
      wrong[0] = c.wrong(turn);
      c.fill(turn + 2);
      c.mpi();
      wrong[1] = c.wrong(turn + 2);
      MPI_Allreduce(MPI_IN_PLACE, wrong, 2, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
      row.tally_wrong += wrong[0];
      row.mpi_wrong += wrong[1];
    }
    row.wrong = row.tally_wrong + row.mpi_wrong;
  }

  /// How many calls fill a block, and how many rounds of blocks fill the time. Also the warm-up.
  void plan_blocks(const Contender& c, Row& row) {
    const double wanted_us = settings_.block_ms * 1000;
    int calls = 1;
    double mpi_us = 0, tally_us = 0;
    for (bool enough = false; !enough; calls *= enough ? 1 : 2) {
      std::vector<double> us{block(calls, c.mpi), block(calls, [&] { c.tally(); })};
      slowest(us);  // so that all ranks decide the same
      mpi_us = us[0];
      tally_us = us[1];
      enough = std::min(mpi_us, tally_us) * calls >= wanted_us / 2 || calls >= 1 << 20;
    }
    row.calls = std::max(2, static_cast<int>(wanted_us / std::min(mpi_us, tally_us)));
    const double round_s = (row.calls + 1) * (mpi_us + tally_us) * 1e-6;
    row.rounds = settings_.rounds > 0 ? settings_.rounds : 1 + 2 * static_cast<int>(std::clamp(settings_.seconds / round_s / 2, least_rounds / 2.0, 500.0));
  }

  /// Microseconds per call on this rank; all ranks begin together.
  template <class F>
  double block(int calls, const F& call) {
    call();  // the first one after the other library's block refills caches
    lines_.meet();
    const double begin = bench::seconds_now();
    for (int i = 0; i < calls; ++i) call();
    return (bench::seconds_now() - begin) / calls * 1e6;
  }

  /// Microseconds to copy `bytes` in this rank's own memory, while all ranks do.
  double copy_block(std::size_t bytes) {
    if (from_.bytes() < bytes) from_ = bench::Memory(bytes), to_ = bench::Memory(bytes);
    static void* (*volatile const copy)(void*, const void*, std::size_t) = std::memcpy;  // no copy is optimised away
    const std::size_t times = std::clamp<std::size_t>((std::size_t{4} << 20) / std::max<std::size_t>(bytes, 1), 1, 2000);
    copy(to_.data(), from_.data(), bytes);
    lines_.meet();
    const double begin = bench::seconds_now();
    for (std::size_t i = 0; i < times; ++i) copy(to_.data(), from_.data(), bytes);
    return (bench::seconds_now() - begin) / static_cast<double>(times) * 1e6;
  }

  /// A block has taken as long as it took the slowest rank.
  static void slowest(std::vector<double>& values) { MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD); }

  tally::Communicator& comm_;
  SharedLines& lines_;
  const Settings& settings_;
  bench::Memory from_{0}, to_{0};
};

// ---- output ----

std::string mpi_name() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string whole(text, static_cast<std::size_t>(length));
  return whole.substr(0, whole.find_first_of(",\n"));
}

/// "core 0; core 1": where each rank may run.
std::string binding_of_all(int size) {
  char mine[64] = {};
  bench::core_list(bench::allowed_cores()).copy(mine, sizeof mine - 1);
  std::vector<char> all(sizeof mine * static_cast<std::size_t>(size));
  MPI_Allgather(mine, sizeof mine, MPI_CHAR, all.data(), sizeof mine, MPI_CHAR, MPI_COMM_WORLD);
  std::string text;
  for (std::size_t r = 0; r < static_cast<std::size_t>(size); ++r) text += (r ? "; " : "") + std::to_string(r) + ": " + &all[r * sizeof mine];
  return text;
}

void print_header(std::ostream& out, const Settings& s, int size, const std::string& binding) {
  out << "# machine  " << bench::machine_line() << '\n'
      << "# ranks    " << size << " processes, cores they may use: " << binding << '\n'
      << "# MPI      " << mpi_name() << '\n'
      << "# method   " << "11 or more rounds, in each a block of calls (about " << s.block_ms << " ms) of tally and one of MPI in alternating order; us per call of the slowest rank, median and least of the rounds\n"
      << "# ratio    MPI / tally, median over rounds: above 1 tally is faster\n"
      << "# idle     share of tally's calls in which ranks waited, by its own account\n"
      << "# limits   trip: one cache line from rank 0 to rank 1 and back; copy: memcpy of as many bytes in a rank's own memory, all ranks at once\n"
      << "# op             bytes   tally_us     mpi_us    ratio  tally_min    mpi_min   idle%  wrong rounds |  trip_us    copy_us  copy_GB/s" << std::endl;
}
void print_row(std::ostream& out, const Row& r) {
  char line[256];
  std::snprintf(line, sizeof line, "%-14s %7s %10s %10s %8s %10s %10s %7s %6llu %6d | %8s %10s %10s", r.op.c_str(), bench::size_text(r.bytes).c_str(), bench::cell(r.tally_us).c_str(), bench::cell(r.mpi_us).c_str(),
                bench::cell(r.ratio).c_str(), bench::cell(r.tally_min_us).c_str(), bench::cell(r.mpi_min_us).c_str(), bench::cell(100 * r.idle).c_str(), static_cast<unsigned long long>(r.wrong), r.rounds,
                bench::cell(r.round_trip_us).c_str(), bench::cell(r.copy_us).c_str(), bench::cell(r.copy_gbs).c_str());
  out << line << std::endl;
}
Json json_of(const Row& r, int ranks, const std::string& binding) {
  const auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); };
  return {{"op", r.op},
          {"ranks", ranks},
          {"bytes", r.bytes},
          {"placement", binding},
          {"mpi", mpi_name()},
          {"rounds", r.rounds},
          {"calls_per_block", r.calls},
          {"tally_us", number(r.tally_us)},
          {"mpi_us", number(r.mpi_us)},
          {"ratio", number(r.ratio)},
          {"tally_min_us", number(r.tally_min_us)},
          {"mpi_min_us", number(r.mpi_min_us)},
          {"idle_fraction", number(r.idle)},
          {"tally_wrong", r.tally_wrong},
          {"mpi_wrong", r.mpi_wrong},
          {"round_trip_us", number(r.round_trip_us)},
          {"copy_us", number(r.copy_us)},
          {"copy_gbs", number(r.copy_gbs)}};
}

// ---- arguments ----

/// Exit status if the program ends here.
std::optional<int> parse(int argc, char** argv, Settings& s, bool speaks) {
  CLI::App app{"Compares tally with MPI, interleaved in one run. Start it with mpirun, or use bench/compare.sh."};
  std::string ops = "all_reduce", least = "8", most = "64M";
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--ops", ops, "comma-separated: all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, or all")->capture_default_str();
  app.add_option("-b,--min", least, "smallest size in bytes; suffixes K, M, G")->capture_default_str();
  app.add_option("-e,--max", most, "largest size; always measured itself")->capture_default_str();
  app.add_option("-f,--factor", s.factor, "from size to size")->check(CLI::Range(2, 1 << 20))->capture_default_str();
  app.add_option("--seconds", s.seconds, "time for one size; there are at least 11 rounds")->check(CLI::Range(0.01, 3600.0))->capture_default_str();
  app.add_option("--rounds", s.rounds, "blocks per size and library; default: by time")->check(CLI::Range(least_rounds, 10001));
  app.add_option("--block-ms", s.block_ms, "length of a block in milliseconds (at least 2 calls)")->check(CLI::Range(0.01, 10000.0))->capture_default_str();
  app.add_option("--json", s.json, "JSON lines to this file; '-': to stdout, and the table to stderr");
  app.add_flag("--only-arguments", s.only_arguments, "check the arguments and end");
  const auto refuse = [&](const std::string& why) {
    if (speaks) std::cerr << "compare: " << why.substr(0, why.find('\n')) << '\n';
    return 2;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    if (speaks) std::cout << app.help();
    return 0;
  } catch (const CLI::ParseError& error) {
    return refuse(error.what());
  }
  s.ops.clear();
  for (std::string rest = ops + ","; !rest.empty(); rest.erase(0, rest.find(',') + 1)) {
    const std::string op = rest.substr(0, rest.find(','));
    if (op == "all") s.ops.assign(known_ops.begin(), known_ops.end());
    else if (std::find(known_ops.begin(), known_ops.end(), op) != known_ops.end()) s.ops.push_back(op);
    else return refuse("--ops: unknown operation '" + op + "'; there are all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, all");
  }
  const auto low = bench::parse_size(least), high = bench::parse_size(most);
  if (!low || *low < sizeof(float) || *low % sizeof(float) != 0) return refuse("--min: '" + least + "' is no multiple of 4 bytes");
  if (!high || *high % sizeof(float) != 0) return refuse("--max: '" + most + "' is no multiple of 4 bytes");
  if (*high < *low) return refuse("--max is less than --min");
  if (*high / sizeof(float) > static_cast<std::size_t>(std::numeric_limits<int>::max())) return refuse("--max: MPI counts elements in an int");
  s.least = *low;
  s.most = *high;
  return std::nullopt;
}

std::vector<std::size_t> sizes_of(const Settings& s) {
  std::vector<std::size_t> sizes;
  for (std::size_t bytes = s.least; bytes < s.most; bytes *= s.factor) sizes.push_back(bytes);
  sizes.push_back(s.most);
  return sizes;
}

bool compare(tally::Communicator& comm, const Settings& settings) {
  SharedLines lines(comm.rank(), comm.size());
  lines.crowd(comm.size() > ::sysconf(_SC_NPROCESSORS_ONLN));
  const std::string binding = binding_of_all(comm.size());
  const bool speaks = comm.rank() == 0;
  std::ofstream file;
  if (speaks && !settings.json.empty() && settings.json != "-") {
    file.open(settings.json);
    if (!file) throw std::runtime_error("cannot write " + settings.json);
  }
  std::ostream& table = settings.json == "-" ? std::cerr : std::cout;
  std::ostream& json = settings.json == "-" ? std::cout : file;
  if (speaks) print_header(table, settings, comm.size(), binding);

  const bench::Progress progress(speaks);
  Comparison comparison(comm, lines, settings);
  bool right = true;
  for (const std::string& op : settings.ops)
    for (const std::size_t bytes : op == "barrier" ? std::vector<std::size_t>{0} : sizes_of(settings)) {
      progress.show(op + " of " + bench::size_text(bytes) + " ...");
      const Row row = comparison.run(op, bytes);
      right = right && row.wrong == 0;
      progress.clear();
      if (!speaks) continue;
      print_row(table, row);
      if (!settings.json.empty()) json << json_of(row, comm.size(), binding).dump() << std::endl;
    }
  lines.free();
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  const char* const launched_as = std::getenv("OMPI_COMM_WORLD_RANK");
  if (const auto status = parse(argc, argv, settings, !launched_as || launched_as == std::string_view("0"))) return *status;
  if (settings.only_arguments) return 0;

  MPI_Init(&argc, &argv);
  bool right = false;
  try {
    tally::Communicator comm = tally::init();
    int size = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size != comm.size()) throw std::runtime_error("MPI sees " + std::to_string(size) + " ranks, tally " + std::to_string(comm.size()) + "; start with Open MPI's mpirun, and without TALLY_RANK");
    right = compare(comm, settings);
  } catch (const std::exception& error) {
    std::cerr << "compare: " << error.what() << std::endl;
    MPI_Abort(MPI_COMM_WORLD, 2);
  }
  MPI_Finalize();
  return right ? 0 : 1;
}
