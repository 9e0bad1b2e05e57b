// SPDX-License-Identifier: Apache-2.0
// Frames between ranks whose devices cannot store to each other's memory, because they are on different hosts. What a kernel sends it leaves
// in a box in memory of its host's, and what is sent to it it finds in another one; a thread takes the one to the other over the network.
// Kernels wait for frames and for room as everywhere, so deadlines, blame and failures are theirs, and frames go while others are folded.
#pragma once

#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../device/session.hpp"
#include "../device/window.hpp"
#include "../error.hpp"
#include "../quiet_thread.hpp"
#include "../transport/any.hpp"

namespace tally::inline v0::detail {

class DeviceRelay {
 public:
  /// Of the host's memory, zero, that the device reaches, too: so much for each rank that is far.
  static std::size_t bytes_each(const device::WindowLayout& layout) { return 2 * side(layout); }

  /// `far`: the ranks that it is for. `tell(word, why)`: this rank's kernels, and those of all that are not far, are to give up
  /// (device::Broken); called by the relay's thread, and does not throw.
  DeviceRelay(std::unique_ptr<AnyTransport> transport, const device::WindowLayout& layout, const std::vector<Rank>& far, std::byte* memory, std::function<void(std::uint32_t, const std::string&)> tell) : transport_(std::move(transport)), layout_(layout), tell_(std::move(tell)), index_(static_cast<std::size_t>(transport_->size())) {
    for (const Rank r : far) {
      peers_.push_back(std::make_unique<Peer>(r, memory, layout));
      index_[static_cast<std::size_t>(r)] = peers_.back().get();
      memory += bytes_each(layout);
    }
    for (const auto& peer : peers_) listen(*peer);
  }
  DeviceRelay(const DeviceRelay&) = delete;
  /// begin() is called by its thread first. Throws std::system_error where there can be none.
  template <class F>
  void start(F&& begin) {
    thread_ = quiet_thread([this, begin] { run(begin); });
  }
  /// When nothing is on its way to anybody any more, or nobody waits for it.
  ~DeviceRelay() {
    stopping_.store(true);
    if (thread_.joinable()) transport_->interrupt(), thread_.join();
    for (const auto& peer : peers_) forget(*peer);
    transport_->leave();
  }

  /// In place of that rank's window: its first word is where kernels say that it is over.
  std::byte* window(Rank far) const { return peer_of(far).out; }
  std::byte* box_to(Rank far) const { return window(far) + line; }
  std::byte* box_from(Rank far) const { return peer_of(far).in + line; }
  /// That rank's kernels are to give up. By any thread.
  void tell(Rank far, std::uint32_t broken) { store(window(far), broken); }
  /// This rank's kernels are about to send something. By any thread.
  void wake() {
    woken_.store(true);
    transport_->interrupt();
  }
  /// From here on a rank may leave without harm to anybody.
  void expect_to_close() { closing_.store(true); }

  // A probe of the transport's (see Probe).
  static void arrived(const Transfer& t, const FrameInfo& frame) {
    if (!frame.fits(t)) throw Error(Errc::protocol, {"rank ", t.peer, " sent ", frame.total, " bytes to the relay of devices, where ", t.bytes, " were due"}, {-1, t.peer, 0, {}});
  }
  static Transfer* unexpected(Rank, const FrameInfo&) { return nullptr; }
  static void credited(const Transfer&, const FrameTimes&) {}
  static void fetched(const Transfer&, const FrameTimes&) {}
  static void continued(const Transfer&, const FrameTimes&) {}
  static void drained(const Transfer&, bool = false) {}
  static void copying(const Transfer&) {}
  static void trying(const Transfer&) {}
  static void reducing(const Transfer&) {}
  static void moved(const Transfer&) {}
  static FrameTimes stamp(const Transfer&) { return {}; }
  static FrameTimes credit_stamp(const Transfer&) { return {}; }

 private:
  static constexpr std::size_t line = 128;
  static constexpr std::uint32_t long_idle = 4000;  // turns in vain, about two seconds
  static std::size_t side(const device::WindowLayout& layout) { return line + layout.box_bytes(); }

  enum class Kind : std::uint32_t { frame, credit, broken, call };
  /// What goes over the network; after a frame's its elements.
  struct Message {
    Kind kind{};
    std::uint32_t block = 0;
    std::uint32_t number = 0;  // of the frame; frames taken; why it is over; of the call
    std::uint32_t unused = 0;
    device::FrameHeader frame;
  };
  struct Parcel {
    Message message;
    Transfer head, body;
    bool under_way() const { return head.pending || body.pending; }
  };
  struct Peer {
    Peer(Rank r, std::byte* memory, const device::WindowLayout& l) : rank(r), out(memory), in(memory + side(l)), frames(static_cast<std::size_t>(l.blocks) * l.frames), credits(static_cast<std::size_t>(l.blocks)), sent(credits.size()), taken(credits.size()), received(credits.size()), credited(credits.size()) {}
    const Rank rank;
    std::byte* const out;  // where kernels leave what they send, and find what was sent to them
    std::byte* const in;
    std::vector<Parcel> frames, credits;  // of each block
    Parcel broken, call, incoming;
    bool has_head = false;                // of what comes
    std::uint32_t told_broken = 0, told_call = 0, sent_call = 0;
    std::vector<std::uint32_t> sent, taken;         // of each block: frames that have left, and those for which credit was given
    std::vector<std::uint32_t> received, credited;  // and what the other side says of itself
    bool is_gone = false;  // or has left
  };

  static std::uint32_t load(const std::byte* word) { return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(const_cast<std::byte*>(word))).load(std::memory_order_acquire); }
  static void store(std::byte* word, std::uint32_t value) { std::atomic_ref(*reinterpret_cast<std::uint32_t*>(word)).store(value, std::memory_order_release); }
  Peer& peer_of(Rank far) const { return *index_[static_cast<std::size_t>(far)]; }

  template <class F>
  void run(const F& begin) {
    ::prctl(PR_SET_TIMERSLACK, 1000UL);  // naps are short
    Rank culprit = -1;
    std::string why;
    try {
      begin();
      for (std::uint32_t idle = 0; !stopping_.load(std::memory_order_relaxed);) {
        idle = turn() || woken_.exchange(false) ? 0 : idle + 1;
        watch(idle);
        if (idle > 0 && rest(idle)) idle = 0;
      }
      for (const auto end = Now::now() + std::chrono::milliseconds(100); (turn() || is_sending() || transport_->has_rest()) && Now::now() < end;) transport_->settle();
      return;
    } catch (const Error& error) {
      culprit = error.context().peer;
      why = error.text();
    } catch (const std::exception& error) {
      why = error.what();
    }
    if (!is_over_) tell_(device::Broken{device::Failure::lost, culprit}.pack(), why);
    try {
      transport_->abort({Errc::aborted, transport_->rank(), culprit, why});
    } catch (const std::exception&) {  // the first reason is the one that counts
    }
  }
  using Now = std::chrono::steady_clock;
  /// False if there was nothing to do.
  bool turn() {
    bool moved = transport_->poll(*this);
    for (const auto& peer : peers_) {
      if (peer->is_gone) {
        miss(*peer);
        continue;
      }
      moved = hear(*peer) || moved;
      moved = speak(*peer) || moved;
    }
    return moved;
  }
  /// Kernels ring no bell, so it looks again and again; the less has happened, and since their launch, the more seldom.
  /// True if there was something to do after all.
  bool rest(std::uint32_t idle) {
    if (idle < (transport_->crowded() ? 4 : 200)) return std::this_thread::yield(), false;
    const nanoseconds most = idle < long_idle ? std::chrono::microseconds(500) : std::chrono::milliseconds(5);
    bool moved = false;
    transport_->park(std::min<nanoseconds>(std::chrono::microseconds(20) * (1 + idle / 64), most), [&] { return (moved = turn()) || stopping_.load(std::memory_order_relaxed) || woken_.load(std::memory_order_relaxed) || transport_->aborted(); });
    return moved;
  }
  void watch(std::uint32_t idle) {
    const auto now = Now::now();
    if (now < next_watch_) return;
    next_watch_ = now + std::chrono::milliseconds(idle < long_idle ? 20 : 100);
    if (transport_->aborted()) {
      const AbortNotice notice = transport_->abort_notice();
      throw Error(Errc::aborted, notice.text, {-1, notice.peer < 0 ? notice.rank : notice.peer, 0, {}});
    }
    for (const auto& peer : peers_) {
      if (peer->is_gone) continue;
      tell_call(*peer);
      const Liveness liveness = transport_->liveness(peer->rank);
      if (liveness == Liveness::alive) continue;
      while (turn()) {  // it may have sent everything before it went
      }
      peer->is_gone = true;
      forget(*peer);
      if (liveness == Liveness::dead) lose(*peer);
    }
  }
  /// All are to know that a rank is gone, unless something else came before: it may have left for that.
  void lose(const Peer& peer) {
    if (std::exchange(is_over_, true)) return;
    const std::uint32_t lost = device::Broken{device::Failure::lost, peer.rank}.pack();
    for (const auto& other : peers_) tell(other->rank, lost);  // ranks of its host see nothing of it
    tell_(lost, {});
  }
  /// A rank that has left had sent what it had to send; but what is for it now nobody takes.
  void miss(const Peer& peer) {
    if (is_over_ || closing_.load()) return;
    for (int b = 0; b < layout_.blocks; ++b)
      if (load(peer.out + line + layout_.arrived(b)) != peer.sent[static_cast<std::size_t>(b)]) return lose(peer);
  }
  /// In which call this rank is, so that one that waits for it finds out that it makes another one. Of short calls nobody needs to know.
  void tell_call(Peer& peer) {
    if (peer.call.under_way()) return;
    for (std::uint32_t i = 0; i < 4; ++i) {
      const auto& word = *reinterpret_cast<const device::CallWord*>(peer.out + line + layout_.call(i));
      const auto* const number_at = reinterpret_cast<const std::byte*>(&word.number);
      const std::uint32_t number = load(number_at);
      const std::uint64_t fingerprint = std::atomic_ref(const_cast<std::uint64_t&>(word.fingerprint)).load(std::memory_order_acquire);
      if (fingerprint == 0 || static_cast<std::int32_t>(number - peer.told_call) <= 0 || load(number_at) != number) continue;
      peer.told_call = number;
      peer.call.message = {Kind::call, 0, number, 0, {}};
      peer.call.message.frame.fingerprint = fingerprint;
    }
    if (peer.call.message.frame.fingerprint != 0 && std::exchange(peer.sent_call, peer.told_call) != peer.told_call) send(peer, peer.call);
  }

  void post(Transfer& t, Rank peer, const std::byte* from, std::byte* to, std::size_t bytes) {
    t = Transfer{};
    t.peer = peer;
    t.from = from, t.to = to;
    t.is_send = from != nullptr;
    t.bytes = t.ready = bytes;
    if (bytes > 0) transport_->post(t, *this);
  }
  void send(Peer& peer, Parcel& parcel, const std::byte* body = nullptr) {
    post(parcel.head, peer.rank, reinterpret_cast<const std::byte*>(&parcel.message), nullptr, sizeof parcel.message);
    if (body) post(parcel.body, peer.rank, body, nullptr, parcel.message.frame.bytes);
  }
  /// What this rank's kernels have to say to that one.
  bool speak(Peer& peer) {
    bool moved = false;
    const std::byte* const box = peer.out + line;
    for (int b = 0; b < layout_.blocks; ++b) {
      const auto i = static_cast<std::size_t>(b);
      for (const std::uint32_t arrived = load(box + layout_.arrived(b)); peer.sent[i] != arrived; moved = true) {
        Parcel& parcel = peer.frames[i * layout_.frames + peer.sent[i] % layout_.frames];
        if (parcel.under_way()) break;  // its credit may be here before the network says that it is done
        const std::byte* const frame = box + layout_.frame(b, peer.sent[i]);
        parcel.message = {Kind::frame, static_cast<std::uint32_t>(b), peer.sent[i], 0, {}};
        std::memcpy(&parcel.message.frame, frame, sizeof parcel.message.frame);
        if (parcel.message.frame.bytes > layout_.frame_bytes || arrived - peer.sent[i] > layout_.frames) throw Error(Errc::protocol, "this rank's device sent a frame that cannot be", {-1, transport_->rank(), 0, {}});
        ++peer.sent[i];
        send(peer, parcel, frame + sizeof parcel.message.frame);
      }
      if (const std::uint32_t consumed = load(box + layout_.consumed(b)); consumed != peer.taken[i] && !peer.credits[i].under_way()) {
        peer.taken[i] = consumed;
        peer.credits[i].message = {Kind::credit, static_cast<std::uint32_t>(b), consumed, 0, {}};
        send(peer, peer.credits[i]);
        moved = true;
      }
    }
    if (const std::uint32_t broken = load(peer.out); broken != peer.told_broken && !peer.broken.under_way()) {
      peer.told_broken = broken, is_over_ = true;
      peer.broken.message = {Kind::broken, 0, broken, 0, {}};
      send(peer, peer.broken);
      moved = true;
    }
    return moved;
  }
  bool is_sending() const {
    return std::ranges::any_of(peers_, [](const auto& peer) {
      const auto busy = [](const Parcel& parcel) { return parcel.under_way(); };
      return !peer->is_gone && (busy(peer->broken) || std::ranges::any_of(peer->frames, busy) || std::ranges::any_of(peer->credits, busy));
    });
  }

  void listen(Peer& peer) {
    peer.has_head = false;
    post(peer.incoming.head, peer.rank, nullptr, reinterpret_cast<std::byte*>(&peer.incoming.message), sizeof peer.incoming.message);
  }
  /// What has come from there.
  bool hear(Peer& peer) {
    bool moved = false;
    for (; !peer.incoming.under_way(); moved = true) {
      const Message& m = peer.incoming.message;
      if (!peer.has_head) {
        expect(peer, m);
        peer.has_head = true;
        if (m.kind == Kind::frame) {
          post(peer.incoming.body, peer.rank, nullptr, peer.in + line + layout_.frame(static_cast<int>(m.block), m.number) + sizeof m.frame, m.frame.bytes);
          continue;
        }
      }
      deliver(peer, m);
      listen(peer);
    }
    return moved;
  }
  /// It says only what can be true.
  void expect(Peer& peer, const Message& m) const {
    const auto refuse = [&](const char* what) { throw Error(Errc::protocol, {"rank ", peer.rank, " sent ", what, " to the relay of devices"}, {-1, peer.rank, 0, {}}); };
    const auto i = static_cast<std::size_t>(m.block);
    if (m.block >= static_cast<std::uint32_t>(layout_.blocks)) refuse("something for a block that is none");
    if (m.kind == Kind::frame) {
      if (m.number != peer.received[i] || m.number - load(peer.out + line + layout_.consumed(static_cast<int>(m.block))) >= layout_.frames) refuse("a frame that has no place");
      if (m.frame.bytes == 0 || m.frame.bytes > layout_.frame_bytes || m.frame.count == 0 || m.frame.bytes % m.frame.count != 0) refuse("a frame of a size that cannot be");
    } else if (m.kind == Kind::credit) {
      if (m.number - peer.credited[i] > peer.sent[i] - peer.credited[i]) refuse("credit for frames that were not sent");
    } else if (m.kind == Kind::broken) {
      const device::Broken broken = device::Broken::unpack(m.number);
      if (broken.why == device::Failure::none || broken.why > device::Failure::lost || broken.missing >= transport_->size()) refuse("that it is over for no reason");
    } else if (m.kind != Kind::call) {
      refuse("a message of no kind");
    }
  }
  void deliver(Peer& peer, const Message& m) {
    const auto i = static_cast<std::size_t>(m.block);
    const int b = static_cast<int>(m.block);
    std::byte* const box = peer.in + line;
    switch (m.kind) {
      case Kind::frame:
        std::memcpy(box + layout_.frame(b, m.number), &m.frame, sizeof m.frame);
        return store(box + layout_.arrived(b), ++peer.received[i]);
      case Kind::credit: return store(box + layout_.consumed(b), peer.credited[i] = m.number);
      case Kind::broken:
        if (!std::exchange(is_over_, true)) tell_(m.number, {});
        return;
      case Kind::call: {
        auto& word = *reinterpret_cast<device::CallWord*>(box + layout_.call(m.number));
        std::atomic_ref(word.fingerprint).store(m.frame.fingerprint, std::memory_order_relaxed);
        return store(reinterpret_cast<std::byte*>(&word.number), m.number);
      }
    }
  }
  void forget(Peer& peer) {
    const auto cancel = [&](Parcel& parcel) {
      for (Transfer* t : {&parcel.head, &parcel.body})
        if (t->pending) transport_->cancel(*t);
    };
    for (Parcel& each : peer.frames) cancel(each);
    for (Parcel& each : peer.credits) cancel(each);
    cancel(peer.broken), cancel(peer.call), cancel(peer.incoming);
  }

  std::unique_ptr<AnyTransport> transport_;
  const device::WindowLayout layout_;
  std::function<void(std::uint32_t, const std::string&)> tell_;
  std::vector<Peer*> index_;  // of each rank; null: not far
  std::vector<std::unique_ptr<Peer>> peers_;
  Now::time_point next_watch_{};
  bool is_over_ = false;  // somebody was told; what comes of that is no news
  std::atomic<bool> stopping_{false}, closing_{false}, woken_{false};
  std::thread thread_;
};

}  // namespace tally::inline v0::detail
