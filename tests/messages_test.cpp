// SPDX-License-Identifier: Apache-2.0
// Messages from rank to rank: which receive gets which, long and short ones, to oneself, many at once, between
// collectives, and everything that can be wrong about them.
#include <catch2/catch.hpp>

#include <map>
#include <numeric>
#include <random>

#include "processes.hpp"

using namespace test;
using namespace std::chrono_literals;
using tally::Communicator, tally::Errc, tally::Rank, tally::Received, tally::any_tag;

namespace {

using Ints = std::vector<int>;

Ints numbered(std::size_t count, int from) {
  Ints data(count);
  std::iota(data.begin(), data.end(), from);
  return data;
}
void run_on(int n, tally::RankKind ranks, const std::function<void(Communicator&)>& body) {
  tally::Options usual, cramped;
  usual.timeout = cramped.timeout = 20s;  // what is lost is not to hold up the rest
  tally::launch(n, body, ranks, usual);
  cramped.slots.slots = 1;
  cramped.slots.slot_bytes = 128;
  tally::launch(n, body, ranks, cramped);
}

void order_of_tags(tally::RankKind ranks) {
  run_on(2, ranks, [](Communicator& comm) {
    constexpr int many = 300;
    const auto length = [](int i) { return static_cast<std::size_t>(i % 7 * 40); };
    // Tag 2 first, then 1, then whatever comes, which are those with tag 0 in their order.
    if (comm.rank() == 0) {
      for (int i = 0; i < many; ++i) {
        const tally::Report report = comm.send(numbered(length(i), i * 1000), 1, i % 3);
        expect(report.bytes_sent == length(i) * sizeof(int), "the send's report has its bytes");
      }
    } else {
      for (const int tag : {2, 1, any_tag})
        for (int i = tag < 0 ? 0 : tag; i < many; i += 3) {
          Ints data(300, -1);
          const Received got = comm.receive(data, 0, tag);
          expect(got.count == length(i) && got.from == 0 && got.tag == i % 3, "the next message of the tag");
          expect(got.report.bytes_received == length(i) * sizeof(int), "the receive's report has its bytes");
          data.resize(got.count);
          expect(data == numbered(length(i), i * 1000), "with its content");
        }
    }
    comm.barrier();
    // Any tag takes them as they were sent, also behind one that is received out of order.
    if (comm.rank() == 0) {
      for (const int tag : {5, 0, 2147483647, 5, 1}) comm.send(Ints{tag, 77}, 1, tag);
    } else {
      Ints data(2);
      expect(comm.receive(data, 0, 2147483647).tag == 2147483647 && data[0] == 2147483647, "the largest tag");
      for (const int tag : {5, 0, 5, 1}) expect(comm.receive(data, 0, any_tag).tag == tag && data[0] == tag, "in the order of the sends");
    }
  });
}

void lengths(tally::RankKind ranks) {
  run_on(3, ranks, [](Communicator& comm) {
    const Rank next = (comm.rank() + 1) % 3, previous = (comm.rank() + 2) % 3;
    // Nothing; less than there is room for: the rest stays; in one go; in many frames.
    for (const std::size_t count : {0u, 1u, 5u, 100u, 20'000u}) {
      Ints data(count + 3, -7);
      const Received got = comm.send_receive(numbered(count, comm.rank() * 10), next, data, previous, 3);
      expect(got.count == count && got.from == previous && got.tag == 3, "told what came");
      expect(got.report.bytes_received == count * sizeof(int) && got.report.bytes_sent == count * sizeof(int) && got.report.bytes_wire >= got.report.bytes_sent, "both ways in the report");
      expect(data[count] == -7 && data[count + 2] == -7, "the rest stays");
      data.resize(count);
      expect(data == numbered(count, previous * 10), "the message");
    }
    // Without any memory at all.
    const Received none = comm.send_receive(std::span<const int>(), next, std::span<int>(), previous);
    expect(none.count == 0, "nothing from nowhere to nowhere");
    // Elements of other sizes, and of one's own.
    struct Point {
      double x, y, z;
    };
    std::vector<Point> points(9), out(50, Point{1, 2, static_cast<double>(comm.rank())});
    tally::Operation receiving = comm.async_receive(points, previous, 9);
    comm.send(std::span(out).first(4), next, 9);
    const Received four = receiving.received<Point>();
    expect(four.count == 4 && points[3].z == previous && points[4].z == 0, "points");
  });
}

void to_oneself(tally::RankKind ranks) {
  run_on(2, ranks, [](Communicator& comm) {
    const Rank me = comm.rank();
    Ints in(10), small(1);
    comm.send(Ints{1, 2, 3}, me, 4);
    comm.send(Ints{4}, me, 5);
    comm.send(Ints{}, me, 5);
    expect(comm.receive(small, me, 5).count == 1 && small[0] == 4, "by tag");
    expect(comm.receive(in, me, any_tag).count == 3 && in[2] == 3, "the first of any");
    expect(comm.receive(in, me, 5).count == 0, "the empty one");
    // The receive first.
    {
      tally::Operation a = comm.async_receive(in, me, 8), b = comm.async_receive(small, me);
      expect(!a.test() && !b.test(), "nothing to receive yet");
      Ints content{9};
      comm.send(content, me);
      content[0] = 0;
      expect(b.received<int>().count == 1 && small[0] == 9, "what was sent, as it was");
      expect(!a.test(), "another tag");
      const Ints ten = numbered(10, 5);
      tally::Operation sending = comm.async_send(ten, me, 8);
      sending.wait();
      expect(a.received<int>().count == 10 && in == numbered(10, 5), "the other");
    }
    const Ints large = numbered(1'000'000, me);
    Ints back(large.size());
    expect(comm.send_receive(large, me, back, me).count == large.size() && back == large, "to and from oneself at once");
    comm.barrier();
  });
  // A receive that nothing can end says so at once; too long a message is one from anyone.
  const Outcome forever = outcome_of(2, ranks, [](Communicator& comm) {
    Ints data(4);
    if (comm.rank() == 1) comm.receive(data, 1, 6);
    else comm.barrier({.timeout = 3s});
  });
  INFO(forever);
  CHECK(forever.ranks[1].is(Errc::invalid_argument));
  CHECK_THAT(forever.ranks[1].text, Catch::Contains("rank 1 would wait for a message from itself for ever"));
  CHECK(forever.ranks[0].error);
  const Outcome too_long = outcome_of(1, ranks, [](Communicator& comm) {
    Ints data(2);
    comm.send(Ints(3), 0);
    comm.receive(data, 0);
  });
  INFO(too_long);
  CHECK(too_long.ranks[0].is(Errc::mismatch));
  CHECK_THAT(too_long.ranks[0].text, Catch::Contains("a message of int32 x 3 with tag 0") && Catch::Contains("receive(int32 x 2 from rank 0, tag 0)"));
}

void large(tally::RankKind ranks) {
  tally::launch(2, [](Communicator& comm) {
    const std::size_t count = std::size_t{4} << 20;
    const Ints out = numbered(count, comm.rank());
    Ints in(count);
    for (int turn = 0; turn < 2; ++turn) {
      expect(comm.send_receive(out, 1 - comm.rank(), in, 1 - comm.rank()).count == count, "16 MiB both ways");
      expect(in == numbered(count, 1 - comm.rank()), "every byte of it");
      std::ranges::fill(in, 0);
    }
    // One that nobody waits for yet is taken in whole.
    if (comm.rank() == 0) comm.send(out, 1, 1), comm.send(Ints{3}, 1, 2);
    else {
      Ints small(1);
      comm.receive(small, 0, 2);
      expect(small[0] == 3 && comm.receive(in, 0, 1).count == count && in == numbered(count, 0), "16 MiB out of order");
    }
  }, ranks);
  tally::launch(5, [](Communicator& comm) {
    const Rank next = (comm.rank() + 1) % 5, previous = (comm.rank() + 4) % 5;
    Ints carried = numbered(200'000, comm.rank()), in(carried.size());
    for (int hop = 0; hop < 5; ++hop) comm.send_receive(carried, next, in, previous, hop), carried.swap(in);
    expect(carried == numbered(carried.size(), comm.rank()), "once around the ring");
  }, ranks);
}

/// All ranks know all messages: who sends what to whom, in which order. Receives are posted in another.
void storm(Communicator& comm, unsigned seed, bool collectives) {
  struct Letter {
    Rank from, to;
    int tag;
    std::size_t count;
  };
  const int n = comm.size();
  const Rank me = comm.rank();
  std::mt19937 random(seed);
  std::vector<Letter> letters(150);
  for (Letter& l : letters) l = {static_cast<Rank>(random() % static_cast<unsigned>(n)), static_cast<Rank>(random() % static_cast<unsigned>(n)), static_cast<int>(random() % 3), random() % 10 == 0 ? random() % 30'000 : random() % 40};
  std::map<std::pair<Rank, int>, std::vector<std::size_t>> awaited;  // of one sender and tag, in their order
  for (std::size_t i = 0; i < letters.size(); ++i)
    if (letters[i].to == me) awaited[{letters[i].from, letters[i].tag}].push_back(i);
  std::mt19937 own(seed * 31 + static_cast<unsigned>(me));
  std::vector<Ints> sent(letters.size()), got(letters.size());
  std::vector<std::pair<std::size_t, tally::Operation>> receives, sends;
  std::size_t next_send = 0;
  const auto send_some = [&] {
    for (int k = 0; k < 5 && next_send < letters.size(); ++next_send) {
      const Letter& l = letters[next_send];
      if (l.from != me) continue;
      sent[next_send] = numbered(l.count, static_cast<int>(next_send));
      sends.emplace_back(next_send, comm.async_send(sent[next_send], l.to, l.tag));
      ++k;
    }
  };
  Ints reduced(500, me + 1);
  int turn = 0;
  while (!awaited.empty() || next_send < letters.size()) {
    if (own() % 2 == 0 || awaited.empty()) send_some();
    if (awaited.empty()) continue;
    auto which = awaited.begin();
    std::advance(which, static_cast<std::ptrdiff_t>(own() % awaited.size()));
    const std::size_t i = which->second.front();
    which->second.erase(which->second.begin());
    got[i].resize(letters[i].count + own() % 3);
    receives.emplace_back(i, comm.async_receive(got[i], letters[i].from, letters[i].tag));
    if (which->second.empty()) awaited.erase(which);
    if (turn++ % 5 == 0 && !receives.empty()) receives[own() % receives.size()].second.test();
  }
  if (collectives) {
    tally::Operation background = comm.async_all_reduce(reduced, tally::sum);
    Ints second(3, 1);
    comm.all_reduce(second, tally::sum);
    comm.barrier();
    expect(second == Ints(3, n), "a collective while messages are in flight");
    background.wait();
    expect(reduced == Ints(500, n * (n + 1) / 2), "one in the background, too");
  }
  std::shuffle(receives.begin(), receives.end(), own);
  for (auto& [i, operation] : receives) {
    const Received r = operation.received<int>();
    expect(r.count == letters[i].count && r.from == letters[i].from && r.tag == letters[i].tag, "the receive got its message");
    got[i].resize(r.count);
    expect(got[i] == numbered(r.count, static_cast<int>(i)), "with its content");
  }
  for (auto& [i, operation] : sends) operation.wait();
}
void many_at_once(tally::RankKind ranks) {
  for (const int n : {1, 2, 3, 5, 8})
    run_on(n, ranks, [](Communicator& comm) {
      for (unsigned seed = 1; seed <= (sanitized ? 2 : 4); ++seed) storm(comm, seed, seed % 2 == 0);
    });
}
void between_collectives(tally::RankKind ranks) {
  run_on(4, ranks, [](Communicator& comm) {
    const int n = comm.size();
    const Rank me = comm.rank();
    for (int turn = 0; turn < 30; ++turn) {
      // Sent before, received after: collectives do not wait for it.
      if (me == 0)
        for (Rank r = 1; r < n; ++r) comm.send(Ints{turn, r}, r, turn);
      Ints data(1 + static_cast<std::size_t>(turn) * 17, 1), word(2);
      comm.all_reduce(data, tally::sum);
      expect(data.front() == n && data.back() == n, "a collective between a send and its receive");
      if (me > 0) {
        comm.receive(word, 0, turn);
        expect(word == Ints{turn, me}, "the message");
      }
      // Posted before, sent after.
      tally::Operation receiving = comm.async_receive(word, (me + 1) % n, 1000 + turn);
      comm.broadcast(data, turn % n);
      comm.send(Ints{me, turn}, (me + n - 1) % n, 1000 + turn);
      comm.barrier();
      receiving.wait();
      expect(word == Ints{(me + 1) % n, turn}, "a receive around collectives");
    }
  });
}

void expect_both(const Outcome& outcome, Errc code, std::initializer_list<std::string_view> parts) {
  INFO(outcome);
  for (const Caught& c : outcome.ranks) {
    CHECK(c.is(code));
    CHECK(c.ended - c.began < 5'000'000'000);
    for (const std::string_view part : parts) CHECK_THAT(std::string(c.text), Catch::Contains(std::string(part)));
  }
}
void that_do_not_fit(tally::RankKind ranks) {
  for (const std::size_t count : {std::size_t{5}, std::size_t{100'000}})
    for (const bool posted_first : {false, true})
      for (const bool out_of_order : {false, true}) {
        const std::string sizes = "rank 0 sends rank 1 a message of int32 x " + std::to_string(count) + " with tag 3";
        expect_both(outcome_of(2, ranks,
                               [&](Communicator& comm) {
                                 if (comm.rank() == 0) {
                                   if (posted_first) std::this_thread::sleep_for(20ms);
                                   comm.send(Ints(count), 1, 3);
                                   if (out_of_order) comm.send(Ints{1}, 1, 4);
                                 } else {
                                   Ints data(4);
                                   if (!posted_first) std::this_thread::sleep_for(20ms);
                                   if (out_of_order) comm.receive(data, 0, 4);
                                   comm.receive(data, 0, 3);
                                 }
                                 comm.barrier();
                               }),
                    Errc::mismatch, {sizes, "receive(int32 x 4 from rank 0, tag 3)"});
      }
  // Another type: also of the same size, and where it would fit.
  expect_both(outcome_of(2, ranks,
                         [](Communicator& comm) {
                           std::vector<float> data(100);
                           if (comm.rank() == 0) comm.send(Ints(6), 1);
                           else comm.receive(data, 0, any_tag);
                           comm.barrier();
                         }),
              Errc::mismatch, {"a message of int32 x 6 with tag 0", "receive(float32 x 100 from rank 0, tag any)"});
  struct One {
    char a[3];
  };
  struct Other {
    char a[5];
  };
  const Outcome own_types = outcome_of(2, ranks, [](Communicator& comm) {
    std::vector<One> ones(5);
    std::vector<Other> others(5);
    if (comm.rank() == 0) comm.send(ones, 1);
    else comm.receive(others, 0);
    comm.barrier();
  });
  expect_both(own_types, Errc::mismatch, {"a message of user type #", "receive(user type #"});
}
void that_never_come(tally::RankKind ranks) {
  const Happened late_over, unread_over, other_over;
  const Outcome late = outcome_of(3, ranks, [&](Communicator& comm) {
    Ints data(4);
    if (comm.rank() == 1) late_over.after([&] { comm.receive(data, 0, 7, {.timeout = 100ms}); });
    else late_over.await();
  });
  INFO(late);
  CHECK(late.ranks[1].is(Errc::timeout));
  CHECK(late.ranks[1].peer == 0);
  CHECK_THAT(late.ranks[1].text, Catch::Contains("rank 1 in receive(int32 x 4 from rank 0, tag 7) waits for data from rank 0 after") && Catch::Contains("rank 0 has called nothing"));
  // A long send that nobody receives.
  const Outcome unread = outcome_of(2, ranks, [&](Communicator& comm) {
    if (comm.rank() == 0) unread_over.after([&] { comm.send(Ints(5'000'000), 1, 7, {.timeout = 100ms}); });
    else unread_over.await();
  });
  INFO(unread);
  CHECK(unread.ranks[0].is(Errc::timeout));
  CHECK_THAT(unread.ranks[0].text, Catch::Contains("rank 0 in send(int32 x 5000000 to rank 1, tag 7) waits for room at rank 1"));
  // Another tag came, which is not the one.
  const Outcome other = outcome_of(2, ranks, [&](Communicator& comm) {
    Ints data(4);
    if (comm.rank() == 0) comm.send(data, 1, 1), other_over.await();
    else other_over.after([&] { comm.receive(data, 0, 2, {.timeout = 100ms}); });
  });
  INFO(other);
  CHECK(other.ranks[1].is(Errc::timeout));
  CHECK_THAT(other.ranks[1].text, Catch::Contains("receive(int32 x 4 from rank 0, tag 2)"));
  // The peer leaves: what it had sent can be received still, more cannot.
  const Outcome gone = outcome_of(2, ranks, [](Communicator& comm) {
    Ints data(2);
    if (comm.rank() == 0) return comm.send(Ints{5, 6}, 1), void();
    std::this_thread::sleep_for(100ms);
    comm.receive(data, 0);
    expect(data == Ints{5, 6}, "what was sent before");
    comm.receive(data, 0);
  });
  INFO(gone);
  CHECK(!gone.ranks[0].error);
  CHECK(gone.ranks[1].is(Errc::peer_left));
  CHECK_THAT(gone.ranks[1].text, Catch::Contains("rank 0 left the communicator while rank 1 in receive(int32 x 2 from rank 0, tag 0)"));
  // A rank that waits in a collective for one that waits for a message that never comes: all learn of it.
  const Outcome stuck = outcome_of(3, ranks, [](Communicator& comm) {
    Ints data(2);
    if (comm.rank() == 2) comm.receive(data, 0, 9, {.timeout = 200ms});
    else comm.all_reduce(data, tally::sum);
  });
  expect_both(stuck, Errc::timeout, {"receive(int32 x 2 from rank 0, tag 9)"});
}
void refused(const std::string& part, const std::function<void()>& f) {
  const Caught c = caught(f);
  expect(c.is(Errc::invalid_argument) && has(c.text, part), "'" + part + "' as error, not: " + (c.error || c.foreign ? c.text : "none"));
}

}  // namespace

static void overlapping(tally::RankKind kind) {
  tally::launch(3, [](Communicator& comm) {
    std::vector<int> data(10, comm.rank());
    const test::Caught c = test::caught([&] { comm.send_receive(std::span(data).first(6), tally::wrap(comm.rank() + 1, 3), std::span(data).last(5), tally::wrap(comm.rank() + 2, 3)); });
    test::expect(c.is(tally::Errc::invalid_argument) && test::has(c.text, "overlap"), c.text);
    test::expect(data == std::vector<int>(10, comm.rank()), "and nothing is moved");
    comm.barrier();
  }, kind);
}
TALLY_TEST_BOTH("what is sent and where it is received must not overlap", "", overlapping)

TALLY_TEST_BOTH("messages of one tag keep their order, tags do not", "", order_of_tags)
TALLY_TEST_BOTH("messages of all lengths", "", lengths)
TALLY_TEST_BOTH("messages to oneself", "", to_oneself)
TALLY_TEST_BOTH("large messages both ways, and rings of them", "", large)
TALLY_TEST_BOTH("many messages in flight, in any order", "", many_at_once)
TALLY_TEST_BOTH("messages between collectives", "", between_collectives)
TALLY_TEST_BOTH("messages that do not fit their receive", "", that_do_not_fit)
TALLY_TEST_BOTH("messages that never come", "", that_never_come)

TEST_CASE("a rank that dies while a message of it is awaited", "[processes]") {
  const Outcome died = outcome_of(3, tally::processes, [](Communicator& comm) {
    Ints data(2);
    if (comm.rank() == 0) std::this_thread::sleep_for(50ms), ::raise(SIGKILL);
    comm.receive(data, comm.rank() == 1 ? 0 : 1, 3);
  });
  INFO(died);
  CHECK(died.ranks[1].is(Errc::peer_lost));
  CHECK_THAT(died.ranks[1].text, Catch::Contains("rank 0 died while rank 1 in receive(int32 x 2 from rank 0, tag 3)"));
  CHECK(died.ranks[2].error);
  CHECK(died.ranks[2].ended - died.ranks[2].began < 5'000'000'000);
}

TEST_CASE("bad arguments of messages are refused before anything is sent") {
  tally::launch(2, [](Communicator& comm) {
    Ints data(3);
    for (const Rank peer : {-1, 2, std::numeric_limits<int>::max()}) {
      refused("send: to " + std::to_string(peer) + " is not a rank; ranks are 0 to 1", [&] { comm.send(data, peer); });
      refused("receive: from " + std::to_string(peer) + " is not a rank", [&] { comm.receive(data, peer); });
    }
    refused("send: tag -1 is out of range: tags are 0 to 2147483647", [&] { comm.send(data, 0, any_tag); });
    refused("receive: tag -2 is out of range: tags are 0 to 2147483647, or any_tag", [&] { comm.receive(data, 0, -2); });
    refused("data is null but has 3 elements", [&] { comm.send(std::span<const int>(static_cast<const int*>(nullptr), 3), 1 - comm.rank()); });
    refused("data is null", [&] { comm.receive(std::span<int>(static_cast<int*>(nullptr), 3), 1 - comm.rank()); });
    refused("a timeout must be longer than 0", [&] { comm.send(data, 1, 0, {.timeout = 0ns}); });
    // A bad half of a send_receive starts neither.
    refused("tag -1", [&] { comm.send_receive(data, 1 - comm.rank(), data, 1 - comm.rank(), any_tag); });
    refused("receive: from 5", [&] { comm.send_receive(data, 1 - comm.rank(), data, 5); });
    Ints in(1);
    comm.send_receive(Ints{comm.rank()}, 1 - comm.rank(), in, 1 - comm.rank());
    expect(in[0] == 1 - comm.rank(), "none of that was sent");
  }, tally::threads);
}
