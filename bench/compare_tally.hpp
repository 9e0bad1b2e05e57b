// SPDX-License-Identifier: Apache-2.0
// tally as a contestant of compare, whatever connects its ranks.
#pragma once

#include <tally/tally.hpp>

#include "contestant.hpp"

namespace bench {

/// `counted` wraps each call and keeps what its report says.
template <class F>
Call counted(const std::shared_ptr<double>& idle, F f) {
  return [idle, f] { *idle += static_cast<double>(f().idle().count()) * 1e-9; };
}

/// `part(span)` is what the calls are given for a span: itself, or the same place as symmetric memory.
template <class Part>
Library library_of(tally::Communicator& comm, const Part& part) {
  const auto idle = std::make_shared<double>(0);
  Library l;
  l.version = "tally, this checkout";
  l.idle_seconds = [idle] { return *idle; };
  l.prepare = [&comm, idle, part](const Work& w) -> Call {
    const auto in = part(w.in), out = part(w.out);
    switch (w.op) {
      case Op::all_reduce: return counted(idle, [&comm, in] { return comm.all_reduce(in, tally::sum); });
      case Op::reduce: return counted(idle, [&comm, in, out] { return comm.reduce(in, out, tally::sum, 0); });
      case Op::broadcast: return counted(idle, [&comm, in] { return comm.broadcast(in, 0); });
      case Op::all_gather: return counted(idle, [&comm, out, mine = part(w.in.first(w.block()))] { return comm.all_gather(mine, out); });
      case Op::reduce_scatter: return counted(idle, [&comm, in, mine = part(w.out.first(w.block()))] { return comm.reduce_scatter(in, mine, tally::sum); });
      case Op::barrier: return counted(idle, [&comm] { return comm.barrier(); });
      case Op::gather: return counted(idle, [&comm, out, mine = part(w.in.first(w.block()))] { return comm.gather(mine, out, 0); });
      case Op::scatter: return counted(idle, [&comm, in, mine = part(w.out.first(w.block()))] { return comm.scatter(in, mine, 0); });
      case Op::all_to_all: return counted(idle, [&comm, in, out] { return comm.all_to_all(in, out); });
      case Op::scan: return counted(idle, [&comm, in, out] { return comm.scan(in, out, tally::sum); });
      case Op::exclusive_scan: return counted(idle, [&comm, in, out] { return comm.exclusive_scan(in, out, tally::sum); });
      case Op::send_receive: return counted(idle, [&comm, in, out, to = w.next(), from = w.previous()] { return comm.send_receive(in, to, out, from).report; });
    }
    return {};
  };
  return l;
}

/// A rank of a race, on private memory.
inline void compete(const Seat& seat, tally::Communicator& comm) {
  seat.pin(comm.rank());
  seat.compete(comm.rank(), library_of(comm, [](std::span<float> span) { return span; }));
}

}  // namespace bench
