// Rotary positions.
#include "rules/portable.h"

namespace ggft {

Tensor GgmlOps::rope(Graph & g, const Inputs & in, const Rope & r, Tensor x) {
    Tensor at = ggml_view_1d(g.ctx(), in.positions, in.N(), 0);
    return ggml_rope_ext(g.ctx(), x, at, r.freq_factors, r.n_dims, r.mode, r.n_ctx_orig,
                         r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor, r.beta_fast,
                         r.beta_slow);
}

Tensor GgmlOps::rope_back(Graph & g, const Inputs & in, const Rope & r, Tensor dy) {
    Tensor at = ggml_view_1d(g.ctx(), in.positions, in.N(), 0);
    return ggml_rope_ext_back(g.ctx(), dy, at, r.freq_factors, r.n_dims, r.mode, r.n_ctx_orig,
                              r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor, r.beta_fast,
                              r.beta_slow);
}

} // namespace ggft
