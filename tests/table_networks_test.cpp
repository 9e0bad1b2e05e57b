// SPDX-License-Identifier: Apache-2.0
// Tables over TCP, and over shared memory within hosts and TCP between them.
#include <catch2/catch.hpp>

#include "table_networks.hpp"

TEST_CASE("tables over TCP: every pull of bsp is known") { test::pulls_over_are_known(tally::detail::tcp_kind({})); }
TEST_CASE("tables over TCP: rows, background, errors") { test::all_else_over_is_right(tally::detail::tcp_kind({})); }
