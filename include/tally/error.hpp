// SPDX-License-Identifier: Apache-2.0
// The one exception type. Whoever detects a failure writes the whole story into the text (who, where, which
// operation, what each rank was last seen doing), because nothing is logged elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <system_error>

#include "text.hpp"

namespace tally::inline v0 {

enum class Errc {
  invalid_argument = 1,  // the caller's own mistake, found before anything was sent
  mismatch,              // ranks called different operations, counts, types, operators or roots
  timeout,               // the deadline passed
  peer_lost,             // a peer's process died, or no connection to it is left
  peer_left,             // a peer destroyed its communicator while something was still needed of it
  aborted,               // Communicator::abort, or an exception in another rank's operator
  no_resources,          // memory, descriptors or processes could not be had
  protocol,              // a peer or the environment sent something malformed
  unsupported,           // this build, kernel or algorithm cannot do that
  rank_failed,           // a rank that launch() started threw or exited
};

inline const char* name_of(Errc code) {
  switch (code) {
    case Errc::invalid_argument: return "invalid argument";
    case Errc::mismatch: return "mismatched calls";
    case Errc::timeout: return "deadline passed";
    case Errc::peer_lost: return "peer lost";
    case Errc::peer_left: return "peer left";
    case Errc::aborted: return "aborted";
    case Errc::no_resources: return "out of resources";
    case Errc::protocol: return "malformed data";
    case Errc::unsupported: return "unsupported";
    case Errc::rank_failed: return "rank failed";
  }
  return "unknown error";
}

inline const std::error_category& error_category() {
  struct Category final : std::error_category {
    const char* name() const noexcept override { return "tally"; }
    std::string message(int code) const override { return name_of(static_cast<Errc>(code)); }
  };
  static const Category category;
  return category;
}
inline std::error_code make_error_code(Errc code) { return {static_cast<int>(code), error_category()}; }

/// Where an error belongs: -1 and empty where it belongs nowhere in particular.
struct ErrorContext {
  int rank = -1;  // the rank that raised it
  int peer = -1;  // the rank at fault, where one is known; of calls that do not match, one that called otherwise
  std::uint64_t sequence = 0;
  std::chrono::nanoseconds elapsed{};
};

/// Thrown by everything in the library. what() is complete: "deadline passed: ...".
class Error : public std::system_error {
 public:
  [[gnu::cold, gnu::noinline]] Error(Errc code, std::string_view text, ErrorContext context = {})
      : std::system_error(make_error_code(code)), context_(context), what_(detail::concat({name_of(code), ": ", text})) {}
  /// The text in pieces: Error(code, {"rank ", r, " died"}).
  [[gnu::cold, gnu::noinline]] Error(Errc code, std::initializer_list<detail::Piece> text, ErrorContext context = {}) : Error(code, detail::concat(text), context) {}

  const char* what() const noexcept override { return what_.c_str(); }
  Errc errc() const noexcept { return static_cast<Errc>(code().value()); }
  /// what() without the leading name of the code.
  std::string_view text() const noexcept {
    return std::string_view(what_).substr(std::string_view(name_of(errc())).size() + 2);
  }
  int rank() const noexcept { return context_.rank; }
  int peer() const noexcept { return context_.peer; }
  std::uint64_t sequence() const noexcept { return context_.sequence; }
  std::chrono::nanoseconds elapsed() const noexcept { return context_.elapsed; }
  const ErrorContext& context() const noexcept { return context_; }

 private:
  ErrorContext context_;
  std::string what_;
};

/// Thrown by transports, who know whose fault it is.
class TransportError : public Error {
 public:
  using Error::Error;
};

}  // namespace tally::inline v0

template <>
struct std::is_error_code_enum<tally::Errc> : std::true_type {};
