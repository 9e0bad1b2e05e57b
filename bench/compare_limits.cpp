// SPDX-License-Identifier: Apache-2.0
// What the machine itself needs, as contestants of compare: a cache line's way there and back, a copy of as many
// bytes, and an all_reduce by bare loops over buffers that all ranks share. The last one meets twice per call, so at
// the smallest sizes a library whose values travel with the flag may need less. For networks: as many bytes there and
// back over one socket, and as many as an all_reduce needs both ways at once.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "contestant.hpp"

namespace {

/// Memory that all ranks see at the same address: mapped before they are forked.
template <class T>
T* shared_by_all(std::size_t count) {
  void* const memory = ::mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return static_cast<T*>(memory);  // zeros, which is what a fresh Word is
}

void rest(bool crowded) {
  if (crowded) ::sched_yield();
}

/// One line from rank 0 to rank 1 and back.
void start_trip(const bench::Seat& seat) {
  bench::Word* const lines = shared_by_all<bench::Word>(2);
  seat.fork_ranks([&](int rank) {
    seat.pin(rank);
    bench::Library l;
    l.checked = false;
    l.prepare = [&](const bench::Work&) -> bench::Call {
      if (seat.ranks() < 2) return {};
      if (rank > 1) return [] {};
      return [lines, rank, crowded = seat.crowded()] {
        std::atomic<std::uint32_t>&mine = lines[rank].value, &other = lines[1 - rank].value;
        const std::uint32_t trip = mine.load(std::memory_order_relaxed) + 1;
        if (rank == 0) mine.store(trip, std::memory_order_release);
        while (other.load(std::memory_order_acquire) != trip) rest(crowded);
        if (rank == 1) mine.store(trip, std::memory_order_release);
      };
    };
    seat.compete(rank, l);
  });
}

/// memcpy of as many bytes in a rank's own memory, all ranks at once.
void start_copy(const bench::Seat& seat) {
  seat.fork_ranks([&](int rank) {
    seat.pin(rank);
    bench::Library l;
    l.checked = false;
    l.prepare = [](const bench::Work& w) -> bench::Call {
      if (w.count == 0) return {};
      static void* (*volatile const copy)(void*, const void*, std::size_t) = std::memcpy;  // no copy is optimised away
      return [from = bench::pages(w.count * sizeof(float)), to = bench::pages(w.count * sizeof(float)), bytes = w.count * sizeof(float)] { copy(to.get(), from.get(), bytes); };
    };
    seat.compete(rank, l);
  });
}

void combine_two(float* __restrict a, float* __restrict b, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) a[i] = b[i] = a[i] + b[i];
}
void add(float* __restrict to, const float* __restrict from, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) to[i] += from[i];
}

/// Rank r adds block r of all buffers and writes it to all; flags before say "here", flags after "done".
class Combine {
 public:
  Combine(bench::Word* flags, std::vector<float*> buffers, int rank, std::size_t count, bool crowded) : flags_(flags), buffers_(std::move(buffers)), rank_(rank), crowded_(crowded) {
    const auto n = buffers_.size(), r = static_cast<std::size_t>(rank);
    first_ = count * r / n;
    count_ = count * (r + 1) / n - first_;
  }
  void operator()() {
    meet();
    if (buffers_.size() == 2) combine_two(buffers_[0] + first_, buffers_[1] + first_, count_);
    else combine_many();
    meet();
  }

 private:
  void meet() {
    const std::uint32_t now = flags_[rank_].value.load(std::memory_order_relaxed) + 1;
    flags_[rank_].value.store(now, std::memory_order_release);
    for (std::size_t r = 0; r < buffers_.size(); ++r)
      while (static_cast<std::int32_t>(flags_[r].value.load(std::memory_order_acquire) - now) < 0) rest(crowded_);
  }
  void combine_many() const {
    float sum[1024];  // stays in the nearest cache
    for (std::size_t done = 0; done < count_;) {
      const std::size_t at = first_ + done, many = std::min(std::size(sum), count_ - done);
      std::copy_n(buffers_[0] + at, many, sum);
      for (std::size_t r = 1; r < buffers_.size(); ++r) add(sum, buffers_[r] + at, many);
      for (float* const buffer : buffers_) std::copy_n(sum, many, buffer + at);
      done += many;
    }
  }
  bench::Word* flags_;
  std::vector<float*> buffers_;
  int rank_;
  bool crowded_;
  std::size_t first_ = 0, count_ = 0;
};

void start_combine(const bench::Seat& seat) {
  const auto n = static_cast<std::size_t>(seat.ranks());
  const std::size_t most = (seat.most_bytes() + 4095) / 4096 * 4096;
  bench::Word* const flags = shared_by_all<bench::Word>(n);
  std::byte* const memory = shared_by_all<std::byte>(n * most);
  seat.fork_ranks([&](int rank) {
    seat.pin(rank);
    bench::Library l;
    l.allocate = [&](std::size_t bytes) {
      std::byte* const mine = memory + static_cast<std::size_t>(rank) * most;
      std::memset(mine, 0, bytes);  // the pages are made, and by their owner
      return std::shared_ptr<std::byte>(mine, [](std::byte*) {});
    };
    l.prepare = [&](const bench::Work& w) -> bench::Call {
      if (w.op != bench::Op::all_reduce) return {};
      std::vector<float*> buffers;
      for (std::size_t r = 0; r < n; ++r) buffers.push_back(reinterpret_cast<float*>(memory + r * most));
      return Combine(flags, buffers, rank, w.count, seat.crowded());
    };
    seat.compete(rank, l);
  });
}

/// Connected sockets of loopback: rank r's to the rank after it and from the one before; made before ranks are forked.
struct Ring {
  explicit Ring(int n) {
    const int listener = made(::socket(AF_INET, SOCK_STREAM, 0), "socket");
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof where;
    made(::bind(listener, reinterpret_cast<const sockaddr*>(&where), length), "bind");
    made(::listen(listener, n), "listen");
    made(::getsockname(listener, reinterpret_cast<sockaddr*>(&where), &length), "getsockname");
    for (int i = 0; i < n; ++i) {
      to_next.push_back(made(::socket(AF_INET, SOCK_STREAM, 0), "socket"));
      made(::connect(to_next.back(), reinterpret_cast<const sockaddr*>(&where), length), "connect");
      from_previous.push_back(made(::accept(listener, nullptr, nullptr), "accept"));
    }
    ::close(listener);
    std::rotate(from_previous.begin(), from_previous.end() - 1, from_previous.end());
    for (const auto& ends : {to_next, from_previous})
      for (const int fd : ends) {
        const int one = 1;
        ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      }
  }
  std::vector<int> to_next, from_previous;

 private:
  static int made(int result, const char* step) {
    if (result < 0) throw std::system_error(errno, std::generic_category(), step);
    return result;
  }
};
/// What a call without waiting moved.
std::size_t moved(ssize_t result) {
  if (result > 0) return static_cast<std::size_t>(result);
  if (result < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
  throw std::runtime_error("a connection is gone");
}

/// As many bytes from rank 0 to rank 1 and back.
void start_ping(const bench::Seat& seat) {
  const Ring ring(2);
  seat.fork_ranks([&](int rank) {
    seat.pin(rank);
    bench::Library l;
    l.checked = false;
    l.prepare = [&](const bench::Work& w) -> bench::Call {
      if (rank > 1) return [] {};
      const std::size_t bytes = std::max<std::size_t>(w.count * sizeof(float), 1);
      return [&, rank, bytes, data = bench::pages(bytes)] {
        const auto out = static_cast<std::size_t>(rank);
        const auto send = [&] { for (std::size_t at = 0; at < bytes;) at += moved(::send(ring.to_next[out], data.get() + at, bytes - at, MSG_DONTWAIT | MSG_NOSIGNAL)); };
        if (rank == 0) send();
        for (std::size_t at = 0; at < bytes;) at += moved(::recv(ring.from_previous[out], data.get() + at, bytes - at, MSG_DONTWAIT));
        if (rank == 1) send();
      };
    };
    seat.compete(rank, l);
  });
}
/// As many bytes as an all_reduce has to move, to the next rank and from the previous one at once.
void start_stream(const bench::Seat& seat) {
  const Ring ring(seat.ranks());
  seat.fork_ranks([&](int rank) {
    seat.pin(rank);
    bench::Library l;
    l.checked = false;
    l.prepare = [&](const bench::Work& w) -> bench::Call {
      if (w.count == 0) return {};
      const auto n = static_cast<std::size_t>(seat.ranks());
      const std::size_t bytes = std::max<std::size_t>(2 * (n - 1) * w.count * sizeof(float) / n, 1);
      return [&, rank, bytes, from = bench::pages(bytes), to = bench::pages(bytes)] {
        const auto r = static_cast<std::size_t>(rank);
        for (std::size_t sent = 0, received = 0; sent < bytes || received < bytes;) {
          if (sent < bytes) sent += moved(::send(ring.to_next[r], from.get() + sent, std::min<std::size_t>(bytes - sent, 256 << 10), MSG_DONTWAIT | MSG_NOSIGNAL));
          if (received < bytes) received += moved(::recv(ring.from_previous[r], to.get() + received, bytes - received, MSG_DONTWAIT));
        }
      };
    };
    seat.compete(rank, l);
  });
}

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"trip", start_trip}, {"copy", start_copy}, {"combine", start_combine}, {"ping", start_ping}, {"stream", start_stream}}); }
