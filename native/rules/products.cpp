// Matrix products, and what experts add. Source: ggml_mul_mat in ggml.h: y[n][m] = sum_k a[m][k]
// b[n][k]; a's slices are repeated interleaved over b's (slice i of b meets slice i / (ne2 of b /
// ne2 of a) of a).
#include "rules/table.h"

#include <vector>

namespace ggft {

static Tensor transposed(ggml_context * c, Tensor x) {
    return ggml_cont(c, ggml_transpose(c, x));
}

// db = aᵀ dy, da = dyᵀ b summed over the slices that met it. Frozen matrices are dequantized.
static void mul_mat_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor left = y->src[0], right = y->src[1];
    if (b.needs(right)) {
        Tensor a = left->type == GGML_TYPE_F32 ? left : ggml_cast(c, left, GGML_TYPE_F32);
        b.add(right, ggml_mul_mat(c, transposed(c, a), dy));
    }
    if (!b.needs(left)) {
        return;
    }
    Tensor d = ggml_mul_mat(c, transposed(c, right), transposed(c, dy)); // [k, m, slices of b]
    const int64_t n = left->ne[0] * left->ne[1], groups = right->ne[2] / left->ne[2];
    if (groups > 1) {
        d = ggml_reshape_4d(c, d, n, groups, left->ne[2], right->ne[3]);
        d = ggml_sum_rows(c, ggml_cont(c, ggml_permute(c, d, 1, 0, 2, 3)));
    }
    b.add(left, ggml_reshape(c, d, left));
}

// y[:, j, t] = a[ids[j, t]] b[:, j, t], b perhaps the same for all j: db = a[ids]ᵀ dy, summed over
// them. The matrices are frozen.
static void mul_mat_id_rule(Backward & b, Tensor y, Tensor dy) {
    ggml_context * c = b.g.ctx();
    Tensor a = y->src[0], right = y->src[1];
    a = a->type == GGML_TYPE_F32 ? a : ggml_cast(c, a, GGML_TYPE_F32);
    b.add(right, fold(b, ggml_mul_mat_id(c, transposed(c, a), dy, y->src[2]), right));
}

// y = a + rows ids of a table that is frozen: da = dy.
static void add_id_rule(Backward & b, Tensor y, Tensor dy) {
    b.add(y->src[0], dy);
}

const std::vector<NamedRule> & product_rules() {
    static const std::vector<NamedRule> rules = {
        {"MUL_MAT", mul_mat_rule}, {"MUL_MAT_ID", mul_mat_id_rule}, {"ADD_ID", add_id_rule}};
    return rules;
}

} // namespace ggft
