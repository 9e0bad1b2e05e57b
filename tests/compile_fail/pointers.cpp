// SPDX-License-Identifier: Apache-2.0
// expect: !\(is_pointer_v<T>\) \[with T = int\*\]' evaluated to|!std::is_pointer_v<int \*>' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<std::uintptr_t> numbers, [[maybe_unused]] std::span<int*> pointers) {
  comm.broadcast(numbers, 0);
#ifdef TALLY_MISUSE
  comm.broadcast(pointers, 0);
#endif
}
