// SPDX-License-Identifier: Apache-2.0
// Whether a sanitizer is at work: it makes code ten times slower and brings its own allocator.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TALLY_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TALLY_TEST_SANITIZED 1
#endif
#endif

namespace test {

#ifdef TALLY_TEST_SANITIZED
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

}  // namespace test
