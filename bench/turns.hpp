// SPDX-License-Identifier: Apache-2.0
// The shared file through which compare and its contestants speak. Each contestant has a desk, where compare leaves
// one order at a time and the ranks leave what they measured. Who has no order sleeps in the kernel, so that only
// the contestant whose turn it is uses a core. No library under test has a part in this.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <tally/wait.hpp>

namespace bench {

enum class Op : std::uint32_t { all_reduce, reduce, broadcast, all_gather, reduce_scatter, barrier, gather, scatter, all_to_all, scan, exclusive_scan, send_receive };
inline constexpr std::array op_names{"all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "barrier", "gather", "scatter", "all_to_all", "scan", "exclusive_scan", "send_receive"};
/// Whether the larger side has a block for each rank.
constexpr bool in_blocks(Op op) { return op == Op::all_gather || op == Op::reduce_scatter || op == Op::gather || op == Op::scatter || op == Op::all_to_all; }
inline std::string name_of(Op op) { return op_names[static_cast<std::size_t>(op)]; }

enum class Verb : std::uint32_t {
  start,  // begin to be: done when the library is initialised
  open,   // make buffers for an operation and size
  check,  // one call on known data; count wrong results
  time,   // a block of calls
  end,
};

struct Order {
  Verb verb = Verb::start;
  Op op{};
  std::uint64_t count = 0;  // elements of the larger side
  std::int32_t turn = 0;    // tells checks apart
  std::uint64_t warm_up = 0, calls = 0;
};

struct alignas(128) Word {
  std::atomic<std::uint32_t> value{0};
};

/// What one rank leaves. Written by it alone.
struct alignas(128) Answer {
  std::atomic<std::uint32_t> pid{0}, failed{0};
  std::uint32_t offered = 0, pinned = 0;
  std::uint64_t wrong = 0;
  double seconds = 0, idle_seconds = 0;
  char words[448] = {};  // its version at the start; why it failed
  void say(std::string_view text) { words[text.copy(words, sizeof words - 1)] = 0; }
};

inline constexpr int most_ranks = 128, most_desks = 16;

struct Desk {
  Word number;  // of the order; ranks sleep on it
  Word done;    // ranks that are done with all orders so far; compare sleeps on it
  Word arrivals, release;
  alignas(128) Order order;
  Answer answers[most_ranks];
};

/// The whole file.
struct Hall {
  std::int32_t ranks = 0;
  std::int32_t compare = 0;  // its pid
  std::uint32_t pinned = 0;  // one core for each rank; else ranks wander, and yield while they wait here
  std::uint64_t most_bytes = 0;
  Desk desks[most_desks];
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

/// The file, mapped. compare makes it, contestants open it.
class SharedHall {
 public:
  enum class Way { make, open };
  SharedHall(Way way, const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | (way == Way::make ? O_CREAT | O_EXCL : 0), 0600);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
    void* const memory = way == Way::open || ::ftruncate(fd, sizeof(Hall)) == 0 ? ::mmap(nullptr, sizeof(Hall), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    const int error = errno;
    ::close(fd);
    if (memory == MAP_FAILED) throw std::system_error(error, std::generic_category(), path);
    hall_ = way == Way::make ? new (memory) Hall : static_cast<Hall*>(memory);
  }
  SharedHall(const SharedHall&) = delete;
  SharedHall& operator=(const SharedHall&) = delete;
  ~SharedHall() { ::munmap(hall_, sizeof(Hall)); }
  Hall* operator->() const { return hall_; }
  Hall& operator*() const { return *hall_; }

 private:
  Hall* hall_;
};

/// All ranks of a desk leave at nearly the same time.
class Meeting {
 public:
  Meeting(Desk& desk, int size, bool yields) : desk_(desk), size_(static_cast<std::uint32_t>(size)), yields_(yields) {}
  void meet() {
    ++turn_;
    if (desk_.arrivals.value.fetch_add(1) + 1 == turn_ * size_) desk_.release.value.store(turn_);
    while (desk_.release.value.load(std::memory_order_acquire) != turn_)
      if (yields_) ::sched_yield();
  }

 private:
  Desk& desk_;
  std::uint32_t size_, turn_ = 0;
  bool yields_;
};

}  // namespace bench
