#include "calibrate/quantizer.h"

#include "calibrate/pack.h"
#include "calibrate/threads.h"

#include <algorithm>
#include <cmath>

namespace ggft {

namespace {

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

// CHUNK rows on their way to blocks.
class Chunk {
public:
    Chunk(const Moments & moments, const BlockFormat & format)
        : m_(moments), f_(format), n_(moments.n()), columns_((size_t)(3 * n_ * CHUNK)),
          grids_((size_t)(2 * n_ / format.group * CHUNK)),
          supers_((size_t)(2 * n_ / format.block * CHUNK)), work_(MAX_BLOCK * CHUNK) {
        float *const columns = columns_.data(), *const grids = grids_.data();
        memory_ = {columns,
                   columns + n_ * CHUNK,
                   columns + 2 * n_ * CHUNK,
                   grids,
                   grids + grids_.size() / 2,
                   supers_.data(),
                   supers_.data() + supers_.size() / 2,
                   work_.data()};
    }

    float * targets() { return memory_.targets; }
    double feed_back() { return m_.kernels().feed_back(m_.factored(), f_, memory_); }
    double sweep() { return m_.kernels().sweep(m_.factored(), f_, memory_); }

    void pack(int64_t n_rows, int64_t row_bytes, uint8_t * out) const {
        const int64_t bytes = (int64_t)ggml_type_size(f_.type);
        for (int lane = 0; lane < std::min<int64_t>(CHUNK, n_rows); lane++) {
            for (int64_t i = 0; i < n_ / f_.block; i++)
                pack_block(f_, block_of(i, lane), out + lane * row_bytes + i * bytes);
        }
    }

private:
    Block block_of(int64_t i, int lane) const {
        Block b{};
        const int64_t first = i * f_.block;
        for (int64_t j = 0; j < f_.block; j++) {
            const float code = memory_.codes[(first + j) * CHUNK + lane];
            b.codes[j] = f_.table
                             ? (int)(std::find(f_.table, f_.table + f_.n_codes, code) - f_.table)
                             : (int)(code - f_.low);
        }
        const float * s = memory_.s + first / f_.group * CHUNK + lane;
        const float * m = memory_.m + first / f_.group * CHUNK + lane;
        if (f_.scales != Scales::super) {
            b.d = *s;
            b.m = *m;
            return b;
        }
        b.d = memory_.d[i * CHUNK + lane];
        b.m = memory_.dmin[i * CHUNK + lane];
        for (int k = 0; k < f_.block / f_.group; k++, s += CHUNK, m += CHUNK) {
            b.scales[k] = b.d == 0 ? 0 : (int)std::lround(*s / b.d);
            b.mins[k] = b.m == 0 ? 0 : (int)std::lround(-*m / b.m);
        }
        return b;
    }

    const Moments & m_;
    const BlockFormat & f_;
    const int64_t n_;
    std::vector<float> columns_, grids_, supers_, work_;
    ChunkMemory memory_;
};

} // namespace

void find_targets(const Moments & m, const float * w, int64_t n_rows, float * out) {
    require(m.damping() > 0, ErrorKind::input, "moments are factored first");
    const int64_t n = m.n(), size = n * CHUNK;
    for_pieces(m.n_threads(), (n_rows + CHUNK - 1) / CHUNK, m.cancelled(), [&](int64_t i) {
        std::vector<float> weights((size_t)size), change((size_t)size);
        load_chunk(w, n, n_rows, i * CHUNK, weights.data());
        m.kernels().add_products(change.data(), CHUNK, weights.data(), CHUNK, m.cross(),
                                 {m.stride(), 1}, n, n, 1.0f);
        m.kernels().solve(m.factored(), change.data());
        for (int64_t j = 0; j < size; j++)
            weights[(size_t)j] += change[(size_t)j];
        store_chunk(weights.data(), n, n_rows, i * CHUNK, out);
    });
}

OutputError quantize(const Moments & m, const BlockFormat & f, const float * targets,
                     int64_t n_rows, int sweeps, uint8_t * blocks) {
    require(m.damping() > 0, ErrorKind::input, "moments are factored first");
    require(m.n() % f.block == 0, ErrorKind::input,
            std::string("rows are not whole blocks of ") + ggml_type_name(f.type));
    const int64_t chunks = (n_rows + CHUNK - 1) / CHUNK;
    const int64_t row_bytes = (int64_t)ggml_row_size(f.type, m.n());
    // Summed in order, whichever thread was first.
    std::vector<OutputError> errors((size_t)chunks);
    for_pieces(m.n_threads(), chunks, m.cancelled(), [&](int64_t i) {
        Chunk chunk(m, f);
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

} // namespace ggft
