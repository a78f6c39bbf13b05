#include "segments/builder.h"

#include "base/error.h"
#include "kernels/attention/attention.h"
#include "kernels/isa/dispatch.h"
#include "patterns/experts.h"

namespace ggft {

// Adapters that one node can take as arguments beside its input.
static constexpr size_t N_ADAPTERS_MAX = N_SITES;

static Tensor contiguous(ggml_context * c, Tensor x) {
    return ggml_is_contiguous(x) ? x : ggml_cont(c, x);
}

void Builder::note(Tensor y, std::function<void(Tensor dy)> vjp) {
    steps_.push_back({y, std::move(vjp)});
}

Tensor Builder::note(Tensor y) {
    for (Tensor s : y->src) {
        if (s != nullptr && back.needs(s) && y->type == GGML_TYPE_F32) {
            back.need(y);
        }
    }
    if (back.needs(y)) {
        steps_.push_back({y, nullptr});
    }
    return y;
}

static bool is_gelu(const TapeTensor & t) {
    return t.op == GGML_OP_UNARY && t.op_params[0] == GGML_UNARY_OP_GELU;
}

static bool is_geglu(const TapeTensor & t) {
    return t.op == GGML_OP_GLU && t.op_params[0] == GGML_GLU_OP_GEGLU && t.src.size() > 1 &&
           t.src[1] >= 0;
}

void Builder::add(int node) {
    const TapeTensor & t = c_.tape[node];
    if (is_linear(c_.tape, node) && c_.tape[t.src[1]].type == GGML_TYPE_F32) {
        add_linear(node);
    } else if (t.op == GGML_OP_MUL_MAT_ID) {
        add_experts(node);
    } else if (t.op == GGML_OP_FLASH_ATTN_EXT) {
        add_attention(node);
    } else if (c_.exact && (is_gelu(t) || is_geglu(t))) {
        add_gelu(node);
    } else {
        note(clone_.add(node));
    }
}

void Builder::backward() {
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
        Tensor dy = back.gradient(step->y);
        if (dy == nullptr) {
            continue;
        }
        if (step->vjp) {
            step->vjp(dy);
        } else {
            find_rule(op_name(step->y))(back, step->y, dy);
        }
    }
}

// ---- linears with LoRA ----

// What the linears that read `source` share: its rows, and the projections of all their adapters.
const LinearInput & Builder::linear_input(int source) {
    const auto known = inputs_.find(source);
    if (known != inputs_.end()) {
        return known->second;
    }
    Tensor x = contiguous(g_.ctx(), get(source));
    x = ggml_reshape_2d(g_.ctx(), x, x->ne[0], ggml_nrows(x));
    std::vector<const LoraPair *> adapters;
    for (int i : c_.tape.order) {
        if (is_linear(c_.tape, i) && c_.tape[i].src[1] == source) {
            const LoraPair & pair = c_.lora.pair(c_.tape[c_.tape[i].src[0]].name);
            if (pair) {
                adapters.push_back(&pair);
            }
        }
    }
    require(adapters.size() <= N_ADAPTERS_MAX, ErrorKind::input,
            "too many adapters read " + c_.tape[source].name);
    Inputs in;
    in.seed = c_.seed;
    return inputs_[source] = c_.ops.linear_input(g_, in, x, source, c_.seed != 0, adapters);
}

void Builder::add_linear(int node) {
    const TapeTensor & t = c_.tape[node];
    const LinearInput & in = linear_input(t.src[1]);
    const LoraPair & pair = c_.lora.pair(c_.tape[t.src[0]].name);
    const Linear weight{get(t.src[0]), nullptr};
    Tensor x = get(t.src[1]), y = c_.ops.linear(g_, weight, pair, in, nullptr);
    clone_.bind(node, ggml_reshape_4d(g_.ctx(), y, t.ne[0], t.ne[1], t.ne[2], t.ne[3]));
    if (!pair && !back.needs(x)) {
        return;
    }
    back.need(y);
    note(y, [this, weight, &pair, &in, x](Tensor dy) {
        const bool need_dx = back.needs(x);
        Tensor dx = c_.ops.linear_back(g_, weight, pair, in, dy, nullptr, need_dx);
        if (need_dx) {
            back.add(x, ggml_reshape(g_.ctx(), dx, x));
        }
    });
}

// ---- experts ----

// In ggml's product the activations take the weights' type, which the exact path does not.
void Builder::add_experts(int node) {
    const TapeTensor & t = c_.tape[node];
    Tensor w = get(t.src[0]), x = get(t.src[1]), ids = get(t.src[2]);
    const RowwiseKernels & k = c_.ops.kernel_set()->rowwise; // traced engines have fused kernels
    Tensor y = c_.exact ? expert_products(g_, k, w, x, ids) : clone_.add(node);
    clone_.bind(node, y);
    if (!back.needs(x)) {
        return;
    }
    back.need(y);
    note(y, [=, &k](Tensor dy) {
        back.add(x, fold(back, expert_products_back(g_, k, w, dy, ids), x));
    });
}

// ---- GELU as its formula, not ggml's table of 16-bit values, which no derivative can follow ----

// x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
Tensor Builder::gelu(Tensor x) {
    constexpr float CUBE = 0.044715f, FACTOR = 0.7978845608f;
    ggml_context * ctx = g_.ctx();
    x = ggml_is_contiguous(x) ? x : note(ggml_cont(ctx, x));
    Tensor inner = note(ggml_scale_bias(ctx, note(ggml_sqr(ctx, x)), FACTOR * CUBE, FACTOR));
    Tensor t = note(ggml_tanh(ctx, note(ggml_mul(ctx, inner, x))));
    return note(ggml_mul(ctx, note(ggml_scale_bias(ctx, t, 0.5f, 0.5f)), x));
}

void Builder::add_gelu(int node) {
    const TapeTensor & t = c_.tape[node];
    Tensor y = gelu(get(t.src[0]));
    clone_.bind(node, is_gelu(t) ? y : note(ggml_mul(g_.ctx(), y, get(t.src[1]))));
}

// ---- attention ----

void Builder::add_attention(int node) {
    if (is_fusable(c_.tape[node])) {
        add_fused_attention(node);
    } else {
        add_plain_attention(node);
    }
}

bool Builder::is_fusable(const TapeTensor & t) const {
    const TapeTensor &q = c_.tape[t.src[0]], &k = c_.tape[t.src[1]], &v = c_.tape[t.src[2]];
    const bool plain = t.param_f32(1) == 0 && t.param_f32(2) == 0 &&
                       (t.src.size() < 5 || t.src[4] < 0) && t.src.size() >= 4 && t.src[3] >= 0;
    const auto mask = plain ? c_.masks.find(t.src[3]) : c_.masks.end();
    return mask != c_.masks.end() && mask->second.contiguous && q.ne[0] == v.ne[0] &&
           q.ne[0] <= MAX_HEAD_SIZE && q.ne[1] == k.ne[1] && q.ne[3] == 1 && q.ne[2] % k.ne[2] == 0;
}

void Builder::add_fused_attention(int node) {
    ggml_context * ctx = g_.ctx();
    const TapeTensor & t = c_.tape[node];
    const Inputs & spans = c_.masks.at(t.src[3]).spans;
    Tensor view[3]; // [D, heads, tokens]
    for (int i = 0; i < 3; i++) {
        view[i] = ggml_permute(ctx, get(t.src[(size_t)i]), 0, 2, 1, 3);
    }
    const Qkv x{contiguous(ctx, view[0]), contiguous(ctx, view[1]), contiguous(ctx, view[2])};
    const float scale = t.param_f32(0);
    Tensor attn = c_.ops.attention(g_, spans, x, scale);
    Tensor y = c_.ops.attention_out(g_, attn, t.ne[0] * t.ne[1], t.ne[2]);
    clone_.bind(node, ggml_reshape_4d(ctx, y, t.ne[0], t.ne[1], t.ne[2], t.ne[3]));
    if (!back.needs(view[0]) && !back.needs(view[1]) && !back.needs(view[2])) {
        return;
    }
    back.need_part(y); // what follows in its memory has no gradient
    note(attn, [=, &spans, q = view[0], k = view[1], v = view[2]](Tensor dout) {
        const Qkv dx = c_.ops.attention_back(g_, spans, x, attn, dout, scale);
        back.add(q, dx.q);
        back.add(k, dx.k);
        back.add(v, dx.v);
    });
}

// softmax(cap tanh(scale q kᵀ / cap) + mask, sinks) v, as operations with rules of their own.
void Builder::add_plain_attention(int node) {
    ggml_context * ctx = g_.ctx();
    const TapeTensor & t = c_.tape[node];
    float scale = t.param_f32(0);
    const float max_bias = t.param_f32(1), cap = t.param_f32(2);
    auto source = [&](size_t i) {
        return i < t.src.size() && t.src[i] >= 0 ? get(t.src[i]) : nullptr;
    };
    Tensor z = note(ggml_mul_mat(ctx, source(1), source(0))); // [keys, tokens, heads]
    if (cap != 0) {
        z = note(ggml_tanh(ctx, note(ggml_scale(ctx, z, scale / cap))));
        z = note(ggml_scale(ctx, z, cap));
        scale = 1;
    }
    Tensor p = ggml_soft_max_ext(ctx, z, source(3), scale, max_bias);
    ggml_soft_max_add_sinks(p, source(4));
    note(p);
    Tensor v = note(ggml_cont(ctx, ggml_transpose(ctx, source(2))));
    Tensor out = note(ggml_mul_mat(ctx, v, p)); // [D, tokens, heads]
    clone_.bind(node, note(ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3))));
}

} // namespace ggft
