// SPDX-License-Identifier: Apache-2.0
// The pictures of the HTML report, as SVG: who waited for whom, the recent calls of each rank, watts over time, and how long
// calls took. Each draws a bounded number of things, whatever the size of the job, and says what it left out.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../figures.hpp"
#include "../text.hpp"
#include "html_text.hpp"
#include "job.hpp"

namespace tally::inline v0 {
namespace detail {

/// Nanoseconds as a double: what comes from a file may be too large to be added up as integers.
inline double ns(nanoseconds t) { return static_cast<double>(t.count()); }
inline std::string ns_text(double t) { return time_text(nanoseconds(static_cast<std::int64_t>(std::clamp(t, -9e18, 9e18)))); }

inline void begin_svg(Html& html, std::string_view id, std::string_view classes, double width, double height, std::string_view title, std::string_view description, bool fixed = false) {
  html.add({"<svg class=\"chart ", classes, "\" id=\"", id, "\" viewBox=\"0 0 ", decimal(width), " ", decimal(height), "\" role=\"img\" aria-labelledby=\"", id, "-t ", id, "-d\""});
  if (fixed) html.add({" style=\"max-width:", decimal(width), "px;min-width:", decimal(std::min(width, 300.0)), "px\""});
  html.add({"><title id=\"", id, "-t\">", title, "</title><desc id=\"", id, "-d\">", typeset(description), "</desc>\n"});
}
inline void svg_rect(Html& html, std::string_view classes, double x, double y, double width, double height) {
  html.add({"<rect class=\"", classes, "\" x=\"", decimal(x), "\" y=\"", decimal(y), "\" width=\"", decimal(width), "\" height=\"", decimal(height), "\"/>"});
}
inline void svg_text(Html& html, std::string_view classes, double x, double y, std::string_view text) {
  html.add({"<text class=\"", classes, "\" x=\"", decimal(x), "\" y=\"", decimal(y), "\">", typeset(text), "</text>"});
}
inline void svg_line(Html& html, std::string_view classes, double x1, double y1, double x2, double y2) {
  html.add({"<line class=\"", classes, "\" x1=\"", decimal(x1), "\" y1=\"", decimal(y1), "\" x2=\"", decimal(x2), "\" y2=\"", decimal(y2), "\"/>"});
}

/// 1, 2 or 5 times a power of ten, so that `range` has at most `most` of them.
inline double nice_step(double range, int most) {
  if (!(range > 0) || !std::isfinite(range)) return 1;
  const double power = std::pow(10, std::floor(std::log10(range / most)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (range / (power * factor) <= most) return power * factor;
  return 10 * power;
}

/// Who waited for whom, cell by cell or, for more than `most` ranks, in blocks.
inline void draw_waits(Html& html, const JobAccount& job, std::span<const Rank> culprits, int most) {
  const int n = job.size, per_block = (n + most - 1) / most, blocks = (n + per_block - 1) / per_block;
  const auto name = [&](int block) {
    const int first = block * per_block, last = std::min(n, first + per_block) - 1;
    return first == last ? concat({first}) : concat({first, "-", last});
  };
  struct Cell {
    nanoseconds arrival{}, transfer{}, credit{}, charged{};
    Quantity energy;
    bool any = false;
    nanoseconds total() const { return arrival + transfer + credit; }
  };
  std::vector<Cell> cells(static_cast<std::size_t>(blocks) * static_cast<std::size_t>(blocks));
  for (Rank waiting = 0; waiting < n; ++waiting)
    for (Rank culprit = 0; culprit < n; ++culprit) {
      const WaitCell& from = job.resolved_wait(waiting, culprit);
      Cell& to = cells[static_cast<std::size_t>(waiting / per_block * blocks + culprit / per_block)];
      to.charged += job.wait(waiting, culprit).total();
      if (from.total() <= nanoseconds{0}) continue;
      to.arrival += from.arrival, to.transfer += from.transfer, to.credit += from.credit;
      to.energy = std::exchange(to.any, true) ? to.energy + from.energy : from.energy;
    }
  double largest = 0;
  for (const Cell& cell : cells) largest = std::max(largest, ns(cell.total()));

  const double label = 7.0 * static_cast<double>(name(blocks - 1).size()), left = 40 + label, top = 44, side = std::clamp(600.0 / blocks, 9.0, 62.0), size = side * blocks;
  const std::string most_text = ns_text(largest);
  html.add({"<ul class=\"legend\"><li><i class=\"scale\"></i>none to ", typeset(most_text), " (a quarter of that at half the shade)</li><li><i class=\"none\"></i>did not wait</li></ul>\n"});
  html.add({"<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"wait matrix\">"});
  begin_svg(html, "matrix-svg", "", left + size + 8 + label / 2, top + size + 8, "Who waited for whom",
            concat({"A square of ", blocks, " by ", blocks, ": each row is ", per_block > 1 ? "a block of ranks" : "a rank", " that waited, each column ", per_block > 1 ? "those" : "the one", " it waited for. The strongest cell is ", most_text, "."}), true);
  svg_text(html, "c m", left + size / 2, 14, per_block > 1 ? "for these ranks" : "for this rank");
  html.add({"<text class=\"c m\" transform=\"translate(14 ", decimal(top + size / 2), ") rotate(-90)\">", per_block > 1 ? "these ranks waited" : "this rank waited", "</text>\n"});
  svg_rect(html, "frame", left, top, size, size);
  // As many labels as have room; a culprit's comes before those beside it.
  const auto is_culprit = [&](int b) { return std::any_of(culprits.begin(), culprits.end(), [&](Rank r) { return r / per_block == b; }); };
  const auto has_label = [&](int b, double room) {
    const int every = std::max(1, static_cast<int>(std::ceil(room / side)));
    for (int d = 1; d < every; ++d)
      if (is_culprit(b - d) || is_culprit(b + d)) return is_culprit(b);
    return b % every == 0 || is_culprit(b);
  };
  for (int b = 0; b < blocks; ++b) {
    const double middle = (b + 0.5) * side;
    if (has_label(b, 14)) svg_text(html, is_culprit(b) ? "r s" : "r", left - 6, top + middle + 4, name(b));
    if (has_label(b, label + 8)) svg_text(html, is_culprit(b) ? "c s" : "c", left + middle, top - 6, name(b));
  }
  html.add({"\n"});
  for (int row = 0; row < blocks; ++row)
    for (int column = 0; column < blocks; ++column) {
      const Cell& cell = cells[static_cast<std::size_t>(row * blocks + column)];
      const double x = left + column * side, y = top + row * side;
      if (row == column && per_block == 1) svg_rect(html, "self", x, y, side, side);
      if (cell.total() <= nanoseconds{0}) continue;
      const int shade = static_cast<int>(std::lround(100 * std::sqrt(ns(cell.total()) / largest)));
      html.add({"<rect class=\"cell\" data-w=\"", row, "\" data-c=\"", column, "\" x=\"", decimal(x), "\" y=\"", decimal(y), "\" width=\"", decimal(side - 0.6), "\" height=\"", decimal(side - 0.6), "\" fill-opacity=\"",
                shade >= 100 ? "1" : concat({shade < 10 ? ".0" : ".", shade}), "\"><title>"});
      std::string tip = concat({per_block > 1 ? "Ranks " : "Rank ", name(row), " waited ", time_text(cell.total()), " for ", per_block > 1 ? "ranks " : "rank ", name(column), ": arrival ", time_text(cell.arrival), ", transfer ", time_text(cell.transfer), ", credit ", time_text(cell.credit)});
      if (cell.charged != cell.total()) tip += concat({" (as its calls charged it: ", time_text(cell.charged), ")"});
      html.add({typeset(concat({tip, "; ", joules_text(cell.energy)})), "</title></rect>"});
      if (side >= 50) svg_text(html, shade > 50 ? "v on" : "v", x + side / 2, y + side / 2 + 4, time_text(cell.total()));
    }
  html.add({"</svg></div>\n<p class=\"readout js\" hidden aria-live=\"polite\">Point at a cell to read it.</p>\n"});
  if (per_block > 1) html.add({"<p class=\"lead\" data-left-out=\"matrix\">", n, " ranks are too many to draw each: a cell sums up ", per_block, " ranks by ", per_block, ". The table of all ranks has each one.</p>\n"});
}

/// Calls of the ranks' recent past, on rank 0's clock.
class Timeline {
 public:
  Timeline(const JobAccount& job, std::span<const Account> accounts, int most_lanes, int most_calls) : job_(job), accounts_(accounts), most_lanes_(most_lanes), most_calls_(most_calls) {}

  void draw(Html& html) {
    choose_ranks();
    gather();
    if (calls_.empty()) {
      html.add({"<p class=\"unknown\">No recent calls were kept, or they were not timed.</p>\n"});
      return;
    }
    lay_out();
    draw_legend(html);
    html.add({"<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"timeline\">"});
    const double height = bottom() + 26;
    begin_svg(html, "timeline-svg", "wide", width, height, "Recent calls of each rank",
              concat({"One lane per rank over ", ns_text(last_ - first_), "; each bar is a call, its parts coloured by what the rank did. Arrows lead from a late rank to those that waited for it."}));
    html.add({"<defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path class=\"head\" d=\"M0 0L8 4L0 8z\"/></marker></defs>\n"});
    draw_axis(html);
    for (const Call& call : calls_) draw_call(html, call);
    draw_arrows(html);
    html.add({"</svg></div>\n<p class=\"readout js\" hidden aria-live=\"polite\">Point at a call to read it.</p>\n"});
    draw_notes(html);
  }

 private:
  struct Call {
    double begin, end;
    int lane;
    const Account* account;
    const AccountEvent* event;
    int sublane = 0, sublanes = 1;  // of those that overlap it
  };
  static constexpr double width = 1120, left = 74, right = 14, top = 8;

  /// All, or the worst stragglers and others at even distances.
  void choose_ranks() {
    lane_of_.assign(static_cast<std::size_t>(job_.size), -1);
    std::vector<Rank> chosen;
    const auto choose = [&](Rank r) {
      if (static_cast<int>(chosen.size()) < most_lanes_ && std::find(chosen.begin(), chosen.end(), r) == chosen.end()) chosen.push_back(r);
    };
    if (job_.size > most_lanes_) {
      for (std::size_t i = 0; i < job_.stragglers.size() && static_cast<int>(i) < most_lanes_ / 4; ++i) choose(job_.stragglers[i].rank);
      for (int i = 0; i < most_lanes_; ++i) choose(static_cast<Rank>(static_cast<std::int64_t>(i) * job_.size / most_lanes_));
    }
    for (Rank r = 0; r < job_.size; ++r) choose(r);
    std::sort(chosen.begin(), chosen.end());
    for (std::size_t i = 0; i < chosen.size(); ++i) lane_of_[static_cast<std::size_t>(chosen[i])] = static_cast<int>(i);
    ranks_ = std::move(chosen);
  }

  /// The last calls: as far back as the busiest rank's `most_calls_` reach.
  void gather() {
    std::vector<std::vector<Call>> lanes(ranks_.size());
    for (const Account& account : accounts_) {
      const int lane = lane_of_[static_cast<std::size_t>(account.in_job(account.rank))];
      for (const AccountEvent& event : account.recent) {
        if (event.time.elapsed <= nanoseconds{0}) continue;
        ++kept_;
        if (lane < 0) continue;
        const double begin = ns(event.begin) + ns(account.clock_offset);
        lanes[static_cast<std::size_t>(lane)].push_back({begin, begin + ns(event.time.elapsed), lane, &account, &event});
      }
    }
    first_ = -std::numeric_limits<double>::infinity();
    for (std::vector<Call>& lane : lanes) {
      std::sort(lane.begin(), lane.end(), [](const Call& a, const Call& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
      if (lane.size() > static_cast<std::size_t>(most_calls_)) first_ = std::max(first_, lane[lane.size() - static_cast<std::size_t>(most_calls_)].begin);
    }
    for (const std::vector<Call>& lane : lanes)
      for (const Call& call : lane)
        if (call.end > first_) calls_.push_back(call);
    last_ = -std::numeric_limits<double>::infinity();
    double earliest = std::numeric_limits<double>::infinity();
    for (const Call& call : calls_) {
      earliest = std::min(earliest, call.begin);
      last_ = std::max(last_, call.end);
    }
    first_ = std::max(first_, earliest);
    if (!(last_ > first_)) last_ = first_ + 1;
  }

  /// Calls that overlapped share their lane's height.
  void lay_out() {
    lane_height_ = std::clamp(480 / static_cast<double>(ranks_.size()), 14.0, 34.0);
    std::vector<double> ends;  // of each sublane
    double end = 0;            // of all
    for (std::size_t i = 0, first = 0; i <= calls_.size(); ++i) {
      if (i == calls_.size() || i == first || calls_[i].lane != calls_[first].lane || calls_[i].begin >= end) {
        for (; first < i; ++first) calls_[first].sublanes = static_cast<int>(ends.size());
        if (i == calls_.size()) break;
        ends.clear();
        end = calls_[i].end;
      }
      const auto free = std::find_if(ends.begin(), ends.end(), [&](double each) { return each <= calls_[i].begin; });
      calls_[i].sublane = static_cast<int>(free - ends.begin());
      if (free == ends.end() && ends.size() < most_sublanes) ends.push_back(calls_[i].end);
      else if (free == ends.end()) calls_[i].sublane = static_cast<int>(most_sublanes) - 1, ends.back() = std::max(ends.back(), calls_[i].end);
      else *free = calls_[i].end;
      end = std::max(end, calls_[i].end);
    }
  }
  double bottom() const { return top + lane_height_ * static_cast<double>(ranks_.size()); }
  double x_of(double time) const { return left + std::clamp((time - first_) / (last_ - first_), 0.0, 1.0) * (width - left - right); }
  double lane_top(int lane) const { return top + lane * lane_height_; }

  static void draw_legend(Html& html) {
    html.add({"<ul class=\"legend\"><li><i class=\"k-busy\"></i>busy</li><li><i class=\"k-arrival\"></i>waits for a late rank (arrival)</li><li><i class=\"k-transfer\"></i>waits for bytes (transfer)</li>"
              "<li><i class=\"k-credit\"></i>waits for room (credit)</li><li><i class=\"k-local\"></i>waits for itself (local)</li><li><i class=\"k-undriven\"></i>in the background, not driven</li>"
              "<li><i class=\"blank\"></i>not in a call</li><li><svg viewBox=\"0 0 30 10\" aria-hidden=\"true\"><path class=\"arrow\" d=\"M1 5H24\"/><path class=\"head\" d=\"M22 1L30 5L22 9z\"/></svg>the late rank's arrival ends a wait</li></ul>\n"});
  }
  void draw_axis(Html& html) const {
    const int every = lane_height_ >= 14 ? 1 : 2;
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      const double y = lane_top(static_cast<int>(i));
      html.add({"<g data-rank=\"", ranks_[i], "\">"});
      svg_rect(html, "lane", left, y + 1, width - left - right, lane_height_ - 2);
      if (static_cast<int>(i) % every == 0) svg_text(html, "r", left - 8, y + lane_height_ / 2 + 4, concat({"rank ", ranks_[i]}));
      html.add({"</g>\n"});
    }
    const double step = nice_step(last_ - first_, 8);
    for (double t = 0; t <= last_ - first_; t += step) {
      const double x = x_of(first_ + t);
      svg_line(html, "grid", x, top, x, bottom() + 4);
      svg_text(html, t == 0 ? "m" : "c m", x, bottom() + 18, t == 0 ? "0" : ns_text(t));
    }
    html.add({"\n"});
  }
  void draw_call(Html& html, const Call& call) const {
    const AccountEvent& event = *call.event;
    const AccountTimes& time = event.time;
    const double height = (lane_height_ - 4) / call.sublanes, y = lane_top(call.lane) + 2 + call.sublane * height;
    html.add({"<g class=\"call\"><title>"});
    std::string tip = concat({"Rank ", ranks_[static_cast<std::size_t>(call.lane)], ": ", name_of(event.operation), ", ", bytes_text(event.bytes), ", ", time_text(time.elapsed), ": busy ", time_text(time.busy())});
    for (const auto& [what, part] : {std::pair<std::string_view, nanoseconds>{"arrival", time.wait_arrival}, {"transfer", time.wait_transfer}, {"credit", time.wait_credit}, {"local", time.wait_local}, {"undriven", time.undriven}})
      if (part > nanoseconds{0}) tip += concat({", ", what, " ", time_text(part)});
    if (!event.waited_for.empty() && event.waited_for.front().rank >= 0) tip += concat({"; mostly for rank ", call.account->in_job(event.waited_for.front().rank)});
    html.add({typeset(concat({tip, "; ", joules_text(event.energy.gross)})), "; ", escaped(event.algorithm, 40), "</title>"});
    // What came when within a call is not kept: a rank waits before it works on what it waited for.
    double at = call.begin;
    for (const auto& [kind, part] : {std::pair<std::string_view, nanoseconds>{"k-arrival", time.wait_arrival}, {"k-undriven", time.undriven}, {"k-local", time.wait_local}, {"k-credit", time.wait_credit}, {"k-transfer", time.wait_transfer}, {"k-busy", time.busy()}}) {
      const double from = x_of(at), to = x_of(at += ns(part));
      if (part > nanoseconds{0} && (to - from >= 0.3 || 2 * part > time.elapsed)) svg_rect(html, kind, from, y, std::max(0.7, to - from), std::max(1.0, height - 0.5));
    }
    html.add({"</g>\n"});
  }
  /// From the late ranks to those that waited, for the operations that were waited in longest.
  void draw_arrows(Html& html) {
    using Operation = std::pair<std::string_view, std::uint64_t>;
    std::map<Operation, std::vector<const Call*>> waits;
    for (const Call& call : calls_)
      if (call.event->operation_number != 0 && call.event->time.wait_arrival > nanoseconds{0} && !call.event->waited_for.empty()) waits[{call.account->communicator, call.event->operation_number}].push_back(&call);
    const auto longer = [](const Call* a, const Call* b) { return a->event->time.wait_arrival > b->event->time.wait_arrival; };
    std::vector<std::vector<const Call*>> operations;
    for (auto& [operation, calls] : waits) {
      std::stable_sort(calls.begin(), calls.end(), longer);
      operations.push_back(std::move(calls));
    }
    std::stable_sort(operations.begin(), operations.end(), [&](const auto& a, const auto& b) { return longer(a.front(), b.front()); });
    operations.resize(std::min<std::size_t>(operations.size(), most_operations));
    for (const std::vector<const Call*>& calls : operations)
      for (std::size_t i = 0; i < calls.size() && i < most_arrows; ++i) draw_arrow(html, *calls[i]);
  }
  void draw_arrow(Html& html, const Call& call) {
    const auto worst = std::max_element(call.event->waited_for.begin(), call.event->waited_for.end(), [](const Blame& a, const Blame& b) { return a.arrival < b.arrival; });
    if (worst->rank < 0 || worst->arrival <= nanoseconds{0}) return;
    const Rank culprit = call.account->in_job(worst->rank);
    const int lane = lane_of_[static_cast<std::size_t>(culprit)];
    const double ended = call.begin + ns(call.event->time.wait_arrival);
    if (lane < 0 || lane == call.lane || ended < first_) return;
    const auto theirs = std::find_if(calls_.begin(), calls_.end(), [&](const Call& each) { return each.lane == lane && each.event->operation_number == call.event->operation_number && each.account->communicator == call.account->communicator; });
    const double from = lane_top(lane) + lane_height_ / 2, to = lane_top(call.lane) + (lane < call.lane ? 3 : lane_height_ - 3);
    html.add({"<path class=\"arrow\" data-from=\"", culprit, "\" data-to=\"", ranks_[static_cast<std::size_t>(call.lane)], "\" d=\"M", decimal(x_of(theirs == calls_.end() ? ended : theirs->begin)), " ", decimal(from), "L", decimal(x_of(ended)), " ", decimal(to),
              "\" marker-end=\"url(#head)\"/>\n"});
    ++arrows_;
  }
  void draw_notes(Html& html) const {
    html.add({"<p class=\"lead\" data-left-out=\"timeline\">", kept_, " calls are kept one by one; ", calls_.size(), " of them are drawn, on rank 0&#39;s clock. Within a call its waits are drawn first: what came when inside it is not kept. ", arrows_,
              " arrows show the longest waits."});
    if (static_cast<int>(ranks_.size()) < job_.size) html.add({" ", ranks_.size(), " of ", job_.size, " ranks are drawn: those that others waited for most, and others at even distances."});
    html.add({"</p>\n"});
  }

  static constexpr std::size_t most_sublanes = 4;
  static constexpr std::size_t most_operations = 6, most_arrows = 12;
  const JobAccount& job_;
  std::span<const Account> accounts_;
  int most_lanes_, most_calls_;
  std::vector<int> lane_of_;  // by rank in the job, -1: not drawn
  std::vector<Rank> ranks_;   // by lane
  std::vector<Call> calls_;
  std::size_t kept_ = 0, arrows_ = 0;
  double first_ = 0, last_ = 0, lane_height_ = 0;
};

/// Watts of the hosts' domains over time; false if there are none.
inline bool draw_watts(Html& html, std::span<const Account> accounts) {
  struct Series {
    std::string name;
    const Account* account = nullptr;  // the one that has most of it
    std::uint16_t domain = 0;
    std::size_t count = 0;
    double mean = 0;
  };
  std::map<std::pair<std::string_view, std::string_view>, Series> found;
  for (const Account& account : accounts) {
    std::vector<std::pair<std::size_t, double>> sums(account.domains.size());
    for (const PowerSample& sample : account.power)
      if (sample.domain < sums.size() && std::isfinite(sample.watts)) ++sums[sample.domain].first, sums[sample.domain].second += sample.watts;
    for (std::size_t d = 0; d < sums.size(); ++d) {
      Series& series = found[{account.host, account.domains[d].key}];
      if (sums[d].first > series.count) series = {concat({account.host, " ", account.domains[d].key}), &account, static_cast<std::uint16_t>(d), sums[d].first, sums[d].second / static_cast<double>(sums[d].first)};
    }
  }
  std::vector<Series> all;
  for (auto& [key, series] : found)
    if (series.count > 0) all.push_back(std::move(series));
  if (all.empty()) return false;
  constexpr std::size_t most_series = 8, most_points = 400;
  const std::size_t known = all.size();
  std::stable_sort(all.begin(), all.end(), [](const Series& a, const Series& b) { return a.mean > b.mean; });
  all.resize(std::min(all.size(), most_series));

  // Neighbouring windows are averaged where there are too many.
  struct Point {
    double begin, end, watts;
  };
  std::vector<std::vector<Point>> lines(all.size());
  double first = std::numeric_limits<double>::infinity(), last = -first, highest = 0;
  for (std::size_t s = 0; s < all.size(); ++s) {
    std::vector<Point> points;
    for (const PowerSample& sample : all[s].account->power)
      if (sample.domain == all[s].domain && std::isfinite(sample.watts)) points.push_back({ns(sample.begin) + ns(all[s].account->clock_offset), ns(sample.end) + ns(all[s].account->clock_offset), sample.watts});
    std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) { return a.begin < b.begin; });
    const std::size_t together = (points.size() + most_points - 1) / most_points;
    for (std::size_t i = 0; i < points.size(); i += together) {
      const std::size_t end = std::min(points.size(), i + together);
      double watts = 0;
      for (std::size_t k = i; k < end; ++k) watts += points[k].watts / static_cast<double>(end - i);
      lines[s].push_back({points[i].begin, points[end - 1].end, watts});
      first = std::min(first, points[i].begin), last = std::max(last, points[end - 1].end), highest = std::max(highest, watts);
    }
  }
  const double width = 1120, height = 250, left = 64, right = 14, top = 10, bottom = height - 28;
  const double step = nice_step(highest > 0 ? highest : 1, 4), ceiling = step * std::ceil((highest > 0 ? highest : 1) / step), range = last > first ? last - first : 1;
  const auto x_of = [&](double t) { return left + (t - first) / range * (width - left - right); };
  const auto y_of = [&](double w) { return bottom - w / ceiling * (bottom - top); };
  static constexpr const char* dashes[] = {"", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3"};
  html.add({"<figure id=\"watts\"><ul class=\"legend\">"});
  for (std::size_t s = 0; s < all.size(); ++s)
    html.add({"<li><svg viewBox=\"0 0 30 10\" aria-hidden=\"true\"><path class=\"line q", s, "\" stroke-dasharray=\"", dashes[s], "\" d=\"M0 5H30\"/></svg>", escaped(all[s].name), ", on average ", typeset(concat({digits(all[s].mean), " W"})), "</li>"});
  html.add({"</ul>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"watts over time\">"});
  begin_svg(html, "watts-svg", "wide", width, height, "Watts over time", concat({"Average power of ", all.size(), " domains over ", ns_text(range), ", up to ", digits(highest), " W."}));
  for (double w = 0; w <= ceiling * 1.001; w += step) {
    svg_line(html, "grid", left, y_of(w), width - right, y_of(w));
    svg_text(html, "r m", left - 8, y_of(w) + 4, concat({digits(w), " W"}));
  }
  for (double t = 0; t <= range; t += nice_step(range, 8)) svg_text(html, t == 0 ? "m" : "c m", x_of(first + t), height - 8, t == 0 ? "0" : ns_text(t));
  for (std::size_t s = 0; s < lines.size(); ++s) {
    html.add({"<path class=\"line q", s, "\" stroke-dasharray=\"", dashes[s], "\" d=\""});
    for (std::size_t i = 0; i < lines[s].size(); ++i) html.add({i == 0 ? "M" : "L", decimal(x_of(lines[s][i].begin)), " ", decimal(y_of(lines[s][i].watts)), "H", decimal(x_of(lines[s][i].end))});
    html.add({"\"><title>", escaped(all[s].name), "</title></path>\n"});
  }
  html.add({"</svg></div></figure>\n"});
  if (known > all.size()) html.add({"<p class=\"lead\" data-left-out=\"watts\">", all.size(), " of ", known, " domains are drawn: those that draw most.</p>\n"});
  return true;
}

/// How long calls took, per operation.
inline void draw_durations(Html& html, std::span<const AccountRow> rows) {
  std::map<Collective, ElapsedHistogram> histograms;
  std::size_t first = elapsed_buckets, last = 0;
  for (const AccountRow& row : rows)
    for (std::size_t b = 0; b < elapsed_buckets; ++b) {
      if (row.histogram[b] == 0) continue;
      histograms[row.operation][b] += row.histogram[b];
      first = std::min(first, b), last = std::max(last, b);
    }
  if (histograms.empty()) {
    html.add({"<p class=\"unknown\">Unknown: the calls were not timed.</p>\n"});
    return;
  }
  const auto from = [](std::size_t b) { return b == 0 ? 0.0 : std::ldexp(1.0, static_cast<int>(b) - 1); };
  const double width = 1120, left = 190, right = 200, lane = 52, top = 6, buckets = static_cast<double>(last - first + 1);
  const double column = std::min(90.0, (width - left - right) / buckets), bottom = top + lane * static_cast<double>(histograms.size());
  html.add({"<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"durations\">"});
  begin_svg(html, "durations-svg", "wide", width, bottom + 26, "How long calls took", "One row per operation: columns count the calls by how long they took, each column twice as long as the one before.");
  double y = top;
  for (const auto& [operation, histogram] : histograms) {
    const std::uint64_t most = *std::max_element(histogram.begin(), histogram.end());
    double all = 0, sum = 0;
    for (const std::uint64_t count : histogram) all += static_cast<double>(count);
    std::size_t median = 0;
    while (median + 1 < elapsed_buckets && (sum += static_cast<double>(histogram[median])) < all / 2) ++median;
    svg_text(html, "r", left - 12, y + lane - 12, name_of(operation));
    svg_line(html, "grid", left, y + lane - 6, left + column * buckets, y + lane - 6);
    for (std::size_t b = first; b <= last; ++b) {
      if (histogram[b] == 0) continue;
      const double height = std::max(1.5, (lane - 14) * static_cast<double>(histogram[b]) / static_cast<double>(most));
      html.add({"<g class=\"col\"><title>", typeset(concat({name_of(operation), ": ", histogram[b], " calls took ", ns_text(from(b)), " to ", ns_text(from(b + 1))})), "</title>"});
      svg_rect(html, "k-busy", left + static_cast<double>(b - first) * column + 1, y + lane - 6 - height, column - 2, height);
      html.add({"</g>"});
    }
    svg_text(html, "m", left + column * buckets + 12, y + lane - 12, concat({"half below ", ns_text(from(median + 1))}));
    html.add({"\n"});
    y += lane;
  }
  const auto every = static_cast<std::size_t>(std::ceil(64 / column));
  for (std::size_t b = first; b <= last + 1; b += every) svg_text(html, "c m", left + static_cast<double>(b - first) * column, bottom + 16, ns_text(from(b)));
  html.add({"</svg></div>\n<p class=\"readout js\" hidden aria-live=\"polite\">Point at a column to read it.</p>\n"});
}

}  // namespace detail
}  // namespace tally::inline v0
