// SPDX-License-Identifier: Apache-2.0
// tally as a contestant of compare.
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "contestant.hpp"

namespace {

using bench::Op;

/// `counted` wraps each call and keeps what its report says.
template <class F>
bench::Call counted(const std::shared_ptr<double>& idle, F f) {
  return [idle, f] { *idle += static_cast<double>(f().idle().count()) * 1e-9; };
}

/// `part(span)` is what the calls are given for a span: itself, or the same place as symmetric memory.
template <class Part>
bench::Library library(tally::Communicator& comm, const Part& part) {
  const auto idle = std::make_shared<double>(0);
  bench::Library l;
  l.version = "tally, this checkout";
  l.idle_seconds = [idle] { return *idle; };
  l.prepare = [&comm, idle, part](const bench::Work& w) -> bench::Call {
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

void start_with(const bench::Seat& seat, bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  tally::launch(seat.ranks(), [&](tally::Communicator& comm) {
    seat.pin(comm.rank());
    seat.compete(comm.rank(), library(comm, [](std::span<float> span) { return span; }));
  }, tally::processes, options);
}
void start_tcp_with(const bench::Seat& seat, bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  tally::launch_tcp(seat.ranks(), [&](tally::Communicator& comm) {
    seat.pin(comm.rank());
    seat.compete(comm.rank(), library(comm, [](std::span<float> span) { return span; }));
  }, tally::processes, options);
}
void start_tcp(const bench::Seat& seat) { start_tcp_with(seat, true); }
void start_tcp_unaccounted(const bench::Seat& seat) { start_tcp_with(seat, false); }
void start(const bench::Seat& seat) { start_with(seat, true); }
void start_unaccounted(const bench::Seat& seat) { start_with(seat, false); }

/// The same calls on memory from allocate().
void start_symmetric(const bench::Seat& seat) {
  tally::launch(seat.ranks(), [&](tally::Communicator& comm) {
    seat.pin(comm.rank());
    std::vector<std::weak_ptr<tally::Symmetric<float>>> blocks;
    const auto part = [&blocks](std::span<float> span) -> tally::SymmetricSpan<float> {
      for (const auto& weak : blocks)
        if (const auto block = weak.lock(); block && span.data() >= block->data() && span.data() < block->data() + block->size())
          return block->subspan(static_cast<std::size_t>(span.data() - block->data()), span.size());
      return {};
    };
    bench::Library l = library(comm, part);
    l.allocate = [&](std::size_t bytes) {
      const auto block = std::make_shared<tally::Symmetric<float>>(comm.allocate<float>(bytes / sizeof(float)));
      blocks.push_back(block);
      return std::shared_ptr<std::byte>(block, reinterpret_cast<std::byte*>(block->data()));
    };
    seat.compete(comm.rank(), l);
  });
}

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"tally", start}, {"symmetric", start_symmetric}, {"unaccounted", start_unaccounted}, {"tcp", start_tcp}, {"tcp_unaccounted", start_tcp_unaccounted}}); }
