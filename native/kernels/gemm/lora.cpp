#include "kernels/gemm/lora.h"

#include "kernels/isa/memory.h"
#include "kernels/rowwise/dropout_lanes.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

constexpr int RANKS = LORA_RANKS, TOKENS = 3, VECTORS = 3;
constexpr int64_t WIDTH = 192; // columns of a gradient block
constexpr int64_t DEPTH = 64;  // tokens of a gradient block: 48 KB of x

// Words of working memory: TOKENS rows of n columns after dropout; sums and a block of x of a
// gradient; b transposed.
int64_t dropped_words(int64_t n) {
    return TOKENS * round_up(n, LANES);
}
int64_t outer_words(int rank) {
    return (rank + DEPTH) * WIDTH;
}
int64_t transposed_words(int64_t n_rows, int rank) {
    return rank * n_rows;
}

float * thread_floats(int64_t n) {
    return (float *)thread_words((size_t)n);
}

/// n columns of one row from `column` on as F32, times the dropout factors; zeros up to `padded`.
void copy_row(const Rows & x, Dropout dropout, int64_t t, int64_t column, int64_t n, int64_t padded,
              float * out) {
    const int64_t at = t * x.stride + column;
    if (x.is_bf16)
        bf16_to_f32((const uint16_t *)x.data + at, n, out);
    else
        std::memcpy(out, (const float *)x.data + at, (size_t)n * 4);
    fill(out + n, out + padded, 0.0f);
    if (dropout.p <= 0.0f)
        return;
    const uint32_t key = dropout_row_key(dropout.seed, t);
    const int32_t threshold = dropout_threshold(dropout.p);
    const V kept = splat(1.0f / (1.0f - dropout.p));
    for (int64_t c = 0; c < padded; c += LANES) {
        store(out + c, load(out + c) * dropout_factors(key, column + c, threshold, kept));
    }
}

GGFT_INLINE V load_lanes(const float * p) {
    return load(p);
}
GGFT_INLINE V load_lanes(const uint16_t * p) {
    return load_bf16(p);
}
GGFT_INLINE float value(float x) {
    return x;
}
GGFT_INLINE float value(uint16_t x) {
    return from_bf16(x);
}

/// out[t][r] = scale * sum_c x[t][c] * a[r][c] for T rows of x (F32 or BF16) and R rows of a.
template <int T, int R, class X>
void dot_tile(const X * x, int64_t x_stride, const float * a, int64_t a_stride, int64_t n,
              float scale, float * out, int64_t out_stride) {
    V acc[T][R] = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) {
        V xs[T];
        GGFT_UNROLL for (int t = 0; t < T; t++) xs[t] = load_lanes(x + t * x_stride + c);
        GGFT_UNROLL for (int r = 0; r < R; r++) {
            const V w = load(a + r * a_stride + c);
            GGFT_UNROLL for (int t = 0; t < T; t++) acc[t][r] = fma(xs[t], w, acc[t][r]);
        }
    }
    GGFT_UNROLL for (int t = 0; t < T; t++) {
        float sums[R];
        sum_rows(acc[t], sums);
        for (int r = 0; r < R; r++) {
            float sum = sums[r];
            for (int64_t k = c; k < n; k++)
                sum += value(x[t * x_stride + k]) * a[r * a_stride + k];
            out[t * out_stride + r] = scale * sum;
        }
    }
}

/// All ranks for T tokens.
template <int T, class X>
void dot_rows(const X * x, int64_t x_stride, const float * a, int rank, int64_t n, float scale,
              float * out, int64_t out_stride) {
    int r = 0;
    for (; r + RANKS <= rank; r += RANKS)
        dot_tile<T, RANKS>(x, x_stride, a + r * n, n, n, scale, out + r, out_stride);
    for (; r + 2 <= rank; r += 2)
        dot_tile<T, 2>(x, x_stride, a + r * n, n, n, scale, out + r, out_stride);
    for (; r < rank; r++)
        dot_tile<T, 1>(x, x_stride, a + r * n, n, n, scale, out + r, out_stride);
}

/// Every adapter's dot products of `tokens` <= TOKENS rows from token t on.
template <class X>
void dot_adapters(const X * rows, int64_t stride, int64_t t, int64_t tokens, int64_t n,
                  const LoraDown * adapters, int n_adapters, float scale) {
    for (int i = 0; i < n_adapters; i++) {
        const LoraDown & l = adapters[i];
        float * out = l.u + t * l.u_stride;
        if (tokens == TOKENS) {
            dot_rows<TOKENS>(rows, stride, l.a, l.rank, n, scale, out, l.u_stride);
            continue;
        }
        for (int64_t k = 0; k < tokens; k++) {
            dot_rows<1>(rows + k * stride, stride, l.a, l.rank, n, scale, out + k * l.u_stride,
                        l.u_stride);
        }
    }
}

void dot_tokens(const Rows & x, Dropout dropout, int64_t n, int64_t n_tokens,
                const LoraDown * adapters, int n_adapters, float scale, int ith, int nth) {
    const int64_t padded = round_up(n, LANES);
    float * buffer = dropout.p > 0.0f ? thread_floats(dropped_words(n)) : nullptr;
    const Range part = split_range(n_tokens, TOKENS, ith, nth);
    for (int64_t t = part.first; t < part.last; t += TOKENS) {
        const int64_t tokens = min<int64_t>(TOKENS, part.last - t);
        if (dropout.p > 0.0f) {
            for (int64_t i = 0; i < tokens; i++) {
                copy_row(x, dropout, t + i, 0, n, padded, buffer + i * padded);
            }
            dot_adapters(buffer, padded, t, tokens, n, adapters, n_adapters, scale);
        } else if (x.is_bf16) {
            dot_adapters((const uint16_t *)x.data + t * x.stride, x.stride, t, tokens, n, adapters,
                         n_adapters, scale);
        } else {
            dot_adapters((const float *)x.data + t * x.stride, x.stride, t, tokens, n, adapters,
                         n_adapters, scale);
        }
    }
}

/// sum[r][c] += sum_t left[t][r] * x[t][c] for R ranks and N vectors of columns.
template <int R, int N, class X>
void outer_tile(const float * left, int64_t left_stride, const X * x, int64_t x_stride,
                int64_t n_tokens, float * sum) {
    V acc[R][N];
    GGFT_UNROLL for (int r = 0; r < R; r++) {
        GGFT_UNROLL for (int j = 0; j < N; j++) acc[r][j] = load(sum + r * WIDTH + j * LANES);
    }
    for (int64_t t = 0; t < n_tokens; t++, left += left_stride, x += x_stride) {
        V xs[N];
        GGFT_UNROLL for (int j = 0; j < N; j++) xs[j] = load_lanes(x + j * LANES);
        GGFT_UNROLL for (int r = 0; r < R; r++) {
            const V l = splat(left[r]);
            GGFT_UNROLL for (int j = 0; j < N; j++) acc[r][j] = fma(l, xs[j], acc[r][j]);
        }
    }
    GGFT_UNROLL for (int r = 0; r < R; r++) {
        GGFT_UNROLL for (int j = 0; j < N; j++) store(sum + r * WIDTH + j * LANES, acc[r][j]);
    }
}

template <int R, class X>
void outer_ranks(const float * left, int64_t left_stride, const X * x, int64_t x_stride,
                 int64_t n_tokens, int64_t width, float * sum) {
    int64_t c = 0;
    for (; c + VECTORS * LANES <= width; c += VECTORS * LANES)
        outer_tile<R, VECTORS>(left, left_stride, x + c, x_stride, n_tokens, sum + c);
    for (; c < width; c += LANES)
        outer_tile<R, 1>(left, left_stride, x + c, x_stride, n_tokens, sum + c);
}

/// sums[rank][WIDTH] += left' x for `depth` tokens and `width` columns.
template <class X>
void outer_block(const float * left, int64_t left_stride, int rank, const X * x, int64_t x_stride,
                 int64_t depth, int64_t width, float * sums) {
    int r = 0;
    for (; r + RANKS <= rank; r += RANKS)
        outer_ranks<RANKS>(left + r, left_stride, x, x_stride, depth, width, sums + r * WIDTH);
    for (; r + 2 <= rank; r += 2)
        outer_ranks<2>(left + r, left_stride, x, x_stride, depth, width, sums + r * WIDTH);
    for (; r < rank; r++)
        outer_ranks<1>(left + r, left_stride, x, x_stride, depth, width, sums + r * WIDTH);
}

/// out[r*r_step + c*c_step] += scale * sum_t left[t][r] * keep[t][c] * x[t][c], columns split.
void outer_sum(const Rows & x, Dropout dropout, const float * left, int64_t left_stride, int rank,
               float scale, int64_t n_cols, int64_t n_tokens, float * out, int64_t r_step,
               int64_t c_step, int ith, int nth) {
    float *const sums = thread_floats(outer_words(rank)), *const block = sums + rank * WIDTH;
    const Range part = split_range(n_cols, VECTORS * LANES, ith, nth);
    for (int64_t c0 = part.first; c0 < part.last; c0 += WIDTH) {
        const int64_t n = min(WIDTH, part.last - c0);
        const int64_t width = round_up(n, LANES);
        fill(sums, sums + rank * WIDTH, 0.0f);
        for (int64_t t0 = 0; t0 < n_tokens; t0 += DEPTH) {
            const int64_t depth = min(DEPTH, n_tokens - t0), at = t0 * x.stride + c0;
            const float * l = left + t0 * left_stride;
            if (dropout.p > 0.0f || n < width) {
                for (int64_t t = 0; t < depth; t++) {
                    copy_row(x, dropout, t0 + t, c0, n, width, block + t * WIDTH);
                }
                outer_block(l, left_stride, rank, block, WIDTH, depth, width, sums);
            } else if (x.is_bf16) {
                outer_block(l, left_stride, rank, (const uint16_t *)x.data + at, x.stride, depth,
                            width, sums);
            } else {
                outer_block(l, left_stride, rank, (const float *)x.data + at, x.stride, depth,
                            width, sums);
            }
        }
        for (int64_t c = 0; c < n; c++) {
            float * o = out + (c0 + c) * c_step;
            for (int r = 0; r < rank; r++)
                o[r * r_step] += scale * sums[r * WIDTH + c];
        }
    }
}

size_t scratch_bytes(int64_t n_inputs, int64_t n_outputs, int rank) {
    const int64_t gradients = max(outer_words(rank), transposed_words(n_outputs, rank));
    return 4 * (size_t)max(dropped_words(n_inputs), gradients);
}

void down(Rows x, Dropout dropout, int64_t n_cols, int64_t n_tokens, const LoraDown * adapters,
          int n_adapters, int ith, int nth) {
    dot_tokens(x, dropout, n_cols, n_tokens, adapters, n_adapters, 1.0f, ith, nth);
}

void up_t(Rows dy, const float * b, int rank, float scale, int64_t n_rows, int64_t n_tokens,
          float * du, int64_t du_stride, int ith, int nth) {
    // b transposed, by every thread for itself: N*R copies against the N*R*T/nth products it
    // serves.
    float * transposed = thread_floats(transposed_words(n_rows, rank));
    for (int64_t n = 0; n < n_rows; n++) {
        for (int r = 0; r < rank; r++)
            transposed[r * n_rows + n] = b[n * rank + r];
    }
    const LoraDown l = {transposed, rank, du, du_stride};
    dot_tokens(dy, {}, n_rows, n_tokens, &l, 1, scale, ith, nth);
}

void grad_a(Rows x, Dropout dropout, const float * du, int64_t du_stride, int rank, float scale,
            int64_t n_cols, int64_t n_tokens, float * da, int ith, int nth) {
    outer_sum(x, dropout, du, du_stride, rank, scale, n_cols, n_tokens, da, n_cols, 1, ith, nth);
}

void grad_b(Rows dy, const float * u, int64_t u_stride, int rank, float scale, int64_t n_rows,
            int64_t n_tokens, float * db, int ith, int nth) {
    outer_sum(dy, {}, u, u_stride, rank, scale, n_rows, n_tokens, db, 1, rank, ith, nth);
}

} // namespace

extern const LoraKernels lora_kernels;
const LoraKernels lora_kernels = {down, up_t, grad_a, grad_b, scratch_bytes};

} // namespace ggft::GGFT_ISA_NAMESPACE
