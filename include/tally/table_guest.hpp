// SPDX-License-Identifier: Apache-2.0
// A table from outside its communicator: readers that come and go, e.g. for inference, and workers that come later. Any process that
// reaches one of the table's doors (ParameterServer::doors()) may have one; TALLY_SECRET and TLS hold for them as for ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "parameter_server.hpp"
#include "parameter_server/guest.hpp"

namespace tally::inline v0 {

struct GuestOptions {
  nanoseconds timeout = std::chrono::seconds(60);
  bool accounting = true;
  AccountSettings account = {};
};

namespace detail {
template <Element T>
std::shared_ptr<TableGuest> enter_table(const std::string& door, const GuestOptions& options) {
  return TableGuest::enter(door, element_type<T>(), sizeof(T), {Clock::host(), options.timeout, options.accounting, options.account});
}
}  // namespace detail

/// Pulls what is there, from all servers at once, and holds up nobody: each pull is of the values as they were published when it came,
/// and says of which version. One thread uses it at a time.
template <Element T>
class TableReader : public TableTensors<T> {
 public:
  /// `door`: HOST:PORT. Errc::peer_lost if there is no table, Errc::invalid_argument if it is of other elements, or the secret differs.
  explicit TableReader(const std::string& door, const GuestOptions& options = {}) : guest_(detail::enter_table<T>(door, options)) { this->use(guest_); }
  const Ledger& ledger() const { return guest_->ledger(); }

 private:
  std::shared_ptr<detail::TableGuest> guest_;
};

/// A worker like the others from the clock on that they have reached, until it closes, or is gone. One thread uses it at a time; what
/// it does in the background goes on while it waits for something.
template <Element T>
class TableWorker : public TableTensors<T> {
 public:
  /// Errc::no_resources if all places are taken (TableOptions::guests); else as for a reader.
  explicit TableWorker(const std::string& door, const GuestOptions& options = {}) : guest_(detail::enter_table<T>(door, options)) {
    guest_->join();
    this->use(guest_);
  }
  void tick() { guest_->tick_to(guest_->clock() + 1); }
  std::uint64_t clock() const { return guest_->clock(); }
  /// Leaves: what it has pushed is in. One that is destroyed without it is a worker that died.
  void close() { guest_->close(); }
  Rank rank() const { return guest_->rank(); }
  const Ledger& ledger() const { return guest_->ledger(); }

 private:
  std::shared_ptr<detail::TableGuest> guest_;
};

}  // namespace tally::inline v0
