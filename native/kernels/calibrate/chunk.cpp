// A chunk of rows on its way to blocks: error feedback, and sweeps over codes and grids.
#include "kernels/calibrate/grids.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

// a[k] -= factor * a[j] of CHUNK lanes.
void subtract(float * to, const float * from, float factor) {
    for (int v = 0; v < CHUNK; v += LANES)
        store(to + v, fma(splat(-factor), load(from + v), load(to + v)));
}

// chunk <- chunk second⁻¹, second = R Rᵀ.
void solve(const Factored & m, float * chunk) {
    const int64_t n = m.n, stride = m.stride;
    const float * unit = m.unit;
    // y Rᵀ = chunk, from the last column on. What is kept is y times R's diagonal.
    for (int64_t first = n - PANEL; first >= 0; first -= PANEL) {
        const int64_t end = first + PANEL;
        add_products(chunk + first * CHUNK, CHUNK, chunk + end * CHUNK, CHUNK,
                     unit + end * stride + first, {1, stride}, PANEL, n - end, -1.0f);
        for (int64_t k = end - 1; k >= first; k--) {
            for (int64_t l = k + 1; l < end; l++)
                subtract(chunk + k * CHUNK, chunk + l * CHUNK, unit[l * stride + k]);
        }
    }
    // z R = y, from the first column on.
    for (int64_t first = 0; first < n; first += PANEL) {
        float * panel = chunk + first * CHUNK;
        for (int64_t k = 0; k < PANEL; k++) {
            const V factor = splat(1.0f / m.pivots[first + k]);
            for (int v = 0; v < CHUNK; v += LANES)
                store(panel + k * CHUNK + v, factor * load(panel + k * CHUNK + v));
        }
        add_products(panel, CHUNK, chunk, CHUNK, unit + first * stride, {stride, 1}, PANEL, first,
                     -1.0f);
        for (int64_t k = 1; k < PANEL; k++) {
            for (int64_t l = 0; l < k; l++)
                subtract(panel + k * CHUNK, panel + l * CHUNK,
                         unit[(first + k) * stride + first + l]);
        }
    }
}

// Columns are CHUNK floats, as are scales and minima of a group, d and dmin of a block.
template <bool TABLE> class Chunk {
public:
    Chunk(const Factored & moments, const BlockFormat & format, const ChunkMemory & memory)
        : m_(moments), f_(format), at_(memory) {}

    // Returns the error.
    double feed_back() {
        error_ = V{};
        for (int64_t first = 0; first < m_.n; first += span())
            feed_back_span(first);
        return sum_lanes(error_);
    }

    // Returns by how much the error falls.
    double sweep() {
        gain_ = V{};
        for (int64_t first = 0; first < m_.n; first += PANEL) {
            clear_work(PANEL);
            add_products(at_.work, CHUNK, at_.errors, CHUNK, m_.second + first * m_.stride,
                         {m_.stride, 1}, PANEL, m_.n, 1.0f);
            for (int v = 0; v < CHUNK_VECTORS; v++) {
                for (int64_t j = first; j < first + PANEL; j += f_.group) {
                    sweep_codes(first, j, v);
                    sweep_grid(first, j, v);
                }
            }
        }
        return sum_lanes(gain_);
    }

private:
    int64_t span() const { return max<int64_t>(PANEL, f_.block); }
    Grid grid(int64_t column, int v) const {
        const int64_t i = column / f_.group * CHUNK + v * LANES;
        return {load(at_.s + i), load(at_.m + i)};
    }
    void set_grid(int64_t column, int v, const Grid & g) {
        const int64_t i = column / f_.group * CHUNK + v * LANES;
        store(at_.s + i, g.s);
        store(at_.m + i, g.m);
    }
    Super super(int64_t column, int v) const {
        const int64_t i = column / f_.block * CHUNK + v * LANES;
        return {load(at_.d + i), load(at_.dmin + i)};
    }
    void set_super(int64_t column, int v, const Super & super) {
        const int64_t i = column / f_.block * CHUNK + v * LANES;
        store(at_.d + i, super.d);
        store(at_.dmin + i, super.dmin);
    }
    static float * column(float * of, int64_t j, int v) { return of + j * CHUNK + v * LANES; }
    void clear_work(int64_t n) { fill(at_.work, at_.work + n * CHUNK, 0.0f); }

    // A block, or a panel where blocks are as small.
    void feed_back_span(int64_t first) {
        const float * unit = m_.unit + first * m_.stride;
        const int64_t n = span();
        std::memcpy(at_.work, column(at_.targets, first, 0), (size_t)(n * CHUNK) * 4);
        add_products(at_.work, CHUNK, at_.errors, CHUNK, unit, {m_.stride, 1}, n, first, -1.0f);
        if (f_.scales == Scales::super) {
            for (int v = 0; v < CHUNK_VECTORS; v++)
                set_super(first, v, super_of(first, v));
        }
        for (int64_t j = 0; j < n; j += PANEL) {
            add_products(at_.work + j * CHUNK, CHUNK, column(at_.errors, first, 0), CHUNK,
                         unit + j * m_.stride + first, {m_.stride, 1}, PANEL, j, -1.0f);
            for (int v = 0; v < CHUNK_VECTORS; v++) {
                for (int64_t k = j; k < j + PANEL; k += f_.group)
                    feed_back_group(first, j + PANEL, k, v);
            }
        }
    }

    Super super_of(int64_t first, int v) {
        Grid grids[MAX_BLOCK / 16];
        for (int i = 0; i < f_.block / f_.group; i++) {
            const int64_t j = i * f_.group;
            grids[i] = fit_grid(f_, nullptr, column(at_.work, j, v), CHUNK, m_.pivots + first + j);
        }
        return fit_super(f_, grids);
    }

    // Codes of the group at `begin`; what it gets wrong goes to the columns before `end`, both
    // counted from `first` on, where the work begins.
    void feed_back_group(int64_t first, int64_t end, int64_t begin, int v) {
        const int64_t at = first + begin;
        const Super shared = super(at, v);
        const Grid g = fit_grid(f_, &shared, column(at_.work, begin, v), CHUNK, m_.pivots + at);
        set_grid(at, v, g);
        const V factor = inverse(g.s);
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const V wanted = load(column(at_.work, j, v));
            const V code = nearest_code<TABLE>(f_, (wanted - g.m) * factor);
            const V value = fma(g.s, code, g.m), miss = value - wanted;
            const V error = value - load(column(at_.targets, first + j, v));
            store(column(at_.codes, first + j, v), code);
            store(column(at_.errors, first + j, v), error);
            error_ = fma(splat(m_.pivots[first + j]) * miss, miss, error_);
            const float * unit = m_.unit + first + j;
            for (int64_t k = j + 1; k < end; k++) {
                float * to = column(at_.work, k, v);
                store(to, fma(splat(-unit[(first + k) * m_.stride]), error, load(to)));
            }
        }
    }

    // Each code of the group at `begin`, while all others stay. at_.work holds half the gradient of
    // the error by the weights of the panel at `first`.
    void sweep_codes(int64_t first, int64_t begin, int v) {
        const Grid g = grid(begin, v);
        const V factor = inverse(g.s);
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const float * row = m_.second + j * m_.stride;
            const V code = load(column(at_.codes, j, v)),
                    gradient = load(column(at_.work, j - first, v));
            const V better =
                nearest_code<TABLE>(f_, fma(splat(-1.0f / row[j]) * gradient, factor, code));
            const V change = (better - code) * g.s;
            gain_ -= change * fma(change, splat(row[j]), 2.0f * gradient);
            store(column(at_.codes, j, v), better);
            move(first, j, v, change, row);
        }
    }

    // A weight moves by `change`: so do its error and the panel's gradient.
    void move(int64_t first, int64_t j, int v, V change, const float * row) {
        float * error = column(at_.errors, j, v);
        store(error, load(error) + change);
        for (int64_t k = 0; k < PANEL; k++) {
            float * to = column(at_.work, k, v);
            store(to, fma(change, splat(row[first + k]), load(to)));
        }
    }

    // Scale and minimum of the group at `begin`, while its codes stay.
    void sweep_grid(int64_t first, int64_t begin, int v) {
        // Of a change ds, dm: error += 2 (ds xg + dm g) + ds² xx + 2 ds dm x1 + dm² one.
        V xx{}, x1{}, xg{}, g{};
        float one = 0;
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const float * row = m_.second + j * m_.stride + begin;
            const V code = load(column(at_.codes, j, v)),
                    gradient = load(column(at_.work, j - first, v));
            V product{};
            float sum = 0;
            for (int64_t k = 0; k < f_.group; k++) {
                product = fma(splat(row[k]), load(column(at_.codes, begin + k, v)), product);
                sum += row[k];
            }
            xx = fma(code, product, xx);
            x1 = fma(code, splat(sum), x1);
            xg = fma(code, gradient, xg);
            g += gradient;
            one += sum;
        }
        const Grid old = grid(begin, v);
        const V inverse_one = splat(1.0f / one);
        auto min_change = [&](V ds) { return -(g + ds * x1) * inverse_one; };
        const V ds = f_.has_min ? -(xg - x1 * g * inverse_one) * inverse(xx - x1 * x1 * inverse_one)
                                : -xg * inverse(xx);
        Grid near[3], best = old;
        V least{};
        const int count = neighbours(
            f_, super(begin, v), {old.s + ds, old.m},
            [&](V s) { return old.m + min_change(s - old.s); }, near);
        for (int i = 0; i < count; i++) {
            const V a = near[i].s - old.s, b = near[i].m - old.m;
            const V change = 2.0f * (a * xg + b * g) + a * a * xx + 2.0f * a * b * x1 + b * b * one;
            const VI better = change < least;
            least = select(better, change, least);
            best = {select(better, near[i].s, best.s), select(better, near[i].m, best.m)};
        }
        gain_ -= least;
        set_grid(begin, v, best);
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const V change = fma(best.s - old.s, load(column(at_.codes, j, v)), best.m - old.m);
            move(first, j, v, change, m_.second + j * m_.stride);
        }
    }

    const Factored & m_;
    const BlockFormat & f_;
    const ChunkMemory & at_;
    V error_{}, gain_{};
};

double feed_back(const Factored & m, const BlockFormat & f, const ChunkMemory & chunk) {
    return f.table ? Chunk<true>(m, f, chunk).feed_back() : Chunk<false>(m, f, chunk).feed_back();
}

double sweep(const Factored & m, const BlockFormat & f, const ChunkMemory & chunk) {
    return f.table ? Chunk<true>(m, f, chunk).sweep() : Chunk<false>(m, f, chunk).sweep();
}

void add_tile(float * c, int64_t c_stride, const float * a, const float * b, int64_t depth) {
    tile(a, TILE_LANES, b, {1, TILE_COLUMNS}, depth, [&](int column, int v, V sum) {
        float * at = c + column * c_stride + v * LANES;
        store(at, load(at) + sum);
    });
}

} // namespace

extern const CalibrateKernels calibrate_kernels;
const CalibrateKernels calibrate_kernels = {TILE_COLUMNS, TILE_LANES, add_tile, add_products,
                                            solve,        feed_back,  sweep};

} // namespace ggft::GGFT_ISA_NAMESPACE
