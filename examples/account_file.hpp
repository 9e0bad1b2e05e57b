// SPDX-License-Identifier: Apache-2.0
// A rank's account in a folder of its job: DIR/accounts-rankN.jsonl, for tally_report.
#pragma once

#include <filesystem>
#include <sstream>
#include <string>
#include <system_error>

#include <tally/account/json_lines.hpp>
#include <tally/file.hpp>
#include <tally/tally.hpp>

/// Makes the folder, if there is none.
inline void expect_account_folder(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (!std::filesystem::is_directory(folder)) throw tally::Error(tally::Errc::invalid_argument, "cannot make the folder '" + folder + "' for accounts: " + (error ? error.message() : "there is something else of that name"));
}

inline void write_account_file(const std::string& folder, const tally::Account& account) {
  std::ostringstream lines;
  tally::write_json_lines(lines, account);
  tally::write_file_atomically(folder + "/accounts-rank" + std::to_string(account.rank) + ".jsonl", lines.str());
}
