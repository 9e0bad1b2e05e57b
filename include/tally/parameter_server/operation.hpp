// SPDX-License-Identifier: Apache-2.0
// A push or a pull from its call to its report: what was asked for, its part at each shard, and its account.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <vector>

#include "../account/ledger.hpp"
#include "../progress.hpp"
#include "table.hpp"

namespace tally::inline v0::detail {

/// A push, a pull, or both.
struct TableCall {
  Collective what = Collective::push;
  std::size_t tensor = 0;
  std::size_t first = 0, count = 0;             // elements; of rows, `count` keys
  std::span<const std::uint64_t> keys = {};
  const std::byte* in = nullptr;                // what is pushed: elements, or rows in the order of keys
  std::byte* out = nullptr;                     // where to pull to
  double weight = 1;
  int priority = 0;
  bool tick = false;                            // between pushing and pulling
  nanoseconds timeout{};
};

/// Bytes that the transport moved for somebody.
struct Moved {
  std::uint64_t sent = 0, received = 0, overhead = 0;
};
struct TableOp;

/// What an operation has to do with one shard.
struct TablePart {
  TableOp* op = nullptr;
  int shard = 0;
  bool is_push = false, sent = false, done = false;
  bool receiving = false;  // an answer is on its way into the caller's memory
  std::uint64_t sequence = 0;
  std::uint64_t clock = 0;
  std::size_t first = 0, count = 0;  // elements, or keys from that one on
  Ticks sent_at = 0;
};

struct TableOp {
  explicit TableOp(int n) : account(n) {}
  TableCall call;
  std::uint64_t request = 0;
  std::uint64_t number = 0;     // of its push, in the order in which they are sent; 0 before
  std::uint64_t call_number = 0;
  bool failing = false;         // it has failed, and ends when its memory is used no more
  std::vector<TablePart> parts;
  std::size_t remaining = 0;    // parts
  std::uint64_t version = 0;    // of what was pulled: the least of its shards'
  std::uint64_t clock = 0;      // of the worker's then
  // Rows whose keys are not in order are gathered here in order, and scattered after.
  std::vector<std::uint64_t> keys;
  std::vector<std::uint32_t> order;
  std::vector<std::byte> rows_in, rows_out;
  OperationAccount account;
  LedgerRow* row = nullptr;
  std::uint32_t sequence = 0;
  Moved moved;
  Ticks exposed = 0, deadline = 0;  // ticks the caller was blocked; when it is over
  // Of one that asks one shard for something else:
  Envelope asked, answer;
  std::size_t capacity = 0;     // of where the answer goes
  bool background = false, done = false, booked = false;
  Report report;
  std::exception_ptr error;
};

}  // namespace tally::inline v0::detail
