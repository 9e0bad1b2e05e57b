// SPDX-License-Identifier: Apache-2.0
// The meters of processors, on hosts that are made up of files: every shape of host, and every way in which a counter fails.
#include <catch2/catch.hpp>

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <tally/energy/meters.hpp>

#include "host_tree.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::HostTree;
using test::Unprivileged;

namespace {

constexpr std::uint64_t intel_range = 262143328850, old_range = 262143999938, dram_range = 65712999613, amd_range = 65532610987;
const std::string zones = "sys/class/powercap/", pmu = "sys/bus/event_source/devices/power/", pmu_cores = "sys/bus/event_source/devices/power_core/";

/// A clock that stands still until told otherwise.
struct HandClock {
  std::shared_ptr<nanoseconds> now = std::make_shared<nanoseconds>(1000s);
  MeterClock meter_clock() const {
    return [now = now] { return *now; };
  }
  void pass(nanoseconds time) { *now += time; }
};

template <class Meter>
std::vector<MeterSample> sample(Meter& meter) {
  std::vector<MeterSample> samples(meter.domains().size());
  samples.resize(meter.sample(samples).count);
  return samples;
}
template <class Meter>
std::vector<std::string> keys(const Meter& meter) {
  std::vector<std::string> keys;
  for (const DomainInfo& domain : meter.domains()) keys.push_back(domain.key);
  return keys;
}
template <class Meter>
DomainInfo domain(const Meter& meter, std::string_view key) {
  for (const DomainInfo& domain : meter.domains())
    if (domain.key == key) return domain;
  FAIL("there is no domain " << key);
  return {};
}
template <class Meter>
std::string parent(const Meter& meter, std::string_view key) {
  const int index = domain(meter, key).parent;
  return index < 0 ? "" : meter.domains()[static_cast<std::size_t>(index)].key;
}
/// The reading of one domain.
template <class Meter>
MeterSample read(Meter& meter, std::string_view key) {
  for (const MeterSample& reading : sample(meter))
    if (meter.domains()[reading.domain].key == key) return reading;
  FAIL("there is no reading of " << key);
  return {};
}
template <class Meter>
std::string warnings(const Meter& meter) {
  std::string all;
  for (const std::string& text : meter.warnings()) all += text + "\n";
  return all;
}
using Catch::Contains;
using Keys = std::vector<std::string>;
constexpr Caveats none = 0;
constexpr Caveats only(Caveat caveat) { return static_cast<Caveats>(caveat); }

/// Accounting, tree A: an Intel server. Zones are numbered at will: intel-rapl:1 is package 0.
void intel_server(HostTree& host) {
  host.write(zones + "intel-rapl/enabled", 1);
  host.zone("intel-rapl:0", "package-1", 1'000'000, intel_range);
  host.zone("intel-rapl:0:0", "dram", 2'000'000, dram_range);
  host.zone("intel-rapl:1", "package-0", 240422366267, intel_range);
  host.zone("intel-rapl:1:0", "dram", 4'000'000, dram_range);
  host.zone("intel-rapl:1:1", "core", 5'000'000, intel_range);
  host.zone("intel-rapl:1:2", "uncore", 6'000'000, intel_range);
  host.zone("intel-rapl:2", "psys", 7'000'000, 4294967295000000);
  host.zone("intel-rapl:3", "package-0-die-1", 8'000'000, intel_range);
  host.zone("intel-rapl-mmio:0", "package-0", 240422366267, intel_range);
  host.write(zones + "intel-rapl:0/constraint_0_name", "long_term");
  host.write(zones + "intel-rapl:0/constraint_0_power_limit_uw", 205000000);
}
const Keys intel_keys = {"package-1", "package-1/dram", "package-0", "package-0/dram", "package-0/core", "psys", "package-0-die-1"};

void one_package(HostTree& host, std::uint64_t microjoules = 0) { host.zone("intel-rapl:0", "package-0", microjoules, intel_range); }
void set_energy(HostTree& host, std::uint64_t microjoules, const std::string& zone = "intel-rapl:0") { host.write(zones + zone + "/energy_uj", microjoules); }

/// A kernel with the power PMU: descriptors are files in memory that a test can write.
struct FakePerf {
  struct Event {
    perf_event_attr attributes;
    pid_t process;
    int cpu, group;
    unsigned long flags;
    int fd;
  };
  std::shared_ptr<std::vector<Event>> opened = std::make_shared<std::vector<Event>>();
  int refuse = 0;

  PerfOpen open_fn() const {
    return [opened = opened, refuse = refuse](const perf_event_attr& attributes, pid_t process, int cpu, int group, unsigned long flags) {
      if (refuse != 0) return errno = refuse, -1;
      const int fd = ::memfd_create("count", MFD_CLOEXEC);
      opened->push_back({attributes, process, cpu, group, flags, fd});
      write(fd, 0);
      return fd;
    };
  }
  static void write(int fd, std::uint64_t count) { REQUIRE(::pwrite(fd, &count, sizeof count, 0) == sizeof count); }
  void set(std::uint64_t config, int cpu, std::uint64_t count) const {
    for (const Event& event : *opened)
      if (event.attributes.config == config && event.cpu == cpu) return write(event.fd, count);
    FAIL("no event " << config << " of cpu " << cpu);
  }
};
void perf_event(HostTree& host, const std::string& directory, const std::string& name, const std::string& event) {
  host.write(directory + "events/" + name, event);
  host.write(directory + "events/" + name + ".unit", "Joules");
  host.write(directory + "events/" + name + ".scale", "2.3283064365386962890625e-10");
}
void perf_host(HostTree& host, const std::string& cpumask = "0,48") {
  host.write(pmu + "type", 24);
  host.write(pmu + "cpumask", cpumask);
  host.write(pmu + "format/event", "config:0-7");
  perf_event(host, pmu, "energy-pkg", "event=0x02");
  host.cpu(0, 0, 0, 0);
  host.cpu(48, 1, 0, 0);
  host.write("proc/sys/kernel/perf_event_paranoid", 2);
}
constexpr std::uint64_t joule = std::uint64_t{1} << 32;  // counts of perf

}  // namespace

// --- files ---

TEST_CASE("a number is digits and nothing else") {
  using detail::parse_natural;
  CHECK(parse_natural("0") == 0u);
  CHECK(parse_natural("18446744073709551615") == std::numeric_limits<std::uint64_t>::max());
  for (const char* text : {"", " ", "-1", "+1", " 1", "1 ", "1 2", "abc", "0x10", "1.5", "1e3", "18446744073709551616", "99999999999999999999999", "\xff"}) CHECK_FALSE(parse_natural(text));
  CHECK_FALSE(parse_natural(std::string_view("1\0", 2)));
}

TEST_CASE("what is no small readable file is an error that tells why, and never blocks") {
  HostTree host;
  host.write("number", 42);
  host.write_raw("empty", "");
  host.write_raw("binary", std::string("\0\xff\x80 42", 6));
  host.write_raw("huge", std::string(1 << 20, '7'));
  host.directory("directory");
  host.fifo("fifo");
  host.link("loop", "loop");
  host.broken("broken");
  host.write("secret", 7);
  host.mode("secret", 0);
  const std::size_t before = test::open_descriptors();
  const auto error = [&](const char* name) { return detail::read_natural(host.path(name)).error; };
  CHECK(error("number") == 0);
  CHECK(detail::read_natural(host.path("number")).value == 42);
  CHECK(error("empty") == EBADMSG);
  CHECK(error("binary") == EBADMSG);
  CHECK(error("huge") == EFBIG);
  CHECK(error("directory") == EISDIR);
  CHECK(error("fifo") == ENOTSUP);
  CHECK(error("loop") == ELOOP);
  CHECK(error("broken") == EIO);
  CHECK(error("missing") == ENOENT);
  CHECK(error("number/inside") == ENOTDIR);
  {
    const Unprivileged plain;
    CHECK(error("secret") == EACCES);
  }
  CHECK(detail::read_file(host.path("huge"), 1 << 20).text.size() == 1 << 20);
  CHECK(detail::read_start(host.path("huge"), 10).text == "7777777777");
  CHECK(detail::names_in(host.path("fifo")).empty());
  CHECK(detail::names_in(host.path(""), 3).size() == 3);
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("a text from a file is shown short and printable") {
  CHECK(detail::quoted("ok") == "'ok'");
  CHECK(detail::quoted("a\nb\xff\x1b") == "'a?b?" "?'");
  CHECK(detail::quoted(std::string(100, 'x')) == "'" + std::string(40, 'x') + "...'");
}

TEST_CASE("a root may end with a slash or not") {
  CHECK(detail::below("", "sys/x") == "/sys/x");
  CHECK(detail::below("/", "sys/x") == "/sys/x");
  CHECK(detail::below("/tmp/host//", "sys/x") == "/tmp/host/sys/x");
}

TEST_CASE("a guest is known by its processor's flag, a whole word") {
  using detail::has_cpu_flag;
  CHECK(has_cpu_flag("flags\t\t: fpu hypervisor sgx\n", "hypervisor"));
  CHECK(has_cpu_flag("processor : 0\nflags : sgx", "sgx"));
  CHECK_FALSE(has_cpu_flag("flags : sgx_lc hypervisors\n", "sgx"));
  CHECK_FALSE(has_cpu_flag("flags : sgx_lc hypervisors\n", "hypervisor"));
  for (const char* text : {"", "flags", "flags:", "flags :", "flagshypervisor", "bugs : hypervisor\n", "\n\n\n"}) CHECK_FALSE(has_cpu_flag(text, "hypervisor"));
}

TEST_CASE("the filter of a processor with SGX is a caveat, unless its register says that it is off") {
  HostTree host;
  host.cpuinfo("fpu sgx sgx_lc");
  CHECK(detail::host_caveats(host.root()) == only(Caveat::filtered));
  host.write_raw("dev/cpu/0/msr", std::string(0xbc + 8, '\0'));
  CHECK(detail::host_caveats(host.root()) == none);
  host.cpuinfo("fpu hypervisor");
  host.write_raw("dev/cpu/0/msr", std::string(0xbc, '\0') + "\x01" + std::string(7, '\0'));
  CHECK(detail::host_caveats(host.root()) == (Caveat::filtered | Caveat::virtualised));
  host.write_raw("dev/cpu/0/msr", std::string(0xbc, '\0') + "\x01");  // cut off
  CHECK(detail::host_caveats(host.root()) == only(Caveat::virtualised));
}

// --- what meters share ---

TEST_CASE("I10: an unwrapped counter grows through no wrap and one") {
  Unwrapped counter(1000, 2.0, 4e-6);  // units of 2 nJ, up to 4 uW: 200 units in the tenth of a second that it may be late
  CHECK(counter.add(900, 0s) == none);
  CHECK(counter.total() == 0);
  CHECK(counter.add(990, 1ns) == none);
  CHECK(counter.total() == 180);
  CHECK(counter.add(10, 2ns) == only(Caveat::wrap));
  CHECK(counter.total() == 220);
}

TEST_CASE("I10: an interval in which a counter may have wrapped twice is marked") {
  Unwrapped counter(1'000'000'000, 1000, 1000);  // wraps at 1000 J, at 1 kW every second
  CHECK(counter.add(0, 0s) == none);
  CHECK(counter.add(100'000'000, 399ms) == none);
  CHECK(counter.add(200'000'000, 900ms) == only(Caveat::wrap_ambiguous));
  CHECK(counter.add(100'000'000, 1900ms) == (Caveat::wrap | Caveat::wrap_ambiguous));
  CHECK(counter.total() == 1'100'000'000'000);
}

TEST_CASE("a counter that is reset or jumps counts nothing for that interval") {
  Unwrapped reset(0, 1, 1000);
  CHECK(reset.add(5000, 0s) == none);
  CHECK(reset.add(6000, 1s) == none);
  CHECK(reset.add(10, 2s) == only(Caveat::counter_reset));
  CHECK(reset.total() == 1000);
  CHECK(reset.add(20, 3s) == none);
  CHECK(reset.total() == 1010);
  Unwrapped beyond(100, 1, 1000);
  CHECK(beyond.add(150, 0s) == none);  // above its own modulus
  CHECK(beyond.add(1, 1s) == only(Caveat::counter_reset));
  CHECK(beyond.total() == 0);
}

TEST_CASE("a total that does not fit stays at its highest") {
  Unwrapped counter(0, 1e9, 0);  // no bound of plausibility
  counter.add(0, 0s);
  counter.add(std::numeric_limits<std::uint64_t>::max() - 1, 1s);
  CHECK(counter.total() == std::numeric_limits<std::uint64_t>::max());
  counter.add(0, 2s);
  counter.add(std::numeric_limits<std::uint64_t>::max(), 3s);
  CHECK(counter.total() == std::numeric_limits<std::uint64_t>::max());
  IntegratedPower power(1e12, nanoseconds::max());
  power.add(1e12, 0s);
  power.add(1e12, 100s);
  CHECK(power.total() == std::numeric_limits<std::uint64_t>::max());
}

TEST_CASE("power is integrated by the trapezoid rule, and neither nonsense nor a long gap counts") {
  IntegratedPower power(1000, 10s);
  CHECK(power.add(100, 0s) == none);
  CHECK(power.add(300, 2s) == none);
  CHECK(power.total() == 400'000'000'000);
  CHECK(power.add(300, 1s) == none);  // a clock that goes back counts nothing twice
  CHECK(power.add(300, 2s) == none);
  CHECK(power.total() == 400'000'000'000);
  for (const double nonsense : {-1.0, 1001.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) CHECK(power.add(nonsense, 3s) == only(Caveat::counter_reset));
  CHECK(power.add(300, 4s) == none);  // begins anew
  CHECK(power.total() == 400'000'000'000);
  CHECK(power.add(300, 14s) == none);
  CHECK(power.total() == 3'400'000'000'000);
  CHECK(power.add(300, 25s) == only(Caveat::stale));
  CHECK(power.total() == 3'400'000'000'000);
}

// --- powercap ---

TEST_CASE("powercap: an Intel server, its zones side by side") {
  HostTree host;
  intel_server(host);
  const Powercap meter({host.root()});
  CHECK(keys(meter) == intel_keys);
  CHECK(warnings(meter) == "");
  const std::map<std::string, Domain> kinds = {{"package-0", Domain::cpu_package}, {"package-0/dram", Domain::dram}, {"package-0/core", Domain::cpu_core}, {"psys", Domain::psys}};
  for (const auto& [key, kind] : kinds) CHECK(domain(meter, key).kind == kind);
  // Memory is beside the package, psys around everything: neither has a parent.
  for (const std::string& key : intel_keys) CHECK(parent(meter, key) == (key == "package-0/core" ? "package-0" : ""));
  for (const DomainInfo& domain : meter.domains()) {
    CHECK(domain.source == "powercap");
    CHECK(domain.tick == 1ms);
    CHECK(domain.caveats == none);
  }
  CHECK(domain(meter, "package-0").unit_joules == Approx(61.035e-6).epsilon(1e-9));
  CHECK(domain(meter, "package-0").wrap_joules == Approx(262143.328911).epsilon(1e-12));
  CHECK(domain(meter, "package-0/dram").unit_joules == Approx(15.3e-6).epsilon(1e-9));
  CHECK(domain(meter, "psys").unit_joules == Approx(1.0).epsilon(1e-9));
}

TEST_CASE("powercap: zones may lie in each other, and links may lead in circles") {
  HostTree host;
  const std::string nested = "intel-rapl/intel-rapl:0/";
  host.zone("intel-rapl/intel-rapl:0", "package-0", 10, intel_range);
  host.zone(nested + "intel-rapl:0:0", "core", 20, intel_range);
  host.link(zones + nested + "intel-rapl:0:1", ".");                                      // back to its own parent
  host.link(zones + nested + "intel-rapl:7", "../..");                                    // not a part of zone 0
  host.link(zones + "intel-rapl/subsystem", "..");
  host.link(zones + "intel-rapl:0", "intel-rapl/intel-rapl:0");                           // and flat as well
  host.link(zones + "intel-rapl:0:0", "intel-rapl/intel-rapl:0/intel-rapl:0:0");
  host.link(zones + "intel-rapl:5", "intel-rapl:5");
  Powercap meter({host.root()});
  CHECK(keys(meter) == Keys{"package-0", "package-0/core"});
  CHECK(parent(meter, "package-0/core") == "package-0");
  CHECK(sample(meter).size() == 2);
  CHECK(meter.warnings().size() == 2);
  CHECK_THAT(warnings(meter), Contains("intel-rapl:5/name cannot be read: Too many levels of symbolic links; the zone is left out.") && Contains("intel-rapl:0:1 is called 'package-0', as another zone"));
}

TEST_CASE("powercap: packages are parts of psys where their zones are") {
  HostTree host;
  host.zone("intel-rapl:0", "psys", 10, intel_range);
  host.zone("intel-rapl:0:0", "package-0", 20, intel_range);
  host.zone("intel-rapl:0:0:0", "core", 30, intel_range);
  const Powercap meter({host.root()});
  CHECK(parent(meter, "psys") == "");
  CHECK(parent(meter, "package-0") == "psys");
  CHECK(parent(meter, "package-0/core") == "package-0");
  CHECK(whole_machine(domain(meter, "psys").kind));
}

TEST_CASE("powercap: AMD has packages and cores, and a register that wraps sooner") {
  HostTree host;
  host.zone("intel-rapl:0", "package-0", 65532610000, amd_range);
  host.zone("intel-rapl:0:0", "core", 10, amd_range);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  CHECK(keys(meter) == Keys{"package-0", "package-0/core"});
  CHECK(domain(meter, "package-0").unit_joules == Approx(15.258e-6).epsilon(1e-9));
  clock.pass(1s);
  set_energy(host, 10);
  const MeterSample reading = read(meter, "package-0");
  CHECK(reading.caveats == only(Caveat::wrap));
  CHECK(reading.total == (987 + 15 + 10) * 1000);  // up to the range, one unit of 15 uJ, and from 0 on
}

TEST_CASE("powercap: the counter of mmio stands in where the first cannot be read") {
  HostTree host;
  host.zone("intel-rapl:0", "package-0", 10, intel_range);
  host.zone("intel-rapl-mmio:0", "package-0", 20, intel_range);
  host.write(zones + "intel-rapl:0/energy_uj", "abc");
  Powercap meter({host.root()});
  CHECK(keys(meter) == Keys{"package-0"});
  host.write(zones + "intel-rapl-mmio:0/energy_uj", 1020);
  CHECK(read(meter, "package-0").total == 1'000'000);
}

TEST_CASE("powercap: two zones of one name are one domain and a warning") {
  HostTree host;
  host.zone("intel-rapl:0", "package-0", 10, intel_range);
  host.zone("intel-rapl:1", "package-0", 20, intel_range);
  const Powercap meter({host.root()});
  CHECK(keys(meter) == Keys{"package-0"});
  CHECK_THAT(warnings(meter), Contains("intel-rapl:1 is called 'package-0', as another zone of intel-rapl is"));
}

TEST_CASE("powercap: a host without zones has no domains and nothing to complain of") {
  HostTree host;
  Powercap nothing({host.root()});
  host.directory(zones);
  Powercap empty({host.root()});
  for (Powercap* meter : {&nothing, &empty}) {
    CHECK(meter->domains().empty());
    CHECK(meter->warnings().empty());
    CHECK(meter->sample({}).count == 0);
  }
}

TEST_CASE("powercap: what others measure is left out, with its parts but not the memory beside it") {
  HostTree host;
  intel_server(host);
  CHECK(keys(Powercap({host.root(), monotonic_time, {"package-0", "psys"}})) == Keys{"package-1", "package-1/dram", "package-0/dram", "package-0-die-1"});
}

TEST_CASE("I10: powercap's totals grow through no wrap and one, each zone by its own range") {
  HostTree host;
  const std::uint64_t range = GENERATE(intel_range, old_range);  // of the same processor, by the kernel's age
  const std::uint64_t last = range - 100;
  host.zone("intel-rapl:0", "package-0", last - 50, range);
  host.zone("intel-rapl:0:0", "dram", dram_range - 1000, dram_range);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  CHECK(read(meter, "package-0").total == 0);
  CHECK(read(meter, "package-0").caveats == none);
  clock.pass(1s);
  set_energy(host, last);
  CHECK(read(meter, "package-0").total == 50'000);
  clock.pass(1s);
  set_energy(host, 200);
  set_energy(host, 77, "intel-rapl:0:0");
  const auto readings = sample(meter);
  CHECK(readings[0].total == (50 + 100 + 61 + 200) * 1000);
  CHECK(readings[0].caveats == only(Caveat::wrap));
  CHECK(readings[0].time == *clock.now);
  CHECK(readings[1].total == (1000 + 15 + 77) * 1000);
  CHECK(readings[1].caveats == only(Caveat::wrap));
  clock.pass(1s);
  CHECK(sample(meter)[0].caveats == none);
}

TEST_CASE("I10: a gap in powercap's readings longer than half the time to wrap is marked") {
  HostTree host;
  one_package(host);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  const double half_wrap = 0.5 * domain(meter, "package-0").wrap_joules / domain(meter, "package-0").max_watts;  // 131 s
  clock.pass(nanoseconds(static_cast<std::int64_t>(1e9 * (half_wrap - 1))));
  set_energy(host, 1'000'000);
  CHECK(read(meter, "package-0").caveats == none);
  clock.pass(nanoseconds(static_cast<std::int64_t>(1e9 * (half_wrap + 1))));
  set_energy(host, 2'000'000);
  CHECK(read(meter, "package-0").caveats == only(Caveat::wrap_ambiguous));
  CHECK(read(meter, "package-0").total == 2'000'000'000);
}

TEST_CASE("I11: powercap keeps its total when permission is lost, says so, and goes on when it is granted again") {
  HostTree host;
  one_package(host, 1'000'000);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  clock.pass(1s);
  set_energy(host, 3'000'000);
  CHECK(read(meter, "package-0").total == 2'000'000'000);
  host.mode(zones + "intel-rapl:0/energy_uj", 0);
  {
    const Unprivileged plain;
    clock.pass(1s);
    MeterSample reading;
    const SampleResult result = meter.sample({&reading, 1});
    CHECK(result.count == 1);
    CHECK(result.error == std::errc::permission_denied);
    CHECK(reading.total == 2'000'000'000);
    CHECK(reading.caveats == only(Caveat::permission_denied));
    CHECK(read(meter, "package-0").total == 2'000'000'000);
  }
  CHECK(meter.warnings().size() == 1);
  CHECK_THAT(warnings(meter), Contains("powercap: " + host.path(zones + "intel-rapl:0/energy_uj") + " cannot be read: Permission denied") && Contains("chmod a+r") && Contains("CAP_PERFMON"));
  host.mode(zones + "intel-rapl:0/energy_uj", 0400);
  clock.pass(1s);
  set_energy(host, 4'000'000);
  const MeterSample again = read(meter, "package-0");
  CHECK(again.total == 3'000'000'000);
  CHECK(again.caveats == only(Caveat::permission_denied));  // of a part of the interval that ends here
  CHECK(read(meter, "package-0").caveats == none);
}

TEST_CASE("powercap: a counter that fails keeps its total, and no failure is taken for 0") {
  struct Failure {
    const char* name;
    void (*happen)(HostTree&, const std::string& file);
    Caveat caveat;
    const char* text;
  };
  const Failure failure = GENERATE(values<Failure>({
      {"EIO", [](HostTree& h, const std::string& f) { h.broken(f); }, Caveat::unreadable, "Input/output error"},
      {"empty", [](HostTree& h, const std::string& f) { h.write_raw(f, ""); }, Caveat::unreadable, "it holds no whole number"},
      {"abc", [](HostTree& h, const std::string& f) { h.write(f, "abc"); }, Caveat::unreadable, "it holds no whole number"},
      {"negative", [](HostTree& h, const std::string& f) { h.write(f, "-5"); }, Caveat::unreadable, "it holds no whole number"},
      {"too large", [](HostTree& h, const std::string& f) { h.write(f, "18446744073709551616"); }, Caveat::unreadable, "it holds no whole number"},
      {"binary", [](HostTree& h, const std::string& f) { h.write_raw(f, std::string("12\0\xff", 4)); }, Caveat::unreadable, "it holds no whole number"},
      {"huge", [](HostTree& h, const std::string& f) { h.write_raw(f, std::string(1 << 20, '1')); }, Caveat::unreadable, "longer than such a file can be"},
      {"directory", [](HostTree& h, const std::string& f) { h.remove(f), h.directory(f); }, Caveat::unreadable, "it is a directory"},
      {"FIFO", [](HostTree& h, const std::string& f) { h.remove(f), h.fifo(f); }, Caveat::unreadable, "it is no regular file"},
      {"vanished file", [](HostTree& h, const std::string& f) { h.remove(f); }, Caveat::vanished, "No such file or directory"},
      {"vanished zone", [](HostTree& h, const std::string&) { h.remove(zones + "intel-rapl:0"); }, Caveat::vanished, "No such file or directory"},
  }));
  INFO(failure.name);
  HostTree host;
  one_package(host, 5'000'000);
  host.zone("intel-rapl:1", "package-1", 0, intel_range);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  clock.pass(1s);
  set_energy(host, 6'000'000);
  REQUIRE(read(meter, "package-0").total == 1'000'000'000);
  failure.happen(host, zones + "intel-rapl:0/energy_uj");
  set_energy(host, 500, "intel-rapl:1");
  const std::size_t before = test::open_descriptors();
  for (int i = 0; i < 3; ++i) {
    clock.pass(1s);
    const auto readings = sample(meter);
    REQUIRE(readings.size() == 2);
    CHECK(readings[0].total == 1'000'000'000);
    CHECK(readings[0].caveats == only(failure.caveat));
    CHECK(readings[1].total == 500'000);  // the others are as well as before
    CHECK(readings[1].caveats == none);
  }
  CHECK(test::open_descriptors() == before);
  CHECK(meter.warnings().size() == 1);
  CHECK_THAT(warnings(meter), Contains(failure.text));
  host.remove(zones + "intel-rapl:0");
  one_package(host, 6'200'000);
  CHECK(read(meter, "package-0").total == 1'200'000'000);
}

TEST_CASE("powercap: a zone that cannot be read at first is left out, and a warning says why") {
  HostTree host;
  for (int i = 0; i < 6; ++i) host.zone("intel-rapl:" + std::to_string(i), "package-" + std::to_string(i), 10, intel_range);
  host.zone("intel-rapl:0:0", "core", 10, intel_range);
  host.mode(zones + "intel-rapl:0/energy_uj", 0);
  host.write_raw(zones + "intel-rapl:1/energy_uj", "");
  host.broken(zones + "intel-rapl:2/energy_uj");
  host.remove(zones + "intel-rapl:3/name");
  host.write(zones + "intel-rapl:4/name", "pack\x1b[31mage");
  const Unprivileged plain;
  const Powercap meter({host.root()});
  CHECK(keys(meter) == Keys{"package-0/core", "package-5"});
  CHECK(parent(meter, "package-0/core") == "");
  CHECK(meter.warnings().size() == 5);
  CHECK_THAT(warnings(meter), Contains("intel-rapl:0/energy_uj cannot be read: Permission denied; its energy is not known. To grant it, ") &&
                                  Contains("intel-rapl:1/energy_uj cannot be read: it holds no whole number; its energy is not known.") && Contains("intel-rapl:2/energy_uj cannot be read: Input/output error") &&
                                  Contains("intel-rapl:3/name cannot be read: No such file") && Contains("intel-rapl:4/name is 'pack?[31mage', which is no domain"));
}

TEST_CASE("powercap: where a counter's range is unknown, an interval in which it wraps counts nothing") {
  HostTree host;
  one_package(host, 1'000'000);
  const std::string range = zones + "intel-rapl:0/max_energy_range_uj";
  const std::string text = GENERATE("missing", "", "abc", "0", "999999", "5000000000000000", "18446744073709551615", "1000000" /* the counter shows more now and then */);
  if (text == "missing") host.remove(range);
  else host.write(range, text);
  if (text == "1000000") set_energy(host, 1'000'002);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  CHECK_THAT(warnings(meter), Contains("max_energy_range_uj") && Contains("nobody knows where the counter wraps"));
  clock.pass(1s);
  set_energy(host, 3'000'000);
  const Nanojoules total = read(meter, "package-0").total;
  CHECK(total == (text == "1000000" ? 1'999'998'000u : 2'000'000'000u));
  clock.pass(1s);
  set_energy(host, 5);
  MeterSample reading = read(meter, "package-0");
  CHECK(reading.total == total);
  CHECK(reading.caveats == only(Caveat::counter_reset));
  clock.pass(1s);
  set_energy(host, 1005);
  reading = read(meter, "package-0");
  CHECK(reading.total == total + 1'000'000);
  CHECK(reading.caveats == none);
  clock.pass(33s);  // at 1 kW half of the 65.5 kJ after which the soonest of all known counters wraps
  CHECK(read(meter, "package-0").caveats == only(Caveat::wrap_ambiguous));
}

TEST_CASE("powercap: a jump that no processor can draw is not counted") {
  HostTree host;
  one_package(host, 0);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  clock.pass(1s);
  set_energy(host, 200'000'000'000);  // 200 kW
  CHECK(read(meter, "package-0").caveats == only(Caveat::counter_reset));
  CHECK(read(meter, "package-0").total == 0);
  clock.pass(1s);
  set_energy(host, 200'100'000'000);
  CHECK(read(meter, "package-0").total == 100'000'000'000);
  clock.pass(1s);
  set_energy(host, 0);  // far from where it wraps
  const MeterSample reading = read(meter, "package-0");
  CHECK(reading.caveats == only(Caveat::counter_reset));
  CHECK(reading.total == 100'000'000'000);
}

TEST_CASE("powercap: names that are not RAPL's, or only look so, are no zones") {
  using detail::parse_zone_place;
  CHECK(parse_zone_place("intel-rapl:0") == detail::ZonePlace{"intel-rapl", {0}});
  CHECK(parse_zone_place("intel-rapl-mmio:12:3") == detail::ZonePlace{"intel-rapl-mmio", {12, 3}});
  for (const char* name : {"", "intel-rapl", "intel-rapl:", "intel-rapl::0", "intel-rapl:0:", "intel-rapl:x", "intel-rapl:-1", "intel-rapl:0:0:0:0", "intel-rapl:100000", "dtpm:0", "scmi:0", "intel-rapl:0 "})
    CHECK_FALSE(parse_zone_place(name));
  CHECK_FALSE(parse_zone_place("intel-rapl" + std::string(100, 'x') + ":0"));
  using detail::parse_zone_name;
  CHECK(parse_zone_name("package-0-die-1", "").key == "package-0-die-1");
  CHECK(parse_zone_name("package-007", "").key == "package-7");
  CHECK(parse_zone_name("psys-1", "").key == "psys-1");
  for (const char* name : {"", "package", "package-", "package-x", "package-1-die-", "package-1-die-x", "package-99999999999999999999", "package-100000", "psys-", "psysx", "dram", "core", "Core"}) CHECK(parse_zone_name(name, "").key == "");
  CHECK(parse_zone_name("dram", "psys").key == "");
}

TEST_CASE("powercap: a hostile tree is bounded") {
  HostTree host;
  for (int i = 0; i < 600; ++i) host.write(zones + "intel-rapl:" + std::to_string(i) + "/name", "nonsense-" + std::to_string(i));
  host.fifo(zones + "intel-rapl-fifo:0/name");
  host.write_raw(zones + "intel-rapl:0/name", std::string(1 << 20, 'x'));
  host.directory(zones + "intel-rapl:1/name.d");
  host.fifo("proc/cpuinfo");
  host.directory("dev/cpu/0/msr");
  const std::size_t before = test::open_descriptors();
  const Powercap meter({host.root()});
  CHECK(meter.domains().empty());
  CHECK(meter.warnings().size() == MeterWarnings::most);
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("powercap: a guest's counter is marked, and says nothing until it moves") {
  HostTree host;
  host.cpuinfo("fpu hypervisor");
  one_package(host, 0);
  HandClock clock;
  Powercap meter({host.root(), clock.meter_clock()});
  CHECK(domain(meter, "package-0").caveats == only(Caveat::virtualised));
  clock.pass(1s);
  CHECK(sample(meter).empty());  // 0 J would be a lie
  CHECK(warnings(meter) == "");
  clock.pass(1s);
  CHECK(sample(meter).empty());
  CHECK_THAT(warnings(meter), Contains("stands still in this virtual machine"));
  set_energy(host, 5);
  CHECK(read(meter, "package-0").total == 5'000);
  CHECK(read(meter, "package-0").total == 5'000);
}

TEST_CASE("powercap: a filtered processor's counters are marked and worth less") {
  HostTree host;
  host.cpuinfo("fpu sgx");
  one_package(host);
  const Powercap meter({host.root()});
  CHECK(domain(meter, "package-0").caveats == only(Caveat::filtered));
  CHECK(domain(meter, "package-0").accuracy == 0.29);
}

TEST_CASE("a meter given too little room fills what there is") {
  HostTree host;
  intel_server(host);
  Powercap meter({host.root()});
  std::vector<MeterSample> room(2);
  CHECK(meter.sample(room).count == 2);
  CHECK(room[1].domain == 1);
}

// --- perf ---

TEST_CASE("perf: one descriptor for each event and processor of the mask, without what the PMU refuses") {
  HostTree host;
  perf_host(host);
  perf_event(host, pmu, "energy-ram", "event=0x03");
  perf_event(host, pmu, "energy-cores", "event=0x01");
  perf_event(host, pmu, "energy-gpu", "event=0x04");
  perf_event(host, pmu, "energy-psys", "event=0x05");
  const FakePerf fake;
  HandClock clock;
  const std::size_t before = test::open_descriptors();
  {
    PerfEnergy meter({host.root(), fake.open_fn(), clock.meter_clock()});
    CHECK(warnings(meter) == "");
    CHECK(keys(meter) == Keys{"package-0", "package-1", "package-0/core", "package-1/core", "package-0/dram", "package-1/dram", "psys", "psys-1"});
    for (const std::string& key : keys(meter)) CHECK(parent(meter, key) == (key.ends_with("/core") ? key.substr(0, 9) : ""));
    CHECK(test::open_descriptors() == before + 8);
    std::map<std::pair<std::uint64_t, int>, int> times;
    for (const FakePerf::Event& event : *fake.opened) {
      perf_event_attr plain{};
      plain.size = sizeof plain;
      plain.type = 24;
      plain.config = event.attributes.config;
      CHECK(std::string_view(reinterpret_cast<const char*>(&plain), sizeof plain) == std::string_view(reinterpret_cast<const char*>(&event.attributes), sizeof plain));
      CHECK(event.process == -1);
      CHECK(event.group == -1);
      CHECK(event.flags == PERF_FLAG_FD_CLOEXEC);
      ++times[{event.attributes.config, event.cpu}];
    }
    CHECK(times == std::map<std::pair<std::uint64_t, int>, int>{{{1, 0}, 1}, {{1, 48}, 1}, {{2, 0}, 1}, {{2, 48}, 1}, {{3, 0}, 1}, {{3, 48}, 1}, {{5, 0}, 1}, {{5, 48}, 1}});

    clock.pass(1s);
    fake.set(2, 48, 100 * joule);
    fake.set(3, 0, joule / 2);
    CHECK(read(meter, "package-0").total == 0);
    CHECK(read(meter, "package-1").total == 100'000'000'000);
    CHECK(read(meter, "package-0/dram").total == 500'000'000);
    clock.pass(1s);
    fake.set(2, 48, 50 * joule);  // the kernel's counts never fall
    CHECK(read(meter, "package-1").caveats == only(Caveat::counter_reset));
    CHECK(read(meter, "package-1").total == 100'000'000'000);
    CHECK(domain(meter, "package-1").wrap_joules == 0);
    PerfEnergy moved = std::move(meter);
    CHECK(read(moved, "package-1").total == 100'000'000'000);
  }
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("I10: perf's counts have no wrap, however long nobody reads them") {
  HostTree host;
  perf_host(host, "0");
  const FakePerf fake;
  HandClock clock;
  PerfEnergy meter({host.root(), fake.open_fn(), clock.meter_clock()});
  clock.pass(24h);
  fake.set(2, 0, 10'000'000 * joule);
  const MeterSample reading = read(meter, "package-0");
  CHECK(reading.total == 10'000'000'000'000'000);
  CHECK(reading.caveats == none);
}

TEST_CASE("perf: packages of several dies are called as powercap calls them") {
  HostTree host;
  perf_host(host, "0,48,96");
  host.cpu(96, 1, 1, 0);
  perf_event(host, pmu, "energy-psys", "event=0x05");
  const FakePerf fake;
  const PerfEnergy meter({host.root(), fake.open_fn()});
  CHECK(keys(meter) == Keys{"package-0-die-0", "package-1-die-0", "package-1-die-1", "psys", "psys-1"});
  CHECK(warnings(meter) == "");
}

TEST_CASE("perf: the counters of AMD's cores are there on request, as parts of their package") {
  HostTree host;
  perf_host(host, "0");
  host.write(pmu_cores + "type", 25);
  host.write(pmu_cores + "cpumask", "0-1");
  perf_event(host, pmu_cores, "energy-core", "event=0x01");
  host.cpu(1, 0, 0, 7);
  const FakePerf fake;
  CHECK(keys(PerfEnergy({host.root(), fake.open_fn()})) == Keys{"package-0"});
  const PerfEnergy meter({host.root(), fake.open_fn(), monotonic_time, true});
  CHECK(keys(meter) == Keys{"package-0", "package-0/core-0", "package-0/core-7"});
  CHECK(parent(meter, "package-0/core-7") == "package-0");
  CHECK(domain(meter, "package-0/core-7").max_watts == 100);
  CHECK(fake.opened->back().attributes.type == 25);
  CHECK(fake.opened->back().cpu == 1);
}

TEST_CASE("perf: what the kernel refuses is told with what to do") {
  HostTree host;
  perf_host(host);
  FakePerf fake;
  const std::size_t before = test::open_descriptors();
  SECTION("permission: once, not for each event") {
    fake.refuse = GENERATE(EACCES, EPERM);
    perf_event(host, pmu, "energy-ram", "event=0x03");
    const PerfEnergy meter({host.root(), fake.open_fn()});
    CHECK(meter.domains().empty());
    CHECK(meter.warnings().size() == 1);
    CHECK_THAT(warnings(meter), Contains("perf_event_paranoid to 0 (it is '2')") && Contains("CAP_PERFMON") && Contains("no energy can be read by perf"));
  }
  SECTION("no such device, processor or event") {
    fake.refuse = GENERATE(ENODEV, EINVAL, ENOENT, EMFILE);
    const PerfEnergy meter({host.root(), fake.open_fn()});
    CHECK(meter.domains().empty());
    CHECK(meter.warnings().size() == 2);
    CHECK_THAT(warnings(meter), Contains(std::generic_category().message(fake.refuse)) && Contains("that of cpu 48 is not known."));
  }
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("perf: a counter that fails later keeps its total") {
  HostTree host;
  perf_host(host, "0");
  const FakePerf fake;
  HandClock clock;
  PerfEnergy meter({host.root(), fake.open_fn(), clock.meter_clock()});
  clock.pass(1s);
  fake.set(2, 0, 3 * joule);
  CHECK(read(meter, "package-0").total == 3'000'000'000);
  REQUIRE(::ftruncate(fake.opened->front().fd, 0) == 0);
  clock.pass(1s);
  const MeterSample reading = read(meter, "package-0");
  CHECK(reading.total == 3'000'000'000);
  CHECK(reading.caveats == only(Caveat::unreadable));
  CHECK_THAT(warnings(meter), Contains("energy-pkg of cpu 0 cannot be read"));
  fake.set(2, 0, 4 * joule);
  CHECK(read(meter, "package-0").total == 4'000'000'000);
}

TEST_CASE("perf: a descriptor may have no place to read at, as the kernel's have not") {
  HostTree host;
  perf_host(host, "0");
  int ends[2] = {-1, -1};
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const detail::FileDescriptor counts(ends[1]);
  const std::uint64_t values[] = {joule, 3 * joule};
  REQUIRE(::write(counts.get(), values, sizeof values) == sizeof values);
  HandClock clock;
  PerfEnergy meter({host.root(), [&](const perf_event_attr&, pid_t, int, int, unsigned long) { return ends[0]; }, clock.meter_clock()});
  clock.pass(1s);
  CHECK(read(meter, "package-0").total == 2'000'000'000);
}

TEST_CASE("perf: descriptors that a read of the first count fails on are closed") {
  HostTree host;
  perf_host(host, "0");
  const std::size_t before = test::open_descriptors();
  const PerfEnergy meter({host.root(), [](const perf_event_attr&, pid_t, int, int, unsigned long) { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }});
  CHECK(meter.domains().empty());
  CHECK(test::open_descriptors() == before);
}

TEST_CASE("perf: event files that make no sense are left out with a warning") {
  HostTree host;
  perf_host(host, "0");
  const FakePerf fake;
  const auto [file, text] = GENERATE(table<std::string, std::string>({
      {"type", "abc"}, {"type", "4294967296"}, {"type", "-1"}, {"cpumask", ""}, {"cpumask", "0-99999"}, {"cpumask", "5-1"}, {"cpumask", "x"}, {"format/event", "config1:8-15"},
      {"events/energy-pkg", ""}, {"events/energy-pkg", "event=2"}, {"events/energy-pkg", "event=0x"}, {"events/energy-pkg", "event=0x100"}, {"events/energy-pkg", "event=0x02,umask=1"},
      {"events/energy-pkg", "event=0xfffffffffffffffff"}, {"events/energy-pkg.scale", "0"}, {"events/energy-pkg.scale", "-1"}, {"events/energy-pkg.scale", "nan"}, {"events/energy-pkg.scale", "inf"},
      {"events/energy-pkg.scale", "1e400"}, {"events/energy-pkg.scale", "one"}, {"events/energy-pkg.unit", "Watts"},
  }));
  INFO(file << ": " << text);
  host.write(pmu + file, text);
  const PerfEnergy meter({host.root(), fake.open_fn()});
  CHECK(meter.domains().empty());
  CHECK(fake.opened->empty());
  CHECK(meter.warnings().size() == 1);
  CHECK_THAT(warnings(meter), Contains(file == "type" && text != "4294967296" ? "it holds no whole number" : "makes no sense"));
}

TEST_CASE("perf: a processor whose package is not known has no counters, unless it is the only one") {
  HostTree host;
  perf_host(host);
  const FakePerf fake;
  host.write("sys/devices/system/cpu/cpu48/topology/physical_package_id", "-1");
  const PerfEnergy meter({host.root(), fake.open_fn()});
  CHECK(keys(meter) == Keys{"package-0"});
  CHECK_THAT(warnings(meter), Contains("cpu48/topology/physical_package_id does not tell"));
  host.write(pmu + "cpumask", "48");
  CHECK(keys(PerfEnergy({host.root(), fake.open_fn()})) == Keys{"package-0"});
  host.write(pmu + "cpumask", "0,48");
  host.cpu(48, 0, 0, 0);
  const PerfEnergy twice({host.root(), fake.open_fn()});
  CHECK(keys(twice) == Keys{"package-0"});
  CHECK_THAT(warnings(twice), Contains("of cpu 48 would be package-0 once more"));
}

TEST_CASE("perf: the kernel's own function is the default, and refuses a processor that is not there") {
  perf_event_attr attributes{};
  attributes.size = sizeof attributes;
  attributes.type = PERF_TYPE_SOFTWARE;
  const std::size_t before = test::open_descriptors();
  CHECK(open_perf_event(attributes, -1, -1, -1, PERF_FLAG_FD_CLOEXEC) == -1);
  CHECK(test::open_descriptors() == before);
}

// --- hwmon ---

TEST_CASE("hwmon: the sockets of amd_energy, and on request its cores as parts of them") {
  HostTree host;
  const std::string directory = "sys/class/hwmon/hwmon3/";
  host.write(directory + "name", "amd_energy");
  for (int i = 0; i < 4; ++i) {
    host.write(directory + "energy" + std::to_string(i + 1) + "_label", "Ecore00" + std::to_string(i));
    host.write(directory + "energy" + std::to_string(i + 1) + "_input", 1000);
    host.cpu(i, i / 2, 0, i);
  }
  for (int i = 0; i < 2; ++i) {
    host.write(directory + "energy" + std::to_string(i + 5) + "_label", "Esocket" + std::to_string(i));
    host.write(directory + "energy" + std::to_string(i + 5) + "_input", 70'000'000'000);  // more than the register holds: the driver adds up
  }
  host.write("sys/class/hwmon/hwmon0/name", "k10temp");
  HandClock clock;
  Hwmon meter({host.root(), clock.meter_clock()});
  CHECK(keys(meter) == Keys{"package-0", "package-1"});
  clock.pass(1s);
  host.write(directory + "energy6_input", 70'250'000'000);
  CHECK(read(meter, "package-1").total == 250'000'000'000);
  CHECK(domain(meter, "package-1").wrap_joules == 0);
  const Hwmon with_cores({host.root(), clock.meter_clock(), true});
  CHECK(keys(with_cores) == Keys{"package-0", "package-1", "package-0/core-0", "package-0/core-1", "package-1/core-2", "package-1/core-3"});
  CHECK(parent(with_cores, "package-1/core-2") == "package-1");
  host.write(directory + "energy5_label", "Esocket9999999");
  host.write_raw(directory + "energy6_input", "");
  const Hwmon broken({host.root(), clock.meter_clock()});
  CHECK(broken.domains().empty());
  CHECK_THAT(warnings(broken), Contains("energy5_label is 'Esocket9999999', neither a socket nor a core") && Contains("energy6_input cannot be read: it holds no whole number"));
}

TEST_CASE("hwmon: an ACPI power meter is the node's, and its watts are integrated") {
  HostTree host;
  const std::string directory = GENERATE("sys/class/hwmon/hwmon1/", "sys/class/hwmon/hwmon1/device/");
  host.write(directory + "name", "power_meter");
  host.write(directory + "power1_average", 300'000'000);
  host.write(directory + "power1_average_interval", 2000);
  host.cpuinfo("fpu sgx");  // which filters RAPL, not this
  HandClock clock;
  Hwmon meter({host.root(), clock.meter_clock()});
  CHECK(keys(meter) == Keys{"node"});
  CHECK(domain(meter, "node").kind == Domain::node);
  CHECK(whole_machine(Domain::node));
  CHECK(domain(meter, "node").tick == 2s);
  CHECK(domain(meter, "node").caveats == none);
  clock.pass(2s);
  host.write(directory + "power1_average", 500'000'000);
  CHECK(read(meter, "node").total == 800'000'000'000);
  clock.pass(10s);
  CHECK(read(meter, "node").total == 5'800'000'000'000);
  clock.pass(11s);  // too long to be bridged
  CHECK(read(meter, "node").caveats == only(Caveat::stale));
  host.write(directory + "power1_average", 30'000'000'001);
  clock.pass(1s);
  CHECK(read(meter, "node").caveats == only(Caveat::counter_reset));
  host.broken(directory + "power1_average");
  CHECK(read(meter, "node").caveats == only(Caveat::unreadable));
  CHECK(read(meter, "node").total == 5'800'000'000'000);
}

TEST_CASE("hwmon: Grace's power meters are told apart by their labels") {
  HostTree host;
  const char* labels[] = {"Module Power Socket 0", "CPU Power Socket 0", "SysIO Power Socket 0", "Grace Power Socket 0"};
  for (int i = 0; i < 4; ++i) {
    const std::string directory = "sys/class/hwmon/hwmon" + std::to_string(i + 1) + "/device/";
    host.write(directory + "name", "power_meter");
    host.write(directory + "power1_oem_info", labels[i]);
    host.write(directory + "power1_average", 100'000'000);
    host.write(directory + "power1_average_interval", 50);
  }
  const Hwmon meter({host.root()});
  CHECK(keys(meter) == Keys{"package-0", "package-0/core"});  // the module has the GPU in it, which its own meter counts
  CHECK(parent(meter, "package-0/core") == "package-0");
  CHECK(warnings(meter) == "");
}

TEST_CASE("hwmon: of two power meters that nobody can tell apart the second is left out") {
  HostTree host;
  for (const char* name : {"hwmon10", "hwmon9", "hwmon-1", "hwmonx"}) {
    host.write(std::string("sys/class/hwmon/") + name + "/name", "power_meter");
    host.write(std::string("sys/class/hwmon/") + name + "/power1_average", 1'000'000);
  }
  const Hwmon meter({host.root()});
  CHECK(keys(meter) == Keys{"node"});
  CHECK(meter.warnings().size() == 1);
  CHECK_THAT(warnings(meter), Contains("hwmon10/power1_average would be node once more"));
  CHECK(domain(meter, "node").tick == 1s);  // where the driver does not say
}

TEST_CASE("I11: hwmon keeps its total when permission is lost") {
  HostTree host;
  host.write("sys/class/hwmon/hwmon0/name", "amd_energy");
  host.write("sys/class/hwmon/hwmon0/energy1_label", "Esocket0");
  host.write("sys/class/hwmon/hwmon0/energy1_input", 1);
  HandClock clock;
  Hwmon meter({host.root(), clock.meter_clock()});
  clock.pass(1s);
  host.write("sys/class/hwmon/hwmon0/energy1_input", 6);
  CHECK(read(meter, "package-0").total == 5'000);
  host.mode("sys/class/hwmon/hwmon0/energy1_input", 0);
  const Unprivileged plain;
  CHECK(read(meter, "package-0").caveats == only(Caveat::permission_denied));
  CHECK(read(meter, "package-0").total == 5'000);
  CHECK_THAT(warnings(meter), Contains("chmod a+r"));
}

// --- all of them ---

TEST_CASE("find_meters measures each thing once, by the best meter that may") {
  HostTree host;
  intel_server(host);
  perf_host(host);
  host.write("sys/class/hwmon/hwmon0/name", "power_meter");
  host.write("sys/class/hwmon/hwmon0/power1_average", 1'000'000);
  const auto who = [](const FoundMeters& found) {
    std::map<std::string, std::string> sources;
    for (const AnyMeter& meter : found.meters)
      for (const DomainInfo& domain : meter.domains()) CHECK(sources.emplace(domain.key, domain.source).second);
    return sources;
  };
  FakePerf fake;
  HandClock clock;
  FoundMeters found = find_meters({host.root(), clock.meter_clock(), fake.open_fn()});
  CHECK(who(found) == std::map<std::string, std::string>{{"package-0", "perf"}, {"package-1", "perf"}, {"package-0/dram", "powercap"}, {"package-1/dram", "powercap"}, {"psys", "powercap"}, {"package-0-die-1", "powercap"}, {"node", "hwmon"}});
  CHECK(found.warnings.empty());
  for (AnyMeter& meter : found.meters) CHECK(sample(meter).size() == meter.domains().size());

  fake.refuse = EACCES;
  found = find_meters({host.root(), clock.meter_clock(), fake.open_fn()});
  CHECK(who(found)["package-0"] == "powercap");
  CHECK(who(found)["package-0/core"] == "powercap");
  CHECK(found.warnings.size() == 1);
}

TEST_CASE("find_meters tells why no counter can be read") {
  HostTree host;
  FoundMeters found = find_meters({host.root()});
  CHECK(found.meters.empty());
  CHECK(found.warnings == Keys{"no energy counter can be read: this host has no event of PMU power, no zone in /sys/class/powercap and no sensor of energy or power in /sys/class/hwmon, so joules will come from the model."});
  host.cpuinfo("hypervisor");
  CHECK_THAT(find_meters({host.root()}).warnings.at(0), Contains("this virtual machine has no event"));
  one_package(host);
  host.mode(zones + "intel-rapl:0/energy_uj", 0);
  {
    const Unprivileged plain;
    found = find_meters({host.root()});
  }
  CHECK(found.meters.empty());
  CHECK(found.warnings.size() == 2);
  CHECK_THAT(found.warnings.at(0), Contains("no energy counter can be read: none of those that this host has may be used (see the other warnings)"));
  CHECK_THAT(found.warnings.at(1), Contains("energy_uj cannot be read: Permission denied"));
  host.mode(zones + "intel-rapl:0/energy_uj", 0400);
  found = find_meters({host.root()});
  CHECK(found.meters.size() == 1);
  CHECK_THAT(found.warnings.at(0), Contains("this is a virtual machine"));
}

TEST_CASE("find_meters survives whatever host this is, and leaves nothing open") {
  const std::size_t before = test::open_descriptors();
  {
    FoundMeters found = find_meters();
    CHECK((!found.meters.empty() || !found.warnings.empty()));
    for (AnyMeter& meter : found.meters) {
      CHECK_FALSE(meter.domains().empty());
      CHECK(sample(meter).size() <= meter.domains().size());
    }
  }
  CHECK(test::open_descriptors() == before);
}
