// SPDX-License-Identifier: Apache-2.0
// tally as a contestant of compare.
#include <tally/tally.hpp>

#include "contestant.hpp"

namespace {

using bench::Op;

/// `counted` wraps each call and keeps what its report says.
template <class F>
bench::Call counted(const std::shared_ptr<double>& idle, F f) {
  return [idle, f] { *idle += static_cast<double>(f().idle().count()) * 1e-9; };
}

bench::Library library(tally::Communicator& comm) {
  const auto idle = std::make_shared<double>(0);
  bench::Library l;
  l.version = "tally, this checkout";
  l.idle_seconds = [idle] { return *idle; };
  l.prepare = [&comm, idle](const bench::Work& w) -> bench::Call {
    switch (w.op) {
      case Op::all_reduce: return counted(idle, [&comm, w] { return comm.all_reduce(w.in, tally::sum); });
      case Op::reduce: return counted(idle, [&comm, w] { return comm.reduce(w.in, w.out, tally::sum, 0); });
      case Op::broadcast: return counted(idle, [&comm, w] { return comm.broadcast(w.in, 0); });
      case Op::all_gather: return counted(idle, [&comm, w, mine = w.in.first(w.block())] { return comm.all_gather(mine, w.out); });
      case Op::reduce_scatter: return counted(idle, [&comm, w, mine = w.out.first(w.block())] { return comm.reduce_scatter(w.in, mine, tally::sum); });
      case Op::barrier: return counted(idle, [&comm] { return comm.barrier(); });
    }
    return {};
  };
  return l;
}

void start(const bench::Seat& seat) {
  tally::launch(seat.ranks(), [&](tally::Communicator& comm) {
    seat.pin(comm.rank());
    seat.compete(comm.rank(), library(comm));
  });
}

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"tally", start}}); }
