#include "kernels_pack.h"

#include <algorithm>

#include "kernels_dequant.h"

namespace ggft {
namespace {

constexpr int64_t CHUNK = 256; // elements of a row dequantized at once: the temporary stays in L1

/// Where element k of row r is (k a multiple of the block size).
const char * element(const Weight & w, int64_t r, int64_t k) {
    return (const char *)w.data + (size_t)r * w.row_bytes +
           (size_t)(k / ggml_blck_size(w.type)) * ggml_type_size(w.type);
}

/// Ask for elements [k, k+n) of row r: pieces of rows are too short for hardware prefetchers.
void prefetch_elements(const Weight & w, int64_t r, int64_t k, int64_t n) {
    if (r >= w.n_rows || k >= w.n_cols)
        return;
    const char * first = element(w, r, k);
    const char * last = element(w, r, std::min(k + n, w.n_cols));
    for (; first < last; first += 64)
        __builtin_prefetch(first);
}

/// Elements [k, k+n) of row r as F32 or BF16.
void dequant(Format format, const Weight & w, int64_t r, int64_t k, int64_t n, void * out) {
    const char * blocks = element(w, r, k);
    if (format == Format::bf16) {
        dequant_bf16(w.type, blocks, n, (uint16_t *)out);
    } else {
        dequant_f32(w.type, blocks, n, (float *)out);
    }
}

} // namespace

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

namespace {

constexpr int64_t ROW_STRIDE = CHUNK + 16;

/// n elements of a row as words; of 16-bit integers the scales of the blocks, too.
void row_words(Format format, const Weight & w, int64_t r, int64_t k, int64_t n, uint32_t * out,
               float * scales) {
    const int64_t words = tile_steps(format, n);
    if (r >= w.n_rows) {
        std::memset(out, 0, (size_t)words * 4);
        std::memset(scales, 0, CHUNK / I16_DEPTH * 4);
        return;
    }
#if defined(GGFT_I16)
    if (format == Format::i16) {
        alignas(64) float values[CHUNK];
        dequant(format, w, r, k, n, values);
        quantize_row_i16(values, n, I16_PANEL_LIMIT, (int16_t *)out, scales);
        return;
    }
#endif
    if (n % per_word(format))
        out[words - 1] = 0;
    dequant(format, w, r, k, n, out);
}

} // namespace

void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out) {
    alignas(64) uint32_t rows[LANES * ROW_STRIDE];
    float scales[LANES][CHUNK / I16_DEPTH];
    const int64_t steps = panel_steps(format, kc);
    // Words between two scales; all of a chunk where there are none.
    const int64_t block = format == Format::i16 ? I16_STEPS : CHUNK;
    for (int64_t c = 0; c < nc; c += LANES) {
        uint32_t * to = out + c / NR * steps * NR + c % NR;
        for (int64_t k = 0; k < kc; k += CHUNK) {
            const int64_t n = std::min(CHUNK, kc - k), words = tile_steps(format, n);
            for (int64_t i = 0; i < LANES; i++) {
                prefetch_elements(w, c0 + c + i, k0 + k + n, CHUNK);
                row_words(format, w, c0 + c + i, k0 + k, n, rows + i * ROW_STRIDE, scales[i]);
            }
            for (int64_t s = 0; s < words; s += block) {
                const int64_t now = std::min(block, words - s);
                transpose_words(rows + s, ROW_STRIDE, now, to, NR);
                to += now * NR;
                if (format == Format::i16) {
                    for (int i = 0; i < LANES; i++)
                        std::memcpy(to + i, &scales[i][s / block], 4);
                    to += NR;
                }
            }
        }
    }
}

namespace {

/// One step of BF16 panels: words (even row, odd row) of n columns, n a multiple of NR.
void interleave(const uint16_t * even, const uint16_t * odd, int64_t n, int64_t panel_words,
                uint32_t * out) {
    for (int64_t c = 0; c < n; c += NR, out += panel_words) {
        for (int64_t j = 0; j < NR; j += LANES) {
            const VU low = __builtin_convertvector(load_as<VH>(even + c + j), VU);
            const VU high = __builtin_convertvector(load_as<VH>(odd + c + j), VU);
            const VU words = low | (high << 16);
            std::memcpy(out + j, &words, sizeof words);
        }
    }
}

#if defined(GGFT_I16)
/// Rows [k, k+n) of W, n <= I16_DEPTH, `width` of its columns from c on: one block of each panel.
void pack_block_nn(const Weight & w, int64_t c, int64_t width, int64_t padded, int64_t k, int64_t n,
                   int64_t panel_words, uint32_t * out) {
    alignas(64) float rows[I16_DEPTH][CHUNK];
    VI most[CHUNK / LANES] = {};
    for (int64_t i = 0; i < I16_DEPTH; i++) {
        if (i >= n) {
            std::memset(rows[i], 0, sizeof rows[i]);
            continue;
        }
        prefetch_elements(w, k + i + 8, c, width);
        dequant(Format::i16, w, k + i, c, width, rows[i]);
        for (int64_t j = width; j < padded; j++)
            rows[i][j] = 0;
        for (int64_t j = 0; j < padded; j += LANES)
            most[j / LANES] = larger(most[j / LANES], magnitude(load(rows[i] + j)));
    }
    quantize_panels_i16(rows[0], CHUNK, most, padded, I16_PANEL_LIMIT, panel_words, out);
}
#endif

} // namespace

void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out) {
    const int64_t per = per_word(format), panel_words = panel_steps(format, kc) * NR;
    const int64_t rows = std::min(kc, w.n_rows - k0);
    for (int64_t c = 0; c < nc; c += CHUNK) {
        alignas(64) uint32_t even[CHUNK] = {}, odd[CHUNK] = {};
        const int64_t width = std::min(CHUNK, nc - c), n = std::min(width, w.n_cols - c0 - c);
        const int64_t padded = (width + NR - 1) / NR * NR;
        uint32_t * panels = out + c / NR * panel_words;
#if defined(GGFT_I16)
        if (format == Format::i16) {
            for (int64_t k = 0; k < rows; k += I16_DEPTH) {
                pack_block_nn(w, c0 + c, n, padded, k0 + k, std::min(I16_DEPTH, rows - k),
                              panel_words, panels + panel_steps(format, k) * NR);
            }
            continue;
        }
#endif
        for (int64_t k = 0; k < rows; k += per) {
            uint32_t * step = panels + k / per * NR;
            for (int64_t i = 0; i < per; i++)
                prefetch_elements(w, k0 + k + 16 + i, c0 + c, n);
            dequant(format, w, k0 + k, c0 + c, n, even);
            if (format == Format::bf16) {
                if (k + 1 < rows) {
                    dequant(format, w, k0 + k + 1, c0 + c, n, odd);
                } else {
                    std::memset(odd, 0, sizeof odd);
                }
                interleave((const uint16_t *)even, (const uint16_t *)odd, padded, panel_words,
                           step);
            } else {
                for (int64_t j = 0; j < padded; j += NR, step += panel_words) {
                    std::memcpy(step, even + j, NR * 4);
                }
            }
        }
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

#if defined(GGFT_I16)
void row_i16(const Rows & x, int64_t at, int64_t n, int16_t * out, float * scales) {
    alignas(64) float values[I16_DEPTH];
    for (int64_t k = 0; k < n; k += I16_DEPTH) {
        const int64_t m = std::min(I16_DEPTH, n - k);
        const float * from = (const float *)x.data + at + k;
        if (x.is_bf16) {
            row_floats(x, at + k, m, values);
            from = values;
        }
        scales[k / I16_DEPTH] = quantize_i16(from, m, I16_ROW_LIMIT, out + k);
    }
}
#endif

} // namespace

void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out, [[maybe_unused]] float * scales) {
    for (int i = 0; i < rows; i++, out += TILE_STRIDE) {
        const int64_t at = (t0 + i) * x.stride + k0;
#if defined(GGFT_I16)
        if (format == Format::i16) {
            row_i16(x, at, kc, (int16_t *)out, scales + i * I16_BLOCKS);
            continue;
        }
#endif
        if (format == Format::bf16) {
            row_bf16(x, at, kc, (uint16_t *)out);
        } else {
            row_floats(x, at, kc, (float *)out);
        }
    }
}

} // namespace ggft
