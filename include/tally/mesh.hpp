// SPDX-License-Identifier: Apache-2.0
// Ranks as the points of a grid with named axes: parallel training divides its work among them in several ways at once,
// by data, by tensor, by pipeline. Hides the communicators along each axis, and says what each axis cost.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iomanip>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "communicator.hpp"

namespace tally::inline v0 {

struct MeshAxis {
  std::string name;
  int extent = 1;
};

/// What this rank spent in the calls along one axis.
struct AxisTotals {
  std::uint64_t calls = 0, bytes = 0, bytes_sent = 0, bytes_received = 0;  // bytes: of the caller's data
  nanoseconds time{}, busy{}, idle{};
  Quantity joules, idle_joules;  // as good as the least of their parts
};

/// All ranks of a communicator as a grid, row by row: the last axis varies fastest. Along each axis there is a
/// communicator of the ranks that differ in nothing else; a rank's coordinate is its rank in it.
class Mesh {
 public:
  /// Collective. Errors are the same on all ranks, and leave `comm` as it was.
  Mesh(Communicator& comm, std::vector<MeshAxis> axes) : axes_(std::move(axes)), rank_(comm.rank()), size_(comm.size()) {
    expect_same(comm);
    if (const std::string problem = problem_with_axes(); !problem.empty()) throw Error(Errc::invalid_argument, {"mesh: ", problem});
    coordinates_.resize(axes_.size());
    for (std::size_t a = axes_.size(), rest = static_cast<std::size_t>(rank_); a-- > 0; rest /= static_cast<std::size_t>(axes_[a].extent)) coordinates_[a] = static_cast<int>(rest % static_cast<std::size_t>(axes_[a].extent));
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      std::vector<int> first = coordinates_;
      first[a] = 0;
      along_.push_back(*comm.split(rank_at(first), coordinates_[a]));
    }
  }

  Rank rank() const { return rank_; }
  int size() const { return size_; }
  const std::vector<MeshAxis>& axes() const { return axes_; }
  /// The ranks that differ from this one in that axis only. Unknown names are Errc::invalid_argument.
  Communicator& axis(std::string_view name) { return along_[find(name)]; }
  const Communicator& axis(std::string_view name) const { return along_[find(name)]; }
  int coordinate(std::string_view name) const { return coordinates_[find(name)]; }
  /// The rank with these coordinates, in the order of the axes.
  Rank rank_at(std::span<const int> coordinates) const {
    if (coordinates.size() != axes_.size()) throw Error(Errc::invalid_argument, {"mesh: ", coordinates.size(), " coordinates for ", axes_.size(), " axes"});
    Rank rank = 0;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      if (coordinates[a] < 0 || coordinates[a] >= axes_[a].extent) throw Error(Errc::invalid_argument, {"mesh: ", coordinates[a], " is not a place on axis ", axes_[a].name, ", which has 0 to ", axes_[a].extent - 1});
      rank = rank * axes_[a].extent + coordinates[a];
    }
    return rank;
  }
  Rank rank_at(std::initializer_list<int> coordinates) const { return rank_at(std::span(coordinates.begin(), coordinates.size())); }

  /// Of all calls along the axis so far, as this rank saw them.
  AxisTotals totals(std::string_view name) const {
    const Ledger& ledger = axis(name).ledger();
    AxisTotals totals;
    totals.joules = totals.idle_joules = ledger.energy({});  // nothing, or unknown
    for (const LedgerRow& row : ledger.rows()) {
      totals.calls += row.calls;
      totals.bytes += row.bytes;
      totals.bytes_sent += row.bytes_sent;
      totals.bytes_received += row.bytes_received;
      totals.time += row.elapsed;
      totals.busy += row.busy();
      totals.idle += row.idle();
      totals.joules = totals.joules + ledger.energy(row);
      totals.idle_joules = totals.idle_joules + ledger.idle_energy(row);
    }
    return totals;
  }
  /// e.g. "data 2 x tensor 4"
  std::string text() const {
    std::string text;
    for (const MeshAxis& axis : axes_) text += detail::concat({text.empty() ? "" : " x ", axis.name, " ", axis.extent});
    return text;
  }

 private:
  void expect_same(Communicator& comm) const {
    std::string named;
    for (const MeshAxis& axis : axes_) named += detail::concat({axis.name.size(), " ", axis.name, " ", axis.extent, ","});
    const std::uint64_t mine = detail::hash_text(named);
    std::vector<std::uint64_t> all(static_cast<std::size_t>(size_));
    comm.all_gather(std::span(&mine, 1), all);
    for (Rank r = 1; r < size_; ++r)
      if (all[static_cast<std::size_t>(r)] != all[0]) throw Error(Errc::mismatch, {"mesh: rank ", r, " has other axes than rank 0; rank ", rank_, " has ", text()}, {rank_, r == rank_ ? 0 : r, 0, {}});
  }
  std::string problem_with_axes() const {
    if (axes_.empty()) return "it has no axes";
    std::int64_t ranks = 1;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      const MeshAxis& axis = axes_[a];
      if (axis.name.empty()) return detail::concat({"axis ", a, " has no name"});
      for (std::size_t earlier = 0; earlier < a; ++earlier)
        if (axes_[earlier].name == axis.name) return detail::concat({"two axes are called '", axis.name, "'"});
      if (axis.extent < 1) return detail::concat({"axis ", axis.name, " has extent ", axis.extent});
      ranks = std::min(ranks, std::int64_t{1} << 31) * axis.extent;  // never overflows
    }
    if (ranks != size_) return detail::concat({text(), " are ", ranks, " ranks, the communicator has ", size_});
    return {};
  }
  std::size_t find(std::string_view name) const {
    std::string known;
    for (std::size_t a = 0; a < axes_.size(); ++a) {
      if (axes_[a].name == name) return a;
      known += detail::concat({a ? ", " : "", axes_[a].name});
    }
    throw Error(Errc::invalid_argument, {"mesh: no axis is called '", name, "'; there are ", known});
  }

  std::vector<MeshAxis> axes_;
  Rank rank_;
  int size_;
  std::vector<int> coordinates_;
  std::vector<Communicator> along_;
};

/// A table, one line per axis, as seen by this rank.
inline std::ostream& operator<<(std::ostream& out, const Mesh& mesh) {
  using detail::bytes_text, detail::concat, detail::joules_text, detail::time_text;
  const auto line = [&](const std::array<std::string, 9>& cells) {
    static constexpr int widths[] = {14, 7, 6, 9, 10, 10, 10, 10, 0};
    for (std::size_t i = 0; i < cells.size(); ++i) out << (i == 0 ? std::left : std::right) << std::setw(widths[i]) << cells[i] << (i + 2 < cells.size() ? " " : i + 1 < cells.size() ? "  " : "");
    out << '\n';
  };
  out << "mesh of " << mesh.size() << " ranks: " << mesh.text() << "; rank " << mesh.rank() << '\n';
  line({"axis", "extent", "here", "calls", "bytes", "time", "busy", "idle", "joules (of which idle), source"});
  for (const MeshAxis& axis : mesh.axes()) {
    const AxisTotals totals = mesh.totals(axis.name);
    std::string joules = joules_text(totals.joules);
    if (totals.joules.known()) joules += concat({" (", joules_text(totals.idle_joules), "), ", name_of(totals.joules.provenance)});
    line({axis.name, concat({axis.extent}), concat({mesh.coordinate(axis.name)}), concat({totals.calls}), bytes_text(totals.bytes), time_text(totals.time), time_text(totals.busy), time_text(totals.idle), joules});
  }
  return out;
}

}  // namespace tally::inline v0
