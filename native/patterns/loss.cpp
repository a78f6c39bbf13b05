// The loss head: logits, cross entropy and gradient in one place.
#include "kernels/rowwise/cross_entropy.h"
#include "patterns/fused.h"

namespace ggft {

// The logits' gradient takes the logits' place, in fast mode as BF16 in the first half of each
// row.
Ops::Loss FusedOps::loss(Graph & g, const Linear & w, Tensor n, Tensor labels, Tensor,
                         bool need_dn) {
    LinearInput in;
    in.x = n;
    in.fused.packed =
        packed(g, kernels_.gemm, "loss_rows", kernels_.gemm.packing_nt(format_, n->ne[0]), n);
    Tensor z = linear(g, w, {}, in, nullptr);
    ggml_set_name(z, "loss_logits");
    const bool bf16 = linear_type() == GGML_TYPE_BF16;
    const int64_t V = z->ne[0], M = z->ne[1];
    Tensor nats = g.custom("cross_entropy", GGML_TYPE_F64, {M}, {z, labels},
                           [=, &k = kernels_.loss](Tensor nats, int ith, int nth) {
                               const LogitGradient gradient{
                                   need_dn, bf16 ? (uint16_t *)z->data : nullptr, 2 * V};
                               k.cross_entropy(floats(z), V, (const int32_t *)labels->data, V, M,
                                               gradient, (double *)nats->data, ith, nth);
                           });
    if (!need_dn) {
        return {nats, nullptr};
    }
    Tensor W = w.weight;
    const Weight weight = with_panels(W, false);
    Tensor dz =
        packed(g, kernels_.gemm, "loss_rows", kernels_.gemm.packing_nn(format_, weight), z, nats);
    Tensor dn = g.custom("loss_back", GGML_TYPE_F32, {W->ne[0], M}, {W, nats, dz},
                         [=, &k = kernels_.gemm, format = format_,
                          stealing = stealing()](Tensor dn, int ith, int nth) {
                             k.nn(format, weight, {dz->data, bf16, bf16 ? 2 * V : V}, nullptr,
                                  {floats(dn), dn->ne[0]}, M, stealing.get(), ith, nth);
                         });
    return {nats, dn};
}

} // namespace ggft
