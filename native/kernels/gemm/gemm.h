// Matrix products of activations with frozen weights of any ggml type, dequantized on the fly.
//
// Weights W are as in a GGUF: n_rows (N, outputs) rows of n_cols (K, inputs) elements, any type
// with a dequantizer, rows `row_bytes` apart. Activations are token-major: row t holds one token.
//
//   nt (forward):   y[t][n]  = sum_k x[t][k]  * W[n][k]
//   nn (backward): dx[t][k]  = sum_n dy[t][n] * W[n][k]
//
// Method (Goto and van de Geijn 2008; the BLIS papers): a thread owns a range of output columns,
// dequantizes a block of weights into panels that stay in its L2 cache, and runs every token past
// them, MR rows at a time, through the register tile of kernels/gemm/tile.h,
// kernels/gemm/tile_i16.h or kernels/gemm/tile_winograd.h. Each weight is dequantized once per
// call, whatever T, save when there are too few columns for the threads, which then also split the
// tokens; and once in all with panels that are kept (kernels/gemm/prepacked.h).
//
// Products of 16-bit integers take their rows packed, so that no thread packs what another has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ggml.h"
#include "kernels/isa/formats.h"
#include "kernels/isa/inline.h"

namespace ggft {

class WorkStealing;
struct Prepacked;

struct Weight {
    ggml_type type;
    int64_t n_rows, n_cols;
    const void * data;
    size_t row_bytes;
    const Prepacked * prepacked = nullptr; // its panels in the direction of the product, or none
};

/// T token rows of F32 or BF16, `stride` elements apart; or packed ones (RowPacking), which need no
/// stride.
struct Rows {
    const void * data;
    bool is_bf16 = false;
    int64_t stride = 0;
};

/// A LoRA term computed in the same pass, in F32, before the weights' part is added:
///   nt:  y[t][n] += scale * sum_r left[t][r] * right[n][r]           right is b, (N, R)
///   nn: dx[t][k] += keep[t][k] * scale * sum_r left[t][r] * right[r][k]   right is a, (R, K)
/// keep[t][k] is the dropout factor of kernels/rowwise/dropout.h, 1 where dropout is 0. nt ignores
/// it.
struct LowRank {
    const float * left;
    int64_t left_stride;
    const float * right;
    int rank;
    float scale = 1.0f;
    float dropout = 0.0f;
    uint64_t seed = 0;
};

/// Output: T rows of F32, `stride` elements apart; `add` adds to what is there.
struct Output {
    float * data;
    int64_t stride;
    bool add = false;
};

/// How products of 16-bit integers want their rows: made once by pack_tokens, all threads sharing
/// the work and the result. Those of a forward product suit every weight with as many inputs.
struct RowPacking {
    int64_t chunk = 0;       // reduction indices that lie together; 0: the product reads x as it is
    int64_t depth = 0;       // all of them
    int64_t stride = 0;      // words between the rows of a chunk
    int64_t token_words = 0; // of a token's rows, with what belongs to them

    GGFT_INLINE explicit operator bool() const { return chunk > 0; }
    GGFT_INLINE size_t words(int64_t n_tokens) const { return (size_t)(token_words * n_tokens); }
};

/// How a weight's panels lie in memory, in one direction.
struct PanelSize {
    size_t words; // of all
    size_t count; // by chunk of the reduction and panel: flags of Prepacked
};

/// Every function that computes is called by all `nth` threads, each with its own `ith`. They share
/// nothing that is written, wait for nobody, and give bit-identical results for a given nth.
/// Working memory is the thread's (kernels/isa/memory.h).
struct GemmKernels {
    /// Threads that are done help the others if there is `stealing`, which may be null; the result
    /// is the same to the bit.
    void (*nt)(Format format, const Weight & w, Rows x, const LowRank * low_rank, Output y,
               int64_t n_tokens, WorkStealing * stealing, int ith, int nth);
    void (*nn)(Format format, const Weight & w, Rows dy, const LowRank * low_rank, Output dx,
               int64_t n_tokens, WorkStealing * stealing, int ith, int nth);

    RowPacking (*packing_nt)(Format format, int64_t n_inputs);
    RowPacking (*packing_nn)(Format format, const Weight & w);
    void (*pack_tokens)(const RowPacking & packing, Rows x, int64_t n_tokens, void * out, int ith,
                        int nth);

    /// Of w only type and shape are read.
    PanelSize (*panel_size)(Format format, const Weight & w, bool nt);
    /// Bytes of working memory of one thread for products with w in either direction, about 1 MB;
    /// `rank` is that of LowRank or 0.
    size_t (*scratch_bytes)(Format format, const Weight & w, int rank);

    /// For profiling: while on, the first thread's seconds of making panels (dequantizing, laying
    /// out) add up in panel_seconds(), over all products. Turning it on starts at 0.
    void (*time_panels)(bool on);
    double (*panel_seconds)();
};

} // namespace ggft
