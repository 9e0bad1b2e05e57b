// SPDX-License-Identifier: Apache-2.0
// A rank's place in the network, shared by all its communicators: it listens, knows where the others do, opens and accepts
// the connections between them, and hears of the others through the registry. Any thread may call; nothing waits for a peer
// but joining.
#pragma once

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../clock.hpp"
#include "../quiet_thread.hpp"
#include "../types.hpp"
#include "clock_map.hpp"
#include "control.hpp"

namespace tally::inline v0::detail {

/// What is known of a communicator's other ranks. Ranks are the communicator's.
class NetworkGroup {
 public:
  NetworkGroup(std::uint64_t of, std::vector<Rank> ranks) : communicator(of), members(std::move(ranks)), told(members.size()), offers(members.size()) {
    if (!bell_) throw Error(Errc::no_resources, {"no descriptor to be woken by: ", errno_text(errno)});
  }
  const std::uint64_t communicator;
  const std::vector<Rank> members;  // the job's ranks
  std::atomic<bool> aborted{false};

  /// For who sleeps: readable once something came for this communicator that another thread may have fetched, or somebody rang.
  int bell() const { return bell_.get(); }
  void ring() const {
    const std::uint64_t one = 1;
    (void)!::write(bell_.get(), &one, sizeof one);
  }
  void answer() const {
    std::uint64_t rung = 0;
    (void)!::read(bell_.get(), &rung, sizeof rung);
  }

  // Under the node's lock.
  std::vector<Told> told;
  std::vector<std::string> offers;  // what others offered of what this rank wanted
  bool asking = false;  // the answer is on its way
  AbortNotice notice;
  bool notice_is_first = false;

 private:
  FileDescriptor bell_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
};

class NetworkNode {
 public:
  using Instant = std::chrono::steady_clock::time_point;

  /// Where the registry may be reached, asked for until it is.
  struct Place {
    std::vector<SocketAddress> addresses;
    std::uint64_t nonce = 0;    // changes the job's number
    bool may_be_stale = false;  // somebody else may listen there by now
    bool is_here_only = false;  // nobody of another host is in the job
  };
  using FindRegistry = std::function<Place()>;

  /// Joins a job; me.listens says where this rank is to listen (family 0: where it reaches the registry from, and anywhere on the
  /// registry's own host). Waits until all are there. Throws what the registry says, or Errc::timeout.
  NetworkNode(const FindRegistry& find, const Join& me, const NetworkSettings& settings) : settings_(settings), clock_(settings.clock), me_(me.rank), size_(me.size), peer_limit_(std::chrono::duration_cast<std::chrono::milliseconds>(settings.timeout)) {
    const nanoseconds timeout = settings.timeout;
    const Instant deadline = std::chrono::steady_clock::now() + timeout;
    dead_.resize(static_cast<std::size_t>(size_));
    gone_.resize(dead_.size());
    reach(find, me, deadline, timeout);
    const Instant patience_ends = deadline + std::chrono::seconds(1);  // the registry knows better who is missing
    for (std::size_t tries = 0; entries_.empty() || (is_elsewhere(0) && !map_.is_settled());) {
      const bool whole = link_.write();
      if (whole && !wait_for_events(link_.fd(), link_.events(), challenge_ && !is_early_ ? patience_ends : deadline))
        throw Error(Errc::timeout, {"rank ", me_, is_early_ ? " waited at " + registry_.text() + " for the job before to end, which it did not within " : challenge_ ? " joined the job, but not all others did within " : " reached what listens at " + registry_.text() + ", but that did not speak as a job of tally within ", timeout.count() / 1'000'000, " ms", challenge_ || settings_.encrypt ? "" : "; if rank 0 has TALLY_TLS_CERTIFICATE, this rank needs it, too"}, {me_, -1, 0, {}});
      // A registry that is gone may have said all before.
      if (!link_.read([&](ControlKind kind, std::string_view record) { return welcome(kind, record); }) || !whole) {
        const bool has_ended = is_early_ && registry_left_;
        if (const std::string problem = link_.problem(); !problem.empty() && entries_.empty()) throw Error(Errc::protocol, {"the connection to the job's registry, at ", registry_.text(), ", cannot be encrypted: ", problem, problem.ends_with("wrong version number") ? "; rank 0 needs TALLY_TLS_CERTIFICATE, too" : ""}, {me_, 0, 0, {}});
        if (entries_.empty() && (has_ended || (!challenge_ && link_.is_silent()))) {  // an earlier job's that ends, or a rank 0 that is started again
          wait_to_try_again(tries++, deadline, timeout, has_ended ? "the job before has ended there" : "it was closed before a word was said");
          reach(find, me, deadline, timeout);
          continue;
        }
        if (entries_.empty() && !challenge_) throw Error(Errc::protocol, {"what listens at ", registry_.text(), " is no job of this version of tally: check the address, and that all ranks were built with the same"}, {me_, 0, 0, {}});
        if (entries_.empty()) throw Error(Errc::peer_lost, "the job's registry, at rank 0, went away while it waited for the others", {me_, 0, 0, {}});
        registry_gone_ = true;
        break;
      }
    }
    if (settings_.encrypt) letting_in_ = quiet_thread([this] { let_in(); });
  }
  ~NetworkNode() {
    if (::getpid() != process_) {
      if (letting_in_.joinable()) letting_in_.detach();  // a child that this rank forked has no such thread
      return;
    }
    if (letting_in_.joinable()) {
      (void)::eventfd_write(stop_.get(), 1);
      letting_in_.join();
    }
    link_.put(ControlKind::goodbye, Goodbye{});
    // The connection outlives the process until this is there.
    link_.write();
  }
  NetworkNode(const NetworkNode&) = delete;

  Rank rank() const { return me_; }
  int size() const { return size_; }
  const JobKey& key() const { return key_; }
  /// What rank 0 has for all.
  const std::string& note() const { return note_; }
  const SocketAddress& address(Rank r) const { return entries_[static_cast<std::size_t>(r)].listens; }
  /// Whether it is on another host than this one, so that its clock is another one.
  bool is_elsewhere(Rank r) const { return entries_[static_cast<std::size_t>(r)].boot != entries_[static_cast<std::size_t>(me_)].boot; }
  /// The same for ranks that can share memory.
  std::uint64_t place(Rank r) const { return entries_[static_cast<std::size_t>(r)].place; }
  /// How this host's clock goes with that of rank 0's host, as known now.
  ClockMap clock_map() {
    const std::lock_guard lock(mutex_);
    return map_;
  }
  /// For so long a peer's kernel may say nothing.
  std::chrono::milliseconds patience_with_peers() const { return std::clamp(peer_limit_, std::chrono::milliseconds(1000), std::chrono::milliseconds(30'000)); }
  /// For who sleeps: an epoll descriptor, readable when somebody connects, or the registry says something; then attend().
  int door() const { return door_.get(); }

  std::uint64_t new_communicator() {
    const std::lock_guard lock(mutex_);
    return (static_cast<std::uint64_t>(me_) + 1) << 40 | ++communicators_;
  }
  std::shared_ptr<NetworkGroup> join(std::uint64_t communicator, std::vector<Rank> members) {
    const std::lock_guard lock(mutex_);
    auto group = std::make_shared<NetworkGroup>(communicator, std::move(members));
    groups_[communicator] = group;
    left_.erase(communicator);
    if (const auto early = early_aborts_.find(communicator); early != early_aborts_.end()) {
      take_notice(*group, early->second);
      early_aborts_.erase(early);
    }
    return group;
  }

  Stream connect_to(Rank r, int& error) {
    FileDescriptor fd = begin_connect(address(r), error);
    if (error == 0) tune(fd, peer_limit_);
    return settings_.opened(std::move(fd));
  }
  /// The connection that rank `from` of a communicator has opened, if it has; its window.
  Stream claim(std::uint64_t communicator, int lane, Rank from, Rank& to, std::uint64_t& window) {
    const std::lock_guard lock(mutex_);
    accept();
    const auto found = arrived_.find({communicator, lane, from});
    if (found == arrived_.end()) return Stream();
    Arrived arrived = std::move(found->second);
    arrived_.erase(found);
    to = arrived.to;
    window = arrived.window;
    return std::move(arrived.stream);
  }

  // Slow matters: a rank that waits for long asks and says what it is in.
  void publish(const NetworkGroup& group, const RankStatus& status) {
    const std::lock_guard lock(mutex_);
    link_.put(ControlKind::status, CommunicatorStatus{group.communicator, me_, status.inside, status.sequence, status.fingerprint, status.count});
    exchange();
  }
  /// One question at a time: a registry that does not answer is not buried in them.
  void ask(NetworkGroup& group) {
    const std::lock_guard lock(mutex_);
    if (!std::exchange(group.asking, true)) link_.put(ControlKind::ask, ControlStream::as_bytes(group.communicator));
    exchange();
  }
  /// Where this rank is to be reached in this communicator; where r is, once it said so: empty until then.
  void offer(const NetworkGroup& group, std::string_view address) {
    if (address.size() > Offer::longest) throw Error(Errc::no_resources, {"this host is reached in so many ways that saying so takes ", address.size(), " bytes, where ", Offer::longest, " are the most: choose fewer devices"}, {me_, -1, 0, {}});
    const std::lock_guard lock(mutex_);
    link_.put(ControlKind::offer, std::string(ControlStream::as_bytes(Offer{group.communicator, me_, 0})).append(address));
    exchange();
  }
  void want(const NetworkGroup& group, Rank r) {
    const std::lock_guard lock(mutex_);
    link_.put(ControlKind::want, Offer{group.communicator, group.members[static_cast<std::size_t>(r)], 0});
    exchange();
  }
  std::string offered(const NetworkGroup& group, Rank r) {
    const std::lock_guard lock(mutex_);
    exchange();
    return group.offers[static_cast<std::size_t>(r)];
  }
  /// Hears what is there; does nothing while another thread does, which rings for whom it concerns.
  void hear() {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) exchange();
  }
  /// The same, and lets in who has come: the door's events are over then.
  void attend() {
    const std::lock_guard lock(mutex_);
    accept();
    exchange();
  }
  Told told(const NetworkGroup& group, Rank r) {
    const std::lock_guard lock(mutex_);
    Told told = group.told[static_cast<std::size_t>(r)];
    const Rank member = group.members[static_cast<std::size_t>(r)];
    if (gone_[static_cast<std::size_t>(member)] || (registry_left_ && member == 0)) told.left = told.left ? told.left : Told::gone;
    return told;
  }
  bool is_dead(Rank r) {
    const std::lock_guard lock(mutex_);
    return dead_[static_cast<std::size_t>(r)] || (r == 0 && registry_gone_ && !registry_left_);
  }
  bool registry_is_gone() {
    const std::lock_guard lock(mutex_);
    return registry_gone_;
  }

  void abort(NetworkGroup& group, const AbortNotice& notice) {
    const std::lock_guard lock(mutex_);
    if (!group.aborted.exchange(true)) group.notice = notice;
    Notice header;
    header.communicator = group.communicator;
    header.code = static_cast<std::uint32_t>(notice.code);
    header.rank = notice.rank;
    header.peer = notice.peer;
    link_.put(ControlKind::abort, std::string(ControlStream::as_bytes(header)) + notice.text.substr(0, longest_text));
    exchange();
  }
  /// The first one of all ranks', as the registry says; this rank's own where that does not answer.
  AbortNotice notice(const NetworkGroup& group) {
    for (int tries = 0;; ++tries) {
      {
        const std::lock_guard lock(mutex_);
        exchange();
        if (group.notice_is_first || registry_gone_ || tries == 300) return group.notice;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  void leave(const NetworkGroup& group, const std::vector<Opened>& opened) {
    const std::lock_guard lock(mutex_);
    groups_.erase(group.communicator);
    left_.insert(group.communicator);
    early_aborts_.erase(group.communicator);
    std::erase_if(arrived_, [&](const auto& each) { return std::get<0>(each.first) == group.communicator; });
    Goodbye goodbye;
    goodbye.communicator = group.communicator;
    goodbye.size = static_cast<std::int32_t>(group.members.size());
    std::string record(ControlStream::as_bytes(goodbye));
    for (const Opened& each : opened) record += ControlStream::as_bytes(each);
    link_.put(ControlKind::goodbye, record);
    exchange();
  }

 private:
  struct Stranger {
    Stream stream;
    Instant since;
    std::size_t have = 0;
    ChannelHello hello;
    bool is_last = false;  // no descriptor is left beside its own
  };
  struct Arrived {
    Stream stream;
    Rank to = -1;
    std::uint64_t window = 0;
  };
  static constexpr std::size_t longest_text = 8192, most_unclaimed = 1 << 16;
  static constexpr auto patience = std::chrono::seconds(10);

  /// Connects to the registry, and gets ready to join. Called again it begins anew: it may be another one, at another place.
  void reach(const FindRegistry& find, Join me, Instant deadline, nanoseconds timeout) {
    is_early_ = registry_left_ = false;
    map_ = ClockMap();
    const Place place = connect(find, deadline, timeout);
    me.job ^= place.nonce;
    SocketAddress here = me.listens.is_valid() ? me.listens : own_address(link_.descriptor());
    here.port = me.listens.port;
    const bool anywhere = !me.listens.is_valid() && !place.is_here_only && (here.is_loopback() || here.same_host_as(registry_));
    listener_ = FileDescriptor();  // its port may be wanted again
    listener_ = anywhere ? listen_anywhere(here.port) : listen_at(here);
    me.listens.port = own_address(listener_).port;
    me.nonce = random_nonce();
    claim_ = me;
    if (challenge_) answer_challenge();
    look_out_for(listener_.get());
    look_out_for(link_.fd());
  }
  Place connect(const FindRegistry& find, Instant deadline, nanoseconds timeout) {
    std::string problem = "nobody says where it is";
    Place place;
    for (std::size_t i = 0, next = 0;; ++i) {
      if (next == place.addresses.size()) {
        next = 0;
        place = {};
        try {
          place = find();
        } catch (const Error& error) {  // a host that is starting has no name yet
          problem = error.what();
        }
      }
      if (!place.addresses.empty()) {
        registry_ = place.addresses[next++];
        int error = 0;
        FileDescriptor fd = begin_connect(registry_, error);
        if (error == 0 && wait_for_events(fd.get(), POLLOUT, std::min(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(3)))) {
          error = error_of(fd);
          // A port of this host that nobody listens at may connect to itself.
          if (error == 0 && own_address(fd) != registry_) {
            // Who connects as a listener closes may be connected to nobody, which Linux tells only who sends something: soon, then.
            tune(fd, std::chrono::seconds(4));
            link_ = ControlStream(settings_.opened(std::move(fd)));
            challenge_.reset();
            if (!place.may_be_stale || is_challenged(std::min(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(3)))) return place;
            problem = link_.problem().empty() ? "what listens there now is no job of tally" : "its connection cannot be encrypted: " + link_.problem();
          }
        } else if (error == 0) {
          error = ETIMEDOUT;
        }
        if (error != 0) problem = errno_text(error);
      }
      wait_to_try_again(i, deadline, timeout, problem);
    }
  }
  void wait_to_try_again(std::size_t tries, Instant deadline, nanoseconds timeout, std::string_view problem) const {
    if (std::chrono::steady_clock::now() >= deadline)
      throw Error(Errc::timeout, {"rank ", me_, " cannot reach the job's registry", registry_.is_valid() ? " at " + registry_.text() : "", " within ", timeout.count() / 1'000'000, " ms: ", problem, "; is rank 0 running there, and nothing between that drops connections?"}, {me_, 0, 0, {}});
    std::this_thread::sleep_for(std::chrono::milliseconds(tries < 20 ? 5 : 50));
  }
  bool welcome(ControlKind kind, std::string_view record) {
    if (kind == ControlKind::refusal) {
      Notice notice;
      if (!ControlStream::take(record, notice)) return false;
      throw Error(static_cast<Errc>(notice.code), record, {me_, -1, 0, {}});
    }
    if (kind == ControlKind::challenge) {
      if (!take_challenge(record)) return false;
      answer_challenge();
      return true;
    }
    // Without a proof, as a refusal: it makes this rank come again, and no more.
    if (kind == ControlKind::earlier) return is_early_ = entries_.empty();
    // Nobody who has not shown that it is the registry says anything else.
    if (kind != ControlKind::welcome) return (kind == ControlKind::clock || (kind == ControlKind::goodbye && is_early_) || !entries_.empty()) && heard(kind, record);
    if (!entries_.empty()) return false;
    Digest proof;
    if (!ControlStream::take(record, proof)) return false;
    if (!same(proof, proof_of(settings_.secret, "welcome", claim_.nonce, record))) throw Error(Errc::protocol, {"what listens at ", registry_.text(), " does not know this job's secret"}, {me_, 0, 0, {}});
    if (!ControlStream::take(record, key_) || record.size() < static_cast<std::size_t>(size_) * sizeof(RankEntry)) return false;
    entries_.resize(static_cast<std::size_t>(size_));
    for (RankEntry& each : entries_) (void)ControlStream::take(record, each);
    note_ = record;
    if (!is_elsewhere(0)) map_ = ClockMap();  // there is but one clock
    for (const RankEntry& each : entries_)
      if (!each.listens.is_valid()) throw Error(Errc::protocol, "the job's registry names an address that is none", {me_, 0, 0, {}});
    return true;
  }

  bool take_challenge(std::string_view record) {
    Challenge challenge;
    if (challenge_ || !ControlStream::take(record, challenge) || challenge.magic != Challenge{}.magic) return false;
    challenge_ = challenge;
    tune(link_.descriptor(), std::chrono::seconds(30));
    return true;
  }
  void answer_challenge() {
    if (settings_.secret.empty() != !challenge_->secured)
      throw Error(Errc::invalid_argument, {settings_.secret.empty() ? "rank 0 asks for a secret, and this rank has none" : "this rank has a secret, and rank 0 has none", ": TALLY_SECRET must be the same for all ranks"}, {me_, 0, 0, {}});
    claim_.proof = proof_of(settings_.secret, "join", challenge_->nonce, ControlStream::as_bytes(claim_));
    link_.put(ControlKind::join, claim_);
    ask_for_time();
  }
  /// Whether what was reached speaks as a registry does.
  bool is_challenged(Instant until) {
    bool fine = true;
    while (fine && !challenge_ && wait_for_events(link_.fd(), POLLIN, until)) fine = link_.read([&](ControlKind kind, std::string_view record) { return kind == ControlKind::challenge && take_challenge(record); });
    return fine && challenge_;
  }

  void look_out_for(int fd) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    if (::epoll_ctl(door_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw Error(Errc::no_resources, {"cannot wait for connections: ", errno_text(errno)}, {me_, -1, 0, {}});
  }
  void ask_for_time() {
    asked_ = asked_at_ = clock_.now();
    link_.put(ControlKind::clock, ClockAnswer{asked_, 0, 0});
    (void)link_.write();
  }
  /// Sends and hears. After the registry is gone ranks know of each other only by their connections.
  void exchange() {
    if (registry_gone_) return;
    if (!entries_.empty() && is_elsewhere(0) && clock_.now() - asked_at_ > clock_.to_ticks(std::chrono::seconds(1))) ask_for_time();
    const bool whole = link_.write();
    if (!link_.read([&](ControlKind kind, std::string_view record) { return heard(kind, record); }) || !whole) registry_gone_ = true;
  }
  bool heard(ControlKind kind, std::string_view record) {
    if (kind == ControlKind::goodbye) return registry_left_ = true;
    if (kind == ControlKind::clock) {
      ClockAnswer answer;
      if (!ControlStream::take(record, answer) || !(answer.ticks_per_second > 1e3 && answer.ticks_per_second < 1e12)) return false;
      const Ticks now = clock_.now();
      const bool is_other = entries_.empty() || is_elsewhere(0);
      if (answer.asked == asked_ && is_other) map_.learn(answer.asked, answer.there, now, answer.ticks_per_second / static_cast<double>(clock_.to_ticks(std::chrono::seconds(1))), static_cast<Ticks>(answer.ticks_per_second * 1e-6));
      asked_ = 0;
      if (is_other && !map_.is_settled()) ask_for_time();
      return true;
    }
    if (kind == ControlKind::dead) {
      std::int32_t rank = -1;
      if (!ControlStream::take(record, rank) || rank < 0 || rank >= size_) return false;
      dead_[static_cast<std::size_t>(rank)] = true;
      return true;
    }
    if (kind == ControlKind::gone) {
      std::int32_t rank = -1;
      if (!ControlStream::take(record, rank) || rank < 0 || rank >= size_) return false;
      gone_[static_cast<std::size_t>(rank)] = true;
      return true;
    }
    if (kind == ControlKind::abort) {
      Notice header;
      if (!ControlStream::take(record, header)) return false;
      const AbortNotice notice{static_cast<Errc>(header.code), header.rank, header.peer, std::string(record)};
      if (const auto found = groups_.find(header.communicator); found != groups_.end()) {
        if (const auto group = found->second.lock()) take_notice(*group, notice);
      } else if (early_aborts_.size() < 1024 && !left_.contains(header.communicator)) {
        early_aborts_[header.communicator] = notice;  // of a communicator that this rank has yet to open
      }
      return true;
    }
    if (kind == ControlKind::offered) {
      Offer offer;
      if (!ControlStream::take(record, offer)) return false;
      const auto found = groups_.find(offer.communicator);
      if (const auto group = found == groups_.end() ? nullptr : found->second.lock()) {
        for (std::size_t r = 0; r < group->members.size(); ++r)
          if (group->members[r] == offer.rank) group->offers[r] = record;
        group->ring();
      }
      return true;
    }
    if (kind != ControlKind::told) return false;
    std::uint64_t communicator = 0;
    if (!ControlStream::take(record, communicator)) return false;
    const auto found = groups_.find(communicator);
    const auto group = found == groups_.end() ? nullptr : found->second.lock();
    if (!group) return true;
    group->asking = false;
    for (Told told; ControlStream::take(record, told);)
      for (std::size_t r = 0; r < group->members.size(); ++r)
        if (group->members[r] == told.status.rank) group->told[r] = told;
    return true;
  }
  static void take_notice(NetworkGroup& group, const AbortNotice& notice) {
    group.notice = notice;
    group.notice_is_first = true;
    group.aborted.store(true);
    group.ring();
  }

  /// Who is let in to an encrypted connection has to be answered first, which must not wait for a rank that computes, or that sleeps for
  /// something else: a thread does it.
  void let_in() {
    for (std::array<pollfd, 2> events{{{stop_.get(), POLLIN, 0}, {door_.get(), POLLIN, 0}}}; events[0].revents == 0;) {
      if (::poll(events.data(), events.size(), 1000) < 0) continue;
      const std::lock_guard lock(mutex_);
      try {
        accept();
        exchange();
      } catch (const std::exception&) {  // what the rank itself finds when it looks
      }
      if (events[1].revents == 0) continue;
      for (const auto& [communicator, each] : groups_)  // the event was for who sleeps, too
        if (const auto group = each.lock()) group->ring();
    }
  }
  /// Lets in who knows the job's key, and drops who does not or takes too long to say.
  void accept() {
    const Instant now = std::chrono::steady_clock::now();
    std::array<epoll_event, 64> seen;
    (void)::epoll_wait(door_.get(), seen.data(), static_cast<int>(seen.size()), 0);  // so that what comes next is seen as new
    for (int i = 0; i < 64; ++i) {
      if (pollfd knock{listener_.get(), POLLIN, 0}; ::poll(&knock, 1, 0) <= 0) break;  // accept says EMFILE even if nobody knocks
      const auto next = [&] { return FileDescriptor(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)); };
      FileDescriptor fd = next();
      const bool is_last = !fd && (errno == EMFILE || errno == ENFILE) && spare_;
      if (is_last) {
        spare_ = FileDescriptor();
        fd = next();
      }
      if (!fd && (errno == ECONNABORTED || errno == EINTR)) continue;
      if (!fd && (errno == EMFILE || errno == ENFILE) && strangers_.empty())
        throw TransportError(Errc::no_resources, {"rank ", me_, " has no descriptor for a rank that connects: ", errno_text(errno), "; raise the limit (ulimit -n)"}, {me_, -1, 0, {}});
      if (!fd) break;
      if (strangers_.size() >= most_strangers_) strangers_.erase(strangers_.begin());
      tune(fd, peer_limit_);
      look_out_for(fd.get());
      strangers_.push_back({settings_.let_in(std::move(fd)), now, 0, {}, is_last});
    }
    for (std::size_t i = 0; i < strangers_.size();) {
      Stranger& stranger = strangers_[i];
      const ssize_t got = stranger.stream.read(reinterpret_cast<char*>(&stranger.hello) + stranger.have, sizeof stranger.hello - stranger.have);
      if (got > 0) stranger.have += static_cast<std::size_t>(got);
      const bool waits = got < 0 && (errno == EAGAIN || errno == EINTR || errno == EWOULDBLOCK);
      if (stranger.have == sizeof stranger.hello) {
        const ChannelHello& h = stranger.hello;
        const ChannelHello like;
        unsigned differ = 0;
        for (std::size_t k = 0; k < key_.size(); ++k) differ |= static_cast<unsigned>(h.key[k] ^ key_[k]);
        if (h.magic == like.magic && h.protocol == like.protocol && differ == 0 && arrived_.size() < most_unclaimed) {
          ::epoll_ctl(door_.get(), EPOLL_CTL_DEL, stranger.stream.get(), nullptr);
          // A stripe that is not taken is no loss, if it is said so; others may need the descriptor more.
          const bool is_wanted = h.lane >> 16 == 0 || (!stranger.is_last && !is_scarce(stranger.stream.descriptor()) && stranger.stream.write("+", 1) == 1);
          if (is_wanted && !left_.contains(h.communicator)) arrived_.insert_or_assign(std::tuple(h.communicator, static_cast<int>(h.lane), h.from), Arrived{std::move(stranger.stream), h.to, h.window});
          if (const auto found = groups_.find(h.communicator); found != groups_.end())
            if (const auto group = found->second.lock()) group->ring();
        }
      } else if ((waits || got > 0) && now - stranger.since < patience) {
        ++i;
        continue;
      }
      strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (!spare_) spare_ = FileDescriptor(::eventfd(0, EFD_CLOEXEC));
  }

  NetworkSettings settings_;
  Clock clock_;
  ClockMap map_;
  Ticks asked_ = 0, asked_at_ = 0;
  Rank me_;
  int size_;
  std::chrono::milliseconds peer_limit_;
  SocketAddress registry_;
  Join claim_;
  std::optional<Challenge> challenge_;
  JobKey key_{};
  std::string note_;
  std::vector<RankEntry> entries_;
  std::size_t most_strangers_ = 256 + 2 * (1 + FrameHeader::most_stripes) * static_cast<std::size_t>(size_);
  FileDescriptor listener_, door_{::epoll_create1(EPOLL_CLOEXEC)}, stop_{::eventfd(0, EFD_CLOEXEC)};
  /// Given up to hear who knocks where no other is left: it may be one who is no loss.
  FileDescriptor spare_{::eventfd(0, EFD_CLOEXEC)};
  std::thread letting_in_;
  pid_t process_ = ::getpid();
  std::mutex mutex_;
  ControlStream link_;
  std::vector<Stranger> strangers_;
  std::map<std::tuple<std::uint64_t, int, Rank>, Arrived> arrived_;
  std::map<std::uint64_t, std::weak_ptr<NetworkGroup>> groups_;
  std::map<std::uint64_t, AbortNotice> early_aborts_;
  std::vector<bool> dead_, gone_;
  std::set<std::uint64_t> left_;  // communicators that this rank has left
  std::uint64_t communicators_ = 1;
  bool is_early_ = false;  // the registry that was reached is of the job before
  bool registry_gone_ = false, registry_left_ = false;  // left: with rank 0, in an orderly way
};

}  // namespace tally::inline v0::detail
