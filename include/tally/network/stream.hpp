// SPDX-License-Identifier: Apache-2.0
// A connection: bytes in their order, as they are, or encrypted by what another header brings (see tally/tls.hpp). Nothing here waits.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "socket.hpp"

namespace tally::inline v0::detail {

class Stream {
 public:
  /// As recvmsg(2) and sendmsg(2), which do not wait; parts after the first may be left untouched. EPROTO: problem() says what is wrong.
  class Cipher {
   public:
    virtual ~Cipher() = default;
    virtual ssize_t read(std::span<const iovec> parts) = 0;
    virtual ssize_t write(std::span<const iovec> parts) = 0;
    virtual bool waits_to_read() const = 0;  // what write() could not do goes on once the other side has said something
    virtual std::string problem() const = 0;
  };

  Stream(FileDescriptor fd = FileDescriptor(), std::unique_ptr<Cipher> cipher = nullptr) : fd_(std::move(fd)), cipher_(std::move(cipher)) {}
  explicit operator bool() const { return static_cast<bool>(fd_); }
  int get() const { return fd_.get(); }
  const FileDescriptor& descriptor() const { return fd_; }

  ssize_t read(std::span<iovec> parts) {
    if (cipher_) [[unlikely]] return cipher_->read(parts);
    msghdr message = of(parts);
    return ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
  }
  ssize_t write(std::span<iovec> parts) {
    if (cipher_) [[unlikely]] return cipher_->write(parts);
    msghdr message = of(parts);
    return ::sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  ssize_t read(void* to, std::size_t bytes) {
    iovec part{to, bytes};
    return cipher_ ? cipher_->read({&part, 1}) : ::recv(fd_.get(), to, bytes, MSG_DONTWAIT);
  }
  ssize_t write(const void* from, std::size_t bytes) {
    iovec part{const_cast<void*>(from), bytes};
    return cipher_ ? cipher_->write({&part, 1}) : ::send(fd_.get(), from, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  bool waits_to_read() const { return cipher_ && cipher_->waits_to_read(); }
  std::string problem() const { return cipher_ ? cipher_->problem() : std::string(); }

 private:
  static msghdr of(std::span<iovec> parts) {
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    return message;
  }
  FileDescriptor fd_;
  std::unique_ptr<Cipher> cipher_;
};

/// Of a connection that this side has opened, or let in.
using MakeCipher = std::function<std::unique_ptr<Stream::Cipher>(int fd, bool is_let_in)>;
/// What a header of another library brings; makes none where the environment asks for none.
inline MakeCipher (*&cipher_from_environment())() {
  static MakeCipher (*make)() = nullptr;
  return make;
}

}  // namespace tally::inline v0::detail
