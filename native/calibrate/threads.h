// Work in pieces for threads of our own, outside of ggml's graphs.
#pragma once

#include "base/error.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ggft {

/// Runs f(piece) for every piece below n. What a piece computes must not depend on who computes it.
/// Throws Error(cancelled) once `cancelled` is set, leaving pieces undone. f must not throw.
template <class F>
void for_pieces(int n_threads, int64_t n, const std::atomic<bool> & cancelled, F f) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i = next++; i < n && !cancelled; i = next++)
            f(i);
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < std::min<int64_t>(n_threads, n); i++)
        threads.emplace_back(work);
    work();
    for (std::thread & t : threads)
        t.join();
    if (cancelled)
        fail(ErrorKind::cancelled, "cancelled");
}

} // namespace ggft
