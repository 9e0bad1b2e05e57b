// SPDX-License-Identifier: Apache-2.0
// Jobs over networks, in tests: ranks that are threads of one process and meet on loopback, as if they were on hosts of their own; and
// hosts that are network name spaces.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "processes.hpp"

namespace test {

using namespace tally;
using namespace std::chrono_literals;

inline SocketAddress loopback(int family) { return detail::resolve(family == 6 ? "[::1]:0" : "127.0.0.1:0").front(); }

/// For a node that is to find the registry there.
inline detail::NetworkNode::FindRegistry at(const SocketAddress& address) {
  return [address] { return detail::NetworkNode::Place{{address}, 0, false, true}; };
}

/// A registry on loopback, and how to join it.
struct Job {
  explicit Job(int n, int family = 4, nanoseconds timeout = 20s) : limit(timeout) {
    like.size = n;
    auto listener = detail::listen_at(loopback(family));
    address = detail::own_address(listener);
    registry = std::make_unique<detail::Registry>(std::move(listener), like, settings());
  }
  /// `place`: the same for ranks that are on one host; so is their clock.
  std::shared_ptr<detail::NetworkNode> join(Rank r, std::uint64_t place = 0, const Clock& clock = Clock::host()) const {
    detail::Join me = like;
    me.rank = r;
    me.place = me.boot = place;
    return std::make_shared<detail::NetworkNode>(at(address), me, settings(clock));
  }
  detail::NetworkSettings settings(const Clock& clock = Clock::host()) const {
    detail::NetworkSettings settings(limit, {}, clock);
    settings.encrypt = encrypt;
    return settings;
  }
  static inline detail::MakeCipher encrypt;  // of all jobs of this program
  detail::Join like;
  nanoseconds limit;
  SocketAddress address;
  std::unique_ptr<detail::Registry> registry;
};

/// f(rank) in a thread each; throws what one of them threw first.
template <class F>
void on_ranks(int n, F&& f) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(n));
  std::vector<std::thread> threads;
  for (Rank r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      try {
        f(r);
      } catch (...) {
        errors[static_cast<std::size_t>(r)] = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}
inline std::vector<Rank> all(int n) {
  std::vector<Rank> ranks;
  for (Rank r = 0; r < n; ++r) ranks.push_back(r);
  return ranks;
}
enum class Way { network, route };  // for all; or only between hosts
template <Network Net>
Communicator over(const detail::NetworkKind<Net>& kind, const std::shared_ptr<detail::NetworkNode>& node, const Options& options = {}, Way way = Way::network, const Clock& clock = Clock::host()) {
  const detail::Neighbourhood here(*node, way == Way::network);
  const CostModel model = detail::network_model(here.places, options);
  return detail::make_communicator(detail::network_route(node, here, options, kind), model, options, clock);
}
inline Communicator over_tcp(const std::shared_ptr<detail::NetworkNode>& node, const Options& options = {}, const TcpOptions& tcp = {}, Way way = Way::network, const Clock& clock = Clock::host()) { return over(detail::tcp_kind(tcp), node, options, way, clock); }
/// f(comm) on ranks that are threads, rank r at places[r]; what each of them threw.
template <Network Net, class F>
std::vector<Caught> outcomes(const detail::NetworkKind<Net>& kind, const std::vector<std::uint64_t>& places, Way way, F&& f, const Options& options = {}) {
  const Job job(static_cast<int>(places.size()));
  std::vector<Caught> results(places.size());
  on_ranks(job.like.size, [&](Rank r) {
    results[static_cast<std::size_t>(r)].record([&] {
      Communicator comm = over(kind, job.join(r, places[static_cast<std::size_t>(r)]), options, way);
      f(comm);
    });
  });
  return results;
}
template <class F>
std::vector<Caught> outcomes(const std::vector<std::uint64_t>& places, Way way, F&& f, const Options& options = {}, const TcpOptions& tcp = {}) {
  return outcomes(detail::tcp_kind(tcp), places, way, std::forward<F>(f), options);
}

/// A host's clock that is wrong by an hour, and runs fast or slow.
struct OtherClock final : TimeSource {
  OtherClock(double hours, double ppm) : offset(static_cast<Ticks>(3.6e12 * (hours + 2))), rate(1 + 1e-6 * ppm) {}
  Ticks now() const override { return offset + static_cast<Ticks>(static_cast<double>(Clock::monotonic() - begin) * rate); }
  Ticks offset, begin = Clock::monotonic();
  double rate;
};

/// Each rank comes late in turn, and all accounts say so, as far as the ranks' own clocks can tell.
inline void late_ranks_are_blamed(Communicator& comm) {
  const Rank r = comm.rank();
  const int n = comm.size();
  const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch().count(); };
  int sure = 0;
  for (const std::size_t count : {1u, 300'000u})
    for (int i = 0; i < 12; ++i) {
      const Rank late = i % n;
      std::vector<float> data(count, 1);
      comm.barrier();
      if (r == late) std::this_thread::sleep_for(30ms);
      const std::int64_t queued = test::queued_ns();
      std::int64_t mine[3] = {now(), 0, 0};
      const Report report = comm.all_reduce(std::span(data), max);
      mine[1] = now() - report.elapsed.count();  // it had called by then
      mine[2] = test::queued_ns() - queued;      // for so long other threads had the cores
      std::vector<std::int64_t> posts(3 * static_cast<std::size_t>(n));
      comm.all_gather(std::span<const std::int64_t>(mine), std::span(posts));
      expect(report.busy() + report.idle() == report.elapsed, "the parts are the whole");
      expect(report.transport_name() == comm.transport_name(), "its transport");
      std::int64_t others = 0;
      nanoseconds tolerance = 10ms;  // who has no core sends late, and is waited for, too
      for (Rank other = 0; other < n; ++other) {
        if (other != late) others = std::max(others, posts[3 * static_cast<std::size_t>(other) + 1]);
        tolerance += nanoseconds(posts[3 * static_cast<std::size_t>(other) + 2]);
      }
      const nanoseconds alone(posts[3 * static_cast<std::size_t>(late)] - others);  // for so long it alone was missing
      if (alone < 15ms) continue;  // a machine that takes cores away
      ++sure;
      const std::string figures = detail::concat({" (rank ", r, ", late ", late, ", ", alone.count(), " ns, ", report.wait_arrival.count(), " ns)"});
      expect(report.last_arrival == late, "the late rank came last, not " + std::to_string(report.last_arrival) + figures);
      if (r == late) expect(report.wait_arrival <= tolerance, "who is late waits for nobody" + figures);
      nanoseconds blamed{};
      for (const Blame& blame : report.blame())
        if (blame.rank == late) blamed = blame.arrival;
      if (r != late) expect(blamed + report.busy() >= alone - tolerance, "the late one is blamed" + figures);
    }
  expect(sure > 0, "at least one of them was late for sure");
}

/// How many this process may have, after it has asked for all.
inline std::size_t most_descriptors() {
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &files);
  return files.rlim_max;
}
/// A connection of a stranger's.
inline detail::FileDescriptor knock(const SocketAddress& at) {
  int error = 0;
  detail::FileDescriptor fd = detail::begin_connect(at, error);
  expect(error == 0, "a socket");
  expect(detail::wait_for_events(fd.get(), POLLOUT, std::chrono::steady_clock::now() + 5s), "a connection");
  return fd;
}
inline void say(const detail::FileDescriptor& fd, std::string_view what) { (void)!::send(fd.get(), what.data(), what.size(), MSG_NOSIGNAL); }

/// Two hosts, as far as the network goes, and a cable between them: 10.213.0.1 and .2. They go with this object.
class TwoHosts {
 public:
  TwoHosts() {
    problem_ = run({"ip netns add ", name(0)}) && run({"ip netns add ", name(1)}) && run({"ip link add ", link(0), " netns ", name(0), " type veth peer name ", link(1), " netns ", name(1)}) ? "" : "no right to make network namespaces, or no ip command";
    for (int host = 0; host < 2 && problem_.empty(); ++host)
      if (!run({"ip -n ", name(host), " addr add 10.213.0.", host + 1, "/24 dev ", link(host)}) || !run({"ip -n ", name(host), " link set ", link(host), " up"}) || !run({"ip -n ", name(host), " link set lo up"})) problem_ = "no addresses in network namespaces";
  }
  ~TwoHosts() {
    for (int host = 0; host < 2; ++host) run({"ip netns del ", name(host)});
  }
  const std::string& problem() const { return problem_; }
  void cut() const { run({"ip -n ", name(0), " link set ", link(0), " down"}); }
  /// This process is on that host from here on.
  void enter(int host) const {
    const detail::FileDescriptor fd(::open(("/run/netns/" + name(host)).c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd || ::setns(fd.get(), CLONE_NEWNET) != 0) throw std::runtime_error("cannot enter a network namespace");
  }

 private:
  std::string name(int host) const { return detail::concat({"tally-test-", maker_, host ? "-b" : "-a"}); }
  std::string link(int host) const { return detail::concat({host ? "tb" : "ta", maker_}); }
  static bool run(std::initializer_list<detail::Piece> command) { return std::system((detail::concat(command) + " >/dev/null 2>&1").c_str()) == 0; }
  const pid_t maker_ = ::getpid();
  std::string problem_;
};

}  // namespace test
