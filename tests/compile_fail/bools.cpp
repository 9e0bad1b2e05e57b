// SPDX-License-Identifier: Apache-2.0
// expect: takes<T> \[with T = bool; Op = tally::v0::Sum\]' evaluated to|Sum::takes<_Bool>' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<unsigned char> bytes, [[maybe_unused]] std::span<bool> bools) {
  comm.all_reduce(bytes, tally::sum);
  comm.all_reduce(bools, tally::lor);
#ifdef TALLY_MISUSE
  comm.all_reduce(bools, tally::sum);
#endif
}
