// SPDX-License-Identifier: Apache-2.0
// Slots in a memfd shared by processes of one host. The file has no name, so nothing can be left behind; it is
// sealed against shrinking, so no peer can turn a load into SIGBUS. A communicator's slots are a region of the
// file: further communicators append regions, and the last rank to leave a region gives its pages back.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../file.hpp"
#include "slots.hpp"

namespace tally::inline v0 {

namespace detail {

/// Rounded up to whole pages.
inline std::size_t in_pages(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace detail

/// The job's file and the means to see whether its processes live.
class ShmFile {
 public:
  ShmFile() : fd_(::memfd_create("tally", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    if (!fd_) throw Error(Errc::no_resources, {"no descriptor for shared memory (memfd_create): ", detail::errno_text(errno)});
    ::fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK);
  }
  /// A file received from another process.
  explicit ShmFile(detail::FileDescriptor fd) : fd_(std::move(fd)) {
    const int seals = ::fcntl(fd_.get(), F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) throw Error(Errc::protocol, "the shared memory received is not a sealed memfd");
  }
  int get() const { return fd_.get(); }

  /// Makes the file at least this long.
  void grow(std::size_t bytes) {
    rlimit limit{};
    // Past this limit the kernel sends SIGXFSZ before it returns an error.
    if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes)
      throw Error(Errc::no_resources, {"shared memory of ", bytes, " bytes exceeds the file size limit (ulimit -f) of ", limit.rlim_cur});
    struct stat info {};
    if (::fstat(fd_.get(), &info) == 0 && static_cast<std::size_t>(info.st_size) >= bytes) return;
    if (::ftruncate(fd_.get(), static_cast<off_t>(bytes)) == 0) return;
    const int error = errno;  // another rank may have made it longer meanwhile
    if (::fstat(fd_.get(), &info) == 0 && static_cast<std::size_t>(info.st_size) >= bytes) return;
    throw Error(Errc::no_resources, {"no memory for ", bytes, " bytes of shared memory: ", detail::errno_text(error)});
  }

  /// The first region, which all processes begin with.
  void begin_with(std::size_t bytes) {
    grow(bytes);
    if (first_) return;
    void* page = ::mmap(nullptr, sizeof(detail::SlotHeader), PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    if (page == MAP_FAILED) throw Error(Errc::no_resources, {"cannot map a page of shared memory: ", detail::errno_text(errno)});
    first_ = {static_cast<detail::SlotHeader*>(page), [](detail::SlotHeader* header) { ::munmap(header, sizeof *header); }};
    std::uint64_t nobody = 0;
    first_->end.compare_exchange_strong(nobody, detail::in_pages(bytes));
  }
  /// Adds a region at the end and returns where it begins: on a page. Several processes may do so at once, so the
  /// end is counted where all see it: the file's own length says nothing until it has grown.
  std::uint64_t append(std::size_t bytes) {
    const std::uint64_t more = detail::in_pages(bytes), begin = first_->end.fetch_add(more);
    try {
      grow(begin + more);
    } catch (...) {
      std::uint64_t end = begin + more;
      first_->end.compare_exchange_strong(end, begin);  // given back, unless another region follows
      throw;
    }
    return begin;
  }

  /// From here on `runs` can tell. The pids are as this process sees them.
  void watch(const std::vector<pid_t>& pids) {
    for (const pid_t pid : pids) {
      detail::FileDescriptor process(pid == ::getpid() ? -1 : static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
      if (!process && pid != ::getpid() && errno != ESRCH)
        throw Error(Errc::no_resources, {"no descriptor to watch process ", pid, " (pidfd_open): ", detail::errno_text(errno)});
      gone_.push_back(pid != ::getpid() && !process);
      processes_.push_back(std::move(process));
    }
  }
  bool runs(Rank r) const {
    const auto i = static_cast<std::size_t>(r);
    if (i >= processes_.size()) return true;
    if (gone_[i] || !processes_[i]) return !gone_[i];
    pollfd event{processes_[i].get(), POLLIN, 0};
    return ::poll(&event, 1, 0) <= 0;
  }

 private:
  detail::FileDescriptor fd_;
  std::shared_ptr<detail::SlotHeader> first_;  // region's; mapped for as long as there is any communicator
  std::vector<detail::FileDescriptor> processes_;
  std::vector<char> gone_;  // before they could be watched; the own process is neither gone nor watched
};

class ShmMemory final : public SlotMemory {
 public:
  /// Maps the region at `offset`. `me` is -1 for an onlooker, who does not count among those who leave.
  ShmMemory(std::shared_ptr<ShmFile> file, const SlotLayout& layout, std::size_t offset, Rank me, std::vector<Rank> origins = {})
      : SlotMemory(layout, std::move(origins)), file_(std::move(file)), offset_(offset), me_(me) {
    if (offset == 0) file_->begin_with(mapped());
    else file_->grow(offset + mapped());
    void* base = ::mmap(nullptr, mapped(), PROT_READ | PROT_WRITE, MAP_SHARED, file_->get(), static_cast<off_t>(offset));
    if (base == MAP_FAILED) throw Error(Errc::no_resources, {"cannot map ", mapped(), " bytes of shared memory: ", detail::errno_text(errno)});
    base_ = static_cast<std::byte*>(base);
  }
  ~ShmMemory() override {
    // The first region goes with the file; who launched the ranks still looks for unread frames in it.
    const bool last = me_ >= 0 && offset_ > 0 && ::getpid() == process_ && header().departed.fetch_add(1) + 1 == static_cast<std::uint32_t>(layout().size());
    ::munmap(base_, mapped());
    if (last) ::fallocate(file_->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset_), static_cast<off_t>(mapped()));
  }

  std::string_view name() const override { return "shm"; }
  bool runs(Rank r) override { return file_->runs(origin(r)); }
  const std::shared_ptr<ShmFile>& file() const { return file_; }

  std::uint64_t reserve(std::span<const Rank> members) override {
    // Offsets only grow and regions are never reused, so a rank that left late cannot harm a new communicator.
    return file_->append(layout_of(members).bytes());
  }
  std::shared_ptr<SlotMemory> open(std::uint64_t token, std::span<const Rank> members, Rank me) override {
    return std::make_shared<ShmMemory>(file_, layout_of(members), token, me, origins_of(members));
  }
  void release(std::uint64_t) override {}

  // A page in front counts who let go. A rank that dies is never counted: then the pages go with the file.
  std::uint64_t reserve(std::size_t bytes) override { return file_->append(detail::in_pages(bytes) + detail::in_pages(1)); }
  std::shared_ptr<std::byte> map(std::uint64_t token, std::size_t bytes) override {
    const std::size_t front = detail::in_pages(1), all = detail::in_pages(bytes) + front;
    file_->grow(token + all);
    void* base = ::mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_SHARED, file_->get(), static_cast<off_t>(token));
    if (base == MAP_FAILED) throw Error(Errc::no_resources, {"cannot map ", all, " bytes of shared memory: ", detail::errno_text(errno)});
    ::madvise(base, all, MADV_HUGEPAGE);
    const auto let_go = [file = file_, base, all, token, n = static_cast<std::uint32_t>(layout().size()), process = ::getpid()](std::byte*) {
      const bool last = ::getpid() == process && static_cast<std::atomic<std::uint32_t>*>(base)->fetch_add(1) + 1 == n;
      ::munmap(base, all);
      if (last) ::fallocate(file->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(token), static_cast<off_t>(all));
    };
    return {static_cast<std::byte*>(base) + front, let_go};
  }
  void discard(std::uint64_t token, std::size_t bytes) override {
    ::fallocate(file_->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(token), static_cast<off_t>(detail::in_pages(bytes) + detail::in_pages(1)));
  }
  bool one_address_space() const override { return false; }

 private:
  std::size_t mapped() const { return detail::in_pages(layout().bytes()); }

  std::shared_ptr<ShmFile> file_;
  std::size_t offset_;
  Rank me_;
  pid_t process_ = ::getpid();  // a forked child of a rank is none
};

}  // namespace tally::inline v0
