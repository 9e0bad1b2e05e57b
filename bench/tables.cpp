// SPDX-License-Identifier: Apache-2.0
// The parameter server, each part beside what the machine itself needs for it: dense push_pull beside all_reduce, a plain two-sided
// server over TCP and bare loops; rows by keys beside the same rule on a bare array; waiting for a straggler beside what no
// implementation can avoid; what workers notice of a server's death, and whether anything is lost; and resident memory over many steps.
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <tally/parameter_server.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>
#include <thread>
#include <vector>

#include "arguments.hpp"
#include "exact.hpp"
#include "measure.hpp"
#include "plain_ps.hpp"

namespace {

using Json = nlohmann::ordered_json;

struct Settings {
  std::vector<std::size_t> sizes;
  int ranks = 2, rounds = 21, batch = 20'000, turns = 3, late_steps = 60, kills = 20;
  std::uint64_t small_range = 1 << 14, large_range = 1 << 20, seed = 1;
  double straggler_ms = 20, compute_ms = 2;
  std::size_t push_bytes = std::size_t{1} << 20;
  std::int64_t memory_steps = 20'000;
  bool pinned = true;
};

/// Lines for people, and lines for programs if they are wanted. Ranks inherit it and write through the same file.
class Output {
 public:
  explicit Output(const std::string& path) {
    if (path.empty()) return;
    file_.open(path);
    if (!file_) throw std::runtime_error("cannot write '" + path + "'");
  }
  void row(const char* part, const Json& values) {
    if (!file_.is_open()) return;
    Json line{{"part", part}};
    line.update(values);
    file_ << line.dump() << std::endl;
  }
  template <class... Args>
  void say(const char* format, Args... args) const {
    progress.clear();
    std::printf(format, args...);
    std::fflush(stdout);
  }
  const bench::Progress progress{true};

 private:
  std::ofstream file_;
};

/// Memory that all ranks see at the same address: mapped before they are forked. Zeros at first.
template <class T>
class SharedByAll {
 public:
  explicit SharedByAll(std::size_t count) : count_(count), memory_(::mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
  }
  SharedByAll(const SharedByAll&) = delete;
  SharedByAll& operator=(const SharedByAll&) = delete;
  ~SharedByAll() { ::munmap(memory_, count_ * sizeof(T)); }
  T* get() const { return static_cast<T*>(memory_); }
  T& operator[](std::size_t i) const { return get()[i]; }

 private:
  std::size_t count_;
  void* memory_;
};

double seconds(tally::nanoseconds time) { return std::chrono::duration<double>(time).count(); }
void pass(double milliseconds) {
  if (milliseconds > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(milliseconds));
}
/// Rank r and its threads on the r-th core, if there are enough.
void pin(int rank, int ranks, bool wanted) {
  const std::vector<int> cores = bench::allowed_cores();
  if (wanted && cores.size() >= static_cast<std::size_t>(ranks)) bench::pin_to(cores[static_cast<std::size_t>(rank)]);
}
double loads() {
  double load[3] = {};
  return ::getloadavg(load, 3) > 0 ? load[0] : -1;
}

// What launch() calls is compiled for size where it is inlined there, since starting processes is cold; so what is timed is said to be hot.

// Dense.

/// A communicator of the same ranks that talk over TCP on loopback.
tally::Communicator over_tcp(tally::Communicator& here) {
  char where[64] = {};
  std::optional<tally::detail::Meeting> meeting;
  if (here.rank() == 0) {
    meeting.emplace(tally::detail::listen_at(tally::detail::resolve("127.0.0.1:0").front()));
    meeting->text().copy(where, sizeof where - 1);
  }
  here.broadcast(std::span(where), 0);
  if (!meeting) meeting.emplace(std::string(where));
  tally::Options options;
  options.transport = "tcp";
  tally::JobInfo job;
  job.rank = here.rank();
  job.size = here.size();
  return tally::detail::tcp_communicator(job, std::move(*meeting), options, {});
}

struct alignas(64) Flag {
  std::atomic<std::uint32_t> value;
};
/// What all ranks share for the bare loops: a flag each, a window for what each pushes to others, and the values.
struct Arena {
  static constexpr std::size_t piece_bytes = 128 << 10, room = 2 * piece_bytes / sizeof(float);
  Arena(std::size_t n, std::size_t count) : ranks(n), flags(n), windows(n * n * room), values(count) {}
  /// What `from` pushes to `to`.
  float* window(std::size_t from, std::size_t to) const { return windows.get() + (from * ranks + to) * room; }
  std::size_t ranks;
  SharedByAll<Flag> flags;
  SharedByAll<float> windows, values;
};

/// A push_pull by bare loops: rank r keeps part r; what others push to it they copy to where it can see that, it adds all to its values,
/// and everyone copies all values. Piece by piece, so that only buffers and values go through memory, what is handed over stays in caches.
class BareLoops {
 public:
  BareLoops(const Arena& arena, int rank, int ranks) : arena_(arena), rank_(static_cast<std::size_t>(rank)), ranks_(static_cast<std::size_t>(ranks)), crowded_(bench::allowed_cores().size() < ranks_) {}
  [[gnu::noinline, gnu::hot]] void push_pull(std::span<const float> in, std::span<float> out) {
    const std::size_t pieces = std::max<std::size_t>(1, in.size() * sizeof(float) / ranks_ / Arena::piece_bytes);
    for (std::size_t k = 0; k < pieces; ++k) {
      for (std::size_t r = 0; r < ranks_; ++r) {
        const auto [first, count] = piece(in.size(), r, pieces, k);
        if (r != rank_) std::copy_n(in.data() + first, count, arena_.window(rank_, r));
      }
      meet();
      const auto [first, count] = piece(in.size(), rank_, pieces, k);
      fold(first, count, in.data() + first);
      meet();
      for (std::size_t r = 0; r < ranks_; ++r) {
        const auto [begin, many] = piece(in.size(), r, pieces, k);
        std::copy_n(arena_.values.get() + begin, many, out.data() + begin);
      }
    }
  }
 private:
  /// The k-th piece of part r.
  std::pair<std::size_t, std::size_t> piece(std::size_t all, std::size_t r, std::size_t pieces, std::size_t k) const {
    const auto [first, count] = bench::plain_part(all, ranks_, r);
    const auto [within, many] = bench::plain_part(count, pieces, k);
    return {first + within, many};
  }
  void fold(std::size_t first, std::size_t count, const float* own) const {
    float* const values = arena_.values.get() + first;
    const auto window = [&](std::size_t r) { return arena_.window(r, rank_); };
    const std::size_t other = rank_ == 0 ? 1 : 0;
    add_two(values, own, window(other), count);
    for (std::size_t r = other + 1; r < ranks_; ++r)
      if (r != rank_) add(values, window(r), count);
  }
  static void add_two(float* __restrict to, const float* __restrict one, const float* __restrict other, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] += one[i] + other[i];
  }
  static void add(float* __restrict to, const float* __restrict from, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) to[i] += from[i];
  }
  void meet() {
    const std::uint32_t now = arena_.flags[rank_].value.load(std::memory_order_relaxed) + 1;
    arena_.flags[rank_].value.store(now, std::memory_order_release);
    for (std::size_t r = 0; r < ranks_; ++r)
      while (static_cast<std::int32_t>(arena_.flags[r].value.load(std::memory_order_acquire) - now) < 0)
        if (crowded_) std::this_thread::yield();
  }
  const Arena& arena_;
  std::size_t rank_, ranks_;
  bool crowded_;
};

/// Sockets to the next rank and from the previous one.
class Stream {
 public:
  explicit Stream(tally::Communicator& comm) {
    const bench::Socket listener = bench::Socket::listener();
    const int port = listener.port();
    std::vector<int> ports(static_cast<std::size_t>(comm.size()));
    comm.all_gather(std::span(&port, 1), ports);
    next_.emplace(bench::Socket::connected(ports[static_cast<std::size_t>((comm.rank() + 1) % comm.size())]));
    previous_.emplace(listener.accept());
  }
  /// Both ways at once.
  [[gnu::noinline, gnu::hot]] void move(std::span<const float> from, std::span<float> to) const {
    const std::size_t bytes = from.size_bytes();
    for (std::size_t sent = 0, received = 0; sent < bytes || received < bytes;) {
      if (sent < bytes) sent += moved(::send(next_->fd(), reinterpret_cast<const char*>(from.data()) + sent, std::min<std::size_t>(bytes - sent, 256 << 10), MSG_DONTWAIT | MSG_NOSIGNAL));
      if (received < bytes) received += moved(::recv(previous_->fd(), reinterpret_cast<char*>(to.data()) + received, bytes - received, MSG_DONTWAIT));
    }
  }

 private:
  static std::size_t moved(ssize_t result) {
    if (result > 0) return static_cast<std::size_t>(result);
    if (result < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    throw std::runtime_error("a connection is gone");
  }
  std::optional<bench::Socket> next_, previous_;
};

/// One of those that take turns.
struct Contestant {
  const char* name;
  std::function<void()> call;
  enum { unchecked, sum, running_sum } result = unchecked;
  std::uint64_t calls = 0;  // made so far, which a running sum shows
  int per_block = 1;
  std::vector<double> times = {};
};

class Dense {
 public:
  Dense(tally::Communicator& comm, const Settings& settings, const Arena& arena, Output& output)
      : comm_(comm), control_(comm.duplicate()), tcp_(over_tcp(comm)), s_(settings), arena_(arena), output_(output), rank_(static_cast<std::size_t>(comm.rank())), ranks_(static_cast<std::size_t>(comm.size())), stream_(comm) {}

  void run() {
    if (comm_.rank() == 0)
      output_.say("# dense: %d workers, each a server, too. push_pull of a table (add, bsp) over shared memory; all_reduce, same communicator; plain: two-sided over TCP; tcp: the table over TCP\n"
                  "#  bytes   table_us |all_reduce_us table/it |   plain_us  it/table |     tcp_us plain/it | wrong rounds |    copy_us    bare_us  stream_us   least_us table/least\n", comm_.size());
    for (const std::size_t bytes : s_.sizes) size(bytes);
  }

 private:
  void size(std::size_t bytes) {
    const std::size_t count = bytes / sizeof(float);
    const bench::Memory memory(2 * bytes), expectation(bytes), streams(4 * bytes);
    in_ = memory.as<float>(count), out_ = memory.as<float>(count, count), expected_ = expectation.as<float>(count);
    const std::span<float> away = streams.as<float>(2 * count), back = streams.as<float>(2 * count, 2 * count);
    bench::Pattern<float>::input(bench::Reduce::sum, comm_.size(), comm_.rank(), 0).fill(in_);
    bench::Pattern<float>::result(bench::Reduce::sum, comm_.size(), 0).fill(expected_);
    const auto [first, mine] = bench::plain_part(count, ranks_, rank_);
    std::fill_n(arena_.values.get() + first, mine, 0.0f);
    control_.barrier();

    tally::ParameterServer<float> table(comm_, {{"w", count}}), remote(tcp_, {{"w", count}});
    const auto w = table["w"], remote_w = remote["w"];
    const bench::PlainServer server(comm_.size(), first, mine);
    const int port = server.port();
    std::vector<int> ports(ranks_);
    control_.all_gather(std::span(&port, 1), ports);
    bench::PlainWorker plain(ports, rank_, count);
    BareLoops bare(arena_, comm_.rank(), comm_.size());
    static void* (*volatile const copy)(void*, const void*, std::size_t) = std::memcpy;  // no copy is optimised away

    std::vector<Contestant> all{{"table", [&] { w.push_pull(in_, out_); }, Contestant::running_sum},
                                {"all_reduce", [&] { comm_.all_reduce(in_, out_, tally::sum); }, Contestant::sum},
                                {"plain", [&] { plain.push_pull(in_, out_); }, Contestant::running_sum},
                                {"tcp", [&] { remote_w.push_pull(in_, out_); }, Contestant::running_sum},
                                {"copy", [&] { copy(out_.data(), in_.data(), bytes); }},
                                {"bare", [&] { bare.push_pull(in_, out_); }, Contestant::running_sum},
                                {"stream", [&] { stream_.move(away, back); }}};
    std::uint64_t wrong = 0;
    for (int round = -2; round < s_.rounds; ++round) {  // two for memory and models to get used to it
      if (comm_.rank() == 0) output_.progress.show(bench::size_text(bytes) + "B, round " + std::to_string(std::max(0, round + 1)) + " of " + std::to_string(s_.rounds) + " ...");
      for (std::size_t k = 0; k < all.size(); ++k) wrong += block(all[(k + static_cast<std::size_t>(round + 2)) % all.size()], round >= 0);
    }
    table.close();
    remote.close();
    control_.all_reduce(std::span(&wrong, 1), tally::sum);
    if (comm_.rank() == 0) print(bytes, all, wrong);
    if (wrong > 0) throw std::runtime_error(std::to_string(wrong) + " elements were wrong");
  }

  /// A call to get used to it, and as many as last about 3 ms. Wrong elements of the last one.
  std::uint64_t block(Contestant& c, bool counts) {
    std::ranges::fill(out_, -1.0f);
    c.call();
    control_.barrier();
    const double begin = bench::seconds_now();
    for (int i = 0; i < c.per_block; ++i) c.call();
    double took = bench::seconds_now() - begin;
    control_.all_reduce(std::span(&took, 1), tally::max);
    took /= c.per_block;
    c.calls += static_cast<std::uint64_t>(1 + c.per_block);
    c.per_block = static_cast<int>(std::clamp(3e-3 / took, 1.0, 100.0));
    if (counts) c.times.push_back(took);
    if (c.result == Contestant::unchecked) return 0;
    const float times = c.result == Contestant::sum ? 1.0f : static_cast<float>(c.calls);
    std::uint64_t wrong = 0;
    for (std::size_t i = 0; i < out_.size(); ++i) wrong += out_[i] != times * expected_[i];
    return wrong;
  }

  void print(std::size_t bytes, const std::vector<Contestant>& all, std::uint64_t wrong) {
    const auto us = [&](std::size_t c) { return bench::median(all[c].times) * 1e6; };
    const auto ratio = [&](std::size_t a, std::size_t b) {
      std::vector<double> of;
      for (std::size_t i = 0; i < all[a].times.size(); ++i) of.push_back(all[a].times[i] / all[b].times[i]);
      return bench::median(of);
    };
    // Of each rank's own memory at least: its buffers, read and written once, and its part of the values, read and written; a copy reads and writes one buffer.
    const double least = 1 + 1 / static_cast<double>(ranks_);
    const auto text = [](double value) { return bench::cell(value); };
    output_.say("%8s %10s |%13s %8s |%11s %9s |%11s %8s |%6llu %6d |%11s %10s %10s %10s %11s\n", bench::size_text(bytes).c_str(), text(us(0)).c_str(), text(us(1)).c_str(), text(ratio(0, 1)).c_str(), text(us(2)).c_str(), text(ratio(2, 0)).c_str(), text(us(3)).c_str(), text(ratio(2, 3)).c_str(),
                static_cast<unsigned long long>(wrong), s_.rounds, text(us(4)).c_str(), text(us(5)).c_str(), text(us(6)).c_str(), text(least * us(4)).c_str(), text(ratio(0, 4) / least).c_str());
    Json line{{"bytes", bytes}, {"ranks", comm_.size()}, {"rounds", s_.rounds}, {"wrong", wrong}, {"table_by_all_reduce", ratio(0, 1)}, {"plain_by_table", ratio(2, 0)}, {"plain_by_tcp", ratio(2, 3)}, {"table_by_bare", ratio(0, 5)}, {"least_us", least * us(4)}};
    for (const Contestant& c : all) line[std::string(c.name) + "_us"] = bench::median(c.times) * 1e6;
    output_.row("dense", line);
  }

  tally::Communicator& comm_;
  tally::Communicator control_, tcp_;
  const Settings& s_;
  const Arena& arena_;
  Output& output_;
  std::size_t rank_, ranks_;
  Stream stream_;
  std::span<float> in_, out_, expected_;
};

void dense(const Settings& s, Output& output) {
  const Arena arena(static_cast<std::size_t>(s.ranks), *std::ranges::max_element(s.sizes) / sizeof(float));
  tally::launch(s.ranks, [&](tally::Communicator& comm) {
    pin(comm.rank(), comm.size(), s.pinned);
    Dense(comm, s, arena, output).run();
  });
}

// Sparse.

constexpr std::size_t row_elements = 16;

/// Adagrad on rows in an array, found by multiplying: no messages, no hashing, one thread.
class BareRows {
 public:
  explicit BareRows(std::uint64_t range) : rows_(range * 2 * row_elements, 0.0f) {}
  [[gnu::noinline, gnu::hot]] void push(std::span<const std::uint64_t> keys, std::span<const float> values) {
    for (std::size_t i = 0; i < keys.size(); ++i) {
      float* const row = rows_.data() + keys[i] * 2 * row_elements;
      update(row, row + row_elements, values.data() + i * row_elements);
    }
  }
  [[gnu::noinline, gnu::hot]] void pull(std::span<const std::uint64_t> keys, std::span<float> values) const {
    for (std::size_t i = 0; i < keys.size(); ++i) std::copy_n(rows_.data() + keys[i] * 2 * row_elements, row_elements, values.data() + i * row_elements);
  }

 private:
  static void update(float* __restrict row, float* __restrict squares, const float* __restrict pushed) {
    const tally::Adagrad rule;
    std::array<float, row_elements> roots;
    for (std::size_t e = 0; e < row_elements; ++e) squares[e] += pushed[e] * pushed[e];
#if defined(__x86_64__)
    for (std::size_t e = 0; e < row_elements; e += 4) _mm_storeu_ps(&roots[e], _mm_sqrt_ps(_mm_loadu_ps(squares + e)));
#else
    for (std::size_t e = 0; e < row_elements; ++e) roots[e] = std::sqrt(squares[e]);
#endif
    for (std::size_t e = 0; e < row_elements; ++e) row[e] -= rule.rate * pushed[e] / (roots[e] + rule.epsilon);
  }
  std::vector<float> rows_;  // each: values, and their sums of squares
};

/// Workers and servers of a sparse measurement.
struct Cast {
  const char* name;
  int ranks, workers;
  std::vector<tally::Rank> servers;
  bool dedicated;
};

/// A range of keys and what was done with them.
struct KeyRange {
  const char* name;
  std::uint64_t keys;
  BareRows bare{keys};
  std::vector<std::uint32_t> pushes = std::vector<std::uint32_t>(keys);  // of this worker, by key
  double fill = 0;                                                       // seconds
  std::vector<double> push = {}, pull = {}, bare_push = {}, bare_pull = {};
};

class Sparse {
 public:
  Sparse(tally::Communicator& comm, const Settings& settings, const Cast& cast, Output& output) : comm_(comm), s_(settings), cast_(cast), output_(output), random_(settings.seed * 64 + static_cast<std::uint64_t>(comm.rank())) {}

  void run() {
    // asp: nobody waits for others; all pushes are ones, so the rows are the same in whatever order they come.
    std::array<std::uint64_t, 2> ranges{s_.small_range, s_.large_range};
    tally::ParameterServer<float, tally::Adagrad> ps(comm_, {{"small", 0, row_elements, 0, ranges[0] - 1}, {"large", 0, row_elements, 0, ranges[1] - 1}}, {.consistency = tally::asp, .servers = cast_.servers, .dedicated = cast_.dedicated});
    if (!ps.is_worker()) return ps.serve(), ps.close();
    std::array<KeyRange, 2> all{KeyRange{"small", ranges[0]}, KeyRange{"large", ranges[1]}};
    for (KeyRange& range : all) fill(ps, range);
    for (int round = 0; round < s_.rounds; ++round) {
      if (comm_.rank() == 0) output_.progress.show(std::string("sparse, ") + cast_.name + ", round " + std::to_string(round + 1) + " of " + std::to_string(s_.rounds) + " ...");
      for (KeyRange& range : all) {
        std::ranges::generate(keys_, [&] { return random_() % range.keys; });
        const auto rows = ps.sparse(range.name).rows(keys_);
        range.push.push_back(timed([&] { rows.push(ones_); }));
        range.pull.push_back(timed([&] { rows.pull(values_); }));  // ends when the own push is applied, which may be after push() has returned
        range.bare_push.push_back(timed([&] { range.bare.push(keys_, ones_); }));
        range.bare_pull.push_back(timed([&] { range.bare.pull(keys_, values_); }));
        for (const std::uint64_t key : keys_) ++range.pushes[key];
      }
    }
    for (KeyRange& range : all) print(range, check(ps, range));
    ps.close();
  }

 private:
  /// All keys once, in random order, so that later pushes find their rows.
  void fill(auto& ps, KeyRange& range) {
    std::vector<std::uint64_t> keys;
    for (std::uint64_t key = static_cast<std::uint64_t>(comm_.rank()); key < range.keys; key += static_cast<std::uint64_t>(cast_.workers)) keys.push_back(key);
    std::ranges::shuffle(keys, random_);
    range.fill = timed([&] {
      for (std::size_t done = 0; done < keys.size(); done += batch()) {
        const auto some = std::span(std::as_const(keys)).subspan(done, std::min(batch(), keys.size() - done));
        ps.sparse(range.name).rows(some).push(std::span(ones_).first(some.size() * row_elements));
        for (const std::uint64_t key : some) ++range.pushes[key];
      }
    });
  }
  /// Rows of all keys against what so many pushes make of a row.
  std::uint64_t check(auto& ps, KeyRange& range) {
    meet();
    if (cast_.workers > 1) comm_.all_reduce(range.pushes, tally::sum);
    std::vector<float> after{0.0f};
    float squares = 0;
    std::vector<std::uint64_t> keys(batch());
    std::uint64_t wrong = 0;
    for (std::uint64_t first = 0; first < range.keys; first += batch()) {
      keys.resize(std::min<std::uint64_t>(batch(), range.keys - first));
      std::iota(keys.begin(), keys.end(), first);
      ps.sparse(range.name).rows(keys).pull(std::span(values_).first(keys.size() * row_elements));
      for (std::size_t i = 0; i < keys.size() * row_elements; ++i) {
        const std::uint32_t pushes = range.pushes[keys[i / row_elements]];
        while (after.size() <= pushes) after.push_back(tally::Adagrad{}(after.back(), 1.0f, tally::Update{}, squares));
        wrong += values_[i] != after[pushes];
      }
    }
    if (cast_.workers > 1) comm_.all_reduce(std::span(&wrong, 1), tally::sum);
    return wrong;
  }
  void print(const KeyRange& range, std::uint64_t wrong) {
    if (comm_.rank() == 0) {
      const auto rate = [&](const std::vector<double>& times) { return static_cast<double>(batch()) / bench::median(times) / 1e6; };
      const double filled = static_cast<double>(range.keys) / static_cast<double>(cast_.workers) / range.fill / 1e6;
      output_.say("%-22s %9llu %9.3f %9.3f %9.3f |%6llu |%10.2f %10.2f\n", cast_.name, static_cast<unsigned long long>(range.keys), rate(range.push), rate(range.pull), filled, static_cast<unsigned long long>(wrong), rate(range.bare_push), rate(range.bare_pull));
      output_.row("sparse", {{"cast", cast_.name}, {"workers", cast_.workers}, {"range", range.keys}, {"batch", batch()}, {"push_per_s", rate(range.push) * 1e6}, {"pull_per_s", rate(range.pull) * 1e6}, {"new_per_s", filled * 1e6}, {"bare_push_per_s", rate(range.bare_push) * 1e6},
                             {"bare_pull_per_s", rate(range.bare_pull) * 1e6}, {"wrong", wrong}});
    }
    if (wrong > 0) throw std::runtime_error(std::to_string(wrong) + " elements of rows were wrong");
  }
  void meet() {
    if (cast_.workers > 1) comm_.barrier();
  }
  /// Of the slowest worker, all at once.
  double timed(const auto& f) {
    meet();
    const double begin = bench::seconds_now();
    f();
    double took = bench::seconds_now() - begin;
    if (cast_.workers > 1) comm_.all_reduce(std::span(&took, 1), tally::max);
    return took;
  }
  std::size_t batch() const { return static_cast<std::size_t>(s_.batch); }

  tally::Communicator& comm_;
  const Settings& s_;
  const Cast& cast_;
  Output& output_;
  std::mt19937_64 random_;
  std::vector<std::uint64_t> keys_ = std::vector<std::uint64_t>(batch());
  std::vector<float> ones_ = std::vector<float>(batch() * row_elements, 1.0f), values_ = std::vector<float>(batch() * row_elements);
};

void sparse(const Settings& s, Output& output) {
  output.say("# sparse: rows of %zu floats, Adagrad, asp, batches of %d random keys; million keys per second of each worker; new: keys that had no row; bare: the same on an array of the worker's own\n"
             "# ranks                     range    push_M    pull_M     new_M | wrong | bare_push  bare_pull\n", row_elements, s.batch);
  for (const Cast& cast : {Cast{"1 worker that serves", 1, 1, {0}, false}, Cast{"1 worker, 1 server", 2, 1, {1}, true}, Cast{"2 workers that serve", 2, 2, {0, 1}, false}})
    tally::launch(cast.ranks, [&](tally::Communicator& comm) {
      pin(comm.rank(), comm.size(), s.pinned);
      Sparse(comm, s, cast, output).run();
    });
}

// Waiting.

constexpr int late_ranks = 3;

struct Lateness {
  bool rotates;
  double compute_ms, late_ms;
  bool is_late(int rank, int step) const { return rank == (rotates ? step % late_ranks : 0); }
  double ms(int rank, int step) const { return compute_ms + (is_late(rank, step) ? late_ms : 0); }
};

/// What one worker tells.
struct Waited {
  double idle = 0, late = 0, seconds = 0, stale = 0;
};

Waited wait_for_stragglers(tally::Communicator& comm, const tally::Consistency& consistency, const Lateness& lateness, int steps) {
  tally::ParameterServer<float> ps(comm, {{"w", 16384}}, {.consistency = consistency});
  const auto w = ps["w"];
  std::vector<float> values(w.size()), gradient(w.size(), 1.0f);
  Waited waited;
  comm.barrier();
  const double begin = bench::seconds_now();
  for (int step = 0; step < steps; ++step) {
    const tally::Pulled pulled = w.pull(values);
    waited.idle += seconds(pulled.report.idle());
    waited.late += seconds(pulled.report.wait_arrival);
    waited.stale += static_cast<double>(pulled.staleness()) / steps;
    pass(lateness.ms(comm.rank(), step));
    waited.idle += seconds(w.push(gradient).idle());
    ps.tick();
  }
  waited.seconds = bench::seconds_now() - begin;
  ps.close();
  return waited;
}

/// The share of their time that workers who wait must wait if all else takes no time: step k begins when all have ended step k - 1 - staleness.
double least_wait(const tally::Consistency& consistency, const Lateness& lateness, int steps) {
  std::vector<std::array<double, late_ranks>> ended{{}};  // [k]: when step k - 1 did
  std::array<double, late_ranks> waited{};
  for (int step = 0; step < steps; ++step) {
    std::array<double, late_ranks> ends = ended.back();
    for (int r = 0; r < late_ranks; ++r) {
      double& time = ends[static_cast<std::size_t>(r)];
      const double free = time;
      if (consistency.bounded && static_cast<std::uint64_t>(step) >= consistency.staleness) time = std::max(time, std::ranges::max(ended[static_cast<std::size_t>(step) - consistency.staleness]));
      waited[static_cast<std::size_t>(r)] += time - free;
      time += lateness.ms(r, step);
    }
    ended.push_back(ends);
  }
  double share = 0;
  const int first = lateness.rotates ? 0 : 1;
  for (auto r = static_cast<std::size_t>(first); r < late_ranks; ++r) share += waited[r] / ended.back()[r] / (late_ranks - first);
  return share;
}

void waiting(const Settings& s, Output& output) {
  output.say("# waiting: %d workers, each a server, too, 64 KiB, %d steps of %g ms (asleep), one worker's %g ms longer; the others' (rotating: all workers') waits by the table's reports, of their time; least: if all else took no time; medians of %d turns\n"
             "# late       consistency    idle%%  arrival%%    least%%  steps/s   staleness\n", late_ranks, s.late_steps, s.compute_ms, s.straggler_ms, s.turns);
  const std::array<tally::Consistency, 3> consistencies{tally::bsp, tally::ssp(4), tally::asp};
  struct Row {
    std::vector<double> idle = {}, late = {}, rate = {}, stale = {};
  };
  for (const bool rotates : {false, true}) {
    const Lateness lateness{rotates, s.compute_ms, s.straggler_ms};
    std::array<Row, consistencies.size()> rows;
    const SharedByAll<Waited> waited(late_ranks);
    for (int turn = 0; turn < s.turns; ++turn)
      for (std::size_t c = 0; c < consistencies.size(); ++c) {
        output.progress.show("waiting, " + std::string(rotates ? "rotating" : "permanent") + ", " + text_of(consistencies[c]) + ", turn " + std::to_string(turn + 1) + " of " + std::to_string(s.turns) + " ...");
        tally::launch(late_ranks, [&](tally::Communicator& comm) { waited[static_cast<std::size_t>(comm.rank())] = wait_for_stragglers(comm, consistencies[c], lateness, s.late_steps); });
        Waited mean;
        const std::size_t first = rotates ? 0 : 1;
        for (std::size_t r = first; r < late_ranks; ++r) {
          const double part = 1.0 / static_cast<double>(late_ranks - first);
          mean.idle += part * waited[r].idle / waited[r].seconds;
          mean.late += part * waited[r].late / waited[r].seconds;
          mean.seconds += part * s.late_steps / waited[r].seconds;  // a rate
          mean.stale += part * waited[r].stale;
        }
        rows[c].idle.push_back(100 * mean.idle), rows[c].late.push_back(100 * mean.late), rows[c].rate.push_back(mean.seconds), rows[c].stale.push_back(mean.stale);
      }
    for (std::size_t c = 0; c < consistencies.size(); ++c) {
      const double least = 100 * least_wait(consistencies[c], lateness, s.late_steps);
      const Row& row = rows[c];
      output.say("%-12s %-12s %7.2f %9.2f %9.2f %8.1f %11.2f\n", rotates ? "rotating" : "permanent", text_of(consistencies[c]).c_str(), bench::median(row.idle), bench::median(row.late), least, bench::median(row.rate), bench::median(row.stale));
      output.row("waiting", {{"rotates", rotates}, {"consistency", text_of(consistencies[c])}, {"idle_percent", bench::median(row.idle)}, {"arrival_percent", bench::median(row.late)}, {"least_percent", least}, {"steps_per_s", bench::median(row.rate)}, {"staleness", bench::median(row.stale)}});
    }
  }
}

// Failover.

/// A rank in a process of its own, which nobody ends when another one dies. It ends with this object at the latest.
class Member {
 public:
  Member(int rank, int ranks, const std::string& job, const auto& f) {
    std::fflush(nullptr);
    std::cout.flush();
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("cannot start a rank's process");
    if (pid_ > 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    int status = 0;
    try {
      ::setenv("TALLY_RANK", std::to_string(rank).c_str(), 1);
      ::setenv("TALLY_SIZE", std::to_string(ranks).c_str(), 1);
      ::setenv("TALLY_JOB", job.c_str(), 1);
      tally::Communicator comm = tally::init();
      f(comm);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "tables: rank %d: %s\n", rank, error.what());
      status = 1;
    }
    std::fflush(nullptr);
    ::_exit(status);
  }
  Member(Member&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  Member& operator=(Member&&) = delete;
  ~Member() {
    if (pid_ > 0) ::kill(pid_, SIGKILL), ::waitpid(pid_, nullptr, 0);
  }
  void kill() const { ::kill(pid_, SIGKILL); }
  /// Whether it has ended, and throws if it failed.
  bool ended() {
    int status = 0;
    if (pid_ < 0 || ::waitpid(pid_, &status, WNOHANG) != pid_) return pid_ < 0;
    pid_ = -1;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) throw std::runtime_error("a rank that should have gone on failed");
    return true;
  }

 private:
  pid_t pid_ = -1;
};

constexpr int kill_pushes = 400;
/// What ranks and who kills them tell each other.
struct Trial {
  std::atomic<int> pushes[2]{};
  std::atomic<double> killed_at{0};
  double stall[2]{}, usual[2]{}, longest[2]{};  // seconds of the longest push after the death; of the median and the longest before it
  std::uint64_t wrong[2]{};
};

void push_while_servers_die(tally::Communicator& comm, std::size_t count, Trial& trial) {
  // All pushes are of clock 0, so nobody waits; the one pull, at clock 1, has them all.
  tally::ParameterServer<float> ps(comm, {{"w", count}}, {.consistency = tally::bsp, .servers = {2, 3}, .dedicated = true, .replicas = 1});
  if (!ps.is_worker()) return ps.serve(), ps.close();
  const auto me = static_cast<std::size_t>(comm.rank());
  const auto w = ps["w"];
  const std::vector<float> ones(count, 1.0f);
  std::vector<float> values(count);
  std::vector<std::pair<double, double>> times;
  for (int i = 0; i < kill_pushes; ++i) {
    const double begin = bench::seconds_now();
    w.push(ones);
    times.emplace_back(begin, bench::seconds_now());
    trial.pushes[me] = i + 1;
  }
  ps.tick();
  w.pull(values);
  trial.wrong[me] = static_cast<std::uint64_t>(std::ranges::count_if(values, [](float value) { return value != 2.0f * kill_pushes; }));
  std::vector<double> before;
  for (const auto& [begin, end] : times)
    if (end < trial.killed_at) before.push_back(end - begin);
    else trial.stall[me] = std::max(trial.stall[me], end - begin);
  trial.usual[me] = bench::median(before);
  trial.longest[me] = bench::quantile(before, 1);
  ps.close();
}

void failover(const Settings& s, Output& output) {
  output.say("# failover: 2 workers push %s of ones %d times each to 2 servers with replicas; one server is killed (SIGKILL) at a random moment; of the worker that was held up longest\n", bench::size_text(s.push_bytes).c_str(), kill_pushes);
  std::mt19937_64 random(s.seed);
  std::vector<double> stalls, usual, longest;
  std::uint64_t wrong = 0;
  for (int k = 0; k < s.kills; ++k) {
    output.progress.show("failover, " + std::to_string(k + 1) + " of " + std::to_string(s.kills) + " ...");
    const SharedByAll<Trial> shared(1);
    Trial& trial = *new (shared.get()) Trial;
    const std::string job = "tables" + std::to_string(::getpid()) + "." + std::to_string(k);
    std::vector<Member> members;
    for (int r = 0; r < 4; ++r) members.emplace_back(r, 4, job, [&](tally::Communicator& comm) { push_while_servers_die(comm, s.push_bytes / sizeof(float), trial); });
    const std::size_t victim = 2 + random() % 2;
    const int moment = 20 + static_cast<int>(random() % (kill_pushes * 8 / 10));
    const double limit = bench::seconds_now() + 60;
    const auto await = [&](const char* what, const auto& condition) {
      while (!condition())
        if (bench::seconds_now() > limit) throw std::runtime_error(std::string("after 60 s ") + what + " (failover " + std::to_string(k + 1) + ")");
        else ::usleep(50);
    };
    await("the pushes before the server's death are not done", [&] { return trial.pushes[0] >= moment && trial.pushes[1] > 0; });
    ::usleep(static_cast<unsigned>(random() % 1000));
    trial.killed_at = bench::seconds_now();
    members[victim].kill();
    for (const std::size_t r : {std::size_t{0}, std::size_t{1}, 5 - victim}) await("ranks are at work that should have ended", [&] { return members[r].ended(); });
    stalls.push_back(1e3 * std::max(trial.stall[0], trial.stall[1]));
    usual.push_back(1e3 * std::max(trial.usual[0], trial.usual[1]));
    longest.push_back(1e3 * std::max(trial.longest[0], trial.longest[1]));
    wrong += trial.wrong[0] + trial.wrong[1];
    output.row("failover", {{"kill", k + 1}, {"after_pushes", moment}, {"victim", victim}, {"stall_ms", stalls.back()}, {"usual_push_ms", usual.back()}, {"longest_push_before_ms", longest.back()}, {"wrong", trial.wrong[0] + trial.wrong[1]}});
  }
  const auto line = [&](const char* what, const std::vector<double>& of) {
    output.say("%-32s %9.2f %9.2f %9.2f %9.2f %9.2f\n", what, bench::quantile(of, 0), bench::median(of), bench::quantile(of, 0.75), bench::quantile(of, 0.9), bench::quantile(of, 1));
  };
  output.say("# ms of %4d deaths                 least    median       75%%       90%%      most\n", s.kills);
  line("longest push from the death on", stalls);
  line("longest push before it", longest);
  line("median push before it", usual);
  output.say("# of %d acknowledged pushes to each of %zu elements in each of %d tables: %llu elements are not exactly their sum\n", 2 * kill_pushes, s.push_bytes / sizeof(float), s.kills, static_cast<unsigned long long>(wrong));
  if (wrong > 0) throw std::runtime_error("pushes were lost or counted twice");
}

// Memory.

constexpr std::size_t memory_points = 10;
/// Bytes of this process that are in memory, those that it shares included.
double resident_bytes() {
  long all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return static_cast<double>(resident) * static_cast<double>(::sysconf(_SC_PAGESIZE));
}

void memory(const Settings& s, Output& output) {
  output.say("# memory: 2 workers that serve, bsp; a step pushes and pulls 64 KiB and 100 rows of %llu; resident MiB\n#    steps    rank 0    rank 1\n", static_cast<unsigned long long>(s.small_range));
  tally::launch(2, [&](tally::Communicator& comm) {
    tally::ParameterServer<float> ps(comm, {{"w", 16384}, {"rows", 0, row_elements, 0, s.small_range - 1}});
    const auto w = ps["w"];
    std::vector<float> values(w.size(), 1.0f), rows(100 * row_elements, 1.0f);
    std::vector<std::uint64_t> keys(100);
    std::mt19937_64 random(s.seed + static_cast<std::uint64_t>(comm.rank()));
    std::array<double, memory_points> resident{};
    const std::int64_t each = std::max<std::int64_t>(1, s.memory_steps / static_cast<std::int64_t>(memory_points));
    const double begin = bench::seconds_now();
    for (std::size_t point = 0; point < memory_points; ++point) {
      if (comm.rank() == 0) output.progress.show("memory, " + std::to_string(point * 100 / memory_points) + " % ...");
      for (std::int64_t step = 0; step < each; ++step) {
        std::ranges::generate(keys, [&] { return random() % s.small_range; });
        const auto some = ps.sparse("rows").rows(keys);
        w.push(values);
        some.push(rows);
        ps.tick();
        w.pull(values);
        some.pull(rows);
        std::ranges::fill(values, 1.0f);
      }
      resident[point] = resident_bytes();
    }
    const double took = bench::seconds_now() - begin;
    ps.close();
    std::array<double, 2 * memory_points> all{};
    comm.gather(resident, all, 0);
    if (comm.rank() != 0) return;
    for (std::size_t point = 0; point < memory_points; ++point) {
      const auto steps = static_cast<std::int64_t>(point + 1) * each;
      const double mib = 1 << 20;
      output.say("%10lld %9.2f %9.2f\n", static_cast<long long>(steps), all[point] / mib, all[memory_points + point] / mib);
      output.row("memory", {{"steps", steps}, {"resident_bytes", {all[point], all[memory_points + point]}}});
    }
    const double steps = static_cast<double>(each) * (memory_points - 2);  // rows and pools are filled before the second point
    output.say("# from the second point to the last: %+.2f and %+.2f bytes per step; %.0f steps per second\n", (all[memory_points - 1] - all[1]) / steps, (all[2 * memory_points - 1] - all[memory_points + 1]) / steps, static_cast<double>(each * static_cast<std::int64_t>(memory_points)) / took);
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures the parameter server, beside what the machine itself needs for the same."};
  Settings s;
  std::vector<std::string> parts{"dense", "sparse", "waiting", "failover", "memory"}, sizes{"64K", "1M", "16M", "64M"};
  const std::vector<std::string> known = parts;
  std::string json;
  app.add_option("--parts", parts, "of the measurement")->delimiter(',')->check(CLI::IsMember(known))->capture_default_str();
  app.add_option("-n,--ranks", s.ranks, "dense: workers, each a server, too, as processes")->check(CLI::Range(2, 64))->capture_default_str();
  app.add_option("--sizes", sizes, "dense: bytes of the vector, with K, M or G")->delimiter(',')->capture_default_str();
  app.add_option("--rounds", s.rounds, "dense, sparse: in which all that is compared takes turns")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_flag("!--free", s.pinned, "dense, sparse: ranks are not bound to cores");
  app.add_option("--batch", s.batch, "sparse: keys of a push or pull")->check(CLI::Range(1, 1'000'000))->capture_default_str();
  app.add_option("--range", s.large_range, "sparse: keys of the large range")->check(CLI::Range(1, 1 << 26))->capture_default_str();
  app.add_option("--small-range", s.small_range, "sparse, memory: keys of the small range")->check(CLI::Range(1, 1 << 26))->capture_default_str();
  app.add_option("--straggler", s.straggler_ms, "waiting: ms by which one worker is late")->check(CLI::Range(0.0, 1000.0))->capture_default_str();
  app.add_option("--compute", s.compute_ms, "waiting: ms that a step takes otherwise")->check(CLI::Range(0.0, 1000.0))->capture_default_str();
  app.add_option("--late-steps", s.late_steps, "waiting: steps of each worker")->check(CLI::Range(6, 100'000))->capture_default_str();
  app.add_option("--turns", s.turns, "waiting: in which the consistencies are measured")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--kills", s.kills, "failover: servers that are killed, one after the other")->check(CLI::Range(1, 10'000))->capture_default_str();
  std::string push = "1M";
  app.add_option("--push", push, "failover: bytes of a push, with K, M or G")->capture_default_str();
  app.add_option("--steps", s.memory_steps, "memory: steps")->check(CLI::Range(10, 1'000'000'000))->capture_default_str();
  app.add_option("--seed", s.seed, "of random keys and moments")->capture_default_str();
  app.add_option("--json", json, "also JSON lines to this file");
  if (const auto status = bench::parse("tables", app, argc, argv)) return *status;
  const auto size_of = [](const std::string& text) -> std::size_t {
    const auto bytes = bench::parse_size(text);
    if (!bytes || *bytes % sizeof(float) != 0 || *bytes < 64 || *bytes > std::size_t{1} << 30) throw std::invalid_argument("'" + text + "' is no size of whole floats from 64 to 1G bytes");
    return *bytes;
  };
  std::optional<Output> output;
  try {
    for (const std::string& size : sizes) s.sizes.push_back(size_of(size));
    s.push_bytes = size_of(push);
    output.emplace(json);
  } catch (const std::exception& error) {
    std::cerr << "tables: " << error.what() << '\n';
    return 2;
  }
  output->say("# machine  %s\n# load     %.1f at the beginning\n", bench::machine_line().c_str(), loads());
  output->row("machine", {{"machine", bench::machine_line()}, {"load", loads()}});
  const std::pair<const char*, void (*)(const Settings&, Output&)> all[] = {{"dense", dense}, {"sparse", sparse}, {"waiting", waiting}, {"failover", failover}, {"memory", memory}};
  try {
    for (const auto& [name, part] : all)
      if (std::ranges::find(parts, name) != parts.end()) part(s, *output);
  } catch (const std::exception& error) {
    output->progress.clear();
    std::cerr << "tables: " << error.what() << '\n';
    return 1;
  }
  output->say("# load     %.1f at the end\n", loads());
}
