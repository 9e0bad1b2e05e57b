// SPDX-License-Identifier: Apache-2.0
// What an account is made of: the parts of a time, and how long calls took.
#pragma once

#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "../energy/activity.hpp"
#include "../types.hpp"

namespace tally::inline v0 {

/// The time of one call, or of many. elapsed is exactly the sum of the nine parts.
struct AccountTimes {
  nanoseconds elapsed{}, exposed{};  // exposed: the caller was blocked
  nanoseconds copy{}, reduce{}, codec{}, protocol{};
  nanoseconds wait_arrival{}, wait_transfer{}, wait_credit{}, wait_local{}, undriven{};
  nanoseconds slept{};   // part of the waits: the thread was asleep
  nanoseconds queued{};  // part of the waits: the thread served other operations, and those pay for it

  nanoseconds busy() const { return copy + reduce + codec + protocol; }
  nanoseconds idle() const { return wait_arrival + wait_transfer + wait_credit + wait_local; }
  /// What its thread did, for its power: of the time in the queue others pay.
  ActivityTimes activities() const {
    ActivityTimes times;
    times[Activity::copy] = copy;
    times[Activity::reduce] = reduce;
    times[Activity::codec] = codec;
    times[Activity::protocol] = protocol;
    times[Activity::spin] = idle() - slept - queued;
    times[Activity::sleep] = slept;
    return times;
  }
};

/// Calls by how long they took: bucket i counts those with 2^(i-1) <= elapsed < 2^i nanoseconds (bucket 0: 0 ns).
inline constexpr std::size_t elapsed_buckets = 48;
using ElapsedHistogram = std::array<std::uint64_t, elapsed_buckets>;
constexpr std::size_t elapsed_bucket(nanoseconds elapsed) {
  const auto bucket = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(elapsed.count() > 0 ? elapsed.count() : 0)));
  return bucket < elapsed_buckets ? bucket : elapsed_buckets - 1;
}

}  // namespace tally::inline v0
