// SPDX-License-Identifier: Apache-2.0
// expect: takes<T> \[with T = float; Op = tally::v0::BitAnd\]' evaluated to|BitAnd::takes<float>' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> floats, std::span<std::byte> bytes) {
  comm.all_reduce(bytes, tally::band);
  comm.all_reduce(floats, tally::min);
#ifdef TALLY_MISUSE
  comm.all_reduce(floats, tally::band);
#endif
}
