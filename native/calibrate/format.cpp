#include "calibrate/format.h"

#include <cmath>

namespace ggft {

namespace {

// Source: ggml-common.h, kvalues_iq4nl and kvalues_mxfp4.
constexpr float IQ4_CODES[] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
constexpr float MXFP4_CODES[] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

Format whole(ggml_type type, float low, float high, bool has_min) {
    Format f{type, Scales::half, 32, 32, low, high};
    f.has_min = has_min;
    return f;
}

Format with_min(ggml_type type, int group, float high, float multiples) {
    Format f{type, Scales::super, 256, group, 0, high};
    f.scale_high = f.min_high = multiples;
    f.has_min = true;
    return f;
}

Format signed_scales(ggml_type type, int group, float low, float high, float multiples) {
    Format f{type, Scales::super, 256, group, low, high};
    f.scale_low = -multiples;
    f.scale_high = multiples - 1;
    return f;
}

Format with_table(Format f, const float * table, int n) {
    f.table = table;
    f.n_codes = n;
    return f;
}

const Format FORMATS[] = {
    whole(GGML_TYPE_Q4_0, -8, 7, false),
    whole(GGML_TYPE_Q4_1, 0, 15, true),
    whole(GGML_TYPE_Q5_0, -16, 15, false),
    whole(GGML_TYPE_Q5_1, 0, 31, true),
    // Not -128, which some products of ggml cannot negate.
    whole(GGML_TYPE_Q8_0, -127, 127, false),
    with_min(GGML_TYPE_Q2_K, 16, 3, 15),
    signed_scales(GGML_TYPE_Q3_K, 16, -4, 3, 32),
    with_min(GGML_TYPE_Q4_K, 32, 15, 63),
    with_min(GGML_TYPE_Q5_K, 32, 31, 63),
    signed_scales(GGML_TYPE_Q6_K, 16, -32, 31, 128),
    with_table(whole(GGML_TYPE_IQ4_NL, -127, 113, false), IQ4_CODES, 16),
    with_table(signed_scales(GGML_TYPE_IQ4_XS, 32, -127, 113, 32), IQ4_CODES, 16),
    with_table({GGML_TYPE_MXFP4, Scales::power, 32, 32, -12, 12}, MXFP4_CODES, 15),
};

// Shares of the range that the first grid spans; outliers are cut off by the smaller ones.
constexpr float SPANS[] = {1.0f, 0.95f, 0.9f, 0.85f};
constexpr int MAX_STARTS = 8, ROUNDS = 2;

// A group with its weighted sums.
struct Group {
    const Format & f;
    const float * columns;
    int64_t stride;
    const float * weights;

    V t(int j) const { return load(columns + j * stride); }
};

int make_starts(const Group & g, Grid * starts) {
    V low = g.t(0), high = g.t(0);
    for (int j = 1; j < g.f.group; j++) {
        low = select(g.t(j) < low, g.t(j), low);
        high = select(g.t(j) > high, g.t(j), high);
    }
    int n = 0;
    if (g.f.has_min) {
        if (g.f.scales == Scales::super)
            low = select(low < V{}, low, V{});
        const V middle = 0.5f * (low + high), half = 0.5f * (high - low);
        for (float span : SPANS)
            starts[n++] = {half * (2 * span / g.f.high), middle - half * span};
        return n;
    }
    // The largest value on either end of the codes: they reach further on one side.
    const V largest = select(high > -low, high, low);
    const bool both = g.f.low != -g.f.high;
    for (float span : SPANS) {
        starts[n++].s = largest * (span / g.f.high);
        if (both)
            starts[n++].s = largest * (span / g.f.low);
    }
    if (g.f.scales == Scales::power) {
        for (int i = 0; i < n; i++)
            starts[i].s = select(starts[i].s < V{}, -starts[i].s, starts[i].s);
    }
    return n;
}

template <bool TABLE> void find_codes(const Group & g, const Grid & grid, V * x) {
    const V factor = inverse(grid.s);
    for (int j = 0; j < g.f.group; j++)
        x[j] = nearest_code<TABLE>(g.f, (g.t(j) - grid.m) * factor);
}

// The least squares scale and minimum of codes.
struct Fit {
    V w{}, x{}, xx{}, t{}, xt{}; // weighted sums of 1, x, x², t, x t

    Fit(const Group & g, const V * codes) {
        for (int j = 0; j < g.f.group; j++) {
            const V weight = splat(g.weights[j]), t_j = g.t(j), wx = weight * codes[j];
            w += weight;
            x += wx;
            xx = fma(wx, codes[j], xx);
            t = fma(weight, t_j, t);
            xt = fma(wx, t_j, xt);
        }
    }
    V min_of(V s) const { return (t - s * x) * inverse(w); }
    V scale_alone() const { return xt * inverse(xx); }
    Grid best(const Format & f) const {
        if (!f.has_min)
            return {scale_alone(), V{}};
        const V s = (w * xt - x * t) * inverse(w * xx - x * x);
        const V m = min_of(s);
        if (f.scales == Scales::half)
            return {s, m};
        const VI above = m > V{};
        return {select(above, scale_alone(), s), select(above, V{}, m)};
    }
};

template <bool TABLE> V error_of(const Group & g, const Grid & grid) {
    V codes[PANEL], sum{};
    find_codes<TABLE>(g, grid, codes);
    for (int j = 0; j < g.f.group; j++) {
        const V e = fma(grid.s, codes[j], grid.m - g.t(j));
        sum = fma(splat(g.weights[j]) * e, e, sum);
    }
    return sum;
}

template <bool TABLE> Grid fit(const Group & g, const Super * super) {
    Grid starts[MAX_STARTS], best;
    V least = splat(__builtin_inff());
    auto consider = [&](const Grid & grid) {
        const V error = error_of<TABLE>(g, grid);
        const VI better = error < least;
        least = select(better, error, least);
        best = {select(better, grid.s, best.s), select(better, grid.m, best.m)};
    };
    const int n = make_starts(g, starts);
    for (int i = 0; i < n; i++) {
        Grid grid = starts[i];
        V codes[PANEL];
        for (int round = 0; round < ROUNDS; round++) {
            find_codes<TABLE>(g, grid, codes);
            grid = Fit(g, codes).best(g.f);
        }
        if (super == nullptr) {
            consider(grid);
            continue;
        }
        const Fit sums(g, codes);
        Grid near[3];
        const int count = neighbours(g.f, *super, grid, [&](V s) { return sums.min_of(s); }, near);
        for (int k = 0; k < count; k++)
            consider(near[k]);
    }
    return best;
}

} // namespace

const Format * find_format(ggml_type type) {
    for (const Format & f : FORMATS) {
        if (f.type == type)
            return &f;
    }
    return nullptr;
}

V to_half(V x) {
    float lanes[LANES];
    store(lanes, x);
    for (float & lane : lanes)
        lane =
            ggml_fp16_to_fp32(ggml_fp32_to_fp16(std::fmin(std::fmax(lane, -65504.0f), 65504.0f)));
    return load(lanes);
}

V power_below(V x) {
    float lanes[LANES];
    store(lanes, x);
    for (float & lane : lanes) {
        int exponent = 0;
        std::frexp(lane, &exponent);
        lane = std::ldexp(1.0f, std::min(std::max(exponent - 1, -126), 125));
    }
    return load(lanes);
}

Grid fit_grid(const Format & f, const Super * super, const float * columns, int64_t stride,
              const float * weights) {
    const Group group{f, columns, stride, weights};
    return f.table != nullptr ? fit<true>(group, super) : fit<false>(group, super);
}

Super fit_super(const Format & f, const Grid * grids) {
    V scale = grids[0].s, min{};
    for (int i = 0; i < f.groups_per_block(); i++) {
        const V s = grids[i].s;
        scale = select(s * s > scale * scale, s, scale);
        min = select(grids[i].m < min, grids[i].m, min);
    }
    Super super;
    super.d = to_half(scale * (1.0f / (f.scale_low < 0 ? f.scale_low : f.scale_high)));
    if (f.has_min)
        super.dmin = to_half(min * (-1.0f / f.min_high));
    return super;
}

} // namespace ggft
