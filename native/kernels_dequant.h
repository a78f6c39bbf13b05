// Rows of quantized weights as BF16 or F32.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace ggft {

using DequantBf16 = void (*)(const void * blocks, int64_t n, uint16_t * out);

/// A vectorized dequantizer straight to BF16 for `type`, or null where there is none.
/// n is a multiple of the type's block size.
DequantBf16 fast_dequant_bf16(ggml_type type);

/// n elements of `type` as F32 (ggml's own dequantizer).
void dequant_f32(ggml_type type, const void * blocks, int64_t n, float * out);

/// n elements of `type` as BF16: the fast one, else F32 rounded to nearest even.
void dequant_bf16(ggml_type type, const void * blocks, int64_t n, uint16_t * out);

} // namespace ggft
