// The grids of a block format: which scale and minimum fit a group of columns best.
#pragma once

#include "kernels/calibrate/lanes.h"

namespace ggft::GGFT_ISA_NAMESPACE {

struct Grid {
    V s{}, m{};
};
struct Super {
    V d{}, dmin{};
};

/// The best grid of a group of columns, `stride` floats apart, by its weighted squared error: one
/// that the type has under `super`, or, with null, before scales are rounded.
Grid fit_grid(const BlockFormat & f, const Super * super, const float * columns, int64_t stride,
              const float * weights);

/// d and dmin for the grids of a block's groups, the first of each `stride` grids apart.
Super fit_super(const BlockFormat & f, const Grid * grids);

/// What 16-bit floats make of x.
V to_half(V x);
/// 2 to a whole number: the one below, or next to x. x > 0.
V power_below(V x);

GGFT_INLINE V round_whole(V x) {
    const V magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds
    return (x + magic) - magic;
}

GGFT_INLINE V clamp(V x, float low, float high) {
    x = select(x > splat(low), x, splat(low)); // NaN becomes the lowest
    return select(x < splat(high), x, splat(high));
}

/// 1/x, and 0 of 0.
GGFT_INLINE V inverse(V x) {
    const VI zero = x == V{};
    return select(zero, V{}, splat(1.0f) / select(zero, splat(1.0f), x));
}

/// The code nearest to x, a weight less m and divided by s.
template <bool TABLE> GGFT_INLINE V nearest_code(const BlockFormat & f, V x) {
    if constexpr (TABLE) {
        V code = splat(f.table[0]);
        for (int i = 1; i < f.n_codes; i++)
            code = select(x > splat(0.5f * (f.table[i - 1] + f.table[i])), splat(f.table[i]), code);
        return code;
    }
    return round_whole(clamp(x, f.low, f.high));
}

/// The grids of a type next to g, up to three. `min_of(s)` is the best minimum of a scale.
template <class MinOf>
GGFT_INLINE int neighbours(const BlockFormat & f, const Super & super, Grid g, MinOf min_of,
                           Grid * out) {
    switch (f.scales) {
    case Scales::half:
        out[0].s = to_half(g.s);
        out[0].m = f.has_min ? to_half(min_of(out[0].s)) : V{};
        return 1;
    case Scales::power:
        out[0] = {power_below(g.s), V{}};
        out[1] = {out[0].s + out[0].s, V{}};
        return 2;
    case Scales::super:
        const V multiple = round_whole(clamp(g.s * inverse(super.d), f.scale_low, f.scale_high));
        for (int i = 0; i < 3; i++) {
            const V near = clamp(multiple + splat((float)(i - 1)), f.scale_low, f.scale_high);
            out[i].s = super.d * near;
            if (f.has_min) {
                const V m = min_of(out[i].s) * inverse(super.dmin);
                out[i].m = super.dmin * round_whole(clamp(m, -f.min_high, 0.0f));
            }
        }
        return 3;
    }
    return 0;
}

} // namespace ggft::GGFT_ISA_NAMESPACE
