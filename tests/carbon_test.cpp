// SPDX-License-Identifier: Apache-2.0
// Carbon: grams in closed form however the intensity changes, what is unknown, old or estimated, what must not be mixed, and
// every way in which a CSV file, a callback or the environment can be wrong.
#include <catch2/catch.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <tally/energy/carbon_settings.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
constexpr CarbonTime noon{1'704'110'400s};  // 2024-01-01T12:00:00Z

/// That many kWh, so that the arithmetic of the tests is exact.
Quantity kwh(double value, double sigma = 0, Provenance provenance = Provenance::measured) { return {value * 3.6e6, sigma * 3.6e6, value * 1.8e6, value * 7.2e6, provenance}; }

CarbonIntensity entry(CarbonTime from, double grams, CarbonTime until = CarbonTime::max()) {
  CarbonIntensity intensity;
  intensity.grams_per_kwh = grams;
  intensity.from = from;
  intensity.until = until;
  intensity.zone = "DE";
  return intensity;
}
CarbonIntensity marginal(CarbonIntensity intensity) {
  intensity.signal = CarbonSignal::marginal;
  return intensity;
}

/// What it throws, "CODE: TEXT".
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}
void expect_error(const std::function<void()>& f, const std::vector<std::string>& parts) {
  const std::string what = error_of(f);
  for (const std::string& part : parts) {
    INFO(what);
    CHECK(what.find(part) != what.npos);
  }
}

class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
};

class Folder {
 public:
  Folder() { REQUIRE(::mkdtemp(path_)); }
  ~Folder() {
    for (const std::string& file : files_) ::unlink(file.c_str());
    ::rmdir(path_);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string name(const std::string& file) {
    files_.push_back(path() + "/" + file);
    return files_.back();
  }
  std::string write(const std::string& file, std::string_view text) {
    std::ofstream(name(file), std::ios::binary) << text;
    return files_.back();
  }
  std::string path() const { return path_; }

 private:
  char path_[32] = "/tmp/tally_carbon_XXXXXX";
  std::vector<std::string> files_;
};

std::string text_of(const auto& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

}  // namespace

TEST_CASE("I15: grams are joules in kWh times PUE times intensity, and linear in the intensity") {
  for (const double intensity : {0.0, 1.0, 475.0, 950.0, 10'000.0})
    for (const double pue : {1.0, 1.5, 10.0}) {
      const CarbonAccount account({StaticIntensity(intensity), pue});
      const Carbon carbon = account.of(kwh(2, 0.5), noon, noon + 1h);
      CHECK(carbon.grams.value == 2 * pue * intensity);
      CHECK(carbon.grams.lower == 1 * pue * intensity);
      CHECK(carbon.grams.upper == 4 * pue * intensity);
      CHECK(carbon.grams.sigma == Approx(2 * pue * intensity * std::hypot(0.25, estimated_intensity_sigma)));
      CHECK(carbon.signal == CarbonSignal::average);
    }
  // 1 J at 475 g/kWh.
  CHECK(CarbonAccount({StaticIntensity(475)}).of({1, 0, 1, 1, Provenance::measured}, noon, noon).grams.value == Approx(0.131944444e-3));
  CHECK(std::isnan(CarbonAccount({StaticIntensity(475)}).of(kwh(1, not_a_number), noon, noon).grams.sigma));
  CHECK(CarbonAccount({StaticIntensity(0)}).of({1, 0, 0, infinity, Provenance::measured}, noon, noon).grams.upper == 0);
}

TEST_CASE("I15: an intensity that changes within a window counts for as long as it held") {
  const IntensitySeries series({entry(noon, 400), entry(noon + 1h, 200), entry(noon + 2h, 800)});
  const CarbonAccount account({series});
  const auto grams = [&](auto from, auto to) { return account.of(kwh(1), noon + from, noon + to).grams.value; };
  CHECK(grams(0min, 30min) == 400);
  CHECK(grams(0min, 60min) == 400);
  CHECK(grams(60min, 60min) == 200);
  CHECK(grams(30min, 90min) == 0.5 * 400 + 0.5 * 200);
  CHECK(grams(45min, 105min) == 0.25 * 400 + 0.75 * 200);
  CHECK(grams(30min, 150min) == 0.25 * 400 + 0.5 * 200 + 0.25 * 800);
  // Errors of one source's intensities add up.
  const Quantity g = account.of(kwh(1), noon + 30min, noon + 90min).grams;
  CHECK(g.sigma == Approx(300 * published_intensity_sigma));

  // Halves of a window add up to the whole, wherever it is cut.
  for (int cut = 1; cut < 180; cut += 7) {
    Carbon whole = Carbon::zero();
    whole += account.of(kwh(cut / 180.0), noon, noon + cut * 1min);
    whole += account.of(kwh(1 - cut / 180.0), noon + cut * 1min, noon + 180min);
    CHECK(whole.grams.value == Approx(grams(0min, 180min)));
  }
}

TEST_CASE("I15: scaling every intensity scales the grams of a window over several") {
  const auto grams = [](double factor) {
    const CarbonAccount account({IntensitySeries({entry(noon, 96 * factor), entry(noon + 7min, 512 * factor), entry(noon + 9min, 33 * factor)})});
    return account.of(kwh(3), noon + 1min, noon + 11min).grams.value;
  };
  CHECK(grams(2) == 2 * grams(1));
  CHECK(grams(8) == 8 * grams(1));
}

TEST_CASE("what is not known stays unknown") {
  const auto expect_unknown = [](const Carbon& carbon) {
    CHECK(!carbon.grams.known());
    CHECK(std::isnan(carbon.grams.value));
  };
  expect_unknown(CarbonAccount(CarbonSettings{}).of(kwh(1), noon, noon + 1h));
  expect_unknown(CarbonAccount({IntensitySeries()}).of(kwh(1), noon, noon + 1h));
  const CarbonAccount account({IntensitySeries({entry(noon, 400)})});
  expect_unknown(account.of(Quantity{}, noon, noon + 1h));
  expect_unknown(account.of(kwh(1), noon - 2h, noon - 1h));
  expect_unknown(account.of(kwh(1), noon - 1ns, noon + 1h));
  CHECK(account.of(kwh(1), noon, noon + 1h).grams.known());
  // A hole in the middle, told by a callback.
  const CarbonAccount holed({CallbackIntensity([](CarbonTime t) {
    if (t < noon) return entry(CarbonTime{}, 100, noon);
    if (t < noon + 1h) return entry(noon, not_a_number, noon + 1h);
    return entry(noon + 1h, 100);
  })});
  CHECK(holed.of(kwh(1), noon - 1h, noon).grams.value == 100);
  CHECK(holed.of(kwh(1), noon + 1h, noon + 2h).grams.value == 100);
  expect_unknown(holed.of(kwh(1), noon - 1h, noon + 1ns));
  expect_unknown(holed.of(kwh(1), noon - 1h, noon + 2h));
  // Unknown and anything is unknown.
  Carbon whole = account.of(kwh(1), noon, noon + 1h);
  whole += CarbonAccount(CarbonSettings{}).of(kwh(1), noon, noon);
  expect_unknown(whole);
  CHECK(text_of(whole) == "unknown g CO2e (unknown, average)");
  CHECK(!account.intensity_at(noon - 1ns).known());
  CHECK(account.intensity_at(noon).grams_per_kwh == 400);
  CHECK(!account.intensity_at(CarbonTime::max()).known());
}

TEST_CASE("I15: an intensity is used after its end, and called stale when that is longer ago than the limit") {
  const IntensitySeries series({entry(noon, 400), entry(noon + 1h, 200)});  // the last one ends at 14:00, as they are an hour apart
  const CarbonAccount account({series}), strict({series, 1.0, 0ns}), lax({series, 1.0, 24h});
  const auto stale = [](const CarbonAccount& a, auto from, auto to) {
    const Carbon carbon = a.of(kwh(1), noon + from, noon + to);
    CHECK(carbon.grams.value == 200);
    CHECK((carbon.grams.provenance == Provenance::modelled) == has(carbon.caveats, Caveat::carbon_stale));
    return has(carbon.caveats, Caveat::carbon_stale);
  };
  CHECK_FALSE(stale(account, 1h, 2h));
  CHECK_FALSE(stale(account, 3h, 4h));
  CHECK(stale(account, 3h, 4h + 1ns));
  CHECK(stale(account, 1000h, 1001h));
  CHECK_FALSE(stale(strict, 1h, 2h));
  CHECK(stale(strict, 1h, 2h + 1ns));
  CHECK_FALSE(stale(lax, 25h, 26h));
  CHECK(stale(lax, 25h, 26h + 1ns));
  // A hole between two.
  const CarbonAccount holed({IntensitySeries({entry(noon, 400, noon + 1h), entry(noon + 9h, 200)})});
  CHECK(holed.of(kwh(1), noon, noon + 3h).caveats == 0);
  CHECK(holed.of(kwh(1), noon + 8h, noon + 10h).caveats == static_cast<Caveats>(Caveat::carbon_stale));
  CHECK(holed.of(kwh(1), noon + 8h, noon + 10h).grams.value == 300);
}

TEST_CASE("grams are never better known than the grid's figure: prorated, and modelled where it is estimated, stale or marginal") {
  CarbonIntensity estimated = entry(noon, 400);
  estimated.estimated = true;
  const auto of = [](CarbonIntensity intensity, Provenance provenance) { return CarbonAccount({IntensitySeries({intensity})}).of(kwh(1, 0, provenance), noon, noon + 1h); };
  CHECK(of(entry(noon, 400), Provenance::measured).grams.provenance == Provenance::prorated);
  CHECK(of(entry(noon, 400), Provenance::modelled).grams.provenance == Provenance::modelled);
  CHECK(of(estimated, Provenance::measured).grams.provenance == Provenance::modelled);
  CHECK(of(estimated, Provenance::measured).caveats == static_cast<Caveats>(Caveat::carbon_estimated));
  CHECK(of(marginal(entry(noon, 400)), Provenance::measured).grams.provenance == Provenance::modelled);
  CHECK(CarbonAccount({StaticIntensity(400)}).of(kwh(1), noon, noon).caveats == static_cast<Caveats>(Caveat::carbon_estimated));
}

TEST_CASE("average and marginal, lifecycle and direct never get into one sum") {
  const auto one = [](CarbonSignal signal, CarbonFactor factor) { return CarbonAccount({StaticIntensity(400, signal, factor)}).of(kwh(1), noon, noon); };
  Carbon whole = Carbon::zero();
  whole += one(CarbonSignal::average, CarbonFactor::lifecycle);
  whole += one(CarbonSignal::average, CarbonFactor::lifecycle);
  CHECK(whole.grams.value == 800);
  CHECK(whole.factor == CarbonFactor::lifecycle);
  expect_error([&] { whole += one(CarbonSignal::marginal, CarbonFactor::lifecycle); }, {"average and marginal", "cannot be added up"});
  expect_error([&] { whole += one(CarbonSignal::average, CarbonFactor::direct); }, {"lifecycle and direct", "cannot be added up"});
  CHECK(whole.grams.value == 800);
  whole += one(CarbonSignal::average, CarbonFactor::unknown);
  CHECK(whole.factor == CarbonFactor::unknown);
  CHECK(whole.grams.value == 1200);
  // Nor within a window.
  const CarbonAccount account({CallbackIntensity([](CarbonTime t) { return t < noon ? entry(CarbonTime{}, 400, noon) : marginal(entry(noon, 400)); })});
  CHECK(account.of(kwh(1), noon - 1h, noon).signal == CarbonSignal::average);
  CHECK(account.of(kwh(1), noon, noon + 1h).signal == CarbonSignal::marginal);
  expect_error([&] { account.of(kwh(1), noon - 1h, noon + 1h); }, {"average and marginal"});
  expect_error([&] { IntensitySeries({entry(noon, 400), marginal(entry(noon + 1h, 400))}); }, {"intensity 1", "average and marginal", "must not be mixed"});
}

TEST_CASE("settings, joules and times that cannot be are refused") {
  for (const double pue : {0.99, 0.0, -1.0, 10.1, not_a_number, infinity}) expect_error([&] { CarbonAccount({StaticIntensity(1), pue}); }, {"invalid argument", "a PUE must be from 1 to 10"});
  expect_error([] { CarbonAccount({StaticIntensity(1), 1.0, -1ns}); }, {"stale_after must not be negative"});
  for (const double g : {-1.0, -1e-300, 1e308, 10'001.0, not_a_number, infinity, -infinity}) expect_error([&] { StaticIntensity{g}; }, {"invalid argument", "StaticIntensity"});
  CHECK(!std::signbit(CarbonAccount({StaticIntensity(-0.0)}).of(kwh(1), noon, noon).grams.value));
  const CarbonAccount account({StaticIntensity(400)});
  for (const double j : {-1.0, infinity, not_a_number}) expect_error([&] { account.of({j, 0, 0, 0, Provenance::measured}, noon, noon); }, {"invalid argument", "joules"});
  expect_error([&] { account.of(kwh(1), noon, noon - 1ns); }, {"before it begins"});
  expect_error([&] { account.of(kwh(1), CarbonTime::min(), noon); }, {"after 1970"});
  expect_error([&] { account.of(kwh(1), noon, CarbonTime::max()); }, {"invalid argument"});
  // The longest window and the largest energy still give a number.
  const Carbon most = account.of({std::numeric_limits<double>::max(), 0, 0, infinity, Provenance::measured}, CarbonTime{}, CarbonTime::max() - 1ns);
  CHECK(std::isfinite(most.grams.value));
}

TEST_CASE("a source that tells nonsense is found out") {
  expect_error([] { CallbackIntensity(nullptr); }, {"empty"});
  const auto with = [](CarbonIntensity intensity) { CarbonAccount({CallbackIntensity([=](CarbonTime) { return intensity; })}).of(kwh(1), noon, noon + 1h); };
  expect_error([&] { with(entry({}, -1)); }, {"malformed data", "callback", "negative"});
  expect_error([&] { with(entry({}, 1e308)); }, {"above 10000"});
  expect_error([&] { with(entry({}, infinity)); }, {"above 10000"});
  expect_error([&] { with(entry(noon, 1, noon - 1h)); }, {"ends before it begins"});
  expect_error([&] { with(entry(CarbonTime::min(), 1)); }, {"before 1970"});
  CarbonIntensity wild = entry({}, 1);
  wild.relative_sigma = -1;
  expect_error([&] { with(wild); }, {"relative standard error"});
  wild = entry({}, 1);
  wild.zone = "a\x1b[2J";
  expect_error([&] { with(wild); }, {"zone", "'a?[2J'"});
  wild = entry({}, 1);
  wild.signal = static_cast<CarbonSignal>(7);
  expect_error([&] { with(wild); }, {"signal"});
  expect_error([] { CarbonAccount({CallbackIntensity([](CarbonTime t) { return entry(t, 1, t + 1ns); })}).of(kwh(1), noon, noon + 1h); }, {"more than 100000 parts"});

  struct Fixed {
    std::vector<CarbonSpan> spans;
    std::vector<CarbonSpan> over(CarbonTime, CarbonTime) const { return spans; }
  };
  static_assert(CarbonSource<Fixed> && CarbonSource<StaticIntensity> && CarbonSource<CallbackIntensity> && CarbonSource<IntensitySeries> && CarbonSource<AnyCarbonSource> && !CarbonSource<int>);
  const auto tell = [](std::vector<CarbonSpan> spans) { return CarbonAccount({Fixed{std::move(spans)}}).of(kwh(1), noon, noon + 1h); };
  CHECK(tell({{noon, noon + 1h, entry({}, 300)}}).grams.value == 300);
  expect_error([&] { tell({{noon - 1ns, noon + 1h, entry({}, 1)}}); }, {"carbon source", "outside"});
  expect_error([&] { tell({{noon, noon + 2h, entry({}, 1)}}); }, {"outside"});
  expect_error([&] { tell({{noon, noon, entry({}, 1)}}); }, {"out of order"});
  expect_error([&] { tell({{noon, noon + 40min, entry({}, 1)}, {noon + 20min, noon + 1h, entry({}, 1)}}); }, {"overlap"});
  expect_error([&] { tell({{noon, noon + 1h, entry({}, -5)}}); }, {"negative"});
  // A callback that knows nothing until later, or whose figure is old.
  const CarbonAccount late({CallbackIntensity([](CarbonTime) { return entry(noon, 500, noon + 1h); })});
  CHECK(!late.of(kwh(1), noon - 1h, noon + 1h).grams.known());
  CHECK(late.of(kwh(1), noon, noon + 2h).grams.value == 500);
  CHECK(has(late.of(kwh(1), noon + 9h, noon + 10h).caveats, Caveat::carbon_stale));
}

TEST_CASE("a series is sorted, does not overlap and is of one kind") {
  expect_error([] { IntensitySeries({entry(noon, 1), entry(noon, 2)}); }, {"intensity 1: begins at the same time as intensity 0"});
  expect_error([] { IntensitySeries({entry(noon, 1), entry(noon - 1ns, 2)}); }, {"intensity 1: begins before intensity 0", "sort"});
  expect_error([] { IntensitySeries({entry(noon, 1, noon + 2h), entry(noon + 1h, 2)}); }, {"intensity 1: begins before intensity 0 ends", "overlap"});
  expect_error([] { IntensitySeries({entry(noon, not_a_number)}); }, {"intensity 0", "not a number"});
  CarbonIntensity french = entry(noon + 1h, 50);
  french.zone = "FR";
  expect_error([&] { IntensitySeries({entry(noon, 1), french}); }, {"zone 'FR'", "'DE'", "TALLY_CARBON_ZONE"});

  const IntensitySeries series({entry(noon, 1), entry(noon + 1h, 2), entry(noon + 5h, 3)});
  CHECK(series.entries()[0].until == noon + 1h);
  CHECK(series.entries()[1].until == noon + 2h);
  CHECK(series.entries()[2].until == noon + 6h);
  CHECK(IntensitySeries({entry(noon, 1)}).entries()[0].until == noon + 1h);
}

TEST_CASE("software carbon intensity is O plus M per unit, and M only where it is asked for") {
  const Carbon operational = CarbonAccount({StaticIntensity(400), 1.25}).of(kwh(2, 0.5), noon, noon + 1h);
  const Sci plain = sci_of(operational, FunctionalUnit::operation, 8);
  CHECK(plain.operational.grams.value == 125);
  CHECK(!plain.embodied);
  CHECK(plain.score().value == 125);
  CHECK(text_of(plain) == "SCI: 125 +- 40.0 g CO2e (modelled, average, carbon_estimated) per operation, embodied carbon not counted");

  // TE 1200 kg, a 1/32 of its 4 years, 16 of 64 cores: 9375 g.
  const Embodied server{{1.2e6, 0.6e6, 0, 2.4e6, Provenance::modelled}, 1095h, 35'040h, 16, 64};
  CHECK(server.grams().value == 1.2e6 / 32 / 4);
  CHECK(server.grams().sigma == 0.6e6 / 32 / 4);
  const Sci whole = sci_of(operational, FunctionalUnit::step, 4, server);
  CHECK(whole.operational.grams.value == 250);
  CHECK(whole.embodied->value == 9375.0 / 4);
  CHECK(whole.score().value == 250 + 9375.0 / 4);
  CHECK(whole.score().provenance == Provenance::modelled);
  CHECK(text_of(whole) == "SCI: 250 +- 80.0 g CO2e (modelled, average, carbon_estimated) per step, and embodied 2.34 +- 1.17 kg CO2e (modelled)");
  const Sci unknown = sci_of(operational, FunctionalUnit::job, 1, Embodied{{}, 1h, 2h});
  CHECK(!unknown.score().known());
  CHECK(unknown.operational.grams.known());

  for (const double units : {0.0, -1.0, not_a_number, infinity, 1e-320}) expect_error([&] { sci_of(operational, FunctionalUnit::gigabyte_moved, units); }, {"invalid argument", "per GB moved", "none"});
  const auto refused = [](Embodied e) { return error_of([&] { e.grams(); }).find("embodied carbon: ") != std::string::npos; };
  const Quantity te{1, 0, 1, 1, Provenance::modelled};
  CHECK_FALSE(refused({te, 1h, 1h, 1, 1}));
  CHECK(refused({te, 2h, 1h, 1, 1}));
  CHECK(refused({te, 0h, 0h, 1, 1}));
  CHECK(refused({te, -1h, 1h, 1, 1}));
  CHECK(refused({te, 1h, 1h, 2, 1}));
  CHECK(refused({te, 1h, 1h, not_a_number, 1}));
  CHECK(refused({te, 1h, 1h, 0, 0}));
  CHECK(refused({te, 1h, 1h, 0, infinity}));
  CHECK(refused({{-1, 0, 0, 1, Provenance::modelled}, 1h, 1h, 1, 1}));
}

TEST_CASE("grams are printed in the unit that fits, with error, provenance and caveats") {
  const auto text = [](double grams, double sigma) { return detail::grams_text(Quantity{grams, sigma, 0, 0, Provenance::modelled}); };
  CHECK(text(0.0132, 0.00528) == "13.2 +- 5.28 mg");
  CHECK(text(0.132e-3, 0.0105e-3) == "132 +- 10.5 ug");
  CHECK(text(1.5, 0.5) == "1.50 +- 0.50 g");
  CHECK(text(2500, 100) == "2.50 +- 0.10 kg");
  CHECK(text(6.6e-11, 0) == "0.07 +- 0 ng");
  CHECK(text(5.5e6, not_a_number) == "5.50 t, error unknown");
  CHECK(text(0, 0) == "0 +- 0 ng");
  CHECK(detail::grams_text(Quantity{}) == "unknown g");
  CHECK(detail::grams_text(Quantity{1e308, 1e308, 0, 0, Provenance::modelled}).ends_with(" t"));
  CarbonIntensity intensity = entry(noon, 400);
  intensity.factor = CarbonFactor::direct;
  intensity.source = "de.csv";
  CHECK(describe(intensity) == "zone DE, average, direct, from 'de.csv'");
  intensity.until = *parse_timestamp("2024-01-15T23:05:59Z");
  CHECK(describe(intensity, intensity.until) == describe(intensity));
  CHECK(describe(intensity, intensity.until + 1ns) == "zone DE, average, direct, from 'de.csv', which ended at 2024-01-15T23:05Z");
  intensity.until = CarbonTime::max();
  CHECK(text_of(CarbonAccount({IntensitySeries({intensity})}).of(kwh(1, 0.1), noon + 9h, noon + 10h)) == "400 +- 56.6 g CO2e (modelled, average, direct, carbon_stale)");
}

TEST_CASE("timestamps are ISO 8601 with an offset, checked to the last digit") {
  const auto seconds = [](std::string_view text) {
    const auto time = parse_timestamp(text);
    return time ? std::chrono::floor<std::chrono::seconds>(*time).time_since_epoch().count() : -1;
  };
  CHECK(seconds("1970-01-01T00:00:00Z") == 0);
  CHECK(seconds("2024-01-01T12:00Z") == 1'704'110'400);
  CHECK(seconds("2024-01-01T12:00:00.000Z") == 1'704'110'400);
  CHECK(seconds("2024-01-01T12:00:00+00:00") == 1'704'110'400);
  CHECK(seconds("2024-01-01T13:30:00+01:30") == 1'704'110'400);
  CHECK(seconds("2024-01-01T06:00:00-06:00") == 1'704'110'400);
  CHECK(seconds("2024-02-29T00:00:00Z") == 1'709'164'800);
  CHECK(seconds("2000-02-29T00:00:00Z") == 951'782'400);
  CHECK(seconds("2199-12-31T23:59:59Z") == 7'258'118'399);
  CHECK(parse_timestamp("2024-01-01T12:00:00.000000001Z") == noon + 1ns);
  CHECK(parse_timestamp("2024-01-01T12:00:00.25Z") == noon + 250ms);
  for (const char* bad : {"", "2024", "2024-01-01", "2024-01-01T12:00:00", "2024-01-01 12:00:00Z", "2024-01-01t12:00:00Z", "2024-01-01T12:00:00z", "2024-1-1T12:00:00Z",
                          "2023-02-29T00:00:00Z", "2100-02-29T00:00:00Z", "2024-02-30T00:00:00Z", "2024-04-31T00:00:00Z", "2024-00-01T00:00:00Z", "2024-13-01T00:00:00Z", "2024-01-00T00:00:00Z",
                          "2024-01-32T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T12:60:00Z", "2024-01-01T23:59:60Z", "2024-01-01T12:00:00.Z", "2024-01-01T12:00:00.0000000001Z",
                          "2024-01-01T12:00:00+0100", "2024-01-01T12:00:00+01", "2024-01-01T12:00:00+15:00", "2024-01-01T12:00:00+01:60", "2024-01-01T12:00:00Zx", "2024-01-01T12Z",
                          "1969-12-31T23:59:59Z", "1970-01-01T00:00:00+00:01", "2200-01-01T00:00:00Z", "9999-01-01T00:00:00Z", "-024-01-01T00:00:00Z", "2024-01-01T+1:00:00Z", "2024-01-01T12:00:00 Z"}) {
    INFO(bad);
    CHECK(!parse_timestamp(bad));
  }
}

TEST_CASE("CSV names its columns, in any order, with or without quotes") {
  const IntensitySeries series = parse_intensity_csv(
      "\xef\xbb\xbfzone, \"gco2e_per_kwh\",note,datetime,until,signal,factor,estimated\r\n"
      "DE,400,\"windy, \"\"very\"\"\",2024-01-01T12:00:00Z,,,,\r\n"
      "\r\n"
      "\"DE\",2e2,,2024-01-01T14:00:00+01:00,2024-01-01T13:30:00Z,average,lifecycle,true\n"
      "DE , 0 ,,2024-01-01T14:00:00Z,,average,unknown,false",
      "x.csv");
  REQUIRE(series.entries().size() == 3);
  const CarbonIntensity &a = series.entries()[0], &b = series.entries()[1], &c = series.entries()[2];
  CHECK(a.grams_per_kwh == 400);
  CHECK(a.from == noon);
  CHECK(a.until == noon + 1h);
  CHECK(a.factor == CarbonFactor::unknown);
  CHECK(a.relative_sigma == published_intensity_sigma);
  CHECK(b.grams_per_kwh == 200);
  CHECK(b.from == noon + 1h);
  CHECK(b.until == noon + 90min);
  CHECK(b.factor == CarbonFactor::lifecycle);
  CHECK(b.estimated);
  CHECK(b.relative_sigma == estimated_intensity_sigma);
  CHECK(b.source == "x.csv");
  CHECK(c.zone == "DE");
  CHECK(c.grams_per_kwh == 0);
  CHECK(!c.estimated);
}

TEST_CASE("of a CSV file with several zones or signals one is chosen") {
  const std::string text =
      "datetime,zone,gco2e_per_kwh,signal\n2024-01-01T12:00:00Z,DE,400,average\n2024-01-01T12:00:00Z,FR,50,average\n"
      "2024-01-01T13:00:00Z,DE,900,marginal\n2024-01-01T13:00:00Z,FR,60,average\n";
  const IntensitySeries france = parse_intensity_csv(text, "x.csv", {"FR", {}});
  REQUIRE(france.entries().size() == 2);
  CHECK(france.entries()[1].grams_per_kwh == 60);
  CHECK(parse_intensity_csv(text, "x.csv", {"DE", CarbonSignal::marginal}).entries()[0].grams_per_kwh == 900);
  expect_error([&] { parse_intensity_csv(text, "x.csv"); }, {"'x.csv', line 3", "begins at the same time as intensity file 'x.csv', line 2"});
  expect_error([&] { parse_intensity_csv("datetime,zone,gco2e_per_kwh\n2024-01-01T12:00:00Z,DE,1\n2024-01-01T13:00:00Z,FR,1\n", "x.csv"); }, {"'x.csv', line 3", "zone 'FR'", "'DE'", "TALLY_CARBON_ZONE"});
  expect_error([&] { parse_intensity_csv(text, "x.csv", {"DE", {}}); }, {"'x.csv', line 4", "average and marginal"});
  expect_error([&] { parse_intensity_csv(text, "x.csv", {"PL", {}}); }, {"'x.csv'", "nothing of zone 'PL'", "'DE'"});
  expect_error([&] { parse_intensity_csv(text, "x.csv", {"FR", CarbonSignal::marginal}); }, {"no marginal intensities", "average ones"});
}

TEST_CASE("what is wrong with a CSV file is said with its line and column") {
  const auto expect_bad = [](const std::string& text, const std::vector<std::string>& parts) {
    INFO(text.substr(0, 200));
    expect_error([&] { parse_intensity_csv(text, "x.csv"); }, {"malformed data: intensity file 'x.csv'"});
    expect_error([&] { parse_intensity_csv(text, "x.csv"); }, parts);
  };
  const std::string head = "datetime,zone,gco2e_per_kwh,until,signal,factor,estimated\n", good = "2024-01-01T12:00:00Z,DE,400,,,,\n";
  CHECK(parse_intensity_csv(head + good, "x.csv").entries().size() == 1);
  expect_bad("", {"no carbon intensities"});
  expect_bad(head, {"no carbon intensities"});
  expect_bad("datetime,gco2e_per_kwh\n", {"line 1", "no column zone"});
  expect_bad("zone,gco2e_per_kwh\n", {"line 1", "no column datetime"});
  expect_bad("datetime,zone\n", {"line 1", "no column gco2e_per_kwh"});
  expect_bad("datetime,zone,zone,gco2e_per_kwh\n", {"column zone is there twice"});
  expect_bad(head + good + "2024-01-01T13:00:00Z,DE,400\n", {"line 3", "3 fields and the first line 7"});
  expect_bad(head + good.substr(0, 12), {"line 2", "1 fields"});
  expect_bad(head + "yesterday,DE,400,,,,\n", {"line 2, datetime", "'yesterday'", "such as 2024-02-29T13:00:00Z"});
  expect_bad(head + "2023-02-29T12:00:00Z,DE,400,,,,\n", {"line 2, datetime"});
  expect_bad(head + "2024-01-01T12:00:00Z,,400,,,,\n", {"line 2, zone", "which grid"});
  for (const char* number : {"", "abc", "4 0", "0x10", "1e999", "+5", "400g"}) expect_bad(head + "2024-01-01T12:00:00Z,DE," + number + ",,,,\n", {"line 2, gco2e_per_kwh", "is no number"});
  for (const char* number : {"-1", "nan", "-nan", "inf", "1e308", "10000.1"}) expect_bad(head + "2024-01-01T12:00:00Z,DE," + number + ",,,,\n", {"line 2, gco2e_per_kwh", "not from 0 to 10000"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,2024-01-01T12:00:00Z,,,\n", {"line 2, until", "not after its datetime"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,soon,,,\n", {"line 2, until", "'soon'"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,,both,,\n", {"line 2, signal", "'both'"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,,,some,\n", {"line 2, factor", "'some'"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,,,,maybe\n", {"line 2, estimated", "'maybe'"});
  expect_bad(head + good + good, {"line 3", "same time", "line 2"});
  expect_bad(head + good + "2024-01-01T11:00:00Z,DE,400,,,,\n", {"line 3", "begins before", "line 2", "sort"});
  expect_bad(head + "2024-01-01T12:00:00Z,DE,400,2024-01-01T14:00:00Z,,,\n2024-01-01T13:00:00Z,DE,1,,,,\n", {"line 3", "overlap"});
  expect_bad(head + good + "2024-01-01T13:00:00Z,DE,400,,,lifecycle,\n2024-01-01T14:00:00Z,DE,400,,,direct,\n", {"line 4", "lifecycle and direct"});
  expect_bad(head + "\"2024-01-01T12:00:00Z,DE,400,,,,\n", {"line 2", "quote is not closed"});
  expect_bad(head + "\"2024-01-01T12:00:00Z\"x,DE,400,,,,\n", {"line 2", "after a closing quote"});
  expect_bad(std::string(100, ','), {"line 1", "more than 64 columns"});
  expect_bad(head + std::string(1, '\0'), {"not text"});
  expect_bad("\x7f\x45\x4c\x46\x02\x01", {"line 1"});
  expect_bad(head + "2024-01-01T12:00:00Z,\x1b[31m,400,,,,\n", {"zone", "'?[31m'"});
  expect_bad(head + "2024-01-01T12:00:00Z," + std::string(1000, 'x') + ",400,,,,\n", {"zone", "xxx...'"});
  expect_error([] { parse_intensity_csv(" {\"zone\": 1}", "x.json"); }, {"unsupported", "'x.json'", "tally/carbon_files.hpp", "tally::carbon_files", "read_intensity_file"});
}

TEST_CASE("an intensity file must be a plain one that can be read and is not endless") {
  Folder folder;
  const std::string good = folder.write("good.csv", "datetime,zone,gco2e_per_kwh\n2024-01-01T12:00:00Z,DE,400\n");
  CHECK(read_intensity_csv(good).entries().size() == 1);
  const auto expect_unreadable = [](const std::string& path, const std::string& why) { expect_error([&] { read_intensity_csv(path); }, {"invalid argument: intensity file ", why}); };
  expect_unreadable(folder.path() + "/none", "No such file");
  expect_unreadable("", "No such file");
  expect_unreadable(good + "/below", "Not a directory");
  expect_unreadable(folder.path(), "it is a directory");
  expect_unreadable("/dev/zero", "a pipe or a device");
  const std::string fifo = folder.name("fifo");
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  expect_unreadable(fifo, "a pipe or a device");
  expect_unreadable("/proc/self/mem", "Input/output error");  // a plain file, but for reading it
  const std::string large = folder.write("large.csv", "");
  REQUIRE(::truncate(large.c_str(), (16 << 20) + 1) == 0);
  expect_unreadable(large, "longer than 16 MiB");
  if (::geteuid() != 0) {
    REQUIRE(::chmod(good.c_str(), 0) == 0);
    expect_unreadable(good, "Permission denied");
  }
}

TEST_CASE("the environment says where intensities come from") {
  CHECK(!carbon_settings_of_environment().source);
  CHECK(carbon_settings_of_environment().pue == 1.0);
  CHECK(carbon_settings_of_environment().stale_after == 2h);
  {
    const Variable carbon("TALLY_CARBON", "475"), pue("TALLY_PUE", "1.25"), zone("TALLY_CARBON_ZONE", "SE");
    const CarbonAccount account(carbon_settings_of_environment());
    CHECK(account.of(kwh(2), noon, noon).grams.value == 2 * 475 * 1.25);
    CHECK(describe(account.intensity_at(noon)) == "zone SE, average, estimated, from 'TALLY_CARBON'");
  }
  Folder folder;
  const std::string file = folder.write("two.csv", "datetime,zone,gco2e_per_kwh\n2024-01-01T12:00:00Z,DE,400\n2024-01-01T12:00:00Z,FR,50\n");
  {
    const Variable carbon("TALLY_CARBON", "file:" + file), zone("TALLY_CARBON_ZONE", "FR");
    CHECK(CarbonAccount(carbon_settings_of_environment()).of(kwh(1), noon, noon + 1h).grams.value == 50);
  }
  {
    const Variable carbon("TALLY_CARBON", "file:" + file);
    expect_error([] { carbon_settings_of_environment(); }, {"TALLY_CARBON='file:" + file, "line 3"});
    // A reader of other formats is handed over.
    const CarbonSettings settings = carbon_settings_of_environment([&](const std::string& path, const IntensityChoice& choice) {
      CHECK(path == file);
      CHECK(choice.zone.empty());
      return IntensitySeries({entry(noon, 7)});
    });
    CHECK(CarbonAccount(settings).of(kwh(1), noon, noon).grams.value == 7);
  }
  {
    const Variable carbon("TALLY_CARBON", "file:" + folder.write("x.json", "{}"));
    expect_error([] { carbon_settings_of_environment(); }, {"unsupported", "TALLY_CARBON='file:", "tally/carbon_files.hpp"});
  }
  for (const char* bad : {"abc", "-1", "1e308", "nan", "inf", "475 ", "475g", "/x.csv", "10001"}) {
    const Variable carbon("TALLY_CARBON", bad);
    expect_error([] { carbon_settings_of_environment(); }, {"invalid argument: TALLY_CARBON='" + std::string(bad) + "'", "nor file:PATH"});
  }
  for (const char* bad : {"", "none", "./none.csv"}) {
    const Variable carbon("TALLY_CARBON", "file:" + std::string(bad));
    expect_error([] { carbon_settings_of_environment(); }, {"TALLY_CARBON='file:" + std::string(bad) + "'", "No such file"});
  }
  for (const char* bad : {"0.5", "11", "nan", "x", "-2", "1.0x"}) {
    const Variable pue("TALLY_PUE", bad);
    expect_error([] { carbon_settings_of_environment(); }, {"invalid argument: TALLY_PUE='" + std::string(bad) + "'", "from 1 to 10"});
  }
}
