// SPDX-License-Identifier: Apache-2.0
// The thread transport under the conformance suite.
#include <memory>
#include <mutex>

#include <tally/transport/thread.hpp>

#include "transport_conformance.hpp"

using namespace tally;

TEST_CASE("thread transport conforms") {
  conformance::conformance([](int n, const SlotOptions& options, const conformance::Body& body) {
    const auto memory = std::make_shared<ThreadMemory>(SlotLayout(n, options));
    std::mutex mutex;
    std::string failure;
    {
      std::vector<std::jthread> ranks;
      for (Rank r = 0; r < n; ++r)
        ranks.emplace_back([&, r] {
          try {
            SlotTransport transport(memory, r);
            body(transport);
          } catch (const std::exception& error) {
            const std::lock_guard lock(mutex);
            failure = "rank " + std::to_string(r) + ": " + error.what();
          }
        });
    }
    CHECK(failure == "");
  });
}

TEST_CASE("slots fit their budget") {
  for (const int n : {2, 3, 8, 32, 64}) {
    const SlotLayout layout(n, SlotOptions{});
    CAPTURE(n, layout.slots(), layout.slot_bytes());
    CHECK(layout.bytes() <= std::size_t{64} << 20);
    CHECK(layout.slots() >= 2);
    CHECK(layout.slot_bytes() >= 1024);
    // Rings do not overlap: ring_bytes apart, in this order.
    std::size_t expected = layout.ring(0, 0, 1);
    for (Rank from = 0; from < n; ++from)
      for (Rank to = 0; to < n; ++to) {
        if (from == to) continue;
        CHECK(layout.ring(0, from, to) == expected);
        expected += layout.ring_bytes();
      }
    CHECK(expected == layout.bytes());
    CHECK(layout.rank_line(n) <= layout.ring(0, 0, 1));
  }
  SlotOptions tiny;
  tiny.budget = 1000;
  CHECK_THROWS_AS(SlotLayout(32, tiny), Error);
}
