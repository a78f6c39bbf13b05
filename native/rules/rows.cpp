// Operations on whole rows: norms, softmax, rotary positions. Source: the papers named below, and
// ggml-cpu/ops.cpp for what is added where.
#include "rules/table.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace ggft {

static float param(Tensor y, int i) {
    float value;
    std::memcpy(&value, &y->op_params[i], sizeof(value));
    return value;
}

static Tensor mean_rows(ggml_context * c, Tensor x) {
    return ggml_scale(c, ggml_sum_rows(c, x), 1.0f / (float)x->ne[0]);
}

static Tensor contiguous(ggml_context * c, Tensor x) {
    return ggml_is_contiguous(x) ? x : ggml_cont(c, x);
}

// y = x r, r = 1/√(mean(x²) + eps) (Zhang & Sennrich 2019): dx = r (dy - y mean(dy y)).
static void rms_norm_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor square = mean_rows(c, ggml_sqr(c, contiguous(c, y->src[0])));
    Tensor rms = ggml_sqrt(c, ggml_scale_bias(c, square, 1, param(y, 0)));
    Tensor rest = ggml_sub(c, dy, ggml_mul(c, y, mean_rows(c, ggml_mul(c, dy, y))));
    b.add(y->src[0], ggml_div(c, rest, rms));
}

// y = (x - mean(x)) r, r = 1/√(var(x) + eps) (Ba et al. 2016):
// dx = r (dy - mean(dy) - y mean(dy y)).
static void norm_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor x = contiguous(c, y->src[0]);
    Tensor square = mean_rows(c, ggml_sqr(c, ggml_sub(c, x, mean_rows(c, x))));
    Tensor deviation = ggml_sqrt(c, ggml_scale_bias(c, square, 1, param(y, 0)));
    Tensor rest = ggml_sub(c, dy, ggml_mul(c, y, mean_rows(c, ggml_mul(c, dy, y))));
    b.add(y->src[0], ggml_div(c, ggml_sub(c, rest, mean_rows(c, dy)), deviation));
}

// y = x / max(|x|, eps): dx = (dy - y sum(dy y) [|x| > eps]) / max(|x|, eps).
static void l2_norm_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    const float eps = param(y, 0);
    Tensor size = ggml_sqrt(c, ggml_sum_rows(c, ggml_sqr(c, contiguous(c, y->src[0]))));
    Tensor live = ggml_step(c, ggml_scale_bias(c, size, 1, -eps));
    Tensor along = ggml_mul(c, ggml_sum_rows(c, ggml_mul(c, dy, y)), live);
    Tensor rest = ggml_sub(c, dy, ggml_mul(c, y, along));
    b.add(y->src[0], ggml_div(c, rest, ggml_clamp(c, size, eps, INFINITY)));
}

// y = softmax(scale x + mask), sinks in the sum: dx = scale y (dy - sum(dy y)).
static void soft_max_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor rest = ggml_sub(c, dy, ggml_sum_rows(c, ggml_mul(c, dy, y)));
    b.add(y->src[0], ggml_scale(c, ggml_mul(c, y, rest), param(y, 0)));
}

// y = pairs turned by their angle, times a magnitude (Su et al. 2021): dx = dy turned back, times
// the same magnitude.
static void rope_rule(Backward & b, Tensor y, Tensor dy) {
    Tensor dx = ggml_dup_tensor(b.g.ctx(), dy);
    dx->op = y->op == GGML_OP_ROPE ? GGML_OP_ROPE_BACK : GGML_OP_ROPE;
    std::memcpy(dx->op_params, y->op_params, sizeof(dx->op_params));
    dx->src[0] = contiguous(b.g.ctx(), dy);
    dx->src[1] = y->src[1];
    dx->src[2] = y->src[2];
    b.add(y->src[0], dx);
}

const std::vector<NamedRule> & row_rules() {
    static const std::vector<NamedRule> rules = {
        {"RMS_NORM", rms_norm_rule}, {"NORM", norm_rule}, {"L2_NORM", l2_norm_rule},
        {"SOFT_MAX", soft_max_rule}, {"ROPE", rope_rule}, {"ROPE_BACK", rope_rule},
    };
    return rules;
}

} // namespace ggft
