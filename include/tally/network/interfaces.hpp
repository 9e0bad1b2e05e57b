// SPDX-License-Identifier: Apache-2.0
// This host's addresses, and which of them a user means by the name of an interface, an address or a range of them.
#pragma once

#include <ifaddrs.h>
#include <net/if.h>

#include <charconv>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "socket.hpp"

namespace tally::inline v0::detail {

struct Interface {
  std::string name;
  SocketAddress address;  // port 0
  bool loopback = false;
};

/// Those that are up.
inline std::vector<Interface> own_interfaces() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) throw Error(Errc::no_resources, {"cannot list this host's addresses: ", errno_text(errno)});
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> all(list, &::freeifaddrs);
  std::vector<Interface> interfaces;
  for (const ifaddrs* each = list; each; each = each->ifa_next) {
    if (!each->ifa_addr || !(each->ifa_flags & IFF_UP)) continue;
    sockaddr_storage storage{};
    if (each->ifa_addr->sa_family == AF_INET) std::memcpy(&storage, each->ifa_addr, sizeof(sockaddr_in));
    else if (each->ifa_addr->sa_family == AF_INET6) std::memcpy(&storage, each->ifa_addr, sizeof(sockaddr_in6));
    else continue;
    interfaces.push_back({each->ifa_name, SocketAddress::of(storage), (each->ifa_flags & IFF_LOOPBACK) != 0});
  }
  return interfaces;
}

/// 10.0.0.0/8, fd00::/8; without a length, that address alone. False if that is not what `text` is.
inline bool parse_range(std::string_view text, SocketAddress& base, int& bits) {
  const std::size_t slash = text.find('/');
  const std::string ip(text.substr(0, slash));
  base = {};
  if (::inet_pton(AF_INET, ip.c_str(), base.ip) == 1) base.family = 4;
  else if (::inet_pton(AF_INET6, ip.c_str(), base.ip) == 1) base.family = 6;
  else return false;
  const int most = base.family == 4 ? 32 : 128;
  bits = most;
  if (slash == std::string_view::npos) return true;
  const std::string_view digits = text.substr(slash + 1);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), bits);
  return !digits.empty() && error == std::errc{} && end == digits.data() + digits.size() && bits >= 0 && bits <= most;
}
inline bool is_in_range(const SocketAddress& address, const SocketAddress& base, int bits) {
  if (address.family != base.family) return false;
  for (int bit = 0; bit < bits; ++bit)
    if (((address.ip[bit / 8] ^ base.ip[bit / 8]) >> (7 - bit % 8)) & 1) return false;
  return true;
}

/// This host's addresses that `choice` names, an interface, an address or a range; empty: those that other hosts may reach. Link-local
/// ones of IPv6 only where they are named. Throws Errc::invalid_argument with what there is.
inline std::vector<SocketAddress> choose_addresses(std::string_view choice, const std::vector<Interface>& all) {
  SocketAddress base;
  int bits = 0;
  const bool range = !choice.empty() && parse_range(choice, base, bits);
  std::vector<SocketAddress> chosen, local, link_local;
  std::string there;
  for (const Interface& each : all) {
    const bool is_link_local = each.address.family == 6 && each.address.ip[0] == 0xfe && (each.address.ip[1] & 0xc0) == 0x80;
    there += concat({there.empty() ? "" : ", ", each.name, " ", each.address.text().substr(0, each.address.text().rfind(':'))});
    if (range ? !is_in_range(each.address, base, bits) : !choice.empty() && each.name != choice) continue;
    (is_link_local && !range ? link_local : choice.empty() && each.loopback ? local : chosen).push_back(each.address);
  }
  if (chosen.empty() && !choice.empty()) chosen = link_local;
  if (chosen.empty()) chosen = local;
  if (chosen.empty()) throw Error(Errc::invalid_argument, {"this host has no interface, address or range '", choice, "'; it has: ", there});
  return chosen;
}

}  // namespace tally::inline v0::detail
