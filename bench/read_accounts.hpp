// SPDX-License-Identifier: Apache-2.0
// Reads what tally::write_json_lines() wrote, of many ranks and files. Nothing in a file is believed: a line that is not as it
// should be is skipped with a warning that names file, line and fault. What is returned can be added up and indexed without
// checks: ranks exist, parts add up to their whole, and the sum of all times does not overflow.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <iostream>
#include <istream>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <stdexcept>
#include <streambuf>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <tally/account/forms.hpp>
#include <tally/account/json_lines.hpp>
#include <tally/account/snapshot.hpp>

namespace bench {

/// What a file may make the reader and whoever uses its accounts do.
struct AccountLimits {
  int ranks = 1024;  // of a job: tables of who waited for whom have that squared
  std::size_t domains = 4096;  // of a host
  std::size_t line_bytes = 4u << 20u;
  std::size_t warnings = 100;  // more are only counted
};

struct AccountsRead {
  std::vector<tally::Account> accounts;
  std::vector<std::string> warnings;  // whole sentences, for people
};

namespace detail {

using Json = nlohmann::json;

/// What is wrong with a line.
struct BadLine : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void refuse(std::initializer_list<tally::detail::Piece> why) { throw BadLine(tally::detail::concat(why)); }

/// A text of a file in a warning: not too long, and on one line.
inline std::string shown(std::string_view text) { return tally::detail::json_text(text.size() > 60 ? text.substr(0, 60) : text); }

inline constexpr std::int64_t most_ns = std::int64_t{1} << 62;  // 146 years, of all times of a kind together
inline constexpr std::uint64_t most_count = std::uint64_t{1} << 62;
inline constexpr double most_joules = 1e18;

/// The value of the enumeration E, of `count` values from 0 on, that has this name.
template <class E>
E named(std::string_view name, std::string_view field, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    if (name_of(static_cast<E>(i)) == name) return static_cast<E>(i);
  refuse({"'", field, "' is ", shown(name), ", which this version does not know"});
}

/// The fields of an object, each of which must be asked for once, and no others.
class Fields {
 public:
  Fields(const Json& object, std::string_view what) : object_(object) {
    if (!object.is_object()) refuse({"'", what, "' is not an object"});
  }
  const Json& at(std::string_view name) {
    const auto it = object_.find(name);
    if (it == object_.end()) refuse({"'", name, "' is missing"});
    ++asked_;
    return *it;
  }
  bool is_null(std::string_view name) const {
    const auto it = object_.find(name);
    return it != object_.end() && it->is_null();
  }
  void done() const {
    if (asked_ != object_.size()) refuse({"it has ", object_.size(), " fields of which only ", asked_, " are known"});
  }

  std::string text(std::string_view name) {
    const Json& value = at(name);
    if (!value.is_string()) refuse({"'", name, "' is not a text"});
    return value.get<std::string>();
  }
  bool truth(std::string_view name) {
    const Json& value = at(name);
    if (!value.is_boolean()) refuse({"'", name, "' is neither true nor false"});
    return value.get<bool>();
  }
  std::int64_t integer(std::string_view name, std::int64_t least, std::int64_t most) { return integer(at(name), name, least, most); }
  static std::int64_t integer(const Json& value, std::string_view name, std::int64_t least, std::int64_t most) {
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) : value.is_number_integer();
    if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) refuse({"'", name, "' is not a whole number from ", least, " to ", most});
    return value.get<std::int64_t>();
  }
  std::uint64_t natural(std::string_view name) { return static_cast<std::uint64_t>(integer(name, 0, static_cast<std::int64_t>(most_count))); }
  tally::nanoseconds duration(std::string_view name) { return tally::nanoseconds(integer(name, 0, most_ns)); }
  /// Within 36 years of the epoch: so much is a clock's offset, too, and what job_of() makes of a few of them is far from overflowing.
  tally::nanoseconds instant(std::string_view name) { return tally::nanoseconds(integer(name, -(most_ns / 4), most_ns / 4)); }
  double number(std::string_view name, double least, double most) {
    const Json& value = at(name);
    const double number = value.is_number() ? value.get<double>() : std::numeric_limits<double>::quiet_NaN();
    if (!(number >= least && number <= most)) refuse({"'", name, "' is not a number from ", tally::detail::number_text(least), " to ", tally::detail::number_text(most)});
    return number;
  }
  double number_or(double unknown, std::string_view name, double least, double most) {
    if (!is_null(name)) return number(name, least, most);
    at(name);
    return unknown;
  }
  /// A rank of a communicator of `size`; `nobody`: null is allowed and -1.
  tally::Rank rank(std::string_view name, int size, bool nobody = false) {
    if (nobody && is_null(name)) return at(name), -1;
    const std::int64_t r = integer(name, 0, std::numeric_limits<tally::Rank>::max());
    if (r >= size) refuse({"'", name, "' is ", r, ", but the communicator has ", size, " ranks"});
    return static_cast<tally::Rank>(r);
  }
  const Json& array(std::string_view name, std::size_t most) {
    const Json& value = at(name);
    if (!value.is_array()) refuse({"'", name, "' is not an array"});
    if (value.size() > most) refuse({"'", name, "' has ", value.size(), " entries where at most ", most, " can be"});
    return value;
  }

 private:
  const Json& object_;
  std::size_t asked_ = 0;
};

inline tally::Quantity quantity_of(const Json& json, std::string_view name) {
  if (json.is_null()) return {};
  constexpr double none = std::numeric_limits<double>::quiet_NaN(), boundless = std::numeric_limits<double>::infinity();
  Fields fields(json, name);
  tally::Quantity q;
  q.value = fields.number("value", 0, most_joules);
  q.sigma = fields.number_or(none, "sigma", 0, most_joules);
  q.lower = fields.number_or(0, "lower", 0, most_joules);
  q.upper = fields.number_or(boundless, "upper", q.lower, most_joules);
  q.provenance = named<tally::Provenance>(fields.text("provenance"), "provenance", 4);
  q.split = named<tally::Split>(fields.text("split"), "split", 4);
  fields.done();
  if (!q.known()) refuse({"'", name, "' has a value of unknown provenance"});
  return q;
}

inline tally::AccountTimes times_of(const Json& json) {
  Fields fields(json, "time");
  tally::AccountTimes time;
  for (const tally::detail::TimeField& field : tally::detail::time_fields) time.*field.part = fields.duration(tally::detail::concat({field.name, "_ns"}));
  fields.done();
  tally::nanoseconds rest = time.elapsed;
  for (const tally::detail::TimeField& field : tally::detail::state_fields) {
    if (time.*field.part > rest) refuse({"the parts of its time are more than 'elapsed_ns'"});
    rest -= time.*field.part;
  }
  if (rest != tally::nanoseconds{0}) refuse({"the parts of its time are less than 'elapsed_ns'"});
  if (time.exposed > time.elapsed) refuse({"'exposed_ns' is more than 'elapsed_ns'"});
  if (time.slept > time.idle() || time.queued > time.idle()) refuse({"'slept_ns' or 'queued_ns' is more than the waits that it is a part of"});
  return time;
}

inline tally::Blame blame_of(Fields& fields, tally::Rank rank) { return {rank, fields.duration("arrival_ns"), fields.duration("transfer_ns"), fields.duration("credit_ns")}; }

/// Of no more than the waits in `time`, so that they can be added up.
inline std::vector<tally::Blame> blames_of(const Json& json, int size, bool several, const tally::AccountTimes& time) {
  tally::nanoseconds arrival = time.wait_arrival, transfer = time.wait_transfer, credit = time.wait_credit;
  const auto take = [](tally::nanoseconds& rest, tally::nanoseconds part) {
    if (part > rest) refuse({"'waited_for' has more than the waits in 'time'"});
    rest -= part;
  };
  std::vector<tally::Blame> blames;
  for (const Json& each : json) {
    Fields fields(each, "waited_for");
    const tally::Rank rank = fields.rank("rank", size, several);
    const tally::Blame blame = blame_of(fields, rank);
    fields.done();
    take(arrival, blame.arrival);
    take(transfer, blame.transfer);
    take(credit, blame.credit);
    blames.push_back(blame);
  }
  return blames;
}

inline tally::AccountEnergy energy_of(const Json& json) {
  Fields fields(json, "energy");
  tally::AccountEnergy energy;
  for (const tally::detail::EnergyField& field : tally::detail::energy_fields) energy.*field.part = quantity_of(fields.at(field.name), field.name);
  fields.done();
  return energy;
}

inline tally::Caveats caveats_of(const Json& json) {
  tally::Caveats caveats = 0;
  for (const Json& each : json) {
    const std::string name = each.is_string() ? each.get<std::string>() : "";
    std::size_t i = 0;
    while (i < tally::caveat_count && name_of(static_cast<tally::Caveat>(1u << i)) != name) ++i;
    if (i == tally::caveat_count) refuse({"the caveat ", shown(name), " is not known to this version"});
    caveats |= 1u << i;
  }
  return caveats;
}

inline tally::Collective operation_of(Fields& fields) {
  return named<tally::Collective>(fields.text("operation"), "operation", static_cast<std::size_t>(tally::last_operation) + 1);
}

/// How deep brackets are nested. Whoever parses allocates for each.
inline std::size_t depth_of(std::string_view line) {
  std::size_t depth = 0, deepest = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '"') quoted = !quoted;
    else if (quoted && c == '\\') ++i;
    else if (!quoted && (c == '[' || c == '{')) deepest = std::max(deepest, ++depth);
    else if (!quoted && (c == ']' || c == '}') && depth > 0) --depth;
  }
  return deepest;
}

}  // namespace detail

/// Collects accounts from any number of files. Where something is missing, sums are less than they should be, and say so: of an
/// account that lacks rows or domains which its first line announces, and of all accounts of a communicator of which ranks are
/// missing, each energy and domain is at most Provenance::modelled and no energy has an upper bound; the account's warnings say why.
class AccountReader {
 public:
  explicit AccountReader(AccountLimits limits = {}) : limits_(limits) {}

  /// To the end of the stream; `name` is what warnings call it. Does not throw.
  void read(std::istream& in, const std::string& name) noexcept {
    std::size_t number = 0;
    const std::size_t before = accounts_.size();
    try {
      std::string line;
      for (bool more = in.rdbuf() != nullptr; more;) {
        line.clear();
        ++number;
        bool whole = true;
        more = next_line(*in.rdbuf(), line, whole);
        if (whole && line.find_first_not_of(" \t\r") == std::string::npos) continue;
        try {
          if (!whole) detail::refuse({"it is longer than ", limits_.line_bytes, " bytes"});
          read_line(line);
        } catch (const std::exception& error) {
          warn({name, ":", number, ": line skipped: ", error.what(), more ? "" : " (the file ends in this line)"});
        }
      }
    } catch (const std::exception& error) {
      warn({name, ":", number, ": cannot be read any further: ", error.what()});
    }
    if (accounts_.size() == before) warn({name, ": no account begins in it; it should hold the lines that tally::write_json_lines() writes"});
  }
  /// "-" is standard input.
  void read_file(const std::string& path) noexcept {
    if (path == "-") return read(std::cin, "standard input");
    std::ifstream file(path, std::ios::binary);
    if (file) read(file, path);
    else warn({path, ": cannot be opened: ", std::generic_category().message(errno), "; it is left out"});
  }

  /// All that was read; the reader is empty then.
  AccountsRead finish() noexcept {
    AccountsRead result;
    try {
      for (const auto& entry : communicators_) look_for_missing_ranks(entry.first, entry.second);
      for (std::size_t i = 0; i < accounts_.size(); ++i) complete(accounts_[i], states_[i]);
      if (unnamed_warnings_ > 0) warnings_.push_back(tally::detail::concat({"and ", unnamed_warnings_, " more warnings like these"}));
    } catch (const std::exception& error) {  // memory
      accounts_.clear();
      warnings_.push_back(error.what());
    }
    result.accounts = std::move(accounts_);
    result.warnings = std::move(warnings_);
    const AccountLimits limits = limits_;
    *this = AccountReader(limits);
    return result;
  }

 private:
  using Json = detail::Json;
  using Fields = detail::Fields;
  enum Kind : std::size_t { row, report, peer, domain, power, slack, kinds };
  static constexpr std::array<std::string_view, kinds> kind_names{"row", "report", "peer", "domain", "power", "slack"};

  /// What is known of an account beside itself.
  struct State {
    std::array<std::uint64_t, kinds> announced{}, seen{};
    std::set<std::tuple<tally::Collective, std::uint8_t, std::string>> rows;
    std::vector<std::string> parents;  // of each domain, by key; empty: none
    bool closed = false;
    bool lacks_ranks = false;
  };
  struct CommunicatorSeen {
    int size;
    std::vector<tally::Rank> members;
    std::map<tally::Rank, std::size_t> accounts;  // by rank
  };
  using CommunicatorName = std::pair<std::string, std::string>;  // of the job, and its own

  void warn(std::initializer_list<tally::detail::Piece> text) noexcept {
    try {
      if (warnings_.size() < limits_.warnings) warnings_.push_back(tally::detail::concat(text));
      else ++unnamed_warnings_;
    } catch (const std::exception&) {
      ++unnamed_warnings_;
    }
  }
  /// False at the end. What is beyond the longest line is not kept.
  bool next_line(std::streambuf& in, std::string& line, bool& whole) const {
    constexpr auto end = std::streambuf::traits_type::eof();
    for (auto c = in.sbumpc(); c != end; c = in.sbumpc()) {
      if (c == '\n') return true;
      if (line.size() < limits_.line_bytes) line += std::streambuf::traits_type::to_char_type(c);
      else whole = false;
    }
    return false;
  }

  void read_line(const std::string& line) {
    if (detail::depth_of(line) > 6) detail::refuse({"its brackets are nested deeper than those of an account"});
    const Json json = Json::parse(line, nullptr, false);
    if (json.is_discarded()) detail::refuse({"it is not JSON in UTF-8, or only a part of it"});
    Fields fields(json, "line");
    const std::string kind = fields.text("kind");
    if (kind == "account") return read_account(fields);
    const auto known = std::find(kind_names.begin(), kind_names.end(), kind);
    if (known == kind_names.end()) detail::refuse({"its kind is ", detail::shown(kind), ", which this version does not know"});
    const CommunicatorName name{fields.text("job"), fields.text("communicator")};
    const auto rank = static_cast<tally::Rank>(fields.integer("rank", 0, std::numeric_limits<tally::Rank>::max()));
    const auto communicator = communicators_.find(name);
    const auto of_rank = communicator == communicators_.end() ? std::map<tally::Rank, std::size_t>::const_iterator{} : communicator->second.accounts.find(rank);
    if (communicator == communicators_.end() || of_rank == communicator->second.accounts.end())
      detail::refuse({"no account of rank ", rank, " of communicator ", detail::shown(name.second), " of job ", detail::shown(name.first), " has begun before it"});
    tally::Account& account = accounts_[of_rank->second];
    State& state = states_[of_rank->second];
    if (state.closed) return;
    const auto k = static_cast<std::size_t>(known - kind_names.begin());
    if (state.seen[k] == state.announced[k]) detail::refuse({"its account announced only ", state.announced[k], " lines of this kind"});
    switch (k) {
      case row: read_row(account, state, fields); break;
      case report: read_report(account, fields); break;
      case peer: read_peer(account, fields); break;
      case domain: read_domain(account, state, fields); break;
      case power: read_power(account, fields); break;
      default: read_slack(account, fields); break;
    }
    ++state.seen[k];
  }

  void read_account(Fields& fields) {
    if (const std::string schema = fields.text("schema"); schema != tally::account_schema)
      detail::refuse({"its schema is ", detail::shown(schema), ", but this version reads ", tally::account_schema});
    tally::Account a;
    State state;
    a.job = fields.text("job");
    a.communicator = fields.text("communicator");
    a.size = static_cast<int>(fields.integer("size", 1, std::numeric_limits<int>::max()));
    if (a.size > limits_.ranks) detail::refuse({"'size' is ", a.size, ", but jobs of at most ", limits_.ranks, " ranks are read"});
    a.rank = fields.rank("rank", a.size);
    a.host = fields.text("host");
    a.boot_id = fields.text("boot_id");
    a.transport = fields.text("transport");
    std::set<tally::Rank> distinct;
    for (const Json& member : fields.array("members", static_cast<std::size_t>(a.size))) {
      a.members.push_back(static_cast<tally::Rank>(Fields::integer(member, "members", 0, limits_.ranks - 1)));
      distinct.insert(a.members.back());
    }
    if (!a.members.empty() && distinct.size() != static_cast<std::size_t>(a.size)) detail::refuse({"'members' does not name ", a.size, " different ranks"});
    a.begin = fields.instant("begin_ns");
    a.end = fields.instant("end_ns");
    if (a.end < a.begin) detail::refuse({"'end_ns' is before 'begin_ns'"});
    a.clock_offset = fields.instant("clock_offset_ns");
    constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
    a.host_coverage = fields.number_or(unknown, "host_coverage", 0, 1e6);
    a.residual = fields.number_or(unknown, "residual", -1e12, 1);
    a.carbon_intensity = detail::quantity_of(fields.at("carbon_intensity"), "carbon_intensity");
    a.carbon_source = fields.text("carbon_source");
    a.pue = fields.number("pue", 1, 100);
    a.caveats = detail::caveats_of(fields.array("caveats", tally::caveat_count));
    for (const Json& warning : fields.array("warnings", limits_.line_bytes)) {
      if (!warning.is_string()) detail::refuse({"'warnings' are not texts"});
      a.warnings.push_back(warning.get<std::string>());
    }
    Fields lines(fields.at("lines"), "lines");
    for (std::size_t k = 0; k < kinds; ++k) state.announced[k] = lines.natural(kind_names[k]);
    lines.done();
    fields.done();

    CommunicatorSeen& seen = communicators_.try_emplace({a.job, a.communicator}, CommunicatorSeen{a.size, a.members, {}}).first->second;
    if (seen.size != a.size || seen.members != a.members) detail::refuse({"'size' or 'members' are not what another account of this communicator says"});
    if (const auto [known, added] = seen.accounts.try_emplace(a.rank, accounts_.size()); !added) {
      states_[known->second].closed = true;
      detail::refuse({"another account of rank ", a.rank, " of communicator ", detail::shown(a.communicator), " has begun before it; its lines are skipped as well"});
    }
    states_.push_back(std::move(state));
    accounts_.push_back(std::move(a));
  }

  /// Keeps sums of all times of one kind within what can be counted.
  static void add_to(std::int64_t& total, tally::nanoseconds time) {
    if (time.count() > detail::most_ns - total) detail::refuse({"with it all times together are more than 146 years"});
    total += time.count();
  }

  void read_row(tally::Account& account, State& state, Fields& fields) {
    tally::AccountRow r;
    r.operation = detail::operation_of(fields);
    r.size_class = static_cast<std::uint8_t>(fields.integer("size_class", 0, 64));
    r.algorithm = fields.text("algorithm");
    r.calls = fields.natural("calls");
    r.failed = fields.natural("failed");
    r.bytes = fields.natural("bytes");
    r.bytes_sent = fields.natural("bytes_sent");
    r.bytes_received = fields.natural("bytes_received");
    r.bytes_wire = fields.natural("bytes_wire");
    r.time = detail::times_of(fields.at("time"));
    std::size_t bucket = 0;
    for (const Json& count : fields.array("histogram", tally::elapsed_buckets))
      r.histogram[bucket++] = static_cast<std::uint64_t>(Fields::integer(count, "histogram", 0, static_cast<std::int64_t>(detail::most_count / tally::elapsed_buckets)));
    r.waited_for = detail::blames_of(fields.array("waited_for", static_cast<std::size_t>(account.size)), account.size, false, r.time);
    r.energy = detail::energy_of(fields.at("energy"));
    fields.done();
    if (state.rows.contains({r.operation, r.size_class, r.algorithm})) detail::refuse({"its account has a row of this operation, size class and algorithm already"});
    add_to(row_ns_, r.time.elapsed);
    state.rows.emplace(r.operation, r.size_class, r.algorithm);
    account.rows.push_back(std::move(r));
  }
  void read_report(tally::Account& account, Fields& fields) {
    tally::AccountEvent e;
    e.operation_number = fields.natural("operation_number");
    e.sequence = static_cast<std::uint32_t>(fields.integer("sequence", 0, std::numeric_limits<std::uint32_t>::max()));
    e.operation = detail::operation_of(fields);
    e.algorithm = fields.text("algorithm");
    e.bytes = fields.natural("bytes");
    e.begin = fields.instant("begin_ns");
    e.time = detail::times_of(fields.at("time"));
    if (e.time.elapsed.count() > detail::most_ns / 4) detail::refuse({"'elapsed_ns' of a call is more than 36 years"});
    e.last_arrival = fields.rank("last_arrival", account.size, true);
    e.waited_for = detail::blames_of(fields.array("waited_for", static_cast<std::size_t>(account.size) + 1), account.size, true, e.time);
    e.energy = detail::energy_of(fields.at("energy"));
    e.energy_final = fields.truth("energy_final");
    fields.done();
    add_to(report_ns_, e.time.elapsed);
    account.recent.push_back(std::move(e));
  }
  void read_peer(tally::Account& account, Fields& fields) {
    const tally::Rank rank = fields.rank("peer", account.size);
    const tally::Blame blame = detail::blame_of(fields, rank);
    fields.done();
    for (const tally::Blame& other : account.by_peer)
      if (other.rank == rank) detail::refuse({"its account has a line of peer ", rank, " already"});
    std::int64_t total = peer_ns_;
    for (const tally::nanoseconds part : {blame.arrival, blame.transfer, blame.credit}) add_to(total, part);
    peer_ns_ = total;
    account.by_peer.push_back(blame);
  }
  static void expect_host(const tally::Account& account, Fields& fields) {
    if (const std::string host = fields.text("host"); host != account.host) detail::refuse({"'host' is ", detail::shown(host), ", but its account is of ", detail::shown(account.host)});
  }
  void read_domain(tally::Account& account, State& state, Fields& fields) {
    tally::DomainAccount d;
    expect_host(account, fields);
    d.kind = detail::named<tally::Domain>(fields.text("domain"), "domain", static_cast<std::size_t>(tally::Domain::network_model) + 1);
    d.key = fields.text("key");
    d.source = fields.text("source");
    std::string parent;
    if (fields.is_null("parent")) fields.at("parent");
    else if (parent = fields.text("parent"); parent.empty()) detail::refuse({"'parent' is empty where it should be null"});
    d.provenance = detail::named<tally::Provenance>(fields.text("provenance"), "provenance", 4);
    const auto joules = [&](std::string_view name) -> tally::Nanojoules {
      if (d.provenance != tally::Provenance::none) return fields.natural(name);
      if (!fields.at(name).is_null()) detail::refuse({"'", name, "' has a value of unknown provenance"});
      return 0;
    };
    d.total = joules("total_nj");
    d.operations = joules("operations_nj");
    d.application = joules("application_nj");
    d.unattributed = joules("unattributed_nj");
    if (d.operations > d.total || d.application > d.total - d.operations || d.unattributed != d.total - d.operations - d.application) detail::refuse({"its shares do not add up to 'total_nj'"});
    d.watts_floor = fields.number_or(0, "watts_floor", 0, 1e12);
    d.caveats = detail::caveats_of(fields.array("caveats", tally::caveat_count));
    fields.done();
    if (account.domains.size() == limits_.domains) detail::refuse({"its account has more than ", limits_.domains, " domains"});
    if (index_of(account, d.key) < account.domains.size()) detail::refuse({"its account has a domain ", detail::shown(d.key), " already"});
    if (d.total > detail::most_count - joules_nj_) detail::refuse({"with it the joules of all domains are more than can be counted"});
    joules_nj_ += d.total;
    state.parents.push_back(std::move(parent));
    account.domains.push_back(std::move(d));
  }
  void read_power(tally::Account& account, Fields& fields) {
    tally::PowerSample p;
    expect_host(account, fields);
    const std::string key = fields.text("key");
    p.begin = fields.instant("begin_ns");
    p.end = fields.instant("end_ns");
    if (p.end < p.begin) detail::refuse({"'end_ns' is before 'begin_ns'"});
    p.watts = fields.number("watts", 0, 1e12);
    fields.done();
    const std::size_t d = index_of(account, key);
    if (d == account.domains.size()) detail::refuse({"its domain ", detail::shown(key), " was not told of before it"});
    p.domain = static_cast<std::uint16_t>(d);
    account.power.push_back(p);
  }
  void read_slack(tally::Account& account, Fields& fields) {
    tally::SlackRow s;
    s.operation = detail::operation_of(fields);
    s.peer = fields.rank("peer", account.size);
    s.calls = fields.natural("calls");
    s.expected = fields.duration("expected_ns");
    s.tenth_percentile = fields.duration("tenth_percentile_ns");
    fields.done();
    account.slack.push_back(s);
  }
  static std::size_t index_of(const tally::Account& account, std::string_view key) {
    return static_cast<std::size_t>(std::find_if(account.domains.begin(), account.domains.end(), [&](const tally::DomainAccount& d) { return d.key == key; }) - account.domains.begin());
  }

  void look_for_missing_ranks(const CommunicatorName& name, const CommunicatorSeen& communicator) {
    if (communicator.accounts.size() == static_cast<std::size_t>(communicator.size)) return;
    std::string missing;
    std::size_t count = 0;
    for (tally::Rank r = 0; r < communicator.size; ++r)
      if (!communicator.accounts.contains(r) && ++count <= 8) missing += tally::detail::concat({missing.empty() ? "" : ", ", r});
    const std::string text = tally::detail::concat({"communicator ", detail::shown(name.second), " of job ", detail::shown(name.first), " has ", communicator.size, " ranks, but the accounts of ", count,
                                                    " are missing (", missing, count > 8 ? ", ..." : "", "): sums over its ranks are too low"});
    warn({text});
    for (const auto& entry : communicator.accounts) {
      accounts_[entry.second].warnings.push_back(text);
      states_[entry.second].lacks_ranks = true;
    }
  }

  void complete(tally::Account& account, State& state) {
    bool lacks = state.lacks_ranks;
    for (std::size_t k = 0; k < kinds; ++k) {
      if (state.seen[k] == state.announced[k]) continue;
      lacks = lacks || k == row || k == domain;
      const std::string text = tally::detail::concat({"of the account of rank ", account.rank, " of communicator ", detail::shown(account.communicator), " ", state.announced[k] - state.seen[k], " of ",
                                                      state.announced[k], " lines of kind '", kind_names[k], "' are missing", k == row || k == domain ? ": its sums are too low" : ""});
      warn({text});
      account.warnings.push_back(text);
    }
    for (std::size_t d = 0; d < account.domains.size(); ++d) {
      if (state.parents[d].empty()) continue;
      const std::size_t parent = index_of(account, state.parents[d]);
      if (parent < account.domains.size()) account.domains[d].parent = static_cast<int>(parent);
    }
    for (std::size_t d = 0; d < account.domains.size(); ++d) {
      std::size_t steps = 0;
      for (int at = account.domains[d].parent; at >= 0 && steps <= account.domains.size(); ++steps) at = account.domains[static_cast<std::size_t>(at)].parent;
      if (steps <= account.domains.size()) continue;
      const std::string text = tally::detail::concat({"domain ", detail::shown(account.domains[d].key), " of host ", detail::shown(account.host), " is a part of itself: its joules are unknown"});
      warn({text});
      account.warnings.push_back(text);
      tally::DomainAccount unknown;
      unknown.kind = account.domains[d].kind;
      unknown.key = account.domains[d].key;
      unknown.source = account.domains[d].source;
      unknown.caveats = account.domains[d].caveats;
      account.domains[d] = unknown;
    }
    if (!lacks) return;
    const auto lower = [](tally::AccountEnergy& energy) {
      for (const tally::detail::EnergyField& field : tally::detail::energy_fields) {
        tally::Quantity& q = energy.*field.part;
        if (!q.known()) continue;
        q.provenance = std::min(q.provenance, tally::Provenance::modelled);
        q.upper = std::numeric_limits<double>::infinity();
      }
    };
    for (tally::AccountRow& r : account.rows) lower(r.energy);
    for (tally::AccountEvent& e : account.recent) lower(e.energy);
    for (tally::DomainAccount& d : account.domains) d.provenance = std::min(d.provenance, tally::Provenance::modelled);
  }

  AccountLimits limits_;
  std::vector<tally::Account> accounts_;
  std::vector<State> states_;  // of each account
  std::map<CommunicatorName, CommunicatorSeen> communicators_;
  std::vector<std::string> warnings_;
  std::size_t unnamed_warnings_ = 0;
  std::int64_t row_ns_ = 0, report_ns_ = 0, peer_ns_ = 0;
  std::uint64_t joules_nj_ = 0;
};

/// "-" is standard input. What is wrong is in the warnings, none of it is fatal.
inline AccountsRead read_accounts(std::span<const std::string> files, AccountLimits limits = {}) {
  AccountReader reader(limits);
  for (const std::string& file : files) reader.read_file(file);
  return reader.finish();
}

}  // namespace bench
