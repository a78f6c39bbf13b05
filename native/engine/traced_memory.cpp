// What a TracedEngine takes, and what one would take.
#include "base/error.h"
#include "engine/traced.h"

#include <algorithm>

namespace ggft {

size_t TracedEngine::base_bytes() const {
    return (size_t)llama_model_size(model_->get());
}

Buffers TracedEngine::buffer_bytes() const {
    const bool measured = memory_ == Memory::measured;
    return {
        {"weights", base_bytes()},
        {"lora", lora_->bytes()},
        {"inputs", prepared_.input_bytes()},
        {"saved", prepared_.arena().bytes() - prepared_.input_bytes() + kept_bytes_},
        {"prepacked", ops_->prepacked_bytes()},
        {"compute", measured ? compute_bytes_ : ggml_gallocr_get_buffer_size(alloc_.get(), 0)},
    };
}

void TracedEngine::reserve(Graph g) {
    if (memory_ == Memory::measured) {
        size_t bytes = 0;
        ggml_gallocr_reserve_n_size(alloc_.get(), g.graph(), nullptr, nullptr, &bytes);
        compute_bytes_ = std::max(compute_bytes_, bytes);
        return;
    }
    require(ggml_gallocr_reserve(alloc_.get(), g.graph()), ErrorKind::resource,
            "out of memory for the compute buffer");
}

void TracedEngine::reserve() {
    const auto n = (size_t)(config_.n_rows * config_.n_tokens);
    Sequences batch{std::vector<int32_t>(n, 0), std::vector<int32_t>(n), std::vector<int32_t>(n)};
    OutputRows outputs{std::vector<int32_t>(n), std::vector<int32_t>(n, 0), {}};
    for (size_t i = 0; i < n; i++) {
        batch.positions[i] = outputs.rows[i] = (int32_t)i;
    }
    const bool training = config_.lora.train;
    prepared_.prepare(*model_, recorder_, batch, std::move(outputs),
                      training ? sites_ : std::set<std::string>());
    Passes passes(prepared_, *lora_, *ops_, config_.lora.dropout > 0 ? 1 : 0,
                  config_.mode == Mode::f32);
    const size_t n_blocks = prepared_.segments().blocks.size();
    for (size_t b = 0; b < n_blocks; b++) {
        reserve(passes.forward(b));
    }
    if (training && config_.keep) {
        plan_kept(passes);
    }
    reserve(passes.head(0, std::min(chunk_of((int64_t)n), (int64_t)n), training));
    for (size_t b = n_blocks; training && !config_.keep && b-- > prepared_.first_trained();) {
        reserve(passes.backward(b));
    }
}

// Graphs of the trained segments, last one first, each in memory of its own.
std::vector<TracedEngine::KeptSegment> TracedEngine::plan_kept(Passes & passes) {
    std::vector<KeptSegment> segments;
    kept_bytes_ = 0;
    for (size_t b = prepared_.segments().blocks.size(); b-- > prepared_.first_trained();) {
        int n_forward = 0;
        Graph g = passes.forward_and_back(b, n_forward);
        if (kept_alloc_.size() == segments.size()) {
            kept_alloc_.emplace_back(ggml_gallocr_new(ggml_backend_dev_buffer_type(device_)));
        }
        ggml_gallocr * alloc = kept_alloc_[segments.size()].get();
        size_t bytes = 0;
        if (memory_ == Memory::measured) {
            ggml_gallocr_reserve_n_size(alloc, g.graph(), nullptr, nullptr, &bytes);
        } else {
            require(ggml_gallocr_alloc_graph(alloc, g.graph()), ErrorKind::resource,
                    "out of memory for what is kept between the passes");
            bytes = ggml_gallocr_get_buffer_size(alloc, 0);
        }
        kept_bytes_ += bytes;
        segments.push_back({std::move(g), n_forward});
    }
    return segments;
}

// ---- without taking any ----

TracedForecast::TracedForecast(const EngineConfig & config)
    : config_(config), model_(TracedModel::open(config.paths)) {
    config_.n_rows = 1;
    config_.n_tokens = 2;
    config_.prepacked_bytes = 0;
    TracedEngine engine(config_, model_, Memory::measured);
    kernels_ = engine.kernels();
    ignored_ = engine.ignored();
    prepackable_bytes_ = engine.prepackable_bytes();
    for (const Parameter & p : engine.lora().parameters()) {
        n_parameters_ += p.ne0 * p.ne1;
    }
}

Buffers TracedForecast::buffers(int64_t n_rows, int64_t n_tokens, bool keep,
                                size_t prepacked_bytes) const {
    EngineConfig config = config_;
    config.n_rows = n_rows;
    config.n_tokens = n_tokens;
    config.keep = keep;
    config.prepacked_bytes = prepacked_bytes;
    TracedEngine engine(config, model_, Memory::measured);
    engine.reserve();
    return engine.buffer_bytes();
}

} // namespace ggft
