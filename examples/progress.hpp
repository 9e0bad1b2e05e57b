// SPDX-License-Identifier: Apache-2.0
// How far a training is, while it goes on; and how its loss fell, as a picture.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

#include "training.hpp"

/// On stderr: a bar on a terminal, ten lines elsewhere.
class Progress {
 public:
  explicit Progress(const Training& training) : training_(training) {}

  /// So many steps of rank 0 are done.
  void show(std::uint64_t done, float loss) {
    const double part = std::min(1.0, training_.seconds > 0 ? seconds_since(start_) / training_.seconds : static_cast<double>(done) / static_cast<double>(training_.steps));
    const bool ended = part >= 1;
    if (terminal_ ? !ended && seconds_since(shown_) < 0.1 : static_cast<int>(part * 10) == tenths_) return;
    shown_ = Clock::now();
    tenths_ = static_cast<int>(part * 10);
    const std::size_t width = 30, full = static_cast<std::size_t>(part * width);
    std::cerr << (terminal_ ? "\r[" : "[") << std::string(full, '#') << std::string(width - full, '.') << "] step " << done;
    if (training_.seconds <= 0) std::cerr << '/' << training_.steps;
    std::cerr << std::fixed << std::setprecision(3) << "  loss " << loss << " bits/byte  " << std::setprecision(0);
    std::cerr << static_cast<double>(done * training_.batch) / seconds_since(start_) << " samples/s" << (terminal_ ? "\x1b[K" : "\n");
    if (terminal_ && ended) std::cerr << '\n';
  }

 private:
  const Training& training_;
  const bool terminal_ = ::isatty(STDERR_FILENO) == 1;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
  int tenths_ = 0;
};

/// The mean loss of each tenth of the training, as a picture.
inline void print_curve(std::ostream& out, const std::vector<float>& losses) {
  const std::size_t rows = std::min<std::size_t>(10, losses.size());
  out << "loss in bits per byte, mean of the steps up to\n" << std::fixed << std::setprecision(3);
  for (std::size_t row = 0, first = 0; row < rows; ++row) {
    const std::size_t end = losses.size() * (row + 1) / rows;
    double sum = 0;
    for (std::size_t i = first; i < end; ++i) sum += losses[i];
    const double mean = sum / static_cast<double>(end - first);
    out << std::setw(8) << end << std::setw(9) << mean << "  " << std::string(mean > 0 ? static_cast<std::size_t>(std::min(mean, 10.0) * 6) : 0, '#') << '\n';
    first = end;
  }
}
