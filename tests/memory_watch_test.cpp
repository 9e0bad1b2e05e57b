// SPDX-License-Identifier: Apache-2.0
// Memory that is watched: whoever unmaps it, moves it or gives its pages back, that is told before the same addresses can be used again.
#include <catch2/catch.hpp>

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <tally/transport/memory_watch.hpp>

using tally::detail::MemoryWatch;

namespace {

const std::size_t page = MemoryWatch::page();

MemoryWatch* watch() {
  MemoryWatch* const watch = MemoryWatch::get();
  if (!watch) std::printf("skipped: userfaultfd(2) is not to be had here\n");
  return watch;
}
/// Pages of this process's own, each written to.
std::byte* map(std::size_t pages, void* at = nullptr) {
  void* const p = ::mmap(at, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED_NOREPLACE : 0), -1, 0);
  if (p == MAP_FAILED) return nullptr;
  for (std::size_t i = 0; i < pages; ++i) static_cast<volatile char*>(p)[i * page] = 1;
  return static_cast<std::byte*>(p);
}
/// What is said to be gone of those pages.
std::size_t gone(MemoryWatch& watch, MemoryWatch::Listener& listener, MemoryWatch::Range pages) {
  std::size_t bytes = 0;
  watch.take(listener, [&](MemoryWatch::Range range) {
    const std::uintptr_t begin = std::max(range.begin, pages.begin), end = std::min(range.end, pages.end);
    if (begin < end) bytes += end - begin;
  });
  return bytes;
}

}  // namespace

TEST_CASE("pages are whole ones, and all that are touched") {
  const auto range = MemoryWatch::pages_of(reinterpret_cast<void*>(3 * page + 5), page);
  CHECK(range.begin == 3 * page);
  CHECK(range.end == 5 * page);
  CHECK(MemoryWatch::pages_of(reinterpret_cast<void*>(3 * page), page).end == 4 * page);
}

TEST_CASE("what is there stays, and what goes is told: unmapped, moved, or given back") {
  MemoryWatch* const all = watch();
  if (!all) return;
  MemoryWatch::Listener listener(all), other(all);
  std::byte* const p = map(8);
  const auto pages = MemoryWatch::pages_of(p, 8 * page);
  REQUIRE(all->watch(pages));
  CHECK(all->watch(pages));  // again
  CHECK(gone(*all, listener, pages) == 0);
  for (std::size_t i = 0; i < 8 * page; ++i) p[i] = std::byte{7};  // nobody waits
  CHECK(gone(*all, listener, pages) == 0);

  REQUIRE(::madvise(p + 2 * page, page, MADV_DONTNEED) == 0);
  CHECK(gone(*all, listener, pages) == page);
  CHECK(gone(*all, listener, pages) == 0);
  CHECK(p[2 * page] == std::byte{0});  // and no fault waits for anybody
  void* const moved = ::mremap(p + 4 * page, page, 2 * page, MREMAP_MAYMOVE);
  REQUIRE(moved != MAP_FAILED);
  CHECK(gone(*all, listener, pages) >= page);
  REQUIRE(::munmap(moved, 2 * page) == 0);
  REQUIRE(::munmap(p, 8 * page) == 0);
  CHECK(gone(*all, listener, pages) >= 7 * page);
  CHECK(gone(*all, other, pages) >= 8 * page);  // to each
}

TEST_CASE("what is not there cannot be watched") {
  MemoryWatch* const all = watch();
  if (all) CHECK(!all->watch(MemoryWatch::pages_of(reinterpret_cast<void*>(page), page)));
}

TEST_CASE("more that is gone than there is room for is everything") {
  MemoryWatch* const all = watch();
  if (!all) return;
  MemoryWatch::Listener listener(all);
  std::byte* const kept = map(1);
  REQUIRE(all->watch(MemoryWatch::pages_of(kept, page)));
  for (int i = 0; i < 100; ++i) {
    std::byte* const p = map(1);
    REQUIRE(all->watch(MemoryWatch::pages_of(p, page)));
    REQUIRE(::munmap(p, page) == 0);
  }
  CHECK(gone(*all, listener, MemoryWatch::pages_of(kept, page)) == page);
  CHECK(gone(*all, listener, MemoryWatch::pages_of(kept, page)) == 0);
  ::munmap(kept, page);
}

TEST_CASE("the heap may shrink and grow while it is watched") {
  MemoryWatch* const all = watch();
  if (!all) return;
  MemoryWatch::Listener listener(all);
  for (int i = 0; i < 50; ++i) {
    std::vector<std::vector<char>> blocks;
    for (int k = 0; k < 40; ++k) {
      blocks.emplace_back(100'000, 'x');
      const auto pages = MemoryWatch::pages_of(blocks.back().data(), blocks.back().size());
      REQUIRE(all->watch(pages));
      (void)gone(*all, listener, pages);
      CHECK(gone(*all, listener, pages) == 0);
    }
  }
}

TEST_CASE("whoever maps the same addresses again after another thread has unmapped them finds them gone") {
  MemoryWatch* const all = watch();
  if (!all) return;
  MemoryWatch::Listener listener(all);
  for (int i = 0; i < 300; ++i) {
    std::byte* const p = map(1);
    const auto pages = MemoryWatch::pages_of(p, page);
    REQUIRE(all->watch(pages));
    (void)gone(*all, listener, pages);
    std::thread unmaps([&] { ::munmap(p, page); });
    std::byte* again = nullptr;
    while (!again) again = map(1, p);  // as soon as it can be had
    REQUIRE(gone(*all, listener, pages) > 0);
    unmaps.join();
    ::munmap(again, page);
  }
}
