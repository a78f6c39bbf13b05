// What attention's forward and backward pass share: the split of the work, tile layouts, packing.
#pragma once

#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/gemm/panels.h"

namespace ggft::attention_detail {

/// Rows of a tile row buffer: MAX_HEAD_SIZE or KEYS words, plus a cache line.
inline constexpr int STRIDE = HALF_STRIDE;
inline constexpr int64_t KEYS = 256; // keys of a softmax block
inline constexpr int64_t I16_DEPTH = blocks_of(Format::i16_even).depth;
inline constexpr float I16_LIMIT = blocks_of(Format::i16_even).row_limit;
static_assert(I16_BLOCKS * I16_DEPTH >= KEYS && I16_BLOCKS * I16_DEPTH >= MAX_HEAD_SIZE);
inline constexpr int64_t ROWS = 96; // query rows (token, head) of a block: pairs fill LANES

/// Tokens [first, last) whose queries see no key outside, for one key-value head.
struct Unit {
    int64_t first, last;
    int head_kv;
    bool shared; // all threads work on it: query blocks b with b % nth == ith
};

/// Queries of consecutive tokens for consecutive heads of a unit: row r is token
/// first + r / heads, head head + r % heads.
struct QueryBlock {
    int64_t first, last;
    int head, heads;
    int64_t rows() const { return (last - first) * heads; }
};

/// This thread's units. Whole units go to the least loaded thread, longest first; one that would
/// leave a thread more than 5% over its share is worked on by all threads instead.
std::vector<Unit> plan_units(const AttentionShape & s, const int32_t * start, int ith, int nth);

/// The query blocks of a unit.
std::vector<QueryBlock> query_blocks(const AttentionShape & s, const Unit & unit);

/// Keys that each row of a block sees, relative to the unit: [first, last). Both never decrease.
void seen_keys(const QueryBlock & block, const int32_t * start, int64_t unit_first, Range * rows);

/// A set of head vectors: row i is at data + offset(i), D floats.
struct HeadRows {
    const float * data;
    int64_t token_stride;
    int heads; // 1, or the heads of a query block: row i is token i / heads
    int head_size;
    const float * row(int64_t i) const {
        return data + i / heads * token_stride + i % heads * head_size;
    }
};

/// Rows as tile rows of words, STRIDE apart, and for 16-bit integers their scales, I16_BLOCKS
/// apart.
void pack_tile_rows(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out,
                    float * scales);

/// Panels with one column per row, reduction over D: [rows/NR][panel_steps(D)][NR].
void pack_columns(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out);

/// Panels with one column per element of D, reduction over rows: [D/NR][panel_steps(rows)][NR].
void pack_depth(Format format, const HeadRows & x, int64_t n_rows, uint32_t * out);

/// Where a tile's reduction begins and how long it is: indices [from, to) of rows and panels, both
/// given from index 0 on. `from` is a multiple of per_word(format).
inline void reduce_over(Format format, TileArgs & g, const uint32_t * rows, const float * scales,
                        const uint32_t * panel, int64_t from, int64_t to) {
    const int64_t per = per_word(format);
    // Blocks of 16-bit integers are entered and left anywhere, but begin at their scales.
    const int64_t block = format == Format::i16_even ? from / I16_DEPTH : 0;
    const int64_t start = format == Format::i16_even ? block * I16_DEPTH : from;
    g.rows = rows + start / per;
    g.row_scales = scales + block;
    g.panel = panel + panel_steps(format, start) * NR;
    g.first_step = (int)((from - start) / per);
    g.steps = (int)((to - start + per - 1) / per);
}

/// D as columns: whole panels.
inline int64_t head_columns(int head_size) {
    return round_up(head_size, NR);
}

} // namespace ggft::attention_detail
