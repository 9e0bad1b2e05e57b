// SPDX-License-Identifier: Apache-2.0
// Descriptors that close themselves, files that are read without waiting for anybody, and files that are whole or not there.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "error.hpp"
#include "text.hpp"

namespace tally::inline v0 {
namespace detail {

inline std::string errno_text(int error) { return std::generic_category().message(error); }

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  /// Who asks closes it.
  int release() { return std::exchange(fd_, -1); }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

/// What a file held, or the errno that says why not: EISDIR for a directory, ENOTSUP for what is no regular file, EFBIG for more than was asked for.
struct FileText {
  std::string text;
  int error = 0;
};

/// The first `most` bytes of a file.
inline FileText read_start(const std::string& path, std::size_t most) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!file) return {{}, errno};
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) return {{}, errno};
  if (S_ISDIR(status.st_mode)) return {{}, EISDIR};
  if (!S_ISREG(status.st_mode)) return {{}, ENOTSUP};
  FileText read{std::string(most, '\0'), 0};
  std::size_t have = 0;
  while (have < most) {
    const ssize_t got = ::read(file.get(), read.text.data() + have, most - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return {{}, errno};
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  read.text.resize(have);
  return read;
}

}  // namespace detail

/// A file that is complete whenever it is there: a temporary file beside it, whose name does not end like that of `path`, is
/// written, synchronised and renamed. Throws Errc::invalid_argument if there is something at `path` that is not a plain file, and
/// Errc::no_resources if the system refuses; the temporary file is gone then, as it is without a commit().
class AtomicFile {
 public:
  explicit AtomicFile(std::string path) : path_(std::move(path)) {
    struct ::stat there {};
    if (::lstat(path_.c_str(), &there) == 0 && !S_ISREG(there.st_mode))
      throw Error(Errc::invalid_argument, {"cannot replace '", path_, "': it is not a plain file; name a file, or a path where there is nothing yet"});
    for (int attempt = 0; !file_ && attempt < 100; ++attempt) {  // what a killed process of the same number left is not touched
      partial_ = detail::concat({path_, ".", ::getpid(), ".", attempt, ".partial"});
      file_ = detail::FileDescriptor(::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
      if (!file_ && errno != EEXIST) break;
    }
    if (!file_) fail("creating");
    made_ = true;
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (made_) ::unlink(partial_.c_str());
  }
  void write(std::string_view text) {
    while (!text.empty()) {
      const ssize_t written = ::write(file_.get(), text.data(), text.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("writing");
      text.remove_prefix(static_cast<std::size_t>(written));
    }
  }
  void commit() {
    if (::fsync(file_.get()) != 0) fail("synchronising");
    if (::close(file_.release()) != 0) fail("closing");
    if (std::rename(partial_.c_str(), path_.c_str()) != 0) fail("renaming");
    made_ = false;
  }

 private:
  [[noreturn]] void fail(const char* step) const {
    const int error = errno;
    if (made_) ::unlink(partial_.c_str());
    const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    throw Error(Errc::no_resources, {"cannot write '", path_, "': ", step, " '", partial_, "' failed: ", detail::errno_text(error),
                                     full ? "; make room there or choose another folder" : "; choose a path in a folder that exists and that this user may write to"});
  }
  std::string path_, partial_;
  detail::FileDescriptor file_;
  bool made_ = false;
};

/// The same of a text, e.g. for node_exporter's textfile collector.
inline void write_file_atomically(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace tally::inline v0
