// SPDX-License-Identifier: Apache-2.0
// What the writers of accounts share: the fields of times and energies by name, numbers and texts as JSON, Prometheus and CSV
// want them. Texts that are not UTF-8 are made so: what is wrong becomes U+FFFD.
#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../text.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

namespace detail {

struct TimeField {
  std::string_view name;
  nanoseconds AccountTimes::*part;
};
/// The first two, then the nine that add up to the first, then those that are parts of waits.
inline constexpr TimeField time_fields[] = {
    {"elapsed", &AccountTimes::elapsed},           {"exposed", &AccountTimes::exposed},         {"copy", &AccountTimes::copy},
    {"reduce", &AccountTimes::reduce},             {"codec", &AccountTimes::codec},             {"protocol", &AccountTimes::protocol},
    {"wait_arrival", &AccountTimes::wait_arrival}, {"wait_transfer", &AccountTimes::wait_transfer}, {"wait_credit", &AccountTimes::wait_credit},
    {"wait_local", &AccountTimes::wait_local},     {"undriven", &AccountTimes::undriven},       {"slept", &AccountTimes::slept},
    {"queued", &AccountTimes::queued},
};
inline constexpr std::span<const TimeField> state_fields = std::span(time_fields).subspan(2, state_count);

struct EnergyField {
  std::string_view name;
  Quantity AccountEnergy::*part;
};
inline constexpr EnergyField energy_fields[] = {
    {"gross_joules", &AccountEnergy::gross}, {"net_joules", &AccountEnergy::net},   {"idle_joules", &AccountEnergy::idle}, {"idle_avoidable_joules", &AccountEnergy::idle_avoidable},
    {"cpu_joules", &AccountEnergy::cpu},     {"dram_joules", &AccountEnergy::dram}, {"gpu_joules", &AccountEnergy::gpu},   {"carbon_grams", &AccountEnergy::carbon},
};

/// The shortest text that reads back as the same number; "" if it is not finite.
inline std::string number_text(double value) {
  if (!std::isfinite(value)) return {};
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}
inline double in_seconds(nanoseconds time) { return static_cast<double>(time.count()) / 1e9; }
inline double in_joules(Nanojoules energy) { return static_cast<double>(energy) / 1e9; }

/// How many bytes the UTF-8 character at the beginning of `text` has; 0 if there is none.
inline std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](std::size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned first = byte(0), second = byte(1);
  if (text.empty()) return 0;
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f)) return 0;  // too long for what it says; half of a surrogate pair
    return follows(1) && follows(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    if ((first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f)) return 0;  // too long; beyond Unicode
    return follows(1) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}
/// `text` with escape(character) for each of its characters that is one byte, and the others as they are.
template <class F>
std::string with_escapes(std::string_view text, F&& escape) {
  std::string result;
  while (!text.empty()) {
    const std::size_t length = utf8_length(text);
    if (length == 1) escape(result, text[0]);
    else if (length == 0) result += "\xef\xbf\xbd";
    else result += text.substr(0, length);
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return result;
}
inline std::string utf8_text(std::string_view text) {
  return with_escapes(text, [](std::string& result, char c) { result += c; });
}
/// In quotes.
inline std::string json_text(std::string_view text) {
  const std::string inner = with_escapes(text, [](std::string& result, char c) {
    constexpr std::string_view digits = "0123456789abcdef";
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') (result += '\\') += c;
    else if (c == '\n') result += "\\n";
    else if (code < 0x20 || code == 0x7f) ((result += "\\u00") += digits[code >> 4]) += digits[code & 15u];
    else result += c;
  });
  return '"' + inner + '"';
}
inline std::string json_number(double value) { return std::isfinite(value) ? number_text(value) : "null"; }
/// The value of a label of Prometheus, without quotes.
inline std::string label_text(std::string_view text) {
  return with_escapes(text, [](std::string& result, char c) {
    if (c == '"' || c == '\\') (result += '\\') += c;
    else if (c == '\n') result += "\\n";
    else result += c;
  });
}
/// A field of RFC 4180, in quotes where it needs them.
inline std::string csv_text(std::string_view text) {
  const std::string clean = utf8_text(text);
  if (clean.find_first_of("\",\r\n") == std::string::npos) return clean;
  std::string quoted = "\"";
  for (const char c : clean) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + '"';
}

/// Writes an object of JSON field by field at the end of a text; its end is that of its life.
class JsonObject {
 public:
  explicit JsonObject(std::string& text) : text_(text) { text_ += '{'; }
  JsonObject(const JsonObject&) = delete;
  JsonObject& operator=(const JsonObject&) = delete;
  ~JsonObject() { text_ += '}'; }

  JsonObject& add(std::string_view name, std::string_view value) { return raw(name, json_text(value)); }
  JsonObject& add(std::string_view name, double value) { return raw(name, json_number(value)); }
  JsonObject& add(std::string_view name, std::same_as<bool> auto value) { return raw(name, value ? "true" : "false"); }
  JsonObject& add(std::string_view name, nanoseconds value) { return raw(name, std::to_string(value.count())); }
  template <std::integral N>
    requires(!std::same_as<N, bool>)
  JsonObject& add(std::string_view name, N value) { return raw(name, std::to_string(value)); }
  /// `json` as it is.
  JsonObject& raw(std::string_view name, std::string_view json) { return key(name) += json, *this; }
  /// The text after "name": for the value to be written to.
  std::string& key(std::string_view name) {
    if (!std::exchange(empty_, false)) text_ += ',';
    return ((text_ += '"') += name) += "\":";
  }

 private:
  std::string& text_;
  bool empty_ = true;
};

/// write(text, item) for each item, as an array of JSON.
template <class Items, class F>
void write_json_array(std::string& text, const Items& items, F&& write) {
  text += '[';
  bool first = true;
  for (const auto& item : items) {
    if (!std::exchange(first, false)) text += ',';
    write(text, item);
  }
  text += ']';
}

/// The rank in the job of a rank of the account's communicator; itself where the account does not say.
inline Rank job_rank(const Account& account, Rank r) {
  return r >= 0 && static_cast<std::size_t>(r) < account.members.size() ? account.members[static_cast<std::size_t>(r)] : r;
}

/// f(caveat) for each.
template <class F>
void for_each_caveat(Caveats caveats, F&& f) {
  for (std::size_t i = 0; i < caveat_count; ++i)
    if (const auto caveat = static_cast<Caveat>(1u << i); has(caveats, caveat)) f(caveat);
}

struct TellsOfDomain {
  const Account* account;
  std::size_t domain;  // of account->domains
};
/// The domains of all hosts, each once and sorted by (host, key): of the ranks that tell of it the one that saw most of it.
inline std::map<std::pair<std::string, std::string>, TellsOfDomain> domains_of_hosts(std::span<const Account> accounts) {
  std::map<std::pair<std::string, std::string>, TellsOfDomain> all;
  for (const Account& account : accounts)
    for (std::size_t d = 0; d < account.domains.size(); ++d) {
      const DomainAccount& domain = account.domains[d];
      const auto [known, added] = all.try_emplace({account.machine(), domain.key}, TellsOfDomain{&account, d});
      if (added) continue;
      const DomainAccount& other = known->second.account->domains[known->second.domain];
      const bool better = domain.provenance != Provenance::none && other.provenance == Provenance::none;
      const bool worse = domain.provenance == Provenance::none && other.provenance != Provenance::none;
      if (better || (!worse && domain.total > other.total)) known->second = {&account, d};
    }
  return all;
}

}  // namespace detail

}  // namespace tally::inline v0
