#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sgsc {
namespace {

constexpr std::int64_t PAGE = std::int64_t{1} << 12, HUGE_PAGE = std::int64_t{1} << 21;

}  // namespace

// On Linux not from the C library: large blocks inside its heap would keep it from reusing its own, or from trimming.
// The address sanitizer watches over nothing else, though.
#if defined(__linux__) && !defined(SGSC_WATCHED)
void* allocate_pages(std::int64_t bytes) noexcept {
  const std::int64_t spare = bytes < HUGE_PAGE ? 0 : HUGE_PAGE;
  void* mapped = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!spare) return mapped;
  char* const begin = static_cast<char*>(mapped);
  char* const data = begin + (-reinterpret_cast<std::uintptr_t>(begin) & (HUGE_PAGE - 1));
  if (data > begin) munmap(begin, data - begin);
  if (data < begin + spare) munmap(data + bytes, begin + spare - data);
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // a wish, no more
#endif
  return data;
}

void free_pages(void* data, std::int64_t bytes) noexcept { munmap(data, bytes); }
#elif defined(_WIN32)
void* allocate_pages(std::int64_t bytes) noexcept { return _aligned_malloc(bytes, PAGE); }
void free_pages(void* data, std::int64_t) noexcept { _aligned_free(data); }
#else
void* allocate_pages(std::int64_t bytes) noexcept {
  void* data = nullptr;
  return posix_memalign(&data, PAGE, bytes) == 0 ? data : nullptr;
}
void free_pages(void* data, std::int64_t) noexcept { std::free(data); }
#endif

namespace {

using Blocks = std::vector<std::unique_ptr<Block>>;

class Pool {
 public:
  Block* take(std::int64_t wanted) {
    const std::int64_t bytes = (std::max<std::int64_t>(wanted, 1) + PAGE - 1) / PAGE * PAGE;
    if (std::unique_ptr<Block> block = reuse(bytes)) return block.release();
    auto made = std::make_unique<Block>(Block{allocate_pages(bytes), bytes});
    if (!made->data) {
      release();
      made->data = allocate_pages(bytes);
    }
    if (!made->data) {
      const std::lock_guard<std::mutex> guard(lock_);
      used_ -= bytes;
      throw std::bad_alloc();
    }
    return made.release();
  }

  void give(Block* block) noexcept {
    const std::lock_guard<std::mutex> guard(lock_);
    std::unique_ptr<Block> owned(block);
    used_ -= block->bytes;
    try {
      blocks_.push_back(std::move(owned));
      free_ += block->bytes;
    } catch (...) {  // no memory for the list: push_back left `owned` alone
      free_pages(block->data, block->bytes);
    }
  }

  void release() noexcept {
    Blocks gone;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      gone.swap(blocks_);
      free_ = 0;
      peak_ = used_;
    }
    drop(gone);
  }

  Held held() {
    const std::lock_guard<std::mutex> guard(lock_);
    return {used_, free_};
  }

  void lock() { lock_.lock(); }
  void unlock() { lock_.unlock(); }

 private:
  // A free block that fits; or else null, with room made for a new one and the new one counted as used.
  std::unique_ptr<Block> reuse(std::int64_t bytes) {
    std::unique_ptr<Block> found;
    Blocks gone;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      auto best = blocks_.end();
      for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
        if ((*b)->bytes >= bytes && (*b)->bytes <= bytes + bytes / 4 &&
            (best == blocks_.end() || (*b)->bytes <= (*best)->bytes))  // of equal ones the latest: it may be in a cache
          best = b;
      if (best != blocks_.end()) {
        found = std::move(*best);
        blocks_.erase(best);
        free_ -= found->bytes;
      }
      used_ += found ? found->bytes : bytes;
      peak_ = std::max(peak_, used_);
      std::size_t oldest = 0;
      for (; used_ + free_ > peak_; ++oldest) free_ -= blocks_[oldest]->bytes;
      std::move(blocks_.begin(), blocks_.begin() + oldest, std::back_inserter(gone));
      blocks_.erase(blocks_.begin(), blocks_.begin() + oldest);
    }
    drop(gone);
    return found;
  }

  static void drop(const Blocks& blocks) noexcept {
    for (const auto& block : blocks) free_pages(block->data, block->bytes);
  }

  std::mutex lock_;
  Blocks blocks_;  // free ones, the latest last
  std::int64_t used_ = 0, free_ = 0, peak_ = 0;
};

Pool& pool() {
  static Pool* const one = [] {
    static Pool* const made = new Pool;  // never destroyed: tensors may outlive every static
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { made->lock(); }, [] { made->unlock(); }, [] { made->unlock(); });
#endif
    return made;
  }();
  return *one;
}

}  // namespace

Block* take_block(std::int64_t bytes) { return pool().take(bytes); }
void give_block(Block* block) noexcept { pool().give(block); }
void release_blocks() noexcept { pool().release(); }
Held held_memory() { return pool().held(); }

// Not from sysconf: on AMD, glibc 2.36 adds up the last-level caches of the whole package, ten times what a core has.
std::int64_t last_cache() {
  static const std::int64_t bytes = [] {
    std::int64_t found = 0;
#if defined(__linux__)
    for (int index = 0;; ++index) {
      std::ifstream size("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");  // as in 32768K
      std::int64_t kibibytes = 0;
      if (!(size >> kibibytes)) break;
      found = std::max(found, kibibytes << 10);
    }
#endif
    return found > 0 ? found : std::int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace sgsc
