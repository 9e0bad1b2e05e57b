// SPDX-License-Identifier: Apache-2.0
// Moves bytes over TCP. Each direction of each lane between two ranks is a connection of its own, opened by the sender when it has
// something to send, so it is a ring of slots like that of shared memory: in order, bounded by a window of unread bytes, and nothing
// waits behind what nobody receives yet. Long payloads go straight from the sender's memory and into the receiver's; if asked for by
// several connections more (stripes), each as fast as it is, while the channel's own has their headers and so their order.
#pragma once

#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "channels.hpp"
#include "concept.hpp"
#include "networked.hpp"
#include "queue.hpp"
#include "tcp_channel.hpp"

namespace tally::inline v0 {

class TcpTransport : public NetworkedTransport {
 public:
  TcpTransport(std::shared_ptr<detail::NetworkNode> node, std::uint64_t communicator, std::vector<Rank> members, const TcpOptions& options = {})
      : NetworkedTransport(std::move(node), communicator, std::move(members)), options_(options), frame_bytes_(std::max<std::size_t>(options.frame_bytes, 64)), window_(std::max(options.window, frame_bytes_ + detail::frame_cost)), channels_(options.lanes, size()),
        epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    if (!epoll_) throw TransportError(Errc::no_resources, {"no descriptor to wait with: ", detail::errno_text(errno)}, {me_, -1, 0, {}});
    for (Out& out : channels_.outs()) out.elsewhere = node_->is_elsewhere(origin(out.peer));
    for (In& in : channels_.ins()) in.elsewhere = node_->is_elsewhere(origin(in.peer));
  }

  int lanes() const { return options_.lanes; }
  std::size_t frame_bytes() const { return frame_bytes_; }
  std::string_view name() const { return "tcp"; }

  template <Probe P>
  void post(Transfer& t, P& probe) {
    channels_.post(t, [&](Out& out) { return advance_send(out, probe); });
  }
  void cancel(Transfer& t) {
    if (!t.pending) return;
    if (t.is_send) {
      if (Out& out = channels_.out(t); out.next == &t && std::exchange(out.begun, 0) > 0) out.give_up(ECONNABORTED);  // what follows would be taken for the rest of it
    } else if (In& in = channels_.in(t); in.receives.head == &t && in.announced > 0) {
      (void)ended(in, in.own, 0);  // the rest of it would be taken for another one's
    }
    channels_.remove(t);
  }

  template <Probe P>
  bool poll(P& probe) {
    return channels_.poll([&](Out& out) { return advance_send(out, probe); }, [&](In& in) { return advance_receive(in, probe); });
  }
  void flush() {}
  bool idle() const { return channels_.idle(); }

  Liveness liveness(Rank r) {
    if (r == me_) return Liveness::alive;
    inquire();
    const detail::Told told = node_->told(*group_, r);
    bool left = told.left != 0, is_broken = false, open = false;
    std::uint32_t opened = 0;
    for (int lane = 0; lane < lanes(); ++lane) {
      Out& out = channels_.out(lane, r);
      In& in = channels_.in(lane, r);
      if (told.left && !in.own.fd) find_channel(in);
      const auto any_is = [&](auto&& what) { return out.fd && (what(out.fd) || out.stripes.any(what)); };
      if (any_is(has_ended)) {
        read_credits(out);  // and why it has ended
        if (out.fd) out.give_up(ECONNRESET);  // what it has sent last may not have come
      }
      if (any_is([&](const detail::Stream& fd) { return detail::is_cut_off(fd.descriptor(), node_->patience_with_peers()); })) out.give_up(ETIMEDOUT);
      left = left || in.goodbye;
      is_broken = is_broken || in.ended || out.error != 0;
      open = open || (in.own.fd && !in.ended && in.receives.head);
      opened += in.own.fd || in.ended;
    }
    if (const bool dead = node_->is_dead(origin(r)); left || dead) {
      if (open || (told.left && opened < told.opened && !is_broken)) return Liveness::alive;  // what it sent may still be on its way
      return left ? Liveness::left : Liveness::dead;
    }
    return is_broken ? broken(r, "a connection", "something between them ends connections, or lets nothing pass") : Liveness::alive;
  }

  void abort(const AbortNotice& notice) {
    node_->abort(*group_, notice);
    interrupt();
  }

  template <class Recheck>
  void park(nanoseconds limit, Recheck&& recheck) {
    if (!recheck()) sleep(limit);
  }
  /// The same once nothing is to be looked at any more; `other`: a descriptor that ends it, too, when it is readable.
  void sleep(nanoseconds limit, int other = -1) {
    std::array<epoll_event, 16> events;
    if (sleep_on(epoll_.get(), other, limit)) (void)::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);  // so that what comes next is seen as new
  }
  void interrupt() { group_->ring(); }

  std::unique_ptr<TcpTransport> open(std::uint64_t token, std::span<const Rank> members) { return std::make_unique<TcpTransport>(node_, token, origins_of(members), options_); }

  void leave() {
    if (::getpid() != process_) return;  // a child that this rank forked: it never was a rank
    std::vector<detail::Opened> opened(static_cast<std::size_t>(size()));
    for (Out& out : channels_.outs()) {
      if (!out.greeted) continue;  // nobody knows of it
      auto& to = opened[static_cast<std::size_t>(out.peer)];
      to.to = origin(out.peer);
      ++to.channels;
      if (!out.fd || out.direct || out.striped) continue;
      detail::FrameHeader bye;  // where the network has no room for it, the registry's word has to do
      bye.kind = detail::FrameHeader::goodbye;
      if (options_.checksum) bye.seal = bye.own_seal();
      if (out.stage.empty()) (void)!out.fd.write(&bye, sizeof bye);
    }
    std::erase_if(opened, [](const detail::Opened& each) { return each.to < 0; });
    say_goodbye(opened);
  }

 private:
  using Out = detail::TcpOut;
  using In = detail::TcpIn;
  static constexpr const char* damaged = "a frame that was damaged on its way (its checksum differs)";
  static constexpr std::size_t most_ahead = 64;  // frames; the window has room for no more of the usual ones
  static constexpr std::size_t short_payload = std::size_t{8} << 10, stage_bytes = 2 * short_payload, buffer_bytes = std::size_t{64} << 10;

  void watch(int fd, std::uint32_t what) {
    epoll_event event{};
    event.events = what;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw TransportError(Errc::no_resources, {"cannot wait for a connection: ", detail::errno_text(errno)}, {me_, -1, 0, {}});
  }
  static bool again() { return errno == EAGAIN || errno == EWOULDBLOCK; }
  static bool has_ended(const detail::Stream& fd) {
    pollfd end{fd.get(), POLLRDHUP, 0};
    return ::poll(&end, 1, 0) > 0;
  }

  // Sending.

  void open_channel(Out& out) {
    int error = 0;
    out.fd = node_->connect_to(origin(out.peer), error);
    if (error != 0) return fail(out, error);
    watch(out.fd.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
    out.stage.grow(stage_bytes);
    say_hello(out, 0, out.stage);
  }
  void say_hello(const Out& out, std::uint32_t stripe, detail::StreamBuffer& to) {
    detail::ChannelHello hello;
    hello.lane = static_cast<std::uint32_t>(out.lane) | stripe << 16;
    hello.communicator = group_->communicator;
    hello.from = me_;
    hello.to = out.peer;
    hello.window = window_;
    hello.key = node_->key();
    to.append(&hello, sizeof hello);
  }
  /// A peer that is gone is not an error until something of it is missing; a path to it that is, is one at once.
  void fail(Out& out, int error) { fail(out, out.fd, error); }
  void fail(Out& out, const detail::Stream& fd, int error) {
    const std::string problem = fd.problem();
    out.give_up(error);
    throw_if_cut(out.peer, error, problem);
  }
  void throw_if_cut(Rank peer, int error, const std::string& problem) const {
    if (error == EPIPE || error == ECONNRESET || error == ECONNREFUSED || error == ECONNABORTED || error == EBADF) return;
    throw TransportError(error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS || error == EADDRNOTAVAIL ? Errc::no_resources : Errc::peer_lost,
                {"the connection from rank ", me_, " to rank ", peer, " (", address_of(peer), ") is cut: ", problem.empty() ? detail::errno_text(error) : problem}, {me_, peer, status_.sequence, {}});
  }

  static ssize_t send_both(Out& out) {
    std::array<iovec, 2> parts{{{const_cast<std::byte*>(out.stage.data()), out.stage.size()}, {const_cast<std::byte*>(out.direct->from + out.direct_from), out.direct_left}}};
    return out.fd.write(parts);
  }
  /// Hands the kernel what it takes of the stage and of what follows it. False if the connection is gone.
  bool write_out(Out& out) {
    while (!out.stage.empty() || out.direct) {
      const ssize_t sent = out.direct ? send_both(out) : out.fd.write(out.stage.data(), out.stage.size());
      if (sent < 0) {
        if (errno == EINTR) continue;
        if (!again()) return fail(out, errno), false;
        out.full = true;
        return true;
      }
      auto left = static_cast<std::size_t>(sent);
      out.greeted = true;  // the first of them, and short
      const std::size_t staged = std::min(left, out.stage.size());
      out.stage.take(staged);
      left -= staged;
      if (left > 0) {
        out.direct_from += left;
        out.direct_left -= left;
        if (out.direct_left == 0) {
          out.direct->done = out.direct_from;
          out.direct = nullptr;
        } else {
          out.direct->done = out.direct_from / out.direct->grain * out.direct->grain;
        }
      }
    }
    return true;
  }

  /// The stripe for t's next frame; 0: it goes by the channel's own connection; -1: it waits for one.
  int choose_stripe(Out& out, const Transfer& t) {
    if (options_.sockets <= 1 || t.bytes <= 2 * frame_bytes_) return 0;
    if (out.stripes.empty()) out.stripes.resize(static_cast<std::size_t>(std::min(options_.sockets, detail::FrameHeader::most_stripes)));
    return out.stripes.choose(t.bytes - out.begun, frame_bytes_, window_, [&](detail::TcpStripes::Stripe& stripe, std::uint32_t number) {
      int error = 0;
      try {
        stripe.fd = node_->connect_to(origin(out.peer), error);
        if (error == 0 && detail::is_scarce(stripe.fd.descriptor())) error = EMFILE;
        if (error == 0) watch(stripe.fd.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
      } catch (const Error&) {  // no descriptor: so it goes by fewer
        error = EMFILE;
      }
      if (error != 0) return void(stripe.fd = detail::Stream());
      // Beyond this a connection holds back what another one could carry sooner.
      detail::set_option(stripe.fd.descriptor(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, static_cast<int>(frame_bytes_));
      stripe.hello.grow(sizeof(detail::ChannelHello));
      say_hello(out, number, stripe.hello);
    });
  }
  /// Hands the kernel what it takes of the stripes' frames. False if a connection is gone.
  bool write_stripes(Out& out, bool& took) {
    const detail::TcpStripes::Wrote wrote = out.stripes.write(out.begun);
    if (wrote.broken) return fail(out, wrote.broken->fd, errno), false;
    took = wrote.any;
    out.full = (out.full || wrote.waits) && !wrote.any;
    Transfer& t = *out.striped;
    if (wrote.reached < t.bytes) t.done = wrote.reached / t.grain * t.grain;
    else if (out.stage.empty()) t.done = t.bytes;
    return true;
  }

  /// One long frame of each connection at most, or some short ones, so that what is received does not wait for long.
  template <Probe P>
  bool advance_send(Out& out, P& probe) {
    bool moved = false;
    for (int frames = 0; frames < 16; ++frames) {
      if (!out.fd && out.error == 0) open_channel(out);
      if (out.error != 0) return moved;
      const bool is_striped = out.striped != nullptr, has_payload = out.direct || (is_striped && out.stripes.busy());
      if (has_payload || !out.stage.empty()) {
        Transfer* const t = is_striped ? out.striped : out.direct;
        const std::size_t before = t ? t->done : 0, staged = out.stage.size();
        const bool was_full = std::exchange(out.full, false);
        bool took = false;
        if (has_payload && was_full) probe.trying(*t);
        else if (has_payload) probe.copying(*t);
        if (!write_out(out)) return moved;
        const bool blocked = out.full;
        if (is_striped) {
          if (!write_stripes(out, took)) return moved;
          moved = moved || took;
        }
        if (was_full && (took || out.stage.size() != staged || (t && (t->done != before || !(out.direct || is_striped))))) probe.drained(t ? *t : *out.sends.head, has_payload);
        if (out.stage.empty()) moved = complete(out, probe) || moved;
        if (t && t->done != before) {
          moved = true;
          counters_.bytes_sent += t->done - before;
          if (t->done == t->bytes) {
            begin_next(out);
            out.striped = nullptr;
            out.sends.pop();
          }
          probe.moved(*t);
        }
        if (blocked || (t && !is_striped)) return moved;
      }
      if (!out.next || !begin_frame(out, probe, moved)) return moved;
    }
    return moved;
  }
  /// The kernel has taken all of the stage, and with it these transfers.
  template <Probe P>
  bool complete(Out& out, P& probe) {
    bool any = false;
    while (out.sends.head && out.sends.head != out.next) {
      Transfer& t = *out.sends.head;
      out.sends.pop();
      probe.moved(t);
      any = true;
    }
    return any;
  }
  static void begin_next(Out& out) {
    out.next = out.next->next;
    out.begun = 0;
  }
  /// Puts the next frame on its way. False if there is none, or no room for it.
  template <Probe P>
  bool begin_frame(Out& out, P& probe, bool& moved) {
    Transfer& t = *out.next;
    if (out.begun == t.ready && t.bytes != 0) return false;
    const int stripe = choose_stripe(out, t);
    if (stripe < 0) return false;
    const auto room = [&] { return window_ - std::min<std::uint64_t>(out.sent - out.consumed, window_); };
    const std::size_t wanted = std::min<std::size_t>(t.ready - out.begun, frame_bytes_), least = t.bytes == 0 ? 0 : t.grain;
    if (room() < detail::frame_cost + least || (out.starved && room() < detail::frame_cost + wanted)) {
      read_credits(out);
      if (out.error != 0) return false;
      if (room() < detail::frame_cost + least) {
        if (out.asked == out.consumed) {
          detail::FrameHeader ask;
          ask.kind = detail::FrameHeader::ask;
          if (options_.checksum) ask.seal = ask.own_seal();
          out.stage.append(&ask, sizeof ask);
          out.asked = out.sent;
        }
        out.starved = true;
        if (!out.stage.empty()) (void)write_out(out);
        return false;
      }
    }
    if (std::exchange(out.starved, false)) probe.credited(t, out.credit);
    const std::size_t most = static_cast<std::size_t>(std::min<std::uint64_t>(wanted, room() - detail::frame_cost)), bytes = most - most % t.grain;
    detail::FrameHeader h;
    h.kind = detail::FrameHeader::data;
    h.bytes = static_cast<std::uint32_t>(bytes);
    h.total = t.bytes;
    h.operation = t.operation;
    const std::byte* const payload = t.from + out.begun;
    const std::size_t begin = std::exchange(out.begun, out.begun + bytes);
    h.flags = static_cast<std::uint8_t>(stripe * detail::FrameHeader::stripe_unit);
    if (begin == 0) h.flags |= detail::FrameHeader::first;
    if (out.begun == t.bytes) h.flags |= detail::FrameHeader::last;
    if (out.operation != t.operation || !std::exchange(out.any, true) || t.matching != Matching::order) {
      out.operation = t.operation;
      h.fingerprint = t.fingerprint;
      h.flags |= detail::FrameHeader::fingerprinted;
    }
    out.sent += detail::frame_cost + bytes;
    // So much of what is on its way is to be acknowledged as the rest of the message needs at least: what comes back unread would
    // reset the connection when this rank leaves.
    const std::uint64_t rest = t.bytes - out.begun, granted = window_ - (out.sent - std::max(out.asked, out.consumed));
    if (rest > 0 && rest + (rest + frame_bytes_ - 1) / frame_bytes_ * detail::frame_cost > granted && out.sent - std::max(out.asked, out.consumed) >= window_ / 4) {
      h.flags |= detail::FrameHeader::asks;
      out.asked = out.sent;
    }
    h.stamp(to_wire(out.elsewhere, probe.stamp(t)));
    if (options_.checksum) h.checksum = detail::crc32c(0, payload, bytes), h.seal = h.own_seal();
    out.stage.append(&h, sizeof h);
    ++counters_.frames_sent;
    counters_.messages_sent += begin == 0;
    counters_.overhead_sent += sizeof h;
    if (stripe > 0) {
      out.stripes.begin(stripe, payload, begin, bytes);
      out.striped = &t;
      return true;
    }
    if (bytes > short_payload || out.stage.room() < bytes + 2 * sizeof h) {
      out.direct = &t;
      out.direct_from = begin;
      out.direct_left = bytes;
      return true;
    }
    if (bytes > short_bytes) probe.copying(t);
    out.stage.append(payload, bytes);
    t.done += bytes;
    counters_.bytes_sent += bytes;
    if (t.done == t.bytes) begin_next(out);
    if (bytes > 0 && t.done < t.bytes) {
      moved = true;
      probe.moved(t);
    }
    return true;
  }
  /// What the peer has consumed, as it says.
  void read_credits(Out& out) {
    for (;;) {
      std::byte* const to = out.back.space(256);
      const ssize_t got = out.fd.read(to, out.back.space_left());
      if (got == 0) return out.give_up(ECONNRESET);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && !again()) return fail(out, errno);
      if (got > 0) out.back.added(static_cast<std::size_t>(got));
      while (out.back.size() >= sizeof(detail::FrameHeader)) {
        detail::FrameHeader h;
        std::memcpy(&h, out.back.data(), sizeof h);
        out.back.take(sizeof h);
        std::string fault = options_.checksum && h.seal != h.own_seal() ? damaged : detail::fault_of(h, false, 0);
        if (fault.empty() && (h.total > out.sent || h.total < out.consumed)) fault = detail::concat({"a credit for ", h.total, " bytes, of ", out.sent, " that were sent"});
        if (!fault.empty()) malformed(out.peer, fault);
        out.consumed = h.total;
        out.asked = std::max(out.asked, out.consumed);
        out.credit = from_wire(out.elsewhere, h.times());
      }
      if (got < 0) return;
    }
  }

  // Receiving.

  template <Probe P>
  bool advance_receive(In& in, P& probe) {
    if (!in.own.fd && !find_channel(in)) return false;
    Transfer* t = in.receives.head;
    if (in.framed && in.seen && t->done == t->ready && !in.part.is_whole()) return false;
    for (;;) {
      if (!in.framed) {
        // Of the message whose payloads come by stripes the next headers are read ahead, and nothing behind it.
        if (!in.striped.empty() && (in.announced == t->bytes || in.striped.size() == most_ahead)) break;
        if (!read_header(in, *t, probe)) {
          if (in.striped.empty() || in.ended) return false;
          break;
        }
      }
      if (!in.seen && !see_frame(in, t, probe)) return false;
      if (in.part.stripe == 0) break;
      in.striped.push_back(in.part);
      in.framed = false;
    }
    if (!in.striped.empty()) return receive_stripes(in, *t, probe);
    const std::size_t before = t->done;
    take_some(in, in.own, in.part, *t, probe);
    if (in.ended) return false;
    t->done = in.part.reached(t->grain);
    const bool is_whole = in.part.is_whole();
    if (t->done == before && !is_whole) return false;
    counters_.bytes_received += t->done - before;
    if (is_whole) {
      in.framed = false;
      finish_frame(in, in.part, *t, probe);
    }
    end_message(in, *t);
    probe.moved(*t);
    return true;
  }
  /// False if it is not there yet.
  template <Probe P>
  bool read_header(In& in, const Transfer& t, P& probe) {
    while (!in.framed) {
      if (in.own.buffer.size() < sizeof in.header) {
        if (!fill(in, in.own)) return false;
        continue;
      }
      std::memcpy(&in.header, in.own.buffer.data(), sizeof in.header);
      if (options_.checksum && in.header.seal != in.header.own_seal()) malformed(in.peer, damaged);
      if (const std::string fault = detail::fault_of(in.header, true, frame_bytes_); !fault.empty()) malformed(in.peer, fault);
      in.own.buffer.take(sizeof in.header);
      if (in.header.kind == detail::FrameHeader::goodbye) in.goodbye = true;
      else if (in.header.kind == detail::FrameHeader::ask) send_credit(in, probe.credit_stamp(t));
      else in.framed = true, in.seen = false;
    }
    return true;
  }
  /// Finds whose frame it is. False if nobody receives it yet.
  template <Probe P>
  bool see_frame(In& in, Transfer*& t, P& probe) {
    FrameInfo info = in.header.info();
    info.times = from_wire(in.elsewhere, info.times);
    info.begin = in.announced;
    if (t->matching != Matching::order && info.first && !in.receives.match(info, probe)) return false;
    t = in.receives.head;
    probe.arrived(*t, info);
    in.seen = true;
    if (info.begin > t->bytes || info.bytes > t->bytes - info.begin) malformed(in.peer, "more than was announced");
    const int stripe = in.header.stripe();
    if (stripe == 0 && !in.striped.empty()) malformed(in.peer, "a frame in the middle of what comes by other connections");
    in.part = {info.begin, info.bytes, 0, in.header.checksum, 0, stripe, (in.header.flags & detail::FrameHeader::asks) != 0, false, info.times};
    in.announced += info.bytes;
    counters_.messages_received += info.first;
    return true;
  }
  template <Probe P>
  [[gnu::noinline]] bool receive_stripes(In& in, Transfer& t, P& probe) {
    bool moved = false;
    for (const detail::TcpPart& each : in.striped)
      if (static_cast<std::size_t>(each.stripe) > in.stripes.size()) in.stripes.resize(static_cast<std::size_t>(each.stripe));
    for (std::size_t i = 0; i < in.stripes.size(); ++i) {
      detail::TcpSource& from = in.stripes[i];
      for (detail::TcpPart& part : in.striped) {
        if (static_cast<std::size_t>(part.stripe) != i + 1 || part.is_whole()) continue;
        if (!from.fd && !find(in, from, static_cast<int>(i) + 1)) {
          part.dry = true;
          break;
        }
        moved = take_some(in, from, part, t, probe) || moved;
        if (in.ended) return false;
        if (!part.is_whole()) break;
      }
    }
    std::size_t whole = 0;
    for (; whole < in.striped.size() && in.striped[whole].is_whole(); ++whole) finish_frame(in, in.striped[whole], t, probe);
    in.striped.erase(in.striped.begin(), in.striped.begin() + static_cast<std::ptrdiff_t>(whole));
    const std::size_t reached = in.striped.empty() ? in.announced : in.striped.front().reached(t.grain);
    if (reached == t.done) return moved;
    counters_.bytes_received += reached - t.done;
    t.done = reached;
    end_message(in, t);
    probe.moved(t);
    return true;
  }
  /// All of it is here, and of those before it.
  template <Probe P>
  void finish_frame(In& in, const detail::TcpPart& part, const Transfer& t, P& probe) {
    if (options_.checksum && part.checksum != part.expected) malformed(in.peer, damaged);
    in.consumed += detail::frame_cost + part.bytes;
    if (part.asks) send_credit(in, probe.credit_stamp(t));
  }
  static void end_message(In& in, const Transfer& t) {
    if (t.done < t.bytes) return;
    in.announced = 0;
    in.receives.pop();
  }
  /// What is there of a frame, as far as there is a place for it. True if there was any.
  template <Probe P>
  bool take_some(In& in, detail::TcpSource& from, detail::TcpPart& part, Transfer& t, P& probe) {
    bool any = false;
    while (!part.is_whole() && part.begin + part.taken < t.ready) {
      if (!(t.fold ? fold_some(in, from, part, t, probe) : copy_some(in, from, part, t, probe))) {
        part.dry = true;
        break;
      }
      any = true;
    }
    return any;
  }
  template <Probe P>
  static void has_come(detail::TcpPart& part, Transfer& t, P& probe) {
    if (std::exchange(part.dry, false)) probe.continued(t, part.times);
  }
  /// From what was read already, or straight from the kernel into its place.
  template <Probe P>
  bool copy_some(In& in, detail::TcpSource& from, detail::TcpPart& part, Transfer& t, P& probe) {
    const std::size_t rest = part.bytes - part.taken, most = std::min(rest, t.ready - part.begin - part.taken);
    std::byte* const to = t.to + part.begin + part.taken;
    std::size_t got = std::min(most, from.buffer.size());
    if (got > 0) {
      if (part.bytes > short_bytes) probe.copying(t);
      std::memcpy(to, from.buffer.data(), got);
      if (options_.checksum) part.checksum = detail::crc32c(part.checksum, to, got);
      from.buffer.take(got);
    } else if (most < short_payload) {
      return fill(in, from) && (has_come(part, t, probe), true);
    } else {
      if (part.dry) probe.trying(t);
      else probe.copying(t);
      // What follows a frame on the channel's own connection is the next one's header, most likely.
      std::array<iovec, 2> parts{{{to, most}, {from.buffer.space(buffer_bytes), sizeof in.header}}};
      ssize_t read = 0;
      do read = from.fd.read(std::span(parts).first(most == rest && part.stripe == 0 ? 2 : 1));
      while (read < 0 && errno == EINTR);
      if (read <= 0) return read == 0 || !again() ? ended(in, from, read == 0 ? 0 : errno) : false;
      has_come(part, t, probe);
      got = std::min(static_cast<std::size_t>(read), most);
      if (options_.checksum) part.checksum = detail::crc32c(part.checksum, to, got);
      from.buffer.added(static_cast<std::size_t>(read) - got);
    }
    part.taken += got;
    return true;
  }
  /// Whole elements, out of the buffer.
  template <Probe P>
  bool fold_some(In& in, detail::TcpSource& from, detail::TcpPart& part, Transfer& t, P& probe) {
    const std::size_t at = part.begin + part.taken, most = std::min(part.bytes - part.taken, t.ready - at);
    std::size_t have = std::min(most, from.buffer.size());
    have -= have % t.grain;
    if (have == 0) {
      if (from.buffer.room() < t.grain) from.buffer.grow(2 * std::size_t{t.grain});
      return fill(in, from) && (has_come(part, t, probe), true);
    }
    if (part.bytes > short_bytes) probe.reducing(t);
    if (options_.checksum) part.checksum = detail::crc32c(part.checksum, from.buffer.data(), have);
    std::byte* const to = t.to + at;
    const std::byte* const acc = t.from + at;
    if (t.side == Side::right) (*t.fold)(to, acc, from.buffer.data(), have);
    else (*t.fold)(to, from.buffer.data(), acc, have);
    from.buffer.take(have);
    part.taken += have;
    return true;
  }

  bool find_channel(In& in) {
    if (in.ended || !find(in, in.own, 0)) return false;
    // The sender waits for credits, not for TCP's own acknowledgements: of small messages these cost a tenth of the time.
    detail::set_option(in.own.fd.descriptor(), IPPROTO_TCP, TCP_QUICKACK, 0);
    return true;
  }
  bool find(In& in, detail::TcpSource& source, int stripe) {
    Rank to = -1;
    std::uint64_t window = 0;
    source.fd = node_->claim(group_->communicator, in.lane | stripe << 16, in.peer, to, window);
    if (!source.fd) return false;
    source.buffer.grow(buffer_bytes);
    if (to != me_) malformed(in.peer, detail::concat({"what is for rank ", to}));
    if (window != window_) malformed(in.peer, detail::concat({"a window of ", window, " bytes where this rank has ", window_}));
    watch(source.fd.get(), EPOLLIN | EPOLLRDHUP | EPOLLET);
    return true;
  }
  /// More bytes into the buffer; false if there are none.
  bool fill(In& in, detail::TcpSource& from) {
    for (;;) {
      std::byte* const to = from.buffer.space(from.buffer.room());
      const ssize_t got = from.fd.read(to, from.buffer.space_left());
      if (got > 0) return from.buffer.added(static_cast<std::size_t>(got)), true;
      if (got < 0 && errno == EINTR) continue;
      return got == 0 || !again() ? ended(in, from, got == 0 ? 0 : errno) : false;
    }
  }
  /// Nothing more will come.
  bool ended(In& in, const detail::TcpSource& from, int error) {
    in.ended = true;
    const std::string problem = from.fd.problem();
    in.own.fd = detail::Stream();
    in.stripes.clear();
    if (error != 0) throw_if_cut(in.peer, error, problem);
    return false;
  }
  void send_credit(In& in, const FrameTimes& times) {
    detail::FrameHeader h;
    h.kind = detail::FrameHeader::credit;
    h.total = in.consumed;
    h.stamp(to_wire(in.elsewhere, times));
    if (options_.checksum) h.seal = h.own_seal();
    // The kernel always has room for the few that may be on their way; a sender that asks for more than it reads loses them.
    while (in.own.fd.write(&h, sizeof h) < 0 && errno == EINTR) {}
  }

  TcpOptions options_;
  std::size_t frame_bytes_;
  std::uint64_t window_;
  detail::Channels<Out, In> channels_;
  detail::FileDescriptor epoll_;
};

}  // namespace tally::inline v0
