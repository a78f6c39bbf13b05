#include "kernels/rowwise/rowwise.h"

#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

/// Call f(c, n) for [first, last) in pieces of n = LANES, then once for the rest.
template <class F> GGFT_INLINE void for_lanes(int64_t first, int64_t last, F f) {
    int64_t c = first;
    for (; c + LANES <= last; c += LANES)
        f(c, LANES);
    if (c < last)
        f(c, (int)(last - c));
}

GGFT_INLINE V load_n(const float * p, int n) {
    if (n == LANES)
        return load(p);
    float x[LANES] = {};
    std::memcpy(x, p, (size_t)n * 4);
    return load(x);
}

GGFT_INLINE void store_n(float * p, V v, int n) {
    if (n == LANES)
        return store(p, v);
    float x[LANES];
    store(x, v);
    std::memcpy(p, x, (size_t)n * 4);
}

GGFT_INLINE void store_bf16_n(uint16_t * p, V v, int n) {
    const VH h = to_bf16(v);
    std::memcpy(p, &h, (size_t)n * 2);
}

GGFT_INLINE V sigmoid(V x) {
    return splat(1.0f) / (splat(1.0f) + vexp(-x));
}

/// Elements of a flat array for one thread, whole cache lines.
GGFT_INLINE Range flat_part(int64_t n, int ith, int nth) {
    return split_range(n, 64, ith, nth);
}

void rms_norm(const float * x, const float * w, float eps, int64_t n_cols, int64_t n_tokens,
              float * y, uint16_t * y_bf16, float * r, int ith, int nth) {
    const Range part = split_range(n_tokens, 1, ith, nth);
    for (int64_t t = part.first; t < part.last; t++) {
        const float * row = x + t * n_cols;
        V sums = {};
        for_lanes(0, n_cols, [&](int64_t c, int n) {
            const V v = load_n(row + c, n);
            sums = fma(v, v, sums);
        });
        const float inv = 1.0f / __builtin_sqrtf(sum_lanes(sums) / (float)n_cols + eps);
        if (r)
            r[t] = inv;
        for_lanes(0, n_cols, [&](int64_t c, int n) {
            const V out = load_n(row + c, n) * inv * load_n(w + c, n);
            if (y)
                store_n(y + t * n_cols + c, out, n);
            if (y_bf16)
                store_bf16_n(y_bf16 + t * n_cols + c, out, n);
        });
    }
}

void rms_norm_backward(const float * dy, const float * x, const float * w, const float * r,
                       int64_t n_cols, int64_t n_tokens, float * dx, int ith, int nth) {
    const Range part = split_range(n_tokens, 1, ith, nth);
    for (int64_t t = part.first; t < part.last; t++) {
        const float *g_row = dy + t * n_cols, *x_row = x + t * n_cols;
        float * out = dx + t * n_cols;
        V dots = {};
        for_lanes(0, n_cols, [&](int64_t c, int n) {
            dots = fma(load_n(g_row + c, n) * load_n(w + c, n), load_n(x_row + c, n), dots);
        });
        const float inv = r[t];
        const float slope = -sum_lanes(dots) * inv * inv / (float)n_cols; // of x, inside r * (...)
        for_lanes(0, n_cols, [&](int64_t c, int n) {
            const V g = load_n(g_row + c, n) * load_n(w + c, n);
            const V d = fma(load_n(x_row + c, n), splat(slope), g);
            store_n(out + c, fma(d, splat(inv), load_n(out + c, n)), n);
        });
    }
}

void swiglu(const float * gate, const float * up, int64_t n, float * h, uint16_t * h_bf16, int ith,
            int nth) {
    const Range part = flat_part(n, ith, nth);
    for_lanes(part.first, part.last, [&](int64_t i, int k) {
        const V g = load_n(gate + i, k);
        const V out = g * sigmoid(g) * load_n(up + i, k);
        if (h)
            store_n(h + i, out, k);
        if (h_bf16)
            store_bf16_n(h_bf16 + i, out, k);
    });
}

void swiglu_backward(const float * dh, const float * gate, const float * up, int64_t n,
                     float * d_gate, float * d_up, int ith, int nth) {
    const Range part = flat_part(n, ith, nth);
    for_lanes(part.first, part.last, [&](int64_t i, int k) {
        const V g = load_n(gate + i, k), u = load_n(up + i, k), d = load_n(dh + i, k);
        const V s = sigmoid(g);
        store_n(d_up + i, d * g * s, k);
        store_n(d_gate + i, d * u * s * fma(g, splat(1.0f) - s, splat(1.0f)), k);
    });
}

typedef uint32_t VUHalf __attribute__((vector_size(LANES * 2)));
typedef uint64_t VPair __attribute__((vector_size(LANES * 4)));

/// p[0], p[0], p[1], p[1], ... from LANES/2 floats.
GGFT_INLINE V twice(const float * p) {
    const VPair low = __builtin_convertvector(load_as<VUHalf>(p), VPair);
    return (V)(low | (low << 32));
}

/// Pairs (2j, 2j+1): x * cos + swap(x) * (-sin, +sin).
void rotate_norm(const float * x, const float * c, const float * s, int pairs, float sign,
                 float * y) {
    const VPair first = VPair{} + 0x80000000u, second = VPair{} + 0x8000000000000000u;
    const VPair flip = sign > 0 ? first : second;
    int j = 0;
    for (; j + LANES / 2 <= pairs; j += LANES / 2) {
        const V v = load(x + 2 * j);
        const V swapped = (V)(((VPair)v >> 32) | ((VPair)v << 32));
        const V sine = (V)((VPair)twice(s + j) ^ flip);
        store(y + 2 * j, fma(v, twice(c + j), swapped * sine));
    }
    for (; j < pairs; j++) {
        const float a = x[2 * j], b = x[2 * j + 1];
        y[2 * j] = a * c[j] - sign * b * s[j];
        y[2 * j + 1] = sign * a * s[j] + b * c[j];
    }
}

/// Pairs (j, j + pairs).
void rotate_neox(const float * x, const float * c, const float * s, int pairs, float sign,
                 float * y) {
    int j = 0;
    for (; j + LANES <= pairs; j += LANES) {
        const V a = load(x + j), b = load(x + j + pairs);
        const V cosine = load(c + j), sine = load(s + j) * sign;
        store(y + j, fma(a, cosine, -(b * sine)));
        store(y + j + pairs, fma(b, cosine, a * sine));
    }
    for (; j < pairs; j++) {
        const float a = x[j], b = x[j + pairs];
        y[j] = a * c[j] - sign * b * s[j];
        y[j + pairs] = sign * a * s[j] + b * c[j];
    }
}

void rope(const float * x, int64_t x_stride, const float * cos, const float * sin, RopeMode mode,
          int n_rot, int head_size, int n_head, int64_t n_tokens, bool backward, float * y,
          int64_t y_stride, int ith, int nth) {
    const int pairs = n_rot / 2;
    const float sign = backward ? -1.0f : 1.0f;
    const auto rotate = mode == RopeMode::norm ? rotate_norm : rotate_neox;
    const Range part = split_range(n_tokens, 1, ith, nth);
    for (int64_t t = part.first; t < part.last; t++) {
        for (int h = 0; h < n_head; h++) {
            const float * from = x + t * x_stride + (int64_t)h * head_size;
            float * to = y + t * y_stride + (int64_t)h * head_size;
            rotate(from, cos + t * pairs, sin + t * pairs, pairs, sign, to);
            if (to != from && n_rot < head_size) {
                std::memcpy(to + n_rot, from + n_rot, (size_t)(head_size - n_rot) * 4);
            }
        }
    }
}

float dot(const float * a, const float * b, int64_t n) {
    V sums = {};
    for_lanes(0, n,
              [&](int64_t i, int m) { sums = fma(load_n(a + i, m), load_n(b + i, m), sums); });
    return sum_lanes(sums);
}

void add_scaled(float factor, const float * x, int64_t n, float * y) {
    const V f = splat(factor);
    for_lanes(0, n, [&](int64_t i, int m) {
        store_n(y + i, fma(f, load_n(x + i, m), load_n(y + i, m)), m);
    });
}

} // namespace

extern const RowwiseKernels rowwise_kernels;
const RowwiseKernels rowwise_kernels = {rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope,
                                        dot,      add_scaled};

} // namespace ggft::GGFT_ISA_NAMESPACE
