// Linears with LoRA: weights dequantized in pieces, dropout as rows of a pool of masks.
#include "rules/portable.h"

#include <algorithm>

namespace ggft {

// Largest piece of a weight that is dequantized at once.
static constexpr int64_t SCRATCH_ELEMENTS = 16 << 20;

static int64_t rows_per_piece(Tensor w) {
    return std::clamp<int64_t>(SCRATCH_ELEMENTS / w->ne[0] / 64 * 64, 64,
                               std::max<int64_t>(64, w->ne[1]));
}

int64_t n_pieces(Tensor w) {
    return (w->ne[1] + rows_per_piece(w) - 1) / rows_per_piece(w);
}

// Dropout multiplies by rows gathered from a pool of random masks by random ids.
LinearInput GgmlOps::linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                                  std::vector<const LoraPair *> adapters) {
    LinearInput r;
    r.x = r.portable.dropped = x;
    r.adapters = std::move(adapters);
    if (!dropout || in.seed == 0 || in.portable.pool == nullptr) {
        return r;
    }
    ggml_context * c = g.ctx();
    Tensor pool = ggml_view_2d(c, in.portable.pool, x->ne[0], in.portable.pool->ne[1],
                               in.portable.pool->nb[1], 0);
    Tensor ids = ggml_view_1d(c, in.portable.pool_ids, in.N(),
                              (size_t)(id * in.pool_stride()) * sizeof(int32_t));
    r.portable.keep = ggml_get_rows(c, pool, ids);
    r.portable.dropped = ggml_mul(c, x, r.portable.keep);
    return r;
}

Tensor GgmlOps::dropped(Graph &, const LinearInput & in) {
    return in.portable.dropped;
}

Tensor GgmlOps::linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                       Tensor residual) {
    ggml_context * c = g.ctx();
    Tensor y = matmul(g, w.weight, in.x);
    if (w.bias != nullptr) {
        y = ggml_add(c, y, w.bias);
    }
    if (lora) {
        Tensor u = product(c, lora.a, in.portable.dropped);
        y = ggml_add(c, y, product(c, lora.b, ggml_scale(c, u, lora.scale)));
    }
    return add(g, y, residual);
}

// dB = s dy uᵀ, du = s Bᵀ dy, dA = du x̂ᵀ, dx = Wᵀ dy + keep * (Aᵀ du), with u = A x̂.
Tensor GgmlOps::linear_back(Graph & g, const Linear & w, const LoraPair & lora,
                            const LinearInput & in, Tensor dy, Tensor acc, bool need_dx) {
    ggml_context * c = g.ctx();
    Tensor du = nullptr;
    if (lora) {
        Tensor u = ggml_scale(c, product(c, lora.a, in.portable.dropped), lora.scale);
        g.expand(ggml_add_inplace(c, lora.db, product(c, transposed(g, u), transposed(g, dy))));
        du = ggml_scale(c, product(c, transposed(g, lora.b), dy), lora.scale);
        g.expand(ggml_add_inplace(
            c, lora.da, product(c, transposed(g, in.portable.dropped), transposed(g, du))));
    }
    if (!need_dx) {
        return acc;
    }
    Tensor dx = matmul_transposed(g, w.weight, dy);
    if (lora) {
        Tensor d = product(c, transposed(g, lora.a), du);
        dx = ggml_add(c, dx, in.portable.keep ? ggml_mul(c, d, in.portable.keep) : d);
    }
    return add(g, dx, acc);
}

// Rows [r0, r0+n) of W as F32 [C_in, n].
Tensor GgmlOps::dequantized(Graph & g, Tensor w, int64_t r0, int64_t n) const {
    ggml_context * c = g.ctx();
    if (w->type == GGML_TYPE_F32) {
        return ggml_view_2d(c, w, w->ne[0], n, w->nb[1], (size_t)r0 * w->nb[1]);
    }
    Tensor ids = ggml_view_1d(c, in_.portable.arange, n, (size_t)r0 * sizeof(int32_t));
    return ggml_get_rows(c, w, ids);
}

// W x. A GPU multiplies quantized weights by F32 activations; the CPU backend would quantize
// the activations, so there the weight is dequantized first.
Tensor GgmlOps::matmul(Graph & g, Tensor w, Tensor x) const {
    ggml_context * c = g.ctx();
    if (quantized_forward_ || w->type == GGML_TYPE_F32) {
        return product(c, w, x);
    }
    Tensor y = nullptr;
    const int64_t step = rows_per_piece(w);
    for (int64_t r = 0; r < w->ne[1]; r += step) {
        Tensor piece = dequantized(g, w, r, std::min(step, w->ne[1] - r));
        y = concat(g, y, product(c, piece, x), 0);
    }
    return y;
}

// Wᵀ dy as a GEMM over pieces of W's rows, each dequantized and transposed into scratch.
Tensor GgmlOps::matmul_transposed(Graph & g, Tensor w, Tensor dy) const {
    ggml_context * c = g.ctx();
    Tensor dx = nullptr;
    const int64_t step = rows_per_piece(w);
    for (int64_t r = 0; r < w->ne[1]; r += step) {
        const int64_t n = std::min(step, w->ne[1] - r);
        Tensor wt = ggml_transpose(c, dequantized(g, w, r, n));
        if (mode_ == Mode::fast) {
            wt = ggml_cpy(c, wt, ggml_new_tensor_2d(c, GGML_TYPE_F16, n, w->ne[0]));
        } else {
            wt = ggml_cont(c, wt);
        }
        Tensor part =
            n == dy->ne[0]
                ? dy
                : ggml_cont(c, ggml_view_2d(c, dy, n, dy->ne[1], dy->nb[1], (size_t)r * 4));
        dx = add(g, dx, product(c, wt, part));
    }
    return dx;
}

} // namespace ggft
