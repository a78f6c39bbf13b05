// Causal attention within each example: softmax over a mask, some heads at a time.
#include "rules/portable.h"

#include <algorithm>

namespace ggft {

// Attention scores that exist at once.
static constexpr int64_t SCORE_ELEMENTS = 8 << 20;

namespace {

struct Heads {
    Tensor q;    // [D, T, heads] of one row
    Tensor k, v; // [D, T, kv-heads]
};

} // namespace

static int64_t heads_per_piece(const Inputs & in, int64_t n_head, int64_t n_head_kv) {
    const int64_t group = n_head / n_head_kv;
    return std::clamp<int64_t>(SCORE_ELEMENTS / (in.T * in.T * group), 1, n_head_kv);
}

int64_t n_head_pieces(const Inputs & in, int64_t n_head, int64_t n_head_kv) {
    const int64_t step = heads_per_piece(in, n_head, n_head_kv);
    return (n_head_kv + step - 1) / step;
}

// Calls f(first kv-head, number) for pieces whose scores fit the scratch.
template <class F> static void for_heads(const Inputs & in, const Qkv & x, F f) {
    const int64_t K = x.k->ne[1], step = heads_per_piece(in, x.q->ne[1], K);
    for (int64_t k0 = 0; k0 < K; k0 += step) {
        f(k0, std::min(step, K - k0));
    }
}

// Row b, heads [h0, h0+n) of x [D, H, N] as [D, T, n].
static Tensor split_heads(Graph & g, const Inputs & in, Tensor x, int64_t b, int64_t h0,
                          int64_t n) {
    Tensor v = ggml_view_3d(g.ctx(), x, x->ne[0], n, in.T, x->nb[1], x->nb[2],
                            (size_t)(b * in.T) * x->nb[2] + (size_t)h0 * x->nb[1]);
    return ggml_permute(g.ctx(), v, 0, 2, 1, 3);
}

static Heads heads(Graph & g, const Inputs & in, const Qkv & x, int64_t b, int64_t k0, int64_t kn) {
    const int64_t group = x.q->ne[1] / x.k->ne[1];
    return {split_heads(g, in, x.q, b, k0 * group, kn * group), split_heads(g, in, x.k, b, k0, kn),
            ggml_cont(g.ctx(), split_heads(g, in, x.v, b, k0, kn))};
}

// [D, T, n] -> [D*n, T]
static Tensor merge_heads(Graph & g, Tensor x) {
    return ggml_cont_2d(g.ctx(), ggml_permute(g.ctx(), x, 0, 2, 1, 3), x->ne[0] * x->ne[2],
                        x->ne[1]);
}

static Tensor value_transposed(Graph & g, const Heads & p) {
    return transposed(g, p.v);
}

// softmax(s Kᵀ Q + mask) [T keys, T queries, heads]
static Tensor probabilities(Graph & g, const Inputs & in, const Heads & p, int64_t b, float scale) {
    ggml_context * c = g.ctx();
    Tensor S = product(c, p.k, p.q);
    Tensor mask = ggml_view_2d(c, in.portable.mask, in.T, in.T, (size_t)in.T * sizeof(ggml_fp16_t),
                               (size_t)(b * in.T * in.T) * sizeof(ggml_fp16_t));
    return ggml_soft_max_ext(c, S, mask, scale, 0.0f);
}

Tensor GgmlOps::attention(Graph & g, const Inputs & in, const Qkv & x, float scale) {
    ggml_context * c = g.ctx();
    Tensor out = nullptr;
    for (int64_t b = 0; b < in.B; b++) {
        Tensor row = nullptr;
        for_heads(in, x, [&](int64_t k0, int64_t kn) {
            const Heads p = heads(g, in, x, b, k0, kn);
            Tensor o = product(c, value_transposed(g, p), probabilities(g, in, p, b, scale));
            row = concat(g, row, merge_heads(g, o), 0);
        });
        out = concat(g, out, row, 1);
    }
    return out;
}

Tensor GgmlOps::attention_out(Graph &, Tensor attn, int64_t, int64_t) {
    return attn;
}

// dV = Pᵀ dO; dP = dO Vᵀ; dS = s P (dP - Σ dP P); dQ = dS K; dK = dSᵀ Q; the heads of a group
// are summed as part of the reduction over queries.
Qkv GgmlOps::attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor, Tensor dout,
                            float scale) {
    ggml_context * c = g.ctx();
    const int64_t D = x.q->ne[0], H = x.q->ne[1], K = x.k->ne[1], T = in.T;
    Qkv d{nullptr, nullptr, nullptr};
    for (int64_t b = 0; b < in.B; b++) {
        Qkv row{nullptr, nullptr, nullptr};
        for_heads(in, x, [&](int64_t k0, int64_t kn) {
            const int64_t group = H / K, hn = kn * group;
            const Heads p = heads(g, in, x, b, k0, kn);
            Tensor P = probabilities(g, in, p, b, scale);
            Tensor dO =
                split_heads(g, in, ggml_reshape_3d(c, dout, D, H, in.N()), b, k0 * group, hn);
            Tensor dP = product(c, p.v, dO);
            Tensor dS = ggml_mul(c, P, ggml_sub(c, dP, ggml_sum_rows(c, ggml_mul(c, dP, P))));
            dS = ggml_scale(c, dS, scale);
            Tensor kt = ggml_cont(c, ggml_permute(c, p.k, 1, 0, 2, 3));
            Tensor dq = product(c, kt, dS);
            auto grouped = [&](Tensor t, int64_t width) {
                return transposed(g, ggml_reshape_3d(c, ggml_cont(c, t), width, T * group, kn));
            };
            Tensor dk = product(c, grouped(p.q, D), grouped(dS, T));
            Tensor dv = product(c, grouped(dO, D), grouped(P, T));
            row = {concat(g, row.q, merge_heads(g, dq), 0), concat(g, row.k, merge_heads(g, dk), 0),
                   concat(g, row.v, merge_heads(g, dv), 0)};
        });
        d = {concat(g, d.q, row.q, 1), concat(g, d.k, row.k, 1), concat(g, d.v, row.v, 1)};
    }
    return {ggml_reshape_3d(c, d.q, D, H, in.N()), ggml_reshape_3d(c, d.k, D, K, in.N()),
            ggml_reshape_3d(c, d.v, D, K, in.N())};
}

} // namespace ggft
