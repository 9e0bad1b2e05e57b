// SPDX-License-Identifier: Apache-2.0
// What the fuzzers begin with, so that they need not find out first what a file looks like.
// usage: seeds FOLDER     writes FOLDER/accounts/* and FOLDER/weights/*
#include <algorithm>
#include <cstddef>
#include <sstream>
#include <string>

#include <tally/account/json_lines.hpp>
#include <tally/energy/weights_file.hpp>
#include <tally/file.hpp>

#include "../sample_accounts.hpp"

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  // One of each kind of line of two ranks: short inputs are tried more often.
  for (tally::Account account : sample::accounts()) {
    if (account.communicator != "world" || (account.rank != 1 && account.rank != sample::straggler)) continue;
    const auto shorten = [](auto& items) { items.resize(std::min<std::size_t>(items.size(), 1)); };
    shorten(account.rows), shorten(account.recent), shorten(account.by_peer), shorten(account.domains), shorten(account.power), shorten(account.slack);
    std::ostringstream lines;
    tally::write_json_lines(lines, account);
    tally::write_file_atomically(folder + "/accounts/" + std::to_string(account.rank), lines.str());
  }
  tally::MachineWeights machine{{"a processor", "performance", "acpi_idle", 8}, {}};
  machine.weights.watts.fill(3);
  tally::write_file_atomically(folder + "/weights/one", tally::weights_text({&machine, 1}));
}
