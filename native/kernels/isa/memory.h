// Aligned memory of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ggft {

inline constexpr size_t CACHE_LINE = 64;

struct FreeMemory {
    void operator()(void * p) const { std::free(p); }
};
using Words = std::unique_ptr<uint32_t, FreeMemory>;

/// Room for `n` words, a multiple of `alignment` bytes; null if there is none.
inline Words try_words(size_t n, size_t alignment = CACHE_LINE) {
    const size_t bytes = (n * sizeof(uint32_t) + alignment - 1) / alignment * alignment;
    return Words((uint32_t *)std::aligned_alloc(alignment, bytes));
}

/// This thread's working memory, grown to `n` words and kept until the thread ends. Kernels of
/// one thread run one after the other and share it: each finds in it what the one before left.
/// Throws std::bad_alloc.
uint32_t * thread_words(size_t n);

} // namespace ggft
