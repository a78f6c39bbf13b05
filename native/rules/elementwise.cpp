// Elementwise operations: of two tensors, the second broadcast onto the first (index modulo its
// size), of one, and gated units. Source: ggml.h; ggml-cpu/ops.cpp, vec.h, unary-ops.cpp.
#include "rules/table.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace ggft {

static Tensor contiguous(ggml_context * c, Tensor x) {
    return ggml_is_contiguous(x) ? x : ggml_cont(c, x);
}

static float param(Tensor y, int i) {
    float value;
    std::memcpy(&value, &y->op_params[i], sizeof(value));
    return value;
}

// y = a + b: da = dy, db = fold(dy).
static void add_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], dy);
    if (b.needs(y->src[1])) {
        b.add(y->src[1], fold(b, dy, y->src[1]));
    }
}

// y = a - b: da = dy, db = -fold(dy).
static void sub_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], dy);
    if (b.needs(y->src[1])) {
        b.add(y->src[1], ggml_scale(b.g.ctx(), fold(b, dy, y->src[1]), -1));
    }
}

// y = a * b: da = dy * b, db = fold(dy * a).
static void mul_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    if (b.needs(y->src[0])) {
        b.add(y->src[0], ggml_mul(c, dy, y->src[1]));
    }
    if (b.needs(y->src[1])) {
        b.add(y->src[1], fold(b, ggml_mul(c, dy, y->src[0]), y->src[1]));
    }
}

// y = a / b: da = dy / b, db = -fold(dy * y / b).
static void div_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    if (b.needs(y->src[0])) {
        b.add(y->src[0], ggml_div(c, dy, y->src[1]));
    }
    if (b.needs(y->src[1])) {
        Tensor d = ggml_div(c, ggml_mul(c, dy, y), y->src[1]);
        b.add(y->src[1], ggml_scale(c, fold(b, d, y->src[1]), -1));
    }
}

// y = s x + bias: dx = s dy.
static void scale_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], ggml_scale(b.g.ctx(), dy, param(y, 0)));
}

// y = x²: dx = 2 x dy.
static void sqr_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    b.add(y->src[0], ggml_scale(c, ggml_mul(c, dy, y->src[0]), 2));
}

// y = √x: dx = dy / 2y.
static void sqrt_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    b.add(y->src[0], ggml_scale(c, ggml_div(c, dy, y), 0.5f));
}

// y = log x: dx = dy / x.
static void log_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], ggml_div(b.g.ctx(), dy, y->src[0]));
}

// y = min(max(x, low), high): dx = dy where low < x < high.
static void clamp_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor x = y->src[0];
    x = contiguous(c, x);
    Tensor above = ggml_step(c, ggml_scale_bias(c, x, 1, -param(y, 0)));
    Tensor below = ggml_step(c, ggml_scale_bias(c, x, -1, param(y, 1)));
    b.add(y->src[0], ggml_mul(c, ggml_mul(c, dy, above), below));
}

// ---- functions of one number: dx = dy f'(x) ----

static constexpr float GELU_A = 0.044715f, GELU_QUICK_FACTOR = 1.702f;
static const float GELU_SCALE = std::sqrt(2.0f / 3.14159265358979f);

// f = x/2 (1 + t), t = tanh(s x (1 + a x²)); f' = (1 + t)/2 + x/2 (1 - t²) s (1 + 3 a x²).
static Tensor gelu_gradient(ggml_context * c, Tensor x, Tensor dy) {
    Tensor sq = ggml_sqr(c, x);
    Tensor inner = ggml_mul(c, ggml_scale_bias(c, sq, GELU_SCALE * GELU_A, GELU_SCALE), x);
    Tensor t = ggml_tanh(c, inner);
    Tensor slope =
        ggml_mul(c, x, ggml_scale_bias(c, sq, 1.5f * GELU_SCALE * GELU_A, 0.5f * GELU_SCALE));
    Tensor rest = ggml_mul(c, slope, ggml_scale_bias(c, ggml_sqr(c, t), -1, 1));
    return ggml_mul(c, dy, ggml_add(c, ggml_scale_bias(c, t, 0.5f, 0.5f), rest));
}

// f = x σ(k x); f' = s (1 + k x (1 - s)), s = σ(k x).
static Tensor swish_gradient(ggml_context * c, Tensor x, Tensor dy, float k) {
    Tensor s = ggml_sigmoid(c, k == 1 ? x : ggml_scale(c, x, k));
    Tensor rest = ggml_mul(c, ggml_scale(c, x, k), ggml_scale_bias(c, s, -1, 1));
    return ggml_mul(c, dy, ggml_mul(c, s, ggml_scale_bias(c, rest, 1, 1)));
}

// f = x Φ(x); f' = Φ(x) + x φ(x), Φ(x) = f(x)/x, taken at |x| ≥ 1e-3 with its sign: f is odd in
// its deviation from x/2, and Φ(±1e-3) = 1/2 ± 4e-4.
static Tensor gelu_erf_gradient(ggml_context * c, Tensor x, Tensor dy) {
    constexpr float NEAR = 1e-3f, DENSITY = 0.3989422804f;
    Tensor sign = ggml_scale_bias(c, ggml_step(c, x), 2, -1);
    Tensor away = ggml_mul(c, sign, ggml_clamp(c, ggml_abs(c, x), NEAR, INFINITY));
    Tensor cdf = ggml_div(c, ggml_gelu_erf(c, away), away);
    Tensor density = ggml_scale(c, ggml_exp(c, ggml_scale(c, ggml_sqr(c, x), -0.5f)), DENSITY);
    return ggml_mul(c, dy, ggml_add(c, cdf, ggml_mul(c, x, density)));
}

// dy f'(x) for ggml's unary function `kind`; y = f(x).
static Tensor unary_gradient(Graph & g, ggml_unary_op kind, Tensor x, Tensor y, Tensor dy) {
    ggml_context * c = g.ctx();
    x = contiguous(c, x);
    switch (kind) {
    case GGML_UNARY_OP_SILU:
        return swish_gradient(c, x, dy, 1);
    case GGML_UNARY_OP_GELU_QUICK:
        return swish_gradient(c, x, dy, GELU_QUICK_FACTOR);
    case GGML_UNARY_OP_GELU:
        return gelu_gradient(c, x, dy);
    case GGML_UNARY_OP_GELU_ERF:
        return gelu_erf_gradient(c, x, dy);
    case GGML_UNARY_OP_RELU: // max(x, 0)
        return ggml_mul(c, dy, ggml_step(c, x));
    case GGML_UNARY_OP_TANH: // 1 - y²
        return ggml_mul(c, dy, ggml_scale_bias(c, ggml_sqr(c, y), -1, 1));
    case GGML_UNARY_OP_SIGMOID: // y (1 - y)
        return ggml_mul(c, ggml_mul(c, dy, y), ggml_scale_bias(c, y, -1, 1));
    case GGML_UNARY_OP_EXP:
        return ggml_mul(c, dy, y);
    case GGML_UNARY_OP_SOFTPLUS: // log(1 + e^x)
        return ggml_mul(c, dy, ggml_sigmoid(c, x));
    case GGML_UNARY_OP_NEG:
        return ggml_scale(c, dy, -1);
    case GGML_UNARY_OP_ABS:
        return ggml_mul(c, dy, ggml_sgn(c, x));
    default:
        return nullptr;
    }
}

static void unary_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], unary_gradient(b.g, ggml_get_unary_op(y), y->src[0], y, dy));
}

// x > 0: p x² + beta x; else n (e^min(x, eps) - 1 - x) + beta x (Huang & Schlag 2025, xIELU).
static void xielu_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    float n, p, beta, eps;
    std::memcpy(&n, &y->op_params[1], sizeof(n));
    std::memcpy(&p, &y->op_params[2], sizeof(p));
    std::memcpy(&beta, &y->op_params[3], sizeof(beta));
    std::memcpy(&eps, &y->op_params[4], sizeof(eps));
    Tensor x = y->src[0];
    x = contiguous(c, x);
    Tensor positive = ggml_step(c, x), negative = ggml_scale_bias(c, positive, -1, 1);
    Tensor below = ggml_step(c, ggml_scale_bias(c, x, -1, eps));
    Tensor power = ggml_exp(c, ggml_clamp(c, x, -INFINITY, eps));
    Tensor left = ggml_scale_bias(c, ggml_mul(c, power, below), n, beta - n);
    Tensor right = ggml_scale_bias(c, x, 2 * p, beta);
    Tensor slope = ggml_add(c, ggml_mul(c, right, positive), ggml_mul(c, left, negative));
    b.add(y->src[0], ggml_mul(c, dy, slope));
}

// ---- gated units: y = f(a) b, of two tensors or of the halves of each row (Shazeer 2020) ----

static ggml_unary_op activation(ggml_glu_op op) {
    switch (op) {
    case GGML_GLU_OP_REGLU:
        return GGML_UNARY_OP_RELU;
    case GGML_GLU_OP_GEGLU:
        return GGML_UNARY_OP_GELU;
    case GGML_GLU_OP_GEGLU_ERF:
        return GGML_UNARY_OP_GELU_ERF;
    case GGML_GLU_OP_GEGLU_QUICK:
        return GGML_UNARY_OP_GELU_QUICK;
    default:
        return GGML_UNARY_OP_SILU;
    }
}

struct Gated {
    Tensor gate, up;
};

// a and b. One source: the first half is a unless they are swapped.
static Gated gated(ggml_context * c, Tensor y) {
    Tensor x = y->src[0];
    if (y->src[1] != nullptr) {
        return {x, y->src[1]};
    }
    const bool swapped = y->op_params[1] != 0;
    auto half = [&](bool second) {
        return ggml_view_4d(c, x, y->ne[0], x->ne[1], x->ne[2], x->ne[3], x->nb[1], x->nb[2],
                            x->nb[3], second ? (size_t)y->ne[0] * x->nb[0] : 0);
    };
    return {half(swapped), half(!swapped)};
}

// da = dy * b * f'(a), db = dy * f(a).
static void glu_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    const auto [gate, up] = gated(c, y);
    const ggml_unary_op f = activation(ggml_get_glu_op(y));
    Tensor a = contiguous(c, gate);
    if (b.needs(up)) {
        b.add(up, ggml_mul(c, dy, ggml_unary(c, a, f)));
    }
    if (b.needs(gate)) {
        b.add(gate, unary_gradient(b.g, f, a, nullptr, ggml_mul(c, dy, up)));
    }
}

// y = f(a') (b' + bias), a' = min(a, limit), b' = b between -limit and limit, f(x) = x σ(k x), with
// k and a bias of 1 given (OAI) or 1 and 0: no gradient beyond the limits.
static void clamped_glu_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    const auto [gate, up] = gated(c, y);
    const bool oai = ggml_get_glu_op(y) == GGML_GLU_OP_SWIGLU_OAI;
    const float k = oai ? param(y, 2) : 1, limit = param(y, 3);
    Tensor gate_c = contiguous(c, gate), up_c = contiguous(c, up);
    Tensor low_gate = ggml_clamp(c, gate_c, -INFINITY, limit);
    if (b.needs(up)) {
        Tensor within = ggml_step(c, ggml_scale_bias(c, ggml_abs(c, up_c), -1, limit));
        Tensor f = ggml_mul(c, low_gate, ggml_sigmoid(c, ggml_scale(c, low_gate, k)));
        b.add(up, ggml_mul(c, ggml_mul(c, dy, f), within));
    }
    if (b.needs(gate)) {
        Tensor below = ggml_step(c, ggml_scale_bias(c, gate_c, -1, limit));
        Tensor factor = ggml_scale_bias(c, ggml_clamp(c, up_c, -limit, limit), 1, oai ? 1 : 0);
        Tensor d = swish_gradient(c, low_gate, ggml_mul(c, dy, factor), k);
        b.add(gate, ggml_mul(c, d, below));
    }
}

const std::vector<NamedRule> & elementwise_rules() {
    static const std::vector<NamedRule> rules = {
        {"ADD", add_rule},
        {"SUB", sub_rule},
        {"MUL", mul_rule},
        {"DIV", div_rule},
        {"SQR", sqr_rule},
        {"SQRT", sqrt_rule},
        {"LOG", log_rule},
        {"SCALE", scale_rule},
        {"CLAMP", clamp_rule},
        {"SILU", unary_rule},
        {"GELU", unary_rule},
        {"GELU_QUICK", unary_rule},
        {"GELU_ERF", unary_rule},
        {"RELU", unary_rule},
        {"TANH", unary_rule},
        {"SIGMOID", unary_rule},
        {"EXP", unary_rule},
        {"SOFTPLUS", unary_rule},
        {"NEG", unary_rule},
        {"ABS", unary_rule},
        {"XIELU", xielu_rule},
        {"REGLU", glu_rule},
        {"GEGLU", glu_rule},
        {"SWIGLU", glu_rule},
        {"GEGLU_ERF", glu_rule},
        {"GEGLU_QUICK", glu_rule},
        {"SWIGLU_OAI", clamped_glu_rule},
        {"SWIGLU_CLAMP", clamped_glu_rule},
    };
    return rules;
}

} // namespace ggft
