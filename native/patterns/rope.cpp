// Rotary positions, from cached angles.
#include "kernels/rowwise/rowwise.h"
#include "patterns/fused.h"

namespace ggft {

// In place on a linear's result, which nothing else reads.
static Tensor rotate(Graph & g, const RowwiseKernels & k, const Inputs & in, const Rope & r,
                     Tensor x, bool backward) {
    const RopeMode mode = r.mode == GGML_ROPE_TYPE_NEOX ? RopeMode::neox : RopeMode::norm;
    const int n_rot = r.n_dims;
    Tensor cos = in.fused.rope_cos, sin = in.fused.rope_sin;
    return g.custom_inplace("rope", x, {cos, sin}, [=, &k](Tensor y, int ith, int nth) {
        const int64_t row = y->ne[0] * y->ne[1];
        k.rope(floats(y), row, floats(cos), floats(sin), mode, n_rot, (int)y->ne[0], (int)y->ne[1],
               y->ne[2], backward, floats(y), row, ith, nth);
    });
}

Tensor FusedOps::rope(Graph & g, const Inputs & in, const Rope & r, Tensor x) {
    return rotate(g, kernels_.rowwise, in, r, x, false);
}

Tensor FusedOps::rope_back(Graph & g, const Inputs & in, const Rope & r, Tensor dy) {
    return rotate(g, kernels_.rowwise, in, r, dy, true);
}

} // namespace ggft
