// SPDX-License-Identifier: Apache-2.0
// Accounts as texts: exact ones of small accounts, what a parser finds in those of a whole job, and that reading back what was
// written changes nothing while what nobody wrote is refused.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <tally/account/csv.hpp>
#include <tally/account/json_lines.hpp>
#include <tally/account/perfetto.hpp>
#include <tally/account/prometheus.hpp>
#include <tally/file.hpp>

#include "../bench/read_accounts.hpp"
#include "sample_accounts.hpp"

using namespace tally;
using Catch::Matchers::Contains;

namespace {

using ns = nanoseconds;
using Json = nlohmann::json;

/// One rank, two rows of one bucket of sizes, one call, two domains. `algorithm` is of the second row.
Account small() {
  Account a;
  a.job = "j";
  a.communicator = "world";
  a.host = "h";
  a.boot_id = "b";
  a.transport = "shm";
  a.rank = 1;
  a.size = 2;
  a.begin = ns(1000);
  a.end = ns(9000);
  AccountRow row;
  row.operation = Collective::all_reduce;
  row.size_class = 10;
  row.algorithm = "ring";
  row.calls = 2;
  row.failed = 1;
  row.bytes = 2000;
  row.bytes_sent = 2001;
  row.bytes_received = 2002;
  row.bytes_wire = 2003;
  row.time.elapsed = ns(3000);
  row.time.exposed = ns(2500);
  row.time.copy = ns(100);
  row.time.reduce = ns(200);
  row.time.codec = ns(300);
  row.time.protocol = ns(400);
  row.time.wait_arrival = ns(1000);
  row.time.wait_transfer = ns(500);
  row.time.wait_credit = ns(250);
  row.time.wait_local = ns(150);
  row.time.undriven = ns(100);
  row.time.slept = ns(50);
  row.time.queued = ns(25);
  row.histogram[10] = 1;  // 512 to 1023 ns
  row.histogram[11] = 1;  // 1024 to 2047 ns
  row.waited_for = {{0, ns(1000), ns(500), ns(250)}};
  row.energy.gross = {0.5, 0.125, 0.25, 1, Provenance::measured, Split::direct};
  row.energy.cpu = {0.375, 0.0625, 0, std::numeric_limits<double>::infinity(), Provenance::prorated, Split::equal_time};
  a.rows.push_back(row);
  AccountEvent event;
  event.operation_number = 7;
  event.sequence = 8;
  event.operation = Collective::all_reduce;
  event.algorithm = "ring";
  event.bytes = 1000;
  event.begin = ns(2000);
  event.time.elapsed = event.time.exposed = ns(1500);
  event.time.wait_arrival = ns(1000);
  event.time.protocol = ns(500);
  event.last_arrival = 0;
  event.waited_for = {{0, ns(990), {}, {}}, {-1, ns(10), {}, {}}};
  a.recent.push_back(event);
  a.by_peer = {{0, ns(1000), ns(500), ns(250)}};
  DomainAccount package;
  package.kind = Domain::cpu_package;
  package.key = "package-0";
  package.source = "perf";
  package.total = 6'000'000'000;
  package.operations = 1'000'000'000;
  package.application = 2'000'000'000;
  package.unattributed = 3'000'000'000;
  package.watts_floor = 12.5;
  package.provenance = Provenance::prorated;
  package.caveats = Caveat::wrap | Caveat::stale;
  DomainAccount core;
  core.kind = Domain::cpu_core;
  core.key = "core";
  core.source = "perf";
  core.parent = 0;
  core.caveats = static_cast<Caveats>(Caveat::permission_denied);
  a.domains = {package, core};
  a.power = {{0, ns(1000), ns(5000), 20.5}, {0, ns(5000), ns(9000), 30}};
  a.slack = {{Collective::all_reduce, 0, 7, ns(500), ns(100)}};
  a.host_coverage = 0.75;
  a.carbon_intensity = {380, 19, 0, std::numeric_limits<double>::infinity(), Provenance::modelled, Split::direct};
  a.carbon_source = "DE";
  a.pue = 1.25;
  a.caveats = static_cast<Caveats>(Caveat::carbon_stale);
  a.warnings = {"one", "two"};
  return a;
}

/// Values that are hard to write: the largest, the least, texts with everything in them.
Account extreme() {
  Account a = small();
  a.job = "";
  a.communicator = std::string("\0\x01\x1f\x7f\"\\/\n\r\t,", 11) + "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80";
  a.members = {1023, 0};
  a.begin = ns(-(std::int64_t{1} << 60));
  a.end = ns(std::int64_t{1} << 60);
  a.clock_offset = ns(-1);
  a.host_coverage = std::numeric_limits<double>::quiet_NaN();
  a.residual = -1e-300;
  a.carbon_intensity = {};
  a.rows[0].bytes = std::uint64_t{1} << 62;
  a.rows[0].histogram[47] = (std::uint64_t{1} << 53) + 1;
  a.rows[0].energy.net = {0.1 + 0.2, 5e-324, 0, 1e18, Provenance::modelled, Split::regressed_weights};
  a.recent[0].operation_number = (std::uint64_t{1} << 53) + 1;
  a.recent[0].sequence = 0xffff'ffff;
  a.recent[0].last_arrival = -1;
  a.recent[0].energy_final = true;
  a.domains[0].total = a.domains[0].unattributed = (std::uint64_t{1} << 53) + 1;
  a.domains[0].operations = a.domains[0].application = 0;
  a.domains[0].watts_floor = 0;
  return a;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }
bool same(const Quantity& a, const Quantity& b) {
  return same(a.value, b.value) && same(a.sigma, b.sigma) && a.lower == b.lower && a.upper == b.upper && a.provenance == b.provenance && a.split == b.split;
}
bool same(const AccountEnergy& a, const AccountEnergy& b) {
  return same(a.gross, b.gross) && same(a.net, b.net) && same(a.idle, b.idle) && same(a.idle_avoidable, b.idle_avoidable) && same(a.cpu, b.cpu) && same(a.dram, b.dram) && same(a.gpu, b.gpu) && same(a.carbon, b.carbon);
}
bool same(const AccountTimes& a, const AccountTimes& b) {
  return a.elapsed == b.elapsed && a.exposed == b.exposed && a.copy == b.copy && a.reduce == b.reduce && a.codec == b.codec && a.protocol == b.protocol && a.wait_arrival == b.wait_arrival &&
         a.wait_transfer == b.wait_transfer && a.wait_credit == b.wait_credit && a.wait_local == b.wait_local && a.undriven == b.undriven && a.slept == b.slept && a.queued == b.queued;
}
bool same(const Blame& a, const Blame& b) { return a.rank == b.rank && a.arrival == b.arrival && a.transfer == b.transfer && a.credit == b.credit; }
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b);
bool same(const AccountRow& a, const AccountRow& b) {
  return a.operation == b.operation && a.size_class == b.size_class && a.algorithm == b.algorithm && a.calls == b.calls && a.failed == b.failed && a.bytes == b.bytes && a.bytes_sent == b.bytes_sent &&
         a.bytes_received == b.bytes_received && a.bytes_wire == b.bytes_wire && same(a.time, b.time) && a.histogram == b.histogram && same(a.waited_for, b.waited_for) && same(a.energy, b.energy);
}
bool same(const AccountEvent& a, const AccountEvent& b) {
  return a.operation_number == b.operation_number && a.sequence == b.sequence && a.operation == b.operation && a.algorithm == b.algorithm && a.bytes == b.bytes && a.begin == b.begin && same(a.time, b.time) &&
         a.last_arrival == b.last_arrival && same(a.waited_for, b.waited_for) && same(a.energy, b.energy) && a.energy_final == b.energy_final;
}
bool same(const DomainAccount& a, const DomainAccount& b) {
  return a.kind == b.kind && a.key == b.key && a.source == b.source && a.parent == b.parent && a.total == b.total && a.operations == b.operations && a.application == b.application &&
         a.unattributed == b.unattributed && a.watts_floor == b.watts_floor && a.provenance == b.provenance && a.caveats == b.caveats;
}
bool same(const PowerSample& a, const PowerSample& b) { return a.domain == b.domain && a.begin == b.begin && a.end == b.end && a.watts == b.watts; }
bool same(const SlackRow& a, const SlackRow& b) { return a.operation == b.operation && a.peer == b.peer && a.calls == b.calls && a.expected == b.expected && a.tenth_percentile == b.tenth_percentile; }
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const T& x, const T& y) { return same(x, y); });
}
bool same(const Account& a, const Account& b) {
  return a.job == b.job && a.communicator == b.communicator && a.host == b.host && a.boot_id == b.boot_id && a.transport == b.transport && a.rank == b.rank && a.size == b.size && a.members == b.members &&
         a.begin == b.begin && a.end == b.end && a.clock_offset == b.clock_offset && same(a.rows, b.rows) && same(a.recent, b.recent) && same(a.by_peer, b.by_peer) && same(a.domains, b.domains) &&
         same(a.power, b.power) && same(a.slack, b.slack) && same(a.host_coverage, b.host_coverage) && same(a.residual, b.residual) && same(a.carbon_intensity, b.carbon_intensity) &&
         a.carbon_source == b.carbon_source && a.pue == b.pue && a.caveats == b.caveats && a.warnings == b.warnings;
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}
std::string json_lines(const std::vector<Account>& accounts) {
  std::ostringstream out;
  for (const Account& account : accounts) write_json_lines(out, account);
  return out.str();
}
std::string prometheus(const std::vector<Account>& accounts, PrometheusOptions options = {}) {
  std::ostringstream out;
  write_prometheus(out, accounts, options);
  return out.str();
}
std::string csv(const std::vector<Account>& accounts) {
  std::ostringstream out;
  write_csv(out, accounts);
  return out.str();
}
std::vector<Json> trace(const std::vector<Account>& accounts) {
  std::ostringstream out;
  write_perfetto(out, accounts);
  return Json::parse(out.str()).at("traceEvents").get<std::vector<Json>>();
}
bench::AccountsRead read(const std::string& text, bench::AccountLimits limits = {}) {
  std::istringstream in(text);
  bench::AccountReader reader(limits);
  reader.read(in, "f");
  return reader.finish();
}
std::string all_of(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) all += text + '\n';
  return all;
}

/// The samples of an exposition, after its form was checked: families in one piece, told of before their samples, every series
/// once, buckets that only rise, and no value that is not a number.
std::map<std::string, double> samples_of(const std::string& text, bool open_metrics) {
  std::map<std::string, double> samples;
  std::set<std::string> families;
  std::string family, type, last_series;
  double last_bucket = 0;
  bool ended = false;
  for (const std::string& line : lines_of(text)) {
    REQUIRE_FALSE(ended);
    if (line == "# EOF") {
      ended = true;
    } else if (line.starts_with("# HELP ")) {
      family = line.substr(7, line.find(' ', 7) - 7);
      CHECK(families.insert(family).second);
      CHECK(line.size() > 8 + family.size());
    } else if (line.starts_with("# TYPE ")) {
      CHECK(line.starts_with("# TYPE " + family + " "));
      type = line.substr(8 + family.size());
      CHECK(family.ends_with("_total") == (!open_metrics && type == "counter"));
    } else if (line.starts_with("# UNIT ")) {
      CHECK(open_metrics);
      CHECK(family.ends_with("_" + line.substr(8 + family.size())));
    } else {
      const std::size_t brace = line.find('{'), end = line.rfind("} ");
      REQUIRE((brace != std::string::npos && end != std::string::npos));
      const std::string name = line.substr(0, brace), series = line.substr(0, end + 1);
      const std::string suffix = name.starts_with(family) ? name.substr(family.size()) : "?";
      if (type == "histogram") CHECK((suffix == "_bucket" || suffix == "_sum" || suffix == "_count"));
      else CHECK(suffix == (open_metrics && type == "counter" ? "_total" : open_metrics && type == "info" ? "_info" : ""));
      std::size_t read = 0;
      const std::string number = line.substr(end + 2);
      const double value = std::stod(number, &read);
      CHECK(read == number.size());
      CHECK(std::isfinite(value));
      CHECK(samples.emplace(series, value).second);
      if (suffix == "_bucket") {
        const std::string without_le = series.substr(0, series.find(",le="));
        CHECK(value >= (without_le == last_series ? last_bucket : 0));
        last_series = without_le;
        last_bucket = value;
      } else if (suffix == "_count") {
        CHECK(value == last_bucket);
      }
    }
  }
  CHECK(ended == open_metrics);
  return samples;
}

struct Folder {
  Folder() : path((std::filesystem::temp_directory_path() / "tally-export-XXXXXX").string()) { REQUIRE(::mkdtemp(path.data()) != nullptr); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::size_t files() const { return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path), {})); }
  static std::string text_of(const std::string& file) { return (std::ostringstream() << std::ifstream(file).rdbuf()).str(); }
  std::string path;
};

}  // namespace

TEST_CASE("numbers are the shortest that read back as the same, and what is not a number is none") {
  CHECK(detail::number_text(0.1) == "0.1");
  CHECK(detail::number_text(0.1 + 0.2) == "0.30000000000000004");
  CHECK(detail::number_text(5e-324) == "5e-324");
  CHECK(detail::number_text(1e22) == "1e+22");
  CHECK(detail::number_text(-3) == "-3");
  CHECK(detail::json_number(std::numeric_limits<double>::quiet_NaN()) == "null");
  CHECK(detail::json_number(std::numeric_limits<double>::infinity()) == "null");
  CHECK(detail::number_text(detail::in_seconds(ns(1'048'575))) == "0.001048575");
}

TEST_CASE("texts are escaped as each format wants it, and bytes that are not UTF-8 are replaced") {
  CHECK(detail::json_text(std::string("a\"\\\n\0\x1f\x7f", 7)) == R"("a\"\\\n\u0000\u001f\u007f")");
  CHECK(detail::label_text("a\"\\\nb\t") == "a\\\"\\\\\\nb\t");
  CHECK(detail::csv_text("plain; text") == "plain; text");
  CHECK(detail::csv_text("a,\"b\"") == "\"a,\"\"b\"\"\"");
  CHECK(detail::csv_text("a\nb") == "\"a\nb\"");
  const std::string replaced = "\xef\xbf\xbd";
  CHECK(detail::utf8_text("\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") == "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  CHECK(detail::utf8_text("a\x80" "b") == "a" + replaced + "b");                                                // a continuation of nothing
  CHECK(detail::utf8_text("\xc3") == replaced);                                                                 // cut off
  CHECK(detail::utf8_text("\xc0\xaf") == replaced + replaced);                                                  // '/' in two bytes
  CHECK(detail::utf8_text("\xe0\x80\xaf") == replaced + replaced + replaced);                                   // in three
  CHECK(detail::utf8_text("\xed\xa0\x80") == replaced + replaced + replaced);                                   // half of a surrogate pair
  CHECK(detail::utf8_text("\xf4\x90\x80\x80") == replaced + replaced + replaced + replaced);                    // beyond Unicode
  CHECK(detail::utf8_text("\xf5\xff") == replaced + replaced);
}

TEST_CASE("a file is replaced as a whole, or not at all and with nothing left behind") {
  const Folder folder;
  const std::string file = folder.path + "/tally.prom";
  write_file_atomically(file, "first");
  CHECK(Folder::text_of(file) == "first");
  const std::string left_over = detail::concat({file, ".", ::getpid(), ".0.partial"});  // by a process that was killed
  std::ofstream(left_over) << "left over";
  write_file_atomically(file, "second, and longer");
  CHECK(Folder::text_of(file) == "second, and longer");
  CHECK(Folder::text_of(left_over) == "left over");
  std::filesystem::remove(left_over);
  write_file_atomically(file, "");
  CHECK(Folder::text_of(file).empty());
  CHECK(folder.files() == 1);

  CHECK_THROWS_WITH(write_file_atomically(folder.path + "/none/tally.prom", "x"), Contains("/none/tally.prom") && Contains("No such file or directory") && Contains("choose a path in a folder that exists"));
  CHECK_THROWS_WITH(write_file_atomically(folder.path, "x"), Contains(folder.path) && Contains("not a plain file"));
  std::filesystem::create_symlink("/dev/null", folder.path + "/link");
  CHECK_THROWS_WITH(write_file_atomically(folder.path + "/link", "x"), Contains("not a plain file"));
  CHECK_THROWS_WITH(write_file_atomically("/dev/null", "x"), Contains("not a plain file"));
  CHECK(folder.files() == 2);
}

TEST_CASE("a file that does not fit leaves the one before it as it was") {
  const Folder folder;
  const std::string file = folder.path + "/tally.prom";
  write_file_atomically(file, "before");
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight{8, before.rlim_max};
  std::string what;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &tight) == 0);
  try {
    write_file_atomically(file, "more than eight bytes");
  } catch (const Error& error) {
    what = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_THAT(what, Contains(file) && Contains("writing") && Contains("File too large") && Contains("make room"));
  CHECK(Folder::text_of(file) == "before");
  CHECK(folder.files() == 1);
}

TEST_CASE("an account as JSON lines, to the letter") {
  const std::string who = R"("job":"j","communicator":"world","rank":1,)";
  const std::string unknown = R"("net_joules":null,"idle_joules":null,"idle_avoidable_joules":null,)", others = R"("dram_joules":null,"gpu_joules":null,"carbon_grams":null})";
  const std::vector<std::string> expected = {
      R"({"schema":"tally.account/1","kind":"account",)" + who +
          R"("size":2,"host":"h","boot_id":"b","transport":"shm","members":[],"begin_ns":1000,"end_ns":9000,"clock_offset_ns":0,"host_coverage":0.75,"residual":null,)"
          R"("carbon_intensity":{"value":380,"sigma":19,"lower":0,"upper":null,"provenance":"modelled","split":"direct"},"carbon_source":"DE","pue":1.25,"caveats":["carbon_stale"],)"
          R"("warnings":["one","two"],"lines":{"row":1,"report":1,"peer":1,"domain":2,"power":2,"slack":1}})",
      R"({"kind":"row",)" + who +
          R"("operation":"all_reduce","size_class":10,"algorithm":"ring","calls":2,"failed":1,"bytes":2000,"bytes_sent":2001,"bytes_received":2002,"bytes_wire":2003,)"
          R"("time":{"elapsed_ns":3000,"exposed_ns":2500,"copy_ns":100,"reduce_ns":200,"codec_ns":300,"protocol_ns":400,"wait_arrival_ns":1000,"wait_transfer_ns":500,"wait_credit_ns":250,)"
          R"("wait_local_ns":150,"undriven_ns":100,"slept_ns":50,"queued_ns":25},"histogram":[0,0,0,0,0,0,0,0,0,0,1,1],)"
          R"("waited_for":[{"rank":0,"arrival_ns":1000,"transfer_ns":500,"credit_ns":250}],"energy":{)"
          R"("gross_joules":{"value":0.5,"sigma":0.125,"lower":0.25,"upper":1,"provenance":"measured","split":"direct"},)" +
          unknown + R"("cpu_joules":{"value":0.375,"sigma":0.0625,"lower":0,"upper":null,"provenance":"prorated","split":"equal time"},)" + others + "}",
      R"({"kind":"report",)" + who +
          R"("operation_number":7,"sequence":8,"operation":"all_reduce","algorithm":"ring","bytes":1000,"begin_ns":2000,)"
          R"("time":{"elapsed_ns":1500,"exposed_ns":1500,"copy_ns":0,"reduce_ns":0,"codec_ns":0,"protocol_ns":500,"wait_arrival_ns":1000,"wait_transfer_ns":0,"wait_credit_ns":0,)"
          R"("wait_local_ns":0,"undriven_ns":0,"slept_ns":0,"queued_ns":0},"last_arrival":0,)"
          R"("waited_for":[{"rank":0,"arrival_ns":990,"transfer_ns":0,"credit_ns":0},{"rank":null,"arrival_ns":10,"transfer_ns":0,"credit_ns":0}],)"
          R"("energy":{"gross_joules":null,)" + unknown + R"("cpu_joules":null,)" + others + R"(,"energy_final":false})",
      R"({"kind":"peer",)" + who + R"("peer":0,"arrival_ns":1000,"transfer_ns":500,"credit_ns":250})",
      R"({"kind":"domain",)" + who +
          R"("host":"h","domain":"cpu_package","key":"package-0","source":"perf","parent":null,"total_nj":6000000000,"operations_nj":1000000000,"application_nj":2000000000,)"
          R"("unattributed_nj":3000000000,"watts_floor":12.5,"provenance":"prorated","caveats":["wrap","stale"]})",
      R"({"kind":"domain",)" + who +
          R"("host":"h","domain":"cpu_core","key":"core","source":"perf","parent":"package-0","total_nj":null,"operations_nj":null,"application_nj":null,"unattributed_nj":null,)"
          R"("watts_floor":null,"provenance":"unknown","caveats":["permission_denied"]})",
      R"({"kind":"power",)" + who + R"("host":"h","key":"package-0","begin_ns":1000,"end_ns":5000,"watts":20.5})",
      R"({"kind":"power",)" + who + R"("host":"h","key":"package-0","begin_ns":5000,"end_ns":9000,"watts":30})",
      R"({"kind":"slack",)" + who + R"("operation":"all_reduce","peer":0,"calls":7,"expected_ns":500,"tenth_percentile_ns":100})",
  };
  CHECK(lines_of(json_lines({small()})) == expected);
}

TEST_CASE("what is read is what was written, in every field") {
  Account first = small();
  first.rank = 0;
  first.rows.clear();
  Account other = extreme();
  other.rank = 0;
  const std::vector<Account> by_hand = {small(), first, extreme(), other};
  for (const std::vector<Account>& accounts : {by_hand, sample::accounts(), sample::accounts_without_energy()}) {
    const bench::AccountsRead got = read(json_lines(accounts));
    CHECK(all_of(got.warnings) == "");
    REQUIRE(got.accounts.size() == accounts.size());
    for (std::size_t i = 0; i < accounts.size(); ++i) CHECK(same(got.accounts[i], accounts[i]));
  }
  CHECK_FALSE(same(small(), extreme()));
}

TEST_CASE("lines of many ranks may be mixed, and come from many files") {
  const std::vector<Account> all = sample::accounts();
  std::vector<std::vector<std::string>> lines;
  for (const Account& account : all) lines.push_back(lines_of(json_lines({account})));
  std::string mixed;
  for (std::size_t i = 0; mixed.size() < json_lines(all).size(); ++i)
    for (const auto& of_account : lines)
      if (i < of_account.size()) mixed += of_account[i] + "\n";
  const bench::AccountsRead got = read(mixed);
  CHECK(got.warnings.empty());
  CHECK(json_lines(got.accounts) == json_lines(all));

  const Folder folder;
  std::vector<std::string> files;
  for (const Account& account : all) write_file_atomically(files.emplace_back(folder.path + "/" + std::to_string(files.size())), json_lines({account}));
  CHECK(json_lines(bench::read_accounts(files).accounts) == json_lines(all));

  files.resize(2);
  files[1] = folder.path + "/none";
  const bench::AccountsRead one = bench::read_accounts(files);
  CHECK(one.accounts.size() == 1);
  CHECK_THAT(all_of(one.warnings), Contains("/none: cannot be opened: No such file or directory") && Contains("has 8 ranks, but the accounts of 7 are missing (1, 2, 3, 4, 5, 6, 7)"));
  files[1] = folder.path;
  CHECK_THAT(all_of(bench::read_accounts(files).warnings), Contains("cannot be read any further") && Contains("no account begins in it"));
}

TEST_CASE("a line that is wrong is skipped, and the warning says where and why") {
  Account account = small();
  account.size = 1;
  account.rank = 0;
  account.rows[0].waited_for.clear();
  account.recent[0].waited_for.clear();
  account.recent[0].last_arrival = -1;
  account.by_peer.clear();
  account.slack.clear();
  const std::vector<std::string> lines = lines_of(json_lines({account}));
  enum { header, row, report, domain, core, power };
  REQUIRE(read(all_of(lines)).warnings.empty());

  struct Wrong {
    int line;
    std::string from, to, why;
  };
  const std::string deep(100'000, '[');
  const std::vector<Wrong> wrongs = {
      {header, R"("kind":"account")", R"("kind":"acc)", "is not JSON"},
      {header, "tally.account/1", "tally.account/2", R"(its schema is "tally.account/2", but this version reads tally.account/1)"},
      {header, R"("schema":"tally.account/1",)", "", "'schema' is missing"},
      {header, R"("size":1)", R"("size":1000000000)", "'size' is 1000000000, but jobs of at most 1024 ranks are read"},
      {header, R"("size":1)", R"("size":0)", "'size' is not a whole number from 1 to"},
      {header, R"("size":1)", R"("size":1.0)", "'size' is not a whole number"},
      {header, R"("size":1)", R"("size":"1")", "'size' is not a whole number"},
      {header, R"("rank":0)", R"("rank":1)", "'rank' is 1, but the communicator has 1 ranks"},
      {header, R"("rank":0)", R"("rank":-1)", "'rank' is not a whole number from 0"},
      {header, R"("members":[])", R"("members":[0,1])", "'members' has 2 entries where at most 1 can be"},
      {header, R"("members":[])", R"("members":[1024])", "'members' is not a whole number from 0 to 1023"},
      {header, R"("members":[])", R"("members":{})", "'members' is not an array"},
      {header, R"("end_ns":9000)", R"("end_ns":999)", "'end_ns' is before 'begin_ns'"},
      {header, R"("begin_ns":1000)", R"("begin_ns":-9223372036854775808)", "'begin_ns' is not a whole number from"},
      {header, R"("begin_ns":1000)", R"("begin_ns":18446744073709551615)", "'begin_ns' is not a whole number from"},
      {header, R"("begin_ns":1000)", R"("begin_ns":99999999999999999999)", "'begin_ns' is not a whole number from"},
      {header, R"("pue":1.25)", R"("pue":1e999)", "is not JSON"},
      {header, R"("pue":1.25)", R"("pue":0.5)", "'pue' is not a number from 1 to 100"},
      {header, R"(["carbon_stale"])", R"(["rotten"])", R"(the caveat "rotten" is not known)"},
      {header, R"(["one","two"])", R"(["one",2])", "'warnings' are not texts"},
      {header, R"("pue":1.25)", R"("pue":1.25,"more":1)", "fields of which only"},
      {header, R"("row":1)", R"("row":-1)", "'row' is not a whole number"},
      {row, R"("operation":"all_reduce")", R"("operation":"all_redcue")", R"('operation' is "all_redcue", which this version does not know)"},
      {row, R"("size_class":10)", R"("size_class":65)", "'size_class' is not a whole number from 0 to 64"},
      {row, R"("calls":2)", R"("calls":null)", "'calls' is not a whole number"},
      {row, R"("copy_ns":100)", R"("copy_ns":101)", "the parts of its time are more than 'elapsed_ns'"},
      {row, R"("undriven_ns":100)", R"("undriven_ns":99)", "the parts of its time are less than 'elapsed_ns'"},
      {row, R"("elapsed_ns":3000)", R"("elapsed_ns":9223372036854775807)", "'elapsed_ns' is not a whole number from 0"},
      {row, R"("exposed_ns":2500)", R"("exposed_ns":3001)", "'exposed_ns' is more than 'elapsed_ns'"},
      {row, R"("slept_ns":50)", R"("slept_ns":1901)", "'slept_ns' or 'queued_ns' is more than the waits"},
      {row, R"("histogram":[)", R"("histogram":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,)", "'histogram' has 52 entries where at most 48"},
      {row, R"("waited_for":[])", R"("waited_for":[{"rank":1,"arrival_ns":0,"transfer_ns":0,"credit_ns":0}])", "'rank' is 1, but the communicator has 1 ranks"},
      {row, R"("waited_for":[])", R"("waited_for":[{"rank":null,"arrival_ns":0,"transfer_ns":0,"credit_ns":0}])", "'rank' is not a whole number"},
      {row, R"("waited_for":[])", R"("waited_for":[{"rank":0,"arrival_ns":1001,"transfer_ns":0,"credit_ns":0}])", "'waited_for' has more than the waits"},
      {row, R"("value":0.5)", R"("value":-0.5)", "'value' is not a number from 0"},
      {row, R"("value":0.5)", R"("value":null)", "'value' is not a number from 0"},
      {row, R"("upper":1,)", R"("upper":0.2,)", "'upper' is not a number from 0.25"},
      {row, R"("provenance":"measured")", R"("provenance":"unknown")", "'gross_joules' has a value of unknown provenance"},
      {row, R"("split":"direct")", R"("split":"half")", R"('split' is "half", which)"},
      {row, R"("energy":{)", R"("energy":)" + deep + "{", "nested deeper"},
      {row, R"("algorithm":"ring")", std::string("\"algorithm\":\"r\0ng\"", 18), "is not JSON"},
      {row, R"("algorithm":"ring")", "\"algorithm\":\"\xff\"", "is not JSON in UTF-8"},
      {row, R"("algorithm":"ring")", R"("algorithm":7)", "'algorithm' is not a text"},
      {row, R"("job":"j")", R"("job":"k")", R"(no account of rank 0 of communicator "world" of job "k" has begun)"},
      {row, R"("rank":0)", R"("rank":5)", "no account of rank 5"},
      {row, R"("kind":"row")", R"("kind":"column")", R"(its kind is "column", which this version does not know)"},
      {report, R"("last_arrival":null)", R"("last_arrival":3)", "'last_arrival' is 3, but"},
      {report, R"("sequence":8)", R"("sequence":4294967296)", "'sequence' is not a whole number"},
      {report, R"("energy_final":false)", R"("energy_final":0)", "'energy_final' is neither true nor false"},
      {domain, R"("total_nj":6000000000)", R"("total_nj":6000000001)", "its shares do not add up to 'total_nj'"},
      {domain, R"("total_nj":6000000000)", R"("total_nj":null)", "'total_nj' is not a whole number"},
      {domain, R"("host":"h")", R"("host":"i")", R"('host' is "i", but its account is of "h")"},
      {domain, R"("parent":null)", R"("parent":"")", "'parent' is empty"},
      {core, R"("total_nj":null)", R"("total_nj":0)", "'total_nj' has a value of unknown provenance"},
      {core, R"("key":"core")", R"("key":"package-0")", R"(its account has a domain "package-0" already)"},
      {power, R"("watts":20.5)", R"("watts":-1)", "'watts' is not a number from 0"},
      {power, R"("key":"package-0")", R"("key":"package-1")", R"(its domain "package-1" was not told of before it)"},
  };
  for (const Wrong& wrong : wrongs) {
    INFO(wrong.to.substr(0, 100));
    std::vector<std::string> some = lines;
    std::string& line = some[static_cast<std::size_t>(wrong.line)];
    const std::size_t at = line.find(wrong.from);
    REQUIRE(at != std::string::npos);
    line.replace(at, wrong.from.size(), wrong.to);
    const bench::AccountsRead got = read(all_of(some));
    REQUIRE_FALSE(got.warnings.empty());
    CHECK_THAT(got.warnings.front(), Contains("f:" + std::to_string(wrong.line + 1) + ": line skipped: ") && Contains(wrong.why));
    CHECK(got.accounts.size() == (wrong.line == header ? 0 : 1));
    if (wrong.line == row) CHECK(got.accounts.at(0).rows.empty());
    if (wrong.line == report) CHECK(got.accounts.at(0).recent.empty());
    if (wrong.line == core) CHECK(got.accounts.at(0).domains.size() == 1);
    if (wrong.line == power) CHECK(got.accounts.at(0).power.size() == 1);
  }

  for (const char* text : {"null", "7", "[]", "\"\"", "{}", "{", "\x01", "{\"kind\":7}", "\xff\xfe"}) {
    INFO(text);
    CHECK(read(text).warnings.size() == 2);  // and that there is no account
  }
  CHECK(read(" \n\r\n\n").warnings.size() == 1);
}

TEST_CASE("what is there twice, or too much, is skipped") {
  Account account = small();
  account.size = 1;
  account.rank = 0;
  account.rows[0].waited_for.clear();
  account.recent.clear();
  account.slack.clear();
  account.power.clear();
  account.by_peer = {{0, ns(1), ns(2), ns(3)}};
  const std::string text = json_lines({account});
  const std::vector<std::string> lines = lines_of(text);

  const bench::AccountsRead twice = read(text + text);
  REQUIRE(twice.accounts.size() == 1);
  CHECK(same(twice.accounts[0], account));
  REQUIRE(twice.warnings.size() == 1);
  CHECK_THAT(twice.warnings[0], Contains("f:6: line skipped: another account of rank 0 of communicator \"world\" has begun before it; its lines are skipped as well"));

  CHECK_THAT(all_of(read(text + lines[1]).warnings), Contains("f:6: line skipped: its account announced only 1 lines of this kind (the file ends in this line)"));
  const auto with_rows = [&](const std::string& second) {
    std::string announced = lines[0];
    announced.replace(announced.find("\"row\":1"), 7, "\"row\":2");
    return read(announced + "\n" + lines[1] + "\n" + second + "\n" + lines[2] + "\n" + lines[3] + "\n" + lines[4] + "\n");
  };
  CHECK_THAT(all_of(with_rows(lines[1]).warnings), Contains("f:3: line skipped: its account has a row of this operation, size class and algorithm already"));

  std::string other = lines[1];
  other.replace(other.find("\"ring\""), 6, "\"tree\"");
  CHECK(with_rows(other).warnings.empty());
  const std::string long_time = std::to_string((std::int64_t{1} << 62) - 2000);
  other.replace(other.find("\"elapsed_ns\":3000"), 17, "\"elapsed_ns\":" + long_time);
  other.replace(other.find("\"copy_ns\":100"), 13, "\"copy_ns\":" + std::to_string((std::int64_t{1} << 62) - 2000 - 2900));
  CHECK_THAT(all_of(with_rows(other).warnings), Contains("f:3: line skipped: with it all times together are more than 146 years"));

  CHECK_THAT(all_of(read(text, {.line_bytes = 100}).warnings), Contains("f:1: line skipped: it is longer than 100 bytes"));
  const bench::AccountsRead noise = read(std::string(50, '\n') + all_of(std::vector<std::string>(30, "x")), {.warnings = 3});
  REQUIRE(noise.warnings.size() == 4);
  CHECK_THAT(noise.warnings[0], Contains("f:51: "));
  CHECK(noise.warnings[3] == "and 28 more warnings like these");
}

TEST_CASE("where lines or ranks are missing, no sum claims to be more than modelled") {
  Account account = small();
  account.size = 1;
  account.rank = 0;
  account.rows[0].waited_for.clear();
  account.recent[0].waited_for.clear();
  account.recent[0].last_arrival = -1;
  account.by_peer.clear();
  account.slack.clear();
  const std::vector<std::string> lines = lines_of(json_lines({account}));
  const auto without = [&](std::size_t line) {
    std::vector<std::string> some = lines;
    some.erase(some.begin() + static_cast<std::ptrdiff_t>(line));
    return read(all_of(some));
  };
  const Quantity whole = read(all_of(lines)).accounts.at(0).rows[0].energy.gross;
  CHECK(whole.provenance == Provenance::measured);

  const bench::AccountsRead no_domain = without(4);
  const std::string why = "of the account of rank 0 of communicator \"world\" 1 of 2 lines of kind 'domain' are missing: its sums are too low";
  CHECK(all_of(no_domain.warnings) == why + "\n");
  CHECK(no_domain.accounts.at(0).warnings.back() == why);
  const Quantity gross = no_domain.accounts[0].rows[0].energy.gross;
  CHECK(gross.value == 0.5);
  CHECK(gross.lower == 0.25);
  CHECK(std::isinf(gross.upper));
  CHECK(gross.provenance == Provenance::modelled);
  CHECK_FALSE(no_domain.accounts[0].rows[0].energy.net.known());
  CHECK(no_domain.accounts[0].domains[0].provenance == Provenance::modelled);

  const bench::AccountsRead no_parent = without(3);
  CHECK(no_parent.accounts.at(0).domains.at(0).key == "core");
  CHECK(no_parent.accounts[0].domains[0].parent == -1);
  CHECK(no_parent.accounts[0].power.empty());
  CHECK(no_parent.accounts[0].rows[0].energy.gross.provenance == Provenance::modelled);

  const bench::AccountsRead no_report = without(2);  // nothing is summed up from these
  CHECK(all_of(no_report.warnings) == "of the account of rank 0 of communicator \"world\" 1 of 1 lines of kind 'report' are missing\n");
  CHECK(no_report.accounts.at(0).rows[0].energy.gross.provenance == Provenance::measured);

  std::vector<Account> job = sample::accounts();
  job.resize(8);  // "world"
  job.erase(job.begin() + 6);
  const bench::AccountsRead no_rank = read(json_lines(job));
  CHECK(all_of(no_rank.warnings) == "communicator \"world\" of job \"train-1871\" has 8 ranks, but the accounts of 1 are missing (6): sums over its ranks are too low\n");
  for (const Account& each : no_rank.accounts) CHECK(each.rows[0].energy.gross.provenance == Provenance::modelled);
}

TEST_CASE("a domain that is a part of itself tells nothing") {
  Account account = small();
  account.size = 1;
  account.rank = 0;
  account.rows.clear();
  account.recent.clear();
  account.by_peer.clear();
  account.slack.clear();
  account.domains[0].parent = 1;
  const bench::AccountsRead got = read(json_lines({account}));
  CHECK_THAT(all_of(got.warnings), Contains("domain \"package-0\" of host \"h\" is a part of itself: its joules are unknown"));
  REQUIRE(got.accounts.at(0).domains.size() == 2);
  CHECK(got.accounts[0].domains[0].parent == -1);
  CHECK(got.accounts[0].domains[0].provenance == Provenance::none);
  CHECK(got.accounts[0].domains[0].total == 0);
  CHECK(got.accounts[0].domains[1].parent == 0);
}

TEST_CASE("accounts as CSV, to the letter") {
  Account odd = small();
  odd.communicator = "a, \"b\"";
  odd.members = {4, 6};
  odd.rows[0].waited_for.clear();
  odd.rows[0].energy = {};
  CHECK(csv({small(), odd}) ==
        "job,communicator,job_rank,rank,size,host,transport,operation,size_class,algorithm,calls,failed,bytes,bytes_sent,bytes_received,bytes_wire,"
        "elapsed_ns,exposed_ns,copy_ns,reduce_ns,codec_ns,protocol_ns,wait_arrival_ns,wait_transfer_ns,wait_credit_ns,wait_local_ns,undriven_ns,slept_ns,queued_ns,waited_for,waited_for_ns,"
        "gross_joules,gross_joules_sigma,gross_joules_provenance,net_joules,net_joules_sigma,net_joules_provenance,idle_joules,idle_joules_sigma,idle_joules_provenance,"
        "idle_avoidable_joules,idle_avoidable_joules_sigma,idle_avoidable_joules_provenance,cpu_joules,cpu_joules_sigma,cpu_joules_provenance,dram_joules,dram_joules_sigma,dram_joules_provenance,"
        "gpu_joules,gpu_joules_sigma,gpu_joules_provenance,carbon_grams,carbon_grams_sigma,carbon_grams_provenance\r\n"
        "j,world,1,1,2,h,shm,all_reduce,10,ring,2,1,2000,2001,2002,2003,3000,2500,100,200,300,400,1000,500,250,150,100,50,25,0,1750,"
        "0.5,0.125,measured,,,unknown,,,unknown,,,unknown,0.375,0.0625,prorated,,,unknown,,,unknown,,,unknown\r\n"
        "j,\"a, \"\"b\"\"\",6,1,2,h,shm,all_reduce,10,ring,2,1,2000,2001,2002,2003,3000,2500,100,200,300,400,1000,500,250,150,100,50,25,,0,"
        ",,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown\r\n");
}

TEST_CASE("accounts for Prometheus: each sample of a small one") {
  for (const bool open_metrics : {false, true}) {
    const std::string text = prometheus({small()}, {.open_metrics = open_metrics, .peers = 1});
    const auto samples = samples_of(text, open_metrics);
    const std::string account = R"(job="j",comm="world",rank="1")", row = account + R"(,op="all_reduce",size_bucket="4096")";
    const std::string package = R"(host="h",domain="cpu_package",key="package-0",source="perf")";
    std::map<std::string, double> expected = {
        {"tally_collective_ops_total{" + row + "}", 2},
        {"tally_collective_failures_total{" + row + "}", 1},
        {"tally_collective_bytes_total{" + row + "}", 2000},
        {"tally_collective_sent_bytes_total{" + row + "}", 2001},
        {"tally_collective_received_bytes_total{" + row + "}", 2002},
        {"tally_collective_wire_bytes_total{" + row + "}", 2003},
        {"tally_collective_seconds_total{" + row + R"(,phase="copy"})", 1e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="reduce"})", 2e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="codec"})", 3e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="protocol"})", 4e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="wait_arrival"})", 1e-6},
        {"tally_collective_seconds_total{" + row + R"(,phase="wait_transfer"})", 5e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="wait_credit"})", 2.5e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="wait_local"})", 1.5e-7},
        {"tally_collective_seconds_total{" + row + R"(,phase="undriven"})", 1e-7},
        {"tally_collective_duration_seconds_bucket{" + row + R"(,le="1.023e-06"})", 1},
        {"tally_collective_duration_seconds_bucket{" + row + R"(,le="+Inf"})", 2},
        {"tally_collective_duration_seconds_sum{" + row + "}", 3e-6},
        {"tally_collective_duration_seconds_count{" + row + "}", 2},
        {"tally_collective_energy_joules_total{" + row + R"(,provenance="measured"})", 0.5},
        {"tally_collective_domain_energy_joules_total{" + row + R"(,domain="cpu",provenance="prorated"})", 0.375},
        {"tally_wait_seconds_total{" + account + R"(,cause="arrival"})", 1e-6},
        {"tally_wait_seconds_total{" + account + R"(,cause="transfer"})", 5e-7},
        {"tally_wait_seconds_total{" + account + R"(,cause="credit"})", 2.5e-7},
        {"tally_wait_seconds_total{" + account + R"(,cause="local"})", 1.5e-7},
        {"tally_wait_on_peer_seconds_total{" + account + R"(,peer="0"})", 1.75e-6},
        {"tally_slack_expected_seconds{" + account + R"(,op="all_reduce"})", 5e-7},
        {"tally_domain_energy_joules_total{" + package + R"(,provenance="prorated",parent="",share="operations"})", 1},
        {"tally_domain_energy_joules_total{" + package + R"(,provenance="prorated",parent="",share="application"})", 2},
        {"tally_domain_energy_joules_total{" + package + R"(,provenance="prorated",parent="",share="unattributed"})", 3},
        {"tally_domain_watts{" + package + "}", 30},
        {"tally_meter_up{" + package + "}", 1},
        {R"(tally_meter_up{host="h",domain="cpu_core",key="core",source="perf"})", 0},
        {R"(tally_host_coverage_ratio{host="h"})", 0.75},
        {"tally_account_info{" + account + R"(,host="h",transport="shm"})", 1},
        {"tally_account_caveat{" + account + R"(,caveat="carbon_stale"})", 1},
    };
    for (const char* le : {"4.095e-06", "1.6383e-05", "6.5535e-05", "0.000262143", "0.001048575", "0.004194303", "0.016777215", "0.067108863", "0.268435455", "1.073741823", "4.294967295", "17.179869183", "68.719476735"})
      expected["tally_collective_duration_seconds_bucket{" + row + ",le=\"" + le + "\"}"] = 2;
    CHECK(samples == expected);
    if (open_metrics) {
      CHECK_THAT(text, Contains("# TYPE tally_collective_energy_joules counter\n# UNIT tally_collective_energy_joules joules\n") && Contains("# TYPE tally_account info\n") && Catch::Matchers::EndsWith("\n# EOF\n"));
    } else {
      CHECK_THAT(text, Contains("# TYPE tally_collective_energy_joules_total counter\n") && Contains("# TYPE tally_account_info gauge\n") && !Contains("# UNIT") && !Contains("# EOF"));
    }
  }
}

TEST_CASE("accounts for Prometheus: a whole job") {
  const std::vector<Account> job = sample::accounts();
  for (const bool open_metrics : {false, true}) {
    const auto samples = samples_of(prometheus(job, {.open_metrics = open_metrics}), open_metrics);
    double joules = 0, expected_joules = 0, seconds = 0, expected_seconds = 0, domains = 0;
    for (const auto& [series, value] : samples) {
      if (series.starts_with("tally_collective_energy_joules_total{")) joules += value;
      if (series.starts_with("tally_collective_seconds_total{")) seconds += value;
      if (series.starts_with("tally_domain_energy_joules_total{") && series.find("parent=\"\"") != std::string::npos) domains += value;
      CHECK_FALSE(series.starts_with("tally_wait_on_peer_seconds"));  // not asked for
    }
    for (const Account& account : job)
      for (const AccountRow& row : account.rows) expected_joules += row.energy.gross.value, expected_seconds += detail::in_seconds(row.time.elapsed);
    CHECK(joules == Approx(expected_joules).epsilon(1e-12));
    CHECK(seconds == Approx(expected_seconds).epsilon(1e-12));
    double expected_domains = 0;  // of ranks 0 and 4, the first of each host
    for (const std::size_t first : {std::size_t{0}, std::size_t{4}})
      for (const DomainAccount& domain : job[first].domains)
        if (domain.parent < 0) expected_domains += detail::in_joules(domain.total);
    CHECK(domains == Approx(expected_domains).epsilon(1e-12));
  }
  // Ranks of a sub-communicator are told as those of the job; the worst peer of rank 6 in "node 1" is its rank 1, rank 5 of the job.
  const auto peers = samples_of(prometheus(job, {.peers = 1}), false);
  CHECK(peers.contains(R"(tally_wait_on_peer_seconds_total{job="train-1871",comm="node 1",rank="6",peer="5"})"));
  std::size_t count = 0;
  for (const auto& [series, value] : peers) count += series.starts_with("tally_wait_on_peer_seconds");
  CHECK(count == job.size());
}

TEST_CASE("labels of Prometheus are escaped, and sizes are in seven buckets") {
  Account account = small();
  account.communicator = "a\"\\\nb";
  account.rows[0].size_class = 64;
  CHECK_THAT(prometheus({account}), Contains(R"(tally_collective_ops_total{job="j",comm="a\"\\\nb",rank="1",op="all_reduce",size_bucket="+Inf"} 2)"));
  std::set<std::string> buckets;
  for (unsigned size_class = 0; size_class <= 64; ++size_class) buckets.insert(detail::size_bucket_text(detail::size_bucket(static_cast<std::uint8_t>(size_class))));
  CHECK(buckets == std::set<std::string>{"256", "4096", "65536", "1048576", "16777216", "268435456", "+Inf"});
  CHECK(detail::size_bucket_text(detail::size_bucket(8)) == "256");
  CHECK(detail::size_bucket_text(detail::size_bucket(9)) == "4096");
}

TEST_CASE("Prometheus is not told two accounts under one name") {
  Account other = small();
  other.host = "other";
  CHECK_THROWS_WITH(prometheus({small(), other}), Contains("two accounts are of rank 1, communicator 'world', job 'j'"));
  other.members = {0, 3};
  CHECK_NOTHROW(prometheus({small(), other}));
}

TEST_CASE("of a domain that several ranks tell of, what is known and most is told") {
  std::vector<Account> ranks(3, small());
  for (Rank r = 0; r < 3; ++r) {
    ranks[static_cast<std::size_t>(r)].rank = r;
    ranks[static_cast<std::size_t>(r)].size = 3;
  }
  ranks[0].domains[0].provenance = Provenance::none;
  ranks[0].domains[0].total = 9'000'000'000;
  ranks[2].domains[0].total += 1'000'000'000;
  ranks[2].domains[0].unattributed += 1'000'000'000;
  const auto samples = samples_of(prometheus(ranks), false);
  const std::string domain = R"(tally_domain_energy_joules_total{host="h",domain="cpu_package",key="package-0",source="perf",provenance="prorated",parent="",share=)";
  CHECK(samples.at(domain + R"("unattributed"})") == 4);
  CHECK(samples.at(domain + R"("operations"})") == 1);
}

TEST_CASE("I12: what is unknown has no sample, no joules and no zero in any format") {
  const std::vector<Account> job = sample::accounts_without_energy();
  for (const bool open_metrics : {false, true})
    for (const auto& [series, value] : samples_of(prometheus(job, {.open_metrics = open_metrics, .peers = 2}), open_metrics)) {
      INFO(series);
      CHECK(series.find("joules") == std::string::npos);
      CHECK(series.find("grams") == std::string::npos);
      CHECK(series.find("_ratio") == std::string::npos);
      CHECK(series.find("_watts") == std::string::npos);
    }
  for (const std::string& line : lines_of(json_lines(job))) {
    const Json json = Json::parse(line);
    if (json.contains("energy"))
      for (const auto& each : json["energy"]) CHECK(each.is_null());
  }
  for (const std::string& line : lines_of(csv(job)))
    if (!line.starts_with("job,")) CHECK_THAT(line, Catch::Matchers::EndsWith(",,,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown,,,unknown\r"));
  for (const Json& event : trace(job)) {
    CHECK(event["ph"] != "C");
    CHECK_FALSE((event.contains("args") && event["args"].contains("joules")));
  }

  // One row of a bucket is unknown: so is the sum.
  Account account = small();
  account.rows.push_back(account.rows[0]);
  account.rows[1].algorithm = "tree";
  CHECK_THAT(prometheus({account}), Contains(R"(size_bucket="4096",provenance="measured"} 1)"));
  account.rows[1].energy.gross.provenance = Provenance::prorated;
  CHECK_THAT(prometheus({account}), Contains(R"(size_bucket="4096",provenance="prorated"} 1)"));
  account.rows[1].energy.gross = {};
  CHECK_THAT(prometheus({account}), !Contains("tally_collective_energy_joules_total"));
  CHECK_THAT(prometheus({account}), Contains("tally_collective_ops_total") && Contains("tally_collective_domain_energy_joules_total"));
}

TEST_CASE("a trace of a job: slices nest, times begin at 0, and each arrow leads from one call to another") {
  const std::vector<Account> job = sample::accounts();
  const std::vector<Json> events = trace(job);
  struct Slice {
    std::int64_t begin, end;
    const Json* event;
  };
  const auto nanos = [](const Json& us) { return std::llround(us.get<double>() * 1000); };
  std::map<std::pair<int, int>, std::vector<Slice>> calls, parts;
  std::map<std::pair<int, int>, std::string> names_of_threads;
  std::map<int, std::string> names_of_processes;
  std::map<int, const Json*> begins, ends;
  std::map<std::string, std::size_t> counters;
  std::int64_t earliest = std::numeric_limits<std::int64_t>::max();
  for (const Json& event : events) {
    const std::string phase = event.at("ph");
    if (phase == "M") {
      if (event["name"] == "process_name") CHECK(names_of_processes.emplace(event["pid"], event["args"]["name"]).second);
      if (event["name"] == "thread_name") CHECK(names_of_threads.emplace(std::pair(event["pid"].get<int>(), event["tid"].get<int>()), event["args"]["name"]).second);
      continue;
    }
    const std::int64_t time = nanos(event.at("ts"));
    REQUIRE(time >= 0);
    earliest = std::min(earliest, time);
    if (phase == "X") {
      REQUIRE(nanos(event.at("dur")) >= 0);
      (event["cat"] == "call" ? calls : parts)[{event["pid"], event["tid"]}].push_back({time, time + nanos(event["dur"]), &event});
    } else if (phase == "s") {
      CHECK(begins.emplace(event.at("id"), &event).second);
    } else if (phase == "f") {
      CHECK(event.at("bp") == "e");
      CHECK(ends.emplace(event.at("id"), &event).second);
    } else {
      REQUIRE(phase == "C");
      CHECK(event["args"]["watts"].get<double>() > 0);
      ++counters[names_of_processes.at(event["pid"]) + ": " + event["name"].get<std::string>()];
    }
  }
  CHECK(earliest == 0);
  CHECK(names_of_processes.at(5) == "rank 5 (node-b)");
  CHECK(names_of_processes.at(9) == "host node-b");
  CHECK(counters == std::map<std::string, std::size_t>{{"host node-a: package-0 watts", 10}, {"host node-a: package-0/dram watts", 10}, {"host node-b: package-0 watts", 10}, {"host node-b: package-0/dram watts", 10}});

  std::size_t count = 0, expected_count = 0;
  for (const Account& account : job) expected_count += account.recent.size();
  for (auto& [thread, slices] : calls) {
    CHECK(names_of_threads.contains(thread));
    std::sort(slices.begin(), slices.end(), [](const Slice& a, const Slice& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < slices.size(); ++i) REQUIRE(slices[i - 1].end <= slices[i].begin);
    count += slices.size();
    std::vector<Slice>& inner = parts[thread];
    std::sort(inner.begin(), inner.end(), [](const Slice& a, const Slice& b) { return a.begin < b.begin; });
    auto part = inner.begin();
    for (const Slice& call : slices) {
      std::int64_t at = call.begin;  // parts fill their call without a gap
      for (; part != inner.end() && part->begin < call.end; ++part) {
        REQUIRE(part->begin == at);
        at = part->end;
      }
      REQUIRE(at == call.end);
    }
    CHECK(part == inner.end());
  }
  CHECK(count == expected_count);

  const auto call_at = [&](const Json& event) -> const Json* {
    const std::int64_t time = nanos(event["ts"]);
    for (const Slice& call : calls[{event["pid"], event["tid"]}])
      if (call.begin <= time && time < call.end) return call.event;
    return nullptr;
  };
  CHECK(begins.size() == ends.size());
  CHECK(begins.size() > 100);
  std::size_t from_straggler = 0;
  for (const auto& [id, begin] : begins) {
    REQUIRE(ends.contains(id));
    CHECK(nanos((*begin)["ts"]) <= nanos((*ends[id])["ts"]));
    const Json* const from = call_at(*begin);
    const Json* const to = call_at(*ends[id]);
    REQUIRE((from && to && from != to));
    CHECK((*from)["args"]["operation_number"] == (*to)["args"]["operation_number"]);
    CHECK((*from)["name"] == (*to)["name"]);
    CHECK((*from)["pid"] == (*to)["args"]["last_arrival"]);
    from_straggler += (*from)["pid"] == sample::straggler && names_of_threads.at({(*from)["pid"], (*from)["tid"]}) == "node 1";
  }
  CHECK(from_straggler == 3 * sample::recent_count);
}

TEST_CASE("a trace keeps nanoseconds, aligns clocks, and gives calls that overlap threads of their own") {
  Account a = small();
  a.rank = 0;
  a.power.clear();
  a.recent.resize(1);
  a.recent[0].time.wait_arrival = {};
  a.recent[0].time.protocol = ns(1500);
  a.recent[0].waited_for.clear();
  a.recent[0].begin = ns(4'000'000'000'000'000'999);
  a.recent.push_back(a.recent[0]);
  a.recent[1].begin += ns(1499);
  a.recent[1].operation_number = 8;
  Account b = small();
  b.power.clear();
  b.clock_offset = ns(1'000'000'000'000'000'000);
  b.recent[0].begin = ns(3'000'000'000'000'000'000);  // 999 ns before a's first
  const std::vector<Json> events = trace({a, b});
  std::vector<std::string> found;
  for (const Json& event : events)
    if (event["ph"] != "M") found.push_back(event["ph"].get<std::string>() + " " + event["name"].get<std::string>() + " " + event["pid"].dump() + "/" + event["tid"].dump() + " " + event["ts"].dump());
  CHECK(found == std::vector<std::string>{"X all_reduce 0/1 0.999", "X protocol 0/1 0.999", "X all_reduce 0/2 2.498", "X protocol 0/2 2.498", "X all_reduce 1/1 0.0", "X wait_arrival 1/1 0.0",
                                          "X protocol 1/1 1.0", "s made wait 0/1 0.999", "f made wait 1/1 1.0"});
  CHECK(detail::trace_time(ns(9'007'199'254'740'993)) == "9007199254740.993");
}

TEST_CASE("no accounts, and empty ones, make texts that are complete") {
  CHECK(prometheus({}) == "");
  CHECK(prometheus({}, {.open_metrics = true}) == "# EOF\n");
  CHECK(lines_of(csv({})).size() == 1);
  CHECK(trace({}).empty());
  const std::vector<Account> one(1);
  CHECK(samples_of(prometheus(one), false).size() == 5);  // its name, and the four causes of waits
  CHECK(lines_of(csv(one)).size() == 1);
  CHECK(trace(one).size() == 2);
  const bench::AccountsRead got = read(json_lines(one));
  CHECK(got.warnings.empty());
  REQUIRE(got.accounts.size() == 1);
  CHECK(same(got.accounts[0], one[0]));
}
