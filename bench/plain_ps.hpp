// SPDX-License-Identifier: Apache-2.0
// A parameter server as plain as they come, to measure others against: two-sided messages over TCP, in the manner of ps-lite. A
// worker sends each server the range it pushes and its values; the server has a thread per worker, which receives them into a
// buffer, adds them, and, once all workers' of the step are in, sends the sums back. Blocking sockets; also to the own server.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace bench {

/// A TCP socket of loopback.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  static Socket listener() {
    Socket s(made(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
    const sockaddr_in any = address(0);
    made(::bind(s.fd_, reinterpret_cast<const sockaddr*>(&any), sizeof any), "bind");
    made(::listen(s.fd_, 64), "listen");
    return s;
  }
  static Socket connected(int port) {
    Socket s(made(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket"));
    const sockaddr_in to = address(port);
    made(::connect(s.fd_, reinterpret_cast<const sockaddr*>(&to), sizeof to), "connect");
    return s.at_once();
  }
  Socket accept() const { return Socket(made(::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC), "accept")).at_once(); }
  int port() const {
    sockaddr_in own{};
    socklen_t length = sizeof own;
    made(::getsockname(fd_, reinterpret_cast<sockaddr*>(&own), &length), "getsockname");
    return ntohs(own.sin_port);
  }
  int fd() const { return fd_; }

  void send_all(const void* data, std::size_t bytes, int flags = 0) const {
    for (const char* at = static_cast<const char*>(data); bytes > 0;) {
      const ssize_t sent = ::send(fd_, at, bytes, flags | MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) throw std::system_error(errno, std::generic_category(), "send");
      at += sent, bytes -= static_cast<std::size_t>(sent);
    }
  }
  /// False if the other side has closed it before the first byte.
  bool receive_all(void* data, std::size_t bytes) const {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t got = ::recv(fd_, static_cast<char*>(data) + done, bytes - done, MSG_WAITALL);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw std::system_error(errno, std::generic_category(), "recv");
      if (got == 0 && done == 0) return false;
      if (got == 0) throw std::runtime_error("a connection ended in the midst of a message");
      done += static_cast<std::size_t>(got);
    }
    return true;
  }

 private:
  static int made(int result, const char* step) {
    if (result < 0) throw std::system_error(errno, std::generic_category(), step);
    return result;
  }
  static sockaddr_in address(int port) {
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(static_cast<std::uint16_t>(port));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
  }
  Socket at_once() {
    const int one = 1;
    made(::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "TCP_NODELAY");
    return std::move(*this);
  }
  int fd_;
};

/// Before the values, both ways.
struct PlainHeader {
  std::uint64_t step = 0, first = 0, count = 0;
};

/// Keeps some elements of a vector. It ends when all workers have closed their connections.
class PlainServer {
 public:
  PlainServer(int workers, std::size_t first, std::size_t count) : workers_(workers), first_(first), values_(count) {
    thread_ = std::thread([this] {
      std::vector<std::thread> threads;
      for (int i = 0; i < workers_; ++i) threads.emplace_back([this, worker = listener_.accept()] { serve(worker); });
      for (auto& each : threads) each.join();
    });
  }
  PlainServer(const PlainServer&) = delete;
  PlainServer& operator=(const PlainServer&) = delete;
  ~PlainServer() { thread_.join(); }
  int port() const { return listener_.port(); }

 private:
  [[gnu::noinline, gnu::hot]] void serve(const Socket& worker) {
    std::vector<float> pushed(values_.size());
    for (PlainHeader header; worker.receive_all(&header, sizeof header);) {
      if (header.first != first_ || header.count != values_.size()) throw std::runtime_error("a worker asks for what this server does not keep");
      worker.receive_all(pushed.data(), pushed.size() * sizeof(float));
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return step_ == header.step; });  // nobody reads the sums of the step before any more
      add(values_.data(), pushed.data(), pushed.size());
      if (++added_ == workers_) changed_.notify_all();
      changed_.wait(lock, [&] { return added_ == workers_; });
      lock.unlock();
      worker.send_all(&header, sizeof header, MSG_MORE);
      worker.send_all(values_.data(), values_.size() * sizeof(float));
      lock.lock();
      if (++answered_ < workers_) continue;
      ++step_;
      added_ = answered_ = 0;
      changed_.notify_all();
    }
  }

  static void add(float* __restrict to, const float* __restrict from, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] += from[i];
  }

  const int workers_;
  const std::size_t first_;
  const Socket listener_ = Socket::listener();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<float> values_;
  std::uint64_t step_ = 0;
  int added_ = 0, answered_ = 0;
  std::thread thread_;
};

/// Server r keeps the r-th of the even parts.
inline std::pair<std::size_t, std::size_t> plain_part(std::size_t count, std::size_t servers, std::size_t r) {
  const std::size_t first = count * r / servers;
  return {first, count * (r + 1) / servers - first};
}

class PlainWorker {
 public:
  /// Begins with server `own`, so that not all workers talk to the same one at first.
  PlainWorker(std::span<const int> ports, std::size_t own, std::size_t count) : own_(own), count_(count) {
    for (const int port : ports) servers_.push_back(Socket::connected(port));
  }
  [[gnu::noinline, gnu::hot]] void push_pull(std::span<const float> in, std::span<float> out) {
    each([&](const Socket& server, std::size_t first, std::size_t count) {
      const PlainHeader header{step_, first, count};
      server.send_all(&header, sizeof header, MSG_MORE);
      server.send_all(in.data() + first, count * sizeof(float));
    });
    each([&](const Socket& server, std::size_t first, std::size_t count) {
      PlainHeader header;
      if (!server.receive_all(&header, sizeof header) || header.step != step_ || header.count != count) throw std::runtime_error("a plain server answers something else");
      server.receive_all(out.data() + first, count * sizeof(float));
    });
    ++step_;
  }

 private:
  void each(const auto& f) const {
    for (std::size_t i = 0; i < servers_.size(); ++i) {
      const std::size_t r = (own_ + i) % servers_.size();
      const auto [first, count] = plain_part(count_, servers_.size(), r);
      f(servers_[r], first, count);
    }
  }
  std::vector<Socket> servers_;
  std::size_t own_, count_;
  std::uint64_t step_ = 0;
};

}  // namespace bench
