// SPDX-License-Identifier: Apache-2.0
// Which ranks are close to each other: they share a host, a socket or a cache. Groups are numbered in the order of
// their first ranks, and a group's members in the order of ranks. Mostly so many consecutive ranks are one; where
// they are not, or hosts have different numbers of ranks, a partition says who is where.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

namespace tally::inline v0 {

/// Ranks by the place that each of them is at, however places are numbered.
class Partition {
 public:
  explicit Partition(std::span<const std::uint64_t> places) : of_(places.size()), number_(places.size()) {
    std::map<std::uint64_t, std::size_t> known;
    std::vector<std::vector<int>> groups;
    for (std::size_t r = 0; r < places.size(); ++r) {
      const std::size_t group = known.emplace(places[r], known.size()).first->second;
      if (group == groups.size()) groups.emplace_back();
      of_[r] = static_cast<int>(group);
      number_[r] = static_cast<int>(groups[group].size());
      groups[group].push_back(static_cast<int>(r));
    }
    for (const auto& group : groups) {
      first_.push_back(members_.size());
      members_.insert(members_.end(), group.begin(), group.end());
    }
    first_.push_back(members_.size());
  }

  int count() const { return static_cast<int>(first_.size()) - 1; }
  int of(int rank) const { return of_[static_cast<std::size_t>(rank)]; }
  int number(int rank) const { return number_[static_cast<std::size_t>(rank)]; }
  int largest() const {
    int most = 0;
    for (int group = 0; group < count(); ++group) most = std::max(most, static_cast<int>(members(group).size()));
    return most;
  }
  std::span<const int> members(int group) const { return std::span(members_).subspan(first_[static_cast<std::size_t>(group)], first_[static_cast<std::size_t>(group) + 1] - first_[static_cast<std::size_t>(group)]); }

 private:
  std::vector<int> of_, number_, members_;  // members of all groups, one group after another
  std::vector<std::size_t> first_;
};

/// What an algorithm is told of it. A value: whoever made it of a partition keeps that.
class Grouping {
 public:
  /// So many consecutive ranks each, from rank 0 on; the last group may be smaller. 1: nobody is close to another.
  constexpr Grouping(int width = 1) : width_(width > 1 ? width : 1) {}
  constexpr explicit Grouping(const Partition& list) : list_(&list) {}

  int of(int rank) const { return list_ ? list_->of(rank) : rank / width_; }
  int number(int rank) const { return list_ ? list_->number(rank) : rank % width_; }
  int member(int group, int number) const { return list_ ? list_->members(group)[static_cast<std::size_t>(number)] : group * width_ + number; }
  // Of n ranks:
  int count(int n) const { return list_ ? list_->count() : (n + width_ - 1) / width_; }
  int size(int group, int n) const { return list_ ? static_cast<int>(list_->members(group).size()) : std::min(width_, n - group * width_); }
  int largest(int n) const { return list_ ? list_->largest() : std::min(width_, n); }
  /// Something is known of who is close to whom.
  bool is_known() const { return list_ || width_ > 1; }
  /// There are several groups, and some of several ranks.
  bool matters(int n) const { return count(n) > 1 && count(n) < n; }

  friend bool operator==(const Grouping&, const Grouping&) = default;

 private:
  int width_ = 1;
  const Partition* list_ = nullptr;
};

}  // namespace tally::inline v0
