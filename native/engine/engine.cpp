#include "engine/engine.h"

#include "base/devices.h"
#include "base/error.h"
#include "kernels/isa/dispatch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace ggft {

// Bytes of logits that exist at once; decides how many positions a chunk of the loss head has.
static constexpr size_t LOGIT_BYTES = 96u << 20;
static constexpr int64_t CHUNK_ALIGN = 64;

static int site_of(const std::string & target) {
    for (int site = 0; site < N_SITES; site++) {
        if (target == site_name(site)) {
            return site;
        }
    }
    fail(ErrorKind::input, "unknown target module '" + target + "'");
}

// An engine that trains nothing needs less: no dropout, nothing kept, and in fast mode the adapter
// in 16 bits, as weights and activations are.
static EngineConfig settled(EngineConfig config) {
    for (const std::string & target : config.targets) {
        config.lora.targets[site_of(target)] = true;
    }
    if (!config.lora.train) {
        config.lora.dropout = 0;
        config.lora.type = config.mode == Mode::fast ? GGML_TYPE_F16 : GGML_TYPE_F32;
        config.keep = false;
    }
    return config;
}

Engine::Engine(const EngineConfig & config)
    : Engine(config, std::make_shared<Model>(config.paths, find_device(config.device)),
             Memory::taken) {}

Engine::Engine(const EngineConfig & given, std::shared_ptr<const Model> model, Memory memory)
    : config_(settled(given)), device_(find_device(given.device)), model_(std::move(model)),
      memory_(memory) {
    require(config_.n_rows >= 1 && config_.n_tokens >= 2, ErrorKind::input,
            "a micro-batch needs rows and tokens");
    require(config_.threads >= 1, ErrorKind::input, "threads must be at least 1");
    if (memory_ == Memory::taken) {
        backend_ = open_device(device_, config_.threads);
    }
    lora_ = std::make_unique<Lora>(*model_, config_.lora, device_, memory_);
    choose_kernels();
    decoder_ = std::make_unique<Decoder>(*model_, *lora_, *ops_, in_);
    alloc_.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(device_)));
    const size_t row_bytes = (size_t)model_->hparams.n_vocab * sizeof(float);
    chunk_ = std::max(CHUNK_ALIGN, (int64_t)(LOGIT_BYTES / row_bytes) / CHUNK_ALIGN * CHUNK_ALIGN);
    allocate_inputs();
    allocate_saved();
    prepack();
    if (memory_ == Memory::taken) {
        check_graphs();
    }
    reserve();
}

void Engine::choose_kernels() {
    const bool cpu = ggml_backend_dev_type(device_) == GGML_BACKEND_DEVICE_TYPE_CPU;
    const std::string lack = cpu ? fused_lack(*model_) : "fused kernels exist for the CPU only";
    require(config_.kernels != Kernels::fused || lack.empty(), ErrorKind::input, lack);
    fused_ = config_.kernels != Kernels::ggml && lack.empty();
    if (fused_) {
        ops_ = make_fused_ops(config_.mode, config_.lora.dropout, config_.threads,
                              config_.prepacked_bytes);
    } else {
        ops_ = make_ggml_ops(in_, config_.mode, /*quantized_forward=*/!cpu);
    }
}

Engine::~Engine() = default;

// ---- running ----

void Engine::check_cancelled() const {
    if (cancelled_) {
        fail(ErrorKind::cancelled, "cancelled");
    }
}

void Engine::allocate_graph(Graph & g) {
    require(ggml_gallocr_alloc_graph(alloc_.get(), g.graph()), ErrorKind::resource,
            std::string("out of memory for the compute buffer on ") +
                ggml_backend_dev_name(device_));
}

void Engine::compute(Graph & g) {
    if (profiling_) {
        return run_profiled(g);
    }
    g.compute(backend_.get());
}

void Engine::run(Graph & g) {
    check_cancelled();
    if (ggml_graph_n_nodes(g.graph()) == 0) {
        return;
    }
    allocate_graph(g);
    compute(g);
}

void Engine::run_profiled(Graph & g) {
    const auto panel_seconds = [this] {
        return kernel_set() ? kernel_set()->gemm.panel_seconds() : 0.0;
    };
    for (int i = 0; i < ggml_graph_n_nodes(g.graph()); i++) {
        Tensor node = ggml_graph_node(g.graph(), i);
        Graph one(4);
        ggml_graph_add_node(one.graph(), node);
        const double before = panel_seconds();
        const auto start = std::chrono::steady_clock::now();
        g.compute(backend_.get(), one.graph());
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        const std::string name = node->op == GGML_OP_CUSTOM ? node->name : ggml_op_desc(node);
        const double dequantizing = panel_seconds() - before;
        profile_[name] += seconds.count() - dequantizing;
        profile_["dequantize"] += dequantizing;
    }
}

void Engine::set_profiling(bool on) {
    profiling_ = on;
    if (kernel_set()) {
        kernel_set()->gemm.time_panels(on);
    }
    profile_.clear();
}

// ---- the step ----

void Engine::require_training() const {
    require(config_.lora.train, ErrorKind::input,
            "the engine was opened for evaluation and cannot train");
}

void Engine::forward(bool training) {
    Graph embed = embed_graph(training);
    run(embed);
    for (int64_t l = 0; l < model_->hparams.n_layer; l++) {
        Graph g = block_forward_graph(l, training);
        run(g);
    }
}

void Engine::head(bool training) {
    if (training) {
        ggml_backend_tensor_memset(dx_, 0, 0, ggml_nbytes(dx_));
    }
    const int64_t size = chunk_of(n_targets_);
    for (int64_t first = 0; first < n_targets_; first += size) {
        Graph g = head_graph(first, std::min(size, n_targets_ - first), training);
        run(g);
    }
}

// Positions per chunk of the loss head: of equal size, so that none is too small to pay for reading
// the output matrix, and starting where every device can bind a view.
int64_t Engine::chunk_of(int64_t n) const {
    const int64_t n_chunks = (n + chunk_ - 1) / chunk_,
                  size = (n + n_chunks - 1) / std::max<int64_t>(n_chunks, 1);
    return std::min(chunk_, (size + CHUNK_ALIGN - 1) / CHUNK_ALIGN * CHUNK_ALIGN);
}

void Engine::backward() {
    for (int64_t l = model_->hparams.n_layer - 1; l >= config_.lora.layer_first; l--) {
        Graph g = block_backward_graph(l);
        run(g);
    }
}

std::vector<double> Engine::read_nats(int64_t n) {
    std::vector<double> nats((size_t)n);
    traffic_.from_device += (size_t)n * nats_->nb[0];
    if (nats_->type == GGML_TYPE_F64) {
        ggml_backend_tensor_get(nats_, nats.data(), 0, nats.size() * sizeof(double));
        return nats;
    }
    std::vector<float> single((size_t)n);
    ggml_backend_tensor_get(nats_, single.data(), 0, single.size() * sizeof(float));
    std::copy(single.begin(), single.end(), nats.begin());
    return nats;
}

double Engine::sum_nats(int64_t n) {
    const std::vector<double> nats = read_nats(n);
    double sum = 0;
    for (size_t i = 0; i < nats.size(); i++) {
        sum += weights_.empty() ? nats[i] : (double)weights_[i] * nats[i];
    }
    require(std::isfinite(sum), ErrorKind::numeric, "the loss is not finite");
    return sum;
}

LossSum Engine::forward_backward(const MicroBatch & batch) {
    require_training();
    cancelled_ = false;
    set_inputs(batch);
    if (n_targets_ == 0) {
        return {};
    }
    forward(true);
    head(true);
    const LossSum sum{sum_nats(n_targets_), n_targets_};
    backward();
    return sum;
}

LossSum Engine::evaluate(const MicroBatch & batch) {
    cancelled_ = false;
    set_inputs(batch);
    in_.seed = 0;
    if (n_targets_ == 0) {
        return {};
    }
    forward(false);
    head(false);
    return {sum_nats(n_targets_), n_targets_};
}

void Engine::token_nats(const MicroBatch & batch, float * out) {
    evaluate(batch);
    const std::vector<double> nats = read_nats(n_targets_);
    size_t next = 0;
    for (int64_t i = 0; i < batch.B * batch.T; i++) {
        out[i] = batch.targets[i] >= 0 ? (float)nats[next++] : 0.0f;
    }
}

void Engine::logits(const MicroBatch & batch, float * out) {
    cancelled_ = false;
    set_inputs(batch);
    in_.seed = 0;
    forward(false);
    for (int64_t first = 0; first < in_.N(); first += chunk_) {
        const int64_t n = std::min(chunk_, in_.N() - first);
        Graph g = logits_graph(first, n);
        run(g);
        Tensor y = ggml_graph_node(g.graph(), -1);
        ggml_backend_tensor_get(y, out + first * model_->hparams.n_vocab, 0, ggml_nbytes(y));
    }
}

void Engine::dropout_mask(int64_t id, int64_t B, int64_t T, int64_t width, uint64_t seed,
                          float * out) {
    std::vector<int32_t> zeros((size_t)(B * T), 0);
    set_inputs({B, T, zeros.data(), zeros.data(), zeros.data(), nullptr, seed});
    Graph g(64);
    Tensor ones = ggml_new_tensor_2d(g.ctx(), GGML_TYPE_F32, width, B * T);
    ggml_set_input(ones);
    Tensor dropped = ops_->dropped(g, ops_->linear_input(g, in_, ones, (int)id, true, {}));
    if (dropped == ones) {
        std::fill(out, out + width * B * T, 1.0f);
        return;
    }
    ggml_set_output(g.expand(dropped));
    allocate_graph(g);
    std::vector<float> values((size_t)(width * B * T), 1.0f);
    ggml_backend_tensor_set(ones, values.data(), 0, ggml_nbytes(ones));
    compute(g);
    ggml_backend_tensor_get(dropped, out, 0, ggml_nbytes(dropped));
}

double Engine::optimizer_step(float lr, int64_t n_targets) {
    require_training();
    require(n_targets > 0, ErrorKind::input, "an optimizer step needs trained tokens");
    const double norm = lora_->step(backend_.get(), config_.adamw, lr, n_targets, step + 1);
    step++;
    return norm;
}

} // namespace ggft
