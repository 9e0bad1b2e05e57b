// SPDX-License-Identifier: Apache-2.0
// The meters of GPUs, against libraries that stand in for the vendors' and a time that only the tests move.
#include <dlfcn.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tally/energy/amdsmi.hpp>
#include <tally/energy/nvml.hpp>
#include <utility>
#include <vector>

#include "fake_gpus.hpp"

using namespace tally;
using Catch::Contains;

namespace {

constexpr std::int64_t second = 1'000'000'000, tick = 100'000'000;
constexpr Nanojoules joule = 1'000'000'000;
constexpr const char* uuid = "GPU-8a1f0000-1111-2222-3333-444455556666";

void set_uuid(FakeGpu& gpu, const std::string& text) {
  for (char& c : gpu.uuid) c = '\0';
  text.copy(gpu.uuid, sizeof gpu.uuid);
}

/// A fake library as new, with GPUs that have names.
struct Fake {
  explicit Fake(const char* path) : library(path), handle(::dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (!handle) FAIL(::dlerror());
    FakeGpus* (*get)() = reinterpret_cast<FakeGpus* (*)()>(::dlsym(handle, "fake_gpus"));
    REQUIRE(get);
    state = get();
    *state = FakeGpus{};
    for (unsigned i = 0; i < 4; ++i) {
      set_uuid(state->gpus[i], uuid);
      state->gpus[i].uuid[4] = static_cast<char>('a' + i);
      state->gpus[i].bus = 0x3b + i;
    }
  }
  ~Fake() { ::dlclose(handle); }
  Fake(const Fake&) = delete;
  Fake& operator=(const Fake&) = delete;

  FakeGpus* operator->() const { return state; }
  FakeGpu& gpu(std::size_t i = 0) const { return state->gpus[i]; }
  MeterClock clock() const {
    return [s = state] { return nanoseconds(s->now); };
  }
  Nvml nvml() const { return Nvml({.library = library, .clock = clock()}); }
  AmdSmi amdsmi() const { return AmdSmi({.library = library, .clock = clock()}); }

  const char* library;
  void* handle;
  FakeGpus* state = nullptr;
};

struct Reading {
  SampleResult result;
  std::vector<MeterSample> samples;
};
template <class M>
Reading read(M& meter) {
  Reading reading;
  reading.samples.resize(meter.domains().size());
  reading.result = meter.sample(reading.samples);
  reading.samples.resize(reading.result.count);
  return reading;
}
/// The last of the readings of domain 0 that are taken every `step` until `duration` has passed.
template <class M>
MeterSample run(const Fake& fake, M& meter, std::int64_t duration, std::int64_t step = second / 2) {
  MeterSample last;
  for (std::int64_t t = 0; t < duration; t += step) {
    fake->now += step;
    const Reading reading = read(meter);
    REQUIRE(reading.samples.size() == meter.domains().size());
    REQUIRE(reading.samples.at(0).total >= last.total);
    last = reading.samples[0];
  }
  return last;
}
template <class M>
std::string all_warnings(const M& meter) {
  std::string text;
  for (const std::string& warning : meter.warnings()) text += warning + "\n";
  return text;
}
Caveats only(Caveat caveat) { return static_cast<Caveats>(caveat); }

}  // namespace

TEST_CASE("A library finds its functions, wherever it was moved, and those of one that is closed stay", "[nvml]") {
  int (*start)() = nullptr;
  int (*none)() = nullptr;
  {
    detail::DynamicLibrary a(FAKE_NVML);
    REQUIRE(a);
    CHECK(a.error().empty());
    detail::DynamicLibrary b = std::move(a);
    CHECK(!a);
    CHECK(!a.find(start, "nvmlInit_v2"));
    CHECK(start == nullptr);
    a = std::move(b);
    CHECK(a.find(start, "nvmlInit_v2"));
    CHECK(!a.need(none, "nvmlNone"));
    CHECK_THAT(a.error(), Contains("fake_nvml.so has no function nvmlNone"));
  }
  CHECK(start() == 0);
}

TEST_CASE("NVML's counter is told in nanojoules since the meter was made", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake->now = 7 * second;
  Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 1);
  const DomainInfo& info = nvml.domains()[0];
  CHECK(info.kind == Domain::gpu_board);
  CHECK(info.key == std::string("gpu-GPU-") + "aa1f0000-1111-2222-3333-444455556666");
  CHECK(info.source == "nvml");
  CHECK(info.tick == nanoseconds(tick));
  CHECK(info.parent == -1);
  CHECK(info.unit_joules == 1e-3);
  CHECK(info.wrap_joules == 0);
  CHECK(info.caveats == 0);
  CHECK(nvml.warnings().empty());

  const MeterSample first = read(nvml).samples.at(0);
  CHECK(first.total == 0);
  CHECK(first.time == nanoseconds(7 * second));
  // 100 W + 10 W/s: at the tick t the counter shows 100 t + 5 t^2 more than at 0; here from t = 7 on.
  fake.gpu().slope = 10;
  fake.gpu().joules_before = 1000 - 5 * 49;
  fake->now = 10 * second + tick / 2;  // between two ticks
  const Reading reading = read(nvml);
  CHECK(reading.result.error == std::errc{});
  CHECK(reading.samples.at(0).total == static_cast<Nanojoules>(300 + 5 * (100 - 49)) * joule);
  CHECK(reading.samples[0].caveats == 0);
}

TEST_CASE("A reading that takes long is dated in its middle", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  fake->latency = 2'400'000;
  fake->now = 4 * second;
  const MeterSample sample = read(nvml).samples.at(0);
  CHECK(sample.time == nanoseconds(4 * second + 1'200'000));
  CHECK(sample.total == 400 * joule);
}

TEST_CASE("NVML is shut down once for each time it was initialised, also when meters are moved", "[nvml]") {
  const Fake fake(FAKE_NVML);
  {
    Nvml a = fake.nvml(), b = fake.nvml();
    CHECK(fake->initialised == 2);
    Nvml c = std::move(a);
    std::vector<AnyMeter> any;
    any.emplace_back(std::move(c));
    CHECK(read(any[0]).samples.size() == 1);
    CHECK(read(a).samples.empty());
    a = std::move(b);
    CHECK(read(a).samples.size() == 1);
    CHECK(fake->initialised == 2);
  }
  CHECK(fake->initialised == 0);
}

TEST_CASE("A library that is missing, none, or fails to start gives no domains and says so", "[nvml]") {
  const Fake fake(FAKE_NVML);
  const auto warning_of = [&](const std::string& library) {
    Nvml nvml({.library = library, .clock = fake.clock()});
    CHECK(nvml.domains().empty());
    CHECK(read(nvml).result.count == 0);
    CHECK(nvml.key_of("0").empty());
    REQUIRE(nvml.warnings().size() == 1);
    return nvml.warnings()[0];
  };
  CHECK_THAT(warning_of("libtally-no-such-library.so.1"), Contains("NVIDIA GPUs are not measured") && Contains("libtally-no-such-library.so.1"));
  CHECK_THAT(warning_of(""), Contains("no library is named"));
  CHECK_THAT(warning_of("/dev/null"), Contains("/dev/null"));
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("fake_amdsmi.so has no function nvmlInit_v2"));
  const std::pair<int, const char*> codes[] = {{9, "the driver is not loaded"}, {4, "no permission"}, {18, "different versions"}, {999, "internal error"}, {-7, "(NVML error -7)"}};
  for (const auto& [code, text] : codes) {
    fake->init_error = code;
    CHECK_THAT(warning_of(FAKE_NVML), Contains(text));
  }
  fake->init_error = 0;
  fake->count_error = 999;
  CHECK_THAT(warning_of(FAKE_NVML), Contains("does not tell how many"));
  fake->count_error = 0;
  fake->claimed = 4294967295;
  CHECK_THAT(warning_of(FAKE_NVML), Contains("claims to have 4294967295"));
  CHECK(fake->initialised == 0);
}

TEST_CASE("Options that make no sense are refused", "[nvml][amdsmi]") {
  CHECK_THROWS_WITH(Nvml({.library = FAKE_NVML, .clock = {}}), Contains("NvmlOptions::clock"));
  CHECK_THROWS_WITH(Nvml({.library = FAKE_NVML, .max_watts = std::nan("")}), Contains("NvmlOptions::max_watts"));
  CHECK_THROWS_WITH(AmdSmi({.library = FAKE_AMDSMI, .clock = {}}), Contains("AmdSmiOptions::clock"));
  CHECK_THROWS_WITH(AmdSmi({.library = FAKE_AMDSMI, .max_watts = -1}), Contains("AmdSmiOptions::max_watts"));
}

TEST_CASE("Boards that cannot be reached or named are left out, and the others keep their numbers", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake->count = 4;
  fake.gpu(0).handle_error = 4;
  fake.gpu(1).uuid_error = 999;  // named by its address
  fake.gpu(2).uuid_error = fake.gpu(2).slot_error = 999;
  Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 2);
  CHECK(nvml.domains()[0].key == "gpu-0000:3c:00.0");
  CHECK_THAT(nvml.domains()[1].key, Contains("gpu-GPU-da1f"));
  CHECK_THAT(all_warnings(nvml), Contains("GPU 0 is not measured: no permission") && Contains("GPU 2 is not measured: NVML tells neither"));
  CHECK(nvml.key_of("0").empty());
  CHECK(nvml.key_of("1") == nvml.domains()[0].key);
  CHECK(nvml.key_of("3") == nvml.domains()[1].key);
  fake->now = second;
  const Reading reading = read(nvml);
  REQUIRE(reading.samples.size() == 2);
  CHECK(reading.samples[1].domain == 1);
  CHECK(reading.samples[1].total == 100 * joule);

  std::vector<MeterSample> room_for_one(1);
  CHECK(nvml.sample(room_for_one).count == 1);
}

TEST_CASE("A UUID that does not end or is no name is not used, and two boards of one name are one", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake->count = 3;
  set_uuid(fake.gpu(0), std::string(128, 'A'));
  set_uuid(fake.gpu(1), "GPU-\x1b[31m\"\xff");
  fake.gpu(2).bus = fake.gpu(1).bus;
  fake.gpu(2).uuid[0] = '\0';
  const Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 2);
  CHECK(nvml.domains()[0].key == "gpu-0000:3b:00.0");
  CHECK(nvml.domains()[1].key == "gpu-0000:3c:00.0");
  CHECK_THAT(all_warnings(nvml), Contains("GPU 2 (0000:3c:00.0) is not measured: another one has the same name"));
}

TEST_CASE("A board is found by number, PCI address and UUID", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake->count = 3;
  fake.gpu(2).domain = 0x1234a;
  set_uuid(fake.gpu(1), "GPU-abcd0000");
  set_uuid(fake.gpu(2), "GPU-abcd0001");
  const Nvml nvml = fake.nvml();
  const std::string zero = nvml.domains()[0].key, one = nvml.domains()[1].key, two = nvml.domains()[2].key;
  for (const char* name : {"2", "1234a:3d:00.0", "0001234A:3D:00.0", "1234a:3d:0", "GPU-abcd0001", "gpu-ABCD0001", "gpu-GPU-abcd0001"}) {
    INFO(name);
    CHECK(nvml.key_of(name) == two);
  }
  CHECK(nvml.key_of("3c:00.0") == one);
  CHECK(nvml.key_of("00000000:3c:00.3") == one);
  CHECK(nvml.key_of("GPU-aa1f") == zero);
  for (const char* name :
       {"", "3", "02", "-1", "99999999999999999999999", "GPU-abcd000", "GPU-", "GPU-abcd0002",
        "1:2:3:4", "3c:", ":3c:00.0", "3c:00.8", "3c:00.", "3c:00.00", "3c:zz.0", "3c:20.0", "13c:00.0", "11111111111111111:3c:00.0"}) {
    INFO(name);
    CHECK(nvml.key_of(name).empty());
  }
}

TEST_CASE("Without an energy counter instant power is integrated", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().energy_error = 3;
  fake.gpu().value_type = GENERATE(1, 3, 4, 5);
  fake.gpu().slope = 10;
  Nvml nvml = fake.nvml();
  CHECK(nvml.domains()[0].accuracy == 0.1);
  CHECK_THAT(all_warnings(nvml), Contains("its power is integrated, because its energy counter cannot be read: not supported"));
  const MeterSample sample = run(fake, nvml, 10 * second);
  // The trapezoid rule is exact for 100 W + 10 W/s: 100 * 10 + 5 * 100.
  CHECK(sample.total == 1500 * joule);
  CHECK(sample.time == nanoseconds(10 * second));
  CHECK(sample.caveats == 0);
}

TEST_CASE("Without instant power the mean of the last second is integrated", "[nvml]") {
  const Fake fake(FAKE_NVML_OLD);  // has neither a counter nor fields
  Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 1);
  CHECK(nvml.domains()[0].tick == nanoseconds(second));
  CHECK(nvml.domains()[0].accuracy == 0.2);
  CHECK_THAT(all_warnings(nvml), Contains("the driver lacks this function"));
  CHECK(run(fake, nvml, 4 * second).total == 400 * joule);
}

TEST_CASE("A board that tells neither energy nor power is no domain", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().energy_error = 4;
  fake.gpu().field_error = fake.gpu().power_error = 3;
  const Nvml nvml = fake.nvml();
  CHECK(nvml.domains().empty());
  CHECK_THAT(all_warnings(nvml), Contains("its energy counter (no permission (NVML error 4)) nor its power (not supported"));
}

TEST_CASE("The counter may be left aside", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().counter_factor = 0.57;
  Nvml nvml({.library = FAKE_NVML, .clock = fake.clock(), .counter = false});
  CHECK(run(fake, nvml, 10 * second).total == 1000 * joule);
  CHECK(nvml.warnings().empty());

  fake.gpu().field_error = fake.gpu().power_error = 3;
  const Nvml without_power({.library = FAKE_NVML, .clock = fake.clock(), .counter = false});
  REQUIRE(without_power.domains().size() == 1);
  CHECK(without_power.domains()[0].unit_joules == 1e-3);
  CHECK_THAT(all_warnings(without_power), Contains("its energy counter is used"));
}

TEST_CASE("A counter that disagrees with integrated power is told as it is, but marked", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().watts = 65.4;
  fake.gpu().counter_factor = 0.57;
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, 4 * second + second / 2).caveats == 0);
  CHECK(nvml.warnings().empty());
  const MeterSample sample = run(fake, nvml, second / 2);
  CHECK(sample.caveats == only(Caveat::implausible));
  CHECK(std::abs(static_cast<double>(sample.total) * 1e-9 - 0.57 * 65.4 * 5) < 0.002);
  REQUIRE(nvml.warnings().size() == 1);
  CHECK_THAT(nvml.warnings()[0], Contains("GPU 0 (GPU-aa1f") && Contains("in 5 s its energy counter told 186 J, its power 327 J"));
  CHECK(run(fake, nvml, 5 * second).caveats == only(Caveat::implausible));
  CHECK(nvml.warnings().size() == 1);
  // It is right again: the mark goes with the first window that agrees.
  fake.gpu().joules_before += 0.57 * 65.4 * 10 - 65.4 * 10;
  fake.gpu().counter_factor = 1;
  CHECK(run(fake, nvml, 4 * second).caveats == only(Caveat::implausible));
  CHECK(run(fake, nvml, second).caveats == 0);
}

TEST_CASE("Counter and power may differ by a fifth and by what readings cannot show", "[nvml]") {
  const Fake fake(FAKE_NVML);
  // Of 500 J in 5 s a fifth is 100 J, and a tick of the counter 10 J.
  const auto caveats_at = [&](double factor) {
    fake->now = 0;
    fake.gpu() = FakeGpu{};
    set_uuid(fake.gpu(), uuid);
    fake.gpu().counter_factor = factor;
    Nvml nvml = fake.nvml();
    return run(fake, nvml, 5 * second).caveats;
  };
  CHECK(caveats_at(0.785) == 0);
  CHECK(caveats_at(0.775) == only(Caveat::implausible));
  CHECK(caveats_at(1.26) == 0);
  CHECK(caveats_at(1.28) == only(Caveat::implausible));

  // Power that jumps between two readings may have been drawn at any time in between.
  fake->now = 0;
  fake.gpu() = FakeGpu{};
  set_uuid(fake.gpu(), uuid);
  Nvml nvml = fake.nvml();
  for (int i = 1; i <= 40; ++i) {  // 100 W, but for the moments in which every other reading is taken
    fake->now = i * second / 2;
    fake.gpu().watts = i % 2 == 0 ? 1000 : 100;
    fake.gpu().raw_counter = 1'000'000 + static_cast<std::uint64_t>(i) * 50'000;
    CHECK(read(nvml).samples.at(0).caveats == 0);
  }
}

TEST_CASE("What one of counter and power has missed is no disagreement", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, second).caveats == 0);
  fake.gpu().joules_before = -500;  // 0 at 5 s
  CHECK(run(fake, nvml, 4 * second, 4 * second).caveats == only(Caveat::counter_reset));
  for (int i = 0; i < 30; ++i) CHECK(run(fake, nvml, second / 2).caveats == 0);
  CHECK(run(fake, nvml, 6 * second, 6 * second).caveats == 0);  // too long for power to be integrated
  for (int i = 0; i < 30; ++i) CHECK(run(fake, nvml, second / 2).caveats == 0);
  CHECK(run(fake, nvml, second).total == (100 + 1500 + 600 + 1500 + 100) * joule);
}

TEST_CASE("A counter that was reset keeps its total and goes on", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, 2 * second).total == 200 * joule);
  fake.gpu().joules_before = -200;  // 0 at 2 s
  fake->now += second;
  const Reading reset = read(nvml);
  CHECK(reset.samples.at(0).caveats == only(Caveat::counter_reset));
  CHECK(reset.samples[0].total == 200 * joule);
  CHECK(reset.result.error == std::errc{});
  CHECK_THAT(all_warnings(nvml), Contains("was reset"));
  fake->now += second;
  const MeterSample next = read(nvml).samples.at(0);
  CHECK(next.total == 300 * joule);
  CHECK(next.caveats == 0);
}

TEST_CASE("A counter that jumps by more than a board draws is not believed", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, second).total == 100 * joule);
  fake.gpu().raw_counter = std::numeric_limits<std::uint64_t>::max();
  CHECK(run(fake, nvml, second / 2).caveats == only(Caveat::counter_reset));
  fake.gpu().raw_counter = 0;
  CHECK(run(fake, nvml, second / 2).caveats == only(Caveat::counter_reset));  // back down
  const MeterSample sample = run(fake, nvml, second);
  CHECK(sample.total == 200 * joule);
  CHECK(sample.caveats == 0);
}

TEST_CASE("A reading that fails says why and keeps the total, and the next one has what came meanwhile", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, second).total == 100 * joule);
  struct Case {
    int code;
    Caveat caveat;
    std::errc error;
    const char* text;
  };
  const Case cases[] = {{15, Caveat::vanished, std::errc::no_such_device, "the GPU is lost"},
                        {16, Caveat::vanished, std::errc::no_such_device, "the GPU must be reset"},
                        {9, Caveat::vanished, std::errc::no_such_device, "the driver is not loaded"},
                        {4, Caveat::permission_denied, std::errc::permission_denied, "no permission"},
                        {17, Caveat::permission_denied, std::errc::permission_denied, "blocked by the operating system"},
                        {3, Caveat::unreadable, std::errc::io_error, "not supported"},
                        {999, Caveat::unreadable, std::errc::io_error, "internal error"}};
  for (const Case& c : cases) {
    INFO(c.text);
    fake.gpu().energy_error = c.code;
    fake->now += second / 2;
    const Nanojoules before = read(nvml).samples.at(0).total;
    fake->now += second / 2;
    const Reading reading = read(nvml);
    REQUIRE(reading.samples.size() == 1);
    CHECK(reading.samples[0].caveats == only(c.caveat));
    CHECK(reading.samples[0].total == before);
    CHECK(reading.samples[0].time == nanoseconds(fake->now));
    CHECK(reading.result.error == c.error);
    CHECK_THAT(nvml.warnings().back(), Contains("GPU 0 (GPU-aa1f") && Contains(c.text));
    fake.gpu().energy_error = 0;
    CHECK(run(fake, nvml, second).total == before + 200 * joule);
  }
  CHECK(nvml.warnings().size() == std::size(cases));
}

TEST_CASE("A counter that stands still is stale after two seconds", "[nvml]") {
  const Fake fake(FAKE_NVML);
  Nvml nvml = fake.nvml();
  fake.gpu().raw_counter = 1'000'000;  // what it showed at the beginning
  CHECK(run(fake, nvml, second + second / 2).caveats == 0);
  CHECK(run(fake, nvml, second / 2).caveats == only(Caveat::stale));
  CHECK_THAT(all_warnings(nvml), Contains("stood still for 2 s"));
  CHECK(run(fake, nvml, 3 * second).caveats == (Caveat::stale | Caveat::implausible));  // for power is drawn
  fake.gpu().raw_counter = 1'000'001;
  CHECK(!has(run(fake, nvml, second / 2).caveats, Caveat::stale));
}

TEST_CASE("Power that is no number, negative or more than a board draws is not integrated", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().energy_error = 3;
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, second).total == 100 * joule);
  const auto next = [&](int type, double milliwatts) {
    fake.gpu().value_type = type;
    fake.gpu().raw_power = milliwatts;
    const MeterSample sample = run(fake, nvml, second / 2);
    CHECK(sample.total == 100 * joule);
    return sample.caveats;
  };
  CHECK(next(0, std::nan("")) == only(Caveat::unreadable));
  CHECK(next(0, -5) == only(Caveat::unreadable));
  CHECK(next(77, 0) == only(Caveat::unreadable));
  CHECK_THAT(nvml.warnings().back(), Contains("NVML tells no number"));
  CHECK(next(0, std::numeric_limits<double>::infinity()) == only(Caveat::counter_reset));
  CHECK(next(0, 4294967295.0) == only(Caveat::counter_reset));
  CHECK_THAT(nvml.warnings().back(), Contains("more power than a board can draw"));
  // A new beginning: what was drawn since is not known.
  fake.gpu().value_type = 1;
  CHECK(run(fake, nvml, second / 2).total == 100 * joule);
  CHECK(run(fake, nvml, second).total == 200 * joule);
}

TEST_CASE("A gap in which nobody read the power is left out", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().energy_error = 3;
  Nvml nvml = fake.nvml();
  CHECK(run(fake, nvml, 5 * second, 5 * second).total == 500 * joule);
  const MeterSample sample = run(fake, nvml, 6 * second, 6 * second);
  CHECK(sample.total == 500 * joule);
  CHECK(sample.caveats == only(Caveat::stale));
  CHECK_THAT(all_warnings(nvml), Contains("was not read for more than 5 s"));
}

TEST_CASE("A board that is divided into instances is shared", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().mig = 1;
  fake.gpu().mig_error = 0;
  const Nvml nvml = fake.nvml();
  CHECK(nvml.domains()[0].caveats == only(Caveat::shared_device));
  CHECK_THAT(all_warnings(nvml), Contains("(MIG)"));
}

TEST_CASE("Of a superchip the GPU's power is integrated, because its counter has the CPU too", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().module_watts = 350;
  fake.gpu().counter_factor = 3.5;
  Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 1);
  CHECK(nvml.domains()[0].kind == Domain::gpu_board);
  CHECK_THAT(all_warnings(nvml), Contains("includes its CPU"));
  const MeterSample sample = run(fake, nvml, 10 * second);
  CHECK(sample.total == 1000 * joule);
  CHECK(sample.caveats == 0);
}

TEST_CASE("Where only the module is told the domain is a module", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().module_watts = 350;
  fake.gpu().counter_factor = 3.5;
  fake.gpu().field_error = 3;
  Nvml nvml = fake.nvml();
  REQUIRE(nvml.domains().size() == 1);
  CHECK(nvml.domains()[0].kind == Domain::gpu_module);
  CHECK_THAT(all_warnings(nvml), Contains("do not add it to that of CPUs"));
  const MeterSample sample = run(fake, nvml, 10 * second);
  CHECK(sample.total == 3500 * joule);
  CHECK(sample.caveats == 0);  // the counter agrees with the module's power
}

TEST_CASE("A driver that tells the same power for GPU and module is not that of a superchip", "[nvml]") {
  const Fake fake(FAKE_NVML);
  fake.gpu().module_watts = fake.gpu().watts;
  const Nvml nvml = fake.nvml();
  CHECK(nvml.domains()[0].unit_joules == 1e-3);
  CHECK(nvml.warnings().empty());
}

TEST_CASE("A clock that throws costs a reading and nothing else", "[nvml][amdsmi]") {
  bool broken = false;
  const auto check = [&](auto meter, const Fake& fake) {
    fake->now = second;
    broken = true;
    const Reading reading = read(meter);
    CHECK(reading.samples.empty());
    CHECK(reading.result.error == std::errc::not_enough_memory);
    broken = false;
    CHECK(read(meter).samples.at(0).total > 99 * joule);
  };
  const auto clock_of = [&](const Fake& fake) {
    return [&broken, now = &fake->now] {
      if (broken) throw std::bad_alloc();
      return nanoseconds(*now);
    };
  };
  const Fake nvml(FAKE_NVML), amdsmi(FAKE_AMDSMI);
  check(Nvml({.library = FAKE_NVML, .clock = clock_of(nvml)}), nvml);
  check(AmdSmi({.library = FAKE_AMDSMI, .clock = clock_of(amdsmi)}), amdsmi);
}

TEST_CASE("AMD's accumulator is multiplied by its resolution", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  fake.gpu().resolution = 16.0f;  // a tick of 10 J is 625000 steps
  fake->now = 3 * second;
  AmdSmi amdsmi = fake.amdsmi();
  CHECK(all_warnings(amdsmi).empty());
  REQUIRE(amdsmi.domains().size() == 1);
  const DomainInfo& info = amdsmi.domains()[0];
  CHECK(info.kind == Domain::gpu_board);
  CHECK(info.key == "gpu-0000:3b:00.0");
  CHECK(info.source == "amdsmi");
  CHECK(info.unit_joules == 16e-6);
  CHECK(read(amdsmi).samples.at(0).total == 0);
  fake->latency = 1000;
  fake->now = 13 * second + tick / 2;
  const MeterSample sample = read(amdsmi).samples.at(0);
  CHECK(sample.total == 1000 * joule);
  CHECK(sample.time == nanoseconds(13 * second + tick / 2 + 500));
  CHECK(sample.caveats == 0);

  fake.gpu().resolution = 15.3f;
  CHECK(read(amdsmi).samples.at(0).caveats == only(Caveat::unreadable));
  fake.gpu().resolution = 16.0f;
  fake->now = 14 * second;
  CHECK(read(amdsmi).samples.at(0).total == 1100 * joule);
}

TEST_CASE("AMD's GPUs are those of all sockets, found by number, PCI address and UUID", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  fake->count = 2;
  fake->per_socket = 2;
  fake.gpu(1).type = 2;  // the CPU of an APU
  fake.gpu(2).domain = 0x10001;
  fake.gpu(3).slot_error = 1;
  for (std::size_t i = 0; i < 4; ++i) {
    set_uuid(fake.gpu(i), "?eff74a1-0000-1000-8000-000000000000");
    fake.gpu(i).uuid[0] = static_cast<char>('a' + i);
  }
  AmdSmi amdsmi = fake.amdsmi();
  CHECK(all_warnings(amdsmi).empty());
  REQUIRE(amdsmi.domains().size() == 3);
  CHECK(amdsmi.domains()[1].key == "gpu-10001:3d:00.0");
  CHECK(amdsmi.domains()[2].key == "gpu-deff74a1-0000-1000-8000-000000000000");
  CHECK(amdsmi.key_of("0") == "gpu-0000:3b:00.0");
  CHECK(amdsmi.key_of("1") == amdsmi.domains()[1].key);
  CHECK(amdsmi.key_of("0000:3B:00.0") == "gpu-0000:3b:00.0");
  CHECK(amdsmi.key_of("ceff74a1") == amdsmi.domains()[1].key);
  CHECK(amdsmi.key_of("3").empty());
  CHECK(read(amdsmi).samples.size() == 3);
}

TEST_CASE("Partitions of one AMD board are one domain, and a second die has none", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  fake->per_socket = 4;
  for (unsigned i = 0; i < 3; ++i) fake.gpu(i).bus = 0x3b, fake.gpu(i).function = i;
  fake.gpu(3).joules_before = fake.gpu(3).watts = 0;
  const AmdSmi amdsmi = fake.amdsmi();
  REQUIRE(amdsmi.domains().size() == 1);
  CHECK(amdsmi.domains()[0].caveats == only(Caveat::shared_device));
  CHECK(amdsmi.key_of("2") == amdsmi.domains()[0].key);
  CHECK(amdsmi.key_of("3").empty());
  REQUIRE(amdsmi.warnings().size() == 2);
  CHECK_THAT(amdsmi.warnings()[0], Contains("AMD GPU 1 (0000:3b:00.0) is a partition"));
  CHECK_THAT(amdsmi.warnings()[1], Contains("AMD GPU 3 (0000:3e:00.0) is not measured: its energy counter is 0"));
}

TEST_CASE("AMD's library is never shut down, because it does not count who uses it", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  { const AmdSmi one = fake.amdsmi(), other = fake.amdsmi(); }
  CHECK(fake->initialised == 1);
}

TEST_CASE("An AMD library that is missing, none, or lies gives no domains and says so", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  const auto warning_of = [&](const std::string& library) {
    AmdSmi amdsmi({.library = library, .clock = fake.clock()});
    CHECK(amdsmi.domains().empty());
    CHECK(read(amdsmi).result.count == 0);
    REQUIRE(amdsmi.warnings().size() == 1);
    return amdsmi.warnings()[0];
  };
  CHECK_THAT(warning_of("libtally-no-such-library.so"), Contains("AMD GPUs are not measured: libtally-no-such-library.so"));
  CHECK_THAT(warning_of(FAKE_NVML), Contains("has no function amdsmi_init"));
  fake->init_error = 34;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("the driver is not loaded"));
  fake->init_error = 0;
  fake->claimed = 4294967295;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("AMD SMI claims to have 4294967295 sockets"));
  fake->claimed = 0;
  fake->count_error = 10;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("AMD SMI does not tell its sockets: no permission"));
  fake->count_error = 0;
  fake->per_socket = 4294967295;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("AMD SMI claims to have 4294967295 GPUs"));
  fake->per_socket = 1;
  fake.gpu().energy_error = 2;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("not supported, as in virtual machines"));
  fake.gpu().energy_error = 0;
  for (const float resolution : {0.0f, -15.3f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    fake.gpu().resolution = resolution;
    fake.gpu().raw_counter = 1;
    CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("holds no number"));
  }
  fake.gpu().resolution = 15.3f;
  fake.gpu().raw_counter = std::numeric_limits<std::uint64_t>::max();
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("holds no number"));
  fake.gpu().raw_counter = 0;
  fake.gpu().slot_error = fake.gpu().uuid_error = 1;
  CHECK_THAT(warning_of(FAKE_AMDSMI), Contains("tells neither its PCI address nor its UUID"));
}

TEST_CASE("AMD's counter that is reset, stands still or cannot be read keeps its total", "[amdsmi]") {
  const Fake fake(FAKE_AMDSMI);
  fake.gpu().resolution = 16.0f;
  AmdSmi amdsmi = fake.amdsmi();
  CHECK(run(fake, amdsmi, 2 * second).total == 200 * joule);
  fake.gpu().joules_before = -200;
  MeterSample sample = run(fake, amdsmi, second);
  CHECK(sample.total == 250 * joule);  // half a second is lost
  fake.gpu().raw_counter = static_cast<std::uint64_t>(100e6 / 16);
  CHECK(run(fake, amdsmi, second + second / 2).caveats == 0);
  sample = run(fake, amdsmi, second / 2);
  CHECK(sample.caveats == only(Caveat::stale));
  CHECK(sample.total == 250 * joule);
  fake.gpu().raw_counter = std::numeric_limits<std::uint64_t>::max();
  CHECK(run(fake, amdsmi, second / 2).caveats == only(Caveat::unreadable));
  fake.gpu().raw_counter = 0;
  const std::pair<int, Caveat> codes[] = {{10, Caveat::permission_denied}, {31, Caveat::vanished}, {34, Caveat::vanished}, {12, Caveat::unreadable}, {30, Caveat::unreadable}};
  for (const auto& [code, caveat] : codes) {
    fake.gpu().energy_error = code;
    fake->now += second;
    const Reading reading = read(amdsmi);
    CHECK(reading.samples.at(0).caveats == only(caveat));
    CHECK(reading.samples[0].total == 250 * joule);
    CHECK(reading.result.error != std::errc{});
  }
  fake.gpu().energy_error = 0;
  // The counter is now 7.5 s further than when it was last read well: at 3 s it showed 100 J.
  fake->now = 11 * second;
  CHECK(read(amdsmi).samples.at(0).total == (250 + 800) * joule);
  CHECK_THAT(all_warnings(amdsmi), Contains("was reset") && Contains("stood still for 2 s") && Contains("no permission") && Contains("the driver is not loaded"));
}
