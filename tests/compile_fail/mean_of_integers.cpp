// SPDX-License-Identifier: Apache-2.0
// expect: takes<T> \[with T = int; Op = tally::v0::Mean\]' evaluated to|Mean::takes<int>' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<int> integers, std::span<float> floats) {
  comm.all_reduce(floats, tally::mean);
  comm.all_reduce(integers, tally::sum);
#ifdef TALLY_MISUSE
  comm.all_reduce(integers, tally::mean);
#endif
}
