// Plain C++, 4 lanes: what every machine can run, and the reference for the others. Products are
// compiled for every number format, so that each can be tested on any machine.
#pragma once

#include "kernels/isa/formats.h"

#define GGFT_LANES 4
#include "kernels/isa/portable.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr bool HAS_BF16 = true, HAS_I16 = true, WINOGRAD = false, HAS_BF16_TABLES = false;
inline constexpr Format FAST = Format::f32;
inline constexpr int MR = 4, NV = 2, LORA_RANKS = 8, TILE_COLUMNS = 4;
inline constexpr int64_t GROUP_WORDS = 96 << 10;

GGFT_INLINE V fma(V a, V b, V c) {
    return a * b + c;
}

using namespace portable;

} // namespace ggft::GGFT_ISA_NAMESPACE
