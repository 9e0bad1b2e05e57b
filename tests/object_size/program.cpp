// SPDX-License-Identifier: Apache-2.0
#include <tally/tally.hpp>

int main() {
  tally::launch(2, [](tally::Communicator& comm) {
    std::vector<float> gradient(1000, 1.0f);
    comm.all_reduce(gradient, tally::sum);
  });
}
