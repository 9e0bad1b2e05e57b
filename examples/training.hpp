// SPDX-License-Identifier: Apache-2.0
// One rank's part of a training, however the ranks synchronise: its slice of every batch, how late it is if it is to be, and what
// came of it. What is idle, and for how many joules, is what the library's ledger says.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>
#include <tally/tally.hpp>

#include "byte_model.hpp"
#include "ledger_json.hpp"
#include "text.hpp"

struct Training {
  std::uint64_t steps = 3000, batch = 512, seed = 1;
  double seconds = 0;    // if not 0: each worker goes on for so long, instead of for so many steps
  float rate = 0.005f;   // of Adam
  double straggler = 0;  // milliseconds by which a worker is late in a step
  std::string straggler_rank = "last";

  /// "last", "rotating" or a number. In each step of its own a rank asks whether it is the late one.
  bool is_late(int rank, int size, std::uint64_t step) const {
    if (straggler_rank == "rotating") return step % static_cast<std::uint64_t>(size) == static_cast<std::uint64_t>(rank);
    return straggler_rank == "last" ? rank == size - 1 : straggler_rank == std::to_string(rank);
  }
  void expect_straggler(int size) const {
    if (straggler_rank == "last" || straggler_rank == "rotating") return;
    for (int rank = 0; rank < size; ++rank)
      if (straggler_rank == std::to_string(rank)) return;
    refuse("--straggler-rank: '" + straggler_rank + "' is none of " + std::to_string(size) + " ranks; it may be 0 to " + std::to_string(size - 1) + ", last or rotating");
  }
  /// Where sample number i lies: all ranks draw from the same sequence.
  std::size_t position_of(std::uint64_t i, std::size_t text_size) const { return context + drawn(i, seed) % (text_size - context); }
};

using Clock = std::chrono::steady_clock;
inline double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// A step of one rank.
struct Point {
  float seconds = 0, loss = 0;  // when it ended; of the samples of this rank, before the step
  std::uint32_t staleness = 0;  // clocks by which the values that it ended with lagged behind
};
/// What became of a rank, but for its points.
struct Course {
  double seconds = 0, idle = 0, late = 0;  // late: the part of idle that was for ranks that came later
  double joules = 0, idle_joules = 0;
  tally::Provenance source = tally::Provenance::none;
  std::uint64_t steps = 0, samples_per_step = 0;

  void add(const tally::Ledger& ledger) {
    ledger.wait_for_energy();
    for (const tally::LedgerRow& row : ledger.rows()) {
      if (row.operation != tally::Collective::all_reduce && row.operation != tally::Collective::push_pull) continue;
      idle += in_seconds(row.idle());
      late += in_seconds(row.wait_arrival);
      const tally::AccountEnergy energy = ledger.energies(row);
      joules += energy.gross.value;
      idle_joules += energy.idle.value;
      source = energy.gross.provenance;
    }
  }
};

class Worker {
 public:
  Worker(const Training& training, const std::string& text, int rank, int size) : training_(training), text_(text), rank_(rank), size_(size) {
    const auto r = static_cast<std::uint64_t>(rank), n = static_cast<std::uint64_t>(size);
    first_ = training.batch * r / n, end_ = training.batch * (r + 1) / n;
    course_.samples_per_step = end_ - first_;
  }
  int rank() const { return rank_; }
  int size() const { return size_; }
  const Training& training() const { return training_; }
  const std::string& text() const { return text_; }
  const std::vector<Point>& points() const { return points_; }
  const Course& course() const { return course_; }
  const nlohmann::json& ledger() const { return ledger_; }
  const std::string& ledger_text() const { return ledger_text_; }
  const tally::Account& account() const { return account_; }

  void begin() { start_ = Clock::now(); }
  bool is_out_of_time() const { return training_.seconds > 0 && seconds_since(start_) >= training_.seconds; }
  bool is_done() const { return training_.seconds > 0 ? is_out_of_time() : points_.size() >= training_.steps; }

  /// The gradient of this rank's samples of the next step. `output_done()`: see Learner::add; it is called once, by a rank without samples, too.
  template <class F>
  void compute(const Parameters& parameters, Parameters& gradient, F&& output_done) {
    const std::uint64_t step = points_.size();
    if (training_.straggler > 0 && training_.is_late(rank_, size_, step)) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(training_.straggler));
    std::fill(gradient.all.begin(), gradient.all.end(), 0.0f);
    learner_.use(parameters);
    const float weight = 1 / static_cast<float>(training_.batch);
    if (first_ == end_) output_done();
    for (std::uint64_t i = first_; i < end_;) {
      for (positions_.clear(); i < end_ && positions_.size() < chunk; ++i) positions_.push_back(training_.position_of(step * training_.batch + i, text_.size()));
      learner_.add(parameters, text_, positions_, weight, gradient, [&] {
        if (i == end_) output_done();
      });
    }
    loss_ = first_ == end_ ? 0 : *gradient.loss * static_cast<float>(training_.batch) / static_cast<float>(end_ - first_);
  }
  void end_step(std::uint64_t staleness = 0) { points_.push_back({static_cast<float>(seconds_since(start_)), loss_, static_cast<std::uint32_t>(staleness)}); }
  float loss() const { return loss_; }

  void end(const tally::Ledger& ledger) {
    course_.seconds = seconds_since(start_);
    course_.steps = points_.size();
    course_.add(ledger);
    ledger_ = to_json(ledger);
    account_ = ledger.account("world", "train");
    std::ostringstream table;
    table << ledger;
    ledger_text_ = table.str();
  }
  /// On samples of the same text, which are the same whatever was trained and how.
  double final_loss(const Parameters& parameters) {
    Parameters scratch;
    positions_.resize(4096);
    for (std::size_t i = 0; i < positions_.size(); ++i) positions_[i] = context + drawn(i, ~training_.seed) % (text_.size() - context);
    return mean_loss(learner_, parameters, text_, positions_, scratch);
  }

 private:
  const Training& training_;
  const std::string& text_;
  const int rank_, size_;
  std::uint64_t first_, end_;
  Learner learner_;
  std::vector<std::size_t> positions_;
  Clock::time_point start_ = Clock::now();
  float loss_ = 0;
  std::vector<Point> points_;
  Course course_;
  nlohmann::json ledger_;
  std::string ledger_text_;
  tally::Account account_;
};
