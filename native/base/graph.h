// One ggml graph under construction, and buffers of named tensors that outlive graphs.
#pragma once

#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace ggft {

using Tensor = ggml_tensor *;

// Work of thread `ith` of `nth` on a custom node, on ggml's threads. What it throws ends the
// computation with an error.
using CustomKernel = std::function<void(Tensor dst, int ith, int nth)>;

// Makes kernels of a name ("" for none) run out of memory, so that a test can see the message.
void fail_kernels(const std::string & name);

// A context that holds tensor descriptions only, and the graph over them.
class Graph {
public:
    explicit Graph(size_t n_nodes_max);
    Graph(Graph &&) noexcept;
    ~Graph();

    ggml_context * ctx() const { return ctx_.get(); }
    ggml_cgraph * graph() const { return graph_; }
    // Schedules `t` (and what it depends on) for computation; order of calls is order of execution.
    Tensor expand(Tensor t);
    // A node computed by a CPU kernel. `args` are the tensors that must be computed before it.
    Tensor custom(const char * name, ggml_type type, std::initializer_list<int64_t> ne,
                  std::vector<Tensor> args, CustomKernel kernel);
    // The same, writing into `target`'s memory; the result is a view of it.
    Tensor custom_inplace(const char * name, Tensor target, std::vector<Tensor> args,
                          CustomKernel kernel);
    // Computes the graph, which is allocated, or a part of its nodes. Throws Error(resource).
    void compute(ggml_backend_t backend, ggml_cgraph * part = nullptr);

private:
    struct Failure;
    struct Kernel;

    Kernel * add_kernel(const char * name, CustomKernel kernel);

    std::unique_ptr<Failure> failure_; // of any kernel
    std::deque<Kernel> kernels_;       // addresses stay valid as it grows
    ggml_context_ptr ctx_;
    ggml_cgraph * graph_;
};

// Whether memory is taken, or only measured: then tensors get addresses that nothing may read.
enum class Memory { taken, measured };

// Tensors allocated together in one buffer of a device, zeroed.
class TensorBuffer {
public:
    TensorBuffer(const char * name, ggml_backend_buffer_type_t type, Memory memory,
                 size_t n_tensors_max);

    Tensor add(ggml_type type, std::initializer_list<int64_t> ne, const std::string & name);
    // Allocates all tensors added so far. Throws Error(resource) with the size when memory is
    // lacking.
    void allocate();
    // Places `t` into the memory of `home`, one of these, `offset` bytes from its start.
    void place(Tensor t, Tensor home, size_t offset) const;

    size_t bytes() const { return n_bytes_; }
    bool measured() const { return memory_ == Memory::measured; }
    const std::string & name() const { return name_; }

private:
    std::string name_;
    ggml_backend_buffer_type_t type_;
    Memory memory_;
    ggml_context_ptr ctx_;
    ggml_backend_buffer_ptr buffer_;
    size_t n_bytes_ = 0;
};

} // namespace ggft
