// SPDX-License-Identifier: Apache-2.0
// A shared library that is opened while the program runs, so that tally is built and works without it: a vendor's
// interface to its devices.
#pragma once

#include <dlfcn.h>

#include <string>
#include <type_traits>
#include <utility>

#include "../text.hpp"

namespace tally::inline v0 {
namespace detail {

/// Open as long as it lives, or not open, with error() saying why. The code stays mapped until the process ends
/// (RTLD_NODELETE): NVML tolerates being unmapped, but a library that cannot be shut down, because others in the
/// process may use it, has threads and destructors that do not.
class DynamicLibrary {
 public:
  /// `name` as dlopen() takes it: a path, or a name for the dynamic linker to look for.
  explicit DynamicLibrary(std::string name) : name_(std::move(name)) {
    if (name_.empty()) {  // dlopen would open the program itself
      error_ = "no library is named";
      return;
    }
    handle_ = ::dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!handle_) error_ = last_error();
  }
  DynamicLibrary(DynamicLibrary&& other) noexcept : name_(std::move(other.name_)), handle_(std::exchange(other.handle_, nullptr)), error_(std::move(other.error_)) {}
  DynamicLibrary& operator=(DynamicLibrary&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(handle_, other.handle_);
    std::swap(error_, other.error_);
    return *this;
  }
  ~DynamicLibrary() {
    if (handle_) ::dlclose(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  /// Why it is not open, or which function it lacks, with its name; empty if neither.
  const std::string& error() const { return error_; }

  /// Sets `function` to the library's function of that name, or to null and returns false where it has none.
  template <class F>
    requires std::is_function_v<F>
  bool find(F*& function, const char* name) const {
    function = handle_ ? reinterpret_cast<F*>(::dlsym(handle_, name)) : nullptr;
    return function != nullptr;
  }
  /// The same for a function that cannot be done without: error() names the first that is missing.
  template <class F>
  bool need(F*& function, const char* name) {
    if (find(function, name)) return true;
    if (error_.empty()) error_ = concat({name_, " has no function ", name});
    return false;
  }

 private:
  static std::string last_error() {
    const char* text = ::dlerror();
    return text ? text : "dlopen failed without a reason";
  }
  std::string name_;
  void* handle_ = nullptr;
  std::string error_;
};

}  // namespace detail
}  // namespace tally::inline v0
