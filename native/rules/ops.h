// The differentiable operations of a decoder, each forward beside its vector-Jacobian product, as
// nodes of a ggml graph. Two implementations build them: GgmlOps from ops that every GPU backend
// has, FusedOps from custom CPU kernels. Shapes are ggml's `ne` order; N = B*T tokens of a
// micro-batch.
//
// B batch rows, T tokens per row, C embedding, H heads, K kv-heads, D head size, F feed-forward, V
// vocabulary, R rank. `dx` is the gradient of the loss by `x`.
#pragma once

#include "base/graph.h"
#include "model/lora.h"
#include "model/model.h"

#include <memory>
#include <string>
#include <vector>

namespace ggft {

// f32: everything in F32, the reference. fast: weights and activations of matrix products in 16
// bits.
enum class Mode { fast, f32 };

// What a micro-batch puts on the device: written once, read by every graph.
struct Inputs {
    int64_t B = 0, T = 0;
    Tensor tokens = nullptr;    // I32 [N]
    Tensor positions = nullptr; // I32 [N], restart at each example
    Tensor rows = nullptr;      // I32 [N], indices of the trained positions, then padding
    Tensor labels = nullptr;    // I32 [N], their targets
    Tensor weights = nullptr;   // F32 [1, N], factors on their losses, where weighted
    bool weighted = false;
    struct {                       // what GgmlOps reads besides
        Tensor mask = nullptr;     // F16 [T, T, 1, B], 0 where attended, -60000 elsewhere
        Tensor spans = nullptr;    // F32 [1, N, 2], first and last attended position within the row
        Tensor label_at = nullptr; // I32 [N], label + V * (index within its chunk)
        Tensor arange = nullptr;   // I32 [max rows of a weight], 0 1 2 ...
        Tensor pool = nullptr;     // F32 [max C_in, P] rows of dropout multipliers
        Tensor pool_ids = nullptr; // I32 [sites * stride] rows of the pool for each token
    } portable;
    struct {                       // what FusedOps reads besides
        Tensor starts = nullptr;   // I32 [N], index of the first token of a token's example
        Tensor rope_cos = nullptr; // F32 [n_dims/2, N] cosine of each pair's angle
        Tensor rope_sin = nullptr;
    } fused;
    uint64_t seed = 0; // 0: no dropout

    int64_t N() const { return B * T; }
    // Elements from one site's ids to the next: views start where every device can bind them.
    int64_t pool_stride() const { return (N() + 63) / 64 * 64; }
};

// The input of one or more linears: x, and what LoRA sees of it.
struct LinearInput {
    Tensor x = nullptr; // [C_in, N]
    struct {
        Tensor dropped = nullptr; // dropout(x), or x itself without dropout
        Tensor keep = nullptr;    // [C_in, N] the multipliers, or null
    } portable;
    struct {
        Tensor u = nullptr;      // [R * adapters, N] A dropout(x) of each adapter, stacked
        Tensor packed = nullptr; // x as the products read it
        float dropout = 0;       // its probability and the seed of its mask
        uint64_t seed = 0;
    } fused;
    std::vector<const LoraPair *> adapters; // those that read this input
};

// The activations of a block that its backward pass reads. Recomputed, or kept between the passes.
struct Activations {
    Tensor q_raw = nullptr; // [D, H, N] before its norm; null without one
    Tensor k_raw = nullptr; // [D, K, N]
    Tensor q = nullptr;     // [D, H, N] rotated
    Tensor k = nullptr;     // [D, K, N] rotated
    Tensor v = nullptr;     // [D, K, N]
    Tensor attn = nullptr;  // attention's result and, behind it, what its backward pass needs
    Tensor x_mid = nullptr; // [C, N] between attention and feed-forward
    Tensor gate = nullptr;  // [F, N]
    Tensor up = nullptr;    // [F, N]
};

struct Qkv {
    Tensor q, k, v;
};

struct KernelSet; // kernels/isa/dispatch.h

class Ops {
public:
    virtual ~Ops() = default;

    // n = x / rms(x) * w over the first dimension (Zhang & Sennrich 2019), as F32 or, for_linear,
    // as whatever the matrix products read best. x is [C, rows].
    virtual Tensor rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool for_linear) = 0;
    // dx = residual + r (dn*w - n̂ mean(dn*w * n̂)) with r = 1/rms, n̂ = x r. residual may be null,
    // and may be overwritten.
    virtual Tensor rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                                 Tensor residual) = 0;

    // x with its dropout (inverted: kept values are divided by 1 - p). `id` tells one mask from
    // another: distinct per layer and input. `adapters` are those of the linears that will read x.
    virtual LinearInput linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                                     std::vector<const LoraPair *> adapters) = 0;
    // dropout(x) itself.
    virtual Tensor dropped(Graph & g, const LinearInput & in) = 0;
    // y = W x + bias + scale B (A dropout(x)) + residual. [C_out, N]; residual may be null.
    virtual Tensor linear(Graph & g, const Linear & w, const LoraPair & lora,
                          const LinearInput & in, Tensor residual) = 0;
    // Adds dA and dB, returns dx + acc where dx = Wᵀ dy + dropout'(scale Aᵀ Bᵀ dy); acc may be
    // null. Returns acc unchanged when need_dx is false.
    virtual Tensor linear_back(Graph & g, const Linear & w, const LoraPair & lora,
                               const LinearInput & in, Tensor dy, Tensor acc, bool need_dx) = 0;

    virtual Tensor rope(Graph & g, const Inputs & in, const Rope & rope, Tensor x) = 0;
    virtual Tensor rope_back(Graph & g, const Inputs & in, const Rope & rope, Tensor dy) = 0;

    // Causal attention within each example. Returns what Activations::attn holds.
    virtual Tensor attention(Graph & g, const Inputs & in, const Qkv & x, float scale) = 0;
    virtual Tensor attention_out(Graph & g, Tensor attn, int64_t n_embd,
                                 int64_t n_tokens) = 0; // [H*D, N]
    virtual Qkv attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor attn,
                               Tensor dout, float scale) = 0;

    // h = silu(gate) * up.
    virtual Tensor swiglu(Graph & g, Tensor gate, Tensor up) = 0;
    struct SwigluBack {
        Tensor dgate, dup;
    };
    // dh may be overwritten.
    virtual SwigluBack swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) = 0;

    // Cross entropy of rows n [C, M] against labels [M] through the output matrix W [C, V].
    struct Loss {
        Tensor nats; // [M] F32 or F64
        Tensor dn;   // [C, M] gradient of the sum of nats, null when not asked for
    };
    virtual Loss loss(Graph & g, const Linear & w, Tensor n, Tensor labels, Tensor label_at,
                      bool need_dn) = 0;

    virtual const char * name() const = 0;
    // Those of the CPU's instruction set, or null.
    virtual const KernelSet * kernel_set() const { return nullptr; }

    // Keeps a weight as the products of a direction read it, if there is room left.
    virtual void prepack(Tensor, bool /*forward*/) {}
    virtual size_t prepacked_bytes() const { return 0; } // of those that are kept
    // Bytes that one takes; 0 if it is never kept.
    virtual size_t prepacked_bytes_of(Tensor, bool /*forward*/) const { return 0; }
    // Nodes of a graph over a block or the loss head, at most.
    virtual size_t n_nodes_max(const Inputs &, const Model &) const { return 1024; }
};

// quantized_forward: multiply quantized weights directly (GPUs keep the activations in floating
// point).
std::unique_ptr<Ops> make_ggml_ops(const Inputs & in, Mode mode, bool quantized_forward);
// Why the CPU's kernels cannot compute a model, or "".
std::string fused_lack(const Model & model);
// prepacked_bytes: of weights to keep as the products read them, at most.
std::unique_ptr<Ops> make_fused_ops(Mode mode, float dropout, int n_threads,
                                    size_t prepacked_bytes);

} // namespace ggft
