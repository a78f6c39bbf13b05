// Operations that move numbers: copies, gathered rows, concatenation, repetition. Source: ggml.h.
#include "rules/table.h"

#include <vector>

namespace ggft {

// y holds x's elements in order, perhaps in another shape: dx = dy.
static void copy_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], ggml_reshape(b.g.ctx(), dy, y->src[0]));
}

// y = rows ids of x, all different: dx[ids] = dy, 0 elsewhere.
static void get_rows_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    b.add(y->src[0], ggml_set_rows(c, ggml_fill(c, y->src[0], 0), dy, y->src[1]));
}

// y = [a, b] along a dimension: each gets its part of dy.
static void concat_rule(Backward & b, Tensor y, Tensor dy) {
    const int d = y->op_params[0];
    size_t at = 0;
    for (int s = 0; s < 2; s++) {
        Tensor x = y->src[s];
        b.add(x, ggml_view_4d(b.g.ctx(), dy, x->ne[0], x->ne[1], x->ne[2], x->ne[3], dy->nb[1],
                              dy->nb[2], dy->nb[3], at));
        at += (size_t)x->ne[d] * dy->nb[d];
    }
}

// y = x as often as fits: dx = the sum over the copies.
static void repeat_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], fold(b, dy, y->src[0]));
}

// y = the sum of each row: dx = dy along the row.
static void sum_rows_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], ggml_repeat(b.g.ctx(), dy, y->src[0]));
}

const std::vector<NamedRule> & shape_rules() {
    static const std::vector<NamedRule> rules = {
        {"CONT", copy_rule},         {"CPY", copy_rule},      {"DUP", copy_rule},
        {"GET_ROWS", get_rows_rule}, {"CONCAT", concat_rule}, {"REPEAT", repeat_rule},
        {"SUM_ROWS", sum_rows_rule},
    };
    return rules;
}

} // namespace ggft
