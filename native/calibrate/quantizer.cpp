#include "calibrate/quantizer.h"

#include "calibrate/pack.h"
#include "calibrate/threads.h"

#include <cmath>

namespace ggft {

namespace {

constexpr int MAX_BLOCK = 256;

// Rows [first, first + CHUNK) of a matrix as columns of lanes; 0 in rows that are not there.
void load_chunk(const float * rows, int64_t n, int64_t n_rows, int64_t first, float * out) {
    for (int64_t lane = 0; lane < CHUNK; lane++) {
        const float * row = first + lane < n_rows ? rows + (first + lane) * n : nullptr;
        for (int64_t j = 0; j < n; j++)
            out[j * CHUNK + lane] = row != nullptr ? row[j] : 0.0f;
    }
}

void store_chunk(const float * chunk, int64_t n, int64_t n_rows, int64_t first, float * rows) {
    for (int64_t lane = 0; lane < std::min<int64_t>(CHUNK, n_rows - first); lane++) {
        for (int64_t j = 0; j < n; j++)
            rows[(first + lane) * n + j] = chunk[j * CHUNK + lane];
    }
}

// a[k] -= factor * a[j] of CHUNK lanes.
void subtract(float * to, const float * from, float factor) {
    for (int v = 0; v < CHUNK; v += LANES)
        store(to + v, fma(splat(-factor), load(from + v), load(to + v)));
}

// chunk <- chunk second⁻¹, second = R Rᵀ.
void solve(const Moments & m, float * chunk) {
    const int64_t n = m.n(), stride = m.stride();
    const float * unit = m.unit();
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
            const V factor = splat(1.0f / m.pivots()[(size_t)(first + k)]);
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

// CHUNK rows on their way to blocks. Columns are CHUNK floats, as are scales and minima of a group,
// d and dmin of a block.
template <bool TABLE> class Chunk {
public:
    Chunk(const Moments & moments, const Format & format)
        : m_(moments), f_(format), n_(moments.n()), targets_((size_t)(n_ * CHUNK)),
          errors_((size_t)(n_ * CHUNK)), codes_((size_t)(n_ * CHUNK)),
          grids_((size_t)(n_ / format.group * CHUNK_VECTORS)),
          supers_((size_t)(n_ / format.block * CHUNK_VECTORS)), work_(MAX_BLOCK * CHUNK) {}

    float * targets() { return targets_.data(); }

    // Returns the error.
    double feed_back() {
        error_ = V{};
        for (int64_t first = 0; first < n_; first += span())
            feed_back_span(first);
        return sum_lanes(error_);
    }

    // Returns by how much the error falls.
    double sweep() {
        gain_ = V{};
        for (int64_t first = 0; first < n_; first += PANEL) {
            clear_work(PANEL);
            add_products(work_.data(), CHUNK, errors_.data(), CHUNK,
                         m_.second() + first * m_.stride(), {m_.stride(), 1}, PANEL, n_, 1.0f);
            for (int v = 0; v < CHUNK_VECTORS; v++) {
                for (int64_t j = first; j < first + PANEL; j += f_.group) {
                    sweep_codes(first, j, v);
                    sweep_grid(first, j, v);
                }
            }
        }
        return sum_lanes(gain_);
    }

    void pack(int64_t n_rows, int64_t row_bytes, uint8_t * out) const {
        const int64_t bytes = (int64_t)ggml_type_size(f_.type);
        for (int lane = 0; lane < std::min<int64_t>(CHUNK, n_rows); lane++) {
            for (int64_t i = 0; i < n_ / f_.block; i++)
                pack_block(f_, block_of(i, lane), out + lane * row_bytes + i * bytes);
        }
    }

private:
    int64_t span() const { return std::max<int64_t>(PANEL, f_.block); }
    Grid & grid(int64_t column, int v) {
        return grids_[(size_t)(column / f_.group * CHUNK_VECTORS + v)];
    }
    Super & super(int64_t column, int v) {
        return supers_[(size_t)(column / f_.block * CHUNK_VECTORS + v)];
    }
    float * column(std::vector<float> & of, int64_t j, int v) {
        return of.data() + j * CHUNK + v * LANES;
    }
    void clear_work(int64_t n) { std::fill_n(work_.begin(), n * CHUNK, 0.0f); }

    // A block, or a panel where blocks are as small.
    void feed_back_span(int64_t first) {
        const float * unit = m_.unit() + first * m_.stride();
        const int64_t n = span();
        std::copy_n(column(targets_, first, 0), n * CHUNK, work_.begin());
        add_products(work_.data(), CHUNK, errors_.data(), CHUNK, unit, {m_.stride(), 1}, n, first,
                     -1.0f);
        if (f_.scales == Scales::super) {
            for (int v = 0; v < CHUNK_VECTORS; v++)
                super(first, v) = super_of(first, v);
        }
        for (int64_t j = 0; j < n; j += PANEL) {
            add_products(work_.data() + j * CHUNK, CHUNK, column(errors_, first, 0), CHUNK,
                         unit + j * m_.stride() + first, {m_.stride(), 1}, PANEL, j, -1.0f);
            for (int v = 0; v < CHUNK_VECTORS; v++) {
                for (int64_t k = j; k < j + PANEL; k += f_.group)
                    feed_back_group(first, j + PANEL, k, v);
            }
        }
    }

    Super super_of(int64_t first, int v) {
        Grid grids[MAX_BLOCK / 16];
        for (int i = 0; i < f_.groups_per_block(); i++) {
            const int64_t j = i * f_.group;
            grids[i] =
                fit_grid(f_, nullptr, column(work_, j, v), CHUNK, m_.pivots().data() + first + j);
        }
        return fit_super(f_, grids);
    }

    // Codes of the group at `begin`; what it gets wrong goes to the columns before `end`, both
    // counted from `first` on, where the work begins.
    void feed_back_group(int64_t first, int64_t end, int64_t begin, int v) {
        const int64_t at = first + begin;
        const Grid g =
            fit_grid(f_, &super(at, v), column(work_, begin, v), CHUNK, m_.pivots().data() + at);
        grid(at, v) = g;
        const V factor = inverse(g.s);
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const V wanted = load(column(work_, j, v));
            const V code = nearest_code<TABLE>(f_, (wanted - g.m) * factor);
            const V value = fma(g.s, code, g.m), miss = value - wanted;
            const V error = value - load(column(targets_, first + j, v));
            store(column(codes_, first + j, v), code);
            store(column(errors_, first + j, v), error);
            error_ = fma(splat(m_.pivots()[(size_t)(first + j)]) * miss, miss, error_);
            const float * unit = m_.unit() + first + j;
            for (int64_t k = j + 1; k < end; k++) {
                float * to = column(work_, k, v);
                store(to, fma(splat(-unit[(first + k) * m_.stride()]), error, load(to)));
            }
        }
    }

    // Each code of the group at `begin`, while all others stay. work_ holds half the gradient of
    // the error by the weights of the panel at `first`.
    void sweep_codes(int64_t first, int64_t begin, int v) {
        const Grid g = grid(begin, v);
        const V factor = inverse(g.s);
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const float * row = m_.second() + j * m_.stride();
            const V code = load(column(codes_, j, v)), gradient = load(column(work_, j - first, v));
            const V better =
                nearest_code<TABLE>(f_, fma(splat(-1.0f / row[j]) * gradient, factor, code));
            const V change = (better - code) * g.s;
            gain_ -= change * fma(change, splat(row[j]), 2.0f * gradient);
            store(column(codes_, j, v), better);
            move(first, j, v, change, row);
        }
    }

    // A weight moves by `change`: so do its error and the panel's gradient.
    void move(int64_t first, int64_t j, int v, V change, const float * row) {
        float * error = column(errors_, j, v);
        store(error, load(error) + change);
        for (int64_t k = 0; k < PANEL; k++) {
            float * to = column(work_, k, v);
            store(to, fma(change, splat(row[first + k]), load(to)));
        }
    }

    // Scale and minimum of the group at `begin`, while its codes stay.
    void sweep_grid(int64_t first, int64_t begin, int v) {
        // Of a change ds, dm: error += 2 (ds xg + dm g) + ds² xx + 2 ds dm x1 + dm² one.
        V xx{}, x1{}, xg{}, g{};
        float one = 0;
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const float * row = m_.second() + j * m_.stride() + begin;
            const V code = load(column(codes_, j, v)), gradient = load(column(work_, j - first, v));
            V product{};
            float sum = 0;
            for (int64_t k = 0; k < f_.group; k++) {
                product = fma(splat(row[k]), load(column(codes_, begin + k, v)), product);
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
        grid(begin, v) = best;
        for (int64_t j = begin; j < begin + f_.group; j++) {
            const V change = fma(best.s - old.s, load(column(codes_, j, v)), best.m - old.m);
            move(first, j, v, change, m_.second() + j * m_.stride());
        }
    }

    Block block_of(int64_t i, int lane) const {
        const int v = lane / LANES, at = lane % LANES;
        Block b{};
        const int64_t first = i * f_.block;
        for (int64_t j = 0; j < f_.block; j++) {
            const float code = codes_[(size_t)((first + j) * CHUNK + lane)];
            b.codes[j] = TABLE ? (int)(std::find(f_.table, f_.table + f_.n_codes, code) - f_.table)
                               : (int)(code - f_.low);
        }
        const Grid * grids = grids_.data() + first / f_.group * CHUNK_VECTORS + v;
        if (f_.scales != Scales::super) {
            b.d = grids->s[at];
            b.m = grids->m[at];
            return b;
        }
        const Super & super = supers_[(size_t)(i * CHUNK_VECTORS + v)];
        b.d = super.d[at];
        b.m = super.dmin[at];
        for (int k = 0; k < f_.groups_per_block(); k++, grids += CHUNK_VECTORS) {
            b.scales[k] = b.d == 0 ? 0 : (int)std::lround(grids->s[at] / b.d);
            b.mins[k] = b.m == 0 ? 0 : (int)std::lround(-grids->m[at] / b.m);
        }
        return b;
    }

    const Moments & m_;
    const Format & f_;
    const int64_t n_;
    std::vector<float> targets_, errors_, codes_;
    std::vector<Grid> grids_;
    std::vector<Super> supers_;
    std::vector<float> work_;
    V error_{}, gain_{};
};

template <bool TABLE>
OutputError quantize_as(const Moments & m, const Format & f, const float * targets, int64_t n_rows,
                        int sweeps, uint8_t * blocks) {
    const int64_t chunks = (n_rows + CHUNK - 1) / CHUNK;
    const int64_t row_bytes = (int64_t)ggml_row_size(f.type, m.n());
    // Summed in order, whichever thread was first.
    std::vector<OutputError> errors((size_t)chunks);
    for_pieces(m.n_threads(), chunks, m.cancelled(), [&](int64_t i) {
        Chunk<TABLE> chunk(m, f);
        load_chunk(targets, m.n(), n_rows, i * CHUNK, chunk.targets());
        OutputError & error = errors[(size_t)i];
        error.fed_back = error.swept = chunk.feed_back();
        for (int k = 0; k < sweeps; k++)
            error.swept -= chunk.sweep();
        chunk.pack(n_rows - i * CHUNK, row_bytes, blocks + i * CHUNK * row_bytes);
    });
    OutputError sum;
    for (const OutputError & error : errors) {
        sum.fed_back += error.fed_back;
        sum.swept += error.swept;
    }
    return sum;
}

} // namespace

void find_targets(const Moments & m, const float * w, int64_t n_rows, float * out) {
    require(m.factored(), ErrorKind::input, "moments are factored first");
    const int64_t n = m.n(), size = n * CHUNK;
    for_pieces(m.n_threads(), (n_rows + CHUNK - 1) / CHUNK, m.cancelled(), [&](int64_t i) {
        std::vector<float> weights((size_t)size), change((size_t)size);
        load_chunk(w, n, n_rows, i * CHUNK, weights.data());
        add_products(change.data(), CHUNK, weights.data(), CHUNK, m.cross(), {m.stride(), 1}, n, n,
                     1.0f);
        solve(m, change.data());
        for (int64_t j = 0; j < size; j++)
            weights[(size_t)j] += change[(size_t)j];
        store_chunk(weights.data(), n, n_rows, i * CHUNK, out);
    });
}

OutputError quantize(const Moments & m, const Format & f, const float * targets, int64_t n_rows,
                     int sweeps, uint8_t * blocks) {
    require(m.factored(), ErrorKind::input, "moments are factored first");
    require(m.n() % f.block == 0, ErrorKind::input,
            std::string("rows are not whole blocks of ") + ggml_type_name(f.type));
    return f.table != nullptr ? quantize_as<true>(m, f, targets, n_rows, sweeps, blocks)
                              : quantize_as<false>(m, f, targets, n_rows, sweeps, blocks);
}

} // namespace ggft
