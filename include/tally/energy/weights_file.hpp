// SPDX-License-Identifier: Apache-2.0
// Keeps calibrated weights in a small JSON file, one entry per kind of machine. It is written in one go and read strictly: what it
// would not have written itself is an error that says where and what to do, because a wrong weight makes wrong joules that look right.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../environment.hpp"
#include "../error.hpp"
#include "../file.hpp"
#include "../text.hpp"
#include "../topology.hpp"
#include "activity.hpp"
#include "host_files.hpp"

namespace tally::inline v0 {

/// What a machine's watts depend on, as far as the system tells. Texts are printable ASCII without quotes and backslashes.
struct MachineKey {
  std::string cpu = "unknown";       // model
  std::string governor = "none";     // of frequencies
  std::string idle_driver = "none";  // which decides how deep cores sleep
  int cores = 0;                     // that are online; 0: more than can be counted here, or not told
  friend bool operator==(const MachineKey&, const MachineKey&) = default;
};

struct MachineWeights {
  MachineKey machine;
  Weights weights;
};

namespace detail {

inline constexpr std::size_t most_weights_bytes = 1 << 20, most_machines = 1024, most_key_bytes = 128;
inline constexpr double most_watts = 1e6;

inline bool is_key_character(char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; }
/// Without what the file cannot hold; `otherwise` if nothing is left.
inline std::string key_text(std::string_view text, std::string otherwise) {
  while (!text.empty() && static_cast<unsigned char>(text.front()) <= ' ') text.remove_prefix(1);
  while (!text.empty() && static_cast<unsigned char>(text.back()) <= ' ') text.remove_suffix(1);
  std::string result(text.substr(0, most_key_bytes));
  for (char& c : result)
    if (!is_key_character(c)) c = '?';
  return result.empty() ? otherwise : result;
}
/// The value of the first line "name : value" of /proc/cpuinfo; empty if there is none.
inline std::string_view cpuinfo_value(std::string_view info, std::string_view name) {
  while (!info.empty()) {
    const std::string_view first = info.substr(0, info.find('\n'));
    info.remove_prefix(std::min(info.size(), first.size() + 1));
    const std::size_t colon = first.find(':');
    if (first.starts_with(name) && colon != first.npos && first.find_first_not_of(" \t", name.size()) == colon) return first.substr(colon + 1);
  }
  return {};
}

/// The numbers of an entry, in the order in which they are written and read.
inline constexpr std::size_t weight_fields = 4 + activity_count;
inline std::string_view weight_name(std::size_t i) {
  constexpr std::string_view names[] = {"floor_watts", "floor_sigma", "relative_sigma", "application"};
  return i < 4 ? names[i] : name_of(static_cast<Activity>(i - 4));
}
template <class W>  // const or not
auto& weight_of(W& weights, std::size_t i) {
  return i == 0 ? weights.floor_watts : i == 1 ? weights.floor_sigma : i == 2 ? weights.relative_sigma : i == 3 ? weights.application : weights.watts[i - 4];
}

/// Reads exactly what weights_text() writes, but for white space.
class WeightsReader {
 public:
  WeightsReader(std::string_view text, std::string_view file) : text_(text), rest_(text), file_(file) {}

  std::vector<MachineWeights> read() {
    if (text_.size() > most_weights_bytes) fail("is longer than a megabyte");
    take('{', "the file");
    name("schema");
    if (string("schema") != "tally.weights/1") fail("has another schema than \"tally.weights/1\"");
    take(',', "schema");
    name("machines");
    take('[', "machines");
    std::vector<MachineWeights> machines;
    for (bool more = !taken(']'); more; more = !taken(']')) {
      if (!machines.empty()) take(',', "machines");
      if (machines.size() == most_machines) fail("has more than 1024 machines");
      machines.push_back(machine());
      for (std::size_t i = 0; i + 1 < machines.size(); ++i)
        if (machines[i].machine == machines.back().machine) fail({"has two entries of cpu \"", machines.back().machine.cpu, "\""});
    }
    take('}', "the end");
    space();
    if (!rest_.empty()) fail("goes on after its end");
    return machines;
  }

 private:
  MachineWeights machine() {
    MachineWeights result;
    take('{', "machines");
    name("cpu");
    result.machine.cpu = string("cpu");
    take(',', "cpu");
    name("governor");
    result.machine.governor = string("governor");
    take(',', "governor");
    name("idle_driver");
    result.machine.idle_driver = string("idle_driver");
    take(',', "idle_driver");
    name("cores");
    const double cores = number("cores");
    if (cores > most_watts || cores != std::floor(cores)) fail("has a \"cores\" that is no number of cores");
    result.machine.cores = static_cast<int>(cores);
    for (std::size_t i = 0; i < weight_fields; ++i) {
      take(',', weight_name(i));
      name(weight_name(i));
      weight_of(result.weights, i) = number(weight_name(i));
    }
    take('}', "machines");
    if (result.weights.relative_sigma > 1) fail("has a \"relative_sigma\" above 1");
    result.weights.split = Split::calibrated_weights;
    return result;
  }

  void space() {
    while (!rest_.empty() && (rest_[0] == ' ' || rest_[0] == '\n' || rest_[0] == '\t' || rest_[0] == '\r')) rest_.remove_prefix(1);
  }
  bool taken(char c) {
    space();
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void take(char c, std::string_view where) {
    if (!taken(c)) fail({"has no '", std::string_view(&c, 1), "' where it should have one, at \"", where, "\""});
  }
  void name(std::string_view key) {
    take('"', key);
    if (!rest_.starts_with(key) || !rest_.substr(key.size()).starts_with('"')) fail({"has no \"", key, "\" where it should have one"});
    rest_.remove_prefix(key.size() + 1);
    take(':', key);
  }
  std::string string(std::string_view key) {
    take('"', key);
    const std::size_t size = rest_.find('"');
    if (size > most_key_bytes) fail({"has a \"", key, "\" that does not end, or is longer than 128 characters"});  // npos is
    const std::string value(rest_.substr(0, size));
    if (!std::all_of(value.begin(), value.end(), is_key_character)) fail({"has a \"", key, "\" with characters that are not allowed in it"});
    rest_.remove_prefix(size + 1);
    return value;
  }
  double number(std::string_view key) {
    space();
    double value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (rest_.empty() || rest_[0] < '0' || rest_[0] > '9' || error != std::errc{} || !(value <= most_watts)) fail({"has a \"", key, "\" that is no number from 0 to 1000000"});
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return value;
  }
  [[noreturn]] void fail(std::initializer_list<Piece> what) { fail(concat(what)); }
  [[noreturn]] void fail(std::string_view what) {
    const auto at_line = std::count(text_.begin(), text_.end() - static_cast<std::ptrdiff_t>(rest_.size()), '\n') + 1;
    throw Error(Errc::protocol, {"the weights file '", file_, "' ", what, " (line ", at_line, "): delete it and run tally_calibrate again"});
  }

  std::string_view text_, rest_, file_;
};

}  // namespace detail

/// The machine whose /proc and /sys are below `root`; "" and "/": this host.
inline MachineKey machine_key(const std::string& root = {}) {
  using detail::below, detail::concat, detail::cpuinfo_value, detail::key_text, detail::read_file;
  const auto text = [&](const char* path, std::string otherwise) { return key_text(read_file(below(root, path)).text, std::move(otherwise)); };
  MachineKey key;
  const std::string info = detail::read_start(below(root, "proc/cpuinfo"), 64 << 10).text;
  key.cpu = key_text(cpuinfo_value(info, "model name"), "");
  if (const auto part = cpuinfo_value(info, "CPU part"); key.cpu.empty() && !part.empty())  // Arm's have no names here
    key.cpu = key_text(concat({"implementer", cpuinfo_value(info, "CPU implementer"), " part", part}), "");
  if (key.cpu.empty()) key.cpu = "unknown";
  key.governor = text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "none");
  key.idle_driver = text("sys/devices/system/cpu/cpuidle/current_driver", "none");
  const cpu_set_t online = detail::parse_cores(key_text(read_file(below(root, "sys/devices/system/cpu/online")).text, ""));
  key.cores = CPU_COUNT(&online);
  return key;
}

/// Where weights are kept: $TALLY_WEIGHTS, else tally/weights.json in $XDG_CONFIG_HOME, else in ~/.config; empty if none of these is set.
inline std::string weights_path_of_environment() {
  using detail::environment, detail::concat;
  if (const auto file = environment("TALLY_WEIGHTS")) return std::string(*file);
  if (const auto folder = environment("XDG_CONFIG_HOME"); folder && folder->starts_with('/')) return concat({*folder, "/tally/weights.json"});  // others are to be ignored, as XDG has it
  if (const auto home = environment("HOME")) return concat({*home, "/.config/tally/weights.json"});
  return {};
}

/// What the file holds. Weights must be finite and not negative.
inline std::string weights_text(std::span<const MachineWeights> machines) {
  std::string text = "{\"schema\": \"tally.weights/1\", \"machines\": [";
  for (std::size_t m = 0; m < machines.size(); ++m) {
    const MachineKey& key = machines[m].machine;
    text += detail::concat({m > 0 ? ",\n" : "\n", " {\"cpu\": \"", key.cpu, "\", \"governor\": \"", key.governor, "\", \"idle_driver\": \"", key.idle_driver, "\", \"cores\": ", key.cores});
    for (std::size_t i = 0; i < detail::weight_fields; ++i) {
      const std::string_view name = detail::weight_name(i);
      const double value = detail::weight_of(machines[m].weights, i);
      if (!(value >= 0 && value <= detail::most_watts)) throw Error(Errc::invalid_argument, {"the weight '", name, "' of cpu '", key.cpu, "' is no number from 0 to 1000000 and cannot be kept"});
      text += detail::concat({", \"", name, "\": ", detail::number_text(std::abs(value))});  // no -0
    }
    text += "}";
  }
  return text + "\n]}\n";
}

/// Throws Error, which names `file`, where the text is not what weights_text() makes.
inline std::vector<MachineWeights> parse_weights(std::string_view text, std::string_view file) { return detail::WeightsReader(text, file).read(); }

/// All of a file; nothing if there is no such file. Throws Error if it cannot be read.
inline std::vector<MachineWeights> read_weights(const std::string& path) {
  const detail::FileText file = detail::read_file(path, detail::most_weights_bytes);
  if (file.error == ENOENT || file.error == ENOTDIR) return {};
  if (file.error != 0) throw Error(Errc::invalid_argument, {"cannot read the weights file '", path, "' (", detail::why(file.error), "): name another in TALLY_WEIGHTS, or delete it and run tally_calibrate again"});
  return parse_weights(file.text, path);
}
/// This machine's, if the file has them.
inline std::optional<Weights> load_weights(const std::string& path, const MachineKey& machine) {
  for (const MachineWeights& entry : read_weights(path))
    if (entry.machine == machine) return entry.weights;
  return std::nullopt;
}
/// Puts a machine's weights into the file instead of those that it may have there; the others stay. Readers see the old or the new
/// file, never half of one. Makes the folder. Throws Error, and leaves everything as it was, if that fails or the file is not sound.
inline void save_weights(const std::string& path, const MachineKey& machine, const Weights& weights) {
  std::vector<MachineWeights> machines = read_weights(path);
  const auto found = std::find_if(machines.begin(), machines.end(), [&](const MachineWeights& entry) { return entry.machine == machine; });
  if (found != machines.end()) found->weights = weights;
  else machines.push_back({machine, weights});
  const std::string text = weights_text(machines);
  parse_weights(text, path);  // a key or a number that could not be read again must not get there

  std::error_code error;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (!folder.empty()) std::filesystem::create_directories(folder, error);
  try {
    write_file_atomically(path, text);
  } catch (const Error& problem) {
    throw Error(problem.errc(), {problem.text(), "; or name another file in TALLY_WEIGHTS or with tally_calibrate --output"});
  }
}

}  // namespace tally::inline v0
