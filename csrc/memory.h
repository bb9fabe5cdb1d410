// Memory of large results, kept and used again.
//
// The system clears every page that it hands out: for 64 MiB that takes several times as long as a kernel that fills
// them. A block that its user lets go stays here, and the smallest free one that is at most a quarter too large serves
// the next request.
//
// What is held, in use and free together, never exceeds the most that was ever in use at once: before a new block is
// allocated, the blocks that were free for longest go back to the system. `release_blocks` gives all free ones back.
//
// Any thread may call, also while the process exits: nothing here is ever destroyed.
#pragma once

#include <cstdint>

// Under the address sanitizer every block is its own allocation, of the size that was asked for.
#if defined(__SANITIZE_ADDRESS__)
#define SGSC_WATCHED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SGSC_WATCHED
#endif
#endif

namespace sgsc {

struct Block {
  void* data;          // at least 64-byte aligned; uninitialised
  std::int64_t bytes;  // at least what was asked for
};

// Throws std::bad_alloc.
Block* take_block(std::int64_t bytes);
void give_block(Block* block) noexcept;
void release_blocks() noexcept;

struct Held {
  std::int64_t used, free;  // bytes
};
Held held_memory();

// Pages from the system, huge ones from 2 MiB on where it grants them; null if there are none. What reads such memory
// from end to end is a third faster than from small pages, on a virtual machine.
void* allocate_pages(std::int64_t bytes) noexcept;
void free_pages(void* data, std::int64_t bytes) noexcept;

// Bytes of the last-level cache: results above are better written past it. What the system does not tell is taken to be
// 32 MiB.
std::int64_t last_cache();

}  // namespace sgsc
