#include "kernels/dequant/dequant.h"

namespace ggft::GGFT_ISA_NAMESPACE {

DequantBf16 fast_dequant_bf16([[maybe_unused]] ggml_type type) {
    if constexpr (HAS_BF16_TABLES)
        return table_dequant_bf16(type);
    else
        return nullptr;
}

void dequant_f32(ggml_type type, const void * blocks, int64_t n, float * out) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, blocks, (size_t)n * 4);
    } else if (const DequantF32 fast = fast_dequant_f32(type)) {
        fast(blocks, n, out);
    } else {
        ggml_get_type_traits(type)->to_float(blocks, out, n);
    }
}

void dequant_bf16(ggml_type type, const void * blocks, int64_t n, uint16_t * out) {
    if (const DequantBf16 fast = fast_dequant_bf16(type)) {
        fast(blocks, n, out);
        return;
    }
    const int64_t block = ggml_blck_size(type);
    float buffer[512];
    const int64_t chunk = block < 512 ? 512 / block * block : 512;
    for (int64_t i = 0; i < n; i += chunk) {
        const int64_t m = n - i < chunk ? n - i : chunk;
        dequant_f32(type, (const char *)blocks + (size_t)(i / block) * ggml_type_size(type), m,
                    buffer);
        for (int64_t j = 0; j < m; j++)
            out[i + j] = to_bf16(buffer[j]);
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
