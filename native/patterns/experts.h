// Products by the matrices of chosen experts, as custom CPU nodes: each matrix is dequantized a few
// rows at a time for all tokens that chose it. Source: ggml_mul_mat_id in ggml.h.
#pragma once

#include "base/graph.h"
#include "kernels/rowwise/rowwise.h"

namespace ggft {

// y[:, j, t] = w[ids[j, t]] x[:, j, t]. w is [k, m, experts] of any type, x F32 [k, 1 or used,
// tokens], ids I32 [used, tokens]; y is [m, used, tokens].
Tensor expert_products(Graph & g, const RowwiseKernels & k, Tensor w, Tensor x, Tensor ids);
// dx = wᵀ dy for each of them, [k, used, tokens]: what x shared among experts gets is their sum.
Tensor expert_products_back(Graph & g, const RowwiseKernels & k, Tensor w, Tensor dy, Tensor ids);

} // namespace ggft
