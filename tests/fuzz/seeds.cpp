// SPDX-License-Identifier: Apache-2.0
// What the fuzzers begin with, so that they need not find out first what a file looks like.
// usage: seeds FOLDER     writes FOLDER/accounts/* and FOLDER/weights/*
#include <algorithm>
#include <cstddef>
#include <sstream>
#include <string>

#include <tally/account/json_lines.hpp>
#include <tally/energy/weights_file.hpp>

#include "../sample_accounts.hpp"

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  // Two ranks with all that they know, but little of each, so that it is short. The second file has both.
  std::ostringstream lines;
  for (tally::Account account : sample::accounts()) {
    if (account.rank != 1 && account.rank != sample::straggler) continue;
    const auto shorten = [](auto& items, std::size_t most) { items.resize(std::min(items.size(), most)); };
    shorten(account.rows, 2), shorten(account.recent, 2), shorten(account.by_peer, 1), shorten(account.domains, 2), shorten(account.power, 2), shorten(account.slack, 1);
    tally::write_json_lines(lines, account);
    tally::write_file_atomically(folder + "/accounts/" + std::to_string(account.rank), lines.str());
  }
  tally::MachineWeights machine{{"a processor", "performance", "acpi_idle", 8}, {}};
  machine.weights.watts.fill(3);
  tally::write_file_atomically(folder + "/weights/one", tally::weights_text({&machine, 1}));
}
