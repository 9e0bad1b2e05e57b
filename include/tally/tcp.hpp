// SPDX-License-Identifier: Apache-2.0
// Ranks on several hosts: they meet at rank 0, whose address the environment names; those of one host share memory, and to the
// others each connects by TCP when it has something to send.
#pragma once

#include <chrono>
#include <concepts>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bootstrap.hpp"
#include "host.hpp"
#include "launch.hpp"
#include "network/meeting.hpp"
#include "network/node.hpp"
#include "network/registry.hpp"
#include "transport/doorbell.hpp"
#include "transport/route.hpp"
#include "transport/tcp.hpp"

namespace tally::inline v0 {

namespace detail {

/// A rank's place in the network, and rank 0's registry.
struct NetworkJob {
  std::unique_ptr<Registry> registry;  // outlives the node: others hear of its end through it
  std::unique_ptr<NetworkNode> node;

  /// The node, which keeps the rest. `interface`: whose address this rank listens at; see choose_addresses(). Empty: where it reaches rank 0 from.
  static std::shared_ptr<NetworkNode> join(Meeting& meeting, Join me, const NetworkSettings& settings, std::string_view interface, const Registry::MakeNote& note) {
    auto job = std::make_shared<NetworkJob>();
    if (me.rank == 0) {
      FileDescriptor listener = meeting.listen(interface);
      Join like = me;
      like.job ^= meeting.nonce();
      job->registry = std::make_unique<Registry>(std::move(listener), like, settings, note);
    }
    if (!interface.empty()) me.listens = choose_addresses(interface, own_interfaces()).front();
    const auto find = [&] {
      NetworkNode::Place place{meeting.addresses(), 0, meeting.is_file() && me.rank != 0, meeting.is_here_only()};
      place.nonce = meeting.nonce();
      return place;
    };
    job->node = std::make_unique<NetworkNode>(find, me, settings);
    meeting.close();
    return {job, job->node.get()};
  }
};

/// Which ranks of a job share memory with this one.
struct Neighbourhood {
  std::vector<std::uint64_t> places;  // by rank, the same for ranks that share memory
  std::vector<Rank> numbers;          // this rank and those that it shares memory with: what they are in the job
  Rank me = 0;                        // among them

  /// `flat`: nobody is to, although some could.
  explicit Neighbourhood(const NetworkNode& node, bool flat = false) {
    for (Rank r = 0; r < node.size(); ++r) {
      places.push_back(flat ? static_cast<std::uint64_t>(r) : node.place(r));
      if (r == node.rank()) me = static_cast<Rank>(numbers.size());
      if (r == node.rank() || (!flat && node.place(r) == node.place(node.rank()))) numbers.push_back(r);
    }
  }
  int size() const { return static_cast<int>(numbers.size()); }
};

/// What all choose algorithms by, once it is known where they are: `at` by rank, the same for ranks that share memory.
inline CostModel network_model(const std::vector<std::uint64_t>& at, const Options& options, std::string_view network = "tcp") {
  const bool shared = Partition(at).largest() > 1;
  CostModel model = model_for(concat({shared ? "shm+" : "", network}), static_cast<int>(at.size()), options);
  if (shared) {
    model.across = {70, 40, 13};  // what follows against what memory takes
  } else {
    // Measured on loopback of the machine that the others are from. Between hosts a hop takes longer, and a byte as long as the line says.
    model.line = 7;
    model.message = 2.5f;
    model.far_byte = 0.0004f;
    model.turn = 10;
    model.across = {1, 1, 1};
  }
  return model;
}

inline std::string name_of_place(const NetworkNode& node) {
  const std::string_view key(reinterpret_cast<const char*>(node.key().data()), node.key().size());
  return concat({"tally/", ::getuid(), "/", hash_text(key), "/", node.place(node.rank()) % 1'000'000});  // the key itself is nobody else's business
}
/// Memory of the ranks of this host.
inline std::shared_ptr<SlotMemory> local_memory(const NetworkNode& node, const Neighbourhood& here, Options options, int lanes) {
  JobInfo those;
  those.rank = here.me;
  those.size = here.size();
  those.job = "of this host";
  options.slots.lanes = lanes;
  return Rendezvous(those, options, name_of_place(node)).meet();
}
/// Between hosts.
template <Network Net>
struct NetworkKind {
  std::string name, settings;  // settings: the same on all ranks
  int lanes = 2;
  std::function<std::unique_ptr<Net>(std::shared_ptr<NetworkNode> node, std::vector<Rank> members)> make;
};
inline NetworkKind<TcpTransport> tcp_kind(const TcpOptions& tcp) {
  return {"tcp", concat({tcp.window, " ", tcp.frame_bytes, tcp.checksum ? " checked" : ""}), tcp.lanes, [tcp](std::shared_ptr<NetworkNode> node, std::vector<Rank> members) { return std::make_unique<TcpTransport>(std::move(node), TcpTransport::world, std::move(members), tcp); }};
}

/// The network for all, and memory for the ranks of this host; in this order, since some networks need all ranks to come about.
template <Network Net>
std::unique_ptr<RouteTransport<Net>> network_route(std::shared_ptr<NetworkNode> node, const Neighbourhood& here, const Options& options, const NetworkKind<Net>& kind) {
  Erasure<RouteTransport<Net>>::enable();
  std::vector<Rank> all;
  for (Rank r = 0; r < node->size(); ++r) all.push_back(r);
  auto net = kind.make(node, std::move(all));
  std::unique_ptr<SlotTransport> local;
  if (here.size() > 1) {
    local = std::make_unique<SlotTransport>(local_memory(*node, here, options, kind.lanes), here.me, false, here.numbers);
    local->hang(std::make_unique<DatagramDoorbell>(name_of_place(*node) + "/bell", here.me, here.size()));
  }
  SlotOptions slots = options.slots;
  slots.lanes = kind.lanes;
  return std::make_unique<RouteTransport<Net>>(std::move(net), std::move(local), here.places, slots);
}

template <Network Net>
Communicator network_communicator(const JobInfo& job, Meeting meeting, const Options& options, const NetworkKind<Net>& kind) {
  const bool flat = options.is_flat();
  Join me;
  me.rank = job.rank;
  me.size = job.size;
  me.accounting = options.accounting;
  me.job = hash_text(job.job);
  me.boot = hash_text(boot_id());
  me.place = hash_text(sharing_id());
  me.settings = hash_text(concat({flat ? "" : "shm+", kind.name, " ", kind.lanes, " ", kind.settings, " ", options.slots.slots, " ", options.slots.slot_bytes, " ", options.slots.budget}));
  const auto node = NetworkJob::join(meeting, me, NetworkSettings::from_environment(options.timeout), environment("TALLY_INTERFACE").value_or(""), [&](const std::vector<RankEntry>& entries) {
    std::vector<std::uint64_t> places;
    for (const RankEntry& entry : entries) places.push_back(flat ? places.size() : entry.place);
    return std::string(ControlStream::as_bytes(network_model(places, options, kind.name)));
  });
  CostModel model;
  std::string_view note = node->note();
  if (!ControlStream::take(note, model)) throw Error(Errc::protocol, "rank 0 sent no model to choose algorithms by: were the ranks built with the same tally?", {job.rank, 0, 0, {}});
  const Neighbourhood here(*node, flat);
  if (here.size() == job.size) return make_communicator(local_memory(*node, here, options, kind.lanes), job.rank, options);  // there is but one host
  if (!flat) options.expect_transport(kind.name, "on several hosts");
  return make_communicator(network_route(node, here, options, kind), model, options);
}
inline Communicator tcp_communicator(const JobInfo& job, Meeting meeting, const Options& options, const TcpOptions& defaults) {
  return network_communicator(job, std::move(meeting), options, tcp_kind(TcpOptions::from_environment(defaults)));
}
inline Meeting meeting_at(Meeting* place, const Options& options) { return place ? std::move(*place) : Meeting::from_environment(options.timeout); }
inline const bool tcp_is_a_network = networks().emplace("tcp", [](const JobInfo& job, const Options& options, Meeting* place) { return tcp_communicator(job, meeting_at(place, options), options, {}); }).second;

/// f(comm) on n ranks of this host that talk over a network all the same.
template <Network Net, std::invocable<Communicator&> F>
void launch_network(int n, F f, RankKind kind, const Options& defaults, const NetworkKind<Net>& network) {
  Options options = Options::from_environment(defaults);
  options.expect_transport(network.name, "to talk over a network");
  options.transport = network.name;
  const auto rank = [&](Communicator& here) {
    char where[64] = {};
    std::optional<Meeting> meeting;
    if (here.rank() == 0) {
      meeting.emplace(listen_at(resolve("127.0.0.1:0").front()));
      meeting->text().copy(where, sizeof where - 1);
    }
    here.broadcast(std::span(where), 0);
    if (!meeting) meeting.emplace(std::string(where));
    JobInfo job;
    job.rank = here.rank();
    job.size = n;
    Communicator comm = network_communicator(job, std::move(*meeting), options, network);
    try {
      f(comm);
    } catch (const std::exception& error) {
      comm.abort(error.what());  // before it says goodbye, which would hide why
      throw;
    }
  };
  Options local = options;
  local.transport.clear();
  local.accounting = false;  // of the meeting itself
  local.meters = nullptr;
  if (kind == RankKind::threads) launch_threads(n, rank, local);
  else launch_processes(n, rank, local);
}

}  // namespace detail

/// As init(), with the settings of TCP: for ranks of any hosts, which meet at TALLY_ADDRESS (HOST:PORT of rank 0), or at MASTER_ADDR and
/// the port after MASTER_PORT. Those of one host share memory, unless TALLY_TRANSPORT=tcp. Throws Errc::timeout, naming who is missing,
/// when not all are there in time.
inline Communicator init_tcp(const Options& defaults = {}, const TcpOptions& tcp = {}) {
  const Options options = Options::from_environment(defaults);
  return detail::tcp_communicator(detail::job_from_environment(), detail::Meeting::from_environment(options.timeout), options, tcp);
}

/// As launch(), but the ranks talk over TCP on loopback, as if each were on a host of its own.
template <std::invocable<Communicator&> F>
void launch_tcp(int n, F f, RankKind kind = processes, const Options& defaults = {}, const TcpOptions& tcp = {}) {
  detail::launch_network(n, std::move(f), kind, defaults, detail::tcp_kind(TcpOptions::from_environment(tcp)));
}

}  // namespace tally::inline v0
