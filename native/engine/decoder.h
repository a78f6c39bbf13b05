// The decoder block forward and backward, side by side, and the loss head: which operation follows
// which, and nothing about how they are computed (ops.h) or where tensors live (engine.h).
#pragma once

#include "rules/ops.h"

namespace ggft {

// A block on its way: its activations and the inputs of its linears, built by `forward` or
// restored.
struct Block {
    Activations act;
    LinearInput attn_in, output_in, ffn_in;
};

class Decoder {
public:
    Decoder(const Model & model, const Lora & lora, Ops & ops, const Inputs & inputs)
        : model_(model), lora_(lora), ops_(ops), in_(inputs) {}

    // What a block's linears read, by their place in it: a stage of the block.
    enum Stage { IN_ATTN, IN_OUTPUT, IN_FFN, IN_DOWN, N_STAGES };

    // x [C, N] -> the block up to gate and up: all that its backward pass reads.
    Block forward(Graph & g, int64_t layer, Tensor x, bool dropout) const;
    // The rest of the forward pass: x of the next block [C, N].
    Tensor finish(Graph & g, int64_t layer, const Block & block, bool dropout) const;
    // Rebuilds a block from activations that were kept, with the same nodes as `forward`.
    Block restore(Graph & g, int64_t layer, Tensor x, const Activations & act, bool dropout) const;
    // Mirror of forward and finish. dy [C, N] -> dx [C, N], or null when need_dx is false.
    Tensor backward(Graph & g, int64_t layer, Tensor x, const Block & block, Tensor dy,
                    bool dropout, bool need_dx) const;

    Tensor embed(Graph & g) const; // tokens -> [C, N]
    // Loss of the rows [first, first+n) of Inputs::rows in x [C, N]; adds dx of those rows when dx
    // is given.
    Tensor head(Graph & g, Tensor x, int64_t first, int64_t n, Tensor dx) const;
    Tensor logits(Graph & g, Tensor x, int64_t first,
                  int64_t n) const; // [V, n] of tokens [first, first+n)

    // Attention [H*D, N] over queries, keys and values as a layer's linears give them.
    Tensor attend(Graph & g, const Layer & layer, Tensor q, Tensor k, Tensor v,
                  Activations & act) const;

private:
    LinearInput input(Graph & g, int64_t layer, int stage, Tensor x, bool dropout) const;
    LinearInput norm_input(Graph & g, int64_t layer, int stage, Tensor x, Tensor norm,
                           bool dropout) const {
        Tensor n = ops_.rms_norm(g, x, norm, model_.hparams.norm_eps, /*for_linear=*/true);
        return input(g, layer, stage, n, dropout);
    }
    Tensor linear(Graph & g, int64_t layer, int site, const LinearInput & in,
                  Tensor residual = nullptr) const {
        return ops_.linear(g, model_.layers[(size_t)layer].linear[site], lora_.pair(layer, site),
                           in, residual);
    }
    Tensor linear_back(Graph & g, int64_t layer, int site, const LinearInput & in, Tensor dy,
                       Tensor acc, bool need_dx = true) const {
        return ops_.linear_back(g, model_.layers[(size_t)layer].linear[site],
                                lora_.pair(layer, site), in, dy, acc, need_dx);
    }

    // RMSNorm of every head and the rotation; x, the linear's result, is [D, heads, N].
    Tensor rotated(Graph & g, Tensor x, Tensor norm) const;
    Tensor rotated_back(Graph & g, Tensor x_raw, Tensor norm, Tensor dy) const;

    const Model & model_;
    const Lora & lora_;
    Ops & ops_;
    const Inputs & in_;
};

} // namespace ggft
