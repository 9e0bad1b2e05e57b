// SPDX-License-Identifier: Apache-2.0
// An MPI as a contestant of compare: built once with each, and started by that one's own mpirun.
#include <mpi.h>

#include <cstdlib>

#include "contestant.hpp"

namespace {

using bench::Op;

std::string version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  std::string whole(text, static_cast<std::size_t>(length));
  whole = whole.substr(0, whole.find_first_of(",\n"));
  if (const std::size_t colon = whole.find(':'); colon != whole.npos) {  // MPICH Version:   4.0.2
    const std::size_t number = whole.find_first_not_of(": \t", colon);
    whole = whole.substr(0, whole.find(' ')) + ' ' + (number == whole.npos ? "" : whole.substr(number));
  }
  return whole;
}

bench::Library library() {
  bench::Library l;
  l.version = version();
  l.prepare = [](const bench::Work& w) -> bench::Call {
    float *const in = w.in.data(), *const out = w.out.data();
    const int count = static_cast<int>(w.count), block = static_cast<int>(w.block());
    switch (w.op) {
      case Op::all_reduce: return [=] { MPI_Allreduce(MPI_IN_PLACE, in, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
      case Op::reduce: return [=] { MPI_Reduce(in, out, count, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD); };
      case Op::broadcast: return [=] { MPI_Bcast(in, count, MPI_FLOAT, 0, MPI_COMM_WORLD); };
      case Op::all_gather: return [=] { MPI_Allgather(in, block, MPI_FLOAT, out, block, MPI_FLOAT, MPI_COMM_WORLD); };
      case Op::reduce_scatter: return [=] { MPI_Reduce_scatter_block(in, out, block, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
      case Op::barrier: return [] { MPI_Barrier(MPI_COMM_WORLD); };
      case Op::gather: return [=] { MPI_Gather(in, block, MPI_FLOAT, out, block, MPI_FLOAT, 0, MPI_COMM_WORLD); };
      case Op::scatter: return [=] { MPI_Scatter(in, block, MPI_FLOAT, out, block, MPI_FLOAT, 0, MPI_COMM_WORLD); };
      case Op::all_to_all: return [=] { MPI_Alltoall(in, block, MPI_FLOAT, out, block, MPI_FLOAT, MPI_COMM_WORLD); };
      case Op::scan: return [=] { MPI_Scan(in, out, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
      case Op::exclusive_scan: return [=] { MPI_Exscan(in, out, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); };
      case Op::send_receive: return [=, to = w.next(), from = w.previous()] { MPI_Sendrecv(in, count, MPI_FLOAT, to, 0, out, count, MPI_FLOAT, from, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE); };
    }
    return {};
  };
  return l;
}

void start(const bench::Seat& seat) {
  const char* rank_text = std::getenv("OMPI_COMM_WORLD_RANK");
  if (!rank_text) rank_text = std::getenv("PMI_RANK");
  if (!rank_text) throw std::runtime_error("not started by an mpirun that it knows");
  const int rank = std::atoi(rank_text);
  seat.pin(rank);
  MPI_Init(nullptr, nullptr);
  int size = 0, me = -1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &me);
  if (size != seat.ranks() || me != rank) {
    const std::string why = "MPI sees rank " + std::to_string(me) + " of " + std::to_string(size) + ": its mpirun is another MPI's";
    seat.fail(rank, why);
    throw std::runtime_error(why);
  }
  seat.compete(rank, library());
  MPI_Finalize();
}

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"open_mpi", start}, {"mpich", start}}); }
