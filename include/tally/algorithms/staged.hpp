// SPDX-License-Identifier: Apache-2.0
// Zero-copy's shares for memory that other ranks cannot reach: they are done in blocks of shared memory through which
// the data goes piece by piece. Each rank's own part stays where it is, and results are written back to where the
// inputs were read, into lines that are at hand. (Compare "release-gather" of Jain, Kaleem, Balmana, Langer, Durnov,
// Sannikov and Garzarán, "Framework for scalable intra-node collective operations using shared memory", SC 2018.)
#pragma once

#include "zero_copy.hpp"

namespace tally::inline v0 {

struct Staged : ZeroCopy {
  static constexpr std::string_view name = "staged";
};
/// Not for other algorithms: staging.hpp relies on where zero-copy's shares lie.
template <>
inline constexpr Reach reach_of<Staged> = Reach::staged;

}  // namespace tally::inline v0
