// SPDX-License-Identifier: Apache-2.0
// Where ranks of several hosts meet: a thread of rank 0's that waits until all have joined, tells each where the others listen,
// and from then on passes on what they say about themselves. It outlives slow, double, vanished and hostile guests.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../clock.hpp"
#include "../quiet_thread.hpp"
#include "../types.hpp"
#include "control.hpp"

namespace tally::inline v0::detail {

class Registry {
 public:
  /// What rank 0 has for all, once it is known where they are.
  using MakeNote = std::function<std::string(const std::vector<RankEntry>&)>;
  /// `like`: what every rank has to say of itself, but for rank and address.
  Registry(FileDescriptor listener, const Join& like, const NetworkSettings& settings, MakeNote note = {})
      : note_(std::move(note)), settings_(settings), listener_(std::move(listener)), stop_(::eventfd(0, EFD_CLOEXEC)), like_(like), guests_of_(static_cast<std::size_t>(like.size)), ended_(guests_of_.size()), entries_(guests_of_.size()), deadline_(Steady::now() + settings.timeout) {
    if (!stop_) throw Error(Errc::no_resources, {"no descriptor for the job's registry: ", errno_text(errno)});
    set_option(listener_, SOL_SOCKET, SO_KEEPALIVE, 1);
    thread_ = quiet_thread([this] { work(); });
  }
  ~Registry() {
    if (::getpid() == process_) {
      const std::uint64_t one = 1;
      (void)!::write(stop_.get(), &one, sizeof one);
      thread_.join();
    } else {
      thread_.detach();  // a child that this rank forked has no such thread
    }
  }
  Registry(const Registry&) = delete;

 private:
  using Steady = std::chrono::steady_clock;
  struct Guest {
    ControlStream stream;
    SocketAddress from;
    Steady::time_point since;
    Nonce nonce{};
    Rank rank = -1;
    std::string told;  // why it is no rank of this job
    bool gone = false;
    bool early = false;    // of the next job that meets here
    bool is_here = false;  // on this host, and did not say by which address others reach it
  };
  struct Entry {
    CommunicatorStatus status;
    bool left = false;
    std::map<Rank, std::uint32_t> opened;
    std::string offer;            // empty: none yet
    std::set<Rank> wanted_by;
  };
  static constexpr std::size_t most_silent = 128, most_unread = std::size_t{64} << 20;
  static constexpr auto patience = std::chrono::seconds(10);  // with a guest that says nothing

  void work() {
    try {
      serve();
    } catch (const std::exception& error) {  // out of memory, most likely: the job goes on without, as when rank 0 is gone
      over_ = true;
    }
    for (const auto& guest : guests_) {
      if (!over_ && joined_ == like_.size) {
        if (guest->rank < 0) guest->stream.put(ControlKind::earlier, {});  // who came too soon for the next job comes again
        guest->stream.put(ControlKind::goodbye, Goodbye{});                // so that rank 0 has left, and did not die
      }
      guest->stream.write();
      (void)guest->stream.read([](ControlKind, std::string_view) { return true; });  // what lies unread when it is closed would take back what was said
      ::shutdown(guest->stream.fd(), SHUT_WR);
    }
  }
  void serve() {
    std::vector<pollfd> events;
    while (!over_) {
      events.assign({{stop_.get(), POLLIN, 0}, {listener_.get(), static_cast<short>(crowded_ ? 0 : POLLIN), 0}});
      for (const auto& guest : guests_) events.push_back({guest->stream.fd(), guest->stream.events(), 0});
      const int limit = crowded_ ? 20 : joined_ < like_.size || guests_.size() > guests_of_.size() ? 200 : -1;
      if (::poll(events.data(), events.size(), limit) < 0 && errno != EINTR) return;
      if (events[0].revents) break;
      const Steady::time_point now = Steady::now();
      for (std::size_t i = 0; i < guests_.size(); ++i) {
        Guest& guest = *guests_[i];
        if (events[i + 2].revents & (POLLIN | POLLHUP | POLLERR)) guest.gone = !guest.stream.read([&](ControlKind kind, std::string_view record) { return handle(guest, kind, record); }) || guest.gone;
        if (guest.rank < 0 && now - guest.since > patience) guest.gone = true;
      }
      for (const auto& guest : guests_)
        if (!guest->gone && guest->stream.has_more() && (!guest->stream.write() || guest->stream.waiting() > most_unread)) guest->gone = true;
      bury();
      if (events[1].revents || std::exchange(crowded_, false)) accept();  // after all were heard who may have to go
      if (joined_ < like_.size && !over_ && now > deadline_) fail(Errc::timeout, missing_text());
    }
  }
  void accept() {
    for (std::size_t i = 0; i < most_silent / 2; ++i) {
      sockaddr_storage storage{};
      socklen_t length = sizeof storage;
      FileDescriptor fd(::accept4(listener_.get(), reinterpret_cast<sockaddr*>(&storage), &length, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!fd) {
        if (errno == ECONNABORTED || errno == EINTR) continue;
        // No descriptor is left: who says nothing goes, and the next one comes a little later.
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) crowded_ = true, drop_silent();
        return;
      }
      std::size_t silent = 0;
      for (const auto& guest : guests_) silent += guest->rank < 0 && !guest->gone;
      if (silent >= most_silent + guests_of_.size()) drop_silent();
      tune(fd, std::chrono::seconds(30));
      auto guest = std::make_unique<Guest>();
      guest->stream = ControlStream(settings_.let_in(std::move(fd)), 512);
      guest->from = SocketAddress::of(storage);
      guest->since = Steady::now();
      guest->nonce = random_nonce();
      guest->stream.put(ControlKind::challenge, Challenge{.secured = !settings_.secret.empty(), .nonce = guest->nonce});
      guest->gone = !guest->stream.write();
      guests_.push_back(std::move(guest));
    }
  }
  /// The one that has been silent for the longest time: a rank says who it is as soon as it is connected.
  void drop_silent() {
    Guest* oldest = nullptr;
    for (const auto& guest : guests_)
      if (guest->rank < 0 && !guest->gone && (!oldest || guest->since < oldest->since)) oldest = guest.get();
    if (oldest) oldest->gone = true;
  }
  void bury() {
    for (std::size_t i = 0; i < guests_.size(); ++i) {
      Guest& guest = *guests_[i];
      if (!guest.gone) continue;
      if (guest.rank < 0) note_why(guest);
      if (guest.early) guest.stream.put(ControlKind::goodbye, Goodbye{}), guest.stream.write();  // it waited for long, or others need its place: it comes again
      if (guest.rank >= 0) {
        if (joined_ < like_.size) {  // it may be started again, as long as not all are here
          --joined_;
        } else {  // who ended in an orderly way has left all there is, also what it never came to join
          const std::int32_t rank = guest.rank;
          for (const auto& other : guests_)
            if (other.get() != &guest && other->rank >= 0) other->stream.put(ended_[static_cast<std::size_t>(rank)] ? ControlKind::gone : ControlKind::dead, ControlStream::as_bytes(rank)), other->stream.write();
        }
        guests_of_[static_cast<std::size_t>(guest.rank)] = nullptr;
      }
      guests_[i] = std::move(guests_.back());
      guests_.pop_back();
      --i;
    }
  }

  /// For the text that says who is missing.
  void note_why(const Guest& guest) {
    const std::string problem = guest.stream.problem();
    if (!problem.empty()) last_turned_away_ = "it cannot be encrypted: " + problem;
    else if (!guest.told.empty()) last_turned_away_ = guest.told;
    else if (!guest.stream.is_silent()) last_turned_away_ = "it does not speak as a rank of this version of tally";
    else last_turned_away_ = "it went without a word, as a rank does that has a TALLY_SECRET where rank 0 has none, or none where it has one";
    ++turned_away_;
    last_turned_away_.insert(0, guest.from.text() + ": ");
  }

  /// Before all have joined: its rank may be started again.
  void leave_early(Guest& guest) {
    guest.gone = true;
    guest.told = concat({"rank ", guest.rank, " had joined, and ended before all others did"});
    guests_of_[static_cast<std::size_t>(guest.rank)] = nullptr;
    guest.rank = -1;
    --joined_;
  }
  std::string missing_text() const {
    std::string missing;
    int count = 0;
    for (std::size_t r = 0; r < guests_of_.size(); ++r)
      if (!guests_of_[r] && ++count <= 16) missing += concat({missing.empty() ? "" : ", ", r});
    return concat({"the job's registry waited ", settings_.timeout.count() / 1'000'000, " ms, but ", count, " of ", like_.size, " ranks did not appear: ", missing, count > 16 ? ", ..." : "",
                   turned_away_ > 0 ? concat({"; connections that were turned away: ", turned_away_, ", the last one from ", last_turned_away_}) : ""});
  }
  void refuse(Guest& guest, Errc code, const std::string& text) {
    Notice notice;
    notice.code = static_cast<std::uint32_t>(code);
    guest.stream.put(ControlKind::refusal, std::string(ControlStream::as_bytes(notice)) + text);
    guest.stream.write();
    guest.told = text;
  }
  /// The job cannot come about, and everybody is told why.
  void fail(Errc code, const std::string& text) {
    for (const auto& guest : guests_)
      if (guest->rank >= 0) refuse(*guest, code, text);
    over_ = true;
  }

  bool handle(Guest& guest, ControlKind kind, std::string_view record) {
    if (guest.early) return kind == ControlKind::clock;  // it asked before it knew
    if (guest.rank < 0) return kind == ControlKind::join && join(guest, record);
    if (kind == ControlKind::clock) {
      ClockAnswer answer;
      if (!ControlStream::take(record, answer)) return false;
      answer.there = settings_.clock.now();
      answer.ticks_per_second = static_cast<double>(settings_.clock.to_ticks(std::chrono::seconds(1)));
      guest.stream.put(ControlKind::clock, answer);
      return true;
    }
    if (joined_ < like_.size) return false;  // nobody has anything else to say yet
    switch (kind) {
      case ControlKind::status: {
        CommunicatorStatus status;
        if (!ControlStream::take(record, status)) return false;
        status.rank = guest.rank;
        board_[status.communicator][guest.rank].status = status;
        return true;
      }
      case ControlKind::ask: {
        std::uint64_t communicator = 0;
        if (!ControlStream::take(record, communicator)) return false;
        std::string answer(ControlStream::as_bytes(communicator));
        if (const auto found = board_.find(communicator); found != board_.end())
          for (const auto& [rank, entry] : found->second) {
            Told told{entry.status, entry.left, 0};
            told.status.rank = rank;
            if (const auto opened = entry.opened.find(guest.rank); opened != entry.opened.end()) told.opened = opened->second;
            answer += ControlStream::as_bytes(told);
          }
        guest.stream.put(ControlKind::told, answer);
        return true;
      }
      case ControlKind::offer: {
        std::string_view address = record;
        Offer offer;
        if (!ControlStream::take(address, offer) || address.empty() || address.size() > Offer::longest) return false;
        Entry& entry = board_[offer.communicator][guest.rank];
        entry.offer = address;
        for (const Rank r : entry.wanted_by) tell_offer(r, offer.communicator, guest.rank, entry.offer);
        entry.wanted_by.clear();
        return true;
      }
      case ControlKind::want: {
        Offer offer;
        if (!ControlStream::take(record, offer) || offer.rank < 0 || offer.rank >= like_.size) return false;
        Entry& entry = board_[offer.communicator][offer.rank];
        if (entry.offer.empty()) entry.wanted_by.insert(guest.rank);
        else tell_offer(guest.rank, offer.communicator, offer.rank, entry.offer);
        return true;
      }
      case ControlKind::goodbye: {
        Goodbye goodbye;
        if (!ControlStream::take(record, goodbye)) return false;
        if (goodbye.communicator == 0) return ended_[static_cast<std::size_t>(guest.rank)] = true;
        auto& board = board_[goodbye.communicator];
        Entry& entry = board[guest.rank];
        entry.left = true;
        for (Opened opened; ControlStream::take(record, opened);) entry.opened[opened.to] = opened.channels;
        int left = 0;
        for (const auto& [rank, each] : board) left += each.left;
        if (left >= goodbye.size) board_.erase(goodbye.communicator), aborted_.erase(goodbye.communicator);
        return true;
      }
      case ControlKind::abort: {
        std::string_view text = record;
        Notice notice;
        if (!ControlStream::take(text, notice)) return false;
        if (!aborted_.insert(notice.communicator).second) return true;  // the first one counts
        for (const auto& other : guests_)
          if (other->rank >= 0) other->stream.put(ControlKind::abort, record), other->stream.write();
        return true;
      }
      default: return false;
    }
  }
  void tell_offer(Rank to, std::uint64_t communicator, Rank of, const std::string& address) {
    Guest* const guest = guests_of_[static_cast<std::size_t>(to)];
    if (!guest) return;
    guest->stream.put(ControlKind::offered, std::string(ControlStream::as_bytes(Offer{communicator, of, 0})) + address);
    guest->stream.write();
  }
  bool join(Guest& guest, std::string_view record) {
    Join theirs;
    if (!ControlStream::take(record, theirs) || theirs.magic != like_.magic) return false;  // a stranger
    const std::string them = concat({"rank ", theirs.rank});
    const bool is_one = theirs.rank >= 0 && theirs.rank < like_.size;
    // One that was started again, or joins again, may be here before its first connection's end was looked at.
    if (Guest* const before = is_one ? guests_of_[static_cast<std::size_t>(theirs.rank)] : nullptr; before && !before->gone)
      if (!before->stream.read([&](ControlKind kind, std::string_view words) { return handle(*before, kind, words); })) {
        if (joined_ < like_.size) leave_early(*before);
        else before->gone = true;
      }
    if (theirs.protocol != like_.protocol) return refuse(guest, Errc::mismatch, concat({them, " was built with another version of tally than rank 0"})), false;
    if (theirs.job != like_.job) return refuse(guest, Errc::invalid_argument, concat({them, " belongs to another job than the one that meets here: check address, port and TALLY_JOB"})), false;
    if (joined_ == like_.size && is_one && ended_[static_cast<std::size_t>(theirs.rank)]) {  // it has left this job in an orderly way, and others have not yet
      guest.early = true;
      guest.stream.put(ControlKind::earlier, {});
      return true;
    }
    if (joined_ == like_.size) return refuse(guest, Errc::invalid_argument, concat({them, " comes late: all ", like_.size, " ranks of this job have joined already"})), false;
    Join claim = theirs;
    claim.proof = {};
    if (!same(theirs.proof, proof_of(settings_.secret, "join", guest.nonce, ControlStream::as_bytes(claim))))
      return refuse(guest, Errc::invalid_argument, concat({them, " has another secret than rank 0: TALLY_SECRET must be the same for all ranks"})), false;
    guest.nonce = theirs.nonce;
    std::string problem;
    if (theirs.size != like_.size) problem = concat({"ranks disagree on size: rank 0 says ", like_.size, ", ", them, " says ", theirs.size});
    else if (!is_one) problem = concat({them, " is not one of ", like_.size});
    else if (guests_of_[static_cast<std::size_t>(theirs.rank)]) problem = concat({"two processes say that they are ", them});
    else if (theirs.accounting != like_.accounting) problem = concat({"accounting is on at some ranks and off at others (rank 0: ", like_.accounting ? "on" : "off", ", ", them, " not)"});
    else if (theirs.settings != like_.settings) problem = concat({them, " and rank 0 have different settings of the network"});
    if (!problem.empty()) {
      refuse(guest, Errc::mismatch, problem);
      fail(Errc::mismatch, problem);
      return false;
    }
    guest.rank = theirs.rank;
    guest.stream.trust();
    guests_of_[static_cast<std::size_t>(theirs.rank)] = &guest;
    if (!theirs.listens.is_valid()) {
      guest.is_here = guest.from.is_loopback() || guest.from.same_host_as(own_address(guest.stream.descriptor()));
      const std::uint16_t port = theirs.listens.port;
      theirs.listens = guest.from;
      theirs.listens.port = port;
    }
    entries_[static_cast<std::size_t>(theirs.rank)] = {theirs.listens, theirs.boot, theirs.place};
    if (++joined_ < like_.size) return true;
    std::string note;
    try {
      if (note_) note = note_(entries_);
    } catch (const Error& error) {
      fail(error.errc(), std::string(error.text()));
      return true;
    }
    for (const auto& each : guests_) {
      if (each->rank < 0) continue;
      std::string welcome(ControlStream::as_bytes(key_));
      for (std::size_t r = 0; r < entries_.size(); ++r) {
        RankEntry entry = entries_[r];
        // Ranks of this host said so by an address that means nothing to others: those reach them where they reached this registry.
        if (guests_of_[r]->is_here && !each->is_here) {
          const SocketAddress here = own_address(each->stream.descriptor());
          entry.listens = here;
          entry.listens.port = entries_[r].listens.port;
        }
        welcome += ControlStream::as_bytes(entry);
      }
      welcome += note;
      each->stream.put(ControlKind::welcome, concat({as_text(proof_of(settings_.secret, "welcome", each->nonce, welcome)), welcome}));
      each->stream.write();
    }
    return true;
  }

  MakeNote note_;
  NetworkSettings settings_;
  FileDescriptor listener_, stop_;
  Join like_;
  const JobKey key_ = random_nonce();
  std::vector<std::unique_ptr<Guest>> guests_;
  std::vector<Guest*> guests_of_;  // by rank
  std::vector<bool> ended_;        // by rank: it said goodbye to everything
  std::vector<RankEntry> entries_;
  std::map<std::uint64_t, std::map<Rank, Entry>> board_;  // of communicators
  std::set<std::uint64_t> aborted_;
  std::size_t turned_away_ = 0;
  std::string last_turned_away_;
  int joined_ = 0;
  bool over_ = false, crowded_ = false;
  Steady::time_point deadline_;
  pid_t process_ = ::getpid();
  std::thread thread_;
};

}  // namespace tally::inline v0::detail
