// FusedOps: the operations on custom CPU kernels (native/kernels), one node each. Weights are
// dequantized inside the matrix products, attention never holds its scores, and dropout masks are
// hashed, not stored. A file per family defines the methods.
#pragma once

#include "kernels/gemm/prepacked.h"
#include "kernels/isa/dispatch.h"
#include "kernels/isa/work_stealing.h"
#include "rules/ops.h"

namespace ggft {

// Tensors as the kernels take them.
inline float * floats(Tensor t) {
    return (float *)t->data;
}
inline float * as_f32(Tensor t) {
    return t->type == GGML_TYPE_F32 ? floats(t) : nullptr;
}
inline uint16_t * as_bf16(Tensor t) {
    return t->type == GGML_TYPE_BF16 ? (uint16_t *)t->data : nullptr;
}
inline Rows rows_of(Tensor x) {
    return {x->data, x->type == GGML_TYPE_BF16, x->ne[0]};
}
inline Weight weight_of(Tensor w) {
    return {w->type, w->ne[1], w->ne[0], w->data, w->nb[1]};
}

// x as the products read it: itself, or packed after `done` has been computed.
Tensor packed(Graph & g, const GemmKernels & gemm, const char * name, const RowPacking & packing,
              Tensor x, Tensor done = nullptr);

class FusedOps : public Ops {
public:
    FusedOps(Mode mode, float dropout, int n_threads, size_t prepacked_bytes)
        : kernels_(find_kernels()), format_(mode == Mode::fast ? kernels_.fast : Format::f32),
          dropout_(dropout), n_threads_(n_threads), prepacked_(kernels_, format_, prepacked_bytes) {
    }

    const char * name() const override { return "fused"; }
    const KernelSet * kernel_set() const override { return &kernels_; }

    void prepack(Tensor w, bool forward) override { with_panels(w, forward); }
    size_t prepacked_bytes() const override { return prepacked_.bytes(); }
    size_t prepacked_bytes_of(Tensor w, bool forward) const override {
        return ggft::prepacked_bytes(kernels_, format_, weight_of(w), forward);
    }

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
    // What the inputs of linears are stored as: what the matrix products read.
    ggml_type linear_type() const {
        return format_ == Format::bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F32;
    }

    Weight with_panels(Tensor w, bool forward) {
        return prepacked_.with_panels(weight_of(w), forward);
    }

    // Of one node.
    std::shared_ptr<WorkStealing> stealing() const {
        return std::make_shared<WorkStealing>(n_threads_);
    }

    const KernelSet & kernels_;
    Format format_;
    float dropout_;
    int n_threads_;
    PrepackedWeights prepacked_;
};

} // namespace ggft
