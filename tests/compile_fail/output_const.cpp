// SPDX-License-Identifier: Apache-2.0
// expect: is_const_v<.*vector<float.*' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> in, std::vector<float>& out, [[maybe_unused]] const std::vector<float>& constant) {
  comm.all_gather(in, out);
#ifdef TALLY_MISUSE
  comm.all_gather(in, constant);
#endif
}
