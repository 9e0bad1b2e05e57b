// SPDX-License-Identifier: Apache-2.0
// RDMA verbs as a transport: everything that all transports and all networks must do. Needs an RDMA device; rdma/run.sh has one made
// of software in a virtual machine.
#include <catch2/catch.hpp>

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <tally/tally.hpp>
#include <tally/verbs.hpp>

#include "network_suite.hpp"
#include "table_networks.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

/// Whether there is a device; without, says so once for each test.
bool can_run() {
  try {
    const test::Job job(1);
    (void)detail::verbs_kind({}).make(job.join(0), test::all(1));
    return true;
  } catch (const Error& error) {
    std::printf("skipped: %s\n", error.what());
    return false;
  }
}
detail::NetworkKind<VerbsTransport> verbs(std::size_t window, std::size_t frame_bytes, std::size_t at_once, int lanes = 2, int stripes = 2) {
  VerbsOptions options;
  options.lanes = lanes;
  options.window = window;
  options.frame_bytes = frame_bytes;
  options.at_once = at_once;
  options.stripes = stripes;
  options.least_striped = 128;
  return detail::verbs_kind(options);
}
void run(int n, const SlotOptions& options, std::size_t at_once, const conformance::BodyOf<VerbsTransport>& body, int stripes) {
  const test::Job job(n);
  const auto kind = verbs(static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost), options.slot_bytes, at_once, options.lanes, stripes);
  test::on_ranks(n, [&](Rank r) {
    const auto transport = kind.make(job.join(r), test::all(n));
    body(*transport);
    transport->leave();
  });
}

}  // namespace

// The first one: RDMA does not work in processes that were forked after it was used.
TEST_CASE("a rank that is killed is missed, by who receives and by who sends over verbs", "[processes]") {
  test::Process asks([] {
    if (!can_run()) throw std::runtime_error("cannot run");
  });
  if (test::exited_well(asks.wait(10s))) test::who_is_killed_is_missed(detail::verbs_kind({}));
}
TEST_CASE("verbs conform, payloads going with their headers") {
  if (!can_run()) return;
  conformance::conformance<VerbsTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 32 << 10, body, 1); });
}
TEST_CASE("verbs conform, payloads being written over three queue pairs") {
  if (!can_run()) return;
  conformance::conformance<VerbsTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 64, body, 3); });
}
TEST_CASE("every algorithm is right over verbs, whatever the sizes, in a wide window and a narrow one") {
  if (!can_run()) return;
  test::every_algorithm_is_right(detail::verbs_kind({}), {1, 2, 3, 5});  // in an emulated machine eight ranks take a minute
  test::every_algorithm_is_right(verbs(30'000, 10'000, 300), {2, 5});
}
TEST_CASE("memory stays registered until it is gone") {
  if (!can_run()) return;
  const std::unique_ptr<ibv_device*, detail::Destroys<&::ibv_free_device_list>> devices(::ibv_get_device_list(nullptr));
  const std::unique_ptr<ibv_context, detail::Destroys<&::ibv_close_device>> context(::ibv_open_device(*devices));
  REQUIRE(context);
  const std::unique_ptr<ibv_pd, detail::Destroys<&::ibv_dealloc_pd>> domain(::ibv_alloc_pd(context.get()));
  const bool is_watched = detail::MemoryWatch::get() != nullptr;
  if (!is_watched) std::printf("skipped: a part, since userfaultfd(2) is not to be had here\n");
  const std::size_t bytes = 1 << 20;
  detail::Registrations all(domain.get(), 3 * bytes);
  const auto map = [&](void* at = nullptr) { return ::mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0); };
  auto* const p = static_cast<std::byte*>(map());
  REQUIRE(all.get(p, bytes, true));
  REQUIRE(all.get(p + 5000, 100'000, false));
  CHECK(all.made() == (is_watched ? 1 : 2));
  CHECK(all.found() == (is_watched ? 1 : 0));
  REQUIRE(::munmap(p, bytes) == 0);
  REQUIRE(map(p) == p);
  const auto again = all.get(p, bytes, true);
  REQUIRE(again);
  CHECK(all.made() == (is_watched ? 2 : 3));
  if (is_watched) CHECK(all.get(p, bytes, true) == again);
  // The oldest go when there is no room.
  std::vector<void*> more;
  for (int i = 0; i < 3; ++i) REQUIRE(all.get(more.emplace_back(map()), bytes, true));
  const auto before = all.made();
  REQUIRE(all.get(p, bytes, true));
  CHECK(all.made() == before + 1);
  CHECK(!all.get(reinterpret_cast<void*>(4096), 10, true));  // not there
  // What is only read may be a constant.
  void* const constant = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(!all.get(constant, bytes, true));
  more.insert(more.end(), {p, constant});
  for (void* each : more) ::munmap(each, bytes);
}
TEST_CASE("what is mapped where something else was is sent over verbs, not what was there") {
  if (!can_run()) return;
  test::everyone(detail::verbs_kind({}), 2, [](Communicator& comm) {
    const std::size_t count = 1 << 18;
    int* at = nullptr;
    for (int round = 0; round < 5; ++round) {
      if (round != 3) at = static_cast<int*>(::mmap(at, count * sizeof(int), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0));
      const std::span<int> data(at, count);
      std::ranges::fill(data, comm.rank() == 0 ? round + 1 : 0);
      comm.broadcast(data, 0);
      test::expect(std::ranges::all_of(data, [&](int value) { return value == round + 1; }), "round " + std::to_string(round));
      comm.all_reduce(data, sum);
      test::expect(std::ranges::all_of(data, [&](int value) { return value == 2 * (round + 1); }), "sum of round " + std::to_string(round));
      if (round == 2) ::madvise(at, count * sizeof(int), MADV_DONTNEED);
    }
    ::munmap(at, count * sizeof(int));
  });
}
TEST_CASE("groups, duplicates and operations in the background go over verbs, too") {
  if (can_run()) test::groups_are_right(detail::verbs_kind({}));
}
TEST_CASE("who comes late is blamed over verbs, and a report adds up to the nanosecond", "[quiet]") {
  if (can_run()) test::everyone(detail::verbs_kind({}), 3, test::late_ranks_are_blamed);
}
TEST_CASE("what was sent over verbs is there, however soon its sender goes") {
  if (can_run()) test::what_was_sent_is_there(detail::verbs_kind({}));
}
TEST_CASE("calls that do not match, an abort, a deadline and a rank that leaves are named over verbs") {
  if (can_run()) test::faults_are_named(detail::verbs_kind({}));
}
TEST_CASE("a rank that has left over verbs, and its process with it, is missed by who never had to do with it") {
  if (can_run()) test::who_left_is_missed(detail::verbs_kind({}));
}
TEST_CASE("whatever is under way over verbs, an abort, a deadline and a call that does not match end it") {
  if (can_run()) test::faults_end_what_is_under_way(detail::verbs_kind({}));
}
TEST_CASE("a short message over verbs needs nobody to look at it") {
  if (can_run()) test::short_messages_need_nobody(detail::verbs_kind({}));
}
TEST_CASE("a short message over verbs needs its sender no longer") {
  if (can_run()) test::short_messages_need_no_sender(detail::verbs_kind({}));
}
TEST_CASE("tables over verbs: every pull of bsp is known, rows, background, errors") {
  if (!can_run()) return;
  test::pulls_over_are_known(detail::verbs_kind({}), {{1, 1, 2}});
  test::all_else_over_is_right(detail::verbs_kind({}));
}
