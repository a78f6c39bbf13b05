#include "engine/traced.h"

#include "base/devices.h"
#include "base/error.h"
#include "trace/adapter_sites.h"

#include <algorithm>
#include <cmath>

namespace ggft {

// Bytes of logits that exist at once; decides how many positions a chunk of the loss head has.
static constexpr size_t LOGIT_BYTES = 96u << 20;
static constexpr int64_t CHUNK_ALIGN = 64;

TracedEngine::TracedEngine(const EngineConfig & config)
    : TracedEngine(config, TracedModel::open(config.paths), Memory::taken) {
    reserve();
}

TracedEngine::TracedEngine(const EngineConfig & config, std::shared_ptr<const TracedModel> model,
                           Memory memory)
    : config_(config), device_(find_device(config.device == "auto" ? "cpu" : config.device)),
      model_(std::move(model)), memory_(memory),
      recorder_(*model_, config.n_rows * config.n_tokens),
      prepared_(ggml_backend_dev_buffer_type(device_), memory) {
    require(config.n_rows >= 1 && config.n_tokens >= 2, ErrorKind::input,
            "a micro-batch needs rows and tokens");
    require(ggml_backend_dev_type(device_) == GGML_BACKEND_DEVICE_TYPE_CPU &&
                config.kernels != Kernels::ggml,
            ErrorKind::input, architecture() + " models train on the CPU only");
    if (memory_ == Memory::taken) {
        backend_ = open_device(device_, config.threads);
    }
    if (!config.lora.train) {
        config_.lora.dropout = 0;
    }
    ops_ = make_fused_ops(config_.mode, config_.lora.dropout, config_.threads,
                          config_.prepacked_bytes);
    alloc_.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(device_)));
    const size_t row_bytes = (size_t)n_vocab() * sizeof(float);
    chunk_ = std::max(CHUNK_ALIGN, (int64_t)(LOGIT_BYTES / row_bytes) / CHUNK_ALIGN * CHUNK_ALIGN);
    choose_sites();
}

TracedEngine::~TracedEngine() = default;

// What multiplies the product by a matrix and its adapter, although the adapter is meant to be
// added behind it.
static float scale_of(const Tape & tape, int weight) {
    if (weight < 0) {
        return 1;
    }
    const TapeTensor & t = tape[weight];
    float value = 0;
    require(t.type == GGML_TYPE_F32 && t.n_elements() == 1, ErrorKind::input,
            "ggft cannot train a matrix whose product is scaled by " + t.name + " yet");
    ggml_backend_tensor_get(t.source, &value, 0, sizeof(value));
    require(value != 0 && std::isfinite(value), ErrorKind::input, t.name + " is not a scale");
    return value;
}

// Lets a refusal say whose graph it is about.
template <class F> void TracedEngine::named(F f) const {
    try {
        f();
    } catch (const Error & e) {
        fail(e.kind, "ggft cannot train " + architecture() + " models: " + e.what());
    }
}

// The matrices of the adapted blocks that are targets and that llama.cpp applies an adapter to.
void TracedEngine::choose_sites() {
    Tape tape;
    std::map<std::string, int> applied;
    named([&] {
        tape = recorder_.record({{0, 0}, {0, 1}, {0, 0}}, 2);
        require_causal(tape, bypass_caches(tape, 2));
        applied = adapter_sites(*model_, recorder_, tape);
    });
    std::vector<LoraSite> sites;
    for (int i : tape.order) {
        if (!is_linear(tape, i)) {
            continue;
        }
        const TapeTensor & w = tape[tape[i].src[0]];
        n_params_matmul_ += w.ne[0] * w.ne[1];
        const int block = tape.block_of(tape[i].src[0]);
        const auto is_target = [&](const std::string & target) {
            return w.name == "blk." + std::to_string(block) + "." + target + ".weight";
        };
        if (block < config_.lora.layer_first || block >= config_.lora.layer_last ||
            !std::any_of(config_.targets.begin(), config_.targets.end(), is_target)) {
            continue;
        }
        const auto site = applied.find(w.name);
        if (site == applied.end()) {
            ignored_.push_back(w.name);
        } else if (sites_.insert(w.name).second) {
            sites.push_back({w.name, w.ne[0], w.ne[1], 1 / scale_of(tape, site->second)});
        }
    }
    require(!sites.empty() || ignored_.empty(), ErrorKind::input,
            "llama.cpp loads an adapter for " + (ignored_.empty() ? "" : ignored_[0]) + " of " +
                architecture() + " models and never applies it: nothing to train");
    drop_dead(tape);
    named([&] { cut(tape, sites_, n_vocab()); });
    each_product(tape, [this](Tensor w, bool forward) {
        ops_->prepack(w, forward);
        prepackable_bytes_ += ops_->prepacked_bytes_of(w, forward);
    });
    lora_ = std::make_unique<Lora>(sites, config_.lora, device_, memory_);
}

// The products of a step by a frozen matrix in their order: forward, then backward.
template <class F> void TracedEngine::each_product(const Tape & tape, F f) const {
    std::vector<Tensor> weights;
    for (int i : tape.order) {
        if (is_linear(tape, i)) {
            weights.push_back(tape[tape[i].src[0]].source);
            f(weights.back(), true);
        }
    }
    for (auto w = weights.rbegin(); config_.lora.train && w != weights.rend(); ++w) {
        f(*w, false);
    }
}

// ---- running ----

void TracedEngine::compute(Graph & g) {
    if (cancelled_) {
        fail(ErrorKind::cancelled, "cancelled");
    }
    if (ggml_graph_n_nodes(g.graph()) == 0) {
        return;
    }
    require(ggml_gallocr_alloc_graph(alloc_.get(), g.graph()), ErrorKind::resource,
            "out of memory for the compute buffer");
    g.compute(backend_.get());
}

// One half of a segment's graph, which is allocated.
void TracedEngine::compute(KeptSegment & s, bool back) {
    if (cancelled_) {
        fail(ErrorKind::cancelled, "cancelled");
    }
    const int first = back ? s.n_forward : 0,
              last = back ? ggml_graph_n_nodes(s.graph.graph()) : s.n_forward;
    Graph half((size_t)std::max(last - first, 1));
    for (int i = first; i < last; i++) {
        ggml_graph_add_node(half.graph(), ggml_graph_node(s.graph.graph(), i));
    }
    if (first < last) {
        s.graph.compute(backend_.get(), half.graph());
    }
}

void TracedEngine::forward(Passes & passes) {
    for (size_t b = 0; b < prepared_.segments().blocks.size(); b++) {
        Graph g = passes.forward(b);
        compute(g);
    }
}

// Rows per chunk of the loss head, of equal size, so that none is too small to pay for reading the
// output matrix.
int64_t TracedEngine::chunk_of(int64_t n) const {
    const int64_t n_chunks = (n + chunk_ - 1) / chunk_;
    const int64_t size = (n + n_chunks - 1) / n_chunks;
    return std::min(chunk_, (size + CHUNK_ALIGN - 1) / CHUNK_ALIGN * CHUNK_ALIGN);
}

void TracedEngine::head(Passes & passes, bool training) {
    const int64_t n = prepared_.outputs().n(), size = chunk_of(n);
    for (int64_t first = 0; first < n; first += size) {
        Graph g = passes.head(first, std::min(size, n - first), training);
        compute(g);
    }
}

// Divides a micro-batch into as many examples as llama.cpp takes at once; padding is left out.
std::vector<TracedEngine::Group> TracedEngine::groups(const MicroBatch & batch) const {
    std::vector<Group> groups;
    int64_t previous = -1; // row and segment of the token before
    for (int64_t i = 0; i < batch.B * batch.T; i++) {
        if (batch.segments[i] < 0) {
            continue;
        }
        const int64_t example = (i / batch.T << 32) + batch.segments[i];
        const bool begins = example != previous;
        previous = example;
        if (groups.empty() ||
            (begins && groups.back().sequences.n_examples() == recorder_.n_examples_max())) {
            groups.emplace_back();
        }
        Group & g = groups.back();
        const int id = g.sequences.ids.empty() ? 0 : g.sequences.ids.back() + (begins ? 1 : 0);
        g.sequences.tokens.push_back(batch.tokens[i]);
        g.sequences.positions.push_back(batch.positions[i]);
        g.sequences.ids.push_back(id);
        g.at.push_back(i);
    }
    return groups;
}

OutputRows TracedEngine::trained_rows(const Group & group, const MicroBatch & batch) const {
    OutputRows outputs;
    for (size_t i = 0; i < group.at.size(); i++) {
        const int32_t target = batch.targets[group.at[i]];
        if (target >= 0) {
            outputs.rows.push_back((int32_t)i);
            outputs.labels.push_back(target);
            if (batch.weights != nullptr) {
                const float weight = batch.weights[group.at[i]];
                require(std::isfinite(weight), ErrorKind::input, "a target's weight is not finite");
                outputs.weights.push_back(weight);
            }
        }
    }
    return outputs;
}

LossSum TracedEngine::run(const MicroBatch & batch, bool training, float * nats) {
    cancelled_ = false;
    traffic_ = {};
    LossSum sum;
    uint64_t seed = training ? batch.seed : 0;
    for (const Group & group : groups(batch)) {
        OutputRows outputs = trained_rows(group, batch);
        if (outputs.n() == 0) {
            continue;
        }
        sum.n_targets += outputs.n();
        prepared_.prepare(*model_, recorder_, group.sequences, std::move(outputs),
                          training ? sites_ : std::set<std::string>());
        Passes passes(prepared_, *lora_, *ops_, seed, config_.mode == Mode::f32);
        seed += seed != 0; // another mask for each group
        const size_t n_blocks = prepared_.segments().blocks.size();
        std::vector<KeptSegment> kept;
        if (training && config_.keep) {
            kept = plan_kept(passes);
        }
        for (size_t b = 0; b < n_blocks - kept.size(); b++) {
            Graph g = passes.forward(b);
            compute(g);
        }
        for (auto s = kept.rbegin(); s != kept.rend(); ++s) {
            compute(*s, false);
        }
        head(passes, training);
        const OutputRows & rows = prepared_.outputs();
        std::vector<double> losses((size_t)rows.n());
        ggml_backend_tensor_get(prepared_.nats, losses.data(), 0, losses.size() * sizeof(double));
        traffic_.to_device += prepared_.input_bytes();
        traffic_.from_device += losses.size() * sizeof(double);
        for (size_t i = 0; i < losses.size(); i++) {
            sum.nats += rows.weights.empty() ? losses[i] : (double)rows.weights[i] * losses[i];
            if (nats != nullptr && rows.labels[i] >= 0) {
                nats[group.at[(size_t)rows.rows[i]]] = (float)losses[i];
            }
        }
        require(std::isfinite(sum.nats), ErrorKind::numeric, "the loss is not finite");
        for (KeptSegment & s : kept) {
            compute(s, true);
        }
        for (size_t b = n_blocks; training && !config_.keep && b-- > prepared_.first_trained();) {
            Graph g = passes.backward(b);
            compute(g);
        }
    }
    return sum;
}

LossSum TracedEngine::forward_backward(const MicroBatch & batch) {
    require(config_.lora.train, ErrorKind::input,
            "the engine was opened for evaluation and cannot train");
    return run(batch, true, nullptr);
}

LossSum TracedEngine::evaluate(const MicroBatch & batch) {
    return run(batch, false, nullptr);
}

void TracedEngine::token_nats(const MicroBatch & batch, float * out) {
    std::fill(out, out + batch.B * batch.T, 0.0f);
    run(batch, false, out);
}

void TracedEngine::logits(const MicroBatch & batch, float * out) {
    cancelled_ = false;
    for (const Group & group : groups(batch)) {
        OutputRows all;
        for (size_t i = 0; i < group.at.size(); i++) {
            all.rows.push_back((int32_t)i);
            all.labels.push_back(-1);
        }
        prepared_.prepare(*model_, recorder_, group.sequences, std::move(all), {});
        Passes passes(prepared_, *lora_, *ops_, 0, false);
        forward(passes);
        const int64_t n = prepared_.outputs().n(), size = chunk_of(n);
        std::vector<float> values((size_t)(size * n_vocab()));
        for (int64_t first = 0; first < n; first += size) {
            const int64_t rows = std::min(size, n - first);
            Graph g = passes.logits(first, rows);
            compute(g);
            Tensor z = ggml_graph_node(g.graph(), -1);
            ggml_backend_tensor_get(z, values.data(), 0, ggml_nbytes(z));
            for (int64_t i = 0; i < rows; i++) {
                std::copy_n(values.data() + i * n_vocab(), n_vocab(),
                            out + group.at[(size_t)(first + i)] * n_vocab());
            }
        }
    }
}

double TracedEngine::optimizer_step(float lr, int64_t n_targets) {
    require(n_targets > 0, ErrorKind::input, "an optimizer step needs trained tokens");
    const double norm = lora_->step(backend_.get(), config_.adamw, lr, n_targets, step + 1);
    step++;
    return norm;
}

} // namespace ggft
