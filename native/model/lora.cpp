#include "model/lora.h"

#include "base/error.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace ggft {

// Width of the flat tensors; each parameter starts on a multiple of ALIGN elements.
static constexpr int64_t ROW = 1024;
static constexpr int64_t ALIGN = 128;
static constexpr float LARGEST_HALF = 65504;

static std::vector<LoraSite> target_sites(const Model & model, const LoraConfig & config) {
    const int64_t n_layer = model.hparams.n_layer;
    require(0 <= config.layer_first && config.layer_first < config.layer_last &&
                config.layer_last <= n_layer,
            ErrorKind::input,
            "layer range is outside the model's " + std::to_string(n_layer) + " layers");
    std::vector<LoraSite> sites;
    for (int l = config.layer_first; l < config.layer_last; l++) {
        for (int s = 0; s < N_SITES; s++) {
            if (config.targets[s]) {
                const Tensor w = model.layers[(size_t)l].linear[s].weight;
                sites.push_back({weight_name(l, s), w->ne[0], w->ne[1]});
            }
        }
    }
    return sites;
}

Lora::Lora(const Model & model, const LoraConfig & config, ggml_backend_dev_t device, Memory memory)
    : Lora(target_sites(model, config), config, device, memory) {}

Lora::Lora(const std::vector<LoraSite> & sites, const LoraConfig & config,
           ggml_backend_dev_t device, Memory memory)
    : config_(config), buffer_("LoRA", ggml_backend_dev_buffer_type(device), memory, 8) {
    require(config.rank >= 1, ErrorKind::input, "rank must be at least 1");
    require(!sites.empty(), ErrorKind::input, "no target module is selected");
    auto place = [&](const std::string & name, int64_t ne0, int64_t ne1) {
        parameters_.push_back({name, ne0, ne1, n_elements_});
        n_elements_ += (ne0 * ne1 + ALIGN - 1) / ALIGN * ALIGN;
    };
    for (const LoraSite & site : sites) {
        place(site.weight + ".lora_a", site.n_in, config.rank);
        place(site.weight + ".lora_b", config.rank, site.n_out);
    }
    n_rows_ = (n_elements_ + ROW - 1) / ROW;
    value_ = buffer_.add(config.type, {ROW, n_rows_}, "value");
    if (config.type != GGML_TYPE_F32) {
        loaded_ = buffer_.add(GGML_TYPE_F32, {layer_size()}, "loaded");
    }
    if (config.train) {
        grad_ = buffer_.add(GGML_TYPE_F32, {ROW, n_rows_}, "grad");
        m_ = buffer_.add(GGML_TYPE_F32, {ROW, n_rows_}, "m");
        v_ = buffer_.add(GGML_TYPE_F32, {ROW, n_rows_}, "v");
        options_ = buffer_.add(GGML_TYPE_F32, {7}, "adamw");
        factor_ = buffer_.add(GGML_TYPE_F32, {1}, "factor");
        ggml_set_param(value_);
    }
    buffer_.allocate();
    make_pairs(sites);
}

const LoraPair & Lora::pair(const std::string & weight) const {
    static const LoraPair none;
    const auto found = pairs_.find(weight);
    return found == pairs_.end() ? none : found->second;
}

int64_t Lora::layer_size() const {
    return n_elements_ / (config_.layer_last - config_.layer_first);
}

void Lora::make_pairs(const std::vector<LoraSite> & sites) {
    views_.reset(ggml_init({ggml_tensor_overhead() * 2 * (parameters_.size() + 1), nullptr, true}));
    require(views_ != nullptr, ErrorKind::resource, "out of memory for the adapter's tensors");
    auto view = [&](Tensor flat, const Parameter & p, const char * prefix) -> Tensor {
        if (flat == nullptr) {
            return nullptr;
        }
        const int64_t at = flat == loaded_ ? p.offset % layer_size() : p.offset;
        Tensor t = ggml_view_2d(views_.get(), flat, p.ne0, p.ne1, (size_t)p.ne0 * sizeof(float),
                                (size_t)at * sizeof(float));
        buffer_.place(t, flat, (size_t)at * sizeof(float));
        ggml_set_name(t, (prefix + p.name).c_str());
        return t;
    };
    const Tensor value = loaded_ != nullptr ? loaded_ : value_;
    for (size_t i = 0; i < sites.size(); i++) {
        const Parameter &a = parameters_[2 * i], &b = parameters_[2 * i + 1];
        pairs_[sites[i].weight] = {view(value, a, ""), view(value, b, ""), view(grad_, a, "d "),
                                   view(grad_, b, "d "),
                                   sites[i].factor * config_.alpha / (float)config_.rank};
    }
}

void Lora::load(Graph & g, int64_t layer) const {
    if (loaded_ == nullptr || layer < config_.layer_first || layer >= config_.layer_last) {
        return;
    }
    const auto at = (size_t)((layer - config_.layer_first) * layer_size());
    g.expand(ggml_cpy(
        g.ctx(), ggml_view_1d(g.ctx(), value_, layer_size(), at * ggml_type_size(value_->type)),
        loaded_));
}

Tensor Lora::flat(const std::string & which) const {
    const std::map<std::string, Tensor> known = {
        {"value", value_}, {"grad", grad_}, {"m", m_}, {"v", v_}};
    const auto it = known.find(which);
    require(it != known.end(), ErrorKind::input,
            "unknown state '" + which + "' (expected value, grad, m or v)");
    require(it->second != nullptr, ErrorKind::input,
            "the engine was opened for evaluation: it has no '" + which + "'");
    return it->second;
}

const Parameter & Lora::parameter(const std::string & name) const {
    for (const auto & p : parameters_) {
        if (p.name == name) {
            return p;
        }
    }
    fail(ErrorKind::input, "no trainable tensor is called '" + name + "'");
}

void Lora::get(const std::string & name, const std::string & which, float * out) const {
    const Parameter & p = parameter(name);
    const Tensor t = flat(which);
    const size_t size = ggml_type_size(t->type), n = (size_t)(p.ne0 * p.ne1);
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_get(t, out, (size_t)p.offset * size, n * size);
        return;
    }
    std::vector<ggml_fp16_t> half(n);
    ggml_backend_tensor_get(t, half.data(), (size_t)p.offset * size, n * size);
    ggml_fp16_to_fp32_row(half.data(), out, (int64_t)n);
}

void Lora::set(const std::string & name, const std::string & which, const float * in) {
    const Parameter & p = parameter(name);
    const Tensor t = flat(which);
    const size_t size = ggml_type_size(t->type), n = (size_t)(p.ne0 * p.ne1);
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(t, in, (size_t)p.offset * size, n * size);
        return;
    }
    const bool fits = std::all_of(in, in + n, [](float x) { return std::fabs(x) <= LARGEST_HALF; });
    require(fits, ErrorKind::input, name + " has values that 16 bits cannot hold");
    std::vector<ggml_fp16_t> half(n);
    ggml_fp32_to_fp16_row(in, half.data(), (int64_t)n);
    ggml_backend_tensor_set(t, half.data(), (size_t)p.offset * size, n * size);
}

void Lora::zero_grad() {
    const Tensor grad = flat("grad");
    ggml_backend_tensor_memset(grad, 0, 0, ggml_nbytes(grad));
}

std::string Lora::first_nonfinite_grad() const {
    std::vector<float> values;
    for (const auto & p : parameters_) {
        values.resize((size_t)(p.ne0 * p.ne1));
        get(p.name, "grad", values.data());
        for (float x : values) {
            if (!std::isfinite(x)) {
                return p.name;
            }
        }
    }
    return "";
}

Graph Lora::norm_graph() const {
    Graph g(16);
    Tensor sums = ggml_sum_rows(g.ctx(), ggml_sqr(g.ctx(), grad_));
    ggml_set_output(g.expand(sums));
    return g;
}

// The update as a graph: value, m and v change in place.
Graph Lora::step_graph() const {
    Graph g(16);
    Tensor scaled = ggml_mul(g.ctx(), grad_, factor_);
    g.expand(ggml_opt_step_adamw(g.ctx(), value_, scaled, m_, v_, options_));
    return g;
}

double Lora::step(ggml_backend_t backend, const AdamWConfig & o, float lr, int64_t n_targets,
                  int64_t t) {
    const auto buft = ggml_backend_get_default_buffer_type(backend);
    ggml_gallocr_ptr alloc(ggml_gallocr_new(buft));

    // Global norm: squares are summed per row on the device, the rows in double on the host.
    Graph squares = norm_graph();
    require(ggml_gallocr_alloc_graph(alloc.get(), squares.graph()), ErrorKind::resource,
            "out of memory for the gradient norm");
    squares.compute(backend);
    std::vector<float> rows((size_t)n_rows_);
    ggml_backend_tensor_get(ggml_graph_node(squares.graph(), -1), rows.data(), 0,
                            rows.size() * sizeof(float));
    double square = 0;
    for (float r : rows) {
        square += r;
    }
    const double norm = std::sqrt(square) / (double)n_targets;
    if (!std::isfinite(norm)) {
        const std::string name = first_nonfinite_grad();
        fail(ErrorKind::numeric, name.empty()
                                     ? "the gradient is so large that its norm is not finite"
                                     : "the gradient is not finite in " + name);
    }

    const double clip =
        o.max_grad_norm > 0 && norm > o.max_grad_norm ? o.max_grad_norm / norm : 1.0;
    const float factor = (float)(clip / (double)n_targets);
    const float options[7] = {lr,
                              o.beta1,
                              o.beta2,
                              o.eps,
                              o.weight_decay,
                              (float)(1.0 / (1.0 - std::pow((double)o.beta1, (double)t))),
                              (float)(1.0 / (1.0 - std::pow((double)o.beta2, (double)t)))};
    ggml_backend_tensor_set(factor_, &factor, 0, sizeof(factor));
    ggml_backend_tensor_set(options_, options, 0, sizeof(options));
    Graph update = step_graph();
    require(ggml_gallocr_alloc_graph(alloc.get(), update.graph()), ErrorKind::resource,
            "out of memory for the optimizer step");
    update.compute(backend);
    zero_grad();
    return norm;
}

} // namespace ggft
