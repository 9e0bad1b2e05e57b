// SPDX-License-Identifier: Apache-2.0
// The same instantiations as in first.cpp, and what only an umbrella brings: they must link.
#include <tally/tally.hpp>

int second(int ranks) {
  int seen = 0;
  tally::launch(ranks, [](tally::Communicator& comm) { comm.barrier(); });
  tally::launch(
      ranks, [&seen](tally::Communicator& comm) {
        int one = 1;
        comm.all_reduce(std::span(&one, 1), tally::sum);
        if (comm.rank() == 0) seen = one;
      },
      tally::threads);
  return seen;
}
