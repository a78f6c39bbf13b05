// The engine's memory and its graphs: a graph per block, so that a device is never busy for long,
// the display stays alive and a run can be stopped at every border.
#include "base/error.h"
#include "engine/engine.h"

#include <algorithm>
#include <numeric>

namespace ggft {

// ---- buffers ----

// Activations are pieces of flat tensors, each piece on this boundary.
static constexpr size_t KEEP_ALIGN = 256;

static Tensor base_of(Tensor t) {
    return t->view_src != nullptr ? t->view_src : t;
}

static constexpr Tensor Activations::* FIELDS[] = {
    &Activations::q_raw, &Activations::k_raw, &Activations::q,    &Activations::k, &Activations::v,
    &Activations::attn,  &Activations::x_mid, &Activations::gate, &Activations::up};

void Engine::allocate_saved() {
    const int64_t C = model_->hparams.n_embd, N = config_.n_rows * config_.n_tokens;
    const int64_t n_adapted =
        config_.lora.train ? model_->hparams.n_layer - config_.lora.layer_first : 0;
    saved_buffer_ =
        std::make_unique<TensorBuffer>("saved inputs", ggml_backend_dev_buffer_type(device_),
                                       memory_, (size_t)(2 * n_adapted + 8));
    for (int64_t i = 0; i <= n_adapted; i++) {
        saved_.push_back(saved_buffer_->add(GGML_TYPE_F32, {C, N}, "saved." + std::to_string(i)));
    }
    if (config_.lora.train) {
        dx_ = saved_buffer_->add(GGML_TYPE_F32, {C, N}, "dx");
    }
    nats_ = saved_buffer_->add(fused_ ? GGML_TYPE_F64 : GGML_TYPE_F32, {N}, "nats");
    if (config_.keep) {
        // Sized by a block's graph at the largest shape.
        in_.B = config_.n_rows;
        in_.T = config_.n_tokens;
        Graph g = new_graph();
        Tensor x = ggml_new_tensor_2d(g.ctx(), GGML_TYPE_F32, C, N);
        size_t bytes = 0;
        const Activations act = decoder_->forward(g, config_.lora.layer_first, x, true).act;
        for (auto field : FIELDS) {
            if (Tensor t = act.*field) {
                bytes += GGML_PAD(ggml_nbytes(base_of(t)), KEEP_ALIGN);
            }
        }
        for (int64_t i = 0; i < n_adapted; i++) {
            kept_.push_back(
                saved_buffer_->add(GGML_TYPE_I8, {(int64_t)bytes}, "kept." + std::to_string(i)));
        }
        kept_fields_.resize((size_t)n_adapted);
    }
    saved_buffer_->allocate();
}

// Places the activations of a block's graph into the block's kept memory, before the graph is
// allocated.
void Engine::keep(const Activations & act, int64_t layer) {
    const size_t i = (size_t)(layer - config_.lora.layer_first);
    size_t offset = 0;
    kept_fields_[i].clear();
    for (auto field : FIELDS) {
        Tensor t = act.*field;
        if (t == nullptr) {
            continue;
        }
        Tensor base = base_of(t);
        saved_buffer_->place(base, kept_[i], offset);
        kept_fields_[i].push_back(
            {field, t->type, {t->ne[0], t->ne[1], t->ne[2], t->ne[3]}, offset});
        offset += GGML_PAD(ggml_nbytes(base), KEEP_ALIGN);
    }
}

Activations Engine::kept_of(Graph & g, int64_t layer) const {
    const size_t i = (size_t)(layer - config_.lora.layer_first);
    Activations act;
    for (const KeptField & f : kept_fields_[i]) {
        Tensor t = ggml_new_tensor(g.ctx(), f.type, 4, f.ne);
        saved_buffer_->place(t, kept_[i], f.offset);
        act.*f.field = t;
    }
    return act;
}

// ---- graphs ----

Tensor Engine::rows_of(Graph & g, Tensor buffer) const {
    return ggml_view_2d(g.ctx(), buffer, buffer->ne[0], in_.N(), buffer->nb[1], 0);
}

// Where the input of a block lives. Blocks below the first adapted one share one buffer, and so do
// all blocks when nothing is to be trained.
Tensor Engine::input_of(Graph & g, int64_t layer, bool training) const {
    const int64_t i = training ? std::max<int64_t>(0, layer - config_.lora.layer_first) : 0;
    return rows_of(g, saved_[(size_t)i]);
}

std::vector<int64_t> Engine::all_layers() const {
    std::vector<int64_t> layers((size_t)model_->hparams.n_layer);
    std::iota(layers.begin(), layers.end(), 0);
    return layers;
}

void Engine::each_graph(const std::vector<int64_t> & layers, bool training,
                        const std::function<void(Graph)> & visit) {
    in_.B = config_.n_rows;
    in_.T = config_.n_tokens;
    in_.seed = training && config_.lora.dropout > 0 ? 1 : 0;
    if (in_.portable.mask != nullptr && !training) {
        visit(mask_graph());
    }
    visit(embed_graph(training));
    for (int64_t l : layers) {
        visit(block_forward_graph(l, training));
        if (training && l >= config_.lora.layer_first) {
            visit(block_backward_graph(l));
        }
    }
    visit(head_graph(0, std::min(chunk_, in_.N()), training));
}

Graph Engine::new_graph() const {
    return Graph(ops_->n_nodes_max(in_, *model_));
}

Graph Engine::embed_graph(bool training) {
    Graph g(64);
    g.expand(ggml_cpy(g.ctx(), decoder_->embed(g), input_of(g, 0, training)));
    return g;
}

// The last node holds the logits.
Graph Engine::logits_graph(int64_t first, int64_t n) {
    Graph g = new_graph();
    Tensor y = decoder_->logits(g, input_of(g, model_->hparams.n_layer, false), first, n);
    ggml_set_output(g.expand(y));
    return g;
}

Graph Engine::block_forward_graph(int64_t layer, bool training) {
    Graph g = new_graph();
    const bool adapted = layer >= config_.lora.layer_first;
    Tensor x = input_of(g, layer, training);
    Block block = decoder_->forward(g, layer, x, training);
    if (training && adapted && config_.keep) {
        keep(block.act, layer);
    }
    Tensor out = decoder_->finish(g, layer, block, training);
    g.expand(ggml_cpy(g.ctx(), out, input_of(g, layer + 1, training)));
    return g;
}

Graph Engine::block_backward_graph(int64_t layer) {
    Graph g = new_graph();
    Tensor x = input_of(g, layer, true), dy = rows_of(g, dx_);
    const Block block = config_.keep ? decoder_->restore(g, layer, x, kept_of(g, layer), true)
                                     : decoder_->forward(g, layer, x, true);
    const bool need_dx = layer > config_.lora.layer_first;
    Tensor dx = decoder_->backward(g, layer, x, block, dy, true, need_dx);
    // Fused gradients are already accumulated in place.
    if (need_dx) {
        g.expand(base_of(dx) == dx_ ? dx : ggml_cpy(g.ctx(), dx, dy));
    }
    return g;
}

Graph Engine::head_graph(int64_t first, int64_t n, bool training) {
    Graph g = new_graph();
    Tensor x = input_of(g, model_->hparams.n_layer, training);
    Tensor nats = decoder_->head(g, x, first, n, training ? rows_of(g, dx_) : nullptr);
    g.expand(
        ggml_cpy(g.ctx(), nats, ggml_view_1d(g.ctx(), nats_, n, (size_t)first * nats_->nb[0])));
    return g;
}

// ---- the graph against the device ----

static std::string denied_family; // see deny_family

void deny_family(const std::string & family) {
    denied_family = family;
}

std::vector<NodeReport> Engine::graph_report(bool gpu) {
    if (gpu && !fused_) {
        // The same decoder over the operations that a GPU gets.
        auto ops = make_ggml_ops(in_, config_.mode, /*quantized_forward=*/true);
        auto decoder = std::make_unique<Decoder>(*model_, *lora_, *ops, in_);
        struct Swapped {
            std::unique_ptr<Decoder> &a, &b;
            Swapped(std::unique_ptr<Decoder> & a, std::unique_ptr<Decoder> & b) : a(a), b(b) {
                a.swap(b);
            }
            ~Swapped() { a.swap(b); }
        } swapped(decoder, decoder_);
        return graph_report(false);
    }
    require(!gpu, ErrorKind::input,
            "the graph of a GPU needs an engine opened with kernels 'ggml'");
    GraphReport report(backend_.get(), denied_family);
    auto add = [&](Graph g) { report.add(g); };
    if (config_.lora.train) {
        each_graph(all_layers(), true, add);
        add(lora_->norm_graph());
        add(lora_->step_graph());
    }
    each_graph(all_layers(), false, add);
    add(logits_graph(0, std::min(chunk_, in_.N())));
    return report.nodes();
}

void Engine::check_graphs() {
    require_supported(graph_report(), device_);
}

} // namespace ggft
