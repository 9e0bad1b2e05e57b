// SPDX-License-Identifier: Apache-2.0
// Tables over UCX, and over shared memory within hosts and UCX between them.
#include <catch2/catch.hpp>

#include <tally/ucx.hpp>

#include "table_networks.hpp"

/// A worker that has not come to rest is left alone for good (see transport/ucx.hpp); what UCX made for it is found nowhere.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() { return "leak:libucp.so\nleak:libucs.so\nleak:libuct.so\n"; }

TEST_CASE("tables over UCX: every pull of bsp is known") { test::pulls_over_are_known(tally::detail::ucx_kind({})); }
TEST_CASE("tables over UCX: rows, background, errors") { test::all_else_over_is_right(tally::detail::ucx_kind({})); }
