// SPDX-License-Identifier: Apache-2.0
// What runs on devices, on one that the host plays: every operation by packets and by shares, lateness, and what happens when a rank is missing.
#include <catch2/catch.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <tally/algorithms/zero_copy.hpp>
#include <tally/choose.hpp>

#include "device_emulation.hpp"
#include "sanitized.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::EmulatedDevice;
using test::HostBlock;
using test::sanitized;

namespace {

/// x -> a x + b modulo 2^32: composing them is associative and not commutative, and every bit of the result depends on the order.
struct Affine {
  std::uint32_t a, b;
};
struct Compose {
  constexpr Affine operator()(Affine f, Affine g) const { return {f.a * g.a, g.a * f.b + g.b}; }
};
/// Of a size that fits into no packet and no row.
struct Odd {
  std::uint8_t bytes[11];
};

template <class T>
T value_of(std::uint64_t bits) {
  std::mt19937_64 random(bits);
  if constexpr (std::is_same_v<T, Affine>) return {static_cast<std::uint32_t>(random()), static_cast<std::uint32_t>(random())};
  else if constexpr (std::is_same_v<T, Odd>) {
    Odd odd;
    for (auto& b : odd.bytes) b = static_cast<std::uint8_t>(random());
    return odd;
  } else if constexpr (std::is_integral_v<T>) return static_cast<T>(random());
  else if constexpr (std::is_same_v<T, double>) return static_cast<double>(static_cast<int>(random() % 2001) - 1000);  // sums are exact in any order
  else return static_cast<T>(static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 7.0f);
}
template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}
template <class T, class Op>
using FolderOf = std::conditional_t<std::is_same_v<Op, void>, device::Mover<T>, device::Folder<T, std::conditional_t<std::is_same_v<Op, void>, Sum, Op>>>;

Share share_of(const Layout& layout) { return find_algorithm(layout.operation, ZeroCopy::name).share(layout.shape()); }
/// Of all ranks.
std::vector<Share> shares_of(Collective operation, int n, std::size_t count, Rank root = 0) {
  std::vector<Share> shares;
  for (Rank r = 0; r < n; ++r) {
    Layout l;
    l.operation = operation, l.me = r, l.n = n, l.root = root, l.count = count;
    shares.push_back(share_of(l));
  }
  return shares;
}
device::PacketWork work_of(const device::PacketPlan& plan, const void* in, void* out) {
  return {plan.sends.data(), static_cast<int>(plan.sends.size()), plan.folds.data(), static_cast<int>(plan.folds.size()), static_cast<const std::byte*>(in), static_cast<std::byte*>(out)};
}

device::Place place(const void* address) { return {reinterpret_cast<std::uintptr_t>(address)}; }

enum class Way { packets, shares, steps };
/// One operation of all ranks: buffers, what each rank's kernel does, and what is in the buffers afterwards.
struct Case {
  std::string text;
  std::function<void(HostBlock&, const device::RankView&)> kernel;
  std::function<std::string()> problem;  // empty: all is as it should be
};

template <class T, class Op>
Case make_case(Collective operation, int n, int blocks, std::size_t count, Way way, bool in_place, Op* op, std::size_t shift, Rank root, Steps (*generate)(Shape) = nullptr) {
  using F = FolderOf<T, Op>;
  struct State {
    struct Channel {
      std::unique_ptr<Plan> plan;
      std::vector<std::uint64_t> done;
      std::vector<T> scratch;
      device::StepsWork work;
    };
    std::vector<std::vector<Channel>> channels;  // by rank

    std::vector<Layout> layouts;
    std::vector<Share> shares;
    std::vector<std::vector<T>> inputs, buffers, before;  // a buffer has a margin on both sides
    std::vector<device::PacketPlan> plans;
    std::vector<std::size_t> in_at, out_at;
  };
  auto s = std::make_shared<State>();
  const F folder = [&] {
    if constexpr (std::is_same_v<Op, void>) return F{};
    else return F{*op, n};
  }();
  for (Rank r = 0; r < n; ++r) {
    Layout l;
    l.operation = operation, l.me = r, l.n = n, l.root = root, l.count = count, l.in_place = in_place;
    s->layouts.push_back(l);
    s->shares.push_back(share_of(l));
    const Placement place = l.placement();
    const std::size_t ins = l.input_count(), outs = l.output_count(), margin = 8 + shift;
    // One allocation: the input, then the output, or both as the placement says.
    const std::size_t in_at = margin + place.input_first, out_at = in_place ? margin + place.output_first : margin + ins + 16;
    s->in_at.push_back(in_at), s->out_at.push_back(out_at);
    std::vector<T> memory(std::max(in_at + ins, out_at + outs) + 8);
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = value_of<T>(static_cast<std::uint64_t>(r) * 1'000'003 + i);
    s->buffers.push_back(memory);
    s->before.push_back(memory);
    if (way != Way::steps) continue;
    auto& channels = s->channels.emplace_back();
    for (int b = 0; b < blocks; ++b) {
      auto& channel = channels.emplace_back();
      const device::Cut cut = device::Cut::of(count, b, blocks);
      Layout part = l;
      part.count = cut.part;
      channel.plan = std::make_unique<Plan>(generate(part.shape()), part, 1);
      channel.done.resize(channel.plan->steps().size(), 7);
      channel.scratch.resize(channel.plan->scratch());
      channel.work = {channel.plan->steps().data(), channel.plan->dependencies().data(), static_cast<std::uint32_t>(channel.plan->steps().size()), part.output_count(), channel.done.data(), reinterpret_cast<std::byte*>(channel.scratch.data()), cut, reinterpret_cast<const std::byte*>(s->buffers.back().data() + in_at), reinterpret_cast<std::byte*>(s->buffers.back().data() + out_at)};
    }
  }
  for (Rank r = 0; r < n; ++r) s->plans.emplace_back(s->shares, r, n, sizeof(T), blocks);
  Case c;
  c.text = detail::concat({name_of(operation), " of ", count, " elements of ", sizeof(T), " bytes, ", n, " ranks, ", blocks, " blocks, ", way == Way::packets ? "packets" : way == Way::shares ? "shares" : "steps", in_place ? ", in place" : "", ", shifted by ", shift, ", root ", root});
  c.kernel = [s, way, folder](HostBlock& block, const device::RankView& view) {
    const auto me = static_cast<std::size_t>(view.me);
    auto* const memory = s->buffers[me].data();
    const auto* const in = reinterpret_cast<const std::byte*>(memory + s->in_at[me]);
    auto* const out = reinterpret_cast<std::byte*>(memory + s->out_at[me]);
    const device::PacketPlan& plan = s->plans[me];
    if constexpr (!F::scales)
      if (way == Way::steps) return device::run_steps<T, true>(block, view, s->channels[me][static_cast<std::size_t>(block.index())].work, folder);
    if (way == Way::packets) device::run_packets<T, 8, true>(block, view, work_of(plan, in, out), folder);
    else device::run_share<T, 8, true>(block, view, device::ShareWork{s->shares[me], place(in), place(out)}, folder);
  };
  c.problem = [s, n, count, operation, folder, root]() -> std::string {
    using Wide = typename F::Wide;
    const auto in = [&](Rank r, std::size_t i) -> const T& { return s->before[static_cast<std::size_t>(r)][s->in_at[static_cast<std::size_t>(r)] + i]; };
    const std::function<Wide(Rank, Rank, std::size_t)> fold = [&](Rank lo, Rank hi, std::size_t i) -> Wide {
      if (hi - lo == 1) return folder.take(folder.scale(in(lo, i), folder.factor()));
      int half = 1;
      while (half * 2 < hi - lo) half *= 2;
      const Wide left = fold(lo, lo + half, i), right = fold(lo + half, hi, i);
      return folder.fold(left, right);
    };
    for (Rank r = 0; r < n; ++r) {
      const auto me = static_cast<std::size_t>(r);
      std::vector<T> expected = s->before[me];
      const std::size_t at = s->out_at[me];
      const auto mine = [&](std::size_t i) -> T& { return expected[at + i]; };
      for (std::size_t i = 0; i < count; ++i) switch (operation) {
          case Collective::all_reduce: mine(i) = folder.give(fold(0, n, i)); break;
          case Collective::reduce: if (r == root) mine(i) = folder.give(fold(0, n, i)); break;
          case Collective::broadcast: mine(i) = s->before[static_cast<std::size_t>(root)][s->out_at[static_cast<std::size_t>(root)] + i]; break;
          case Collective::reduce_scatter: mine(i) = folder.give(fold(0, n, me * count + i)); break;
          case Collective::scatter: mine(i) = in(root, me * count + i); break;
          case Collective::scan: mine(i) = folder.give(fold(0, r + 1, i)); break;
          case Collective::exclusive_scan: if (r > 0) mine(i) = folder.give(fold(0, r, i)); break;
          case Collective::gather: if (r != root) break; [[fallthrough]];
          case Collective::all_gather: for (Rank q = 0; q < n; ++q) mine(static_cast<std::size_t>(q) * count + i) = in(q, i); break;
          default: for (Rank q = 0; q < n; ++q) mine(static_cast<std::size_t>(q) * count + i) = in(q, me * count + i); break;
        }
      for (std::size_t i = 0; i < expected.size(); ++i)
        if (!same_bits(expected[i], s->buffers[me][i])) return detail::concat({"rank ", r, ", element ", i, " (output begins at ", at, ", input at ", s->in_at[me], ")"});
    }
    return {};
  };
  return c;
}

constexpr Collective folding[] = {Collective::all_reduce, Collective::reduce, Collective::reduce_scatter, Collective::scan, Collective::exclusive_scan};
constexpr Collective moving[] = {Collective::broadcast, Collective::all_gather, Collective::gather, Collective::scatter, Collective::all_to_all};

template <class T, class Op>
void add_cases(std::vector<Case>& cases, int n, int blocks, std::span<const Collective> operations, Op* op, std::span<const std::size_t> counts) {
  for (const Collective operation : operations)
    for (const std::size_t count : counts)
      for (const Way way : {Way::packets, Way::shares})
        for (const bool in_place : {false, true}) {
          if (in_place && operation == Collective::all_to_all && way == Way::shares) continue;  // ranks would read what others have overwritten
          cases.push_back(make_case<T, Op>(operation, n, blocks, count, way, in_place, op, (count + cases.size()) % 3, static_cast<Rank>(cases.size()) % n));
        }
}

/// One launch after another in the same windows.
void run_all(EmulatedDevice& gpu, const std::vector<Case>& cases, std::function<void(int, int)> before = {}) {
  gpu.run([&](HostBlock& block, const device::RankView& view, int operation) { cases[static_cast<std::size_t>(operation)].kernel(block, view); }, static_cast<int>(cases.size()), before);
  for (const Case& c : cases) {
    INFO(c.text);
    const std::string problem = c.problem();
    CHECK(problem == "");
  }
}

}  // namespace

TEST_CASE("every operation, by packets and by shares, one after the other in the same windows") {
  const std::size_t counts[] = {0, 1, 7, 130};
  for (const int n : {1, 2, 3, 5, 8})
    for (const auto& [blocks, each] : {std::pair{1, 1}, std::pair{1, 3}, std::pair{3, 2}}) {
      if (sanitized && n > 3 && blocks * each > 3) continue;  // as many threads as that take minutes
      EmulatedDevice gpu(n, blocks, each, 8 * 131 * 2);
      std::vector<Case> cases;
      Compose compose;
      Sum add;
      add_cases<Affine>(cases, n, blocks, folding, &compose, counts);
      add_cases<std::int16_t>(cases, n, blocks, folding, &add, std::span(counts).last(1));
      add_cases<Odd, void>(cases, n, blocks, moving, nullptr, counts);
      add_cases<std::uint8_t, void>(cases, n, blocks, moving, nullptr, std::span(counts).last(1));
      run_all(gpu, cases);
    }
}

TEST_CASE("floats: all ranks get the same bits, small ones are rounded once") {
  const std::size_t counts[] = {33};
  for (const int n : {2, 3, 7}) {
    EmulatedDevice gpu(n, 2, 1, 1024);
    std::vector<Case> cases;
    Sum add;
    Mean average;
    Max most;
    PremultipliedSum<float> scaled(0.3f);
    add_cases<float>(cases, n, 2, folding, &add, counts);
    add_cases<double>(cases, n, 2, folding, &average, counts);
    add_cases<bf16>(cases, n, 2, folding, &add, counts);
    add_cases<f16>(cases, n, 2, folding, &average, counts);
    add_cases<fp8_e4m3>(cases, n, 2, folding, &scaled, counts);
    add_cases<std::complex<float>>(cases, n, 2, folding, &average, counts);
    add_cases<float>(cases, n, 2, folding, &most, counts);
    run_all(gpu, cases);
  }
  // Of four ranks, 256 + 1 + 1 + 1 in bf16: rounded after each of them it stays 256.
  EmulatedDevice gpu(4, 1, 1);
  std::vector<bf16> values(4, bf16(1.0f)), results(4);
  values[0] = bf16(256.0f);
  const std::vector<Share> shares = shares_of(Collective::all_reduce, 4, 1);
  gpu.run([&](HostBlock& block, const device::RankView& view, int) {
    const device::PacketPlan plan(shares, view.me, 4, 2, 1);
    const auto me = static_cast<std::size_t>(view.me);
    device::run_packets<bf16, 8, true>(block, view, work_of(plan, &values[me], &results[me]), device::Folder<bf16, Sum>{sum, 4});
  });
  for (const bf16 each : results) CHECK(static_cast<float>(each) == 260.0f);  // 259 is no bf16; of its neighbours 258 and 260 the even one
}

TEST_CASE("every algorithm that is written as steps, a channel per block") {
  int tried = 0;
  for (const int n : {1, 2, 3, 5, 8})
    for (const int blocks : {1, 2}) {  // and as many threads, and frames
      if (sanitized && n > 5) continue;
      EmulatedDevice gpu(n, blocks, blocks, 1, static_cast<std::size_t>(blocks), 40);  // a frame holds three of the largest elements
      std::vector<Case> cases;
      Compose compose;
      Mean average;
      const auto add = [&](Collective operation, std::size_t count) {
        for (const std::string_view name : algorithms_for(operation)) {
          const AlgorithmRef algorithm = find_algorithm(operation, name);
          if (!algorithm.generate) continue;
          for (const bool in_place : {false, true}) {
            const Rank root = static_cast<Rank>(cases.size()) % n;
            if (!reduces(operation)) cases.push_back(make_case<Odd, void>(operation, n, blocks, count, Way::steps, in_place, nullptr, 1, root, algorithm.generate));
            else if (algorithm.folding == Folding::ordered || algorithm.folding == Folding::fixed) cases.push_back(make_case<Affine>(operation, n, blocks, count, Way::steps, in_place, &compose, 0, root, algorithm.generate));
            else cases.push_back(make_case<double>(operation, n, blocks, count, Way::steps, in_place, &average, 0, root, algorithm.generate));
            cases.back().text += detail::concat({", ", name});
          }
        }
      };
      for (const std::size_t count : {std::size_t{1}, std::size_t{37}}) {
        for (const Collective operation : folding) add(operation, count);
        for (const Collective operation : moving) add(operation, count);
      }
      tried += static_cast<int>(cases.size());
      run_all(gpu, cases);
    }
  CHECK(tried > 500);
}

TEST_CASE("what one operation leaves is what the next one begins with, cut otherwise among ranks, blocks and threads") {
  constexpr int n = 3, operations = 60;
  EmulatedDevice gpu(n, 2, 3, 512);
  gpu.falters = true;
  std::vector<std::vector<std::uint32_t>> buffers(n, std::vector<std::uint32_t>(101));
  for (std::size_t i = 0; i < 101; ++i)
    for (std::uint32_t r = 0; r < n; ++r) buffers[r][i] = static_cast<std::uint32_t>(i) * 7 + r;
  const auto count_of = [](int operation) { return static_cast<std::size_t>(101 - operation % 4 * 13); };
  gpu.run([&](HostBlock& block, const device::RankView& view, int operation) {
    auto* const mine = reinterpret_cast<std::byte*>(buffers[static_cast<std::size_t>(view.me)].data());
    const std::vector<Share> shares = shares_of(Collective::all_reduce, n, count_of(operation));
    const device::Folder<std::uint32_t, Sum> folder{sum, n};
    if (operation % 2 == 1) {  // which looks at its own buffer before it hears of anybody
      const device::PacketPlan plan(shares, view.me, n, 4, 2);
      device::run_packets<std::uint32_t, 8, true>(block, view, work_of(plan, mine, mine), folder);
    } else {
      device::run_share<std::uint32_t, 8, true>(block, view, {shares[static_cast<std::size_t>(view.me)], place(mine), place(mine)}, folder);
    }
  }, operations);
  for (std::size_t i = 0; i < 101; ++i) {
    std::uint32_t values[n];
    for (std::uint32_t r = 0; r < n; ++r) values[r] = static_cast<std::uint32_t>(i) * 7 + r;
    for (int k = 0; k < operations; ++k)
      if (i < count_of(k)) values[0] = values[1] = values[2] = values[0] + values[1] + values[2];
    for (std::uint32_t r = 0; r < n; ++r) CHECK(buffers[r][i] == values[r]);
  }
}

TEST_CASE("numbers of operations wrap") {
  const std::size_t counts[] = {5};
  for (const std::uint32_t begin : {0xffff'fff0u, 0xffff'fff1u}) {  // each operation's first meeting, and its last, is the one that wraps
    EmulatedDevice gpu(3, 2, 2, 256);
    for (int r = 0; r < 3; ++r) {
      gpu.set_flags(r, begin);  // what was said last, which is not 0 after so many operations
      for (int b = 0; b < 2; ++b) gpu.epochs(r, b) = {begin, begin};
    }
    std::vector<Case> cases;
    Compose compose;
    add_cases<Affine>(cases, 3, 2, folding, &compose, counts);
    add_cases<Odd, void>(cases, 3, 2, moving, nullptr, counts);
    run_all(gpu, cases, [](int rank, int operation) {
      if (rank == operation % 3) std::this_thread::sleep_for(2ms);
    });
    CHECK(gpu.epochs(0, 0).meets < 100);
    CHECK(gpu.epochs(0, 0).packets < 100);
  }
}

TEST_CASE("where numbers of packets wrap, what was never written is not taken for data") {
  EmulatedDevice gpu(2, 2, 2, 256);
  for (int r = 0; r < 2; ++r) {
    gpu.set_flags(r, 5);
    for (int b = 0; b < 2; ++b) gpu.epochs(r, b) = {5, 0xffff'fffe, 7};
  }
  std::vector<Case> cases;
  Sum add;
  for (const std::size_t count : {1u, 1u, 300u, 2u, 300u}) cases.push_back(make_case<std::uint32_t, Sum>(Collective::all_reduce, 2, 2, count, Way::packets, false, &add, 0, 0));
  for (int turn = 0; turn < 20; ++turn) {
    run_all(gpu, {cases[0]}, [&](int rank, int) {
      if (rank == turn % 2) std::this_thread::sleep_for(1ms);
    });
    if (turn == 0) run_all(gpu, cases);
  }
  CHECK(gpu.epochs(0, 0).packets == 24);
}

TEST_CASE("a rank that comes late is seen to be the last, by all others and not by itself") {
  for (const bool by_packets : {true, false}) {
    constexpr int n = 4, late = 2;
    EmulatedDevice gpu(n, 1, 1);
    Sum add;
    const Case c = make_case<float>(Collective::all_reduce, n, 1, 64, by_packets ? Way::packets : Way::shares, false, &add, 0, 0);
    std::vector<std::chrono::steady_clock::time_point> came(n);
    gpu.run([&](HostBlock& block, const device::RankView& view, int) { c.kernel(block, view); }, 1, [&](int rank, int) {
      if (rank == late) gpu.until_they_wait({0, 1, 3});
      came[static_cast<std::size_t>(rank)] = std::chrono::steady_clock::now();
    });
    CHECK(c.problem() == "");
    const auto time_of = [&](int r) { return static_cast<std::uint64_t>(came[static_cast<std::size_t>(r)].time_since_epoch().count()); };
    for (int r = 0; r < n; ++r) {
      const device::Record record = gpu.records(r)[0];
      INFO("rank " << r << (by_packets ? ", packets" : ", shares"));
      CHECK(record.failure == device::Failure::none);
      CHECK(record.entered >= time_of(r));
      CHECK(record.ended >= record.entered + record.waited);
      if (r == late) continue;
      CHECK(record.entered < time_of(late));
      CHECK(record.last == late);
      CHECK(record.waited >= time_of(late) - record.entered);
      CHECK(gpu.late(r)[late] > 0);
      CHECK(gpu.late(r)[0] + gpu.late(r)[1] + gpu.late(r)[2] + gpu.late(r)[3] == record.waited);
      CHECK(gpu.late(r)[r] == 0);
      CHECK(gpu.runs(r) == 1);
      CHECK(record.totals.elapsed == record.ended - record.entered);
      CHECK(record.totals.waited == record.waited);
      CHECK(record.polls > 0);
    }
  }
}

TEST_CASE("I6: by steps, too, it is the late rank that is blamed, not the neighbour who waited for it") {
  constexpr int n = 5, late = 2;
  EmulatedDevice gpu(n, 1, 1, 1, 2, 64);
  Sum add;
  const Case c = make_case<float>(Collective::all_reduce, n, 1, 40, Way::steps, false, &add, 0, 0, find_algorithm(Collective::all_reduce, "ring").generate);
  gpu.run([&](HostBlock& block, const device::RankView& view, int) { c.kernel(block, view); }, 1, [&](int rank, int) {
    if (rank != late) return;
    gpu.until_they_wait({0, 1, 3, 4});
    std::this_thread::sleep_for(20ms);
  });
  for (int r = 0; r < n; ++r) {
    INFO("rank " << r);
    std::uint64_t all = 0;
    for (int q = 0; q < n; ++q) all += gpu.late(r)[q];
    const device::Record record = gpu.records(r)[0];
    CHECK(all == record.waited);
    CHECK(gpu.late(r)[r] == 0);
    CHECK(record.waited + record.settled <= record.ended - record.entered);
    if (r == late) continue;
    CHECK(gpu.late(r)[late] >= 20'000'000);
    CHECK(record.last == late);
  }
}

TEST_CASE("who waits for a rank that does not come ends at its deadline, says for whom, and the others hear of it") {
  for (const bool by_packets : {true, false}) {
    constexpr int n = 4;
    EmulatedDevice gpu(n, 2, 1);
    Sum add;
    const Case c = make_case<float>(Collective::all_reduce, n, 2, 64, by_packets ? Way::packets : Way::shares, false, &add, 0, 0);
    const auto kernel = [&](HostBlock& block, const device::RankView& view, int) { c.kernel(block, view); };
    std::thread clock([&] {
      gpu.until_they_wait({0, 1, 3});
      HostBlock::advance_clock(61);
    });
    gpu.run(kernel, 1, {}, {0, 1, 3});
    clock.join();
    for (const int r : {0, 1, 3}) {
      for (const device::Record& record : gpu.records(r)) {
        INFO("rank " << r << (by_packets ? ", packets" : ", shares"));
        CHECK((record.failure == device::Failure::timed_out || record.failure == device::Failure::broken));
        CHECK(record.missing == 2);
      }
    }
    // Whoever comes after that hears at once that it is over, and for whom.
    gpu.run(kernel);
    for (int r = 0; r < n; ++r)
      for (const device::Record& record : gpu.records(r)) {
        CHECK(record.failure == device::Failure::broken);
        CHECK(record.missing == 2);
        CHECK(record.ended - record.entered < 10'000'000'000u);
      }
  }
}

TEST_CASE("all threads of all blocks give up at once") {
  for (const bool by_packets : {true, false}) {
    EmulatedDevice gpu(4, 3, 2);
    gpu.timeout = 100ms;
    Sum add;
    const Case c = make_case<float>(Collective::all_reduce, 4, 3, 64, by_packets ? Way::packets : Way::shares, false, &add, 0, 0);
    gpu.run([&](HostBlock& block, const device::RankView& view, int) { c.kernel(block, view); }, 1, {}, {0, 1, 3});
    for (const int r : {0, 1, 3})
      for (const device::Record& record : gpu.records(r)) {
        CHECK((record.failure == device::Failure::timed_out || record.failure == device::Failure::broken));
        CHECK((record.missing >= 0 && record.missing < 4));  // for others than the second where one had no core for so long
      }
  }
}

TEST_CASE("ranks that call different things are told so, and which") {
  for (const Way way : {Way::packets, Way::shares, Way::steps}) {
    constexpr int n = 3;
    EmulatedDevice gpu(n, 2, 2);
    gpu.fingerprint = [](int rank, int) { return rank == 1 ? 7u : 5u; };
    Sum add;
    Case c = make_case<float>(Collective::all_reduce, n, 2, 64, way, false, &add, 0, 0, way == Way::steps ? find_algorithm(Collective::all_reduce, "ring").generate : nullptr);
    gpu.run([&](HostBlock& block, const device::RankView& view, int) { c.kernel(block, view); });
    int told = 0;
    for (int r = 0; r < n; ++r)
      for (const device::Record& record : gpu.records(r)) {
        INFO("rank " << r << ", way " << static_cast<int>(way));
        if (record.failure == device::Failure::mismatch) {
          CHECK((r == 1) != (record.missing == 1));
          CHECK(record.theirs == (r == 1 ? 5 : 7));
          ++told;
        } else {
          CHECK((record.failure == device::Failure::broken || record.failure == device::Failure::none));  // none: a block of packets that had all it needs
        }
      }
    CHECK(told > 0);
  }
}

TEST_CASE("the host's word ends what waits") {
  constexpr int n = 3;
  EmulatedDevice gpu(n, 2, 1);
  const auto kernel = [&](HostBlock& block, const device::RankView& view, int) { device::run_barrier<true>(block, view); };
  std::thread host([&] {
    std::this_thread::sleep_for(20ms);
    gpu.abort(0);
  });
  gpu.run(kernel, 1, {}, {0, 1});
  host.join();
  CHECK(gpu.records(0)[0].failure == device::Failure::aborted);
  CHECK(gpu.records(1)[0].failure == device::Failure::broken);
}

TEST_CASE("packets need no more room than their plan says") {
  for (const Collective operation : {Collective::all_reduce, Collective::gather, Collective::all_to_all, Collective::scan})
    for (const int n : {2, 5}) {
      const std::vector<Share> shares = shares_of(operation, n, 20, 1);
      for (Rank r = 0; r < n; ++r) {
        const device::PacketPlan plan(shares, r, n, 8, 2);
        std::uint64_t end = 0;
        for (const device::PacketSend& s : plan.sends) end = std::max(end, s.first + (s.count + 1) / 2);
        for (const device::PacketFold& f : plan.folds) end = std::max(end, f.first + (f.count + 1) / 2);
        CHECK(end <= plan.packets);
      }
    }
}
