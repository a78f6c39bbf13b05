#include "base/node_report.h"

#include "base/error.h"

#include <algorithm>

namespace ggft {

static Operand operand(Tensor t) {
    Operand o{ggml_type_name(t->type), {}, {}};
    std::copy(t->ne, t->ne + 4, o.ne);
    std::copy(t->nb, t->nb + 4, o.nb);
    return o;
}

static std::string describe(Tensor t) {
    std::string s = std::string(ggml_type_name(t->type)) + "[";
    for (int i = 0; i < ggml_n_dims(t); i++) {
        s += (i ? "," : "") + std::to_string(t->ne[i]);
    }
    return s + "]";
}

static std::string layout(const Operand & o) {
    std::string s;
    for (int i = 0; i < 4; i++) {
        s += " " + std::to_string(o.ne[i]) + "/" + std::to_string(o.nb[i]);
    }
    return s;
}

void GraphReport::add(const Graph & g) {
    for (int i = 0; i < ggml_graph_n_nodes(g.graph()); i++) {
        Tensor t = ggml_graph_node(g.graph(), i);
        NodeReport r;
        r.op = t->op == GGML_OP_CUSTOM ? std::string("CUSTOM ") + t->name : ggml_op_desc(t);
        r.family = ggml_op_name(t->op);
        r.type = ggml_type_name(t->type);
        r.shape = describe(t) + " <-";
        r.result = operand(t);
        std::string key = r.op + layout(r.result);
        for (int s = 0; s < GGML_MAX_SRC && t->src[s] != nullptr; s++) {
            r.shape += " " + describe(t->src[s]);
            r.sources.push_back(operand(t->src[s]));
            key += " " + r.sources.back().type + layout(r.sources.back());
        }
        NodeReport & known = nodes_.emplace(key, r).first->second;
        known.count++;
        known.supported &= r.family != denied_ && ggml_backend_supports_op(backend_, t);
    }
}

std::vector<NodeReport> GraphReport::nodes() const {
    std::vector<NodeReport> result;
    for (const auto & [key, node] : nodes_) {
        result.push_back(node);
    }
    return result;
}

void require_supported(const std::vector<NodeReport> & nodes, ggml_backend_dev_t device) {
    std::string lacking;
    for (const NodeReport & r : nodes) {
        if (!r.supported) {
            lacking += std::string(lacking.empty() ? "" : "; ") + r.op + ": " + r.shape;
        }
    }
    require(lacking.empty(), ErrorKind::resource,
            std::string("device ") + ggml_backend_dev_name(device) + " (" +
                ggml_backend_dev_description(device) + ") does not support " + lacking);
}

} // namespace ggft
