// Dequantizers to BF16 with AVX-512. A block of at most 5 bits per weight has at most 32 distinct
// values: they are computed once per block as a table of BF16, and one word permute looks up 32
// weights. Block layouts: ggml's quantized formats, as documented by its reference dequantizers.
#include "kernels/dequant/dequant.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

GGFT_INLINE float half(const uint8_t * p) {
    return _cvtsh_ss(load_as<uint16_t>(p));
}

GGFT_INLINE __m512 iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/// 32 table indices: the low nibbles of 16 bytes, then the high ones. Bit 4 of the low ones is
/// whatever the byte has there; 16-entry tables are stored twice so that it does not matter.
GGFT_INLINE __m512i nibbles(__m256i words) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
}
GGFT_INLINE __m256i words16(const uint8_t * p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
}

/// scale * i + offset for i = 0..15, as BF16, twice.
GGFT_INLINE __m512i table16(float scale, float offset) {
    const __m512 v = _mm512_fmadd_ps(iota(), _mm512_set1_ps(scale), _mm512_set1_ps(offset));
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
    return _mm512_broadcast_i64x4(half);
}

/// scale * i + offset for i = 0..31, as BF16.
GGFT_INLINE __m512i table32(float scale, float offset) {
    const __m512 s = _mm512_set1_ps(scale), o = _mm512_set1_ps(offset);
    const __m512 high = _mm512_add_ps(iota(), _mm512_set1_ps(16));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high, s, o), _mm512_fmadd_ps(iota(), s, o));
}

GGFT_INLINE void put(uint16_t * out, __m512i bf16) {
    _mm512_storeu_si512(out, bf16);
}
GGFT_INLINE void put(uint16_t * out, __m512 low, __m512 high) {
    put(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
GGFT_INLINE __m512 floats(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
GGFT_INLINE __m512 floats(__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

void dequant_f32_row(const void * blocks, int64_t n, uint16_t * out) {
    const float * x = (const float *)blocks;
    for (int64_t i = 0; i < n; i++)
        out[i] = to_bf16(x[i]);
}

void dequant_f16(const void * blocks, int64_t n, uint16_t * out) {
    const uint16_t * x = (const uint16_t *)blocks;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        put(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i))),
            _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i + 16))));
    }
    for (; i < n; i++)
        out[i] = to_bf16(_cvtsh_ss(x[i]));
}

void dequant_copy(const void * blocks, int64_t n, uint16_t * out) {
    std::memcpy(out, blocks, (size_t)n * 2);
}

void dequant_q4_0(const void * blocks, int64_t n, uint16_t * out) { // f16 d, 16 nibble pairs
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 18) {
        const float d = half(b);
        put(out + i, _mm512_permutexvar_epi16(nibbles(words16(b + 2)), table16(d, -8 * d)));
    }
}

void dequant_q4_1(const void * blocks, int64_t n, uint16_t * out) { // f16 d, f16 m, nibbles
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 20) {
        put(out + i,
            _mm512_permutexvar_epi16(nibbles(words16(b + 4)), table16(half(b), half(b + 2))));
    }
}

/// 32 five-bit indices: nibbles of 16 bytes and bit i of `high` as the fifth bit of element i.
GGFT_INLINE __m512i fives(const uint8_t * qs, uint32_t high) {
    const __m512i low = _mm512_and_si512(nibbles(words16(qs)), _mm512_set1_epi16(15));
    return _mm512_or_si512(low, _mm512_maskz_mov_epi16(high, _mm512_set1_epi16(16)));
}

void dequant_q5_0(const void * blocks, int64_t n, uint16_t * out) { // f16 d, u32 high bits, nibbles
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 22) {
        const float d = half(b);
        const __m512i q = fives(b + 6, load_as<uint32_t>(b + 2));
        put(out + i, _mm512_permutexvar_epi16(q, table32(d, -16 * d)));
    }
}

void dequant_q5_1(const void * blocks, int64_t n, uint16_t * out) { // d, m, u32 high bits, nibbles
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 24) {
        const __m512i q = fives(b + 8, load_as<uint32_t>(b + 4));
        put(out + i, _mm512_permutexvar_epi16(q, table32(half(b), half(b + 2))));
    }
}

void dequant_q8_0(const void * blocks, int64_t n, uint16_t * out) { // f16 d, 32 signed bytes
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 34) {
        const __m512 d = _mm512_set1_ps(half(b));
        put(out + i, _mm512_mul_ps(floats((const int8_t *)b + 2), d),
            _mm512_mul_ps(floats((const int8_t *)b + 18), d));
    }
}

/// The 16 values of the IQ4 codebook times a scale, as BF16, twice.
GGFT_INLINE __m512i codebook(float scale) {
    const __m512 values =
        _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
}

void dequant_iq4_nl(const void * blocks, int64_t n, uint16_t * out) { // f16 d, codebook nibbles
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 18) {
        put(out + i, _mm512_permutexvar_epi16(nibbles(words16(b + 2)), codebook(half(b))));
    }
}

void dequant_q4_k(const void * blocks, int64_t n,
                  uint16_t * out) { // d, dmin, 12 scales, 128 nibbles
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 256, b += 144) {
        const float d = half(b), dmin = half(b + 2);
        const KScales s = k_scales(b + 4);
        for (int j = 0; j < 4; j++) { // 32 bytes: 32 low nibbles of one group, 32 high of the next
            const __m512i w =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(b + 16 + 32 * j)));
            const __m512i low = table16(d * s.scale[2 * j], -dmin * s.min[2 * j]);
            const __m512i high = table16(d * s.scale[2 * j + 1], -dmin * s.min[2 * j + 1]);
            put(out + i + 64 * j, _mm512_permutexvar_epi16(w, low));
            put(out + i + 64 * j + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), high));
        }
    }
}

void dequant_q5_k(const void * blocks, int64_t n, uint16_t * out) { // as Q4_K, 32 high-bit bytes
    const uint8_t * b = (const uint8_t *)blocks;
    const __m512i fifteen = _mm512_set1_epi16(15), sixteen = _mm512_set1_epi16(16);
    for (int64_t i = 0; i < n; i += 256, b += 176) {
        const float d = half(b), dmin = half(b + 2);
        const KScales s = k_scales(b + 4);
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(b + 16));
        for (int j = 0; j < 4; j++) {
            const __m512i w =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(b + 48 + 32 * j)));
            for (int h = 0; h < 2; h++) {
                const __mmask32 m = _mm256_test_epi8_mask(bits, _mm256_set1_epi8(1 << (2 * j + h)));
                const __m512i nibble = _mm512_and_si512(h ? _mm512_srli_epi16(w, 4) : w, fifteen);
                const __m512i q = _mm512_or_si512(nibble, _mm512_maskz_mov_epi16(m, sixteen));
                const __m512i table = table32(d * s.scale[2 * j + h], -dmin * s.min[2 * j + h]);
                put(out + i + 64 * j + 32 * h, _mm512_permutexvar_epi16(q, table));
            }
        }
    }
}

/// 32 codes minus `bias`, times a scale for each half.
GGFT_INLINE void put_scaled(uint16_t * out, __m256i q, int bias, float first, float second) {
    const __m256i centred = _mm256_sub_epi8(q, _mm256_set1_epi8((char)bias));
    put(out, _mm512_mul_ps(floats(_mm256_castsi256_si128(centred)), _mm512_set1_ps(first)),
        _mm512_mul_ps(floats(_mm256_extracti128_si256(centred, 1)), _mm512_set1_ps(second)));
}

void dequant_q6_k(const void * blocks, int64_t n,
                  uint16_t * out) { // ql 128, qh 64, 16 i8 scales, d
    const uint8_t * b = (const uint8_t *)blocks;
    const __m256i low4 = _mm256_set1_epi8(15), high2 = _mm256_set1_epi8(0x30);
    for (int64_t i = 0; i < n; i += 256, b += 210) {
        const float d = half(b + 208);
        const int8_t * scale = (const int8_t *)b + 192;
        for (int h = 0; h < 2; h++) { // each half: 64 bytes of ql and 32 of qh make 4 x 32 codes
            const __m256i ql0 = _mm256_loadu_si256((const __m256i *)(b + 64 * h));
            const __m256i ql1 = _mm256_loadu_si256((const __m256i *)(b + 64 * h + 32));
            const __m256i qh = _mm256_loadu_si256((const __m256i *)(b + 128 + 32 * h));
            const __m256i code[4] = {
                _mm256_or_si256(_mm256_and_si256(ql0, low4),
                                _mm256_and_si256(_mm256_slli_epi16(qh, 4), high2)),
                _mm256_or_si256(_mm256_and_si256(ql1, low4),
                                _mm256_and_si256(_mm256_slli_epi16(qh, 2), high2)),
                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(ql0, 4), low4),
                                _mm256_and_si256(qh, high2)),
                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(ql1, 4), low4),
                                _mm256_and_si256(_mm256_srli_epi16(qh, 2), high2))};
            for (int j = 0; j < 4; j++) {
                const int8_t * sc = scale + 8 * h + 2 * j;
                put_scaled(out + i + 128 * h + 32 * j, code[j], 32, d * sc[0], d * sc[1]);
            }
        }
    }
}

/// 16 bytes as floats.
GGFT_INLINE __m512 unsigned_floats(__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

/// (lane / width) + first, for spreading one value per sub-block over its table entries.
GGFT_INLINE __m512i lane_over(int shift, int first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_srli_epi32(lane, (unsigned)shift), _mm512_set1_epi32(first));
}

/// Word lanes 16..31 get `step`, the others 0: the second sub-block of 32 elements.
GGFT_INLINE __m512i second_half(int step) {
    return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16((short)step), 1);
}

void dequant_q2_k(const void * blocks, int64_t n, uint16_t * out) { // 16 scale|min, 64 qs, d, dmin
    const uint8_t * b = (const uint8_t *)blocks;
    const __m128i low4 = _mm_set1_epi8(15);
    const __m512 level = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    for (int64_t i = 0; i < n; i += 256, b += 84) {
        const __m128i packed = _mm_loadu_si128((const __m128i *)b);
        const __m512 scale = _mm512_mul_ps(unsigned_floats(_mm_and_si128(packed, low4)),
                                           _mm512_set1_ps(half(b + 80)));
        const __m128i mins = _mm_and_si128(_mm_srli_epi16(packed, 4), low4);
        const __m512 min = _mm512_mul_ps(unsigned_floats(mins), _mm512_set1_ps(half(b + 82)));
        for (int h = 0; h < 2; h++) { // 128 elements: 8 sub-blocks of 4 levels are 32 values
            const __m512i first = lane_over(2, 8 * h), second = lane_over(2, 8 * h + 4);
            const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(
                _mm512_fmsub_ps(_mm512_permutexvar_ps(second, scale), level,
                                _mm512_permutexvar_ps(second, min)),
                _mm512_fmsub_ps(_mm512_permutexvar_ps(first, scale), level,
                                _mm512_permutexvar_ps(first, min)));
            const __m512i q =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(b + 16 + 32 * h)));
            for (int j = 0; j < 4; j++) {
                const __m512i two =
                    _mm512_and_si512(_mm512_srli_epi16(q, (unsigned)(2 * j)), _mm512_set1_epi16(3));
                const __m512i at = _mm512_add_epi16(_mm512_or_si512(two, second_half(4)),
                                                    _mm512_set1_epi16((short)(8 * j)));
                put(out + i + 128 * h + 32 * j, _mm512_permutexvar_epi16(at, table));
            }
        }
    }
}

/// The 16 six-bit scales of a Q3_K superblock, minus 32, from its 12 bytes.
GGFT_INLINE __m512 q3_scales(const uint8_t * p) {
    const uint32_t a = load_as<uint32_t>(p), b = load_as<uint32_t>(p + 4),
                   c = load_as<uint32_t>(p + 8);
    const __m128i bytes =
        _mm_setr_epi32((int)((a & 0x0f0f0f0fu) | ((c << 4) & 0x30303030u)),
                       (int)((b & 0x0f0f0f0fu) | ((c << 2) & 0x30303030u)),
                       (int)(((a >> 4) & 0x0f0f0f0fu) | (c & 0x30303030u)),
                       (int)(((b >> 4) & 0x0f0f0f0fu) | ((c >> 2) & 0x30303030u)));
    return _mm512_sub_ps(unsigned_floats(bytes), _mm512_set1_ps(32));
}

void dequant_q3_k(const void * blocks, int64_t n, uint16_t * out) { // 32 high bits, 64 qs, 12, d
    const uint8_t * b = (const uint8_t *)blocks;
    const __m512 level = _mm512_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -2, -1, 0, 1, 2, 3);
    for (int64_t i = 0; i < n; i += 256, b += 110) {
        const __m512 scale = _mm512_mul_ps(q3_scales(b + 96), _mm512_set1_ps(half(b + 108)));
        const __m256i high = _mm256_loadu_si256((const __m256i *)b);
        for (int g = 0; g < 8; g++) { // 32 elements: 2 sub-blocks of 8 levels are 16 values
            const __m512 values =
                _mm512_mul_ps(_mm512_permutexvar_ps(lane_over(3, 2 * g), scale), level);
            const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
            const __m512i q =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(b + 32 + g / 4 * 32)));
            const __m512i two = _mm512_and_si512(_mm512_srli_epi16(q, (unsigned)(2 * (g % 4))),
                                                 _mm512_set1_epi16(3));
            const __mmask32 m = _mm256_test_epi8_mask(high, _mm256_set1_epi8((char)(1 << g)));
            const __m512i three =
                _mm512_or_si512(two, _mm512_maskz_mov_epi16(m, _mm512_set1_epi16(4)));
            put(out + i + 32 * g,
                _mm512_permutexvar_epi16(_mm512_or_si512(three, second_half(8)), table));
        }
    }
}

void dequant_iq4_xs(const void * blocks, int64_t n, uint16_t * out) { // d, u16 high, 4 low, 128 qs
    const uint8_t * b = (const uint8_t *)blocks;
    for (int64_t i = 0; i < n; i += 256, b += 136) {
        const float d = half(b);
        const uint32_t high = load_as<uint16_t>(b + 2);
        for (int j = 0; j < 8; j++) {
            const int low = (b[4 + j / 2] >> (4 * (j % 2))) & 15;
            const int scale = (low | (int)((high >> (2 * j)) & 3) << 4) - 32;
            put(out + i + 32 * j, _mm512_permutexvar_epi16(nibbles(words16(b + 8 + 16 * j)),
                                                           codebook(d * (float)scale)));
        }
    }
}

} // namespace

DequantBf16 table_dequant_bf16(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return dequant_f32_row;
    case GGML_TYPE_F16:
        return dequant_f16;
    case GGML_TYPE_BF16:
        return dequant_copy;
    case GGML_TYPE_Q4_0:
        return dequant_q4_0;
    case GGML_TYPE_Q4_1:
        return dequant_q4_1;
    case GGML_TYPE_Q5_0:
        return dequant_q5_0;
    case GGML_TYPE_Q5_1:
        return dequant_q5_1;
    case GGML_TYPE_Q8_0:
        return dequant_q8_0;
    case GGML_TYPE_IQ4_NL:
        return dequant_iq4_nl;
    case GGML_TYPE_IQ4_XS:
        return dequant_iq4_xs;
    case GGML_TYPE_Q2_K:
        return dequant_q2_k;
    case GGML_TYPE_Q3_K:
        return dequant_q3_k;
    case GGML_TYPE_Q4_K:
        return dequant_q4_k;
    case GGML_TYPE_Q5_K:
        return dequant_q5_k;
    case GGML_TYPE_Q6_K:
        return dequant_q6_k;
    default:
        return nullptr;
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
