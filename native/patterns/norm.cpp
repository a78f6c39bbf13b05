// RMSNorm times its weight, and the gradient of both.
#include "kernels/rowwise/rowwise.h"
#include "patterns/fused.h"

namespace ggft {

Tensor FusedOps::rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool for_linear) {
    const ggml_type type = for_linear ? linear_type() : GGML_TYPE_F32;
    return g.custom("rms_norm", type, {x->ne[0], x->ne[1]}, {x, w},
                    [=, &k = kernels_.rowwise](Tensor n, int ith, int nth) {
                        k.rms_norm(floats(x), floats(w), eps, x->ne[0], x->ne[1], as_f32(n),
                                   as_bf16(n), nullptr, ith, nth);
                    });
}

// In place on the residual, which is the gradient that nothing else reads any more.
Tensor FusedOps::rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                               Tensor residual) {
    Tensor r = g.custom("rms", GGML_TYPE_F32, {x->ne[1]}, {x, w},
                        [=, &k = kernels_.rowwise](Tensor r, int ith, int nth) {
                            k.rms_norm(floats(x), floats(w), eps, x->ne[0], x->ne[1], nullptr,
                                       nullptr, floats(r), ith, nth);
                        });
    if (residual == nullptr) {
        residual = ggml_scale(g.ctx(), dn, 0.0f);
    }
    return g.custom_inplace("rms_norm_back", residual, {x, w, r, dn},
                            [=, &k = kernels_.rowwise](Tensor dx, int ith, int nth) {
                                k.rms_norm_backward(floats(dn), floats(x), floats(w), floats(r),
                                                    x->ne[0], x->ne[1], floats(dx), ith, nth);
                            });
}

} // namespace ggft
