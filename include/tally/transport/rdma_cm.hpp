// SPDX-License-Identifier: Apache-2.0
// What is needed of librdmacm: where to listen, and how to connect.
#pragma once

#include <fcntl.h>
#include <rdma/rdma_cma.h>

#include <cerrno>
#include <memory>
#include <string>
#include <string_view>

#include "../network/interfaces.hpp"

namespace tally::inline v0::detail {

/// Of what libibverbs and librdmacm make: how it ends.
template <auto destroy>
struct Destroys {
  template <class T>
  void operator()(T* thing) const {
    (void)destroy(thing);
  }
};

using RdmaEvents = std::unique_ptr<rdma_event_channel, Destroys<&::rdma_destroy_event_channel>>;
using RdmaId = std::unique_ptr<rdma_cm_id, Destroys<&::rdma_destroy_id>>;

inline void do_not_block(int fd) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }

/// At the first of this host's addresses that an RDMA device has; `interface`: see choose_addresses(). `address`: which one it became.
inline RdmaId listen_rdma(rdma_event_channel* events, std::string_view interface, SocketAddress& address) {
  std::string tried;
  for (SocketAddress each : choose_addresses(interface, own_interfaces())) {
    each.port = 0;
    tried += concat({tried.empty() ? "" : ", ", each.text().substr(0, each.text().rfind(':'))});
    rdma_cm_id* made = nullptr;
    if (::rdma_create_id(events, &made, nullptr, RDMA_PS_TCP) != 0) throw Error(Errc::no_resources, {"no RDMA connection: ", errno_text(errno)});
    RdmaId id(made);
    sockaddr_storage at;
    each.fill(at);
    if (::rdma_bind_addr(made, reinterpret_cast<sockaddr*>(&at)) != 0 || !made->verbs) continue;
    if (::rdma_listen(made, 1024) != 0) throw Error(Errc::no_resources, {"cannot listen for RDMA connections at ", each.text(), ": ", errno_text(errno)});
    each.port = ntohs(::rdma_get_src_port(made));
    address = each;
    return id;
  }
  throw Error(Errc::unsupported, {"no address of this host belongs to an RDMA device (tried: ", tried, "); TALLY_INTERFACE names another one"});
}

inline rdma_conn_param connection_parameters() {
  rdma_conn_param how{};
  how.responder_resources = how.initiator_depth = 1;
  how.retry_count = 7;
  how.rnr_retry_count = 7;  // for ever: a receiver that does not look is not gone
  return how;
}

}  // namespace tally::inline v0::detail
