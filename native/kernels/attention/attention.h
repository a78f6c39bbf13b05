// Causal grouped-query attention over packed examples, without a T x T buffer (Dao 2023,
// FlashAttention-2).
//
//   o[i][h] = sum_j p[i][j] v[j][kv(h)],  p[i][j] = e^(scale * q[i][h].k[j][kv(h)] - lse[i][h]),
//   lse[i][h] = log(sum_j e^(scale * q.k)),  j in [start[i], i],  kv(h) = h / (H / K)
//
// start[i] is the first token that token i sees: its example's first token; i itself for padding.
// It never decreases with i.
// Tiles wholly outside an example or above the diagonal are skipped, so packed rows cost what their
// examples cost. Exponentials and all sums of products are F32.
//
// Called by all nth threads, without waiting inside; bit-identical for a given nth. Working
// memory is the thread's (kernels/isa/memory.h).
#pragma once

#include "kernels/gemm/gemm.h"

namespace ggft {

inline constexpr int MAX_HEAD_SIZE = 256;

/// Token-major, contiguous: q, o, dq, d_o (N, H, D); k, v, dk, dv (N, K, D); lse (N, H). Rotary
/// position encoding is already in q and k. D <= MAX_HEAD_SIZE, H a multiple of K.
struct AttentionShape {
    int64_t n_tokens;
    int n_head, n_head_kv, head_size;
    float scale;
    int64_t row_tokens; // of a row of the batch: what is in one never depends on another
};

struct AttentionKernels {
    /// Write o and lse.
    void (*forward)(Format format, const AttentionShape & shape, const float * q, const float * k,
                    const float * v, const int32_t * start, float * o, float * lse, int ith,
                    int nth);

    /// Write dq, dk, dv from d_o; saved: q, k, v, o, lse.
    ///   dS = p * (d_o.v - delta) * scale, delta = d_o.o;  dq = dS k, dk = dS' q, dv = p' d_o
    void (*backward)(Format format, const AttentionShape & shape, const float * q, const float * k,
                     const float * v, const int32_t * start, const float * o, const float * lse,
                     const float * d_o, float * dq, float * dk, float * dv, int ith, int nth);

    /// Bytes of working memory of one thread.
    size_t (*scratch_bytes)(Format format, const AttentionShape & shape);
    size_t (*backward_scratch_bytes)(Format format, const AttentionShape & shape);
};

} // namespace ggft
