// SPDX-License-Identifier: Apache-2.0
// tally as a contestant of compare.
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "compare_tally.hpp"

namespace {

tally::Options accounted(bool accounting) {
  tally::Options options;
  options.accounting = accounting;
  return options;
}
void start_with(const bench::Seat& seat, bool accounting) {
  tally::launch(seat.ranks(), [&](tally::Communicator& comm) { bench::compete(seat, comm); }, tally::processes, accounted(accounting));
}
void start_tcp_with(const bench::Seat& seat, bool accounting) {
  tally::launch_tcp(seat.ranks(), [&](tally::Communicator& comm) { bench::compete(seat, comm); }, tally::processes, accounted(accounting));
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
    bench::Library l = bench::library_of(comm, part);
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
