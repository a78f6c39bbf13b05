// Tokens go through the blocks from one stage's input to the next, and the weights in between may
// be given: so calibration sees what each linear reads, and decides the weights before going on.
#include "base/error.h"
#include "engine/engine.h"

namespace ggft {

namespace {

constexpr size_t STAGE_NODES = 256;

// A layer with the given weights in place of its own.
Layer with_given(Graph & g, Layer layer, const std::vector<GivenWeight> & given) {
    for (const GivenWeight & w : given) {
        Tensor & weight = layer.linear[w.site].weight;
        Tensor mine = ggml_new_tensor_2d(g.ctx(), w.type, weight->ne[0], weight->ne[1]);
        mine->data = const_cast<void *>(w.data);
        weight = mine;
    }
    return layer;
}

Tensor new_input(Graph & g, int64_t width, int64_t n) {
    Tensor t = ggml_new_tensor_2d(g.ctx(), GGML_TYPE_F32, width, n);
    ggml_set_input(t);
    return t;
}

Tensor new_output(Graph & g, Tensor x) {
    Tensor y = ggml_cpy(g.ctx(), x, ggml_new_tensor(g.ctx(), GGML_TYPE_F32, 2, x->ne));
    ggml_set_output(y);
    return g.expand(y);
}

} // namespace

int64_t Engine::stage_width(int stage) const {
    const Hparams & h = model_->hparams;
    return stage == Decoder::IN_OUTPUT ? h.n_head * h.n_embd_head
           : stage == Decoder::IN_DOWN ? h.n_ff
                                       : h.n_embd;
}

// residual [C, N] becomes the embeddings.
void Engine::embed(const MicroBatch & batch, float * residual) {
    cancelled_ = false;
    set_inputs(batch);
    Graph g(16);
    Tensor y = new_output(g, decoder_->embed(g));
    run(g);
    ggml_backend_tensor_get(y, residual, 0, ggml_nbytes(y));
}

LossSum Engine::loss_of(const MicroBatch & batch, const float * residual) {
    cancelled_ = false;
    set_inputs(batch);
    in_.seed = 0;
    if (n_targets_ == 0) {
        return {};
    }
    const size_t bytes = (size_t)(in_.N() * model_->hparams.n_embd) * sizeof(float);
    ggml_backend_tensor_set(saved_[0], residual, 0, bytes);
    head(false);
    return {sum_nats(n_targets_), n_targets_};
}

// From the input [width, N] of the stage before to `out`, the input of `stage` of a block. The
// stage before the first is the last of the block below, for block 0 the embedding, which has no
// input. residual [C, N], the sum so far, is brought up to date. `given` weights belong to the
// stage before. Block n_layer has one stage, what the output matrix reads.
void Engine::advance(int64_t layer, int stage, const MicroBatch & batch,
                     const std::vector<GivenWeight> & given, const float * input, float * residual,
                     float * out) {
    const Hparams & h = model_->hparams;
    const bool last = layer == h.n_layer;
    require(layer >= 0 && layer <= h.n_layer && stage >= 0 &&
                stage < (last ? 1 : (int)Decoder::N_STAGES),
            ErrorKind::input, "there is no such stage");
    require(ggml_backend_dev_type(device_) == GGML_BACKEND_DEVICE_TYPE_CPU, ErrorKind::input,
            "stages run on the CPU only");
    cancelled_ = false;
    set_inputs(batch);
    in_.seed = 0;
    const bool first = stage == Decoder::IN_ATTN;
    const int before = first ? Decoder::IN_DOWN : stage - 1;
    const int64_t block = first ? layer - 1 : layer, N = in_.N();
    Graph g(STAGE_NODES);
    Tensor x = new_input(g, h.n_embd, N), sum = x, read = nullptr;
    Layer own;
    LinearInput in;
    if (block >= 0) {
        own = with_given(g, model_->layers[(size_t)block], given);
        read = new_input(g, stage_width(before), N);
        in = ops_->linear_input(g, in_, read, 0, false, {});
    }
    auto linear = [&](int site, Tensor residual) {
        return ops_->linear(g, own.linear[site], {}, in, residual);
    };
    auto normed = [&](Tensor norm) {
        return ops_->rms_norm(g, sum, norm, h.norm_eps, /*for_linear=*/true);
    };
    Tensor y = nullptr;
    Activations act;
    switch (stage) {
    case Decoder::IN_ATTN:
        sum = block < 0 ? x : linear(FFN_DOWN, x);
        y = normed(last ? model_->output_norm : model_->layers[(size_t)layer].attn_norm);
        break;
    case Decoder::IN_OUTPUT:
        y = decoder_->attend(g, own, linear(ATTN_Q, nullptr), linear(ATTN_K, nullptr),
                             linear(ATTN_V, nullptr), act);
        break;
    case Decoder::IN_FFN:
        sum = linear(ATTN_OUTPUT, x);
        y = normed(own.ffn_norm);
        break;
    default:
        y = ops_->swiglu(g, linear(FFN_GATE, nullptr), linear(FFN_UP, nullptr));
    }
    y = new_output(g, y);
    sum = new_output(g, sum);
    check_cancelled();
    allocate_graph(g);
    ggml_backend_tensor_set(x, residual, 0, ggml_nbytes(x));
    if (read != nullptr) {
        ggml_backend_tensor_set(read, input, 0, ggml_nbytes(read));
    }
    compute(g);
    ggml_backend_tensor_get(y, out, 0, ggml_nbytes(y));
    ggml_backend_tensor_get(sum, residual, 0, ggml_nbytes(sum));
}

} // namespace ggft
