// SPDX-License-Identifier: Apache-2.0
// How processes of one host meet: sockets in the abstract name space, which leave no file behind, that move whole records and a
// descriptor.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "error.hpp"
#include "file.hpp"

namespace tally::inline v0::detail {

/// A socket of whole records.
inline FileDescriptor local_socket() {
  FileDescriptor fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd) throw Error(Errc::no_resources, {"no descriptor for a socket: ", errno_text(errno)});
  return fd;
}
inline constexpr std::size_t longest_local_name = sizeof(sockaddr_un::sun_path) - 2;
inline std::pair<sockaddr_un, socklen_t> local_address(std::string_view name) {
  if (name.size() > longest_local_name) throw Error(Errc::invalid_argument, {"'", name, "' is too long a name for a local socket"});
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // a leading 0: abstract
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

/// A connected Unix socket, or none, that moves whole records and one descriptor, up to a deadline.
class Connection {
 public:
  using Instant = std::chrono::steady_clock::time_point;
  explicit Connection(FileDescriptor socket = FileDescriptor()) : socket_(std::move(socket)) {}
  explicit operator bool() const { return static_cast<bool>(socket_); }

  static bool wait_any(std::vector<pollfd>& events, Instant deadline) {
    for (;;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count() + 1;  // never early
      const int ready = ::poll(events.data(), events.size(), static_cast<int>(std::clamp<std::int64_t>(left, 0, 1 << 30)));
      if (ready >= 0 || errno != EINTR) return ready > 0;
    }
  }
  int get() const { return socket_.get(); }
  ucred peer() const {
    ucred credentials{};
    socklen_t length = sizeof credentials;
    if (::getsockopt(socket_.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) throw Error(Errc::protocol, {"cannot tell who connected: ", errno_text(errno)});
    return credentials;
  }
  bool send(const void* data, std::size_t bytes, int descriptor = -1) const {
    iovec part{const_cast<void*>(data), bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (descriptor >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
    }
    return ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
  }
  /// Exactly one record of `bytes`; false on anything else.
  bool receive(void* data, std::size_t bytes, FileDescriptor* descriptor, Instant deadline) const {
    std::vector<pollfd> readable{{socket_.get(), POLLIN, 0}};
    if (!wait_any(readable, deadline)) return false;
    iovec part{data, bytes};
    msghdr message{};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (const cmsghdr* header = got < 0 ? nullptr : CMSG_FIRSTHDR(&message); header && header->cmsg_type == SCM_RIGHTS) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      FileDescriptor received(fd);
      if (descriptor) *descriptor = std::move(received);
    }
    return got == static_cast<ssize_t>(bytes) && !(message.msg_flags & MSG_TRUNC);
  }

 private:
  FileDescriptor socket_;
};

}  // namespace tally::inline v0::detail
