// SPDX-License-Identifier: Apache-2.0
// UCX between hosts: init() has it as the network "ucx" (TALLY_NETWORK=ucx, or TALLY_TRANSPORT=ucx for all ranks) where this header is
// included and libucp is linked (CMake target tally::ucx). Ranks meet as for TCP. Which devices UCX uses is its own settings' business:
// UCX_TLS, UCX_NET_DEVICES.
#pragma once

#include <concepts>
#include <memory>
#include <utility>
#include <vector>

#include "tcp.hpp"
#include "transport/ucx.hpp"

namespace tally::inline v0 {

namespace detail {

inline NetworkKind<UcxTransport> ucx_kind(const UcxOptions& options) {
  return {"ucx", options.text(), options.lanes, [options](std::shared_ptr<NetworkNode> node, std::vector<Rank> members) {
            return std::make_unique<UcxTransport>(std::move(node), UcxTransport::world, std::move(members), options, [in_memory = options.shared_memory](const FabricMembers& who) { return std::make_unique<UcxFabric>(who, in_memory); });
          }};
}
inline const bool ucx_is_a_network = networks().emplace("ucx", [](const JobInfo& job, const Options& options, Meeting* place) { return network_communicator(job, meeting_at(place, options), options, ucx_kind(UcxOptions::from_environment({}))); }).second;

}  // namespace detail

/// As launch(), but the ranks talk by UCX, as if each were on a host of its own.
template <std::invocable<Communicator&> F>
void launch_ucx(int n, F f, RankKind kind = processes, const Options& defaults = {}, const UcxOptions& ucx = {}) {
  detail::launch_network(n, std::move(f), kind, defaults, detail::ucx_kind(UcxOptions::from_environment(ucx)));
}

}  // namespace tally::inline v0
