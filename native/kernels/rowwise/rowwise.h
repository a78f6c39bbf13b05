// Row-wise operations, fused so that each reads and writes memory once. All rows are F32, C floats,
// one per token, contiguous. `*_bf16` outputs are optional second copies for the next matrix
// product (Rows::is_bf16). Called by all nth threads; rows are split between them; nothing is
// shared.
#pragma once

#include <cstdint>

namespace ggft {

/// Which elements of a head form the pair j: (2j, 2j+1) or (j, j + n_rot/2).
enum class RopeMode { norm, neox };

struct RowwiseKernels {
    /// y = x * r * w, r[t] = 1/sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019). Writes y and/or
    /// y_bf16 (either may be null) and, if not null, r (T).
    void (*rms_norm)(const float * x, const float * w, float eps, int64_t n_cols, int64_t n_tokens,
                     float * y, uint16_t * y_bf16, float * r, int ith, int nth);

    /// dx += r * (g - n * mean(g * n)), g = dy * w, n = x * r. Saved: x, r (T).
    void (*rms_norm_backward)(const float * dy, const float * x, const float * w, const float * r,
                              int64_t n_cols, int64_t n_tokens, float * dx, int ith, int nth);

    /// h = silu(gate) * up, silu(g) = g / (1 + e^-g) (Shazeer 2020). Writes h and/or h_bf16. n
    /// elements.
    void (*swiglu)(const float * gate, const float * up, int64_t n, float * h, uint16_t * h_bf16,
                   int ith, int nth);

    /// d_up = dh * silu(gate), d_gate = dh * up * s * (1 + gate * (1 - s)), s = sigmoid(gate).
    /// d_gate and d_up are written; d_up may be dh, and d_gate may be gate or up.
    void (*swiglu_backward)(const float * dh, const float * gate, const float * up, int64_t n,
                            float * d_gate, float * d_up, int ith, int nth);

    /// Rotate pair j of every head by the angle whose cosine and sine are cos[t][j], sin[t][j]
    /// (Su et al. 2021), j < n_rot/2; elements past n_rot are copied. x and y are
    /// [T][n_head][head_size], rows x_stride and y_stride floats apart; y may be x. `backward`
    /// rotates by the opposite angle, which is the transpose: dx from dy.
    void (*rope)(const float * x, int64_t x_stride, const float * cos, const float * sin,
                 RopeMode mode, int n_rot, int head_size, int n_head, int64_t n_tokens,
                 bool backward, float * y, int64_t y_stride, int ith, int nth);

    /// The sum of a * b over n elements. One thread's.
    float (*dot)(const float * a, const float * b, int64_t n);

    /// y += factor * x, n elements. One thread's.
    void (*add_scaled)(float factor, const float * x, int64_t n, float * y);
};

} // namespace ggft
