// SPDX-License-Identifier: Apache-2.0
// Which algorithm is chosen where nobody names one: the one that should take the least time (or energy), by measurements of this
// machine where there are any (TALLY_MODEL, written by `tally_perf --tune`), else by an estimate from the algorithm's
// own text: its longest chain of messages, its messages and its bytes. A pure function of the model, which rank 0
// gives to all, so all ranks choose the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "choose.hpp"
#include "file.hpp"
#include "objective.hpp"
#include "plan.hpp"
#include "share.hpp"

namespace tally::inline v0 {

/// How many times as much it costs to cross from one group to another than to stay in one.
struct Across {
  float hop = 3, message = 1, byte = 3;  // between sockets; not measured: the machine had but one cache
};

/// What rank 0 knows about the machine. Plain data: it lies in memory that all ranks read.
struct CostModel {
  static constexpr int classes = 32;  // sizes 8 << class bytes; a size between two is interpolated
  static constexpr std::size_t algorithms = std::size(detail::algorithm_names), operations = static_cast<std::size_t>(Collective::exclusive_scan) + 1;  // v-variants are taken for what they are like

  // The estimate's parameters, measured between two neighbouring cores of one machine (AMD Zen 4), in microseconds.
  float line = 0.1f;           // a cache line from core to core
  float message = 0.06f;       // one rank's work for a message
  float near_byte = 0.00002f;  // a byte moved within a core's caches
  float far_byte = 0.00003f;    // a byte out of another core's cache
  float turn = 1.0f;           // where ranks outnumber cores: for one of them to give another its core
  std::int32_t cores = 1;      // that ranks share
  Across across = {};
  std::int32_t group = 0;      // the width of a Grouping; 0: whatever the transport says
  std::int32_t ranks = 0;      // that `measured` is for
  Objective objective = Objective::time;
  float copy_watts = 1, protocol_watts = 1, spin_watts = 1, sleep_watts = 0;  // of a core, above the floor; only their ratios count
  float spins = 50;            // microseconds of a wait before it is slept through
  /// Microseconds, 0 where not measured.
  float measured[operations][algorithms][classes] = {};
};
static_assert(std::is_trivially_copyable_v<CostModel>);

namespace detail {

/// What an algorithm does for an operation, whatever the size: of the busiest rank, in units of the operation's bytes.
/// What crosses between groups counts as often as `across` says.
struct Profile {
  double chain = 0;     // messages that must follow each other
  double messages = 0;  // sent and received
  double sent = 0, received = 0, local = 0;
  struct {
    double messages = 0, sent = 0, received = 0, local = 0;
  } mean;  // of all ranks
};

/// From the texts of all ranks, with a small count.
[[gnu::cold]] inline Profile profile_of(const AlgorithmRef& algorithm, Collective operation, int n, const Grouping& group = {}, const Across& across = {1, 1, 1}) {
  operation = uniform(operation);
  const bool blocks = Layout{operation, 0, n, 0, 1}.items() > 1;
  const std::size_t count = operation == Collective::barrier ? 1 : static_cast<std::size_t>(blocks ? 4 : 4 * n);
  const Layout layout{operation == Collective::barrier ? Collective::all_reduce : operation, 0, n, 0, count, operation == Collective::barrier || operation == Collective::broadcast, group};
  const auto items = static_cast<double>(layout.items());
  const auto distance = [&](Rank a, Rank b, float Across::* kind) { return !group.is_known() || group.of(a) == group.of(b) ? 1.0 : static_cast<double>(across.*kind); };
  Profile profile;
  if (algorithm.share) {  // two meetings, and its share of the data
    const double meeting = n <= direct_meeting_ranks ? n - 1 : std::bit_width(static_cast<unsigned>(n - 1));
    profile.chain = 2 * (n <= direct_meeting_ranks ? 1 : meeting);
    profile.messages = 4 * meeting;
    std::vector<Share> shares;
    for (Rank r = 0; r < n; ++r) {
      Layout mine = layout;
      mine.me = r;
      shares.push_back(algorithm.share(mine.shape()));
    }
    const bool staged = algorithm.is(Reach::staged);
    for (Rank r = 0; r < n; ++r) {
      const ShareBytes own = for_each_rank_of(shares[static_cast<std::size_t>(r)], r, n, 1, [](Rank, const Range&) {}, [](Rank, const Range&) {});
      double put = 0, taken = 0;  // what others read of it, and what they wrote for it
      for (Rank other = 0; other < n; ++other) {
        const Share& share = shares[static_cast<std::size_t>(other)];
        if (other == r) continue;
        if (share.reads(r, n)) put += static_cast<double>(share.from.count);
        if (share.writes(r)) taken += static_cast<double>(share.to.count);
      }
      // Staged results are written where inputs were just read; where nothing was, a line has to be fetched to be written.
      const bool returns = operation == Collective::all_reduce || shares[0].scans();
      profile.received = std::max(profile.received, (static_cast<double>(own.loaded) + (staged ? taken : 0)) / items);
      profile.sent = std::max(profile.sent, static_cast<double>(own.stored) * (!staged ? 1 : returns ? 0 : 2) / items);
      profile.local = std::max(profile.local, staged ? put / items : 0);
    }
    profile.mean = {profile.messages, profile.sent, profile.received, profile.local};  // shares are even
    if (group.is_known() && group.count(n) > 1) {
      double near = 0;  // of the others, for a rank on average
      for (int g = 0; g < group.count(n); ++g) near += static_cast<double>(group.size(g, n)) * (group.size(g, n) - 1) / n;
      profile.chain *= static_cast<double>(across.hop);
      for (double* bytes : {&profile.received, &profile.sent}) *bytes *= (near + static_cast<double>(across.byte) * (n - 1 - near)) / (n - 1);
    }
    return profile;
  }
  std::vector<Plan> plans;
  std::vector<std::vector<double>> done(static_cast<std::size_t>(n));  // the chain up to a step, -1 if not known yet
  std::vector<std::vector<std::size_t>> sends(static_cast<std::size_t>(n * n)), receives(sends.size());
  for (Rank r = 0; r < n; ++r) {
    Layout mine = layout;
    mine.me = r;
    const Plan& plan = plans.emplace_back(algorithm.generate(mine.shape()), mine, 1);
    double local = 0, received = 0, messages = 0;
    for (std::size_t i = 0; i < plan.steps().size(); ++i) {
      const PlannedStep& step = plan.steps()[i];
      messages += step.peer < 0 ? 1 : distance(step.peer, r, &Across::message);
      if (step.peer < 0) local += static_cast<double>(step.count());
      else if (step.verb != Verb::send) received += static_cast<double>(step.count()) * distance(step.peer, r, &Across::byte);
      if (step.peer < 0) continue;
      (step.verb == Verb::send ? sends : receives)[static_cast<std::size_t>(step.verb == Verb::send ? r * n + step.peer : step.peer * n + r)].push_back(i);
    }
    done[static_cast<std::size_t>(r)].assign(plan.steps().size(), -1);
    profile.messages = std::max(profile.messages, messages);
    profile.sent = std::max(profile.sent, static_cast<double>(plan.units_sent()) / items);
    profile.received = std::max(profile.received, received / items);
    profile.local = std::max(profile.local, local / items);
    profile.mean.messages += messages / n;
    profile.mean.sent += static_cast<double>(plan.units_sent()) / items / n;
    profile.mean.received += received / items / n;
    profile.mean.local += local / items / n;
  }
  // Longest chains, step by step as far as each rank gets: rounds of this are as many as the chain is long.
  for (bool moved = true; moved;) {
    moved = false;
    for (Rank r = 0; r < n; ++r) {
      const Plan& plan = plans[static_cast<std::size_t>(r)];
      std::vector<double>& mine = done[static_cast<std::size_t>(r)];
      for (std::size_t i = 0; i < mine.size(); ++i) {
        if (mine[i] >= 0) continue;
        const PlannedStep& step = plan.steps()[i];
        double chain = 0;
        bool known = true;
        for (std::uint32_t d = step.first_dependency; d < step.first_dependency + step.dependencies; ++d) {
          const double earlier = mine[plan.dependencies()[d].step];
          known = known && earlier >= 0;
          chain = std::max(chain, earlier);
        }
        if (step.peer >= 0 && step.verb != Verb::send) {
          const auto pair = static_cast<std::size_t>(step.peer * n + r);
          const auto k = static_cast<std::size_t>(std::find(receives[pair].begin(), receives[pair].end(), i) - receives[pair].begin());
          const double sent = k < sends[pair].size() ? done[static_cast<std::size_t>(step.peer)][sends[pair][k]] : 0;
          known = known && sent >= 0;
          chain = std::max(chain, sent + distance(step.peer, r, &Across::hop));
        }
        if (!known) continue;
        mine[i] = chain;
        profile.chain = std::max(profile.chain, chain);
        moved = true;
      }
    }
  }
  return profile;
}

}  // namespace detail

/// What a call asks of an algorithm.
struct Need {
  bool direct = false;                // all ranks can reach each other's buffers
  Folding folding = Folding::any;     // or ordered, or fixed; operations that do not combine ask for nothing
  bool steps = false;                 // no shares: they cannot run in the background
  static constexpr std::size_t kinds = 12;
  constexpr std::size_t index() const { return (folding == Folding::any ? 0 : static_cast<std::size_t>(folding) - 1) * 4 + (steps ? 2u : 0u) + (direct ? 1u : 0u); }
  static constexpr Need of(std::size_t index) { return {(index & 1) != 0, static_cast<Folding>(index < 4 ? 0 : index / 4 + 1), (index & 2) != 0}; }
  constexpr bool met_by(const AlgorithmRef& algorithm, Collective operation) const {
    return (!reduces(operation) || algorithm.folding >= folding) && !(algorithm.share && steps);
  }
};

/// Chooses, and remembers what it chose.
class Chooser {
 public:
  /// `stages`: the ranks have blocks of shared memory. `group`, if the model does not say.
  explicit Chooser(int n, const CostModel& model = {}, bool stages = false, const Partition* group = nullptr)
      : n_(n), stages_(stages), model_(model), group_(model.group == 0 && group ? Grouping(*group) : Grouping(model.group)) {}

  const CostModel& model() const { return model_; }
  const Grouping& group() const { return group_; }

  /// `direct`: all ranks can reach each other's buffers.
  [[gnu::always_inline]] const AlgorithmRef& choose(Collective operation, std::size_t bytes, const Need& need) {
    // One choice for all sizes between two classes, so that it need not be made for every call.
    const std::size_t size_class = bytes <= 8 ? 0 : static_cast<std::size_t>(std::bit_width((bytes - 1) >> 3));
    // A second thread is refused only when the call is made: here it must do no harm.
    const std::atomic_ref<const AlgorithmRef*> known(chosen_[static_cast<std::size_t>(operation)][need.index()][std::min<std::size_t>(size_class, CostModel::classes - 1)]);
    const AlgorithmRef* chosen = known.load(std::memory_order_relaxed);
    if (!chosen) known.store(chosen = best(operation, std::size_t{8} << std::min<std::size_t>(size_class, CostModel::classes - 1), need), std::memory_order_relaxed);
    return *chosen;
  }

  struct Estimate {
    double microseconds = 0;
    bool measured = false;  // the time
    double energy = 0;      // of all ranks, above the floor: microseconds of their cores times the model's watts, which may be relative
  };
  Estimate estimate(const AlgorithmRef& algorithm, Collective operation, std::size_t bytes) {
    if (operation == Collective::neighbour_exchange) return {};  // it depends on the graph, and there is but one
    operation = uniform(operation);
    const detail::Profile p = profile(algorithm, operation);
    Estimate result;
    result.microseconds = measured(algorithm, operation, bytes);
    result.measured = result.microseconds > 0;
    if (!result.measured) result.microseconds = expected_time(algorithm, p, bytes);
    result.energy = expected_energy(algorithm, p, bytes, result.microseconds);
    return result;
  }

  bool has_measured(const AlgorithmRef& algorithm, Collective operation, std::size_t bytes) const { return measured(algorithm, operation, bytes) > 0; }

  /// The candidates, the best first: by time, unless the model's objective is another. Nothing is known of the kernel's copies without a measurement.
  struct Candidate {
    AlgorithmRef algorithm;
    Estimate estimate;
  };
  std::vector<Candidate> candidates(Collective operation, std::size_t bytes, const Need& need) {
    const std::lock_guard lock(estimating_);
    std::vector<Candidate> all;
    for (const std::string_view name : algorithms_for(operation)) {
      const AlgorithmRef algorithm = find_algorithm(operation, name);
      const bool possible = !algorithm.share || (algorithm.is(Reach::direct) ? need.direct : stages_ && (algorithm.is(Reach::staged) || has_measured(algorithm, operation, bytes)));
      if (!possible || !need.met_by(algorithm, operation) || (name.starts_with(Hierarchical::name) && !group_.matters(n_))) continue;
      const Candidate next{algorithm, estimate(algorithm, operation, bytes)};
      all.insert(std::upper_bound(all.begin(), all.end(), next, [this](const Candidate& a, const Candidate& b) { return score_of(a.estimate) < score_of(b.estimate); }), next);
    }
    return all;
  }

 private:
  [[gnu::cold, gnu::noinline]] const AlgorithmRef* best(Collective operation, std::size_t bytes, const Need& need) {
    return detail::builtin(operation, candidates(operation, bytes, need).front().algorithm.name);
  }

  double moving_time(const AlgorithmRef& algorithm, const auto& p, std::size_t bytes) const {
    const double b = static_cast<double>(bytes), far = static_cast<double>(model_.far_byte), near = static_cast<double>(model_.near_byte);
    return algorithm.share ? b * ((p.received + p.sent) * far + p.local * near) : b * (p.sent * near + p.received * far + p.local * near);
  }
  double expected_time(const AlgorithmRef& algorithm, const detail::Profile& p, std::size_t bytes) const {
    const double crowd = std::max(1.0, static_cast<double>(n_) / std::max(1, static_cast<int>(model_.cores)));
    const double hop = crowd > 1 ? static_cast<double>(model_.turn) * crowd : static_cast<double>(model_.line);
    return p.chain * hop + crowd * (p.messages * static_cast<double>(model_.message) + moving_time(algorithm, p, bytes));
  }
  /// A rank works, and waits for the rest of the time.
  double expected_energy(const AlgorithmRef& algorithm, const detail::Profile& p, std::size_t bytes, double microseconds) const {
    const double handling = p.mean.messages * static_cast<double>(model_.message), moving = moving_time(algorithm, p.mean, bytes);
    const double waiting = std::max(0.0, microseconds - handling - moving), spinning = std::min(waiting, static_cast<double>(model_.spins));
    return n_ * (moving * static_cast<double>(model_.copy_watts) + handling * static_cast<double>(model_.protocol_watts) + spinning * static_cast<double>(model_.spin_watts) +
                 (waiting - spinning) * static_cast<double>(model_.sleep_watts));
  }
  double score_of(const Estimate& estimate) const { return score(model_.objective, estimate.microseconds, estimate.energy); }

  double measured(const AlgorithmRef& algorithm, Collective operation, std::size_t bytes) const {
    if (model_.ranks != n_ || algorithm.code >= CostModel::algorithms || operation == Collective::neighbour_exchange) return 0;
    const auto& times = model_.measured[static_cast<std::size_t>(uniform(operation))][algorithm.code];
    // Between the nearest sizes measured on both sides, straight in logarithms; beyond the last one, as its bytes.
    const double at = std::log2(static_cast<double>(std::max<std::size_t>(bytes, 8)) / 8);
    int below = -1, above = -1;
    for (int c = 0; c < CostModel::classes; ++c) {
      if (!(times[c] > 0)) continue;
      if (c <= at) below = c;
      else if (above < 0) above = c;
    }
    if (below < 0 && above < 0) return 0;
    if (below < 0) return static_cast<double>(times[above]);
    if (above < 0) return static_cast<double>(times[below]) * std::exp2(at - below);
    const double low = std::log2(static_cast<double>(times[below])), high = std::log2(static_cast<double>(times[above]));
    return std::exp2(low + (high - low) * (at - below) / (above - below));
  }
  detail::Profile profile(const AlgorithmRef& algorithm, Collective operation) {
    auto& known = profiles_[static_cast<std::size_t>(operation)];
    for (const auto& [code, profile] : known)
      if (code == algorithm.code) return profile;
    // More ranks than these change what an algorithm costs, but hardly which one is best, if they are in as many groups.
    constexpr int most_ranks = 32;
    const int ranks = std::min(n_, most_ranks);
    const Grouping group = ranks == n_ ? group_ : group_.matters(n_) ? Grouping(std::max(2, ranks / group_.count(n_))) : Grouping();
    return known.emplace_back(algorithm.code, detail::profile_of(algorithm, operation, ranks, group, model_.across)).second;
  }

  int n_;
  bool stages_;
  CostModel model_;
  Grouping group_;
  const AlgorithmRef* chosen_[static_cast<std::size_t>(Collective::neighbour_exchange) + 1][Need::kinds][CostModel::classes] = {};
  std::vector<std::pair<std::uint8_t, detail::Profile>> profiles_[CostModel::operations];
  std::mutex estimating_;
};

/// Reads what `tally_perf --tune` wrote: a line per measurement, "transport ranks operation algorithm bytes us"; #
/// begins a comment. Takes those for n ranks. Errc::invalid_argument names the line that cannot be read.
[[gnu::cold]] inline void read_model(const std::string& path, std::string_view transport, int n, CostModel& model) {
  constexpr std::size_t most = 4 << 20;
  const detail::FileText file = detail::read_start(path, most + 1);
  if (file.error != 0) throw Error(Errc::invalid_argument, {"TALLY_MODEL: cannot read '", path, "': ", file.error == ENOTSUP ? "it is no plain file" : detail::errno_text(file.error)});
  if (file.text.size() > most) throw Error(Errc::invalid_argument, {"TALLY_MODEL: '", path, "' has more than ", most, " bytes: it is no such file"});
  std::istringstream lines(file.text);
  std::string text;
  for (int number = 1; std::getline(lines, text); ++number) {
    const std::string_view line = std::string_view(text).substr(0, text.find('#'));
    std::vector<std::string_view> words;
    for (std::size_t at = 0; (at = line.find_first_not_of(" \t\r", at)) != line.npos;) {
      const std::size_t end = std::min(line.find_first_of(" \t\r", at), line.size());
      words.push_back(line.substr(at, end - at));
      at = end;
    }
    if (words.empty()) continue;
    const auto refuse = [&](std::initializer_list<detail::Piece> why) { throw Error(Errc::invalid_argument, {"TALLY_MODEL: ", path, " line ", number, ": ", detail::concat(why)}); };
    if (words.size() != 6) refuse({"expected: transport ranks operation algorithm bytes microseconds"});
    const auto number_in = [&]<class N>(std::string_view word, N) {
      N value{};
      const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
      if (error != std::errc{} || end != word.data() + word.size() || word.starts_with("-") || value != value) refuse({"'", word, "' is not a number"});
      return value;
    };
    const int ranks = number_in(words[1], int{});
    const auto bytes = number_in(words[4], std::uint64_t{});
    const double us = number_in(words[5], double{});
    Collective operation = Collective::none;
    for (const Collective each : all_operations)
      if (name_of(each) == words[2]) operation = each;
    if (operation == Collective::none) refuse({"'", words[2], "' is not an operation"});
    const AlgorithmRef algorithm = find_algorithm(operation, words[3]);
    if (!algorithm) refuse({"'", words[3], "' is not an algorithm for ", words[2]});
    if (!(us > 0) || !(us < 1e12)) refuse({"a time must be above 0 and below 1e12 us"});
    if (bytes < 8 || !std::has_single_bit(bytes) || std::countr_zero(bytes) - 3 >= CostModel::classes) refuse({"bytes must be a power of two from 8 to 16 GiB"});
    if (words[0] != transport || ranks != n) continue;
    model.ranks = n;
    model.measured[static_cast<std::size_t>(operation)][algorithm.code][std::countr_zero(bytes) - 3] = static_cast<float>(us);
  }
}

}  // namespace tally::inline v0
