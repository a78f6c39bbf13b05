// The inner loops of calibration: products with moments, and blocks of weights fitted to them. What
// they are for stands in calibrate/moments.h and calibrate/quantizer.h, which own all memory.
//
// Matrices whose rows stand side by side: column j of a chunk of rows is CHUNK floats, a row a
// lane. What differs from row to row (codes, scales) is then a vector, and what all rows share
// (moments, factors) a number that is spread over it. One thread each.
#pragma once

#include <cstdint>

#include "ggml.h"

namespace ggft {

inline constexpr int CHUNK = 48; // rows
inline constexpr int PANEL = 32; // columns that are worked on together
inline constexpr int MAX_BLOCK = 256;

// What s and m of a grid can be.
enum class Scales {
    half,  // 16-bit floats of the group's own
    super, // s a whole multiple of d, m one of -dmin, 16-bit floats that the groups of a block
           // share
    power, // a power of two; there is no minimum
};

// A block type of ggml as a grid: a weight is s * x + m, with a code x of its own, and a scale s
// and a minimum m that a group of neighbours shares.
struct BlockFormat {
    ggml_type type;
    Scales scales;
    int block, group;              // columns
    float low, high;               // codes: whole numbers from low to high, or those of the table
    float scale_low = 0;           // multiples of d, from scale_low
    float scale_high = 0;          // to scale_high
    float min_high = 0;            // multiples of -dmin, from 0
    bool has_min = false;          // else m is 0
    const float * table = nullptr; // codes in order
    int n_codes = 0;               // of the table
};

// How far apart numbers of b are: b(column, k).
struct Strides {
    int64_t column, k;
};

// Factored moments (calibrate/moments.h).
struct Factored {
    int64_t n, stride;
    const float *second, *unit, *pivots;
};

// CHUNK rows on their way to blocks, [column][CHUNK] or, of a group's and of a block's numbers,
// [group][CHUNK] and [block][CHUNK].
struct ChunkMemory {
    float *targets, *errors, *codes; // [n][CHUNK]
    float *s, *m;                    // of groups
    float *d, *dmin;                 // of blocks
    float * work;                    // [MAX_BLOCK][CHUNK]
};

struct CalibrateKernels {
    int tile_columns, tile_lanes;

    /// c[j][lane] += sum_k b[k][j] * a[k][lane] of tile_columns columns, `c_stride` apart, and
    /// tile_lanes lanes.
    void (*add_tile)(float * c, int64_t c_stride, const float * a, const float * b, int64_t depth);

    /// c[j][lane] += sign * sum_k b(j, k) * a[k][lane], j < n_columns, k < depth, of CHUNK lanes.
    /// n_columns is a multiple of tile_columns.
    void (*add_products)(float * c, int64_t c_stride, const float * a, int64_t a_stride,
                         const float * b, Strides at, int64_t n_columns, int64_t depth, float sign);

    /// chunk <- chunk second⁻¹, second = R Rᵀ.
    void (*solve)(const Factored & moments, float * chunk);

    /// Codes and grids of the targets by error feedback. Returns the error.
    double (*feed_back)(const Factored & moments, const BlockFormat & format,
                        const ChunkMemory & chunk);

    /// Each code, then each grid, the best while all others stay. Returns by how much the error
    /// falls.
    double (*sweep)(const Factored & moments, const BlockFormat & format,
                    const ChunkMemory & chunk);
};

} // namespace ggft
