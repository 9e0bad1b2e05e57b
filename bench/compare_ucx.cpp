// SPDX-License-Identifier: Apache-2.0
// tally over UCX as a contestant of compare.
#include <tally/tally.hpp>
#include <tally/ucx.hpp>

#include "compare_tally.hpp"

namespace {

void start_with(const bench::Seat& seat, bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  tally::launch_ucx(seat.ranks(), [&](tally::Communicator& comm) { bench::compete(seat, comm); }, tally::processes, options);
}
void start(const bench::Seat& seat) { start_with(seat, true); }
void start_unaccounted(const bench::Seat& seat) { start_with(seat, false); }

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"ucx", start}, {"ucx_unaccounted", start_unaccounted}}); }
