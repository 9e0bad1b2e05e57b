// SPDX-License-Identifier: Apache-2.0
// Ways to synchronise the same training, side by side: the loss at equal times, and what each rank waited.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iomanip>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

#include "ledger_json.hpp"
#include "training.hpp"

/// What rank 0 knows of a training when all have ended it.
struct Way {
  std::string name;
  std::vector<Course> courses;              // by rank
  std::vector<std::vector<Point>> points;   // likewise
  double final_loss = 0;
  std::uint64_t bits = 0;  // a hash of the model's
  nlohmann::json ledger;   // rank 0's
  double seconds() const {
    double longest = 0;
    for (const Course& c : courses) longest = std::max(longest, c.seconds);
    return longest;
  }
  std::uint64_t samples() const {
    std::uint64_t sum = 0;
    for (const Course& c : courses) sum += c.steps * c.samples_per_step;
    return sum;
  }
  /// The mean loss of samples whose steps ended in that time; NaN if there were none.
  double loss_between(double from, double to) const {
    double sum = 0, samples = 0;
    for (std::size_t r = 0; r < points.size(); ++r)
      for (const Point& p : points[r])
        if (p.seconds > from && p.seconds <= to) sum += static_cast<double>(p.loss) * static_cast<double>(courses[r].samples_per_step), samples += static_cast<double>(courses[r].samples_per_step);
    return sum / samples;
  }
};
inline double mean_staleness(const std::vector<Point>& points) {
  double sum = 0;
  for (const Point& p : points) sum += p.staleness;
  return points.empty() ? 0 : sum / static_cast<double>(points.size());
}
inline std::uint32_t most_staleness(const std::vector<Point>& points) {
  std::uint32_t most = 0;
  for (const Point& p : points) most = std::max(most, p.staleness);
  return most;
}

/// Collective; the result is rank 0's.
inline Way gather_way(tally::Communicator& comm, std::string name, Worker& worker, const Parameters& parameters) {
  const auto n = static_cast<std::size_t>(comm.size());
  Way way;
  way.name = std::move(name);
  way.courses.resize(n);
  comm.gather(std::as_bytes(std::span(&worker.course(), 1)), std::as_writable_bytes(std::span(way.courses)), 0);
  std::uint64_t longest = worker.points().size();
  comm.all_reduce(std::span(&longest, 1), tally::max);
  std::vector<Point> mine = worker.points(), all(n * longest);
  mine.resize(longest);
  if (longest > 0) comm.gather(std::as_bytes(std::span(mine)), std::as_writable_bytes(std::span(all)), 0);
  if (comm.rank() != 0) return way;
  for (std::size_t r = 0; r < n; ++r) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(r * longest);
    way.points.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(way.courses[r].steps));
  }
  way.final_loss = worker.final_loss(parameters);
  way.bits = 0xcbf29ce484222325u;  // FNV-1a
  for (const std::byte b : std::as_bytes(std::span(parameters.all).first(Parameters::count))) way.bits = (way.bits ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3u;
  way.ledger = worker.ledger();
  return way;
}
inline std::string hex(std::uint64_t bits) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(bits));
  return text;
}

inline constexpr int rows_of_time = 10;

inline void print_ways(std::ostream& out, const Training& training, const std::vector<Way>& ways) {
  double seconds = 0;
  for (const Way& way : ways) seconds = std::max(seconds, way.seconds());
  out << "loss in bits per byte, mean of the samples of all workers in each tenth of the time\n      until" << std::fixed;
  for (const Way& way : ways) out << std::setw(12) << way.name;
  out << '\n';
  for (int row = 0; row < rows_of_time; ++row) {
    const double until = seconds * (row + 1) / rows_of_time;
    out << std::setprecision(1) << std::setw(9) << until << " s" << std::setprecision(3);
    for (const Way& way : ways) {
      const double loss = way.loss_between(seconds * row / rows_of_time, until);
      if (std::isnan(loss)) out << std::setw(12) << '-';
      else out << std::setw(12) << loss;
    }
    out << '\n';
  }
  out << "final model";
  for (const Way& way : ways) out << std::setw(12) << way.final_loss;
  out << "   on 4096 other samples\nits bits   ";
  for (const Way& way : ways) out << std::setw(12) << hex(way.bits).substr(0, 8);
  out << "   (a hash)\nsamples    ";
  for (const Way& way : ways) out << std::setw(12) << way.samples();
  out << "\n\n        way  worker     steps   steps/s    idle     late  staleness   most    joules      idle joules\n";
  for (const Way& way : ways)
    for (std::size_t r = 0; r < way.courses.size(); ++r) {
      const Course& c = way.courses[r];
      const bool is_late = training.straggler > 0 && training.straggler_rank != "rotating" && training.is_late(static_cast<int>(r), static_cast<int>(way.courses.size()), 0);
      out << std::setw(11) << way.name << std::setw(7) << r << (is_late ? '*' : ' ') << std::setw(10) << c.steps << std::setprecision(1) << std::setw(10) << static_cast<double>(c.steps) / c.seconds;
      out << std::setw(7) << 100 * c.idle / c.seconds << '%' << std::setw(8) << 100 * c.late / c.seconds << '%' << std::setprecision(2) << std::setw(11) << mean_staleness(way.points[r]);
      out << std::setw(7) << most_staleness(way.points[r]) << std::setw(10) << c.joules << std::setw(12) << c.idle_joules << " (" << name_of(c.source) << ")\n";
    }
  if (training.straggler > 0) {
    out << (training.straggler_rank == "rotating" ? "in each step another worker is " : "*: ") << std::setprecision(1) << training.straggler << " ms late" << (training.straggler_rank == "rotating" ? "" : " in each step") << '\n';
  }
  out << "idle, and late (the part of it that was for later workers): of each worker's own time, by the ledger\n";
}

inline nlohmann::json to_json(const std::vector<Way>& ways) {
  double seconds = 0;
  for (const Way& way : ways) seconds = std::max(seconds, way.seconds());
  nlohmann::json all = nlohmann::json::array();
  for (const Way& way : ways) {
    nlohmann::json curve = nlohmann::json::array(), workers = nlohmann::json::array();
    for (int row = 0; row < rows_of_time; ++row)
      curve.push_back({{"until_seconds", seconds * (row + 1) / rows_of_time}, {"loss", number_or_null(way.loss_between(seconds * row / rows_of_time, seconds * (row + 1) / rows_of_time))}});
    for (std::size_t r = 0; r < way.courses.size(); ++r) {
      const Course& c = way.courses[r];
      workers.push_back({{"rank", r}, {"steps", c.steps}, {"samples_per_step", c.samples_per_step}, {"seconds", c.seconds}, {"steps_per_second", number_or_null(static_cast<double>(c.steps) / c.seconds)},
                         {"idle_share", number_or_null(c.idle / c.seconds)}, {"late_share", number_or_null(c.late / c.seconds)}, {"staleness_mean", mean_staleness(way.points[r])}, {"staleness_most", most_staleness(way.points[r])},
                         {"joules", number_or_null(c.joules)}, {"idle_joules", number_or_null(c.idle_joules)}, {"joules_source", std::string(name_of(c.source))}});
    }
    all.push_back({{"way", way.name}, {"loss_final", number_or_null(way.final_loss)}, {"model_hash", hex(way.bits)}, {"samples", way.samples()}, {"curve", curve}, {"workers", workers}, {"ledger", way.ledger}});
  }
  return all;
}
