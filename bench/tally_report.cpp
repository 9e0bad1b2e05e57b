// SPDX-License-Identifier: Apache-2.0
// Which rank slows the job, and what does it cost? Reads what tally::write_json_lines() wrote on all ranks, and writes a page, a
// summary for the terminal, or what other tools read. Exit status: 0, 1 if there was nothing to report or it could not be written,
// 2 for bad arguments.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <tally/account/csv.hpp>
#include <tally/account/html.hpp>
#include <tally/account/job.hpp>
#include <tally/account/json_lines.hpp>
#include <tally/account/perfetto.hpp>
#include <tally/account/prometheus.hpp>
#include <tally/account/summary.hpp>
#include <tally/file.hpp>
#include <vector>

#include "arguments.hpp"
#include "measure.hpp"
#include "read_accounts.hpp"

namespace {

struct Settings {
  std::vector<std::string> files;
  std::string format = "html", output, job, title;
  bench::AccountLimits limits;
};

constexpr const char* examples = R"(
Examples:
  tally_report accounts-rank*.jsonl                     the page, to report.html
  tally_report --format text accounts-rank*.jsonl       the answer, to the terminal
  ssh node cat /tmp/accounts.jsonl | tally_report - -o node.html
  tally_report --format perfetto -o trace.json *.jsonl  for ui.perfetto.dev
  tally_report --format json *.jsonl | jq .verdict

Exit status: 0; 1 if there was no account or the report could not be written; 2 for bad arguments. Lines that are broken are
left out, and named on stderr.)";

/// A file that says from time to time how far it has been read.
class ShownFile : public std::filebuf {
 public:
  ShownFile(const bench::Progress& progress, const std::string& path, const std::string& what) : progress_(progress), what_(what) {
    std::error_code error;
    if (std::filesystem::is_regular_file(path, error)) size_ = std::filesystem::file_size(path, error);
    open(path, std::ios::in | std::ios::binary);
  }

 protected:
  int_type underflow() override {
    const int_type next = std::filebuf::underflow();
    done_ += static_cast<std::uintmax_t>(egptr() - gptr());
    if (++blocks_ % 64 == 1) progress_.show(tally::detail::concat({what_, ": ", done_ >> 20u, " MiB", size_ > 0 ? tally::detail::concat({", ", std::min<std::uintmax_t>(100, done_ * 100 / size_), " %"}) : ""}));
    return next;
  }

 private:
  const bench::Progress& progress_;
  const std::string what_;
  std::uintmax_t size_ = 0, done_ = 0, blocks_ = 0;
};

bench::AccountsRead read_all(const Settings& s) {
  bench::AccountReader reader(s.limits);
  const bench::Progress progress(true);
  for (std::size_t i = 0; i < s.files.size(); ++i) {
    ShownFile buffer(progress, s.files[i], tally::detail::concat({"file ", i + 1, " of ", s.files.size()}));
    std::istream in(&buffer);
    if (s.files[i] != "-" && buffer.is_open()) reader.read(in, s.files[i]);
    else reader.read_file(s.files[i]);
  }
  progress.clear();
  return reader.finish();
}

/// The job's sums as one object. Times are in ns; joules are as in the accounts' own lines.
std::string json_of(const tally::JobAccount& job, std::span<const tally::Account> accounts) {
  namespace d = tally::detail;
  using d::JsonObject;
  const auto texts = [](std::string& to, const std::vector<std::string>& all) { d::write_json_array(to, all, [](std::string& text, const std::string& each) { text += d::json_text(each); }); };
  const tally::Verdict verdict = tally::verdict_of(job, accounts);
  std::string text;
  {
    JsonObject all(text);
    all.add("schema", "tally.job/1").add("job", job.job).add("ranks", job.size).add("elapsed_ns", job.elapsed).add("followed", job.followed);
    {
      JsonObject object(all.key("verdict"));
      object.add("finding", name_of(verdict.finding)).add("headline", verdict.headline).add("detail", verdict.detail);
      texts(object.key("asides"), verdict.asides);
      d::write_json_array(object.key("ranks"), verdict.ranks, [](std::string& to, tally::Rank r) { to += std::to_string(r); });
    }
    d::write_json_array(all.key("stragglers"), job.stragglers, [](std::string& to, const tally::Straggler& each) {
      JsonObject object(to);
      object.add("rank", each.rank).add("caused_ns", each.caused).add("passed_on_ns", each.passed_on).add("share", each.share);
      d::write_json(object.key("joules"), each.energy);
      d::write_json(object.key("carbon_grams"), each.carbon);
    });
    d::write_json(all.key("time"), job.time);
    d::write_json(all.key("energy"), job.energy);
    d::write_json_array(all.key("rows"), job.rows, [](std::string& to, const tally::AccountRow& row) {
      JsonObject object(to);
      object.add("operation", name_of(row.operation)).add("size_class", row.size_class).add("algorithm", row.algorithm).add("calls", row.calls).add("failed", row.failed);
      object.add("bytes", row.bytes).add("bytes_sent", row.bytes_sent).add("bytes_received", row.bytes_received).add("bytes_wire", row.bytes_wire);
      d::write_json(object.key("time"), row.time);
      d::write_json(object.key("energy"), row.energy);
    });
    std::vector<std::size_t> waits;  // those that are any
    for (std::size_t i = 0; i < job.waits.size(); ++i)
      if (job.waits[i].total() > tally::nanoseconds{0} || job.resolved[i].total() > tally::nanoseconds{0}) waits.push_back(i);
    d::write_json_array(all.key("waits"), waits, [&](std::string& to, std::size_t i) {
      const auto n = static_cast<std::size_t>(job.size);
      JsonObject object(to);
      object.add("waiting", i / n).add("culprit", i % n);
      object.add("arrival_ns", job.waits[i].arrival).add("transfer_ns", job.waits[i].transfer).add("credit_ns", job.waits[i].credit).add("resolved_arrival_ns", job.resolved[i].arrival);
      d::write_json(object.key("joules"), job.waits[i].energy);
      d::write_json(object.key("resolved_joules"), job.resolved[i].energy);
    });
    d::write_json_array(all.key("domains"), job.domains, [&](std::string& to, const tally::HostDomain& each) {
      const tally::DomainAccount& domain = each.account;
      JsonObject object(to);
      object.add("host", each.host).add("domain", name_of(domain.kind)).add("key", domain.key).add("source", domain.source);
      if (domain.parent < 0) object.raw("parent", "null");
      else object.add("parent", job.domains[static_cast<std::size_t>(domain.parent)].account.key);
      const auto joules = [&](std::string_view name, tally::Nanojoules value) { domain.provenance == tally::Provenance::none ? object.raw(name, "null") : object.add(name, value); };
      joules("total_nj", domain.total);
      joules("operations_nj", domain.operations);
      joules("application_nj", domain.application);
      joules("unattributed_nj", domain.unattributed);
      object.add("provenance", name_of(domain.provenance));
      d::write_json_caveats(object.key("caveats"), domain.caveats);
    });
    d::write_json_caveats(all.key("caveats"), job.caveats);
    texts(all.key("warnings"), job.warnings);
  }
  return text + '\n';
}

/// One job's report.
std::string report_of(const Settings& s, std::span<const tally::Account> accounts) {
  std::ostringstream out;
  if (s.format == "prometheus" || s.format == "openmetrics") tally::write_prometheus(out, accounts, {.open_metrics = s.format == "openmetrics", .peers = 4});
  else if (s.format == "csv") tally::write_csv(out, accounts);
  else if (s.format == "perfetto") tally::write_perfetto(out, accounts);
  else if (s.format == "json") return json_of(tally::job_of(accounts), accounts);
  else if (s.format == "text") tally::write_summary(out, tally::job_of(accounts), accounts);
  else tally::write_html(out, tally::job_of(accounts), accounts, {.title = s.title});
  return std::move(out).str();
}

/// The accounts of the job that was asked for, or of the only one.
std::vector<tally::Account> accounts_of_one_job(const Settings& s, std::vector<tally::Account> all) {
  std::set<std::string> jobs;
  for (const tally::Account& account : all) jobs.insert(account.job);
  const std::string job = !s.job.empty() || jobs.size() != 1 ? s.job : *jobs.begin();
  if (!jobs.contains(job) || (jobs.size() > 1 && s.job.empty())) {
    std::string names;
    std::size_t named = 0;
    for (const std::string& each : jobs)
      if (++named <= 8) names += (named > 1 ? ", " : "") + bench::detail::shown(each);
    throw tally::Error(tally::Errc::invalid_argument, {s.job.empty() ? "the files hold accounts of several jobs: name one with --job" : "the files hold no account of that job, but", " (", names, named > 8 ? ", ..." : "", ")"});
  }
  std::erase_if(all, [&](const tally::Account& account) { return account.job != job; });
  return all;
}

void write(const Settings& s, const std::string& text) {
  if (s.output != "-") {
    tally::write_file_atomically(s.output, text);
    std::cerr << "tally_report: written to " << s.output << '\n';
  } else if (!(std::cout << text << std::flush)) {
    throw tally::Error(tally::Errc::no_resources, "cannot write to standard output");
  }
}

int run(const Settings& s) {
  const bench::AccountsRead read = read_all(s);
  for (const std::string& warning : read.warnings) std::cerr << "tally_report: " << warning << '\n';
  if (read.accounts.empty()) {
    std::cerr << "tally_report: there is nothing to report: " << (s.files.size() == 1 ? std::string("the file holds no") : "none of the " + std::to_string(s.files.size()) + " files holds an") << " account. A rank writes its own with tally::write_json_lines(out, comm.account()) of tally/account/json_lines.hpp.\n";
    return 1;
  }
  const std::vector<tally::Account> accounts = accounts_of_one_job(s, read.accounts);
  write(s, report_of(s, accounts));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  CLI::App app{"Tells which rank slows a job and what that costs, from the accounts that its ranks wrote as JSON lines."};
  Settings s;
  app.footer(examples);
  app.add_option("files", s.files, "JSON lines of any number of ranks and communicators; '-': standard input")->required()->option_text("FILE...");
  app.add_option("-f,--format", s.format, "html: a page; text: for the terminal; json: the job's sums; perfetto: a trace; csv, prometheus, openmetrics: of each rank")
      ->capture_default_str()
      ->check(CLI::IsMember({"html", "text", "json", "perfetto", "csv", "prometheus", "openmetrics"}));
  app.add_option("-o,--output", s.output, "where to; '-': standard output. Without it, the page goes to report.html and anything else to standard output")->option_text("FILE");
  app.add_option("--job", s.job, "the job to report, if the files hold several")->option_text("NAME");
  app.add_option("--title", s.title, "of the page");
  app.add_option("--max-ranks", s.limits.ranks, "refuse jobs of more; memory grows with the square of it, 130 MB for 1024")->capture_default_str()->check(CLI::Range(1, 16384));
  if (const auto status = bench::parse("tally_report", app, argc, argv)) return *status;
  if (s.output.empty()) s.output = s.format == "html" ? "report.html" : "-";
  std::error_code error;
  for (const std::string& file : s.files)
    if (std::filesystem::equivalent(file, s.output, error)) {
      std::cerr << "tally_report: --output " << s.output << " is one of the files to read\n";
      return 2;
    }
  try {
    return run(s);
  } catch (const std::exception& failure) {
    std::cerr << "tally_report: " << failure.what() << '\n';
    return 1;
  }
}
