// SPDX-License-Identifier: Apache-2.0
// Memory that all ranks can reach: zero-copy collectives on it run on both transports, refuse what cannot be meant, and
// leave nothing behind; algorithms_test proves them.
#include <catch2/catch.hpp>

#include <dirent.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tally/check.hpp>
#include <tally/tally.hpp>

#include "sanitized.hpp"

using namespace tally;

template <std::size_t N>
struct Sized {
  char bytes[N];
};
// Types of users have but 40 codes: these two share one.
template <>
inline std::uint64_t tally::detail::hash_type<Sized<8>>() {
  return 5;
}
template <>
inline std::uint64_t tally::detail::hash_type<Sized<15>>() {
  return 5;
}

namespace {

void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected: " + what);
}

/// Small integers, so that floats are exact in every order.
float input(Rank r, std::size_t i) { return static_cast<float>((static_cast<std::size_t>(r + 1) * 13 + i * 7) % 101); }
float total(int n, std::size_t i) {
  float sum = 0;
  for (Rank r = 0; r < n; ++r) sum += input(r, i);
  return sum;
}

/// All operations by algorithm A on symmetric or private memory.
template <class A, class Span>
void run_operations(Communicator& comm, const Span& whole, std::size_t count) {
  const Rank me = comm.rank();
  const int n = comm.size();
  const auto m = static_cast<std::size_t>(n);
  const auto part = [&](std::size_t first, std::size_t length) { return whole.subspan(first, length); };
  const auto a = part(0, count * m), b = part(count * m, count * m);
  const auto fill = [&](const auto& span) {
    for (std::size_t i = 0; i < span.size(); ++i) span[i] = input(me, i);
  };
  const auto check = [&](const auto& span, const char* what, auto&& value) {
    for (std::size_t i = 0; i < span.size(); ++i)
      if (span[i] != value(i)) expect(false, std::string(what) + ": element " + std::to_string(i) + " of " + std::to_string(span.size()) + " with " + std::to_string(n) + " ranks");
  };
  const auto same = [&](const auto& span, const char* what) { check(span, what, [&](std::size_t i) { return input(me, i); }); };

  const auto mine = part(0, count), other = part(count * m, count);
  fill(mine);
  Report report = comm.all_reduce<A>(mine, sum);
  check(mine, "all_reduce in place", [&](std::size_t i) { return total(n, i); });
  const std::size_t share = Chunks(Buffer::output, count, n)[me].count * sizeof(float);
  if (count < 100'000)  // one piece, if pieces there are
    for (const std::uint64_t moved : {report.bytes_sent, report.bytes_received})  // loaded and stored, and two meetings, or four where the kernel is tried first
      expect(moved >= share * (m - 1) && moved <= share * (m - 1) + (n == 1 ? 0 : 4 * 24 * 2 * m), "the report's bytes");

  fill(mine);
  comm.all_reduce<A>(mine, other, max);
  same(mine, "input of all_reduce");
  check(other, "all_reduce", [&](std::size_t i) {
    float most = 0;
    for (Rank r = 0; r < n; ++r) most = std::max(most, input(r, i));
    return most;
  });
  for (const Rank root : {0, n - 1}) {
    fill(mine);
    std::fill(other.begin(), other.end(), -1.0f);
    comm.reduce<A>(mine, other, sum, root);
    same(mine, "input of reduce");
    check(other, "reduce", [&](std::size_t i) { return me == root ? total(n, i) : -1.0f; });
    fill(mine);
    comm.broadcast<A>(mine, root);
    check(mine, "broadcast", [&](std::size_t i) { return input(root, i); });
  }
  fill(mine);
  comm.all_gather<A>(mine, b);
  check(b, "all_gather", [&](std::size_t i) { return input(static_cast<Rank>(i / count), i % count); });
  for (std::size_t i = 0; i < count; ++i) a[static_cast<std::size_t>(me) * count + i] = input(me, i);
  comm.all_gather<A>(part(static_cast<std::size_t>(me) * count, count), a);
  check(a, "all_gather in place", [&](std::size_t i) { return input(static_cast<Rank>(i / count), i % count); });
  fill(a);
  comm.reduce_scatter<A>(a, other, sum);
  same(a, "input of reduce_scatter");
  check(other, "reduce_scatter", [&](std::size_t i) { return total(n, static_cast<std::size_t>(me) * count + i); });
  comm.reduce_scatter<A>(a, part(static_cast<std::size_t>(me) * count, count), sum);
  check(part(static_cast<std::size_t>(me) * count, count), "reduce_scatter in place", [&](std::size_t i) { return total(n, static_cast<std::size_t>(me) * count + i); });
  for (const Rank root : {0, n - 1}) {
    const auto block = part(static_cast<std::size_t>(me) * count, count);
    const auto gathered = [&](std::size_t i) { return input(static_cast<Rank>(i / count), i % count); };
    const auto scattered = [&](std::size_t i) { return input(root, static_cast<std::size_t>(me) * count + i); };
    fill(mine);
    std::fill(b.begin(), b.end(), -1.0f);
    comm.gather<A>(mine, b, root);
    check(b, "gather", [&](std::size_t i) { return me == root ? gathered(i) : -1.0f; });
    fill(block);
    comm.gather<A>(block, a, root);
    if (me == root) check(a, "gather in place", gathered);
    fill(a);
    comm.scatter<A>(a, other, root);
    same(a, "input of scatter");
    check(other, "scatter", scattered);
    comm.scatter<A>(a, block, root);
    check(block, "scatter in place", scattered);
  }
  const auto exchanged = [&](std::size_t i) { return input(static_cast<Rank>(i / count), static_cast<std::size_t>(me) * count + i % count); };
  fill(a);
  comm.all_to_all<A>(a, b);
  same(a, "input of all_to_all");
  check(b, "all_to_all", exchanged);
  if constexpr (!SymmetricElements<Span> || !std::same_as<A, ZeroCopy>) {
    comm.all_to_all<A>(a, a);
    check(a, "all_to_all in place", exchanged);
  }
  for (const bool in_place : {false, true}) {
    const auto& out = in_place ? mine : other;
    fill(mine);
    comm.scan<A>(mine, out, sum);
    check(out, "scan", [&](std::size_t i) { return total(me + 1, i); });
    fill(mine);
    std::fill(other.begin(), other.end(), -1.0f);
    comm.exclusive_scan<A>(mine, out, sum);
    check(out, "exclusive_scan", [&](std::size_t i) { return me > 0 ? total(me, i) : in_place ? input(me, i) : -1.0f; });
  }
  comm.barrier();
}

void run_everything(RankKind kind) {
  for (const int n : test::sanitized ? std::vector{1, 2, 3} : std::vector{1, 2, 3, 4, 5, 8})
    launch(n, [](Communicator& comm) {
      const auto m = static_cast<std::size_t>(comm.size());
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, m - 1, m, m + 1, std::size_t{1000}, std::size_t{20'001}}) {
        auto memory = comm.allocate<float>(2 * count * m + 3);
        for (const std::size_t first : {std::size_t{0}, std::size_t{3}}) run_operations<ZeroCopy>(comm, memory.subspan(first, 2 * count * m), count);
        // Not the same place on all ranks.
        run_operations<ZeroCopy>(comm, memory.subspan(static_cast<std::size_t>(comm.rank() % 4), 2 * count * m), count);
      }
    }, kind);
}

/// Pages that this process's memfd files hold.
std::size_t shared_pages() {
  std::size_t blocks = 0;
  DIR* files = ::opendir("/proc/self/fd");
  while (const dirent* entry = ::readdir(files)) {
    const std::string path = std::string("/proc/self/fd/") + entry->d_name;
    char target[256] = {};
    struct stat info {};
    if (::readlink(path.c_str(), target, sizeof target - 1) > 0 && std::string(target).find("memfd:tally") != std::string::npos && ::stat(path.c_str(), &info) == 0)
      blocks += static_cast<std::size_t>(info.st_blocks);
  }
  ::closedir(files);
  return blocks * 512 / 4096;
}

}  // namespace

TEST_CASE("the proof of shares can fail") {
  const auto problem = [](Collective operation, Share (*share)(Shape), bool in_place) { return check({{operation, 0, 4, 0, 8, in_place}, Folding::fixed}, share); };
  CHECK(problem(Collective::all_reduce, [](Shape s) { return Share{s.in.all(), s.out.all()}; }, true).find("read") != std::string::npos);
  CHECK(problem(Collective::all_reduce, [](Shape s) { return Share{s.in[s.me + 1], s.out[s.me]}; }, false).find("folded") != std::string::npos);
  CHECK(problem(Collective::all_reduce, [](Shape s) { return Share{s.in[s.me], s.out[s.me], s.me, -1}; }, false).find("folded") != std::string::npos);
  CHECK(problem(Collective::all_reduce, [](Shape s) { return Share{s.in[0], s.out[0]}; }, false).find("written twice") != std::string::npos);
  CHECK(problem(Collective::all_reduce, [](Shape s) { return Share{s.in[0], s.out.all()}; }, false).find("reads") != std::string::npos);
  CHECK(problem(Collective::all_gather, [](Shape s) { return Share{s.in.all(), s.out[s.me], s.me, s.me}; }, false).find("belongs") != std::string::npos);
  CHECK(problem(Collective::all_to_all, [](Shape s) { return Share{s.in[s.me], s.out[1], -1, s.me, Share::Way::exchange}; }, false).find("beyond") != std::string::npos);
  CHECK(problem(Collective::all_to_all, [](Shape s) { return Share{s.in[s.me + 1], s.out[0], -1, s.me, Share::Way::exchange}; }, false).find("belongs") != std::string::npos);
  CHECK(problem(Collective::scan, [](Shape s) { return Share{s.in[s.me], s.out[s.me], -1, -1, Share::Way::exclusive_scan}; }, false).find("folded") != std::string::npos);
  CHECK(problem(Collective::scan, [](Shape s) { return Share{s.in[s.me], s.out[s.me]}; }, false).find("folded") != std::string::npos);
}

TEST_CASE("zero-copy operations on symmetric memory, threads") { run_everything(threads); }
TEST_CASE("zero-copy operations on symmetric memory, processes", "[processes]") { run_everything(processes); }

TEST_CASE("threads reach each other's private memory") {
  for (const int n : {2, 3, 5})
    launch(n, [](Communicator& comm) {
      const auto m = static_cast<std::size_t>(comm.size());
      for (const std::size_t count : {1u, 7u, 5'000u}) {
        std::vector<float> memory(2 * count * m);
        run_operations<ZeroCopy>(comm, std::span(memory), count);
      }
      std::vector<float> large(100'000, 1.0f);
      const Report report = comm.all_reduce(large, sum);
      expect(report.algorithm_name() == "zero_copy" && large[99'999] == static_cast<float>(comm.size()), "chosen for large data");
    }, threads);
}

TEST_CASE("shares of private memory, staged or copied by the kernel", "[processes]") {
  for (const RankKind kind : {threads, processes})
    for (const int n : test::sanitized ? std::vector{1, 2, 3, 5} : std::vector{1, 2, 3, 4, 5, 9})
      launch(n, [n](Communicator& comm) {
        const auto m = static_cast<std::size_t>(n);
        for (const std::size_t count : {std::size_t{0}, std::size_t{1}, m - 1, m, m + 1, std::size_t{1000}, std::size_t{20'001}}) {
          std::vector<float> memory(2 * count * m + 3);
          for (const std::size_t first : {0u, 3u}) {
            run_operations<Staged>(comm, std::span(memory).subspan(first, 2 * count * m), count);
            run_operations<SingleCopy>(comm, std::span(memory).subspan(first, 2 * count * m), count);
          }
        }
      }, kind);
}

TEST_CASE("staged shares of more than the shared blocks hold", "[processes]") {
  for (const int n : {2, 3})
    launch(n, [n](Communicator& comm) {
      const auto m = static_cast<std::size_t>(n);
      const std::size_t most = 3 * (std::size_t{1} << 20) / 4 / sizeof(float);  // nearly a piece
      for (const std::size_t count : {most - 20'000, most + 1, 5 * most + 7}) {
        if (test::sanitized && count > most) continue;
        std::vector<float> memory(2 * count * m);
        run_operations<Staged>(comm, std::span(memory), count);
        run_operations<SingleCopy>(comm, std::span(memory), count);
      }
      // Types whose size no piece is a multiple of, and what is asked for by name.
      std::vector<long double> wide(300'001);
      std::iota(wide.begin(), wide.end(), static_cast<long double>(comm.rank()));
      const Report report = comm.all_reduce(wide, sum, {.algorithm = "staged"});
      expect(report.algorithm_name() == "staged", "by name");
      for (std::size_t i = 0; i < wide.size(); ++i) expect(wide[i] == static_cast<long double>(m * (m - 1) / 2 + m * i), "long double");
      const std::uint64_t share = report.bytes_received;  // whatever the pieces, and some meetings
      expect(share >= (m - 1) * (wide.size() / m) * sizeof(long double) && share < (m - 1) * (wide.size() / m + 20) * sizeof(long double) + 20 * 24 * m, "bytes");
    });
}

/// From here on this process may not copy between processes.
void forbid_kernel_copies() {
  sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog filter{std::size(program), program};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) throw std::runtime_error("no seccomp here");
}

struct Mine : Staged {
  static constexpr std::string_view name = "mine";
  static Steps all_reduce(Shape shape) { return Ring::all_reduce(shape); }
};

TEST_CASE("an algorithm that inherits from a staged one is what it says itself") {
  CHECK(algorithm_ref<Mine, Collective::all_reduce>().generate != nullptr);
  CHECK(algorithm_ref<Mine, Collective::reduce>().is(Reach::direct));  // its share may lie anywhere
  launch(2, [](Communicator& comm) {
    std::vector<int> data(10, 1);
    expect(comm.all_reduce<Mine>(data, sum).algorithm_name() == "mine" && data[9] == 2, "the ring");
  }, threads);
}

TEST_CASE("where the kernel does not copy, single_copy is staged and says so", "[processes]") {
  launch(3, [](Communicator& comm) {
    std::vector<float> data(10'000, 1.0f);
    expect(comm.explain(Collective::all_reduce, 40'000).find("single_copy is not measured") != std::string::npos, "before");
    if (comm.rank() == 1) forbid_kernel_copies();
    for (int round = 0; round < 3; ++round) {
      std::fill(data.begin(), data.end(), 1.0f);
      const Report report = comm.all_reduce<SingleCopy>(data, sum);
      expect(report.algorithm_name() == "staged" && data[0] == 3 && data[9'999] == 3, "staged on all ranks");
    }
    const std::string why = comm.explain(Collective::all_reduce, 40'000);
    expect(why.find("single_copy is done as staged: the kernel does not copy between the ranks' processes: Operation not permitted") != std::string::npos, why);
    for (const LedgerRow& row : comm.ledger().rows()) expect(comm.ledger().algorithm_name(row.algorithm) != "single_copy" || row.calls == 0, "the ledger knows");
  });
}

TEST_CASE("a rank that dies in a single copy is noticed", "[processes]") {
  for (int round = 0; round < 10; ++round) {
    std::string failure;
    try {
      launch(2, [round](Communicator& comm) {
        std::vector<float> data(4'000'000, 1.0f);
        comm.all_reduce<SingleCopy>(data, sum);
        if (comm.rank() == 1) {
          itimerval soon{{0, 0}, {0, 200 + 300 * round}};
          ::setitimer(ITIMER_REAL, &soon, nullptr);  // SIGALRM ends it
        }
        for (;;) comm.all_reduce<SingleCopy>(data, max);
      });
    } catch (const Error& error) {
      failure = error.what();
    }
    INFO(failure);
    CHECK(failure.find("rank 1: killed by signal 14") != std::string::npos);
  }
}

TEST_CASE("a share that fails ends on all ranks", "[processes]") {
  for (const RankKind kind : {threads, processes})
    for (const bool throws : {true, false})
      for (const std::string_view algorithm : {"staged", "single_copy"})
        launch(3, [throws, algorithm](Communicator& comm) {
          std::vector<double> data(400'000, 1.0);
          int calls = 0;
          const auto op = commutative([&](double a, double b) {
            if (throws && comm.rank() == 1 && ++calls > 100'000) throw std::runtime_error("mine");
            return a + b;
          });
          std::string what;
          try {
            if (throws || comm.rank() != 1) comm.all_reduce(data, op, {.timeout = throws ? std::chrono::seconds(60) : std::chrono::milliseconds(200), .algorithm = algorithm});
          } catch (const std::exception& error) {
            what = error.what();
          }
          if (throws) expect(what.find("mine") != std::string::npos, "the error, not '" + what + "'");
          else expect(comm.rank() == 1 || what.find("rank 1 has not called it") != std::string::npos, "the deadline, not '" + what + "'");
          std::this_thread::sleep_for(std::chrono::milliseconds(comm.rank() == 1 && !throws ? 500 : 0));  // it does not end before the others' deadline
        }, kind);
}

TEST_CASE("symmetric memory is chosen for, read by others, and outlives its communicator", "[processes]") {
  launch(3, [](Communicator& comm) {
    Symmetric<std::int64_t> kept;
    {
      Communicator other = comm.duplicate();
      auto first = other.allocate<std::int64_t>(10'000), second = other.allocate<std::int64_t>(10);
      expect(first[0] == 0 && first[9'999] == 0 && second.size() == 10, "zeroed");
      std::iota(first.begin(), first.end(), comm.rank());
      expect(other.all_reduce(first, sum).algorithm_name() == "zero_copy", "chosen");
      expect(first[9'999] == 3 + 3 * 9'999, "the sum");
      expect(other.all_reduce(first.subspan(3, 10), sum).algorithm_name() != "zero_copy", "not for little data");
      kept = std::move(first);
      kept[1] = comm.rank();
      other.barrier();
      for (Rank r = 0; r < 3; ++r) expect(kept.of(r)[1] == r, "another rank's block");
      other.barrier();
    }
    comm.all_reduce(kept.subspan(100, 5'000), min);
    comm.barrier();
    if (comm.rank() == 1) kept = {};
    comm.barrier();
    if (comm.rank() != 1) kept[5] = 1;
  });
}

TEST_CASE("memory of an allocation goes when the last rank lets go of it", "[processes]") {
  launch(3, [](Communicator& comm) {
    comm.barrier();
    const std::size_t before = shared_pages();
    comm.barrier();
    constexpr std::size_t count = std::size_t{1} << 20;
    for (int round = 0; round < 3; ++round) {
      auto memory = comm.allocate<std::byte>(count);
      comm.barrier();
      expect(shared_pages() >= before + 3 * count / 4096, "pages are counted");
      for (Rank r = 0; r < 3; ++r) {  // in another order each round
        if ((comm.rank() + round) % 3 == r) memory = {};
        comm.barrier();
      }
      expect(shared_pages() <= before + 50, "given back");
      comm.barrier();
    }
  });
}

TEST_CASE("what symmetric memory refuses", "[processes]") {
  launch(2, [](Communicator& comm) {
    const auto message = [](auto&& call) -> std::string {
      try {
        call();
      } catch (const Error& error) {
        return std::string(error.what());
      }
      return "no error";
    };
    const auto says = [&](auto&& call, const std::string& text) {
      const std::string got = message(call);
      expect(got.find(text) != std::string::npos, "'" + text + "' in '" + got + "'");
    };
    std::vector<float> priv(10'000);
    auto memory = comm.allocate<float>(10'000);
    says([&] { comm.all_reduce<ZeroCopy>(priv, sum); }, "needs memory from allocate()");
    says([&] { comm.all_reduce<ZeroCopy>(memory, priv, sum); }, "needs memory from allocate()");
    says([&] { (void)memory.subspan(9'999, 2); }, "subspan");
    says([&] { (void)memory.of(2); }, "not a rank");
    says([&] { (void)comm.allocate<double>(std::size_t{1} << 60); }, "too many");
    says([&] { (void)comm.allocate<double>(comm.rank() == 0 ? 10 : 20); }, "rank 0 asks for 10 elements of 8 bytes (float64), rank 1 for 20 elements");
    says([&] { comm.rank() == 0 ? (void)comm.allocate<double>(10) : (void)comm.allocate<std::int64_t>(10); }, "(float64), rank 1 for 10 elements of 8 bytes (int64)");
    says([&] { (void)comm.allocate<std::byte>(std::size_t{1} << 39); }, comm.rank() == 0 ? "of memory that this host has" : "rank 0 could not reserve it");
    comm.all_reduce(memory, priv, sum);  // still usable, the ordinary way
    Communicator other = comm.duplicate();
    auto second = comm.allocate<float>(10'000);
    says([&] { other.all_reduce(comm.rank() == 0 ? memory.span() : second.span(), sum); }, "does not pass the same symmetric memory");
    Communicator third = comm.duplicate();
    says([&] {
      if (comm.rank() == 0) third.all_reduce(memory, sum);
      else third.all_reduce(priv, sum);
    }, "rank 1 called all_reduce(float32 x 10000, sum, staged)");
  });
}

TEST_CASE("shares of different counts do not match, even where their fingerprints do", "[processes]") {
  constexpr std::size_t counts[] = {600'002, 646'370};
  REQUIRE(detail::Fingerprint::hash_count(counts[0]) == detail::Fingerprint::hash_count(counts[1]));
  for (const RankKind kind : {threads, processes})
    launch(2, [&](Communicator& comm) {
      auto memory = comm.allocate<float>(counts[1]);
      std::string text;
      try {
        comm.all_reduce<ZeroCopy>(memory.subspan(0, counts[comm.rank()]), sum);
      } catch (const Error& error) {
        text = error.what();
      }
      expect(text.find("x 600002") != std::string::npos && text.find("x 646370") != std::string::npos, text);
      expect(memory[0] == 0 && memory[counts[1] - 1] == 0, "untouched");
    }, kind);
}

TEST_CASE("memory of another kind of communicator is refused", "[processes]") {
  launch(2, [](Communicator& comm) {
    std::string text;
    launch(1, [&](Communicator& alone) {  // in this process
      auto foreign = alone.allocate<float>(100'000);
      try {
        comm.all_reduce<ZeroCopy>(foreign, sum);
      } catch (const Error& error) {
        text = error.what();
      }
    }, threads);
    expect(text.find("does not pass the same symmetric memory") != std::string::npos, text);
  });
}

TEST_CASE("the bytes of shares are what other ranks' memory gave and got") {
  for (const int n : {2, 3, 5})
    launch(n, [](Communicator& comm) {
      const auto me = static_cast<std::size_t>(comm.rank()), m = static_cast<std::size_t>(comm.size());
      const std::size_t count = 10 * m;  // elements of a block; every chunk of it is 10
      auto memory = comm.allocate<float>(2 * count * m);
      const auto a = memory.subspan(0, count), b = memory.subspan(count * m, count), all = memory.subspan(count * m, count * m);
      const Report meetings = comm.all_reduce<ZeroCopy>(memory.subspan(0, 0), sum);
      if (m <= 3) expect(meetings.bytes_sent == 2 * (m - 1) * 24 && meetings.bytes_received == meetings.bytes_sent, "meetings");
      const auto is = [&](const Report& report, std::size_t sent, std::size_t received, const std::string& what) {
        const std::uint64_t stored = report.bytes_sent - meetings.bytes_sent, loaded = report.bytes_received - meetings.bytes_received;
        expect(stored == 4 * sent && loaded == 4 * received, what + " stores " + std::to_string(stored) + " and loads " + std::to_string(loaded) + " bytes");
      };
      is(comm.all_reduce<ZeroCopy>(a, b, sum), 10 * (m - 1), 10 * (m - 1), "all_reduce");
      is(comm.reduce<ZeroCopy>(a, b, sum, 1), me == 1 ? 0 : 10, 10 * (m - 1), "reduce");
      is(comm.broadcast<ZeroCopy>(a, 1), me == 1 ? 10 * (m - 1) : 10 * (m - 2), me == 1 ? 0 : 10, "broadcast");
      is(comm.all_gather<ZeroCopy>(a, all), count * (m - 1), 0, "all_gather");
      is(comm.reduce_scatter<ZeroCopy>(all, a, sum), 0, count * (m - 1), "reduce_scatter");
      is(comm.gather<ZeroCopy>(a, all, 1), me == 1 ? 0 : count, 0, "gather");
      is(comm.scatter<ZeroCopy>(all, a, 1), 0, me == 1 ? 0 : count, "scatter");
      is(comm.all_to_all<ZeroCopy>(memory.subspan(0, count * m), all), 0, count * (m - 1), "all_to_all");
      is(comm.scan<ZeroCopy>(a, b, sum), 10 * (m - 1), 10 * (m - 1), "scan");
      is(comm.exclusive_scan<ZeroCopy>(a, b, sum), 10 * (me == 0 ? m - 1 : m - 2), 10 * (me == m - 1 ? m - 1 : m - 2), "exclusive_scan");
    }, threads);
}

TEST_CASE("types of other sizes with one code are told apart where ranks work in each other's memory", "[processes]") {
  for (const char* name : {"zero_copy", "staged", "single_copy"})
    for (const RankKind kind : {threads, processes}) {
      if (kind == processes && std::string_view(name) == "zero_copy") continue;
      std::string what;
      try {
        launch(2, [name](Communicator& comm) {
          std::vector<Sized<8>> small(100), all(200);
          std::vector<Sized<15>> large(100), none;
          if (comm.rank() == 0) comm.gather(small, all, 0, {.algorithm = name});
          else comm.gather(large, none, 0, {.algorithm = name});
        }, kind);
      } catch (const Error& error) {
        if (error.errc() == Errc::mismatch) what = error.what();
      }
      CHECK(what.find("gather(user type #5 x 100") != std::string::npos);
    }
}

TEST_CASE("an allocation that one rank cannot have leaves nothing behind", "[processes]") {
  launch(2, [](Communicator& comm) {
    comm.barrier();
    const std::size_t before = shared_pages();
    comm.barrier();
    rlimit limit{};
    ::getrlimit(RLIMIT_FSIZE, &limit);
    const rlim_t whole = limit.rlim_cur;
    if (comm.rank() == 1) {  // its files may not be long
      limit.rlim_cur = 1 << 20;
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    int refused = 0;
    for (int i = 0; i < 20; ++i) {
      try {
        (void)comm.allocate<std::byte>(std::size_t{8} << 20);
      } catch (const Error& error) {
        refused += error.errc() == Errc::no_resources;
      }
      try {
        (void)comm.duplicate();
      } catch (const Error& error) {
        refused += error.errc() == Errc::no_resources;
      }
    }
    limit.rlim_cur = whole;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    comm.barrier();
    expect(refused == 40, "refused on all ranks: " + std::to_string(refused));
    const std::size_t after = shared_pages();
    expect(after <= before + 8, "given back: " + std::to_string(before) + " pages before, " + std::to_string(after) + " after");  // some slots used first
    comm.barrier();
    auto memory = comm.allocate<float>(1000);
    comm.all_reduce(memory, sum);
  });
}

TEST_CASE("an operator that throws in a share aborts all ranks, and nobody touches private memory afterwards") {
  for (int round = 0; round < 20; ++round)
    launch(3, [](Communicator& comm) {
      auto data = std::make_unique<std::vector<float>>(60'000, 1.0f);
      const bool thrower = comm.rank() == 1;
      const auto op = commutative([thrower](float a, float b) {
        if (thrower) throw std::runtime_error("mine");
        return a + b;
      });
      std::string what;
      try {
        comm.all_reduce<ZeroCopy>(*data, op);
      } catch (const std::exception& error) {
        what = error.what();
      }
      data->assign(data->size(), 5.0f);
      std::this_thread::yield();
      for (const float x : *data) expect(x == 5.0f, "untouched");
      data.reset();
      expect(what.find("mine") != std::string::npos, "the error, not '" + what + "'");
    }, threads);
}
