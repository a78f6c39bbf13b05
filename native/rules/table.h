// The vector-Jacobian product of every operation that ggft can train through: one entry per ggml
// operation, in one table. A rule is given a node y and its gradient dy, both contiguous and of y's
// shape, and adds a gradient to each source that needs one, as nodes that GPU backends have too.
//
// Gradients live per root tensor: a view, a reshape or a permutation has no rule, as what is added
// to it lands in the gradient of the memory that it looks at.
#pragma once

#include "base/graph.h"

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace ggft {

// The gradients of a graph's tensors while the graph is walked backwards.
class Backward {
public:
    explicit Backward(Graph & g) : g(g) {}

    // Marks the memory of t as one that a gradient reaches.
    void need(Tensor t) { needed_.emplace(root_of(t), root_of(t)); }
    // The same for t's part of its memory, from the beginning, alone: its gradient has t's shape.
    void need_part(Tensor t) { needed_.emplace(root_of(t), t); }
    bool needs(Tensor t) const { return t != nullptr && needed_.count(root_of(t)) != 0; }

    // Adds dt, of t's shape, to the gradient of t's memory. Nothing happens if it needs none.
    void add(Tensor t, Tensor dt);
    // The gradient of a root, contiguous and of its shape, or null if nothing was added.
    Tensor gradient(Tensor root) const;
    // A gradient that comes from outside the graph; never overwritten.
    void set(Tensor root, Tensor gradient) { of_[root_of(root)] = gradient; }

    Graph & g;

private:
    static Tensor root_of(Tensor t) { return t->view_src != nullptr ? t->view_src : t; }

    std::unordered_map<Tensor, Tensor> needed_; // root -> what its gradient is like
    std::unordered_map<Tensor, Tensor> of_;
    std::unordered_set<Tensor> own_; // gradients that nothing else reads: added to in place
};

using Rule = void (*)(Backward & b, Tensor y, Tensor dy);

// By ggml's name of the operation, and of its kind for UNARY and GLU ("MUL_MAT", "SILU", "GEGLU");
// null if there is none.
Rule find_rule(const std::string & op);
std::vector<std::string> rule_names();
std::string op_name(Tensor t);

// Families of rules, each in a file of its own; see the formulas there.
struct NamedRule {
    const char * op;
    Rule rule;
};
const std::vector<NamedRule> & elementwise_rules();
const std::vector<NamedRule> & shape_rules();
const std::vector<NamedRule> & row_rules();
const std::vector<NamedRule> & product_rules();

// ---- what rules share ----

// dy summed over what was broadcast (size 1 against n) from `like`'s shape.
Tensor fold(Backward & b, Tensor dy, Tensor like);

} // namespace ggft
