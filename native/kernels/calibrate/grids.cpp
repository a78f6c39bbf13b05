#include "kernels/calibrate/grids.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

// Shares of the range that the first grid spans; outliers are cut off by the smaller ones.
constexpr float SPANS[] = {1.0f, 0.95f, 0.9f, 0.85f};
constexpr int MAX_STARTS = 8, ROUNDS = 2;

// A group with its weighted sums.
struct Group {
    const BlockFormat & f;
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
    Grid best(const BlockFormat & f) const {
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

V to_half(V x) {
    float lanes[LANES];
    store(lanes, x);
    for (float & lane : lanes)
        lane = ggml_fp16_to_fp32(
            ggml_fp32_to_fp16(__builtin_fminf(__builtin_fmaxf(lane, -65504.0f), 65504.0f)));
    return load(lanes);
}

V power_below(V x) {
    float lanes[LANES];
    store(lanes, x);
    for (float & lane : lanes) {
        int exponent = 0;
        __builtin_frexpf(lane, &exponent);
        lane = __builtin_ldexpf(1.0f, min(max(exponent - 1, -126), 125));
    }
    return load(lanes);
}

Grid fit_grid(const BlockFormat & f, const Super * super, const float * columns, int64_t stride,
              const float * weights) {
    const Group group{f, columns, stride, weights};
    return f.table != nullptr ? fit<true>(group, super) : fit<false>(group, super);
}

Super fit_super(const BlockFormat & f, const Grid * grids) {
    V scale = grids[0].s, lowest{};
    for (int i = 0; i < f.block / f.group; i++) {
        const V s = grids[i].s;
        scale = select(s * s > scale * scale, s, scale);
        lowest = select(grids[i].m < lowest, grids[i].m, lowest);
    }
    Super super;
    super.d = to_half(scale * (1.0f / (f.scale_low < 0 ? f.scale_low : f.scale_high)));
    if (f.has_min)
        super.dmin = to_half(lowest * (-1.0f / f.min_high));
    return super;
}

} // namespace ggft::GGFT_ISA_NAMESPACE
