// The adapter: lora_a and lora_b of every adapted linear, and, where it is trained, their gradients
// and AdamW moments. Each of the four lies in one flat tensor, so that clipping and the optimizer
// are a handful of nodes.
#pragma once

#include "base/graph.h"
#include "model/model.h"

#include <string>
#include <unordered_map>
#include <vector>

namespace ggft {

struct LoraConfig {
    bool targets[N_SITES] = {};
    int layer_first = 0, layer_last = 0; // adapted layers [first, last)
    int rank = 8;
    float alpha = 32;
    float dropout = 0;
    bool train = true; // else there are values only, which may be F16
    ggml_type type = GGML_TYPE_F32;
};

// A matrix that gets an adapter.
struct LoraSite {
    std::string weight; // its tensor's name
    int64_t n_in, n_out;
    float factor = 1; // of the adapter's scale
};

// The adapter of one linear: y += scale * lora_b (lora_a x).
struct LoraPair {
    Tensor a = nullptr;  // [C_in, R]
    Tensor b = nullptr;  // [R, C_out]
    Tensor da = nullptr; // gradients, summed over micro-batches; null where nothing is trained
    Tensor db = nullptr;
    float scale = 0;

    explicit operator bool() const { return a != nullptr; }
};

struct AdamWConfig {
    float beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0, max_grad_norm = 1;
};

struct Parameter {
    std::string name; // "blk.0.attn_q.weight.lora_a"
    int64_t ne0, ne1;
    int64_t offset; // in elements, within each flat tensor
};

class Lora {
public:
    Lora(const Model & model, const LoraConfig & config, ggml_backend_dev_t device, Memory memory);
    // For any matrices; the configuration's targets, layers and type are of no matter.
    Lora(const std::vector<LoraSite> & sites, const LoraConfig & config, ggml_backend_dev_t device,
         Memory memory);

    // The adapter of a matrix; empty if it has none.
    const LoraPair & pair(const std::string & weight) const;
    const LoraPair & pair(int64_t layer, int site) const { return pair(weight_name(layer, site)); }

    // The first node of a graph that reads a layer's pairs: F16 matrices become F32 there.
    void load(Graph & g, int64_t layer) const;

    const std::vector<Parameter> & parameters() const { return parameters_; }

    // `which`: "value", "grad", "m" or "v". Throws Error(input) for unknown names, for state that
    // is not trained, and for values that F16 cannot hold.
    void get(const std::string & name, const std::string & which, float * out) const;
    void set(const std::string & name, const std::string & which, const float * in);

    void zero_grad();
    // One AdamW update (Loshchilov & Hutter 2019, decoupled decay) with the gradient divided by
    // n_targets and clipped to max_grad_norm. Returns the norm before clipping; throws
    // Error(numeric) when it is not finite, leaving the weights untouched.
    double step(ggml_backend_t backend, const AdamWConfig & options, float lr, int64_t n_targets,
                int64_t t);

    const LoraConfig & config() const { return config_; }
    size_t bytes() const { return buffer_.bytes(); }
    // Name of the first tensor with a gradient that is not finite, or "".
    std::string first_nonfinite_grad() const;
    Graph norm_graph() const; // the last node: sums of the squared gradient per row
    Graph step_graph() const;

private:
    void make_pairs(const std::vector<LoraSite> & sites);
    int64_t layer_size() const; // elements of a layer in the flat tensors
    Tensor flat(const std::string & which) const;
    const Parameter & parameter(const std::string & name) const;

    LoraConfig config_;
    TensorBuffer buffer_;
    ggml_context_ptr views_;
    std::unordered_map<std::string, LoraPair> pairs_; // by the matrix's name
    std::vector<Parameter> parameters_;
    int64_t n_elements_ = 0, n_rows_ = 0; // of the flat tensors, ROW wide
    Tensor value_ = nullptr, grad_ = nullptr, m_ = nullptr, v_ = nullptr;
    Tensor loaded_ = nullptr; // [layer_size()] F32, the matrices of one layer; null if value is F32
    Tensor options_ = nullptr; // [7], as OPT_STEP_ADAMW reads them
    Tensor factor_ = nullptr;  // [1], multiplies the gradient
};

} // namespace ggft
