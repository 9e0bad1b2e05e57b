// SPDX-License-Identifier: Apache-2.0
// Ranks that were started by what speaks PMIx, and were told no address: they meet and reduce; rank 0 says ok. With an argument rank 0
// does not come, and the others say why that is an error.
#include <chrono>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include <tally/pmix.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

int main(int argc, char**) {
  using namespace std::chrono_literals;
  try {
    tally::Options options;
    if (argc > 1) options.timeout = 1s;
    if (argc > 1 && std::string(std::getenv("PMIX_RANK")) == "0") std::this_thread::sleep_for(4s);
    tally::Communicator comm = tally::init(options);
    std::vector<int> data(1000, comm.rank() + 1);
    comm.all_reduce(data, tally::sum);
    const int n = comm.size();
    if (data != std::vector<int>(1000, n * (n + 1) / 2)) return 1;
    if (comm.rank() == 0) std::cout << comm.transport_name() << " ok" << std::endl;
  } catch (const tally::Error& error) {
    std::cout << error.what() << std::endl;
    return 2;
  }
}
