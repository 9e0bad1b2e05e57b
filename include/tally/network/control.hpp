// SPDX-License-Identifier: Apache-2.0
// What ranks of a job tell each other beside the data, over one connection of each to the job's registry: who they are, where
// they listen, what they are in, that they leave or give up. Records with a length, read here and nowhere else.
#pragma once

#include <sys/random.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../clock.hpp"
#include "../environment.hpp"
#include "frame.hpp"
#include "hmac.hpp"
#include "socket.hpp"
#include "stream.hpp"

namespace tally::inline v0::detail {

/// earlier: this registry is of the job before the one that who joins is of; a goodbye follows once that has ended.
enum class ControlKind : std::uint32_t { join = 1, welcome, refusal, status, ask, told, goodbye, abort, dead, clock, challenge, gone, offer, want, offered, earlier };

struct ControlHeader {
  std::uint32_t bytes = 0;  // that follow
  ControlKind kind{};
};
using Nonce = std::array<std::uint8_t, 16>;

/// The first record of the registry's, to who connects.
struct Challenge {
  std::uint64_t magic = 0x6c616863796c6c61ull;  // "allychal"
  std::uint32_t protocol = network_protocol;
  std::uint32_t secured = 0;  // only who knows the secret may join
  Nonce nonce{};
};
/// The first record of each rank. Its magic is the first that anybody reads, so a stranger's bytes are known at once.
struct Join {
  std::uint64_t magic = 0x6e696f6a796c6c61ull;  // "allyjoin"
  std::uint32_t protocol = network_protocol;
  std::int32_t rank = -1, size = 0;
  std::uint32_t accounting = 0;
  std::uint64_t job = 0;  // a hash of its name
  std::uint64_t settings = 0;  // a hash of what must be the same everywhere
  std::uint64_t boot = 0;  // a hash of the host's boot id: the same where clocks are
  std::uint64_t place = 0;  // the same for ranks that can share memory
  SocketAddress listens;  // family 0: at the address that it connects from
  Nonce nonce{};
  Digest proof{};  // of the secret; see proof_of
};
inline std::string_view nonce_text(const Nonce& nonce) { return {reinterpret_cast<const char*>(nonce.data()), nonce.size()}; }
inline Nonce random_nonce() {
  Nonce nonce;
  for (std::size_t have = 0; have < nonce.size();) {
    const ssize_t got = ::getrandom(nonce.data() + have, nonce.size() - have, 0);
    if (got < 0 && errno != EINTR) throw Error(Errc::no_resources, {"no random numbers: ", errno_text(errno)});
    if (got > 0) have += static_cast<std::size_t>(got);
  }
  return nonce;
}
/// That who says `what` knows the secret, and says it in answer to that nonce; nothing where there is none.
inline Digest proof_of(std::string_view secret, std::string_view role, const Nonce& nonce, std::string_view what) {
  return secret.empty() ? Digest{} : hmac(secret, concat({role, nonce_text(nonce), what}));
}

/// TLS, where the environment asks for it.
inline MakeCipher cipher_of_job() {
  if (const auto make = cipher_from_environment()) return make();
  for (const char* name : {"TALLY_TLS_CERTIFICATE", "TALLY_TLS_KEY", "TALLY_TLS_AUTHORITY"})
    if (environment(name)) throw Error(Errc::unsupported, {name, " is set, but this program was built without tally/tls.hpp, and nothing would be encrypted"});
  return {};
}

/// How to join a job, or to be its registry.
struct NetworkSettings {
  template <class R, class P>
  NetworkSettings(std::chrono::duration<R, P> limit, std::string known = {}, const Clock& of_host = Clock::host()) : timeout(limit), secret(std::move(known)), clock(of_host) {}  // NOLINT: often that is all
  nanoseconds timeout;
  std::string secret;  // that all ranks know and strangers do not; empty: anybody may join
  Clock clock;
  MakeCipher encrypt;  // empty: connections are as they are

  /// With the secret and the TLS that the environment asks for.
  [[gnu::cold]] static NetworkSettings from_environment(nanoseconds limit, const Clock& of_host = Clock::host()) {
    NetworkSettings settings(limit, std::string(environment("TALLY_SECRET").value_or("")), of_host);
    settings.encrypt = cipher_of_job();
    return settings;
  }

  Stream opened(FileDescriptor fd) const { return stream(std::move(fd), false); }
  Stream let_in(FileDescriptor fd) const { return stream(std::move(fd), true); }

 private:
  Stream stream(FileDescriptor fd, bool is_let_in) const {
    auto cipher = encrypt ? encrypt(fd.get(), is_let_in) : nullptr;
    return Stream(std::move(fd), std::move(cipher));
  }
};
/// A question after the clock of rank 0's host, and the answer.
struct ClockAnswer {
  std::uint64_t asked = 0, there = 0;
  double ticks_per_second = 0;  // there
};
/// Of each rank, to all.
struct RankEntry {
  SocketAddress listens;
  std::uint64_t boot = 0, place = 0;
};
struct CommunicatorStatus {
  std::uint64_t communicator = 0;
  std::int32_t rank = -1;  // in the job
  std::uint32_t inside = 0;
  std::uint64_t sequence = 0, fingerprint = 0, count = 0;
};
/// What the registry knows of a rank in a communicator.
struct Told {
  static constexpr std::uint32_t said = 1, gone = 2;  // gone: with all there was; the registry has not said what it had opened
  CommunicatorStatus status;
  std::uint32_t left = 0;
  std::uint32_t opened = 0;  // channels to who asks
};
struct Notice {  // a text follows
  std::uint64_t communicator = 0;
  std::int32_t rank = -1, peer = -1;
  std::uint32_t code = 0, unused = 0;
};
struct Goodbye {  // an Opened for each rank that it opened channels to follows
  std::uint64_t communicator = 0;  // 0: the rank ends, having left all of them
  std::int32_t size = 0;
  std::uint32_t unused = 0;
};
struct Opened {
  std::int32_t to = -1;  // in the job
  std::uint32_t channels = 0;
};
/// Where a rank's part of a communicator is to be reached, by a network that has addresses of its own: those follow. Offered to the
/// registry, wanted from it, and offered by it to who wanted.
struct Offer {
  std::uint64_t communicator = 0;
  std::int32_t rank = -1;  // in the job
  std::uint32_t unused = 0;
  static constexpr std::size_t longest = 16384;
};

/// A stream of control records: parts in, whole records out. Never blocks; false once the other side is gone or talks nonsense.
class ControlStream {
 public:
  static constexpr std::size_t longest = std::size_t{4} << 20;  // a table of the largest job fits; who is not in it yet gets far less
  explicit ControlStream(Stream stream = Stream(), std::size_t most = longest) : stream_(std::move(stream)), most_(most), in_(4096) {}
  explicit operator bool() const { return static_cast<bool>(stream_); }
  int fd() const { return stream_.get(); }
  const FileDescriptor& descriptor() const { return stream_.descriptor(); }
  /// To wait for with poll(2).
  short events() const { return static_cast<short>(POLLIN | (has_more() && !stream_.waits_to_read() ? POLLOUT : 0)); }
  std::string problem() const { return stream_.problem(); }
  void trust() { most_ = longest; }

  /// Reads what is there and calls handle(kind, bytes) for each record that is complete.
  template <class F>
  bool read(F&& handle) {
    for (;;) {
      while (in_.size() >= sizeof(ControlHeader)) {
        ControlHeader header;
        std::memcpy(&header, in_.data(), sizeof header);
        if (header.bytes > most_) return false;
        if (in_.size() < sizeof header + header.bytes) {
          in_.grow(sizeof header + header.bytes);
          break;
        }
        in_.take(sizeof header);
        const std::string_view record(reinterpret_cast<const char*>(in_.data()), header.bytes);
        const bool fine = handle(header.kind, record);
        in_.take(header.bytes);
        if (!fine) return false;
      }
      if (in_.empty()) in_.take(0);
      std::byte* const to = in_.space(in_.room());
      const ssize_t got = stream_.read(to, in_.space_left());
      if (got > 0) in_.added(static_cast<std::size_t>(got)), is_silent_ = false;
      else if (got < 0 && errno == EINTR) continue;
      else return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
  }
  /// Queues a record; write() sends what it can.
  void put(ControlKind kind, std::string_view record) {
    const ControlHeader header{static_cast<std::uint32_t>(record.size()), kind};
    out_.append(reinterpret_cast<const char*>(&header), sizeof header);
    out_.append(record);
  }
  template <class T>
    requires std::is_trivially_copyable_v<T> && std::is_class_v<T> && (!std::convertible_to<T, std::string_view>)
  void put(ControlKind kind, const T& record) {
    put(kind, as_bytes(record));
  }
  bool write() {
    while (!out_.empty()) {
      const ssize_t sent = stream_.write(out_.data(), out_.size());
      if (sent > 0) out_.erase(0, static_cast<std::size_t>(sent));
      else if (errno != EINTR) return errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOTCONN || errno == EINPROGRESS;
    }
    return true;
  }
  /// The other side has not said a word.
  bool is_silent() const { return is_silent_; }
  bool has_more() const { return !out_.empty(); }
  std::size_t waiting() const { return out_.size(); }

  template <class T>
  static std::string_view as_bytes(const T& value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
  }
  /// The front of a record as a T; false if it is shorter.
  template <class T>
  static bool take(std::string_view& record, T& value) {
    if (record.size() < sizeof value) return false;
    std::memcpy(&value, record.data(), sizeof value);
    record.remove_prefix(sizeof value);
    return true;
  }

 private:
  Stream stream_;
  std::size_t most_;
  StreamBuffer in_;
  std::string out_;
  bool is_silent_ = true;
};

}  // namespace tally::inline v0::detail
