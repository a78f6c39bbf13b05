#include "kernels_elementwise.h"

#include "kernels_simd.h"

#include <cmath>

namespace ggft {

// Sum of f(i) over vectors, then the remaining elements one by one.
template <class Vector, class Scalar>
static inline float sum_over(int64_t n, Vector vector, Scalar scalar) {
    V       a{}, b{};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        a += vector(i);
        b += vector(i + LANES);
    }
    float sum = sum_lanes(a + b);
    for (; i < n; i++) { sum += scalar(i); }
    return sum;
}

static inline float inverse_rms(const float * x, float eps, int64_t n) {
    const float square = sum_over(
        n, [=](int64_t i) { return load(x + i) * load(x + i); }, [=](int64_t i) { return x[i] * x[i]; });
    return 1.0f / std::sqrt(square / (float) n + eps);
}

void rms_norm(const float * x, const float * w, float eps, float * n, int64_t n_cols, int64_t n_rows, int ith, int nth) {
    const Range rows = split_range(n_rows, 1, ith, nth);
    for (int64_t t = rows.first; t < rows.last; t++) {
        const float * xt = x + t * n_cols;
        float *       nt = n + t * n_cols;
        const float   r  = inverse_rms(xt, eps, n_cols);
        if (w == nullptr) {
            for (int64_t i = 0; i < n_cols; i++) { nt[i] = xt[i] * r; }
        } else {
            for (int64_t i = 0; i < n_cols; i++) { nt[i] = xt[i] * r * w[i]; }
        }
    }
}

void rms_norm_back(const float * x, const float * w, float eps, const float * dn, const float * residual, float * dx,
                   int64_t n_cols, int64_t n_rows, int ith, int nth) {
    const Range rows = split_range(n_rows, 1, ith, nth);
    for (int64_t t = rows.first; t < rows.last; t++) {
        const float *xt = x + t * n_cols, *dt = dn + t * n_cols;
        float *      out = dx + t * n_cols;
        const float  r   = inverse_rms(xt, eps, n_cols);
        // out holds g = dn w until the second loop.
        for (int64_t i = 0; i < n_cols; i++) { out[i] = w == nullptr ? dt[i] : dt[i] * w[i]; }
        const float gx = sum_over(
            n_cols, [=](int64_t i) { return load(out + i) * load(xt + i); }, [=](int64_t i) { return out[i] * xt[i]; });
        const float k = r * r * r * gx / (float) n_cols;
        if (residual == nullptr) {
            for (int64_t i = 0; i < n_cols; i++) { out[i] = r * out[i] - k * xt[i]; }
        } else {
            const float * res = residual + t * n_cols;
            for (int64_t i = 0; i < n_cols; i++) { out[i] = res[i] + r * out[i] - k * xt[i]; }
        }
    }
}

static GGFT_INLINE V sigmoid(V z) { return splat(1.0f) / (splat(1.0f) + vexp(-z)); }

// Applies f to whole vectors of thread ith's share, and to the last few elements through a padded copy.
template <class F> static inline void for_vectors(int64_t n, int ith, int nth, F f) {
    const Range range = split_range(n, LANES, ith, nth);
    for (int64_t i = range.first; i < range.last; i += LANES) { f(i, range.last - i < LANES ? (int) (range.last - i) : LANES); }
}

static GGFT_INLINE V load_n(const float * p, int n) {
    if (n == LANES) { return load(p); }
    V v{};
    std::memcpy(&v, p, (size_t) n * sizeof(float));
    return v;
}

static GGFT_INLINE void store_n(float * p, V v, int n) { std::memcpy(p, &v, (size_t) n * sizeof(float)); }

void swiglu(const float * gate, const float * up, float * h, int64_t n, int ith, int nth) {
    for_vectors(n, ith, nth, [=](int64_t i, int lanes) {
        const V z = load_n(gate + i, lanes), y = z * sigmoid(z) * load_n(up + i, lanes);
        if (lanes == LANES) {
            store(h + i, y);
        } else {
            store_n(h + i, y, lanes);
        }
    });
}

void swiglu_back(const float * gate, const float * up, const float * dh, float * dgate, float * dup, int64_t n, int ith,
                 int nth) {
    for_vectors(n, ith, nth, [=](int64_t i, int lanes) {
        const V z = load_n(gate + i, lanes), d = load_n(dh + i, lanes), s = sigmoid(z);
        const V dz = d * load_n(up + i, lanes) * s * (splat(1.0f) + z * (splat(1.0f) - s));
        const V du = d * z * s;
        if (lanes == LANES) {
            store(dgate + i, dz);
            store(dup + i, du);
        } else {
            store_n(dgate + i, dz, lanes);
            store_n(dup + i, du, lanes);
        }
    });
}

void rope_inplace(float * x, const float * cos_sin, RopePairs pairs, bool inverse, int64_t n_dims, int64_t head_size,
                  int64_t n_heads, int64_t n_tokens, int ith, int nth) {
    const Range   rows = split_range(n_tokens, 1, ith, nth);
    const float   sign = inverse ? -1.0f : 1.0f;
    const int64_t half = n_dims / 2;
    for (int64_t t = rows.first; t < rows.last; t++) {
        const float * cs = cos_sin + t * n_dims;
        for (int64_t h = 0; h < n_heads; h++) {
            float * p = x + (t * n_heads + h) * head_size;
            if (pairs == RopePairs::adjacent) {
                for (int64_t i = 0; i < half; i++) {
                    const float a = p[2 * i], b = p[2 * i + 1], c = cs[2 * i], s = sign * cs[2 * i + 1];
                    p[2 * i]     = a * c - b * s;
                    p[2 * i + 1] = a * s + b * c;
                }
            } else {
                for (int64_t i = 0; i < half; i++) {
                    const float a = p[i], b = p[i + half], c = cs[i], s = sign * cs[i + half];
                    p[i]        = a * c - b * s;
                    p[i + half] = a * s + b * c;
                }
            }
        }
    }
}

}  // namespace ggft
