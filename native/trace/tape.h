// llama.cpp's graph of a micro-batch as data: its nodes in order of execution, its weights by name,
// its inputs. Memory is as ggml has it: a tensor is a strided window (offs, ne, nb) on its root's
// buffer, so that views, reshapes and permutations need no operation.
#pragma once

#include "base/graph.h"

#include <string>
#include <vector>

namespace ggft {

struct TapeTensor {
    enum class Kind { node, weight, input, cache };

    Kind kind = Kind::node;
    ggml_op op = GGML_OP_NONE;
    ggml_type type = GGML_TYPE_F32;
    int64_t ne[4] = {1, 1, 1, 1};
    size_t nb[4] = {0, 0, 0, 0};
    int32_t op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t)] = {};
    std::string name;
    std::vector<int> src;    // indices of tensors, -1 for none
    int root = -1;           // index of the tensor that owns the memory; itself if this does
    size_t offs = 0;         // bytes within the root
    Tensor source = nullptr; // llama.cpp's tensor: a weight's data; an input's until the next trace

    bool is_view() const; // has no operation of its own
    int64_t n_elements() const { return ne[0] * ne[1] * ne[2] * ne[3]; }
    float param_f32(int i) const;
};

struct Tape {
    std::vector<TapeTensor> tensors;
    std::vector<int> order; // nodes, views among them
    int out = -1;           // the logits

    TapeTensor & operator[](int i) { return tensors[(size_t)i]; }
    const TapeTensor & operator[](int i) const { return tensors[(size_t)i]; }
    const TapeTensor & root(int i) const { return tensors[(size_t)tensors[(size_t)i].root]; }
    // The block that a weight belongs to by its name, -1 for none.
    int block_of(int i) const;
    // "MUL_MAT", "GELU", "SWIGLU": the operation with its kind.
    std::string describe(int i) const;
};

// A matrix product by a frozen matrix: what an adapter can stand on.
bool is_linear(const Tape & tape, int node);

} // namespace ggft
