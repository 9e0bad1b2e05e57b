// SPDX-License-Identifier: Apache-2.0
// Recent calls as a trace for ui.perfetto.dev or chrome://tracing: a process per rank of the job, a thread per communicator, a
// slice per call, arrows from who came late to who waited, and the power of each host. An account holds sums and not intervals,
// so a call's parts lie in it one after another, in a fixed order and not in that in which they happened.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "forms.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

namespace detail {

/// The parts of a call in the order in which they are laid down: first the wait for those who came later.
inline constexpr TimeField trace_order[] = {
    {"wait_arrival", &AccountTimes::wait_arrival}, {"wait_local", &AccountTimes::wait_local}, {"wait_credit", &AccountTimes::wait_credit},
    {"wait_transfer", &AccountTimes::wait_transfer}, {"protocol", &AccountTimes::protocol}, {"copy", &AccountTimes::copy},
    {"reduce", &AccountTimes::reduce}, {"codec", &AccountTimes::codec}, {"undriven", &AccountTimes::undriven},
};

/// Microseconds with three digits after the point: exactly the nanoseconds.
inline std::string trace_time(nanoseconds time) {
  const std::string fraction = std::to_string(time.count() % 1000);
  return concat({time.count() / 1000, ".", std::string(3 - fraction.size(), '0'), fraction});
}

class Trace {
 public:
  Trace(std::ostream& out, std::span<const Account> accounts) : out_(out), accounts_(accounts), lanes_(accounts.size()), domains_(domains_of_hosts(accounts)) {
    bool any = false;
    const auto include = [&](nanoseconds time) { origin_ = std::exchange(any, true) ? std::min(origin_, time) : time; };
    for (const Account& account : accounts) {
      last_rank_ = std::max(last_rank_, job_rank(account, account.rank));
      for (const AccountEvent& event : account.recent) include(event.begin + account.clock_offset);
    }
    for (const auto& [key, tells] : domains_)
      for (const PowerSample& sample : tells.account->power)
        if (sample.domain == tells.domain) include(sample.begin + tells.account->clock_offset);
    place();
  }

  void write() {
    out_ << "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[";
    write_names();
    for (std::size_t a = 0; a < accounts_.size(); ++a)
      for (std::size_t e = 0; e < accounts_[a].recent.size(); ++e) write_call(a, e);
    write_arrows();
    write_power();
    out_ << "\n]}\n";
  }

 private:
  struct Place {
    std::size_t account, event;
  };
  nanoseconds begin(std::size_t a, std::size_t e) const { return accounts_[a].recent[e].begin + accounts_[a].clock_offset - origin_; }
  int pid(std::size_t a) const { return job_rank(accounts_[a], accounts_[a].rank); }
  std::size_t tid(std::size_t a, std::size_t e) const { return first_tid_.at({accounts_[a].job, accounts_[a].communicator}) + lanes_[a][e]; }

  /// Slices of one thread must nest, and calls of one communicator may overlap: those that do get further threads.
  void place() {
    std::map<std::pair<std::string_view, std::string_view>, std::size_t> width;
    for (std::size_t a = 0; a < accounts_.size(); ++a) {
      const std::vector<AccountEvent>& recent = accounts_[a].recent;
      std::vector<std::size_t> by_begin(recent.size());
      for (std::size_t e = 0; e < recent.size(); ++e) by_begin[e] = e;
      std::stable_sort(by_begin.begin(), by_begin.end(), [&](std::size_t x, std::size_t y) { return recent[x].begin < recent[y].begin; });
      lanes_[a].resize(recent.size());
      std::vector<nanoseconds> free_from;
      for (const std::size_t e : by_begin) {
        auto lane = std::find_if(free_from.begin(), free_from.end(), [&](nanoseconds free) { return free <= recent[e].begin; });
        if (lane == free_from.end()) lane = free_from.insert(lane, nanoseconds{});
        *lane = recent[e].begin + recent[e].time.elapsed;
        lanes_[a][e] = static_cast<std::size_t>(lane - free_from.begin());
      }
      std::size_t& lanes = width[{accounts_[a].job, accounts_[a].communicator}];
      lanes = std::max(lanes, free_from.size());
    }
    std::size_t next = 1;
    for (const auto& [communicator, lanes] : width) {
      first_tid_[communicator] = next;
      next += lanes;
    }
  }

  /// f(object) adds what the event has beside its phase.
  template <class F>
  void event(std::string_view phase, F&& f) {
    std::string text;
    {
      JsonObject object(text);
      object.add("ph", phase);
      f(object);
    }
    out_ << (std::exchange(first_, false) ? "\n" : ",\n") << text;
  }
  void write_name(std::string_view what, int process, std::size_t thread, std::string_view name) {
    event("M", [&](JsonObject& object) {
      object.add("name", what).add("pid", process).add("tid", thread);
      JsonObject(object.key("args")).add("name", name);
    });
  }
  void write_names() {
    std::map<std::pair<int, std::size_t>, std::string> threads;
    std::map<int, std::string> processes;
    for (std::size_t a = 0; a < accounts_.size(); ++a) {
      processes.try_emplace(pid(a), concat({"rank ", pid(a), " (", accounts_[a].host, ")"}));
      for (const std::size_t lane : lanes_[a]) {
        const std::string name = lane == 0 ? accounts_[a].communicator : concat({accounts_[a].communicator, " (", lane + 1, ")"});
        threads.try_emplace({pid(a), first_tid_.at({accounts_[a].job, accounts_[a].communicator}) + lane}, name);
      }
    }
    for (const auto& [key, tells] : domains_)
      if (hosts_.try_emplace(key.first, last_rank_ + 1 + static_cast<int>(hosts_.size())).second) processes[hosts_[key.first]] = concat({"host ", tells.account->host});
    for (const auto& process : processes) {
      write_name("process_name", process.first, 0, process.second);
      event("M", [&](JsonObject& object) {
        object.add("name", "process_sort_index").add("pid", process.first).add("tid", 0);
        JsonObject(object.key("args")).add("sort_index", process.first);
      });
    }
    for (const auto& [thread, name] : threads) write_name("thread_name", thread.first, thread.second, name);
  }

  void write_slice(std::size_t a, std::size_t e, std::string_view name, std::string_view category, nanoseconds from, nanoseconds duration, std::string_view args) {
    event("X", [&](JsonObject& object) {
      object.add("name", name).add("cat", category).add("pid", pid(a)).add("tid", tid(a, e)).raw("ts", trace_time(from)).raw("dur", trace_time(duration));
      if (!args.empty()) object.raw("args", args);
    });
  }
  void write_call(std::size_t a, std::size_t e) {
    const AccountEvent& call = accounts_[a].recent[e];
    std::string args;
    {
      JsonObject object(args);
      object.add("sequence", call.sequence).add("algorithm", call.algorithm).add("bytes", call.bytes);
      if (call.operation_number != 0) object.add("operation_number", call.operation_number);
      if (call.last_arrival >= 0) object.add("last_arrival", job_rank(accounts_[a], call.last_arrival));
      if (const Quantity& joules = call.energy.gross; joules.known()) object.add("joules", joules.value).add("joules_sigma", joules.sigma).add("provenance", name_of(joules.provenance));
    }
    write_slice(a, e, name_of(call.operation), "call", begin(a, e), call.time.elapsed, args);
    nanoseconds from = begin(a, e), rest = call.time.elapsed;
    for (const TimeField& field : trace_order) {
      const nanoseconds part = std::min(call.time.*field.part, rest);
      if (part <= nanoseconds{0}) continue;
      write_slice(a, e, field.name, "part", from, part, {});
      from += part;
      rest -= part;
    }
  }

  /// From the beginning of the call that came late to the end of the wait for it; messages have no number to find them by.
  void write_arrows() {
    std::map<std::tuple<std::string_view, std::string_view, Rank, std::uint64_t>, Place> calls;
    for (std::size_t a = 0; a < accounts_.size(); ++a)
      for (std::size_t e = 0; e < accounts_[a].recent.size(); ++e)
        if (const std::uint64_t number = accounts_[a].recent[e].operation_number; number != 0)
          calls.try_emplace({accounts_[a].job, accounts_[a].communicator, accounts_[a].rank, number}, Place{a, e});
    std::uint64_t id = 0;
    for (std::size_t a = 0; a < accounts_.size(); ++a)
      for (std::size_t e = 0; e < accounts_[a].recent.size(); ++e) {
        const AccountEvent& waiter = accounts_[a].recent[e];
        const nanoseconds end = begin(a, e) + waiter.time.elapsed, waited = begin(a, e) + waiter.time.wait_arrival;
        if (waiter.operation_number == 0) continue;
        for (const Blame& blame : waiter.waited_for) {
          const auto culprit = calls.find({accounts_[a].job, accounts_[a].communicator, blame.rank, waiter.operation_number});
          if (blame.arrival <= nanoseconds{0} || blame.rank == accounts_[a].rank || culprit == calls.end()) continue;
          const Place from = culprit->second;
          const nanoseconds came = begin(from.account, from.event);
          // An arrow begins within one slice and ends, not earlier, within the other; clocks that do not fit may say otherwise.
          if (came >= end || accounts_[from.account].recent[from.event].time.elapsed <= nanoseconds{0}) continue;
          ++id;
          write_arrow("s", id, from, came);
          write_arrow("f", id, {a, e}, std::min(std::max(waited, came), end - nanoseconds{1}));
        }
      }
  }
  void write_arrow(std::string_view phase, std::uint64_t id, Place place, nanoseconds time) {
    event(phase, [&](JsonObject& object) {
      if (phase == "f") object.add("bp", "e");
      object.add("name", "made wait").add("cat", "blame").add("id", id).add("pid", pid(place.account)).add("tid", tid(place.account, place.event)).raw("ts", trace_time(time));
    });
  }

  /// A counter keeps its value until the next one: the last one is said once more at the end of its window.
  void write_power() {
    for (const auto& entry : domains_) {
      const TellsOfDomain& tells = entry.second;
      const int host = hosts_.at(entry.first.first);
      const std::string name = concat({tells.account->domains[tells.domain].key, " watts"});
      const auto point = [&](nanoseconds time, double watts) {
        if (!std::isfinite(watts)) return;
        event("C", [&](JsonObject& object) {
          object.add("name", name).add("pid", host).raw("ts", trace_time(time + tells.account->clock_offset - origin_));
          JsonObject(object.key("args")).add("watts", watts);
        });
      };
      const PowerSample* last = nullptr;
      for (const PowerSample& sample : tells.account->power)
        if (sample.domain == tells.domain) point((last = &sample)->begin, sample.watts);
      if (last) point(last->end, last->watts);
    }
  }

  std::ostream& out_;
  std::span<const Account> accounts_;
  std::vector<std::vector<std::size_t>> lanes_;  // of each account's calls: which of its communicator's threads it is on
  std::map<std::pair<std::string, std::string>, TellsOfDomain> domains_;
  std::map<std::pair<std::string_view, std::string_view>, std::size_t> first_tid_;
  std::map<std::string, int> hosts_;  // their pids, after those of the ranks
  nanoseconds origin_{};
  Rank last_rank_ = -1;
  bool first_ = true;
};

}  // namespace detail

/// JSON of the Chrome trace event format. Times are of rank 0's clock, from the earliest on. The stream's state tells whether all
/// was written.
inline void write_perfetto(std::ostream& out, std::span<const Account> accounts) { detail::Trace(out, accounts).write(); }

}  // namespace tally::inline v0
