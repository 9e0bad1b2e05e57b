// SPDX-License-Identifier: Apache-2.0
#include <tally/tally.hpp>

int second(int ranks);

int main() {
  int first = 0;
  tally::launch(
      2, [&first](tally::Communicator& comm) {
        int one = 1;
        comm.all_reduce(std::span(&one, 1), tally::sum);
        if (comm.rank() == 0) first = one;
      },
      tally::threads);
  return first == 2 && second(2) == 2 ? 0 : 1;
}
