// SPDX-License-Identifier: Apache-2.0
// Zero-copy's shares for private memory of processes of one host: the kernel reads and writes the other ranks' memory,
// so each byte is copied once on its way. Whether that is faster than staging is for measurements to say.
#pragma once

#include "zero_copy.hpp"

namespace tally::inline v0 {

struct SingleCopy : ZeroCopy {
  static constexpr std::string_view name = "single_copy";
};
template <>
inline constexpr Reach reach_of<SingleCopy> = Reach::kernel;

}  // namespace tally::inline v0
