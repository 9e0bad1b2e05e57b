// SPDX-License-Identifier: Apache-2.0
// Reads and writes memory of other processes through the kernel (process_vm_readv, process_vm_writev), and does one
// share that way: in pieces that stay in the core's cache, folded in the fixed bracketing.
#pragma once

#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "share.hpp"

namespace tally::inline v0 {

/// 0, or errno: ESRCH if there is no such process, EPERM if the kernel does not allow it, EFAULT if there is no such memory.
inline int copy_by_kernel(bool write, pid_t process, std::byte* here, std::byte* there, std::size_t bytes) {
  while (bytes > 0) {
    iovec local{here, bytes}, remote{there, bytes};
    const ssize_t moved = write ? ::process_vm_writev(process, &local, 1, &remote, 1, 0) : ::process_vm_readv(process, &local, 1, &remote, 1, 0);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return moved < 0 ? errno : EFAULT;
    here += moved;
    there += moved;
    bytes -= static_cast<std::size_t>(moved);
  }
  return 0;
}

/// Where the security module Yama lets only a process's ancestors into its memory: lets others of the same user, too.
inline void admit_other_processes() {
#if defined(PR_SET_PTRACER) && defined(PR_SET_PTRACER_ANY)
  ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
#endif
}

class KernelPass {
 public:
  struct Place {
    pid_t process = 0;  // 0: this one
    std::byte* at = nullptr;
  };
  std::vector<Place> sources, targets;  // as in SharePass

  /// As SharePass::run. 0, or the errno of the first copy that failed, with the process in `failed`.
  int run(std::size_t bytes, std::size_t grain, const Fold* fold, SharePass& pass, pid_t& failed, Share::Way way = Share::Way::fold) {
    if (targets.empty()) return 0;
    if (way == Share::Way::exchange) return exchange(bytes, failed);
    if (way != Share::Way::fold) return scan(bytes, grain, fold, pass, failed, way);
    const bool own_target = targets[0].process == 0;
    const std::size_t most = std::max<std::size_t>(cached / (sources.size() + 1), 16 << 10), piece = std::max(grain, most - most % grain);
    scratch_.resize(std::max(scratch_.size(), (sources.size() + 1) * piece));
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      std::byte* const own = own_target ? targets[0].at + at : scratch_.data();
      pass.sources.clear();
      pass.targets.assign(1, own);
      for (std::size_t s = 0; s < sources.size(); ++s) {
        std::byte* local = sources[s].at + at;
        if (sources[s].process != 0) {
          local = sources.size() == 1 ? own : scratch_.data() + (s + 1) * piece;
          if (const int error = copy_by_kernel(false, failed = sources[s].process, local, sources[s].at + at, now)) return error;
        }
        pass.sources.push_back(local);
      }
      if (sources.size() > 1 || own_target) pass.run(now, grain, fold);
      const std::byte* result = sources.size() == 1 ? pass.sources[0] : own;
      for (const Place& target : targets)
        if (target.process != 0)
          if (const int error = copy_by_kernel(true, failed = target.process, const_cast<std::byte*>(result), target.at + at, now)) return error;
    }
    return 0;
  }

 private:
  static constexpr std::size_t cached = std::size_t{512} << 10;

  /// Targets are this process's.
  int exchange(std::size_t bytes, pid_t& failed) {
    for (std::size_t i = 0; i < sources.size(); ++i) {
      if (sources[i].process == 0) std::memcpy(targets[i].at, sources[i].at, bytes);
      else if (const int error = copy_by_kernel(false, failed = sources[i].process, targets[i].at, sources[i].at, bytes)) return error;
    }
    return 0;
  }
  int scan(std::size_t bytes, std::size_t grain, const Fold* fold, SharePass& pass, pid_t& failed, Share::Way way) {
    const std::size_t most = std::max<std::size_t>(cached / (sources.size() + targets.size()), 16 << 10), piece = std::max(grain, most - most % grain);
    scratch_.resize(std::max(scratch_.size(), (sources.size() + targets.size()) * piece));
    for (std::size_t at = 0; at < bytes; at += piece) {
      const std::size_t now = std::min(piece, bytes - at);
      std::byte* here = scratch_.data();
      pass.sources.clear();
      pass.targets.clear();
      for (const Place& source : sources) {
        if (source.process != 0)
          if (const int error = copy_by_kernel(false, failed = source.process, here, source.at + at, now)) return error;
        pass.sources.push_back(source.process == 0 ? source.at + at : std::exchange(here, here + piece));
      }
      for (const Place& target : targets) pass.targets.push_back(target.process == 0 ? target.at + at : std::exchange(here, here + piece));
      pass.run(now, grain, fold, false, way);
      for (std::size_t t = 0; t < targets.size(); ++t)
        if (targets[t].process != 0)
          if (const int error = copy_by_kernel(true, failed = targets[t].process, pass.targets[t], targets[t].at + at, now)) return error;
    }
    return 0;
  }

  std::vector<std::byte> scratch_;
};

}  // namespace tally::inline v0
