// SPDX-License-Identifier: Apache-2.0
// Joules by this host's meters instead of the model: options.meters = tally::host_meters(). All processes of the host that do so
// elect one reader, so meters are read once however many ranks and jobs there are, and no joule is counted twice.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "energy/member.hpp"
#include "energy/meters.hpp"
#include "energy/source.hpp"
#include "energy/weights_file.hpp"
#include "environment.hpp"
#include "types.hpp"

namespace tally::inline v0 {

struct HostMeters {
  std::string root = {};                 // of the host's files, for tests; TALLY_HOST_ROOT is for the same
  std::string device = {};               // key of the GPU that this rank uses (see Nvml::key_of): it is charged for its share
  bool device_alone = false;             // of what is a GPU's own time: see device_meters()
  std::optional<Weights> weights = {};   // to divide joules by; none: what tally_calibrate measured on this machine, if it did, else equal time
  bool learn = true;                     // and better ones from the windows themselves, as soon as they tell any
  nanoseconds period = std::chrono::milliseconds(100);  // between windows
};

/// For Options::weights: what tally_calibrate measured on this machine, or equal time where it did not. Throws Error where the file that has
/// it cannot be read.
inline Weights host_weights(const std::string& root = {}) { return load_weights(weights_path_of_environment(), machine_key(root)).value_or(Weights::equal_time()); }

namespace detail {

/// The same for all spellings of a folder; short, as names of sockets are, so long ones are told apart by a hash.
inline std::string hub_name(const std::string& root) {
  if (root.empty()) return "host";
  std::error_code error;
  std::string path = std::filesystem::weakly_canonical(root, error).string();
  if (error || path.empty()) path = root;
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (path.size() <= 40) return concat({"root ", path});
  return concat({"root ", hash_text(path)});
}

/// One for all ledgers of this process that ask for the same, as long as there are any. A fork has its own.
inline std::shared_ptr<EnergyMember> member_of(const HostMeters& how) {
  struct Known {
    std::mutex mutex;
    std::weak_ptr<EnergyMember> member;
    std::string root;
    pid_t pid = 0;
  };
  static Known& known = *new Known;  // never destroyed: ledgers may go during exit
  const std::lock_guard lock(known.mutex);
  std::shared_ptr<EnergyMember> member = known.pid == ::getpid() && known.root == how.root ? known.member.lock() : nullptr;
  if (member) return member;
  MemberOptions options;
  options.name = hub_name(how.root);
  options.find = [root = how.root] {
    FindMeters where;
    where.root = root;
    return find_meters(where);
  };
  try {
    if (how.weights) options.hub.weights = *how.weights;
    else options.hub.weights = host_weights(how.root);
  } catch (const Error& error) {
    options.hub.warnings.push_back(concat({"joules are divided by time alone: ", error.text()}));
  }
  options.hub.learn = how.learn;
  options.hub.period = how.period;
  member = std::make_shared<EnergyMember>(std::move(options));
  known.member = member;
  known.root = how.root;
  known.pid = ::getpid();
  return member;
}

}  // namespace detail

/// For Options::meters. Where no meter can be read, joules come from the model, and Account::warnings says why.
inline EnergySources host_meters(HostMeters how = {}) {
  if (const auto root = detail::environment("TALLY_HOST_ROOT")) how.root = *root;
  if (how.weights) {
    const auto plausible = [](double watts) {
      if (!(watts >= 0 && watts <= 1e6)) throw Error(Errc::invalid_argument, "HostMeters::weights holds a number of watts that is not from 0 to 1000000");
    };
    for (const double watts : how.weights->watts) plausible(watts);
    plausible(how.weights->application);
    plausible(how.weights->floor_watts);
  }
  return [how = std::move(how)]() -> std::unique_ptr<EnergySource> { return std::make_unique<HubSeat>(detail::member_of(how), how.device, how.device_alone); };
}
/// For device communicators: joules of the GPU with this key (CudaDriver::meter_key()), whose kernels tell how long they took. Unknown where
/// that GPU has no meter.
inline EnergySources device_meters(std::string key, HostMeters how = {}) {
  how.device = std::move(key);
  how.device_alone = true;
  return host_meters(std::move(how));
}

}  // namespace tally::inline v0
