// Linears with LoRA: a dequantized product and its adapter in one node.
#include "kernels/gemm/lora.h"
#include "kernels/rowwise/dropout.h"
#include "patterns/fused.h"

namespace ggft {

// Where in the stacked u an adapter's rows begin.
static int64_t row_of(const LinearInput & in, const LoraPair & lora) {
    int64_t at = 0;
    for (const LoraPair * p : in.adapters) {
        if (p->a == lora.a) {
            break;
        }
        at += p->a->ne[1];
    }
    return at;
}

// du = scale Bᵀ dy; adds dA = du dropout(x)ᵀ and dB = scale dy uᵀ.
static Tensor lora_gradients(Graph & g, const LoraKernels & k, const LoraPair & lora,
                             const LinearInput & in, Tensor dy) {
    Tensor x = in.x, u = in.fused.u;
    const LoraPair pair = lora;
    const int64_t at = row_of(in, lora), C = x->ne[0], N = x->ne[1];
    const int R = (int)lora.b->ne[0];
    Tensor du = g.custom("lora_up_t", GGML_TYPE_F32, {R, N}, {dy, lora.b},
                         [=, &k](Tensor du, int ith, int nth) {
                             k.up_t(rows_of(dy), floats(pair.b), R, pair.scale, dy->ne[0], N,
                                    floats(du), R, ith, nth);
                         });
    g.expand(
        g.custom_inplace("lora_grad_b", lora.db, {dy, u}, [=, &k](Tensor db, int ith, int nth) {
            k.grad_b(rows_of(dy), floats(u) + at, u->ne[0], R, pair.scale, dy->ne[0], N, floats(db),
                     ith, nth);
        }));
    const Dropout dropout{in.fused.dropout, in.fused.seed};
    g.expand(
        g.custom_inplace("lora_grad_a", lora.da, {x, du}, [=, &k](Tensor da, int ith, int nth) {
            k.grad_a(rows_of(x), dropout, floats(du), R, R, 1.0f, C, N, floats(da), ith, nth);
        }));
    return du;
}

// All adapters that read x are projected down in one pass over it.
LinearInput FusedOps::linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                                   std::vector<const LoraPair *> adapters) {
    LinearInput r;
    r.x = x;
    r.fused.packed =
        packed(g, kernels_.gemm, "matmul_rows", kernels_.gemm.packing_nt(format_, x->ne[0]), x);
    r.adapters = std::move(adapters);
    if (dropout && in.seed != 0) {
        r.fused.dropout = dropout_;
        r.fused.seed = dropout_mix(in.seed + (uint64_t)id * 0x9e3779b97f4a7c15ull);
    }
    if (r.adapters.empty()) {
        return r;
    }
    std::vector<Tensor> args = {x};
    int64_t R = 0;
    for (const LoraPair * p : r.adapters) {
        args.push_back(p->a);
        R += p->a->ne[1];
    }
    auto kernel = [=, &k = kernels_.lora, a = args](Tensor u, int ith, int nth) {
        LoraDown down[N_SITES];
        int64_t at = 0;
        for (size_t i = 1; i < a.size(); i++) {
            down[i - 1] = {floats(a[i]), (int)a[i]->ne[1], floats(u) + at, u->ne[0]};
            at += a[i]->ne[1];
        }
        k.down(rows_of(x), {r.fused.dropout, r.fused.seed}, x->ne[0], x->ne[1], down,
               (int)a.size() - 1, ith, nth);
    };
    r.fused.u = g.custom("lora_down", GGML_TYPE_F32, {R, x->ne[1]}, args, kernel);
    return r;
}

Tensor FusedOps::dropped(Graph & g, const LinearInput & in) {
    if (in.fused.dropout == 0) {
        return in.x;
    }
    Tensor x = in.x;
    const float p = in.fused.dropout;
    return g.custom("dropout", GGML_TYPE_F32, {x->ne[0], x->ne[1]}, {x},
                    [=, seed = in.fused.seed](Tensor y, int ith, int nth) {
                        for (int64_t t = ith; t < x->ne[1]; t += nth) {
                            for (int64_t c = 0; c < x->ne[0]; c++) {
                                const int64_t i = t * x->ne[0] + c;
                                floats(y)[i] = floats(x)[i] * dropout_factor(seed, t, c, p);
                            }
                        }
                    });
}

Tensor FusedOps::linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                        Tensor residual) {
    Tensor W = w.weight, u = lora ? in.fused.u : nullptr;
    const Weight weight = with_panels(W, true);
    const LoraPair pair = lora;
    const int64_t at = lora ? row_of(in, lora) : 0;
    Tensor x = in.fused.packed;
    std::vector<Tensor> args = {W, x};
    if (u != nullptr) {
        args.push_back(u);
    }
    Tensor y = g.custom("matmul", GGML_TYPE_F32, {W->ne[1], in.x->ne[1]}, args,
                        [=, &k = kernels_.gemm, format = format_,
                         stealing = stealing()](Tensor y, int ith, int nth) {
                            LowRank low{};
                            if (u != nullptr) {
                                low = {floats(u) + at, u->ne[0], floats(pair.b), (int)pair.b->ne[0],
                                       pair.scale};
                            }
                            k.nt(format, weight, rows_of(x), u ? &low : nullptr,
                                 {floats(y), y->ne[0]}, y->ne[1], stealing.get(), ith, nth);
                        });
    if (w.bias != nullptr) {
        y = ggml_add(g.ctx(), y, w.bias);
    }
    return residual == nullptr ? y : ggml_add(g.ctx(), y, residual);
}

Tensor FusedOps::linear_back(Graph & g, const Linear & w, const LoraPair & lora,
                             const LinearInput & in, Tensor dy, Tensor acc, bool need_dx) {
    Tensor W = w.weight, du = lora ? lora_gradients(g, kernels_.lora, lora, in, dy) : nullptr;
    const LoraPair pair = lora;
    if (!need_dx) {
        return acc;
    }
    const int64_t N = dy->ne[1];
    const Weight weight = with_panels(W, false);
    dy = packed(g, kernels_.gemm, "matmul_rows", kernels_.gemm.packing_nn(format_, weight), dy);
    std::vector<Tensor> args = {W, dy};
    if (du != nullptr) {
        args.push_back(du);
    }
    auto kernel = [=, &k = kernels_.gemm, format = format_, stealing = stealing(),
                   p = in.fused.dropout, seed = in.fused.seed](Tensor dx, int ith, int nth) {
        LowRank low{};
        if (du != nullptr) {
            low = {floats(du), du->ne[0], floats(pair.a), (int)du->ne[0], 1.0f, p, seed};
        }
        k.nn(format, weight, rows_of(dy), du ? &low : nullptr,
             {floats(dx), dx->ne[0], acc != nullptr}, dx->ne[1], stealing.get(), ith, nth);
    };
    return acc != nullptr ? g.custom_inplace("matmul_back", acc, args, kernel)
                          : g.custom("matmul_back", GGML_TYPE_F32, {W->ne[0], N}, args, kernel);
}

} // namespace ggft
