// SPDX-License-Identifier: Apache-2.0
// Any bytes as a file of accounts: reading them neither crashes nor throws, what is read can be added up and written in every
// format, and what is written as JSON lines reads back as the same without a complaint about a line.
// libFuzzer: tests/fuzz/run.sh
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include <tally/account/csv.hpp>
#include <tally/account/html.hpp>
#include <tally/account/json_lines.hpp>
#include <tally/account/perfetto.hpp>
#include <tally/account/prometheus.hpp>
#include <tally/account/summary.hpp>

#include "../../bench/read_accounts.hpp"

namespace {

bench::AccountsRead read(const std::string& text) {
  std::istringstream in(text);
  bench::AccountReader reader({.ranks = 16});  // a matrix of 1024 would take the fuzzer's time
  reader.read(in, "input");
  return reader.finish();
}
std::string json_lines(const std::vector<tally::Account>& accounts) {
  std::ostringstream out;
  for (const tally::Account& account : accounts) tally::write_json_lines(out, account);
  return out.str();
}
[[noreturn]] void fail(const char* what, const std::string& text) {
  std::fprintf(stderr, "%s\n%s\n", what, text.c_str());
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const bench::AccountsRead once = read(std::string(reinterpret_cast<const char*>(data), size));
  if (once.accounts.empty()) return 0;
  std::int64_t total = 0;  // of times: an overflow is undefined behaviour, which the sanitizer reports
  for (const tally::Account& account : once.accounts) {
    if (account.rank < 0 || account.rank >= account.size || account.in_job(account.rank) < 0 || account.end < account.begin) fail("an account of no rank or time", "");
    for (const tally::AccountRow& row : account.rows) total += row.time.busy().count() + row.time.idle().count() + row.time.undriven.count();
    for (const tally::DomainAccount& domain : account.domains) {
      int parent = domain.parent;
      for (std::size_t steps = 0; parent >= 0; ++steps) {
        if (steps > account.domains.size()) fail("a domain is a part of itself", domain.key);
        parent = account.domains.at(static_cast<std::size_t>(parent)).parent;
      }
    }
  }
  if (total < 0) fail("times do not add up", std::to_string(total));
  std::ostringstream out;
  tally::write_prometheus(out, once.accounts, {.peers = 2});
  tally::write_prometheus(out, once.accounts, {.open_metrics = true});
  tally::write_csv(out, once.accounts);
  tally::write_perfetto(out, once.accounts);

  std::vector<tally::Account> of_job = once.accounts;
  std::erase_if(of_job, [&](const tally::Account& account) { return account.job != once.accounts[0].job; });
  try {
    const tally::JobAccount job = tally::job_of(of_job);
    if (job.elapsed.count() < 0 || job.followed < 0 || job.followed > 1) fail("sums are out of range", "");
    for (const tally::Straggler& each : job.stragglers)
      if (each.energy.known() && each.energy.value < 0) fail("a negative joule", std::to_string(each.energy.value));
    tally::write_summary(out, job, of_job);
    if (size % 8 == 0) tally::write_html(out, job, of_job);  // which takes longer than all else
  } catch (const tally::Error& error) {
    if (error.errc() != tally::Errc::invalid_argument) fail(error.what(), "");
  }

  const std::string text = json_lines(once.accounts);
  const bench::AccountsRead again = read(text);
  for (const std::string& warning : again.warnings)
    if (warning.find("line skipped") != std::string::npos) fail(warning.c_str(), text);
  if (again.accounts.size() != once.accounts.size()) fail("accounts were lost", text);
  return 0;
}
