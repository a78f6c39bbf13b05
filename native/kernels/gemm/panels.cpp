#include "kernels/gemm/panels.h"

#include "kernels/dequant/dequant.h"

namespace ggft::GGFT_ISA_NAMESPACE {
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
    const char * last = element(w, r, min(k + n, w.n_cols));
    for (; first < last; first += 64)
        __builtin_prefetch(first);
}

/// Elements [k, k+n) of row r as BF16 in that format, else as F32.
template <class F> void dequant(const Weight & w, int64_t r, int64_t k, int64_t n, void * out) {
    const char * blocks = element(w, r, k);
    if constexpr (F::IS_BF16)
        dequant_bf16(w.type, blocks, n, (uint16_t *)out);
    else
        dequant_f32(w.type, blocks, n, (float *)out);
}

// ---- columns are rows of W ----

constexpr int64_t ROW_STRIDE = CHUNK + 16;
constexpr int64_t BLOCKS = CHUNK / I16::DEPTH; // of 16-bit integers, in a chunk

/// LANES rows of W, a chunk of each, as tile rows.
template <class F> struct ChunkRows {
    alignas(64) uint32_t words[LANES * ROW_STRIDE];
    float scales[LANES][BLOCKS];
    int32_t pairs[LANES][BLOCKS];

    /// Row i: elements [k, k+n) of row r of W.
    void fill(const Weight & w, int64_t i, int64_t r, int64_t k, int64_t n) {
        uint32_t * out = words + i * ROW_STRIDE;
        const int64_t steps = tile_steps<F>(n);
        if (r >= w.n_rows) {
            std::memset(out, 0, (size_t)steps * 4);
            std::memset(scales[i], 0, sizeof scales[i]);
            std::memset(pairs[i], 0, sizeof pairs[i]);
            return;
        }
        if constexpr (F::BLOCKED) {
            alignas(64) float values[CHUNK];
            dequant<F>(w, r, k, n, values);
            quantize_with_pairs<F>(values, n, F::PANEL_LIMIT, out, scales[i], pairs[i]);
        } else {
            if (n % F::PER_WORD)
                out[steps - 1] = 0;
            dequant<F>(w, r, k, n, out);
        }
    }
};

template <class F>
void pack_nt(const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc, uint32_t * out) {
    ChunkRows<F> rows;
    const int64_t steps = panel_steps<F>(kc);
    for (int64_t c = 0; c < nc; c += LANES) {
        for (int64_t k = 0; k < kc; k += CHUNK) {
            const int64_t n = min(CHUNK, kc - k);
            for (int64_t i = 0; i < LANES; i++) {
                prefetch_elements(w, c0 + c + i, k0 + k + n, CHUNK);
                rows.fill(w, i, c0 + c + i, k0 + k, n);
            }
            transpose_rows<F>(rows.words, ROW_STRIDE, n, rows.scales[0], rows.pairs[0], BLOCKS,
                              out + (c / NR * steps + panel_steps<F>(k)) * NR + c % NR);
        }
    }
}

// ---- columns are columns of W ----

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

/// Of 16-bit integers: a chunk of columns for all rows of a block at a time, as their scales need
/// the largest of each column.
template <class F>
void pack_nn_blocks(const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc, float * work,
                    uint32_t * out) {
    const int64_t panel_words = panel_steps<F>(kc) * NR;
    const int64_t rows = min(kc, w.n_rows - k0);
    for (int64_t c = 0; c < nc; c += CHUNK) {
        const int64_t padded = round_up(min(CHUNK, nc - c), NR);
        const int64_t width = min(padded, w.n_cols - c0 - c);
        for (int64_t k = 0; k < rows; k += F::DEPTH) {
            const int64_t n = min(F::DEPTH, rows - k), filled = round_up(n, I16_PADDING);
            VI most[CHUNK / LANES] = {};
            for (int64_t i = 0; i < n; i++) {
                float * row = work + i * CHUNK;
                prefetch_elements(w, k0 + k + i + 8, c0 + c, width);
                dequant<F>(w, k0 + k + i, c0 + c, width, row);
                fill(row + width, row + padded, 0.0f);
                for (int64_t j = 0; j < padded; j += LANES)
                    most[j / LANES] = larger(most[j / LANES], magnitude(load(row + j)));
            }
            fill(work + n * CHUNK, work + filled * CHUNK, 0.0f);
            quantize_panels_i16<F>(work, CHUNK, filled, most, padded, panel_words,
                                   out + c / NR * panel_words + panel_steps<F>(k) * NR);
        }
    }
}

template <class F>
void pack_nn(const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc, uint32_t * out) {
    const int64_t panel_words = panel_steps<F>(kc) * NR;
    const int64_t rows = min(kc, w.n_rows - k0);
    for (int64_t c = 0; c < nc; c += CHUNK) {
        alignas(64) uint32_t even[CHUNK] = {}, odd[CHUNK] = {};
        const int64_t width = min(CHUNK, nc - c), n = min(width, w.n_cols - c0 - c);
        const int64_t padded = round_up(width, NR);
        uint32_t * panels = out + c / NR * panel_words;
        for (int64_t k = 0; k < rows; k += F::PER_WORD) {
            uint32_t * step = panels + k / F::PER_WORD * NR;
            for (int64_t i = 0; i < F::PER_WORD; i++)
                prefetch_elements(w, k0 + k + 16 + i, c0 + c, n);
            dequant<F>(w, k0 + k, c0 + c, n, even);
            if constexpr (F::IS_BF16) {
                if (k + 1 < rows)
                    dequant<F>(w, k0 + k + 1, c0 + c, n, odd);
                else
                    std::memset(odd, 0, sizeof odd);
                interleave((const uint16_t *)even, (const uint16_t *)odd, padded, panel_words,
                           step);
            } else {
                for (int64_t j = 0; j < padded; j += NR, step += panel_words)
                    std::memcpy(step, even + j, NR * 4);
            }
        }
    }
}

} // namespace

void pack_panels_nt(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    uint32_t * out) {
    with_format(format, [&](auto f) { pack_nt<decltype(f)>(w, c0, nc, k0, kc, out); });
}

void pack_panels_nn(Format format, const Weight & w, int64_t c0, int64_t nc, int64_t k0, int64_t kc,
                    float * work, uint32_t * out) {
    with_format(format, [&](auto f) {
        using F = decltype(f);
        if constexpr (F::BLOCKED)
            pack_nn_blocks<F>(w, c0, nc, k0, kc, work, out);
        else
            pack_nn<F>(w, c0, nc, k0, kc, out);
    });
}

} // namespace ggft::GGFT_ISA_NAMESPACE
