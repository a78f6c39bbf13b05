#include "kernels_dequant.h"

#include "kernels_simd.h"

// AVX-512 dequantizers to BF16. A block of at most 5 bits per weight has at most 32 distinct values:
// they are computed once per block as a table of BF16, and one word permute looks up 32 weights.
// Block layouts: ggml's quantized formats, as documented by its reference dequantizers.

namespace ggft {

#if defined(GGFT_BF16_DOT)
namespace {

GGFT_INLINE float half(const uint8_t* p) { return _cvtsh_ss(load_as<uint16_t>(p)); }

GGFT_INLINE __m512 iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/// 32 table indices: the low nibbles of 16 bytes, then the high ones. Bit 4 of the low ones is
/// whatever the byte has there; 16-entry tables are stored twice so that it does not matter.
GGFT_INLINE __m512i nibbles(__m256i words) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
}
GGFT_INLINE __m256i words16(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
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

GGFT_INLINE void put(uint16_t* out, __m512i bf16) { _mm512_storeu_si512(out, bf16); }
GGFT_INLINE void put(uint16_t* out, __m512 low, __m512 high) {
    put(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
GGFT_INLINE __m512 floats(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
GGFT_INLINE __m512 floats(__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

void dequant_f32_row(const void* blocks, int64_t n, uint16_t* out) {
    const float* x = (const float*)blocks;
    for (int64_t i = 0; i < n; i++) out[i] = to_bf16(x[i]);
}

void dequant_f16(const void* blocks, int64_t n, uint16_t* out) {
    const uint16_t* x = (const uint16_t*)blocks;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        put(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))),
            _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i + 16))));
    }
    for (; i < n; i++) out[i] = to_bf16(_cvtsh_ss(x[i]));
}

void dequant_copy(const void* blocks, int64_t n, uint16_t* out) {
    std::memcpy(out, blocks, (size_t)n * 2);
}

void dequant_q4_0(const void* blocks, int64_t n, uint16_t* out) {  // f16 d, 16 nibble pairs
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 18) {
        const float d = half(b);
        put(out + i, _mm512_permutexvar_epi16(nibbles(words16(b + 2)), table16(d, -8 * d)));
    }
}

void dequant_q4_1(const void* blocks, int64_t n, uint16_t* out) {  // f16 d, f16 m, nibbles
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 20) {
        put(out + i,
            _mm512_permutexvar_epi16(nibbles(words16(b + 4)), table16(half(b), half(b + 2))));
    }
}

/// 32 five-bit indices: nibbles of 16 bytes and bit i of `high` as the fifth bit of element i.
GGFT_INLINE __m512i fives(const uint8_t* qs, uint32_t high) {
    const __m512i low = _mm512_and_si512(nibbles(words16(qs)), _mm512_set1_epi16(15));
    return _mm512_or_si512(low, _mm512_maskz_mov_epi16(high, _mm512_set1_epi16(16)));
}

void dequant_q5_0(const void* blocks, int64_t n, uint16_t* out) {  // f16 d, u32 high bits, nibbles
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 22) {
        const float d = half(b);
        const __m512i q = fives(b + 6, load_as<uint32_t>(b + 2));
        put(out + i, _mm512_permutexvar_epi16(q, table32(d, -16 * d)));
    }
}

void dequant_q5_1(const void* blocks, int64_t n, uint16_t* out) {  // d, m, u32 high bits, nibbles
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 24) {
        const __m512i q = fives(b + 8, load_as<uint32_t>(b + 4));
        put(out + i, _mm512_permutexvar_epi16(q, table32(half(b), half(b + 2))));
    }
}

void dequant_q8_0(const void* blocks, int64_t n, uint16_t* out) {  // f16 d, 32 signed bytes
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 34) {
        const __m512 d = _mm512_set1_ps(half(b));
        put(out + i, _mm512_mul_ps(floats((const int8_t*)b + 2), d),
            _mm512_mul_ps(floats((const int8_t*)b + 18), d));
    }
}

void dequant_iq4_nl(const void* blocks, int64_t n, uint16_t* out) {  // f16 d, nibbles of a codebook
    const __m512 values = _mm512_setr_ps(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38,
                                         53, 69, 89, 113);
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 32, b += 18) {
        const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(half(b)));
        const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
        put(out + i, _mm512_permutexvar_epi16(nibbles(words16(b + 2)), table));
    }
}

/// The 8 six-bit (scale, min) pairs of a Q4_K or Q5_K superblock from its 12 bytes.
struct Scales {
    uint8_t scale[8], min[8];
};
GGFT_INLINE Scales k_scales(const uint8_t* p) {
    const uint32_t a = load_as<uint32_t>(p), b = load_as<uint32_t>(p + 4),
                   c = load_as<uint32_t>(p + 8);
    const uint32_t words[4] = {
        a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u), b & 0x3f3f3f3fu,
        ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u)};
    return load_as<Scales>(words);
}

void dequant_q4_k(const void* blocks, int64_t n, uint16_t* out) {  // d, dmin, 12 scales, 128 nibbles
    const uint8_t* b = (const uint8_t*)blocks;
    for (int64_t i = 0; i < n; i += 256, b += 144) {
        const float d = half(b), dmin = half(b + 2);
        const Scales s = k_scales(b + 4);
        for (int j = 0; j < 4; j++) {  // 32 bytes: 32 low nibbles of one group, 32 high of the next
            const __m512i w =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(b + 16 + 32 * j)));
            const __m512i low = table16(d * s.scale[2 * j], -dmin * s.min[2 * j]);
            const __m512i high = table16(d * s.scale[2 * j + 1], -dmin * s.min[2 * j + 1]);
            put(out + i + 64 * j, _mm512_permutexvar_epi16(w, low));
            put(out + i + 64 * j + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), high));
        }
    }
}

void dequant_q5_k(const void* blocks, int64_t n, uint16_t* out) {  // as Q4_K, 32 high-bit bytes
    const uint8_t* b = (const uint8_t*)blocks;
    const __m512i fifteen = _mm512_set1_epi16(15), sixteen = _mm512_set1_epi16(16);
    for (int64_t i = 0; i < n; i += 256, b += 176) {
        const float d = half(b), dmin = half(b + 2);
        const Scales s = k_scales(b + 4);
        const __m256i bits = _mm256_loadu_si256((const __m256i*)(b + 16));
        for (int j = 0; j < 4; j++) {
            const __m512i w =
                _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(b + 48 + 32 * j)));
            for (int h = 0; h < 2; h++) {
                const __mmask32 m = _mm256_test_epi8_mask(bits, _mm256_set1_epi8(1 << (2 * j + h)));
                const __m512i nibble =
                    _mm512_and_si512(h ? _mm512_srli_epi16(w, 4) : w, fifteen);
                const __m512i q = _mm512_or_si512(nibble, _mm512_maskz_mov_epi16(m, sixteen));
                const __m512i table = table32(d * s.scale[2 * j + h], -dmin * s.min[2 * j + h]);
                put(out + i + 64 * j + 32 * h, _mm512_permutexvar_epi16(q, table));
            }
        }
    }
}

/// 32 codes minus `bias`, times a scale for each half.
GGFT_INLINE void put_scaled(uint16_t* out, __m256i q, int bias, float first, float second) {
    const __m256i centred = _mm256_sub_epi8(q, _mm256_set1_epi8((char)bias));
    put(out, _mm512_mul_ps(floats(_mm256_castsi256_si128(centred)), _mm512_set1_ps(first)),
        _mm512_mul_ps(floats(_mm256_extracti128_si256(centred, 1)), _mm512_set1_ps(second)));
}

void dequant_q6_k(const void* blocks, int64_t n, uint16_t* out) {  // ql 128, qh 64, 16 i8 scales, d
    const uint8_t* b = (const uint8_t*)blocks;
    const __m256i low4 = _mm256_set1_epi8(15), high2 = _mm256_set1_epi8(0x30);
    for (int64_t i = 0; i < n; i += 256, b += 210) {
        const float d = half(b + 208);
        const int8_t* scale = (const int8_t*)b + 192;
        for (int h = 0; h < 2; h++) {  // each half: 64 bytes of ql and 32 of qh make 4 x 32 codes
            const __m256i ql0 = _mm256_loadu_si256((const __m256i*)(b + 64 * h));
            const __m256i ql1 = _mm256_loadu_si256((const __m256i*)(b + 64 * h + 32));
            const __m256i qh = _mm256_loadu_si256((const __m256i*)(b + 128 + 32 * h));
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
                const int8_t* sc = scale + 8 * h + 2 * j;
                put_scaled(out + i + 128 * h + 32 * j, code[j], 32, d * sc[0], d * sc[1]);
            }
        }
    }
}

}  // namespace

DequantBf16 fast_dequant_bf16(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return dequant_f32_row;
        case GGML_TYPE_F16: return dequant_f16;
        case GGML_TYPE_BF16: return dequant_copy;
        case GGML_TYPE_Q4_0: return dequant_q4_0;
        case GGML_TYPE_Q4_1: return dequant_q4_1;
        case GGML_TYPE_Q5_0: return dequant_q5_0;
        case GGML_TYPE_Q5_1: return dequant_q5_1;
        case GGML_TYPE_Q8_0: return dequant_q8_0;
        case GGML_TYPE_IQ4_NL: return dequant_iq4_nl;
        case GGML_TYPE_Q4_K: return dequant_q4_k;
        case GGML_TYPE_Q5_K: return dequant_q5_k;
        case GGML_TYPE_Q6_K: return dequant_q6_k;
        default: return nullptr;
    }
}
#else
DequantBf16 fast_dequant_bf16(ggml_type) { return nullptr; }
#endif

void dequant_f32(ggml_type type, const void* blocks, int64_t n, float* out) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, blocks, (size_t)n * 4);
    } else {
        ggml_get_type_traits(type)->to_float(blocks, out, n);
    }
}

void dequant_bf16(ggml_type type, const void* blocks, int64_t n, uint16_t* out) {
    if (const DequantBf16 fast = fast_dequant_bf16(type)) {
        fast(blocks, n, out);
        return;
    }
    const int64_t block = ggml_blck_size(type);
    float buffer[512];
    const int64_t chunk = block < 512 ? 512 / block * block : 512;
    for (int64_t i = 0; i < n; i += chunk) {
        const int64_t m = n - i < chunk ? n - i : chunk;
        dequant_f32(type, (const char*)blocks + (size_t)(i / block) * ggml_type_size(type), m,
                    buffer);
        for (int64_t j = 0; j < m; j++) out[i + j] = to_bf16(buffer[j]);
    }
}

}  // namespace ggft
