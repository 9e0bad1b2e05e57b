// SPDX-License-Identifier: Apache-2.0
// Everything that needs only C++20 and Linux.
#pragma once

#if __cplusplus < 202002L
#error "tally needs C++20: compile with -std=c++20"
#endif

#include "check.hpp"
#include "communicator.hpp"
#include "launch.hpp"
#include "mesh.hpp"
