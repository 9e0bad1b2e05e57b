// SPDX-License-Identifier: Apache-2.0
// expect: must outlive the call: pass a variable or a span, not a temporary container
#include <vector>

#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::vector<float>& data, tally::Symmetric<float>& symmetric) {
  comm.async_all_reduce(data, tally::sum).wait();
  comm.async_all_reduce(std::span(data), tally::sum).wait();
  comm.async_all_reduce(symmetric.subspan(0, 1), tally::sum).wait();
  comm.all_reduce(std::vector<float>(1), data, tally::sum);
  comm.send(std::vector<float>(1), 0);
#ifdef TALLY_MISUSE
  comm.async_all_reduce(std::vector<float>(1), data, tally::sum).wait();
#endif
}
