// One operation and its vector-Jacobian product by themselves, on arrays from outside: what the
// tests of local gradients compare with a float64 reference. Weights, rope and adapters are those
// of block 0.
#include "base/error.h"
#include "engine/engine.h"

#include <algorithm>

namespace ggft {

namespace {

// A graph whose leaves are given arrays, and whose results are read back as F32.
class Probe {
public:
    Probe(Graph & g, const Arrays & given) : g_(g), given_(given) {}

    Tensor take(const std::string & name, std::vector<int64_t> ne) {
        Tensor t = ggml_new_tensor(g_.ctx(), GGML_TYPE_F32, (int)ne.size(), ne.data());
        const auto it = given_.find(name);
        require(it != given_.end() && (int64_t)it->second.size() == ggml_nelements(t),
                ErrorKind::input,
                "array '" + name + "' is missing or of another size (expected " +
                    std::to_string(ggml_nelements(t)) + ")");
        ggml_set_input(t);
        leaves_.push_back({t, it->second.data()});
        return t;
    }

    // A copy, so that no later node overwrites it.
    void give(const std::string & name, Tensor t) {
        if (t->type != GGML_TYPE_F64) {
            t = ggml_cpy(g_.ctx(), t,
                         ggml_new_tensor(g_.ctx(), GGML_TYPE_F32, GGML_MAX_DIMS, t->ne));
        }
        ggml_set_output(g_.expand(t));
        results_.push_back({name, t});
    }

    void write() const {
        for (const auto & [t, data] : leaves_) {
            if (t->buffer != nullptr) {
                ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
            }
        }
    }

    Arrays read() const {
        Arrays out;
        for (const auto & [name, t] : results_) {
            std::vector<float> & values = out[name];
            values.resize((size_t)ggml_nelements(t));
            if (t->type == GGML_TYPE_F64) {
                std::vector<double> wide(values.size());
                ggml_backend_tensor_get(t, wide.data(), 0, ggml_nbytes(t));
                std::copy(wide.begin(), wide.end(), values.begin());
            } else {
                ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
            }
        }
        return out;
    }

private:
    Graph & g_;
    const Arrays & given_;
    std::vector<std::pair<Tensor, const float *>> leaves_;
    std::vector<std::pair<std::string, Tensor>> results_;
};

int site_of(const std::string & name) {
    for (int site = 0; site < N_SITES; site++) {
        if (name == site_name(site)) {
            return site;
        }
    }
    return -1;
}

} // namespace

Arrays Engine::probe(const std::string & op, const MicroBatch & batch, const Arrays & given) {
    require_training();
    set_inputs(batch);
    const Hparams & h = model_->hparams;
    const Layer & w = model_->layers[0];
    const int64_t N = in_.N(), C = h.n_embd, D = h.n_embd_head, H = h.n_head, K = h.n_head_kv,
                  F = h.n_ff;
    Graph g = new_graph();
    Probe p(g, given);
    const int site = site_of(op);
    if (op == "rms_norm") {
        Tensor x = p.take("x", {C, N});
        p.give("y", ops_->rms_norm(g, x, w.attn_norm, h.norm_eps, false));
        p.give("dx",
               ops_->rms_norm_back(g, x, w.attn_norm, h.norm_eps, p.take("dy", {C, N}), nullptr));
    } else if (op == "rope") {
        p.give("y", ops_->rope(g, in_, h.rope, p.take("x", {D, H, N})));
        p.give("dx", ops_->rope_back(g, in_, h.rope, p.take("dy", {D, H, N})));
    } else if (op == "swiglu") {
        Tensor gate = p.take("gate", {F, N}), up = p.take("up", {F, N});
        p.give("y", ops_->swiglu(g, gate, up));
        const auto d = ops_->swiglu_back(g, gate, up, p.take("dy", {F, N}));
        p.give("dgate", d.dgate);
        p.give("dup", d.dup);
    } else if (op == "attention") {
        const Qkv x{p.take("q", {D, H, N}), p.take("k", {D, K, N}), p.take("v", {D, K, N})};
        Tensor attn = ops_->attention(g, in_, x, h.attn_scale);
        p.give("y", ops_->attention_out(g, attn, D * H, N));
        const Qkv d = ops_->attention_back(g, in_, x, attn, p.take("dy", {D * H, N}), h.attn_scale);
        p.give("dq", d.q);
        p.give("dk", d.k);
        p.give("dv", d.v);
    } else if (op == "loss") {
        auto part = [&](Tensor t) {
            return t == nullptr ? t : ggml_view_1d(g.ctx(), t, n_targets_, 0);
        };
        Tensor n = p.take("n", {C, n_targets_});
        const auto loss = ops_->loss(g, {model_->output, nullptr}, n, part(in_.labels),
                                     part(in_.portable.label_at), true);
        p.give("nats", loss.nats);
        p.give("dn", loss.dn);
    } else if (site >= 0) {
        const Linear & linear = w.linear[site];
        const LoraPair & pair = lora_->pair(0, site);
        std::vector<const LoraPair *> adapters;
        if (pair) {
            adapters.push_back(&pair);
        }
        Tensor x = p.take("x", {linear.weight->ne[0], N});
        const LinearInput in = ops_->linear_input(g, in_, x, 0, true, adapters);
        p.give("y", ops_->linear(g, linear, pair, in, nullptr));
        p.give("dx", ops_->linear_back(g, linear, pair, in, p.take("dy", {linear.weight->ne[1], N}),
                                       nullptr, true));
    } else {
        fail(ErrorKind::input, "no operation is called '" + op + "'");
    }
    allocate_graph(g);
    p.write();
    compute(g);
    return p.read();
}

} // namespace ggft
