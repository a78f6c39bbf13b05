#include "kernels/gemm/panels.h"

#include <algorithm>

#include "kernels/dequant/dequant.h"

namespace ggft {
namespace {

constexpr int64_t CHUNK = PANEL_CHUNK;

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

namespace {

constexpr int64_t ROW_STRIDE = CHUNK + 16;
constexpr int64_t BLOCKS = CHUNK / blocks_of(Format::i16).depth; // of 16-bit integers, in a chunk

/// LANES rows of W, a chunk of each, as tile rows.
struct ChunkRows {
    alignas(64) uint32_t words[LANES * ROW_STRIDE];
    float scales[LANES][BLOCKS];
    int32_t pairs[LANES][BLOCKS];

    /// Row i: elements [k, k+n) of row r of W.
    void fill(Format format, const Weight & w, int64_t i, int64_t r, int64_t k, int64_t n) {
        uint32_t * out = words + i * ROW_STRIDE;
        const int64_t steps = tile_steps(format, n);
        if (r >= w.n_rows) {
            std::memset(out, 0, (size_t)steps * 4);
            std::memset(scales[i], 0, sizeof scales[i]);
            std::memset(pairs[i], 0, sizeof pairs[i]);
            return;
        }
        if (format == Format::i16) {
            alignas(64) float values[CHUNK];
            dequant(format, w, r, k, n, values);
            quantize_with_pairs(values, n, blocks_of(format).panel_limit, out, scales[i], pairs[i]);
            return;
        }
        if (n % per_word(format))
            out[steps - 1] = 0;
        dequant(format, w, r, k, n, out);
    }
};

} // namespace

void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out) {
    ChunkRows rows;
    const int64_t steps = panel_steps(format, kc);
    for (int64_t c = 0; c < nc; c += LANES) {
        for (int64_t k = 0; k < kc; k += CHUNK) {
            const int64_t n = std::min(CHUNK, kc - k);
            for (int64_t i = 0; i < LANES; i++) {
                prefetch_elements(w, c0 + c + i, k0 + k + n, CHUNK);
                rows.fill(format, w, i, c0 + c + i, k0 + k, n);
            }
            transpose_rows(format, rows.words, ROW_STRIDE, n, rows.scales[0], rows.pairs[0], BLOCKS,
                           out + (c / NR * steps + panel_steps(format, k)) * NR + c % NR);
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
/// pack_panels_nn for 16-bit integers: a chunk of columns for all rows of a block of integers at a
/// time, as their scales need the largest of each column.
void pack_panels_nn_i16(const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                        float * work, uint32_t * out) {
    constexpr int64_t DEPTH = blocks_of(Format::i16).depth;
    const int64_t panel_words = panel_steps(Format::i16, kc) * NR;
    const int64_t rows = std::min(kc, w.n_rows - k0);
    for (int64_t c = 0; c < nc; c += CHUNK) {
        const int64_t padded = round_up(std::min(CHUNK, nc - c), NR);
        const int64_t width = std::min(padded, w.n_cols - c0 - c);
        for (int64_t k = 0; k < rows; k += DEPTH) {
            const int64_t n = std::min(DEPTH, rows - k), filled = round_up(n, I16_PADDING);
            VI most[CHUNK / LANES] = {};
            for (int64_t i = 0; i < n; i++) {
                float * row = work + i * CHUNK;
                prefetch_elements(w, k0 + k + i + 8, c0 + c, width);
                dequant(Format::i16, w, k0 + k + i, c0 + c, width, row);
                std::fill(row + width, row + padded, 0.0f);
                for (int64_t j = 0; j < padded; j += LANES)
                    most[j / LANES] = larger(most[j / LANES], magnitude(load(row + j)));
            }
            std::fill(work + n * CHUNK, work + filled * CHUNK, 0.0f);
            quantize_panels_i16<Format::i16>(work, CHUNK, filled, most, padded, panel_words,
                                             out + c / NR * panel_words +
                                                 panel_steps(Format::i16, k) * NR);
        }
    }
}
#endif

} // namespace

void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    [[maybe_unused]] float * work, uint32_t * out) {
#if defined(GGFT_I16)
    if (format == Format::i16) {
        pack_panels_nn_i16(w, c0, nc, k0, kc, work, out);
        return;
    }
#endif
    const int64_t per = per_word(format), panel_words = panel_steps(format, kc) * NR;
    const int64_t rows = std::min(kc, w.n_rows - k0);
    for (int64_t c = 0; c < nc; c += CHUNK) {
        alignas(64) uint32_t even[CHUNK] = {}, odd[CHUNK] = {};
        const int64_t width = std::min(CHUNK, nc - c), n = std::min(width, w.n_cols - c0 - c);
        const int64_t padded = round_up(width, NR);
        uint32_t * panels = out + c / NR * panel_words;
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

} // namespace ggft
