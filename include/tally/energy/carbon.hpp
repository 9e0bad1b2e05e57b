// SPDX-License-Identifier: Apache-2.0
// Grams of CO2-equivalent for joules: how dirty the grid was meanwhile, told by a source that the user names, times what the
// building adds. Without a source grams are unknown; there is no world average to fall back on. Average and marginal
// intensities answer different questions and never get into one sum. No network code: sources are numbers, files, callbacks.
#pragma once

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../figures.hpp"
#include "../types.hpp"
#include "quantity.hpp"

namespace tally::inline v0 {

/// Of the wall clock, since the Unix epoch.
using CarbonTime = std::chrono::sys_time<nanoseconds>;

/// What an intensity means: the mean of all that was generated, or what one kilowatt hour more would have added.
enum class CarbonSignal : std::uint8_t { average, marginal };
/// What it covers: fuel, building and scrapping the plants as well, or what comes out of their chimneys.
enum class CarbonFactor : std::uint8_t { lifecycle, direct, unknown };

constexpr std::string_view name_of(CarbonSignal signal) {
  constexpr std::string_view names[] = {"average", "marginal"};
  return names[static_cast<std::size_t>(signal)];
}
constexpr std::string_view name_of(CarbonFactor factor) {
  constexpr std::string_view names[] = {"lifecycle", "direct", "unknown"};
  return names[static_cast<std::size_t>(factor)];
}

/// Providers publish no error. These are assumptions, not measurements: one relative standard error of a figure that was made from
/// what was generated, and of one that was estimated.
inline constexpr double published_intensity_sigma = 0.1, estimated_intensity_sigma = 0.2;
/// No fuel emits as much per kWh: what is above was given in another unit.
inline constexpr double highest_intensity = 10'000;

/// How many grams of CO2-equivalent a grid emitted per kWh in [from, until).
struct CarbonIntensity {
  double grams_per_kwh = std::numeric_limits<double>::quiet_NaN();  // NaN: unknown
  double relative_sigma = published_intensity_sigma;
  CarbonSignal signal = CarbonSignal::average;
  CarbonFactor factor = CarbonFactor::unknown;
  std::string zone;        // of the grid, as its source calls it
  bool estimated = false;  // a model's, a forecast, or a constant: not made from what was generated then
  CarbonTime from{}, until = CarbonTime::max();
  std::string source;  // where it comes from: a file's name, "constant"

  bool known() const { return !std::isnan(grams_per_kwh); }
  /// In g/kWh. A grid's figure is a total that was divided among all who use it, so at most prorated; modelled where it is estimated,
  /// and always where it is marginal, because what would have been without a load cannot be observed.
  Quantity per_kwh() const {
    if (!known()) return {};
    const bool modelled = estimated || signal == CarbonSignal::marginal;
    return {grams_per_kwh, grams_per_kwh * relative_sigma, 0, std::numeric_limits<double>::infinity(), modelled ? Provenance::modelled : Provenance::prorated};
  }
};

/// e.g. "zone DE, average, lifecycle, from 'de.json'".
inline std::string describe(const CarbonIntensity& intensity) {
  std::string text = intensity.zone.empty() ? "" : detail::concat({"zone ", intensity.zone, ", "});
  text += name_of(intensity.signal);
  if (intensity.factor != CarbonFactor::unknown) text += detail::concat({", ", name_of(intensity.factor)});
  if (intensity.estimated) text += ", estimated";
  if (!intensity.source.empty()) text += detail::concat({", from '", intensity.source, "'"});
  return text;
}

/// The same, with the figure's age where it is out of date at `now`: "..., which ended at 2024-01-15T23:00Z".
inline std::string describe(const CarbonIntensity& intensity, CarbonTime now) {
  if (!intensity.known() || intensity.until >= now) return describe(intensity);
  const auto day = std::chrono::floor<std::chrono::days>(intensity.until);
  const std::chrono::year_month_day date(day);
  const auto minutes = std::chrono::floor<std::chrono::minutes>(intensity.until - day).count();
  char text[64];
  std::snprintf(text, sizeof text, "%04d-%02u-%02uT%02d:%02dZ", static_cast<int>(date.year()), static_cast<unsigned>(date.month()), static_cast<unsigned>(date.day()), static_cast<int>(minutes / 60), static_cast<int>(minutes % 60));
  return detail::concat({describe(intensity), ", which ended at ", text});
}

/// The latest figure there was for [begin, end). It may be older than that.
struct CarbonSpan {
  CarbonTime begin, end;
  CarbonIntensity intensity;
};

/// Tells what is known of [from, to): spans in order that do not overlap. Where nothing is known there is a gap, e.g. before the
/// first figure. Called off the path of the data, by any thread.
template <class S>
concept CarbonSource = requires(const S& source, CarbonTime from, CarbonTime to) {
  { source.over(from, to) } -> std::convertible_to<std::vector<CarbonSpan>>;
};

/// Any source, or none. Copies share it.
class AnyCarbonSource {
 public:
  AnyCarbonSource() = default;
  template <class S>
    requires(!std::same_as<S, AnyCarbonSource> && CarbonSource<S>)
  AnyCarbonSource(S source) : source_(std::make_shared<const Holder<S>>(std::move(source))) {}

  explicit operator bool() const { return source_ != nullptr; }
  std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const { return source_ ? source_->over(from, to) : std::vector<CarbonSpan>(); }

 private:
  struct Base {
    virtual ~Base() = default;
    virtual std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const = 0;
  };
  template <class S>
  struct Holder final : Base {
    explicit Holder(S s) : source(std::move(s)) {}
    std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const override { return source.over(from, to); }
    S source;
  };
  std::shared_ptr<const Base> source_;
};

namespace detail {

/// For error texts: a value from elsewhere in quotes, short and printable.
inline std::string excerpt(std::string_view value) {
  static constexpr std::size_t most = 60;
  std::string text = "'";
  for (const char c : value.substr(0, most)) text += c >= ' ' && c <= '~' ? c : '?';
  return text + (value.size() > most ? "...'" : "'");
}
/// Throws what is wrong with a figure, which may be unknown; `where` it stands begins the text.
inline void check_intensity(const CarbonIntensity& intensity, std::string_view where, Errc code = Errc::protocol) {
  const double g = intensity.grams_per_kwh;
  const auto refuse = [&](std::string_view what) { throw Error(code, {where, ": ", what}); };
  if (g < 0) refuse("a carbon intensity is negative; it must be from 0 to 10000 g/kWh");
  if (g > highest_intensity) refuse("a carbon intensity is above 10000 g/kWh, which no fuel reaches; is it in another unit?");
  if (!(intensity.relative_sigma >= 0 && intensity.relative_sigma <= 10)) refuse("the relative standard error of a carbon intensity must be from 0 to 10");
  if (static_cast<std::size_t>(intensity.signal) > 1 || static_cast<std::size_t>(intensity.factor) > 2) refuse("its signal or factor is none of those there are");
  const std::string_view zone = intensity.zone;
  if (zone.size() > 100 || std::any_of(zone.begin(), zone.end(), [](char c) { return static_cast<unsigned char>(c) < ' '; })) refuse(concat({"a zone's name must be up to 100 printable characters, not ", excerpt(zone)}));
  if (intensity.from < CarbonTime{}) refuse("a carbon intensity is valid from before 1970");
  if (intensity.until < intensity.from) refuse("a carbon intensity ends before it begins");
}
/// "average and marginal", if they must not be added up, else empty.
inline std::string clash(const CarbonIntensity& a, const CarbonIntensity& b) {
  if (a.signal != b.signal) return concat({name_of(a.signal), " and ", name_of(b.signal)});
  if (a.factor != b.factor && a.factor != CarbonFactor::unknown && b.factor != CarbonFactor::unknown) return concat({name_of(a.factor), " and ", name_of(b.factor)});
  return {};
}

}  // namespace detail

/// The same at all times, e.g. the annual mean of a grid. Of any particular hour that is an estimate, and marked so.
class StaticIntensity {
 public:
  /// g CO2e per kWh.
  explicit StaticIntensity(double grams_per_kwh, CarbonSignal signal = CarbonSignal::average, CarbonFactor factor = CarbonFactor::unknown, std::string zone = {}, std::string source = "constant") {
    intensity_.grams_per_kwh = grams_per_kwh + 0.0;  // which makes 0 of -0
    intensity_.relative_sigma = estimated_intensity_sigma;
    intensity_.signal = signal;
    intensity_.factor = factor;
    intensity_.zone = std::move(zone);
    intensity_.estimated = true;
    intensity_.source = std::move(source);
    if (!intensity_.known()) throw Error(Errc::invalid_argument, "StaticIntensity: not a number; where nothing is known, set no source");
    detail::check_intensity(intensity_, "StaticIntensity", Errc::invalid_argument);
  }
  std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const { return {{from, to, intensity_}}; }

 private:
  CarbonIntensity intensity_;
};

/// Asks a function what is known at a time. Its answer counts until it says it ends, and on if that has passed; one that is NaN
/// says that nothing is known until then. May be called by any thread.
class CallbackIntensity {
 public:
  explicit CallbackIntensity(std::function<CarbonIntensity(CarbonTime)> at) : at_(std::move(at)) {
    if (!at_) throw Error(Errc::invalid_argument, "CallbackIntensity: the function is empty");
  }

  /// Throws Errc::protocol where the function tells nonsense.
  std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const {
    std::vector<CarbonSpan> spans;
    std::size_t asked = 0;
    for (CarbonTime t = from; t < to;) {
      if (++asked > most_parts) throw Error(Errc::protocol, {"the callback that tells carbon intensities divides a window into more than ", most_parts, " parts"});
      CarbonIntensity intensity = at_(t);
      detail::check_intensity(intensity, "the callback that tells carbon intensities");
      const bool begun = intensity.from <= t;
      const CarbonTime end = !begun ? intensity.from : intensity.until > t ? intensity.until : to;
      const CarbonTime begin = std::exchange(t, std::min(end, to));
      if (begun && intensity.known()) spans.push_back({begin, t, std::move(intensity)});
    }
    return spans;
  }

 private:
  static constexpr std::size_t most_parts = 100'000;
  std::function<CarbonIntensity(CarbonTime)> at_;
};

/// What was published, figure by figure. Between the end of one and the next, and after the last, the one before goes on.
class IntensitySeries {
 public:
  IntensitySeries() = default;
  /// Sorted by `from`; one that has no `until` lasts until the next begins, but no longer than the shortest time between two (an hour
  /// if there is only one). Throws Errc::protocol where they overlap, are not known, or are not of one zone, signal and factor;
  /// `where(i)` names number i in its text.
  explicit IntensitySeries(std::vector<CarbonIntensity> entries, const std::function<std::string(std::size_t)>& where = [](std::size_t i) { return detail::concat({"intensity ", i}); })
      : entries_(std::move(entries)) {
    nanoseconds shortest = nanoseconds::max();
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      CarbonIntensity& entry = entries_[i];
      entry.grams_per_kwh += 0.0;  // which makes 0 of -0
      const auto refuse = [&](const std::string& what) { throw Error(Errc::protocol, {where(i), ": ", what}); };
      if (!entry.known()) refuse("the carbon intensity is not a number; leave the entry out where it is unknown");
      detail::check_intensity(entry, where(i));
      if (i == 0) continue;
      const CarbonIntensity& before = entries_[i - 1];
      if (entry.from == before.from) refuse(detail::concat({"begins at the same time as ", where(i - 1), "; keep one of them"}));
      if (entry.from < before.from) refuse(detail::concat({"begins before ", where(i - 1), "; sort the entries by time"}));
      if (before.until != open && before.until > entry.from) refuse(detail::concat({"begins before ", where(i - 1), " ends; intervals must not overlap"}));
      if (entry.zone != before.zone) refuse(detail::concat({"is of zone ", detail::excerpt(entry.zone), " and those before of ", detail::excerpt(before.zone), "; choose one, by IntensityChoice::zone or TALLY_CARBON_ZONE"}));
      if (const std::string clash = detail::clash(before, entry); !clash.empty()) refuse(detail::concat({clash, " intensities must not be mixed; keep one kind, or choose it by IntensityChoice::signal"}));
      shortest = std::min(shortest, entry.from - before.from);
    }
    if (entries_.size() == 1) shortest = std::chrono::hours(1);
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].until != open) continue;
      entries_[i].until = shortest > open - entries_[i].from ? open : entries_[i].from + shortest;
    }
  }

  std::span<const CarbonIntensity> entries() const { return entries_; }
  std::vector<CarbonSpan> over(CarbonTime from, CarbonTime to) const {
    std::vector<CarbonSpan> spans;
    auto entry = std::upper_bound(entries_.begin(), entries_.end(), from, [](CarbonTime t, const CarbonIntensity& e) { return t < e.from; });
    if (entry != entries_.begin()) --entry;
    for (; entry != entries_.end() && entry->from < to; ++entry) {
      const auto next = std::next(entry);
      spans.push_back({std::max(from, entry->from), next == entries_.end() ? to : std::min(to, next->from), *entry});
    }
    return spans;
  }

 private:
  static constexpr CarbonTime open = CarbonTime::max();
  std::vector<CarbonIntensity> entries_;
};

/// How joules become grams.
struct CarbonSettings {
  AnyCarbonSource source;  // none: grams are unknown
  double pue = 1.0;        // power usage effectiveness: what the building draws / what its computers draw; 1: its overhead is not counted
  nanoseconds stale_after = std::chrono::hours(2);  // a figure is used after its end, and called stale after that long
};

/// Grams of CO2-equivalent, and of what kind they are.
struct Carbon {
  Quantity grams;
  std::optional<CarbonSignal> signal;  // none where nothing was known, or nothing is added up yet
  CarbonFactor factor = CarbonFactor::unknown;
  Caveats caveats = 0;

  /// What a sum begins with.
  static Carbon zero() {
    Carbon none;
    none.grams = {0, 0, 0, 0, Provenance::measured};
    return none;
  }
  /// Throws Errc::invalid_argument for average and marginal grams, and for lifecycle and direct ones. Unknown and anything is unknown.
  Carbon& operator+=(const Carbon& more) {
    if (!more.signal) {
      grams = grams + more.grams;
    } else {
      if (signal)
        if (const std::string clash = detail::clash(kind(), more.kind()); !clash.empty())
          throw Error(Errc::invalid_argument, {clash, " grams of CO2 cannot be added up: they answer different questions; keep a sum for each"});
      factor = signal && factor != more.factor ? CarbonFactor::unknown : more.factor;
      signal = more.signal;
      grams = grams + more.grams;
    }
    caveats |= more.caveats;
    return *this;
  }

 private:
  CarbonIntensity kind() const {
    CarbonIntensity kind;
    kind.signal = *signal;
    kind.factor = factor;
    return kind;
  }
};

/// Turns joules into grams.
class CarbonAccount {
 public:
  /// Throws Errc::invalid_argument for a PUE that is not from 1 to 10, or a limit below 0.
  explicit CarbonAccount(CarbonSettings settings) : settings_(std::move(settings)) {
    if (!(settings_.pue >= 1 && settings_.pue <= 10)) throw Error(Errc::invalid_argument, {"a PUE must be from 1 to 10, the building's power over its computers', not ", detail::digits(settings_.pue)});
    if (settings_.stale_after < nanoseconds{0}) throw Error(Errc::invalid_argument, "a carbon intensity cannot be stale before it ends: stale_after must not be negative");
  }
  const CarbonSettings& settings() const { return settings_; }

  /// The grams for joules that were drawn in [begin, end), at constant power: g = E/3.6e6 * PUE * (mean of the intensity over
  /// that time), exactly, however often it changes. With begin == end, what holds then. Unknown where the joules are, or the
  /// intensity for any part of it. The errors of joules and intensity are independent; those of intensities of one source are
  /// fully correlated. The bounds are the joules', at that very intensity. Provenance: the least of the joules', and of the
  /// intensities' (see CarbonIntensity::per_kwh); modelled where one is stale. Throws Errc::invalid_argument for joules
  /// that cannot be and where average and marginal would mix, Errc::protocol where the source tells nonsense.
  Carbon of(const Quantity& joules, CarbonTime begin, CarbonTime end) const {
    if (begin < CarbonTime{} || end < begin || end == CarbonTime::max()) throw Error(Errc::invalid_argument, "carbon is accounted for an interval after 1970 that does not end before it begins");
    if (joules.known() && !(joules.value >= 0 && std::isfinite(joules.value))) throw Error(Errc::invalid_argument, "carbon is accounted for joules that are finite and not negative, or unknown");
    const CarbonTime last = std::max(end, begin + nanoseconds{1});
    Carbon carbon = Carbon::zero();
    double per_kwh = 0, sigma = 0;  // of the intensity, in g/kWh
    Provenance provenance = Provenance::prorated;
    CarbonTime covered = begin;
    for (const CarbonSpan& span : settings_.source.over(begin, last)) {
      const CarbonIntensity& intensity = span.intensity;
      detail::check_intensity(intensity, "the carbon source");
      if (span.begin < covered || span.end <= span.begin || span.end > last) throw Error(Errc::protocol, "the carbon source tells spans that overlap, are out of order or outside the time it was asked for");
      if (!intensity.known()) continue;
      Carbon kind = Carbon::zero();
      kind.signal = intensity.signal;
      kind.factor = intensity.factor;
      if (intensity.estimated) kind.caveats |= Caveat::carbon_estimated;
      provenance = std::min(provenance, intensity.per_kwh().provenance);
      if (intensity.until < span.end && span.end - intensity.until > settings_.stale_after) {
        kind.caveats |= Caveat::carbon_stale;
        provenance = Provenance::modelled;
      }
      carbon += kind;
      if (span.begin != covered) carbon.grams = {};
      covered = span.end;
      const double weight = static_cast<double>((span.end - span.begin).count()) / static_cast<double>((last - begin).count());
      per_kwh += weight * intensity.grams_per_kwh;
      sigma += weight * intensity.grams_per_kwh * intensity.relative_sigma;
    }
    if (covered != last || !carbon.grams.known() || !joules.known()) {
      carbon.grams = {};
      return carbon;
    }
    const auto grams = [&](double j, double intensity) { return intensity == 0 ? 0 : j / joules_per_kwh * settings_.pue * intensity; };
    carbon.grams = {grams(joules.value, per_kwh), std::hypot(grams(joules.sigma, per_kwh), grams(joules.value, sigma)), grams(joules.lower, per_kwh), grams(joules.upper, per_kwh),
                    std::min(joules.provenance, provenance), joules.split};
    return carbon;
  }

  /// The intensity at a time; unknown where nothing is known of it.
  CarbonIntensity intensity_at(CarbonTime t) const {
    if (t < CarbonTime{} || t == CarbonTime::max()) return {};
    std::vector<CarbonSpan> spans = settings_.source.over(t, t + nanoseconds{1});
    return spans.empty() ? CarbonIntensity{} : std::move(spans.front().intensity);
  }

 private:
  static constexpr double joules_per_kwh = 3.6e6;
  CarbonSettings settings_;
};

/// "13.2 +- 5.28 mg CO2e (modelled, average, carbon_stale)".
inline std::ostream& operator<<(std::ostream& out, const Carbon& carbon) {
  out << detail::grams_text(carbon.grams) << " CO2e (" << name_of(carbon.grams.provenance);
  if (carbon.signal) out << ", " << name_of(*carbon.signal);
  if (carbon.factor != CarbonFactor::unknown) out << ", " << name_of(carbon.factor);
  for (std::size_t bit = 0; bit < caveat_count; ++bit)
    if (const Caveat caveat{1u << bit}; has(carbon.caveats, caveat)) out << ", " << name_of(caveat);
  return out << ')';
}

/// What carbon is counted per.
enum class FunctionalUnit : std::uint8_t { operation, gigabyte_moved, step, job };

constexpr std::string_view name_of(FunctionalUnit unit) {
  constexpr std::string_view names[] = {"operation", "GB moved", "step", "job"};
  return names[static_cast<std::size_t>(unit)];
}

/// The making of the hardware, as far as a job is charged for it: M = TE * (TiR / EL) * (RR / ToR).
struct Embodied {
  Quantity hardware;                       // TE: grams of all of it, from its maker's life cycle assessment
  nanoseconds reserved{}, lifetime{};      // TiR: of the job; EL: expected of the hardware
  double resources = 1, of_resources = 1;  // RR of ToR, e.g. cores

  /// At most modelled. Throws Errc::invalid_argument where more is reserved than there is.
  Quantity grams() const {
    const auto refuse = [](std::string_view what) { throw Error(Errc::invalid_argument, {"embodied carbon: ", what}); };
    if (hardware.known() && !(hardware.value >= 0 && std::isfinite(hardware.value))) refuse("grams must be finite and not negative");
    if (reserved < nanoseconds{0} || lifetime <= nanoseconds{0} || reserved > lifetime) refuse("the time reserved must be from 0 to the lifetime, and that longer than 0");
    if (!(resources >= 0 && of_resources > 0 && resources <= of_resources && std::isfinite(of_resources))) refuse("the resources reserved must be from 0 to all there are");
    Quantity m = hardware * (static_cast<double>(reserved.count()) / static_cast<double>(lifetime.count()) * (resources / of_resources));
    m.provenance = std::min(m.provenance, Provenance::modelled);
    return m;
  }
};

/// Software Carbon Intensity, specification 1.1 of the Green Software Foundation: (O + M) per R, location-based. O and M are
/// told apart, and M is counted only where it is asked for.
struct Sci {
  Carbon operational;                // O per unit
  std::optional<Quantity> embodied;  // M per unit, grams
  FunctionalUnit unit = FunctionalUnit::job;
  double units = 1;  // how many there were

  /// Grams per unit: O + M, or O alone where M is not counted.
  Quantity score() const { return embodied ? operational.grams + *embodied : operational.grams; }
};

/// `units` were done for these grams. Throws Errc::invalid_argument if there were none.
inline Sci sci_of(Carbon operational, FunctionalUnit unit, double units, const std::optional<Embodied>& embodied = std::nullopt) {
  if (!(units > 0 && std::isfinite(1 / units) && std::isfinite(units))) throw Error(Errc::invalid_argument, {"software carbon intensity is per ", name_of(unit), ", and there was none"});
  const double share = 1 / units;
  operational.grams = operational.grams * share;
  Sci sci{std::move(operational), std::nullopt, unit, units};
  if (embodied) sci.embodied = embodied->grams() * share;
  return sci;
}

/// "SCI: 13.2 +- 5.28 mg CO2e (modelled, average) per operation, embodied carbon not counted".
inline std::ostream& operator<<(std::ostream& out, const Sci& sci) {
  out << "SCI: " << sci.operational << " per " << name_of(sci.unit);
  if (!sci.embodied) return out << ", embodied carbon not counted";
  return out << ", and embodied " << detail::grams_text(*sci.embodied) << " CO2e (" << name_of(sci.embodied->provenance) << ')';
}

}  // namespace tally::inline v0
