#include "engine/decoder.h"

namespace ggft {

static Tensor as_heads(Graph & g, Tensor x, int64_t head_size) {
    return ggml_reshape_3d(g.ctx(), x, head_size, x->ne[0] / head_size, x->ne[1]);
}

static Tensor as_rows(Graph & g, Tensor x) {
    return ggml_reshape_2d(g.ctx(), x, x->ne[0] * x->ne[1], x->ne[2]);
}

LinearInput Decoder::input(Graph & g, int64_t l, int stage, Tensor x, bool dropout) const {
    static const std::vector<int> READERS[N_STAGES] = {
        {ATTN_Q, ATTN_K, ATTN_V}, {ATTN_OUTPUT}, {FFN_GATE, FFN_UP}, {FFN_DOWN}};
    std::vector<const LoraPair *> adapters;
    for (int site : READERS[stage]) {
        if (lora_.pair(l, site)) {
            adapters.push_back(&lora_.pair(l, site));
        }
    }
    return ops_.linear_input(g, in_, x, (int)l * N_STAGES + stage, dropout, std::move(adapters));
}

Tensor Decoder::rotated(Graph & g, Tensor x, Tensor norm) const {
    if (norm != nullptr) {
        Tensor rows = ggml_reshape_2d(g.ctx(), x, x->ne[0], x->ne[1] * x->ne[2]);
        rows = ops_.rms_norm(g, rows, norm, model_.hparams.norm_eps, /*for_linear=*/false);
        x = ggml_reshape_3d(g.ctx(), rows, x->ne[0], x->ne[1], x->ne[2]);
    }
    return ops_.rope(g, in_, model_.hparams.rope, x);
}

// dy [D, heads, N] -> the gradient of the linear's result [D*heads, N].
Tensor Decoder::rotated_back(Graph & g, Tensor x_raw, Tensor norm, Tensor dy) const {
    const int64_t D = dy->ne[0], heads = dy->ne[1], N = dy->ne[2];
    Tensor d = ops_.rope_back(g, in_, model_.hparams.rope, dy);
    if (norm != nullptr) {
        auto rows = [&](Tensor t) { return ggml_reshape_2d(g.ctx(), t, D, heads * N); };
        d = ops_.rms_norm_back(g, rows(x_raw), norm, model_.hparams.norm_eps, rows(d), nullptr);
    }
    return ggml_reshape_2d(g.ctx(), d, D * heads, N);
}

Tensor Decoder::attend(Graph & g, const Layer & layer, Tensor q, Tensor k, Tensor v,
                       Activations & act) const {
    const Hparams & h = model_.hparams;
    q = as_heads(g, q, h.n_embd_head);
    k = as_heads(g, k, h.n_embd_head);
    if (layer.attn_q_norm != nullptr) {
        act.q_raw = q;
        act.k_raw = k;
    }
    act.q = rotated(g, q, layer.attn_q_norm);
    act.k = rotated(g, k, layer.attn_k_norm);
    act.v = as_heads(g, v, h.n_embd_head);
    act.attn = ops_.attention(g, in_, {act.q, act.k, act.v}, h.attn_scale);
    return ops_.attention_out(g, act.attn, h.n_head * h.n_embd_head, in_.N());
}

Block Decoder::forward(Graph & g, int64_t l, Tensor x, bool dropout) const {
    const Layer & layer = model_.layers[(size_t)l];
    Block b;
    lora_.load(g, l);

    b.attn_in = norm_input(g, l, IN_ATTN, x, layer.attn_norm, dropout);
    Tensor q = linear(g, l, ATTN_Q, b.attn_in), k = linear(g, l, ATTN_K, b.attn_in),
           v = linear(g, l, ATTN_V, b.attn_in);
    b.output_in = input(g, l, IN_OUTPUT, attend(g, layer, q, k, v, b.act), dropout);
    b.act.x_mid = linear(g, l, ATTN_OUTPUT, b.output_in, x);

    b.ffn_in = norm_input(g, l, IN_FFN, b.act.x_mid, layer.ffn_norm, dropout);
    b.act.gate = linear(g, l, FFN_GATE, b.ffn_in);
    b.act.up = linear(g, l, FFN_UP, b.ffn_in);
    return b;
}

Tensor Decoder::finish(Graph & g, int64_t l, const Block & b, bool dropout) const {
    const LinearInput down_in = input(g, l, IN_DOWN, ops_.swiglu(g, b.act.gate, b.act.up), dropout);
    return linear(g, l, FFN_DOWN, down_in, b.act.x_mid);
}

Block Decoder::restore(Graph & g, int64_t l, Tensor x, const Activations & act,
                       bool dropout) const {
    const Hparams & h = model_.hparams;
    const Layer & layer = model_.layers[(size_t)l];
    Tensor out = ops_.attention_out(g, act.attn, h.n_head * h.n_embd_head, in_.N());
    return {act, norm_input(g, l, IN_ATTN, x, layer.attn_norm, dropout),
            input(g, l, IN_OUTPUT, out, dropout),
            norm_input(g, l, IN_FFN, act.x_mid, layer.ffn_norm, dropout)};
}

Tensor Decoder::backward(Graph & g, int64_t l, Tensor x, const Block & b, Tensor dy, bool dropout,
                         bool need_dx) const {
    const Hparams & h = model_.hparams;
    const Layer & layer = model_.layers[(size_t)l];
    const Activations & a = b.act;

    // Feed-forward. dy reaches x_mid directly and through the down projection.
    const LinearInput down_in = input(g, l, IN_DOWN, ops_.swiglu(g, a.gate, a.up), dropout);
    Tensor dh = linear_back(g, l, FFN_DOWN, down_in, dy, nullptr);
    const auto d_glu = ops_.swiglu_back(g, a.gate, a.up, dh);
    Tensor dn = linear_back(g, l, FFN_GATE, b.ffn_in, d_glu.dgate, nullptr);
    dn = linear_back(g, l, FFN_UP, b.ffn_in, d_glu.dup, dn);
    Tensor dx_mid = ops_.rms_norm_back(g, a.x_mid, layer.ffn_norm, h.norm_eps, dn, dy);

    // Attention.
    Tensor dout = linear_back(g, l, ATTN_OUTPUT, b.output_in, dx_mid, nullptr);
    Qkv d = ops_.attention_back(g, in_, {a.q, a.k, a.v}, a.attn, dout, h.attn_scale);
    Tensor dq = rotated_back(g, a.q_raw, layer.attn_q_norm, d.q);
    Tensor dk = rotated_back(g, a.k_raw, layer.attn_k_norm, d.k);
    dn = linear_back(g, l, ATTN_Q, b.attn_in, dq, nullptr, need_dx);
    dn = linear_back(g, l, ATTN_K, b.attn_in, dk, dn, need_dx);
    dn = linear_back(g, l, ATTN_V, b.attn_in, as_rows(g, d.v), dn, need_dx);
    return need_dx ? ops_.rms_norm_back(g, x, layer.attn_norm, h.norm_eps, dn, dx_mid) : nullptr;
}

Tensor Decoder::embed(Graph & g) const {
    return ggml_get_rows(g.ctx(), model_.token_embd, ggml_view_1d(g.ctx(), in_.tokens, in_.N(), 0));
}

Tensor Decoder::head(Graph & g, Tensor x, int64_t first, int64_t n, Tensor dx) const {
    const Hparams & h = model_.hparams;
    auto part = [&](Tensor t) {
        return ggml_view_1d(g.ctx(), t, n, (size_t)first * sizeof(int32_t));
    };
    Tensor rows = part(in_.rows);
    Tensor at = in_.portable.label_at == nullptr ? nullptr : part(in_.portable.label_at);
    Tensor xr = ggml_get_rows(g.ctx(), x, rows);
    Tensor norm = ops_.rms_norm(g, xr, model_.output_norm, h.norm_eps, /*for_linear=*/true);
    const auto loss =
        ops_.loss(g, {model_.output, nullptr}, norm, part(in_.labels), at, dx != nullptr);
    if (dx != nullptr) {
        Tensor d = ops_.rms_norm_back(g, xr, model_.output_norm, h.norm_eps, loss.dn, nullptr);
        if (in_.weighted) {
            d = ggml_mul(g.ctx(), d,
                         ggml_view_2d(g.ctx(), in_.weights, 1, n, in_.weights->nb[1],
                                      (size_t)first * in_.weights->nb[1]));
        }
        g.expand(ggml_set_rows(g.ctx(), dx, d, rows));
    }
    return loss.nats;
}

Tensor Decoder::logits(Graph & g, Tensor x, int64_t first, int64_t n) const {
    Tensor part = ggml_view_2d(g.ctx(), x, x->ne[0], n, x->nb[1], (size_t)first * x->nb[1]);
    Tensor norm =
        ops_.rms_norm(g, part, model_.output_norm, model_.hparams.norm_eps, /*for_linear=*/true);
    return ops_.linear(g, {model_.output, nullptr}, {},
                       ops_.linear_input(g, in_, norm, 0, false, {}), nullptr);
}

} // namespace ggft
