// SPDX-License-Identifier: Apache-2.0
// What the examples' main() functions share: who the ranks are, and how a program ends, whatever was wrong.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <exception>
#include <iostream>
#include <string>
#include <utility>

#include <tally/tally.hpp>

/// Parses the command line and runs; returns the exit status: 0, 1 for what failed, 2 for what the caller asked for and cannot have.
/// Errors are one line, "NAME: ...".
template <class F>
int run_program(CLI::App& app, int argc, char** argv, F&& run) {
  const auto explain = [&](std::string what, int status) {
    std::replace(what.begin(), what.end(), '\n', ' ');
    std::cerr << app.get_name() << ": " << what << std::endl;
    return status;
  };
  try {
    app.parse(argc, argv);
    std::forward<F>(run)();
    return 0;
  } catch (const CLI::ParseError& error) {
    return error.get_exit_code() == 0 ? app.exit(error) : explain(error.what(), 2);
  } catch (const tally::Error& error) {
    const bool by_the_caller = error.errc() == tally::Errc::invalid_argument && error.rank() < 0;
    return explain(error.what(), by_the_caller ? 2 : 1);
  } catch (const std::exception& error) {
    return explain(error.what(), 1);
  }
}

/// f(communicator of all ranks) on each rank: on the one that a launcher such as mpirun started, or on so many of our own.
template <class F>
void on_all_ranks(int ranks, bool threads, F&& f, const tally::Options& options = {}) {
  if (tally::job_info().launcher.empty()) return void(tally::launch(ranks, f, threads ? tally::threads : tally::processes, options));
  tally::Communicator comm = tally::init(options);
  f(comm);
}
