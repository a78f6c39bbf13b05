#include "engine/memory.h"

#include "base/devices.h"
#include "base/error.h"

#include <algorithm>
#include <set>

namespace ggft {

// ---- weights that are kept as the products read them ----

// Keeps the weights that are first met.
void Engine::prepack() {
    each_product([this](Tensor w, bool forward) { ops_->prepack(w, forward); });
}

size_t Engine::prepackable_bytes() const {
    size_t bytes = 0;
    each_product([&](Tensor w, bool forward) { bytes += ops_->prepacked_bytes_of(w, forward); });
    return bytes;
}

// In the order of the blocks: Decoder::forward's products, then Decoder::backward's.
template <class F> void Engine::each_product(F f) const {
    const int64_t first = config_.lora.layer_first;
    for (int64_t l = 0; l < model_->hparams.n_layer; l++) {
        const Linear * linear = model_->layers[(size_t)l].linear;
        for (int site = 0; site < N_SITES; site++) {
            f(linear[site].weight, true);
        }
        if (!config_.lora.train || l < first) {
            continue;
        }
        for (int site = N_SITES - 1; site >= 0; site--) {
            // Below the first adapted block no gradient is needed.
            if (l > first || (site != ATTN_Q && site != ATTN_K && site != ATTN_V)) {
                f(linear[site].weight, false);
            }
        }
    }
    f(model_->output, true);
    if (config_.lora.train) {
        f(model_->output, false);
    }
}

// ---- the compute buffer ----

std::vector<int64_t> Engine::distinct_layers() const {
    const int64_t first = config_.lora.layer_first;
    std::set<std::vector<int64_t>> kinds;
    std::vector<int64_t> layers;
    for (int64_t l : all_layers()) {
        std::vector<int64_t> kind = {l < first, l == first};
        for (int site = 0; site < N_SITES; site++) {
            const Linear & linear = model_->layers[(size_t)l].linear[site];
            kind.push_back(linear.weight->type);
            kind.push_back(linear.bias != nullptr);
            kind.push_back((bool)lora_->pair(l, site));
        }
        if (kinds.insert(kind).second) {
            layers.push_back(l);
        }
    }
    return layers;
}

// Allocates the compute buffer for the largest graphs now, so that a run that starts does not end
// for want of it.
void Engine::reserve() {
    const std::vector<int64_t> layers = distinct_layers();
    auto visit = [this](Graph g) { reserve(std::move(g)); };
    if (config_.lora.train) {
        each_graph(layers, true, visit);
    }
    each_graph(layers, false, visit);
}

void Engine::reserve(Graph g) {
    if (memory_ == Memory::measured) {
        size_t bytes = 0;
        ggml_gallocr_reserve_n_size(alloc_.get(), g.graph(), nullptr, nullptr, &bytes);
        compute_bytes_ = std::max(compute_bytes_, bytes);
        return;
    }
    require(ggml_gallocr_reserve(alloc_.get(), g.graph()), ErrorKind::resource,
            std::string("out of memory for the compute buffer on ") +
                ggml_backend_dev_name(device_));
}

Buffers Engine::buffer_bytes() const {
    const bool measured = memory_ == Memory::measured;
    return {
        {"weights", model_->bytes()},
        {"lora", lora_->bytes()},
        {"inputs", inputs_->bytes()},
        {"saved", saved_buffer_->bytes()},
        {"prepacked", ops_->prepacked_bytes()},
        {"compute", measured ? compute_bytes_ : ggml_gallocr_get_buffer_size(alloc_.get(), 0)},
    };
}

// ---- without taking any ----

Forecast::Forecast(const EngineConfig & config)
    : config_(config),
      model_(std::make_shared<Model>(config.paths, find_device(config.device), Memory::measured)) {
    config_.n_rows = 1;
    config_.n_tokens = 2;
    config_.keep = false;
    config_.prepacked_bytes = 0;
    Engine engine(config_, model_, Memory::measured);
    kernels_ = engine.kernels();
    prepackable_bytes_ = engine.prepackable_bytes();
    for (const Parameter & p : engine.lora().parameters()) {
        n_parameters_ += p.ne0 * p.ne1;
    }
}

Buffers Forecast::buffers(int64_t n_rows, int64_t n_tokens, bool keep,
                          size_t prepacked_bytes) const {
    EngineConfig config = config_;
    config.n_rows = n_rows;
    config.n_tokens = n_tokens;
    config.keep = keep;
    config.prepacked_bytes = prepacked_bytes;
    return Engine(config, model_, Memory::measured).buffer_bytes();
}

} // namespace ggft
