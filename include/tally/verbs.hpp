// SPDX-License-Identifier: Apache-2.0
// RDMA between hosts: init() has it as the network "verbs" (TALLY_NETWORK=verbs, or TALLY_TRANSPORT=verbs for all ranks) where this header
// is included and libibverbs and librdmacm are linked (CMake target tally::verbs). Ranks meet as for TCP; TALLY_INTERFACE may name the
// device's address.
#pragma once

#include <concepts>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tcp.hpp"
#include "transport/verbs.hpp"

namespace tally::inline v0 {

namespace detail {

inline NetworkKind<VerbsTransport> verbs_kind(const VerbsOptions& options) {
  const std::string interface(environment("TALLY_INTERFACE").value_or(""));
  return {"verbs", options.text(), options.lanes, [options, interface](std::shared_ptr<NetworkNode> node, std::vector<Rank> members) {
            return std::make_unique<VerbsTransport>(std::move(node), VerbsTransport::world, std::move(members), options, [options, interface](const FabricMembers& who) { return std::make_unique<VerbsFabric>(who, options, interface); });
          }};
}
inline const bool verbs_is_a_network = networks().emplace("verbs", [](const JobInfo& job, const Options& options, Meeting* place) { return network_communicator(job, meeting_at(place, options), options, verbs_kind({})); }).second;

}  // namespace detail

/// As launch(), but the ranks talk by RDMA, as if each were on a host of its own.
template <std::invocable<Communicator&> F>
void launch_verbs(int n, F f, RankKind kind = processes, const Options& defaults = {}, const VerbsOptions& verbs = {}) {
  detail::launch_network(n, std::move(f), kind, defaults, detail::verbs_kind(verbs));
}

}  // namespace tally::inline v0
