// The skinny products of LoRA on y = W x + scale * B A dropout(x), all in F32:
//
//   down:    u[t][r]  = sum_c keep[t][c] * x[t][c] * a[r][c]        a is (R, C)
//   up_t:   du[t][r]  = scale * sum_n dy[t][n] * b[n][r]            b is (N, R)
//   grad_a: da[r][c] += scale * sum_t du[t][r] * keep[t][c] * x[t][c]
//   grad_b: db[n][r] += scale * sum_t dy[t][n] * u[t][r]
//
// keep is the dropout factor of kernels/rowwise/dropout.h (1 without dropout). The remaining two
// products, y += scale * B u and dx += keep * A' du, ride in the matrix products (LowRank,
// kernels/gemm/gemm.h). Source: Hu et al. 2021 (LoRA), differentiated by hand; du already holds the
// scale, so that grad_a is called with scale 1 after up_t.
//
// Called by all nth threads, no waiting inside. Tokens (the first two) or columns (the gradients)
// are split between threads; sums over tokens run in token order whatever nth is.
#pragma once

#include "kernels/gemm/gemm.h"

namespace ggft {

struct Dropout {
    float p = 0.0f;
    uint64_t seed = 0;
};

/// One of several adapters that read the same rows: a is (rank, C), u has u_stride floats per
/// token.
struct LoraDown {
    const float * a;
    int rank;
    float * u;
    int64_t u_stride;
};

struct LoraKernels {
    /// Write u of each of `n_adapters` adapters; they share the rows and the mask.
    void (*down)(Rows x, Dropout dropout, int64_t n_cols, int64_t n_tokens,
                 const LoraDown * adapters, int n_adapters, int ith, int nth);

    /// Write du, du_stride floats per token.
    void (*up_t)(Rows dy, const float * b, int rank, float scale, int64_t n_rows, int64_t n_tokens,
                 float * du, int64_t du_stride, int ith, int nth);

    /// Add to da (rank, C).
    void (*grad_a)(Rows x, Dropout dropout, const float * du, int64_t du_stride, int rank,
                   float scale, int64_t n_cols, int64_t n_tokens, float * da, int ith, int nth);

    /// Add to db (N, rank).
    void (*grad_b)(Rows dy, const float * u, int64_t u_stride, int rank, float scale,
                   int64_t n_rows, int64_t n_tokens, float * db, int ith, int nth);

    /// Bytes of working memory of one thread for any of these.
    size_t (*scratch_bytes)(int64_t n_inputs, int64_t n_outputs, int rank);
};

} // namespace ggft
