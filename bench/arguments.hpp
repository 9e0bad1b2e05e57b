// SPDX-License-Identifier: Apache-2.0
// Reads a program's arguments. What is wrong with them is one line, and the exit status 2.
#pragma once

#include <CLI/CLI.hpp>
#include <iostream>
#include <optional>
#include <string>

namespace bench {

/// The exit status, if the program is to end.
inline std::optional<int> parse(const char* program, CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
    return {};
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const CLI::ParseError& error) {
    const std::string why = error.what();
    std::cerr << program << ": " << why.substr(0, why.find('\n')) << '\n';
    return 2;
  }
}

}  // namespace bench
