// SPDX-License-Identifier: Apache-2.0
// How the processes of a host agree on who reads the meters. Who can bind a name in the abstract name space is the hub and hands
// its board to all who connect, of the same user; when it goes, the kernel frees the name and those who are left elect the next.
// One thread per process does this; it sleeps but for the hub's ten windows a second.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../local_socket.hpp"
#include "../quiet_thread.hpp"
#include "../text.hpp"
#include "board.hpp"
#include "hub.hpp"
#include "meters.hpp"
#include "source.hpp"

namespace tally::inline v0 {

struct MemberOptions {
  std::string name;                    // of the hub: processes that meet have the same; it is completed by the user's id
  std::function<FoundMeters()> find;   // called only where this process is to become the hub
  HubOptions hub = {};
};

/// This process among those of its host that account for energy.
class EnergyMember {
 public:
  /// A place on the board.
  struct Seat {
    std::shared_ptr<detail::BoardMemory> board;
    detail::BoardSlot* slot = nullptr;
  };
  /// Who wants to be told when there is a new hub: `seated` gets a seat on its board, or none where the board is full.
  struct Guest {
    virtual ~Guest() = default;
    virtual void seated(Seat seat) = 0;
  };

  explicit EnergyMember(MemberOptions options) : options_(std::move(options)), stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    name_ = detail::concat({"tally-energy/", ::getuid(), "/", detail::Board::magic, "/", options_.name});
    if (!stop_) warn({"no descriptor to watch the energy hub: ", detail::errno_text(errno)});
    if (!stop_ || (!elect(std::chrono::steady_clock::now() + std::chrono::seconds(1)) && !can_elect_)) return;  // without any meter there is nothing to wait for
    if (awaited_) warn({"the energy hub of this host does not answer, as if its process were stopped: until it does, joules are unknown or come from the model"});
    try {
      thread_ = detail::quiet_thread([this] { watch(); });
    } catch (const std::system_error& error) {
      warn({"no thread to watch the energy hub: ", error.what()});
    }
  }
  EnergyMember(const EnergyMember&) = delete;
  EnergyMember& operator=(const EnergyMember&) = delete;
  ~EnergyMember() {
    if (!thread_.joinable()) return;
    if (::getpid() != pid_) {  // a fork's copy: the thread is not here
      thread_.detach();
      return;
    }
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(stop_.get(), &one, sizeof one);
    thread_.join();
  }

  void add(Guest& guest) {
    const std::lock_guard lock(mutex_);
    guests_.push_back(&guest);
    if (board_) guest.seated(seat());
  }
  void remove(Guest& guest) {
    const std::lock_guard lock(mutex_);
    std::erase(guests_, &guest);
  }
  bool is_hub() const { return is_hub_.load(std::memory_order_relaxed); }
  std::vector<std::string> warnings() const {
    const std::lock_guard lock(mutex_);
    return warnings_.all();
  }

 private:
  using Instant = detail::Connection::Instant;
  struct Welcome {
    std::uint64_t magic = detail::Board::magic;
    std::uint32_t client = 0, unused = 0;
  };
  struct Client {
    detail::Connection connection;
    std::uint32_t number = 0;
  };

  void warn(std::initializer_list<detail::Piece> text) {
    const std::lock_guard lock(mutex_);
    warnings_.add(detail::concat(text));
  }
  /// Of the board that is known; the lock is held.
  Seat seat() {
    for (detail::BoardSlot& slot : (*board_)->slots) {
      std::uint32_t free = 0;
      if (slot.client.load(std::memory_order_relaxed) == 0 && slot.client.compare_exchange_strong(free, client_, std::memory_order_acq_rel)) return {board_, &slot};
    }
    warnings_.add("the energy board of this host is full: communicators made from here on have no joules of their own");
    return {};
  }
  void attach(std::shared_ptr<detail::BoardMemory> board, std::uint32_t client) {
    const std::lock_guard lock(mutex_);
    board_ = std::move(board);
    client_ = client;
    for (Guest* guest : guests_) guest->seated(seat());
  }

  /// Joins the hub there is, or becomes it; the hub has until then to answer, and may do so later. False if neither was possible just now.
  bool elect(Instant patience) {
    try {
      for (int tries = 0; tries < 8; ++tries) {
        if (join(patience)) return true;
        if (!can_elect_) return false;
        if (preside()) return true;
      }
    } catch (const std::exception& error) {
      leave_hub();
      warn({"the energy hub cannot be joined: ", error.what()});
    }
    return false;
  }
  /// False if there is no hub. One that does not answer is waited for, on the one connection: who tried again and again would fill its queue.
  bool join(Instant patience) {
    detail::FileDescriptor socket = detail::local_socket();
    const auto [where, length] = detail::local_address(name_);
    if (::fcntl(socket.get(), F_SETFL, O_NONBLOCK) != 0) return false;
    if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&where), length) != 0) return errno == EAGAIN;  // its queue is full: later
    hub_ = detail::Connection(std::move(socket));
    if (hub_.peer().uid != ::getuid()) throw Error(Errc::protocol, "another user answers as this user's energy hub");
    awaited_ = true;
    return settle_in(patience);
  }
  /// What the hub has to say to who joins. False if it has gone.
  bool settle_in(Instant patience) {
    std::vector<pollfd> answer{{hub_.get(), POLLIN, 0}};
    if (!detail::Connection::wait_any(answer, patience)) return true;
    Welcome welcome;
    detail::FileDescriptor file;
    if (!hub_.receive(&welcome, sizeof welcome, &file, patience)) return leave_hub(), false;
    if (welcome.magic != detail::Board::magic || welcome.client == 0 || !file) throw Error(Errc::protocol, "the energy hub of this host is of another version of tally");
    auto board = std::make_shared<detail::BoardMemory>(std::move(file));
    board->check();
    awaited_ = false;
    attach(std::move(board), welcome.client);
    return true;
  }
  void leave_hub() {
    hub_ = detail::Connection();
    awaited_ = false;
  }
  bool preside() {
    detail::FileDescriptor socket = detail::local_socket();
    const auto [where, length] = detail::local_address(name_);
    if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&where), length) != 0) return false;  // somebody was faster
    if (!found_) {
      FoundMeters found = options_.find ? options_.find() : FoundMeters{};
      for (const std::string& warning : found.warnings) warn({warning});
      can_elect_ = !found.meters.empty();
      if (!can_elect_) return false;
      found_ = std::move(found);
    }
    auto board = std::make_shared<detail::BoardMemory>(detail::BoardMemory::make());
    HubOptions options = options_.hub;
    options.warnings.insert(options.warnings.end(), found_->warnings.begin(), found_->warnings.end());
    auto reader = std::make_unique<EnergyHub>(std::move(found_->meters), std::move(options), **board);
    if (::listen(socket.get(), 64) != 0) throw Error(Errc::no_resources, {"the energy hub cannot listen: ", detail::errno_text(errno)});
    reader->join(1, ::getpid());
    next_client_ = 2;
    hub_ = detail::Connection();
    door_ = detail::Connection(std::move(socket));
    reader_ = std::move(reader);
    own_board_ = board;
    is_hub_.store(true, std::memory_order_relaxed);
    attach(std::move(board), 1);
    return true;
  }

  void watch() {
    for (;;) {
      std::vector<pollfd> events{{stop_.get(), POLLIN, 0}};
      if (reader_) {
        events.push_back({door_.get(), POLLIN, 0});
        for (const Client& client : clients_) events.push_back({client.connection.get(), POLLIN, 0});
      } else if (hub_) {
        events.push_back({hub_.get(), POLLIN, 0});
      }
      ::poll(events.data(), events.size(), patience());
      if (events[0].revents) return;
      if (reader_) {
        preside(events);
      } else if (!hub_) {
        elect(Instant());
      } else if (events[1].revents) {
        try {
          if (awaited_ && settle_in(Instant())) continue;
        } catch (const std::exception& error) {
          warn({"the energy hub cannot be joined: ", error.what()});
        }
        leave_hub();  // it is gone
        elect(Instant());
      }
    }
  }
  /// In milliseconds.
  int patience() const {
    if (!reader_) return hub_ ? -1 : 200;
    const nanoseconds left = reader_->next() - options_.hub.system.now();
    return static_cast<int>(std::clamp<std::int64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(left).count() + 1, 0, 1000));
  }
  void preside(const std::vector<pollfd>& events) {
    for (std::size_t i = events.size(); i-- > 2;) {
      if (!events[i].revents) continue;  // a client says nothing: it only goes
      const auto gone = clients_.begin() + static_cast<std::ptrdiff_t>(i - 2);
      reader_->leave(gone->number);
      clients_.erase(gone);
    }
    if (events[1].revents) {
      detail::Connection guest(detail::FileDescriptor(::accept4(door_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)));
      if (guest && clients_.size() < most_clients)
        if (const ucred peer = guest.peer(); peer.uid == ::getuid()) {
          Welcome welcome;
          welcome.client = next_client_++;
          reader_->join(welcome.client, peer.pid);
          if (guest.send(&welcome, sizeof welcome, own_board_->descriptor())) clients_.push_back({std::move(guest), welcome.client});
          else reader_->leave(welcome.client);
        }
    }
    reader_->step();
  }

  static constexpr std::size_t most_clients = 512;
  MemberOptions options_;
  std::string name_;
  detail::FileDescriptor stop_;
  mutable std::mutex mutex_;  // guests, board, warnings
  std::vector<Guest*> guests_;
  std::shared_ptr<detail::BoardMemory> board_;
  std::uint32_t client_ = 0;
  MeterWarnings warnings_;
  std::optional<FoundMeters> found_;
  bool can_elect_ = true;
  std::atomic<bool> is_hub_{false};
  // Of the thread, once it runs.
  detail::Connection hub_;   // to the hub, where another process is it
  bool awaited_ = false;     // it has not answered yet
  detail::Connection door_;  // where this one is
  std::shared_ptr<detail::BoardMemory> own_board_;
  std::unique_ptr<EnergyHub> reader_;
  std::vector<Client> clients_;
  std::uint32_t next_client_ = 2;
  pid_t pid_ = ::getpid();
  std::thread thread_;
};

/// A ledger's side of it. Over the lives of several hubs what was charged adds up.
class HubSeat final : public EnergySource, private EnergyMember::Guest {
 public:
  /// `device`: key of the device that this rank uses, e.g. "gpu-GPU-8a1f...", so that a share of it is charged. `device_alone`: what is
  /// published are times of that device's, so nothing else is charged.
  explicit HubSeat(std::shared_ptr<EnergyMember> member, std::string device = {}, bool device_alone = false) : member_(std::move(member)), device_(std::move(device)), device_alone_(device_alone) { member_->add(*this); }
  ~HubSeat() override {
    if (::getpid() != pid_) return;  // a fork's copy: the seat is its parent's
    member_->remove(*this);
    if (const Place* place = place_.load(std::memory_order_relaxed); place && place->seat.slot) place->seat.slot->leaving.store(1, std::memory_order_release);
  }
  HubSeat(const HubSeat&) = delete;
  HubSeat& operator=(const HubSeat&) = delete;

  void publish(const ActivityTimes& so_far) noexcept override {
    Place* const place = place_.load(std::memory_order_acquire);
    if (!place || !place->seat.slot) return;
    if (!std::exchange(place->begun, true)) place->base = published_;  // what this hub saw the beginning of
    for (std::size_t a = 0; a < activity_count; ++a) place->seat.slot->times[a].store((so_far.in[a] - place->base.in[a]).count(), std::memory_order_relaxed);
    published_ = so_far;
  }
  std::uint64_t windows() const noexcept override {
    const Place* const place = place_.load(std::memory_order_acquire);
    return place ? place->windows_before + (*place->seat.board)->windows.load(std::memory_order_relaxed) : 0;
  }
  bool read(EnergyReading& reading) const override {
    const std::lock_guard lock(mutex_);
    const Place* const place = place_.load(std::memory_order_relaxed);
    detail::BoardState state;
    Charges charges;
    if (!place || !place->seat.slot || !(*place->seat.board)->state.read(state, [&] { charges = place->seat.slot->read_charges(); })) return false;
    reading.windows = place->windows_before + state.windows;
    reading.time = nanoseconds(state.time);
    reading.charges = together(place->charged_before, charges);
    std::copy(std::begin(state.kinds), std::end(state.kinds), reading.kinds.begin());
    for (std::size_t k = 0; k < power_kinds; ++k) reading.kinds[k].total += place->total_before[k];
    reading.device_alone = device_alone_;
    if (device_alone_ && place->seat.slot->device.load(std::memory_order_relaxed) == 0) reading.kinds[static_cast<std::size_t>(PowerKind::gpu)].provenance = Provenance::none;
    return true;
  }
  HostEnergy host() const override {
    HostEnergy host;
    host.warnings = member_->warnings();
    const std::lock_guard lock(mutex_);
    const Place* const place = place_.load(std::memory_order_relaxed);
    if (place) add_board(*place, host);
    return host;
  }

 private:
  struct Place {
    EnergyMember::Seat seat;
    std::uint64_t windows_before = 0;
    Charges charged_before{};
    std::array<Nanojoules, power_kinds> total_before{};
    std::vector<DomainAccount> domains_before;
    ActivityTimes base;  // of who publishes
    bool begun = false;
  };
  /// What its board says, and what those before it said.
  static void add_board(const Place& place, HostEnergy& host) {
    auto state = std::make_unique<detail::BoardState>();
    if (!(*place.seat.board)->state.read(*state)) return void(host.domains = place.domains_before);
    for (std::size_t d = 0; d < std::min<std::size_t>(state->domains, detail::BoardState::most_domains); ++d) {
      const detail::BoardDomain& from = state->domain[d];
      host.domains.push_back({from.kind, std::string(detail::text_of(from.key)), std::string(detail::text_of(from.source)), from.parent, from.total, from.operations, from.application, from.unattributed, from.watts_floor, from.provenance, from.caveats});
    }
    const std::uint32_t powers = state->powers, first = powers > detail::BoardState::most_power ? powers - static_cast<std::uint32_t>(detail::BoardState::most_power) : 0;
    for (std::uint32_t i = first; i < powers; ++i) {
      const detail::BoardPower& from = state->power[i % detail::BoardState::most_power];
      if (from.domain < host.domains.size()) host.power.push_back({from.domain, nanoseconds(from.begin), nanoseconds(from.end), from.watts});
    }
    host.coverage = state->coverage;
    host.residual = state->residual;
    for (std::string_view rest = detail::text_of(state->warnings); !rest.empty();) {
      const std::size_t end = std::min(rest.find('\n'), rest.size());
      if (const std::string line(rest.substr(0, end)); std::find(host.warnings.begin(), host.warnings.end(), line) == host.warnings.end()) host.warnings.push_back(line);
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    for (const DomainAccount& before : place.domains_before) {
      const auto same = std::find_if(host.domains.begin(), host.domains.end(), [&](const DomainAccount& each) { return each.key == before.key; });
      if (same == host.domains.end()) {
        host.domains.push_back(before);
        host.domains.back().parent = -1;
        continue;
      }
      same->total += before.total;
      same->operations += before.operations;
      same->application += before.application;
      same->unattributed += before.unattributed;
      same->provenance = std::max(same->provenance, before.provenance);  // a new hub's counter has not moved yet
    }
  }
  static Charges together(Charges a, const Charges& b) {
    for (std::size_t k = 0; k < power_kinds; ++k) {
      for (std::size_t i = 0; i < activity_count; ++i) a[k].net[i] += b[k].net[i];
      a[k].floor += b[k].floor;
    }
    return a;
  }
  void seated(EnergyMember::Seat seat) override {
    if (!seat.board) return;
    const std::lock_guard lock(mutex_);
    auto place = std::make_unique<Place>();
    if (const Place* old = place_.load(std::memory_order_relaxed)) {
      detail::BoardState state{};
      (*old->seat.board)->state.read(state);  // its hub is gone: nothing changes any longer
      place->windows_before = old->windows_before + state.windows;
      place->charged_before = old->seat.slot ? together(old->charged_before, old->seat.slot->read_charges()) : old->charged_before;
      for (std::size_t k = 0; k < power_kinds; ++k) place->total_before[k] = old->total_before[k] + state.kinds[k].total;
      HostEnergy before;
      add_board(*old, before);
      place->domains_before = std::move(before.domains);
    }
    if (seat.slot && device_alone_) seat.slot->of_device.store(1, std::memory_order_relaxed);
    if (!device_.empty() && seat.slot)
      if (detail::BoardState state{}; (*seat.board)->state.read(state))
        for (std::uint32_t d = 0; d < std::min<std::uint32_t>(state.domains, detail::BoardState::most_domains); ++d)
          if (detail::text_of(state.domain[d].key) == device_) seat.slot->device.store(d + 1, std::memory_order_relaxed);
    place->seat = std::move(seat);
    place_.store(place.get(), std::memory_order_release);
    places_.push_back(std::move(place));  // earlier ones stay: who publishes may be using one
  }

  std::shared_ptr<EnergyMember> member_;
  std::string device_;
  bool device_alone_;
  pid_t pid_ = ::getpid();
  mutable std::mutex mutex_;  // but for what who publishes uses
  std::atomic<Place*> place_{nullptr};
  std::vector<std::unique_ptr<Place>> places_;
  ActivityTimes published_;  // of who publishes
};

}  // namespace tally::inline v0
