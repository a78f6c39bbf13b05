// Tile rows: activations as the register tiles read them.
#include "kernels/gemm/panels.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

/// n elements of a row of x from `at` on.
void row_floats(const Rows & x, int64_t at, int64_t n, float * out) {
    if (x.is_bf16)
        bf16_to_f32((const uint16_t *)x.data + at, n, out);
    else
        std::memcpy(out, (const float *)x.data + at, (size_t)n * 4);
}

void row_bf16(const Rows & x, int64_t at, int64_t n, uint16_t * out) {
    if (!x.is_bf16) {
        store_bf16_pairs(out, (const float *)x.data + at, n);
        return;
    }
    std::memcpy(out, (const uint16_t *)x.data + at, (size_t)n * 2);
    if (n % 2)
        out[n] = 0;
}

} // namespace

void pack_rows(Format format, const Rows & x, int64_t t0, int rows, int64_t k0, int64_t kc,
               uint32_t * out) {
    for (int i = 0; i < rows; i++, out += TILE_STRIDE) {
        const int64_t at = (t0 + i) * x.stride + k0;
        if (format == Format::bf16)
            row_bf16(x, at, kc, (uint16_t *)out);
        else
            row_floats(x, at, kc, (float *)out);
    }
}

RowPacking row_packing(int64_t chunk, int64_t depth) {
    const int64_t stride = tile_steps<I16>(chunk) > HALF_STRIDE ? TILE_STRIDE : HALF_STRIDE;
    const int64_t chunks = (depth + chunk - 1) / chunk;
    return {chunk, depth, stride, chunks * (stride + 2 * I16_BLOCKS)};
}

void pack_tokens(const RowPacking & packing, Rows x, int64_t n_tokens, void * out, int ith,
                 int nth) {
    const PackedRows packed = {packing, (uint32_t *)out, n_tokens};
    const Range part = split_range(n_tokens, 1, ith, nth);
    alignas(64) float values[2 * MAX_STEPS];
    for (int64_t k0 = 0; k0 < packing.depth; k0 += packing.chunk) {
        const int64_t n = min(packing.chunk, packing.depth - k0);
        for (int64_t t = part.first; t < part.last; t++) {
            const int64_t at = t * x.stride + k0;
            const float * from = (const float *)x.data + at;
            if (x.is_bf16) {
                row_floats(x, at, n, values);
                from = values;
            }
            quantize_with_pairs<I16>(from, n, I16::ROW_LIMIT, packed.words(t, k0),
                                     packed.scales(t, k0), packed.pairs(t, k0));
        }
    }
}

} // namespace ggft::GGFT_ISA_NAMESPACE
