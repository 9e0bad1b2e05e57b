// SPDX-License-Identifier: Apache-2.0
// Catch2's main, compiled once for all tests. Under a virtual machine its host may take the cores away, which the kernel counts as steal:
// nothing can be said then about when threads ran. So what is tagged [timing] or [quiet], fails, and was robbed is tried again, and what
// was robbed of much (a twentieth of all cores' time) each time is skipped. What fails on cores of its own has failed.
#define CATCH_CONFIG_RUNNER
#define CATCH_CONFIG_EXTERNAL_INTERFACES
#include <catch2/catch.hpp>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Seconds = std::chrono::duration<double>;

/// What hosts took of all cores since this machine was started; 0 on a machine that is none's guest.
Seconds stolen() {
  std::ifstream file("/proc/stat");
  std::string name;
  double ticks[8] = {};  // user, nice, system, idle, waiting for discs, two kinds of interrupts, steal
  file >> name;
  for (double& each : ticks) file >> each;
  return Seconds(file ? ticks[7] / static_cast<double>(::sysconf(_SC_CLK_TCK)) : 0);
}

struct Failure {
  std::string name;
  bool is_of_times;
  Seconds took, stolen;

  bool may_be_tried_again() const { return is_of_times && stolen.count() > 0; }
  bool was_robbed_of_much() const { return stolen > 0.05 * took * std::max(std::thread::hardware_concurrency(), 1u); }
};
std::vector<Failure>& failures() {
  static std::vector<Failure> all;
  return all;
}

struct Watch final : Catch::TestEventListenerBase {
  using TestEventListenerBase::TestEventListenerBase;
  void testCaseStarting(const Catch::TestCaseInfo&) override {
    began = std::chrono::steady_clock::now();
    before = stolen();
  }
  void testCaseEnded(const Catch::TestCaseStats& ended) override {
    if (ended.totals.testCases.failed == 0) return;
    const auto& tags = ended.testInfo.lcaseTags;
    const Seconds took = std::chrono::steady_clock::now() - began;
    std::this_thread::sleep_for(std::chrono::milliseconds(30));  // each core counts what it was robbed of at its own next tick
    failures().push_back({ended.testInfo.name, std::find(tags.begin(), tags.end(), "timing") != tags.end() || std::find(tags.begin(), tags.end(), "quiet") != tags.end(), took, stolen() - before});
  }
  std::chrono::steady_clock::time_point began;
  Seconds before{};
};
CATCH_REGISTER_LISTENER(Watch)

}  // namespace

int main(int argc, char** argv) {
  Catch::Session session;
  if (const int wrong = session.applyCommandLine(argc, argv)) return wrong;
  const auto began = std::chrono::steady_clock::now();
  int result = session.run();
  bool always_robbed_of_much = true;
  for (int tries = 1; !failures().empty(); ++tries) {
    const std::vector<Failure> failed = std::exchange(failures(), {});
    for (const Failure& each : failed) {
      if (!each.may_be_tried_again()) return result;
      always_robbed_of_much = always_robbed_of_much && each.was_robbed_of_much();
    }
    const bool last = tries == 5 || std::chrono::steady_clock::now() - began > std::chrono::seconds(60);
    std::string names;
    for (const Failure& each : failed) {
      std::cout << (!last ? "again: " : always_robbed_of_much ? "skipped: " : "failed: ") << '"' << each.name << "\": the machine's host took " << each.stolen.count() << " s of its cores in the " << each.took.count() << " s of this\n";
      names += names.empty() ? "\"" : ",\"";
      for (const char c : each.name) names += c == ',' || c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
      names += '"';
    }
    if (last) return always_robbed_of_much ? 0 : result;
    Catch::ConfigData again = session.configData();
    again.testsOrTags = {names};
    again.warnings = Catch::WarnAbout::NoTests;  // and fail where there are none
    session.useConfigData(again);
    result = session.run();
  }
  return result;
}
