// SPDX-License-Identifier: Apache-2.0
// Writes the sample job's accounts, one of them with names that want escaping, for other people's tools to read.
// usage: program prometheus|openmetrics|json_lines [without_energy]
#include <iostream>
#include <string>
#include <string_view>

#include <tally/account/json_lines.hpp>
#include <tally/account/prometheus.hpp>

#include "../sample_accounts.hpp"

int main(int count, char** arguments) {
  const std::string_view format = count > 1 ? arguments[1] : "";
  std::vector<tally::Account> accounts = count > 2 ? sample::accounts_without_energy() : sample::accounts();
  tally::Account odd = accounts[3];
  odd.communicator = "a \"name\"\\ of\nlines, \xff and \xc3\xa9";
  odd.recent[0].last_arrival = -1;
  odd.recent[0].waited_for.push_back({-1, {}, {}, {}});
  accounts.push_back(odd);
  if (format == "json_lines")
    for (const tally::Account& account : accounts) tally::write_json_lines(std::cout, account);
  else if (format == "prometheus" || format == "openmetrics")
    tally::write_prometheus(std::cout, accounts, {.open_metrics = format == "openmetrics", .peers = 3});
  else
    return 2;
  return std::cout.flush() ? 0 : 1;
}
