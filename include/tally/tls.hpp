// SPDX-License-Identifier: Apache-2.0
// TLS between hosts: where this header is included, OpenSSL is linked (CMake target tally::tls) and TALLY_TLS_CERTIFICATE, TALLY_TLS_KEY
// and TALLY_TLS_AUTHORITY name files, ranks encrypt what goes over TCP, and talk to nobody whose certificate that authority has not
// signed. What goes by shared memory, UCX, RDMA or MPI is not encrypted.
#pragma once

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "environment.hpp"
#include "error.hpp"
#include "network/stream.hpp"

namespace tally::inline v0::detail {

/// TLS 1.3, both sides showing a certificate (RFC 8446).
class TlsContext {
 public:
  /// Files of PEM: this rank's certificate (and those between it and the authority's), its key, and the authority's certificate.
  TlsContext(const std::string& certificate, const std::string& key, const std::string& authority) : context_(make(), &::SSL_CTX_free) {
    if (!context_) throw Error(Errc::no_resources, {"TLS cannot be set up: ", reason()});
    ::SSL_CTX_set_min_proto_version(handle(), TLS1_3_VERSION);
    // What a server says after the handshake would lie unread at a client that only sends, and reset the connection at its end.
    ::SSL_CTX_set_num_tickets(handle(), 0);
    ::SSL_CTX_set_session_cache_mode(handle(), SSL_SESS_CACHE_OFF);
    // Who sends again may have moved what it sends, and may have more of it by then.
    // Whether all was said is told within (see FrameHeader::goodbye).
    ::SSL_CTX_set_options(handle(), SSL_OP_IGNORE_UNEXPECTED_EOF);
    ::SSL_CTX_set_mode(handle(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    ::SSL_CTX_set_verify(handle(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    ::SSL_CTX_set_default_passwd_cb(handle(), [](char*, int, int, void*) { return -1; });  // nobody is there to be asked
    expect(::SSL_CTX_use_certificate_chain_file(handle(), certificate.c_str()), "certificate", certificate);
    expect(::SSL_CTX_use_PrivateKey_file(handle(), key.c_str(), SSL_FILETYPE_PEM), "key", key);
    expect(::SSL_CTX_check_private_key(handle()), "key, which is not the certificate's,", key);
    expect(::SSL_CTX_load_verify_locations(handle(), authority.c_str(), nullptr), "authority's certificate", authority);
  }
  SSL_CTX* handle() const { return context_.get(); }
  /// Why the last call failed, in OpenSSL's words.
  static std::string reason(unsigned long error = ::ERR_peek_last_error()) {
    char text[256] = "no reason is known";
    if (error != 0) ::ERR_error_string_n(error, text, sizeof text);
    ::ERR_clear_error();
    return text;
  }

 private:
  static SSL_CTX* make() {
    ::OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, nullptr);  // threads and objects of the library may outlive what runs at exit
    return ::SSL_CTX_new(::TLS_method());
  }
  static void expect(int result, const char* what, const std::string& path) {
    if (result != 1) throw Error(Errc::invalid_argument, {"TLS cannot use the ", what, " in '", path, "': ", reason(::ERR_peek_error())});  // the first one, as a file that is not there
  }
  std::unique_ptr<SSL_CTX, decltype(&::SSL_CTX_free)> context_;
};

class TlsCipher final : public Stream::Cipher {
 public:
  TlsCipher(std::shared_ptr<const TlsContext> context, int fd, bool is_let_in) : context_(std::move(context)), ssl_(::SSL_new(context_->handle()), &::SSL_free) {
    BIO* const bytes = ssl_ ? ::BIO_new(of_socket()) : nullptr;
    if (!bytes) throw Error(Errc::no_resources, {"TLS has no room for a connection: ", TlsContext::reason()});
    ::BIO_set_data(bytes, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
    ::BIO_set_init(bytes, 1);
    ::SSL_set_bio(ssl_.get(), bytes, bytes);
    if (is_let_in) {
      ::SSL_set_accept_state(ssl_.get());
    } else {
      ::SSL_set_connect_state(ssl_.get());
      // Who may wait for the other side to speak has to speak first; if it cannot yet, read() and write() do.
      if (const int got = ::SSL_do_handshake(ssl_.get()); got <= 0) (void)is_over(got);
    }
  }

  ssize_t read(std::span<const iovec> parts) override {
    return each(parts, [this](void* at, int bytes) { return ::SSL_read(ssl_.get(), at, bytes); });
  }
  ssize_t write(std::span<const iovec> parts) override {
    const ssize_t moved = each(parts, [this](void* at, int bytes) {
      const int got = ::SSL_write(ssl_.get(), at, bytes);
      // A key is good for 2^24.5 records (RFC 8446, 5.5), and OpenSSL never changes it by itself.
      if (got > 0 && (records_ += 1 + static_cast<std::uint32_t>(got) / SSL3_RT_MAX_PLAIN_LENGTH) > most_records) records_ = 0, ::SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_NOT_REQUESTED);
      return got;
    });
    writing_waits_to_read_ = moved < 0 && SSL_want_read(ssl_.get());
    if (moved == 0 && !parts.empty() && parts.front().iov_len > 0) return errno = EPIPE, -1;  // the other side has gone before it let this one in
    return moved;
  }
  bool waits_to_read() const override { return writing_waits_to_read_; }
  std::string problem() const override { return problem_; }

 private:
  /// OpenSSL's own would raise SIGPIPE.
  static const BIO_METHOD* of_socket() {
    static BIO_METHOD* const method = [] {
      BIO_METHOD* const made = ::BIO_meth_new(::BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "tally");
      if (!made) throw Error(Errc::no_resources, "TLS has no room for connections");
      ::BIO_meth_set_read(made, [](BIO* bio, char* to, int bytes) {
        BIO_clear_retry_flags(bio);
        const ssize_t got = ::recv(fd_of(bio), to, static_cast<std::size_t>(bytes), MSG_DONTWAIT);
        if (got == 0) ::BIO_set_flags(bio, BIO_FLAGS_IN_EOF);
        return moved(bio, got, BIO_FLAGS_READ);
      });
      ::BIO_meth_set_write(made, [](BIO* bio, const char* from, int bytes) {
        BIO_clear_retry_flags(bio);
        return moved(bio, ::send(fd_of(bio), from, static_cast<std::size_t>(bytes), MSG_DONTWAIT | MSG_NOSIGNAL), BIO_FLAGS_WRITE);
      });
      ::BIO_meth_set_ctrl(made, [](BIO* bio, int what, long, void*) { return static_cast<long>(what == BIO_CTRL_FLUSH || (what == BIO_CTRL_EOF && ::BIO_test_flags(bio, BIO_FLAGS_IN_EOF))); });
      return made;
    }();
    return method;
  }
  static int fd_of(BIO* bio) { return static_cast<int>(reinterpret_cast<std::intptr_t>(::BIO_get_data(bio))); }
  static int moved(BIO* bio, ssize_t bytes, int direction) {
    if (bytes < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ENOTCONN || errno == EINPROGRESS)) ::BIO_set_flags(bio, direction | BIO_FLAGS_SHOULD_RETRY);
    return static_cast<int>(bytes);
  }
  /// As much as goes; an error that comes after some is for the next call.
  template <class F>
  ssize_t each(std::span<const iovec> parts, F&& move) {
    ssize_t moved = 0;
    for (const iovec& part : parts)
      for (std::size_t done = 0; done < part.iov_len && error_ == 0;) {
        ::ERR_clear_error();
        const int got = move(static_cast<std::byte*>(part.iov_base) + done, static_cast<int>(std::min<std::size_t>(part.iov_len - done, INT_MAX)));
        if (got <= 0) return is_over(got) && moved == 0 ? 0 : moved > 0 ? moved : -1;
        done += static_cast<std::size_t>(got);
        moved += got;
      }
    errno = error_;
    return moved > 0 || error_ == 0 ? moved : -1;
  }
  /// Whether the other side has closed; otherwise errno says what is wrong.
  bool is_over(int got) {
    const int saved = errno, kind = ::SSL_get_error(ssl_.get(), got);
    if (kind == SSL_ERROR_ZERO_RETURN) return true;
    if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) return errno = EAGAIN, false;
    if (kind == SSL_ERROR_SYSCALL && saved != 0) return errno = error_ = saved, false;
    problem_ = TlsContext::reason();
    if (const long why = ::SSL_get_verify_result(ssl_.get()); why != X509_V_OK) problem_ += concat({" (", ::X509_verify_cert_error_string(why), ")"});
    return errno = error_ = EPROTO, false;
  }

  static constexpr std::uint32_t most_records = 1 << 20;

  std::shared_ptr<const TlsContext> context_;
  std::unique_ptr<SSL, decltype(&::SSL_free)> ssl_;
  std::uint32_t records_ = 0;
  bool writing_waits_to_read_ = false;
  int error_ = 0;  // what the connection has broken with
  std::string problem_;
};

inline MakeCipher tls(const std::string& certificate, const std::string& key, const std::string& authority) {
  return [context = std::make_shared<const TlsContext>(certificate, key, authority)](int fd, bool is_let_in) { return std::make_unique<TlsCipher>(context, fd, is_let_in); };
}
inline MakeCipher tls_from_environment() {
  const auto certificate = environment("TALLY_TLS_CERTIFICATE"), key = environment("TALLY_TLS_KEY"), authority = environment("TALLY_TLS_AUTHORITY");
  if (!certificate && !key && !authority) return {};
  if (!certificate || !key || !authority) throw Error(Errc::invalid_argument, {"TLS needs TALLY_TLS_CERTIFICATE, TALLY_TLS_KEY and TALLY_TLS_AUTHORITY, and ", certificate ? key ? "the last" : "the second" : "the first", " is not set"});
  return tls(std::string(*certificate), std::string(*key), std::string(*authority));
}
inline const bool tls_is_there = (cipher_from_environment() = tls_from_environment, true);

}  // namespace tally::inline v0::detail
