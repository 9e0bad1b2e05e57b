// SPDX-License-Identifier: Apache-2.0
// expect: static(_assert| assertion) failed.*this algorithm does not keep the order of ranks
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> data) {
  const auto second = [](float, float b) { return b; };
  comm.all_reduce<tally::Tree>(data, second);
  comm.all_reduce<tally::Ring>(data, tally::commutative(second));
#ifdef TALLY_MISUSE
  comm.all_reduce<tally::Ring>(data, second);
#endif
}
