// SPDX-License-Identifier: Apache-2.0
// UCX as a transport: everything that all transports and all networks must do. Runs twice: over what UCX chooses within a host, which is
// shared memory, and over its TCP.
#include <catch2/catch.hpp>

#include <tally/tally.hpp>
#include <tally/ucx.hpp>

#include "network_suite.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

detail::NetworkKind<UcxTransport> ucx(std::size_t window, std::size_t frame_bytes, std::size_t at_once, int lanes = 2) {
  FabricOptions options;
  options.lanes = lanes;
  options.window = window;
  options.frame_bytes = frame_bytes;
  options.at_once = at_once;
  return detail::ucx_kind(options);
}
void run(int n, const SlotOptions& options, std::size_t at_once, const conformance::BodyOf<UcxTransport>& body) {
  const test::Job job(n);
  const auto kind = ucx(static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost), options.slot_bytes, at_once, options.lanes);
  test::on_ranks(n, [&](Rank r) {
    const auto transport = kind.make(job.join(r), test::all(n));
    body(*transport);
    transport->leave();
  });
}

}  // namespace

TEST_CASE("UCX conforms, payloads going with their headers") {
  conformance::conformance<UcxTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 1 << 20, body); });
}
TEST_CASE("UCX conforms, payloads being fetched") {
  conformance::conformance<UcxTransport>([](int n, const SlotOptions& options, const auto& body) { run(n, options, 64, body); });
}
TEST_CASE("every algorithm is right over UCX, whatever the sizes, in a wide window and a narrow one") {
  test::every_algorithm_is_right(detail::ucx_kind({}));
  test::every_algorithm_is_right(ucx(3000, 1000, 300));
}
TEST_CASE("groups, duplicates and operations in the background go over UCX, too") { test::groups_are_right(detail::ucx_kind({})); }
TEST_CASE("who comes late is blamed over UCX, and a report adds up to the nanosecond") { test::everyone(detail::ucx_kind({}), 3, test::late_ranks_are_blamed); }
TEST_CASE("what was sent over UCX is there, however soon its sender goes") { test::what_was_sent_is_there(detail::ucx_kind({})); }
TEST_CASE("calls that do not match, an abort, a deadline and a rank that leaves are named over UCX") { test::faults_are_named(detail::ucx_kind({})); }
TEST_CASE("a rank that is killed is missed, by who receives and by who sends over UCX", "[processes]") { test::who_is_killed_is_missed(detail::ucx_kind({})); }
