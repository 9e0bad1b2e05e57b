// SPDX-License-Identifier: Apache-2.0
// A network that is worse than loopback: stands between the other ranks of a job and one of them, and delays, slows, damages or cuts
// what is sent to it. That rank is to meet at address() instead of the registry's, so that the others are told to reach it here.
#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "network.hpp"

namespace test {

struct Faults {
  std::chrono::nanoseconds delay{};     // of each byte
  double bytes_per_second = 0;          // of all connections together; 0: no limit
  std::vector<double> of_connections{};  // of each alone, in the order in which they come, which is not limited together then
  std::size_t breaks = ~std::size_t{0}, breaks_at = 0;  // which of them, and after how many bytes
  std::size_t damaged = ~std::size_t{0};  // which byte has a bit turned over
  std::size_t reset_at = ~std::size_t{0}, stop_at = ~std::size_t{0};  // after so many bytes connections break, or nothing comes any more
};

class FaultProxy {
 public:
  using Clock = std::chrono::steady_clock;
  FaultProxy(const tally::SocketAddress& registry, const Faults& faults) : registry_(registry), faults_(faults), to_registry_(listener()), to_rank_(listener()), thread_([this] { work(); }) {}
  ~FaultProxy() {
    over_.store(true);
    thread_.join();
  }
  FaultProxy(const FaultProxy&) = delete;
  tally::SocketAddress address() const { return tally::detail::own_address(to_registry_); }
  /// Bytes that each connection has carried, in the order in which they came.
  std::vector<std::size_t> carried() {
    const std::lock_guard lock(mutex_);
    return carried_;
  }

 private:
  using FileDescriptor = tally::detail::FileDescriptor;
  struct Way {
    int from = -1, to = -1;
    bool faulty = false, is_join = false, ended = false, shut = false;
    std::string joining;  // what the rank says first, until it is whole
    std::deque<std::pair<Clock::time_point, std::string>> queue;
    std::size_t number = 0;
    Clock::time_point free{};
  };
  struct Link {
    FileDescriptor a, b;
    Way there, back;
  };
  static FileDescriptor listener() {
    FileDescriptor fd = tally::detail::listen_at(tally::detail::resolve("127.0.0.1:0").front());
    tally::detail::set_option(fd, SOL_SOCKET, SO_RCVBUF, 32 << 10);  // a slow line does not swallow what it has yet to carry
    return fd;
  }

  void work() {
    while (!over_.load()) {
      std::vector<pollfd> events{{to_registry_.get(), POLLIN, 0}, {to_rank_.get(), POLLIN, 0}};
      for (const Link& link : links_)
        for (const int fd : {link.a.get(), link.b.get()}) events.push_back({fd, POLLIN, 0});
      bool held = false;
      for (const Link& link : links_) held = held || !link.there.queue.empty() || !link.back.queue.empty();
      ::poll(events.data(), events.size(), held ? 0 : 10);
      if (events[0].revents) accept(to_registry_, registry_, false);
      if (events[1].revents && rank_.is_valid()) accept(to_rank_, rank_, true);
      for (auto link = links_.begin(); link != links_.end();) {
        const bool goes_on = pass(link->there) && pass(link->back) && !(link->there.shut && link->back.shut);
        if (goes_on) ++link;
        else link = links_.erase(link);
      }
      if (held) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
  void accept(const FileDescriptor& listener, const tally::SocketAddress& target, bool faulty) {
    FileDescriptor guest(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    int error = 0;
    FileDescriptor onward = tally::detail::begin_connect(target, error);
    if (!guest || error != 0 || !tally::detail::wait_for_events(onward.get(), POLLOUT, Clock::now() + std::chrono::seconds(5))) return;
    for (const auto* fd : {&guest, &onward}) tally::detail::tune(*fd, std::chrono::seconds(30));
    Link& link = links_.emplace_back();
    link.there = {guest.get(), onward.get(), faulty, !faulty, false, false, {}, {}, 0, {}};
    link.back = {onward.get(), guest.get(), false, false, false, false, {}, {}, 0, {}};
    if (faulty) {
      const std::lock_guard lock(mutex_);
      link.there.number = carried_.size();
      carried_.push_back(0);
    }
    link.a = std::move(guest);
    link.b = std::move(onward);
  }
  /// Moves what is due; false once the connection is over.
  bool pass(Way& way) {
    char buffer[65536];
    std::size_t waiting = 0;
    for (const auto& [due, bytes] : way.queue) waiting += bytes.size();
    while (!way.ended && waiting < sizeof buffer) {
      const ssize_t got = ::recv(way.from, buffer, sizeof buffer, MSG_DONTWAIT);
      if (got < 0 && (errno == EAGAIN || errno == EINTR)) break;
      if (got <= 0) {
        way.ended = true;
        break;
      }
      std::string bytes(buffer, static_cast<std::size_t>(got));
      if (way.is_join && !advertise(way, bytes)) break;
      waiting += bytes.size();
      if (way.faulty && !spoil(way.number, bytes)) return false;
      Clock::time_point due = Clock::now();
      const bool each = !faults_.of_connections.empty();
      const double rate = !way.faulty ? 0 : !each ? faults_.bytes_per_second : way.number < faults_.of_connections.size() ? faults_.of_connections[way.number] : 0;
      Clock::time_point& free = each ? way.free : free_;
      if (rate > 0) due = free = std::max(due, free) + std::chrono::nanoseconds(static_cast<std::int64_t>(static_cast<double>(bytes.size()) / rate * 1e9));
      if (way.faulty) due += faults_.delay;
      way.queue.emplace_back(due, std::move(bytes));
    }
    while (!way.queue.empty() && way.queue.front().first <= Clock::now()) {
      std::string& bytes = way.queue.front().second;
      const ssize_t sent = ::send(way.to, bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent < 0 && (errno == EAGAIN || errno == EINTR)) break;
      if (sent < 0) return false;
      bytes.erase(0, static_cast<std::size_t>(sent));
      if (bytes.empty()) way.queue.pop_front();
    }
    if (way.ended && way.queue.empty() && !std::exchange(way.shut, true)) ::shutdown(way.to, SHUT_WR);
    return true;
  }
  /// The rank says that it listens where it does; here it is made to say that it does here. False until that is whole.
  bool advertise(Way& way, std::string& bytes) {
    way.joining += bytes;
    tally::detail::ControlHeader header;
    tally::detail::Join join;
    if (way.joining.size() < sizeof header + sizeof join) return false;
    std::memcpy(&join, way.joining.data() + sizeof header, sizeof join);
    rank_ = join.listens.is_valid() ? join.listens : tally::detail::resolve("127.0.0.1:" + std::to_string(join.listens.port)).front();
    join.listens = tally::detail::own_address(to_rank_);
    std::memcpy(way.joining.data() + sizeof header, &join, sizeof join);
    bytes = std::move(way.joining);
    way.is_join = false;
    return true;
  }
  /// False if the connection breaks.
  bool spoil(std::size_t connection, std::string& bytes) {
    {
      const std::lock_guard lock(mutex_);
      carried_[connection] += bytes.size();
      if (connection == faults_.breaks && carried_[connection] > faults_.breaks_at) return false;
    }
    const std::size_t before = std::exchange(passed_, passed_ + bytes.size());
    if (faults_.damaged >= before && faults_.damaged < passed_) bytes[faults_.damaged - before] = static_cast<char>(bytes[faults_.damaged - before] ^ 4);
    if (passed_ > faults_.stop_at) bytes.resize(faults_.stop_at > before ? faults_.stop_at - before : 0);
    return passed_ <= faults_.reset_at;
  }

  tally::SocketAddress registry_, rank_;
  Faults faults_;
  FileDescriptor to_registry_, to_rank_;
  std::list<Link> links_;
  std::mutex mutex_;
  std::vector<std::size_t> carried_;
  std::size_t passed_ = 0;
  Clock::time_point free_{};
  std::atomic<bool> over_{false};
  std::thread thread_;
};

/// f(comm) on two ranks; what is sent to rank 1 goes by the bad network.
template <class F>
std::vector<Caught> through(const Job& job, const FaultProxy& proxy, const TcpOptions& tcp, F&& f, const Options& options = {}) {
  std::vector<Caught> results(2);
  on_ranks(2, [&](Rank r) {
    results[static_cast<std::size_t>(r)].record([&] {
      detail::Join me = job.like;
      me.rank = r;
      auto node = std::make_shared<detail::NetworkNode>(at(r == 1 ? proxy.address() : job.address), me, job.limit);
      Communicator comm = over_tcp(node, options, tcp);
      f(comm);
    });
  });
  return results;
}

}  // namespace test
