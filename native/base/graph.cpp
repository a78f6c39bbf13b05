#include "base/graph.h"

#include "base/error.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <utility>

namespace ggft {

// The address of tensors that are only measured.
static void * const MEASURED = (void *)(uintptr_t)4096;

static std::string failing_kernel; // see fail_kernels

void fail_kernels(const std::string & name) {
    failing_kernel = name;
}

// The first exception of a graph's kernels, and whose it was. Kernels of other threads may be
// running.
struct Graph::Failure {
    std::atomic<bool> any{false};
    std::mutex mutex;
    std::exception_ptr exception;
    const char * kernel = nullptr;

    void set(const char * name) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!any.exchange(true)) {
            exception = std::current_exception();
            kernel = name;
        }
    }

    void raise() {
        any = false;
        try {
            std::rethrow_exception(std::exchange(exception, nullptr));
        } catch (const Error &) {
            throw;
        } catch (const std::bad_alloc &) {
            fail(ErrorKind::resource, std::string("out of memory in the kernel '") + kernel + "'");
        } catch (const std::exception & e) {
            fail(ErrorKind::resource,
                 std::string("the kernel '") + kernel + "' failed: " + e.what());
        }
    }
};

struct Graph::Kernel {
    const char * name;
    CustomKernel run;
    Failure & failure;

    static void call(Tensor dst, int ith, int nth, void * data) noexcept {
        auto & kernel = *(Kernel *)data;
        if (kernel.failure.any.load(std::memory_order_relaxed)) {
            return;
        }
        try {
            if (kernel.name == failing_kernel) {
                throw std::bad_alloc();
            }
            kernel.run(dst, ith, nth);
        } catch (...) {
            kernel.failure.set(kernel.name);
        }
    }
};

Graph::Graph(Graph &&) noexcept = default;
Graph::~Graph() = default;

Graph::Kernel * Graph::add_kernel(const char * name, CustomKernel kernel) {
    return &kernels_.emplace_back(Kernel{name, std::move(kernel), *failure_});
}

void Graph::compute(ggml_backend_t backend, ggml_cgraph * part) {
    const ggml_status status = ggml_backend_graph_compute(backend, part ? part : graph_);
    if (failure_->any) {
        failure_->raise();
    }
    require(status == GGML_STATUS_SUCCESS, ErrorKind::resource,
            std::string(ggml_backend_name(backend)) +
                " could not compute a graph: " + ggml_status_to_string(status));
}

Graph::Graph(size_t n_nodes_max) : failure_(std::make_unique<Failure>()) {
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

Tensor Graph::custom(const char * name, ggml_type type, std::initializer_list<int64_t> ne,
                     std::vector<Tensor> args, CustomKernel kernel) {
    int64_t n[4] = {1, 1, 1, 1};
    std::copy(ne.begin(), ne.end(), n);
    Tensor t = ggml_custom_4d(ctx(), type, n[0], n[1], n[2], n[3], args.data(), (int)args.size(),
                              Kernel::call, GGML_N_TASKS_MAX, add_kernel(name, std::move(kernel)));
    ggml_set_name(t, name);
    return t;
}

Tensor Graph::custom_inplace(const char * name, Tensor target, std::vector<Tensor> args,
                             CustomKernel kernel) {
    Tensor t = ggml_custom_inplace(ctx(), target, args.data(), (int)args.size(), Kernel::call,
                                   GGML_N_TASKS_MAX, add_kernel(name, std::move(kernel)));
    ggml_set_name(t, name);
    return t;
}

TensorBuffer::TensorBuffer(const char * name, ggml_backend_buffer_type_t type, Memory memory,
                           size_t n_tensors_max)
    : name_(name), type_(type), memory_(memory),
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
    n_bytes_ = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx_.get(), type_);
    if (measured()) {
        for (Tensor t = ggml_get_first_tensor(ctx_.get()); t != nullptr;
             t = ggml_get_next_tensor(ctx_.get(), t)) {
            t->data = MEASURED;
        }
        return;
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), type_));
    require(buffer_ != nullptr, ErrorKind::resource,
            "cannot allocate " + std::to_string(n_bytes_ >> 20) + " MiB for " + name_ + " on " +
                ggml_backend_buft_name(type_));
    n_bytes_ = ggml_backend_buffer_get_size(buffer_.get());
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

void TensorBuffer::place(Tensor t, Tensor home, size_t offset) const {
    auto * address = (uint8_t *)home->data + offset;
    if (measured()) {
        t->data = address;
        return;
    }
    if (t->view_src != nullptr) {
        ggml_backend_view_init(t);
        return;
    }
    ggml_backend_tensor_alloc(home->buffer, t, address);
}

} // namespace ggft
