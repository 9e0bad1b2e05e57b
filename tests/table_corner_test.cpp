// SPDX-License-Identifier: Apache-2.0
// Tables where it gets narrow, in virtual time: scarce credit and priorities, many operations at once, deaths at every moment, deadlines
// on a rank that is busy, accounts of overlapping operations, and peers that talk nonsense.
#include <catch2/catch.hpp>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <tally/algorithms/hierarchical.hpp>
#include <tally/algorithms/recursive.hpp>

#include "processes.hpp"
#include "sanitized.hpp"
#include "table_schedule.hpp"

using namespace tally;
using namespace std::chrono_literals;
using simulated::expect;
using test::has;

namespace {

SimulatedOptions narrow() {
  SimulatedOptions o;
  o.slot_bytes = 8192;
  o.end = 1000s;
  return o;
}

/// What each rank's program threw, empty if nothing; "unended" of one that was killed.
using Words = std::vector<std::string>;

/// Each rank has such a table and runs f(table, network).
template <class T = std::int64_t, class Rule = Add, class F>
Words with_table(int n, const SimulatedOptions& network, const std::vector<TensorSpec>& tensors, const TableOptions& options, F&& f, nanoseconds timeout = 5s) {
  SimulatedNetwork net(n, network);
  Words words(static_cast<std::size_t>(n), "unended");
  try {
    net.run([&](Rank me) {
      std::string& word = words[static_cast<std::size_t>(me)];
      try {
        detail::TableSettings settings;
        settings.clock = net.clock(me);
        settings.timeout = timeout;
        settings.threaded = false;
        ParameterServer<T, Rule> ps(std::make_unique<detail::ErasedTransport<SimulatedTransport>>(std::make_unique<SimulatedTransport>(net, me)), tensors, options, Rule{}, settings);
        f(ps, net, me);
        word.clear();
      } catch (const std::exception& error) {
        word = error.what();
        throw;
      }
    });
  } catch (const std::exception&) {  // it is in words
  }
  return words;
}
void expect_well(const Words& words, Rank except = -1) {
  for (std::size_t r = 0; r < words.size(); ++r) {
    INFO("rank " << r << ": " << words[r]);
    if (static_cast<Rank>(r) != except) CHECK(words[r].empty());
  }
}
bool is_well(const Words& words, Rank r) { return words[static_cast<std::size_t>(r)].empty(); }

}  // namespace

TEST_CASE("any number of pushes in the background") {
  expect_well(with_table(2, narrow(), {{"v", 2}}, {.consistency = asp}, [](auto& ps, SimulatedNetwork&, Rank me) {
    const std::vector<std::int64_t> one{1, 1};
    std::vector<std::int64_t> out(2);
    if (me == 0) {
      std::vector<TableOperation> all;
      for (int i = 0; i < 3000; ++i) all.push_back(ps["v"].async_push(one));
      for (TableOperation& each : all) each.wait();
      ps["v"].pull(out);
      expect(out[0] == 3000 && out[1] == 3000, "all are in, once");
    }
    ps.close();
  }));
}

TEST_CASE("urgent pushes, with credit for one or two: none waits for ever") {
  for (const std::size_t credits : {80u, 160u, 240u})
    expect_well(with_table(2, narrow(), {{"v", 20}}, {.consistency = asp, .credits = credits}, [](auto& ps, SimulatedNetwork&, Rank me) {
      const std::vector<std::int64_t> one(20, 1);
      std::vector<std::int64_t> out(20);
      if (me == 0) {
        std::vector<TableOperation> all;
        for (int i = 0; i < 12; ++i) all.push_back(ps["v"].async_push(one, {.priority = i * 5 % 7}));
        for (TableOperation& each : all) each.wait();
        ps["v"].pull(out);
        expect(out[0] == 12 && out[19] == 12, "all are in, once");
      }
      ps.close();
    }));
}

TEST_CASE("a rule's steps are counted by element, however it is pushed") {
  std::vector<double> together(8), apart(8);
  for (std::vector<double>* values : {&together, &apart})
    expect_well(with_table<double, Adam>(1, narrow(), {{"v", 8}}, {.consistency = asp}, [&](auto& ps, SimulatedNetwork&, Rank) {
      const std::vector<double> gradient(8, 1);
      for (int step = 0; step < 3; ++step)
        if (values == &together) ps["v"].push(gradient);
        else
          for (std::size_t i = 0; i < 8; ++i) ps["v"].range(i, 1).push(std::span(gradient).first(1));
      ps["v"].pull(*values);
      ps.close();
    }));
  CHECK(together[0] != 0);
  CHECK(together == apart);
}

TEST_CASE("what was pushed and not ticked is in when its worker has closed") {
  expect_well(with_table(2, narrow(), {{"v", 2}}, {.consistency = asp, .fold = FoldOrder::by_rank(), .servers = {1}}, [](auto& ps, SimulatedNetwork& net, Rank me) {
    const std::vector<std::int64_t> one{1, 1};
    std::vector<std::int64_t> out(2);
    if (me == 0) {
      ps["v"].push(one);
    } else {
      ps.tick_to(2);
      for (int i = 0; i < 1000 && out[0] == 0; ++i) net.sleep(1ms), ps["v"].pull(out);
      expect(out[0] == 1 && out[1] == 1, "it is in");
    }
    ps.close();
  }));
}

TEST_CASE("a closed table says so") {
  const Words words = with_table(2, narrow(), {{"v", 2}}, {}, [](auto& ps, SimulatedNetwork&, Rank) {
    ps.close();
    ps["v"].push(std::vector<std::int64_t>{1, 1});
  });
  for (const std::string& word : words) CHECK(has(word, "this table is closed"));
}

TEST_CASE("credit is what it was after a server has died, whenever") {
  for (int at = 100; at < 1500; at += test::sanitized ? 31 : 7) {
    SimulatedOptions network = narrow();
    network.killed = 0;
    network.killed_at = std::chrono::microseconds(at);
    const Words words = with_table(3, network, {{"v", 20}}, {.consistency = asp, .servers = {0, 1}, .dedicated = true, .replicas = 1, .credits = 80}, [](auto& ps, SimulatedNetwork&, Rank) {
      if (!ps.is_worker()) return ps.serve(), ps.close();
      const std::vector<std::int64_t> one(20, 1);
      std::vector<std::int64_t> out(20);
      for (int i = 0; i < 30; ++i) ps["v"].push(one);
      ps["v"].pull(out);
      expect(out[0] == 30 && out[19] == 30, "all are in, once");
      ps.close();
    });
    INFO("killed after " << at << " us: " << words[2]);
    CHECK(is_well(words, 2));
  }
}

TEST_CASE("a worker that leaves without a goodbye, and then a server that dies: who is left goes on") {
  for (int at = 0; at < 60'000; at += test::sanitized ? 3100 : 700) {
    SimulatedOptions network = narrow();
    network.killed = 0;
    network.killed_at = 30ms + std::chrono::microseconds(at);
    const Words words = with_table(4, network, {{"v", 20}}, {.consistency = bsp, .servers = {0, 1}, .dedicated = true, .replicas = 1}, [](auto& ps, SimulatedNetwork& net, Rank me) {
      if (me == 1) net.sleep(7ms);
      if (!ps.is_worker()) return ps.serve(), ps.close();
      const std::vector<std::int64_t> one(20, 1);
      std::vector<std::int64_t> out(20);
      ps["v"].push_pull(one, out);
      net.sleep(10ms);
      if (me == 3) return;
      for (int i = 0; i < 20; ++i) ps["v"].push_pull(one, out), net.sleep(5ms);
      expect(out[0] == 22 && out[19] == 22, "all are in, once");
      ps.close();
    });
    INFO("killed " << at << " us later: " << words[2]);
    CHECK(is_well(words, 2));
  }
}

TEST_CASE("I4: whatever the order of pushes, of a worker that dies each is in at all its shards, or at none") {
  for (int at = 50; at < 2000; at += test::sanitized ? 41 : 9) {
    SimulatedOptions network = narrow();
    network.seed = static_cast<std::uint64_t>(at);
    network.latency_most = 100us;
    network.killed = 2;
    network.killed_at = std::chrono::microseconds(at);
    const Words words = with_table(4, network, {{"v", 21}}, {.consistency = asp, .servers = {0, 1}, .dedicated = true, .credits = 300}, [&](auto& ps, SimulatedNetwork& net, Rank me) {
      if (!ps.is_worker()) return ps.serve(), ps.close();
      static const std::vector<std::int64_t> one(21, 1);
      std::vector<std::int64_t> out(21);
      if (me == 2) {
        std::vector<TableOperation> all;
        simulated::Random random(network.seed);
        for (int i = 0; i < 60; ++i) {
          all.push_back(ps["v"].async_push(one, {.priority = static_cast<int>(random.below(3))}));
          if (random.once_in(2)) net.sleep(std::chrono::microseconds(random.below(60)));
          if (random.once_in(3)) (void)all.front().ready();
        }
        for (TableOperation& each : all) each.wait();
        return;
      }
      net.sleep(300ms);
      ps["v"].pull(out);
      expect(out[0] == out[20], std::to_string(out[0]) + " at one shard, " + std::to_string(out[20]) + " at the other");
      ps.close();
    });
    INFO("killed after " << at << " us: " << words[3]);
    CHECK(is_well(words, 3));
  }
}

TEST_CASE("a deadline holds on a rank that others keep busy") {
  expect_well(with_table(4, narrow(), {{"v", 2000}}, {.consistency = bsp, .servers = {0}}, [](auto& ps, SimulatedNetwork& net, Rank me) {
    std::vector<std::int64_t> values(2000, 1);
    if (me == 0) {
      ps.tick();
      const Ticks before = net.clock(0).now();
      try {
        ps["v"].pull(values, {.timeout = 50ms});
        expect(false, "nobody else ticks");
      } catch (const Error& error) {
        expect(error.errc() == Errc::timeout, error.what());
      }
      expect(net.clock(0).now() - before < 200'000'000, "it is over after 50 ms");
    } else {
      std::vector<TableOperation> all;
      for (int i = 0; i < 5000; ++i) all.push_back(ps["v"].range(0, 1).async_push(std::span(values).first(1)));
      for (TableOperation& each : all) each.wait();
      net.sleep(1s);
    }
    ps.close();
  }, 60s));
}

TEST_CASE("who misses one push can push no more, and none that follows is in unless it says so") {
  std::int64_t value = -1;
  bool is_in = false;
  with_table(3, narrow(), {{"v", 2}}, {.consistency = asp, .servers = {0, 1}}, [&](auto& ps, SimulatedNetwork& net, Rank me) {
    const std::vector<std::int64_t> one(2, 1);
    std::vector<std::int64_t> out(2);
    if (me == 0) {
      for (int i = 0; i < 100; ++i) ps["v"].range(0, 1).pull(std::span(out).first(1)), net.sleep(1ms);
      net.sleep(2s);
      ps["v"].range(0, 1).pull(std::span(out).first(1));
      value = out[0];
    }
    if (me == 1) net.sleep(1s);  // and serves nobody meanwhile
    if (me == 2) {
      auto first = ps["v"].async_push(one, {.timeout = 50ms});
      auto second = ps["v"].range(0, 1).async_push(std::span(one).first(1), {.timeout = 50ms});
      CHECK_THROWS_AS(first.wait(), Error);
      try {
        second.wait();
        is_in = true;
      } catch (const Error&) {
      }
      CHECK_THROWS_WITH(ps["v"].push(one), Catch::Contains("a push of this worker's was not finished"));
    }
    ps.close();
  });
  CHECK((value == 0 || is_in));
}

TEST_CASE("ready() alone sees an operation through a server's death") {
  SimulatedOptions network = narrow();
  network.killed = 0;
  network.killed_at = 50ms;
  expect_well(with_table(3, network, {{"v", 20}}, {.consistency = bsp, .servers = {0, 1}, .dedicated = true, .replicas = 1}, [](auto& ps, SimulatedNetwork& net, Rank) {
    if (!ps.is_worker()) return ps.serve(), ps.close();
    const std::vector<std::int64_t> one(20, 1);
    net.sleep(100ms);
    auto push = ps["v"].async_push(one);
    int looks = 0;
    for (; !push.ready() && looks < 2000; ++looks) net.sleep(1ms);
    expect(looks < 1000, "it is done some time");
    push.wait();
    ps.close();
  }), 0);
}

TEST_CASE("credit comes back although messages are lost") {
  for (std::uint64_t seed = 1; seed <= (test::sanitized ? 20 : 100); ++seed) {
    SimulatedOptions network = narrow();
    network.seed = seed;
    network.drop = 0.1;
    const Words words = with_table(3, network, {{"v", 20}}, {.consistency = asp, .servers = {0, 1}, .dedicated = true, .credits = 80, .retry_after = 30ms}, [](auto& ps, SimulatedNetwork&, Rank) {
      if (!ps.is_worker()) return ps.serve(), ps.close();
      const std::vector<std::int64_t> one(20, 1);
      for (int i = 0; i < 30; ++i) ps["v"].push(one);
      ps.close();
    });
    INFO("seed " << seed << ": " << words[2]);
    CHECK(is_well(words, 2));
  }
}

TEST_CASE("each operation's bytes are its own, and together they are the transport's") {
  SimulatedOptions network = narrow();
  network.byte_time_least = network.byte_time_most = 10;
  expect_well(with_table(2, network, {{"v", 100'000}}, {.consistency = asp, .servers = {0}, .dedicated = true}, [](auto& ps, SimulatedNetwork&, Rank) {
    if (!ps.is_worker()) return ps.serve(), ps.close();
    std::vector<std::int64_t> values(100'000), small(1);
    const std::uint64_t before = ps.counters().bytes_received;
    auto all = ps["v"].async_pull(values);
    const Report few = ps["v"].range(0, 1).pull(small).report;
    const Report many = all.wait().report;
    expect(few.bytes_received >= 8 && few.bytes_received < 1000, "of one element: " + std::to_string(few.bytes_received));
    expect(many.bytes_received >= 800'000 && many.bytes_received < 801'000, "of all: " + std::to_string(many.bytes_received));
    expect(few.bytes_received + many.bytes_received == ps.counters().bytes_received - before, "and no others");
    ps.close();
  }));
}

TEST_CASE("a weight that a float cannot hold is refused") {
  const Words words = with_table<double, WeightedAverage>(1, narrow(), {{"v", 2}}, {.fold = FoldOrder::by_rank()}, [](auto& ps, SimulatedNetwork&, Rank) {
    const std::vector<double> one(2, 1);
    ps["v"].push(one, {.weight = 1e-50});
  });
  CHECK(has(words[0], "a weight must be a positive number"));
}

TEST_CASE("a clock to which not all have pushed is folded in every order") {
  const auto folded = [](const FoldOrder& fold) {
    launch(4, [&](Communicator& comm) {
      ParameterServer<float> ps(comm, {{"w", 100}}, {.consistency = bsp, .fold = fold});
      const std::vector<float> in(100, 1);
      std::vector<float> out(100);
      if (comm.rank() != 1) ps["w"].push(in);
      ps.tick();
      ps["w"].pull(out);
      for (const float value : out) expect(value == 3, "three have pushed");
      ps.close();
    }, tally::threads);
  };
  folded(FoldOrder::as<RecursiveDoubling>());
  folded(FoldOrder::as<RecursiveHalving>());
  folded(FoldOrder::as<Hierarchical>());
}

namespace {
struct Padded {
  bool on = true;
  double rate = 1;
  double operator()(double value, double pushed, const Update&) const { return on ? value + rate * pushed : value; }
};
}  // namespace

TEST_CASE("rules that are equal are the same, whatever lies between their members") {
  launch(2, [](Communicator& comm) {
    alignas(Padded) std::byte memory[sizeof(Padded)];
    std::memset(memory, comm.rank() * 85, sizeof memory);
    const Padded& rule = *new (memory) Padded;
    ParameterServer<double, Padded> ps(comm, {{"w", 2}}, {}, rule);
    ps.close();
  }, tally::threads);
}

TEST_CASE("what a worker has started goes on while it does something else, though it serves nothing") {
  const test::Happened pulled;
  launch(3, [&](Communicator& comm) {
    ParameterServer<float> ps(comm, {{"w", 1'000'000}}, {.consistency = bsp, .servers = {2}, .dedicated = true});
    if (comm.rank() == 2) return ps.close();
    const std::vector<float> in(1'000'000, 1);
    std::vector<float> out(1'000'000);
    auto push = ps["w"].async_push(in);
    ps.tick();
    if (comm.rank() == 1) pulled.await();
    ps["w"].pull(out);
    if (comm.rank() == 0) pulled.now();
    expect(out[7] == 2, "both are in");
    push.wait();
    ps.close();
  }, tally::threads);
}

namespace {

/// A peer that says what it likes.
class Stray : private detail::Post::Handler {
 public:
  Stray(AnyTransport& transport, const Clock& clock) : progress_(transport, clock, WaitPolicy::balanced, true), account_(transport.size()), post_(transport, progress_, *this, pool_, 1 << 18) {
    post_.serving = &account_;
    progress_.begin(account_, 60s);
    post_.open(*this);
  }
  void say(const detail::Envelope& e, std::size_t bytes = 0) {
    const std::vector<std::byte>& payload = *said_.emplace_back(std::make_unique<std::vector<std::byte>>(bytes));
    post_.send(*this, 0, e, account_, payload);
  }
  void go_on(int turns) {
    for (int i = 0; i < turns; ++i) progress_.turn(*this), post_.deliver(*this);
  }

  // For Progress.
  OperationAccount& account_of(const Transfer& t) { return post_.account_of(t); }
  OperationAccount& waiting() { return account_; }
  void check(Transfer& t, const FrameInfo& frame) { post_.check(t, frame); }
  void moved(Transfer& t) { post_.moved(t); }
  static std::uint16_t called() { return 0; }
  static Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  static void check_peers() {}
  static Rank first_lost() { return -1; }
  static void raise_lost(Rank) {}
  static void raise_abort() { throw std::runtime_error("aborted"); }
  static void expired() { throw std::runtime_error("expired"); }
  static Ticks expected_wait() { return 0; }
  static bool interrupted() { return false; }
  static bool has_neighbours() { return false; }
  static bool look_elsewhere() { return false; }

 private:
  std::byte* place(Rank, const detail::Envelope&) override { return nullptr; }
  void received(Rank, const detail::Envelope&, detail::Payload&&, Ticks) override {}
  void sent(detail::Post::Parcel&) override {}
  OperationAccount* account_of(Rank, std::uint64_t) override { return nullptr; }
  std::uint64_t bound(const detail::Envelope&) const override { return 1 << 30; }
  Progress<AnyTransport> progress_;
  detail::Pool pool_;
  OperationAccount account_;
  detail::Post post_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> said_;
};

}  // namespace

TEST_CASE("a peer that talks nonsense harms nobody, or is named") {
  using detail::Envelope;
  using detail::MessageKind;
  struct Nonsense {
    std::string what;
    TableOptions options;
    std::function<void(Stray&, Envelope)> say;
    std::string error;  // what rank 0 then says; empty: nothing
  };
  const TableOptions alone{.consistency = asp, .servers = {0}};
  std::vector<Nonsense> all;
  all.push_back({"a push of half a terabyte", alone, [](Stray& s, Envelope e) { e.kind = MessageKind::push, e.bytes = std::uint64_t{1} << 39, s.say(e); }, "rank 1 sent a message that announces 549755813888 bytes"});
  all.push_back({"what is for a replica", alone, [](Stray& s, Envelope e) { e.kind = MessageKind::push, e.flags = Envelope::is_replica, e.index = e.sequence = 1, e.tensor = 999, e.count = 1, e.bytes = 8, s.say(e, 8); }, ""});
  all.push_back({"a primary that sends nonsense to its replica", {.consistency = asp, .servers = {1, 0}, .replicas = 1}, [](Stray& s, Envelope e) { e.kind = MessageKind::push, e.flags = Envelope::is_replica, e.index = e.sequence = 1, e.tensor = 999, e.count = 1, e.bytes = 8, s.say(e, 8); }, "rank 1 sent its replica an entry that cannot be done"});
  all.push_back({"a death that was none", alone, [](Stray& s, Envelope e) { e.kind = MessageKind::gone, e.worker = 0, e.clock = ~std::uint64_t{0}, s.say(e); }, ""});
  all.push_back({"another worker's push", alone, [](Stray& s, Envelope e) { e.kind = MessageKind::push, e.worker = 0, e.sequence = 1, e.count = 1, e.bytes = 8, s.say(e, 8); }, ""});
  all.push_back({"more than its credits", alone, [](Stray& s, Envelope e) {
    for (std::uint64_t i = 1; i <= 900; ++i) {
      e.kind = MessageKind::push, e.sequence = i + 1, e.number = i, e.tensor = 1, e.count = 4000, e.bytes = 32'000;
      s.say(e, 32'000);
      s.go_on(50);
    }
  }, ""});
  all.push_back({"a rank that joins", alone, [](Stray& s, Envelope e) { e.kind = MessageKind::join, e.worker = -1, s.say(e); }, ""});
  all.push_back({"an unknown kind", alone, [](Stray& s, Envelope e) { e.kind = static_cast<MessageKind>(99), s.say(e); }, "rank 1 sent a message of the unknown kind 99"});
  for (const Nonsense& each : all) {
    INFO(each.what);
    SimulatedNetwork net(2, narrow());
    std::string said;
    bool goes_on = false;
    try {
      net.run([&](Rank me) {
        auto transport = std::make_unique<detail::ErasedTransport<SimulatedTransport>>(std::make_unique<SimulatedTransport>(net, me));
        if (me == 1) {
          Stray stray(*transport, net.clock(me));
          Envelope e;
          e.worker = 1;
          e.request = 7 << 16;
          each.say(stray, e);
          try {
            stray.go_on(100'000);
          } catch (const std::exception&) {  // rank 0 has gone
          }
          return;
        }
        detail::TableSettings settings;
        settings.clock = net.clock(me);
        settings.timeout = 2s;
        settings.threaded = false;
        ParameterServer<std::int64_t, Add> ps(std::move(transport), {{"v", 100}, {"big", 4000}}, each.options, Add{}, settings);
        try {
          std::vector<std::int64_t> one(100, 1), out(100);
          const bool serves = each.options.replicas == 0;
          for (int i = 0; i < 100; ++i) {
            net.sleep(1ms);
            if (serves) ps["v"].push(one);
          }
          if (!serves) ps["v"].pull(out);
          if (serves) ps["v"].pull(out);
          goes_on = !serves || out[0] == 100;
        } catch (const std::exception& error) {
          said = error.what();
        }
      });
    } catch (const std::exception&) {
    }
    if (each.error.empty()) CHECK((goes_on && said.empty()));
    else CHECK_THAT(said, Catch::Contains(each.error));
  }
}
