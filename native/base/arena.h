// Memory for tensors that live from one graph to the next, laid out anew for every micro-batch.
#pragma once

#include "base/graph.h"

namespace ggft {

class Arena {
public:
    Arena(const char * name, ggml_backend_buffer_type_t type, Memory memory)
        : name_(name), type_(type), memory_(memory) {}

    // Forgets all tensors; the memory stays for the next ones.
    void clear();
    // A tensor that gets memory with the next call of allocate, and needs it from time `from` to
    // time `to`, both included: tensors whose times do not meet may share it.
    Tensor add(ggml_type type, const int64_t (&ne)[GGML_MAX_DIMS], const std::string & name,
               int from, int to);
    // Throws Error(resource) with the size when memory is lacking.
    void allocate();
    // A tensor's elements [first, first + n) of dimension d, as a tensor that is no view.
    Tensor part(Graph & g, Tensor t, int d, int64_t first, int64_t n) const;

    size_t bytes() const { return n_bytes_; }
    bool measured() const { return memory_ == Memory::measured; }

private:
    const char * name_;
    ggml_backend_buffer_type_t type_;
    Memory memory_;
    ggml_context_ptr ctx_;
    struct Placed {
        Tensor tensor;
        int from, to;
        size_t offset, size;
    };
    void place(Placed & p, const std::vector<Placed> & before) const;

    std::vector<Placed> tensors_;
    ggml_backend_buffer_ptr buffer_;
    size_t n_bytes_ = 0; // taken, or measured
};

} // namespace ggft
