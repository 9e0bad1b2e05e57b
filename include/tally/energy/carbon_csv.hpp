// SPDX-License-Identifier: Apache-2.0
// Carbon intensities out of a CSV file, and what all formats of such files share: timestamps, the choice of a zone and a
// signal, and reading a file that may be anything. Nothing in a file is believed; what is wrong is said with its place.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "carbon.hpp"

namespace tally::inline v0 {

/// Which entries of a file count. Needed where it has several zones or signals.
struct IntensityChoice {
  std::string zone;                    // empty: that of all entries
  std::optional<CarbonSignal> signal;  // none: that of all entries
};

/// Larger files are refused: a year of figures every 5 minutes is half of it.
inline constexpr std::size_t longest_intensity_file = std::size_t{16} << 20;

/// "2024-02-29T13:05:00.25Z": ISO 8601, from 1970 to 2199. The seconds may be missing, the offset may not: it is Z or +hh:mm or -hh:mm.
inline std::optional<CarbonTime> parse_timestamp(std::string_view text) {
  const auto number = [&](std::size_t digits) -> int {  // takes them off the front; -1 if there are others
    if (text.size() < digits) return -1;
    int value = 0;
    for (std::size_t i = 0; i < digits; ++i) {
      if (text[i] < '0' || text[i] > '9') return -1;
      value = 10 * value + (text[i] - '0');
    }
    text.remove_prefix(digits);
    return value;
  };
  const auto take = [&](char c) {
    if (text.empty() || text.front() != c) return false;
    text.remove_prefix(1);
    return true;
  };
  const int year = number(4);
  if (year < 1970 || year > 2199 || !take('-')) return std::nullopt;
  const int month = number(2);
  if (month < 1 || !take('-')) return std::nullopt;
  const int day = number(2);
  if (day < 1 || !take('T')) return std::nullopt;
  const std::chrono::year_month_day date{std::chrono::year(year), std::chrono::month(static_cast<unsigned>(month)), std::chrono::day(static_cast<unsigned>(day))};
  const int hour = number(2);
  if (!date.ok() || hour < 0 || hour > 23 || !take(':')) return std::nullopt;
  const int minute = number(2);
  if (minute < 0 || minute > 59) return std::nullopt;
  CarbonTime time = std::chrono::sys_days(date) + std::chrono::hours(hour) + std::chrono::minutes(minute);
  if (take(':')) {
    const int second = number(2);
    if (second < 0 || second > 59) return std::nullopt;  // Unix time has no leap seconds
    time += std::chrono::seconds(second);
    if (take('.')) {
      int digit = number(1);
      if (digit < 0) return std::nullopt;
      for (nanoseconds place(100'000'000); digit >= 0; place /= 10, digit = number(1)) {
        if (place == nanoseconds{0}) return std::nullopt;
        time += digit * place;
      }
    }
  }
  if (!take('Z')) {
    const bool east = !text.empty() && text.front() == '+';
    if (!take('+') && !take('-')) return std::nullopt;
    const int hours = number(2);
    if (hours < 0 || hours > 14 || !take(':')) return std::nullopt;
    const int minutes = number(2);
    if (minutes < 0 || minutes > 59) return std::nullopt;
    const nanoseconds offset = std::chrono::hours(hours) + std::chrono::minutes(minutes);
    time = east ? time - offset : time + offset;
  }
  if (!text.empty() || time < CarbonTime{}) return std::nullopt;
  return time;
}

namespace detail {

inline std::string_view trimmed(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}
inline std::string_view without_byte_order_mark(std::string_view text) { return text.substr(text.starts_with("\xef\xbb\xbf") ? 3 : 0); }
/// JSON begins like that, and CSV does not.
inline bool looks_like_json(std::string_view text) {
  text = without_byte_order_mark(text);
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  return first != text.npos && (text[first] == '{' || text[first] == '[');
}

/// Entry and field are named by `where`, e.g. "intensity file 'de.json', history[3], datetime".
inline CarbonTime intensity_time(std::string_view text, std::string_view where) {
  const std::optional<CarbonTime> time = parse_timestamp(text);
  if (!time) throw Error(Errc::protocol, {where, ": ", excerpt(text), " is no time from 1970 to 2199 such as 2024-02-29T13:00:00Z, with Z or an offset such as +01:00"});
  return *time;
}
/// In g/kWh.
inline double checked_intensity(double value, std::string_view where) {
  if (!(value >= 0 && value <= highest_intensity)) throw Error(Errc::protocol, {where, ": the carbon intensity is not from 0 to 10000 g/kWh"});
  return value + 0.0;  // which makes 0 of -0
}

/// An entry of a file; `number` says which.
struct IntensityRow {
  std::size_t number;
  CarbonIntensity intensity;
};
/// The chosen ones of a file's entries; `file` and `where(number)` are for texts.
inline IntensitySeries chosen_series(std::vector<IntensityRow> rows, const std::string& file, const IntensityChoice& choice, const std::function<std::string(std::size_t)>& where) {
  const auto refuse = [&](const std::string& what) { throw Error(Errc::protocol, {"intensity file ", excerpt(file), ": ", what}); };
  if (rows.empty()) refuse("it holds no carbon intensities");
  if (!choice.zone.empty()) {
    const std::string one = rows.front().intensity.zone;
    std::erase_if(rows, [&](const IntensityRow& row) { return row.intensity.zone != choice.zone; });
    if (rows.empty()) refuse(concat({"it has nothing of zone ", excerpt(choice.zone), ", which was asked for, but of ", excerpt(one)}));
  }
  if (choice.signal) {
    std::erase_if(rows, [&](const IntensityRow& row) { return row.intensity.signal != *choice.signal; });
    if (rows.empty()) refuse(concat({"it has no ", name_of(*choice.signal), " intensities, which were asked for, but ", name_of(*choice.signal == CarbonSignal::average ? CarbonSignal::marginal : CarbonSignal::average), " ones; they must not be mixed"}));
  }
  std::vector<CarbonIntensity> entries;
  for (IntensityRow& row : rows) entries.push_back(std::move(row.intensity));
  return IntensitySeries(std::move(entries), [&](std::size_t i) { return where(rows[i].number); });
}

/// All of a file, which must be a plain one (a pipe could make us wait for ever) and not too long.
inline std::string read_intensity_text(const std::string& path) {
  const auto refuse = [&](std::string_view what) { throw Error(Errc::invalid_argument, {"intensity file ", excerpt(path), ": ", what}); };
  const auto fail = [&] { refuse(std::generic_category().message(errno)); };
  struct stat status {};
  const auto expect_plain = [&] {
    if (S_ISDIR(status.st_mode)) refuse("it is a directory; name the file in it");
    if (!S_ISREG(status.st_mode)) refuse("it is a pipe or a device; write the figures to a plain file");
  };
  if (::stat(path.c_str(), &status) != 0) fail();
  expect_plain();  // before it is opened, which devices may notice
  struct Descriptor {
    int fd;
    ~Descriptor() {
      if (fd >= 0) ::close(fd);
    }
  } const file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)};
  if (file.fd < 0 || ::fstat(file.fd, &status) != 0) fail();
  expect_plain();  // nor has it become one meanwhile
  std::string text;
  for (char block[16384];;) {
    const ssize_t count = ::read(file.fd, block, sizeof block);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail();
    if (count == 0) return text;
    text.append(block, static_cast<std::size_t>(count));
    if (text.size() > longest_intensity_file) refuse("it is longer than 16 MiB; keep the time that is needed");
  }
}

/// The fields of a line. One in double quotes may hold commas, and quotes that are doubled.
inline std::vector<std::string> csv_fields(std::string_view line, std::string_view where) {
  static constexpr std::size_t most = 64;
  std::vector<std::string> fields;
  for (bool more = true; more;) {
    if (fields.size() == most) throw Error(Errc::protocol, {where, ": more than ", most, " columns"});
    line = trimmed(line);
    std::string field;
    if (line.starts_with('"')) {
      for (line.remove_prefix(1);;) {
        const std::size_t quote = line.find('"');
        if (quote == line.npos) throw Error(Errc::protocol, {where, ": a quote is not closed"});
        field += line.substr(0, quote);
        line.remove_prefix(quote + 1);
        if (!line.starts_with('"')) break;
        field += '"';
        line.remove_prefix(1);
      }
      line = trimmed(line);
      if (!line.empty() && line.front() != ',') throw Error(Errc::protocol, {where, ": there is text after a closing quote"});
    } else {
      field = trimmed(line.substr(0, line.find(',')));
      line.remove_prefix(std::min(line.size(), line.find(',')));
    }
    more = !line.empty();
    if (more) line.remove_prefix(1);
    fields.push_back(std::move(field));
  }
  return fields;
}

}  // namespace detail

/// Carbon intensities from CSV. The first line names the columns, in any order: `datetime` (begin), `zone` and `gco2e_per_kwh` must be there;
/// `until` (without it, see IntensitySeries), `signal` (average, marginal; without it average), `factor` (lifecycle, direct, unknown) and
/// `estimated` (true, false) may be, and be empty; others are ignored. Throws Errc::protocol that names `file`, the line and the column.
inline IntensitySeries parse_intensity_csv(std::string_view text, const std::string& file, const IntensityChoice& choice = {}) {
  const std::string name = detail::concat({"intensity file ", detail::excerpt(file)});
  if (detail::looks_like_json(text))
    throw Error(Errc::unsupported, {name, ": it is JSON; include <tally/carbon_files.hpp>, link tally::carbon_files (it needs nlohmann_json) and read it by tally::read_intensity_file, or convert it to CSV"});
  if (text.find('\0') != text.npos) throw Error(Errc::protocol, {name, ": it is not text"});
  text = detail::without_byte_order_mark(text);
  static constexpr std::string_view columns[] = {"datetime", "zone", "gco2e_per_kwh", "until", "signal", "factor", "estimated"};
  enum Column : std::size_t { datetime, zone, grams, until, signal, factor, estimated };
  std::size_t places[std::size(columns)] = {};  // from 1 on; 0: it is not there
  std::vector<detail::IntensityRow> rows;
  std::size_t width = 0;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.size(), text.find('\n'));
    const std::string_view line = detail::trimmed(text.substr(0, end));
    text.remove_prefix(std::min(text.size(), end + 1));
    if (line.empty()) continue;
    const std::string where = detail::concat({name, ", line ", number});
    const std::vector<std::string> fields = detail::csv_fields(line, where);
    if (width == 0) {
      width = fields.size();
      for (std::size_t i = 0; i < fields.size(); ++i) {
        const auto column = std::find(std::begin(columns), std::end(columns), fields[i]);
        if (column == std::end(columns)) continue;
        std::size_t& place = places[column - std::begin(columns)];
        if (place != 0) throw Error(Errc::protocol, {where, ": column ", fields[i], " is there twice"});
        place = i + 1;
      }
      for (const Column column : {datetime, zone, grams})
        if (places[column] == 0) throw Error(Errc::protocol, {where, ": there is no column ", columns[column], "; the first line must name the columns, e.g. datetime,zone,gco2e_per_kwh"});
      continue;
    }
    if (fields.size() != width) throw Error(Errc::protocol, {where, ": it has ", fields.size(), " fields and the first line ", width});
    const auto field = [&](Column column) { return places[column] == 0 ? std::string_view() : std::string_view(fields[places[column] - 1]); };
    const auto in = [&](Column column) { return detail::concat({where, ", ", columns[column]}); };
    const auto refuse = [&](Column column, std::string_view what) { throw Error(Errc::protocol, {in(column), ": ", detail::excerpt(field(column)), what}); };
    CarbonIntensity entry;
    entry.from = detail::intensity_time(field(datetime), in(datetime));
    if (!field(until).empty()) {
      entry.until = detail::intensity_time(field(until), in(until));
      if (entry.until <= entry.from) refuse(until, " is not after its datetime");
    }
    entry.zone = field(zone);
    if (entry.zone.empty()) refuse(zone, " is empty; say which grid it is");
    const std::string_view value = field(grams);
    const auto [stop, error] = std::from_chars(value.data(), value.data() + value.size(), entry.grams_per_kwh);
    if (error != std::errc{} || stop != value.data() + value.size()) refuse(grams, " is no number; leave the line out where it is unknown");
    entry.grams_per_kwh = detail::checked_intensity(entry.grams_per_kwh, in(grams));
    if (field(signal) == "marginal") entry.signal = CarbonSignal::marginal;
    else if (!field(signal).empty() && field(signal) != "average") refuse(signal, " is neither average nor marginal");
    if (field(factor) == "lifecycle") entry.factor = CarbonFactor::lifecycle;
    else if (field(factor) == "direct") entry.factor = CarbonFactor::direct;
    else if (!field(factor).empty() && field(factor) != "unknown") refuse(factor, " is neither lifecycle, direct nor unknown");
    entry.estimated = field(estimated) == "true";
    if (!entry.estimated && !field(estimated).empty() && field(estimated) != "false") refuse(estimated, " is neither true nor false");
    if (entry.estimated) entry.relative_sigma = estimated_intensity_sigma;
    entry.source = file;
    rows.push_back({number, std::move(entry)});
  }
  return detail::chosen_series(std::move(rows), file, choice, [&](std::size_t number) { return detail::concat({name, ", line ", number}); });
}

/// Reads such a file. Throws Errc::invalid_argument where it cannot be read.
inline IntensitySeries read_intensity_csv(const std::string& path, const IntensityChoice& choice = {}) { return parse_intensity_csv(detail::read_intensity_text(path), path, choice); }

}  // namespace tally::inline v0
