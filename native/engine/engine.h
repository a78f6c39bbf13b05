// A base model with a LoRA on a device, and the training step over it: block by block, saved
// inputs, recomputation, the loss in chunks. Knows nothing of data, schedules or files other than
// the GGUF.
#pragma once

#include "base/node_report.h"
#include "engine/decoder.h"

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ggft {

enum class Kernels { automatic, fused, ggml };

struct EngineConfig {
    std::vector<std::string> paths;
    std::vector<std::string> targets; // "attn_q", as in "blk.0.attn_q.weight"
    LoraConfig lora;
    AdamWConfig adamw;
    Mode mode = Mode::fast;
    std::string device = "auto";
    Kernels kernels = Kernels::automatic;
    int threads = 1;
    bool keep = false;                  // keep block internals instead of recomputing them
    size_t prepacked_bytes = 0;         // of weights to keep as the products read them, at most
    int64_t n_rows = 1, n_tokens = 512; // largest micro-batch
};

// One micro-batch: arrays of B*T, row-major.
struct MicroBatch {
    int64_t B, T;
    const int32_t * tokens;
    const int32_t * positions;
    const int32_t * segments; // -1: padding
    const int32_t * targets;  // -1: not trained; null: none
    uint64_t seed = 0;
    const float * weights = nullptr; // factor on each target's loss, of any sign; null: 1
};

// Bytes that a micro-batch moves between host and device.
struct Traffic {
    size_t to_device = 0, from_device = 0;
};

struct LossSum {
    double nats = 0;
    int64_t n_targets = 0;
};

// Makes every device lack an operation ("" for none), so that a test can see the refusal.
void deny_family(const std::string & family);

using Arrays = std::map<std::string, std::vector<float>>;

using Buffers = std::map<std::string, size_t>; // bytes by name

// The weight of a linear in place of the model's own, for one call.
struct GivenWeight {
    int site;
    ggml_type type;
    const void * data;
};

class Engine {
public:
    explicit Engine(const EngineConfig & config);
    // Over a model that is open. Where memory is only measured, so is the model's, and nothing but
    // what an engine would take can be asked.
    Engine(const EngineConfig & config, std::shared_ptr<const Model> model, Memory memory);
    ~Engine();

    // Adds the gradient of the summed nats. Throws Error(cancelled) at a block border after
    // cancel(), leaving the gradients of this micro-batch half added: call zero_grad.
    LossSum forward_backward(const MicroBatch & batch);
    LossSum evaluate(const MicroBatch & batch);
    void token_nats(const MicroBatch & batch, float * out); // [B*T]
    void logits(const MicroBatch & batch, float * out);     // [B*T, V]
    // Multipliers of dropout mask `id` = 4 * layer + {attention, output, feed-forward, down}, [N,
    // width].
    void dropout_mask(int64_t id, int64_t B, int64_t T, int64_t width, uint64_t seed, float * out);
    // Runs one operation forward and backward on arrays, see probe.cpp; adds to the gradients of
    // its adapter.
    Arrays probe(const std::string & op, const MicroBatch & batch, const Arrays & given);
    double optimizer_step(float lr, int64_t n_targets);

    // Tokens on their way through the blocks, stage by stage (Decoder::Stage); see stages.cpp.
    void embed(const MicroBatch & batch, float * residual);
    void advance(int64_t layer, int stage, const MicroBatch & batch,
                 const std::vector<GivenWeight> & given, const float * input, float * residual,
                 float * out);
    int64_t stage_width(int stage) const; // numbers per token of a stage's input
    LossSum loss_of(const MicroBatch & batch, const float * residual); // behind the last block

    void cancel() { cancelled_ = true; }

    // Every distinct node of the graphs. gpu: of the graphs that a GPU would get, on whatever
    // device.
    std::vector<NodeReport> graph_report(bool gpu = false);
    Buffers buffer_bytes() const;
    size_t prepackable_bytes() const; // of all weights that could be kept as products read them
    // Seconds by kind of node since profiling began; slower, as every node runs alone.
    void set_profiling(bool on);
    const std::map<std::string, double> & profile() const { return profile_; }

    const Traffic & traffic() const { return traffic_; } // of the last micro-batch

    const Model & model() const { return *model_; }
    std::string architecture() const { return model_->hparams.arch; }
    int64_t n_vocab() const { return model_->hparams.n_vocab; }
    int64_t n_params_matmul() const { return model_->n_params_matmul(); }
    size_t base_bytes() const { return model_->bytes(); }
    bool base_mapped() const { return model_->mapped(); }
    Lora & lora() { return *lora_; }
    const EngineConfig & config() const { return config_; }
    ggml_backend_dev_t device() const { return device_; }
    const char * kernels() const { return ops_->name(); }
    // Of the fused kernels; null without them.
    const KernelSet * kernel_set() const { return ops_->kernel_set(); }

    int64_t step = 0; // optimizer steps done

private:
    void choose_kernels();
    void allocate_inputs();
    void allocate_saved();
    void prepack();
    void check_graphs();
    void reserve();
    void reserve(Graph g);
    void set_inputs(const MicroBatch & batch);
    void set_portable_inputs(const MicroBatch & batch, const std::vector<int32_t> & starts,
                             const std::vector<int32_t> & labels);
    void put(Tensor t, const void * data, size_t bytes);
    void fill_rope_cache();
    void fill_pool();
    void run(Graph & g);
    void allocate_graph(Graph & g);
    void compute(Graph & g);
    void run_profiled(Graph & g);
    void check_cancelled() const;
    void require_training() const;
    double sum_nats(int64_t n); // weighted
    std::vector<double> read_nats(int64_t n);
    int64_t chunk_of(int64_t n) const;

    Tensor rows_of(Graph & g, Tensor buffer) const; // first N columns
    Tensor input_of(Graph & g, int64_t layer, bool training) const;
    Activations kept_of(Graph & g, int64_t layer) const;
    void keep(const Activations & act, int64_t layer);
    void forward(bool training);
    void head(bool training);
    void backward();
    // f(weight, forward) for each product of a step.
    template <class F> void each_product(F f) const;
    // Visits each graph of the largest micro-batch, over some of the layers.
    void each_graph(const std::vector<int64_t> & layers, bool training,
                    const std::function<void(Graph)> & visit);
    std::vector<int64_t> all_layers() const;
    std::vector<int64_t> distinct_layers() const; // the first of each kind of layer
    Graph new_graph() const;
    Graph block_forward_graph(int64_t layer, bool training);
    Graph block_backward_graph(int64_t layer);
    Graph mask_graph();
    Graph embed_graph(bool training);
    Graph logits_graph(int64_t first, int64_t n);
    Graph head_graph(int64_t first, int64_t n, bool training);

    EngineConfig config_;
    ggml_backend_dev_t device_ = nullptr;
    ggml_backend_ptr backend_;
    std::shared_ptr<const Model> model_;
    Memory memory_ = Memory::taken;
    std::unique_ptr<Lora> lora_;
    std::unique_ptr<Ops> ops_;
    std::unique_ptr<Decoder> decoder_;
    bool fused_ = false;

    Inputs in_;
    std::unique_ptr<TensorBuffer> inputs_, saved_buffer_;
    std::vector<Tensor> saved_; // [C, Nmax] inputs of the adapted blocks, then the last block's
                                // output; one where nothing is trained
    struct KeptField {
        Tensor Activations::* field;
        ggml_type type;
        int64_t ne[4];
        size_t offset;
    };
    std::vector<Tensor> kept_; // per adapted block one flat tensor that holds its Activations
    std::vector<std::vector<KeptField>> kept_fields_; // where, as the last forward pass left them
    std::vector<float> weights_; // of the targets of the micro-batch; empty for 1
    Tensor dx_ = nullptr, nats_ = nullptr;
    int64_t n_targets_ = 0, chunk_ = 0;
    Traffic traffic_;
    ggml_gallocr_ptr alloc_;
    size_t compute_bytes_ = 0; // what it would take, where memory is measured
    std::atomic<bool> cancelled_{false};
    bool profiling_ = false;
    std::map<std::string, double> profile_;
};

} // namespace ggft
