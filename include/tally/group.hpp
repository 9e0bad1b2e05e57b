// SPDX-License-Identifier: Apache-2.0
// What ranks tell each other before they make communicators or memory together: what each of them asks for, from which
// all find out alike who belongs together, and who asks for something that does not fit. Plain data and pure functions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cost.hpp"
#include "text.hpp"
#include "topology.hpp"
#include "types.hpp"

namespace tally::inline v0 {

/// Communicator::split: this rank is to be in none of the new communicators. Any negative colour means that.
inline constexpr int no_colour = -1;

namespace detail {

enum class Making : std::uint8_t { duplicate, split, subset, allocate, table };
constexpr std::string_view name_of(Making what) {
  constexpr std::string_view names[] = {"duplicate", "split", "subset", "allocate", "a table"};
  return static_cast<std::size_t>(what) < std::size(names) ? names[static_cast<std::size_t>(what)] : "something unknown";
}

/// One rank's. What does not belong to what it makes is 0.
struct Wish {
  Making what{};
  ElementType type{};       // allocate
  std::uint8_t wrong = 0;   // subset: the list is no list of ranks. Later on: what was to be reserved could not be had
  std::uint8_t unused[5] = {};
  std::uint64_t count = 0;  // allocate: elements. subset: ranks
  std::uint64_t hash = 0;   // allocate: bytes of an element. subset: of the list. table: of its description
  std::int32_t colour = 0, key = 0;
  std::uint64_t token = 0;  // of what was reserved
  bool fits(const Wish& other) const { return type == other.type && count == other.count && hash == other.hash; }
};
static_assert(sizeof(Wish) == 40);

inline std::vector<Rank> all_of(int n) {
  std::vector<Rank> ranks;
  for (Rank r = 0; r < n; ++r) ranks.push_back(r);
  return ranks;
}
/// The ranks of this colour, by key and then by rank.
inline std::vector<Rank> of_colour(const std::vector<Wish>& all, std::int32_t colour) {
  std::vector<Rank> members;
  for (std::size_t r = 0; r < all.size(); ++r)
    if (all[r].colour == colour) members.push_back(static_cast<Rank>(r));
  std::ranges::stable_sort(members, {}, [&](Rank r) { return all[static_cast<std::size_t>(r)].key; });
  return members;
}

inline std::uint64_t hash_of(std::span<const Rank> ranks) { return hash_text({reinterpret_cast<const char*>(ranks.data()), ranks.size_bytes()}); }

/// Why these are no ranks of a group of n; empty if they are. Any n + 1 of them tell.
inline std::string problem_with(std::span<const Rank> ranks, int n) {
  if (ranks.empty()) return "the list of ranks is empty";
  std::vector<char> seen(static_cast<std::size_t>(n));
  for (const Rank r : ranks) {
    if (r < 0 || r >= n) return concat({r, " is not a rank; ranks are 0 to ", n - 1});
    if (seen[static_cast<std::size_t>(r)]++) return concat({"rank ", r, " is in the list twice"});
  }
  return {};
}
[[gnu::cold]] inline std::string list_text(std::span<const Rank> ranks) {
  constexpr std::size_t most = 64;
  std::string text = "{";
  for (std::size_t i = 0; i < std::min(ranks.size(), most); ++i) text += concat({i ? ", " : "", ranks[i]});
  return text + (ranks.size() > most ? ", ...}" : "}");
}

/// The first of their lines in which two texts differ, rank 0's and rank r's.
[[gnu::cold]] inline std::string difference(std::string_view first, std::string_view other, Rank r) {
  const auto line = [](std::string_view& text) {
    const std::string_view found = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), found.size() + 1));
    return found;
  };
  for (;;) {
    const std::string_view a = line(first), b = line(other);
    if (a != b || (first.empty() && other.empty())) return concat({"rank 0 has ", a.empty() ? "nothing more" : a, ", rank ", r, " has ", b.empty() ? "nothing more" : b});
  }
}

/// What the members choose algorithms by, of what all n ranks did.
[[gnu::cold]] inline CostModel model_within(CostModel model, int n, std::span<const Rank> members) {
  const int size = static_cast<int>(members.size());
  if (size == n && std::ranges::is_sorted(members)) return model;
  if (model.group > 0) {  // else the transport knows
    std::vector<Place> places;
    for (const Rank r : members) places.push_back({r / model.group, -1});
    model.group = group_of(places);
  }
  // Where ranks outnumber the cores, the others are at work in their own groups meanwhile.
  if (n > model.cores) model.cores = std::max(1, model.cores * size / n);
  return model;
}

}  // namespace detail

}  // namespace tally::inline v0
