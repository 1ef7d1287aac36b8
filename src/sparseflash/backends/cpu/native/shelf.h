// Scratch memory: released blocks are kept for the next calls.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <atomic>
#include <mutex>
#include <new>
#include <vector>
#include "checks.h"

namespace {

// The free list of released blocks, up to KEPT bytes.
struct Block { void *memory; int64_t bytes; };
#if defined(__SANITIZE_ADDRESS__)  // blocks of exactly the size asked for: an overrun is seen
constexpr int64_t KEPT = 0, PAGE = 64;
#else
constexpr int64_t KEPT = 256 << 20, PAGE = 4096;
#endif
constexpr int64_t HEADER = 64;
struct Shelf {
    std::mutex gate;
    std::vector<Block> blocks;
    int64_t held = 0;
};
Shelf &shelf() {
    static Shelf *s = new Shelf();
    return *s;
}
std::atomic<bool> poison{false};

void *handed_out(void *block, int64_t bytes) {
    void *p = (char *)block + HEADER;
    if (poison.load(std::memory_order_relaxed)) memset(p, 0xff, (size_t)bytes);  // NaN in every format
    return p;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
#define SF_EXACT_BLOCKS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SF_EXACT_BLOCKS 1
#endif
#endif

#if SF_EXACT_BLOCKS
// Under the sanitizer every block has exactly the size asked for, and is handed out once.
extern "C" void *sf_acquire(int64_t bytes) {
    void *p = nullptr;
    if (bytes < 0 || bytes > MOST_ITEMS || posix_memalign(&p, 64, (size_t)(bytes + HEADER))) return nullptr;
    return handed_out(p, bytes);
}
extern "C" void sf_release(void *memory) {
    if (memory) free((char *)memory - HEADER);
}
#else
extern "C" void *sf_acquire(int64_t bytes) {
    if (bytes < 0 || bytes > MOST_ITEMS) return nullptr;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    Shelf &s = shelf();
    std::unique_lock<std::mutex> mine(s.gate, std::try_to_lock);  // not worth waiting for: a busy shelf means a fresh block
    if (mine.owns_lock()) {
        size_t best = s.blocks.size();
        for (size_t i = 0; i < s.blocks.size(); i++)
            if (s.blocks[i].bytes >= bytes && s.blocks[i].bytes <= 2 * bytes + 65536 &&
                (best == s.blocks.size() || s.blocks[i].bytes < s.blocks[best].bytes)) best = i;
        if (best < s.blocks.size()) {
            Block b = s.blocks[best];
            s.blocks[best] = s.blocks.back();
            s.blocks.pop_back();
            s.held -= b.bytes;
            mine.unlock();
            return handed_out(b.memory, bytes);
        }
    }
    void *p = aligned_alloc(64, (size_t)(bytes + HEADER));
    if (!p) return nullptr;
    *(int64_t *)p = bytes;
    return handed_out(p, bytes);
}

extern "C" void sf_release(void *memory) {
    if (!memory) return;
    void *p = (char *)memory - HEADER;
    int64_t bytes = *(int64_t *)p;
    Shelf &s = shelf();
    std::unique_lock<std::mutex> mine(s.gate, std::try_to_lock);
    if (mine.owns_lock() && s.held + bytes <= KEPT && s.blocks.size() < 256) {
        try {
            s.blocks.push_back({p, bytes});
            s.held += bytes;
            return;
        } catch (const std::bad_alloc &) {
        }
    }
    if (mine.owns_lock()) mine.unlock();
    free(p);
}
#endif
