// SPDX-License-Identifier: Apache-2.0
// Carbon intensities out of the JSON that Electricity Maps and WattTime send, or out of CSV. Needs nlohmann_json: link
// tally::carbon_files. All formats give an IntensitySeries; nothing in a file is believed.
#pragma once

#if !__has_include(<nlohmann/json.hpp>)
#error "tally/carbon_files.hpp needs nlohmann_json (Debian: nlohmann-json3-dev): link tally::carbon_files"
#endif

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "energy/carbon.hpp"
#include "energy/carbon_csv.hpp"
#include "error.hpp"

namespace tally::inline v0 {
namespace detail {

/// Intensities in JSON. One object is used for one file.
class IntensityJson {
 public:
  IntensityJson(const std::string& file, const IntensityChoice& choice) : file_(file), choice_(choice) {}

  IntensitySeries parse(std::string_view text) {
    expect_shallow(text);
    Json json;
    try {
      json = Json::parse(text);
    } catch (const Json::exception& error) {
      refuse("", concat({"it is no valid JSON: ", std::string_view(error.what()).substr(0, 200)}));
    }
    if (!json.is_object()) refuse("", "it is no object; expected what Electricity Maps or WattTime send");
    std::vector<std::string_view> lists;
    for (const std::string_view key : {"history", "forecast", "data"})
      if (json.contains(key)) lists.push_back(key);
    const bool latest = json.contains("carbonIntensity");
    if (lists.size() + latest != 1) refuse("", lists.empty() ? "it has none of carbonIntensity, history, forecast and data; expected what Electricity Maps or WattTime send" : "it has several of carbonIntensity, history, forecast and data; keep one");
    list_ = latest ? std::string_view() : lists.front();
    if (latest) add_electricity_maps(json, json, 0);
    else if (json.contains("meta")) add_watttime(json);
    else for_each(json, [&](const Json& entry, std::size_t i) { add_electricity_maps(json, entry, i); });
    return chosen_series(std::move(rows_), file_, choice_, [&](std::size_t i) { return place(list_.empty() ? "" : entry_name(i)); });
  }

 private:
  using Json = nlohmann::json;
  static constexpr int deepest = 32;

  /// The parser would cope with any depth, but whatever is nested more than that is none of these formats.
  void expect_shallow(std::string_view text) const {
    int depth = 0;
    bool in_text = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (in_text && c == '\\') ++i;
      else if (c == '"') in_text = !in_text;
      else if (!in_text && (c == '{' || c == '[') && ++depth > deepest) refuse("", concat({"it is nested more than ", deepest, " deep; expected what Electricity Maps or WattTime send"}));
      else if (!in_text && (c == '}' || c == ']')) --depth;
    }
  }

  std::string place(std::string_view field) const { return concat({"intensity file ", excerpt(file_), field.empty() ? "" : ", ", field}); }
  std::string entry_name(std::size_t i) const { return concat({list_, "[", i, "]"}); }
  /// "history[3].datetime", or "datetime" where there is no list.
  std::string field_name(std::size_t i, std::string_view key) const { return list_.empty() ? std::string(key) : concat({entry_name(i), ".", key}); }
  [[noreturn]] void refuse(std::string_view field, std::string_view what) const { throw Error(Errc::protocol, {place(field), ": ", what}); }

  template <class F>
  void for_each(const Json& json, const F& f) const {
    const Json& list = json.at(list_);
    if (!list.is_array()) refuse(list_, concat({"it is ", list.type_name(), ", expected an array"}));
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (!list[i].is_object()) refuse(entry_name(i), concat({"it is ", list[i].type_name(), ", expected an object"}));
      f(list[i], i);
    }
  }
  const Json& member(const Json& object, const char* key, const std::string& field) const {
    const auto it = object.find(key);
    if (it == object.end()) refuse(field, "it is missing");
    return *it;
  }
  std::string text_of(const Json& object, const char* key, const std::string& field) const {
    const Json& value = member(object, key, field);
    if (!value.is_string()) refuse(field, concat({"it is ", value.type_name(), ", expected a string"}));
    std::string text = value.get<std::string>();
    if (text.empty()) refuse(field, "it is empty");
    return text;
  }
  double number_of(const Json& object, const char* key, const std::string& field) const {
    const Json& value = member(object, key, field);
    if (!value.is_number()) refuse(field, concat({"it is ", value.type_name(), ", expected a number"}));
    return value.get<double>();
  }

  /// Electricity Maps, API v3: `json` is the whole, `entry` the whole or one of its list.
  void add_electricity_maps(const Json& json, const Json& entry, std::size_t i) {
    const auto field = [&](std::string_view key) { return field_name(i, key); };
    CarbonIntensity intensity;
    intensity.zone = entry.contains("zone") ? text_of(entry, "zone", field("zone")) : text_of(json, "zone", "zone");
    intensity.from = intensity_time(text_of(entry, "datetime", field("datetime")), place(field("datetime")));
    if (member(entry, "carbonIntensity", field("carbonIntensity")).is_null()) return;  // the provider has no figure either
    intensity.grams_per_kwh = checked_intensity(number_of(entry, "carbonIntensity", field("carbonIntensity")), place(field("carbonIntensity")));
    if (entry.contains("emissionFactorType")) {
      const std::string factor = text_of(entry, "emissionFactorType", field("emissionFactorType"));
      if (factor != "lifecycle" && factor != "direct") refuse(field("emissionFactorType"), concat({excerpt(factor), " is neither lifecycle nor direct"}));
      intensity.factor = factor == "direct" ? CarbonFactor::direct : CarbonFactor::lifecycle;
    }
    intensity.estimated = list_ == "forecast";
    if (const auto it = entry.find("isEstimated"); it != entry.end()) {
      if (!it->is_boolean()) refuse(field("isEstimated"), concat({"it is ", it->type_name(), ", expected true or false"}));
      intensity.estimated |= it->get<bool>();
    }
    add(i, std::move(intensity));
  }

  /// WattTime, API v3: marginal (MOER) or average (AOER) operating emissions in pounds per MWh.
  void add_watttime(const Json& json) {
    const Json& meta = json.at("meta");
    if (!meta.is_object()) refuse("meta", concat({"it is ", meta.type_name(), ", expected an object"}));
    CarbonIntensity common;
    common.factor = CarbonFactor::direct;
    common.zone = text_of(meta, "region", "meta.region");
    const std::string signal = text_of(meta, "signal_type", "meta.signal_type"), units = text_of(meta, "units", "meta.units");
    if (signal != "co2_moer" && signal != "co2_aoer") refuse("meta.signal_type", concat({excerpt(signal), " is neither co2_moer nor co2_aoer"}));
    common.signal = signal == "co2_moer" ? CarbonSignal::marginal : CarbonSignal::average;
    if (units != "lbs_co2_per_mwh" && units != "lbs/MWh") refuse("meta.units", concat({excerpt(units), " is not lbs_co2_per_mwh"}));
    for_each(json, [&](const Json& entry, std::size_t i) {
      const std::string time = field_name(i, "point_time"), value = field_name(i, "value");
      CarbonIntensity intensity = common;
      intensity.from = intensity_time(text_of(entry, "point_time", time), place(time));
      if (member(entry, "value", value).is_null()) return;
      intensity.grams_per_kwh = checked_intensity(number_of(entry, "value", value) * kilograms_per_pound, place(value));
      add(i, std::move(intensity));
    });
  }

  void add(std::size_t i, CarbonIntensity intensity) {
    if (intensity.estimated) intensity.relative_sigma = estimated_intensity_sigma;
    intensity.source = file_;
    rows_.push_back({i, std::move(intensity)});
  }

  static constexpr double kilograms_per_pound = 0.45359237;  // exact by definition; lb/MWh to g/kWh is the same factor
  const std::string& file_;
  const IntensityChoice& choice_;
  std::string_view list_;  // the key of the entries; empty: there is one, which is the whole
  std::vector<IntensityRow> rows_;
};

}  // namespace detail

/// Carbon intensities from text that is JSON of Electricity Maps (API v3: history, forecast, past range or latest) or WattTime (API v3: historical,
/// forecast), or CSV (see parse_intensity_csv). Entries that are null are holes. Electricity Maps' are average; forecasts count as
/// estimated. Throws Errc::protocol that names `file`, the entry and the field.
inline IntensitySeries parse_intensity_file(std::string_view text, const std::string& file, const IntensityChoice& choice = {}) {
  if (!detail::looks_like_json(text)) return parse_intensity_csv(text, file, choice);
  return detail::IntensityJson(file, choice).parse(text);
}

/// Reads such a file. Throws Errc::invalid_argument where it cannot be read. Hand it to carbon_settings_of_environment() for
/// TALLY_CARBON=file:PATH to know JSON.
inline IntensitySeries read_intensity_file(const std::string& path, const IntensityChoice& choice = {}) { return parse_intensity_file(detail::read_intensity_text(path), path, choice); }

}  // namespace tally::inline v0
