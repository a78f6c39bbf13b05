#include "segments/passes.h"

#include "kernels/isa/dispatch.h"

namespace ggft {

// Nodes that the rules may make of one, and those of its copies and views.
static constexpr size_t NODES_PER_NODE = 48;

size_t Passes::n_nodes(size_t first, size_t last) const {
    return 256 + NODES_PER_NODE * (last - first);
}

void Passes::bind(Builder & builder, const Segment & s) const {
    for (const auto & [i, tensor] : batch_.inputs) {
        builder.bind(i, tensor);
    }
    for (int root : s.in) {
        builder.bind(root, batch_.kept.at(root));
        if (batch_.gradients.count(root) != 0) {
            builder.back.need(batch_.kept.at(root));
        }
    }
}

Graph Passes::forward(size_t b) {
    const Segment & s = batch_.segments().blocks[b];
    Graph g(n_nodes((size_t)s.first, (size_t)s.last));
    Builder builder(g, context_);
    add_forward(g, builder, s);
    return g;
}

void Passes::add_forward(Graph & g, Builder & builder, const Segment & s) const {
    bind(builder, s);
    for (int at = s.first; at < s.last; at++) {
        builder.add(batch_.tape().order[(size_t)at]);
    }
    for (int root : s.out) {
        g.expand(ggml_cpy(g.ctx(), builder.get(root), batch_.kept.at(root)));
    }
}

Graph Passes::backward(size_t b) {
    const Segment & s = batch_.segments().blocks[b];
    Graph g(n_nodes((size_t)s.first, (size_t)s.last));
    Builder builder(g, context_);
    bind(builder, s);
    for (int at = s.first; at < s.last; at++) {
        builder.add(batch_.tape().order[(size_t)at]);
    }
    go_back(g, builder, b);
    return g;
}

Graph Passes::forward_and_back(size_t b, int & n_forward) {
    const Segment & s = batch_.segments().blocks[b];
    Graph g(n_nodes((size_t)s.first, (size_t)s.last));
    Builder builder(g, context_);
    add_forward(g, builder, s);
    n_forward = ggml_graph_n_nodes(g.graph());
    valid_.insert(batch_.tape()[head_input()].root); // as it will be when the head has run
    go_back(g, builder, b);
    return g;
}

void Passes::go_back(Graph & g, Builder & builder, size_t b) {
    const Segment & s = batch_.segments().blocks[b];
    for (const std::vector<int> * roots : {&s.in, &s.out}) {
        for (int root : *roots) {
            if (valid_.count(root) != 0) {
                builder.back.set(builder.get(root), batch_.gradients.at(root));
            }
        }
    }
    builder.backward();
    for (int root : s.in) {
        const auto kept = batch_.gradients.find(root);
        Tensor gradient =
            kept == batch_.gradients.end() ? nullptr : builder.back.gradient(builder.get(root));
        if (gradient != nullptr && gradient != kept->second && b > batch_.first_trained()) {
            g.expand(ggml_cpy(g.ctx(), gradient, kept->second));
            valid_.insert(root);
        }
    }
}

int Passes::head_input() const {
    const Tape & tape = batch_.tape();
    return tape[tape.order[(size_t)batch_.segments().head]].src[1];
}

// The tape with n rows behind the output matrix.
Tape Passes::chunk_tape(int64_t n) const {
    Tape tape = batch_.tape();
    auto resize = [&](int i) {
        TapeTensor & t = tape[i];
        t.ne[1] = n;
        t.nb[2] = t.nb[3] = (size_t)n * t.nb[1];
    };
    resize(head_input());
    for (size_t at = (size_t)batch_.segments().head; at < tape.order.size(); at++) {
        resize(tape.order[at]);
    }
    return tape;
}

// The logits of x's rows.
Tensor Passes::add_head(Builder & builder, const BuildContext & context, Tensor x) const {
    builder.bind(head_input(), x);
    for (const auto & [i, tensor] : batch_.inputs) {
        builder.bind(i, tensor);
    }
    for (size_t at = (size_t)batch_.segments().head; at < context.tape.order.size(); at++) {
        builder.add(context.tape.order[at]);
    }
    return builder.get(context.tape.out);
}

Graph Passes::head(int64_t first, int64_t n, bool training) {
    chunks_.push_back(chunk_tape(n));
    const BuildContext context{chunks_.back(), context_.lora, context_.ops, batch_.masks(), 0,
                               context_.exact};
    Graph g(n_nodes((size_t)batch_.segments().head, context.tape.order.size()));
    const int root = context.tape[head_input()].root;
    Tensor x = batch_.arena().part(g, batch_.kept.at(root), 1, first, n);
    Tensor labels = batch_.arena().part(g, batch_.labels, 0, first, n),
           nats = batch_.arena().part(g, batch_.nats, 0, first, n);
    Builder builder(g, context);
    builder.back.need(x);
    Tensor z = add_head(builder, context, x);
    const LossKernels & k = context_.ops.kernel_set()->loss; // traced engines have fused kernels
    Tensor dz = g.custom_inplace("cross_entropy", z, {labels}, [=, &k](Tensor z, int ith, int nth) {
        k.cross_entropy((float *)z->data, z->ne[0], (const int32_t *)labels->data, z->ne[0], n,
                        {training}, (double *)nats->data, ith, nth);
    });
    if (!training) {
        g.expand(dz);
        return g;
    }
    builder.back.set(z, dz);
    builder.backward();
    Tensor dx = batch_.arena().part(g, batch_.gradients.at(root), 1, first, n);
    Tensor gradient = builder.back.gradient(x);
    if (batch_.weights != nullptr) {
        Tensor weights = batch_.arena().part(g, batch_.weights, 1, first, n);
        gradient = ggml_mul(g.ctx(), gradient, weights);
    }
    g.expand(ggml_cpy(g.ctx(), gradient, dx));
    valid_.insert(root);
    return g;
}

Graph Passes::logits(int64_t first, int64_t n) {
    chunks_.push_back(chunk_tape(n));
    const BuildContext context{chunks_.back(), context_.lora, context_.ops, batch_.masks(), 0,
                               context_.exact};
    Graph g(n_nodes((size_t)batch_.segments().head, context.tape.order.size()));
    Tensor x = batch_.arena().part(g, batch_.kept.at(context.tape[head_input()].root), 1, first, n);
    Builder builder(g, context);
    ggml_set_output(g.expand(add_head(builder, context, x)));
    return g;
}

} // namespace ggft
