// SPDX-License-Identifier: Apache-2.0
// How ranks of several hosts find each other, prove who they are and compare their clocks.
#include <catch2/catch.hpp>

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <tally/tcp.hpp>

#include "network.hpp"
#include "sanitized.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::Caught, test::caught, test::Job, test::knock, test::loopback, test::most_descriptors, test::on_ranks, test::say;

TEST_CASE("SHA-256 and HMAC give what the standards print") {
  const auto hex = [](const detail::Digest& digest) {
    std::string text;
    for (const std::uint8_t byte : digest) text += "0123456789abcdef"[byte >> 4], text += "0123456789abcdef"[byte & 15];
    return text;
  };
  // FIPS 180-2, appendix B.
  CHECK(hex(detail::sha256("abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex(detail::sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")) == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hex(detail::sha256(std::string(1'000'000, 'a'))) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  CHECK(hex(detail::sha256("")) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  // RFC 4231, cases 1, 2, 3 and 6.
  CHECK(hex(detail::hmac(std::string(20, '\x0b'), "Hi There")) == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK(hex(detail::hmac("Jefe", "what do ya want for nothing?")) == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(hex(detail::hmac(std::string(20, '\xaa'), std::string(50, '\xdd'))) == "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
  CHECK(hex(detail::hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First")) == "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST_CASE("addresses are chosen by interface, address or range") {
  const auto ip = [](const char* text) { return detail::resolve(std::string(text).find(':') == std::string::npos ? std::string(text) + ":0" : "[" + std::string(text) + "]:0").front(); };
  const std::vector<detail::Interface> all = {{"lo", ip("127.0.0.1"), true}, {"eth0", ip("10.1.2.3"), false}, {"eth0", ip("fe80::1"), false}, {"eth0", ip("fd00::7"), false}, {"ib0", ip("192.168.5.1"), false}};
  const auto chosen = [&](const char* choice) {
    std::string text;
    for (const SocketAddress& each : detail::choose_addresses(choice, all)) text += each.text() + " ";
    return text;
  };
  CHECK(chosen("") == "10.1.2.3:0 [fd00::7]:0 192.168.5.1:0 ");
  CHECK(chosen("eth0") == "10.1.2.3:0 [fd00::7]:0 ");
  CHECK(chosen("lo") == "127.0.0.1:0 ");
  CHECK(chosen("10.0.0.0/8") == "10.1.2.3:0 ");
  CHECK(chosen("192.168.5.1") == "192.168.5.1:0 ");
  CHECK(chosen("192.168.4.0/23") == "192.168.5.1:0 ");
  CHECK(chosen("fe80::/10") == "[fe80::1]:0 ");
  CHECK(chosen("::/0") == "[fe80::1]:0 [fd00::7]:0 ");
  CHECK(chosen("0.0.0.0/0") == "127.0.0.1:0 10.1.2.3:0 192.168.5.1:0 ");
  for (const char* none : {"eth1", "11.0.0.0/8", "10.1.2.3/33", "10.1.2.3/", "10.1.2.3/-1", "192.168.6.0/24"}) {
    INFO(none);
    CHECK_THROWS_WITH(detail::choose_addresses(none, all), Catch::Contains("no interface, address or range '" + std::string(none) + "'") && Catch::Contains("eth0 10.1.2.3") && Catch::Contains("ib0 192.168.5.1"));
  }
  CHECK_FALSE(detail::own_interfaces().empty());
  CHECK_FALSE(detail::choose_addresses("", detail::own_interfaces()).empty());
}

TEST_CASE("a place to meet is found as launchers say it") {
  for (const auto& [list, first] : std::initializer_list<std::pair<const char*, const char*>>{
           {"gpu1", "gpu1"}, {"gpu1,gpu2", "gpu1"}, {"gpu[03-05,09]", "gpu03"}, {"gpu[7,9]-ib,x", "gpu7-ib"}, {"a,gpu[1-2]", "a"}, {"r[1-2]n[3-4]", "r1n3"}, {"gpu[1-2", ""}, {"", ""}}) {
    INFO(list);
    CHECK(detail::first_host(list) == first);
  }
  const auto found = [] { return detail::Meeting::from_environment().text(); };
  test::Environment address("TALLY_ADDRESS", nullptr), host("MASTER_ADDR", nullptr), port("MASTER_PORT", nullptr), nodes("SLURM_STEP_NODELIST", nullptr), job_nodes("SLURM_JOB_NODELIST", nullptr), list("SLURM_NODELIST", nullptr);
  CHECK_THROWS_WITH(found(), Catch::Contains("set TALLY_ADDRESS"));
  {
    const test::Environment name("SLURM_NODELIST", "gpu[17-18]"), id("SLURM_JOB_ID", "5");
    const std::string slurm = found();
    CHECK(slurm.starts_with("gpu17:"));
    const int number = std::stoi(slurm.substr(6));
    CHECK((number >= 20'000 && number < 32'000));
    const test::Environment master("MASTER_ADDR", "node0"), master_port("MASTER_PORT", "29500");
    CHECK(found() == "node0:29501");
    const test::Environment own("TALLY_ADDRESS", "10.0.0.1:7");
    CHECK(found() == "10.0.0.1:7");
  }
  for (const char* odd : {"host", "host:", ":80", "host:x", "host:70000", "host:-1", "file:"}) {
    INFO(odd);
    const test::Environment own("TALLY_ADDRESS", odd);
    CHECK_THROWS_AS(found(), Error);
  }
}

namespace {

/// Rank r of a job that meets there.
std::shared_ptr<detail::NetworkNode> meet(Rank r, int n, detail::Meeting meeting, const std::string& secret = {}, nanoseconds timeout = 20s, std::string_view interface = "lo") {
  detail::Join me;
  me.rank = r;
  me.size = n;
  return detail::NetworkJob::join(meeting, me, detail::NetworkSettings(timeout, secret), interface, {});
}
std::shared_ptr<detail::NetworkNode> meet(Rank r, int n, const std::string& where, const std::string& secret = {}, nanoseconds timeout = 20s) { return meet(r, n, detail::Meeting(where), secret, timeout); }

}  // namespace

TEST_CASE("ranks meet by a file, whatever an earlier job left in it") {
  const std::string path = (std::filesystem::temp_directory_path() / ("tally-meeting-" + std::to_string(::getpid()))).string();
  const auto silent = detail::listen_at(loopback(4));  // somebody else by now
  for (const std::string& left : {std::string(), std::string("tally 77\n127.0.0.1:1\n"), std::string("tally 5\n"), "tally 6\n" + detail::own_address(silent).text() + "\n"}) {
    if (!left.empty()) std::ofstream(path) << left;
    std::vector<std::shared_ptr<detail::NetworkNode>> nodes(3);
    on_ranks(3, [&](Rank r) {
      if (r == 0) std::this_thread::sleep_for(100ms);  // the others look into what is left
      nodes[static_cast<std::size_t>(r)] = meet(r, 3, "file:" + path);
    });
    CHECK_FALSE(std::filesystem::exists(path));
    CHECK(nodes[2]->address(0).text().starts_with("127.0.0.1:"));
  }
  std::ofstream(path) << "something else";
  CHECK_THAT(caught([&] { meet(1, 2, "file:" + path, {}, 200ms); }).text, Catch::Contains("is not a file in which ranks meet"));
  std::filesystem::remove(path);
  const Caught nobody = caught([&] { meet(1, 2, "file:" + path, {}, 200ms); });
  CHECK(nobody.is(Errc::timeout));
  CHECK_THAT(nobody.text, Catch::Contains("nobody says where it is"));
  CHECK_THAT(caught([&] { meet(0, 2, "file:/no/such/folder/x"); }).text, Catch::Contains("cannot write '/no/such/folder/x'"));
}

TEST_CASE("who does not know the secret neither joins nor is joined") {
  const auto joined = [](const std::string& at_0, const std::string& at_1) {
    auto listener = detail::listen_at(loopback(4));
    const std::string where = detail::own_address(listener).text();
    std::vector<Caught> results(2);
    on_ranks(2, [&](Rank r) {
      results[static_cast<std::size_t>(r)] = caught([&] {
        if (r == 0) meet(0, 2, detail::Meeting(std::move(listener)), at_0, 1s);
        else meet(1, 2, where, at_1, 5s);
      });
    });
    return results;
  };
  const auto fine = joined("swordfish", "swordfish");
  for (const Caught& c : fine) {
    INFO(c);
    CHECK_FALSE((c.error || c.foreign));
  }
  CHECK_THAT(joined("swordfish", "haddock")[1].text, Catch::Contains("rank 1 has another secret than rank 0"));
  CHECK_THAT(joined("swordfish", "")[1].text, Catch::Contains("rank 0 asks for a secret, and this rank has none"));
  CHECK_THAT(joined("", "haddock")[1].text, Catch::Contains("this rank has a secret, and rank 0 has none"));
  const auto alone = joined("swordfish", "haddock")[0];
  CHECK_THAT(alone.text, Catch::Contains("1 of 2 ranks did not appear: 1; connections that were turned away: 1, the last one from 127.0.0.1:") && Catch::Contains("rank 1 has another secret"));
  CHECK_THAT(joined("swordfish", "")[0].text, Catch::Contains("turned away: 1") && Catch::Contains("it went without a word"));

  // What was said once proves nothing the next time: rank 1's own words, replayed.
  Job job(2);
  job.registry.reset();
  auto listener = detail::listen_at(loopback(4));
  const SocketAddress address = detail::own_address(listener);
  const detail::Registry registry(std::move(listener), job.like, detail::NetworkSettings(2s, "swordfish"));
  detail::Challenge asked;
  bool refused = false, challenged = false;
  const auto listen = [&](detail::ControlStream& to, nanoseconds until) {
    const auto deadline = std::chrono::steady_clock::now() + until;
    refused = challenged = false;
    while (std::chrono::steady_clock::now() < deadline && !refused && !challenged) {
      to.write();
      if (!to.read([&](detail::ControlKind kind, std::string_view record) {
            if (kind == detail::ControlKind::challenge) challenged = detail::ControlStream::take(record, asked);
            if (kind == detail::ControlKind::refusal) refused = record.find("another secret") != std::string_view::npos;
            return true;
          })) break;
      std::this_thread::sleep_for(1ms);
    }
  };
  detail::ControlStream rank_1(knock(address)), stranger(knock(address));
  listen(rank_1, 5s);
  REQUIRE(challenged);
  detail::Join words = job.like;
  words.rank = 1;
  words.proof = detail::proof_of("swordfish", "join", asked.nonce, detail::ControlStream::as_bytes(words));
  listen(stranger, 5s);
  REQUIRE(challenged);
  stranger.put(detail::ControlKind::join, words);
  listen(stranger, 5s);
  CHECK(refused);
  rank_1.put(detail::ControlKind::join, words);
  listen(rank_1, 300ms);
  CHECK_FALSE(refused);
}

TEST_CASE("who has not shown that it is the registry is not listened to") {
  for (const auto kind : {detail::ControlKind::dead, detail::ControlKind::gone, detail::ControlKind::goodbye, detail::ControlKind::abort, detail::ControlKind::told}) {
    const auto listener = detail::listen_at(loopback(4));
    std::thread server([&] {
      detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s);
      detail::ControlStream guest(detail::FileDescriptor(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)));
      guest.put(detail::ControlKind::challenge, detail::Challenge{.secured = 1});
      guest.put(kind, std::string(64, '\0'));
      guest.write();
      std::this_thread::sleep_for(300ms);
    });
    const Caught c = caught([&] { meet(1, 2, detail::own_address(listener).text(), "swordfish", 5s); });
    server.join();
    INFO(c);
    CHECK(c.is(Errc::peer_lost));
  }
}

TEST_CASE("ranks of rank 0's host are told to others as these reach that host, whatever its name means there", "[processes]") {
  const test::TwoHosts hosts;
  if (!hosts.problem().empty()) return void(std::printf("skipped: %s\n", hosts.problem().c_str()));
  const test::Shared<std::array<Caught, 3>> results;
  std::vector<test::Process> ranks;
  for (Rank r = 0; r < 3; ++r)
    ranks.emplace_back([&, r] {
      (*results)[static_cast<std::size_t>(r)].record([&] {
        hosts.enter(r == 2);
        detail::Join me;
        me.rank = r;
        me.size = 3;
        me.place = me.boot = static_cast<std::uint64_t>(r == 2);
        std::unique_ptr<detail::Registry> registry;
        if (r == 0) registry = std::make_unique<detail::Registry>(detail::listen_anywhere(29'557), me, 10s);
        const auto find = [&] { return detail::NetworkNode::Place{detail::resolve(r == 2 ? "10.213.0.1:29557" : "127.0.1.1:29557"), 0, false, false}; };
        Communicator comm = test::over_tcp(std::make_shared<detail::NetworkNode>(find, me, 10s));
        int x = r;
        comm.all_reduce<OneShot>(std::span(&x, 1), sum);  // all send to all
        test::expect(x == 3, "a sum");
      });
    });
  for (auto& rank : ranks) CHECK(rank.wait(20s));
  for (Rank r = 0; r < 3; ++r) {
    INFO((*results)[static_cast<std::size_t>(r)]);
    CHECK(((*results)[static_cast<std::size_t>(r)].ran && !(*results)[static_cast<std::size_t>(r)].error && !(*results)[static_cast<std::size_t>(r)].foreign));
  }
}

TEST_CASE("a registry that goes without a word, as an earlier job's does, is looked for again") {
  auto listener = detail::listen_at(loopback(4));
  const std::string where = detail::own_address(listener).text();
  std::vector<Caught> results(2);
  std::thread rank_1([&] { results[1] = caught([&] { meet(1, 2, where); }); });
  for (int i = 0; i < 3; ++i) {
    detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s);
    const detail::FileDescriptor guest(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    CHECK(guest.get() >= 0);
  }
  results[0] = caught([&] { meet(0, 2, detail::Meeting(std::move(listener))); });
  rank_1.join();
  for (const Caught& c : results) {
    INFO(c);
    CHECK_FALSE((c.error || c.foreign));
  }
  auto closing = detail::listen_at(loopback(4));
  const std::string never = detail::own_address(closing).text();
  std::atomic<bool> over = false;
  std::thread server([&] {
    while (!over)
      if (detail::wait_for_events(closing.get(), POLLIN, std::chrono::steady_clock::now() + 20ms)) detail::FileDescriptor(::accept4(closing.get(), nullptr, nullptr, SOCK_CLOEXEC));
  });
  const Caught c = caught([&] { meet(1, 2, never, {}, 300ms); });
  over = true;
  server.join();
  CHECK(c.is(Errc::timeout));
  CHECK_THAT(c.text, (Catch::Contains("cannot reach the job's registry at " + never) && Catch::Contains("it was closed before a word was said")) || Catch::Contains("did not speak as a job of tally"));  // the last one was not closed in time
}
namespace {
/// At a port that systems do not give away, so that it is still free between two jobs.
std::string place_to_meet_again() { return "127.0.0.1:" + std::to_string(20'000 + ::getpid() % 12'000); }
}  // namespace

TEST_CASE("init() may be called again and again over TCP, as soon as the communicator before is gone", "[processes]") {
  for (const char* transport : {"tcp", ""}) {  // and where only the meeting is by TCP
    INFO(transport);
    const std::string where = place_to_meet_again();
    const test::Shared<std::array<Caught, 3>> results;
    std::vector<test::Process> ranks;
    for (Rank r = 0; r < 3; ++r)
      ranks.emplace_back([&, r] {
        ::setenv("TALLY_RANK", std::to_string(r).c_str(), 1);
        ::setenv("TALLY_SIZE", "3", 1);
        ::setenv("TALLY_ADDRESS", where.c_str(), 1);
        ::setenv("TALLY_TRANSPORT", transport, 1);
        ::setenv("TALLY_TIMEOUT", "10", 1);
        (*results)[static_cast<std::size_t>(r)].record([&] {
          for (int round = 0; round < 5; ++round) {
            Communicator comm = init();
            int x = round + r;
            comm.all_reduce(std::span(&x, 1), sum);
            test::expect(x == 3 * round + 3, "the sum of this round's");
          }
        });
      });
    for (auto& rank : ranks) CHECK(rank.wait(30s));
    for (const Caught& c : *results) {
      INFO(c);
      CHECK((c.ran && !c.error && !c.foreign));
    }
  }
}

TEST_CASE("who has left a job and is early for the next one waits until that job has ended") {
  const std::string where = place_to_meet_again();
  std::vector<std::shared_ptr<detail::NetworkNode>> nodes(3), next(3);
  on_ranks(3, [&](Rank r) { nodes[static_cast<std::size_t>(r)] = meet(r, 3, where); });
  const detail::JobKey before = nodes[0]->key();
  std::vector<std::thread> early;
  std::atomic<int> met = 0;
  std::vector<Caught> results(3);
  const auto join_next = [&](Rank r) {
    results[static_cast<std::size_t>(r)] = caught([&] { next[static_cast<std::size_t>(r)] = meet(r, 3, where); });
    ++met;
  };
  for (const Rank r : {1, 2}) {
    nodes[static_cast<std::size_t>(r)].reset();
    early.emplace_back(join_next, r);
  }
  std::this_thread::sleep_for(200ms);
  CHECK(met == 0);
  CHECK_FALSE(nodes[0]->is_dead(1));
  nodes[0].reset();
  join_next(0);
  for (auto& rank : early) rank.join();
  for (const Caught& c : results) {
    INFO(c);
    CHECK_FALSE((c.error || c.foreign));
  }
  REQUIRE((next[0] && next[1] && next[2]));
  CHECK(next[1]->key() == next[0]->key());
  CHECK(next[2]->key() == next[0]->key());
  CHECK(next[1]->key() != before);
  // It does so for no longer than its own deadline.
  next[1].reset();
  const Caught c = caught([&] { meet(1, 3, where, {}, 300ms); });
  CHECK(c.is(Errc::timeout));
  CHECK_THAT(c.text, Catch::Contains("for the job before to end"));
}

TEST_CASE("an earlier job's registry that says goodbye is looked for again, and one that dies is not") {
  for (const bool ends : {true, false}) {
    auto listener = detail::listen_at(loopback(4));
    const std::string where = detail::own_address(listener).text();
    std::vector<Caught> results(2);
    std::thread rank_1([&] { results[1] = caught([&] { meet(1, 2, where, "swordfish"); }); });
    detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s);
    {
      detail::ControlStream guest(detail::FileDescriptor(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)));
      guest.put(detail::ControlKind::challenge, detail::Challenge{.secured = 1, .nonce = detail::random_nonce()});
      guest.put(detail::ControlKind::earlier, {});
      if (ends) guest.put(detail::ControlKind::goodbye, detail::Goodbye{});
      guest.write();
    }
    if (ends) results[0] = caught([&] { meet(0, 2, detail::Meeting(std::move(listener)), "swordfish"); });
    rank_1.join();
    INFO(results[0]);
    INFO(results[1]);
    CHECK_FALSE((results[0].error || results[0].foreign));
    CHECK(results[1].error != ends);
    if (!ends) CHECK(results[1].is(Errc::peer_lost));
  }
}

TEST_CASE("ranks meet at the address that all are told, whatever interface rank 0 is to be reached by") {
  const auto own = detail::own_interfaces();
  std::vector<Caught> results(2);
  const auto port = detail::own_address(detail::listen_at(loopback(4))).port;
  const std::string where = "127.0.0.1:" + std::to_string(port);
  on_ranks(2, [&](Rank r) {
    results[static_cast<std::size_t>(r)] = caught([&] { meet(r, 2, detail::Meeting(where), {}, 5s, r == 0 && !own.empty() ? std::string_view(own.front().name) : "lo"); });
  });
  for (const Caught& c : results) {
    INFO(c);
    CHECK_FALSE((c.error || c.foreign));
  }
  CHECK_THROWS_WITH(detail::Meeting("127.0.0.1:0"), Catch::Contains("'127.0.0.1:0' is no place to meet: port 0 is none that ranks can look for"));
}

TEST_CASE("what is no job of tally is not taken for one") {
  const auto listener = detail::listen_at(loopback(4));
  const std::string where = detail::own_address(listener).text();
  SECTION("it says nothing") {
    const Caught c = caught([&] { meet(1, 2, where, {}, 300ms); });
    CHECK(c.is(Errc::timeout));
    CHECK_THAT(c.text, Catch::Contains("reached what listens at " + where + ", but that did not speak as a job of tally"));
  }
  SECTION("it says something else") {
    std::thread server([&] {
      detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s);
      const detail::FileDescriptor guest(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      say(guest, "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n");
    });
    const Caught c = caught([&] { meet(1, 2, where, {}, 5s); });
    server.join();
    CHECK(c.is(Errc::protocol));
    CHECK_THAT(c.text, Catch::Contains("what listens at " + where + " is no job of this version of tally"));
  }
  SECTION("it would like to hear a secret") {
    std::thread server([&] {
      detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s);
      detail::ControlStream guest(detail::FileDescriptor(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)));
      guest.put(detail::ControlKind::challenge, detail::Challenge{.secured = 1});
      detail::Digest nothing{};
      guest.put(detail::ControlKind::welcome, std::string(detail::as_text(nothing)) + std::string(16 + 2 * sizeof(detail::RankEntry), 'x'));
      guest.write();
      std::this_thread::sleep_for(500ms);
    });
    const Caught c = caught([&] { meet(1, 2, where, "swordfish", 5s); });
    server.join();
    CHECK(c.is(Errc::protocol));
    CHECK_THAT(c.text, Catch::Contains("does not know this job's secret"));
  }
}

TEST_CASE("what is known of another host's clock is never further off than it says, whatever the network does") {
  std::mt19937 random(5);
  for (const double ppm : {-60.0, -1.0, 0.0, 40.0}) {
    detail::ClockMap map;
    const Ticks base = 1'000'000'000'000, offset = 7'000'000'000'000;  // ns
    const auto there = [&](Ticks here) { return offset + here + static_cast<Ticks>(static_cast<std::int64_t>(1e-6 * ppm * static_cast<double>(here - base))); };
    Ticks now = base, least = ~Ticks{0};
    std::lognormal_distribution<double> delay(10.5, 1.5);  // median 36 us, often milliseconds
    for (int i = 0; i < 600; ++i) {
      const auto to = static_cast<Ticks>(delay(random)), back = static_cast<Ticks>(delay(random));
      // For a minute every answer is slow, and only one way.
      const Ticks asked = now, answered_there = there(asked + to + (i > 200 && i < 260 ? 80'000'000 : 0));
      now += to + back + (i > 200 && i < 260 ? 80'000'000 : 0);
      map.learn(asked, answered_there, now, 1.0, 1000);
      if (i < 60) CHECK(map.is_settled() == (i >= 7 && (map.width() < 200'000 || i >= 63)));
      const auto error = static_cast<std::int64_t>(map.to_common(now) - there(now));
      REQUIRE(2 * std::abs(error) <= static_cast<std::int64_t>(map.width()) + 2);
      REQUIRE(std::abs(static_cast<std::int64_t>(map.to_here(map.to_common(now)) - now)) <= 1);
      least = std::min(least, map.width());
      if (i > 300) REQUIRE(map.width() < 500'000);
      now += i < 8 ? 1000 : 1'000'000'000;
      const auto a_second_later = static_cast<std::int64_t>(map.to_common(now) - there(now));
      if (i > 100) REQUIRE(std::abs(a_second_later) <= 500'000);
    }
    CHECK(least < 40'000);
    // A clock that is set, or whose host slept: the next answer counts.
    map.learn(now, there(now) + 3'600'000'000'000, now + 50'000, 1.0, 1000);
    CHECK(std::abs(static_cast<std::int64_t>(map.to_common(now) - there(now) - 3'600'000'000'000)) <= 50'000);
  }
}

TEST_CASE("ranks that cannot make a job are told why") {
  const auto join = [](const Job& job, Rank r, auto&& change) {
    detail::Join me = job.like;
    me.rank = r;
    change(me);
    return caught([&] { detail::NetworkNode(test::at(job.address), me, 5s); });
  };
  const auto same = [](detail::Join&) {};
  SECTION("another size") {
    const Job job(3);
    Caught first;
    std::thread rank_1([&] { first = join(job, 1, same); });
    std::this_thread::sleep_for(50ms);
    const Caught c = join(job, 2, [](detail::Join& me) { me.size = 4; });
    rank_1.join();
    for (const Caught& each : {c, first}) {
      INFO(each);
      CHECK(each.is(Errc::mismatch));
      CHECK_THAT(each.text, Catch::Contains("rank 0 says 3, rank 2 says 4"));
    }
  }
  SECTION("twice the same") {
    const Job job(3);
    Caught first;
    std::thread rank_1([&] { first = join(job, 1, same); });
    std::this_thread::sleep_for(50ms);
    const Caught c = join(job, 1, same);
    rank_1.join();
    CHECK_THAT(c.text, Catch::Contains("two processes say that they are rank 1"));
    CHECK_THAT(first.text, Catch::Contains("two processes say that they are rank 1"));
  }
  SECTION("one that is none") {
    const Job job(2);
    CHECK_THAT(join(job, 2, same).text, Catch::Contains("rank 2 is not one of 2"));
  }
  SECTION("one of another job does not disturb") {
    const Job job(2);
    CHECK_THAT(join(job, 1, [](detail::Join& me) { me.job = 77; }).text, Catch::Contains("another job"));
    on_ranks(2, [&](Rank r) { (void)job.join(r); });
  }
  SECTION("late") {
    const Job job(2);
    std::vector<std::shared_ptr<detail::NetworkNode>> nodes(2);
    on_ranks(2, [&](Rank r) { nodes[static_cast<std::size_t>(r)] = job.join(r); });
    CHECK_THAT(join(job, 1, same).text, Catch::Contains("rank 1 comes late"));
  }
  SECTION("not all there") {
    const Job job(4, 4, 300ms);
    Caught c;
    std::thread rank_2([&] { c = join(job, 2, same); });
    rank_2.join();
    INFO(c);
    CHECK(c.is(Errc::timeout));
    CHECK_THAT(c.text, Catch::Contains("3 of 4 ranks did not appear: 0, 1, 3"));
  }
  SECTION("nobody listens") {
    const auto bound = detail::stream_socket(loopback(4));  // but it does not listen
    sockaddr_storage storage{};
    const socklen_t length = loopback(4).fill(storage);
    REQUIRE(::bind(bound.get(), reinterpret_cast<const sockaddr*>(&storage), length) == 0);
    const SocketAddress nowhere = detail::own_address(bound);
    detail::Join me;
    me.rank = 1;
    me.size = 2;
    const Caught c = caught([&] { detail::NetworkNode(test::at(nowhere), me, 200ms); });
    CHECK(c.is(Errc::timeout));
    CHECK_THAT(c.text, Catch::Contains("cannot reach the job's registry at 127.0.0.1:") && Catch::Contains("refused"));
  }
  SECTION("the port is in use, or no address") {
    const auto listener = detail::listen_at(loopback(4));
    CHECK_THROWS_WITH(detail::listen_at(detail::own_address(listener)), Catch::Contains("another job may be using the port"));
    CHECK_THROWS_WITH(detail::resolve("no.such.host.invalid:1"), Catch::Contains("'no.such.host.invalid' does not resolve"));
    for (const char* odd : {"host", "host:", "host:x", "host:70000", "host:-1"}) CHECK_THROWS_WITH(detail::resolve(odd), Catch::Contains("is no address"));
    CHECK(detail::resolve("[::1]:80").front().text() == "[::1]:80");
  }
}

TEST_CASE("512 ranks meet") {
  const int n = test::sanitized ? 64 : most_descriptors() < 4096 ? 100 : 512;
  const Job job(n);
  const auto began = std::chrono::steady_clock::now();
  std::atomic<int> there{0};
  on_ranks(n, [&](Rank r) { there += job.join(r)->size() == n; });
  const auto took = std::chrono::steady_clock::now() - began;
  CHECK(there == n);
  std::printf("%d ranks met in %.0f ms\n", n, std::chrono::duration<double, std::milli>(took).count());
}
