// Cross entropy through the output matrix.
#include "rules/portable.h"

namespace ggft {

// nats = -log p[label]; dn = Wᵀ (p - onehot). The one-hot is subtracted in place by SET_ROWS on
// a view of p with rows of one element, so that a confident p loses nothing to cancellation.
Ops::Loss GgmlOps::loss(Graph & g, const Linear & w, Tensor n, Tensor, Tensor label_at,
                        bool need_dn) {
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

} // namespace ggft
