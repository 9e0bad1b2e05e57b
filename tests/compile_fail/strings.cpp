// SPDX-License-Identifier: Apache-2.0
// expect: is_trivially_copyable_v<.*basic_string<char.*' evaluated to
#include <tally/tally.hpp>

void f(tally::Communicator& comm, std::span<std::byte> bytes, [[maybe_unused]] std::span<std::string> strings) {
  comm.broadcast(bytes, 0);
#ifdef TALLY_MISUSE
  comm.broadcast(strings, 0);
#endif
}
