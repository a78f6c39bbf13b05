// One struct of traits per number format: how a product holds its factors, and how these lie in
// memory. A new format is a struct here, its tile, and what `if constexpr` says of it in panels and
// rows.
//
// A reduction runs over steps: 32-bit words that hold one F32, two BF16 or two 16-bit integers of
// consecutive reduction indices. A tile row is a row of such words. A panel holds NR columns as
// [step][NR]; kernels/gemm/panels.h draws both.
#pragma once

#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr int NR = NV * LANES;
inline constexpr int MAX_STEPS = 512; // words of a tile row
// Of tile rows, and of those of up to half as many words; rows fall into different cache sets.
inline constexpr int TILE_STRIDE = MAX_STEPS + 16, HALF_STRIDE = MAX_STEPS / 2 + 16;

struct F32 {
    static constexpr Format FORMAT = Format::f32;
    static constexpr bool IS_BF16 = false, BLOCKED = false;
    static constexpr int64_t PER_WORD = 1; // reduction indices
};

struct Bf16 {
    static constexpr Format FORMAT = Format::bf16;
    static constexpr bool IS_BF16 = true, BLOCKED = false;
    static constexpr int64_t PER_WORD = 2;
};

/// 16-bit integers in blocks of DEPTH reduction indices, each with a scale of its own: beside the
/// words of a row, ahead of them in a panel, as HEADER steps. Integers reach the limits; a block's
/// sum of products fits into 32 bits. Of activations with weights.
struct I16 {
    static constexpr Format FORMAT = Format::i16;
    static constexpr bool IS_BF16 = false, BLOCKED = true;
    static constexpr bool PAIR_SUMS = WINOGRAD;
    static constexpr int64_t PER_WORD = 2, DEPTH = 256, HEADER = 1 + PAIR_SUMS;
    static constexpr float ROW_LIMIT = 4095, PANEL_LIMIT = 2047; // 256 * 4095 * 2047 < 2^31
};

/// Of activations with activations, as in attention, where both factors have outliers: even limits,
/// and shorter blocks.
struct I16Even {
    static constexpr Format FORMAT = Format::i16;
    static constexpr bool IS_BF16 = false, BLOCKED = true;
    static constexpr bool PAIR_SUMS = false;
    static constexpr int64_t PER_WORD = 2, DEPTH = 64, HEADER = 1;
    static constexpr float ROW_LIMIT = 5792, PANEL_LIMIT = 5792; // 64 * 5792 * 5792 < 2^31
};

/// f(F32(), …) with what `format` is in products with weights. Formats that this instruction set
/// has not are not compiled.
template <class Call> GGFT_INLINE auto with_format(Format format, Call f) {
    if constexpr (HAS_BF16) {
        if (format == Format::bf16)
            return f(Bf16());
    }
    if constexpr (HAS_I16) {
        if (format == Format::i16)
            return f(I16());
    }
    return f(F32());
}

/// The same for attention.
template <class Call> GGFT_INLINE auto with_attention_format(Format format, Call f) {
    if constexpr (HAS_BF16) {
        if (format == Format::bf16)
            return f(Bf16());
    }
    if constexpr (HAS_I16) {
        if (format == Format::i16)
            return f(I16Even());
    }
    return f(F32());
}

/// Words of a block of 16-bit integers.
template <class F> inline constexpr int64_t BLOCK_STEPS = F::DEPTH / F::PER_WORD;

inline constexpr int64_t I16_PADDING = 64; // the last block is filled up to a multiple of it
/// Blocks of a tile row, at most; attention's rows are shorter.
inline constexpr int I16_BLOCKS = MAX_STEPS / (int)BLOCK_STEPS<I16>;

/// Steps of a tile's reduction over kc indices: words of a tile row.
template <class F> GGFT_INLINE constexpr int64_t tile_steps(int64_t kc) {
    if constexpr (F::BLOCKED)
        return round_up(kc, I16_PADDING) / F::PER_WORD;
    else
        return (kc + F::PER_WORD - 1) / F::PER_WORD;
}

/// Steps of a panel of kc indices, headers of blocks included.
template <class F> GGFT_INLINE constexpr int64_t panel_steps(int64_t kc) {
    if constexpr (F::BLOCKED)
        return tile_steps<F>(kc) + (kc + F::DEPTH - 1) / F::DEPTH * F::HEADER;
    else
        return tile_steps<F>(kc);
}

} // namespace ggft::GGFT_ISA_NAMESPACE
