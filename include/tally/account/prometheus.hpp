// SPDX-License-Identifier: Apache-2.0
// Accounts for Prometheus, in its own text format (0.0.4) or OpenMetrics 1.0. How many series there are does not grow with time:
// algorithms are added up and sizes put into 7 buckets, so one communicator of one rank has at most 40 series for each operation
// and bucket that it used. What is unknown has no sample. For node_exporter's textfile collector, from time to time:
//   std::ostringstream text; write_prometheus(text, accounts); write_file_atomically("/var/lib/node_exporter/tally.prom", text.str());
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "forms.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

struct PrometheusOptions {
  bool open_metrics = false;  // OpenMetrics 1.0 instead of 0.0.4
  std::size_t peers = 0;      // of the peers waited for, so many of each rank and communicator, the worst ones
};

namespace detail {

/// Families of metrics and their samples. A family without samples is not mentioned.
class Exposition {
 public:
  Exposition(std::ostream& out, bool open_metrics) : out_(out), open_metrics_(open_metrics) {}

  /// `name` is without "_total" and "_info"; `unit`, if any, is how it ends. Applies to the samples that follow.
  void family(std::string_view name, std::string_view type, std::string_view unit, std::string_view help) {
    name_ = name;
    type_ = type;
    unit_ = unit;
    help_ = help;
    named_ = false;
  }
  void sample(std::string_view labels, std::string_view value, std::string_view suffix = {}) {
    if (!std::exchange(named_, true)) name();
    if (suffix.empty()) suffix = type_ == "counter" ? "_total" : type_ == "info" ? "_info" : "";
    out_ << name_ << suffix << '{' << labels << "} " << value << '\n';
  }
  void sample(std::string_view labels, double value) { sample(labels, number_text(value)); }
  void sample(std::string_view labels, std::uint64_t value) { sample(labels, std::to_string(value)); }
  void end() {
    if (open_metrics_) out_ << "# EOF\n";
  }

 private:
  void name() {
    const std::string_view suffix = open_metrics_ ? "" : type_ == "counter" ? "_total" : type_ == "info" ? "_info" : "";
    out_ << "# HELP " << name_ << suffix << ' ' << help_ << '\n';
    out_ << "# TYPE " << name_ << suffix << ' ' << (type_ == "info" && !open_metrics_ ? "gauge" : type_) << '\n';
    if (open_metrics_ && !unit_.empty()) out_ << "# UNIT " << name_ << ' ' << unit_ << '\n';
  }
  std::ostream& out_;
  bool open_metrics_, named_ = false;
  std::string_view name_, type_, unit_, help_;
};

/// label="value", after others if there are any.
inline std::string label(std::string_view name, std::string_view value, std::string_view others = {}) {
  return concat({others, others.empty() ? "" : ",", name, "=\"", label_text(value), "\""});
}

/// The buckets of sizes: up to so many bytes, and above the one before.
inline constexpr std::uint8_t size_bucket_classes[] = {8, 12, 16, 20, 24, 28};
inline std::size_t size_bucket(std::uint8_t size_class) {
  return static_cast<std::size_t>(std::lower_bound(std::begin(size_bucket_classes), std::end(size_bucket_classes), size_class) - std::begin(size_bucket_classes));
}
inline std::string size_bucket_text(std::size_t bucket) {
  return bucket < std::size(size_bucket_classes) ? std::to_string(std::uint64_t{1} << size_bucket_classes[bucket]) : "+Inf";
}

/// An account's rows of one operation and bucket of sizes.
struct BucketSum {
  std::string labels;
  std::uint64_t calls = 0, failed = 0, bytes = 0, bytes_sent = 0, bytes_received = 0, bytes_wire = 0;
  AccountTimes time;
  ElapsedHistogram histogram{};
  AccountEnergy energy;
};
inline std::vector<BucketSum> bucket_sums(const Account& account, std::string_view labels) {
  std::map<std::pair<Collective, std::size_t>, BucketSum> sums;
  for (const AccountRow& row : account.rows) {
    const auto [entry, added] = sums.try_emplace({row.operation, size_bucket(row.size_class)});
    BucketSum& sum = entry->second;
    if (added) sum.labels = label("size_bucket", size_bucket_text(entry->first.second), label("op", name_of(row.operation), labels));
    sum.calls += row.calls;
    sum.failed += row.failed;
    sum.bytes += row.bytes;
    sum.bytes_sent += row.bytes_sent;
    sum.bytes_received += row.bytes_received;
    sum.bytes_wire += row.bytes_wire;
    for (const TimeField& field : time_fields) sum.time.*field.part += row.time.*field.part;
    for (std::size_t i = 0; i < elapsed_buckets; ++i) sum.histogram[i] += row.histogram[i];
    for (const EnergyField& field : energy_fields) sum.energy.*field.part = added ? row.energy.*field.part : sum.energy.*field.part + row.energy.*field.part;
  }
  std::vector<BucketSum> all;
  for (auto& [key, sum] : sums) all.push_back(std::move(sum));
  return all;
}

/// An account as labels, and its sums.
struct Exposed {
  const Account* account;
  std::string labels;
  std::vector<BucketSum> sums;
};
inline std::vector<Exposed> exposed_accounts(std::span<const Account> accounts) {
  std::vector<Exposed> all;
  std::set<std::tuple<std::string_view, std::string_view, Rank>> seen;
  for (const Account& account : accounts) {
    const Rank rank = job_rank(account, account.rank);
    if (!seen.emplace(account.job, account.communicator, rank).second)
      throw Error(Errc::invalid_argument, {"two accounts are of rank ", rank, ", communicator '", account.communicator, "', job '", account.job, "': give communicators of a job different names"});
    const std::string labels = label("rank", std::to_string(rank), label("comm", account.communicator, label("job", account.job)));
    all.push_back({&account, labels, bucket_sums(account, labels)});
  }
  return all;
}

inline void expose_calls(Exposition& out, const std::vector<Exposed>& all) {
  const auto counter = [&](std::string_view name, std::string_view unit, std::string_view help, std::uint64_t BucketSum::*count) {
    out.family(name, "counter", unit, help);
    for (const Exposed& each : all)
      for (const BucketSum& sum : each.sums) out.sample(sum.labels, sum.*count);
  };
  counter("tally_collective_ops", "", "Calls of collective operations and messages.", &BucketSum::calls);
  counter("tally_collective_failures", "", "Calls that failed.", &BucketSum::failed);
  counter("tally_collective_bytes", "bytes", "Bytes of the caller's data that were communicated.", &BucketSum::bytes);
  counter("tally_collective_sent_bytes", "bytes", "Payload that was sent.", &BucketSum::bytes_sent);
  counter("tally_collective_received_bytes", "bytes", "Payload that was received.", &BucketSum::bytes_received);
  counter("tally_collective_wire_bytes", "bytes", "Bytes that were moved for the payload sent, with headers and padding.", &BucketSum::bytes_wire);

  out.family("tally_collective_seconds", "counter", "seconds", "Time in collective operations by what it went to; the phases add up to the whole.");
  for (const Exposed& each : all)
    for (const BucketSum& sum : each.sums)
      for (const TimeField& phase : state_fields) out.sample(label("phase", phase.name, sum.labels), in_seconds(sum.time.*phase.part));

  // Bucket i of an account holds up to 2^i - 1 nanoseconds; of them every second from 1 us to 69 s is shown.
  out.family("tally_collective_duration_seconds", "histogram", "seconds", "Calls of collective operations by how long they took.");
  for (const Exposed& each : all)
    for (const BucketSum& sum : each.sums) {
      std::uint64_t count = 0;
      for (const std::uint64_t n : sum.histogram) count += n;
      if (count == 0) continue;
      std::uint64_t below = 0;
      std::size_t next = 0;
      for (std::size_t i = 10; i <= 36; i += 2) {
        while (next <= i) below += sum.histogram[next++];
        out.sample(label("le", number_text(static_cast<double>((std::uint64_t{1} << i) - 1) / 1e9), sum.labels), std::to_string(below), "_bucket");
      }
      out.sample(label("le", "+Inf", sum.labels), std::to_string(count), "_bucket");
      out.sample(sum.labels, number_text(in_seconds(sum.time.elapsed)), "_sum");
      out.sample(sum.labels, std::to_string(count), "_count");
    }
}

inline void expose_energy(Exposition& out, const std::vector<Exposed>& all) {
  const auto each_known = [&](Quantity AccountEnergy::*part, auto&& f) {
    for (const Exposed& each : all)
      for (const BucketSum& sum : each.sums)
        if (const Quantity& q = sum.energy.*part; q.known() && std::isfinite(q.value)) f(sum.labels, q);
  };
  const auto counter = [&](std::string_view name, std::string_view unit, std::string_view help, Quantity AccountEnergy::*part) {
    out.family(name, "counter", unit, help);
    each_known(part, [&](const std::string& labels, const Quantity& q) { out.sample(label("provenance", name_of(q.provenance), labels), q.value); });
  };
  counter("tally_collective_energy_joules", "joules", "Energy of collective operations, with their share of what the machine draws anyway.", &AccountEnergy::gross);
  counter("tally_collective_net_energy_joules", "joules", "Of tally_collective_energy_joules, what is above the machine's floor.", &AccountEnergy::net);
  counter("tally_collective_idle_energy_joules", "joules", "Of tally_collective_energy_joules, what was drawn while waiting.", &AccountEnergy::idle);
  counter("tally_collective_avoidable_idle_energy_joules", "joules", "Of tally_collective_idle_energy_joules, what sleeping would have saved.", &AccountEnergy::idle_avoidable);
  out.family("tally_collective_domain_energy_joules", "counter", "joules", "Of tally_collective_energy_joules, where it was drawn.");
  const std::pair<std::string_view, Quantity AccountEnergy::*> parts[] = {{"cpu", &AccountEnergy::cpu}, {"dram", &AccountEnergy::dram}, {"gpu", &AccountEnergy::gpu}};
  for (const auto& part : parts)
    each_known(part.second, [&](const std::string& labels, const Quantity& q) { out.sample(label("provenance", name_of(q.provenance), label("domain", part.first, labels)), q.value); });
  counter("tally_carbon_grams", "grams", "Carbon dioxide equivalent of tally_collective_energy_joules.", &AccountEnergy::carbon);
}

inline void expose_waits(Exposition& out, const std::vector<Exposed>& all, std::size_t peers) {
  out.family("tally_wait_seconds", "counter", "seconds", "Waits by cause: a rank came late, data was on its way, a receiver had no room, something of the rank itself was not ready.");
  const std::pair<std::string_view, nanoseconds AccountTimes::*> causes[] = {
      {"arrival", &AccountTimes::wait_arrival}, {"transfer", &AccountTimes::wait_transfer}, {"credit", &AccountTimes::wait_credit}, {"local", &AccountTimes::wait_local}};
  for (const Exposed& each : all)
    for (const auto& cause : causes) {
      nanoseconds time{};
      for (const BucketSum& sum : each.sums) time += sum.time.*cause.second;
      out.sample(label("cause", cause.first, each.labels), in_seconds(time));
    }

  out.family("tally_wait_on_peer_seconds", "counter", "seconds", "Waits for the peers that were waited for longest; the peer is a rank in the job.");
  for (const Exposed& each : all) {
    std::vector<Blame> worst = each.account->by_peer;
    std::erase_if(worst, [](const Blame& b) { return b.rank < 0 || b.total() <= nanoseconds{0}; });
    std::stable_sort(worst.begin(), worst.end(), [](const Blame& a, const Blame& b) { return a.total() > b.total(); });
    worst.resize(std::min(worst.size(), peers));
    for (const Blame& b : worst) out.sample(label("peer", std::to_string(job_rank(*each.account, b.rank)), each.labels), in_seconds(b.total()));
  }

  out.family("tally_slack_expected_seconds", "gauge", "seconds", "How long the next call is expected to wait for the peer that is latest to it; where five calls or more have waited for it.");
  for (const Exposed& each : all) {
    std::map<Collective, nanoseconds> longest;
    for (const SlackRow& slack : each.account->slack)
      if (slack.calls >= SlackRow::fewest_calls) longest[slack.operation] = std::max(longest[slack.operation], slack.expected);
    for (const auto& [operation, time] : longest) out.sample(label("op", name_of(operation), each.labels), in_seconds(time));
  }
}

inline void expose_hosts(Exposition& out, std::span<const Account> accounts) {
  const auto domains = domains_of_hosts(accounts);
  const auto labels_of = [](const TellsOfDomain& tells) {
    const DomainAccount& domain = tells.account->domains[tells.domain];
    return label("source", domain.source, label("key", domain.key, label("domain", name_of(domain.kind), label("host", tells.account->host))));
  };
  out.family("tally_domain_energy_joules", "counter", "joules", "Energy of a part of a host, and to what it went. A domain with a parent is part of it: add up those without.");
  for (const auto& [key, tells] : domains) {
    const DomainAccount& domain = tells.account->domains[tells.domain];
    if (domain.provenance == Provenance::none) continue;
    const auto parent = static_cast<std::size_t>(domain.parent);
    const bool is_part = domain.parent >= 0 && parent < tells.account->domains.size();
    const std::string labels = label("parent", is_part ? tells.account->domains[parent].key : "", label("provenance", name_of(domain.provenance), labels_of(tells)));
    out.sample(label("share", "operations", labels), in_joules(domain.operations));
    out.sample(label("share", "application", labels), in_joules(domain.application));
    out.sample(label("share", "unattributed", labels), in_joules(domain.unattributed));
  }
  out.family("tally_domain_watts", "gauge", "watts", "Average power of a part of a host in the latest window.");
  for (const auto& [key, tells] : domains) {
    const PowerSample* latest = nullptr;
    for (const PowerSample& sample : tells.account->power)
      if (sample.domain == tells.domain && std::isfinite(sample.watts) && (!latest || sample.end >= latest->end)) latest = &sample;
    if (latest) out.sample(labels_of(tells), latest->watts);
  }
  out.family("tally_meter_up", "gauge", "", "Whether the meter of a part of a host can be read.");
  for (const auto& [key, tells] : domains) out.sample(labels_of(tells), std::uint64_t{tells.account->domains[tells.domain].provenance != Provenance::none});

  const auto by_host = [&](std::string_view name, std::string_view help, double Account::*value) {
    out.family(name, "gauge", "ratio", help);
    std::map<std::string_view, double> known;
    for (const Account& account : accounts)
      if (std::isfinite(account.*value)) known.try_emplace(account.host, account.*value);
    for (const auto& [host, ratio] : known) out.sample(label("host", host), ratio);
  };
  by_host("tally_host_coverage_ratio", "Processor time of the processes that are accounted for, of that of their host.", &Account::host_coverage);
  by_host("tally_meter_residual_ratio", "1 - predicted/measured energy of the last window: what the model of the host's power does not explain.", &Account::residual);
}

inline void expose_accounts(Exposition& out, const std::vector<Exposed>& all) {
  out.family("tally_account", "info", "", "Where a rank of a communicator runs.");
  for (const Exposed& each : all) out.sample(label("transport", each.account->transport, label("host", each.account->host, each.labels)), std::uint64_t{1});
  out.family("tally_account_caveat", "gauge", "", "1 for each thing that makes the account's energy worth less than it looks.");
  for (const Exposed& each : all)
    for_each_caveat(each.account->caveats, [&](Caveat caveat) { out.sample(label("caveat", name_of(caveat), each.labels), std::uint64_t{1}); });
}

}  // namespace detail

/// `rank` and `peer` are ranks in the job, `size_bucket` the most bytes of the caller's data, `provenance` that of the sum: where
/// a part is unknown the sum is, and has no sample. Base units: seconds, joules, grams, bytes. Throws Errc::invalid_argument if
/// two accounts are of the same rank, communicator and job. The stream's state tells whether all was written.
inline void write_prometheus(std::ostream& stream, std::span<const Account> accounts, PrometheusOptions options = {}) {
  const std::vector<detail::Exposed> all = detail::exposed_accounts(accounts);
  detail::Exposition out(stream, options.open_metrics);
  detail::expose_calls(out, all);
  detail::expose_energy(out, all);
  detail::expose_waits(out, all, options.peers);
  detail::expose_hosts(out, accounts);
  detail::expose_accounts(out, all);
  out.end();
}

}  // namespace tally::inline v0
