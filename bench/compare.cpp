// SPDX-License-Identifier: Apache-2.0
// Races tally against Open MPI, MPICH and Gloo, interleaved in one run, beside what the machine itself needs. Every
// library runs in processes of its own (compare_*.cpp) and takes its turns in race.hpp; here are the arguments and
// what is printed.
#include <CLI/CLI.hpp>
#include <array>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "arguments.hpp"
#include "measure.hpp"
#include "picture.hpp"
#include "race.hpp"

namespace {

using bench::Contender;
using bench::Kind;
using bench::Op;
using bench::Row;
using bench::Times;
using Json = nlohmann::ordered_json;

const std::vector<bench::Entry>& all_entries() {
  static const std::vector<bench::Entry> entries{
      {"tally", "tally", Kind::reference, "compare_tally", {}, "build the target comparison"},
      {"symmetric", "tally, symmetric memory", Kind::own, "compare_tally", {}, "build the target comparison"},
      {"open_mpi", "Open MPI", Kind::peer, "compare_open_mpi", {"mpirun.openmpi", "mpirun"}, "install openmpi-bin, libopenmpi-dev and pkg-config"},
      {"mpich", "MPICH", Kind::peer, "compare_mpich", {"mpiexec.mpich", "mpiexec.hydra"}, "install mpich, libmpich-dev and pkg-config"},
      {"gloo", "Gloo", Kind::peer, "compare_gloo", {}, "install libgloo-dev"},
      {"unaccounted", "tally, accounting off", Kind::peer, "compare_tally", {}, "build the target comparison"},
      {"trip", "a cache line there and back", Kind::limit, "compare_limits", {}, "build the target comparison"},
      {"copy", "a copy in own memory", Kind::limit, "compare_limits", {}, "build the target comparison"},
      {"combine", "a bare loop over shared buffers", Kind::limit, "compare_limits", {}, "build the target comparison"},
  };
  return entries;
}

/// The same over TCP.
const std::vector<bench::Entry>& tcp_entries() {
  static const std::vector<bench::Entry> entries{
      {"tcp", "tally over TCP", Kind::reference, "compare_tally", {}, "build the target comparison"},
      {"open_mpi", "Open MPI over TCP", Kind::peer, "compare_open_mpi", {"mpirun.openmpi", "mpirun"}, "install openmpi-bin, libopenmpi-dev and pkg-config"},
      {"mpich", "MPICH over TCP", Kind::peer, "compare_mpich", {"mpiexec.mpich", "mpiexec.hydra"}, "install mpich, libmpich-dev and pkg-config"},
      {"gloo", "Gloo", Kind::peer, "compare_gloo", {}, "install libgloo-dev"},
      {"tcp_unaccounted", "tally over TCP, accounting off", Kind::peer, "compare_tally", {}, "build the target comparison"},
      {"ping", "as much there and back over one socket", Kind::limit, "compare_limits", {}, "build the target comparison"},
      {"stream", "as much as must move, both ways over a socket each", Kind::limit, "compare_limits", {}, "build the target comparison"},
  };
  return entries;
}
/// The same over UCX.
const std::vector<bench::Entry>& ucx_entries() {
  static const std::vector<bench::Entry> entries{
      {"ucx", "tally over UCX", Kind::reference, "compare_ucx", {}, "install libucx-dev and build the target comparison"},
      {"open_mpi", "Open MPI over UCX", Kind::peer, "compare_open_mpi", {"mpirun.openmpi", "mpirun"}, "install openmpi-bin, libopenmpi-dev and pkg-config"},
      {"mpich", "MPICH over UCX", Kind::peer, "compare_mpich", {"mpiexec.mpich", "mpiexec.hydra"}, "install mpich, libmpich-dev and pkg-config"},
      {"ucx_unaccounted", "tally over UCX, accounting off", Kind::peer, "compare_ucx", {}, "build the target comparison"},
  };
  return entries;
}
/// Peers would use shared memory of their own, too.
void keep_peers_to(const std::string& over) {
  using Variables = std::initializer_list<std::pair<const char*, const char*>>;
  const auto set = [](const Variables& variables) {
    for (const auto& [name, value] : variables) ::setenv(name, value, 1);
  };
  set({{"MPIR_CVAR_NOLOCAL", "1"}});
  if (over == "tcp") set({{"OMPI_MCA_pml", "ob1"}, {"OMPI_MCA_btl", "tcp,self"}, {"OMPI_MCA_btl_tcp_if_include", "lo"}, {"FI_PROVIDER", "tcp"}, {"FI_TCP_IFACE", "lo"}});
  else set({{"OMPI_MCA_pml", "ucx"}, {"OMPI_MCA_opal_common_ucx_tls", "any"}, {"OMPI_MCA_opal_common_ucx_devices", "any"}});
  if (over == "ucx") set({{"UCX_TLS", "sm,self"}, {"TALLY_UCX_SHARED_MEMORY", "on"}});
  else set({{"UCX_TLS", "tcp,self"}, {"UCX_NET_DEVICES", "lo"}});
}

struct Settings {
  std::string over = "shm";
  int ranks = 2;
  std::vector<Op> ops{Op::all_reduce};
  std::vector<std::string> peers;
  std::size_t least = 8, most = std::size_t{64} << 20, factor = 4;
  bench::Limits limits;
  std::string json, svg;
  const std::vector<bench::Entry>& entries() const { return over == "shm" ? all_entries() : over == "tcp" ? tcp_entries() : ucx_entries(); }
};

// ---- arguments ----

std::vector<std::string> words(const std::string& list) {
  std::vector<std::string> result;
  for (std::string rest = list + ","; !rest.empty(); rest.erase(0, rest.find(',') + 1)) result.push_back(rest.substr(0, rest.find(',')));
  return result;
}

/// Exit status if the program ends here.
std::optional<int> parse(int argc, char** argv, Settings& s) {
  CLI::App app{"Races tally against Open MPI, MPICH and Gloo, interleaved in one run. bench/compare.sh installs and builds all that it needs."};
  std::string ops = "all_reduce", peers = "open_mpi,mpich,gloo", least = "8", most = "64M";
  double block_ms = s.limits.block_s * 1e3;
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--over", s.over, "what connects all ranks: shm (shared memory), tcp (on loopback), ucx (its shared memory), ucx_tcp (its TCP)")->check(CLI::IsMember({"shm", "tcp", "ucx", "ucx_tcp"}))->capture_default_str();
  app.add_option("-n,--ranks", s.ranks, "ranks of each library")->check(CLI::Range(2, bench::most_ranks))->capture_default_str();
  app.add_option("--ops", ops, "comma-separated: all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan, exclusive_scan, send_receive, or all")->capture_default_str();
  app.add_option("--peers", peers, "comma-separated: whom to race against (also: unaccounted, which is tally with its accounting off), or none")->capture_default_str();
  app.add_option("-b,--min", least, "smallest size in bytes; suffixes K, M, G")->capture_default_str();
  app.add_option("-e,--max", most, "largest size; always measured itself")->capture_default_str();
  app.add_option("-f,--factor", s.factor, "from size to size")->check(CLI::Range(2, 1 << 20))->capture_default_str();
  app.add_option("--seconds", s.limits.seconds, "time for one size; there are at least 11 rounds, unless they take ten times as long")->check(CLI::Range(0.01, 3600.0))->capture_default_str();
  app.add_option("--rounds", s.limits.rounds, "blocks per size and contestant; default: by time")->check(CLI::Range(1, 10001));
  app.add_option("--block-ms", block_ms, "length of a block in milliseconds (at least 1 call)")->check(CLI::Range(0.01, 1000.0))->capture_default_str();
  app.add_option("--json", s.json, "JSON lines to this file; '-': to stdout, and the table to stderr");
  app.add_option("--svg", s.svg, "a picture of time against size to this file, by gnuplot");
  const auto refuse = [](const std::string& why) {
    std::cerr << "compare: " << why.substr(0, why.find('\n')) << '\n';
    return 2;
  };
  if (const auto status = bench::parse("compare", app, argc, argv)) return status;
  s.limits.block_s = block_ms * 1e-3;
  s.ops.clear();
  for (const std::string& word : words(ops)) {
    const auto known = std::find(bench::op_names.begin(), bench::op_names.end(), word);
    if (word != "all" && known == bench::op_names.end()) return refuse("--ops: unknown operation '" + word + "'; there are all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan, exclusive_scan, send_receive, all");
    for (std::size_t i = 0; i < bench::op_names.size(); ++i)
      if (word == "all" || word == bench::op_names[i]) s.ops.push_back(static_cast<Op>(i));
  }
  if (peers != "none")
    for (const std::string& word : words(peers)) {
      const auto& entries = s.entries();
      if (std::none_of(entries.begin(), entries.end(), [&](const bench::Entry& e) { return e.kind == Kind::peer && e.name == word; })) {
        if (s.over.starts_with("ucx") && word == "gloo" && !app.count("--peers")) continue;  // it does not know UCX
        std::string there;
        for (const bench::Entry& e : entries)
          if (e.kind == Kind::peer) there += e.name + ", ";
        return refuse("--peers: unknown '" + word + "'; there are " + there + "none");
      }
      s.peers.push_back(word);
    }
  const auto low = bench::parse_size(least), high = bench::parse_size(most);
  if (!low || *low < sizeof(float) || *low % sizeof(float) != 0) return refuse("--min: '" + least + "' is no multiple of 4 bytes");
  if (!high || *high % sizeof(float) != 0) return refuse("--max: '" + most + "' is no multiple of 4 bytes");
  if (*high < *low) return refuse("--max is less than --min");
  if (*high / sizeof(float) > static_cast<std::size_t>(std::numeric_limits<int>::max())) return refuse("--max: MPI counts elements in an int");
  if (!s.svg.empty() && bench::find_program("gnuplot").empty()) return refuse("--svg: there is no gnuplot (Debian: gnuplot-nox)");
  s.least = *low;
  s.most = *high;
  return std::nullopt;
}

std::vector<std::size_t> sizes_of(const Settings& s, Op op) {
  if (op == Op::barrier) return {0};
  std::vector<std::size_t> sizes;
  for (std::size_t bytes = s.least; bytes < s.most; bytes *= s.factor) sizes.push_back(bytes);
  sizes.push_back(s.most);
  return sizes;
}

// ---- output ----

/// What is printed about a race, row by row.
class Output {
 public:
  Output(std::ostream& table, std::ostream* json, const bench::Race& race, const Settings& settings) : table_(table), json_(json), race_(race), settings_(settings) {
    for (std::size_t i = 0; i < race.contenders().size(); ++i)
      if (race.contenders()[i].entry().kind == Kind::reference) reference_ = i;
  }

  void header() const {
    table_ << "# machine  " << bench::machine_line() << '\n'
           << "# ranks    " << settings_.ranks << " processes of each library, " << placement() << '\n';
    for (const Contender& c : race_.contenders())
      if (c.entry().kind != Kind::limit && c.out().empty()) table_ << "# " << padded(c.entry().name, -8) << ' ' << c.version() << '\n';
    table_ << "# method   in each round every library has one block of calls (about " << bench::cell(settings_.limits.block_s * 1e3) << " ms) while the others sleep; us per call of the slowest rank, median over rounds\n"
           << "# ratio    its time / tally's, median over rounds: above 1 tally is faster\n"
           << "# idle     share of tally's calls in which ranks waited, by its own account\n"
           << (settings_.over.starts_with("ucx") ? "" : settings_.over == "tcp" ? "# limits   ping: as many bytes from rank 0 to rank 1 and back over one socket; stream: as many as must move, both ways at once\n"
                             : "# limits   trip: one cache line from rank 0 to rank 1 and back; copy: memcpy of as many bytes in a rank's own memory, all ranks at once;\n"
                               "#          combine: an all_reduce of bare loops over buffers that all ranks share\n")
           << "# op             bytes";
    for (const Contender& c : race_.contenders()) {
      if (c.entry().kind == Kind::reference) table_ << padded(c.entry().name + "_us", 11) << padded("idle%", 7);
      if (c.entry().kind == Kind::peer) table_ << " |" << padded(c.entry().name + "_us", 11) << padded("ratio", 8);
    }
    table_ << " |  wrong rounds |";
    for (const Contender& c : race_.contenders())
      if (c.entry().kind == Kind::limit || c.entry().kind == Kind::own) table_ << padded(c.entry().name + "_us", 11);
    table_ << std::endl;
  }

  void row(const Row& row) const {
    std::uint64_t wrong = 0;
    std::string limits;
    table_ << padded(bench::name_of(row.op), -14) << padded(bench::size_text(row.bytes), 8);
    for (std::size_t i = 0; i < row.times.size(); ++i) {
      const Times& times = row.times[i];
      const bench::Entry& entry = race_.contenders()[i].entry();
      const std::string us = padded(!times.note.empty() && times.note != "out" ? times.note : bench::cell(times.median_us()), 11);
      wrong += times.wrong;
      if (entry.kind == Kind::limit || entry.kind == Kind::own) limits += us;
      else if (entry.kind == Kind::reference) table_ << us << padded(bench::cell(100 * times.idle()), 7);
      else table_ << " |" << us << padded(bench::cell(ratio(row, i)), 8);
    }
    table_ << " |" << padded(std::to_string(wrong), 7) << padded(std::to_string(row.rounds), 7) << " |" << limits << '\n';
    for (std::size_t i = 0; i < row.times.size(); ++i) {
      const std::string& name = race_.contenders()[i].entry().name;
      if (row.times[i].wrong > 0) table_ << "# wrong: " << row.times[i].wrong << " elements of " << name << '\n';
      if (row.times[i].note == "hung" || row.times[i].note == "failed") table_ << "# left out from here on: " << name << " (" << race_.contenders()[i].out() << ")\n";
    }
    table_ << std::flush;
    if (json_) *json_ << json_of(row).dump() << std::endl;
  }

  /// One line per operation.
  void summary(const std::vector<Row>& rows) const {
    table_ << "# summary: geometric mean of the ratio over sizes, and the least with its size\n";
    for (const Op op : settings_.ops) {
      table_ << "# " << padded(bench::name_of(op), -14);
      for (std::size_t i = 0; i < race_.contenders().size(); ++i) {
        if (race_.contenders()[i].entry().kind != Kind::peer) continue;
        double logs = 0, least = std::numeric_limits<double>::infinity();
        int known = 0;
        std::size_t at = 0;
        for (const Row& row : rows) {
          const double r = ratio(row, i);
          if (row.op != op || !std::isfinite(r)) continue;
          logs += std::log(r);
          ++known;
          if (r < least) least = r, at = row.bytes;
        }
        table_ << "  " << race_.contenders()[i].entry().name << ' ';
        if (known == 0) table_ << "-";
        else table_ << bench::cell(std::exp(logs / known)) << (op == Op::barrier ? "" : " (" + bench::cell(least) + " at " + bench::size_text(at) + ")");
      }
      table_ << '\n';
    }
    // Symmetric memory against every peer and against the bare loop, where it matters.
    for (const Op op : settings_.ops)
      for (std::size_t i = 0; i < race_.contenders().size(); ++i) {
        if (race_.contenders()[i].entry().kind != Kind::own) continue;
        std::string text;
        for (std::size_t j = 0; j < race_.contenders().size(); ++j) {
          const bench::Entry& other = race_.contenders()[j].entry();
          if (other.kind != Kind::peer && other.name != "combine") continue;
          double logs = 0;
          int known = 0;
          for (const Row& row : rows) {
            const double r = row.times[j].ratio_to(row.times[i]);
            if (row.op == op && row.bytes >= 4096 && row.bytes <= std::size_t{16} << 20 && std::isfinite(r)) logs += std::log(r), ++known;
          }
          if (known > 0) text += "  " + other.name + " " + bench::cell(std::exp(logs / known));
        }
        if (!text.empty()) table_ << "# " << padded(bench::name_of(op), -14) << "  symmetric memory, 4K to 16M:" << text << '\n';
      }
    table_ << std::flush;
  }

 private:
  static std::string padded(const std::string& text, int width) {
    const auto wide = static_cast<std::size_t>(std::abs(width));
    const std::string space(text.size() < wide ? wide - text.size() : 0, ' ');
    return width < 0 ? text + space : space + text;
  }
  std::string placement() const { return race_.pinned() ? "rank r on the r-th of cores " + bench::core_list(bench::allowed_cores()) : "not bound to cores"; }
  double ratio(const Row& row, std::size_t i) const { return row.times[i].ratio_to(row.times[reference_]); }

  Json json_of(const Row& row) const {
    const auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); };
    Json line{{"op", bench::name_of(row.op)}, {"ranks", settings_.ranks}, {"bytes", row.bytes}, {"rounds", row.rounds}, {"machine", bench::machine_line()}, {"placement", placement()}};
    for (std::size_t i = 0; i < row.times.size(); ++i) {
      const Times& times = row.times[i];
      const Contender& c = race_.contenders()[i];
      Json one{{"us", number(times.median_us())}, {"min_us", number(times.least_us())}, {"calls_per_block", times.calls}, {"wrong", times.wrong}, {"note", !times.note.empty() ? times.note : times.offered ? "" : "not offered"}};
      if (c.entry().kind != Kind::limit) one["version"] = c.version();
      if (c.entry().kind == Kind::reference) one["idle_fraction"] = number(times.idle());
      if (c.entry().kind == Kind::own) one["ratio"] = number(ratio(row, i));
      if (c.entry().kind == Kind::peer) one["ratio"] = number(ratio(row, i));
      line[c.entry().kind == Kind::limit ? "limits" : "libraries"][c.entry().name] = one;
    }
    return line;
  }

  std::ostream& table_;
  std::ostream* json_;
  const bench::Race& race_;
  const Settings& settings_;
  std::size_t reference_ = 0;
};

bench::Picture picture_of(const std::vector<Row>& rows, const bench::Race& race, const Settings& s) {
  bench::Picture picture;
  picture.title = std::to_string(s.ranks) + " ranks on " + bench::machine_line();
  for (const Op op : s.ops) {
    bench::Panel panel{bench::name_of(op), op == Op::barrier, {}};
    for (std::size_t i = 0; i < race.contenders().size(); ++i) {
      bench::Line line{race.contenders()[i].entry().title, race.contenders()[i].entry().kind == Kind::limit, static_cast<int>(i), {}};
      for (const Row& row : rows)
        if (const double us = row.times[i].median_us(); row.op == op && std::isfinite(us)) line.points.push_back({static_cast<double>(row.bytes), us});
      if (!line.points.empty()) panel.lines.push_back(line);
    }
    picture.panels.push_back(panel);
  }
  return picture;
}

/// Exit status.
int run(const Settings& settings) {
  std::ofstream file;
  if (!settings.json.empty() && settings.json != "-") {
    file.open(settings.json);
    if (!file) throw std::runtime_error("cannot write " + settings.json);
  }
  std::ostream& table = settings.json == "-" ? std::cerr : std::cout;
  std::ostream* const json = settings.json.empty() ? nullptr : settings.json == "-" ? &std::cout : &file;

  if (settings.over != "shm") keep_peers_to(settings.over);
  const bench::Progress progress(true);
  bench::Race race(settings.ranks, settings.most, settings.limits);
  for (const bench::Entry& entry : settings.entries()) {
    if (entry.kind == Kind::peer && std::find(settings.peers.begin(), settings.peers.end(), entry.name) == settings.peers.end()) continue;
    progress.show("starting " + entry.title + " ...");
    const std::string why_not = race.admit(entry);
    progress.clear();
    if (why_not.empty()) continue;
    if (entry.kind == Kind::reference) throw std::runtime_error("tally: " + why_not);
    std::cerr << "compare: without " << entry.title << ": " << why_not << std::endl;
  }
  const Output output(table, json, race, settings);
  output.header();
  std::size_t steps = 0;
  for (const Op op : settings.ops) steps += sizes_of(settings, op).size();
  std::vector<Row> rows;
  std::uint64_t wrong = 0;
  for (const Op op : settings.ops)
    for (const std::size_t bytes : sizes_of(settings, op)) {
      progress.show(std::to_string(rows.size() + 1) + " of " + std::to_string(steps) + ": " + bench::name_of(op) + (op == Op::barrier ? "" : " of " + bench::size_text(bytes)) + " ...");
      rows.push_back(race.run(op, bytes));
      progress.clear();
      output.row(rows.back());
      for (const Times& times : rows.back().times) wrong += times.wrong;
    }
  output.summary(rows);
  if (!settings.svg.empty()) bench::draw(picture_of(rows, race, settings), settings.svg);
  return wrong == 0 && race.contenders().front().out().empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  if (const auto status = parse(argc, argv, settings)) return *status;
  struct sigaction action {};
  action.sa_handler = [](int signal) { bench::interrupted = signal; };
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signal, &action, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  try {
    return run(settings);
  } catch (const bench::Interrupted&) {
    return 128 + bench::interrupted;
  } catch (const std::exception& error) {
    std::cerr << "compare: " << error.what() << std::endl;
    return 2;
  }
}
