#include "kernels/gemm/prepacked.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/gemm/product.h"

namespace ggft {
namespace {

int64_t panel_count(const Product & p) {
    return (p.n_cols + NR - 1) / NR;
}

/// Where in the reduction's order a panel stands.
int64_t panel_index(const Product & p, int64_t c0, int64_t k0) {
    return k0 / p.chunk() * panel_count(p) + c0 / NR;
}

} // namespace

size_t Prepacked::words_of(const Product & p) {
    const int64_t chunk = p.chunk();
    const int64_t steps =
        p.depth / chunk * panel_steps(p.format, chunk) + panel_steps(p.format, p.depth % chunk);
    return (size_t)round_up(panel_count(p) * NR * steps, 16);
}

Prepacked::Prepacked(const Product & p, uint32_t * words)
    : words_(words), made_((size_t)panel_index(p, 0, round_up(p.depth, p.chunk()))) {}

uint32_t * Prepacked::panels(const Product & p, int64_t c0, int64_t k0) const {
    const int64_t chunk = p.chunk(), depth = std::min(chunk, p.depth - k0);
    const int64_t before = k0 / chunk * panel_count(p) * panel_steps(p.format, chunk);
    return words_ + (before + c0 / NR * panel_steps(p.format, depth)) * NR;
}

bool Prepacked::made(const Product & p, int64_t c0, int64_t nc, int64_t k0) const {
    const auto first = made_.begin() + panel_index(p, c0, k0);
    return std::all_of(first, first + (nc + NR - 1) / NR, [](char made) { return made != 0; });
}

void Prepacked::set_made(const Product & p, int64_t c0, int64_t nc, int64_t k0) {
    std::fill_n(made_.begin() + panel_index(p, c0, k0), (nc + NR - 1) / NR, (char)1);
}

size_t prepacked_bytes(Precision precision, const Weight & w, bool nt) {
    const size_t bytes = 4 * Prepacked::words_of(nt ? Product::forward(precision, w)
                                                    : Product::backward(precision, w));
    return bytes <= PREPACKED_MOST ? bytes : 0;
}

PrepackedWeights::PrepackedWeights(size_t limit) {
    constexpr size_t LARGE_PAGE = 2u << 20; // panels are read from end to end
    const bool large = limit >= LARGE_PAGE;
    const size_t unit = large ? LARGE_PAGE : CACHE_LINE, bytes = limit / unit * unit;
    if (bytes == 0)
        return;
    memory_ = try_words(bytes / 4, unit);
    if (!memory_)
        return;
#if defined(__linux__)
    if (large)
        madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    words_ = bytes / 4;
}

Weight PrepackedWeights::with_panels(Precision precision, Weight w, bool nt) {
    if (!memory_)
        return w;
    const auto [entry, is_new] = weights_.try_emplace({w.data, nt});
    std::optional<Prepacked> & kept = entry->second;
    if (is_new) {
        const Product p = nt ? Product::forward(precision, w) : Product::backward(precision, w);
        const size_t words = prepacked_bytes(precision, w, nt) / 4;
        if (words > 0 && words <= words_ - used_) {
            kept.emplace(p, memory_.get() + used_);
            used_ += words;
        }
    }
    w.prepacked = kept ? &*kept : nullptr;
    return w;
}

} // namespace ggft
