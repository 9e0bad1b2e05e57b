// SPDX-License-Identifier: Apache-2.0
// An MPI as a fabric, where nothing else reaches the network: messages are MPI's, short ones from buffers of their own, long payloads
// under a tag of their own straight from memory to memory. MPI has no descriptor to sleep on, so who waits looks again and again.
#pragma once

#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "fabric.hpp"

namespace tally::inline v0 {

namespace detail {

/// Errors are returned, not fatal, on every communicator that this file makes.
inline void check_mpi(int result, const char* what) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  ::MPI_Error_string(result, text, &length);
  throw Error(Errc::peer_lost, {"MPI cannot ", what, ": ", text});
}
/// For as long as a call of MPI takes, where MPI does not allow several at once: communicators may be used by several threads.
class MpiTurn {
 public:
  MpiTurn() {
    if (is_needed()) turn_ = std::unique_lock(mutex());
  }
  static bool is_needed() {
    static const bool alone = [] {
      int provided = MPI_THREAD_SINGLE;
      ::MPI_Query_thread(&provided);
      return provided < MPI_THREAD_MULTIPLE;
    }();
    return alone;
  }

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex one;
    return one;
  }
  std::unique_lock<std::recursive_mutex> turn_;
};
/// Ranks of a communicator of tally's as ones of MPI's, with messages of their own.
class MpiGroup {
 public:
  /// All of `of`; every rank of it calls.
  explicit MpiGroup(MPI_Comm of) {
    const MpiTurn turn;
    check_mpi(::MPI_Comm_dup(of, &comm_), "duplicate a communicator");
    ::MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  }
  /// Those of its ranks; each of these calls, with the same number.
  MpiGroup(const MpiGroup& of, const std::vector<Rank>& members, int number) {
    if (MpiTurn::is_needed()) of.wait_for_all(members, number);
    const MpiTurn turn;
    MPI_Group all = MPI_GROUP_NULL, some = MPI_GROUP_NULL;
    check_mpi(::MPI_Comm_group(of.comm_, &all), "name the ranks of a communicator");
    check_mpi(::MPI_Group_incl(all, static_cast<int>(members.size()), members.data(), &some), "choose ranks of a communicator");
    const int result = ::MPI_Comm_create_group(of.comm_, some, number, &comm_);
    ::MPI_Group_free(&all);
    ::MPI_Group_free(&some);
    check_mpi(result, "make a communicator");
    ::MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  }
  ~MpiGroup() {
    const MpiTurn turn;
    int over = 0;
    ::MPI_Finalized(&over);
    if (!over && comm_ != MPI_COMM_NULL) ::MPI_Comm_free(&comm_);
  }
  MpiGroup(const MpiGroup&) = delete;
  MPI_Comm handle() const { return comm_; }
  /// Tags that there may be for messages.
  int most_tags() const { return tag_bound() - ready_tags; }

 private:
  static constexpr int ready_tags = 64;
  int tag_bound() const {
    void* most = nullptr;
    int found = 0;
    ::MPI_Comm_get_attr(comm_, MPI_TAG_UB, &most, &found);
    return found ? *static_cast<int*>(most) : 32767;
  }
  /// Until all of them are about to call what blocks, which keeps other threads of this process from calling MPI meanwhile.
  void wait_for_all(const std::vector<Rank>& members, int number) const {
    std::vector<MPI_Request> requests(2 * members.size(), MPI_REQUEST_NULL);
    const int tag = tag_bound() - number % ready_tags;
    const auto turn_at = [](auto&& f) {
      const MpiTurn turn;
      check_mpi(f(), "make a communicator");
    };
    for (std::size_t i = 0; i < members.size(); ++i) {
      turn_at([&] { return ::MPI_Irecv(nullptr, 0, MPI_BYTE, members[i], tag, comm_, &requests[2 * i]); });
      turn_at([&] { return ::MPI_Isend(nullptr, 0, MPI_BYTE, members[i], tag, comm_, &requests[2 * i + 1]); });
    }
    for (int over = 0; !over; std::this_thread::yield()) turn_at([&] { return ::MPI_Testall(static_cast<int>(requests.size()), requests.data(), &over, MPI_STATUSES_IGNORE); });
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
};

class MpiFabric {
 public:
  static constexpr std::string_view name = "mpi";
  static constexpr bool lets_go = false;  // what it receives into it may write to until it has
  struct Flight {
    std::array<MPI_Request, 2> requests{MPI_REQUEST_NULL, MPI_REQUEST_NULL};  // of the message; of a payload that goes alone
    std::unique_ptr<std::byte[]> message;                                     // header and payload
    std::vector<std::byte> kept;                                              // what a payload is received into, once nobody wants it
    bool failed = false;
  };
  struct Held {
    int tag = -1;  // of a payload that is to be fetched
    Rank from = -1;
    std::size_t bytes = 0;
    std::byte* here = nullptr;  // of a message that came
  };
  struct Message {
    FabricHeader header;
    Held held;
    const std::byte* data = nullptr;  // null: to be fetched
    std::size_t bytes = 0;
  };

  MpiFabric(std::shared_ptr<MpiGroup> group, int ranks, const FabricOptions& options)
      : group_(std::move(group)), at_once_(options.at_once), most_bytes_(options.frame_bytes), lanes_(options.lanes), tags_((group_->most_tags() - 1) / options.lanes), errors_(static_cast<std::size_t>(ranks)), coming_(most_coming) {
    if (tags_ < 8192) throw Error(Errc::unsupported, {"this MPI has too few tags (", group_->most_tags(), ") for ", options.lanes, " lanes"});
  }
  ~MpiFabric() {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    do {
      for (Message& message : inbox_) give_back(message.held);
      inbox_.clear();
      progress();
    } while ((!leftovers_.empty() || is_coming()) && std::chrono::steady_clock::now() < deadline);
    for (Message& message : inbox_) give_back(message.held);
    for (auto& each : leftovers_) (void)each.release();  // MPI may still look at it
    for (auto& each : coming_)
      if (each && each->request != MPI_REQUEST_NULL) (void)each.release();
  }
  MpiFabric(const MpiFabric&) = delete;

  std::string address() const { return {}; }
  bool knows(Rank) const { return true; }
  void meet(Rank, std::string_view) {}
  static constexpr bool has_rest() { return false; }  // any call of MPI moves everything
  bool reaches(Rank r) const { return error(r) == nullptr; }
  bool stands(Rank r) const { return reaches(r); }
  const char* error(Rank r) const { return errors_[static_cast<std::size_t>(r)]; }
  std::size_t most_at_once() const { return at_once_; }

  bool send(Rank r, const FabricHeader& header, const std::byte* from, std::size_t bytes, Flight& flight) {
    const MpiTurn turn;
    const std::size_t with_it = header.fetched ? 0 : bytes;
    flight.message = std::make_unique_for_overwrite<std::byte[]>(sizeof header + with_it);
    std::memcpy(flight.message.get(), &header, sizeof header);
    if (with_it > 0) std::memcpy(flight.message.get() + sizeof header, from, with_it);
    if (!fine(r, ::MPI_Isend(flight.message.get(), static_cast<int>(sizeof header + with_it), MPI_BYTE, r, 0, group_->handle(), &flight.requests[0]))) flight.failed = true;
    if (header.fetched && !fine(r, ::MPI_Isend(from, static_cast<int>(bytes), MPI_BYTE, r, tag_of(header), group_->handle(), &flight.requests[1]))) flight.failed = true;
    return true;
  }
  bool is_over(Flight& flight) {
    const MpiTurn turn;
    if (flight.failed) return false;
    for (MPI_Request& request : flight.requests) {
      if (request == MPI_REQUEST_NULL) continue;
      int over = 0;
      if (::MPI_Test(&request, &over, MPI_STATUS_IGNORE) != MPI_SUCCESS) flight.failed = true;
      if (!over) return false;
    }
    flight.message.reset();
    return !flight.failed;
  }
  bool touches(Flight& flight) { return !is_over(flight) && !flight.failed && flight.requests[1] != MPI_REQUEST_NULL; }
  /// What MPI still sends, or receives into, stays until it has.
  void drop(Flight& flight, std::vector<std::byte>&& memory) {
    if (is_over(flight)) return;
    flight.kept = std::move(memory);
    auto rest = std::make_unique<Flight>(std::exchange(flight, Flight()));
    if (!rest->failed) leftovers_.push_back(std::move(rest));
    else forget(rest);
  }
  void halt() {}  // MPI goes on as it likes; a peer that never takes what was announced leaves it untouched
  void fetch(Rank r, Held& held, std::byte* to, std::size_t bytes, Flight& flight) {
    const MpiTurn turn;
    if (!fine(r, ::MPI_Irecv(to, static_cast<int>(bytes), MPI_BYTE, r, std::exchange(held.tag, -1), group_->handle(), &flight.requests[1]))) flight.failed = true;
  }
  /// A payload that nobody wants is received all the same: its sender waits for that.
  void give_back(Held& held) {
    delete[] std::exchange(held.here, nullptr);
    if (held.tag < 0) return;
    auto sink = std::make_unique<Flight>();
    sink->message = std::make_unique_for_overwrite<std::byte[]>(held.bytes);
    fetch(held.from, held, sink->message.get(), held.bytes, *sink);
    if (!sink->failed) leftovers_.push_back(std::move(sink));
  }
  void progress() {
    const MpiTurn turn;
    std::erase_if(leftovers_, [this](auto& each) {
      if (is_over(*each)) return true;
      if (each->failed) forget(each);
      return each == nullptr;
    });
    // Several may come at once: one of a sender that is slow must not hold others up.
    for (auto& each : coming_) {
      if (each && each->request != MPI_REQUEST_NULL) {
        if (has_come(*each)) take(*each);
        continue;
      }
      int is_there = 0;
      MPI_Message handle = MPI_MESSAGE_NULL;
      MPI_Status status;
      if (::MPI_Improbe(MPI_ANY_SOURCE, 0, group_->handle(), &is_there, &handle, &status) != MPI_SUCCESS || !is_there) continue;
      if (!each) each = std::make_unique<Coming>();
      ::MPI_Get_count(&status, MPI_BYTE, &each->bytes);
      each->from = status.MPI_SOURCE;
      each->data.resize(static_cast<std::size_t>(std::max(each->bytes, 0)));
      if (fine(each->from, ::MPI_Imrecv(each->data.data(), each->bytes, MPI_BYTE, &handle, &each->request)) && has_come(*each)) take(*each);
    }
  }
  std::deque<Message>& inbox() { return inbox_; }
  int event() const { return -1; }
  bool arm() { return inbox_.empty(); }
  nanoseconds longest_sleep() const { return std::chrono::microseconds(50); }
  void flush(nanoseconds limit, bool) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!leftovers_.empty() && std::chrono::steady_clock::now() < deadline) progress();
  }
  void give_up(Rank r) {
    if (!errors_[static_cast<std::size_t>(r)]) errors_[static_cast<std::size_t>(r)] = "given up";
  }

 private:
  static constexpr std::size_t most_coming = 8;
  /// A message of which MPI has heard.
  struct Coming {
    MPI_Request request = MPI_REQUEST_NULL;
    int bytes = 0;
    Rank from = -1;
    std::vector<std::byte> data;
  };
  /// Of one that failed: what MPI may still look at stays for good.
  static void forget(std::unique_ptr<Flight>& flight) {
    if (std::ranges::any_of(flight->requests, [](MPI_Request each) { return each != MPI_REQUEST_NULL; })) (void)flight.release();
    flight.reset();
  }
  bool is_coming() const {
    return std::ranges::any_of(coming_, [](const auto& each) { return each && each->request != MPI_REQUEST_NULL; });
  }
  bool has_come(Coming& coming) {
    int over = 0;
    return fine(coming.from, ::MPI_Test(&coming.request, &over, MPI_STATUS_IGNORE)) && over;
  }
  void take(const Coming& coming) {
    Message message;
    if (coming.data.size() < sizeof message.header) return;  // no rank of tally's sends such
    std::memcpy(&message.header, coming.data.data(), sizeof message.header);
    if (message.header.from != coming.from || message.header.lane >= lanes_ || message.header.frame.bytes > most_bytes_) return;
    message.bytes = coming.data.size() - sizeof message.header;
    if (message.header.fetched) {
      message.held = {tag_of(message.header), coming.from, message.header.frame.bytes, nullptr};
      message.bytes = message.header.frame.bytes;
    } else {
      message.held.here = new std::byte[std::max<std::size_t>(message.bytes, 1)];
      std::memcpy(message.held.here, coming.data.data() + sizeof message.header, message.bytes);
      message.data = message.held.here;
    }
    inbox_.push_back(message);
  }
  /// No two payloads under way share one: a channel has far fewer of them than there are tags for each lane.
  int tag_of(const FabricHeader& header) const { return 1 + static_cast<int>(header.number % static_cast<std::uint64_t>(tags_)) * lanes_ + header.lane; }
  bool fine(Rank r, int result) {
    if (result == MPI_SUCCESS) return true;
    errors_[static_cast<std::size_t>(r)] = "an operation of MPI failed";
    return false;
  }

  std::shared_ptr<MpiGroup> group_;
  std::size_t at_once_, most_bytes_;
  int lanes_, tags_;  // tags: of each lane
  std::vector<const char*> errors_;
  std::vector<std::unique_ptr<Coming>> coming_;
  std::vector<std::unique_ptr<Flight>> leftovers_;
  std::deque<Message> inbox_;
};

}  // namespace detail

using MpiTransport = FabricTransport<detail::MpiFabric>;

}  // namespace tally::inline v0
