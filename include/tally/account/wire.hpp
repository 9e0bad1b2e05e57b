// SPDX-License-Identifier: Apache-2.0
// An account as bytes, for other ranks of the same build. One list of fields serves both ways. What is read is trusted in
// nothing: lengths are bounded by what is there, and names and ranks by what can be.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "merge.hpp"
#include "snapshot.hpp"

namespace tally::inline v0 {

namespace detail {

/// Adds what it visits to `bytes`.
struct WireWriter {
  std::vector<std::byte> bytes;
  template <class T>
    requires std::is_arithmetic_v<T>
  void plain(T& value, T = {}) {
    const auto* from = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof value);
  }
  template <class Each>
  void list(auto& items, Each&& each) {
    auto count = static_cast<std::uint32_t>(items.size());
    plain(count);
    for (auto& item : items) each(item);
  }
};

/// Fills what it visits from bytes, or throws Errc::protocol.
struct WireReader {
  std::span<const std::byte> bytes;
  /// `most`: no greater value can be.
  template <class T>
    requires std::is_arithmetic_v<T>
  void plain(T& value, T most = std::numeric_limits<T>::max()) {
    if (bytes.size() < sizeof value) throw Error(Errc::protocol, "an account that was received is cut short");
    std::memcpy(&value, bytes.data(), sizeof value);
    bytes = bytes.subspan(sizeof value);
    if (std::is_integral_v<T> && value > most) throw Error(Errc::protocol, "an account that was received names something that does not exist");
  }
  template <class Each>
  void list(auto& items, Each&& each) {
    std::uint32_t count = 0;
    plain(count);
    items.clear();
    for (; count > 0; --count) items.push_back({}), each(items.back());  // each takes at least a byte, so this ends where they do
  }
};

template <class W>
class AccountFields {
 public:
  explicit AccountFields(W& wire) : wire_(wire) {}

  void operator()(Account& a) {
    all(a.job, a.communicator, a.host, a.boot_id, a.transport, a.rank, a.size, a.members, a.begin, a.end, a.clock_offset, a.rows, a.recent, a.by_peer, a.domains, a.power, a.slack, a.host_coverage, a.residual,
        a.carbon_intensity, a.carbon_source, a.pue, a.caveats, a.warnings);
  }

 private:
  void all(auto&... fields) { (field(fields), ...); }

  template <class T>
    requires std::is_arithmetic_v<T>
  void field(T& value) {
    wire_.plain(value);
  }
  void field(nanoseconds& time) {
    std::int64_t count = time.count();
    wire_.plain(count);
    time = nanoseconds(count);
  }
  void field(bool& flag) { code(flag, 1); }
  void field(Collective& c) { code(c, static_cast<int>(last_operation)); }
  void field(Provenance& p) { code(p, static_cast<int>(Provenance::measured)); }
  void field(Split& s) { code(s, static_cast<int>(Split::equal_time)); }
  void field(Domain& d) { code(d, static_cast<int>(Domain::network_model)); }
  template <class E>
  void code(E& value, int most) {
    auto number = static_cast<std::uint8_t>(value);
    wire_.plain(number, static_cast<std::uint8_t>(most));
    value = static_cast<E>(number);
  }
  void field(std::string& text) {
    wire_.list(text, [&](char& c) { wire_.plain(c); });
  }
  template <class T>
  void field(std::vector<T>& items) {
    wire_.list(items, [&](T& item) { field(item); });
  }
  template <class T, std::size_t N>
  void field(std::array<T, N>& items) {
    for (T& item : items) field(item);
  }
  void field(Quantity& q) { all(q.value, q.sigma, q.lower, q.upper, q.provenance, q.split); }
  void field(Blame& b) { all(b.rank, b.arrival, b.transfer, b.credit); }
  void field(AccountTimes& t) {
    for (const auto part : all_times) field(t.*part);
  }
  void field(AccountEnergy& e) {
    for (const auto part : all_energies) field(e.*part);
  }
  void field(AccountRow& r) { all(r.operation, r.size_class, r.algorithm, r.calls, r.failed, r.bytes, r.bytes_sent, r.bytes_received, r.bytes_wire, r.time, r.histogram, r.waited_for, r.energy); }
  void field(AccountEvent& e) {
    all(e.operation_number, e.sequence, e.operation, e.algorithm, e.bytes, e.begin, e.time, e.last_arrival, e.waited_for, e.energy, e.energy_final);
  }
  void field(DomainAccount& d) { all(d.kind, d.key, d.source, d.parent, d.total, d.operations, d.application, d.unattributed, d.watts_floor, d.provenance, d.caveats); }
  void field(PowerSample& p) { all(p.domain, p.begin, p.end, p.watts); }
  void field(SlackRow& s) { all(s.operation, s.peer, s.calls, s.expected, s.tenth_percentile); }

  W& wire_;
};

}  // namespace detail

inline std::vector<std::byte> to_bytes(Account account) {
  detail::WireWriter wire;
  detail::AccountFields fields(wire);
  fields(account);
  return std::move(wire.bytes);
}
/// Throws Errc::protocol for bytes that are no account.
inline Account account_from_bytes(std::span<const std::byte> bytes) {
  Account account;
  detail::WireReader wire{bytes};
  detail::AccountFields fields(wire);
  fields(account);
  if (!wire.bytes.empty()) throw Error(Errc::protocol, "an account that was received has something behind its end");
  try {
    detail::check(account);
  } catch (const Error& error) {
    throw Error(Errc::protocol, {"an account that was received makes no sense: ", error.text()});
  }
  return account;
}

}  // namespace tally::inline v0
