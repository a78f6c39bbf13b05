#include "rules/portable.h"

#include <algorithm>

namespace ggft {

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

Tensor concat(Graph & g, Tensor a, Tensor b, int dim) {
    return a == nullptr ? b : ggml_concat(g.ctx(), a, b, dim);
}

// A backward pass that recomputes has the most: some 70 nodes for a piece of attention, 15 for a
// piece of a weight.
size_t GgmlOps::n_nodes_max(const Inputs & in, const Model & model) const {
    const Hparams & h = model.hparams;
    int64_t pieces = 0;
    for (const Layer & layer : model.layers) {
        int64_t sum = 0;
        for (const Linear & linear : layer.linear) {
            sum += n_pieces(linear.weight);
        }
        pieces = std::max(pieces, sum);
    }
    const int64_t attention = in.B * n_head_pieces(in, h.n_head, h.n_head_kv);
    return (size_t)(1024 + 96 * attention + 24 * std::max(pieces, n_pieces(model.output)));
}

std::unique_ptr<Ops> make_ggml_ops(const Inputs & in, Mode mode, bool quantized_forward) {
    return std::make_unique<GgmlOps>(in, mode, quantized_forward);
}

} // namespace ggft
