// SPDX-License-Identifier: Apache-2.0
// expect: is_const_v<.*span<const float.*' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<const float> constant, std::span<float> data) {
  comm.all_reduce(constant, data, tally::sum);
  comm.all_reduce(data, tally::sum);
#ifdef TALLY_MISUSE
  comm.all_reduce(constant, tally::sum);
#endif
}
