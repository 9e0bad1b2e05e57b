// SPDX-License-Identifier: Apache-2.0
// How a command line names what a pull from a parameter server may miss.
#pragma once

#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>
#include <tally/parameter_server.hpp>

inline tally::Consistency consistency_of(const std::string& option, const std::string& text) {
  if (text == "bsp") return tally::bsp;
  if (text == "asp") return tally::asp;
  std::size_t used = 0;
  if (text.rfind("ssp:", 0) == 0) {
    try {
      const unsigned long clocks = std::stoul(text.substr(4), &used);
      if (used == text.size() - 4 && text[4] != '-') return tally::ssp(clocks);
    } catch (const std::logic_error&) {
    }
  }
  throw CLI::ValidationError(option, "'" + text + "' is none; there are bsp, ssp:CLOCKS (such as ssp:4) and asp");
}
