// SPDX-License-Identifier: Apache-2.0
// For memory that every rank can load and store: nothing is sent, each rank takes one share of the data, reads it
// from everyone and writes the result to everyone. Each byte is read once and written once per place it belongs
// to, which is the least there is. Two-shot in the words of GPU libraries ("RSxLD_AGxST" of NCCL's symmetric kernels).
#pragma once

#include "../steps.hpp"

namespace tally::inline v0 {

struct ZeroCopy {
  static constexpr std::string_view name = "zero_copy";
  static constexpr Folding folding = Folding::fixed;

  static Share all_reduce(Shape shape) { return {shape.in[shape.me], shape.out[shape.me]}; }
  static Share reduce(Shape shape) {
    const Range mine = shape.in[shape.me];
    return {mine, {Buffer::output, mine.first, mine.count}, -1, shape.root};
  }
  static Share reduce_scatter(Shape shape) { return {shape.in[shape.me], shape.out.all(), -1, shape.me}; }
  static Share all_gather(Shape shape) { return {shape.in.all(), shape.out[shape.me], shape.me, -1}; }
  static Share broadcast(Shape shape) { return {shape.out[shape.me], shape.out[shape.me], shape.root, -1}; }
};

}  // namespace tally::inline v0
