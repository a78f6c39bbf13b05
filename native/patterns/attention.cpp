// Causal attention within each example, which never holds its scores.
#include "kernels/attention/attention.h"
#include "patterns/fused.h"

namespace ggft {

static AttentionShape attention_shape(const Inputs & in, const Qkv & x, float scale) {
    return {in.N(), (int)x.q->ne[1], (int)x.k->ne[1], (int)x.q->ne[0], scale, in.T};
}

// Rows of the result, one after the other: o [D, H, N], then the logsumexp of the scores [H,
// N].
Tensor FusedOps::attention(Graph & g, const Inputs & in, const Qkv & x, float scale) {
    const AttentionShape shape = attention_shape(in, x, scale);
    Tensor starts = in.fused.starts;
    const int64_t size = ggml_nelements(x.q);
    auto kernel = [=, &k = kernels_.attention, format = format_](Tensor y, int ith, int nth) {
        k.forward(format, shape, floats(x.q), floats(x.k), floats(x.v),
                  (const int32_t *)starts->data, floats(y), floats(y) + size, ith, nth);
    };
    return g.custom("attention", GGML_TYPE_F32, {size + shape.n_head * in.N()},
                    {x.q, x.k, x.v, starts}, kernel);
}

Tensor FusedOps::attention_out(Graph & g, Tensor attn, int64_t n_embd, int64_t n_tokens) {
    return ggml_view_2d(g.ctx(), attn, n_embd, n_tokens, (size_t)n_embd * sizeof(float), 0);
}

Qkv FusedOps::attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor attn, Tensor dout,
                             float scale) {
    ggml_context * c = g.ctx();
    const AttentionShape shape = attention_shape(in, x, scale);
    Tensor starts = in.fused.starts;
    const int64_t nq = ggml_nelements(x.q), nk = ggml_nelements(x.k);
    auto kernel = [=, &k = kernels_.attention, format = format_](Tensor d, int ith, int nth) {
        k.backward(format, shape, floats(x.q), floats(x.k), floats(x.v),
                   (const int32_t *)starts->data, floats(attn), floats(attn) + nq, floats(dout),
                   floats(d), floats(d) + nq, floats(d) + nq + nk, ith, nth);
    };
    Tensor d = g.custom("attention_back", GGML_TYPE_F32, {nq + 2 * nk},
                        {x.q, x.k, x.v, starts, attn, dout}, kernel);
    auto part = [&](Tensor like, int64_t at) {
        return ggml_view_3d(c, d, like->ne[0], like->ne[1], like->ne[2], like->nb[1], like->nb[2],
                            (size_t)at * sizeof(float));
    };
    return {part(x.q, 0), part(x.k, nq), part(x.v, nq + nk)};
}

} // namespace ggft
