// What an engine will take, by the code that allocates: it is built as for a run, over the mapped
// file, which may be one of holes behind its header, but all memory is only measured.
#pragma once

#include "engine/engine.h"

namespace ggft {

class Forecast {
public:
    // The configuration's micro-batch, `keep` and `prepacked_bytes` are of no matter. Throws as an
    // engine does.
    explicit Forecast(const EngineConfig & config);

    // What Engine::buffer_bytes says once such an engine is open.
    Buffers buffers(int64_t n_rows, int64_t n_tokens, bool keep, size_t prepacked_bytes) const;

    const char * kernels() const { return kernels_; }
    int64_t n_parameters() const { return n_parameters_; } // of the adapter
    size_t prepackable_bytes() const { return prepackable_bytes_; }
    int64_t n_vocab() const { return model_->hparams.n_vocab; }

private:
    EngineConfig config_;
    std::shared_ptr<const Model> model_;
    const char * kernels_;
    int64_t n_parameters_ = 0;
    size_t prepackable_bytes_;
};

} // namespace ggft
