#include "base/graph.h"

#include "base/error.h"

#include <algorithm>

namespace ggft {

Graph::Graph(size_t n_nodes_max) {
    const size_t bytes =
        ggml_tensor_overhead() * n_nodes_max + ggml_graph_overhead_custom(n_nodes_max, false);
    ctx_.reset(ggml_init({bytes, nullptr, /*no_alloc=*/true}));
    require(ctx_ != nullptr, ErrorKind::resource, "out of memory for a compute graph");
    graph_ = ggml_new_graph_custom(ctx_.get(), n_nodes_max, false);
}

Tensor Graph::expand(Tensor t) {
    ggml_build_forward_expand(graph_, t);
    return t;
}

static void run_kernel(Tensor dst, int ith, int nth, void * kernel) {
    (*(CustomKernel *)kernel)(dst, ith, nth);
}

Tensor Graph::custom(const char * name, ggml_type type, std::initializer_list<int64_t> ne,
                     std::vector<Tensor> args, CustomKernel kernel) {
    int64_t n[4] = {1, 1, 1, 1};
    std::copy(ne.begin(), ne.end(), n);
    kernels_.push_back(std::move(kernel));
    Tensor t = ggml_custom_4d(ctx(), type, n[0], n[1], n[2], n[3], args.data(), (int)args.size(),
                              run_kernel, GGML_N_TASKS_MAX, &kernels_.back());
    ggml_set_name(t, name);
    return t;
}

Tensor Graph::custom_inplace(const char * name, Tensor target, std::vector<Tensor> args,
                             CustomKernel kernel) {
    kernels_.push_back(std::move(kernel));
    Tensor t = ggml_custom_inplace(ctx(), target, args.data(), (int)args.size(), run_kernel,
                                   GGML_N_TASKS_MAX, &kernels_.back());
    ggml_set_name(t, name);
    return t;
}

TensorBuffer::TensorBuffer(const char * name, ggml_backend_buffer_type_t type, size_t n_tensors_max)
    : name_(name), type_(type),
      ctx_(ggml_init({ggml_tensor_overhead() * (n_tensors_max + 1), nullptr, /*no_alloc=*/true})) {
    require(ctx_ != nullptr, ErrorKind::resource,
            std::string("out of memory for the tensors of ") + name);
}

Tensor TensorBuffer::add(ggml_type type, std::initializer_list<int64_t> ne,
                         const std::string & name) {
    Tensor t = ggml_new_tensor(ctx_.get(), type, (int)ne.size(), ne.begin());
    ggml_set_name(t, name.c_str());
    return t;
}

void TensorBuffer::allocate() {
    if (ggml_get_first_tensor(ctx_.get()) == nullptr) {
        return;
    }
    const size_t n_bytes = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx_.get(), type_);
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), type_));
    require(buffer_ != nullptr, ErrorKind::resource,
            "cannot allocate " + std::to_string(n_bytes >> 20) + " MiB for " + name_ + " on " +
                ggml_backend_buft_name(type_));
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

size_t TensorBuffer::bytes() const {
    return buffer_ ? ggml_backend_buffer_get_size(buffer_.get()) : 0;
}

} // namespace ggft
