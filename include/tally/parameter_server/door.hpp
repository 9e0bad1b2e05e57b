// SPDX-License-Identifier: Apache-2.0
// Where members of a table come in that are no ranks of its communicator: readers, and workers that come later. A thread of each
// server's looks after their connections and touches nothing of the table: what they say waits until whoever drives the server takes
// it, and what they are sent is written straight from leased values, while the table goes on. Nothing that comes in here is trusted.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../environment.hpp"
#include "../network/control.hpp"
#include "../network/interfaces.hpp"
#include "../quiet_thread.hpp"
#include "post.hpp"

namespace tally::inline v0::detail {

inline constexpr std::uint32_t door_protocol = 1;  // raise when anything below changes its meaning
inline constexpr std::size_t longest_notice = std::size_t{64} << 20;  // of what a guest is told about the table

/// The door's first word, to who connects.
struct DoorChallenge {
  std::uint64_t magic = 0x726f6f64796c6c61ull;  // "allydoor"
  std::uint32_t protocol = door_protocol;
  std::uint32_t secured = 0;  // only who knows the secret may come in
  Nonce nonce{};
};
/// And the guest's.
struct DoorHello {
  std::uint64_t magic = 0x74736575676c6c61ull;  // "allguest"
  std::uint32_t protocol = door_protocol;
  std::uint32_t unused = 0;
  Nonce nonce{};
  Digest proof{};
};
/// Then the door again; the table's description follows, or why the guest may not come in.
struct DoorWelcome {
  std::uint32_t refused = 0, bytes = 0;
  std::uint32_t shard = 0, unused = 0;  // whose server's door it is
  Digest proof{};
};
/// From then on, both ways, messages about the table with their payloads.
struct DoorMessage {
  Envelope e;
  std::uint64_t late_age = 0;  // nanoseconds since `culprit` let go on what this answers
  std::int32_t culprit = -1;
  std::uint32_t unused = 0;
};
static_assert(sizeof(DoorMessage) == 96);

inline Digest door_proof(std::string_view secret, std::string_view role, const Nonce& nonce) { return proof_of(secret, role, nonce, "a table"); }

/// What a guest has to know of a table.
struct TableNotice {
  Table table;
  std::vector<SocketAddress> doors;  // by shard

  std::string bytes() const {
    std::string out;
    const auto put = [&](auto value) { out.append(reinterpret_cast<const char*>(&value), sizeof value); };
    const TableOptions& o = table.options;
    put(static_cast<std::uint32_t>(table.rule.type)), put(static_cast<std::uint32_t>(table.rule.grain));
    put(std::uint32_t{o.consistency.bounded}), put(o.consistency.staleness), put(std::uint32_t{o.fold.waits()});
    put(std::int32_t{o.replicas}), put(std::int32_t{o.guests}), put(std::uint64_t{table.credits()}), put(std::uint64_t{o.block_bytes});
    put(std::int32_t{table.size}), put(static_cast<std::uint32_t>(table.regulars())), put(static_cast<std::uint32_t>(table.servers.size())), put(static_cast<std::uint32_t>(table.tensors.size()));
    for (std::size_t w = 0; w < table.regulars(); ++w) put(std::int32_t{table.workers[w]});
    for (std::size_t s = 0; s < table.servers.size(); ++s) put(std::int32_t{table.servers[s]}), put(doors[s]);
    for (const TensorSpec& t : table.tensors) {
      put(std::uint64_t{t.count}), put(std::uint64_t{t.row}), put(t.first_key), put(t.last_key), put(static_cast<std::uint32_t>(t.name.size()));
      out += t.name;
    }
    return out;
  }
  /// Errc::protocol if it makes no sense.
  static TableNotice of(std::string_view in) {
    const auto wrong = [] { throw Error(Errc::protocol, "what the door says of its table makes no sense"); };
    const auto take = [&](auto& value) {
      if (!ControlStream::take(in, value)) wrong();
    };
    TableNotice n;
    TableOptions& o = n.table.options;
    std::uint32_t type = 0, grain = 0, bounded = 0, waits = 0, regulars = 0, servers = 0, tensors = 0;
    std::uint64_t credits = 0, block_bytes = 0;
    std::int32_t replicas = 0, guests = 0, size = 0;
    take(type), take(grain), take(bounded), take(o.consistency.staleness), take(waits), take(replicas), take(guests), take(credits), take(block_bytes), take(size), take(regulars), take(servers), take(tensors);
    constexpr std::uint32_t most = 1 << 16;
    if (grain == 0 || grain > most || replicas < 0 || replicas > 1 || guests < 0 || guests > static_cast<int>(most) || credits == 0 || credits >> 48 != 0 || block_bytes < grain || block_bytes >> 48 != 0 || size < 1 || size > static_cast<int>(most) || regulars > most || servers < 1 ||
        servers > static_cast<std::uint32_t>(size) || tensors < 1 || tensors > most || in.size() < 4 * std::size_t{regulars})
      wrong();
    n.table.rule.type = static_cast<decltype(n.table.rule.type)>(type);
    n.table.rule.grain = grain;
    o.consistency.bounded = bounded != 0;
    if (waits) o.fold = FoldOrder::by_rank();
    o.replicas = replicas, o.guests = guests, o.credits = credits, o.block_bytes = block_bytes, o.one_sided = false;
    n.table.size = size;
    const auto take_rank = [&](std::vector<Rank>& to) {
      std::int32_t r = -1;
      take(r);
      if (r < 0 || r >= size) wrong();
      to.push_back(r);
    };
    for (std::uint32_t i = 0; i < regulars; ++i) take_rank(n.table.workers);
    for (Rank g = 0; g < guests; ++g) n.table.workers.push_back(size + g);
    for (std::uint32_t i = 0; i < servers; ++i) {
      take_rank(n.table.servers);
      take(n.doors.emplace_back());
      if (!n.doors.back().is_valid()) wrong();
    }
    for (std::uint32_t i = 0; i < tensors; ++i) {
      TensorSpec t;
      std::uint64_t count = 0, row = 0;
      std::uint32_t length = 0;
      take(count), take(row), take(t.first_key), take(t.last_key), take(length);
      if (length == 0 || length > in.size() || count >> 48 != 0 || row >> 32 != 0 || (count > 0) == (row > 0) || t.first_key > t.last_key) wrong();
      t.name = std::string(in.substr(0, length));
      in.remove_prefix(length);
      t.count = count, t.row = row;
      n.table.tensors.push_back(std::move(t));
    }
    if (!in.empty()) wrong();
    return n;
  }
};

/// A socket that listens where it was asked to; of servers but the first, if that address is another host's, where this one can be reached. And what to
/// tell others.
inline FileDescriptor open_door(const std::string& where, bool is_first, SocketAddress& told) {
  SocketAddress a = resolve(where).front();
  if (!is_first) a.port = 0;
  const std::vector<Interface> interfaces = own_interfaces();
  const bool is_ours = a.is_loopback() || std::any_of(interfaces.begin(), interfaces.end(), [&](const Interface& each) { return each.address.same_host_as(a); });
  const bool is_wildcard = a.same_host_as(SocketAddress::wildcard(a.family));
  if (is_first && !is_ours && !is_wildcard) throw Error(Errc::invalid_argument, {where, " is no address of this host; 0.0.0.0:", a.port, " stands for all that it has"});
  told = is_ours ? a : choose_addresses(environment("TALLY_INTERFACE").value_or(""), interfaces).front();
  told.port = a.port;
  FileDescriptor fd = is_wildcard ? listen_anywhere(a.port) : listen_at(told);
  told.port = own_address(fd).port;
  return fd;
}

class TableDoor {
 public:
  /// `wake`: there is news for whoever drives the server. Called from the door's thread.
  TableDoor(FileDescriptor listens, NetworkSettings settings, std::size_t most_bytes, std::function<void()> wake)
      : listens_(std::move(listens)), settings_(std::move(settings)), most_bytes_(std::max<std::size_t>(most_bytes, std::size_t{64} << 20)), wake_(std::move(wake)), bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!bell_) throw Error(Errc::no_resources, {"no descriptor for a table's door: ", errno_text(errno)});
    thread_ = quiet_thread([this] { run(); });
  }
  /// What is on its way out goes out if that takes no more than a moment.
  ~TableDoor() {
    stopping_.store(true);
    ring();
    thread_.join();
  }
  TableDoor(const TableDoor&) = delete;

  // By whoever drives the server.

  /// Guests may come in from now on.
  void open(std::string description, std::size_t shard) {
    const std::lock_guard lock(mutex_);
    description_ = std::move(description);
    shard_ = static_cast<std::uint32_t>(shard);
    ring();
  }
  /// When this ends, guests are told that the table has.
  void say_goodbye() { is_over_.store(true); }
  bool has_news() const { return has_news_.load(std::memory_order_acquire); }
  /// said(guest's number, message, payload), gone(number), sent(parcel).
  template <class Said, class GoneBy, class Sent>
  bool hear(Said&& said, GoneBy&& gone, Sent&& sent) {
    if (!has_news()) return false;
    {
      const std::lock_guard lock(mutex_);
      has_news_.store(false, std::memory_order_relaxed);
      taken_.swap(news_);
    }
    bool resumes = false;
    for (News& n : taken_) {
      if (n.parcel) {
        sent(*n.parcel);
      } else if (n.gone) {
        gone(n.guest);
      } else {
        n.flow->bytes.fetch_sub(sizeof(DoorMessage) + n.payload.size(), std::memory_order_relaxed);
        resumes = n.flow->stopped.load() || resumes;
        said(n.guest, n.e, std::span<const std::byte>(n.payload));
      }
    }
    taken_.clear();
    if (resumes) ring();
    return true;
  }
  /// `parcel` and the pieces stay where they are until sent() is called with it.
  void send(std::uint64_t guest, Post::Parcel& parcel, const DoorMessage& message, std::span<const std::span<const std::byte>> pieces) {
    Letter letter{guest, message, {}, &parcel};
    for (const auto& piece : pieces)
      if (!piece.empty()) letter.pieces.push_back({const_cast<std::byte*>(piece.data()), piece.size()});
    {
      const std::lock_guard lock(mutex_);
      letters_.push_back(std::move(letter));
    }
    ring();
  }

 private:
  static constexpr std::size_t most_guests = 1024;
  static constexpr int most_asked = 4096;  // requests of a guest's that are not answered yet
  static constexpr std::size_t first_payload = std::size_t{256} << 10;
  static constexpr std::size_t most_letters = 4096, most_asked_bytes = std::size_t{256} << 20;
  /// How much of what a guest has said nobody has taken yet.
  struct Flow {
    std::atomic<std::size_t> bytes{0};
    std::atomic<bool> stopped{false};
  };
  struct News {
    std::uint64_t guest = 0;
    Envelope e;
    std::vector<std::byte> payload;
    std::shared_ptr<Flow> flow;
    Post::Parcel* parcel = nullptr;  // this was sent
    bool gone = false;
  };
  struct Letter {
    std::uint64_t guest = 0;
    DoorMessage message;
    std::vector<iovec> pieces;  // behind the message
    Post::Parcel* parcel = nullptr;
    std::size_t done = 0;       // bytes of the message, then of the first piece that is left
    std::size_t piece = 0;
  };
  struct Guest {
    std::uint64_t number = 0;
    Stream stream;
    std::shared_ptr<Flow> flow = std::make_shared<Flow>();
    Nonce nonce{};
    bool known = false, talks = false;  // it is who it says; it has said something about the table
    bool ends = false;                  // once it has been told why
    std::string out;                    // before there are letters
    std::deque<Letter> letters;
    std::array<std::byte, sizeof(DoorMessage)> head;
    std::size_t have = 0;               // bytes of the next message, with its payload
    std::vector<std::byte> payload;
    int asked = 0;
    std::size_t asked_bytes = 0;  // of keys
    std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();  // it came, or something moved to it
    bool dead = false;
  };

  void ring() { (void)::eventfd_write(bell_.get(), 1); }
  void tell(News&& news) {
    {
      const std::lock_guard lock(mutex_);
      news_.push_back(std::move(news));
      has_news_.store(true, std::memory_order_release);
    }
    news_told_ = true;
  }

  void run() {
    std::vector<pollfd> what;
    std::vector<Letter> letters;
    std::chrono::steady_clock::time_point end{};
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        letters.swap(letters_);
        if (described_.empty()) described_ = description_;
      }
      for (Letter& letter : letters) deliver(std::move(letter));
      letters.clear();
      const auto now = std::chrono::steady_clock::now();
      if (stopping_.load()) {
        if (end == std::chrono::steady_clock::time_point{}) {
          end = now + std::chrono::seconds(1);
          DoorMessage goodbye;
          goodbye.e.kind = MessageKind::leave;
          for (const auto& g : guests_)
            if (is_over_.load() && g->known) g->letters.push_back({g->number, goodbye, {}, nullptr});
        }
        const bool rest = std::any_of(guests_.begin(), guests_.end(), [](const auto& g) { return !g->dead && (!g->letters.empty() || !g->out.empty()); });
        if (!rest || now > end) break;
      }
      what.assign(1, {bell_.get(), POLLIN, 0});
      const bool lets_in = !described_.empty() && has_room() && now >= full_until_ && !stopping_.load();
      what.push_back({lets_in ? listens_.get() : -1, POLLIN, 0});
      for (const auto& g : guests_) {
        const bool stopped = g->flow->bytes.load(std::memory_order_relaxed) > most_bytes_;
        g->flow->stopped.store(stopped);
        const bool writes = (!g->letters.empty() || !g->out.empty()) && !g->stream.waits_to_read();
        what.push_back({g->stream.get(), static_cast<short>((stopped ? 0 : POLLIN) | (writes ? POLLOUT : 0)), 0});
      }
      const bool watches = std::any_of(guests_.begin(), guests_.end(), [](const auto& g) { return !g->known || !g->letters.empty(); });
      (void)::poll(what.data(), what.size(), stopping_.load() ? 10 : now < full_until_ ? 100 : watches ? 500 : -1);
      eventfd_t rung = 0;
      (void)::eventfd_read(bell_.get(), &rung);
      if (what[1].revents & POLLIN) let_in();
      for (std::size_t i = 2; i < what.size(); ++i) look_after(*guests_[i - 2], what[i].revents);
      for (const auto& g : guests_)
        if (g->dead) bury(*g);
      std::erase_if(guests_, [](const auto& g) { return g->dead; });
      if (std::exchange(news_told_, false)) wake_();
    }
    for (const auto& g : guests_) bury(*g);
  }
  /// Strangers that say nothing keep nobody out: the oldest of them makes room.
  bool has_room() {
    if (guests_.size() < most_guests) return true;
    const auto stranger = std::find_if(guests_.begin(), guests_.end(), [](const auto& g) { return !g->known; });
    if (stranger == guests_.end()) return false;
    guests_.erase(stranger);
    return true;
  }
  void let_in() {
    FileDescriptor fd(::accept4(listens_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) full_until_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
      return;
    }
    tune(fd, std::chrono::duration_cast<std::chrono::milliseconds>(settings_.timeout));
    auto g = std::make_unique<Guest>();
    g->number = ++numbers_;
    try {
      DoorChallenge challenge;
      challenge.secured = !settings_.secret.empty();
      g->nonce = challenge.nonce = random_nonce();
      g->stream = settings_.let_in(std::move(fd));
      g->out = ControlStream::as_bytes(challenge);
    } catch (const Error&) {  // it cannot be let in
      return;
    }
    guests_.push_back(std::move(g));
  }
  void look_after(Guest& g, short events) {
    const auto now = std::chrono::steady_clock::now();
    if (events & (POLLERR | POLLNVAL)) g.dead = true;
    try {
      if (!g.dead && events & (POLLIN | POLLHUP)) g.dead = !read(g);
    } catch (const std::bad_alloc&) {  // for what it announced
      g.dead = true;
    }
    if (!g.dead) g.dead = !write(g, now);
    if (g.ends && g.out.empty()) g.dead = true;
    const auto patience = g.known ? std::chrono::duration_cast<std::chrono::steady_clock::duration>(settings_.timeout) : std::chrono::seconds(10);
    if (g.known && g.letters.empty()) g.since = now;
    else if (now - g.since > patience) g.dead = true;  // it takes nothing, or says nothing
  }
  /// False if it is gone or talks nonsense.
  bool read(Guest& g) {
    for (int messages = 0; messages < 16;) {
      const std::size_t head = g.known ? sizeof(DoorMessage) : sizeof(DoorHello);
      static_assert(sizeof(DoorHello) <= sizeof(DoorMessage));
      std::byte* const to = g.have < head ? g.head.data() + g.have : g.payload.data() + (g.have - head);
      const std::size_t wanted = g.have < head ? head - g.have : g.payload.size() - (g.have - head);
      if (wanted > 0) {
        const ssize_t got = g.stream.read(to, wanted);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
        g.have += static_cast<std::size_t>(got);
      }
      if (g.have < head) continue;
      if (!g.known) {
        g.have = 0;
        if (!greet(g)) return false;
        continue;
      }
      DoorMessage m;
      std::memcpy(&m, g.head.data(), sizeof m);
      if (g.have == head && wanted > 0) {
        const MessageKind k = m.e.kind;
        const bool fits = k == MessageKind::push || k == MessageKind::pull || k == MessageKind::advance || k == MessageKind::leave || k == MessageKind::cut || k == MessageKind::set || k == MessageKind::join;
        const std::uint8_t flags = k == MessageKind::push ? Envelope::is_rows : k == MessageKind::pull ? Envelope::of_cut : k == MessageKind::cut ? Envelope::drops : 0;
        if (!fits || m.e.bytes > most_bytes_ || (m.e.flags & ~flags) != 0 || (m.e.request == 0 && k != MessageKind::advance)) return false;
        if (m.e.request != 0) ++g.asked, g.asked_bytes += k == MessageKind::pull ? m.e.bytes : 0;
        if (g.asked > most_asked || g.asked_bytes > most_asked_bytes) return false;
        g.payload.resize(std::min<std::size_t>(m.e.bytes, first_payload));
        if (m.e.bytes > 0) continue;
      }
      if (g.have == head + g.payload.size() && g.payload.size() < m.e.bytes) g.payload.resize(std::min<std::size_t>(m.e.bytes, 2 * g.payload.size()));  // no more memory than what has come
      if (g.have < head + g.payload.size()) continue;
      g.have = 0;
      ++messages;
      g.talks = true;
      g.flow->bytes.fetch_add(sizeof m + g.payload.size(), std::memory_order_relaxed);
      tell({g.number, m.e, std::exchange(g.payload, {}), g.flow, nullptr, false});
    }
    return true;
  }
  bool greet(Guest& g) {
    DoorHello hello;
    std::memcpy(&hello, g.head.data(), sizeof hello);
    if (hello.magic != DoorHello{}.magic) return false;  // a stranger
    std::string why;
    if (hello.protocol != door_protocol) why = concat({"this table's door speaks version ", door_protocol, ", and not ", hello.protocol});
    else if (!same(hello.proof, door_proof(settings_.secret, "guest", g.nonce))) why = "another secret than the table's: TALLY_SECRET must be the same";
    const std::string& text = why.empty() ? described_ : why;
    const DoorWelcome welcome{!why.empty(), static_cast<std::uint32_t>(text.size()), shard_, 0, why.empty() ? door_proof(settings_.secret, "door", hello.nonce) : Digest{}};
    g.out += ControlStream::as_bytes(welcome);
    g.out += text;
    g.known = why.empty();
    g.ends = !g.known;
    return true;
  }
  bool write(Guest& g, std::chrono::steady_clock::time_point now) {
    while (!g.out.empty()) {
      const ssize_t sent = g.stream.write(g.out.data(), g.out.size());
      if (sent < 0 && errno == EINTR) continue;
      if (sent < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
      g.out.erase(0, static_cast<std::size_t>(sent));
    }
    while (!g.letters.empty()) {
      Letter& l = g.letters.front();
      std::array<iovec, 32> parts;
      std::size_t n = 0;
      if (l.piece == 0 && l.done < sizeof l.message) parts[n++] = {reinterpret_cast<std::byte*>(&l.message) + l.done, sizeof l.message - l.done};
      const std::size_t into = l.piece == 0 && l.done >= sizeof l.message ? l.done - sizeof l.message : l.piece == 0 ? 0 : l.done;
      for (std::size_t p = l.piece; p < l.pieces.size() && n < parts.size(); ++p) {
        const std::size_t skip = p == l.piece ? into : 0;
        parts[n++] = {static_cast<std::byte*>(l.pieces[p].iov_base) + skip, l.pieces[p].iov_len - skip};
      }
      if (n > 0) {
        const ssize_t sent = g.stream.write(std::span(parts).first(n));
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
        if (sent > 0) g.since = now;
        advance(l, static_cast<std::size_t>(sent));
      }
      if (l.piece < l.pieces.size() || (l.piece == 0 && l.done < sizeof l.message)) continue;
      if (l.parcel) tell({0, {}, {}, nullptr, l.parcel, false});
      g.letters.pop_front();
    }
    return true;
  }
  static void advance(Letter& l, std::size_t sent) {
    l.done += sent;
    for (;;) {
      const std::size_t before = l.piece == 0 ? sizeof l.message : 0;
      if (l.done < before || l.piece == l.pieces.size() || l.done - before < l.pieces[l.piece].iov_len) return;
      l.done -= before + l.pieces[l.piece].iov_len;
      ++l.piece;
    }
  }
  void deliver(Letter&& letter) {
    const auto found = std::find_if(guests_.begin(), guests_.end(), [&](const auto& g) { return g->number == letter.guest && !g->dead; });
    if (found == guests_.end()) return tell({0, {}, {}, nullptr, letter.parcel, false});
    Guest& g = **found;
    if (letter.message.e.request != 0 && g.asked > 0 && --g.asked == 0) g.asked_bytes = 0;
    if (g.letters.size() >= most_letters) g.dead = true;  // it does not read
    if (g.letters.empty()) g.since = std::chrono::steady_clock::now();
    g.letters.push_back(std::move(letter));
  }
  void bury(Guest& g) {
    for (Letter& l : g.letters)
      if (l.parcel) tell({0, {}, {}, nullptr, l.parcel, false});
    g.letters.clear();
    if (g.talks) tell({g.number, {}, {}, nullptr, nullptr, true});
  }

  FileDescriptor listens_;
  NetworkSettings settings_;
  std::size_t most_bytes_;
  std::function<void()> wake_;
  FileDescriptor bell_;
  std::atomic<bool> stopping_{false}, is_over_{false}, has_news_{false};
  std::mutex mutex_;  // what both sides touch
  std::string description_;
  std::uint32_t shard_ = 0;
  std::vector<News> news_, taken_;
  std::vector<Letter> letters_;
  // The thread's own:
  std::string described_;
  std::vector<std::unique_ptr<Guest>> guests_;
  std::uint64_t numbers_ = 0;
  std::chrono::steady_clock::time_point full_until_{};
  bool news_told_ = false;
  std::thread thread_;
};

/// Who has come by the door, as who drives the server knows them: by ranks beyond those of the communicator.
class Visitors {
 public:
  /// `first`: of readers. Below are the ranks of workers, which are given to who joins.
  Visitors(std::unique_ptr<TableDoor> door, Rank first) : next_(first), door_(std::move(door)) {}
  bool is_here(Rank r) const { return numbers_.contains(r); }
  bool has_news() const { return door_->has_news(); }
  /// The table is no more, and its guests may know.
  void say_goodbye() { door_->say_goodbye(); }
  bool rename(Rank guest, Rank r) {
    const auto found = numbers_.find(guest);
    if (found == numbers_.end() || is_here(r)) return false;
    ranks_[found->second] = r;
    numbers_[r] = found->second;
    numbers_.erase(guest);
    unsent_.erase(guest);  // a few answers more
    return true;
  }
  /// said(rank, message, payload), gone(rank), sent(parcel).
  template <class Said, class GoneBy, class Sent>
  bool hear(Said&& said, GoneBy&& gone, Sent&& sent) {
    return door_->hear(
        [&](std::uint64_t number, const Envelope& e, std::span<const std::byte> payload) {
          const auto [at, is_new] = ranks_.try_emplace(number, -1);
          if (is_new) numbers_[at->second = next_++] = number;  // never one that was somebody else's
          said(at->second, e, payload);
        },
        [&](std::uint64_t number) {
          const auto found = ranks_.find(number);
          if (found == ranks_.end()) return;
          const Rank r = found->second;
          ranks_.erase(found);
          numbers_.erase(r);
          unsent_.erase(r);
          gone(r);
        },
        [&](Post::Parcel& p) {
          if (const auto found = unsent_.find(p.to); found != unsent_.end() && --found->second == 0) unsent_.erase(found);
          sent(p);
        });
  }
  /// False if it is not here.
  bool send(Post::Parcel& p, const DoorMessage& message, std::span<const std::span<const std::byte>> pieces) {
    const auto found = numbers_.find(p.to);
    if (found == numbers_.end()) return false;
    ++unsent_[p.to];
    door_->send(found->second, p, message, pieces);
    return true;
  }
  /// A guest that does not take what it asked for gets no more: each answer keeps values as they were.
  bool may_answer(Rank r) const {
    const auto found = unsent_.find(r);
    return found == unsent_.end() || found->second < most_unsent;
  }

 private:
  static constexpr int most_unsent = 16;
  Rank next_;  // reader's
  std::map<Rank, int> unsent_;
  std::map<std::uint64_t, Rank> ranks_;
  std::map<Rank, std::uint64_t> numbers_;
  std::unique_ptr<TableDoor> door_;
};

}  // namespace tally::inline v0::detail
