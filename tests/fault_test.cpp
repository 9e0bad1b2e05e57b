// SPDX-License-Identifier: Apache-2.0
// Networks that delay, slow, damage or cut: results stay right, or the error names what happened, within the deadline; and what the
// network does is the network's fault, not a rank's.
#include <catch2/catch.hpp>

#include <chrono>
#include <numeric>
#include <string>
#include <vector>

#include <tally/network/crc32c.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "fault_proxy.hpp"
#include "network.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::Caught, test::expect, test::FaultProxy, test::Faults, test::Job;

namespace {

/// f(comm) on two ranks; what is sent to rank 1 goes by the bad network.
template <class F>
std::vector<Caught> outcomes(const Faults& faults, F&& f, const TcpOptions& tcp = {}) {
  const Job job(2);
  const FaultProxy proxy(job.address, faults);
  Options options;
  options.timeout = 2s;
  return test::through(job, proxy, tcp, std::forward<F>(f), options);
}
template <class F>
void everyone(const Faults& faults, F&& f, const TcpOptions& tcp = {}) {
  for (const Caught& c : outcomes(faults, f, tcp)) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}
void sums(Communicator& comm, std::size_t count) {
  std::vector<int> data(count);
  std::iota(data.begin(), data.end(), comm.rank());
  comm.all_reduce(std::span(data), sum);
  for (std::size_t i = 0; i < count; ++i) expect(data[i] == 2 * static_cast<int>(i) + 1, "a sum");
}

TcpOptions checked() {
  TcpOptions tcp;
  tcp.checksum = true;
  return tcp;
}

}  // namespace

TEST_CASE("CRC-32C is that of RFC 3720, in pieces and by any means") {
  std::string text(32, '\0');
  CHECK(detail::crc32c(0, text.data(), 32) == 0x8a9136aa);
  text.assign(32, '\xff');
  CHECK(detail::crc32c(0, text.data(), 32) == 0x62a8ab43);
  std::iota(text.begin(), text.end(), '\0');
  CHECK(detail::crc32c(0, text.data(), 32) == 0x46dd794e);
  CHECK(detail::crc32c(0, "123456789", 9) == 0xe3069283);
  std::string longer(1000, '\0');
  for (std::size_t i = 0; i < longer.size(); ++i) longer[i] = static_cast<char>(i * i + 7 * i);
  for (std::size_t cut = 0; cut <= 40; ++cut) {
    const std::uint32_t whole = detail::crc32c_by_tables(0, longer.data() + 1, longer.size() - 1);
    CHECK(detail::crc32c(detail::crc32c(0, longer.data() + 1, cut), longer.data() + 1 + cut, longer.size() - 1 - cut) == whole);
    CHECK(detail::crc32c_by_tables(detail::crc32c_by_tables(0, longer.data() + 1, cut), longer.data() + 1 + cut, longer.size() - 1 - cut) == whole);
  }
}

TEST_CASE("a far and a narrow network change no result, with and without checksums") {
  for (const TcpOptions& tcp : {TcpOptions{}, checked()}) {
    everyone({.delay = 3ms}, [](Communicator& comm) {
      for (const std::size_t count : {1u, 1000u, 300'000u}) sums(comm, count);
    }, tcp);
    everyone({.delay = 1ms, .bytes_per_second = 20e6}, [](Communicator& comm) { sums(comm, 200'000); }, tcp);
  }
}

TEST_CASE("a far network's time is transfer, and nobody's arrival", "[quiet]") {
  everyone({.delay = 20ms}, [](Communicator& comm) {
    sums(comm, 1);
    int sure = 0;
    for (int i = 0; i < 8; ++i) {
      comm.barrier();
      const std::int64_t queued = test::queued_ns();
      const std::int64_t mine = std::chrono::steady_clock::now().time_since_epoch().count();
      int x = 1;
      const Report report = comm.all_reduce(std::span(&x, 1), sum);
      const nanoseconds away(test::queued_ns() - queued);
      std::int64_t all[2];
      comm.all_gather(std::span(&mine, 1), std::span(all));
      // A barrier ends 20 ms earlier at rank 0, so that rank comes first.
      if (comm.rank() == 1) {
        expect(report.wait_arrival <= 5ms + away, "nobody was late: " + std::to_string(report.wait_arrival.count()));
        sure += report.wait_transfer + report.busy() >= 15ms - std::max(0ns, nanoseconds(all[1] - all[0]) - 1ms) - away;
      } else {
        ++sure;
      }
    }
    expect(sure > 0, "what was under way is counted as that");
  });
}

TEST_CASE("what the network damages is noticed, wherever it is") {
  for (const std::size_t at : {60u, 70u, 130u, 500u, 200'000u, 700'000u}) {
    const auto results = outcomes({.damaged = at}, [](Communicator& comm) {
      sums(comm, 1);
      for (int i = 0; i < 4; ++i) sums(comm, 100'000);
    }, checked());
    INFO(at << "; " << results[0] << "; " << results[1]);
    CHECK(results[1].is(Errc::protocol));
    CHECK(results[1].peer == 0);
    CHECK(results[0].is(Errc::protocol));  // as it was told
    CHECK_THAT(results[1].text, Catch::Contains("rank 0 (127.0.0.1:") && Catch::Contains("damaged on its way"));
  }
}

TEST_CASE("a connection that breaks, or that nothing comes over any more, ends the call within its deadline") {
  for (const std::size_t at : {100u, 5000u, 300'000u}) {
    const auto began = std::chrono::steady_clock::now();
    for (const Caught& c : outcomes({.reset_at = at}, [](Communicator& comm) {
           for (int i = 0; i < 8; ++i) sums(comm, 100'000);
         })) {
      INFO(at << "; " << c);
      CHECK(c.is(Errc::peer_lost));
      CHECK((c.peer == 0 || c.peer == 1));
      CHECK_THAT(c.text, Catch::Contains("though that rank is still there") && !Catch::Contains("died"));
    }
    const auto stopped = outcomes({.stop_at = at}, [](Communicator& comm) {
      for (int i = 0; i < 8; ++i) sums(comm, 100'000);
    });
    INFO(at << "; " << stopped[0] << "; " << stopped[1]);
    CHECK((stopped[1].is(Errc::timeout) || stopped[1].is(Errc::aborted)));
    CHECK(std::chrono::steady_clock::now() - began < 15s);
  }
}
