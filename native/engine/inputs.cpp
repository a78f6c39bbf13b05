// What a micro-batch puts on the device.
#include "base/error.h"
#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace ggft {

// Rows of the pool of dropout masks from which GgmlOps gathers; drawn anew for each engine, never
// per batch.
static constexpr int64_t POOL_ROWS = 1024;
static constexpr int64_t INPUTS_PER_BLOCK = 4;

void Engine::allocate_inputs() {
    const Hparams & h = model_->hparams;
    const int64_t N = config_.n_rows * config_.n_tokens;
    inputs_ = std::make_unique<TensorBuffer>("inputs", ggml_backend_dev_buffer_type(device_),
                                             memory_, 16);
    auto i32 = [&](int64_t n, const char * name) { return inputs_->add(GGML_TYPE_I32, {n}, name); };
    in_.tokens = i32(N, "tokens");
    in_.positions = i32(N, "positions");
    in_.rows = i32(N, "rows");
    in_.labels = i32(N, "labels");
    in_.weights = inputs_->add(GGML_TYPE_F32, {1, N}, "weights");
    if (fused_) {
        in_.fused.starts = i32(N, "starts");
        in_.fused.rope_cos = inputs_->add(GGML_TYPE_F32, {h.rope.n_dims / 2, N}, "rope cos");
        in_.fused.rope_sin = inputs_->add(GGML_TYPE_F32, {h.rope.n_dims / 2, N}, "rope sin");
        inputs_->allocate();
        return;
    }
    int64_t width = 0, n_rows_max = h.n_vocab;
    for (const Layer & layer : model_->layers) {
        for (const Linear & l : layer.linear) {
            width = std::max(width, l.weight->ne[0]);
            n_rows_max = std::max(n_rows_max, l.weight->ne[1]);
        }
    }
    in_.portable.mask = inputs_->add(
        GGML_TYPE_F16, {config_.n_tokens, config_.n_tokens, 1, config_.n_rows}, "mask");
    in_.portable.spans = inputs_->add(GGML_TYPE_F32, {1, N, 2}, "spans");
    in_.portable.label_at = i32(N, "label_at");
    in_.portable.arange = i32(n_rows_max, "arange");
    if (config_.lora.dropout > 0) {
        in_.portable.pool = inputs_->add(GGML_TYPE_F32, {width, POOL_ROWS}, "pool");
        in_.portable.pool_ids = i32((N + 63) / 64 * 64 * h.n_layer * INPUTS_PER_BLOCK, "pool_ids");
    }
    inputs_->allocate();
    if (memory_ == Memory::measured) {
        return;
    }
    std::vector<int32_t> ids((size_t)n_rows_max);
    for (size_t i = 0; i < ids.size(); i++) {
        ids[i] = (int32_t)i;
    }
    ggml_backend_tensor_set(in_.portable.arange, ids.data(), 0, ids.size() * sizeof(int32_t));
    if (in_.portable.pool != nullptr) {
        fill_pool();
    }
}

void Engine::fill_pool() {
    std::mt19937 random(0x9e3779b9);
    std::vector<float> row((size_t)in_.portable.pool->ne[0]);
    const float p = config_.lora.dropout;
    const auto limit = (uint32_t)(p * 4294967296.0);
    for (int64_t r = 0; r < POOL_ROWS; r++) {
        for (float & x : row) {
            x = random() < limit ? 0.0f : 1.0f / (1.0f - p);
        }
        ggml_backend_tensor_set(in_.portable.pool, row.data(), (size_t)r * in_.portable.pool->nb[1],
                                row.size() * sizeof(float));
    }
}

static void check_batch(const MicroBatch & b, int64_t n_vocab) {
    auto bad = [&](const char * what, int64_t i, int32_t found) {
        fail(ErrorKind::input, std::string(what) + " at row " + std::to_string(i / b.T) +
                                   ", position " + std::to_string(i % b.T) +
                                   " is out of range (found " + std::to_string(found) + ")");
    };
    for (int64_t i = 0; i < b.B * b.T; i++) {
        if (b.tokens[i] < 0 || b.tokens[i] >= n_vocab) {
            bad("token", i, b.tokens[i]);
        }
        if (b.positions[i] < 0) {
            bad("token position", i, b.positions[i]);
        }
        if (b.targets != nullptr && (b.targets[i] < -1 || b.targets[i] >= n_vocab)) {
            bad("target", i, b.targets[i]);
        }
        require(b.weights == nullptr || std::isfinite(b.weights[i]), ErrorKind::input,
                "a target's weight is not finite");
    }
}

void Engine::set_inputs(const MicroBatch & b) {
    require(b.B >= 1 && b.T >= 1 && b.B * b.T <= config_.n_rows * config_.n_tokens,
            ErrorKind::input,
            "micro-batch of " + std::to_string(b.B) + "x" + std::to_string(b.T) +
                " is larger than the engine's " + std::to_string(config_.n_rows) + "x" +
                std::to_string(config_.n_tokens));
    require(fused_ || b.T <= config_.n_tokens, ErrorKind::input,
            "rows are longer than the engine was opened for");
    check_batch(b, model_->hparams.n_vocab);
    in_.B = b.B;
    in_.T = b.T;
    in_.seed = config_.lora.dropout > 0 ? b.seed : 0;

    const int64_t N = b.B * b.T;
    std::vector<int32_t> starts((size_t)N), rows, labels;
    weights_.clear();
    for (int64_t i = 0; i < N; i++) {
        const bool continues =
            i % b.T != 0 && b.segments[i] >= 0 && b.segments[i] == b.segments[i - 1];
        starts[(size_t)i] = continues ? starts[(size_t)i - 1] : (int32_t)i;
        if (b.targets != nullptr && b.targets[i] >= 0) {
            rows.push_back((int32_t)i);
            labels.push_back(b.targets[i]);
            if (b.weights != nullptr) {
                weights_.push_back(b.weights[i]);
            }
        }
    }
    n_targets_ = (int64_t)rows.size();
    traffic_ = {};
    auto set = [this](Tensor t, const int32_t * data, size_t n) {
        if (t != nullptr) {
            put(t, data, n * sizeof(int32_t));
        }
    };
    set(in_.tokens, b.tokens, (size_t)N);
    set(in_.positions, b.positions, (size_t)N);
    set(in_.fused.starts, starts.data(), (size_t)N);
    set(in_.rows, rows.data(), rows.size());
    set(in_.labels, labels.data(), labels.size());
    in_.weighted = !weights_.empty();
    put(in_.weights, weights_.data(), weights_.size() * sizeof(float));
    if (fused_) {
        fill_rope_cache();
    } else {
        set_portable_inputs(b, starts, labels);
    }
}

// Rotates the pairs (1, 0) with ggml's own operation, so that every scaling of angles and magnitude
// is its.
void Engine::fill_rope_cache() {
    const Rope & r = model_->hparams.rope;
    const int64_t half = r.n_dims / 2, N = in_.N();
    Graph g(64);
    Tensor unit = ggml_new_tensor_3d(g.ctx(), GGML_TYPE_F32, r.n_dims, 1, N);
    ggml_set_input(unit);
    Tensor at = ggml_view_1d(g.ctx(), in_.positions, N, 0);
    Tensor rotated = ggml_rope_ext(g.ctx(), unit, at, r.freq_factors, r.n_dims, GGML_ROPE_TYPE_NEOX,
                                   r.n_ctx_orig, r.freq_base, r.freq_scale, r.ext_factor,
                                   r.attn_factor, r.beta_fast, r.beta_slow);
    auto part = [&](size_t first) {
        return ggml_view_2d(g.ctx(), rotated, half, N, rotated->nb[2], first * sizeof(float));
    };
    auto into = [&](Tensor t) { return ggml_view_2d(g.ctx(), t, half, N, t->nb[1], 0); };
    g.expand(ggml_cpy(g.ctx(), part(0), into(in_.fused.rope_cos)));
    g.expand(ggml_cpy(g.ctx(), part((size_t)half), into(in_.fused.rope_sin)));
    allocate_graph(g);
    std::vector<float> pairs((size_t)(r.n_dims * N), 0.0f);
    for (int64_t t = 0; t < N; t++) {
        std::fill_n(pairs.begin() + t * r.n_dims, half, 1.0f);
    }
    ggml_backend_tensor_set(unit, pairs.data(), 0, pairs.size() * sizeof(float));
    compute(g);
}

void Engine::set_portable_inputs(const MicroBatch & b, const std::vector<int32_t> & starts,
                                 const std::vector<int32_t> & labels) {
    const int64_t N = b.B * b.T, n = (int64_t)labels.size();
    std::vector<float> spans((size_t)(2 * N));
    for (int64_t i = 0; i < N; i++) {
        spans[(size_t)i] = (float)(starts[(size_t)i] - i / b.T * b.T);
        spans[(size_t)(N + i)] = (float)(i % b.T);
    }
    put(in_.portable.spans, spans.data(), spans.size() * sizeof(float));
    Graph mask = mask_graph();
    allocate_graph(mask);
    compute(mask);

    // A label's place counts from the start of its chunk.
    std::vector<int32_t> at((size_t)n);
    for (int64_t i = 0; i < n; i++) {
        at[(size_t)i] = (int32_t)(i % chunk_of(n) * model_->hparams.n_vocab + labels[(size_t)i]);
    }
    put(in_.portable.label_at, at.data(), at.size() * sizeof(int32_t));

    if (in_.seed != 0 && in_.portable.pool != nullptr) {
        std::mt19937_64 random(in_.seed);
        const int64_t n_sites = model_->hparams.n_layer * INPUTS_PER_BLOCK;
        std::vector<int32_t> ids((size_t)(n_sites * in_.pool_stride()));
        for (int32_t & id : ids) {
            id = (int32_t)(random() % POOL_ROWS);
        }
        put(in_.portable.pool_ids, ids.data(), ids.size() * sizeof(int32_t));
    }
}

// Sends to the device, and counts.
void Engine::put(Tensor t, const void * data, size_t bytes) {
    if (bytes == 0) {
        return;
    }
    ggml_backend_tensor_set(t, data, 0, bytes);
    traffic_.to_device += bytes;
}

// The attention mask from each token's span, made where it is needed: T*T values per row never
// cross.
Graph Engine::mask_graph() {
    Graph g(64);
    ggml_context * c = g.ctx();
    const int64_t T = in_.T, N = in_.N();
    auto span = [&](size_t which) {
        return ggml_view_2d(c, in_.portable.spans, 1, N, sizeof(float),
                            which * (size_t)N * sizeof(float));
    };
    Tensor key = ggml_repeat_4d(c, ggml_arange(c, 0.0f, (float)T, 1.0f), T, N, 1, 1);
    Tensor before = ggml_step(c, ggml_scale_bias(c, ggml_sub(c, key, span(0)), -1.0f, -0.5f));
    Tensor after = ggml_step(c, ggml_scale_bias(c, ggml_sub(c, key, span(1)), 1.0f, -0.5f));
    // The largest that half precision holds; its exponential is 0.
    Tensor masked = ggml_scale(c, ggml_add(c, before, after), -60000.0f);
    g.expand(ggml_cpy(
        c, masked, ggml_view_2d(c, in_.portable.mask, T, N, (size_t)T * sizeof(ggml_fp16_t), 0)));
    return g;
}

} // namespace ggft
