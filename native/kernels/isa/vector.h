// The instruction set that a kernel is compiled for. A header each defines:
//
//   LANES       floats of a vector V (kernels/isa/portable.h), and the primitives on it
//   HAS_BF16, HAS_I16   number formats that products are compiled for, besides F32
//   FAST        the one that this machine multiplies fastest
//   HAS_BF16_TABLES     dequantizers to BF16 (kernels/dequant/dequant_avx512_bf16.cpp)
//   WINOGRAD    multiply and add are two instructions, and multiplies the scarcer ones: products of
//               pairs pay (kernels/gemm/tile_winograd.h)
//   MR, NV      rows, and vectors of columns, of a tile of products that stays in registers
//   LORA_RANKS  ranks of a tile of LoRA's products
//   TILE_COLUMNS  columns of a tile of calibration's products
//   GROUP_WORDS words of the panels that are in the L2 cache together
#pragma once

#include GGFT_ISA_HEADER

namespace ggft::GGFT_ISA_NAMESPACE {

using ggft::to_bf16; // of one float

GGFT_INLINE V load_bf16(const uint16_t * p) {
    return (V)(__builtin_convertvector(load_as<VH>(p), VU) << 16);
}
GGFT_INLINE void store_bf16(uint16_t * p, V x) {
    const VH h = to_bf16(x);
    std::memcpy(p, &h, sizeof h);
}

/// n BF16 as floats.
GGFT_INLINE void bf16_to_f32(const uint16_t * x, int64_t n, float * out) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store(out + k, load_bf16(x + k));
    for (; k < n; k++)
        out[k] = from_bf16(x[k]);
}

/// n floats as BF16 pairs, the last one padded with 0.
GGFT_INLINE void store_bf16_pairs(uint16_t * out, const float * x, int64_t n) {
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store_bf16(out + k, load(x + k));
    for (; k < n; k++)
        out[k] = to_bf16(x[k]);
    if (n % 2)
        out[n] = 0;
}

} // namespace ggft::GGFT_ISA_NAMESPACE
