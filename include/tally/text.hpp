// SPDX-License-Identifier: Apache-2.0
// Puts texts together: concat({"rank ", r, " died"}). One function does it, out of line: a chain of std::string's
// operator+ would be expanded, with the clean-up of all its temporaries, at each of the hundred places that may fail.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace tally::inline v0::detail {

/// A piece of a text: words, which must outlive it, or a whole number.
class Piece {
 public:
  Piece(const char* words) : Piece(std::string_view(words)) {}
  Piece(std::string_view words) : kind_(Kind::words), words_(words.data()), value_(words.size()) {}
  Piece(const std::string& words) : Piece(std::string_view(words)) {}
  template <std::integral N>
    requires(!std::same_as<N, bool> && !std::same_as<N, char>)
  Piece(N number) : kind_(std::signed_integral<N> ? Kind::integer : Kind::natural), value_(static_cast<std::uint64_t>(number)) {}

  void append_to(std::string& text) const {
    if (kind_ == Kind::words) text.append(words_, value_);
    else if (kind_ == Kind::integer) text.append(std::to_string(static_cast<std::int64_t>(value_)));
    else text.append(std::to_string(value_));
  }

 private:
  enum class Kind : std::uint8_t { words, integer, natural } kind_;
  const char* words_ = nullptr;
  std::uint64_t value_;  // the number, or how many characters
};

[[gnu::cold, gnu::noinline]] inline std::string concat(std::initializer_list<Piece> pieces) {
  std::string text;
  for (const Piece& piece : pieces) piece.append_to(text);
  return text;
}

}  // namespace tally::inline v0::detail
