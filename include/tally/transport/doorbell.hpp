// SPDX-License-Identifier: Apache-2.0
// How a rank that sleeps on a descriptor, because it waits for a network, too, is woken by ranks that share its memory: a datagram
// to a socket in the abstract name space, which leaves no file behind.
#pragma once

#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../local_socket.hpp"
#include "slots.hpp"

namespace tally::inline v0 {

class DatagramDoorbell final : public Doorbell {
 public:
  /// `name`: the job's ranks' of this host and nobody else's; `key`: of them, this communicator's.
  DatagramDoorbell(std::string name, Rank me, int size, std::uint64_t key = 0) : name_(std::move(name)), fd_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
    if (!fd_) throw Error(Errc::no_resources, {"no descriptor to be woken by: ", detail::errno_text(errno)}, {me, -1, 0, {}});
    for (Rank r = 0; r < size; ++r) doors_.push_back(detail::local_address(detail::concat({name_, "/", key, "/", r})));
    const auto& [address, length] = doors_[static_cast<std::size_t>(me)];
    if (::bind(fd_.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) throw Error(Errc::no_resources, {"cannot be woken by other processes of this host: ", detail::errno_text(errno)}, {me, -1, 0, {}});
  }
  std::unique_ptr<Doorbell> another(std::uint64_t key, Rank me, int size) const override { return std::make_unique<DatagramDoorbell>(name_, me, size, key); }
  int fd() const override { return fd_.get(); }
  /// Where there is no room for it, the sleeper is going to wake up anyway.
  void ring(Rank r) const override {
    const auto& [address, length] = doors_[static_cast<std::size_t>(r)];
    const char one = 1;
    while (::sendto(fd_.get(), &one, 1, MSG_DONTWAIT | MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&address), length) < 0 && errno == EINTR) {}
  }
  void ring_all() const override {
    for (std::size_t r = 0; r < doors_.size(); ++r) ring(static_cast<Rank>(r));
  }
  void answer() const override {
    char any;
    for (int i = 0; i < 64 && ::recv(fd_.get(), &any, 1, MSG_DONTWAIT) >= 0; ++i) {}
  }

 private:
  std::string name_;
  detail::FileDescriptor fd_;
  std::vector<std::pair<sockaddr_un, socklen_t>> doors_;
};

}  // namespace tally::inline v0
