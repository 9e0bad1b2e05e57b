// SPDX-License-Identifier: Apache-2.0
// A ledger as JSON: one object per operation, size class and algorithm. Times are in seconds, sizes in bytes,
// energy in joules. What is not known is null, never 0 (and JSON has no NaN or infinity). And how JSON gets to disk.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>

#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

inline nlohmann::json number_or_null(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

inline double in_seconds(tally::nanoseconds time) { return std::chrono::duration<double>(time).count(); }

inline nlohmann::json to_json(const tally::Quantity& quantity) {
  if (!quantity.known()) return nullptr;
  return {{"value", number_or_null(quantity.value)},
          {"sigma", number_or_null(quantity.sigma)},
          {"lower", number_or_null(quantity.lower)},
          {"upper", number_or_null(quantity.upper)},
          {"provenance", std::string(name_of(quantity.provenance))}};
}

/// The parts of a row's time add up: seconds = busy + the four waits + undriven.
inline nlohmann::json to_json(const tally::Ledger& ledger) {
  nlohmann::json rows = nlohmann::json::array();
  for (const tally::LedgerRow& row : ledger.rows()) {
    nlohmann::json waited_for = nlohmann::json::array();  // indexed by rank
    for (const tally::Blame& blame : row.waited_for) waited_for.push_back(in_seconds(blame.total()));
    rows.push_back({{"operation", std::string(name_of(row.operation))},
                    {"size_up_to", std::uint64_t{1} << row.size_class},
                    {"algorithm", std::string(ledger.algorithm_name(row.algorithm))},
                    {"calls", row.calls},
                    {"failed", row.failed},
                    {"bytes", row.bytes},
                    {"seconds", in_seconds(row.elapsed)},
                    {"busy", in_seconds(row.busy())},
                    {"wait_arrival", in_seconds(row.wait_arrival)},
                    {"wait_transfer", in_seconds(row.wait_transfer)},
                    {"wait_credit", in_seconds(row.wait_credit)},
                    {"wait_local", in_seconds(row.wait_local)},
                    {"undriven", in_seconds(row.undriven)},
                    {"waited_for", waited_for},
                    {"energy", to_json(ledger.energy(row))},
                    {"idle_energy", to_json(ledger.idle_energy(row))}});
  }
  return rows;
}

/// A plain file is written beside its place and then renamed, so it appears complete or not at all. Anything else
/// (a pipe, /dev/null, a link) is written to directly.
inline bool is_plain_file(const std::string& file) {
  const auto type = std::filesystem::symlink_status(file).type();
  return type == std::filesystem::file_type::not_found || type == std::filesystem::file_type::regular;
}
inline std::string partial_name(const std::string& file) { return file + ".partial"; }

/// Throws now what write_json() would throw after all the work.
inline void expect_writable(const std::string& file) {
  if (file == "-") return;
  bool writable = false;
  if (is_plain_file(file)) {
    writable = std::ofstream(partial_name(file)).is_open();
    if (writable) std::remove(partial_name(file).c_str());
  } else if (std::filesystem::is_directory(file)) {
    errno = EISDIR;
  } else {
    writable = ::access(file.c_str(), W_OK) == 0;
  }
  if (!writable) throw tally::Error(tally::Errc::invalid_argument, "cannot write '" + file + "': " + std::strerror(errno));
}

/// Writes to a file, or to standard output if that is "-".
inline void write_json(const nlohmann::json& json, const std::string& file) {
  const std::string text = json.dump(2) + '\n';
  if (file == "-") {
    if (!(std::cout << text << std::flush)) throw tally::Error(tally::Errc::no_resources, "cannot write the JSON to standard output");
    return;
  }
  const bool plain = is_plain_file(file);
  const std::string target = plain ? partial_name(file) : file;
  std::ofstream out(target, std::ios::binary);
  out << text;
  out.close();
  if (out && (!plain || std::rename(target.c_str(), file.c_str()) == 0)) return;
  const std::string why = std::strerror(errno);
  if (plain) std::remove(target.c_str());
  throw tally::Error(tally::Errc::no_resources, "cannot write '" + file + "': " + why);
}
