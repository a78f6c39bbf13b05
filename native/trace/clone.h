// Nodes of a tape as tensors of a graph of our own: same operations, same order, llama.cpp's
// weights.
#pragma once

#include "trace/tape.h"

#include <unordered_map>

namespace ggft {

class Clone {
public:
    Clone(Graph & g, const Tape & tape) : g_(g), tape_(tape) {}

    // Makes a tensor stand for tape tensor i: one that comes from elsewhere, or one that was made
    // in another way than by i's own operation.
    void bind(int i, Tensor t) { made_[i] = t; }
    // The tensor for i: bound, added, a weight, or a view of these.
    Tensor get(int i);
    // Adds node i, an operation, on the tensors of its sources.
    Tensor add(int i);

private:
    Graph & g_;
    const Tape & tape_;
    std::unordered_map<int, Tensor> made_;
};

} // namespace ggft
