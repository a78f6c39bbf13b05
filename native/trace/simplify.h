// What training needs otherwise than inference, as changes of a recorded tape: caches are read back
// where they were written from, and only the rows that are trained reach the output matrix.
#pragma once

#include "trace/tape.h"

#include <vector>

namespace ggft {

// A mask without the columns of unwritten cache rows.
struct MaskInput {
    int leaf;   // llama.cpp's mask, [n_kv, tokens]
    int tensor; // F32 [tokens, tokens]
};

// The K/V caches hold a micro-batch's own rows, written once from empty: reading them is reading
// what was written, so that every view of a cache becomes one of the keys and values themselves.
// Throws Error(input) that names what else reads a cache.
std::vector<MaskInput> bypass_caches(Tape & tape, int64_t n_tokens);

// A token that sees later ones has nothing to predict: throws Error(input) if the first one of the
// tape's does. The masks' data must still be there.
void require_causal(const Tape & tape, const std::vector<MaskInput> & masks);

// The input that picks the rows whose logits are asked for, -1 if the graph has none.
int find_output_ids(const Tape & tape, int64_t n_outputs);

// Whether `n` rows can be told from every other size of the graph.
bool is_distinct(const Tape & tape, int output_ids, int64_t n);

// Replaces the number of output rows, which is_distinct, by another.
void resize_outputs(Tape & tape, int output_ids, int64_t from, int64_t to);

// Drops nodes that the logits do not depend on.
void drop_dead(Tape & tape);

} // namespace ggft
