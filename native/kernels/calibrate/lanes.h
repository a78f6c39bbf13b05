// Products of a chunk of rows: register tiles.
#pragma once

#include "kernels/calibrate/calibrate.h"
#include "kernels/isa/vector.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr int CHUNK_VECTORS = CHUNK / LANES;

// Registers hold TILE_COLUMNS x TILE_VECTORS sums.
inline constexpr int TILE_VECTORS = 3, TILE_LANES = TILE_VECTORS * LANES;
static_assert(CHUNK % TILE_LANES == 0 && PANEL % TILE_COLUMNS == 0);

// sum_k b(j, k) * a[k][lane], j < TILE_COLUMNS, of TILE_LANES lanes; rows of a are `stride` apart.
// `put(j, v, sum)` takes the sums of column j and vector v.
template <class Put>
GGFT_INLINE void tile(const float * a, int64_t stride, const float * b, Strides at, int64_t depth,
                      Put put) {
    V sum[TILE_COLUMNS][TILE_VECTORS] = {};
    for (int64_t k = 0; k < depth; k++) {
        V x[TILE_VECTORS];
        GGFT_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            x[v] = load(a + k * stride + v * LANES);
        GGFT_UNROLL
        for (int j = 0; j < TILE_COLUMNS; j++) {
            const V y = splat(b[j * at.column + k * at.k]);
            GGFT_UNROLL
            for (int v = 0; v < TILE_VECTORS; v++)
                sum[j][v] = fma(y, x[v], sum[j][v]);
        }
    }
    GGFT_UNROLL
    for (int j = 0; j < TILE_COLUMNS; j++) {
        GGFT_UNROLL
        for (int v = 0; v < TILE_VECTORS; v++)
            put(j, v, sum[j][v]);
    }
}

/// c[j][lane] += sign * sum_k b(j, k) * a[k][lane], j < n_columns, k < depth, of CHUNK lanes.
/// n_columns is a multiple of TILE_COLUMNS.
inline void add_products(float * c, int64_t c_stride, const float * a, int64_t a_stride,
                         const float * b, Strides at, int64_t n_columns, int64_t depth,
                         float sign) {
    const int64_t step = 256; // of the depth: what of a and b is in the L1 cache together
    for (int64_t k = 0; k < depth; k += step) {
        const int64_t n = min(step, depth - k);
        for (int64_t j = 0; j < n_columns; j += TILE_COLUMNS) {
            for (int first = 0; first < CHUNK; first += TILE_LANES) {
                tile(a + k * a_stride + first, a_stride, b + j * at.column + k * at.k, at, n,
                     [&](int column, int v, V sum) {
                         float * to = c + (j + column) * c_stride + first + v * LANES;
                         store(to, fma(splat(sign), sum, load(to)));
                     });
            }
        }
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
