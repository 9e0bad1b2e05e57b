// SPDX-License-Identifier: Apache-2.0
// What a job's account comes to, in plain words: which rank slows it, by how much and at what cost, or why no rank does. It is
// what a report opens with. That not every wait has a culprit, and not every joule a meter, is said rather than passed over.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../figures.hpp"
#include "../text.hpp"
#include "job.hpp"

namespace tally::inline v0 {

/// What holds a job up.
enum class Finding : std::uint8_t { no_calls, not_timed, single_rank, little_waiting, one_rank, several_ranks, spread, transfer, credit, local };

constexpr std::string_view name_of(Finding finding) {
  constexpr std::string_view names[] = {"no_calls", "not_timed", "single_rank", "little_waiting", "one_rank", "several_ranks", "spread", "transfer", "credit", "local"};
  return names[static_cast<std::size_t>(finding)];
}

struct Verdict {
  Finding finding = Finding::no_calls;
  std::string headline;             // one short sentence
  std::string detail;               // what it amounts to: time, share, joules with their source and error
  std::vector<std::string> asides;  // whole sentences that belong beside it
  std::vector<Rank> ranks;          // those at fault, worst first; empty where no rank stands out
};

/// Waiting for others below this part of the ranks' time is not worth a search.
inline constexpr double little_waiting = 0.02;

namespace detail {

inline double seconds_of(nanoseconds t) { return 1e-9 * static_cast<double>(t.count()); }

/// "41.2 J (modelled, +- 40 %)"
inline std::string drawn_text(const Quantity& q) {
  const double relative = q.value > 0 ? q.sigma / q.value : 0;
  return concat({joules_text(q.value), " (", name_of(q.provenance), relative > 0 ? concat({", +- ", percent_text(relative)}) : "", ")"});
}

/// "3", "3 and 5", "3, 5 and 7", "3, 5, 7 and 9 others".
inline std::string ranks_text(std::span<const Rank> ranks) {
  constexpr std::size_t most = 4;
  const std::size_t named = ranks.size() <= most ? ranks.size() : most - 1;
  std::string text;
  for (std::size_t i = 0; i < named; ++i) text += concat({i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]});
  if (named < ranks.size()) text += concat({" and ", ranks.size() - named, " others"});
  return text;
}

/// Hands on what it waited itself: that is where most of what could be followed of its charge leads. Parts that could not be
/// followed (see JobAccount::followed) are still charged to it.
inline bool hands_on(const JobAccount& job, const Straggler& each) {
  return each.passed_on > nanoseconds{0} && seconds_of(each.passed_on) > 0.5 * job.followed * (seconds_of(each.caused) + seconds_of(each.passed_on));
}
/// Those that are to blame alike: the worst that does not hand on, and others that caused at least half as much. If all hand on, the
/// worst of them.
inline std::vector<Straggler> worst_stragglers(const JobAccount& job) {
  std::vector<Straggler> worst;
  for (const bool all : {false, true})
    for (const Straggler& each : job.stragglers)
      if ((all ? worst.empty() : !hands_on(job, each)) && each.caused > nanoseconds{0} && (worst.empty() || 2 * each.share >= worst.front().share)) worst.push_back(each);
  return worst;
}

class Judge {
 public:
  Judge(const JobAccount& job, std::span<const Account> accounts) : job_(job), accounts_(accounts) {
    for (const AccountRow& row : job.rows) calls_ += row.calls, failed_ += row.failed;
    arrival_ = seconds_of(job.time.wait_arrival);
    transfer_ = seconds_of(job.time.wait_transfer);
    credit_ = seconds_of(job.time.wait_credit);
    local_ = std::max(0.0, seconds_of(job.time.wait_local) - seconds_of(job.time.queued));  // queued: the thread was at work for others
    time_ = job.elapsed > nanoseconds{0} ? seconds_of(job.elapsed) * job.there() : seconds_of(job.time.elapsed);
  }

  Verdict judge() {
    find();
    set_beside();
    return std::move(verdict_);
  }

 private:
  static std::string text_of(double seconds) { return time_text(nanoseconds(static_cast<std::int64_t>(std::min(9e18, seconds * 1e9)))); }
  void say(Finding finding, std::string headline, std::string detail = {}) {
    verdict_.finding = finding;
    verdict_.headline = std::move(headline);
    verdict_.detail = std::move(detail);
  }

  void find() {
    const double others = arrival_ + transfer_ + credit_;
    if (calls_ + failed_ == 0) return say(Finding::no_calls, "Nothing to tell of.", "This account holds no calls: the job has made none yet, or none of its communicators was accounted for.");
    if (job_.size <= 1) return say(Finding::single_rank, "This job has a single rank.", "It has nobody to wait for, so no rank slows it.");
    if (seconds_of(job_.time.elapsed) <= 0) return say(Finding::not_timed, "Who waited for whom is not known.", "These calls were counted, but not timed.");
    if (std::max(others, local_) < little_waiting * time_) return find_little(others);
    if (local_ > others) {
      return say(Finding::local, "The ranks wait for themselves, not for each other.",
                 concat({percent_text(local_ / (others + local_)), " of all waiting, ", text_of(local_), ", was for something of the waiting rank's own, such as its device or its queue", idle_joules()}));
    }
    if (transfer_ > arrival_ && transfer_ >= credit_) return find_slow(Finding::transfer, "Slow data, not a late rank, holds this job up.", transfer_, " was for bytes on their way (transfer)", " for data of ", &WaitCell::transfer);
    if (credit_ > arrival_) return find_slow(Finding::credit, "Receivers without room hold this job up.", credit_, " was for a receiver to make room (credit)", " for ", &WaitCell::credit);
    find_stragglers();
  }

  void find_little(double others) {
    std::string detail = concat({"Its ranks waited for each other in ", percent_text(time_ > 0 ? others / time_ : 0), " of their time"});
    if (others > 0) detail += concat({", ", text_of(others), " together", idle_joules()});
    else detail += ".";
    say(Finding::little_waiting, "No rank slows this job.", std::move(detail));
  }

  /// Whose transfers or credit were waited for most.
  void find_slow(Finding finding, std::string headline, double amount, std::string_view was, std::string_view for_whom, nanoseconds WaitCell::*part) {
    std::vector<double> sums(static_cast<std::size_t>(job_.size));
    for (std::size_t i = 0; i < job_.resolved.size(); ++i) sums[i % sums.size()] += seconds_of(job_.resolved[i].*part);
    const auto worst = std::max_element(sums.begin(), sums.end());
    std::string detail = concat({percent_text(amount / (arrival_ + transfer_ + credit_)), " of the waiting for others, ", text_of(amount), ",", was});
    if (*worst > 2.0 * amount / job_.size || (job_.size == 2 && *worst > 0.67 * amount)) detail += concat({"; most of it, ", percent_text(*worst / amount), ",", for_whom, "rank ", worst - sums.begin()});
    else detail += ", and no rank stands out";
    say(finding, std::move(headline), detail + idle_joules());
  }

  void find_stragglers() {
    const std::vector<Straggler> worst = worst_stragglers(job_);
    if (worst.empty()) return say(Finding::spread, "No single rank slows this job.", concat({"The ranks waited ", text_of(arrival_), " for others to arrive, but whom for is not known."}));
    double share = 0, caused = 0;
    Quantity energy = worst.front().energy, carbon = worst.front().carbon;
    for (const Straggler& each : worst) {
      if (&each != &worst.front()) energy = energy + each.energy, carbon = carbon + each.carbon;
      share += each.share;
      caused += seconds_of(each.caused);
    }
    const bool stand_out = 2 * worst.size() <= static_cast<std::size_t>(job_.size) + 1 && (job_.size > 2 || worst.size() == 1) && share >= (worst.size() == 1 ? 0.25 : 0.5);
    const std::string joules = energy.known() ? concat({", and drew ", drawn_text(energy), carbon.known() ? concat({", ", grams_text(carbon.value), " of CO2e,"}) : "", " meanwhile."}) : concat({". ", unknown_joules()});
    if (!stand_out) {
      Quantity all = worst.front().energy;
      for (const Straggler& each : job_.stragglers)
        if (each.caused > nanoseconds{0} && each.rank != worst.front().rank) all = all + each.energy;
      return say(Finding::spread, "No single rank slows this job.",
                 concat({"The ranks come late in turn: they waited ", text_of(arrival_), " for each other to arrive", share_of_time(arrival_, job_.there(), ", ", "their"), ", and the worst, rank ", worst.front().rank, ", caused ",
                         percent_text(worst.front().share), " of that; an even share would be ", percent_text(1.0 / job_.size), all.known() ? concat({". Meanwhile they drew ", drawn_text(all), "."}) : concat({". ", unknown_joules()})}));
    }
    for (const Straggler& each : worst) verdict_.ranks.push_back(each.rank);
    const int others = others_than(verdict_.ranks), waited = std::clamp(who_waited_for(verdict_.ranks), 1, others);
    const std::string much = concat({percent_text(share), " of all arrival waiting", share_of_time(caused, waited, " and ", waited == 1 ? "its" : "their")});
    if (worst.size() == 1) {
      say(Finding::one_rank, concat({"Rank ", worst.front().rank, " slows this job."}),
          waited == 1 ? concat({others == 1 ? "The other rank waited " : "One of the others waited ", text_of(caused), " for it, ", much, joules})
                      : concat({waited < others ? concat({waited, " of the other ", others}) : concat({"The other ", others}), " ranks waited ", text_of(caused / waited), " each for it, ", text_of(caused), " together, ", much, joules}));
    } else {
      say(Finding::several_ranks, concat({"Ranks ", ranks_text(verdict_.ranks), " slow this job."}), concat({"The others waited ", text_of(caused), " for them, ", much, joules}));
    }
    for (std::string text : {host_of(verdict_.ranks), mostly_in(verdict_.ranks)})
      if (!text.empty()) verdict_.asides.push_back(std::move(text));
  }

  /// How many others there are that can have waited for these.
  int others_than(std::span<const Rank> ranks) const {
    const auto missing = std::count_if(ranks.begin(), ranks.end(), [&](Rank r) { return std::binary_search(job_.missing.begin(), job_.missing.end(), r); });
    return std::max(1, job_.there() - static_cast<int>(static_cast<std::ptrdiff_t>(ranks.size()) - missing));
  }
  int who_waited_for(std::span<const Rank> ranks) const {
    int count = 0;
    for (Rank r = 0; r < job_.size; ++r)
      count += std::any_of(ranks.begin(), ranks.end(), [&](Rank late) { return r != late && job_.resolved_wait(r, late).arrival > nanoseconds{0}; });
    return count;
  }
  /// Where they run, if that is one of several hosts.
  std::string host_of(std::span<const Rank> ranks) const {
    std::set<std::string_view> theirs, all;
    for (const Account& account : accounts_) {
      all.insert(account.host);
      if (std::find(ranks.begin(), ranks.end(), account.in_job(account.rank)) != ranks.end()) theirs.insert(account.host);
    }
    if (theirs.size() != 1 || all.size() < 2) return {};
    return concat({ranks.size() == 1 ? concat({"Rank ", ranks[0], " runs"}) : std::string("They run"), " on host ", theirs.begin()->substr(0, 64), "."});
  }

  /// Which operation's calls waited most for these ranks, as charged.
  std::string mostly_in(std::span<const Rank> ranks) const {
    std::map<std::tuple<Collective, std::uint8_t, std::string_view>, double> sums;
    double all = 0;
    for (const Account& account : accounts_)
      for (const AccountRow& row : account.rows)
        for (const Blame& blame : row.waited_for) {
          if (std::find(ranks.begin(), ranks.end(), account.in_job(blame.rank)) == ranks.end()) continue;
          sums[{row.operation, row.size_class, row.algorithm}] += seconds_of(blame.arrival);
          all += seconds_of(blame.arrival);
        }
    const auto most = std::max_element(sums.begin(), sums.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    if (most == sums.end() || most->second < 0.4 * all || all <= 0) return {};
    return concat({percent_text(most->second / all), " of that waiting shows in ", name_of(std::get<0>(most->first)), " of up to ", bytes_text(std::uint64_t{1} << std::min<int>(63, std::get<1>(most->first))), " (",
                   std::get<2>(most->first).substr(0, 40), "): what the rank does before that call is where to look."});
  }

  void set_beside() {
    auto& asides = verdict_.asides;
    if (verdict_.finding == Finding::no_calls) return;
    if (!job_.missing.empty())
      asides.insert(asides.begin(), concat({"Only ", job_.there(), " of ", job_.size, " ranks' accounts are here: ", job_.missing.size() == 1 ? "that of rank " : "those of ranks ", ranks_text(job_.missing), job_.missing.size() == 1 ? " is" : " are", " missing, and in no sum."}));
    if (failed_ > 0) asides.push_back(concat({failed_, failed_ == 1 ? " call" : " calls", " failed: a failed call's time, such as that of a deadline that passed, counts as well."}));
    if (verdict_.finding == Finding::single_rank || verdict_.finding == Finding::not_timed) return;
    set_other_kind_beside();
    int relays = 0;
    for (const Straggler& each : job_.stragglers) {
      if (!hands_on(job_, each) || seconds_of(each.passed_on) < 0.05 * arrival_ || ++relays > 3) continue;
      asides.push_back(concat({"Rank ", each.rank, " looks late, too, but hands on what it waited itself: ", time_text(each.passed_on), " charged to it lead back to others",
                               job_.followed < 0.95 && 20 * each.caused > each.passed_on ? concat({", and so may much of its other ", time_text(each.caused), ", which could not all be followed."}) : std::string(".")}));
    }
    if (2 * job_.time.exposed < job_.time.elapsed)
      asides.push_back(concat({"Callers were blocked for ", time_text(job_.time.exposed), " of the ", time_text(job_.time.elapsed), " that calls took: the rest ran in the background, and so did part of the waiting."}));
    if (arrival_ > 0 && job_.followed < 0.5 && arrival_ >= std::max(transfer_, credit_))
      asides.push_back(concat({"Only ", percent_text(job_.followed), " of the arrival waiting belongs to calls that can be followed back from call to call: the recent ones; the rest is charged as each call saw it."}));
  }

  /// What would be the headline if what is were not a little worse.
  void set_other_kind_beside() {
    constexpr double much = 0.25;  // of all waiting
    const Finding f = verdict_.finding;
    const double all = arrival_ + transfer_ + credit_ + local_;
    if ((f == Finding::transfer || f == Finding::credit || f == Finding::local) && arrival_ >= much * all) {
      const std::vector<Straggler> worst = worst_stragglers(job_);
      if (worst.size() != 1 || worst[0].share < 0.5 || job_.size == 2) return;
      const Straggler& late = worst[0];
      verdict_.ranks = {late.rank};
      verdict_.headline = concat({f == Finding::transfer ? "Slow data" : f == Finding::credit ? "Receivers without room" : "The ranks' waits for themselves", f == Finding::transfer ? " holds" : " hold", " this job up, and so does rank ", late.rank, "."});
      verdict_.asides.push_back(concat({"Rank ", late.rank, " is late: the other ", others_than(verdict_.ranks), " ranks together waited ", time_text(late.caused), " for it, ", percent_text(late.share), " of all arrival waiting",
                                        late.energy.known() ? concat({", and drew ", drawn_text(late.energy), " meanwhile."}) : std::string(".")}));
    } else if ((f == Finding::one_rank || f == Finding::several_ranks || f == Finding::spread) && transfer_ >= much * all) {
      verdict_.asides.push_back(concat({"Not only late ranks hold it up: the ranks waited another ", text_of(transfer_), " for bytes on their way (transfer)."}));
    }
  }

  std::string share_of_time(double seconds, int ranks, std::string_view lead, std::string_view whose) const {
    const double all = time_ / std::max(1, job_.there()) * ranks;
    return all > 0 && seconds <= all ? concat({lead, percent_text(seconds / all), " of ", whose, " time"}) : std::string();
  }
  /// Ends a sentence on waits of any kind.
  std::string idle_joules() const {
    const Quantity& idle = job_.energy.idle;
    return idle.known() ? concat({". In all their waiting the ranks drew ", drawn_text(idle), "."}) : concat({". ", unknown_joules()});
  }
  std::string unknown_joules() const {
    return job_.domains.empty() ? "What that cost in joules is not known: no meter." : "What that cost in joules is not known: the meters do not cover all of it.";
  }

  const JobAccount& job_;
  std::span<const Account> accounts_;
  std::uint64_t calls_ = 0, failed_ = 0;
  double arrival_ = 0, transfer_ = 0, credit_ = 0, local_ = 0, time_ = 0;  // seconds
  Verdict verdict_;
};

}  // namespace detail

/// What holds the job up. `accounts` are those that job_of() was given; they tell in which operation it shows.
inline Verdict verdict_of(const JobAccount& job, std::span<const Account> accounts) { return detail::Judge(job, accounts).judge(); }

}  // namespace tally::inline v0
