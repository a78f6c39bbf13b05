// Records the graph that llama.cpp builds for a micro-batch, through its public interface alone:
// llama_decode builds the graph, fills its inputs and shows every node to a callback before it
// computes any; the callback notes them, and the computation is aborted.
#pragma once

#include "trace/tape.h"

#include <llama.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ggft {

// The tokens of a micro-batch, example after example.
struct Sequences {
    std::vector<int32_t> tokens, positions;
    std::vector<int32_t> ids; // example of each token: 0, 0, 0, 1, 1, ...

    int64_t n_tokens() const { return (int64_t)tokens.size(); }
    int n_examples() const { return ids.empty() ? 0 : ids.back() + 1; }
};

// A model opened in llama.cpp: weights mapped as the file has them, computing on the CPU.
class TracedModel {
public:
    // Throws Error(input) with llama.cpp's own words when it cannot load the file.
    explicit TracedModel(const std::vector<std::string> & paths);

    llama_model * get() const { return model_.get(); }
    std::string architecture() const;
    int64_t n_vocab() const;

    // A model that is open is not opened again: its mapping and vocabulary are in memory once.
    static std::shared_ptr<const TracedModel> open(const std::vector<std::string> & paths);

private:
    struct Free {
        void operator()(llama_model * m) const;
    };
    std::unique_ptr<llama_model, Free> model_;
};

class Recorder {
public:
    // For micro-batches of at most n_tokens_max tokens. Throws Error(resource).
    Recorder(const TracedModel & model, int64_t n_tokens_max);

    // Examples that one micro-batch may hold at most: llama.cpp makes room for the logits of each.
    int n_examples_max() const { return n_examples_max_; }

    // Traces a micro-batch; the inputs' data lie at their sources until the next call. n_outputs:
    // tokens, from the first on, whose logits are asked for. Throws Error(input) when llama.cpp
    // splits the micro-batch.
    Tape record(const Sequences & batch, int64_t n_outputs);

    // Applies an adapter in what is recorded from now on; null for none.
    void set_adapter(llama_adapter_lora * adapter);

private:
    struct Free {
        void operator()(llama_context * c) const;
    };

    static bool on_node(ggml_tensor * t, bool ask, void * self);
    int add(ggml_tensor * t);
    void build();
    void check_inputs(const Sequences & batch) const;

    const TracedModel & model_;
    int64_t n_tokens_max_;
    int n_examples_max_;
    std::unique_ptr<llama_context, Free> context_;
    std::vector<ggml_tensor *> seen_; // the nodes that the last call showed
    std::unordered_map<const ggml_tensor *, int> index_;
    Tape tape_;
};

} // namespace ggft
