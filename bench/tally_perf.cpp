// SPDX-License-Identifier: Apache-2.0
// Time, bandwidth, correctness and cost of one collective over a range of sizes, in the columns of nccl-tests.
// Ranks are started here, or by a launcher (mpirun, torchrun, TALLY_RANK). Idle time, waits and joules are the
// library's own account of the timed calls, so that reading them costs those calls nothing.
#include <sys/mman.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "exact.hpp"
#include "measure.hpp"
#include "tune.hpp"

namespace {

using Json = nlohmann::ordered_json;
using bench::Reduce;
using tally::Collective;

constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

struct Settings {
  int ranks = 2;
  Collective op = Collective::all_reduce;
  std::string transport = "shm", algorithm = "auto", type = "f32", reduce_name = "sum", json, tune, device;
  Reduce reduce = Reduce::sum;
  std::size_t least = 8, most = std::size_t{64} << 20, factor = 2;
  int root = 0;
  bool in_place = true;
  bool pin = false, list = false;
  int iterations = 0;  // 0: as many as fit into `seconds`
  int warmup = 10;
  double seconds = 0.2;
  double tune_seconds = 0.1;  // per algorithm and size
  std::string launcher;  // who started the ranks; empty: this program does
};

/// One size's results, over all ranks.
struct Row {
  std::size_t bytes = 0, count = 0;
  std::string algorithm;
  double min_us = 0, median_us = 0, p99_us = 0, algbw = 0, busbw = 0;
  std::uint64_t wrong = 0;
  double idle_fraction = unknown, wait_arrival_us = unknown, wait_transfer_us = unknown, energy_j = unknown, idle_energy_j = unknown;
  std::string provenance = "unknown";
  int iterations = 0;
};

// ---- one rank's part of a measurement ----

/// What the ledger says about one operation so far. It is a sum of times, so parts of a run are differences.
struct Account {
  double calls = 0, elapsed = 0, idle = 0, arrival = 0, transfer = 0, energy = 0, idle_energy = 0;
  tally::Provenance provenance = tally::Provenance::none;

  static Account of(const tally::Ledger& ledger, Collective operation) {
    Account a;
    for (const tally::LedgerRow& row : ledger.rows()) {
      if (row.operation != operation) continue;
      a.calls += static_cast<double>(row.calls);
      a.elapsed += static_cast<double>(row.elapsed.count());
      a.idle += static_cast<double>(row.idle().count());
      a.arrival += static_cast<double>(row.wait_arrival.count());
      a.transfer += static_cast<double>(row.wait_transfer.count());
      const tally::Quantity energy = ledger.energy(row);
      a.energy += energy.value;
      a.idle_energy += ledger.idle_energy(row).value;
      a.provenance = energy.provenance;
    }
    return a;
  }
};

/// Calls one operation on buffers of one size, and knows what comes out.
template <class T, class Op>
class Trial {
 public:
  Trial(tally::Communicator& comm, const Settings& settings, std::size_t count)
      : comm_(comm), s_(settings), count_(count), block_(count / static_cast<std::size_t>(comm.size())), first_(count * sizeof(T)), second_(apart() ? count * sizeof(T) : 0) {
    in_ = whole_in_ = first_.as<T>(count);
    out_ = whole_out_ = apart() ? second_.as<T>(count) : in_;
    const std::size_t mine = static_cast<std::size_t>(comm.rank()) * block_;
    if (s_.op == Collective::all_gather || s_.op == Collective::gather) in_ = s_.in_place ? whole_out_.subspan(mine, block_) : whole_in_.first(block_);
    if (s_.op == Collective::reduce_scatter || s_.op == Collective::scatter) out_ = s_.in_place ? whole_in_.subspan(mine, block_) : whole_out_.first(block_);
  }

  tally::Report call() {
    switch (s_.op) {
      case Collective::all_reduce: return s_.in_place ? comm_.all_reduce(in_, Op{}) : comm_.all_reduce(in_, out_, Op{});
      case Collective::reduce: return comm_.reduce(in_, out_, Op{}, s_.root);
      case Collective::broadcast: return comm_.broadcast(in_, s_.root);
      case Collective::all_gather: return comm_.all_gather(in_, out_);
      case Collective::reduce_scatter: return comm_.reduce_scatter(in_, out_, Op{});
      case Collective::gather: return comm_.gather(in_, out_, s_.root);
      case Collective::scatter: return comm_.scatter(in_, out_, s_.root);
      case Collective::all_to_all: return comm_.all_to_all(in_, out_);
      case Collective::scan:
        if constexpr (std::same_as<Op, tally::Mean>) break;
        else return comm_.scan(in_, out_, Op{});
      case Collective::exclusive_scan:
        if constexpr (std::same_as<Op, tally::Mean>) break;
        else return comm_.exclusive_scan(in_, out_, Op{});
      default: break;
    }
    return comm_.barrier();
  }

  /// Fresh inputs; outputs that were not written afterwards count as wrong.
  void fill(int turn) {
    std::fill(whole_out_.begin(), whole_out_.end(), T{125});
    input(comm_.rank(), turn).fill(in_);
  }
  std::uint64_t count_wrong(int turn) const {
    const int n = comm_.size();
    switch (s_.op) {
      case Collective::all_reduce: return result(turn).count_wrong(out_);
      case Collective::reduce: return comm_.rank() == s_.root ? result(turn).count_wrong(out_) : 0;
      case Collective::broadcast: return input(s_.root, turn).count_wrong(out_);
      case Collective::reduce_scatter: return result(turn).count_wrong(out_, static_cast<std::size_t>(comm_.rank()) * block_);
      case Collective::gather:
        if (comm_.rank() != s_.root) return 0;
        [[fallthrough]];
      case Collective::all_gather:
      case Collective::all_to_all: {
        std::uint64_t wrong = 0;
        const std::size_t first = s_.op == Collective::all_to_all ? static_cast<std::size_t>(comm_.rank()) * block_ : 0;
        for (int r = 0; r < n; ++r) wrong += input(r, turn).count_wrong(out_.subspan(static_cast<std::size_t>(r) * block_, block_), first);
        return wrong;
      }
      case Collective::scatter: return input(s_.root, turn).count_wrong(out_, static_cast<std::size_t>(comm_.rank()) * block_);
      case Collective::scan: return bench::Pattern<T>::result(s_.reduce, comm_.rank() + 1, turn).count_wrong(out_);
      case Collective::exclusive_scan: return comm_.rank() == 0 ? 0 : bench::Pattern<T>::result(s_.reduce, comm_.rank(), turn).count_wrong(out_);
      default: return 0;
    }
  }
  /// Zeros stay what they are under every operator, however often a call in place is repeated.
  void settle() {
    std::fill(whole_in_.begin(), whole_in_.end(), T{});
    std::fill(whole_out_.begin(), whole_out_.end(), T{});
  }

 private:
  bool apart() const { return !s_.in_place && s_.op != Collective::broadcast && s_.op != Collective::barrier; }
  bench::Pattern<T> input(int rank, int turn) const { return bench::Pattern<T>::input(s_.reduce, comm_.size(), rank, turn); }
  bench::Pattern<T> result(int turn) const { return bench::Pattern<T>::result(s_.reduce, comm_.size(), turn); }

  tally::Communicator& comm_;
  const Settings& s_;
  std::size_t count_, block_;
  bench::Memory first_, second_;
  std::span<T> in_, out_, whole_in_, whole_out_;
};

/// Bytes on the busiest link per byte of data, as nccl-tests has it.
double bus_factor(Collective operation, int n) {
  const double others = static_cast<double>(n - 1) / n;
  if (operation == Collective::all_reduce) return 2 * others;
  if (tally::Layout{operation, 0, n, 0, 1}.items() > 1) return others;
  return 1;
}

template <class T, class Op>
class Measurement {
 public:
  Measurement(tally::Communicator& comm, tally::Communicator& control, const Settings& settings) : comm_(comm), control_(control), s_(settings) {}

  Row run(std::size_t count) {
    Trial<T, Op> collective(comm_, s_, count);
    Row row;
    row.count = count;
    row.bytes = count * sizeof(T);
    row.wrong += check(collective, 0) + check(collective, 1);
    collective.settle();
    for (int i = 0; i < s_.warmup; ++i) collective.call();
    row.algorithm = collective.call().algorithm_name();

    const double call_us = estimate(collective);
    row.iterations = s_.iterations > 0 ? s_.iterations : static_cast<int>(std::clamp(s_.seconds * 1e6 / call_us, 5.0, 1e7));
    const int batch = calls_per_sample(row, call_us);
    control_.barrier();
    const Account before = Account::of(comm_.ledger(), s_.op);
    const std::vector<double> samples = timed(collective, row.iterations, batch);
    const Account after = Account::of(comm_.ledger(), s_.op);

    double times[3] = {bench::quantile(samples, 0), bench::quantile(samples, 0.5), bench::quantile(samples, 0.99)};
    control_.all_reduce(times, tally::max);  // the slowest rank's
    row.min_us = times[0];
    row.median_us = times[1];
    row.p99_us = times[2];
    row.algbw = static_cast<double>(row.bytes) / row.median_us * 1e-3;
    row.busbw = row.algbw * bus_factor(s_.op, comm_.size());
    add_costs(row, before, after);
    row.wrong += check(collective, 2);
    control_.all_reduce(std::span(&row.wrong, 1), tally::sum);
    return row;
  }

 private:
  static std::uint64_t check(Trial<T, Op>& collective, int turn) {
    collective.fill(turn);
    collective.call();
    return collective.count_wrong(turn);
  }

  /// Microseconds per call, roughly, the same on all ranks; more warm-up.
  double estimate(Trial<T, Op>& collective) {
    for (int calls = 1;; calls *= 2) {
      control_.barrier();
      double us = timed(collective, calls, calls).front();
      control_.all_reduce(std::span(&us, 1), tally::max);
      if (us * calls > 5000 || calls >= 1 << 18) return us;
    }
  }
  /// From 64 KiB on, a clock read is negligible and each call is a sample. Below, a sample is the mean of as many
  /// calls as fill 50 us, but there are at least 20 samples.
  int calls_per_sample(const Row& row, double call_us) const {
    if (row.bytes >= 64 << 10) return 1;
    return std::clamp(static_cast<int>(50 / call_us), 1, std::max(1, row.iterations / 20));
  }
  std::vector<double> timed(Trial<T, Op>& collective, int calls, int batch) {
    std::vector<double> samples;
    samples.reserve(static_cast<std::size_t>(calls / batch + 1));
    double begin = bench::seconds_now();
    for (int left = calls; left > 0; left -= batch) {
      const int many = std::min(batch, left);
      for (int i = 0; i < many; ++i) collective.call();
      const double end = bench::seconds_now();
      samples.push_back((end - begin) / many * 1e6);
      begin = end;
    }
    return samples;
  }

  /// Waits are means over calls and ranks; joules are of one call, all ranks together.
  void add_costs(Row& row, const Account& before, const Account& after) {
    const double calls = after.calls - before.calls;
    double sums[] = {after.elapsed - before.elapsed, after.idle - before.idle, after.arrival - before.arrival, after.transfer - before.transfer, after.energy - before.energy, after.idle_energy - before.idle_energy};
    auto provenance = static_cast<std::uint8_t>(after.provenance);
    control_.all_reduce(sums, tally::sum);
    control_.all_reduce(std::span(&provenance, 1), tally::min);
    if (calls <= 0 || sums[0] <= 0) return;  // accounting is off
    const double rank_calls = calls * comm_.size();
    row.idle_fraction = sums[1] / sums[0];
    row.wait_arrival_us = sums[2] / rank_calls * 1e-3;
    row.wait_transfer_us = sums[3] / rank_calls * 1e-3;
    row.provenance = name_of(static_cast<tally::Provenance>(provenance));
    if (static_cast<tally::Provenance>(provenance) == tally::Provenance::none) return;
    row.energy_j = sums[4] / calls;
    row.idle_energy_j = sums[5] / calls;
  }

  tally::Communicator& comm_;
  tally::Communicator& control_;
  const Settings& s_;
};

// ---- output ----

/// The table, and JSON lines where asked for. Only rank 0 has one.
class Output {
 public:
  explicit Output(const Settings& settings) : s_(settings), table_(s_.json == "-" ? std::cerr : std::cout), json_(s_.json == "-" ? std::cout : file_) {
    if (s_.json.empty() || s_.json == "-") return;
    file_.open(s_.json);
    if (!file_) throw CLI::ValidationError("--json", "cannot write '" + s_.json + "'");
  }
  void header(int ranks, const std::string& placement) {
    placement_ = placement;
    table_ << "# machine    " << bench::machine_line() << '\n'
           << "# ranks      " << ranks << (s_.transport == "thread" ? " threads" : " processes") << (s_.launcher.empty() ? "" : " started by " + s_.launcher) << '\n'
           << "# operation  " << name_of(s_.op) << ", " << (s_.op == Collective::barrier ? "no data" : s_.in_place ? "in place" : "out of place") << '\n'
           << "# transport  " << s_.transport << '\n'
           << "# algorithm  " << s_.algorithm << '\n'
           << "# placement  " << placement << '\n'
           << "# time of the slowest rank; idle and waits are means over calls and ranks; joules per call of all ranks together\n"
           << "#\n"
           << line({"#", "", "", "", "", "", "min", "median", "p99", "algbw", "busbw", "", "idle", "arrival", "transfer", "energy", ""}) << '\n'
           << line({"#   size(B)", "count", "type", "redop", "root", "algorithm", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "#wrong", "(%)", "(us)", "(us)", "(J)", "provenance"}) << std::endl;
  }
  void row(const Row& r, int ranks) {
    const bool rooted = has_root(s_.op);
    char joules[32] = "-";
    if (std::isfinite(r.energy_j)) std::snprintf(joules, sizeof joules, "%.2e", r.energy_j);
    table_ << line({std::to_string(r.bytes), std::to_string(r.count), s_.type, s_.reduce_name, rooted ? std::to_string(s_.root) : "-1", r.algorithm, bench::cell(r.min_us), bench::cell(r.median_us),
                    bench::cell(r.p99_us), bench::cell(r.algbw), bench::cell(r.busbw), std::to_string(r.wrong), bench::cell(100 * r.idle_fraction), bench::cell(r.wait_arrival_us),
                    bench::cell(r.wait_transfer_us), joules, r.provenance})
           << std::endl;
    rows_ += 1;
    busbw_ += r.busbw;
    wrong_ += r.wrong;
    if (!s_.json.empty()) json_ << json_of(r, ranks).dump() << std::endl;
  }
  void footer() const {
    table_ << "# wrong values: " << wrong_ << (wrong_ == 0 ? " OK" : " FAILED") << '\n';
    if (rows_ > 0) table_ << "# mean bus bandwidth: " << bench::cell(busbw_ / rows_) << " GB/s" << std::endl;
  }

 private:
  static std::string line(const std::array<std::string, 17>& cells) {
    static constexpr std::array widths{11, 10, 5, 6, 5, 19, 9, 9, 9, 8, 8, 7, 7, 9, 9, 10, 11};
    std::string text;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const auto width = static_cast<std::size_t>(widths[i]);
      const std::string padding(width > cells[i].size() ? width - cells[i].size() : 0, ' ');
      const bool left = i == 0 && cells[i].starts_with('#');  // a comment begins with its mark
      text += left ? cells[i] + padding : " " + padding + cells[i];
      if (left) text += ' ';
    }
    return text;
  }
  Json json_of(const Row& r, int ranks) const {
    const auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); };
    return {{"op", name_of(s_.op)},
            {"transport", s_.transport},
            {"algorithm", r.algorithm},
            {"ranks", ranks},
            {"bytes", r.bytes},
            {"type", s_.type},
            {"reduce", s_.reduce_name},
            {"placement", placement_},
            {"time_us", {{"min", number(r.min_us)}, {"median", number(r.median_us)}, {"p99", number(r.p99_us)}}},
            {"algbw_gbs", number(r.algbw)},
            {"busbw_gbs", number(r.busbw)},
            {"wrong", r.wrong},
            {"idle_fraction", number(r.idle_fraction)},
            {"energy_j", number(r.energy_j)},
            {"idle_energy_j", number(r.idle_energy_j)},
            {"provenance", r.provenance},
            {"wait_arrival_us", number(r.wait_arrival_us)},
            {"wait_transfer_us", number(r.wait_transfer_us)},
            {"in_place", s_.in_place},
            {"iterations", r.iterations}};
  }

  const Settings& s_;
  std::ofstream file_;
  std::ostream& table_;
  std::ostream& json_;
  std::string placement_;
  int rows_ = 0;
  double busbw_ = 0;
  std::uint64_t wrong_ = 0;
};

// ---- one rank's life ----

/// Where the ranks may run, as they find it themselves after pinning.
std::string placement(tally::Communicator& comm, const Settings& s, bool pinned) {
  std::array<std::uint8_t, 64> mine{};
  const std::string cores = bench::core_list(bench::allowed_cores());
  std::copy_n(cores.begin(), std::min(cores.size(), mine.size() - 1), mine.begin());
  std::vector<std::uint8_t> all(mine.size() * static_cast<std::size_t>(comm.size()));
  comm.all_gather(mine, all);
  int everyone = pinned ? 1 : 0;
  comm.all_reduce(std::span(&everyone, 1), tally::min);
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < all.size(); at += mine.size()) texts.emplace_back(reinterpret_cast<const char*>(&all[at]));
  const bool same = std::all_of(texts.begin(), texts.end(), [&](const std::string& text) { return text == texts.front(); });
  std::string list;
  for (const std::string& text : texts) list += (list.empty() ? "" : " | ") + text;
  if (s.pin && everyone) return "pinned, by rank, to core " + list;
  const std::string why = s.pin ? "not pinned (refused), " : s.launcher.empty() ? "not pinned, " : "as started, ";
  return why + (same ? "all on cores " + texts.front() : "by rank on cores " + list);
}

template <class T>
std::vector<std::size_t> counts_of(const Settings& s, int n) {
  if (s.op == Collective::barrier) return {0};
  const std::size_t unit = tally::Layout{s.op, 0, n, 0, 1}.items();  // blocks
  std::vector<std::size_t> counts;
  for (std::size_t bytes = s.least; bytes <= s.most;) {
    const std::size_t count = std::max<std::size_t>(bytes / sizeof(T) / unit, 1) * unit;
    if (counts.empty() || counts.back() != count) counts.push_back(count);
    if (__builtin_mul_overflow(bytes, s.factor, &bytes)) break;
  }
  return counts;
}

/// All sizes with one type and operator; the number of wrong values.
template <class T, class Op>
std::uint64_t measure_all(tally::Communicator& comm, const Settings& s, Output* output) {
  tally::Communicator control = comm.duplicate();  // so that the account of `comm` is of the measured calls only
  const std::vector<int> cores = bench::allowed_cores();
  const bool pinned = s.pin && !cores.empty() && bench::pin_to(cores[static_cast<std::size_t>(comm.rank()) % cores.size()]);
  const std::string where = placement(control, s, pinned);
  if (output) output->header(comm.size(), where);
  const bench::Progress progress(output != nullptr);
  Measurement<T, Op> measurement(comm, control, s);
  std::uint64_t wrong = 0;
  for (const std::size_t count : counts_of<T>(s, comm.size())) {
    progress.show(std::string(name_of(s.op)) + " of " + bench::size_text(count * sizeof(T)) + " ...");
    const Row row = measurement.run(count);
    progress.clear();
    wrong += row.wrong;
    if (output) output->row(row, comm.size());
  }
  if (output) output->footer();
  return wrong;
}

template <class T>
std::uint64_t measure_type(tally::Communicator& comm, const Settings& s, Output* output) {
  switch (s.reduce) {
    case Reduce::prod: return measure_all<T, tally::Prod>(comm, s, output);
    case Reduce::min: return measure_all<T, tally::Min>(comm, s, output);
    case Reduce::max: return measure_all<T, tally::Max>(comm, s, output);
    case Reduce::mean:
      if constexpr (std::floating_point<T>) return measure_all<T, tally::Mean>(comm, s, output);
      [[fallthrough]];  // refused with the arguments
    default: return measure_all<T, tally::Sum>(comm, s, output);
  }
}

struct NamedType {
  const char* name;
  bool floating;
  std::uint64_t (*measure)(tally::Communicator&, const Settings&, Output*);
};
constexpr std::array types{NamedType{"i8", false, measure_type<std::int8_t>},   NamedType{"i16", false, measure_type<std::int16_t>}, NamedType{"i32", false, measure_type<std::int32_t>},
                           NamedType{"i64", false, measure_type<std::int64_t>}, NamedType{"u8", false, measure_type<std::uint8_t>},  NamedType{"u16", false, measure_type<std::uint16_t>},
                           NamedType{"u32", false, measure_type<std::uint32_t>}, NamedType{"u64", false, measure_type<std::uint64_t>}, NamedType{"f32", true, measure_type<float>},
                           NamedType{"f64", true, measure_type<double>}};
const NamedType* find_type(const std::string& name) {
  const auto found = std::find_if(types.begin(), types.end(), [&](const NamedType& t) { return name == t.name; });
  return found == types.end() ? nullptr : &*found;
}

// ---- arguments ----

constexpr std::array<std::pair<const char*, Reduce>, 5> reductions{{{"sum", Reduce::sum}, {"prod", Reduce::prod}, {"min", Reduce::min}, {"max", Reduce::max}, {"mean", Reduce::mean}}};

/// Throws CLI::ParseError with one line on anything that makes no sense.
void parse(int argc, char** argv, CLI::App& app, Settings& s) {
  std::string op = "all_reduce", least = "8", most = "64M";
  app.footer("Sizes take suffixes K, M, G (powers of 1024). For all_gather and reduce_scatter the size is that of the larger side.\n"
             "Times are of the slowest rank. From 64 KiB on every call is a sample, below the mean of a batch of calls.\n"
             "Exit status: 0, 1 if any value was wrong or a rank failed, 2 for bad arguments.");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  CLI::Option* ranks = app.add_option("-n,--ranks", s.ranks, "number of ranks to start [2]; a launcher's number under mpirun, torchrun or TALLY_RANK");
  app.add_option("--op", op, "all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan or exclusive_scan")->capture_default_str();
  CLI::Option* transport = app.add_option("--transport", s.transport, "shm (ranks are processes), thread, or tcp; under a launcher what connects its ranks, or tcp")->capture_default_str();
  app.add_option("--algorithm", s.algorithm, "auto, or one that --list names for the operation (zero_copy only where ranks are threads)")->capture_default_str();
  app.add_option("-b,--min", least, "smallest size in bytes")->capture_default_str();
  app.add_option("-e,--max", most, "largest size")->capture_default_str();
  app.add_option("-f,--factor", s.factor, "from size to size")->capture_default_str();
  app.add_option("--type", s.type, "i8, i16, i32, i64, u8, u16, u32, u64, f32 or f64")->capture_default_str();
  CLI::Option* reduce = app.add_option("--reduce", s.reduce_name, "sum, prod, min, max, or mean (floating point only)")->capture_default_str();
  app.add_option("--root", s.root, "of reduce, broadcast, gather and scatter")->capture_default_str();
  CLI::Option* place = app.add_flag("--in-place,!--out-of-place", s.in_place, "use one buffer (the default) or two; broadcast has only one");
  CLI::Option* iterations = app.add_option("--iterations", s.iterations, "timed calls per size; default: what fits into --seconds");
  CLI::Option* seconds = app.add_option("--seconds", s.seconds, "time for the timed calls of one size")->capture_default_str();
  app.add_option("--warmup", s.warmup, "calls before timing begins, besides those that estimate the time")->capture_default_str();
  CLI::Option* pin = app.add_flag("--pin,!--no-pin", s.pin, "keep rank r on the r-th usable core, or not; default: if there are as many cores as ranks and no launcher");
  app.add_option("--json", s.json, "also JSON lines to this file; '-': to stdout, and the table to stderr");
  app.add_option("--tune", s.tune, "instead: measure all algorithms of all operations from -b to -e and write a model for TALLY_MODEL to this file");
  app.add_option("--device", s.device, "cuda: buffers of ranks that share a GPU; runs `cuda`, which has to be built beside this program and takes -n, --op, --algorithm, -b, -e, -f and --json");
  app.add_flag("--list", s.list, "only list the algorithms of each operation, also of those that are not measured here");
  app.parse(argc, argv);
  if (s.list) return;

  const auto require = [](bool good, const char* option, const std::string& why) {
    if (!good) throw CLI::ValidationError(option, why);
  };
  const tally::JobInfo job = tally::job_info();
  if (!job.launcher.empty()) {
    s.launcher = job.launcher;
    require(ranks->count() == 0 || s.ranks == job.size, "-n", job.launcher + " started " + std::to_string(job.size) + " ranks, not " + std::to_string(s.ranks));
    s.ranks = job.size;
    if (transport->count() == 0) s.transport = "";  // what fits
    else if (job.size == 1 && s.transport == "shm") s.transport = "thread";  // what one rank alone gets
  }
  require(s.ranks >= 1 && s.ranks <= 1 << 15, "-n", "there must be 1 to 32768 ranks");
  const auto operation = std::find_if(std::begin(tally::all_operations), std::end(tally::all_operations), [&](Collective o) { return name_of(o) == op; });
  require(operation != std::end(tally::all_operations), "--op", "unknown operation '" + op + "'; there are all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan, exclusive_scan");
  require(!tally::sizes_differ(*operation), "--op", "blocks of " + op + " have sizes of their own, of which there are too many to measure");
  s.op = *operation;
  require(s.transport == "shm" || s.transport == "thread" || s.transport == "tcp" || transport->count() == 0, "--transport", "unknown transport '" + s.transport + "'; there are shm, thread and tcp");
  require(s.launcher.empty() || job.size == 1 || s.transport != "thread", "--transport", "ranks started by " + s.launcher + " are processes, not threads");
  if (s.algorithm != "auto" && !tally::find_algorithm(s.op, s.algorithm)) {
    std::string offered;
    for (const std::string_view name : tally::algorithms_for(s.op)) offered += (offered.empty() ? "" : ", ") + std::string(name);
    throw CLI::ValidationError("--algorithm", "'" + s.algorithm + "' does not offer " + op + "; these do: " + offered);
  }
  require(s.algorithm != tally::ZeroCopy::name || s.transport == "thread", "--algorithm", "zero_copy works on private memory only where ranks are threads: --transport thread");
  const NamedType* type = find_type(s.type);
  require(type, "--type", "unknown type '" + s.type + "'; there are i8 to i64, u8 to u64, f32, f64");
  if (tally::reduces(s.op)) {
    const auto found = std::find_if(reductions.begin(), reductions.end(), [&](const auto& r) { return s.reduce_name == r.first; });
    require(found != reductions.end(), "--reduce", "unknown operator '" + s.reduce_name + "'; there are sum, prod, min, max, mean");
    s.reduce = found->second;
    require(s.reduce != Reduce::mean || (s.op != Collective::scan && s.op != Collective::exclusive_scan), "--reduce", "a scan has no mean");
    require(s.reduce != Reduce::mean || type->floating, "--reduce", "mean needs a floating-point type, not " + s.type);
  } else {
    require(reduce->count() == 0, "--reduce", op + " does not reduce");
    s.reduce = Reduce::none;
    s.reduce_name = "none";
  }
  const auto low = bench::parse_size(least), high = bench::parse_size(most);
  require(low && *low > 0, "-b", "'" + least + "' is no size of 1 byte or more");
  require(high && *high > 0, "-e", "'" + most + "' is no size of 1 byte or more");
  require(*low <= *high, "-b", least + " is more than -e " + most);
  s.least = *low;
  s.most = *high;
  require(s.factor >= 2, "-f", "the factor must be 2 or more");
  require(s.root >= 0 && s.root < s.ranks, "--root", std::to_string(s.root) + " is not a rank: there are " + std::to_string(s.ranks));
  require(s.op != Collective::broadcast || place->count() == 0 || s.in_place, "--out-of-place", "broadcast has only one buffer");
  require(s.iterations >= (iterations->count() > 0 ? 1 : 0), "--iterations", "must be 1 or more");
  require(s.warmup >= 0, "--warmup", "must not be negative");
  if (seconds->count() > 0) s.tune_seconds = s.seconds;
  require(s.seconds > 0 && s.seconds <= 3600, "--seconds", "must be more than 0 and at most 3600");
  if (pin->count() == 0) s.pin = s.launcher.empty() && static_cast<std::size_t>(s.ranks) <= bench::allowed_cores().size();
}

/// A number that ranks in other processes can leave behind.
class SharedCount {
 public:
  SharedCount() : value_(static_cast<std::uint64_t*>(::mmap(nullptr, sizeof(std::uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    if (value_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~SharedCount() { ::munmap(value_, sizeof *value_); }
  SharedCount(const SharedCount&) = delete;
  SharedCount& operator=(const SharedCount&) = delete;
  std::uint64_t& operator*() const { return *value_; }

 private:
  std::uint64_t* value_;
};

template <class F>
void on_ranks(const Settings& s, const tally::Options& options, F&& work) {
  if (!s.launcher.empty()) {
    tally::Communicator comm = tally::init(options);
    work(comm);
  } else if (s.transport == "tcp") {
    tally::launch_tcp(s.ranks, work, tally::processes, options);
  } else {
    tally::launch(s.ranks, work, s.transport == "thread" ? tally::threads : tally::processes, options);
  }
}

/// Writes the model; it appears only when it is complete.
std::uint64_t tune(const Settings& s, const tally::Options& options) {
  const auto work = [&](tally::Communicator& comm) {
    const std::string unfinished = s.tune + ".unfinished";
    std::ofstream file;
    if (comm.rank() == 0) {
      file.open(unfinished);
      if (!file) throw tally::Error(tally::Errc::invalid_argument, "--tune: cannot write '" + s.tune + "'");
    }
    const std::vector<int> cores = bench::allowed_cores();
    if (s.pin && !cores.empty()) bench::pin_to(cores[static_cast<std::size_t>(comm.rank()) % cores.size()]);
    bench::Tuning(comm, {s.least, s.most, s.tune_seconds}, comm.rank() == 0 ? &file : nullptr).run();
    if (comm.rank() != 0) return;
    file.close();
    if (!file || std::rename(unfinished.c_str(), s.tune.c_str()) != 0) throw tally::Error(tally::Errc::no_resources, "--tune: cannot write '" + s.tune + "'");
    std::cout << "wrote " << s.tune << "; TALLY_MODEL=" << s.tune << " makes programs choose by it (" << comm.transport_name() << ", " << comm.size() << " ranks)" << std::endl;
  };
  on_ranks(s, options, work);
  return 0;
}

std::uint64_t run(const Settings& s) {
  tally::Options options;
  options.transport = s.transport;
  if (s.algorithm != "auto") options.algorithms = tally::AlgorithmOverrides(std::string(name_of(s.op)) + "=" + s.algorithm);
  if (!s.tune.empty()) return tune(s, options);
  const NamedType& type = *find_type(s.type);
  Settings shown = s;
  std::optional<Output> output;  // a launcher's ranks write only at rank 0
  if (s.launcher.empty()) output.emplace(s);
  const SharedCount wrong;
  on_ranks(s, options, [&](tally::Communicator& comm) {
    if (comm.rank() == 0 && !output) shown.transport = comm.transport_name(), output.emplace(shown);
    const std::uint64_t mine = type.measure(comm, s, comm.rank() == 0 ? &*output : nullptr);
    if (comm.rank() == 0 || !s.launcher.empty()) *wrong = mine;
  });
  return *wrong;
}

}  // namespace

/// Goes on as the program that measures devices, if that is asked for. Throws where it cannot.
void measure_device(int argc, char** argv) {
  std::vector<char*> arguments;
  std::string device;
  for (int i = 0; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--device" && i + 1 < argc) device = argv[++i];
    else if (argument.starts_with("--device=")) device = argument.substr(9);
    else arguments.push_back(argv[i]);
  }
  if (device.empty()) return;
  if (device != "cuda") throw CLI::ValidationError("--device", "'" + device + "' is none; there is cuda");
  arguments.push_back(nullptr);
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").replace_filename("cuda");
  ::execv(program.c_str(), arguments.data());
  throw std::runtime_error("cannot run " + program + " (" + std::strerror(errno) + "): it is built by nvcc, with -DTALLY_BUILD_CUDA=ON and --target cuda");
}

int main(int argc, char** argv) {
  CLI::App app{"Measures one collective of tally over a range of sizes: time, bandwidth, correctness, idle time and joules."};
  Settings settings;
  const auto end = [](const std::string& why, int status) {
    std::cerr << "tally_perf: " << why.substr(0, why.find('\n')) << '\n';
    return status;
  };
  try {
    measure_device(argc, argv);
    parse(argc, argv, app, settings);
    if (settings.list) {
      for (const Collective operation : tally::all_operations) {
        std::cout << name_of(operation) << ':';
        for (const std::string_view name : tally::algorithms_for(operation)) std::cout << ' ' << name;
        std::cout << '\n';
      }
      return 0;
    }
    return run(settings) == 0 ? 0 : 1;
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const CLI::ParseError& error) {
    return end(error.what(), 2);
  } catch (const tally::Error& error) {
    return end(error.what(), error.errc() == tally::Errc::invalid_argument ? 2 : 1);
  } catch (const std::exception& error) {
    return end(error.what(), 1);
  }
}
