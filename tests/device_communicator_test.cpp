// SPDX-License-Identifier: Apache-2.0
#include <catch2/catch.hpp>

#include <numeric>

#include <tally/device_communicator.hpp>
#include <tally/tally.hpp>

#include "emulated_driver.hpp"
#include "sanitized.hpp"

using namespace std::chrono_literals;
using tally::Communicator, tally::Errc, tally::Error, tally::Rank;
using test::EmulatedArray, test::EmulatedDevices, test::EmulatedDriver, test::EmulatedStream;
using Devices = tally::DeviceCommunicator<EmulatedDriver>;

TEST_CASE("smoke") {
  tally::launch(3, [](Communicator& comm) {
    EmulatedDriver driver;
    Devices gpu(comm, driver, {.blocks = 2, .packet_bytes = 4096});
    EmulatedStream stream;
    for (const char* name : {"", "packets", "zero_copy", "ring"}) {
      EmulatedArray<float> x(driver, std::vector<float>(100, static_cast<float>(gpu.rank() + 1)));
      auto operation = gpu.all_reduce(x.span(), tally::sum, &stream, {.algorithm = name});
      const tally::Report report = operation.wait();
      CHECK(x.values() == std::vector<float>(100, 6.0f));
      if (gpu.rank() == 0) std::cout << report << "\n";
    }
  }, tally::threads);
  CHECK(EmulatedDevices::all().count() == 0);
}
