// Tile rows: activations as the register tiles read them; and the transposition that makes panels
// of such rows.
#include <algorithm>

#include "kernels/gemm/panels.h"

namespace ggft {

#if defined(GGFT_AVX512)
void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps, uint32_t * out,
                     int64_t out_stride) {
    int64_t s = 0;
    for (; s + 16 <= steps; s += 16) {
        __m512i a[16], b[16];
        // Rows i, i+4, i+8, i+12 share a register by 128-bit quarters, so 4x4 transposes finish it.
        GGFT_UNROLL for (int q = 0; q < 4; q++) {
            GGFT_UNROLL for (int i = 0; i < 4; i++) {
                const uint32_t * p = in + i * in_stride + s + 4 * q;
                __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 4 * in_stride)), 1);
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 8 * in_stride)), 2);
                v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 12 * in_stride)),
                                       3);
                a[4 * q + i] = v;
            }
            GGFT_UNROLL for (int i = 0; i < 2; i++) {
                b[2 * i] = _mm512_unpacklo_epi32(a[4 * q + 2 * i], a[4 * q + 2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[4 * q + 2 * i], a[4 * q + 2 * i + 1]);
            }
            uint32_t * o = out + (s + 4 * q) * out_stride;
            _mm512_storeu_si512(o, _mm512_unpacklo_epi64(b[0], b[2]));
            _mm512_storeu_si512(o + out_stride, _mm512_unpackhi_epi64(b[0], b[2]));
            _mm512_storeu_si512(o + 2 * out_stride, _mm512_unpacklo_epi64(b[1], b[3]));
            _mm512_storeu_si512(o + 3 * out_stride, _mm512_unpackhi_epi64(b[1], b[3]));
        }
    }
    for (; s < steps; s++) {
        for (int i = 0; i < LANES; i++)
            out[s * out_stride + i] = in[i * in_stride + s];
    }
}
#else
void transpose_words(const uint32_t * in, int64_t in_stride, int64_t steps, uint32_t * out,
                     int64_t out_stride) {
    typedef uint32_t W4 __attribute__((vector_size(16)));
    int64_t s = 0;
    for (; s + 4 <= steps; s += 4) {
        for (int i = 0; i < LANES; i += 4) {
            const uint32_t * p = in + i * in_stride + s;
            const W4 a = load_as<W4>(p), b = load_as<W4>(p + in_stride),
                     c = load_as<W4>(p + 2 * in_stride), d = load_as<W4>(p + 3 * in_stride);
            const W4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const W4 ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const W4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const W4 cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            const W4 rows[4] = {__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5),
                                __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
                                __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5),
                                __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7)};
            for (int j = 0; j < 4; j++) {
                std::memcpy(out + (s + j) * out_stride + i, &rows[j], 16);
            }
        }
    }
    for (; s < steps; s++) {
        for (int i = 0; i < LANES; i++)
            out[s * out_stride + i] = in[i * in_stride + s];
    }
}
#endif

void transpose_rows(Format format, const uint32_t * rows, int64_t stride, int64_t kc,
                    const float * scales, const int32_t * pairs, int64_t blocks, uint32_t * out) {
    const int64_t words = tile_steps(format, kc);
    const int64_t block = is_i16(format) ? blocks_of(format).steps() : words;
    for (int64_t s = 0, i = 0; s < words; s += block, i++) {
        const int64_t n = std::min(block, words - s);
        for (int l = 0; l < LANES; l++) {
            if (header_steps(format) > 0)
                std::memcpy(out + l, scales + l * blocks + i, 4);
            if (header_steps(format) > 1)
                std::memcpy(out + NR + l, pairs + l * blocks + i, 4);
        }
        out += header_steps(format) * NR;
        transpose_words(rows + s, stride, n, out, NR);
        out += n * NR;
    }
}

namespace {

/// n elements of a row of x from `at` on as F32.
void row_floats(const Rows & x, int64_t at, int64_t n, float * out) {
    const float * f = (const float *)x.data + at;
    const uint16_t * h = (const uint16_t *)x.data + at;
    if (!x.is_bf16) {
        std::memcpy(out, f, (size_t)n * 4);
        return;
    }
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        store(out + k, load_bf16(h + k));
    for (; k < n; k++)
        out[k] = from_bf16(h[k]);
}

void row_bf16(const Rows & x, int64_t at, int64_t n, uint16_t * out) {
    if (!x.is_bf16) {
        store_bf16_pairs(out, (const float *)x.data + at, n);
        return;
    }
    std::memcpy(out, (const uint16_t *)x.data + at, (size_t)n * 2);
    if (n % 2)
        out[n] = 0;
}

} // namespace

void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out) {
    for (int i = 0; i < rows; i++, out += TILE_STRIDE) {
        const int64_t at = (t0 + i) * x.stride + k0;
        if (format == Format::bf16) {
            row_bf16(x, at, kc, (uint16_t *)out);
        } else {
            row_floats(x, at, kc, (float *)out);
        }
    }
}

int64_t RowPacking::stride() const {
    return tile_steps(Format::i16, chunk) > HALF_STRIDE ? TILE_STRIDE : HALF_STRIDE;
}

size_t RowPacking::words(int64_t n_tokens) const {
    return (size_t)(chunks() * n_tokens * (stride() + 2 * I16_BLOCKS));
}

void pack_tokens(const RowPacking & packing, Rows x, int64_t n_tokens, void * out, int ith,
                 int nth) {
    const PackedRows packed = {packing, (uint32_t *)out, n_tokens};
    const Range part = split_range(n_tokens, 1, ith, nth);
    alignas(64) float values[2 * MAX_STEPS];
    for (int64_t k0 = 0; k0 < packing.depth; k0 += packing.chunk) {
        const int64_t n = std::min(packing.chunk, packing.depth - k0);
        for (int64_t t = part.first; t < part.last; t++) {
            const int64_t at = t * x.stride + k0;
            const float * from = (const float *)x.data + at;
            if (x.is_bf16) {
                row_floats(x, at, n, values);
                from = values;
            }
            quantize_with_pairs(from, n, blocks_of(Format::i16).row_limit, packed.words(t, k0),
                                packed.scales(t, k0), packed.pairs(t, k0));
        }
    }
}

} // namespace ggft
