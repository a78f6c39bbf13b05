#include "rules/portable.h"

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

std::unique_ptr<Ops> make_ggml_ops(const Inputs & in, Mode mode, bool quantized_forward) {
    return std::make_unique<GgmlOps>(in, mode, quantized_forward);
}

} // namespace ggft
