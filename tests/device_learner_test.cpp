// SPDX-License-Identifier: Apache-2.0
// The gradient that the example's GPU kernel computes, by threads in its place.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../examples/byte_model.hpp"
#include "../examples/device_learner.hpp"

namespace {

struct Team {
  int me, all;
  std::barrier<>& together;
  int thread() const { return me; }
  int threads() const { return all; }
  void sync() { together.arrive_and_wait(); }
  void add(float& to, float x) const {
    std::atomic_ref<float> sum(to);
    for (float before = sum.load(); !sum.compare_exchange_weak(before, before + x);) {
    }
  }
};

}  // namespace

TEST_CASE("a block's gradient is the learner's, also of fewer samples than a block has room for") {
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(i * i % 251);
  Parameters parameters, expected, got;
  initialize(parameters, 3);
  std::vector<std::size_t> positions;
  for (std::size_t i = 0; i < 13; ++i) positions.push_back(context + i * 377 % (text.size() - context));
  Learner learner;
  learner.use(parameters);
  learner.add(parameters, text, positions, 1.0f / 13, expected, [] {});

  constexpr int threads = 3;
  const auto block = std::make_unique<DeviceLearner>();
  std::barrier<> together(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      Team me{t, threads, together};
      for (std::size_t first = 0; first < positions.size(); first += DeviceLearner::samples)
        block->add(me, parameters.all.data(), got.all.data(), text.data(), [&](std::size_t s) { return positions[first + s]; }, std::min(DeviceLearner::samples, positions.size() - first), 1.0f / 13);
    });
  for (std::thread& t : team) t.join();
  CHECK(*expected.loss > 1);
  for (std::size_t i = 0; i <= Parameters::count; ++i) {
    INFO(i);
    REQUIRE(std::abs(expected.all[i] - got.all[i]) <= 1e-5f * (1 + std::abs(expected.all[i])));
  }
}
