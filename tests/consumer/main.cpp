// SPDX-License-Identifier: Apache-2.0
#include <iostream>
#include <tally/tally.hpp>
#include <vector>

int main() {
  tally::launch(2, [](tally::Communicator& comm) {
    std::vector<float> gradient(1000, static_cast<float>(comm.rank() + 1));
    comm.all_reduce(gradient, tally::sum);
    if (gradient != std::vector<float>(1000, 3.0f)) throw std::runtime_error("wrong sum");
    if (comm.rank() == 0) std::cout << "1 + 2 = " << gradient.front() << std::endl;
  });
}
