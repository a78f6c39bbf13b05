// Rows of quantized weights as BF16 or F32.
#pragma once

#include "ggml.h"
#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {

using DequantBf16 = void (*)(const void * blocks, int64_t n, uint16_t * out);
using DequantF32 = void (*)(const void * blocks, int64_t n, float * out);

/// A vectorized dequantizer for `type`, or null where there is none. n is a multiple of the type's
/// block size.
DequantBf16 fast_dequant_bf16(ggml_type type);
DequantF32 fast_dequant_f32(ggml_type type);
/// Where HAS_BF16_TABLES.
DequantBf16 table_dequant_bf16(ggml_type type);

/// n elements of `type` as F32: the fast one, else ggml's own.
void dequant_f32(ggml_type type, const void * blocks, int64_t n, float * out);

/// n elements of `type` as BF16: the fast one, else F32 rounded to nearest even.
void dequant_bf16(ggml_type type, const void * blocks, int64_t n, uint16_t * out);

/// The 8 six-bit (scale, min) pairs of a Q4_K or Q5_K superblock.
struct KScales {
    uint8_t scale[8], min[8];
};
/// Unpack them from their 12 bytes.
GGFT_INLINE KScales k_scales(const uint8_t * p) {
    const uint32_t a = load_as<uint32_t>(p), b = load_as<uint32_t>(p + 4),
                   c = load_as<uint32_t>(p + 8);
    const uint32_t words[4] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u),
                               b & 0x3f3f3f3fu,
                               ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u)};
    return load_as<KScales>(words);
}

} // namespace ggft::GGFT_ISA_NAMESPACE
