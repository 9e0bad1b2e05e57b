// SPDX-License-Identifier: Apache-2.0
// expect: is_commutative<.*' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<float> data) {
  const auto product = [](float a, float b) { return a * b; };
  comm.all_reduce(data, tally::commutative(product));
#ifdef TALLY_MISUSE
  comm.all_reduce(data, product);
#endif
}
