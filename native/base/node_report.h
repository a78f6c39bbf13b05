// What the graphs consist of, and whether a device computes it: every node is asked of the backend
// before the first step, so that nothing is refused, or silently computed elsewhere, in the middle
// of a run.
#pragma once

#include "base/graph.h"

#include <map>
#include <string>
#include <vector>

namespace ggft {

// A tensor as a backend sees it.
struct Operand {
    std::string type;
    int64_t ne[4];
    size_t nb[4];
};

// A distinct node: operation, operands and their layout.
struct NodeReport {
    std::string op;          // as ggml describes it: "MUL_MAT", "SWIGLU", "CUSTOM linear"
    std::string family;      // ggml's operation: "MUL_MAT", "GLU", "CUSTOM"
    std::string type, shape; // of the result; "f32[64,8] <- q4_K[256,64] f32[256,8]"
    Operand result;
    std::vector<Operand> sources;
    int count = 0;
    bool supported = true;
};

class GraphReport {
public:
    // Operations of family `denied` are reported as unsupported whatever the device says ("" for
    // none).
    GraphReport(ggml_backend_t backend, std::string denied)
        : backend_(backend), denied_(std::move(denied)) {}

    void add(const Graph & g);

    std::vector<NodeReport> nodes() const;

private:
    ggml_backend_t backend_;
    std::string denied_;
    std::map<std::string, NodeReport> nodes_; // by operation and layout
};

// Throws Error(resource) that names operation, types, shapes and device of every unsupported node.
void require_supported(const std::vector<NodeReport> & nodes, ggml_backend_dev_t device);

} // namespace ggft
