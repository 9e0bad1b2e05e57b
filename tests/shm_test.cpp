// SPDX-License-Identifier: Apache-2.0
// The shm transport under the conformance suite, with ranks as processes.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>

#include <tally/transport/shm.hpp>

#include "transport_conformance.hpp"

using namespace tally;

TEST_CASE("shm transport conforms", "[processes]") {
  conformance::conformance([](int n, const SlotOptions& options, const conformance::Body& body) {
    const SlotLayout layout(n, options);
    const auto file = std::make_shared<ShmFile>();
    const ShmMemory onlooker(file, layout, 0, -1);
    std::fflush(nullptr);
    std::cout.flush();
    std::vector<pid_t> ranks;
    for (Rank r = 0; r < n; ++r) {
      const pid_t pid = ::fork();
      REQUIRE(pid >= 0);
      if (pid == 0) {
        int status = 1;
        try {
          SlotTransport transport(std::make_shared<ShmMemory>(file, layout, 0, r), r);
          body(transport);
          status = 0;
        } catch (const std::exception& error) {
          std::fprintf(stderr, "rank %d: %s\n", r, error.what());
        }
        ::_exit(status);
      }
      ranks.push_back(pid);
    }
    for (const pid_t pid : ranks) {
      int status = -1;
      ::waitpid(pid, &status, 0);
      CHECK(status == 0);
    }
  });
}
