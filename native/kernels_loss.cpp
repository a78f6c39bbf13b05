#include "kernels_loss.h"

#include "kernels_simd.h"

#include <cmath>

namespace ggft {

static float row_max(const float * x, int64_t n) {
    V       m = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) { m = vmax(m, load(x + i)); }
    float max = max_lanes(m);
    for (; i < n; i++) { max = x[i] > max ? x[i] : max; }
    return max;
}

// Replaces x by e^(x - max) when `write`, and returns the sum. F32 sums of BLOCK elements are added in double.
template <bool write> static double exp_sum(float * x, float max, int64_t n) {
    constexpr int64_t BLOCK = 64 * LANES;
    double            sum   = 0;
    int64_t           i     = 0;
    while (i + LANES <= n) {
        const int64_t end = i + BLOCK < n ? i + BLOCK : n;
        V             s{};
        for (; i + LANES <= end; i += LANES) {
            const V e = vexp(load(x + i) - splat(max));
            if (write) { store(x + i, e); }
            s += e;
        }
        sum += sum_lanes(s);
    }
    for (; i < n; i++) {
        const float e = std::exp(x[i] - max);
        if (write) { x[i] = e; }
        sum += e;
    }
    return sum;
}

void cross_entropy_inplace(float * logits, const int32_t * labels, float * nats, bool gradient, int64_t n_vocab,
                           int64_t n_rows, int ith, int nth) {
    const Range rows = split_range(n_rows, 1, ith, nth);
    for (int64_t r = rows.first; r < rows.last; r++) {
        float *      x     = logits + r * n_vocab;
        const float  max   = row_max(x, n_vocab);
        const double label = (double) x[labels[r]] - max;
        const double sum   = gradient ? exp_sum<true>(x, max, n_vocab) : exp_sum<false>(x, max, n_vocab);
        nats[r]            = (float) (std::log(sum) - label);
        if (!gradient) { continue; }
        const float inverse = (float) (1.0 / sum);
        for (int64_t i = 0; i < n_vocab; i++) { x[i] *= inverse; }
        x[labels[r]] = (float) std::expm1(label - std::log(sum));  // p - 1 without cancellation
    }
}

}  // namespace ggft
