// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of bytes that come in pieces: by the processor's own instruction where it has one,
// else eight bytes at a time by tables (Kounavis and Berry, "A systematic approach to building high performance software-based CRC
// generators", 2005).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tally::inline v0::detail {

/// Goes on from `crc`, 0 at first.
inline std::uint32_t crc32c_by_tables(std::uint32_t crc, const void* data, std::size_t bytes) {
  static const auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
      t[0][i] = c;
    }
    for (std::size_t k = 1; k < 8; ++k)
      for (std::size_t i = 0; i < 256; ++i) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 0xff];
    return t;
  }();
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t c = ~crc;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    word ^= c;
    c = 0;
    for (unsigned k = 0; k < 8; ++k) c ^= tables[7 - k][word >> (8 * k) & 0xff];
  }
  for (; bytes > 0; --bytes, ++at) c = c >> 8 ^ tables[0][(c ^ *at) & 0xff];
  return ~static_cast<std::uint32_t>(c);
}

#if defined(__x86_64__)
[[gnu::target("sse4.2")]] inline std::uint32_t crc32c_by_instruction(std::uint32_t crc, const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t c = ~crc;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    c = __builtin_ia32_crc32di(c, word);
  }
  auto low = static_cast<std::uint32_t>(c);
  for (; bytes > 0; --bytes, ++at) low = __builtin_ia32_crc32qi(low, *at);
  return ~low;
}
inline std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) {
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  return has_instruction ? crc32c_by_instruction(crc, data, bytes) : crc32c_by_tables(crc, data, bytes);
}
#else
inline std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) { return crc32c_by_tables(crc, data, bytes); }
#endif

}  // namespace tally::inline v0::detail
