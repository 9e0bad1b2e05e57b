// SPDX-License-Identifier: Apache-2.0
// Where weights come from: the regression's estimates and error bars against closed forms and planted watts, and the file
// of calibrated weights against all that can be wrong with one.
#include <catch2/catch.hpp>

#include <sys/stat.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include <tally/energy/regression.hpp>
#include <tally/energy/weights_file.hpp>
#include <tally/objective.hpp>

using namespace tally;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t columns = WeightFit::columns;
using Planted = std::array<double, columns>;  // floor, copy, reduce, codec, protocol, spin, doze, application
constexpr Planted planted = {40, 3, 6, 5, 4, 2.5, 1, 7};
constexpr nanoseconds window = 100ms;

/// Windows of a job in virtual time, with Gaussian noise of so many watts over 100 ms.
class Job {
 public:
  explicit Job(std::uint64_t seed) : random_(seed) {}

  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(2 * std::numbers::pi * uniform()); }
  /// Eight cores share the time between all activities and sleep as they like.
  void run(WeightRegression& to, const Planted& watts, double noise, nanoseconds duration = window, std::size_t without = columns) {
    std::array<double, columns> cores{};
    double all = 0;
    for (std::size_t i = 0; i < columns; ++i) all += cores[i] = i == without ? 0 : -std::log(1 - uniform());  // the first: sleep
    ActivityTimes times;
    nanoseconds application{};
    const double length = static_cast<double>(duration.count());
    double power = watts[0];
    for (std::size_t i = 0; i < columns; ++i) {
      const nanoseconds time(static_cast<std::int64_t>(8 * length * cores[i] / all));
      if (i == 0) times[Activity::sleep] = time;
      else if (i + 1 == columns) application = time;
      else times.in[i - 1] = time;
      if (i > 0) power += watts[i] * static_cast<double>(time.count()) / length;
    }
    power += noise * normal() * std::sqrt(static_cast<double>(window.count()) / length);
    REQUIRE(to.add(duration, static_cast<Nanojoules>(std::max(0.0, power) * length), times, application));
  }

 private:
  std::mt19937_64 random_;
};

double value_of(const Weights& weights, std::size_t i) { return i == 0 ? weights.floor_watts : i + 1 == columns ? weights.application : weights.watts[i - 1]; }

/// How often each of the planted values lies within two standard errors of what 1000 jobs tell.
void check_coverage(nanoseconds half_life, int windows) {
  std::array<int, columns> within{};
  int all = 0;
  for (std::uint64_t seed = 1; seed <= 1000; ++seed) {
    Job job(seed);
    WeightRegression regression(half_life);
    for (int k = 0; k < windows; ++k) job.run(regression, planted, 1.5, k % 3 == 0 ? 50ms : 100ms);
    const WeightFit fit = regression.fit();
    REQUIRE(fit.usable);
    for (std::size_t i = 0; i < columns; ++i) {
      const bool hit = std::abs(value_of(fit.weights, i) - planted[i]) <= 2 * fit.fit.sigma(i);
      within[i] += hit, all += hit;
    }
  }
  const double share = all / (1000.0 * columns);
  INFO(share);
  CHECK(share >= 0.95);
  CHECK(share <= 0.965);  // nor may the errors be told too large: 95.45 % are right
  for (const int hits : within) CHECK((hits >= 934 && hits <= 975));  // three standard errors of a count
}

}  // namespace

TEST_CASE("I14: regression recovers planted watts within two sigma") { check_coverage(0s, 150); }

TEST_CASE("I14: so it does while it forgets") { check_coverage(4s, 300); }

TEST_CASE("without noise regression recovers planted watts exactly") {
  Job job(1);
  WeightRegression regression;
  for (int k = 0; k < 100; ++k) job.run(regression, planted, 0);
  const WeightFit fit = regression.fit();
  REQUIRE(fit.usable);
  for (std::size_t i = 0; i < columns; ++i) CHECK(value_of(fit.weights, i) == Approx(planted[i]).epsilon(1e-5));
  CHECK(fit.weights.of(Activity::sleep) == 0);
  CHECK(fit.fit.r2 == Approx(1).epsilon(1e-9));
  CHECK(fit.weights.relative_sigma < 1e-4);
  CHECK(regression.weights()->split == Split::regressed_weights);
  CHECK(regression.refused() == 0);
}

TEST_CASE("a straight line has the standard errors of the textbook") {
  const double e[] = {1, -1, -1, 1, 1, -1};
  detail::LeastSquares<2> line;
  double sxy = 0, syy = 0, sy = 0;
  for (int x = 0; x < 6; ++x) {
    const double y = 1 + 2 * x + 0.1 * e[x];
    line.add({1, static_cast<double>(x)}, y, 3, 1);
    sxy += (x - 2.5) * y, sy += y, syy += y * y;
  }
  const double sxx = 17.5, slope = sxy / sxx, offset = sy / 6 - slope * 2.5;
  const double variance = (syy - sy * sy / 6 - slope * slope * sxx) / 4 * (4.0 / 2.0);  // 4 degrees of freedom, widened by 4/(4-2)
  const auto fit = line.fit();
  REQUIRE(fit.solved);
  CHECK(fit.value[0] == Approx(offset));
  CHECK(fit.value[1] == Approx(slope));
  CHECK(fit.sigma(1) == Approx(std::sqrt(variance / sxx)));
  CHECK(fit.sigma(std::size_t{0}) == Approx(std::sqrt(variance * (1.0 / 6 + 2.5 * 2.5 / sxx))));
  CHECK(fit.sigma({1, 2.5}) == Approx(std::sqrt(variance / 6)));
  CHECK(fit.r2 == Approx(1 - variance * 2 / (syy - sy * sy / 6)));
  CHECK(fit.observations == Approx(6));
  // Columns of one length have the Gram matrix {1, c; c, 1}, whose eigenvalues are 1 + c and 1 - c.
  const double c = 15 / std::sqrt(6.0 * 55.0);
  CHECK(fit.condition == Approx(std::sqrt((2 + 2 * c * c) / (1 - c * c))));
  CHECK(fit.condition >= std::sqrt((1 + c) / (1 - c)));
}

TEST_CASE("a column that would be negative is 0 and the others are fitted without it") {
  detail::LeastSquares<2> falling;
  for (int x = 0; x < 5; ++x) falling.add({1, static_cast<double>(x)}, 10 - x, 1, 1);
  const auto fit = falling.fit();
  CHECK(fit.value[1] == 0);
  CHECK(fit.value[0] == Approx(8));

  detail::LeastSquares<2> through;  // y = 3 x - 1: without a floor the best is sum xy / sum xx
  for (int x = 0; x < 5; ++x) through.add({1, static_cast<double>(x)}, 3 * x - 1, 1, 1);
  CHECK(through.fit().value[0] == 0);
  CHECK(through.fit().value[1] == Approx((3 * 30.0 - 10) / 30));
}

TEST_CASE("windows that are all alike do not tell weights") {
  WeightRegression same, scaled;
  ActivityTimes mix;
  for (std::size_t i = 0; i + 1 < activity_count; ++i) mix.in[i] = 10ms * static_cast<int>(i + 1);
  Job job(3);
  for (int k = 0; k < 1000; ++k) {
    CHECK(same.add(100ms, static_cast<Nanojoules>(1e8 * (80 + job.normal())), mix, 50ms));
    // Busier or not, the ratios of activities are always the same: the floor could be told, but they could not.
    const nanoseconds duration = 100ms + k % 7 * 30ms;
    CHECK(scaled.add(duration, static_cast<Nanojoules>(static_cast<double>(duration.count()) * (40 + job.normal()) + 4e9), mix, 50ms));
  }
  for (const WeightRegression* r : {&same, &scaled}) {
    const WeightFit fit = r->fit();
    CHECK_FALSE(fit.usable);
    CHECK(fit.fit.condition > WeightRegression::worst_condition);
    CHECK_FALSE(r->weights().has_value());
    CHECK(fit.relative_sigma(mix) == 1);
  }
}

TEST_CASE("windows that are almost alike do not tell weights, however small the noise") {
  WeightRegression regression;
  Job job(9);
  for (int k = 0; k < 1000; ++k) {
    ActivityTimes mix;
    double watts = planted[0];
    for (std::size_t i = 1; i + 1 < columns; ++i) {
      mix.in[i - 1] = nanoseconds(static_cast<std::int64_t>(1e7 * (1 + 0.02 * job.uniform())));
      watts += planted[i] * static_cast<double>(mix.in[i - 1].count()) / 1e8;
    }
    REQUIRE(regression.add(100ms, static_cast<Nanojoules>(watts * 1e8), mix, 0ns));
  }
  const WeightFit fit = regression.fit();
  CHECK(fit.fit.solved);
  CHECK(fit.fit.condition > WeightRegression::worst_condition);
  CHECK(fit.weights.relative_sigma < 0.01);
  CHECK_FALSE(regression.weights().has_value());
}

TEST_CASE("weights are given from the fifth window per column on, and only if better than time alone") {
  Job job(4);
  WeightRegression regression(0s);
  for (std::size_t k = 0; k < 5 * columns; ++k) {
    CHECK_FALSE(regression.weights().has_value());
    job.run(regression, planted, 0.1);
  }
  CHECK(regression.weights().has_value());

  WeightRegression noisy(0s);
  for (int k = 0; k < 60; ++k) job.run(noisy, planted, 100);
  CHECK(noisy.fit().fit.condition < WeightRegression::worst_condition);
  CHECK_FALSE(noisy.weights().has_value());

  CHECK_FALSE(WeightRegression().weights().has_value());
  CHECK(WeightRegression().fit().weights.relative_sigma == 1);
}

TEST_CASE("an activity that was never seen gets the mean of the others and the error of time alone") {
  Job job(5);
  WeightRegression regression;
  const std::size_t codec = static_cast<std::size_t>(Activity::codec) + 1;
  for (int k = 0; k < 200; ++k) job.run(regression, planted, 0, window, codec);
  const WeightFit fit = regression.fit();
  REQUIRE(fit.usable);
  CHECK(fit.fit.columns == columns - 1);
  double joules = 0, cores = 0;
  for (std::size_t i = 1; i < columns; ++i) joules += planted[i] * fit.fit.mean[i], cores += fit.fit.mean[i];
  CHECK(fit.weights.of(Activity::codec) == Approx(joules / cores).epsilon(1e-5));
  CHECK(fit.weights.of(Activity::reduce) == Approx(6).epsilon(1e-5));
  ActivityTimes part;
  part[Activity::codec] = 1ms;
  CHECK(fit.relative_sigma(part) == Approx(1.0 / 3).epsilon(1e-3));
}

TEST_CASE("the error of a share is that of its own mix") {
  Job job(6);
  WeightRegression regression;
  for (int k = 0; k < 400; ++k) job.run(regression, planted, 1);
  const WeightFit fit = regression.fit();
  REQUIRE(fit.usable);
  ActivityTimes all, one, two;
  nanoseconds application{};
  for (std::size_t i = 1; i + 1 < columns; ++i) all.in[i - 1] = nanoseconds(static_cast<std::int64_t>(fit.fit.mean[i] * 1e12));
  application = nanoseconds(static_cast<std::int64_t>(fit.fit.mean[columns - 1] * 1e12));
  CHECK(fit.relative_sigma(all, application) < 1e-9);  // all there is gets all joules whatever the weights
  one[Activity::doze] = 1s;
  two[Activity::doze] = 7s;
  CHECK(fit.relative_sigma(one) == Approx(fit.relative_sigma(two)));
  CHECK(fit.relative_sigma(one) > fit.relative_sigma({}, 1s));  // a watt of a core that dozes is harder to see than one that works
  CHECK(fit.relative_sigma({}) == 1);
}

TEST_CASE("what was learned is forgotten by half in a half-life") {
  Job job(7);
  WeightRegression regression(1s);
  Planted before = planted;
  for (double& watts : before) watts *= 2;
  for (int k = 0; k < 200; ++k) job.run(regression, before, 0);
  for (int k = 0; k < 300; ++k) job.run(regression, planted, 0);  // 30 half-lives: a millionth of a thousandth is left
  const WeightFit fit = regression.fit();
  for (std::size_t i = 0; i < columns; ++i) CHECK(value_of(fit.weights, i) == Approx(planted[i]).epsilon(1e-5));
  // Sum of q^k squared over sum of q^2k, q = 2^-0.1.
  const double q = std::exp2(-0.1);
  CHECK(fit.fit.observations == Approx((1 + q) / (1 - q)));
}

TEST_CASE("windows that cannot be are left out and do no harm") {
  Job job(8);
  WeightRegression regression;
  for (int k = 0; k < 100; ++k) job.run(regression, planted, 0);
  constexpr auto huge = nanoseconds::max();
  constexpr auto joules = std::numeric_limits<Nanojoules>::max();
  ActivityTimes negative, much;
  negative[Activity::spin] = -1ns;
  for (auto& time : much.in) time = huge;
  CHECK_FALSE(regression.add(0ns, 1, {}, 0ns));
  CHECK_FALSE(regression.add(-1ns, 1, {}, 0ns));
  CHECK_FALSE(regression.add(nanoseconds::min(), joules, much, huge));
  CHECK_FALSE(regression.add(huge, joules, much, huge));
  CHECK_FALSE(regression.add(1ns, joules, {}, 0ns));
  CHECK_FALSE(regression.add(100ms, 1, negative, 0ns));
  CHECK_FALSE(regression.add(100ms, 1, much, 0ns));
  CHECK_FALSE(regression.add(100ms, 1, {}, -1ns));
  CHECK_FALSE(regression.add(100ms, 1, {}, huge));
  CHECK(regression.refused() == 9);
  const Weights weights = regression.weights().value();
  for (std::size_t i = 0; i < columns; ++i) CHECK(value_of(weights, i) == Approx(planted[i]).epsilon(1e-5));

  WeightRegression nothing;  // windows in which nothing was drawn or done
  for (int k = 0; k < 100; ++k) CHECK(nothing.add(24h, 0, {}, 0ns));
  CHECK_FALSE(nothing.weights().has_value());
  CHECK(nothing.fit().weights.floor_watts == 0);
}

TEST_CASE("joules of a plan are its core-seconds times watts, and objectives weigh them against time") {
  Weights weights;
  weights.watts = {3, 6, 5, 4, 2.5, 1, 0};
  ActivityTimes cores;
  cores[Activity::copy] = 2s;
  cores[Activity::reduce] = 500ms;
  cores[Activity::spin] = 4s;
  cores[Activity::sleep] = 100s;
  CHECK(predicted_joules(cores, weights) == Approx(2 * 3 + 0.5 * 6 + 4 * 2.5));
  CHECK(predicted_joules({}, weights) == 0);
  CHECK(score(Objective::time, 2, 5) == 2);
  CHECK(score(Objective::energy, 2, 5) == 5);
  CHECK(score(Objective::energy_delay, 2, 5) == 10);
  const double unknown = std::numeric_limits<double>::quiet_NaN();
  CHECK(score(Objective::time, 2, unknown) == 2);
  CHECK(std::isnan(score(Objective::energy, 2, unknown)));
  CHECK(std::isnan(score(Objective::energy_delay, 2, unknown)));
  CHECK(name_of(Objective::energy_delay) == "energy_delay");
}

namespace {

/// A folder that goes away with the test.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "tally_weights.XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const char* name) const { return (path_ / name).string(); }
  void write(const std::string& name, std::string_view text) const {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name, std::ios::binary) << text;
  }
  std::string read(const char* name) const {
    std::ifstream file(path_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::size_t files() const { return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {})); }

 private:
  std::filesystem::path path_;
};

Weights some_weights(double floor) {
  Weights weights;
  weights.watts = {3.25, 6.1, 5, 4, 2.5, 1e-7, 0};
  weights.application = 7;
  weights.floor_watts = floor;
  weights.floor_sigma = 0.1;
  weights.relative_sigma = 0.07;
  weights.split = Split::calibrated_weights;
  return weights;
}
void check_same(const Weights& a, const Weights& b) {
  CHECK(a.watts == b.watts);
  CHECK(a.application == b.application);
  CHECK(a.floor_watts == b.floor_watts);
  CHECK(a.floor_sigma == b.floor_sigma);
  CHECK(a.relative_sigma == b.relative_sigma);
  CHECK(a.split == b.split);
}
/// What an Error says, or nothing if there is none.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}
const MachineKey big{"AMD EPYC 9654 96-Core Processor", "performance", "acpi_idle", 96}, small{"Intel(R) Xeon(R) Processor", "none", "none", 2};

class Environment {
 public:
  explicit Environment(const char* name) : name_(name) {
    if (const char* value = std::getenv(name)) before_ = value, was_set_ = true;
    ::unsetenv(name);
  }
  ~Environment() { was_set_ ? ::setenv(name_, before_.c_str(), 1) : ::unsetenv(name_); }
  void set(const char* value) const { ::setenv(name_, value, 1); }

 private:
  const char* name_;
  std::string before_;
  bool was_set_ = false;
};

}  // namespace

TEST_CASE("weights come back from their file bit by bit, each machine's own") {
  const Folder folder;
  const std::string path = folder / "new/folder/weights.json";
  CHECK_FALSE(load_weights(path, big).has_value());  // no file is no error
  save_weights(path, big, some_weights(90.1));
  save_weights(path, small, some_weights(1.0 / 3));
  check_same(load_weights(path, big).value(), some_weights(90.1));
  check_same(load_weights(path, small).value(), some_weights(1.0 / 3));
  save_weights(path, big, some_weights(88));  // once more: instead of what was there
  check_same(load_weights(path, big).value(), some_weights(88));
  CHECK(read_weights(path).size() == 2);
  CHECK(std::distance(std::filesystem::directory_iterator(folder / "new/folder"), {}) == 1);  // nothing unfinished is left

  for (MachineKey other : {big, big, big, big}) {
    static int what = 0;
    switch (what++) {
      case 0: other.cpu += "X"; break;
      case 1: other.governor = "powersave"; break;
      case 2: other.idle_driver = "none"; break;
      case 3: other.cores = 95; break;
    }
    CHECK_FALSE(load_weights(path, other).has_value());
  }
}

TEST_CASE("a weights file that was changed anywhere is read to the same or refused with what to do") {
  const std::vector<MachineWeights> machines = {{big, some_weights(90.1)}, {small, some_weights(2)}};
  const std::string text = weights_text(machines);
  REQUIRE(parse_weights(text, "f").size() == 2);
  REQUIRE(weights_text(parse_weights(text, "f")) == text);
  const auto check = [&](const std::string& changed) {
    std::string error = error_of([&] {
      const auto read = parse_weights(changed, "the/file");
      CHECK(weights_text(parse_weights(weights_text(read), "again")) == weights_text(read));
    });
    if (!error.empty()) {
      CHECK(error.find("the/file") != error.npos);
      CHECK(error.find("delete it and run tally_calibrate again") != error.npos);
    }
    return !error.empty();
  };
  for (std::size_t i = 0; i + 1 < text.size(); ++i) CHECK(check(text.substr(0, i)));  // cut off; the last character is a line's end
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::string shorter = text, doubled = text, odd = text;
    shorter.erase(i, 1);
    doubled.insert(i, 1, text[i]);
    odd[i] = '\0';
    check(shorter), check(doubled);
    CHECK(check(odd));
  }
  CHECK(check(text + "x"));
  CHECK(check(text + text));
  CHECK(check(""));
  CHECK_FALSE(check(" \t\r\n" + text + "  \n"));
}

TEST_CASE("a weights file's error names the file, the key and the line") {
  const std::string text = weights_text(std::vector<MachineWeights>{{big, some_weights(90)}, {small, some_weights(2)}});
  const auto error = [&](std::string_view from, std::string_view to) {
    std::string changed = text;
    const std::size_t at = changed.rfind(from);
    REQUIRE(at != changed.npos);
    changed.replace(at, from.size(), to);
    return error_of([&] { parse_weights(changed, "w.json"); });
  };
  const std::string what_to_do = " (line 3): delete it and run tally_calibrate again";
  CHECK(error("\"spin\"", "\"span\"") == "malformed data: the weights file 'w.json' has no \"spin\" where it should have one" + what_to_do);
  for (const char* odd : {"-2", "nan", "NaN", "inf", "1e7", "1e999", "\"2\"", "", "null", "0x2", "2.5.5", "[2]"}) CHECK(error("\"floor_watts\": 2", std::string("\"floor_watts\": ") + odd).find("weights file 'w.json' has") != std::string::npos);
  CHECK(error("\"floor_watts\": 2", "\"floor_watts\": nan") == "malformed data: the weights file 'w.json' has a \"floor_watts\" that is no number from 0 to 1000000" + what_to_do);
  CHECK(error("\"relative_sigma\": 0.07", "\"relative_sigma\": 1.5").find("has a \"relative_sigma\" above 1") != std::string::npos);
  CHECK(error("\"cores\": 2", "\"cores\": 2.5").find("has a \"cores\" that is no number of cores") != std::string::npos);
  CHECK(error("\"cores\": 2", "\"cores\": 99999999999999999999").find("\"cores\"") != std::string::npos);
  CHECK(error("Intel(R)", std::string(200, 'x')).find("has a \"cpu\" that does not end, or is longer than 128 characters") != std::string::npos);
  CHECK(error("Intel(R)", "a\\n").find("has a \"cpu\" with characters that are not allowed in it") != std::string::npos);
  CHECK(error("tally.weights/1", "tally.weights/2").find("has another schema than \"tally.weights/1\" (line 1)") != std::string::npos);
  CHECK(error("Intel(R) Xeon(R) Processor\", \"governor\": \"none\", \"idle_driver\": \"none\", \"cores\": 2", "AMD EPYC 9654 96-Core Processor\", \"governor\": \"performance\", \"idle_driver\": \"acpi_idle\", \"cores\": 96").find("has two entries of cpu \"AMD EPYC 9654 96-Core Processor\"") != std::string::npos);
  std::string many = "{\"schema\": \"tally.weights/1\", \"machines\": [";
  for (int i = 0; i < 1025; ++i) {
    std::string one = weights_text(std::vector<MachineWeights>{{{"c" + std::to_string(i), "g", "i", 1}, some_weights(1)}});
    many += (i ? "," : "") + one.substr(one.find('[') + 1, one.rfind(']') - one.find('[') - 1);
  }
  CHECK(error_of([&] { parse_weights(many + "]}", "w.json"); }).find("has more than 1024 machines") != std::string::npos);
  CHECK(error_of([&] { parse_weights(std::string((1 << 20) + 1, ' '), "w.json"); }).find("is longer than a megabyte") != std::string::npos);
}

TEST_CASE("what cannot be read or kept says so and leaves the file alone") {
  const Folder folder;
  const std::string path = folder / "weights.json";
  folder.write("weights.json", "{}");
  CHECK(error_of([&] { save_weights(path, big, some_weights(1)); }).find("run tally_calibrate again") != std::string::npos);
  CHECK(folder.read("weights.json") == "{}");

  save_weights(folder / "good.json", big, some_weights(1));
  const std::string before = folder.read("good.json");
  for (const double odd : {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 2e6})
    CHECK(error_of([&] { save_weights(folder / "good.json", big, some_weights(odd)); }).find("weight 'floor_watts' of cpu 'AMD EPYC 9654 96-Core Processor' is no number") != std::string::npos);
  MachineKey quoted = big;
  quoted.cpu = "a \"b\"";
  CHECK_FALSE(error_of([&] { save_weights(folder / "good.json", quoted, some_weights(1)); }).empty());
  CHECK(folder.read("good.json") == before);

  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);  // nobody will ever write to it
  CHECK(error_of([&] { load_weights(folder / "pipe", big); }).find("cannot read the weights file") != std::string::npos);
  std::filesystem::create_directory(folder / "folder");
  CHECK(error_of([&] { load_weights(folder / "folder", big); }).find("cannot read the weights file") != std::string::npos);
  CHECK(error_of([&] { save_weights("/proc/no/such/weights.json", big, some_weights(1)); }).find("cannot write '/proc/no/such/weights.json'") != std::string::npos);
  folder.write("huge", std::string((1 << 20) + 1, ' '));
  CHECK(error_of([&] { load_weights(folder / "huge", big); }).find("longer than such a file can be") != std::string::npos);
  CHECK(folder.files() == 5);
}

TEST_CASE("a machine is told by its processor, governor, idle driver and cores") {
  const Folder root;
  CHECK(machine_key(root / "none") == MachineKey{});
  root.write("proc/cpuinfo", "processor\t: 0\nmodel name suffix: no\nmodel name\t: Some \"CPU\" \\ 3\xc2\xb5 @ 2 GHz\nmodel name\t: other\n");
  root.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n");
  root.write("sys/devices/system/cpu/cpuidle/current_driver", "intel_idle\n");
  root.write("sys/devices/system/cpu/online", "0-3,8\n");
  CHECK(machine_key(root / "") == MachineKey{"Some ?CPU? ? 3?? @ 2 GHz", "performance", "intel_idle", 5});

  root.write("proc/cpuinfo", "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n");
  root.write("sys/devices/system/cpu/online", "0-99999\n");
  root.write("sys/devices/system/cpu/cpuidle/current_driver", "\n");
  root.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", std::string(300, 'g'));
  CHECK(machine_key(root / "") == MachineKey{"implementer 0x41 part 0xd40", std::string(128, 'g'), "none", 0});
  save_weights(root / "weights.json", machine_key(root / ""), some_weights(1));
  CHECK(load_weights(root / "weights.json", machine_key(root / "")).has_value());
}

TEST_CASE("the environment says where weights are") {
  const Environment file("TALLY_WEIGHTS"), config("XDG_CONFIG_HOME"), home("HOME");
  CHECK(weights_path_of_environment().empty());
  home.set("/home/me");
  CHECK(weights_path_of_environment() == "/home/me/.config/tally/weights.json");
  config.set("relative");
  CHECK(weights_path_of_environment() == "/home/me/.config/tally/weights.json");
  config.set("/config");
  CHECK(weights_path_of_environment() == "/config/tally/weights.json");
  file.set("w.json");
  CHECK(weights_path_of_environment() == "w.json");
  file.set("");
  CHECK(weights_path_of_environment() == "/config/tally/weights.json");
}
