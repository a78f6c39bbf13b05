#include "kernels/rowwise/cross_entropy.h"

#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

constexpr int64_t BLOCK = 4096; // elements summed in F32 lanes before double takes over

float row_max(const float * z, int64_t n) {
    V m[4];
    for (V & v : m)
        v = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        GGFT_UNROLL for (int j = 0; j < 4; j++) m[j] = vmax(load(z + i + j * LANES), m[j]);
    }
    float best = max_lanes(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
    for (; i < n; i++)
        best = z[i] > best ? z[i] : best;
    return best;
}

GGFT_INLINE float exp_one(float x) {
    return vexp(splat(x))[0];
}

/// Sum of e^(z - max); with STORE, z is replaced by it.
template <bool STORE> double exp_sum(float * z, int64_t n, float max) {
    double total = 0;
    const V shift = splat(max);
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = first + BLOCK < n ? first + BLOCK : n;
        V sum[2] = {};
        int64_t i = first;
        for (; i + 2 * LANES <= last; i += 2 * LANES) {
            GGFT_UNROLL for (int j = 0; j < 2; j++) {
                const V e = vexp(load(z + i + j * LANES) - shift);
                if (STORE)
                    store(z + i + j * LANES, e);
                sum[j] += e;
            }
        }
        for (; i < last; i++) {
            const float e = exp_one(z[i] - max);
            if (STORE)
                z[i] = e;
            total += e;
        }
        total += sum_lanes(sum[0] + sum[1]);
    }
    return total;
}

/// z * scale, minus 1 at the label, to F32 in place or to BF16.
void write_gradient(float * z, int64_t n, float scale, int32_t label, uint16_t * bf16) {
    const float at_label = z[label] * scale - 1.0f;
    const V factor = splat(scale);
    int64_t i = 0;
    if (bf16) {
        for (; i + LANES <= n; i += LANES)
            store_bf16(bf16 + i, load(z + i) * factor);
        for (; i < n; i++)
            bf16[i] = to_bf16(z[i] * scale);
        bf16[label] = to_bf16(at_label);
    } else {
        for (; i + LANES <= n; i += LANES)
            store(z + i, load(z + i) * factor);
        for (; i < n; i++)
            z[i] *= scale;
        z[label] = at_label;
    }
}

void cross_entropy(float * logits, int64_t stride, const int32_t * labels, int64_t n_vocab,
                   int64_t n_rows, LogitGradient gradient, double * nats, int ith, int nth) {
    const Range part = split_range(n_rows, 1, ith, nth);
    for (int64_t t = part.first; t < part.last; t++) {
        float * z = logits + t * stride;
        uint16_t * bf16 = gradient.bf16 ? gradient.bf16 + t * gradient.bf16_stride : nullptr;
        const int32_t label = labels[t];
        if (label < 0) {
            nats[t] = 0;
            if (!gradient.wanted)
                continue;
            if (bf16) {
                std::memset(bf16, 0, (size_t)n_vocab * 2);
            } else {
                std::memset(z, 0, (size_t)n_vocab * 4);
            }
            continue;
        }
        const float max = row_max(z, n_vocab);
        const double at_label = (double)z[label] - max;
        const double sum =
            gradient.wanted ? exp_sum<true>(z, n_vocab, max) : exp_sum<false>(z, n_vocab, max);
        nats[t] = __builtin_log(sum) - at_label;
        if (gradient.wanted)
            write_gradient(z, n_vocab, (float)(1.0 / sum), label, bf16);
    }
}

} // namespace

extern const LossKernels loss_kernels;
const LossKernels loss_kernels = {cross_entropy};

} // namespace ggft::GGFT_ISA_NAMESPACE
