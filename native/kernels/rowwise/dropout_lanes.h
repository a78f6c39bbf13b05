// The dropout mask (kernels/rowwise/dropout.h), a vector at a time.
#pragma once

#include "kernels/isa/vector.h"
#include "kernels/rowwise/dropout.h"

namespace ggft::GGFT_ISA_NAMESPACE {

/// The factors of LANES columns from `column` on.
GGFT_INLINE V dropout_factors(uint32_t row_key, int64_t column, int32_t threshold, V kept) {
    const VU columns = (VU)lane_numbers() + (uint32_t)column;
    const VU hash = dropout_hash(columns * 0x9e3779b1u + row_key) >> 8;
    return select((VI)hash >= threshold, kept, V{});
}

} // namespace ggft::GGFT_ISA_NAMESPACE
