// What stands inside kernels and is tested by itself: compiled for each instruction set.
#pragma once

#include "ggml.h"

namespace ggft_test {

/// Arrays of n elements, a multiple of 16.
struct Internals {
    void (*exp)(const float * x, int64_t n, float * y);
    void (*to_bf16)(const float * x, int64_t n, uint16_t * y);
    /// y += a.odd * b.odd + a.even * b.even
    void (*dot_bf16)(const uint32_t * a, const uint32_t * b, int64_t n, float * y);
    void (*dot_i16)(const int32_t * a, const int32_t * b, int64_t n, int32_t * y);
    void (*dequant_f32)(ggml_type type, const void * blocks, int64_t n, float * out);
    void (*dequant_bf16)(ggml_type type, const void * blocks, int64_t n, uint16_t * out);
    void (*dropout)(uint64_t seed, int64_t row, int64_t n, float p, float * factors);
};

} // namespace ggft_test
