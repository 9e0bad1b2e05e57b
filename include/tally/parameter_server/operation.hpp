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

  /// For the next one.
  void reset() {
    error = nullptr;
    parts.clear();
    number = 0;
    failing = done = booked = false;
    moved = {};
    asked = {};
    rows_in.clear();
    exposed = 0;
    report = {};
  }
};

inline void fill(Report& report, Moved& moved) {
  report.bytes_sent = moved.sent;
  report.bytes_received = moved.received;
  report.bytes_wire = moved.sent + moved.overhead;
  moved = {};
}
/// Of what is pushed or pulled.
inline std::uint64_t bytes_of(const Table& table, const TableOp& op) {
  if (op.call.what == Collective::leave) return 0;
  const TensorSpec& t = table.tensors[op.call.tensor];
  return (t.is_sparse() ? op.call.keys.size() * t.row : op.call.count) * table.rule.grain;
}
/// Where it is booked. `name`: the consistency's.
inline LedgerRow& row_of(Ledger& ledger, const Table& table, const TableOp& op, const std::string& name) {
  if (op.call.what == Collective::leave) return ledger.row(op.call.what, 0, name);
  return ledger.row(op.call.what, bytes_of(table, op), table.tensors[op.call.tensor].is_sparse() ? "rows " + name : name);
}

/// Who uses a table: a rank of its communicator, or a guest.
class TableUser {
 public:
  virtual ~TableUser() = default;
  virtual const Table& table() const = 0;
  virtual Rank rank() const = 0;
  virtual bool is_worker() const = 0;
  virtual TableOp& take() = 0;
  /// To its end.
  virtual Report run(TableOp& op) = 0;
  virtual void start_in_background(TableOp& op) = 0;
  virtual bool is_done(TableOp& op) = 0;
  virtual Report wait(TableOp& op) = 0;
  virtual void abandon(TableOp& op) = 0;
};

}  // namespace tally::inline v0::detail
