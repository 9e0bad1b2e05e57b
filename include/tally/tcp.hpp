// SPDX-License-Identifier: Apache-2.0
// Ranks on several hosts, over TCP: they meet at rank 0, whose address the environment names, and each connects to those that it
// has something to send to.
#pragma once

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bootstrap.hpp"
#include "host.hpp"
#include "network/node.hpp"
#include "network/registry.hpp"
#include "transport/tcp.hpp"

namespace tally::inline v0 {

namespace detail {

/// Where rank 0 listens: TALLY_ADDRESS, or beside the port that torchrun names.
inline std::vector<SocketAddress> registry_address() {
  if (const auto where = environment("TALLY_ADDRESS")) return resolve(*where);
  const auto host = environment("MASTER_ADDR");
  const auto port = environment_number<int>("MASTER_PORT", 1, 65534);
  if (host && port) return resolve(*host, *port + 1);  // that port itself is the framework's
  throw Error(Errc::invalid_argument, "ranks on several hosts need an address to meet at: set TALLY_ADDRESS=HOST:PORT, the same for all, to one of rank 0's host");
}

/// A rank's place in the network, and rank 0's registry.
struct NetworkJob {
  std::unique_ptr<Registry> registry;  // outlives the node: others hear of its end through it
  std::unique_ptr<NetworkNode> node;

  /// The node, which keeps the rest.
  static std::shared_ptr<NetworkNode> join(const std::vector<SocketAddress>& where, const Join& me, nanoseconds timeout, const std::string& note) {
    auto job = std::make_shared<NetworkJob>();
    if (me.rank == 0) job->registry = std::make_unique<Registry>(listen_at_one_of(where), me, timeout, note);
    job->node = std::make_unique<NetworkNode>(where, me, timeout);
    return {job, job->node.get()};
  }

 private:
  static FileDescriptor listen_at_one_of(const std::vector<SocketAddress>& where) {
    for (std::size_t i = 0;; ++i) try {
        return listen_at(where[i]);
      } catch (const Error&) {
        if (i + 1 == where.size()) throw;
      }
  }
};

inline Communicator tcp_communicator(const JobInfo& job, const std::vector<SocketAddress>& where, const Options& options, const TcpOptions& tcp) {
  Join me;
  me.rank = job.rank;
  me.size = job.size;
  me.accounting = options.accounting;
  me.job = hash_text(job.job);
  me.boot = hash_text(boot_id());
  me.settings = hash_text(concat({"tcp ", tcp.lanes, " ", tcp.window, " ", tcp.frame_bytes}));
  CostModel model = model_for("tcp", job.size, options);
  const auto node = NetworkJob::join(where, me, options.timeout, std::string(ControlStream::as_bytes(model)));
  std::string_view note = node->note();
  if (!ControlStream::take(note, model)) throw Error(Errc::protocol, "rank 0 sent no model to choose algorithms by: were the ranks built with the same tally?", {job.rank, 0, 0, {}});
  std::vector<Rank> all;
  for (Rank r = 0; r < job.size; ++r) all.push_back(r);
  return make_communicator(std::make_unique<TcpTransport>(node, TcpTransport::world, std::move(all), tcp), model, options);
}

}  // namespace detail

/// As init(), for ranks of any hosts, over TCP. They meet at TALLY_ADDRESS (HOST:PORT of rank 0), or at MASTER_ADDR and the port after
/// MASTER_PORT. Throws Errc::timeout, naming who is missing, when not all are there in time.
inline Communicator init_tcp(const Options& defaults = {}, const TcpOptions& tcp = {}) {
  const Options options = Options::from_environment(defaults);
  const JobInfo job = detail::job_from_environment();
  options.expect_transport("tcp", "of several hosts");
  return detail::tcp_communicator(job, detail::registry_address(), options, tcp);
}

}  // namespace tally::inline v0
