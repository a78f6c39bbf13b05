// NEON of 64-bit ARM: 4 lanes.
#pragma once

#include <arm_neon.h>

#include "kernels/isa/formats.h"

#define GGFT_LANES 4
#include "kernels/isa/portable.h"

namespace ggft::GGFT_ISA_NAMESPACE {

inline constexpr bool HAS_BF16 = false, HAS_I16 = false, WINOGRAD = false, HAS_BF16_TABLES = false;
inline constexpr Format FAST = Format::f32;
// Of 32 registers: compilers load all rows' words early, 16 + 2 + 8.
inline constexpr int MR = 8, NV = 2, LORA_RANKS = 8, TILE_COLUMNS = 8;
inline constexpr int64_t GROUP_WORDS = 192 << 10;

GGFT_INLINE V fma(V a, V b, V c) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

using namespace portable;

} // namespace ggft::GGFT_ISA_NAMESPACE
