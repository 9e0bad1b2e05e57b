// SPDX-License-Identifier: Apache-2.0
// Any bytes from a peer over connections of TCP: to who receives a message, also by a stripe, and to who sends one and is told what was
// consumed.
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <tally/network/registry.hpp>
#include <tally/transport/tcp.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

struct Taking {
  void arrived(Transfer& t, const FrameInfo& frame) {
    if (frame.bytes > t.bytes - frame.begin_in(t) || frame.bytes % t.grain != 0) throw Error(Errc::protocol, "not as announced", {});
  }
  Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  void credited(Transfer&, const FrameTimes&) {}
  void fetched(Transfer&, const FrameTimes&) {}
  void drained(Transfer&, bool = false) {}
  void continued(Transfer&, const FrameTimes&) {}
  void trying(Transfer&) {}
  void copying(Transfer&) {}
  void reducing(Transfer&) {}
  void moved(Transfer&) {}
  FrameTimes stamp(const Transfer&) const { return {}; }
  FrameTimes credit_stamp(const Transfer&) const { return {}; }
};

/// Two ranks, of which the second does nothing itself: what it says is made up here.
struct Job {
  Job() {
    auto listener = detail::listen_at(detail::resolve("127.0.0.1:0").front());
    const SocketAddress at = detail::own_address(listener);
    detail::Join me;
    me.size = 2;
    me.rank = 0;
    registry.emplace(std::move(listener), me, 20s);
    const auto find = [at] { return detail::NetworkNode::Place{{at}, 0, false, true}; };
    std::thread other([&] {
      detail::Join liar = me;
      liar.rank = 1;
      nodes[1] = std::make_shared<detail::NetworkNode>(find, liar, 20s);
    });
    nodes[0] = std::make_shared<detail::NetworkNode>(find, me, 20s);
    other.join();
  }
  std::optional<detail::Registry> registry;
  std::shared_ptr<detail::NetworkNode> nodes[2];
};

void drive(TcpTransport& transport, const Transfer& t) {
  Taking probe;
  const auto deadline = std::chrono::steady_clock::now() + 2s;
  for (int idle = 0; t.pending && idle < 50 && std::chrono::steady_clock::now() < deadline;) idle = transport.poll(probe) ? 0 : idle + 1;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Job job;
  static std::uint64_t communicator = 100;
  if (size < 1) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool to_receiver = data[0] % 2 == 0;
  TcpOptions options;
  options.frame_bytes = 1000;
  options.window = 4000;
  ++communicator;
  Transfer t;
  std::vector<std::byte> memory(5000);
  t.bytes = t.ready = memory.size();
  t.grain = 4;
  t.peer = 1;
  t.from = t.to = memory.data();
  t.is_send = !to_receiver;
  Taking probe;
  try {
    TcpTransport transport(job.nodes[0], communicator, {0, 1}, options);
    if (to_receiver) {
      const auto says = [&](std::uint32_t stripe, std::string_view what) {
        int error = 0;
        detail::FileDescriptor fd = detail::begin_connect(job.nodes[1]->address(0), error);
        if (!detail::wait_for_events(fd.get(), POLLOUT, std::chrono::steady_clock::now() + 5s)) __builtin_trap();
        detail::ChannelHello hello;
        hello.lane = stripe << 16;
        hello.communicator = communicator;
        hello.from = 1;
        hello.to = 0;
        hello.window = options.window;
        hello.key = job.nodes[1]->key();
        (void)!::send(fd.get(), &hello, sizeof hello, MSG_NOSIGNAL);
        (void)!::send(fd.get(), what.data(), what.size(), MSG_NOSIGNAL);
        ::shutdown(fd.get(), SHUT_WR);
        return fd;
      };
      const std::size_t payload = data[0] & 2 ? bytes.size() / 2 : 0;
      const detail::FileDescriptor own = says(0, bytes.substr(0, bytes.size() - payload)), stripe = payload > 0 ? says(1, bytes.substr(bytes.size() - payload)) : detail::FileDescriptor();
      transport.post(t, probe);
      drive(transport, t);
    } else {
      transport.post(t, probe);
      Rank to = -1;
      std::uint64_t window = 0;
      detail::Stream fd;
      for (int i = 0; i < 1000 && !fd; ++i) {
        fd = job.nodes[1]->claim(communicator, 0, 0, to, window);
        transport.poll(probe);
      }
      if (!fd) __builtin_trap();
      (void)!::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      drive(transport, t);
    }
    if (t.pending) transport.cancel(t);
    transport.leave();
  } catch (const Error&) {
  }
  return 0;
}
