// SPDX-License-Identifier: Apache-2.0
// A job's account on a terminal: the verdict, who was late, and the totals. The page of html.hpp, in some twenty lines. What comes
// from elsewhere, a host's name or a warning, is shown as plain ASCII, so that it cannot move the cursor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../figures.hpp"
#include "../text.hpp"
#include "job.hpp"
#include "verdict.hpp"

namespace tally::inline v0 {
namespace detail {

/// One line of plain ASCII, of so many characters at most.
inline std::string plain_text(std::string_view text, std::size_t most) {
  std::string result(text.substr(0, most));
  for (char& c : result)
    if (c < ' ' || c > '~') c = '?';
  return text.size() > most ? result + "..." : result;
}

/// Columns as wide as they must be, flush right.
class TextTable {
 public:
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  void write(std::ostream& out) const {
    std::vector<std::size_t> widths;
    for (const auto& row : rows_)
      for (std::size_t i = 0; i < row.size(); ++i) {
        if (i == widths.size()) widths.push_back(0);
        widths[i] = std::max(widths[i], row[i].size());
      }
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) out << "  " << std::string(widths[i] - row[i].size(), ' ') << row[i];
      out << '\n';
    }
  }

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// The worst ranks.
inline void write_ranking(std::ostream& out, const JobAccount& job, std::span<const Account> accounts) {
  constexpr std::size_t most = 8;
  std::vector<std::string_view> hosts(static_cast<std::size_t>(job.size));
  for (const Account& account : accounts)
    if (account.in_job(account.rank) < job.size) hosts[static_cast<std::size_t>(account.in_job(account.rank))] = account.host;
  TextTable table;
  table.add({"rank", "host", "others waited", "of all", "passed on", "joules they drew"});
  std::size_t late = 0;
  for (const Straggler& each : job.stragglers) {
    if ((each.caused <= nanoseconds{0} && each.passed_on <= nanoseconds{0}) || ++late > most) continue;
    table.add({concat({each.rank}), plain_text(hosts[static_cast<std::size_t>(each.rank)], 24), time_text(each.caused), percent_text(each.share), time_text(each.passed_on), joules_text(each.energy)});
  }
  if (late == 0) return;
  out << "\nWho was late (passed on: charged to it, but it had been kept waiting itself)\n";
  table.write(out);
  if (late > most) out << "  and " << late - most << " more ranks, which were less late\n";
}

inline void write_totals(std::ostream& out, const JobAccount& job, std::span<const Account> accounts) {
  std::uint64_t calls = 0, failed = 0;
  for (const AccountRow& row : job.rows) calls += row.calls, failed += row.failed;
  std::set<std::string_view> hosts, communicators;
  for (const Account& account : accounts) hosts.insert(account.host), communicators.insert(account.communicator);
  const AccountTimes& t = job.time;
  out << "\nTotals" << (job.job.empty() ? "" : " of ") << plain_text(job.job, 60) << ": " << job.size << (job.size == 1 ? " rank" : " ranks");
  if (!accounts.empty()) out << ", " << hosts.size() << (hosts.size() == 1 ? " host, " : " hosts, ") << communicators.size() << (communicators.size() == 1 ? " communicator" : " communicators");
  out << ", " << time_text(job.elapsed) << "\n  calls      " << calls;
  if (failed > 0) out << " and " << failed << " that failed";
  out << "; " << time_text(t.elapsed) << " in them, summed over ranks: " << time_text(t.busy()) << " busy, " << time_text(t.idle()) << " waiting (arrival " << time_text(t.wait_arrival) << ", transfer " << time_text(t.wait_transfer)
      << ", credit " << time_text(t.wait_credit) << ", local " << time_text(t.wait_local) << ")\n";
  const auto source = [](const Quantity& q) { return q.known() ? concat({" (", name_of(q.provenance), ")"}) : std::string(); };
  out << "  energy     " << joules_text(job.energy.gross) << source(job.energy.gross) << "; waiting " << joules_text(job.energy.idle) << ", of which sleeping would have saved " << joules_text(job.energy.idle_avoidable) << '\n';
  if (job.energy.carbon.known()) out << "  carbon     " << grams_text(job.energy.carbon) << " CO2e" << source(job.energy.carbon) << '\n';
  constexpr std::size_t most = 16;
  for (std::size_t i = 0; i < job.domains.size() && i < most; ++i) {
    const DomainAccount& domain = job.domains[i].account;
    out << (i == 0 ? "  meters     " : "             ") << plain_text(concat({job.domains[i].host, " ", domain.key}), 60) << ": ";
    if (domain.provenance == Provenance::none) out << "unknown J";
    else out << joules_text(1e-9 * static_cast<double>(domain.total)) << " (" << name_of(domain.provenance) << "), of which calls " << joules_text(1e-9 * static_cast<double>(domain.operations));
    out << '\n';
  }
  if (job.domains.size() > most) out << "             and " << job.domains.size() - most << " more domains\n";
}

}  // namespace detail

/// The verdict alone: its headline, what it amounts to, and what belongs beside it.
inline void write_verdict(std::ostream& out, const Verdict& verdict) {
  constexpr std::size_t most = 1000;
  out << detail::plain_text(verdict.headline, most) << '\n' << detail::plain_text(verdict.detail, most) << '\n';
  for (const std::string& aside : verdict.asides) out << "- " << detail::plain_text(aside, most) << '\n';
}

/// For people at a terminal. `accounts` are those that job_of() was given, or none: then hosts are not named.
inline void write_summary(std::ostream& out, const JobAccount& job, std::span<const Account> accounts = {}) {
  constexpr std::size_t most = 16;
  write_verdict(out, verdict_of(job, accounts));
  if (job.size > 1) detail::write_ranking(out, job, accounts);
  detail::write_totals(out, job, accounts);
  std::vector<std::string> notes;
  for (std::size_t bit = 0; bit < caveat_count; ++bit)
    if (const auto caveat = static_cast<Caveat>(1u << bit); has(job.caveats, caveat)) notes.emplace_back(meaning_of(caveat));
  notes.insert(notes.end(), job.warnings.begin(), job.warnings.end());
  for (std::size_t i = 0; i < notes.size() && i < most; ++i) out << (i == 0 ? "\nWhat to know\n" : "") << "- " << detail::plain_text(notes[i], 400) << '\n';
  if (notes.size() > most) out << "- and " << notes.size() - most << " more remarks\n";
}

}  // namespace tally::inline v0
