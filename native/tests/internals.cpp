#include "internals.h"

#include "kernels/dequant/dequant.h"
#include "kernels/rowwise/dropout_lanes.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

void exp(const float * x, int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += LANES)
        store(y + i, vexp(load(x + i)));
}

void vector_to_bf16(const float * x, int64_t n, uint16_t * y) {
    for (int64_t i = 0; i < n; i += LANES)
        store_bf16(y + i, load(x + i));
}

void dot_pairs_bf16(const uint32_t * a, const uint32_t * b, int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += LANES)
        store(y + i, dot_bf16(load(y + i), load_as<V>(a + i), load_as<V>(b + i)));
}

void dot_pairs_i16(const int32_t * a, const int32_t * b, int64_t n, int32_t * y) {
    for (int64_t i = 0; i < n; i += LANES) {
        const VI sum = dot_i16(load_as<VI>(y + i), load_as<VI>(a + i), load_as<VI>(b + i));
        std::memcpy(y + i, &sum, sizeof sum);
    }
}

void dropout(uint64_t seed, int64_t row, int64_t n, float p, float * factors) {
    const uint32_t key = dropout_row_key(seed, row);
    for (int64_t c = 0; c < n; c += LANES) {
        store(factors + c, dropout_factors(key, c, dropout_threshold(p), splat(1.0f / (1.0f - p))));
    }
}

} // namespace

extern const ggft_test::Internals internals;
const ggft_test::Internals internals = {exp,         vector_to_bf16, dot_pairs_bf16, dot_pairs_i16,
                                        dequant_f32, dequant_bf16,   dropout};

} // namespace ggft::GGFT_ISA_NAMESPACE
