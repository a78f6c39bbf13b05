// Source: ggml-quants.c, quantize_row_*_ref; the structures are ggml-common.h's block_*.
#include "calibrate/pack.h"

#include <cmath>
#include <cstring>

namespace ggft {

namespace {

uint8_t * put_half(uint8_t * out, float x) {
    const ggml_fp16_t h = ggml_fp32_to_fp16(x);
    std::memcpy(out, &h, sizeof h);
    return out + sizeof h;
}

// 32 codes in 16 bytes: a code and the one 16 further.
uint8_t * put_nibbles(uint8_t * out, const int * codes) {
    for (int j = 0; j < 16; j++)
        out[j] = (uint8_t)((codes[j] & 15) | (codes[j + 16] & 15) << 4);
    return out + 16;
}

// The fifth bits of 32 codes.
uint8_t * put_fifth(uint8_t * out, const int * codes) {
    uint32_t bits = 0;
    for (int j = 0; j < 32; j++)
        bits |= (uint32_t)(codes[j] >> 4) << j;
    std::memcpy(out, &bits, sizeof bits);
    return out + sizeof bits;
}

// Two bits of 256 codes in 64 bytes: a code and those 32, 64 and 96 further.
uint8_t * put_pairs(uint8_t * out, const int * codes, int shift) {
    for (int j = 0; j < 256; j += 128) {
        for (int l = 0; l < 32; l++, out++) {
            *out = 0;
            for (int k = 0; k < 4; k++)
                *out |= (uint8_t)((codes[j + l + 32 * k] >> shift & 3) << 2 * k);
        }
    }
    return out;
}

// Low nibbles of 256 codes in 128 bytes, each 64 as a half and the one 32 further.
uint8_t * put_halves(uint8_t * out, const int * codes) {
    for (int j = 0; j < 256; j += 64) {
        for (int l = 0; l < 32; l++)
            *out++ = (uint8_t)((codes[j + l] & 15) | (codes[j + l + 32] & 15) << 4);
    }
    return out;
}

// Eight pairs of six bits, as Q4_K and Q5_K hold scales and minima.
uint8_t * put_scales_and_mins(uint8_t * out, const Block & b) {
    std::memset(out, 0, 12);
    for (int j = 0; j < 8; j++) {
        const int s = b.scales[j], m = b.mins[j];
        if (j < 4) {
            out[j] |= (uint8_t)s;
            out[j + 4] |= (uint8_t)m;
        } else {
            out[j + 4] = (uint8_t)((s & 15) | (m & 15) << 4);
            out[j - 4] |= (uint8_t)(s >> 4 << 6);
            out[j] |= (uint8_t)(m >> 4 << 6);
        }
    }
    return out + 12;
}

void pack_q2_k(const Block & b, uint8_t * out) {
    for (int j = 0; j < 16; j++)
        *out++ = (uint8_t)(b.scales[j] | b.mins[j] << 4);
    out = put_pairs(out, b.codes, 0);
    put_half(put_half(out, b.d), b.m);
}

void pack_q3_k(const Block & b, uint8_t * out) {
    std::memset(out, 0, 32);
    for (int j = 0; j < 256; j++)
        out[j % 32] |= (uint8_t)(b.codes[j] >> 2 << j / 32);
    out = put_pairs(out + 32, b.codes, 0);
    std::memset(out, 0, 12);
    for (int j = 0; j < 16; j++) {
        const int scale = b.scales[j] + 32;
        out[j % 8] |= (uint8_t)((scale & 15) << (j < 8 ? 0 : 4));
        out[8 + j % 4] |= (uint8_t)(scale >> 4 << 2 * (j / 4));
    }
    put_half(out + 12, b.d);
}

void pack_q5_k(const Block & b, uint8_t * out) {
    out = put_scales_and_mins(put_half(put_half(out, b.d), b.m), b);
    std::memset(out, 0, 32);
    for (int j = 0; j < 256; j++)
        out[j % 32] |= (uint8_t)(b.codes[j] >> 4 << j / 32);
    put_halves(out + 32, b.codes);
}

void pack_q6_k(const Block & b, uint8_t * out) {
    for (int j = 0; j < 256; j += 128) {
        for (int l = 0; l < 64; l++)
            *out++ = (uint8_t)((b.codes[j + l] & 15) | (b.codes[j + l + 64] & 15) << 4);
    }
    out = put_pairs(out, b.codes, 4);
    for (int j = 0; j < 16; j++)
        *out++ = (uint8_t)(int8_t)b.scales[j];
    put_half(out, b.d);
}

void pack_iq4_xs(const Block & b, uint8_t * out) {
    out = put_half(out, b.d);
    uint16_t high = 0;
    uint8_t low[4] = {};
    for (int j = 0; j < 8; j++) {
        const int scale = b.scales[j] + 32;
        low[j / 2] |= (uint8_t)((scale & 15) << 4 * (j % 2));
        high = (uint16_t)(high | scale >> 4 << 2 * j);
    }
    std::memcpy(out, &high, sizeof high);
    std::memcpy(out + 2, low, sizeof low);
    out += 6;
    for (int j = 0; j < 8; j++)
        out = put_nibbles(out, b.codes + 32 * j);
}

// Places in the table are in order of value; ggml's have the sign in the fourth bit.
void pack_mxfp4(const Block & b, uint8_t * out) {
    int codes[32];
    for (int j = 0; j < 32; j++)
        codes[j] = b.codes[j] >= 7 ? b.codes[j] - 7 : 8 + 7 - b.codes[j];
    // A block's factor is half of the power.
    *out = (uint8_t)(std::ilogb(b.d) + 128);
    put_nibbles(out + 1, codes);
}

void pack_q8_0(const Block & b, uint8_t * out) {
    out = put_half(out, b.d);
    for (int j = 0; j < 32; j++)
        out[j] = (uint8_t)(int8_t)(b.codes[j] - 127);
}

} // namespace

void pack_block(const BlockFormat & f, const Block & b, uint8_t * out) {
    switch (f.type) {
    case GGML_TYPE_Q4_0:
    case GGML_TYPE_IQ4_NL:
        put_nibbles(put_half(out, b.d), b.codes);
        break;
    case GGML_TYPE_Q4_1:
        put_nibbles(put_half(put_half(out, b.d), b.m), b.codes);
        break;
    case GGML_TYPE_Q5_0:
        put_nibbles(put_fifth(put_half(out, b.d), b.codes), b.codes);
        break;
    case GGML_TYPE_Q5_1:
        put_nibbles(put_fifth(put_half(put_half(out, b.d), b.m), b.codes), b.codes);
        break;
    case GGML_TYPE_Q8_0:
        pack_q8_0(b, out);
        break;
    case GGML_TYPE_Q2_K:
        pack_q2_k(b, out);
        break;
    case GGML_TYPE_Q3_K:
        pack_q3_k(b, out);
        break;
    case GGML_TYPE_Q4_K:
        put_halves(put_scales_and_mins(put_half(put_half(out, b.d), b.m), b), b.codes);
        break;
    case GGML_TYPE_Q5_K:
        pack_q5_k(b, out);
        break;
    case GGML_TYPE_Q6_K:
        pack_q6_k(b, out);
        break;
    case GGML_TYPE_IQ4_XS:
        pack_iq4_xs(b, out);
        break;
    default:
        pack_mxfp4(b, out);
    }
}

} // namespace ggft
