#include "kernels/gemm/prepacked.h"

#include "kernels/isa/dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ggft {

size_t prepacked_bytes(const KernelSet & kernels, Format format, const Weight & w, bool nt) {
    const size_t bytes = 4 * kernels.gemm.panel_size(format, w, nt).words;
    return bytes <= PREPACKED_MOST ? bytes : 0;
}

PrepackedWeights::PrepackedWeights(const KernelSet & kernels, Format format, size_t limit)
    : kernels_(kernels), format_(format) {
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

Weight PrepackedWeights::with_panels(Weight w, bool nt) {
    if (!memory_)
        return w;
    const auto [entry, is_new] = weights_.try_emplace({w.data, nt});
    std::optional<Kept> & kept = entry->second;
    if (is_new) {
        const size_t words = prepacked_bytes(kernels_, format_, w, nt) / 4;
        if (words > 0 && words <= words_ - used_) {
            kept.emplace();
            kept->made.resize(kernels_.gemm.panel_size(format_, w, nt).count);
            kept->panels = {memory_.get() + used_, kept->made.data()};
            used_ += words;
        }
    }
    w.prepacked = kept ? &kept->panels : nullptr;
    return w;
}

} // namespace ggft
