// SPDX-License-Identifier: Apache-2.0
// expect: 'floating_point<T>' is unsatisfied|'int' does not satisfy 'floating_point'
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<int> integers, std::span<float> floats) {
  comm.all_reduce(floats, tally::mean);
  comm.all_reduce(integers, tally::sum);
#ifdef TALLY_MISUSE
  comm.all_reduce(integers, tally::mean);
#endif
}
