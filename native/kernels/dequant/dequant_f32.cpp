// Vectorized dequantizers to F32 for the common types, written once for all instruction sets: with
// panels in F32 or 16-bit integers they are a visible part of a product's time. Block layouts:
// ggml's quantized formats, as documented by its reference dequantizers.
#include "kernels/dequant/dequant.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

GGFT_INLINE float half(const uint8_t * p) {
    return from_f16(load_as<uint16_t>(p));
}

GGFT_INLINE Bytes bytes(const uint8_t * p) {
    return load_as<Bytes>(p);
}
GGFT_INLINE VI integers(Bytes b) {
    return __builtin_convertvector(b, VI);
}
GGFT_INLINE V floats(VI x) {
    return __builtin_convertvector(x, V);
}
/// out = q * scale + offset for LANES codes.
GGFT_INLINE void put(float * out, VI q, float scale, float offset) {
    store(out, fma(floats(q), splat(scale), splat(offset)));
}

/// Blocks of 32: f16 scale, for MIN an f16 minimum, for FIVE 32 fifth bits, 16 nibble pairs.
template <bool MIN, bool FIVE> void dequant_nibbles(const void * blocks, int64_t n, float * out) {
    constexpr int AT = MIN ? 4 : 2, SIZE = AT + (FIVE ? 4 : 0) + 16;
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += SIZE, out += 32) {
        const float d = half(b), offset = MIN ? half(b + 2) : d * (FIVE ? -16 : -8);
        const uint8_t * codes = b + SIZE - 16;
        for (int j = 0; j < 16; j += LANES) {
            const Bytes pair = bytes(codes + j);
            VI low = integers(pair & 15), high = integers(pair >> 4);
            if (FIVE) {
                const VU bits = load_as<uint32_t>(b + AT) - VU{}, at = (VU)lane_numbers(j);
                low |= (VI)((bits >> at) << 4 & 16);
                high |= (VI)((bits >> (at + 12)) & 16);
            }
            put(out + j, low, d, offset);
            put(out + j + 16, high, d, offset);
        }
    }
}

void dequant_q8_0(const void * blocks, int64_t n, float * out) { // f16 d, 32 signed bytes
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 34, out += 32) {
        const V d = splat(half(b));
        for (int j = 0; j < 32; j += LANES) {
            const SignedBytes q = load_as<SignedBytes>(b + 2 + j);
            store(out + j, floats(__builtin_convertvector(q, VI)) * d);
        }
    }
}

/// Superblocks of 256: d, dmin, 12 bytes of scales, for FIVE 32 bytes of fifth bits, 128 nibbles.
template <bool FIVE> void dequant_q45_k(const void * blocks, int64_t n, float * out) {
    constexpr int SIZE = FIVE ? 176 : 144;
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 256, b += SIZE) {
        const float d = half(b), dmin = half(b + 2);
        const KScales s = k_scales(b + 4);
        for (int j = 0; j < 4; j++, out += 64) { // 32 bytes: a group's low nibbles, the next's high
            const uint8_t * codes = b + SIZE - 128 + 32 * j;
            const float scale[2] = {d * s.scale[2 * j], d * s.scale[2 * j + 1]};
            const float offset[2] = {-dmin * s.min[2 * j], -dmin * s.min[2 * j + 1]};
            for (int k = 0; k < 32; k += LANES) {
                const Bytes pair = bytes(codes + k);
                Bytes low = pair & 15, high = pair >> 4;
                if (FIVE) {
                    const Bytes bits = bytes(b + 16 + k) >> (uint8_t)(2 * j);
                    low |= (bits & 1) << 4;
                    high |= (bits & 2) << 3;
                }
                put(out + k, integers(low), scale[0], offset[0]);
                put(out + k + 32, integers(high), scale[1], offset[1]);
            }
        }
    }
}

void dequant_q6_k(const void * blocks, int64_t n, float * out) { // ql 128, qh 64, 16 i8 scales, d
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 256, b += 210) {
        const float d = half(b + 208);
        for (int h = 0; h < 2; h++, out += 128) { // 64 bytes of ql and 32 of qh: 4 x 32 codes
            const int8_t * scale = (const int8_t *)b + 192 + 8 * h;
            for (int k = 0; k < 32; k += LANES) {
                const Bytes first = bytes(b + 64 * h + k), second = bytes(b + 64 * h + 32 + k);
                const Bytes high = bytes(b + 128 + 32 * h + k);
                const Bytes code[4] = {
                    (first & 15) | ((high & 3) << 4), (second & 15) | ((high & 12) << 2),
                    (first >> 4) | (high & 48), (second >> 4) | ((high >> 2) & 48)};
                for (int j = 0; j < 4; j++) {
                    const float s = d * scale[2 * j + k / 16];
                    put(out + 32 * j + k, integers(code[j]), s, -32 * s);
                }
            }
        }
    }
}

void dequant_f16(const void * blocks, int64_t n, float * out) {
    f16_to_f32((const uint16_t *)blocks, n, out);
}

} // namespace

DequantF32 fast_dequant_f32(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F16:
        return dequant_f16;
    case GGML_TYPE_Q4_0:
        return dequant_nibbles<false, false>;
    case GGML_TYPE_Q4_1:
        return dequant_nibbles<true, false>;
    case GGML_TYPE_Q5_0:
        return dequant_nibbles<false, true>;
    case GGML_TYPE_Q5_1:
        return dequant_nibbles<true, true>;
    case GGML_TYPE_Q8_0:
        return dequant_q8_0;
    case GGML_TYPE_Q4_K:
        return dequant_q45_k<false>;
    case GGML_TYPE_Q5_K:
        return dequant_q45_k<true>;
    case GGML_TYPE_Q6_K:
        return dequant_q6_k;
    default:
        return nullptr;
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
