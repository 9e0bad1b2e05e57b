// SPDX-License-Identifier: Apache-2.0
// Measures every algorithm of every operation over a range of sizes and writes what was measured as a model that
// TALLY_MODEL makes the library choose by. Algorithms alternate within a round, so that what else the machine does
// hits all of them.
#pragma once

#include <algorithm>
#include <bit>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <tally/tally.hpp>

#include "measure.hpp"

namespace bench {

struct TuneSettings {
  std::size_t least = 8, most = std::size_t{64} << 20;
  double seconds = 0.1;  // per algorithm and size
};

/// All ranks together. Rank 0 has `out`; the others pass null.
class Tuning {
 public:
  Tuning(tally::Communicator& comm, const TuneSettings& settings, std::ostream* out)
      : comm_(comm), control_(comm.duplicate()), s_(settings), out_(out), memory_(comm.allocate<float>(2 * std::max<std::size_t>(s_.most / sizeof(float), static_cast<std::size_t>(comm.size())))) {}

  void run() {
    if (out_) {
      *out_ << "# what algorithms took here; used by TALLY_MODEL=FILE, see the README\n# machine: " << machine_line() << "\n# medians of the slowest rank, float32 sums, private memory but for zero_copy between processes\n"
            << "# transport ranks operation algorithm bytes microseconds\n";
    }
    const Progress progress(out_ != nullptr);
    for (const tally::Collective op : tally::all_operations)
      for (std::size_t bytes = std::max<std::size_t>(8, std::bit_ceil(s_.least)); bytes <= s_.most; bytes *= 4) {
        if (tally::sizes_differ(op) || (op == tally::Collective::barrier && bytes > 8)) break;
        progress.show(std::string(name_of(op)) + " of " + size_text(bytes) + " ...");
        measure(op, bytes);
      }
    progress.clear();
  }

 private:
  void measure(tally::Collective op, std::size_t bytes) {
    const auto names = tally::algorithms_for(op);
    std::vector<std::vector<double>> times(names.size());
    std::vector<int> calls(names.size(), 1);
    double spent = 0;
    for (int round = -1; round < 3 || (spent < s_.seconds * static_cast<double>(names.size()) && round < 1001); ++round) {
      for (std::size_t a = 0; a < names.size(); ++a) {
        double us = 0;
        for (bool enough = false; !enough;) {  // in the first round, until a block takes a millisecond
          call(op, names[a], bytes);
          control_.barrier();
          const double begin = seconds_now();
          for (int i = 0; i < calls[a]; ++i) call(op, names[a], bytes);
          us = (seconds_now() - begin) * 1e6;
          control_.all_reduce(std::span(&us, 1), tally::max);
          enough = round >= 0 || us > 1000 || calls[a] >= 1 << 16;
          if (!enough) calls[a] *= 2;
        }
        spent += us * 1e-6;
        if (round >= 0) times[a].push_back(us / calls[a]);
      }
      control_.broadcast(std::span(&spent, 1), 0);
    }
    if (!out_) return;
    for (std::size_t a = 0; a < names.size(); ++a)
      *out_ << comm_.transport_name() << ' ' << comm_.size() << ' ' << name_of(op) << ' ' << names[a] << ' ' << bytes << ' ' << quantile(times[a], 0.5) << std::endl;
  }

  void call(tally::Collective op, std::string_view algorithm, std::size_t bytes) {
    if (algorithm == tally::ZeroCopy::name) return call_on(op, algorithm, bytes, [this](std::size_t first, std::size_t count) { return memory_.subspan(first, count); });
    if (private_.empty()) private_.resize(memory_.size());
    call_on(op, algorithm, bytes, [this](std::size_t first, std::size_t count) { return std::span(private_).subspan(first, count); });
  }
  template <class Part>
  void call_on(tally::Collective op, std::string_view algorithm, std::size_t bytes, Part&& part) {
    using tally::Collective;
    const auto n = static_cast<std::size_t>(comm_.size());
    const std::size_t block = std::max<std::size_t>(bytes / sizeof(float) / n, 1), other = memory_.size() / 2;
    const std::size_t count = tally::Layout{op, 0, comm_.size(), 0, 1}.items() > 1 ? block * n : bytes / sizeof(float);
    const tally::CallOptions options{{}, algorithm};
    switch (op) {
      case Collective::all_reduce: comm_.all_reduce(part(0, count), tally::sum, options); break;
      case Collective::reduce: comm_.reduce(part(0, count), part(other, count), tally::sum, 0, options); break;
      case Collective::broadcast: comm_.broadcast(part(0, count), 0, options); break;
      case Collective::all_gather: comm_.all_gather(part(0, block), part(other, count), options); break;
      case Collective::reduce_scatter: comm_.reduce_scatter(part(0, count), part(other, block), tally::sum, options); break;
      case Collective::gather: comm_.gather(part(0, block), part(other, count), 0, options); break;
      case Collective::scatter: comm_.scatter(part(0, count), part(other, block), 0, options); break;
      case Collective::all_to_all: comm_.all_to_all(part(0, count), part(other, count), options); break;
      case Collective::scan: comm_.scan(part(0, count), part(other, count), tally::sum, options); break;
      case Collective::exclusive_scan: comm_.exclusive_scan(part(0, count), part(other, count), tally::sum, options); break;
      default: comm_.barrier(options);
    }
  }

  tally::Communicator& comm_;
  tally::Communicator control_;
  TuneSettings s_;
  std::ostream* out_;
  tally::Symmetric<float> memory_;
  std::vector<float> private_;
};

}  // namespace bench
