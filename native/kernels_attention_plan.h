// What attention's forward and backward pass share: the split of the work, tile layouts, packing.
#pragma once

#include <vector>

#include "kernels_attention.h"
#include "kernels_micro.h"

namespace ggft::attention_detail {

/// Rows of a tile row buffer: MAX_HEAD_SIZE or KEYS words, plus a cache line.
inline constexpr int STRIDE = 272;
inline constexpr int64_t KEYS = 256; // keys of a softmax block
inline constexpr int64_t ROWS = 96;  // query rows (token, head) of a block: pairs fill LANES

constexpr int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

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

/// Rows as tile rows of words, STRIDE apart.
void pack_tile_rows(bool bf16, const HeadRows & x, int64_t n_rows, uint32_t * out);

/// Panels with one column per row, reduction over D: [rows/NR][D/per][NR].
void pack_columns(bool bf16, const HeadRows & x, int64_t n_rows, uint32_t * out);

/// Panels with one column per element of D, reduction over rows: [D/NR][steps][NR].
void pack_depth(bool bf16, const HeadRows & x, int64_t n_rows, uint32_t * out);

/// Words per row of D (rounded up), and of D as columns (whole panels).
inline int64_t head_steps(bool bf16, int head_size) {
    return bf16 ? (head_size + 1) / 2 : head_size;
}
inline int64_t head_columns(int head_size) {
    return round_up(head_size, NR);
}

/// One thread's working memory, grown to `words` and kept.
uint32_t * scratch(size_t words);

} // namespace ggft::attention_detail
