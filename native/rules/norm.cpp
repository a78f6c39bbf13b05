// RMSNorm times its weight.
#include "rules/portable.h"

namespace ggft {

Tensor GgmlOps::rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool) {
    Tensor n = ggml_rms_norm(g.ctx(), x, eps);
    return w == nullptr ? n : ggml_mul(g.ctx(), n, w);
}

// dx = residual + (gw - n̂ mean(gw n̂)) / rms, gw = dn w.
Tensor GgmlOps::rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                              Tensor residual) {
    ggml_context * c = g.ctx();
    Tensor n_hat = ggml_rms_norm(c, x, eps);
    Tensor gw = w == nullptr ? dn : ggml_mul(c, dn, w);
    Tensor mean = ggml_mean(c, ggml_mul(c, gw, n_hat));
    Tensor rms = ggml_sqrt(c, ggml_scale_bias(c, ggml_mean(c, ggml_sqr(c, x)), 1.0f, eps));
    Tensor dx = ggml_div(c, ggml_sub(c, gw, ggml_mul(c, n_hat, mean)), rms);
    return add(g, dx, residual);
}

} // namespace ggft
