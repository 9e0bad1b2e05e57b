// SPDX-License-Identifier: Apache-2.0
// Internet addresses, and sockets that never block: how they are named, resolved, opened and asked what became of them.
#pragma once

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../file.hpp"

namespace tally::inline v0 {

/// An address of IPv4 or IPv6 and a port. A plain value, so ranks can send it to each other; from elsewhere, check is_valid().
struct SocketAddress {
  std::uint16_t family = 0;  // 4, 6; 0: none
  std::uint16_t port = 0;
  std::uint32_t scope = 0;  // of link-local IPv6: the interface's index on this host
  std::uint8_t ip[16] = {};

  bool is_valid() const { return family == 4 || family == 6; }
  bool operator==(const SocketAddress&) const = default;
  bool is_loopback() const { return family == 4 ? ip[0] == 127 : family == 6 && std::all_of(ip, ip + 15, [](std::uint8_t byte) { return byte == 0; }) && ip[15] == 1; }
  bool same_host_as(const SocketAddress& other) const { return family == other.family && std::equal(ip, ip + 16, other.ip); }
  /// Any address of this host's.
  static SocketAddress wildcard(std::uint16_t of_family, std::uint16_t at_port = 0) {
    SocketAddress a;
    a.family = of_family;
    a.port = at_port;
    return a;
  }

  static SocketAddress of(const sockaddr_storage& from) {
    SocketAddress a;
    if (from.ss_family == AF_INET) {
      const auto& v4 = reinterpret_cast<const sockaddr_in&>(from);
      a.family = 4;
      a.port = ntohs(v4.sin_port);
      std::memcpy(a.ip, &v4.sin_addr, 4);
    } else if (from.ss_family == AF_INET6) {
      const auto& v6 = reinterpret_cast<const sockaddr_in6&>(from);
      a.port = ntohs(v6.sin6_port);
      if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {  // of IPv4, at a socket for both
        a.family = 4;
        std::memcpy(a.ip, v6.sin6_addr.s6_addr + 12, 4);
        return a;
      }
      a.family = 6;
      a.scope = v6.sin6_scope_id;
      std::memcpy(a.ip, &v6.sin6_addr, 16);
    }
    return a;
  }
  socklen_t fill(sockaddr_storage& to) const {
    to = {};
    if (family == 4) {
      auto& v4 = reinterpret_cast<sockaddr_in&>(to);
      v4.sin_family = AF_INET;
      v4.sin_port = htons(port);
      std::memcpy(&v4.sin_addr, ip, 4);
      return sizeof v4;
    }
    auto& v6 = reinterpret_cast<sockaddr_in6&>(to);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(port);
    v6.sin6_scope_id = scope;
    std::memcpy(&v6.sin6_addr, ip, 16);
    return sizeof v6;
  }
  /// As users write it: 10.0.0.1:29500, [fe80::1]:29500.
  std::string text() const {
    char words[INET6_ADDRSTRLEN] = "none";
    if (is_valid()) ::inet_ntop(family == 4 ? AF_INET : AF_INET6, ip, words, sizeof words);
    return family == 6 ? detail::concat({"[", words, "]:", port}) : detail::concat({words, ":", port});
  }
};
static_assert(sizeof(SocketAddress) == 24);

namespace detail {

/// Of "host:port" or "[IPv6]:port"; an error if it is neither.
inline std::pair<std::string_view, int> split_address(std::string_view where) {
  const std::size_t colon = where.rfind(':');
  const std::string_view digits = colon == std::string_view::npos ? std::string_view{} : where.substr(colon + 1);
  int port = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  if (digits.empty() || error != std::errc{} || end != digits.data() + digits.size() || port < 0 || port > 65535 || colon == 0)
    throw Error(Errc::invalid_argument, {"'", where, "' is no address: it should be HOST:PORT, or [IPV6]:PORT, with a port of 0 to 65535"});
  const std::string_view host = where.substr(0, colon);
  return {host.size() > 1 && host.front() == '[' && host.back() == ']' ? host.substr(1, host.size() - 2) : host, port};
}
/// All addresses of "host:port" or "[IPv6]:port", or an error that says what is wrong with it.
inline std::vector<SocketAddress> resolve(std::string_view where) {
  const auto [host, port] = split_address(where);
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  const std::string name(host), service = std::to_string(port);
  if (const int error = ::getaddrinfo(name.c_str(), service.c_str(), &hints, &found); error != 0)
    throw Error(Errc::invalid_argument, {"the host name '", name, "' does not resolve: ", error == EAI_SYSTEM ? errno_text(errno) : std::string(::gai_strerror(error))});
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> all(found, &::freeaddrinfo);
  std::vector<SocketAddress> addresses;
  for (const addrinfo* each = found; each; each = each->ai_next) {
    sockaddr_storage storage{};
    std::memcpy(&storage, each->ai_addr, std::min<std::size_t>(each->ai_addrlen, sizeof storage));
    if (const SocketAddress address = SocketAddress::of(storage); address.is_valid() && std::find(addresses.begin(), addresses.end(), address) == addresses.end()) addresses.push_back(address);
  }
  if (addresses.empty()) throw Error(Errc::invalid_argument, {"the host name '", name, "' has no address of IPv4 or IPv6"});
  return addresses;
}

inline FileDescriptor stream_socket(const SocketAddress& address) {
  FileDescriptor fd(::socket(address.family == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw Error(Errc::no_resources, {"cannot make a socket: ", errno_text(errno)});
  return fd;
}
inline void set_option(const FileDescriptor& fd, int level, int option, int value) { ::setsockopt(fd.get(), level, option, &value, sizeof value); }
/// What goes out is sent at once, and a peer that is cut off while this side only waits is given up after about `limit`, by the kernel's
/// probes; see is_cut_off() for the rest. No TCP_USER_TIMEOUT: it would end a connection to a peer that is well, but does not read for long.
inline void tune(const FileDescriptor& fd, std::chrono::milliseconds limit) {
  const int ms = static_cast<int>(std::clamp<std::int64_t>(limit.count(), 1000, 1 << 30)), probe = std::clamp(ms / 4000, 1, 30);
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, probe);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, probe);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

/// Whether half of the descriptors that this process may have are taken: each new one has the lowest number that is free.
inline bool is_scarce(const FileDescriptor& fd) {
  rlimit most{};
  return ::getrlimit(RLIMIT_NOFILE, &most) == 0 && static_cast<rlim_t>(fd.get()) > most.rlim_cur / 2;
}

/// Whether the other side's kernel has said nothing for so long, although it was asked again and again.
inline bool is_cut_off(const FileDescriptor& fd, std::chrono::milliseconds limit) {
  tcp_info info{};
  socklen_t length = sizeof info;
  if (::getsockopt(fd.get(), IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return false;
  return (info.tcpi_retransmits >= 3 || info.tcpi_probes >= 3) && info.tcpi_last_ack_recv > limit.count();
}

/// Listens there; port 0: at any that is free.
inline FileDescriptor listen_at(const SocketAddress& address) {
  FileDescriptor fd = stream_socket(address);
  set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.family == 6) set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
  sockaddr_storage where{};
  const socklen_t length = address.fill(where);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&where), length) != 0 || ::listen(fd.get(), 4096) != 0)
    throw Error(errno == EADDRINUSE || errno == EADDRNOTAVAIL || errno == EACCES ? Errc::invalid_argument : Errc::no_resources,
                {"cannot listen at ", address.text(), ": ", errno_text(errno), errno == EADDRINUSE ? "; another job may be using the port" : ""});
  return fd;
}
/// At all of this host's addresses, of both families where it has both.
inline FileDescriptor listen_anywhere(std::uint16_t port) {
  try {
    return listen_at(SocketAddress::wildcard(6, port));
  } catch (const Error& error) {
    if (error.errc() == Errc::invalid_argument) throw;  // the port is in use
  }
  return listen_at(SocketAddress::wildcard(4, port));  // a host without IPv6
}
inline SocketAddress own_address(const FileDescriptor& fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof storage;
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&storage), &length) != 0) return {};
  return SocketAddress::of(storage);
}

/// Begins to connect; whether that worked, error_of() tells once the socket is writable.
inline FileDescriptor begin_connect(const SocketAddress& address, int& error) {
  FileDescriptor fd = stream_socket(address);
  sockaddr_storage where{};
  const socklen_t length = address.fill(where);
  error = ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&where), length) == 0 || errno == EINPROGRESS || errno == EINTR ? 0 : errno;
  return fd;
}
inline int error_of(const FileDescriptor& fd) {
  int error = 0;
  socklen_t length = sizeof error;
  return ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length) == 0 ? error : errno;
}
/// Whether the descriptor is ready for `events` before the deadline.
inline bool wait_for_events(int fd, short events, std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    pollfd one{fd, events, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count() + 1;
    const int ready = ::poll(&one, 1, static_cast<int>(std::clamp<std::int64_t>(left, 0, 1 << 30)));
    if (ready >= 0 || errno != EINTR) return ready > 0;
  }
}

/// Bytes that came and were not used yet, up to a capacity; and those that are to go.
class StreamBuffer {
 public:
  explicit StreamBuffer(std::size_t capacity = 0) : bytes_(capacity) {}
  const std::byte* data() const { return bytes_.data() + begin_; }
  std::size_t size() const { return end_ - begin_; }
  bool empty() const { return begin_ == end_; }
  std::size_t room() const { return bytes_.size() - size(); }
  void take(std::size_t n) {
    begin_ += n;
    if (begin_ == end_) begin_ = end_ = 0;
  }
  void append(const void* from, std::size_t n) {
    if (n > 0) std::memcpy(space(n), from, n);
    end_ += n;
  }
  /// Where the next n bytes may be put, or all that there is room for; added() when they are there.
  std::byte* space(std::size_t n) {
    if (bytes_.size() - end_ < n && begin_ > 0) {
      std::memmove(bytes_.data(), bytes_.data() + begin_, size());
      end_ -= begin_;
      begin_ = 0;
    }
    return bytes_.data() + end_;
  }
  std::size_t space_left() const { return bytes_.size() - end_; }
  void added(std::size_t n) { end_ += n; }
  void grow(std::size_t capacity) {
    if (capacity > bytes_.size()) bytes_.resize(capacity);
  }

 private:
  std::vector<std::byte> bytes_;
  std::size_t begin_ = 0, end_ = 0;
};

}  // namespace detail
}  // namespace tally::inline v0
