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
  static Share gather(Shape shape) { return {shape.in.all(), block(Buffer::output, shape.me, shape.in.count()), shape.me, shape.root}; }
  static Share scatter(Shape shape) { return {block(Buffer::input, shape.me, shape.out.count()), shape.out.all(), shape.root, shape.me}; }
  static Share all_to_all(Shape shape) { return {shape.in[shape.me], shape.out[0], -1, shape.me, Share::Way::exchange}; }
  static Share scan(Shape shape) { return {shape.in[shape.me], shape.out[shape.me], -1, -1, Share::Way::scan}; }
  static Share exclusive_scan(Shape shape) {
    const Range mine = shape.in[shape.me];
    return {mine, {Buffer::output, mine.first, mine.count}, -1, -1, Share::Way::exclusive_scan};
  }

 private:
  /// Of a buffer that this rank does not have itself.
  static Range block(Buffer buffer, Rank which, std::size_t count) { return {buffer, static_cast<std::size_t>(which) * count, count}; }
};

/// The same for memory that other ranks cannot reach, in blocks of shared memory through which the data goes piece by
/// piece. Each rank's own part stays where it is, and results are written back to where the inputs were read, into lines
/// that are at hand. (Compare "release-gather" of Jain, Kaleem, Balmana, Langer, Durnov, Sannikov and Garzarán,
/// "Framework for scalable intra-node collective operations using shared memory", SC 2018.)
struct Staged : ZeroCopy {
  static constexpr std::string_view name = "staged";
};
template <>
inline constexpr Reach reach_of<Staged> = Reach::staged;  // staging.hpp relies on where these shares lie

/// The same for private memory of processes of one host: the kernel reads and writes the other ranks' memory, so each
/// byte is copied once on its way. Whether that is faster than staging is for measurements to say.
struct SingleCopy : ZeroCopy {
  static constexpr std::string_view name = "single_copy";
};
template <>
inline constexpr Reach reach_of<SingleCopy> = Reach::kernel;

}  // namespace tally::inline v0
