#include "patterns/fused.h"

namespace ggft {

Tensor packed(Graph & g, const char * name, const RowPacking & packing, Tensor x, Tensor done) {
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

std::unique_ptr<Ops> make_fused_ops(Mode mode, float dropout, int n_threads,
                                    size_t prepacked_bytes) {
    return std::make_unique<FusedOps>(mode, dropout, n_threads, prepacked_bytes);
}

} // namespace ggft
