// SPDX-License-Identifier: Apache-2.0
// Puts the text of an HTML page together. What comes from elsewhere, a host's name or a warning, may hold anything: it is cut
// to a length, made valid UTF-8 and escaped, so that it can be neither markup nor invisible.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <string>
#include <string_view>

#include "../text.hpp"

namespace tally::inline v0 {
namespace detail {

inline void append_utf8(std::string& to, char32_t c) {
  const auto byte = [&](char32_t b) { to.push_back(static_cast<char>(static_cast<unsigned char>(b))); };
  if (c < 0x80) return byte(c);
  if (c < 0x800) byte(0xC0 | (c >> 6));
  else if (c < 0x10000) byte(0xE0 | (c >> 12)), byte(0x80 | ((c >> 6) & 0x3F));
  else byte(0xF0 | (c >> 18)), byte(0x80 | ((c >> 12) & 0x3F)), byte(0x80 | ((c >> 6) & 0x3F));
  byte(0x80 | (c & 0x3F));
}

/// The next character; U+FFFD for a byte that begins none (overlong forms, surrogates and what is cut off included).
inline char32_t next_utf8(std::string_view& text) {
  constexpr char32_t wrong = 0xFFFD;
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = at(0);
  const std::size_t length = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xF0 && first < 0xF5 ? 4 : 0;
  char32_t c = length == 1 ? first : first & (0x7Fu >> length);
  bool valid = length > 0 && length <= text.size();
  for (std::size_t i = 1; valid && i < length; ++i) {
    valid = (at(i) & 0xC0) == 0x80;
    c = (c << 6) | (at(i) & 0x3Fu);
  }
  constexpr char32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  if (!valid || c < least[length] || (c >= 0xD800 && c < 0xE000) || c > 0x10FFFF) {
    text.remove_prefix(1);
    return wrong;
  }
  text.remove_prefix(length);
  return c;
}

/// Any bytes as text of HTML or of an attribute in double quotes, at most `longest` characters of it. Control characters, and
/// those that turn the direction of writing, are shown as such.
inline std::string escaped(std::string_view text, std::size_t longest = 96) {
  std::string result;
  std::size_t count = 0;
  while (!text.empty()) {
    if (count++ == longest) return result + concat({"… (", text.size(), " more bytes)"});
    const char32_t c = next_utf8(text);
    if (c == '<') result += "&lt;";
    else if (c == '>') result += "&gt;";
    else if (c == '&') result += "&amp;";
    else if (c == '"') result += "&quot;";
    else if (c == '\'') result += "&#39;";
    else if (c < 0x20) append_utf8(result, 0x2400 + c);
    else if (c == 0x7F) append_utf8(result, 0x2421);
    else if ((c >= 0x80 && c < 0xA0) || (c >= 0x200B && c <= 0x200F) || (c >= 0x2028 && c <= 0x202E) || (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF || (c & 0xFFFE) == 0xFFFE) append_utf8(result, 0xFFFD);
    else append_utf8(result, c);
  }
  return result;
}

/// A text of our own as it is printed, e.g. "1.25 +- 0.10 us" as "1.25 ± 0.10 µs", escaped; a figure and its unit stay on one line.
inline std::string typeset(std::string_view text) {
  static constexpr std::string_view space = "\u00A0", units[] = {"ns", "us", "ms", "s", "nJ", "uJ", "mJ", "J", "kJ", "MJ", "ng", "ug", "mg", "g", "kg", "t", "g/kWh", "B", "KiB", "MiB", "GiB", "TiB", "W", "%"};
  std::string result;
  while (!text.empty()) {
    const bool after_figure = !result.empty() && result.back() >= '0' && result.back() <= '9';
    if (text[0] != ' ' || !after_figure) {
      if (text.starts_with("+- ")) result += "±", result += space, text.remove_prefix(3);
      else result += text[0], text.remove_prefix(1);
      continue;
    }
    text.remove_prefix(1);
    const std::string_view word = text.substr(0, std::min(text.find_first_of(" ,;:.)("), text.size()));
    const bool unit = word == "+-" || std::find(std::begin(units), std::end(units), word) != std::end(units);
    result += unit ? space : " ";
    if (unit && word[0] == 'u') result += "µ", text.remove_prefix(1);
  }
  return escaped(result, std::string::npos);
}

/// A number of an SVG: one decimal, whatever the locale; never "nan" or "inf".
inline std::string decimal(double value) {
  if (!std::isfinite(value)) value = 0;
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, std::clamp(value, -1e9, 1e9), std::chars_format::fixed, 1).ptr;
  const std::string_view text(buffer, static_cast<std::size_t>(end - buffer));
  return std::string(text.ends_with(".0") ? text.substr(0, text.size() - 2) : text);
}

/// The page while it grows.
struct Html {
  std::string text;
  /// Markup: whatever comes from elsewhere goes through escaped() or typeset() first.
  void add(std::initializer_list<Piece> pieces) {
    for (const Piece& piece : pieces) piece.append_to(text);
  }
};

}  // namespace detail
}  // namespace tally::inline v0
