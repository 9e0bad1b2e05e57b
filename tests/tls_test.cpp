// SPDX-License-Identifier: Apache-2.0
// TLS: everything that ranks do over TCP they do over it, too, and nobody takes part whose certificate the authority has not signed.
#include <catch2/catch.hpp>

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <tally/table_guest.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>
#include <tally/tls.hpp>

#include "network_suite.hpp"
#include "transport_conformance.hpp"

using namespace tally;
using namespace std::chrono_literals;
using test::caught, test::Caught, test::Job, test::on_ranks;

namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&::EVP_PKEY_free)>;
using Certificate = std::unique_ptr<X509, decltype(&::X509_free)>;

/// An authority, and what it has signed, in files of a folder of its own.
class Authority {
 public:
  explicit Authority(const std::string& name) : folder_(std::filesystem::temp_directory_path() / ("tally-tls-" + std::to_string(::getpid()) + "-" + name)), key_(make_key()), own_(sign(*key_, "authority " + name, 3600, nullptr)) {
    std::filesystem::create_directories(folder_);
    write(path("authority"), *own_);
    add("rank", 3600);
    add("old", -60);
  }
  ~Authority() { std::filesystem::remove_all(folder_); }
  std::string path(const std::string& what) const { return (folder_ / (what + ".pem")).string(); }
  std::string locked_key() const {
    FILE* const file = std::fopen(path("locked").c_str(), "we");
    REQUIRE(file);
    unsigned char word[] = "secret";
    ::PEM_write_PKCS8PrivateKey(file, key_.get(), ::EVP_aes_128_cbc(), reinterpret_cast<const char*>(word), 6, nullptr, nullptr);
    std::fclose(file);
    return path("locked");
  }
  /// What its ranks have; `as`: rank, or old for a certificate that has expired.
  detail::MakeCipher tls(const std::string& as = "rank") const { return detail::tls(path(as), path(as + "-key"), path("authority")); }

 private:
  static Key make_key() { return {::EVP_EC_gen("P-256"), &::EVP_PKEY_free}; }
  /// For itself, if there is no issuer.
  Certificate sign(EVP_PKEY& of, const std::string& name, long seconds, X509* issuer) const {
    Certificate made(::X509_new(), &::X509_free);
    ::X509_set_version(made.get(), 2);
    ::ASN1_INTEGER_set(::X509_get_serialNumber(made.get()), 1 + static_cast<long>(name.size()));
    ::X509_gmtime_adj(::X509_getm_notBefore(made.get()), -3600);
    ::X509_gmtime_adj(::X509_getm_notAfter(made.get()), seconds);
    ::X509_set_pubkey(made.get(), &of);
    ::X509_NAME_add_entry_by_txt(::X509_get_subject_name(made.get()), "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    ::X509_set_issuer_name(made.get(), ::X509_get_subject_name(issuer ? issuer : made.get()));
    X509_EXTENSION* const is_authority = ::X509V3_EXT_conf_nid(nullptr, nullptr, NID_basic_constraints, issuer ? "critical,CA:FALSE" : "critical,CA:TRUE");
    ::X509_add_ext(made.get(), is_authority, -1);
    ::X509_EXTENSION_free(is_authority);
    REQUIRE(::X509_sign(made.get(), key_.get(), ::EVP_sha256()) > 0);
    return made;
  }
  static void write(const std::string& path, X509& certificate) {
    FILE* const file = std::fopen(path.c_str(), "we");
    REQUIRE(file);
    ::PEM_write_X509(file, &certificate);
    std::fclose(file);
  }
  void add(const std::string& name, long seconds) {
    const Key key = make_key();
    write(path(name), *sign(*key, name, seconds, own_.get()));
    FILE* const file = std::fopen(path(name + "-key").c_str(), "we");
    REQUIRE(file);
    ::PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
    std::fclose(file);
  }

  std::filesystem::path folder_;
  Key key_;
  Certificate own_;
};

const Authority& authority() {
  static const Authority one("one");
  return one;
}
/// For all jobs of a test.
struct Encrypted {
  Encrypted() { test::Job::encrypt = authority().tls(); }
  ~Encrypted() { test::Job::encrypt = {}; }
};
/// What two ranks of a job say that have these.
std::array<Caught, 2> joined(const detail::MakeCipher& at_0, const detail::MakeCipher& at_1) {
  std::array<Caught, 2> results;
  auto listener = detail::listen_at(test::loopback(4));
  const SocketAddress address = detail::own_address(listener);
  detail::Join like;
  like.size = 2;
  detail::NetworkSettings settings(2s);
  settings.encrypt = at_0;
  detail::Registry registry(std::move(listener), like, settings);
  test::on_ranks(2, [&](Rank r) {
    results[static_cast<std::size_t>(r)] = caught([&] {
      detail::NetworkSettings mine(2s);
      mine.encrypt = r == 0 ? at_0 : at_1;
      detail::Join me = like;
      me.rank = r;
      detail::NetworkNode(test::at(address), me, mine);
    });
  });
  return results;
}

}  // namespace

TEST_CASE("TLS conforms") {
  const Encrypted encrypted;
  conformance::conformance<TcpTransport>([](int n, const SlotOptions& options, const auto& body) {
    const test::Job job(n);
    TcpOptions tcp;
    tcp.lanes = options.lanes;
    tcp.frame_bytes = options.slot_bytes;
    tcp.window = static_cast<std::size_t>(options.slots) * (options.slot_bytes + detail::frame_cost);
    test::on_ranks(n, [&](Rank r) {
      TcpTransport transport(job.join(r), TcpTransport::world, test::all(n), tcp);
      body(transport);
      transport.leave();
    });
  });
}
TEST_CASE("every algorithm is right over TLS with stripes, and what is under way by them can be ended") {
  const Encrypted encrypted;
  TcpOptions short_frames;
  short_frames.sockets = 3;
  short_frames.frame_bytes = 1000;
  short_frames.window = 5000;
  test::every_algorithm_is_right(detail::tcp_kind(short_frames), {2, 3});
  TcpOptions stripes;
  stripes.sockets = 4;
  test::faults_end_what_is_under_way(detail::tcp_kind(stripes));
}
TEST_CASE("every algorithm is right over TLS, whatever the sizes, in a wide window and a narrow one") {
  const Encrypted encrypted;
  TcpOptions narrow;
  narrow.window = 3000;
  narrow.frame_bytes = 1000;
  for (const TcpOptions& tcp : {TcpOptions{}, narrow}) test::every_algorithm_is_right(detail::tcp_kind(tcp));
}
TEST_CASE("groups, duplicates and operations in the background go over TLS, too") {
  const Encrypted encrypted;
  test::groups_are_right(detail::tcp_kind({}));
}
TEST_CASE("who comes late is blamed over TLS, and a report adds up to the nanosecond", "[quiet]") {
  const Encrypted encrypted;
  test::everyone(detail::tcp_kind({}), 3, test::late_ranks_are_blamed);
}
TEST_CASE("what was sent over TLS is there, however soon its sender goes") {
  const Encrypted encrypted;
  test::what_was_sent_is_there(detail::tcp_kind({}));
}
TEST_CASE("faults are named, and end what is under way, over TLS as over TCP") {
  const Encrypted encrypted;
  test::faults_are_named(detail::tcp_kind({}));
  test::faults_end_what_is_under_way(detail::tcp_kind({}));
  test::who_left_is_missed(detail::tcp_kind({}));
}
TEST_CASE("a short message over TLS needs nobody to look at it, and its sender no longer") {
  const Encrypted encrypted;
  test::short_messages_need_nobody(detail::tcp_kind({}));
  test::short_messages_need_no_sender(detail::tcp_kind({}));
}
TEST_CASE("a rank that is killed is missed over TLS", "[processes]") {
  const Encrypted encrypted;
  test::who_is_killed_is_missed(detail::tcp_kind({}));
}

TEST_CASE("who has no certificate of the job's authority does not take part") {
  const Authority other("other");
  for (const Caught& c : joined(authority().tls(), authority().tls())) {
    INFO(c);
    CHECK_FALSE((c.error || c.foreign));
  }
  const auto signed_by_another = joined(authority().tls(), other.tls());
  CHECK_THAT(signed_by_another[1].text, Catch::Contains("cannot be encrypted") && Catch::Contains("certificate verify failed"));
  CHECK_THAT(signed_by_another[0].text, Catch::Contains("1 of 2 ranks did not appear: 1"));
  // Its authority is the right one, but its certificate is not of it.
  const auto stranger = joined(authority().tls(), detail::tls(other.path("rank"), other.path("rank-key"), authority().path("authority")));
  CHECK_THAT(stranger[1].text, Catch::Contains("cannot be encrypted") && Catch::Contains("unknown ca"));
  CHECK_THAT(stranger[0].text, Catch::Contains("1 of 2 ranks did not appear: 1; connections that were turned away: 1") && Catch::Contains("it cannot be encrypted: "));
  const auto expired = joined(authority().tls(), authority().tls("old"));
  CHECK_THAT(expired[1].text, Catch::Contains("certificate expired"));
  // One of the two has none.
  const auto plain = joined(authority().tls(), {});
  CHECK(plain[0].is(Errc::timeout));
  CHECK(plain[1].is(Errc::timeout));
  CHECK_THAT(plain[1].text, Catch::Contains("did not speak as a job of tally") && Catch::Contains("TALLY_TLS_CERTIFICATE"));
  const auto alone = joined({}, authority().tls());
  CHECK_THAT(alone[1].text, Catch::Contains("wrong version number; rank 0 needs TALLY_TLS_CERTIFICATE, too"));
  CHECK_THAT(alone[0].text, Catch::Contains("it does not speak as a rank of this version of tally"));
}

namespace {

using Context = std::unique_ptr<SSL_CTX, decltype(&::SSL_CTX_free)>;
/// What a client that is none of tally's hears of a registry; empty if nothing.
std::string heard_by(const SocketAddress& address, SSL_CTX& context) {
  const detail::FileDescriptor fd = test::knock(address);
  const timeval limit{5, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::fcntl(fd.get(), F_SETFL, 0);
  const std::unique_ptr<SSL, decltype(&::SSL_free)> ssl(::SSL_new(&context), &::SSL_free);
  ::SSL_set_fd(ssl.get(), fd.get());
  char text[64];
  if (::SSL_connect(ssl.get()) != 1) return {};
  const int got = ::SSL_read(ssl.get(), text, sizeof text);
  return {text, static_cast<std::size_t>(std::max(got, 0))};
}

}  // namespace

TEST_CASE("who shows no certificate, or speaks an older TLS, hears nothing") {
  const Encrypted encrypted;
  const Job job(2);
  const auto client = [&](bool has_certificate, int version) {
    Context context(::SSL_CTX_new(::TLS_client_method()), &::SSL_CTX_free);
    ::SSL_CTX_set_max_proto_version(context.get(), version);
    if (has_certificate) {
      REQUIRE(::SSL_CTX_use_certificate_chain_file(context.get(), authority().path("rank").c_str()) == 1);
      REQUIRE(::SSL_CTX_use_PrivateKey_file(context.get(), authority().path("rank-key").c_str(), SSL_FILETYPE_PEM) == 1);
    }
    return context;
  };
  CHECK(heard_by(job.address, *client(true, TLS1_3_VERSION)).size() > 16);  // a challenge: it may be a rank
  CHECK(heard_by(job.address, *client(false, TLS1_3_VERSION)).empty());
  CHECK(heard_by(job.address, *client(true, TLS1_2_VERSION)).empty());
}

TEST_CASE("ranks are connected by TLS, too: who knows the job's key and speaks none is not let in") {
  const Encrypted encrypted;
  const Job job(2);
  std::vector<std::shared_ptr<detail::NetworkNode>> nodes(2);
  on_ranks(2, [&](Rank r) { nodes[static_cast<std::size_t>(r)] = job.join(r); });
  detail::ChannelHello hello;
  hello.communicator = TcpTransport::world;
  hello.from = 1;
  hello.to = 0;
  hello.key = nodes[0]->key();
  Rank to = -1;
  std::uint64_t window = 0;
  const auto is_let_in = [&] { return test::eventually(1s, [&] { return static_cast<bool>(nodes[0]->claim(TcpTransport::world, 0, 1, to, window)); }); };
  const detail::FileDescriptor plain = test::knock(nodes[0]->address(0));
  CHECK(::send(plain.get(), &hello, sizeof hello, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof hello));
  CHECK_FALSE(is_let_in());
  int error = 0;
  detail::Stream stream = nodes[1]->connect_to(0, error);
  CHECK(test::eventually(5s, [&] { return stream.write(&hello, sizeof hello) == static_cast<ssize_t>(sizeof hello); }));
  CHECK(is_let_in());
}

TEST_CASE("who waits in memory answers who comes by TLS") {
  const Encrypted encrypted;
  // Ranks 0 and 1 are on one host. Rank 0 waits for rank 1, which waits for rank 2, which has yet to reach rank 0.
  for (const Caught& c : test::outcomes({1, 1, 2}, test::Way::route, [](Communicator& comm) {
         int x = comm.rank(), y = -1;
         if (comm.rank() == 2) {
           comm.send(std::span<const int>(&x, 1), 0);
           comm.send(std::span<const int>(&x, 1), 1);
         } else if (comm.rank() == 1) {
           comm.receive(std::span(&y, 1), 2);
           comm.send(std::span<const int>(&y, 1), 0);
         } else {
           comm.receive(std::span(&x, 1), 1);
           comm.receive(std::span(&y, 1), 2);
           test::expect(x == 2, "what rank 1 passed on");
         }
         test::expect(comm.rank() == 2 || y == 2, "what rank 2 sent");
       })) {
    INFO(c);
    CHECK((c.ran && !c.error && !c.foreign));
  }
}

TEST_CASE("who is let in by a rank that goes at once is told so") {
  // Accepts and closes, as a rank that dies does, or what stands before one.
  const auto listener = detail::listen_at(test::loopback(4));
  int error = 0;
  detail::FileDescriptor fd = detail::begin_connect(detail::own_address(listener), error);
  REQUIRE(detail::wait_for_events(fd.get(), POLLOUT, std::chrono::steady_clock::now() + 5s));
  detail::NetworkSettings settings(1s);
  settings.encrypt = authority().tls();
  detail::Stream stream = settings.opened(std::move(fd));
  REQUIRE(detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s));
  detail::FileDescriptor accepted(::accept(listener.get(), nullptr, nullptr));
  char hello[600];
  REQUIRE(::recv(accepted.get(), hello, sizeof hello, 0) > 0);
  ::shutdown(accepted.get(), SHUT_WR);
  REQUIRE(detail::wait_for_events(stream.get(), POLLIN, std::chrono::steady_clock::now() + 5s));
  for (int tries = 0; tries < 3; ++tries) {
    CHECK(stream.write("x", 1) == -1);
    CHECK(errno == EPIPE);
  }
}

TEST_CASE("keys change before they are worn out, and nobody notices") {
  std::array<int, 2> ends{};
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends.data()) == 0);
  static int changes;
  changes = 0;
  const auto context = std::make_shared<const detail::TlsContext>(authority().path("rank"), authority().path("rank-key"), authority().path("authority"));
  ::SSL_CTX_set_msg_callback(context->handle(), [](int is_written, int, int type, const void* bytes, std::size_t count, SSL*, void*) {
    changes += is_written && type == SSL3_RT_HANDSHAKE && count > 0 && *static_cast<const unsigned char*>(bytes) == SSL3_MT_KEY_UPDATE;
  });
  detail::FileDescriptor here(ends[0]), there(ends[1]);
  detail::Stream from(std::move(here), std::make_unique<detail::TlsCipher>(context, ends[0], false)), to(std::move(there), std::make_unique<detail::TlsCipher>(context, ends[1], true));
  constexpr std::uint32_t many = (1 << 20) + 5000;
  std::uint32_t sent = 0, received = 0;
  std::array<unsigned char, 4096> bytes{};
  for (bool right = true; right && received < many;) {
    while (sent < many) {
      const auto byte = static_cast<unsigned char>(sent % 251);
      if (from.write(&byte, 1) != 1) break;
      ++sent;
    }
    for (ssize_t got; (got = to.read(bytes.data(), 1)) > 0;) right = right && bytes[0] == received++ % 251;
    right = right && from.problem().empty() && to.problem().empty();
  }
  CHECK(received == many);
  CHECK(changes == 1);
}

TEST_CASE("what goes over the wire is TLS from its first byte on") {
  const auto listener = detail::listen_at(test::loopback(4));
  std::thread rank([&] {
    detail::Join me;
    me.rank = 1;
    me.size = 2;
    detail::NetworkSettings settings(500ms);
    settings.encrypt = authority().tls();
    (void)caught([&] { detail::NetworkNode(test::at(detail::own_address(listener)), me, settings); });
  });
  REQUIRE(detail::wait_for_events(listener.get(), POLLIN, std::chrono::steady_clock::now() + 5s));
  const detail::FileDescriptor fd(::accept(listener.get(), nullptr, nullptr));
  std::array<unsigned char, 3> first{};
  CHECK(::recv(fd.get(), first.data(), first.size(), MSG_WAITALL) == 3);
  CHECK((first[0] == 22 && first[1] == 3));  // a handshake
  rank.join();
}

TEST_CASE("a table's door speaks TLS where the environment says so, and lets nobody in who does not") {
  const test::Environment certificate("TALLY_TLS_CERTIFICATE", authority().path("rank").c_str()), key("TALLY_TLS_KEY", authority().path("rank-key").c_str()), root("TALLY_TLS_AUTHORITY", authority().path("authority").c_str());
  launch(2, [](Communicator& comm) {
    ParameterServer<std::int64_t> ps(comm, {{"w", 300'000}}, {.consistency = asp, .door = "127.0.0.1:0", .guests = 1});
    if (comm.rank() == 0) {
      const std::vector<std::int64_t> ones(300'000, 1);
      std::vector<std::int64_t> values(300'000);
      TableWorker<std::int64_t> late(ps.doors()[1]);
      for (int i = 1; i <= 5; ++i) {
        late["w"].push_pull(ones, values);
        test::expect(values == std::vector<std::int64_t>(300'000, i), "all of it comes through");
      }
      TableReader<std::int64_t> reader(ps.doors()[0]);
      reader["w"].range(7, 1000).pull(std::span(values).first(1000));
      test::expect(values[0] == 5 && values[999] == 5, "readers, too");
      std::string description;
      std::size_t shard = 0;
      const Caught plain = caught([&] { detail::DoorStream(detail::resolve(ps.doors()[0]).front(), detail::NetworkSettings(2s), std::chrono::steady_clock::now() + 2s, description, shard); });
      test::expect(plain.error, "a stranger without TLS is not let in");
      late.close();
    }
    comm.barrier();
    ps.close();
  }, tally::threads);
}

TEST_CASE("files that are none, or do not belong together, are named") {
  const Authority other("another");
  const std::string rank = authority().path("rank"), key = authority().path("rank-key"), root = authority().path("authority");
  CHECK_THAT(caught([&] { detail::tls("/no/such/file", key, root); }).text, Catch::Contains("TLS cannot use the certificate in '/no/such/file'"));
  CHECK_THAT(caught([&] { detail::tls(rank, rank, root); }).text, Catch::Contains("TLS cannot use the key in '" + rank + "'"));
  CHECK_THAT(caught([&] { detail::tls(rank, other.path("rank-key"), root); }).text, Catch::Contains("key in '" + other.path("rank-key") + "'"));
  const std::string locked = authority().locked_key();  // OpenSSL would ask the terminal for its word
  CHECK_THAT(caught([&] { detail::tls(rank, locked, root); }).text, Catch::Contains("TLS cannot use the key in '" + locked + "'"));
  CHECK_THAT(caught([&] { detail::tls(rank, key, key); }).text, Catch::Contains("authority's certificate in '" + key + "'"));
  ::setenv("TALLY_TLS_KEY", key.c_str(), 1);
  CHECK_THAT(caught([] { detail::tls_from_environment(); }).text, Catch::Contains("the first is not set"));
  ::setenv("TALLY_TLS_CERTIFICATE", rank.c_str(), 1);
  CHECK_THAT(caught([] { detail::tls_from_environment(); }).text, Catch::Contains("the last is not set"));
  ::setenv("TALLY_TLS_AUTHORITY", root.c_str(), 1);
  CHECK(detail::tls_from_environment());
  CHECK(detail::cipher_of_job());
  for (const char* name : {"TALLY_TLS_CERTIFICATE", "TALLY_TLS_KEY", "TALLY_TLS_AUTHORITY"}) ::unsetenv(name);
  CHECK_FALSE(detail::cipher_of_job());
}
