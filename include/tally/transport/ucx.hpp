// SPDX-License-Identifier: Apache-2.0
// UCX (libucp) as a fabric: messages are active messages, short ones sent at once, long ones by UCX's rendezvous. One worker per
// communicator, so nothing is locked; one context per process.
#pragma once

#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../environment.hpp"
#include "fabric.hpp"

namespace tally::inline v0 {

/// The same on all ranks.
struct UcxOptions : FabricOptions {
  /// Within a host UCX's own shared memory, which it has only where it does not look after its peers: faster than its TCP, but UCX may
  /// end this process with a rank that dies. Between ranks of a host tally has shared memory of its own, unless told not to.
  bool shared_memory = false;

  /// `defaults`, changed by TALLY_UCX_SHARED_MEMORY (on, off).
  [[gnu::cold]] static UcxOptions from_environment(UcxOptions defaults) {
    if (const auto word = detail::environment("TALLY_UCX_SHARED_MEMORY")) {
      if (*word != "on" && *word != "off") throw Error(Errc::invalid_argument, {"TALLY_UCX_SHARED_MEMORY='", *word, "' is unknown; it may be on or off"});
      defaults.shared_memory = *word == "on";
    }
    return defaults;
  }
  std::string text() const { return detail::concat({FabricOptions::text(), shared_memory ? " in memory" : ""}); }
};

namespace detail {

/// The process's one with UCX's shared memory, or without.
class UcxContext {
 public:
  static std::shared_ptr<UcxContext> get(bool shared_memory) {
    static std::mutex mutex;
    static std::weak_ptr<UcxContext> all[2];
    static pid_t processes[2] = {};
    const std::lock_guard lock(mutex);
    auto& known = all[shared_memory];
    auto context = std::exchange(processes[shared_memory], ::getpid()) == ::getpid() ? known.lock() : nullptr;  // a parent's has threads that are not here
    if (!context) known = context = std::make_shared<UcxContext>(shared_memory);
    return context;
  }
  explicit UcxContext(bool shared_memory) {
    ucp_config_t* config = nullptr;
    if (const ucs_status_t status = ::ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) throw Error(Errc::unsupported, {"UCX cannot be set up: ", ::ucs_status_string(status)});
    // Workers would make files in /dev/shm, which a rank that is killed leaves behind.
    if (!shared_memory && !environment("UCX_TLS")) (void)::ucp_config_modify(config, "TLS", "^shm");
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.mt_workers_shared = 1;  // each in a thread of its own
    const ucs_status_t status = ::ucp_init(&params, config, &context_);
    ::ucp_config_release(config);
    if (status != UCS_OK) throw Error(Errc::unsupported, {"UCX cannot be used: ", ::ucs_status_string(status), "; see UCX_TLS and UCX_NET_DEVICES"});
  }
  ~UcxContext() { ::ucp_cleanup(context_); }
  UcxContext(const UcxContext&) = delete;
  ucp_context_h handle() const { return context_; }

 private:
  ucp_context_h context_ = nullptr;
};

class UcxFabric {
 public:
  static constexpr std::string_view name = "ucx";
  static constexpr bool lets_go = true;
  /// Something under way.
  struct Flight {
    void* request = nullptr;
    Rank rank = -1;
    bool failed = false;
  };
  /// Payload that UCX keeps.
  struct Held {
    void* data = nullptr;
  };
  struct Message {
    FabricHeader header;
    Held held;
    const std::byte* data = nullptr;  // null: to be fetched
    std::size_t bytes = 0;
  };

  UcxFabric(const FabricMembers& members, bool shared_memory) : context_(UcxContext::get(shared_memory)), ends_(members.ranks.size()) {
    for (std::size_t r = 0; r < ends_.size(); ++r) ends_[r].is_looked_after = !shared_memory || members.elsewhere[r];
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    expect(::ucp_worker_create(context_->handle(), &params, &worker_), "make a worker");
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = messages;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG | UCP_AM_FLAG_PERSISTENT_DATA;
    handler.cb = &UcxFabric::came;
    handler.arg = this;
    expect(::ucp_worker_set_am_recv_handler(worker_, &handler), "hear of messages");
    expect(::ucp_worker_get_efd(worker_, &event_), "be woken");
  }
  /// UCX ends the process where a worker is destroyed, or a way closed, with something under way on it. So a worker that did not come to
  /// rest is left alone for good.
  ~UcxFabric() {
    for (Message& message : inbox_) give_back(message.held);
    // Where nothing failed, an error of a way says that its other side has closed it, which is at rest, too.
    const bool at_rest = !halted_ && copied_.empty() && kept_.empty() && std::ranges::all_of(ends_, [this](End& each) {
      const bool is_well = is_over(each.hello) && each.error == UCS_OK;
      return failed_ ? is_well : !each.hello.request;
    });
    if (at_rest) {
      ::ucp_worker_destroy(worker_);
      return;
    }
    static auto& abandoned = *new std::vector<std::unique_ptr<Remains>>;
    static std::mutex mutex;
    auto remains = std::make_unique<Remains>();
    remains->worker = worker_;
    remains->ends = std::move(ends_);
    remains->copied = std::move(copied_);
    remains->kept = std::move(kept_);
    remains->context = context_;
    const std::lock_guard lock(mutex);
    abandoned.push_back(std::move(remains));
  }
  UcxFabric(const UcxFabric&) = delete;

  std::string address() const {
    ucp_address_t* address = nullptr;
    std::size_t bytes = 0;
    expect(::ucp_worker_get_address(worker_, &address, &bytes), "say where it is");
    std::string text(reinterpret_cast<const char*>(address), bytes);
    ::ucp_worker_release_address(worker_, address);
    return text;
  }
  bool knows(Rank r) const { return end(r).handle != nullptr; }
  void meet(Rank r, std::string_view address) {
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = end(r).is_looked_after ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
    params.err_handler.cb = [](void* of, ucp_ep_h, ucs_status_t status) { static_cast<End*>(of)->error = status; };
    params.err_handler.arg = &end(r);
    if (const ucs_status_t status = ::ucp_ep_create(worker_, &params, &end(r).handle); status != UCS_OK) return void(end(r).error = status);
    // No memory but this class's own is handed over before the way stands: UCX gives none back without closing it, and stumbles over
    // closing one that does not stand yet.
    static const char hello = 0;
    ucp_request_param_t param{};
    end(r).hello = begun(r, ::ucp_am_send_nbx(end(r).handle, messages, &hello, sizeof hello, nullptr, 0, &param));
  }
  bool reaches(Rank r) const { return end(r).error == UCS_OK && end(r).handle; }
  bool stands(Rank r) { return reaches(r) && is_over(end(r).hello); }
  const char* error(Rank r) const {
    if (end(r).error == UCS_ERR_UNREACHABLE) return "Destination is unreachable (UCX_NET_DEVICES names the devices that UCX is to use)";
    return end(r).error == UCS_OK ? nullptr : ::ucs_status_string(end(r).error);
  }
  std::size_t most_at_once() const { return std::size_t{4} << 20; }

  bool send(Rank r, const FabricHeader& header, const std::byte* from, std::size_t bytes, Flight& flight) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = header.fetched ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
    if (header.fetched || stands(r)) {
      flight = begun(r, ::ucp_am_send_nbx(end(r).handle, messages, &header, sizeof header, from, bytes, &param));
      return true;
    }
    Copied& copied = copied_.emplace_back();
    copied.header = header;
    copied.payload.assign(from, from + bytes);
    copied.flight = begun(r, ::ucp_am_send_nbx(end(r).handle, messages, &copied.header, sizeof copied.header, copied.payload.data(), bytes, &param));
    return true;
  }
  bool is_over(Flight& flight) {
    if (flight.request) {
      const ucs_status_t status = ::ucp_request_check_status(flight.request);
      if (status == UCS_INPROGRESS) return false;
      ::ucp_request_free(std::exchange(flight.request, nullptr));
      flight.failed = status != UCS_OK;
      if (flight.failed && end(flight.rank).error == UCS_OK) end(flight.rank).error = status;
    }
    return !flight.failed;
  }
  void drop(Flight& flight, std::vector<std::byte>&& memory) {
    if (is_over(flight) || !flight.request) return;
    ::ucp_request_free(std::exchange(flight.request, nullptr));  // which UCX does once it is over
    kept_.push_back(std::move(memory));
  }
  bool touches(Flight& flight) { return !is_over(flight) && flight.request && !halted_; }
  void fetch(Rank r, Held& held, std::byte* to, std::size_t bytes, Flight& flight) {
    ucp_request_param_t param{};
    flight = begun(r, ::ucp_am_recv_data_nbx(worker_, std::exchange(held.data, nullptr), to, bytes, &param));
  }
  void give_back(Held& held) {
    if (held.data) ::ucp_am_data_release(worker_, std::exchange(held.data, nullptr));
  }
  void progress() {
    for (int i = 0; i < 8 && !halted_ && ::ucp_worker_progress(worker_) != 0; ++i) {}
    forget_copies();
  }
  bool has_rest() const { return !copied_.empty() && !halted_; }
  void halt() { halted_ = true; }
  std::deque<Message>& inbox() { return inbox_; }
  int event() const { return event_; }
  nanoseconds longest_sleep() const { return nanoseconds::max(); }
  bool arm() { return inbox_.empty() && ::ucp_worker_arm(worker_) == UCS_OK; }
  void flush(nanoseconds limit, bool failed) {
    failed_ = failed_ || failed;
    ucp_request_param_t none{};
    wait(::ucp_worker_flush_nbx(worker_, &none), limit);
    forget_copies();
  }
  void give_up(Rank r) {
    halted_ = true;
    if (end(r).error == UCS_OK) end(r).error = UCS_ERR_CONNECTION_RESET;
  }

 private:
  static constexpr unsigned messages = 7;
  struct End {
    ucp_ep_h handle = nullptr;
    Flight hello;
    bool is_looked_after = true;
    ucs_status_t error = UCS_OK;
  };
  /// What was sent before the way stood.
  struct Copied {
    Flight flight;
    FabricHeader header;
    std::vector<std::byte> payload;
  };
  /// What an abandoned worker may still look at.
  struct Remains {
    ucp_worker_h worker = nullptr;
    std::vector<End> ends;
    std::deque<Copied> copied;
    std::vector<std::vector<std::byte>> kept;
    std::shared_ptr<UcxContext> context;
  };
  End& end(Rank r) { return ends_[static_cast<std::size_t>(r)]; }
  const End& end(Rank r) const { return ends_[static_cast<std::size_t>(r)]; }
  static void expect(ucs_status_t status, const char* what) {
    if (status != UCS_OK) throw Error(Errc::no_resources, {"UCX cannot ", what, ": ", ::ucs_status_string(status)});
  }
  /// Those that UCX is done with, or has given up.
  void forget_copies() {
    while (!copied_.empty() && (is_over(copied_.front().flight) || copied_.front().flight.failed)) copied_.pop_front();
  }
  Flight begun(Rank r, ucs_status_ptr_t result) {
    if (!UCS_PTR_IS_ERR(result)) return {result, r, false};
    if (end(r).error == UCS_OK) end(r).error = UCS_PTR_STATUS(result);
    return {nullptr, r, true};
  }
  /// True once it is over.
  bool wait(ucs_status_ptr_t request, nanoseconds limit) {
    if (!request || UCS_PTR_IS_ERR(request)) return true;
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (::ucp_request_check_status(request) == UCS_INPROGRESS && !halted_ && std::chrono::steady_clock::now() < deadline) ::ucp_worker_progress(worker_);
    const bool over = ::ucp_request_check_status(request) != UCS_INPROGRESS;
    ::ucp_request_free(request);
    return over;
  }
  static ucs_status_t came(void* self, const void* header, std::size_t header_bytes, void* data, std::size_t bytes, const ucp_am_recv_param_t* param) noexcept {
    if (header_bytes != sizeof(FabricHeader)) return UCS_OK;  // a stranger's
    Message message;
    std::memcpy(&message.header, header, sizeof message.header);
    message.bytes = bytes;
    const bool is_here = !(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV);
    if (is_here) message.data = static_cast<const std::byte*>(data);
    if (!is_here || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_DATA)) message.held.data = data;
    static_cast<UcxFabric*>(self)->inbox_.push_back(message);
    return message.held.data ? UCS_INPROGRESS : UCS_OK;
  }

  std::shared_ptr<UcxContext> context_;
  ucp_worker_h worker_ = nullptr;
  int event_ = -1;
  std::vector<End> ends_;
  std::deque<Copied> copied_;
  std::vector<std::vector<std::byte>> kept_;  // what UCX may still write to
  bool halted_ = false, failed_ = false;
  std::deque<Message> inbox_;
};
static_assert(Fabric<UcxFabric>);

}  // namespace detail

using UcxTransport = FabricTransport<detail::UcxFabric>;

}  // namespace tally::inline v0
