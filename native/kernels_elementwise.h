// Row operations between the matrix products, each a single pass over memory. Token-major F32: row t holds one
// token. Called by all `nth` threads at once; a thread owns a range of rows, so results do not depend on nth.
#pragma once

#include <cstdint>

namespace ggft {

/// n = x / rms(x) * w, rms = sqrt(mean(x²) + eps). x, n (n_rows, n_cols); w (n_cols) or null.
/// Source: Zhang and Sennrich 2019, eq. 4.
void rms_norm(const float * x, const float * w, float eps, float * n, int64_t n_cols, int64_t n_rows, int ith, int nth);

/// dx = residual + r (g - n̂ mean(g n̂)), g = dn w, n̂ = x r, r = 1/rms(x). Writes dx; residual may be null.
void rms_norm_back(const float * x, const float * w, float eps, const float * dn, const float * residual, float * dx,
                   int64_t n_cols, int64_t n_rows, int ith, int nth);

/// h = silu(gate) up, silu(z) = z / (1 + e^-z). n elements. Source: Shazeer 2020, eq. 5.
void swiglu(const float * gate, const float * up, float * h, int64_t n, int ith, int nth);

/// dgate = dh up σ(gate) (1 + gate (1 - σ(gate))), dup = dh silu(gate). Writes both.
void swiglu_back(const float * gate, const float * up, const float * dh, float * dgate, float * dup, int64_t n, int ith,
                 int nth);

/// How the two members of a rotated pair lie in a head.
enum class RopePairs { adjacent, halves };  // ggml's NORMAL and NEOX

/// Rotates the first n_dims of every head by the angles whose cosine and sine (with YaRN's magnitude) stand in
/// `cos_sin` (n_tokens, n_dims), laid out as the pairs are. x (n_tokens, n_heads, head_size), in place.
/// inverse: multiplies by the transposed rotation, which is the gradient. Source: Su et al. 2021, eq. 34.
void rope_inplace(float * x, const float * cos_sin, RopePairs pairs, bool inverse, int64_t n_dims, int64_t head_size,
                  int64_t n_heads, int64_t n_tokens, int ith, int nth);

}  // namespace ggft
