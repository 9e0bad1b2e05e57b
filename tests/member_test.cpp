// SPDX-License-Identifier: Apache-2.0
// Processes that elect an energy hub, lose it, and elect another one. Real sockets, threads and time; the meter is a function of time.
#include <catch2/catch.hpp>

#include <dirent.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>

#include <tally/energy/member.hpp>

#include "fake_meter.hpp"

using namespace tally;
using namespace std::chrono_literals;

namespace {

MemberOptions options(const std::string& name, bool with_meter = true) {
  MemberOptions o;
  o.name = detail::concat({"test/", ::getpid(), "/", name});
  o.find = [with_meter] {
    FoundMeters found;
    if (with_meter) found.meters.emplace_back(TimedMeter{});
    else found.warnings.push_back("there is no meter");
    return found;
  };
  o.hub.period = 10ms;
  return o;
}
template <class F>
bool soon(F&& f) {
  const auto end = std::chrono::steady_clock::now() + 30s;
  while (!f()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}
Nanojoules cpu(const EnergySource& source) {
  EnergyReading reading;
  return source.read(reading) ? reading.charges[0].total() : 0;
}
/// The only one; its parts add up.
DomainAccount domain_of(const EnergySource& source) {
  const HostEnergy host = source.host();
  if (host.domains.size() != 1) throw std::runtime_error("not one domain");
  const DomainAccount& domain = host.domains[0];
  CHECK(domain.key == "package-0");
  CHECK(domain.total == domain.operations + domain.application + domain.unattributed);
  return domain;
}
/// A thread that copies all the time.
void work(EnergySource& source, ActivityTimes& times) {
  times[Activity::copy] += 1ms;
  source.publish(times);
}
std::size_t descriptors() {
  std::size_t count = 0;
  DIR* const folder = ::opendir("/proc/self/fd");
  while (::readdir(folder)) ++count;
  ::closedir(folder);
  return count;
}

}  // namespace

TEST_CASE("the first is the hub, others join it, and when it goes another one takes over without losing a joule") {
  const std::size_t before = descriptors();
  {
    auto first = std::make_shared<EnergyMember>(options("election")), second = std::make_shared<EnergyMember>(options("election"));
    CHECK(first->is_hub());
    CHECK_FALSE(second->is_hub());
    auto seat = std::make_unique<HubSeat>(second);
    ActivityTimes times;
    REQUIRE(soon([&] { return work(*seat, times), cpu(*seat) > 0; }));
    EnergyReading reading;
    REQUIRE(seat->read(reading));
    CHECK(reading.kinds[0].provenance == Provenance::prorated);
    const std::uint64_t windows = seat->windows();
    Nanojoules charged = cpu(*seat);
    const DomainAccount before_change = domain_of(*seat);
    CHECK(before_change.total > 0);

    first.reset();
    REQUIRE(soon([&] { return second->is_hub(); }));
    CHECK(cpu(*seat) >= charged);
    charged = cpu(*seat);
    DomainAccount after_change = domain_of(*seat);
    CHECK(after_change.total >= before_change.total);  // of a life of several hubs, as rows are
    REQUIRE(soon([&] { return work(*seat, times), cpu(*seat) > charged; }));
    CHECK(seat->windows() >= windows);
    charged = cpu(*seat);
    after_change = domain_of(*seat);  // of as many windows, or more
    CHECK(after_change.total > before_change.total);
    CHECK(after_change.operations >= charged);
    CHECK_FALSE(seat->host().power.empty());
  }
  CHECK(descriptors() == before);
}

TEST_CASE("a fork's copy of a seat that ends does not give its parent's away", "[processes]") {
  auto member = std::make_shared<EnergyMember>(options("fork"));
  auto seat = std::make_unique<HubSeat>(member);
  ActivityTimes times;
  REQUIRE(soon([&] { return work(*seat, times), cpu(*seat) > 0; }));
  const pid_t child = ::fork();
  if (child == 0) {
    seat.reset();
    member.reset();
    ::_exit(0);
  }
  int status = 1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  const Nanojoules charged = cpu(*seat);
  const std::uint64_t windows = seat->windows();
  REQUIRE(soon([&] { return work(*seat, times), seat->windows() > windows + 3; }));
  CHECK(cpu(*seat) > charged);
}

TEST_CASE("a hub that does not answer holds nobody up, however many come, and is followed when it ends") {
  const MemberOptions shared = options("stopped");
  const std::string name = detail::concat({"tally-energy/", ::getuid(), "/", detail::Board::magic, "/", shared.name});
  const auto [where, length] = detail::local_address(name);
  detail::FileDescriptor door = detail::local_socket();
  REQUIRE(::bind(door.get(), reinterpret_cast<const sockaddr*>(&where), length) == 0);
  REQUIRE(::listen(door.get(), 1) == 0);  // as where its process is stopped: nobody takes what comes
  std::vector<std::shared_ptr<EnergyMember>> members;
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    members.push_back(std::make_shared<EnergyMember>(shared));
    CHECK(std::chrono::steady_clock::now() - begin < 20s);  // one second, by design
    CHECK_FALSE(members.back()->is_hub());
  }
  CHECK_FALSE(members.front()->warnings().empty());
  members.pop_back();  // some end meanwhile
  members.erase(members.begin());
  door = detail::FileDescriptor();
  CHECK(soon([&] { return std::any_of(members.begin(), members.end(), [](const auto& member) { return member->is_hub(); }); }));
  HubSeat seat(members.front());
  ActivityTimes times;
  CHECK(soon([&] { return work(seat, times), cpu(seat) > 0; }));
}

TEST_CASE("without a meter there is no hub and no thread, and the reason is told") {
  auto member = std::make_shared<EnergyMember>(options("none", false));
  HubSeat seat(member);
  EnergyReading reading;
  CHECK_FALSE(seat.read(reading));
  CHECK(seat.windows() == 0);
  CHECK_FALSE(member->is_hub());
  CHECK(seat.host().warnings == std::vector<std::string>{"there is no meter"});
  seat.publish({});
}

TEST_CASE("who has no meter himself is charged by a hub that has one") {
  auto hub = std::make_shared<EnergyMember>(options("other"));
  auto poor = std::make_shared<EnergyMember>(options("other", false));
  HubSeat seat(poor);
  ActivityTimes times;
  CHECK(soon([&] { return work(seat, times), cpu(seat) > 0; }));
}

TEST_CASE("a hub that is killed is replaced, and places of processes that are killed are free again", "[processes]") {
  const MemberOptions shared = options("killed");
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    auto member = std::make_shared<EnergyMember>(shared);
    HubSeat seat(member);
    char c = member->is_hub() ? 'y' : 'n';
    [[maybe_unused]] const auto written = ::write(ready[1], &c, 1);
    for (;;) ::pause();
  }
  char c = 0;
  REQUIRE(::read(ready[0], &c, 1) == 1);
  CHECK(c == 'y');
  auto member = std::make_shared<EnergyMember>(shared);
  CHECK_FALSE(member->is_hub());
  HubSeat seat(member);
  ActivityTimes times;
  CHECK(soon([&] { return work(seat, times), cpu(seat) > 0; }));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  CHECK(soon([&] { return member->is_hub(); }));
  const Nanojoules charged = cpu(seat);
  CHECK(soon([&] { return work(seat, times), cpu(seat) > charged; }));

  // A client that is killed: its process is no longer counted, its place is free.
  const pid_t client = ::fork();
  if (client == 0) {
    auto mine = std::make_shared<EnergyMember>(shared);
    HubSeat its(mine);
    ::_exit(::write(ready[1], "x", 1) == 1 ? 0 : 1);
  }
  REQUIRE(::read(ready[0], &c, 1) == 1);
  ::waitpid(client, nullptr, 0);
  const std::uint64_t now = seat.windows();
  CHECK(soon([&] { return seat.windows() > now + 2; }));
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_CASE("whoever connects and says nothing, or is not a hub, holds nobody up") {
  const MemberOptions shared = options("hostile");
  const std::string name = detail::concat({"tally-energy/", ::getuid(), "/", detail::Board::magic, "/", shared.name});
  const auto [where, length] = detail::local_address(name);
  SECTION("silent guests") {
    auto hub = std::make_shared<EnergyMember>(shared);
    std::vector<detail::FileDescriptor> guests;
    for (int i = 0; i < 20; ++i) {
      guests.push_back(detail::local_socket());
      REQUIRE(::connect(guests.back().get(), reinterpret_cast<const sockaddr*>(&where), length) == 0);
    }
    HubSeat seat(hub);
    ActivityTimes times;
    CHECK(soon([&] { return work(seat, times), cpu(seat) > 0; }));
  }
  SECTION("a hub of another version") {
    detail::FileDescriptor door = detail::local_socket();
    REQUIRE(::bind(door.get(), reinterpret_cast<const sockaddr*>(&where), length) == 0);
    REQUIRE(::listen(door.get(), 4) == 0);
    std::thread liar([&] {
      const detail::Connection guest(detail::FileDescriptor(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC)));
      const char nonsense[16] = "not a welcome";
      guest.send(nonsense, sizeof nonsense);
    });
    auto member = std::make_shared<EnergyMember>(shared);
    liar.join();
    door = detail::FileDescriptor();
    HubSeat seat(member);
    REQUIRE_FALSE(seat.host().warnings.empty());
    CHECK(seat.host().warnings[0].find("another version") != std::string::npos);
    ActivityTimes times;
    CHECK(soon([&] { return work(seat, times), cpu(seat) > 0; }));  // and then it becomes the hub itself
  }
}

TEST_CASE("a board that is full gives no seat, and says so") {
  auto member = std::make_shared<EnergyMember>(options("full"));
  std::vector<std::unique_ptr<HubSeat>> seats;
  for (std::size_t i = 0; i <= detail::Board::most_slots; ++i) seats.push_back(std::make_unique<HubSeat>(member));
  EnergyReading reading;
  CHECK(seats.front()->read(reading));
  CHECK_FALSE(seats.back()->read(reading));
  REQUIRE_FALSE(seats.back()->host().warnings.empty());
  CHECK(seats.back()->host().warnings[0].find("full") != std::string::npos);
  seats.back()->publish({});
}
