// Cross entropy over logits, in place: the loss of a chunk of positions and its gradient by their logits.
#pragma once

#include <cstdint>

namespace ggft {

/// For each of n_rows rows of n_vocab logits and its label:
///   nats[r] = logsumexp(logits[r]) - logits[r][label]
/// and, when `gradient` is true, logits[r] becomes softmax(logits[r]) - onehot(label), the gradient of nats[r].
/// Sums are in double, so that the loss does not lose the small differences of a trained model. A thread owns
/// a range of rows.
void cross_entropy_inplace(float * logits, const int32_t * labels, float * nats, bool gradient, int64_t n_vocab,
                           int64_t n_rows, int ith, int nth);

}  // namespace ggft
