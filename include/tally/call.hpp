// SPDX-License-Identifier: Apache-2.0
// One call of a collective as the engine sees it: no element type, only bytes, a fold and a layout. And its
// fingerprint, which travels in the first frame to each peer, so that calls that do not match are named.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "memory.hpp"
#include "reduce.hpp"
#include "steps.hpp"
#include "text.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// An algorithm for one operation: a generator of steps, or a rank's share of memory that all can reach.
struct AlgorithmRef {
  std::string_view name;
  Steps (*generate)(Shape) = nullptr;
  Share (*share)(Shape) = nullptr;
  std::uint8_t code = 0;  // 6 bits, the same on all ranks
  Reach reach{};  // of a share
  Folding folding{};
  constexpr bool is(Reach which) const { return share && reach == which; }
  constexpr explicit operator bool() const { return generate || share; }
};

/// One of many small buffers that a call works on as if they were one. Null where nothing is read or written.
struct Part {
  const std::byte* in;
  std::byte* out;
  std::size_t first, count;  // its elements among those of the call
};

struct Call {
  Layout layout;
  std::size_t size = 0;  // in bytes: what it is accounted by, and chosen
  std::uint64_t fingerprint = 0;  // 0: not worked out yet
  AlgorithmRef algorithm;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  ElementType type = ElementType::none;
  std::uint16_t grain = 1;  // sizeof the element
  std::uint16_t operator_code = 0;
  bool named = false;        // the caller wants this algorithm
  std::uint8_t need = 0;     // what it asks of algorithms: Need::index()
  std::uint16_t parts = 0;   // of a group: a hash of its parts' sizes
  Fold fold;
  void (*finish)(void* data, std::size_t count, int n) = nullptr;  // applied to the result, for mean
  ScaleFunction scale = nullptr;                                   // applied to the input, for premultiplied_sum
  nanoseconds timeout{};
  const SymmetricMemory* input_memory = nullptr;  // where the buffers are symmetric
  const SymmetricMemory* output_memory = nullptr;
  std::span<const Part> scattered = {};  // the caller's buffers: staged shares work on them, for others input and output are one to pack them into
  void* pinned = nullptr;  // what the engine's pin() gave for this call

  bool is_scattered() const { return !scattered.empty() && algorithm.is(Reach::staged) && !scale; }
  bool packs() const { return !scattered.empty() && !is_scattered(); }
  void pack() const {
    std::byte* const to = input ? const_cast<std::byte*>(input) : output;
    for (const Part& part : scattered)
      if (part.in && part.count > 0) std::memcpy(to + (part.first - scattered[0].first) * grain, part.in, part.count * grain);
  }
  void unpack() const {
    for (const Part& part : scattered)
      if (part.out && part.count > 0) std::memcpy(part.out, output + (part.first - scattered[0].first) * grain, part.count * grain);
  }
  /// Whether this rank hears, directly or through others, when each other one came.
  bool hears_all() const {
    if (algorithm.share || layout.n <= 2) return true;
    switch (uniform(layout.operation)) {
      case Collective::reduce:
      case Collective::gather: return layout.me == layout.root;
      case Collective::scan:
      case Collective::exclusive_scan: return layout.me == layout.n - 1;
      case Collective::broadcast:
      case Collective::scatter:
      case Collective::neighbour_exchange: return false;
      default: return true;
    }
  }
  /// The user's memory; a barrier has none.
  std::span<const std::byte> input_bytes() const { return {input, input && layout.operation != Collective::barrier ? layout.input_count() * grain : 0}; }
  std::span<const std::byte> output_bytes() const { return {output, output && layout.operation != Collective::barrier ? layout.output_count() * grain : 0}; }
};

/// A message to or from another rank.
struct Message {
  bool is_send = false;
  Rank peer = 0;
  int tag = 0;  // -1, to receive: any
  std::byte* data = nullptr;  // only read of a send
  std::size_t bytes = 0;
  ElementType type = ElementType::none;
  std::uint16_t grain = 1;
  nanoseconds timeout{};
};

namespace detail {

/// operation 6, type 6, operator 12, root 16, algorithm 6, flags 2 (group), count (hashed) 16 bits.
struct Fingerprint {
  Collective operation{};
  ElementType type{};
  std::uint16_t op = 0, root = 0;
  std::uint8_t algorithm = 0;
  bool group = false;  // of several operations
  std::uint16_t count_hash = 0;

  static constexpr std::uint16_t hash_count(std::size_t count) { return static_cast<std::uint16_t>((count * 0x9e3779b97f4a7c15u) >> 48); }
  static constexpr Fingerprint of(const Call& call) {
    return {call.layout.operation, call.type, call.operator_code, static_cast<std::uint16_t>(call.layout.root), call.algorithm.code, call.parts != 0, call.parts != 0 ? call.parts : hash_count(agreed_count(call))};
  }
  /// What all ranks have to agree on; where sizes differ the two ends of a message find out.
  static constexpr std::size_t agreed_count(const Call& call) { return call.layout.extents ? 0 : call.layout.count; }
  /// Of a message: what a receive is told from others by. Its type travels apart, so that a wrong one is seen.
  static constexpr std::uint64_t of_tag(int tag, Collective what = Collective::send) { return static_cast<std::uint64_t>(what) << 58 | static_cast<std::uint32_t>(tag); }
  constexpr std::uint64_t pack() const {
    return static_cast<std::uint64_t>(operation) << 58 | static_cast<std::uint64_t>(type) << 52 | static_cast<std::uint64_t>(op & 0xfff) << 40 |
           static_cast<std::uint64_t>(root) << 24 | static_cast<std::uint64_t>(algorithm & 0x3f) << 18 | static_cast<std::uint64_t>(group) << 16 | count_hash;
  }
  static constexpr Fingerprint unpack(std::uint64_t bits) {
    return {static_cast<Collective>(bits >> 58),           static_cast<ElementType>(bits >> 52 & 0x3f), static_cast<std::uint16_t>(bits >> 40 & 0xfff),
            static_cast<std::uint16_t>(bits >> 24 & 0xffff), static_cast<std::uint8_t>(bits >> 18 & 0x3f), (bits >> 16 & 1) != 0, static_cast<std::uint16_t>(bits & 0xffff)};
  }
};

/// A name's place is its code on the wire: append only, and stay below the 24 where users' algorithms begin.
inline constexpr std::string_view algorithm_names[] = {"auto", "ring", "tree", "recursive_doubling", "one_shot", "recursive_halving", "two_shot", "chain", "double_tree", "zero_copy", "staged", "single_copy", "hierarchical", "pairwise", "bruck", "hierarchical_halving", "packets"};
static_assert(std::size(algorithm_names) <= 24);

/// 6 bits that name an algorithm to peers.
constexpr std::uint8_t algorithm_code(std::string_view name) {
  for (std::uint8_t i = 1; i < std::size(algorithm_names); ++i)
    if (algorithm_names[i] == name) return i;
  return static_cast<std::uint8_t>(24 + hash_text(name) % 40);
}

/// e.g. "reduce(float32 x 100, sum, root 2, tree)". `count` is exact only where the fingerprint's hash agrees.
[[gnu::cold]] inline std::string describe(std::uint64_t bits, std::uint64_t count) {
  const Fingerprint f = Fingerprint::unpack(bits);
  if (f.operation == Collective::none) return "nothing";
  const std::string algorithm = f.algorithm < std::size(algorithm_names) ? std::string(algorithm_names[f.algorithm]) : concat({"user algorithm #", f.algorithm});
  if (f.operation == Collective::send || f.operation == Collective::receive) {
    const auto tag = static_cast<std::int32_t>(bits);
    return concat({name_of(f.operation), "(", count, " bytes, tag ", tag < 0 ? Piece("any") : Piece(tag), ")"});
  }
  if (f.operation == Collective::barrier) return concat({name_of(f.operation), "(", algorithm, ")"});
  if (f.type == ElementType::membership) return "split, subset, duplicate or allocate";
  const std::string parts = f.group ? concat({"a group of sizes, ", count, " in all"}) : "";
  const Piece elements = f.group ? Piece(parts) : Fingerprint::hash_count(count) == f.count_hash ? Piece(count) : "another count";
  const std::string folded = reduces(f.operation) ? concat({", ", operator_text(f.op)}) : "", from = has_root(f.operation) ? concat({", root ", f.root}) : "";
  if (sizes_differ(f.operation)) return concat({name_of(f.operation), "(", name_of(f.type), folded, from, ", ", algorithm, ")"});
  return concat({name_of(f.operation), "(", name_of(f.type), " x ", elements, folded, from, ", ", algorithm, ")"});
}

}  // namespace detail

}  // namespace tally::inline v0
