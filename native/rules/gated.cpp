// The gated unit, silu(gate) * up.
#include "rules/portable.h"

namespace ggft {

Tensor GgmlOps::swiglu(Graph & g, Tensor gate, Tensor up) {
    return ggml_swiglu_split(g.ctx(), gate, up);
}

// dup = dh silu(gate), dgate = dh up silu'(gate).
Ops::SwigluBack GgmlOps::swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) {
    ggml_context * c = g.ctx();
    return {ggml_silu_back(c, ggml_mul(c, dh, up), gate), ggml_swiglu_split(c, gate, dh)};
}

} // namespace ggft
