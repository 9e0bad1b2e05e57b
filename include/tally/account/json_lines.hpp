// SPDX-License-Identifier: Apache-2.0
// An account as lines of JSON: first what it is of, then a line for each row, recent call, peer, domain, window of power and
// expected wait. Lines of many ranks may be put together in any order as long as each account's first line comes before its
// others. Times are whole nanoseconds; what is unknown is null. examples/report.schema.json describes each line.
#pragma once

#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "forms.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

/// Of the lines below. Readers refuse others.
inline constexpr std::string_view account_schema = "tally.account/1";

namespace detail {

inline void write_json(std::string& text, const Quantity& q) {
  if (!q.known()) {
    text += "null";
    return;
  }
  JsonObject(text).add("value", q.value).add("sigma", q.sigma).add("lower", q.lower).add("upper", q.upper).add("provenance", name_of(q.provenance)).add("split", name_of(q.split));
}
inline void write_json(std::string& text, const AccountTimes& time) {
  JsonObject object(text);
  for (const TimeField& field : time_fields) object.add(concat({field.name, "_ns"}), time.*field.part);
}
inline void write_json(std::string& text, const AccountEnergy& energy) {
  JsonObject object(text);
  for (const EnergyField& field : energy_fields) write_json(object.key(field.name), energy.*field.part);
}
inline void write_json_rank(JsonObject& object, std::string_view name, Rank r) {
  if (r < 0) object.raw(name, "null");
  else object.add(name, r);
}
inline void write_json(std::string& text, const std::vector<Blame>& blames) {
  write_json_array(text, blames, [](std::string& to, const Blame& blame) {
    JsonObject object(to);
    write_json_rank(object, "rank", blame.rank);
    object.add("arrival_ns", blame.arrival).add("transfer_ns", blame.transfer).add("credit_ns", blame.credit);
  });
}
inline void write_json_caveats(std::string& text, Caveats caveats) {
  std::vector<std::string_view> names;
  for_each_caveat(caveats, [&](Caveat caveat) { names.push_back(name_of(caveat)); });
  write_json_array(text, names, [](std::string& to, std::string_view name) { to += json_text(name); });
}

/// The account's lines one by one: f(object) adds what `kind` has beside what every line says.
template <class F>
void write_json_line(std::ostream& out, const Account& account, std::string_view kind, F&& f) {
  std::string text;
  {
    JsonObject object(text);
    if (kind == "account") object.add("schema", account_schema);
    object.add("kind", kind).add("job", account.job).add("communicator", account.communicator).add("rank", account.rank);
    f(object);
  }
  out << text << '\n';
}

}  // namespace detail

/// Ranks are those of the communicator, `members` says which of the job they are; sums are in joules, what a domain's meter told
/// is in whole nanojoules. A quantity's upper bound is null if it has none. The stream's state tells whether all was written.
inline void write_json_lines(std::ostream& out, const Account& account) {
  using detail::JsonObject;
  detail::write_json_line(out, account, "account", [&](JsonObject& line) {
    line.add("size", account.size).add("host", account.host).add("boot_id", account.boot_id).add("transport", account.transport);
    detail::write_json_array(line.key("members"), account.members, [](std::string& text, Rank r) { text += std::to_string(r); });
    line.add("begin_ns", account.begin).add("end_ns", account.end).add("clock_offset_ns", account.clock_offset);
    line.add("host_coverage", account.host_coverage).add("residual", account.residual);
    detail::write_json(line.key("carbon_intensity"), account.carbon_intensity);
    line.add("carbon_source", account.carbon_source).add("pue", account.pue);
    detail::write_json_caveats(line.key("caveats"), account.caveats);
    detail::write_json_array(line.key("warnings"), account.warnings, [](std::string& text, const std::string& warning) { text += detail::json_text(warning); });
    JsonObject(line.key("lines"))
        .add("row", account.rows.size())
        .add("report", account.recent.size())
        .add("peer", account.by_peer.size())
        .add("domain", account.domains.size())
        .add("power", account.power.size())
        .add("slack", account.slack.size());
  });
  for (const AccountRow& row : account.rows)
    detail::write_json_line(out, account, "row", [&](JsonObject& line) {
      line.add("operation", name_of(row.operation)).add("size_class", row.size_class).add("algorithm", row.algorithm).add("calls", row.calls).add("failed", row.failed);
      line.add("bytes", row.bytes).add("bytes_sent", row.bytes_sent).add("bytes_received", row.bytes_received).add("bytes_wire", row.bytes_wire);
      detail::write_json(line.key("time"), row.time);
      std::size_t used = elapsed_buckets;
      while (used > 0 && row.histogram[used - 1] == 0) --used;
      detail::write_json_array(line.key("histogram"), std::span(row.histogram).first(used), [](std::string& text, std::uint64_t count) { text += std::to_string(count); });
      detail::write_json(line.key("waited_for"), row.waited_for);
      detail::write_json(line.key("energy"), row.energy);
    });
  for (const AccountEvent& event : account.recent)
    detail::write_json_line(out, account, "report", [&](JsonObject& line) {
      line.add("operation_number", event.operation_number).add("sequence", event.sequence).add("operation", name_of(event.operation)).add("algorithm", event.algorithm);
      line.add("bytes", event.bytes).add("begin_ns", event.begin);
      detail::write_json(line.key("time"), event.time);
      detail::write_json_rank(line, "last_arrival", event.last_arrival);
      detail::write_json(line.key("waited_for"), event.waited_for);
      detail::write_json(line.key("energy"), event.energy);
      line.add("energy_final", event.energy_final);
    });
  for (const Blame& peer : account.by_peer)
    detail::write_json_line(out, account, "peer", [&](JsonObject& line) {
      line.add("peer", peer.rank).add("arrival_ns", peer.arrival).add("transfer_ns", peer.transfer).add("credit_ns", peer.credit);
    });
  for (const DomainAccount& domain : account.domains)
    detail::write_json_line(out, account, "domain", [&](JsonObject& line) {
      line.add("host", account.host).add("domain", name_of(domain.kind)).add("key", domain.key).add("source", domain.source);
      const auto parent = static_cast<std::size_t>(domain.parent);
      if (domain.parent >= 0 && parent < account.domains.size()) line.add("parent", account.domains[parent].key);
      else line.raw("parent", "null");
      const auto joules = [&](std::string_view name, Nanojoules value) { domain.provenance == Provenance::none ? line.raw(name, "null") : line.add(name, value); };
      joules("total_nj", domain.total);
      joules("operations_nj", domain.operations);
      joules("application_nj", domain.application);
      joules("unattributed_nj", domain.unattributed);
      if (domain.watts_floor > 0) line.add("watts_floor", domain.watts_floor);
      else line.raw("watts_floor", "null");
      line.add("provenance", name_of(domain.provenance));
      detail::write_json_caveats(line.key("caveats"), domain.caveats);
    });
  for (const PowerSample& sample : account.power)
    detail::write_json_line(out, account, "power", [&](JsonObject& line) {
      line.add("host", account.host).add("key", sample.domain < account.domains.size() ? account.domains[sample.domain].key : "");
      line.add("begin_ns", sample.begin).add("end_ns", sample.end).add("watts", sample.watts);
    });
  for (const SlackRow& slack : account.slack)
    detail::write_json_line(out, account, "slack", [&](JsonObject& line) {
      line.add("operation", name_of(slack.operation)).add("peer", slack.peer).add("calls", slack.calls);
      line.add("expected_ns", slack.expected).add("tenth_percentile_ns", slack.tenth_percentile);
    });
}

}  // namespace tally::inline v0
