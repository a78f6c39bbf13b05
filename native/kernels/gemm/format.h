// How a product holds its factors, and how these lie in memory.
//
// A reduction runs over steps: 32-bit words that hold one F32, two BF16 or two 16-bit integers of
// consecutive reduction indices. A tile row is a row of such words. A panel holds NR columns as
// [step][NR]. Both are in blocks in the formats of 16-bit integers: a row's block has a scale of
// its own beside the words, a panel's block begins with a header, a step of [NR] scales (and one of
// pair sums, see kernels/gemm/tile_winograd.h).
#pragma once

#include "kernels/gemm/gemm.h"
#include "kernels/gemm/tile.h"

namespace ggft {

#if !defined(GGFT_BF16_DOT) && (defined(GGFT_AVX512) || defined(__AVX2__))
#define GGFT_I16 1
inline constexpr bool HAS_I16 = true;
#else
inline constexpr bool HAS_I16 = false;
#endif

/// Where multiply and add are two instructions, as without VNNI, and multiplies the scarcer ones,
/// as with 256 bits, products of pairs pay (kernels/gemm/tile_winograd.h).
#if defined(GGFT_I16) && !defined(GGFT_AVX512) && !defined(__AVXVNNI__)
#define GGFT_WINOGRAD 1
inline constexpr bool HAS_WINOGRAD = true;
#else
inline constexpr bool HAS_WINOGRAD = false;
#endif

/// i16: activations with weights. i16_even: activations with activations, as in attention, where
/// both factors have outliers: even limits, and shorter blocks.
enum class Format { f32, bf16, i16, i16_even };

/// What `precision` means on this machine for products with weights, and for those of attention.
inline constexpr Format format_of(Precision precision) {
    if (precision == Precision::f32)
        return Format::f32;
    return HAS_BF16 ? Format::bf16 : HAS_I16 ? Format::i16 : Format::f32;
}
inline constexpr Format attention_format(Precision precision) {
    const Format format = format_of(precision);
    return format == Format::i16 ? Format::i16_even : format;
}

inline constexpr bool is_i16(Format format) {
    return format == Format::i16 || format == Format::i16_even;
}

/// Blocks of 16-bit integers: reduction indices, and the largest integers of rows and of panels. A
/// block's sum of products fits into 32 bits: 256 * 4095 * 2047 < 2^31, 64 * 5792 * 5792 < 2^31.
struct Blocks {
    int64_t depth;
    float row_limit, panel_limit;

    constexpr int64_t steps() const { return depth / 2; }
};
inline constexpr Blocks blocks_of(Format format) {
    return format == Format::i16 ? Blocks{256, 4095, 2047} : Blocks{64, 5792, 5792};
}
inline constexpr int64_t I16_PADDING = 64; // the last block is filled up to a multiple of it

/// Reduction indices per word.
inline constexpr int64_t per_word(Format format) {
    return format == Format::f32 ? 1 : 2;
}

/// Steps of a tile's reduction over kc indices: words of a tile row.
inline constexpr int64_t tile_steps(Format format, int64_t kc) {
    if (is_i16(format))
        return round_up(kc, I16_PADDING) / 2;
    return (kc + per_word(format) - 1) / per_word(format);
}

/// Steps of a panel of kc indices, headers of blocks included.
inline constexpr int64_t header_steps(Format format) {
    return format == Format::i16 ? 1 + HAS_WINOGRAD : format == Format::i16_even ? 1 : 0;
}
inline constexpr int64_t panel_steps(Format format, int64_t kc) {
    const int64_t depth = blocks_of(format).depth;
    const int64_t blocks = is_i16(format) ? (kc + depth - 1) / depth : 0;
    return tile_steps(format, kc) + blocks * header_steps(format);
}

} // namespace ggft
