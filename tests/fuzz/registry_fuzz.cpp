// SPDX-License-Identifier: Apache-2.0
// Any bytes at the place where ranks meet: from a stranger, from a rank that has joined, and from what a rank takes for the registry.
#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <thread>

#include <tally/network/node.hpp>
#include <tally/network/registry.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

SocketAddress loopback() { return detail::resolve("127.0.0.1:0").front(); }
detail::FileDescriptor connected(const SocketAddress& at) {
  int error = 0;
  detail::FileDescriptor fd = detail::begin_connect(at, error);
  if (error != 0 || !detail::wait_for_events(fd.get(), POLLOUT, std::chrono::steady_clock::now() + 5s)) __builtin_trap();
  return fd;
}
void say(int fd, std::string_view bytes) { (void)!::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT); }
/// Until the other side has read all, and said what it has to say.
void hear_out(int fd) {
  ::shutdown(fd, SHUT_WR);
  char any[4096];
  while (detail::wait_for_events(fd, POLLIN, std::chrono::steady_clock::now() + 2s) && ::recv(fd, any, sizeof any, 0) > 0) {}
}
detail::Join join_of(Rank r) {
  detail::Join me;
  me.rank = r;
  me.size = 2;
  return me;
}

void to_registry(std::string_view bytes, bool joined) {
  auto listener = detail::listen_at(loopback());
  const SocketAddress at = detail::own_address(listener);
  const detail::Registry registry(std::move(listener), join_of(0), 2s);
  detail::FileDescriptor guests[2];
  if (joined)
    for (Rank r = 0; r < 2; ++r) {
      guests[r] = connected(at);
      detail::Join me = join_of(r);
      me.listens = at;
      const detail::ControlHeader header{sizeof me, detail::ControlKind::join};
      say(guests[r].get(), detail::ControlStream::as_bytes(header));
      say(guests[r].get(), detail::ControlStream::as_bytes(me));
    }
  else guests[0] = connected(at);
  say(guests[0].get(), bytes);
  hear_out(guests[0].get());
}
void to_rank(std::string_view bytes) {
  const auto listener = detail::listen_at(loopback());
  const SocketAddress at = detail::own_address(listener);
  std::thread registry([&] {
    if (!detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s)) return;
    const detail::FileDescriptor guest(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const detail::Challenge challenge;
    const detail::ControlHeader header{sizeof challenge, detail::ControlKind::challenge};
    say(guest.get(), detail::ControlStream::as_bytes(header));
    say(guest.get(), detail::ControlStream::as_bytes(challenge));
    say(guest.get(), bytes);
    hear_out(guest.get());
  });
  try {
    detail::NetworkNode node([&] { return detail::NetworkNode::Place{{at}, 0, false, true}; }, join_of(1), 200ms);
    const auto group = node.join(1, {0, 1});
    node.ask(*group);
    node.hear();
    (void)node.told(*group, 0);
  } catch (const Error&) {
  }
  registry.join();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 3 == 2) to_rank(bytes);
  else to_registry(bytes, data[0] % 3 == 1);
  return 0;
}
