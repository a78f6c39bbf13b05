#include "patterns/experts.h"

#include <algorithm>
#include <vector>

namespace ggft {

namespace {

constexpr int64_t ROWS = 16; // of a matrix that are dequantized at once

struct Chosen {
    int64_t used, token;
};

// Who chose each expert.
std::vector<std::vector<Chosen>> by_expert(Tensor ids, int64_t n_experts) {
    std::vector<std::vector<Chosen>> chosen((size_t)n_experts);
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t j = 0; j < ids->ne[0]; j++) {
            const char * at = (const char *)ids->data + (size_t)t * ids->nb[1];
            chosen[(size_t)((const int32_t *)at)[j]].push_back({j, t});
        }
    }
    return chosen;
}

float * column(Tensor x, Chosen c) {
    char * at = (char *)x->data + (size_t)(c.used % x->ne[1]) * x->nb[1];
    return (float *)(at + (size_t)c.token * x->nb[2]);
}

// Rows [first, first + n) of an expert's matrix as F32.
void dequantize(Tensor w, int64_t expert, int64_t first, int64_t n, std::vector<float> & out) {
    out.resize((size_t)(n * w->ne[0]));
    for (int64_t r = 0; r < n; r++) {
        const char * row =
            (const char *)w->data + (size_t)expert * w->nb[2] + (size_t)(first + r) * w->nb[1];
        float * to = out.data() + r * w->ne[0];
        if (w->type == GGML_TYPE_F32) {
            std::copy_n((const float *)row, w->ne[0], to);
        } else {
            ggml_get_type_traits(w->type)->to_float(row, to, w->ne[0]);
        }
    }
}

// Calls f(expert, first row, rows) for the pieces that are thread ith's.
template <class F> void each_piece(Tensor w, int64_t rows_at_once, int ith, int nth, F f) {
    int64_t piece = 0;
    for (int64_t e = 0; e < w->ne[2]; e++) {
        for (int64_t first = 0; first < w->ne[1]; first += rows_at_once) {
            if (piece++ % nth == ith) {
                f(e, first, std::min(rows_at_once, w->ne[1] - first));
            }
        }
    }
}

} // namespace

Tensor expert_products(Graph & g, const RowwiseKernels & k, Tensor w, Tensor x, Tensor ids) {
    auto kernel = [=, &k](Tensor y, int ith, int nth) {
        const auto chosen = by_expert(ids, w->ne[2]);
        std::vector<float> rows;
        each_piece(w, ROWS, ith, nth, [&](int64_t e, int64_t first, int64_t n) {
            if (chosen[(size_t)e].empty()) {
                return;
            }
            dequantize(w, e, first, n, rows);
            for (const Chosen c : chosen[(size_t)e]) {
                for (int64_t r = 0; r < n; r++) {
                    const float * row = rows.data() + r * w->ne[0];
                    column(y, c)[first + r] = k.dot(row, column(x, c), w->ne[0]);
                }
            }
        });
    };
    return g.custom("experts", GGML_TYPE_F32, {w->ne[1], ids->ne[0], ids->ne[1]}, {w, x, ids},
                    kernel);
}

// A column of dx is one expert's alone, so that threads share the experts.
Tensor expert_products_back(Graph & g, const RowwiseKernels & k, Tensor w, Tensor dy, Tensor ids) {
    auto kernel = [=, &k](Tensor dx, int ith, int nth) {
        const auto chosen = by_expert(ids, w->ne[2]);
        std::vector<float> rows;
        each_piece(w, w->ne[1], ith, nth, [&](int64_t e, int64_t, int64_t) {
            for (const Chosen c : chosen[(size_t)e]) {
                std::fill_n(column(dx, c), w->ne[0], 0.0f);
            }
            for (int64_t first = 0; first < w->ne[1] && !chosen[(size_t)e].empty(); first += ROWS) {
                const int64_t n = std::min(ROWS, w->ne[1] - first);
                dequantize(w, e, first, n, rows);
                for (const Chosen c : chosen[(size_t)e]) {
                    float * to = column(dx, c);
                    for (int64_t r = 0; r < n; r++) {
                        const float factor = column(dy, c)[first + r];
                        const float * row = rows.data() + r * w->ne[0];
                        k.add_scaled(factor, row, w->ne[0], to);
                    }
                }
            }
        });
    };
    return g.custom("experts_back", GGML_TYPE_F32, {w->ne[0], ids->ne[0], ids->ne[1]}, {w, dy, ids},
                    kernel);
}

} // namespace ggft
