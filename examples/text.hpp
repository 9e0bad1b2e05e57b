// SPDX-License-Identifier: Apache-2.0
// The text that a model is to learn: the library's own headers, or files that somebody names; and where samples lie in it.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

#include <tally/tally.hpp>

#include "byte_model.hpp"

[[noreturn]] inline void refuse(const std::string& text) { throw tally::Error(tally::Errc::invalid_argument, text); }

/// The library's own headers: where the build says they are, or beside this source file.
inline std::vector<std::string> default_text() {
  namespace fs = std::filesystem;
#ifdef TALLY_EXAMPLE_TEXT_DIR
  const fs::path folder = TALLY_EXAMPLE_TEXT_DIR;
#else
  const fs::path folder = fs::path(__FILE__).parent_path() / ".." / "include" / "tally";
#endif
  std::vector<std::string> files;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    if (it->path().extension() == ".hpp") files.push_back(it->path().string());
  if (files.empty()) refuse("the library's headers are not in '" + folder.string() + "'; name a text with --text FILE");
  std::sort(files.begin(), files.end());  // a folder lists in any order, and runs are to be repeatable
  return files;
}

/// `files`, or the default if there are none.
inline std::string read_text(const std::vector<std::string>& files) {
  std::string text;
  for (const std::string& file : files.empty() ? default_text() : files) {
    std::ifstream in(file, std::ios::binary);
    char block[65536];
    while (in.read(block, sizeof block), in.gcount() > 0) text.append(block, static_cast<std::size_t>(in.gcount()));
    if (!in.is_open() || in.bad()) refuse("cannot read the text '" + file + "': " + std::strerror(errno));
  }
  if (text.size() <= context) refuse("the text has " + std::to_string(text.size()) + " bytes and must have more than " + std::to_string(context));
  return text;
}

/// Number i of a sequence of numbers as if drawn by lot: a hash, so that any rank can compute any of them.
constexpr std::uint64_t drawn(std::uint64_t i, std::uint64_t seed) {
  std::uint64_t x = seed * 0xd1342543de82ef95u + i * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
