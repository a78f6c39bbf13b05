#include "kernels/isa/memory.h"

namespace ggft {

uint32_t * thread_words(size_t n) {
    static thread_local Words memory;
    static thread_local size_t size = 0;
    if (n > size) {
        memory.reset(); // before there is more, so that it never takes both
        size = 0;
        memory = try_words(n);
        if (!memory)
            throw std::bad_alloc();
        size = n;
    }
    return memory.get();
}

} // namespace ggft
