// FusedOps: the operations on custom CPU kernels (kernels_*.h). Weights are dequantized inside the matrix
// products, attention never holds its scores, and dropout masks are hashed, not stored.
#include "kernels_elementwise.h"
#include "kernels_gemm.h"
#include "kernels_loss.h"
#include "ops.h"

namespace ggft {

namespace {

Weight weight_of(Tensor w) { return {w->type, w->ne[1], w->ne[0], w->data, w->nb[1]}; }

Rows rows_of(Tensor x) { return {x->data, x->type == GGML_TYPE_BF16, x->ne[0]}; }

float * floats(Tensor t) { return (float *) t->data; }

class FusedOps : public Ops {
  public:
    FusedOps(const Inputs & in, Mode mode, float dropout) :
        precision_(mode == Mode::fast ? Precision::bf16 : Precision::f32),
        dropout_(dropout),
        portable_(make_ggml_ops(in, Mode::f32, false)) {}

    const char * name() const override { return "fused"; }

    Tensor rms_norm(Graph & g, Tensor x, Tensor w, float eps) override {
        return g.custom("rms_norm", GGML_TYPE_F32, {x->ne[0], x->ne[1]}, {x, w}, [=](Tensor n, int ith, int nth) {
            ggft::rms_norm(floats(x), floats(w), eps, floats(n), x->ne[0], x->ne[1], ith, nth);
        });
    }

    Tensor rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn, Tensor residual) override {
        std::vector<Tensor> args = {x, w, dn};
        if (residual != nullptr) { args.push_back(residual); }
        auto kernel = [=](Tensor dx, int ith, int nth) {
            ggft::rms_norm_back(floats(x), floats(w), eps, floats(dn), residual ? floats(residual) : nullptr, floats(dx),
                                x->ne[0], x->ne[1], ith, nth);
        };
        return g.custom("rms_norm_back", GGML_TYPE_F32, {x->ne[0], x->ne[1]}, args, kernel);
    }

    LinearInput linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout) override {
        return portable_->linear_input(g, in, x, id, dropout);
    }

    Tensor linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in, Tensor residual) override {
        ggml_context *    c = g.ctx();
        Tensor            x = in.x, W = w.weight, b = lora.b;
        const Precision   precision = precision_;
        const float       scale     = lora.scale;
        std::vector<Tensor> args    = {W, x};
        Tensor              u       = nullptr;
        if (lora) {
            u = ggml_mul_mat(c, lora.a, in.dropped);
            args.push_back(u);
        }
        Tensor y = g.custom("matmul", GGML_TYPE_F32, {W->ne[1], x->ne[1]}, args, [=](Tensor y, int ith, int nth) {
            LowRank low{};
            if (u != nullptr) { low = {floats(u), u->ne[0], floats(b), (int) u->ne[0], scale}; }
            matmul_nt(precision, weight_of(W), rows_of(x), u ? &low : nullptr, {floats(y), y->ne[0]}, y->ne[1], ith, nth);
        });
        if (w.bias != nullptr) { y = ggml_add(c, y, w.bias); }
        return residual == nullptr ? y : ggml_add(c, y, residual);
    }

    Tensor linear_back(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in, Tensor dy, Tensor acc,
                       bool need_dx) override {
        ggml_context * c  = g.ctx();
        Tensor         du = nullptr;
        auto           tr = [&](Tensor t) { return ggml_cont(c, ggml_transpose(c, t)); };
        if (lora) {
            Tensor u = ggml_scale(c, ggml_mul_mat(c, lora.a, in.dropped), lora.scale);
            g.expand(ggml_add_inplace(c, lora.db, ggml_mul_mat(c, tr(u), tr(dy))));
            du = ggml_scale(c, ggml_mul_mat(c, tr(lora.b), dy), lora.scale);
            g.expand(ggml_add_inplace(c, lora.da, ggml_mul_mat(c, tr(in.dropped), tr(du))));
        }
        if (!need_dx) { return acc; }
        Tensor          W = w.weight, a = lora.a;
        const Precision precision = precision_;
        const bool      masked    = in.keep != nullptr;
        std::vector<Tensor> args  = {W, dy};
        if (du != nullptr) { args.push_back(du); }
        const bool fuse_lora = du != nullptr && !masked;
        auto       kernel    = [=](Tensor dx, int ith, int nth) {
            LowRank low{};
            if (fuse_lora) { low = {floats(du), du->ne[0], floats(a), (int) du->ne[0]}; }
            matmul_nn(precision, weight_of(W), rows_of(dy), fuse_lora ? &low : nullptr,
                      {floats(dx), dx->ne[0], acc != nullptr}, dx->ne[1], ith, nth);
        };
        Tensor dx = acc != nullptr ? g.custom_inplace("matmul_back", acc, args, kernel)
                                   : g.custom("matmul_back", GGML_TYPE_F32, {W->ne[0], dy->ne[1]}, args, kernel);
        if (du != nullptr && masked) { dx = ggml_add(c, dx, ggml_mul(c, ggml_mul_mat(c, tr(a), du), in.keep)); }
        return dx;
    }

    Tensor rope(Graph & g, const Inputs & in, const Rope & r, Tensor x) override {
        return rotate(g, in, r, x, false);
    }
    Tensor rope_back(Graph & g, const Inputs & in, const Rope & r, Tensor dy) override {
        return rotate(g, in, r, dy, true);
    }
    Tensor attention(Graph & g, const Inputs & in, const Qkv & x, float scale) override {
        return portable_->attention(g, in, x, scale);
    }
    Tensor attention_out(Graph & g, Tensor attn, int64_t n_embd, int64_t n_tokens) override {
        return portable_->attention_out(g, attn, n_embd, n_tokens);
    }
    Qkv attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor attn, Tensor dout, float scale) override {
        return portable_->attention_back(g, in, x, attn, dout, scale);
    }
    Tensor swiglu(Graph & g, Tensor gate, Tensor up) override {
        return g.custom("swiglu", GGML_TYPE_F32, {gate->ne[0], gate->ne[1]}, {gate, up}, [=](Tensor h, int ith, int nth) {
            ggft::swiglu(floats(gate), floats(up), floats(h), ggml_nelements(gate), ith, nth);
        });
    }

    SwigluBack swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) override {
        const int64_t F = gate->ne[0], N = gate->ne[1];
        auto          kernel = [=](Tensor d, int ith, int nth) {
            ggft::swiglu_back(floats(gate), floats(up), floats(dh), floats(d), floats(d) + F * N, F * N, ith, nth);
        };
        Tensor d = g.custom("swiglu_back", GGML_TYPE_F32, {F, N, 2}, {gate, up, dh}, kernel);
        return {ggml_view_2d(g.ctx(), d, F, N, d->nb[1], 0), ggml_view_2d(g.ctx(), d, F, N, d->nb[1], d->nb[2])};
    }

    Loss loss(Graph & g, const Linear & w, Tensor n, Tensor labels, Tensor, bool need_dn) override {
        const LinearInput in{n, n, nullptr, 0};
        Tensor            logits = linear(g, w, {}, in, nullptr);
        auto              kernel = [=](Tensor nats, int ith, int nth) {
            cross_entropy_inplace(floats(logits), (const int32_t *) labels->data, floats(nats), need_dn, logits->ne[0],
                                  logits->ne[1], ith, nth);
        };
        Tensor nats = g.custom("cross_entropy", GGML_TYPE_F32, {n->ne[1]}, {logits, labels}, kernel);
        if (!need_dn) { return {nats, nullptr}; }
        g.expand(nats);
        // Depends on nats by order only: the node above has turned the logits into their gradient.
        return {nats, linear_back(g, w, {}, in, logits, nullptr, true)};
    }

  private:
    // In place on a linear's result, which nothing else reads.
    static Tensor rotate(Graph & g, const Inputs & in, const Rope & r, Tensor x, bool inverse) {
        const int64_t   n_dims = r.n_dims, N = in.N();
        const RopePairs pairs = r.mode == GGML_ROPE_TYPE_NEOX ? RopePairs::halves : RopePairs::adjacent;
        Tensor          cache = in.rope_cache;
        return g.custom_inplace("rope", x, {cache}, [=](Tensor y, int ith, int nth) {
            rope_inplace(floats(y), floats(cache), pairs, inverse, n_dims, y->ne[0], y->ne[1], N, ith, nth);
        });
    }

    Precision            precision_;
    float                dropout_;
    std::unique_ptr<Ops> portable_;
};

}  // namespace

std::unique_ptr<Ops> make_fused_ops(const Inputs & in, Mode mode, float dropout) {
    return std::make_unique<FusedOps>(in, mode, dropout);
}

}  // namespace ggft
