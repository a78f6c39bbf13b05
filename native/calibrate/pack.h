// Blocks of ggml's types from codes and scales.
#pragma once

#include "calibrate/format.h"

namespace ggft {

/// One block of one row.
struct Block {
    int codes[256];           // above the lowest; of a table, the place in it
    float d, m;               // scale and minimum, or d and dmin of a super-block
    int scales[16], mins[16]; // multiples of them, super-blocks only
};

/// Writes the bytes of a block.
void pack_block(const BlockFormat & f, const Block & block, uint8_t * out);

} // namespace ggft
