// SPDX-License-Identifier: Apache-2.0
// Everything that needs only C++20 and Linux.
#pragma once

#include "check.hpp"
#include "communicator.hpp"
#include "launch.hpp"
