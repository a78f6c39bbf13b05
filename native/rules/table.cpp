#include "rules/table.h"

#include "base/error.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace ggft {

static const std::unordered_map<std::string, Rule> & rules() {
    static const std::unordered_map<std::string, Rule> table = [] {
        std::unordered_map<std::string, Rule> t;
        for (const auto * family :
             {&elementwise_rules(), &shape_rules(), &row_rules(), &product_rules()}) {
            for (const NamedRule & r : *family) {
                t[r.op] = r.rule;
            }
        }
        return t;
    }();
    return table;
}

Rule find_rule(const std::string & op) {
    const auto rule = rules().find(op);
    return rule == rules().end() ? nullptr : rule->second;
}

std::vector<std::string> rule_names() {
    std::vector<std::string> names;
    for (const auto & [name, rule] : rules()) {
        names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
}

std::string op_name(Tensor t) {
    switch (t->op) {
    case GGML_OP_UNARY:
        return ggml_unary_op_name(ggml_get_unary_op(t));
    case GGML_OP_GLU:
        return ggml_glu_op_name(ggml_get_glu_op(t));
    default:
        return ggml_op_name(t->op);
    }
}

Tensor fold(Backward & b, Tensor dy, Tensor like) {
    ggml_context * c = b.g.ctx();
    for (int d = 0; d < GGML_MAX_DIMS; d++) {
        if (dy->ne[d] == like->ne[d]) {
            continue;
        }
        require(like->ne[d] == 1, ErrorKind::input,
                std::string("ggft cannot differentiate a repetition of ") + like->name + " yet");
        int to[4] = {0, 1, 2, 3}; // d and 0 change places, and back
        std::swap(to[0], to[d]);
        Tensor first = d == 0 ? dy : ggml_cont(c, ggml_permute(c, dy, to[0], to[1], to[2], to[3]));
        Tensor sum = ggml_sum_rows(c, first);
        dy = d == 0 ? sum : ggml_cont(c, ggml_permute(c, sum, to[0], to[1], to[2], to[3]));
    }
    return dy;
}

// The axes of a view from its smallest stride to its largest; axes of size 1 last.
static std::vector<int> by_stride(Tensor t) {
    std::vector<int> axes(GGML_MAX_DIMS);
    std::iota(axes.begin(), axes.end(), 0);
    std::stable_sort(axes.begin(), axes.end(), [&](int a, int b) {
        const bool one_a = t->ne[a] == 1, one_b = t->ne[b] == 1;
        return one_a != one_b ? one_b : !one_a && t->nb[a] < t->nb[b];
    });
    return axes;
}

void Backward::add(Tensor t, Tensor dt) {
    if (!needs(t) || ggml_nelements(t) == 0) {
        return;
    }
    ggml_context * c = g.ctx();
    Tensor root = root_of(t);
    // In the order of the memory that t looks at.
    const std::vector<int> axes = by_stride(t);
    int to[4];
    for (int i = 0; i < 4; i++) {
        to[axes[(size_t)i]] = i;
    }
    Tensor d = ggml_permute(c, dt, to[0], to[1], to[2], to[3]);
    d = ggml_is_contiguous(d) ? d : ggml_cont(c, d);
    size_t nb[4];
    bool dense = true;
    size_t expected = sizeof(float);
    for (int i = 0; i < 4; i++) {
        const int axis = axes[(size_t)i];
        nb[i] = t->ne[axis] == 1 ? expected : t->nb[axis];
        dense = dense && nb[i] == expected;
        expected = nb[i] * (size_t)t->ne[axis];
    }
    require(nb[0] == sizeof(float), ErrorKind::input,
            std::string("ggft cannot differentiate the view ") + t->name + " yet");
    Tensor & sum = of_[root];
    Tensor like = needed_.at(root);
    if (dense && ggml_nelements(t) == ggml_nelements(like)) {
        d = ggml_reshape(c, d, like);
        sum = sum == nullptr ? d : ggml_add(c, sum, d);
        own_.erase(root);
        return;
    }
    const size_t offset = t->view_src == nullptr ? 0 : t->view_offs;
    if (sum == nullptr) {
        sum = ggml_fill(c, like, 0);
        own_.insert(root);
    }
    const bool in_place = own_.count(root) != 0;
    sum = in_place ? ggml_acc_inplace(c, sum, d, nb[1], nb[2], nb[3], offset)
                   : ggml_acc(c, sum, d, nb[1], nb[2], nb[3], offset);
    own_.insert(root);
}

Tensor Backward::gradient(Tensor root) const {
    const auto found = of_.find(root_of(root));
    return found == of_.end() ? nullptr : found->second;
}

} // namespace ggft
