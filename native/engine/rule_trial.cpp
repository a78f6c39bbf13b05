#include "engine/rule_trial.h"

#include "base/devices.h"
#include "base/error.h"
#include "rules/table.h"

#include <algorithm>

namespace ggft {

static constexpr size_t N_NODES_MAX = 256;

// The operation of a name, and the kind that begins its parameters (-1 for none).
static std::pair<ggml_op, int> find_op(const std::string & name) {
    for (int i = 0; i < GGML_UNARY_OP_COUNT; i++) {
        if (name == ggml_unary_op_name((ggml_unary_op)i)) {
            return {GGML_OP_UNARY, i};
        }
    }
    for (int i = 0; i < GGML_GLU_OP_COUNT; i++) {
        if (name == ggml_glu_op_name((ggml_glu_op)i)) {
            return {GGML_OP_GLU, i};
        }
    }
    for (int i = 0; i < GGML_OP_COUNT; i++) {
        if (name == ggml_op_name((ggml_op)i)) {
            return {(ggml_op)i, -1};
        }
    }
    fail(ErrorKind::input, "ggml has no operation " + name);
}

static std::vector<float> values_of(Tensor t) {
    std::vector<float> values((size_t)ggml_nelements(t));
    ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
    return values;
}

// A copy that nothing overwrites.
static Tensor result(Graph & g, Tensor t) {
    t = ggml_cpy(g.ctx(), t, ggml_new_tensor(g.ctx(), GGML_TYPE_F32, GGML_MAX_DIMS, t->ne));
    ggml_set_output(t);
    return g.expand(t);
}

TrialResult try_rule(const Trial & trial) {
    const Rule rule = find_rule(trial.op);
    require(rule != nullptr, ErrorKind::input, "there is no rule for " + trial.op);
    const auto [op, kind] = find_op(trial.op);
    Graph g(N_NODES_MAX);
    Backward back(g);
    Tensor y = ggml_new_tensor(g.ctx(), GGML_TYPE_F32, GGML_MAX_DIMS, trial.ne.data());
    y->op = op;
    const size_t first = kind < 0 ? 0 : 1;
    y->op_params[0] = std::max(kind, 0);
    std::copy(trial.params.begin(), trial.params.end(), y->op_params + first);
    for (size_t i = 0; i < trial.sources.size(); i++) {
        const TrialSource & s = trial.sources[i];
        y->src[i] = ggml_new_tensor(g.ctx(), s.type, GGML_MAX_DIMS, s.ne.data());
        ggml_set_input(y->src[i]);
        if (!s.frozen) {
            back.need(y->src[i]);
        }
    }
    Tensor dy = ggml_new_tensor(g.ctx(), GGML_TYPE_F32, GGML_MAX_DIMS, trial.ne.data());
    ggml_set_input(dy);
    Tensor y_out = result(g, y);
    rule(back, y, dy);
    std::vector<Tensor> gradients;
    for (size_t i = 0; i < trial.sources.size(); i++) {
        Tensor d = trial.sources[i].frozen ? nullptr : back.gradient(y->src[i]);
        gradients.push_back(d == nullptr ? nullptr : result(g, d));
    }
    ggml_backend_dev_t device = find_device("cpu");
    ggml_backend_ptr backend = open_device(device, 1);
    ggml_gallocr_ptr alloc(ggml_gallocr_new(ggml_backend_dev_buffer_type(device)));
    require(ggml_gallocr_alloc_graph(alloc.get(), g.graph()), ErrorKind::resource,
            "out of memory for a rule");
    for (size_t i = 0; i < trial.sources.size(); i++) {
        if (y->src[i]->buffer != nullptr) {
            ggml_backend_tensor_set(y->src[i], trial.sources[i].data, 0, ggml_nbytes(y->src[i]));
        }
    }
    if (dy->buffer != nullptr) {
        ggml_backend_tensor_set(dy, trial.dy, 0, ggml_nbytes(dy));
    }
    g.compute(backend.get());
    TrialResult out{values_of(y_out), {}};
    for (Tensor d : gradients) {
        out.gradients.push_back(d == nullptr ? std::vector<float>() : values_of(d));
    }
    return out;
}

} // namespace ggft
