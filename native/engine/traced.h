// The engine over llama.cpp's own graph: whatever it builds for a model is cloned, differentiated
// by the rules and trained, segment by segment. The same calls as Engine.
#pragma once

#include "engine/engine.h"
#include "segments/passes.h"

namespace ggft {

class TracedEngine {
public:
    // Throws Error(input) that names the operation that stands in the way, before any training.
    explicit TracedEngine(const EngineConfig & config);
    // Over a model that is open. With Memory::measured, only reserve and buffer_bytes are of use.
    TracedEngine(const EngineConfig & config, std::shared_ptr<const TracedModel> model,
                 Memory memory);
    ~TracedEngine();

    // Makes room for, or measures, the largest micro-batch there can be.
    void reserve();

    LossSum forward_backward(const MicroBatch & batch);
    LossSum evaluate(const MicroBatch & batch);
    void token_nats(const MicroBatch & batch, float * out); // [B*T]
    void logits(const MicroBatch & batch, float * out);     // [B*T, V]
    double optimizer_step(float lr, int64_t n_targets);
    void cancel() { cancelled_ = true; }

    Buffers buffer_bytes() const;
    std::string architecture() const { return model_->architecture(); }
    int64_t n_vocab() const { return model_->n_vocab(); }
    int64_t n_params_matmul() const { return n_params_matmul_; }
    size_t prepackable_bytes() const { return prepackable_bytes_; }
    size_t base_bytes() const;
    bool base_mapped() const { return true; }
    const Traffic & traffic() const { return traffic_; } // of the last micro-batch
    // Matrices that were asked for, but llama.cpp applies no adapter there.
    const std::vector<std::string> & ignored() const { return ignored_; }

    Lora & lora() { return *lora_; }
    const EngineConfig & config() const { return config_; }
    ggml_backend_dev_t device() const { return device_; }
    const char * kernels() const { return ops_->name(); }
    const KernelSet * kernel_set() const { return ops_->kernel_set(); } // of the fused kernels

    int64_t step = 0; // optimizer steps done

private:
    // Examples of a micro-batch that are computed together, and where their tokens stand in it.
    struct Group {
        Sequences sequences;
        std::vector<int64_t> at;
    };

    void choose_sites();
    std::vector<Group> groups(const MicroBatch & batch) const;
    OutputRows trained_rows(const Group & group, const MicroBatch & batch) const;
    LossSum run(const MicroBatch & batch, bool training, float * nats);
    // A segment whose internals live from its forward half to its way back.
    struct KeptSegment {
        Graph graph;
        int n_forward;
    };

    void forward(Passes & passes);
    std::vector<KeptSegment> plan_kept(Passes & passes);
    void compute(KeptSegment & s, bool back);
    void head(Passes & passes, bool training);
    int64_t chunk_of(int64_t n) const;
    void compute(Graph & g);
    void reserve(Graph g);
    template <class F> void named(F f) const;
    template <class F> void each_product(const Tape & tape, F f) const;

    EngineConfig config_;
    ggml_backend_dev_t device_ = nullptr;
    ggml_backend_ptr backend_;
    std::shared_ptr<const TracedModel> model_;
    Memory memory_;
    Recorder recorder_;
    std::unique_ptr<Ops> ops_;
    std::unique_ptr<Lora> lora_;
    std::set<std::string> sites_;
    std::vector<std::string> ignored_;
    int64_t n_params_matmul_ = 0, chunk_ = 0;
    size_t compute_bytes_ = 0, prepackable_bytes_ = 0;
    PreparedBatch prepared_;
    ggml_gallocr_ptr alloc_;
    std::vector<ggml_gallocr_ptr> kept_alloc_; // of the segments from the last to the first
    size_t kept_bytes_ = 0;
    Traffic traffic_;
    std::atomic<bool> cancelled_{false};
};

// What a TracedEngine will take, by the code that allocates; see Forecast.
class TracedForecast {
public:
    explicit TracedForecast(const EngineConfig & config);

    Buffers buffers(int64_t n_rows, int64_t n_tokens, bool keep, size_t prepacked_bytes) const;

    const char * kernels() const { return kernels_; }
    const std::vector<std::string> & ignored() const { return ignored_; }
    int64_t n_parameters() const { return n_parameters_; } // of the adapter
    size_t prepackable_bytes() const { return prepackable_bytes_; }
    int64_t n_vocab() const { return model_->n_vocab(); }

private:
    EngineConfig config_;
    std::shared_ptr<const TracedModel> model_;
    const char * kernels_;
    std::vector<std::string> ignored_;
    int64_t n_parameters_ = 0;
    size_t prepackable_bytes_;
};

} // namespace ggft
