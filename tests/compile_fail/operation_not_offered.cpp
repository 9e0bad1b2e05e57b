// SPDX-License-Identifier: Apache-2.0
// expect: static(_assert| assertion) failed.*this algorithm does not offer this operation
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> data) {
  comm.all_reduce<tally::Ring>(data, tally::sum);
  comm.broadcast<tally::Tree>(data, 0);
#ifdef TALLY_MISUSE
  comm.broadcast<tally::Ring>(data, 0);
#endif
}
