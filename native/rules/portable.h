// GgmlOps: every operation and its local gradient composed of ops that ggml's GPU backends have. In
// particular none of OUT_PROD, RMS_NORM_BACK, SOFT_MAX_BACK, CROSS_ENTROPY_LOSS(_BACK), REPEAT_BACK
// or GET_ROWS_BACK, which Metal lacks. The same graph runs on every device. A file per family
// defines the methods.
//
// GPUs may round the operands of a product to half precision: Metal always does. Emulated on
// SmolLM2, that moves the gradient by 0.4%, and a gradient 1000 times as large still fits; so the
// loss needs no scaling.
#pragma once

#include "rules/ops.h"

namespace ggft {

// aᵀ b. Sums in F32 everywhere: backends may otherwise sum in half precision, CUDA among them.
Tensor product(ggml_context * c, Tensor a, Tensor b);
Tensor transposed(Graph & g, Tensor x);
// How many pieces a weight is dequantized in, and attention computed in.
int64_t n_pieces(Tensor w);
int64_t n_head_pieces(const Inputs & in, int64_t n_head, int64_t n_head_kv);
// The other one where one is null.
Tensor add(Graph & g, Tensor a, Tensor b);
Tensor concat(Graph & g, Tensor a, Tensor b, int dim);

class GgmlOps : public Ops {
public:
    GgmlOps(const Inputs & in, Mode mode, bool quantized_forward)
        : in_(in), mode_(mode), quantized_forward_(quantized_forward) {}

    const char * name() const override { return "ggml"; }
    size_t n_nodes_max(const Inputs & in, const Model & model) const override;

    Tensor rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool for_linear) override;
    Tensor rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                         Tensor residual) override;

    LinearInput linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                             std::vector<const LoraPair *> adapters) override;
    Tensor dropped(Graph & g, const LinearInput & in) override;
    Tensor linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                  Tensor residual) override;
    Tensor linear_back(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                       Tensor dy, Tensor acc, bool need_dx) override;

    Tensor rope(Graph & g, const Inputs & in, const Rope & rope, Tensor x) override;
    Tensor rope_back(Graph & g, const Inputs & in, const Rope & rope, Tensor dy) override;

    Tensor attention(Graph & g, const Inputs & in, const Qkv & x, float scale) override;
    Tensor attention_out(Graph & g, Tensor attn, int64_t n_embd, int64_t n_tokens) override;
    Qkv attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor attn, Tensor dout,
                       float scale) override;

    Tensor swiglu(Graph & g, Tensor gate, Tensor up) override;
    SwigluBack swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) override;

    Loss loss(Graph & g, const Linear & w, Tensor n, Tensor labels, Tensor label_at,
              bool need_dn) override;

private:
    Tensor dequantized(Graph & g, Tensor w, int64_t r0, int64_t n) const;
    Tensor matmul(Graph & g, Tensor w, Tensor x) const;
    Tensor matmul_transposed(Graph & g, Tensor w, Tensor dy) const;

    const Inputs & in_;
    Mode mode_;
    bool quantized_forward_;
};

} // namespace ggft
