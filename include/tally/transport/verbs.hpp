// SPDX-License-Identifier: Apache-2.0
// RDMA verbs (libibverbs, librdmacm) as a fabric, over InfiniBand, RoCE or iWARP. Short messages are sends into a shared receive queue.
// For a long payload the receiver advertises where it is to go; its sender writes it there by RDMA, in stripes over several queue pairs,
// and closes each stripe with a message, which cannot overtake it. (A write with immediate data would save that; iWARP has none.)
// On iWARP, where a message that finds no receive ends its connection, each queue pair has credits. One thread of the process makes
// connections, so that who is let in does not wait for a rank that is busy elsewhere.
#pragma once

#include <rdma/rdma_cma.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../file.hpp"
#include "connection_thread.hpp"
#include "fabric.hpp"
#include "rdma_cm.hpp"
#include "registrations.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct VerbsOptions : FabricOptions {
  int stripes = 2;                                     // queue pairs that a long payload goes over
  std::size_t least_striped = std::size_t{128} << 10;  // that is shorter goes over one
  int receives = 512;                                  // messages that may come before this rank looks, from all peers together

  VerbsOptions() { at_once = std::size_t{16} << 10; }

  std::string text() const { return detail::concat({FabricOptions::text(), " ", stripes, " ", least_striped, " ", receives}); }
};

namespace detail {

class VerbsFabric {
 public:
  static constexpr std::string_view name = "verbs";
  static constexpr bool lets_go = true;
  /// A payload under way: a place in the table of them.
  struct Flight {
    std::uint32_t id = 0, generation = 0;  // id 0: nothing is under way any more
    bool failed = false;
  };
  struct Held {
    int buffer = -1;            // of a message that came
    std::uint32_t source = 0;   // and by which queue pair
    std::byte* copy = nullptr;  // of one whose buffer was needed
    std::uint64_t number = 0;   // of a payload that is to be fetched
    std::uint32_t lane = 0;
  };
  struct Message {
    FabricHeader header;
    Held held;
    const std::byte* data = nullptr;
    std::size_t bytes = 0;
  };

  /// `interface`: see choose_addresses(); empty: the first address of this host that an RDMA device has.
  VerbsFabric(const FabricMembers& members, const VerbsOptions& options, std::string_view interface)
      : options_(options), key_(members.key), me_(members.me), peers_(members.ranks.size()) {
    static const int can_fork = ::ibv_fork_init();  // before anything else; kernels since 5.12 need nothing
    (void)can_fork;
    events_.reset(::rdma_create_event_channel());
    if (!events_) throw Error(Errc::unsupported, {"no RDMA here: ", errno_text(errno), " (rdma_create_event_channel)"});
    do_not_block(events_->fd);
    listener_ = listen_rdma(events_.get(), interface, address_);
    context_ = listener_->verbs;
    const char* const device = ::ibv_get_device_name(context_->device);
    ibv_device_attr limits{};
    if ((errno = ::ibv_query_device(context_, &limits)) != 0) fail("ask", device);
    receives_count_ = std::min(options_.receives, limits.max_srq_wr);
    if (receives_count_ < 2) throw Error(Errc::unsupported, {"the RDMA device ", device, " has no shared receive queues"});
    if (context_->device->transport_type == IBV_TRANSPORT_IWARP) {
      const int links = 2 * options_.stripes * std::max(static_cast<int>(peers_.size()) - 1, 1);
      credits_ = std::min(receives_count_ / 2 / links - 2, 32);
      if (credits_ < 2) throw Error(Errc::unsupported, {"on the iWARP device ", device, " ", receives_count_, " receives are too few for ", peers_.size(), " ranks and ", options_.stripes, " stripes"});
    }
    message_bytes_ = sizeof(FabricHeader) + options_.at_once;
    domain_.reset(::ibv_alloc_pd(context_));
    if (!domain_) fail("make a protection domain on", device);
    registrations_.emplace(domain_.get());
    channel_.reset(::ibv_create_comp_channel(context_));
    if (!channel_) fail("make a completion channel on", device);
    do_not_block(channel_->fd);
    // All that may complete and was not looked at: receives, sends, and writes, of which each has a send behind it.
    completions_.reset(::ibv_create_cq(context_, std::min(limits.max_cqe, receives_count_ + 2 * most_messages + 16), nullptr, channel_.get(), 0));
    if (!completions_) fail("make a completion queue on", device);
    ibv_srq_init_attr queue{};
    queue.attr.max_wr = static_cast<std::uint32_t>(receives_count_);
    queue.attr.max_sge = 1;
    receives_.reset(::ibv_create_srq(domain_.get(), &queue));
    if (!receives_) fail("make a shared receive queue on", device);
    buffers_.resize(static_cast<std::size_t>(receives_count_ + most_messages) * message_bytes_);
    const int access = IBV_ACCESS_LOCAL_WRITE;  // not the enumerator, of which the macro below would make a warning
    region_.reset(::ibv_reg_mr(domain_.get(), buffers_.data(), buffers_.size(), access));
    if (!region_) fail("register memory with", device);
    for (int i = 0; i < receives_count_; ++i) post_receive(i);
    for (int i = 0; i < most_messages; ++i) free_.push_back(receives_count_ + i);
    payloads_.emplace_back();  // 0 is none
    epoll_event what{};
    what.events = EPOLLIN;
    if (!epoll_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, channel_->fd, &what) != 0 || !bell_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, bell_.get(), &what) != 0) throw Error(Errc::no_resources, {"no descriptor to wait with: ", errno_text(errno)});
    for (Peer& each : peers_) each.in.resize(static_cast<std::size_t>(options_.stripes));
    ConnectionThread<VerbsFabric>::get().add(*this);
  }
  ~VerbsFabric() {
    ConnectionThread<VerbsFabric>::get().remove(*this);
    for (Peer& peer : peers_)
      for (Link& link : peer.links) close(link);
    for (Message& message : inbox_) delete[] message.held.copy;
    if (unacknowledged_ > 0) ::ibv_ack_cq_events(completions_.get(), unacknowledged_);
  }
  VerbsFabric(const VerbsFabric&) = delete;
  VerbsFabric& operator=(const VerbsFabric&) = delete;

  std::string address() const { return address_.text(); }
  bool knows(Rank r) const { return peer(r).is_met; }
  void meet(Rank r, std::string_view address) {
    Peer& to = peer(r);
    to.is_met = true;
    const SocketAddress there = resolve(address).front();
    const std::lock_guard lock(mutex_);
    for (int s = 0; s < options_.stripes && !to.is_broken; ++s) {
      Link& link = to.links.emplace_back();
      link.rank = r;
      link.stripe = s;
      to.out.push_back(&link);
      sockaddr_storage from, at;
      SocketAddress mine = address_;
      mine.port = 0;
      mine.fill(from);
      there.fill(at);
      if (::rdma_create_id(events_.get(), &link.id, &link, RDMA_PS_TCP) != 0 || ::rdma_resolve_addr(link.id, reinterpret_cast<sockaddr*>(&from), reinterpret_cast<sockaddr*>(&at), resolve_ms) != 0) break_with(r, concat({"its address ", address, " is not to be reached from ", address_.text(), ": ", errno_text(errno)}));
    }
  }
  /// What is sent before the peer has let this rank in waits here.
  bool reaches(Rank r) const { return !peer(r).is_broken && peer(r).is_met; }
  bool stands(Rank r) const { return reaches(r) && peer(r).up == options_.stripes; }
  const char* error(Rank r) const { return peer(r).is_broken.load(std::memory_order_acquire) ? peer(r).why.c_str() : nullptr; }
  std::size_t most_at_once() const { return options_.at_once; }

  bool send(Rank r, const FabricHeader& header, const std::byte* from, std::size_t bytes, Flight& flight) {
    const std::lock_guard lock(mutex_);
    Link& link = *peer(r).out[0];
    // Notes always find a buffer; those that wait for peers that are not there yet leave enough for others.
    if (link.is_up ? free_.size() <= most_waiting || !link.waiting.empty() || !has_room(link, {0, 0}) : free_.size() <= most_messages / 2 || link.waiting.size() >= (credits_ > 0 ? std::min(most_waiting, static_cast<std::size_t>(credits_)) : most_waiting)) return false;
    if (header.fetched) {
      const auto region = registrations_->get(from, bytes, false);
      if (!region) return give_in(r, flight), true;
      Payload& payload = begin(flight, r, header.lane, header.number, bytes, region);
      payload.is_outgoing = true;
      payload.from = from;
    }
    const std::size_t with_it = header.fetched ? 0 : bytes;
    Waiting next{take_buffer(), static_cast<std::uint32_t>(sizeof header + with_it)};
    std::memcpy(buffer(next.buffer), &header, sizeof header);
    if (with_it > 0) std::memcpy(buffer(next.buffer) + sizeof header, from, with_it);
    put(link, next);
    return true;
  }
  bool is_over(Flight& flight) {
    if (flight.id == 0) return !flight.failed;
    Payload& payload = payloads_[flight.id];
    if (payload.generation != flight.generation || payload.failed) flight.failed = true;
    else if (payload.parts > 0) return false;
    end(flight);
    return !flight.failed;
  }
  /// What failed is no longer under way: its queue pairs are gone.
  bool touches(Flight& flight) { return !is_over(flight) && flight.id != 0; }
  void drop(Flight& flight, std::vector<std::byte>&& memory) {
    if (!touches(flight)) return;
    payloads_[flight.id].kept = std::move(memory);
    payloads_[flight.id].is_dropped = true;
  }
  void fetch(Rank r, Held& held, std::byte* to, std::size_t bytes, Flight& flight) {
    const std::lock_guard lock(mutex_);
    Peer& from = peer(r);
    if (from.is_broken) return void(flight.failed = true);
    const auto region = registrations_->get(to, bytes, true);
    if (!region) return give_in(r, flight);
    begin(flight, r, held.lane, held.number, bytes, region);
    put(*from.in[0], {-1, 0, {Note::advert, held.lane, 0, 0, held.number, reinterpret_cast<std::uintptr_t>(to), region->mr->rkey, static_cast<std::uint32_t>(bytes)}});
  }
  void give_back(Held& held) {
    delete[] std::exchange(held.copy, nullptr);
    if (held.buffer < 0) return;
    const std::lock_guard lock(mutex_);
    post_receive(std::exchange(held.buffer, -1));
    --held_;
    if (const auto link = link_of_.find(held.source); link != link_of_.end()) {
      --link->second->held;
      took(*link->second);
    }
  }
  void progress() {
    const std::lock_guard lock(mutex_);
    take_completions();
    bury();
  }
  std::deque<Message>& inbox() { return inbox_; }
  int event() const { return epoll_.get(); }
  bool arm() {
    const std::lock_guard lock(mutex_);
    eventfd_t heard = 0;
    (void)::eventfd_read(bell_.get(), &heard);
    void* of = nullptr;
    for (ibv_cq* queue = nullptr; ::ibv_get_cq_event(channel_.get(), &queue, &of) == 0;) ++unacknowledged_;
    if (unacknowledged_ > 1024) ::ibv_ack_cq_events(completions_.get(), std::exchange(unacknowledged_, 0));
    if (::ibv_req_notify_cq(completions_.get(), 0) != 0) return false;
    const bool any = take_completions();  // what came before it was asked to tell
    return !bury() && !any && heard == 0 && inbox_.empty();
  }
  nanoseconds longest_sleep() const { return nanoseconds::max(); }
  static constexpr bool has_rest() { return false; }  // the thread above sends what waits for a connection
  /// Until what was sent is at the peers'.
  void flush(nanoseconds limit, bool) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    const auto is_quiet = [](const Peer& p) { return p.is_broken || std::ranges::all_of(p.links, [](const Link& link) { return link.posted == 0 && link.waiting.empty(); }); };
    const auto all_are = [&] {
      const std::lock_guard lock(mutex_);
      return std::ranges::all_of(peers_, is_quiet);
    };
    while (!all_are() && std::chrono::steady_clock::now() < deadline) progress();
  }
  void give_up(Rank r) {
    const std::lock_guard lock(mutex_);
    break_with(r, "given up");
    bury();
  }
  void halt() {
    const std::lock_guard lock(mutex_);
    for (Rank r = 0; r < static_cast<Rank>(peers_.size()); ++r) break_with(r, "given up");
    bury();
  }
  const Registrations& registrations() const { return *registrations_; }

 private:
  friend ConnectionThread<VerbsFabric>;
  static constexpr int most_messages = 128, most_posted = 64, resolve_ms = 10'000;
  static constexpr std::size_t most_waiting = 16;
  static constexpr std::uint64_t receive_mark = std::uint64_t{1} << 62, write_mark = std::uint64_t{1} << 61;
  /// What this class says to its like, beside frames, which are longer.
  struct Note {
    enum Kind : std::uint32_t { none, advert, closed, room } kind{};
    std::uint32_t lane = 0, stripe = 0, unused = 0;
    std::uint64_t number = 0, address = 0;  // room: so many messages were taken
    std::uint32_t key = 0, bytes = 0;
  };
  static_assert(sizeof(Note) == 40 && sizeof(Note) < sizeof(FabricHeader));
  /// Who connects.
  struct Hello {
    std::uint64_t magic = 0x73627265766c6174ull;  // "talverbs"
    std::uint64_t key = 0;
    std::int32_t from = -1;
    std::uint32_t stripe = 0;
  };
  static_assert(sizeof(Hello) <= 56);
  /// What a queue pair is to send: a buffer, or a note; before a note that closes a stripe, that of the payload.
  struct Waiting {
    int buffer = -1;
    std::uint32_t bytes = 0;
    Note note{};
    std::uint32_t payload = 0, generation = 0;
  };
  /// A queue pair.
  struct Link {
    Rank rank = -1;
    int stripe = 0;
    bool is_up = false, is_listed = false;
    rdma_cm_id* id = nullptr;
    std::uint32_t inline_bytes = 0;
    int posted = 0, held = 0;
    std::deque<Waiting> waiting;                           // for room, or for the peer to let this rank in
    std::uint64_t sent = 0, allowed = 0, took = 0, said = 0;  // messages, where there are credits
  };
  struct Peer {
    std::deque<Link> links;
    std::vector<Link*> out, in;  // by stripe: opened by this rank, and by that one
    std::string why;
    std::atomic<bool> is_broken = false;
    std::atomic<int> up = 0;  // of those that this rank opened
    bool is_met = false, is_to_be_buried = false;
  };
  struct Payload {
    std::uint32_t generation = 0;
    Rank rank = -1;
    std::uint32_t lane = 0;
    std::uint64_t number = 0;
    std::size_t bytes = 0;
    const std::byte* from = nullptr;
    Registrations::Handle region;
    std::vector<std::byte> kept;
    int parts = 0;  // stripes that are not over
    bool is_used = false, is_outgoing = false, failed = false, is_advertised = false, is_dropped = false;
  };
  /// What a buffer that is being sent belongs to.
  struct Sending {
    Link* link = nullptr;
    std::uint32_t payload = 0, generation = 0;
  };

  Peer& peer(Rank r) { return peers_[static_cast<std::size_t>(r)]; }
  const Peer& peer(Rank r) const { return peers_[static_cast<std::size_t>(r)]; }
  [[noreturn]] static void fail(const char* what, const char* device) { throw Error(Errc::no_resources, {"cannot ", what, " the RDMA device ", device, ": ", errno_text(errno), "; is the limit of locked memory high enough (ulimit -l)?"}); }

  bool make_queue_pair(Link& link) {
    if (link.id->verbs != context_) return errno = EXDEV, false;  // another device
    for (std::uint32_t inline_bytes : {256u, 0u}) {
      ibv_qp_init_attr how{};
      how.send_cq = how.recv_cq = completions_.get();
      how.srq = receives_.get();
      how.cap.max_send_wr = 2 * most_posted;  // a stripe is a write and a message
      how.cap.max_send_sge = how.cap.max_recv_sge = 1;
      how.cap.max_inline_data = inline_bytes;
      how.qp_type = IBV_QPT_RC;
      if (::rdma_create_qp(link.id, domain_.get(), &how) != 0) continue;
      link.inline_bytes = how.cap.max_inline_data;
      link_of_[link.id->qp->qp_num] = &link;
      return true;
    }
    return false;
  }
  void close(Link& link) {
    if (!link.id) return;
    if (link.id->qp) {
      link_of_.erase(link.id->qp->qp_num);
      ::rdma_disconnect(link.id);
      ::rdma_destroy_qp(link.id);  // from here on it reads and writes nothing
    }
    ::rdma_destroy_id(std::exchange(link.id, nullptr));
  }
  void break_with(Rank r, std::string_view why) {
    Peer& with = peer(r);
    if (with.is_broken) return;
    with.why = why;
    with.is_broken.store(true, std::memory_order_release);
    with.is_to_be_buried = any_to_be_buried_ = true;
    for (Link& link : with.links) link.is_up = false;
  }
  /// Ends what goes to those that broke; not while a completion of theirs is being looked at. True if there were any.
  bool bury() {
    if (!std::exchange(any_to_be_buried_, false)) return false;
    for (Peer& each : peers_)
      for (Link& link : each.links)
        if (each.is_to_be_buried && link.id && link.id->qp) ::rdma_disconnect(link.id);
    take_completions();  // what came before they broke
    for (Rank r = 0; r < static_cast<Rank>(peers_.size()); ++r) {
      if (!std::exchange(peer(r).is_to_be_buried, false)) continue;
      for (Link& link : peer(r).links) {
        close(link);
        for (const Waiting& each : link.waiting)
          if (each.buffer >= 0) free_.push_back(each.buffer);
        link.waiting.clear();
        for (int i = receives_count_; i < receives_count_ + most_messages; ++i)
          if (sending(i).link == &link) sending(i) = {}, free_.push_back(i);
        link.posted = 0;
      }
      for (std::uint32_t id = 1; id < payloads_.size(); ++id)
        if (Payload& payload = payloads_[id]; payload.is_used && payload.rank == r && payload.parts > 0) {
          payload.failed = true;
          payload.region.reset();
          if (payload.is_dropped) free(payload);
        }
    }
    go_on_with_all();
    return true;
  }

  // For the thread that looks after connections.

  int connection_event() const { return events_->fd; }
  void hear_of_connections() {
    for (bool any = false;; any = true) {
      // Locked from the first: librdmacm looks at queue pairs while it hands an event out.
      const std::lock_guard lock(mutex_);
      rdma_cm_event* event = nullptr;
      if (::rdma_get_cm_event(events_.get(), &event) != 0) return any ? (void)::eventfd_write(bell_.get(), 1) : void();
      rdma_cm_id* const id = event->id;
      const rdma_cm_event_type type = event->event;
      const int status = event->status;
      Hello hello;
      const bool is_request = type == RDMA_CM_EVENT_CONNECT_REQUEST;
      const bool says_hello = is_request && event->param.conn.private_data && event->param.conn.private_data_len >= sizeof hello;
      if (says_hello) std::memcpy(&hello, event->param.conn.private_data, sizeof hello);
      Link* const link = is_request ? nullptr : static_cast<Link*>(id->context);
      ::rdma_ack_cm_event(event);
      if (is_request) {
        if (!says_hello || !let_in(id, hello)) {
          ::rdma_reject(id, nullptr, 0);
          ::rdma_destroy_id(id);
        }
      } else if (!link || link->id != id || peer(link->rank).is_broken) {
        // the listener's, or of one that is broken
      } else if (type == RDMA_CM_EVENT_ADDR_RESOLVED) {
        if (::rdma_resolve_route(id, resolve_ms) != 0) break_with(link->rank, concat({"no route to it by this device: ", errno_text(errno)}));
      } else if (type == RDMA_CM_EVENT_ROUTE_RESOLVED) {
        const Hello mine{Hello{}.magic, key_, me_, static_cast<std::uint32_t>(link->stripe)};
        rdma_conn_param how = connection_parameters();
        how.private_data = &mine;
        how.private_data_len = sizeof mine;
        if (!make_queue_pair(*link) || ::rdma_connect(id, &how) != 0) break_with(link->rank, concat({"no queue pair to it: ", errno_text(errno)}));
      } else if (type == RDMA_CM_EVENT_ESTABLISHED) {
        const auto& out = peer(link->rank).out;
        if (!std::exchange(link->is_up, true) && std::ranges::find(out, link) != out.end()) ++peer(link->rank).up;
        if (credits_ == 0) {
          ibv_qp_attr look_again{};
          look_again.min_rnr_timer = 12;  // 0.64 ms after nobody had posted a receive, not the 655 that are usual
          (void)::ibv_modify_qp(link->id->qp, &look_again, IBV_QP_MIN_RNR_TIMER);
        }
        go_on(*link);
      } else if (type != RDMA_CM_EVENT_TIMEWAIT_EXIT) {
        break_with(link->rank, concat({::rdma_event_str(type), " (", status, ")"}));
      }
    }
  }
  /// False: a stranger, with whom the caller deals.
  bool let_in(rdma_cm_id* id, const Hello& hello) {
    if (hello.magic != Hello{}.magic || hello.key != key_ || hello.from < 0 || hello.from >= static_cast<Rank>(peers_.size()) || hello.from == me_ || hello.stripe >= static_cast<std::uint32_t>(options_.stripes)) return false;
    Peer& from = peer(hello.from);
    if (from.is_broken || from.in[hello.stripe]) return false;
    Link& link = from.links.emplace_back();
    link.rank = hello.from;
    link.stripe = static_cast<int>(hello.stripe);
    from.in[hello.stripe] = &link;
    link.id = id;
    id->context = &link;
    rdma_conn_param how = connection_parameters();
    if (!make_queue_pair(link) || ::rdma_accept(id, &how) != 0) break_with(hello.from, concat({"no queue pair for it: ", errno_text(errno)}));
    return true;
  }

  std::byte* buffer(int i) { return buffers_.data() + static_cast<std::size_t>(i) * message_bytes_; }
  Sending& sending(int i) { return sendings_[static_cast<std::size_t>(i - receives_count_)]; }
  int take_buffer() {
    const int i = free_.back();
    free_.pop_back();
    return i;
  }
  void post_receive(int i) {
    ibv_sge place{reinterpret_cast<std::uintptr_t>(buffer(i)), static_cast<std::uint32_t>(message_bytes_), region_->lkey};
    ibv_recv_wr request{}, *bad = nullptr;
    request.wr_id = receive_mark | static_cast<std::uint64_t>(i);
    request.sg_list = &place;
    request.num_sge = 1;
    (void)::ibv_post_srq_recv(receives_.get(), &request, &bad);
  }
  /// A message of that link's was taken, and its receive posted again.
  void took(Link& link) {
    ++link.took;
    if (credits_ == 0 || link.took - link.said < static_cast<std::uint64_t>(credits_ + 1) / 2) return;
    link.said = link.took;
    put(link, {-1, 0, {Note::room, 0, 0, 0, link.took, 0, 0, 0}});
  }

  bool has_room(const Link& link, const Waiting& next) const {
    if (!link.is_up || link.posted >= most_posted || (next.buffer < 0 && free_.empty())) return false;
    return credits_ == 0 || next.note.kind == Note::room || link.sent - link.allowed < static_cast<std::uint64_t>(credits_);
  }
  void put(Link& link, const Waiting& next) {
    if (link.waiting.empty() && has_room(link, next)) return post(link, next);
    if (next.note.kind == Note::room) link.waiting.push_front(next);  // which may be what the peer waits for
    else link.waiting.push_back(next);
    if (!std::exchange(link.is_listed, true)) listed_.push_back(&link);
    go_on(link);
  }
  void go_on(Link& link) {
    while (!link.waiting.empty() && has_room(link, link.waiting.front())) {
      const Waiting next = link.waiting.front();
      link.waiting.pop_front();
      post(link, next);
    }
  }
  void post(Link& link, Waiting next) {
    if (next.payload != 0) {
      Payload& payload = payloads_[next.payload];
      if (payload.generation != next.generation || !payload.is_used || payload.failed) return;
      if (!write(link, payload, next.note)) return break_with(link.rank, concat({"its queue pair takes nothing: ", errno_text(errno)}));
    }
    if (next.buffer < 0) {
      next.buffer = take_buffer();
      next.bytes = sizeof next.note;
      if (next.note.kind == Note::closed) next.note.address = next.note.key = next.note.bytes = 0;
      std::memcpy(buffer(next.buffer), &next.note, sizeof next.note);
    }
    ibv_sge place{reinterpret_cast<std::uintptr_t>(buffer(next.buffer)), next.bytes, region_->lkey};
    ibv_send_wr request{}, *bad = nullptr;
    request.wr_id = static_cast<std::uint64_t>(next.buffer);
    request.sg_list = &place;
    request.num_sge = 1;
    request.opcode = IBV_WR_SEND;
    request.send_flags = IBV_SEND_SIGNALED;
    if (next.bytes <= link.inline_bytes) request.send_flags |= IBV_SEND_INLINE;
    if ((errno = ::ibv_post_send(link.id->qp, &request, &bad)) != 0) {
      free_.push_back(next.buffer);
      return break_with(link.rank, concat({"its queue pair takes nothing: ", errno_text(errno)}));
    }
    sending(next.buffer) = {&link, next.payload, next.generation};
    ++link.posted;
    link.sent += next.note.kind != Note::room;
  }
  int stripes_of(std::size_t bytes) const { return bytes < options_.least_striped ? 1 : options_.stripes; }
  /// This link's stripe of the payload, to where the note says.
  bool write(Link& link, const Payload& payload, const Note& note) {
    const auto stripes = static_cast<std::size_t>(stripes_of(payload.bytes)), s = static_cast<std::size_t>(link.stripe);
    const std::size_t part = (payload.bytes / stripes + 63) / 64 * 64, first = std::min(part * s, payload.bytes), last = s + 1 == stripes ? payload.bytes : std::min(first + part, payload.bytes);
    if (first == last) return true;
    ibv_sge place{reinterpret_cast<std::uintptr_t>(payload.from + first), static_cast<std::uint32_t>(last - first), payload.region->mr->lkey};
    ibv_send_wr request{}, *bad = nullptr;
    request.wr_id = write_mark;
    request.sg_list = &place;
    request.num_sge = 1;
    request.opcode = IBV_WR_RDMA_WRITE;
    request.wr.rdma.remote_addr = note.address + first;
    request.wr.rdma.rkey = note.key;
    return (errno = ::ibv_post_send(link.id->qp, &request, &bad)) == 0;
  }

  /// True if there were any.
  bool take_completions() {
    std::array<ibv_wc, 32> done;
    bool any = false;
    for (int rounds = 0; rounds < 64; ++rounds) {
      const int count = ::ibv_poll_cq(completions_.get(), static_cast<int>(done.size()), done.data());
      for (int i = 0; i < count; ++i) completed(done[static_cast<std::size_t>(i)]);
      any = any || count > 0;
      if (count < static_cast<int>(done.size())) break;
    }
    if (any) go_on_with_all();
    return any;
  }
  void go_on_with_all() {
    std::erase_if(listed_, [this](Link* link) {
      go_on(*link);
      return link->waiting.empty() ? (link->is_listed = false, true) : false;
    });
  }
  void completed(const ibv_wc& done) {
    const auto found = link_of_.find(done.qp_num);
    Link* const link = found == link_of_.end() ? nullptr : found->second;
    if (done.wr_id & receive_mark) {
      const int i = static_cast<int>(done.wr_id & ~receive_mark);
      if (done.status == IBV_WC_SUCCESS && link) came(*link, i, done.byte_len);
      else post_receive(i);
    } else if (!(done.wr_id & write_mark)) {
      const int i = static_cast<int>(done.wr_id);
      if (!link || sending(i).link != link) return;  // of a queue pair that is gone
      const Sending was = std::exchange(sending(i), {});
      free_.push_back(i);
      --link->posted;
      if (was.payload != 0 && done.status == IBV_WC_SUCCESS) part_is_over(was.payload, was.generation);
    }
    if (done.status != IBV_WC_SUCCESS && link) break_with(link->rank, ::ibv_wc_status_str(done.status));
  }
  void came(Link& link, int i, std::uint32_t bytes) {
    const std::byte* const at = buffer(i);
    Note note;
    Message message;
    if (bytes == sizeof note) {
      std::memcpy(&note, at, sizeof note);
    } else if (bytes >= sizeof message.header) {
      std::memcpy(&message.header, at, sizeof message.header);
      message.bytes = bytes - sizeof message.header;
      const bool is_known = message.header.from == link.rank;
      if (!is_known) {
        // nobody's
      } else if (message.header.fetched) {
        message.bytes = message.header.frame.bytes;
        message.held.number = message.header.number;
        message.held.lane = message.header.lane;
      } else if (message.bytes == 0) {
        message.data = at;
      } else if (credits_ > 0 ? link.held < credits_ / 2 : held_ < receives_count_ / 2) {
        message.held.buffer = i;
        message.held.source = link.id->qp->qp_num;
        message.data = at + sizeof message.header;
        ++held_;
        ++link.held;
      } else {  // what nobody receives yet must not keep others from coming
        message.data = message.held.copy = new std::byte[message.bytes];
        std::memcpy(message.held.copy, at + sizeof message.header, message.bytes);
      }
      if (is_known) inbox_.push_back(message);
      if (message.held.buffer >= 0) return;
    }
    post_receive(i);
    if (note.kind == Note::room) {
      if (note.number <= link.sent) link.allowed = std::max(link.allowed, note.number);
    } else {
      took(link);
      if (note.kind != Note::none) noted(link, note);
    }
  }
  /// The peer says where a payload is to go, or that a part of one is here.
  void noted(Link& link, const Note& note) {
    for (std::uint32_t id = 1; id < payloads_.size(); ++id) {
      Payload& payload = payloads_[id];
      if (!payload.is_used || payload.failed || payload.rank != link.rank || payload.lane != note.lane || payload.number != note.number) continue;
      if (note.kind == Note::advert && payload.is_outgoing && !payload.is_advertised && note.bytes == payload.bytes) {
        payload.is_advertised = true;
        Note closing = note;
        closing.kind = Note::closed;
        for (int s = 0; s < payload.parts; ++s) put(*peer(link.rank).out[static_cast<std::size_t>(s)], {-1, 0, closing, id, payload.generation});
        return;
      }
      if (note.kind == Note::closed && !payload.is_outgoing) return part_is_over(id, payload.generation);
    }
  }

  Payload& begin(Flight& flight, Rank r, std::uint32_t lane, std::uint64_t number, std::size_t bytes, Registrations::Handle region) {
    std::uint32_t id = 1;
    while (id < payloads_.size() && payloads_[id].is_used) ++id;
    if (id == payloads_.size()) payloads_.emplace_back();
    Payload& payload = payloads_[id];
    payload.generation += 1;
    payload.rank = r;
    payload.lane = lane;
    payload.number = number;
    payload.bytes = bytes;
    payload.region = std::move(region);
    payload.parts = stripes_of(bytes);
    payload.is_used = true;
    flight.id = id;
    flight.generation = payload.generation;
    return payload;
  }
  void part_is_over(std::uint32_t id, std::uint32_t generation) {
    Payload& payload = payloads_[id];
    if (!payload.is_used || payload.generation != generation || payload.parts == 0 || --payload.parts > 0) return;
    payload.region.reset();
    if (payload.is_dropped) free(payload);
  }
  void end(Flight& flight) {
    if (Payload& payload = payloads_[std::exchange(flight.id, 0)]; payload.generation == flight.generation) free(payload);
  }
  static void free(Payload& payload) {
    const std::uint32_t generation = payload.generation;
    payload = {};
    payload.generation = generation;
  }
  void give_in(Rank r, Flight& flight) {
    flight.failed = true;
    break_with(r, concat({"memory cannot be registered with the RDMA device: ", errno_text(errno), "; is the limit of locked memory high enough (ulimit -l)?"}));
  }

  VerbsOptions options_;
  std::uint64_t key_;
  Rank me_;
  std::vector<Peer> peers_;
  RdmaEvents events_;
  RdmaId listener_;
  SocketAddress address_;
  ibv_context* context_ = nullptr;  // the listener's
  std::unique_ptr<ibv_pd, Destroys<&::ibv_dealloc_pd>> domain_;
  std::optional<Registrations> registrations_;
  std::unique_ptr<ibv_comp_channel, Destroys<&::ibv_destroy_comp_channel>> channel_;
  std::unique_ptr<ibv_cq, Destroys<&::ibv_destroy_cq>> completions_;
  std::unique_ptr<ibv_srq, Destroys<&::ibv_destroy_srq>> receives_;
  std::vector<std::byte> buffers_;
  std::unique_ptr<ibv_mr, Destroys<&::ibv_dereg_mr>> region_;
  std::size_t message_bytes_ = 0;
  std::vector<int> free_;  // buffers to send from
  std::array<Sending, most_messages> sendings_;
  std::unordered_map<std::uint32_t, Link*> link_of_;
  std::vector<Link*> listed_;  // those with something that waits
  std::deque<Payload> payloads_;
  std::deque<Message> inbox_;
  FileDescriptor epoll_{::epoll_create1(EPOLL_CLOEXEC)}, bell_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};  // the bell: something was heard of connections
  std::mutex mutex_;  // links, and what is sent over them: a rank's thread has them, and while they are made the thread above
  unsigned unacknowledged_ = 0;
  int held_ = 0, receives_count_ = 0, credits_ = 0;
  bool any_to_be_buried_ = false;
};
static_assert(Fabric<VerbsFabric>);

}  // namespace detail

using VerbsTransport = FabricTransport<detail::VerbsFabric>;

}  // namespace tally::inline v0
