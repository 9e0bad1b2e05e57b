// SPDX-License-Identifier: Apache-2.0
// The parameter server: a table of tensors, cut into shards that ranks serve, which workers push to and pull from whenever they
// like. How far a pull may lag behind other workers is the table's consistency, what a push does to the values is its rule, and each
// call hands back its account. (Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014.)
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "communicator.hpp"
#include "parameter_server/node.hpp"
#include "parameter_server/snapshot.hpp"
#include "transport/slots.hpp"

namespace tally::inline v0 {

/// What a pull hands back beside the values. Waiting for the staleness bound is the report's wait_arrival, and blame() names the workers that
/// were waited for; wait_credit and wait_transfer are for room at a server and for bytes.
struct Pulled {
  Report report;
  std::uint64_t version = 0;  // every push of live workers with a clock below this is in
  std::uint64_t clock = 0;    // of this worker
  /// Clocks by which the values lag behind this worker's.
  std::uint64_t staleness() const { return clock > version ? clock - version : 0; }
};

struct PushOptions {
  double weight = 1;        // for rules that average
  int priority = 0;         // of what waits to be sent, the largest goes first
  nanoseconds timeout{0};   // 0: the table's
};
struct PullOptions {
  int priority = 0;         // of those that wait for the same, the largest is answered first
  nanoseconds timeout{0};
};

/// A push or pull that goes on in the background. Its memory must stay until it is done, which destruction waits for.
class TableOperation {
 public:
  TableOperation() = default;
  TableOperation(std::shared_ptr<detail::TableUser> node, detail::TableOp* op) : node_(std::move(node)), op_(op) {}
  TableOperation(TableOperation&& other) noexcept : node_(std::move(other.node_)), op_(std::exchange(other.op_, nullptr)) {}
  TableOperation& operator=(TableOperation&& other) noexcept {
    std::swap(node_, other.node_), std::swap(op_, other.op_);
    return *this;
  }
  ~TableOperation() {
    if (op_) node_->abandon(*op_);
  }
  /// Whether it is done; does what can be done without waiting.
  bool ready() { return !op_ || node_->is_done(*op_); }
  /// Waits for it. Throws what it failed with.
  Pulled wait() {
    if (!op_) throw Error(Errc::invalid_argument, "there is no operation to wait for");
    const Report report = node_->wait(*op_);
    return {report, op_->version, op_->clock};
  }

 private:
  std::shared_ptr<detail::TableUser> node_;
  detail::TableOp* op_ = nullptr;
};

namespace detail {

/// What a tensor is known by to whoever uses it.
template <class T>
class TensorHandle {
 public:
  TensorHandle(std::shared_ptr<TableUser> node, std::size_t tensor) : node_(std::move(node)), tensor_(tensor) {}

 protected:
  const TensorSpec& spec() const { return node_->table().tensors[tensor_]; }
  TableOp& make(Collective what, const T* in, T* out, double weight, int priority, nanoseconds timeout) const {
    if (!node_->is_worker() && in) throw Error(Errc::invalid_argument, {name_of(what), "('", spec().name, "'): ", node_->rank() < node_->table().size ? concat({"rank ", node_->rank(), " is no worker of this table: it serves"}) : "a reader is no worker of this table", ", and may only pull"});
    if (!(static_cast<float>(weight) > 0) || !(weight <= 3e38)) throw Error(Errc::invalid_argument, {name_of(what), "('", spec().name, "'): a weight must be a positive number"});
    TableOp& op = node_->take();
    op.call = {};
    op.call.what = what;
    op.call.tensor = tensor_;
    op.call.in = reinterpret_cast<const std::byte*>(in);
    op.call.out = reinterpret_cast<std::byte*>(out);
    op.call.weight = weight;
    op.call.priority = priority;
    op.call.timeout = timeout;
    return op;
  }
  Pulled run(TableOp& op) const {
    const Report report = node_->run(op);
    return {report, op.version, op.clock};
  }
  TableOperation start(TableOp& op) const {
    node_->start_in_background(op);
    return {node_, &op};
  }
  void expect_count(Collective what, std::size_t count, std::size_t expected) const {
    if (count != expected) throw Error(Errc::invalid_argument, {name_of(what), "('", spec().name, "'): the buffer has ", count, " elements, expected ", expected});
  }

  std::shared_ptr<TableUser> node_;
  std::size_t tensor_;
};

}  // namespace detail

/// Some elements of a vector, or all of them.
template <Element T>
class DenseTensor : public detail::TensorHandle<T> {
 public:
  DenseTensor(std::shared_ptr<detail::TableUser> node, std::size_t tensor, std::size_t first, std::size_t count) : detail::TensorHandle<T>(std::move(node), tensor), first_(first), count_(count) {}
  std::size_t size() const { return count_; }
  DenseTensor range(std::size_t first, std::size_t count) const {
    if (first > count_ || count > count_ - first) throw Error(Errc::invalid_argument, {"range: elements ", first, " to ", first + count, " of '", this->spec().name, "', which has ", count_});
    return {this->node_, this->tensor_, first_ + first, count};
  }
  /// Hands `values` to the rule. When it returns they are at their shards (and replicas), and `values` may be changed.
  Report push(std::span<const T> values, const PushOptions& options = {}) const { return this->run(pushing(Collective::push, values, nullptr, options)).report; }
  TableOperation async_push(std::span<const T> values, const PushOptions& options = {}) const { return this->start(pushing(Collective::push, values, nullptr, options)); }
  /// The values, as fresh as the table's consistency asks.
  Pulled pull(std::span<T> values, const PullOptions& options = {}) const { return this->run(pulling(values, options)); }
  TableOperation async_pull(std::span<T> values, const PullOptions& options = {}) const { return this->start(pulling(values, options)); }
  /// push(in), tick(), pull(out): with bsp, what an all_reduce does, and the rule.
  Pulled push_pull(std::span<const T> in, std::span<T> out, const PushOptions& options = {}) const {
    expect_out(Collective::push_pull, out);
    return this->run(ticking(pushing(Collective::push_pull, in, out.data(), options)));
  }
  TableOperation async_push_pull(std::span<const T> in, std::span<T> out, const PushOptions& options = {}) const {
    expect_out(Collective::push_pull, out);
    return this->start(ticking(pushing(Collective::push_pull, in, out.data(), options)));
  }

 private:
  void expect_out(Collective what, std::span<T> out) const { this->expect_count(what, out.size(), count_); }
  static detail::TableOp& ticking(detail::TableOp& op) {
    op.call.tick = true;
    return op;
  }
  detail::TableOp& placed(detail::TableOp& op) const {
    op.call.first = first_;
    op.call.count = count_;
    return op;
  }
  detail::TableOp& pushing(Collective what, std::span<const T> values, T* out, const PushOptions& options) const {
    this->expect_count(what, values.size(), count_);
    return placed(this->make(what, values.data(), out, options.weight, options.priority, options.timeout));
  }
  detail::TableOp& pulling(std::span<T> values, const PullOptions& options) const {
    expect_out(Collective::pull, values);
    return placed(this->make(Collective::pull, nullptr, values.data(), 1, options.priority, options.timeout));
  }
  std::size_t first_, count_;
};

/// Rows of a sparse tensor, by their keys. Keys may come in any order; unless they ascend, rows are copied to sort them.
template <Element T>
class SparseRows : public detail::TensorHandle<T> {
 public:
  SparseRows(std::shared_ptr<detail::TableUser> node, std::size_t tensor, std::span<const std::uint64_t> keys) : detail::TensorHandle<T>(std::move(node), tensor), keys_(keys) {}
  /// values: keys.size() rows, one after another.
  Report push(std::span<const T> values, const PushOptions& options = {}) const { return this->run(pushing(Collective::push, values, nullptr, options)).report; }
  TableOperation async_push(std::span<const T> values, const PushOptions& options = {}) const { return this->start(pushing(Collective::push, values, nullptr, options)); }
  /// Rows that nobody has pushed to are 0.
  Pulled pull(std::span<T> values, const PullOptions& options = {}) const { return this->run(pulling(values, options)); }
  TableOperation async_pull(std::span<T> values, const PullOptions& options = {}) const { return this->start(pulling(values, options)); }

 private:
  std::size_t elements() const { return keys_.size() * this->spec().row; }
  detail::TableOp& keyed(detail::TableOp& op) const {
    op.call.keys = keys_;
    op.call.count = keys_.size();
    return op;
  }
  void expect_keys(Collective what) const {
    for (const std::uint64_t key : keys_)
      if (key < this->spec().first_key || key > this->spec().last_key) throw Error(Errc::invalid_argument, {name_of(what), "('", this->spec().name, "'): key ", key, " is out of its range, ", this->spec().first_key, " to ", this->spec().last_key});
  }
  detail::TableOp& pushing(Collective what, std::span<const T> values, T* out, const PushOptions& options) const {
    expect_keys(what);
    this->expect_count(what, values.size(), elements());
    return keyed(this->make(what, values.data(), out, options.weight, options.priority, options.timeout));
  }
  detail::TableOp& pulling(std::span<T> values, const PullOptions& options) const {
    expect_keys(Collective::pull);
    this->expect_count(Collective::pull, values.size(), elements());
    return keyed(this->make(Collective::pull, nullptr, values.data(), 1, options.priority, options.timeout));
  }
  std::span<const std::uint64_t> keys_;
};
template <Element T>
class SparseTensor {
 public:
  SparseTensor(std::shared_ptr<detail::TableUser> node, std::size_t tensor) : node_(std::move(node)), tensor_(tensor) {}
  /// The keys must stay until a push or pull of them has begun.
  SparseRows<T> rows(std::span<const std::uint64_t> keys) const { return {node_, tensor_, keys}; }

 private:
  std::shared_ptr<detail::TableUser> node_;
  std::size_t tensor_;
};

/// The tensors of a table, by their names.
template <Element T>
class TableTensors {
 public:
  /// A vector of the table's; Errc::invalid_argument if there is none of that name.
  DenseTensor<T> operator[](std::string_view name) const { return dense(name); }
  DenseTensor<T> dense(std::string_view name) const {
    const std::size_t i = find(name);
    if (user_->table().tensors[i].is_sparse()) throw Error(Errc::invalid_argument, {"'", name, "' has rows that are found by keys: see sparse()"});
    return {user_, i, 0, user_->table().tensors[i].count};
  }
  /// One that has rows.
  SparseTensor<T> sparse(std::string_view name) const {
    const std::size_t i = find(name);
    if (!user_->table().tensors[i].is_sparse()) throw Error(Errc::invalid_argument, {"'", name, "' is a vector: see dense()"});
    return {user_, i};
  }

 protected:
  void use(std::shared_ptr<detail::TableUser> user) { user_ = std::move(user); }
  std::size_t find(std::string_view name) const {
    const auto& all = user_->table().tensors;
    const auto found = std::find_if(all.begin(), all.end(), [&](const TensorSpec& t) { return t.name == name; });
    if (found != all.end()) return static_cast<std::size_t>(found - all.begin());
    std::string known;
    for (const TensorSpec& t : all) known += detail::concat({known.empty() ? "'" : ", '", t.name, "'"});
    throw Error(Errc::invalid_argument, {"there is no tensor '", name, "'; there are ", known});
  }

 private:
  std::shared_ptr<detail::TableUser> user_;
};

namespace detail {

/// Servers, workers and what they agree on; everything wrong with what was asked for.
[[gnu::cold]] inline Table make_table(std::vector<TensorSpec> tensors, TableOptions options, const RuleOps& rule, int n, const Grouping& group) {
  Table t;
  const auto wrong = [](std::initializer_list<Piece> text) { throw Error(Errc::invalid_argument, {"a table: ", concat(text)}); };
  if (tensors.empty()) wrong({"it needs a tensor"});
  if (tensors.size() > 65535) wrong({"it cannot have ", tensors.size(), " tensors; 65535 are the most"});
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& spec = tensors[i];
    if (spec.name.empty()) wrong({"tensor number ", i, " has no name"});
    for (std::size_t k = 0; k < i; ++k)
      if (tensors[k].name == spec.name) wrong({"there are two tensors '", spec.name, "'"});
    if (spec.is_sparse() == (spec.count > 0)) wrong({"'", spec.name, "' needs a count of elements, or else a row's length for one that is found by keys"});
    if (spec.first_key > spec.last_key) wrong({"'", spec.name, "': its keys end at ", spec.last_key, ", before they begin, at ", spec.first_key});
  }
  t.servers = options.servers;
  if (t.servers.empty())
    for (Rank r = 0; r < n; ++r) t.servers.push_back(r);
  if (const std::string problem = problem_with(t.servers, n); !problem.empty()) wrong({"servers: ", problem});
  for (Rank r = 0; r < n; ++r)
    if (!options.dedicated || std::find(t.servers.begin(), t.servers.end(), r) == t.servers.end()) t.workers.push_back(r);
  if (t.workers.empty()) wrong({"all ranks are dedicated servers: nobody is left to work"});
  if (options.replicas < 0 || options.replicas > 1) wrong({"replicas may be 0 or 1, not ", options.replicas});
  if (options.replicas == 1 && t.servers.size() < 2) wrong({"a replica needs a second server"});
  if (rule.whole_clocks && !options.fold.waits()) wrong({"this rule wants what all workers push in a clock together: fold by_rank or as an algorithm, not by arrival"});
  if (options.fold.waits() && !rule.combine.function) wrong({"what workers push cannot be folded: the rule's elements have no sum, and it has no Combine"});
  if (options.guests < 0 || options.guests > 1024) wrong({"guests may be 0 to 1024, not ", options.guests});
  if (options.guests > 0 && options.door.empty()) wrong({"workers that come later need a door (TableOptions::door)"});
  if (options.guests > 0 && n + options.guests > 65535) wrong({"it cannot have ", n + options.guests, " workers"});
  try {
    if (!options.door.empty()) (void)split_address(options.door);
  } catch (const Error& error) {
    wrong({"its door: ", error.text()});
  }
  if (options.block_bytes < rule.grain) wrong({"blocks of ", options.block_bytes, " bytes hold no element of ", rule.grain});
  t.tensors = std::move(tensors);
  t.options = std::move(options);
  t.rule = rule;
  t.size = n;
  t.group = static_cast<int>(t.workers.size()) == n ? group : Grouping{};
  for (int g = 0; g < t.options.guests; ++g) t.workers.push_back(n + g);
  return t;
}

}  // namespace detail

/// A table that all ranks of a communicator make together, with the same tensors, options and rule. Workers push, pull and tick; servers
/// serve in the background, or, if they are dedicated, in serve(). One thread of a rank's uses it at a time. close() before the end, on all ranks:
/// a rank that destroys its table without it has left, and what only it kept is lost.
template <Element T, class Rule = Add>
  requires ServerRule<Rule, T>
class ParameterServer : public TableTensors<T> {
 public:
  ParameterServer(Communicator& comm, std::vector<TensorSpec> tensors, TableOptions options = {}, const Rule& rule = {}) {
    detail::Erasure<SlotTransport>::enable();
    const auto kept = std::make_shared<const Rule>(rule);
    detail::Table table = detail::make_table(std::move(tensors), std::move(options), detail::rule_ops<T>(*kept), comm.size(), comm.group());
    std::unique_ptr<SymmetricMemory> memory;
    auto transport = comm.open_transport(table.description(), table.shared_bytes(), memory);
    const AnyEngine::Settings engine = comm.settings();
    node_ = std::make_shared<detail::TableNode>(std::move(transport), std::move(memory), std::move(table), kept, detail::TableSettings{engine.clock, engine.wait, engine.accounting, comm.timeout(), comm.ledger().settings(), true});
    this->use(node_);
    if (!node_->table().options.door.empty()) open_door(comm);
  }
  /// Over a transport of its own; for tests.
  ParameterServer(std::unique_ptr<AnyTransport> transport, std::vector<TensorSpec> tensors, TableOptions options, const Rule& rule, const detail::TableSettings& settings) {
    const auto kept = std::make_shared<const Rule>(rule);
    const int n = transport->size();
    node_ = std::make_shared<detail::TableNode>(std::move(transport), nullptr, detail::make_table(std::move(tensors), std::move(options), detail::rule_ops<T>(*kept), n, {}), kept, settings);
    this->use(node_);
  }

  /// This worker has ended a clock: its pushes from now on belong to the next one. Never waits.
  void tick() { node_->tick_to(node_->clock() + 1); }
  /// As many ticks as it takes to that clock; Errc::invalid_argument if it is past that already.
  void tick_to(std::uint64_t clock) {
    if (clock < node_->clock()) throw Error(Errc::invalid_argument, {"tick_to: the clock of rank ", node_->rank(), " is ", node_->clock(), ", it cannot go back to ", clock});
    if (clock > node_->clock()) node_->tick_to(clock);
  }
  std::uint64_t clock() const { return node_->clock(); }
  bool is_worker() const { return node_->is_worker(); }

  /// What every push with a clock below this makes, and no other, whoever calls: this one worker does, before anybody has pushed at
  /// that clock or later, else Errc::invalid_argument. The table goes on; the snapshot can be streamed when all have ticked that far.
  Snapshot snapshot_at(std::uint64_t clock) const { return {node_, clock}; }
  /// Sets all values and the rule's state to those of a file that Snapshot::write() made, of a table with the same tensors, and
  /// returns its clock. One worker calls it, while nobody pushes. Nothing is changed if the file is not whole and right.
  std::uint64_t restore(const std::string& path) { return detail::restore_table(*node_, path); }

  /// What a vector begins with, past the rule. One worker calls it, while nobody pushes; who pulls after that, and a barrier, sees it.
  void set(std::string_view name, std::span<const T> values) {
    const DenseTensor<T> tensor = this->dense(name);
    if (values.size() != tensor.size()) throw Error(Errc::invalid_argument, {"set('", name, "'): the buffer has ", values.size(), " elements, expected ", tensor.size()});
    if (!is_worker()) throw Error(Errc::invalid_argument, {"set('", name, "'): rank ", node_->rank(), " is no worker of this table"});
    detail::set_values(*node_, this->find(name), std::as_bytes(values));
  }

  /// Of a dedicated server: serves until all workers have left.
  void serve() { node_->serve(); }
  /// This worker leaves; its rank serves until all others have. Collective, in no order.
  void close() { node_->close(); }

  /// Where readers, and workers that come later, may come in (see TableOptions::door): any of these, HOST:PORT, one for each server.
  const std::vector<std::string>& doors() const { return doors_; }

  const Ledger& ledger() const { return node_->ledger(); }
  TransportCounters counters() const { return node_->counters(); }
  auto traffic() const { return node_->traffic(); }
  /// What this rank's shards have answered, and whether the staleness bound held.
  detail::TableServer::Monitor monitor() const {
    return node_->look([](const detail::TableServer& server) { return server.monitor(); });
  }

 private:
  /// Each server opens its own, and all are told where they are. Collective.
  [[gnu::cold]] void open_door(Communicator& comm) {
    const detail::Table& table = node_->table();
    const auto mine = std::find(table.servers.begin(), table.servers.end(), comm.rank());
    struct Where {
      SocketAddress address;
      char problem[232] = {};
    } where;
    static_assert(sizeof(Where) == 256);
    detail::FileDescriptor listens;
    try {
      if (mine != table.servers.end()) listens = detail::open_door(table.options.door, mine == table.servers.begin(), where.address);
    } catch (const Error& error) {
      where.address = {};
      std::string(error.text()).copy(where.problem, sizeof where.problem - 1);
    }
    std::vector<std::byte> all(static_cast<std::size_t>(comm.size()) * sizeof where);
    comm.all_gather(std::as_bytes(std::span(&where, 1)), std::span(all));
    detail::TableNotice notice{table, {}};
    for (const Rank server : table.servers) {
      std::memcpy(&where, all.data() + static_cast<std::size_t>(server) * sizeof where, sizeof where);
      where.problem[sizeof where.problem - 1] = '\0';
      if (!where.address.is_valid()) throw Error(Errc::invalid_argument, {"a table's door: rank ", server, ": ", where.problem});
      notice.doors.push_back(where.address);
      doors_.push_back(where.address.text());
    }
    if (notice.bytes().size() > detail::longest_notice) throw Error(Errc::invalid_argument, {"a table's door: the names of ", table.tensors.size(), " tensors are too long to tell guests"});
    if (mine == table.servers.end()) return;
    auto door = std::make_unique<detail::TableDoor>(std::move(listens), detail::NetworkSettings::from_environment(node_->timeout(), comm.settings().clock), table.credits(), [node = node_.get()] { node->wake(); });
    door->open(notice.bytes(), static_cast<std::size_t>(mine - table.servers.begin()));
    node_->let_in(std::move(door));
  }
  std::shared_ptr<detail::TableNode> node_;
  std::vector<std::string> doors_;
};

}  // namespace tally::inline v0
