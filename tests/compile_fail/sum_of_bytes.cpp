// SPDX-License-Identifier: Apache-2.0
// expect: takes<T> \[with T = std::byte; Op = tally::v0::Sum\]' evaluated to|Sum::takes<std::byte>' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<std::byte> bytes, std::span<std::byte> all) {
  comm.all_gather(bytes, all);
#ifdef TALLY_MISUSE
  comm.all_reduce(bytes, tally::sum);
#endif
}
