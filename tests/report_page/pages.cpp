// SPDX-License-Identifier: Apache-2.0
// Writes the pages that run.sh opens in a browser into the folder that it is given.
#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <tally/account/html.hpp>

#include "../report_accounts.hpp"
#include "../sample_accounts.hpp"

using namespace tally;

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: pages FOLDER\n", 2;
  const auto write = [&](const std::string& name, const std::vector<Account>& all) {
    std::ofstream out(std::string(argv[1]) + "/" + name + ".html");
    write_html(out, job_of(all), all);
    if (!out.flush()) throw Error(Errc::no_resources, {"cannot write ", name});
  };
  write("sample", sample::accounts());
  write("unknown", sample::accounts_without_energy());
  write("large", report_accounts::accounts({.ranks = 512, .calls = 40, .late = [](Rank r, int) { return std::int64_t{r == 300 ? 3'000'000 : r * 100}; }, .transfer = 200'000, .watts = 5}));
  write("empty", {});
  std::vector<Account> hostile = sample::accounts();
  for (Account& a : hostile) {
    a.job = "<script>document.documentElement.dataset.pwned=1</script>";
    a.host += "\"><img src=x onerror=document.documentElement.dataset.pwned=2>";
    a.warnings = {"</li></ul><script>document.documentElement.dataset.pwned=3</script>", "\xFF\x01"};
    for (DomainAccount& d : a.domains) d.key += "</style></script><svg onload=document.documentElement.dataset.pwned=4>";
  }
  write("hostile", hostile);
}
