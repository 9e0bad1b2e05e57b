// SPDX-License-Identifier: Apache-2.0
// UCX as a transport: everything that all transports and all networks must do, over its TCP; and what goes with its shared memory.
#include <catch2/catch.hpp>

#include <tally/tally.hpp>
#include <tally/ucx.hpp>

#include "network_suite.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

detail::NetworkKind<UcxTransport> ucx(std::size_t window, std::size_t frame_bytes, std::size_t at_once, int lanes = 2, bool shared_memory = false) {
  UcxOptions options;
  options.shared_memory = shared_memory;
  options.lanes = lanes;
  options.window = window;
  options.frame_bytes = frame_bytes;
  options.at_once = at_once;
  return detail::ucx_kind(options);
}
void run(int n, const SlotOptions& options, std::size_t at_once, const conformance::BodyOf<UcxTransport>& body, bool shared_memory = false) {
  const test::Job job(n);
  const auto kind = ucx(static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost), options.slot_bytes, at_once, options.lanes, shared_memory);
  test::on_ranks(n, [&](Rank r) {
    const auto transport = kind.make(job.join(r), test::all(n));
    body(*transport);
    transport->leave();
  });
}

}  // namespace

// The first one: UCX does not work in processes that were forked after it was used.
TEST_CASE("a rank that is killed is missed, by who receives and by who sends over UCX", "[processes]") { test::who_is_killed_is_missed(detail::ucx_kind({})); }
TEST_CASE("communicators over UCX that are gone have given back all that they used, while their job goes on", "[processes]") {
  test::Process child([] {
    const auto over = test::outcomes(detail::ucx_kind({}), {0, 0, 0}, test::Way::network, [](Communicator& comm) {
      int before = 0;
      for (int round = 0; round < 40; ++round) {
        {
          auto other = comm.duplicate();
          std::vector<int> data(100, 1);
          other.all_reduce(std::span(data), sum);
        }
        comm.barrier();
        if (round == 19) before = test::open_descriptors();
      }
      comm.barrier();
      // What the other ranks, threads of this process, have in hand at that moment: a few of their 20 communicators at most.
      if (comm.rank() == 0) test::expect(test::open_descriptors() < before + 20, std::to_string(test::open_descriptors()) + " descriptors after 40 rounds, " + std::to_string(before) + " after 20");
    });
    for (const test::Caught& c : over)
      if (c.error || c.foreign) throw std::runtime_error(c.text);
  });
  CHECK(child.wait(60s) == 0);
}
/// A worker that has not come to rest is left alone for good (see transport/ucx.hpp); what UCX made for it is found nowhere.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libucp.so\nleak:libucs.so\nleak:libuct.so\n"; }

TEST_CASE("UCX conforms, payloads going with their headers") {
  conformance::conformance<UcxTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 1 << 20, body); });
}
TEST_CASE("UCX conforms, payloads being fetched") {
  conformance::conformance<UcxTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 64, body); });
}
// TSan does not see how uninstrumented code shares memory.
TEST_CASE("UCX conforms in its shared memory, payloads being fetched", "[processes]") {
  conformance::conformance<UcxTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 64, body, true); });
}
TEST_CASE("every algorithm is right in UCX's shared memory", "[processes]") { test::every_algorithm_is_right(ucx(8 << 20, 2 << 20, 64 << 10, 2, true)); }
TEST_CASE("every algorithm is right over UCX, whatever the sizes, in a wide window and a narrow one") {
  test::every_algorithm_is_right(detail::ucx_kind({}));
  test::every_algorithm_is_right(ucx(3000, 1000, 300));
}
TEST_CASE("groups, duplicates and operations in the background go over UCX, too") { test::groups_are_right(detail::ucx_kind({})); }
TEST_CASE("who comes late is blamed over UCX, and a report adds up to the nanosecond", "[quiet]") { test::everyone(detail::ucx_kind({}), 3, test::late_ranks_are_blamed); }
TEST_CASE("what was sent over UCX is there, however soon its sender goes") { test::what_was_sent_is_there(detail::ucx_kind({})); }
TEST_CASE("calls that do not match, an abort, a deadline and a rank that leaves are named over UCX") { test::faults_are_named(detail::ucx_kind({})); }
TEST_CASE("a rank that has left over UCX, and its process with it, is missed by who never had to do with it") { test::who_left_is_missed(detail::ucx_kind({})); }
TEST_CASE("whatever is under way over UCX, an abort, a deadline and a call that does not match end it") { test::faults_end_what_is_under_way(detail::ucx_kind({})); }
TEST_CASE("a short message over UCX needs nobody to look at it") { test::short_messages_need_nobody(detail::ucx_kind({})); }
TEST_CASE("a short message over UCX needs its sender no longer") { test::short_messages_need_no_sender(detail::ucx_kind({})); }
