// The graphs of a prepared micro-batch: each segment forward, each segment recomputed and back, and
// the loss head a few rows at a time.
#pragma once

#include "segments/micro_batch.h"

namespace ggft {

class Passes {
public:
    Passes(const PreparedBatch & batch, const Lora & lora, Ops & ops, uint64_t seed, bool exact)
        : batch_(batch), context_{batch.tape(), lora, ops, batch.masks(), seed, exact} {}

    // Computes what the later segments need of segment b.
    Graph forward(size_t b);
    // Recomputes segment b and goes back through it: adds the gradients of its adapters, and hands
    // on those of what it reads from earlier segments.
    Graph backward(size_t b);
    // Both in one graph, whose internals are kept in between: `n_forward` nodes, then those of the
    // way back. Asked for from the last segment to the first, before the head is.
    Graph forward_and_back(size_t b, int & n_forward);
    // Losses of `n` rows from `first` on, and the gradient of what the output matrix reads.
    Graph head(int64_t first, int64_t n, bool training);
    // Logits of `n` rows from `first` on, the last node.
    Graph logits(int64_t first, int64_t n);

private:
    size_t n_nodes(size_t first, size_t last) const;
    void bind(Builder & builder, const Segment & s) const;
    void add_forward(Graph & g, Builder & builder, const Segment & s) const;
    void go_back(Graph & g, Builder & builder, size_t b);
    int head_input() const;
    Tensor add_head(Builder & builder, const BuildContext & context, Tensor x) const;
    Tape chunk_tape(int64_t n) const;

    const PreparedBatch & batch_;
    BuildContext context_;
    std::set<int> valid_;     // roots whose gradient has begun
    std::deque<Tape> chunks_; // what graphs of the head refer to
};

} // namespace ggft
