// SPDX-License-Identifier: Apache-2.0
// Copying what will have left the caches before anybody looks at it: stores that go past them, so that the lines they
// fill need not be read first. That saves a third of what memory has to move.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tally::inline v0 {

/// As memcpy; on return every core sees the bytes.
inline void copy_past_caches(std::byte* to, const std::byte* from, std::size_t bytes) {
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they do not see such stores
  using Vector [[gnu::vector_size(16), gnu::may_alias]] = long long;  // whatever the elements are
  constexpr std::size_t line = 64;
  const std::size_t lead = std::min(bytes, (line - reinterpret_cast<std::uintptr_t>(to) % line) % line);
  std::memcpy(to, from, lead);
  to += lead, from += lead, bytes -= lead;
  for (; bytes >= line; to += line, from += line, bytes -= line) {
    Vector a, b, c, d;  // not an array: that would be filled at once by a wider load, by way of the stack
    std::memcpy(&a, from, sizeof a), std::memcpy(&b, from + 16, sizeof b), std::memcpy(&c, from + 32, sizeof c), std::memcpy(&d, from + 48, sizeof d);
    Vector* const out = reinterpret_cast<Vector*>(to);
    asm volatile("movntdq %1, %0" : "=m"(out[0]) : "x"(a));
    asm volatile("movntdq %1, %0" : "=m"(out[1]) : "x"(b));
    asm volatile("movntdq %1, %0" : "=m"(out[2]) : "x"(c));
    asm volatile("movntdq %1, %0" : "=m"(out[3]) : "x"(d));
  }
  asm volatile("sfence" : : : "memory");
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace tally::inline v0
