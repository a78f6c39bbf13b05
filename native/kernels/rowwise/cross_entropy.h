// Cross entropy of a chunk of logits and its gradient, in one visit of each row.
//
//   nats[t] = log(sum_v e^(z[t][v] - max)) + max - z[t][label[t]]
//   dz[t][v] = e^(z[t][v] - max) / sum - (v == label[t])      (gradient of the SUM of nats)
//
// Exponentials are F32 within 2 ulp, sums over the vocabulary are kept in double.
#pragma once

#include <cstdint>

namespace ggft {

/// What cross_entropy leaves behind besides nats.
struct LogitGradient {
    bool wanted = true;        // false: logits are only read
    uint16_t * bf16 = nullptr; // null: dz replaces the logits; else dz is written here as BF16 and
                               // the logits are scratch
    int64_t bf16_stride = 0; // elements; bf16 may be the logits' own memory with twice their stride
};

struct LossKernels {
    /// logits: n_rows of n_vocab floats, `stride` apart. A label of -1 means: not trained; nats and
    /// dz are 0. Rows are split between the nth threads. nats: one per row. Non-finite logits give
    /// non-finite nats.
    void (*cross_entropy)(float * logits, int64_t stride, const int32_t * labels, int64_t n_vocab,
                          int64_t n_rows, LogitGradient gradient, double * nats, int ith, int nth);
};

} // namespace ggft
