// SPDX-License-Identifier: Apache-2.0
// The one reader of a host's meters. In windows of time it reads them, reads who did what from the board, divides the joules,
// and writes back what each was charged. It knows no threads and no sockets: whoever runs it calls step().
#pragma once

#include <time.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "attribution.hpp"
#include "board.hpp"
#include "meter.hpp"
#include "regression.hpp"
#include "source.hpp"

namespace tally::inline v0 {

/// What a hub asks the system, replaceable in tests.
struct HubSystem {
  MeterClock now = monotonic_time;
  /// CPU time of a process so far, or a negative one if it is gone.
  std::function<nanoseconds(pid_t)> process_time = [](pid_t pid) {
    clockid_t clock{};
    timespec t{};
    if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &t) != 0) return nanoseconds{-1};
    return nanoseconds(static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec);
  };
  /// CPU time that all processors together have spent on anything, since the host began; negative if it cannot be told.
  std::function<nanoseconds()> host_time = [] {
    std::ifstream file("/proc/stat");
    std::string cpu;
    std::array<std::int64_t, 8> parts{};  // user nice system idle iowait irq softirq steal
    if (!(file >> cpu) || cpu != "cpu") return nanoseconds{-1};
    for (std::int64_t& part : parts)
      if (!(file >> part) || part < 0) return nanoseconds{-1};
    const std::int64_t hertz = std::max<std::int64_t>(::sysconf(_SC_CLK_TCK), 1);
    return nanoseconds((parts[0] + parts[1] + parts[2] + parts[5] + parts[6]) * (1'000'000'000 / hertz));
  };
  int cores = static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
};

struct HubOptions {
  nanoseconds period = std::chrono::milliseconds(100);  // between windows; longer for meters that move seldom
  Weights weights = Weights::equal_time();
  bool learn = true;                  // weights from the windows themselves, as soon as they differ enough to tell
  std::vector<std::string> warnings;  // what whoever looked for meters has to say
  HubSystem system = {};
};

class EnergyHub {
 public:
  EnergyHub(std::vector<AnyMeter> meters, HubOptions options, detail::Board& board) : meters_(std::move(meters)), options_(std::move(options)), board_(board), warnings_(options_.warnings) {
    std::size_t packages = 0;
    for (std::size_t m = 0; m < meters_.size(); ++m) {
      const auto infos = meters_[m].domains();
      const std::size_t first = domains_.size();
      for (std::size_t d = 0; d < infos.size() && domains_.size() < detail::BoardState::most_domains; ++d) {
        Measured domain;
        domain.meter = m;
        domain.index = d;
        domain.info = infos[d];
        const auto parent = static_cast<std::size_t>(infos[d].parent);
        domain.parent = infos[d].parent >= 0 && parent < infos.size() && parent != d ? static_cast<int>(first + parent) : -1;
        const bool twice = std::any_of(domains_.begin(), domains_.end(), [&](const Measured& other) { return other.info.key == infos[d].key; });
        if (twice) warnings_.push_back(detail::concat({"'", infos[d].key, "' is measured by ", infos[d].source, " and by another meter: it counts once"}));
        domain.twice = twice;
        packages += infos[d].kind == Domain::cpu_package && domain.parent < 0 && !twice;
        domains_.push_back(std::move(domain));
      }
    }
    for (Measured& domain : domains_) {
      domain.kind = kind_of(domain.info.kind);
      domain.counts = !domain.twice && counts(domain, packages);
      if (domain.info.kind == Domain::cpu_package) domain.floor_part = 1.0 / static_cast<double>(std::max<std::size_t>(packages, 1));
      else if (packages == 0 && domain.counts && domain.kind == PowerKind::cpu) domain.floor_part = 1;
      Group& group = groups_[domain.kind == PowerKind::gpu];
      group.least = std::max({group.least == nanoseconds::max() ? options_.period : group.least, 10 * domain.info.tick});
    }
    sample();
    const nanoseconds now = options_.system.now();
    for (Measured& domain : domains_) domain.at_begin = domain.last;
    for (Group& group : groups_) group.begin = now;
    host_time_ = options_.system.host_time();
    state_.time = now.count();
    publish();
  }
  EnergyHub(const EnergyHub&) = delete;
  EnergyHub& operator=(const EnergyHub&) = delete;

  /// A process that takes part, under a number of its own from 1 on.
  void join(std::uint32_t client, pid_t pid) { clients_[client] = {pid, options_.system.process_time(pid), {}}; }
  /// It is gone, and leaves what it had taken behind.
  void leave(std::uint32_t client) {
    for (detail::BoardSlot& slot : board_.slots)
      if (slot.client.load(std::memory_order_acquire) == client) slot.leaving.store(1, std::memory_order_release);
    if (const auto known = clients_.find(client); known != clients_.end()) known->second.gone = true;
  }

  /// When step() has something to do again; the end of time without meters.
  nanoseconds next() const {
    nanoseconds soonest = nanoseconds::max();
    for (const Group& group : groups_)
      if (group.least != nanoseconds::max()) soonest = std::min(soonest, group.begin + group.least);
    return soonest;
  }
  /// Closes the windows that are due.
  void step() {
    const nanoseconds now = options_.system.now();
    const bool due[2] = {now - groups_[0].begin >= groups_[0].least, now - groups_[1].begin >= groups_[1].least};
    if (!due[0] && !due[1]) return;
    sample();
    look_at_slots();
    for (std::size_t g = 0; g < 2; ++g)
      if (due[g]) close(groups_[g], g == 1, now);
    state_.time = now.count();
    ++state_.windows;
    publish();
    free_slots();
  }

 private:
  struct Measured {
    std::size_t meter = 0, index = 0;
    DomainInfo info;
    int parent = -1;
    PowerKind kind = PowerKind::cpu;
    bool counts = false;   // into what is charged; the others are only told
    bool twice = false;
    bool seen = false;  // it has been read
    double floor_part = 0;  // of the weights' floor
    Nanojoules last = 0, at_begin = 0, total = 0, operations = 0, application = 0, unattributed = 0;
    Caveats caveats = 0, window_caveats = 0;
  };
  /// Domains whose windows close together.
  struct Group {
    nanoseconds least = nanoseconds::max(), begin{};  // least: of a window; without domains there are none
    std::array<ActivityTimes, detail::Board::most_slots> counted{};  // of each slot, in windows that are closed
  };
  struct Client {
    pid_t pid = 0;
    nanoseconds cpu{};
    Remainder application;
    bool gone = false;
  };

  static PowerKind kind_of(Domain domain) {
    return domain == Domain::dram ? PowerKind::dram : domain == Domain::gpu_board || domain == Domain::gpu_module ? PowerKind::gpu : PowerKind::cpu;
  }
  /// Domains contain each other: packages count, and what contains them only where they are not measured.
  bool counts(const Measured& domain, std::size_t packages) const {
    switch (domain.info.kind) {
      case Domain::cpu_package: return domain.parent < 0 || domains_[static_cast<std::size_t>(domain.parent)].info.kind == Domain::psys;
      case Domain::dram: return true;
      case Domain::gpu_board:
      case Domain::gpu_module: return domain.parent < 0;
      case Domain::psys:
      case Domain::node: return packages == 0 && domain.parent < 0;
      default: return false;
    }
  }

  void sample() {
    std::vector<MeterSample> samples;
    for (std::size_t m = 0; m < meters_.size(); ++m) {
      samples.assign(meters_[m].domains().size(), {});
      const SampleResult result = meters_[m].sample(samples);
      samples.resize(std::min(result.count, samples.size()));
      for (Measured& domain : domains_) {
        if (domain.meter != m) continue;
        const auto mine = std::find_if(samples.begin(), samples.end(), [&](const MeterSample& s) { return s.domain == domain.index; });
        if (mine == samples.end()) {
          domain.window_caveats |= Caveat::unreadable;
          continue;
        }
        domain.window_caveats |= mine->caveats;
        domain.seen = true;
        domain.last = std::max(domain.last, mine->total);  // a meter that falls is not to be believed
      }
    }
  }
  void look_at_slots() {
    taken_.clear();
    for (std::size_t i = 0; i < detail::Board::most_slots; ++i) {
      const detail::BoardSlot& slot = board_.slots[i];
      if (const std::uint32_t client = slot.client.load(std::memory_order_acquire))
        taken_.push_back({i, client, slot.leaving.load(std::memory_order_acquire) != 0, slot.device.load(std::memory_order_relaxed), slot.of_device.load(std::memory_order_relaxed) != 0, slot.read_times()});
    }
  }
  /// The part of a participant's published times that falls into this window: no thread does more than time passes, so what is too
  /// much waits for later windows.
  ActivityTimes count(Group& group, std::size_t i, const ActivityTimes& published, nanoseconds duration) const {
    ActivityTimes& counted = group.counted[i];
    ActivityTimes part;
    for (std::size_t a = 0; a < activity_count; ++a) part.in[a] = std::clamp(published.in[a] - counted.in[a], nanoseconds{0}, std::chrono::nanoseconds(std::int64_t{1} << 50));
    if (const nanoseconds all = part.total(); all > duration)
      for (nanoseconds& t : part.in) t = nanoseconds(static_cast<std::int64_t>(static_cast<double>(t.count()) * (static_cast<double>(duration.count()) / static_cast<double>(all.count()))));
    for (std::size_t a = 0; a < activity_count; ++a) counted.in[a] += part.in[a];
    return part;
  }

  void close(Group& group, bool devices, nanoseconds now) {
    EnergyWindow window;
    window.duration = now - group.begin;
    window.cores = options_.system.cores;
    std::vector<ActivityTimes> times;
    for (const Taken& slot : taken_) times.push_back(slot.of_device && !devices ? ActivityTimes{} : count(group, slot.index, slot.times, window.duration));
    window.operations = times;
    if (!devices) look_at_processes(window);

    for (std::size_t k = 0; k < power_kinds; ++k)
      if ((static_cast<PowerKind>(k) == PowerKind::gpu) == devices) state_.kinds[k].window_joules = 0;
    double residual = 0, residual_weight = 0;
    for (std::size_t d = 0; d < domains_.size(); ++d) {
      Measured& domain = domains_[d];
      if ((domain.kind == PowerKind::gpu) != devices) continue;
      window.energy = domain.last - domain.at_begin;
      domain.at_begin = domain.last;
      std::vector<Charge> charges(times.size());
      const DividedWindow divided = devices ? divide_device(window, d, charges) : divide_among_cores(window, domain, charges);
      domain.total += window.energy;
      domain.operations += divided.operations;
      domain.application += divided.application;
      domain.unattributed += divided.unattributed;
      if (window.energy == 0) domain.window_caveats |= Caveat::stale;
      domain.caveats |= std::exchange(domain.window_caveats, 0) | divided.caveats;
      tell_power(d, group.begin, now, window.energy);
      if (!domain.counts) continue;
      state_.kinds[static_cast<std::size_t>(domain.kind)].window_joules += static_cast<double>(window.energy) * 1e-9;
      if (!std::isnan(divided.residual)) {
        residual += divided.residual * static_cast<double>(window.energy);
        residual_weight += static_cast<double>(window.energy);
      }
      for (std::size_t i = 0; i < taken_.size(); ++i) add(taken_[i].charges[static_cast<std::size_t>(domain.kind)], charges[i]);
    }
    if (!devices && options_.learn) learn(window);
    if (!devices) state_.residual = residual_weight > 0 ? residual / residual_weight : std::numeric_limits<double>::quiet_NaN();
    group.begin = now;
  }
  /// What the processors did beside operations.
  void look_at_processes(EnergyWindow& window) {
    struct Inside {
      nanoseconds awake{}, all{};
    };
    std::map<std::uint32_t, Inside> inside;
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      inside[taken_[i].client].awake += window.operations[i].awake();
      inside[taken_[i].client].all += window.operations[i].total();
    }
    nanoseconds ours{};
    for (auto& [id, client] : clients_) {
      const nanoseconds cpu = client.gone ? client.cpu + inside[id].awake : std::max(options_.system.process_time(client.pid), client.cpu);  // of who is gone the system tells nothing any longer
      const nanoseconds used = cpu - std::exchange(client.cpu, cpu);
      ours += used;
      window.application += client.application.take(used, inside[id].awake);
      if (!client.gone) window.presence += std::max(window.duration - inside[id].all, nanoseconds{0});
    }
    const nanoseconds host = options_.system.host_time(), before = std::exchange(host_time_, host);
    const nanoseconds all = host >= nanoseconds{0} && before >= nanoseconds{0} ? std::max(host - before, nanoseconds{0}) : ours;
    window.foreign = foreign_.take(all, ours);
    host_seen_ += all;
    ours_seen_ += ours;
  }
  /// Packages together, or what stands for them.
  void learn(const EnergyWindow& window) {
    ActivityTimes all;
    for (const ActivityTimes& times : window.operations)
      for (std::size_t a = 0; a < activity_count; ++a) all.in[a] += times.in[a];
    const double joules = state_.kinds[static_cast<std::size_t>(PowerKind::cpu)].window_joules;
    regression_.add(window.duration, static_cast<Nanojoules>(std::llround(joules * 1e9)), all, window.application + window.foreign);
    if (state_.windows % learn_every != 0) return;
    if (const std::optional<Weights> learned = regression_.weights()) options_.weights = *learned;
  }
  static constexpr std::uint64_t learn_every = 10;  // windows

  DividedWindow divide_among_cores(const EnergyWindow& window, const Measured& domain, std::span<Charge> charges) const {
    Weights weights = options_.weights;
    weights.floor_watts *= domain.floor_part;
    return divide(window, weights, charges);
  }
  /// A device draws for whoever holds it, awake or not: by the time that its ranks were in operations, and outside of them.
  DividedWindow divide_device(const EnergyWindow& all, std::size_t domain, std::span<Charge> charges) const {
    EnergyWindow window = all;
    std::vector<ActivityTimes> times(all.operations.begin(), all.operations.end());
    window.application = window.presence = window.foreign = nanoseconds{};
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      if (taken_[i].device != domain + 1) times[i] = {};
      else window.application += std::max(window.duration - times[i].total(), nanoseconds{0});
    }
    window.operations = times;
    Weights weights;
    weights.watts.fill(1);
    return divide(window, weights, charges);
  }
  static void add(Charge& to, const Charge& more) {
    for (std::size_t a = 0; a < activity_count; ++a) to.net[a] += more.net[a];
    to.floor += more.floor;
  }
  /// Nobody else writes them.
  static void charge(detail::BoardSlot& slot, const Charges& charges) {
    const auto raise = [](std::atomic<std::uint64_t>& word, Nanojoules more) {
      if (more > 0) word.store(word.load(std::memory_order_relaxed) + more, std::memory_order_release);  // readers wait meanwhile
    };
    for (std::size_t k = 0; k < power_kinds; ++k) {
      for (std::size_t a = 0; a < activity_count; ++a) raise(slot.charged[k][a], charges[k].net[a]);
      raise(slot.charged[k][activity_count], charges[k].floor);
    }
  }
  void free_slots() {
    for (const Taken& taken : taken_) {
      if (!taken.leaving) continue;
      detail::BoardSlot& slot = board_.slots[taken.index];
      for (auto& t : slot.times) t.store(0, std::memory_order_relaxed);
      for (auto& kind : slot.charged)
        for (auto& word : kind) word.store(0, std::memory_order_relaxed);
      for (Group& group : groups_) group.counted[taken.index] = {};
      slot.device.store(0, std::memory_order_relaxed);
      slot.of_device.store(0, std::memory_order_relaxed);
      slot.leaving.store(0, std::memory_order_relaxed);
      slot.client.store(0, std::memory_order_release);
    }
    std::erase_if(clients_, [&](const auto& each) {
      return each.second.gone && std::none_of(taken_.begin(), taken_.end(), [&](const Taken& slot) { return slot.client == each.first && !slot.leaving; });
    });
  }
  void tell_power(std::size_t domain, nanoseconds begin, nanoseconds end, Nanojoules energy) {
    if (!domains_[domain].seen) return;  // it is unknown, not 0 W
    const double watts = static_cast<double>(energy) / static_cast<double>(std::max((end - begin).count(), std::int64_t{1}));
    state_.power[state_.powers++ % detail::BoardState::most_power] = {static_cast<std::uint16_t>(domain), begin.count(), end.count(), static_cast<float>(watts)};
  }

  void publish() {
    state_.domains = static_cast<std::uint32_t>(domains_.size());
    for (std::size_t k = 0; k < power_kinds; ++k) {
      EnergyKind& kind = state_.kinds[k];
      const double window_joules = kind.window_joules;
      kind = {};
      kind.window_joules = window_joules;
      double accuracy = 0, quantisation = 0;
      bool any = false;
      for (const Measured& domain : domains_) {
        if (!domain.counts || static_cast<std::size_t>(domain.kind) != k) continue;
        const Provenance how = provenance(domain);
        kind.provenance = any ? std::min(kind.provenance, how) : how;
        any = true;
        kind.caveats |= domain.caveats | domain.info.caveats;
        kind.total += domain.total;
        accuracy = std::max(accuracy, domain.info.accuracy);
        const double seconds = std::chrono::duration<double>(std::max(groups_[domain.kind == PowerKind::gpu].least, nanoseconds{1})).count();
        quantisation = std::hypot(quantisation, quantisation_sigma(window_joules / seconds, domain.info.tick));
      }
      kind.split = static_cast<PowerKind>(k) == PowerKind::gpu ? Split::equal_time : options_.weights.split;
      kind.relative_sigma = std::hypot(accuracy, static_cast<PowerKind>(k) == PowerKind::gpu ? 0 : options_.weights.relative_sigma);
      kind.quantisation = quantisation;
    }
    for (std::size_t d = 0; d < domains_.size(); ++d) {
      const Measured& domain = domains_[d];
      detail::BoardDomain& to = state_.domain[d];
      detail::copy_text(to.key, domain.info.key);
      detail::copy_text(to.source, domain.info.source);
      to.kind = domain.info.kind;
      to.parent = static_cast<std::int16_t>(domain.parent);
      to.provenance = provenance(domain);
      to.caveats = domain.caveats | domain.info.caveats;
      to.total = domain.total;
      to.operations = domain.operations;
      to.application = domain.application;
      to.unattributed = domain.unattributed;
      to.watts_floor = options_.weights.floor_watts * domain.floor_part;
    }
    state_.coverage = host_seen_ > nanoseconds{0} ? std::min(1.0, static_cast<double>(ours_seen_.count()) / static_cast<double>(host_seen_.count())) : std::numeric_limits<double>::quiet_NaN();
    std::string text;
    for (const std::string& warning : warnings_) text.append(warning).append("\n");
    for (const AnyMeter& meter : meters_)
      for (const std::string& warning : meter.warnings()) text.append(warning).append("\n");
    detail::copy_text(state_.warnings, text);
    board_.state.write(state_, [&] {  // who reads his charges finds them in the totals, too
      for (const Taken& slot : taken_) charge(board_.slots[slot.index], slot.charges);
    });
    board_.windows.store(state_.windows, std::memory_order_release);
  }
  /// A guest's counter is a model of its host, and a sum of which nobody measured a part is no better. One that there is but cannot be read is none.
  static Provenance provenance(const Measured& domain) {
    if (!domain.seen) return Provenance::none;
    const bool gaps = has(domain.caveats, Caveat::unreadable) || has(domain.caveats, Caveat::permission_denied) || has(domain.caveats, Caveat::vanished);
    return gaps || has(domain.info.caveats, Caveat::virtualised) ? Provenance::modelled : Provenance::prorated;
  }

  struct Taken {
    std::size_t index;
    std::uint32_t client;
    bool leaving;
    std::uint32_t device;
    bool of_device;
    ActivityTimes times;
    Charges charges{};  // of the windows that close
  };
  std::vector<AnyMeter> meters_;
  HubOptions options_;
  detail::Board& board_;
  std::vector<std::string> warnings_;
  std::vector<Measured> domains_;
  std::array<Group, 2> groups_;  // processors and what is beside them; devices
  std::map<std::uint32_t, Client> clients_;
  std::vector<Taken> taken_;
  Remainder foreign_;
  WeightRegression regression_;
  nanoseconds host_time_{}, host_seen_{}, ours_seen_{};
  detail::BoardState state_{};
};

}  // namespace tally::inline v0
