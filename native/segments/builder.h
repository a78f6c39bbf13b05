// Builds a segment of a tape as a graph: forward by llama.cpp's own operations, or by a fused
// kernel where a pattern is found, and backward by the rules.
#pragma once

#include "rules/ops.h"
#include "rules/table.h"
#include "trace/clone.h"

#include <functional>
#include <map>

namespace ggft {

// Which keys a query sees by one of the graph's masks.
struct MaskSpans {
    Tensor mask = nullptr; // F32 [keys, tokens]
    Inputs spans; // starts: the first key of each query, if it sees all from there to itself
    bool contiguous = false;
};

struct BuildContext {
    const Tape & tape;
    const Lora & lora;
    Ops & ops;
    const std::map<int, MaskSpans> & masks; // by the mask's tape tensor
    uint64_t seed;                          // of dropout, 0 for none
    bool exact;                             // no tables of 16-bit values
};

class Builder {
public:
    Builder(Graph & g, const BuildContext & context)
        : back(g), g_(g), c_(context), clone_(g, context.tape) {}

    // Makes `t` stand for a tensor that comes from elsewhere.
    void bind(int tape_tensor, Tensor t) { clone_.bind(tape_tensor, t); }
    Tensor get(int tape_tensor) { return clone_.get(tape_tensor); }
    // Adds a node's operation and notes what it takes to go back through it.
    void add(int node);
    // Goes back through all nodes added, last one first, and through those made by hand (`noted`).
    void backward();

    Backward back;

private:
    struct Step {
        Tensor y;
        std::function<void(Tensor dy)> vjp;
    };

    void note(Tensor y, std::function<void(Tensor dy)> vjp);
    Tensor note(Tensor y); // by its rule
    void add_linear(int node);
    const LinearInput & linear_input(int source);
    Tensor gelu(Tensor x);
    void add_gelu(int node);
    void add_experts(int node);
    void add_attention(int node);
    bool is_fusable(const TapeTensor & node) const;
    void add_fused_attention(int node);
    void add_plain_attention(int node);

    Graph & g_;
    const BuildContext & c_;
    Clone clone_;
    std::vector<Step> steps_;
    std::map<int, LinearInput> inputs_; // by tape tensor
};

} // namespace ggft
