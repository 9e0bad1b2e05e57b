// SPDX-License-Identifier: Apache-2.0
// The thread transport under the conformance suite.
#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>
#include <random>

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
    CHECK(layout.bytes() <= SlotOptions{}.budget);
    CHECK(layout.staging_bytes() >= std::size_t{256} << 10);
    CHECK(layout.slots() >= 2);
    CHECK(layout.slot_bytes() >= 1024);
    // Rings do not overlap: ring_bytes apart, in this order.
    std::size_t expected = layout.ring(0, 0, 1);
    for (int lane = 0; lane < layout.lanes(); ++lane)
      for (Rank from = 0; from < n; ++from)
        for (Rank to = 0; to < n; ++to) {
          if (from == to) continue;
          CHECK(layout.ring(lane, from, to) == expected);
          expected += layout.ring_bytes();
        }
    CHECK((expected <= layout.staging(0) && layout.staging(0) < expected + 4096));
    CHECK(layout.staging(n - 1) + layout.staging_bytes() == layout.bytes());
    CHECK(layout.rank_line(n) <= layout.ring(0, 0, 1));
  }
}

TEST_CASE("payloads under way never overlap") {
  std::mt19937 random(7);
  for (const int slots : {1, 2, 4, 32})
    for (const std::size_t bytes : {std::size_t{128}, std::size_t{1024}, std::size_t{1152}, std::size_t{32} << 10}) {
      SlotOptions options;
      options.slots = slots;
      options.slot_bytes = bytes;
      const SlotLayout layout(2, options);
      REQUIRE(layout.slots() == static_cast<unsigned>(slots));
      CAPTURE(slots, bytes, layout.payload_area());
      std::deque<std::pair<std::size_t, std::size_t>> under_way;  // begin, end
      std::size_t at = 0, wrong = 0;
      for (int frame = 0; frame < 20'000; ++frame) {
        const std::size_t length = frame % 3 == 0 ? bytes : 81 + random() % ((frame % 3 == 1 ? std::min<std::size_t>(bytes, 1200) : bytes) - 80);
        const std::size_t begin = layout.payload_place(static_cast<std::uint64_t>(frame % slots), at, length);
        if (layout.payloads() + begin + length > layout.consumed()) ++wrong;
        for (const auto& [first, last] : under_way)
          if (begin < last && first < begin + length) ++wrong;
        under_way.emplace_back(begin, begin + length);
        if (under_way.size() == static_cast<std::size_t>(slots)) under_way.pop_front();
        at = layout.after_payload(at, length);
      }
      CHECK(wrong == 0);
    }
}

TEST_CASE("slots that do not fit their budget are refused") {
  SlotOptions tiny;
  tiny.budget = 200'000;
  CHECK(SlotLayout(2, tiny).staging_bytes() == 0);
  CHECK(SlotLayout(2, tiny).bytes() <= tiny.budget);
  tiny.budget = 1000;
  CHECK_THROWS_AS(SlotLayout(32, tiny), Error);
}

TEST_CASE("copying past the caches copies what it should and nothing else") {
  std::vector<std::byte> from(1000), to(1000);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 7 + 1);
  std::size_t wrong = 0;
  for (const std::size_t at : {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{16}, std::size_t{63}, std::size_t{64}, std::size_t{70}})
    for (const std::size_t source : {std::size_t{0}, std::size_t{3}, std::size_t{64}})
      for (std::size_t bytes = 0; bytes < 400; ++bytes) {
        std::fill(to.begin(), to.end(), std::byte{0});
        copy_past_caches(to.data() + at, from.data() + source, bytes);
        for (std::size_t i = 0; i < to.size(); ++i) wrong += to[i] != (i >= at && i < at + bytes ? from[source + i - at] : std::byte{0});
      }
  CHECK(wrong == 0);
}
