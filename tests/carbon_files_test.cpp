// SPDX-License-Identifier: Apache-2.0
// Carbon intensities in the JSON of Electricity Maps and WattTime: what is taken from it, the exact conversion of pounds per MWh,
// and each way in which such a file can be wrong.
#include <catch2/catch.hpp>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <unistd.h>

#include <tally/carbon_files.hpp>
#include <tally/energy/carbon_settings.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

constexpr CarbonTime noon{1'704'110'400s};  // 2024-01-01T12:00:00Z

const std::string history = R"({"zone": "DE", "history": [
  {"zone": "DE", "carbonIntensity": 400, "datetime": "2024-01-01T12:00:00.000Z", "updatedAt": "2024-01-02T06:00:00.000Z", "createdAt": "2024-01-01T12:00:00.000Z",
   "emissionFactorType": "lifecycle", "isEstimated": false, "estimationMethod": null},
  {"zone": "DE", "carbonIntensity": 200.5, "datetime": "2024-01-01T13:00:00.000Z", "updatedAt": "2024-01-02T06:00:00.000Z",
   "emissionFactorType": "lifecycle", "isEstimated": true, "estimationMethod": "TIME_SLICER_AVERAGE"}]})";
const std::string watttime = R"({"data": [{"point_time": "2024-01-01T12:00:00+00:00", "value": 1000.0, "version": "3.2"}, {"point_time": "2024-01-01T12:05:00+00:00", "value": 0, "version": "3.2"}],
  "meta": {"region": "CAISO_NORTH", "signal_type": "co2_moer", "model": {"date": "2022-10-01"}, "units": "lbs_co2_per_mwh", "data_point_period_seconds": 300}})";

/// `text` with its first `part` replaced.
std::string with(std::string text, const std::string& part, const std::string& by) {
  const std::size_t at = text.find(part);
  REQUIRE(at != text.npos);
  return text.replace(at, part.size(), by);
}
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}
void expect_bad(const std::string& text, const std::vector<std::string>& parts) {
  const std::string what = error_of([&] { parse_intensity_file(text, "x.json"); });
  INFO(text.substr(0, 300));
  INFO(what);
  CHECK(what.starts_with("malformed data: intensity file 'x.json'"));
  for (const std::string& part : parts) CHECK(what.find(part) != what.npos);
}

}  // namespace

TEST_CASE("Electricity Maps' history is average and life cycle, and says which hours are estimated") {
  const IntensitySeries series = parse_intensity_file(history, "de.json");
  REQUIRE(series.entries().size() == 2);
  const CarbonIntensity &a = series.entries()[0], &b = series.entries()[1];
  CHECK(a.grams_per_kwh == 400);
  CHECK(a.from == noon);
  CHECK(a.until == noon + 1h);
  CHECK(a.zone == "DE");
  CHECK(a.signal == CarbonSignal::average);
  CHECK(a.factor == CarbonFactor::lifecycle);
  CHECK(!a.estimated);
  CHECK(b.grams_per_kwh == 200.5);
  CHECK(b.until == noon + 2h);
  CHECK(b.estimated);
  const CarbonAccount account({series});
  const Carbon both = account.of({3.6e6, 0, 3.6e6, 3.6e6, Provenance::measured}, noon + 30min, noon + 90min);
  CHECK(both.grams.value == 0.5 * 400 + 0.5 * 200.5);
  CHECK(both.caveats == static_cast<Caveats>(Caveat::carbon_estimated));
  CHECK(describe(account.intensity_at(noon)) == "zone DE, average, lifecycle, from 'de.json'");
}

TEST_CASE("Electricity Maps' latest, forecast and past range are read as well") {
  const IntensitySeries latest = parse_intensity_file(R"({"zone":"SE-SE3","carbonIntensity":25,"datetime":"2024-01-01T12:00:00.000Z","emissionFactorType":"direct","isEstimated":true})", "x");
  REQUIRE(latest.entries().size() == 1);
  CHECK(latest.entries()[0].factor == CarbonFactor::direct);
  CHECK(latest.entries()[0].until == noon + 1h);
  const IntensitySeries forecast = parse_intensity_file(R"({"zone":"DE","forecast":[{"carbonIntensity":326,"datetime":"2024-01-01T12:00:00.000Z"},{"carbonIntensity":297,"datetime":"2024-01-01T13:00:00.000Z"}],"updatedAt":"2024-01-01T11:00:00.000Z"})", "x");
  REQUIRE(forecast.entries().size() == 2);
  CHECK(forecast.entries()[1].zone == "DE");
  CHECK(forecast.entries()[1].estimated);
  CHECK(parse_intensity_file(with(history, "history", "data"), "x").entries().size() == 2);
}

TEST_CASE("an hour of which Electricity Maps knows nothing is a hole") {
  const IntensitySeries series = parse_intensity_file(with(history, "400", "null"), "x");
  REQUIRE(series.entries().size() == 1);
  CHECK(!CarbonAccount({series}).of({1, 0, 1, 1, Provenance::measured}, noon, noon + 1h).grams.known());
}

TEST_CASE("WattTime's pounds per MWh become grams per kWh exactly, and are marginal") {
  const IntensitySeries series = parse_intensity_file(watttime, "ca.json");
  REQUIRE(series.entries().size() == 2);
  const CarbonIntensity &a = series.entries()[0], &b = series.entries()[1];
  CHECK(a.grams_per_kwh == 453.59237);
  CHECK(b.grams_per_kwh == 0);
  CHECK(b.from == noon + 5min);
  CHECK(b.until == noon + 10min);
  CHECK(a.zone == "CAISO_NORTH");
  CHECK(a.signal == CarbonSignal::marginal);
  CHECK(a.factor == CarbonFactor::direct);
  CHECK(parse_intensity_file(with(watttime, "co2_moer", "co2_aoer"), "x").entries()[0].signal == CarbonSignal::average);
  CHECK(parse_intensity_file(with(watttime, "lbs_co2_per_mwh", "lbs/MWh"), "x").entries()[0].grams_per_kwh == 453.59237);
  CHECK(parse_intensity_file(with(watttime, "1000.0", "null"), "x").entries().size() == 1);

  // In one sum with Electricity Maps' they are refused.
  const Quantity kwh{3.6e6, 0, 3.6e6, 3.6e6, Provenance::measured};
  Carbon both = CarbonAccount({parse_intensity_file(history, "x")}).of(kwh, noon, noon);
  const std::string what = error_of([&] { both += CarbonAccount({series}).of(kwh, noon, noon); });
  CHECK(what.find("average and marginal") != what.npos);
  CHECK(error_of([&] { parse_intensity_file(watttime, "x", {"", CarbonSignal::average}); }).find("no average intensities, which were asked for, but marginal ones") != std::string::npos);
}

TEST_CASE("of several zones in JSON one is chosen") {
  const std::string two = R"({"history": [{"zone": "DE", "carbonIntensity": 400, "datetime": "2024-01-01T12:00:00Z"}, {"zone": "FR", "carbonIntensity": 50, "datetime": "2024-01-01T13:00:00Z"}]})";
  CHECK(parse_intensity_file(two, "x", {"FR", {}}).entries()[0].grams_per_kwh == 50);
  expect_bad(two, {"history[1]", "zone 'FR'", "'DE'", "TALLY_CARBON_ZONE"});
  CHECK(error_of([&] { parse_intensity_file(two, "x", {"PL", {}}); }).find("nothing of zone 'PL'") != std::string::npos);
}

TEST_CASE("what is wrong with a JSON file is said with its entry and field") {
  expect_bad("{", {"no valid JSON", "parse error"});
  for (std::size_t length = 1; length < history.size(); length += 7) expect_bad(history.substr(0, length), {"no valid JSON"});
  expect_bad("[]", {"it is no object"});
  expect_bad("{}", {"none of carbonIntensity, history, forecast and data"});
  expect_bad(R"({"history": [], "forecast": []})", {"several of"});
  expect_bad(R"({"zone": "DE", "history": []})", {"no carbon intensities"});
  expect_bad(R"({"zone": "DE", "history": {}})", {"history", "it is object, expected an array"});
  expect_bad(R"({"zone": "DE", "history": 5})", {"history", "it is number, expected an array"});
  expect_bad(R"({"zone": "DE", "history": [5]})", {"history[0]", "it is number, expected an object"});
  expect_bad(with(history, "400", "\"400\""), {"history[0].carbonIntensity", "it is string, expected a number"});
  expect_bad(with(history, "400", "true"), {"history[0].carbonIntensity", "it is boolean"});
  expect_bad(with(history, "\"carbonIntensity\": 400, ", ""), {"history[0].carbonIntensity", "it is missing"});
  expect_bad(with(history, "200.5", "-1"), {"history[1].carbonIntensity", "not from 0 to 10000"});
  expect_bad(with(history, "200.5", "-1e-9"), {"history[1].carbonIntensity", "not from 0 to 10000"});
  expect_bad(with(history, "200.5", "1e308"), {"history[1].carbonIntensity", "not from 0 to 10000"});
  expect_bad(with(history, "200.5", "1e309"), {"no valid JSON", "number overflow"});
  expect_bad(with(history, "200.5", "NaN"), {"no valid JSON"});
  expect_bad(with(history, "200.5", "18446744073709551615"), {"history[1].carbonIntensity", "not from 0 to 10000"});
  expect_bad(with(history, "\"2024-01-01T12:00:00.000Z\"", "1704110400"), {"history[0].datetime", "it is number, expected a string"});
  expect_bad(with(history, "2024-01-01T12:00:00.000Z", "2024-01-01T12:00:00"), {"history[0].datetime", "with Z or an offset"});
  expect_bad(with(history, "2024-01-01T12:00:00.000Z", ""), {"history[0].datetime", "it is empty"});
  expect_bad(with(history, "2024-01-01T13", "2024-01-01T12"), {"history[1]: begins at the same time", "history[0]"});
  expect_bad(with(history, "2024-01-01T13", "2024-01-01T11"), {"history[1]: begins before", "sort"});
  expect_bad(with(history, "lifecycle", "both"), {"history[0].emissionFactorType", "'both' is neither lifecycle nor direct"});
  expect_bad(with(history, "lifecycle", "direct"), {"history[1]", "direct and lifecycle", "must not be mixed"});
  expect_bad(with(history, "\"isEstimated\": false", "\"isEstimated\": 0"), {"history[0].isEstimated", "it is number, expected true or false"});
  expect_bad(with(history, "{\"zone\": \"DE\", \"carbon", "{\"zone\": 5, \"carbon"), {"history[0].zone", "it is number, expected a string"});
  expect_bad(R"({"history": [{"carbonIntensity": 1, "datetime": "2024-01-01T12:00:00Z"}]})", {"zone: it is missing"});
  expect_bad(R"({"carbonIntensity": 1, "datetime": "2024-01-01T12:00:00Z"})", {"zone: it is missing"});
  expect_bad(R"({"zone": "DE", "carbonIntensity": 1})", {"datetime: it is missing"});

  expect_bad(with(watttime, "co2_moer", "health_damage"), {"meta.signal_type", "'health_damage'"});
  expect_bad(with(watttime, "lbs_co2_per_mwh", "kg"), {"meta.units", "'kg'"});
  expect_bad(with(watttime, "\"units\"", "\"unit\""), {"meta.units", "it is missing"});
  expect_bad(with(watttime, "\"region\"", "\"place\""), {"meta.region", "it is missing"});
  expect_bad(with(watttime, "1000.0", "\"x\""), {"data[0].value", "it is string"});
  expect_bad(with(watttime, "1000.0", "-1"), {"data[0].value", "not from 0 to 10000"});
  expect_bad(with(watttime, "1000.0", "1e308"), {"data[0].value", "not from 0 to 10000"});
  expect_bad(with(watttime, "12:05", "12:00"), {"data[1]: begins at the same time", "data[0]"});
  expect_bad(with(watttime, "\"point_time\"", "\"time\""), {"data[0].point_time", "it is missing"});
  expect_bad(R"({"data": [], "meta": 3})", {"meta", "it is number, expected an object"});

  expect_bad(std::string(1'000'000, '['), {"nested more than 32 deep"});
  std::string nested = R"({"zone":"DE","carbonIntensity":1,"datetime":"2024-01-01T12:00:00Z","more":)";
  for (int i = 0; i < 100'000; ++i) nested += "{\"a\":";
  expect_bad(nested, {"nested more than 32 deep"});
  const std::string brackets = with(history, "TIME_SLICER_AVERAGE", std::string(100, '[') + "\\\"{{");  // within a text they do not nest
  CHECK(parse_intensity_file(brackets, "x").entries().size() == 2);
  const std::string binary = error_of([] { parse_intensity_file(std::string("{\"zone\": \"\xff\xfe") + std::string(100'000, 'x') + "\"}", "x.json"); });
  CHECK(binary.find("no valid JSON") != binary.npos);
  CHECK(binary.size() < 400);
}

TEST_CASE("what is no JSON is taken for CSV") {
  CHECK(parse_intensity_file("datetime,zone,gco2e_per_kwh\n2024-01-01T12:00:00Z,DE,400\n", "x.csv").entries().size() == 1);
  CHECK(error_of([] { parse_intensity_file("", "x"); }).find("no carbon intensities") != std::string::npos);
}

TEST_CASE("TALLY_CARBON names a JSON file for a reader that knows JSON") {
  char path[] = "/tmp/tally_carbon_XXXXXX";
  const int fd = ::mkstemp(path);
  REQUIRE(fd >= 0);
  ::close(fd);
  std::ofstream(path) << history;
  ::setenv("TALLY_CARBON", (std::string("file:") + path).c_str(), 1);
  const CarbonAccount account(carbon_settings_of_environment(read_intensity_file));
  CHECK(account.intensity_at(noon).grams_per_kwh == 400);
  CHECK(account.intensity_at(noon).source == path);
  ::unsetenv("TALLY_CARBON");
  ::unlink(path);
}
