// GgmlOps: every operation and its local gradient composed of ops that ggml's GPU backends have. In
// particular none of OUT_PROD, RMS_NORM_BACK, SOFT_MAX_BACK, CROSS_ENTROPY_LOSS(_BACK), REPEAT_BACK
// or GET_ROWS_BACK, which Metal lacks. The same graph runs on every device.
//
// GPUs may round the operands of a product to half precision: Metal always does. Emulated on
// SmolLM2, that moves the gradient by 0.4%, and a gradient 1000 times as large still fits; so the
// loss needs no scaling.
#include "base/error.h"
#include "rules/ops.h"

#include <algorithm>
#include <cmath>

namespace ggft {

namespace {

// Largest piece of a weight that is dequantized at once, and of attention scores that exist at
// once.
constexpr int64_t SCRATCH_ELEMENTS = 16 << 20;
constexpr int64_t SCORE_ELEMENTS = 8 << 20;

// aᵀ b. Sums in F32 everywhere: backends may otherwise sum in half precision, CUDA among them.
Tensor product(ggml_context * c, Tensor a, Tensor b) {
    Tensor y = ggml_mul_mat(c, a, b);
    ggml_prec_set_acc(y, GGML_PREC_F32);
    return y;
}

Tensor transposed(Graph & g, Tensor x) {
    return ggml_cont(g.ctx(), ggml_transpose(g.ctx(), x));
}

Tensor add(Graph & g, Tensor a, Tensor b) {
    if (a == nullptr) {
        return b;
    }
    return b == nullptr ? a : ggml_add(g.ctx(), a, b);
}

class GgmlOps : public Ops {
public:
    GgmlOps(const Inputs & in, Mode mode, bool quantized_forward)
        : in_(in), mode_(mode), quantized_forward_(quantized_forward) {}

    const char * name() const override { return "ggml"; }

    Tensor rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool) override {
        Tensor n = ggml_rms_norm(g.ctx(), x, eps);
        return w == nullptr ? n : ggml_mul(g.ctx(), n, w);
    }

    // dx = residual + (gw - n̂ mean(gw n̂)) / rms, gw = dn w.
    Tensor rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                         Tensor residual) override {
        ggml_context * c = g.ctx();
        Tensor n_hat = ggml_rms_norm(c, x, eps);
        Tensor gw = w == nullptr ? dn : ggml_mul(c, dn, w);
        Tensor mean = ggml_mean(c, ggml_mul(c, gw, n_hat));
        Tensor rms = ggml_sqrt(c, ggml_scale_bias(c, ggml_mean(c, ggml_sqr(c, x)), 1.0f, eps));
        Tensor dx = ggml_div(c, ggml_sub(c, gw, ggml_mul(c, n_hat, mean)), rms);
        return add(g, dx, residual);
    }

    // Dropout multiplies by rows gathered from a pool of random masks by random ids.
    LinearInput linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                             std::vector<const LoraPair *> adapters) override {
        LinearInput r;
        r.x = r.dropped = x;
        r.adapters = std::move(adapters);
        if (!dropout || in.seed == 0 || in.pool == nullptr) {
            return r;
        }
        ggml_context * c = g.ctx();
        Tensor pool = ggml_view_2d(c, in.pool, x->ne[0], in.pool->ne[1], in.pool->nb[1], 0);
        Tensor ids =
            ggml_view_1d(c, in.pool_ids, in.N(), (size_t)(id * in.pool_stride()) * sizeof(int32_t));
        r.keep = ggml_get_rows(c, pool, ids);
        r.dropped = ggml_mul(c, x, r.keep);
        return r;
    }

    Tensor dropped(Graph &, const LinearInput & in) override { return in.dropped; }

    Tensor linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                  Tensor residual) override {
        ggml_context * c = g.ctx();
        Tensor y = matmul(g, w.weight, in.x);
        if (w.bias != nullptr) {
            y = ggml_add(c, y, w.bias);
        }
        if (lora) {
            Tensor u = product(c, lora.a, in.dropped);
            y = ggml_add(c, y, product(c, lora.b, ggml_scale(c, u, lora.scale)));
        }
        return add(g, y, residual);
    }

    // dB = s dy uᵀ, du = s Bᵀ dy, dA = du x̂ᵀ, dx = Wᵀ dy + keep * (Aᵀ du), with u = A x̂.
    Tensor linear_back(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                       Tensor dy, Tensor acc, bool need_dx) override {
        ggml_context * c = g.ctx();
        Tensor du = nullptr;
        if (lora) {
            Tensor u = ggml_scale(c, product(c, lora.a, in.dropped), lora.scale);
            g.expand(ggml_add_inplace(c, lora.db, product(c, transposed(g, u), transposed(g, dy))));
            du = ggml_scale(c, product(c, transposed(g, lora.b), dy), lora.scale);
            g.expand(ggml_add_inplace(c, lora.da,
                                      product(c, transposed(g, in.dropped), transposed(g, du))));
        }
        if (!need_dx) {
            return acc;
        }
        Tensor dx = matmul_transposed(g, w.weight, dy);
        if (lora) {
            Tensor d = product(c, transposed(g, lora.a), du);
            dx = ggml_add(c, dx, in.keep ? ggml_mul(c, d, in.keep) : d);
        }
        return add(g, dx, acc);
    }

    Tensor rope(Graph & g, const Inputs & in, const Rope & r, Tensor x) override {
        Tensor at = ggml_view_1d(g.ctx(), in.positions, in.N(), 0);
        return ggml_rope_ext(g.ctx(), x, at, r.freq_factors, r.n_dims, r.mode, r.n_ctx_orig,
                             r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor, r.beta_fast,
                             r.beta_slow);
    }

    Tensor rope_back(Graph & g, const Inputs & in, const Rope & r, Tensor dy) override {
        Tensor at = ggml_view_1d(g.ctx(), in.positions, in.N(), 0);
        return ggml_rope_ext_back(g.ctx(), dy, at, r.freq_factors, r.n_dims, r.mode, r.n_ctx_orig,
                                  r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor,
                                  r.beta_fast, r.beta_slow);
    }

    Tensor attention(Graph & g, const Inputs & in, const Qkv & x, float scale) override {
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

    Tensor attention_out(Graph &, Tensor attn, int64_t, int64_t) override { return attn; }

    // dV = Pᵀ dO; dP = dO Vᵀ; dS = s P (dP - Σ dP P); dQ = dS K; dK = dSᵀ Q; the heads of a group
    // are summed as part of the reduction over queries.
    Qkv attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor, Tensor dout,
                       float scale) override {
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
                row = {concat(g, row.q, merge_heads(g, dq), 0),
                       concat(g, row.k, merge_heads(g, dk), 0),
                       concat(g, row.v, merge_heads(g, dv), 0)};
            });
            d = {concat(g, d.q, row.q, 1), concat(g, d.k, row.k, 1), concat(g, d.v, row.v, 1)};
        }
        return {ggml_reshape_3d(c, d.q, D, H, in.N()), ggml_reshape_3d(c, d.k, D, K, in.N()),
                ggml_reshape_3d(c, d.v, D, K, in.N())};
    }

    Tensor swiglu(Graph & g, Tensor gate, Tensor up) override {
        return ggml_swiglu_split(g.ctx(), gate, up);
    }

    // dup = dh silu(gate), dgate = dh up silu'(gate).
    SwigluBack swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) override {
        ggml_context * c = g.ctx();
        return {ggml_silu_back(c, ggml_mul(c, dh, up), gate), ggml_swiglu_split(c, gate, dh)};
    }

    // nats = -log p[label]; dn = Wᵀ (p - onehot). The one-hot is subtracted in place by SET_ROWS on
    // a view of p with rows of one element, so that a confident p loses nothing to cancellation.
    Loss loss(Graph & g, const Linear & w, Tensor n, Tensor, Tensor label_at,
              bool need_dn) override {
        ggml_context * c = g.ctx();
        Tensor logits = matmul(g, w.weight, n);
        if (w.bias != nullptr) {
            logits = ggml_add(c, logits, w.bias);
        }
        Tensor p = ggml_soft_max(c, logits);
        Tensor column = ggml_reshape_2d(c, p, 1, ggml_nelements(p));
        Tensor p_label = ggml_get_rows(c, column, label_at);
        Tensor nats = ggml_scale(c, ggml_log(c, ggml_clamp(c, p_label, 1e-38f, 1.0f)), -1.0f);
        // Copied before p changes.
        nats = g.expand(ggml_reshape_1d(c, nats, ggml_nelements(label_at)));
        if (!need_dn) {
            return {nats, nullptr};
        }
        Tensor d = ggml_set_rows(c, column, ggml_scale_bias(c, p_label, 1.0f, -1.0f), label_at);
        return {nats, matmul_transposed(g, w.weight, ggml_reshape_2d(c, d, p->ne[0], p->ne[1]))};
    }

private:
    struct Heads {
        Tensor q;    // [D, T, heads] of one row
        Tensor k, v; // [D, T, kv-heads]
    };

    static Tensor concat(Graph & g, Tensor a, Tensor b, int dim) {
        return a == nullptr ? b : ggml_concat(g.ctx(), a, b, dim);
    }

    // Calls f(first kv-head, number) for pieces whose scores fit the scratch.
    template <class F> static void for_heads(const Inputs & in, const Qkv & x, F f) {
        const int64_t K = x.k->ne[1], group = x.q->ne[1] / K;
        const int64_t step = std::clamp<int64_t>(SCORE_ELEMENTS / (in.T * in.T * group), 1, K);
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

    static Heads heads(Graph & g, const Inputs & in, const Qkv & x, int64_t b, int64_t k0,
                       int64_t kn) {
        const int64_t group = x.q->ne[1] / x.k->ne[1];
        return {split_heads(g, in, x.q, b, k0 * group, kn * group),
                split_heads(g, in, x.k, b, k0, kn),
                ggml_cont(g.ctx(), split_heads(g, in, x.v, b, k0, kn))};
    }

    // [D, T, n] -> [D*n, T]
    static Tensor merge_heads(Graph & g, Tensor x) {
        return ggml_cont_2d(g.ctx(), ggml_permute(g.ctx(), x, 0, 2, 1, 3), x->ne[0] * x->ne[2],
                            x->ne[1]);
    }

    static Tensor value_transposed(Graph & g, const Heads & p) { return transposed(g, p.v); }

    // softmax(s Kᵀ Q + mask) [T keys, T queries, heads]
    static Tensor probabilities(Graph & g, const Inputs & in, const Heads & p, int64_t b,
                                float scale) {
        ggml_context * c = g.ctx();
        Tensor S = product(c, p.k, p.q);
        Tensor mask = ggml_view_2d(c, in.mask, in.T, in.T, (size_t)in.T * sizeof(ggml_fp16_t),
                                   (size_t)(b * in.T * in.T) * sizeof(ggml_fp16_t));
        return ggml_soft_max_ext(c, S, mask, scale, 0.0f);
    }

    // Rows [r0, r0+n) of W as F32 [C_in, n].
    Tensor dequantized(Graph & g, Tensor w, int64_t r0, int64_t n) const {
        ggml_context * c = g.ctx();
        if (w->type == GGML_TYPE_F32) {
            return ggml_view_2d(c, w, w->ne[0], n, w->nb[1], (size_t)r0 * w->nb[1]);
        }
        Tensor ids = ggml_view_1d(c, in_.arange, n, (size_t)r0 * sizeof(int32_t));
        return ggml_get_rows(c, w, ids);
    }

    static int64_t rows_per_piece(Tensor w) {
        return std::clamp<int64_t>(SCRATCH_ELEMENTS / w->ne[0] / 64 * 64, 64,
                                   std::max<int64_t>(64, w->ne[1]));
    }

    // W x. A GPU multiplies quantized weights by F32 activations; the CPU backend would quantize
    // the activations, so there the weight is dequantized first.
    Tensor matmul(Graph & g, Tensor w, Tensor x) const {
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
    Tensor matmul_transposed(Graph & g, Tensor w, Tensor dy) const {
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

    const Inputs & in_;
    Mode mode_;
    bool quantized_forward_;
};

} // namespace

std::unique_ptr<Ops> make_ggml_ops(const Inputs & in, Mode mode, bool quantized_forward) {
    return std::make_unique<GgmlOps>(in, mode, quantized_forward);
}

} // namespace ggft
