// SPDX-License-Identifier: Apache-2.0
// A driver of devices that are not there: memory of the host's that other ranks can map, streams that are threads, and blocks whose
// threads are threads, too (device_emulation.hpp).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include <tally/device/driver.hpp>
#include <tally/error.hpp>

#include "device_emulation.hpp"

namespace test {

/// All of this process.
struct EmulatedDevices {
  static EmulatedDevices& all() {
    static EmulatedDevices instance;
    return instance;
  }
  struct Allocation {
    std::size_t bytes = 0;
    int device = 0, descriptor = -1;
    bool of_host = false, mapped = false;  // mapped: another rank's
  };
  std::mutex mutex;
  std::map<std::uintptr_t, Allocation> allocations;
  std::size_t free_bytes = std::size_t{1} << 30;  // of each allocation

  std::size_t count() {
    const std::lock_guard lock(mutex);
    return allocations.size();
  }
  std::byte* add(std::size_t bytes, int descriptor, const Allocation& what) {
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) throw tally::Error(tally::Errc::no_resources, "mmap");
    const std::lock_guard lock(mutex);
    Allocation& made = allocations[reinterpret_cast<std::uintptr_t>(memory)] = what;
    made.bytes = bytes, made.descriptor = descriptor;
    return static_cast<std::byte*>(memory);
  }
  void remove(std::byte* memory) {
    if (!memory) return;
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(reinterpret_cast<std::uintptr_t>(memory));
    if (found == allocations.end()) std::abort();  // twice, or never allocated
    munmap(memory, found->second.bytes);
    close(found->second.descriptor);
    allocations.erase(found);
  }
  const Allocation* find(const void* data) {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return nullptr;
    const auto& [begin, found] = *std::prev(after);
    return address - begin < found.bytes ? &found : nullptr;
  }
};

/// Runs what is pushed in order, on a thread of its own.
class EmulatedStream {
 public:
  explicit EmulatedStream(int on = 0) : device(on), thread_([this] { run(); }) {}
  ~EmulatedStream() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void push(std::function<void()> work) {
    if (capturing) return void(captured_.push_back(std::move(work)));
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  void synchronise() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return queue_.empty() && !busy_; });
  }
  std::uint64_t ended() {
    const std::lock_guard lock(mutex_);
    return ended_count_;
  }
  std::vector<std::function<void()>> end_capture() {
    capturing = false;
    return std::move(captured_);
  }
  void replay(const std::vector<std::function<void()>>& graph) {
    for (const auto& each : graph) push(each);
  }
  const int device;
  const std::uint64_t number = next_number().fetch_add(1);
  bool capturing = false;
  std::string problem;  // what the driver says of it

 private:
  static std::atomic<std::uint64_t>& next_number() {
    static std::atomic<std::uint64_t> next{1};
    return next;
  }
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return ended_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto work = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      if (problem.empty()) work();
      lock.lock();
      busy_ = false;
      ++ended_count_;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::vector<std::function<void()>> captured_;
  bool busy_ = false, ended_ = false;
  std::uint64_t ended_count_ = 0;
  std::thread thread_;
};

class EmulatedDriver {
 public:
  using Block = HostBlock;
  using Stream = EmulatedStream*;
  using Event = std::shared_ptr<std::atomic<bool>>;
  static constexpr std::string_view name = "emulated";

  /// `apart`: as if this rank were a process of its own.
  explicit EmulatedDriver(int device = 0, int process = 0, int blocks = 64, int host = 0) : device_(device), process_(process), blocks_(blocks), host_(host) {}

  device::DeviceId id() const { return {static_cast<std::uint8_t>(device_)}; }
  int most_blocks() const { return blocks_; }
  int most_threads() const { return 2; }
  device::Link link_to(const device::DeviceId& other) const { return other == id() ? device::Link::same_device : device::Link::nvlink; }
  std::uint64_t process() const { return static_cast<std::uint64_t>(process_); }
  std::uint64_t host() const { return static_cast<std::uint64_t>(host_); }

  std::byte* allocate(std::size_t bytes) { return allocate(bytes, false); }
  void release(std::byte* memory) { EmulatedDevices::all().remove(memory); }
  std::byte* allocate_private(std::size_t bytes) {
    if (!works) throw tally::Error(tally::Errc::unsupported, "nothing works here");
    return allocate(bytes, false);
  }
  bool works = true;
  std::shared_ptr<std::atomic<std::uint32_t>> looks_in_vain = std::make_shared<std::atomic<std::uint32_t>>(0);  // of all its kernels
  void release_private(std::byte* memory) { EmulatedDevices::all().remove(memory); }
  std::byte* allocate_host(std::size_t bytes) { return has_host_memory ? allocate(bytes, true) : nullptr; }
  bool has_host_memory = true;
  void release_host(std::byte* memory) { EmulatedDevices::all().remove(memory); }
  device::Handle handle_of(std::byte* memory, std::size_t bytes) {
    const std::lock_guard lock(EmulatedDevices::all().mutex);
    device::Handle handle{process(), reinterpret_cast<std::uintptr_t>(memory), bytes, device_, 1, {}};
    std::memcpy(handle.shared.data(), &EmulatedDevices::all().find(memory)->descriptor, sizeof(int));
    return handle;
  }
  std::byte* open(const device::Handle& handle) {
    if (handle.process == process()) return reinterpret_cast<std::byte*>(handle.address);
    int descriptor = -1;
    std::memcpy(&descriptor, handle.shared.data(), sizeof descriptor);
    return EmulatedDevices::all().add(handle.bytes, dup(descriptor), {0, device_, -1, false, true});
  }
  void close(const device::Handle& handle, std::byte* memory) {
    if (handle.process != process()) EmulatedDevices::all().remove(memory);
  }
  void expect_neighbours(int) {}
  void upload(std::byte* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  device::Memory memory_at(const void* data) const {
    const std::lock_guard lock(EmulatedDevices::all().mutex);
    const auto* const found = EmulatedDevices::all().find(data);
    return !found ? device::Memory::unknown : found->of_host ? device::Memory::host : found->device == device_ ? device::Memory::device : device::Memory::other_device;
  }
  bool captures(Stream stream) const {
    if (!stream || stream->device != device_) throw tally::Error(tally::Errc::invalid_argument, "the stream is none of this device's");
    return stream->capturing;
  }
  std::uint64_t identity(Stream stream) const { return stream->number; }
  static void attach() {}
  bool posts = true;
  void post(std::byte* to, std::uint32_t word) {
    if (!posts) throw tally::Error(tally::Errc::unsupported, "an illegal memory access was encountered");
    std::atomic_ref(*reinterpret_cast<std::uint32_t*>(to)).store(word, std::memory_order_release);
  }
  std::string problem(Stream stream) const { return stream->problem; }
  void record(Event& event, Stream stream) {
    event = std::make_shared<std::atomic<bool>>(false);
    stream->push([event] {
      event->store(true);
      event->notify_all();
    });
  }
  void order_after(Stream stream, Event& event) {
    stream->push([event] { event->wait(false); });
  }
  template <device::Kernel<HostBlock> K>
  void launch(const K& kernel, int blocks, int threads, Stream stream) {
    stream->push([kernel, blocks, threads, looks = looks_in_vain] {
      std::vector<std::unique_ptr<EmulatedBlock>> states;
      std::vector<std::thread> all;
      for (int b = 0; b < blocks; ++b) {
        states.push_back(std::make_unique<EmulatedBlock>(threads, false, *looks));
        for (int t = 0; t < threads; ++t)
          all.emplace_back([&kernel, state = states.back().get(), b, t, blocks, threads] {
            HostBlock block(*state, t, threads, b, blocks);
            kernel(block);
          });
      }
      for (std::thread& t : all) t.join();
    });
  }

 private:
  std::byte* allocate(std::size_t bytes, bool of_host) {
    auto& all = EmulatedDevices::all();
    if (bytes > all.free_bytes) return nullptr;
    const int descriptor = memfd_create("emulated", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) throw tally::Error(tally::Errc::no_resources, "memfd");
    return all.add(bytes, descriptor, {0, device_, -1, of_host, false});
  }
  int device_, process_, blocks_, host_;
};
static_assert(device::Driver<EmulatedDriver>);

/// A rank's memory on its device.
template <class T>
class EmulatedArray {
 public:
  EmulatedArray(EmulatedDriver& driver, std::size_t count) : driver_(driver), memory_(driver.allocate(std::max<std::size_t>(count * sizeof(T), 1))), count_(count) {}
  EmulatedArray(EmulatedDriver& driver, const std::vector<T>& values) : EmulatedArray(driver, values.size()) { driver.upload(memory_, values.data(), values.size() * sizeof(T)); }
  EmulatedArray(const EmulatedArray&) = delete;
  ~EmulatedArray() { driver_.release(memory_); }
  T* data() const { return reinterpret_cast<T*>(memory_); }
  tally::DeviceSpan<T> span() const { return {data(), count_}; }
  std::vector<T> values() const { return {data(), data() + count_}; }

 private:
  EmulatedDriver& driver_;
  std::byte* memory_;
  std::size_t count_;
};

}  // namespace test
