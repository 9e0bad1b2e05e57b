// SPDX-License-Identifier: Apache-2.0
// The engines in which this thread has started something in the background, or has sent what is not on its way yet. A thread that
// waits in one of them looks into the others meanwhile, so that two ranks that wait for two communicators in crossing order do not wait
// for each other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "run.hpp"

namespace tally::inline v0 {

class Neighbours {
 public:
  static Neighbours& of_this_thread() {
    static thread_local Neighbours mine;
    return mine;
  }
  void add(const std::shared_ptr<AnyEngine>& engine) {
    for (const Entry& known : engines_)
      if (known.address == engine.get() && !known.engine.expired()) return;
    engines_.push_back({engine.get(), engine});
  }
  bool any_but(const AnyEngine* me) const { return !looking_ && (engines_.size() > 1 || (engines_.size() == 1 && engines_[0].address != me)); }
  /// Does what can be done there without waiting; true if anything could. Forgets those that have nothing left.
  bool look(const AnyEngine* me) {
    bool moved = false;
    looking_ = true;
    for (std::size_t i = 0; i < engines_.size();) {
      const auto engine = engines_[i].engine.lock();
      const bool left = engine && (engine.get() == me || engine->look_in(moved));
      if (left) ++i;
      else engines_.erase(engines_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    looking_ = false;
    return moved;
  }

 private:
  struct Entry {
    const AnyEngine* address;  // to compare with only
    std::weak_ptr<AnyEngine> engine;
  };
  std::vector<Entry> engines_;
  bool looking_ = false;  // what it looks at may call back, and that may wait
};

/// For engines whose transport may have something left of what is done (see detail::has_rest): this thread looks into them then, too.
template <class T>
class LeftBehind {
 public:
  void know(const std::shared_ptr<AnyEngine>&) {}
  void look_after(const T&) {}
};
template <class T>
  requires requires(const T& transport) { transport.has_rest(); }
class LeftBehind<T> {
 public:
  void know(const std::shared_ptr<AnyEngine>& engine) { engine_ = engine; }
  void look_after(const T& transport) {
    if (const auto engine = transport.has_rest() ? engine_.lock() : nullptr) Neighbours::of_this_thread().add(engine);
  }

 private:
  std::weak_ptr<AnyEngine> engine_;
};

}  // namespace tally::inline v0
