// SPDX-License-Identifier: Apache-2.0
// Ranks that an mpirun starts. Prints "ok" from rank 0 when all is as it must be; else says why, and fails.
#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <tally/mpi.hpp>
#include <tally/tally.hpp>

namespace {

using namespace tally;

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

void all_is_right(Communicator& comm, int rank, int size) {
  expect(comm.rank() == rank && comm.size() == size, "MPI's ranks");
  for (const std::string_view name : algorithms_for(Collective::all_reduce)) {
    if (!find_algorithm(Collective::all_reduce, name).generate) continue;  // these need memory that all reach
    for (const std::size_t count : {0u, 1u, 1000u, 70'001u, 1'000'000u}) {
      std::vector<int> data(count);
      std::iota(data.begin(), data.end(), rank);
      const Report report = comm.all_reduce(std::span(data), sum, {.algorithm = name});
      expect(report.busy() + report.idle() == report.elapsed, "the parts are the whole");
      for (std::size_t i = 0; i < count; ++i) expect(data[i] == size * static_cast<int>(i) + size * (size - 1) / 2, std::string(name) + " of " + std::to_string(count));
    }
  }
  auto half = comm.split(rank % 2, rank);
  auto again = comm.duplicate();
  std::vector<int> a(3000, 1), b(500'000, 2), c(10, 3);
  auto first = comm.async_all_reduce(std::span(a), sum);
  auto second = again.async_all_reduce(std::span(b), sum);
  half->all_reduce(std::span(c), sum);
  second.wait();
  first.wait();
  expect(a == std::vector<int>(3000, size) && b == std::vector<int>(500'000, 2 * size) && c == std::vector<int>(10, 3 * half->size()), "sums of groups");
  if (size > 1) {
    std::vector<int> out(200'000, rank), in(200'000);
    comm.send_receive(std::span<const int>(out), (rank + 1) % size, std::span(in), (rank + size - 1) % size, 3);
    expect(in == std::vector<int>(200'000, (rank + size - 1) % size), "what the one before has sent");
    bool named = false;
    comm.barrier();  // whoever is still in `second` would hear of it there
    try {
      std::vector<int> data(rank == 0 ? 7 : 8);
      half.reset();
      again.all_reduce(std::span(data), sum);
    } catch (const Error& error) {
      named = error.errc() == Errc::mismatch && std::string_view(error.what()).find("int32 x 7") != std::string_view::npos;
    }
    expect(named, "calls that do not match are named");
    named = false;
    try {  // with long messages under way
      auto third = comm.duplicate();
      std::vector<int> data(1'000'000);
      if (rank == 1) third.abort("enough");
      third.all_reduce(std::span(data), sum);
    } catch (const Error& error) {
      named = error.errc() == Errc::aborted && std::string_view(error.what()).find("enough") != std::string_view::npos;
    }
    expect(named, "an abort ends what is under way");
  }
  comm.barrier();
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0, rank = 0, size = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const std::string transport = argc > 1 ? argv[1] : "";
  try {
    // Backwards, so that they are not what the launcher says.
    MPI_Comm turned = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, 0, size - rank, &turned);
    {
      Options options;
      options.transport = transport;
      Communicator comm = mpi::communicator(turned, options);
      expect(comm.transport_name() == (size == 1 ? "thread" : transport.empty() ? "shm" : transport), "the transport " + transport + ", not " + std::string(comm.transport_name()));
      all_is_right(comm, size - 1 - rank, size);
    }
    MPI_Comm_free(&turned);
    MPI_Barrier(MPI_COMM_WORLD);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  MPI_Finalize();
  if (rank == 0) std::puts("ok");
}
