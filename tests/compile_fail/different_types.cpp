// SPDX-License-Identifier: Apache-2.0
// expect: is_same_v<(_Tp, _Up> \[with _Tp = float; _Up = double\]|float, double>)' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> floats, std::span<float> more, std::span<double> doubles) {
  comm.reduce_scatter(floats, more, tally::sum);
  comm.reduce_scatter(doubles, doubles, tally::sum);
#ifdef TALLY_MISUSE
  comm.reduce_scatter(floats, doubles, tally::sum);
#endif
}
