// FusedOps: the operations on custom CPU kernels (kernels_*.h), one node each. Weights are
// dequantized inside the matrix products, attention never holds its scores, and dropout masks are
// hashed, not stored.
#include "kernels/attention/attention.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/lora.h"
#include "kernels/gemm/prepacked.h"
#include "kernels/isa/work_stealing.h"
#include "kernels/rowwise/cross_entropy.h"
#include "kernels/rowwise/dropout.h"
#include "kernels/rowwise/rowwise.h"
#include "rules/ops.h"

namespace ggft {

namespace {

Weight weight_of(Tensor w) {
    return {w->type, w->ne[1], w->ne[0], w->data, w->nb[1]};
}

Rows rows_of(Tensor x) {
    return {x->data, x->type == GGML_TYPE_BF16, x->ne[0]};
}

float * floats(Tensor t) {
    return (float *)t->data;
}

class FusedOps : public Ops {
public:
    FusedOps(Mode mode, float dropout, int n_threads, size_t prepacked_bytes)
        : precision_(mode == Mode::fast ? Precision::fast : Precision::f32), dropout_(dropout),
          turns_(n_threads), prepacked_(prepacked_bytes) {}

    const char * name() const override { return "fused"; }

    size_t prepacked_bytes() const override { return prepacked_.bytes(); }

    Tensor rms_norm(Graph & g, Tensor x, Tensor w, float eps, bool for_linear) override {
        const ggml_type type = for_linear ? linear_type() : GGML_TYPE_F32;
        return g.custom("rms_norm", type, {x->ne[0], x->ne[1]}, {x, w},
                        [=](Tensor n, int ith, int nth) {
                            ggft::rms_norm(floats(x), floats(w), eps, x->ne[0], x->ne[1], as_f32(n),
                                           as_bf16(n), nullptr, ith, nth);
                        });
    }

    // In place on the residual, which is the gradient that nothing else reads any more.
    Tensor rms_norm_back(Graph & g, Tensor x, Tensor w, float eps, Tensor dn,
                         Tensor residual) override {
        Tensor r =
            g.custom("rms", GGML_TYPE_F32, {x->ne[1]}, {x, w}, [=](Tensor r, int ith, int nth) {
                ggft::rms_norm(floats(x), floats(w), eps, x->ne[0], x->ne[1], nullptr, nullptr,
                               floats(r), ith, nth);
            });
        if (residual == nullptr) {
            residual = ggml_scale(g.ctx(), dn, 0.0f);
        }
        return g.custom_inplace("rms_norm_back", residual, {x, w, r, dn},
                                [=](Tensor dx, int ith, int nth) {
                                    rms_norm_backward(floats(dn), floats(x), floats(w), floats(r),
                                                      x->ne[0], x->ne[1], floats(dx), ith, nth);
                                });
    }

    // All adapters that read x are projected down in one pass over it.
    LinearInput linear_input(Graph & g, const Inputs & in, Tensor x, int id, bool dropout,
                             std::vector<const LoraPair *> adapters) override {
        LinearInput r;
        r.x = x;
        r.packed = packed(g, "matmul_rows", packing_nt(precision_, x->ne[0]), x);
        r.adapters = std::move(adapters);
        if (dropout && in.seed != 0) {
            r.dropout = dropout_;
            r.seed = dropout_mix(in.seed + (uint64_t)id * 0x9e3779b97f4a7c15ull);
        }
        if (r.adapters.empty()) {
            return r;
        }
        std::vector<Tensor> args = {x};
        int64_t R = 0;
        for (const LoraPair * p : r.adapters) {
            args.push_back(p->a);
            R += p->a->ne[1];
        }
        auto kernel = [=, a = args](Tensor u, int ith, int nth) {
            LoraDown down[N_SITES];
            int64_t at = 0;
            for (size_t i = 1; i < a.size(); i++) {
                down[i - 1] = {floats(a[i]), (int)a[i]->ne[1], floats(u) + at, u->ne[0]};
                at += a[i]->ne[1];
            }
            lora_down(rows_of(x), {r.dropout, r.seed}, x->ne[0], x->ne[1], down, (int)a.size() - 1,
                      ith, nth);
        };
        r.u = g.custom("lora_down", GGML_TYPE_F32, {R, x->ne[1]}, args, kernel);
        return r;
    }

    Tensor dropped(Graph & g, const LinearInput & in) override {
        if (in.dropout == 0) {
            return in.x;
        }
        Tensor x = in.x;
        const float p = in.dropout;
        return g.custom("dropout", GGML_TYPE_F32, {x->ne[0], x->ne[1]}, {x},
                        [=, seed = in.seed](Tensor y, int ith, int nth) {
                            for (int64_t t = ith; t < x->ne[1]; t += nth) {
                                for (int64_t c = 0; c < x->ne[0]; c++) {
                                    const int64_t i = t * x->ne[0] + c;
                                    floats(y)[i] = floats(x)[i] * dropout_factor(seed, t, c, p);
                                }
                            }
                        });
    }

    Tensor linear(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                  Tensor residual) override {
        Tensor W = w.weight, u = lora ? in.u : nullptr;
        const Weight weight = prepacked_.with_panels(precision_, weight_of(W), true);
        const Precision precision = precision_;
        const LoraPair pair = lora;
        const int64_t at = lora ? row_of(in, lora) : 0;
        Turns * turns = &turns_;
        Tensor x = in.packed;
        std::vector<Tensor> args = {W, x};
        if (u != nullptr) {
            args.push_back(u);
        }
        Tensor y = g.custom("matmul", GGML_TYPE_F32, {W->ne[1], in.x->ne[1]}, args,
                            [=](Tensor y, int ith, int nth) {
                                LowRank low{};
                                if (u != nullptr) {
                                    low = {floats(u) + at, u->ne[0], floats(pair.b),
                                           (int)pair.b->ne[0], pair.scale};
                                }
                                matmul_nt(precision, weight, rows_of(x), u ? &low : nullptr,
                                          {floats(y), y->ne[0]}, y->ne[1], turns, ith, nth);
                            });
        if (w.bias != nullptr) {
            y = ggml_add(g.ctx(), y, w.bias);
        }
        return residual == nullptr ? y : ggml_add(g.ctx(), y, residual);
    }

    Tensor linear_back(Graph & g, const Linear & w, const LoraPair & lora, const LinearInput & in,
                       Tensor dy, Tensor acc, bool need_dx) override {
        Tensor W = w.weight, du = lora ? lora_gradients(g, lora, in, dy) : nullptr;
        const LoraPair pair = lora;
        if (!need_dx) {
            return acc;
        }
        const int64_t N = dy->ne[1];
        const Weight weight = prepacked_.with_panels(precision_, weight_of(W), false);
        dy = packed(g, "matmul_rows", packing_nn(precision_, weight), dy);
        std::vector<Tensor> args = {W, dy};
        if (du != nullptr) {
            args.push_back(du);
        }
        auto kernel = [=, turns = &turns_, precision = precision_, p = in.dropout,
                       seed = in.seed](Tensor dx, int ith, int nth) {
            LowRank low{};
            if (du != nullptr) {
                low = {floats(du), du->ne[0], floats(pair.a), (int)du->ne[0], 1.0f, p, seed};
            }
            matmul_nn(precision, weight, rows_of(dy), du ? &low : nullptr,
                      {floats(dx), dx->ne[0], acc != nullptr}, dx->ne[1], turns, ith, nth);
        };
        return acc != nullptr ? g.custom_inplace("matmul_back", acc, args, kernel)
                              : g.custom("matmul_back", GGML_TYPE_F32, {W->ne[0], N}, args, kernel);
    }

    Tensor rope(Graph & g, const Inputs & in, const Rope & r, Tensor x) override {
        return rotate(g, in, r, x, false);
    }
    Tensor rope_back(Graph & g, const Inputs & in, const Rope & r, Tensor dy) override {
        return rotate(g, in, r, dy, true);
    }
    // Rows of the result, one after the other: o [D, H, N], then the logsumexp of the scores [H,
    // N].
    Tensor attention(Graph & g, const Inputs & in, const Qkv & x, float scale) override {
        const AttentionShape shape = attention_shape(in, x, scale);
        Tensor starts = in.starts;
        const int64_t size = ggml_nelements(x.q);
        auto kernel = [=, precision = precision_](Tensor y, int ith, int nth) {
            ggft::attention(precision, shape, floats(x.q), floats(x.k), floats(x.v),
                            (const int32_t *)starts->data, floats(y), floats(y) + size, ith, nth);
        };
        return g.custom("attention", GGML_TYPE_F32, {size + shape.n_head * in.N()},
                        {x.q, x.k, x.v, starts}, kernel);
    }

    Tensor attention_out(Graph & g, Tensor attn, int64_t n_embd, int64_t n_tokens) override {
        return ggml_view_2d(g.ctx(), attn, n_embd, n_tokens, (size_t)n_embd * sizeof(float), 0);
    }

    Qkv attention_back(Graph & g, const Inputs & in, const Qkv & x, Tensor attn, Tensor dout,
                       float scale) override {
        ggml_context * c = g.ctx();
        const AttentionShape shape = attention_shape(in, x, scale);
        Tensor starts = in.starts;
        const int64_t nq = ggml_nelements(x.q), nk = ggml_nelements(x.k);
        auto kernel = [=, precision = precision_](Tensor d, int ith, int nth) {
            attention_backward(precision, shape, floats(x.q), floats(x.k), floats(x.v),
                               (const int32_t *)starts->data, floats(attn), floats(attn) + nq,
                               floats(dout), floats(d), floats(d) + nq, floats(d) + nq + nk, ith,
                               nth);
        };
        Tensor d = g.custom("attention_back", GGML_TYPE_F32, {nq + 2 * nk},
                            {x.q, x.k, x.v, starts, attn, dout}, kernel);
        auto part = [&](Tensor like, int64_t at) {
            return ggml_view_3d(c, d, like->ne[0], like->ne[1], like->ne[2], like->nb[1],
                                like->nb[2], (size_t)at * sizeof(float));
        };
        return {part(x.q, 0), part(x.k, nq), part(x.v, nq + nk)};
    }

    Tensor swiglu(Graph & g, Tensor gate, Tensor up) override {
        return g.custom("swiglu", linear_type(), {gate->ne[0], gate->ne[1]}, {gate, up},
                        [=](Tensor h, int ith, int nth) {
                            ggft::swiglu(floats(gate), floats(up), ggml_nelements(gate), as_f32(h),
                                         as_bf16(h), ith, nth);
                        });
    }

    // dup takes the place of dh.
    SwigluBack swiglu_back(Graph & g, Tensor gate, Tensor up, Tensor dh) override {
        Tensor dgate =
            g.custom("swiglu_back", GGML_TYPE_F32, {gate->ne[0], gate->ne[1]}, {gate, up, dh},
                     [=](Tensor d, int ith, int nth) {
                         swiglu_backward(floats(dh), floats(gate), floats(up), ggml_nelements(gate),
                                         floats(d), floats(dh), ith, nth);
                     });
        return {g.expand(dgate), dh};
    }

    // The logits' gradient takes the logits' place, in fast mode as BF16 in the first half of each
    // row.
    Loss loss(Graph & g, const Linear & w, Tensor n, Tensor labels, Tensor, bool need_dn) override {
        LinearInput in;
        in.x = n;
        in.packed = packed(g, "loss_rows", packing_nt(precision_, n->ne[0]), n);
        Tensor z = linear(g, w, {}, in, nullptr);
        ggml_set_name(z, "loss_logits");
        const bool bf16 = linear_type() == GGML_TYPE_BF16;
        const int64_t V = z->ne[0], M = z->ne[1];
        Tensor nats = g.custom(
            "cross_entropy", GGML_TYPE_F64, {M}, {z, labels}, [=](Tensor nats, int ith, int nth) {
                const LogitGradient gradient{need_dn, bf16 ? (uint16_t *)z->data : nullptr, 2 * V};
                cross_entropy(floats(z), V, (const int32_t *)labels->data, V, M, gradient,
                              (double *)nats->data, ith, nth);
            });
        if (!need_dn) {
            return {nats, nullptr};
        }
        Tensor W = w.weight;
        const Weight weight = prepacked_.with_panels(precision_, weight_of(W), false);
        Tensor dz = packed(g, "loss_rows", packing_nn(precision_, weight), z, nats);
        Tensor dn =
            g.custom("loss_back", GGML_TYPE_F32, {W->ne[0], M}, {W, nats, dz},
                     [=, turns = &turns_, precision = precision_](Tensor dn, int ith, int nth) {
                         matmul_nn(precision, weight, {dz->data, bf16, bf16 ? 2 * V : V}, nullptr,
                                   {floats(dn), dn->ne[0]}, M, turns, ith, nth);
                     });
        return {nats, dn};
    }

private:
    static AttentionShape attention_shape(const Inputs & in, const Qkv & x, float scale) {
        return {in.N(), (int)x.q->ne[1], (int)x.k->ne[1], (int)x.q->ne[0], scale, in.T};
    }

    // x as the products read it: itself, or packed after `done` has been computed.
    static Tensor packed(Graph & g, const char * name, const RowPacking & packing, Tensor x,
                         Tensor done = nullptr) {
        if (!packing) {
            return x;
        }
        std::vector<Tensor> args = {x};
        if (done != nullptr) {
            args.push_back(done);
        }
        const int64_t n = x->ne[1];
        return g.custom(name, GGML_TYPE_I32, {(int64_t)packing.words(n)}, args,
                        [=](Tensor rows, int ith, int nth) {
                            pack_tokens(packing, rows_of(x), n, rows->data, ith, nth);
                        });
    }

    // Where in the stacked u an adapter's rows begin.
    static int64_t row_of(const LinearInput & in, const LoraPair & lora) {
        int64_t at = 0;
        for (const LoraPair * p : in.adapters) {
            if (p->a == lora.a) {
                break;
            }
            at += p->a->ne[1];
        }
        return at;
    }

    // du = scale Bᵀ dy; adds dA = du dropout(x)ᵀ and dB = scale dy uᵀ.
    static Tensor lora_gradients(Graph & g, const LoraPair & lora, const LinearInput & in,
                                 Tensor dy) {
        Tensor x = in.x, u = in.u;
        const LoraPair pair = lora;
        const int64_t at = row_of(in, lora), C = x->ne[0], N = x->ne[1];
        const int R = (int)lora.b->ne[0];
        Tensor du = g.custom("lora_up_t", GGML_TYPE_F32, {R, N}, {dy, lora.b},
                             [=](Tensor du, int ith, int nth) {
                                 lora_up_t(rows_of(dy), floats(pair.b), R, pair.scale, dy->ne[0], N,
                                           floats(du), R, ith, nth);
                             });
        g.expand(
            g.custom_inplace("lora_grad_b", lora.db, {dy, u}, [=](Tensor db, int ith, int nth) {
                lora_grad_b(rows_of(dy), floats(u) + at, u->ne[0], R, pair.scale, dy->ne[0], N,
                            floats(db), ith, nth);
            }));
        const Dropout dropout{in.dropout, in.seed};
        g.expand(
            g.custom_inplace("lora_grad_a", lora.da, {x, du}, [=](Tensor da, int ith, int nth) {
                lora_grad_a(rows_of(x), dropout, floats(du), R, R, 1.0f, C, N, floats(da), ith,
                            nth);
            }));
        return du;
    }

    // In place on a linear's result, which nothing else reads.
    static Tensor rotate(Graph & g, const Inputs & in, const Rope & r, Tensor x, bool backward) {
        const RopeMode mode = r.mode == GGML_ROPE_TYPE_NEOX ? RopeMode::neox : RopeMode::norm;
        const int n_rot = r.n_dims;
        Tensor cos = in.rope_cos, sin = in.rope_sin;
        return g.custom_inplace("rope", x, {cos, sin}, [=](Tensor y, int ith, int nth) {
            const int64_t row = y->ne[0] * y->ne[1];
            ggft::rope(floats(y), row, floats(cos), floats(sin), mode, n_rot, (int)y->ne[0],
                       (int)y->ne[1], y->ne[2], backward, floats(y), row, ith, nth);
        });
    }

    // What the inputs of linears are stored as: what the matrix products read.
    ggml_type linear_type() const {
        return precision_ == Precision::fast && has_bf16_dot() ? GGML_TYPE_BF16 : GGML_TYPE_F32;
    }
    static float * as_f32(Tensor t) { return t->type == GGML_TYPE_F32 ? floats(t) : nullptr; }
    static uint16_t * as_bf16(Tensor t) {
        return t->type == GGML_TYPE_BF16 ? (uint16_t *)t->data : nullptr;
    }

    Precision precision_;
    float dropout_;
    Turns turns_; // nodes are computed one after the other
    PrepackedWeights prepacked_;
};

} // namespace

std::unique_ptr<Ops> make_fused_ops(Mode mode, float dropout, int n_threads,
                                    size_t prepacked_bytes) {
    return std::make_unique<FusedOps>(mode, dropout, n_threads, prepacked_bytes);
}

} // namespace ggft
