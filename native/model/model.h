// The frozen base model: hyper-parameters and weights of a (possibly split) GGUF, mapped, not
// copied, where the device can read host memory.
#pragma once

#include "base/graph.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ggft {

// Rotary position embedding as ggml_rope_ext takes it.
struct Rope {
    int mode;       // GGML_ROPE_TYPE_*
    int n_dims;     // rotated dimensions of a head
    int n_ctx_orig; // context before scaling (YaRN)
    float freq_base;
    float freq_scale; // 1 / linear scaling factor
    float ext_factor; // 1 with YaRN, else 0
    float attn_factor;
    float beta_fast;
    float beta_slow;
    Tensor freq_factors; // [n_dims/2] or null
};

struct Hparams {
    std::string arch;
    int64_t n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx_train;
    int64_t n_embd_head; // D, of queries, keys and values
    float norm_eps;
    float attn_scale; // factor of the scores, 1/sqrt(D) unless the file says otherwise
    Rope rope;
};

// What differs between architectures; one row each, no subclasses.
struct ArchTraits {
    const char * name;
    int rope_mode;
    bool qk_norm; // RMSNorm of every query and key head before the rotation
};

const std::vector<ArchTraits> & supported_archs();

struct Linear {
    Tensor weight = nullptr; // [C_in, C_out], any type
    Tensor bias = nullptr;   // [C_out] or null
};

enum Site { ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT, FFN_GATE, FFN_UP, FFN_DOWN, N_SITES };
const char * site_name(int site); // "attn_q", as in "blk.0.attn_q.weight"
std::string weight_name(int64_t layer, int site);

struct Layer {
    Tensor attn_norm = nullptr;   // [C]
    Tensor attn_q_norm = nullptr; // [D] or null
    Tensor attn_k_norm = nullptr; // [D] or null
    Tensor ffn_norm = nullptr;    // [C]
    Linear linear[N_SITES];
};

class Model {
public:
    // Throws Error(input) when the file is not a model that can be trained, Error(resource) when
    // the device has no room for a copy of the weights.
    Model(const std::vector<std::string> & paths, ggml_backend_dev_t device,
          Memory memory = Memory::taken);
    ~Model();

    Hparams hparams;
    Tensor token_embd = nullptr;  // [C, V]
    Tensor output_norm = nullptr; // [C]
    Tensor output = nullptr;      // [C, V], token_embd when tied
    std::vector<Layer> layers;

    size_t bytes() const;            // of all weights
    bool mapped() const;             // true: weights are the file's own pages
    int64_t n_params_matmul() const; // weights that take part in matrix products, per token

private:
    struct Shard;

    void open_shard(const std::string & path, ggml_backend_dev_t device, Memory memory);
    void place_weights(Shard & shard, ggml_backend_dev_t device);
    void read_hparams();
    void read_tensors();
    Tensor find(const std::string & name, std::initializer_list<int64_t> ne, bool required);

    std::vector<std::unique_ptr<Shard>> shards_;
    std::map<std::string, Tensor> tensors_;
};

} // namespace ggft
