// SPDX-License-Identifier: Apache-2.0
// expect: same_as<(T, bool>\) \[with T = bool\]|_Bool, _Bool>)' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<unsigned char> bytes, [[maybe_unused]] std::span<bool> bools) {
  comm.all_reduce(bytes, tally::max);
#ifdef TALLY_MISUSE
  comm.all_reduce(bools, tally::max);
#endif
}
