// SPDX-License-Identifier: Apache-2.0
// Ranks that an MPI started: they meet through it, and then talk by shared memory and a network, which may be MPI itself where
// only that reaches the fabric. Compiled and linked as any MPI program (CMake: MPI::MPI_C); MPI_Init is the caller's, before, and MPI_Finalize after.
// With less than MPI_THREAD_MULTIPLE one thread of a process at a time makes communicators (duplicate, split) where MPI is the network:
// MPI makes its own with a call that waits, during which no other thread may call it.
#pragma once

#include <mpi.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tcp.hpp"
#include "transport/mpi.hpp"

namespace tally::inline v0 {

namespace detail {

inline NetworkKind<MpiTransport> mpi_kind(std::shared_ptr<MpiGroup> all, const FabricOptions& options) {
  return {"mpi", options.text(), options.lanes, [all, options](std::shared_ptr<NetworkNode> node, std::vector<Rank> members) {
            // The number of a communicator is the same on all its ranks; MPI tells groups that are made at once by their tags.
            const auto make = [all, options](const FabricMembers& who) {
              const auto number = static_cast<int>(who.communicator % static_cast<std::uint64_t>(all->most_tags()));
              return std::make_unique<MpiFabric>(std::make_shared<MpiGroup>(*all, who.ranks, number), static_cast<int>(who.ranks.size()), options);
            };
            return std::make_unique<MpiTransport>(std::move(node), MpiTransport::world, std::move(members), options, make);
          }};
}

}  // namespace detail

namespace mpi {

/// A communicator of the ranks of `comm`, in their order; all of them call. Ranks of one host share memory; between hosts go the bytes by
/// the network that options name, "mpi" being this one: it must then have been told of threads (MPI_THREAD_SERIALIZED at least) if
/// operations go on in the background, or several threads use communicators; a program that then calls MPI itself needs MPI_THREAD_MULTIPLE. To be destroyed before MPI_Finalize. Throws as init() does.
inline Communicator communicator(MPI_Comm comm, const Options& defaults = {}) {
  const Options options = Options::from_environment(defaults);
  JobInfo job;
  detail::check_mpi(::MPI_Comm_rank(comm, &job.rank), "tell this rank's number");
  detail::check_mpi(::MPI_Comm_size(comm, &job.size), "tell how many ranks there are");
  if (job.size == 1) {
    const auto memory = std::make_shared<ThreadMemory>(SlotLayout(1, options.slots));
    detail::write_model(*memory, options);
    return detail::make_communicator(memory, 0, options);
  }
  const auto group = std::make_shared<detail::MpiGroup>(comm);
  char where[4096] = {};  // empty: rank 0 cannot be reached
  std::optional<detail::Meeting> meeting;
  std::exception_ptr failure;
  if (job.rank == 0) {
    try {
      meeting.emplace(detail::Meeting::here(detail::environment("TALLY_INTERFACE").value_or("")));
      if (meeting->text().size() >= sizeof where) throw Error(Errc::no_resources, "this host has too many addresses: choose one by TALLY_INTERFACE");
      meeting->text().copy(where, sizeof where - 1);
    } catch (...) {
      failure = std::current_exception();
    }
  }
  detail::check_mpi(::MPI_Bcast(where, sizeof where, MPI_CHAR, 0, group->handle()), "tell all ranks where rank 0 is");
  if (failure) std::rethrow_exception(failure);
  where[sizeof where - 1] = 0;
  if (!where[0]) throw Error(Errc::peer_lost, "rank 0 found no address at which others reach it", {job.rank, 0, 0, {}});
  if (!meeting) meeting.emplace(std::string(where));
  const std::string_view name = options.network_name();
  if (!options.is_flat() && options.transport == "thread") options.expect_transport("shm", "processes that an MPI started");
  if (name == "mpi") {
    FabricOptions fabric;
    fabric.window = std::size_t{4} << 20;
    fabric.frame_bytes = std::size_t{512} << 10;
    fabric.at_once = std::size_t{8} << 10;
    return detail::network_communicator(job, std::move(*meeting), options, detail::mpi_kind(group, fabric));
  }
  if (const auto found = detail::networks().find(name); found != detail::networks().end()) return found->second(job, options, &*meeting);
  throw Error(Errc::unsupported, {"this program has no network '", name, "': include tally/", name, ".hpp in it"});
}

}  // namespace mpi

}  // namespace tally::inline v0
