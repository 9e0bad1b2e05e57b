// SPDX-License-Identifier: Apache-2.0
// Settings from the environment: a variable that is empty is not set, and one that makes no sense is an error that names it
// and what it holds.
#pragma once

#include <charconv>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include "error.hpp"

namespace tally::inline v0 {

namespace detail {

inline std::optional<std::string_view> environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? std::optional<std::string_view>(value) : std::nullopt;
}
template <class N>
std::string number_text(N value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}
/// A number from the environment, wholly parsed and in [least, most], or an error that names the variable.
template <class N>
std::optional<N> environment_number(const char* name, N least, N most) {
  const auto text = environment(name);
  if (!text) return std::nullopt;
  N value{};
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc{} || end != text->data() + text->size() || !(value >= least && value <= most))
    throw Error(Errc::invalid_argument, {name, "='", *text, "' is not a number from ", number_text(least), " to ", number_text(most)});
  return value;
}

}  // namespace detail

}  // namespace tally::inline v0
