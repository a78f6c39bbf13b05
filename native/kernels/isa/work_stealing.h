// How threads that are done help the others. The work of a node is cut into pieces, each thread
// begins with its own, and who has none left takes the next one of another thread: cores differ in
// speed, and other programs run on them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "kernels/isa/inline.h"

namespace ggft {

/// Which pieces are taken, for one node at a time.
class WorkStealing {
public:
    explicit WorkStealing(int n_threads)
        : n_threads_(n_threads), next_(new Counter[(size_t)n_threads]) {}

    GGFT_INLINE int n_threads() const { return n_threads_; }

    /// The number of the next of `owner`'s `n` pieces, or -1 if all are taken. Each of nth threads
    /// asks for each owner's until it gets -1; the last that does makes all ready for another node.
    GGFT_INLINE int64_t take(int owner, int64_t n, int nth) {
        std::atomic<int64_t> & next = counters_[owner].piece;
        const int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
        if (piece < n)
            return piece;
        if (piece == n + nth - 1)
            next.store(0, std::memory_order_relaxed);
        return -1;
    }

private:
    struct alignas(64) Counter {
        std::atomic<int64_t> piece = 0;
    };
    int n_threads_;
    std::unique_ptr<Counter[]> next_;
    Counter * counters_ = next_.get();
};

} // namespace ggft
