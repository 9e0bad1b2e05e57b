// SPDX-License-Identifier: Apache-2.0
// Accounts as a table for spreadsheets and data frames, RFC 4180: one line per row of each account, i.e. per operation, size
// class and algorithm on one rank. An empty field is unknown. Bounds, histograms and blame by rank are in JSON lines only.
#pragma once

#include <algorithm>
#include <ostream>
#include <span>
#include <string>

#include "forms.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

/// Times are in ns, energies in joules with their standard error and provenance, carbon in grams of CO2-equivalent;
/// `job_rank` is the rank in the job, `rank` and `waited_for` (the rank waited for longest) are of the communicator, and
/// `size_class` c holds sizes up to 2^c bytes and above 2^(c-1). The stream's state tells whether all was written.
inline void write_csv(std::ostream& out, std::span<const Account> accounts) {
  std::string line = "job,communicator,job_rank,rank,size,host,transport,operation,size_class,algorithm,calls,failed,bytes,bytes_sent,bytes_received,bytes_wire";
  for (const detail::TimeField& field : detail::time_fields) line += detail::concat({",", field.name, "_ns"});
  line += ",waited_for,waited_for_ns";
  for (const detail::EnergyField& field : detail::energy_fields) line += detail::concat({",", field.name, ",", field.name, "_sigma,", field.name, "_provenance"});
  out << line << "\r\n";
  for (const Account& account : accounts)
    for (const AccountRow& row : account.rows) {
      line = detail::concat({detail::csv_text(account.job), ",", detail::csv_text(account.communicator), ",", detail::job_rank(account, account.rank), ",", account.rank, ",", account.size, ",",
                             detail::csv_text(account.host), ",", detail::csv_text(account.transport), ",", name_of(row.operation), ",", row.size_class, ",", detail::csv_text(row.algorithm), ",",
                             row.calls, ",", row.failed, ",", row.bytes, ",", row.bytes_sent, ",", row.bytes_received, ",", row.bytes_wire});
      for (const detail::TimeField& field : detail::time_fields) line += detail::concat({",", (row.time.*field.part).count()});
      const auto most = std::max_element(row.waited_for.begin(), row.waited_for.end(), [](const Blame& a, const Blame& b) { return a.total() < b.total(); });
      if (most == row.waited_for.end() || most->total() == nanoseconds{0}) line += ",,0";
      else line += detail::concat({",", most->rank, ",", most->total().count()});
      for (const detail::EnergyField& field : detail::energy_fields) {
        const Quantity& q = row.energy.*field.part;
        if (q.known()) line += detail::concat({",", detail::number_text(q.value), ",", detail::number_text(q.sigma), ",", name_of(q.provenance)});
        else line += ",,,unknown";
      }
      out << line << "\r\n";
    }
}

}  // namespace tally::inline v0
