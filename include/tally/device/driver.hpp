// SPDX-License-Identifier: Apache-2.0
// What the host asks of devices: memory, how another rank gets at it, streams, and blocks that run there. CUDA gives that
// (cuda_driver.hpp), and threads of the host do in tests, so that all that a host does for devices is tested without a GPU.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "seam.hpp"

namespace tally::inline v0::device {

/// Which device it is, the same for all processes that use it.
using DeviceId = std::array<std::uint8_t, 16>;

/// What another rank needs to get at memory of this one's.
struct Handle {
  std::uint64_t process = 0;  // the same for all ranks of a process, and for no others
  std::uint64_t address = 0, bytes = 0;  // for these
  std::int32_t device = 0, is_shareable = 0;
  std::array<std::byte, 64> shared{};    // for other processes
};

/// How one device gets at another one's memory.
enum class Link : std::uint8_t { same_device, nvlink, pcie, network, unknown };
constexpr std::string_view name_of(Link link) {
  constexpr std::string_view names[] = {"same device", "NVLink", "PCIe", "network", "unknown"};
  return names[static_cast<std::size_t>(link)];
}

enum class Memory : std::uint8_t {
  unknown,       // the driver does not know it: ordinary memory of the host's
  host,          // the host's, known to the driver
  device,        // this device's, or managed: it may be anywhere
  other_device,
};

/// A kernel: what every block does. It is copied to the device.
template <class K, class B>
concept Kernel = std::copyable<K> && requires(const K& kernel, B& block) { kernel(block); };

/// One rank's device. All throw tally::Error, and say what was asked for.
template <class D>
concept Driver = Block<typename D::Block> && requires(D& d, const D& c, typename D::Stream stream, typename D::Event& event, std::byte* memory, const void* data, std::size_t bytes, const Handle& handle, const DeviceId& id) {
  { D::name } -> std::convertible_to<std::string_view>;
  { c.id() } -> std::same_as<DeviceId>;
  { c.most_blocks() } -> std::same_as<int>;  // of most_threads() each, that certainly run at the same time if nothing else does
  { c.most_threads() } -> std::same_as<int>;
  { c.link_to(id) } -> std::same_as<Link>;
  { c.process() } -> std::same_as<std::uint64_t>;
  { c.host() } -> std::same_as<std::uint64_t>;  // the same for all ranks whose devices may get at each other's memory

  // Memory, zero, or null where there is not so much. What is private is had and let go while other ranks' kernels run.
  { d.allocate(bytes) } -> std::same_as<std::byte*>;
  d.release(memory);
  { d.allocate_private(bytes) } -> std::same_as<std::byte*>;
  d.release_private(memory);
  { d.allocate_host(bytes) } -> std::same_as<std::byte*>;  // for both, at the same address
  d.release_host(memory);
  { d.handle_of(memory, bytes) } -> std::same_as<Handle>;  // of what allocate() gave
  { d.open(handle) } -> std::same_as<std::byte*>;  // of another rank
  d.close(handle, memory);
  d.upload(memory, data, bytes);  // done when it returns; also while a stream is captured
  { c.memory_at(data) } -> std::same_as<Memory>;

  d.expect_neighbours(0);  // so many other ranks of this process use this device
  { c.captures(stream) } -> std::same_as<bool>;  // nothing runs, it becomes part of a graph. Throws where it is no stream of this device's
  { c.problem(stream) } -> std::same_as<std::string>;  // what went wrong on it, if anything did
  d.record(event, stream);
  { c.identity(stream) } -> std::same_as<std::uint64_t>;  // no other stream has it, then or later
  d.attach();  // a thread of the library's own will work for this device alone
  d.post(memory, std::uint32_t{});  // a word of any rank's: it comes to be there while kernels run. From any thread
  d.order_after(stream, event);  // what comes on the stream waits for what was on the other one
};

}  // namespace tally::inline v0::device
