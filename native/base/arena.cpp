#include "base/arena.h"

#include "base/error.h"

#include <algorithm>

namespace ggft {

static constexpr size_t N_TENSORS_MAX = 4096;

void Arena::clear() {
    tensors_.clear();
    ctx_.reset(ggml_init({ggml_tensor_overhead() * N_TENSORS_MAX, nullptr, /*no_alloc=*/true}));
    require(ctx_ != nullptr, ErrorKind::resource,
            std::string("out of memory for the tensors of ") + name_);
}

Tensor Arena::add(ggml_type type, const int64_t (&ne)[GGML_MAX_DIMS], const std::string & name,
                  int from, int to) {
    require(tensors_.size() < N_TENSORS_MAX, ErrorKind::input,
            std::string("the graph has too many tensors for ") + name_);
    Tensor t = ggml_new_tensor(ctx_.get(), type, GGML_MAX_DIMS, ne);
    ggml_set_name(t, name.c_str());
    tensors_.push_back({t, from, to, 0, 0});
    return t;
}

// The lowest place that is free at all of p's times.
void Arena::place(Placed & p, const std::vector<Placed> & before) const {
    std::vector<std::pair<size_t, size_t>> taken; // begin, end
    for (const Placed & other : before) {
        if (other.from <= p.to && p.from <= other.to) {
            taken.push_back({other.offset, other.offset + other.size});
        }
    }
    std::sort(taken.begin(), taken.end());
    p.offset = 0;
    for (const auto & [begin, end] : taken) {
        if (p.offset + p.size <= begin) {
            break;
        }
        p.offset = std::max(p.offset, end);
    }
}

void Arena::allocate() {
    const size_t align = ggml_backend_buft_get_alignment(type_);
    std::vector<Placed> placed;
    size_t total = 0;
    for (Placed & p : tensors_) {
        p.size = (ggml_backend_buft_get_alloc_size(type_, p.tensor) + align - 1) / align * align;
        place(p, placed);
        placed.push_back(p);
        total = std::max(total, p.offset + p.size);
    }
    if (total > n_bytes_ && !measured()) {
        buffer_.reset();
        buffer_.reset(ggml_backend_buft_alloc_buffer(type_, total));
        require(buffer_ != nullptr, ErrorKind::resource,
                "cannot allocate " + std::to_string(total >> 20) + " MiB for " + name_ + " on " +
                    ggml_backend_buft_name(type_));
    }
    n_bytes_ = std::max(n_bytes_, total);
    for (const Placed & p : placed) {
        if (measured()) {
            p.tensor->data = this; // anything but null: it has its place
            continue;
        }
        char * base = (char *)ggml_backend_buffer_get_base(buffer_.get());
        ggml_backend_tensor_alloc(buffer_.get(), p.tensor, base + p.offset);
    }
}

Tensor Arena::part(Graph & g, Tensor t, int d, int64_t first, int64_t n) const {
    int64_t ne[GGML_MAX_DIMS] = {t->ne[0], t->ne[1], 1, 1};
    ne[d] = n;
    Tensor rows = ggml_new_tensor(g.ctx(), t->type, GGML_MAX_DIMS, ne);
    if (measured()) {
        rows->data = t->data;
    } else {
        ggml_backend_tensor_alloc(t->buffer, rows, (char *)t->data + (size_t)first * t->nb[d]);
    }
    return rows;
}

} // namespace ggft
