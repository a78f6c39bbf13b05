// The gated unit, silu(gate) * up.
#include "kernels/rowwise/rowwise.h"
#include "patterns/fused.h"

namespace ggft {

Tensor FusedOps::swiglu(Graph & g, Tensor gate, Tensor up) {
    return g.custom("swiglu", linear_type(), {gate->ne[0], gate->ne[1]}, {gate, up},
                    [=, &k = kernels_.rowwise](Tensor h, int ith, int nth) {
                        k.swiglu(floats(gate), floats(up), ggml_nelements(gate), as_f32(h),
                                 as_bf16(h), ith, nth);
                    });
}

// dup takes the place of dh.
Ops::SwigluBack FusedOps::swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) {
    Tensor dgate =
        g.custom("swiglu_back", GGML_TYPE_F32, {gate->ne[0], gate->ne[1]}, {gate, up, dh},
                 [=, &k = kernels_.rowwise](Tensor d, int ith, int nth) {
                     k.swiglu_backward(floats(dh), floats(gate), floats(up), ggml_nelements(gate),
                                       floats(d), floats(dh), ith, nth);
                 });
    return {g.expand(dgate), dh};
}

} // namespace ggft
