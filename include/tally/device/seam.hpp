// SPDX-License-Identifier: Apache-2.0
// What code that runs on a device asks of it: threads in blocks, words and packets that other ranks see at once, a clock. CUDA gives that
// (cuda.hpp), and threads of the host do in tests, so that the protocol is one text, and its races are found without a GPU.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TALLY_DEVICE __host__ __device__
#else
#define TALLY_DEVICE
#endif
/// Where a loop has to be unrolled for its arrays to be registers.
#if defined(__CUDA_ARCH__)
#define TALLY_UNROLL _Pragma("unroll")
#else
#define TALLY_UNROLL
#endif

namespace tally::inline v0::device {

inline constexpr int most_ranks = 128;

/// Eight bytes of data, each half beside the number of the operation that it belongs to. A half is stored and loaded at once, so who finds
/// the number has the data: no flag, no fence, at the price of twice the bytes. ("LL" of NCCL, Jeaugey, GTC 2019; MSCCL++'s LL packets.)
struct alignas(16) Packet {
  std::uint32_t low = 0, low_epoch = 0, high = 0, high_epoch = 0;
  TALLY_DEVICE constexpr bool is_of(std::uint32_t epoch) const { return low_epoch == epoch && high_epoch == epoch; }
  TALLY_DEVICE constexpr std::uint64_t data() const { return std::uint64_t{high} << 32 | low; }
  TALLY_DEVICE static constexpr Packet of(std::uint64_t data, std::uint32_t epoch) { return {static_cast<std::uint32_t>(data), epoch, static_cast<std::uint32_t>(data >> 32), epoch}; }
};

/// What the threads of a block share; Session gives it its values.
struct BlockShared {
  std::uint32_t failure;  // none yet: 0
  std::uint32_t broken;   // why it is over, and for whom it waited then
  std::uint32_t polls;
  std::uint64_t entered;           // when the operation began
  std::uint64_t theirs;            // of a call that is another one: its fingerprint
  std::uint64_t seen[most_ranks];     // when each rank was found to be here; 0: nobody had to wait for it
  std::uint64_t arrival[most_ranks];  // what each rank was waited for, where that is added up: until it had come,
  std::uint64_t transfer[most_ranks];  // and after that
  std::uint64_t heard[most_ranks];     // what each rank had waited for others when it was heard of last
  std::int32_t last, last_to_close;
  std::uint64_t move[3];  // what all threads do next, where one decides
};

/// A block of threads, as each of them sees it. All call the same functions in the same order.
template <class B>
concept Block = requires(B& b, const B& c, std::uint32_t* word, const std::uint32_t* read, std::uint32_t value, std::uint64_t& time, Packet* to, const Packet* from, Packet packet) {
  { c.thread() } -> std::same_as<int>;
  { c.threads() } -> std::same_as<int>;
  { c.index() } -> std::same_as<int>;   // among this rank's blocks
  { c.blocks() } -> std::same_as<int>;
  { b.shared() } -> std::same_as<BlockShared&>;
  b.sync();                             // all threads of the block have come this far; what they wrote before, all see
  { b.any(true) } -> std::same_as<bool>;  // likewise, and whether any of them said so
  { B::load(read) } -> std::same_as<std::uint32_t>;  // and everything that was written before what it finds
  B::store(word, value);                // after everything that was written before, by this thread or others before a sync()
  B::note(time, time), B::note(*word, value);  // at once, and orders nothing
  { B::noted(time) } -> std::same_as<std::uint64_t>;
  { B::load_packet(from) } -> std::same_as<Packet>;  // each half at once; orders nothing
  B::store_packet(to, packet);
  { B::now() } -> std::same_as<std::uint64_t>;       // nanoseconds
  B::pause(value);                      // after so many looks in vain
};

}  // namespace tally::inline v0::device
