// SPDX-License-Identifier: Apache-2.0
// The shared memory in which the processes of a host that account for energy meet: each driving thread's times, which it
// publishes itself, and what the one reader of the meters, the hub, charged it for them. Nothing read from it is trusted.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "../file.hpp"
#include "../error.hpp"
#include "activity.hpp"
#include "attribution.hpp"
#include "meter.hpp"
#include "source.hpp"

namespace tally::inline v0 {

namespace detail {

/// A value that one thread writes and others, in other processes too, read whole or not at all (a sequence lock).
template <class T>
  requires std::is_trivially_copyable_v<T>
class Published {
 public:
  /// Atomics that `also()` stores, by release, are whole together with it to who loads them, by acquire, in the `also()` of read().
  template <class F>
  void write(const T& value, F&& also) {
    std::uint64_t buffer[words] = {};
    std::memcpy(buffer, &value, sizeof value);
    const std::uint64_t sequence = sequence_.load(std::memory_order_relaxed);
    sequence_.store(sequence | 1, std::memory_order_relaxed);
    for (std::size_t i = 0; i < words; ++i) words_[i].store(buffer[i], std::memory_order_release);  // after the odd number
    also();
    sequence_.store((sequence | 1) + 1, std::memory_order_release);
  }
  void write(const T& value) {
    write(value, [] {});
  }
  /// False if it was never written, or its writer died in the middle, or would not let go.
  template <class F>
  bool read(T& value, F&& also) const {
    for (int tries = 0; tries < 1000; ++tries) {
      if (tries > 64) ::usleep(50);  // its writer may have lost its core; all tries together take about 0.1 s
      else if (tries > 8) ::sched_yield();
      const std::uint64_t before = sequence_.load(std::memory_order_acquire);
      if (before == 0) return false;
      if (before & 1) continue;
      std::uint64_t buffer[words];
      for (std::size_t i = 0; i < words; ++i) buffer[i] = words_[i].load(std::memory_order_acquire);
      also();
      if (sequence_.load(std::memory_order_relaxed) != before) continue;
      std::memcpy(&value, buffer, sizeof value);
      return true;
    }
    return false;
  }
  bool read(T& value) const {
    return read(value, [] {});
  }

 private:
  static constexpr std::size_t words = (sizeof(T) + 7) / 8;
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<std::uint64_t> words_[words] = {};
};

/// One driving thread: a communicator on a rank. Its owner writes the first part, the hub the second.
struct BoardSlot {
  alignas(64) std::atomic<std::uint32_t> client{0};  // 0: free
  std::atomic<std::uint32_t> leaving{0};              // the hub charges what it still finds, and frees it
  std::atomic<std::uint32_t> device{0};               // 1 + index of the device it uses in the table of domains, 0: none
  std::atomic<std::uint32_t> of_device{0};            // not 0: its times are the device's, and no thread's
  std::atomic<std::int64_t> times[activity_count] = {};  // nanoseconds since it was taken
  alignas(64) std::atomic<std::uint64_t> charged[power_kinds][activity_count + 1] = {};  // nanojoules, of the windows in the board's state; the last is the floor's

  ActivityTimes read_times() const {
    ActivityTimes result;
    for (std::size_t a = 0; a < activity_count; ++a) result.in[a] = nanoseconds(times[a].load(std::memory_order_relaxed));
    return result;
  }
  Charges read_charges() const {
    Charges result;
    for (std::size_t k = 0; k < power_kinds; ++k) {
      for (std::size_t a = 0; a < activity_count; ++a) result[k].net[a] = charged[k][a].load(std::memory_order_acquire);
      result[k].floor = charged[k][activity_count].load(std::memory_order_acquire);
    }
    return result;
  }
};

/// What the hub tells of one domain.
struct BoardDomain {
  char key[64], source[16];
  Domain kind;
  Provenance provenance;
  std::int16_t parent;
  Caveats caveats;
  Nanojoules total, operations, application, unattributed;
  double watts_floor;
};
struct BoardPower {
  std::uint16_t domain;
  std::int64_t begin, end;  // nanoseconds
  float watts;
};
struct BoardState {
  static constexpr std::size_t most_domains = 48, most_power = 256, most_text = 3072;
  std::uint64_t windows;  // closed so far
  std::int64_t time;      // of the last one's end
  std::uint32_t domains, powers;  // powers: written so far, the last most_power of them are there
  double coverage, residual;
  EnergyKind kinds[power_kinds];
  BoardDomain domain[most_domains];
  BoardPower power[most_power];
  char warnings[most_text];  // a line each
};

/// Copies what fits, always ended.
template <std::size_t N>
void copy_text(char (&to)[N], std::string_view text) {
  const std::size_t length = std::min(text.size(), N - 1);
  std::memcpy(to, text.data(), length);
  std::memset(to + length, 0, N - length);
}
template <std::size_t N>
std::string_view text_of(const char (&from)[N]) {
  return {from, ::strnlen(from, N)};
}

struct Board {
  static constexpr std::uint64_t magic = 0x3130647262796c74;  // "tlybrd01": changes with the layout
  static constexpr std::size_t most_slots = 1024;
  std::uint64_t mark = 0, bytes = 0;
  std::atomic<std::uint64_t> windows{0};  // closed so far
  Published<BoardState> state;
  BoardSlot slots[most_slots];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::int64_t>::is_always_lock_free);

/// The board's memory: made by the hub, passed to others as a descriptor.
class BoardMemory {
 public:
  static BoardMemory make() {
    FileDescriptor file(::memfd_create("tally-energy", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (file.get() < 0 || ::ftruncate(file.get(), sizeof(Board)) != 0 || ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
      throw Error(Errc::no_resources, {"the energy board of ", sizeof(Board), " bytes cannot be made: ", errno_text(errno)});
    BoardMemory memory(std::move(file));
    new (memory.board_) Board;
    memory.board_->bytes = sizeof(Board);
    memory.board_->mark = Board::magic;
    return memory;
  }
  /// Of another process: it must be sealed, so that nobody can take it away, and of this layout.
  explicit BoardMemory(FileDescriptor file) : file_(std::move(file)) {
    struct stat info {};
    if (::fstat(file_.get(), &info) != 0 || info.st_size != static_cast<off_t>(sizeof(Board))) throw Error(Errc::protocol, "the energy board that was handed over has another size: another version of tally runs the hub");
    if (const int seals = ::fcntl(file_.get(), F_GET_SEALS); seals < 0 || !(seals & F_SEAL_SHRINK)) throw Error(Errc::protocol, "the energy board that was handed over is not sealed");
    void* const at = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
    if (at == MAP_FAILED) throw Error(Errc::no_resources, {"the energy board cannot be mapped: ", errno_text(errno)});
    board_ = static_cast<Board*>(at);
  }
  BoardMemory(BoardMemory&& other) noexcept : file_(std::move(other.file_)), board_(std::exchange(other.board_, nullptr)) {}
  BoardMemory& operator=(BoardMemory&&) = delete;
  ~BoardMemory() {
    if (board_) ::munmap(board_, sizeof(Board));
  }
  void check() const {
    if (board_->mark != Board::magic || board_->bytes != sizeof(Board)) throw Error(Errc::protocol, "the energy board that was handed over is of another version of tally");
  }
  Board& operator*() const { return *board_; }
  Board* operator->() const { return board_; }
  int descriptor() const { return file_.get(); }

 private:
  FileDescriptor file_;
  Board* board_ = nullptr;
};

}  // namespace detail

}  // namespace tally::inline v0
