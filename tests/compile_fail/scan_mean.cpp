// SPDX-License-Identifier: Apache-2.0
// expect: a scan has no mean
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<const float> in, std::span<float> out) {
  comm.scan(in, out, tally::sum);
#ifdef TALLY_MISUSE
  comm.scan(in, out, tally::mean);
#endif
}
