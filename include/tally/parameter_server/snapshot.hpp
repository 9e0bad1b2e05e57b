// SPDX-License-Identifier: Apache-2.0
// Snapshots of a table: what it is at one clock, streamed block by block to a sink or a file while pushes go on, with a checksum
// each; and back into a table of the same tensors, however many servers either has. Nothing of a file is believed before it is checked.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../file.hpp"
#include "../network/crc32c.hpp"
#include "node.hpp"

namespace tally::inline v0 {

/// Takes what a snapshot consists of, in order.
using SnapshotSink = std::function<void(std::span<const std::byte>)>;

namespace detail {

/// A file is a head (this, then each tensor's name and shape, then a checksum of both), blocks, and an end, which is a block of no tensor.
struct SnapshotHead {
  char magic[8] = {'t', 'a', 'l', 'l', 'y', 't', 'b', '1'};
  std::uint64_t clock = 0;
  std::uint32_t type = 0, grain = 0, state_grain = 0, states = 0, tensors = 0, unused = 0;
};
struct SnapshotTensor {
  std::uint64_t name = 0, count = 0, row = 0, first_key = 0, last_key = 0;  // name: its length
  friend bool operator==(const SnapshotTensor&, const SnapshotTensor&) = default;
};
struct SnapshotBlock {
  static constexpr std::uint32_t end = ~std::uint32_t{0};
  std::uint32_t tensor = end, column = 0;
  std::uint64_t first = 0, count = 0, bytes = 0;  // of the end, count: blocks
  std::uint32_t payload_sum = 0, sum = 0;         // of the payload; of all before
};
static_assert(sizeof(SnapshotHead) == 40 && sizeof(SnapshotBlock) == 40);
inline std::uint32_t sum_of(const SnapshotBlock& b) { return crc32c(0, &b, sizeof b - sizeof b.sum); }

/// The table's shape as a snapshot has it, with its checksum.
inline std::string snapshot_head(const Table& table, std::uint64_t clock) {
  SnapshotHead head;
  head.clock = clock;
  head.type = static_cast<std::uint32_t>(table.rule.type);
  head.grain = static_cast<std::uint32_t>(table.rule.grain);
  head.state_grain = static_cast<std::uint32_t>(table.rule.state_grain);
  head.states = static_cast<std::uint32_t>(table.rule.states);
  head.tensors = static_cast<std::uint32_t>(table.tensors.size());
  std::string text(reinterpret_cast<const char*>(&head), sizeof head);
  for (const TensorSpec& t : table.tensors) {
    const SnapshotTensor shape{t.name.size(), t.count, t.row, t.first_key, t.last_key};
    text.append(reinterpret_cast<const char*>(&shape), sizeof shape).append(t.name);
  }
  const std::uint32_t sum = crc32c(0, text.data(), text.size());
  return text.append(reinterpret_cast<const char*>(&sum), sizeof sum);
}

class SnapshotReader {
 public:
  SnapshotReader(const std::string& path, const Table& table) : path_(path), file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY)) {
    if (!file_) throw Error(Errc::invalid_argument, {"cannot read the snapshot '", path, "': ", errno_text(errno)});
    struct ::stat status {};
    if (::fstat(file_.get(), &status) != 0 || !S_ISREG(status.st_mode)) throw Error(Errc::invalid_argument, {"cannot read the snapshot '", path, "': it is not a plain file"});
    SnapshotHead head;
    take(&head, sizeof head);
    if (std::memcmp(head.magic, SnapshotHead{}.magic, sizeof head.magic) != 0) refuse("it is no snapshot of a table");
    std::string text(reinterpret_cast<const char*>(&head), sizeof head);
    if (head.tensors > 65535) refuse("its head is damaged");
    std::vector<std::pair<SnapshotTensor, std::string>> tensors;
    for (std::uint32_t i = 0; i < head.tensors; ++i) {
      SnapshotTensor shape;
      take(&shape, sizeof shape);
      if (shape.name > 65535) refuse("its head is damaged");
      std::string name(shape.name, '\0');
      take(name.data(), name.size());
      text.append(reinterpret_cast<const char*>(&shape), sizeof shape).append(name);
      tensors.emplace_back(shape, name);
    }
    std::uint32_t sum = 0;
    take(&sum, sizeof sum);
    if (sum != crc32c(0, text.data(), text.size())) refuse("its head is damaged: the checksum differs");
    clock = head.clock;
    if (head.type != static_cast<std::uint32_t>(table.rule.type) || head.grain != table.rule.grain) refuse(concat({"its elements are ", name_of(static_cast<ElementType>(std::min<std::uint32_t>(head.type, 255))), " of ", head.grain, " bytes, the table's are ", name_of(table.rule.type), " of ", table.rule.grain}));
    if (head.states != static_cast<std::uint32_t>(table.rule.states) || head.state_grain != table.rule.state_grain) refuse(concat({"its rule has ", head.states, " states, the table's has ", table.rule.states}));
    for (std::size_t i = 0; i < std::max(tensors.size(), table.tensors.size()); ++i) {
      if (i >= tensors.size()) refuse(concat({"it has no tensor '", table.tensors[i].name, "'"}));
      if (i >= table.tensors.size()) refuse(concat({"it has a tensor '", tensors[i].second, "', which the table does not have"}));
      const TensorSpec& t = table.tensors[i];
      if (tensors[i].second != t.name) refuse(concat({"its tensor number ", i, " is '", tensors[i].second, "', the table's is '", t.name, "'"}));
      if (const auto& [shape, name] = tensors[i]; shape != SnapshotTensor{t.name.size(), t.count, t.row, t.first_key, t.last_key})
        refuse(concat({"'", t.name, "' has ", shape.count, " elements in rows of ", shape.row, ", keys ", shape.first_key, " to ", shape.last_key, "; in the table ", t.count, " in rows of ", t.row, ", keys ", t.first_key, " to ", t.last_key}));
    }
  }
  std::uint64_t clock = 0;
  /// The next block; false at the end.
  bool next(SnapshotBlock& b, std::vector<std::byte>& payload) {
    const std::uint64_t begin = at_;
    take(&b, sizeof b);
    if (b.sum != sum_of(b)) refuse(concat({"the block at byte ", begin, " is damaged: its checksum differs"}));
    if (b.tensor == SnapshotBlock::end) {
      if (b.count != blocks_) refuse(concat({"it has ", blocks_, " blocks, of ", b.count}));
      return false;
    }
    if (b.bytes > most_bytes) refuse(concat({"the block at byte ", begin, " claims ", b.bytes, " bytes"}));
    payload.resize(b.bytes);
    take(payload.data(), payload.size());
    if (crc32c(0, payload.data(), payload.size()) != b.payload_sum) refuse(concat({"the values at byte ", begin + sizeof b, " are damaged: their checksum differs"}));
    ++blocks_;
    return true;
  }
  [[noreturn]] void refuse(const std::string& why) const { throw Error(Errc::invalid_argument, {"the snapshot '", path_, "' cannot be restored: ", why}); }

  static constexpr std::size_t most_bytes = std::size_t{64} << 20;

 private:
  void take(void* to, std::size_t bytes) {
    for (std::size_t have = 0; have < bytes;) {
      const ssize_t got = ::read(file_.get(), static_cast<char*>(to) + have, bytes - have);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) refuse(errno_text(errno));
      if (got == 0) refuse(concat({"it ends at byte ", at_ + have, ", in the midst of it"}));
      have += static_cast<std::size_t>(got);
    }
    at_ += bytes;
  }
  std::string path_;
  FileDescriptor file_;
  std::uint64_t at_ = 0, blocks_ = 0;
};

/// Values past the rule, at all shards that have some of them.
inline void set_block(TableNode& node, const SnapshotBlock& b, std::span<const std::byte> payload) {
  const Table& table = node.table();
  Envelope e;
  e.kind = MessageKind::set;
  e.tensor = static_cast<std::uint16_t>(b.tensor);
  e.parts = static_cast<std::uint16_t>(b.column);
  const TensorSpec& t = table.tensors[b.tensor];
  for (int s = 0; s < table.shards(); ++s) {
    std::vector<std::byte> mine;
    if (t.is_sparse()) {
      const std::size_t row = payload.size() / b.count;
      for (std::size_t i = 0; i < b.count; ++i)
        if (table.shard_of(t, load<std::uint64_t>(payload.data() + i * row)) == s) mine.insert(mine.end(), payload.begin() + static_cast<std::ptrdiff_t>(i * row), payload.begin() + static_cast<std::ptrdiff_t>((i + 1) * row));
      e.count = mine.size() / row;
    } else {
      const Range part = table.part(b.tensor, s);
      const std::uint64_t begin = std::max<std::uint64_t>(part.first, b.first), end = std::min<std::uint64_t>(part.first + part.count, b.first + b.count);
      if (begin >= end) continue;
      e.first = begin;
      e.count = end - begin;
      if (b.column == Column::steps) mine.assign(payload.begin(), payload.end());
      else {
        const std::size_t grain = payload.size() / b.count;
        mine.assign(payload.begin() + static_cast<std::ptrdiff_t>((begin - b.first) * grain), payload.begin() + static_cast<std::ptrdiff_t>((end - b.first) * grain));
      }
    }
    if (e.count > 0) node.ask(s, e, std::move(mine));
  }
}
inline void set_values(TableNode& node, std::size_t tensor, std::span<const std::byte> values) {
  const std::size_t grain = node.table().rule.grain, most = (SnapshotReader::most_bytes / 2) / grain;
  for (std::size_t first = 0, all = values.size() / grain; first < all; first += most) {
    SnapshotBlock b;
    b.tensor = static_cast<decltype(b.tensor)>(tensor);
    b.column = 0;
    b.first = first;
    b.count = std::min(most, all - first);
    set_block(node, b, values.subspan(first * grain, b.count * grain));
  }
}

/// Restores a table from a file, checking all of it before the first value is set.
inline std::uint64_t restore_table(TableNode& node, const std::string& path) {
  const Table& table = node.table();
  const auto each = [&](auto&& use) {
    SnapshotReader reader(path, table);
    SnapshotBlock b;
    std::vector<std::byte> payload;
    while (reader.next(b, payload)) {
      if (b.tensor >= table.tensors.size()) reader.refuse(concat({"there is no tensor number ", b.tensor}));
      const TensorSpec& t = table.tensors[b.tensor];
      if (t.is_sparse() != (b.column == Column::rows)) reader.refuse(concat({"'", t.name, "' has no such column"}));
      if (!t.is_sparse()) {
        const std::size_t grain = b.column == 0 ? table.rule.grain : b.column == Column::steps ? 0 : table.rule.state_grain;
        if (b.column > static_cast<std::uint32_t>(table.rule.states) && b.column != Column::steps) reader.refuse(concat({"'", t.name, "' has no column ", b.column}));
        if (b.first > t.count || b.count > t.count - b.first || b.bytes != (grain ? b.count * grain : sizeof(std::uint64_t))) reader.refuse(concat({"'", t.name, "': elements ", b.first, " to ", b.first + b.count, " in ", b.bytes, " bytes"}));
      } else {
        const std::size_t row = sizeof(std::uint64_t) + SparsePart(table.rule, t.row).row_bytes();
        if (b.count > b.bytes || b.bytes != b.count * row) reader.refuse(concat({"'", t.name, "': ", b.count, " rows in ", b.bytes, " bytes"}));
        for (std::size_t i = 0; i < b.count; ++i)
          if (const auto key = load<std::uint64_t>(payload.data() + i * row); key < t.first_key || key > t.last_key) reader.refuse(concat({"'", t.name, "': key ", key, " is out of its range"}));
      }
      use(b, payload);
    }
    return reader.clock;
  };
  each([](const SnapshotBlock&, const std::vector<std::byte>&) {});
  return each([&](const SnapshotBlock& b, const std::vector<std::byte>& payload) { set_block(node, b, payload); });
}

}  // namespace detail

/// What a table is, or will be, at one clock: every push with a clock below it, and no other. The shards keep the last few.
class Snapshot {
 public:
  Snapshot(std::shared_ptr<detail::TableNode> node, std::uint64_t clock) : node_(std::move(node)), clock_(clock) {
    detail::Envelope e;
    e.kind = detail::MessageKind::cut;
    e.clock = clock;
    for (int s = 0; s < node_->table().shards(); ++s) node_->ask(s, e, {});
  }
  std::uint64_t clock() const { return clock_; }

  /// Waits until every worker has ticked past it, and hands it to `sink`, a block at a time. Returns bytes.
  std::uint64_t stream(const SnapshotSink& sink) const {
    using namespace detail;
    const Table& table = node_->table();
    if (node_->is_worker() && node_->clock() < clock_) throw Error(Errc::invalid_argument, {"the snapshot at clock ", clock_, " cannot be whole while this worker, rank ", node_->rank(), ", is at clock ", node_->clock(), ": tick that far first"});
    std::uint64_t total = 0, blocks = 0;
    const auto put = [&](const void* data, std::size_t bytes) {
      total += bytes;
      if (bytes > 0) sink({static_cast<const std::byte*>(data), bytes});
    };
    const std::string head = snapshot_head(table, clock_);
    put(head.data(), head.size());
    const auto block = [&](std::size_t tensor, std::uint32_t column, std::uint64_t first, std::uint64_t count, std::span<const std::byte> payload) {
      SnapshotBlock b{static_cast<std::uint32_t>(tensor), column, first, count, payload.size(), crc32c(0, payload.data(), payload.size()), 0};
      b.sum = sum_of(b);
      put(&b, sizeof b);
      put(payload.data(), payload.size());
      ++blocks;
    };
    std::vector<std::byte> buffer(block_bytes);
    for (std::size_t t = 0; t < table.tensors.size(); ++t)
      for (int s = 0; s < table.shards(); ++s) {
        Envelope e;
        e.kind = MessageKind::pull;
        e.flags = Envelope::of_cut;
        e.clock = clock_;
        e.tensor = static_cast<std::uint16_t>(t);
        const auto fetch = [&](std::uint16_t column, std::uint64_t first, std::uint64_t count) {
          e.parts = column;
          e.first = first;
          e.count = count;
          const Envelope answer = node_->ask(s, e, {}, buffer.data(), buffer.size());
          if (answer.bytes > buffer.size() || answer.count > answer.bytes) throw Error(Errc::protocol, "a shard answers with more than was asked for");
          return answer;
        };
        if (table.tensors[t].is_sparse()) {
          const std::size_t row = sizeof(std::uint64_t) + SparsePart(table.rule, table.tensors[t].row).row_bytes();
          if (row > buffer.size()) buffer.resize(row);
          for (std::uint64_t first = 0, all = 1; first < all;) {
            const Envelope got = fetch(Column::rows, first, buffer.size() / row);
            all = got.number;
            if (got.count == 0 && first < all) throw Error(Errc::protocol, "a shard has fewer rows than it says");
            if (got.count > 0) block(t, Column::rows, first, got.count, std::span(buffer).first(got.bytes));
            first += got.count;
          }
          continue;
        }
        const Range part = table.part(t, s);
        for (int column = 0; column <= table.rule.states; ++column) {
          const std::size_t grain = column == 0 ? table.rule.grain : table.rule.state_grain;
          for (std::size_t first = part.first; first < part.first + part.count;) {
            const std::size_t count = std::min(buffer.size() / grain, part.first + part.count - first);
            const Envelope got = fetch(static_cast<std::uint16_t>(column), first, count);
            block(t, static_cast<std::uint32_t>(column), first, count, std::span(buffer).first(got.bytes));
            first += count;
          }
        }
        if (part.count == 0) continue;
        const std::size_t runs = (part.count + table.block_elements() - 1) / table.block_elements();
        if (buffer.size() < runs * 24) buffer.resize(runs * 24);
        const Envelope got = fetch(Column::steps, part.first, part.count);
        for (std::size_t i = 0; i < got.count && (i + 1) * 24 <= got.bytes; ++i)
          block(t, Column::steps, load<std::uint64_t>(buffer.data() + i * 24), load<std::uint64_t>(buffer.data() + i * 24 + 8), std::span(buffer).subspan(i * 24 + 16, 8));
      }
    SnapshotBlock end;
    end.count = blocks;
    end.sum = sum_of(end);
    put(&end, sizeof end);
    return total;
  }
  /// The same into a file that is there when it is whole: written beside it, synchronised, renamed. Returns bytes.
  std::uint64_t write(const std::string& path) const {
    AtomicFile file(path);
    const std::uint64_t bytes = stream([&](std::span<const std::byte> data) { file.write({reinterpret_cast<const char*>(data.data()), data.size()}); });
    file.commit();
    return bytes;
  }
  /// The shards need not keep it any longer.
  void drop() const {
    detail::Envelope e;
    e.kind = detail::MessageKind::cut;
    e.flags = detail::Envelope::drops;
    e.clock = clock_;
    for (int s = 0; s < node_->table().shards(); ++s) node_->ask(s, e, {});
  }

 private:
  static constexpr std::size_t block_bytes = std::size_t{1} << 20;
  std::shared_ptr<detail::TableNode> node_;
  std::uint64_t clock_;
};

}  // namespace tally::inline v0
